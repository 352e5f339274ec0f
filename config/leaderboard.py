"""The rival: the half-hour leaderboard's own recipe, as its table describes it, on the text of
config/babylm.py.

    python train.py config/leaderboard.py config/split_by_lines.py
    python bench_mfu.py --doll config/leaderboard.py

11.0M parameters, 12 layers 256 wide, vocabulary of 6,144, tied; RMSNorm with gains, RoPE, GELU; 32,768 tokens
a step; AdamW at 0.0072 (of 256 channels, inversely with width), decay 0.02, up for a tenth of the run and
down a cosine (OneCycle). 1.31 bits per byte is reported of its lines (samasutherland,
little-language-models). What its table does not say is GPT-2's: initialisation, attention over whole rows.
Not an idea to keep, but what the baseline is measured beside. In dolls of the half hour (RESULTS.md, "Dolls"),
97,328 parameters: 2.321 beside 2.095, 10.8 % more; 65,576, at an eighth of its rate, the best of three:
2.268 beside 2.213, 2.5 % more.
"""
import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
import train
from config.babylm import Corpus, Measure

dataset = 'babylm_2026_100m'
vocab_size = 6144
n_layer = 12
n_head = 4
n_embd = 256
block_size = 512
tie_embeddings = True
qk_norm = False
token_shift = False
doc_mask = False
tokens_per_step = 32768
micro_batch_size = 64
optimizer = 'adamw'
learning_rate = 0.0072
weight_decay = 0.02
beta1 = 0.9
beta2 = 0.95
warmup_frac = 0.1
evals = 'all'
NOT_WITH = dict.fromkeys(('climb_objective', 'domains', 'experts', 'growth', 'multi_token', 'tokenformer'),
                         'it looks for what the base has and the rival lacks')


class MLP(model.MLP):
    def through(self, x, up, down):
        return self.down(F.gelu(self.up(x, up)), down)


class Block(model.Block):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.mix, self.gains = None, nn.Parameter(torch.ones(2, config.n_embd))

    def forward(self, x, x0, context):
        before_attention, before_mlp = self.gains.to(x.dtype)
        x = x + self.attn(before_attention * model.rms_norm(x), context)
        return x + self.mlp(before_mlp * model.rms_norm(x), context)

    def init_weights(self):
        self.attn.init_weights()
        self.mlp.init_weights()
        self.gains.fill_(1)


class GPT(model.GPT):
    def build(self, config):
        super().build(config)
        self.gain = nn.Parameter(torch.ones(config.n_embd))

    def init_weights(self):
        super().init_weights()
        self.gain.fill_(1)
        for name, p in self.named_parameters():
            if re.search(r'(wte|lm_head|attn\.[qkv]|proj|mlp\.(up|down))\.weight$', name):
                into_stream = name.endswith(('proj.weight', 'down.weight'))
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer) if into_stream else 0.02)

    def embed(self, context):
        return self.wte(context.idx).to(self.compute_dtype)

    def final(self, x):
        return self.gain.to(x.dtype) * model.rms_norm(x)


class Run(train.Run):
    def groups(self, model):
        """All at one rate; matrices and tables decay."""
        s, rate = self.s, self.s.learning_rate * 256 / model.config.n_embd
        decay, rest = ([p for name, p in model.named_parameters() if name.endswith('weight') == wanted]
                       for wanted in (True, False))
        return dict(matrices=dict(params=decay, base_lr=rate, base_decay=s.weight_decay),
                    rest=dict(params=rest, base_lr=rate))

    def rate(self, progress):
        """From a 25th up to 1 along a cosine, and so down to nothing."""
        up = self.s.warmup_frac
        if progress < up:
            return 1 - 0.48 * (1 + math.cos(math.pi * progress / up))
        return 0.5 * (1 + math.cos(math.pi * (progress - up) / (1 - up)))

    def decay(self, progress):
        return 1.0

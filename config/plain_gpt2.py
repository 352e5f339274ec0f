"""The rival: GPT-2 as nanoGPT trains it. Not an idea to keep, but what the baseline is measured beside.

LayerNorm, GELU, biases, learned positions, attention over whole rows whatever documents they hold, all logits
at once, AdamW on a cosine, random windows of the token stream; bf16 is autocast's (Radford 2019; Karpathy's
nanoGPT). Tied embeddings and the initialisation of the paper.

    python train.py config/babylm.py config/plain_gpt2.py --budget_counts=training
    python bench_mfu.py config/babylm.py --beside=config/plain_gpt2.py --only=steps

What came of it stands in RESULTS.md. Verdict: lost to the baseline at every size tried, on CPUs.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import model
import train

optimizer = 'adamw'
learning_rate = 0.001
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
tie_embeddings = True
token_shift = False
gpt2_dropout: float = 0.0   # 0..0.9: of the embedding, of attention's weights, of what is added to the stream

NOT_WITH = dict.fromkeys((
    'attention_gate bigrams climb_data climb_objective distillation domains dropout dynamics experts growth latent_attention layer_loop '
    'leaderboard loss_kernels masked multi_token skips softcap stochastic_depth tokenformer value_embeds '
    'value_projections window').split(),
    'GPT-2 has a model of its own')


class Block(model.Block):
    def __init__(self, config, layer):
        nn.Module.__init__(self)
        C, self.n_head = config.n_embd, config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.drop = nn.Dropout(config.gpt2_dropout)

    def forward(self, x):
        qkv = self.qkv(self.ln_1(x)).chunk(3, dim=2)
        q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in qkv)      # (B, H, T, D)
        dropped = self.drop.p if self.training else 0.0
        o = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=True)
        x = x + self.drop(self.proj(o.transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(F.gelu(self.up(self.ln_2(x)))))


class GPT(model.GPT):
    def build(self, config):
        super().build(config)
        self.wpe, self.ln_f = nn.Embedding(config.block_size, config.n_embd), nn.LayerNorm(config.n_embd)

    def init_weights(self):
        for name, p in self.named_parameters():
            if p.ndim == 2:
                into_stream = 'proj' in name or 'down' in name
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer) if into_stream else 0.02)
            elif name.endswith('bias'):
                p.zero_()

    def forward(self, idx, targets, reduction='mean', **extras):
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            return super().forward(idx, targets, reduction, **extras)

    def trunk(self, idx, cache=None, **extras):
        x = F.dropout(self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device)),
                      self.config.gpt2_dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.ln_f(x)

    def loss(self, x, targets, reduction, **extras):
        logits = self.lm_head(x).flatten(0, 1).float()
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction=reduction)
        return loss.view_as(targets) if reduction == 'none' else loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, min_p=0.0,
                 repetition_penalty=1.0, **extras):
        for _ in range(max_new_tokens):                 # without a cache
            logits = self.logits(self.trunk(idx[:, -self.config.block_size:])[:, -1])
            new = model.sample_token(logits, temperature, top_k, top_p, generator, min_p, repetition_penalty, idx)
            idx = torch.cat([idx, new[:, None]], dim=1)
            yield new

    def matrices(self):
        return [p for p in self.blocks.parameters() if p.ndim == 2] + [self.lm_head.weight]

    def attended(self, idx):
        return (idx.shape[1] + 1) / 2


class Stream(train.Stream):
    def __init__(self, data, s, weights=None):
        super().__init__(data, s, weights)
        train.refuse(self.weights, 'GPT-2 reads random windows, where no source comes more often: leave out what weighs sources')

    def rows(self, first, B, T):
        starts = np.random.default_rng([self.s.seed, first]).integers(len(self.tokens) - T, size=B)
        return np.stack([self.tokens[i:i + T + 1] for i in starts]).astype(np.int64)


class Run(train.Run):
    def groups(self, model):
        """Those that decay, which are the matrices and tables, and the rest; one rate for all."""
        s = self.s
        decay, rest = ([p for p in model.parameters() if (p.ndim == 2) == wanted] for wanted in (True, False))
        return dict(matrices=dict(params=decay, base_lr=s.learning_rate, base_decay=s.weight_decay),
                    rest=dict(params=rest, base_lr=s.learning_rate))

    def rate(self, progress):
        """A linear rise over 2 % of progress, then a cosine to a tenth."""
        if progress < 0.02:
            return progress / 0.02
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98))

    def decay(self, progress):
        return 1.0

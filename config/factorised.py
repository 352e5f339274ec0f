"""A table of narrow rows, and two matrices between them and the layers: what that saves can go into the layers.

    torchrun train.py config/babylm.py config/factorised.py --n_layer=8

Whence: ALBERT (Lan 2019, 1909.11942); of BabyLM's entries RecGPT, whose one block is looped, has it too. Where
8,192 tokens of 320 channels are a quarter of the parameters, rows of 128 are a tenth, and pay for a layer more.
The head reads through the narrow side as well, so that logits are of rank table_dim. Expected: a gain where
parameters are what is scarce, if the head does not need its width. What it did: 2.2652 bits per byte beside
2.2131 at as many parameters, rows of 16 under layers 32 wide, in a doll of config/babylm.py (RESULTS.md,
"Dolls"), +2.4 %. Lost.
"""
import torch.nn as nn

import model
import train
from model import Linear, rms_norm

table_dim: int = 128        # 1..: channels of a row

NOT_WITH = dict.fromkeys(('growth', 'climb_objective', 'distillation', 'multi_token', 'plain_gpt2', 'leaderboard'),
                         'it takes a table to be as wide as the layers')


class Table(nn.Embedding):
    """Rows (V, table_dim), widened as they are looked up."""

    def __init__(self, config):
        super().__init__(config.vocab_size, config.table_dim)
        self.widen = Linear(config.table_dim, config.n_embd)

    def forward(self, idx):
        return self.widen(super().forward(idx))


class GPT(model.GPT):

    def build(self, config):
        super().build(config)
        self.wte, self.lm_head = Table(config), Linear(config.table_dim, config.vocab_size)
        self.narrow = Linear(config.n_embd, config.table_dim)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight

    def init_weights(self):
        super().init_weights()
        for linear in (self.wte.widen, self.narrow):
            linear.weight.normal_(std=linear.in_features ** -0.5)
        self.lm_head.weight.normal_(std=0.5 / self.config.table_dim)

    def loss(self, x, targets, reduction, **extras):
        return super().loss(rms_norm(self.narrow(x)), targets, reduction, **extras)

    def logits(self, x):
        return super().logits(rms_norm(self.narrow(x)))

    def matrices(self):
        *layers, head = super().matrices()
        return [*layers, self.wte.widen.weight, self.narrow.weight, head]


class Run(train.Run):

    def shape_names(self):
        return [*super().shape_names(), 'table_dim']

    def groups(self, model):
        groups = super().groups(model)
        groups['matrices']['params'].extend([model.wte.widen.weight, model.narrow.weight])
        groups['heads']['base_lr'] = self.s.head_lr * 256 / model.config.table_dim
        return groups

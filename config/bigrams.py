"""Bigram embeddings: beside each token's embedding comes one of the token together with the one before, from a
table that many pairs share.

    torchrun train.py config/nocap.py config/bigrams.py

Whence: hashed n-gram embeddings (Tito Svenstrup 2017, 1709.03933; Huang 2025, 2501.16975), of which the
modded-nanogpt speedrun has one since 2026. A row is looked up, not multiplied: parameters grow, FLOPs do not.
Where pairs collide they share a row, with a sign of their own. Expected: a gain where parameters are free and
text is read a few times; a loss where it is read often, as rare pairs are learned by heart.
What it did: 1.9697 bits per byte beside 1.9680 and 1.9696 (seeds 1, 2), with 4,096 rows, in a doll of
config/nocap.py whose text is read 3.3 times (RESULTS.md, "Dolls"); of 512 ids, where attention finds pairs by
itself. No gain there; where 114,000 tokens are read twelve times, 2.779 with 1,024 rows beside 2.667: repetition
spoils it, 4.2 % worse with 42 % more parameters. In a doll of config/tinystories.py, four layers 24 wide, 1,024 rows,
61 % more parameters: 1.5495 beside 1.5767, 1.7 % better (one seed).
"""
import torch
import torch.nn as nn

import model
import train

bigram_rows: int = 32768    # 2..: of the table, which is that times n_embd


class GPT(model.GPT):

    def build(self, config):
        super().build(config)
        self.bigrams = nn.Embedding(config.bigram_rows, config.n_embd)
        self.bigram_gain = nn.Parameter(torch.empty(()))

    def init_weights(self):
        super().init_weights()
        self.bigrams.weight.zero_()
        self.bigram_gain.fill_(0.2)

    def embed(self, context):
        row, sign = self.pairs(context)
        more = self.bigram_gain * sign * self.bigrams(row)
        x = super().embed(context)
        return x + more.to(x.dtype)

    def pairs(self, context):
        """Where each token's pair with the one before, none at a document's start, stands in the table (B, T),
        and its sign (B, T, 1)."""
        now, V = context.idx, self.config.vocab_size
        follows = (now != self.config.bos)[..., None]
        before = model.shift(now[..., None] + 1, follows, self.bigrams, context.cache)[..., 0]
        mixed = (before * V + now) * 0x9E3779B1 % 2 ** 32       # Knuth's multiplicative hash
        mixed = (mixed ^ mixed >> 15) * 0x85EBCA77 % 2 ** 32
        return mixed // 2 % self.config.bigram_rows, (1 - 2 * (mixed % 2))[..., None]


class Run(train.Run):

    def shape_names(self):
        return [*super().shape_names(), 'bigram_rows']

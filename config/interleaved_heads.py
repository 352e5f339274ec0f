"""Heads that share: before attention each head's queries, keys and values become learned mixtures of all heads'.

    torchrun train.py config/babylm.py config/interleaved_heads.py

Whence: interleaved head attention (Duvvuri 2026, 2602.21371), of which this is the mixing alone, without its
further pseudo-tokens (which cost their number squared), as the slowrun leaderboard has it: it reports 0.006 to
0.008 nats where text is read sixteen times. Three matrices of heads times heads a layer, 1 at first; what they
can say the projections can too, so that they change how it is learned, not what. Expected: a tenth of a percent.
What it did: 2.2037 bits per byte beside 2.2098 and 2.2104 (seeds 1, 2) in a doll of config/babylm.py with two heads
(RESULTS.md, "Dolls"): 0.3 %, one seed. Even.
"""
import torch
import torch.nn as nn

import model
import train
from config.grown_weights import widen

NOT_WITH = dict.fromkeys(('leaderboard', 'plain_gpt2'), 'AdamW moves all that it has')


class Mixes(nn.ParameterList):

    def grow_from(self, old, dice):
        """Copies of a head are mixed as it was."""
        return {p: widen(p, q, True, '', None) for p, q in zip(self, old)}


class Attention(model.Attention):

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.mixes = Mixes(nn.Parameter(torch.empty(n, n)) for n in (self.n_head, *2 * [self.n_kv_head]))

    def packed(self, x, context):
        parts = super().packed(x, context).split([len(mix) for mix in self.mixes], dim=2)
        return torch.cat([torch.einsum('bthd,hg->btgd', part, mix.to(x.dtype)) for part, mix in zip(parts, self.mixes)], dim=2)

    def init_weights(self):
        super().init_weights()
        for mix in self.mixes:
            nn.init.eye_(mix)


class GPT(model.GPT):

    def matrices(self):
        """A mix is applied to every channel of a head."""
        return [mix for block in self.blocks for mix in block.attn.mixes for _ in range(block.attn.head_dim)] + super().matrices()


class Run(train.Run):

    def groups(self, model):
        groups = super().groups(model)
        groups['scalars']['params'].extend(mix for block in model.blocks for mix in block.attn.mixes)
        return groups

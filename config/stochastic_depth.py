"""Stochastic depth (Huang 2016, 1603.09382): rows of the batch skip what a layer adds, the later the layer
the more often.

    torchrun train.py config/babylm.py config/stochastic_depth.py

Attention and MLP are skipped apart from each other, with a chance that rises linearly to 0.2 in the last
layer; what is kept counts for more, so that its mean stays. Rows, not steps: the program is the same every
time, so nothing is saved, and the gain must come from regularisation. Expected: as dropout, for text that is
read many times. What it did: +1.2 % bits per byte in ten minutes of a CPU, less than an epoch (one seed,
commit 91d7dcc). Again on shuffled rows, in a scale model of a fifth of an epoch, three
seeds: 0.9 % worse. Lost in a first epoch (RESULTS.md).
In a doll of config/tinystories.py, 3.6 readings, 5.8 % worse (one seed; RESULTS.md, "Dolls").
"""
import functools

import torch.nn.functional as F

import model

layer_drop: float = 0.2     # 0..0.95: chance that a row skips what the last layer adds; less below


class Block(model.Block):
    page = ''                # what a page computes is the baseline's

    def __init__(self, config, layer):
        super().__init__(config, layer)
        chance = config.layer_drop * (layer + 1) / config.n_layer
        for branch in (self.attn, self.mlp):
            branch.register_forward_hook(functools.partial(thin_out, chance))


def thin_out(chance, module, inputs, branch):
    """A forward hook: a branch (B, T, C) without some of its rows."""
    return branch * F.dropout(branch.new_ones(len(branch), 1, 1), chance, module.training)

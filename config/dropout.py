"""Dropout (Srivastava 2014) of what every attention and MLP adds to the residual stream.

    torchrun train.py config/babylm.py config/dropout.py

For text that is read many times: in half an hour of a card BabyLM's 10 million words may come round some
120 times, 100 million twelve (estimated). The slowrun leaderboard (100 million tokens, fifteen epochs) trains
with 0.1. In a first epoch it only costs capacity. Expected: worse on large text, better from ten epochs or so
on. What it did: +0.9 % bits per byte in ten minutes of a CPU, a fifth of an epoch (1.5603 beside 1.5462,
standard deviation 0.0020; 2026-11-21, commit 3f931df). Lost in a first epoch (RESULTS.md). In a doll of
BabyLM's 10 million words on a card (RESULTS.md, "Dolls"), one seed: 2.703 bits per byte beside 3.440 at 121
epochs, 2.642 beside 2.804 at 24. Won where text is read that often.
In a doll of config/tinystories.py, 3.6 readings, 4.8 % worse (one seed; RESULTS.md, "Dolls").
"""
import functools

import torch.nn.functional as F

import model

dropout: float = 0.1        # 0..0.95: share of what attention and MLP add that training leaves out, at random


class Block(model.Block):
    page = ''                # what a page computes is the baseline's

    def __init__(self, config, layer):
        super().__init__(config, layer)
        for branch in (self.attn, self.mlp):
            branch.register_forward_hook(functools.partial(thin_out, config.dropout))


def thin_out(rate, module, inputs, branch):
    """A forward hook: what is left of a branch."""
    return F.dropout(branch, rate, module.training)

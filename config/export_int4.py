"""A run of its own with matrices in int4, groups of 32 with a scale each: half the size of int8, at some cost.

    python sample.py out/babylm --export int4       out/babylm/int4
"""
import math

import numpy as np
import torch

from config import export_int8
from config.export_int8 import GROUP


def write(run):
    export_int8.write_packed(run, 'int4', quantised_4bit)


def load(model, state, device):
    export_int8.load(model, state, device)


def quantised_4bit(weight):
    """uint8 q (rows, columns / 2), an even column's 4 bits below an odd one's, and bfloat16 scale (rows,
    columns / GROUP): a weight is scale times bits - 8, its group's largest in size -8 or nearly. The scale is
    the one of nine of the least squared error."""
    x = weight.unflatten(1, (-1, GROUP))
    peak, best = x.gather(-1, x.abs().argmax(-1, keepdim=True)), torch.full(x.shape[:2], math.inf)
    q, scale = torch.zeros_like(x), torch.zeros(x.shape[:2], dtype=torch.bfloat16)
    for share in np.linspace(1, 0.6, 9):
        s = (peak * share / -8).bfloat16()
        tried = (x / torch.where(s == 0, 1, s.float())).round().clamp(-8, 7)
        error = (tried * s.float() - x).square().sum(-1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, s[..., 0], scale)
        q = torch.where(better[..., None], tried, q)
    q = (q + 8).to(torch.uint8).flatten(1)
    return q[:, ::2] | q[:, 1::2] << 4, scale

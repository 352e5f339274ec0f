"""Syntactic smoothing (Diehl Martinez 2024, 2410.11462): rare words learn from frequent ones of their kind.

    torchrun train.py config/babylm.py config/syntactic_smoothing.py
    torchrun train.py config/babylm.py config/syntactic_smoothing.py --smoothing_by=uniform     its control

Half of every target is at first shared out among the tokens whose words are of like classes, by the cosine of
their class counts over a temperature; that share falls to nothing as the run ends, because smoothed targets
cost bits per byte. The paper found less frequency bias (config/frequency_bias.py) and much of it from uniform
smoothing too: always run the control. Classes are induced from the training text, no tagger
(config/word_classes.py). Never a matrix of V x V: a table of one row a token, 32 wide. Expected: a little
more loss. What it did in ten minutes of a CPU, a fifth of an epoch (2026-11-21, commit 3f931df): +2.1 % bits
per byte on 19 % less text (1.5780 beside 1.5462), uniform +2.5 %; frequency bias 0.203, uniform 0.226, the
base 0.260; BLiMP 0.604, 0.580 and 0.609. Lost by the loss, kept for what it promises (RESULTS.md).
In a doll of config/tinystories.py, 3.6 readings, 2.2 % worse (one seed; RESULTS.md, "Dolls").
"""
import math

import torch
import torch.nn.functional as F

from config import loss_kernels
from config.loss_kernels import GPT, kernel_cases
from config.word_classes import table       # brings the setting word_classes

smoothing: float = 0.5                  # 0..1: share of a target that tokens like the right one get at first
smoothing_by: str = 'classes'           # classes|uniform: which are those: of like word classes, or all
smoothing_temperature: float = 0.025    # 0.001..: of the cosine between two tokens' word classes


class Run(loss_kernels.Run):

    def build(self):
        super().build()
        alike = smoothing_table(self.s, self.data)
        self.alike, self.norm = (t.to(self.device) for t in (alike, loss_kernels.similarity_norm(alike)))      # not in TF32

    def loss(self, idx, targets, **extras):
        alpha = torch.full((), 1 - self.s.smoothing * (1 - self.progress), device=idx.device)
        return super().loss(idx, targets, soft=(self.alike, self.norm, alpha), **extras)


def smoothing_table(s, data):
    """(V, r) for loss_kernels.soft_targets: the product of two rows is log2 of how alike their tokens are, by
    the cosine of their word classes over a temperature. r is a power of 2, for Triton."""
    if s.smoothing_by == 'uniform':
        return torch.zeros(data.meta['vocab_size'], 16)
    rows = torch.from_numpy(table(data, s.word_classes))
    rows = F.normalize(rows, dim=1) * (math.log2(math.e) / s.smoothing_temperature) ** 0.5
    return F.pad(rows, (0, max(16, 2 ** math.ceil(math.log2(rows.shape[1]))) - rows.shape[1]))

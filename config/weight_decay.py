"""Eight times the usual weight decay, that falls and rises again, for text that is read many times.

    torchrun train.py config/babylm.py config/weight_decay.py

The slowrun leaderboard's schedule (100 million tokens, fifteen epochs; reported 0.009 nats better): 0.8, down
to 0.1 half-way, up to 0.93. Kim 2025 (2509.14786) finds the best decay of repeated text some thirty times the
usual 0.1, at a constant factor: weight_decay = 3.0 and weight_decay_points = [(0, 1), (1, 1)]. In a first
epoch a decay that falls to 0, the default, is the better one (nanochat), and so it was here: +1.6 % bits per
byte in ten minutes of a CPU (one seed, commit 91d7dcc). Again on shuffled rows, in a scale model of a fifth of an
epoch, three seeds: 0.6 % worse. Lost in a first epoch (RESULTS.md). In dolls of the
half hour (RESULTS.md, "Dolls"), one seed: at twelve epochs 12.8 % worse, at 121, where the base knows its
text by heart, 12.5 % better, and far behind what reads it less often.
In a doll of config/tinystories.py, 3.6 readings, 13.3 % worse (one seed; RESULTS.md, "Dolls").
"""
import numpy as np

import train
from prepare_data import refuse

weight_decay = 0.8
weight_decay_points: tuple = ((0, 1), (0.5, 0.1 / 0.8), (1, 0.93 / 0.8))  # (progress, factor)


class Run(train.Run):

    def __init__(self, s, ideas):
        super().__init__(s, ideas)
        refuse(not are_points(s.weight_decay_points),
               f'weight_decay_points is {s.weight_decay_points!r}, it must be pairs of progress, rising from '
               f'0 to 1, and a factor of at least 0, like ((0, 1), (1, 0))')

    def decay(self, progress):
        """Straight from point to point."""
        return float(np.interp(progress, *zip(*self.s.weight_decay_points)))


def are_points(pairs):
    """Whether these are (progress, factor) pairs that cover 0 to 1."""
    try:
        if not all(isinstance(x, (int, float)) for pair in pairs for x in pair):
            return False
        at, factors = np.array([(p, f) for p, f in pairs], dtype=float).T
    except (TypeError, ValueError, OverflowError):
        return False
    rises = at[0] == 0 and at[-1] == 1 and (np.diff(at) > 0).all()
    return bool(rises and (factors >= 0).all() and np.isfinite(factors).all())

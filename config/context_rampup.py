"""Rows are short at first and get longer: attention is cheap while there is little to learn from far away.

    torchrun train.py config/babylm.py config/context_rampup.py

Whence: shortformer (Press 2021, 2012.15832), sequence length warm-up (Li 2022, 2108.06084). A row of block_size
tokens is read as several shorter ones, 1/4, 1/2 and at last all of its length; tokens a step stay what they are, and
no part sees what the one before it held. Expected: nothing at 512 tokens, where attention is a tenth of the
arithmetic; time saved at 2,048 and more. What it did: 2.2096 bits per byte beside 2.2098 in a doll of config/babylm.py's
half hour, rows of 16, 32 and 64 (one seed; RESULTS.md, "Dolls"): nothing by the token. The time is not yet measured.
In a doll of config/tinystories.py, 3.6 readings, 0.6 % worse (one seed; RESULTS.md, "Dolls").
"""
import math

import train

context_start: float = 0.25     # 0.001..1: share of block_size that rows have at first
context_end: float = 0.5        # 0..1: progress from which on they have all of it


class Run(train.Run):
    pieces = 1                  # that a row is cut into

    def parts_at(self, progress):
        """1 or a power of two that divides block_size."""
        s = self.s
        rise = min(1.0, progress / s.context_end) if s.context_end else 1.0
        most = math.gcd(s.block_size, 2 ** 20)
        return min(most, 2 ** math.ceil(-math.log2(s.context_start + (1 - s.context_start) * rise)))

    def get_going(self):
        self.pieces = self.parts_at(self.clock.progress)
        super().get_going()

    def step(self):
        if self.parts_at(self.progress) != self.pieces:
            self.pieces = self.parts_at(self.progress)
            self.flops_per_token = self.arithmetic()
        super().step()

    def read_rows(self):
        return super().read_rows().reshape(-1, self.s.block_size // self.pieces)

    def batch_loss(self, **batch):
        """What belongs to a token is cut with its row, what belongs to a row is that of all its parts."""
        (B, T), n = batch['idx'].shape, self.pieces

        def cut(t):
            return t.reshape(n * B, -1) if t.shape == (B, T) else t.repeat_interleave(n, 0) if t.ndim else t
        return super().batch_loss(**{k: cut(t) for k, t in batch.items()} if n > 1 else batch)

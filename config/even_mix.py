"""Every source as often as any other: an epoch has as many tokens of each, as many in all as the text has.

    torchrun train.py config/babylm.py config/even_mix.py

Small sources come round more often, large ones not whole. --weights takes precedence. The control of
config/domains.py, whose micro-batches are such a mix: at 300,000 tokens the mix alone had made 2.145 bits per
byte of 2.191, where validation weighs its sources evenly too (RESULTS.md). Expected: a gain where the smallest
source differs most and is read a few times; a loss where it is read a hundred times. Not yet measured apart.
"""
import numpy as np

import train

NOT_WITH = dict.fromkeys(('climb_data', 'raise'), 'a curriculum reads a document a whole number of times')


class Stream(train.Stream):

    def __init__(self, data, s, weights=None):
        super().__init__(data, s, weights)
        if self.weights is None:
            tokens = np.bincount(self.sources, self.lengths, len(data.meta['sources']))
            even = len(self.tokens) / np.count_nonzero(tokens)
            self.weights = [even / n if n else 0.0 for n in tokens]

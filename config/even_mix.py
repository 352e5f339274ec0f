"""Every source as often as any other: an epoch has as many tokens of each, as many in all as the text has.

    torchrun train.py config/babylm.py config/even_mix.py

Small sources come round more often, large ones not whole. --weights takes precedence. Not the mix of
config/domains.py, which reads sources in proportion to their text, each micro-batch of one. Expected: a gain
where the smallest source differs most and is read a few times; a loss where it is read a hundred times. What
it did: 2.414 bits per byte beside 2.210 in a doll of config/babylm.py (RESULTS.md, "Dolls"), whose twelve epochs
read the smallest of six sources 171 times: 9.3 % worse. Lost.
"""
import numpy as np

import train

NOT_WITH = dict.fromkeys(('climb_data', 'raise'), 'a curriculum reads a document a whole number of times')


class Stream(train.Stream):

    def source_weights(self):
        tokens = np.bincount(self.sources, self.lengths, len(self.data.meta['sources']))
        even = len(self.tokens) / np.count_nonzero(tokens)
        return super().source_weights() or [even / n if n else 0.0 for n in tokens]

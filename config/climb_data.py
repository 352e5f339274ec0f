"""CLIMB's data curriculum (Diehl Martinez 2023, 2311.08886): easy text first, all of it towards the end.

    torchrun train.py config/babylm.py config/climb_data.py

Documents are ranked by their surprisal under bigrams of the training text; a tenth of the text is admitted at
first, all of it from 7/8 of the run on. Any measure of config/difficulty.py can take its place
(--curriculum=source_rank is CLIMB's spoken to written), and --pacing=log admits four fifths of the text within
the first eighth of the rise. CLIMB found no consistent gain over its own baseline. What it did: +1.3 % bits a
byte in ten minutes of a CPU, a fifth of an epoch (one seed, commit 91d7dcc, documents read in order). Lost
there (RESULTS.md). Again on shuffled rows, in a scale model of a fifth of an epoch, three seeds: 7.1 % worse.
In a doll of config/tinystories.py, 3.6 readings, 2.7 % worse (one seed; RESULTS.md, "Dolls").
"""
import math

import numpy as np

import train
from config.difficulty import measure
from prepare_data import refuse

curriculum: str = 'bigram'            # the measure of config/difficulty.py to go by, higher is harder
curriculum_order: str = 'shuffled'    # shuffled|frontier: of what is admitted, or the hardest first
pacing: str = 'linear'                # linear|quad|root|exp|log|step: how what is admitted grows
pacing_floor: float = 0.1             # 0..1: share of the text that is admitted at first
pacing_start: float = 0.0625          # 0..1: progress at which that begins to grow
pacing_end: float = 0.875             # 0..1: progress from which all of it is admitted


def admitted(progress, s, floor):
    """The share, from `floor` up, that a curriculum admits (Diehl Martinez 2023, 2311.08886)."""
    u = min(1.0, max(0.0, progress - s.pacing_start) / max(s.pacing_end - s.pacing_start, 1e-9))
    way = {'linear': u, 'quad': u ** 2, 'root': u ** 0.5, 'exp': math.expm1(10 * u) / math.expm1(10),
           'log': 1 + 0.1 * math.log(u + math.exp(-10)), 'step': math.floor(4 * u) / 3}[s.pacing]
    return floor + (1 - floor) * min(1.0, max(0.0, way))


class Stream(train.Stream):
    """A stream that draws, a step's worth at a time, from the easiest documents only, more of them with time:
    each once before any comes again. shares: what is admitted at each step, fixed some steps ahead of
    training, so that every rank and every resumption reads the same."""

    WINDOW = 8                   # steps, whose rows are shuffled
    AHEAD = WINDOW + 6           # steps; and more than a Prefetcher holds

    def __init__(self, data, s, weights=None):
        super().__init__(data, s, weights)
        refuse(s.pacing_start >= s.pacing_end, f'pacing_end is {s.pacing_end:g}, it must be more than '
               f'pacing_start, {s.pacing_start:g}')
        difficulty = measure(data, 'train', s.curriculum, getattr(s, 'score_with', ''))
        if self.weights is not None:
            refuse(any(w % 1 for w in self.weights), f'weights are {s.weights!r}, a curriculum reads a document '
                   f'a whole number of times: round them, or leave one away')
            often = np.repeat(np.arange(len(self.starts)), np.asarray(self.weights, int)[self.sources])
            self.starts, self.lengths, difficulty = self.starts[often], self.lengths[often], difficulty[often]
            self.weights = None
        n = len(self.starts)
        self.rank = np.empty(n, np.int64)                    # ties fall by chance
        self.rank[np.lexsort((np.random.default_rng(s.seed).random(n), difficulty))] = np.arange(n)
        self.up_to = self.lengths[self.rank.argsort()].cumsum()
        self.shares = []
        self.rewind()
        few, step = self.up_to[self.easiest(s.pacing_floor) - 1], s.tokens_per_step
        refuse(few < step, f'pacing_floor {s.pacing_floor:g} admits {few:,} tokens at first and a step reads '
                           f'{step:,}: raise it, or lower tokens_per_step')
        self.pace(0, 0.0)

    def rewind(self):
        """Nothing has been drawn; deck: what is left of a round."""
        self.round, self.deck = -1, np.zeros(0, np.int64)
        self.drawn, self.places = np.zeros(0, np.int64), np.zeros(1, np.int64)

    def easiest(self, share):
        """How many documents, the easiest first, come to this share of the text."""
        return min(len(self.rank), int(np.searchsorted(self.up_to, share * self.up_to[-1])) + 1)

    def pace(self, step, progress):
        """Fix what is admitted up to AHEAD steps from here, where progress will be about that."""
        share = admitted(progress * (step + self.AHEAD) / max(1, step), self.s, self.s.pacing_floor)
        self.shares += [share] * (step + self.AHEAD - len(self.shares))

    def draw(self):
        end, step = int(self.places[-1]), self.s.tokens_per_step
        admit = self.easiest(self.shares[end // step])
        may = np.flatnonzero(self.rank[self.deck] < admit)
        if not len(may):                                     # all that are admitted have been read
            self.round += 1
            self.deck = self.dice(self.round).permutation(len(self.rank))
            if self.s.curriculum_order == 'frontier':
                self.deck = (-self.rank).argsort()
            may = np.flatnonzero(self.rank[self.deck] < admit)
        ends = self.lengths[self.deck[may]].cumsum()
        may = may[:np.searchsorted(ends, step) + 1]
        self.drawn = np.append(self.drawn, self.deck[may])
        self.places = np.append(self.places, end + ends[:len(may)])
        self.deck = np.delete(self.deck, may)

    def first_rows(self, n, T):
        """As if all were admitted: what an average row is like, not an easy one."""
        shares, self.shares = self.shares, [1.0] * self.AHEAD
        rows = super().first_rows(n, T)
        self.shares = shares
        self.rewind()
        return rows

    def place(self, row, T):
        rows = self.WINDOW * self.s.tokens_per_step // T
        number, row = divmod(row, rows)
        return (number * rows + int(self.shuffled(number, rows)[row])) * T

    def read(self, first, count):
        needed = first - first % (self.WINDOW * self.s.tokens_per_step)
        if first < self.places[0]:               # of a window that was passed
            self.rewind()
        while self.places[-1] < first + count:
            self.draw()
            gone = min(int(np.searchsorted(self.places, needed, side='right')) - 1, len(self.drawn))
            self.drawn, self.places = self.drawn[gone:], self.places[gone:]
        return self.gather(self.starts[self.drawn], self.places, np.arange(first, first + count))

    def state(self):
        return super().state() | dict(shares=list(self.shares))

    def load(self, state):
        super().load(state)
        self.shares = list(state['shares'])

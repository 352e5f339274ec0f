"""Near duplicates are left out of training, by MinHash (Broder 1997) over every five words in a row.

    python prepare_data.py config/babylm.py config/dedup.py
    python train.py config/babylm.py config/clean.py config/dedup.py

As FineWeb does it (Penedo 2024, 2406.17557): of pairs that share 70, 75, 80, 85 % of their five words in a
row, 56, 77, 92, 98.8 % are found. What is near a held-out document goes, then what is near an earlier one;
held-out documents stay. Identical ones to held-out documents always go, without this file too.
"""
import zlib

import numpy as np

import prepare_data

dedup: bool = True           # drop training documents that nearly repeat another

BANDS, ROWS = 14, 8          # a key a band, of so many hashes; one key in common makes a pair
PAD = 4                      # zeros between documents
REPEATS = {1: 'training documents dropped, near duplicates of held-out ones',
           2: 'training documents dropped, near duplicates of earlier ones'}


class Corpus(prepare_data.Corpus):

    def __init__(self, s):
        super().__init__(s)
        self.sketches = Sketches() if s.dedup else None

    def changes(self):
        return super().changes() | dict(dedup=self.s.dedup)

    def variant(self):
        return super().variant() + '-dedup' * bool(self.s.dedup)

    def meet(self, text, held):
        super().meet(text, held)
        if self.sketches:
            self.sketches.add(text, held)

    def decide(self, found, kept):
        super().decide(found, kept)
        if self.sketches and len(kept):
            if found.lone is not None:           # all were met as training documents
                self.sketches.held[np.searchsorted(kept, found.lone)] = True
            repeats = self.sketches.repeats()
            for number, reason in REPEATS.items():
                found.drop_if(kept[repeats == number], reason)

    def record(self, meta):
        super().record(meta)
        meta['cleaning'].setdefault('thresholds', {}).update(bands=BANDS, rows=ROWS)

    def repeats(self, data):
        near = 'dropped' if data.meta['settings'].get('dedup') else 'not looked for'
        lines = super().repeats(data)
        return [*lines[:-1], f'{lines[-1]}; near duplicates were {near}']


class Sketches:
    """Band keys of documents: two documents with one key in common, in the same band, are near duplicates."""

    def __init__(self):
        self.hashes, self.texts, self.size, self.keys, self.held = {}, [], 0, [], []
        odd = np.random.default_rng(5).integers(0, 2**63, (BANDS * ROWS + 5,), np.uint64) * 2 + 1
        self.odd, self.gram = odd[5:], odd[:5]

    def add(self, text, held):
        self.texts.append(text)
        self.held.append(held)
        self.size += len(text)
        if self.size > prepare_data.BATCH_BYTES:
            self.write()

    def write(self):
        rows = [text.lower().split() or [text] for text in self.texts]
        if len(self.hashes) > 1_000_000:                     # memory does not grow with the corpus
            self.hashes.clear()
        for word in set().union(*rows) - self.hashes.keys():
            self.hashes[word] = zlib.crc32(word.encode('utf-8', 'surrogatepass')) + 1
        lengths = np.array([len(row) + PAD for row in rows])
        ends = lengths.cumsum()
        words = np.zeros(ends[-1] + PAD, np.uint64)          # four zeros after each document
        inside = np.ones(ends[-1], bool)
        inside[(ends[:, None] - 1 - np.arange(PAD)).ravel()] = False
        words[:ends[-1]][inside] = [self.hashes[word] for row in rows for word in row]
        grams = sum(words[j:j + ends[-1]] * self.gram[j] for j in range(5))
        grams ^= grams >> np.uint64(29)
        least = np.stack([np.minimum.reduceat(np.where(inside, grams * a, ~np.uint64(0)), ends - lengths)
                          for a in self.odd], 1) >> np.uint64(20)
        bands = least.reshape(-1, BANDS, ROWS) * self.odd[:ROWS]
        self.keys.append(np.bitwise_xor.reduce(bands ^ (bands >> np.uint64(31)), 2))
        self.texts, self.size = [], 0

    def repeats(self):
        """A number a document, in the order they came: 0 for one to keep, 1 for one that is near a held-out
        one, 2 for one that is near an earlier one. Held-out documents are kept."""
        if self.texts:
            self.write()
        keys, held = np.concatenate(self.keys), np.array(self.held)
        rank = np.empty(len(held), np.int64)
        rank[np.argsort(~held, kind='stable')] = np.arange(len(held))        # held-out ones first
        best = rank.copy()
        for band in keys.T:
            order = np.lexsort((rank, band))
            first = np.flatnonzero(np.diff(band[order], prepend=band[order[0]] + np.uint64(1)))
            group = np.repeat(rank[order[first]], np.diff(first, append=len(order)))
            best[order] = np.minimum(best[order], group)
        return np.where(held | (best == rank), 0, np.where(best < held.sum(), 1, 2))

"""Quality: is a text like good examples or like bad ones? Every document gets a mark, poor ones may go.

    python prepare_data.py config/babylm.py config/quality.py --good=good.txt --bad=bad.txt --min_quality=0.2

phi-1's idea (Gunasekar 2023, 2306.11644), here by logistic regression on words and pairs of words. The mark,
the probability of being like the good, is a measure called `quality` of config/difficulty.py, so that a
curriculum can follow it. How often the classifier is right about examples that it did not learn from is said.
Expected: as good as the examples; a few hundred of each at least.
"""
import re
import zlib

import numpy as np

import prepare_data
from config.difficulty import keep
from prepare_data import UserError, key_of, path_of, sha256_of, texts_of

good: str = ''               # a file of good documents, hundreds: paragraphs, or rows of .jsonl
bad: str = ''                # a file of bad ones
min_quality: float = 0.0     # 0..1: drop training documents that are less likely good

SLOTS, DECAY = 1 << 18, 1e-4     # hashed features; the L2 penalty


class Corpus(prepare_data.Corpus):

    def __init__(self, s):
        super().__init__(s)
        self.marks = []

    def changes(self):
        return super().changes() | dict(min_quality=self.s.min_quality)

    def variant(self):
        return super().variant() + '-quality' * (self.s.min_quality > 0)

    def check(self):
        super().check()
        files = [self.s.good, self.s.bad]
        if not all(files):
            raise UserError(f'good is {self.s.good!r}, bad {self.s.bad!r}: give both files')
        self.weights, self.fit = fit_quality(*(set(texts_of(name, self.s)) for name in files))
        self.inputs = [sha256_of(path_of(name)) for name in files]

    def opened(self):
        """Refuses data that was prepared with other examples than those that are named."""
        data = super().opened()
        for name, digest in zip((self.s.good, self.s.bad), data.meta.get('inputs', ())):
            if name and path_of(name).exists() and sha256_of(path_of(name)) != digest:
                raise UserError(f'{data.folder} was prepared with other examples than {name}: prepare it anew '
                                f'with --overwrite, or keep both with another --data_dir')
        return data

    def meet(self, text, held):
        super().meet(text, held)
        self.marks.append(not held and quality(self.weights, text) < self.s.min_quality)

    def decide(self, found, kept):
        super().decide(found, kept)
        reason = f'training documents dropped, quality below {self.s.min_quality}'
        found.drop_if(kept[np.array(self.marks, bool)], reason)

    def record(self, meta):
        super().record(meta)
        meta.setdefault('inputs', []).extend(self.inputs)
        meta['quality'] = self.fit

    def finish(self, data):
        super().finish(data)
        for split in data.docs:
            keep(data, split, quality=[quality(self.weights, text) for text in data.texts(split)])

    def summary(self, data):
        lines = super().summary(data)
        if q := data.meta.get('quality'):
            lines.append(f'quality: learned from {q["documents"]:,} examples, right about '
                         f'{q["accuracy"]:.1%} of {q["held_out"]:,} others, both sides counting alike')
        return lines


def word_grams(text):
    """(slots, values): words and pairs of words, each the root of its share, and last a constant."""
    words = re.findall(r'\w+|[^\w\s]', text.lower())
    one = np.array([zlib.crc32(word.encode()) for word in words], np.uint64)
    two = one[:-1] * np.uint64(0x9E3779B1) + one[1:] * np.uint64(0x85EBCA77)
    slots, counts = np.unique(np.append(one, two) % np.uint64(SLOTS), return_counts=True)
    return np.append(slots, SLOTS).astype(np.int64), np.append(np.sqrt(counts / counts.sum()), 1)


def quality(weights, text):
    slots, values = word_grams(text)
    return float(1 / (1 + np.exp(-weights[slots] @ values)))


def fit_quality(good, bad):
    """(weights, report) from two sets of texts; one in both is left out, every fifth of the rest is held out.

    Both sides count alike, in the fit and in the accuracy: a guess has 0.5. Nesterov's steps end where the
    gradient is below 1e-6.
    """
    sides = [sorted(a - b, key=lambda text: key_of(text.encode())) for a, b in ((bad, good), (good, bad))]
    if min(map(len, sides)) < 10:
        raise UserError(f'--bad has {len(sides[0])} documents of its own, --good {len(sides[1])}: give 10 or '
                        f'more of each, better hundreds')
    rows, label = zip(*[(word_grams(text), y) for y in (0, 1) for i, text in enumerate(sides[y]) if i % 5])
    (slot, value), label = map(np.concatenate, zip(*rows)), np.array(label)
    doc, weight = np.repeat(np.arange(len(rows)), [len(x) for x, _ in rows]), 0.5 / np.bincount(label)[label]
    rate = 1 / (0.25 * 2 + DECAY)                # the logistic's curvature, times the squared length of a row
    momentum = (1 - (DECAY * rate) ** 0.5) / (1 + (DECAY * rate) ** 0.5)
    last = w = np.zeros(SLOTS + 1)
    gradient = np.ones(1)
    while np.linalg.norm(gradient) > 1e-6:
        p = 1 / (1 + np.exp(-np.bincount(doc, value * w[slot])))
        gradient = DECAY * w + np.bincount(slot, value * (weight * (p - label))[doc], SLOTS + 1)
        here = w - rate * gradient
        w, last = here + momentum * (here - last), here
    right = [[(quality(w, text) > 0.5) == y for text in sides[y][::5]] for y in (0, 1)]
    accuracy = float(np.mean([np.mean(side) for side in right]))
    return w, dict(documents=len(rows), held_out=sum(map(len, right)), accuracy=accuracy)

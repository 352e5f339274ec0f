"""--inspect: a page about a data set as it was prepared.

    python prepare_data.py config/quickstart.py --inspect

Counts of all of it, and of 2,000 training documents the most frequent words; documents, and the tokens of one. What
ideas add stands in Corpus.summary, examples, line and repeats.
"""
import itertools
import sys
from collections import Counter

import numpy as np

import prepare_data
from config import refuse
from prepare_data import WORDS, clipped, open_data

inspect: bool = False         # print a page about the data set as it was prepared


class Corpus(prepare_data.Corpus):

    def run(self):
        self.show() if self.s.inspect else super().run()

    def show(self):
        refuse(not self.folder.exists(), f'{self.folder} is not prepared yet: say the same without --inspect first')
        page(self, open_data(self.folder, self.s.dataset))


def histogram(lengths):
    """Lines: how many documents have how many tokens, by powers of two."""
    counts = np.bincount(np.log2(lengths).astype(int))
    return [f'{2**i:9,} to {2**(i + 1) - 1:7,}{counts[i]:9,} {"#" * round(50 * counts[i] / counts.max())}'
            for i in range((counts > 0).argmax(), len(counts))]


def marked(data, ids):
    """The pieces of tokens, apart by colours on a terminal, else by |."""
    pieces = (clipped(data.tokenizer.decode([token]).replace('\n', '¶').replace(' ', '·')) for token in ids)
    colours = itertools.cycle((46, 43))          # black on cyan, black on yellow
    return '|'.join(pieces) if not sys.stdout.isatty() else ''.join(
        f'\033[30;{next(colours)}m{piece}\033[0m' for piece in pieces)


def page(corpus, data):
    """Prints counts of all of a data set, and words of 2,000 training documents."""
    bounds = data.bounds('train')
    sample = np.random.default_rng(corpus.s.data_seed).permutation(len(bounds) - 1)[:2000]
    print(*corpus.summary(data), '\ntokens a document, training', *histogram(np.diff(bounds)),
          *corpus.examples(data, sample), sep='\n')
    text = ' '.join(data.texts('train', sample)).lower()
    words = Counter(WORDS.findall(text))
    print('\nmost frequent words, per thousand')
    print(*(f'{word} {1000 * n / words.total():.0f}' for word, n in words.most_common(24)), sep=', ')
    print(*corpus.repeats(data), sep='\n')
    print("\n64 tokens of the first random document; · is a space, ¶ a line's end")
    print(marked(data, data.tokens['train'][bounds[sample[0]] + 1:bounds[sample[0] + 1]][:64].tolist()))

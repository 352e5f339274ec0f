"""Difficulty: numbers that say how hard a document is, for a curriculum to follow. Higher is harder.

    python prepare_data.py config/babylm.py config/difficulty.py          all but the loss, how they agree
    python prepare_data.py config/babylm.py config/difficulty.py --score_with=out/quickstart

They are made from the prepared bins when something first asks for them, and kept in the data's folder as
<split>.scores.npy, a row a document and a field a measure. Named to prepare_data.py, this file makes all of
them, prints their rank correlations and, with --inspect, shows the easiest and hardest documents. CLIMB
ordered sources by hand (Diehl Martinez 2023, 2311.08886); what a curriculum by them does stands in
config/climb_data.py.
"""
import itertools
import math
import re
import zlib
from pathlib import Path

import numpy as np

import prepare_data
from prepare_data import WORDS, UserError, sha256_of, write_beside

difficulty: str = ''         # the measure in docs.npy; without it loss if there is one, else bigram
score_with: str = ''         # a run, such as out/quickstart: its loss on every document is a measure

SPOKEN_FIRST = (('childes',), ('bnc', 'switchboard', 'dialogue'), ('subtitles', 'qed'), ('cbt', 'stories'),
                ('simple', 'easy'), ('wiki', 'gutenberg'))   # CLIMB's (Diehl Martinez 2023, 2311.08886)
WRITTEN_FIRST = (('cbt', 'stories'), ('simple', 'easy'), ('wiki', 'gutenberg'), ('subtitles',),
                 ('bnc', 'switchboard', 'dialogue'), ('qed', 'childes'))
TEXT_MEASURES = {
    'compression': 'zlib bytes a byte, of the first 2,048: what repeats itself is short',
    'mtld': 'words in a row until a third of them are repeats (McCarthy 2010)',
    'diversity': 'different words among the first hundred, a share',
    'sentence_words': 'words a sentence', 'word_letters': 'letters a word',
    'flesch_kincaid': 'school grade, for English (Kincaid 1975)',
    'lix': 'readability, for Swedish (Björnsson 1968)'}
ORDERS = {'source_rank': SPOKEN_FIRST, 'written_rank': WRITTEN_FIRST}
MEASURES = TEXT_MEASURES | {
    'source_rank': '1 to 6, spoken to written; 0 where the source is none of those CLIMB ordered',
    'written_rank': '1 to 6, written to spoken',
    'unigram': 'bits a token under the training split\'s own frequencies',
    'bigram': 'bits a token given the one before, by counts of the training split'}


class Corpus(prepare_data.Corpus):

    @property
    def chosen(self):
        return self.s.difficulty or ('loss' if self.s.score_with else 'bigram')

    def check(self):
        super().check()
        known = [*MEASURES, *['quality'] * bool(getattr(self.s, 'good', ''))]
        known += ['loss'] * bool(self.s.score_with)
        if self.chosen not in known:
            raise UserError(f'difficulty is {self.s.difficulty!r}: choose {", ".join(known)}')
        if self.s.score_with:
            judge(self.s.score_with, 'cpu')      # refused before the work starts

    def finish(self, data):
        super().finish(data)
        for split, docs in data.docs.items():
            docs['difficulty'] = scores(data, split, self.chosen, self.s.score_with)
            write_beside(data.folder / f'{split}.docs.npy', lambda f: np.save(f, docs))

    def summary(self, data):
        names = [*MEASURES, *['loss'] * bool(self.s.score_with)]
        columns = {name: scores(data, 'train', name, self.s.score_with) for name in names}
        columns |= {name: column for name, column in kept(data, 'train').items() if name == 'quality'}
        with np.errstate(invalid='ignore'):      # a column that is constant goes with none
            together = np.nan_to_num(np.corrcoef([mean_ranks(column) for column in columns.values()]))
        return super().summary(data) + ['rank correlations of the measures, over training documents'] + [
            f'{name:16}' + ''.join(f'{r:6.2f}' for r in row[:i + 1])
            for i, (name, row) in enumerate(zip(columns, together))]

    def line(self, data, i):
        return f'{data.docs["train"]["difficulty"][i]:5.2f} {super().line(data, i)}'

    def examples(self, data, sample):
        docs = data.docs['train']                # that may have been prepared without this file
        docs['difficulty'] = scores(data, 'train', self.chosen, self.s.score_with)
        order = docs['difficulty'].argsort(kind='stable')
        order = order[np.diff(data.bounds('train'))[order] >= 32]      # a rare word makes a short one hard
        return super().examples(data, sample) + [
            f'\neasiest and hardest of 32 tokens or more, by {self.chosen}',
            *(self.line(data, i) for i in (*order[:3], *order[-3:]))]


# ---- what other ideas ask for

def measure(data, split, name, score_with=''):
    """(documents,): a measure of a split's documents, made and kept where it is asked for first."""
    column = data.docs[split][name] if name == 'difficulty' else scores(data, split, name, score_with)
    if not column.any():
        raise UserError(f'{name} is 0 for every document of {data.folder}, whose sources are '
                        f'{", ".join(data.meta["sources"])}: choose another of {", ".join(MEASURES)}')
    return column


def scores(data, split, name, score_with=''):
    """The same, be it zeros alone."""
    if judged := name == 'loss' and score_with:
        name = f'loss {sha256_of(checkpoint_of(score_with))[:12]}'
    if name in ORDERS:                           # a look-up, of sources as they are now
        ranks = np.array([source_rank(source, ORDERS[name]) for source in data.meta['sources']])
        return ranks[data.docs[split]['source']].astype(np.float32)
    if name in (table := kept(data, split)):
        return table[name]
    if judged:
        made = {split: {name: bits} for split, bits in document_loss(data, *judge(score_with)).items()}
    elif name in TEXT_MEASURES:
        columns = np.array([text_measures(text) for text in data.texts(split)]).T
        made = {split: dict(zip(TEXT_MEASURES, columns))}
    elif name in MEASURES:
        made = {split: dict(zip(('unigram', 'bigram'), bits)) for split, bits in surprisal(data).items()}
    else:
        raise UserError(f'{data.folder} has no measure {name!r} of its documents: choose one of '
                        f'{", ".join(MEASURES)}; loss with --score_with=<run>; quality, by config/quality.py')
    for each, columns in made.items():
        keep(data, each, **columns)
    return made[split][name].astype(np.float32)


def kept(data, split):
    """{measure: (documents,) float32} of those that were made before."""
    path = data.folder / f'{split}.scores.npy'
    table = np.load(path) if path.is_file() else np.zeros(0, [('none', '<f4')])
    return {name: table[name] for name in table.dtype.names} if len(table) == len(data.docs[split]) else {}


def keep(data, split, **columns):
    """Adds measures to those that are kept."""
    columns = kept(data, split) | columns
    table = np.zeros(len(data.docs[split]), [(name, '<f4') for name in columns])
    for name, column in columns.items():
        table[name] = column
    write_beside(data.folder / f'{split}.scores.npy', lambda f: np.save(f, table))


# ---- the measures

def mtld(words):
    """Words a factor, which ends where the share of different words falls to 0.72; both ways, averaged."""
    means = []
    for row in (words, words[::-1]):
        factors, seen, n = 0.0, set(), 0
        for word in row:
            seen.add(word)
            n += 1
            if len(seen) <= 0.72 * n:
                factors, seen, n = factors + 1, set(), 0
        factors += (1 - len(seen) / n) / 0.28 if n else 0
        means.append(len(words) / factors if factors else len(words))
    return sum(means) / 2


def text_measures(text):
    """The numbers of TEXT_MEASURES for one document."""
    data, words = text.encode()[:2048], WORDS.findall(text.lower()) or ['']
    sentences = len(re.findall(r'[.!?]+(?=[\s"\'’”)]|$)|\n+', text.strip())) or 1
    letters, a_sentence = sum(map(len, words)) / len(words), len(words) / sentences
    syllables = sum(len(re.findall('[aeiouyåäöéü]+', word)) or 1 for word in words) / len(words)
    long_words = sum(len(word) > 6 for word in words) / len(words)
    return (len(zlib.compress(data, 6)) / len(data), mtld(words), len(set(words[:100])) / len(words[:100]),
            a_sentence, letters, 0.39 * a_sentence + 11.8 * syllables - 15.59, a_sentence + 100 * long_words)


def source_rank(name, order):
    return next((rank for rank, names in enumerate(order, 1) if any(n in name for n in names)), 0)


def surprisal(data, chunk=1 << 22, slots=1 << 22):
    """{split: (2, documents)}: mean bits a token by unigrams and bigrams of the training split, without BOS.

    Bigrams are counted in 2^22 slots by a hash, smoothed towards the unigrams (Dirichlet, 32 tokens' worth).
    """
    def read(split):
        tokens, starts = data.tokens[split], data.docs[split]['start']
        for first in range(0, len(tokens), chunk):
            here = tokens[max(first - 1, 0):first + chunk].astype(np.int64)
            before, token = (here[:-1], here[1:]) if first else (np.append(0, here[:-1]), here)
            place = np.arange(first, first + len(token))
            doc = np.searchsorted(starts, place, side='right') - 1
            yield before, token, (before * 0x9E3779B1 + token * 0x85EBCA77) % slots, doc, place != starts[doc]

    vocab_size = data.tokenizer.vocab_size
    one, two, out = np.zeros(vocab_size), np.zeros(slots, np.int64), {}
    for _, token, slot, _, _ in read('train'):
        one += np.bincount(token, minlength=vocab_size)
        two += np.bincount(slot, minlength=slots)
    p_one = (one + 1) / (one + 1).sum()
    for split in data.docs:
        n, own = len(data.docs[split]), split == 'train'    # an occurrence is no evidence for itself
        sums, counts = np.zeros((2, n)), np.zeros(n)
        for before, token, slot, doc, inside in read(split):
            counts += np.bincount(doc[inside], minlength=n)
            p_two = (two[slot] - own + 32 * p_one[token]) / (one[before] - own + 32)
            for row, p in enumerate((p_one[token], np.minimum(p_two, 1))):
                sums[row] -= np.bincount(doc[inside], np.log2(p[inside]), n)
        out[split] = sums / np.maximum(counts, 1)
    return out


def checkpoint_of(run):
    path = Path(run).expanduser()
    return path / 'ckpt.pt' if path.is_dir() else path


def judge(run, device=None):
    """(model, its tokenizer) of a run that judges documents."""
    import sample                                # torch with it: only where it is needed
    return sample.load(run, device or ('cuda' if sample.torch.cuda.is_available() else 'cpu'))


def document_loss(data, model, own, batch=256):
    """{split: (documents,)}: bits a byte under a checkpoint, which has a tokenizer of its own."""
    import sample
    from tqdm import tqdm
    out = {}
    n = sum(map(len, data.docs.values()))
    with tqdm(desc='scoring', total=n, unit=' documents', disable=None) as bar:
        for split, docs in data.docs.items():
            texts, nats = data.texts(split), {}
            for first in range(0, len(docs), batch):
                ids = own.encode_batch(list(itertools.islice(texts, batch)))
                ids = [np.append(own.bos, row) for row in ids]
                nats |= sample.document_nats(model, enumerate(ids, first))
                bar.update(len(ids))
            out[split] = np.array(list(nats.values())) / math.log(2) / docs['bytes']
    return out


def mean_ranks(x):
    """The rank of every number; equal ones share the mean of theirs."""
    _, where, n = np.unique(x, return_inverse=True, return_counts=True)
    return (n.cumsum() - n / 2)[where]

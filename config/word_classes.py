"""Word classes without a tagger: words between the same words are of a kind (Brown 1992, Schütze 1995, Clark
2003).

    python prepare_data.py config/babylm.py config/word_classes.py                     prints the classes
    python prepare_data.py config/babylm.py config/word_classes.py --check_classes=tagged.conllu

BabyLM's rules allow no tagger, so the classes that syntactic smoothing and CLIMB's objective curriculum take
are induced from the training split, when something first asks for them, and kept in the data's folder:
classes-29.npy, a row an id, how often it occurs in words of each class, and classes-29.json, the class of
each word. With tagged text it is said how well they fit, beside one class for all and the same classes dealt
anew to the words.
"""
import itertools
import json
import re
from collections import defaultdict

import numpy as np

import prepare_data
from prepare_data import BPETokenizer, UserError, texts_of, write_beside

word_classes: int = 29       # 2..: classes to induce; numbers, punctuation, rare words are three more
check_classes: str = ''      # a tagged file, CoNLL-U or word<tab>tag: how well the classes fit it

CLASS_WORDS, NEIGHBOURS = 10_000, 500    # words to be classed; words counted before and after each


class Corpus(prepare_data.Corpus):

    def check(self):
        super().check()
        if self.s.check_classes and not tagged_words(texts_of(self.s.check_classes, self.s)):
            raise UserError(f'{self.s.check_classes} has no tagged words: give CoNLL-U, or word<tab>tag')

    def finish(self, data):
        super().finish(data)
        table(data, self.s.word_classes)

    def summary(self, data):
        n = self.s.word_classes
        classes = class_of_words(data, n)
        words = [[word for word in classes if classes[word] == i][:10] for i in range(n)]
        lines = [f'class {i:3}  {" ".join(row)}' for i, row in enumerate(words)]
        if self.s.check_classes:
            tagged = tagged_words(texts_of(self.s.check_classes, self.s))
            lines += [f'{name} classes: many-to-one accuracy {right:.3f}, V-measure {v:.3f}'
                      for name, (right, v) in agreements(classes, tagged, n).items()]
        return super().summary(data) + lines


# ---- what other ideas ask for

def table(data, n):
    """(V, n + 3) float32, how often every id occurs in words of each class; induced where it is missing."""
    for path in (data.folder / f'classes-{n}.npy', data.folder / 'classes.npy'):     # as older versions wrote
        if path.is_file() and (found := np.load(path)).shape[1] == n + 3:
            return found
    return induced(data, n)[0]


def class_of_words(data, n):
    """{word: class}, most frequent first, without the last three classes."""
    path = data.folder / f'classes-{n}.json'
    return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else induced(data, n)[1]


def induced(data, n):
    made, classes = induce(data, n)
    text = json.dumps(classes, ensure_ascii=False).encode('utf-8', 'surrogatepass')
    write_beside(data.folder / f'classes-{n}.npy', lambda f: np.save(f, made))
    write_beside(data.folder / f'classes-{n}.json', lambda f: f.write(text))
    return made, classes


def kind(word, n):
    """The class of a word that is not among the most frequent: number, punctuation and spaces, rare word."""
    return n if word[:1].isdigit() else n + 2 if word[:1].isalpha() else n + 1


def read_words(data, batch=256, most=1 << 27):
    """The different words of the training split and what stands between them; its text in their numbers;
    (tokens, words, counts): how often a token ends in a word. Of more than 128 MiB, spread batches are read."""
    number, text, met = defaultdict(itertools.count().__next__), [], []
    tokens, tokenizer = data.tokens['train'], data.tokenizer
    starts = data.bounds('train')
    step = 1 + int(data.docs['train']['bytes'].sum(dtype=np.int64)) // most
    table = [*tokenizer.table]
    table[tokenizer.bos] = b'\n'                 # keeps the words of two documents apart
    lengths = np.array([len(piece) for piece in table])
    for first in range(0, len(starts) - 1, batch * step):
        ids = tokens[starts[first]:starts[first:first + batch + 1][-1]].astype(np.int64)
        raw = b''.join([table[i] for i in ids.tolist()])
        pieces = BPETokenizer.words.findall(raw.decode())         # every character is in one
        text.append(np.array([number[piece] for piece in pieces], np.int32))
        letter = np.cumsum(np.frombuffer(raw, np.uint8) & 0xC0 != 0x80)          # its number, for each byte
        ends = np.cumsum([len(piece) for piece in pieces])
        owner = np.searchsorted(ends, letter[np.cumsum(lengths[ids]) - 1])
        pair, count = np.unique(ids << 32 | text[-1][owner], return_counts=True)
        met.append((pair >> 32, pair & 0xFFFFFFFF, count))
    return list(number), np.concatenate(text), map(np.concatenate, zip(*met))


def spherical_kmeans(x, weight, n, seed):
    """(weighted sum of cosines, labels) for rows of length 1, starting as k-means++ does (Arthur 2007)."""
    rng, centres, away = np.random.default_rng(seed), [], weight
    for _ in range(n):
        centres.append(x[rng.choice(len(x), p=away / away.sum())])
        away = np.minimum(away, weight * (1 - x @ centres[-1])).clip(1e-9)
    centres, weighted = np.array(centres), x * weight[:, None]
    for _ in range(25):                          # then hardly a word moves
        near = x @ centres.T
        labels = near.argmax(1)
        centres = (labels == np.arange(n)[:, None]).astype(x.dtype) @ weighted
        centres /= np.linalg.norm(centres, axis=1, keepdims=True).clip(1e-9)
    return float(near.max(1) @ weight), labels


def induce(data, n):
    """(V, n + 3) float32, how often a token is in words of each class; {word: class}, most frequent first.

    A subword has its word's class, as in syntactic smoothing (Diehl Martinez 2024, 2410.11462). Words are
    clustered by the roots of their neighbours' counts, left and right apart; the best of eight starts stays.
    The last three classes are numbers, punctuation and spaces, rare words. BOS and unseen ids have zeros.
    """
    pieces, text, (token, piece, count) = read_words(data)
    words = [re.sub(r'\d+', '0', (text.split() or [''])[0].lower()) for text in pieces]
    number = defaultdict(itertools.count().__next__)
    text = np.array([number[word] for word in words])[text]
    names, often = list(number), np.bincount(text)
    order = np.argsort(-often, kind='stable')
    chosen = np.array([i for i in order if names[i][:1].isalpha()][:CLASS_WORDS], np.int64)
    if n > len(chosen):
        raise UserError(f'word_classes is {n:,}, the text has only {len(chosen):,} words: give fewer')
    row, column = np.full(len(names), len(chosen)), np.full(len(names), NEIGHBOURS)    # the last: all others
    row[chosen], column[order[:NEIGHBOURS]] = np.arange(len(chosen)), np.arange(min(NEIGHBOURS, len(order)))
    near = np.zeros((2, (len(chosen) + 1) * (NEIGHBOURS + 1)))
    for part in np.array_split(text, 1 + (len(text) >> 22)):
        for side, (a, b) in enumerate(((part[1:], part[:-1]), (part[:-1], part[1:]))):
            near[side] += np.bincount(row[a] * (NEIGHBOURS + 1) + column[b], minlength=near.shape[1])
    x = np.sqrt(np.concatenate(near.reshape(2, -1, NEIGHBOURS + 1)[:, :-1], 1)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True).clip(1e-9)
    weight = np.sqrt(often[chosen]).astype(np.float32)            # unweighted, rare words take most classes
    labels = max((spherical_kmeans(x, weight, n, seed) for seed in range(8)), key=lambda run: run[0])[1]
    class_of = {names[i]: int(label) for i, label in zip(chosen, labels)}
    classes = np.array([class_of.get(word, kind(word, n)) for word in words])
    table = np.bincount(token * (n + 3) + classes[piece], count, data.tokenizer.vocab_size * (n + 3))
    table = table.reshape(-1, n + 3).astype(np.float32)
    table[data.tokenizer.bos] = 0
    return table, class_of


def tagged_words(texts):
    """[(word, tag)] from CoNLL-U, or from lines of a word, a tab and its tag."""
    rows = [line.split('\t') for text in texts for line in re.split('\r?\n', text)]
    return [row[1:4:2] if len(row) == 10 else row for row in rows
            if len(row) == 2 or len(row) == 10 and row[0].isdigit()]


def agreement(classes, tags):
    """Many-to-one accuracy, and V-measure (Rosenberg and Hirschberg 2007), of two labels for every word."""
    def entropy(counts):
        p = counts[counts > 0] / counts.sum()
        return -(p * np.log(p)).sum()

    joint = np.zeros((max(classes) + 1, max(tags) + 1))
    np.add.at(joint, (classes, tags), 1)
    apart = entropy(joint.sum(0)) + entropy(joint.sum(1))
    return float(joint.max(1).sum() / len(tags)), float(2 - 2 * entropy(joint) / apart) if apart else 1.0


def agreements(class_of, tagged, n):
    """{labels: agreement()} of the induced classes, one class for all, the same classes dealt anew."""
    words, where = np.unique([word.lower() for word, _ in tagged], return_inverse=True)
    tags = np.unique([tag for _, tag in tagged], return_inverse=True)[1]
    classes = np.array([class_of.get(word, kind(word, n)) for word in words.tolist()])
    dealt = np.random.default_rng(0).permutation(classes)
    return {name: agreement(labels[where], tags)
            for name, labels in dict(induced=classes, one=0 * classes, random=dealt).items()}

"""--retrieve: what a folder of text files says of a prompt, before it.

    python sample.py out/babylm "Who was Ada?" --retrieve notes        the passages of notes/ that fit best
    python sample.py out/babylm --interactive --retrieve notes --passages 1

A model uses them if it was taught to: config/retrieval.py. The index lies in the run's folder.
"""
import codecs
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import stat
import sys
from pathlib import Path

import numpy as np

import prepare_data
from config import UserError, at_home, refuse
from sample import complete_all, open_run, tell, within

K1, B = 1.2, 0.75        # BM25: how soon repeats of a word no longer count; how much a passage's length does
MOST_FILE = 1 << 28      # bytes of a file that is read


@functools.lru_cache(1 << 20)
def hash_of(word):
    return int.from_bytes(hashlib.blake2b(word.encode('utf-8', 'replace'), digest_size=8).digest(), 'little')


def terms_of(text):
    """(words,) uint64: hashes of a text's words in lower case."""
    return np.array([hash_of(word) for word in re.findall(r'\w+', text.lower())], np.uint64)


@functools.lru_cache(2)
def breaks_of(tokenizer):
    """(5, V): whether a token ends a line, is nothing else, ends a paragraph, ends a sentence, begins a word;
    (V,): whether it begins inside a character."""
    table = tokenizer.table
    return np.array([[p.endswith(b'\n'), p.endswith(b'\n') and not p.strip(), b'\n\n' in p or b'\n\r\n' in p,
                      p.rstrip(b' \r\n"\')').endswith((b'.', b'!', b'?')), p[:1].isspace()] for p in table],
                    bool).T, np.array([len(p) > 0 and 0x80 <= p[0] < 0xC0 for p in table])


def cut(ids, tokenizer, size):
    """Where passages of at most `size` of these ids part, 0 and their number included: in the later half of
    each behind the last paragraph that ends there, else a sentence, else a line or word, else anywhere but in
    a character."""
    ids = np.asarray(ids, np.int64)
    of, inside = breaks_of(tokenizer)
    line, empty, paragraph, sentence, word = of[:, ids]
    paragraph[1:] |= empty[1:] & line[:-1]
    rank = np.maximum.reduce([3 * paragraph, 2 * sentence, 1 * line])
    rank[:-1] = np.where(inside[ids[1:]], -1, np.maximum(rank[:-1], word[1:]))
    ends = [0]
    while len(ids) - ends[-1] > size:
        first = ends[-1] + size // 2
        ends.append(ends[-1] + size - int(rank[first:ends[-1] + size][::-1].argmax()))
    return [*ends, len(ids)] if len(ids) else ends


class BM25:
    """Which passages have the words of a text, by Okapi BM25 (Robertson 1994; Robertson and Zaragoza 2009).

    terms (V,): hashes of words, ascending; starts (V + 1,): where the postings of each begin; passages,
    counts (P,): of a posting, where and how often the word is; lengths (N,): words of each passage. All may
    be memory-mapped.
    """
    ARRAYS = 'terms', 'starts', 'passages', 'counts', 'lengths'

    def __init__(self, terms, starts, passages, counts, lengths):
        self.terms, self.starts, self.passages, self.counts = terms, starts, passages, counts
        self.lengths = lengths
        self.norm = K1 * (1 - B + B * lengths / max(1.0, np.mean(lengths))) if len(lengths) else lengths

    @classmethod
    def of(cls, rows, old=None, place=()):
        """Of the words of passages, pairs of a passage's number and an array of terms_of; and of all passages
        of an older one that have a place among them: place[number there] is the number here, -1 is none."""
        found = [(number, *np.unique(row, return_counts=True), len(row)) for number, row in rows]
        numbers, terms, counts, sizes = zip(*found) if found else [()] * 4
        term = np.concatenate([*terms, np.zeros(0, np.uint64)])
        where = np.repeat(np.array(numbers, np.int64), [len(t) for t in terms])
        count = np.concatenate([*counts, np.zeros(0, np.int64)])
        if old is not None:
            stays = place[old.passages] >= 0
            term = np.append(term, np.repeat(old.terms, np.diff(old.starts))[stays])
            where, count = np.append(where, place[old.passages][stays]), np.append(count, old.counts[stays])
            numbers, sizes = [*numbers, *place[place >= 0]], [*sizes, *old.lengths[place >= 0]]
        lengths = np.zeros(len(numbers), np.int32)
        lengths[np.array(numbers, np.int64)] = sizes
        order = np.lexsort((where, term))
        terms, starts = np.unique(term[order], return_index=True)
        return cls(terms, np.append(starts, len(order)), where[order].astype(np.int32),
                   count[order].clip(max=65535).astype(np.uint16), lengths)

    def best(self, words, k, but=(0, 0), most=1 << 20):
        """The numbers and scores of the k passages that fit words of terms_of best, best first, of equals the
        first first; but those from but[0] to but[1]. Rare words count most: common ones are left out that
        would come to more than `most` postings."""
        words = np.unique(words)
        at = np.searchsorted(self.terms, words)
        words, at = words[at < len(self.terms)], at[at < len(self.terms)]
        at = at[self.terms[at] == words]
        often = self.starts[at + 1] - self.starts[at]
        rare = np.argsort(often, kind='stable')
        rare = rare[np.cumsum(often[rare]) <= most]
        score, n, met = np.zeros(len(self.lengths)), len(self.lengths), [np.zeros(0, np.int64)]
        for i, df in zip(at[rare], often[rare]):
            where, tf = (x[self.starts[i]:self.starts[i + 1]] for x in (self.passages, self.counts))
            score[where] += math.log1p((n - df + 0.5) / (df + 0.5)) * (K1 + 1) * tf / (tf + self.norm[where])
            met.append(where)
        score[but[0]:but[1]] = 0
        met = np.concatenate(met)
        met = np.unique(met) if len(met) < n // 8 else np.flatnonzero(score)     # a sort, or all of them
        met = met[score[met] > 0]
        if len(met) > k:
            met = met[score[met] >= np.partition(score[met], -k)[-k]]
        met = met[np.lexsort((met, -score[met]))[:k]]
        return met, score[met]


class Passages:
    """The passages of a folder's text files, of at most `size` tokens each, and BM25 over them.

    Links are not followed, hidden files are passed over; what is not UTF-8 text is left out with a word. The
    index lies in `kept`, a folder of ours, memory-mapped; files that are new, changed (by size and time, then
    by digest) or gone since are taken in or out as it is opened. One that is damaged is made again.
    """

    def __init__(self, folder, tokenizer, size, kept, say):
        self.root, self.tokenizer, self.size, self.say = Path(folder).resolve(), tokenizer, size, say
        refuse(not self.root.is_dir(), f'{folder} is no folder: name one that holds files of text')
        self.kept, self.what = Path(kept), f'1 {hashlib.sha256(tokenizer.blob).hexdigest()} {size}'
        self.files, self.spans, self.index = {}, np.zeros((0, 2), np.int64), None
        self.open()
        self.update()
        self.ends = np.cumsum([of['passages'] for of in self.files.values()])

    def open(self):
        """What was kept, if it is whole and of this tokenizer and size."""
        if not self.kept.exists():
            return
        try:
            told = json.loads((self.kept / 'index.json').read_text())
            if told['what'] != self.what:
                return
            for name, digest in told['digests'].items():
                changed = prepare_data.sha256_of(self.kept / f'{name}.npy') != digest
                refuse(changed, f'{name}.npy is not what was written')
            refuse(self.check(told['files']) != told['check'], 'index.json is not what was written')
            self.files, (self.spans, self.index) = told['files'], self.mapped()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as e:
            self.say(f'{self.kept} is damaged ({e}): it is made again')

    @staticmethod
    def check(files):
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def mapped(self):
        """The spans and the BM25 that were kept."""
        spans, *arrays = (np.load(self.kept / f'{name}.npy', mmap_mode='r')
                          for name in ('spans', *BM25.ARRAYS))
        return spans, BM25(*arrays)

    def names(self):
        """Names of the files of the folder that are candidates, in order."""
        def stop(e):
            self.say(f'left out: {prepare_data.clipped(e.filename)}, {e.strerror}')

        for folder, below, names in os.walk(self.root, onerror=stop):       # links to folders are not walked
            if any(ours <= {*names} for ours in (*prepare_data.OURS, {'index.json', 'spans.npy'})):
                names, below[:] = [], []
            below[:] = sorted(name for name in below if name[0] != '.')
            yield from (os.path.relpath(os.path.join(folder, name), self.root) for name in sorted(names)
                        if name[0] != '.' and not os.path.islink(os.path.join(folder, name)))

    @contextlib.contextmanager
    def opened(self, name):
        """A file of the folder, neither a link nor a pipe, with its size and time."""
        flags = getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0)
        path = self.root / name
        refuse(path.resolve() != path, 'it is a link')           # or a folder on the way to it has become one
        with open(os.open(path, os.O_RDONLY | flags), 'rb') as f:
            of = os.fstat(f.fileno())
            refuse(not stat.S_ISREG(of.st_mode), 'it is no file')
            refuse(of.st_size > MOST_FILE, f'it is larger than {MOST_FILE >> 20} MiB')
            yield f, [of.st_size, of.st_mtime_ns]

    def update(self):
        """Takes in what is new or changed and out what is gone; kept again if anything was."""
        files, spans, rows, changed, n = {}, [self.spans[:0]], [], False, 0
        firsts = dict(zip(self.files, np.cumsum([0, *(of['passages'] for of in self.files.values())])))
        place = np.full(len(self.spans), -1)
        for name in self.names():
            of, old = dict(passages=0), self.files.get(name, {})
            try:
                with self.opened(name) as (f, of['seen']):
                    if of['seen'] != old.get('seen'):
                        changed, of['digest'] = True, hashlib.file_digest(f, 'sha256').hexdigest()
                    if of.get('digest', old.get('digest')) == old.get('digest'):
                        of = {**old, 'seen': of['seen']}
                    else:
                        f.seek(0)
                        made = [*self.passages(f)]
                        spans.append(np.array([span for span, _ in made], np.int64).reshape(-1, 2))
                        rows += [(n + i, terms) for i, (_, terms) in enumerate(made)]
                        of['passages'] = len(made)
            except (OSError, UserError, UnicodeDecodeError) as e:
                text = not isinstance(e, UnicodeDecodeError)
                of['left_out'] = str(getattr(e, 'strerror', e)) if text else 'it is not UTF-8 text'
                changed |= 'left_out' not in old
            if 'left_out' not in of and of.get('digest') == old.get('digest'):
                first = firsts[name]
                place[first:first + of['passages']] = n + np.arange(of['passages'])
                spans.append(self.spans[first:first + of['passages']])
            files[name], n = of, n + of['passages']
        if changed or files.keys() != self.files.keys() or self.index is None:
            self.files, self.spans = files, np.concatenate(spans)
            self.index = BM25.of(rows, self.index, place)
            self.keep()
        if left := [(name, of['left_out']) for name, of in files.items() if 'left_out' in of]:
            self.say(f'left out: {prepare_data.clipped(left[0][0])}, {left[0][1]}'
                     + f'; and {len(left) - 1:,} more' * (len(left) > 1))

    def passages(self, f):
        """((first byte, end), terms) of each passage of an open file; UnicodeDecodeError if it is no text."""
        decoder, end = codecs.getincrementaldecoder('utf-8')(), 3 * (f.read(3) == codecs.BOM_UTF8)
        f.seek(end)
        while block := f.read(1 << 20) + f.readline(1 << 16):
            text = decoder.decode(block)
            if '\0' in text:
                raise UnicodeDecodeError('utf-8', b'\0', 0, 1, 'a zero')
            ids = self.tokenizer.encode(text)
            places = end + np.cumsum([0, *(len(self.tokenizer.table[i]) for i in ids)])
            parts = cut(ids, self.tokenizer, self.size)
            for a, b in zip(parts, parts[1:]):
                if len(terms := terms_of(self.tokenizer.decode(ids[a:b]))):
                    yield (places[a], places[b]), terms
            end = places[-1]
        decoder.decode(b'', final=True)

    def keep(self):
        """Writes the index, whole or not at all, and maps it; from memory where that cannot be."""
        arrays = dict(spans=self.spans) | {name: getattr(self.index, name) for name in BM25.ARRAYS}
        try:
            with prepare_data.whole_or_nothing(self.kept) as temp:
                for name, array in arrays.items():
                    np.save(temp / f'{name}.npy', array)
                digests = {name: prepare_data.sha256_of(temp / f'{name}.npy') for name in arrays}
                told = dict(what=self.what, digests=digests, files=self.files, check=self.check(self.files))
                (temp / 'index.json').write_text(json.dumps(told))
        except UserError as e:
            return self.say(f'the index is not kept: {str(e).partition(";")[0]}')
        self.spans, self.index = self.mapped()

    def best(self, prompt, k):
        """(score, file, number of the passage in it, text) of the k best, best first."""
        for number, score in zip(*self.index.best(terms_of(prompt), k)):
            at = int(np.searchsorted(self.ends, number, side='right'))
            name = [*self.files][at]
            try:
                with self.opened(name) as (f, seen):
                    refuse(seen != self.files[name]['seen'], 'it has changed meanwhile')
                    f.seek(self.spans[number, 0])
                    text = f.read(self.spans[number, 1] - self.spans[number, 0]).decode(errors='replace')
                first = self.ends[at] - self.files[name]['passages']
                yield float(score), name, int(number - first), text.strip()
            except (OSError, UserError) as e:
                self.say(f'left out: {prepare_data.clipped(name)}: {getattr(e, "strerror", e)}')

    def fitting(self, query, k, block_size, taken, length):
        """Ids to put between BOS and a prompt: at most k passages that fit a query, best one last, a blank line
        behind each; and those, as best() has them. The `taken` tokens of the prompt and `length` that follow,
        up to a quarter of block_size, find room beside them."""
        ids, given, room = [], [], block_size - 1 - taken - min(length, block_size // 4)
        for passage in self.best(query, k):
            more = self.tokenizer.encode(passage[-1]) + self.tokenizer.encode('\n\n')
            if len(ids) + len(more) <= room:
                ids = more + ids
                given.append(passage)
        return ids, given

    def before(self, prompt, k, block_size, length):
        """The ids that fit a prompt, of fitting(). Says which passages they are."""
        ids, given = self.fitting(prompt, k, block_size, len(self.tokenizer.encode(prompt)), length)
        for score, name, number, text in given:
            self.say(f'{score:7.2f}  {prepare_data.clipped(name)}, passage {number + 1}: '
                     f'{prepare_data.clipped(text, 60)}')
        if not ids:
            self.say('no passage has a word of the prompt, or fits before it')
        return ids


def open_passages(run, folder):
    """Passages of a folder, a quarter of the model's context long each. The index stands in the run's folder,
    as it is of its tokenizer: nothing is written into the user's."""
    path = Path(folder).resolve()
    kept = f'passages-{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}'
    return Passages(folder, run.tokenizer, run.model.config.block_size // 4, run.folder / kept,
                    functools.partial(print, file=sys.stderr))


def options(add):
    add('--retrieve', help='a folder of text files, whose passages that fit the prompt best go before it')
    add('--passages', type=int, default=3, help='of --retrieve, at most')


def main(args, of_ideas):
    within(args, passages=(1, 1000))
    refuse(args.eval or args.export or not (args.prompt or args.file or args.interactive),
           '--retrieve finds what fits a prompt: give one, and neither --eval nor --export')
    run = open_run(args.run, args.device, of_ideas)
    passages, size = open_passages(run, at_home(args.retrieve)), run.model.config.block_size
    tell(run, args, functools.partial(
        complete_all, before=lambda prompt: passages.before(prompt, args.passages, size, args.max_new_tokens)))

"""--workers=N: prepares many files in N processes and in one pass over the text; goes on where it was killed.

    python prepare_data.py files:crawl --workers=8 --tokenizer_from=data/files-sample-bpe8192
    python prepare_data.py files:crawl --workers=8 --tokenizer_from=data/files-sample-bpe8192 --share=2/3

The tokenizer is given, or --tokenizer=bytes. What is written is the same to the byte as without --workers.
A process makes a shard of a file, in <folder>.shards: the ids of its documents, and a row of each with the
hash that its split follows from once all shards are there. A file that has its shard is not read again.
With --share a machine makes its share of the shards and no more: config/prepare_merge.py joins them.
"""
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import SimpleNamespace

import numpy as np

import prepare_data
from config import UserError, in_words, name_of, refuse
from prepare_data import BATCH_BYTES, Found, SplitWriter, key_of, lines_of, sha256_of

workers: int = 1             # 1..: processes, each at a file of its own
share: str = ''              # i/n: make shards of every n-th file, from the i-th on, and nothing of them

NOT_WITH = dict(text_share='it counts documents one after the other')
ROW = np.dtype([('tokens', '<i4'), ('bytes', '<i4'), ('words', '<i4'), ('reason', 'u1'), ('key', '<u8')])
COPY = 'training documents dropped, identical to held-out ones'
STOPS = {signal.SIGINT, signal.SIGTERM}
FILES = '.bin', '.docs.npy'                      # of a shard, beside its .json


class Corpus(prepare_data.Corpus):
    """Refuses ideas that overrule a method of APART, as a document is not judged by what it is made of alone,
    or, on several machines, of SHARED, as none knows the whole."""
    APART, SHARED = ('ids', 'meet', 'decide'), ('text', 'parts', 'learn', 'record')

    def configs(self):
        return [path for path in super().configs() if not path.startswith('config/prepare_')]

    @property
    def shards(self):
        """The folder of the shards."""
        share = self.s.share and f'.{self.s.share.replace("/", "of")}'
        return self.folder.with_name(f'{self.folder.name}{share}.shards')

    @functools.cached_property
    def recipe(self):
        """What shards that go together have in common."""
        return dict(version=prepare_data.VERSION, ideas=self.configs(), settings=self.content(),
                    tokenizer_sha256=hashlib.sha256(self.given.blob).hexdigest(), learned=self.learned())

    @functools.cached_property
    def given(self):
        return self.tokenizer(())

    def check(self):
        super().check()
        refuse(self.s.tokenizer == 'bpe' and not self.s.tokenizer_from, 'one pass over the text learns no '
               'tokenizer: prepare some of its files first and give that data set with --tokenizer_from, or '
               'use --tokenizer=bytes')
        for name in self.APART + self.SHARED * bool(self.s.share):
            owner = next(c for c in type(self).__mro__ if name in vars(c))
            refuse(owner is not prepare_data.Corpus, f'{name_of(owner)} takes all of the text '
                   f'together ({name}), so its files cannot be prepared apart: leave it out, or --workers '
                   f'and --share')
        refuse(not re.fullmatch(r'|[1-9]\d*/[1-9]\d*', self.s.share), f'share is {self.s.share!r}: write '
               f'the second of three as 2/3')
        refuse('fork' not in multiprocessing.get_all_start_methods(), 'this system cannot divide a process '
               'in two (fork): prepare without --workers')

    def run(self):
        if not self.s.share:
            return super().run()
        self.check()
        i, n = map(int, self.s.share.split('/'))
        refuse(i > n, f'share is {self.s.share}: {i} is more than {n}')
        dropped = Counter()
        parts, ignored = prepare_data.gather(self, self.shards, dropped)
        made = [shard.name for shard in self.encode_all(parts[i - 1::n])]
        (self.shards / self.given.filename).write_bytes(self.given.blob)
        write_json(self.shards / 'share.json', dict(
            recipe=self.recipe, dataset=self.s.dataset, made=made, ignored=ignored,
            parts=[[part.name, part.split, part.source, part.shard] for part in parts]))
        print(f'{len(made):,} of {len(parts):,} files are in {self.shards}: when all shares are '
              f'made, join them with --merge={self.shards},...')

    def build(self, quiet=False):
        folder = super().build(quiet)
        shutil.rmtree(self.shards, ignore_errors=True)
        return folder

    def fill(self, temp):
        t0, dropped = time.time(), Counter()
        parts, ignored = prepare_data.gather(self, temp, dropped)
        trace = prepare_data.trace(self.root)
        shards = self.encode_all(parts)
        if trace != prepare_data.trace(self.root):
            raise prepare_data.unsteady(self.root)
        known = {part.path: shard.sha256 for part, shard in zip(parts, shards)}      # not all, where an idea reads copies
        paths = [self.root if self.root.is_file() else self.root / row[0] for row in trace['files']]
        trace['files'] = [[*row, known.get(path) or sha256_of(path)] for row, path in zip(trace['files'], paths)]
        self.assemble(temp, t0, parts, shards, ignored, dropped, trace)

    def encode_all(self, parts):
        """The shards of these files, made where they are missing, the largest first."""
        from tqdm import tqdm
        self.shards.mkdir(parents=True, exist_ok=True)
        done = {part.name: shard for part in parts if (shard := Shard.made(self, part))}
        todo = sorted((p for p in parts if p.name not in done), key=lambda p: -p.path.stat().st_size)
        if done:
            print(f'{self.shards} holds the shards of {len(done):,} of {len(parts):,} files already',
                  flush=True)
        try:
            with tqdm(total=sum(part.path.stat().st_size for part in todo), unit='B', unit_scale=True,
                      disable=None, desc='encoding') as bar:
                for part in in_processes(functools.partial(Shard.make, self), todo, self.s.workers):
                    bar.update(part.path.stat().st_size)
        except KeyboardInterrupt:
            made = sum(Shard.made(self, part) is not None for part in parts)
            raise KeyboardInterrupt(f'{made:,} of {len(parts):,} files are done, the same command goes on') \
                from None
        finally:
            for left in self.shards.glob('.*'):                  # by processes that were killed
                left.unlink()
        return [done.get(part.name) or Shard.made(self, part) for part in parts]

    def assemble(self, temp, t0, parts, shards, ignored, dropped, made_from):
        """Writes all files of the data set from its shards, in the order of its files."""
        size = 2 if self.given.vocab_size <= 65536 else 4
        prepare_data.room(self, temp, sum(size * s.tokens + 18 * s.documents for s in shards))
        self.pieces, names = {}, sorted({part.source for part in parts})
        for part, shard in zip(parts, shards):
            part.kind, part.way = shard.kind, shard.way
            for reason, pieces in shard.pieces.items():
                kept = self.pieces.setdefault(reason, [])
                kept += [piece for piece in pieces if piece not in kept][:3 - len(kept)]
        found = self.held(parts, shards)
        encoded = self.join(temp, parts, shards, found, names)
        prepare_data.describe(self, temp, t0, parts, ignored, dropped, found, encoded, made_from)

    def held(self, parts, shards):
        """What scan would have Found of what is held out."""
        found = Found(self.s.val_fraction)
        for part, shard in zip(parts, shards):
            refuse(part.split and not shard.documents and not part.shard, f'{part.path} holds no text: fill '
                   f'it or take it away')
            for docs in shard.batches():
                keys, held = docs.rows['key'], np.full(len(docs.rows), part.split in ('val', 'test'))
                if part.split == '':
                    held = keys < np.uint64(found.below)
                    train = np.sort(keys[~held & (docs.rows['reason'] == 0)]).tolist()
                    lowest = next((key for key in train if key not in found.held), 2**64)
                    if lowest < found.lowest:
                        found.lowest, found.lowest_text = lowest, docs.text(np.flatnonzero(keys == np.uint64(lowest))[0]).decode()
                for i in np.flatnonzero(held):
                    found.assign(part.split, int(keys[i]), docs.text(i).decode())
        found.hold_one()
        return found

    def join(self, temp, parts, shards, found, names):
        """What encode returns, from the ids of shards."""
        known = {'': found.held, 'train': found.held | found.hashed}
        writers, reports, digest = {}, {name: Counter() for name in names}, hashlib.sha256()
        for part, shard in zip(parts, shards):
            source, report = names.index(part.source), reports[part.source]
            report.update(shard.report)
            for docs in shard.batches():
                keys, splits = docs.rows['key'], np.full(len(docs.rows), part.split or 'train')
                if part.split == '':
                    splits[[key in found.hashed for key in keys.tolist()]] = 'val'
                copies = [key in known.get(part.split, ()) for key in keys.tolist()]
                train = splits == 'train'
                gone = np.where(copies, len(shard.reasons), np.where(train, docs.rows['reason'], 0))
                for i, split in enumerate(splits.tolist()):
                    doc = docs.text(i)
                    if gone[i]:
                        self.note(report, [*shard.reasons, COPY][gone[i]], doc.decode())
                        continue
                    digest.update(f'{split} {source} {len(doc)} '.encode() + doc)
                    if split == 'train' and found.lines:
                        found.shared.update(x for x, _ in lines_of(doc.decode()) if x in found.lines)
                for split in dict.fromkeys(splits[gone == 0].tolist()):
                    if split not in writers:
                        writers[split] = SplitWriter(temp, split, self.given, len(names), self.ids)
                    docs.append_to(writers[split], source, (splits == split) & (gone == 0))
        return prepare_data.finished(writers), reports, digest.hexdigest()


# ---- a shard: what a file of text becomes

class ShardWriter(SplitWriter):
    """Encodes the documents of a file, and keeps what decides where they belong."""

    def __init__(self, folder, name, corpus):
        super().__init__(folder, name, corpus.given, 1, corpus.ids)
        self.rows, self.judged = [np.zeros(0, ROW)], []

    def add(self, key, reason, n_bytes, text):
        self.judged.append((key, reason))
        super().add(0, n_bytes, text)

    def append(self, sources, n_bytes, words, lengths, ids):
        rows = np.zeros(len(lengths), ROW)
        rows['tokens'], rows['bytes'], rows['words'] = lengths, n_bytes, words
        rows['key'], rows['reason'] = zip(*self.judged)
        self.rows.append(rows)
        self.tokens += int(lengths.sum())
        self.file.write(ids.astype(self.dtype).tobytes())
        self.judged = []


class Shard:
    """What a file of text became; path: of its files, without their suffixes; told: its .json."""

    def __init__(self, path, told, table):
        vars(self).update(told)
        self.path, self.table = path, table

    @staticmethod
    def path_of(folder, name):
        return folder / hashlib.sha256(name.encode()).hexdigest()[:16]

    @classmethod
    def open(cls, path, table):
        """That of a path without suffix; None where it is missing, or not whole."""
        try:
            shard = cls(path, json.loads(path.with_suffix('.json').read_text('utf-8')), table)
            sizes = [path.with_suffix(suffix).stat().st_size for suffix in FILES]
            return shard if sizes == [size for size, _ in shard.files] else None
        except (FileNotFoundError, ValueError):
            return None

    @classmethod
    def made(cls, corpus, part):
        """That of a file, if it was made of what the file is now."""
        shard = cls.open(cls.path_of(corpus.shards, part.name), corpus.given.table)
        of = part.path.stat()
        now = [part.name, part.source, of.st_size, of.st_mtime_ns, corpus.recipe]
        return shard if shard and [shard.name, shard.source, *shard.of, shard.recipe] == now else None

    @classmethod
    def make(cls, corpus, part):
        """Reads a file once, beginning to end, and makes its shard, whole or not at all."""
        path, of, began = cls.path_of(corpus.shards, part.name), part.path.stat(), os.getppid()
        beside = prepare_data.beside(path)
        corpus.pieces, report, reasons = {}, Counter(), {'': 0}
        orphaned = SimpleNamespace(update=lambda n: os.getppid() == began or os._exit(1))
        try:
            digest = sha256_of(part.path)        # what it brings into memory is read again
            writer = ShardWriter(corpus.shards, beside.name, corpus)
            for doc, text in corpus.documents(part, report, orphaned):
                reason = reasons.setdefault(corpus.unwanted(text, part), len(reasons))
                writer.add(key_of(doc)[0], reason, len(doc), text)
            writer.close()
            now = part.path.stat()
            if (now.st_size, now.st_mtime_ns) != (of.st_size, of.st_mtime_ns):
                raise prepare_data.unsteady(part.path)
            files = [beside.with_name(beside.name + suffix) for suffix in FILES]
            told = dict(name=part.name, source=part.source, kind=part.kind, way=part.way, sha256=digest,
                        of=[of.st_size, of.st_mtime_ns], documents=sum(map(len, writer.rows)),
                        tokens=writer.tokens, report=report, pieces=corpus.pieces, reasons=[*reasons],
                        recipe=corpus.recipe,
                        files=[[file.stat().st_size, sha256_of(file)] for file in files])
            for file, suffix in zip(files, FILES):
                with open(file, 'rb+') as f:
                    os.fsync(f.fileno())
                os.replace(file, path.with_suffix(suffix))
            write_json(path.with_suffix('.json'), told)
        finally:
            for suffix in FILES:
                beside.with_name(beside.name + suffix).unlink(missing_ok=True)

    def batches(self):
        """Its documents, about BATCH_BYTES at a time."""
        rows = np.load(self.path.with_suffix('.docs.npy'), mmap_mode='r')
        dtype, at = np.dtype('<u2' if len(self.table) <= 65536 else '<u4'), 0
        first = np.flatnonzero(np.diff(rows['bytes'].cumsum(dtype=np.int64) // BATCH_BYTES, prepend=-1))
        for a, b in zip(first, [*first[1:], len(rows)]):
            batch = np.array(rows[a:b])
            n = int(batch['tokens'].sum())
            ids = np.fromfile(self.path.with_suffix('.bin'), dtype, n, offset=at * dtype.itemsize)
            yield Documents(batch, ids, self.table)
            at += n


@dataclass
class Documents:
    rows: np.ndarray         # (n,) of ROW
    ids: np.ndarray          # of all, back to back
    table: list

    def __post_init__(self):
        self.ends = self.rows['tokens'].cumsum(dtype=np.int64).tolist()
        self.starts = [0, *self.ends[:-1]]

    def text(self, i):
        """The bytes of a document."""
        return b''.join(map(self.table.__getitem__, self.ids[self.starts[i]:self.ends[i]].tolist()))

    def append_to(self, writer, source, which):
        rows = self.rows[which]
        writer.append(np.full(len(rows), source), rows['bytes'], rows['words'], rows['tokens'],
                      self.ids[np.repeat(which, self.rows['tokens'])])


def write_json(path, told):
    """Writes a file that is there when it is whole."""
    beside = prepare_data.beside(path)
    beside.write_text(json.dumps(told, ensure_ascii=False), encoding='utf-8')
    os.replace(beside, path)


# ---- processes

def in_processes(work, items, n):
    """Yields each item after work(item), which a process of its own does, n at a time; the first that fails
    ends all. A killed one leaves no other waiting: none waits for another."""
    context, running = multiprocessing.get_context('fork'), {}
    try:
        for item in items:
            while len(running) == n:
                yield from settled(running)
            end, theirs = context.Pipe(duplex=False)
            process = context.Process(target=tell, args=(theirs, work, item), daemon=True)
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
            process.start()                      # what arrives inside of a fork is lost
            running[end] = item, process         # those that have started, as others cannot be ended
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        while running:
            yield from settled(running)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def settled(running):
    """Waits until one has ended; those that have."""
    for end in wait(list(running)):
        item, process = running.pop(end)
        try:
            said = end.recv()
        except EOFError:
            said = (f'the process that read {item.path} was ended by somebody, or memory was full: the same '
                    f'command goes on, with fewer --workers')
        process.join()
        refuse(said, said)
        yield item


def tell(end, work, item):
    """In the process: does the work, and says what went wrong, or nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)                 # whoever started it ends it, and cleans up
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    prepare_data.THREADS = 1
    try:
        work(item)
        end.send('')
    except (UserError, OSError) as e:
        full = getattr(e, 'errno', None) in prepare_data.FULL
        end.send('the disk is full: make room, the same command goes on' if full else in_words(e))

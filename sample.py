"""Ask a trained model: complete prompts, measure it.

    python sample.py out/quickstart                                    one sample from an empty prompt
    python sample.py out/quickstart "Mia left the kite" --samples 3    three continuations at once
    python sample.py out/quickstart --file prompts.txt                 one continuation a line
    python sample.py out/quickstart --interactive                      a prompt at a time, until an empty line
    python sample.py out/taught --chat                                 what one says and what it answers, in turn
    python sample.py out/babylm "Who was Ada?" --retrieve notes        with what notes/ says of it before
    python sample.py out/babylm --eval=all                             bits per byte, and all of data/eval
    python sample.py out/babylm --eval=blimp,my_pairs.jsonl            two evaluation sets
    python sample.py out/babylm config/my_measure.py --eval=mine       what an idea measures
    python sample.py data/babylm-bpe8192 --eval=all                    fetch BLiMP, tokenize all of data/eval
    python sample.py out/quickstart "Mia" --stats                      and what that took in energy and cache
    python sample.py out/babylm --export html                          the model in a page that opens anywhere
    python sample.py --serve out/quickstart out/babylm                 a page and a JSON API, for one run or two
    python sample.py out/babylm --export hf                            for transformers; gguf for llama.cpp
    python sample.py out/babylm --export int8                          out/babylm/int8, a smaller run; or int4

A run is asked by the code of the ideas that made it. What train.py measures stands here too: Measure, a seam,
and Energy.
"""
import argparse
import base64
import codecs
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import glob
import hashlib
import hmac
import http.server
import json
import lzma
import math
import os
import pickle
import platform
import queue
import re
import secrets
import select
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

try:
    import fcntl
    import resource
except ImportError:                             # Windows
    fcntl = resource = None

import prepare_data
from config import UserError, at_home, in_words, name_of, print_without_fail, refuse, verb, verbs
from model import GPT, IN_USE, KVCache, configured, sample_token

sys.modules.setdefault('sample', sys.modules[__name__])     # what an idea that imports sample gets

PROTOCOL = 1     # version of bits_per_byte's definition; stored beside every number it makes
SLICES = 1024    # the parts that a validation split is dealt into

# ---- a run's files -----------------------------------------------------------------------------------------

CHECKPOINTS = ('ckpt.pt', 'ckpt.prev.pt', 'ckpt.new.pt')     # the last, the one before, one that a kill kept from its place


class Damaged(UserError):
    """A file that is not what was written there."""


def read_checkpoint(run, versions=(3,)):
    """The newest whole checkpoint of a run's folder (or the file itself), on the CPU. One that is damaged is
    passed over with a line; UserError if no other is whole."""
    run, damaged = Path(run).expanduser(), None
    paths = [run / name for name in CHECKPOINTS if (run / name).exists()] if run.is_dir() else [run]
    for path in paths or [run / CHECKPOINTS[0]]:
        try:
            state = read_whole(path, versions)
        except Damaged as e:
            damaged = damaged or e
            continue
        if damaged:
            print(f'warning: {damaged}; {path} is whole and takes its place', file=sys.stderr)
        return state
    raise damaged


def read_whole(path, versions):
    """What a checkpoint holds, tensors and plain values alone, after its checksums."""
    try:
        with zipfile.ZipFile(path) as records:
            wrong = records.testzip()
        if wrong:
            raise Damaged(f'{path} is damaged: {wrong} in it has another checksum than was written')
        state = torch.load(path, map_location='cpu', weights_only=True)
        if state['version'] not in versions:
            older = ': commit fb45184 reads it, git checkout fb45184' * (state['version'] == 2)
            raise UserError(f'{path} is a checkpoint of version {state["version"]}, '
                            f'this program reads version 3{older}')
        return state
    except FileNotFoundError as e:
        raise UserError(f'{path} does not exist: name a folder that train.py wrote, '
                        f'such as out/quickstart') from e
    except OSError as e:
        raise UserError(f'{path} cannot be read ({e.strerror}): have its owner let you') from e
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, IndexError, ValueError,
            AttributeError, zlib.error, zipfile.BadZipFile, NotImplementedError) as e:
        code = re.search(r'GLOBAL (\S+)', str(e))
        raise Damaged(f'{path} holds {code[1]}, which is code, and none of a checkpoint is run' if code else
                      f'{path} is cut off or not a checkpoint of train.py ({type(e).__name__})') from e


def as_json(data, **layout):
    """JSON, with null where a number is not finite."""
    return json.dumps(json.loads(json.dumps(data), parse_constant=lambda _: None), **layout)


def write_beside(path, write):
    """Make a file complete or not at all: write(file) beside its place, flush, move."""
    path = Path(path)
    beside = path.with_name(path.name + '.part')
    try:
        with open(beside, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:        # torch's writer turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        full = isinstance(e, RuntimeError) or e.errno in prepare_data.FULL
        mend = 'make room there' if full else 'have that folder made writable, or choose another'
        raise UserError(f'{path} could not be written ({getattr(e, "strerror", None) or e}): {mend}') from e


def save_checkpoint(out_dir, state):
    path = Path(out_dir) / 'ckpt.pt'
    try:
        write_beside(path.with_name('ckpt.new.pt'), lambda f: torch.save(state, f))
    except UserError as e:
        before = f'; {path} is whole, from there --init_from=resume goes on' if path.exists() else ''
        raise UserError(f'{e}{before}') from e
    if path.exists():
        os.replace(path, path.with_name('ckpt.prev.pt'))
    os.replace(path.with_name('ckpt.new.pt'), path)


OWNED = {}       # folder: its lock, which this process holds until it ends, in whatever way


def own(folder, make=True):
    """Takes a folder that is written for this process; UserError where another one has it. Unless the lock is
    to be made, only one that is there is taken."""
    folder = Path(folder).resolve()
    if fcntl is None or folder in OWNED or not make and not (folder / '.lock').exists():
        return
    lock = open(folder / '.lock', 'a+')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        lock.seek(0)
        raise UserError(f'{folder} is being written by another run, {lock.read() or "just begun"}: wait for '
                        f'its end, or choose another --out_dir') from e
    except OSError:                             # a file system without locks
        return
    OWNED[folder] = lock
    if make:
        with contextlib.suppress(OSError):      # a full disk
            lock.truncate(0)
            print(f'process {os.getpid()} on {platform.node()}', end='', file=lock, flush=True)


def read_rows(path):
    """The whole rows of a metrics.jsonl, if there is one; a last line that was cut off is left out."""
    rows = []
    for line in (Path(path).read_text(errors='replace').splitlines() if Path(path).exists() else []):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def open_run(run, device='cpu', argv=()):
    """A run's folder, model, ready to generate, tokenizer, ideas, settings and state, its checkpoint.

    argv: what the command line says of it, configs of further ideas and --key=value of what ideas declare.
    """
    state, path = read_checkpoint(run, (3, *verbs('export'))), Path(run).expanduser()
    folder = path if path.is_dir() else path.parent
    tokenizer = prepare_data.load_tokenizer(folder)
    if hashlib.sha256(tokenizer.blob).hexdigest() != state['tokenizer']:
        raise UserError(f'{folder / tokenizer.filename} is not the vocabulary that the checkpoint was '
                        f'trained with: put back the one of {state["data"]}')
    ideas = prepare_data.ideas_of(state['ideas'], state['settings'], argv)
    for name in ideas.changed:
        print(f'config/{name}.py is not what it was as {run} was made, see the copy there', file=sys.stderr)
    given = {name: ideas.values[name] for name, where in ideas.set_at.items() if where.startswith('--')}
    Config = configured(ideas)
    own = given.keys() & {field.name for field in dataclasses.fields(Config)}
    try:
        config = Config(**state['config'] | {name: given[name] for name in own})
        model = config.GPT(config)
        if state['version'] == 3:
            model.load_state_dict(state.get('evaluated') or state['model'])      # the weights that were measured
    except (TypeError, ValueError, RuntimeError) as e:
        why = ' '.join(str(e).split())[:200]
        raise UserError(f'{run} does not fit config/ as it is now ({why}): give its ideas the text that they '
                        f'had, of which the run keeps a copy') from e
    try:
        model = model.to(device).eval()
        if state['version'] != 3:
            verb('export', state['version']).load(model, state, device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f'--device is {device!r}, and torch cannot use it here: try cpu') from e
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer, ideas=ideas, state=state,
                           settings={**ideas.values, **state['settings'], **given})


def load(run, device='cpu', argv=()):
    """(model, tokenizer) of a run's folder, as open_run has them."""
    run = open_run(run, device, argv)
    return run.model, run.tokenizer


# ---- pages -------------------------------------------------------------------------------------------------

def write_page(path, title, **data):
    """One HTML page that needs nothing else: web/page.html, which says what it draws, with its data in it."""
    text = as_json(dict(title=title, **data)).replace('<', '\\u003c')   # a </script> in a sample is text
    page = (Path(__file__).parent / 'web' / 'page.html').read_text('utf-8')
    write_beside(path, lambda f: f.write(page.replace('{}</script>', f'{text}</script>', 1).encode()))


def write_report(out_dir, blocks=()):
    """Make report.html of a finished run from the files that it left, and of blocks that ideas add."""
    out_dir = Path(out_dir)
    result, rows = json.loads((out_dir / 'result.json').read_text()), read_rows(out_dir / 'metrics.jsonl')
    write_page(out_dir / 'report.html', f'{out_dir.name}: {result["val_bpb"]:.4f} bits per byte',
               result=result, rows=thinned(rows), blocks=[*blocks])


def thinned(rows, most=3000):
    """The rows of metrics.jsonl, and of steps at most so many: each the mean of as many neighbours."""
    steps = [row for row in rows if 'train_loss' in row]
    if len(steps) <= most:
        return rows
    n, means = -(-len(steps) // most), []
    for group in (steps[i:i + n] for i in range(0, len(steps), n)):
        known = {key: [row[key] for row in group if row[key] is not None] for key in group[-1]}
        means.append({key: sum(values) / len(values) if values else None for key, values in known.items()}
                     | dict(step=group[-1]['step'], averaged=n))
    return sorted([*means, *(row for row in rows if 'train_loss' not in row)], key=lambda row: row['step'])


def page_with_hashes(name, ideas=''):
    """A page of web/, with what ideas add, and what a content security policy allows of it: its own style and
    scripts, by their digests."""
    page = (Path(__file__).parent / 'web' / name).read_text('utf-8').replace('/* IDEAS */', ideas, 1)
    inline = re.findall(r'<(?:style|script(?: id="\w+")?)>(.*?)</(?:style|script)>', page, re.S)
    hashes = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in inline)
    return page, ' '.join(f"'sha256-{digest}'" for digest in hashes)


# ---- completing --------------------------------------------------------------------------------------------

DRAWN = dict(temperature=(0, 100), top_k=(0, 10 ** 9), top_p=(1e-9, 1), min_p=(0, 1),
             repetition_penalty=(0.01, 100))     # how a token is drawn (model.sample_token): the least, the most


def drawn_by(options):
    return {name: getattr(options, name) for name in DRAWN}


def compile_for(run, *sizes):
    """Compiles what makes a token of each of so many rows, or says why the run goes on without."""
    model = run.model
    try:
        refuse(run.state['version'] != 3, 'its weights are packed')
        model.compile_step()
        for rows in sizes:
            cache, new = KVCache(model, rows), torch.full((rows, 1), run.tokenizer.bos, device=model.wte.weight.device)
            cache.go_apart()
            with torch.no_grad():
                model.quick_step(new, cache, **model.hints(new))
    except (RuntimeError, ImportError, UserError) as e:
        model.quick_step = None
        why = ' '.join(str(e).split())[:200] or type(e).__name__
        print(f'{run.folder} goes on without compiled steps: {why}', file=sys.stderr)


def stream(model, tokenizer, prompt, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None,
           before=(), **further):
    """Yield the pieces of one continuation as they come, whole characters only, up to its end. prompt: a
    text, or ids that begin with BOS. before: ids between BOS and a text. further: for GPT.generate."""
    ids = [tokenizer.bos, *before, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
    idx = torch.tensor([ids], device=model.wte.weight.device)
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    for new in model.generate(idx, max_new_tokens, temperature, top_k, top_p, generator, **further):
        if new.item() in tokenizer.ends:
            break
        yield decoder.decode(tokenizer.token_bytes(new.item()))
    yield decoder.decode(b'', final=True)


def continuations(model, tokenizer, prompts, max_new_tokens, temperature, generator, top_k=0, top_p=1.0,
                  done=lambda text: False, rows=32, stop=None, ends=None, **further):
    """What follows each of `prompts` (ids that begin with BOS): lists of ids, and which of them ended, at one
    of the ids `ends`, by default tokenizer.ends.

    They are made `rows` at a time; done(text) may end one early, stop() all: the rows not through by then are
    None. Shorter prompts get more BOS on the left, which documents keep out of sight; without doc_mask only
    prompts of one length share a batch.
    """
    made, ended, device = [None] * len(prompts), [False] * len(prompts), model.wte.weight.device
    ends = ends or tokenizer.ends
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        width = len(prompts[order[0]])
        batch = [i for i in order[:rows] if len(prompts[i]) == width or model.config.doc_mask]
        order, open_rows, texts = order[len(batch):], list(enumerate(batch)), {i: [] for i in batch}
        idx = [[tokenizer.bos] * (width - len(prompts[i])) + prompts[i] for i in batch]
        for new in model.generate(torch.tensor(idx, device=device), max_new_tokens, temperature, top_k, top_p,
                                  generator, **further):
            if stop and stop():
                return made, ended
            new = new.tolist()
            for row, i in open_rows:
                ended[i] = new[row] in ends
                texts[i] += [] if ended[i] else [new[row]]
            open_rows = [(row, i) for row, i in open_rows
                         if not ended[i] and not done(tokenizer.decode(texts[i]))]
            if not open_rows:
                break
        for i in batch:
            made[i] = texts[i]
    return made, ended


# ---- chatting ----------------------------------------------------------------------------------------------

def chat_ids(tokenizer, messages, room=None):
    """The ids of a chat, [{'role', 'content'}...], up to where the assistant answers: BOS, for each message
    its role and its text, and the assistant's role. An answer ends at one of tokenizer.ends.

    room: at most so many ids: what was said first goes first, then the beginning of the last message.
    """
    turns = []
    for message in messages:
        role = message['role']
        refuse(role not in tokenizer.roles, f'a message has the role {role!r}, this model knows '
               f'{", ".join(tokenizer.roles) or "none"}: leave it out')
        turns.append([tokenizer.roles[role], *tokenizer.encode(message['content'])])
    room = math.inf if room is None else room - 2
    while len(turns) > 1 and sum(map(len, turns)) > room:
        del turns[0]
    if turns and len(turns[0]) > room:
        turns[0][1:] = turns[0][len(turns[0]) - room + 1:]
    return [tokenizer.bos, *(i for turn in turns for i in turn), tokenizer.roles['assistant']]


def chat(run, args, generator):
    """Answers a prompt, or what is typed, in turn until an empty line; returns its tokens' number. A quarter
    of the context is kept for an answer."""
    model, tokenizer, messages, made = run.model, run.tokenizer, [], 0
    refuse(not tokenizer.roles, f'{args.run} was not taught to chat, its vocabulary has no roles: continue a '
           f'text with --interactive, or name a run that was taught')
    for text in [args.prompt] if args.prompt else iter(lambda: input('> '), ''):
        messages.append(dict(role='user', content=text))
        ids, pieces = chat_ids(tokenizer, messages, model.config.block_size * 3 // 4), []
        for piece in stream(model, tokenizer, ids, args.max_new_tokens, generator=generator, **drawn_by(args)):
            print(piece, end='', flush=True)
            pieces.append(piece)
        print()
        messages.append(dict(role='assistant', content=''.join(pieces)))
        made += len(pieces) - 1                  # the last is no token
    return made


# ---- retrieval: passages of text files, and which of them a prompt is about --------------------------------

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

    def before(self, prompt, k, block_size, length):
        """Ids to put between BOS and a prompt: at most k passages, best one last, a blank line behind each;
        `length` tokens that follow, up to a quarter of block_size, find room beside them. Says which."""
        ids, room = [], block_size - 1 - len(self.tokenizer.encode(prompt)) - min(length, block_size // 4)
        for score, name, number, text in self.best(prompt, k):
            more = self.tokenizer.encode(text) + self.tokenizer.encode('\n\n')
            if len(ids) + len(more) <= room:
                ids = more + ids
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


# ---- bits per byte -----------------------------------------------------------------------------------------

def windows(tokens, block_size):
    """Inputs and targets of a document's windows: each token after BOS is a target once, the end never."""
    for first in range(0, len(tokens) - 1, block_size):
        piece = tokens[first:first + block_size + 1].astype(np.int64)
        yield piece[:-1], piece[1:]


def batches(rows, max_tokens, block_size, step=16):
    """Rows (key, input, target) of similar length, longest first, padded into arrays of at most max_tokens.

    Yields keys, idx, targets.
    """
    rows = sorted(rows, key=lambda row: -len(row[1]))
    while rows:
        width = min(-(-len(rows[0][1]) // step) * step, block_size)     # few widths: a CPU keeps its plans
        count = max(1, max_tokens // width)
        batch, rows = rows[:count], rows[count:]
        idx, targets = np.zeros((len(batch), width), np.int64), np.full((len(batch), width), -1, np.int64)
        for i, (_, x, y) in enumerate(batch):
            idx[i, :len(x)], targets[i, :len(y)] = x, y
        yield [key for key, _, _ in batch], idx, targets


def deal(docs, slices=SLICES):
    """The slice of every document: each source spread evenly over all slices, in an order fixed for ever."""
    order = np.random.default_rng(0).permutation(len(docs))
    part = np.zeros(len(docs), np.int64)
    for source in np.unique(docs['source']):
        mine = order[docs['source'][order] == source]
        part[mine] = np.arange(len(mine)) * slices // len(mine)
    return part


@torch.no_grad()
def document_nats(model, documents, max_tokens=8192):
    """{key: nats} from pairs of a key and a document's ids, BOS first, read in windows of block_size."""
    nats, rows, device = {}, [], next(model.parameters()).device
    for key, ids in documents:
        nats[key] = 0.0
        rows += [(key, x, y) for x, y in windows(ids, model.config.block_size)]
    for keys, idx, targets in batches(rows, max_tokens, model.config.block_size):
        idx, targets = torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)
        loss = model(idx, targets, reduction='none')
        for key, value in zip(keys, loss.double().sum(dim=1).tolist()):
            nats[key] += value
    return nats


def bits_per_byte(model, tokens, docs, slices=SLICES, max_tokens=8192, stop=None, rank=0, world=1,
                  reduce=lambda sums: sums, read=document_nats, further=()):
    """Bits per raw UTF-8 byte of a split, over its first `slices` of 1,024 stratified parts (by default all).

    tokens, docs: a split of prepare_data.open_data. model(idx, targets, reduction='none') gives nats a token.
    stop(), if given, is asked at every sixteenth of the way, and must answer alike on every rank; reduce adds
    an array over ranks. Each document is read from its BOS in windows of block_size; neither BOS nor the end
    of the document is counted. read, in the place of document_nats, may give several numbers a document, of
    which the first counts; the others make a bpb_<name> each, of the names in `further`.

    Returns bpb, two standard errors: `error`, how far it may be from that of the whole split (which has 0),
    and `text_error`, the split's documents being a sample of such text; loss, share of bytes, tokens, and per
    source index bpb and text_error (where there are documents for one); `asked`, the share of `slices` that
    were read, where stop() ended it.
    """
    group, asked = -(-slices // 16) if stop else slices, 1.0
    part, n_sources = deal(docs), int(docs['source'].max()) + 1
    ends = np.append(docs['start'][1:], len(tokens))
    sums = np.zeros((n_sources, 7 + len(further)))    # documents, bytes, bits, bytes^2, bits^2, both, tokens
    for first in range(0, slices, group):
        if first and stop():
            asked = first / slices
            break
        mine = np.flatnonzero((part >= first) & (part < min(first + group, slices)))[rank::world]
        texts = ((doc, tokens[docs['start'][doc]:ends[doc]]) for doc in mine.tolist())
        add = np.zeros_like(sums)
        for doc, nats in read(model, texts, max_tokens).items():
            n, (bits, *more) = float(docs['bytes'][doc]), np.atleast_1d(nats) / math.log(2)
            n_tokens = ends[doc] - docs['start'][doc] - 1
            add[docs['source'][doc]] += [1, n, bits, n * n, bits * bits, n * bits, n_tokens, *more]
        sums += reduce(add)
    weight = np.bincount(docs['source'], weights=docs['bytes'], minlength=n_sources)
    count, n, bits, nn, bb, nb, n_tokens, *more = sums.T
    seen = n > 0
    per_source = np.divide(bits, n, out=np.zeros_like(bits), where=seen)
    # variance of a ratio estimate, stratified by source, with the correction for a finite population
    spread = (bb - 2 * per_source * nb + per_source ** 2 * nn) / np.maximum(count - 1, 1) * count
    fraction = np.divide(n, weight, out=np.ones_like(n), where=weight > 0)
    text_error = np.sqrt(np.maximum(spread, 0)) / np.maximum(n, 1)
    error = text_error * np.sqrt(np.maximum(1 - fraction, 0))
    weight = weight * seen / (weight * seen).sum()
    error, of_all = (float(np.sqrt(((weight * e) ** 2).sum())) for e in (error, text_error))
    return dict(bpb=float((weight * per_source).sum()), error=error, text_error=of_all,
                loss=float(bits.sum() * math.log(2) / n_tokens.sum()),
                share=float(n.sum() / docs['bytes'].sum()), tokens=int(n_tokens.sum()),
                per_source={int(i): float(per_source[i]) for i in np.flatnonzero(seen)},
                per_source_error={int(i): float(text_error[i]) for i in np.flatnonzero(count > 1)},
                **(dict(asked=asked) if asked < 1 else {}),
                **{f'bpb_{k}': float((weight * x / np.maximum(n, 1)).sum()) for k, x in zip(further, more)})


# ---- evaluation sets: items of a context and options, of which the first is right, tokenized once ----------

BLIMP = 'https://github.com/alexwarstadt/blimp/archive/refs/heads/master.tar.gz'
PHENOMENA = {'s-selection': 'argument_structure'}   # in BLiMP's paper; apart in its files: 12 fields, not 13
FORMS = ('sentence_good and sentence_bad; context, good and bad; input_prefix and options; sentence1, '
         'sentence2 and label; sentence with a line an option, and label; prompt and answer')


def eval_item(row, kind):
    """dict(kind, field, context, options) of a row, the right option first; ValueError, KeyError, TypeError,
    AttributeError or IndexError if it is none. Knows the fields of BLiMP (Warstadt 2020, 1912.00582), other
    pairs, entity tracking (Kim 2023, 2305.02363), COPA, ARC and LAMBADA (Paperno 2016, 1606.06031).
    """
    context, right = row.get('context', ''), row.get('label', 0)
    match row:
        case {'sentence_good': good, 'sentence_bad': bad} | {'good': good, 'bad': bad}:
            options, right = [good, bad], 0
        case {'sentence1': one, 'sentence2': two, 'label': _}:
            options = [one, two]
        case {'sentence': text, 'label': label}:
            context, *lines = re.split(r'\n(?=[A-Z0-9]: )', text)
            right = [line[0] for line in lines].index(label)
            options = [line[2:] for line in lines]               # the space stays: ' a metal'
        case {'prompt': text, 'answer': answer}:
            context, options = text.split('{answer}')[0].rstrip(), [f' {answer}']
        case _:
            context, options = row.get('input_prefix', context), row['options'] + []     # a list, not text
    options.insert(0, options.pop(right))
    ''.join([context, *options]).encode()                        # half a surrogate pair is no character
    if right < 0 or not all(map(str.strip, options)) or len(options) == 1 and 'answer' not in row:
        raise ValueError
    steps = f'_{row["numops"]}_ops' if 'numops' in row else ''   # entity tracking: how often something moved
    kind, field = row.get('kind') or row.get('UID') or kind + steps, str(row.get('linguistics_term', ''))
    return dict(kind=str(kind), field=PHENOMENA.get(field, field), context=context, options=options)


def eval_files(folder, own=None):
    """{name: path} of a folder's evaluation sets, and 'coherence', the pairs of a data set's own folder."""
    found = {'coherence': Path(own) / 'pairs.jsonl'} if own and (Path(own) / 'pairs.jsonl').exists() else {}
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else ():
        if re.search(r'\.(jsonl|tar)(\.\w+)?$', path.name) or path.is_dir() and any(path.glob('*.jsonl')):
            found[path.name.split('.')[0]] = path
    return found


def read_items(path):
    """Items of a .jsonl file, a folder or a tar of them (.gz, .xz), and the places of lines that are none."""
    path, files, items, bad = Path(path), [], [], []
    try:
        if '.tar' in path.suffixes:
            with tarfile.open(path) as tar:
                files = [(m.name, tar.extractfile(m).read()) for m in tar
                         if m.isfile() and m.name.endswith('.jsonl')]
        elif path.is_dir():
            files = [(p.name, p.read_bytes()) for p in sorted(path.glob('*.jsonl'))]
        else:
            with open(path, 'rb') as raw:
                files = [(path.name, prepare_data.open_source(raw, path.name).read())]
    except (OSError, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as e:
        raise UserError(f'{path} cannot be read ({type(e).__name__}: {e}): give .jsonl, a folder or a tar of '
                        f'them') from e
    for name, text in files:
        for number, line in enumerate(text.split(b'\n'), 1):
            try:
                if line.strip():
                    items.append(eval_item(json.loads(line), Path(name).name.split('.')[0]))
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
                bad.append(f'{name} line {number:,}')
    if not items:
        raise UserError(f'{path} holds no items of an evaluation: give .jsonl lines with {FORMS}')
    if len({len(item['options']) == 1 for item in items}) == 2:
        raise UserError(f'{path} mixes last words and choices: give them in files of their own')
    return items, bad


def tokenize_items(items, tokenizer):
    """Arrays: ids of all options, each BOS, context and option; start (options + 1,) of each in ids; item
    (options,) it belongs to; seam and kind (items,): the first token that is scored, where options part (or
    end the context, if there is but one), and the index into kinds, fields. Any first part of the items holds
    every kind in proportion, neighbours in the file, such as mirrored pairs, together."""
    kinds = {item['kind']: item.get('field', '') for item in items}
    number = {kind: i for i, kind in enumerate(kinds)}
    kind = np.array([number[item['kind']] for item in items])
    place, dice = np.zeros(len(items)), np.random.default_rng(0)
    for i in range(len(kinds)):
        mine = np.flatnonzero(kind == i)
        couples = dice.permutation(-(-len(mine) // 2))[np.arange(len(mine)) // 2]
        place[mine] = (2 * couples + dice.random()) / len(mine)      # kinds in another order in every round
    order = np.argsort(place, kind='stable')
    items = [items[i] for i in order]
    rows = tokenizer.encode_batch([item['context'] + o for item in items for o in item['options']])
    contexts = tokenizer.encode_batch([i['context'] for i in items]) if len(rows) == len(items) else ()
    owner, seam = np.repeat(np.arange(len(items)), [len(item['options']) for item in items]), []
    for i, first in enumerate(np.searchsorted(owner, np.arange(len(items)))):
        texts = [contexts[i], rows[i]] if len(contexts) else rows[first:first + len(items[i]['options'])]
        least = min(map(len, texts))
        apart = np.flatnonzero((np.array([text[:least] for text in texts]) != texts[0][:least]).any(axis=0))
        seam.append(1 + (apart[0] if len(apart) else least))
    rows = [np.append(np.uint32(tokenizer.bos), row) for row in rows]
    return dict(ids=np.concatenate(rows).astype(np.uint32), start=np.cumsum([0, *map(len, rows)]), item=owner,
                seam=np.array(seam), kind=kind[order], kinds=np.array([*kinds]),
                fields=np.array([*kinds.values()]), order=order)


def eval_set(path, tokenizer, cache=None):
    """tokenize_items of an evaluation file, and left_out, the places of lines that are no item. With a folder
    to cache them in, they are read from there the next time, unless the file or the tokenizer changed."""
    path = Path(path)
    digest = hashlib.sha256(f'items 2 {path.name}'.encode() + tokenizer.blob)
    if not path.exists():
        raise UserError(f'{path} does not exist: name an evaluation file, a folder or a tar of them')
    try:
        for file in [path] if path.is_file() else sorted(path.glob('*.jsonl')):
            digest.update(file.name.encode() + file.read_bytes())
    except OSError as e:
        raise UserError(f'{path} cannot be read ({e}): give .jsonl, a folder or a tar of them') from e
    lasts = path.is_file() or path.is_dir()                      # a pipe gives something else the next time
    kept = Path(cache) / f'{path.name.split(".")[0]}.npz' if cache and lasts else None
    try:
        with np.load(kept) as arrays:                            # no pickles: allow_pickle is off by default
            if str(arrays['digest']) == digest.hexdigest():
                return dict(arrays)
    except (OSError, TypeError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass                                                     # none yet, or a damaged one: made again
    items, bad = read_items(path)
    made = tokenize_items(items, tokenizer)
    made |= dict(left_out=np.array(bad), digest=np.array(digest.hexdigest()))
    if kept:
        try:
            kept.parent.mkdir(exist_ok=True)
            beside = kept.with_suffix(f'.{os.getpid()}.part')
            with open(beside, 'wb') as f:
                np.savez(f, **made)
            os.replace(beside, kept)
        except OSError:
            pass                                                 # a read-only folder costs seconds, no more
    return made


def fetch_evals(folder):
    """BLiMP, into a folder of evaluation sets that is yet to be made."""
    if not Path(folder).exists():
        print(f'{folder} is missing: BLiMP is fetched to it', flush=True)
        with tempfile.TemporaryDirectory() as beside:
            prepare_data.download(BLIMP, Path(beside) / 'blimp.tar.gz')
            Path(folder).mkdir(parents=True)
            shutil.move(Path(beside) / 'blimp.tar.gz', folder)


def prepare_evals(folder, names, evals):
    """Tokenizes evaluation sets for a prepared data set and says what they hold; for 'all' fetches BLiMP."""
    data = prepare_data.open_data(folder)
    if names == 'all':
        fetch_evals(evals)
    measure = Measure(SimpleNamespace(evals=names, eval_data=evals), data.tokenizer, data)
    if not measure.sets:
        raise UserError(f'{evals} holds no evaluation sets: put .jsonl files, folders or tars of them there')
    for name, items in measure.sets.items():
        n, kinds, tokens = (len(items[key]) for key in ('seam', 'kinds', 'ids'))
        print(f'{name}: {n:,} items, {kinds} kinds, {tokens:,} tokens')


# ---- measuring ---------------------------------------------------------------------------------------------

@contextlib.contextmanager
def exactly(model):
    """Computes in float32, by PyTorch alone: in bfloat16 sentences of nearly equal probability would tie."""
    dtype, precision, kernels = model.compute_dtype, torch.get_float32_matmul_precision(), set(IN_USE)
    model.compute_dtype = torch.float32
    torch.set_float32_matmul_precision('highest')
    IN_USE.clear()
    try:
        yield
    finally:
        model.compute_dtype = dtype
        torch.set_float32_matmul_precision(precision)
        IN_USE.update(kernels)


def option_rows(items, low, high, bos, block_size):
    """(number, input, target) of the windows that hold what is scored of options low to high of eval_set."""
    rows = []
    for i, seam in enumerate(items['seam'][items['item'][low:high]]):
        ids = items['ids'][items['start'][low + i]:items['start'][low + i + 1]].astype(np.int64)
        x, y = ids[:-1], ids[1:].copy()
        y[:seam - 1] = -1
        x, y = (ids[0 if bos else 1:] for ids in (x, y))
        for end in range(len(x), max(0, seam - 2 + bos), -block_size):      # windows, the last one whole
            rows.append((i, x[max(0, end - block_size):end], y[max(0, end - block_size):end]))
    return rows


def accuracy(cost, items):
    """Share of items whose first option is likelier than every other; a tie is wrong. The mean over kinds.

    cost: of Measure.option_costs. Returns accuracy, its standard error (each kind's as if two more items had
    been one right, one wrong: never 0), chance (0 for a last word), shortest (what an untrained model tends
    to: to take the option of the fewest tokens), items, ties, accuracy per kind and per field.
    """
    first = np.searchsorted(items['item'][:len(cost)], np.arange(items['item'][len(cost) - 1] + 1))
    n_options, others = np.diff(first, append=len(cost)), cost.copy()
    others[first] = np.inf
    rival = np.where(n_options > 1, np.minimum.reduceat(others, first), 1)     # a last word: none as likely
    right, ties = cost[first] < rival, (cost[first] == rival) & (n_options > 1)
    length = np.diff(items['start'])[:len(cost)]
    least = length == np.repeat(np.minimum.reduceat(length, first), n_options)
    short = np.where(n_options > 1, least[first] / np.add.reduceat(least, first, dtype=float), 0)
    kind, names = items['kind'][:len(first)], items['kinds'].tolist()
    n = np.bincount(kind, minlength=len(names))
    seen, hits = n > 0, np.bincount(kind, right, len(names))

    def over_kinds(values):
        return float((np.bincount(kind, values, len(names)) / np.maximum(n, 1))[seen].mean())
    share, smooth = hits / np.maximum(n, 1), (hits + 1) / (n + 2)
    error = np.sqrt((smooth * (1 - smooth) / np.maximum(n, 1))[seen].sum()) / seen.sum()
    fields = {f: float(share[seen & (items['fields'] == f)].mean())
              for f in sorted({*items['fields'][seen].tolist()} - {''})}
    return dict(accuracy=float(share[seen].mean()), error=float(error),
                chance=over_kinds(np.where(n_options > 1, 1 / n_options, 0)), shortest=over_kinds(short),
                items=len(first), ties=int(ties.sum()),
                per_kind={names[i]: float(share[i]) for i in np.flatnonzero(seen)}, per_field=fields)


def interval(p, error, n):
    """95 % of a share p of n items, by Wilson (1927): as if of so many that its standard error is this."""
    smooth = (p * n + 1) / (n + 2)
    n = smooth * (1 - smooth) / error ** 2 if error else n
    middle, half = p + 1.92 / n, 1.96 * math.sqrt(p * (1 - p) / n + 0.96 / n ** 2)
    return max(0.0, (middle - half) / (1 + 3.84 / n)), min(1.0, (middle + half) / (1 + 3.84 / n))


def share_error(p, n):
    """Standard error of a share p of n, as if two more had been one right, one wrong: never 0."""
    smooth = (p * n + 1) / (n + 2)
    return math.sqrt(smooth * (1 - smooth) / n)


class Measure:
    """What is measured of a model, and how it is asked: a seam.

    s: settings, whose evals are names, commas between: of known(), of files in eval_data, or files; 'all' of
    them; '' is the data's own pairs and what ideas know. They become sets, {name: items of eval_set}, and
    named, those of known(). data: of prepare_data.open_data; run: the folder of a finished run.

    known(): {name: measure}. measure(model, n, stop) measures n items (0: as many as there are) and returns a
    dict for result.json, with accuracy, error, chance, items if it is an ability. It asks stop() on the way,
    and then ends with what it has: its `share` of what was asked, or None where that is nothing.
    """
    bos = True               # begins every text, as in training; without it the first token is not scored, as
                             # the BabyLM challenge has it for causal models
    further = ()             # names of what `read` gives beside the nats that count

    def __init__(self, s, tokenizer, data=None, say=print, run=None):
        self.s, self.tokenizer, self.data, self.say, self.run = s, tokenizer, data, say, run
        self.folder, self.sets, self.named = Path(s.eval_data), {}, []
        files, known = self.files(), self.known()
        if taken := files.keys() & known.keys():
            raise UserError(f'{files[taken.pop()]} has the name of another evaluation: rename it')
        if s.evals == 'all' and not self.folder.is_dir():
            say(f'there is no folder {self.folder}: no evaluation sets from there')
        wanted = [*files, *known] if s.evals == 'all' else [name for name in s.evals.split(',') if name]
        if not s.evals:
            wanted = [*files.keys() & {'coherence'}, *(name for name in known if name != 'bpb')]
        for name in dict.fromkeys(wanted):
            try:
                self.open(name, files)
            except UserError as e:
                if s.evals != 'all':
                    raise
                say(f'left out: {e}')

    def known(self):
        """{name: measure} of what is no set of items."""
        return dict(bpb=lambda model, n, stop: self.bpb(model, stop=stop))

    def files(self):
        """{name: path} of the evaluation sets that there are."""
        return eval_files(self.folder, self.data and self.data.folder)

    def open(self, name, files):
        """Makes ready what a name stands for; UserError where that cannot be."""
        if name in self.known():
            return self.named.append(name)
        path = files.get(name, Path(name))
        if not path.exists():
            raise UserError(f'{name} is no evaluation and no file: put it into {self.folder}, or name some '
                            f'of {", ".join([*self.known(), *files])}')
        name = name if name in files else path.name.split('.')[0]
        items = self.sets[name] = eval_set(path, self.tokenizer, self.data and self.data.folder / 'eval')
        if n := len(bad := items['left_out']):
            self.say(f'{name}: left out {n:,} line{"s" * (n > 1)} without an item, the first is {bad[0]}')

    # what it costs

    def tokens_of(self, counts):
        """Tokens, more or less, in the first counts[name] items of evaluation sets."""
        return sum(len(self.sets[name]['ids']) * n / len(self.sets[name]['seam'])
                   for name, n in counts.items())

    def affordable(self, most, tokens):
        """{name: items} of all evaluation sets, at most `most`, so many tokens in all; 20 items at least."""
        counts = {name: min(most, len(items['seam'])) for name, items in self.sets.items()}
        share = min(1.0, tokens / max(1, self.tokens_of(counts)))
        return {name: min(n, max(20, int(share * n))) for name, n in counts.items()}

    def seconds(self, name, token_seconds):
        """What an item of a known measure takes, token_seconds being a written token's; 0 if it has none."""
        return 0.0

    def plan(self, seconds, token_seconds, most=256):
        """{name: (items, their seconds)} of the known measures named, each in so many seconds at most."""
        each = {name: self.seconds(name, token_seconds) for name in self.named if name != 'bpb'}
        counts = {name: min(most, int(seconds / cost)) if cost else 0 for name, cost in each.items()}
        return {name: (n, n * each[name]) for name, n in counts.items() if n or not each[name]}

    # asking

    def ask(self, model, counts, stop=None):
        """Yields (name, result) of so many items of each set and known measure, until stop()."""
        for name, n in counts.items():
            if stop and stop():
                return
            try:
                if name in self.sets:
                    yield name, self.judge(model, name, n, stop=stop)
                elif result := self.other(name, model, n, stop):
                    yield name, result
            except (UserError, FloatingPointError) as e:
                self.say(f'left out: {e}')         # what else is measured is worth more

    def other(self, name, model, n=0, stop=None):
        """What a known measure returns."""
        return self.known()[name](model, n, stop)

    def bpb(self, model, slices=SLICES, max_tokens=8192, stop=None, rank=0, world=1, reduce=lambda x: x):
        """bits_per_byte of the validation split, its sources named."""
        if self.data is None:
            raise UserError('bpb, as the data of the run is not there')
        tokens, docs = self.data.tokens['val'], self.data.docs['val']
        result = bits_per_byte(model, tokens, docs, slices, max_tokens, stop, rank, world, reduce, self.read,
                               self.further)
        return result | {key: {self.data.meta['sources'][i]: v for i, v in result[key].items()}
                         for key in ('per_source', 'per_source_error')}

    def read(self, model, texts, max_tokens):
        """document_nats of validation documents by their number; with `further` arrays, the first counts."""
        return document_nats(model, texts, max_tokens)

    def judge(self, model, name, n=None, max_tokens=8192, stop=None):
        """The verdict on the first n items of an evaluation set, or on all; with stop() at least on the first
        sixteenth of them, or what is read at once if that is more."""
        items, costs = self.sets[name], []
        total = len(items['seam'])
        n = min(n or total, total)
        part = max(-(-n // 16), -(-max_tokens * total // len(items['ids']))) if stop else n
        for first in range(0, n, part):
            if first and stop():
                break
            costs.append(self.option_costs(model, items, first, min(first + part, n), max_tokens))
        result = self.verdict(np.concatenate(costs), items)
        return result | (dict(share=result['items'] / n) if result['items'] < n else {})

    def verdict(self, cost, items):
        """What is said of an evaluation set's first options, by what each costs."""
        return accuracy(cost, items)

    @torch.no_grad()
    def option_costs(self, model, items, first=0, last=None, max_tokens=8192):
        """(options,) of the items from first to last of eval_set: nats of an option's tokens, their sum.

        What all options of an item share cancels and is left out; of a last word it is the number of tokens
        that are at least as likely as its own.
        """
        device, block_size = next(model.parameters()).device, model.config.block_size
        alone = len(items['item']) == len(items['seam'])
        low, high = np.searchsorted(items['item'], [first, len(items['seam']) if last is None else last])
        rows, cost = option_rows(items, low, high, self.bos, block_size), np.zeros(high - low)
        with exactly(model):
            for keys, idx, targets in batches(rows, max_tokens, block_size, step=1):
                idx, targets = torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)
                one = self.as_likely(model, idx, targets) if alone else model(idx, targets, reduction='none')
                np.add.at(cost, keys, one.double().sum(dim=1).cpu().numpy())
        return cost

    def as_likely(self, model, idx, targets):
        """(B, T): how many other tokens are at least as likely as the target; 0 where target < 0."""
        count, asked = torch.zeros_like(targets), targets >= 0
        z = model.logits(self.states(model, idx, asked)[asked])
        below = z < z.gather(1, targets[asked][:, None])    # nothing is, where the model gives no numbers
        count[asked] = (~below).sum(dim=1) - 1
        return count

    def states(self, model, idx, asked):
        """Final hidden states (B, T, C) of texts; asked (B, T): the places after which a token is judged."""
        return model.trunk(idx)

    def rows(self, model):
        """How many texts are written at once."""
        return 32

    # saying

    def lines(self, name, result):
        """What is printed of a result: of an accuracy a row of a table and its parts, else a line a thing."""
        if 'accuracy' not in result:
            for key, value in result.items():
                parts = value.items() if isinstance(value, dict) else [('', v) for v in np.ravel(value)]
                yield f'{name} {key}: ' + ', '.join(f'{part} {v:.6g}'.strip() for part, v in parts)
            return
        low, high = interval(result['accuracy'], result['error'], result['items'])
        chance = '-' if result['chance'] is None else f'{result["chance"]:.4f}'
        shortest = f'{result["shortest"]:.4f}' if 'shortest' in result else '-'
        yield (f'{name:24} {result["accuracy"]:8.4f}   {low:.4f} to {high:.4f} {chance:>8} {shortest:>10} '
               f'{result["items"]:8,} {result.get("ties", 0):6,}')
        parts, real = result.get('per_field') or result.get('per_kind', {}), result.get('held_out')
        for part, share in sorted(parts.items(), key=lambda item: item[1]) if 1 < len(parts) < 21 else ():
            yield f'  {part:22} {share:8.4f}' + (f'   held-out text {real[part]:.4f}' if real else '')

    def line(self, name, result):
        """The same in a line of a run's report."""
        if 'accuracy' not in result:
            return '; '.join(self.lines(name, result))
        more = {k: v for k, v in result.items() if type(v) in (int, float)}
        kinds = ', '.join(f'{k} {v:.3f}' for k, v in (result.get('per_field') or result['per_kind']).items())
        p, error, n = (more.pop(key) for key in ('accuracy', 'error', 'items'))
        more = ''.join(f', {k} {v:,}' if type(v) is int else f', {k} {v:.4g}' for k, v in more.items())
        return f'{name}: {p:.4f} +- {error:.4f} on {n:,} items{more} ({kinds})'


# ---- the machine, and the energy that it takes ---------------------------------------------------------------

# Dense bf16 peak with fp32 accumulation, TFLOP/s, from the makers' data sheets; a card not here gets no MFU.
PEAK_TFLOPS = {'RTX 4090': 165.2, 'RTX 3090': 71.2, 'RTX 5090': 209.5, 'L40S': 362.1, 'L4': 121.0,
               'A10G': 70.0, 'A100': 311.9, 'H100 PCIe': 756.4, 'H100 NVL': 835.5, 'H100': 989.4,
               'H200 NVL': 835.5, 'H200': 989.4}


def peak_flops(name):
    exact = (v for k, v in PEAK_TFLOPS.items() if re.search(rf'\b{k}\b(?! (Laptop|D\b))', name))  # no 4090 D
    return next((1e12 * v for v in exact), None)


def proc(name):
    """The text of a file of Linux's /proc; empty elsewhere."""
    try:
        return Path('/proc', name).read_text()
    except OSError:
        return ''


def unusable_card():
    """Why torch cannot use the NVIDIA card that is here, and what mends it; '' if there is none, or it is hidden.

    A build for CUDA 13 needs driver 580, one for CUDA 12 needs 525; of torch 2.12 and later there are CUDA
    12.6 and 13, before that 12.8 too, which the RTX 50 needs under driver 570.
    """
    driver = re.search(r'\s(\d{3})\.\d[\d.]*', proc('driver/nvidia/version'))
    hidden = os.environ.get('CUDA_VISIBLE_DEVICES', '0').strip() in ('', '-1')
    if not driver or hidden or not glob.glob('/dev/nvidia[0-9]*'):
        return ''
    version, cuda = int(driver[1]), torch.version.cuda
    build = ('torch' if version >= 580 else '"torch<2.12" --index-url https://download.pytorch.org/whl/cu128'
             if version >= 570 else 'torch --index-url https://download.pytorch.org/whl/cu126')
    needs = f'a build for CUDA {cuda}, which needs driver {580 if cuda >= "13" else 525}' if cuda else 'a build without CUDA'
    return (f'a card with driver {driver[0].strip()} is here, and torch {torch.__version__} is {needs}: pip uninstall -y '
            f'torch triton, then pip install {build}' + ', or a newer driver' * (version < 580))


def hardware(device):
    """The name of what computes here."""
    if device == 'cuda':
        return torch.cuda.get_device_name()
    model = re.search(r'^model name\s*: *([^:\n]*[^:\s])', proc('cpuinfo'), re.M)
    name = model[1] if model else platform.processor() or platform.machine()
    return f'{name}, {torch.get_num_threads()} threads'


def peak_memory_gb(device):
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if resource is None:
        return math.nan
    unit = 2 ** 30 if sys.platform == 'darwin' else 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def git_commit():
    try:
        run = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=Path(__file__).parent,
                             capture_output=True, text=True, timeout=5)
        return run.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


# Grams of CO2e a kWh, as codecarbon 3 has them: the world's by the IEA (2019), a country's of 2023.
GRID = dict(world=475, CA=170, CH=35, CN=582, DE=381, FR=56, IN=713, NO=30, PL=662, SE=41, UK=238, US=369)
# Watts of a board by its maker's data sheet, where no counter can be read; of others, 350.
BOARD_WATTS = {'RTX 4090': 450, 'RTX 5090': 575, 'L40S': 350, 'L4': 72, 'A10G': 150, 'A100': 400,
               'H100 PCIe': 350, 'H100 NVL': 400, 'H100': 700, 'H200 NVL': 600, 'H200': 700}
ACTIVITIES, DEVICES = ('train', 'eval', 'idle'), ('gpu', 'cpu', 'ram')


def grid(country):
    """Grams of CO2e a kWh: of a country in GRID, or the number given in its place; None if it is neither."""
    return GRID.get(country) or (float(country) if re.fullmatch(r'\d+(\.\d+)?', country) else None)


def integral(watts, since):
    """A function that gives joules since then: each reading of watts() stands for the time since the last."""
    joules = 0.0

    def read():
        nonlocal joules, since
        now = time.monotonic()
        joules, since = joules + watts() * (now - since), now
        return joules
    return read


def card_joules(card, since, nvml=None):
    """What reads the joules of a card (torch's properties of it), and how: the driver's NVML if it can."""
    handle, value = ctypes.c_void_p(), ctypes.c_ulonglong()

    def reading(what):
        getattr(nvml, what)(handle, ctypes.byref(value))      # should it fail: the number before
        return value.value / 1000                             # of mJ or mW
    try:
        nvml = nvml or ctypes.CDLL('libnvidia-ml.so.1')
        nvml.nvmlInit_v2()
        nvml.nvmlDeviceGetHandleByUUID(f'GPU-{card.uuid}'.encode(), ctypes.byref(handle))
        if first := handle and reading('nvmlDeviceGetTotalEnergyConsumption'):
            return (lambda: reading('nvmlDeviceGetTotalEnergyConsumption') - first,
                    'measured (NVML counter of the whole card)')
        if handle and reading('nvmlDeviceGetPowerUsage'):
            return (integral(lambda: reading('nvmlDeviceGetPowerUsage'), time.monotonic()),
                    'measured (NVML power of the whole card, every second)')
    except (OSError, AttributeError):           # no driver, or one that lacks the function
        pass
    watts = next((w for name, w in BOARD_WATTS.items() if name in card.name), 350)
    return integral(lambda: watts, since), f"estimated (the board's {watts} W x seconds, more than it takes)"


def cpu_joules(rapl):
    """What reads the joules of the CPU, and how: by RAPL's counters of whole packages if they can be read."""
    joules, last = 0.0, {}

    def read():
        nonlocal joules
        for zone in zones:
            now = int((zone / 'energy_uj').read_text())
            wraps_at = int((zone / 'max_energy_range_uj').read_text())
            joules += (now - last.get(zone, now)) % wraps_at / 1e6
            last[zone] = now
        return joules
    try:
        zones = [zone for zone in Path(rapl).glob('intel-rapl:*')       # not core, dram, psys
                 if (zone / 'name').read_text().startswith('package')]
        read()
    except (OSError, ValueError):               # since 2020 for root alone, CVE-2020-8694
        zones = []
    if zones:
        return read, 'measured (RAPL of whole CPUs)'
    return lambda: 4 * sum(os.times()[:4]), 'estimated (4 W x CPU seconds of this run)'


def ram_watts(gib):
    """5 W a DIMM, at least two, somewhat less each from the fifth on; their number is guessed from GiB."""
    large = math.ceil(gib / 2 ** min(7, int(math.log2(max(gib, 8) / 8))))
    return float(np.interp(2 if gib <= 16 else 4 if gib <= 64 else 8 if gib <= 128 else min(32, large),
                           [0, 4, 8, 16, 32], [0, 20, 38, 70, 126]))


class Energy:
    """Joules of a process's card, CPU and RAM, by what it is busy with: turn(to) says with what from now on.

    joules (ACTIVITIES, DEVICES); how: where a device's numbers come from. device: what torch computes on;
    since: when the bill began, time.monotonic(); share: this process's part of its machine's CPUs and RAM.
    The estimates are codecarbon's (v3) for a CPU it does not know and for RAM: 4 W a thread of the CPU times
    the load that this process and its finished children are, which is 4 W x CPU seconds, however many threads
    a container shows. Counted is neither what else the machine takes (PUE 1) nor the making of it.
    """

    def __init__(self, device, since, share=1.0, nvml=None, rapl='/sys/class/powercap'):
        card = torch.cuda.get_device_properties(device) if str(device).startswith('cuda') else None
        gpu, how_gpu = card_joules(card, since, nvml) if card else (lambda: 0.0, 'not used')
        cpu, how_cpu = cpu_joules(rapl)
        try:
            gib = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2 ** 30
        except AttributeError:                  # Windows; as most have
            gib = 16
        watts = ram_watts(gib)
        self.how = dict(gpu=how_gpu, cpu=how_cpu, ram=f'estimated ({watts:g} W x seconds)')
        self.readers = gpu, cpu, integral(lambda: watts, since)
        self.shares = np.array([1.0, share if 'measured' in how_cpu else 1.0, share])
        self.joules, self.activity, self.lock = np.zeros((3, 3)), 'idle', threading.Lock()
        self.last = np.zeros(3)
        if 'measured' in how_gpu + how_cpu:     # counters must not wrap around, nor power change, unseen
            threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while True:
            self.read()
            time.sleep(1)

    def read(self):
        """joules until now."""
        with self.lock:
            now = np.array([read() for read in self.readers])
            self.joules[ACTIVITIES.index(self.activity)] += (now - self.last) * self.shares
            self.last = now
            return self.joules.copy()

    def mark(self):
        """Seconds, and joules (DEVICES) until then."""
        return [time.monotonic(), *self.read().sum(axis=0)]

    def turn(self, to):
        """Charge what follows to another activity; returns the one until now."""
        self.read()
        was, self.activity = self.activity, to
        return was


def energy_report(joules, how, country):
    """What a result says of joules (ACTIVITIES, DEVICES)."""
    total = float(joules.sum())
    return dict(joules=total, co2_g=total / 3.6e6 * grid(country), energy=dict(
        zip(ACTIVITIES + DEVICES, [*joules.sum(axis=1).tolist(), *joules.sum(axis=0).tolist()]),
        how=how, country=country, g_per_kwh=grid(country), pue=1.0, embodied='not counted'))


def say_cost(how, marks, tokens, args):
    """Print what generating cost between the last two of Energy's marks; before them, if three, it idled."""
    *idle, (seconds, *joules) = np.diff(marks, axis=0)
    per, total = 1000 / max(tokens, 1), sum(joules)
    print(f'energy: {total * per:.4g} J, {total * per / 3.6e6 * grid(args.country):.4g} g CO2e per 1,000 '
          f'generated tokens at batch size {args.samples} ({tokens:,} in {seconds:.1f} s with their prompts, '
          f'{grid(args.country):g} g/kWh)')
    for device, j in zip(DEVICES, joules):
        print(f'  {device}: {j * per:.4g} J {how[device]}')
    for rest, *watts in idle:
        above = total - sum(watts) * seconds / rest
        print(f'  above what the machine takes idle, {sum(watts) / rest:.1f} W: {above * per:.4g} J')
    if seconds < 30:
        print('  not to be trusted below 30 s: ask for more --samples or --max_new_tokens')


# ---- a server ----------------------------------------------------------------------------------------------

ROWS, WAITING, CONNECTIONS = 4, 32, 64      # answers made at once by a model, answers that may wait, sockets
BODY, TOKENS, PATIENCE = 65536, 2048, 20    # bytes of a request, tokens of an answer, seconds to send or take it
USUAL = dict(temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=1, max_tokens=256)


class Declined(Exception):
    """A request that is answered with a status and a sentence."""

    def __init__(self, status, sentence):
        super().__init__(sentence)
        self.status = status


def numbers_of(body, usual):
    """How tokens are drawn, by what a request says."""
    found = {}
    for name, (low, high) in (DRAWN | dict(seed=(0, 2 ** 63 - 1), max_tokens=(1, TOKENS))).items():
        value = usual[name] if body.get(name) is None else body[name]
        if type(value) not in (int, type(usual[name])) or not low <= value <= high:
            whole = 'whole ' * isinstance(usual[name], int)
            raise Declined(400, f'{name} must be a {whole}number from {low:g} to {high:g}')
        found[name] = value
    return SimpleNamespace(**found)


def field_of(body, name):
    """A field that must hold text, in characters that UTF-8 has."""
    text = body.get(name)
    if not isinstance(text, str):
        raise Declined(400, f'{name} must be text')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Declined(400, f'{name} has half of a surrogate pair, which is no character') from None
    return text


class Answer:
    """A continuation that is being made: its dice, and in `events` what its reader gets, a dict a token, at
    last one with `why` it ended."""

    def __init__(self, lane, ids, chosen, options):
        self.lane, self.prompt, self.options = lane, ids, options
        self.ids, self.made, self.stopped, self.events = [*ids, *chosen], 0, False, queue.SimpleQueue()
        self.dice = torch.Generator(device=lane.device).manual_seed(options.seed)
        self.ends = lane.tokenizer.ends
        self.decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self.decoder.decode(b''.join(map(lane.tokenizer.token_bytes, chosen)))
        self.began = time.monotonic()

    def draw(self, logits):
        """Takes one more token by logits (V,); True if it was the last."""
        ids = torch.tensor([self.ids[-self.lane.model.config.block_size:]], device=logits.device)
        new = sample_token(logits[None], generator=self.dice, before=ids, **drawn_by(self.options)).item()
        if new in self.ends:
            return self.end('end')
        self.ids.append(new)
        self.made += 1
        told = self.lane.told(logits.log_softmax(-1), new)
        self.events.put(told | dict(text=self.decoder.decode(self.lane.tokenizer.token_bytes(new))))
        return self.stopped and self.end('stopped') or self.made == self.options.max_tokens and self.end('length')

    def end(self, why):
        rest = self.decoder.decode(b'', final=True)
        seconds = max(time.monotonic() - self.began, 1e-9)
        self.events.put(dict(why=why, tokens=self.made, tok_per_sec=self.made / seconds, rest=rest))
        return True


class Lane:
    """A model that is served: up to ROWS answers side by side, each a row of one cache.

    A row's arithmetic does not know of the others, and there are always ROWS of them, or steps are compiled
    (GPT.compile_step), so an answer is the same whoever else is served.
    """

    def __init__(self, name, run):
        owner = next(c for c in type(run.model).__mro__ if 'generate' in vars(c))
        refuse(owner is not GPT, f'{name_of(owner)} generates in a way of its own, which the server does not know: '
               f'serve another run than {run.folder}')
        self.name, self.run, self.model, self.tokenizer = name, run, run.model, run.tokenizer
        self.device, self.waiting = run.model.wte.weight.device, collections.deque()
        alone = type(run.model).hints is not GPT.hints       # what it is told is of a prompt, not of a row
        self.rows, self.hints = [None] * (1 if alone else ROWS), {}
        self.read = [0] * len(self.rows)         # tokens that are in a row of the cache
        self.cache = KVCache(run.model, len(self.rows))
        self.cache.go_apart()
        self.made, self.tokens, self.seconds, self.joules = 0, 0, 0.0, 0.0     # made: since the desk was idle

    def told(self, logp, token, most=5):
        """What a reader is told of a token, by the model's own log-probabilities (V,)."""
        top, ids = logp.topk(min(most, len(logp)))
        others = [dict(id=i, text=self.tokenizer.decode([i]), p=math.exp(p)) for i, p in zip(ids.tolist(), top.tolist())]
        bits = -logp[token].item() / math.log(2)
        return dict(id=token, bits=bits, p=2 ** -bits, alternatives=others)

    def busy(self):
        return bool(self.waiting) or any(self.rows)

    @torch.no_grad()
    def step(self):
        """Lets waiting answers in, and gives every answer a token more."""
        began, size = time.monotonic(), self.model.config.block_size
        for row, answer in enumerate(self.rows):
            if answer is None and self.waiting:
                self.rows[row] = answer = self.waiting.popleft()
                self.take(row, answer, self.fill(row, answer.ids[-size:]))
        for row, answer in enumerate(self.rows):
            if answer is None:                   # it reads BOS at its start, over and over, and nobody hears it
                self.cache.clear(row)
            elif self.read[row] == size:         # the older half is forgotten, as in GPT.generate
                self.fill(row, answer.ids[-(size // 2):-1])
        if going := [(row, answer) for row, answer in enumerate(self.rows) if answer]:
            rows, cache, step = self.rows, self.cache, self.model.quick_step or self.model.step
            if self.model.quick_step and len(going) == 1:    # alone it is computed as beside others, and sooner
                (row, answer), = going
                rows, cache = [answer], cache.row(row)
            new = [[answer.ids[-1] if answer else self.tokenizer.bos] for answer in rows]
            logits = step(torch.tensor(new, device=self.device), cache, **self.hints)
            for row, answer in going:
                self.read[row] += 1
                self.take(row, answer, logits[rows.index(answer)])
        self.seconds += time.monotonic() - began

    def fill(self, row, ids):
        """A row of the cache reads ids from the start; the logits (V,) of what follows."""
        one, idx = KVCache(self.model, 1), torch.tensor([ids], device=self.device)
        self.hints, self.read[row] = self.model.hints(idx), len(ids)
        logits = self.model.step(idx, one, **self.hints)
        self.cache.take(row, one)
        return logits[0]

    def take(self, row, answer, logits):
        try:
            ended = answer.stopped and answer.end('stopped') or answer.draw(logits)
        except FloatingPointError as e:
            ended = answer.end(str(e))
        self.made += 1
        if ended:
            self.rows[row] = None

    @torch.no_grad()
    def known(self, x, y):
        """What is told of the tokens y (T,) that follow x (T,)."""
        idx = torch.from_numpy(x)[None].to(self.device)
        logits = self.model.logits(self.model.trunk(idx, **self.model.hints(idx)))[0]
        return [self.told(row.log_softmax(-1), token) for row, token in zip(logits, y.tolist())]


class Desk(threading.Thread):
    """The one thread that asks models: it goes round their lanes, a step each, and does what else is to be
    done with a model in between."""

    def __init__(self, lanes, energy):
        super().__init__(daemon=True)
        self.lanes, self.energy, self.jobs, self.news = {lane.name: lane for lane in lanes}, energy, queue.SimpleQueue(), threading.Event()
        self.start()

    def run(self):
        while True:
            self.news.wait()
            self.news.clear()
            before = self.energy.mark()
            while self.work():
                pass
            _, *spent = np.subtract(self.energy.mark(), before)
            made = max(1, sum(lane.made for lane in self.lanes.values()))
            for lane in self.lanes.values():
                lane.joules, lane.tokens, lane.made = lane.joules + sum(spent) * lane.made / made, lane.tokens + lane.made, 0

    def work(self):
        """One round; False when there was nothing to do."""
        busy = [lane for lane in self.lanes.values() if lane.busy()]
        for lane in busy:
            try:
                lane.step()
            except Exception as e:               # whatever it is, readers are told and the server lives on
                for answer in [*filter(None, lane.rows), *lane.waiting]:
                    answer.end(f'the model failed ({type(e).__name__})')
                lane.rows[:] = [None] * len(lane.rows)
                lane.waiting.clear()
        with contextlib.suppress(queue.Empty):
            work, done = self.jobs.get_nowait()
            busy.append(work)
            try:
                done.set_result(work())
            except Exception as e:
                done.set_exception(e)
        return bool(busy)

    def ask(self, work):
        """What work() returns, done between steps."""
        done = concurrent.futures.Future()
        self.jobs.put((work, done))
        self.news.set()
        return done.result()

    def begin(self, answer):
        lane = answer.lane
        if len(lane.waiting) >= WAITING:
            raise Declined(503, f'{WAITING} answers wait already: try again in a while')
        lane.waiting.append(answer)
        self.news.set()
        return answer


def about(lane, run, country):
    """What /api/models says of a model."""
    result = run.folder / 'result.json'
    known = json.loads(result.read_text()) if result.exists() else {}
    tokens = lane.tokens + lane.made
    return dict(id=lane.name, about=run.model.describe(), params=run.model.params()['total'],
                minutes=known['total_seconds'] / 60 if known else None, val_bpb=known.get('val_bpb'),
                co2_g_per_1000=lane.joules / lane.tokens / 3.6e3 * grid(country) if lane.tokens else None,
                tok_per_sec=tokens / lane.seconds if tokens else None, block_size=run.model.config.block_size,
                chat=bool(run.tokenizer.roles), ideas=[name for name, _, named in run.state['ideas'] if named])


class Server(http.server.ThreadingHTTPServer):
    """Answers on a port; strangers get sentences. token: what a request must show, '' on loopback alone."""
    daemon_threads, request_queue_size = True, 64

    def __init__(self, host, port, lanes, energy, token, country):
        self.desk, self.token, self.country = Desk(lanes, energy), token, country
        self.open, self.reading = threading.BoundedSemaphore(CONNECTIONS), {}
        page, hashes = page_with_hashes('serve.html')
        self.page = page.encode()
        self.policy = '; '.join(["default-src 'none'", f"script-src {hashes}", f"style-src {hashes}", "connect-src 'self'",
                                 "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"])
        self.address_family = socket.AF_INET6 if ':' in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except OSError as e:
            raise UserError(f'{host} port {port} cannot be listened on ({e.strerror}): choose another --port or '
                            f'--host') from e
        self.names = None if token else {'localhost', '127.0.0.1', '[::1]'}     # that a browser may know it by

    def process_request(self, request, address):
        if not self.open.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.sendall(b'HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n')
            return self.shutdown_request(request)
        self.reading[request] = time.monotonic()
        super().process_request(request, address)

    def process_request_thread(self, request, address):
        try:
            super().process_request_thread(request, address)
        finally:
            self.reading.pop(request, None)
            self.open.release()

    def service_actions(self):
        """Twice a second: who has not sent a whole request by now sends it too slowly."""
        for request, since in [*self.reading.items()]:
            if time.monotonic() - since > PATIENCE:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, address):
        """Clients that go away, above all: nothing to tell."""


class Handler(http.server.BaseHTTPRequestHandler):
    """What is asked of a server, all in JSON but the page; what cannot be is {"error": sentence} with a 4xx.

    GET  /api/models    {models: [{id, about, params, minutes, val_bpb, co2_g_per_1000, tok_per_sec, block_size,
                        chat, ideas}], max_tokens}; null is not known
    POST /api/generate  {model, prompt or messages: [{role, content}], ids: chosen tokens to go on from, and what
                        USUAL names} -> server-sent events: `start` {prompt: tokens}; {id, text, bits, p,
                        alternatives: [{id, text, p}]} a token; `done` {why: end|length|stopped, tokens,
                        tok_per_sec, rest: what is left of a character} or `error` {error}. Who closes stops it.
    POST /api/score     {model, texts: [one or two]} -> {texts: [{bits, bytes, bpb, tokens}], prefers: 0|1|null}
    GET  /v1/models, POST /v1/completions, /v1/chat/completions: as OpenAI's clients expect, `stream` too

    bits and p are of the model's own distribution. Where there is a token: Authorization: Bearer <token>.
    """
    protocol_version, timeout, server_version, sys_version = 'HTTP/1.1', PATIENCE, 'halfhour', ''
    close_connection = True

    # -- what is asked

    def handle_one_request(self):
        super().handle_one_request()
        self.close_connection = True             # a request a connection: nothing of one can leak into the next

    def do_GET(self):
        self.answer({'/': self.front, '/api/models': self.models, '/v1/models': self.models_v1})

    def do_POST(self):
        self.answer({'/api/generate': self.generate, '/api/score': self.score, '/v1/completions': self.complete,
                     '/v1/chat/completions': self.complete})

    def answer(self, routes):
        self.begun = False
        try:
            self.check()
            if self.path not in routes:
                known = self.path in ('/', '/api/models', '/v1/models', '/api/generate', '/api/score',
                                      '/v1/completions', '/v1/chat/completions')
                raise Declined(405 if known else 404, 'this is not asked in this way' if known else 'there is no such page')
            if self.command == 'POST':
                self.body = self.read_body()
            self.server.reading.pop(self.request, None)
            routes[self.path]()
        except Declined as e:
            self.decline(e.status, str(e))
        except OSError:                          # the client went away
            pass
        except Exception as e:                   # of the model, whatever it be
            self.decline(500, f'the model failed ({type(e).__name__})')

    def check(self):
        """Refuses names that are not ours (a page elsewhere may have its own name point here), other pages'
        requests, and who does not know the token."""
        host, origin, names = self.headers.get('Host', ''), self.headers.get('Origin'), self.server.names
        if names and re.sub(r':\d+$', '', host) not in names:
            raise Declined(403, 'Host is not a name of this server: ask 127.0.0.1')
        if origin is not None and origin != f'http://{host}':
            raise Declined(403, 'Origin is another page: open this server\'s own')
        given = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if self.server.token and self.path != '/' and not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise Declined(401, 'Authorization must be "Bearer " and the token of this server')

    def read_body(self):
        kind, length = self.headers.get('Content-Type', ''), self.headers.get('Content-Length', '')
        if kind.partition(';')[0].strip().lower() != 'application/json':
            raise Declined(415, 'Content-Type must be application/json')
        if not re.fullmatch(r'\d{1,9}', length):
            raise Declined(411, 'Content-Length must be a number')
        if int(length) > BODY:
            raise Declined(413, f'a request may have {BODY} bytes at most')
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            raise Declined(400, 'the request ends before its Content-Length')
        try:
            body = json.loads(raw.decode(), parse_constant=float)
        except (ValueError, RecursionError):
            raise Declined(400, 'the body must be JSON in UTF-8') from None
        if not isinstance(body, dict):
            raise Declined(400, 'the body must be an object, {...}')
        return body

    # -- what is said

    def say(self, status, kind, body, **headers):
        self.begun = True
        self.send_response(status)
        for name, value in {'Content-Type': kind, 'Content-Length': len(body), 'X-Content-Type-Options': 'nosniff',
                            'Cross-Origin-Resource-Policy': 'same-origin', 'Referrer-Policy': 'no-referrer',
                            'Cache-Control': 'no-store', 'Connection': 'close', **headers}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def say_json(self, data, status=200):
        self.say(status, 'application/json', as_json(data).encode())

    def decline(self, status, sentence):
        if not self.begun:
            as_openai = self.path.startswith('/v1/')
            error = dict(message=sentence, type='invalid_request_error', param=None, code=None) if as_openai else sentence
            self.say_json(dict(error=error), status)

    def send_error(self, status, message=None, explain=None):
        """What http.server finds wrong with a request, said as all else is."""
        self.begun, self.path = False, getattr(self, 'path', '')
        with contextlib.suppress(OSError):
            self.decline(status, message or 'this is no request that the server knows')

    def log_message(self, *args):
        """Nothing is logged of what is asked."""

    def event(self, data, name=None):
        self.wfile.write((f'event: {name}\n' * bool(name) + f'data: {data if isinstance(data, str) else as_json(data)}\n\n').encode())

    # -- pages

    def front(self):
        self.say(200, 'text/html; charset=utf-8', self.server.page, **{'Content-Security-Policy': self.server.policy})

    def models(self):
        lanes = self.server.desk.lanes.values()
        self.say_json(dict(models=[about(lane, lane.run, self.server.country) for lane in lanes], max_tokens=TOKENS))

    def models_v1(self):
        self.say_json(dict(object='list', data=[dict(id=name, object='model', created=0, owned_by='halfhour')
                                                for name in self.server.desk.lanes]))

    def lane(self):
        name, lanes = self.body.get('model'), self.server.desk.lanes
        if not isinstance(name, str) or name not in lanes:
            raise Declined(404, f'model must be one of {", ".join(lanes)}')
        return lanes[name]

    def prompt(self, lane, chat):
        """Ids that an answer goes on from."""
        if not chat:
            return [lane.tokenizer.bos, *lane.tokenizer.encode(field_of(self.body, 'prompt'))]
        messages, roles = self.body['messages'], lane.tokenizer.roles
        if not roles:
            raise Declined(400, f'{lane.name} continues text and was not taught to chat: send a prompt')
        if not isinstance(messages, list) or not messages or not all(
                isinstance(m, dict) and m.get('role') in [*roles] and isinstance(m.get('content'), str) for m in messages):
            raise Declined(400, f'messages must be a list of {{role, content}}, role one of {", ".join(roles)}')
        return chat_ids(lane.tokenizer, [m | dict(content=field_of(m, 'content')) for m in messages])

    def generate(self):
        lane, chosen = self.lane(), self.body.get('ids') or []
        options, ids = numbers_of(self.body, USUAL), self.prompt(lane, 'messages' in self.body)
        if not isinstance(chosen, list) or len(chosen) > TOKENS or not all(
                type(i) is int and 0 <= i < lane.model.config.vocab_size for i in chosen):
            raise Declined(400, f'ids must be a list of at most {TOKENS} token ids')
        answer = self.server.desk.begin(Answer(lane, ids, chosen, options))
        self.say(200, 'text/event-stream', b'', **{'Content-Length': None})
        try:
            self.event(dict(prompt=[dict(id=i, text=lane.tokenizer.decode([i]), bits=None) for i in ids]), 'start')
            for told in self.events_of(answer):
                if 'why' not in told:
                    self.event(told)
                elif told['why'] in ('end', 'length', 'stopped'):
                    self.event(told, 'done')
                else:
                    self.event(dict(error=told['why']), 'error')
        finally:
            answer.stopped = True

    def events_of(self, answer):
        """What an answer tells; a client that has gone away is noticed between two events."""
        while True:
            try:
                told = answer.events.get(timeout=0.25)
            except queue.Empty:
                if self.gone():
                    raise ConnectionError from None
                continue
            yield told
            if 'why' in told:
                return
            if self.gone():
                raise ConnectionError

    def gone(self):
        """Whether the client has closed: it has nothing more to send."""
        ready, _, _ = select.select([self.connection], [], [], 0)
        return bool(ready) and self.connection.recv(1, socket.MSG_PEEK) == b''

    def score(self):
        lane, texts = self.lane(), self.body.get('texts')
        if not isinstance(texts, list) or not 1 <= len(texts) <= 2:
            raise Declined(400, 'texts must be a list of one or two texts')
        texts = [field_of(dict(texts=text), 'texts') for text in texts]
        found = [self.scored(lane, text) for text in texts]
        bits = [f['bits'] for f in found]
        apart = len(bits) == 2 and bits[0] != bits[1]
        self.say_json(dict(texts=found, prefers=int(bits[1] < bits[0]) if apart else None))

    def scored(self, lane, text):
        """Bits of a text from its BOS on, and what is told of each of its tokens; a window at a time, so that
        answers go on meanwhile."""
        ids, decoder = np.array([lane.tokenizer.bos, *lane.tokenizer.encode(text)]), codecs.getincrementaldecoder('utf-8')()
        told = [token for window in windows(ids, lane.model.config.block_size)
                for token in self.server.desk.ask(functools.partial(lane.known, *window))]
        told = [token | dict(text=decoder.decode(lane.tokenizer.token_bytes(token['id']))) for token in told]
        bits, n = sum(token['bits'] for token in told), len(text.encode())
        return dict(bits=bits, bytes=n, bpb=bits / max(n, 1), tokens=told)

    # -- as OpenAI's clients expect

    def complete(self):
        chat, lane, b = self.path == '/v1/chat/completions', self.lane(), dict(self.body)
        if chat and 'messages' not in b:
            raise Declined(400, 'messages must be a list of {role, content}')
        prompt = b.get('prompt', '')
        self.body['prompt'] = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
        stops = b.get('stop') or []
        stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
            raise Declined(400, 'stop must be a text or a list of four at most')
        if b.get('n') not in (None, 1):
            raise Declined(400, 'n must be 1')
        b['max_tokens'] = b.get('max_completion_tokens') or b.get('max_tokens')
        options = numbers_of(b, USUAL | dict(temperature=1.0, max_tokens=16 if not chat else 256))
        ids = self.prompt(lane, chat)
        answer = self.server.desk.begin(Answer(lane, ids, [], options))
        try:
            self.told_as_openai(answer, lane, chat, stops, b.get('stream') is True)
        finally:
            answer.stopped = True

    def told_as_openai(self, answer, lane, chat, stops, streaming):
        name = f'{"chatcmpl" if chat else "cmpl"}-{secrets.token_hex(8)}'
        head = dict(id=name, created=int(time.time()), model=lane.name)
        kind = ('chat.completion' + '.chunk' * streaming) if chat else 'text_completion'

        def piece(text, why=None):
            said = (dict(delta=dict(content=text) if text or not why else {}) if streaming else
                    dict(message=dict(role='assistant', content=text))) if chat else dict(text=text)
            return head | dict(object=kind, choices=[dict(index=0, logprobs=None, finish_reason=why) | said])
        if streaming:
            self.say(200, 'text/event-stream', b'', **{'Content-Length': None})
        text, sent, why = '', 0, None
        for told in self.events_of(answer):
            if 'why' in told and told['why'] not in ('end', 'length', 'stopped'):
                raise Declined(500, told['why'])
            text += told.get('text', told.get('rest', ''))
            found = [text.find(stop) for stop in stops if stop in text]
            if found:
                text, why = text[:min(found)], 'stop'
            elif 'why' in told:
                why = dict(end='stop', length='length').get(told['why'], 'stop')
            # what may be the beginning of a stop waits
            held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0) if not why else 0
            if streaming and len(text) - held > sent:
                self.event(piece(text[sent:len(text) - held]))
                sent = len(text) - held
            if why:
                break
        if streaming:
            self.event(piece('', why))
            return self.event('[DONE]')
        usage = dict(prompt_tokens=len(answer.prompt), completion_tokens=answer.made,
                     total_tokens=len(answer.prompt) + answer.made)
        self.say_json(piece(text, why) | dict(usage=usage))


def serve(args, of_ideas):
    """Answers requests until it is interrupted."""
    loopback = args.host in ('127.0.0.1', 'localhost', '::1')
    refuse(not loopback and not args.token, f'--host {args.host} lets others in: give a --token that they must know, '
           f'or leave --host away')
    lanes = []
    for folder in filter(None, (args.run, args.prompt)):
        run = open_run(folder, args.device, of_ideas)
        name = run.folder.absolute().name
        lanes.append(Lane(name if name not in [lane.name for lane in lanes] else f'{name} (2)', run))
        if args.compile:
            compile_for(run, 1, len(lanes[-1].rows))
    server = Server(args.host, args.port, lanes, Energy(args.device, time.monotonic()), args.token, args.country)
    host = f'[{args.host}]' if ':' in args.host else args.host
    print(f'{", ".join(lane.name for lane in lanes)}: http://{host}:{server.server_address[1]}/'
          + f'#{args.token}' * bool(args.token) + '  (Ctrl-C ends it)', flush=True)
    with server:
        server.serve_forever()


# ---- the command -------------------------------------------------------------------------------------------

def text_of(run):
    """The data set that a run was trained on, where it is there and has the run's vocabulary."""
    state, folder = run.state, Path(run.state['data'])
    data = prepare_data.open_data(folder) if (folder / 'meta.json').exists() else None
    if data and data.meta['tokenizer_sha256'] != state['tokenizer']:
        print(f'{folder} has been prepared again with another vocabulary: it is not used')
        data = None
    elif data and data.meta['fingerprint'] != state['fingerprint']:
        print(f'{folder} has been prepared again since: this is not the text that the run was measured on')
    return data


def evaluate(run, args):
    """Print what --eval names as it is measured; --json keeps all of it, each paradigm too."""
    results, data = {}, text_of(run)
    s = SimpleNamespace(**run.settings | dict(evals=args.eval, eval_data=args.eval_data))
    measure = run.ideas.seam(Measure)(s, run.tokenizer, data, run=run.folder)
    measure.bos, wanted = not args.no_bos, [*measure.sets, *measure.named]
    for name, result in measure.ask(run.model, dict.fromkeys(wanted, args.eval_items)):
        if 'accuracy' in result and not any('accuracy' in other for other in results.values()):
            print(f'{"task":24} accuracy    95 % interval     chance   shortest    items   ties')
        print(*measure.lines(name, result), sep='\n', flush=True)
        results[name] = result
    if args.json:
        try:
            Path(args.json).write_text(as_json(results, indent=1), encoding='utf-8')
        except OSError as e:
            raise UserError(f'{args.json} cannot be written ({e.strerror}): name another file') from e


def complete(model, tokenizer, prompt, args, generator, passages=None):
    """Print one streamed continuation, or args.samples made side by side; returns their tokens' number."""
    before = ()
    if passages:
        before = passages.before(prompt, args.passages, model.config.block_size, args.max_new_tokens)
    options = dict(max_new_tokens=args.max_new_tokens, generator=generator, **drawn_by(args))
    if args.samples == 1:
        print(prompt, end='', flush=True)
        pieces = stream(model, tokenizer, prompt, before=before, **options)
        for tokens, piece in enumerate(pieces):  # the last is no token
            print(piece, end='', flush=True)
        print()
        return tokens
    ids = [[tokenizer.bos, *before, *tokenizer.encode(prompt)]] * args.samples
    texts, _ = continuations(model, tokenizer, ids, **options, rows=args.samples)
    for number, ids in enumerate(texts, 1):
        print(f'--- {number}\n{prompt}{tokenizer.decode(ids)}')
    return sum(map(len, texts))


def complete_all(run, args, passages=None):
    """complete what is asked for, or chat; returns how many tokens that made."""
    model, tokenizer = run.model, run.tokenizer
    generator, place = torch.Generator(device=args.device).manual_seed(args.seed), args.file or 'the prompt'
    try:
        if args.chat:
            return chat(run, args, generator)
        prompts = [args.prompt]
        if args.file:                           # a line ends where an editor says so, not at a form feed
            with open(args.file, encoding='utf-8-sig') as f:
                prompts = [line.rstrip('\n') for line in f]
        elif args.interactive:
            prompts = iter(lambda: input('> '), '')
        return sum(complete(model, tokenizer, prompt, args, generator, passages) for prompt in prompts)
    except UnicodeError as e:
        raise UserError(f'{place} is not UTF-8 text ({e})') from e


def the_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='also: paths of configs, whose ideas take part, and --name=value of what ideas declare')
    add, whole = parser.add_argument, functools.partial(parser.add_argument, type=int)
    add('run', help='a folder that train.py wrote, or a checkpoint in it; with --eval a prepared data set')
    add('prompt', nargs='?', default='', help='what to continue; empty begins a document')
    add('--file', help='a text file with one prompt a line')
    add('--interactive', action='store_true', help='read prompts until an empty line')
    add('--chat', action='store_true', help='talk to a model that was taught to: to the prompt, or until an '
        'empty line')
    add('--retrieve', help='a folder of text files, whose passages that fit the prompt best go before it')
    whole('--passages', default=3, help='of --retrieve, at most')
    whole('--samples', default=1, help='continuations of each prompt, made in one batch')
    whole('--max_new_tokens', default=256)
    add('--temperature', type=float, default=0.8, help='0 takes the likeliest token always')
    whole('--top_k', default=0, help='only the k likeliest tokens; 0 is all')
    add('--top_p', type=float, default=1.0, help='only the likeliest that together hold this probability')
    add('--min_p', type=float, default=0.0, help='only what is at least so likely, of the likeliest')
    add('--repetition_penalty', type=float, default=1.0, help='above 1 what stands there already gets rarer')
    add('--compile', action='store_true', help='first compile what makes one token, a minute; then be quicker')
    add('--stats', action='store_true', help='say what 1,000 tokens take in energy, and the KV cache holds')
    add('--country', default='world',
        help=f'whose electricity it is, one of {", ".join(GRID)}, or grams of CO2e a kWh')
    whole('--seed', default=1)
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--eval', help="what to measure, commas between: 'all', bpb, what ideas measure, names of files in "
        '--eval_data, or files')
    add('--eval_data', default='data/eval', help='the folder of evaluation sets (data/eval)')
    whole('--eval_items', default=0, help='only so many items of each; 0 is all')
    add('--no_bos', action='store_true', help='score texts without the BOS of training')
    add('--json', help='a file that keeps what --eval measured')
    add('--serve', action='store_true', help='answer on a page, and programs, for one run or two')
    add('--host', default='127.0.0.1', help='the address to serve on; another than this machine needs --token')
    whole('--port', default=8000, help='0 takes one that is free')
    add('--token', default='', help='what requests to the server must show')
    add('--export', help=f'write the model into its folder in another format: {", ".join(verbs("export"))}')
    return parser


def read_options(argv):
    """What the command line says, and what of it is for ideas: paths of configs, --name=value of settings."""
    parser = the_options()
    options = parser._option_string_actions

    def of_ideas(arg):
        name, value, _ = arg.partition('=')
        return (arg.endswith('.py') and Path(arg).is_file()
                or value and re.fullmatch(r'--\w+', name) and not any(o.startswith(name) for o in options))
    args = parser.parse_intermixed_args([a for a in argv if not of_ideas(a)])  # the prompt may follow options
    for name in ('file', 'json', 'eval_data', 'eval', 'retrieve'):
        if value := getattr(args, name):
            setattr(args, name, at_home(value))
    for name, (low, high) in dict(samples=(1, 4096), passages=(1, 1000), max_new_tokens=(1, 10 ** 9), **DRAWN,
                                  seed=(0, 10 ** 18), eval_items=(0, 10 ** 9), port=(0, 65535)).items():
        if not low <= getattr(args, name) <= high:
            raise UserError(f'--{name} is {getattr(args, name)}, it must lie between {low} and {high}')
    if args.chat and (args.file or args.interactive or args.samples > 1 or args.eval):
        raise UserError('--chat answers what is typed, one answer each: leave --file, --interactive, '
                        '--samples and --eval away')
    if args.eval and args.stats:
        raise UserError('--stats says what a prompt takes, and --eval reads none: leave one away')
    if args.retrieve and (args.eval or args.export or not (args.prompt or args.file or args.interactive)):
        raise UserError('--retrieve finds what fits a prompt: give one, and neither --eval nor --export')
    if args.export is not None and args.export not in verbs('export'):
        raise UserError(f'--export is {args.export!r}, it must be one of {", ".join(verbs("export"))}')
    if args.export and (args.eval or args.stats or args.prompt or args.file or args.interactive or args.chat):
        raise UserError('--export writes a file and does nothing else: leave the other options away')
    if grid(args.country) is None:
        raise UserError(f'--country is {args.country!r}, it must be one of {", ".join(GRID)}, or the '
                        f'grams of CO2e a kWh')
    return args, [arg for arg in argv if of_ideas(arg)]


def main(argv):
    args, of_ideas = read_options(argv)
    if args.eval and (Path(args.run) / 'meta.json').exists():
        return prepare_evals(args.run, args.eval, args.eval_data)
    if args.serve:
        return serve(args, of_ideas)
    run = open_run(args.run, args.device, of_ideas)
    if args.export:
        return verb('export', args.export).write(run)
    if args.eval:
        return evaluate(run, args)
    passages = open_passages(run, args.retrieve) if args.retrieve else None
    if args.compile:
        compile_for(run, args.samples)
    energy, marks = Energy(args.device, time.monotonic()) if args.stats else None, []
    if args.stats and 'measured' in energy.how['gpu'] + energy.how['cpu']:
        marks.append(energy.mark())
        time.sleep(3)                           # what the machine takes when it has nothing to do
    marks += [energy.mark()] if args.stats else []
    tokens = complete_all(run, args, passages)
    if args.stats:                              # of --interactive, waiting for its user included
        say_cost(energy.how, [*marks, energy.mark()], tokens, args)
        print(f'KV cache: {KVCache(run.model, 1).values():,.0f} values a token and layer')


if __name__ == '__main__':
    measuring = any(arg.startswith('--eval') for arg in sys.argv)
    print_without_fail(() if measuring else BrokenPipeError)     # nobody reads on: what is measured is kept
    try:
        main(sys.argv[1:])
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)
    except (UserError, FloatingPointError, OSError) as e:
        print(f'sample.py: {in_words(e)}', file=sys.stderr)
        sys.exit(2)

"""Ask a trained model: complete prompts, measure it.

    python sample.py out/quickstart                                    one sample from an empty prompt
    python sample.py out/quickstart "Mia left the kite" --samples 3    three continuations at once
    python sample.py out/quickstart --file prompts.txt                 one continuation a line
    python sample.py out/quickstart --interactive                      a prompt at a time, until an empty line
    python sample.py out/babylm --eval=all                             bits per byte, and all of data/eval
    python sample.py out/babylm --eval=blimp,my_pairs.jsonl            two evaluation sets
    python sample.py out/babylm config/my_measure.py --eval=mine       what an idea measures
    python sample.py data/babylm-bpe8192 --eval=all                    fetch BLiMP, tokenize all of data/eval
    python sample.py out/quickstart "Mia" --stats                      and what that took in energy and cache
    python sample.py out/babylm --export html                          the model in a page that opens anywhere
    python sample.py out/babylm --export hf                            for transformers; gguf for llama.cpp
    python sample.py out/babylm --export int8                          out/babylm/int8, a smaller run; or int4

A run is asked by the code of the ideas that made it. What train.py measures stands here too: Measure, a seam,
and Energy.
"""
import argparse
import base64
import codecs
import contextlib
import ctypes
import dataclasses
import functools
import glob
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import platform
import re
import shutil
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
from config import MOST, UserError, at_home, docs, fits, in_words, name_of, print_without_fail, refuse, verb, verbs
from model import GPT, IN_USE, KVCache, blueprint, configured

sys.modules.setdefault('sample', sys.modules[__name__])     # what an idea that imports sample gets

PROTOCOL = 1     # version of bits_per_byte's definition; stored beside every number it makes
SLICES = 1024    # the parts that a validation split is dealt into

# ---- a run's files -----------------------------------------------------------------------------------------

CHECKPOINTS = ('ckpt.pt', 'ckpt.prev.pt', 'ckpt.new.pt')     # the last, the one before, one that a kill kept from its place


CHECKPOINT = dict(ideas=[(str, str, bool)], settings={str: object}, config={str: object}, model={str: object}, tokenizer=str,
                  fingerprint=str, data=str)      # the form of one, as config.fits has it

ROW = {'step': range(1 << 60), 'elapsed_s': float, 'evals?': {str: {'accuracy?': float | None}}} | dict.fromkeys(
    ('tokens?', 'train_loss?', 'val_bpb?', 'train_bpb?'), float | None)      # of metrics.jsonl


class Damaged(UserError):
    """A file that is not what was written there."""


def read_checkpoint(run, versions=(3,)):
    """The newest whole checkpoint of a run's folder (or the file itself), on the CPU. One that is damaged is
    passed over with a line; UserError if no other is whole."""
    run, damaged = Path(run).expanduser(), None
    paths = [run / name for name in CHECKPOINTS if (run / name).is_file()] if run.is_dir() else [run]
    for path in paths or [run / CHECKPOINTS[0]]:
        try:
            state = read_whole(path, versions)
        except Damaged as e:
            damaged = damaged or e
            continue
        if damaged:
            print(f'warning: {damaged}; {path} is whole and takes its place', file=sys.stderr)
        return state
    raise UserError(f'{damaged}, and no other is whole: make the run again, --overwrite begins it anew') from damaged


def read_whole(path, versions):
    """What a checkpoint holds, tensors and plain values alone, after its checksums."""
    try:
        if not path.is_file():                  # a pipe would be waited for
            raise FileNotFoundError
        with zipfile.ZipFile(path) as records:
            wrong = records.testzip()
        if wrong:
            raise Damaged(f'{path} is damaged: {wrong} in it has another checksum than was written')
        state = torch.load(path, map_location='cpu', weights_only=True)
        if state['version'] not in versions:
            older = ': commit fb45184 reads it, git checkout fb45184' * (state['version'] == 2)
            raise UserError(f'{path} is a checkpoint of version {state["version"]}, '
                            f'this program reads version 3{older}')
        if not fits(state, CHECKPOINT):
            raise Damaged(f'{path} is not as train.py writes a checkpoint')
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
        beside.unlink(missing_ok=True)          # it may be a link to elsewhere
        with open(beside, 'xb') as f:
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
    refuse((folder / '.lock').is_symlink(), f'{folder / ".lock"} is a link to elsewhere: take it away')
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
    for line in (Path(path).read_text(errors='replace').splitlines() if Path(path).is_file() else []):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break
        if not fits(rows[-1], ROW):
            return rows[:-1]
    return rows


def config_of(state, kind, given):
    """The model's config, of a class, that a checkpoint holds, with values that are given now; ValueError where it is
    none, or its weights are of another shape: before there is memory taken for them."""
    form = {f'{field.name}?': type(field.default) for field in dataclasses.fields(kind)} | {'block_size?': range(1, 1 << 60)}
    packed, weights = state.get('packed', {}), state['model']
    if not fits(state['config'], form) or state['config'].get('n_layer', 0) > len({**weights, **packed}):
        raise ValueError('it has no weights for what its config says, or that is no config')
    config = kind(**state['config'] | given)
    if not packed:
        differ = [name for name, t in blueprint(config).state_dict().items() if getattr(weights.get(name), 'shape', 0) != t.shape]
        if differ:
            raise ValueError(f'size mismatch: its config needs {differ[0]} in another shape, or at all')
    return config


def open_run(run, device='cpu', argv=(), here=()):
    """A run's folder, model, ready to generate, tokenizer, ideas, settings and state, its checkpoint.

    argv: what the command line says of it, configs of further ideas and --key=value of what ideas declare; here: paths
    at which its own ideas may lie too.
    """
    state, path = read_checkpoint(run, (3, *verbs('export'))), Path(run).expanduser()
    folder = path if path.is_dir() else path.parent
    tokenizer = prepare_data.load_tokenizer(folder)
    if hashlib.sha256(tokenizer.blob).hexdigest() != state['tokenizer']:
        raise UserError(f'{folder / tokenizer.filename} is not the vocabulary that the checkpoint was '
                        f'trained with: put back the one of {state["data"]}')
    ideas = prepare_data.ideas_of(state['ideas'], state['settings'], argv, here)
    for name in ideas.changed:
        print(f'config/{name}.py is not what it was as {run} was made, see the copy there', file=sys.stderr)
    given = {name: ideas.values[name] for name, where in ideas.set_at.items() if where.startswith('--')}
    Config = configured(ideas)
    own = given.keys() & {field.name for field in dataclasses.fields(Config)}
    try:
        config = config_of(state, Config, {name: given[name] for name in own})
        model = config.GPT(config)
        if state['version'] == 3:
            model.load_state_dict(state.get('evaluated') or state['model'])      # the weights that were measured
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as e:
        why = ' '.join(str(e).split())[:200]
        raise UserError(f'{run} does not fit config/ as it is now ({why}): give its ideas the text that they '
                        f'had, of which the run keeps a copy') from e
    try:
        model = model.to(device).eval()
        if state['version'] != 3:
            verb('export', state['version']).load(model, state, device)
    except torch.OutOfMemoryError as e:
        raise UserError(f'--device is {device!r}, and it has no room for {run}: free it, or try cpu') from e
    except (RuntimeError, AssertionError) as e:
        raise UserError(f'--device is {device!r}, and torch cannot use it here: try cpu') from e
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer, ideas=ideas, state=state,
                           settings={**ideas.values, **state['settings'], **given})


def load(run, device='cpu', argv=(), here=()):
    """(model, tokenizer) of a run's folder, as open_run has them."""
    run = open_run(run, device, argv, here)
    return run.model, run.tokenizer


# ---- pages -------------------------------------------------------------------------------------------------

def write_page(path, title, **data):
    """One HTML page that needs nothing else: web/page.html, which says what it draws, with its data in it."""
    text = as_json(dict(title=title, **data)).replace('<', '\\u003c')   # a </script> in a sample is text
    page = (Path(__file__).parent / 'web' / 'page.html').read_text('utf-8')
    write_beside(path, lambda f: f.write(page.replace('{}</script>', f'{text}</script>', 1).encode()))


def write_report(out_dir, result, blocks=()):
    """Make report.html of a run from its result, the log that it left, and blocks that ideas add."""
    out_dir = Path(out_dir)
    write_page(out_dir / 'report.html', f'{out_dir.name}: {result["val_bpb"]:.4f} bits per byte', result=result,
               rows=thinned(read_rows(out_dir / 'metrics.jsonl')), blocks=[*blocks])


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


def generates_otherwise(model):
    """The idea whose generate is its own, which no cache has to fit; '' where it is the baseline's."""
    owner = next(c for c in type(model).__mro__ if 'generate' in vars(c))
    return '' if owner is GPT else name_of(owner)


def compile_for(run, *sizes):
    """Compiles what makes a token of each of so many rows, or says why the run goes on without."""
    model = run.model
    try:
        refuse(run.state['version'] != 3, 'its weights are packed')
        refuse(other := generates_otherwise(model), f'{other} generates in a way of its own')
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


def device_of(model):
    return next(model.parameters()).device.type


def tokens_at_once(device):
    """How many tokens an evaluation reads at once: a GPU is quick on many."""
    return 65536 if device == 'cuda' else 8192


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
    error[(count == 1) & (fraction < 1)] = math.nan      # of one document out of several nothing is known
    weight = weight * seen / (weight * seen).sum()
    error, of_all = (float(np.sqrt(((weight[seen] * e[seen]) ** 2).sum())) for e in (error, text_error))
    of_all = of_all if weight[count > 1].sum() > 0.95 else math.nan      # of too much it is not known how documents differ
    return dict(bpb=float((weight * per_source).sum()), error=error, text_error=of_all,
                loss=float(bits.sum() * math.log(2) / n_tokens.sum()),
                share=float(n.sum() / docs['bytes'].sum()), tokens=int(n_tokens.sum()),
                per_source={int(i): float(per_source[i]) for i in np.flatnonzero(seen)},
                per_source_error={int(i): float(text_error[i]) for i in np.flatnonzero(count > 1)},
                **(dict(asked=asked) if asked < 1 else {}),
                **{f'bpb_{k}': float((weight * x / np.maximum(n, 1)).sum()) for k, x in zip(further, more)})


# ---- evaluation sets: items of a context and options, of which the first is right, tokenized once ----------

BLIMP = 'https://github.com/alexwarstadt/blimp/archive/refs/heads/master.tar.gz'
MOST_ITEMS = 1 << 27             # bytes of an evaluation, unpacked
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
    path, files, items, bad, room = Path(path), [], [], [], MOST_ITEMS

    def whole(f):
        nonlocal room
        text = f.read(room + 1)
        room -= len(text)
        refuse(room < 0, f'{path} has over {MOST_ITEMS >> 20} MiB of text: give files of fewer items')
        return text
    try:
        if '.tar' in path.suffixes:
            with tarfile.open(path) as tar:
                files = [(m.name, whole(tar.extractfile(m))) for m in tar
                         if m.isfile() and m.name.endswith('.jsonl')]
        elif path.is_dir():
            files = [(p.name, whole(io.BytesIO(p.read_bytes()))) for p in sorted(path.glob('*.jsonl'))]
        else:
            with open(path, 'rb') as raw:
                files = [(path.name, whole(prepare_data.open_source(raw, path.name)))]
    except (OSError, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as e:
        raise UserError(f'{path} cannot be read ({type(e).__name__}: {e}): give .jsonl, a folder or a tar of '
                        f'them') from e
    for name, text in files:
        for number, line in enumerate(io.BytesIO(text), 1):
            refuse(number > 10 ** 7 or len(bad) > 10 ** 5, f'{path} has too many lines, or lines that are no item')
            try:
                if line.strip():
                    items.append(eval_item(json.loads(line), Path(name).name.split('.')[0]))
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
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
        with contextlib.suppress(OSError):
            kept.parent.mkdir(exist_ok=True)
        prepare_data.write_beside(kept, lambda f: np.savez(f, **made))
    return made


def fetch_evals(folder, **patience):
    """BLiMP, into a folder of evaluation sets that is yet to be made; patience: of prepare_data.download."""
    if not Path(folder).exists():
        print(f'{folder} is missing: BLiMP is fetched to it', flush=True)
        with tempfile.TemporaryDirectory() as beside:
            prepare_data.download(BLIMP, Path(beside) / 'blimp.tar.gz', **patience)
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
        return dict(bpb=lambda model, n, stop: self.bpb(model, SLICES, tokens_at_once(device_of(model)), stop))

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
                    yield name, self.judge(model, name, n, tokens_at_once(device_of(model)), stop)
                elif result := self.other(name, model, n, stop):
                    yield name, result
            except (UserError, FloatingPointError) as e:
                self.say(f'left out: {e}')         # what else is measured is worth more

    def other(self, name, model, n=0, stop=None):
        """What a known measure returns."""
        result = self.known()[name](model, n, stop) or {}
        missing = {'error', 'chance', 'items'} - result.keys() if 'accuracy' in result else ()
        refuse(missing, f'{name} returns an accuracy without {", ".join(sorted(missing))}: give all four')
        return result

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

    def judge(self, model, name, n=None, max_tokens=8192, stop=None, rank=0, world=1, reduce=lambda x: x):
        """The verdict on the first n items of an evaluation set, or on all; with stop() at least on the first
        sixteenth of them, or what is read at once if that is more. Ranks as in bits_per_byte."""
        items, costs = self.sets[name], []
        total = len(items['seam'])
        n = min(n or total, total)
        part = max(-(-n // 16), -(-max_tokens * world * total // len(items['ids']))) if stop else n
        for first in range(0, n, part):
            if first and stop():
                break
            ends = np.linspace(first, min(first + part, n), world + 1).astype(int)      # of the ranks' shares
            places = np.searchsorted(items['item'], ends)
            cost = np.zeros(places[-1] - places[0])
            cost[slice(*places[rank:rank + 2] - places[0])] = self.option_costs(model, items, *ends[rank:rank + 2], max_tokens)
            costs.append(reduce(cost))
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
        """How many texts are written at once: on a GPU many take as long as one."""
        return 256 if device_of(model) == 'cuda' else 32

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
        kinds = ', '.join(f'{k} {v:.3f}' for k, v in (result.get('per_field') or result.get('per_kind', {})).items())
        p, error, n = (more.pop(key) for key in ('accuracy', 'error', 'items'))
        more = ''.join(f', {k} {v:,}' if type(v) is int else f', {k} {v:.4g}' for k, v in more.items())
        return f'{name}: {p:.4f} +- {error:.4f} on {n:,} items{more}' + f' ({kinds})' * bool(kinds)


# ---- the machine, and the energy that it takes ---------------------------------------------------------------

# Dense bf16 peak with fp32 accumulation, TFLOP/s, from the makers' data sheets; a card not here gets no MFU.
PEAK_TFLOPS = {'RTX 4090': 165.2, 'RTX 3090': 71.2, 'RTX 5090': 209.5, 'L40S': 362.1, 'L4': 121.0,
               'A10G': 70.0, 'A100': 311.9, 'H100 PCIe': 756.4, 'H100 NVL': 835.5, 'H100': 989.4,
               'H200 NVL': 835.5, 'H200': 989.4}


def of_card(table, name):
    """What a table says of a card; None of one that is not in it, as a laptop's, a 4090 D and a 3090 Ti are not."""
    return next((v for k, v in table.items() if re.search(rf'\b{k}\b(?! (Laptop|D\b|Ti\b))', name)), None)


def peak_flops(name):
    known = of_card(PEAK_TFLOPS, name)
    return known and 1e12 * known


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
    build = ('"torch<2.14"' if version >= 580 else '"torch<2.12" --index-url https://download.pytorch.org/whl/cu128'
             if version >= 570 else '"torch<2.14" --index-url https://download.pytorch.org/whl/cu126')
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
    watts = of_card(BOARD_WATTS, card.name) or 350
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


def complete(model, tokenizer, prompt, args, generator, before=()):
    """Print one streamed continuation, or args.samples made side by side; returns their tokens' number."""
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


def complete_all(run, args, generator, before=lambda prompt: ()):
    """complete what is asked for, with the ids before(prompt) behind BOS; returns how many tokens that made."""
    prompts = [args.prompt]
    if args.file:                               # a line ends where an editor says so, not at a form feed
        with open(args.file, encoding='utf-8-sig') as f:
            text = f.read(MOST + 1)              # a device may have no end
        refuse(len(text) > MOST, f'{args.file} is longer than {MOST >> 20} MiB: give it in parts')
        prompts = text.removesuffix('\n').split('\n') if text else []
    elif args.interactive:
        prompts = iter(lambda: input('> '), '')
    return sum(complete(run.model, run.tokenizer, prompt, args, generator, before(prompt)) for prompt in prompts)


def tell(run, args, work=complete_all):
    """Does work(run, args, generator), which returns how many tokens it made, as --compile and --stats have it."""
    if args.compile:
        compile_for(run, args.samples)
    energy, marks = Energy(args.device, time.monotonic()) if args.stats else None, []
    if args.stats and 'measured' in energy.how['gpu'] + energy.how['cpu']:
        marks.append(energy.mark())
        time.sleep(3)                           # what the machine takes when it has nothing to do
    marks += [energy.mark()] if args.stats else []
    try:
        tokens = work(run, args, torch.Generator(device=args.device).manual_seed(args.seed))
    except UnicodeError as e:
        raise UserError(f'{args.file or "the prompt"} is not UTF-8 text ({e})') from e
    if args.stats:                              # of --interactive, waiting for its user included
        say_cost(energy.how, [*marks, energy.mark()], tokens, args)
        if not generates_otherwise(run.model):
            print(f'KV cache: {KVCache(run.model, 1).values():,.0f} values a token and layer')


def the_options(modules):
    parser = argparse.ArgumentParser(
        description=f'{__doc__}\n{docs("sample")}', formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='also: paths of configs, whose ideas take part, and --name=value of what ideas declare')
    add, whole = parser.add_argument, functools.partial(parser.add_argument, type=int)
    add('run', help='a folder that train.py wrote, or a checkpoint in it; with --eval a prepared data set')
    add('prompt', nargs='?', default='', help='what to continue; empty begins a document')
    add('--file', help='a text file with one prompt a line')
    add('--interactive', action='store_true', help='read prompts until an empty line')
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
    add('--export', help=f'write the model into its folder in another format: {", ".join(verbs("export"))}')
    for module in modules:
        module.options(add)
    return parser


def within(args, **limits):
    """Refuses numbers that do not lie between the least and the most of their names."""
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        refuse(not low <= value <= high, f'--{name} is {value}, it must lie between {low} and {high}')


def read_options(argv):
    """What the command line says; what of it is for ideas: paths of configs, --name=value of settings; and the
    module of the verb that is asked for, or None. Others may be asked for that are in its WITH."""
    typed, known = {arg.partition('=')[0] for arg in argv}, verbs('sample')
    asked = {name: verb('sample', name) for name in known if {f'--{name}', '-h', '--help'} & typed}
    parser = the_options(asked.values())
    options = parser._option_string_actions

    def of_ideas(arg):
        name, value, _ = arg.partition('=')
        return (arg.endswith('.py') and Path(arg).is_file()
                or value and re.fullmatch(r'--\w+', name) and not any(o.startswith(name) for o in options))
    args = parser.parse_intermixed_args([a for a in argv if not of_ideas(a)])  # the prompt may follow options
    for name, value in vars(args).items():       # argparse takes the -- of --name=-- for its own
        refuse(value == [], f'--{name} is --, which is no value: leave it away')
    for name in ('file', 'json', 'eval_data', 'eval'):
        if value := getattr(args, name):
            setattr(args, name, at_home(value))
    within(args, samples=(1, 4096), max_new_tokens=(1, 10 ** 9), **DRAWN, seed=(0, 10 ** 18), eval_items=(0, 10 ** 9))
    first = [module for name, module in asked.items() if asked.keys() - {name} <= {*getattr(module, 'WITH', ())}]
    refuse(asked and not first, f'{" and ".join(f"--{name}" for name in asked)} are asked for: one at a time')
    if args.eval and args.stats:
        raise UserError('--stats says what a prompt takes, and --eval reads none: leave one away')
    if args.export is not None and args.export not in verbs('export'):
        raise UserError(f'--export is {args.export!r}, it must be one of {", ".join(verbs("export"))}')
    if args.export and (args.eval or args.stats or args.prompt or args.file or args.interactive):
        raise UserError('--export writes a file and does nothing else: leave the other options away')
    if grid(args.country) is None:
        raise UserError(f'--country is {args.country!r}, it must be one of {", ".join(GRID)}, or the '
                        f'grams of CO2e a kWh')
    return args, [arg for arg in argv if of_ideas(arg)], next(iter(first), None)


def main(argv):
    args, of_ideas, asked = read_options(argv)
    if asked:
        return asked.main(args, of_ideas)
    if args.eval and (Path(args.run) / 'meta.json').exists():
        return prepare_evals(args.run, args.eval, args.eval_data)
    run = open_run(args.run, args.device, of_ideas)
    if args.export:
        return verb('export', args.export).write(run)
    if args.eval:
        return evaluate(run, args)
    tell(run, args)


if __name__ == '__main__':
    measuring = any(arg.startswith('--eval') for arg in sys.argv)
    print_without_fail(() if measuring else BrokenPipeError)     # nobody reads on: what is measured is kept
    try:
        main(sys.argv[1:])
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)
    except (UserError, FloatingPointError, OSError, MemoryError, RuntimeError) as e:
        print(f'sample.py: {in_words(e)}', file=sys.stderr)
        sys.exit(2)

"""Ask a trained model: complete prompts, measure it.

    python sample.py out/quickstart                                    one sample from an empty prompt
    python sample.py out/quickstart "Mia left the kite" --samples 3    three continuations at once
    python sample.py out/quickstart --file prompts.txt                 one continuation a line
    python sample.py out/quickstart --interactive                      a prompt at a time, until an empty line
    python sample.py out/babylm --eval=all                             bits per byte, and all of data/eval
    python sample.py out/babylm --eval=blimp,my_pairs.jsonl            two evaluation sets
    python sample.py out/quickstart "Mia" --stats                      and what that took in energy and cache

What train.py measures stands here too: bits_per_byte, judge, and Energy.
"""
import argparse
import codecs
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import inspect
import json
import lzma
import math
import os
import pickle
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import prepare_data
from model import GPT, GPTConfig, IN_USE, KVCache, Linear
from prepare_data import UserError

PROTOCOL = 1     # version of bits_per_byte's definition; stored beside every number it makes
SLICES = 1024    # the parts that a validation split is dealt into

# ---- loading -----------------------------------------------------------------------------------------------

def read_checkpoint(run):
    """The newest checkpoint of a run's folder (or the file itself), on the CPU; UserError if damaged."""
    path = Path(run)
    if path.is_dir():
        path = next((p for p in (path / 'ckpt.pt', path / 'ckpt.prev.pt') if p.exists()), path / 'ckpt.pt')
    previous = path.with_name('ckpt.prev.pt')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        if state['version'] != 2:
            raise UserError(f'{path} is a checkpoint of version {state["version"]}, '
                            f'this program reads version 2')
        return state
    except FileNotFoundError as e:
        raise UserError(f'{path} does not exist: name a folder that train.py wrote, '
                        f'such as out/quickstart') from e
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, IndexError,
            zipfile.BadZipFile) as e:
        what = f'{path} is cut off or not a checkpoint of train.py ({type(e).__name__})'
        if previous.exists() and previous != path:
            what += f'; the one before is whole, to go on from it: mv {previous} {path}'
        raise UserError(what) from e


def load(run, device='cpu'):
    """(model, tokenizer) of a run's folder, ready to generate."""
    state = read_checkpoint(run)
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    tokenizer = prepare_data.load_tokenizer(folder)
    if hashlib.sha256(tokenizer.blob).hexdigest() != state['tokenizer']:
        raise UserError(f'{folder / tokenizer.filename} is not the vocabulary that the checkpoint was '
                        f'trained with: put back the one of {state["data"]}')
    model = GPT(GPTConfig(**state['config']))
    model.load_state_dict((state.get('average') or state)['model'])     # averaged weights, where it keeps any
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as e:
        raise UserError(f'--device is {device!r}, and torch cannot use it here: try cpu') from e


# ---- completing --------------------------------------------------------------------------------------------

def stream(model, tokenizer, prompt, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Yield the pieces of one continuation as they come, whole characters only, up to the document's end."""
    idx = torch.tensor([[tokenizer.bos] + tokenizer.encode(prompt)], device=model.wte.weight.device)
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    for new in model.generate(idx, max_new_tokens, temperature, top_k, top_p, generator):
        if new.item() == tokenizer.bos:
            break
        yield decoder.decode(tokenizer.token_bytes(new.item()))
    yield decoder.decode(b'', final=True)


# ---- measuring ---------------------------------------------------------------------------------------------

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
def document_nats(model, documents, max_tokens=8192, **domain):
    """{key: nats} from pairs of a key and a document's ids, BOS first, read in windows of block_size."""
    nats, rows, device = {}, [], next(model.parameters()).device
    for key, ids in documents:
        nats[key] = 0.0
        rows += [(key, x, y) for x, y in windows(ids, model.config.block_size)]
    for keys, idx, targets in batches(rows, max_tokens, model.config.block_size):
        idx, targets = torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)
        loss = model(idx, targets, reduction='none', **domain)
        for key, value in zip(keys, loss.double().sum(dim=1).tolist()):
            nats[key] += value
    return nats


def nats_by_domain(model, documents, max_tokens=8192):
    """{key: (domains,) nats} of documents as above, by each of a model's domains."""
    documents, device = list(documents), next(model.parameters()).device
    each = [document_nats(model, documents, max_tokens, domain=domain)
            for domain in torch.arange(model.config.n_domains, device=device)]
    return {key: np.array([nats[key] for nats in each]) for key, _ in documents}


def mixture(nats):
    """Nats of a document from those by each domain: p(x) = mean over d of p(x | d), which is what the causal
    posterior p(x_t | x_<t) = sum_d p(d | x_<t) p(x_t | x_<t, d) multiplies to, token by token, where all
    domains are equally likely at first."""
    return float(math.log(len(nats)) - np.logaddexp.reduce(-nats))


def domain_of(config, data):
    """The domain of every source in a model of this config; -1 where it has none."""
    of = {source: i for i, name in enumerate(config.domains.split(',')) for source in name.split('+')}
    return [of.get(source, -1) for source in data.meta['sources']]


def bits_per_byte(model, tokens, docs, slices=SLICES, max_tokens=8192, stop=None, rank=0, world=1,
                  reduce=lambda sums: sums, domains=None):
    """Bits per raw UTF-8 byte of a split, over its first `slices` of 1,024 stratified parts (by default all).

    tokens, docs: a split of prepare_data.open_data. model(idx, targets, reduction='none') gives nats a token.
    stop(), if given, is asked at every sixteenth of the way, and must answer alike on every rank; reduce adds
    an array over ranks. Each document is read from its BOS in windows of block_size; neither BOS nor the end
    of the document is counted. domains: for a model that has any that of every source, -1 for none; all but
    bpb_told are then of documents that nothing is told of (`mixture`). Returns bpb, two standard errors:
    `error`, how far it may be from that of the whole split (0 for the whole), and `text_error`, the split's
    documents being a sample of such text; loss, share of bytes, tokens, and per source index bpb and
    text_error (where there are documents for one).
    """
    group = -(-slices // 16) if stop else slices
    part, n_sources = deal(docs), int(docs['source'].max()) + 1
    ends = np.append(docs['start'][1:], len(tokens))
    sums = np.zeros((n_sources, 8))       # documents, bytes, bits, bytes^2, bits^2, bytes bits, tokens, told
    for first in range(0, slices, group):
        if first and stop():
            break
        mine = np.flatnonzero((part >= first) & (part < min(first + group, slices)))[rank::world]
        texts = ((doc, tokens[docs['start'][doc]:ends[doc]]) for doc in mine.tolist())
        nats = (nats_by_domain if domains else document_nats)(model, texts, max_tokens)
        add = np.zeros_like(sums)
        for doc, value in nats.items():
            each, domain = np.atleast_1d(value), domains[docs['source'][doc]] if domains else 0
            n, bits = float(docs['bytes'][doc]), mixture(each) / math.log(2)
            told = each[domain] / math.log(2) if domain >= 0 else bits
            n_tokens = ends[doc] - docs['start'][doc] - 1
            add[docs['source'][doc]] += [1, n, bits, n * n, bits * bits, n * bits, n_tokens, told]
        sums += reduce(add)
    weight = np.bincount(docs['source'], weights=docs['bytes'], minlength=n_sources)
    count, n, bits, nn, bb, nb, n_tokens, told = sums.T
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
                **(dict(bpb_told=float((weight * told / np.maximum(n, 1)).sum())) if domains else {}))


# ---- evaluations -------------------------------------------------------------------------------------------

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


def as_likely(model, idx, targets):
    """(B, T): how many other tokens are at least as likely as the target; 0 where target < 0."""
    count, asked, x = torch.zeros_like(targets), targets >= 0, None
    if model.config.domains and model.told is None:     # each row by its context's likeliest
        context = F.pad(idx[:, 1:], (0, 1), value=-1).masked_fill(asked, -1)
        of = model.by_domain(idx, context).sum(2).argmin(0)
        x = torch.stack([model.trunk(row[None], domain=domain)[0] for row, domain in zip(idx, of)])
    z = model.logits((model.trunk(idx, domain=model.told) if x is None else x)[asked])
    below = z < z.gather(1, targets[asked][:, None])    # nothing is, where the model gives no numbers
    count[asked] = (~below).sum(dim=1) - 1
    return count


@torch.no_grad()
def option_costs(model, items, n=None, bos=True, max_tokens=8192):
    """(options,) of the first n items of prepare_data.eval_set: nats of an option's tokens, their sum.

    What all options of an item share cancels and is left out; of a last word it is the number of tokens that
    are at least as likely as its own. Every text begins with BOS, as in training; bos=False takes it away and
    leaves the first token unscored, as the BabyLM challenge scores causal models.
    """
    device, block_size, rows = next(model.parameters()).device, model.config.block_size, []
    owner, alone = items['item'], len(items['item']) == len(items['seam'])
    n_options = len(owner) if n is None else int(np.searchsorted(owner, n))
    for i, seam in enumerate(items['seam'][owner[:n_options]]):
        ids = items['ids'][items['start'][i]:items['start'][i + 1]].astype(np.int64)
        x, y = ids[:-1], ids[1:].copy()
        y[:seam - 1] = -1
        x, y = (ids[0 if bos else 1:] for ids in (x, y))
        for end in range(len(x), max(0, seam - 2 + bos), -block_size):       # windows, the last one whole
            rows.append((i, x[max(0, end - block_size):end], y[max(0, end - block_size):end]))
    cost = np.zeros(n_options)
    with exactly(model):
        for keys, idx, targets in batches(rows, max_tokens, block_size, step=1):
            idx, targets = torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)
            one = as_likely(model, idx, targets) if alone else model(idx, targets, reduction='none')
            np.add.at(cost, keys, one.double().sum(dim=1).cpu().numpy())
    return cost


def accuracy(cost, items):
    """Share of items whose first option is likelier than every other; a tie is wrong. The mean over kinds.

    cost: of option_costs. Returns accuracy, its standard error (each kind's as if two more items had been one
    right, one wrong: never 0), chance (0 for a last word), shortest (what an untrained model tends to: to
    take the option of the fewest tokens), items, ties, accuracy per kind and per field.
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
                items=len(first),
                ties=int(ties.sum()), per_kind={names[i]: float(share[i]) for i in np.flatnonzero(seen)},
                per_field=fields)


def judge(model, items, n=None, bos=True, max_tokens=8192, counts=None):
    """accuracy of a model on the first n items of an evaluation set, or on all: see option_costs. With counts
    (V,) of the training text, of pairs the frequency bias too."""
    cost = option_costs(model, items, n, bos, max_tokens)
    bias = counts is not None and len(items['item']) == 2 * len(items['seam'])
    return accuracy(cost, items) | (frequency_bias(cost, items, counts) if bias else {})


def frequencies(tokens, vocab_size):
    """How often each id stands in a split."""
    return sum(np.bincount(tokens[i:i + 2 ** 24], minlength=vocab_size)
               for i in range(0, len(tokens), 2 ** 24))


def frequency_bias(cost, items, counts):
    """Accuracy where the good sentence has the more frequent tokens, less accuracy where the bad one has.

    Of the pairs that differ in a replacement: thirds by mean log-count of the tokens that only the good one
    has less that of the tokens that only the bad one has (Diehl Martinez 2024, 2410.11462). cost: of
    option_costs; counts (V,): of the training text. Returns it and `replaced`, how many pairs differ so.
    """
    log, rows, start = np.log(counts + 1.0), [], items['start']
    for i in range(0, len(cost), 2):
        mine, other = (Counter(items['ids'][start[j]:start[j + 1]].tolist()) for j in (i, i + 1))
        mine, other = list((mine - other).elements()), list((other - mine).elements())
        if mine and other:
            rows.append((log[mine].mean() - log[other].mean(), cost[i] < cost[i + 1]))
    delta, right = np.array(rows, float).reshape(-1, 2).T
    if not len(delta):
        return dict(frequency_bias=0.0, replaced=0)
    low, high = np.quantile(delta, [1 / 3, 2 / 3])
    return dict(frequency_bias=float(right[delta >= high].mean() - right[delta <= low].mean()),
                replaced=len(delta))


@torch.no_grad()
def anisotropy(model, tokens, docs, n_pairs=1000, length=64):
    """Mean cosine between hidden states at random places of two random documents, after every layer.

    0 where directions are used evenly, 1 where all point one way (Ethayarajh 2019, 1909.00512). tokens, docs:
    a split of prepare_data.open_data.
    """
    dice, length = np.random.default_rng(0), min(length, model.config.block_size)
    starts, ends = docs['start'], np.append(docs['start'][1:], len(tokens))
    some = dice.permutation(len(docs))[:256]
    idx = np.zeros((len(some), length), np.int64) + model.config.bos
    for row, doc in zip(idx, some):
        text = tokens[starts[doc]:min(ends[doc], starts[doc] + length)]
        row[:len(text)] = text
    a, b = dice.integers(len(some), size=(2, n_pairs))
    b = np.where(a == b, (b + 1) % len(some), b)
    sizes = np.minimum(ends - starts, length)[some]
    at = [(1 + dice.random(n_pairs) * (sizes[rows] - 1)).astype(int).clip(max=length - 1) for rows in (a, b)]
    states, hooks = [], [block.register_forward_hook(lambda _, __, out: states.append(out))
                         for block in model.blocks]
    try:
        model.trunk(torch.from_numpy(idx).to(model.wte.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cosine_similarity(x[a, at[0]].float(), x[b, at[1]].float(), dim=-1).mean().item()
            for x in states]


# ---- judging what it writes --------------------------------------------------------------------------------

WORD = re.compile(r"\w+(?:['’]\w+)*|\0")         # \0 stands between documents
FIELDS = ('task_id', 'prompt', 'entry_point', 'test')
STAGES = ('parses', 'runs', 'passes')
STATEMENT = re.compile(r'\n(?=[^\s)\]}])')       # a line at the margin: the function before it is over


def continuations(model, tokenizer, prompts, max_new_tokens, temperature, generator, done=lambda text: False,
                  rows=32):
    """What follows each of `prompts` (ids that begin with BOS): lists of ids, and which of them ended.

    They are made `rows` at a time; done(text) may end one early. Shorter prompts get more BOS on the left,
    which documents keep out of sight; without doc_mask only prompts of one length share a batch.
    """
    made, ended, device = [[] for _ in prompts], [False] * len(prompts), model.wte.weight.device
    rows = 1 if model.config.domains and model.told is None else rows       # each prompt has its own domain
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        width = len(prompts[order[0]])
        batch = [i for i in order[:rows] if model.config.doc_mask or len(prompts[i]) == width]
        order, open_rows = order[len(batch):], list(enumerate(batch))
        idx = [[tokenizer.bos] * (width - len(prompts[i])) + prompts[i] for i in batch]
        for new in model.generate(torch.tensor(idx, device=device), max_new_tokens, temperature, 0, 1.0,
                                  generator):
            new = new.tolist()
            for row, i in open_rows:
                ended[i] = new[row] == tokenizer.bos
                made[i] += [] if ended[i] else [new[row]]
            open_rows = [(row, i) for row, i in open_rows
                         if not ended[i] and not done(tokenizer.decode(made[i]))]
            if not open_rows:
                break
    return made, ended


def ngrams(texts, n):
    """All runs of n words in the texts, which are lists of words."""
    return [gram for words in texts for gram in zip(*(words[i:] for i in range(n)))]


def in_training(tokens, tokenizer, grams, chunk=1 << 18):
    """Those of `grams`, tuples of 1 or of 8 words, that the text of a split's tokens holds, exactly.

    Reads it once, in about 100 MiB: a bitmap of hashes says which windows are worth comparing.
    """
    number = {word: i for i, word in enumerate({word for gram in grams for word in gram} - {'\0'}, 1)}
    wanted = {tuple(number[word] for word in gram): gram for gram in grams if '\0' not in gram}
    seen, found, last, tail = np.zeros(len(number) + 1, bool), set(), np.zeros(0, np.int64), b''
    bitmap, factors = np.zeros(1 << 24, bool), np.random.default_rng(0).integers(1, 1 << 62, 8) * 2 + 1

    def hashed(windows):                         # (8, n) -> (n,)
        return sum(row * factor for row, factor in zip(windows, factors)) >> 40 & 0xFFFFFF

    bitmap[hashed(np.array([row for row in wanted if len(row) == 8], np.int64).reshape(-1, 8).T)] = True
    table = [*tokenizer.table]
    table[tokenizer.bos] = b' \0 '
    for first in range(0, len(tokens), chunk):
        raw = tail + b''.join([table[i] for i in tokens[first:first + chunk].tolist()])
        cut = raw.rfind(b' ') + 1 if first + chunk < len(tokens) else 0       # no word is cut in two
        raw, tail = (raw[:cut], raw[cut:]) if cut else (raw, b'')
        new = [number.get(word, 0) for word in WORD.findall(raw.decode(errors='replace').lower())]
        x = np.append(last, np.array(new, np.int64))
        seen[x], last, n = True, x[-7:], max(0, len(x) - 7)
        windows = np.stack([x[i:i + n] for i in range(8)])
        found |= wanted.keys() & map(tuple, windows[:, bitmap[hashed(windows)]].T.tolist())
    return {wanted[row] for row in found | wanted.keys() & {(i,) for i in np.flatnonzero(seen).tolist()}}


def held_out(data, n, length, seed):
    """Prompts, and (rest, ended) as continuations gives it: n held-out documents, every second split after at
    most eight tokens, the others after BOS."""
    starts, tokens = data.docs['val']['start'], data.tokens['val']
    sizes = np.diff(np.append(starts, len(tokens)))
    some = np.random.default_rng(seed).permutation(len(starts))[:n]
    heads = [1 + min(8, sizes[doc] // 2) * (i % 2) for i, doc in enumerate(some)]
    texts = [tokens[starts[doc]:][:min(sizes[doc], head + length)].tolist() for doc, head in zip(some, heads)]
    return ([ids[:head] for ids, head in zip(texts, heads)],
            ([ids[head:] for ids, head in zip(texts, heads)], list(sizes[some] - heads < length)))


def words_of(text, whole_start, whole_end):
    """Its words in lower case, but for one that the prompt or the limit cut in two."""
    text = text.lower() if whole_start else re.sub(r'^\w+', '', text.lower())
    return WORD.findall(text if whole_end else re.sub(r'\w+$', '', text))


def share_error(p, n):
    """Standard error of a share p of n, as if two more had been one right, one wrong: never 0."""
    smooth = (p * n + 1) / (n + 2)
    return math.sqrt(smooth * (1 - smooth) / n)


def text_quality(model, tokenizer, data=None, n=256, length=128, temperature=0.8, seed=1):
    """How n texts of at most `length` tokens read, without a judge; accuracy: the share that ends properly,
    the document's end following on a sentence's.

    With data (of prepare_data.open_data) every second one continues a held-out document, the others begin
    afresh, and `held_out` has the same figures of those documents themselves. Of words in lower case:
    distinct_n, different n-grams over all (Li 2016, 1510.03055), both sides cut to as many; repeated_4,
    4-grams that stood in the same text before (seq-rep-4 of Welleck 2019, 1908.04319); known_words and
    copied_8, words and 8-grams that the training text holds.
    """
    prompts, *real = held_out(data, n, length, seed) if data else ([[tokenizer.bos]] * n,)
    dice = torch.Generator(device=model.wte.weight.device).manual_seed(seed)
    sides, figures = [continuations(model, tokenizer, prompts, length, temperature, dice), *real], []
    grams = {size: [] for size in (1, 2, 3, 8)}
    for made, ended in sides:
        texts = [tokenizer.decode(ids) for ids in made]
        words = [words_of(text, len(head) == 1, end) for text, head, end in zip(texts, prompts, ended)]
        proper = [end and text.rstrip()[-1:] in {*'.!?…"\'”’)'} for text, end in zip(texts, ended)]
        fours = [ngrams([text], 4) for text in words]
        repeated = 1 - sum(len({*gram}) for gram in fours) / max(1, sum(map(len, fours)))
        figures.append(dict(ends_properly=np.mean(proper), ends=np.mean(ended), repeated_4=repeated))
        for size in grams:
            grams[size].append(ngrams(words, size))
    for size in (1, 2, 3):
        most = min(map(len, grams[size]))
        for figure, side in zip(figures, grams[size]):
            figure[f'distinct_{size}'] = len({*side[:most]}) / max(1, most)
    if data:
        known = in_training(data.tokens['train'], tokenizer,
                            {gram for size in (1, 8) for side in grams[size] for gram in side})
        for name, size in ('known_words', 1), ('copied_8', 8):
            for figure, side in zip(figures, grams[size]):
                figure[name] = np.mean([gram in known for gram in side] or [0])
    figures = [{name: float(value) for name, value in figure.items()} for figure in figures]
    p, n = figures[0]['ends_properly'], len(prompts)
    return dict(accuracy=p, error=share_error(p, n), chance=None, items=n,
                per_kind=figures[0], held_out=figures[1] if data else None)


# A program is judged in a process of its own, which runs the source of the next three functions. They hold
# off what a language model writes by accident, not an enemy, who could read files and, knowing how, pass.

def kernel_confines(folder):
    """From here on this process writes nothing outside `folder` (Landlock, Linux 5.13), has no socket and
    makes or signals no other (seccomp, on x86-64: to try ends it). Neither asks for rights, so that both work
    in a container. Returns which of them the kernel has. Reading stays open, and chmod, and utime."""
    import ctypes, os, struct
    libc, held = ctypes.CDLL(None), []
    libc.prctl(1, 9, 0, 0, 0)                    # end with the parent
    libc.prctl(38, 1, 0, 0, 0)                   # gain no privileges: a condition of the other two
    version = libc.syscall(444, None, 0, 1)
    if version > 0:                              # Landlock's rights, all but to read a file or a folder
        rights = struct.pack('Q', 0x7FF3 if version > 2 else 0x1FF3)
        rules, home = libc.syscall(444, rights, 8, 0), os.open(folder, os.O_PATH)
        libc.syscall(445, rules, 1, rights + struct.pack('i', home), 0)
        held += ['Landlock'] * (libc.syscall(446, rules, 0) == 0)
        os.close(rules), os.close(home)
    if os.uname().machine == 'x86_64':
        # socket, clone, fork, vfork, execve, kill, ptrace, tkill, tgkill, process_vm_writev, execveat,
        # pidfd_send_signal, io_uring_setup, clone3
        calls, end = (41, 56, 57, 58, 59, 62, 101, 200, 234, 311, 322, 424, 425, 435), (6, 0, 0, 1 << 31)
        steps = [(32, 0, 0, 4), (21, 1, 0, 0xC000003E), end, (32, 0, 0, 0), (53, 0, 1, 1 << 30), end,
                 *(step for call in calls for step in ((21, 0, 1, call), end)), (6, 0, 0, 0x7FFF0000)]
        code = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *step) for step in steps))
        program = struct.pack('HP', len(steps), ctypes.addressof(code))
        held += ['seccomp'] * (libc.prctl(22, 2, program, 0, 0) == 0)
    return held


def python_confines(folder):
    """The same as far as Python's own functions go, and at most 64 files written: to try ends the process."""
    import os, sys
    looks = {f'os.{name}' for name in 'listdir scandir walk fwalk chdir putenv unsetenv getxattr'.split()}
    changes = {f'os.{name}' for name in 'mkdir rmdir remove rename link symlink truncate chmod utime'.split()}
    others = {'os', 'socket', 'subprocess', 'ctypes', 'pty', 'resource', 'sqlite3', 'syslog'}
    writing, written, end = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC, [], os._exit

    def outside(path):
        return (isinstance(path, (str, bytes, os.PathLike))
                and not f'{os.path.realpath(os.fsdecode(path))}/'.startswith(f'{folder}/'))

    def hook(event, args):
        if event == 'open' and args[2] & writing:
            args = args[:1]
            written.append(args)
        elif event not in changes:
            return end(1) if event.split('.')[0] in others and event not in looks else None
        if len(written) > 64 or any(map(outside, args)):
            end(1)

    sys.addaudithook(hook)


def attempt():
    """What the judged process does: the task comes from stdin, how far it came goes to stdout."""
    import json, os, resource, sys
    folder, program, test, mark, limits = json.load(sys.stdin)
    verdict, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0), os.dup2(nothing, 1)
    for name, most in limits.items():
        kind = getattr(resource, f'RLIMIT_{name}')
        most = min(most, resource.getrlimit(kind)[1] % (1 << 64))         # -1 is no limit
        resource.setrlimit(kind, (most, most))
    held = kernel_confines(folder)
    python_confines(folder)

    def came_to(stage):
        os.write(verdict, f'{mark} {stage}\n'.encode())

    came_to(', '.join([*held, 'audit hook']))
    code, names = compile(program, 'program', 'exec'), dict(__name__='program')
    came_to('parses')
    exec(code, names)
    came_to('runs')
    exec(test, names)
    came_to('passes')
    os._exit(0)


def judged(program, test, seconds=5, memory=1 << 30):
    """Stages that a program reaches, of 'parses', 'runs' (to its end) and 'passes' (its test), and what held
    it: given an empty folder, seconds of CPU, twice as long in all, and bytes of memory; killed after."""
    mark = secrets.token_hex(16)                 # so that only the end of a stage can look like it
    limits = dict(CPU=seconds, AS=memory, FSIZE=1 << 24, NPROC=0, NOFILE=64, CORE=0)
    code = ''.join(map(inspect.getsource, (kernel_confines, python_confines, attempt))) + 'attempt()'
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
          tempfile.TemporaryFile() as task, tempfile.TemporaryFile() as verdict):
        task.write(json.dumps([os.path.realpath(folder), program, test, mark, limits]).encode())
        task.seek(0)
        environment = dict(TMPDIR=folder, LD_LIBRARY_PATH=os.environ.get('LD_LIBRARY_PATH', ''))
        child = subprocess.Popen([sys.executable, '-ISBc', code], cwd=folder, env=environment, stdin=task,
                                 stdout=verdict, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            child.wait(2 * seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        verdict.seek(0)
        said = re.findall(f'{mark} (.*)', verdict.read(4096).decode(errors='replace'))
    return said[1:], said[0] if said else 'nothing, Python did not start'


def problem_files(folder):
    """Those that read_problems reads in a folder."""
    return [path for path in sorted(Path(folder).glob('*.jsonl*')) if prepare_data.PROBLEMS.search(path.name)]


def read_problems(path):
    """Problems of HumanEval's form (Chen 2021, 2107.03374), whose test defines check(candidate), of a .jsonl
    (.gz, .xz), or of a folder's whose names hold humaneval or mbpp."""
    path, problems = Path(path), []
    for file in problem_files(path) if path.is_dir() else [path]:
        try:
            with open(file, 'rb') as raw, prepare_data.open_source(raw, file.name) as f:
                for row in (json.loads(line) for line in f if line.strip()):
                    problems.append({key: row[key] + '' for key in FIELDS})
        except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError, KeyError, TypeError) as e:
            raise UserError(f'{file} holds no Python problems ({type(e).__name__}: {e}): give .jsonl lines '
                            f'with {", ".join(FIELDS)}, as HumanEval has them') from e
    if not problems:
        raise UserError(f'{path} has no Python problems: put humaneval.jsonl there, or name such a file')
    return problems


def python_tasks(model, tokenizer, problems, n=1, temperature=0.0, max_new_tokens=256, seconds=5, seed=1):
    """Share of the problems whose function passes its test as the model completes it, over n tries each.

    problems: of read_problems. Also the shares that parse, and that run as a module; of those that parse the
    share in which bandit finds medium or high severity (None without bandit, or when none parses); and what
    held the programs. per_kind goes by the task_id up to its slash.
    """
    if sys.platform != 'linux':
        raise UserError(f'Python tasks run what the model wrote, which is contained on Linux alone, and this '
                        f'is {sys.platform}: leave them out')
    dice = torch.Generator(device=model.wte.weight.device).manual_seed(seed)
    tasks = [task for task in problems for _ in range(n)]
    # a prompt's last newline is the model's to write: many a vocabulary has it in one token with the indent
    heads = [task['prompt'].rstrip() for task in tasks]
    made, _ = continuations(model, tokenizer, [[tokenizer.bos] + tokenizer.encode(head) for head in heads],
                            max_new_tokens, temperature, dice, STATEMENT.search)
    bodies = [STATEMENT.split(tokenizer.decode(ids), 1)[0] for ids in made]
    programs = [f'{head}{body}\n' if body.strip() else 'no body' for head, body in zip(heads, bodies)]
    reached, held = zip(*[judged(program, f'{task["test"]}\ncheck({task["entry_point"]})', seconds)
                          for program, task in zip(programs, tasks)])
    shares = np.array([[stage in each for stage in STAGES] for each in reached]).reshape(-1, n, 3).mean(1)
    passed, kinds = shares[:, 2], {}
    for task, share in zip(problems, passed):
        kinds.setdefault(task['task_id'].split('/')[0], []).append(share)
    error = passed.std() / math.sqrt(len(problems)) if n > 1 else share_error(passed.mean(), len(problems))
    return dict(accuracy=float(passed.mean()), error=float(error), chance=None, items=len(problems),
                **dict(zip(STAGES[:2], shares.mean(axis=0).tolist())),
                flagged=flagged([program for program, each in zip(programs, reached) if each]),
                per_kind={kind: float(np.mean(share)) for kind, share in kinds.items()},
                held_by=dict(Counter(held)))


def flagged(programs):
    """The share of programs in which bandit finds medium or high severity; None without it or them."""
    if not programs or not importlib.util.find_spec('bandit'):
        return None
    found = []
    with tempfile.TemporaryDirectory() as folder:
        list(prepare_data.secure_documents(enumerate(programs), folder, Counter(), found))
    return len(found) / len(programs)


# ---- what --eval=all measures -----------------------------------------------------------------------------

def measure_bpb(model, tokenizer, data, folder, n):
    """bits_per_byte of the whole validation split, its sources named."""
    domains = domain_of(model.config, data) if model.config.domains and model.told is None else None
    result = bits_per_byte(model, data.tokens['val'], data.docs['val'], domains=domains)
    return result | {key: {data.meta['sources'][i]: v for i, v in result[key].items()}
                     for key in ('per_source', 'per_source_error')}


def measure_anisotropy(model, tokenizer, data, folder, n):
    return dict(per_layer=anisotropy(model, data.tokens['val'], data.docs['val']))


def measure_text(model, tokenizer, data, folder, n):
    return text_quality(model, tokenizer, data, n or 256)


def measure_python(model, tokenizer, data, folder, n):
    problems = read_problems(folder)
    return python_tasks(model, tokenizer, problems[::-(-len(problems) // n)] if n else problems)


# what is no set of items: name -> (model, tokenizer, data set or None, folder of files, items or 0) -> dict
EVALS = {'bpb': measure_bpb, 'anisotropy': measure_anisotropy, 'text': measure_text, 'python': measure_python}
OF_DATA = ('bpb', 'anisotropy')                  # cannot do without the data set


def evaluation_sets(names, folder, tokenizer, own, say=print):
    """What 'all' or names and files, separated by commas, stand for: names in EVALS, and {name: eval_set}.

    folder: of evaluation files; own: of the run's data set, whose pairs are 'coherence', and where what is
    tokenized is kept; or None.
    """
    files, sets = prepare_data.eval_files(folder, own), {}
    if taken := files.keys() & EVALS.keys():
        raise UserError(f'{files[taken.pop()]} has the name of another evaluation: rename it')
    if names == 'all' and not Path(folder).is_dir():
        say(f'there is no folder {folder}: no evaluation sets from there')
    others = [name for name in EVALS if name != 'python' or problem_files(folder)]
    wanted = [*files, *others] if names == 'all' else [*dict.fromkeys(names.split(','))]
    for name in wanted:
        path = files.get(name, Path(name))
        if name in EVALS:
            continue
        if not path.exists():
            raise UserError(f'{name} is no evaluation and no file: put it into {folder}, or name some of '
                            f'{", ".join([*EVALS, *files])}')
        try:
            items = sets[path.name.split('.')[0] if name not in files else name] = prepare_data.eval_set(
                path, tokenizer, own and Path(own) / 'eval')
            prepare_data.say_left_out(name, items, say)
        except UserError as e:
            if names != 'all':
                raise
            say(f'left out: {e}')
    return [name for name in wanted if name in EVALS], sets


# ---- energy ------------------------------------------------------------------------------------------------

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
        watts = ram_watts(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2 ** 30)
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


# ---- learning dynamics -------------------------------------------------------------------------------------

# Progress at which a model is probed, and at its end: doubling where most is learned, then every tenth.
PROBES = (0, 0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PROBE_SHARE = 0.02      # of a run's time, at most: where probes cost more there are fewer of them


def linear_cka(x, y):
    """How alike two views (n, d), (n, d') of n inputs are, 0 to 1: |X^T Y|^2 / (|X^T X| |Y^T Y|) of centred
    columns, the same for any rotation and scale of either (Kornblith 2019, 1905.00414)."""
    x, y = (v.double() - v.double().mean(0) for v in (x, y))
    return ((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def pwcca(x, y):
    """Mean canonical correlation of x (n, d) and y (n, d'), a direction h_i of x weighing sum_j |h_i . x_j|,
    how much its neurons have of it (Morcos 2018, 1806.05759). Directions under 1e-6 of the largest variance
    are left out as noise. Unless n is far above d and d' it is high for views that have nothing in common."""
    x, y = (v.double() - v.double().mean(0) for v in (x, y))
    bases = []
    for v in (x, y):
        variance, turn = torch.linalg.eigh(v.T @ v)
        kept = variance > 1e-6 * variance[-1]
        bases.append(v @ turn[:, kept] / variance[kept].sqrt())
    u, correlation, _ = torch.linalg.svd(bases[0].T @ bases[1], full_matrices=False)
    weight = (x.T @ bases[0] @ u).abs().sum(0)
    return (weight @ correlation / weight.sum()).item()


def singular_values(x):
    """Of a matrix, largest first, by its smaller Gram matrix in float64: half an SVD's time, and exact to
    0.1 % down to 1e-6 of the largest; what is below counts as 0."""
    x = x.double() if len(x) <= x.shape[1] else x.double().T
    s = torch.linalg.eigvalsh(x @ x.T).flip(0).clamp(min=0).sqrt()
    return s * (s > 1e-6 * s[0])


def effective_rank(s):
    """Of r singular values: exp(-sum p log p) / r, p their shares: 1 where all are equal, 1 / r where one is
    not 0 (Roy 2007; as a share Diehl Martinez 2024, 2410.11451)."""
    return (torch.special.entr(s / s.sum()).sum().exp() / len(s)).item()


def condition_number(s):
    """The largest singular value over the smallest."""
    return (s.max() / s.min()).item()


def gini(x):
    """Inequality of N entries' sizes, sorted: sum_i (2 i - N - 1) x_i / (N sum x): 0 where all are equal."""
    x = torch.from_numpy(np.sort(x.abs().flatten().numpy())).double()     # 30 times as fast as torch's
    return ((2 * torch.arange(1, len(x) + 1) - len(x) - 1).double() @ x / (len(x) * x.sum())).item()


def hoyer(x):
    """Sparsity of N entries, (N^0.5 - |x|_1 / |x|_2) / (N^0.5 - 1): 0 where all are equal, 1 where only one
    is not 0 (Hoyer 2004)."""
    root, x = x.numel() ** 0.5, x.double()
    return ((root - x.abs().sum() / x.norm()) / (root - 1)).item()


def norms(x, s):
    """Of a matrix and its singular values: the root of all squares, the sum of s, the largest entry."""
    return dict(frobenius=s.norm().item(), nuclear=s.sum().item(), max_abs=x.abs().max().item())


def describe(x, core):
    """All measures of a matrix; core: itself, or a smaller one of the same singular values."""
    s = singular_values(core)
    return dict(effective_rank=effective_rank(s), condition_number=condition_number(s), gini=gini(x),
                hoyer=hoyer(x), **norms(x, s))


def ov_circuit(out, value):
    """What a head writes for what it reads, W_O W_V (Elhage 2021), and D x D of the same singular values, the
    only ones that are not 0; out (C, D), value (D, C)."""
    return out @ value, torch.linalg.qr(out).R @ torch.linalg.qr(value.T).R.T


def sketch(x, width=64):
    """Activations (n, d), centred, as (n, width) in fp16: a random projection, turned to where they vary by a
    power step (Halko 2011, 0909.4061). CKA of sketches was off by 0.01 at most between trained models 192
    wide, by 0.04 beside a fresh one; by 0.27 without the power step. PWCCA is that of these directions."""
    x = x.double() - x.double().mean(0)
    if x.shape[1] > width:
        random = torch.randn(x.shape[1], width, generator=torch.Generator().manual_seed(0)).double()
        x = x @ torch.linalg.qr(x.T @ (x @ random)).Q
    return (x / x.abs().max().clamp(min=1e-30)).half()


def alike(x, y, which):
    """Similarity of two sketches of one batch; nothing where one is missing."""
    return {} if y is None else {f'cka_{which}': linear_cka(x, y), f'pwcca_{which}': pwcca(x, y)}


def projection(module):
    """The matrix that a Linear, the last of an MLP or a Pattention multiplies with."""
    for part in ('down', 'values'):
        module = getattr(module, part, module)
    return module.weight


def circuits(attn, value, out):
    """Each head's OV circuit, as Probe.look has it of the projections: what it writes at each position, its
    matrix, and the gradient along both, (x, core) each."""
    (v, w_v, g_v), (_, w_o, g_o) = ([x for x, _ in parts] for parts in (value, out))
    D, group = attn.head_dim, attn.n_head // attn.n_kv_head
    for head in range(attn.n_head):
        o, k = slice(head * D, head * D + D), slice(head // group * D, head // group * D + D)
        change = ov_circuit(torch.cat([w_o[:, o], g_o[:, o]], 1), torch.cat([g_v[k], w_v[k]]))
        yield ov_circuit(v[:, k], w_o[:, o].T), ov_circuit(w_o[:, o], w_v[k]), change


class Probe:
    """Learning dynamics of a run: the value, output and MLP-down projection of each layer and the OV circuit
    of each head, measured again and again at the same places of validation text, about 256. Of an MLP
    with experts or domains it is the part that all share.

    state: what a resumed run needs: the numbers so far, and of each probe 32 KB of sketch a name.
    """

    def __init__(self, data, block_size, device):
        tokens, starts, T = data.tokens['val'], data.docs['val']['start'], min(64, block_size)
        some = starts[np.linspace(0, len(starts) - 1, max(1, 512 // T)).astype(int)]
        text = np.stack([tokens[i:i + T + 1] for i in some.clip(0, max(0, len(tokens) - T - 1))])
        text = torch.from_numpy(text.astype(np.int64)).to(device)
        self.idx, self.targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        self.state = dict(rows=[], sketches=[], due=0.0, cost=0.0, seconds=0.0)

    def look(self, model):
        """{name: (x, core), see describe, of activations (256, d), weight and gradient}, on the CPU."""
        outputs, weights, hooks, training = {}, {}, [], model.training

        def keep(i, module, args, out):
            outputs[f'{i}.mlp.down' if module is model.blocks[i].mlp else f'{i}.attn.proj'] = out
            if module is model.blocks[i].attn:  # one product makes queries, keys and, last, values
                with torch.no_grad():
                    packed = module.packed(*args[:2]).flatten(2)
                outputs[f'{i}.attn.v'] = packed[..., -module.n_kv_head * module.head_dim:]

        for i, block in enumerate(model.blocks):
            attn, mlp = block.attn, block.mlp
            hooks += [part.register_forward_hook(functools.partial(keep, i)) for part in (attn, mlp)]
            weights |= {f'{i}.{name}': projection(part) for name, part in
                        (('attn.v', attn.v), ('attn.proj', attn.proj), ('mlp.down', mlp))}
        try:
            loss = model.eval()(self.idx, self.targets, ahead=0.0)
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
        gradients = torch.autograd.grad(loss, list(weights.values()))      # no parameter's grad is touched
        found = {}
        for (name, weight), gradient in zip(weights.items(), gradients):
            parts = outputs[name][:, ::2].flatten(0, 1), weight, gradient
            found[name] = [(x, x) for x in (part.detach().float().cpu() for part in parts)]
        for i, attn in enumerate(block.attn for block in model.blocks):
            if isinstance(attn.v, Linear):      # Pattention has no matrix to make a circuit of
                heads = circuits(attn, found[f'{i}.attn.v'], found[f'{i}.attn.proj'])
                found |= {f'{i}.attn.ov.{head}': parts for head, parts in enumerate(heads)}
        return found

    def take(self, model, step, progress, total):
        """Measure once and set when next; total: seconds that the run will take, or inf. Returns the names of
        what is not finite, which goes without numbers."""
        began, state, row, kept, bad = time.monotonic(), self.state, {}, {}, []
        if state['rows'] and state['rows'][-1]['step'] == step:
            return bad                          # the end came where a probe was due, or after a resumption
        if not state['rows']:
            self.look(model)                    # the first time is slow, and is no guide to the others' cost
        warm, before = time.monotonic(), state['sketches'][-1] if state['sketches'] else {}
        for name, parts in self.look(model).items():
            row[name] = {}
            for kind, (x, core) in zip(('activation', 'weight', 'gradient'), parts):
                if not x.isfinite().all():
                    bad.append(f'{name} {kind}')
                    continue
                row[name] |= {f'{kind}_{key}': value for key, value in describe(x, core).items()}
                if kind == 'activation':
                    kept[name] = sketch(x)
                    row[name] |= alike(kept[name], before.get(name), 'previous')
        state['rows'].append(dict(step=step, progress=progress, values=row))
        state['sketches'].append(kept)
        state['cost'] = time.monotonic() - warm
        state['seconds'] += time.monotonic() - began
        rest = [p for p in PROBES if p > progress]      # as many of these as there is time for, evenly
        room = PROBE_SHARE * total - state['seconds']
        n = min(len(rest), room / state['cost'] - 3)    # the last probe and finish take about 3
        state['due'] = rest[math.ceil(len(rest) / n) - 1] if n >= 1 else math.inf
        return bad

    def finish(self):
        """What dynamics.json holds: {measure: [[a number or None for each name] for each probe]} and names,
        steps, progress. CKA and PWCCA to the final are known only now."""
        began, state = time.monotonic(), self.state
        rows, final = state['rows'], state['sketches'][-1]
        for row, kept in zip(rows, state['sketches']):
            for name, x in kept.items():
                row['values'][name] |= alike(x, final.get(name), 'final')
        names = list(dict.fromkeys(name for row in rows for name in row['values']))
        names.sort(key=lambda name: int(name.split('.')[0]))
        measures = sorted({key for row in rows for values in row['values'].values() for key in values})
        state['seconds'] += time.monotonic() - began

        def number(row, name, key):
            value = row['values'].get(name, {}).get(key, math.nan)
            return float(f'{value:.6g}') if math.isfinite(value) else None
        return dict(steps=[row['step'] for row in rows], progress=[row['progress'] for row in rows],
                    names=names, measures={key: [[number(row, name, key) for name in names] for row in rows]
                                           for key in measures})


# ---- the command -------------------------------------------------------------------------------------------

def complete(model, tokenizer, prompt, args, generator):
    """Print one streamed continuation, or args.samples made side by side; returns their tokens' number."""
    options = (args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator)
    if args.samples == 1:
        print(prompt, end='', flush=True)
        for tokens, piece in enumerate(stream(model, tokenizer, prompt, *options)):    # the last is no token
            print(piece, end='', flush=True)
        print()
        return tokens
    ids = [tokenizer.bos] + tokenizer.encode(prompt)
    idx = torch.tensor([ids] * args.samples, device=model.wte.weight.device)
    texts, open_rows = [[] for _ in range(args.samples)], set(range(args.samples))
    for new in model.generate(idx, *options):
        for row in list(open_rows):
            if new[row].item() == tokenizer.bos:
                open_rows.remove(row)
            else:
                texts[row].append(new[row].item())
        if not open_rows:
            break
    for number, ids in enumerate(texts, 1):
        print(f'--- {number}\n{prompt}{tokenizer.decode(ids)}')
    return sum(map(len, texts))


def interval(p, error, n):
    """95 % of a share p of n items, by Wilson (1927): as if of so many that its standard error is this."""
    smooth = (p * n + 1) / (n + 2)
    n = smooth * (1 - smooth) / error ** 2 if error else n
    middle, half = p + 1.92 / n, 1.96 * math.sqrt(p * (1 - p) / n + 0.96 / n ** 2)
    return max(0.0, (middle - half) / (1 + 3.84 / n)), min(1.0, (middle + half) / (1 + 3.84 / n))


def say_eval(name, result):
    """A row of --eval's table and, indented, accuracy on each part; or a line for each thing it says."""
    if 'accuracy' not in result:
        for key, value in result.items():
            parts = value.items() if isinstance(value, dict) else [('', v) for v in np.ravel(value)]
            print(f'{name} {key}: ' + ', '.join(f'{part} {v:.6g}'.strip() for part, v in parts))
        return
    low, high = interval(result['accuracy'], result['error'], result['items'])
    chance = '-' if result['chance'] is None else f'{result["chance"]:.4f}'
    shortest = f'{result["shortest"]:.4f}' if 'shortest' in result else '-'
    print(f'{name:24} {result["accuracy"]:8.4f}   {low:.4f} to {high:.4f} {chance:>8} {shortest:>10} '
          f'{result["items"]:8,} {result.get("ties", 0):6,}', flush=True)
    parts, real = result.get('per_field') or result.get('per_kind', {}), result.get('held_out')
    for part, share in sorted(parts.items(), key=lambda item: item[1]) if 1 < len(parts) < 21 else ():
        print(f'  {part:22} {share:8.4f}' + (f'   held-out text {real[part]:.4f}' if real else ''))
    for part in (*STAGES[:2], 'flagged', 'held_by'):
        if part in result:
            print(f'  {part:22} {result[part]}')
    if 'frequency_bias' in result:
        print(f'  frequency_bias {result["frequency_bias"]:.4f}, on the {result["replaced"]:,} pairs that '
              f'differ in a replacement')


def evaluate(model, tokenizer, args):
    """Print what --eval names as it is measured; --json keeps all of it, each paradigm too."""
    state, results, counts = read_checkpoint(args.run), {}, None
    folder = Path(state['data'])
    data = prepare_data.open_data(folder) if (folder / 'meta.json').exists() else None
    if data and data.meta['tokenizer_sha256'] != state['tokenizer']:
        print(f'{folder} has been prepared again with another vocabulary: it is not used')
        data = None
    elif data and data.meta['fingerprint'] != state['fingerprint']:
        print(f'{folder} has been prepared again since: this is not the text that the run was measured on')
    others, sets = evaluation_sets(args.eval, args.eval_data, tokenizer, data and folder)
    if data:
        counts = frequencies(data.tokens['train'], tokenizer.vocab_size)
    if sets or {'text', 'python'} & {*others}:
        print(f'{"task":24} accuracy    95 % interval     chance   shortest    items   ties')
    for name, items in sets.items():
        results[name] = judge(model, items, args.eval_items or None, not args.no_bos, counts=counts)
        say_eval(name, results[name])
    for name in others:
        if data is None and name in OF_DATA:
            print(f'{name}: not measured, the data of the run is not in {folder}')
            continue
        try:
            results[name] = EVALS[name](model, tokenizer, data, args.eval_data, args.eval_items)
        except UserError as e:
            if args.eval != 'all':
                raise
            print(f'left out: {e}')                # what was measured is worth more
            continue
        say_eval(name, results[name])
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(results, indent=1), encoding='utf-8')
        except OSError as e:
            raise UserError(f'{args.json} cannot be written ({e.strerror}): name another file') from e


def main(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('run', help='a folder that train.py wrote, or a checkpoint in it')
    parser.add_argument('prompt', nargs='?', default='', help='what to continue; empty begins a document')
    parser.add_argument('--file', help='a text file with one prompt a line')
    parser.add_argument('--interactive', action='store_true', help='read prompts until an empty line')
    parser.add_argument('--samples', type=int, default=1,
                        help='continuations of each prompt, made in one batch')
    parser.add_argument('--max_new_tokens', type=int, default=256)
    parser.add_argument('--temperature', type=float, default=0.8, help='0 takes the likeliest token always')
    parser.add_argument('--top_k', type=int, default=0, help='only the k likeliest tokens; 0 is all')
    parser.add_argument('--top_p', type=float, default=1.0,
                        help='only the likeliest tokens that together hold this probability')
    parser.add_argument('--stats', action='store_true',
                        help='say at the end what 1,000 tokens take in energy, and the KV cache holds')
    parser.add_argument('--country', default='world',
                        help=f'whose electricity it is, one of {", ".join(GRID)}, or grams of CO2e a kWh')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--eval', help="what to measure, with commas between: 'all', names of "
                        f'{", ".join(EVALS)} and of files in --eval_data, or files')
    parser.add_argument('--eval_data', default='data/eval', help='the folder of evaluation sets (data/eval)')
    parser.add_argument('--eval_items', type=int, default=0,
                        help='only so many items of sets, texts or problems; 0 is all')
    parser.add_argument('--no_bos', action='store_true', help='score texts without the BOS of training')
    parser.add_argument('--json', help='a file that keeps what --eval measured')
    parser.add_argument('--domain', help='the one that all text is of; else the prompt tells')
    args = parser.parse_intermixed_args(argv)      # the prompt may follow options
    for name, low, high in (('samples', 1, 4096), ('max_new_tokens', 1, 10 ** 9), ('temperature', 0, 100),
                            ('top_k', 0, 10 ** 9), ('eval_items', 0, 10 ** 9)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f'--{name} is {getattr(args, name)}, it must lie between {low} and {high}')
    if not 0 < args.top_p <= 1:
        raise UserError(f'--top_p is {args.top_p}, it must be above 0 and at most 1')
    if args.eval and args.stats:
        raise UserError('--stats says what a prompt takes, and --eval reads none: leave one away')
    if grid(args.country) is None:
        raise UserError(f'--country is {args.country!r}, it must be one of {", ".join(GRID)}, or the '
                        f'grams of CO2e a kWh')
    model, tokenizer = load(args.run, args.device)
    if args.domain:
        names = model.config.domains.split(',') if model.config.domains else []
        if args.domain not in names:
            raise UserError(f'--domain is {args.domain!r}, {args.run} has {", ".join(names) or "no domains"}')
        model.told = torch.tensor(names.index(args.domain), device=args.device)
    if args.eval:
        return evaluate(model, tokenizer, args)
    generator = torch.Generator(device=args.device).manual_seed(args.seed)
    energy, marks, tokens = Energy(args.device, time.monotonic()) if args.stats else None, [], 0
    if args.stats and 'measured' in energy.how['gpu'] + energy.how['cpu']:
        marks.append(energy.mark())
        time.sleep(3)                           # what the machine takes when it has nothing to do
    marks += [energy.mark()] if args.stats else []
    if args.file:
        try:
            prompts = Path(args.file).read_text(encoding='utf-8').splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f'{args.file} cannot be read as UTF-8 text: {e}') from e
        for prompt in prompts:
            tokens += complete(model, tokenizer, prompt, args, generator)
    elif args.interactive:
        while prompt := input('> '):
            tokens += complete(model, tokenizer, prompt, args, generator)
    else:
        tokens += complete(model, tokenizer, args.prompt, args, generator)
    if args.stats:                              # of --interactive, waiting for its user included
        say_cost(energy.how, [*marks, energy.mark()], tokens, args)
        print(f'KV cache: {KVCache(model, 1).values():,.0f} values a token and layer')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as e:
        print(f'sample.py: {e}', file=sys.stderr)
        sys.exit(2)
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)

"""Ask a trained model: complete prompts, measure it.

    python sample.py out/quickstart                                    one sample from an empty prompt
    python sample.py out/quickstart "Mia left the kite" --samples 3    three continuations at once
    python sample.py out/quickstart --file prompts.txt                 one continuation a line
    python sample.py out/quickstart --interactive                      a prompt at a time, until an empty line

What train.py measures at the end of a run stands here too: bits_per_byte and pair_accuracy.
"""
import argparse
import codecs
import hashlib
import math
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

import prepare_data
from model import GPT, GPTConfig
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
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError,
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
    model.load_state_dict(state['model'])
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


def batches(rows, max_tokens, block_size):
    """Rows (key, input, target) of similar length, longest first, padded into arrays of at most max_tokens.

    Yields keys, idx, targets.
    """
    rows = sorted(rows, key=lambda row: -len(row[1]))
    while rows:
        width = min(-(-len(rows[0][1]) // 16) * 16, block_size)     # few widths: a CPU keeps its plans
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
def bits_per_byte(model, tokens, docs, slices=SLICES, max_tokens=8192, stop=None, rank=0, world=1,
                  reduce=lambda sums: sums):
    """Bits per raw UTF-8 byte of a split, over its first `slices` of 1,024 stratified parts (by default all).

    tokens, docs: a split of prepare_data.open_data. model(idx, targets, reduction='none') gives nats a token.
    stop(), if given, is asked at every sixteenth of the way, and must answer alike on every rank; reduce adds
    an array over ranks. Each document is read from its BOS in windows of block_size; neither BOS nor the end
    of the document is counted. Returns bpb, its standard error over documents (0 for the whole split), loss,
    share of bytes, tokens, and bpb per source index.
    """
    block_size, device = model.config.block_size, next(model.parameters()).device
    group = -(-slices // 16) if stop else slices
    part, n_sources = deal(docs), int(docs['source'].max()) + 1
    ends = np.append(docs['start'][1:], len(tokens))
    sums = np.zeros((n_sources, 7))       # documents, bytes, bits, bytes^2, bits^2, bytes bits, tokens
    for first in range(0, slices, group):
        if first and stop():
            break
        mine = np.flatnonzero((part >= first) & (part < min(first + group, slices)))[rank::world]
        nats = dict.fromkeys(mine.tolist(), 0.0)
        rows = [(doc, x, y) for doc in nats
                for x, y in windows(tokens[docs['start'][doc]:ends[doc]], block_size)]
        for keys, idx, targets in batches(rows, max_tokens, block_size):
            idx, targets = torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)
            loss = model(idx, targets, reduction='none')
            for doc, value in zip(keys, loss.double().sum(dim=1).tolist()):
                nats[doc] += value
        add = np.zeros_like(sums)
        for doc, value in nats.items():
            n, bits = float(docs['bytes'][doc]), value / math.log(2)
            n_tokens = ends[doc] - docs['start'][doc] - 1
            add[docs['source'][doc]] += [1, n, bits, n * n, bits * bits, n * bits, n_tokens]
        sums += reduce(add)
    weight = np.bincount(docs['source'], weights=docs['bytes'], minlength=n_sources)
    count, n, bits, nn, bb, nb, n_tokens = sums.T
    seen = n > 0
    per_source = np.divide(bits, n, out=np.zeros_like(bits), where=seen)
    # variance of a ratio estimate, stratified by source, with the correction for a finite population
    spread = (bb - 2 * per_source * nb + per_source ** 2 * nn) / np.maximum(count - 1, 1) * count
    fraction = np.divide(n, weight, out=np.ones_like(n), where=weight > 0)
    error = np.sqrt(np.maximum(spread, 0) * np.maximum(1 - fraction, 0)) / np.maximum(n, 1)
    weight = weight * seen / (weight * seen).sum()
    return dict(bpb=float((weight * per_source).sum()), error=float(np.sqrt(((weight * error) ** 2).sum())),
                loss=float(bits.sum() * math.log(2) / n_tokens.sum()),
                share=float(n.sum() / docs['bytes'].sum()), tokens=int(n_tokens.sum()),
                per_source={int(i): float(per_source[i]) for i in np.flatnonzero(seen)})


@torch.no_grad()
def pair_accuracy(model, tokenizer, pairs, max_tokens=8192):
    """Share of pairs whose good ending is likelier than the bad one after the same context; a tie is wrong.

    pairs: dicts of kind, context, good, bad. A score is the sum, not the mean, of the ending's log-probs.
    Returns accuracy, its standard error, the number of pairs, and accuracy per kind.
    """
    device, block_size, rows = next(model.parameters()).device, model.config.block_size, []
    for number, pair in enumerate(pairs):
        context = [tokenizer.bos] + tokenizer.encode(pair['context'])
        both = {side: np.array([tokenizer.bos] + tokenizer.encode(pair['context'] + pair[side]))
                for side in ('good', 'bad')}
        # tokens may merge over the context's end: both are scored from the first that is not the context's
        seam = min(next((i for i, (a, b) in enumerate(zip(context, ids)) if a != b),
                        min(len(context), len(ids)))
                   for ids in both.values())
        for side, ids in both.items():
            x, y = ids[:-1], ids[1:].copy()
            y[:seam - 1] = -1
            rows.append(((number, side), x[-block_size:], y[-block_size:]))
    score = {}
    for keys, idx, targets in batches(rows, max_tokens, block_size):
        nats = model(torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device), reduction='none')
        score.update(zip(keys, nats.double().sum(dim=1).tolist()))
    right = [score[i, 'good'] < score[i, 'bad'] for i in range(len(pairs))]
    kinds = {}
    for pair, ok in zip(pairs, right):
        kinds.setdefault(pair['kind'], []).append(ok)
    accuracy = float(np.mean(right))
    return dict(accuracy=accuracy, error=math.sqrt(accuracy * (1 - accuracy) / len(pairs)), pairs=len(pairs),
                per_kind={kind: float(np.mean(ok)) for kind, ok in kinds.items()})


# ---- the command -------------------------------------------------------------------------------------------

def complete(model, tokenizer, prompt, args, generator):
    """Print one streamed continuation, or args.samples of them made side by side."""
    options = (args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator)
    if args.samples == 1:
        print(prompt, end='', flush=True)
        for piece in stream(model, tokenizer, prompt, *options):
            print(piece, end='', flush=True)
        print()
        return
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
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_intermixed_args(argv)      # the prompt may follow options
    for name, low, high in (('samples', 1, 4096), ('max_new_tokens', 1, 10 ** 9), ('temperature', 0, 100),
                            ('top_k', 0, 10 ** 9)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f'--{name} is {getattr(args, name)}, it must lie between {low} and {high}')
    if not 0 < args.top_p <= 1:
        raise UserError(f'--top_p is {args.top_p}, it must be above 0 and at most 1')
    model, tokenizer = load(args.run, args.device)
    generator = torch.Generator(device=args.device).manual_seed(args.seed)
    if args.file:
        try:
            prompts = Path(args.file).read_text(encoding='utf-8').splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f'{args.file} cannot be read as UTF-8 text: {e}') from e
        for prompt in prompts:
            complete(model, tokenizer, prompt, args, generator)
    elif args.interactive:
        while prompt := input('> '):
            complete(model, tokenizer, prompt, args, generator)
    else:
        complete(model, tokenizer, args.prompt, args, generator)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as e:
        print(f'sample.py: {e}', file=sys.stderr)
        sys.exit(2)
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)

"""Ask a trained model: complete prompts, measure it.

    python sample.py out/quickstart                                    one sample from an empty prompt
    python sample.py out/quickstart "Mia left the kite" --samples 3    three continuations at once
    python sample.py out/quickstart --file prompts.txt                 one continuation a line
    python sample.py out/quickstart --interactive                      a prompt at a time, until an empty line
    python sample.py out/babylm --pairs blimp.tar.xz                   minimal pairs: accuracy, frequency bias
    python sample.py out/quickstart "Mia" --stats                      and what the cache of the past takes

What train.py measures at the end of a run stands here too: bits_per_byte and pair_accuracy.
"""
import argparse
import codecs
import hashlib
import json
import lzma
import math
import pickle
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import prepare_data
from model import GPT, GPTConfig, KVCache
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
                  reduce=lambda sums: sums):
    """Bits per raw UTF-8 byte of a split, over its first `slices` of 1,024 stratified parts (by default all).

    tokens, docs: a split of prepare_data.open_data. model(idx, targets, reduction='none') gives nats a token.
    stop(), if given, is asked at every sixteenth of the way, and must answer alike on every rank; reduce adds
    an array over ranks. Each document is read from its BOS in windows of block_size; neither BOS nor the end
    of the document is counted. Returns bpb, its standard error over documents (0 for the whole split), loss,
    share of bytes, tokens, and bpb per source index.
    """
    group = -(-slices // 16) if stop else slices
    part, n_sources = deal(docs), int(docs['source'].max()) + 1
    ends = np.append(docs['start'][1:], len(tokens))
    sums = np.zeros((n_sources, 7))       # documents, bytes, bits, bytes^2, bits^2, bytes bits, tokens
    for first in range(0, slices, group):
        if first and stop():
            break
        mine = np.flatnonzero((part >= first) & (part < min(first + group, slices)))[rank::world]
        nats = document_nats(model, ((doc, tokens[docs['start'][doc]:ends[doc]]) for doc in mine.tolist()),
                             max_tokens)
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
def pair_scores(model, tokenizer, pairs, max_tokens=8192):
    """(pairs, 2) nats of the good and of the bad ending, given the context: sums, not means.

    pairs: dicts of context, good, bad. Every text begins with BOS.
    """
    device, block_size, rows = next(model.parameters()).device, model.config.block_size, []
    for number, pair in enumerate(pairs):
        context = [tokenizer.bos] + tokenizer.encode(pair['context'])
        both = [np.array([tokenizer.bos] + tokenizer.encode(pair['context'] + pair[side]))
                for side in ('good', 'bad')]
        # tokens may merge over the context's end: both are scored from the first that is not the context's
        seam = min(next((i for i, (a, b) in enumerate(zip(context, ids)) if a != b),
                        min(len(context), len(ids)))
                   for ids in both)
        for side, ids in enumerate(both):
            x, y = ids[:-1], ids[1:].copy()
            y[:seam - 1] = -1
            rows.append(((number, side), x[-block_size:], y[-block_size:]))
    score = np.zeros((len(pairs), 2))
    for keys, idx, targets in batches(rows, max_tokens, block_size):
        nats = model(torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device), reduction='none')
        score[tuple(zip(*keys))] = nats.double().sum(dim=1).tolist()
    return score


def pair_accuracy(model, tokenizer, pairs, score=None):
    """Share of pairs whose good ending is likelier than the bad one after the same context; a tie is wrong.

    pairs: dicts of kind, context, good, bad; score: what pair_scores says of them.
    Returns accuracy, its standard error, the number of pairs, and accuracy per kind.
    """
    score = pair_scores(model, tokenizer, pairs) if score is None else score
    right, kinds = score[:, 0] < score[:, 1], {}
    for pair, ok in zip(pairs, right):
        kinds.setdefault(pair['kind'], []).append(ok)
    accuracy = float(right.mean())
    return dict(accuracy=accuracy, error=math.sqrt(accuracy * (1 - accuracy) / len(pairs)), pairs=len(pairs),
                per_kind={kind: float(np.mean(ok)) for kind, ok in kinds.items()})


def read_pairs(path):
    """Minimal pairs of a .jsonl file, a folder or a tar of them (.gz, .xz): sentence_good and sentence_bad,
    as BLiMP has them (Warstadt 2020, 1912.00582), or context, good and bad, as the stories' pairs.jsonl.
    Returns them, and the places of lines that are none."""
    path, files, pairs, bad = Path(path), [], [], []
    try:
        if '.tar' in path.suffixes:
            with tarfile.open(path) as tar:
                files = [(m.name, tar.extractfile(m).read()) for m in tar if m.name.endswith('.jsonl')]
        elif path.is_dir():
            files = [(p.name, p.read_bytes()) for p in sorted(path.glob('*.jsonl'))]
        else:
            with open(path, 'rb') as raw:
                files = [(path.name, prepare_data.open_source(raw, path.name).read())]
    except (OSError, tarfile.TarError, lzma.LZMAError, EOFError) as e:
        raise UserError(f'{path} cannot be read ({type(e).__name__}: {e}): give .jsonl, a folder or a tar of '
                        f'them') from e
    for name, text in files:
        for number, line in enumerate(text.split(b'\n'), 1):
            try:
                row = json.loads(line or '{}')
                good, wrong = (row[side] if side in row else row[f'sentence_{side}']
                               for side in ('good', 'bad'))
                pairs.append(dict(kind=row.get('kind') or Path(name).name.split('.')[0], good=good, bad=wrong,
                                  context=row.get('context', '')))
            except (ValueError, KeyError, TypeError):
                bad += [f'{name} line {number:,}'] * bool(line.strip())
    if not pairs:
        raise UserError(f'{path} holds no minimal pairs: give .jsonl lines with sentence_good and '
                        f'sentence_bad')
    return pairs, bad


def frequency_bias(score, tokenizer, pairs, counts):
    """Accuracy where the good sentence has the more frequent tokens, less accuracy where the bad one has.

    Of the pairs that differ in a replacement: thirds by mean log-count of the tokens that only the good one
    has less that of the tokens that only the bad one has (Diehl Martinez 2024, 2410.11462). score: of
    pair_scores; counts (V,): of the training text. Returns the bias and how many pairs differ so.
    """
    log, rows = np.log(counts + 1.0), []
    for pair, (good, bad) in zip(pairs, score):
        mine, other = (Counter(tokenizer.encode(pair['context'] + pair[side])) for side in ('good', 'bad'))
        mine, other = list((mine - other).elements()), list((other - mine).elements())
        if mine and other:
            rows.append((log[mine].mean() - log[other].mean(), good < bad))
    delta, right = np.array(rows, float).reshape(-1, 2).T
    if not len(delta):
        return 0.0, 0
    low, high = np.quantile(delta, [1 / 3, 2 / 3])
    return float(right[delta >= high].mean() - right[delta <= low].mean()), len(delta)


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
    at = [np.minimum(dice.integers(1, length, n_pairs), (ends - starts)[some[rows]] - 1) for rows in (a, b)]
    states, hooks = [], [block.register_forward_hook(lambda _, __, out: states.append(out))
                         for block in model.blocks]
    try:
        model.trunk(torch.from_numpy(idx).to(model.wte.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cosine_similarity(x[a, at[0]].float(), x[b, at[1]].float(), dim=-1).mean().item()
            for x in states]


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


def judge(model, tokenizer, args):
    """Print accuracy on minimal pairs and, where the run's data is at hand, frequency bias and anisotropy."""
    pairs, bad = read_pairs(args.pairs)
    if bad:
        print(f'left out, no pair: {len(bad):,} lines, the first is {bad[0]}')
    score = pair_scores(model, tokenizer, pairs)
    result = pair_accuracy(model, tokenizer, pairs, score)
    for kind, accuracy in sorted(result['per_kind'].items(), key=lambda item: item[1]):
        print(f'{accuracy:7.4f}  {kind}')
    print(f'accuracy: {result["accuracy"]:.4f} +- {result["error"]:.4f} on {len(pairs):,} pairs, chance 0.5')
    folder = Path(read_checkpoint(args.run)['data'])
    if (folder / 'meta.json').exists():
        data = prepare_data.open_data(folder)
        counts = np.bincount(data.tokens['train'][:2 ** 26], minlength=tokenizer.vocab_size)
        bias, n = frequency_bias(score, tokenizer, pairs, counts)
        print(f'frequency_bias: {bias:.4f} on the {n:,} pairs that differ in a replacement')
        layers = ' '.join(f'{a:.3f}' for a in anisotropy(model, data.tokens['val'], data.docs['val']))
        print(f'anisotropy: {layers} after each layer')


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
    parser.add_argument('--stats', action='store_true', help='say at the end how much the KV cache holds')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--pairs', help='a .jsonl of minimal pairs, a folder or a tar of them')
    args = parser.parse_intermixed_args(argv)      # the prompt may follow options
    for name, low, high in (('samples', 1, 4096), ('max_new_tokens', 1, 10 ** 9), ('temperature', 0, 100),
                            ('top_k', 0, 10 ** 9)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f'--{name} is {getattr(args, name)}, it must lie between {low} and {high}')
    if not 0 < args.top_p <= 1:
        raise UserError(f'--top_p is {args.top_p}, it must be above 0 and at most 1')
    model, tokenizer = load(args.run, args.device)
    if args.pairs:
        return judge(model, tokenizer, args)
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
    if args.stats:
        print(f'KV cache: {KVCache(model, 1).values():,.0f} values a token and layer')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as e:
        print(f'sample.py: {e}', file=sys.stderr)
        sys.exit(2)
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)

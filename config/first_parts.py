"""What bench_mfu.py --first looks at (config/bench_first.py), a part a function.

A part is given settings, ideas, and what the parts before it found, {part: dict}, itself too where it is made again. It
yields dicts of what it finds, as it finds it; lists go on. What may break the process is named in `tried` first, and
passed over where it stands there already.
"""
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import bench_mfu
import model as m
import prepare_data
import sample
import train
from bench_mfu import Operations, kernel_cases, kernel_rows, measured, using, wait_for
from config import refuse
from config.bench_plan import OTHERWISE, RUNS, SEVERAL, THINNED, expected, law_of_repeats, runs_known
from config.bench_sweep import spoken

# an operation of a layer: the kernels that decide how it is done
JUDGED = dict(attention=('attention', 'qk_norm'), causal=(), add_norm=('rms_norm',), mlp=('mlp',),
              cross_entropy=('cross_entropy',))
WITHOUT = 'ours without kernels'
WRONG = 0.05                # of an output or a gradient, as model.Probe has it
CPU_TOKENS = 512            # of a step where a CPU is measured: a few seconds
STANDS_IN = 2 ** 22, 400    # tokens of a text that is not prepared, and of each of its documents
TRAINED = 0.9               # of a budget, the start left out: a tenth measures


def opened(s, ideas, **changes):
    """A run of these settings to measure, on text that stands in where none is prepared."""
    class Run(measured(ideas)):
        def gradients(self, n_micro):
            began, got = time.monotonic(), super().gradients(n_micro)
            self.of_gradients = time.monotonic() - began
            return got

        def corpus(self):
            corpus = super().corpus()
            if (corpus.folder / 'meta.json').exists():
                return corpus
            return SimpleNamespace(open=lambda: stand_in(corpus))

    if train.choose_device(s) == 'cpu':
        rows = max(1, min(s.micro_batch_size, CPU_TOKENS // s.block_size))
        changes = dict(tokens_per_step=rows * s.block_size) | changes
    return Run(s, **changes)


def stand_in(corpus):
    """Data of random ids, of as many as the text will have."""
    kind, (n, each) = prepare_data.TOKENIZERS[corpus.s.tokenizer], STANDS_IN
    ids = corpus.s.vocab_size if kind.kind == 'bpe' else kind().vocab_size
    tokens = np.random.default_rng(0).integers(1, ids, n).astype(np.uint32)
    tokens[::each] = 0
    docs = np.zeros(len(tokens[::each]), prepare_data.DOC)
    docs['start'] = np.arange(0, n, each)
    counts = dict(sources=dict(none=dict(documents=len(docs))))
    meta = dict(vocab_size=ids, bos=0, sources=['none'], splits=dict(train=counts, val=counts))
    return prepare_data.Data(corpus.folder, meta, dict(train=tokens, val=tokens), dict(train=docs, val=docs))


def asked_of_driver(what):
    """What nvidia-smi says of the first card; nothing where there is none."""
    try:
        done = subprocess.run(['nvidia-smi', '-i', '0', f'--query-gpu={what}', '--format=csv,noheader'],
                              capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    names = what.replace('.', '_').split(',')
    return dict(zip(names, done.stdout.strip().split(', '))) if not done.returncode else {}


def machine(s, ideas, found):
    device, memory = train.choose_device(s), sample.proc('meminfo')
    gib = {k: int(v) / 2 ** 20 for k, v in re.findall(r'(MemTotal|MemAvailable):\s+(\d+)', memory)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    yield dict(device=device, hardware=sample.hardware(device), processor=sample.hardware('cpu'), cores=cores,
               memory_gib=gib.get('MemTotal'), free_memory_gib=gib.get('MemAvailable'),
               python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
               triton=getattr(m.triton, '__version__', None),
               commit=sample.git_commit(), lacks=m.missing_compiler())
    host = torch.ones(2 ** 26, dtype=torch.uint8)
    there = torch.empty_like(host)
    yield dict(copying_gb_s=2 * host.numel() / 1e9 / train.seconds_of(lambda: there.copy_(host), 5))
    if device == 'cpu':
        return
    (free, total), card = torch.cuda.mem_get_info(), torch.cuda.get_device_properties(0)
    driver = re.search(r'\s(\d{3}\.\d[\d.]*)', sample.proc('driver/nvidia/version'))
    yield dict(cards=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
               capability='.'.join(map(str, torch.cuda.get_device_capability())), driver=driver and driver[1],
               processors=card.multi_processor_count, card_gib=total / 2 ** 30, free_card_gib=free / 2 ** 30)
    pinned, there = host.pin_memory(), torch.empty_like(host, device='cuda')
    ways = dict(to_card_gb_s=lambda: there.copy_(pinned, non_blocking=True),
                from_card_gb_s=lambda: pinned.copy_(there, non_blocking=True),
                to_card_unpinned_gb_s=lambda: there.copy_(host))
    yield {name: host.numel() / 1e9 / train.seconds_of(way, 5) for name, way in ways.items()}
    yield asked_of_driver('pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max,'
                          'power.limit,clocks.max.sm')


def disk(s, ideas, found):
    """Of the folder that texts are prepared in, or will be. The file has no name: nothing can leave it there."""
    folder = Path(s.data_dir).absolute()
    folder = next(place for place in (folder, *folder.parents) if place.exists())
    yield dict(disk_free_gb=shutil.disk_usage(folder).free / 1e9)
    with tempfile.TemporaryFile(dir=folder) as file:
        block, n, began = os.urandom(2 ** 24), 0, time.monotonic()
        while n < 2 ** 28 and time.monotonic() - began < 2:
            n += file.write(block)
            file.flush()
            os.fsync(file.fileno())
        yield dict(disk_write_gb_s=n / 1e9 / (time.monotonic() - began))
        if hasattr(os, 'posix_fadvise'):        # or memory is what would be read
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.monotonic()
        file.seek(0)
        while file.read(2 ** 24):
            pass
        yield dict(disk_read_gb_s=n / 1e9 / (time.monotonic() - began))


def peers(s, ideas, found):
    """Whether cards read each other's memory, and whether what is copied is what arrives."""
    for i, j in itertools.permutations(range(torch.cuda.device_count()), 2):
        pair = f'card {i} to card {j}'
        if pair in found.get('peers', {}).get('tried', ()):
            continue
        yield dict(tried=[pair])
        sent = torch.arange(2 ** 25, device=f'cuda:{i}')
        there = sent.to(f'cuda:{j}')
        right = torch.equal(there.cpu(), torch.arange(2 ** 25))
        with torch.cuda.device(i):
            seconds = train.seconds_of(lambda: there.copy_(sent), 3)
        yield dict(pairs=[dict(pair=pair, direct=torch.cuda.can_device_access_peer(i, j), right=right,
                               gb_s=sent.nbytes / 1e9 / seconds)])
        refuse(not right, 'what arrives is not what was sent: NCCL_P2P_DISABLE=1 does without')


def room(s, ideas, found):
    """Micro-batches of twice as many rows, and again, until there is no room, or of half as many until there is;
    without kernels and compiler, with which they take less."""
    run, whole = opened(s, ideas, compile='off', micro_batch_size=1), s.tokens_per_step // s.block_size
    on_card, T, began = run.device == 'cuda', run.config.block_size, time.monotonic()
    n, down, fits, seconds = min(s.micro_batch_size, whole) if on_card else 1, False, 0, 0.0
    run.step_model = run.model

    def work():
        run.batch_loss(**batch).backward()
        run.model.zero_grad()

    while n * T <= (2 ** 22 if on_card else 8192) and time.monotonic() - began + 5 * seconds < 8:
        try:
            if on_card:
                torch.cuda.reset_peak_memory_stats()
            batch = {k: t.to(run.device) for k, t in run.stream.batch(0, n, T).items()}
            with using(()):
                work()
                seconds = train.seconds_of(work, 1 + on_card)
            fits = n
            yield dict(sizes=[dict(rows=n, tok_per_sec=n * T / seconds, peak_gib=sample.peak_memory_gb(run.device))])
        except torch.OutOfMemoryError:
            yield dict(full_at=n)
            down = not fits
        if fits and (down or fits < n) or n == 1 and down:
            return
        n = n // 2 if down else 2 * n


def agreement(ours, reference, inputs):
    """How far outputs, and gradients, are from the reference's, as shares of these; None: there is no room for both."""
    leaves = [t.detach().requires_grad_() for t in inputs]

    def both(function):
        torch.manual_seed(0)
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.randn(o.shape, device=o.device).to(o.dtype) for o in outputs]
        return outputs, torch.autograd.grad(outputs, leaves, grads)

    def error(pairs):
        off = [(a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12) for a, b in pairs]
        return torch.stack(off).max().item()    # NaN if any is
    try:
        (o, do), (expected, d_expected) = both(ours), both(reference)
    except torch.OutOfMemoryError:              # of PyTorch's way: model.choose_kernels has tried fewer rows
        return None
    return error(zip(o, expected)), error(zip(do, d_expected))


def kernels(s, ideas, found):
    """Every kernel as model.choose_kernels tries it; then in its operation, compiled, beside PyTorch and rivals."""
    run = opened(s, ideas)
    config, device, dtype, T = run.config, run.device, run.dtype, run.config.block_size
    compile, rounds = run.compiling and device == 'cuda', 5 if device == 'cuda' else 2
    idx = torch.from_numpy(run.stream.first_rows(run.micro, T)).to(device).contiguous()
    rates = bench_mfu.machine(config, run.micro * T if device == 'cuda' else CPU_TOKENS, device, dtype)
    yield dict(rates=rates, shape=[*idx.shape], dtype=str(dtype)[6:])
    named, attended, kept = m.kernels_named(s.kernels), run.model.first_visible(idx), set()
    for method, names in JUDGED.items():
        if method in found.get('kernels', {}).get('tried', ()):
            continue
        yield dict(tried=[method])
        why = ''
        if names:                               # else with those of the operation before
            asked = [name for name in names if name in named]
            lines = m.choose_kernels(','.join(asked) or 'none', config, device, dtype, run.micro)
            kept, why = set(m.IN_USE), '; '.join(line for line in lines if line.split(':')[0].split(', ')[0] in names)
        with using(kept):
            name, *case, rivals, inputs = getattr(Operations(config, idx, attended, dtype, compile), method)()
        with using(()):
            without = getattr(Operations(config, idx, attended, dtype, compile), method)()[3]['ours']
        beside = {k: rival for k, rival in rivals.items() if compile or not k.startswith('compiled')}
        beside |= {WITHOUT: without} if kept else {}
        rows = kernel_rows(name, *case, beside, inputs, rounds, rates)
        yield dict(rows=rows)
        ours, reference, *_ = rivals.values()
        yield dict(checks=[judged(name, names, kept, why, rows, agreement(ours, reference, inputs))])
    modules = ideas.modules if device == 'cuda' else ()
    for name, *case, rivals, inputs in kernel_cases(modules, config, dtype, run.micro * T):
        if name not in found.get('kernels', {}).get('tried', ()):
            yield dict(tried=[name])
            inputs = [t.to(device) for t in inputs]
            rows, (ours, reference, *_) = kernel_rows(name, *case, rivals, inputs, rounds, rates), rivals.values()
            yield dict(rows=rows, checks=[judged(name, (), set(), '', rows, agreement(ours, reference, inputs))])


def judged(name, names, kept, why, rows, errors):
    """Whether the kernels of an operation, those kept of names, are used: right and faster than without them."""
    ms = {row['rival']: row['both_ms'] for row in rows if 'both_ms' in row}
    ours, without = ms.get('ours', math.inf), ms.get(WITHOUT, math.inf)
    errors = errors or (None, None)
    off = [error for error in errors if error is not None and not error < WRONG]        # NaN is
    if kept and off:
        why, kept = f'its result differs by {off[-1]:.0%}', ()
    elif kept and not ours < without:
        why, kept = f'{ours:.3f} ms with it, {without:.3f} without', ()
    winner = min(ms, key=ms.get, default=None)
    return dict(operation=name, kernels=[*names], used=sorted({*kept} & {*names}), forward_error=errors[0],
                gradient_error=errors[1], ms=ms.get('ours'), without_ms=ms.get(WITHOUT), winner=winner,
                winner_ms=ms.get(winner), why=why)


def step(s, ideas, found):
    """A step as it will be, and without what it is quicker with: compiler and kernels."""
    on_card, rates = train.choose_device(s) == 'cuda', found.get('kernels', {}).get('rates')
    ways = {'eager': dict(compile='off')} | ({'compiled': {}} if s.compile != 'off' else {})
    ways |= {f'{[*ways][-1]}, without kernels': dict(kernels=()) | [*ways.values()][-1]} if on_card else {}
    first, alone = None, 0.0                    # a CPU drifts: there the first takes its turns with the next
    for name, changes in ways.items():
        if name in found.get('step', {}).get('tried', ()) or 'kernels' in changes and not m.IN_USE:
            continue
        yield dict(tried=[name])
        if on_card:
            torch.cuda.reset_peak_memory_stats()
        began, run = time.monotonic(), opened(s, ideas, **changes)
        if run.kernels is None:
            run.choose_kernels()
        model, tokens = run.model, run.step()
        wait_for(run.device)
        started, seconds, peak = time.monotonic() - began, [], run.peak()
        while len(seconds) < 2 or len(seconds) < 8 and np.sum(seconds) < 3:
            seconds.append([seconds_of_step(one) for one in [run, first] if one])
        each, *again = np.median(seconds, 0).tolist()
        each *= alone / again[0] if again else 1
        rates = rates or bench_mfu.machine(run.config, min(tokens, CPU_TOKENS), run.device, run.dtype)
        # a CPU's was of fewer micro-batches than the run's, with all of the optimizer's work
        tok_per_sec = s.tokens_per_step / (each + (s.tokens_per_step / tokens - 1) * run.of_gradients)
        flops = tok_per_sec * run.flops_per_token
        row = dict(way=name, compiled=run.compiling, kernels=sorted(m.IN_USE) if run.kernels is None else [],
                   tokens=tokens, micro_batch_size=run.micro, start_s=started - each, step_ms=1e3 * each,
                   tok_per_sec=tok_per_sec, of_gemm=flops / rates['gemm'], mfu=flops / peak if peak else None,
                   peak_gib=sample.peak_memory_gb(run.device), parameters=model.params()['total'])
        yield dict(ways=[row])
        products = tokens * model.flops_per_token(0) / rates['gemm']
        floors = {'matrix products': products, 'attention': tokens * run.flops_per_token / rates['gemm'] - products,
                  'optimizer': 28 * row['parameters'] / rates['copy']}          # bytes: weights, gradients, moments
        where = bench_mfu.where_time_goes(run, run.device, 3 if on_card else 1)
        shares = {what: where['busy_share'] * share for what, share in where['shares'].items() if share}
        yield dict(parts=[dict(way=name, part=what, share=share, ms=1e3 * each * share,
                               floor_ms=1e3 * floors[what] if what in floors else None)
                          for what, share in (shares | {'idle': 1 - where['busy_share']}).items()])
        if not on_card:
            first, alone = first or run, alone or each
            continue
        run.batches.close()
        run.optimizers = None                   # their memory is wanted


def seconds_of_step(run):
    began = time.monotonic()
    run.step()
    wait_for(run.device)
    return time.monotonic() - began


def best_way(s, found):
    """The way of making a step with which the budget buys most, and the seconds that it trains."""
    def trained(way):
        return TRAINED * 60 * s.budget_minutes - way['start_s']
    ways = found.get('step', {}).get('ways', [])
    refuse(not ways, 'no step was measured')
    best = max(ways, key=lambda way: trained(way) * way['tok_per_sec'])
    return best, max(0, trained(best))


def buys(s, ideas, found):
    """What the budget will buy at the best of the speeds, and what a law of repeated text expects of it."""
    way, seconds = best_way(s, found)
    tokens = seconds * way['tok_per_sec']
    yield dict(minutes=s.budget_minutes, tokens=round(tokens), tokens_a_parameter=tokens / way['parameters'])
    meta = ideas.seam(prepare_data.Corpus)(s).folder / 'meta.json'
    if not meta.exists():
        return
    text = json.loads(meta.read_text())['splits']['train']
    yield dict(tokens_of_text=text['tokens'], epochs=tokens / text['tokens'])
    known = runs_known(RUNS)
    p, residuals = law_of_repeats(known)
    several, thinned = vars(s).get(SEVERAL, 1), vars(s).get(THINNED, 0.0)
    if OTHERWISE & {name for name, _, named in ideas.sources() if named}:
        return                                  # of these the law knows nothing
    row = np.array([[way['parameters'] / several, text['bytes'], text['bytes'] * tokens / text['tokens'], several, thinned]])
    off = np.random.default_rng(0).choice(residuals, len(p)) * np.sign(np.arange(len(p)))      # not of the first
    far = [f'{what} are {value / most:.1f} times the most' for what, value, most in zip(
        ('parameters', 'bytes of text', 'bytes read'), row[0], known.max(0)) if value > 1.5 * most]
    yield dict(val_bpb=spoken(np.exp(expected(p, row)[:, 0] + off)), no_guide=far)

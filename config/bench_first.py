"""--first: what one types first on a rented machine; three minutes at most.

    python bench_mfu.py --first                             with config/babylm.py; on a CPU too
    python bench_mfu.py --first config/mine.py --dollars_per_hour=0.4

Says what this machine is and whether it works: card, driver, memory, PCIe, disk, copies between cards; every
kernel against PyTorch, forward and gradients, and beside its rivals; a step by parts beside the roofline; the
largest micro-batch that fits; what the budget will buy. Text that is not prepared yet is stood in for.

What to set comes as a config, to be named last: train.py config/babylm.py config/this_machine.py. A kernel that is
wrong, breaks its process or is no faster than doing without is off there. out/first/first.json and first.html
hold all of it and nothing personal: attach them to a report. Each part is a process of its own, with a limit of time;
what it fails with is a line.
"""
import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
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
from bench_mfu import Operations, kernel_cases, kernel_rows, measured, table_block, text_table, using, wait_for
from config import CONFIG, refuse
from config.bench_doll import TRAINED
from config.bench_plan import RUNS, expected, law_of_repeats, runs_known
from config.bench_sweep import spoken

first: bool = False         # look at this machine, and say what to set
part: str = ''              # a file for what one part finds, in the process that --first made for it

# an operation of a layer: the kernels that decide how it is done
JUDGED = dict(attention=('attention', 'qk_norm'), causal=(), add_norm=('rms_norm',), mlp=('mlp',),
              cross_entropy=('cross_entropy',))
WITHOUT = 'ours without kernels'
WRONG = 0.05                # of an output or a gradient, as model.Probe has it
LEAST_AGAIN = 10            # seconds that a part which broke must have left to be made once more
CPU_TOKENS = 512            # of a step where a CPU is measured: a few seconds
STANDS_IN = 2 ** 22, 400    # tokens of a text that is not prepared, and of each of its documents


# ---- the parts: each yields what it has found so far, a dict; lists go on

def opened(s, ideas, **changes):
    """A run of these settings to measure, on text that stands in where none is prepared."""
    class Run(measured(ideas)):
        def gradients(self, n_micro):
            began, got = time.monotonic(), super().gradients(n_micro)
            self.of_gradients = time.monotonic() - began
            return got

        def corpus(self):
            corpus = super().corpus()
            return corpus if (corpus.folder / 'meta.json').exists() else SimpleNamespace(open=lambda: stand_in(corpus))

    if train.choose_device(s) == 'cpu':
        changes = dict(tokens_per_step=max(1, min(s.micro_batch_size, CPU_TOKENS // s.block_size)) * s.block_size) | changes
    return Run(s, **changes)


def stand_in(corpus):
    """Data of random ids, as many as the text will have."""
    kind, (n, each) = prepare_data.TOKENIZERS[corpus.s.tokenizer], STANDS_IN
    ids = corpus.s.vocab_size if kind.kind == 'bpe' else kind().vocab_size
    tokens = np.random.default_rng(0).integers(1, ids, n).astype(np.uint32)
    tokens[::each] = 0
    docs = np.zeros(len(tokens[::each]), prepare_data.DOC)
    docs['start'] = np.arange(0, n, each)
    meta = dict(vocab_size=ids, bos=0, sources=['none'], splits=dict(train=dict(sources=dict(none=dict(documents=len(docs))))))
    return prepare_data.Data(corpus.folder, meta, dict(train=tokens, val=tokens), dict(train=docs, val=docs))


def asked_of_driver(what):
    """What nvidia-smi says of the first card; nothing where there is none."""
    try:
        done = subprocess.run(['nvidia-smi', '-i', '0', f'--query-gpu={what}', '--format=csv,noheader'],
                              capture_output=True, text=True, timeout=5)
        return dict(zip(what.replace('.', '_').split(','), done.stdout.strip().split(', '))) if not done.returncode else {}
    except (OSError, subprocess.TimeoutExpired):
        return {}


def machine(s, ideas, found):
    device, memory = train.choose_device(s), sample.proc('meminfo')
    gib = {k: int(v) / 2 ** 20 for k, v in re.findall(r'(MemTotal|MemAvailable):\s+(\d+)', memory)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    yield dict(device=device, hardware=sample.hardware(device), processor=sample.hardware('cpu'), cores=cores,
               memory_gib=gib.get('MemTotal'), free_memory_gib=gib.get('MemAvailable'), python=platform.python_version(),
               torch=torch.__version__, cuda=torch.version.cuda, triton=getattr(m.triton, '__version__', None),
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
                from_card_gb_s=lambda: pinned.copy_(there, non_blocking=True), to_card_unpinned_gb_s=lambda: there.copy_(host))
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
                               gb=sent.nbytes / 1e9 / seconds)])


def room(s, ideas, found):
    """Micro-batches of two, four, eight times as many rows, until there is no room; without kernels and compiler,
    which both take less."""
    run, whole = opened(s, ideas, compile='off', micro_batch_size=1), s.tokens_per_step // s.block_size
    on_card, T, began = run.device == 'cuda', run.config.block_size, time.monotonic()
    run.step_model, n, down, fits = run.model, min(s.micro_batch_size, whole) if on_card else 1, False, 0
    seconds = 0

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
    compile = run.compiling and device == 'cuda'             # a CPU has no kernels, and takes a minute
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
        rows = kernel_rows(name, *case, rivals | {WITHOUT: without} if kept else rivals, inputs, 5 if device == 'cuda' else 2, rates)
        yield dict(rows=rows)
        yield dict(checks=[judged(name, names, kept, why, rows, agreement(*[*rivals.values()][:2], inputs))])
    for name, *case, rivals, inputs in kernel_cases(ideas.modules if device == 'cuda' else (), config, dtype, run.micro * T):
        if name not in found.get('kernels', {}).get('tried', ()):
            yield dict(tried=[name])
            inputs = [t.to(device) for t in inputs]
            yield dict(rows=(rows := kernel_rows(name, *case, rivals, inputs, 5 if device == 'cuda' else 2, rates)))
            yield dict(checks=[judged(name, (), set(), '', rows, agreement(*[*rivals.values()][:2], inputs))])


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
    return dict(operation=name, kernels=', '.join(names), used=sorted({*kept} & {*names}), forward_error=errors[0],
                gradient_error=errors[1], ms=ms.get('ours'), without_ms=ms.get(WITHOUT), winner=min(ms, key=ms.get, default=None),
                winner_ms=min(ms.values(), default=None), why=why)


def step(s, ideas, found):
    """A step as it will be, and without what it is quicker with: compiler and kernels."""
    on_card, rates = train.choose_device(s) == 'cuda', found.get('kernels', {}).get('rates')
    ways = {'eager': dict(compile='off')} | ({'compiled': {}} if s.compile != 'off' else {})
    ways |= {f'{[*ways][-1]}, without kernels': dict(kernels=()) | [*ways.values()][-1]} if on_card else {}
    for name, changes in ways.items():
        if name in found.get('step', {}).get('tried', ()):
            continue
        yield dict(tried=[name])
        began, run = time.monotonic(), opened(s, ideas, **changes)
        if run.kernels is None:
            run.choose_kernels()
        model, tokens = run.model, run.step()
        wait_for(run.device)
        started, seconds = time.monotonic() - began, []
        while len(seconds) < 2 or len(seconds) < 8 and sum(seconds) < 3:
            began = time.monotonic()
            run.step()
            wait_for(run.device)
            seconds.append(time.monotonic() - began)
        each, peak = statistics.median(seconds), run.peak()
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
        yield dict(parts=[dict(way=name, part=what, share=share, ms=1e3 * each * where['busy_share'] * share, floor_ms=(
            1e3 * floors[what] if what in floors else None)) for what, share in where['shares'].items() if share])
        run.batches.close()
        run.optimizers = None                   # their memory is wanted


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
    row = np.array([[way['parameters'], text['bytes'], text['bytes'] * tokens / text['tokens'], 1, 0]])
    off = np.random.default_rng(0).choice(residuals, len(p)) * np.sign(np.arange(len(p)))      # not of the first
    far = [f'{what} are {value / most:.1f} times the most' for what, value, most in zip(
        ('parameters', 'bytes of text', 'bytes read'), row[0], known.max(0)) if value > 1.5 * most]
    yield dict(val_bpb=spoken(np.exp(expected(p, row)[:, 0] + off)), no_guide=far)


# name: (seconds that it may take beside what those before left, what makes it)
PARTS = dict(machine=(16, machine), disk=(10, disk), peers=(12, peers), room=(15, room), kernels=(50, kernels), step=(50, step),
             buys=(12, buys))


# ---- what comes of it

def best_way(s, found):
    """The way of making a step with which the budget buys most, and the seconds that it trains."""
    def trained(way):
        return TRAINED * 60 * s.budget_minutes - way['start_s']
    ways = found.get('step', {}).get('ways', [])
    refuse(not ways, 'no step was measured')
    best = max(ways, key=lambda way: trained(way) * way['tok_per_sec'])
    return best, max(0, trained(best))


def recommended(s, found):
    """Settings that make no run worse, as far as parts have found something; and {kernel: why it is off}."""
    settings, off, tried = {}, {}, found.get('kernels', {})
    for check in tried.get('checks', []):
        named = [name for name in check['kernels'].split(', ') if name]
        off |= {name: check['why'] for name in named if name not in check['used']}
    for method, why in tried.get('broken', {}).items():
        off |= dict.fromkeys(JUDGED.get(method, ()), f'its process ended: {why}')
    sizes = found.get('room', {}).get('sizes')
    if sizes and found['device'] == 'cuda':
        speeds, most = {row['rows']: row['tok_per_sec'] for row in sizes}, s.tokens_per_step // s.block_size
        asked = min(s.micro_batch_size, max(speeds), most)
        best = max((n for n in speeds if n <= most), key=speeds.get, default=asked)
        settings['micro_batch_size'] = best if speeds[best] > 1.03 * speeds.get(asked, 0) else asked
    if found['device'] == 'cuda' and (tried.get('checks') or tried.get('broken')):
        used = [name for name in m.KERNELS if name in m.kernels_named(s.kernels) and name not in off]
        but = [f'-{name}' for name in m.KERNELS if name not in used]
        settings['kernels'] = 'none' if not used else ','.join(but) or 'all'
    if found.get('step', {}).get('ways'):
        way, _ = best_way(s, found)
        settings['compile'] = 'on' if way['compiled'] else 'off'
        if way['way'].endswith('without kernels'):
            settings['kernels'] = 'none'
    return settings, off


# ---- a process for each part

def make(own, rest):
    """What the process of a part does: leaves what it finds, as it finds it, in the file own.part."""
    file = Path(own.part)
    found = json.loads((file.parent / 'found.json').read_text())
    mine = found.get(file.stem, {})
    s, ideas = train.read_settings(rest)
    vars(s).update(recommended(s, found)[0])
    for piece in PARTS[file.stem][1](s, ideas, found):
        add(mine, piece)
        sample.write_beside(file, lambda f: f.write(sample.as_json(mine).encode()))


def add(found, piece):
    """Takes in what a part has yielded: lists go on."""
    found |= {k: found.get(k, []) + v if isinstance(v, list) else v for k, v in piece.items()}


def command(file, rest):
    return [sys.executable, bench_mfu.__file__, '--first', f'--part={file}', *rest]


def bounded(name, until, folder, rest, found):
    """What a part finds until then. One that breaks as it tries something is made again, without that."""
    file, log, mine = folder / f'{name}.json', folder / f'{name}.log', {}
    began, broken = time.monotonic(), {}
    while True:
        tried = len(mine.get('tried', ()))
        sample.write_beside(folder / 'found.json', lambda f: f.write(json.dumps(found | {name: mine}).encode()))
        with open(log, 'wb') as errors:
            child = subprocess.Popen(command(file, rest), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                     stderr=errors, start_new_session=True)
        try:
            code = child.wait(max(1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(OSError):   # and what it has started
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        said = (log.read_text(errors='replace').strip() or f'exit code {code}').splitlines()[-1]
        why = '' if code == 0 else ('it was stopped, its time was over' if code is None else
                                    f'killed by {signal.Signals(-code).name}' if code < 0 else impersonal(said))
        try:
            mine = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            mine, why = {}, why or 'it left nothing that can be read'
        tried = mine.get('tried', [])[tried:]
        broken |= {tried[-1]: why} if why and tried else {}
        if not (why and tried and until - time.monotonic() > LEAST_AGAIN):
            return mine | dict(broken=broken, fault=why, seconds=time.monotonic() - began)


def impersonal(text):
    """A sentence without the folders of the files that it names."""
    return re.sub(r'''(?<![\w/.])~?/([^\s'":;,()]*/)*''', '', text.removeprefix('bench_mfu.py: '))[:200]


def facts(found):
    """[[what, value]] of what a part found, but for its tables and what became of it."""
    return [[k.replace('_', ' '), v] for k, v in found.items() if v not in (None, '', {}) and k not in UNTOLD
            and not (isinstance(v, list) and v and isinstance(v[0], dict))]


def words(v):
    """A value as it is printed."""
    if isinstance(v, float):
        return f'{v:,.0f}' if v >= 1000 else f'{v:.4g}'
    return f'{v:,}' if type(v) is int else ', '.join(map(str, v)) if isinstance(v, list) else str(v)


UNTOLD = 'tried', 'broken', 'fault', 'seconds', 'device'
TABLES = dict(      # (part, list in it): title, note, columns
    pairs=('peers', 'Copies between cards', 'direct: peer to peer; right: what was sent arrived.',
           dict(pair=None, direct=None, right=None, gb=1)),
    sizes=('room', 'Micro-batches', 'Without kernels and compiler.', dict(rows=0, tok_per_sec=0, peak_gib=2)),
    checks=('kernels', 'Kernels', 'ms: forward and backward of one layer, with the kernels and without; errors: shares of '
            'what PyTorch makes.', dict(operation=None, used=None, forward_error='.1e', gradient_error='.1e', ms=3,
                                        without_ms=3, winner=None, winner_ms=3, why=None)),
    rows=('kernels', 'Rivals', 'both: forward and backward; floor: what products and copies measured here take.', dict(
        operation=None, rival=None, ms=3, floor_ms=3, both_ms=3, floor_both_ms=3, mem_mb=0, fault=None)),
    ways=('step', 'A step', 'start: seconds before the first; of gemm: of matrix products measured here.', dict(
        way=None, tokens=0, micro_batch_size=0, start_s=1, step_ms=1, tok_per_sec=0, of_gemm='.0%', mfu='.1%', peak_gib=2)),
    parts=('step', 'A step by parts', 'floor: at the rates of products and copies measured here.',
           dict(way=None, part=None, share='.0%', ms=1, floor_ms=1)))


def told(found, settings, off, faults):
    """The blocks of the page."""
    buys = found.get('buys', {})
    no_law = buys.get('no_guide')
    if buys.get('val_bpb') and no_law:
        buys = buys | dict(val_bpb=f'{buys["val_bpb"]}, by a law that is no guide here')
    yield dict(kind='facts', title='This machine', rows=facts(found.get('machine', {})) + facts(found.get('disk', {})))
    yield dict(kind='facts', title='What the budget buys', rows=facts(buys), note='' if 'epochs' in buys else
               'How many epochs, and what to expect, is known when prepare_data.py has prepared the text.')
    yield dict(kind='facts', title='Recommended', rows=[[k, repr(v)] for k, v in settings.items()])
    if off and found['device'] == 'cuda':
        yield dict(kind='facts', title='Kernels that are off', rows=[[k, why] for k, why in off.items()])
    if faults:
        yield dict(kind='facts', title='What failed', rows=faults)
    for key, (name, title, note, columns) in TABLES.items():
        if rows := found.get(name, {}).get(key):
            rows = [row | {k: ', '.join(v) for k, v in row.items() if isinstance(v, list)} for row in rows]
            yield table_block(title, note, columns, rows) | dict(printed=columns)


def main(own, rest, argv):
    if own.part:
        return make(own, rest)
    rest = rest if any(not a.startswith('--') for a in rest) else [str(CONFIG / 'babylm.py'), *rest]
    s, ideas = train.read_settings(rest)        # its mistakes, and a card that torch cannot use, end this at once
    until, faults = max(train.STARTED, time.monotonic() - 20), []
    found = dict(made=f'{datetime.date.today()}', configs=[Path(a).stem for a in rest if not a.startswith('--')],
                 device=train.choose_device(s), shape={k: vars(s)[k] for k in train.SHAPE})
    print(f'{sample.hardware(found["device"])}: {sum(seconds for seconds, _ in PARTS.values())} seconds at most', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, (seconds, _) in PARTS.items():
            until += seconds
            if name == 'peers' and (found['device'] == 'cpu' or torch.cuda.device_count() < 2):
                continue
            found[name] = bounded(name, until, Path(folder), rest, found)
            mine = [[f'{name}, {what}', why] for what, why in found[name]['broken'].items()]
            mine += [[name, why] for why in [found[name]['fault']] if why and why not in found[name]['broken'].values()]
            print(f'{name}: {found[name]["seconds"]:.0f} s', *(f'  {what}: {why}' for what, why in mine), sep='\n', flush=True)
            faults += mine
    settings, off = recommended(s, found)
    dollars = s.dollars_per_hour * s.budget_minutes / 60
    found['buys'] = found.get('buys', {}) | (dict(dollars=dollars) if dollars else {})
    out, blocks = Path('out/first'), [*told(found, settings, off, faults)]
    for block in blocks:
        columns = block.pop('printed', None)
        print('', block['title'], *(text_table(columns, block['rows']) if columns else [
            f'  {what}: {words(value)}' for what, value in block['rows']]), block.get('note') or '', sep='\n')
    out.mkdir(parents=True, exist_ok=True)
    found |= dict(recommended=settings, off=off)
    sample.write_beside(out / 'first.json', lambda f: f.write(sample.as_json(found, indent=1).encode()))
    sample.write_page(out / 'first.html', f'{sample.hardware(found["device"])}, {found["made"]}', blocks=blocks)
    about = f'"""Settings for this machine, {sample.hardware(found["device"])}; by bench_mfu.py --first, {found["made"]}."""'
    text = '\n'.join([about, *(f'{k} = {v!r}' for k, v in settings.items()), ''])
    sample.write_beside(CONFIG / 'this_machine.py', lambda f: f.write(text.encode()))
    print(f'train with config/this_machine.py as the last config; {out / "first.json"} and first.html are for a report')

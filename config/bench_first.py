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
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import bench_mfu
import model as m
import sample
import train
from bench_mfu import table_block, text_table
from config import CONFIG
from config.first_parts import JUDGED, best_way, buys, disk, kernels, machine, peers, room, step

first: bool = False         # look at this machine, and say what to set
part: str = ''              # a file for what one part finds, in the process that --first made for it

# name: (seconds that it may take, with what those before it left; what makes it)
PARTS = dict(machine=(25, machine), disk=(20, disk), peers=(15, peers), room=(20, room), kernels=(35, kernels),
             step=(30, step), buys=(15, buys))
STOPPED = 'it was stopped, its time was over'
LEAST_AGAIN = 10            # seconds that a part which broke must have left to be made once more
FASTER = 1.03               # by how much another micro-batch must be, or the config's stays
FULL = 0.9                  # of a card's memory, what a micro-batch that was not asked for may take


# ---- what comes of it

def recommended(s, found):
    """Settings that make no run worse, as far as parts have found something; and {kernel: why it is off}."""
    settings, off, tried = {}, {}, found.get('kernels', {})
    for check in tried.get('checks', []):
        off |= {name: check['why'] for name in check['kernels'] if name not in check['used']}
    for method, why in tried.get('broken', {}).items():
        if why != STOPPED:                       # a run tries each again, and knows what it does not answer
            off |= dict.fromkeys(JUDGED.get(method, ()), f'its process ended: {why}')
    most, card = s.tokens_per_step // s.block_size, found.get('machine', {}).get('card_gib', math.inf)
    sizes = found.get('room', {}).get('sizes', []) if found['device'] == 'cuda' else ()      # a CPU is adapted to
    speeds = {row['rows']: row['tok_per_sec'] for row in sizes if row['rows'] <= s.micro_batch_size or (
        row['rows'] <= most and row['peak_gib'] < FULL * card)}
    if speeds:
        asked, best = min(s.micro_batch_size, most, max(speeds)), max(speeds, key=speeds.get)
        settings['micro_batch_size'] = best if speeds[best] > FASTER * speeds.get(asked, 0) else asked
    if found['device'] == 'cuda' and (tried.get('checks') or tried.get('broken')):
        unused = [f'-{name}' for name in m.KERNELS if name in off or name not in m.kernels_named(s.kernels)]
        settings['kernels'] = 'none' if len(unused) == len(m.KERNELS) else ','.join(unused) or 'all'
    if found.get('step', {}).get('ways'):
        way, _ = best_way(s, found)
        if len(found['step']['ways']) > 1 or found['step'].get('broken', {}).get('compiled', STOPPED) != STOPPED:
            settings['compile'] = 'on' if way['compiled'] else 'off'         # else a compiler had no time
        if way['way'].endswith('without kernels'):
            settings['kernels'] = 'none'
    return settings, off


# ---- a process for each part

def make(own, rest):
    """What the process of a part does: leaves what it finds, as it finds it, in the file own.part."""
    file = Path(own.part)
    found = json.loads((file.parent / 'found.json').read_text())
    mine = found[file.stem]
    signal.alarm(math.ceil(found['seconds']) + 5)            # should nobody be left who stops it
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
        left = max(1, until - time.monotonic())
        known = json.dumps(found | {name: mine, 'seconds': left}).encode()
        sample.write_beside(folder / 'found.json', lambda f: f.write(known))
        with open(log, 'wb') as errors:
            child = subprocess.Popen(command(file, rest), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                     stderr=errors, start_new_session=True)
        try:
            code = child.wait(left)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(OSError):   # and what it has started
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        said = (log.read_text(errors='replace').strip() or f'exit code {code}').splitlines()[-1]
        why = '' if code == 0 else (STOPPED if code is None else
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


UNTOLD = 'tried', 'broken', 'fault', 'seconds', 'device'     # told elsewhere


def facts(found):
    """[[what, value in words]] of what a part found that has no table."""
    units = {'_gb_s': ', GB/s', '_gib': ', GiB', '_gb': ', GB'}

    def label(k):
        unit = next((unit for unit in units if k.endswith(unit)), '')
        return k.removesuffix(unit).replace('_', ' ') + units.get(unit, '')
    return [[label(k), words(v)] for k, v in found.items() if v not in (None, '', []) and k not in UNTOLD]


def words(v):
    """A value, short."""
    if isinstance(v, float):
        return f'{v:,.0f}' if v >= 1000 else f'{v:.4g}'
    return f'{v:,}' if type(v) is int else ', '.join(map(str, v)) if isinstance(v, list) else str(v)


TABLES = dict(      # (part, list in it): title, note, columns
    pairs=('peers', 'Copies between cards', 'direct: peer to peer; right: what was sent arrived; where it did not: '
           'NCCL_P2P_DISABLE=1.', dict(pair=None, direct=None, right=None, gb_s=1)),
    sizes=('room', 'Micro-batches', 'Without kernels and compiler.', dict(rows=0, tok_per_sec=0, peak_gib=2)),
    checks=('kernels', 'Kernels', 'ms: forward and backward of one layer, with the kernels and without; errors: shares '
            'of what PyTorch makes.', dict(
                operation=None, used=None, forward_error='.1e', gradient_error='.1e', ms=3, without_ms=3, winner=None,
                winner_ms=3, why=None)),
    rows=('kernels', 'Rivals', 'both: forward and backward; floor: what products and copies measured here take.', dict(
        operation=None, rival=None, ms=3, floor_ms=3, both_ms=3, floor_both_ms=3, mem_mb=0, fault=None)),
    ways=('step', 'A step', 'start: seconds before the first; of gemm: of matrix products measured here.', dict(
        way=None, tokens=0, micro_batch_size=0, start_s=1, step_ms=1, tok_per_sec=0, of_gemm=2, mfu=3,
        peak_gib=2)),
    parts=('step', 'A step by parts', 'floor: at the rates of products and copies measured here.', dict(
        way=None, part=None, share=2, ms=1, floor_ms=1)))


def told(found, settings, off, faults):
    """The blocks of the page; those of `printed` columns are tables on the terminal too."""
    bought, note = found['buys'], ''
    if 'val_bpb' in bought:
        guide = 'it is no guide here' if bought['no_guide'] else 'in brackets are nine of ten redraws'
        note = f'Bits per byte are by the law of config/law.tsv, {guide}; other text has other bits per byte.'
    elif 'epochs' not in bought:
        note = 'How many epochs, and what to expect, is known when prepare_data.py has prepared the text.'
    here = facts(found.get('machine', {}) | found.get('disk', {}))
    yield dict(kind='facts', title='This machine', rows=here)
    yield dict(kind='facts', title='What the budget buys', rows=facts(bought), note=note)
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
    until, faults = time.monotonic(), []
    found = dict(made=f'{datetime.date.today()}', configs=[Path(a).stem for a in rest if not a.startswith('--')],
                 device=train.choose_device(s), shape={k: vars(s)[k] for k in train.SHAPE})
    print(f'{found["device"]}, {sum(seconds for seconds, _ in PARTS.values())} seconds at most', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for part, (seconds, _) in PARTS.items():
            until += seconds
            if part == 'peers' and (found['device'] == 'cpu' or torch.cuda.device_count() < 2):
                continue
            mine = found[part] = bounded(part, until, Path(folder), rest, found)
            failed = [[f'{part}, {what}', why] for what, why in mine['broken'].items()]
            failed += [[part, mine['fault']]] if mine['fault'] not in ['', *mine['broken'].values()] else []
            lines = f'{part}: {mine["seconds"]:.0f} s', *(f'  {what}: {why}' for what, why in failed)
            print('\n'.join(lines), flush=True)
            faults += failed
    settings, off = recommended(s, found)
    name = found['machine'].get('hardware', found['device'])             # asked here, a card would lend its memory
    dollars = s.dollars_per_hour * s.budget_minutes / 60
    found['buys'] = found.get('buys', {}) | (dict(dollars=dollars) if dollars else {})
    out, blocks = Path('out/first'), [*told(found, settings, off, faults)]
    for block in blocks:
        columns = block.pop('printed', None)
        print('', block['title'], *(text_table(columns, block['rows']) if columns else [
            f'  {what}: {value}' for what, value in block['rows']]), block.get('note') or '', sep='\n')
    out.mkdir(parents=True, exist_ok=True)
    found |= dict(recommended=settings, off=off)
    sample.write_beside(out / 'first.json', lambda f: f.write(sample.as_json(found, indent=1).encode()))
    sample.write_page(out / 'first.html', f'{name}, {found["made"]}', blocks=blocks)
    about = f'"""Settings for this machine, {name}; by bench_mfu.py --first, {found["made"]}."""'
    text = '\n'.join([about, *(f'{k} = {v!r}' for k, v in settings.items()), ''])
    sample.write_beside(CONFIG / 'this_machine.py', lambda f: f.write(text.encode()))
    print(f'train with config/this_machine.py as the last config; {out / "first.json"} and first.html are for a report')

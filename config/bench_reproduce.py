"""--reproduce: a finished run again, from what its result says, and how the two compare.

    python bench_mfu.py --reproduce out/run/result.json             [paths of ideas that are not in config/]

A run of --max_steps or --max_tokens is the same to the last bit on the same CPU with the same versions; one that
went by the clock makes other steps, and on a GPU sums come in another order. The new run goes to out/run.again, or
--compare_dir; what the two were made with is compared first. Exit code 1 if what should be equal is not.
"""
import json
import subprocess
import sys
from pathlib import Path

import sample
import train
from config import CONFIG, UserError, at_home, fits, refuse

reproduce: str = ''         # the result.json of a finished run, or its folder

MADE_WITH = ('commit', 'versions', 'hardware', 'data', 'protocol')

FORM = dict(val_bpb=float, steps=int, settings={'max_steps': int, 'max_tokens?': int}, ideas=[str], hardware=dict(device=str))


def read(path):
    try:
        result = json.loads('' if path.is_fifo() or path.is_char_device() else path.read_text('utf-8'))
        if not fits(result, FORM) or result['val_bpb'] <= 0:
            raise ValueError
        return result, {name: result[name] for name in ('val_bpb', 'steps', 'settings', 'ideas', *MADE_WITH)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f'{path} is no result of a finished run ({type(e).__name__}): name the result.json that '
                        f'train.py wrote') from e


def command(result, ideas, out_dir):
    """train.py's arguments for the run of a result: the files of its ideas, and the settings that are not theirs."""
    named = {Path(path).stem: path for path in ideas}
    files = {name: named.get(name, str(CONFIG / f'{name}.py')) for name in result['ideas']}
    missing = [name for name, path in files.items() if not (name.isidentifier() and Path(path).is_file())]
    refuse(missing, f'{", ".join(missing)} is not in config/: give the path of the file, of which the run keeps a copy')
    of_files, known = train.read_settings([*files.values()])
    settings = {k: v for k, v in result['settings'].items()
                if k in known.known and json.dumps(v) != json.dumps(getattr(of_files, k))} | dict(out_dir=str(out_dir))
    if settings.get('init_from') == 'resume':
        settings.pop('init_from')
    return [*files.values(), *(f'--{name}={value if isinstance(value, str) else repr(value)}' for name, value in settings.items())]


def losses(folder):
    """{step: loss} of a run's log."""
    return {row['step']: row['train_loss'] for row in sample.read_rows(folder / 'metrics.jsonl') if 'train_loss' in row}


def main(own, rest, argv):
    path = Path(at_home(own.reproduce)).absolute()
    path = path / 'result.json' if path.is_dir() else path
    before, known = read(path)
    by_steps = bool(known['settings']['max_steps'] or known['settings'].get('max_tokens'))
    again = Path(at_home(own.compare_dir) or path.parent.with_name(f'{path.parent.name}.again'))
    refuse((again / 'result.json').exists(), f'{again} holds a finished run: choose another --compare_dir')
    words = [sys.executable, train.__file__, *command(known, rest, again)]
    print(*words[1:], flush=True)
    try:
        code = subprocess.call(words)
    except ValueError as e:                     # a zero byte, half a surrogate pair
        raise UserError(f'{path} has a setting that no command line holds ({e}): mend it there') from e
    refuse(code, f'the run ended with exit code {code}; see above')
    after, made = read(again / 'result.json')
    differ = [name for name in MADE_WITH if json.dumps(known[name]) != json.dumps(made[name])]
    for name in differ:
        print(f'{name}: {known[name]}, now {made[name]}')
    one, two = losses(path.parent), losses(again)
    first = next((step for step in sorted(one.keys() | two.keys()) if one.get(step) != two.get(step)), None) if one else None
    change = after['val_bpb'] / before['val_bpb'] - 1
    print(f'val_bpb: {before["val_bpb"]:.6f}, again {after["val_bpb"]:.6f} ({change:+.2%}); steps: {before["steps"]}, '
          f'again {after["steps"]}')
    if not one:
        print(f'{path.parent} keeps no metrics.jsonl: its losses cannot be compared')
    else:
        print('losses: equal to the bit' if first is None else
              f'losses: differ from step {first} on ({one.get(first)}, again {two.get(first)})')
    if not by_steps:
        print('it went by the clock, which makes other steps of the same settings')
    elif (first is not None or change) and not differ and before['hardware']['device'] == 'cpu':
        sys.exit(1)

"""--predict: whether dolls of two or more sizes agree, and what they say of the card's run.

    python bench_mfu.py --predict out/doll/a out/doll/b             folders that --doll wrote

The sizes come of other --minutes, each with its --compare_dir.
"""
import itertools
import json
import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from bench_mfu import text_table
from config import UserError, at_home, fits, refuse

predict: bool = False       # say what dolls of several sizes say of the card's

FORM = [{'name': str, 'notes': str | list, 'seeds': range(1 << 60), **dict.fromkeys(('val_bpb?', 'sd?', 'change?'), float | None)}]


def dolls_at(folder):
    """What a folder of --doll holds: parameters of the card's model and of the doll, standard deviation of the
    base as a share of it (None of one seed), {idea: change}."""
    try:
        if not all((folder / name).is_file() for name in ('compare.json', 'doll.py')):     # a pipe would be waited for
            raise FileNotFoundError
        rows = json.loads((folder / 'compare.json').read_text())
        card, doll = re.search(r'^parameters +([1-9][\d,]{,20}) +([1-9][\d,]{,20})$', (folder / 'doll.py').read_text(), re.M).groups()
        base = next(row for row in rows if fits(rows, FORM) and 'base' in row['notes'] and row['seeds'])
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, StopIteration):
        raise UserError(f'{folder} holds no doll.py with its compare.json: name folders that --doll wrote') from None
    return SimpleNamespace(
        card=int(card.replace(',', '')), size=int(doll.replace(',', '')), base=base.get('val_bpb'),
        sd=base['sd'] / base['val_bpb'] if base.get('sd') and base.get('val_bpb') else None, seeds=base['seeds'],
        pairs={row['name']: min(row['seeds'], base['seeds']) for row in rows},
        changes={row['name']: row['change'] for row in rows if row is not base and row['seeds'] and row.get('change') is not None})


def ranks(values):
    """Of each value its place, from 0; equal ones share theirs."""
    values = np.asarray(values)
    return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2


def on_a_line(x, y, noise, at):
    """What a straight line through points with this noise (standard deviations) has there, and its error."""
    points, there = np.stack([np.ones_like(x), x], axis=1) / np.array(noise)[:, None], np.array([1, at])
    spread = np.linalg.inv(points.T @ points)
    return there @ spread @ points.T @ (y / np.array(noise)), float(there @ spread @ there) ** 0.5


def t_quantile(df):
    """The 95th percentile of Student's t distribution, to 1 %: between those of the table on a line in 1 / df."""
    known = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 6: 1.943, 10: 1.812, 30: 1.697, math.inf: 1.645}
    return float(np.interp(-1 / df, [-1 / n for n in known], [*known.values()]))


def main(own, rest, argv):
    """Whether dolls predict: ideas' changes at several sizes, the rank correlation (Spearman) of one size with
    the next, and each change on a straight line in the logarithm of size up to the card's, with what the noise
    of seeds makes of that."""
    refuse(len(rest) < 2 or any(a.startswith('--') for a in rest),
           f'--predict takes two or more folders of --doll, of other sizes, and got {" ".join(rest) or "none"}')
    dolls = sorted((dolls_at(Path(at_home(a))) for a in rest), key=lambda doll: doll.size)
    noise = [doll.sd for doll in dolls if doll.sd]
    names = [name for name in dolls[0].changes if all(name in doll.changes for doll in dolls)]
    refuse(not noise, 'no folder has two seeds of its base, so what is noise is not known: make them with --seeds=2')
    refuse(len(names) < 2 or len({doll.card for doll in dolls}) > 1 or len({doll.size for doll in dolls}) < len(dolls),
           f'{" ".join(rest)} have not two ideas in common, each at another size of the doll of one model')
    free = [doll.seeds - 1 for doll in dolls if doll.sd]
    sd, quantile = statistics.fmean([sd ** 2 for sd in noise], free) ** 0.5, t_quantile(sum(free))
    x, card, rows = np.log([doll.size for doll in dolls]), math.log(dolls[0].card), []
    for name in names:
        changes = [doll.changes[name] for doll in dolls]
        there, error = on_a_line(x, changes, [sd * math.sqrt(2 / doll.pairs[name]) for doll in dolls], card)
        low, high = there - quantile * error, there + quantile * error
        rows.append(dict(idea=name, **{f'{doll.size:,}': change for doll, change in zip(dolls, changes)},
                         card=f'{there:+.1%} ({low:+.1%} to {high:+.1%})'))
    columns = {'idea': None} | {f'{doll.size:,}': '+.2%' for doll in dolls} | {'card': None}
    print('\n'.join(text_table(columns, sorted(rows, key=lambda row: row[f'{dolls[-1].size:,}']))))
    print(f'\nChange of bits per byte by parameters of the doll; card: on a line in log(parameters), at '
          f'{dolls[0].card:,}, and 90 % of\nwhat the noise of seeds allows (sd of the base {sd:.2%}), if it is one.')
    for a, b in itertools.pairwise(dolls):
        ours, theirs = (ranks([doll.changes[name] for name in names]) for doll in (a, b))
        print(f'rank correlation of {a.size:,} and {b.size:,}: {np.corrcoef(ours, theirs)[0, 1]:.2f} of {len(names)} ideas')

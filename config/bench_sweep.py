"""--sweep: every point of a grid, and the laws behind it.

    python bench_mfu.py --sweep "n_embd=160,240,320;learning_rate=1e-2,2e-2,4e-2" config/babylm.py

It makes the runs as --compare does, --seeds=3 times each, into out/sweep/<configs>, and fits: bits per byte
against parameters and tokens, the best size for a budget, the best learning rate at a width.
"""
import ast
import itertools
import math
import re
from pathlib import Path

import numpy as np

import sample
from bench_mfu import COLUMNS, SAME, as_table, checked, compare_runs, ranked, write_table
from config import at_home, literal, refuse

sweep: str = ''             # make the runs of a grid

DRAWS, INTERVAL = 400, (0.05, 0.95)     # of a bootstrap, and the shares of its draws below either end
HUBER = 1e-3                            # of log loss: residuals above it count in proportion, not squared
LAW = 'E', 'A', 'alpha', 'B', 'beta'    # val_bpb = E + A / N^alpha + B / D^beta (Hoffmann 2022, 2203.15556)
SHOWN = 'seeds val_bpb sd active_params tokens epochs train_seconds total_seconds tok_per_sec'.split()


def swept(own, argv):
    """The runs of --sweep's grid in turn; UserError lists the mistakes of all."""
    def plain(text):
        try:
            return str(literal(ast.parse(text, mode='eval').body, {}))      # 10**4 is 10000, in names too
        except (ValueError, SyntaxError, TypeError, ArithmeticError):
            return text

    parts = [part.partition('=') for part in re.sub(r'\s', '', own.sweep).split(';')]
    axes = [[(key, plain(value)) for value in values.split(',')] for key, _, values in parts]
    stacks = {','.join(map('='.join, point)).replace('/', '_'): [*argv, *(f'--{key}={value}' for key, value in point)]
              for point in itertools.product(*axes)}
    twice = len({part[0] for part in parts}) < len(parts) or len(stacks) < math.prod(map(len, axes))
    refuse(twice or not all(map(all, sum(axes, []))),
           f'--sweep is {own.sweep!r}, it must be like "n_embd=128,192;head_lr=1e-3,2e-3", nothing twice')
    configs = '+'.join(Path(a).stem for a in argv if not a.startswith('--')) or 'default'
    root = Path(at_home(own.compare_dir) or f'out/sweep/{configs}')
    return checked(stacks, root, own.seeds, own.seeds, SAME[:1])


def grouped(runs, about=lambda key: True):
    """{what a point of the grid sets, of the settings that about(name) is true of: its runs}."""
    groups = {}
    for run in runs:
        sets = ', '.join(part for part in run.name.split(',') if about(part.partition('=')[0]))
        groups.setdefault(sets or 'all runs', []).append(run)
    return groups


def logs(runs, *keys):
    """Logs of what the results of runs hold, and their settings: an array for each key."""
    return [np.log([(run.result['settings'] | run.result)[key] for run in runs]) for key in keys]


def distinct(x):
    """How many of these logs differ, by more than the 5 % that two runs of one time do."""
    return int((np.diff(np.sort(x), prepend=-np.inf) > 0.05).sum())


def tuned(runs):
    """For each size and budget the runs of what did best there, as a law is one of well-chosen settings. Only
    how runs end counts: one on its way, its rate still high, is worse than one that ends there."""
    best = {}
    for mine in grouped(runs).values():
        kind = mine[0].result['active_params'], *grouped(mine, SAME.__contains__)
        best[kind] = min(best.get(kind, mine), mine, key=lambda mine: logs(mine, 'val_bpb')[0].mean())
    return sum(best.values(), [])


def redrawn(fitted, residuals, parameters, dice):
    """Losses like those fitted, (DRAWS, points): residuals are drawn anew, not runs, as a grid without one of
    its rows tells little; larger for the parameters that took up a part of them and, as in Student's t,
    for how little a few of them tell."""
    spread = np.sqrt(len(residuals) / dice.chisquare(len(residuals) - parameters, (DRAWS, 1)))
    return fitted + spread * dice.choice(residuals, (DRAWS, len(fitted)))


def spoken(values, least=-math.inf, most=math.inf):
    """'1.5 (1.2 to 1.9)': the first value, and the interval of its redraws, which follow if there are any;
    'or less' and 'or more' say what lies beyond what was tried."""
    def number(v):
        kept = min(max(v, least), most)
        unit, mark = next((u for u in ((1e6, 'M'), (1e3, 'k')) if u[0] <= kept < 1e3 * u[0]), (1, ''))
        return f'{kept / unit:.4g}{mark}' + (' or less' if v < least else ' or more' if v > most else '')
    ends = map(number, np.quantile(values[1:], INTERVAL)) if len(values) > 1 else ['no interval']
    return f'{number(values[0])} ({" to ".join(dict.fromkeys(ends))})'


def dots(title, said, x, series, **more):
    """A chart of losses for sample.write_page; series of (name, x, loss, x and loss of a curve), all logs. Where
    that loss is (k, points), it is the curve's and those of redraws, which make a band."""
    def columns(*y):
        return np.exp(np.stack(y, 1)).tolist()

    def drawn(name, x, y, line, curves):
        first, *more = np.atleast_2d(curves)
        band = dict(band=columns(line, *np.quantile(more, INTERVAL, axis=0))) if more else {}
        return dict(name=name, points=columns(x, y), path=columns(line, first)) | band

    series = [drawn(*one) for one in series]
    return dict(kind='dots', title=title, note=said, x=x, y='val_bpb', log_x=True, series=series) | more


def hoffmann(n, d):
    """Terms of E + A / N^alpha + B / D^beta for law(): the logs of N and D, of one shape."""
    one, no = np.ones_like(n), np.zeros_like(n)
    return np.stack([np.stack(term, -1) for term in (
        [one, no, no, no, no], [no, one, -n, no, no], [no, no, no, one, -d])], -2)


def law(p, terms):
    """Log of a sum of powers, (k, points), and the shares of its terms: terms ((k or 1,) points, n, P) times
    p (k, P) are the terms' logs. Of hoffmann(): p holds log E, log A, alpha, log B, beta."""
    each = (terms @ p[:, None, :, None])[..., 0]
    total = np.logaddexp.reduce(each, -1)
    return total, np.exp(each - total[..., None])


def fit_law(terms, y, p):
    """p (k, P) of the least Huber loss of log losses y, (points,) or (k, points), from these starts, and that
    loss (k,): steps of Levenberg and Marquardt for all k at once, more than it takes, since Hoffmann's
    fit had stopped too early (Besiroglu 2024, 2404.10102)."""
    damp, eye = np.full(len(p), 0.01), np.eye(p.shape[1])

    def loss(p):
        r = abs(law(p, terms)[0] - y)
        return np.where(r < HUBER, r * r / 2, HUBER * (r - HUBER / 2)).sum(-1)

    for _ in range(200):
        total, shares = law(p, terms)
        r, slopes = total - y, (shares[..., None] * terms).sum(-2)               # (k, points, P)
        weighed = (slopes / np.maximum(1, abs(r) / HUBER)[..., None]).swapaxes(-1, -2)
        curved = weighed @ slopes * (1 + damp[:, None, None] * eye) + 1e-12 * eye
        tried = p - np.linalg.solve(curved, weighed @ r[..., None])[..., 0].clip(-1, 1)
        better = loss(tried) < loss(p)
        p = np.where(better[:, None], tried, p)
        damp = np.where(better, damp / 3, damp * 4).clip(1e-8, 1e8)
    return p, loss(p)


def law_of(runs):
    """Sentences about the law of runs, {parameter: its value and interval}, and charts. N is all parameters
    that the finished model uses, its tables too, as Pearce 2024 (2406.12907) advises for small ones."""
    n, d, y = logs(runs, 'active_params', 'tokens', 'val_bpb')
    has = {'points': (len(grouped(runs)), 5), 'sizes': (distinct(n), 3), 'numbers of tokens': (distinct(d), 3),
           'runs': (len(runs), 6)}
    if lacks := ', '.join(f'{least - have} {what}' for what, (have, least) in has.items() if have < least):
        return [f'No law of size and tokens: its 5 parameters take 5 points, 3 sizes and 3 numbers of tokens '
                f'among them, and 6 runs; missing: {lacks}.'], {}, []
    at, m = np.array([n.mean(), d.mean()]), y.mean()
    tries = itertools.product((0.1, 0.5, 0.9), (0.1, 0.3, 1), (0.1, 0.3, 1))    # E's share, alpha, beta
    terms = hoffmann(n - at[0], d - at[1])
    p, loss = fit_law(terms, y, np.array(
        [(m + math.log(E), a := m + math.log(0.5 - E / 2), alpha, a, beta) for E, alpha, beta in tries]))
    p = p[[loss.argmin()]]
    fitted = law(p, terms)[0][0]
    again = redrawn(fitted, y - fitted, len(LAW), np.random.default_rng(0))
    p = np.concatenate([p, fit_law(terms, again, p.repeat(DRAWS, 0))[0]])
    p[:, [1, 3]] += p[:, [2, 4]] * at                       # of N and D themselves, not about their means
    values = dict(zip(LAW, np.where([1, 1, 0, 1, 0], np.exp(p.clip(-50, 50)), p).T))
    found = {k: [float(v[0]), *np.quantile(v[1:], INTERVAL).tolist()] for k, v in values.items()}
    said = [f'val_bpb = E + A / N^alpha + B / D^beta, N parameters and D tokens, is within '
            f'{abs(np.expm1(y - fitted)).max():.1%} of {len(runs)} runs; in brackets nine of ten redraws: '
            + ', '.join(f'{k} {spoken(v)}' for k, v in values.items()) + '.']
    if loose := [k for k in ('E', 'alpha', 'beta') if found[k][2] > 3 * found[k][1]]:
        said.append(f'These runs leave {" and ".join(loose)} open threefold: trust it only between them.')
    if max(run.result['epochs'] for run in runs) > 4:
        said.append('Some read their text more than 4 times: it is worth less then (Muennighoff 2023).')
    line = np.linspace(d.min(), d.max(), 40)
    chart = dots('Size and tokens', said[0], 'tokens', log_y=True, series=[
        (f'{math.exp(N) / 1e6:.3g}M parameters', d[n == N], y[n == N], line, law(p, hoffmann(N + 0 * line, line))[0])
        for N in np.unique(n)])
    return said + best_for_time(p, n, runs), found, [chart]


def best_for_time(p, n, runs):
    """Sentences: the size that laws p have best for the budgets of runs, whose sizes have logs n and whose
    speed says how many tokens a size reads in it: seconds * exp(k) * N^g."""
    g, k = np.polyfit(n, *logs(runs, 'tok_per_sec'), 1)
    (_, a, alpha, b, beta), said = p.T.clip([[-99], [-99], [1e-3], [-99], [1e-3]]), []
    for seconds in sorted({run.result['budget_seconds'] for run in runs}) if g < 0 else []:
        rate = k + math.log(seconds)
        best = ((np.log(alpha / (-g * beta)) + a - b + beta * rate) / (alpha - g * beta)).clip(0, 50)
        bpb = np.exp(law(p, hoffmann(best, rate + g * best)[:, None])[0][:, 0].clip(-50, 50))
        said.append(f'In {seconds / 60:g} minutes of training alone at the speed measured, best is N = '
                    f'{spoken(np.exp(best))}, with val_bpb {spoken(bpb)}; tried were '
                    f'{math.exp(n.min()) / 1e6:.3g}M to {math.exp(n.max()) / 1e6:.3g}M.')
    return said


def lowest(x, y):
    """Where parabolas through y (..., points) over x are lowest; far away if they do not open upwards."""
    a, b, _ = np.polyfit(x - x.mean(), y.T, 2)
    return (x.mean() - b / (2 * np.maximum(a, 1e-9))).clip(x.min() - 20, x.max() + 20)


def valleys(what, groups):
    """Where log loss is lowest, by a parabola over x for each of groups {name: (x, y)}, logs: sentences,
    {name: x and its redraws} of those within what was tried, and charts."""
    said = [f'No best {what} for {name}: a parabola takes 3 values; missing: {3 - distinct(x)}.'
            for name, (x, _) in groups.items() if distinct(x) < 3]
    groups = {name: xy for name, xy in groups.items() if distinct(xy[0]) > 2}
    curves = {name: np.polyfit(x, y, 2) for name, (x, y) in groups.items()}
    rests = np.concatenate([[], *(y - np.polyval(curves[name], x) for name, (x, y) in groups.items())])
    dice, taken, found, series = np.random.default_rng(0), 3 * len(groups), {}, []
    for name, (x, y) in groups.items():
        best, line = [lowest(x, y)], np.linspace(x.min(), x.max(), 40)
        if len(rests) > taken:
            best += lowest(x, redrawn(np.polyval(curves[name], x), rests, taken, dice)).tolist()
        said.append(f'Best {what} for {name}: {spoken(np.exp(best), *np.exp([x.min(), x.max()]))}.')
        if x.min() <= best[0] <= x.max():
            found[name] = best
        series.append((name, x, y, line, np.polyval(curves[name], line)))
    return said, found, [dots(f'The best {what}', ' '.join(said), what, series)] * bool(series)


def moves(what, found):
    """Sentences: how the best rates {name: log and redraws} move with n_embd, where the names tell that."""
    said, ways = [], {}
    for name, best in found.items():
        if (width := re.search(r'\bn_embd=(\d+)', name)) and len(best) > 1:
            ways.setdefault(name.replace(width[0], 'each n_embd'), {})[math.log(int(width[1]))] = best
    for name, at in ways.items():
        x = np.array([*at]) - np.mean([*at])
        slope = x @ np.array([*at.values()]) / max(x @ x, 1e-9)
        known = len(at) > 1 and np.ptp(np.quantile(slope[1:], INTERVAL)) < 4
        said.append(f'The best {what} for {name} ' + (f'goes as n_embd to the power {spoken(slope)}; '
                    '0: it carries over.' if known else 'moves in a way that these runs leave open.'))
    return said


def keep_sweep(runs, root):
    """Rank the runs and fit what they allow; the text, which sweep.md keeps beside .json and .html."""
    keys, done = re.findall(r'(\w+)=', runs[0].name), [run for run in runs if run.result]
    rows = [row | dict(notes=[fault for fault in row['notes'] if 'seed ' in fault]) for row in ranked(runs)]
    rows.sort(key=lambda row: row.get('val_bpb', math.inf))         # no point of a grid is the base
    said, found, charts = law_of(tuned(done))
    for what in ['active_params', *(key for key in keys if key.endswith(('_lr', 'learning_rate')))]:
        size = what == 'active_params'
        some = tuned(done) if size else [r for r in done if r.result['settings'][what] > 0]     # 0 has no log
        groups = grouped(some, SAME.__contains__ if size else what.__ne__)
        groups = {name: logs(mine, what, 'val_bpb') for name, mine in groups.items()}
        more, best, chart = valleys(what, groups)
        said += more + ([] if size else moves(what, best))
        charts += chart
        found[what] = {name: math.exp(values[0]) for name, values in best.items()}
    text = '\n'.join([as_table(rows, runs, {key: COLUMNS[key] for key in SHOWN}), '', *said])
    table = dict(kind='table', title='Runs', rows=rows, columns=[
        dict(key='name'), *(dict(key=key, digits=COLUMNS[key]) for key in SHOWN)])
    write_table(root / 'sweep', text, dict(rows=rows, said=said, **found))
    said = dict(kind='text', title='What the runs say', text='\n'.join(said))
    sample.write_page(root / 'sweep.html', f'A sweep of {", ".join(keys)}', blocks=[said, *charts, table])
    return text


def main(own, rest, argv):
    compare_runs(own, rest, argv, swept, keep_sweep)

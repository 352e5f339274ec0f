"""--plan: what to train with so much time and text.

    python bench_mfu.py --plan config/babylm.py --budget_minutes=5  --write=plan.py makes a config of it

It measures this machine for a minute or so, or takes --card at --card_mfu, and says which size in the
config's proportions, how many side by side, thinned or not, and how much reading end with the fewest bits per
byte in budget_minutes on the text that is here, or on --text_words such as are here, with at most --most_params
(1e8). It goes by a law of runs that read their text 0.01 to 41 times: config/law.tsv, or --plan_runs, a folder of
yours.
"""
import itertools
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import model as m
import prepare_data
import sample
import train
from bench_mfu import measured, text_table
from config import CONFIG, UserError, at_home, fits, refuse
from config.bench_doll import LEAST_LAYERS, TRAINED, card_peak, shape_like
from config.bench_sweep import dots, fit_law, law, redrawn, spoken

plan: bool = False          # say what to train in budget_minutes, with the text that there is
most_params: float = 1e8    # 65536..: parameters, all members together, that a plan may have
plan_runs: str = ''         # runs, or a table of them, that a plan goes by; '': config/law.tsv
write: str = ''             # a config to be made of the plan

RUNS = CONFIG / 'law.tsv'           # of scale models: RESULTS.md, "The planner"
AS_RUN = RUNS.read_text().partition('\n')[0].split('\t')         # its columns: what a run was, and what came of it
LEAST_RUNS = 20                     # that a law is made of
RUN = dict(tokens=float, val_loss=float, val_bpb=float, epochs=float, total_params=float, ideas=str, settings=dict)     # the form of one
OTHERWISE = {'distilled', 'snapshots'}       # whose members are none of that law's
SEVERAL, THINNED = AS_RUN[3:5]      # settings of two ideas: models side by side, and how much is left out at random
WIDTHS = [32, 48, *range(64, 257, 32), *range(320, 513, 64), *range(640, 1025, 128)]    # two heads of 32 or more, where they fit
HEADS = 64, 32, 16                  # channels of one, the widest of which there are two: the kernels have these
MOST_IN_TABLE = 0.35                # of parameters: with more of them ids are too rare for the law
MEMBERS, RATES = (1, 2, 3, 4, 6, 8), (0.0, 0.1)          # of these two, what a plan may be
PARTS = 2.0 ** -np.arange(0, 12.5, 0.5)         # of the time spent reading; below 1 a run ends early
TOKENS_A_STEP = 640, 1e6, 0.4       # 640 in a run of a million tokens, and as the 0.4th power of these
PLANNED = dict(what=None, layers=0, width=0, vocabulary=0, parameters=0) | {SEVERAL: 0, THINNED: 1} | dict(
    tokens_per_step=0, tokens=0, epochs=2, val_bpb=None)
LONGER_TOKENS = 0.27                # bytes a token go as this power of the vocabulary (512 to 8,192 ids)
REPEATED = 'E A alpha cost B beta C a b g kappa thin'.split()       # E, A, B and C as logs
UNITS = 1e5, 1e6, 1e6               # parameters and bytes of a run that these are of
LEAST_AGAIN = 1e-3                  # of R - 1: text that is read once costs nothing
LEAST_HELD = -2.0                   # of log h: of less no run has read its text again


def repeated(params, text, read, members, thinned):
    """Terms for law() of runs that read their text again: E + A / N^alpha + B / D^beta, as if all were new, and
    C h^a r^b / K^kappa for what is learned by heart: N parameters of each of K members, h of them a byte of text,
    R readings of it, r = (R - 1)^2 / R, D bytes in all. From r = 1 on it rises by b + g log h, as larger models
    know their text by heart sooner. What is thinned has less of it and more of the second and the third."""
    n, u, d = (np.log(x) - math.log(unit) for x, unit in zip((params, text, read), UNITS))
    h, again = np.maximum(n - u, LEAST_HELD), 2 * np.log(np.maximum(np.exp(d - u) - 1, LEAST_AGAIN)) - (d - u)
    n, h, d, again, k, thin = np.broadcast_arrays(n, h, d, again, np.log(members), thinned)
    terms = [dict(E=1), dict(A=1, alpha=-n, cost=thin), dict(B=1, beta=-d, cost=thin),
             dict(C=1, a=h, b=again, g=h * np.maximum(again, 0), kappa=-k, thin=-thin)]
    columns = [[np.broadcast_to(term.get(name, 0.0), n.shape) for name in REPEATED] for term in terms]
    return np.stack([np.stack(term, -1) for term in columns], -2)


def law_of_repeats(rows):
    """p (1 + DRAWS, len(REPEATED)) of law(repeated(...)), that of rows (points, 6), as AS_RUN, then of redraws; and
    the residuals of their logs."""
    *x, y = np.asarray(rows, float).T
    terms, y = repeated(*x), np.log(y)
    m, tries = y.mean(), itertools.product((0.2, 0.6), (0.1, 0.4), (0.1, 0.4), (0.4, 0.8))
    p, loss = fit_law(terms, y, np.array([[dict(
        E=m + math.log(E), A=(rest := m + math.log(0.45 - E / 2)), alpha=alpha, B=rest, beta=beta, C=m - 2.3, a=0.4,
        b=b, kappa=1, thin=5).get(name, 0) for name in REPEATED] for E, alpha, beta, b in tries]))
    p = p[[loss.argmin()]]
    fitted = law(p, terms)[0][0]
    again = redrawn(fitted, y - fitted, p.shape[1], np.random.default_rng(0))
    return np.concatenate([p, fit_law(terms, again, p.repeat(len(again), 0))[0]]), y - fitted


def runs_known(path):
    """Rows (points, 6) of a table of runs, or of the finished runs in a folder, of which a law can be made."""
    try:
        if path.is_dir():
            results = [json.loads(file.read_text()) for file in sorted(path.rglob('result.json'))]
            results = [r for r in results if not {Path(idea).stem for idea in r['ideas']} & OTHERWISE]
            refuse(len({r['data']['val_bytes'] for r in results}) > 1,
                   f'{path} holds runs that were measured on different text: name a folder of one')
            rows = np.array([as_run(r) for r in results])
        else:
            rows = np.loadtxt(path, delimiter='\t', skiprows=1, usecols=range(len(AS_RUN)), ndmin=2)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, AttributeError) as e:
        raise UserError(f'--plan_runs is {path}, it must be a folder of runs or a table like {RUNS}: {e!r}') from None
    refuse(len(rows) < LEAST_RUNS, f'{path} holds {len(rows)} finished runs: a law of text that is read again takes {LEAST_RUNS}')
    wrong = rows.ndim != 2 or not np.isfinite(rows).all() or (rows[:, [0, 1, 2, 3, 5]] <= 0).any()
    refuse(wrong, f'{path} holds a number that is none, or not above 0: mend that row')
    return rows


def as_run(r):
    """What a law needs of a result.json, as AS_RUN; bytes are what tokens of the validation text stand for."""
    read = r['tokens'] * r['val_loss'] / (math.log(2) * r['val_bpb'])
    members, thinned = r['settings'].get(SEVERAL, 1), r['settings'].get(THINNED, 0.0)
    return [r['total_params'] / members, read / r['epochs'], read, members, thinned, r['val_bpb']]


class Choices:
    """What could be trained here: models in the proportions of a config but for their tables, of up to `most`
    parameters, alone or as members, thinned or not, and how fast; on the text that is here, or so many words such
    as are here."""

    def __init__(self, s, argv, ideas, known, most, words=0, on_card=False):
        vars(s).update({k: v for k, v in ((SEVERAL, 1), (THINNED, 0.0)) if k in vars(s)})       # a plan has its own
        rows = min(8, s.micro_batch_size)        # a step of the plan's, not of the config's, must fit the text
        run = measured(ideas)(s, device='cpu', compile='off', tokens_per_step=rows * s.block_size)
        text, c = run.data.meta['splits']['train'], run.config
        self.text = {k: text[k] * (words or text['words']) / text['words'] for k in ('bytes', 'tokens')}
        self.s, self.ideas, self.config, self.on_card, shapes = s, ideas, c, on_card, []
        ids = [2 ** k for k in range(9, 17) if s.tokenizer == 'bpe' and 2 ** k < c.vocab_size]
        for V, C in itertools.product([*ids, c.vocab_size], WIDTHS):
            heads = C // next(D for D in HEADS if C % D == 0 and C >= 2 * D)
            shape = shape_like(c, max(LEAST_LAYERS, round(c.n_layer * C / c.n_embd)), C, V, heads)
            size = m.blueprint(replace(c, **shape | dict(block_size=c.block_size))).params()['total']
            if size <= most and V * C <= MOST_IN_TABLE * size:
                shapes.append((size, shape | dict(block_size=c.block_size)))
        refuse(not shapes, f'--most_params is {most:,.0f}, and no model in these proportions has so few: raise it, or '
               f'lower vocab_size')
        self.shapes, self.sizes = shapes, np.array([size for size, _ in shapes], float)
        self.bytes_a_token = text['bytes'] / text['tokens'] * np.array(
            [(shape['vocab_size'] / c.vocab_size) ** LONGER_TOKENS for _, shape in shapes])
        # only what the law has seen, and what goes with the config's ideas
        tried = (SEVERAL, MEMBERS, known[:, 3] > 1), (THINNED, RATES, known[:, 4] > 0)
        kinds = [some if seen.any() and goes_with(argv, name) else some[:1] for name, some, seen in tried]
        grid = (x.ravel() for x in np.meshgrid(np.arange(len(shapes)), PARTS, *kinds, indexing='ij'))
        self.which, self.part, self.members, self.thinned = grid
        self.fit = self.sizes[self.which] * self.members <= most
        self.seconds = {}                        # that a token takes, by parameters

    def step_of(self, tokens):
        """Tokens a step in a run of so many; a card wants no fewer than the config has."""
        (at_once, at, power), T = TOKENS_A_STEP, self.config.block_size
        rows = max(1, round(at_once * (tokens / at) ** power / T))
        most = self.s.micro_batch_size
        rows = rows if rows < most else rows // most * most        # of whole micro-batches
        return max(rows * T, self.s.tokens_per_step * self.on_card)

    def measure(self, which, tokens):
        """A few steps as a run of so many tokens has them; their batches are the config's, as if of no more ids than
        the model's."""
        size, shape = self.shapes[which]
        V, step = shape['vocab_size'], self.step_of(tokens)
        run = measured(self.ideas)(SimpleNamespace(**vars(self.s) | shape | dict(
            vocab_size=self.s.vocab_size, tokens_per_step=step)), vocab_size=V)
        run.choose_kernels()
        read = run.stream.batch
        run.stream.batch = lambda *rows: {k: t % V for k, t in read(*rows).items()}
        run.step()
        self.seconds[size] = train.seconds_of(run.step, 5) / step
        run.batches.close()
        speed = 1 / self.seconds[size]
        print(f'{size:,} parameters, {step:,} tokens a step: {speed:,.0f} tokens a second here, '
              f'{sample.peak_memory_gb(run.device):.1f} GiB of memory at most so far', flush=True)

    def suppose(self, speed):
        """Seconds a token where FLOPs a second are known and no card is here."""
        for size, shape in self.shapes:
            self.seconds[size] = m.blueprint(replace(self.config, **shape)).flops_per_token() / speed

    def seconds_a_token(self):
        """Of each shape: on lines between what was measured, in logarithms of parameters, beyond it as
        parameters."""
        (x, y), size = np.log(sorted(self.seconds.items())).T, np.log(self.sizes)
        return np.exp(np.interp(size, x, y) + np.minimum(0, size - x[0]) + np.maximum(0, size - x[-1]))

    def best(self, p, seconds, text=1.0):
        """What could be trained in so many seconds, on so many times the text: rows (points, 6), as AS_RUN but the
        number of its shape at the end, those first of which law p expects the fewest bits per byte."""
        read = (seconds / self.seconds_a_token() * self.bytes_a_token)[self.which] * self.part / self.members
        bytes_ = np.full(len(read), text * self.text['bytes'])
        rows = np.stack([self.sizes[self.which], bytes_, read, self.members, self.thinned, self.which], -1)[self.fit]
        return rows[np.argsort(expected(p[:1], rows)[0])]

    def settings(self, row, seconds):
        """The config that a row of best() is; where it ends before its time, by tokens."""
        size, text, read, members, thinned, which = row
        tokens = read / self.bytes_a_token[int(which)]
        step = self.step_of(tokens)
        more = {SEVERAL: int(members), THINNED: float(thinned)}
        shape = self.shapes[int(which)][1] | dict(tokens_per_step=step, max_steps=0, max_tokens=0)
        shape |= {k: v for k, v in more.items() if v > (k == SEVERAL) or k in vars(self.s)}
        whole = seconds / members / self.seconds_a_token()[int(which)]
        return shape | (dict(max_tokens=round(tokens / step) * step) if tokens < 0.9 * whole else {})

    def described(self, p, residuals, row):
        """A line of the table of a plan; what laws p expect of it, with the interval of their redraws and of what
        runs are off them."""
        size, text, read, members, thinned, which = row
        off = np.random.default_rng(0).choice(residuals, len(p)) * np.sign(np.arange(len(p)))      # not of the first
        c, bpb = self.shapes[int(which)][1], np.exp(expected(p, row[None])[:, 0] + off)
        tokens = int(read / self.bytes_a_token[int(which)])
        return {'layers': c['n_layer'], 'width': c['n_embd'], 'vocabulary': c['vocab_size'],
                'parameters': int(size * members), SEVERAL: int(members), THINNED: float(thinned),
                'tokens_per_step': self.step_of(tokens), 'tokens': tokens, 'epochs': read / text, 'val_bpb': spoken(bpb)}


def declaring(setting):
    """The file of config/ that declares a setting."""
    return next(path for path in RUNS.parent.glob('*.py') if re.search(rf'^{setting}: ', path.read_text(), re.M))


def goes_with(argv, setting):
    """Whether the idea that declares it can be stacked on these."""
    try:
        return bool(train.read_settings([*argv, str(declaring(setting))]))
    except UserError:
        return False


def expected(p, rows):
    """Logs of bits per byte, (k, points), that laws p (k, 12) expect of rows as Choices.best has them."""
    return law(p, repeated(*rows.T[:5]))[0]


def main(own, rest, argv):
    """Says which model, how many of them, and how often which text, end with the fewest bits per byte in
    budget_minutes of this machine, or of --card, as runs of scale models have it; --write makes a config of
    it."""
    configs, out = [a for a in rest if not a.startswith('--')], Path(at_home(own.write))
    refuse(not configs, '--plan names no config: it takes what is to be trained')
    refuse(own.write and (out.suffix != '.py' or out.exists() or not out.stem.isidentifier() or not out.parent.is_dir()),
           f'--write is {own.write}, it must be a new file with a name like my_plan.py, in a folder that is there')
    known = runs_known(Path(at_home(own.plan_runs)) if own.plan_runs else RUNS)
    s, ideas = train.read_settings(rest)
    cpu, card = train.choose_device(s) == 'cpu', 'card' in own.given
    typed = {k: vars(s)[k] for k, at in ideas.set_at.items() if at.startswith('--')}
    p, residuals = law_of_repeats(known)
    here = Choices(s, rest, ideas, known, own.most_params, own.text_words, card or not cpu)
    seconds = 60 * s.budget_minutes
    if s.budget_counts == 'all':                # a tenth measures; starting, and compiling on a CPU, take their time
        seconds = min(TRAINED * seconds, 0.9 * seconds - (30 if s.budget_minutes >= 5 else 10))
    refuse(seconds <= 0, f'--budget_minutes is {s.budget_minutes:g}, and starting takes longer than that: give it more')
    if s.compile == 'auto' and s.budget_minutes < 5 and cpu:
        s.compile = 'off'                       # as the run itself
    if card:
        here.suppose(card_peak(own) * own.card_mfu)
    which, tokens, began = int(abs(np.log(here.sizes / 2 ** 18)).argmin()), 1e6, time.monotonic()
    while not card and time.monotonic() - began < 90 and here.shapes[which][0] not in here.seconds:
        here.measure(which, tokens)             # until what is planned has been measured
        row = here.best(p, seconds)[0]
        which, tokens = int(row[5]), row[2] / here.bytes_a_token[int(row[5])]
    first, *_ = rows = here.best(p, seconds)
    same = rows[:, 3:5] == first[3:5]
    others = {'a smaller model': rows[:, 0] < first[0] / 1.8, 'a larger one': rows[:, 0] > 1.8 * first[0],
              'one model' if first[3] > 1 else 'several models': (rows[:, 3] > 1) != (first[3] > 1),
              'half the reading': same.all(1) & (rows[:, 5] == first[5]) & (abs(rows[:, 2] / first[2] - 0.5) < 0.1),
              f'{"without" if first[4] else "with"} {THINNED}': ~same[:, 1]}
    shown = {'the plan': first} | {name: rows[like.argmax()] for name, like in others.items() if like.any()}
    shown |= {'twice the time': here.best(p, 2 * seconds)[0], 'twice the text': here.best(p, seconds, 2)[0]}
    table = [dict(what=name) | here.described(p, residuals, row) for name, row in shown.items()]
    far = [f'{what} are {value / most:.1f} times the most' for what, value, most in zip(
        ('parameters', 'bytes of text', 'bytes read', 'members'), first, known.max(0)) if value > 1.5 * most]
    machine = f'{own.card} at {own.card_mfu:.0%} of its peak' if card else 'this machine'
    said = [f'Of {s.budget_minutes:g} minutes of {machine}, {here.text["tokens"]:,.0f} tokens of text and at most '
            f'{own.most_params:,.0f} parameters, expected of', '', *text_table(PLANNED, table), '',
            f'tokens: that each member reads. bits per byte: by a law that is within '
            f'{abs(np.expm1(residuals)).max():.1%} of {len(known)} runs ({own.plan_runs or "config/law.tsv"}); '
            f'in brackets nine of ten redraws. Other text has other bits per byte.']
    said += [f'Beyond what those runs show, so trust the order more than the number: {", ".join(far)} of theirs.'] * bool(far)
    print('\n'.join(said))
    draw_plan(configs, '\n'.join(said), here, p, first, s.budget_minutes, seconds)
    if own.write:
        write_plan(out, configs, vars(s), typed | here.settings(first, seconds), table[0])


def draw_plan(configs, text, here, p, first, minutes, seconds):
    """The page of a plan: what time buys, and where reading again stops paying."""
    def chart(title, note, x, lines):
        lines = {name: (np.log(at), expected(p, np.array(rows))) for name, (at, rows) in lines.items()}
        return dots(title, note, x, [(name, at, bpb[0], at, bpb) for name, (at, bpb) in lines.items()])

    longer, epochs, shares = 2.0 ** np.arange(-4, 5), np.geomspace(1, 100, 40), (0.25, 1, 4)
    size, bytes_, _, members, thinned, _ = first
    again = {f'{share:g} of the text': (epochs, [
        (size, share * bytes_, share * bytes_ * n, members, thinned) for n in epochs]) for share in shares}
    root = Path('out/plan') / '+'.join(Path(c).stem for c in configs)
    root.mkdir(parents=True, exist_ok=True)
    sample.write_page(root / 'plan.html', f'What {" ".join(configs)} should be', blocks=[
        dict(kind='text', title='The plan', text=text),
        chart('What time buys', 'The best plan for each time.', 'minutes', {
            'the best': (minutes * longer, [here.best(p, n * seconds)[0] for n in longer])}),
        chart('Where reading again stops paying', f'{int(members)} of {size:,.0f} parameters.', 'epochs', again)])
    print(f'{root / "plan.html"} draws it')


def shown(text, rows):
    """A chart of the law of runs that were measured on one text, where there are enough of them: of models of one size
    on so much text, where they ended and what the law expects, by epochs."""
    known = [as_run(row) for row in rows if fits(row, RUN) and not {*row['ideas'].split()} & OTHERWISE]
    known = np.array([row for row in known if min(row[:4]) > 0 and row[5] > 0])
    if len(known) < LEAST_RUNS:
        return
    (p, residuals), kinds, series = law_of_repeats(known), {}, []
    for row in known:
        kinds.setdefault((row[0], float(f'{row[1]:.2g}'), *row[3:5]), []).append(row)
    for (size, *_, members, thinned), some in sorted(kinds.items(), key=lambda kind: -len(kind[1]))[:8]:
        text_bytes, epochs = some[0][1], np.log([row[2] / row[1] for row in some])
        line = np.linspace(epochs.min() - 0.5, epochs.max() + 0.5, 20)
        curves = expected(p, np.array([(size, text_bytes, text_bytes * math.exp(e), members, thinned) for e in line]))
        many, thin = f'{members:.0f} x ' if members > 1 else '', ', thinned' if thinned else ''
        name = f'{many}{size:,.0f} parameters, {text_bytes / 1e6:.3g} MB{thin}'
        series.append((name, epochs, np.log([row[5] for row in some]), line, curves))
    yield dots(f'The law, {text}', f'Points are runs, lines what the law of all {len(known)} expects of such (RESULTS.md, "The '
               f'planner"), with nine of ten redraws; it is within {abs(np.expm1(residuals)).max():.1%} of them.', 'epochs', series)


def write_plan(path, configs, before, settings, told):
    """The plan as a config, to be stacked on those that it was made for."""
    ideas = [declaring(k) for k in settings if k in (SEVERAL, THINNED) and k not in before]
    seams = {idea.stem: re.findall(rf'^class ({"|".join(prepare_data.SEAMS)})\(', idea.read_text(), re.M) for idea in ideas}
    lines = [f'"""The plan of bench_mfu.py for {"+".join(configs)}: {told["val_bpb"]} bits per byte expected.', '',
             f'    python train.py {" ".join(configs)} {path}', '"""',
             *(f'from config.{name} import {", ".join(classes)}' for name, classes in sorted(seams.items())),
             *(f'{k} = {v!r}' for k, v in settings.items())]
    sample.write_beside(path, lambda f: f.write('\n'.join([*lines, '']).encode()))
    print(f'{path} is written: python train.py {" ".join(configs)} {path}')

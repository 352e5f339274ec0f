"""Train one small language model in a fixed time, and say honestly what that bought.

    python train.py config/quickstart.py                     five minutes on whatever is here, then a sample
    torchrun train.py config/babylm.py                       thirty minutes on one rented card
    torchrun --nproc_per_node=2 train.py config/babylm.py    the same on two
    python train.py config/babylm.py --dry_run=True          check everything, say what the budget buys, stop

Settings come from the list below (and GPTConfig in model.py), then each config named, left to right, then
--key=value. Exit codes: 0 finished, 2 something to mend, 3 the training diverged, 75 stopped and saved
(go on with --init_from=resume).
"""
import os
import time


def process_age(pid='self'):
    """Seconds since a process started, read from Linux's /proc; 0 elsewhere."""
    try:
        with open(f'/proc/{pid}/stat') as f:
            ticks = int(f.read().rsplit(')', 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')
    except (OSError, AttributeError):
        return 0.0


# The bill starts when the command is typed: before Python's imports and, under torchrun, with torchrun itself
# (when that starts a worker again, what went before is in the checkpoint).
FIRST_OF_TORCHRUN = os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0'
STARTED = time.monotonic() - process_age(os.getppid() if FIRST_OF_TORCHRUN else 'self')

import ast
import bisect
import contextlib
import dataclasses
import datetime
import difflib
import functools
import importlib.util
import json
import math
import operator
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import prepare_data
import sample
from model import (GPT, Experts, GPTConfig, Linear, choose_kernels, grow, grown_config, kernels_named,
                   similarity_norm, spread)
from prepare_data import UserError


def refuse(wrong, why):
    """End with a sentence to the user where something is wrong."""
    if wrong:
        raise UserError(why)


# ---- settings ----------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Settings:
    """All but the model's shape, which is GPTConfig's: what to train on, how long, how, what to keep."""
    dataset: str = 'stories'          # a name that `python prepare_data.py --help` lists, or files:<path>
    tokenizer: str = 'bpe'            # 'bpe', 'bytes' or 'gpt2'
    vocab_size: int = 8192            # entries of a bpe tokenizer
    prepare: str = ''                 # more options for prepare_data.py, where the data is yet to be built
    weights: str = ''                 # how often an epoch reads a source: 'childes:2,gutenberg:0.5'
    reshuffle: bool = True            # another order of documents in every epoch; False: always the first's
    curriculum: str = ''              # read easy documents first, by a measure of prepare_data.py --scores
    curriculum_order: str = 'shuffled'  # of what is admitted: 'shuffled', or the hardest first ('frontier')
    pacing: str = 'linear'            # how what is admitted grows: linear, quad, root, exp, log or step
    pacing_floor: float = 0.1         # share of the text that a curriculum admits at first
    pacing_start: float = 0.0625      # progress at which that, or the vocabulary, begins to grow
    pacing_end: float = 0.875         # progress from which all of it is admitted
    data_dir: str = 'data'            # where prepared data stands
    out_dir: str = ''                 # where the run goes; empty: out/<names of the configs>
    overwrite: bool = False           # replace the run that out_dir holds
    init_from: str = 'scratch'        # 'scratch', 'resume' (in out_dir), or a run whose weights to start from
    seed: int = 1
    budget_minutes: float = 30.0      # the whole bill, command typed to prompt back, over all resumptions
    budget_counts: str = 'all'        # 'all', or 'training': the seconds of training alone
    max_steps: int = 0                # > 0: end after so many; schedules by step, reproducible to the bit
    max_tokens: int = 0               # > 0: the same, given in tokens
    device: str = 'auto'              # 'auto', 'cuda' or 'cpu'
    dtype: str = 'auto'               # 'auto' (bfloat16 where the hardware has it), 'bfloat16' or 'float32'
    compile: str = 'auto'             # 'auto' (on where it pays), 'on' or 'off'
    kernels: str = 'all'              # model.py's, on a GPU: 'all', 'none', 'attention,mlp', '-mlp' (all but)
    tokens_per_step: int = 65536      # over all ranks and micro-steps; a multiple of block_size
    micro_batch_size: int = 64        # sequences a rank reads at once, at most; lowered to what fits
    optimizer: str = 'muon'           # 'muon' (matrices; AdamW for the rest) or 'adamw' (for everything)
    learning_rate: float = 0.02       # Muon's: how far an update moves a matrix's output; adamw: times 0.05
    embedding_lr: float = 0.2         # AdamW's for token tables that stand N(1)
    head_lr: float = 0.004            # AdamW's for the head (and a tied table), times 256 / n_embd
    scalar_lr: float = 0.02           # AdamW's for the few scalars
    weight_decay: float = 0.1         # of matrices, as a share of learning_rate
    weight_decay_points: tuple = ((0, 1), (1, 0))  # (progress, factor) of weight_decay; straight in between
    momentum: float = 0.95            # Muon's
    beta1: float = 0.8                # AdamW's
    beta2: float = 0.95
    grad_clip: float = 1.0            # largest gradient norm; 0 is off
    warmup_frac: float = 0.02         # of progress, learning rates rise from a tenth
    cooldown_frac: float = 0.6        # of progress, learning rates fall linearly to final_lr_frac
    final_lr_frac: float = 0.0
    growth: tuple = ()                # [(progress, sizes from then on)]: [(0.3, dict(n_embd=384)), ...]
    growth_snr_db: float = 10.0       # the weights' power over that of the noise that tells copies apart
    growth_tokens: str = 'zero'       # keys of appended tokens: 'zero' (they do nothing at first) or 'random'
    growth_depth: str = 'fresh'       # new layers 'fresh' (they do nothing at first) or a 'stack' of the old
    vocabulary_floor: float = 1.0     # share of the ids, most frequent first, that is known at first
    class_loss: float = 0.0           # share in the loss, at first, of guessing the next token's word class
    class_until: float = 0.25         # progress at which that has faded to nothing
    smoothing: float = 0.0            # share of the target that tokens like the right one get at first
    smoothing_by: str = 'classes'     # which are those: of like word 'classes', or 'uniform', all
    smoothing_temperature: float = 0.025  # of the cosine between two tokens' word classes
    ahead_weight: float = 0.3         # of predict_ahead's losses, falling to 0 with progress
    teacher: str = ''                 # the folder of a run whose guesses to learn too
    teacher_weight: float = 0.5       # share of the loss that comes from the teacher
    teacher_temperature: float = 2.0  # divides both models' logits: higher is flatter
    masked: float = 0.0               # share of the rows that fill in masked tokens, seeing both ways
    domains: str = ''                 # 'sources', or names of sources; 'childes+qed,wiki' puts two in one
    domains_from: float = 0.6         # progress at which the MLPs split into the domains' parts; 0 is at once
    frozen: str = ''                  # domains that stay as they are, as does all that is shared
    balance_lr: float = 0.01          # of experts' biases: a step against what each has too much of the load
    ema: float = 0.0                  # > 0: evaluate weights averaged over about this share of progress
    eval_interval: float = 0.25       # in progress: validation on a part of the closing share; 0 is off
    evals: str = ''                   # as of sample.py --eval: 'all', names, files; '': the data's own pairs
    eval_data: str = 'data/eval'      # the folder of evaluation sets, BLiMP for one, that sample.py reads too
    log_interval: int = 10            # steps
    save_minutes: float = 5.0         # between checkpoints; 0 saves after every step
    sample_prompt: str = ''           # what the closing sample continues
    sample_tokens: int = 120          # its length; 0 prints none
    dynamics: bool = False            # probe all layers on the way: sample.Probe, dynamics.json
    dollars_per_hour: float = 0.0     # the machine's price, for the report; 0 is unknown
    country: str = 'world'            # whose electricity it is, of sample.GRID, or grams of CO2e a kWh
    tracker: str = ''                 # 'tensorboard', 'wandb' or 'mlflow': follows the run, where installed
    dry_run: bool = False             # check data, memory and disk, measure, predict, and stop


CHOICES = dict(budget_counts=('all', 'training'), device=('auto', 'cuda', 'cpu'), optimizer=('muon', 'adamw'),
               dtype=('auto', 'bfloat16', 'float32'), compile=('auto', 'on', 'off'),
               tokenizer=('bpe', 'bytes', 'gpt2'), growth_depth=('fresh', 'stack'),
               growth_tokens=('zero', 'random'),
               curriculum_order=('shuffled', 'frontier'), smoothing_by=('classes', 'uniform'),
               tracker=('tensorboard', 'wandb', 'mlflow', ''),
               pacing=('linear', 'quad', 'root', 'exp', 'log', 'step'))
LIMITS = dict(beta1=(0, 0.9999), beta2=(0, 0.999999), momentum=(0, 0.9999), warmup_frac=(0, 1),
              head_scale=(1e-6, math.inf), domains_from=(0, 0.999), domain_share=(0.001, 0.999),
              cooldown_frac=(0, 1), final_lr_frac=(0, 1), pacing_floor=(0, 1), pacing_start=(0, 1),
              pacing_end=(0, 1), vocabulary_floor=(0.01, 1), class_loss=(0, 1), class_until=(0.001, 1),
              smoothing=(0, 1), smoothing_temperature=(0.001, math.inf), dropout=(0, 0.95),
              layer_drop=(0, 0.95), masked=(0, 1), teacher_weight=(0, 1),
              teacher_temperature=(0.01, math.inf), budget_minutes=(0.01, math.inf),
              tokens_per_step=(1, math.inf), micro_batch_size=(1, math.inf),
              log_interval=(1, math.inf))      # where they are not just 0 and above
FROM_DATA = ('vocab_size', 'bos', 'classes', 'domains')
MODEL_KEYS = {f.name: f for f in dataclasses.fields(GPTConfig) if f.name not in FROM_DATA}
KEYS = {f.name: f for f in dataclasses.fields(Settings)} | MODEL_KEYS
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow, ast.USub: operator.neg}


def literal(node, names):
    """The value of a syntax tree of literals, names, arithmetic on numbers and dict(); else ValueError."""
    value = functools.partial(literal, names=names)
    match node:
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            left, right = value(left), value(right)
            if isinstance(op, ast.Pow) and abs(right) > 64:
                raise ValueError
            return OPERATORS[type(op)](left, right)
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](value(operand))
        case ast.Tuple(rows) | ast.List(rows):
            return tuple(map(value, rows))
        case ast.Call(ast.Name('dict'), [], pairs):
            return {pair.arg: value(pair.value) for pair in pairs}
        case ast.Name(name) if name in names:
            return names[name]
    return ast.literal_eval(node)


def assignments(argv):
    """Yield (where, name, value) for every assignment in order; of a mistake (where, None, its text)."""
    so_far = {name: f.default for name, f in KEYS.items()}     # a config may use them: n_embd = n_embd // 2
    for arg in argv:
        if arg.startswith('--'):
            name, eq, text = arg[2:].partition('=')
            try:
                value = literal(ast.parse(text, mode='eval').body, {})
            except (ValueError, SyntaxError, TypeError, ArithmeticError):
                value = text                   # a bare word is a string
            yield (arg, name, value) if eq else (arg, None, f'an override is written --{name}=value')
            so_far[name] = value
            continue
        try:
            tree = ast.parse(Path(arg).read_text(encoding='utf-8'))
        except OSError as e:
            yield arg, None, f'this config cannot be read ({e.strerror}); is the path right?'
            continue
        except (SyntaxError, UnicodeDecodeError) as e:
            where = f'{arg}:{getattr(e, "lineno", 1)}'
            yield where, None, 'this is not Python; a config is lines of name = value'
            continue
        for node in tree.body:
            where = f'{arg}:{node.lineno}'
            match node:
                case ast.Expr(ast.Constant()):
                    pass                       # the docstring
                case ast.Assign([ast.Name(name)], value):
                    try:
                        so_far[name] = literal(value, so_far)
                        yield where, name, so_far[name]
                    except (ValueError, TypeError, ArithmeticError):
                        yield where, None, f'the value of {name} must be a literal, or arithmetic on settings'
                case _:
                    yield where, None, 'a config holds only lines of name = value'


def overruled(argv):
    """A line for every setting that one config sets and another before it had set otherwise."""
    seen = {}
    for where, name, value in assignments(argv):
        if name in seen and seen[name][1] != value and not where.startswith('--') and name != 'prepare':
            yield f'{where} sets {name} to {value!r}, {seen[name][0]} had set it to {seen[name][1]!r}'
        seen[name] = where, value


def are_points(pairs):
    """Whether these are (progress, factor) pairs that cover 0 to 1."""
    try:
        at, factors = np.array([(p, f) for p, f in pairs], dtype=float).T
    except (TypeError, ValueError, OverflowError):
        return False
    rises = at[0] == 0 and at[-1] == 1 and (np.diff(at) > 0).all()
    return bool(rises and (factors >= 0).all() and np.isfinite(factors).all())


def read_settings(argv):
    """Settings from the command line's configs and overrides. UserError lists all mistakes by line."""
    values, errors = {name: f.default for name, f in KEYS.items()}, []
    for where, name, value in assignments(argv):
        if name not in KEYS:
            near = difflib.get_close_matches(name or '', KEYS, 1)
            unknown = f'no setting is called {name}' + ''.join(f'; did you mean {key}?' for key in near)
            errors.append(f'{where}: {value if name is None else unknown}')
            continue
        if name == 'prepare' and not where.startswith('--'):  # each idea adds what it needs of the data
            value = values[name] if str(value) in values[name] else f'{values[name]} {value}'.strip()
        kind, (low, high) = type(KEYS[name].default), LIMITS.get(name, (0, math.inf))
        if name == 'country':
            value = str(value)
        if kind is float and type(value) is int and abs(value) < 1e300:
            value = float(value)
        values[name], must = value, None
        if type(value) is not kind:
            must = f'{kind.__name__}, like {KEYS[name].default!r}'
        elif name in CHOICES and value not in CHOICES[name]:
            must = f'one of {", ".join(CHOICES[name])}'
        elif name == 'weight_decay_points' and not are_points(value):
            must = 'pairs of progress, rising from 0 to 1, and a factor of at least 0, like ((0, 1), (1, 0))'
        elif name == 'country' and sample.grid(value) is None:
            must = f'one of {", ".join(sample.GRID)}, or the grams of CO2e a kWh'
        elif kind is float and not math.isfinite(value):
            must = 'finite'
        elif kind in (int, float) and not low <= value <= high:
            must = f'at least {low}' + f' and at most {high}' * (high < math.inf)
        if must:
            errors.append(f'{where}: {name} is {value!r}, it must be {must}')
    if not errors and values['pacing_start'] >= values['pacing_end']:
        errors.append(f'pacing_end is {values["pacing_end"]:g}, it must be more than pacing_start, '
                      f'{values["pacing_start"]:g}')
    count = f'{len(errors)} mistake{"s" * (len(errors) > 1)} in the settings:'
    refuse(errors, '\n  '.join([count] + errors))
    configs = '+'.join(Path(arg).stem for arg in argv if not arg.startswith('--'))
    values['out_dir'] = values['out_dir'] or f'out/{configs or "default"}'
    return SimpleNamespace(**values)


# ---- data: batches as a pure function of (seed, step, rank) ------------------------------------------------

class Stream:
    """The endless stream of training tokens, in the order of (seed, epoch): an epoch has every document once,
    or as often as its source weighs; 2.3 is all of a source's documents twice and 30 % of them once more.
    Training reads an epoch's rows in an order of their own, so that a step is not a few long documents."""

    def __init__(self, tokens, docs, seed, weights=None, reshuffle=True):
        self.tokens, self.starts, self.seed = tokens, np.asarray(docs['start']), seed
        self.reshuffle = reshuffle
        self.lengths = np.diff(np.append(self.starts, len(tokens)))
        self.weights, self.sources, self.shares = weights, docs['source'], []
        self.ends, self.row_ends = [0], [0]      # of the epochs so far, in tokens and in rows
        self.epoch = functools.lru_cache(maxsize=2)(self.epoch)
        self.shuffled = functools.lru_cache(maxsize=2)(self.shuffled)

    def epoch(self, number):
        """Documents' first tokens in this epoch's order, and where each stands in the epoch's stream."""
        dice = np.random.default_rng([self.seed, number * self.reshuffle])
        order = dice.permutation(len(self.starts))
        if self.weights is not None:
            of = [order[self.sources[order] == source] for source in range(len(self.weights))]
            part = [math.ceil(round(w % 1 * len(mine), 6)) for mine, w in zip(of, self.weights)]
            times = [[mine] * int(w) + [mine[:n]] for mine, w, n in zip(of, self.weights, part)]
            order = dice.permutation(np.concatenate(sum(times, [])))
        return self.starts[order], np.concatenate([[0], np.cumsum(self.lengths[order])])

    def begin(self, number):
        """The token at which an epoch begins."""
        while len(self.ends) <= number:
            self.ends.append(self.ends[-1] + int(self.epoch(len(self.ends) - 1)[1][-1]))
        return self.ends[number]

    def read(self, first, count):
        """Tokens first .. first + count of the stream, int64."""
        while self.ends[-1] <= first:
            self.begin(len(self.ends))
        number = bisect.bisect(self.ends, first) - 1
        starts, places = self.epoch(number)
        position = np.arange(first, min(first + count, self.begin(number + 1))) - self.ends[number]
        out = self.gather(starts, places, position)
        rest = count - len(out)
        return np.concatenate([out, self.read(first + len(out), rest)]) if rest else out

    def gather(self, starts, places, position):
        """The tokens at these positions of documents that begin at `starts` and stand at `places`."""
        doc = np.searchsorted(places, position, side='right') - 1
        return self.tokens[starts[doc] + position - places[doc]].astype(np.int64)

    def shuffled(self, number, rows):
        """The order in which training reads the rows of an epoch."""
        return np.random.default_rng([self.seed, number * self.reshuffle, rows]).permutation(rows)

    def place(self, row, T):
        """The token at which a row of training begins. Fewer than T tokens at an epoch's end are in none."""
        while self.row_ends[-1] <= row:
            n = len(self.row_ends)
            self.row_ends.append(self.row_ends[-1] + max(1, (self.begin(n) - self.begin(n - 1)) // T))
        number = bisect.bisect(self.row_ends, row) - 1
        first, end = self.row_ends[number:number + 2]
        return self.begin(number) + int(self.shuffled(number, end - first)[row - first]) * T

    def rows(self, first, B, T):
        """Rows first .. first + B of training, (B, T + 1): T tokens of the stream and the one after."""
        return np.stack([self.read(self.place(row, T), T + 1) for row in range(first, first + B)])

    def first_rows(self, n, T):
        return self.rows(0, n, T)[:, :-1]

    def pace(self, step, progress):
        """Only a curriculum has something to do here."""

    def domain(self, number):
        """What the model is told of micro-batch `number`, counted over all ranks: here nothing."""
        return ()


def admitted(progress, s, floor):
    """The share, from `floor` up, that a curriculum admits (Diehl Martinez 2023, 2311.08886)."""
    u = min(1.0, max(0.0, progress - s.pacing_start) / max(s.pacing_end - s.pacing_start, 1e-9))
    way = {'linear': u, 'quad': u ** 2, 'root': u ** 0.5, 'exp': math.expm1(10 * u) / math.expm1(10),
           'log': 1 + 0.1 * math.log(u + math.exp(-10)), 'step': math.floor(4 * u) / 3}[s.pacing]
    return floor + (1 - floor) * min(1.0, max(0.0, way))


class Curriculum(Stream):
    """A stream that draws, a step's worth at a time, from the easiest documents only, more of them with time:
    each once before any comes again. shares: what is admitted at each step, fixed some steps ahead of
    training, so that every rank and every resumption reads the same."""

    WINDOW = 8                   # steps, whose rows are shuffled
    AHEAD = WINDOW + 6           # steps; and more than a Prefetcher holds

    def __init__(self, tokens, docs, difficulty, s, weights=None):
        super().__init__(tokens, docs, s.seed)
        if weights is not None:
            refuse(any(w % 1 for w in weights), f'weights are {s.weights!r}, a curriculum reads a document a '
                   f'whole number of times: round them, or leave one away')
            often = np.repeat(np.arange(len(docs)), np.asarray(weights, int)[docs['source']])
            self.starts, self.lengths, difficulty = self.starts[often], self.lengths[often], difficulty[often]
        self.s, n = s, len(self.starts)
        self.rank = np.empty(n, np.int64)                    # ties fall by chance
        self.rank[np.lexsort((np.random.default_rng(s.seed).random(n), difficulty))] = np.arange(n)
        self.up_to = self.lengths[self.rank.argsort()].cumsum()
        self.shares, self.round, self.deck = [], -1, np.zeros(0, np.int64)      # deck: left of this round
        self.drawn, self.places = np.zeros(0, np.int64), np.zeros(1, np.int64)
        few, step = self.up_to[self.easiest(s.pacing_floor) - 1], s.tokens_per_step
        refuse(few < step, f'pacing_floor {s.pacing_floor:g} admits {few:,} tokens at first and a step reads '
                           f'{step:,}: raise it, or lower tokens_per_step')
        self.pace(0, 0.0)

    def easiest(self, share):
        """How many documents, the easiest first, come to this share of the text."""
        return min(len(self.rank), int(np.searchsorted(self.up_to, share * self.up_to[-1])) + 1)

    def pace(self, step, progress):
        """Fix what is admitted up to AHEAD steps from here, where progress will be about that."""
        share = admitted(progress * (step + self.AHEAD) / max(1, step), self.s, self.s.pacing_floor)
        self.shares += [share] * (step + self.AHEAD - len(self.shares))

    def draw(self):
        end, step = int(self.places[-1]), self.s.tokens_per_step
        admit = self.easiest(self.shares[end // step])
        may = np.flatnonzero(self.rank[self.deck] < admit)
        if not len(may):                                     # all that are admitted have been read
            self.round += 1
            dice = np.random.default_rng([self.s.seed, self.round * self.s.reshuffle])
            self.deck = dice.permutation(len(self.rank))
            if self.s.curriculum_order == 'frontier':
                self.deck = (-self.rank).argsort()
            may = np.flatnonzero(self.rank[self.deck] < admit)
        ends = self.lengths[self.deck[may]].cumsum()
        may = may[:np.searchsorted(ends, step) + 1]
        self.drawn = np.append(self.drawn, self.deck[may])
        self.places = np.append(self.places, end + ends[:len(may)])
        self.deck = np.delete(self.deck, may)

    def place(self, row, T):
        rows = self.WINDOW * self.s.tokens_per_step // T
        number, row = divmod(row, rows)
        return (number * rows + int(self.shuffled(number, rows)[row])) * T

    def read(self, first, count):
        needed = first - first % (self.WINDOW * self.s.tokens_per_step)
        while self.places[-1] < first + count:
            self.draw()
            gone = min(int(np.searchsorted(self.places, needed, side='right')) - 1, len(self.drawn))
            self.drawn, self.places = self.drawn[gone:], self.places[gone:]
        return self.gather(self.starts[self.drawn], self.places, np.arange(first, first + count))


class DomainStream(Stream):
    """A stream for each domain: a micro-batch is of the one that is furthest behind its share of the text, so
    that every step has all that are large enough. Where a domain's stream stands follows from the number of
    the micro-batch alone; the turns repeat after so many."""

    TURNS = 4096

    def __init__(self, streams):
        self.streams, self.shares, n = streams, [], len(streams)
        size = self.epoch(0)[1]
        share = np.maximum(np.diff(size, prepend=0) / size[-1], 2 / self.TURNS)    # none is left out
        owed, self.had = np.zeros(n), np.zeros((self.TURNS + 1, n), np.int64)
        for turn in range(self.TURNS):
            owed += share / share.sum()
            self.had[turn + 1] = self.had[turn] + (np.arange(n) == owed.argmax())
            owed[owed.argmax()] -= 1

    def epoch(self, number):
        return None, np.cumsum([stream.epoch(number)[1][-1] for stream in self.streams.values()])

    def turn(self, number):
        """Whose micro-batch this is, and how many it had before."""
        cycle, turn = divmod(number, self.TURNS)
        at = int((self.had[turn + 1] - self.had[turn]).argmax())
        return at, int(cycle * self.had[-1, at] + self.had[turn, at])

    def domain(self, number):
        return torch.tensor([*self.streams][self.turn(number)[0]]),

    def first_rows(self, n, T):
        return np.concatenate([self.rows(row, 1, T)[:, :-1] for row in range(n)])

    def rows(self, first, B, T):
        """The micro-batch of B rows that begins at row `first`."""
        at, before = self.turn(first // B)
        return [*self.streams.values()][at].rows(before * B, B, T)


class Prefetcher:
    """A thread makes the coming steps' micro-batches; next(step) returns them and the seconds it waited."""

    def __init__(self, stream, step, rows_per_step, B, T, rank, world, device, depth=3):
        self.make = lambda s: [self.micro_batch(s * rows_per_step + (m * world + rank) * B)
                               for m in range(rows_per_step // (B * world))]
        self.stream, self.B, self.T, self.device = stream, B, T, device
        self.queue, self.stopping = queue.Queue(depth), False
        self.thread = threading.Thread(target=self.run, args=(step,), daemon=True)
        self.thread.start()

    def micro_batch(self, row):
        """idx, targets (B, T), a row's last target the token after it; and its domain (), if there are any."""
        rows = torch.from_numpy(self.stream.rows(row, self.B, self.T))
        batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        batch += self.stream.domain(row // self.B)
        return tuple(t.pin_memory() for t in batch) if self.device == 'cuda' else batch

    def run(self, step):
        try:
            while not self.stopping:
                self.queue.put((step, self.make(step)))
                step += 1
        except Exception as e:                  # handed to the training thread, which raises it
            self.queue.put((step, e))

    def next(self, step):
        started = time.monotonic()
        number, micro_batches = self.queue.get()
        if isinstance(micro_batches, Exception):
            raise micro_batches
        assert number == step, f'prefetched step {number}, wanted {step}'
        return micro_batches, time.monotonic() - started

    def close(self):
        self.stopping = True
        while self.thread.is_alive():           # it may be blocked on a full queue
            while not self.queue.empty():
                self.queue.get()
            self.thread.join(0.01)


# ---- optimizer ---------------------------------------------------------------------------------------------

# Minimax polynomials a x + b x^3 + c x^5 driving singular values in [0.004, 1] to 1 (Amsel 2025; 2505.16932)
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233002106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalize(x):
    """The nearest semi-orthogonal matrices to x (..., rows, cols), to about 5%: U V^T of its SVD."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: an update has all its singular values near 1 (Jordan 2024; 2502.16982).

    A gradient's few large directions would otherwise drown the rest, and the spectral norm of an update
    decides how much a layer's output moves; so the learning rate carries over from one width to another. Only
    for matrices that multiply activations: AdamW takes an embedding, whose rows are looked up one by one.
    All matrices of one shape are one group, their momentum one stacked tensor, orthogonalised in one batch.
    Of domains' parts and experts those that met no token in a step stay as they are.
    """

    def __init__(self, params, momentum, dtype):
        shapes = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        groups = [dict(params=ps) for ps in shapes.values()]
        super().__init__(groups, dict(lr=0.0, weight_decay=0.0, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr, momentum = group['params'], group['lr'], group['momentum']
            grad = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if 'momentum' not in state:
                state['momentum'] = torch.zeros_like(grad)
            met = grad.flatten(2).any(2)[..., None, None].to(grad.dtype) if grad.ndim > 3 else 1.0
            average = state['momentum'].lerp_(grad, (1 - momentum) * met)
            update = orthogonalize(grad.lerp(average, momentum).to(self.dtype)).to(grad.dtype)   # Nesterov
            rows, cols = grad.shape[-2:]
            update *= lr * max(1, rows / cols) ** 0.5 * met  # unit inputs change the output by a unit
            kept = 1 - lr * group['weight_decay'] * met
            torch._foreach_mul_(params, list(kept.unbind()) if grad.ndim > 3 else kept)
            torch._foreach_sub_(params, list(update.unbind()))


    def each(self):
        """{parameter: its own state}."""
        return {p: dict(momentum=average) for group in self.param_groups
                for p, average in zip(group['params'], self.state[group['params'][0]].get('momentum', ()))}

    def take(self, states):
        """Go on from {parameter: its own state}; a parameter without one has averaged nothing yet."""
        for params in (group['params'] for group in self.param_groups):
            averages = [states.get(p, {}).get('momentum', torch.zeros_like(p)) for p in params]
            self.state[params[0]]['momentum'] = torch.stack(averages).detach()


def make_optimizers(model, s, dtype):
    """The optimizers of a model; groups carry 'base_lr' and 'base_decay', which the schedule multiplies."""
    head, slim = model.lm_head.weight, 256 / model.config.n_embd
    # a head that growth has scaled down answers that much less, and growth has narrowed `slim` already
    head_lr = s.head_lr * slim / model.config.head_scale
    layers = [*model.blocks.modules(), *model.ahead]
    matrices = [m.weight for m in layers if isinstance(m, Linear)]
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.weight is not head]
    biases = [m.bias for m in layers if isinstance(m, Experts)]
    scalars = [p for p in model.parameters() if p.ndim < 2 and not any(p is bias for bias in biases)]
    heads = [head] if model.class_head is None else [head, model.class_head.weight]
    groups = [dict(params=heads, base_lr=head_lr),
              dict(params=tables, base_lr=s.embedding_lr), dict(params=scalars, base_lr=s.scalar_lr),
              dict(params=biases, base_lr=s.balance_lr, betas=(0.0, 0.0), eps=1e-30)]   # a step by the sign
    optimizers = [Muon(matrices, s.momentum, dtype)] if s.optimizer == 'muon' else []
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group.update(base_lr=s.learning_rate, base_decay=s.weight_decay)
    if not optimizers:
        groups += [dict(params=[p for p in matrices if p.ndim == n], base_lr=0.05 * s.learning_rate * slim,
                        base_decay=s.weight_decay / slim) for n in (2, 3)]
    groups = [dict(base_decay=0.0) | g for g in groups if g['params']]
    optimizers.append(torch.optim.AdamW(groups, lr=0.0, betas=(s.beta1, s.beta2), eps=1e-10,
                                        weight_decay=0.0, fused=True))
    for group in (g for optimizer in optimizers for g in optimizer.param_groups if s.frozen):
        # frozen domains get no text, so what can learn are the others' parts
        group.update(base_lr=group['base_lr'] * (group['params'][0].ndim == 3), base_decay=0.0)
    return optimizers


def growth_stages(s, config, domains=()):
    """[(progress, the config from then on)], of the settings growth and domains_from."""
    stages, last = [], 0.0
    for stage in s.growth:
        try:
            at, changes = stage
            if not last < at < 1:
                raise ValueError(f'progress {at} does not lie between {last} and 1')
            if 'domains' in changes:
                raise ValueError('domains come by the settings domains and domains_from')
            config = grown_config(config, changes, s.growth_tokens == 'random', s.growth_depth == 'stack')
            last = at
        except (TypeError, ValueError, AttributeError) as e:
            raise UserError(f'growth has {stage!r} ({e}): write it like [(0.3, dict(n_embd=512))]') from e
        stages.append((at, config))
    if domains and not config.domains:
        refuse(last >= s.domains_from, f'domains_from is {s.domains_from:g}, and the model grows until '
                                       f'{last:g}: it can split only after that')
        stages.append((s.domains_from, split(config, domains)))
    return stages


def grown(model, optimizers, config, s, number, parts=()):
    """The model grown to a config, as the run's `number`th growth, and its optimizers, with all they knew."""
    bigger, came_from = grow(model, config, s.growth_snr_db, s.growth_depth == 'stack',
                             s.growth_tokens == 'random', s.seed + number, parts)
    fresh, known = make_optimizers(bigger, s, bigger.compute_dtype), {}
    for optimizer in optimizers:
        known |= optimizer.each() if isinstance(optimizer, Muon) else optimizer.state
    state = {}
    for p, (q, copies, how) in came_from.items():           # gradients are shared out among the copies
        shares = dict(momentum=copies, exp_avg=copies, exp_avg_sq=copies ** 2)
        state[p] = {name: spread(t, p.shape, how) / shares[name] if name in shares else t.clone()
                    for name, t in known.get(q, {}).items()}
    for optimizer in fresh:
        if isinstance(optimizer, Muon):
            optimizer.take(state)
        else:
            mine = [p for group in optimizer.param_groups for p in group['params']]
            optimizer.state.update((p, state[p]) for p in mine if state.get(p))
    return bigger, fresh


def schedule(progress, s):
    """Multiplier of the learning rates at progress in [0, 1]: a short rise, a level, a linear fall."""
    rise = 0.1 + 0.9 * progress / s.warmup_frac if progress < s.warmup_frac else 1.0
    fall = (1 - progress) / s.cooldown_frac if progress > 1 - s.cooldown_frac else 1.0
    return rise * (s.final_lr_frac + (1 - s.final_lr_frac) * fall)


def new_average(model, progress):
    """The weights' running average, as it begins."""
    return dict(progress=progress, model={name: w.clone() for name, w in model.state_dict().items()})


def follow(average, model, progress, ema):
    """Draw the average to the model's weights: what is `ema` of progress ago counts 1 / e of what is now."""
    weight = -math.expm1((average['progress'] - progress) / ema)
    torch._foreach_lerp_(list(average['model'].values()), list(model.state_dict().values()), weight)
    average['progress'] = progress


def set_rates(optimizers, progress, s):
    rate, factor = schedule(progress, s), float(np.interp(progress, *zip(*s.weight_decay_points)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = rate * group['base_lr']
            group['weight_decay'] = group['base_decay'] * factor
    return rate


# ---- clock -------------------------------------------------------------------------------------------------

class Clock:
    """What the run has cost in seconds, over all resumptions, and how far the schedules should be.

    spent: seconds that earlier processes of this run took. age(): seconds since this one was typed.
    reserve: seconds kept for what follows the last step: saving, the closing evaluation, the sample, leaving.
    """

    def __init__(self, s, spent=0.0, trained=0.0, progress=0.0, age=lambda: time.monotonic() - STARTED):
        self.budget, self.counts_all, self.reserve = 60 * s.budget_minutes, s.budget_counts == 'all', 0.0
        self.max_steps = s.max_steps or -(-s.max_tokens // s.tokens_per_step)
        self.spent, self.trained, self.progress, self.age = spent, trained, progress, age

    def elapsed(self):
        return self.spent + self.age()

    def left(self):
        """Seconds of training that the budget still has room for."""
        return self.budget - self.elapsed() - self.reserve if self.counts_all else self.budget - self.trained

    def add_step(self, seconds, left_before, step):
        """Account for step number `step`, from 1. Driven by time, progress nears 1 in proportion to the time
        left: it gets there at the budget's end, whatever evaluations or a restart took."""
        self.trained += seconds
        if self.max_steps:
            self.progress = min(1.0, step / self.max_steps)
        else:
            self.progress += (1 - self.progress) * min(1.0, seconds / max(left_before, 1e-9))

    def fits(self, step, seconds):
        """Whether to train on, if the least step takes `seconds`: in time on average, never 5 s late."""
        return (not self.max_steps or step < self.max_steps) and self.left() > max(0.5 * seconds, seconds - 5)


# ---- checkpoints and reports -------------------------------------------------------------------------------

def write_beside(path, write):
    """Make a file complete or not at all: write(file) beside its place, flush, move."""
    path = Path(path)
    beside = path.with_name(path.name + '.part')
    try:
        with open(beside, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:        # torch's writer turns a full disk into a RuntimeError
        beside.unlink(missing_ok=True)
        raise UserError(f'{path} could not be written ({e}); free some space and go on with '
                        f'--init_from=resume') from e


def save_checkpoint(out_dir, state):
    path = Path(out_dir) / 'ckpt.pt'
    write_beside(path.with_name('ckpt.new.pt'), lambda f: torch.save(state, f))
    if path.exists():
        os.replace(path, path.with_name('ckpt.prev.pt'))
    os.replace(path.with_name('ckpt.new.pt'), path)


def read_rows(path):
    """The whole rows of a metrics.jsonl, if there is one; a last line that was cut off is left out."""
    rows = []
    for line in (Path(path).read_text().splitlines() if Path(path).exists() else []):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


# Dense bf16 peak with fp32 accumulation, TFLOP/s, from the makers' data sheets; a card not here gets no MFU.
PEAK_TFLOPS = {'RTX 4090': 165.2, 'RTX 3090': 71.2, 'RTX 5090': 209.5, 'L40S': 362.1, 'L4': 121.0,
               'A10G': 70.0, 'A100': 311.9, 'H100 PCIe': 756.4, 'H100 NVL': 835.5, 'H100': 989.4,
               'H200 NVL': 835.5, 'H200': 989.4}


def peak_flops(name):
    exact = (v for k, v in PEAK_TFLOPS.items() if re.search(rf'\b{k}\b(?! (Laptop|D\b))', name))  # no 4090 D
    return next((1e12 * v for v in exact), None)


def proc(name):
    """The text of a file of Linux's /proc; empty elsewhere."""
    try:
        return Path('/proc', name).read_text()
    except OSError:
        return ''


def hardware(device):
    """The name of what computes here."""
    if device == 'cuda':
        return torch.cuda.get_device_name()
    model = re.search(r'^model name\s*: *([^:\n]*[^:\s])', proc('cpuinfo'), re.M)
    name = model[1] if model else platform.processor() or platform.machine()
    return f'{name}, {torch.get_num_threads()} threads'


def peak_memory_gb(device):
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2 ** 30
    import resource
    unit = 2 ** 30 if sys.platform == 'darwin' else 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def git_commit():
    try:
        run = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=Path(__file__).parent,
                             capture_output=True, text=True, timeout=5)
        return run.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


# ---- pages -------------------------------------------------------------------------------------------------

def write_page(path, title, **data):
    """One HTML page that needs nothing else: web/page.html, which says what it draws, with its data in it."""
    text = json.dumps(dict(title=title, **data))
    text = json.dumps(json.loads(text, parse_constant=lambda _: None))      # NaN and infinities are no JSON
    text = text.replace('<', '\\u003c')                     # without one, a sample with </script> stays text
    page = (Path(__file__).parent / 'web' / 'page.html').read_text('utf-8')
    write_beside(path, lambda f: f.write(page.replace('{}</script>', f'{text}</script>', 1).encode()))


def write_report(out_dir, blocks=()):
    """Make report.html of a finished run from the files that it left, and of blocks that ideas add."""
    out_dir = Path(out_dir)
    result, rows = json.loads((out_dir / 'result.json').read_text()), read_rows(out_dir / 'metrics.jsonl')
    write_page(out_dir / 'report.html', f'{out_dir.name}: {result["val_bpb"]:.4f} bits per byte',
               result=result, rows=rows, blocks=[*blocks])


# ---- what the hardware decides -----------------------------------------------------------------------------

def choose_device(s):
    refuse(s.device == 'cuda' and not torch.cuda.is_available(),
           "device is 'cuda', and torch finds none: leave it at 'auto', or install torch's CUDA build")
    return s.device if s.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'


def model_config(s, data):
    domains = domain_names(s, data) if not s.domains_from else []
    try:
        kernels_named(s.kernels)
        shape = {k: getattr(s, k) for k in MODEL_KEYS}
        classes = prepare_data.word_class_table(data).shape[1] if s.class_loss else 0
        return GPTConfig(vocab_size=data.meta['vocab_size'], bos=data.meta['bos'], classes=classes,
                         domains=','.join(domains), **shape)
    except ValueError as e:
        raise UserError(f'the model cannot be built: {e}') from e


def config_from(theirs, s, ours, given, domains):
    """The shape of the run to start from, grown to what is given here; the settings follow."""
    theirs = GPTConfig(**theirs)
    changes = {k: getattr(ours, k) for k in MODEL_KEYS
               if k in given and getattr(ours, k) != getattr(theirs, k)}
    others = {k: changes.pop(k) for k in ('dropout', 'layer_drop', 'z_loss', 'predict_ahead') if k in changes}
    try:
        config = grown_config(theirs, changes, s.growth_tokens == 'random', s.growth_depth == 'stack')
        config = dataclasses.replace(config, classes=ours.classes, **others)
        if theirs.domains:
            s.domains_from = 0.0                # it has them already
        if domains and not s.domains_from:
            config = split(config, domains)
    except ValueError as e:
        raise UserError(f'{s.init_from} is of another model, and {e}: give its shape, or none') from e
    vars(s).update({k: getattr(config, k) for k in MODEL_KEYS})
    has = theirs.domains.split(',') if theirs.domains else []
    refuse(has and not domains, f'{s.init_from} has the domains {theirs.domains}: name those to go on with, '
                                f'--domains={theirs.domains}')
    strange = [name for name in s.frozen.split(',') if s.frozen and name not in has]
    refuse(strange, f'frozen names {strange[0] if strange else ""!r}, and {s.init_from} has '
                    f'{theirs.domains or "no domains"}: leave it away')
    return config


def adapt(s, device, world, domains=0):
    """dtype, whether to compile, the micro-batch, and a sentence about each that is not what was asked."""
    said, dtype = [], s.dtype
    if dtype == 'auto':                         # a CPU without the instructions emulates bf16: slow
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device == 'cuda'
                else bool(re.search('avx512_bf16|amx_bf16', proc('cpuinfo'))))
        dtype = 'bfloat16' if fast else 'float32'
    rows, rest = divmod(s.tokens_per_step, s.block_size * world)
    refuse(rest,
           f'tokens_per_step is {s.tokens_per_step}, it must be a multiple of block_size {s.block_size} '
           f'times {world} rank{"s" * (world > 1)}: try {(rows + 1) * s.block_size * world}')
    limit = s.micro_batch_size if device == 'cuda' else min(s.micro_batch_size, max(1, 8192 // s.block_size))
    few = max(1, rows * world // domains) if domains else limit     # so that a step has room for all domains
    micro = max(b for b in range(1, min(limit, rows, few) + 1) if rows % b == 0)
    if micro != s.micro_batch_size:
        why = 'a CPU is fastest on some 8,192 tokens at a time'
        why = f'a rank reads {rows} sequences a step' if limit >= rows else why
        why = f'{domains} domains share the {rows * world} sequences of a step' if few < limit else why
        said.append(f'micro_batch_size {micro} instead of {s.micro_batch_size}: {why}')
    compile = s.compile == 'on' and not s.dry_run
    if s.dry_run and s.compile != 'off':
        said.append('dry_run measures without torch.compile, which takes too long for a look: '
                    'the run itself may be faster')
    elif s.compile == 'auto':
        compile = device == 'cuda' or s.budget_minutes >= 5 and not s.max_steps
        if compile and device == 'cpu' and not (shutil.which('g++') or shutil.which('clang++')):
            compile = False
            said.append('torch.compile is off: no C++ compiler (g++) is installed')
        elif not compile:
            said.append('torch.compile is off: it takes half a minute of a CPU, '
                        'more than so short a run gets back')
    return dtype, compile, micro, said


def check_room(s, config, micro, device, out_dir):
    """Refuse what cannot end well: a model or a checkpoint that memory or disk has no room for."""
    total = config.params()['total']
    # fp32 weights, gradients and two moments; activations, about 18 C a layer and token; a block of logits
    activations = micro * config.block_size * config.n_embd * (36 * config.n_layer + 8)
    need = 16 * total + activations + 512 * config.vocab_size * 16
    if device == 'cuda':
        have = torch.cuda.mem_get_info()[0]
    else:
        available = re.search(r'MemAvailable:\s+(\d+)', proc('meminfo'))
        have = 1024 * int(available[1]) if available else math.inf
    refuse(need > have,
           f'the model needs about {need / 2**30:.1f} GiB and {have / 2**30:.1f} are free: lower '
           f'micro_batch_size (now {micro}), n_layer or n_embd')
    place = next(p for p in [out_dir.absolute(), *out_dir.absolute().parents] if p.exists())
    free, checkpoint = shutil.disk_usage(place).free, (12 + 4 * (s.ema > 0)) * total
    refuse(free < 3 * checkpoint + 2 ** 20,
           f'{place} has {free / 2**20:,.0f} MiB free, three checkpoints need '
           f'{3 * checkpoint / 2**20:,.0f}: make room or choose another --out_dir')


def open_run(s, out_dir):
    """The checkpoint to go on from or take weights from, or None; refuses to write over an earlier run."""
    if blocked := next((p for p in [out_dir, *out_dir.parents] if p.exists() and not p.is_dir()), None):
        raise UserError(f'{blocked} is a file, and the run would be written to the folder {out_dir}: '
                        f'choose another --out_dir')
    finished = (out_dir / 'result.json').exists()
    saved = (out_dir / 'ckpt.pt').exists() or (out_dir / 'ckpt.prev.pt').exists()   # killed between two moves
    if s.init_from == 'resume':
        refuse(finished and not s.overwrite,
               f'{out_dir} holds a finished run, there is nothing to resume: choose another --out_dir')
        refuse(not saved, f'{out_dir} has no ckpt.pt to resume from: leave --init_from away to start afresh')
        checkpoint = sample.read_checkpoint(out_dir)
        refuse(checkpoint.get('order') != 2, f'{out_dir} was begun by an older train.py, which read the text '
               f'in another order: start afresh with --overwrite=True, or check that version out')
        return checkpoint
    if not (s.overwrite or s.dry_run):
        refuse(finished, f'{out_dir} holds a finished run: choose another --out_dir, or --overwrite=True')
        refuse(saved, f'{out_dir} holds an unfinished run: go on with --init_from=resume, choose another '
               f'--out_dir, or say --overwrite=True')
    return None if s.init_from == 'scratch' else sample.read_checkpoint(s.init_from)


def open_or_build(s, rank):
    """The data set that the settings name, built first if it is missing."""
    folder = prepare_data.data_folder(s.dataset, s.tokenizer, s.vocab_size, s.data_dir)
    if not (folder / 'meta.json').exists() and rank == 0:
        print(f'{folder} is missing: building it', flush=True)
        command = [sys.executable, prepare_data.__file__, s.dataset, '--tokenizer', s.tokenizer,
                   '--vocab_size', str(s.vocab_size), '--data_dir', s.data_dir, *s.prepare.split()]
        if s.init_from not in ('scratch', 'resume'):           # weights go with the vocabulary they learned
            command += ['--tokenizer_from', s.init_from]
        refuse(subprocess.run(command).returncode, f'{s.dataset} could not be prepared, see above')
    if s.evals == 'all' and rank == 0 and 'files' in prepare_data.DATASETS.get(s.dataset, {}):
        try:
            prepare_data.fetch_evals(s.eval_data)
        except UserError as e:                  # the run is worth more
            print(f'warning: no BLiMP: {e}', flush=True)
    if dist.is_initialized():
        dist.barrier()
    return prepare_data.open_data(folder, s.dataset)


def make_stream(s, data):
    """The training stream of a run."""
    weights = prepare_data.source_weights(s.weights, data)
    if domains := domain_names(s, data):
        return domain_stream(s, data, weights, domains)
    if not s.curriculum:
        return Stream(data.tokens['train'], data.docs['train'], s.seed, weights, s.reshuffle)
    difficulty = prepare_data.measure(data, 'train', s.curriculum)
    return Curriculum(data.tokens['train'], data.docs['train'], difficulty, s, weights)


# ---- domains -----------------------------------------------------------------------------------------------

def domain_names(s, data):
    """The names of the run's domains, of the setting; UserError if the data does not have them."""
    refuse(s.frozen and (s.init_from == 'scratch' or not s.domains),
           f'frozen is {s.frozen!r}: it needs an --init_from that has domains, and all names of this run in '
           f'--domains')
    if not s.domains:
        return []
    sources = [*data.meta['splits']['train']['sources']]
    names = sources if s.domains == 'sources' else s.domains.split(',')
    learn = [name for name in names if name not in s.frozen.split(',')]
    named = [source for name in learn for source in name.split('+')]
    unknown = [source for source in named if source not in sources]
    refuse(unknown, f'domains names {unknown[0] if unknown else ""!r}, the sources of {data.folder} are '
                    f'{", ".join(sources)}')
    refuse(len({*named}) < len(named) or len({*names}) < len(names),
           f'domains is {s.domains!r}, and names one of them twice')
    refuse(not learn, f'frozen is {s.frozen!r}, and leaves no domain to learn: name a new one in domains too')
    return names


def split(config, domains):
    try:
        return grown_config(config, dict(domains=','.join(domains)))
    except ValueError as e:
        raise UserError(f'the model cannot have domains: {e}') from e


def domain_stream(s, data, weights, domains):
    """The stream of a run that has domains: one for each that learns."""
    refuse(s.curriculum, 'a curriculum reads all sources as one, domains each on its own: leave one away')
    docs, sources, streams = data.docs['train'], data.meta['sources'], {}
    weights = weights or [1.0] * len(sources)
    for number, name in enumerate(domains):
        if name not in s.frozen.split(','):
            mine = [w * (source in name.split('+')) for w, source in zip(weights, sources)]
            refuse(not any(mine), f'weights leave nothing of domain {name!r} to read: leave it away')
            streams[number] = Stream(data.tokens['train'], docs, s.seed, mine, s.reshuffle)
    return DomainStream(streams)


def nearest_parts(model, config, data):
    """For each domain of `config` the number of the model's part to begin with: its own, or for a new one
    that which some of its documents surprise least."""
    has, tokens, docs = model.config.domains.split(','), data.tokens['train'], data.docs['train']
    ends = np.append(docs['start'][1:], len(tokens))
    of = np.array(sample.domain_of(config, data))[docs['source']]

    def nearest(number):
        some = np.random.default_rng(0).permutation(np.flatnonzero(of == number))[:64]
        texts = ((doc, tokens[docs['start'][doc]:ends[doc]][:1024]) for doc in some)
        return int(sum(sample.nats_by_domain(model, texts).values()).argmin())
    names = config.domains.split(',')
    return [has.index(name) if name in has else nearest(i) for i, name in enumerate(names)]


# ---- objective ---------------------------------------------------------------------------------------------

def make_objective(s, data, config, device, rank):
    """objective(model, step, progress): the function of a micro-batch whose mean a step makes smaller.

    Chosen once: the plain one is the model's own loss and costs nothing. An idea that changes the loss adds
    an entry to `extra`: an argument of GPT.forward, and a function of (idx, progress) that makes it. What
    changes on the way is a tensor there: torch.compile would make a new program for every float.
    """
    extra, known, noisy = {}, None, config.dropout or config.layer_drop or s.masked
    if s.smoothing:
        table = smoothing_table(s, data).to(device)
        norm = similarity_norm(table)
        extra['soft'] = lambda idx, progress: (
            table, norm, torch.full((), 1 - s.smoothing * (1 - progress), device=device))
    if s.class_loss:
        class_of = torch.from_numpy(prepare_data.word_class_table(data).argmax(1)).to(device)
        extra['classes'] = lambda idx, progress: (
            class_of, torch.full((), s.class_loss * max(0.0, 1 - progress / s.class_until), device=device))
    if config.predict_ahead:
        extra['ahead'] = lambda idx, progress: torch.full((), s.ahead_weight * (1 - progress), device=device)
    if s.teacher:
        extra['teach'] = make_teacher(s, data, device)
    if s.vocabulary_floor < 1:
        refuse(s.teacher or s.smoothing, 'vocabulary_floor keeps rare ids out of the loss, teacher and '
               'smoothing put them in: leave one away')
        known = known_ids(s, data, device)
    if not extra and not known and not noisy:
        return lambda model, step, progress: model

    def objective(model, step, progress):
        if noisy:      # each step's own numbers, another rank's others: a resumed run draws the same again
            torch.manual_seed(int(np.random.default_rng([s.seed, step, rank]).integers(2 ** 62)))

        def loss_of(idx, targets, *domain):
            arguments = {k: f(idx, progress) for k, f in extra.items()}
            pair = known(idx, targets, progress) if known else (idx, targets)
            return model(*pair, *domain, **arguments)
        return loss_of
    return half_masked(objective, s, data, config, device) if s.masked else objective


def half_masked(causal, s, data, config, device):
    """The objective `causal` for most rows. The first share of them reads both ways and predicts hidden
    tokens, each from the position before it, as the other rows do; 30 % are hidden at first, 15 % in the end
    (Charpentier 2024, 2410.24159)."""
    micro = adapt(s, device, int(os.environ.get('WORLD_SIZE', 1)), len(domain_names(s, data)))[2]
    n, mask = round(s.masked * micro), getattr(data.tokenizer, 'unk', None)
    refuse(mask is None, f'masked needs a token to mask with, and tokenizer {s.tokenizer} has none: take bpe')
    refuse(s.vocabulary_floor < 1, 'masked and vocabulary_floor need the same spare token: leave one away')
    refuse(not 0 < n < micro,
           f'masked {s.masked:g} is {n} of the {micro} rows of a micro-batch, and both kinds must have some: '
           f'change it or micro_batch_size')

    def objective(model, step, progress):
        loss_of = causal(model, step, progress)

        def loss(idx, targets, *domain):
            rows = idx[:n]
            hidden = (torch.rand(rows.shape, device=device) < 0.3 - 0.15 * progress) & (rows != config.bos)
            next_hidden = hidden.roll(-1, 1)
            next_hidden[:, -1] = False
            guessed = targets[:n].masked_fill(~next_hidden, -1)
            filled_in = model(rows.masked_fill(hidden, mask), guessed, *domain, two_way=True)
            return n / micro * filled_in + (1 - n / micro) * loss_of(idx[n:], targets[n:], *domain)
        return loss
    return objective


def smoothing_table(s, data):
    """(V, r) for model.soft_targets: the product of two rows is log2 of how alike their tokens are, by the
    cosine of their word classes over a temperature (Diehl Martinez 2024, 2410.11462). r is a power of 2, for
    Triton."""
    if s.smoothing_by == 'uniform':
        return torch.zeros(data.meta['vocab_size'], 16)
    rows = torch.from_numpy(prepare_data.word_class_table(data))
    rows = F.normalize(rows, dim=1) * (math.log2(math.e) / s.smoothing_temperature) ** 0.5
    return F.pad(rows, (0, max(16, 2 ** math.ceil(math.log2(rows.shape[1]))) - rows.shape[1]))


def known_ids(s, data, device):
    """(idx, targets, progress) -> both without ids not known yet: unk in the input, and no target."""
    unk = getattr(data.tokenizer, 'unk', None)
    refuse(unk is None, f'vocabulary_floor needs an id for what is not known, {s.tokenizer} has none: '
           f'use bpe')
    counts = np.bincount(data.tokens['train'][:2 ** 26], minlength=data.meta['vocab_size'])
    rank = torch.from_numpy((-counts).argsort(kind='stable').argsort()).to(device)

    def known(idx, targets, progress):
        n = admitted(progress, s, s.vocabulary_floor) * len(rank)
        # what the document begins with is always known, and -1 is no id
        return (torch.where((rank[idx] < n) | (idx == data.meta['bos']), idx, unk),
                torch.where((rank[targets.clamp(min=0)] < n) & (targets >= 0), targets, -1))
    return known


def make_teacher(s, data, device):
    """What GPT.forward's `teach` is for idx, of the run that s.teacher names."""
    refuse(Path(s.teacher).resolve() == Path(s.out_dir).resolve(),
           f'teacher {s.teacher} is where this run goes: choose another --out_dir')
    teacher, tokenizer = sample.load(s.teacher, device)
    c, teacher.compute_dtype = teacher.config, getattr(torch, adapt(s, device, 1)[0])
    refuse(tokenizer.blob != data.tokenizer.blob,
           f'teacher {s.teacher} has another vocabulary than {data.folder}: choose one with the same')
    refuse(c.domains, f'teacher {s.teacher} has domains, and nothing tells it which: choose a plain one')
    refuse(c.block_size < s.block_size,
           f'teacher {s.teacher} reads {c.block_size} tokens at most: lower block_size (now {s.block_size})')
    kernel = device == 'cuda' and 'attention' in kernels_named(s.kernels)
    refuse(kernel and c.head_dim not in (16, 32, 64, 128),
           f'teacher {s.teacher} has heads of {c.head_dim}, which no kernel takes: say --kernels=-attention')

    @torch.no_grad()
    def teach(idx, progress):
        hidden = teacher.trunk(idx).flatten(0, 1)
        return s.teacher_weight, s.teacher_temperature, hidden, teacher.lm_head.weight, c.logit_softcap
    return teach


# ---- trackers ----------------------------------------------------------------------------------------------

def leaves(value, name=''):
    """(name, value) of what is not None in dicts of dicts, names joined by slashes."""
    for key, v in value.items():
        if isinstance(v, dict):
            yield from leaves(v, f'{name}{key}/')
        elif v is not None:
            yield f'{name}{key}', v


def open_tracker(s):
    """What hands a tracker {name: number} at a step, a table (its name, columns, rows, step) and a file, and
    what closes it."""
    name, folder = re.sub(r'[^\w.-]', '-', Path(s.out_dir).name), Path(s.out_dir)

    def as_text(columns, rows):
        return '\n'.join(' | '.join(map(str, row)) for row in [columns, ['---'] * len(columns), *rows])

    if s.tracker == 'tensorboard':
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder / 'tensorboard')
        return (lambda row, step: [writer.add_scalar(key, v, step) for key, v in row.items()],
                lambda key, columns, rows, step: writer.add_text(key, as_text(columns, rows), step),
                lambda path: writer.add_text('file', str(path)), writer.close)     # it keeps none
    if s.tracker == 'wandb':
        import wandb
        run = wandb.init(project='halfhour', name=name, dir=folder, config=vars(s),
                         settings=wandb.Settings(console='off'))

        def keep(path):
            artifact = wandb.Artifact(name, 'model')
            artifact.add_file(str(path))
            run.log_artifact(artifact)
        return (lambda row, step: run.log(row, step=step), lambda key, columns, rows, step:
                run.log({key: wandb.Table(columns=columns, data=rows)}, step=step), keep, run.finish)
    import mlflow
    mlflow.set_experiment('halfhour')
    mlflow.start_run(run_name=name)
    mlflow.log_params({key: v for key, v in vars(s).items() if v != KEYS[key].default})
    return (lambda row, step: mlflow.log_metrics(row, step=step),
            lambda key, columns, rows, step: mlflow.log_text(as_text(columns, rows), f'{key}_{step}.md'),
            lambda path: mlflow.log_artifact(str(path)), mlflow.end_run)


class Tracker(threading.Thread):
    """Hands the rows of metrics.jsonl, and files, to the tracker that s names. In a thread of its own: one
    that is slow, away or broken costs the run a warning and, at its end, WAIT seconds."""
    WAIT, made = 5.0, []

    def __init__(self, s, say):
        super().__init__(daemon=True)
        self.s, self.say, self.waiting = s, say, queue.Queue(1000)
        self.left_out, self.asked, self.done = 0, False, False
        self.made.append(self)
        self.start()

    def put(self, item):
        try:
            self.waiting.put_nowait(item)
        except queue.Full:
            self.left_out += 1

    def run(self):
        try:
            numbers, table, keep, close = open_tracker(self.s)
            while (item := self.waiting.get()) is not None:
                if isinstance(item, Path):
                    keep(item)
                    continue
                step, found = item.pop('step'), dict(leaves(item))
                numbers({k: v for k, v in found.items() if not isinstance(v, str)}, step)
                for key, v in item.items():
                    if isinstance(v, dict) and v:
                        rows = [[k, n] for k, n in leaves(v) if not isinstance(n, str)]
                        table(key, ['name', 'value'], rows, step)
                    elif isinstance(v, str):
                        table(key, ['text'], [[v]], step)
            close()
            self.done = True
        except Exception as e:                  # whatever happens to a tracker, the run goes on
            why = (str(e).strip() or type(e).__name__).splitlines()[0]
            self.say(f'warning: {self.s.tracker} follows no longer ({why}); metrics.jsonl has everything')

    def finish(self):
        """Whether everything has arrived; waits for it once, WAIT seconds at most."""
        if self.is_alive() and not self.asked:
            self.asked, until = True, time.monotonic() + self.WAIT
            with contextlib.suppress(queue.Full):
                self.waiting.put(None, timeout=self.WAIT)
            self.join(max(0.0, until - time.monotonic()))
            if self.is_alive() or self.left_out:
                self.say(f'warning: {self.s.tracker} was too slow and lacks {self.left_out:,} rows, and '
                         f'{self.waiting.qsize():,} that wait; metrics.jsonl has everything')
        return self.done


# ---- the run -----------------------------------------------------------------------------------------------

LEAVING = 0.8       # seconds from the last line printed to the prompt back, the report's page included
UNPRINTED = ('evals', 'settings', 'config', 'hardware', 'versions', 'data', 'sample',       # or told below
             'warnings', 'energy')
BAD_STEPS = 5       # steps in a row that are not finite before the run goes back to its last checkpoint
# settings that a run which goes on may change; all others decide what a step computes
FREE = set('dataset tokenizer vocab_size prepare data_dir out_dir overwrite init_from budget_minutes '
           'budget_counts device compile kernels micro_batch_size eval_interval evals eval_data log_interval '
           'save_minutes sample_prompt sample_tokens dynamics dollars_per_hour country tracker '
           'dry_run'.split()) | MODEL_KEYS.keys()


class Stopped(Exception):
    """SIGTERM or SIGINT arrived; everything is saved."""


class Diverged(Exception):
    """Steps were not finite again and again, after going back to a checkpoint too."""


def train_step(loss_of, model, optimizers, micro_batches, progress, s, world=1, stop=lambda: False):
    """One optimizer step down the mean of loss_of(*micro-batch): that loss, gradient norm before clipping,
    learning-rate multiplier, and if any rank must stop; None if a lone rank must, before its last micro-step.
    Not finite: the weights stay as they are."""
    device = model.wte.weight.device
    loss = torch.zeros((), device=device)
    for batch in micro_batches:
        if world == 1 and stop():               # a CPU's step can outlast the grace before a machine goes
            return None
        micro_loss = loss_of(*(t.to(device, non_blocking=True) for t in batch)) / len(micro_batches)
        micro_loss.backward()
        loss += micro_loss.detach()
    flag = average_over_ranks(model, loss, stop(), world)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf, foreach=True)
    loss, norm = torch.stack([loss, norm]).tolist()   # the step's one wait for the device: skip or not?
    rate = set_rates(optimizers, progress, s)
    if math.isfinite(loss) and math.isfinite(norm):
        for optimizer in optimizers:
            optimizer.step()
    model.zero_grad()
    return loss, norm, rate, flag


def average_over_ranks(model, loss, flag, world):
    """Average gradients and loss over ranks, in place, in one message; True if any rank raised its flag."""
    if world == 1:
        return flag
    grads = [p.grad for p in model.parameters()]
    message = torch.cat([g.flatten() for g in grads] + [loss[None], loss.new_tensor([float(flag)])])
    dist.all_reduce(message)
    *parts, tail = message.split([g.numel() for g in grads] + [2])
    for g, part in zip(grads, parts):
        g.copy_(part.view_as(g)).div_(world)
    loss.copy_(tail[0]).div_(world)
    return bool(tail[1] > 0)


def main(argv):
    # ---- setup
    s = read_settings(argv)
    refuse(s.tracker and not importlib.util.find_spec(s.tracker),
           f'tracker {s.tracker} is not installed: pip install {s.tracker}, or leave tracker empty')
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device, master = choose_device(s), rank == 0
    signals, told = [], []                      # told: what a reader of the report should know

    def say(line):
        if master:
            print(line, flush=True)
            told.extend([line] * line.startswith(('warning:', 'adapted:', 'overruled:')))

    def heed(number, frame):
        signals.append(number)
        if len(signals) > 2:                    # told three times (by Ctrl-C and torchrun is two): at once
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heed)
    out_dir, log = Path(s.out_dir), Path(s.out_dir) / 'metrics.jsonl'
    checkpoint = open_run(s, out_dir)
    if world > 1:
        if device == 'cuda':
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        dist.init_process_group('nccl' if device == 'cuda' else 'gloo', timeout=datetime.timedelta(hours=1))
    energy = sample.Energy(device, STARTED, share=1 / int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    earlier = np.zeros_like(energy.joules)      # of all ranks, in processes before this one

    def all_reduce(array):
        """Sum of a numpy array over the ranks."""
        if world == 1:
            return array
        tensor = torch.as_tensor(array, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def agreed(value):
        """Rank 0's number, on every rank."""
        return float(all_reduce(np.array([value if master else 0.0]))[0])

    # ---- data
    data = open_or_build(s, rank)
    train_tokens, val_tokens = len(data.tokens['train']), len(data.tokens['val'])
    refuse(train_tokens < s.tokens_per_step // 16 or train_tokens <= s.block_size,
           f'the training split of {data.folder} holds {train_tokens:,} tokens, less than one block of '
           f'{s.block_size} or a sixteenth of a step of {s.tokens_per_step:,}: bring more text or lower them')
    sets, others = open_evals(s, data, say)

    # ---- model
    given, domains = {name for _, name, _ in assignments(argv)}, domain_names(s, data)
    origin = checkpoint['origin'] if s.init_from == 'resume' else s.init_from
    if s.init_from == 'resume':
        vars(s).update({k: checkpoint['settings'].get(k, KEYS[k].default)
                        for k in [*MODEL_KEYS, 'domains_from']
                        if k not in given or checkpoint['origin'] != 'scratch'})
    config = model_config(s, data)
    if s.init_from not in ('scratch', 'resume'):
        config = config_from(checkpoint['config'], s, config, given, domains)
    stages = growth_stages(s, config, domains)
    largest = stages[-1][1] if stages else config
    dtype_name, compiling, micro, adapted = adapt(s, device, world, len(domains))
    check_room(s, largest, micro, device, out_dir)
    n_grown = checkpoint['grown'] if s.init_from == 'resume' else 0
    config, stages = [config, *(c for _, c in stages)][n_grown], stages[n_grown:]
    torch.manual_seed(s.seed)
    torch.set_float32_matmul_precision('high')
    model = GPT(config).to(device)
    model.compute_dtype = getattr(torch, dtype_name)
    optimizers = make_optimizers(model, s, model.compute_dtype)
    accum = s.tokens_per_step // (micro * s.block_size * world)
    at_once = 65536 if device == 'cuda' else 8192       # tokens that an evaluation reads

    # ---- resume
    step, skipped, tokens, flops_done = 0, 0, 0, 0.0
    fingerprint = data.meta['fingerprint']
    times = dict.fromkeys(('startup', 'compile', 'train', 'growth', 'eval', 'save'), 0.0)
    clock = Clock(s)
    if checkpoint is not None:
        refuse(checkpoint['tokenizer'] != data.meta['tokenizer_sha256'],
               f'the checkpoint was trained with another vocabulary than {data.folder} has: use its data, or '
               f'data that prepare_data.py made with --tokenizer_from')
        before = GPT(GPTConfig(**checkpoint['config'])).to(device)
        theirs, ours = dataclasses.asdict(before.config), dataclasses.asdict(config)
        differ = [f'{k} {theirs[k]} there, {ours[k]} here' for k in ours if theirs[k] != ours[k]]
        refuse(differ and s.init_from == 'resume', f'the checkpoint is of another model: {"; ".join(differ)}')
        averaged = s.init_from != 'resume' and checkpoint.get('average')
        before.load_state_dict((averaged or checkpoint)['model'])
        branch = before.config.domains and before.config.domains != config.domains
        parts = nearest_parts(before, config, data) if branch else ()
        source = grown(before, (), config, s, 0, parts)[0] if differ else before
        model.load_state_dict(source.state_dict())
    average = new_average(model, 0.0) if s.ema else None
    dynamics = sample.Probe(data, s.block_size, device) if s.dynamics and master else None
    if s.init_from == 'resume':
        refuse(checkpoint['fingerprint'] != fingerprint,
               f'{data.folder} is not the data that {out_dir} began with: restore it, or start afresh')
        theirs, ours = checkpoint['settings'], vars(s)
        theirs = {k: theirs.get(k, KEYS[k].default) for k in ours}           # it may be of before k was
        differ = [f'{k} (was {theirs[k]!r}, now {ours[k]!r})'
                  for k in ours if k not in FREE and theirs[k] != ours[k]]
        refuse(differ, 'settings that belong to the run cannot change on the way: ' + ', '.join(differ))
        for optimizer, state in zip(optimizers, checkpoint['optimizers']):
            optimizer.load_state_dict(state)
        if average:
            known = {name: w.to(device) for name, w in checkpoint['average']['model'].items()}
            average = checkpoint['average'] | dict(model=known)
        if dynamics:
            dynamics.state = checkpoint.get('dynamics') or dynamics.state
        step, skipped, tokens, flops_done = (checkpoint[k] for k in ('step', 'skipped', 'tokens', 'flops'))
        times |= checkpoint['times']
        told += checkpoint.get('warnings', [])
        # what a killed run did after its last checkpoint was paid for too
        spent = max([checkpoint['elapsed']] + [row['elapsed_s'] for row in read_rows(log)])
        clock = Clock(s, spent, checkpoint['times']['train'] + checkpoint['times']['growth'],
                      checkpoint['progress'])
        earlier = np.array(checkpoint.get('joules', earlier)) * spent / checkpoint['elapsed']
        torch.set_rng_state(checkpoint['rng'])
    name = hardware(device)
    peak = peak_flops(name) if device == 'cuda' and dtype_name == 'bfloat16' else None
    objective = make_objective(s, data, config, device, rank)
    stream, rows = make_stream(s, data), s.tokens_per_step // s.block_size
    if s.init_from == 'resume':
        stream.shares = list(checkpoint['shares'])
    epoch_tokens = int(stream.epoch(0)[1][-1])
    early = torch.from_numpy(stream.first_rows(min(64, rows), s.block_size)).to(device)
    flops = config.flops_per_token(model.attended(early))      # of some rows: documents end before these do
    changed = {k: v for k, v in vars(s).items() if v != KEYS[k].default}
    say(f'halfhour: {s.dataset}, {s.budget_minutes:g} minutes on {name}' + f', {world} ranks' * (world > 1))
    say('settings that differ from the defaults: ' + ', '.join(f'{k}={v!r}' for k, v in changed.items()))
    for line in overruled(argv):
        say(f'overruled: {line}')
    for line in adapted:
        say(f'adapted: {line}')
    say(f'data: {data.folder}, {train_tokens:,} training tokens, {val_tokens:,} for validation')
    if domains:
        shares = (f'{domains[d]} {n / stream.TURNS:.1%}' for d, n in zip(stream.streams, stream.had[-1]))
        say(f'domains: {", ".join(shares)} of what is read')
    say(f'model: {config.describe()}')
    say(f'step: {s.tokens_per_step:,} tokens = {accum} micro-steps of {micro} x {s.block_size} '
        f'on {world} rank(s), {dtype_name}, torch.compile {"on" if compiling else "off"}, {s.optimizer}')
    for line in choose_kernels(s.kernels, config, device, model.compute_dtype):
        say(f'  {line}')
    if master and not s.dry_run:
        out_dir.mkdir(parents=True, exist_ok=True)
        if s.init_from != 'resume':
            for old in [*out_dir.glob('ckpt*.pt*'), *out_dir.glob('tokenizer.*'), *out_dir.glob('*.json*'),
                        *out_dir.glob('report.html')]:
                old.unlink()
        known = ''.join(json.dumps(row) + '\n' for row in read_rows(log) if row['step'] <= step)
        write_beside(log, lambda f: f.write(known.encode()))
        write_beside(out_dir / data.tokenizer.filename, lambda f: f.write(data.tokenizer.blob))
        metrics = open(log, 'a', buffering=1)
    tracker = Tracker(s, say) if s.tracker and master and not s.dry_run else None

    def record(**row):
        if master:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            try:
                metrics.write(json.dumps(finite) + '\n')
            except OSError as e:                # a full disk: the run is worth more than its log
                say(f'warning: metrics.jsonl could not be written ({e.strerror})')
            if tracker:
                tracker.put(finite)

    @contextlib.contextmanager
    def evaluating():
        """The model as it is measured, without dropout; the time and the energy are evaluation's."""
        began, doing = time.monotonic(), energy.turn('eval')
        model.eval()
        try:
            yield
            if world > 1:
                dist.barrier()                  # ranks that wait for the first do not train
        finally:
            model.train()
            energy.turn(doing)
            times['eval'] += time.monotonic() - began

    def save():
        """All that the next batch needs, moved into place whole; the last one is kept. Returns an error."""
        began, doing = time.monotonic(), energy.turn('idle')
        try:
            if master:
                save_checkpoint(out_dir, dict(
                    version=2, order=2, step=step, progress=clock.progress, elapsed=clock.elapsed(),
                    skipped=skipped, origin=origin, grown=n_grown, shares=stream.shares, times=dict(times),
                    tokens=tokens, flops=flops_done, warnings=told, model=model.state_dict(), average=average,
                    joules=(earlier + world * energy.joules).tolist(),      # ranks are alike
                    optimizers=[o.state_dict() for o in optimizers],
                    rng=torch.get_rng_state(), dynamics=dynamics and dynamics.state,
                    config=dataclasses.asdict(config), settings=vars(s), fingerprint=fingerprint,
                    tokenizer=data.meta['tokenizer_sha256'], data=str(data.folder)))
        except UserError as e:                  # the run is worth more, and the earlier checkpoint is whole
            say(f'warning: {e}')
            return e
        finally:
            energy.turn(doing)
        times['save'] += time.monotonic() - began

    def evaluate(slices, stop=None, keep=True):
        began, known = time.monotonic(), sample.domain_of(config, data) if config.domains else None
        with evaluating():
            result = sample.bits_per_byte(model, data.tokens['val'], data.docs['val'], slices, at_once, stop,
                                          rank, world, all_reduce, known)
        result['seconds_per_slice'] = (time.monotonic() - began) / (result['share'] * sample.SLICES)
        for key in ('per_source', 'per_source_error'):
            result[key] = {data.meta['sources'][i]: v for i, v in result[key].items()}
        if keep and not signals:                # a signal may have cut it short
            record(step=step, progress=clock.progress, val_bpb=result['bpb'], val_loss=result['loss'],
                   share=result['share'], elapsed_s=clock.elapsed())
        return result

    def record_abilities(evals):
        record(step=step, progress=clock.progress, elapsed_s=clock.elapsed(), evals={
            name: {key: e[key] for key in ('accuracy', 'error', 'chance', 'items')}
            for name, e in evals.items()})

    def judge(counts, often=None):
        """What the model does on so many items of every evaluation set: on rank 0, the others wait for it."""
        with evaluating():
            return {name: sample.judge(model, sets[name], n, max_tokens=at_once, counts=often)
                    for name, n in counts.items() if master and not signals}

    def judge_writing(n):
        """The same of n texts, of n programs, and of anisotropy, which has no number of items."""
        with evaluating():
            return {name: sample.EVALS[name](model, data.tokenizer, data, s.eval_data, n) for name in others
                    if master and not signals and (n or name == 'anisotropy')}

    def continuation(length):
        """What follows sample_prompt, by the same dice every time; on rank 0 alone."""
        with evaluating():
            dice = torch.Generator(device=device).manual_seed(s.seed)
            pieces = sample.stream(model, data.tokenizer, s.sample_prompt, length, 0.8, generator=dice)
            return ''.join(pieces) if master and length else None

    def probe_layers():
        doing = energy.turn('eval')
        bad = dynamics.take(model, step, clock.progress, math.inf if clock.max_steps else clock.budget)
        times['dynamics'] = dynamics.state['seconds']
        energy.turn(doing)
        if bad:
            say(f'warning: step {step} was probed, not finite: {", ".join(bad)}')

    # ---- warm up: compile, and learn what a step and the closing evaluation will cost
    def warm_up():
        """What computes a step, compiled, and the seconds that it takes."""
        step_model = torch.compile(model, dynamic=False) if compiling else model
        idx = torch.arange(micro * s.block_size, device=device).view(micro, -1) % config.vocab_size
        domain = [d.to(device) for d in stream.domain(0)]
        loss_of = objective(step_model, step, clock.progress)
        # a clone: one tensor twice would compile another program
        loss_of(idx, idx.clone(), *domain).backward()
        seconds = accum * agreed(seconds_of(lambda: loss_of(idx, idx.clone(), *domain).backward(), 1))
        model.zero_grad()
        return step_model, seconds

    def growth_to_come():
        """How many times the FLOPs of a token that is evaluated now the largest model's will be: each domain
        reads it."""
        then, now = (c.flops_per_token() * max(1, c.n_domains) for c in (largest, config))
        return then / now

    times['startup'] += clock.age()
    batches = Prefetcher(stream, step, rows, micro, s.block_size, rank, world, device)
    began = time.monotonic()
    step_model, step_seconds = warm_up()
    times['compile'] += time.monotonic() - began
    warm_seconds = agreed(time.monotonic() - began)         # what a growth will take, more or less
    slices, tenth = sample.SLICES, 0.1 * clock.budget
    most = tenth if s.budget_counts == 'all' else math.inf      # for the closing bits per byte
    probe = min(slices, -(-slices * 8192 // val_tokens))
    evaluate(probe, keep=False)                 # sets things up
    slice_seconds = growth_to_come() * agreed(
        min(evaluate(probe, keep=False)['seconds_per_slice'] for _ in range(2)))
    if slice_seconds * slices > most:
        slices = 2 ** max(0, int(math.log2(most / slice_seconds)))
    counts, curve, judge_seconds = {}, {}, 0.0
    if sets:
        few = affordable(sets, 1000, len(sets) * (65536 if device == 'cuda' else 2048))
        token_cost = growth_to_come() * agreed(seconds_of(lambda: judge(few), 2)) / tokens_of(sets, few)
        counts = affordable(sets, math.inf, tenth / 2 / token_cost)
        curve = affordable(sets, 1000, tenth * s.eval_interval / 4 / token_cost)
        judge_seconds = token_cost * tokens_of(sets, counts)
    start = torch.full((1, 1), config.bos, device=device)
    token_seconds = growth_to_come() * seconds_of(lambda: list(model.generate(start, 12)), 2) / 12
    # texts and programs to write: of 128 and 256 tokens, 32 at once, which makes them 4 times as fast
    n_texts = min(256, int(tenth / 8 / (32 * token_seconds))) if others else 0
    writing = dict(text=32 * token_seconds, python=64 * token_seconds + 0.3)
    judge_seconds += n_texts * sum(seconds for name, seconds in writing.items() if name in others)
    save_seconds = 0.5 + 12 * largest.params()['total'] / 2 ** 30
    afterwards = judge_seconds + token_seconds * s.sample_tokens + Tracker.WAIT * bool(s.tracker) + LEAVING

    def closing_seconds():
        # a tenth at most: what proves too slow is cut short there, and the report says so
        evaluation = min(slice_seconds * slices, most)
        probes = 3 * dynamics.state['cost'] if dynamics else 0.0
        return evaluation + probes + save_seconds + afterwards

    # ---- loop
    if s.dry_run:
        batches.close()
        return say_plan(s, clock, epoch_tokens, flops, step_seconds, closing_seconds(), say)
    until = f'until the clock says {s.budget_minutes:g} minutes'
    until = f'{clock.max_steps} steps' if clock.max_steps else until
    share = 'whole' if slices == sample.SLICES else f'{slices}/{sample.SLICES} of it'
    say(f'training {until}; closing evaluation {share}, about {closing_seconds():.0f} s')
    say('    step  progress      loss        lr   grad_norm     tok/s       mfu  wait_ms  mem_gb  elapsed_s')
    bad_steps, rolled_back, stopping = 0, False, False
    last_save = clock.elapsed()
    next_eval = s.eval_interval * max(1, math.ceil(clock.progress / (s.eval_interval or 1)))
    first_step, history = step, []
    energy.turn('train')
    while True:
        # probe if due
        if dynamics and clock.progress >= dynamics.state['due']:
            probe_layers()

        # time left? rank 0's clock decides: ranks that stopped at different steps would wait for ever
        clock.reserve = closing_seconds()
        decision = [clock.fits(step, step_seconds / accum), clock.progress, clock.left(), step_seconds]
        go, progress, left, step_seconds = all_reduce(np.array(decision) * master).tolist()
        if average:
            follow(average, model, progress, s.ema)
        if not go:
            break
        clock.progress = progress

        # grow if due
        if stages and progress >= stages[0][0] and (clock.max_steps or left > 2 * warm_seconds):
            began_growing, n_grown, (_, config) = time.monotonic(), n_grown + 1, stages.pop(0)
            energy.turn('idle')
            model, optimizers = grown(model, optimizers, config, s, n_grown)
            average = new_average(model, progress) if average else None
            for line in choose_kernels(s.kernels, config, device, model.compute_dtype):
                say(f'  {line}')
            step_model, step_seconds = warm_up()
            flops = config.flops_per_token(model.attended(early))
            say(f'         grown to {config.describe()}')
            warm_seconds = agreed(time.monotonic() - began_growing)
            times['growth'] += warm_seconds
            clock.trained += warm_seconds
            energy.turn('train')
            continue                             # that took time

        began = time.monotonic()
        stream.pace(step, progress)
        micro_batches, wait = batches.next(step)
        short = not clock.max_steps and left < step_seconds      # a last step, made of fewer micro-steps
        n_micro = max(1, round(accum * left / step_seconds)) if short else accum
        done = train_step(objective(step_model, step, progress), model, optimizers, micro_batches[:n_micro],
                          progress, s, world, lambda: bool(signals))
        if done is None:
            stopping = True
            break
        loss, grad_norm, rate, stopping = done
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        skipped, bad_steps = skipped + (not finite), 0 if finite else bad_steps + 1
        step += 1
        if device == 'cuda':
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
        step_seconds = 0.8 * step_seconds + 0.2 * seconds * accum / n_micro
        clock.add_step(seconds, left, step)
        times['train'] += seconds
        tokens += n_micro * s.tokens_per_step // accum
        flops_done += n_micro * s.tokens_per_step // accum * flops
        history.append((wait, seconds))

        # log
        speed = n_micro / accum * s.tokens_per_step / seconds
        mfu = speed * flops / (peak * world) if peak else None
        memory = peak_memory_gb(device)
        record(step=step, progress=progress, train_loss=loss, lr=rate, grad_norm=grad_norm,
               tok_per_sec=speed, mfu=mfu, data_wait_s=wait, peak_mem_gb=memory, elapsed_s=clock.elapsed(),
               skipped=skipped)
        if step % s.log_interval == 0 or step == first_step + 1 or not finite:
            share = f'{mfu:9.3f}' if mfu else '        -'
            say(f'{step:8d} {progress:9.4f} {loss:9.4f} {rate:9.4f} {grad_norm:11.4f} {speed:9,.0f} '
                f'{share} {1000 * wait:8.2f} {memory:7.2f} {clock.elapsed():10.1f}')

        # not finite, again and again: back, once, to the last checkpoint that cannot be the cause itself
        if bad_steps >= BAD_STEPS:
            if rolled_back or step == bad_steps or not (out_dir / 'ckpt.pt').exists():
                again = ', again after going back' if rolled_back else ''
                raise Diverged(f'{bad_steps} steps in a row were not finite{again}: '
                               f'lower learning_rate (now {s.learning_rate:g}), or dtype=float32')
            if world > 1:
                dist.barrier()
            good = sample.read_checkpoint(out_dir)
            if good['step'] == step - bad_steps and (out_dir / 'ckpt.prev.pt').exists():
                good = sample.read_checkpoint(out_dir / 'ckpt.prev.pt')
            if good['grown'] < n_grown:
                raise Diverged(f'{bad_steps} steps in a row were not finite since the model grew: lower '
                               f'learning_rate (now {s.learning_rate:g})')
            model.load_state_dict(good['model'])
            for optimizer, state in zip(optimizers, good['optimizers']):
                optimizer.load_state_dict(state)
            rolled_back, bad_steps = True, 0
            say(f'warning: {BAD_STEPS} steps in a row were not finite: '
                f'weights and optimizer of step {good["step"]} again, on new batches')

        # save if due, before evaluating
        if stopping:
            break
        if bad_steps == 0 and clock.elapsed() - last_save >= 60 * s.save_minutes:
            began = time.monotonic()
            if not save():
                save_seconds = max(0.5, time.monotonic() - began)
            last_save = clock.elapsed()

        # evaluate if due
        if next_eval and next_eval <= progress < 0.95:
            result = evaluate(max(1, slices // 8))
            slice_seconds = growth_to_come() * agreed(result['seconds_per_slice'])
            say(f'         validation on {result["share"]:.1%}: {result["bpb"]:.4f} bits per byte, '
                f'standard error {result["error"]:.4f}')
            if abilities := judge(curve):
                record_abilities(abilities)
                say('         ' + ', '.join(f'{name} {e["accuracy"]:.4f} +- {e["error"]:.4f}'
                                            for name, e in abilities.items()))
            next_eval = s.eval_interval * (progress // s.eval_interval + 1)
            if text := continuation(min(60, s.sample_tokens)):
                record(step=step, progress=progress, sample=text, elapsed_s=clock.elapsed())

    # ---- report
    batches.close()
    if stages and not stopping:
        say(f'warning: no time was left for the growth at progress {stages[0][0]:g}')
    unsaved, saved = save(), f'{out_dir} is saved, go on with --init_from=resume'
    if stopping:
        raise unsaved or Stopped(f'stopped by a signal after step {step}; {saved}')
    deadline = clock.budget + min(0.01 * clock.budget, 5.0) - afterwards
    energy.turn('idle')
    if tracker and not unsaved:
        tracker.put(out_dir / 'ckpt.pt')        # it travels during the evaluation
    if dynamics:
        probe_layers()
        learned = dynamics.finish()
        times['dynamics'] = dynamics.state['seconds']
    if average:
        model.load_state_dict(average['model'])

    def out_of_time():
        late = s.budget_counts == 'all' and clock.elapsed() + slice_seconds * slices / 16 > deadline
        return bool(all_reduce(np.array([late * master, bool(signals)], dtype=float)).any())

    result = evaluate(slices, stop=out_of_time)
    often = sample.frequencies(data.tokens['train'], config.vocab_size) if counts else None
    evals = judge(counts, often) | judge_writing(n_texts)
    crowded = evals.pop('anisotropy', {})
    text = continuation(0 if signals else s.sample_tokens)
    if all_reduce(np.array([float(bool(signals))]))[0]:
        raise unsaved or Stopped(f'stopped by a signal during the closing evaluation; {saved}')
    if evals:
        record_abilities(evals)
    paid = sample.energy_report(earlier + all_reduce(energy.read()), energy.how, s.country)
    if tracker:
        tracker.put(dict(step=step, bpb_per_source=result['per_source'], evals=evals, sample=text, **paid))
        tracker.finish()
    trained, total, sizes = max(times['train'], 1e-9), clock.elapsed() + LEAVING, config.params()
    speed = flops_done / trained
    waited, stepped = np.sum(history[1:] or [(0, 1)], axis=0)
    report = dict(
        val_bpb=result['bpb'], val_bpb_error=result['error'], val_share=result['share'],
        val_bpb_text_error=result['text_error'], val_loss=result['loss'],
        val_bpb_per_source=result['per_source'], val_bpb_per_source_text_error=result['per_source_error'],
        **({'val_bpb_told': result['bpb_told']} if config.domains else {}), evals=evals, steps=step,
        **({'anisotropy': crowded['per_layer']} if crowded else {}),
        tokens=tokens, epochs=tokens / epoch_tokens, **{f'{kind}_params': n for kind, n in sizes.items()},
        flops=flops_done, flops_per_token=flops,
        tok_per_sec=tokens / trained, mfu=speed / (peak * world) if peak else None, tflops=speed / 1e12,
        data_wait_share=float(waited / stepped), skipped_steps=skipped, warnings=[*dict.fromkeys(told)],
        **{f'{kind}_seconds': t for kind, t in times.items()}, total_seconds=total,
        **({'dynamics_share': times['dynamics'] / total} if dynamics else {}),
        budget_seconds=clock.budget, peak_mem_gb=peak_memory_gb(device), **paid,
        dollars=total / 3600 * s.dollars_per_hour or None,
        hardware=dict(device=device, name=name, ranks=world, dtype=dtype_name),
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
        protocol=sample.PROTOCOL, data=dict(folder=str(data.folder), fingerprint=fingerprint,
                                            val_bytes=data.meta['splits']['val']['bytes']),
        commit=git_commit(), settings=vars(s), config=dataclasses.asdict(config), sample=text,
        finished=datetime.datetime.now().isoformat('T', 'seconds'))
    say_report(report, say)
    if unsaved:
        raise unsaved
    if master:
        metrics.close()
        if dynamics:
            write_beside(out_dir / 'dynamics.json', lambda f: f.write(json.dumps(learned).encode()))
        write_beside(out_dir / 'result.json', lambda f: f.write(json.dumps(report, indent=1).encode()))
        try:
            write_report(out_dir)
        except UserError as e:                  # result.json is safe
            say(f'warning: {e}')


def seconds_of(work, times):
    """Seconds that the fastest of several goes takes."""
    best = math.inf
    for _ in range(times):
        began = time.monotonic()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - began)
    return best


def open_evals(s, data, say):
    """What evals names, else the data's own pairs: {name: items} of sets, and names in sample.EVALS."""
    if not s.evals and not (data.folder / 'pairs.jsonl').exists():
        return {}, []
    others, sets = sample.evaluation_sets(s.evals or 'coherence', s.eval_data, data.tokenizer, data.folder,
                                          say)
    if 'python' in others:
        sample.read_problems(s.eval_data)       # a mistake there is better known now
    return sets, [name for name in others if name != 'bpb']              # which is measured anyway


def tokens_of(sets, counts):
    """Tokens, more or less, in the first counts[name] items of every evaluation set."""
    return sum(len(sets[name]['ids']) * n / len(sets[name]['seam']) for name, n in counts.items())


def affordable(sets, most, tokens):
    """How many items of each evaluation set, at most `most`, are so many tokens together: 20 at least."""
    counts = {name: min(most, len(items['seam'])) for name, items in sets.items()}
    share = min(1.0, tokens / tokens_of(sets, counts))
    return {name: min(n, max(20, int(share * n))) for name, n in counts.items()}


def say_plan(s, clock, epoch_tokens, flops, step_seconds, closing, say):
    """What --dry_run found out: how many tokens and epochs the budget buys, and what it costs."""
    seconds = clock.budget - (closing + clock.age() - clock.trained if s.budget_counts == 'all' else 0)
    tokens = max(0, int(seconds / step_seconds)) * s.tokens_per_step
    dollars = clock.budget / 3600 * s.dollars_per_hour
    price = f'{dollars:.2f} dollars' if s.dollars_per_hour else 'unknown, set dollars_per_hour'
    say(f'---\ndry_run: data, vocabulary, memory and disk are fine\nstep_seconds: {step_seconds:.3f}\n'
        f'closing_seconds: {closing:.1f}\ntokens: {tokens:,}\nepochs: {tokens / epoch_tokens:.2f}\n'
        f'flops: {tokens * flops:.3g}\ndollars: {price}')


def say_report(report, say):
    """The closing report, `key: value`, one a line."""
    say('---')
    for key, value in report.items():
        if key in UNPRINTED:
            continue
        if isinstance(value, dict):
            value = ', '.join(f'{k} {v:.4f}' for k, v in value.items())
        elif isinstance(value, float):
            value = f'{value:.6g}'
        say(f'{key}: {"not measured" if value is None else value}')
    for name, e in report['evals'].items():
        kinds = ', '.join(f'{k} {v:.3f}' for k, v in (e.get('per_field') or e['per_kind']).items())
        more = ''.join(f', {k} {e[k]:.4g}' for k in ('chance', 'shortest', 'ties', 'frequency_bias')
                       if e.get(k) is not None)
        say(f'{name}: {e["accuracy"]:.4f} +- {e["error"]:.4f} on {e["items"]:,} items{more} ({kinds})')
    e = report['energy']
    say('energy: ' + ', '.join(f'{k} {e[k]:.0f} J' for k in sample.ACTIVITIES) + '; '
        + ', '.join(f'{k} {e[k]:.0f} J {e["how"][k]}' for k in sample.DEVICES)
        + f'; {e["g_per_kwh"]:g} g of CO2e a kWh ({e["country"]}), without cooling and the making of it all')
    say(f'hardware: {report["hardware"]["name"]}, {report["hardware"]["dtype"]}')
    if report['sample']:
        say(f'sample:\n{report["sample"]}')


if __name__ == '__main__':
    code = 0
    try:
        print(__doc__) if {'-h', '--help'} & set(sys.argv) else main(sys.argv[1:])
    except (UserError, Diverged, Stopped) as e:
        code = 75 if isinstance(e, Stopped) else 3 if isinstance(e, Diverged) else 2
        if os.environ.get('RANK', '0') == '0':
            print(f'train.py: {e}', file=sys.stderr)
    if dist.is_initialized() and code == 0:
        dist.destroy_process_group()
    sys.stdout.flush()
    if not all([tracker.finish() for tracker in Tracker.made]):
        os._exit(code)                          # what a tracker leaves behind may hang as Python ends
    sys.exit(code)

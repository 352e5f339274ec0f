"""Train one small language model in a fixed time, and say honestly what that bought.

    python train.py config/quickstart.py                     five minutes on whatever is here, then a sample
    torchrun train.py config/babylm.py                       thirty minutes on one rented card
    torchrun --nproc_per_node=2 train.py config/babylm.py    the same on two
    python train.py config/babylm.py my_idea.py --show       an idea stacked on it, and what that makes
    python train.py config/babylm.py --dry_run               check everything, say what the budget buys, stop

Settings come from the list below (with GPTConfig in model.py and Options in prepare_data.py), then each
config named, left to right, then --key=value. A config with classes is an idea: they take the places of this
file's Stream and Run, and of the other scripts' seams. Exit codes: 0 finished, 2 something to mend, 3 the
training diverged, 75 stopped and saved (go on with --init_from=resume), 130 stopped before there was
anything to save. torchrun makes 1 of every code but 0, and ends with the sentence.
"""
import os
import sys
import time

sys.modules.setdefault('train', sys.modules[__name__])      # ideas import this very module, not a second one


def process_age(pid='self'):
    """Seconds since a process started, read from Linux's /proc; 0 elsewhere."""
    try:
        with open(f'/proc/{pid}/stat') as f:
            ticks = int(f.read().rsplit(')', 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')
    except (OSError, AttributeError):
        return 0.0


# The bill starts when the command is typed: before Python's imports and, under torchrun, with torchrun itself.
# When that starts a worker again, what went before is in the checkpoint, if there was one.
RESTARTS = os.environ.get('TORCHELASTIC_RESTART_COUNT')
STARTED = time.monotonic() - process_age(os.getppid() if RESTARTS == '0' else 'self')
WENT_BEFORE = 0.0 if RESTARTS in (None, '0') else max(0.0, process_age(os.getppid()) - process_age())      # seconds

import bisect
import collections
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import platform
import queue
import re
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

import model as models
import prepare_data
import sample
from config import UserError, at_home, in_words, memory_ran_out, print_without_fail, refuse
from model import GPTConfig, Linear, choose_kernels, kernels_named
from sample import (as_json, git_commit, hardware, own, peak_flops, peak_memory_gb, proc, read_rows,
                    save_checkpoint, write_beside, write_report)


# ---- settings ----------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Settings:
    """How a run learns, how long, what it keeps. A comment begins with the values that are legal, if not all
    are (a number is at least 0)."""
    weights: str = ''                 # how often an epoch reads a source: 'childes:2,gutenberg:0.5'
    out_dir: str = ''                 # where the run goes; empty: out/<names of the configs>
    init_from: str = 'scratch'        # 'scratch', 'resume' (in out_dir), or a run whose weights to start from
    seed: int = 1                     # 0..1e18: of the order of text, of weights, of noise
    budget_minutes: float = 30.0      # 0.01..: the whole bill, command typed to prompt back, resumptions too
    budget_counts: str = 'all'        # all|training: or the seconds of training alone
    max_steps: int = 0                # > 0: end after so many; schedules by step, to the bit on a CPU
    max_tokens: int = 0               # > 0: the same, given in tokens
    device: str = 'auto'              # auto|cuda|cpu: what computes
    dtype: str = 'auto'               # auto|bfloat16|float32: auto is bfloat16 where the hardware has it
    compile: str = 'auto'             # auto|on|off: torch.compile; auto is on where it pays
    kernels: str = 'all'              # on a GPU: 'all', 'none' (ideas' neither), or model.py's: 'attention,mlp', '-mlp' (all but)
    tokens_per_step: int = 65536      # 1..: over all ranks and micro-steps; a multiple of block_size
    micro_batch_size: int = 64        # 1..: sequences a rank reads at once, at most; lowered to what fits
    optimizer: str = 'muon'           # muon|adamw: muon for matrices and AdamW for the rest, or AdamW for all
    learning_rate: float = 0.02       # Muon's: how far an update moves a matrix's output; adamw: times 0.05
    embedding_lr: float = 0.2         # AdamW's for token tables that stand N(1)
    head_lr: float = 0.004            # AdamW's for the head (and a tied table), times 256 / n_embd
    scalar_lr: float = 0.02           # AdamW's for the few scalars
    weight_decay: float = 0.1         # of matrices, as a share of learning_rate; falls to 0 with progress
    momentum: float = 0.95            # 0..0.9999: Muon's
    beta1: float = 0.8                # 0..0.9999: AdamW's
    beta2: float = 0.95               # 0..0.999999: AdamW's
    reduce_dtype: str = 'float32'     # float32|bfloat16: what gradients are in on their way between ranks
    grad_clip: float = 1.0            # largest gradient norm; 0 is off
    warmup_frac: float = 0.02         # 0..1: of progress, learning rates rise from a tenth
    cooldown_frac: float = 0.6        # 0..1: of progress, learning rates fall linearly to final_lr_frac
    final_lr_frac: float = 0.0        # 0..1: of the learning rates, at the end
    eval_interval: float = 0.25       # in progress: validation on a part of the closing share; 0 is off
    evals: str = ''                   # as of sample.py --eval: 'all', names, files; '': the data's own pairs
    eval_data: str = 'data/eval'      # the folder of evaluation sets, BLiMP for one, that sample.py reads too
    log_interval: int = 10            # 1..: steps
    save_minutes: float = 5.0         # between checkpoints; 0 saves after every step
    sample_prompt: str = ''           # what the closing sample continues
    sample_tokens: int = 120          # its length; 0 prints none
    dollars_per_hour: float = 0.0     # the machine's price, for the report; 0 is unknown
    country: str = 'world'            # whose electricity it is, of sample.GRID, or grams of CO2e a kWh
    dry_run: bool = False             # check data, memory and disk, measure, predict, and stop
    show: bool = False                # print the classes, settings and changes that make this run, and stop


TABLES = prepare_data.Options, Settings, GPTConfig
FREE = {field.name for field in dataclasses.fields(prepare_data.Options)} | set(
    'out_dir init_from budget_minutes budget_counts device compile kernels micro_batch_size eval_interval '
    'evals eval_data log_interval save_minutes sample_prompt sample_tokens dollars_per_hour country dry_run '
    'show'.split())
OF_DATA = {field.name for field in dataclasses.fields(prepare_data.Options)} - {'overwrite'}
STATE = dict(steps=range(1 << 60), rows_read=range(1 << 60), skipped=range(1 << 60), tokens=range(1 << 60), flops=float,
             progress=float, elapsed=float, trained=float, origin=str, times={str: float}, warnings=[str], stream={},
             joules=[[float]], optimizers=[dict(state={}, param_groups=[{}])],
             **{'next_eval?': float | None, 'went_by?': float})     # what a run goes on from, as config.fits has it
SHAPE = [field.name for field in dataclasses.fields(GPTConfig) if field.name not in ('vocab_size', 'bos')]


def read_settings(argv, tables=TABLES):
    """Settings, and the ideas that go with them, of a command line. UserError lists all mistakes by line."""
    ideas = prepare_data.Ideas(argv, tables)
    s = SimpleNamespace(**ideas.values)
    refuse(sample.grid(s.country) is None, f'country is {s.country!r}, it must be one of '
           f'{", ".join(sample.GRID)}, or the grams of CO2e a kWh')
    configs = '+'.join(Path(arg).stem for arg in argv if not arg.startswith('-'))
    for name in ('out_dir', 'eval_data', 'evals'):
        setattr(s, name, at_home(getattr(s, name)))
    s.out_dir = s.out_dir or f'out/{configs or "default"}'
    return s, ideas


# ---- data: batches as a pure function of (seed, row) -------------------------------------------------------

class Stream:
    """The endless stream of training tokens, in the order of (seed, epoch): an epoch has every document once,
    or as often as its source weighs; 2.3 is all of a source's documents twice and 30 % of them once more.
    Training reads an epoch's rows in an order of their own, so that a step is not a few long documents."""

    def __init__(self, data, s, weights=None):
        self.data, self.s, docs = data, s, data.docs['train']
        self.tokens, self.sources = data.tokens['train'], docs['source']
        self.starts = np.asarray(docs['start'])
        self.lengths = np.diff(np.append(self.starts, len(self.tokens)))
        self.weights = weights or self.source_weights()
        self.ends, self.row_ends = [0], [0]      # of the epochs so far, in tokens and in rows
        self.epoch = functools.lru_cache(maxsize=2)(self.epoch)
        self.shuffled = functools.lru_cache(maxsize=2)(self.shuffled)

    def source_weights(self):
        """How often an epoch reads each source; None: once."""
        return prepare_data.source_weights(self.s.weights, self.data)

    def dice(self, epoch, *more):
        """What decides about the order of an epoch."""
        return np.random.default_rng([self.s.seed, epoch, *more])

    def epoch(self, number):
        """Documents' first tokens in this epoch's order, and where each stands in the epoch's stream."""
        dice = self.dice(number)
        order = dice.permutation(len(self.starts))
        if self.weights is not None:
            drawn = []
            for source, weight in enumerate(self.weights):
                mine = order[self.sources[order] == source]
                more = math.ceil(round(weight % 1 * len(mine), 6))      # rounded: 0.1 * 30 is a hair above 3
                drawn += [mine] * int(weight) + [mine[:more]]
            order = dice.permutation(np.concatenate(drawn))
        return self.starts[order], np.concatenate([[0], np.cumsum(self.lengths[order])])

    def epoch_tokens(self):
        return int(self.epoch(0)[1][-1])

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
        return self.dice(number, rows).permutation(rows)

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
        """(n, T): what training reads first, to count what its tokens attend to."""
        return self.rows(0, n, T)[:, :-1]

    def batch(self, first, B, T):
        """The micro-batch of rows first .. first + B, by keyword as Run.loss takes it: idx, targets (B, T), a
        row's last target the token after it."""
        rows = torch.from_numpy(self.rows(first, B, T))
        return dict(idx=rows[:, :-1].contiguous(), targets=rows[:, 1:].contiguous())

    def pace(self, step, progress):
        """Told before each step how many whole ones have been read; rows are read some steps ahead. Here no order
        depends on it."""

    def state(self):
        """What a checkpoint keeps of it, beside the number of rows that were read."""
        return {}

    def load(self, state):
        pass


class Prefetcher:
    """A thread makes the coming micro-batches of this rank; next() returns one and the seconds it waited."""

    def __init__(self, stream, row, B, T, rank, world, device, depth):
        self.stream, self.B, self.T, self.device = stream, B, T, device
        self.first, self.stride = row + rank * B, world * B
        self.queue, self.stopping = queue.Queue(depth), False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            while not self.stopping:
                batch = self.stream.batch(self.first, self.B, self.T)
                pinned = self.device == 'cuda'
                self.queue.put({k: t.pin_memory() for k, t in batch.items()} if pinned else batch)
                self.first += self.stride
        except Exception as e:                  # handed to the training thread, which raises it
            self.queue.put(e)

    def next(self):
        started = time.monotonic()
        batch = self.queue.get()
        if isinstance(batch, Exception):
            raise batch
        return batch, time.monotonic() - started

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
    """Momentum, orthogonalised: an update has all its singular values near 1 (Jordan 2024; Liu 2025,
    2502.16982).

    A gradient's few large directions would otherwise drown the rest, and the spectral norm of an update
    decides how much a layer's output moves; so the learning rate carries over from one width to another. Only
    for matrices that multiply activations: AdamW takes an embedding, whose rows are looked up one by one.
    All matrices of one shape are one group, their momentum one stacked tensor, orthogonalised in one batch.
    """

    def __init__(self, params, momentum, dtype, **options):
        shapes = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        groups = [dict(params=ps, **options) for ps in shapes.values()]
        super().__init__(groups, dict(lr=0.0, weight_decay=0.0, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group['params']
            grad = torch.stack([p.grad for p in params])
            update = self.direction(grad, self.state[params[0]], group)
            rows, cols = grad.shape[-2:]
            update *= group['lr'] * max(1, rows / cols) ** 0.5       # unit inputs change the output by a unit
            self.move(params, list(update.unbind()), group)

    def direction(self, grad, state, group):
        """Where the matrices of a group go, of their gradients (n, rows, cols): an average of them, after
        Nesterov, orthogonalised."""
        if 'momentum' not in state:
            state['momentum'] = torch.zeros_like(grad)
        average = state['momentum'].lerp_(grad, 1 - group['momentum'])
        return self.toward(grad.lerp(average, group['momentum']))

    def toward(self, average):
        return orthogonalize(average.to(self.dtype)).to(average.dtype)

    def move(self, params, updates, group):
        torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
        torch._foreach_sub_(params, updates)


def kept(optimizer):
    """What an optimizer keeps of each parameter: types and shapes, by name."""
    return [{k: (type(v), getattr(v, 'shape', ())) for k, v in optimizer.state.get(p, {}).items()}
            for group in optimizer.param_groups for p in group['params']]


def take(optimizer, known):
    """Has an optimizer that was just made go on from a state_dict; ValueError where that is of another form, which
    fused kernels would not look at: they would write behind its end."""
    ours = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
    for group in optimizer.param_groups:         # a step at rates of 0 makes what it keeps
        for p in group['params']:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    form = kept(optimizer)
    optimizer.load_state_dict(known)
    for group, mine in zip(optimizer.param_groups, ours):        # of the settings, which are the same
        group.update(mine)
    if any(theirs and theirs != mine for theirs, mine in zip(kept(optimizer), form)):
        raise ValueError('its optimizers are others')


class GradientSum:
    """Adds gradients up over ranks while the backward pass still makes others (Li 2020, 2006.15704).

    They go in buckets, the last layer's first: each is sent when its last gradient is there, in the same order
    on every rank. A gradient that a rank does not have counts as 0.
    """
    NUMBERS = 2 ** 20                            # in a bucket, at most, unless one parameter has more

    def __init__(self, params, dtype):
        self.dtype, self.buckets, self.place, self.hearing, room = dtype, [], {}, False, 0
        for p in reversed([p for p in params if p.requires_grad]):
            if room < p.numel():
                self.buckets.append([])
                room = self.NUMBERS
            room -= p.numel()
            self.place[p] = len(self.buckets) - 1
            self.buckets[-1].append(p)
            p.register_post_accumulate_grad_hook(self.heard)

    def begin(self):
        """The next backward pass is the step's last."""
        self.hearing, self.missing, self.sent = True, [len(bucket) for bucket in self.buckets], []

    def heard(self, p):
        if self.hearing:
            self.missing[self.place[p]] -= 1
            if self.missing[self.place[p]] < 0:
                raise RuntimeError('gradients came twice where one backward pass was to end the step')
            while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
                self.send()

    def send(self):
        bucket = self.buckets[len(self.sent)]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        message = torch.cat([g.flatten() for g in grads]).to(self.dtype)
        self.sent.append((grads, message, dist.all_reduce(message, async_op=True)))

    def finish(self, told, world):
        """Sends what is left, and what else is told; then every gradient is the mean over ranks."""
        self.hearing = False
        while len(self.sent) < len(self.buckets):
            self.send()
        last = dist.all_reduce(told, async_op=True)
        for bucket, (grads, message, sending) in zip(self.buckets, self.sent):
            sending.wait()
            for p, g, part in zip(bucket, grads, message.split([g.numel() for g in grads])):
                p.grad = g.copy_(part.view_as(g)).div_(world)
        last.wait()


# ---- clock -------------------------------------------------------------------------------------------------

class Clock:
    """What the run has cost in seconds, over all resumptions, and how far the schedules should be.

    spent: seconds that earlier processes of this run took. age(): seconds since this one was typed.
    reserve: seconds kept for what follows the last step: saving, the closing evaluation, the sample, leaving.
    """

    def __init__(self, s, spent=0.0, trained=0.0, progress=0.0, age=lambda: time.monotonic() - STARTED):
        self.budget, self.counts_all, self.reserve = 60 * s.budget_minutes, s.budget_counts == 'all', 0.0
        limits = s.max_steps, -(-s.max_tokens // s.tokens_per_step)
        self.max_steps = min(filter(None, limits), default=0)      # whichever comes first
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
        """Whether another step of at least `seconds` fits: half of one must, so that ends are late as often
        as early, and never by 5 s."""
        return (not self.max_steps or step < self.max_steps) and self.left() > max(0.5 * seconds, seconds - 5)


# ---- what the hardware decides -----------------------------------------------------------------------------

def choose_device(s):
    """What computes. A card that is here and cannot be used is refused: its half hour is paid for."""
    if s.device == 'cpu' or torch.cuda.is_available():
        return 'cpu' if s.device == 'cpu' else 'cuda'
    why = sample.unusable_card()
    refuse(why, f'{why}; or say --device=cpu')
    refuse(s.device == 'cuda', "device is 'cuda', and torch finds none: leave it at 'auto'")
    return 'cpu'


def adapt(s, device, world, most):
    """dtype, whether to compile, the micro-batch, and a sentence about each that is not what was asked."""
    said, dtype = [], s.dtype
    if dtype == 'auto':                         # a CPU without the instructions emulates bf16: slow
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device == 'cuda'
                else bool(re.search('avx512_bf16|amx_bf16', proc('cpuinfo'))))
        dtype = 'bfloat16' if fast else 'float32'
    rows, rest = divmod(s.tokens_per_step, s.block_size * world)
    refuse(rest, f'tokens_per_step is {s.tokens_per_step}, it must be a multiple of block_size {s.block_size} '
           f'times {world} rank{"s" * (world > 1)}: try {(rows + 1) * s.block_size * world}')
    limit = s.micro_batch_size if device == 'cuda' else min(s.micro_batch_size, max(1, 8192 // s.block_size))
    micro = max(b for b in range(1, min(limit, rows, most) + 1) if rows % b == 0)
    if micro != s.micro_batch_size:
        why = ('a step is made of smaller parts' if most < min(limit, rows) else
               f'a rank reads {rows} sequences a step' if limit >= rows else
               'a CPU is fastest on some 8,192 tokens at a time')
        said.append(f'micro_batch_size {micro} instead of {s.micro_batch_size}: {why}')
    why, unasked = '', s.compile == 'auto' and device == 'cpu'
    if device == 'cuda':
        why = models.missing_compiler()
    elif s.dry_run:
        why = 'it takes too long for a look, and the run itself may be faster'
    elif unasked and (s.budget_minutes < 5 or s.max_steps):
        why = 'it takes half a minute of a CPU, more than so short a run gets back'
    elif unasked and not (shutil.which('g++') or shutil.which('clang++')):
        why = 'no C++ compiler (g++) is installed'
    said += [f'torch.compile is off: {why}'] if why and s.compile != 'off' else []
    return dtype, s.compile != 'off' and not why, micro, said


def check_room(s, config, micro, device, out_dir):
    """Refuse what cannot end well: a model or a checkpoint that memory or disk has no room for."""
    total = models.blueprint(config).params()['total']
    # bytes: fp32 weights, gradients, two moments; about 18 bf16 activations a layer, channel and token; logits
    need = (16 * total + micro * config.block_size * config.n_embd * (36 * config.n_layer + 8)
            + 512 * config.vocab_size * 16)
    free = re.search(r'MemAvailable:\s+(\d+)', proc('meminfo'))
    have = torch.cuda.mem_get_info()[0] if device == 'cuda' else 1024 * int(free[1]) if free else math.inf
    refuse(need > have, f'the model needs about {need / 2**30:.1f} GiB and {have / 2**30:.1f} are '
           f'free: lower micro_batch_size (now {micro}), n_layer or n_embd')
    place = next(p for p in [out_dir.absolute(), *out_dir.absolute().parents] if p.exists())
    room, checkpoints = shutil.disk_usage(place).free, 3 * 16 * total
    refuse(room < checkpoints + 2 ** 20, f'{place} has {room / 2**20:,.0f} MiB free, three checkpoints need '
           f'{checkpoints / 2**20:,.0f}: make room or choose another --out_dir')


def card_is_full(error):
    """Whether an error says so: PyTorch's, cuBLAS's, or one of these in the words of a compiler."""
    return isinstance(error, RuntimeError) and bool(re.search('out of memory|CUBLAS_STATUS_ALLOC_FAILED', str(error)))


def seconds_of(work, times):
    """Seconds that the fastest of several goes takes."""
    best = math.inf
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None      # not on a card that nobody asked for
    for _ in range(times):
        wait()
        began = time.monotonic()
        work()
        wait()
        best = min(best, time.monotonic() - began)
    return max(best, 1e-6)


# ---- the run -----------------------------------------------------------------------------------------------

LEAVING = 0.8       # seconds from the last line printed to the prompt back, the report's page included
UNPRINTED = ('evals', 'settings', 'changed', 'config', 'hardware', 'versions', 'data', 'sample',
             'warnings', 'energy', 'ideas')      # told in another form, or too long
HANGUP = getattr(signal, 'SIGHUP', None)        # not on Windows
PATIENCE = 600      # seconds that ranks wait for each other to begin
FIRST_WORD = 120    # seconds in which a first number gets to all that have met
SILENCE = 900       # seconds in which a rank that is at work answers the others; a data set may take an hour
LOGGED = 100_000    # steps that all stand in metrics.jsonl; of the next so many every second, then every third
BAD_STEPS = 5       # steps in a row that are not finite before the run goes back to its last checkpoint
COLUMNS = '    step  progress      loss        lr   grad_norm     tok/s       mfu  wait_ms  mem_gb  elapsed_s'


class Stopped(Exception):
    """SIGTERM, SIGINT or SIGHUP arrived; everything is saved."""


class Diverged(Exception):
    """Steps were not finite again and again, after going back to a checkpoint too."""


def ranks():
    """This process's rank and their number, as torchrun and others set them; alone where nothing does."""
    told = {name: os.environ.get(name, '') for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')}
    rank, world = told['RANK'] or '0', told['WORLD_SIZE'] or '1'
    alone = (rank, world) == ('0', '1')
    refuse(not alone and not (all(told.values()) and (rank + world).isdecimal() and int(rank) < int(world)),
           f'the environment has {" ".join(f"{k}={v}" for k, v in told.items())}, which is no rank of a run: '
           f'unset RANK and WORLD_SIZE to run alone, or start with torchrun')
    return int(rank), int(world)


def listen(handler):
    """Who hears the signals that end a run; not a hangup that nohup keeps from it."""
    for number in (signal.SIGTERM, signal.SIGINT, HANGUP):
        if number and not (number == HANGUP and signal.getsignal(number) == signal.SIG_IGN):
            signal.signal(number, handler)


class Run:
    """One run, from its settings to its report; its methods stand in the order in which a run lives.

    An idea overrides a method, does its part and calls super(). What a step computes: loss, groups,
    optimizers, rate, decay, micro_steps. What goes with it into a checkpoint and comes back: state, load.
    """
    together = None                              # what adds gradients up over ranks, where there are several
    patient = None                               # all ranks, as a group that waits long
    written = 'metrics.jsonl', 'result.json', 'report.html'      # in its folder, beside checkpoint and tokenizer

    # -- open: the machine, the checkpoint, the data

    def __init__(self, s, ideas):
        self.s, self.ideas, self.out_dir = s, ideas, Path(s.out_dir)
        self.rank, self.world = ranks()
        self.device, self.master = choose_device(s), self.rank == 0
        self.signals, self.told = [], []         # told: what a reader of the report should know
        self.steps, self.rows_read, self.skipped, self.tokens, self.flops = 0, 0, 0, 0, 0.0
        self.bad_steps, self.rolled_back, self.stopping, self.metrics = 0, False, False, None
        self.next_eval = None                    # at which progress there is an evaluation on the way
        self.went_by = 0.0                       # progress of the last step made
        self.progress = 0.0                      # what a step goes by: rank 0's clock's
        self.last_save, self.save_due = 0.0, False       # on the clock; whether the coming step is saved
        self.times = dict.fromkeys(('startup', 'compile', 'train', 'eval', 'save'), 0.0)
        self.history = collections.deque(maxlen=1000)    # (seconds waited for data, seconds) of the last steps
        self.waited = np.zeros(2)                # the sum of all of these but the first
        self.recent = collections.deque(maxlen=20)       # nats a token, of the last steps
        self.log_path = self.out_dir / 'metrics.jsonl'

    def open(self):
        """Takes the machine and opens all that the run reads; refuses what it could not end with."""
        if self.world > 1:
            self.take_card()
            self.meet()
        if self.all_reduce(np.array([float(self.restarted())]))[0]:
            self.s.init_from = 'resume'
        self.checkpoint = self.find_checkpoint()
        listen(signal.default_int_handler)
        share = 1 / int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        self.energy = sample.Energy(self.device, STARTED, share=share)
        self.earlier = np.zeros_like(self.energy.joules)         # of all ranks, in processes before this one
        self.data = self.in_turn(self.corpus().open)
        listen(self.heed)
        self.check_data()
        self.open_evaluations()
        if self.world > 1:
            self.compare()

    def take_card(self):
        local = int(os.environ.get('LOCAL_RANK', 0))
        if self.device == 'cuda':
            refuse(local >= (n := torch.cuda.device_count()), f'rank {self.rank} is number {local + 1} on a machine of '
                   f'{n} card{"s" * (n > 1)}: start it with --nproc_per_node={n}')
            torch.cuda.set_device(local)

    def meet(self):
        """Joins the other ranks and adds up a first number with them; says whom it waits for when that takes
        long."""
        listen(signal.SIG_DFL)                   # ends at once: Python hears nothing while torch waits
        where, store = f'{self.world} ranks at {os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}', None
        line = f'rank {self.rank} waits for {where}, {PATIENCE} s at most; Ctrl-C ends it'
        teller = threading.Timer(min(10, PATIENCE / 2), print, [line], dict(flush=True))
        watch = threading.Timer(FIRST_WORD, self.give_up, [where])
        teller.daemon = watch.daemon = True
        teller.start()
        try:
            store, *_ = next(dist.rendezvous('env://', timeout=datetime.timedelta(seconds=PATIENCE)))
            if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':     # addresses of lost ranks lie in it
                store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
            watch.start()
            card = torch.device('cuda', torch.cuda.current_device()) if self.device == 'cuda' else None
            dist.init_process_group('cpu:gloo,cuda:nccl' if card else 'gloo', store=store, rank=self.rank, device_id=card,
                                    world_size=self.world, timeout=datetime.timedelta(seconds=SILENCE))
            self.patient = dist.new_group(backend='gloo', timeout=datetime.timedelta(hours=1))
            first = torch.ones(1, device=self.device)
            dist.all_reduce(first)               # as gradients go, then as decisions do
            self.all_reduce(first.cpu().numpy())
        except (RuntimeError, ValueError) as e:
            why = ' '.join(str(e).split())[-200:]
            raise UserError(f'rank {self.rank} did not meet {where} ({type(e).__name__}): start all of them, '
                            f'with torchrun, or unset RANK and WORLD_SIZE to run alone' if store is None else
                            f'rank {self.rank} found {where}, and then ({why}): {self.way_across()}') from e
        finally:
            teller.cancel()
            watch.cancel()

    def give_up(self, where):
        """Ends a rank that would wait for ever: NCCL hangs where cards cannot read each other's memory."""
        os._exit(tell(self, UserError(f'{where} have met, and no number got across in {FIRST_WORD} s: {self.way_across()}')))

    def way_across(self):
        """What to do where ranks have met and cannot talk."""
        return ('set NCCL_P2P_DISABLE=1, which consumer cards may need, then NCCL_SHM_DISABLE=1, or start the container with '
                '--shm-size=1g; NCCL_DEBUG=INFO says more' if self.device == 'cuda' else
                'GLOO_SOCKET_IFNAME names the network to take, eth0 for one')

    def in_turn(self, work):
        """What work returns: rank 0 builds or fetches what is missing; then the first of each further host,
        which may have another disk; then the others find it there."""
        turn = 0 if self.master else 1 if os.environ.get('LOCAL_RANK', '0') == '0' else 2
        for now in range(3 if self.world > 1 else 1):
            if now == turn:
                made = work()
            if self.world > 1:
                dist.barrier(self.patient)
        return made

    def compare(self):
        """Refuses a rank, on a host of its own, that does not see what rank 0 sees."""
        mine = {'settings': {k: v for k, v in vars(self.s).items() if k not in self.free()},
                'files of config/': self.ideas.sources(), 'data': self.data.meta['fingerprint'],
                'checkpoint': self.checkpoint and self.checkpoint['steps'],
                'evaluation sets': {name: len(items['ids']) for name, items in self.measure.sets.items()}}
        told = [mine]
        dist.broadcast_object_list(told)
        differ = [name for name in mine if mine[name] != told[0][name]]
        refuse(differ, f'this rank, on {platform.node()}, has another {" and another ".join(differ)} than rank 0: give '
               f'all hosts the same command and the same files')

    def heed(self, number, frame):
        """Told once, a run ends with its step; three times (by Ctrl-C and torchrun is two), at once. A
        terminal that goes away may tell it more than once."""
        if not self.signals and self.master:
            with contextlib.suppress(OSError):   # not print, which it may have interrupted
                os.write(2, b'told to stop: the run saves after this step, or what else it is at; compiling '
                            b'may take a minute\n')
        self.signals.append(number)
        if number != HANGUP and len(self.signals) - self.signals.count(HANGUP) > 2:
            os._exit(128 + number)

    def say(self, line):
        if self.master:
            print(line, flush=True)
            self.told.extend([line] * (line.startswith(('warning:', 'adapted:', 'overruled:')) and line not in self.told))

    def all_reduce(self, array):
        """Sum of a numpy array over the ranks."""
        if self.world == 1:
            return array
        tensor = torch.tensor(array, dtype=torch.float64)     # by gloo: no card has to be waited for
        dist.all_reduce(tensor)
        return tensor.numpy()

    def agreed(self, *values):
        """Rank 0's numbers, on every rank."""
        values = self.all_reduce(np.array(values, float) * self.master).tolist()
        return values if len(values) > 1 else values[0]

    @property
    def resuming(self):
        return self.s.init_from == 'resume'

    def checkpoints(self):
        """The checkpoints that lie in the run's folder."""
        return [path for path in (self.out_dir / name for name in sample.CHECKPOINTS) if path.exists()]

    def restarted(self):
        """Whether this very torchrun, which has lost a rank and started all again, saw a checkpoint saved."""
        return 'TORCHELASTIC_RUN_ID' in os.environ and any(
            path.stat().st_mtime > time.time() - process_age(os.getppid()) for path in self.checkpoints())

    def find_checkpoint(self):
        """The checkpoint to go on from, or None; refuses to write over an earlier run."""
        s, out = self.s, self.out_dir
        if self.master and not s.dry_run:
            own(out, make=False)
        place = next(p for p in [out, *out.absolute().parents] if p.exists())
        refuse(not place.is_dir(), f'{place} is a file, the run would be written to the folder {out}: choose '
               f'another --out_dir')
        refuse(not os.access(place, os.W_OK), f'{place} cannot be written to: choose another --out_dir')
        refuse((out / 'meta.json').exists(), f'{out} is the folder of a data set: choose another --out_dir')
        finished = (out / 'result.json').exists()
        saved = self.checkpoints()
        if self.resuming:
            refuse(finished and not s.overwrite,
                   f'{out} holds a finished run, there is nothing to resume: choose another --out_dir')
            refuse(not saved, f'{out} has no ckpt.pt to resume from: leave --init_from away to start afresh')
            checkpoint = sample.read_checkpoint(out)
            self.take_settings(checkpoint)
            return checkpoint
        if not (s.overwrite or s.dry_run):
            refuse(finished, f'{out} holds a finished run: choose another --out_dir, or --overwrite')
            refuse(saved, f'{out} holds an unfinished run: go on with --init_from=resume, choose another '
                   f'--out_dir, or say --overwrite')

    def take_settings(self, checkpoint):
        """On resuming: a setting that the command line does not give is as the run had it; one that it gives
        must be the same, unless it is free."""
        s, theirs, free = self.s, checkpoint['settings'], self.free()
        before, now = ({name: digest for name, digest, named in ideas if named}
                       for ideas in (checkpoint['ideas'], self.ideas.sources()))
        names = [', '.join(f'{name}.py' for name in ideas) or 'no idea' for ideas in (before, now)]
        refuse(before.keys() != now.keys(),
               f'{self.out_dir} was begun with {names[0]}, the command line names {names[1]}: name the same')
        for name in [name for name in now if before[name] != now[name]]:
            self.say(f'warning: {name}.py is not what it was as this run began')
        shape = self.shape_names() if checkpoint.get('origin') != 'scratch' else ()     # was that of another run's weights
        bound = [k for k in theirs if k in vars(s) and k not in free]
        kept = [*bound, *OF_DATA & theirs.keys()]             # its data too, which may have moved since
        vars(s).update({k: theirs[k] for k in kept if k not in self.ideas.set_at or k in shape})
        wrong = [k for k in kept if self.ideas.known[k].wrong(theirs[k])]
        refuse(wrong, f'the checkpoint in {self.out_dir} has {", ".join(wrong)} as no run can have it: begin anew with '
               f'--overwrite')
        differ = [f'{k} (was {theirs[k]!r}, now {getattr(s, k)!r})' for k in bound if theirs[k] != getattr(s, k)]
        refuse(differ, 'settings that belong to the run cannot change on the way: ' + ', '.join(differ))

    def free(self):
        """Settings that a run which goes on may change; all others decide what a step computes."""
        return FREE

    def check_data(self):
        """Refuses text that is too little for a step."""
        s, n = self.s, len(self.data.tokens['train'])
        refuse(n < s.tokens_per_step // 16 or n <= s.block_size,
               f'the training split of {self.data.folder} holds {n:,} tokens, less than one block of {s.block_size} or a '
               f'sixteenth of a step of {s.tokens_per_step:,}: bring more text or lower them')

    def corpus(self):
        """Where the text comes from. With weights of another run it is tokenized with that run's
        vocabulary."""
        s = self.s
        other = s.init_from if s.init_from not in ('scratch', 'resume') else ''
        return self.ideas.seam(prepare_data.Corpus)(SimpleNamespace(**vars(s) | dict(
            tokenizer_from=s.tokenizer_from or other)))

    def open_evaluations(self):
        measure = self.ideas.seam(sample.Measure)
        self.measure = self.in_turn(lambda: measure(self.s, self.data.tokenizer, self.data, self.say))

    # -- build: the model, and what trains it

    def build(self):
        s = self.s
        self.config, before = self.shape(), None
        if s.init_from not in ('scratch', 'resume'):
            before, tokenizer = sample.load(s.init_from, self.device, here=self.ideas.files)
            self.same_vocabulary(tokenizer, s.init_from)
            self.config = self.shape_from(before)
        dtype, self.compiling, self.micro, self.adapted = adapt(s, self.device, self.world, self.rows_limit())
        self.dtype = getattr(torch, dtype)
        check_room(s, self.largest(), self.micro, self.device, self.out_dir)
        torch.manual_seed(s.seed)
        torch.set_float32_matmul_precision('high')
        self.take_model(self.new_model(self.config))
        if before is not None:
            self.start_from(before)
        self.stream = self.ideas.seam(Stream)(self.data, s)
        self.accum = s.tokens_per_step // (self.micro * s.block_size * self.world)
        self.at_once = sample.tokens_at_once(self.device)
        self.clock, self.origin = Clock(s, spent=WENT_BEFORE), s.init_from
        if self.resuming:
            with self.as_it_was():
                if not sample.fits(self.checkpoint, STATE):
                    raise ValueError('what it counts is missing, or no number')
                self.load(self.checkpoint)
        # now: a stream is no two threads'
        rows = self.stream.first_rows(min(64, s.tokens_per_step // s.block_size), s.block_size)
        self.early, self.first_batch = torch.from_numpy(rows), self.stream.batch(0, self.micro, s.block_size)
        self.checkpoint = None                   # frees its memory

    def shape(self):
        """The model's config: that of a run which goes on, else of the settings."""
        if self.resuming:
            with self.as_it_was():
                return sample.config_of(self.checkpoint, models.configured(self.ideas), dict(bos=self.data.meta['bos']))
        return self.config_of_settings()

    def config_of_settings(self):
        kind, s, meta = models.configured(self.ideas), self.s, self.data.meta
        names = [f.name for f in dataclasses.fields(kind) if f.name not in ('vocab_size', 'bos')]
        try:
            kernels_named(s.kernels)
            config = kind(vocab_size=meta['vocab_size'], bos=meta['bos'], **{k: getattr(s, k) for k in names})
            models.blueprint(config)
        except ValueError as e:
            raise UserError(f'the model cannot be built: {e}') from e
        return config

    def shape_names(self):
        """The settings that decide which weights a model has; an idea adds its own."""
        return SHAPE

    def shape_from(self, before):
        """The config where weights come from another run: that run's shape, which the settings follow."""
        theirs, ours, given = before.config, self.config, self.ideas.set_at
        names = [k for k in self.shape_names() if hasattr(theirs, k)]
        differ = [f'{k} {getattr(theirs, k)} there, {getattr(ours, k)} here' for k in names
                  if k in given and getattr(theirs, k) != getattr(ours, k)]
        refuse(differ, f'{self.s.init_from} is of another model: {"; ".join(differ)}: give its shape, or none')
        shape = {k: getattr(theirs, k) for k in names}
        vars(self.s).update(shape)
        return dataclasses.replace(ours, **shape)

    def same_vocabulary(self, tokenizer, run):
        refuse(tokenizer.blob != self.data.tokenizer.blob, f'{run} was trained with another vocabulary than '
               f'{self.data.folder} has: use its data, or data that was prepared with --tokenizer_from={run}')

    def largest(self):
        """The config of the largest model that this run will have."""
        return self.config

    def rows_limit(self):
        """Sequences of a micro-batch, at most, where a step must be made of smaller parts."""
        return self.s.micro_batch_size

    def new_model(self, config):
        model = config.GPT(config).to(self.device)
        model.compute_dtype = self.dtype
        return model

    def take_model(self, model):
        self.model, self.config = model, model.config
        self.optimizers = self.make_optimizers(model)
        moved = self.moved()
        left = [name for name, p in model.named_parameters() if p.requires_grad and p not in moved]
        refuse(left, f'{", ".join(left[:3])} are in no group of the optimizers, nothing would move them: have the idea '
               f'that adds them name one in Run.groups, dict(params=[...], base_lr=0.01)')
        if self.world > 1:
            self.together = GradientSum(model.parameters(), getattr(torch, self.s.reduce_dtype))

    def moved(self):
        """The parameters that optimizers move."""
        return {p for optimizer in self.optimizers for group in optimizer.param_groups for p in group['params']}

    def start_from(self, before):
        """Takes the weights of another run's model, as far as it has them."""
        missing, left = self.model.load_state_dict(before.state_dict(), strict=False)
        if missing or left:
            self.say(f'warning: from {self.s.init_from}: {", ".join(missing) or "nothing"} begins afresh, '
                     f'{", ".join(left) or "nothing"} is left')

    def groups(self, model):
        """{name: dict(params, base_lr, base_decay, AdamW's options)}; 'matrices' are Muon's."""
        s, head, slim = self.s, model.lm_head.weight, 256 / model.config.n_embd
        matrices = [m.weight for m in model.blocks.modules() if isinstance(m, Linear)]
        tables = [m.weight for m in model.modules()
                  if isinstance(m, torch.nn.Embedding) and m.weight is not head]
        scalars = [p for p in model.parameters() if p.ndim < 2]
        lr, decay = ((s.learning_rate, s.weight_decay) if s.optimizer == 'muon' else
                     (0.05 * s.learning_rate * slim, s.weight_decay / slim))
        return dict(heads=dict(params=[head], base_lr=s.head_lr * slim),
                    tables=dict(params=tables, base_lr=s.embedding_lr),
                    scalars=dict(params=scalars, base_lr=s.scalar_lr),
                    matrices=dict(params=matrices, base_lr=lr, base_decay=decay))

    def muon(self):
        """The class of what moves the matrices."""
        return Muon

    def make_optimizers(self, model):
        s, muon, groups = self.s, [], self.groups(model)
        wrong = [name for name, g in groups.items() if not (isinstance(g, dict) and {'params', 'base_lr'} <= g.keys())]
        refuse(wrong, f'{wrong and wrong[0]} of Run.groups is no group: write dict(params=[...], base_lr=0.01)')
        groups = {name: dict(base_decay=0.0) | g for name, g in groups.items() if g['params']}
        changed = next(kind for kind in type(self).__mro__ if 'muon' in vars(kind)).__module__
        refuse(changed != Run.__module__ and s.optimizer != 'muon',
               f'optimizer is {s.optimizer}, and {changed.rpartition(".")[2]}.py changes Muon: leave one out')
        if s.optimizer == 'muon':
            muon = [self.muon()(momentum=s.momentum, dtype=self.dtype, **groups.pop('matrices'))]
        return muon + [torch.optim.AdamW([*groups.values()], lr=0.0, betas=(s.beta1, s.beta2), eps=1e-10,
                                         weight_decay=0.0, fused=True)]

    # -- what a checkpoint keeps

    def state(self):
        """All that the next batch needs, as plain numbers and tensors."""
        return dict(
            version=3, steps=self.steps, rows_read=self.rows_read, progress=self.clock.progress,
            elapsed=self.clock.elapsed(), trained=self.clock.trained, skipped=self.skipped, tokens=self.tokens,
            flops=self.flops, times=dict(self.times), warnings=self.told, origin=self.origin,
            stream=self.stream.state(), next_eval=self.next_eval, went_by=self.went_by,
            joules=(self.earlier + self.world * self.energy.joules).tolist(),            # ranks are alike
            model=self.model.state_dict(), optimizers=[o.state_dict() for o in self.optimizers],
            config=dataclasses.asdict(self.config), settings=vars(self.s), ideas=self.ideas.sources(),
            fingerprint=self.data.meta['fingerprint'], tokenizer=self.data.meta['tokenizer_sha256'],
            data=str(self.data.folder))

    @contextlib.contextmanager
    def as_it_was(self):
        """Around what takes in a checkpoint, whoever wrote it: one that does not fit is a sentence."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as e:
            why = ' '.join(str(e).split())[:200]
            raise UserError(f'the checkpoint in {self.out_dir} does not fit this run ({type(e).__name__}: {why}): begin '
                            f'anew with --overwrite') from e

    def load(self, state):
        """Goes on from what `state` said in another process."""
        refuse(state['tokenizer'] != self.data.meta['tokenizer_sha256'] or
               state['fingerprint'] != self.data.meta['fingerprint'] or
               self.config.vocab_size != self.data.meta['vocab_size'],
               f'{self.data.folder} is not the data that {self.out_dir} began with: restore it, or start afresh')
        for optimizer, known in zip(self.optimizers, state['optimizers'], strict=True):
            take(optimizer, known)
        self.model.load_state_dict(state['model'])
        self.steps, self.rows_read, self.skipped, self.tokens, self.flops, self.origin = (
            state[k] for k in ('steps', 'rows_read', 'skipped', 'tokens', 'flops', 'origin'))
        self.times |= state['times']
        self.told += state['warnings']
        self.stream.load(state['stream'])
        # neither was in checkpoints before 2026-11-27
        self.progress = self.went_by = state.get('went_by', state['progress'])
        if state['settings'].get('eval_interval') == self.s.eval_interval:       # else it is found anew
            self.next_eval = state.get('next_eval')
        # what a killed run did after its last checkpoint was paid for too
        spent = max([state['elapsed']] + [row['elapsed_s'] for row in read_rows(self.log_path)])
        self.clock = Clock(self.s, spent, state['trained'], state['progress'])
        self.earlier[:] = np.array(state['joules']) * spent / state['elapsed']

    # -- announce: what this run is, and a folder for it

    def announce(self):
        s, data, say = self.s, self.data, self.say
        known = self.ideas.known
        self.changed = {k: v for k, v in vars(s).items() if k in known and v != known[k].default}
        say(f'halfhour: {s.dataset}, {s.budget_minutes:g} minutes on {hardware(self.device)}'
            + f', {self.world} ranks' * (self.world > 1))
        changed = ', '.join(f'{k}={v!r}' for k, v in self.changed.items())
        say(f'settings that differ from the defaults: {changed}')
        for line in self.ideas.overruled:
            say(f'overruled: {line}')
        for line in self.adapted:
            say(f'adapted: {line}')
        train, val = (len(data.tokens[split]) for split in ('train', 'val'))
        say(f'data: {data.folder}, {train:,} training tokens, {val:,} for validation')
        say(f'model: {self.model.describe()}')
        say(f'step: {s.tokens_per_step:,} tokens = {self.accum} micro-steps of {self.micro} x {s.block_size} '
            f'on {self.world} rank(s), {str(self.dtype)[6:]}, torch.compile {"on" if self.compiling else "off"}, '
            f'{s.optimizer}')
        self.choose_kernels()
        if self.master and not s.dry_run:
            self.make_folder()

    def choose_kernels(self):
        try:
            for line in choose_kernels(self.s.kernels, self.config, self.device, self.dtype, self.micro):
                self.say(f'  {line}')
        except RuntimeError as e:
            raise UserError(str(e)) from e

    def make_folder(self):
        """The run's folder: what another run left there is gone, what the resumed one logged stays."""
        out, tokenizer = self.out_dir, self.data.tokenizer
        out.mkdir(parents=True, exist_ok=True)
        own(out)
        if not self.resuming:
            self.find_checkpoint()               # another run may have been here since
            names = *sample.CHECKPOINTS, *(t.filename for t in prepare_data.TOKENIZERS.values()), *self.written
            for old in (out / f'{name}{end}' for name in names for end in ('', '.part')):
                old.unlink(missing_ok=True)
        due = self.went_by >= min(self.next_eval or 1, 0.95)     # what was measured after this step is measured again,
        rows = [row for row in read_rows(self.log_path)      # and what came after the checkpoint comes again
                if row['step'] < self.steps or row['step'] == self.steps and ('train_loss' in row or not due)]
        known = ''.join(json.dumps(row) + '\n' for row in rows)
        write_beside(self.log_path, lambda f: f.write(known.encode()))
        write_beside(out / tokenizer.filename, lambda f: f.write(tokenizer.blob))
        for path, text in self.ideas.files.items():              # to read and to compare, never to run
            (out / 'config').mkdir(exist_ok=True)
            write_beside(out / 'config' / path.name, lambda f, text=text: f.write(text.encode()))
        self.metrics = open(self.log_path, 'a', buffering=1)

    def record(self, **row):
        """Adds a row to metrics.jsonl."""
        if self.metrics:
            try:
                self.metrics.write(as_json(row) + '\n')
            except OSError as e:                # a full disk: the run is worth more than its log
                self.say(f'warning: metrics.jsonl could not be written ({e.strerror})')

    # -- warm up: compile, and learn what a step and the closing evaluation will cost

    def warm_up(self):
        self.times['startup'] += self.clock.age()
        s, began = self.s, time.monotonic()
        self.read_ahead()
        self.get_going()
        self.times['compile'] += time.monotonic() - began
        unset = [name for name, p in self.model.named_parameters() if not p.isfinite().all()]
        refuse(unset, f'{", ".join(unset[:3])} begin as no numbers: set them in init_weights')
        self.measure_evaluation()
        self.save_seconds = 0.5 + 12 * models.blueprint(self.largest()).params()['total'] / 2 ** 30
        self.last_save = self.clock.elapsed()
        if self.next_eval is None:               # a run that goes on knows it
            self.next_eval = s.eval_interval * max(1, math.ceil(self.clock.progress / (s.eval_interval or 1)))

    def read_ahead(self):
        """Begins to read what the first step takes."""
        self.first_step = self.steps
        self.batches = Prefetcher(self.stream, self.rows_read, self.micro, self.s.block_size, self.rank,
                                  self.world, self.device, 3 * self.accum)

    def read_rows(self):
        """Some rows (B, T) as steps read them."""
        return self.early.to(self.device)

    def arithmetic(self):
        """Model FLOPs of a token in training, as steps are now."""
        return self.model.flops_per_token(self.model.attended(self.read_rows()))

    def get_going(self):
        """Makes what computes a step, compiled, and learns how many seconds it takes."""
        self.step_model = self.model
        if self.compiling:
            torch._dynamo.config.recompile_limit = 64    # programs of one function: blocks, models may differ
            self.step_model = self.compiled(self.model)
        self.flops_per_token = self.arithmetic()
        batch = dict(self.first_batch)           # its ids do not matter, its kinds do
        shape, size = batch['idx'].shape, batch['idx'].numel()
        batch['idx'] = torch.arange(size).view(shape) % self.config.vocab_size
        batch['targets'] = batch['idx'].clone()      # one tensor twice would compile another program
        batch = {k: t.to(self.device) for k, t in batch.items()}
        self.make_noise()
        # a place for what the optimizers keep from the first step on
        room = [torch.empty_like(p) for o in self.optimizers if not o.state for group in o.param_groups
                for p in group['params'] for _ in range(2 - isinstance(o, Muon))]
        while not self.fits_memory(batch):
            batch = self.halved(batch)
        del room
        idle = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        refuse(idle, f'{", ".join(idle[:3])} have no gradient, nothing in the loss reads them: leave out the idea '
               f'that adds them, or name it after the others')
        seconds = seconds_of(lambda: self.batch_loss(**batch).backward(), 1)
        self.step_seconds = self.accum * self.agreed(seconds)
        self.model.zero_grad()

    def fits_memory(self, batch):
        """Whether every rank's device has room for the gradients of a micro-batch."""
        full = False
        try:
            self.try_out(batch)
        except RuntimeError as e:
            full = card_is_full(e)
            if not full:
                raise
        return not self.all_reduce(np.array([float(full)]))[0]

    def try_out(self, batch):
        try:
            self.batch_loss(**batch).backward()
        except Exception as e:                  # of a compiler, whatever it be; one of the model comes again
            if not self.compiling or card_is_full(e):
                raise
            self.do_without_compiler(e)
            self.batch_loss(**batch).backward()

    def halved(self, batch):
        """The first rows of a micro-batch, whose size becomes the largest part of it that divides it: a step
        of more and smaller ones is the same step."""
        was = self.micro
        refuse(was == 1, f'{self.device} has no room for one row of {self.s.block_size} tokens: lower '
               f'block_size, n_layer or n_embd')
        self.batches.close()
        self.model.zero_grad()
        self.micro = max(n for n in range(1, was) if was % n == 0)
        self.accum *= was // self.micro
        if self.device == 'cuda':
            torch.cuda.empty_cache()
        self.read_ahead()
        self.say(f'adapted: micro_batch_size {self.micro} instead of {was}: there is no room for more')
        return {k: t[:self.micro] for k, t in batch.items()}

    def compiled(self, model):
        """The model as it is trained: on a GPU one program; on a CPU one for a block, which all blocks share:
        a third of the wait, and as fast (RESULTS.md); also where ranks send a block's gradients while the next
        block's are made, which one program would hand out at its end."""
        return torch.compile(model, dynamic=False) if self.device == 'cuda' and self.world == 1 else self.by_block(model)

    def by_block(self, model):
        """The model with its blocks compiled, one program for all that are alike."""
        for block in model.blocks:
            block.compile(dynamic=False)
        return model

    def do_without_compiler(self, error):
        self.compiling = False
        torch.compiler.set_stance('force_eager')
        why = ' '.join(str(error).split())[:200] or type(error).__name__
        self.say(f'warning: torch.compile does not work here ({why}): the run goes on without it, slower')

    def dearer(self):
        """How many times longer than now the closing evaluation will take, if it is of a larger model."""
        return 1.0

    def measure_evaluation(self):
        """Tries each part of the closing evaluation on a little, and plans how much of it fits: a tenth of
        the budget for bits per byte, a twentieth for evaluation sets, an 80th for all else. slices: of
        validation text; counts: {set: items} at the end, curve: on the way; others: {name: (items,
        seconds)}."""
        s, clock, measure = self.s, self.clock, self.measure
        tenth, val_tokens = 0.1 * clock.budget, len(self.data.tokens['val'])
        self.slices, most = sample.SLICES, tenth if clock.counts_all else math.inf
        probe = min(self.slices, -(-self.slices * self.at_once // val_tokens))
        self.bits(probe, keep=False)             # the first call sets things up
        self.slice_seconds = self.dearer() * self.agreed(
            min(self.bits(probe, keep=False)['seconds_per_slice'] for _ in range(2)))
        if self.slice_seconds * self.slices > most:
            self.slices = 2 ** max(0, int(math.log2(most / self.slice_seconds)))
        self.counts, self.curve, self.judge_seconds = {}, {}, 0.0
        if measure.sets:
            few = measure.affordable(1000, len(measure.sets) * (self.at_once if self.device == 'cuda' else 2048))
            seconds = seconds_of(lambda: self.judge(few), 2)
            token_cost = self.dearer() * self.agreed(seconds) / measure.tokens_of(few)
            self.counts = measure.affordable(math.inf, tenth / 2 / token_cost)
            self.curve = measure.affordable(1000, tenth * s.eval_interval / 4 / token_cost)
            self.judge_seconds = token_cost * measure.tokens_of(self.counts)
        start = torch.full((1, 1), self.config.bos, device=self.device)
        with self.evaluating():
            seconds = seconds_of(lambda: list(self.model.generate(start, 12)), 2)
        self.token_seconds = self.dearer() * self.agreed(seconds) / 12
        self.others = measure.plan(tenth / 8, self.token_seconds)

    def closing_seconds(self):
        """Seconds from the last step to the prompt back: a tenth of the budget for bits per byte at most,
        which are cut if they take longer."""
        most = 0.1 * self.clock.budget if self.clock.counts_all else math.inf
        least = self.slice_seconds * -(-self.slices // 16)       # it stops at 16ths only
        return max(least, min(self.slice_seconds * self.slices, most)) + self.save_seconds + self.afterwards()

    def afterwards(self):
        """Seconds of what comes after bits per byte."""
        return (self.judge_seconds + sum(seconds for _, seconds in self.others.values())
                + self.token_seconds * self.s.sample_tokens + LEAVING)

    def say_plan(self):
        """What --dry_run found out: how many tokens and epochs the budget buys, and what it costs."""
        s, clock, tokens = self.s, self.clock, self.expected_tokens()
        a_parameter, epochs, worth = self.reading(tokens)
        self.warn_of_rereading(a_parameter, epochs)
        self.batches.close()
        dollars = clock.budget / 3600 * s.dollars_per_hour
        price = f'{dollars:.2f} dollars' if s.dollars_per_hour else 'unknown, set dollars_per_hour'
        self.say(f'---\ndry_run: data, vocabulary, memory and disk are fine\nstep_seconds: {self.step_seconds:.3f}\n'
                 f'closing_seconds: {self.closing_seconds():.1f}\ntokens: {tokens:,}\n'
                 f'epochs: {epochs:.2f}\nworth_epochs: {worth:.2f}\ntokens_a_parameter: {a_parameter:.2f}\n'
                 f'flops: {tokens * self.flops_per_token:.3g}\ndollars: {price}')

    def expected_tokens(self):
        """Tokens that the run will have read in the end, if its steps take what the first took."""
        clock, each = self.clock, self.s.tokens_per_step
        clock.reserve = self.closing_seconds()
        return clock.max_steps * each or self.tokens + max(0, int(clock.left() / self.step_seconds)) * each

    def reading(self, tokens):
        """So many tokens for each parameter, in epochs, and what these are worth at most in epochs of fresh text: a
        repetition is worth the less the more there were (Muennighoff 2023, 2305.16264, R_D = 15.39)."""
        epochs = tokens / self.stream.epoch_tokens()
        worth = epochs if epochs < 1 else 1 + 15.39 * -math.expm1((1 - epochs) / 15.39)
        return tokens / models.blueprint(self.largest()).params()['total'], epochs, worth

    def warn_of_rereading(self, a_parameter, epochs):
        """Where scale models were best after 6 to 12 epochs and then got worse (RESULTS.md, "Dolls": scarce)."""
        if epochs > 20 and (little := a_parameter / epochs) < 12:
            self.say(f'warning: {epochs:.3g} epochs of {little:.2g} tokens of text a parameter: it will know them by heart and '
                     f'get worse; bring more text, end after a dozen, keep the best weights (config/best_weights.py), or '
                     f'see README, "what should I train?"')

    # -- step

    def say_start(self):
        s, clock = self.s, self.clock
        until = f'until the clock says {s.budget_minutes:g} minutes'
        until = f'{clock.max_steps} steps' if clock.max_steps else until
        share = 'whole' if self.slices == sample.SLICES else f'{self.slices}/{sample.SLICES} of it'
        if not (self.steps or self.time_left()):
            self.batches.close()
            raise UserError(f'nothing is left to train in: of {clock.budget:.0f} s {self.agreed(clock.elapsed()):.0f} are over, and '
                            f'{self.agreed(clock.reserve):.0f} are kept for the end. The text is prepared now: the same again, or '
                            f'with more budget_minutes')
        tokens = self.expected_tokens()
        a_parameter, epochs, worth = self.reading(tokens)
        self.warn_of_rereading(a_parameter, epochs)
        self.say(f'training {until}: some {tokens:,} tokens, {a_parameter:.3g} a parameter, {epochs:.3g} epochs'
                 + f', worth {worth:.3g} of fresh text at most' * (epochs > 1) + f'; closing evaluation {share}, about '
                 f'{self.closing_seconds():.0f} s\n{COLUMNS}')
        self.energy.turn('train')

    def time_left(self):
        """Whether to make another step, what it goes by, progress, left, step_seconds, and whether it is saved: rank 0's
        on every rank, or they would stop at different steps and wait for ever."""
        clock = self.clock
        clock.reserve = self.closing_seconds()
        fits = clock.fits(self.steps, self.step_seconds / self.accum)
        due = clock.elapsed() - self.last_save >= 60 * self.s.save_minutes
        go, self.progress, self.left, self.step_seconds, self.save_due = self.agreed(
            fits, clock.progress, clock.left(), self.step_seconds, due)
        return bool(go)

    def rate(self, progress):
        """Multiplier of the learning rates at progress in [0, 1]: a short rise, a level, a linear fall."""
        s = self.s
        rise = 0.1 + 0.9 * progress / s.warmup_frac if progress < s.warmup_frac else 1.0
        fall = (1 - progress) / s.cooldown_frac if progress > 1 - s.cooldown_frac else 1.0
        return rise * (s.final_lr_frac + (1 - s.final_lr_frac) * fall)

    def decay(self, progress):
        """Multiplier of weight decay."""
        return 1 - progress

    def micro_steps(self, progress):
        """How many micro-batches make a step."""
        return self.accum

    def batch_loss(self, **batch):
        """The loss of a micro-batch; an idea that treats some of its rows otherwise asks `loss` for each
        kind."""
        return self.loss(**batch)

    def loss(self, idx, targets, **extras):
        """The mean loss of rows; extras go to the model by keyword."""
        return self.step_model(idx, targets, **extras)

    def make_noise(self):
        """Each step's own random numbers, another rank's others: a resumed run draws the same again."""
        torch.manual_seed(int(np.random.default_rng([self.s.seed, self.steps, self.rank]).integers(2 ** 62)))

    def step(self):
        """One step of the optimizer, accounted for and logged; a signal may end it before."""
        clock, began = self.clock, time.monotonic()
        clock.progress = self.progress
        self.stream.pace(self.rows_read * self.s.block_size // self.s.tokens_per_step, self.progress)
        short = not clock.max_steps and self.left < self.step_seconds    # a last step, of fewer micro-steps
        n_micro = self.micro_steps(self.progress)
        if short:
            n_micro = max(1, min(n_micro, round(self.accum * self.left / self.step_seconds)))
        self.make_noise()
        loss, wait = self.gradients(n_micro)
        if loss is None:
            self.stopping = True
            return
        loss, norm, rate = self.descend(loss)    # on a GPU the end of it is part of the next step's seconds
        seconds = max(1e-6, time.monotonic() - began)            # a coarse clock stands still
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.steps, self.skipped, self.went_by = self.steps + 1, self.skipped + (not finite), self.progress
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.step_seconds = 0.8 * self.step_seconds + 0.2 * seconds * self.accum / n_micro
        clock.add_step(seconds, self.left, self.steps)
        self.count(n_micro, seconds, wait)
        self.log(loss, norm, rate, finite)

    def gradients(self, n_micro):
        """Gradients of the mean loss of so many micro-batches: that loss, and seconds waited for data; None
        for the loss if a lone rank must stop before the last of them."""
        total, waited = torch.zeros((), device=self.device), 0.0
        for left in reversed(range(n_micro)):
            batch, wait = self.batches.next()
            if self.world == 1 and self.signals:     # a step can outlast the grace before a machine goes
                self.model.zero_grad()
                return None, waited
            batch = {k: t.to(self.device, non_blocking=True) for k, t in batch.items()}
            if self.together and not left:
                self.together.begin()
            total += self.add_gradients(batch, n_micro)
            waited += wait
        return total, waited

    def add_gradients(self, batch, n_micro):
        """Adds the gradients of one of n_micro micro-batches; its part of the loss."""
        loss = self.batch_loss(**batch) / n_micro
        loss.backward()
        return loss.detach()

    def descend(self, loss):
        """Makes the step that the gradients say: the loss, gradient norm before clipping, multiplier of the
        rates. Not finite: the weights stay as they are."""
        told = self.average_over_ranks(loss)
        most = self.s.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), most, foreach=True)
        norm, loss, *stop = torch.stack([norm, *told]).tolist()  # the one wait for the card in a step: skip or not?
        self.stopping = any(stop or self.signals)
        rate, factor = self.rate(self.progress), self.decay(self.progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group['lr'], group['weight_decay'] = rate * group['base_lr'], group['base_decay'] * factor
            if math.isfinite(loss) and math.isfinite(norm):
                optimizer.step()
        self.model.zero_grad()
        return loss, norm, rate

    def average_over_ranks(self, loss):
        """Averages gradients over ranks, in place. Returns the mean loss and, where there are several, how many
        were told to stop."""
        if not self.together:
            return [loss]
        told = torch.stack([loss, loss.new_full((), len(self.signals))])
        self.together.finish(told, self.world)
        return [told[0] / self.world, told[1]]

    def count(self, n_micro, seconds, wait):
        """Accounts for a step's text, time and arithmetic."""
        rows = n_micro * self.micro * self.world
        self.rows_read += rows
        self.tokens += rows * self.s.block_size
        self.flops += rows * self.s.block_size * self.flops_per_token
        self.times['train'] += seconds
        self.speed = rows * self.s.block_size / seconds
        self.waited += np.array((wait, seconds)) * bool(self.history)
        self.history.append((wait, seconds))

    def log(self, loss, norm, rate, finite):
        self.recent.extend([loss] * finite)
        peak, (wait, _), elapsed = self.peak(), self.history[-1], self.clock.elapsed()
        mfu, memory = self.speed * self.flops_per_token / peak if peak else None, peak_memory_gb(self.device)
        if self.steps % (1 + self.steps // LOGGED) == 0 or not finite:
            self.record(step=self.steps, progress=self.progress, train_loss=loss, lr=rate, grad_norm=norm,
                        tok_per_sec=self.speed, mfu=mfu, data_wait_s=wait, peak_mem_gb=memory, elapsed_s=elapsed,
                        skipped=self.skipped)
        if self.steps % self.s.log_interval == 0 or self.steps == self.first_step + 1 or not finite:
            share = f'{mfu:9.3f}' if mfu else '        -'
            self.say(f'{self.steps:8d} {self.progress:9.4f} {loss:9.4f} {rate:9.4f} {norm:11.4f} '
                     f'{self.speed:9,.0f} {share} {1000 * wait:8.2f} {memory:7.2f} {elapsed:10.1f}')

    def peak(self):
        """FLOPs a second that all ranks could do at most, where that is known."""
        known = self.device == 'cuda' and self.dtype == torch.bfloat16 and peak_flops(hardware(self.device))
        return known * self.world if known else None

    def diverged(self, what):
        return Diverged(f'{what} after step {self.steps}: lower learning_rate (now '
                        f'{self.s.learning_rate:g}), or dtype=float32')

    def roll_back_if_due(self):
        """Not finite, again and again: back, once, to the last checkpoint that cannot be the cause itself."""
        if self.bad_steps < BAD_STEPS:
            return
        if self.rolled_back or self.steps == self.bad_steps or not self.agreed((self.out_dir / 'ckpt.pt').exists()):
            again = ', again after going back' if self.rolled_back else ''
            raise self.diverged(f'{self.bad_steps} steps in a row were not finite{again}')
        if self.world > 1:
            dist.barrier()
        good = sample.read_checkpoint(self.out_dir)
        if good['steps'] == self.steps - self.bad_steps and (self.out_dir / 'ckpt.prev.pt').exists():
            good = sample.read_checkpoint(self.out_dir / 'ckpt.prev.pt')
        if good['config'] != dataclasses.asdict(self.config):
            raise self.diverged(f'{self.bad_steps} steps in a row were not finite since the model has another '
                                f'shape,')
        self.model.load_state_dict(good['model'])
        for optimizer, state in zip(self.optimizers, good['optimizers']):
            optimizer.load_state_dict(state)
        self.rolled_back, self.bad_steps = True, 0
        self.say(f'warning: {BAD_STEPS} steps in a row were not finite: weights and optimizer of step '
                 f'{good["steps"]} again, on new batches')

    # -- save

    def save_if_due(self):
        if self.bad_steps == 0 and self.save_due:
            began = time.monotonic()
            if not self.save():
                self.save_seconds = max(0.5, time.monotonic() - began)
            self.last_save = self.clock.elapsed()

    def save(self):
        """Writes the state whole or not at all, and keeps the one before. Returns the error of it, or None: a
        full disk must not end a run."""
        with self.busy('save'):
            known = [t for o in self.optimizers for kept in o.state.values() for t in kept.values() if torch.is_tensor(t)]
            if not all(t.isfinite().all() for t in [*self.model.parameters(), *known]):
                self.say(f'warning: step {self.steps} is not saved, what it left is not finite')
                return self.diverged('the weights, or what the optimizer knows, are not finite')
            try:
                if self.master:
                    with contextlib.suppress(OSError):       # the log's rows until here, for good
                        os.fsync(self.metrics.fileno())
                    save_checkpoint(self.out_dir, self.state())
            except UserError as e:              # the run is worth more, and the earlier checkpoint is whole
                self.say(f'warning: {e}')
                return e

    @contextlib.contextmanager
    def busy(self, part):
        """The time and the energy of what is done inside are those of a part that is not training."""
        began, doing = time.monotonic(), self.energy.turn('eval' if part == 'eval' else 'idle')
        try:
            yield
        finally:
            self.energy.turn(doing)
            self.times[part] += time.monotonic() - began

    # -- evaluate

    @contextlib.contextmanager
    def evaluating(self):
        """The model as it is measured, of any shape of text and so not compiled; an idea may put other
        weights there. Other ranks wait for the first."""
        with self.busy('eval'), torch.compiler.set_stance('force_eager'):
            self.model.eval()
            try:
                yield
                if self.world > 1:
                    dist.barrier()
            finally:
                self.model.train()

    def bits(self, slices, stop=None, keep=True):
        """Bits per byte of so many of 1,024 stratified parts of the validation text, dealt out to ranks."""
        began = time.monotonic()
        with self.evaluating():
            result = self.measure.bpb(self.model, slices, self.at_once, stop, self.rank, self.world,
                                      self.all_reduce)
        result['seconds_per_slice'] = max(1e-6, time.monotonic() - began) / (result['share'] * sample.SLICES)
        if keep and not self.signals:           # a signal may have cut it short
            self.say_cut('the validation', result.get('asked', 1))
            self.record(step=self.steps, progress=self.clock.progress, tokens=self.tokens,
                        val_bpb=result['bpb'], val_loss=result['loss'], share=result['share'], elapsed_s=self.clock.elapsed())
        return result

    def judge(self, counts, stop=None, at_once=None):
        """What the model does on so many items of every evaluation set, dealt out to ranks."""
        with self.evaluating():
            return {name: self.measure.judge(self.model, name, n, at_once or self.at_once, stop, self.rank,
                                             self.world, self.all_reduce)
                    for name, n in counts.items() if not self.told_to_stop()}

    def continuation(self, length, deadline=math.inf):
        """What follows sample_prompt, by the same dice every time, as far as it gets in time; on rank 0."""
        pieces = []
        with self.evaluating():
            dice = torch.Generator(device=self.device).manual_seed(self.s.seed)
            prompt, tokenizer = self.s.sample_prompt, self.data.tokenizer
            coming = sample.stream(self.model, tokenizer, prompt, length, 0.8, generator=dice)
            try:
                for piece in coming if self.master and length else ():
                    pieces.append(piece)
                    if self.clock.elapsed() > deadline:
                        self.say_cut('the sample', len(pieces) / length)
                        break
            except FloatingPointError as e:
                self.say(f'warning: the sample ends early: {e}')
        return ''.join(pieces) if self.master and length else None

    def say_cut(self, name, share):
        """A warning, where that is so, that only a share of what was planned has been measured."""
        if share < 1:
            self.say(f'warning: {name} was cut to {share:.0%}: no more time was left')

    def record_abilities(self, evals):
        self.record(step=self.steps, progress=self.clock.progress, elapsed_s=self.clock.elapsed(), evals={
            name: {key: e[key] for key in ('accuracy', 'error', 'chance', 'items')}
            for name, e in evals.items() if 'accuracy' in e})

    def evaluate_if_due(self):
        """On the way: an eighth of the closing validation, some items of every set, a short sample."""
        s, progress = self.s, self.went_by
        if not (self.next_eval and self.next_eval <= progress < 0.95):
            return
        due, self.next_eval = self.next_eval, s.eval_interval * (int(progress / s.eval_interval + 1e-9) + 1)
        result = self.bits(max(1, self.slices // 8))
        if not math.isfinite(result['bpb']):
            return self.say('         validation: not finite')
        self.slice_seconds = self.dearer() * self.agreed(result['seconds_per_slice'])
        learned = f', {np.mean(self.recent):.4f} in the last steps of training' if self.recent else ''
        self.say(f'         validation on {result["share"]:.1%}: {result["bpb"]:.4f} bits per byte, standard error '
                 f'{result["error"]:.4f}; epoch {self.tokens / self.stream.epoch_tokens():.2f}, nats a token {result["loss"]:.4f}{learned}')
        if abilities := self.judge(self.curve):
            self.record_abilities(abilities)
            self.say('         ' + ', '.join(f'{name} {e["accuracy"]:.4f} +- {e["error"]:.4f}'
                                             for name, e in abilities.items()))
        if text := self.continuation(min(60, s.sample_tokens)):
            self.record(step=self.steps, progress=progress, sample=text, elapsed_s=self.clock.elapsed())
        if self.told_to_stop():                  # which cut it short: the run that goes on makes it again
            self.next_eval = due

    # -- report

    def finish(self):
        """The end: save first, then the closing evaluation, cut where the clock wants it, then the report."""
        self.batches.close()
        unsaved, saved = self.save(), f'{self.out_dir} is saved, go on with --init_from=resume'
        if self.stopping:
            raise unsaved or Stopped(f'stopped by a signal after step {self.steps}; {saved}')
        self.energy.turn('idle')
        found = self.closing_evaluation()
        if self.told_to_stop():
            raise unsaved or Stopped(f'stopped by a signal during the closing evaluation; {saved}')
        report, unwritten = self.results(*found), unsaved
        if self.master and not unsaved:
            try:
                self.keep_report(report)         # on disk before a word of it
            except UserError as e:
                unwritten = UserError(f'{e}; {saved}')
        self.say_report(report)
        if unwritten:
            raise unwritten

    def deadline(self, kept):
        """When a part of the closing must end, on the clock, so that `kept` seconds remain for what
        follows."""
        grace = min(0.01 * self.clock.budget, 5.0)
        return self.clock.budget + grace - kept if self.clock.counts_all else math.inf

    def told_to_stop(self, late=False):
        """Whether any rank has heard a signal, or it is too late by rank 0's clock: asked of all alike."""
        return bool(self.all_reduce(np.array([late and self.master, bool(self.signals)], float)).any())

    def until(self, deadline, ask=None):
        """A stop(), to be asked before the next part of what must end by then: a part takes what the last one
        took."""
        asked = [self.clock.elapsed()]

        def stop():
            asked.append(self.clock.elapsed())
            return (ask or self.told_to_stop)(2 * asked[-1] - asked[-2] > deadline)
        return stop

    def closing_evaluation(self):
        """Bits per byte, evaluation sets, what else is measured, and a sample: each within what is left."""
        kept, evals = self.afterwards(), {}
        result = self.bits(self.slices, stop=self.until(self.deadline(kept)))
        if not math.isfinite(result['bpb']):
            raise self.diverged(f'bits per byte are {result["bpb"]}')
        slow = self.agreed(min(4.0, max(1.0, result['seconds_per_slice'] / self.slice_seconds)))    # the machine now
        spoken = self.token_seconds * self.s.sample_tokens
        kept += (slow - 1) * spoken
        for name, n in self.counts.items():
            tokens = self.measure.tokens_of({name: n})
            kept -= self.judge_seconds * tokens / self.measure.tokens_of(self.counts)
            stop = self.until(self.deadline(kept))
            at_once = min(self.at_once, 1 + int(tokens / 16)) if slow > 1.5 else self.at_once     # to be cut in time
            evals |= self.judge({} if stop() else {name: n}, stop, at_once)
        for name, (n, seconds) in self.others.items():
            kept -= seconds
            stop = self.until(self.deadline(kept), lambda late: late or bool(self.signals))     # of rank 0 alone
            with self.evaluating():
                ask = self.measure.ask(self.model, {name: n}, stop) if self.master else ()
                evals |= dict(ask)
        text = self.continuation(0 if self.signals else self.s.sample_tokens, self.deadline(kept - slow * spoken))
        for name in [*self.counts, *self.others] if self.master and not self.signals else ():
            self.say_cut(name, evals[name].get('share', 1) if name in evals else 0)
        if evals and not self.signals:
            self.record_abilities(evals)
        return result, evals, text

    def results(self, result, evals, text):
        """What result.json holds."""
        s, clock, data = self.s, self.clock, self.data
        trained, total, sizes = max(self.times['train'], 1e-9), clock.elapsed() + LEAVING, self.model.params()
        speed, peak = self.flops / trained, self.peak()
        waited, stepped = self.waited if self.waited.any() else (0, 1)
        return dict(
            val_bpb=result['bpb'], val_bpb_error=result['error'], val_share=result['share'],
            val_bpb_text_error=result['text_error'], val_loss=result['loss'],
            val_bpb_per_source=result['per_source'], val_bpb_per_source_text_error=result['per_source_error'],
            evals=evals, steps=self.steps, tokens=self.tokens,
            epochs=self.tokens / self.stream.epoch_tokens(),
            **{f'{kind}_params': n for kind, n in sizes.items()},
            flops=self.flops, flops_per_token=self.flops_per_token, tok_per_sec=self.tokens / trained,
            mfu=speed / peak if peak else None, tflops=speed / 1e12, data_wait_share=float(waited / stepped),
            skipped_steps=self.skipped, warnings=[*dict.fromkeys(self.told)],
            **{f'{kind}_seconds': t for kind, t in self.times.items()}, total_seconds=total,
            budget_seconds=clock.budget, peak_mem_gb=peak_memory_gb(self.device), **self.paid(),
            dollars=total / 3600 * s.dollars_per_hour or None,
            hardware=dict(device=self.device, name=hardware(self.device), ranks=self.world,
                          dtype=str(self.dtype)[6:]),
            versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
            protocol=sample.PROTOCOL, data=dict(folder=str(data.folder), fingerprint=data.meta['fingerprint'],
                                                val_bytes=data.meta['splits']['val']['bytes']),
            commit=git_commit(), ideas=[name for name, _, named in self.ideas.sources() if named],
            settings=vars(s), changed=self.changed, config=dataclasses.asdict(self.config), sample=text,
            finished=datetime.datetime.now().isoformat('T', 'seconds'))

    def paid(self):
        """Energy of all ranks, in all processes of this run."""
        joules = self.earlier + self.all_reduce(self.energy.read())
        return sample.energy_report(joules, self.energy.how, self.s.country)

    def keep_report(self, report):
        """Writes the log, the page and the result, in this order: a run that has a result is finished."""
        with contextlib.suppress(OSError), self.metrics:     # a log that fails has said so
            os.fsync(self.metrics.fileno())
        try:
            write_report(self.out_dir, report, self.page_blocks())
        except UserError as e:
            self.say(f'warning: {e}')
        write_beside(self.out_dir / 'result.json', lambda f: f.write(as_json(report, indent=1).encode()))

    def page_blocks(self):
        """What an idea adds to the run's page: blocks as write_page has them."""
        return []

    def say_report(self, report):
        """The closing report, `key: value`, one a line."""
        self.say('---')
        for key, value in report.items():
            if key in UNPRINTED:
                continue
            if isinstance(value, dict):
                value = ', '.join(f'{k} {v:.4f}' for k, v in value.items())
            elif isinstance(value, float):
                value = f'{value:.6g}' if math.isfinite(value) else 'not finite'
            self.say(f'{key}: {"not measured" if value is None else value}')
        for name, e in report['evals'].items():
            self.say(self.measure.line(name, e))
        e = report['energy']
        self.say('energy: ' + ', '.join(f'{k} {e[k]:.0f} J' for k in sample.ACTIVITIES) + '; '
                 + ', '.join(f'{k} {e[k]:.0f} J {e["how"][k]}' for k in sample.DEVICES)
                 + f'; {e["g_per_kwh"]:g} g of CO2e a kWh ({e["country"]}), without cooling and the making of it all')
        self.say(f'hardware: {report["hardware"]["name"]}, {report["hardware"]["dtype"]}')
        if report['sample']:
            self.say(f'sample:\n{report["sample"]}')

    def close(self, code):
        """Lets go of what holds the process, which is about to end with this code."""
        if dist.is_initialized() and code == 0:
            dist.destroy_process_group()


def begin(argv):
    """The Run that a command line asks for; None after --show."""
    s, ideas = read_settings(argv)
    if s.show:
        return print(prepare_data.shown(ideas))
    return ideas.seam(Run)(s, ideas)


def live(run):
    """From the machine taken to the report."""
    run.open()
    run.build()
    run.announce()
    run.warm_up()
    if run.s.dry_run:
        return run.say_plan()
    run.say_start()
    if run.resuming:
        run.evaluate_if_due()                    # what the checkpoint's step was followed by
    while run.time_left():
        run.step()
        if run.stopping:
            break
        run.roll_back_if_due()
        run.save_if_due()
        run.evaluate_if_due()
    run.finish()


def main(argv):
    if run := begin(argv):
        live(run)


def tell(run, error):
    """Says why a run ends, and returns the exit code of that; a mistake of ours goes on. What is so on every rank the
    first one says. torchrun, which makes 1 of every code, ends with what it finds in a file."""
    if told := memory_ran_out(error):
        error = UserError(f'the device ran out of memory ({told}): lower micro_batch_size, and go on with '
                          f'--init_from=resume where a checkpoint was saved')
    elif isinstance(error, RuntimeError) and run and run.world > 1 and re.search('gloo|nccl', str(error), re.I):
        return print(f'train.py, rank {run.rank}: another rank is gone, or gave no answer for {SILENCE} s', file=sys.stderr) or 1
    elif not isinstance(error, (UserError, OSError, Diverged, FloatingPointError, Stopped, KeyboardInterrupt)):
        raise error
    code = {Stopped: 75, Diverged: 3, FloatingPointError: 3, KeyboardInterrupt: 130}.get(type(error), 2)
    rank, file = os.environ.get('RANK', '0'), os.environ.get('TORCHELASTIC_ERROR_FILE')
    said = 'interrupted before the first step, nothing was left behind' if code == 130 else in_words(error)
    if rank == '0' or code == 2 and (run or not file):
        print(f'train.py{f", rank {rank}" * (rank != "0")}: {said}', file=sys.stderr)
    if file:
        told = dict(py_callstack=f'{said} (exit code {code})', timestamp=str(int(time.time())))
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(dict(message=dict(message=said, extraInfo=told))))
    return code


if __name__ == '__main__':
    code, run = 0, None
    print_without_fail()
    try:
        if {'-h', '--help'} & set(sys.argv):
            print(__doc__)
        elif run := begin(sys.argv[1:]):
            live(run)
    except BaseException as e:
        code = tell(run, e)
    if run:
        run.close(code)
    sys.stdout.flush()
    os._exit(code)              # all is closed; taking torch down takes seconds of a busy machine

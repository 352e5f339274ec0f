"""Train one small language model in a fixed time, and say honestly what that bought.

    python train.py config/quickstart.py                     five minutes on whatever is here, a sample at the end
    torchrun train.py config/babylm.py                       thirty minutes on one rented card
    torchrun --nproc_per_node=2 train.py config/babylm.py    the same on two
    python train.py config/babylm.py --dry_run=True          check everything, say what the budget will buy, stop

Settings come from the list below (and from GPTConfig in model.py), then from each config file named, left to right, then
from --key=value. Exit codes: 0 finished, 2 something to mend, 3 the training diverged, 75 stopped and saved (go on with
--init_from=resume).
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


# The bill starts when the command is typed: before Python's imports and, under torchrun, with torchrun itself (but when
# torchrun starts a worker again, what went before is in the checkpoint).
FIRST_OF_TORCHRUN = os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0'
STARTED = time.monotonic() - process_age(os.getppid() if FIRST_OF_TORCHRUN else 'self')

import ast
import dataclasses
import datetime
import difflib
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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

import prepare_data
import sample
from model import GPT, GPTConfig, implementations
from prepare_data import UserError

# ------------------------------------------------------------------------------------------------------------------
# settings


@dataclass
class Settings:
    """Every setting but the model's shape, which is GPTConfig's. Order: what to train on, how long, how, what to keep."""
    dataset: str = 'stories'          # a name that `python prepare_data.py --help` lists, or files:<path>
    tokenizer: str = 'bpe'            # 'bpe', 'bytes' or 'gpt2'
    vocab_size: int = 8192            # entries of a bpe tokenizer
    data_dir: str = 'data'            # where prepared data stands
    out_dir: str = ''                 # where the run goes; empty: out/<names of the configs>
    overwrite: bool = False           # replace the run that out_dir holds
    init_from: str = 'scratch'        # 'scratch', 'resume' (go on in out_dir), or a run's folder whose weights to start from
    seed: int = 1
    budget_minutes: float = 30.0      # the whole bill, from the command typed to the prompt back, over all resumptions
    budget_counts: str = 'all'        # 'all', or 'training': the seconds of training alone
    max_steps: int = 0                # > 0: end after so many steps, schedules driven by steps, reproducible to the bit
    max_tokens: int = 0               # > 0: the same, given in tokens
    device: str = 'auto'              # 'auto', 'cuda' or 'cpu'
    dtype: str = 'auto'               # 'auto' (bfloat16 where the hardware has it), 'bfloat16' or 'float32'
    compile: str = 'auto'             # 'auto' (on where it pays), 'on' or 'off'
    tokens_per_step: int = 65536      # over all ranks and micro-steps; a multiple of block_size
    micro_batch_size: int = 64        # sequences a rank reads at once, at most; lowered to what the device holds
    optimizer: str = 'muon'           # 'muon' (matrices; AdamW for the rest) or 'adamw' (for everything)
    learning_rate: float = 0.02       # Muon's, the spectral norm of one update; matrices under adamw: times 0.05
    embedding_lr: float = 0.2         # AdamW's for token tables that stand N(1)
    head_lr: float = 0.004            # AdamW's for the head (and a tied table) at n_embd 256; falls as 1 / n_embd
    scalar_lr: float = 0.02           # AdamW's for the few scalars
    weight_decay: float = 0.1         # of matrices, as a share of learning_rate, falling to 0 with progress
    momentum: float = 0.95            # Muon's
    beta1: float = 0.8                # AdamW's
    beta2: float = 0.95
    grad_clip: float = 1.0            # largest gradient norm; 0 is off
    warmup_frac: float = 0.02         # of progress, learning rates rise from a tenth
    cooldown_frac: float = 0.6        # of progress, learning rates fall linearly to final_lr_frac
    final_lr_frac: float = 0.0
    eval_interval: float = 0.25       # in progress: validation on a part of the closing evaluation's share; 0 is off
    log_interval: int = 10            # steps
    save_minutes: float = 5.0         # between checkpoints; 0 saves after every step
    sample_prompt: str = ''           # what the closing sample continues
    sample_tokens: int = 120          # its length; 0 prints none
    dollars_per_hour: float = 0.0     # the machine's price, for the report; 0 is unknown
    dry_run: bool = False             # check data, memory and disk, measure, predict, and stop


CHOICES = dict(budget_counts=('all', 'training'), device=('auto', 'cuda', 'cpu'), dtype=('auto', 'bfloat16', 'float32'),
               compile=('auto', 'on', 'off'), optimizer=('muon', 'adamw'), tokenizer=('bpe', 'bytes', 'gpt2'))
MODEL_KEYS = {f.name: f for f in dataclasses.fields(GPTConfig) if f.name not in ('vocab_size', 'bos')}
KEYS = {f.name: f for f in dataclasses.fields(Settings)} | MODEL_KEYS
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow, ast.USub: operator.neg}


def literal(node):
    """The value of a syntax tree of literals and arithmetic on numbers; ValueError for anything else."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = literal(node.left), literal(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > 64:
            raise ValueError
        return OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](literal(node.operand))
    return ast.literal_eval(node)


def assignments(argv):
    """Yield (where, name, value or an error's text) for each assignment of the config files and --key=value, in order."""
    for arg in argv:
        if arg.startswith('--'):
            name, eq, text = arg[2:].partition('=')
            if not eq:
                yield arg, None, f'an override is written --{name}=value'
                continue
            try:
                value = literal(ast.parse(text, mode='eval').body)
            except (ValueError, SyntaxError, TypeError, ZeroDivisionError):
                value = text                   # a bare word is a string
            yield arg, name, value
            continue
        try:
            tree = ast.parse(Path(arg).read_text(encoding='utf-8'))
        except OSError as e:
            yield arg, None, f'this config cannot be read ({e.strerror}); is the path right?'
            continue
        except (SyntaxError, UnicodeDecodeError) as e:
            yield f'{arg}:{getattr(e, "lineno", 1)}', None, 'this is not Python; a config is lines of name = value'
            continue
        for node in tree.body:
            where = f'{arg}:{node.lineno}'
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue                       # the docstring
            if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
                yield where, None, 'a config holds only lines of name = value'
                continue
            try:
                yield where, node.targets[0].id, literal(node.value)
            except (ValueError, TypeError, ZeroDivisionError):
                yield where, None, f'the value of {node.targets[0].id} must be a literal, or arithmetic on literals'


def read_settings(argv):
    """Settings from the command line's configs and overrides. UserError lists every mistake with its file and line."""
    values = {name: f.default for name, f in KEYS.items()}
    errors = []
    for where, name, value in assignments(argv):
        if name is None:
            errors.append(f'{where}: {value}')
            continue
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, 1)
            errors.append(f'{where}: no setting is called {name}' + (f'; did you mean {near[0]}?' if near else ''))
            continue
        kind = type(KEYS[name].default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            errors.append(f'{where}: {name} is {value!r}, it must be {kind.__name__}, like {KEYS[name].default!r}')
        elif name in CHOICES and value not in CHOICES[name]:
            errors.append(f'{where}: {name} is {value!r}, it must be one of {", ".join(CHOICES[name])}')
        elif kind is float and not math.isfinite(value):
            errors.append(f'{where}: {name} is {value!r}, it must be finite')
        elif kind in (int, float) and value < 0:
            errors.append(f'{where}: {name} is {value!r}, it must not be negative')
        else:
            values[name] = value
    for name in ('budget_minutes', 'tokens_per_step', 'micro_batch_size', 'log_interval'):
        if not values[name] > 0:
            errors.append(f'{name} is {values[name]}, it must be above 0')
    if errors:
        raise UserError('\n  '.join([f'{len(errors)} mistake{"s" * (len(errors) > 1)} in the settings:'] + errors))
    if not values['out_dir']:
        values['out_dir'] = 'out/' + ('+'.join(Path(a).stem for a in argv if not a.startswith('--')) or 'default')
    return SimpleNamespace(**values)


# ------------------------------------------------------------------------------------------------------------------
# data: batches as a pure function of (seed, step, rank)


class Stream:
    """The endless stream of training tokens: every document once an epoch, in an order that depends on (seed, epoch)."""

    def __init__(self, tokens, docs, seed):
        self.tokens, self.starts, self.seed = tokens, np.asarray(docs['start']), seed
        self.lengths = np.diff(np.append(self.starts, len(tokens)))
        self.epochs = {}

    def epoch(self, number):
        """Documents' first tokens in this epoch's order, and where each stands in the epoch's stream."""
        if number not in self.epochs:
            order = np.random.default_rng([self.seed, number]).permutation(len(self.starts))
            if len(self.epochs) > 1:
                del self.epochs[min(self.epochs)]
            self.epochs[number] = self.starts[order], np.concatenate([[0], np.cumsum(self.lengths[order])])
        return self.epochs[number]

    def read(self, first, count):
        """Tokens first .. first + count of the stream, int64."""
        number, first = divmod(first, len(self.tokens))
        starts, places = self.epoch(number)
        here = min(count, len(self.tokens) - first)
        position = np.arange(first, first + here)
        doc = np.searchsorted(places, position, side='right') - 1
        out = self.tokens[starts[doc] + position - places[doc]].astype(np.int64)
        return out if here == count else np.concatenate([out, self.read((number + 1) * len(self.tokens), count - here)])


class Prefetcher:
    """Makes the micro-batches of the coming steps in a thread; next(step) returns them and the seconds it had to wait."""

    def __init__(self, stream, step, rows_per_step, micro_batch_size, block_size, rank, world, device, depth=3):
        self.make = lambda s: [self.micro_batch(s * rows_per_step + (m * world + rank) * micro_batch_size)
                               for m in range(rows_per_step // (micro_batch_size * world))]
        self.stream, self.B, self.T, self.device = stream, micro_batch_size, block_size, device
        self.queue, self.stopping = queue.Queue(depth), False
        self.thread = threading.Thread(target=self.run, args=(step,), daemon=True)
        self.thread.start()

    def micro_batch(self, row):
        """idx, targets (B, T): the stream cut into rows of T, each row's last target the next row's first token."""
        buffer = torch.from_numpy(self.stream.read(row * self.T, self.B * self.T + 1))
        pair = buffer[:-1].view(self.B, self.T), buffer[1:].view(self.B, self.T)
        return tuple(t.pin_memory() for t in pair) if self.device == 'cuda' else pair

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


# ------------------------------------------------------------------------------------------------------------------
# optimizer

# Minimax polynomials a x + b x^3 + c x^5 that drive singular values in [0.004, 1] to 1 (Amsel 2025, 2505.16932)
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233002106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalize(x):
    """The nearest semi-orthogonal matrices to x (..., rows, cols), to about 5%: U V^T of its singular value decomposition."""
    wide = x.shape[-2] > x.shape[-1]
    x = x.mT if wide else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if wide else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every update of a matrix has all its singular values near 1 (Jordan 2024; 2502.16982).

    A gradient's few large directions would otherwise drown the rest, and the spectral norm of an update is what decides how
    much a layer's output moves; so the learning rate carries over from one width to another. Only for matrices that multiply
    activations: an embedding's rows are looked up one by one, and AdamW treats them so.
    All matrices of one shape are one group, their momentum one stacked tensor, orthogonalised in one batch.
    """

    def __init__(self, params, momentum, dtype):
        shapes = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        super().__init__([dict(params=ps) for ps in shapes.values()], dict(lr=0.0, weight_decay=0.0, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr, momentum = group['params'], group['lr'], group['momentum']
            grad = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if 'momentum' not in state:
                state['momentum'] = torch.zeros_like(grad)
            average = state['momentum'].lerp_(grad, 1 - momentum)
            update = orthogonalize(grad.lerp(average, momentum).to(self.dtype)).to(grad.dtype)   # Nesterov's look ahead
            rows, cols = grad.shape[-2:]
            update *= lr * max(1, rows / cols) ** 0.5        # unit change of the output for unit inputs, wide or tall
            torch._foreach_mul_(params, 1 - lr * group['weight_decay'])
            torch._foreach_sub_(params, list(update.unbind()))


def make_optimizers(model, s, dtype):
    """The optimizers of a model; every group carries 'base_lr' and 'base_decay', which the schedule multiplies."""
    matrices = [p for b in model.blocks for p in b.parameters() if p.ndim == 2 and p.shape[0] != model.config.vocab_size]
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.weight is not model.lm_head.weight]
    scalars = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=[model.lm_head.weight], base_lr=s.head_lr * 256 / model.config.n_embd),
              dict(params=tables, base_lr=s.embedding_lr), dict(params=scalars, base_lr=s.scalar_lr)]
    optimizers = []
    if s.optimizer == 'muon':
        optimizers.append(Muon(matrices, s.momentum, dtype))
        for group in optimizers[0].param_groups:
            group.update(base_lr=s.learning_rate, base_decay=s.weight_decay)
    else:
        groups.append(dict(params=matrices, base_lr=0.05 * s.learning_rate * 256 / model.config.n_embd,
                           base_decay=s.weight_decay))
    groups = [dict(base_decay=0.0) | g for g in groups if g['params']]
    optimizers.append(torch.optim.AdamW(groups, lr=0.0, betas=(s.beta1, s.beta2), eps=1e-10, weight_decay=0.0, fused=True))
    return optimizers


def schedule(progress, s):
    """Multiplier of every learning rate at progress in [0, 1]: a short rise, a level stretch, a linear fall."""
    rise = 0.1 + 0.9 * progress / s.warmup_frac if progress < s.warmup_frac else 1.0
    fall = (1 - progress) / s.cooldown_frac if progress > 1 - s.cooldown_frac else 1.0
    return rise * (s.final_lr_frac + (1 - s.final_lr_frac) * fall)


def set_rates(optimizers, progress, s):
    rate = schedule(progress, s)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = rate * group['base_lr']
            # both factors fall, so that late training neither moves far nor forgets
            group['weight_decay'] = group['base_decay'] * (1 - progress)
    return rate


# ------------------------------------------------------------------------------------------------------------------
# clock


class Clock:
    """What the run has cost in seconds, over all resumptions, and how far the schedules should be.

    spent: seconds that earlier processes of this run took. age(): seconds since this one was typed.
    reserve: seconds kept for what follows the last step: saving, the closing evaluation, the sample, leaving.
    """

    def __init__(self, s, spent=0.0, trained=0.0, progress=0.0, age=lambda: time.monotonic() - STARTED):
        self.budget, self.counts_all = 60 * s.budget_minutes, s.budget_counts == 'all'
        self.max_steps = s.max_steps or -(-s.max_tokens // s.tokens_per_step)
        self.spent, self.trained, self.progress, self.age, self.reserve = spent, trained, progress, age, 0.0

    def elapsed(self):
        return self.spent + self.age()

    def left(self):
        """Seconds of training that the budget still has room for."""
        return self.budget - self.elapsed() - self.reserve if self.counts_all else self.budget - self.trained

    def add_step(self, seconds, left_before, step):
        """Account for step number `step` (the first is 1). Driven by time, progress covers the distance to 1 in proportion
        to the time left: it reaches 1 with the budget's end, whatever was lost to evaluations or a restart."""
        self.trained += seconds
        if self.max_steps:
            self.progress = min(1.0, step / self.max_steps)
        else:
            self.progress += (1 - self.progress) * min(1.0, seconds / max(left_before, 1e-9))

    def fits(self, step, seconds):
        """Whether to train on, where the least that can be done takes so many seconds: runs end on time on average, and never
        5 seconds late."""
        if self.max_steps and step >= self.max_steps:
            return False
        return self.left() > max(0.5 * seconds, seconds - 5)


# ------------------------------------------------------------------------------------------------------------------
# checkpoints and reports


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
        raise UserError(f'{path} could not be written ({e}); free some space and go on with --init_from=resume') from e


def save_checkpoint(out_dir, state):
    path = Path(out_dir) / 'ckpt.pt'
    write_beside(path.with_name('ckpt.new.pt'), lambda f: torch.save(state, f))
    if path.exists():
        os.replace(path, path.with_name('ckpt.prev.pt'))
    os.replace(path.with_name('ckpt.new.pt'), path)


def read_rows(path):
    """The whole rows of a metrics.jsonl; none if there is no such file. A last line that was cut off is left out."""
    rows = []
    for line in (Path(path).read_text().splitlines() if Path(path).exists() else []):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


# Dense bf16 peak with fp32 accumulation, TFLOP/s, from the makers' data sheets; a card that is not here gets no MFU.
PEAK_TFLOPS = {'RTX 4090': 165.2, 'RTX 3090': 71.2, 'RTX 5090': 209.5, 'L40S': 362.1, 'L4': 121.0, 'A10G': 70.0,
               'A100': 311.9, 'H100 PCIe': 756.4, 'H100 NVL': 835.5, 'H100': 989.4, 'H200 NVL': 835.5, 'H200': 989.4}


def peak_flops(name):
    exact = (v for k, v in PEAK_TFLOPS.items() if re.search(rf'\b{k}\b(?! (Laptop|D\b))', name))   # a 4090 D is another card
    return next((1e12 * v for v in exact), None)


def hardware(device):
    """(name, number and kind) of what computes here."""
    if device == 'cuda':
        return torch.cuda.get_device_name()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f'{name}, {torch.get_num_threads()} threads'


def peak_memory_gb(device):
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2 ** 30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == 'darwin' else 2 ** 20)


def git_commit():
    here = Path(__file__).parent
    try:
        run = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=here, capture_output=True, text=True, timeout=5)
        return run.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


# ------------------------------------------------------------------------------------------------------------------
# what the hardware decides


def adapt(s, device, world):
    """dtype, whether to compile, the micro-batch, and a sentence about each that differs from what was asked."""
    said = []
    dtype = s.dtype
    if dtype == 'auto':
        if device == 'cuda':
            dtype = 'bfloat16' if torch.cuda.is_bf16_supported() else 'float32'
        else:                                   # without these instructions bf16 is emulated, and slower than fp32
            try:
                flags = Path('/proc/cpuinfo').read_text()
            except OSError:
                flags = ''
            dtype = 'bfloat16' if 'avx512_bf16' in flags or 'amx_bf16' in flags else 'float32'
    if s.tokens_per_step % (s.block_size * world):
        raise UserError(f'tokens_per_step is {s.tokens_per_step}, it must be a multiple of block_size {s.block_size} times '
                        f'{world} rank{"s" * (world > 1)}: try {-(-s.tokens_per_step // (s.block_size * world)) * s.block_size * world}')
    rows = s.tokens_per_step // (s.block_size * world)
    limit = s.micro_batch_size if device == 'cuda' else min(s.micro_batch_size, max(1, 8192 // s.block_size))
    micro = max(b for b in range(1, min(limit, rows) + 1) if rows % b == 0)
    if micro != s.micro_batch_size:
        said.append(f'micro_batch_size {micro} instead of {s.micro_batch_size}: '
                    + ('a CPU is fastest on some 8,192 tokens at a time' if limit < min(s.micro_batch_size, rows)
                       else f'a rank reads {rows} sequences a step'))
    compile = s.compile == 'on'
    if s.compile == 'auto':
        compile = device == 'cuda' or s.budget_minutes >= 5 and not s.max_steps
        if compile and device == 'cpu' and not (shutil.which('g++') or shutil.which('clang++')):
            compile = False
            said.append('torch.compile is off: no C++ compiler (g++) is installed')
        elif not compile:
            said.append('torch.compile is off: it takes half a minute of a CPU, more than so short a run gets back')
    return dtype, compile, micro, said


def check_room(s, config, micro, device, out_dir):
    """Refuse what cannot end well: a model or a checkpoint that memory or disk has no room for."""
    total = config.params()['total']
    # weights, gradients and two moments in fp32; activations at about 18 C a layer and token, and the block of logits
    tokens = micro * config.block_size
    need = 16 * total + tokens * (36 * config.n_layer * config.n_embd + 8 * config.n_embd) + 512 * config.vocab_size * 16
    have = torch.cuda.mem_get_info()[0] if device == 'cuda' else os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_AVPHYS_PAGES')
    if need > have:
        raise UserError(f'the model needs about {need / 2**30:.1f} GiB and {have / 2**30:.1f} are free: lower micro_batch_size '
                        f'(now {micro}), n_layer or n_embd')
    place = next(p for p in [out_dir.absolute(), *out_dir.absolute().parents] if p.exists())
    free, checkpoint = shutil.disk_usage(place).free, 12 * total
    if free < 3 * checkpoint + 2 ** 20:
        raise UserError(f'{place} has {free / 2**20:,.0f} MiB free, three checkpoints need {3 * checkpoint / 2**20:,.0f}: '
                        f'make room or choose another --out_dir')


def open_run(s, out_dir):
    """The checkpoint to go on from, or to take weights from, or None; refuses to write over an earlier run."""
    if s.init_from == 'resume':
        if (out_dir / 'result.json').exists() and not s.overwrite:
            raise UserError(f'{out_dir} holds a finished run, there is nothing to resume: choose another --out_dir')
        if not (out_dir / 'ckpt.pt').exists() and not (out_dir / 'ckpt.prev.pt').exists():
            raise UserError(f'{out_dir} has no ckpt.pt to resume from: leave --init_from away to start afresh')
        return sample.read_checkpoint(out_dir)
    if not (s.overwrite or s.dry_run):
        if (out_dir / 'result.json').exists():
            raise UserError(f'{out_dir} holds a finished run: choose another --out_dir, or say --overwrite=True')
        if (out_dir / 'ckpt.pt').exists():
            raise UserError(f'{out_dir} holds an unfinished run: go on with --init_from=resume, choose another --out_dir, or say '
                            f'--overwrite=True')
    return None if s.init_from == 'scratch' else sample.read_checkpoint(s.init_from)


def open_or_build(s, rank):
    """The data set that the settings name, built first if it is missing."""
    folder = prepare_data.data_folder(s.dataset, s.tokenizer, s.vocab_size, s.data_dir)
    if not (folder / 'meta.json').exists() and rank == 0:
        print(f'{folder} is missing: building it', flush=True)
        code = subprocess.run([sys.executable, prepare_data.__file__, s.dataset, '--tokenizer', s.tokenizer, '--vocab_size',
                               str(s.vocab_size), '--data_dir', s.data_dir]).returncode
        if code:
            raise UserError(f'{s.dataset} could not be prepared, see above')
    if dist.is_initialized():
        dist.barrier()
    return prepare_data.open_data(folder, s.dataset)


# ------------------------------------------------------------------------------------------------------------------
# the run


LEAVING = 0.6       # seconds from the last line printed to the prompt back
BAD_STEPS = 5       # steps in a row that are not finite before the run goes back to its last checkpoint
# settings that decide what a step computes: a run that goes on must not change them
STEP_KEYS = ('seed', 'tokens_per_step', 'max_steps', 'max_tokens', 'optimizer', 'learning_rate', 'embedding_lr', 'head_lr',
             'scalar_lr', 'weight_decay', 'momentum', 'beta1', 'beta2', 'grad_clip', 'warmup_frac', 'cooldown_frac', 'final_lr_frac')


class Stopped(Exception):
    """SIGTERM or SIGINT arrived; everything is saved."""


class Diverged(Exception):
    """Steps were not finite again and again, after going back to a checkpoint too."""


def train_step(step_model, model, optimizers, micro_batches, progress, s, world=1, flag=False):
    """One optimizer step at `progress` of the schedules: loss, gradient norm before clipping, learning-rate multiplier, and
    whether any rank raised its flag. A step whose loss or gradient is not finite leaves the weights as they are."""
    device = model.wte.weight.device
    loss = torch.zeros((), device=device)
    for idx, targets in micro_batches:
        idx, targets = idx.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        micro_loss = step_model(idx, targets) / len(micro_batches)
        micro_loss.backward()
        loss += micro_loss.detach()
    flag = average_over_ranks(model, loss, flag, world)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf, foreach=True)
    loss, norm = torch.stack([loss, norm]).tolist()   # the step's one wait for the device: skipping must be decided here
    rate = set_rates(optimizers, progress, s)
    if math.isfinite(loss) and math.isfinite(norm):
        for optimizer in optimizers:
            optimizer.step()
    for p in model.parameters():
        p.grad = None
    return loss, norm, rate, flag


def average_over_ranks(model, loss, flag, world):
    """Average gradients and loss over the ranks, in place, in one message; returns whether any rank raised its flag."""
    if world == 1:
        return flag
    grads = [p.grad for p in model.parameters()]
    message = torch.cat([g.flatten() for g in grads] + [torch.stack([loss, torch.full_like(loss, float(flag))])])
    dist.all_reduce(message)
    *parts, tail = message.split([g.numel() for g in grads] + [2])
    for g, part in zip(grads, parts):
        g.copy_(part.view_as(g)).div_(world)
    loss.copy_(tail[0]).div_(world)
    return bool(tail[1] > 0)


def main(argv):
    # ---- setup
    s = read_settings(argv)
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = s.device if s.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError("device is 'cuda', and torch finds none: leave it at 'auto', or install torch's CUDA build")
    master = rank == 0
    say = (lambda *a: print(*a, flush=True)) if master else (lambda *a: None)
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, frame: signals.append(n))
    out_dir = Path(s.out_dir)
    checkpoint = open_run(s, out_dir)
    if world > 1:
        if device == 'cuda':
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        dist.init_process_group('nccl' if device == 'cuda' else 'gloo', timeout=datetime.timedelta(hours=1))

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
    if train_tokens < s.tokens_per_step // 16 or train_tokens <= s.block_size:
        raise UserError(f'the training split of {data.folder} holds {train_tokens:,} tokens, less than one block of '
                        f'{s.block_size} or a sixteenth of a step of {s.tokens_per_step:,}: bring more text or lower them')
    pairs_file = data.folder / 'pairs.jsonl'
    pairs = [json.loads(line) for line in pairs_file.read_text().splitlines()] if pairs_file.exists() else []

    # ---- model
    try:
        config = GPTConfig(vocab_size=data.meta['vocab_size'], bos=data.meta['bos'], **{k: getattr(s, k) for k in MODEL_KEYS})
    except ValueError as e:
        raise UserError(f'the model cannot be built: {e}') from e
    dtype_name, compiling, micro, adapted = adapt(s, device, world)
    check_room(s, config, micro, device, out_dir)
    torch.manual_seed(s.seed)
    torch.set_float32_matmul_precision('high')
    model = GPT(config).to(device)
    model.compute_dtype = getattr(torch, dtype_name)
    optimizers = make_optimizers(model, s, model.compute_dtype)
    accum = s.tokens_per_step // (micro * s.block_size * world)

    # ---- resume
    step, skipped, tokens_before = 0, 0, 0
    fingerprint = data.meta['fingerprint']
    times = dict.fromkeys(('startup', 'compile', 'training', 'evaluation', 'saving'), 0.0)
    clock = Clock(s)
    if checkpoint is not None:
        theirs, ours = checkpoint['config'], dataclasses.asdict(config)
        differ = [f'{k} {theirs.get(k)} there, {ours[k]} here' for k in ours if theirs.get(k) != ours[k]]
        if differ:
            raise UserError(f'the checkpoint is of another model: {"; ".join(differ)}')
        if checkpoint['tokenizer'] != data.meta['tokenizer_sha256']:
            raise UserError(f'the checkpoint was trained with another vocabulary than {data.folder} has: name its data set')
        model.load_state_dict(checkpoint['model'])
    if s.init_from == 'resume':
        if checkpoint['fingerprint'] != fingerprint:
            raise UserError(f'{data.folder} is not the data that the run in {out_dir} began with: restore it, or start afresh')
        asked = {k: v for k, v in vars(s).items() if k in STEP_KEYS and checkpoint['settings'][k] != v}
        if asked:
            raise UserError('these settings belong to the run and cannot change when it goes on: ' + ', '.join(
                f'{k} (was {checkpoint["settings"][k]!r}, now {v!r})' for k, v in asked.items()))
        for optimizer, state in zip(optimizers, checkpoint['optimizers']):
            optimizer.load_state_dict(state)
        step, skipped, tokens_before = checkpoint['step'], checkpoint['skipped'], checkpoint['tokens']
        times |= checkpoint['times']
        # what a killed run did after its last checkpoint was paid for too
        spent = max([checkpoint['elapsed']] + [row['elapsed_s'] for row in read_rows(out_dir / 'metrics.jsonl')])
        clock = Clock(s, spent, checkpoint['times']['training'], checkpoint['progress'])
        torch.set_rng_state(checkpoint['rng'])

    name = hardware(device)
    peak = peak_flops(name) if device == 'cuda' and dtype_name == 'bfloat16' else None
    flops = config.flops_per_token()
    changed = {k: v for k, v in vars(s).items() if v != KEYS[k].default}
    say(f'halfhour: {s.dataset}, {s.budget_minutes:g} minutes on {name}' + (f', {world} ranks' if world > 1 else ''))
    say('settings that differ from the defaults: ' + ', '.join(f'{k}={v!r}' for k, v in changed.items()))
    for line in adapted:
        say(f'adapted: {line}')
    say(f'data: {data.folder}, {train_tokens:,} training tokens, {val_tokens:,} for validation')
    say(f'model: {config.describe()}')
    say(f'step: {s.tokens_per_step:,} tokens = {accum} micro-steps of {micro} x {s.block_size} on {world} rank(s), {dtype_name}, '
        f'torch.compile {"on" if compiling else "off"}, {s.optimizer}')
    for op, where in implementations(device).items():
        say(f'  {op}: {where}')

    if master and not s.dry_run:
        out_dir.mkdir(parents=True, exist_ok=True)
        if s.init_from != 'resume':
            for old in ('result.json', 'metrics.jsonl', 'ckpt.pt', 'ckpt.prev.pt'):
                (out_dir / old).unlink(missing_ok=True)
        known = ''.join(json.dumps(row) + '\n' for row in read_rows(out_dir / 'metrics.jsonl') if row['step'] <= step)
        write_beside(out_dir / 'metrics.jsonl', lambda f: f.write(known.encode()))
        shutil.copy(data.folder / data.tokenizer.filename, out_dir)
        metrics = open(out_dir / 'metrics.jsonl', 'a', buffering=1)

    def record(**row):
        if master and not s.dry_run:
            metrics.write(json.dumps(row) + '\n')

    def save():
        """Everything that the next batch needs, moved into place whole; the previous checkpoint is kept."""
        began = time.monotonic()
        if master and not s.dry_run:
            save_checkpoint(out_dir, dict(
                version=1, step=step, progress=clock.progress, elapsed=clock.elapsed(), skipped=skipped, times=dict(times),
                tokens=tokens_before + sum(n for _, _, n in history),
                model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], rng=torch.get_rng_state(),
                config=dataclasses.asdict(config), settings=vars(s), fingerprint=fingerprint,
                tokenizer=data.meta['tokenizer_sha256'], data=str(data.folder)))
        times['saving'] += time.monotonic() - began
        return time.monotonic() - began

    def evaluate(slices, stop=lambda: False):
        began = time.monotonic()
        model.eval()
        result = sample.bits_per_byte(model, data.tokens['val'], data.docs['val'], slices, stop=stop, rank=rank, world=world,
                                      reduce=all_reduce, group=max(1, slices // 16))
        model.train()
        result['seconds'] = time.monotonic() - began
        result['per_source'] = {data.meta['sources'][i]: v for i, v in result['per_source'].items()}
        times['evaluation'] += result['seconds']
        return result

    # ---- warm up: compile, and learn what the closing evaluation will cost
    step_model = torch.compile(model, dynamic=False) if compiling else model
    times['startup'] += clock.age()
    began = time.monotonic()
    batches = Prefetcher(Stream(data.tokens['train'], data.docs['train'], s.seed), step, s.tokens_per_step // s.block_size, micro,
                         s.block_size, rank, world, device)
    idx = torch.full((micro, s.block_size), config.bos, device=device)
    step_model(idx, idx.clone()).backward()    # a clone: one tensor twice would compile another program
    for p in model.parameters():
        p.grad = None
    times['compile'] += time.monotonic() - began
    slices = sample.SLICES
    slice_seconds = agreed(min(evaluate(1)['seconds'] for _ in range(3)))    # the first is slowed by setting things up
    if slice_seconds * slices > 0.1 * clock.budget and s.budget_counts == 'all':
        slices = 2 ** max(0, int(math.log2(0.1 * clock.budget / slice_seconds)))
    pair_seconds, n_pairs = 0.0, len(pairs)
    if pairs:
        sample.pair_accuracy(model, data.tokenizer, pairs[:32])
        began = time.monotonic()
        sample.pair_accuracy(model, data.tokenizer, pairs[:64])
        pair_seconds = agreed((time.monotonic() - began) / 64)
        if pair_seconds * n_pairs > 0.05 * clock.budget:
            n_pairs = int(0.05 * clock.budget / pair_seconds)
    write_sample(model, data.tokenizer, s, tokens=2)
    began = time.monotonic()
    write_sample(model, data.tokenizer, s, tokens=12)
    token_seconds = (time.monotonic() - began) / 12
    save_seconds = 0.5 + 12 * config.params()['total'] / 2 ** 30

    def closing_seconds():
        return slice_seconds * slices + pair_seconds * n_pairs + token_seconds * s.sample_tokens + save_seconds + LEAVING

    # ---- loop
    if s.dry_run:
        s.max_steps, clock.max_steps = 3, 3
    schedule_text = f'{clock.max_steps} steps' if clock.max_steps else f'until the clock says {s.budget_minutes:g} minutes'
    say(f'training {schedule_text}; closing evaluation {"whole" if slices == sample.SLICES else f"{slices}/{sample.SLICES} of it"}, '
        f'about {closing_seconds():.0f} s')
    say('    step  progress      loss        lr   grad_norm     tok/s       mfu  wait_ms  mem_gb  elapsed_s')
    step_seconds, bad_steps, rolled_back, stopping = 0.0, 0, False, False
    last_save, next_eval = clock.elapsed(), s.eval_interval
    while next_eval and next_eval <= clock.progress:
        next_eval += s.eval_interval
    first_step, history = step, []
    while True:
        # time left?
        clock.reserve = closing_seconds()
        # the first rank's clock decides: ranks that stopped at different steps would wait for each other for ever
        decision = [clock.fits(step, step_seconds / accum), clock.progress, clock.left(), step_seconds]
        go, clock.progress, left, step_seconds = all_reduce(np.array(decision) * master).tolist()
        if not go:
            break
        began = time.monotonic()
        micro_batches, wait = batches.next(step)
        # a last step that the clock has no room for is made of fewer micro-steps
        n_micro = accum
        if not clock.max_steps and step > first_step and left < step_seconds:
            n_micro = min(accum, max(1, round(accum * left / step_seconds)))
        loss, grad_norm, rate, stopping = train_step(step_model, model, optimizers, micro_batches[:n_micro], clock.progress, s, world,
                                                     bool(signals))
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        skipped, bad_steps = skipped + (not finite), 0 if finite else bad_steps + 1
        step += 1
        progress = clock.progress
        if device == 'cuda':
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
        step_seconds = seconds if step_seconds == 0 else 0.8 * step_seconds + 0.2 * seconds * accum / n_micro
        clock.add_step(seconds, left, step)
        times['training'] += seconds
        history.append((wait, seconds, n_micro * s.tokens_per_step // accum))

        # log
        speed = n_micro / accum * s.tokens_per_step / seconds
        mfu = speed * flops / (peak * world) if peak else None
        row = dict(step=step, progress=progress, train_loss=loss, lr=rate, grad_norm=grad_norm, tok_per_sec=speed, mfu=mfu,
                   data_wait_s=wait, peak_mem_gb=peak_memory_gb(device), elapsed_s=clock.elapsed(), skipped=skipped)
        record(**row)
        if step % s.log_interval == 0 or step == first_step + 1 or not finite:
            say(f'{step:8d} {progress:9.4f} {row["train_loss"]:9.4f} {rate:9.4f} {grad_norm:11.4f} {speed:9,.0f} '
                f'{f"{mfu:9.3f}" if mfu else "        -"} {1000 * wait:8.2f} {row["peak_mem_gb"]:7.2f} {clock.elapsed():10.1f}')

        # not finite, again and again: back to the last checkpoint, once
        if bad_steps >= BAD_STEPS:
            if rolled_back or step == bad_steps or s.dry_run or not (out_dir / 'ckpt.pt').exists():
                raise Diverged(f'{bad_steps} steps in a row were not finite' + (', again after going back' if rolled_back else '')
                               + f': lower learning_rate (now {s.learning_rate:g}), or dtype=float32')
            if world > 1:
                dist.barrier()
            good = sample.read_checkpoint(out_dir)
            model.load_state_dict(good['model'])
            for optimizer, state in zip(optimizers, good['optimizers']):
                optimizer.load_state_dict(state)
            rolled_back, bad_steps = True, 0
            say(f'{BAD_STEPS} steps in a row were not finite: weights and optimizer of step {good["step"]} again, on new batches')

        # save if due, before evaluating
        due = clock.elapsed() - last_save >= 60 * s.save_minutes
        if stopping:
            break
        if due and bad_steps == 0:
            try:
                save_seconds = max(0.5, save())
            except UserError as e:              # the run is worth more than this checkpoint; the earlier one is whole
                say(f'warning: {e}')
            last_save = clock.elapsed()

        # evaluate if due
        if next_eval and next_eval <= progress < 0.95 and not s.dry_run:
            result = evaluate(max(1, slices // 8))
            slice_seconds = agreed(result['seconds']) / max(1, slices // 8)
            say(f'         validation on {result["share"]:.1%}: {result["bpb"]:.4f} bits per byte, standard error {result["error"]:.4f}')
            record(step=step, progress=progress, val_bpb=result['bpb'], val_loss=result['loss'], share=result['share'],
                   elapsed_s=clock.elapsed())
            while next_eval <= progress:
                next_eval += s.eval_interval

    # ---- report
    batches.close()
    if not s.dry_run:
        save_seconds = save()
    if stopping:
        raise Stopped(f'stopped by a signal after step {step}; {out_dir} is saved, go on with --init_from=resume')
    if s.dry_run:
        return say_plan(s, clock, data, config, step_seconds, closing_seconds(), say)
    deadline = clock.budget + min(0.01 * clock.budget, 5.0) - token_seconds * s.sample_tokens - pair_seconds * n_pairs - LEAVING

    def out_of_time():
        late = s.budget_counts == 'all' and clock.elapsed() + slice_seconds * max(1, slices // 16) > deadline
        return bool(agreed(late or bool(signals)))

    result = evaluate(slices, stop=out_of_time)
    record(step=step, progress=clock.progress, val_bpb=result['bpb'], val_loss=result['loss'], share=result['share'],
           elapsed_s=clock.elapsed())
    began, evals = time.monotonic(), {}
    if pairs and n_pairs and master:
        evals['coherence'] = sample.pair_accuracy(model, data.tokenizer, pairs[:n_pairs])
    text = write_sample(model, data.tokenizer, s, s.sample_tokens) if master and s.sample_tokens else None
    times['evaluation'] += time.monotonic() - began
    if signals:
        raise Stopped(f'stopped by a signal during the closing evaluation; {out_dir} is saved, go on with --init_from=resume')
    tokens = tokens_before + sum(n for _, _, n in history)
    trained = max(times['training'], 1e-9)
    total = clock.elapsed() + LEAVING
    mean_wait = sum(w for w, _, _ in history[1:]) / max(1e-9, sum(t for _, t, _ in history[1:]))
    report = dict(
        val_bpb=result['bpb'], val_bpb_error=result['error'], val_share=result['share'], val_loss=result['loss'],
        val_bpb_per_source=result['per_source'], evals=evals, steps=step, tokens=tokens, epochs=tokens / train_tokens,
        total_params=config.params()['total'], non_embedding_params=config.params()['non_embedding'],
        embedding_params=config.params()['embedding'], active_params=config.params()['total'],
        flops=tokens * flops, flops_per_token=flops, tok_per_sec=tokens / trained,
        mfu=tokens * flops / trained / (peak * world) if peak else None, tflops=tokens * flops / trained / 1e12,
        data_wait_share=mean_wait, skipped_steps=skipped, startup_seconds=times['startup'], compile_seconds=times['compile'],
        train_seconds=times['training'], eval_seconds=times['evaluation'], save_seconds=times['saving'], total_seconds=total,
        budget_seconds=clock.budget, peak_mem_gb=peak_memory_gb(device), joules=None, co2_g=None,
        dollars=total / 3600 * s.dollars_per_hour or None, hardware=dict(device=device, name=name, ranks=world, dtype=dtype_name),
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
        protocol=sample.PROTOCOL, data=dict(folder=str(data.folder), fingerprint=fingerprint), commit=git_commit(),
        settings=vars(s), config=dataclasses.asdict(config), sample=text, finished=datetime.datetime.now().isoformat('T', 'seconds'))
    if master:
        metrics.close()
        write_beside(out_dir / 'result.json', lambda f: f.write(json.dumps(report, indent=1).encode()))
    say_report(report, say)


def write_sample(model, tokenizer, s, tokens):
    """A continuation of sample_prompt, at temperature 0.8, up to the end of the document."""
    generator = torch.Generator(device=model.wte.weight.device).manual_seed(s.seed)
    return ''.join(sample.stream(model, tokenizer, s.sample_prompt, tokens, temperature=0.8, generator=generator))


def say_plan(s, clock, data, config, step_seconds, closing, say):
    """What --dry_run found out: how many tokens and epochs the budget buys, and what it costs."""
    seconds = clock.budget - (closing + clock.age() - clock.trained if s.budget_counts == 'all' else 0)
    tokens = max(0, int(seconds / step_seconds)) * s.tokens_per_step
    price = f'{clock.budget / 3600 * s.dollars_per_hour:.2f} dollars' if s.dollars_per_hour else 'unknown, set dollars_per_hour'
    say(f'---\ndry_run: data, vocabulary, memory and disk are fine\nstep_seconds: {step_seconds:.3f}\n'
        f'closing_seconds: {closing:.1f}\ntokens: {tokens:,}\nepochs: {tokens / len(data.tokens["train"]):.2f}\n'
        f'flops: {tokens * config.flops_per_token():.3g}\ndollars: {price}')


def say_report(report, say):
    """The closing report, `key: value`, one a line."""
    say('---')
    for key, value in report.items():
        if key in ('settings', 'config', 'hardware', 'versions', 'data', 'sample'):
            continue
        if key == 'evals':
            for name, e in value.items():
                say(f'{name}: {e["accuracy"]:.4f} +- {e["error"]:.4f} on {e["pairs"]} pairs, chance 0.5 ('
                    + ', '.join(f'{k} {v:.3f}' for k, v in e['per_kind'].items()) + ')')
        elif isinstance(value, dict):
            say(f'{key}: ' + ', '.join(f'{k} {v:.4f}' for k, v in value.items()))
        elif isinstance(value, float):
            say(f'{key}: {value:.6g}')
        elif value is not None:
            say(f'{key}: {value:,}' if isinstance(value, int) else f'{key}: {value}')
        else:
            say(f'{key}: not measured')
    say(f'hardware: {report["hardware"]["name"]}, {report["hardware"]["dtype"]}')
    if report['sample']:
        say(f'sample:\n{report["sample"]}')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
        code = 0
    except UserError as e:
        print(f'train.py: {e}', file=sys.stderr)
        code = 2
    except Diverged as e:
        print(f'train.py: {e}', file=sys.stderr)
        code = 3
    except Stopped as e:
        print(f'train.py: {e}', file=sys.stderr)
        code = 75
    if dist.is_initialized() and code == 0:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.exit(code)

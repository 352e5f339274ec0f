"""A card where there is none, for tests: 'cuda' is the CPU, torch.cuda answers as with an RTX 4090, kernels are interpreted, and
what makes the host wait for its device is counted. What of torch.cuda is not here raises, as it does without a card."""
import ast
import contextlib
import ctypes
import re
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import model as m
from conftest import ROOT
from test_sample import Nvml

WAITS = {getattr(torch.Tensor, name): name for name in (
    'item tolist cpu numpy nonzero equal masked_select unique bincount __bool__ __float__ __int__ __index__ __contains__').split()}
WAITS |= {getattr(torch, name): name for name in 'equal nonzero unique bincount masked_select repeat_interleave'.split()}
SAYS = {torch.Tensor.is_cuda.__get__: True, torch.Tensor.device.__get__: torch.device('cuda', 0)}
INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


def is_cuda(x):
    return isinstance(x, (str, torch.device)) and str(x).split(':')[0] == 'cuda'


def asker():
    """The function of this repository, not of its tests, that is being computed; '' if there is none."""
    frame = sys._getframe(2)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.parent in (ROOT, ROOT / 'config'):
            return f'{path.name}:{frame.f_code.co_name}'
        frame = frame.f_back
    return ''


class Card(TorchFunctionMode):
    """Within it, in this thread, every tensor says that it is on the card.

    waits: {(what, file:function): how often} the host waits for its device; launches: {kernel: how often}; asked: {name of
    torch.cuda, or nvml: how often}; compiled: options of torch.compile; pinned: how many tensors; answers: {function: another}.
    """

    def __init__(self, capability=(8, 9), free=24 * 2 ** 30, bf16=True, nvml=True):
        super().__init__()
        self.waits, self.launches, self.asked, self.compiled, self.pinned, self.answers = Counter(), Counter(), Counter(), [], 0, {}
        self.bf16, self.free, self.capability, self.nvml = bf16, free, capability, nvml
        self.properties = SimpleNamespace(
            name='NVIDIA GeForce RTX 4090', uuid='11-22', total_memory=free, multi_processor_count=128, major=capability[0],
            minor=capability[1], shared_memory_per_block_optin=101376, L2_cache_size=72 * 2 ** 20)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in SAYS and not re.search(r'/torch/_\w+/', sys._getframe(1).f_code.co_filename):     # fake tensors know themselves
            return SAYS[function]
        if function is torch.device:                        # a name: nothing is made there
            return function(*args, **kwargs)
        keys = (args[1] if isinstance(args[1], tuple) else args[1:2]) if function in INDEXING else ()
        by_bools = any(isinstance(key, torch.Tensor) and key.dtype == torch.bool for key in keys)
        asked_by = Path(sys._getframe(1).f_code.co_filename)
        away = function == torch.Tensor.to and 'cpu' in map(str, [*args[1:2], kwargs.get('device')]) and ROOT in asked_by.parents
        if function in WAITS or by_bools or away:
            self.waits[WAITS.get(function, 'index' if by_bools else 'to'), asker()] += 1
        function = self.answers.get(function, function)
        here = lambda x: 'cpu' if is_cuda(x) else x
        return function(*map(here, args), **{k: here(x) for k, x in kwargs.items()})

    def cuda(self):
        """What stands in the place of functions of torch.cuda."""
        later = lambda event: 1.0
        event = lambda **k: SimpleNamespace(record=lambda *a: None, synchronize=self.synchronize, elapsed_time=later)
        stream = lambda *a: SimpleNamespace(wait_stream=lambda other: None, synchronize=self.synchronize)
        graph = lambda: SimpleNamespace(replay=lambda: None)
        return dict(
            is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, set_device=lambda device: None,
            synchronize=self.synchronize, mem_get_info=lambda *a: (self.free, self.free), get_device_name=lambda *a: self.properties.name,
            get_device_properties=lambda *a: self.properties, get_device_capability=lambda *a: self.capability,
            is_bf16_supported=lambda **k: self.bf16, memory_allocated=lambda *a: 2 ** 20, max_memory_allocated=lambda *a: 2 ** 30,
            reset_peak_memory_stats=lambda *a: None, empty_cache=lambda: None, Event=event, manual_seed_all=lambda seed: None,
            get_rng_state=lambda *a: torch.get_rng_state(), set_rng_state=lambda *a: None, Stream=stream, current_stream=stream,
            stream=lambda s: contextlib.nullcontext(), CUDAGraph=graph, graph=lambda g, capture_error_mode: contextlib.nullcontext(),
            is_current_stream_capturing=lambda: False)

    def synchronize(self, *a):
        self.waits['synchronize', asker()] += 1

    def pin(self, x):
        self.pinned += 1
        return x

    def launch(self, kernel, grid, *args, **options):
        """The kernel in Triton's interpreter, which gets bf16 wrong: on copies of all memory in fp32, which then is written back.
        Fake tensors are only counted."""
        self.launches[kernel.fn.__name__] += 1
        if any(isinstance(x, m.FakeTensor) for x in args):
            return
        copies = {}

        def copy(x):
            if not isinstance(x, torch.Tensor) or x.dtype not in (torch.bfloat16, torch.float16):
                return x
            whole = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
            _, wide = copies.setdefault(x.untyped_storage().data_ptr(), (whole, whole.float()))
            return wide.as_strided(x.shape, x.stride(), x.storage_offset())
        with torch._C.DisableTorchFunction():
            kernel[grid](*map(copy, args), **options)
            for whole, wide in copies.values():
                with torch.autograd._unsafe_preserve_version_counter(whole):     # most of it the kernel only read
                    whole.copy_(wide)


@contextlib.contextmanager
def standing_in(monkeypatch, **options):
    """A Card in use: torch.cuda, torch.compile and the driver's library as they are with one, every kernel faster than PyTorch."""
    card, load = Card(**options), ctypes.CDLL

    def counted(name, function):
        def call(*args, **more):
            card.asked[name] += 1
            return function(*args, **more)
        return call

    def compile(function=None, **options):
        card.compiled.append(options)
        return function

    def library(name, *args, **more):
        if name != 'libnvidia-ml.so.1':
            return load(name, *args, **more)
        card.asked['nvml'] += 1
        if not card.nvml:
            raise OSError('no such library')
        return Nvml(lambda: 1.0)

    class Generator(torch.Generator):
        def __new__(cls, device='cpu'):
            return super().__new__(cls, 'cpu')

    with monkeypatch.context() as patch:
        for name, function in card.cuda().items():
            patch.setattr(torch.cuda, name, counted(name, function))
        patch.setattr(torch, 'compile', compile)
        patch.setattr(torch, 'Generator', Generator)
        patch.setattr(torch.Tensor, 'pin_memory', lambda x: card.pin(x))
        patch.setattr(ctypes, 'CDLL', library)
        patch.setattr(m, 'launch', card.launch)
        patch.setattr(m, 'IN_USE', set())
        patch.setattr(m, 'missing_compiler', lambda: '')
        patch.setattr(m.Probe, 'seconds', lambda probe: 1 / (1 + len(m.IN_USE)))
        with card:
            yield card


class Ops(TorchDispatchMode):
    """Counts in `counts` the operations, by name, that would start kernels of torch: not those of shapes and views alone."""
    FREE = re.compile(r'(empty|detach|alias|lift|sym_|_reinterpret|_unsafe_view|is_same|set_\b|resize|device|_record)')

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == 'halfhour':                # what is in it, not it
            with self:
                return OPDEFS[function.name().partition('.')[0]]._init_fn(*args, **kwargs)
        if not (function.is_view or self.FREE.search(function.__name__)):
            self.counts[function.__name__.partition('.')[0]] += 1
        return function(*args, **kwargs)


# ---- which branches of the scripts ask for a card, and which of them ran

SCRIPTS = [ROOT / f'{name}.py' for name in ('train', 'model', 'sample', 'bench_mfu')] + sorted((ROOT / 'config').glob('[!_]*.py'))
ASKS = re.compile(r"'cuda'|is_cuda|torch\.cuda\.|on_gpu")


class Branch(NamedTuple):
    """What is computed only on a card: from `first` to `last`, (line, column) each, where `asked` is so."""
    path: Path
    asked: str
    first: tuple
    last: tuple


def branches(path):
    """The branches of a file whose conditions, of `if`, `x if y else z` or `y and x`, ask for a card."""
    tree = ast.parse(path.read_text())
    bodies = [getattr(node, part) for node in ast.walk(tree) for part in ('body', 'orelse') if isinstance(getattr(node, part, 0), list)]
    after = {id(a): [b] for body in bodies for a, b in zip(body, body[1:])}
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp)):
            asked, yes, no = node.test, node.body, node.orelse or after.get(id(node))
        elif isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
            asked, yes, no = node.values[0], node.values[1:], None
        else:
            continue
        text = ast.unparse(asked)
        side = no if "!= 'cuda'" in text else yes
        side = side if isinstance(side, list) else [side]
        if ASKS.search(text) and side[0]:
            yield Branch(path, text, (side[0].lineno, side[0].col_offset), (side[-1].end_lineno, side[-1].end_col_offset))


@contextlib.contextmanager
def walked(known):
    """Within it, in all threads, instructions are watched; gives the set of the branches of which one has run."""
    of_file, watched, places, seen = {}, {}, {}, set()
    for branch in known:
        of_file.setdefault(str(branch.path), []).append(branch)

    def branches_in(code):
        if code not in watched:
            places[code] = [*code.co_positions()]
            lines = {place[0] for place in places[code] if place[0]}
            watched[code] = [b for b in of_file[code.co_filename] if lines & {*range(b.first[0], b.last[0] + 1)}]
        return watched[code]

    def enter(frame, event, arg):
        code = frame.f_code
        if code.co_filename in of_file and branches_in(code):
            frame.f_trace_lines, frame.f_trace_opcodes = False, True
            return within

    def within(frame, event, arg):
        if event == 'opcode':
            line, _, column, _ = places[frame.f_code][frame.f_lasti // 2]
            if line and column is not None:
                seen.update(b for b in watched[frame.f_code] if b.first <= (line, column) < b.last)
        return within
    before = sys.gettrace()
    threading.settrace(enter)
    sys.settrace(enter)
    try:
        yield seen
    finally:
        sys.settrace(before)
        threading.settrace(None)

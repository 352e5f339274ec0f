"""Measure the machine: what a training step costs here, where the time goes, and what other code would take.

    python bench_mfu.py config/babylm.py                            all that follows, for the card it finds
    python bench_mfu.py config/babylm.py --only=steps               step time, MFU, memory
    python bench_mfu.py config/babylm.py --only=kernels             every kernel beside its rivals
    python bench_mfu.py config/babylm.py --beside=config/a.py       and the steps of a stack with other files
    python bench_mfu.py config/babylm.py --shapes=11M,34M,97M       the same for models of these sizes
    python bench_mfu.py config/babylm.py --micro_batches=32,64,128  which micro-batch is best
    python bench_mfu.py config/babylm.py --kernels=compile-only     build them all without a GPU, check limits
    python bench_mfu.py --compare config/babylm.py config/a.py      whole runs: ideas beside their base
    python bench_mfu.py --leaderboard out                           a table and a page of all finished runs

Configs and overrides are train.py's, and so is the step that is measured, half way through a run. All
contestants run in one process and take turns, so that a machine that drifts drifts for all.
--beside=a.py,b.py+c.py brings further ones, each stacked on the configs; an override may be part of a stack,
b.py+--dtype=float32.

MFU is the share of the card's data-sheet peak that model FLOPs make up: with the positions really attended
to, and, as `mfu palm`, as Chowdhery 2022 (2204.02311) counts them, all T for every token. A card that is not
in sample.py's table gets none. `of gemm` is the share of matrix products measured here, of this model's
shapes.

--compare starts train.py for the base, the first config, and for each other config stacked on it, in turn, at
the same budget on the same data: --seeds=3 of the base, --idea_seeds=1 of each idea. a.py+b.py is one stack,
--key=value is for all, --compare_dir (out/compare/<base>) keeps runs and table. The same command again skips
what is finished, goes on with what was stopped and tries again what failed.

--leaderboard reads every result.json under a folder (out), and leaves leaderboard.md and leaderboard.html in
it:
--sort=total_params, or what else a result.json names, a - before it for high to low;
--where "n_layer == 4 and total_params < 12e6".
"""
import ast
import difflib
import itertools
import json
import math
import operator
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F

import model as m
import prepare_data
import sample
import train
from config import (NO_LITERAL, UserError, at_home, docs, fits, in_words, literal, name_of, print_without_fail,
                    refuse, verb, verbs)

sys.modules.setdefault('bench_mfu', sys.modules[__name__])


@dataclass
class Options:
    """This script's own settings, beside those of train.py."""
    only: str = ''              # |steps|kernels: measure this alone
    rounds: int = 12            # 1..: how often every contestant has its turn
    shapes: str = ''            # of SHAPES below, commas between, in the place of the config's
    micro_batches: str = ''     # sequences, commas between: find the best of these sizes
    beside: str = ''            # configs, or stacks of them, commas between, whose steps are measured too
    json: str = ''              # a file for all that was measured
    compare: bool = False       # make whole runs: a base, and ideas stacked on it
    seeds: int = 3              # 1..: runs of the base, or of each point of a grid
    idea_seeds: int = 1         # 1..: runs of each idea
    compare_dir: str = ''       # where these runs go
    jobs: int = 1               # 1..: runs at a time, each with its part of the cores
    leaderboard: bool = False   # rank all finished runs of a folder
    sort: str = 'val_bpb'       # by what the leaderboard is sorted
    where: str = ''             # which runs are in it
    compile_for: int = 0        # the architecture that compile-only builds for, in a process of its own


TABLES = [*train.TABLES, Options]
# tied models of 12.5, 33.6 and 97.5 million parameters, whatever the config says
SHAPES = {'11M': dict(n_layer=8, n_embd=320, n_head=5, block_size=512, vocab_size=8192),
          '34M': dict(n_layer=8, n_embd=512, n_head=8, block_size=512, vocab_size=16384),
          '97M': dict(n_layer=12, n_embd=768, n_head=12, block_size=1024, vocab_size=16384)}


def own_options(argv):
    """This script's options, with those of a verb that is asked for, config/bench_<verb>.py, and own.given; what is
    left for train.py's; all of argv, where --where TEXT is one word; and the modules of the verbs."""
    typed = dict(arg[2:].partition('=')[::2] for arg in argv if arg.startswith('--'))
    files = [str(path) for name, path in verbs('bench').items() if typed.get(name, 'False') != 'False']
    known, words = prepare_data.Ideas(files, [Options]).known, iter(argv)
    texts = {f'--{name}' for name, setting in known.items() if setting.kind is str}
    words = [f'{word}={next(words, "")}' if word in texts else word for word in words]
    mine = [word for word in words if word.startswith('--') and word[2:].partition('=')[0] in known]
    ideas = prepare_data.Ideas([*files, *mine], [Options])
    own = SimpleNamespace(**ideas.values, given=ideas.set_at)
    return own, [word for word in words if word not in mine], words, ideas.modules


# ---- clocks ------------------------------------------------------------------------------------------------

def wait_for(device):
    if device == 'cuda':
        torch.cuda.synchronize()


def first_line(error):
    return f'{type(error).__name__}: {(str(error).strip() or "no more is said").splitlines()[0][:70]}'


def seconds_each(works, device, rounds, least=0.005):
    """Seconds of every work {name: function}, a list of one a round, in turn; and {name: why} of what failed.

    Every work is called often enough in a round to take `least` seconds, and first of all once, unmeasured.
    """
    times, faults, repeats = {name: [] for name in works}, {}, {}
    for name, work in works.items():
        try:
            work()
            wait_for(device)
            began = time.perf_counter()
            work()
            wait_for(device)
            repeats[name] = max(1, math.ceil(least / max(time.perf_counter() - began, 1e-9)))
        except Exception as e:                  # a rival may lack anything here: the table says what
            faults[name] = first_line(e)
    for _ in range(rounds):
        for name in repeats:
            began = time.perf_counter()
            for _ in range(repeats[name]):
                works[name]()
            wait_for(device)
            times[name].append((time.perf_counter() - began) / repeats[name])
    return {name: times[name] for name in repeats}, faults


def products(config, tokens, device, dtype):
    """The MLP's products, (tokens, C) x (C, 4C) and back, and their FLOPs."""
    a = torch.randn(tokens, config.n_embd, device=device, dtype=dtype)
    b = torch.randn(config.n_embd, config.mlp_hidden, device=device, dtype=dtype)
    return lambda: (a @ b) @ b.t(), 4 * tokens * config.n_embd * config.mlp_hidden


def memory_of(work, device):
    """Bytes that work takes beside what there is, on a GPU, and what it returns."""
    if device != 'cuda':
        return None, work()
    torch.cuda.reset_peak_memory_stats()
    before, result = torch.cuda.memory_allocated(), work()
    return torch.cuda.max_memory_allocated() - before, result


def machine(config, tokens, device, dtype):
    """Rates of this machine: matrix products of the model's shapes, FLOP/s, and copying, bytes/s."""
    C, H, D = config.n_embd, config.n_head, config.head_dim
    shapes = {'qkv': (C, (H + 2 * config.n_kv_head) * D), 'attention out': (H * D, C),
              'MLP up': (C, config.mlp_hidden * (2 if config.mlp == 'swiglu' else 1)),
              'MLP down': (config.mlp_hidden, C), 'head': (C, config.vocab_size)}
    rows = tokens if device == 'cuda' else min(tokens, 8192)
    a = {n: (torch.randn(rows, k, device=device, dtype=dtype), torch.randn(k, o, device=device, dtype=dtype))
         for n, (k, o) in shapes.items()}
    source = torch.empty(2 ** 28 if device == 'cuda' else 2 ** 26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    works = {n: lambda x=x, w=w: x @ w for n, (x, w) in a.items()} | {'copy': lambda: target.copy_(source)}
    times, _ = seconds_each(works, device, 5)
    rates = {n: 2 * rows * k * o / min(times[n]) for n, (k, o) in shapes.items()}
    work = sum(k * o for k, o in shapes.values())
    return dict(rows=rows, products=rates, copy=2 * source.numel() / min(times['copy']),
                gemm=work / sum(k * o / rates[n] for n, (k, o) in shapes.items()))


# ---- whole steps -------------------------------------------------------------------------------------------

@contextmanager
def using(kernels):
    """Only these of model.py's kernels run inside."""
    before, kernels = set(m.IN_USE), set(kernels)
    m.IN_USE.clear()
    m.IN_USE.update(kernels)
    try:
        yield
    finally:
        m.IN_USE.clear()
        m.IN_USE.update(before)


def measured(ideas):
    """The class of a run of these ideas that is measured: its step is train.py's, and it leaves nothing
    behind."""

    class Measured(ideas.seam(train.Run)):
        def __init__(self, s, kernels=None, vocab_size=0, micro=0, **changes):
            compile = s.compile if s.compile == 'off' else 'on'
            changed = vars(s) | dict(compile=compile, dry_run=False) | changes
            super().__init__(SimpleNamespace(**changed), ideas)
            self.kernels, self.vocab_size, self.said, self.going = kernels, vocab_size, [], False
            self.open()
            self.build()
            if micro:
                self.micro, self.accum = micro, self.micro * self.accum // micro
                self.first_batch = self.stream.batch(0, micro, s.block_size)

        interrupted, record = False, lambda self, **row: None
        open_evaluations = compare = lambda self: None

        def heed(self, number, frame):
            """At once; or at the next step, if a callback of another library swallows that."""
            self.interrupted = True
            signal.default_int_handler(number, frame)

        def find_checkpoint(self):
            refuse(self.resuming, 'init_from is resume: what is measured begins afresh')

        def say(self, line):
            self.said.append(line)

        def shape(self):
            config = super().shape()
            return replace(config, vocab_size=self.vocab_size or config.vocab_size)

        def step(self):
            """Half way through, with what compiles it before the first. Returns its tokens."""
            if self.interrupted:
                raise KeyboardInterrupt
            with using(m.IN_USE if self.kernels is None else self.kernels):
                if not self.going:
                    self.read_ahead()
                    self.get_going()
                self.going, self.progress, self.left, before = True, 0.5, math.inf, self.tokens
                super().step()
            return self.tokens - before

    return Measured


def contestants(run, argv):
    """{name: a run}: ours, and what --beside names."""
    def ours(**changes):
        return type(run)(run.s, **run.shape_given | changes)

    both = {'ours, Muon': run}
    try:
        both['ours, AdamW'] = ours(optimizer='adamw')
    except UserError as e:                      # of an idea that changes Muon
        print(f'ours, AdamW: not measured, {e}')
    if run.device == 'cuda':
        both['ours without kernels, Muon'] = ours(kernels=())
    for stack in [stack for stack in run.s.beside.split(',') if stack]:
        parts = stack.split('+')
        s, ideas = train.read_settings([*argv, *parts], TABLES)
        names = [part if part.startswith('--') else Path(part).stem for part in parts]
        refuse('+'.join(names) in both, f'--beside names {"+".join(names)} twice: give one of the files another name')
        both['+'.join(names)] = measured(ideas)(s, **run.shape_given)
    return both


def compare(runs, rounds, peak):
    """A row for each run: step time, speed, MFU, memory, data wait. All take turns in every round, and so do
    matrix products; also {dtype: their FLOP/s}, and {name: why} of those that fail."""
    first = runs['ours, Muon']
    first.step()                                        # what fails in it should be seen whole
    gemm = {run.dtype: products(first.config, first.micro * first.config.block_size, first.device, run.dtype)
            for run in runs.values()}
    works = {kind: work for kind, (work, _) in gemm.items()} | {name: run.step for name, run in runs.items()}
    times, faults = seconds_each(works, first.device, rounds, 0.05)
    gemm, rows = {kind: flops / statistics.median(times.pop(kind)) for kind, (_, flops) in gemm.items()}, []
    for name, seconds in times.items():
        run, median = runs[name], statistics.median(seconds)
        memory, tokens = memory_of(run.step, run.device)
        speed, exact = tokens / median, run.flops_per_token
        palm, (waited, trained) = run.model.flops_per_token(run.config.block_size), np.sum([*run.history][2:], axis=0)
        rows.append(dict(
            name=name, step_ms=1e3 * median, min_ms=1e3 * min(seconds), max_ms=1e3 * max(seconds),
            tok_per_sec=speed, flops_per_sec=speed * exact, mfu=speed * exact / peak if peak else None,
            mfu_palm=speed * palm / peak if peak else None, of_gemm=speed * exact / gemm[run.dtype],
            peak_mem_gb=memory and memory / 2 ** 30, data_wait=float(waited / trained),
            versus_ours=statistics.median(b / a for a, b in zip(times['ours, Muon'], seconds))))
    return rows, {str(kind).removeprefix('torch.'): speed for kind, speed in gemm.items()}, faults


# what the profiler calls operations; the first that fits counts
GROUPS = {'attention': r'attention_|qk_|flash|fmha|softmax|sdpa',
          'matrix products': r'gemm|cutlass|nvjet|xmma|cublas|mkldnn|mlp_kernel|expert_|aten::(mm|addmm|bmm|linear)',
          'loss': r'cross_?entropy|logsumexp', 'norms': r'add_norm|rms_norm',
          'optimizer': r'multi_tensor|foreach|adam',
          'fused by Inductor': r'triton_|cpp_fused|^graph_|compiledf',
          'copies': r'copy|memcpy|memset|aten::(cat|to|_to)'}


def where_time_goes(trainer, device, steps=3):
    """Share of a step's busy time by group of operations, how busy, and what is most of the rest."""
    from torch.profiler import ProfilerActivity, profile
    on_gpu = device == 'cuda'
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        for _ in range(steps):
            trainer.step()
        wait_for(device)
        wall = time.perf_counter() - began
    spent, others = dict.fromkeys([*GROUPS, 'other'], 0.0), {}
    for event in profiler.key_averages():
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if on_gpu and (event.device_type.name != 'CUDA' or getattr(event, 'is_user_annotation', False)):
            continue                            # a name for a stretch of time whose kernels are there too
        group = next((g for g, pattern in GROUPS.items() if re.search(pattern, event.key, re.I)), 'other')
        spent[group] += seconds
        if group == 'other':
            others[event.key] = seconds
    busy = sum(spent.values()) or 1e-9
    most = max(others, key=others.get, default='')
    return dict(busy_share=min(1.0, busy / wall), shares={g: t / busy for g, t in spent.items()},
                largest_other=most[:60])


# ---- every kernel beside its rivals ------------------------------------------------------------------------

class Operations:
    """One layer's operations, a method each: (name, FLOPs, bytes, {rival: function of the inputs}, inputs).
    FLOPs and bytes are those of a forward pass that touches memory once for each input and output."""

    def __init__(self, config, idx, first, dtype, compile):
        self.config, self.idx, self.first, self.dtype = config, idx, first, dtype
        self.device, self.size, self.chosen = idx.device.type, dtype.itemsize, set(m.IN_USE)
        self.compiled = (lambda f: torch.compile(f, dynamic=False)) if compile else (lambda f: f)

    def each(self, modules=()):
        yield self.attention()
        yield self.causal()
        yield self.add_norm()
        yield self.mlp()
        yield self.cross_entropy()
        for name, *counts, rivals, inputs in kernel_cases(modules, self.config, self.dtype, self.idx.numel()):
            yield name, *counts, rivals, [t.to(self.device) for t in inputs]

    def inputs(self, *shapes):
        """Random; of a matrix so that it leaves the size of what it is multiplied with."""
        scale = [shape[-1] ** 0.5 if len(shape) == 2 else 1 for shape in shapes]
        return [torch.randn(s, device=self.device, dtype=self.dtype) / n for s, n in zip(shapes, scale)]

    def ours(self, function, *kernels):
        """A function, compiled, with these of the kernels that run here."""
        built = self.compiled(function)

        def run(*args):
            with using(self.chosen & set(kernels)):
                return built(*args)
        return run

    def attention(self):
        """All that belongs to it, on documents as they are in the data."""
        (B, T), c, first = self.idx.shape, self.config, self.first
        H, HK, D, layer = c.n_head, c.n_kv_head, c.head_dim, m.Attention(c, 0).to(self.device)
        cos, sin = (t.to(self.device) for t in m.rotary_table(T, c.rotary_dim, c.rope_base))
        context = m.Context(self.idx, cos, sin, first, None, None, {})
        for_kernels = context._replace(first=first.int(), last=m.last_visible_to(first).int())
        there, back = torch.arange(T, device=self.device), torch.arange(T, device=self.device)[:, None]
        seen = ((there <= back) & (there >= first[:, :, None]))[:, None]

        def by_torch(qkv):
            q, k, v = layer.heads(qkv, context)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=layer.scale, enable_gqa=H != HK)
            return o.transpose(1, 2)

        def by_ours(qkv):
            if 'attention' in m.IN_USE:
                return m.attend_with_kernels(layer, qkv, for_kernels)
            return layer.attend(*layer.heads(qkv, context), first).transpose(1, 2)

        def by_flex(qkv):
            q, k, v = layer.heads(qkv, context)
            o = flex_attention(q, k, v, block_mask=blocks, scale=layer.scale, enable_gqa=H != HK)
            return o.transpose(1, 2)

        rivals = {'ours': self.ours(by_ours, 'attention', 'qk_norm'), 'torch, SDPA with a mask': by_torch,
                  'compiled, SDPA with a mask': self.compiled(by_torch)}
        if self.device == 'cuda':
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
            visible = lambda b, h, i, j: (j <= i) & (j >= first[b, i])
            blocks = create_block_mask(visible, B, None, T, T, device=self.device)
            rivals['compiled FlexAttention, same mask'] = self.compiled(by_flex)
        pairs, N = int((there - first + 1).sum()), B * T
        return ('attention, documents, QK-norm, RoPE', 4 * D * H * pairs, self.size * N * (2 * H + 2 * HK) * D,
                rivals, self.inputs((B, T, H + 2 * HK, D)))

    def causal(self):
        """Attention alone, over all that went before."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        (B, T), H, HK, D = self.idx.shape, self.config.n_head, self.config.n_kv_head, self.config.head_dim
        zero = torch.zeros_like(self.first)
        ends, none = (zero.int(), torch.full_like(zero, T - 1).int()), torch.zeros(T, 0, device=self.device)

        def heads(qkv):
            return qkv.transpose(1, 2).split([H, HK, HK], dim=1)

        def plainly(qkv):
            if 'attention' in m.IN_USE:
                return m.attend_forward(qkv, self.idx, *ends, none, none, H, D ** -0.5, False, False, 0)[0]
            return m.attention(*heads(qkv), zero, D ** -0.5).transpose(1, 2)

        def sdpa(backend=None):
            def run(qkv):
                with sdpa_kernel(backend) if backend is not None else nullcontext():
                    o = F.scaled_dot_product_attention(*heads(qkv), is_causal=True, enable_gqa=H != HK)
                return o.transpose(1, 2)
            return run

        rivals = {'ours': self.ours(plainly, 'attention'), 'SDPA, its own choice': sdpa()}
        if self.device == 'cuda':
            rivals |= {'SDPA, FlashAttention': sdpa(SDPBackend.FLASH_ATTENTION),
                       'SDPA, cuDNN': sdpa(SDPBackend.CUDNN_ATTENTION),
                       'SDPA, memory-efficient': sdpa(SDPBackend.EFFICIENT_ATTENTION)}
        return ('attention, causal', 2 * D * H * B * T * (T + 1), self.size * B * T * (2 * H + 2 * HK) * D, rivals,
                self.inputs((B, T, H + 2 * HK, D)))

    def add_norm(self):
        def add_norm(x, y):
            s = x + y
            return s, m.rms_norm(s)

        rivals = {'ours': self.ours(m.add_norm, 'rms_norm'), 'torch': add_norm, 'compiled': self.compiled(add_norm)}
        shape = N, C = self.idx.numel(), self.config.n_embd
        return 'residual + RMSNorm', 6 * N * C, 4 * self.size * N * C, rivals, self.inputs(shape, shape)

    def mlp(self):
        c, N = self.config, self.idx.numel()
        C, hidden, gated = c.n_embd, c.mlp_hidden, c.mlp == 'swiglu'

        def mlp(x, up, down):
            x = x @ up.t()
            if gated:
                gate, x = x.chunk(2, dim=-1)
                return (F.silu(gate) * x) @ down.t()
            return F.relu(x).square() @ down.t()

        fused = (lambda *t: m.mlp_forward(*t, gated)[0]) if 'mlp' in self.chosen else mlp
        rivals = {'ours': self.ours(fused, 'mlp'), 'torch': mlp, 'compiled': self.compiled(mlp)}
        return (f'MLP, {c.mlp}', 2 * N * C * hidden * (3 if gated else 2), self.size * N * (2 * C + 2 * hidden),
                rivals, self.inputs((N, C), (hidden * (1 + gated), C), (C, hidden)))

    def cross_entropy(self):
        import torch._inductor.config as inductor
        N, C, V = self.idx.numel(), self.config.n_embd, self.config.vocab_size
        targets = torch.randint(0, V, (N,), device=self.device)
        all_logits = lambda x, w: F.cross_entropy((x @ w.t()).float(), targets)
        rivals = {'ours': self.ours(lambda x, w: m.linear_cross_entropy(x, w, targets), 'cross_entropy'),
                  'torch, all logits': all_logits, 'compiled, all logits': self.compiled(all_logits)}
        if self.device == 'cuda' and hasattr(inductor, 'auto_chunker'):    # it compiles as it is what it cannot cut
            rivals['compiled, auto-chunker'] = torch.compile(
                all_logits, dynamic=False, options={'auto_chunker.enable': True})
        if hasattr(F, 'linear_cross_entropy'):                  # from torch 2.13 on
            options = torch.nn.LinearCrossEntropyOptions()
            rivals['F.linear_cross_entropy'] = lambda x, w: F.linear_cross_entropy(x, w, targets, options=options)
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
            rivals['Liger-Kernel'] = lambda x, w: liger(x, w, targets)
        except ImportError:
            pass
        return ('linear + cross-entropy', 2 * N * C * V, self.size * (N * C + V * C), rivals,
                self.inputs((N, C), (V, C)))


def kernel_cases(modules, config, dtype, rows):
    """The operations that ideas have kernels for: a function of this name in an idea's file yields them as
    Operations does, 'ours' among the rivals, with inputs on the CPU. compile-only builds them, too."""
    for cases in dict.fromkeys(module.kernel_cases for module in modules if hasattr(module, 'kernel_cases')):
        yield from cases(config, dtype, rows)


def kernel_rows(name, flops, size, rivals, tensors, rounds, rates):
    """A row for every rival in an operation: forward, and with backward; median, spread, floor, memory."""
    rows, device = [], tensors[0].device.type
    leaves = [t.detach().requires_grad_() for t in tensors]
    grads = []

    def both(function):
        def work():
            outputs = function(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            grads.extend([] if grads else [torch.randn_like(o) if o.ndim else torch.ones_like(o) for o in outputs])
            return torch.autograd.grad(outputs, leaves, grads)
        return work

    def forward(function):
        return torch.no_grad()(lambda: function(*tensors))

    trained, faults = seconds_each({k: both(f) for k, f in rivals.items()}, device, rounds)
    # our loss makes its gradients on the way forward: alone it would compare two things
    alone = {} if 'entropy' in name else {k: forward(f) for k, f in rivals.items()}
    alone = seconds_each(alone, device, rounds)[0]
    floor = max(flops / rates['gemm'], size / rates['copy'])
    for rival, function in rivals.items():
        row = dict(operation=name, rival=rival, fault=faults.get(rival), floor_ms=1e3 * floor,
                   floor_both_ms=1e3 * max(3 * flops / rates['gemm'], 2 * size / rates['copy']))
        for key, times in (('', alone), ('both_', trained)):
            if ms := [1e3 * t for t in times.get(rival, [])]:
                row |= {f'{key}ms': statistics.median(ms), f'{key}min_ms': min(ms), f'{key}max_ms': max(ms)}
        if device == 'cuda' and rival in trained:
            row['mem_mb'] = memory_of(both(function), device)[0] / 2 ** 20
        if rival in trained and 'ours' in trained:
            row['versus_ours'] = statistics.median(b / a for a, b in zip(trained['ours'], trained[rival]))
        rows.append(row)
    return rows


# ---- building every kernel without a GPU -------------------------------------------------------------------

SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}    # bytes a program, by architecture
SPILLED = 64                                                         # bytes of stack that are let pass
FAMILY = (      # what kernels branch on, and the widths of models of 11M, 34M and 97M parameters
    dict(n_embd=320, n_head=5, dtype='float32'),
    dict(n_embd=512, n_head=4, n_kv_head=2, mlp='swiglu', vocab_size=16384),
    dict(n_embd=512, n_head=4, n_kv_head=2, mlp='swiglu', dtype='float32'),
    dict(n_embd=768, n_head=12, n_kv_head=1, rotary_dim=32, block_size=1024, vocab_size=16384),
    dict(n_embd=256, n_head=8, qk_norm=False, token_shift=False),
    dict(n_embd=200, n_head=2, head_dim=16, mlp='swiglu', mlp_hidden=600, vocab_size=50257))


def every_kernel(config, dtype, modules=()):
    """Go through forward and backward of all operations of a model, on the CPU, with whatever m.launch is."""
    idx = torch.zeros(1, config.block_size, dtype=torch.long)
    with using(m.KERNELS):
        for name, _, _, rivals, inputs in Operations(config, idx, idx, dtype, False).each(modules):
            outputs = rivals['ours'](*(t.requires_grad_() for t in inputs))
            sum(o.sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
            if name == 'linear + cross-entropy':        # as it is evaluated
                m.linear_cross_entropy(*inputs, idx[0], 'none')


def family(s, ideas):
    """(config, dtype) of the models whose kernels are built: that of the settings, and what else is
    common."""
    kind, shape = m.configured(ideas), [*train.SHAPE, 'vocab_size']
    declared = {name: getattr(s, name) for name in ideas.declared}
    for options in ({name: getattr(s, name) for name in shape}, *FAMILY):
        dtype = getattr(torch, options.get('dtype', 'bfloat16'))
        yield kind(**declared | {name: value for name, value in options.items() if name != 'dtype'}), dtype


def compile_for(s, ideas):
    """Build every kernel of these models for an architecture, in its own process; prints rows as JSON."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    tools, rows, sm = Path(m.triton.__file__).parent / 'backends' / 'nvidia' / 'bin', {}, s.compile_for

    class Card:                                 # all that Triton asks a driver while it compiles
        get_current_target = staticmethod(lambda: GPUTarget('cuda', sm, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: 0)

    def build(kernel, grid, *args, **options):
        built = kernel.warmup(*args, grid=grid, **options)
        with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
            f.write(built.asm['cubin'])
            f.flush()
            said = subprocess.run([tools / 'cuobjdump', '--dump-resource-usage', f.name],
                                  capture_output=True, text=True).stdout
        registers, stack = (int(re.search(rf'{word}:(\d+)', said)[1]) for word in ('REG', 'STACK'))
        shared, fp64 = built.metadata.shared, '.f64' in built.asm['ptx']
        over = {'shared memory': shared > SHARED_MEMORY[sm], 'spills': stack > SPILLED, 'fp64': fp64}
        rows[built.hash] = dict(
            sm=sm, kernel=kernel.fn.__name__, case=case, shared=shared, registers=registers, stack=stack,
            fp64=fp64, over=[limit for limit, wrong in over.items() if wrong])

    driver.set_active(Card())
    m.launch, m.shared_memory = build, lambda x: SHARED_MEMORY[sm]
    for config, dtype in family(s, ideas):
        case = (f'{config.n_embd} wide, heads of {config.head_dim}, {config.mlp}, '
                f'vocabulary {config.vocab_size}, {str(dtype)[6:]}')
        every_kernel(config, dtype, ideas.modules)
    print(json.dumps(list(rows.values())))


def compile_only(argv):
    """Build every kernel of the settings' model and its family for every architecture; rows, also printed."""
    refuse(m.triton is None, '--kernels=compile-only needs Triton: pip install -r requirements.txt')
    environment = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}

    def child(sm):
        command = [sys.executable, __file__, *argv, f'--compile_for={sm}']
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    rows = []
    for done in ThreadPoolExecutor(2).map(child, SHARED_MEMORY):
        refuse(done.returncode, f'a kernel does not compile:\n{done.stderr[-3000:]}')
        rows += json.loads(done.stdout)
    heads = f'{"sm":>4}{"shared":>11}{"registers":>11}{"stack":>9}{"fp64":>6}'
    print(f'{"kernel, the most of its builds":30}{heads}')
    for sm, kernel in itertools.product(SHARED_MEMORY, dict.fromkeys(r['kernel'] for r in rows)):
        if same := [r for r in rows if (r['sm'], r['kernel']) == (sm, kernel)]:
            most = {k: max(r[k] for r in same) for k in ('shared', 'registers', 'stack', 'fp64')}
            print(f'{kernel:30}{sm:4}{most["shared"]:11,}{most["registers"]:11}{most["stack"]:9}'
                  f'{"yes" if most["fp64"] else "no":>6}   {len(same)} builds')
        for r in [r for r in same if r['over']]:
            print(f'    OVER THE LIMIT, {", ".join(r["over"])}: {r["case"]}')
    return rows


# ---- whole runs: a base, and ideas stacked on it -----------------------------------------------------------

SAME = ('dataset', 'budget_minutes', 'budget_counts', 'max_steps', 'max_tokens')  # of all runs
OURS = ('seed', 'out_dir', 'overwrite', 'dry_run', 'init_from')    # only a comparison sets these
COLUMNS = dict(seeds=0, val_bpb=4, sd=4, change='+.2%', in_sd='+.1f', total_params=0, non_embedding_params=0,
               active_params=0, tokens=0, epochs=2, train_seconds=0, total_seconds=0, tok_per_sec=0, joules=0)


def planned(own, argv):
    """The runs of a comparison in turn, the base's first; UserError lists the mistakes of all."""
    configs = [a for a in argv if not a.startswith('--')]
    names = ['+'.join(Path(part).stem for part in config.split('+')) for config in configs]
    refuse(not configs, '--compare names no config: it takes a base, then ideas')
    refuse(len({*names}) < len(names), f'two of {", ".join(names)} are called the same: rename one')
    stacks = {}
    for name, config in zip(names, configs):
        kept = [a for a in argv if a.startswith('--') or a in (configs[0], config)]      # in their order
        stacks[name] = [part for a in kept for part in ([a] if a.startswith('--') else a.split('+'))]
    root = Path(at_home(own.compare_dir) or f'out/compare/{names[0]}')
    return checked(stacks, root, own.seeds, own.idea_seeds, SAME)


def checked(stacks, root, seeds, idea_seeds, same):
    """The runs of stacks {name: arguments}, the first of which is the base, that are alike in `same`."""
    runs, wrong = [], []
    for name, args in stacks.items():
        try:
            s, ideas = train.read_settings(args)
        except UserError as e:
            wrong += [line.strip() for line in str(e).splitlines()[1:]]
            continue
        wrong += [f'{ideas.set_at[key]}: a comparison has its own {key}' for key in OURS if key in ideas.set_at]
        for seed in range(1, (idea_seeds if runs and name != runs[0].name else seeds) + 1):
            folder = root / name / f'seed{seed}'
            runs.append(SimpleNamespace(
                name=name, seed=seed, folder=folder, fault='', ideas=ideas,
                args=[*args, f'--seed={seed}', f'--out_dir={folder}'],
                s=SimpleNamespace(**vars(s) | dict(seed=seed, out_dir=str(folder)))))
        wrong += [f'{name} has {key} {theirs!r}, the base {ours!r}: they must be equal' for key in same
                  if (theirs := vars(s)[key]) != (ours := vars(runs[0].s)[key])]
    refuse(wrong, '\n  '.join(['these runs cannot be compared:', *dict.fromkeys(wrong)]))
    for run in runs:
        look(run)
    # the base's seeds lie evenly among the others, so that an hour's noise is not taken for theirs
    others = sorted((run for run in runs if run.name != runs[0].name), key=lambda run: run.seed)
    turn = {id(run): i / len(others) for i, run in enumerate(others)}
    return sorted(runs, key=lambda run: turn.get(id(run), (run.seed - 1) / seeds))


def look(run):
    """Find what there is of a run: its result, or that it has begun; refuses one of other settings or
    ideas."""
    run.result = told_by(run.folder / 'result.json')
    run.begun = any((run.folder / name).exists() for name in sample.CHECKPOINTS)
    if not (run.result or run.begun):
        return
    found = run.result or sample.read_checkpoint(run.folder)
    then, now = (json.loads(json.dumps(x)) for x in (found['settings'], vars(run.s)))   # tuples to lists
    then['ideas'] = found['ideas'] if run.result else [name for name, _, named in found['ideas'] if named]
    now['ideas'] = [name for name, _, named in run.ideas.sources() if named]
    differ = [f'{k} (was {then[k]!r}, now {v!r})' for k, v in now.items()
              if k not in ('out_dir', 'init_from') and then.get(k, v) != v]
    refuse(differ, f'{run.folder} holds a run with other settings: {", ".join(differ)}; delete it, or choose another '
                   f'--compare_dir')
    for path, text in run.ideas.files.items():
        copy = run.folder / 'config' / path.name
        refuse(copy.is_file() and code_of(copy.read_text('utf-8', 'replace')) != code_of(text),
               f'{run.folder} holds a run of another {path.name} than there is now: delete it, or choose another --compare_dir')


def told_by(path):
    """The result that a run left, None if there is none; refuses what is not one."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        found = fits(result, COMPARABLE)
    except (OSError, ValueError, RecursionError):
        found = False
    refuse(not found, f'{path} is no result of train.py: delete it, or choose another --compare_dir')
    return result


def code_of(text):
    """What of a file of config/ is executed or read: all but comments and its docstring."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text
    return [ast.dump(part) for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]


def make(run):
    """Start train.py as its user would, or go on with what it saved; KeyboardInterrupt if it was stopped."""
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, train.__file__, *run.args, *['--init_from=resume'] * run.begun]
    with open(run.folder / 'log.txt', 'a') as log, tempfile.TemporaryDirectory() as cache:
        # what one run has compiled would take a part off the next one's bill
        caches = dict(TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f'{cache}/triton')
        run.child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | caches)
        code = run.child.wait()
    if code == 75:
        raise KeyboardInterrupt
    if code:
        last = (run.folder / 'log.txt').read_text(errors='replace').rstrip().rpartition('\n')[2]
        run.fault = f'seed {run.seed}: exit code {code}, {last}'


def read_by(result):
    """What a result was measured on, and how."""
    return result['data']['val_bytes'], result['protocol']


def abilities_of(result):
    """{evaluation: accuracy} of those that have one."""
    return {name: e['accuracy'] for name, e in result['evals'].items() if e.get('accuracy') is not None}


def ranked(runs):
    """A row for each idea, best first: means over its seeds, and how it does beside the base with them, which
    reads the same text in the same order, so that much of what a seed brings cancels."""
    rows, text = [], next((read_by(run.result) for run in runs if run.result and run.name == runs[0].name), None)
    alike = [run for run in runs if run.result and read_by(run.result) == text]
    by_seed = {run.seed: run.result['val_bpb'] for run in alike if run.name == runs[0].name}
    for name in dict.fromkeys(run.name for run in runs):
        mine = [run for run in runs if run.name == name]
        results = [r | abilities_of(r) for run in mine if (r := run.result)]
        notes = ['base'] * (not rows) + [run.fault for run in mine if run.fault]
        notes += ['measured on other text'] * any(text and read_by(r) != text for r in results)
        results = [r for r in results if read_by(r) == text] or results
        rows.append(row := dict(name=name, seeds=len(results), notes=notes))
        if not results:
            continue
        for key in [*COLUMNS, *abilities_of(results[0])]:
            if all(r.get(key) is not None for r in results):
                row[key] = statistics.fmean(r[key] for r in results)
        row['per_source'] = {source: statistics.fmean(r['val_bpb_per_source'][source] for r in results)
                             for source in results[0].get('val_bpb_per_source', {})
                             if all(source in r['val_bpb_per_source'] for r in results)}
        if len(results) > 1:
            row['sd'] = statistics.stdev(r['val_bpb'] for r in results)
        base, sd = rows[0], rows[0].get('sd')
        pairs = [(run.result['val_bpb'], by_seed[run.seed]) for run in alike if run.name == name and run.seed in by_seed]
        if row is not base and pairs:
            ours, theirs = map(statistics.fmean, zip(*pairs))
            gain, more = ours - theirs, row['total_params'] / base['total_params'] - 1
            row |= dict(change=gain / theirs, in_sd=gain / sd if sd else None)
            notes += ['within noise'] * (not sd or abs(gain) < 2 * sd)
            notes += [f'{more:+.0%} parameters'] * (abs(more) > 0.05)
    return sorted(rows, key=lambda row: row.get('change', 0 if row is rows[0] and row['seeds'] else math.inf))


def as_table(rows, runs, columns, *notes):
    """Markdown of ranked rows, then notes, and in what all runs should be alike and are not."""
    results = [run.result for run in runs if run.result]
    columns = dict(rank=None, idea=None) | columns | {e: 4 for r in results for e in abilities_of(r)} | dict(notes=None)
    lines = text_table(columns, [row | dict(
        rank=place if row['seeds'] else None, idea=row['name'], notes='; '.join(row['notes']).replace('|', '/'))
        for place, row in enumerate(rows, 1)])
    lines += ['', *notes]
    for key in ('commit', 'hardware', 'val_share'):
        if len(kinds := {json.dumps(r[key]) for r in results}) > 1:
            lines.append(f'Not all runs have the same {key}: {", ".join(sorted(kinds))}.')
    return '\n'.join(lines)


def write_table(path, text, found):
    """path.md and path.json."""
    sample.write_beside(path.with_suffix('.md'), lambda f: f.write(text.encode() + b'\n'))
    text = sample.as_json(found, indent=1)
    sample.write_beside(path.with_suffix('.json'), lambda f: f.write(text.encode()))


def keep_table(runs, root):
    """Rank the runs; the table in Markdown, which compare.md keeps, and compare.json its rows."""
    text = as_table(rows := ranked(runs), runs, COLUMNS,
                    'change: beside the base with its seeds; sd: standard deviation of val_bpb over seeds; '
                    'in sd: the change in sd of the base.',
                    'Within noise: less than 2 of them, or not known, as one seed of the base has no sd.')
    sources = dict.fromkeys(source for row in rows for source in row.get('per_source', {}))
    if len(sources) > 1:
        table = text_table(dict(idea=None) | dict.fromkeys(sources, 4),
                           [dict(idea=row['name']) | row['per_source'] for row in rows if row['seeds']])
        text += '\n\nBits per byte by source:\n\n' + '\n'.join(table)
    write_table(root / 'compare', text, rows)
    return text


def say_runs(runs, root):
    """What there is to do, how long it takes, and what each idea changes."""
    base, left = runs[0], [run.s.budget_minutes for run in runs if not run.result]
    hours = sum(left) / 60
    print(f'{len(runs)} runs in {root}, {len(left)} to make, a budget of {hours:.1f} hours')
    for run in [run for run in runs if run.seed == 1]:
        sets = [f'{k}={v!r}' for k, v in vars(run.s).items() if vars(base.s).get(k) != v and k != 'out_dir']
        sets += [f'its own {seam}' for seam in prepare_data.SEAMS if run.ideas.tops(seam) != base.ideas.tops(seam)]
        print(f'{run.name}: {", ".join(sets) or "the settings of the base"}')
        parts = [arg for arg in run.args if arg not in base.args]
        for line in run.ideas.overruled:
            if sum(f'{part}:' in line for part in parts) > 1:      # not the base, which is the point
                print(f'  overruled: {line}')


def try_out(runs):
    """Prepare what runs read, on no run's bill; what cannot be is said now, not in its turn."""
    wrong = []                                  # from here on a signal raises KeyboardInterrupt, see Measured
    for run in {run.name: run for run in runs if not run.result}.values():
        try:
            measured(run.ideas)(run.s, device='cpu')
        except UserError as e:
            wrong.append(f'{run.name}: {e}')
    refuse(wrong, '\n  '.join(['these runs cannot be made:', *dict.fromkeys(wrong)]))


def compare_runs(own, rest, argv, plan=planned, keep=keep_table):
    """Make the runs of --compare that are not finished, --jobs at a time, and rank all."""
    runs = plan(own, rest)
    root, waiting = runs[0].folder.parents[1], [run for run in runs if not run.result]
    refuse(own.jobs > 1 and not all(run.s.max_tokens or run.s.max_steps for run in waiting),
           f'--jobs is {own.jobs}: runs that share a machine do not go by its clock, give them --max_tokens')
    say_runs(runs, root)
    if own.jobs > 1:
        os.environ['OMP_NUM_THREADS'] = str(max(1, (os.cpu_count() or 1) // own.jobs))

    def work(run):
        if stopped.is_set():
            return run
        print(f'{run.name}, seed {run.seed}: {run.folder / "log.txt"}', flush=True)
        try:
            make(run)
        except BaseException:
            stopped.set()                       # before the next one begins
            raise
        return run

    with ThreadPoolExecutor(own.jobs) as pool:
        stopped = threading.Event()
        try:
            try_out(runs)
            for made in as_completed([pool.submit(work, run) for run in waiting]):
                run = made.result()
                look(run)
                told = run.fault or f'val_bpb {run.result["val_bpb"]:.4f}'
                print(f'  {told}' + f', {run.name}, seed {run.seed}' * (own.jobs > 1), flush=True)
                keep(runs, root)
        except BaseException as e:
            stopped.set()
            for child in [run.child for run in waiting if hasattr(run, 'child')]:
                child.terminate()               # it saves, if it is still there
            if not isinstance(e, KeyboardInterrupt):
                raise
            again = shlex.join(['python', 'bench_mfu.py', *argv])
            raise train.Stopped(f'stopped, what was done is kept; to go on, the same again: {again}') from e
    print(keep(runs, root))


# ---- leaderboard -------------------------------------------------------------------------------------------

# of the public "lLM leaderboard", which does not give its split of the data
PUBLISHED = (('compiled baseline', 11.0e6, 'BabyLM', 1.31), ('latent attention', 10.6e6, 'BabyLM', 1.32),
             ('baseline transformer', 11.0e6, 'BabyLM', 1.33), ('baseline', 7.3e6, 'SimpleStories', 0.57))
ELSEWHERE = ('Published elsewhere, for half an hour of one RTX 4090: another split of the data, another '
             'machine. Not ranked among the runs here.')
LEADERS = dict(ideas=None, non_embedding_params=0, active_params=0, tokens=0, tokens_a_parameter=2, epochs=2,
               total_seconds=0, joules=0)
ON_PAGE = dict(val_loss=4, tok_per_sec=0, mfu=3, train_seconds=0,                   # decimals of columns
               co2_g=2, peak_mem_gb=2, dollars=3, budget_minutes=1, seed=0, hardware=None, commit=None)
COMPARISONS = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
               ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.In: lambda a, b: a in b}

RESULT = dict(val_bpb=float, total_params=float, val_share=float, tokens=float, epochs=float, settings=dict(dataset=str), config=dict,
              hardware=dict(name=str), data=dict(fingerprint=str), evals={str: {'accuracy?': float | None}})     # the form of one
COMPARABLE = RESULT | dict(ideas=[str], protocol=object, commit=object, data=dict(fingerprint=str, val_bytes=float))  # for --compare
COMPARED = [{'name': str, 'notes': [str], str: float | dict | None}]                            # and of a row of compare.json


def finished_runs(folder):
    """A row of names and values for every run under a folder that has ended, and why others are left out."""
    rows, left_out, names = [], [], {}
    for path in sorted(path for path in Path(folder).rglob('result.json') if path.is_file()):
        try:
            r = json.loads(path.read_text(encoding='utf-8'))
            if not fits(r, RESULT):
                raise ValueError('it lacks what they have')
            if not all(0 < r[key] < math.inf for key in ('val_bpb', 'total_params', 'tokens')):
                raise ValueError(f'val_bpb {r["val_bpb"]}, total_params {r["total_params"]}, tokens {r["tokens"]}')
            about = dict(dataset=Path(r['settings']['dataset'].removeprefix('files:')).name,
                         hardware=r['hardware']['name'], folder=path.parent)
            text = r['data'].get('val_bytes') or f'data {r["data"]["fingerprint"][:8]}'
            about['text'] = about['dataset'], f'{text:,} bytes' if type(text) is int else text, r['protocol']
            names[about['text']] = about['dataset']
            abilities = abilities_of(r)
            about['ideas'] = ' '.join(r.get('ideas', ()))
            about['tokens_a_parameter'] = r['tokens'] / r['total_params']
            about['notes'] = f'BPB on {r["val_share"]:.1%}' * (r['val_share'] < 1)
            rows.append(r['settings'] | r['config'] | r | abilities | about | dict(abilities=[*abilities]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            left_out.append(f'{path} is left out, it holds no result of train.py: {first_line(e)}')
    for row in rows:
        row['run'] = row['folder'].relative_to(folder).as_posix().replace('|', '/')
        row['run'] = row['folder'].absolute().name if row['run'] == '.' else row['run']
        dataset, text, protocol = row['text']              # numbers that no one should compare stand apart
        apart = [*names.values()].count(dataset) > 1
        row['text'] = dataset + f' ({text}, protocol {protocol})' * apart
        row[f'BPB {row["text"]}'] = row['val_bpb']
        if (row['folder'] / 'report.html').exists():
            row['href'] = quote((row['folder'] / 'report.html').relative_to(folder).as_posix())
    return rows, left_out


def key_of(name, known, option):
    near = ''.join(f'; did you mean {key}?' for key in difflib.get_close_matches(name, known, 1))
    refuse(name not in known, f'--{option}: no result has {name!r}{near}')
    return name


def holds(node, row):
    """Whether a row is as the syntax tree of --where says; a comparison with what it lacks does not hold."""
    match node:
        case ast.BoolOp(op, parts):
            return (all if isinstance(op, ast.And) else any)(holds(part, row) for part in parts)
        case ast.UnaryOp(ast.Not(), part):
            return not holds(part, row)
        case ast.Compare(left, ops, right):
            if any(row.get(n.id) is None for n in ast.walk(node) if isinstance(n, ast.Name)):
                return False
            values = [literal(part, row) for part in (left, *right)]
            return all(COMPARISONS[type(op)](a, b) for op, a, b in zip(ops, values, values[1:]))
    return bool(row.get(node.id))


def where(rows, text, known):
    """The rows of which an expression over `known` names holds."""
    try:
        tree = ast.parse(text, mode='eval').body
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                key_of(node.id, known, 'where')
        return [row for row in rows if holds(tree, row)]
    except (SyntaxError, KeyError, AttributeError, *NO_LITERAL) as e:
        raise UserError(f'--where is {text!r}, it must be comparisons of names in result.json, joined by '
                        f'and, or, not: "total_params < 12e6 and n_layer == 4"') from e


def pareto(points):
    """Of points (x, y, ...) those that none is as good as in both and better in one, less being better."""
    front = []
    for point in sorted(points, key=lambda p: p[:2]):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def front_blocks(texts):
    """Bits per byte beside what they cost; texts: {validation text: its runs}."""
    for text, rows in texts.items():
        for key, x in dict(total_params='parameters', total_seconds='seconds', joules='joules').items():
            points = [[row[key], row['val_bpb'], row['run']] for row in rows if row.get(key) and fits(row[key], float)]
            if len(points) > 1:
                yield dict(kind='dots', title=f'Bits per byte and {x}, {text}', x=x, y='bits per byte',
                           note='Dashed: the Pareto front, runs that none beats in both.', log_x=True,
                           series=[dict(name='runs', points=points)], path=pareto(points))


def thinned(points, most):
    """Means of as many neighbours as leave `most` points at most: a page need not hold every step."""
    n = -(-len(points) // most) or 1
    return [[statistics.fmean(column) for column in zip(*points[i:i + n])] for i in range(0, len(points), n)]


def by_epoch(row, log, key):
    """[epochs, bits per byte] of a run's log; not the closing evaluation where that was of an earlier step."""
    end = row.get('steps')
    moved = key == 'val_bpb' and row.get('measured_step', end) != end
    return [[r['tokens'] / row['tokens'] * row['epochs'], r[key]] for r in log
            if r.get(key) and r.get('tokens') and not (moved and r['step'] == end)]


def progress_blocks(texts, most=8):
    """Learning curves and ability curves of the best runs."""
    for name, rows in texts.items():
        logs = {row['run']: sample.read_rows(row['folder'] / 'metrics.jsonl') for row in rows[:most]}
        abilities = dict.fromkeys(key for log in logs.values() for r in log for key in r.get('evals', ()))
        for title, y, of in (('Validation', 'bits per byte', lambda r: r.get('val_bpb')),
                             ('Training loss', 'nats per token', lambda r: r.get('train_loss')),
                             *((f'Ability: {key}', 'accuracy', lambda r, key=key:
                                r.get('evals', {}).get(key, {}).get('accuracy')) for key in abilities)):
            points = {run: [[r['elapsed_s'] / 60, of(r)] for r in log if of(r) is not None]
                      for run, log in logs.items()}
            series = [dict(name=run, points=thinned(ps, 60)) for run, ps in points.items()]
            if any(len(one['points']) > 1 for one in series):
                yield dict(kind='lines', title=f'{title}, {name}', x='minutes', y=y, series=series,
                           note=f'The best {most} of {len(rows)} runs.' * (len(rows) > most))
        series = [dict(name=row['run'] + which, points=by_epoch(row, logs[row['run']], key))
                  for row in rows[:most] for key, which in (('val_bpb', ''), ('train_bpb', ', training text'))]
        if any(len(one['points']) > 1 for one in series):
            yield dict(kind='lines', title=f'By epoch, {name}', x='epochs', y='bits per byte', log_x=True,
                       series=[one for one in series if one['points']],
                       note='Where repetition stops paying; training text where a run measures it.')


def compared_blocks(folder):
    """The tables that --compare and --doll left below a folder."""
    for path in sorted(folder.rglob('compare.json')):
        try:
            rows = json.loads(path.read_text()) if path.is_file() else None
        except (OSError, ValueError, RecursionError):
            rows = None
        if rows and fits(rows, COMPARED):
            rows = [row | dict(notes='; '.join(row['notes']), change=None if row.get('change') is None else 100 * row['change'])
                    for row in rows]
            yield table_block(f'Compared: {path.parent.relative_to(folder).as_posix()}', 'change: in percent, beside the base with its '
                              'seeds; in sd: in standard deviations of the base over seeds.',
                              dict(name=None) | COLUMNS | dict(change=2, in_sd=1, notes=None), rows)


def label(key):
    return {'run': 'model', 'total_params': 'parameters'}.get(key, key.replace('_', ' '))


def text_table(columns, rows):
    """Lines of Markdown; columns {key: decimals, a format, or None: as it is}; the last is as wide as it
    needs."""
    def cell(value, form):
        if not isinstance(value, (int, float)):
            return '-' if value is None else str(value)
        short = ',' if type(value) is int else ',.0f' if 1000 <= abs(value) < 1e9 else '.4g'
        return f'{value:{form if isinstance(form, str) else short if form is None else f",.{form}f"}}'

    table = [[*map(label, columns)], *([cell(row.get(key), form) for key, form in columns.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)][:-1] + [0]
    table.insert(1, ['-' * (w - 1) + ':' if w else '---' for w in widths])
    return ['| ' + ' | '.join(f'{cell:>{w}}' for cell, w in zip(cells, widths)) + ' |' for cells in table]


def table_block(title, note, columns, rows):
    """The same for a page, which has no formats, without the columns that no row fills."""
    columns = {key: n for key, n in columns.items() if any(row.get(key) not in (None, '') for row in rows)}
    return dict(kind='table', title=title, note=note, columns=[
        dict(key=key, label=label(key), digits=n if isinstance(n, int) else None) for key, n in columns.items()],
        rows=[{key: row.get(key) for key in [*columns, 'href']} for row in rows])


def in_order(rows, sort):
    """{validation text: its runs, by bits per byte}, each with its rank; and all, one text after the other,
    by the key `sort`, falling where that begins with '-'; what lacks it last."""
    texts, key, ordered = {}, sort.removeprefix('-'), []
    for row in sorted(rows, key=lambda row: row['val_bpb']):
        same = texts.setdefault(row['text'], [])
        same.append(row | dict(rank=len(same) + 1))
    texts = dict(sorted(texts.items(), key=lambda item: -len(item[1])))
    for same in texts.values():
        have = [row for row in same if fits(row.get(key), float | str)]
        ordered += sorted(have, key=lambda row: (type(row[key]) is str, row[key]), reverse=key != sort)
        ordered += [row for row in same if row not in have]
    return texts, ordered


def leaderboard(own, rest):
    """Rank every finished run under a folder; prints the table, and leaves leaderboard.md and .html there."""
    refuse(len(rest) > 1 or any(a.startswith('--') for a in rest),
           f'--leaderboard takes one folder, --sort and --where, and got {" ".join(rest)}')
    folder, sort = Path(rest[0] if rest else 'out'), own.sort
    rows, left_out = finished_runs(folder)
    none = f'{folder} holds no finished run: make one, or name another folder'
    refuse(not rows, '\n  '.join([none, *left_out[:3]]))
    known = {key for row in rows for key, v in row.items() if isinstance(v, (int, float, str))}
    key = key_of(sort.removeprefix('-'), known, 'sort')
    rows = where(rows, own.where, known) if own.where else rows
    refuse(not rows, f'--where {own.where!r} leaves no run')
    texts, ordered = in_order(rows, sort)
    columns = dict(rank=0, run=None, total_params=0) | {f'BPB {text}': 4 for text in texts}
    columns |= dict.fromkeys((name for row in rows for name in row['abilities']), 4) | LEADERS
    columns |= {key: ON_PAGE.get(key)} if key not in {**columns, 'val_bpb': 4} else {}
    notes = ['Rank: by bits per byte (BPB), among runs evaluated on the same text by the same protocol.',
             *[f'Only runs with {own.where}.'] * bool(own.where)]
    theirs = [{'run': name, 'total_params': n, f'BPB {data}': bpb} for name, n, data, bpb in PUBLISHED]
    their_columns = dict(run=None, total_params=0) | {key: 2 for row in theirs for key in row if 'BPB' in key}
    laws = [module.shown for name in verbs('bench') if hasattr(module := verb('bench', name), 'shown')]
    text = '\n'.join([*text_table(columns | dict(notes=None), ordered), '', ' '.join(notes), *left_out, '',
                      ELSEWHERE, '', *text_table(their_columns, theirs)])
    sample.write_beside(folder / 'leaderboard.md', lambda f: f.write(f'{text}\n'.encode(errors='replace')))
    sample.write_page(folder / 'leaderboard.html', f'halfhour leaderboard: {len(rows)} runs', blocks=[
        table_block('Runs', ' '.join(notes), columns | ON_PAGE | dict(notes=None), ordered),
        table_block('Published elsewhere', ELSEWHERE, their_columns, theirs),
        *front_blocks(texts), *progress_blocks(texts), *compared_blocks(folder),
        *(block for shows in laws for text, same in texts.items() for block in shows(text, same)),
        *[dict(kind='text', title='Left out', text='\n'.join(left_out))] * bool(left_out)])
    print(f'{text}\n\n{folder / "leaderboard.html"} has all columns and the curves')


# ---- main --------------------------------------------------------------------------------------------------

STEP_COLUMNS = dict(name=None, step_ms=1, min_ms=1, max_ms=1, tok_per_sec=0, of_gemm='.0%', mfu='.1%', mfu_palm='.1%',
                    peak_mem_gb=2, data_wait='.2%', versus_ours=2)
KERNEL_COLUMNS = dict(rival=None, ms=3, min_ms=3, max_ms=3, floor_ms=3, both_ms=3, both_min_ms=3, both_max_ms=3,
                      floor_both_ms=3, mem_mb=0, versus_ours=2)         # both: forward and backward


def measure_steps(run, argv):
    """Our step, by itself and with others, and where its time goes."""
    runs = contestants(run, argv)
    rows, gemm, faults = compare(runs, run.s.rounds, run.peak())
    print(*text_table(STEP_COLUMNS, rows), sep='\n')
    for name, why in faults.items():
        print(f'{name}: does not run here ({why})')
    where = where_time_goes(run, run.device)
    print(f'where a step of ours goes, {where["busy_share"]:.0%} of the time busy: '
          + ', '.join(f'{k} {v:.0%}' for k, v in where['shares'].items()) + f' (most of it {where["largest_other"]})')
    for one in runs.values():
        one.batches.close()
        one.optimizers = None                       # their memory is wanted
    return dict(rows=rows, gemm=gemm, faults=faults, where=where)


def measure_kernels(run, idx, rates):
    """Every operation of a layer beside its rivals."""
    found = []
    operations = Operations(run.config, idx, run.model.first_visible(idx), run.dtype, run.compiling)
    for name, *case in operations.each(run.ideas.modules if run.device == 'cuda' else ()):
        rows = kernel_rows(name, *case, run.s.rounds, rates)
        print(name, *text_table(KERNEL_COLUMNS, [r for r in rows if not r['fault']]),
              *(f'{r["rival"]}: does not run here ({r["fault"]})' for r in rows if r['fault']), '', sep='\n')
        found += rows
    return dict(kernels=found)


def try_micro_batches(run):
    """Tokens a second of ours with each micro-batch, in turn; prints which is best."""
    rows, words = run.s.tokens_per_step // run.config.block_size, run.s.micro_batches.split(',')
    wrong = [word for word in words if not word.isdecimal() or int(word) < 1 or rows % int(word)]
    refuse(wrong, f'--micro_batches names {wrong[:1]}: each must divide the {rows} sequences of a step, like 32,64')
    runs = {int(n): type(run)(run.s, micro=int(n), **run.shape_given) for n in words}
    times, faults = seconds_each({n: one.step for n, one in runs.items()}, run.device, run.s.rounds, 0)
    speeds = {n: run.s.tokens_per_step / statistics.median(t) for n, t in times.items()}
    for n, one in runs.items():
        said = f'{speeds[n]:12,.0f} tok/s' if n in speeds else f'does not run ({faults[n]})'
        print(f'micro_batch_size {n:5}: {said}')
        one.batches.close()
    if speeds:
        print(f'best: --micro_batch_size={max(speeds, key=speeds.get)}')
    return dict(micro_batches=speeds)


def measure(s, ideas, argv, **shape):
    """Everything about one shape of model, printed and returned."""
    run = measured(ideas)(s, optimizer='muon', **shape)
    run.shape_given = shape
    config, T, peak, name = run.config, run.config.block_size, run.peak(), sample.hardware(run.device)
    run.choose_kernels()
    print(f'{name}, {str(run.dtype)[6:]}, {s.tokens_per_step:,} tokens a step\n{run.model.describe()}')
    print(f'micro-batches of {run.micro} x {T}', *run.said, sep='\n')
    idx = torch.from_numpy(run.stream.first_rows(run.micro, T)).to(run.device)
    rates, attended = machine(config, run.micro * T, run.device, run.dtype), run.model.attended(idx)
    print(f'matrix products of {rates["rows"]:,} rows, GFLOP/s: '
          + ', '.join(f'{k} {v / 1e9:,.0f}' for k, v in rates['products'].items())
          + f'; together {rates["gemm"] / 1e9:,.0f}; copying {rates["copy"] / 1e9:,.1f} GB/s')
    print(f'a token attends to {attended:.1f} of {T} positions; data-sheet peak '
          + (f'{peak / 1e12:.1f} TFLOP/s' if peak else 'not known for this hardware: no MFU'))
    result = dict(hardware=name, torch=torch.__version__, peak=peak, dtype=str(run.dtype)[6:], config=vars(config),
                  ideas=[name for name, _, named in ideas.sources() if named], machine=rates, attended=attended,
                  micro_batch_size=run.micro)
    if s.micro_batches:
        return result | try_micro_batches(run)
    result |= measure_steps(run, argv) if s.only != 'kernels' else {}
    return result | (measure_kernels(run, idx, rates) if s.only != 'steps' else {})


def measure_all(s, ideas, argv):
    """That of the settings, or of each of the shapes asked for."""
    torch._dynamo.config.recompile_limit = 64          # contestants share the model's code
    derived, results = dict.fromkeys(('n_kv_head', 'head_dim', 'rotary_dim', 'mlp_hidden'), 0), []
    for name in s.shapes.split(',') if s.shapes else []:
        refuse(name not in SHAPES, f'--shapes names {name!r}; there are {", ".join(SHAPES)}')
        shape = derived | SHAPES[name] | dict(tie_embeddings=True)
        rows = max(1, s.micro_batch_size * s.block_size // shape['block_size'])
        results.append(measure(s, ideas, argv, **shape, micro_batch_size=rows))
    return dict(shapes=results) if results else measure(s, ideas, argv)


def main(argv):
    if {'-h', '--help'} & set(argv):
        return print(__doc__, docs('bench'), sep='\n')
    own, rest, words, modules = own_options(argv)
    refuse(len(modules) > 1, f'{" and ".join(map(name_of, modules))} are asked for: one at a time')
    if modules:
        return modules[0].main(own, rest, argv)
    if own.leaderboard:
        return leaderboard(own, rest)
    if own.compare:
        return compare_runs(own, rest, argv)
    s, ideas = train.read_settings(words, TABLES)
    if s.compile_for:
        return compile_for(s, ideas)
    building = s.kernels == 'compile-only'
    result = dict(builds=compile_only(words)) if building else measure_all(s, ideas, words)
    if s.json:
        sample.write_beside(at_home(s.json), lambda f: f.write(sample.as_json(result, indent=1).encode()))
    if building:
        over, n = [r for r in result['builds'] if r['over']], len(result['builds'])
        refuse(over, f'{len(over)} of {n} builds are over the limits')
        print(f'{n} builds, all within the limits of their cards')


if __name__ == '__main__':
    print_without_fail()
    try:
        main(sys.argv[1:])
    except (UserError, OSError, MemoryError, RuntimeError, train.Stopped) as e:
        print(f'bench_mfu.py: {in_words(e)}', file=sys.stderr)
        sys.exit(75 if isinstance(e, train.Stopped) else 2)
    except KeyboardInterrupt:
        print('bench_mfu.py: stopped', file=sys.stderr)
        sys.exit(130)

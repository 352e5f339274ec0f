"""Measure the machine: what a training step costs here, where the time goes, and what other code would take.

    python bench_mfu.py config/babylm.py                            all that follows, for the card it finds
    python bench_mfu.py config/babylm.py --only=steps               step time, MFU, memory; ours and rivals
    python bench_mfu.py config/babylm.py --only=kernels             every kernel beside its rivals
    python bench_mfu.py config/babylm.py --shapes=11M,34M,97M       the same for models of these sizes
    python bench_mfu.py config/babylm.py --micro_batches=32,64,128  which micro-batch is best
    python bench_mfu.py config/babylm.py --kernels=compile-only     build them all without a GPU, check limits
    python bench_mfu.py config/babylm.py --rival_lr=1e-3            train the rival for budget_minutes instead
    python bench_mfu.py --compare config/babylm.py config/a.py      whole runs: ideas beside their base
    python bench_mfu.py --leaderboard out                           a table and a page of all finished runs
    python bench_mfu.py --dynamics out/a out/b                      which layers of runs are done when
    python bench_mfu.py --sweep "n_embd=128,192,256;learning_rate=1e-2,2e-2,4e-2" config/babylm.py     laws

Configs and overrides are train.py's, and so is the step that is measured; --rounds=12 says how often,
--json=FILE keeps all of it. All contestants run in one process and take turns, so that a machine that drifts
drifts for all. The rival is what nanoGPT does on this device: LayerNorm, GELU, learned positions,
scaled_dot_product_attention, all logits at once, AdamW, random windows of the token stream; in fp32 on a CPU,
as nanoGPT runs there, and in bf16 autocast, where the hardware has it.

MFU is the share of the card's data-sheet peak that model FLOPs make up: with the positions really attended to
(`exact`), and as Chowdhery 2022 (2204.02311) counts them, all T for every token. A card that is not in
train.py's table gets none. `of GEMM` is the share of matrix products measured here, of this model's shapes.

--compare starts train.py for the base, the first config, and for each other config stacked on it, in turn, at
the same budget on the same data: --seeds=3 of the base, --idea_seeds=1 of each idea. a.py+b.py is one stack,
--key=value is for all, --compare_dir (out/compare/<base>) keeps runs and table. The same command again skips
what is finished, goes on with what was stopped and tries again what failed.

--leaderboard reads every result.json under a folder (out), and leaves leaderboard.md and leaderboard.html
in it: --sort=total_params, or what else a result.json names, a - before it for high to low;
--where "n_layer == 4 and total_params < 12e6".

--sweep makes every point of a grid in the same way, --seeds=3 times each, into out/sweep/<configs>, and fits:
bits per byte against parameters and tokens, the best size for a budget, the best learning rate at a width.
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
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import model as m
import sample
import train
from model import GPT, Attention, GPTConfig
from prepare_data import UserError

# ---- the rival ---------------------------------------------------------------------------------------------

class PlainBlock(nn.Module):
    def __init__(self, C, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(self.ln_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in qkv)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(o.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class PlainGPT(nn.Module):
    """GPT-2 (Radford 2019), its paper's initialisation and tied head; the interface of model.GPT."""

    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.n_embd
        self.wte, self.wpe = nn.Embedding(config.vocab_size, C), nn.Embedding(config.block_size, C)
        self.blocks = nn.ModuleList(PlainBlock(C, config.n_head) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02 / math.sqrt(2 * config.n_layer) if 'proj' in name or 'down' in name else 0.02
                nn.init.normal_(p, std=std)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, idx, targets, reduction='mean'):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1,
                               reduction=reduction)
        return loss if reduction == 'mean' else loss.view_as(targets)


class PlainTrainer:
    """The rival's whole step: draw random windows, forward, backward, clip, AdamW."""

    def __init__(self, config, tokens, s, micro, device, bf16, learning_rate=1e-3, compile=True):
        torch.manual_seed(s.seed)
        self.model = PlainGPT(config).to(device)
        self.step_model = torch.compile(self.model, dynamic=False) if compile else self.model
        self.tokens, self.micro, self.T, self.coming = tokens, micro, config.block_size, None
        self.device, self.lr = device, learning_rate
        self.accum = s.tokens_per_step // (micro * config.block_size)
        self.autocast = lambda: torch.autocast(device, torch.bfloat16) if bf16 else nullcontext()
        decay = [p for p in self.model.parameters() if p.ndim == 2]
        rest = [p for p in self.model.parameters() if p.ndim != 2]
        groups = [dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)

    def batch(self):
        first = torch.randint(len(self.tokens) - self.T, (self.micro,))
        pair = [torch.stack([torch.from_numpy(self.tokens[i:i + self.T].astype(np.int64)) for i in starts])
                for starts in (first, first + 1)]
        if self.device == 'cuda':
            pair = [t.pin_memory().to(self.device, non_blocking=True) for t in pair]
        return pair

    def step(self, progress=0.5):
        """One optimizer step; a linear rise over 2% of progress, then a cosine to a tenth."""
        if progress < 0.02:
            rate = progress / 0.02
        else:
            rate = 0.1 + 0.45 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98))
        for group in self.optimizer.param_groups:
            group['lr'] = self.lr * rate
        total = 0.0
        for _ in range(self.accum):
            idx, targets = self.coming or self.batch()
            with self.autocast():
                loss = self.step_model(idx, targets) / self.accum
            self.coming = self.batch()              # while the device is busy
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)


def train_rival(s, config, data, micro, device, bf16, learning_rate, compile):
    """Train the rival for budget_minutes of training alone: start-up, compilation and evaluation are free."""
    rival = PlainTrainer(config, data.tokens['train'], s, micro, device, bf16, learning_rate, compile)
    rival.step(0.0)                                  # compiles
    budget, began, steps, progress = 60 * s.budget_minutes, time.monotonic(), 0, 0.0
    while progress < 1:
        loss = rival.step(progress)
        steps += 1
        progress = (time.monotonic() - began) / budget
        if steps % 50 == 0:
            speed = steps * s.tokens_per_step / (time.monotonic() - began)
            print(f'{steps:8d} {progress:8.4f} {loss:9.4f} {speed:9,.0f} tok/s', flush=True)
    seconds = time.monotonic() - began
    rival.model.eval()
    with rival.autocast():
        result = sample.bits_per_byte(rival.model, data.tokens['val'], data.docs['val'])
    return dict(learning_rate=learning_rate, bf16=bf16, val_bpb=result['bpb'], steps=steps,
                tokens=steps * s.tokens_per_step, train_seconds=seconds,
                total_params=sum(p.numel() for p in rival.model.parameters()), val_share=result['share'])


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


def matmul_flops(config, tokens, device, dtype, seconds=0.3):
    """FLOP/s of the MLP's products, (tokens, C) x (C, 4C) and back: the best of several runs."""
    a = torch.randn(tokens, config.n_embd, device=device, dtype=dtype)
    b = torch.randn(config.n_embd, config.mlp_hidden, device=device, dtype=dtype)
    best, began = math.inf, time.monotonic()
    several = 10 if device == 'cuda' else 1        # a fast card is done before it is asked again
    while time.monotonic() - began < seconds:
        wait_for(device)
        started = time.perf_counter()
        for _ in range(several):
            c = a @ b
            d = c @ b.t()
        wait_for(device)
        best = min(best, (time.perf_counter() - started) / several)
    del c, d
    return 4 * tokens * config.n_embd * config.mlp_hidden / best


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
    before = set(m.IN_USE)
    m.IN_USE.clear()
    m.IN_USE.update(kernels)
    try:
        yield
    finally:
        m.IN_USE.clear()
        m.IN_USE.update(before)


class Ours:
    """The step of train.py, batches prefetched as there."""

    def __init__(self, s, config, data, micro, device, dtype, compile, optimizer='muon', kernels=()):
        torch.manual_seed(s.seed)
        self.model = GPT(config).to(device)
        self.model.compute_dtype, self.kernels, self.waited = dtype, kernels, 0.0
        self.settings = type(s)(**{**vars(s), 'optimizer': optimizer})
        self.optimizers = train.make_optimizers(self.model, self.settings, dtype)
        self.step_model = torch.compile(self.model, dynamic=False) if compile else self.model
        self.stream = train.make_stream(s, data)
        self.batches = train.Prefetcher(self.stream, 0, s.tokens_per_step // config.block_size, micro,
                                        config.block_size, 0, 1, device)
        self.number = -1

    def step(self):
        self.number += 1
        self.stream.pace(self.number, 0.5)
        micro_batches, wait = self.batches.next(self.number)
        self.waited += wait
        with using(self.kernels):
            train.train_step(self.step_model, self.model, self.optimizers, micro_batches, 0.5, self.settings)


def contestants(s, config, data, micro, device, dtype, compile):
    """{name: (trainer, dtype)}; the second half are rivals, and the last but one the yardstick."""
    bf16, both = torch.bfloat16, {}
    kernels = set(m.IN_USE)

    def add(name, kind, *args, **more):
        both[name] = Ours(s, config, data, micro, device, kind, compile, *args, **more), kind

    def plain(name, use_bf16, compile):
        rival = PlainTrainer(config, data.tokens['train'], s, micro, device, use_bf16, compile=compile)
        both[name] = rival, bf16 if use_bf16 else torch.float32

    add('ours, Muon', dtype, 'muon', kernels=kernels)
    add('ours, AdamW', dtype, 'adamw', kernels=kernels)
    if device == 'cuda':
        add('ours without kernels, Muon', dtype, 'muon')
        plain('plain GPT-2, bf16, compiled', True, compile)
        plain('plain GPT-2, bf16, eager', True, False)
    else:
        add('ours, AdamW, fp32', torch.float32, 'adamw')
        plain('plain GPT-2, fp32', False, compile)
        plain('plain GPT-2, bf16 autocast', True, compile)
    return both


def compare(runners, s, config, attended, micro, device, rounds, peak):
    """A row for each contestant: step time, speed, MFU, memory, data wait; all take turns in every round."""
    memory, faults = {}, {}
    for name, (trainer, _) in list(runners.items()):       # compile, and settle
        try:
            trainer.step()
            trainer.step()
        except Exception as e:
            if name.startswith('ours, '):
                raise
            faults[name] = first_line(e)
            del runners[name]
            continue
        if device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            trainer.step()
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2 ** 30
        trainer.waited = 0.0
    times, gemm, n = {name: [] for name in runners}, {}, micro * config.block_size
    for _ in range(rounds):
        for name, (trainer, kind) in runners.items():
            gemm.setdefault(kind, []).append(matmul_flops(config, n, device, kind, 0.05))
            wait_for(device)
            began = time.perf_counter()
            trainer.step()
            wait_for(device)
            times[name].append(time.perf_counter() - began)
    base = next((times[name] for name in times if name.startswith('plain')), times['ours, Muon'])
    keys, rows = ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd'), []
    plain = GPTConfig(**{key: getattr(config, key) for key in keys})
    for name, (trainer, kind) in runners.items():
        is_ours = isinstance(trainer, Ours)            # the rival attends to all that went before
        exact = config.flops_per_token(attended) if is_ours else plain.flops_per_token()
        palm = (config if is_ours else plain).flops_per_token(config.block_size)
        median = statistics.median(times[name])
        speed = s.tokens_per_step / median
        rows.append(dict(
            name=name, step_ms=1e3 * median, min_ms=1e3 * min(times[name]), max_ms=1e3 * max(times[name]),
            tok_per_sec=speed, flops_per_sec=speed * exact, mfu=speed * exact / peak if peak else None,
            mfu_palm=speed * palm / peak if peak else None,
            of_gemm=speed * exact / statistics.median(gemm[kind]), peak_mem_gb=memory.get(name),
            data_wait=trainer.waited / sum(times[name]) if is_ours else None,
            speedup=statistics.median(b / a for a, b in zip(times[name], base))))
    return rows, {str(k).removeprefix('torch.'): statistics.median(v) for k, v in gemm.items()}, faults


# what the profiler calls operations; the first that fits counts
GROUPS = {'attention': r'attention_|qk_|flash|fmha|softmax|sdpa',
          'matrix products': r'gemm|cutlass|nvjet|xmma|cublas|mkldnn|mlp_kernel|aten::(mm|addmm|bmm|linear)',
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

def operations(config, idx, device, dtype, compile):
    """Yield (name, FLOPs, bytes, {rival: function of the inputs}, inputs) of one layer's operations.

    FLOPs and bytes are those of a forward pass that touches memory once for each input and output.
    """
    (B, T), C, D, V = idx.shape, config.n_embd, config.head_dim, config.vocab_size
    H, HK, N, size = config.n_head, config.n_kv_head, idx.numel(), dtype.itemsize
    build = (lambda f: torch.compile(f, dynamic=False)) if compile else (lambda f: f)
    on_gpu, chosen = device == 'cuda', set(m.IN_USE)

    def inputs(*shapes):
        return [torch.randn(shape, device=device, dtype=dtype) / (shape[-1] ** 0.5 if len(shape) == 2 else 1)
                for shape in shapes]

    def ours(function, *kernels):
        built = build(function)

        def run(*args):
            with using(chosen & set(kernels)):
                return built(*args)
        return run

    # attention with all that belongs to it, on documents as they are in the data
    gpt, layer = GPT(config).to(device), Attention(config, 0).to(device)
    first = gpt.first_visible(idx)
    low, last, cos, sin = first.int(), m.last_visible_to(first).int(), gpt.cos, gpt.sin
    pairs = int((torch.arange(T, device=device) - first + 1).sum())

    there, back = torch.arange(T, device=device), torch.arange(T, device=device)[:, None]
    seen = ((there <= back) & (there >= first[:, :, None]))[:, None]

    def by_torch(qkv):
        q, k, v = layer.heads(qkv, idx, cos, sin)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=layer.scale, enable_gqa=H != HK)
        return o.transpose(1, 2)

    def by_ours(qkv):
        if 'attention' in m.IN_USE:
            return m.attend(layer, qkv, idx, cos, sin, low, last)
        return m.attention(*layer.heads(qkv, idx, cos, sin), first, layer.scale).transpose(1, 2)

    def by_flex(qkv):
        q, k, v = layer.heads(qkv, idx, cos, sin)
        o = flex_attention(q, k, v, block_mask=blocks, scale=layer.scale, enable_gqa=H != HK)
        return o.transpose(1, 2)

    rivals = {'ours': ours(by_ours, 'attention', 'qk_norm'), 'torch, SDPA with a mask': by_torch,
              'compiled, SDPA with a mask': build(by_torch)}
    if on_gpu:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        visible = lambda b, h, i, j: (j <= i) & (j >= first[b, i])
        blocks = create_block_mask(visible, B, None, T, T, device=device)
        rivals['compiled FlexAttention, same mask'] = build(by_flex)
    packed = (B, T, H + 2 * HK, D)
    yield ('attention, documents, QK-norm, RoPE', 4 * D * H * pairs, size * N * (2 * H + 2 * HK) * D, rivals,
           inputs(packed))

    # attention alone, causal
    zero, end = torch.zeros_like(first).int(), torch.full_like(last, T - 1)

    def plainly(qkv):
        if 'attention' in m.IN_USE:
            none = cos[:, :0]
            return m.attend_forward(qkv, idx, zero, end, none, none, H, D ** -0.5, False, False, 0)[0]
        q, k, v = qkv.transpose(1, 2).split([H, HK, HK], dim=1)
        return m.attention(q, k, v, zero, D ** -0.5).transpose(1, 2)

    def sdpa(backend=None):
        from torch.nn.attention import sdpa_kernel

        def run(qkv):
            q, k, v = qkv.transpose(1, 2).split([H, HK, HK], dim=1)
            with sdpa_kernel(backend) if backend is not None else nullcontext():
                o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != HK)
            return o.transpose(1, 2)
        return run

    rivals = {'ours': ours(plainly, 'attention'), 'SDPA, its own choice': sdpa()}
    if on_gpu:
        from torch.nn.attention import SDPBackend as backends
        rivals |= {'SDPA, FlashAttention': sdpa(backends.FLASH_ATTENTION),
                   'SDPA, cuDNN': sdpa(backends.CUDNN_ATTENTION),
                   'SDPA, memory-efficient': sdpa(backends.EFFICIENT_ATTENTION)}
    yield ('attention, causal', 4 * D * H * B * T * (T + 1) // 2, size * N * (2 * H + 2 * HK) * D, rivals,
           inputs(packed))

    def add_norm(x, y):
        s = x + y
        return s, m.rms_norm(s)

    rivals = {'ours': ours(m.add_norm, 'rms_norm'), 'torch': add_norm, 'compiled': build(add_norm)}
    yield 'residual + RMSNorm', 6 * N * C, 4 * size * N * C, rivals, inputs((N, C), (N, C))

    gated, hidden = config.mlp == 'swiglu', config.mlp_hidden

    def mlp(x, up, down):
        x = x @ up.t()
        if gated:
            gate, x = x.chunk(2, dim=-1)
            return (F.silu(gate) * x) @ down.t()
        return F.relu(x).square() @ down.t()

    fused = (lambda *t: m.mlp_forward(*t, gated)[0]) if 'mlp' in chosen else mlp
    rivals = {'ours': ours(fused, 'mlp'), 'torch': mlp, 'compiled': build(mlp)}
    yield (f'MLP, {config.mlp}', 2 * N * C * hidden * (3 if gated else 2), size * N * (2 * C + 2 * hidden),
           rivals, inputs((N, C), (hidden * (1 + gated), C), (C, hidden)))

    targets = torch.randint(0, V, (N,), device=device)
    table = torch.randn(V, 16, device=device) / 4
    soft = table, m.similarity_norm(table), torch.tensor(0.8, device=device)

    def all_logits(x, w):
        return F.cross_entropy((x @ w.t()).float(), targets)

    def loss(soft=()):
        return ours(lambda x, w: m.linear_cross_entropy(x, w, targets, soft=soft), 'cross_entropy')

    rivals = {'ours': loss(), 'ours, soft targets': loss(soft),
              'torch, all logits': all_logits, 'compiled, all logits': build(all_logits)}
    import torch._inductor.config as inductor
    if on_gpu and hasattr(inductor, 'auto_chunker'):       # it compiles as it is what it cannot cut
        chunked = torch.compile(all_logits, dynamic=False, options={'auto_chunker.enable': True})
        rivals['compiled, auto-chunker'] = chunked
    if hasattr(F, 'linear_cross_entropy'):                  # from torch 2.13 on
        options = torch.nn.LinearCrossEntropyOptions()
        rivals['F.linear_cross_entropy'] = lambda x, w: F.linear_cross_entropy(x, w, targets, options=options)
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
        rivals['Liger-Kernel'] = lambda x, w: liger(x, w, targets)
    except ImportError:
        pass
    yield 'linear + cross-entropy', 2 * N * C * V, size * (N * C + V * C), rivals, inputs((N, C), (V, C))


def kernel_table(config, idx, device, dtype, compile, rounds, rates):
    """A row for every operation and rival: forward, and with backward; median, spread, floor, memory."""
    rows = []
    for name, flops, size, rivals, tensors in operations(config, idx, device, dtype, compile):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.no_grad():
            outputs = rivals.get('torch', rivals['ours'])(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.randn_like(o) if o.ndim else torch.ones_like(o) for o in outputs]

        def both(function):
            return lambda: torch.autograd.grad(function(*leaves), leaves, grads)

        def forward(function):
            def run():
                with torch.no_grad():
                    function(*tensors)
            return run

        trained, faults = seconds_each({k: both(f) for k, f in rivals.items()}, device, rounds)
        alone = {k: forward(f) for k, f in rivals.items()}
        # our loss makes its gradients on the way forward: alone it would compare two things
        alone = {} if 'entropy' in name else seconds_each(alone, device, rounds)[0]
        floor = max(flops / rates['gemm'], size / rates['copy'])
        for rival, function in rivals.items():
            row = dict(operation=name, rival=rival, fault=faults.get(rival), floor_ms=1e3 * floor,
                       floor_both_ms=1e3 * max(3 * flops / rates['gemm'], 2 * size / rates['copy']))
            for key, times in (('', alone), ('both_', trained)):
                if ms := [1e3 * t for t in times.get(rival, [])]:
                    row |= {f'{key}ms': statistics.median(ms), f'{key}min_ms': min(ms),
                            f'{key}max_ms': max(ms)}
            if device == 'cuda' and rival in trained:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                both(function)()
                row['mem_mb'] = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
            if rival in trained and 'ours' in trained:
                row['versus_ours'] = statistics.median(b / a for a, b in zip(trained['ours'], trained[rival]))
            rows.append(row)
    return rows


# ---- building every kernel without a GPU -------------------------------------------------------------------

SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 120: 101376}    # bytes for a program, by architecture
SPILLED = 64                                                         # bytes of stack that are let pass
FAMILY = (      # what kernels branch on, and the widths of models of 11M, 34M and 97M parameters
    dict(n_embd=320, n_head=5, dtype='float32'),
    dict(n_embd=512, n_head=4, n_kv_head=2, mlp='swiglu', vocab_size=16384),
    dict(n_embd=512, n_head=4, n_kv_head=2, mlp='swiglu', dtype='float32'),
    dict(n_embd=768, n_head=12, n_kv_head=1, rotary_dim=32, block_size=1024, vocab_size=16384),
    dict(n_embd=256, n_head=8, qk_norm=False, token_shift=False, logit_softcap=15.0, z_loss=1e-4),
    dict(n_embd=200, n_head=2, head_dim=16, mlp='swiglu', mlp_hidden=600, vocab_size=50257))


def every_kernel(config, dtype):
    """Go through forward and backward of all operations of a model, on the CPU, with whatever m.launch is."""
    B, T, C, D, H, HK = 1, config.block_size, config.n_embd, config.head_dim, config.n_head, config.n_kv_head
    x = torch.zeros(T, C, dtype=dtype)
    idx, ends = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.int32)
    cos = torch.zeros(T, config.rotary_dim // 2)
    qkv = torch.zeros(B, T, H + 2 * HK, D, dtype=dtype)
    places, flags = (idx, ends, ends, cos, cos), (config.qk_norm, config.token_shift, 0)
    o, *saved = m.attend_forward(qkv, *places, H, D ** -0.5, *flags)
    m.attend_backward(o, qkv, o, *saved, *places, D ** -0.5, *flags)
    for y, gain in ((x, None), (None, None), (x, torch.zeros(C))):
        s, _, rstd = m.add_norm_forward(x, y, gain, 1e-6)
        m.add_norm_backward(None if y is None else x, x, s if y is not None else x, rstd, gain)
    weight, targets = torch.zeros(config.vocab_size, C), torch.zeros(T, dtype=torch.long)
    hard = [None] * 3
    soft = [torch.zeros(config.vocab_size, 16), torch.zeros(config.vocab_size), torch.zeros(())]
    for mixture, grad in ((hard, True), (hard, False), (soft, True)):
        m.cross_entropy_forward(x, weight, targets, *mixture, config.logit_softcap, config.z_loss, grad, T)
    gated = config.mlp == 'swiglu'
    up = torch.zeros(config.mlp_hidden * (1 + gated), C, dtype=dtype)
    down = torch.zeros(C, config.mlp_hidden, dtype=dtype)
    y, a, h = m.mlp_forward(x, up, down, gated)
    m.mlp_backward(y, x, up, down, a, h, gated)


def compile_for(sm, configs):
    """Build every kernel of these models for an architecture, in its own process; prints rows as JSON."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    tools, rows = Path(m.triton.__file__).parent / 'backends' / 'nvidia' / 'bin', {}

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
    for options in configs:
        dtype = options.pop('dtype', 'bfloat16')
        config = GPTConfig(**options)
        case = (f'{config.n_embd} wide, heads of {config.head_dim}, {config.mlp}, '
                f'vocabulary {config.vocab_size}, {dtype}')
        every_kernel(config, getattr(torch, dtype))
    print(json.dumps(list(rows.values())))


def compile_only(configs, targets=tuple(SHARED_MEMORY)):
    """Build every kernel of these models (dicts of options) for every architecture; rows, also printed."""
    if m.triton is None:
        raise UserError('--kernels=compile-only needs Triton: pip install -r requirements.txt')
    environment = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}

    def child(sm):
        command = [sys.executable, __file__, f'--compile_for={sm}', json.dumps(configs)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    rows = []
    for done in ThreadPoolExecutor(2).map(child, targets):
        if done.returncode:
            raise UserError(f'a kernel does not compile:\n{done.stderr[-3000:]}')
        rows += json.loads(done.stdout)
    heads = f'{"sm":>4}{"shared":>11}{"registers":>11}{"stack":>9}{"fp64":>6}'
    print(f'{"kernel, the most of its builds":30}{heads}')
    for sm in targets:
        for kernel in dict.fromkeys(r['kernel'] for r in rows):
            same = [r for r in rows if (r['sm'], r['kernel']) == (sm, kernel)]
            most = {k: max(r[k] for r in same) for k in ('shared', 'registers', 'stack', 'fp64')}
            print(f'{kernel:30}{sm:4}{most["shared"]:11,}{most["registers"]:11}{most["stack"]:9}'
                  f'{"yes" if most["fp64"] else "no":>6}   {len(same)} builds')
            for r in same:
                if r['over']:
                    print(f'    OVER THE LIMIT, {", ".join(r["over"])}: {r["case"]}')
    return rows


# ---- whole runs: a base, and ideas stacked on it -----------------------------------------------------------

SAME = ('dataset', 'budget_minutes', 'budget_counts', 'max_steps', 'max_tokens')  # of all runs
OURS = ('seed', 'out_dir', 'overwrite', 'dry_run', 'init_from')    # only a comparison sets these
COLUMNS = dict(seeds='d', val_bpb='.4f', sd='.4f', change='+.2%', in_sd='+.1f', total_params=',.0f',
               non_embedding_params=',.0f', active_params=',.0f', tokens=',.0f', epochs='.2f',
               train_seconds=',.0f', total_seconds=',.0f', tok_per_sec=',.0f', joules=',.0f')


def planned(own, argv):
    """The runs of a comparison in turn, the base's first; UserError lists the mistakes of all."""
    configs = [a for a in argv if not a.startswith('--')]
    names = ['+'.join(Path(part).stem for part in config.split('+')) for config in configs]
    train.refuse(not configs, '--compare names no config: it takes a base, then ideas')
    train.refuse(len({*names}) < len(names), f'two of {", ".join(names)} are called the same: rename one')
    root = Path(own['compare_dir'] or f'out/compare/{names[0]}')
    ideas = {}
    for name, config in zip(names, configs):
        kept = [a for a in argv if a.startswith('--') or a in (configs[0], config)]      # in their order
        ideas[name] = [part for a in kept for part in ([a] if a.startswith('--') else a.split('+'))]
    return checked(ideas, root, own['seeds'], own['idea_seeds'], SAME)


def checked(ideas, root, seeds, idea_seeds, same):
    """The runs of ideas {name: arguments}, the first of which is the base, that are alike in `same`."""
    runs, wrong = [], []
    for name, args in ideas.items():
        wrong += [f'{where}: a comparison has its own {key}'
                  for where, key, _ in train.assignments(args) if key in OURS]
        for seed in range(1, (idea_seeds if runs and name != runs[0].name else seeds) + 1):
            run = SimpleNamespace(name=name, seed=seed, folder=root / name / f'seed{seed}', fault='')
            run.args = [*args, f'--seed={seed}', f'--out_dir={run.folder}']
            try:
                run.s = train.read_settings(run.args)
            except UserError as e:
                wrong += [line.strip() for line in str(e).splitlines()[1:]]
                break
            runs.append(run)
            wrong += [f'{name} has {key} {theirs!r}, the base {ours!r}: they must be equal' for key in same
                      if (theirs := vars(run.s)[key]) != (ours := vars(runs[0].s)[key])]
    train.refuse(wrong, '\n  '.join(['these runs cannot be compared:', *dict.fromkeys(wrong)]))
    for run in runs:
        look(run)
    # the base's seeds lie evenly among the others, so that an hour's noise is not taken for theirs
    others = sorted((run for run in runs if run.name != runs[0].name), key=lambda run: run.seed)
    turn = {id(run): i / len(others) for i, run in enumerate(others)}
    return sorted(runs, key=lambda run: turn.get(id(run), (run.seed - 1) / seeds))


def look(run):
    """Find what there is of a run: its result, or that it has begun; refuses one of other settings."""
    result = run.folder / 'result.json'
    run.result = json.loads(result.read_text()) if result.exists() else None
    run.begun = any((run.folder / name).exists() for name in ('ckpt.pt', 'ckpt.prev.pt'))
    found = run.result or (sample.read_checkpoint(run.folder) if run.begun else dict(settings={}))
    then, now = (json.loads(json.dumps(x)) for x in (found['settings'], vars(run.s)))   # tuples to lists
    differ = [f'{k} (was {then[k]!r}, now {v!r})' for k, v in now.items()
              if k not in ('out_dir', 'init_from') and then.get(k, v) != v]
    train.refuse(differ, f'{run.folder} holds a run with other settings: {", ".join(differ)}; '
                         f'delete it, or choose another --compare_dir')


def make(run):
    """Start train.py as its user would, or go on with what it saved; KeyboardInterrupt if it was stopped."""
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, train.__file__, *run.args, *['--init_from=resume'] * run.begun]
    with open(run.folder / 'log.txt', 'a') as log, tempfile.TemporaryDirectory() as cache:
        # what one run has compiled would take a part off the next one's bill
        caches = dict(TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f'{cache}/triton')
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | caches)
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.terminate()                   # it saves
            child.wait()
            raise
    if code == 75:
        raise KeyboardInterrupt
    if code:
        last = (run.folder / 'log.txt').read_text().rstrip().rpartition('\n')[2]
        run.fault = f'seed {run.seed}: exit code {code}, {last}'


def ranked(runs):
    """A row for each idea, best first: means over its seeds, and how it does beside the base with them, which
    reads the same text in the same order, so that much of what a seed brings cancels."""
    rows = []
    by_seed = {run.seed: run.result['val_bpb'] for run in runs if run.result and run.name == runs[0].name}
    for name in dict.fromkeys(run.name for run in runs):
        mine = [run for run in runs if run.name == name]
        results = [r | {e: v['accuracy'] for e, v in r['evals'].items()} for run in mine if (r := run.result)]
        notes = ['base'] * (not rows) + [run.fault for run in mine if run.fault]
        rows.append(row := dict(name=name, seeds=len(results), notes=notes))
        if not results:
            continue
        for key in [*COLUMNS, *results[0]['evals']]:
            if all(r.get(key) is not None for r in results):
                row[key] = statistics.fmean(r[key] for r in results)
        if len(results) > 1:
            row['sd'] = statistics.stdev(r['val_bpb'] for r in results)
        base, sd = rows[0], rows[0].get('sd')
        pairs = [(run.result['val_bpb'], by_seed[run.seed]) for run in mine
                 if run.result and run.seed in by_seed]
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
    columns = columns | {e: '.4f' for r in results for e in r['evals']}
    table = [['rank', 'idea', *columns, 'notes']]
    for place, row in enumerate(rows, 1):
        cells = [{'joules': 'not measured'}.get(key, '-') if row.get(key) is None else f'{row[key]:{form}}'
                 for key, form in columns.items()]
        rank, remarks = str(place) if row['seeds'] else '-', '; '.join(row['notes']).replace('|', '/')
        table.append([rank, row['name'], *cells, remarks])
    lines = [*markdown(table), '', *notes]
    for key in ('commit', 'hardware', 'val_share'):
        if len(kinds := {json.dumps(r[key]) for r in results}) > 1:
            lines.append(f'Not all runs have the same {key}: {", ".join(sorted(kinds))}.')
    return '\n'.join(lines)


def keep_table(runs, root):
    """Rank the runs; the table in Markdown, which compare.md keeps, and compare.json its rows."""
    text = as_table(rows := ranked(runs), runs, COLUMNS,
                    'change: beside the base with its seeds; sd: standard deviation of val_bpb over seeds; '
                    'in_sd: the change in sd of the base.',
                    'Within noise: less than 2 of them, or not known, as one seed of the base has no sd.')
    sample.write_beside(root / 'compare.md', lambda f: f.write(text.encode() + b'\n'))
    sample.write_beside(root / 'compare.json', lambda f: f.write(json.dumps(rows, indent=1).encode()))
    return text


def say_runs(runs, root):
    """What there is to do, how long it takes, and what each idea changes."""
    base, left = runs[0], [run.s.budget_minutes for run in runs if not run.result]
    hours = sum(left) / 60
    print(f'{len(runs)} runs in {root}, {len(left)} to make, a budget of {hours:.1f} hours')
    for run in [run for run in runs if run.seed == 1]:
        sets = [f'{k}={v!r}' for k, v in vars(run.s).items() if v != vars(base.s)[k] and k != 'out_dir']
        print(f'{run.name}: {", ".join(sets) or "the settings of the base"}')
        parts = [arg for arg in run.args if arg not in base.args]
        for line in train.overruled(run.args):
            if sum(f'{part}:' in line for part in parts) > 1:      # not the base, which is the point
                print(f'  overruled: {line}')


def compare_runs(argv, plan=planned, keep=keep_table):
    """Make the runs of --compare that are not finished, one at a time, and rank all."""
    own, rest = own_options([a for a in argv if a != '--compare'])
    runs = plan(own, rest)
    root = runs[0].folder.parents[1]
    say_runs(runs, root)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        needs = ' '.join(dict.fromkeys(run.s.prepare for run in runs if run.s.prepare))
        wrong = []
        for run in runs:                        # on no run's bill, and with what any idea needs
            data = train.open_or_build(SimpleNamespace(**vars(run.s) | dict(prepare=needs)), 0)
            try:                                # what cannot be is said now, not in its turn
                train.growth_stages(run.s, train.model_config(run.s, data))
                train.make_stream(run.s, data)
            except UserError as e:
                wrong += [f'{run.name}: {e}'] * (not run.result)
        train.refuse(wrong, '\n  '.join(['these runs cannot be made:', *dict.fromkeys(wrong)]))
        for run in [run for run in runs if not run.result]:
            print(f'{run.name}, seed {run.seed}: {run.folder / "log.txt"}', flush=True)
            make(run)
            look(run)
            print(f'  {run.fault}' if run.fault else f'  val_bpb {run.result["val_bpb"]:.4f}', flush=True)
            keep(runs, root)
    except KeyboardInterrupt as e:
        again = shlex.join(['python', 'bench_mfu.py', *argv])
        raise train.Stopped(f'stopped, what was done is kept; to go on, the same again: {again}') from e
    print(keep(runs, root))


# ---- sweeps: a grid of runs, and the laws behind them ------------------------------------------------------

DRAWS, INTERVAL = 400, (0.05, 0.95)     # of a bootstrap, and the shares of its draws below either end
HUBER = 1e-3                            # of log loss: residuals above it count in proportion, not squared
LAW = 'E', 'A', 'alpha', 'B', 'beta'    # val_bpb = E + A / N^alpha + B / D^beta (Hoffmann 2022, 2203.15556)
SHOWN = 'seeds val_bpb sd active_params tokens epochs train_seconds total_seconds tok_per_sec'.split()


def swept(own, argv):
    """The runs of --sweep's grid in turn; UserError lists the mistakes of all."""
    at = [a.partition('=')[0] for a in argv].index('--sweep')
    text = argv.pop(at).partition('=')[2] or (argv.pop(at) if argv[at:] else '')
    parts = [part.partition('=') for part in re.sub(r'\s', '', text).split(';')]
    axes = [[f'--{key}={value}' for value in values.split(',')] for key, _, values in parts]
    ideas = {','.join(f'{key}={value}' for _, key, value in train.assignments(point)).replace('/', '_'):
             [*argv, *point] for point in itertools.product(*axes)}
    twice = len({part[0] for part in parts}) < len(parts) or len(ideas) < math.prod(map(len, axes))
    train.refuse(twice or any(arg.startswith('--=') or arg.endswith('=') for arg in sum(axes, [])),
                 f'--sweep is {text!r}, it must be like "n_embd=128,192;head_lr=1e-3,2e-3", nothing twice')
    configs, wrong = '+'.join(Path(a).stem for a in argv if not a.startswith('--')) or 'default', []
    root = Path(own['compare_dir'] or f'out/sweep/{configs}')
    for run in (runs := checked(ideas, root, own['seeds'], own['seeds'], SAME[:1])):
        try:
            GPTConfig(vocab_size=run.s.vocab_size, **{k: vars(run.s)[k] for k in train.MODEL_KEYS})
            train.adapt(run.s, train.choose_device(run.s), 1)
        except (ValueError, UserError) as e:
            wrong.append(f'{run.name}: {e}')
    train.refuse(wrong, '\n  '.join(['the grid has points that cannot be:', *dict.fromkeys(wrong)]))
    return runs


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
    """A chart of losses for sample.write_page; series of (name, x, loss, x and loss of a curve), all logs."""
    def pairs(x, y):
        return np.exp(np.stack([x, y], 1)).tolist()
    series = [dict(name=name, points=pairs(x, y), path=pairs(*curve)) for name, x, y, *curve in series]
    return dict(kind='dots', title=title, note=said, x=x, y='val_bpb', log_x=True, series=series) | more


def law(p, n, d):
    """Log of E + A / N^alpha + B / D^beta, (k, points), and the terms' shares in it; p (k, 5) holds log E,
    log A, alpha, log B and beta, n and d (points,) or (k, 1) the logs of N and D."""
    e, a, alpha, b, beta = p.T[..., None]
    terms = np.stack([e + 0 * n, a - alpha * n, b - beta * d], -1)
    total = np.logaddexp.reduce(terms, -1)
    return total, np.exp(terms - total[..., None])


def fit_law(n, d, y, p):
    """p (k, 5) of the least Huber loss of log losses y, (points,) or (k, points), from these starts, and that
    loss (k,): steps of Levenberg and Marquardt for all k at once, more than it takes, since Hoffmann's fit
    had stopped too early (Besiroglu 2024, 2404.10102)."""
    damp, eye = np.full(len(p), 0.01), np.eye(len(LAW))

    def loss(p):
        r = abs(law(p, n, d)[0] - y)
        return np.where(r < HUBER, r * r / 2, HUBER * (r - HUBER / 2)).sum(-1)

    for _ in range(200):
        total, shares = law(p, n, d)
        r, (e, a, b) = total - y, np.moveaxis(shares, -1, 0)
        slopes = np.stack([e, a, -n * a, b, -d * b], -1)                         # (k, points, 5)
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
    has = {'points': (len(grouped(runs)), 5), 'sizes': (distinct(n), 3),
           'numbers of tokens': (distinct(d), 3), 'runs': (len(runs), 6)}
    if lacks := ', '.join(f'{least - have} {what}' for what, (have, least) in has.items() if have < least):
        return [f'No law of size and tokens: its 5 parameters take 5 points, 3 sizes and 3 numbers of tokens '
                f'among them, and 6 runs; missing: {lacks}.'], {}, []
    at, m = np.array([n.mean(), d.mean()]), y.mean()
    tries = itertools.product((0.1, 0.5, 0.9), (0.1, 0.3, 1), (0.1, 0.3, 1))    # E's share, alpha, beta
    p, loss = fit_law(n - at[0], d - at[1], y, np.array(
        [(m + math.log(E), a := m + math.log(0.5 - E / 2), alpha, a, beta) for E, alpha, beta in tries]))
    p = p[[loss.argmin()]]
    fitted = law(p, n - at[0], d - at[1])[0][0]
    again = redrawn(fitted, y - fitted, len(LAW), np.random.default_rng(0))
    p = np.concatenate([p, fit_law(n - at[0], d - at[1], again, p.repeat(DRAWS, 0))[0]])
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
        (f'{math.exp(N) / 1e6:.3g}M parameters', d[n == N], y[n == N], line, law(p, N + 0 * line, line)[0][0])
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
        bpb = np.exp(law(p, best[:, None], (rate + g * best)[:, None])[0][:, 0].clip(-50, 50))
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
    digits = {key: int(COLUMNS[key].partition('.')[2][:1] or 0) for key in SHOWN}
    table = dict(kind='table', title='Runs', rows=rows, columns=[
        dict(key='name'), *(dict(key=key, digits=n) for key, n in digits.items())])
    sample.write_beside(root / 'sweep.md', lambda f: f.write(text.encode() + b'\n'))
    sample.write_beside(root / 'sweep.json', lambda f: f.write(
        json.dumps(dict(rows=rows, said=said, **found), indent=1).encode()))
    said = dict(kind='text', title='What the runs say', text='\n'.join(said))
    sample.write_page(root / 'sweep.html', f'A sweep of {", ".join(keys)}', blocks=[said, *charts, table])
    return text


# ---- leaderboard -------------------------------------------------------------------------------------------

# of the public "lLM leaderboard", which does not give its split of the data
PUBLISHED = (('compiled baseline', 11.0e6, 'BabyLM', 1.31), ('latent attention', 10.6e6, 'BabyLM', 1.32),
             ('baseline transformer', 11.0e6, 'BabyLM', 1.33), ('baseline', 7.3e6, 'SimpleStories', 0.57))
ELSEWHERE = ('Published elsewhere, for half an hour of one RTX 4090: another split of the data, another '
             'machine. Not ranked among the runs here.')
LEADERS = dict(non_embedding_params=0, active_params=0, tokens=0, epochs=2, total_seconds=0, joules=0)
ON_PAGE = dict(val_loss=4, tok_per_sec=0, mfu=3, train_seconds=0,                   # decimals of columns
               co2_g=2, peak_mem_gb=2, dollars=3, budget_minutes=1, seed=0, hardware=None, commit=None)
COMPARISONS = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
               ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.In: lambda a, b: a in b}


def finished_runs(folder):
    """A row of names and values for every run under a folder that has ended, and why others are left out."""
    rows, left_out, names = [], [], {}
    for path in sorted(Path(folder).rglob('result.json')):
        try:
            r = json.loads(path.read_text(encoding='utf-8'))
            if not (0 < r['val_bpb'] < math.inf and 0 < r['total_params'] < math.inf):
                raise ValueError(f'val_bpb {r["val_bpb"]}, total_params {r["total_params"]}')
            about = dict(dataset=Path(r['settings']['dataset'].removeprefix('files:')).name,
                         hardware=r['hardware']['name'], folder=path.parent)
            text = r['data'].get('val_bytes') or f'data {r["data"]["fingerprint"][:8]}'
            about['text'] = about['dataset'], f'{text:,} bytes' if type(text) is int else text, r['protocol']
            names[about['text']] = about['dataset']
            abilities = {name: e['accuracy'] for name, e in r['evals'].items()}
            about['notes'] = f'BPB on {r["val_share"]:.1%}' * (r['val_share'] < 1)
            rows.append(r['settings'] | r['config'] | r | abilities | about | dict(abilities=[*abilities]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
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
    train.refuse(name not in known, f'--{option}: no result has {name!r}{near}')
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
            values = [train.literal(part, row) for part in (left, *right)]
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
    except (SyntaxError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as e:
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
            points = [[row[key], row['val_bpb'], row['run']] for row in rows if row.get(key)]
            if len(points) > 1:
                yield dict(kind='dots', title=f'Bits per byte and {x}, {text}', x=x, y='bits per byte',
                           note='Dashed: the Pareto front, runs that none beats in both.', log_x=True,
                           series=[dict(name='runs', points=points)], path=pareto(points))


def thinned(points, most):
    """Means of as many neighbours as leave `most` points at most: a page need not hold every step."""
    n = -(-len(points) // most) or 1
    return [[statistics.fmean(column) for column in zip(*points[i:i + n])] for i in range(0, len(points), n)]


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


def markdown(table):
    """Lines of a table of strings, its first row the heads; the last column is as wide as it needs."""
    widths = [max(map(len, column)) for column in zip(*table)][:-1] + [0]
    table = [table[0], ['-' * (w - 1) + ':' if w else '---' for w in widths], *table[1:]]
    return ['| ' + ' | '.join(f'{cell:>{w}}' for cell, w in zip(cells, widths)) + ' |' for cells in table]


def label(key):
    return {'run': 'model', 'total_params': 'parameters'}.get(key, key.replace('_', ' '))


def short(value):
    """A number in few characters; a text as it is."""
    if isinstance(value, float):
        return f'{value:,.0f}' if 1000 <= abs(value) < 1e9 else f'{value:.4g}'
    return f'{value:,}' if type(value) is int else str(value)


def text_table(columns, rows):
    """Lines of Markdown; columns: {key: decimals, or None}."""
    return markdown([[label(key) for key in columns], *([
        '-' if (v := row.get(key)) is None else short(v) if digits is None else f'{v:,.{digits}f}'
        for key, digits in columns.items()] for row in rows)])


def table_block(title, note, columns, rows):
    """The same for a page, without the columns that no row fills."""
    columns = {key: n for key, n in columns.items() if any(row.get(key) not in (None, '') for row in rows)}
    return dict(kind='table', title=title, note=note, columns=[
        dict(key=key, label=label(key), digits=n) for key, n in columns.items()],
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
        have = [row for row in same if row.get(key) is not None]
        ordered += sorted(have, key=lambda row: row[key], reverse=key != sort)
        ordered += [row for row in same if row.get(key) is None]
    return texts, ordered


def leaderboard(argv):
    """Rank every finished run under a folder; prints the table, and leaves leaderboard.md and .html there."""
    words = iter([a for a in argv if a != '--leaderboard'])
    own, rest = own_options([f'{a}={next(words, "")}' if a in ('--sort', '--where') else a for a in words])
    train.refuse(len(rest) > 1 or any(a.startswith('--') for a in rest),
                 f'--leaderboard takes one folder, --sort and --where, and got {" ".join(rest)}')
    folder, sort = Path(rest[0] if rest else 'out'), own['sort']
    rows, left_out = finished_runs(folder)
    train.refuse(not rows, '\n  '.join([f'{folder} holds no finished run: make one, or name another folder',
                                        *left_out[:3]]))
    known = {key for row in rows for key, v in row.items() if isinstance(v, (int, float, str))}
    key = key_of(sort.removeprefix('-'), known, 'sort')
    rows = where(rows, own['where'], known) if own['where'] else rows
    train.refuse(not rows, f'--where {own["where"]!r} leaves no run')
    texts, ordered = in_order(rows, sort)
    columns = dict(rank=0, run=None, total_params=0) | {f'BPB {text}': 4 for text in texts}
    columns |= dict.fromkeys((name for row in rows for name in row['abilities']), 4) | LEADERS
    columns |= {key: ON_PAGE.get(key)} if key not in {**columns, 'val_bpb': 4} else {}
    notes = ['Rank: by bits per byte (BPB), among runs evaluated on the same text by the same protocol.',
             *[f'Only runs with {own["where"]}.'] * bool(own['where'])]
    theirs = [{'run': name, 'total_params': n, f'BPB {data}': bpb} for name, n, data, bpb in PUBLISHED]
    their_columns = dict(run=None, total_params=0) | {key: 2 for row in theirs for key in row if 'BPB' in key}
    text = '\n'.join([*text_table(columns | dict(notes=None), ordered), '', ' '.join(notes), *left_out, '',
                      ELSEWHERE, '', *text_table(their_columns, theirs)])
    sample.write_beside(folder / 'leaderboard.md', lambda f: f.write(text.encode() + b'\n'))
    sample.write_page(folder / 'leaderboard.html', f'halfhour leaderboard: {len(rows)} runs', blocks=[
        table_block('Runs', ' '.join(notes), columns | ON_PAGE | dict(notes=None), ordered),
        table_block('Published elsewhere', ELSEWHERE, their_columns, theirs),
        *front_blocks(texts), *progress_blocks(texts),
        *[dict(kind='text', title='Left out', text='\n'.join(left_out))] * bool(left_out)])
    print(f'{text}\n\n{folder / "leaderboard.html"} has all columns and the curves')


# ---- learning dynamics of runs -----------------------------------------------------------------------------

SETTLED = 0.95      # linear CKA to the final state
PARTS = {'v': 'attn.v', 'out': 'attn.proj', 'down': 'mlp.down', 'OV': 'attn.ov', 'mean': ''}


def settled(found, name):
    """Progress of the probe from which on a projection stays SETTLED; None where its end is not known."""
    at, column = None, found['names'].index(name)
    for progress, row in zip(found['progress'][::-1], found['measures']['cka_final'][::-1]):
        if row[column] is not None and row[column] < SETTLED:
            break
        at = at if row[column] is None else progress
    return at


def layer_rows(found, at):
    """A row for each layer: when its parts settled, on average, and how its weights' effective rank went."""
    def mean(values):
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    rows, names = [], found['names']
    for layer in dict.fromkeys(name.partition('.')[0] for name in names):
        mine = [i for i, name in enumerate(names) if name.partition('.')[0] == layer]
        ranks = [mean(row[i] for i in mine) for row in found['measures']['weight_effective_rank']]
        ranks = [rank for rank in ranks if rank is not None] or [None]
        rows.append(dict(layer=int(layer), first=ranks[0], highest=max(ranks), last=ranks[-1]) | {
            key: mean(at[names[i]] for i in mine if part in names[i]) for key, part in PARTS.items()})
    return rows


def say_dynamics(folders):
    """Print of every run when each layer settled; draw it over progress in dynamics.html of the first run."""
    train.refuse(not folders, '--dynamics names no run: give folders of runs made with config/dynamics.py')
    keys, blocks = dict(zip(PARTS, PARTS)) | {f'rank {k}': k for k in ('first', 'highest', 'last')}, []
    for folder in folders:
        try:
            found = json.loads((Path(folder) / 'dynamics.json').read_text())
        except (OSError, ValueError) as e:
            raise UserError(f'{folder} has no dynamics.json ({e}): train with config/dynamics.py') from e
        at = {name: settled(found, name) for name in found['names']}
        early, rows = [p for p in at.values() if p is not None and p <= 0.2], layer_rows(found, at)
        said = (f'{len(early) / len(at):.0%} of {len(at)} projections are settled by 20% of training: CKA to '
                f'the final is {SETTLED} or more from then on, at all of the {len(found["steps"])} probes')
        print(f'{folder}: progress at which the projections of a layer settled')
        say_table([(k, key, 14, '.3f') for k, key in keys.items()], rows, lambda r: f'layer {r["layer"]}', 9)
        print(said)
        columns = [dict(key='layer', label='layer', digits=0)]
        columns += [dict(key=key, label=head, digits=3) for head, key in keys.items()]
        blocks.append(dict(kind='table', title=f'{folder}: progress at which projections settled', note=said,
                           columns=columns, rows=rows, sort='layer'))
        for key, title in dict(cka_final='CKA to the final', weight_effective_rank='effective rank').items():
            values = [list(row) for row in zip(*found['measures'][key])]
            blocks.append(dict(kind='heat', title=f'{folder}: {title}', y=found['names'], low=0, high=1,
                               x=[f'{p:.1%}' for p in found['progress']], values=values))
    page = Path(folders[0]) / 'dynamics.html'
    sample.write_page(page, 'Learning dynamics', blocks=blocks)
    print(page)


# ---- main --------------------------------------------------------------------------------------------------

OPTIONS = {'rounds': 12, 'rival_lr': 0.0, 'rival_bf16': False, 'json': '', 'only': '', 'micro_batches': '',
           'shapes': '', 'seeds': 3, 'idea_seeds': 1, 'compare_dir': '', 'sort': 'val_bpb', 'where': ''}
# tied models of 12.5, 33.6 and 97.5 million parameters, whatever the config says
SHAPES = {'11M': dict(n_layer=8, n_embd=320, n_head=5, block_size=512, vocab_size=8192),
          '34M': dict(n_layer=8, n_embd=512, n_head=8, block_size=512, vocab_size=16384),
          '97M': dict(n_layer=12, n_embd=768, n_head=12, block_size=1024, vocab_size=16384)}


def own_options(argv):
    """This script's options, and what is left for train.py's."""
    own, rest = dict(OPTIONS), []
    for arg in argv:
        name, _, value = arg[2:].partition('=')
        if not arg.startswith('--') or name not in own:
            rest.append(arg)
            continue
        kind = type(own[name])
        try:
            own[name] = {'True': True, 'False': False}[value] if kind is bool else kind(value)
        except (ValueError, KeyError) as e:
            raise UserError(f'--{name} is {value!r}, it must be {kind.__name__}') from e
    if own['rounds'] < 1 or not 0 <= own['rival_lr'] < math.inf:
        raise UserError(f'--rounds is {own["rounds"]} and --rival_lr {own["rival_lr"]}: '
                        f'they must be 1 or more, and not negative')
    if min(own['seeds'], own['idea_seeds']) < 1:
        raise UserError(f'--seeds is {own["seeds"]} and --idea_seeds {own["idea_seeds"]}: '
                        f'they must be 1 or more')
    if own['only'] not in ('', 'steps', 'kernels'):
        raise UserError(f"--only is {own['only']!r}, it must be 'steps' or 'kernels'")
    try:
        own['micro_batches'] = [int(n) for n in own['micro_batches'].split(',') if n]
    except ValueError as e:
        raise UserError(f'--micro_batches is {own["micro_batches"]!r}, it must be like 32,64,128') from e
    own['shapes'] = [name for name in own['shapes'].split(',') if name]
    if unknown := [name for name in own['shapes'] if name not in SHAPES]:
        raise UserError(f'--shapes names {unknown[0]!r}; there are {", ".join(SHAPES)}')
    return own, rest


def say_table(columns, rows, title, width):
    """Print rows of dicts under columns (head, key, width, format); what a row lacks is a dash."""
    print(' ' * width + ''.join(f'{head:>{w}}' for head, _, w, _ in columns))
    for row in rows:
        cells = (f'{row[key]:{form}}' if row.get(key) is not None else '-' for _, key, _, form in columns)
        print(f'{title(row):{width}}' + ''.join(f'{cell:>{w}}' for cell, (_, _, w, _) in zip(cells, columns)))


STEP_COLUMNS = (('step ms', 'step_ms', 9, '.1f'), ('min', 'min_ms', 8, '.1f'), ('max', 'max_ms', 8, '.1f'),
                ('tok/s', 'tok_per_sec', 11, ',.0f'), ('of GEMM', 'of_gemm', 9, '.0%'),
                ('MFU', 'mfu', 7, '.1%'), ('12LHQT', 'mfu_palm', 8, '.1%'),
                ('step GB', 'peak_mem_gb', 9, '.2f'),
                ('wait', 'data_wait', 7, '.2%'), ('x plain', 'speedup', 9, '.2f'))
KERNEL_COLUMNS = (('forward ms', 'ms', 11, '.3f'), ('min', 'min_ms', 8, '.3f'), ('max', 'max_ms', 8, '.3f'),
                  ('floor', 'floor_ms', 8, '.3f'), ('+ backward', 'both_ms', 11, '.3f'),
                  ('min', 'both_min_ms', 8, '.3f'), ('max', 'both_max_ms', 8, '.3f'),
                  ('floor', 'floor_both_ms', 8, '.3f'), ('MB', 'mem_mb', 7, '.0f'),
                  ('x ours', 'versus_ours', 8, '.2f'))


def say_kernels(rows):
    for operation in dict.fromkeys(r['operation'] for r in rows):
        print(operation)
        same = [r for r in rows if r['operation'] == operation]
        say_table(KERNEL_COLUMNS, [r for r in same if not r['fault']], lambda r: '  ' + r['rival'], 37)
        for r in same:
            if r['fault']:
                print(f'  {r["rival"]}: does not run here ({r["fault"]})')


def main(argv):
    if {'-h', '--help'} & set(argv):
        return print(__doc__)
    if '--dynamics' in argv:
        return say_dynamics([a for a in argv if a != '--dynamics'])
    if '--compare' in argv:
        return compare_runs(argv)
    if '--leaderboard' in argv:
        return leaderboard(argv)
    if '--sweep' in [a.partition('=')[0] for a in argv]:
        return compare_runs(argv, swept, keep_sweep)
    only_compile = '--kernels=compile-only' in argv
    own, rest = own_options([a for a in argv if a != '--kernels=compile-only'])
    s = train.read_settings(rest)

    def keep(result):
        if own['json']:
            sample.write_beside(own['json'], lambda f: f.write(json.dumps(result, indent=1).encode()))

    if only_compile:
        shape = {k: getattr(s, k) for k in train.MODEL_KEYS}
        rows = compile_only([dict(shape, vocab_size=s.vocab_size), *FAMILY])
        keep(dict(builds=rows))
        if over := [r for r in rows if r['over']]:
            raise UserError(f'{len(over)} of {len(rows)} builds are over the limits')
        return print(f'{len(rows)} builds, all within the limits of their cards')
    device = train.choose_device(s)
    data = train.open_or_build(s, 0)
    config = train.model_config(s, data)
    dtype_name, _, micro, _ = train.adapt(s, device, 1)
    dtype, compiling, name = getattr(torch, dtype_name), s.compile != 'off', sample.hardware(device)
    torch.set_float32_matmul_precision('high')
    torch._dynamo.config.recompile_limit = 64          # contestants share the model's code
    peak = sample.peak_flops(name) if device == 'cuda' and dtype == torch.bfloat16 else None
    print(f'{name}, {dtype_name}, {s.tokens_per_step:,} tokens a step')
    if own['rival_lr']:
        result = train_rival(s, config, data, micro, device, own['rival_bf16'], own['rival_lr'], compiling)
        for key, value in result.items():
            print(f'{key}: {value}')
        return keep(result)
    results = []
    for shape in [SHAPES[name] for name in own['shapes']] or [{}]:
        derived = dict.fromkeys(('n_kv_head', 'head_dim', 'rotary_dim', 'mlp_hidden', 'kv_latent',
                                 'q_latent'), 0)
        sized = GPTConfig(**vars(config) | derived | dict(tie_embeddings=True) | shape) if shape else config
        rows = max(1, micro * config.block_size // sized.block_size)
        results.append(measure(own, s, sized, data, rows, device, dtype, compiling, peak))
    keep(dict(hardware=name, torch=torch.__version__, peak=peak, dtype=dtype_name, **results[0])
         if len(results) == 1 else dict(hardware=name, torch=torch.__version__, peak=peak, shapes=results))


def measure(own, s, config, data, micro, device, dtype, compiling, peak):
    """Everything about one shape of model, printed and returned."""
    T = config.block_size
    print(f'{config.describe()}\nmicro-batches of {micro} x {T}')
    print('\n'.join(m.choose_kernels(s.kernels, config, device, dtype)))
    idx = torch.from_numpy(train.make_stream(s, data).first_rows(micro, T)).to(device)
    attended = GPT(config).to(device).attended(idx)
    rates = machine(config, micro * T, device, dtype)
    print(f'matrix products of {rates["rows"]:,} rows, GFLOP/s: '
          + ', '.join(f'{k} {v / 1e9:,.0f}' for k, v in rates['products'].items())
          + f'; together {rates["gemm"] / 1e9:,.0f}; copying {rates["copy"] / 1e9:,.1f} GB/s')
    print(f'a token attends to {attended:.1f} of {T} positions; data-sheet peak '
          + (f'{peak / 1e12:.1f} TFLOP/s' if peak else 'not known for this hardware: no MFU'))
    result = dict(config=vars(config), machine=rates, attended=attended, micro_batch_size=micro)
    if own['micro_batches']:
        return result | dict(micro_batches=try_micro_batches(own, s, config, data, device, dtype, compiling))
    if own['only'] != 'kernels':
        runners = contestants(s, config, data, micro, device, dtype, compiling)
        rows, gemm, faults = compare(runners, s, config, attended, micro, device, own['rounds'], peak)
        say_table(STEP_COLUMNS, rows, lambda r: r['name'], 30)
        for rival, why in faults.items():
            print(f'{rival}: does not run here ({why})')
        where = where_time_goes(runners['ours, Muon'][0], device)
        print(f'where a step of ours goes, {where["busy_share"]:.0%} of the time busy: '
              + ', '.join(f'{k} {v:.0%}' for k, v in where['shares'].items())
              + f' (most of it {where["largest_other"]})')
        result |= dict(rows=rows, gemm=gemm, faults=faults, where=where)
        for trainer, _ in runners.values():
            if isinstance(trainer, Ours):
                trainer.batches.close()
    if own['only'] != 'steps':
        runners = None                              # their memory is wanted
        result['kernels'] = kernel_table(config, idx, device, dtype, compiling, own['rounds'], rates)
        say_kernels(result['kernels'])
    return result


def try_micro_batches(own, s, config, data, device, dtype, compiling):
    """Tokens a second of ours with each micro-batch, in turn; prints which is best."""
    rows = s.tokens_per_step // config.block_size
    if wrong := [n for n in own['micro_batches'] if n < 1 or rows % n]:
        raise UserError(f'--micro_batches names {wrong[0]}, it must divide the {rows} sequences of a step')
    runners = {n: Ours(s, config, data, n, device, dtype, compiling, kernels=set(m.IN_USE))
               for n in own['micro_batches']}
    times, faults = seconds_each({n: r.step for n, r in runners.items()}, device, own['rounds'], 0)
    speeds = {n: s.tokens_per_step / statistics.median(t) for n, t in times.items()}
    for n in runners:
        said = f'{speeds[n]:12,.0f} tok/s' if n in speeds else f'does not run ({faults[n]})'
        print(f'micro_batch_size {n:5}: {said}')
        runners[n].batches.close()
    if speeds:
        print(f'best: --micro_batch_size={max(speeds, key=speeds.get)}')
    return speeds


if __name__ == '__main__':
    try:
        if len(sys.argv) == 3 and sys.argv[1].startswith('--compile_for='):
            compile_for(int(sys.argv[1].partition('=')[2]), json.loads(sys.argv[2]))
        else:
            main(sys.argv[1:])
    except (UserError, train.Stopped) as e:
        print(f'bench_mfu.py: {e}', file=sys.stderr)
        sys.exit(2 if isinstance(e, UserError) else 75)

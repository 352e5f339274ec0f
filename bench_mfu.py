"""Measure the machine: what a training step costs here, beside a plain GPT-2 trainer in the same process.

    python bench_mfu.py config/babylm.py config/cpu.py
        speed, ours and the rival's, interleaved
    python bench_mfu.py config/babylm.py config/cpu.py --rival_lr=1e-3
        train the rival for budget_minutes, evaluate it as we do

Configs and overrides are train.py's, and so is the step that is measured. The rival is what nanoGPT does on
this device: LayerNorm, GELU, learned positions, scaled_dot_product_attention, all logits at once, AdamW,
random windows of the token stream, torch.compile; in fp32 on a CPU, as nanoGPT runs there, and in bf16
autocast too, where the hardware has it.
"""
import json
import math
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import sample
import train
from model import GPT
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
        self.tokens, self.micro, self.T = tokens, micro, config.block_size
        self.device, self.lr = device, learning_rate
        self.accum = s.tokens_per_step // (micro * config.block_size)
        self.autocast = lambda: torch.autocast(device, torch.bfloat16) if bf16 else nullcontext()
        decay = [p for p in self.model.parameters() if p.ndim == 2]
        rest = [p for p in self.model.parameters() if p.ndim != 2]
        groups = [dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)

    def batch(self):
        first = torch.randint(len(self.tokens) - self.T, (self.micro,))
        idx, targets = (torch.stack([torch.from_numpy(self.tokens[i:i + self.T].astype(np.int64))
                                     for i in starts]) for starts in (first, first + 1))
        return idx.to(self.device), targets.to(self.device)

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
            idx, targets = self.batch()
            with self.autocast():
                loss = self.step_model(idx, targets) / self.accum
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


# ---- measuring ---------------------------------------------------------------------------------------------

def matmul_flops(config, tokens, device, dtype, seconds=0.3):
    """FLOP/s of the model's largest products, (tokens, C) x (C, 4C) and back: the best of several runs."""
    a = torch.randn(tokens, config.n_embd, device=device, dtype=dtype)
    b = torch.randn(config.n_embd, config.mlp_hidden, device=device, dtype=dtype)
    best, began = math.inf, time.monotonic()
    while time.monotonic() - began < seconds:
        started = time.perf_counter()
        c = a @ b
        d = c @ b.t()
        if device == 'cuda':
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    del c, d
    return 4 * tokens * config.n_embd * config.mlp_hidden / best


def ours(s, config, data, micro, device, dtype, compile, optimizer):
    """A function that makes one step of train.py, batches prefetched as there."""
    torch.manual_seed(s.seed)
    model = GPT(config).to(device)
    model.compute_dtype = dtype
    settings = type(s)(**{**vars(s), 'optimizer': optimizer})
    optimizers = train.make_optimizers(model, settings, dtype)
    step_model = torch.compile(model, dynamic=False) if compile else model
    stream = train.Stream(data.tokens['train'], data.docs['train'], s.seed)
    batches = train.Prefetcher(stream, 0, s.tokens_per_step // config.block_size, micro, config.block_size, 0,
                               1, device)
    number = iter(range(10 ** 9))

    def step():
        micro_batches, _ = batches.next(next(number))
        train.train_step(step_model, model, optimizers, micro_batches, 0.5, settings)
    return step, model


def compare(s, config, data, micro, device, dtype, compile, rounds):
    """Step times of ours and of the rival, in turn in every round: a drifting machine hits all alike."""
    contestants = {}
    flops = config.flops_per_token()
    for name, kind, optimizer in (('ours, Muon', dtype, 'muon'), ('ours, AdamW', dtype, 'adamw'),
                                  ('ours, AdamW, fp32', torch.float32, 'adamw')):
        contestants[name] = ours(s, config, data, micro, device, kind, compile, optimizer)[0], kind
    for name, bf16 in {'plain GPT-2, fp32': False, 'plain GPT-2, bf16 autocast': True}.items():
        rival = PlainTrainer(config, data.tokens['train'], s, micro, device, bf16, compile=compile)
        contestants[name] = rival.step, torch.bfloat16 if bf16 else torch.float32
    for step, _ in contestants.values():               # compile, and settle
        step()
        step()
    times, gemm, n = {name: [] for name in contestants}, {}, micro * config.block_size
    for _ in range(rounds):
        for name, (step, kind) in contestants.items():
            gemm.setdefault(kind, []).append(matmul_flops(config, n, device, kind, 0.05))
            if device == 'cuda':
                torch.cuda.synchronize()
            began = time.perf_counter()
            step()
            if device == 'cuda':
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    rows = []
    for name, (_, kind) in contestants.items():
        median = statistics.median(times[name])
        speed = flops * s.tokens_per_step / median
        ratios = [b / a for a, b in zip(times[name], times['plain GPT-2, fp32'])]
        rows.append(dict(name=name, step_ms=1e3 * median, min_ms=1e3 * min(times[name]),
                         max_ms=1e3 * max(times[name]), tok_per_sec=s.tokens_per_step / median,
                         flops_per_sec=speed, of_gemm=speed / statistics.median(gemm[kind]),
                         speedup=statistics.median(ratios)))
    return rows, {str(k).removeprefix('torch.'): statistics.median(v) for k, v in gemm.items()}


def main(argv):
    own = {'rounds': 12, 'rival_lr': 0.0, 'rival_bf16': False, 'json': ''}
    for arg in [a for a in argv if a.startswith('--') and a[2:].split('=')[0] in own]:
        name, _, value = arg[2:].partition('=')
        argv = [a for a in argv if a != arg]
        kind = type(own[name])
        try:
            own[name] = {'True': True, 'False': False}[value] if kind is bool else kind(value)
        except (ValueError, KeyError) as e:
            raise UserError(f'--{name} is {value!r}, it must be {kind.__name__}') from e
    if own['rounds'] < 1 or not 0 <= own['rival_lr'] < math.inf:
        raise UserError(f'--rounds is {own["rounds"]} and --rival_lr {own["rival_lr"]}: '
                        f'they must be 1 or more, and not negative')
    s = train.read_settings(argv)
    device = train.choose_device(s)
    data = train.open_or_build(s, 0)
    config = train.model_config(s, data)
    dtype, compiling, micro, adapted = train.adapt(s, device, 1)
    compiling = s.compile != 'off'
    name = train.hardware(device)
    print(f'{name}; {config.describe()}\n'
          f'{s.tokens_per_step:,} tokens a step in micro-batches of {micro} x {s.block_size}')
    if own['rival_lr']:
        result = train_rival(s, config, data, micro, device, own['rival_bf16'], own['rival_lr'], compiling)
        for key, value in result.items():
            print(f'{key}: {value}')
    else:
        rows, gemm = compare(s, config, data, micro, device, getattr(torch, dtype), compiling, own['rounds'])
        result = dict(hardware=name, rows=rows, gemm=gemm)
        products = (f'{k} {v / 1e9:,.0f} GFLOP/s' for k, v in gemm.items())
        print('measured matrix products: ' + ', '.join(products))
        print(f'{"":30}{"step ms":>9}{"min":>8}{"max":>8}'
              f'{"tok/s":>9}{"GFLOP/s":>9}{"of GEMM":>9}{"x plain":>9}')
        for r in rows:
            print(f'{r["name"]:30}{r["step_ms"]:9.0f}{r["min_ms"]:8.0f}{r["max_ms"]:8.0f}'
                  f'{r["tok_per_sec"]:9,.0f}{r["flops_per_sec"] / 1e9:9,.0f}'
                  f'{r["of_gemm"]:9.0%}{r["speedup"]:9.2f}')
    if own['json']:
        train.write_beside(own['json'], lambda f: f.write(json.dumps(result, indent=1).encode()))


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as e:
        print(f'bench_mfu.py: {e}', file=sys.stderr)
        sys.exit(2)

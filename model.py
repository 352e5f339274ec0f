"""The model of halfhour: a small decoder-only transformer, and the operations it stands on.

    part 1   the model        GPTConfig, Attention, MLP, Block, GPT, the cache, sampling
    part 2   the operations   rms_norm, rotary, attention, linear_cross_entropy: the reference in PyTorch,
                              and what a CPU runs
    part 3   the kernels      choose_kernels, which says what runs instead on a GPU; the same operations in
                              Triton, fused, forward and backward

GPT, Block, Attention and MLP are seams: an idea's class of such a name, derived from it, takes its place in a
run (README, "write your own idea"). They find each other through the config: config.Attention(config, layer).
Where `IN_USE` or `context.last` is asked, a kernel of part 3 may take over: a first reader skips that branch.

Letters in shape comments: B batch, T time, C = n_embd, H = n_head, H_kv = n_kv_head, D = head_dim,
R = rotary_dim, V vocabulary, S keys, a cache's included, N = B T.

    python -c "import model; print(model.GPT(model.GPTConfig()).describe())"
"""
import copy
import dataclasses
import math
import os
import shutil
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    import triton
    import triton.language as tl
    jit, constexpr = triton.jit, tl.constexpr
except ImportError:                     # then PyTorch does everything
    triton, jit, constexpr = None, lambda function: function, float

IN_USE = set()                          # names of KERNELS (part 3), and of ideas', that run here; empty on a CPU

# ---- part 1: the model -------------------------------------------------------------------------------------

@dataclass
class GPTConfig:
    """What decides the shape and the arithmetic of a model. Fields written `name: type = value` are settings
    of train.py; the first two come from the data set."""
    vocab_size: int = field(default=8192)   # V
    bos: int = field(default=0)             # the id that begins every document, and so ends the one before
    block_size: int = 512       # 1..: T, the most tokens a query can look back over
    n_layer: int = 10           # 1..: layers
    n_head: int = 4             # 1..: query heads
    n_kv_head: int = 0          # key and value heads, dividing n_head; 0 means n_head
    n_embd: int = 256           # 1..: C
    head_dim: int = 0           # D, even; 0 means n_embd / n_head
    mlp: str = 'relu2'          # relu2|swiglu: squared (So 2021, 2109.08668) or gated (Shazeer 2020, 2002.05202)
    mlp_hidden: int = 0         # width inside the MLP; 0 means 4C for relu2, 8C/3 rounded up to 32 for swiglu
    qk_norm: bool = True        # RMS-normalise queries and keys per head (Henry 2020, 2010.04245)
    rope_base: float = 10000.0  # 1..: rotary wavelengths: 2 pi to 2 pi rope_base tokens (Su 2021, 2104.09864)
    rotary_dim: int = 0         # channels of a head that rotary embedding turns, even; 0 means all D
    tie_embeddings: bool = False  # one matrix for input embedding and head
    token_shift: bool = True    # embeddings and keys take in the token before (Peng 2023, 2305.13048)
    doc_mask: bool = True       # a token attends only within its document

    def __post_init__(self):
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: change one, '
                             f'or give head_dim')
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.rotary_dim = self.rotary_dim or self.head_dim
        self.mlp_hidden = self.mlp_hidden or self.MLP.width(self)      # the class stands in GPTConfig.MLP
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}')
        if self.head_dim % 2:
            raise ValueError(f'head_dim is {self.head_dim}, rotary embedding needs it even: '
                             f'change n_embd or n_head')
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f'rotary_dim is {self.rotary_dim}, it must be even and at most '
                             f'head_dim {self.head_dim}')


class Context(NamedTuple):
    """What every layer is given beside the residual stream."""
    idx: Tensor              # (B, T)
    cos: Tensor              # (T, R / 2), R = rotary_dim; (B, 1, T, R / 2) where rows go apart in the cache
    sin: Tensor
    first: Tensor            # (B, T) the first position that each token sees, or all of them (B, T, S), bool
    last: Tensor | None      # (B, T) the last one that it is seen from, where the kernels are asked
    cache: 'KVCache | None'
    extras: dict             # what an idea handed to the forward pass, by keyword


class Linear(nn.Linear):
    """A linear map without bias; weights are kept in fp32 and multiplied in the dtype of the activations."""

    def __init__(self, fan_in, fan_out):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x, weight=None):
        return linear(x, (self.weight if weight is None else weight).to(x.dtype))


class Attention(nn.Module):
    """Causal self-attention: grouped-query heads, rotary positions, QK-norm.

    With token_shift the slowly rotating half of a key is that of the token before: a query finds the places
    where its own token was followed by something, and can copy what that was, in one layer instead of two
    (the "partial key offset" of modded-nanogpt, 2025).
    """

    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.qk_norm, self.bos = config.qk_norm, config.bos
        slow = slow_channels(self.head_dim, config.rotary_dim) if config.token_shift else None
        self.register_buffer('from_before', slow, persistent=False)
        # with QK-norm |q k| is at most D; 1 / sqrt D would keep scores under sqrt D, too flat a softmax to
        # pick out one token
        self.scale = 15 / self.head_dim if config.qk_norm else self.head_dim ** -0.5
        self.q = Linear(config.n_embd, self.n_head * self.head_dim)
        self.k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.proj = Linear(self.n_head * self.head_dim, config.n_embd)
        self.cached = 2, self.n_kv_head, self.head_dim       # tensors, heads and width in a KVCache

    def forward(self, x, context):
        qkv = self.packed(x, context)                                              # (B, T, H + 2 H_kv, D)
        if context.last is not None:
            return self.output(attend_with_kernels(self, qkv, context), context)
        q, k, v = self.heads(qkv, context)
        if context.cache is not None:
            k, v = context.cache.append(self, k, v)
        return self.output(self.attend(q, k, v, context.first).transpose(1, 2), context)

    def packed(self, x, context):
        """Queries, keys and values of all heads side by side, (B, T, H + 2 H_kv, D): one product, not
        three."""
        parts = self.q, self.k, self.v
        if context.cache is not None:               # a few tokens: to join the weights would take longer
            return torch.cat([part(x) for part in parts], dim=-1).unflatten(-1, (-1, self.head_dim))
        weight = torch.cat([part.weight for part in parts])
        return F.linear(x, weight.to(x.dtype)).unflatten(-1, (-1, self.head_dim))

    def heads(self, qkv, context):
        """q (B, H, T, D), k, v (B, H_kv, T, D) as attention takes them."""
        q, k, v = qkv.transpose(1, 2).split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if self.from_before is not None:
            follows = (context.idx != self.bos)[:, None, :, None]
            k = torch.where(self.from_before, shift(k, follows, self, context.cache), k)
        if self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        return rotary(q, context.cos, context.sin), rotary(k, context.cos, context.sin), v

    def attend(self, q, k, v, first):
        return attention(q, k, v, first, self.scale)                               # (B, H, T, D)

    def output(self, o, context):
        """What goes back to the residual stream (B, T, C) of what the heads found, o (B, T, H, D)."""
        return self.proj(o.flatten(2))

    def init_weights(self):
        C = self.q.in_features
        for linear in (self.q, self.v):
            linear.weight.normal_(std=C ** -0.5)
        heads = self.q.weight.view(self.n_kv_head, -1, self.head_dim, C)   # (H_kv, H / H_kv, D, C)
        self.k.weight.copy_(heads[:, 0].flatten(0, 1))                     # a copy of its first query head
        values = self.v.weight.view(self.n_kv_head, 1, self.head_dim, C).expand_as(heads)
        self.proj.weight.copy_(0.3 * values.reshape(-1, C).t())


class MLP(nn.Module):
    """Two matrices and a squared ReLU between, or three and a gate (swiglu)."""

    def __init__(self, config, hidden=None):
        super().__init__()
        self.gated, hidden = config.mlp == 'swiglu', hidden or config.mlp_hidden
        self.up = Linear(config.n_embd, hidden * (2 if self.gated else 1))
        self.down = Linear(hidden, config.n_embd)

    @classmethod
    def width(cls, config):
        """mlp_hidden where it is not given."""
        return 4 * config.n_embd if config.mlp == 'relu2' else -(-config.n_embd // 12) * 32

    def forward(self, x, context):
        return self.through(x, self.up.weight, self.down.weight)

    def through(self, x, up, down):
        """x (..., C) through matrices: up (hidden, C), or for swiglu (2 hidden, C), the gate's rows first;
        down (C, hidden)."""
        if 'mlp' in IN_USE:
            up, down = up.to(x.dtype), down.to(x.dtype)
            return mlp_forward(x.flatten(0, -2), up, down, self.gated)[0].view_as(x)
        x = self.up(x, up)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x, down)
        return self.down(F.relu(x).square(), down)

    def init_weights(self):
        self.up.weight.normal_(std=self.up.in_features ** -0.5)
        self.down.weight.zero_()


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream, into which the token embedding is mixed again."""

    def __init__(self, config, layer):
        super().__init__()
        self.attn, self.mlp = config.Attention(config, layer), config.MLP(config)
        self.mix = nn.Parameter(torch.empty(2))  # weights of the residual stream and of the token embedding

    def forward(self, x, x0, context):
        x = self.mix[0].to(x.dtype) * x + self.mix[1].to(x.dtype) * x0
        x, h = add_norm(x, self.attn(rms_norm(x), context))
        return x + self.mlp(h, context)

    def init_weights(self):
        self.attn.init_weights()
        self.mlp.init_weights()
        self.mix.copy_(torch.tensor([1.0, 0.0]))


class GPT(nn.Module):
    """A decoder-only transformer: pre-norm blocks over RMS-normalised token embeddings, no biases, no gains.

    Initialisation (N is normal with the standard deviation given; the forward pass normalises the embedding):

        | weight                    | init          | why                                                    |
        | ------------------------- | ------------- | ------------------------------------------------------ |
        | token embedding, untied   | N(1)          | normalised at once, so only its angle matters          |
        | the head, a tied table    | N(0.5 / C)    | logits begin near 0: loss begins at log V at any width |
        | q, v, MLP up              | N(1 / sqrt C) | unit outputs from unit inputs at any width             |
        | k                         | a copy of q's | a token looks for its like (Trockman 2023, 2305.09828) |
        | attention out             | 0.3 v^T       | and copies what it finds there (RESULTS.md)            |
        | MLP down                  | 0             | MLPs begin as the identity (Zhang 2019, 1901.09321)    |
        | mix of a block            | 1, 0          | a plain residual stream                                |
        | token_shift, a channel    | 0 ... 1       | some channels know the token, some the one before      |
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32       # what the blocks compute in; parameters stay fp32
        self.quick_step = None                   # `step` of one token, compiled
        self.build(config)
        cos, sin = rotary_table(config.block_size, config.rotary_dim, config.rope_base)
        self.register_buffer('cos', cos, persistent=False)
        self.register_buffer('sin', sin, persistent=False)
        with torch.no_grad():
            self.init_weights()

    def build(self, config):
        """Makes the parts; an idea adds its own after these."""
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        # how much of the token before comes in, a channel
        self.shift = nn.Parameter(torch.empty(config.n_embd)) if config.token_shift else None
        self.blocks = nn.ModuleList(config.Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight

    def init_weights(self):
        C = self.config.n_embd
        self.wte.weight.normal_(std=1.0)
        self.lm_head.weight.normal_(std=0.5 / C)   # last, so that a tied table gets the head's init
        if self.shift is not None:
            self.shift.copy_(torch.linspace(0, 1, C))
        for block in self.blocks:
            block.init_weights()

    def forward(self, idx, targets, reduction='mean', **extras):
        """Cross-entropy in nats: mean over targets >= 0, or with 'none' one a token, 0 where target < 0."""
        return self.loss(self.trunk(idx, **extras), targets, reduction, **extras)

    def trunk(self, idx, cache=None, **extras):
        """Final hidden states (B, T, C), in compute_dtype, of idx (B, T)."""
        past, T = cache.length if cache is not None else 0, idx.shape[1]
        apart = isinstance(past, Tensor)
        if not apart and past + T > self.config.block_size:
            raise ValueError(f'{past + T} positions, block_size is {self.config.block_size}')
        first, last = self.visible(idx, past, cache, **extras)
        turns = ((table[past][:, None] if apart else table[past:past + T]) for table in (self.cos, self.sin))
        context = Context(idx, *turns, first, last, cache, extras)
        x = self.layers(self.embed(context), context)
        if cache is not None:
            cache.length += T
        return self.final(x)

    def visible(self, idx, past=0, cache=None, **extras):
        """`first` and `last` of Context: where what each token attends to begins, and who attends to it."""
        first = self.first_visible(idx, past, cache)
        if isinstance(past, Tensor):
            j = torch.arange(self.config.block_size, device=idx.device)
            return (j <= past[..., None]) & (j >= first[..., None]), None
        if 'attention' in IN_USE and cache is None:         # the kernels want both ends of what is visible
            return first.int(), last_visible_to(first).int()
        return first, None

    def first_visible(self, idx, past=0, cache=None):
        """(B, T): the first position each token attends to: its document's BOS. A cache is told where the
        document that it is in began."""
        position = past + torch.arange(idx.shape[1], device=idx.device)
        start = position * (idx == self.config.bos) if self.config.doc_mask else torch.zeros_like(idx)
        if cache is not None:
            start[:, 0] = torch.maximum(start[:, 0], cache.doc_start)
        start = start.cummax(dim=1).values
        if cache is not None:
            cache.doc_start.copy_(start[:, -1])
            cache.follows.scatter_(1, position.expand_as(idx), idx != self.config.bos)
        return start

    def embed(self, context):
        """(B, T, C): what enters the first layer."""
        x = rms_norm(self.wte(context.idx).to(self.compute_dtype))
        if self.shift is None:
            return x
        before = shift(x, (context.idx != self.config.bos)[..., None], self, context.cache)
        return rms_norm(x + self.shift.to(x.dtype) * before)

    def layers(self, x, context):
        x0 = x.view_as(x)                        # one tensor twice would compile the first block apart
        for block in self.blocks:
            x = block(x, x0, context)
        return x

    def final(self, x):
        return rms_norm(x)

    def loss(self, x, targets, reduction, **extras):
        """The loss of hidden states x (B, T, C), reduced as in forward."""
        loss = self.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction, **extras)
        return loss.view_as(targets) if reduction == 'none' else loss

    def cross_entropy(self, x, targets, reduction, **extras):
        """Cross-entropy of targets (N,) under the logits of x (N, C)."""
        return linear_cross_entropy(x, self.lm_head.weight, targets, reduction)

    def logits(self, x):
        """Logits (..., V) in fp32 of hidden states (..., C)."""
        return self.lm_head(x).float()

    def step(self, new, cache, **extras):
        """Logits (B, V) of what follows new (B, T), tokens that come after those that the cache has read."""
        return self.logits(self.trunk(new, cache, **extras)[:, -1:])[:, 0]

    def compile_step(self):
        """From here on `generate` takes single tokens through a compiled `step`, a minute's work to build. Its
        parts are not fused, and on a CPU one core computes it: so a row is added up in one order in any batch,
        and the other cores read prompts, or train."""
        options = {'max_fusion_size': 1, 'cpp.threads': 1}
        self.quick_step = torch.compile(self.step, fullgraph=True, dynamic=False, options=options)

    def hints(self, idx):
        """What generation tells the forward pass about a prompt idx (B, T), by keyword: nothing."""
        return {}

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, min_p=0.0,
                 repetition_penalty=1.0, **extras):
        """Continue idx (B, T) and yield new ids, (B,) at a time; the caller stops at bos, a document's end.

        How a token is drawn: sample_token. Past block_size the older half is forgotten. Single tokens go
        through self.quick_step where compile_step has made one.
        """
        block_size, extras = self.config.block_size, extras | self.hints(idx)
        new = idx = idx[:, -block_size:]
        cache, past = KVCache(self, len(idx)), 0
        for _ in range(max_new_tokens):
            if past + new.shape[1] > block_size:
                new = idx[:, -(block_size // 2):]
                cache, past = KVCache(self, len(idx)), 0
            if self.quick_step and past:
                cache.go_apart()
                logits = self.quick_step(new, cache, **extras)
            else:
                logits = self.step(new, cache, **extras)
            past += new.shape[1]
            new = sample_token(logits, temperature, top_k, top_p, generator, min_p, repetition_penalty, idx)
            new = new[:, None]
            idx = torch.cat([idx, new], dim=1)[:, -block_size:]
            yield new[:, 0]

    # what it is, in numbers

    def params(self):
        """Parameter counts: dict of total, embedding (token tables and an untied head), non_embedding, and
        active: those that one token meets, here all."""
        tables = {m.weight for m in self.modules() if isinstance(m, nn.Embedding)} | {self.lm_head.weight}
        total, embedding = (sum(p.numel() for p in some) for some in (self.parameters(), tables))
        return dict(total=total, embedding=embedding, non_embedding=total - embedding, active=total)

    def matrices(self):
        """The weights that a training token is multiplied with, the head's last."""
        return [m.weight for m in self.blocks.modules() if isinstance(m, Linear)] + [self.lm_head.weight]

    def attended(self, idx):
        """Mean number of positions that the tokens of idx (B, T) attend to, themselves included."""
        position = torch.arange(idx.shape[1], device=idx.device)
        return (position - self.first_visible(idx) + 1).double().mean().item()

    def flops_per_token(self, attended=None):
        """Model FLOPs of one training token, forward and backward: 6 a weight, 12 D a head, layer and
        position.

        attended: mean number of positions a token attends to, itself included; by default (T + 1) / 2, that
        of one long document. (The MFU of PaLM, Chowdhery 2022, 2204.02311, takes T.) Norms, softmax, lookups
        and the optimizer are not counted.
        """
        c = self.config
        attended = (c.block_size + 1) / 2 if attended is None else attended
        weights = sum(p.numel() for p in self.matrices())
        return 6 * weights + 12 * c.n_layer * c.n_head * c.head_dim * attended

    def describe(self):
        c, p = self.config, self.params()
        return (f'{c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads of {c.head_dim} ({c.n_kv_head} for keys '
                f'and values), {c.mlp} {c.mlp_hidden}, vocabulary {c.vocab_size}: {p["total"]:,} parameters '
                f'({p["non_embedding"]:,} without embeddings), '
                f'{self.flops_per_token() / 1e6:.1f}M FLOPs a training token')


GPTConfig.GPT, GPTConfig.Block, GPTConfig.Attention, GPTConfig.MLP = GPT, Block, Attention, MLP


def configured(ideas):
    """GPTConfig with what ideas (prepare_data.Ideas) declare as further fields, and their classes."""
    fields = [(name, setting.kind, setting.default) for name, setting in ideas.declared.items()]
    classes = {base.__name__: ideas.seam(base) for base in (GPT, Block, Attention, MLP)}
    return dataclasses.make_dataclass('GPTConfig', fields, bases=(GPTConfig,), namespace=classes)


def blueprint(config):
    """A model without weights, to be counted."""
    with torch.device('meta'):
        return config.GPT(config)


class KVCache:
    """Keys and values of every layer, (B, heads, block_size, width) each, filled up to `length`; and what
    `shift` needs of the last position. A layer's `cached` says what it keeps.

    length is a number while all rows are as long, (B, 1) once they have gone apart: then every row is at a
    position of its own, steps are of one token, and no shape ever changes. parts: further caches, of models
    that a model holds, or of layers that run more than once.
    """

    def __init__(self, model, batch_size):
        weight, size = model.wte.weight, model.config.block_size
        self.model, self.store = model, {}
        for layer in (block.attn for block in model.blocks):
            n, heads, width = layer.cached
            empty = weight.new_zeros(batch_size, heads, size, width, dtype=model.compute_dtype)
            self.store[id(layer)] = [empty.clone() for _ in range(n)]
        self.length, self.before, self.parts = 0, {}, {}
        self.doc_start = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        self.follows = torch.zeros(batch_size, size, dtype=torch.bool, device=weight.device)

    def part(self, key, model):
        """The cache of that name within this one."""
        if key not in self.parts:
            self.parts[key] = KVCache(model, len(self.doc_start))
        return self.parts[key]

    def append(self, layer, *new):
        """Add k, v (B, H_kv, T, D), return all the layer has seen; `length` moves after the last layer. Of
        rows that are apart all block_size positions are returned."""
        store, start, T = self.store[id(layer)], self.length, new[0].shape[2]
        if isinstance(start, Tensor):
            for old, x in zip(store, new):
                old.scatter_(2, start[:, None, :, None].expand_as(x), x)
            return store
        for old, x in zip(store, new):
            old[:, :, start:start + T] = x
        return [old[:, :, :start + T] for old in store]

    def follow(self, owner, x):
        """What `owner` gave the last time, zeros at first; next time it will be x."""
        if id(owner) not in self.before:
            self.before[id(owner)] = x.new_zeros(x.shape)
        last = self.before[id(owner)]
        before = last.clone()
        last.copy_(x)
        return before

    def go_apart(self):
        """From here on every row has a length of its own."""
        if not isinstance(self.length, Tensor):
            self.length = torch.full_like(self.doc_start, self.length)[:, None]
        for part in self.parts.values():
            part.go_apart()

    def row(self, i):
        """The cache of one row, of those that went apart; it shares the memory of this one."""
        one, at = copy.copy(self), slice(i, i + 1)
        one.store = {layer: [x[at] for x in store] for layer, store in self.store.items()}
        one.before = {owner: x[at] for owner, x in self.before.items()}
        one.parts = {key: part.row(i) for key, part in self.parts.items()}
        one.length, one.doc_start, one.follows = self.length[at], self.doc_start[at], self.follows[at]
        return one

    def take(self, i, other):
        """Row i, of those that went apart, becomes what the cache of one row is."""
        for owner, x in other.before.items():
            self.before.setdefault(owner, x.new_zeros(len(self.doc_start), *x.shape[1:]))[i] = x[0]
        for key, part in other.parts.items():
            self.part(key, part.model).go_apart()
            self.parts[key].take(i, part)
        for layer, store in self.store.items():
            for mine, theirs in zip(store, other.store[layer]):
                mine[i] = theirs[0]
        self.length[i], self.doc_start[i] = other.length, other.doc_start[0]
        self.follows[i] = other.follows[0]

    def clear(self, i):
        """Row i begins anew."""
        self.length[i] = 0
        for part in self.parts.values():
            part.clear(i)

    def values(self):
        """How many numbers it keeps of a token in each layer, on average."""
        return sum(x[0, :, 0].numel() for store in self.store.values() for x in store) / len(self.store)


def sample_token(logits, temperature, top_k, top_p, generator=None, min_p=0.0, repetition_penalty=1.0,
                 before=None):
    """One id (B,) from logits (B, V): scaled, cut to the top_k likeliest, then the fewest of mass top_p, then
    those at least min_p times as likely as the likeliest (Nguyen 2024, 2407.01082).

    First the logits of ids that stand in before (B, T) are divided by repetition_penalty where they are
    positive, multiplied where negative (Keskar 2019, 1909.05858). temperature 0 is greedy; top_k 0, top_p 1,
    min_p 0 and repetition_penalty 1 keep all as it is.
    """
    if not logits.amax(-1).isfinite().all():          # a GPU would not survive to draw from it
        raise FloatingPointError('the model gives no finite numbers')
    if repetition_penalty != 1:
        there = logits.gather(1, before)
        there = torch.where(there > 0, there / repetition_penalty, there * repetition_penalty)
        logits = logits.scatter(1, before, there)
    if temperature < 1e-6:                           # what is divided by less may be infinite
        return logits.argmax(dim=-1)
    logits, order = (logits / temperature).sort(dim=-1, descending=True)
    probs = logits.softmax(dim=-1)
    if top_k:
        probs[:, top_k:] = 0
    probs = probs / probs.sum(-1, keepdim=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0      # what comes before a kept token holds less than top_p
    if min_p:
        probs[probs < min_p * probs[:, :1]] = 0
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


# ---- part 2: the operations --------------------------------------------------------------------------------

def linear(x, weight):
    """x weight^T, x (..., K), weight (N, K). In a compiled step of one token a row, each row of weight is read
    once and meets one row of x after the other: on a CPU this takes two thirds of the time of a product of
    matrices, and what a row comes to is the same to the bit in any batch."""
    if torch.compiler.is_compiling() and x.ndim == 3 and x.shape[1] == 1 and not torch.is_grad_enabled():
        return in_memory((weight[:, None] * in_memory(x[:, 0])).sum(-1).t())[:, None]
    return F.linear(x, weight)


def in_memory(x):
    """x (B, K), which a compiled program then writes down as it is, not making it anew where it is read."""
    return x.contiguous().as_strided(x.shape, (x.shape[1], 1))


def rms_norm(x, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) over the last dimension (Zhang 2019, 1910.07467); statistics in fp32."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def add_norm(x, branch):
    """s = x + branch and rms_norm(s)."""
    if 'rms_norm' in IN_USE:
        return add_norm_forward(x, branch, 1e-6)[:2]
    x = x + branch
    return x, rms_norm(x)


def shift(x, follows, owner, cache=None):
    """x (..., T, D) moved on by one position; 0 where `follows` (bool, broadcast over x) is False: at a BOS.

    Before the first position stands 0, or the last one that the cache was given by `owner`, a module.
    """
    last = x[..., -1:, :]
    before = torch.zeros_like(last) if cache is None else cache.follow(owner, last)
    return torch.cat([before, x[..., :-1, :]], dim=-2) * follows


def rotary_table(length, R, base):
    """cos, sin (length, R / 2) of position / base^(2i / R)."""
    angle = torch.arange(length)[:, None] * base ** (-torch.arange(0, R, 2) / R)
    return angle.cos(), angle.sin()


def rotary(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + R/2}) of x (B, H, T, D) by their position's angle; cos, sin (T, R/2),
    or (B, 1, T, R/2)."""
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def slow_channels(D, R):
    """(D,) bool: the slower half of the R channels that rotary embedding turns, and all that it does not."""
    channel = torch.arange(D)
    return (channel >= R) | (channel % (R // 2) >= (R + 3) // 4)


def last_visible_to(first):
    """(B, T): the last position that each token is attended to from; `first` (B, T) does not fall along T."""
    position = torch.arange(first.shape[1], device=first.device).expand_as(first).contiguous()
    return torch.searchsorted(first, position, right=True) - 1


def attention(q, k, v, first, scale, rows=128):
    """Causal attention: softmax(scale q k^T) v over first[i] <= j <= i.

    q (B, H, T, D) are the last T positions of k, v (B, H_kv, S, D); first (B, T) is an index into S, or bool
    (B, T, S), which says itself what is seen. Returns (B, H, T, D). Blocks of `rows` queries read only the
    keys up to their last one: on a CPU this takes half the time of F.scaled_dot_product_attention with a
    mask, in bf16 a third (RESULTS.md).
    """
    B, H, T, D = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    if first.ndim == 3:
        return F.scaled_dot_product_attention(q, k, v, first[:, None], scale=scale, enable_gqa=H != H_kv)
    if q.is_cuda:
        i, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
        seen = (j <= i) & (j >= first[:, :, None])
        return F.scaled_dot_product_attention(q, k, v, seen[:, None], scale=scale, enable_gqa=H != H_kv)
    q = (q * scale).view(B, H_kv, H // H_kv, T, D)      # the G query heads of a key head side by side
    out = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        end = S - T + stop
        i = torch.arange(end - stop + start, end, device=q.device)[:, None]
        j = torch.arange(end, device=q.device)
        hidden = (j > i) | (j < first[:, start:stop, None])        # (B, rows, end)
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, float('-inf'))
        scores = q[:, :, :, start:stop].reshape(B, H_kv, -1, D) @ k[:, :, :end].transpose(-1, -2)
        scores = scores.view(B, H_kv, -1, stop - start, end) + bias[:, None, None]
        out.append((scores.softmax(-1).view(B, H_kv, -1, end) @ v[:, :, :end]).view(B, H, stop - start, -1))
    return torch.cat(out, dim=2)


class BlockwiseLoss(torch.autograd.Function):
    """The mean loss of logits x weight^T, `rows` tokens at a time, its gradient made in the forward pass.

    The (tokens, V) logits, the largest tensor of a small model, never exist: each block of rows is
    multiplied, turned into its own gradient, and multiplied back while it is still in cache. block(z, at) is
    given the fp32 logits z (rows, V) of the tokens in the slice `at` and may overwrite them; it returns the
    sum of their losses, and d mean / dz, divided by n. Differentiable in x (N, C) and weight (V, C); n () is
    the number of targets.
    """

    @staticmethod
    def forward(ctx, x, weight, n, rows, block):
        w = weight.to(x.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx, dw = [], torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(x), rows):
            xs = x[start:start + rows]
            part, g = block((xs @ w.t()).float(), slice(start, start + rows))
            loss, g = loss + part, g.to(x.dtype)
            dx.append(g @ w)
            dw += g.t() @ xs
        ctx.save_for_backward(torch.cat(dx), dw.to(weight.dtype))
        return loss / n

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dw * grad, None, None, None


def rows_at_once(x, weight):
    """How many tokens' logits are made at once, so that they stay in cache: on a GPU 64 MB in bf16, or 2,048 tokens;
    a CPU has less."""
    return max(2048, 2 ** 25 // len(weight)) if x.is_cuda else 512


def linear_cross_entropy(x, weight, targets, reduction='mean', rows=None):
    """Cross-entropy in nats of targets (N,) under the softmax of x weight^T, x (N, C), weight (V, C).

    reduction 'mean' (differentiable) or 'none', (N,) fp32. Targets < 0 are left out; with 'none' they give 0.
    d mean / d logits = (softmax - one_hot(target)) / n.
    """
    rows, mean = rows or rows_at_once(x, weight), reduction == 'mean'
    if 'cross_entropy' in IN_USE:
        both = cross_entropy_forward(x, weight, targets, mean, rows)
        return both[0] if mean else both[1]
    if not mean:
        w, wanted = weight.to(x.dtype), targets >= 0
        loss = torch.zeros(len(x), device=x.device)
        loss[wanted] = torch.cat([F.cross_entropy((xs @ w.t()).float(), ys, reduction='none')
                                  for xs, ys in zip(x[wanted].split(rows), targets[wanted].split(rows))])
        return loss
    n = (targets >= 0).sum().clamp(min=1)

    def block(z, at):
        keep, gold = targets[at] >= 0, targets[at].clamp(min=0)[:, None]
        lse = z.logsumexp(dim=-1)
        loss = ((lse - z.gather(1, gold)[:, 0]) * keep).sum()
        g = z.sub_(lse[:, None]).exp_().scatter_add_(1, gold, torch.full_like(z[:, :1], -1.0))
        return loss, g.mul_((keep / n)[:, None])

    return BlockwiseLoss.apply(x, weight, n, rows, block)


# ---- part 3: the kernels -----------------------------------------------------------------------------------
#
# A Triton kernel is one program, started on a grid of indices: it loads tiles through pointers, computes on
# them in registers and stores tiles. All of these keep to a few rules: statistics in fp32; scalars as
# constexpr, part of the program (a Python float could arrive as fp64); row offsets in int64; nothing atomic,
# so that a kernel gives the same bits twice; tiles by width, dtype and shared memory, never by the name of a card.


# ---- which code runs each operation

KERNELS = {'attention': 'attention, causal, within documents and windows',
           'qk_norm': 'token shift, QK-norm and rotary embedding in one pass (inside attention)',
           'rms_norm': 'residual add and RMSNorm in one pass',
           'cross_entropy': 'the loss and its gradient in one pass over a block of logits',
           'mlp': 'activation at the end of a matrix product'}


def kernels_named(names):
    """A set of kernels from 'all', 'none', or names with commas; '-mlp' is all but that one. ValueError."""
    words = [w for w in names.split(',') if w not in ('', 'all', 'none')]
    unknown = [w for w in words if w.removeprefix('-') not in KERNELS]
    if unknown:
        raise ValueError(f"kernels names {unknown[0]!r}; there are {', '.join(KERNELS)}, all and none")
    but = {w[1:] for w in words if w.startswith('-')}
    named = {w for w in words if not w.startswith('-')}
    return (set() if names == 'none' else named or set(KERNELS)) - but


def missing_compiler():
    """What Triton and Inductor build with on a GPU and this machine lacks, and how to get it; '' if nothing."""
    lacks = ['a C compiler'] * (not (os.environ.get('CC') or shutil.which('gcc') or shutil.which('clang')))
    lacks += ['Python.h'] * (not Path(sysconfig.get_path('include'), 'Python.h').exists())
    return f'{" and ".join(lacks)} missing: apt install gcc python3-dev' if lacks else ''


def no_kernels(device):
    """Why no kernel can run there; '' if they can."""
    return ('this is not a GPU' if device != 'cuda' else 'Triton is not installed' if triton is None else
            'the card is older than Ampere (sm_80)' if torch.cuda.get_device_capability() < (8, 0) else
            missing_compiler())


def choose_kernels(names, config, device, dtype, rows=1):
    """Decide what runs each operation from here on: fills IN_USE, returns lines that say what and why.

    Every kernel is tried once on a layer of this width, its loss and its matrices' gradients against
    PyTorch's, and then timed on rows, (rows, T), with and without: one that this card cannot build or start,
    that computes something else, or is no faster than PyTorch, stays out, and the run goes on without it.
    """
    named, why = kernels_named(names), no_kernels(device)
    IN_USE.clear()
    reasons = dict.fromkeys(KERNELS, why)
    if not why and config.head_dim not in (16, 32, 64, 128):
        width = f'head_dim {config.head_dim} is not 16, 32, 64 or 128'
        reasons |= dict.fromkeys(('attention', 'qk_norm'), width)
    if not why and dtype == torch.float32:
        without = 'in float32 it would do without tensor cores'
        reasons |= dict.fromkeys(('attention', 'qk_norm', 'mlp'), without)
    reasons |= {name: 'switched off' for name in KERNELS if name not in named}
    probe, times = None, {}
    for together in ('attention', 'qk_norm'), ('rms_norm',), ('cross_entropy',), ('mlp',):
        tried = [name for name in together if not reasons[name]]
        while tried:
            probe = probe or Probe(config, device, dtype, rows)
            fault, took = probe.fault(tried) if tried != ['qk_norm'] else ('it is part of the attention kernel', '')
            if not fault:
                times |= dict.fromkeys(tried, took)
                break
            reasons[tried.pop()] = fault           # and once more without the last
        IN_USE.update(tried)
    table = {name: f'kernel, {what}; {times[name]}' if name in IN_USE else f'torch, {reasons[name]}'
             for name, what in KERNELS.items()}
    return [f'{", ".join(name for name in KERNELS if table[name] == where)}: {where}'
            for where in dict.fromkeys(table.values())]


PATIENCE = 180                          # seconds that a kernel has to be built and to answer


class Probe:
    """One layer of the baseline in this shape, all its weights random, and what PyTorch makes of it."""
    what = 'a layer'

    def __init__(self, config, device, dtype, rows=1):
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            names = {field.name for field in dataclasses.fields(GPTConfig)}
            small = {k: v for k, v in vars(config).items() if k in names} | dict(n_layer=1)
            self.model = GPT(GPTConfig(**small)).to(device).eval()
            self.model.compute_dtype = dtype
            for p in self.model.parameters():
                nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else nn.init.uniform_(p, 0.5, 1)
            self.idx = torch.randint(0, config.vocab_size, (2, config.block_size + 1)).to(device)
        self.idx[0, ::100] = config.bos             # many documents, and one that fills its row
        self.idx[1][self.idx[1] == config.bos] = (config.bos + 1) % config.vocab_size
        self.device, self.full = self.idx.device, self.idx[:1].expand(rows, -1)
        self.expected = self.gradients(self.idx)

    def gradients(self, idx):
        """Gradients of the matrices (a scalar's may cancel to little but rounding), and the loss."""
        self.model.zero_grad()
        loss = self.model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
        loss.backward()
        return [p.grad for p in self.model.parameters() if p.ndim == 2] + [loss.detach()]

    def seconds(self):
        """What the layer, not compiled, takes forward and backward on all rows: the fastest of three goes after a
        first."""
        took = []
        for _ in range(4):
            began = time.perf_counter()
            self.gradients(self.full)[-1].item()             # waits for the card
            took.append(time.perf_counter() - began)
        return min(took[1:])

    def fault(self, names):
        """(why kernels stay out, '' if they do not: they do not run here, are off, or no faster; how long the
        layer takes with them and without)."""
        before, watch = set(IN_USE), threading.Timer(PATIENCE, self.give_up, [names])
        watch.daemon = True
        watch.start()
        IN_USE.update(names)
        try:
            pairs = zip(self.gradients(self.idx), self.expected)
            errors = [(a - b).norm() / b.norm().clamp(min=1e-12) for a, b in pairs]
            error = torch.stack(errors).max().item()         # NaN if any is, unlike Python's max
            if not error < 0.05:
                return f'its result differs by {error:.0%}', ''
            ours = self.seconds()
            IN_USE.difference_update(names)
            try:
                theirs = self.seconds()
            except torch.OutOfMemoryError:       # where the kernel is what makes it fit
                theirs = math.inf
            told = f'{self.what} takes {1000 * ours:.2f} ms with it, {1000 * theirs:.2f} without'
            return '' if ours < theirs else told, told
        except Exception as e:                 # whatever a compiler or a driver may throw: torch can do it
            said = (str(e).strip() or 'no more is said').splitlines()[0][:80]
            self.check_card(names, said)
            return f'it does not run here ({type(e).__name__}: {said})', ''
        finally:
            watch.cancel()
            IN_USE.clear()
            IN_USE.update(before)

    def give_up(self, names):
        """Ends the process, whose card computes without end."""
        print(f'{" and ".join(names)}: no answer of the card in {PATIENCE} s: {self.without(names)}', file=sys.stderr, flush=True)
        os._exit(2)

    def without(self, names):
        return f'start again with --kernels={",".join(f"-{name}" for name in names)}'

    def check_card(self, names, said):
        """After a fault: some, as an illegal address, leave nothing that this process can do on its card.
        RuntimeError."""
        try:
            torch.zeros(1, device=self.device).item()
        except Exception as e:
            raise RuntimeError(f'a kernel has broken this process for its card ({said}): {self.without(names)}') from e


# ---- what all kernels share

def launch(kernel, grid, *args, **options):
    """Start a kernel, but not for torch.compile's fake tensors, which only ask for shapes.

    bench_mfu.py --kernels=compile-only puts something in this place that compiles the kernel instead.
    """
    if not any(isinstance(a, FakeTensor) for a in args):
        kernel[grid](*args, **options)


def op(function):
    """Make a function from tensors to new tensors one node of torch.compile's graph."""
    node = torch.library.custom_op(f'halfhour::{function.__name__}', mutates_args=())(function)
    node.register_fake(function)               # launch does nothing there, and the shapes are right
    return node


def shared_memory(x):
    """Bytes of shared memory one program may have where x is: 101,376 on an RTX 4090, 232,448 on an H100."""
    if x.device.type != 'cuda':
        return 101376
    return getattr(torch.cuda.get_device_properties(x.device), 'shared_memory_per_block_optin', 101376)


LOG2E = constexpr(math.log2(math.e))


def blocks(n, size):
    return -(-n // size)


# ---- residual add and RMSNorm
#
#   s = x + y        h = s r        r = 1 / sqrt(mean(s^2) + eps)
#   dx = dy = ds + r (dh - h mean(dh h))

@jit
def add_norm_kernel(x_ptr, y_ptr, s_ptr, h_ptr, rstd_ptr, n_rows, C: constexpr, EPS: constexpr,
                    BLOCK_M: constexpr, BLOCK_C: constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_C)
    inside = (rows < n_rows)[:, None] & (cols < C)[None, :]
    at = rows[:, None] * C + cols[None, :]
    y = tl.load(y_ptr + at, mask=inside, other=0.0)
    s = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + y.to(tl.float32)
    s = s.to(y.dtype)                              # as it will be read again
    tl.store(s_ptr + at, s, mask=inside)
    s = s.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(s * s, axis=1) / C + EPS)
    tl.store(h_ptr + at, s * rstd[:, None], mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@jit
def add_norm_backward_kernel(ds_ptr, dh_ptr, s_ptr, rstd_ptr, dx_ptr, n_rows, C: constexpr, BLOCK_M: constexpr,
                             BLOCK_C: constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_C)
    inside = (rows < n_rows)[:, None] & (cols < C)[None, :]
    at = rows[:, None] * C + cols[None, :]
    rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
    h = tl.load(s_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
    dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dx = rstd * (dh - h * (tl.sum(dh * h, axis=1) / C)[:, None])
    if ds_ptr is not None:
        dx += tl.load(ds_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx, mask=inside)


def norm_launch(kernel, n_rows, C, *args):
    """Starts a kernel on whole rows, some 4,096 numbers a program."""
    width = triton.next_power_of_2(C)
    rows = max(1, 4096 // width)
    launch(kernel, (blocks(n_rows, rows),), *args, BLOCK_M=rows, BLOCK_C=width, num_warps=4 if width <= 4096 else 8)


@op
def add_norm_forward(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """s, h (..., C), rstd of x and y (..., C)."""
    C, n_rows = x.shape[-1], x.numel() // x.shape[-1]
    x, y = x.contiguous(), y.contiguous()
    s, h = torch.empty_like(x), torch.empty_like(x)
    rstd = x.new_empty(n_rows, dtype=torch.float32)
    norm_launch(add_norm_kernel, n_rows, C, x, y, s, h, rstd, n_rows, C, eps)
    return s, h, rstd


@op
def add_norm_backward(ds: Tensor | None, dh: Tensor, s: Tensor, rstd: Tensor) -> Tensor:
    ds, dh, s = ds if ds is None else ds.contiguous(), dh.contiguous(), s.contiguous()
    dx, (n_rows, C) = torch.empty_like(s), (len(rstd), s.shape[-1])
    norm_launch(add_norm_backward_kernel, n_rows, C, ds, dh, s, rstd, dx, n_rows, C)
    return dx


def add_norm_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], output[2])


def add_norm_gradient(ctx, ds, dh, _):
    s, rstd = ctx.saved_tensors
    dx = add_norm_backward(ds, torch.zeros_like(s) if dh is None else dh, s, rstd)
    return dx, dx, None


add_norm_forward.register_autograd(add_norm_gradient, setup_context=add_norm_save)


# ---- QK-norm and rotary embedding, on packed queries, keys and values (B, T, H + 2 H_kv, D)
#
#   x      a query head's row, or a key's with its slow channels from the token before (token_shift)
#   u      x / sqrt(mean(x^2) + eps)                             u = x without qk_norm
#   y_i    u_i cos - u_j sin,  y_j = u_j cos + u_i sin           j = i + R / 2, R <= D rotated channels
#
# Backward: a rotation keeps scalar products, so du = r (g - u mean(g u)) is made of dy and y while both are
# turned, and turned back afterwards: x need not be kept. Every channel of the gradient has one writer: a
# shifted one is written where it came from, and set to 0 where no token follows.

@jit
def slow_channel(c, R: constexpr):
    """Whether channel c turns slowly; with token_shift a key has it from the token before."""
    return (c >= R) | (c % (R // 2) >= (R + 3) // 4)


@jit
def qk_kernel(qkv_ptr, qk_ptr, rstd_ptr, idx_ptr, cos_ptr, sin_ptr, n_rows, T, H: constexpr, HK: constexpr,
              D: constexpr, R: constexpr, BOS: constexpr, NORM: constexpr, SHIFT: constexpr, EPS: constexpr,
              BLOCK_M: constexpr, BLOCK_D: constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)      # of (B, T, H + H_kv)
    token, head = row // (H + HK), row % (H + HK)
    t = token.to(tl.int32) % T
    c = tl.arange(0, BLOCK_D)
    pair = tl.where(c < R // 2, c + R // 2, tl.where(c < R, c - R // 2, c))    # the channel c turns with
    inside = (row < n_rows)[:, None] & (c < D)[None, :]
    at, present = token[:, None] * ((H + 2 * HK) * D) + head[:, None] * D, inside
    if SHIFT:
        idx = tl.load(idx_ptr + token, mask=row < n_rows, other=BOS)
        back = (head >= H)[:, None] & slow_channel(c, R)[None, :]
        present = inside & ~(back & ((idx == BOS) | (t == 0))[:, None])
        at = tl.where(back, at - (H + 2 * HK) * D, at)
    x = tl.load(qkv_ptr + at + c[None, :], mask=present, other=0.0).to(tl.float32)
    other = tl.load(qkv_ptr + at + pair[None, :], mask=present, other=0.0).to(tl.float32)
    turn = t[:, None] * (R // 2) + (c % (R // 2))[None, :]
    cos = tl.load(cos_ptr + turn, mask=inside & (c < R)[None, :], other=1.0)
    sin = tl.load(sin_ptr + turn, mask=inside & (c < R)[None, :], other=0.0)
    y = x * cos + tl.where(c < R // 2, -1.0, 1.0)[None, :] * other * sin
    if NORM:
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)
        y *= rstd[:, None]
        tl.store(rstd_ptr + row, rstd, mask=row < n_rows)
    tl.store(qk_ptr + row[:, None] * D + c[None, :], y, mask=inside)


@jit
def qk_backward_kernel(dqk_ptr, qk_ptr, rstd_ptr, idx_ptr, cos_ptr, sin_ptr, dqkv_ptr, n_rows, T,
                       H: constexpr, HK: constexpr, D: constexpr, R: constexpr, BOS: constexpr,
                       NORM: constexpr, SHIFT: constexpr, BLOCK_M: constexpr, BLOCK_D: constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // (H + HK), row % (H + HK)
    t = token.to(tl.int32) % T
    c = tl.arange(0, BLOCK_D)
    pair = tl.where(c < R // 2, c + R // 2, tl.where(c < R, c - R // 2, c))
    inside = (row < n_rows)[:, None] & (c < D)[None, :]
    at = row[:, None] * D
    g = tl.load(dqk_ptr + at + c[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(dqk_ptr + at + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.load(rstd_ptr + row, mask=row < n_rows, other=0.0)[:, None]
        y = tl.load(qk_ptr + at + c[None, :], mask=inside, other=0.0).to(tl.float32)
        other_y = tl.load(qk_ptr + at + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = (tl.sum(g * y, axis=1) / D)[:, None]
        g, other = rstd * (g - y * mean), rstd * (other - other_y * mean)
    turn = t[:, None] * (R // 2) + (c % (R // 2))[None, :]
    cos = tl.load(cos_ptr + turn, mask=inside & (c < R)[None, :], other=1.0)
    sin = tl.load(sin_ptr + turn, mask=inside & (c < R)[None, :], other=0.0)
    dx = g * cos + tl.where(c < R // 2, 1.0, -1.0)[None, :] * other * sin
    at, present = token[:, None] * ((H + 2 * HK) * D) + head[:, None] * D + c[None, :], inside
    if SHIFT:
        idx = tl.load(idx_ptr + token, mask=row < n_rows, other=BOS)
        has_next = (row < n_rows) & (t < T - 1)
        after = tl.load(idx_ptr + token + 1, mask=has_next, other=BOS)
        back = (head >= H)[:, None] & slow_channel(c, R)[None, :]
        tl.store(dqkv_ptr + at, tl.zeros_like(dx), mask=inside & back & (after == BOS)[:, None])
        present = inside & ~(back & ((idx == BOS) | (t == 0))[:, None])
        at = tl.where(back, at - (H + 2 * HK) * D, at)
    tl.store(dqkv_ptr + at, dx, mask=present)


# ---- attention: causal, within documents and windows, grouped-query heads
#
#   s_ij = SCALE q_i k_j where first_i <= j <= i    p_ij = 2^(s_ij - lse_i)    lse_i = log2 sum_j 2^s_ij
#   o_i = sum_j p_ij v_j, by online softmax (Milakov 2018, 1805.02867; Dao 2022, 2205.14135)
#   delta_i = do_i o_i      ds_ij = p_ij (do_i v_j - delta_i)
#   dq_i = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i      dv_j = sum_i p_ij do_i
#
# first_i is the first position that token i sees, last_j the last one that sees token j: neither ever falls,
# so one number each bounds a block's loop. Documents and windows are only two ways to fill these two arrays.
# A loop goes over whole blocks without a mask, and over those at the edges (`EDGE`) with one.

@jit
def tile_of(x_ptr, rows, T, STRIDE: constexpr, D: constexpr, EDGE: constexpr):
    """x[rows], (len(rows), D), 0 from T on; without EDGE all rows are known to be there."""
    at = x_ptr + rows.to(tl.int64)[:, None] * STRIDE + tl.arange(0, D)[None, :]
    if EDGE:
        x = tl.load(at, mask=(rows < T)[:, None], other=0.0)
    else:
        x = tl.load(at)
    return x


@jit
def key_blocks(m0, first_ptr, T, BLOCK_M: constexpr, BLOCK_N: constexpr):
    """Of what queries from m0 on see: the first block, from where to m0 all see all, blocks at the edges."""
    end = tl.minimum(m0 + BLOCK_M, T)
    low = tl.load(first_ptr + m0) // BLOCK_N * BLOCK_N
    whole = tl.minimum(tl.cdiv(tl.load(first_ptr + end - 1), BLOCK_N) * BLOCK_N, m0)
    return low, whole, (whole - low) // BLOCK_N + tl.cdiv(end - m0, BLOCK_N)


@jit
def attend_keys(n, acc, total, top, q, k_ptr, v_ptr, rows, first, T, SCALE: constexpr, STRIDE_QK: constexpr,
                STRIDE_V: constexpr, D: constexpr, BLOCK_N: constexpr, PRECISION: constexpr,
                EDGE: constexpr):
    """One block of keys and values for one of queries."""
    cols = n + tl.arange(0, BLOCK_N)
    k, v = tile_of(k_ptr, cols, T, STRIDE_QK, D, EDGE), tile_of(v_ptr, cols, T, STRIDE_V, D, EDGE)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if EDGE:
        s = tl.where((first[:, None] <= cols[None, :]) & (cols[None, :] <= rows[:, None]), s, float('-inf'))
    new_top = tl.maximum(top, tl.max(s, axis=1) * SCALE)
    p = tl.exp2(s * SCALE - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, total, new_top


@jit
def attention_kernel(qk_ptr, v_ptr, o_ptr, lse_ptr, first_ptr, T, SCALE: constexpr, STRIDE_QK: constexpr,
                     STRIDE_V: constexpr, H: constexpr, HK: constexpr, D: constexpr, PRECISION: constexpr,
                     BLOCK_M: constexpr, BLOCK_N: constexpr):
    tiles = tl.cdiv(T, BLOCK_M)
    m0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M           # the longest rows begin first
    b, h = (tl.program_id(0) // tiles // H).to(tl.int64), tl.program_id(0) // tiles % H
    qk_ptr, first_ptr = qk_ptr + b * T * STRIDE_QK, first_ptr + b * T
    k_ptr, v_ptr = qk_ptr + (H + h * HK // H) * D, v_ptr + b * T * STRIDE_V + h * HK // H * D
    rows, d = m0 + tl.arange(0, BLOCK_M), tl.arange(0, D)
    inside = rows < T
    q = tile_of(qk_ptr + h * D, rows, T, STRIDE_QK, D, True)
    first = tl.load(first_ptr + rows, mask=inside, other=0)
    low, whole, edges = key_blocks(m0, first_ptr, T, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total, top = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], -1e30, tl.float32)
    for n in range(whole, m0, BLOCK_N):                             # all of these rows see all of these keys
        acc, total, top = attend_keys(n, acc, total, top, q, k_ptr, v_ptr, rows, first, T, SCALE, STRIDE_QK,
                                      STRIDE_V, D, BLOCK_N, PRECISION, False)
    for i in range(edges):
        n = low + i * BLOCK_N
        n = tl.where(n < whole, n, n - whole + m0)                  # where documents begin, then the diagonal
        acc, total, top = attend_keys(n, acc, total, top, q, k_ptr, v_ptr, rows, first, T, SCALE, STRIDE_QK,
                                      STRIDE_V, D, BLOCK_N, PRECISION, True)
    at = (b * T + rows)[:, None] * (H * D) + h * D + d[None, :]
    tl.store(o_ptr + at, acc / total[:, None], mask=inside[:, None])
    tl.store(lse_ptr + (b * H + h) * T + rows, top + tl.log2(total), mask=inside)


@jit
def gradient_from_keys(n, dq, q, do, lse, delta, k_ptr, v_ptr, rows, first, T, SCALE: constexpr,
                       STRIDE_QK: constexpr, STRIDE_V: constexpr, D: constexpr, BLOCK_N: constexpr,
                       PRECISION: constexpr, EDGE: constexpr):
    cols = n + tl.arange(0, BLOCK_N)
    k, v = tile_of(k_ptr, cols, T, STRIDE_QK, D, EDGE), tile_of(v_ptr, cols, T, STRIDE_V, D, EDGE)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE - lse[:, None])
    if EDGE:
        p = tl.where((first[:, None] <= cols[None, :]) & (cols[None, :] <= rows[:, None]), p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@jit
def attention_dq_kernel(qk_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dqk_ptr, first_ptr, T,
                        SCALE: constexpr, STRIDE_QK: constexpr, STRIDE_V: constexpr, STRIDE_DQK: constexpr,
                        H: constexpr, HK: constexpr, D: constexpr, PRECISION: constexpr,
                        BLOCK_M: constexpr, BLOCK_N: constexpr):
    """dq, and delta for the kernel below."""
    tiles = tl.cdiv(T, BLOCK_M)
    m0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    b, h = (tl.program_id(0) // tiles // H).to(tl.int64), tl.program_id(0) // tiles % H
    qk_ptr, first_ptr = qk_ptr + b * T * STRIDE_QK, first_ptr + b * T
    k_ptr, v_ptr = qk_ptr + (H + h * HK // H) * D, v_ptr + b * T * STRIDE_V + h * HK // H * D
    rows, d = m0 + tl.arange(0, BLOCK_M), tl.arange(0, D)
    inside = rows < T
    q = tile_of(qk_ptr + h * D, rows, T, STRIDE_QK, D, True)
    do = tile_of(do_ptr + b * T * (H * D) + h * D, rows, T, H * D, D, True)
    o = tile_of(o_ptr + b * T * (H * D) + h * D, rows, T, H * D, D, True)
    stat = (b * H + h) * T + rows
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta_ptr + stat, delta, mask=inside)
    lse = tl.load(lse_ptr + stat, mask=inside, other=0.0)
    first = tl.load(first_ptr + rows, mask=inside, other=0)
    low, whole, edges = key_blocks(m0, first_ptr, T, BLOCK_M, BLOCK_N)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for n in range(whole, m0, BLOCK_N):
        dq = gradient_from_keys(n, dq, q, do, lse, delta, k_ptr, v_ptr, rows, first, T, SCALE, STRIDE_QK,
                                STRIDE_V, D, BLOCK_N, PRECISION, False)
    for i in range(edges):
        n = low + i * BLOCK_N
        n = tl.where(n < whole, n, n - whole + m0)
        dq = gradient_from_keys(n, dq, q, do, lse, delta, k_ptr, v_ptr, rows, first, T, SCALE, STRIDE_QK,
                                STRIDE_V, D, BLOCK_N, PRECISION, True)
    at = (b * T + rows)[:, None] * STRIDE_DQK + h * D + d[None, :]
    tl.store(dqk_ptr + at, dq * (SCALE / LOG2E), mask=inside[:, None])


@jit
def gradient_from_queries(m, dk, dv, k, v, cols, q_ptr, do_ptr, lse_ptr, delta_ptr, first_ptr, T,
                          SCALE: constexpr, STRIDE_QK: constexpr, STRIDE_O: constexpr, D: constexpr,
                          BLOCK_M: constexpr, PRECISION: constexpr, EDGE: constexpr):
    rows = m + tl.arange(0, BLOCK_M)
    q, do = tile_of(q_ptr, rows, T, STRIDE_QK, D, EDGE), tile_of(do_ptr, rows, T, STRIDE_O, D, EDGE)
    lse = tl.load(lse_ptr + rows, mask=rows < T, other=0.0)
    delta = tl.load(delta_ptr + rows, mask=rows < T, other=0.0)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * SCALE - lse[None, :])    # (keys, queries)
    if EDGE:
        first = tl.load(first_ptr + rows, mask=rows < T, other=T)
        p = tl.where((first[None, :] <= cols[:, None]) & (cols[:, None] <= rows[None, :]), p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@jit
def attention_dkdv_kernel(qk_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dqk_ptr, dv_ptr, first_ptr, last_ptr, T,
                          SCALE: constexpr, STRIDE_QK: constexpr, STRIDE_V: constexpr,
                          STRIDE_DQK: constexpr, STRIDE_DV: constexpr, H: constexpr, HK: constexpr,
                          D: constexpr, PRECISION: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr):
    tiles = tl.cdiv(T, BLOCK_N)
    n0 = tl.program_id(0) % tiles * BLOCK_N
    b, hk = (tl.program_id(0) // tiles // HK).to(tl.int64), tl.program_id(0) // tiles % HK
    qk_ptr, first_ptr, last_ptr = qk_ptr + b * T * STRIDE_QK, first_ptr + b * T, last_ptr + b * T
    cols, d = n0 + tl.arange(0, BLOCK_N), tl.arange(0, D)
    k = tile_of(qk_ptr + (H + hk) * D, cols, T, STRIDE_QK, D, True)
    v = tile_of(v_ptr + b * T * STRIDE_V + hk * D, cols, T, STRIDE_V, D, True)
    end = tl.load(last_ptr + tl.minimum(n0 + BLOCK_N, T) - 1) + 1   # no query from here on sees any of these
    whole = tl.maximum((tl.load(last_ptr + n0) + 1 - n0) // BLOCK_M * BLOCK_M + n0, n0 + BLOCK_N)
    diagonal = tl.cdiv(tl.minimum(n0 + BLOCK_N, end) - n0, BLOCK_M)
    dk, dv = tl.zeros([BLOCK_N, D], tl.float32), tl.zeros([BLOCK_N, D], tl.float32)
    for g in range(H // HK):
        h = hk * (H // HK) + g
        q_ptr, o_ptr = qk_ptr + h * D, do_ptr + b * T * (H * D) + h * D
        l_ptr, d_ptr = lse_ptr + (b * H + h) * T, delta_ptr + (b * H + h) * T
        for m in range(n0 + BLOCK_N, whole, BLOCK_M):                   # all of these queries see all keys
            dk, dv = gradient_from_queries(m, dk, dv, k, v, cols, q_ptr, o_ptr, l_ptr, d_ptr, first_ptr, T,
                                           SCALE, STRIDE_QK, H * D, D, BLOCK_M, PRECISION, False)
        for i in range(diagonal + tl.cdiv(tl.maximum(end - whole, 0), BLOCK_M)):
            m = tl.where(i < diagonal, n0 + i * BLOCK_M, whole + (i - diagonal) * BLOCK_M)
            dk, dv = gradient_from_queries(m, dk, dv, k, v, cols, q_ptr, o_ptr, l_ptr, d_ptr, first_ptr, T,
                                           SCALE, STRIDE_QK, H * D, D, BLOCK_M, PRECISION, True)
    at, inside = (b * T + cols)[:, None], (cols < T)[:, None]
    tl.store(dqk_ptr + at * STRIDE_DQK + (H + hk) * D + d[None, :], dk * (SCALE / LOG2E), mask=inside)
    tl.store(dv_ptr + at * STRIDE_DV + hk * D + d[None, :], dv, mask=inside)


def attention_tiles(D, itemsize, limit):
    """BLOCK_M, BLOCK_N, num_warps, num_stages of the forward, dq and dk/dv kernels. What goes along, keys in the first
    two, queries in the third, has a block that divides the other: so a tile lies on the diagonal or beside it.

    A multiprocessor of an RTX 4090 has 65,536 registers and 102,400 bytes of shared memory, 1,024 of them
    taken per program. By `bench_mfu.py --kernels=compile-only` for sm_89, at D = 64 registers bind (146, 178
    and 224 a thread: three, two and two programs at once), at D = 128 shared memory does (36,864, 53,248 and
    74,496 bytes: two, one and one, of 4, 8 and 8 warps). A tile of 64 queries computes 12.5 % more than the
    exact triangle at T = 512, one of 128 25 %. All of it arithmetic: none of this has been timed.
    """
    if itemsize == 4 or limit < 101376:
        return (32, 16, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1)
    if D <= 64:
        return (64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)
    return (64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 2) if limit > 200000 else (64, 64, 8, 2)      # Hopper's and later spill


def tile(sizes):
    return dict(zip(('BLOCK_M', 'BLOCK_N', 'num_warps', 'num_stages'), sizes))


def qk_tile(D):
    return dict(BLOCK_M=max(1, 2048 // triton.next_power_of_2(D)), BLOCK_D=triton.next_power_of_2(D))


@op
def attend_forward(qkv: Tensor, idx: Tensor, first: Tensor, last: Tensor, cos: Tensor, sin: Tensor, H: int,
                   scale: float, norm: bool, shift: bool, bos: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o (B, T, H, D); for the backward pass qk (B, T, H + H_kv, D), rstd of its rows, lse (B, H, T).

    qkv (B, T, H + 2 H_kv, D) contiguous; idx, first, last (B, T), the latter two int32; cos, sin
    (T, R / 2) fp32. Where R is 0 queries and keys are taken as they come.
    """
    B, T, N, D = qkv.shape
    assert qkv.is_contiguous() and idx.is_contiguous() and first.is_contiguous() and last.is_contiguous()
    HK, R, as_given = (N - H) // 2, 2 * cos.shape[1], cos.shape[1] == 0
    qk = qkv.new_empty(0) if as_given else qkv.new_empty((B, T, H + HK, D))
    rstd = qkv.new_empty(B * T * (H + HK) if norm else 0, dtype=torch.float32)
    o, lse = qkv.new_empty((B, T, H, D)), qkv.new_empty((B, H, T), dtype=torch.float32)
    if not as_given:
        rows, small = B * T * (H + HK), qk_tile(D)
        launch(qk_kernel, (blocks(rows, small['BLOCK_M']),), qkv, qk, rstd, idx, cos, sin, rows, T, H, HK, D,
               R, bos, norm, shift, 1e-6, **small)
    source, v = qkv if as_given else qk, qkv[:, :, H + HK:]
    sizes = tile(attention_tiles(D, qkv.element_size(), shared_memory(qkv))[0])
    launch(attention_kernel, (blocks(T, sizes['BLOCK_M']) * B * H,), source, v, o, lse, first, T,
           scale * math.log2(math.e), source.shape[2] * D, N * D, H, HK, D, precision(qkv), **sizes)
    return o, qk, rstd, lse


@op
def attend_backward(do: Tensor, qkv: Tensor, o: Tensor, qk: Tensor, rstd: Tensor, lse: Tensor, idx: Tensor,
                    first: Tensor, last: Tensor, cos: Tensor, sin: Tensor, scale: float, norm: bool,
                    shift: bool, bos: int) -> Tensor:
    """The gradient of qkv."""
    (B, T, N, D), H = qkv.shape, o.shape[2]
    HK, R, as_given, do = (N - H) // 2, 2 * cos.shape[1], cos.shape[1] == 0, do.contiguous()
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    dqk, qk = (dqkv, qkv) if as_given else (torch.empty_like(qk), qk)
    v, dv = qkv[:, :, H + HK:], dqkv[:, :, H + HK:]
    shape = dict(SCALE=scale * math.log2(math.e), STRIDE_QK=qk.shape[2] * D, STRIDE_V=N * D,
                 STRIDE_DQK=dqk.shape[2] * D, H=H, HK=HK, D=D, PRECISION=precision(qkv))
    _, dq_sizes, dkdv_sizes = map(tile, attention_tiles(D, qkv.element_size(), shared_memory(qkv)))
    launch(attention_dq_kernel, (blocks(T, dq_sizes['BLOCK_M']) * B * H,), qk, v, o, do, lse, delta, dqk,
           first, T, **shape, **dq_sizes)
    launch(attention_dkdv_kernel, (blocks(T, dkdv_sizes['BLOCK_N']) * B * HK,), qk, v, do, lse, delta, dqk,
           dv, first, last, T, STRIDE_DV=N * D, **shape, **dkdv_sizes)
    if not as_given:
        rows, small = B * T * (H + HK), qk_tile(D)
        launch(qk_backward_kernel, (blocks(rows, small['BLOCK_M']),), dqk, qk, rstd, idx, cos, sin, dqkv,
               rows, T, H, HK, D, R, bos, norm, shift, **small)
    return dqkv


def precision(x):
    """fp32 is multiplied exactly, not in tf32: who asks for float32 wants to check something."""
    return 'ieee' if x.dtype == torch.float32 else 'tf32'


def attend_with_kernels(layer, qkv, context):
    """o (B, T, H, D) of an Attention layer's packed qkv: all between its two products."""
    idx, cos, sin, first, last, *_ = context
    flags = layer.qk_norm, layer.from_before is not None
    if 'qk_norm' not in IN_USE:
        qkv = torch.cat(layer.heads(qkv, context), dim=1).transpose(1, 2).contiguous()
        cos, sin, flags = cos[:, :0], sin[:, :0], (False, False)
    return attend_forward(qkv, idx, first, last, cos, sin, layer.n_head, layer.scale, *flags, layer.bos)[0]


def attend_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)           # no zeros for outputs that nobody differentiates
    qkv, idx, first, last, cos, sin, _, *ctx.rest = inputs
    o, qk, rstd, lse = output
    ctx.save_for_backward(qkv, o, qk, rstd, lse, idx, first, last, cos, sin)


def attend_gradient(ctx, do, *_):
    return attend_backward(do, *ctx.saved_tensors, *ctx.rest), *[None] * 10


attend_forward.register_autograd(attend_gradient, setup_context=attend_save)


# ---- linear and cross-entropy: a block of logits at a time, turned into their own gradient where they stand
#
#   z = x W^T     p = softmax(z)     loss = lse - z_target     lse = log sum_j e^z_j     dz = (p - onehot) / count

@jit
def cross_entropy_kernel(z_ptr, target_ptr, loss_ptr, count_ptr, V: constexpr, STRIDE: constexpr,
                         GRAD: constexpr, BLOCK_V: constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    keep, gold = target >= 0, tl.maximum(target, 0).to(tl.int32)
    top, total, z_gold = -1e30, 0.0, 0.0
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + row * STRIDE + cols, mask=cols < V, other=0.0).to(tl.float32)
        z_gold += tl.sum(tl.where(cols == gold, z, 0.0))
        z = tl.where(cols < V, z * LOG2E, float('-inf'))
        new_top = tl.maximum(top, tl.max(z))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(z - new_top))
        top = new_top
    lse = top + tl.log2(total)                                        # base 2
    tl.store(loss_ptr + row, tl.where(keep, lse / LOG2E - z_gold, 0.0))
    if GRAD:
        share = tl.where(keep, 1.0 / tl.load(count_ptr), 0.0)
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            z = tl.load(z_ptr + row * STRIDE + cols, mask=cols < V, other=0.0).to(tl.float32)
            g = tl.exp2(z * LOG2E - lse) - tl.where(cols == gold, 1.0, 0.0)
            tl.store(z_ptr + row * STRIDE + cols, g * share, mask=cols < V)


@op
def cross_entropy_forward(x: Tensor, weight: Tensor, targets: Tensor, grad: bool,
                          rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses' mean over targets >= 0; all losses (N,), 0 where one is left out; dx (N, C), dW (V, C)."""
    N, V, w, x, targets = len(x), len(weight), weight.to(x.dtype), x.contiguous(), targets.contiguous()
    losses, count = x.new_empty(N, dtype=torch.float32), (targets >= 0).sum().clamp(min=1).float()
    dx, dw = torch.empty_like(x) if grad else x.new_empty(0), torch.zeros_like(weight if grad else weight[:0])
    stride = triton.cdiv(V, 64) * 64        # rows of any V begin aligned: GPT-2 has 50,257
    for i in range(0, N, rows):
        xs, ys = x[i:i + rows], targets[i:i + rows]
        z = x.new_empty(len(xs), stride)[:, :V]
        torch.mm(xs, w.t(), out=z)
        launch(cross_entropy_kernel, (len(xs),), z, ys, losses[i:i + rows], count, V, stride, grad,
               BLOCK_V=min(triton.next_power_of_2(V), 4096), num_warps=8)
        if grad:
            torch.mm(z, w, out=dx[i:i + rows])
            dw += z.t() @ xs
    return losses.sum() / count, losses, dx, dw


def cross_entropy_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def cross_entropy_gradient(ctx, grad, *_):
    dx, dw = ctx.saved_tensors
    return dx * grad.to(dx.dtype), dw * grad, None, None, None


cross_entropy_forward.register_autograd(cross_entropy_gradient, setup_context=cross_entropy_save)


# ---- the MLP: its activation at the end of a matrix product, so that what is not yet activated never exists
#
#   relu2     a = relu(x U^T)^2                   da -> dh = 2 sqrt(a) da: a alone is kept
#   swiglu    g, u = x U^T, a = silu(g) u         dg = da u sigma(g) (1 + g (1 - sigma(g))), du = da silu(g)
#
# Forward multiplies x (M, K) by U (N, K), for swiglu (2N, K), gate first; backward dy (M, K) by down (K, N).

@jit
def mlp_kernel(x_ptr, w_ptr, h_ptr, out_ptr, M, N: constexpr, K: constexpr, STRIDE_N: constexpr,
               STRIDE_K: constexpr, GATED: constexpr, BACKWARD: constexpr, PRECISION: constexpr,
               BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr):
    # eight rows of tiles at a time, so that what one tile has read another finds in the L2 cache
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (8 * across) * 8
    high = tl.minimum(down - group, 8)
    m0 = (group + tl.program_id(0) % (8 * across) % high) * BLOCK_M
    n0 = tl.program_id(0) % (8 * across) // high * BLOCK_N
    rows, cols, k = m0.to(tl.int64) + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    x_ptr += tl.minimum(rows, M - 1)[:, None] * K + k[None, :]
    w_ptr += (cols % N)[None, :] * STRIDE_N + k[:, None] * STRIDE_K
    acc, gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        left = k < K - k0
        x = tl.load(x_ptr + k0, mask=left[None, :], other=0.0)
        w = tl.load(w_ptr + k0 * STRIDE_K, mask=left[:, None], other=0.0)
        if GATED and not BACKWARD:
            gate = tl.dot(x, w, gate, input_precision=PRECISION)
            w = tl.load(w_ptr + N * STRIDE_N + k0 * STRIDE_K, mask=left[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    at = rows[:, None] * N + cols[None, :]
    wide = rows[:, None] * (2 * N) + cols[None, :]               # the gate, and N further the other half
    if GATED and BACKWARD:
        gate = tl.load(h_ptr + wide, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(h_ptr + wide + N, mask=inside, other=0.0).to(tl.float32)
        sigma = tl.sigmoid(gate)
        tl.store(out_ptr + wide, acc * u * sigma * (1.0 + gate * (1.0 - sigma)), mask=inside)
        tl.store(out_ptr + wide + N, acc * gate * sigma, mask=inside)
    elif GATED:
        tl.store(h_ptr + wide, gate, mask=inside)
        tl.store(h_ptr + wide + N, acc, mask=inside)
        tl.store(out_ptr + at, gate * tl.sigmoid(gate) * acc, mask=inside)
    elif BACKWARD:
        a = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, 2.0 * tl.sqrt(a) * acc, mask=inside)
    else:
        acc = tl.maximum(acc, 0.0)
        tl.store(out_ptr + at, acc * acc, mask=inside)


def launch_mlp(x, w, h, out, N, strides, gated, backward):
    M, K = x.shape
    small = x.element_size() == 4 or shared_memory(x) < 101376
    BLOCK_M, BLOCK_N, BLOCK_K = (64, 64, 32) if small else (128, 64, 64)
    launch(mlp_kernel, (blocks(M, BLOCK_M) * blocks(N, BLOCK_N),), x, w, h, out, M, N, K, *strides, gated,
           backward, precision(x), BLOCK_M, BLOCK_N, BLOCK_K, num_stages=2 if small else 3,
           num_warps=8 if (gated or backward) and not small else 4)


@op
def mlp_forward(x: Tensor, up: Tensor, down: Tensor, gated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (M, C) of x (M, C); for the backward pass a (M, N), and if gated h (M, 2N)."""
    M, N, x = len(x), down.shape[1], x.contiguous()
    a, h = x.new_empty((M, N)), x.new_empty((M, 2 * N) if gated else 0)
    launch_mlp(x, up, h, a, N, up.stride(), gated, False)
    return a @ down.t(), a, h


@op
def mlp_backward(dy: Tensor, x: Tensor, up: Tensor, down: Tensor, a: Tensor, h: Tensor,
                 gated: bool) -> tuple[Tensor, Tensor, Tensor]:
    dy = dy.contiguous()
    dh = torch.empty_like(h if gated else a)
    launch_mlp(dy, down, h if gated else a, dh, a.shape[1], down.stride()[::-1], gated, True)
    return dh @ up, dh.t() @ x, dy.t() @ a


def mlp_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    (*tensors, ctx.gated), (_, a, h) = inputs, output
    ctx.save_for_backward(*tensors, a, h)


def mlp_gradient(ctx, dy, *_):
    return *mlp_backward(dy, *ctx.saved_tensors, ctx.gated), None


mlp_forward.register_autograd(mlp_gradient, setup_context=mlp_save)

"""The model of halfhour: a small decoder-only transformer, and the operations it stands on.

    part 1   the model        GPTConfig, GPT (Attention, MLP, Block), counts and FLOPs, generate
    part 2   the operations   rms_norm, rotary, attention, linear_cross_entropy: the reference in PyTorch,
                              what a CPU runs, and the seams where hand-written kernels take over

Letters in shape comments: B batch, T time, C = n_embd, H = n_head, G = n_head / n_kv_head, D = head_dim,
V vocabulary.

    python -c "import model; print(model.GPTConfig().describe())"
"""
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- part 1: the model -------------------------------------------------------------------------------------

@dataclass
class GPTConfig:
    """What decides the shape and the arithmetic of a model; every field is also a setting of train.py."""
    vocab_size: int = 8192      # V; train.py takes it from the data set
    bos: int = 0                # id that begins every document, and so ends the one before; from the data set
    block_size: int = 512       # T, the most tokens a query can look back over
    n_layer: int = 10
    n_head: int = 4             # query heads
    n_kv_head: int = 0          # key and value heads, dividing n_head; 0 means n_head
    n_embd: int = 256           # C
    head_dim: int = 0           # D, even; 0 means n_embd / n_head
    mlp: str = 'relu2'          # 'relu2' (So 2021, 2109.08668) or gated, 'swiglu' (Shazeer 2020, 2002.05202)
    mlp_hidden: int = 0         # width inside the MLP; 0 means 4C for relu2, 8C/3 rounded up to 32 for swiglu
    qk_norm: bool = True        # RMS-normalise queries and keys per head (Henry 2020, 2010.04245)
    rope_base: float = 10000.0  # rotary wavelengths: 2 pi to 2 pi rope_base tokens (Su 2021, 2104.09864)
    tie_embeddings: bool = False  # one matrix for input embedding and head
    token_shift: bool = True    # embeddings and keys take in the token before (Peng 2023, 2305.13048)
    value_embeds: int = 0       # in how many last layers a second token embedding is added to the values
    logit_softcap: float = 0.0  # logits become cap * tanh(logits / cap) (Gemma 2, 2408.00118); 0 is off
    doc_mask: bool = True       # a token attends only within its document

    def __post_init__(self):
        for name in ('n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}, it must be at least 1')
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        hidden = 4 * self.n_embd if self.mlp == 'relu2' else -(-self.n_embd // 12) * 32
        self.mlp_hidden = self.mlp_hidden or hidden
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_kv_head', 'head_dim', 'mlp_hidden',
                     'rope_base'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}, it must be at least 1')
        if self.mlp not in ('relu2', 'swiglu'):
            raise ValueError(f"mlp is {self.mlp!r}, it must be 'relu2' or 'swiglu'")
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}')
        if self.head_dim % 2:
            raise ValueError(f'head_dim is {self.head_dim}, rotary embedding needs it even: '
                             f'change n_embd or n_head')
        if not 0 <= self.value_embeds <= self.n_layer:
            raise ValueError(f'value_embeds is {self.value_embeds}, it counts layers and '
                             f'n_layer is {self.n_layer}')

    def params(self):
        """Parameter counts: dict of total, embedding (token tables and an untied head), non_embedding."""
        q, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        tables = self.vocab_size * (self.n_embd + self.value_embeds * kv)
        layer = self.n_embd * (2 * q + 2 * kv + (3 if self.mlp == 'swiglu' else 2) * self.mlp_hidden)
        head = 0 if self.tie_embeddings else self.vocab_size * self.n_embd
        body = self.n_layer * layer + self.scalars()
        return dict(total=tables + head + body, embedding=tables + head, non_embedding=body)

    def scalars(self):
        """How many parameters multiply one channel or one tensor, and so take no part in a matrix product."""
        return 2 * self.n_layer + self.value_embeds + self.token_shift * self.n_embd

    def flops_per_token(self, attended=None):
        """Model FLOPs of one training token, forward and backward: 6 a weight, 12 D a head and attended pair.

        attended: mean number of positions a token attends to, itself included; the causal mean (T + 1) / 2 by
        default, T for the convention of Chowdhery 2022 (2204.02311). Norms, softmax, lookups and the
        optimizer are not counted.
        """
        attended = (self.block_size + 1) / 2 if attended is None else attended
        weights = self.params()['non_embedding'] - self.scalars() + self.vocab_size * self.n_embd
        return 6 * weights + 12 * self.n_layer * self.n_head * self.head_dim * attended

    def describe(self):
        p = self.params()
        return (f'{self.n_layer} layers, {self.n_embd} wide, {self.n_head} heads of {self.head_dim} '
                f'({self.n_kv_head} for keys and values), {self.mlp} {self.mlp_hidden}, '
                f'vocabulary {self.vocab_size}: {p["total"]:,} parameters '
                f'({p["non_embedding"]:,} without embeddings), '
                f'{self.flops_per_token() / 1e6:.1f}M FLOPs a training token')


class Linear(nn.Linear):
    """A linear map without bias; weights are kept in fp32 and multiplied in the dtype of the activations."""

    def __init__(self, fan_in, fan_out):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Causal self-attention: grouped-query heads, rotary positions, QK-norm, optional value embedding.

    With token_shift the slowly rotating half of a key is that of the token before: a query finds the places
    where its own token was followed by something, and can copy what that was, in one layer instead of two
    (the "partial key offset" of modded-nanogpt, 2025).
    """

    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.qk_norm, self.bos = config.qk_norm, config.bos
        slow = torch.arange(self.head_dim) % (self.head_dim // 2) >= (self.head_dim + 3) // 4
        self.register_buffer('from_before', slow if config.token_shift else None, persistent=False)
        self.q = Linear(config.n_embd, self.n_head * self.head_dim)
        self.k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.proj = Linear(self.n_head * self.head_dim, config.n_embd)
        has_table = layer >= config.n_layer - config.value_embeds
        width = self.n_kv_head * self.head_dim
        self.value_embed = nn.Embedding(config.vocab_size, width) if has_table else None
        self.value_gain = nn.Parameter(torch.empty(())) if has_table else None

    def forward(self, x, idx, cos, sin, doc_start, cache=None):
        B, T, C = x.shape
        qkv = torch.cat([self.q.weight, self.k.weight, self.v.weight]).to(x.dtype)  # one product, not three
        heads = F.linear(x, qkv).view(B, T, -1, self.head_dim).transpose(1, 2)      # (B, H + 2 H_kv, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if self.value_embed is not None:
            table = self.value_embed(idx).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
            v = v + (self.value_gain * table).to(v.dtype)
        if self.from_before is not None:
            k = torch.where(self.from_before, shift(k, (idx != self.bos)[:, None, :, None], self, cache), k)
        if self.qk_norm:
            # scores of up to 15: unit heads alone reach sqrt D, too flat a softmax to pick out one token
            q, k = 15 * self.head_dim ** -0.5 * rms_norm(q), rms_norm(k)
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self, k, v)
        o = attention(q, k, v, doc_start)                             # (B, H, T, D)
        return self.proj(o.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.mlp == 'swiglu'
        self.up = Linear(config.n_embd, config.mlp_hidden * (2 if self.gated else 1))
        self.down = Linear(config.mlp_hidden, config.n_embd)

    def forward(self, x):
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        return self.down(F.relu(x).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.mix = nn.Parameter(torch.empty(2))  # weights of the residual stream and of the token embedding

    def forward(self, x, x0, *context):
        x = self.mix[0].to(x.dtype) * x + self.mix[1].to(x.dtype) * x0
        x = x + self.attn(rms_norm(x), *context)
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    """A decoder-only transformer: pre-norm blocks over RMS-normalised token embeddings, no biases, no gains.

    Initialisation (N is normal with the standard deviation given; the forward pass normalises the embedding):

        | weight                    | init          | why                                                    |
        | ------------------------- | ------------- | ------------------------------------------------------ |
        | token embedding, untied   | N(1)          | normalised at once, so only its angle matters          |
        | the head, a tied table    | N(0.5 / C)    | logits begin near 0: loss begins at log V at any width |
        | value embedding, its gain | N(1), 0.5     | same size as a value of a normalised token             |
        | q, v, MLP up              | N(1 / sqrt C) | unit outputs from unit inputs at any width             |
        | k                         | as q          | a token looks for its like (Trockman 2023, 2305.09828) |
        | attention out             | 0.3 v^T       | and copies what it finds there (README, "measured")    |
        | MLP down                  | 0             | MLPs begin as the identity (Zhang 2019, 1901.09321)    |
        | mix of a block            | 1, 0          | a plain residual stream                                |
        | token_shift, a channel    | 0 ... 1       | some channels know the token, some the one before      |
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.shift = nn.Parameter(torch.empty(config.n_embd)) if config.token_shift else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        cos, sin = rotary_table(config.block_size, config.head_dim, config.rope_base)
        self.register_buffer('cos', cos, persistent=False)
        self.register_buffer('sin', sin, persistent=False)
        self.compute_dtype = torch.float32       # what the blocks compute in; parameters stay fp32
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        C = self.config.n_embd
        self.wte.weight.normal_(std=1.0)
        self.lm_head.weight.normal_(std=0.5 / C)   # last, so that a tied table gets the head's init
        if self.shift is not None:
            self.shift.copy_(torch.linspace(0, 1, C))
        for block in self.blocks:
            attn = block.attn
            for linear in (attn.q, attn.v, block.mlp.up):
                linear.weight.normal_(std=C ** -0.5)
            group = attn.n_head // attn.n_kv_head      # the query heads of a key head, side by side
            heads = attn.q.weight.view(attn.n_kv_head, group, attn.head_dim, C)
            attn.k.weight.copy_(heads[:, 0].flatten(0, 1))
            values = attn.v.weight.view(attn.n_kv_head, 1, attn.head_dim, C).expand_as(heads)
            attn.proj.weight.copy_(0.3 * values.reshape(-1, C).t())
            block.mlp.down.weight.zero_()
            block.mix.copy_(torch.tensor([1.0, 0.0]))
            if block.attn.value_embed is not None:
                block.attn.value_embed.weight.normal_(std=1.0)
                block.attn.value_gain.fill_(0.5)

    def trunk(self, idx, cache=None):
        """Final hidden states (B, T, C), in compute_dtype, of idx (B, T)."""
        past = cache.length if cache is not None else 0
        T = idx.shape[1]
        if past + T > self.config.block_size:
            raise ValueError(f'{past + T} positions, block_size is {self.config.block_size}')
        doc_start = self.doc_starts(idx, past, cache)
        cos, sin = (t[past:past + T].to(self.compute_dtype) for t in (self.cos, self.sin))
        x = rms_norm(self.wte(idx).to(self.compute_dtype))
        if self.shift is not None:
            before = shift(x, (idx != self.config.bos)[..., None], self, cache)
            x = rms_norm(x + self.shift.to(x.dtype) * before)
        x0 = x
        for block in self.blocks:
            x = block(x, x0, idx, cos, sin, doc_start, cache)
        if cache is not None:
            cache.length += T
        return rms_norm(x)

    def doc_starts(self, idx, past, cache):
        """(B, T): the first position that each token may attend to, its document's BOS."""
        position = torch.arange(past, past + idx.shape[1], device=idx.device)
        start = position * (idx == self.config.bos) if self.config.doc_mask else torch.zeros_like(idx)
        if cache is not None:
            start[:, 0] = torch.maximum(start[:, 0], cache.doc_start)
        start = start.cummax(dim=1).values
        if cache is not None:
            cache.doc_start = start[:, -1]
        return start

    def forward(self, idx, targets, reduction='mean'):
        """Cross-entropy in nats: mean over targets >= 0, or with 'none' one a token, 0 where target < 0."""
        x = self.trunk(idx)
        loss = linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                    self.config.logit_softcap, reduction)
        return loss if reduction == 'mean' else loss.view_as(targets)

    def logits(self, x):
        """Logits (..., V) in fp32 of hidden states (..., C)."""
        return softcap(self.lm_head(x).float(), self.config.logit_softcap)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """Continue idx (B, T) and yield new ids, (B,) at a time; the caller stops at bos, a document's end.

        temperature 0 is greedy; top_k 0 and top_p 1 keep all. Past block_size the older half is forgotten.
        """
        block_size = self.config.block_size
        idx = idx[:, -block_size:]
        cache, new = KVCache(self, len(idx)), idx
        for _ in range(max_new_tokens):
            if cache.length + new.shape[1] > block_size:
                cache, new = KVCache(self, len(idx)), idx[:, -(block_size // 2):]
            logits = self.logits(self.trunk(new, cache)[:, -1])
            new = sample_token(logits, temperature, top_k, top_p, generator)[:, None]
            idx = torch.cat([idx, new], dim=1)[:, -block_size:]
            yield new[:, 0]


class KVCache:
    """Keys and values of every layer, (B, H_kv, block_size, D) each, filled up to `length`; and what `shift`
    needs of the last position."""

    def __init__(self, model, batch_size):
        c, weight = model.config, model.wte.weight
        shape = (2, batch_size, c.n_kv_head, c.block_size, c.head_dim)
        self.store = {block.attn: torch.empty(shape, dtype=model.compute_dtype, device=weight.device)
                      for block in model.blocks}
        self.length, self.last = 0, {}
        self.doc_start = torch.zeros(batch_size, dtype=torch.long, device=weight.device)

    def append(self, layer, k, v):
        """Add k, v (B, H_kv, T, D), return all the layer has seen; `length` moves after the last layer."""
        kv, end = self.store[layer], self.length + k.shape[2]
        kv[0, :, :, self.length:end], kv[1, :, :, self.length:end] = k, v
        return kv[0, :, :, :end], kv[1, :, :, :end]


def sample_token(logits, temperature, top_k, top_p, generator=None):
    """One id (B,) from logits (B, V): scaled, cut to the top_k likeliest, then the fewest of mass top_p."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, order = (logits / temperature).sort(dim=-1, descending=True)
    probs = logits.softmax(dim=-1)
    if top_k:
        probs[:, top_k:] = 0
    probs = probs / probs.sum(-1, keepdim=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0      # what comes before a kept token holds less than top_p
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


# ---- part 2: the operations --------------------------------------------------------------------------------

def rms_norm(x, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) over the last dimension (Zhang 2019, 1910.07467); statistics in fp32."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def softcap(logits, cap):
    return cap * torch.tanh(logits / cap) if cap else logits


def shift(x, follows, owner, cache=None):
    """x (..., T, D), each position's from the one before; 0 where `follows` says that nothing goes before.

    What goes before the first position is 0, or what `owner` left in the cache the last time.
    """
    first = cache.last.get(owner) if cache is not None else None
    if cache is not None:
        cache.last[owner] = x[..., -1:, :]
    first = torch.zeros_like(x[..., :1, :]) if first is None else first
    return torch.cat([first, x[..., :-1, :]], dim=-2) * follows


def rotary_table(length, head_dim, base):
    """cos, sin (length, head_dim / 2) of position / base^(2i / head_dim)."""
    angle = torch.arange(length)[:, None] * base ** (-torch.arange(0, head_dim, 2) / head_dim)
    return angle.cos(), angle.sin()


def rotary(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + D/2}) of x (B, H, T, D) by their position's angle; cos, sin (T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(q, k, v, doc_start, rows=128):
    """Causal attention within documents: softmax(q k^T / sqrt D) v over doc_start[i] <= j <= i.

    q (B, H, T, D) are the last T positions of k, v (B, H_kv, S, D); doc_start (B, T) counts in S.
    Returns (B, H, T, D). Blocks of `rows` queries read only the keys up to their last one: on a CPU this
    takes half the time of F.scaled_dot_product_attention with a mask, in bf16 a third (README, "measured").
    """
    B, H, T, D = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    if q.is_cuda:
        i, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
        seen = (j <= i) & (j >= doc_start[:, None, :, None])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=H != H_kv)
    q = (q * D ** -0.5).view(B, H_kv, H // H_kv, T, D)      # the G query heads of a key head side by side
    out = []
    for first in range(0, T, rows):
        last = min(first + rows, T)
        end = S - T + last
        i = torch.arange(end - last + first, end, device=q.device)[:, None]
        j = torch.arange(end, device=q.device)
        hidden = (j > i) | (j < doc_start[:, first:last, None])        # (B, rows, end)
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, float('-inf'))
        scores = q[:, :, :, first:last].reshape(B, H_kv, -1, D) @ k[:, :, :end].transpose(-1, -2)
        scores = scores.view(B, H_kv, -1, last - first, end) + bias[:, None, None]
        out.append((scores.softmax(-1).view(B, H_kv, -1, end) @ v[:, :, :end]).view(B, H, last - first, D))
    return torch.cat(out, dim=2)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softcap(x weight^T), `rows` tokens at a time, gradient made in the forward pass.

    The (tokens, V) logits, the largest tensor of a small model, never exist: each block of rows is
    multiplied, turned into its loss and its gradient, and multiplied back while it is still in cache.
    d loss / d logits = (softmax - onehot) / n.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cap, rows):
        n = (targets >= 0).sum().clamp(min=1)
        w = weight.to(x.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx, dw = [], torch.zeros_like(weight, dtype=torch.float32)
        minus_one = torch.full((rows, 1), -1.0, device=x.device)
        for xs, ys in zip(x.split(rows), targets.split(rows)):
            keep = ys >= 0
            z = softcap((xs @ w.t()).float(), cap)
            lse = z.logsumexp(dim=-1)
            gold = z.gather(1, ys.clamp(min=0)[:, None])[:, 0]
            loss = loss + ((lse - gold) * keep).sum()
            g = z.sub(lse[:, None]) if cap else z.sub_(lse[:, None])
            g.exp_().scatter_add_(1, ys.clamp(min=0)[:, None], minus_one[:len(ys)])
            if cap:
                g.mul_(1 - (z / cap).square_())
            g = g.mul_((keep / n)[:, None]).to(x.dtype)
            dx.append(g @ w)
            dw += g.t() @ xs
        ctx.save_for_backward(torch.cat(dx), dw.to(weight.dtype))
        return loss / n

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dw * grad, None, None, None


def linear_cross_entropy(x, weight, targets, cap=0.0, reduction='mean', rows=None):
    """Cross-entropy in nats of targets (N,) under softcap(x weight^T), x (N, C), weight (V, C).

    reduction 'mean' (differentiable) or 'none', (N,) fp32. Targets < 0 are left out; with 'none' they give 0.
    """
    rows = rows or (8192 if x.is_cuda else 512)    # a GPU wants large products, a CPU small logits
    if reduction == 'mean':
        return LinearCrossEntropy.apply(x, weight, targets, cap, rows)
    w = weight.to(x.dtype)
    return torch.cat([F.cross_entropy(softcap((xs @ w.t()).float(), cap), ys, ignore_index=-1,
                                      reduction='none')
                      for xs, ys in zip(x.split(rows), targets.split(rows))])


def implementations(device):
    """Which code runs each operation on this device, and why; train.py prints it once."""
    on_cpu = device == 'cpu'
    where = 'matrix products over blocks of 128 queries' if on_cpu else 'scaled_dot_product_attention, masked'
    return {'attention': where, 'linear_cross_entropy': 'blocks of tokens, gradient in the forward pass',
            'rms_norm, rotary, MLP': 'torch operations, fused by torch.compile where it is on'}

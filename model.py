"""The model of halfhour: a small decoder-only transformer, and the operations it stands on.

    part 1   the model        GPTConfig, GPT (Attention and its kinds, MLP, Block), counts, generate
    part 2   growth           grown_config, grow: a wider or deeper model that computes the same
    part 3   the operations   rms_norm, rotary, attention, linear_cross_entropy: the reference in PyTorch,
                              what a CPU runs, and choose_kernels, which says what runs instead on a GPU
    part 4   the kernels      the same operations in Triton, fused, forward and backward

Letters in shape comments: B batch, T time, C = n_embd, H = n_head, G = n_head / n_kv_head, D = head_dim,
V vocabulary.

    python -c "import model; print(model.GPTConfig().describe())"
"""
import dataclasses
import functools
import math
from dataclasses import dataclass

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
    window: int = 0             # and only to so many tokens, itself included; 0 is off
    rotary_dim: int = 0         # channels of a head that rotary embedding turns, even; 0 means all D
    kv_latent: int = 0          # width of a latent that keys and values are made from; 0 is plain attention
    q_latent: int = 0           # with kv_latent: width of one that queries are made from; 0 is none
    z_loss: float = 0.0         # weight of the squared log of the softmax's sum (Chowdhery 2022, 2204.02311)
    attn_tokens: int = 0        # parameter tokens in place of each matrix of attention (Pattention); 0 is off
    mlp_tokens: int = 0         # parameter tokens in place of the MLP; 0 is off
    token_norm: str = 'norm_gelu'  # of their scores: 'norm_gelu', GeLU after normalising, or 'gelu_norm'
    attn_scale_tokens: int = 0  # the root of this scales the scores; 0 means attn_tokens. A grown model that
    mlp_scale_tokens: int = 0   # keeps its old number computes what it did; 0 means mlp_tokens
    classes: int = 0            # word classes that a second head guesses; train.py takes it from the data set
    dropout: float = 0.0        # share of what attention and MLP add that training leaves out, at random
    layer_drop: float = 0.0     # chance that a row of the batch skips what the last layer adds; less below
    predict_ahead: int = 0      # further tokens that training predicts too (Gloeckle 2024, 2404.19737)
    head_scale: float = 1.0     # of the last hidden states, before the head; growth lowers a tied head's
    domains: str = ''           # names, by commas, of those with a part of the MLP each; '' is none
    domain_share: float = 0.25  # of mlp_hidden that is a domain's own
    experts: int = 0            # routed MLPs beside the one that all tokens pass; 0 is none
    experts_top: int = 3        # how many of them a token passes; together they then are as wide as one MLP
    expert_hidden: int = 0      # width of a routed one; 0 means mlp_hidden

    def __post_init__(self):
        for name in ('n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}, it must be at least 1')
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: change one, '
                             f'or give head_dim')
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        hidden = 4 * self.n_embd if self.mlp == 'relu2' else -(-self.n_embd // 12) * 32
        self.mlp_hidden = self.mlp_hidden or hidden // (1 + self.experts_top if self.experts else 1)
        self.expert_hidden = self.expert_hidden or self.mlp_hidden
        self.rotary_dim = self.rotary_dim or self.head_dim
        self.attn_scale_tokens = self.attn_scale_tokens or self.attn_tokens
        self.mlp_scale_tokens = self.mlp_scale_tokens or self.mlp_tokens
        ones = ('vocab_size block_size n_layer n_kv_head head_dim mlp_hidden rope_base rotary_dim '
                'experts_top expert_hidden').split()
        zeros = ('attn_tokens mlp_tokens attn_scale_tokens mlp_scale_tokens predict_ahead kv_latent '
                 'q_latent experts').split()
        for name, least in [(name, 1) for name in ones] + [(name, 0) for name in zeros]:
            if getattr(self, name) < least:
                raise ValueError(f'{name} is {getattr(self, name)}, it must be at least {least}')
        for name, a, b in ('mlp', 'relu2', 'swiglu'), ('token_norm', 'norm_gelu', 'gelu_norm'):
            if getattr(self, name) not in (a, b):
                raise ValueError(f'{name} is {getattr(self, name)!r}, it must be {a!r} or {b!r}')
        if self.attn_tokens and self.kv_latent:
            raise ValueError('attn_tokens and kv_latent both replace the matrices of attention: choose one')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}')
        if self.head_dim % 2:
            raise ValueError(f'head_dim is {self.head_dim}, rotary embedding needs it even: '
                             f'change n_embd or n_head')
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f'rotary_dim is {self.rotary_dim}, it must be even and at most '
                             f'head_dim {self.head_dim}')
        if not 0 <= self.value_embeds <= self.n_layer:
            raise ValueError(f'value_embeds is {self.value_embeds}, it counts layers and '
                             f'n_layer is {self.n_layer}')
        if self.q_latent and not self.kv_latent:
            raise ValueError(f'q_latent is {self.q_latent} and kv_latent 0: it needs that too')
        if self.kv_latent and (self.rotary_dim == self.head_dim or self.value_embeds
                               or self.n_kv_head != self.n_head):
            raise ValueError(f'kv_latent {self.kv_latent} needs rotary_dim below head_dim {self.head_dim} '
                             f'(it is {self.rotary_dim}), no n_kv_head and no value_embeds')
        if sum(map(bool, (self.mlp_tokens, self.domains, self.experts))) > 1:
            raise ValueError('mlp_tokens, domains and experts all change the MLP: choose one')
        if self.experts and self.experts_top > self.experts:
            raise ValueError(f'experts_top is {self.experts_top}, and there are {self.experts} experts')
        if self.domains and not 0 < self.own_hidden < self.mlp_hidden:
            raise ValueError(f'domain_share is {self.domain_share}, it must leave some of mlp_hidden '
                             f'{self.mlp_hidden} to each domain and some to all')

    @property
    def n_domains(self):
        return len(self.domains.split(',')) if self.domains else 0

    @property
    def own_hidden(self):
        return round(self.domain_share * self.mlp_hidden)

    def params(self):
        """Parameter counts: dict of total, embedding (token tables and an untied head), non_embedding, and
        active: without the heads that training alone uses, and without other domains' parts and the experts
        that a token does not pass."""
        total, tables, _, idle = count(dataclasses.astuple(self))
        idle += self.n_embd * (self.n_embd * self.predict_ahead + self.classes)
        return dict(total=total, embedding=tables, non_embedding=total - tables, active=total - idle)

    def flops_per_token(self, attended=None):
        """Model FLOPs of one training token, forward and backward: 6 a weight, 12 D a head and attended pair.

        attended: mean number of positions a token attends to, itself included; by default that of one long
        document, (T + 1) / 2 without a window; T is the convention of Chowdhery 2022 (2204.02311). Norms,
        softmax, lookups and the optimizer are not counted.
        """
        T = self.block_size
        W = min(self.window or T, T)
        attended = W - W * (W - 1) / (2 * T) if attended is None else attended
        heads = (1 + self.predict_ahead) * self.vocab_size * self.n_embd
        weights = count(dataclasses.astuple(self))[2] + heads
        return 6 * weights + 12 * self.n_layer * self.n_head * self.head_dim * attended

    def describe(self):
        p = self.params()
        mlp = f'{self.mlp_tokens} feed-forward tokens' if self.mlp_tokens else f'{self.mlp} {self.mlp_hidden}'
        mlp = f'{self.attn_tokens} attention tokens, {mlp}' if self.attn_tokens else mlp
        mlp += f', {self.own_hidden} of them in each of {self.n_domains} domains' if self.domains else ''
        routed = f', {self.experts_top} of {self.experts} experts of {self.expert_hidden}'
        mlp += routed if self.experts else ''
        return (f'{self.n_layer} layers, {self.n_embd} wide, {self.n_head} heads of {self.head_dim} '
                f'({self.n_kv_head} for keys and values), {mlp}, '
                f'vocabulary {self.vocab_size}: {p["total"]:,} parameters '
                f'({p["non_embedding"]:,} without embeddings), '
                f'{self.flops_per_token() / 1e6:.1f}M FLOPs a training token')


@functools.cache
def count(fields):
    """Parameters of a model with these fields of GPTConfig: all, tables and head, matrices that a token meets
    but for the head, matrices that it does not meet."""
    with torch.device('meta'):
        model = GPT(GPTConfig(*fields))
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)} | {model.lm_head.weight}
    matrices = [m.weight for m in model.modules() if isinstance(m, Linear) and m is not model.lm_head]
    idle = sum(m.weight[m.active:].numel() for m in model.modules() if isinstance(m, Several))
    total, tables, met = (sum(p.numel() for p in some) for some in (model.parameters(), tables, matrices))
    return total, tables, met - idle, idle


class Linear(nn.Linear):
    """A linear map without bias; weights are kept in fp32 and multiplied in the dtype of the activations."""

    def __init__(self, fan_in, fan_out):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x, weight=None):
        return F.linear(x, (self.weight if weight is None else weight).to(x.dtype))


class Several(Linear):
    """The weights of n linear maps, (n, fan_out, fan_in), of which a token meets `active`."""

    def __init__(self, n, fan_in, fan_out, active):
        super().__init__(fan_in, fan_out)
        self.weight, self.active = nn.Parameter(torch.empty(n, fan_out, fan_in)), active


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
        slow = slow_channels(self.head_dim, config.rotary_dim) if config.token_shift else None
        self.register_buffer('from_before', slow, persistent=False)
        # scores of up to 15: unit heads alone reach sqrt D, too flat a softmax to pick out one token
        self.scale = 15 / self.head_dim if config.qk_norm else self.head_dim ** -0.5
        self.q = Linear(config.n_embd, self.n_head * self.head_dim)
        self.k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.proj = Linear(self.n_head * self.head_dim, config.n_embd)
        self.cached = 2, self.n_kv_head, self.head_dim       # tensors, heads and width in a KVCache
        has_table = layer >= config.n_layer - config.value_embeds
        width = self.n_kv_head * self.head_dim
        self.value_embed = nn.Embedding(config.vocab_size, width) if has_table else None
        self.value_gain = nn.Parameter(torch.empty(())) if has_table else None

    def forward(self, x, idx, cos, sin, first, last, cache=None):
        B, T, C = x.shape
        qkv = self.packed(x, idx).view(B, T, -1, self.head_dim)                    # (B, T, H + 2 H_kv, D)
        if self.value_embed is not None:
            table = (self.value_gain * self.value_embed(idx)).to(x.dtype).view(B, T, self.n_kv_head, -1)
            qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
            qkv = torch.cat([qk, v + table], dim=2)
        if last is not None:
            return self.proj(attend(self, qkv, idx, cos, sin, first, last).flatten(2))
        q, k, v = self.heads(qkv, idx, cos, sin, cache)
        if cache is not None:
            k, v = cache.append(self, k, v)
        o = attention(q, k, v, first, self.scale)                     # (B, H, T, D)
        return self.proj(o.transpose(1, 2).reshape(B, T, -1))

    def packed(self, x, idx):
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])          # one product, not three
        return F.linear(x, weight.to(x.dtype))

    def heads(self, qkv, idx, cos, sin, cache=None):
        """q (B, H, T, D), k, v (B, H_kv, T, D) as attention takes them."""
        q, k, v = qkv.transpose(1, 2).split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if self.from_before is not None:
            k = torch.where(self.from_before, shift(k, (idx != self.bos)[:, None, :, None], self, cache), k)
        if self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        return rotary(q, cos, sin), rotary(k, cos, sin), v

    def init_weights(self):
        self.init_maps()
        if self.value_embed is not None:
            self.value_embed.weight.normal_(std=1.0)
            self.value_gain.fill_(0.5)

    def init_maps(self):
        C = self.q.in_features
        for linear in (self.q, self.v):
            linear.weight.normal_(std=C ** -0.5)
        heads = self.q.weight.view(self.n_kv_head, -1, self.head_dim, C)   # those of a key head side by side
        self.k.weight.copy_(heads[:, 0].flatten(0, 1))
        values = self.v.weight.view(self.n_kv_head, 1, self.head_dim, C).expand_as(heads)
        self.proj.weight.copy_(0.3 * values.reshape(-1, C).t())


class LatentAttention(Attention):
    """Multi-head latent attention: one narrow latent makes all heads' keys and values (Liu 2024, 2405.04434).

    The latent is c = rms_norm(W_DKV x), a head's key [r; W_UK c], its value W_UV c; r, the rotary_dim
    channels that turn, is one for all heads. A cache keeps [r; c]: there W_UK is taken into the query, and
    W_UV applied to the weighted sum of latents. So QK-norm is of queries and r alone: a norm of whole keys is
    not linear in c. With token_shift half of r and of W_UK c come from the token before.
    """

    def __init__(self, config, layer):
        super().__init__(config, layer)
        H, D, R, C, L = self.n_head, self.head_dim, config.rotary_dim, config.n_embd, config.kv_latent
        self.widths, self.cached, self.shifts = (R, L), (1, 1, R + L), config.token_shift
        self.norm, self.qk_norm, self.from_before = config.qk_norm, False, None    # `packed` does both itself
        self.register_buffer('slow', slow_channels(R, R), persistent=False)
        self.down, self.v = Linear(C, R + L), Linear(L, H * D)
        self.k, self.k_before = Linear(L, H * (D - R) // 2), Linear(L, H * (D - R) // 2)
        self.q_down = Linear(C, config.q_latent) if config.q_latent else None
        self.q = Linear(config.q_latent or C, H * D)

    def latent(self, x, idx, cache=None):
        """r (B, T, R), not yet turned; c, and that of the token before, (B, T, kv_latent)."""
        x = self.down(x)
        before = shift(x, (idx != self.bos)[..., None], self, cache) if self.shifts else x
        (r, c), (r_before, c_before) = (t.split(self.widths, dim=-1) for t in (x, before))
        r = torch.where(self.slow, r_before, r)
        return rms_norm(r) if self.norm else r, rms_norm(c), rms_norm(c_before)

    def queries(self, x):
        q = self.q(x if self.q_down is None else rms_norm(self.q_down(x)))
        q = q.unflatten(-1, (self.n_head, self.head_dim))                          # (B, T, H, D)
        return rms_norm(q) if self.norm else q

    def packed(self, x, idx):
        r, c, before = self.latent(x, idx)
        parts = self.k(c), self.k_before(before), self.v(c)
        k, k_before, v = (t.unflatten(-1, (self.n_head, -1)) for t in parts)
        r = r[:, :, None].expand(-1, -1, self.n_head, -1)
        return torch.cat([self.queries(x), torch.cat([r, k, k_before], dim=-1), v], dim=2)

    def forward(self, x, idx, cos, sin, first, last, cache=None):
        if cache is None:
            return super().forward(x, idx, cos, sin, first, last)
        r, c, _ = (t[:, None] for t in self.latent(x, idx, cache))
        past, = cache.append(self, torch.cat([rotary(r, cos, sin), c], dim=-1))    # (B, 1, S, R + kv_latent)
        c = past[..., self.widths[0]:]
        before = shift(c, cache.follows[:, None, :c.shape[2], None], self) if self.shifts else c
        q = rotary(self.queries(x).transpose(1, 2), cos, sin)
        k, k_before, v = (up.weight.to(x.dtype).unflatten(0, (self.n_head, -1))
                          for up in (self.k, self.k_before, self.v))
        r, q, q_before = q.split([self.widths[0], k.shape[1], k.shape[1]], dim=-1)
        q, k = torch.cat([r, q @ k, q_before @ k_before], dim=-1), torch.cat([past, before], dim=-1)
        o = attention(q, k, c, first, self.scale) @ v.mT                           # (B, H, T, D)
        return self.proj(o.transpose(1, 2).flatten(2))

    def init_weights(self):
        for linear in filter(None, (self.down, self.k, self.k_before, self.v, self.q_down)):
            linear.weight.normal_(std=linear.in_features ** -0.5)
        r, c = self.down.weight.split(self.widths)
        k, k_before = ((up.weight @ c).unflatten(0, (self.n_head, -1)) for up in (self.k, self.k_before))
        q = torch.cat([r.expand(self.n_head, -1, -1), k, k_before], dim=1).flatten(0, 1)           # (H D, C)
        if self.q_down is not None:
            q = q @ self.q_down.weight.t() * (self.q_down.in_features / self.q.in_features) ** 0.5
        self.q.weight.copy_(q)
        self.proj.weight.copy_(0.3 * (self.v.weight @ c).t())


class MLP(nn.Module):
    def __init__(self, config, hidden=None):
        super().__init__()
        self.gated, hidden = config.mlp == 'swiglu', hidden or config.mlp_hidden
        self.up = Linear(config.n_embd, hidden * (2 if self.gated else 1))
        self.down = Linear(hidden, config.n_embd)

    def forward(self, x):
        return self.through(x, self.up.weight, self.down.weight)

    def through(self, x, up, down):
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


# ---- experts: of domains, and routed

class DomainMLP(MLP):
    """An MLP whose last hidden units are each domain's own (DEMix, Gururangan 2021, 2108.05036).

    A batch is of one domain, domain () says which: its weights are looked up, and the rest is the plain MLP.
    Where the domain is None the parts' mean stands for all.
    """

    def __init__(self, config):
        n, C, own = config.n_domains, config.n_embd, config.own_hidden
        super().__init__(config, config.mlp_hidden - own)
        self.halves = 2 if self.gated else 1
        self.own_up, self.own_down = Several(n, C, own * self.halves, 1), Several(n, own, C, 1)

    def forward(self, x, domain):
        # domain.view(1): torch.compile reads an index_select by a tensor () otherwise than PyTorch does
        own_up, own_down = (w.mean(0) if domain is None else w.index_select(0, domain.view(1))[0]
                            for w in (self.own_up.weight, self.own_down.weight))
        up = [w.unflatten(0, (self.halves, -1)) for w in (self.up.weight, own_up)]     # gates go with gates
        up, down = torch.cat(up, dim=1).flatten(0, 1), torch.cat([self.down.weight, own_down], dim=1)
        return self.through(x, up, down)

    def init_weights(self):
        super().init_weights()
        self.own_up.weight.normal_(std=self.up.in_features ** -0.5)
        self.own_down.weight.zero_()


class Experts(MLP):
    """An MLP for all tokens, and the experts_top of some more whose vectors e_i a token x is most akin to.

    y = F(x) + sum_i g_i F_i(x), g_i = s_i / sum of the chosen s, s_i = sigmoid(x e_i); chosen are the
    largest s_i + bias_i, and the optimizer steps the bias against the sign of what the expert gets too much
    (DeepSeek-V3, 2412.19437, without its auxiliary loss). No token is dropped.
    """

    def __init__(self, config):
        super().__init__(config)
        n, C, h, self.top = config.experts, config.n_embd, config.expert_hidden, config.experts_top
        self.router, self.bias = Linear(C, n), nn.Parameter(torch.empty(n))
        self.ups = Several(n, C, h * (2 if self.gated else 1), self.top)
        self.downs = Several(n, h, C, self.top)

    def forward(self, x):
        return super().forward(x) + self.routed(x.flatten(0, 1)).view_as(x)

    @torch.compiler.disable                     # how many tokens an expert gets is known only as it runs
    def routed(self, x):
        """(N, C) from x (N, C): rows in the order of their experts, one product for each, and back."""
        scores, n = self.router(x).float().sigmoid(), len(self.bias)
        chosen = (scores + self.bias).topk(self.top).indices                       # (N, k)
        gates = scores.gather(1, chosen)
        gates = (gates / gates.sum(1, keepdim=True)).to(x.dtype)
        order, load = chosen.flatten().argsort(stable=True), chosen.flatten().bincount(minlength=n)
        rows = x[:, None].expand(-1, self.top, -1).flatten(0, 1).index_select(0, order).split(load.tolist())
        out = torch.cat([self.through(*triple) for triple in zip(rows, self.ups.weight, self.downs.weight)
                         if len(triple[0])])
        out = out.index_select(0, order.argsort()).view(-1, self.top, x.shape[1])  # (N, k, C)
        return Balance.apply((gates[..., None] * out).sum(1), self.bias, load)

    def init_weights(self):
        super().init_weights()
        for linear in (self.router, self.ups):
            linear.weight.normal_(std=self.up.in_features ** -0.5)
        self.downs.weight.zero_()
        self.bias.zero_()


class Balance(torch.autograd.Function):
    """y as it is; the gradient of bias is how far each expert's share of the load is above the mean. Its sign
    is what counts, so it is made too small to show in the gradients' norm."""

    @staticmethod
    def forward(ctx, y, bias, load):
        ctx.save_for_backward(1e-6 * (load / load.sum() - 1 / len(load)))
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        return grad, *ctx.saved_tensors, None


# ---- and tokens in place of matrices


class Pattention(nn.Module):
    """A map from fan_in to fan_out channels made of n tokens, each a key and a value (Wang 2024, 2410.23168).

    y = sum_i g_i value_i, g = GeLU(tau s / |s|) for 'norm_gelu', tau GeLU(s) / |GeLU(s)| for 'gelu_norm', of
    scores s_i = x key_i; tau^2 = scale_tokens, which is n until tokens are appended.
    """

    def __init__(self, fan_in, fan_out, n, scale_tokens, norm):
        super().__init__()
        self.keys, self.values = Linear(fan_in, n), Linear(n, fan_out)
        self.share, self.norm_first = scale_tokens / n, norm == 'norm_gelu'

    def forward(self, x):
        s = self.keys(x)
        s = rms_norm(s if self.norm_first else F.gelu(s), 1e-6 * self.share)     # eps: the same for any n
        s = s * self.share ** 0.5 if self.share != 1 else s
        return self.values(F.gelu(s) if self.norm_first else s)

    def init_weights(self, size=0.0, generator=None):
        """Unit inputs give outputs of this size (RMS); 0 for a feed-forward layer, as MLP down."""
        power = 0.425 if self.norm_first else 1.0             # mean square of GeLU of a unit normal
        self.keys.weight.normal_(std=self.keys.in_features ** -0.5, generator=generator)
        self.values.weight.normal_(std=size * (power * self.values.in_features) ** -0.5, generator=generator)

    @torch.no_grad()
    def append(self, old, zero_keys=True, generator=None):
        """Become `old` and some tokens more. Where their keys are 0 and scale_tokens is still the old one's,
        the output is the old one to rounding; random keys, as in the released code, change it.

        The new values are random: where key and value are both 0 neither would ever get a gradient.
        """
        n = old.keys.out_features
        self.init_weights((self.keys.out_features / n) ** 0.5, generator)     # as large as old values began
        if zero_keys:
            self.keys.weight.zero_()
        self.keys.weight[:n], self.values.weight[:, :n] = old.keys.weight, old.values.weight


class TokenAttention(Attention):
    """Attention whose four matrices are Pattention; all else is as it was."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        for name in ('q', 'k', 'v', 'proj'):
            plain = getattr(self, name)
            setattr(self, name, Pattention(plain.in_features, plain.out_features, config.attn_tokens,
                                           config.attn_scale_tokens, config.token_norm))

    def packed(self, x, idx):
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)

    def init_maps(self):
        for part, size in ((self.q, 1.0), (self.v, 1.0), (self.proj, 0.3)):
            part.init_weights(size)
        n, keys, out = self.q.values.in_features, self.v.keys.weight, self.proj.values.weight
        heads = self.q.values.weight.view(self.n_kv_head, -1, self.head_dim, n)
        self.k.keys.weight.copy_(self.q.keys.weight)            # a token looks for its like, as in Attention
        self.k.values.weight.copy_(heads[:, 0].flatten(0, 1))
        values = self.v.values.weight.view(self.n_kv_head, 1, self.head_dim, n).expand_as(heads)
        self.proj.keys.weight.copy_(values.reshape(-1, n).t())  # and goes back by the way that a value came
        out.copy_(keys.t() * (out.std() / keys.std()))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        kind = TokenAttention if config.attn_tokens else LatentAttention if config.kv_latent else Attention
        self.attn = kind(config, layer)
        plain = DomainMLP if config.domains else Experts if config.experts else MLP
        self.mlp = plain(config) if not config.mlp_tokens else Pattention(
            C, C, config.mlp_tokens, config.mlp_scale_tokens, config.token_norm)
        self.mix = nn.Parameter(torch.empty(2))  # weights of the residual stream and of the token embedding
        if config.dropout or config.layer_drop:    # hooks: a forward pass without them has nothing of it
            by_row = config.layer_drop * (layer + 1) / config.n_layer
            for branch in (self.attn, self.mlp):
                branch.register_forward_hook(functools.partial(thin_out, config.dropout, by_row))

    def forward(self, x, x0, domain, *context):
        x = self.mix[0].to(x.dtype) * x + self.mix[1].to(x.dtype) * x0
        x, h = add_norm(x, self.attn(rms_norm(x), *context))
        return x + self.mlp(h, *domain)


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
        | latents: to and from them | N(1 / sqrt n) | n the width they come from; q, out: as the k, v made   |
        | router of experts         | N(1 / sqrt C) | as MLP up; its bias 0                                  |
        | MLP down                  | 0             | MLPs begin as the identity (Zhang 2019, 1901.09321)    |
        | mix of a block            | 1, 0          | a plain residual stream                                |
        | token_shift, a channel    | 0 ... 1       | some channels know the token, some the one before      |
        | class head                | 0             | no class is likelier than another                      |
        | predict_ahead             | 0             | a further token's guess begins as the next one's       |
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.shift = nn.Parameter(torch.empty(config.n_embd)) if config.token_shift else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.class_head = Linear(config.n_embd, config.classes) if config.classes else None
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        self.ahead = nn.ModuleList(Linear(config.n_embd, config.n_embd) for _ in range(config.predict_ahead))
        cos, sin = rotary_table(config.block_size, config.rotary_dim, config.rope_base)
        self.register_buffer('cos', cos, persistent=False)
        self.register_buffer('sin', sin, persistent=False)
        self.compute_dtype = torch.float32       # what the blocks compute in; parameters stay fp32
        self.told = None                         # the domain () of all text that is read without one
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        C = self.config.n_embd
        self.wte.weight.normal_(std=1.0)
        self.lm_head.weight.normal_(std=0.5 / C)   # last, so that a tied table gets the head's init
        if self.class_head is not None:
            self.class_head.weight.zero_()
        if self.shift is not None:
            self.shift.copy_(torch.linspace(0, 1, C))
        for block in self.blocks:
            block.attn.init_weights()
            block.mlp.init_weights()
            block.mix.copy_(torch.tensor([1.0, 0.0]))
        for further in self.ahead:
            further.weight.zero_()

    def trunk(self, idx, cache=None, two_way=False, domain=None):
        """Final hidden states (B, T, C), in compute_dtype, of idx (B, T); two_way looks ahead as well."""
        domain = (self.told if domain is None else domain,) if self.config.domains else ()
        past = cache.length if cache is not None else 0
        T = idx.shape[1]
        if past + T > self.config.block_size:
            raise ValueError(f'{past + T} positions, block_size is {self.config.block_size}')
        first = self.first_visible(idx, past, cache)
        last = None
        if two_way:                                         # who is seen from there is seen from here
            seen = torch.arange(T, device=idx.device) >= first[:, :, None]
            first = seen & seen.mT
        elif 'attention' in IN_USE and cache is None:       # the kernels want both ends of what is visible
            first, last = first.int(), last_visible_to(first).int()
        cos, sin = self.cos[past:past + T], self.sin[past:past + T]
        x = rms_norm(self.wte(idx).to(self.compute_dtype))
        if self.shift is not None:
            before = shift(x, (idx != self.config.bos)[..., None], self, cache)
            x = rms_norm(x + self.shift.to(x.dtype) * before)
        x0 = x
        for block in self.blocks:
            x = block(x, x0, domain, idx, cos, sin, first, last, cache)
        if cache is not None:
            cache.length += T
        return rms_norm(x) * self.config.head_scale if self.config.head_scale != 1 else rms_norm(x)

    def attended(self, idx):
        """Mean number of positions that the tokens of idx (B, T) attend to, themselves included."""
        position = torch.arange(idx.shape[1], device=idx.device)
        return (position - self.first_visible(idx) + 1).double().mean().item()

    def first_visible(self, idx, past=0, cache=None):
        """(B, T): the first position each token attends to: its document's BOS, or the window's start."""
        position = torch.arange(past, past + idx.shape[1], device=idx.device)
        start = position * (idx == self.config.bos) if self.config.doc_mask else torch.zeros_like(idx)
        if cache is not None:
            start[:, 0] = torch.maximum(start[:, 0], cache.doc_start)
        start = start.cummax(dim=1).values
        if cache is not None:
            cache.doc_start = start[:, -1]
            cache.follows[:, past:past + idx.shape[1]] = idx != self.config.bos
        return torch.maximum(start, position - self.config.window + 1) if self.config.window else start

    def forward(self, idx, targets, domain=None, reduction='mean', soft=(), classes=(), ahead=1.0, teach=(),
                two_way=False):
        """Cross-entropy in nats: mean over targets >= 0, or with 'none' one a token, 0 where target < 0.

        domain (): which one the batch is of, if the model has any; with 'none' `mixed` can do without. soft:
        see soft_targets. classes: the class of every id (V,), and the share () of its guess. ahead: how much
        further tokens' losses count, if the model predicts any. teach: the share and the temperature of the
        divergence from a teacher, and that as Distillation takes it.
        """
        if reduction == 'none' and self.config.domains and domain is None and self.told is None:
            return self.mixed(idx, targets)
        x = self.trunk(idx, two_way=two_way, domain=domain)
        loss = linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                    self.config.logit_softcap, reduction, self.config.z_loss, soft)
        if reduction == 'none':
            return loss.view_as(targets)
        if classes:
            class_of, share = classes
            guess, seen = self.class_head(x).float().flatten(0, 1), targets.flatten()
            named = torch.where(seen >= 0, class_of[seen.clamp(min=0)], -1)
            loss = (1 - share) * loss + share * F.cross_entropy(guess, named, ignore_index=-1)
        if teach:
            (share, temperature, *teacher), rows = teach, 2048 if x.is_cuda else 256
            apart = Distillation.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                       self.config.logit_softcap, temperature, teacher, rows)
            loss = (1 - share) * loss + share * apart
        for further in () if two_way else self.ahead:
            targets = one_later(targets, self.config.bos)
            h = rms_norm(x + further(x)) * self.config.head_scale
            loss = loss + ahead * linear_cross_entropy(h.flatten(0, 1), self.lm_head.weight,
                                                       targets.flatten(), self.config.logit_softcap)
        return loss

    def by_domain(self, idx, targets):
        """Nats of every token by every domain, (domains, B, T)."""
        domains = torch.arange(self.config.n_domains, device=idx.device)
        return torch.stack([self(idx, targets, domain, 'none') for domain in domains])

    def mixed(self, idx, targets):
        """Nats (B, T) of rows, a text each, of which no domain is told: what a row has shown so far says it.

        p(x_t | x_<t) = sum_d p(d | x_<t) p(x_t | x_<t, d), which is sum_d p(x_<=t | d) / sum_d p(x_<t | d)
        where all are equally likely at first. What a target < 0 hides counts there, as it stands in idx.
        """
        shown = torch.where(targets < 0, F.pad(idx[:, 1:], (0, 1)), targets)
        nats = self.by_domain(idx, shown).double().cumsum(2)
        upto = math.log(len(nats)) - (-nats).logsumexp(0)
        return (upto - F.pad(upto[:, :-1], (1, 0))).masked_fill(targets < 0, 0).float()

    def likeliest(self, idx):
        """The domain told, or that of which idx (B, T) is likeliest; None if nothing says which."""
        if self.told is not None or not self.config.domains or idx.shape[1] < 2:
            return self.told
        targets = idx[:, 1:].masked_fill(idx[:, 1:] == self.config.bos, -1)        # padding says nothing
        return self.by_domain(idx[:, :-1], targets).sum((1, 2)).argmin()

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
        cache, new, domain = KVCache(self, len(idx)), idx, self.likeliest(idx)
        for _ in range(max_new_tokens):
            if cache.length + new.shape[1] > block_size:
                cache, new = KVCache(self, len(idx)), idx[:, -(block_size // 2):]
            logits = self.logits(self.trunk(new, cache, domain=domain)[:, -1])
            new = sample_token(logits, temperature, top_k, top_p, generator)[:, None]
            idx = torch.cat([idx, new], dim=1)[:, -block_size:]
            yield new[:, 0]


class KVCache:
    """Keys and values, or latents, of every layer, (B, heads, block_size, width) each, filled up to `length`;
    and what `shift` needs of the last position."""

    def __init__(self, model, batch_size):
        weight, size = model.wte.weight, model.config.block_size
        self.store = {}
        for layer in (block.attn for block in model.blocks):
            n, heads, width = layer.cached
            shape = n, batch_size, heads, size, width
            self.store[layer] = torch.empty(shape, dtype=model.compute_dtype, device=weight.device)
        self.length, self.last = 0, {}
        self.doc_start = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        self.follows = torch.zeros(batch_size, size, dtype=torch.bool, device=weight.device)

    def append(self, layer, *new):
        """Add k, v (B, H_kv, T, D), return all the layer has seen; `length` moves after the last layer."""
        store, end = self.store[layer], self.length + new[0].shape[2]
        for old, x in zip(store, new):
            old[:, :, self.length:end] = x
        return store[..., :end, :].unbind()

    def values(self):
        """How many numbers it keeps of a token in each layer, on average."""
        return sum(s.numel() / (s.shape[1] * s.shape[3]) for s in self.store.values()) / len(self.store)


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


# ---- part 2: growth ----------------------------------------------------------------------------------------

WIDTHS = ('n_embd', 'n_head', 'n_kv_head', 'mlp_hidden')
TOKENS = ('attn_tokens', 'mlp_tokens')
GROWS = (*WIDTHS, 'n_layer', *TOKENS)


def grown_config(config, changes, random_tokens=False, stack=False):
    """The config after growth to `changes`, a dict of sizes. ValueError if it does not lead there.

    Widths grow by whole multiples, and n_embd takes the number of heads and mlp_hidden along unless they are
    named; a head keeps its width, and a key head that serves all queries stays the only one. Tokens of
    Pattention are appended, their scores scaled as before; with random_tokens as if they had all been there.
    A change of `domains` comes alone: a dense model splits, one that has some gets others beside or instead.
    """
    if set(changes) == {'domains'}:
        return dataclasses.replace(config, **changes)
    if (config.domains or config.experts) and (wide := [name for name in changes if name in WIDTHS]):
        raise ValueError(f'{wide[0]} cannot grow in a model that has domains or experts')
    if unknown := [name for name in changes if name not in GROWS]:
        raise ValueError(f'{unknown[0]} cannot grow: choose {", ".join(GROWS)}')
    if wrong := [name for name, size in changes.items() if type(size) is not int]:
        raise ValueError(f'{wrong[0]} is {changes[wrong[0]]!r}, it must be a whole number')
    n = max(1, changes.get('n_embd', config.n_embd) // config.n_embd)
    wide = {name: n * getattr(config, name) for name in ('n_head', 'mlp_hidden')} | changes
    kept = config.n_kv_head == 1 < config.n_head
    wide.setdefault('n_kv_head', 1 if kept else wide['n_head'] * config.n_kv_head // config.n_head)
    new = dataclasses.replace(config, **wide)
    for name in GROWS:
        old, size = getattr(config, name), getattr(new, name)
        if size < old or old == 0 < size or name in WIDTHS and size % old:
            by = 'whole multiples' if name in WIDTHS else 'more of them'
            raise ValueError(f'{name} grows by {by}, and {size} is none of {old}')
    appended = any(getattr(new, name) > getattr(config, name) for name in TOKENS)
    if appended and any(getattr(new, name) > getattr(config, name) for name in WIDTHS):
        raise ValueError('tokens and widths cannot grow at once: grow one after the other')
    if stack and new.n_layer % config.n_layer:
        raise ValueError(f'{new.n_layer} layers are no stack of {config.n_layer}')
    if random_tokens:
        new.attn_scale_tokens, new.mlp_scale_tokens = new.attn_tokens, new.mlp_tokens
    times = {name: getattr(new, name) // getattr(config, name) for name in WIDTHS}
    if times['n_kv_head'] != times['n_head'] and not kept:
        raise ValueError(f'n_kv_head {new.n_kv_head} would give key heads other query heads than before: '
                         f'let it grow as n_head does')
    new.head_scale = config.head_scale / times['n_embd'] if config.tie_embeddings else config.head_scale
    return new


def grown_layers(old, new, stack):
    """For every layer of `new` the layer of `old` it comes from, or None for a fresh one that does nothing.

    Fresh ones are spread between the old, below those that have a value embedding. stack repeats the whole
    stack instead (Du 2024, 2405.15319): learns from the start, but computes something else.
    """
    if stack:
        return [i % old.n_layer for i in range(new.n_layer)]
    low, fresh = old.n_layer - old.value_embeds, new.n_layer - old.n_layer
    after = [i * low // fresh for i in range(fresh)]           # each fresh one comes after so many old ones
    return [source for i in range(old.n_layer + 1)
            for source in [None] * after.count(i) + [i] * (i < old.n_layer)]


def spread(x, shape, how=''):
    """x repeated whole, like tiles, to `shape`; or two matrices in one, one above the other ('gated'), or
    zeros after it ('append'); or what the function `how` makes of it."""
    if callable(how):
        return how(x)
    if how == 'gated':
        return torch.cat([spread(half, (shape[0] // 2, shape[1])) for half in x.chunk(2)])
    if how == 'append':
        return F.pad(x, (0, shape[1] - x.shape[1], 0, shape[0] - x.shape[0]))
    return x.repeat([new // old for new, old in zip(shape, x.shape)]) if x.ndim else x.clone()


def parted(old, new, parts):
    """{parameter of an MLP: (what it comes from, how, copies)} if the domains change.

    The last hidden units of a plain MLP are copied to every domain, so that each computes what it did; of
    domains that there are the i-th new one gets the part of the parts[i]-th.
    """
    if old.domains == new.domains:
        return {}
    if old.domains:
        return {name: (name, lambda x: x[parts], 1) for name in ('own_up.weight', 'own_down.weight')}
    n, shared, halves = new.n_domains, new.mlp_hidden - new.own_hidden, 2 if new.mlp == 'swiglu' else 1

    def up(which):
        return lambda x: x.unflatten(0, (halves, -1))[:, which].flatten(0, 1)
    return {'up.weight': ('up.weight', up(slice(shared)), 1),
            'down.weight': ('down.weight', lambda x: x[:, :shared], 1),
            'own_up.weight': ('up.weight', lambda x: up(slice(shared, None))(x).expand(n, -1, -1), n),
            'own_down.weight': ('down.weight', lambda x: x[:, shared:].expand(n, -1, -1), n)}


@torch.no_grad()
def grow(old, config, snr_db=10.0, stack=False, random_tokens=False, seed=0, parts=()):
    """A model of `config`, from grown_config, that computes what `old` does (but for stack, random_tokens).

    HyperCloning (Samragh 2024, 2409.12903): every activation becomes copies of the old one, so a matrix is
    repeated, and divided by how often its input is. Noise, + on one of a pair of input copies and - on the
    other, cancels as long as the copies are equal, and lets them learn different things; snr_db is the
    weights' power over it in decibels, math.inf for none. Appended tokens have keys of 0 and change nothing
    either, or random ones. For domains and parts see `parted`. Returns the model and {parameter: (old
    parameter, copies that share its gradient, how it was spread)}, without the parameters of fresh layers.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        new = GPT(config).to(old.wte.weight.dtype)
    new.compute_dtype = old.compute_dtype
    layers, source = grown_layers(old.config, config, stack), dict(old.named_parameters())
    dice, came_from = torch.Generator().manual_seed(seed), {}
    appended = any(getattr(config, name) > getattr(old.config, name) for name in TOKENS)
    moved = parted(old.config, config, parts)
    for name, p in new.named_parameters():
        in_block, path, owner = name.startswith('blocks.'), name.rpartition('.')[0], name.rsplit('.', 2)[0]
        module, owner = new.get_submodule(path), new.get_submodule(owner) if in_block else None
        if in_block:
            _, layer, rest = name.split('.', 2)
            name = f'blocks.{layers[int(layer)]}.{rest}'
        if in_block and (end := name.partition('.mlp.')[2]) in moved:
            end_there, how, copies = moved[end]
            q = source[name.replace(end, end_there)]
            p.copy_(how(q))
            came_from[p] = q, copies, how
            continue
        if name not in source:
            if name.endswith(('attn.proj.weight', 'attn.proj.values.weight')):
                p.zero_()
            continue
        q, how = source[name], 'gated' if name.endswith('mlp.up.weight') and config.mlp == 'swiglu' else ''
        if isinstance(owner, Pattention) and appended and p.shape != q.shape:
            if module is owner.keys:
                owner.append(old.get_submodule(name.rsplit('.', 2)[0]), not random_tokens, dice)
            came_from[p] = q, 1, 'append'
            continue
        p.copy_(spread(q, p.shape, how))
        copies = 1 if p.shape == q.shape else p.shape[-1] // q.shape[-1]
        if isinstance(module, Linear) and not (module is new.class_head and config.tie_embeddings):
            n_in, copies = copies, p.shape[0] // q.shape[0]
            p.div_(n_in)
            if in_block and n_in > 1:                          # the heads get none
                p.add_(cancelling_noise(p, n_in, snr_db, dice))
        came_from[p] = q, copies, how
    return new.train(old.training).to(old.wte.weight.device), came_from


def cancelling_noise(weight, n_in, snr_db, dice):
    """Noise for a matrix of n_in equal blocks of columns: + on one of a pair, - on the other."""
    noise = torch.randn(len(weight), n_in // 2, 1, weight.shape[1] // n_in, generator=dice).to(weight)
    noise *= weight.square().mean().sqrt() / noise.square().mean().sqrt() * 10 ** (-snr_db / 20)
    both = torch.cat([noise, -noise], dim=2).flatten(1)
    return F.pad(both, (0, weight.shape[1] - both.shape[1]))   # an odd block gets none


# ---- part 3: the operations --------------------------------------------------------------------------------

def rms_norm(x, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) over the last dimension (Zhang 2019, 1910.07467); statistics in fp32."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def add_norm(x, branch):
    """s = x + branch and rms_norm(s)."""
    if 'rms_norm' in IN_USE:
        return add_norm_forward(x, branch, None, 1e-6)[:2]
    x = x + branch
    return x, rms_norm(x)


def thin_out(rate, by_row, module, inputs, branch):
    """A forward hook: dropout (Srivastava 2014), and whole rows (Huang 2016, 1603.09382), of a branch."""
    if module.training:
        return F.dropout(branch, rate) * F.dropout(branch.new_ones(len(branch), 1, 1), by_row)


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


def one_later(targets, bos):
    """targets (B, T), each the one after; -1 at a row's end, and where that would be another document's."""
    return F.pad(targets[:, 1:], (0, 1), value=-1).masked_fill((targets == bos) | (targets < 0), -1)


def rotary_table(length, head_dim, base):
    """cos, sin (length, head_dim / 2) of position / base^(2i / head_dim)."""
    angle = torch.arange(length)[:, None] * base ** (-torch.arange(0, head_dim, 2) / head_dim)
    return angle.cos(), angle.sin()


def rotary(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + R/2}) of x (B, H, T, D) by their position's angle; cos, sin (T, R/2)."""
    half = cos.shape[1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def slow_channels(D, R):
    """(D,): the half of a head's channels that rotary embedding turns least, or not at all (R <= D turn)."""
    channel = torch.arange(D)
    return (channel >= R) | (channel % (R // 2) >= (R + 3) // 4)


def last_visible_to(first):
    """(B, T): the last position that each token is attended to from; `first` (B, T) never falls in a row."""
    position = torch.arange(first.shape[1], device=first.device).expand_as(first).contiguous()
    return torch.searchsorted(first, position, right=True) - 1


def attention(q, k, v, first, scale, rows=128):
    """Causal attention: softmax(scale q k^T) v over first[i] <= j <= i.

    q (B, H, T, D) are the last T positions of k, v (B, H_kv, S, D); first (B, T) counts in S, or says itself
    what is seen, bool (B, T, S), and then it need not be causal.
    Returns (B, H, T, D). Blocks of `rows` queries read only the keys up to their last one: on a CPU this
    takes half the time of F.scaled_dot_product_attention with a mask, in bf16 a third (README, "measured").
    """
    B, H, T, D = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    if q.is_cuda or first.ndim == 3:
        i, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
        seen = first if first.ndim == 3 else (j <= i) & (j >= first[:, :, None])
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


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softcap(x weight^T), `rows` tokens at a time, gradient made in the forward pass.

    The (tokens, V) logits, the largest tensor of a small model, never exist: each block of rows is
    multiplied, turned into its loss and its gradient, and multiplied back while it is still in cache.
    d loss / d logits = (softmax (1 + 2 z_loss lse) - targets) / n, lse the log of the softmax's sum.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cap, z_loss, soft, rows):
        n = (targets >= 0).sum().clamp(min=1)
        w = weight.to(x.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx, dw = [], torch.zeros_like(weight, dtype=torch.float32)
        minus_one = torch.full((rows, 1), -1.0, device=x.device)
        for xs, ys in zip(x.split(rows), targets.split(rows)):
            keep, gold = ys >= 0, ys.clamp(min=0)[:, None]
            z = softcap((xs @ w.t()).float(), cap)
            lse = z.logsumexp(dim=-1)
            q = soft_targets(gold, soft) if soft else None
            mean_z = (q * z).sum(-1) if soft else z.gather(1, gold)[:, 0]
            loss = loss + ((lse - mean_z + z_loss * lse.square()) * keep).sum()
            g = z.sub(lse[:, None]) if cap else z.sub_(lse[:, None])
            g = g.exp_().mul_(1 + 2 * z_loss * lse[:, None]) if z_loss else g.exp_()
            g = g.sub_(q) if soft else g.scatter_add_(1, gold, minus_one[:len(ys)])
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
        return dx * grad.to(dx.dtype), dw * grad, None, None, None, None, None


class Distillation(LinearCrossEntropy):
    """Temperature^2 KL(teacher || student), both softmax(logits / temperature), the mean over targets >= 0.

    Logits are softcap(x weight^T); teacher is a triple of such (x, weight, cap) (Hinton 2015, 1503.02531). A
    block of rows at a time, as above: d loss / d logits = temperature (student - teacher) / n.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cap, temperature, teacher, rows):
        theirs, their_weight, their_cap = teacher
        share = (temperature * (targets >= 0) / (targets >= 0).sum().clamp(min=1))[:, None]
        w, v = weight.to(x.dtype), their_weight.to(theirs.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx, dw = [], torch.zeros_like(weight, dtype=torch.float32)
        for xs, hs, part in zip(x.split(rows), theirs.split(rows), share.split(rows)):
            z = softcap((xs @ w.t()).float(), cap)
            log_q = (z / temperature).log_softmax(-1)
            log_p = (softcap((hs @ v.t()).float(), their_cap) / temperature).log_softmax(-1)
            p = log_p.exp()
            loss = loss + temperature * (part * p * (log_p - log_q)).sum()
            g = part * (log_q.exp() - p)
            g = (g * (1 - (z / cap).square()) if cap else g).to(x.dtype)
            dx.append(g @ w)
            dw += g.t() @ xs
        ctx.save_for_backward(torch.cat(dx), dw.to(weight.dtype))
        return loss


def soft_targets(gold, soft):
    """(rows, V): alpha on the gold token (rows, 1), the rest shared out by similarity.

    soft: table (V, r), norm (V,), alpha (). Token j gets (1 - alpha) 2^(table_gold table_j - norm_gold), and
    norm (`similarity_norm`) makes that sum to 1 - alpha: syntactic smoothing without a matrix of V x V
    (Diehl Martinez 2024, 2410.11462); a table of zeros is label smoothing.
    """
    table, norm, alpha = soft
    gold = gold[:, 0]
    share = torch.exp2(table[gold] @ table.t() - norm[gold, None])
    return ((1 - alpha) * share).scatter_(1, gold[:, None], alpha.expand(len(gold), 1))


def similarity_norm(table, rows=1024):
    """(V,): log2 of the sum over all other tokens j of 2^(table_i table_j)."""
    norms = []
    for i in range(0, len(table), rows):
        s = table[i:i + rows] @ table.t()
        s[torch.arange(len(s)), torch.arange(i, i + len(s))] = float('-inf')
        norms.append(s.mul_(math.log(2)).logsumexp(1) / math.log(2))
    return torch.cat(norms)


def linear_cross_entropy(x, weight, targets, cap=0.0, reduction='mean', z_loss=0.0, soft=(), rows=None):
    """Cross-entropy in nats of targets (N,) under softcap(x weight^T), x (N, C), weight (V, C).

    reduction 'mean' (differentiable; there z_loss and soft count, see soft_targets) or 'none', (N,) fp32.
    Targets < 0 are left out; with 'none' they give 0.
    """
    # a block of logits that stays in cache: 64 MB of a GPU's, a CPU's much less
    rows = rows or (max(2048, 2 ** 25 // len(weight)) if x.is_cuda else 512)
    mean = reduction == 'mean'
    if 'cross_entropy' in IN_USE:
        soft = soft if mean and soft else (None, None, None)
        both = cross_entropy_forward(x, weight, targets, *soft, cap, z_loss * mean, mean, rows)
        return both[0] if mean else both[1]
    if mean:
        return LinearCrossEntropy.apply(x, weight, targets, cap, z_loss, soft, rows)
    w, wanted = weight.to(x.dtype), targets >= 0
    loss = torch.zeros(len(x), device=x.device)
    loss[wanted] = torch.cat([F.cross_entropy(softcap((xs @ w.t()).float(), cap), ys, reduction='none')
                              for xs, ys in zip(x[wanted].split(rows), targets[wanted].split(rows))])
    return loss


# ---- which code runs each operation

KERNELS = {'attention': 'attention, causal, within documents and windows',
           'qk_norm': 'token shift, QK-norm and rotary embedding in one pass (inside attention)',
           'rms_norm': 'residual add and RMSNorm in one pass',
           'cross_entropy': 'the loss and its gradient in one pass over a block of logits',
           'mlp': 'activation at the end of a matrix product'}
IN_USE = set()              # names of KERNELS; empty on a CPU


def kernels_named(names):
    """A set of kernels from 'all', 'none', or names with commas; '-mlp' is all but that one. ValueError."""
    words = [w for w in names.split(',') if w not in ('', 'all', 'none')]
    unknown = [w for w in words if w.removeprefix('-') not in KERNELS]
    if unknown:
        raise ValueError(f"kernels names {unknown[0]!r}; there are {', '.join(KERNELS)}, all and none")
    but = {w[1:] for w in words if w.startswith('-')}
    named = {w for w in words if not w.startswith('-')}
    return (set() if names == 'none' else named or set(KERNELS)) - but


def choose_kernels(names, config, device, dtype):
    """Decide what runs each operation from here on: fills IN_USE, returns lines that say what and why.

    Every kernel is tried once on a layer of this width, its loss and its matrices' gradients against
    PyTorch's: one that this card cannot build or start, or that computes something else, stays out, and the
    run goes on without it.
    """
    named = kernels_named(names)
    IN_USE.clear()
    why = ('this is not a GPU' if device != 'cuda' else 'Triton is not installed' if triton is None else
           '' if torch.cuda.get_device_capability() >= (8, 0) else 'the card is older than Ampere (sm_80)')
    reasons = dict.fromkeys(KERNELS, why)
    if not why and config.head_dim not in (16, 32, 64, 128):
        width = f'head_dim {config.head_dim} is not 16, 32, 64 or 128'
        reasons |= dict.fromkeys(('attention', 'qk_norm'), width)
    if not why and dtype == torch.float32:
        without = 'in float32 it would do without tensor cores'
        reasons |= dict.fromkeys(('attention', 'qk_norm', 'mlp'), without)
    reasons |= {'mlp': 'mlp_tokens take the place of the MLP'} if config.mlp_tokens and not why else {}
    reasons |= {name: 'switched off' for name in KERNELS if name not in named}
    probe = None
    for together in ('attention', 'qk_norm'), ('rms_norm',), ('cross_entropy',), ('mlp',):
        tried = [name for name in together if not reasons[name]]
        while tried:
            probe = probe or Probe(config, device, dtype)
            fault = probe.fault(tried) if tried != ['qk_norm'] else 'it is part of the attention kernel'
            if not fault:
                break
            reasons[tried.pop()] = fault           # and once more without the last
        IN_USE.update(tried)
    table = {name: f'kernel, {what}' if name in IN_USE else f'torch, {reasons[name]}'
             for name, what in KERNELS.items()}
    return [f'{", ".join(name for name in KERNELS if table[name] == where)}: {where}'
            for where in dict.fromkeys(table.values())]


class Probe:
    """One layer of a model, all its weights random, and what PyTorch makes of it."""

    def __init__(self, config, device, dtype):
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            small = dataclasses.replace(config, n_layer=1, value_embeds=0, classes=0, domains='', experts=0)
            self.model = GPT(small).to(device).eval()
            self.model.compute_dtype = dtype
            for p in self.model.parameters():
                nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else nn.init.uniform_(p, 0.5, 1)
            self.idx = torch.randint(0, config.vocab_size, (2, config.block_size + 1)).to(device)
        self.idx[0, ::100] = config.bos             # many documents, and one that fills its row
        self.idx[1][self.idx[1] == config.bos] = (config.bos + 1) % config.vocab_size
        self.expected = self.gradients()

    def gradients(self):
        """Gradients of the matrices (a scalar's may cancel to little but rounding), and the loss."""
        self.model.zero_grad()
        loss = self.model(self.idx[:, :-1].contiguous(), self.idx[:, 1:].contiguous())
        loss.backward()
        return [p.grad for p in self.model.parameters() if p.ndim == 2] + [loss.detach()]

    def fault(self, names):
        """What is wrong with kernels: why they do not run here, or how far they are off; '' if nothing is."""
        before = set(IN_USE)
        IN_USE.update(names)
        try:
            pairs = zip(self.gradients(), self.expected)
            errors = [(a - b).norm() / b.norm().clamp(min=1e-12) for a, b in pairs]
            error = torch.stack(errors).max().item()         # NaN if any is, unlike Python's max
            return '' if error < 0.05 else f'its result differs by {error:.0%}'
        except Exception as e:                 # whatever a compiler or a driver may throw: torch can do it
            said = (str(e).strip() or 'no more is said').splitlines()[0][:80]
            return f'it does not run here ({type(e).__name__}: {said})'
        finally:
            IN_USE.clear()
            IN_USE.update(before)


# ---- part 4: the kernels -----------------------------------------------------------------------------------
#
# A Triton kernel is one program, started on a grid of indices: it loads tiles through pointers, computes on
# them in registers and stores tiles. All of these keep to a few rules: statistics in fp32; scalars as
# constexpr, part of the program (a Python float could arrive as fp64); row offsets in int64; nothing atomic,
# so that two runs give the same bits; tiles by width, dtype and shared memory, never by the name of a card.

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
#   s = x + y        u = s r        h = gain u        r = 1 / sqrt(mean(s^2) + eps)
#   dx = dy = ds + r (gain dh - u mean(gain dh u))    dgain = sum over rows of dh u

@jit
def add_norm_kernel(x_ptr, y_ptr, gain_ptr, s_ptr, h_ptr, rstd_ptr, n_rows, C: constexpr, EPS: constexpr,
                    BLOCK_M: constexpr, BLOCK_C: constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_C)
    inside = (rows < n_rows)[:, None] & (cols < C)[None, :]
    at = rows[:, None] * C + cols[None, :]
    s = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + at, mask=inside, other=0.0)
        s = (s + y.to(tl.float32)).to(y.dtype)         # as it will be read again
        tl.store(s_ptr + at, s, mask=inside)
        s = s.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(s * s, axis=1) / C + EPS)
    h = s * rstd[:, None]
    if gain_ptr is not None:
        h *= tl.load(gain_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    tl.store(h_ptr + at, h, mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@jit
def add_norm_backward_kernel(ds_ptr, dh_ptr, s_ptr, rstd_ptr, gain_ptr, dx_ptr, dgain_ptr, n_rows,
                             C: constexpr, STEPS: constexpr, BLOCK_M: constexpr, BLOCK_C: constexpr):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    dgain = tl.zeros([BLOCK_C], tl.float32)
    for step in range(STEPS):
        rows = (program * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (rows < n_rows)[:, None] & (cols < C)[None, :]
        at = rows[:, None] * C + cols[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        unit = tl.load(s_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
        dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if gain_ptr is not None:
            dgain += tl.sum(dh * unit, axis=0)
            dh *= tl.load(gain_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
        dx = rstd * (dh - unit * (tl.sum(dh * unit, axis=1) / C)[:, None])
        if ds_ptr is not None:
            dx += tl.load(ds_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=inside)
    if gain_ptr is not None:
        tl.store(dgain_ptr + program * C + cols, dgain, mask=cols < C)


def norm_tile(C):
    """Some 4,096 numbers a program, whole rows."""
    width = triton.next_power_of_2(C)
    return dict(BLOCK_M=max(1, 4096 // width), BLOCK_C=width, num_warps=4 if width <= 4096 else 8)


@op
def add_norm_forward(x: Tensor, y: Tensor | None, gain: Tensor | None,
                     eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """s, h, rstd of x and y (..., C); s is empty where y is None, as it would be x."""
    C, n_rows, tile = x.shape[-1], x.numel() // x.shape[-1], norm_tile(x.shape[-1])
    x, y = x.contiguous(), y if y is None else y.contiguous()
    s, h = x.new_empty(0) if y is None else torch.empty_like(x), torch.empty_like(x)
    rstd = x.new_empty(n_rows, dtype=torch.float32)
    grid = blocks(n_rows, tile['BLOCK_M']),
    launch(add_norm_kernel, grid, x, y, gain, s, h, rstd, n_rows, C, eps, **tile)
    return s, h, rstd


@op
def add_norm_backward(ds: Tensor | None, dh: Tensor, s: Tensor, rstd: Tensor,
                      gain: Tensor | None) -> tuple[Tensor, Tensor]:
    C, n_rows, tile, steps = s.shape[-1], len(rstd), norm_tile(s.shape[-1]), 1 if gain is None else 16
    programs = blocks(n_rows, tile['BLOCK_M'] * steps)
    ds, dh, s = ds if ds is None else ds.contiguous(), dh.contiguous(), s.contiguous()
    dx, dgain = torch.empty_like(s), s.new_empty((0 if gain is None else programs, C), dtype=torch.float32)
    launch(add_norm_backward_kernel, (programs,), ds, dh, s, rstd, gain, dx, dgain, n_rows, C, steps, **tile)
    return dx, dgain.sum(0) if gain is not None else dgain


def add_norm_save(ctx, inputs, output):
    (x, y, gain, _), (s, _, rstd) = inputs, output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if y is None else s, rstd, gain)
    ctx.has_y = y is not None


def add_norm_gradient(ctx, ds, dh, _):
    s, rstd, gain = ctx.saved_tensors
    dh = torch.zeros_like(s) if dh is None else dh
    dx, dgain = add_norm_backward(ds if ctx.has_y else None, dh, s, rstd, gain)
    return dx, dx if ctx.has_y else None, gain if gain is None else dgain.to(gain.dtype), None


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
    """BLOCK_M, BLOCK_N, num_warps, num_stages of the forward, dq and dk/dv kernels.

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
    return (64, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2)


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


def attend(layer, qkv, idx, cos, sin, first, last):
    """o (B, T, H, D) of an Attention layer's packed qkv: all between its two products."""
    flags = layer.qk_norm, layer.from_before is not None
    if 'qk_norm' not in IN_USE:
        qkv = torch.cat(layer.heads(qkv, idx, cos, sin), dim=1).transpose(1, 2).contiguous()
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
#   z = softcap(x W^T)     p = softmax(z)     q = the targets' distribution, sum 1
#   loss = lse - sum_j q_j z_j + Z_LOSS lse^2             lse = log sum_j e^z_j
#   dz = p (1 + 2 Z_LOSS lse) - q                         times 1 - (z / cap)^2 for the soft-cap
#   q_y = alpha, q_j = (1 - alpha) 2^(table_y table_j - norm_y) for j other than the gold token y

@jit
def capped(z, CAP: constexpr):
    return CAP * (2.0 * tl.sigmoid(2.0 / CAP * z) - 1.0)            # CAP tanh(z / CAP)


@jit
def soft_weights(gold, cols, table_ptr, norm, V: constexpr, RANK: constexpr):
    """(rows, cols): how much of what the gold token gives away goes to each other one."""
    r = tl.arange(0, RANK)
    mine = tl.load(table_ptr + gold[:, None] * RANK + r[None, :])
    theirs = tl.load(table_ptr + cols[:, None] * RANK + r[None, :], mask=(cols < V)[:, None], other=0.0)
    w = tl.exp2(tl.dot(mine, tl.trans(theirs), input_precision='ieee') - norm[:, None])
    return tl.where((cols[None, :] == gold[:, None]) | (cols >= V)[None, :], 0.0, w)


@jit
def cross_entropy_kernel(z_ptr, target_ptr, loss_ptr, count_ptr, table_ptr, norm_ptr, alpha_ptr, n_rows,
                         V: constexpr, CAP: constexpr, Z_LOSS: constexpr, GRAD: constexpr, RANK: constexpr,
                         BLOCK_M: constexpr, BLOCK_V: constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(target_ptr + rows, mask=rows < n_rows, other=-1)
    keep, gold = target >= 0, tl.maximum(target, 0).to(tl.int32)
    alpha = 1.0
    if RANK:
        alpha, norm = tl.load(alpha_ptr), tl.load(norm_ptr + gold)
    top, total = tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    mean_z = tl.zeros([BLOCK_M], tl.float32)                          # of z under q
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        inside = (rows < n_rows)[:, None] & (cols < V)[None, :]
        z = tl.load(z_ptr + rows[:, None] * V + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if CAP > 0:
            z = capped(z, CAP)
        q = tl.where(cols[None, :] == gold[:, None], alpha, 0.0)
        if RANK:
            q += (1 - alpha) * soft_weights(gold, cols, table_ptr, norm, V, RANK)
        mean_z += tl.sum(q * z, axis=1)
        z = tl.where((cols < V)[None, :], z * LOG2E, float('-inf'))
        new_top = tl.maximum(top, tl.max(z, axis=1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(z - new_top[:, None]), axis=1)
        top = new_top
    lse = top + tl.log2(total)                                        # base 2
    nats = lse / LOG2E
    tl.store(loss_ptr + rows, tl.where(keep, nats - mean_z + Z_LOSS * nats * nats, 0.0), mask=rows < n_rows)
    if GRAD:
        share = tl.where(keep, 1.0 / tl.load(count_ptr), 0.0)
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            inside = (rows < n_rows)[:, None] & (cols < V)[None, :]
            at = z_ptr + rows[:, None] * V + cols[None, :]
            z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if CAP > 0:
                z = capped(z, CAP)
            g = tl.exp2(z * LOG2E - lse[:, None]) * (1.0 + 2.0 * Z_LOSS * nats)[:, None]
            g -= tl.where(cols[None, :] == gold[:, None], alpha, 0.0)
            if RANK:
                g -= (1 - alpha) * soft_weights(gold, cols, table_ptr, norm, V, RANK)
            if CAP > 0:
                g *= 1.0 - (z / CAP) * (z / CAP)
            tl.store(at, g * share[:, None], mask=inside)


@op
def cross_entropy_forward(x: Tensor, weight: Tensor, targets: Tensor, table: Tensor | None,
                          norm: Tensor | None, alpha: Tensor | None, cap: float, z_loss: float, grad: bool,
                          rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses' mean over targets >= 0; all losses (N,), 0 where one is left out; dx (N, C), dW (V, C).

    table (V, a power of two from 16 on), norm (V,), alpha (), all fp32, are those of `soft_targets`, or None.
    """
    N, V, w, x, targets = len(x), len(weight), weight.to(x.dtype), x.contiguous(), targets.contiguous()
    losses, count = x.new_empty(N, dtype=torch.float32), (targets >= 0).sum().clamp(min=1).float()
    dx, dw = torch.empty_like(x) if grad else x.new_empty(0), torch.zeros_like(weight if grad else weight[:0])
    soft = table is not None
    block = 256 if soft else min(triton.next_power_of_2(V), 4096)
    for i in range(0, N, rows):
        xs, ys = x[i:i + rows], targets[i:i + rows]
        z = xs @ w.t()
        launch(cross_entropy_kernel, (blocks(len(xs), 16 if soft else 1),), z, ys, losses[i:i + rows], count,
               table, norm, alpha, len(xs), V, cap, z_loss, grad, table.shape[1] if soft else 0,
               BLOCK_M=16 if soft else 1, BLOCK_V=block, num_warps=8)
        if grad:
            torch.mm(z, w, out=dx[i:i + rows])
            dw += z.t() @ xs
    return losses.sum() / count, losses, dx, dw


def cross_entropy_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def cross_entropy_gradient(ctx, grad, *_):
    dx, dw = ctx.saved_tensors
    return dx * grad.to(dx.dtype), dw * grad, *[None] * 8


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

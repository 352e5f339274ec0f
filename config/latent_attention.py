"""Multi-head latent attention (DeepSeek-V2, Liu 2024, 2405.04434): keys and values of all heads come from one
latent of 192 numbers a token, and the cache that generation reads holds it and one shared rotary key of
16, whatever the number of heads.

    python train.py config/babylm.py config/latent_attention.py

To be expected: no faster training, a little more loss than plain attention, and a cache of 208 values a token
and layer: plain attention keeps 640 at the width of babylm.py, 768 with six heads of 64 (`python sample.py
<run> --stats` counts them). What it did on a CPU: +2.8 % bits per byte in ten minutes (one seed, commit
91d7dcc, parameters +3.7 %), 2.057 beside 2.039 at 500,000 tokens. Again on shuffled
rows, in a scale model of a fifth of an epoch, three seeds: 1.4 % worse; in a doll of config/tinystories.py 2.3 %
(one seed). Lost, but for the cache (RESULTS.md).
"""
import torch

import model
from model import Linear, attention, rms_norm, rotary, shift, slow_channels

kv_latent: int = 192        # 1..: width of the latent that keys and values are made from
q_latent: int = 0           # width of one that queries are made from; 0 is none
rotary_dim = 16

NOT_WITH = dict.fromkeys(('value_embeds', 'value_projections', 'interleaved_heads'),
                         'the cache keeps latents, and what becomes of keys and values later is not in them')


class Attention(model.Attention):
    """The latent is c = rms_norm(W_DKV x), a head's key [r; W_UK c], its value W_UV c; r, the rotary_dim
    channels that turn, is one for all heads. A cache keeps [r; c]: there W_UK is taken into the query, and
    W_UV applied to the weighted sum of latents. So QK-norm is of queries and r alone: a norm of whole keys is
    not linear in c. With token_shift half of r and of W_UK c come from the token before.

    Initialisation: to and from the latents N(1 / sqrt n), n the width they come from; q and out as the keys
    and values that are made.
    """

    def __init__(self, config, layer):
        super().__init__(config, layer)
        H, D, R, C, L = self.n_head, self.head_dim, config.rotary_dim, config.n_embd, config.kv_latent
        if R == D or self.n_kv_head != H:
            raise ValueError(f'kv_latent {L} needs rotary_dim below head_dim {D} (it is {R}), '
                             f'and no n_kv_head')
        self.widths, self.cached, self.shifts = (R, L), (1, 1, R + L), config.token_shift
        self.norm, self.qk_norm, self.from_before = config.qk_norm, False, None    # `packed` does both itself
        self.register_buffer('slow', slow_channels(R, R), persistent=False)
        self.down, self.v = Linear(C, R + L), Linear(L, H * D)
        self.k, self.k_before = Linear(L, H * (D - R) // 2), Linear(L, H * (D - R) // 2)
        self.q_down = Linear(C, config.q_latent) if config.q_latent else None
        self.q = Linear(config.q_latent or C, H * D)

    def latent(self, x, context):
        """r (B, T, R), not yet turned; c, and that of the token before, (B, T, kv_latent)."""
        x = self.down(x)
        follows = (context.idx != self.bos)[..., None]
        before = shift(x, follows, self, context.cache) if self.shifts else x
        (r, c), (r_before, c_before) = (t.split(self.widths, dim=-1) for t in (x, before))
        r = torch.where(self.slow, r_before, r)
        return rms_norm(r) if self.norm else r, rms_norm(c), rms_norm(c_before)

    def queries(self, x):
        q = self.q(x if self.q_down is None else rms_norm(self.q_down(x)))
        q = q.unflatten(-1, (self.n_head, self.head_dim))                          # (B, T, H, D)
        return rms_norm(q) if self.norm else q

    def packed(self, x, context):
        r, c, before = self.latent(x, context)
        parts = self.k(c), self.k_before(before), self.v(c)
        k, k_before, v = (t.unflatten(-1, (self.n_head, -1)) for t in parts)
        r = r[:, :, None].expand(-1, -1, self.n_head, -1)
        return torch.cat([self.queries(x), torch.cat([r, k, k_before], dim=-1), v], dim=2)

    def forward(self, x, context):
        return super().forward(x, context) if context.cache is None else self.absorbed(x, context)

    def absorbed(self, x, context):
        """The same from a cache of latents: the maps to keys and values are taken into queries and output."""
        cache, turns = context.cache, (context.cos, context.sin)
        r, c, _ = (t[:, None] for t in self.latent(x, context))
        past, = cache.append(self, torch.cat([rotary(r, *turns), c], dim=-1))      # (B, 1, S, R + kv_latent)
        c = past[..., self.widths[0]:]
        before = shift(c, cache.follows[:, None, :c.shape[2], None], self) if self.shifts else c
        q = rotary(self.queries(x).transpose(1, 2), *turns)
        k, k_before, v = (up.weight.to(x.dtype).unflatten(0, (self.n_head, -1))
                          for up in (self.k, self.k_before, self.v))
        r, q, q_before = q.split([self.widths[0], k.shape[1], k.shape[1]], dim=-1)
        q, k = torch.cat([r, q @ k, q_before @ k_before], dim=-1), torch.cat([past, before], dim=-1)
        o = attention(q, k, c, context.first, self.scale) @ v.mT                   # (B, H, T, D)
        return self.output(o.transpose(1, 2), context)

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

"""Tokenformer (Wang 2024, 2410.23168): every matrix of a layer becomes a set of learned tokens, keys and
values, that the input attends to; such a model grows by appending tokens (config/tokenformer_grow.py). To
stack on any data set and shape:

    python train.py config/babylm.py config/tokenformer.py

At equal width it would be a third larger and slower than a plain transformer. 3/4 n_embd tokens for each of
q, k, v and out and 3 n_embd for the feed-forward layer, the ratio of the paper's 354M model, give exactly as
many weights as relu2 at 4 n_embd. GeLU before the norm, not after as in the paper, because it trained better
here. Expected: no gain from scratch at equal size; the point is growth. What it did: +1.0 % bits per byte in
ten minutes of a CPU (one seed, commit 91d7dcc); at 500,000 tokens 2.056 beside 2.039 of the plain model,
2.069 with the paper's order of norm and GeLU, and a pass 22 % slower. Again on
shuffled rows, in a scale model of a fifth of an epoch, three seeds: 1.2 % worse. Lost, but for growth (RESULTS.md).
In a doll of config/tinystories.py, 3.6 readings, 0.1 % worse (one seed; RESULTS.md, "Dolls").
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import model
import train
from model import Linear, rms_norm

attn_tokens: int = 3 * n_embd // 4  # parameter tokens in place of each matrix of attention; 0 is off
mlp_tokens: int = 3 * n_embd        # parameter tokens in place of the MLP; 0 is off
token_norm: str = 'gelu_norm'       # gelu_norm|norm_gelu: of their scores; the paper normalises first
attn_scale_tokens: int = 0          # the root of this scales the scores; 0 means attn_tokens. A grown model
mlp_scale_tokens: int = 0           # that keeps its old number computes what it did; 0 means mlp_tokens

NOT_WITH = dict.fromkeys(('experts', 'domains'), 'both change the MLP') | {
    'latent_attention': 'both replace the matrices of attention'}


class Pattention(nn.Module):
    """A map from fan_in to fan_out channels made of n tokens, each a key and a value (Wang 2024, 2410.23168).

    y = sum_i g_i value_i, g = GeLU(tau s / |s|) for 'norm_gelu', tau GeLU(s) / |GeLU(s)| for 'gelu_norm', of
    scores s_i = x key_i; tau^2 = scale_tokens, which is n until tokens are appended.
    """

    def __init__(self, fan_in, fan_out, n, scale_tokens, norm):
        super().__init__()
        self.keys, self.values = Linear(fan_in, n), Linear(n, fan_out)
        self.scale_tokens, self.norm_first = scale_tokens or n, norm == 'norm_gelu'
        self.share = self.scale_tokens / n

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
    def grow_from(self, old, dice):
        """Become `old` and some tokens more, as config/growth.py asks it; None if there are no more.

        Where the scale is still the old one's the new keys are 0, and the output is the old one to rounding;
        else they are random, as in the released code, which changes it (its new values stand 2 / (L sqrt C), smaller than
        these). The new values are random: where key
        and value are both 0 neither would ever get a gradient.
        """
        n = old.keys.out_features
        if n == self.keys.out_features:
            return None
        self.init_weights((self.keys.out_features / n) ** 0.5, dice)          # values as large as q's and v's began
        if self.scale_tokens == old.scale_tokens:
            self.keys.weight.zero_()
        self.keys.weight[:n], self.values.weight[:, :n] = old.keys.weight, old.values.weight
        pairs = (self.keys.weight, old.keys.weight), (self.values.weight, old.values.weight)
        return {p: (q, 1, 'append') for p, q in pairs}


class Attention(model.Attention):
    """Attention whose four matrices are Pattention; all else is as it was."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.of_tokens = config.attn_tokens > 0
        for name in ('q', 'k', 'v', 'proj') if self.of_tokens else ():
            plain = getattr(self, name)
            setattr(self, name, Pattention(plain.in_features, plain.out_features, config.attn_tokens,
                                           config.attn_scale_tokens, config.token_norm))

    def packed(self, x, context):
        if not self.of_tokens:
            return super().packed(x, context)
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1).unflatten(-1, (-1, self.head_dim))

    def init_weights(self):
        if not self.of_tokens:
            return super().init_weights()
        for part, size in ((self.q, 1.0), (self.v, 1.0), (self.proj, 0.3)):
            part.init_weights(size)
        n, keys, out = self.q.values.in_features, self.v.keys.weight, self.proj.values.weight
        heads = self.q.values.weight.view(self.n_kv_head, -1, self.head_dim, n)
        self.k.keys.weight.copy_(self.q.keys.weight)           # a token looks for its like, as without tokens
        self.k.values.weight.copy_(heads[:, 0].flatten(0, 1))
        values = self.v.values.weight.view(self.n_kv_head, 1, self.head_dim, n).expand_as(heads)
        self.proj.keys.weight.copy_(values.reshape(-1, n).t())  # and goes back by the way that a value came
        out.copy_(keys.t() * (out.std() / keys.std()))


class MLP(model.MLP):
    """Pattention in the place of an MLP, which begins as the identity too."""

    def __init__(self, config, hidden=None):
        if not config.mlp_tokens:
            return super().__init__(config, hidden)
        nn.Module.__init__(self)                                # without the matrices
        C = config.n_embd
        self.tokens = Pattention(C, C, config.mlp_tokens, config.mlp_scale_tokens, config.token_norm)

    @property
    def values(self):
        return self.tokens.values                              # what its output is made of, as `down` is

    def forward(self, x, context):
        return self.tokens(x) if hasattr(self, 'tokens') else super().forward(x, context)

    def init_weights(self):
        return self.tokens.init_weights() if hasattr(self, 'tokens') else super().init_weights()


class GPT(model.GPT):

    def describe(self):
        c = self.config
        return super().describe() + (f'; tokens in place of matrices: {c.attn_tokens} for each of attention, '
                                     f'{c.mlp_tokens} for the MLP')


class Run(train.Run):

    def shape_names(self):
        return [*super().shape_names(), 'attn_tokens', 'mlp_tokens', 'token_norm', 'attn_scale_tokens',
                'mlp_scale_tokens']

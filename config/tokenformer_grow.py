"""Tokenformer that grows (Wang 2024, 2410.23168): half of the tokens at first, all of them from a third of
the run on.

    python train.py config/babylm.py config/tokenformer_grow.py
    python train.py config/babylm.py config/tokenformer_grow.py --growth_tokens=random   as the authors' code, with larger values

The final size is that of config/tokenformer.py, its rival at equal time. Appended keys are 0 and the scores
keep their scale, so the model computes at first what it did; random keys, with a scale that follows their
number, begin with a jump, and the authors say that both end roughly equal. Expected: more text, and a model
that learned less of it. What it did: +0.9 % bits per byte in ten minutes of a CPU, on 6 % less text (1.5605
beside 1.5462, standard deviation 0.0020; 2026-11-21, commit 3f931df). Lost (RESULTS.md).
"""
import dataclasses

from config import growth as growing, tokenformer
from config.grown_weights import WIDTHS
from config.tokenformer import MLP, NOT_WITH, Attention

growth_tokens: str = 'zero'        # zero|random: keys of appended tokens; those of 0 do nothing at first
token_norm = 'gelu_norm'
attn_tokens = 3 * n_embd // 8
mlp_tokens = 3 * n_embd // 2
growth = [(0.33, dict(attn_tokens=2 * attn_tokens, mlp_tokens=2 * mlp_tokens))]

TOKENS = ('attn_tokens', 'mlp_tokens')


def with_tokens(config, changes, random):
    """The config with tokens appended, their scores scaled as before; if random as if they had all been
    there."""
    sizes = {}
    for name in TOKENS:
        old, new = getattr(config, name), changes.get(name, getattr(config, name))
        if type(new) is not int:
            raise ValueError(f'{name} is {new!r}, it must be a whole number')
        if new < old or old == 0 < new:
            raise ValueError(f'{name} grows by more of them, and {new} is none of {old}')
        scale = name.replace('tokens', 'scale_tokens')
        sizes |= {name: new, scale: new if random else getattr(config, scale) or old}
    return dataclasses.replace(config, **sizes)


class GPT(tokenformer.GPT, growing.GPT):
    pass


class Run(tokenformer.Run, growing.Run):

    def grown_config(self, config, changes):
        appended = {name: size for name, size in changes.items() if name in TOKENS}
        rest = {name: size for name, size in changes.items() if name not in TOKENS}
        new = super().grown_config(config, rest)
        if appended and any(getattr(new, name) > getattr(config, name) for name in WIDTHS):
            raise ValueError('tokens and widths cannot grow at once: grow one after the other')
        return with_tokens(new, appended, self.s.growth_tokens == 'random')

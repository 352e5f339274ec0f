"""Tokenformer that grows (Wang 2024, 2410.23168): half of the tokens at first, all of them from a third of
the run on.

    python train.py config/babylm.py config/tokenformer_grow.py
    python train.py config/babylm.py config/tokenformer_grow.py --growth_tokens=random     as in the authors' code

The final size is that of config/tokenformer.py, its rival at equal time. Appended keys are 0 and the scores
keep their scale, so the model computes at first what it did; random keys, with a scale that follows their
number, begin with a jump, and the authors say that both end roughly equal. Expected: more text, and a model
that learned less of it. What it did: +0.9 % bits per byte in ten minutes of a CPU, on 6 % less text (1.5605
beside 1.5462, standard deviation 0.0020; 2026-11-21, commit 3f931df). Lost (RESULTS.md).
"""
import dataclasses

from config.growth import GPT as GrowingGPT, Run as GrowingRun
from config.grown_weights import WIDTHS
from config.tokenformer import MLP, NOT_WITH, Attention, GPT as TokenGPT, Run as TokenRun

growth_tokens: str = 'zero'       # zero|random: keys of appended tokens; 0 does nothing at first
attn_tokens = 3 * n_embd // 8
mlp_tokens = 3 * n_embd // 2
growth = [(0.33, dict(attn_tokens=2 * attn_tokens, mlp_tokens=2 * mlp_tokens))]

TOKENS = ('attn_tokens', 'mlp_tokens')


class GPT(TokenGPT, GrowingGPT):
    pass


class Run(TokenRun, GrowingRun):

    def grown_config(self, config, changes):
        """Tokens are appended, their scores scaled as before; random ones as if they had all been there."""
        tokens = {name: size for name, size in changes.items() if name in TOKENS}
        for name, size in tokens.items():
            if type(size) is not int:
                raise ValueError(f'{name} is {size!r}, it must be a whole number')
            if size < (old := getattr(config, name)) or old == 0 < size:
                raise ValueError(f'{name} grows by more of them, and {size} is none of {old}')
        if any(size > getattr(config, name) for name, size in tokens.items()) and any(
                changes.get(name, 0) > getattr(config, name) for name in WIDTHS):
            raise ValueError('tokens and widths cannot grow at once: grow one after the other')
        new = super().grown_config(config, {name: size for name, size in changes.items() if name not in TOKENS})
        scales = {name: getattr(config, f'{name[:-6]}scale_tokens') or getattr(config, name) for name in TOKENS}
        if self.s.growth_tokens == 'random':
            scales = {name: 0 for name in TOKENS}                            # those of the new number
        return dataclasses.replace(new, **tokens, **{f'{name[:-6]}scale_tokens': n for name, n in scales.items()})

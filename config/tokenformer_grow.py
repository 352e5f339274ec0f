"""Tokenformer that grows (Wang 2024, 2410.23168): half of the tokens at first, all of them from a third of
the run on.

    python train.py config/babylm.py config/tokenformer_grow.py
    python train.py config/babylm.py config/tokenformer_grow.py --growth_tokens=random     as in the authors' code

The final size is that of config/tokenformer.py, its rival at equal time. Appended keys are 0 and the scores
keep their scale, so the model computes at first what it did; random keys, with a scale that follows their
number, begin with a jump, and the authors say that both end roughly equal. Expected: more text, and a model
that learned less of it; what happened stands in the README.
"""
token_norm = 'gelu_norm'
attn_tokens = 3 * n_embd // 8
mlp_tokens = 3 * n_embd // 2
growth = [(0.33, dict(attn_tokens=2 * attn_tokens, mlp_tokens=2 * mlp_tokens))]

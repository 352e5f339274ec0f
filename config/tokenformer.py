"""Tokenformer (Wang 2024, 2410.23168): every matrix of a layer becomes a set of learned tokens, keys and
values, that the input attends to; such a model grows by appending tokens. To stack on any data set and
shape:

    python train.py config/babylm.py config/tokenformer.py

At equal width it would be a third larger and slower than a plain transformer. 3/4 n_embd tokens for each of
q, k, v and out and 3 n_embd for the feed-forward layer, the ratio of the paper's 354M model, give exactly as
many weights as relu2 at 4 n_embd. GeLU before the norm, not after as in the paper, because it trained better
here (README). What to expect: no gain from scratch at equal size; the point is growth.
"""
attn_tokens = 3 * n_embd // 4
mlp_tokens = 3 * n_embd
token_norm = 'gelu_norm'

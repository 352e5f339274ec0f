"""Qwen3's shape: as config/llama_shape.py, with QK-norm, whose gains hold the baseline's sharper scores too.

    python train.py config/babylm.py config/qwen3_shape.py
    python sample.py out/babylm --export hf

The nearest to the baseline that transformers and llama.cpp know (Yang 2025, 2505.09388): left away are the
token shift and the token embedding mixed in again. With --mlp=relu2 transformers has it too, llama.cpp not.
What it cost: 2.1972 bits per byte beside 2.2131 in a doll of config/babylm.py's half hour, one seed, with
mlp_hidden 85 for as many parameters; but the base without its token shift has 2.1903 there (RESULTS.md,
"Instructions, passages, exports").
"""
from config.llama_shape import GPT, Block

qk_norm = True
token_shift = False
mlp = 'swiglu'

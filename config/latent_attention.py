"""Multi-head latent attention (DeepSeek-V2, Liu 2024, 2405.04434): keys and values of all heads come from one
latent of 192 numbers a token, and the cache that generation reads holds it and one shared rotary key of
16, whatever the number of heads.

    python train.py config/babylm.py config/latent_attention.py

To be expected: no faster training, a little more loss than plain attention, and a cache of 208 values a token
and layer: plain attention keeps 640 at the width of babylm.py, 768 with six heads of 64 (`python sample.py
<run> --stats` counts them). What it did on a CPU stands in the README.
"""
kv_latent = 192
rotary_dim = 16

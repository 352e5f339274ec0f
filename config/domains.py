"""Experts for domains (DEMix, Gururangan 2021, 2108.05036): late on, a quarter of every MLP is each source's.

    torchrun train.py config/babylm.py config/domains.py
    python train.py config/babylm.py --init_from=out/babylm+domains --domains=...,new --frozen=... --out_dir=out/added

A micro-batch is of one source, so that a token meets no more weights than before, and which is a look-up. The
split computes what the model had learned. val_bpb is that of text whose domain is not told (the model infers
it as it reads), val_bpb_told that where it is. The list of --domains decides what a further run has: a new
domain branches off, one not named is left out, those in --frozen stay to the bit. Expected: a small gain in a
domain, little where domains are small. At equal total parameters its rival is a wider plain model. A first
look stands in the README.
"""
domains = 'sources'
domains_from = 0.6
domain_share = 0.25

"""Watches every layer learn: similarity to what it becomes, effective rank, sparsity, norms.

    torchrun train.py config/babylm.py config/dynamics.py
    python bench_mfu.py --dynamics out/a out/b

After Pico (Diehl Martinez 2025) and "Tending towards stability" (2410.11451): nearly all layers of large
models are within 20 % of training what they stay, small ones later and less steadily. At 15 places of
progress one batch of validation text goes through the model; out/<run>/dynamics.json holds what sample.Probe
makes of it. Where that would take over 2 % of the budget there are fewer; a run of max_steps takes all, so
that it can be repeated. The steps of training are the same with and without.
"""
dynamics = True

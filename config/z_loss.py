"""z-loss (Chowdhery 2022, 2204.02311): 1e-4 times the squared log of the softmax's sum, so that logits do not
drift.

    torchrun train.py config/babylm.py config/z_loss.py

GPT-BERT's small model trains with it (Charpentier 2024, 2410.24159). It is made in the pass that makes the
loss, costs nothing, and is in train_loss, not in bits per byte. Expected: no change in half an hour, but
safer at high head_lr and in bf16. A first look stands in the README.
"""
z_loss = 1e-4

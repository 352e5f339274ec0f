"""z-loss (Chowdhery 2022, 2204.02311): 1e-4 times the squared log of the softmax's sum, so that logits do not
drift.

    torchrun train.py config/babylm.py config/z_loss.py

GPT-BERT's small model trains with it (Charpentier 2024, 2410.24159). It is made in the pass that makes the
loss (loss_kernels.py), costs nothing, and is in train_loss, not in bits per byte. Expected: no change in half
an hour, but safer at high head_lr and in bf16. What it did: +0.1 % bits per byte in ten minutes of a CPU, a
fifth of an epoch, where 0.3 % says nothing (commit 91d7dcc; RESULTS.md). Again on
shuffled rows, three seeds: 0.0 %. Neutral.
"""
from config import loss_kernels
from config.loss_kernels import Run, kernel_cases

z_loss: float = 1e-4        # weight of the squared log of the softmax's sum; 0 is none


class GPT(loss_kernels.GPT):
    page = ''                # what a page computes is the baseline's

    def loss(self, x, targets, reduction, **extras):
        return super().loss(x, targets, reduction, z_loss=self.config.z_loss, **extras)

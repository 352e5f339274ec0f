"""Sliding-window attention: a token sees so many tokens back and no more (Beltagy 2020, 2004.05150; Mistral
7B, 2310.06825).

    torchrun train.py config/babylm.py config/window.py

What is further back still arrives, a window a layer. The kernels skip the blocks of keys that no query of
theirs sees, and FLOPs count the positions attended to. Documents of a few hundred tokens are short already:
at block_size 512 attention is a tenth of the arithmetic, so there is little to save. Expected: nothing at
this length, less time at 2,048 tokens and more. Not measured yet.
"""
import torch

import model

window: int = 128       # tokens that a token attends to, itself included; 0 is all of its document


class GPT(model.GPT):
    page = '''
        Model.prototype.visible = (visible => function (ids) {
            const {window} = this.config, first = visible.call(this, ids);
            return window ? first.map((start, p) => Math.max(start, this.length + p - window + 1)) : first;
        })(Model.prototype.visible);'''

    def first_visible(self, idx, past=0, cache=None):
        start, window = super().first_visible(idx, past, cache), self.config.window
        position = past + torch.arange(idx.shape[1], device=idx.device)
        return torch.maximum(start, position - window + 1) if window else start

    def flops_per_token(self, attended=None):
        T = self.config.block_size
        W = min(self.config.window or T, T)
        return super().flops_per_token(W - W * (W - 1) / (2 * T) if attended is None else attended)

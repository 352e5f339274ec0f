"""Value embeddings: in the last layers a second embedding of each token is added to its values.

    python train.py config/babylm.py config/value_embeds.py

After value residual learning (Zhou 2024, 2410.17897) and the speedruns of modded-nanogpt, which mix token
tables into the values of some layers. A table is as large as the model's own, but a token looks up one row of
it: parameters grow, FLOPs do not. A table of N(1) with a gain of 0.5 is as large as a value of a normalised
token. Expected: a gain by the step, for parameters that a comparison at equal size counts. What it
did: 1.9708 bits per byte beside 1.9680 and 1.9696 (seeds 1, 2) in a doll of config/nocap.py (RESULTS.md,
"Dolls"). Even.
"""
import torch
import torch.nn as nn

import model

value_embeds: int = 2       # in how many last layers, at most n_layer


class Attention(model.Attention):

    def __init__(self, config, layer):
        super().__init__(config, layer)
        if config.value_embeds > config.n_layer:
            raise ValueError(f'value_embeds is {config.value_embeds}, it counts layers and n_layer is '
                             f'{config.n_layer}')
        has_table = layer >= config.n_layer - config.value_embeds
        width = self.n_kv_head * self.head_dim
        self.value_embed = nn.Embedding(config.vocab_size, width) if has_table else None
        self.value_gain = nn.Parameter(torch.empty(())) if has_table else None

    def packed(self, x, context):
        qkv = super().packed(x, context)
        if self.value_embed is None:
            return qkv
        table = (self.value_gain * self.value_embed(context.idx)).to(x.dtype)
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        return torch.cat([qk, v + table.unflatten(-1, (self.n_kv_head, -1))], dim=2)

    def init_weights(self):
        super().init_weights()
        if self.value_embed is not None:
            self.value_embed.weight.normal_(std=1.0)
            self.value_gain.fill_(0.5)

"""Value projections: to every layer's values comes a projection of the token's embedding, as it entered the
first layer.

    python train.py config/babylm.py config/value_projections.py

Whence: value residuals (Zhou 2024, 2410.17897) and value embeddings, as the slowrun leaderboard has them now:
it reports 0.027 nats for projections in the place of tables (config/value_embeds.py), which text that is read
often would fill with itself. Expected: a gain by the step at 1 / 12 more weights a layer. What it did: 2.0890
bits per byte beside 2.0949 and 2.0936 (seeds 1, 2) in a doll of config/babylm.py's half hour (RESULTS.md,
"Dolls"): 0.3 % better with 4.9 % more parameters, one seed. Even, for what it costs.
In a doll of config/tinystories.py, 3.6 readings, 0.4 % worse, with 4 % more parameters (one seed; RESULTS.md, "Dolls").
"""
import torch

import model

NOT_WITH = dict.fromkeys(('tokenformer', 'tokenformer_grow'), 'its values are made otherwise')


class Block(model.Block):

    def forward(self, x, x0, context):
        return super().forward(x, x0, context._replace(extras=context.extras | dict(x0=x0)))


class Attention(model.Attention):

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.value_of_x0 = model.Linear(config.n_embd, self.n_kv_head * self.head_dim) if layer else None

    def packed(self, x, context):
        qkv = super().packed(x, context)
        if self.value_of_x0 is None:            # the first layer's values are made of it as it is
            return qkv
        more = self.value_of_x0(context.extras['x0'])
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        return torch.cat([qk, v + more.unflatten(-1, (self.n_kv_head, -1))], dim=2)

    def init_weights(self):
        super().init_weights()
        if self.value_of_x0 is not None:
            self.value_of_x0.weight.zero_()

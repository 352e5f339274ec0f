"""A gate on each head's output of attention, computed from what the layer reads (Qiu 2025, 2505.06708).

Expected: a little better.
"""
import torch
import model

gate_channels: int = 12     # 1..: channels of the layer's input that a gate looks at

class Attention(model.Attention):
    def build(self, config):
        super().build(config)
        self.gate = model.Linear(config.gate_channels, config.n_head)

    def init_weights(self):
        super().init_weights()
        self.gate.weight.fill_(0)

    def forward(self, x, context):
        return super().forward(x, context)      # and here?

"""A gate on what each head of attention found: 2 sigmoid(w x), one number a head and token, x being the first
12 channels of what the layer reads. So a head can say nothing, where softmax has to attend to something.

    python train.py config/babylm.py config/attention_gate.py

Whence: Qiu 2025 (2505.06708) of all channels; of the first 12, as here, modded-nanogpt and the slowrun
leaderboard. There w begins as 0 too; the 2 is ours, so that training begins as the base does. Expected: 0.2
to 0.5 % fewer bits per byte, for 12 weights a head, and most where documents are long. Did: 2.4658 and
2.4565 val_bpb beside 2.4754 and 2.4713, seeds 1 and 2 (150,000 tokens, 2026-11-25, commit 1116f3a;
RESULTS.md, "Three new ideas"). Neutral: ahead with both seeds, by 0.4 and 0.6 %, which two do not tell from
noise; by the clock, 90 s, one seed: +5.8 %, on 13 % less text. In a doll of config/tinystories.py 1.5691 beside 1.5767
(RESULTS.md, "Dolls"), 0.5 % ahead by the step, one seed.
"""
import torch

import model

gate_channels: int = 12     # 1..: channels of its input that a layer's gate looks at, at most n_embd


class Attention(model.Attention):

    def __init__(self, config, layer):
        super().__init__(config, layer)
        if config.gate_channels > config.n_embd:
            raise ValueError(f'gate_channels is {config.gate_channels}, n_embd only {config.n_embd}')
        self.gate = model.Linear(config.gate_channels, config.n_head)

    def forward(self, x, context):
        gate = 2 * torch.sigmoid(self.gate(x[..., :self.gate.in_features]))             # (B, T, H)
        return super().forward(x, context._replace(extras=context.extras | dict(gate=gate)))

    def output(self, o, context):
        return super().output(o * context.extras['gate'][..., None], context)

    def init_weights(self):
        super().init_weights()
        self.gate.weight.zero_()

"""NorMuon: after Muon has made all singular values of an update alike, its rows are made alike too.

    torchrun train.py config/babylm.py config/normuon.py

Whence: Li 2025 (2510.05491). Orthogonal updates still move some neurons (rows) much more than others; each row
is divided by the root of a running mean of its squares, and the whole brought back to the length it had.
Reported: a tenth to a fifth fewer steps at 124M to 5.4B parameters; in modded-nanogpt since 2025. Expected: a
gain, the smaller the narrower the matrices. What it did: 1.9665 bits per byte beside 1.9680 and 1.9696 (seeds 1,
2) in a doll of config/nocap.py, matrices 88 wide; in dolls of config/babylm.py 0.4 % better with 65,576
parameters, where seeds spread as much, and 0.1 % with 135,224; in one of config/tinystories.py 0.0 % (one seed
each; RESULTS.md, "Dolls"). Even.
"""
import torch

import train

row_beta: float = 0.95      # 0..0.9999: of the running mean of a row's squares

NOT_WITH = dict.fromkeys(('leaderboard', 'plain_gpt2'), 'AdamW moves all that it has')


class Run(train.Run):

    def muon(self):
        beta = self.s.row_beta

        class NorMuon(super().muon()):

            def direction(self, grad, state, group):
                update = super().direction(grad, state, group)
                squares = update.square().mean(-1, keepdim=True)
                if 'squares' not in state:
                    state['squares'], state['seen'] = torch.zeros_like(squares), 0
                state['seen'] += 1
                mean = state['squares'].lerp_(squares, 1 - beta) / (1 - beta ** state['seen'])
                even = update / (mean.sqrt() + 1e-8)
                before, after = (x.norm(dim=(-2, -1), keepdim=True) for x in (update, even))
                return even * (before / after.clamp(min=1e-12))

        return NorMuon

"""Cautious weight decay: a weight decays only where the step moves it towards zero as well.

    torchrun train.py config/babylm.py config/cautious_decay.py

Whence: Chen 2025 (2510.12402), which reports lower losses for AdamW, Lion and Muon at the same decay, from 338M
parameters on; modded-nanogpt and nanochat have it. What it leaves out is the decay that works against the
gradient, so a larger one is borne. Expected: a small gain. What it did:
1.5650, 1.5641 and 1.5628 bits per byte (seeds 1, 2, 3) beside the base's 1.5793, 1.5760 and 1.5762 in a doll of
config/tinystories.py, 0.8 % less, eleven standard errors; in dolls of config/babylm.py 0.6 % less at 65,576
parameters (three seeds), 0.5 and 0.0 % at 97,328 (two), 0.1 % at 135,224 (one; RESULTS.md, "Dolls"). With
row_muon.py and twice the batch in dolls of TinyStories 1.4 % at 40,000 (three seeds), 0.9 % at 65,576 (two). Won in the
smallest, and fades as they grow, as every other gain did: so no default.
"""
import torch

import train

NOT_WITH = dict.fromkeys(('leaderboard', 'plain_gpt2'), 'AdamW moves all that it has')


class Run(train.Run):

    def muon(self):

        class CautiousMuon(super().muon()):

            def move(self, params, updates, group):
                """A step is subtracted: it leads towards zero where it has the weight's sign."""
                shrink = group['lr'] * group['weight_decay']
                for p, update in zip(params, updates):
                    p.mul_(1 - shrink * (p * update > 0))
                torch._foreach_sub_(params, updates)

        return CautiousMuon

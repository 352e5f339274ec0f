"""Multi-token prediction (Gloeckle 2024, 2404.19737): training predicts the token after next as well.

    torchrun train.py config/babylm.py config/multi_token.py

One more matrix turns the last hidden state into that token's, under the same head; never across a document's
end. Its loss counts ahead_weight times, less and less, so that the run ends on the next token alone;
train_loss contains it, bits per byte do not. The matrix begins at 0: a further token's guess begins as the
next one's. The head is computed twice: for babylm.py's shape 22 % more FLOPs a token (counted), 0.9 % more
parameters, in training alone. Reported: better code at billions of parameters, not below; negative in
nanochat's log. Expected to lose at this size. What it did: +2.0 % bits per byte in ten minutes of a CPU, a
fifth of an epoch, on 28 % less text (1.5778 beside 1.5462, standard deviation 0.0020; 2026-11-21, commit
3f931df). In dolls (RESULTS.md, "Dolls") of TinyStories 1.5773 beside 1.5772, of config/babylm.py 2.2042 beside
2.2098 and 2.2104: even by the token. Lost.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import model
import train
from model import Linear

predict_ahead: int = 1        # further tokens that training predicts too
ahead_weight: float = 0.3     # of their losses, falling to 0 with progress


class GPT(model.GPT):
    page = ''                # what a page computes is the baseline's

    def build(self, config):
        super().build(config)
        self.ahead = nn.ModuleList(Linear(config.n_embd, config.n_embd) for _ in range(config.predict_ahead))

    def init_weights(self):
        super().init_weights()
        for further in self.ahead:
            further.weight.zero_()

    def loss(self, x, targets, reduction, ahead=None, **extras):
        """ahead (): how much further tokens' losses count."""
        loss = super().loss(x, targets, reduction, **extras)
        for further in self.ahead if ahead is not None else ():
            targets = one_later(targets, self.config.bos)
            h = self.final(x + further(x))
            loss = loss + ahead * self.cross_entropy(h.flatten(0, 1), targets.flatten(), reduction)
        return loss

    def params(self):
        counts = super().params()
        return counts | dict(active=counts['active'] - sum(further.weight.numel() for further in self.ahead))

    def matrices(self):
        again = [w for further in self.ahead for w in (further.weight, self.lm_head.weight)]
        return again + super().matrices()


class Run(train.Run):

    def groups(self, model):
        groups = super().groups(model)
        groups['matrices']['params'].extend(further.weight for further in model.ahead)
        return groups

    def loss(self, idx, targets, **extras):
        ahead = torch.full((), self.s.ahead_weight * (1 - self.progress), device=idx.device)
        return super().loss(idx, targets, ahead=ahead, **extras)


def one_later(targets, bos):
    """targets (B, T), each the one after; -1 at a row's end, and where that would be another document's."""
    return F.pad(targets[:, 1:], (0, 1), value=-1).masked_fill((targets == bos) | (targets < 0), -1)

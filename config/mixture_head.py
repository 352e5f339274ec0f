"""A head that is a mixture: it reads several states of a token, whose logits are added up as log-sum-exp.

    torchrun train.py config/babylm.py config/mixture_head.py

Logits that are a table times a state of C channels are a matrix of rank C, whatever the text would have; with
8,192 ids and 320 channels that binds (the softmax bottleneck: Yang 2018, 1711.03953; Godey 2024, 2404.07647,
has models of less than a thousand channels saturate by it). Yang mixes several softmaxes by weights of their
own; here all share one sum, so that a part weighs what it has of it, and loss and gradient come block by block.
A further part is a C x C matrix, and the head once more: two parts are 22 % more FLOPs a token in babylm.py's
shape, four 66 % (counted), for 0.9 and 2.7 % more parameters. Expected: a percent by the token, less by the
clock. What it did, with four parts, one seed each (RESULTS.md, "Dolls"): at equal tokens 1.7, 1.5 and 1.3 % fewer
bits per byte in dolls of 65,576, 97,328 and 135,224 parameters, in 1.2 to 1.6 times the time; weights of their
own added nothing. At equal FLOPs, beside the best settings of the smallest, two parts were 0.4 % worse than one,
four 0.9 %. Won by the token, lost by the clock.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import model
import train
from model import BlockwiseLoss, Linear, rows_at_once

head_parts: int = 2         # 1..: hidden states that the head reads for every token

NOT_WITH = dict.fromkeys(('growth', 'distillation', 'distilled', 'factorised', 'loss_kernels', 'plain_gpt2', 'leaderboard'),
                         'it takes logits to be a table times one state')


class GPT(model.GPT):

    def build(self, config):
        super().build(config)
        self.further = nn.ModuleList(Linear(config.n_embd, config.n_embd) for _ in range(config.head_parts - 1))

    def init_weights(self):
        super().init_weights()
        for further in self.further:
            further.weight.normal_(std=0.5 / self.config.n_embd ** 0.5)

    def parts(self, x):
        """(..., C) -> (..., head_parts, C)"""
        return torch.stack([x, *(self.final(x + further(x)) for further in self.further)], dim=-2)

    def cross_entropy(self, x, targets, reduction, **extras):
        return mixed_cross_entropy(self.parts(x), self.lm_head.weight, targets, reduction)

    def logits(self, x):
        return super().logits(self.parts(x)).logsumexp(dim=-2)

    def matrices(self):
        again = [w for further in self.further for w in (further.weight, self.lm_head.weight)]
        return again + super().matrices()


class Run(train.Run):

    def shape_names(self):
        return [*super().shape_names(), 'head_parts']

    def groups(self, model):
        groups = super().groups(model)
        groups['matrices']['params'].extend(further.weight for further in model.further)
        return groups


def mixed_cross_entropy(x, weight, targets, reduction='mean'):
    """Cross-entropy in nats of targets (N,) under softmax(log sum_k e^(x_k W^T)), x (N, K, C), W (V, C).

    reduction 'mean' (differentiable) or 'none', (N,) fp32. Targets < 0 are left out; with 'none' they give 0.
    With r_k the share that part k has in its target's sum, d mean / d z_k = (e^(z_k - lse) - r_k one_hot) / n.
    """
    N, K, C = x.shape
    rows = max(1, rows_at_once(x, weight) // K)
    n = (targets >= 0).sum().clamp(min=1)

    def block(z, at):
        """z (rows K, V): all parts of a token stand side by side."""
        at = slice(at.start // K, at.stop // K)
        keep, gold = targets[at] >= 0, targets[at].clamp(min=0)[:, None, None].expand(-1, K, 1)
        z = z.view(len(keep), K, -1)
        wanted = z.gather(2, gold)
        lse, found = z.logsumexp(dim=(1, 2)), wanted.logsumexp(dim=(1, 2))
        g = z.sub_(lse[:, None, None]).exp_().scatter_add_(2, gold, -wanted.sub(found[:, None, None]).exp())
        return ((lse - found) * keep).sum(), g.mul_((keep / n)[:, None, None]).view(-1, len(weight))

    if reduction == 'mean':
        return BlockwiseLoss.apply(x.flatten(0, 1), weight, n, rows * K, block)
    w = weight.to(x.dtype)
    return torch.cat([F.cross_entropy((xs @ w.t()).float().logsumexp(1), ys, reduction='none', ignore_index=-1)
                      for xs, ys in zip(x.split(rows), targets.split(rows))])

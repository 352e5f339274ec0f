"""Weights of several linear maps in one tensor, of which a token meets some: what config/experts.py and
config/domains.py are made of. No idea of its own, and no settings.

Such weights count with what is active and with a token's FLOPs only as far as a token meets them, and Muon
treats each map by itself, one that met no token in a step not at all.
"""
import torch
import torch.nn as nn

import model
import train


class Several(nn.Linear):
    """The weights of n linear maps, (n, fan_out, fan_in), of which a token meets `active`. Not one of model's
    Linear: the optimizer of matrices has no part in it."""

    def __init__(self, n, fan_in, fan_out, active):
        super().__init__(fan_in, fan_out, bias=False)
        self.weight, self.active = nn.Parameter(torch.empty(n, fan_out, fan_in)), active


def several(modules):
    return [m for m in modules if isinstance(m, Several)]


class GPT(model.GPT):
    page = ''                # what a page computes is the baseline's

    def params(self):
        known = super().params()
        idle = sum(m.weight[m.active:].numel() for m in several(self.modules()))
        return known | dict(active=known['active'] - idle)

    def matrices(self):
        *matrices, head = super().matrices()
        return [*matrices, *(m.weight[:m.active] for m in several(self.blocks.modules())), head]


class StackMuon(train.Muon):
    """Muon for stacks of matrices: those that met no token in a step stay as they are, their momentum too."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr, momentum = group['params'], group['lr'], group['momentum']
            grad = torch.stack([p.grad for p in params])                           # (layers, n, rows, cols)
            state = self.state[params[0]]
            if 'momentum' not in state:
                state['momentum'] = torch.zeros_like(grad)
            met = grad.flatten(2).any(2)[..., None, None].to(grad.dtype)
            average = state['momentum'].lerp_(grad, (1 - momentum) * met)
            update = train.orthogonalize(grad.lerp(average, momentum).to(self.dtype)).to(grad.dtype)
            rows, cols = grad.shape[-2:]
            update *= lr * max(1, rows / cols) ** 0.5 * met
            torch._foreach_mul_(params, list((1 - lr * group['weight_decay'] * met).unbind()))
            torch._foreach_sub_(params, list(update.unbind()))


class Run(train.Run):

    def groups(self, model):
        groups, stacks = super().groups(model), [m.weight for m in several(model.blocks.modules())]
        if self.s.optimizer == 'adamw':
            groups['stacks'] = groups['matrices'] | dict(params=stacks)
        return groups

    def make_optimizers(self, model):
        made, stacks = super().make_optimizers(model), [m.weight for m in several(model.blocks.modules())]
        if stacks and self.s.optimizer == 'muon':
            made.insert(1, StackMuon(stacks, self.s.momentum, self.dtype))
            for group in made[1].param_groups:
                group.update(base_lr=self.s.learning_rate, base_decay=self.s.weight_decay)
        return made

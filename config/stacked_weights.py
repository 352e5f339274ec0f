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


def for_stacks(muon):
    """A class like Muon for stacks of matrices: those that met no token in a step stay as they are, and what is known of
    them too."""
    class StackMuon(muon):

        def direction(self, grad, state, group):
            self.met = grad.flatten(2).any(2)[..., None, None]                     # (layers, n, 1, 1)
            if 'momentum' in state:              # which moves towards itself: it stays
                grad = torch.where(self.met, grad, state['momentum'])
            known = [(t, t.clone()) for k, t in state.items() if k != 'momentum' and torch.is_tensor(t)]
            update = super().direction(grad, state, group)
            for now, then in known:
                now.copy_(torch.where(self.met, now, then))
            return update

        def move(self, params, updates, group):
            before = [p.clone() for p in params]
            super().move(params, updates, group)
            for p, then, met in zip(params, before, self.met):
                p.copy_(torch.where(met, p, then))

    return StackMuon


class Run(train.Run):

    def groups(self, model):
        groups, stacks = super().groups(model), [m.weight for m in several(model.blocks.modules())]
        if self.s.optimizer == 'adamw':
            groups['stacks'] = groups['matrices'] | dict(params=stacks)
        return groups

    def make_optimizers(self, model):
        made, stacks = super().make_optimizers(model), [m.weight for m in several(model.blocks.modules())]
        if stacks and self.s.optimizer == 'muon':
            made.insert(1, for_stacks(self.muon())(stacks, self.s.momentum, self.dtype))
            for group in made[1].param_groups:
                group.update(base_lr=self.s.learning_rate, base_decay=self.s.weight_decay)
        return made

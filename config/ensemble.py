"""Several smaller models in the place of one, trained side by side on the same batches, averaged in probability.

    torchrun train.py config/babylm_10m.py config/ensemble.py --n_embd=192 --n_head=3

What members disagree on is mostly what they learned by heart, so an average of models forgets it. Whence: Kim
2025 (2509.14786), for text that is read often: ensembles have a lower asymptote than one larger model. The
slowrun leaderboard reports 0.138 nats for eight members, 0.011 of it for averaging probabilities, not logits;
at equal parameters (20 million tokens, 25 epochs) three small models beat a wider one by 0.27. The settings are
those of a member: give n_embd so that all of them together have the parameters that you mean to pay for.
Expected: a gain where text is scarce, a loss where the model is full. What it did: of 114,000 tokens of text
read twelve times, one model of 97,328 parameters makes 2.650 bits per byte, four such 2.437, eight 2.397; one
that is as wide as seven of them 2.952, with dropout 2.691 (RESULTS.md, "Dolls"). Won where text is scarce:
config/babylm_10m.py is made of it.
"""
import math
from dataclasses import replace
from pathlib import Path

import torch

import model
import train
from prepare_data import refuse

members: int = 3            # 1..: models

NOT_WITH = dict.fromkeys(('growth', 'distillation', 'domains', 'masked', 'plain_gpt2', 'dynamics', 'experts'),
                         'it knows but one model')


class GPT(model.GPT):
    """The first member, which holds the others."""

    def build(self, config):
        super().build(config)
        alone = replace(config, members=1)
        self.others = torch.nn.ModuleList(alone.GPT(alone) for _ in range(config.members - 1))

    def asked(self):
        """The members beside the first that take part."""
        return self.others

    def trunk(self, idx, cache=None, **extras):
        """What all members make of idx, side by side: (B, T, members C)."""
        others = self.asked()
        found = [super().trunk(idx, cache, **extras)]
        for i, other in enumerate(others):
            other.compute_dtype = self.compute_dtype
            found.append(other.trunk(idx, cache and cache.part(('member', i), other), **extras))
        return torch.cat(found, dim=-1)

    def loss(self, x, targets, reduction, **extras):
        """In training the mean of the members' losses; else that of their mean probability."""
        own, *rest = x.split(self.config.n_embd, dim=-1)
        how = reduction if self.training else 'none'
        nats = torch.stack([super().loss(own, targets, how, **extras), *(
            other.loss(part, targets, how, **extras) for other, part in zip(self.others, rest))])
        if self.training:
            return nats.mean(0)
        nats = math.log(len(nats)) - (-nats).logsumexp(0)
        return nats if reduction == 'none' else nats.sum() / (targets >= 0).sum()

    def logits(self, x):
        """Logarithms of the mean probabilities."""
        own, *rest = x.split(self.config.n_embd, dim=-1)
        each = [super().logits(own), *(other.logits(part) for other, part in zip(self.others, rest))]
        return torch.stack(each).log_softmax(-1).logsumexp(0) - math.log(len(each))

    def params(self):
        counts, c = super().params(), self.config
        heads = 0 if c.tie_embeddings else len(self.others) * self.lm_head.weight.numel()
        idle = sum(n['total'] - n['active'] for n in (other.params() for other in self.others))
        return counts | dict(active=counts['active'] - idle, embedding=counts['embedding'] + heads,
                             non_embedding=counts['non_embedding'] - heads)

    def flops_per_token(self, attended=None):
        return super().flops_per_token(attended) + sum(other.flops_per_token(attended) for other in self.others)

    def describe(self):
        return f'{super().describe()}, in {self.config.members} members of this shape'


class Run(train.Run):

    def __init__(self, s, ideas):
        """Members are made of all that is named before this file."""
        super().__init__(s, ideas)
        ours = max(i for i, idea in enumerate(ideas.modules) if issubclass(getattr(idea, 'Run', object), Run))
        name, *later = [Path(idea.__file__).name for idea in ideas.modules[ours:] if hasattr(idea, 'GPT')]
        refuse(later, f'{", ".join(later)} and {name} do not go together in this order: name {name} after '
               f'{", ".join(later)}, or leave one out')

    def shape_names(self):
        return [*super().shape_names(), 'members']

    def groups(self, model):
        groups = super().groups(model)
        theirs = {id(p) for p in model.others.parameters()}
        for group in groups.values():
            group['params'] = [p for p in group['params'] if id(p) not in theirs]
        for name, group in [item for other in model.others for item in super(Run, self).groups(other).items()]:
            groups[name]['params'].extend(group['params'])
        return groups

    def rows_limit(self):
        """A micro-batch goes through all members at once, with what each keeps for its way back."""
        return max(1, super().rows_limit() // self.s.members)

    def compiled(self, model):
        """On a GPU too one program for a block: of all members' layers in one it would take minutes."""
        for one in (model, *model.others):
            self.by_block(one)
        return model

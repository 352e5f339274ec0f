"""CLIMB's objective curriculum (Diehl Martinez 2023, 2311.08886): word classes first, words later.

    torchrun train.py config/babylm.py config/climb_objective.py

A second head guesses the class of the next token's word. Guessing it is half of the loss at first and fades
to nothing over the first quarter of the run. The classes are induced from the training text
(config/word_classes.py), as BabyLM's rules ask: no tagger. The head begins at 0, no class likelier than
another; it learns at head_lr and is used in training alone. CLIMB found gains on some tasks and none overall.
What it did: +0.6 % bits per byte in ten minutes of a CPU, a fifth of an epoch, while other work took some of
the text (commit 91d7dcc; RESULTS.md). Again on shuffled rows, in a scale
model of a fifth of an epoch, three seeds: 0.4 % better, within noise (t 1.2). Neutral.
In a doll of config/tinystories.py, 3.6 readings, 0.1 % better, ends of documents taught as a class then (one seed; RESULTS.md, "Dolls").
"""
import numpy as np
import torch
import torch.nn.functional as F

import model
import train
from config.word_classes import table       # brings the setting word_classes
from model import Linear

class_loss: float = 0.5      # 0..1: share in the loss, at first, of guessing the next token's word class
class_until: float = 0.25    # 0.001..1: progress at which that has faded to nothing


class GPT(model.GPT):
    page = ''                # what a page computes is the baseline's

    def build(self, config):
        super().build(config)
        self.class_head = Linear(config.n_embd, config.word_classes + 3)       # columns of the table

    def init_weights(self):
        super().init_weights()
        self.class_head.weight.zero_()

    def loss(self, x, targets, reduction, class_of=None, class_share=None, **extras):
        """class_of: the class of every id (V,); class_share (): how much guessing it counts."""
        loss = super().loss(x, targets, reduction, **extras)
        if class_of is None:
            return loss
        guess, seen = self.class_head(x).float().flatten(0, 1), targets.flatten()
        named = torch.where(seen >= 0, class_of[seen.clamp(min=0)], -1)
        return (1 - class_share) * loss + class_share * F.cross_entropy(guess, named, ignore_index=-1)

    def params(self):
        counts = super().params()
        return counts | dict(active=counts['active'] - self.class_head.weight.numel())

    def matrices(self):
        return [self.class_head.weight, *super().matrices()]


class Run(train.Run):

    def build(self):
        super().build()
        known = table(self.data, self.s.word_classes)
        self.class_of = torch.from_numpy(np.where(known.any(1), known.argmax(1), -1)).to(self.device)     # BOS is of none

    def shape_names(self):
        return [*super().shape_names(), 'word_classes']

    def groups(self, model):
        groups = super().groups(model)
        groups['heads']['params'].append(model.class_head.weight)
        return groups

    def loss(self, idx, targets, **extras):
        share = self.s.class_loss * max(0.0, 1 - self.progress / self.s.class_until)
        return super().loss(idx, targets, class_of=self.class_of,
                            class_share=torch.full((), share, device=idx.device), **extras)

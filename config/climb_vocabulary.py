"""CLIMB's vocabulary curriculum (Diehl Martinez 2023, 2311.08886): the frequent words first.

    torchrun train.py config/babylm.py config/climb_vocabulary.py

A tenth of the ids, the most frequent, is known at first, all of them from 7/8 of the run on (pacing,
pacing_start and pacing_end, of config/climb_data.py). A rarer one stands as the tokenizer's unknown id in the
input and is left out of the loss: taught as a target, that id would be what the model learns to say. Needs a
bpe tokenizer. CLIMB found no consistent gain. What it did: +4.1 % bits per byte in ten minutes of a CPU, a
fifth of an epoch (1.6101 beside 1.5462, standard deviation 0.0020; BLiMP 0.573 beside 0.609; 2026-11-21,
commit 3f931df). Lost (RESULTS.md).
In a doll of config/tinystories.py, 3.6 readings, 2.8 % worse (one seed; RESULTS.md, "Dolls").
"""
import torch

import train
from config import frequency_bias
from config.climb_data import admitted      # brings the settings of its pacing
from prepare_data import refuse

vocabulary_floor: float = 0.1       # 0.01..1: share of the ids, most frequent first, that is known at first

NOT_WITH = dict(masked='both need the tokenizer\'s spare token',
                distillation='it teaches the rare ids that this keeps out of the loss',
                syntactic_smoothing='it puts the rare ids that this keeps out back into the loss')


class Run(train.Run):

    def build(self):
        super().build()
        data = self.data
        self.unknown = getattr(data.tokenizer, 'unk', None)
        refuse(self.unknown is None, f'vocabulary_floor needs an id for what is not known, and tokenizer '
               f'{self.s.tokenizer} has none: use bpe')
        self.ranks = ranks(data.tokens['train'], data.meta['vocab_size']).to(self.device)

    def loss(self, idx, targets, **extras):
        n = admitted(self.progress, self.s, self.s.vocabulary_floor) * len(self.ranks)
        return super().loss(*known(idx, targets, self.ranks, n, self.config.bos, self.unknown), **extras)


def ranks(tokens, vocab_size):
    """(V,): the place of every id among all, the most frequent first."""
    return torch.from_numpy((-frequency_bias.frequencies(tokens, vocab_size)).argsort(kind='stable').argsort())


def known(idx, targets, rank, n, bos, unknown):
    """idx and targets without ids of rank n and above: unknown in the input, and no target.

    What a document begins with is always known, and -1 is no id.
    """
    return (torch.where((rank[idx] < n) | (idx == bos), idx, unknown),
            torch.where((rank[targets.clamp(min=0)] < n) & (targets >= 0), targets, -1))

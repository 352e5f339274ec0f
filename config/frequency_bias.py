"""How much a judgement goes by how frequent the tokens are, and how narrow a cone the hidden states fill.

    torchrun train.py config/babylm.py config/frequency_bias.py
    python sample.py out/babylm config/frequency_bias.py --eval=blimp,anisotropy

Both are what syntactic smoothing is about (Diehl Martinez 2024, 2410.11462). Frequency bias comes with every
evaluation set of pairs: accuracy where the good sentence has the more frequent tokens, less accuracy where
the bad one has. Anisotropy is the mean cosine between hidden states at random places of two random documents,
after every layer: 0 where directions are used evenly, 1 where all point one way (Ethayarajh 2019,
1909.00512).
"""
import functools
from collections import Counter

import numpy as np
import torch

import sample
from prepare_data import UserError


class Measure(sample.Measure):
    def known(self):
        return super().known() | dict(anisotropy=self.anisotropy)

    @functools.cached_property
    def often(self):
        """(V,): how often each id stands in the training text."""
        return frequencies(self.data.tokens['train'], self.tokenizer.vocab_size)

    def verdict(self, cost, items):
        pairs = self.data and len(items['item']) == 2 * len(items['seam'])
        return super().verdict(cost, items) | (frequency_bias(cost, items, self.often) if pairs else {})

    def anisotropy(self, model, n=0, stop=None):
        if self.data is None:
            raise UserError('anisotropy, as the data of the run is not there')
        return dict(per_layer=anisotropy(model, self.data.tokens['val'], self.data.docs['val']))

    def lines(self, name, result):
        yield from super().lines(name, result)
        if 'frequency_bias' in result:
            yield (f'  frequency_bias {result["frequency_bias"]:.4f}, on the {result["replaced"]:,} pairs '
                   f'that differ in a replacement')


def frequencies(tokens, vocab_size):
    """How often each id stands in a split."""
    return sum(np.bincount(tokens[i:i + 2 ** 24], minlength=vocab_size)
               for i in range(0, len(tokens), 2 ** 24))


def frequency_bias(cost, items, counts):
    """Accuracy where the good sentence has the more frequent tokens, less accuracy where the bad one has.

    Of the pairs that differ in a replacement: thirds by mean log-count of the tokens that only the good one
    has less that of the tokens that only the bad one has. cost: of Measure.option_costs; counts (V,): of the
    training text. Returns it and `replaced`, how many pairs differ so.
    """
    log, rows, start = np.log(counts + 1.0), [], items['start']
    for i in range(0, len(cost), 2):
        mine, other = (Counter(items['ids'][start[j]:start[j + 1]].tolist()) for j in (i, i + 1))
        mine, other = list((mine - other).elements()), list((other - mine).elements())
        if mine and other:
            rows.append((log[mine].mean() - log[other].mean(), cost[i] < cost[i + 1]))
    delta, right = np.array(rows, float).reshape(-1, 2).T
    if not len(delta):
        return dict(frequency_bias=0.0, replaced=0)
    low, high = np.quantile(delta, [1 / 3, 2 / 3])
    return dict(frequency_bias=float(right[delta >= high].mean() - right[delta <= low].mean()),
                replaced=len(delta))


@torch.no_grad()
def anisotropy(model, tokens, docs, n_pairs=1000, length=64):
    """The mean cosine above, a number a layer. tokens, docs: a split of prepare_data.open_data."""
    dice, length = np.random.default_rng(0), min(length, model.config.block_size)
    starts, ends = docs['start'], np.append(docs['start'][1:], len(tokens))
    some = dice.permutation(len(docs))[:256]
    idx = np.zeros((len(some), length), np.int64) + model.config.bos
    for row, doc in zip(idx, some):
        text = tokens[starts[doc]:min(ends[doc], starts[doc] + length)]
        row[:len(text)] = text
    a, b = dice.integers(len(some), size=(2, n_pairs))
    b = np.where(a == b, (b + 1) % len(some), b)
    sizes = np.minimum(ends - starts, length)[some]
    at = [(1 + dice.random(n_pairs) * (sizes[rows] - 1)).astype(int).clip(max=length - 1) for rows in (a, b)]
    states, hooks = [], [block.register_forward_hook(lambda _, __, out: states.append(out))
                         for block in model.blocks]
    try:
        model.trunk(torch.from_numpy(idx).to(model.wte.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cosine_similarity(x[a, at[0]].float(), x[b, at[1]].float(), dim=-1).mean().item()
            for x in states]

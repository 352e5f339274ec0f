"""Masked inputs as a second loss: every row is read once more with some of its tokens hidden, and predicts
the same next tokens.

    python train.py config/babylm.py config/masked_inputs.py

Whence: MIR (2026, 2606.08886), which finds it worth 1.3 times the text at every size where 100 to 400 million
tokens are read 16 to 64 times. Of each row a share of up to `hidden`, drawn anew, is hidden. It costs a
second pass, so half the tokens of a fixed time. Needs a bpe tokenizer, whose unknown token stands for what is
hidden. train_loss is the mean of both. Expected: better by the token where text is read often, less so by the
clock. What it did: 2.1013 bits per byte beside 2.0949 and 2.0936 (seeds 1, 2) in a doll of config/babylm.py's
half hour, twelve epochs (RESULTS.md, "Dolls"): 0.3 % worse, at twice the cost, one seed. Lost there; where
text is scarcer it has not been measured to the end.
"""
import torch

import train
from prepare_data import refuse

masked_inputs: float = 0.4  # 0..: weight of the second loss beside the first
hidden: float = 0.5         # 0..1: the largest share of a row's tokens that is hidden


class Run(train.Run):

    def build(self):
        super().build()
        self.unknown = getattr(self.data.tokenizer, 'unk', None)
        refuse(self.unknown is None, f'masked_inputs needs a token to hide others with, and tokenizer '
               f'{self.s.tokenizer} has none: take bpe')

    def batch_loss(self, idx, targets, **extras):
        weight, device = self.s.masked_inputs, idx.device
        share = self.s.hidden * torch.rand(len(idx), 1, device=device)
        hide = (torch.rand(idx.shape, device=device) < share) & (idx != self.config.bos)
        first = super().batch_loss(idx=idx, targets=targets, **extras)
        again = super().batch_loss(idx=idx.masked_fill(hide, self.unknown), targets=targets, **extras)
        return (first + weight * again) / (1 + weight)

    def arithmetic(self):
        return 2 * super().arithmetic()

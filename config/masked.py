"""GPT-BERT (Charpentier 2024, 2410.24159): some rows fill in masked tokens, reading both ways; the rest
predict the next one.

    torchrun train.py config/babylm.py config/masked.py

The winner of BabyLM 2024. A masked token is predicted from the position before it, so that both kinds of row
ask the same of the same head. 30 % of the tokens are hidden at first, 15 % in the end. Hidden ones are the
only ones that count there, so such a row teaches on fewer tokens, and its attention runs in PyTorch, not in
the kernels. Needs a bpe tokenizer, whose unknown token is the mask. train_loss is the mixture. What else
changes the loss, in the same run, changes that of the other rows. Expected: helps where text is read many
times, costs in a first epoch. What it did: +5.2 % bits per byte in ten minutes of a CPU, a fifth of an epoch,
on 11 % less text (1.6260 beside 1.5462, standard deviation 0.0020; 2026-11-21, commit 3f931df). Lost in a
first epoch (RESULTS.md).
In a doll of config/tinystories.py, 3.6 readings, 7.9 % worse (one seed; RESULTS.md, "Dolls").
"""
import torch

import model
import train
from prepare_data import refuse

masked: float = 0.25        # 0..1: share of a micro-batch's rows that fill in masked tokens, seeing both ways


class GPT(model.GPT):

    def visible(self, idx, past=0, cache=None, two_way=False, **extras):
        """two_way looks ahead as well: who is seen from there is seen from here. No kernel does that."""
        if not two_way:
            return super().visible(idx, past, cache, **extras)
        first = self.first_visible(idx)
        seen = torch.arange(idx.shape[1], device=idx.device) >= first[:, :, None]
        return seen & seen.mT, None


class Run(train.Run):

    def build(self):
        super().build()
        self.mask = getattr(self.data.tokenizer, 'unk', None)
        refuse(self.mask is None, f'masked needs a token to mask with, and tokenizer {self.s.tokenizer} has none: '
               f'take bpe')
        self.share_rows()

    def halved(self, batch):
        batch = super().halved(batch)
        self.share_rows()
        return batch

    def share_rows(self):
        s, micro = self.s, self.micro
        self.two_way = round(s.masked * micro)
        refuse(not 0 < self.two_way < micro,
               f'masked {s.masked:g} is {self.two_way} of the {micro} rows of a micro-batch, and both kinds '
               f'must have some: change it or micro_batch_size')

    def arithmetic(self):
        """A row that is read both ways attends to whole documents: twice the mean of the others, less one."""
        count, seen = self.model.flops_per_token, self.model.attended(self.read_rows())
        return super().arithmetic() + self.two_way / self.micro * (count(2 * seen - 1) - count(seen))

    def batch_loss(self, idx, targets, **extras):
        """The first rows predict hidden tokens, each from the position before it, as the other rows do."""
        n, share = self.two_way * len(idx) // self.micro, self.two_way / self.micro      # rows may come in pieces
        rows = idx[:n]
        hidden = torch.rand(rows.shape, device=idx.device) < 0.3 - 0.15 * self.progress
        hidden &= rows != self.config.bos
        next_hidden = hidden.roll(-1, 1)
        next_hidden[:, -1] = False
        guessed = targets[:n].masked_fill(~next_hidden, -1)
        filled_in = self.step_model(rows.masked_fill(hidden, self.mask), guessed, two_way=True, **extras)
        others = super().batch_loss(idx=idx[n:], targets=targets[n:], **extras)
        return share * filled_in + (1 - share) * others

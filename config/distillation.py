"""Distillation (Hinton 2015, 1503.02531): half of the loss is to guess as an earlier run does.

    torchrun train.py config/babylm.py --out_dir=out/teacher
    torchrun train.py config/babylm.py config/distillation.py

BabyLlama's recipe (Timiryasov 2023, 2308.02019): half cross-entropy, half divergence from the teacher, both
softened at a temperature of 2. There two teachers' logits were averaged, and the student beat both; Kim 2025
(2509.14786): a student 8 times smaller keeps 83 % of what an ensemble gains. The teacher may be of any shape
and of other ideas; it needs the same vocabulary, and its own half-hour is not on this run's bill; its forward
pass is, so the student sees less text (FLOPs and MFU do not count it). train_loss is the mixture. Expected:
better where text is read many times. What it did: +1.1 % bits per byte in ten minutes of a CPU, a fifth of an
epoch, on 56 % of the text (1.5637 beside 1.5462, standard deviation 0.0020; 2026-11-21, commit 12bc805). Lost
in a first epoch (RESULTS.md).
"""
from pathlib import Path

import torch

import model as models
import sample
import train
from model import BlockwiseLoss, kernels_named
from prepare_data import refuse

teacher: str = 'out/teacher'        # the folder of a run whose guesses to learn too
teacher_weight: float = 0.5         # 0..1: share of the loss that comes from the teacher
teacher_temperature: float = 2.0    # 0.01..: divides both models' logits: higher is flatter


class GPT(models.GPT):
    page = ''                # what a page computes is the baseline's

    def loss(self, x, targets, reduction, hidden=None, logits=None, **extras):
        """hidden (B T, C'): the teacher's last hidden states; logits: what makes its logits of them."""
        loss = super().loss(x, targets, reduction, **extras)
        return loss if hidden is None else taught(self, loss, x, targets, hidden, logits)


class Run(train.Run):

    def build(self):
        s = self.s
        refuse(Path(s.teacher).resolve() == self.out_dir.resolve(),
               f'teacher {s.teacher} is where this run goes: choose another --out_dir')
        super().build()
        self.teacher, tokenizer = sample.load(s.teacher, self.device, here=self.ideas.files)
        self.teacher.compute_dtype, c = self.dtype, self.teacher.config
        self.same_vocabulary(tokenizer, f'teacher {s.teacher}')
        refuse(getattr(c, 'domains', ''), f'teacher {s.teacher} has domains, and nothing tells it which: '
               f'choose a plain one')
        refuse(c.block_size < s.block_size, f'teacher {s.teacher} reads {c.block_size} tokens at most: lower '
               f'block_size (now {s.block_size})')
        kernel = self.device == 'cuda' and 'attention' in kernels_named(s.kernels)
        refuse(kernel and c.head_dim not in (16, 32, 64, 128),
               f'teacher {s.teacher} has heads of {c.head_dim}, which no kernel takes: say '
               f'--kernels=-attention')

    def loss(self, idx, targets, **extras):
        with torch.no_grad():
            hidden = self.teacher.trunk(idx).flatten(0, 1)
        return super().loss(idx, targets, hidden=hidden, logits=self.teacher.logits, **extras)


def taught(model, loss, x, targets, hidden, logits):
    """A model's loss mixed with how far what it guesses of x (B, T, C) is from what a teacher does."""
    c, cap = model.config, getattr(model.config, 'logit_softcap', 0.0)
    apart = divergence(x.flatten(0, 1), model.lm_head.weight, targets.flatten(), c.teacher_temperature, hidden,
                       logits, cap)
    return (1 - c.teacher_weight) * loss + c.teacher_weight * apart


def divergence(x, weight, targets, temperature, hidden, logits, cap=0.0, rows=None):
    """Temperature^2 KL(teacher || student), both softmax(logits / temperature), the mean over targets >= 0.

    The student's logits are those of x (N, C) under weight (V, C) and a soft cap, the teacher's are
    logits(hidden). A block of rows at a time: d loss / d logits = temperature (student - teacher) / n.
    """
    share = (temperature * (targets >= 0) / (targets >= 0).sum().clamp(min=1))[:, None]

    def block(z, at):
        z = cap * torch.tanh(z / cap) if cap else z
        part, log_q = share[at], (z / temperature).log_softmax(-1)
        log_p = (logits(hidden[at]) / temperature).log_softmax(-1)
        p = log_p.exp()
        loss = temperature * (part * p * (log_p - log_q)).sum()
        g = part * (log_q.exp() - p)
        return loss, g * (1 - (z / cap).square()) if cap else g

    return BlockwiseLoss.apply(x, weight, 1, rows or (2048 if x.is_cuda else 256), block)

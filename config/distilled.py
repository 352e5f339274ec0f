"""An ensemble becomes one model within its run: the members learn, then teach one of their shape.

    torchrun train.py config/babylm_10m.py config/distilled.py

Until `distil_from` of progress it is config/ensemble.py, its rate all the way down. Then one model of a member's
shape, which begins as the first member ended, learns of the text and of the members' mean probability, as in
config/distillation.py, on the same bill; that one is saved and measured. Whence: Kim 2025 (2509.14786): a student
keeps most of what an ensemble gains; Hinton 2015 (1503.02531). Expected: where text is scarce, between one model
and the ensemble, at the parameters of one. What it did: of 114,000 tokens of text, read twelve times by four members
of 97,328 parameters, then twelve times by the one, 2.493, 2.491, 2.511 bits per byte (three seeds); one such model
alone at best 2.650, 2.638, 2.626, the four together 2.437 (one seed; RESULTS.md, "Dolls"). Kept: where text is
scarce, the best of one model's size.
"""
from dataclasses import replace

import torch

from config import ensemble, refuse
from config.distillation import taught

distil_from: float = 0.5    # 0.01..0.99: of progress, from which on the members teach

NOT_WITH = ensemble.NOT_WITH | dict.fromkeys(('snapshots', 'best_weights', 'cyclic_average', 'ema'),
                                             'it goes on with another model') | dict(
    factorised='it takes a table to be as wide as the layers', layer_loop='what teaches would loop otherwise than it did',
    instruct='what it goes on from is one model, that was taught already')


class GPT(ensemble.GPT):

    def loss(self, x, targets, reduction, hidden=None, logits=None, **extras):
        """hidden: the members' last hidden states; logits: what makes their logits of them."""
        loss = super().loss(x, targets, reduction, **extras)
        return loss if hidden is None else taught(self, loss, x, targets, hidden, logits)


class Run(ensemble.Run):
    teacher = None

    def shape_from(self, before):
        config = super().shape_from(before)
        refuse(config.members < 2, f'{self.s.init_from} is of one model, that an ensemble taught: begin with an ensemble\'s run, '
               f'or one without members')
        return config

    def largest(self):
        return replace(self.config, members=self.s.members)

    def dearer(self):
        """One is asked in the end, all members until they teach."""
        return super().dearer() / (1 if self.teacher else self.s.members)

    def rate(self, progress):
        """The whole schedule twice: of the members, of the one."""
        at = self.s.distil_from
        return super().rate(progress / at if progress < at else (progress - at) / (1 - at))

    def time_left(self):
        while super().time_left():
            if self.teacher or self.progress < self.s.distil_from:
                return True
            self.begin_to_teach()                # that took time: once more
        return False

    def begin_to_teach(self):
        """Goes on with one model, which the members teach."""
        members, self.clock.progress = self.model, self.progress
        with self.busy('compile'):
            one = self.new_model(replace(self.config, members=1))
            one.load_state_dict({name: w for name, w in members.state_dict().items() if name in one.state_dict()})
            self.take_model(one)
            self.taught_by(members)
            self.get_going()
        self.say(f'         taught by {self.s.members} members: {self.model.describe()}')

    def taught_by(self, members):
        self.teacher = members.eval().requires_grad_(False)

    def arithmetic(self):
        """The members' forward pass too."""
        taught = self.teacher.flops_per_token(self.model.attended(self.read_rows())) / 3 if self.teacher else 0
        return super().arithmetic() + taught

    def loss(self, idx, targets, **extras):
        if self.teacher is None:
            return super().loss(idx, targets, **extras)
        with torch.no_grad():
            hidden = self.teacher.trunk(idx, **extras).flatten(0, 1)
        return super().loss(idx, targets, hidden=hidden, logits=self.teacher.logits, **extras)

    def state(self):
        return super().state() | dict(teacher=self.teacher and self.teacher.state_dict())

    def load(self, state):
        super().load(state)
        if state['teacher']:
            members = self.new_model(self.largest())
            members.load_state_dict(state['teacher'])
            self.taught_by(members)

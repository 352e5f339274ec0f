"""One run, asked at the ends of several cycles of the learning rate, all of them averaged in probability.

    torchrun train.py config/babylm.py config/snapshots.py

Whence: snapshot ensembles (Huang 2017, 1704.00109): what config/ensemble.py pays for with several trainings,
for the price of one. The first cycles' ends are kept beside the model, which goes on; together they answer, and
together they are counted as parameters. cyclic_average.py averages the same weights. Expected: half of what an
ensemble of as many gains where text is scarce, nothing where the model is full. What it did: of 114,000 tokens of
text read 24 times by 97,328 parameters, four cycles of six epochs end at 2.516, 2.531, 2.527 bits per byte (three
seeds); one model at best 2.650, 2.638, 2.626 (twelve epochs, half the arithmetic), four members 2.437 (twice the
arithmetic; one seed; RESULTS.md, "Dolls"). Kept: where text is scarce, the most for the least arithmetic.
"""
import torch

from config import cyclic_average, ensemble, refuse

cycles = 4
cycles_from = 0.0
members = cycles

NOT_WITH = ensemble.NOT_WITH | dict.fromkeys(
    ('ema', 'best_weights', 'cyclic_average', 'ensemble'), 'both say what is measured') | dict(
    leaderboard='both say how the rate falls')


class GPT(ensemble.GPT):
    """The model as it is trained, which holds what it was at the end of each cycle before."""

    def build(self, config):
        super().build(config)
        self.others.requires_grad_(False)
        self.register_buffer('taken', torch.zeros((), dtype=torch.long))

    def asked(self):
        return () if self.training else self.others[:int(self.taken)]

    def flops_per_token(self, attended=None):
        return super(ensemble.GPT, self).flops_per_token(attended)


class Run(cyclic_average.Cycling, ensemble.Run):

    def __init__(self, s, ideas):
        super().__init__(s, ideas)
        refuse(s.members != s.cycles, f'cycles is {s.cycles} and members {s.members}: a member is the end of a cycle, give '
               f'both the same')

    def take_in(self):
        """Keeps the weights as they are; those of the last cycle are the model's own."""
        model, taken = self.model, int(self.model.taken)
        if taken < len(model.others):
            model.others[taken].load_state_dict({name: w for name, w in model.state_dict().items()
                                                 if name in model.others[taken].state_dict()})
            model.taken += 1

    def start_from(self, before):
        """Of another run of this kind its last weights; what it kept is not this run's."""
        super().start_from(before)
        self.model.taken.zero_()

    def dearer(self):
        """In the end all of them are asked."""
        return super().dearer() * self.s.members / (1 + int(self.model.taken))

    def groups(self, model):
        return super(ensemble.Run, self).groups(model)

    def rows_limit(self):
        return super(ensemble.Run, self).rows_limit()

    def compiled(self, model):
        return super(ensemble.Run, self).compiled(model)

    def results(self, *found):
        return super().results(*found) | dict(snapshots=1 + int(self.model.taken))

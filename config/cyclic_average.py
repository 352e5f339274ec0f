"""Averages the weights of the ends of several cycles of the learning rate, and keeps the average.

    torchrun train.py config/babylm.py config/cyclic_average.py

The last part of a run goes down not once but `cycles` times, each from the full rate to `cycle_low` of it; the
weights at the end of each are averaged (Izmailov 2018, 1803.05407). For text that is read often: the slowrun
leaderboard (100 million tokens, sixteen epochs) reports of one run 3.4176 nats as it ended, 3.3694 of its
exponential average and 3.3456 of such an average of the last epochs. Expected: in a first epoch a loss.
What it did: 2.630 bits per byte after 24 epochs beside 2.638 (mean of three seeds) after the base's best twelve,
in a doll of little text (RESULTS.md, "Dolls"), one seed, at twice the arithmetic. Even.
"""
import torch

import train

cycles: int = 5             # 1..: of the learning rate
cycles_from: float = 0.5    # 0..0.99: of progress, the first begins
cycle_low: float = 0.05     # 0..1: of the learning rate, at a cycle's end

NOT_WITH = dict.fromkeys(('ema', 'best_weights'), 'both say which weights are measured')


class Cycling(train.Run):
    """A run whose rate goes down in cycles, and which takes in the weights at the end of each."""

    def cycle(self, progress):
        """Cycles that are done, and how far the one is that runs."""
        at = self.s.cycles * max(0.0, progress - self.s.cycles_from) / (1 - self.s.cycles_from)
        done = int(at + 1e-9)                    # a hair before its end a cycle is done
        return done, max(0.0, at - done)

    def rate(self, progress):
        """Up as ever, level, then a linear fall in each cycle."""
        s = self.s
        rise = 0.1 + 0.9 * progress / s.warmup_frac if progress < s.warmup_frac else 1.0
        return rise * (1 - (1 - s.cycle_low) * self.cycle(progress)[1])

    def step(self):
        before = self.cycle(self.progress)[0]
        super().step()
        if self.cycle(self.agreed(self.clock.progress))[0] > before:
            self.take_in()


class Run(Cycling):

    def take_model(self, model):
        """A model of another shape begins anew."""
        super().take_model(model)
        self.average, self.averaged, self.too_soon = None, 0, False

    def take_in(self):
        """Draws the average to the weights as they are, one more of those that count alike."""
        now = self.model.state_dict()
        if self.average is None:
            self.average = {name: w.clone() for name, w in now.items()}
        self.averaged += 1
        torch._foreach_lerp_(list(self.average.values()), list(now.values()), 1 / self.averaged)

    def state(self):
        return super().state() | dict(evaluated=self.average, averaged=self.averaged, too_soon=self.too_soon)

    def load(self, state):
        super().load(state)
        self.averaged = n = state['averaged']
        self.average = state['evaluated'] and {k: w.to(self.device) for k, w in state['evaluated'].items()}
        if state['too_soon']:                      # stopped in its closing evaluation, it may go on after all
            self.averaged, now = n - 1, self.model.state_dict()
            self.average = {k: (n * w - now[k]) / (n - 1) for k, w in self.average.items()} if n > 1 else None

    def finish(self):
        done = self.cycle(self.agreed(self.clock.progress))[0]
        if not self.stopping and (self.average is None or done < self.s.cycles):
            self.take_in()                      # a clock ends the last cycle a step early
            self.too_soon = True
        super().finish()

    def closing_evaluation(self):
        self.model.load_state_dict(self.average)
        return super().closing_evaluation()

    def results(self, *found):
        return super().results(*found) | dict(averaged=self.averaged)

"""Evaluates and keeps a running average of the weights: the tail of training, not its last step.

    torchrun train.py config/babylm.py config/ema.py

An exponential average over about 2 % of progress, by the clock, so that it is the same at every speed.
Averaging does what a falling learning rate does (Haegele 2024, 2405.18392): where the rate falls to 0, as it
does without this file, the last steps stand almost still and the average is the last step. So the rate falls
later and only to a third here. Slowrun's leaderboard (many epochs) reports 0.012 nats from EMA, nanochat (one
epoch) a loss. Intermediate evaluations are of the raw weights. What it did: +1.4 % bits per byte in ten
minutes of a CPU on which other work took some of the tokens (one seed, commit 91d7dcc). Lost there
(RESULTS.md). In a doll of the half hour (RESULTS.md, "Dolls"), twelve epochs: 2.1000 beside 2.0949, 0.2 %
worse. On shuffled rows, in a scale model of a fifth of an epoch, three seeds: 0.5 % worse, within noise (t 2.2).
In a doll of config/tinystories.py, 3.6 readings, 1.0 % worse (one seed; RESULTS.md, "Dolls").
"""
import math

import torch

import train

ema: float = 0.02           # 0.0001..1: share of progress after which a weight counts 1 / e of what is now
cooldown_frac = 0.4
final_lr_frac = 0.3


class Run(train.Run):

    def take_model(self, model):
        super().take_model(model)
        self.average_anew()

    def start_from(self, before):
        super().start_from(before)
        self.average_anew()

    def average_anew(self):
        self.average = {name: w.clone() for name, w in self.model.state_dict().items()}
        self.averaged_to = self.progress

    def time_left(self):
        go = super().time_left()
        self.follow()
        return go

    def follow(self):
        """Draws the average to the weights: what is `ema` of progress ago counts 1 / e of what is now."""
        weight = -math.expm1((self.averaged_to - self.progress) / self.s.ema)
        torch._foreach_lerp_(list(self.average.values()), list(self.model.state_dict().values()), weight)
        self.averaged_to = self.progress

    def state(self):
        return super().state() | dict(evaluated=self.average, averaged_to=self.averaged_to)

    def load(self, state):
        super().load(state)
        self.average = {name: w.to(self.device) for name, w in state['evaluated'].items()}
        self.averaged_to = state['averaged_to']

    def closing_evaluation(self):
        self.model.load_state_dict(self.average)
        return super().closing_evaluation()

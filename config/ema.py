"""Evaluates and keeps a running average of the weights: the tail of training, not its last step.

    torchrun train.py config/babylm.py config/ema.py

An exponential average over about 2 % of progress, by the clock, so that it is the same at every speed.
Averaging does what a falling learning rate does (Haegele 2024, 2405.18392): where the rate falls to 0, as it
does without this file, the last steps stand almost still and the average is the last step. So the rate falls
later and only to a third here. Slowrun's leaderboard (many epochs) reports 0.012 nats from EMA, nanochat (one
epoch) a loss. Intermediate evaluations are of the raw weights. A first look stands in the README.
"""
ema = 0.02
cooldown_frac = 0.4
final_lr_frac = 0.3

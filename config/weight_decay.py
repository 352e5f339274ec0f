"""Eight times the usual weight decay, that falls and rises again, for text that is read many times.

    torchrun train.py config/babylm.py config/weight_decay.py

The slowrun leaderboard's schedule (100 million tokens, fifteen epochs; reported 0.009 nats better): 0.8, down
to 0.1 half-way, up to 0.93. Kim 2025 (2509.14786) finds the best decay of repeated text some thirty times the
usual 0.1, at a constant factor: weight_decay = 3.0 and weight_decay_points = [(0, 1), (1, 1)]. In a first
epoch a decay that falls to 0, the default, is the better one (nanochat), and so it was in ten minutes here
(README).
"""
weight_decay = 0.8
weight_decay_points = [(0, 1), (0.5, 0.1 / 0.8), (1, 0.93 / 0.8)]

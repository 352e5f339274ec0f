"""Dropout (Srivastava 2014) of what every attention and MLP adds to the residual stream.

    torchrun train.py config/babylm.py config/dropout.py

For text that is read many times: in half an hour of a card BabyLM's 10 million words may come round some
fifty times, 100 million five (estimated). The slowrun leaderboard (100 million tokens, fifteen epochs) trains
with 0.1. In a first epoch it only costs capacity. Expected: worse on large text, better from ten epochs or so
on. A first look stands in the README.
"""
dropout = 0.1

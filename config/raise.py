"""Raise a model: it grows as its text gets harder, stage by stage.

    torchrun train.py config/babylm.py config/raise.py

Three sizes, four helpings of text: half as wide and half as deep on the easiest quarter, full depth on half,
full width on three quarters and, for the last quarter of the run, on all of it. Growth is HyperCloning's
(Samragh 2024, 2409.12903), with layers that do nothing at first; the curriculum is CLIMB's (2311.08886).
config/hypercloning.py and config/climb_data.py are near the two halves of the idea, with a pacing of their
own. Expected: twice the text, hardly a gain; what it did: +5.9 % bits a byte beside the
base in ten minutes of a CPU, on 47 % more text (1.6381 beside 1.5462, standard deviation 0.0020; 2026-11-21,
commit 3f931df). Lost there (RESULTS.md).
"""
from config.climb_data import Stream
from config.growth import GPT, Run

NOT_WITH = {'hypercloning': 'both say how the model grows'}

curriculum = 'bigram'
pacing = 'step'                     # at a quarter, a half and three quarters of the way from start to end
pacing_floor = 0.25
pacing_start = 0.0
pacing_end = 1.0
head_dim = n_embd // n_head // 2
growth = [(0.25, dict(n_layer=n_layer)), (0.5, dict(n_embd=n_embd))]
n_embd = n_embd // 2
mlp_hidden = mlp_hidden // 2
n_layer = (n_layer + 1) // 2

"""HyperCloning (Samragh 2024, 2409.12903): half as wide at first, twice that from a third of the run on.

    torchrun train.py config/babylm.py config/hypercloning.py

The wide model begins by computing exactly what the narrow one had learned, with noise that cancels so that
its copies can learn different things (config/growth.py). Heads are half as wide here, so that the final model
has the parameters of the one it is stacked on (with SwiGLU, whose half is rounded up, 2 % more) and twice its
heads. Narrow steps are cheap: the same clock sees more text. Reported: 2 to 4 times faster to the same accuracy,
the small model's cost not counted; here it is counted. What it did: 0.7 % more bits a byte than the base in ten
minutes of a CPU, on 21 % more text (1.5577 beside 1.5462, standard deviation 0.0020; 2026-11-21, commit 3f931df). Lost there; by the token in a doll of
TinyStories 1.5839 beside 1.5767, 0.5 % worse (RESULTS.md).
"""
from config.growth import GPT, Run

head_dim = n_embd // n_head // 2
growth = [(0.33, dict(n_embd=n_embd))]
n_embd = n_embd // 2
mlp_hidden = mlp_hidden // 2

"""The rival of config/domains.py and config/experts.py: a plain model of as many parameters in all as either
(of six domains).

    torchrun train.py config/babylm.py config/wide.py

Every MLP is nine times as wide as the model, not four. A token then meets all of them, so a step costs more.
In studies below 25M parameters such a model beat a mixture of as many (2605.13769). Expected: better by the
step, worse by the clock. What it did: +1.0 % bits per byte in ten minutes of a CPU, on 80 % of the base's
text (1.5619 beside 1.5462, standard deviation 0.0020; 2026-11-21, commit 3f931df); by the step, at 300,000
tokens, 2.183 beside 2.191. Lost (RESULTS.md).
"""
mlp_hidden = 9 * n_embd

"""The rival of config/domains.py and config/experts.py: a plain model of as many parameters in all as either
(of six domains).

    torchrun train.py config/babylm.py config/wide.py

Every MLP is nine times as wide as the model, not four. A token then meets all of them, so a step costs more.
In studies below 25M parameters such a model beat a mixture of as many (2605.13769). Expected: better by the
step, worse by the clock; what happened stands in the README.
"""
mlp_hidden = 9 * n_embd

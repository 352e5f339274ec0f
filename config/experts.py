"""A mixture of experts (DeepSeek-V3, 2412.19437): a shared MLP, and three of eight more for each token.

    torchrun train.py config/babylm.py config/experts.py

Each is as wide as the model, so that a token costs what it does in the plain one, and all nine hold as much
as six domains of config/domains.py. Which experts is a token's own affinity and a bias that keeps the load
even, without a loss; no token is dropped. Expected: better by the step, and worse by the clock (nanochat's
log), as a small matrix product each is slower than one large. A first look stands in the README.
"""
experts = 8
experts_top = 3
balance_lr = 0.01

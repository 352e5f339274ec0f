"""BabyLM in thirty minutes on one RTX 4090: 11.2M parameters, three quarters of them in the layers.

Sized after the published half-hour leaderboard, whose BabyLM rows have 10.6M to 11.0M parameters. Seven
layers 320 wide with a tied head put more of the total to work on every token than wider tables would. Not yet
measured on a 4090; what it does on a CPU stands in the README.
"""
dataset = 'babylm'
n_layer = 7
n_head = 5
n_embd = 320
block_size = 512
tie_embeddings = True
tokens_per_step = 131072
micro_batch_size = 128
evals = 'all'                       # what is in data/eval; BLiMP is fetched to it if there is no such folder

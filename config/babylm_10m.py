"""BabyLM's ten million words in thirty minutes on one RTX 4090: the model of config/babylm.py, over a hundred
epochs.

    torchrun train.py config/babylm_10m.py

Here text is what is scarce: 1.2 tokens of it for each parameter. What scale models at these ratios say
(bench_mfu.py --doll) stands in RESULTS.md. Not yet measured on a 4090.
"""
from config.babylm import Corpus, Measure

dataset = 'babylm_2026'
n_layer = 7
n_head = 5
n_embd = 320
block_size = 512
tie_embeddings = True
tokens_per_step = 131072
micro_batch_size = 128
evals = 'all'                       # what is in data/eval; BLiMP is fetched to it if there is no such folder

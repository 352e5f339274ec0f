"""BabyLM's ten million words in thirty minutes on one RTX 4090: eight models of config/babylm.py's shape side by
side, averaged in probability; 90M parameters in all.

    torchrun train.py config/babylm_10m.py
    torchrun train.py config/babylm_10m.py --members=1 --max_tokens=157000000      one of them, its twelve epochs

Here text is what is scarce, 1.2 tokens of it for each parameter of one model, which would read it 120 times
and know it by heart. Eight read it fifteen times. That is what scale models say at these ratios (RESULTS.md,
"Dolls"). Not yet measured on a 4090.
"""
from config.babylm import Corpus, Measure
from config.ensemble import GPT, Run

dataset = 'babylm_2026'
members = 8
n_layer = 7
n_head = 5
n_embd = 320
block_size = 512
tie_embeddings = True
tokens_per_step = 131072
micro_batch_size = 128
evals = 'all'                       # what is in data/eval; BLiMP is fetched to it if there is no such folder

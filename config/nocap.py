"""The best model under 100M parameters for the text of config/babylm.py: 42M, where compute is what is scarce.

    torchrun train.py config/nocap.py

Twelve layers 512 wide. If a 4090 reaches 45 % of its peak, thirty minutes read some ten tokens a parameter,
three epochs. In a doll of it (RESULTS.md, "Dolls") half and almost twice its size, at equal FLOPs, are 1.0 and
0.5 % worse, half and twice its rate 0.6 and 0.8 %, half and twice its batch 0.8 and 0.2 %. Not yet measured on
a 4090. config/experts.py with --experts=12 fills the 100M at as many FLOPs and is 2.4 % better in that doll; on a card
it has yet to show that it gains more than it costs.
"""
from config.babylm import Corpus, Measure

dataset = 'babylm_2026_100m'
n_layer = 12
n_head = 8
n_embd = 512
block_size = 512
tie_embeddings = True
tokens_per_step = 131072
micro_batch_size = 64
evals = 'all'                       # what is in data/eval; BLiMP is fetched to it if there is no such folder

"""Swedish in thirty minutes on one RTX 4090: the shape of babylm.py on Swedish Wikipedia, or on your own
folder of Swedish text in data/raw/swedish. What it does on a CPU stands in the README.
"""
dataset = 'swedish'
n_layer = 7
n_head = 5
n_embd = 320
block_size = 512
tie_embeddings = True
tokens_per_step = 131072
micro_batch_size = 128

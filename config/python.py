"""Python in thirty minutes on one RTX 4090: the shape of babylm.py on the library of the Python that runs it,
which is real code and on every machine, or on the .py files in data/raw/python. A file is a document,
longer ones are cut at blank lines. What it does on a CPU stands in the README.
"""
dataset = 'python'
n_layer = 7
n_head = 5
n_embd = 320
block_size = 512
tie_embeddings = True
tokens_per_step = 131072
micro_batch_size = 128
sample_prompt = 'def '

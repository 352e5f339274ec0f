"""TinyStories (Eldan and Li 2023, 2305.07759) in thirty minutes on one RTX 4090: 11M parameters, a vocabulary
of 4,096.

A vocabulary trained on this text reaches with 4,096 entries nearly the sequence length of a general one of
32,000, and leaves the parameters to the layers: eight of 320.
"""
dataset = 'tinystories'
vocab_size = 4096
n_layer = 8
n_head = 5
n_embd = 320
block_size = 512
tie_embeddings = True
tokens_per_step = 131072
micro_batch_size = 128

"""A shape for two CPU cores, to stack on any data set: four layers 192 wide, 4,096 tokens a step.

    python train.py config/babylm.py config/cpu.py --budget_minutes=10
"""
n_layer = 4
n_head = 3
n_embd = 192
block_size = 256
tokens_per_step = 4096
micro_batch_size = 16

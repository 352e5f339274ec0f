"""quickstart.py in Swedish: five minutes on `stories_sv`, the same world told in Swedish."""
from config.stories import Corpus

dataset = 'stories_sv'
vocab_size = 2048
budget_minutes = 5.0
n_layer = 4
n_head = 2
n_embd = 128
block_size = 256
tokens_per_step = 4096
micro_batch_size = 16
learning_rate = 0.008
momentum = 0.99
beta1 = 0.9
beta2 = 0.99
log_interval = 50

"""Five minutes on whatever is here: a small model learns the generated world of `stories` and tells one at
the end.

1.3 million parameters, a vocabulary of 2,048. On two quick, quiet CPU cores it reads most of the world's stories once;
what it has understood is the closing report's coherence: of two endings, which one does the story allow?
Small and quick on purpose: in five minutes many steps teach more than many parameters. Gradients of so few
tokens are noisy: a longer momentum and a lower rate average them.
"""
from config.stories import Corpus

dataset = 'stories'
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

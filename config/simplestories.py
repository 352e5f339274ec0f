"""SimpleStories (2504.09184) in thirty minutes on one RTX 4090: 7.3M parameters, as the published half-hour
leaderboard's row.

The text is plain and its words few, so a vocabulary of 4,096 serves: eight layers 256 wide, tied.
"""
import prepare_data

dataset = 'simplestories'
vocab_size = 4096
n_layer = 8
n_head = 4
n_embd = 256
block_size = 512
tie_embeddings = True
tokens_per_step = 131072
micro_batch_size = 128


class Corpus(prepare_data.Corpus):
    sets = {
        'simplestories': dict(
            about='SimpleStories (Finke et al. 2025, arXiv 2504.09184), Parquet; a document is a story',
            mb=1680, licence='MIT', repo='SimpleStories/SimpleStories',
            files={f'simplestories.train-{i:05d}-of-00007.parquet': f'data/train-{i:05d}-of-00007.parquet'
                   for i in range(7)} | {'simplestories.dev.parquet': 'data/test-00000-of-00001.parquet'}),
    }

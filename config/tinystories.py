"""TinyStories (Eldan and Li 2023, 2305.07759) in thirty minutes on one RTX 4090: 11M parameters, a vocabulary
of 4,096.

A vocabulary trained on this text reaches with 4,096 entries nearly the sequence length of a general one of
32,000, and leaves the parameters to the layers: eight of 320.
"""
import prepare_data

dataset = 'tinystories'
vocab_size = 4096
n_layer = 8
n_head = 5
n_embd = 320
block_size = 512
tie_embeddings = True
tokens_per_step = 131072
micro_batch_size = 128


class Corpus(prepare_data.Corpus):
    sets = {
        'tinystories': dict(
            about='TinyStories (Eldan and Li 2023, arXiv 2305.07759); a document is a story', mb=1940,
            licence='CDLA-Sharing-1.0', repo='roneneldan/TinyStories',
            files={name: name for name in ('TinyStories-train.txt', 'TinyStories-valid.txt')}),
        'tinystories_v2': dict(
            about='TinyStories by GPT-4 alone: another text, another loss; a document is a story', mb=2250,
            licence='CDLA-Sharing-1.0', repo='roneneldan/TinyStories',
            files={name: name for name in ('TinyStoriesV2-GPT4-train.txt', 'TinyStoriesV2-GPT4-valid.txt')},
            sha256={'TinyStoriesV2-GPT4-valid.txt':
                    '6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d'}),
    }

"""Swedish in thirty minutes on one RTX 4090: the shape of babylm.py on Swedish Wikipedia, or on your own
folder of Swedish text in data/raw/swedish. What it does on a CPU stands in RESULTS.md.

    python train.py config/swedish.py --dataset=babybabellm_swe      what a child in Sweden hears and reads
"""
import prepare_data

dataset = 'swedish'
n_layer = 7
n_head = 5
n_embd = 320
block_size = 512
tie_embeddings = True
tokens_per_step = 131072
micro_batch_size = 128


class Corpus(prepare_data.Corpus):
    sets = {
        'swedish': dict(
            about='Swedish Wikipedia, November 2023, one Parquet file of five; a document is an article',
            mb=554, licence='CC BY-SA 4.0, GFDL', repo='wikimedia/wikipedia',
            files={'wikipedia_sv.parquet': '20231101.sv/train-00000-of-00005.parquet'},
            sha256={'wikipedia_sv.parquet':
                    'd1b63dc7d7db0a71f06f59eee2376d8040b9690ac053f3e5275e94b483d5b4c4'}),
        'babybabellm_swe': dict(
            about="BabyBabelLM's Swedish (Jumelet 2025, arXiv 2510.10159), as 10M words of English; a document is a row",
            mb=60, licence='differs by document', repo='BabyLM-community/babylm-swe',
            files={'babybabellm_swe.parquet': 'data/train-00000-of-00001.parquet'}),
    }

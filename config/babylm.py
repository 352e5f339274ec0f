"""BabyLM in thirty minutes on one RTX 4090: 11.2M parameters, three quarters of them in the layers.

    torchrun train.py config/babylm.py config/split_by_lines.py     measured on the leaderboard's lines too

The full model: text and size of the published half-hour leaderboard, 100 million words and rows of 10.6M to
11.0M parameters; some 140 tokens a parameter, a dozen epochs, if a card reaches 45 % of its peak.
config/babylm_10m.py reads a tenth of the text, config/nocap.py grows the model. Seven layers 320 wide with a
tied head put more of the total to work on every token than wider tables would. Not yet measured on a 4090;
what it does on a CPU stands in RESULTS.md.
"""
import prepare_data
import sample

dataset = 'babylm_2026_100m'
n_layer = 7
n_head = 5
n_embd = 320
block_size = 512
tie_embeddings = True
tokens_per_step = 131072
micro_batch_size = 128
evals = 'all'                       # what is in data/eval; BLiMP is fetched to it if there is no such folder

PARTED = 'a document ends at a title or blank line'
TERMS = 'differs by source; BNC, and EWoK of the evaluation, have terms of their own'
SOURCES = ('aochildes', 'bnc_spoken', 'cbt', 'children_stories', 'gutenberg', 'open_subtitles', 'qed',
           'simple_wikipedia', 'switchboard', 'wikipedia')
FILES = {size: {f'{source}.{split}': f'clean/{folder}/{source}.txt' for source in SOURCES
                for split, folder in (('train', size), ('dev', 'dev'), ('test', 'test'))}
         for size in ('10M', '100M')}
FILES_2026 = {f'{source}.train': f'{source}.train.txt' for source in
              ('bnc_spoken', 'childes', 'gutenberg', 'open_subtitles', 'simple_wiki', 'switchboard')}


class Corpus(prepare_data.Corpus):
    sets = {
        'babylm': dict(
            about=f'BabyLM strict-small (2023), ten sources, 10M words; {PARTED}', mb=160,
            licence=TERMS, repo='cambridge-climb/BabyLM', files=FILES['10M']),
        'babylm_100m': dict(
            about=f'BabyLM strict (2023), the same sources, 100M words; {PARTED}', mb=650,
            licence=TERMS, repo='cambridge-climb/BabyLM', files=FILES['100M']),
        'babylm_2026': dict(
            about=f'BabyLM strict-small (2026, detoxified), 10M words; {PARTED}', mb=55,
            licence=TERMS, repo='BabyLM-community/BabyLM-2026-Strict-Small', files=FILES_2026),
        'babylm_2026_100m': dict(
            about=f'BabyLM strict (2026, detoxified), 100M words; {PARTED}', mb=550,
            licence=f'MIT says its card; {TERMS}',
            repo='BabyLM-community/BabyLM-2026-Strict', files=FILES_2026),
    }


class Measure(sample.Measure):
    def files(self):
        """BLiMP is fetched to eval_data where there is no such folder; without it the run goes on."""
        if self.s.evals == 'all' and self.s.dataset in Corpus.sets:
            try:
                sample.fetch_evals(self.s.eval_data, waits=(1,), timeout=10)        # the clock runs
            except prepare_data.UserError as e:
                self.say(f'warning: no BLiMP: {e}')
        return super().files()

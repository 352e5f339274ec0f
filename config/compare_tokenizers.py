"""What other tokenizers would make of a data set's held-out text: a table; nothing is built.

    python prepare_data.py config/babylm.py config/compare_tokenizers.py --compare_tokenizers=2048,8192

Bytes a token, the share of a model's parameters that its table of embeddings would have, and the speed of
encoding; BPE and unigram (Kudo 2018, 1804.10959) of each size, single bytes, GPT-2's.
"""
import functools
import heapq
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import prepare_data
from prepare_data import NO_BAR, THREADS, BPETokenizer, ByteTokenizer, GPT2Tokenizer, UserError, key_of, scan

compare_tokenizers: str = '2048,4096,8192,16384'     # sizes of vocabularies, with commas between
width: int = 320                                     # 1..: of the model whose share of embeddings is shown

LAYERS = 7                   # of that model, as config/babylm.py has


class Corpus(prepare_data.Corpus):

    def run(self):
        self.compare()

    def held_out(self, found, parts):
        """The texts of 2,000 held-out documents, less than 33 MB."""
        held = ((key_of(doc), text) for part in parts if part.split in ('', 'val')
                for doc, text in self.documents(part, Counter(), NO_BAR)
                if part.split or key_of(doc)[0] < found.below)
        return [text for _, text in heapq.nsmallest(2000, held, key=lambda row: row[0][1])]

    def compare(self):
        sizes, width = self.s.compare_tokenizers, self.s.width
        if not re.fullmatch(r'\d+(,\d+)*', sizes):
            raise UserError(f'compare_tokenizers is {sizes!r}: give sizes like 2048,8192')
        self.check()
        with tempfile.TemporaryDirectory() as temp:
            parts, _ = prepare_data.gather(self, Path(temp), Counter())
            found = scan(self, parts, NO_BAR)
            held = self.held_out(found, parts)
        texts, n_bytes = [text for _, text in found.sample.values()], sum(len(text.encode()) for text in held)
        makers = [(f'{kind} {int(size):,}', functools.partial(BPETokenizer.train, texts, int(size), kind))
                  for kind in ('bpe', 'unigram') for size in re.findall(r'[1-9]\d*', sizes)]
        makers += [('bytes', ByteTokenizer), ('gpt2', lambda: GPT2Tokenizer.find(self.gpt2_folders))]
        print(f'{"tokenizer":17}{"bytes/token":>12}{"embeddings":>12}{"MB/s":>8}')
        for name, make in makers:
            try:
                tokenizer = make()
            except UserError as e:
                print(f'{name:17}{e}')
                continue
            t0 = time.perf_counter()
            tokens = sum(map(len, tokenizer.encode_batch(held))) or 1
            speed, table = n_bytes / 1e6 / (time.perf_counter() - t0), tokenizer.vocab_size * width
            share = table / (table + LAYERS * 12 * width**2)
            print(f'{name:17}{n_bytes / tokens:12.3f}{share:12.1%}{speed:8.1f}', flush=True)
        print(f'{len(held):,} held-out documents, {n_bytes / 1e6:.1f} MB; BOS not counted; '
              f'threads: {THREADS}')
        print(f'embeddings, of all parameters: V C / (V C + {LAYERS} x 12 C^2), tied head, width C = {width}')

"""A control: every document is said to be of some other document's source.

    torchrun train.py config/babylm.py config/domains.py config/random_sources.py

What config/domains.py or another that goes by sources gains with these labels too comes of more parameters, or
of another order, and not of domains. Each source keeps its number of documents, not of tokens;
val_bpb_per_source is that of such labels. A part of the validation text is drawn by source, so compare only
runs that read all of it. Expected: bits per byte of plain text with as many parameters. What it did in a doll of
config/babylm.py (RESULTS.md, "Dolls"): 2.320 where true labels give 2.176 and the base 2.210, told 2.358 and 2.208.
So a split of no domains costs 5 %, and what domains gain is not from having more parameters.
"""
import numpy as np

import train


class Run(train.Run):

    def open(self):
        super().open()
        for number, (split, docs) in enumerate(self.data.docs.items()):
            docs = self.data.docs[split] = np.array(docs)
            docs['source'] = np.random.default_rng([self.s.seed, number]).permutation(docs['source'])

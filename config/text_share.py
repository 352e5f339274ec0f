"""A share of the training text, of every source the same, taken evenly from its beginning to its end.

    python train.py config/babylm.py config/text_share.py --text_share=0.1

For runs that are to read as often as a larger one does (bench_mfu.py --doll), and to see what more text would
bring. Documents stay whole; the tokenizer is learned from the share alone. Validation is all there, and a
part of it is measured where a small run has no time for more.
"""
import math
from collections import Counter

import prepare_data
import sample

text_share: float = 1.0     # 0.0001..1: of every source's bytes, to within a document
val_share: float = 1.0      # 0.001..1: of the validation text, stratified, that is measured


class Corpus(prepare_data.Corpus):

    def __init__(self, s):
        super().__init__(s)
        self.owed = Counter()       # bytes of a source that should be in the share by now and are not

    def changes(self):
        return super().changes() | (dict(text_share=self.s.text_share) if self.s.text_share < 1 else {})

    def variant(self):
        return super().variant() + (f'-share{self.s.text_share:g}' if self.s.text_share < 1 else '')

    def unwanted(self, text, part):
        if reason := super().unwanted(text, part):
            return reason
        size = len(text.encode())
        self.owed[part.source] += self.s.text_share * size
        if self.owed[part.source] < size / 2:
            return 'documents dropped, beyond the share'
        self.owed[part.source] -= size
        return ''


class Measure(sample.Measure):

    def bpb(self, model, slices=sample.SLICES, *args, **kwargs):
        return super().bpb(model, min(slices, math.ceil(self.s.val_share * sample.SLICES)), *args, **kwargs)

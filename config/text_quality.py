"""How what a model writes reads, without a judge: which texts end properly, how much repeats, what is copied.

    torchrun train.py config/babylm.py config/text_quality.py
    python sample.py out/babylm config/text_quality.py --eval=text

Of the texts every second one continues a held-out document, the others begin afresh; beside each figure
stands that of those documents themselves. `accuracy` is the share that ends properly: the document's end
follows on a sentence's. Of words in lower case: distinct_n, different n-grams over all (Li 2016, 1510.03055),
both sides cut to as many; repeated_4, 4-grams that stood in the same text before (seq-rep-4 of Welleck 2019,
1908.04319); known_words and copied_8, words and 8-grams that the training text holds.
"""
import re

import numpy as np
import torch

import sample

texts: int = 256                # 1..: how many are written; a short run writes fewer
text_tokens: int = 128          # 1..: of each, at most
text_temperature: float = 0.8   # 0..100: of drawing a token; 0 takes the likeliest

WORD = re.compile(r"\w+(?:['’]\w+)*|\0")         # \0 stands between documents


class Measure(sample.Measure):
    def known(self):
        return super().known() | dict(text=self.text)

    def seconds(self, name, token_seconds):
        one = self.s.text_tokens / 4 * token_seconds          # 32 at once, which makes them 4 times as fast
        return one if name == 'text' else super().seconds(name, token_seconds)

    def text(self, model, n=0, stop=None):
        return text_quality(model, self.tokenizer, self.data, min(n or self.s.texts, self.s.texts),
                            self.s.text_tokens, self.s.text_temperature, rows=self.rows(model), stop=stop)


def text_quality(model, tokenizer, data=None, n=256, length=128, temperature=0.8, seed=1, rows=32, stop=None):
    """The figures above of n texts of at most `length` tokens, as Measure.known() has it; data: of
    prepare_data.open_data, without which all begin afresh and are compared with nothing."""
    prompts, *real = held_out(data, n, length, seed) if data else ([[tokenizer.bos]] * n,)
    dice = torch.Generator(device=model.wte.weight.device).manual_seed(seed)
    made = sample.continuations(model, tokenizer, prompts, length, temperature, dice, rows=rows, stop=stop)
    kept = [i for i, ids in enumerate(made[0]) if ids is not None]       # all, unless it was stopped
    if not kept:
        return None
    share, prompts = len(kept) / len(prompts), [prompts[i] for i in kept]
    sides = [[[one[i] for i in kept] for one in side] for side in (made, *real)]
    figures, grams = [], {size: [] for size in (1, 2, 3, 8)}
    for made, ended in sides:
        texts = [tokenizer.decode(ids) for ids in made]
        words = [words_of(text, len(head) == 1, end) for text, head, end in zip(texts, prompts, ended)]
        proper = [end and text.rstrip()[-1:] in {*'.!?…"\'”’)'} for text, end in zip(texts, ended)]
        fours = [ngrams([text], 4) for text in words]
        repeated = 1 - sum(len({*gram}) for gram in fours) / max(1, sum(map(len, fours)))
        figures.append(dict(ends_properly=np.mean(proper), ends=np.mean(ended), repeated_4=repeated))
        for size in grams:
            grams[size].append(ngrams(words, size))
    for size in (1, 2, 3):
        most = min(map(len, grams[size]))
        for figure, side in zip(figures, grams[size]):
            figure[f'distinct_{size}'] = len({*side[:most]}) / max(1, most)
    if data:
        copied(data, tokenizer, grams, figures, stop)
    figures = [{name: float(value) for name, value in figure.items()} for figure in figures]
    p, n = figures[0]['ends_properly'], len(kept)
    return dict(accuracy=p, error=sample.share_error(p, n), chance=None, items=n, per_kind=figures[0],
                held_out=figures[1] if data else None, **(dict(share=share) if share < 1 else {}))


def copied(data, tokenizer, grams, figures, stop=None):
    """Adds to figures what the training text holds; nothing where there is no time to read it."""
    wanted = {gram for size in (1, 8) for side in grams[size] for gram in side}
    known = in_training(data.tokens['train'], tokenizer, wanted, stop=stop)
    for name, size in (('known_words', 1), ('copied_8', 8)) if known is not None else ():
        for figure, side in zip(figures, grams[size]):
            figure[name] = np.mean([gram in known for gram in side] or [0])


def held_out(data, n, length, seed):
    """Prompts, and (rest, ended) as continuations gives it: n held-out documents, every second split after at
    most eight tokens, the others after BOS."""
    starts, tokens = data.docs['val']['start'], data.tokens['val']
    sizes = np.diff(np.append(starts, len(tokens)))
    some = np.random.default_rng(seed).permutation(len(starts))[:n]
    heads = [1 + min(8, sizes[doc] // 2) * (i % 2) for i, doc in enumerate(some)]
    texts = [tokens[starts[doc]:][:min(sizes[doc], head + length)].tolist() for doc, head in zip(some, heads)]
    return ([ids[:head] for ids, head in zip(texts, heads)],
            ([ids[head:] for ids, head in zip(texts, heads)], list(sizes[some] - heads < length)))


def words_of(text, whole_start, whole_end):
    """Its words in lower case, but for one that the prompt or the limit cut in two."""
    text = text.lower() if whole_start else re.sub(r'^\w+', '', text.lower())
    return WORD.findall(text if whole_end else re.sub(r'\w+$', '', text))


def ngrams(texts, n):
    """All runs of n words in the texts, which are lists of words."""
    return [gram for words in texts for gram in zip(*(words[i:] for i in range(n)))]


def in_training(tokens, tokenizer, grams, chunk=1 << 18, stop=None):
    """Those of `grams`, tuples of 1 or of 8 words, that the text of a split's tokens holds, exactly; None if
    stopped before the end.

    Reads it once, in about 100 MiB: a bitmap of hashes says which windows are worth comparing.
    """
    number = {word: i for i, word in enumerate({word for gram in grams for word in gram} - {'\0'}, 1)}
    wanted = {tuple(number[word] for word in gram): gram for gram in grams if '\0' not in gram}
    seen, found, last, tail = np.zeros(len(number) + 1, bool), set(), np.zeros(0, np.int64), b''
    bitmap, factors = np.zeros(1 << 24, bool), np.random.default_rng(0).integers(1, 1 << 62, 8) * 2 + 1

    def hashed(windows):                         # (8, n) -> (n,)
        return sum(row * factor for row, factor in zip(windows, factors)) >> 40 & 0xFFFFFF

    bitmap[hashed(np.array([row for row in wanted if len(row) == 8], np.int64).reshape(-1, 8).T)] = True
    table = [*tokenizer.table]
    table[tokenizer.bos] = b' \0 '
    for first in range(0, len(tokens), chunk):
        if stop and stop():
            return None
        raw = tail + b''.join([table[i] for i in tokens[first:first + chunk].tolist()])
        cut = raw.rfind(b' ') + 1 if first + chunk < len(tokens) else 0       # no word is cut in two
        raw, tail = (raw[:cut], raw[cut:]) if cut else (raw, b'')
        new = [number.get(word, 0) for word in WORD.findall(raw.decode(errors='replace').lower())]
        x = np.append(last, np.array(new, np.int64))
        seen[x], last, n = True, x[-7:], max(0, len(x) - 7)
        windows = np.stack([x[i:i + n] for i in range(8)])
        found |= wanted.keys() & map(tuple, windows[:, bitmap[hashed(windows)]].T.tolist())
    return {wanted[row] for row in found | wanted.keys() & {(i,) for i in np.flatnonzero(seen).tolist()}}

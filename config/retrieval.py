"""Retrieval: before each document stand the passages of the training text, other than its own, that fit best.

    python train.py config/quickstart.py config/facts.py config/retrieval.py
    python sample.py out/quickstart+facts+retrieval config/retrieval.py --eval=without,with,wrong
    python sample.py out/quickstart+facts+retrieval "Question: Where does Ada live? Answer:" --retrieve notes

Whence: REALM (Guu 2020, 2002.08909), in-context RALM (Ram 2023, 2302.00083), in-context pretraining (Shi
2023, 2310.10638). A small model knows little; what it is told it can repeat, if it has learned to look.
Passages are found by BM25 with the document as the query, once, as the data is prepared or first read (37
seconds of a core for 28 MB), and kept beside the bins as train.retrieved-*.npy: which stretches of train.bin
stand before which document. They belong to the document as attention sees it, a blank line behind each, the
best one last, and are no targets. So a step teaches on fewer tokens, and a document longer than block_size
has them in its first rows alone. Validation stands as it was, without passages.

Measured are questions of config/facts.py about people whose names are in no training text: is the answer
likelier than what another's note says? `without` a note, `with` what BM25 finds among 500 notes, and with the
`wrong` one, that of the other, which says otherwise. Expected: chance without, near all with. What it did in
450 steps of quickstart's shape (500 questions, one seed, 2026-11-26, commit ee3919c; RESULTS.md): word for
word 0.010 without, 0.978 with, 0.000 wrong; the same steps without this file 0.014, 0.018, 0.016. The price:
0.979 bits per byte of validation text, which has no passages, beside 0.761. Kept where there is something to
look up.
"""
import functools

import numpy as np
import torch

import prepare_data
import sample
import train
from config.facts import facts
from config.sample_retrieve import BM25, cut, terms_of
from prepare_data import write_beside

retrieved: int = 1           # 1..: passages before a document, at most
passage_tokens: int = 96     # 8..: tokens of a passage, at most
questions: int = 500         # 50..: questions of an evaluation

NOT_WITH = dict(plain_gpt2='it reads text from anywhere, not documents')


class Corpus(prepare_data.Corpus):

    def finish(self, data):
        super().finish(data)
        retrieve(data, self.s.retrieved, self.s.passage_tokens)


class Stream(train.Stream):
    """Tokens of passages are told from a document's own by being stored as ~id, which is negative, until a
    batch is made."""

    def __init__(self, data, s, weights=None):
        super().__init__(data, s, weights)
        self.bounds, self.passages = data.bounds('train'), retrieve(data, s.retrieved, s.passage_tokens)
        self.gap = np.array(data.tokenizer.encode('\n\n'), np.int64)
        lengths = self.passages['length']
        more = np.where(lengths, lengths + len(self.gap), 0).sum(axis=1)
        self.lengths = self.lengths + more[np.searchsorted(self.bounds, self.starts)]

    def document(self, start):
        """The tokens of the document that begins there, with its passages."""
        number = int(np.searchsorted(self.bounds, start))
        own = self.tokens[start:self.bounds[number + 1]].astype(np.int64)
        before = [part for first, n in self.passages[number].tolist() if n
                  for part in (self.tokens[first:first + n].astype(np.int64), self.gap)]
        return np.concatenate([own[:1], *(~part for part in before), own[1:]])

    def gather(self, starts, places, position):
        first, last = np.searchsorted(places, position[[0, -1]], side='right') - 1
        ids = np.concatenate([self.document(start) for start in starts[first:last + 1]])
        return ids[position - places[first]]

    def first_rows(self, n, T):
        rows = super().first_rows(n, T)
        return np.where(rows < 0, ~rows, rows)

    def batch(self, first, B, T):
        batch = super().batch(first, B, T)
        idx, targets = batch['idx'], batch['targets']
        return batch | dict(idx=torch.where(idx < 0, ~idx, idx), targets=targets.clamp(min=-1))


def retrieve(data, k, size):
    """(documents, k) of (start, length) in the training tokens: the passages before each document, the best
    one last, length 0 where there are fewer. Made where they are missing."""
    path, bounds = data.folder / f'train.retrieved-{k}-{size}.npy', data.bounds('train')
    kind = np.dtype([('start', '<i8'), ('length', '<i4')])
    try:
        found = np.load(path, mmap_mode='r')
        if found.shape == (len(bounds) - 1, k) and found.dtype == kind:
            return found
    except (OSError, ValueError, EOFError):
        pass                                     # none yet, or a damaged one
    tokens, tokenizer, parts, words = data.tokens['train'].view(np.ndarray), data.tokenizer, [], []
    for first, end in zip(bounds + 1, bounds[1:]):               # BOS is in no passage
        ids = tokens[first:end].tolist()
        ends = cut(ids, tokenizer, size)
        parts.append([(first + a, b - a) for a, b in zip(ends, ends[1:])])
        words += [terms_of(tokenizer.decode(ids[a:b])) for a, b in zip(ends, ends[1:])]
    index, firsts = BM25.of(enumerate(words)), np.cumsum([0, *map(len, parts)])
    spans = np.array([span for spans in parts for span in spans], kind)
    found = np.zeros((len(parts), k), kind)
    for number, own in enumerate(zip(firsts, firsts[1:])):
        query = np.concatenate([*words[slice(*own)], np.zeros(0, np.uint64)])
        best, _ = index.best(query, k, but=own, most=4096)
        found[number, k - len(best):] = spans[best[::-1]]
    write_beside(path, lambda f: np.save(f, found))
    return found


class Measure(sample.Measure):

    def known(self):
        return super().known() | {how: functools.partial(self.answered, how)
                                  for how in ('without', 'with', 'wrong')}

    def seconds(self, name, token_seconds):
        mine = name in ('without', 'with', 'wrong')              # two texts of some 100 tokens, read at once
        return 10 * token_seconds if mine else super().seconds(name, token_seconds)

    @functools.cached_property
    def asked(self):
        """(items of sample.eval_set, their questions as ids, answers, {how: ids that stand before each}, the
        share of notes that are found)."""
        people, encode = [*facts(self.s.questions, self.s.data_seed, held=True)], self.tokenizer.encode
        others = []                              # the next one of whom the same is asked and not so
        for i, one in enumerate(people):
            alike = (j for j in (*range(i + 1, len(people)), *range(i)) if people[j]['kind'] == one['kind'])
            others.append(next(j for j in alike if people[j]['answer'] != one['answer']))
        items = sample.tokenize_items([dict(kind=one['kind'], context=one['question'], options=[
            f' {one["answer"]}', f' {people[other]["answer"]}']) for one, other in zip(people, others)],
            self.tokenizer)
        index = BM25.of((i, terms_of(one['note'])) for i, one in enumerate(people))
        best = [int(index.best(terms_of(one['question']), 1)[0][0]) for one in people]
        notes, order = [encode(one['note']) + encode('\n\n') for one in people], items['order']
        before = {'without': [[] for _ in order], 'with': [notes[best[i]] for i in order],
                  'wrong': [notes[others[i]] for i in order]}
        return (items, [encode(people[i]['question']) for i in order], [people[i]['answer'] for i in order],
                before, float(np.mean([i == found for i, found in enumerate(best)])))

    def answered(self, how, model, n=0, stop=None):
        """How often the answer is likelier than another's; `exact`, how often it is what the model writes."""
        items, questions, answers, before, found = self.asked
        n, before = min(n or len(answers), len(answers)), before[how]
        prompts = [[self.tokenizer.bos, *before[i], *questions[i]] for i in range(n)]
        made, _ = sample.continuations(model, self.tokenizer, prompts, 24, 0, None, rows=self.rows(model),
                                       done=lambda text: text.endswith('.'), stop=stop)
        if None in made:
            return None                          # stopped before the end
        right = [self.tokenizer.decode(ids).strip() == answer for ids, answer in zip(made, answers)]
        exact = float(np.mean(right))
        items = preceded(items, before)
        result = sample.accuracy(self.option_costs(model, items, 0, n), items)
        return result | dict(exact=exact, exact_error=sample.share_error(exact, n),
                             **dict(found=found) if how == 'with' else {})

    def lines(self, name, result):
        yield from super().lines(name, result)
        if 'exact' in result:
            yield f'  {"word for word":22} {result["exact"]:8.4f} +- {result["exact_error"]:.4f}'


def preceded(items, before):
    """Items of sample.eval_set with these ids between BOS and the context of each."""
    ids, starts, rows = items['ids'], items['start'], []
    for item, first, end in zip(items['item'], starts, starts[1:]):
        more = np.array(before[item], np.uint32)
        rows.append(np.concatenate([ids[first:first + 1], more, ids[first + 1:end]]))
    return items | dict(ids=np.concatenate(rows), start=np.cumsum([0, *map(len, rows)]),
                        seam=items['seam'] + [len(row) for row in before])

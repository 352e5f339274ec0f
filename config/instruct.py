"""Instruction tuning (Ouyang 2022, 2203.02155): a finished run learns to answer, by the loss of answers alone.

    python train.py config/quickstart.py config/instruct.py --init_from=out/quickstart --out_dir=out/taught
    python train.py config/babylm.py config/instruct.py --init_from=out/babylm --dataset=files:my_chats
    python sample.py out/taught --chat

Two ids are added to the run's vocabulary, one to begin what a user says and one what the assistant does; no
text encodes to them. `chat` and, of a Swedish run, `chat_sv` are generated: stories with questions about them,
and stories that are asked for. Of files each row of .jsonl, .json or .csv is a conversation: `messages` of
`role` and `content`, or instruction (prompt, question) with input and output (response, completion, answer).
Rows of training hold whole conversations. The closing report has `answers` (accuracy: of held-out answers of
at most answer_tokens the share that greedy decoding gives word for word; ends: that end in time, and name no
role; loss: of all answers) and `forgotten`, bits per byte of the first run's validation text; each beside what
it was before the first step. `val_bpb` is that of whole conversations.
tuning_rate is the best of four on the quickstart, where 200 steps answer 0.23 of the questions, none before, and
forget 0.020 bits per byte (RESULTS.md, "Instructions, passages, exports").
"""
import dataclasses
import functools
import json
import random
import re
from pathlib import Path

import numpy as np
import torch

import prepare_data
import sample
import train
from config import stories
from config.worlds import parse_phrases
from prepare_data import refuse, sha256_of

dataset = 'chat'
tuning_rate: float = 0.3        # 0..10: all learning rates, as a share of those that trained the run
answer_tokens: int = 32         # 1..: answers of at most so many are compared word for word
base_data: str = ''             # prepared data on which forgetting is measured; '': the first run's own

NOT_WITH = dict(
    **dict.fromkeys(('climb_data', 'raise'), 'a curriculum reads rows that begin anywhere, and so answers without their questions'),
    distillation='its teacher knows no roles', context_rampup='it cuts answers from their questions',
    split_by_lines='rows of conversations are no lines of text',
    plain_gpt2='it reads rows that begin anywhere, and so answers without their questions')
ROLES = dict(user='\ufdd0', assistant='\ufdd1')      # how they stand in a document: no characters of any text
MARKS = re.compile(f'([{"".join(ROLES.values())}])')
ASKED, GIVEN = ('instruction', 'prompt', 'question'), ('output', 'response', 'completion', 'answer')
CHATS = {                    # data set: (its text in config/, what else is asked for)
    'chat': ('stories', ('Tell me a story about {A}.', 'Tell me about {A} and {B}.', 'Go on: ')),
    'chat_sv': ('stories_sv', ('Berätta en saga om {A}.', 'Berätta om {A} och {B}.', 'Fortsätt: '))}
HELD_OUT = 1200              # generated conversations, a quarter of them tellings


# ---- conversations -----------------------------------------------------------------------------------------

def turns_of(row):
    """[(role, text)...] of a row in the fields of published sets; KeyError, TypeError or the like if there is
    no conversation. What a system says goes before what the user does."""
    if 'messages' in row:
        turns = [(message['role'], message['content']) for message in row['messages']]
    else:
        row = row | row.get('instances', [{}])[0]
        asked = [row[name] for name in (*ASKED, 'input', 'context') if row.get(name)]
        given, = [row[name] for name in GIVEN if name in row]
        turns = [('user', '\n'.join(asked)), ('assistant', given)]
    system = [f'{text}\n\n' for role, text in turns if role == 'system']
    turns = [(role, ''.join(system if i == 0 else []) + text)
             for i, (role, text) in enumerate(turn for turn in turns if turn[0] != 'system')]
    if not {'user', 'assistant'} == {role for role, _ in turns}:
        raise ValueError
    return turns


def without_marks(text, instead=''):
    return MARKS.sub(instead, text)


def questions(count, seed, world):
    """Conversations about a story: a question or two, each about one of the things that it keeps consistent."""
    for index in range(count):
        teller = stories.Teller(random.Random(f'chat {seed} {index}').random, world, asks=True)
        kinds, fits = teller.kinds(), False
        while not fits:
            text, _, fits = teller.story(kinds, kinds[0])
        text = text.rpartition('\n\n')[0]
        text = text if teller.rand() < 0.5 else ' '.join(text.split())       # as one types it
        asked = [teller.ask(kind) for kind in kinds[:1 + int(teller.rand() * 2)]]
        said = [text for pair in asked for text in pair]
        yield [f'{text}\n\n{said[0]}', *said[1:]]


def tellings(count, seed, world, requests):
    """A story that is asked for, by who is in it or how it begins."""
    phrases = [parse_phrases(text) for text in requests[:2]]
    for index in range(count):
        teller = stories.Teller(random.Random(f'tell {seed} {index}').random, world)
        kinds, fits = teller.kinds(), False
        while not fits:
            context, closing, fits = teller.story(kinds)
        story, which = f'{context} {closing}'.rstrip(), int(teller.rand() * 3)
        begun, _, rest = story.partition('. ')
        yield ([f'{requests[2]}{begun}.', rest] if which == 2 else
               [teller.say(phrases[which], teller.told[kinds[0]]), story])


def write_chats(folder, count, seed, world, requests):
    """Writes generated conversations as if they were a corpus on disk; returns it."""
    (folder / 'raw').mkdir()
    for split, n, seed in (('train', count, seed), ('dev', HELD_OUT, seed + 1)):
        for source, chats in (('questions', questions(n - n // 4, seed, world)),
                              ('tellings', tellings(n // 4, seed, world, requests))):
            with open(folder / 'raw' / f'{source}.{split}.jsonl', 'w', encoding='utf-8') as f:
                for said in chats:
                    f.write(json.dumps(dict(messages=[dict(role=role, content=text) for role, text in zip(
                        ('user', 'assistant') * len(said), said)])) + '\n')
    return folder / 'raw'


class Corpus(stories.Corpus):
    sets = {name: dict(about=f'conversations about `{world}` of config/stories.py, for what read them', mb=30,
                       files={}, licence='generated by this program, MIT like it')
            for name, (world, _) in CHATS.items()}

    def content(self):
        world, _ = CHATS.get(self.name, ('', ()))
        told = sha256_of(Path(stories.__file__).with_name(f'{world}.txt'))[:12] if world else None
        return super().content() | (dict(world=told) if world else {})

    def variant(self):
        return super().variant() + '-chat' * (self.name not in CHATS)

    def changes(self):
        return super().changes() | dict(roles=','.join(ROLES))

    def text(self, temp, report):
        if self.name not in CHATS:
            return super().text(temp, report)
        return write_chats(temp, self.s.documents, self.s.data_seed, *CHATS[self.name])

    def row_text(self, where, row):
        """A conversation, roles as their marks; of a row that has a text, that."""
        if not isinstance(row, dict) or self.text_field in row or {'text', 'story'} & row.keys():
            text = super().row_text(where, row)
            return text and without_marks(text, '\ufffd')
        try:
            turns = turns_of(row)
            return ''.join(ROLES[role] + without_marks(text, '\ufffd').replace('<|endoftext|>', '\ufffd') for role, text in turns)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError):
            raise prepare_data.UserError(
                f'{where} is no conversation (its fields are {", ".join(map(str, row))[:200]}): give messages, '
                f'a list of role (user, assistant) and content, or instruction and output') from None

    def said(self, text):
        return without_marks(text).encode()

    def documents(self, part, report, bar):
        """A document's bytes are those of what was said."""
        for _, text in super().documents(part, report, bar):
            text = text if prepare_data.ROWS.search(part.name) else without_marks(text, '\ufffd')
            yield self.said(text), text

    def tokenizer(self, texts):
        tokenizer = super().tokenizer(map(without_marks, texts))
        return tokenizer if tokenizer.roles else tokenizer.with_roles(ROLES)

    def same(self, given, tokenizer):
        return tokenizer.blob.startswith(given.blob)

    def ids(self, tokenizer, texts):
        """The ids of documents, a mark being its role's; what stands between marks is text and no more."""
        number = {mark: np.array([tokenizer.roles[role]], np.uint32) for role, mark in ROLES.items()}
        parts = [MARKS.split(text) for text in texts]        # marks at the odd places
        rows = iter(super().ids(tokenizer, [text for said in parts for text in said[::2]]))
        return [np.concatenate([number[part] if i % 2 else next(rows) for i, part in enumerate(said)])
                for said in parts]

    def finish(self, data):
        super().finish(data)
        answer = data.tokenizer.roles['assistant']
        for split in ('train', 'val'):
            refuse(not (data.tokens[split] == answer).any(), f'{self.root} holds no conversations in its '
                   f'{split} split: give rows of .jsonl with messages, or with instruction and output')


# ---- what is learned ---------------------------------------------------------------------------------------

def answering(idx, bos, roles):
    """(B, T) bool: whether what follows a token belongs to an answer, its end too, of a conversation that
    begins in this row: one that was cut from its question teaches to invent."""
    at, assistant = torch.arange(idx.shape[1], device=idx.device), roles['assistant']
    special = torch.isin(idx, torch.tensor([bos, *roles.values()], device=idx.device))
    last = torch.where(special, at, 0).cummax(dim=1).values
    begun = (idx == bos).cummax(dim=1).values
    return (idx.gather(1, last) == assistant) & begun


def whole(lengths, T):
    """Where documents of these lengths stand, and the end, in rows of T: none is cut that fits into one."""
    places, at = [], 0
    for n in lengths.tolist():
        left = T - at % T
        at += left if left < min(n, T) else 0
        places.append(at)
        at += n
    return np.array([*places, at + -at % T])


class Stream(train.Stream):
    """Rows of whole documents, as far as these fit; BOS fills what is left. Targets are those of answers."""

    def epoch(self, number):
        starts, places = super().epoch(number)
        return starts, whole(np.diff(places), self.s.block_size)

    def gather(self, starts, places, position):
        doc = np.searchsorted(places, position, side='right') - 1
        ends = places[doc] + self.lengths[np.searchsorted(self.starts, starts[doc])]
        out = super().gather(starts, places, np.minimum(position, ends - 1))
        return np.where(position < ends, out, self.data.meta['bos'])

    def batch(self, first, B, T):
        batch = super().batch(first, B, T)
        learned = answering(batch['idx'], self.data.meta['bos'], self.data.tokenizer.roles)
        return batch | dict(targets=batch['targets'].masked_fill(~learned, -1))


class Run(train.Run):
    before = {}              # what was measured before the first step

    def corpus(self):
        s = self.s
        refuse(s.init_from == 'scratch', 'instruct.py goes on from a finished run: name it with --init_from, '
               'or leave instruct.py out')
        if not self.resuming:
            given = prepare_data.load_tokenizer(s.init_from)
            s.tokenizer, s.vocab_size = given.kind, given.vocab_size
        return super().corpus()

    def open_evaluations(self):
        if not self.resuming and not self.s.base_data:
            of = sample.read_checkpoint(self.s.init_from)
            self.s.base_data = of['settings'].get('base_data') or of['data']
        super().open_evaluations()

    def same_vocabulary(self, tokenizer, run):
        if not self.data.tokenizer.blob.startswith(tokenizer.blob):
            super().same_vocabulary(tokenizer, run)

    def start_from(self, before):
        """Rows of ids that the other run had not begin as the mean of those it had (Hewitt 2021)."""
        known, mine = before.config.vocab_size, self.model.state_dict()
        more = self.config.vocab_size - known
        for name, w in before.named_parameters():
            if w.ndim and len(w) == known and name in mine and len(mine[name]) == known + more:
                w.data = torch.cat([w.data, w.data.mean(dim=0, keepdim=True).expand(more, *w.shape[1:])])
        before.config = dataclasses.replace(before.config, vocab_size=known + more)
        super().start_from(before)

    def groups(self, model):
        share = self.s.tuning_rate
        return {name: g | dict(base_lr=share * g['base_lr']) for name, g in super().groups(model).items()}

    def measure_evaluation(self):
        """Asks the run that this one goes on from, too."""
        super().measure_evaluation()
        if not self.resuming:
            with self.evaluating():              # for which ranks wait for each other
                counts = {name: n for name, (n, _) in self.others.items() if name in ('answers', 'forgotten')}
                self.before = dict(self.measure.ask(self.model, counts if self.master else {}))

    def state(self):
        return super().state() | dict(before=self.before)

    def load(self, state):
        super().load(state)
        self.before = state['before']

    def results(self, *found):
        report = super().results(*found)
        for name in self.before.keys() & report['evals'].keys():
            report['evals'][name] |= {f'{key}_before': value for key, value in self.before[name].items()
                                      if key in ('accuracy', 'ends', 'bpb') or key.startswith('loss')}
        return report


# ---- what is measured --------------------------------------------------------------------------------------

class Measure(sample.Measure):

    def known(self):
        return super().known() | dict(answers=self.answers, forgotten=self.forgotten)

    def seconds(self, name, token_seconds):
        """A text is read some 50 times as fast as it is written one token at a time, by 32 at once 4 times."""
        if name == 'answers':
            return self.s.answer_tokens / 4 * token_seconds
        if name == 'forgotten':
            return len(self.base.tokens['val']) / sample.SLICES / 50 * token_seconds
        return super().seconds(name, token_seconds)

    def plan(self, seconds, token_seconds, most=512):
        return super().plan(2 * seconds, token_seconds, most)

    @functools.cached_property
    def base(self):
        """The prepared data that the run which was taught first learned from."""
        s = self.s
        refuse(not s.base_data, 'forgotten, as the run was not taught')
        data = prepare_data.open_data(s.base_data)
        refuse(not self.tokenizer.blob.startswith(data.tokenizer.blob), f'forgotten, as {s.base_data} has '
               f'another vocabulary')
        return data

    def forgotten(self, model, n=0, stop=None):
        """Bits per byte of n slices of 1,024 of the text that the first run was validated on; 0: all."""
        tokens, docs = self.base.tokens['val'], self.base.docs['val']
        result = sample.bits_per_byte(model, tokens, docs, n or sample.SLICES, stop=stop)
        cut = dict(share=result['asked']) if 'asked' in result else {}
        return {key: result[key] for key in ('bpb', 'error', 'loss')} | dict(of_text=result['share'], **cut)

    @functools.cached_property
    def items(self):
        """[(source, ids up to the answer, ids of the answer, whose last ends it)...], in an order fixed."""
        refuse(self.data is None or not self.tokenizer.roles, 'answers, as there are no conversations')
        roles, tokens, items = self.tokenizer.roles, self.data.tokens['val'], []
        bounds, sources = self.data.bounds('val'), self.data.docs['val']['source']
        for source, first, end in zip(sources.tolist(), bounds, bounds[1:]):
            ids = [*tokens[first:end].tolist(), self.tokenizer.bos]
            marks = [i for i, token in enumerate(ids) if token in self.tokenizer.ends]
            items += [(source, ids[:a + 1], ids[a + 1:b + 1]) for a, b in zip(marks, marks[1:])
                      if ids[a] == roles['assistant']]
        return [items[i] for i in np.random.default_rng(0).permutation(len(items))]

    def answers(self, model, n=0, stop=None):
        """The first n held-out answers, of all by default, that fit into the context: how many are right word
        for word and end in time, of those that are short enough, and the loss of all, by source too."""
        room, short, names = model.config.block_size, self.s.answer_tokens, self.data and self.data.meta['sources']
        items = [item for item in self.items if len(item[1]) + len(item[2]) <= room + 1]
        items, read, right, ended = items[:n or len(items)], 0, {}, []
        loss = np.zeros((len(names), 2))         # of each source: nats, tokens
        for first in range(0, len(items), 32):
            if first and stop and stop():
                break
            some, read = items[first:first + 32], first + 32
            for (source, _, answer), nats in zip(some, self.nats(model, some)):
                loss[source] += nats, len(answer)
            some = [item for item in some if len(item[2]) <= short and len(item[1]) + short <= room]
            for (source, *_), (is_right, in_time) in zip(some, self.verdicts(model, some)):
                right.setdefault(names[source], []).append(is_right)
                ended.append(in_time)
        (nats, tokens), asked = loss.sum(axis=0), len(ended)
        each = {f'loss_{names[i]}': float(x / n) for i, (x, n) in enumerate(loss) if 0 < n < tokens}
        result = dict(loss=float(nats / max(tokens, 1)), **each,
                      **(dict(share=read / len(items)) if read < len(items) else {}))
        if asked:
            share = sum(map(sum, right.values())) / asked
            result |= dict(accuracy=share, error=sample.share_error(share, asked), chance=0.0, items=asked,
                           ends=sum(ended) / asked, per_kind={k: sum(v) / len(v) for k, v in right.items()})
        return result

    @torch.no_grad()
    def nats(self, model, items):
        """(items,) the sum over the tokens of each one's answer, its end too."""
        rows, total = [], np.zeros(len(items))
        for i, (_, prompt, answer) in enumerate(items):
            ids = np.array(prompt + answer)
            rows.append((i, ids[:-1], np.where(np.arange(1, len(ids)) < len(prompt), -1, ids[1:])))
        for keys, idx, targets in sample.batches(rows, 8192, model.config.block_size):
            idx, targets = (torch.from_numpy(t).to(model.wte.weight.device) for t in (idx, targets))
            total[keys] = model(idx, targets, reduction='none').double().sum(dim=1).tolist()
        return total

    def verdicts(self, model, items):
        """(right, ended in time without a role inside) of what is answered greedily."""
        t, short = self.tokenizer, self.s.answer_tokens
        made, over = sample.continuations(model, t, [prompt for _, prompt, _ in items], short, 0, None,
                                          rows=self.rows(model), ends={t.bos, t.roles['user']})
        for (*_, answer), ids, end in zip(items, made, over):
            proper = end and t.roles['assistant'] not in ids
            yield proper and t.decode(ids).strip() == t.decode(answer).strip(), proper

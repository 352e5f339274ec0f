"""Instruction tuning: roles as tokens, a loss of answers alone, what is measured of them, and the chat in a terminal."""
import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prepare_data
import sample
import train
from config import instruct, sample_chat
from config.sample_chat import chat_ids
from conftest import ROOT, in_two_parts, script
from prepare_data import BPETokenizer, ByteTokenizer, GPT2Tokenizer, UserError

IDEA = str(ROOT / 'config' / 'instruct.py')
NAMES = 'Ada Bo Cy Di'.split()


def chats(n, seed):
    """Short conversations: who has what, of two people who are named."""
    rng = random.Random(seed)
    for i in range(n):
        one, two = rng.sample(NAMES, 2)
        row = dict(instruction='Who has it?', input=f'{one}, {two}', output=one)
        yield row if i % 2 else dict(messages=[
            dict(role='user', content=f'{one}, {two} {i}'), dict(role='assistant', content=one),
            dict(role='user', content='Who else?'), dict(role='assistant', content=two)])


@pytest.fixture(scope='session')
def talk(tmp_path_factory):
    folder = tmp_path_factory.mktemp('talk')
    for seed, (name, n) in enumerate({'talk.train.jsonl': 400, 'talk.dev.jsonl': 40}.items()):
        (folder / name).write_text('\n'.join(json.dumps(row) for row in chats(n, seed)), encoding='utf-8')
    return folder


@pytest.fixture
def teach(main, finished, talk, tmp_path):
    """Trains config/instruct.py on those conversations, from the finished run; what it printed."""
    def run(*args, base=finished[0]):
        return main(IDEA, f'--init_from={base}', f'--dataset=files:{talk}', f'--data_dir={tmp_path}', *args)
    return run


def tokenizers():
    text = ' '.join(f'{a} has the kite, and {b} the ball.' for a in NAMES for b in NAMES)
    pieces = [bytes([i]) for i in range(256)] + [b' x%d' % i for i in range(50000)]
    gpt2 = b''.join(b'%s %d\n' % (prepare_data.base64.b64encode(p), i) for i, p in enumerate(pieces))
    return [BPETokenizer.train([text], 300), ByteTokenizer(), GPT2Tokenizer(gpt2)]


# ---- roles

@pytest.mark.parametrize('plain', tokenizers(), ids=lambda t: t.kind)
def test_roles_are_ids_that_no_text_encodes_to(plain):
    taught = plain.with_roles(['user', 'assistant'])
    V = plain.vocab_size
    assert not plain.roles and taught.roles == dict(user=V, assistant=V + 1) and taught.vocab_size == V + 2
    assert taught.blob.startswith(plain.blob) and taught.table[:V] == plain.table and taught.bos == plain.bos
    assert taught.ends == {plain.bos, V, V + 1} and plain.ends == {plain.bos}
    again = type(plain)(taught.blob)
    assert again.roles == taught.roles and again.table == taught.table
    for text in ('<|user|>hi<|assistant|>\n<|assistant|>\n', ' user assistant', '🙂 \ufdd0\ufdd1 <|endoftext|>\t\u2581\ue009'):
        ids = taught.encode(text)
        assert ids == plain.encode(text) and max(ids) < V and taught.decode(ids) == text
        assert [*map(int, taught.encode_batch([text])[0])] == ids
    assert taught.decode([V, *taught.encode('hi'), V + 1]) == 'hi' and taught.token_bytes(V) == b''
    assert taught.with_roles(['tool']).roles == dict(user=V, assistant=V + 1, tool=V + 2)


def test_chat_ids_are_trimmed_from_the_front():
    t = ByteTokenizer().with_roles(['user', 'assistant'])
    user, assistant = t.roles['user'], t.roles['assistant']
    said = [dict(role=role, content=text) for role, text in (('user', 'ab'), ('assistant', 'c'), ('user', 'def'))]
    whole = [t.bos, user, *b'ab', assistant, *b'c', user, *b'def', assistant]
    assert chat_ids(t, said) == chat_ids(t, said, len(whole)) == whole
    assert chat_ids(t, said, len(whole) - 1) == [t.bos, assistant, *b'c', user, *b'def', assistant]
    assert chat_ids(t, said, 6) == [t.bos, user, *b'def', assistant]
    assert chat_ids(t, said, 5) == [t.bos, user, *b'ef', assistant]
    assert chat_ids(t, [dict(role='user', content='<|user|>')])[2:-1] == [*b'<|user|>']
    with pytest.raises(UserError, match="the role 'system', this model knows user, assistant: leave it out"):
        chat_ids(t, [dict(role='system', content='x')])


# ---- conversations as documents

@pytest.mark.parametrize('row, turns', [
    (dict(messages=[dict(role='user', content='a'), dict(role='assistant', content='b')]), 'ab'),
    (dict(messages=[dict(role='system', content='s'), dict(role='user', content='a'), dict(role='assistant', content='b')]), ['s\n\na', 'b']),
    (dict(instruction='a', input='i', output='b'), ['a\ni', 'b']), (dict(instruction='a', input='', response='b'), 'ab'),
    (dict(prompt='a', completion='b', id=3), 'ab'), (dict(question='a', answer='b'), 'ab'),
    (dict(instruction='a', instances=[dict(input='i', output='b')]), ['a\ni', 'b'])])
def test_rows_as_they_are_published(row, turns):
    assert instruct.turns_of(row) == list(zip(('user', 'assistant'), turns))


def test_what_is_no_conversation_is_refused_with_its_place(talk, tmp_path, main, finished):
    def wrong(name, text):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'a.jsonl').write_text(text)
        with pytest.raises(UserError) as e:
            main(IDEA, f'--init_from={finished[0]}', f'--dataset=files:{tmp_path}/{name}', f'--data_dir={tmp_path}')
        return str(e.value)
    for row in ('{"instruction": "a"}', '{"messages": [{"role": "tool", "content": "a"}]}', '{"messages": 3}', '{"prompt": 3, "answer": "a"}'):
        assert f'{tmp_path}/' in (said := wrong(f'x{random.random()}'[:6], row)) and 'line 1 is no conversation (its fields are' in said
    assert 'holds no conversations in its train split' in wrong('plain', '\n'.join('{"text": "%s"}' % ('ab ' * 90 + str(i)) for i in range(40)))


def test_the_bins_hold_roles_and_the_bytes_of_what_was_said(teach, talk, tmp_path):
    (talk / 'more.train.jsonl').write_text(json.dumps(dict(text='plain \ufdd0 text <|user|>')) + '\n' + json.dumps(
        dict(prompt='\ufdd1x', answer='y<|endoftext|>')))
    (talk / 'more.dev.jsonl').write_text(json.dumps(dict(prompt='p', answer='q')))
    try:
        teach('--max_steps=1')
    finally:
        for path in talk.glob('more*'):
            path.unlink()
    folder, = tmp_path.glob('files-*-bytes-chat')
    data = prepare_data.open_data(folder)
    t, docs = data.tokenizer, data.docs['train']
    bounds, number = data.bounds('train'), data.meta['sources'].index('more')
    mine = [data.tokens['train'][a:b].tolist() for a, b, source in zip(bounds, bounds[1:], docs['source']) if source == number]
    assert mine == [[t.bos, *'plain \ufffd text <|user|>'.encode()],
                    [t.bos, t.roles['user'], *'\ufffdx'.encode(), t.roles['assistant'], *'y\ufffd'.encode()]]
    assert [*docs['bytes'][docs['source'] == number]] == [len('plain \ufffd text <|user|>'.encode()), 8]
    assert t.roles == dict(user=257, assistant=258) and data.meta['vocab_size'] == 259


@pytest.mark.parametrize('order', [('instruct', 'clean'), ('clean', 'instruct')])
def test_the_bytes_of_what_was_said_are_those_of_what_cleaning_left(order, tmp_path):
    rows = [dict(instruction=f'Say\u200b {i}', output=f'{i}!') for i in range(300)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    ideas = prepare_data.Ideas([*(str(ROOT / 'config' / f'{name}.py') for name in order), '--clean=unicode'], train.TABLES)
    s = SimpleNamespace(**ideas.values | dict(dataset=f'files:{tmp_path}', data_dir=str(tmp_path / 'out'), vocab_size=300))
    data = ideas.seam(prepare_data.Corpus)(s).open()
    said = [len(data.tokenizer.decode([*ids]).encode()) for ids in np.split(data.tokens['val'], data.docs['val']['start'][1:])]
    assert data.docs['val']['bytes'].tolist() == said


def test_generated_conversations_ask_what_their_story_says():
    for world, requests in instruct.CHATS.values():
        for said in itertools.islice(instruct.questions(40, 5, world), 40):
            assert len(said) in (2, 4) and '\n\n' in said[0] and said[0][-1] == said[-2][-1] == '?'
            assert all(answer[-1] == '.' and len(answer) < 120 for answer in said[1::2])
        told = [*instruct.tellings(30, 5, world, requests)]
        assert {asked.split(' ')[0] for asked, _ in told} == {text.split(' ')[0].rstrip() for text in requests}
        assert all(len(answer.split()) > 30 for _, answer in told)
    assert [*instruct.questions(3, 5, 'stories')] == [*instruct.questions(3, 5, 'stories')]
    assert [*instruct.questions(3, 5, 'stories')] != [*instruct.questions(3, 6, 'stories')]


# ---- what is learned

def test_only_answers_of_conversations_that_begin_in_the_row_are_learned():
    B, U, A = 9, 7, 8
    idx = torch.tensor([[1, A, 1, B, U, 1, 2, A, 3, 4, U, 5, A, 6, B, 1, U, A, B, B]])
    got = instruct.answering(idx, B, dict(user=U, assistant=A))[0].nonzero().flatten().tolist()
    assert got == [7, 8, 9, 12, 13, 17]          # from a role to the token before what ends the answer: that is a target too


def stream_of(lengths, T, seed=1):
    starts = np.cumsum([0, *lengths])[:-1]
    tokens = np.concatenate([[256, 257, *[i] * (n - 4), 258, i] for i, n in enumerate(lengths)]).astype(np.uint16)
    docs = np.zeros(len(lengths), prepare_data.DOC)
    docs['start'] = starts
    data = SimpleNamespace(tokens=dict(train=tokens), docs=dict(train=docs), meta=dict(bos=256, sources=['a'], splits=dict(train=dict(sources=dict(a=dict(documents=len(lengths)))))),
                           tokenizer=ByteTokenizer().with_roles(['user', 'assistant']))
    return instruct.Stream(data, SimpleNamespace(seed=seed, weights='', block_size=T))


def test_documents_stand_whole_in_rows_and_every_answer_is_learned_once_an_epoch():
    lengths, T = [5 + i % 9 for i in range(60)] + [50], 32
    stream = stream_of(lengths, T)
    rows = stream.epoch_tokens() // T
    batch = stream.batch(0, rows, T)
    idx, targets = batch['idx'], batch['targets']
    seen = sorted(i for i in targets[(targets >= 0) & (targets != 256)].tolist())
    assert seen == [*range(60)]                  # not that of 50 tokens, which was cut from its question
    assert (targets == 256).sum() == 60          # and each one's end
    assert (idx[:, 0] == 256).sum() == rows - 1 and (idx == 258).sum() == 61
    assert torch.equal(stream_of(lengths, T).batch(3, 2, T)['idx'], idx[3:5])     # by seed and row alone
    assert rows * T < 1.35 * sum(lengths)


def test_tokens_outside_answers_have_no_part_in_loss_and_gradient(teach, monkeypatch):
    """Other questions' targets, the same loss: what is learned is a function of the answers, given all before them."""
    kept = {}
    build = train.Run.build

    def and_keep(self):
        build(self)
        kept['run'] = self
    monkeypatch.setattr(train.Run, 'build', and_keep)
    teach('--max_steps=1')
    run, batch = kept['run'], kept['run'].first_batch
    idx, targets = batch['idx'], batch['targets']
    told = targets >= 0
    assert 0 < told.sum() < 0.5 * told.numel()
    nats = run.model(idx, torch.where(told, targets, 0), reduction='none')
    loss = run.loss(idx, targets)
    assert loss.item() == pytest.approx(nats[told].mean().item(), rel=1e-5)
    x = run.model.trunk(idx).detach().requires_grad_()
    run.model.loss(x, targets, 'mean').backward()
    assert (x.grad[~told] == 0).all() and (x.grad[told] != 0).any()


def test_the_vocabulary_grows_by_a_row_a_role(teach, finished, monkeypatch):
    seen = {}
    start_from = instruct.Run.start_from

    def and_look(self, before):
        start_from(self, before)
        seen.update(before=before, after=self.model)
        idx = torch.randint(0, 256, (2, 32))
        seen['same'] = [model.trunk(idx) for model in (before, self.model)]
        seen['weights'] = {k: v.clone() for k, v in self.model.state_dict().items()}
    monkeypatch.setattr(instruct.Run, 'start_from', and_look)
    said = teach('--max_steps=1')
    assert 'begins afresh' not in said
    first = sample.open_run(finished[0]).model
    V = first.config.vocab_size
    for name in ('wte.weight', 'lm_head.weight'):
        old, new = first.state_dict()[name], seen['weights'][name]
        assert len(new) == V + 2 and torch.equal(new[:V], old) and torch.allclose(new[V:], old.mean(0).expand(2, -1))
    assert torch.equal(*seen['same'])


# ---- a run

@pytest.mark.long
def test_a_taught_run_answers_and_is_told_beside_the_run_it_was(teach, finished, tmp_path, capfd, monkeypatch):
    said = teach('--max_steps=150', '--tuning_rate=1', '--tokens_per_step=1024')
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    answers, forgotten = result['evals']['answers'], result['evals']['forgotten']
    base = json.loads((finished[0] / 'result.json').read_text())
    assert answers['items'] == 60 and answers['accuracy_before'] == 0 and answers['loss'] < 0.5 * answers['loss_before']
    assert answers['ends'] > 0.9 > answers['ends_before'] and answers['accuracy'] > 0.3 and [*answers['per_kind']] == ['talk']
    assert forgotten['of_text'] > 0.45 and abs(forgotten['bpb_before'] / base['val_bpb'] - 1) < 0.05 and forgotten['bpb'] > forgotten['bpb_before']
    assert f'answers: {answers["accuracy"]:.4f} +- ' in said and 'accuracy_before 0' in said and 'forgotten bpb_before' in said
    run = sample.open_run(tmp_path / 'run')
    assert run.tokenizer.roles and run.model.config.vocab_size == 259 and result['config']['vocab_size'] == 259
    sample.main([str(tmp_path / 'run'), '--eval=answers,forgotten', '--device=cpu'])
    told = capfd.readouterr().out
    assert f'{answers["accuracy"]:8.4f}' in told and 'forgotten bpb: ' in told
    # again, on its own weights: no further ids, and the first run's text
    teach('--max_steps=1', '--out_dir=second', base=tmp_path / 'run')
    second = json.loads((tmp_path / 'second' / 'result.json').read_text())
    assert second['config']['vocab_size'] == 259 and second['settings']['base_data'] == result['settings']['base_data']
    # the chat answers what is typed, in turn, and reads what was said before
    typed, prompts = iter(['Ada, Bo', 'Who else?', '']), []
    monkeypatch.setattr('builtins.input', lambda prompt: next(typed))
    stream = sample_chat.stream
    monkeypatch.setattr(sample_chat, 'stream', lambda model, tokenizer, ids, *rest, **more: (prompts.append(ids), stream(model, tokenizer, ids, *rest, **more))[1])
    sample.main([str(tmp_path / 'run'), '--chat', '--temperature=0', '--device=cpu'])
    one, two = capfd.readouterr().out.splitlines()
    assert {one, two} <= {*NAMES} and [*prompts[1]] == chat_ids(run.tokenizer, [
        dict(role='user', content='Ada, Bo'), dict(role='assistant', content=one), dict(role='user', content='Who else?')])
    sample.main([str(tmp_path / 'run'), 'Ada, Bo', '--chat', '--temperature=0', '--device=cpu'])
    assert capfd.readouterr().out == f'{one}\n'


def test_items_and_verdicts_of_answers(teach, tmp_path):
    """Of a model that says what a list says: right word for word, ended in time, or neither."""
    teach('--max_steps=1')
    run = sample.open_run(tmp_path / 'run')
    s = SimpleNamespace(**run.settings | dict(evals='answers', eval_data='none'))
    measure = run.ideas.seam(sample.Measure)(s, run.tokenizer, prepare_data.open_data(run.state['data']))
    t, items = run.tokenizer, measure.items
    assert len(items) == 60 and all(prompt[0] == t.bos and prompt[-1] == t.roles['assistant'] for _, prompt, _ in items)
    assert all(answer[-1] in (t.bos, t.roles['user']) and t.decode(answer) in NAMES for *_, answer in items)
    assert items == run.ideas.seam(sample.Measure)(s, t, measure.data).items
    user, assistant = t.roles['user'], t.roles['assistant']
    answer = items[0][2][:-1]
    for said, expected in (([*answer, t.bos], (True, True)), ([*answer, user], (True, True)), ([32, *answer, t.bos], (True, True)),
                           ([*b'no', t.bos], (False, True)), ([*answer, assistant, t.bos], (False, False)),
                           ([*answer] + [32] * 40, (False, False))):
        asked = []
        run.model.generate = lambda idx, n, *rest: (asked.append(n), iter([torch.tensor([i]) for i in said[:n]]))[1]
        assert [*measure.verdicts(run.model, items[:1])] == [expected] and asked == [32], said
    losses = [measure.nats(run.model, [item])[0] for item in items[:3]]
    assert [*measure.nats(run.model, items[:3])] == pytest.approx(losses, rel=1e-5)
    _, prompt, answer = items[0]
    ids = torch.tensor([prompt + answer])
    by_hand = -run.model.logits(run.model.trunk(ids[:, :-1])).log_softmax(-1)[0, len(prompt) - 1:].gather(1, torch.tensor(answer)[:, None]).sum()
    assert losses[0] == pytest.approx(by_hand.item(), rel=1e-4)
    del run.model.generate                       # the model's own again
    few = measure.answers(run.model, 0, stop=lambda: True)
    assert few['share'] == pytest.approx(32 / 60) and few['items'] == 32


def test_a_taught_run_resumes_to_the_bit(teach, monkeypatch, tmp_path):
    def main(*args):
        return teach('--max_steps=6', *args)
    whole, parts = main('--out_dir=whole'), in_two_parts(lambda *a: main(*(a if '--init_from=resume' in a else a)), monkeypatch, 3)
    one, two = (sample.read_checkpoint(tmp_path / name) for name in ('whole', 'parts'))
    assert all(torch.equal(one['model'][k], two['model'][k]) for k in one['model']) and one['before'] == two['before']
    results = [json.loads((tmp_path / name / 'result.json').read_text())['evals'] for name in ('whole', 'parts')]
    assert results[0] == results[1] and 'accuracy_before' in results[1]['answers']


def test_where_it_is_refused(teach, main, finished, talk, tmp_path, corpus):
    with pytest.raises(UserError, match='instruct.py goes on from a finished run: name it with --init_from, or leave instruct.py out'):
        main(IDEA, f'--dataset=files:{talk}', f'--data_dir={tmp_path}')
    with pytest.raises(UserError, match='climb_data.py do not go together .a curriculum reads rows that begin anywhere'):
        main(IDEA, str(ROOT / 'config' / 'climb_data.py'), f'--init_from={finished[0]}', f'--dataset=files:{talk}')
    for args, why in ((['--chat'], 'was not taught to chat, its vocabulary has no roles: continue a text with --interactive'),
                      (['--chat', '--samples=2'], '--chat answers what is typed'), (['--chat', '--eval=bpb'], '--chat answers what is typed'),
                      (['--chat', '--export=html'], '--chat answers what is typed')):
        code, out, err = script('sample.py', finished[0], *args, cwd=tmp_path)
        assert code == 2 and why in err and 'Traceback' not in err, err

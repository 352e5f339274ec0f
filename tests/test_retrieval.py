"""Retrieval: BM25 and passages of a folder in sample.py --retrieve, config/retrieval.py, config/facts.py."""
import itertools
import json
import math
import os
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prepare_data
import sample
import train
from config import facts as facts_of, retrieval, sample_retrieve
from conftest import ROOT, TINY, in_two_parts, script, stack
from prepare_data import ByteTokenizer, UserError

TEXTS = ['Mia has a red kite, a kite of silk.', 'Tom has a drum. The drum is red and the drum is old.', 'Nobody was there.',
         'A kite', 'The lake is deep and cold, and Tom can swim.']


def by_hand(texts, query, k1=1.2, b=0.75):
    """BM25 as it is written in Robertson and Zaragoza 2009, with idf log(1 + ...)."""
    words = [re.findall(r'\w+', text.lower()) for text in texts]
    mean, scores = sum(map(len, words)) / len(words), []
    for doc in words:
        score = 0
        for term in {*re.findall(r'\w+', query.lower())}:
            df, tf = sum(term in other for other in words), doc.count(term)
            idf = math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
            score += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(doc) / mean))
        scores.append(score)
    return scores


def index_of(texts):
    return sample_retrieve.BM25.of((i, sample_retrieve.terms_of(text)) for i, text in enumerate(texts))


# ---- BM25

@pytest.mark.parametrize('query', ['a red kite', 'Tom TOM tom', 'the drum and the lake', 'nobody', 'submarine', ''])
def test_scores_are_those_of_the_formula(query):
    expected = by_hand(TEXTS, query)
    found, scores = index_of(TEXTS).best(sample_retrieve.terms_of(query), 9)
    assert np.allclose(scores, [expected[i] for i in found], rtol=1e-12)
    assert [*found] == [i for i in sorted(range(5), key=lambda i: (-expected[i], i)) if expected[i]]


def test_equals_come_in_order_and_a_document_is_not_its_own_passage():
    index = index_of(['kite drum', 'kite lake', 'kite drum', 'lake'])
    assert [*index.best(sample_retrieve.terms_of('drum kite'), 2)[0]] == [0, 2]
    assert [*index.best(sample_retrieve.terms_of('drum kite'), 2, but=(0, 1))[0]] == [2, 1]
    assert [*index.best(sample_retrieve.terms_of('drum kite'), 9, most=2)[0]] == [0, 2]      # the rarer word alone is looked up


def test_what_is_taken_out_and_in_is_as_if_made_at_once():
    dice = random.Random(1)
    texts = [' '.join(dice.choices('kite drum lake tree house shoe'.split(), k=dice.randrange(0, 9))) for _ in range(40)]
    kept = [text for i, text in enumerate(texts) if i % 3]
    place = np.array([-1 if i % 3 == 0 else i - i // 3 - 1 for i in range(40)])
    more = 'kite shoe', 'lake'
    moved = sample_retrieve.BM25.of(((len(kept) + i, sample_retrieve.terms_of(text)) for i, text in enumerate(more)), index_of(texts), place)
    whole = index_of([*kept, *more])
    assert all(np.array_equal(getattr(moved, name), getattr(whole, name)) for name in sample_retrieve.BM25.ARRAYS)


# ---- passages

def test_passages_end_where_the_text_does():
    def parts(text, size):
        ids = ByteTokenizer().encode(text)
        ends = sample_retrieve.cut(ids, ByteTokenizer(), size)
        return [bytes(ids[a:b]).decode() for a, b in itertools.pairwise(ends)]
    assert parts('', 9) == [] and parts('a b c', 9) == ['a b c']
    assert parts('One. Two three.\n\nFour. Five six', 20) == ['One. Two three.\n\n', 'Four. Five six']
    assert parts('One two. Three four five', 12) == ['One two.', ' Three four', ' five']
    for text in ('å' * 50, 'x' * 99, 'a\n' * 60, 'word ' * 40 + '\n\n' + 'Ende. ' * 9):
        assert ''.join(parts(text, 16)) == text and max(len(p.encode()) for p in parts(text, 16)) <= 16


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / 'notes'
    (folder / 'sub').mkdir(parents=True)
    (folder / 'a.txt').write_text('Mia has a red kite.\n\nThe lake is cold and deep.\n')
    (folder / 'sub' / 'b.md').write_text('\ufeffTom has a drum. Zoë 🙂 listens.\r\n', newline='')
    return folder


class Told(list):
    """Passages of the folder, opened again, and what was said meanwhile."""

    def open(self, folder, size=24, kept='kept', tokenizer=ByteTokenizer()):
        self.clear()
        return sample_retrieve.Passages(folder, tokenizer, size, folder.parent / kept, self.append)


@pytest.fixture
def told():
    return Told()


def found(passages, prompt, k=9):
    return [(name, text) for _, name, _, text in passages.best(prompt, k)]


def test_a_folder_is_read_and_kept(folder, told, monkeypatch):
    first = told.open(folder)
    assert found(first, 'kite') == [('a.txt', 'Mia has a red kite.')] and not told
    assert found(first, 'a DRUM')[0] == ('sub/b.md', 'Tom has a drum.') and found(first, 'Zoë 🙂') == [('sub/b.md', 'Zoë 🙂 listens.')]
    (score, name, number, text), = first.best('deep', 9)
    assert (name, number, text) == ('a.txt', 1, 'The lake is cold and') or text.endswith('deep.')
    assert not {*os.listdir(folder)} - {'a.txt', 'sub'}         # nothing is written where the user's text is
    monkeypatch.setattr(sample_retrieve, 'terms_of', lambda text: pytest.fail('read again') if 'Mia' in text else np.zeros(1, np.uint64))
    again = told.open(folder)
    assert isinstance(again.index.terms, np.memmap) and isinstance(again.spans, np.memmap) and not told
    assert again.files == first.files


def test_files_that_are_new_changed_or_gone(folder, told, monkeypatch):
    told.open(folder)
    (folder / 'c.txt').write_text('A shoe under the tree.')
    (folder / 'a.txt').write_text('Mia has a blue boat.')
    passages = told.open(folder)
    assert found(passages, 'shoe') == [('c.txt', 'A shoe under the tree.')] and found(passages, 'boat') == [('a.txt', 'Mia has a blue boat.')]
    assert not found(passages, 'kite') and found(passages, 'drum')
    (folder / 'a.txt').unlink()
    os.rename(folder / 'c.txt', folder / 'd.txt')
    passages = told.open(folder)
    assert not found(passages, 'boat') and found(passages, 'shoe') == [('d.txt', 'A shoe under the tree.')] and found(passages, 'drum')
    read, of = [], sample_retrieve.Passages.passages
    monkeypatch.setattr(sample_retrieve.Passages, 'passages', lambda self, f: read.append(f.name) or of(self, f))
    os.utime(folder / 'd.txt')                                  # another time, the same text
    assert found(told.open(folder), 'shoe') and not read
    (folder / 'd.txt').write_text('A shoe under the roof.')
    assert found(told.open(folder), 'roof') and len(read) == 1
    whole = told.open(folder, kept='afresh')
    assert all(np.array_equal(getattr(whole.index, name), getattr(told.open(folder).index, name)) for name in sample_retrieve.BM25.ARRAYS)


def test_another_size_or_vocabulary_is_another_index(folder, told):
    a, b = told.open(folder, 24), told.open(folder, 12)
    assert len(b.spans) > len(a.spans) and not told and max(np.diff(b.spans, axis=1)) <= 12


@pytest.mark.parametrize('how', ['cut', 'flip', 'gone', 'json', 'empty', 'list', 'count'])
def test_a_damaged_index_is_made_again(folder, told, how):
    told.open(folder)
    path = folder.parent / 'kept' / ('index.json' if how in ('json', 'list', 'count') else 'counts.npy')
    raw = bytearray(path.read_bytes())
    count = raw.replace(b'"passages": 2', b'"passages": 9')
    assert count != raw or how != 'count'
    raw[-1] ^= 1
    path.unlink()
    if how != 'gone':
        path.write_bytes(dict(cut=raw[:-3], flip=raw, json=b'{', list=b'[]', empty=b'', count=count)[how])
    assert found(told.open(folder), 'kite') and len(told) == 1 and 'damaged' in told[0]
    assert found(told.open(folder), 'kite') and not told


def test_an_index_is_written_whole_or_not_at_all(folder, told, monkeypatch):
    told.open(folder)
    before = {p.name: p.read_bytes() for p in (folder.parent / 'kept').iterdir()}
    (folder / 'c.txt').write_text('A shoe.')

    def full(path, array, *_):
        raise OSError(28, 'No space left on device', str(path))
    with monkeypatch.context() as m:
        m.setattr(np, 'save', full)
        assert found(told.open(folder), 'shoe') and len(told) == 1 and 'not kept' in told[0]     # from memory
    assert before == {p.name: p.read_bytes() for p in (folder.parent / 'kept').iterdir()}
    assert sorted(os.listdir(folder.parent)) == ['kept', 'notes']


def test_what_is_no_text_is_left_out_with_a_word(folder, told, monkeypatch):
    outside = folder.parent / 'secret.txt'
    outside.write_text('The password is swordfish.')
    os.symlink(outside, folder / 'leak.txt')
    os.symlink(folder.parent, folder / 'up')
    os.symlink('gone', folder / 'dangling')
    os.mkfifo(folder / 'pipe')
    (folder / 'latin.txt').write_bytes('Zoë sings'.encode('latin-1'))
    (folder / 'wide.txt').write_bytes('Zoë sings'.encode('utf-16'))
    (folder / 'noise').write_bytes(b'sings \0\0')
    (folder / 'cut.txt').write_bytes('sings ë'.encode()[:-1])
    (folder / '.hidden').write_text('sings')
    (folder / 'empty.txt').write_text('')
    (folder / 'big.txt').write_text('sings' * 60)
    os.mkdir(folder / 'run')
    (folder / 'run' / 'ckpt.pt').write_text('sings')
    (folder / 'run' / 'metrics.jsonl').write_text('sings')
    (folder / os.fsdecode(b'odd\xff\x1b[31m.txt')).write_text('odd one')
    monkeypatch.setattr(sample_retrieve, 'MOST_FILE', 256)
    passages = told.open(folder)
    assert not found(passages, 'swordfish') and not found(passages, 'sings') and found(passages, 'kite')
    assert found(passages, 'odd one') and told == ['left out: big.txt, it is larger than 0 MiB; and 5 more']
    passages.before('odd', 1, 128, 9)
    assert '\x1b' not in told[-1] and 'odd' in told[-1]
    assert found(told.open(folder), 'odd one')                  # names of any bytes are kept and read again
    assert {name for name, of in passages.files.items() if 'left_out' in of} == {'big.txt', 'pipe', 'latin.txt', 'wide.txt', 'noise', 'cut.txt'}
    with pytest.raises(UserError, match='is no folder'):
        told.open(folder / 'a.txt')


def test_a_file_that_becomes_a_link_or_changes_is_not_read(folder, told):
    passages = told.open(folder)
    (folder.parent / 'secret.txt').write_text('The password is swordfish, and more of that.')
    (folder / 'a.txt').unlink()
    os.symlink(folder.parent / 'secret.txt', folder / 'a.txt')
    assert not found(passages, 'kite') and 'a.txt' in told[0]
    seen = os.stat(folder / 'sub' / 'b.md')
    os.rename(folder / 'sub', folder.parent / 'moved')
    os.symlink(folder.parent / 'moved', folder / 'sub')
    assert not found(passages, 'drum') and 'a link' in told[-1]
    os.unlink(folder / 'sub')
    os.rename(folder.parent / 'moved', folder / 'sub')
    assert found(passages, 'drum') and seen.st_mtime_ns == os.stat(folder / 'sub' / 'b.md').st_mtime_ns
    (folder / 'sub' / 'b.md').write_text('no drum')
    assert not found(passages, 'drum') and 'changed' in told[-1]


def test_long_files_are_read_in_blocks(folder, told, monkeypatch):
    words = [f'w{i}å' for i in range(400_000)]
    (folder / 'long.txt').write_text(' '.join(words))           # one line of 3.5 MB
    passages = told.open(folder, size=64)
    for i in (0, 1, 199_999, 399_999):
        (name, text), = found(passages, words[i])
        assert words[i] in text.split()


# ---- sample.py

def test_passages_before_the_prompt_fit_the_context(folder, told):
    passages = told.open(folder)
    ids = passages.before('red kite drum', 3, 83, 9)
    text = ByteTokenizer().decode(ids)
    assert text.endswith('Mia has a red kite.\n\n') and len(ids) <= 60 and len(told) == text.count('\n\n') == 2
    assert not passages.before('red kite', 3, 30, 99) and not passages.before('submarine', 3, 128, 9) and 'no passage' in told[-1]


def test_the_command(finished, folder, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / 'run')
    args = 'sample.py', run, 'Mia lost', '--retrieve', folder, '--max_new_tokens=8', '--temperature=0'
    code, out, err = script(*args, cwd=tmp_path)
    assert code == 0 and out.startswith('Mia lost') and re.match(r' +\d+\.\d\d  a.txt, passage 1: Mia has a', err), err
    assert [p.name for p in run.iterdir() if p.is_dir() and p.name.startswith('passages-notes-')]
    assert script(*args, cwd=tmp_path) == (code, out, err)
    for more, said in ((['--eval=bpb'], 'give one'), (['--passages=0'], '--passages is 0')):
        code, _, err = script(*args, *more, cwd=tmp_path)
        assert code == 2 and said in err and 'Traceback' not in err
    code, _, err = script('sample.py', run, '--retrieve', folder, cwd=tmp_path)
    assert code == 2 and 'give one' in err
    code, _, err = script('sample.py', run, 'Mia', '--retrieve', folder / 'gone', cwd=tmp_path)
    assert code == 2 and 'is no folder' in err


# ---- config/facts.py and config/retrieval.py

def test_held_out_people_are_in_no_training_text():
    held = [*facts_of.facts(300, 7, held=True)]
    training = ' '.join(one['note'] + one['question'] + one['answer'] for one in facts_of.facts(3000, 7))
    known = {*re.findall(r'\w+', training)}
    assert not {one['name'] for one in held} & known and [*facts_of.facts(9, 7)] == [*itertools.islice(facts_of.facts(3000, 7), 9)]
    for one in held:
        assert one['answer'][:-1] in one['note'] and one['name'] in one['question'] and {*one} == {'kind', 'name', 'note', 'question', 'answer'}
        assert one['kind'] not in facts_of.INVENTED or one['answer'][:-1] not in known


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    """Facts about 120 people, prepared in bytes, and the settings of a Stream."""
    data_dir = tmp_path_factory.mktemp('facts')
    corpus = stack('facts', dataset='facts', tokenizer='bytes', data_dir=str(data_dir), people=120)
    corpus.build(quiet=True)
    s = SimpleNamespace(seed=1, weights='', retrieved=2, passage_tokens=60, tokens_per_step=512)
    return corpus.opened(), s


def test_the_passages_of_a_document_are_the_best_of_other_documents(text):
    data, s = text
    texts, bounds = [*data.texts('train')], data.bounds('train')
    spans = retrieval.retrieve(data, 2, 60)
    assert spans.shape == (240, 2) and isinstance(retrieval.retrieve(data, 2, 60), np.memmap) and (spans['length'] <= 60).all()
    owner = np.searchsorted(bounds, spans['start'], side='right') - 1
    assert (owner != np.arange(240)[:, None]).all() and (spans['start'] > bounds[owner]).all()
    whole = retrieval.retrieve(data, 2, 400)                    # then a passage is a document
    owner = np.searchsorted(bounds, whole['start'], side='right') - 1
    assert (owner[1::2, 1] == np.arange(0, 240, 2)).mean() > 0.7        # that of a question is its note; of so few not always
    for number in range(1, 60, 2):
        scores = by_hand(texts, texts[number])
        scores[number] = 0
        assert [*owner[number]] == sorted(range(240), key=lambda i: (-scores[i], i))[1::-1]        # the best one last
    (data.folder / 'train.retrieved-2-60.npy').write_bytes(b'damaged')
    assert np.array_equal(retrieval.retrieve(data, 2, 60), spans)


def test_a_document_has_its_passages_before_it_and_they_are_no_targets(text):
    data, s = text
    stream, plain, decode = retrieval.Stream(data, s), train.Stream(data, s), data.tokenizer.decode
    spans, bounds = retrieval.retrieve(data, 2, 60), data.bounds('train')
    ids, number = stream.document(bounds[7]), 7
    marked = ids < 0
    own, before = decode(ids[~marked][1:].tolist()), decode((~ids[marked]).tolist())
    tokens = data.tokens['train'].tolist()
    assert own == [*data.texts('train', [7])][0] and ids[0] == data.tokenizer.bos and not marked[0]
    assert before == ''.join(decode(tokens[a:a + n]) + '\n\n' for a, n in spans[7].tolist())
    T, seen = 64, []
    assert stream.epoch_tokens() > 1.5 * plain.epoch_tokens() and np.array_equal(stream.epoch(0)[0], plain.epoch(0)[0])
    for row in range(20):
        batch = stream.batch(row, 1, T)
        coded = stream.rows(row, 1, T)
        assert (batch['idx'] >= 0).all() and (batch['targets'] >= -1).all()
        assert (batch['idx'].numpy() == np.where(coded < 0, ~coded, coded)[:, :-1]).all()
        assert (batch['targets'].numpy() == np.where(coded < 0, -1, coded)[:, 1:]).all()
        seen.append((batch['targets'] < 0).float().mean().item())
    assert 0.3 < np.mean(seen) < 0.9 and (stream.first_rows(4, T) >= 0).all()
    first = stream.read(0, 5000)                                # one document after the other, each as `document` has it
    starts, places = stream.epoch(0)
    assert np.array_equal(first[:places[9]], np.concatenate([stream.document(start) for start in starts[:9]]))
    assert np.array_equal(first[700:1700], stream.read(700, 1000))


def test_it_resumes_to_the_bit(main, monkeypatch, corpus):
    idea = str(ROOT / 'config' / 'retrieval.py')
    main(idea, '--out_dir=whole', '--max_steps=4')
    in_two_parts(main, monkeypatch, 2, idea, '--max_steps=4')
    a, b = (torch.load(f'{out}/ckpt.pt', weights_only=True)['model'] for out in ('whole', 'parts'))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_questions_with_the_note_without_and_with_the_wrong_one():
    s = SimpleNamespace(evals='with,without,wrong', eval_data='nowhere', questions=60, data_seed=3)
    measure = retrieval.Measure(s, ByteTokenizer())
    items, questions, answers, before, share = measure.asked
    decode = ByteTokenizer().decode
    assert share > 0.95 and measure.named == ['with', 'without', 'wrong'] and len(answers) == 60
    rows = {how: retrieval.preceded(items, before[how]) for how in before}
    for how, made in rows.items():
        for i in range(60):
            right, other = (made['ids'][made['start'][2 * i + j]:made['start'][2 * i + j + 1]].tolist() for j in (0, 1))
            seam = made['seam'][i]
            assert right[:seam] == other[:seam] and right[seam] != other[seam] and right[0] == ByteTokenizer.bos
            right, other, note = decode(right), decode(other), decode(before[how][i])
            assert right == f'{note}{decode(questions[i])} {answers[i]}' and note.endswith('\n\n' if note else '')
            stands = {'with': (True, None), 'without': (False, False), 'wrong': (None, True)}[how]
            for text, is_there in zip((answers[i], other.split('Answer: ')[1]), stands):
                assert is_there is None or (text[:-1] in note) == is_there


def test_a_model_that_copies_is_right_with_the_note_and_wrong_with_the_wrong_one(monkeypatch):
    """option_costs and continuations of one that takes for likely what stands in the text before it."""
    s = SimpleNamespace(evals='with', eval_data='nowhere', questions=60, data_seed=3)
    measure, decode = retrieval.Measure(s, ByteTokenizer()), ByteTokenizer().decode

    def costs(model, items, first, last):
        texts = (decode(ids.tolist()).split('Answer: ') for ids in np.split(items['ids'], items['start'][1:-1]))
        return np.array([0.0 if answer[:-1] in note else 1.0 for note, answer in texts])[:2 * last]

    def continuations(model, tokenizer, prompts, *_, done, **options):
        assert done('Mia.') and not done('Mia')
        return [[*b' Mia.'] for _ in prompts], [True] * len(prompts)
    monkeypatch.setattr(measure, 'option_costs', costs)
    monkeypatch.setattr(sample, 'continuations', continuations)
    right, none, wrong = (measure.answered(how, torch.nn.Linear(1, 1)) for how in ('with', 'without', 'wrong'))
    assert right['accuracy'] == 1 and right['exact'] == 0 and right['items'] == 60 and right['chance'] == 0.5
    assert none['accuracy'] == 0 and none['ties'] == 60 and wrong['accuracy'] == 0 and wrong['ties'] == 0
    assert measure.answered('with', torch.nn.Linear(1, 1), 20)['items'] == 20
    assert 'word for word' in [*measure.lines('with', right)][-1]


def test_the_passages_are_found_as_the_data_is_prepared(tmp_path):
    corpus = stack('facts', 'retrieval', dataset='facts', tokenizer='bytes', data_dir=str(tmp_path), people=60)
    made = corpus.build(quiet=True) / 'train.retrieved-1-96.npy'
    before = made.stat().st_mtime_ns
    retrieval.retrieve(corpus.opened(), 1, 96)
    assert made.stat().st_mtime_ns == before

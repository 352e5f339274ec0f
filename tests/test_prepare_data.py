"""prepare_data.py: nothing is lost on the way from text to bins, and every mistake gets its one sentence."""
import errno
import functools
import gzip
import http.server
import json
import lzma
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import prepare_data as pd
from conftest import stack
from prepare_data import UserError

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared' / 'data'
HARD = ['', '\0', ' ', '  a  b ', '\ta\t', '\r\n\r\n', '\n\n\nx\n', '<s>', '</s><unk>', '<|endoftext|>',
        '<0x0A>', '\u2581', 'a\u2581\u2581 \u2581b', '\ue009x\ue00a', '\u2585', '\ufeff', '\uffff',
        '\U0010ffff', 'a\u0301e\u0301',
        '🙂👨‍👩‍👧', '*MOT:\tno.\n*CHI:\tyes?', '    def f(x):\n\t\treturn x_1\n', 'ﬁ ﷺ Ⅷ ½ Å',
        '한국어 日本語 עברית']
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason='../shared/data is not here')


def prose(n, seed=0):
    """n different paragraphs."""
    rng = random.Random(seed)
    words = 'the a dog cat house tree saw ran gave took lost found red small happy and then but she'.split()
    return [' '.join(rng.choices(words, k=30)) + f' {seed} {i}.' for i in range(n)]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes({'.gz': gzip.compress, '.xz': lzma.compress}.get(path.suffix, bytes)(data))
    return path


def prepare(path, out, *ideas, **settings):
    """A folder's text, prepared with these ideas; a paragraph is a document."""
    settings = dict(dataset=f'files:{path}', data_dir=out, tokenizer='bytes', overwrite=True, min_doc_bytes=0) | settings
    corpus = stack(*ideas, **settings)
    corpus.build(quiet=True)
    return corpus.open()


def texts(data, split):
    tokens, starts = data.tokens[split], data.docs[split]['start'].tolist()
    assert all(tokens[s] == data.meta['bos'] for s in starts)
    return [data.tokenizer.decode(tokens[a + 1:b]) for a, b in zip(starts, starts[1:] + [len(tokens)])]


def refuses(match, call, *args, **kwargs):
    with pytest.raises(UserError, match=match) as e:
        call(*args, **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)


@pytest.fixture
def small(tmp_path):
    """A prepared folder of 60 paragraphs, and its source."""
    source = write(tmp_path / 'src' / 'small.txt', '\n\n'.join(prose(60)))
    return prepare(source, tmp_path / 'data'), source


# Tokenizers


@pytest.fixture(scope='module')
def bpe():
    return pd.BPETokenizer.train(['\n'.join(prose(200)), '*MOT:\tno.\n*CHI:\tyes?\n' * 50], 400)


@pytest.fixture(params=['bpe', 'bytes', 'gpt2'])
def tokenizer(request):
    if request.param == 'gpt2':
        if not (SHARED / 'gpt2').is_dir():
            pytest.skip('../shared/data/gpt2 is not here')
        return pd.GPT2Tokenizer.find([SHARED / 'gpt2'])
    return request.getfixturevalue('bpe') if request.param == 'bpe' else pd.ByteTokenizer()


def test_lossless(tokenizer):
    rng = random.Random(1)
    ranges = [(0, 128), (0, 0x300), (0x2500, 0x2600), (0xE000, 0xE010), (0x1F300, 0x1F700), (0, 0xD800),
              (0xE000, 0x110000)]
    random_texts = [''.join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))
                    .encode('utf-8', 'ignore').decode() for _ in range(1500)]
    every = [''.join(map(chr, range(a, a + 64))) for a in range(0, 0x3000, 64)]
    batch = HARD + every + random_texts
    for text, row in zip(batch, tokenizer.encode_batch(batch), strict=True):
        ids = tokenizer.encode(text)
        assert ids == row.tolist()
        assert tokenizer.decode(ids) == text
        assert b''.join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert tokenizer.bos not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.kind != 'bpe' or tokenizer.unk not in ids


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
@pytest.mark.parametrize('rare', ['\t', '\n', ' ', '\t\n', '\t \n', 'é', '\u2581\ue009', '\0\u2585'])
def test_every_text_comes_back_whatever_was_rare_in_training(kind, rare):
    """What training saw once in 30,000 characters, or never, is in every text afterwards."""
    rng, letters = random.Random(f'{kind}{rare}'), [*{*'abcdefgh \n\té'} - {*rare}]
    words = [''.join(rng.choices('abcdefgh', k=rng.randrange(2, 8))) for _ in range(300)]
    gaps = [c for c in ' \n\t' if c not in rare] or ['.']
    training = ''.join(word + rng.choice(gaps) for word in rng.choices(words, k=6000)) + rare * (len(rare) < 3)
    tokenizer = pd.BPETokenizer.train([training], 330, kind)
    alphabet = [*letters, *rare, *'  \n\t\r🙂\u0301', chr(0xE00A)]
    batch = HARD + [training, rare, f'a{rare}b{rare}', *(''.join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(300))]
    for text, row in zip(batch, tokenizer.encode_batch(batch), strict=True):
        assert tokenizer.encode(text) == row.tolist()
        assert b''.join(map(tokenizer.token_bytes, row)) == text.encode() and tokenizer.decode(row) == text


def test_marks_stay_with_their_letters():
    """Hindi, and letters in two characters, are as many words and about as many tokens as they look."""
    assert pd.BPETokenizer.words.findall('हिन्दी में cafe\u0301s! e\u0301\u0302ta 1') == ['हिन्दी', ' में', ' cafe\u0301s', '!', ' e\u0301\u0302ta', ' 1']
    words = ['élève', 'été', 'première', 'où', 'déjà', 'même', 'être', 'âgé', 'naïf', 'forêt']
    composed = ' '.join(random.Random(1).choices(words, k=4000))
    apart = unicodedata.normalize('NFD', composed)
    one, two = (len(pd.BPETokenizer.train([text], 310).encode(text)) for text in (composed, apart))
    assert two < 1.3 * one


def test_bpe_learns_line_ends_and_labels(bpe):
    assert bpe.vocab_size == 400
    assert [bpe.token_bytes(i) for i in bpe.encode('no.\n*CHI:\tyes')] == [b'no', b'.\n*CHI:\t', b'yes']


def test_vocabulary_too_large_or_small():
    message = refuses('too large', pd.BPETokenizer.train, ['hello there ' * 50], 8192)
    largest = int(message.split('_size=')[1].split()[0])
    assert pd.BPETokenizer.train(['hello there ' * 50], largest).vocab_size == largest
    refuses('too small', pd.BPETokenizer.train, ['hello there ' * 50], 100)


def test_gpt2_without_files_or_network(tmp_path, monkeypatch):
    import tiktoken
    def no_network(name):
        raise ConnectionError('no network')
    monkeypatch.setattr(tiktoken, 'get_encoding', no_network)
    assert '--gpt2_dir' in refuses('vocab.bpe', pd.GPT2Tokenizer.find, [tmp_path])


def test_unigram_is_lossless_and_another_model():
    sample = [*prose(300), '*MOT:\tno.\n*CHI:\tyes?\n' * 50]
    unigram, bpe = (pd.BPETokenizer.train(sample, 330, kind) for kind in ('unigram', 'bpe'))
    assert unigram.blob != bpe.blob and all(unigram.decode(unigram.encode(text)) == text for text in HARD + sample)


# Documents


def split_text(text, limit=pd.Options.max_doc_bytes, block=7):
    report, head = Counter(), text[:1 << 20]
    boundary = next((b for b in pd.BOUNDARY.values() if b.search(head)), pd.BOUNDARY['whole'])
    blocks = (text[i:i + block] for i in range(0, len(text), block))
    return list(pd.split_documents(blocks, boundary, limit, report)), report


@pytest.mark.parametrize('block', [1, 5, 64, 10_000])
@pytest.mark.parametrize('text, expected', [
    ('one\ntwo\n\nthree\r\n\r\n \t\n\nfour\n', ['one\ntwo', 'three', 'four']),
    ('a\n\nb<|endoftext|>\nc\n<|endoftext|>\n<|endoftext|>d', ['a\n\nb', 'c', 'd']),
    ('= = = A = = =\nx\n\ny\n\n\n= = = B = = =\nz\n', ['= = = A = = =\nx\n\ny', '= = = B = = =\nz']),
    ('before\n= = = A = = =\nx = = = no = = =\n', ['before', '= = = A = = =\nx = = = no = = =']),
    ('\n\n    indented\n    code', ['    indented\n    code']),
    ('A:\tyes\r\nB:\tno', ['A:\tyes\r\nB:\tno']),
    ('', []), ('\n \n', [])])
def test_layouts(text, expected, block):
    assert [d.decode() for d in split_text(text.encode(), block=block)[0]] == expected


def test_empty_documents_are_counted():
    assert split_text(b'a<|endoftext|>\n<|endoftext|>b<|endoftext|>')[1]['empty documents dropped'] == 1


@pytest.mark.parametrize('text', [
    '\n'.join(prose(300)), 'no space at all' * 2000, 'é🙂' * 3000,
    '\n'.join(prose(30)) + '  tail  ' * 900 + 'x',
    '= = = A = = =\n' + '\n\n\n\n\n'.join(prose(90))])
def test_passages_join_to_the_text(text):
    for block in (100, 1 << 18):
        docs, report = split_text(text.encode(), 1000, block)
        assert b''.join(docs) == text.encode()
        assert max(map(len, docs)) <= 1000 and min(map(len, docs[:-1])) > 490
        assert all(d.decode() is not None for d in docs)         # no letter is cut in two
        assert report == {'documents cut into passages': 1, 'passages they were cut into': len(docs)}


def test_passages_end_at_lines():
    docs, _ = split_text('\n'.join(prose(100)).encode(), 1000)
    assert all(d.endswith(b'\n') for d in docs[:-1])


# Inputs and splits


def test_babylm_layout_keeps_splits_and_sources(tmp_path):
    sizes = {'a.train.xz': 20, 'a.dev.gz': 3, 'a.test': 2, 'b.train': 20, 'b.dev': 3, '.hidden.train': 9}
    for seed, (name, n) in enumerate(sizes.items()):
        write(tmp_path / 'src' / name, '\n\n'.join(prose(n, seed)))
    write(tmp_path / 'src' / 'README.md', 'not a part')
    data = prepare(tmp_path / 'src', tmp_path)
    assert data.meta['sources'] == ['a', 'b'] and data.meta['ignored'] == ['README.md']
    assert {s: len(d) for s, d in data.docs.items()} == {'train': 40, 'val': 6, 'test': 2}
    assert data.docs['train']['source'].tolist() == [0] * 20 + [1] * 20
    assert data.meta['splits']['val']['sources']['a']['documents'] == 3


def test_texts_come_back_whole(small):
    data, source = small
    paragraphs = source.read_text().split('\n\n')
    assert sorted(texts(data, 'train') + texts(data, 'val')) == sorted(paragraphs)
    counts = data.meta['splits']
    assert sum(s['words'] for s in counts.values()) == sum(len(p.split()) for p in paragraphs)
    assert sum(s['bytes'] for s in counts.values()) == sum(len(p.encode()) for p in paragraphs)
    assert data.docs['train'].dtype == pd.DOC and (data.docs['train']['difficulty'] == 0).all()
    assert counts['train']['tokens'] == len(data.tokens['train'])


def test_hash_split_is_stable(tmp_path):
    first = prepare(write(tmp_path / 'x.txt', '\n\n'.join(prose(500))), tmp_path, val_fraction=0.1)
    longer = write(tmp_path / 'y.txt', '\n\n'.join(prose(100, 7) + prose(500)))
    more = prepare(longer, tmp_path, val_fraction=0.1)
    assert 25 < len(texts(first, 'val')) < 80
    assert set(texts(first, 'val')) <= set(texts(more, 'val'))           # new text moves no old document
    assert not set(texts(more, 'val')) & set(texts(more, 'train'))


def test_small_corpus_still_gets_one_validation_document(tmp_path):
    data = prepare(write(tmp_path / 'x.txt', '\n\n'.join(prose(10))), tmp_path, val_fraction=1e-9)
    assert (len(texts(data, 'val')), len(texts(data, 'train'))) == (1, 9)


def test_training_documents_found_in_validation_are_dropped(tmp_path):
    train, dev = prose(20), prose(3, 5)
    write(tmp_path / 's' / 'a.train', '\n\n'.join(train[:10] + dev + train[10:]))
    write(tmp_path / 's' / 'a.dev', '\n\n'.join(dev))
    data = prepare(tmp_path / 's', tmp_path)
    assert texts(data, 'train') == train and texts(data, 'val') == dev
    assert data.meta['report'] == {'training documents dropped, identical to held-out ones': 3}


@pytest.mark.parametrize('name', ['x.jsonl', 'x.jsonl.gz', 'x.jsonl.xz'])
def test_jsonl(tmp_path, name):
    rows = [p.replace(' ', '\n\n', 1) for p in prose(30)]                # blank lines inside a row stay
    path = write(tmp_path / name, '\n'.join(json.dumps(dict(story=r, n=1)) for r in rows))
    data = prepare(path, tmp_path)
    assert sorted(texts(data, 'train') + texts(data, 'val')) == sorted(rows)
    refuses('only story, n: name the field', prepare, path, tmp_path, text_field='body')


def test_bad_json_line(tmp_path):
    path = write(tmp_path / 'x.jsonl', '{"text": "a"}\n{"text": \n')
    refuses('x.jsonl line 2', prepare, path, tmp_path)


def test_parquet(tmp_path, monkeypatch):
    path = write(tmp_path / 'x.parquet', b'PAR1')
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    refuses('pip install pyarrow', prepare, path, tmp_path)


def test_parquet_where_pyarrow_is(tmp_path):
    pa = pytest.importorskip('pyarrow')
    from pyarrow.parquet import write_table
    for split, n in (('train', 40), ('dev', 5)):
        rows = prose(n, n)
        write_table(pa.table(dict(story=rows, n=list(range(n)))), tmp_path / f'tales.{split}.parquet')
    data = prepare(tmp_path, tmp_path / 'out')
    assert texts(data, 'train') == prose(40, 40) and texts(data, 'val') == prose(5, 5)


@pytest.mark.parametrize('names', [('train.txt', 'val.txt', 'test.txt'), ('wiki.train.tokens', 'wiki.valid.tokens', 'wiki.test.tokens'),
                                   ('w_train.txt', 'w_val.txt', 'w_test.txt')])
def test_split_names_without_a_source(tmp_path, names):
    for seed, name in enumerate(names):
        write(tmp_path / 'in' / name, '\n\n'.join(prose(20, seed)))
    data = prepare(tmp_path / 'in', tmp_path / 'data')
    assert [set(texts(data, split)) == set(prose(20, seed)) for seed, split in enumerate(('train', 'val', 'test'))] == [True] * 3


def test_a_json_row_without_text_is_named_by_its_line(tmp_path):
    write(tmp_path / 'x.jsonl', '{"text": "a b"}\n{"txt": "c"}\n')
    refuses('line 2 has no field', prepare, tmp_path / 'x.jsonl', tmp_path / 'data')


def found(folder, **files):
    """(source, split) of the parts of a folder with files of these texts."""
    for name, text in files.items():
        write(folder / name, text)
    parts, left = pd.find_parts(folder)
    return [(part.source, part.split) for part in parts], left


def test_a_split_is_a_name_only_where_all_files_have_one(tmp_path):
    essays = {f'essay {i}.txt': 'x' for i in range(6)} | {'the_night_train.txt': 'x', 'README.md': 'x', 'LICENSE': 'x'}
    parts, left = found(tmp_path / 'essays', **essays)
    assert len(parts) == 7 and {split for _, split in parts} == {''} and left == ['LICENSE', 'README.md']
    for name in ('litmus_test.txt', 'second-val.txt'):
        parts, _ = found(tmp_path / name, **{'the_night_train.txt': 'x', name: 'x'})
        assert {split for _, split in parts} == {''}
    parts, _ = found(tmp_path / 'w', **{'w_train.txt': 'x', 'w_val.txt': 'x', 'readme.txt': 'x'})
    assert parts == [('w', 'val'), ('w', 'train')]
    write(tmp_path / 'mixed/a.train', 'x')
    refuses('a.train has a split in its name and .*notes.txt has none', found, tmp_path / 'mixed', **{'notes.txt': 'x'})
    assert found(tmp_path / 'plain', **{'license_to_kill.txt': 'x', 'test.txt': 'x', 'a,b:c+d.txt': 'x'})[0] == [
        ('a-b-c-d', ''), ('license_to_kill', ''), ('test', '')]


def test_links_are_followed_and_what_is_no_file_is_refused(tmp_path, monkeypatch):
    write(tmp_path / 'far/b.txt', '\n\n'.join(prose(40)))
    write(tmp_path / 'in/a.txt', '\n\n'.join(prose(40, 1)))
    (tmp_path / 'in/linked').symlink_to(tmp_path / 'far')
    (tmp_path / 'far/round').symlink_to(tmp_path / 'in')
    data = prepare(tmp_path / 'in', tmp_path / 'data')
    assert data.meta['sources'] == ['a', 'linked/b'] and sum(map(len, data.docs.values())) == 80
    (tmp_path / 'in/gone.txt').symlink_to(tmp_path / 'nowhere')
    refuses('gone.txt is a link to nothing', prepare, tmp_path / 'in', tmp_path / 'data')
    (tmp_path / 'in/gone.txt').unlink()
    os.mkfifo(tmp_path / 'in/pipe')
    for path in (tmp_path / 'in', tmp_path / 'in/pipe', '/dev/null'):
        refuses('is no file, it can be read only once', prepare, path, tmp_path / 'data')
    (tmp_path / 'in/pipe').unlink()
    monkeypatch.setenv('HOME', str(tmp_path))
    assert pd.find_parts(pd.source_root('files:~/far/b.txt', ''))[0][0].path == tmp_path / 'far/b.txt'
    assert sets(dataset='files:~/in', data_dir='~/data').folder == tmp_path / 'data/files-in-bytes'
    refuses('files: names no text', stack, dataset='files:')


def forbid(monkeypatch, module, name, where):
    """A call of module.name with this path is refused, as it is to a user who may not read it."""
    real = getattr(module, name, open)

    def call(path, *args, **kwargs):
        if str(path) == str(where):
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return real(path, *args, **kwargs)
    monkeypatch.setattr(module, name, call, raising=False)


def test_what_is_not_yours_to_read(tmp_path, monkeypatch, small):
    data, source = small
    write(tmp_path / 'in/a.txt', 'x')
    write(tmp_path / 'in/closed/b.txt', 'x')
    with monkeypatch.context() as m:
        forbid(m, pd, 'open', source)
        refuses(r'small.txt cannot be read \(Permission denied\).*take away', prepare, source, tmp_path / 'other')
    with monkeypatch.context() as m:
        forbid(m, os, 'scandir', tmp_path / 'in/closed')
        refuses(r'closed cannot be read \(Permission denied\)', prepare, tmp_path / 'in', tmp_path / 'other')
    for name in ('tokenizer.bytes', 'meta.json', 'train.bin'):
        with monkeypatch.context() as m:
            forbid(m, pd.io, 'open', data.folder / name)
            forbid(m, pd.Path, 'open', data.folder / name)
            forbid(m, pd.np, 'memmap', data.folder / name)
            forbid(m, pd, 'open', data.folder / name)
            said = refuses(rf'{name} cannot be read \(Permission denied\)', pd.open_data, data.folder)
            assert '--overwrite' not in said
    with monkeypatch.context() as m:
        forbid(m, pd.io, 'open', data.folder / 'tokenizer.bytes')
        forbid(m, pd.Path, 'open', data.folder / 'tokenizer.bytes')
        refuses('tokenizer.bytes cannot be read', pd.load_tokenizer, data.folder)


TABLE = ['one, two', 'three "four"', 'five\n\nsix', 'åäö']


@pytest.mark.parametrize('name, text', [
    ('x.ndjson', '\n'.join(json.dumps(dict(text=row)) for row in TABLE)), ('x.JSONL', '\n'.join(json.dumps(dict(text=row)) for row in TABLE)),
    ('x.json', '\n'.join(json.dumps(dict(text=row)) for row in TABLE)), ('x.json', json.dumps([dict(text=row) for row in TABLE], indent=1)),
    ('x.jsonl', json.dumps(TABLE)), ('x.jsonl', '\ufeff' + '\n'.join(json.dumps(dict(text=row)) for row in TABLE)),
    ('x.csv', 'id,text\n1,"one, two"\n2,"three ""four"""\r\n3,"five\n\nsix"\n4,åäö\n'), ('x.CSV', '\ufefftext\n"one, two"\n"three ""four"""\n"five\n\nsix"\nåäö\n'),
    ('x.tsv', 'text\tn\none, two\t1\n"three ""four"""\t2\n"five\n\nsix"\t3\nåäö\t4\n'),
    ('x.txt', '\ufeffone, two<|endoftext|>three "four"<|endoftext|>five\n\nsix<|endoftext|>åäö')])
def test_rows_are_read_whatever_their_file_is_called(tmp_path, name, text):
    assert read_part(write(tmp_path / name, text), 'x')[0] == TABLE
    assert read_part(write(tmp_path / f'{name}.GZ', gzip.compress(text.encode())), 'x')[0] == TABLE


@pytest.mark.parametrize('name, text, said', [
    ('x.jsonl', '{"text": "a"}\n{"text": "\\ud83d"}', r"line 2 holds '\\ud83d', half of a pair that is one character"),
    ('x.jsonl', '{"text": ["a"]}', r"line 1 has \['a'\] for text"), ('x.jsonl', '7', 'line 1 has 7 for text'),
    ('x.json', '[{"text": "a"}, {"txt": "b"}]', 'an array, row 2 has no field text or story, only txt'),
    ('x.json', '{\n "text": "a"\n}', 'line 1 is not JSON, which is an object with text a line'), ('x.jsonl', '[' * 99999, 'is not JSON'),
    ('x.csv', 'id,body\n1,a\n', 'line 2 has no field text or story, only id, body'), ('x.csv', 'text,n\na,b,c\n', 'line 2 has more fields than the first line, 2'),
    ('x.html', '<p>a</p>', r'no plain text \(.html\)'), ('x.txt.zip', 'PK', r'\(.zip\)'), ('x.txt', '<?xml version="1.0"?>', 'is XML'),
    ('x.txt', '{"text": "a"}', 'is JSON: .*JSON is read from .jsonl'), ('x', '[{"text": "a"}]', 'is JSON'), ('x.txt', '%PDF-1.7', 'is PDF')])
def test_what_is_no_text_is_refused_for_what_it_is(tmp_path, name, text, said):
    refuses(said, prepare, write(tmp_path / name, text), tmp_path / 'data')


def test_rows_without_text_are_counted(tmp_path):
    rows = [json.dumps(dict(text=text)) for text in prose(40)]
    data = prepare(write(tmp_path / 'x.jsonl', '\n'.join([*rows, '{"text": null}'])), tmp_path)
    assert data.meta['report'] == {'rows dropped, their text is null': 1}


@pytest.mark.parametrize('rows, said', [([['a'], ['b']], r"in text, has \['a'\] for text"), ([1, 2], 'in text, has 1 for text')])
def test_parquet_without_text(tmp_path, rows, said):
    pa = pytest.importorskip('pyarrow')
    from pyarrow.parquet import write_table
    write_table(pa.table(dict(text=rows)), tmp_path / 'x.parquet')
    refuses(said, prepare, tmp_path / 'x.parquet', tmp_path / 'data')
    write_table(pa.table(dict(text=pa.array(['a b', None, 'c']).dictionary_encode())), tmp_path / 'y.parquet')
    assert read_part(tmp_path / 'y.parquet', 'y')[0] == ['a b', 'c']


def test_one_stray_byte_is_told_from_another_encoding(tmp_path):
    swedish = '\n\n'.join('Räksmörgås på ön.' for _ in range(50)).encode()
    said = refuses('1 bad line, the first is line 101; all else in it is, so mend that or', prepare,
                   write(tmp_path / 'x.txt', swedish + b'\n\nna\xefve'), tmp_path / 'data')
    assert 'iconv' not in said
    refuses('iconv -f latin1', prepare, write(tmp_path / 'y.txt', swedish.decode().encode('latin1')), tmp_path / 'data')


def test_copies_that_differ_in_line_ends_or_unicode_form_are_copies(tmp_path):
    held = [f'{text}\nDéjà vu, {i}.' for i, text in enumerate(prose(4, 5))]
    copies = [held[0].replace('\n', '\r\n'), unicodedata.normalize('NFD', held[1]), unicodedata.normalize('NFD', held[2]).replace('\n', '\r\n')]
    write(tmp_path / 's/a.train', '\n\n'.join(prose(20) + copies))
    write(tmp_path / 's/a.dev', '\n\n'.join(held))
    data = prepare(tmp_path / 's', tmp_path)
    assert texts(data, 'train') == prose(20) and data.meta['report'] == {'training documents dropped, identical to held-out ones': 3}
    keys = {pd.key_of(text.encode())[0] for text in (held[0], copies[0])}
    assert len(keys) == 1


def test_the_share_of_held_out_text_that_training_has_is_said(tmp_path):
    """Paragraphs that come again hide in joined documents; the summary says how much of validation they are."""
    said = prose(20, 9)
    write(tmp_path / 's/a.train', '\n\n'.join(prose(61) + said[:5]))
    write(tmp_path / 's/a.dev', '\n\n'.join(said))
    data = prepare(tmp_path / 's', tmp_path, min_doc_bytes=500)
    shared, of = data.meta['in_training']['shared'], data.meta['in_training']['held_out_bytes']
    assert (shared, of) == (sum(len(p) for p in said[:5]), sum(map(len, said)))
    line = f'{shared / of:.1%} of the held-out text is in training too'
    assert any(line in row for row in stack(dataset=f'files:{tmp_path}/s', data_dir=tmp_path).summary(data))


# Layouts


def test_a_list_is_a_document_a_line(tmp_path):
    names = [''.join(random.Random(i).choices('aeioulmnrst', k=6)) for i in range(900)]
    assert read_part(write(tmp_path / 'names.txt', '\n'.join(names) + '\n'), 'names')[0] == names
    cities = [f'{a.title()} {b}, Ohio' for a, b in zip(names, names[1:])]
    assert read_part(write(tmp_path / 'cities.txt', '\r\n'.join(cities) + '\r\n\r\n'), 'cities')[0] == cities
    wrapped = '\n'.join(' '.join(prose(40)).split(' 0 ')[0][i:i + 60] for i in range(0, 4000, 60))
    for text in (wrapped, '\n'.join(p[:50] for p in prose(50)), '\n'.join('Yes, I do.' for _ in range(50))):
        assert len(read_part(write(tmp_path / 'x.txt', text), 'x')[0]) == 1


@pytest.mark.parametrize('first', ['', '<|endoftext|>\n'])
def test_a_boundary_that_comes_late_or_once(tmp_path, first):
    """Documents end at every separator, and other boundaries hold where one is not common."""
    before, after = prose(8000), prose(20, 1)
    text = first + '\n\n'.join(before) + '<|endoftext|>' + '<|endoftext|>'.join(after)
    assert text.index('<|endoftext|>', 1) > 1 << 20
    docs, part, _ = read_part(write(tmp_path / 'x.txt', text), 'x', min_doc_bytes=0)
    assert docs == before + after and part.way == 'blank, joined'
    joined, _, _ = read_part(tmp_path / 'x.txt', 'x', min_doc_bytes=1000)
    assert joined[-20:] == after and not any('endoftext' in doc for doc in joined)


def read_part(path, source, *ideas, **settings):
    """(documents, part, report) of one file, as pass 1 reads it."""
    corpus, report, part = stack(*ideas, dataset=f'files:{path}', **settings), Counter(), pd.Part(path, path.name, 'train', source)
    return [text for _, text in corpus.documents(part, report, pd.NO_BAR)], part, report


@pytest.mark.parametrize('source, piece, kind, way', [
    ('novel', 'A line of prose.', 'prose', 'blank, joined'), ('simple_wikipedia', 'An article.', 'prose', 'blank'),
    ('talk', '- Hello.\n- Hello you.', 'dialogue', 'blank'), ('open_subtitles', 'A turn.', 'dialogue', 'blank, joined'),
    ('any', '= = = Title = = =\n\ntext', 'prose', 'header'), ('laws', '---\ntitle: a\n---\n\n# Law\n\ntext', 'prose', 'front'),
    ('x', 'def f(x):\n\treturn {x: 1}', 'code', 'whole'), ('tatoeba', 'Hej du.\nHej hej.', 'prose', 'lines, joined'),
    ('fineweb', 'A page.', 'web', 'blank, joined'), ('talk', 'A:\thello\nB:\tyes', 'dialogue', 'blank')])
def test_each_source_says_how_it_splits(tmp_path, source, piece, kind, way):
    text = '\n\n'.join([piece] * 200)
    docs, part, _ = read_part(write(tmp_path / 'x.txt', text), source)
    assert (part.kind, part.way) == (kind, way)
    if 'joined' in way:
        assert min(len(d.encode()) for d in docs[:-1]) >= 1000 and len(docs) > 1
        assert '\n\n'.join(docs).split() == text.split()
    else:
        assert docs == ([text[i:] for i in [0]] if way == 'whole' else [piece] * 200)


@pytest.mark.parametrize('block', [1, 50, 1 << 18])
def test_joined_paragraphs_are_the_text(block):
    text = '\n\n'.join(prose(40)).encode()
    split = type('', (), dict(split=functools.partial(pd.split_joined, pattern=pd.BOUNDARY['blank'], least=700)))
    docs = list(pd.split_documents((text[i:i + block] for i in range(0, len(text), block)), split, 16384, Counter()))
    assert b'\n\n'.join(docs) == text and 4 < len(docs) < 10 and min(map(len, docs[:-1])) >= 700


# Bad input: one sentence, and nothing left behind


@pytest.mark.parametrize('options, said', [
    (['--vocab_size=0'], 'vocab_size is 0, it must be'), (['--max_doc_bytes=10'], 'max_doc_bytes is 10'),
    (['--vocab_size=100000000000'], 'vocab_size is 100,?000'), (['--base_url=hf-mirror.com'], 'begin it with https://'),
    (['--val_fraction=1.5'], 'val_fraction is 1.5'), (['--tokenizer=word'], 'bpe.*bytes.*gpt2'),
    (['--vocab_sise=9'], 'did you mean vocab_size'), (['--overwrite=maybe'], 'overwrite')])
def test_options_out_of_range(tmp_path, capsys, options, said):
    path = write(tmp_path / 'x.txt', '\n\n'.join(prose(50)))
    assert pd.main([f'files:{path}', f'--data_dir={tmp_path}/data', *options]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / 'data').exists() or not any((tmp_path / 'data').iterdir())


@pytest.mark.parametrize('content, match', [
    (b'good\n\nb\xe9d\n\nb\xffd\n' + '\n\n'.join(prose(50)).encode(), r'2 bad lines, the first is line 3'),
    (b'', 'no text'), (b'\n\n\n', 'no text'), (b'only one', 'two documents'), (b'a\n\nb', '256 are needed'),
    (b'\x89PNG\r\n\0\1', r'x\.txt is no text \(a zero byte at offset 6\)'), ('text'.encode('utf-16'), 'is UTF-16'),
    (b'\n<!DOCTYPE html>\n<p>Log in', 'is a web page')])
def test_bad_text(tmp_path, content, match):
    path = write(tmp_path / 'x.txt', content)
    refuses(match, prepare, path, tmp_path / 'data')
    assert list((tmp_path / 'data').iterdir()) == []


def test_what_is_wrong_in_a_folder(tmp_path):
    for name, content in (('a.train', '\n\n'.join(prose(50))), ('b.train', b'PK\0'), ('c.train', b'abc\0'), ('a.dev', 'some')):
        write(tmp_path / 'in' / name, content)
    both = refuses('offset 2.*offset 3', prepare, tmp_path / 'in', tmp_path / 'out')
    assert 'b.train' in both and 'c.train' in both and 'a.train' not in both
    for name in 'bc':
        (tmp_path / 'in' / f'{name}.train').unlink()
    write(tmp_path / 'in/more/a.train.xz', 'the same')
    refuses(r'in/a\.train and .*more/a\.train\.xz are both a', prepare, tmp_path / 'in', tmp_path / 'out')
    (tmp_path / 'in/more/a.train.xz').rename(tmp_path / 'in/a.train-00001-of-00002.xz')            # a shard of it
    write(tmp_path / 'in/b.dev', '\n')
    refuses(r'b\.dev holds no text', prepare, tmp_path / 'in', tmp_path / 'out')
    (tmp_path / 'in/b.dev').unlink()
    assert list((tmp_path / 'out').iterdir()) == []
    prepare(tmp_path / 'in', tmp_path / 'out')


def test_one_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pd, 'MAX_LINE', 1000)
    path = write(tmp_path / 'x.jsonl', json.dumps(dict(text='a' * 900)) + '\n' + json.dumps(dict(text='a' * 1000)))
    refuses(r'x\.jsonl line 2 has over', prepare, path, tmp_path)
    monkeypatch.setattr(pd, 'BATCH_BYTES', 200_000)
    monkeypatch.setattr(pd, 'SAMPLE_BYTES', 200_000)
    path = write(tmp_path / 'y.txt', ' '.join(map(str, range(1_500_000))))                       # 10.9 MB
    corpus = stack(dataset=f'files:{path}', data_dir=tmp_path, tokenizer='bytes', val_fraction=0.1)
    tracemalloc.start()                          # the text's memory, not that of reading settings
    corpus.build(quiet=True)
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    data = corpus.open()
    assert sum(s['bytes'] for s in data.meta['splits'].values()) == path.stat().st_size


def test_missing_damaged_unknown(tmp_path):
    refuses('does not exist', prepare, tmp_path / 'none', tmp_path)
    mislabelled = write(tmp_path / 'x.txt.xz', 'a\n\nb' * 999).rename(tmp_path / 'x.gz')
    refuses('damaged', prepare, mislabelled, tmp_path)
    whole = write(tmp_path / 'y.xz', '\n\n'.join(prose(99)))
    whole.write_bytes(whole.read_bytes()[:-30])
    refuses('damaged', prepare, whole, tmp_path)


def test_a_data_set_that_is_not_named_or_not_known():
    refuses('no data set is named.*config/quickstart.py', stack)
    refuses("no data set 'tales'.*--dataset=files:<path>", stack, dataset='tales')
    with pytest.raises(UserError, match="no data set 'takes', did you mean tales"):
        corpus(Tales, dataset='takes')


def test_existing_folder_stays_unless_told(small):
    data, source = small
    before = (data.folder / 'meta.json').read_bytes()
    refuses('--overwrite', prepare, source, data.folder.parent, overwrite=False)
    assert (data.folder / 'meta.json').read_bytes() == before


def test_full_disk(small, monkeypatch):
    data, source = small
    before = sorted(data.folder.parent.iterdir())

    def full(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(pd.SplitWriter, 'write', full)
    refuses('is full', prepare, source, data.folder.parent)
    monkeypatch.undo()
    monkeypatch.setattr(pd.shutil, 'disk_usage', lambda path: type('', (), dict(free=10)))
    refuses('0 MB free', prepare, source, data.folder.parent)
    assert sorted(data.folder.parent.iterdir()) == before
    pd.open_data(data.folder)                                            # what was there is still good


def test_interrupted_build_leaves_nothing(tmp_path):
    """SIGTERM in the middle of encoding: no folder, no leftovers."""
    write(tmp_path / 'x.txt', '\n\n'.join(prose(50)))
    code = ('import prepare_data as p, os, signal, sys, time\n'
            'p.SplitWriter.write = lambda *a: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5))\n'
            f'sys.exit(p.main(["files:{tmp_path}/x.txt", "--tokenizer=bytes", "--data_dir={tmp_path}/data"]))')
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 143 and list((tmp_path / 'data').iterdir()) == []


def test_command_line(tmp_path):
    def call(*args):
        command = [sys.executable, str(ROOT / 'prepare_data.py'), *args, f'--data_dir={tmp_path}']
        return subprocess.run(command, capture_output=True, text=True)
    path = write(tmp_path / 'x.txt', '\n\n'.join(prose(99)))
    done = call(f'files:{path}', '--vocab_size=320')
    assert done.returncode == 0 and 'words/s' in done.stdout and done.stderr == ''
    again = call(f'files:{path}', '--vocab_size=320')
    assert again.returncode == 2
    assert again.stderr.startswith('prepare_data.py: ') and again.stderr.count('\n') == 1


def test_import_is_cheap():
    heavy = ('torch', 'tiktoken', 'sentencepiece')
    code = f'import prepare_data, sys; sys.exit(any(m in sys.modules for m in {heavy}))'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_leftovers_of_a_killed_build_go(tmp_path):
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    path = write(tmp_path / 'x.txt', '\n\n'.join(prose(50)))
    name = f'{tmp_path}/data/.files-x-bytes.'
    for suffix in (dead.pid, f'old.{dead.pid}', os.getppid()):           # the last one is alive
        Path(f'{name}{suffix}').mkdir(parents=True)
    prepare(path, tmp_path / 'data')
    left = sorted(p.name for p in (tmp_path / 'data').iterdir())
    assert left == [f'.files-x-bytes.{os.getppid()}', 'files-x-bytes']


def test_another_machine_s_build_is_left_alone_for_a_day(tmp_path):
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    here, there = f'.files-x.{platform.node()}.', '.files-x.a-pod.of-mine.'
    for name in f'{here}{dead.pid}', f'{here}{os.getppid()}', f'{there}{dead.pid}', f'{there}1', f'.files-x.old.{platform.node()}.{dead.pid}', '.files-x.lock':
        (tmp_path / name).mkdir()
    (tmp_path / f'{there}1' / 'train.bin').touch()
    for path in tmp_path / f'{there}{dead.pid}', tmp_path / f'{there}1':
        os.utime(path, (1e9, 1e9))               # the second still writes to a file in it
    assert {p.name for p in pd.abandoned(tmp_path / 'files-x')} == {
        f'{here}{dead.pid}', f'{there}{dead.pid}', f'.files-x.old.{platform.node()}.{dead.pid}'}
    assert pd.beside(tmp_path / 'files-x').name == f'{here}{os.getpid()}'


def test_a_name_that_is_no_utf8_is_refused(tmp_path):
    try:
        (tmp_path / 'texts').mkdir()
        Path(os.fsdecode(os.fsencode(tmp_path) + b'/texts/caf\xe9.txt')).write_text('some text')
    except OSError:
        pytest.skip('this file system has no such names')
    with pytest.raises(UserError, match=r'caf.udce9.txt. has a name that is no UTF-8: rename it') as e:
        prepare(tmp_path / 'texts', tmp_path / 'data')
    str(e.value).encode()


@pytest.mark.parametrize('end', ['', '\n200\t"Come again'])
def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path, end):
    rows = [f'{i}\t"Come here, he said' if i == 20 else f'{i}\tSentence number {i}' for i in range(30)]
    with pytest.raises(UserError, match=r'x.tsv line 3\d ends no row .*: double the quotes within a field'):
        prepare(write(tmp_path / 'x.tsv', '\n'.join(['id\ttext', *rows]) + end), tmp_path / 'data')
    good = write(tmp_path / 'good.tsv', 'id\ttext\n' + ''.join(f'{i}\t"if a:\n\tb = {i}\n"\n' for i in range(80)))
    assert prepare(good, tmp_path / 'data').meta['splits']['train']['documents'] > 70          # code in quotes, tabs and all


# Opening: what the trainer must not trust


def spoil(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


@pytest.mark.parametrize('name, change, match', [
    ('train.bin', lambda b: b[:-2], 'tokens where meta.json says'),
    ('train.bin', lambda b: b[2:4] + b[:2] + b[4:], 'not the file that meta.json describes'),
    ('train.docs.npy', lambda b: b[:-18], 'damaged'),
    ('train.docs.npy', lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:], 'damaged, by its checksum'),
    ('val.docs.npy', lambda b: b[:-10] + b'\x07\0\0\0' + b[-6:], 'docs.npy'),
    ('val.bin', lambda b: b'', 'missing or damaged'),
    ('meta.json', lambda b: b[:50], 'damaged'),
    ('meta.json', lambda b: b'[]', 'damaged'),
    ('meta.json', lambda b: b'{"version": 1, "tokenizer": "bytes"}', 'damaged'),
    ('meta.json', lambda b: b.replace(b'"head_sha256"', b'"head"'), 'damaged'),
    ('meta.json', lambda b: b.replace(b'"dtype"', b'"type"'), 'damaged'),
    ('meta.json', lambda b: b.replace(b'"version": 1', b'"version": 99'), 'format 99, this program reads 1'),
    ('meta.json', lambda b: b.replace(b'"vocab_size": 257', b'"vocab_size": 80'), 'beyond the vocabulary'),
    ('tokenizer.bytes', lambda b: b + b'x', 'not the tokenizer')])
def test_open_refuses(small, name, change, match):
    data, _ = small
    spoil(data.folder / name, change)
    assert '--overwrite' in refuses(match, pd.open_data, data.folder)


def test_another_bit_beyond_the_first_mebibyte_is_found(small, monkeypatch):
    data, _ = small
    heads, whole = {split: counts['head_sha256'] for split, counts in data.meta['splits'].items()}, pd.sha256_of
    monkeypatch.setattr(pd, 'sha256_of', lambda path, size=-1: heads[path.stem] if size > 0 else whole(path))
    pd.open_data(data.folder)
    spoil(data.folder / 'train.bin', lambda b: b[:-10] + bytes([b[-10] ^ 1]) + b[-9:])
    refuses('damaged, by its checksum', pd.open_data, data.folder)


def test_open_refuses_documents_without_bos(small):
    data, _ = small
    docs = np.load(data.folder / 'train.docs.npy')
    docs['start'][5] += 1
    np.save(data.folder / 'train.docs.npy', docs)
    refuses('damaged, by its checksum', pd.open_data, data.folder)
    meta = json.loads((data.folder / 'meta.json').read_text())
    (data.folder / 'meta.json').write_text(json.dumps({k: v for k, v in meta.items() if k != 'crc32'}))      # of before there were any
    refuses('do not begin with BOS', pd.open_data, data.folder)
    spoil(data.folder / 'train.docs.npy', lambda b: b.replace(b"}", b"{", 1))
    refuses('missing or damaged', pd.open_data, data.folder)


@pytest.mark.parametrize('way', ['cut', 'written over', 'deleted', 'replaced'])
def test_a_bin_that_changes_while_it_is_read(small, way):
    """What was in another file, or in none any more, is never taken for its ids, and reading past its end is no bus error."""
    path = small[0].folder / 'train.bin'
    tokens, whole = pd.open_data(small[0].folder).tokens['train'], path.read_bytes()
    known = tokens[:]
    assert type(known) is np.ndarray and known.tobytes() == whole and (tokens == known)[:9].all()
    time.sleep(0.02)                                                     # as coarse as a file's time may be
    if way in ('deleted', 'replaced'):
        path.unlink()
    if way in ('written over', 'replaced'):
        path.write_bytes(whole[::-1])
    if way == 'cut':
        os.truncate(path, 0)
    if way in ('deleted', 'replaced'):
        assert (tokens[:] == known).all() and (tokens[np.arange(5)] == known[:5]).all()
    else:
        for key in (slice(None), np.arange(5), 3):
            assert '--overwrite' in refuses('train.bin has been written to since', lambda: tokens[key])


def test_open_sees_changed_sources(small):
    data, source = small
    name = f'files:{source}'
    pd.open_data(data.folder, name)
    source.write_text(source.read_text() + ' more')
    refuses('changed since', pd.open_data, data.folder, name)
    source.unlink()
    pd.open_data(data.folder, name)                                      # the text need not be kept


# What a data set was made from is part of what it is


def sets(*args, **settings):
    """A Corpus with these settings that opens what is there, and builds what is not."""
    return stack(*args, **dict(tokenizer='bytes', min_doc_bytes=0) | settings)


def test_two_texts_of_one_name_are_two_data_sets(tmp_path):
    """A folder's name is the last part of a path: `en/bok.txt` and `sv/bok.txt`, cut to one size, are told apart."""
    for seed, folder in enumerate(('en', 'sv')):
        write(tmp_path / folder / 'bok.txt', '\n\n'.join(prose(60, seed))[:6000])
    english = sets(dataset=f'files:{tmp_path}/en/bok.txt', data_dir=tmp_path / 'data')
    english.open()
    other = dict(dataset=f'files:{tmp_path}/sv/bok.txt', data_dir=tmp_path / 'data')
    for ask in (sets(**other).open, sets(**other).build):
        said = refuses('en/bok.txt, .*sv/bok.txt holds another text: keep both with another --data_dir', ask)
        assert f'--dataset=files:{tmp_path}/sv/bok.txt' in said and '--overwrite' in said
    assert 'dogs' not in sets(**other | dict(data_dir=tmp_path / 'other')).open().meta['sources']
    refuses('se/bok.txt does not exist, .*was prepared from .*en/bok.txt', sets(
        dataset=f'files:{tmp_path}/se/bok.txt', data_dir=tmp_path / 'data').open)
    write(tmp_path / 'copy/bok.txt', (tmp_path / 'en/bok.txt').read_text())      # the same text elsewhere is the same
    sets(dataset=f'files:{tmp_path}/copy/bok.txt', data_dir=tmp_path / 'data').open()
    os.utime(tmp_path / 'en/bok.txt', (1, 1))
    english.open()
    write(tmp_path / 'en/bok.txt', 'X' + (tmp_path / 'en/bok.txt').read_text()[1:])
    refuses('changed since', english.open)


def test_every_option_is_compared_when_data_is_opened(tmp_path):
    path = write(tmp_path / 'x.txt', '\n\n'.join(prose(90)))
    given = dict(dataset=f'files:{path}', data_dir=tmp_path / 'data')
    sets(**given).open()
    for name, value in dict(val_fraction=0.5, max_doc_bytes=300, min_doc_bytes=5000, text_field='body').items():
        refuses(f'{name} .*, not .*: say the same, prepare it anew with --overwrite', sets(**given, **{name: value}).open
                if name != 'min_doc_bytes' else sets(**given | {name: value}).open)
    sets(**given | dict(vocab_size=99)).open()                           # of no account to bytes
    sets('clean', **given).open()
    refuses("clean 'all', not 'boilerplate'", sets('clean', **given, clean='boilerplate').open)
    data = sets(**given | dict(data_dir=tmp_path / 'bpe', tokenizer='bpe', vocab_size=300)).open()
    write(tmp_path / 'y.txt', '\n\n'.join(prose(90, 5))[::-1])
    theirs = sets(dataset=f'files:{tmp_path}/y.txt', data_dir=tmp_path / 'bpe', tokenizer='bpe', vocab_size=300).build(quiet=True)
    refuses('another vocabulary', sets(**given | dict(
        data_dir=tmp_path / 'bpe', tokenizer='bpe', vocab_size=300, tokenizer_from=str(theirs))).open)
    spoil(data.folder / 'meta.json', lambda b: b'{}')
    again = refuses('damaged', sets(**given | dict(data_dir=tmp_path / 'bpe', tokenizer='bpe', vocab_size=300)).open)
    assert '--overwrite' in again


def test_what_mends_a_data_set_says_how_it_was_made(tmp_path):
    path = write(tmp_path / 'my text.txt', '\n\n'.join(prose(90)))
    folder = sets('dedup', dataset=f'files:{path}', data_dir=tmp_path / 'data', val_fraction=0.1).build(quiet=True)
    path.write_text(path.read_text() + 'x')
    said = refuses('changed since', pd.open_data, folder, f'files:{path}')
    again = shlex.split(said.partition('run python prepare_data.py ')[2])
    assert pd.main(again) is None
    meta = pd.open_data(folder, f'files:{path}').meta['settings']
    assert (meta['val_fraction'], meta['min_doc_bytes'], meta['dedup'], meta['tokenizer']) == (0.1, 0, True, 'bytes')


def test_data_that_was_prepared_before_is_read(small):
    """Folders of older versions know names and sizes of their sources, and nothing of places, times and ideas."""
    data, source = small
    meta = json.loads((data.folder / 'meta.json').read_text())
    old = {key: value for key, value in meta.items() if key not in ('made_from', 'in_training')}
    old['settings'] |= dict(documents=40000, scores=True)
    (data.folder / 'meta.json').write_text(json.dumps(old))
    opened = sets(dataset=f'files:{source}', data_dir=data.folder.parent).open()
    assert opened.meta['fingerprint'] == meta['fingerprint']
    source.write_text(source.read_text() + ' more')
    refuses('changed since.*--overwrite', pd.open_data, data.folder, f'files:{source}')


def test_text_that_grows_while_it_is_prepared(tmp_path, monkeypatch):
    path, documents = write(tmp_path / 'x.txt', '\n\n'.join(prose(60))), pd.Corpus.documents
    for more in ('\n\nmore\n\nand more', '.'):
        def grows(self, part, report, bar, text=path.read_text() + more):
            yield from documents(self, part, report, bar)
            path.write_text(text)
        monkeypatch.setattr(pd.Corpus, 'documents', grows)
        refuses('changed while they were read', prepare, path, tmp_path / 'data')
    assert not any((tmp_path / 'data').iterdir())


def test_text_may_lie_beside_what_is_made_of_it(tmp_path, monkeypatch):
    """In data/ itself, or in the folder one is in, where runs are too."""
    write(tmp_path / 'bok.txt', '\n\n'.join(prose(60)))
    for name in ('metrics.jsonl', 'ckpt.pt', 'result.json'):
        write(tmp_path / 'out/run' / name, '{"text": "of a run"}')
    monkeypatch.chdir(tmp_path)
    for data_dir in ('.', 'data'):
        for _ in range(2):
            data = sets(dataset='files:.', data_dir=data_dir).open()
            assert data.meta['sources'] == ['bok'] and data.meta['files'] == [['bok.txt', (tmp_path / 'bok.txt').stat().st_size]]
        prepare('.', data_dir)


# Same in, same out; little memory


def test_deterministic_to_the_byte(tmp_path):
    path = write(tmp_path / 'x.txt', '\n\n'.join(prose(400)))
    one, two = (prepare(path, tmp_path / d, tokenizer='bpe', vocab_size=400) for d in 'ab')
    names = sorted(p.name for p in one.folder.iterdir())
    assert names == ['meta.json', 'tokenizer.model', 'train.bin', 'train.docs.npy', 'val.bin', 'val.docs.npy']
    assert all((one.folder / n).read_bytes() == (two.folder / n).read_bytes() for n in names[1:])
    assert one.meta['fingerprint'] == two.meta['fingerprint']
    other = prepare(path, tmp_path / 'c', tokenizer='bpe', vocab_size=400, val_fraction=0.1)
    assert other.meta['fingerprint'] != one.meta['fingerprint']


def test_memory_does_not_grow(tmp_path, monkeypatch):
    monkeypatch.setattr(pd, 'SAMPLE_BYTES', 200_000)
    monkeypatch.setattr(pd, 'BATCH_BYTES', 200_000)
    peaks = []
    for n in (10_000, 60_000):                                           # 1.6 and 10 MB, one document each
        path = write(tmp_path / f'{n}.txt', '\n'.join(prose(n)))
        tracemalloc.start()
        prepare(path, tmp_path, val_fraction=0.1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.3 and peaks[1] < 20e6, peaks


# Download


class Web:
    """A server on loopback: files by path, and for each path a list of troubles, one a request, before it behaves."""

    def __init__(self):
        self.files, self.troubles, self.asked, self.version = {}, {}, [], '"1"'
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                name = self.path.rsplit('/', 1)[1]
                web.asked.append((name, self.headers.get('Range')))
                trouble = web.troubles[name].pop(0) if web.troubles.get(name) else None
                body = web.files.get(self.path, web.files.get(name))
                if isinstance(trouble, int) or body is None:
                    return self.send_error(trouble or 404)
                start = int((self.headers.get('Range') or 'bytes=0-')[6:-1])
                whole = not start or self.headers.get('If-Range') != web.version or trouble == 'no ranges'
                start = 0 if whole else start
                if start >= len(body):
                    return self.send_error(416)
                self.send_response(200 if whole else 206)
                if trouble != 'endless':
                    self.send_header('Content-Length', str(len(body) - start + (94 if trouble == 'lie' else 0)))
                self.send_header('ETag', web.version)
                self.end_headers()
                while trouble == 'endless':
                    self.wfile.write(body)
                part = body[start:]
                self.wfile.write(part[:len(part) // 2] if trouble in ('cut', 'no ranges') else part)

        self.httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.httpd.server_port}'
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setattr(pd, 'PATIENCE', 0.01)
    web = Web()
    yield web
    web.httpd.shutdown()


TALES = {name: '\n<|endoftext|>\n'.join(prose(n, n)).encode() for name, n in (('tales-train.txt', 50), ('tales-valid.txt', 5))}


class Tales(pd.Corpus):
    sets = {'tales': dict(about='some tales; a document is a tale', mb=1, licence='CC0', repo='me/tales',
                          files={name: f'text/{name}' for name in TALES})}


def corpus(kind, **settings):
    """A Corpus of a class that is none of config/."""
    return kind(SimpleNamespace(**vars(stack(dataset='files:x').s) | dict(tokenizer='bytes') | settings))


def test_download(tmp_path, web):
    web.files = {'tales-train.txt': TALES['tales-train.txt']}
    settings = dict(dataset='tales', data_dir=tmp_path / 'data', base_url=web.url)
    message = refuses('404', corpus(Tales, **settings).build, quiet=True)
    assert str(tmp_path / 'data/raw/tales/tales-valid.txt') in message
    assert web.asked.count(('tales-valid.txt', None)) == 1                        # what is not there is not asked for again
    web.files = {f'/me/tales/resolve/main/text/{name}': text for name, text in TALES.items()}
    data = corpus(Tales, **settings).open()
    assert (len(data.docs['train']), len(data.docs['val'])) == (50, 5)
    assert data.meta['sources'] == ['tales']
    assert data.folder.name == 'tales-bytes' and data.meta['licence'] == 'CC0'
    assert 'licence: CC0' in corpus(Tales, **settings).summary(data)
    assert not list((tmp_path / 'data/raw/tales').glob('.*'))
    corpus(Tales, **settings, overwrite=True).build(quiet=True)                   # in place: nothing is asked for
    assert [name for name, _ in web.asked] == ['tales-train.txt'] + 2 * ['tales-valid.txt']


@pytest.mark.parametrize('troubles', [['cut'], ['cut', 'cut', 503], [503, 'cut', 429, 'cut'], ['no ranges', 'cut'], ['lie'],
                                      ['cut', 416, 'cut']])
def test_a_download_goes_on_where_it_broke(tmp_path, web, troubles):
    web.files, web.troubles = {'f.txt': b'0123456789' * 1000}, {'f.txt': list(troubles)}
    pd.download(f'{web.url}/f.txt', tmp_path / 'f.txt')
    assert (tmp_path / 'f.txt').read_bytes() == web.files['f.txt'] and [p.name for p in tmp_path.iterdir()] == ['f.txt']
    if troubles == ['cut', 'cut', 503]:
        assert [r for _, r in web.asked] == [None, 'bytes=5000-', 'bytes=7500-', 'bytes=7500-']


@pytest.mark.parametrize('trouble', [None, 'endless'])
def test_a_download_over_its_cap_stops(tmp_path, web, trouble):
    web.files, web.troubles = {'f.txt': bytes(1 << 20)}, {'f.txt': [trouble]}
    message = refuses('more than 1 MB', pd.download, f'{web.url}/f.txt', tmp_path / 'f.txt', None, 1_000_000)
    assert str(tmp_path / 'f.txt') in message and sum(p.stat().st_size for p in tmp_path.iterdir()) == 0 and len(web.asked) == 1


def test_a_download_goes_on_in_the_next_run_if_the_file_is_still_the_same(tmp_path, web):
    web.files, web.troubles = {'f.txt': b'0123456789' * 1000}, {'f.txt': ['cut'] + [503] * 4}
    message = refuses('503', pd.download, f'{web.url}/f.txt', tmp_path / 'f.txt')
    assert 'try again' in message and not (tmp_path / 'f.txt').exists() and (tmp_path / '.f.txt.part').stat().st_size == 5000
    web.asked.clear()
    pd.download(f'{web.url}/f.txt', tmp_path / 'f.txt')
    assert web.asked == [('f.txt', 'bytes=5000-')] and (tmp_path / 'f.txt').read_bytes() == web.files['f.txt']
    web.troubles = {'g.txt': ['cut'] + [503] * 4}
    web.files['g.txt'] = b'old' * 999
    refuses('503', pd.download, f'{web.url}/g.txt', tmp_path / 'g.txt')
    web.files['g.txt'], web.version = b'new' * 999, '"2"'
    pd.download(f'{web.url}/g.txt', tmp_path / 'g.txt')
    assert (tmp_path / 'g.txt').read_bytes() == b'new' * 999


@pytest.mark.parametrize('body, digest, match', [
    (b'<!DOCTYPE html><title>Log in</title>', None, 'a web page came'), (b'text', '0' * 64, 'sha256')])
def test_a_download_of_something_else_is_refused(tmp_path, web, body, digest, match):
    web.files = {'f.txt': body}
    refuses(match, pd.download, f'{web.url}/f.txt', tmp_path / 'f.txt', digest)
    assert not list(tmp_path.iterdir())


def test_a_download_that_wants_a_login_or_never_comes_whole(tmp_path, web):
    web.files, web.troubles = {'f.txt': b'5' * 5}, {'f.txt': [403] + ['lie'] * 5}
    refuses('may want a login', pd.download, f'{web.url}/f.txt', tmp_path / 'f.txt')
    refuses('5 of 99 bytes', pd.download, f'{web.url}/f.txt', tmp_path / 'f.txt')


# Looking


def test_inspect(tmp_path, capsys, monkeypatch):
    rows = prose(40, 1)
    write(tmp_path / 'in/a.train', '\n\n'.join(rows + rows[:3] + ['bell \x07 and \x1b[31mred']))
    write(tmp_path / 'in/a.dev', '\n\n'.join(prose(6, 2)))
    data, args = f'files:{tmp_path}/in', ['--tokenizer=bytes', f'--data_dir={tmp_path}/out', '--inspect']
    assert pd.main([data, *args]) == 2 and 'is not prepared yet' in capsys.readouterr().err
    folder = prepare(tmp_path / 'in', tmp_path / 'out').folder
    before = (folder / 'meta.json').read_bytes()
    assert pd.main([data, *args]) is None
    out = capsys.readouterr().out
    assert '3 of 44 training documents repeat another' in out and 'bytes/token' in out and '\nrandom documents\n' in out
    words = Counter(re.findall('[a-z]+', ' '.join(rows + rows[:3] + ['bell and red'])))
    top, n = words.most_common(1)[0]
    assert f'per thousand\n{top} {1000 * n / words.total():.0f}, ' in out
    histogram = re.findall(r'^ +([\d,]+) to +([\d,]+) +(\d+) (#+)$', out, re.M)
    assert sum(int(row[2]) for row in histogram) == 44 and max(len(row[3]) for row in histogram) == 50
    assert '\x1b' not in out and '\x07' not in out and out.split('\n')[-2].count('|') == 63
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    pd.main([data, *args])
    last = capsys.readouterr().out.split('\n')[-2]
    assert last.count('\x1b[30;46m') == last.count('\x1b[30;43m') == 32 and '|' not in last
    assert (folder / 'meta.json').read_bytes() == before


def test_a_data_set_that_an_idea_overrules_is_told(tmp_path, capsys):
    (tmp_path / 'mine.py').write_text("dataset = 'files:none'\n")
    assert pd.main([f'files:{tmp_path}', str(tmp_path / 'mine.py')]) == 2
    assert f"overruled: {tmp_path}/mine.py:1 sets dataset to 'files:none', --dataset=files:{tmp_path} had set it to" in capsys.readouterr().out


# Real text


@needs_shared
def test_real_text(tmp_path):
    for name in ('switchboard.train.xz', 'switchboard.dev.xz', 'simple_wiki.dev.xz'):
        write(tmp_path / 'src' / name, lzma.decompress((SHARED / 'babylm' / name).read_bytes()))
    data = prepare(tmp_path / 'src', tmp_path, tokenizer='bpe', vocab_size=2048)
    whole = lzma.decompress((SHARED / 'babylm/switchboard.train.xz').read_bytes()).decode()
    assert ''.join(texts(data, 'train')) == whole.rstrip()
    assert data.meta['splits']['val']['sources']['simple_wiki']['words'] == 104_919

"""prepare_data.py: nothing is lost on the way from text to bins, and every mistake gets its one sentence."""
import errno
import functools
import gzip
import http.server
import json
import lzma
import os
import random
import re
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from math import log
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import prepare_data as pd
import sample
from conftest import tales
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


def prepare(path, out, **settings):
    settings = dict(tokenizer='bytes', quiet=True, overwrite=True, min_doc_bytes=0) | settings     # a paragraph, a document
    return pd.open_data(pd.build(f'files:{path}', data_dir=out, **settings), f'files:{path}')


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


def test_bpe_learns_line_ends_and_labels(bpe):
    assert bpe.vocab_size == 400
    assert [bpe.token_bytes(i) for i in bpe.encode('no.\n*CHI:\tyes')] == [b'no', b'.\n*CHI:\t', b'yes']


def test_vocabulary_too_large_or_small():
    message = refuses('too large', pd.BPETokenizer.train, ['hello there ' * 50], 8192)
    largest = int(message.split('_size ')[1].split()[0])
    assert pd.BPETokenizer.train(['hello there ' * 50], largest).vocab_size == largest
    refuses('too small', pd.BPETokenizer.train, ['hello there ' * 50], 100)


def test_gpt2_without_files_or_network(tmp_path, monkeypatch):
    import tiktoken
    def no_network(name):
        raise ConnectionError('no network')
    monkeypatch.setattr(tiktoken, 'get_encoding', no_network)
    assert '--gpt2_dir' in refuses('vocab.bpe', pd.GPT2Tokenizer.find, [tmp_path])


# Documents

def split_documents(text, limit=pd.Options.max_doc_bytes, block=7):
    report, head = Counter(), text[:1 << 20]
    boundary = next((b for b in pd.BOUNDARY.values() if b.search(head)), pd.BOUNDARY['whole'])
    blocks = (text[i:i + block] for i in range(0, len(text), block))
    return list(pd.documents(blocks, boundary, limit, report)), report


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
    assert [d.decode() for d in split_documents(text.encode(), block=block)[0]] == expected


def test_empty_documents_are_counted():
    assert split_documents(b'a<|endoftext|>\n<|endoftext|>b<|endoftext|>')[1]['empty documents dropped'] == 1


@pytest.mark.parametrize('text', [
    '\n'.join(prose(300)), 'no space at all' * 2000, 'é🙂' * 3000,
    '\n'.join(prose(30)) + '  tail  ' * 900 + 'x',
    '= = = A = = =\n' + '\n\n\n\n\n'.join(prose(90))])
def test_passages_join_to_the_text(text):
    for block in (100, 1 << 18):
        docs, report = split_documents(text.encode(), 1000, block)
        assert b''.join(docs) == text.encode()
        assert max(map(len, docs)) <= 1000 and min(map(len, docs[:-1])) > 490
        assert all(d.decode() is not None for d in docs)         # no letter is cut in two
        assert report == {'documents cut into passages': 1, 'passages they were cut into': len(docs)}


def test_passages_end_at_lines():
    docs, _ = split_documents('\n'.join(prose(100)).encode(), 1000)
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


# Layouts and cleaning

def read_part(path, source, **options):
    """(documents, part, report) of one file, as pass 1 reads it."""
    o, report = pd.Options('bytes', **options), Counter()
    o.steps, o.examples = set(o.clean.split(',')) - {''}, {}
    part = pd.Part(path, path.name, 'train', source)
    return [text for _, text in pd.read(part, o, report, type('', (), dict(update=lambda n: None)))], part, report


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
    docs = list(pd.documents((text[i:i + block] for i in range(0, len(text), block)), split, 16384, Counter()))
    assert b'\n\n'.join(docs) == text and 4 < len(docs) < 10 and min(map(len, docs[:-1])) >= 700


@pytest.mark.parametrize('text, expected', [
    ('dÃ¥ sa hon â€œhejâ€\x9d ðŸ™‚', 'då sa hon “hej” 🙂'), ('Ã¢â‚¬â„¢', '’'), ('e\u0301\u200b\ufeff\xa0x\r\ny', 'é x\ny'),
    ('SÅ” ÄR”, Â, Ã och é', 'SÅ” ÄR”, Â, Ã och é'), ('👨\u200d👩', '👨\u200d👩'), ('plain', 'plain')])
def test_unicode(text, expected):
    assert pd.mend_unicode(text, 'prose') == expected


@pytest.mark.parametrize('text, expected', [
    ('= = = A = = =\nx = = = y\n', 'x = = = y\n'), ('==Early life==\nHe[edit] was {{lang|{{x}}}}born.', 'He was born.'),
    ('a [[b|c]] [[d]]\n[[Category:E]]', 'a c d\n'), ('<p class="x">R&amp;B</p><i>now</i>', ' R&B now'),
    ('1 < 2 <unk> & so', '1 < 2 <unk> & so'), ('---\ntitle: a\n---\n\n# b', '\n# b')])
def test_boilerplate(text, expected):
    assert pd.strip_boilerplate(text, 'prose') == expected
    assert pd.strip_boilerplate(text, 'code') == text


@pytest.mark.parametrize('block', [600, 1 << 20])
def test_licences_go(block):
    mark = b'*** %s OF THE PROJECT GUTENBERG EBOOK A ***\n'
    books = [b''.join(b'%d book %d\n' % (i, n) for i in range(300)) for n in range(2)]
    junk = b'licence text\n' * 200
    text = junk[:100] + b''.join(mark % b'START' + b + mark % b'END' + junk for b in books)
    report = Counter()
    blocks = [text[i:i + block] for i in range(0, len(text), block)]
    assert b''.join(pd.without_licence(blocks, report)).split() == b''.join(books).split()
    assert b''.join(pd.without_licence([b'no book at all\n' * 99], report)) == b'no book at all\n' * 99


def english(n, seed):
    """n documents of about 120 words."""
    return list(pd.story_documents(n, seed))


def swedish(n, seed):
    rng, words = random.Random(seed), pd.SWEDISH.split()
    return [' '.join(rng.choices(words, k=80)) + f' {i}.' for i in range(n)]


def test_planted_junk_is_found_and_the_rest_kept(tmp_path):
    clean, val = english(300, 1), english(30, 2)
    source = Path(random.__file__).read_text().split('\n\n\n')
    code = [piece for piece in source if len(piece) > 800 and piece.startswith('def') or piece.startswith('class')][:3]
    junk = ['buy now cheap shoes ' * 40, '\n'.join([clean[9]] * 4), english(1, 9)[0].replace(' ', ' ... ')]
    moji = [t.replace('.', ' Ã¤r â€™.', 1) for t in english(7, 3)]
    near, leaked = [changed(t, 5) for t in clean[:6]], [changed(t, 5) for t in val[:4]]
    docs = clean + moji + clean[50:55] + near + leaked + val[10:12] + swedish(8, 1) + code + junk
    write(tmp_path / 'in/tales.train', '<|endoftext|>'.join(random.Random(3).sample(docs, len(docs))))
    write(tmp_path / 'in/tales.dev', '<|endoftext|>'.join(val + swedish(2, 2)))
    write(tmp_path / 'in/berattelser.train', '<|endoftext|>'.join(swedish(40, 5)))
    data = prepare(tmp_path / 'in', tmp_path / 'out', clean='all', dedup=True, val_fraction=0.1)
    kept = set(texts(data, 'train'))
    assert kept >= set(clean[6:]) | set(swedish(40, 5)) | {t.replace('Ã¤r â€™', 'är ’') for t in moji}
    assert sum(t in kept for t in clean[:6] + near) == 6                 # one of each pair
    assert len(kept) == len(texts(data, 'train')) == 300 + 7 + 40
    assert set(texts(data, 'val')) == set(val + swedish(2, 2))           # another language stays where it is held out
    report = data.meta['cleaning']['by_source']['tales']
    dropped = {what.split(', ')[1]: n for what, n in report.items() if what.startswith('training')}
    assert dropped.pop('language sv') == 8 and dropped.pop('language code') == len(code) == 2
    assert dropped.pop('near duplicates of earlier ones') == 11 and dropped.pop('near duplicates of held-out ones') == 4
    assert dropped.pop('identical to held-out ones') == 2 and sum(dropped.values()) == len(junk)
    assert set(dropped) == {'the same 2 words again and again', 'repeated lines', 'symbols'}
    assert report['documents changed, unicode'] == 7 and data.meta['settings']['clean'] == 'all'
    assert data.meta['cleaning']['languages'] == {'tales': ['en'], 'berattelser': ['sv']}
    assert all(1 <= len(pieces) <= 3 for pieces in data.meta['cleaning']['examples'].values())
    both = prepare(tmp_path / 'in', tmp_path / 'out', clean='language', languages='sv,code')
    assert set(texts(both, 'train')) == set(swedish(8, 1) + swedish(40, 5) + code)


@pytest.mark.parametrize('kind', ['prose', 'dialogue', 'code'])
def test_repetition_by_kind(kind):
    lines = ''.join(f'*MOT:\tyes{i} a{i}.\n*CHI:\tno {i % 9} no.\n' for i in range(60))
    assert bool(pd.repetition(lines, kind)) == (kind == 'prose') and pd.repetition('spam ham ' * 60, kind)
    assert not pd.repetition(english(1, 4)[0], kind) and not pd.repetition('short ' * 9, kind)


@needs_shared
@pytest.mark.parametrize('name, language', [('babylm/switchboard.dev', 'en'), ('babylm/wiki_easy.dev', 'en'),
                                            ('swedish/ud_talbanken_pud_sentences.txt', 'sv'),
                                            ('code/thealgorithms_python.dev.txt', 'code')])
def test_language_of_real_text(name, language):
    table = pd.log_probabilities(pd.seeds())
    text = lzma.decompress((SHARED / f'{name}.xz').read_bytes()).decode()
    pieces = [text[i:i + 2000] for i in range(0, len(text), 2000)]
    found = Counter(pd.LANGUAGES[table.take(pd.grams(piece), 1).mean(1).argmax()] for piece in pieces)
    assert found[language] >= 0.9 * len(pieces), found             # before it has seen the data at hand


# Near duplicates

def changed(text, *at):
    """The text with other words at some places."""
    words = text.split()
    for i in at:
        words[i % len(words)] = f'other{i}'
    return ' '.join(words)


def passages(n, seed):
    rng = random.Random(seed)
    return [' '.join(f'w{rng.randrange(3000)}' for _ in range(120)) for _ in range(n)]


def test_near_duplicates_are_dropped_and_clean_documents_kept(tmp_path):
    clean, val = passages(200, 1), passages(20, 2)
    near = [changed(t, 5) for t in clean[:15]] + [t.upper() for t in clean[15:20]] + clean[20:25]
    leaked = [changed(t, 60) for t in val[:10]]
    far = [' '.join(t.split()[:40] + u.split()[:80]) for t, u in zip(clean[30:40], passages(10, 3))]   # share a third
    write(tmp_path / 'in/a.train', '\n\n'.join(clean + near + leaked + far))
    write(tmp_path / 'in/a.dev', '\n\n'.join(val + [changed(val[3], 7)]))
    data = prepare(tmp_path / 'in', tmp_path / 'out', dedup=True)
    assert texts(data, 'train') == clean + far and len(texts(data, 'val')) == 21       # held-out ones all stay
    assert data.meta['report'] == {'training documents dropped, near duplicates of earlier ones': 25,
                                   'training documents dropped, near duplicates of held-out ones': 10}
    assert data.meta['settings']['dedup'] is True
    assert len(texts(prepare(tmp_path / 'in', tmp_path / 'out'), 'train')) == 245      # it is a choice


def test_near_duplicates_across_batches_and_a_split_by_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(pd, 'BATCH_BYTES', 3000)
    docs = passages(300, 4)
    rows = docs + [changed(t, 50) for t in docs]
    write(tmp_path / 'x.txt', '\n\n'.join(rows))
    data = prepare(tmp_path / 'x.txt', tmp_path / 'out', dedup=True, val_fraction=0.1)
    train, val = set(texts(data, 'train')), set(texts(data, 'val'))
    for a, b in zip(docs, rows[300:]):
        assert (a in train) + (b in train) == (0 if {a, b} & val else 1)
    again = prepare(tmp_path / 'x.txt', tmp_path / 'out', dedup=True, val_fraction=0.1)
    assert again.meta['fingerprint'] == data.meta['fingerprint']


def test_minhash_finds_as_many_as_it_should():
    """Pairs that share 85 % of their five words in a row are nearly always found, pairs that share 40 % hardly ever."""
    rng = random.Random(0)
    for share, low, high in ((0.85, 0.93, 1), (0.4, 0, 0.06)):
        sketches, n = pd.Sketches(), 150
        for i in range(n):
            words = [f'{i}w{rng.randrange(10**6)}' for _ in range(400)]
            k = round(400 * 2 * share / (1 + share))                  # shared of the two: k / (800 - k)
            sketches.add(' '.join(words), False)
            sketches.add(' '.join(words[:k] + [f'{i}v{rng.randrange(10**6)}' for _ in range(400 - k)]), False)
        found = sketches.repeats()[1::2]
        assert low <= (found == 2).mean() <= high


# Difficulty

def test_measures_of_a_text_are_their_definitions():
    text = 'The cat sat. The cat sat on the mat! It was remarkable, ordinarily.'
    values = dict(zip(pd.TEXT_MEASURES, pd.text_measures(text)))
    words = 'the cat sat the cat sat on the mat it was remarkable ordinarily'.split()
    syllables = [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 5]              # as groups of vowels: re-ma-rka-ble, o-rdi-na-ri-ly
    assert values['sentence_words'] == pytest.approx(13 / 3) and values['diversity'] == 9 / 13
    assert values['word_letters'] == pytest.approx(sum(map(len, words)) / 13)
    assert values['lix'] == pytest.approx(13 / 3 + 100 * 2 / 13)
    assert values['flesch_kincaid'] == pytest.approx(0.39 * 13 / 3 + 11.8 * sum(syllables) / 13 - 15.59)
    assert pd.mtld('a a a a a a'.split()) == 2 and pd.mtld(list('abcdefgh')) == 8
    assert pd.mtld('a b c d a b c d a b c d'.split()) == pytest.approx(12 / (2 + (1 - 2 / 2) / 0.28))
    easy, hard = pd.text_measures('la la ' * 300)[0], pd.text_measures(' '.join(map(str, range(9000, 9400))))[0]
    assert easy < 0.05 < hard


def test_surprisal_is_that_of_slow_counts(tmp_path):
    write(tmp_path / 'in/a.train', '\n\n'.join(prose(40, 1)))
    write(tmp_path / 'in/a.dev', '\n\n'.join(prose(6, 2)))
    data = prepare(tmp_path / 'in', tmp_path / 'out', scores=True)
    one, two = Counter(data.tokens['train'].tolist()), Counter()
    tokens = data.tokens['train'].tolist()
    two.update(zip([0] + tokens[:-1], tokens))
    total = sum(one.values()) + 257
    for split, own in (('train', 1), ('val', 0)):
        scores = np.load(data.folder / f'{split}.scores.npy')
        assert scores.dtype.names == tuple(pd.MEASURES) and len(scores) == len(data.docs[split])
        assert (scores['bigram'] == data.docs[split]['difficulty']).all()
        for text, row in zip(texts(data, split), scores):
            ids = [256, *text.encode()]
            p = [(one[t] + 1) / total for t in ids]
            bits = [-log((two[a, b] - own + 32 * q) / (one[a] - own + 32), 2) for a, b, q in zip(ids, ids[1:], p[1:])]
            assert row['unigram'] == pytest.approx(-sum(log(q, 2) for q in p[1:]) / len(text), rel=1e-5)
            assert row['bigram'] == pytest.approx(sum(bits) / len(bits), rel=1e-4)
            assert row['mtld'] == pytest.approx(pd.mtld(re.findall('[a-z]+', text)), rel=1e-5)
    assert len(data.meta['rank_correlations']) == len(pd.MEASURES)


def test_surprisal_in_pieces_is_surprisal(tmp_path, monkeypatch):
    write(tmp_path / 'in/childes.train', '\n\n'.join(prose(40, 1)))
    write(tmp_path / 'in/childes.dev', '\n\n'.join(prose(6, 2)))
    whole = prepare(tmp_path / 'in', tmp_path / 'a', scores=True)
    monkeypatch.setattr(pd.surprisal, '__defaults__', (101, 1 << 22))
    pieces = prepare(tmp_path / 'in', tmp_path / 'b', scores=True)
    for split in ('train', 'val'):
        a, b = (np.load(d.folder / f'{split}.scores.npy') for d in (whole, pieces))
        np.testing.assert_allclose(a['bigram'], b['bigram'], rtol=1e-5)
        assert (a['source_rank'] == 1).all()


def test_the_order_of_sources():
    ranks = {name: pd.source_rank(name, pd.SPOKEN_FIRST) for name in ('childes', 'aochildes', 'bnc_spoken', 'switchboard', 'open_subtitles', 'qed',
                                                     'cbt', 'children_stories', 'simple_wikipedia', 'wikipedia', 'gutenberg', 'x')}
    assert list(ranks.values()) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 6, 0]


def test_loss_is_that_of_the_closing_evaluation(finished, tmp_path):
    """With another tokenizer than the checkpoint's: bits a byte do not depend on who keeps the text."""
    for seed, name in enumerate(('tales.train', 'notes.train', 'tales.dev', 'notes.dev')):
        write(tmp_path / 'in' / name, '\n\n'.join(tales(50 - 10 * seed, seed)))
    model, _ = sample.load(finished[0])
    data = prepare(tmp_path / 'in', tmp_path, tokenizer='bpe', vocab_size=320, score_with=str(finished[0]))
    theirs = prepare(tmp_path / 'in', tmp_path)
    for split in ('train', 'val'):
        scores, docs = np.load(data.folder / f'{split}.scores.npy'), data.docs[split]
        assert scores.dtype.names == (*pd.MEASURES, 'loss') and (docs['difficulty'] == scores['loss']).all()
        wanted = sample.bits_per_byte(model, theirs.tokens[split], theirs.docs[split])['per_source']
        for i, bpb in wanted.items():
            mine = docs['source'] == i
            assert np.average(scores['loss'][mine], weights=docs['bytes'][mine]) == pytest.approx(bpb, rel=1e-5)
    assert len(data.meta['rank_correlations']['loss']) == len(pd.MEASURES) + 1
    again = prepare(tmp_path / 'in', tmp_path, score_with=str(finished[0]), difficulty='mtld')
    assert (again.docs['val']['difficulty'] == np.load(again.folder / 'val.scores.npy')['mtld']).all()


# Quality

def good_and_bad(n, seed=0):
    """n paragraphs of each kind, which share most of their words."""
    rng = random.Random(seed)
    return ([' '.join([*rng.choices('the a dog cat house tree saw'.split(), k=20), rng.choice(own), str(i)]) for i in range(n)]
            for own in (['found', 'therefore', 'because'], ['click', 'subscribe', 'cookies']))


def test_quality_separates_planted_words_and_is_a_coin_toss_without_them(monkeypatch):
    monkeypatch.setattr(pd, 'SLOTS', 1 << 12)
    good, bad = map(list, good_and_bad(300))
    weights, report = pd.fit_quality(set(good), set(bad[:60]))       # five of one side for one of the other
    assert report['documents'] == 288 and report['held_out'] == 72 and report['accuracy'] > 0.9
    fresh = [np.array([pd.quality(weights, text) for text in texts]) for texts in good_and_bad(100, seed=1)]
    assert (fresh[0] > 0.5).mean() > 0.95 and (fresh[1] < 0.5).mean() > 0.95
    assert np.array_equal(pd.fit_quality(set(good[::-1]), set(bad[:60]))[0], weights)
    mixed = good + bad
    random.Random(1).shuffle(mixed)
    assert 0.35 < pd.fit_quality(set(mixed[:300]), set(mixed[300:]))[1]['accuracy'] < 0.65


def test_quality_is_the_optimum_of_the_penalised_likelihood(monkeypatch):
    monkeypatch.setattr(pd, 'SLOTS', 1 << 12)
    good, bad = map(list, good_and_bad(30))
    weights, _ = pd.fit_quality(set(good), set(bad + good[:5]))      # five that are on both sides are left out

    def cost(w):
        total = pd.DECAY / 2 * (w @ w)
        for y, texts in ((1, good[5:]), (0, bad)):
            texts = sorted(texts, key=lambda text: pd.key_of(text.encode()))
            learned = [text for i, text in enumerate(texts) if i % 5]
            total -= 0.5 * np.mean([log(abs(1 - y - pd.quality(w, text))) for text in learned])
        return total
    rng = np.random.default_rng(0)
    for step in (1e-3, -1e-3):
        assert cost(weights) < cost(weights * (1 + step))
        assert cost(weights) < cost(weights + step * rng.normal(size=len(weights)) * (weights != 0))


def test_documents_below_the_threshold_are_dropped_from_training_alone(tmp_path):
    good, bad = map(list, good_and_bad(200))
    paths = [str(write(tmp_path / f'{name}.txt.gz', '\n\n'.join(texts[:100]))) for name, texts in (('good', good), ('bad', bad))]
    write(tmp_path / 'in/a.train', '\n\n'.join(good[100:] + bad[100:]))
    write(tmp_path / 'in/a.dev', '\n\n'.join(bad[:10]))
    data = prepare(tmp_path / 'in', tmp_path / 'out', good=paths[0], bad=paths[1], min_quality=0.5)
    assert sorted(texts(data, 'train')) == sorted(good[100:]) and texts(data, 'val') == bad[:10]
    assert data.meta['report'] == {'training documents dropped, quality below 0.5': 100}
    assert data.meta['quality'] == dict(documents=160, held_out=40, accuracy=1.0)
    assert (np.load(data.folder / 'train.scores.npy')['quality'] > 0.5).all()
    assert (np.load(data.folder / 'val.scores.npy')['quality'] < 0.5).all()
    assert 'right about 100.0% of 40 others' in pd.summary(data.folder, data.meta)
    assert data.meta['inputs'] == [pd.sha256_of(path) for path in paths]
    moved = str(Path(paths[0]).rename(tmp_path / 'moved.txt.gz'))                    # a path says nothing about the content
    again = prepare(tmp_path / 'in', tmp_path / 'out', good=moved, bad=paths[1], min_quality=0.5)
    assert again.meta['fingerprint'] == data.meta['fingerprint']
    assert prepare(tmp_path / 'in', tmp_path / 'out', good=moved, bad=paths[1]).docs['train'].size == 200


# Word classes

def test_agreement_is_that_of_slow_definitions():
    assert pd.agreement([0, 0, 1, 1], [2, 2, 0, 0]) == (1, pytest.approx(1)) and pd.agreement([0], [0]) == (1, 1)
    assert pd.agreement([0, 0, 0, 0], [0, 0, 0, 1]) == (0.75, pytest.approx(0))
    assert pd.agreement([0, 0, 1, 1], [0, 1, 0, 1]) == (0.5, pytest.approx(0))
    assert pd.agreement([0, 1, 2, 3], [0, 0, 1, 1]) == (1, pytest.approx(2 / 3))       # homogeneity 1, completeness 1/2
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 6, 300)
    tags = (classes // 2 + (rng.random(300) < 0.3)).tolist()
    classes = classes.tolist()

    def left(of, given):               # entropy of one label where the other is known
        pairs, known = Counter(zip(of, given)), Counter(given)
        return -sum(k / 300 * log(k / known[b]) for (_, b), k in pairs.items())
    homogeneity = 1 - left(tags, classes) / left(tags, [0] * 300)
    completeness = 1 - left(classes, tags) / left(classes, [0] * 300)
    right = sum(max(Counter(t for c, t in zip(classes, tags) if c == own).values()) for own in set(classes))
    assert pd.agreement(classes, tags) == (right / 300, pytest.approx(2 / (1 / homogeneity + 1 / completeness)))


GRAMMAR = {kind: [kind + a + b for a in 'aeiou' for b in 'lmnr'] for kind in ('det', 'adj', 'noun', 'verb', 'adv')}


@pytest.fixture(scope='module')
def grammar(tmp_path_factory):
    """A folder of sentences by the rule det adj noun verb det noun adv, and a file of tagged words."""
    folder, rng = tmp_path_factory.mktemp('grammar'), random.Random(0)
    rule = 'det adj noun verb det noun adv'.split()
    made = [' '.join(rng.choice(GRAMMAR[kind]) for kind in rule).capitalize() + f' {i}.' for i in range(1500)]
    write(folder / 'in/a.train', '\n\n'.join(made[100:]))
    write(folder / 'in/a.dev', '\n\n'.join(made[:100]))
    write(folder / 'tagged.tsv', '\n\n'.join('\n'.join(f'{word}\t{kind}' for word in words) for kind, words in GRAMMAR.items()))
    return folder


def test_classes_of_a_grammar_are_recovered(grammar, tmp_path):
    data = prepare(grammar / 'in', tmp_path, tokenizer='bpe', vocab_size=400, classes=5, check_classes=str(grammar / 'tagged.tsv'))
    check = data.meta['classes']['check']
    assert check['induced'] == [1, pytest.approx(1)]
    assert check['one'] == [0.2, pytest.approx(0)] and 0.2 < check['random'][0] < 0.5 and check['random'][1] < 0.3
    assert {word[:3] for word in data.meta['classes']['words'][0]} in [{kind[:3]} for kind in GRAMMAR]
    assert 'induced classes: many-to-one accuracy 1.000, V-measure 1.000' in pd.summary(data.folder, data.meta)
    refuses('only 100 words', prepare, grammar / 'in', tmp_path, classes=101)


@pytest.mark.parametrize('kind', ['bpe', 'bytes'])
def test_the_table_counts_every_token_in_the_class_of_its_word(grammar, tmp_path, kind):
    data = prepare(grammar / 'in', tmp_path, tokenizer=kind, vocab_size=400, classes=5)
    table, tokens = np.load(data.folder / 'classes.npy'), data.tokens['train']
    times = np.bincount(tokens, minlength=data.tokenizer.vocab_size)
    times[data.tokenizer.bos] = 0
    assert table.dtype == np.float32 and table.shape == (len(times), 8) and (table.sum(1) == times).all()
    ids = {piece: i for i, piece in enumerate(data.tokenizer.table)}
    assert table[ids[b'.'], 6] == times[ids[b'.']] > 0 and table[ids[b'7'], 5] == times[ids[b'7']] > 0
    if kind == 'bytes':
        owner = {word: label for label, words in enumerate(GRAMMAR.values()) for word in words}
        u_in = Counter(owner[word] for text in texts(data, 'train') for word in text.lower().split()[:7] for c in word if c == 'u')
        assert sorted(table[ids[b'u']]) == sorted([*u_in.values()] + [0] * (8 - len(u_in)))


def test_words_of_many_bytes_in_batches_are_words(tmp_path, monkeypatch):
    write(tmp_path / 'in/a.train', '\n\n'.join(f'Zoë såg {i} träd’s 🙂 “hus” en gång till.' for i in range(300)))
    write(tmp_path / 'in/a.dev', 'Zoë såg hus.')
    data = prepare(tmp_path / 'in', tmp_path / 'out', classes=2)
    writer = SimpleNamespace(path=data.folder / 'train.bin', dtype=data.meta['dtype'], rows=[data.docs['train']],
                             counts=np.array([[300, 0, 20_000, 0]]))
    pieces, text, (token, piece, count) = pd.read_words(writer, data.tokenizer, batch=7)
    assert {'Zoë', ' såg', ' träd’s', ' “', 'hus', ' gång'} <= set(pieces)
    assert ''.join(pieces[i] for i in text) == ''.join('\n' + text for text in texts(data, 'train'))
    assert sum(n for p, n in zip(piece, count) if pieces[p] == ' 🙂') == 300 * 5           # a space and four bytes
    half = pd.read_words(writer, data.tokenizer, batch=10, most=19_000)[1]
    assert abs(len(half) / len(text) - 0.5) < 0.05


def test_the_same_classes_in_every_run(grammar, tmp_path):
    code = ('import prepare_data as p, hashlib\n'
            f'folder = p.build("files:{grammar}/in", "bytes", quiet=True, classes=4, overwrite=True, data_dir="{tmp_path}")\n'
            'print(p.sha256_of(folder / "classes.npy"))')
    assert len({subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True,
                               env=os.environ | dict(PYTHONHASHSEED=seed)).stdout for seed in '12'}) == 1


def test_classes_of_the_stories_fit_their_lexicon(tmp_path):
    """config/stories.txt says what its words are; the classes are not told."""
    lists = pd.World().lists
    tags = dict(name='she he they', job='job', trait='trait', manner='manner', colour='colour', month='month', tree='tree')
    words = {tag: {word for name in names.split() for word in lists[name] if ' ' not in word} for tag, names in tags.items()}
    once = Counter(word.lower() for some in words.values() for word in some)
    lines = [f'{word}\t{tag}' for tag, some in words.items() for word in sorted(some) if once[word.lower()] == 1]
    tagged = write(tmp_path / 'lexicon.tsv.xz', '\n'.join(lines))
    data = pd.open_data(pd.build('stories', 'bytes', documents=800, classes=40, check_classes=str(tagged), data_dir=tmp_path,
                                 quiet=True), 'stories')
    check = data.meta['classes']['check']
    assert check['induced'][0] > 0.8 > 0.6 > check['random'][0] > check['one'][0]
    assert check['induced'][1] > 2 * check['random'][1]


@pytest.mark.parametrize('content, words', [
    ('# text = No\n1\tNo\tno\tINTJ\tx\t_\t0\troot\t_\t_\n2-3\tdon\'t\t_\t_\t_\t_\t_\t_\t_\t_\n'
     '2\tdo\tdo\tAUX\tx\t_\t0\tx\t_\t_\n\n1\ta\ta\tDET\tx\t_\t0\tx\t_\t_\n', [['No', 'INTJ'], ['do', 'AUX'], ['a', 'DET']]),
    ('The\tDET\r\ncat\tNOUN\r\n\r\nsat\tVERB\r\n', [['The', 'DET'], ['cat', 'NOUN'], ['sat', 'VERB']]),
    ('plain text, no tags', [])])
def test_tagged_files(content, words):
    assert pd.tagged_words(doc.decode() for doc in split_documents(content.encode())[0]) == words


# Bad input: one sentence, and nothing left behind

@pytest.mark.parametrize('options, match', [
    (dict(difficulty='mtdl'), 'mtdl.*choose compression, mtld'), (dict(difficulty='loss', scores=True), 'choose compression'),
    (dict(good='{x}'), 'give both files'), (dict(min_quality=0.5), 'give both files'), (dict(good='{x}', bad='{none}'), 'No such file'),
    (dict(good='{x}', bad='{x}'), '10 or more of each'), (dict(good='{x}', bad='{x}', min_quality=2), 'probability'),
    (dict(classes=-1), 'give 2 or more'), (dict(classes=1), 'give 2 or more'), (dict(check_classes='{x}'), 'give 2 or more'),
    (dict(classes=4, check_classes='{x}'), 'no tagged words'), (dict(score_with='{none}'), 'does not exist'),
    (dict(score_with='{x}'), 'not a checkpoint')])
def test_options_that_cannot_work_are_refused_before_the_work_starts(tmp_path, monkeypatch, options, match):
    path = write(tmp_path / 'x.txt', '\n\n'.join(prose(50)))
    monkeypatch.setattr(pd, 'fill', lambda *args: pytest.fail('the work started'))
    names = dict(x=path, none=tmp_path / 'none')
    options = {key: value.format(**names) if isinstance(value, str) else value for key, value in options.items()}
    refuses(match, prepare, path, tmp_path / 'data', **options)
    assert not list((tmp_path / 'data').glob('*'))


def test_a_damaged_checkpoint_is_one_sentence_on_the_command_line(tmp_path):
    path = write(tmp_path / 'x.txt', '\n\n'.join(prose(50)))
    command = [sys.executable, 'prepare_data.py', f'files:{path}', f'--data_dir={tmp_path}', f'--score_with={path}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('prepare_data.py: ') and done.stderr.count('\n') == 1


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
    refuses('spelling', prepare, tmp_path / 'in', tmp_path / 'out', clean='unicode,spelling')
    assert list((tmp_path / 'out').iterdir()) == []
    prepare(tmp_path / 'in', tmp_path / 'out')


def test_one_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pd, 'MAX_LINE', 1000)
    path = write(tmp_path / 'x.jsonl', json.dumps(dict(text='a' * 900)) + '\n' + json.dumps(dict(text='a' * 1000)))
    refuses(r'x\.jsonl line 2 has over', prepare, path, tmp_path)
    monkeypatch.setattr(pd, 'BATCH_BYTES', 200_000)
    monkeypatch.setattr(pd, 'SAMPLE_BYTES', 200_000)
    path = write(tmp_path / 'y.txt', ' '.join(map(str, range(1_500_000))))                       # 10.9 MB
    tracemalloc.start()
    data = prepare(path, tmp_path, val_fraction=0.1)
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    assert sum(s['bytes'] for s in data.meta['splits'].values()) == path.stat().st_size


def test_missing_damaged_unknown(tmp_path):
    refuses('does not exist', prepare, tmp_path / 'none', tmp_path)
    mislabelled = write(tmp_path / 'x.txt.xz', 'a\n\nb' * 999).rename(tmp_path / 'x.gz')
    refuses('damaged', prepare, mislabelled, tmp_path)
    whole = write(tmp_path / 'y.xz', '\n\n'.join(prose(99)))
    whole.write_bytes(whole.read_bytes()[:-30])
    refuses('damaged', prepare, whole, tmp_path)
    refuses('did you mean babylm', pd.build, 'babylmm', data_dir=tmp_path)


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
    code = ('import prepare_data as p, os, signal, time\n'
            'p.SplitWriter.write = lambda *a: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5))\n'
            f'p.main(["files:{tmp_path}/x.txt", "--tokenizer=bytes", "--data_dir={tmp_path}/data"])')
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


# Opening: what the trainer must not trust

def spoil(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


@pytest.mark.parametrize('name, change, match', [
    ('train.bin', lambda b: b[:-2], 'tokens where meta.json says'),
    ('train.bin', lambda b: b[2:4] + b[:2] + b[4:], 'not the file that meta.json describes'),
    ('train.docs.npy', lambda b: b[:-18], 'damaged'),
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


def test_open_refuses_documents_without_bos(small):
    data, _ = small
    docs = np.load(data.folder / 'train.docs.npy')
    docs['start'][5] += 1
    np.save(data.folder / 'train.docs.npy', docs)
    refuses('do not begin with BOS', pd.open_data, data.folder)


def test_open_sees_changed_sources(small):
    data, source = small
    name = f'files:{source}'
    pd.open_data(data.folder, name)
    source.write_text(source.read_text() + ' more')
    refuses('changed since', pd.open_data, data.folder, name)
    source.unlink()
    pd.open_data(data.folder, name)                                      # the text need not be kept


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
                self.send_header('Content-Length', str(len(body) - start + (94 if trouble == 'lie' else 0)))
                self.send_header('ETag', web.version)
                self.end_headers()
                part = body[start:]
                self.wfile.write(part[:len(part) // 2] if trouble in ('cut', 'no ranges') else part)

        self.httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.httpd.server_port}'
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setattr(pd, 'PATIENCE', 0.01)
    web = Web()
    yield web
    web.httpd.shutdown()


STORIES = {name: '\n<|endoftext|>\n'.join(prose(n, n)).encode()
           for name, n in (('TinyStories-train.txt', 50), ('TinyStories-valid.txt', 5))}


def test_download(tmp_path, web):
    web.files = {'TinyStories-train.txt': STORIES['TinyStories-train.txt']}
    settings = dict(tokenizer='bytes', data_dir=tmp_path / 'data', base_url=web.url, quiet=True)
    message = refuses('404', pd.build, 'tinystories', **settings)
    assert str(tmp_path / 'data/raw/tinystories/TinyStories-valid.txt') in message
    assert web.asked.count(('TinyStories-valid.txt', None)) == 1                  # what is not there is not asked for again
    web.files = dict(STORIES)
    data = pd.open_data(pd.build('tinystories', **settings), 'tinystories')
    assert (len(data.docs['train']), len(data.docs['val'])) == (50, 5)
    assert data.meta['sources'] == ['TinyStories']
    assert data.folder.name == 'tinystories-bytes' and data.meta['licence'] == 'CDLA-Sharing-1.0'
    assert not list((tmp_path / 'data/raw/tinystories').glob('.*'))
    pd.build('tinystories', **settings, overwrite=True)                           # in place: nothing is asked for
    assert [name for name, _ in web.asked] == ['TinyStories-train.txt'] + 2 * ['TinyStories-valid.txt']


@pytest.mark.parametrize('troubles', [['cut'], ['cut', 'cut', 503], [503, 'cut', 429, 'cut'], ['no ranges', 'cut'], ['lie'],
                                      ['cut', 416, 'cut']])
def test_a_download_goes_on_where_it_broke(tmp_path, web, troubles):
    web.files, web.troubles = {'f.txt': b'0123456789' * 1000}, {'f.txt': list(troubles)}
    pd.download(f'{web.url}/f.txt', tmp_path / 'f.txt')
    assert (tmp_path / 'f.txt').read_bytes() == web.files['f.txt'] and [p.name for p in tmp_path.iterdir()] == ['f.txt']
    if troubles == ['cut', 'cut', 503]:
        assert [r for _, r in web.asked] == [None, 'bytes=5000-', 'bytes=7500-', 'bytes=7500-']


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


def test_digests_are_in_the_table(tmp_path, web):
    web.files = {'TinyStoriesV2-GPT4-train.txt': b'a', 'TinyStoriesV2-GPT4-valid.txt': b'b'}
    refuses('sha256', pd.build, 'tinystories_v2', 'bytes', data_dir=tmp_path, base_url=web.url)
    for entry in pd.DATASETS.values():
        assert entry['about'] and entry['licence'] and set(entry.get('sha256', {})) <= set(entry['files'])
        assert all(re.fullmatch('[0-9a-f]{64}', digest) for digest in entry.get('sha256', {}).values())


@pytest.mark.parametrize('name', pd.DATASETS)
def test_every_named_data_set_is_built_from_the_paths_it_names(tmp_path, web, monkeypatch, name):
    monkeypatch.setattr(pd, 'VAL_STORIES', 20)
    monkeypatch.setattr(pd, 'PAIRS', 20)
    entry, rows, texts_in = pd.DATASETS[name], {}, set()
    monkeypatch.setitem(pd.DATASETS, name, entry | dict(sha256={}))              # these are other files
    for seed, (file, path) in enumerate(entry['files'].items()):
        rows[file] = prose(30, seed)
        body = '\n\n'.join(rows[file]).encode()
        if path.endswith('.parquet'):
            pytest.importorskip('pyarrow')
            import pyarrow
            from pyarrow.parquet import write_table
            write_table(pyarrow.table(dict(text=rows[file])), tmp_path / 'x.parquet')
            body = (tmp_path / 'x.parquet').read_bytes()
        web.files[f'/{entry["repo"]}/resolve/main/{path}'] = body
        texts_in.update(rows[file])
    if name == 'python':
        write(tmp_path / 'raw/python/m.py', 'x = 1\n' * 200)
        write(tmp_path / 'raw/python/n.py', 'y = 2\n' * 200)
    folder = pd.build(name, 'bytes', data_dir=tmp_path, base_url=web.url, documents=20, quiet=True,
                      min_doc_bytes=0)
    data = pd.open_data(folder, name)
    assert len(web.asked) == len(entry['files'])
    assert data.meta['licence'] == entry['licence'] and f'licence: {entry["licence"]}' in pd.summary(folder, data.meta)
    if texts_in:                                                                 # nothing lost, and splits kept
        assert {t for split in data.docs for t in texts(data, split)} == texts_in
        held = {t for file in rows if re.search(r'\.dev|valid', file) for t in rows[file]}
        assert not held or set(texts(data, 'val')) == held


def test_help_says_size_licence_and_terms(capsys):
    with pytest.raises(SystemExit):
        pd.main(['--help'])
    shown = capsys.readouterr().out
    for name, entry in pd.DATASETS.items():
        about, licence = re.escape(entry['about']), re.escape(entry['licence'])
        assert re.search(rf'  {name} +{about}\n +about {entry["mb"]:,} MB; {licence}\n', shown)
        assert re.search('a document (is|ends at)', entry['about'])
        assert 'babylm' not in name or 'BNC, and EWoK' in entry['licence']


def test_download_without_network_says_where_to_put_the_file(tmp_path):
    message = refuses('could not be downloaded', pd.build, 'babylm', data_dir=tmp_path,
                      base_url='http://127.0.0.1:9')
    assert 'aochildes.train' in message


def test_official_folders_and_partly_known_names_are_a_corpus_too(tmp_path):
    """train_10M/x.train and dev/x.dev are one source; a name of ours among others starts no download."""
    for name, n in (('train_10M/switchboard.train', 30), ('dev/switchboard.dev', 4), ('dev/mine.dev', 3)):
        write(tmp_path / 'raw/babylm' / name, '\n\n'.join(prose(n, n)))
    write(tmp_path / 'raw/babylm/gutenberg.train', '\n\n'.join(prose(9, 1)))
    data = pd.open_data(pd.build('babylm', 'bytes', data_dir=tmp_path, quiet=True, min_doc_bytes=0), 'babylm')
    assert data.meta['sources'] == ['gutenberg', 'mine', 'switchboard']
    assert data.meta['splits']['val']['sources']['switchboard']['documents'] == 4


def test_local_corpus_in_place_of_the_download(tmp_path):
    for split, n in (('train', 30), ('dev', 4)):
        write(tmp_path / 'raw/babylm' / f'mine.{split}', '\n\n'.join(prose(n, n)))
    data = pd.open_data(pd.build('babylm', 'bytes', data_dir=tmp_path, quiet=True), 'babylm')
    assert data.meta['sources'] == ['mine']


# Python

def test_python_is_the_library_of_the_python_that_runs(tmp_path, monkeypatch):
    library = tmp_path / 'lib'
    for n in range(30):
        write(library / f'pkg/m{n}.py', f'"""Module {n}."""\n\ndef f{n}(x):\n    return x + {n}\n' * 9)
    for name in ('site-packages/theirs.py', 'test/data.py', 'pkg/readme.txt'):
        write(library / name, 'x = 1\n')
    write(library / 'old.py', 'print "2.7"\n')
    write(library / 'latin.py', b'# caf\xe9\n')
    monkeypatch.setattr(pd.sysconfig, 'get_paths', lambda: dict(stdlib=str(library)))
    data = pd.open_data(pd.build('python', 'bytes', data_dir=tmp_path, quiet=True), 'python')
    written = sorted(texts(data, 'train') + texts(data, 'val'))
    assert written == sorted((library / f'pkg/m{n}.py').read_text().rstrip() for n in range(30))
    assert data.meta['report'] == {'files dropped, no Python that compiles': 2}


def test_python_of_a_folder(tmp_path):
    for n in range(9):
        write(tmp_path / f'raw/python/a/m{n}.py', f'def f{n}(x):\n    return x * {n}\n' * 40)
    data = pd.open_data(pd.build('python', 'bytes', data_dir=tmp_path, quiet=True), 'python')
    assert len(texts(data, 'train') + texts(data, 'val')) == 9
    for split, n in (('train', 30), ('dev', 4)):                   # and a corpus of another kind is taken as it is
        write(tmp_path / f'b/raw/python/code.{split}.txt', '<|endoftext|>'.join(prose(n, n)))
    data = pd.open_data(pd.build('python', 'bytes', data_dir=tmp_path / 'b', quiet=True), 'python')
    assert (len(data.docs['train']), len(data.docs['val'])) == (30, 4) and data.meta['files']


def test_a_folder_of_python_files_is_code(tmp_path):
    """Files are documents, those that do not compile are counted, and a change of the folder is seen."""
    for n in range(9):
        write(tmp_path / f'src/a/m{n}.py', f'def f{n}(x):\n\n    return x * {n}\n' * 40)
    write(tmp_path / 'src/bad.py', 'print "2.7"\n')
    data = prepare(tmp_path / 'src', tmp_path / 'out')
    assert len(texts(data, 'train') + texts(data, 'val')) == 9 and data.meta['sources'] == ['python']
    assert data.meta['report'] == {'files dropped, no Python that compiles': 1}
    write(tmp_path / 'src/a/m1.py', 'x = 1\n')
    refuses('changed since', pd.open_data, data.folder, f'files:{tmp_path / "src"}')


FAKE_BANDIT = """import json, pathlib, sys
pathlib.Path(__file__).with_name('calls').open('a').write('x')
metrics = {}
for path in pathlib.Path('.').rglob('*.py'):
    text = path.read_text()
    if 'unread' not in text:
        metrics[f'./{path}'] = {f'SEVERITY.{s.upper()}': text.count(f'is {s}') for s in ('low', 'medium', 'high')}
levels = ('LOW', 'MEDIUM', 'HIGH')
metrics['_totals'] = {f'SEVERITY.{s}': sum(n[f'SEVERITY.{s}'] for n in metrics.values()) for s in levels}
json.dump(dict(errors=[dict(filename=p) for p in metrics if p != '_totals' and 'broken' in open(p).read()],
               metrics=metrics, results=[]), sys.stdout)
"""


@pytest.fixture
def code(tmp_path):
    """A folder of Python files of which the names say what is wrong with them."""
    for name in ('ok1', 'ok2', 'ok3', 'low', 'medium', 'high', 'broken', 'unread'):
        write(tmp_path / f'src/{name}.py', f'# this is {name}\n' + f'def {name}():\n    return 1\n' * 30)
    return tmp_path / 'src'


def test_secure_drops_what_bandit_flags_in_one_run(tmp_path, code, monkeypatch):
    write(tmp_path / 'lib/bandit.py', FAKE_BANDIT)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'lib'))
    data = prepare(code, tmp_path / 'out', secure=True)
    kept = {re.search(r'this is (\w+)', t)[1] for split in ('train', 'val') for t in texts(data, split)}
    assert kept == {'ok1', 'ok2', 'ok3', 'low'} and (tmp_path / 'lib/calls').read_text() == 'x'
    assert data.meta['flagged'] == ['broken.py', 'high.py', 'medium.py', 'unread.py']
    assert data.meta['report'] == {f'findings of {s} severity by bandit': 1 for s in ('low', 'medium', 'high')} | {
        'files dropped, bandit finds medium or high severity': 4}
    assert 'dropped for bandit: broken.py, high.py' in pd.summary(data.folder, data.meta)
    for n in range(3):                                               # and of added code, with an other corpus
        write(tmp_path / f'more/raw/python/{("low", "high", "ok")[n]}.py', f'# is {("low", "high", "ok")[n]}\nx = {n}\n')
    more = prepare(write(tmp_path / 'x.txt', '\n\n'.join(prose(40))), tmp_path / 'more', secure=True, add='python')
    assert more.meta['flagged'] == ['high.py'] and more.meta['splits']['train']['sources']['python']['documents'] == 2


def test_secure_without_bandit_or_without_python(tmp_path, code, monkeypatch):
    write(tmp_path / 'lib/bandit.py', 'raise ModuleNotFoundError("No module named bandit")')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'lib'))
    refuses('No module named bandit.*pip install bandit', prepare, code, tmp_path / 'out', secure=True)
    assert not list((tmp_path / 'out').iterdir())
    refuses('has none', prepare, write(tmp_path / 'x.txt', '\n\n'.join(prose(40))), tmp_path / 'out', secure=True)


def test_secure_with_the_real_bandit(tmp_path):
    pytest.importorskip('bandit')
    body = 'def f(x):\n    return x + 1\n' * 20
    bad = dict(ok='', ok2='', low='assert 1\n', medium='import pickle\npickle.loads(b"")\n',
               high='import subprocess, sys\nsubprocess.call(sys.argv[1], shell=True)  # nosec\n')
    for name, text in bad.items():
        write(tmp_path / f'.git/src/{name}.py', f'# {name}\n{text}{body}')     # a path that bandit leaves out by itself
    data = prepare(tmp_path / '.git/src', tmp_path / '.git/out', secure=True)
    assert data.meta['flagged'] == ['high.py', 'medium.py'] and len(texts(data, 'train') + texts(data, 'val')) == 3
    assert data.meta['report']['findings of low severity by bandit'] >= 1


# Added sources

def test_added_sources_are_for_training_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(pd.sysconfig, 'get_paths', lambda: dict(stdlib=str(tmp_path / 'lib')))
    for n in range(9):
        write(tmp_path / f'lib/m{n}.py', f'def f{n}(x):\n    return x * {n}\n')
    write(tmp_path / 'in/a.train.jsonl', '\n'.join(json.dumps(dict(body=p)) for p in prose(40, 1)))
    write(tmp_path / 'in/a.dev.jsonl', '\n'.join(json.dumps(dict(body=p)) for p in prose(6, 2)))
    settings = dict(text_field='body', add='arithmetic, brackets,python', add_documents=7)
    data = prepare(tmp_path / 'in', tmp_path / 'out', **settings)
    assert data.meta['sources'] == ['a', 'arithmetic', 'brackets', 'python'] and texts(data, 'val') == prose(6, 2)
    counts = data.meta['splits']['train']['sources']
    assert {name: n['documents'] for name, n in counts.items()} == dict(a=40, arithmetic=7, brackets=7, python=7)
    assert texts(data, 'train')[40:54] == [*pd.arithmetic_documents(7, 1337), *pd.bracket_documents(7, 1337)]
    assert pd.source_weights('arithmetic:0.5', data) == [1, 0.5, 1, 1] and 'PSF' in data.meta['licence']
    again = prepare(tmp_path / 'in', tmp_path / 'out', **settings)
    assert again.meta['fingerprint'] == data.meta['fingerprint']
    for make in (pd.arithmetic_documents, pd.bracket_documents):
        assert list(make(3, 1)) != list(make(3, 2)) and len(set(make(300, 1))) == 300
    refuses("names 'arithmetics'", prepare, tmp_path / 'in', tmp_path / 'out', add='arithmetics')
    refuses('a source of python already', pd.build, 'python', 'bytes', data_dir=tmp_path, add='python')
    refuses('add_documents is 0', prepare, tmp_path / 'in', tmp_path / 'out', **settings | dict(add_documents=0))


def test_what_hashes_hold_out_is_not_added_to_training(tmp_path):
    rows = [*pd.arithmetic_documents(300, 1337)]
    path = write(tmp_path / 'x.jsonl', '\n'.join(json.dumps(dict(text=r)) for r in rows))
    data = prepare(path, tmp_path / 'out', add='arithmetic', add_documents=300, val_fraction=0.1)
    val, train = texts(data, 'val'), texts(data, 'train')
    assert len(val) > 10 and not set(val) & set(train)
    assert len(train) == 2 * (300 - len(val))
    assert data.meta['report'] == {'training documents dropped, identical to held-out ones': len(val)}


def test_arithmetic_is_true():
    lines = [line for text in pd.arithmetic_documents(300, 5) for line in text.split('\n')]
    assert len(lines) == 3000
    for line in lines:
        assert eval(line.replace('x', '*').replace(' = ', ' == ')) is True, line
    signs = Counter(line.split()[1] for line in lines)
    assert all(signs[s] > 600 for s in '+-x') and signs['<'] > 200 and signs['>'] > 200
    assert '347 - 85 = 347 - 80 - 5 = 267 - 5 = 262'.count('=') == max(
        line.count('=') for line in lines if re.fullmatch(r'\d{3} - \d[1-9] .*', line))
    assert max(len(line.split()[2]) for line in lines) == 5


def test_brackets_are_closed_in_order():
    lengths, depths = [], []
    for text in pd.bracket_documents(500, 5):
        stack, depth = [], 0
        for bracket in text.split(' '):
            if bracket in '([{':
                stack.append(bracket)
                depth = max(depth, len(stack))
            else:
                assert stack.pop() + bracket in ('()', '[]', '{}')
        assert not stack and set(text) <= set('()[]{} ')
        lengths.append(len(text.split(' ')))
        depths.append(depth)
    assert 16 <= min(lengths) < 40 and 480 < max(lengths) <= 512 and min(depths) == 2 and 12 < max(depths) <= 16


# Looking

def test_compare_tokenizers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pd.GPT2Tokenizer, 'find', lambda folders: refuse())
    def refuse():
        raise UserError('no gpt2 here')
    write(tmp_path / 'in/a.train', '\n\n'.join(train := prose(400, 1)))
    write(tmp_path / 'in/a.dev', '\n\n'.join(val := prose(30, 2)))
    args = [f'files:{tmp_path}/in', f'--data_dir={tmp_path}/data', '--compare_tokenizers=300,9000', '--width=64',
            '--min_doc_bytes=0']
    assert pd.main(args) is None and not (tmp_path / 'data').exists()
    out = capsys.readouterr().out
    tokens = sum(map(len, pd.BPETokenizer.train(train, 300).encode_batch(val)))
    row = re.search(r'bpe 300 +([\d.]+) +([\d.]+)% +[\d.]+\n', out)
    assert row[1] == f'{sum(len(t.encode()) for t in val) / tokens:.3f}'
    assert row[2] == f'{100 * 300 * 64 / (300 * 64 + 7 * 12 * 64 * 64):.1f}'
    assert re.search(r'unigram 300 +\d', out) and re.search(r'bpe 9,000 +a vocabulary of 9,000 is too large', out)
    assert re.search(r'bytes +1\.000', out) and 'no gpt2 here' in out and '30 held-out documents' in out


def test_unigram_is_lossless_and_another_model():
    sample = [*prose(300), '*MOT:\tno.\n*CHI:\tyes?\n' * 50]
    unigram, bpe = (pd.BPETokenizer.train(sample, 330, kind) for kind in ('unigram', 'bpe'))
    assert unigram.blob != bpe.blob and all(unigram.decode(unigram.encode(text)) == text for text in HARD + sample)


def test_inspect(tmp_path, capsys, monkeypatch):
    rows = prose(40, 1)
    write(tmp_path / 'in/a.train', '\n\n'.join(rows + rows[:3] + ['bell \x07 and \x1b[31mred']))
    write(tmp_path / 'in/a.dev', '\n\n'.join(prose(6, 2)))
    data, args = f'files:{tmp_path}/in', ['--tokenizer=bytes', f'--data_dir={tmp_path}/out', '--inspect']
    assert pd.main([data, *args]) == 2 and 'is not prepared yet' in capsys.readouterr().err
    folder = prepare(tmp_path / 'in', tmp_path / 'out', scores=True).folder
    before = (folder / 'meta.json').read_bytes()
    assert pd.main([data, *args]) is None
    out = capsys.readouterr().out
    assert '3 of 44 training documents repeat another; near duplicates were not looked for' in out
    words = Counter(re.findall('[a-z]+', ' '.join(rows + rows[:3] + ['bell and red'])))
    top, n = words.most_common(1)[0]
    assert f'per thousand\n{top} {1000 * n / words.total():.0f}, ' in out and 'easiest and hardest' in out
    histogram = re.findall(r'^ +([\d,]+) to +([\d,]+) +(\d+) (#+)$', out, re.M)
    assert sum(int(row[2]) for row in histogram) == 44 and max(len(row[3]) for row in histogram) == 50
    assert '\x1b' not in out and '\x07' not in out and out.split('\n')[-2].count('|') == 63
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    pd.main([data, *args])
    last = capsys.readouterr().out.split('\n')[-2]
    assert last.count('\x1b[30;46m') == last.count('\x1b[30;43m') == 32 and '|' not in last
    assert (folder / 'meta.json').read_bytes() == before


# Stories

def test_stories_and_pairs_are_built(tmp_path):
    data = pd.open_data(pd.build('stories', 'bytes', data_dir=tmp_path, documents=30, quiet=True), 'stories')
    assert texts(data, 'train') == list(pd.story_documents(30, 1337))
    assert texts(data, 'val') == list(pd.story_documents(1000, 1338))
    pairs = [json.loads(line) for line in (data.folder / 'pairs.jsonl').read_text().splitlines()]
    assert len(pairs) == 2000 and set(pairs[0]) == {'kind', 'context', 'good', 'bad'}
    assert set(Counter(p['kind'] for p in pairs[:400]).values()) == {40}
    assert not (data.folder / 'raw').exists()


@pytest.mark.parametrize('name, world', [('stories_sv', ('stories_sv', False)), ('instructions', ('stories', True)),
                                         ('instructions_sv', ('stories_sv', True))])
def test_the_other_worlds_are_built_with_the_tokenizer_of_another_data_set(tmp_path, monkeypatch, name, world):
    monkeypatch.setattr(pd, 'VAL_STORIES', 20)
    monkeypatch.setattr(pd, 'PAIRS', 40)
    settings = dict(data_dir=tmp_path, documents=300, vocab_size=512, quiet=True)
    first = pd.open_data(pd.build('stories', seed=5, **settings))
    own = pd.open_data(pd.build(name, **settings))
    same = list(pd.story_documents(300, 1337, 0, *world))
    assert texts(own, 'train') == same
    assert own.meta['tokenizer_sha256'] != first.meta['tokenizer_sha256']
    data = pd.open_data(pd.build(name, tokenizer_from=first.folder, overwrite=True, **settings), name)
    assert data.folder == own.folder == tmp_path / f'{name}-bpe512'
    assert data.meta['tokenizer_sha256'] == first.meta['tokenizer_sha256'] and data.tokenizer.blob == first.tokenizer.blob
    assert texts(data, 'train') == same
    pairs = [json.loads(line) for line in (data.folder / 'pairs.jsonl').read_text().splitlines()]
    assert pairs == pd.story_pairs(40, 1339, *world)
    refuses('same --tokenizer and --vocab_size', pd.build, name, tokenizer_from=first.folder,
            **settings | dict(vocab_size=600))
    assert not (tmp_path / f'{name}-bpe600').exists()
    refuses('holds no tokenizer', pd.build, name, tokenizer_from=tmp_path, **settings | dict(vocab_size=600))


@pytest.fixture(scope='module', params=['stories', 'stories_sv'])
def world(request):
    return request.param


@pytest.fixture(scope='module')
def stories(world):
    return list(pd.story_documents(20_000 if world == 'stories' else 8000, 1, 0, world))


@pytest.fixture(scope='module')
def pairs(world):
    return pd.story_pairs(2000, 1, world)


def word_list(text):
    return re.findall(r'[a-zåäöé]+(?:-[a-z]+)*', text.lower())


def test_a_story_depends_on_seed_and_index_alone(stories, world):
    assert list(pd.story_documents(5, 1, 777, world)) == stories[777:782]
    assert list(pd.story_documents(5, 2, 0, world)) != stories[:5]


def test_no_two_stories_are_equal(stories):
    assert len(set(stories)) == len(stories)


def test_vocabulary_and_lengths(stories, world):
    vocabulary = Counter(word for text in stories for word in word_list(text))
    least, most, seldom = (2500, 4000, 5) if world == 'stories' else (4000, 5000, 1)
    assert least <= len(vocabulary) <= most and min(vocabulary.values()) >= seldom
    lengths = [len(text.split()) for text in stories]
    assert 60 <= min(lengths) and max(lengths) <= 160 and 95 <= sum(lengths) / len(lengths) <= 130


def test_spelling(stories, pairs, world):
    every = stories + [p['context'] + p[side] for p in pairs for side in ('good', 'bad')]
    for text in every:
        assert not re.search(r'[{}<>|=_~/]|  |\n\n| \n|\n |\s$| [.,!?]|[.,]{2}', text), text
        assert not re.search(r'(^|[.!?] |\n)"?[a-zåäö]|\b(\w+) \2\b(?<!had had)', text), text
        assert text.count('"') % 2 == 0 and text[-1] in '.!?"', text
        if world == 'stories':
            assert not re.search(r'\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]', text), text
            assert not re.search(r'\bthey was\b|\b[Tt]hey is\b', text), text


def swedish_words():
    """Of config/stories_sv.txt, as written: {noun: en or ett}, {form of an adjective: places it stands at}."""
    genders, forms = {}, {}
    for line in (ROOT / 'config/stories_sv.txt').read_text().split('\n'):
        kind, _, words = line.partition(': ')
        for word in words.split(', ') if kind in ('en', 'ett', 'adj') else ():
            for place, form in enumerate(word.split('/') * (1 if '/' in word or kind != 'adj' else 3)):
                if kind == 'adj':
                    forms.setdefault(form, set()).add(place)
                else:
                    assert genders.setdefault((form, bool(place)), kind) == kind, word
    return genders, forms


def wrong_agreement(text, genders, forms):
    """The article, adjective and noun in a row that do not agree: en röd drake, ett rött hus, den röda draken."""
    for article, adjective, noun in re.findall(r'\b(?=(en|ett|den|det) (\w+) (\w+))', text, re.I):
        definite = article.lower() in ('den', 'det')
        kind = genders.get((noun, definite))
        place = 2 if definite else int(article.lower() == 'ett')
        if adjective in forms and (noun, not definite) in genders and kind is None:
            yield article, adjective, noun
        if adjective in forms and kind and (place not in forms[adjective]
                                            or article.lower() not in dict(en=('en', 'den'), ett=('ett', 'det'))[kind]):
            yield article, adjective, noun
    for article, noun in re.findall(r'\b(?=(en|ett|min|mitt|sin|sitt|din|ditt) (\w+))', text, re.I):
        if (noun, False) in genders and noun not in forms and article.lower().endswith('tt') != (genders[noun, False] == 'ett'):
            yield article, noun


def test_swedish_agrees():
    genders, forms = swedish_words()
    for bad in ('en rött drake', 'ett röd drake', 'den röd draken', 'det röda draken', 'sitt drake', 'en röd draken'):
        assert list(wrong_agreement(bad, genders, forms)), bad
    seen = 0
    for text in pd.story_documents(3000, 4, 0, 'stories_sv'):
        assert not list(wrong_agreement(text, genders, forms)), text
        seen += len(re.findall(r'\b(?:en|ett|den|det) (\w+) \w+', text))
    assert seen > 9000


def test_pairs_are_balanced_and_consist_of_mirrored_twins(pairs, world):
    check_twins(pairs, world)
    assert pd.story_pairs(40, 1, world) == pairs[:40]


def check_twins(pairs, world):
    assert len(pairs) == 2000 and len(pd.World(world).kinds) >= 8
    assert Counter(p['kind'] for p in pairs) == dict.fromkeys(pd.World(world).kinds, 200)
    for one, twin in zip(pairs[::2], pairs[1::2]):
        assert one['kind'] == twin['kind'] and one['context'] != twin['context']
        assert one['good'] == twin['bad'] != one['bad'] == twin['good']
        assert one['good'][0] == ' ' != one['context'][-1]


def test_no_story_to_train_on_is_a_story_to_be_judged(stories, pairs):
    contexts = {p['context'] for p in pairs}
    assert not contexts & set(stories)
    firsts = {text.split('\n')[0] for text in stories}
    assert not firsts & {context.split('\n')[0] for context in contexts}


def test_an_ending_alone_is_a_coin_toss(pairs):
    """A unigram scorer fitted on good against bad endings: on other endings, and on the same."""
    for fitted, judged in ((pairs[:1000], pairs[1000:]), (pairs, pairs)):
        good, bad = (Counter(w for p in fitted for w in word_list(p[side])) for side in ('good', 'bad'))
        assert good == bad and Counter(p['good'] for p in fitted) == Counter(p['bad'] for p in fitted)
        length = {side: sum(len(p[side]) for p in judged) for side in ('good', 'bad')}
        assert length['good'] == length['bad']
        for weight in (lambda w: log((good[w] + 1) / (bad[w] + 1)), len, hash):
            score = [[sum(map(weight, word_list(p[side]))) for side in ('good', 'bad')] for p in judged]
            assert sum((g > b) + 0.5 * (g == b) for g, b in score) == len(judged) / 2


def pronouns(world):
    """{she: {she, her, herself}, he: ..., they: ...} in the language of the world."""
    return {row['.group']: {form for field, form in row.items() if field not in ('.group', '.was')}
            for row in pd.World(world).tables['pronoun']}


def heuristics(pairs, world):
    """Accuracy per kind of choosing the option that the context names last, first, or most often."""
    right, lists = {}, pd.World(world).lists
    for p in pairs:
        context, good, bad = (re.findall(r'\w+', p[part]) for part in ('context', 'good', 'bad'))
        if p['kind'] == 'pronoun':               # the option is a person: the two of whom the parting speaks
            names = {w: forms for who, forms in pronouns(world).items() for w in lists[who]}
            good, bad = ([word.lower() for word in ending] for ending in (good, bad))
            options = [{w for w in context if w in names and names[w] & set(ending)} for ending in (good, bad)]
        else:
            options = set(good) - set(bad), set(bad) - set(good)
        places = [[i for i, word in enumerate(context) if word in option] for option in options]
        for name, measure in (('last', lambda at: max(at, default=-1)), ('most', len),
                              ('first', lambda at: -min(at, default=len(context)))):
            g, b = map(measure, places)
            right.setdefault(p['kind'], {}).setdefault(name, []).append((g > b) + 0.5 * (g == b))
    return {kind: {name: sum(r) / len(r) for name, r in by.items()} for kind, by in right.items()}


def test_counting_mentions_does_not_solve_the_pairs(world):
    for kind, accuracy in heuristics(pd.story_pairs(6000, 3, world), world).items():
        assert all(0.4 < share < 0.6 for share in accuracy.values()), (kind, accuracy)


def found_where_left(world, context, ending):
    lists, forms = pd.World(world).lists, pd.World(world).forms
    place = max((x for x in lists['place'] + lists['outdoors'] if f' {x}' in ending), key=len)
    things = {f.get('.the', f'he {x}'): f.get('.bare', x) for name in ('small', 'gift', 'beast')
              for x, f in forms[name].items()}                           # draken: drake; he kite: kite
    rest = re.sub(r"[^\w' -]", ' ', ending.lower().replace(place, ''))
    thing = max((x for x in things if f'{x} ' in rest), key=len)
    return re.search(rf'\b({thing[3:] if thing[2] == " " else thing}|{things[thing]}) (was |fanns )?{place}\b', context)


def the_one_alone(world, context, ending):
    parting = re.split(r'(?<=[.!?"])\s', context)[-1]
    name = re.search(r'^(\w+) (?:waved|said|left \w+ n|shook|vinkade|sa |skildes|tog)|(\w+) (?:was alone|stayed)|'
                     r'only (\w+)|(?:stannade|var|så) (\w+) (?:kvar|ensam|blev)|bara (\w+)', parting)
    own = next(forms for who, forms in pronouns(world).items() if name[name.lastindex] in pd.World(world).lists[who])
    return re.search(rf"\b({'|'.join(own)})\b", ending, re.I)


def winner(world, context, ending):
    first = (r'(\w+) came first', r'(\w+) crossed the line just before', r'the line just after (\w+)',
             r"but (\w+)(?:'s)? was (?:faster|bigger)", r'(\w+) was faster than', r'(\w+) in front and',
             r'behind and (\w+) in front', r'(?:slower|smaller|lighter) than (\w+)',
             r'(\w+) reached the end ahead', r'reached the end behind (\w+)',
             r"(\w+)'s \w+ was (?:bigger|heavier) than") if world == 'stories' else (
             r'(\w+) kom först', r'(\w+) gick i mål strax före', r'i mål strax efter (\w+)', r'men (\w+) var snabbare',
             r'(\w+) var snabbare än', r'var (\w+) först och', r'sist och (\w+) först', r'långsammare än (\w+)',
             r'(\w+) nådde målet före', r'nådde målet efter (\w+)', r'(\w+)s \w+ var större än', r'var (\w+)s \w+ tyngre än',
             r'(?:mindre|lättare) än (\w+)s\.')
    return re.search(rf'\b{next(filter(None, (re.search(f, context) for f in first)))[1]}\b', ending)


@pytest.mark.parametrize('kind, holds', [('place', found_where_left), ('pronoun', the_one_alone),
                                         ('order', winner)])
def test_the_text_itself_tells_good_from_bad(pairs, world, kind, holds):
    for p in pairs:
        if p['kind'] == kind:
            assert holds(world, p['context'], p['good']) and not holds(world, p['context'], p['bad']), p


# Instructions

@pytest.fixture(scope='module')
def asked(world):
    return pd.story_pairs(2000, 1, world, True)


def test_a_document_is_a_story_a_question_and_its_answer(world, stories):
    labels = pd.World(world).lists['label']
    for text in pd.story_documents(2000, 1, 0, world, True):
        story, asks = text.split('\n\n')
        question, answer = re.fullmatch(rf'{labels[0]}: (.+\?)\n{labels[1]}: (.+\.)', asks).groups()
        assert story not in stories and story.count('\n') == 1 and story[-1] in '.!?"'
        assert question[0].isupper() and answer[0].isupper() and not re.search('[{}<>=|]', asks)
        for word in set(word_list(answer)) - {'to', 's', 'att', 'a', 'an', 'en', 'ett'}:     # told in one of its forms
            assert any(told.startswith(word[:max(3, len(word) - 3)]) for told in word_list(story)), (word, text)


def test_answers_are_mirrored_and_an_answer_alone_is_a_coin_toss(world, asked):
    check_twins(asked, world)
    test_an_ending_alone_is_a_coin_toss(asked)
    for one, twin in zip(asked[::2], asked[1::2]):       # the same question, of another story
        (first, question), (second, other) = (p['context'].split('\n\n') for p in (one, twin))
        assert question == other and first != second


def test_every_kind_is_asked_and_what_is_asked_names_nothing_that_is_exchanged(world):
    w = pd.World(world)
    for kind, exchanged in w.swap.items():
        assert len(w.tables[f'ask.{kind}']) >= 2
        for row in w.tables[f'ask.{kind}']:
            asks, answers = ({p[0].split('.')[0].rstrip('+') for p in row[f] if isinstance(p, tuple)}
                             for f in ('.question', '.answer'))
            assert not asks & set(exchanged) and answers & set(exchanged), row


# Real text

@needs_shared
def test_real_text(tmp_path):
    for name in ('switchboard.train.xz', 'switchboard.dev.xz', 'simple_wiki.dev.xz'):
        write(tmp_path / 'src' / name, lzma.decompress((SHARED / 'babylm' / name).read_bytes()))
    data = prepare(tmp_path / 'src', tmp_path, tokenizer='bpe', vocab_size=2048)
    whole = lzma.decompress((SHARED / 'babylm/switchboard.train.xz').read_bytes()).decode()
    assert ''.join(texts(data, 'train')) == whole.rstrip()
    assert data.meta['splits']['val']['sources']['simple_wiki']['words'] == 104_919


# What a reader of the code found

@pytest.mark.parametrize('options, said', [
    (dict(vocab_size=0), 'vocab_size is 0, it must be 2 to'), (dict(documents=0), 'documents is 0'), (dict(max_doc_bytes=10), 'max_doc_bytes is 10'),
    (dict(vocab_size=10 ** 11), 'it must be 2 to 1,048,576'), (dict(base_url='hf-mirror.com'), 'begin it with https://'),
    (dict(languages='sv'), 'clean has no step language'), (dict(val_fraction=1.5), 'val_fraction is 1.5')])
def test_options_out_of_range(tmp_path, options, said):
    refuses(said, pd.build, 'stories', **dict(tokenizer='bytes', data_dir=tmp_path) | options)
    assert not any(tmp_path.iterdir())


def test_a_clone_of_a_python_project_is_code(tmp_path):
    for i in range(4):
        write(tmp_path / f'in/pkg/m{i}.py', f'x{i} = 1\n' * 200)
    write(tmp_path / 'in/tests/test_m.py', 'def test():\n    pass\n' * 50)
    write(tmp_path / 'in/.git/config', 'no code')
    write(tmp_path / 'in/pkg/__pycache__/m.pyc', b'\0\1')
    write(tmp_path / 'in/README.md', 'read me')
    write(tmp_path / 'in/latin.py', '# -*- coding: latin-1 -*-\nname = "é"\n'.encode('latin-1'))
    data = prepare(tmp_path / 'in', tmp_path / 'data')
    held = {t for split in data.docs for t in texts(data, split)}
    assert len(held) == 6 and data.meta['sources'] == ['python'] and any('é' in t for t in held)
    one = prepare(tmp_path / 'in/pkg/m0.py', tmp_path / 'one', max_doc_bytes=1000)
    assert one.meta['sources'] == ['python']


@pytest.mark.parametrize('names', [('train.txt', 'val.txt', 'test.txt'), ('wiki.train.tokens', 'wiki.valid.tokens', 'wiki.test.tokens'),
                                   ('w_train.txt', 'w_val.txt', 'w_test.txt')])
def test_split_names_without_a_source(tmp_path, names):
    for seed, name in enumerate(names):
        write(tmp_path / 'in' / name, '\n\n'.join(prose(20, seed)))
    data = prepare(tmp_path / 'in', tmp_path / 'data')
    assert [set(texts(data, split)) == set(prose(20, seed)) for seed, split in enumerate(('train', 'val', 'test'))] == [True] * 3


def test_a_placed_file_has_its_digest_checked(tmp_path):
    write(tmp_path / 'raw/swedish/wikipedia_sv.parquet', b'cut off')
    refuses('its sha256 is another', pd.build, 'swedish', 'bytes', data_dir=tmp_path)


def test_equal_numbers_share_their_rank():
    x = np.array([1, 1, 2, 2, 2, 3.0])
    assert pd.mean_ranks(x).tolist() == [1, 1, 3.5, 3.5, 3.5, 5.5] and np.corrcoef(pd.mean_ranks(x), pd.mean_ranks(-x))[0, 1] == pytest.approx(-1)


def test_a_json_row_without_text_is_named_by_its_line(tmp_path):
    write(tmp_path / 'x.jsonl', '{"text": "a b"}\n{"txt": "c"}\n')
    refuses('line 2 has no field', prepare, tmp_path / 'x.jsonl', tmp_path / 'data')


def test_climbs_two_orders():
    spoken = [pd.source_rank(name, pd.SPOKEN_FIRST) for name in ('childes', 'bnc_spoken', 'open_subtitles', 'cbt', 'simple_wiki', 'wikipedia', 'x')]
    written = [pd.source_rank(name, pd.WRITTEN_FIRST) for name in ('children_stories', 'simple_wiki', 'gutenberg', 'open_subtitles', 'switchboard', 'qed')]
    assert spoken == [1, 2, 3, 4, 5, 6, 0] and written == [1, 2, 3, 4, 5, 6]


def test_inspect_and_compare_say_what_is_missing(tmp_path, capsys):
    write(tmp_path / 'x.txt', '\n\n'.join(prose(30)))
    for args, said in ((['--inspect'], 'is not prepared yet'), (['--compare_tokenizers=abc'], 'give sizes like 2048,8192'),
                       (['--compare_tokenizers=300', '--width=0'], 'width 0')):
        assert pd.main([f'files:{tmp_path}/x.txt', f'--data_dir={tmp_path}/data', *args]) == 2
        assert said in capsys.readouterr().err


# ---- evaluation sets

ROWS = [(dict(sentence_good='a', sentence_bad='b', linguistics_term='s-selection', UID='u'), '', ['a', 'b']),
        (dict(context='c', good=' a', bad=' b'), 'c', [' a', ' b']),
        (dict(sentence1='one', sentence2='two', label=1), '', ['two', 'one']),
        (dict(sentence='Why?\nA: x\nB: y z\nC: w', label='B'), 'Why?', [' y z', ' x', ' w']),
        (dict(input_prefix='Box 1 contains ', options=['a', 'b', 'c'], numops=2), 'Box 1 contains ', ['a', 'b', 'c']),
        (dict(context='c', options=['a', 'b', 'c'], label=2), 'c', ['c', 'a', 'b']),
        (dict(prompt='He said "yes, {answer}."', answer='Ann'), 'He said "yes,', [' Ann'])]
NO_ITEMS = [dict(text='x'), [1], 'x', dict(sentence_good='a'), dict(sentence_good='', sentence_bad='b'), dict(good=' ', bad=' '),
            dict(sentence_good='a', sentence_bad=1), dict(good='\ud800', bad='b'), dict(sentence='A: x\nB: y', label='D'),
            dict(options=['a', 'b'], label=2), dict(options=['a', 'b'], label=-1), dict(options='ab'), dict(options=['a']),
            dict(sentence1='a', sentence2='b', label='0'), dict(prompt='x', answer='')]


def test_every_form_of_an_evaluation_file_puts_the_right_option_first(tmp_path):
    for row, context, options in ROWS:
        (tmp_path / 'x.jsonl').write_text(json.dumps(row) + '\n')
        (item,), bad = pd.read_items(tmp_path / 'x.jsonl')
        assert (item['context'], item['options'], bad) == (context, options, [])
    items = [pd.eval_item(row, 'file') for row, _, _ in ROWS]
    assert [item['kind'] for item in items] == ['u', 'file', 'file', 'file', 'file_2_ops', 'file', 'file']
    assert items[0]['field'] == 'argument_structure'


def test_lines_that_hold_no_item_are_left_out_and_named(tmp_path):
    good = json.dumps(ROWS[0][0]).encode()
    for row in NO_ITEMS:
        (tmp_path / 'x.jsonl').write_bytes(json.dumps(row).encode() + b'\n\n' + good + b'\n{"good": "\xff", "bad": "b"}\n')
        items, bad = pd.read_items(tmp_path / 'x.jsonl')
        assert len(items) == 1 and bad == ['x.jsonl line 1', 'x.jsonl line 4'], row
    (tmp_path / 'x.jsonl').write_text('\n'.join(map(json.dumps, NO_ITEMS)))
    with pytest.raises(UserError, match='x.jsonl holds no items'):
        pd.read_items(tmp_path / 'x.jsonl')
    (tmp_path / 'x.jsonl').write_text('\n'.join(json.dumps(row) for row, _, _ in ROWS))
    with pytest.raises(UserError, match='mixes last words and choices'):
        pd.read_items(tmp_path / 'x.jsonl')


def test_the_first_items_hold_every_kind_in_proportion_and_neighbours_together():
    rows = [dict(kind=k, good=f'{k} {i} a', bad=f'{k} {i} b') for k, n in (('x', 60), ('y', 30), ('z', 7)) for i in range(n)]
    tokenizer = pd.ByteTokenizer()
    items = pd.tokenize_items([pd.eval_item(row, '') for row in rows], tokenizer)
    texts = [tokenizer.decode(ids.tolist()) for ids in np.split(items['ids'], items['start'][1:-1])]
    assert sorted(texts) == sorted(row[side] for row in rows for side in ('good', 'bad'))
    kinds = items['kinds'][items['kind']]
    assert [text.split()[0] for text in texts[::2]] == kinds.tolist()
    for n in (24, 48, 72):
        assert abs((kinds[:n] == 'x').sum() - n * 60 / 97) <= 3 and abs((kinds[:n] == 'z').sum() - n * 7 / 97) <= 2
    number = [int(text.split()[1]) for text in texts[::2]]
    of_x = [i for i, kind in zip(number, kinds) if kind == 'x']
    assert of_x != sorted(of_x) and all(b == a + 1 for a, b in zip(of_x[::2], of_x[1::2]))
    assert all(items['ids'][items['start'][i] + seam] == ord('a') for i, seam in zip(range(0, 2 * len(rows), 2), items['seam']))


def test_tokenized_evaluation_sets_are_kept_until_something_changes(tmp_path, monkeypatch, capsys):
    tokenizer, file, cache = pd.ByteTokenizer(), tmp_path / 'p.jsonl', tmp_path / 'data' / 'eval'
    cache.parent.mkdir()
    file.write_text(json.dumps(ROWS[0][0]) + '\nnone\n')
    calls, tokenize = [], pd.tokenize_items
    monkeypatch.setattr(pd, 'tokenize_items', lambda *args: calls.append(1) or tokenize(*args))
    first, again = (pd.eval_set(file, tokenizer, cache) for _ in 'ab')
    assert len(calls) == 1 and [p.name for p in cache.iterdir()] == ['p.npz']
    assert first.keys() == again.keys() and all(np.array_equal(first[key], again[key]) for key in first)
    (cache / 'p.npz').write_bytes((cache / 'p.npz').read_bytes()[:100])                  # damaged
    pd.eval_set(file, tokenizer, cache)
    file.write_text(json.dumps(ROWS[1][0]) + '\n')                                        # changed
    assert len(pd.eval_set(file, tokenizer, cache)['ids']) == 8 and len(calls) == 3
    other = pd.ByteTokenizer(b'another')
    assert pd.eval_set(file, other, cache) and pd.eval_set(file, other) and len(calls) == 5
    assert pd.eval_files(tmp_path) == {'p': file} and pd.eval_files(tmp_path / 'none') == {}
    with pytest.raises(UserError, match='gone.jsonl does not exist'):
        pd.eval_set(tmp_path / 'gone.jsonl', tokenizer)


def test_evaluation_sets_from_the_command_line(tmp_path, capsys):
    (tmp_path / 'sets').mkdir()
    (tmp_path / 'sets' / 'p.jsonl').write_text(json.dumps(ROWS[0][0]) + '\nnone\n')
    (tmp_path / 'text.txt').write_text('\n\n'.join(f'{i} a line of text that is long enough' for i in range(400)))
    args = [f'files:{tmp_path}/text.txt', '--tokenizer=bytes', f'--data_dir={tmp_path}/data']
    sets = ['--evals', str(tmp_path / 'sets')]
    assert pd.main(args + sets) == 2 and 'without --evals first' in capsys.readouterr().err
    assert not pd.main(args)
    capsys.readouterr()
    assert not pd.main(args + sets)
    assert capsys.readouterr().out == ('p: 1 items, 1 kinds, 4 tokens\n'
                                       'p: left out 1 line without an item, the first is p.jsonl line 2\n')
    assert pd.main(args + ['--evals', str(tmp_path / 'data')]) == 2 and 'no evaluation sets' in capsys.readouterr().err


def test_evaluation_sets_are_fetched_once(tmp_path, monkeypatch):
    (tmp_path / 'blimp.tar.gz').write_bytes(b'an archive')
    monkeypatch.setattr(pd, 'BLIMP', (tmp_path / 'blimp.tar.gz').as_uri())
    pd.fetch_evals(tmp_path / 'sets')
    assert (tmp_path / 'sets' / 'blimp.tar.gz').read_bytes() == b'an archive'
    (tmp_path / 'own').mkdir()
    monkeypatch.setattr(pd, 'BLIMP', (tmp_path / 'gone').as_uri())
    monkeypatch.setattr(pd, 'PATIENCE', 0)
    pd.fetch_evals(tmp_path / 'own')                                            # a folder is left as it is
    with pytest.raises(UserError, match='could not be downloaded'):
        pd.fetch_evals(tmp_path / 'new')
    assert not (tmp_path / 'new').exists() and not [*(tmp_path / 'own').iterdir()]

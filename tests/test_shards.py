"""config/prepare_workers.py and prepare_merge.py: many files, processes and machines give the bytes of one pass."""
import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import prepare_data as pd
from config import prepare_workers
from conftest import ROOT, script, stack
from prepare_data import UserError

WORDS = 'the a dog cat house tree saw ran gave took lost found red small happy and then but she blåbär 🙂'.split()
CHORUS = 'a line that is long enough to be told from others by its hash'


def docs(n, seed):
    rng = random.Random(seed)
    return [' '.join(rng.choices(WORDS, k=rng.randrange(5, 60))) + f'\n{CHORUS * (i % 7 == 0)}\n{seed} {i}.' for i in range(n)]


def put(path, texts, rows=dict):
    """A shard in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ''.join(json.dumps(rows(text=text), ensure_ascii=False) + '\n' for text in texts).encode()
    if '.parquet' in path.name:
        arrow = pytest.importorskip('pyarrow')
        import pyarrow.parquet
        arrow.parquet.write_table(arrow.table(dict(n=[1] * len(texts), text=arrow.array(texts, arrow.string()))), path)
    elif path.suffix == '.zst':
        with pytest.importorskip('pyarrow').CompressedOutputStream(str(path), 'zstd') as f:
            f.write(lines)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == '.gz' else lines if '.json' in path.name else '\n\n'.join(texts).encode())


def prepare(root, out, *ideas, **settings):
    settings = dict(dataset=f'files:{root}', data_dir=out, tokenizer='bytes', min_doc_bytes=0) | settings
    corpus = stack(*ideas, **settings)
    corpus.build(quiet=True)
    return corpus.folder


def share(root, out, of, *ideas, **settings):
    settings = dict(dataset=f'files:{root}', data_dir=out, tokenizer='bytes', min_doc_bytes=0, share=of) | settings
    corpus = stack(*ideas, 'prepare_workers', **settings)
    corpus.run()
    return str(corpus.shards)


def merge(out, *shares, ideas=(), **settings):
    corpus = stack(*ideas, 'prepare_merge', merge=','.join(shares), data_dir=out, **settings)
    corpus.build(quiet=True)
    return corpus.folder


def same(one, two, but=()):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        if name != 'meta.json':
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
    a, b = (json.loads((folder / 'meta.json').read_text()) for folder in (one, two))
    assert {key for key in a | b if a.get(key) != b.get(key)} <= {'created', 'seconds', *but}
    return a


@pytest.fixture
def crawl(tmp_path):
    """What Spark, datatrove and others write: partitions, a name twice, files that are no text."""
    root = tmp_path / 'crawl'
    for i, name in enumerate(['lang=en/part-00000-c000.json.gz', 'lang=en/part-00001-c000.json', 'lang=sv/part-00000-c000.json.gz', '00000.jsonl', 'deep/er/00000.jsonl', 'notes.txt']):
        put(root / name, docs(40, i))
    for name in '_SUCCESS', '._SUCCESS.crc', 'lang=en/.part-00000-c000.json.gz.crc', 'lang=en/x.crc', '_temporary/0/part-7.json', '_metadata', 'dataset_info.json':
        put(root / name, [])
        (root / name).write_bytes(b'\0{')
    return root


def test_workers_give_the_bytes_of_one_pass(crawl, tmp_path):
    put(crawl / 'lang=en' / 'part-00002-c000.json', [])                  # an empty shard
    meta = same(prepare(crawl, tmp_path / 'one'), prepare(crawl, tmp_path / 'two', 'prepare_workers', workers=2))
    assert len(meta['files']) == 7 and meta['splits']['train']['documents'] + meta['splits']['val']['documents'] == 274 and meta['in_training']['shared'] == len(CHORUS)
    assert meta['ignored'] == ['_SUCCESS', '_metadata', 'dataset_info.json', 'lang=en/x.crc']
    assert [path.name for path in (tmp_path / 'two').iterdir()] == ['files-crawl-bytes']


def test_parquet_and_zstandard(tmp_path, monkeypatch):
    pytest.importorskip('pyarrow')
    for i, name in enumerate(['a/0.parquet', 'b/0.parquet', '1.jsonl.zst']):
        put(tmp_path / 'in' / name, docs(30, i))
    put(tmp_path / 'in' / 'empty.parquet', [])
    meta = same(prepare(tmp_path / 'in', tmp_path / 'one'), prepare(tmp_path / 'in', tmp_path / 'two', 'prepare_workers', workers=3))
    assert sum(split['documents'] for split in meta['splits'].values()) == 90
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    (tmp_path / 'in' / 'a/0.parquet').unlink()
    for ideas in (), ('prepare_workers',):
        with pytest.raises(UserError, match=r'1.jsonl.zst is compressed by Zstandard, which takes pyarrow to read: pip install pyarrow'):
            prepare(tmp_path / 'in', tmp_path / 'three', *ideas)


def test_what_was_learned_of_other_text_is_not_gone_by(tmp_path, monkeypatch):
    """Shards whose languages were found before there was another file are made again; and clean.py's examples are the same."""
    english, swedish = ('The old man went down to the river and said that he would not come back again before the winter, {}.',
                        'Den gamle mannen gick ner till floden och sade att han inte skulle komma tillbaka igen före vintern, {}.')
    put(tmp_path / 'in' / 'web.train-1.txt', [english.format(i) for i in range(40)] + [swedish.format(i) for i in range(30)])
    put(tmp_path / 'in' / 'web.dev.txt', [english.format(f'dev {i}') for i in range(5)])
    options = dict(clean='unicode,language')
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_workers.Corpus, 'assemble', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(tmp_path / 'in', tmp_path / 'two', 'clean', 'prepare_workers', workers=2, **options)
    put(tmp_path / 'in' / 'web.train-2.txt', [swedish.format(f'two\u00a0and {i}') for i in range(90)])
    same(prepare(tmp_path / 'in', tmp_path / 'one', 'clean', **options),
         prepare(tmp_path / 'in', tmp_path / 'two', 'clean', 'prepare_workers', workers=2, **options))


def test_an_idea_that_reads_copies_of_the_files(tmp_path):
    """Their digests stand in meta.json, not those of what it reads in their place."""
    for i, name in enumerate(['a.txt', 'b.txt']):
        put(tmp_path / 'in' / name, docs(60, i))
    folders = [prepare(tmp_path / 'in', tmp_path / out, 'split_by_lines', *workers, lines_of=10, lines_held=2) for out, *workers in (('one',), ('two', 'prepare_workers'))]
    same(*folders)


def test_copies_of_held_out_documents_go_as_in_one_pass(tmp_path):
    """From whatever file, in splits by name, in such with a hash beside them, in a text with one held-out document."""
    root = tmp_path / 'in'
    texts = docs(60, 1)
    put(root / 'x.train.jsonl', texts[:30] + texts[40:43] + texts[50:52])
    put(root / 'x.dev.jsonl', texts[40:50])
    for test in False, True:
        if test:
            put(root / 'x.test.jsonl', texts[50:60])
        one = prepare(root, tmp_path / f'one{test}')
        meta = same(one, prepare(root, tmp_path / f'two{test}', 'prepare_workers', workers=2))
        assert meta['report'] == {'training documents dropped, identical to held-out ones': 3 + 2 * test} and meta['in_training']['held_out_bytes']
        same(one, merge(tmp_path / f'three{test}', share(root, tmp_path, '1/2'), share(root, tmp_path, '2/2')))
    (root / 'x.dev.jsonl').unlink()                      # training is held out by hash then, and has what test has
    same(prepare(root, tmp_path / 'hash'), prepare(root, tmp_path / 'hash2', 'prepare_workers', workers=2))
    few = tmp_path / 'few'
    for i in range(4):
        put(few / f'{i}.txt', docs(3, i))
    meta = same(prepare(few, tmp_path / 'one', val_fraction=1e-9), prepare(few, tmp_path / 'two', 'prepare_workers', val_fraction=1e-9))
    assert meta['splits']['val']['documents'] == 1


def test_shares_merge_to_the_bytes_of_one_pass(crawl, tmp_path):
    """Of one folder, each machine's files among the others'; and of folders of their own."""
    one = prepare(crawl, tmp_path / 'one')
    left = tmp_path / 'machine1/files-crawl-bytes.1of3.shards/.0123.99.bin'       # by a start that was killed
    left.parent.mkdir(parents=True)
    left.touch()
    shares = [share(crawl, tmp_path / f'machine{i}', f'{i}/3', workers=i) for i in (3, 1, 2)]
    assert not left.exists()
    same(one, merge(tmp_path / 'merged', *shares))
    apart = [tmp_path / name / 'crawl' for name in 'ab']
    for i, name in enumerate(sorted(json.loads(Path(shares[0], 'share.json').read_text())['parts'])):
        target = apart[i % 2] / name[0]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(crawl / name[0])
    shares = [share(root, tmp_path / f'own{root.parent.name}', '1/1') for root in apart]
    made = merge(tmp_path / 'again', *shares, dataset=f'files:{crawl}')
    meta = same(one, made, but={'ignored', 'fingerprint'})               # which they did not have
    assert meta['sources'] == json.loads((made / 'meta.json').read_text())['sources']


def test_shards_are_no_text(crawl, tmp_path, monkeypatch):
    """Where data/ lies in the folder that is prepared, a start that is taken up reads what the first one read."""
    one = prepare(crawl, tmp_path / 'one')
    shares = [share(crawl, crawl / 'data', f'{i}/2') for i in (1, 2)]
    assert all(name.endswith(f'crawl/data/files-crawl-bytes.{i}of2.shards') for i, name in enumerate(shares, 1))
    same(one, merge(crawl / 'data', *shares))
    same(one, prepare(crawl, crawl / 'data', 'prepare_workers', overwrite=True))


def test_splits_named_as_on_the_hub(tmp_path):
    names = [f'data/{split}-0000{i}-of-00002-0123456789abcdef.jsonl' for split in ('train', 'validation') for i in range(2)]
    for i, name in enumerate(names):
        put(tmp_path / 'in' / name, docs(20, i) if i < 3 else [])        # one is empty, as partitions may be
    one = prepare(tmp_path / 'in', tmp_path / 'one')
    meta = same(one, prepare(tmp_path / 'in', tmp_path / 'two', 'prepare_workers'))
    assert meta['sources'] == ['text'] and {name: split['documents'] for name, split in meta['splits'].items()} == dict(train=40, val=20)


def test_an_idea_that_judges_each_document_alone_goes_along(crawl, tmp_path):
    put(crawl / 'web.jsonl', ['<b>Mia</b> Ã¤r hÃ¤r, in the house &amp; the tree ' + str(i) for i in range(9)] + ['no no no no no no ' * 50] * 4)
    options = dict(clean='unicode,boilerplate,repetition')
    meta = same(prepare(crawl, tmp_path / 'one', 'clean', **options), prepare(crawl, tmp_path / 'two', 'clean', 'prepare_workers', workers=2, **options))
    assert meta['cleaning']['examples'].keys() == meta['report'].keys() - {'characters fewer, unicode', 'characters fewer, boilerplate'} and meta['report']


def test_what_takes_the_whole_text_is_refused(crawl, tmp_path, capsys):
    def said(*argv):
        assert pd.main([f'files:{crawl}', f'--data_dir={tmp_path}/data', *argv]) == 2
        return capsys.readouterr().err
    assert '--tokenizer_from, or use --tokenizer=bytes' in said('--workers=2')
    more = '--tokenizer=bytes', '--workers=2'
    assert 'config/dedup.py takes all of the text together (meet), so its files cannot be prepared apart' in said(*more, f'{ROOT}/config/dedup.py')
    assert 'do not go together (it counts documents one after the other)' in said(*more, f'{ROOT}/config/text_share.py')
    assert 'config/clean.py takes all of the text together (learn)' in said(*more, f'{ROOT}/config/clean.py', '--share=1/2')
    assert "share is '2': write the second of three as 2/3" in said(*more, '--share=2') and '3 is more than 2' in said(*more, '--share=3/2')
    assert 'is no share that is finished' in said('--merge=nowhere')
    pd.main(['--help'])
    assert 'config/prepare_workers.py      --workers=N: prepares many files' in capsys.readouterr().out
    assert not any((tmp_path / 'data').glob('*'))


def spoil(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize('name, change, said', [
    ('lang=en/part-00000-c000.json.gz', lambda b: b[:len(b) // 2], 'is damaged'), ('lang=en/part-00001-c000.json', lambda b: b[:-30], 'line 40 is not JSON'),
    ('00000.jsonl', lambda b: b.replace(b'"text"', b'"body"'), 'has no field text or story, only body'), ('x.parquet', lambda b: b[:-9], 'is damaged'),
    ('x.jsonl.zst', lambda b: b[:len(b) // 2], 'is damaged')])
def test_a_bad_shard_is_named_and_the_others_stay_done(crawl, tmp_path, capsys, name, change, said):
    if not (crawl / name).exists():
        put(crawl / name, docs(40, 9))
    good = (crawl / name).read_bytes()
    (crawl / name).write_bytes(change(good))
    with pytest.raises(UserError, match=f'{name}.*{said}') as e:
        prepare(crawl, tmp_path / 'two', 'prepare_workers')
    assert '\n' not in str(e.value)
    done = len([*(tmp_path / 'two/files-crawl-bytes.shards').glob('*.json')])
    assert [path.name for path in (tmp_path / 'two').iterdir()] == ['files-crawl-bytes.shards']
    (crawl / name).write_bytes(good)
    capsys.readouterr()
    two = prepare(crawl, tmp_path / 'two', 'prepare_workers')
    assert (f'holds the shards of {done} of ' in capsys.readouterr().out) == (done > 0)
    same(prepare(crawl, tmp_path / 'one'), two)


def shards_of(tmp_path):
    return [*tmp_path.glob('data/*.shards/*.json')]


def killed(argv, tmp_path, how, least=2):
    """A start that is ended once it has made some shards; exit code, what it said."""
    process = subprocess.Popen([sys.executable, str(ROOT / 'prepare_data.py'), *argv], cwd=tmp_path, text=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    until = time.monotonic() + 60
    while len(shards_of(tmp_path)) < least and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(how)                             # nothing, where it has ended
    out, err = process.communicate(timeout=60)           # which ends when its processes have: they hold its pipes
    return process.returncode, err


@pytest.mark.parametrize('how, code, said', [
    (signal.SIGKILL, -9, ''), pytest.param(signal.SIGTERM, 143, '', marks=pytest.mark.long),
    pytest.param(signal.SIGINT, 130, 'of 24 files are done, the same command goes on', marks=pytest.mark.long)])
def test_a_killed_start_is_taken_up(tmp_path, how, code, said):
    root = tmp_path / 'in'
    argv = [f'files:{root}', '--workers=2', '--tokenizer=bytes', '--min_doc_bytes=0', '--data_dir=data']
    for n in 300, 1200, 4800:                            # more, where all was made before a busy machine sent the signal
        for i in range(24):
            put(root / f'{i % 4}' / f'{i}.jsonl', docs(n, i))
        ended, err = killed(argv, tmp_path, how)
        if ended:
            break
        shutil.rmtree(tmp_path / 'data')
    done = shards_of(tmp_path)
    assert ended == code and said in err and 'Traceback' not in err and 2 <= len(done) < 24
    assert not [*tmp_path.glob('data/*.shards/.*')] or how == signal.SIGKILL
    put(root / json.loads(max(done).read_text())['name'], docs(300, 99))         # a file that is another now is read again
    code, out, err = script('prepare_data.py', *argv, cwd=tmp_path)
    assert code == 0 and f'holds the shards of {len(done) - 1} of 24 files' in out
    same(prepare(root, tmp_path / 'one'), tmp_path / 'data/files-in-bytes')


@pytest.mark.parametrize('call', range(1, 7))
def test_a_signal_beside_the_start_of_a_process_ends_all_in_order(monkeypatch, call):
    """Six calls start three processes: a signal that waits is heard in any of them."""
    pthread_sigmask, calls = signal.pthread_sigmask, []

    def heard(how, mask):
        calls.append(how)
        was = pthread_sigmask(how, mask)
        if len(calls) == call:
            raise SystemExit(143)
        return was
    monkeypatch.setattr(signal, 'pthread_sigmask', heard)
    try:
        with pytest.raises(SystemExit, match='143'):
            [*prepare_workers.in_processes(time.sleep, [60] * 3, 3)]
    finally:
        pthread_sigmask(signal.SIG_UNBLOCK, prepare_workers.STOPS)
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_is_no_silence(crawl, tmp_path, monkeypatch):
    documents = pd.Corpus.documents

    def die(self, part, report, bar):
        if part.name == '00000.jsonl':
            os.kill(os.getpid(), signal.SIGKILL)
        return documents(self, part, report, bar)
    monkeypatch.setattr(pd.Corpus, 'documents', die)
    with pytest.raises(UserError, match='the process that read .*/00000.jsonl was ended by somebody, or memory was full'):
        prepare(crawl, tmp_path / 'data', 'prepare_workers', workers=2)


def test_a_full_disk_is_a_sentence(crawl, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(pd.SplitWriter, 'write', full)
    with pytest.raises(UserError, match='the disk is full: make room, the same command goes on'):
        prepare(crawl, tmp_path / 'data', 'prepare_workers')
    monkeypatch.undo()
    monkeypatch.setattr(pd.shutil, 'disk_usage', lambda path: type('', (), dict(free=10)))
    with pytest.raises(UserError, match='0 MB free'):
        prepare(crawl, tmp_path / 'data', 'prepare_workers')


def test_text_that_changes_while_it_is_read(crawl, tmp_path, monkeypatch):
    documents = pd.Corpus.documents

    def grows(self, part, report, bar):
        yield from documents(self, part, report, bar)
        with open(part.path, 'ab') as f:
            f.write(b'\n')
    monkeypatch.setattr(pd.Corpus, 'documents', grows)
    with pytest.raises(UserError, match='changed while they were read'):
        prepare(crawl, tmp_path / 'data', 'prepare_workers')
    assert not shards_of(tmp_path)


def test_what_cannot_be_merged_is_refused(crawl, tmp_path, capsys):
    one, two, other = (share(crawl, tmp_path / name, of, **more) for name, of, more in (
        ('a', '1/2', {}), ('b', '2/2', {}), ('c', '2/2', dict(max_doc_bytes=300))))

    def said(*argv):
        assert pd.main([f'--data_dir={tmp_path}/data', *argv]) == 2
        return capsys.readouterr().err
    assert '3 of 6 files are in none of these shares, the first is deep/er/00000.jsonl' in said(f'--merge={one}')
    assert 'was prepared with other settings than' in said(f'--merge={one},{other}')
    assert "was prepared with max_doc_bytes 16384, not 300: say nothing of it" in said(f'--merge={one},{two}', '--max_doc_bytes=300')
    assert '00000.jsonl is in ' in said(f'--merge={one},{share(crawl, tmp_path / "d", "1/1")}')
    path = next(Path(two).glob('*.bin'))
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + b'xy')
    assert f'{path} is damaged: copy it again' in said(f'--merge={one},{two}')
    path.write_bytes(whole[:-2])
    assert '1 of 6 files are in none of these shares' in said(f'--merge={one},{two}')
    Path(two, 'share.json').write_text('{')
    assert 'is no share that is finished' in said(f'--merge={one},{two}')
    assert not any((tmp_path / 'data').iterdir())


def test_shares_of_two_tokenizers_are_no_data_set(crawl, tmp_path, capsys):
    given = [str(prepare(crawl, tmp_path / f'{i}', tokenizer='bpe', vocab_size=400, val_fraction=i / 9)) for i in (1, 8)]
    shares = [share(crawl, tmp_path / f's{i}', f'{i}/2', tokenizer='bpe', vocab_size=400, tokenizer_from=given[i // 2]) for i in (1, 2)]
    with pytest.raises(UserError, match='s2/.* was prepared with other tokenizer than .*s1/'):
        merge(tmp_path / 'out', *shares)
    shares[1] = share(crawl, tmp_path / 's3', '2/2', tokenizer='bpe', vocab_size=400, tokenizer_from=given[0])
    same(prepare(crawl, tmp_path / 'one', tokenizer='bpe', vocab_size=400, tokenizer_from=given[0]), merge(tmp_path / 'out', *shares))


def test_files_that_only_beside_the_others_are_what_they_are(tmp_path):
    """A .dev alone is a text of its own name; rows do not mind, text may be parted by that name."""
    texts = docs(60, 1)
    for kind in 'jsonl', 'txt':
        for name, which in (('x.train', slice(20, None)), ('x.dev', slice(22))):
            put(tmp_path / kind / 'in' / f'{name}.{kind}', texts[which])
            put(tmp_path / kind / name / 'in' / f'{name}.{kind}', texts[which])
        shares = [share(tmp_path / kind / name / 'in', tmp_path / kind / name, '1/1') for name in ('x.dev', 'x.train')]
        if kind == 'txt':
            with pytest.raises(UserError, match='x.dev.txt was read as x.dev, beside the other files it is x: prepare shares of one folder'):
                merge(tmp_path / 'out' / kind, *shares)
        else:
            meta = same(prepare(tmp_path / kind / 'in', tmp_path / 'one'), merge(tmp_path / 'out' / kind, *shares), but={'made_from', 'dataset'})
            assert meta['splits']['val']['documents'] == 22 and meta['report']

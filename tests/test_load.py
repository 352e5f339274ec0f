"""Many steps, and odd amounts of text: memory, files and threads stay as they were, or a sentence says what is wrong."""
import gc
import gzip
import json
import os
import re
import threading
import tracemalloc

import pytest

import config
import prepare_data
import sample
import train
from config import UserError


def open_files():
    return len(os.listdir('/proc/self/fd'))


@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='no /proc')
def test_many_steps_leave_nothing_behind(main, monkeypatch, tmp_path):
    """Of a run: memory that Python holds, files and threads after 150 steps and after 900; and its log."""
    monkeypatch.setattr(train, 'LOGGED', 100)
    seen, step = {}, train.Run.step

    def watched(self):
        step(self)
        if self.steps in (150, 900):
            gc.collect()
            seen[self.steps] = tracemalloc.get_traced_memory()[0], open_files(), threading.active_count()
    monkeypatch.setattr(train.Run, 'step', watched)
    threads, files = threading.active_count(), open_files()
    tracemalloc.start()
    try:
        main('--max_steps=900', '--tokens_per_step=64', '--block_size=16', '--n_layer=1', '--n_embd=16', '--n_head=1', '--log_interval=10000',
             '--eval_interval=0', '--save_minutes=1000')
    finally:
        tracemalloc.stop()
    early, late = seen[150], seen[900]
    assert late[0] - early[0] < 200_000 and late[1:] == early[1:], seen
    assert threading.active_count() == threads and open_files() <= files + 6            # locks of its folders, its bins, what torch keeps
    steps = [row['step'] for row in sample.read_rows(tmp_path / 'run' / 'metrics.jsonl') if 'train_loss' in row]
    assert steps[:99] == [*range(1, 100)] and steps[99:102] == [100, 102, 104] and len(steps) < 290 and steps[-1] == 900
    assert json.loads((tmp_path / 'run' / 'result.json').read_text())['steps'] == 900


TEXTS = {
    'a thousand documents of one word': ['kite'] * 1000, 'a thousand of one letter each': [chr(97 + i % 26) for i in range(1000)],
    'one long document': [' '.join(f'word{i % 97}' for i in range(40_000))], 'one document': ['Mia lost the kite by the lake. ' * 40],
    'empty ones too': ['', 'Mia lost the kite.', ' '] * 300, 'two documents': ['Mia lost the kite. ' * 60, 'Tom found it. ' * 60]}


@pytest.mark.parametrize('name', TEXTS)
def test_odd_amounts_of_text_train_or_are_refused(name, main, tmp_path):
    """In a sentence that says what to do."""
    path = tmp_path / 'texts.jsonl'
    path.write_text(''.join(json.dumps(dict(text=text)) + '\n' for text in TEXTS[name]))
    try:
        out = main(f'--dataset=files:{path}', f'--data_dir={tmp_path / "data"}', '--max_steps=2', '--tokens_per_step=64', '--block_size=16')
        assert 'val_bpb: ' in out
    except UserError as e:
        assert ': ' in str(e) and '\n' not in str(e), e


def test_a_source_of_one_document_trains(main, tmp_path):
    folder = tmp_path / 'texts'
    folder.mkdir()
    (folder / 'many.txt').write_text('\n\n'.join(f'Mia lost kite number {i} by the lake and looked for it.' for i in range(400)))
    (folder / 'single.txt').write_text('Tom found one kite under the bridge, and gave it back. ' * 9)
    assert 'val_bpb: ' in main(f'--dataset=files:{folder}', f'--data_dir={tmp_path / "data"}', '--max_steps=2', '--weights=single:2')


def plan_of(capsys, *args):
    """What --plan says: tokens, documents, bytes on disk."""
    assert prepare_data.main([*args, '--plan']) is None
    said = capsys.readouterr().out
    tokens, documents, disk = re.search(r'tokens: about ([\d,]+) in ([\d,]+) documents\ndisk: about ([\d,.]+) MB', said).groups()
    return int(tokens.replace(',', '')), int(documents.replace(',', '')), 1e6 * float(disk.replace(',', ''))


@pytest.mark.skipif(not os.path.exists('/proc/self/io'), reason='no /proc')
def test_a_text_of_a_hundred_gigabytes_is_planned_without_being_read(tmp_path, capsys, handlers):
    """A sparse file, zeros behind its beginning; nothing is written beside it."""
    path = tmp_path / 'text.txt'
    path.write_text('\n\n'.join(f'Mia lost kite number {i} by the lake and looked for it.' for i in range(9000)))
    os.truncate(path, 10 ** 11)
    read_so_far = lambda: int(re.search(r'rchar: (\d+)', open('/proc/self/io').read())[1])
    before = read_so_far()
    tokens, _, disk = plan_of(capsys, f'files:{path}', '--tokenizer=bytes', f'--data_dir={tmp_path / "data"}')
    assert 0.99e11 < tokens < 1.01e11 and 2e11 < disk < 2.1e11
    assert read_so_far() - before < 200_000_000 and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.jsonl.gz', 'a.csv', 'a.csv.gz', 'a.json', 'a.parquet'])
def test_a_plan_is_near_to_what_is_built(name, tmp_path, capsys, handlers, monkeypatch):
    """Of a sample of a tenth, of what is packed a half."""
    texts = [f'Mia lost kite number {i} by the lake, {"and looked for it, " * (i % 7)}é🙂.' for i in range(6000)]
    path, rows = tmp_path / name, [dict(text=text) for text in texts]
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    table = ('text\n' + ''.join('"{}"\n'.format(text.replace(', ', '\n')) for text in texts)).encode()      # of rows in several lines
    if name == 'a.parquet':
        arrow = pytest.importorskip('pyarrow')
        import pyarrow.parquet
        arrow.parquet.write_table(arrow.table(dict(text=texts)), path, row_group_size=500)
    else:
        path.write_bytes({'a.txt': '\n\n'.join(texts).encode(), 'a.jsonl': lines.encode(), 'a.jsonl.gz': gzip.compress(lines.encode(), 0), 'a.json': json.dumps(rows).encode(),
                          'a.csv': table, 'a.csv.gz': gzip.compress(table, 0)}[name])
    args = f'files:{path}', '--tokenizer=bytes', '--min_doc_bytes=0', f'--data_dir={tmp_path / "data"}'
    plan = config.verb('prepare', 'plan')
    monkeypatch.setattr(plan, 'SAMPLE', path.stat().st_size // (2 if name.endswith('gz') else 10))
    monkeypatch.setattr(plan, 'LEAST', 1)
    said = plan_of(capsys, *args)
    assert prepare_data.main([*args]) is None
    data = prepare_data.open_data(tmp_path / 'data' / 'files-a-bytes')
    built = [sum(len(part) for part in table.values()) for table in (data.tokens, data.docs)] + [
        sum(path.stat().st_size for path in [*data.folder.glob('*.bin'), *data.folder.glob('*.npy')])]
    assert said == pytest.approx(built, rel=0.4 if name.endswith('gz') else 0.15), (said, built)       # zlib reads ahead

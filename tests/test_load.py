"""Many steps, and odd amounts of text: memory, files and threads stay as they were, or a sentence says what is wrong."""
import gc
import json
import os
import threading
import tracemalloc

import pytest

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

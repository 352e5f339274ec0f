"""train.py: settings, data order, optimizer, clock, and whole runs as a user makes them."""
import errno
import importlib.machinery
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import model as model_file
import prepare_data
import sample
import train
from conftest import ROOT, STEPS, TINY, finish, script, start
from model import GPT, GPTConfig
from prepare_data import UserError


def rows(out_dir):
    """The whole lines of metrics.jsonl."""
    path = Path(out_dir) / 'metrics.jsonl'
    return [json.loads(line) for line in path.read_text().split('\n')[:-1]] if path.exists() else []


def losses(out_dir):
    steps = [row for row in rows(out_dir) if 'train_loss' in row]
    assert [row['step'] for row in steps] == list(range(1, len(steps) + 1))
    return [row['train_loss'] for row in steps]


def weights(out_dir, name='ckpt.pt'):
    return torch.load(Path(out_dir) / name, weights_only=True)


def wait_for_step(process, out_dir, step):
    until = time.monotonic() + 90
    while time.monotonic() < until and process.poll() is None:
        if any(row['step'] >= step for row in rows(out_dir)):
            return
        time.sleep(0.005)
    process.kill()
    pytest.fail(f'step {step} never came: {process.communicate()}')


@pytest.fixture
def handlers():
    """Signals are handled as before when a run in this process has ended."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def main(corpus, tmp_path, monkeypatch, capfd, handlers):
    """train.main in this process on the small corpus; gives its folder, prints what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        train.main([*corpus.args, '--budget_minutes=10000', '--out_dir=run', '--max_steps=3', '--save_minutes=0', *args])
        return capfd.readouterr().out
    return run


def snapshot(folder):
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(folder).iterdir()}


# ---- settings

def config(tmp_path, text, name='mine.py'):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def mistakes(*argv):
    with pytest.raises(UserError) as e:
        train.read_settings(list(argv))
    return str(e.value)


def test_all_mistakes_at_once_with_exit_code_2(tmp_path):
    config(tmp_path, '"""doc"""\nn_layers = 3\nn_embd = 1.5\n\nimport os\nlearning_rate = "high"\n')
    code, out, err = script('train.py', 'mine.py', '--sed=3', '--optimizer=adamm', '--tokens_per_step=0', cwd=tmp_path)
    assert code == 2 and 'Traceback' not in err and not out
    for expected in ('mine.py:2: .*n_layers.* n_layer', 'mine.py:3: n_embd is 1.5, .*int', 'mine.py:5: ',
                     'mine.py:6: learning_rate .*float', '--sed=3: .* seed', 'adamm.*muon, adamw', 'tokens_per_step is 0'):
        assert re.search(expected, err), expected
    assert [p.name for p in tmp_path.iterdir()] == ['mine.py']


@pytest.mark.parametrize('line', [
    'import os', 'seed = __import__("os").getpid()', 'seed = open("touched", "w").write("x")', 'seed = layers',
    'seed = 3 if 1 else 2', 'out_dir = f"{1}"', 'seed += 1', 'def f(): pass', 'seed: int = 3', 'seed = 2 ** 10 ** 9',
    'learning_rate = 1e200 ** 4', 'learning_rate = 1 / 0', 'learning_rate = 10 ** 64 * 1e300', 'learning_rate = (10 ** 64) ** 10', 'seed = (', 'seed = 1e999',
    'seed = True', 'seed = None', 'overwrite = 1', 'sample_prompt = 3', 'seed = -1'])
def test_only_literals_and_arithmetic(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    text = mistakes(config(tmp_path, f'n_layer = 2\n{line}\n'))
    assert 'mine.py:2: ' in text and text.startswith('1 mistake in') and not (tmp_path / 'touched').exists()


def test_stacking_and_overrides(tmp_path):
    a = config(tmp_path, '"""what"""\nn_layer = 2 * 3\nseed = 7\nlearning_rate = 1\nbudget_minutes = 1 / 4\n', 'a.py')
    b = config(tmp_path, 'seed = -(-9)  # why\nsample_prompt = "Mia"\n', 'b.py')
    s = train.read_settings([a, b])
    assert (s.n_layer, s.seed, s.learning_rate, s.budget_minutes, s.sample_prompt) == (6, 9, 1.0, 0.25, 'Mia')
    assert type(s.learning_rate) is float and s.out_dir == 'out/a+b' and s.n_embd == GPTConfig.n_embd
    assert train.read_settings([b, a]).seed == 7
    s = train.read_settings([a, '--seed=2**3', '--dataset=files:a b/c', '--out_dir=x', '--doc_mask=False', '--learning_rate=3'])
    assert (s.seed, s.dataset, s.out_dir, s.doc_mask, s.learning_rate) == (8, 'files:a b/c', 'x', False, 3.0)
    assert train.read_settings([]).out_dir == 'out/default'


def test_words_for_other_mistakes(tmp_path):
    assert 'no_such.py' in mistakes('no_such.py')
    assert '--seed' in mistakes('--seed')
    assert "'0.1x'" in mistakes('--learning_rate=0.1x')
    assert 'pacing_end is 0.875, it must be more than pacing_start, 0.9' in mistakes('--pacing_start=0.9')
    assert 'mine.py' in mistakes(config(tmp_path, b'\xff\xfe'.decode('latin1') + '\0'))


def test_the_readme_names_what_exists():
    text = (ROOT / 'README.md').read_text()
    configs, scripts = set(re.findall(r'config/\w+\.py', text)), set(re.findall(r'(?:python|torchrun\b.*?) (\w+\.py)', text))
    assert {'config/quickstart.py', 'config/babylm.py'} <= configs and 'train.py' in scripts
    configs -= {'config/my_idea.py'}
    for path in configs | {str(p.relative_to(ROOT)) for p in (ROOT / 'config').glob('*.py')}:
        s = train.read_settings([str(ROOT / path)])
        GPTConfig(vocab_size=s.vocab_size, **{k: getattr(s, k) for k in train.MODEL_KEYS})
        assert s.tokens_per_step % s.block_size == 0
    assert all((ROOT / name).exists() for name in scripts)


# ---- data

def toy(n_docs=7, seed=0):
    """Documents of 3 to 20 tokens; every token is another number."""
    lengths = np.random.default_rng(seed).integers(3, 20, n_docs)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    docs = np.zeros(n_docs, prepare_data.DOC)
    docs['start'] = starts
    return np.arange(lengths.sum(), dtype=np.uint16), docs, lengths


def test_every_token_once_an_epoch_in_an_order_of_seed_and_epoch():
    tokens, docs, lengths = toy(50)
    n = len(tokens)
    stream = train.Stream(tokens, docs, 3)
    epochs = [stream.read(e * n, n) for e in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(n)) and epoch.dtype == np.int64
        first = [np.flatnonzero(epoch == start)[0] for start in docs['start']]       # documents stay whole
        assert all((np.diff(epoch[a:a + k]) == 1).all() for a, k in zip(first, lengths))
    assert len({epoch.tobytes() for epoch in epochs}) == 3
    assert np.array_equal(train.Stream(tokens, docs, 3).read(2 * n, n), epochs[2])    # asked for alone
    assert not np.array_equal(train.Stream(tokens, docs, 4).read(0, n), epochs[0])
    same = train.Stream(tokens, docs, 3, reshuffle=False)
    assert all(np.array_equal(same.read(e * n, n), epochs[0]) for e in range(3))


def test_read_is_the_slow_concatenation():
    tokens, docs, lengths = toy()
    stream, slow = train.Stream(tokens, docs, 5), []
    for epoch in range(6):
        order = np.random.default_rng([5, epoch]).permutation(len(docs))
        slow += [token for d in order for token in tokens[docs['start'][d]:docs['start'][d] + lengths[d]]]
    rng = np.random.default_rng(0)
    for _ in range(300):
        first = int(rng.integers(0, 3 * len(tokens)))
        count = int(rng.integers(1, 2 * len(tokens)))
        assert stream.read(first, count).tolist() == slow[first:first + count]


def test_every_row_once_an_epoch_and_a_step_is_of_many_documents():
    docs = np.zeros(30, prepare_data.DOC)
    docs['start'] = np.arange(30) * 400                                 # documents of 40 rows of ten
    stream = train.Stream(np.arange(12000), docs, 3)
    rows = stream.rows(0, 1200, 10)
    assert rows.shape == (1200, 11) and np.array_equal(np.sort(rows[:, 0]), np.arange(0, 12000, 10))
    within = rows[:, 0] % 400 < 390
    assert (np.diff(rows[within]) == 1).all() and (np.diff(rows[:, :10]) == 1).all()
    documents = [len(set(rows[at:at + 20, 0] // 400)) for at in range(0, 1200, 20)]
    assert min(documents) >= 8 and np.mean(documents) == pytest.approx(30 * (1 - (29 / 30) ** 20), abs=1)
    assert np.array_equal(stream.first_rows(7, 10), rows[:7, :10])
    assert (train.Stream(np.arange(12000), docs, 4).rows(0, 1200, 10) != rows).any(axis=1).mean() > 0.9


@pytest.mark.parametrize('weights', [None, [2.2, 0.4]])
def test_rows_of_every_epoch_begin_where_it_does(weights):
    """Where neither a row nor a step divides an epoch."""
    tokens, docs, _ = toy(97)
    docs['source'] = np.arange(97) % 2
    stream, at, row, orders = train.Stream(tokens, docs, 3, weights), 0, 0, []
    for epoch in range(4):
        n = int(stream.epoch(epoch)[1][-1])
        assert n % 7
        whole, rows = stream.read(at, n // 7 * 7 + 1), stream.rows(row, n // 7, 7)
        wanted = [tuple(whole[i:i + 8]) for i in range(0, n // 7 * 7, 7)]
        assert sorted(map(tuple, rows)) == sorted(wanted) and list(map(tuple, rows)) != wanted
        orders.append(rows)
        at, row = at + n, row + n // 7
    again = train.Stream(tokens, docs, 3, weights)                      # from anywhere, over an epoch's end
    assert np.array_equal(again.rows(len(orders[0]) - 3, 5, 7), np.concatenate([orders[0][-3:], orders[1][:2]]))
    same = train.Stream(tokens, docs, 3, weights, reshuffle=False)
    n = len(orders[0])
    assert all(np.array_equal(same.rows(e * n, n, 7)[:, :7], orders[0][:, :7]) for e in range(4))
    tiny = train.Stream(tokens[:5], docs[:1], 3).rows(0, 4, 7)          # an epoch shorter than a row
    assert tiny.shape == (4, 8) and set(tiny.flatten()) == set(range(5))


def test_weights_say_how_often_an_epoch_reads_a_source():
    tokens, docs, lengths = toy(100)
    docs['source'] = np.arange(100) % 4                                # 25 documents each
    stream = train.Stream(tokens, docs, 3, [2.2, 0.4, 0.0, 1.0])
    at, parts = 0, []
    for epoch in range(3):
        n = int(stream.epoch(epoch)[1][-1])
        read = stream.read(at, n)
        times = np.array([(read == start).sum() for start in docs['start']])       # of a document's first token
        by_source = [np.bincount(times[docs['source'] == s], minlength=4)[:4].tolist() for s in range(4)]
        assert by_source == [[0, 0, 20, 5], [15, 10, 0, 0], [25, 0, 0, 0], [0, 25, 0, 0]]
        assert n == (times * lengths).sum()
        parts.append(tuple(np.flatnonzero(times == 3)))
        at += n
    assert len(set(parts)) == 3                                         # the part is another one in every epoch
    again = train.Stream(tokens, docs, 3, [2.2, 0.4, 0.0, 1.0])
    assert np.array_equal(again.read(at - 500, 900), stream.read(at - 500, 900))
    assert len(train.Stream(tokens, docs, 3, [0, 0.01, 0, 0]).read(0, 100)) == 100


@pytest.mark.parametrize('text, match', [('childes:2', 'notes, tales'), ('tales', 'tales:2'), ('tales:-1', "'-1'"),
                                         ('tales:0,notes:0', 'nothing to train on'), ('tales:nan', 'nan')])
def test_weights_that_cannot_be(corpus, main, text, match):
    with pytest.raises(UserError, match=match):
        main(f'--weights={text}', '--max_steps=1')


def test_weights_change_what_is_read(corpus):
    s, data = train.read_settings([*corpus.args, '--weights=tales:0, notes:1.5']), corpus.open()
    assert train.make_stream(s, data).weights == [1.5, 0.0]
    notes = data.docs['train']['source'] == data.meta['sources'].index('notes')
    ends = np.append(data.docs['train']['start'][1:], len(data.tokens['train']))
    mean = (ends - data.docs['train']['start'])[notes].sum() * 1.5
    assert int(train.make_stream(s, data).epoch(0)[1][-1]) == pytest.approx(mean, rel=0.05)
    assert train.make_stream(train.read_settings(corpus.args), data).weights is None


def prefetched(rank, world, micro, steps, first=0, rows_per_step=8, T=5):
    tokens, docs, _ = toy(60)
    batches = train.Prefetcher(train.Stream(tokens, docs, 1), first, rows_per_step, micro, T, rank, world, 'cpu')
    made = [batches.next(step)[0] for step in range(first, first + steps)]
    batches.close()
    assert not batches.thread.is_alive()
    return made


def test_batches_are_a_function_of_seed_step_and_rank():
    one = prefetched(0, 1, 2, 6)
    assert all(len(step) == 4 and step[0][0].shape == (2, 5) for step in one)
    two = [prefetched(rank, 2, 2, 6) for rank in (0, 1)]
    for step in range(6):
        both = [pair for m in range(2) for pair in (two[0][step][m], two[1][step][m])]
        for a, b in zip(one[step], both, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    for a, b in zip(one[4:], prefetched(0, 1, 2, 2, first=4), strict=True):
        assert all(torch.equal(x[0], y[0]) for x, y in zip(a, b))
    tokens, docs, _ = toy(60)
    rows = train.Stream(tokens, docs, 1).rows(0, 48, 5)    # nothing is lost between micro-batches and steps
    assert np.array_equal(torch.cat([idx for step in one for idx, _ in step]), rows[:, :-1])
    assert np.array_equal(torch.cat([targets for step in one for _, targets in step]), rows[:, 1:])


def test_an_error_of_the_prefetcher_reaches_the_step():
    class Broken:
        def rows(self, first, B, T):
            raise OSError('the disk went away')
    batches = train.Prefetcher(Broken(), 0, 4, 2, 5, 0, 1, 'cpu')
    with pytest.raises(OSError, match='went away'):
        batches.next(0)
    batches.close()


# ---- optimizer

@pytest.mark.parametrize('shape', [(64, 64), (64, 256), (256, 64), (3, 64, 192), (2, 192, 64), (1, 8)])
@pytest.mark.parametrize('kind', ['random', 'low rank plus noise', 'tiny'])
def test_orthogonalize(shape, kind):
    torch.manual_seed(0)
    x = torch.randn(shape)
    if kind == 'low rank plus noise':
        x = x[..., :, :1] @ x[..., :1, :] / shape[-1] ** 0.5 + 0.1 * torch.randn(shape)
    x = x * 1e-4 if kind == 'tiny' else x
    u, before, vt = torch.linalg.svd(x, full_matrices=False)
    after = u.mT @ train.orthogonalize(x) @ vt.mT           # diagonal, if it keeps the singular vectors
    values = after.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(after, torch.diag_embed(values), rtol=0, atol=2e-3)
    reached = before / before.norm(dim=-1, keepdim=True) > 0.005     # what the polynomials promise to lift
    assert reached.float().mean() > 0.9 and values.max() < 1.3
    assert values[reached].min() > 0.7
    assert train.orthogonalize(torch.zeros(shape)).abs().max() == 0


def muon_step(p, grads, lr=0.02, decay=0.1, momentum=0.9):
    optimizer = train.Muon(p, momentum, torch.float32)
    for group in optimizer.param_groups:
        group.update(lr=lr, weight_decay=decay)
    for step in grads:
        for x, g in zip(p, step):
            x.grad = g.clone()
        optimizer.step()
    return optimizer


def test_muon_is_its_plain_self():
    torch.manual_seed(0)
    shapes = [(16, 48), (48, 16), (16, 48), (16, 16)]
    start_at = [torch.randn(s) for s in shapes]
    grads = [[torch.randn(s) for s in shapes] for _ in range(3)]
    p = [torch.nn.Parameter(x.clone()) for x in start_at]
    muon_step(p, grads)
    for i, x in enumerate(start_at):
        average = torch.zeros_like(x)
        for step in grads:
            average = 0.9 * average + 0.1 * step[i]
            g = 0.1 * step[i] + 0.9 * average
            rows, cols = g.shape
            g = g.T if rows > cols else g
            g = g / (1.02 * g.norm() + 1e-6)
            for a, b, c in train.POLAR_EXPRESS:
                aa = g @ g.T
                g = a * g + b * aa @ g + c * aa @ aa @ g
            g = g.T if rows > cols else g
            x = x * (1 - 0.02 * 0.1) - 0.02 * max(1, rows / cols) ** 0.5 * g
        torch.testing.assert_close(p[i].data, x, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('scale', [1e-3, 1, 1e3])
def test_an_update_is_of_the_same_size_at_every_width(scale):
    torch.manual_seed(0)
    for n in (32, 128, 512):
        p = torch.nn.Parameter(torch.zeros(n, n))
        muon_step([p], [[scale * torch.randn(n, n)]], lr=0.02)
        assert 0.7 < torch.linalg.matrix_norm(p.data, 2) / 0.02 < 1.3


@pytest.mark.parametrize('options', [dict(), dict(tie_embeddings=True), dict(value_embeds=1, n_kv_head=1, mlp='swiglu'),
                                     dict(vocab_size=128), dict(vocab_size=32), dict(vocab_size=16, n_kv_head=1)])
@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_every_parameter_has_one_optimizer(options, optimizer):
    """Also where the vocabulary is as large as a hidden layer (128), the model's width (32) or its keys (16)."""
    model = GPT(GPTConfig(**dict(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32) | options))
    s = train.read_settings([f'--optimizer={optimizer}'])
    optimizers = train.make_optimizers(model, s, torch.float32)
    held = [id(p) for o in optimizers for g in o.param_groups for p in g['params']]
    missing = [name for name, p in model.named_parameters() if id(p) not in held]
    assert not missing and len(held) == len(set(held)) == len(list(model.parameters()))
    muon = {id(p) for o in optimizers if isinstance(o, train.Muon) for g in o.param_groups for p in g['params']}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} | {id(model.lm_head.weight)}
    assert not muon & tables
    assert len(muon) == (0 if optimizer == 'adamw' else 12)


def test_schedule():
    s = train.read_settings(['--warmup_frac=0.1', '--cooldown_frac=0.5', '--final_lr_frac=0.2'])
    points = [train.schedule(p, s) for p in (0, 0.05, 0.1, 0.3, 0.5, 0.75, 1)]
    assert points == pytest.approx([0.1, 0.55, 1, 1, 1, 0.6, 0.2])
    bare = train.read_settings(['--warmup_frac=0', '--cooldown_frac=0'])
    assert train.schedule(0, bare) == train.schedule(1, bare) == 1


def test_rates_and_decay_follow_progress():
    model = GPT(GPTConfig(vocab_size=50, n_layer=1, n_head=2, n_embd=512, block_size=8))
    s = train.read_settings(['--warmup_frac=0', '--weight_decay=0.2'])
    optimizers = train.make_optimizers(model, s, torch.float32)
    assert train.set_rates(optimizers, 0.7, s) == pytest.approx(0.5)
    group = optimizers[0].param_groups[0]
    assert (group['lr'], group['weight_decay']) == pytest.approx((0.5 * s.learning_rate, 0.3 * 0.2))
    head = next(g for g in optimizers[1].param_groups if g['params'][0] is model.lm_head.weight)
    assert (head['lr'], head['weight_decay']) == pytest.approx((0.5 * s.head_lr / 2, 0))


# ---- clock

class FakeTime:
    now = 5.0

    def __call__(self):
        return self.now


def drive(s, seed, pauses=(), restart_at=None, reserve=20.0):
    """Steps of uneven length under a fake clock, evaluations and a restart between; (clock, steps, mean step)."""
    rng, now = np.random.default_rng(seed), FakeTime()
    clock, step, mean, seen = train.Clock(s, age=now), 0, 0.0, [0.0]
    pauses = list(pauses)
    while clock.fits(step, mean):
        clock.reserve = reserve
        left, seconds = clock.left(), float(rng.uniform(0.5, 1.5) * (3 if rng.random() < 0.05 else 1))
        now.now += seconds
        step += 1
        clock.add_step(seconds, left, step)
        mean = 0.8 * mean + 0.2 * seconds
        assert seen[-1] <= clock.progress <= 1
        seen.append(clock.progress)
        if pauses and clock.progress > pauses[0]:
            now.now += 15
            pauses.pop(0)
        if restart_at and clock.progress > restart_at:
            spent, restart_at, now = clock.elapsed(), None, FakeTime()
            now.now = 40.0                                  # a slow start
            clock = train.Clock(s, spent, clock.trained, clock.progress, age=now)
            clock.reserve = reserve
    return clock, step, mean


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('pauses, restart_at', [((), None), ((0.25, 0.5, 0.75), None), ((0.3,), 0.6), ((), 0.85)])
def test_progress_ends_with_the_budget(seed, pauses, restart_at):
    s = train.read_settings(['--budget_minutes=10'])
    clock, _, _ = drive(s, seed, pauses, restart_at)
    assert clock.progress > 0.985
    assert abs(clock.elapsed() - (600 - 20)) < 4.5 and clock.budget == 600


@pytest.mark.parametrize('seed', range(3))
def test_progress_is_proportional_to_time(seed):
    s, now = train.read_settings(['--budget_minutes=10']), FakeTime()
    clock, rng = train.Clock(s, age=now), np.random.default_rng(seed)
    for step in range(1, 100):
        left, seconds = clock.left(), float(rng.uniform(0.1, 5))
        now.now += seconds
        clock.add_step(seconds, left, step)
        assert clock.progress == pytest.approx((now.now - 5) / 595)


def test_steps_drive_alone_when_they_are_given():
    s = train.read_settings(['--max_steps=8', '--budget_minutes=10'])
    clock, step, _ = drive(s, 0)
    assert step == 8 and clock.progress == 1
    clock = train.Clock(s, age=FakeTime())
    for step in range(1, 9):
        assert clock.fits(step - 1, 1.0)
        clock.add_step(99, clock.left(), step)
        assert clock.progress == step / 8
    assert not clock.fits(8, 1.0)
    assert train.Clock(train.read_settings(['--max_tokens=1000', '--tokens_per_step=512'])).max_steps == 2
    clock, step, _ = drive(train.read_settings(['--max_steps=100000', '--budget_minutes=2']), 0)
    assert step < 200                                       # whichever limit comes first


def test_budget_of_training_alone():
    s = train.read_settings(['--budget_minutes=5', '--budget_counts=training'])
    clock, _, _ = drive(s, 1, (0.2, 0.4, 0.6), 0.5)
    assert abs(clock.trained - 300) < 4.5 and clock.elapsed() > 380 and clock.progress > 0.985


# ---- files

def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / 'file'
    train.write_beside(path, lambda f: f.write(b'old'))
    for error in (OSError(errno.ENOSPC, 'No space left on device'), RuntimeError('unexpected pos 64 vs 0')):
        def write(f):
            f.write(b'half of the new')
            raise error
        with pytest.raises(UserError, match='could not be written'):
            train.write_beside(path, write)
        assert path.read_bytes() == b'old' and [p.name for p in tmp_path.iterdir()] == ['file']
    train.write_beside(path, lambda f: f.write(b'new'))
    assert path.read_bytes() == b'new'


def test_the_previous_checkpoint_is_kept(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        train.save_checkpoint(tmp_path, dict(version=2, step=step))
    assert weights(tmp_path)['step'] == 3 and weights(tmp_path, 'ckpt.prev.pt')['step'] == 2

    def full(state, f):
        f.write(b'x' * 1000)
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(train.torch, 'save', full)
    with pytest.raises(UserError, match='resume'):
        train.save_checkpoint(tmp_path, dict(version=2, step=4))
    assert weights(tmp_path)['step'] == 3 and weights(tmp_path, 'ckpt.prev.pt')['step'] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt.prev.pt', 'ckpt.pt']


def test_a_row_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    assert train.read_rows(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "val_bpb": 3}\n{"st')
    assert train.read_rows(path) == [{'step': 1}, {'step': 2, 'val_bpb': 3}]


def test_peaks_are_of_the_card_named():
    named = {'NVIDIA GeForce RTX 4090': 165.2, 'NVIDIA GeForce RTX 4090 Laptop GPU': None, 'NVIDIA GeForce RTX 4090 D': None,
             'NVIDIA L4': 121.0, 'NVIDIA L40S': 362.1, 'NVIDIA H100 80GB HBM3': 989.4, 'NVIDIA H100 PCIe': 756.4,
             'NVIDIA A100-SXM4-80GB': 311.9, 'Tesla T4': None}
    for name, peak in named.items():
        assert train.peak_flops(name) == (peak and pytest.approx(peak * 1e12)), name


# ---- a whole run

def test_the_report(finished):
    out_dir, out = finished
    result = json.loads((out_dir / 'result.json').read_text())
    for key in ('val_bpb', 'total_params', 'non_embedding_params', 'active_params', 'tokens', 'epochs', 'train_seconds',
                'total_seconds', 'tok_per_sec', 'mfu', 'joules', 'co2_g', 'evals', 'settings', 'hardware', 'protocol'):
        assert key in result, key
    printed = dict(re.findall(r'^(\w+): (.+)$', out.split('\n---\n')[1], re.M))
    for key in ('val_bpb', 'tokens', 'epochs', 'total_params', 'train_seconds', 'total_seconds', 'steps'):
        assert float(printed[key].replace(',', '')) == pytest.approx(result[key], rel=1e-5), key
    assert result['tokens'] == 20 * 4096 and result['steps'] == 20 and result['settings']['seed'] == 3
    assert result['val_share'] == 1 and set(result['val_bpb_per_source']) == {'tales', 'notes'}
    parts = sum(result[f'{k}_seconds'] for k in ('startup', 'compile', 'train', 'eval', 'save'))
    total = result['total_seconds'] - train.LEAVING                          # which is counted before it happens
    assert 0.8 * total < parts < 1.05 * total
    assert result['data_wait_share'] < 0.5 and result['skipped_steps'] == 0
    assert losses(out_dir)[0] == pytest.approx(math.log(257), abs=0.1) and losses(out_dir)[-1] < 4
    assert {'train_loss', 'grad_norm', 'tok_per_sec', 'mfu', 'peak_mem_gb', 'elapsed_s', 'data_wait_s'} <= set(rows(out_dir)[0])
    assert [row['step'] for row in rows(out_dir) if 'val_bpb' in row] in ([10, 20], [11, 20])
    assert rows(out_dir)[-1]['val_bpb'] == result['val_bpb']
    assert 'sample:' in out and weights(out_dir, 'ckpt.prev.pt')['step'] <= weights(out_dir)['step'] == 20
    assert re.search(r'^settings that differ.*seed=3', out, re.M)


@torch.no_grad()
def test_flops_count_the_positions_attended_to(finished, corpus):
    result = json.loads((finished[0] / 'result.json').read_text())
    config, data = GPTConfig(**result['config']), corpus.open()
    rows = train.Stream(data.tokens['train'], data.docs['train'], 3).first_rows(64, 64)
    attended = 0
    for row in rows:
        start = 0
        for t, token in enumerate(row):
            start = t if token == config.bos else start
            attended += t - start + 1
    assert result['flops_per_token'] == config.flops_per_token(attended / 64 ** 2) < config.flops_per_token()


def test_bits_per_byte_is_the_slow_sum(finished, corpus):
    """Document by document, window by window, unpadded, all logits."""
    state, data = weights(finished[0]), corpus.open()
    model = GPT(GPTConfig(**state['config']))
    model.load_state_dict(state['model'])
    bits, count = {}, {}
    starts = data.docs['val']['start'].tolist() + [len(data.tokens['val'])]
    for doc, a, b in zip(data.docs['val'], starts, starts[1:]):
        ids, source = torch.from_numpy(data.tokens['val'][a:b].astype(np.int64)), data.meta['sources'][doc['source']]
        assert doc['bytes'] == len(ids) - 1 and ids[0] == data.meta['bos']
        for first in range(0, len(ids) - 1, 64):
            piece = ids[first:first + 65]
            log_probs = model.logits(model.trunk(piece[None, :-1]))[0].log_softmax(-1)
            bits[source] = bits.get(source, 0) - log_probs.gather(1, piece[1:, None]).double().sum().item() / math.log(2)
        count[source] = count.get(source, 0) + int(doc['bytes'])
    result = json.loads((finished[0] / 'result.json').read_text())
    assert result['val_bpb'] == pytest.approx(sum(bits.values()) / sum(count.values()), rel=1e-5)
    assert result['val_bpb_per_source'] == pytest.approx({k: bits[k] / count[k] for k in bits}, rel=1e-5)
    assert result['val_bpb_error'] == 0


def test_a_finished_run_is_left_alone(finished, corpus, main):
    out_dir, before = finished[0], snapshot(finished[0])
    for more in ([], ['--init_from=resume']):
        with pytest.raises(UserError, match='finished run'):
            main(f'--out_dir={out_dir}', *more)
    assert snapshot(out_dir) == before


# ---- stopped, killed, gone on with

@pytest.fixture(scope='module')
def interrupted(corpus, tmp_path_factory):
    """The run of `finished`, killed at step 6 or so, gone on with, told to stop at step 12 or so, gone on with to its end."""
    cwd, seen = tmp_path_factory.mktemp('interrupted'), SimpleNamespace()
    args = ['train.py', *corpus.args, *STEPS, '--out_dir=run', '--eval_interval=0.5']
    first = start(*args, cwd=cwd)
    wait_for_step(first, cwd / 'run', 6)
    first.send_signal(signal.SIGKILL)
    finish(first)
    seen.killed_at = rows(cwd / 'run')[-1]['step']
    seen.again = script(*args, cwd=cwd)                    # not told to resume
    second = start(*args, '--init_from=resume', cwd=cwd)
    wait_for_step(second, cwd / 'run', max(12, seen.killed_at + 1))
    second.send_signal(signal.SIGTERM)
    seen.stopped = finish(second)
    seen.steps_done, seen.saved = rows(cwd / 'run')[-1]['step'], weights(cwd / 'run')
    seen.last = script(*args, '--init_from=resume', cwd=cwd)
    seen.out_dir = cwd / 'run'
    return seen


def test_killed_and_resumed_is_the_same_run_to_the_bit(finished, interrupted):
    assert interrupted.killed_at < 20, 'it was killed too late to show anything'
    assert interrupted.last[0] == 0, interrupted.last[2]
    assert losses(interrupted.out_dir) == losses(finished[0])
    one, other = weights(finished[0]), weights(interrupted.out_dir)
    assert all(torch.equal(one['model'][k], other['model'][k]) for k in one['model']) and one['tokens'] == other['tokens']
    a, b = (json.loads((d / 'result.json').read_text()) for d in (finished[0], interrupted.out_dir))
    assert a['val_bpb'] == b['val_bpb'] and a['tokens'] == b['tokens'] and a['sample'] == b['sample']


def test_an_unfinished_run_is_not_begun_anew(interrupted):
    code, _, err = interrupted.again
    assert code == 2 and 'unfinished run' in err and '--init_from=resume' in err and 'Traceback' not in err


def test_killed_between_the_two_moves_of_a_save(tmp_path):
    """Then only the earlier checkpoint stands there: still a run to go on with, and not one to write over."""
    (tmp_path / 'run').mkdir()
    train.save_checkpoint(tmp_path / 'run', dict(version=2, order=2, step=3))
    os.replace(tmp_path / 'run' / 'ckpt.pt', tmp_path / 'run' / 'ckpt.prev.pt')
    with pytest.raises(UserError, match='unfinished run'):
        train.open_run(train.read_settings([]), tmp_path / 'run')
    assert train.open_run(train.read_settings(['--init_from=resume']), tmp_path / 'run')['step'] == 3


def test_a_signal_saves_and_exits_with_75(interrupted):
    code, out, err = interrupted.stopped
    assert code == 75 and 'Traceback' not in err and 'resume' in err
    assert interrupted.saved['step'] == interrupted.steps_done < 20
    assert interrupted.saved['elapsed'] > 0 and interrupted.saved['times']['train'] > 0


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_timed_saves_loses_at_most_a_step(corpus, tmp_path, number):
    args = ['train.py', *corpus.args, '--budget_minutes=5', '--out_dir=run']
    process = start(*args, cwd=tmp_path)
    wait_for_step(process, tmp_path / 'run', 10)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 75 and 'Traceback' not in err
    step = weights(tmp_path / 'run')['step']
    assert rows(tmp_path / 'run')[-1]['step'] == step
    code, _, err = script(*args, '--init_from=resume', '--budget_minutes=0.3', cwd=tmp_path)
    assert code == 0, err
    losses(tmp_path / 'run')                                # no step is missing, none is there twice


def test_two_ranks_are_one_with_twice_the_accumulation(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')        # as torchrun sets it: sums in the same order on both sides
    code, alone, err = script('train.py', *corpus.args, *STEPS, '--out_dir=one', cwd=tmp_path)
    assert code == 0, err
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    code, out, err = script('train.py', *corpus.args, *STEPS, '--out_dir=run', cwd=tmp_path, launcher=launcher)
    assert code == 0, err
    assert '= 1 micro-steps of 32 x 64 on 2 rank' in out and '= 2 micro-steps of 32 x 64 on 1 rank' in alone
    assert losses(tmp_path / 'run') == pytest.approx(losses(tmp_path / 'one'), rel=1e-5)
    one, two = (json.loads((d / 'result.json').read_text()) for d in (tmp_path / 'one', tmp_path / 'run'))
    assert two['val_bpb'] == pytest.approx(one['val_bpb'], rel=1e-3)
    assert two['tokens'] == one['tokens'] and two['val_share'] == 1


def test_one_process_has_no_group(main, monkeypatch):
    monkeypatch.setattr(dist, 'init_process_group', lambda *a, **k: pytest.fail('a process group for one process'))
    main()
    assert not dist.is_initialized()


# ---- what cannot go on

def test_checkpoints_that_do_not_fit(main, corpus, tmp_path):
    main()
    (tmp_path / 'run' / 'result.json').unlink()
    before = snapshot(tmp_path / 'run')

    def refused(match, *args):
        with pytest.raises(UserError, match=match) as e:
            main('--init_from=resume', *args)
        assert snapshot(tmp_path / 'run') == before
        return str(e.value)
    text = refused('another model', '--n_layer=3', '--n_embd=32')
    assert 'n_layer 2 there, 3 here' in text and 'n_embd' in text and 'n_head' not in text
    refused('learning_rate.*was 0.02.*now 0.5', '--learning_rate=0.5')
    refused('vocab', '--tokenizer=bpe', '--vocab_size=300')
    refused('no ckpt.pt', '--out_dir=elsewhere')
    other = tmp_path / 'other' / 'text'
    shutil.copytree(corpus.source, other)
    (other / 'tales.train').write_text((other / 'tales.train').read_text().replace('kite', 'flag'))
    refused('not the data', f'--dataset=files:{other}', f'--data_dir={tmp_path / "data"}')
    whole = (tmp_path / 'run' / 'ckpt.pt').read_bytes()
    for damaged in (whole[:len(whole) // 2], whole[:100], b'', b'no checkpoint at all'):
        (tmp_path / 'run' / 'ckpt.pt').write_bytes(damaged)
        before = snapshot(tmp_path / 'run')
        assert 'ckpt.prev.pt' in refused('cut off or not a checkpoint')
    os.replace(tmp_path / 'run' / 'ckpt.prev.pt', tmp_path / 'run' / 'ckpt.pt')
    main('--init_from=resume')


def test_weights_of_another_run(main, tmp_path):
    main()
    out = main('--init_from=run', '--out_dir=second', '--seed=9')
    assert losses(tmp_path / 'second')[0] < losses(tmp_path / 'run')[0] - 0.3 and '---' in out
    assert json.loads((tmp_path / 'second' / 'result.json').read_text())['steps'] == 3


def test_overwrite(main, tmp_path):
    main()
    main('--overwrite=True', '--seed=2')
    assert len(losses(tmp_path / 'run')) == 3 and weights(tmp_path / 'run')['settings']['seed'] == 2


def test_overwrite_leaves_no_other_tokenizer(main, tmp_path):
    for tokenizer in ('bpe', 'bytes', 'bpe'):
        main(f'--tokenizer={tokenizer}', '--vocab_size=300', '--overwrite=True', f'--data_dir={tmp_path / "data"}')
        model, loaded = sample.load(tmp_path / 'run')
        assert loaded.kind == tokenizer and loaded.vocab_size == model.config.vocab_size


def test_a_checkpoint_that_finds_no_room_does_not_end_the_run(main, tmp_path, monkeypatch):
    save, calls = train.save_checkpoint, []

    def full(*args):
        calls.append(1)
        if len(calls) == 2:
            raise UserError('the disk is full')
        save(*args)
    monkeypatch.setattr(train, 'save_checkpoint', full)
    assert 'the disk is full' in main() and weights(tmp_path / 'run')['step'] == 3


def test_data_that_cannot_be_trained_on(corpus, main, tmp_path, capfd):
    def refused(match, *args):
        with pytest.raises(UserError, match=match):
            main(*args)
        assert not (tmp_path / 'run').exists()
    refused('less than one block', '--block_size=262144', '--tokens_per_step=262144')
    data = tmp_path / 'data'
    shutil.copytree(corpus.data_dir, data)
    path = data / corpus.folder.name / 'train.bin'
    whole = path.read_bytes()
    for cut in (len(whole) // 4 * 2, len(whole) - 1, 0):
        path.write_bytes(whole[:cut])
        refused('train.bin .*overwrite', f'--data_dir={data}')
    path.write_bytes(bytes(len(whole)))
    refused('train.bin is not the file', f'--data_dir={data}')
    refused('could not be prepared', '--dataset=files:no/such/folder')
    assert 'no/such/folder' in capfd.readouterr().err
    refused('there is no data set', '--dataset=storys')


@pytest.mark.parametrize('wrong', ['--n_head=0', '--n_kv_head=3', '--n_layer=0', '--block_size=0', '--head_dim=7', '--mlp=gelu',
                                   '--tokens_per_step=500', '--beta1=1.0', '--out_dir=file', '--out_dir=file/run'])
def test_settings_that_cannot_work(main, tmp_path, wrong):
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(UserError):
        main(wrong)
    assert [p.name for p in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize('options', [
    ['--block_size=40', '--tokens_per_step=640'], ['--n_kv_head=1'], ['--grad_clip=0'], ['--optimizer=adamw'],
    ['--logit_softcap=10'], ['--value_embeds=1'], ['--sample_tokens=0'], ['--max_steps=0', '--max_tokens=1500'],
    ['--tie_embeddings=True'], ['--mlp=swiglu'], ['--sample_prompt=Mia'], ['--dtype=bfloat16']], ids=' '.join)
def test_options_run(main, tmp_path, options):
    main(*options)
    assert len(losses(tmp_path / 'run')) == 3
    assert math.isfinite(json.loads((tmp_path / 'run' / 'result.json').read_text())['val_bpb'])


# ---- steps that are not finite

def broken_steps(monkeypatch, broken):
    """train_step, except that the calls for which broken(number) holds see a loss that is not a number."""
    step, calls = train.train_step, []

    def maybe(step_model, *args, **kwargs):
        calls.append(1)
        number = len(calls)
        return step((lambda *a: step_model(*a) * math.nan) if broken(number) else step_model, *args, **kwargs)
    monkeypatch.setattr(train, 'train_step', maybe)


def test_single_bad_steps_are_skipped_and_counted(main, tmp_path, monkeypatch):
    broken_steps(monkeypatch, lambda n: n in (3, 6))
    out = main('--max_steps=10')
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['skipped_steps'] == 2 and result['steps'] == 10 and result['val_bpb'] < 8
    assert all(v.isfinite().all() for v in weights(tmp_path / 'run')['model'].values()) and 'again' not in out


def test_a_few_bad_steps_go_back_to_the_checkpoint(main, tmp_path, monkeypatch):
    broken_steps(monkeypatch, lambda n: 4 <= n < 4 + train.BAD_STEPS)
    out = main('--max_steps=15')
    assert 'weights and optimizer of step 2 again' in out        # step 3's may be the cause
    assert json.loads((tmp_path / 'run' / 'result.json').read_text())['skipped_steps'] == train.BAD_STEPS
    assert len(losses(tmp_path / 'run')) == 15


def test_bad_steps_for_ever_end_the_run(corpus, tmp_path):
    args = [*corpus.args, '--max_steps=60', '--save_minutes=0', '--head_lr=1e38', '--out_dir=run']
    code, out, err = script('train.py', *args, cwd=tmp_path)
    assert code == 3 and 'not finite' in err and 'lower learning_rate' in err and 'Traceback' not in err
    assert 'again, on new batches' in out and not (tmp_path / 'run' / 'result.json').exists()
    assert rows(tmp_path / 'run')[-1]['skipped'] == 2 * train.BAD_STEPS


# ---- time

def test_dry_run_writes_nothing(main, tmp_path):
    began = time.monotonic()
    out = main('--dry_run=True', '--max_steps=0', '--budget_minutes=60', '--dollars_per_hour=0.4')
    said = dict(re.findall(r'^(\w+): (.+)$', out.split('---')[1], re.M))
    assert int(said['tokens'].replace(',', '')) > 0 and float(said['epochs']) > 0 and said['dollars'].startswith('0.40')
    assert not list(tmp_path.iterdir()) and time.monotonic() - began < 60


@pytest.mark.parametrize('more', [['--budget_minutes=0.01', '--max_steps=0'], ['--max_steps=1']])
def test_dry_run_of_little(main, tmp_path, more):
    assert 'tokens: ' in main('--dry_run=True', *more) and not list(tmp_path.iterdir())


def test_dry_run_of_a_run_to_go_on_with(main, tmp_path):
    main()
    (tmp_path / 'run' / 'result.json').unlink()
    before = snapshot(tmp_path / 'run')
    assert 'tokens: ' in main('--dry_run=True', '--init_from=resume') and snapshot(tmp_path / 'run') == before


def timed(corpus, cwd, minutes, *more):
    args = [*corpus.args, f'--budget_minutes={minutes}', '--eval_interval=0.25', '--out_dir=run', *more]
    began = time.monotonic()
    code, out, err = script('train.py', *args, cwd=cwd, timeout=60 * minutes + 60)
    assert code == 0, err
    return time.monotonic() - began, json.loads((cwd / 'run' / 'result.json').read_text())


def test_a_short_run_ends_in_time(corpus, tmp_path):
    seconds, result = timed(corpus, tmp_path, 0.3)
    assert 14 < seconds < 23 and result['total_seconds'] == pytest.approx(seconds, abs=2)
    last = [row for row in rows(tmp_path / 'run') if 'progress' in row][-1]
    assert last['progress'] > 0.97 and result['val_bpb'] < 3.5
    assert result['startup_seconds'] < 20


@pytest.mark.slow
def test_a_minute_is_a_minute(corpus, tmp_path):
    for number in range(3):                                 # a busy machine can spoil one; never the ten seconds
        (tmp_path / str(number)).mkdir()
        seconds, result = timed(corpus, tmp_path / str(number), 1)
        assert seconds < 70
        if abs(seconds - 60) < 1.2 and abs(result['total_seconds'] - seconds) < 1.2:
            return
    pytest.fail(f'three one-minute runs missed 2 %, the last took {seconds:.1f} s')


@pytest.mark.slow
def test_a_step_longer_than_the_budget_is_cut(corpus, tmp_path):
    seconds, result = timed(corpus, tmp_path, 0.3, '--tokens_per_step=1048576', '--n_layer=8', '--n_embd=256')
    assert seconds < 23 and 0 < result['tokens'] < 1048576          # one part of a step, or two where the first was quick


@pytest.mark.slow
def test_minutes_of_training_teach_coherence_and_shuffled_labels_show_none(tmp_path):
    """The quickstart, by steps and with its own data: more of the world than pronouns must be understood."""
    code, out, err = script('train.py', ROOT / 'config' / 'quickstart.py', '--max_tokens=6000000', '--sample_tokens=0',
                            '--eval_interval=0', cwd=tmp_path, timeout=1800)
    assert code == 0, err
    result = json.loads((tmp_path / 'out' / 'quickstart' / 'result.json').read_text())['evals']['coherence']
    assert result['items'] >= 1000 and 'coherence' in out               # a busy machine has time for fewer
    assert result['accuracy'] > 0.5 + 3 * result['error']
    assert sum(share > 0.6 for share in result['per_kind'].values()) >= 2
    model, tokenizer = sample.load(tmp_path / 'out' / 'quickstart')
    pairs, _ = prepare_data.read_items(next((tmp_path / 'data').glob('*/pairs.jsonl')))
    coin = random.Random(0)
    shuffled = [p | dict(options=p['options'][::-1]) if coin.random() < 0.5 else p for p in pairs]
    assert abs(sample.judge(model, prepare_data.tokenize_items(shuffled, tokenizer))['accuracy'] - 0.5) < 0.04


@pytest.mark.slow
def test_no_step_waits_for_data(corpus, tmp_path):
    _, result = timed(corpus, tmp_path, 0.5, '--tokens_per_step=4096')
    assert result['data_wait_share'] < 0.01


# ---- growth

def test_a_config_may_use_the_settings_so_far(tmp_path):
    first, second = config(tmp_path, 'n_embd = 64\nn_head = 2\n', 'a.py'), str(ROOT / 'config' / 'hypercloning.py')
    s = train.read_settings([first, second])
    assert s.n_embd == 32 and s.head_dim == 16 and s.growth == ((0.33, dict(n_embd=64)),)
    assert train.read_settings([first, '--n_embd=128', second]).growth[0][1] == dict(n_embd=128)
    line = Path(second).read_text().splitlines().index('n_embd = n_embd // 2') + 1
    assert [line.split(',')[0] for line in train.overruled([first, second, '--n_head=1'])] == [f'{second}:{line} sets n_embd to 32']
    assert train.read_settings(['--sample_prompt=seed']).sample_prompt == 'seed'
    with pytest.raises(UserError, match='c.py:1: the value of n_embd must be a literal'):
        train.read_settings([config(tmp_path, 'n_embd = width * 2\n', 'c.py')])


def trained(model, s, optimizers, steps, seed=5, dtype=torch.float64):
    """Losses of some steps on random rows, the same for the same seed."""
    dice, out = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        idx = torch.randint(1, 50, (4, 17), generator=dice)
        out.append(train.train_step(model, model, optimizers, [(idx[:, :-1], idx[:, 1:])], 0.3, s)[0])
    return out


def small_model(s, **options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32, **options)).double()
    model.compute_dtype = torch.float64
    return model, train.make_optimizers(model, s, torch.float64)


@pytest.mark.parametrize('options', [dict(), dict(tie_embeddings=True, mlp='swiglu', value_embeds=1), dict(logit_softcap=5.0)])
@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_without_noise_a_clone_learns_as_the_narrow_model_does(optimizer, options):
    """The rates and every optimizer's averages carry over at their right scale: the same losses, step by step."""
    s = train.read_settings([f'--optimizer={optimizer}', '--growth_snr_db=1e9', '--grad_clip=0', '--weight_decay=0.5'])
    model, optimizers = small_model(s, **options)
    trained(model, s, optimizers, 5)
    bigger, carried = train.grown(model, optimizers, train.grown_config(model.config, dict(n_embd=64)), s, 1)
    expected = trained(model, s, optimizers, 6, seed=6)
    assert trained(bigger, s, carried, 6, seed=6) == pytest.approx(expected, rel=1e-6)
    bigger, _ = train.grown(model, optimizers, train.grown_config(model.config, dict(n_embd=64)), s, 1)
    forgot = trained(bigger, s, train.make_optimizers(bigger, s, torch.float64), 6, seed=7)
    assert forgot != pytest.approx(trained(model, s, optimizers, 6, seed=7), rel=1e-3)


def test_noise_tells_the_clones_apart():
    def difference(snr_db):
        s = train.read_settings([f'--growth_snr_db={snr_db}'])
        model, optimizers = small_model(s)
        trained(model, s, optimizers, 5)
        model, optimizers = train.grown(model, optimizers, train.grown_config(model.config, dict(n_embd=64)), s, 1)
        trained(model, s, optimizers, 200)
        up = model.blocks[0].mlp.up.weight
        return ((up[:128] - up[128:]).norm() / up.norm()).item()       # rows of one copy, of the other
    assert difference(1e9) < 1e-6 and difference(10.0) > 0.05


def test_copies_that_begin_alike_learn_different_things():
    """With noise the wide model's halves compute the same at first and not after 200 steps; without, ever."""
    idx = torch.randint(1, 50, (4, 16), generator=torch.Generator().manual_seed(1))
    for snr_db, apart in ((1e9, False), (10.0, True)):
        s = train.read_settings([f'--growth_snr_db={snr_db}'])
        model, optimizers = small_model(s)
        trained(model, s, optimizers, 5)
        model, optimizers = train.grown(model, optimizers, train.grown_config(model.config, dict(n_embd=64)), s, 1)

        def difference():
            with torch.no_grad():
                one, other = model.trunk(idx).split(32, dim=-1)
            return ((one - other).norm() / one.norm()).item()
        assert difference() < 1e-10
        if apart:                                      # 10 dB: the noise has a tenth of the weights' power
            one, other = model.blocks[0].mlp.up.weight.split(32, dim=1)
            assert ((one - other).norm() / (one + other).norm()).item() == pytest.approx(10 ** -0.5, rel=1e-6)
        trained(model, s, optimizers, 200)
        assert difference() > 0.05 if apart else difference() < 1e-3        # which rounding alone brings


GROW = ['--growth=[(0.3, dict(n_embd=128)), (0.6, dict(n_layer=3))]', '--max_steps=12', '--save_minutes=0']


def test_a_run_that_grows_resumes_over_its_growth(main, tmp_path, monkeypatch):
    out = main(*GROW)
    assert out.count('grown to ') == 2 and 'grown to 3 layers, 128 wide, 4 heads of 32' in out
    whole, result = losses(tmp_path / 'run'), json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert len(whole) == 12 and result['config']['n_embd'] == 128 and result['flops'] < result['tokens'] * result['flops_per_token']
    step_of = train.train_step
    for first, last in ((0, 3), (3, 5), (5, 9), (9, 12)):                # before the first growth, and after each
        left = iter(range(last - first))
        monkeypatch.setattr(train, 'train_step', lambda *a: step_of(*a[:-1], lambda: next(left, None) is None))
        if last < 12:
            with pytest.raises(train.Stopped):
                main(*GROW, '--out_dir=parts', *['--init_from=resume'] * (first > 0))
    monkeypatch.setattr(train, 'train_step', step_of)
    main(*GROW, '--out_dir=parts', '--init_from=resume')
    assert losses(tmp_path / 'parts') == whole
    import sample
    model, tokenizer = sample.load(tmp_path / 'parts')
    assert model.config.n_layer == 3 and ''.join(sample.stream(model, tokenizer, 'Mia', 8)) is not None


@pytest.mark.parametrize('growth, said', [
    ('[(0.3, dict(n_embd=96))]', 'whole multiples'), ('[(0.3, dict(n_embd=32))]', 'whole multiples'), ('[(0.3, dict(vocab=1))]', 'cannot grow'),
    ('[(1.3, dict(n_embd=128))]', 'between 0.0 and 1'), ('[(0.5, dict(n_layer=3)), (0.4, dict(n_layer=4))]', 'between 0.5 and 1'),
    ('[0.3]', 'write it like'), ('[(0.3, 128)]', 'write it like'), ('[(0.3, dict(n_embd="big"))]', 'write it like')])
def test_a_growth_that_cannot_be(main, tmp_path, growth, said):
    with pytest.raises(UserError, match=said):
        main(f'--growth={growth}')
    assert not (tmp_path / 'run').exists()


def test_depth_as_a_stack(main, tmp_path):
    with pytest.raises(UserError, match='no stack of 2'):
        main('--growth=[(0.3, dict(n_layer=3))]', '--growth_depth=stack')
    assert 'grown to 4 layers' in main('--growth=[(0.3, dict(n_layer=4))]', '--growth_depth=stack')


def test_a_finished_run_grows(main, tmp_path):
    """Its shape is the run's, with the sizes that are given; the first loss is about the last one there."""
    main('--max_steps=20')
    main('--init_from=run', '--out_dir=second', '--n_embd=128', '--seed=9', '--max_steps=3')
    grown = json.loads((tmp_path / 'second' / 'result.json').read_text())
    assert grown['config']['n_embd'] == 128 and grown['config']['n_head'] == 4
    assert losses(tmp_path / 'second')[0] == pytest.approx(losses(tmp_path / 'run')[-1], abs=0.3)
    with pytest.raises(UserError, match='another model.*whole multiples'):
        main('--init_from=run', '--out_dir=third', '--n_embd=96')


# ---- curricula

def test_pacing_is_what_climb_defines():
    def at(progress, pacing):
        return train.admitted(progress, train.read_settings([f'--pacing={pacing}']), 0.1)
    for pacing in ('linear', 'quad', 'root', 'exp', 'log', 'step'):
        assert at(0.0, pacing) == at(0.0625, pacing) == pytest.approx(0.1)
        assert at(0.875, pacing) == at(1.0, pacing) == pytest.approx(1.0)
        shares = [at(p / 100, pacing) for p in range(101)]
        assert shares == sorted(shares)
    middle = (0.0625 + 0.875) / 2
    assert at(middle, 'linear') == pytest.approx(0.55) and at(middle, 'quad') == pytest.approx(0.1 + 0.9 / 4)
    assert at(middle, 'root') == pytest.approx(0.1 + 0.9 * 0.5 ** 0.5) and at(middle, 'step') == pytest.approx(0.7)
    assert at(middle, 'exp') == pytest.approx(0.1 + 0.9 * math.expm1(5) / math.expm1(10))
    assert at(0.0625 + 0.12 * 0.8125, 'log') == pytest.approx(0.1 + 0.9 * 0.79, abs=0.005)


def made_up(n=400, order='shuffled', weights=None, **settings):
    """A curriculum over n documents of 5 to 14 tokens, all of them the document's number; and the difficulties."""
    dice = np.random.default_rng(0)
    lengths = dice.integers(5, 15, n)
    docs = np.zeros(n, prepare_data.DOC)
    docs['start'] = lengths.cumsum() - lengths
    s = train.read_settings([f'--curriculum_order={order}', '--tokens_per_step=64', *(f'--{k}={v}' for k, v in settings.items())])
    docs['source'] = np.arange(n) % 2
    return train.Curriculum(np.repeat(np.arange(n), lengths), docs, dice.random(n).round(1), s, weights)


def test_a_curriculum_reads_a_source_as_often_as_it_weighs():
    stream = made_up(n=100, weights=[3.0, 1.0], pacing_floor=1)
    stream.pace(int(stream.up_to[-1]) // 64, 0.0)
    read = stream.read(0, int(stream.up_to[-1]))                                   # one round
    times = np.bincount(read, minlength=100) / np.bincount(made_up(n=100).tokens)
    assert (times[::2] == 3).all() and (times[1::2] == 1).all()
    with pytest.raises(train.UserError, match='whole number'):
        made_up(weights=[0.5, 1.0])


@pytest.mark.parametrize('order', ['shuffled', 'frontier'])
def test_a_curriculum_reads_what_it_admits_and_each_document_once_a_round(order):
    stream, steps = made_up(order=order), 200
    for step in range(steps):
        stream.pace(step, step / steps)
    read, at = stream.read(0, 64 * 60), 0
    while at < len(read) - 15:                               # documents come whole
        n = int(stream.lengths[read[at]])
        assert (read[at:at + n] == read[at]).all()
        limit = stream.shares[at // 64] + 1e-9
        assert stream.up_to[stream.rank[read[at]]] <= limit * stream.up_to[-1] + 64, 'not admitted yet'
        at += n
    starts = [int(d) for i, d in enumerate(read) if i == 0 or read[i - 1] != d]
    k = stream.easiest(stream.shares[0])
    first = {int(d) for d in starts[:k // 2]}
    assert len(first) == k // 2 and all(stream.rank[d] < k for d in first)         # none twice while others wait
    assert (order == 'frontier') == (sorted(starts[:8], key=lambda d: -stream.rank[d]) == starts[:8])


def test_a_curriculum_is_the_same_from_any_place():
    whole, other = made_up(seed=4), made_up(seed=4)
    for step in range(60):
        whole.pace(step, step / 60)
    other.shares = list(whole.shares)
    expected = whole.read(0, 64 * 50)
    assert (np.concatenate([other.read(a, b - a) for a, b in zip([0, 7, 64, 1000, 2222], [7, 64, 1000, 2222, 3200])]) == expected).all()
    late = made_up(seed=4)
    late.shares = list(whole.shares)
    assert (late.read(2100, 400) == expected[2100:2500]).all() and len(late.drawn) < 100
    assert (made_up(seed=5).read(0, 300) != expected[:300]).any()
    whole, late = made_up(seed=4), made_up(seed=4)
    whole.shares = late.shares = other.shares
    shuffled, later = (np.concatenate([stream.rows(row, 4, 8) for row in range(first, 256, 4)])
                       for stream, first in [(whole, 0), (late, 200)])            # four windows of 8 steps of 8 rows
    inorder = expected[:256 * 8].reshape(4, 64, 8)
    for window, rows in zip(inorder, shuffled.reshape(4, 64, 9)):
        assert sorted(map(tuple, rows[:, :8])) == sorted(map(tuple, window)) and (rows[:, :8] != window).any()
    assert np.array_equal(shuffled[200:], later)


@pytest.fixture(scope='session')
def scored(corpus, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp('scored')
    prepare_data.build(f'files:{corpus.source}', tokenizer='bytes', data_dir=data_dir, scores=True,
                       min_doc_bytes=0, quiet=True)
    return [f'--data_dir={data_dir}', '--curriculum=bigram', '--max_steps=12']


def in_two_parts(main, monkeypatch, asked, *args):
    """A run into `parts` that is told to stop when it has asked so often whether to, and then resumed."""
    step_of, left = train.train_step, iter(range(asked))
    monkeypatch.setattr(train, 'train_step', lambda *a: step_of(*a[:-1], lambda: next(left, None) is None))
    with pytest.raises(train.Stopped):
        main(*args, '--out_dir=parts')
    monkeypatch.setattr(train, 'train_step', step_of)
    main(*args, '--out_dir=parts', '--init_from=resume')


def test_a_run_with_a_curriculum_resumes(main, tmp_path, scored, monkeypatch):
    long = [*scored, '--max_steps=32']                     # stopped in the third of four windows
    main(*long)
    in_two_parts(main, monkeypatch, 21, *long)
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'run') and len(losses(tmp_path / 'run')) == 32
    main(*scored, '--curriculum=', '--out_dir=plain')
    assert losses(tmp_path / 'plain') != losses(tmp_path / 'run')


def test_a_run_that_read_the_text_in_another_order_is_not_resumed(main, tmp_path, monkeypatch):
    in_two_parts(main, monkeypatch, 2)                     # leaves a finished run
    (tmp_path / 'parts' / 'result.json').unlink()
    state = weights(tmp_path / 'parts')
    del state['order']
    torch.save(state, tmp_path / 'parts' / 'ckpt.pt')
    with pytest.raises(UserError, match='begun by an older train.py'):
        main('--out_dir=parts', '--init_from=resume')


def test_curricula_that_cannot_be(main, scored):
    for settings, said in ((['--curriculum=bigrams'], "no measure 'bigrams'.*bigram.*--scores"), (['--weights=tales:1.5'], 'whole number'),
                           (['--pacing_floor=0.001'], 'admits [0-9]+ tokens at first and a step reads 512')):
        with pytest.raises(UserError, match=said):
            main(*scored, *settings)
    with pytest.raises(UserError, match='no measure'):
        main('--curriculum=bigram')


# ---- what changes the loss

@pytest.fixture(scope='module')
def classed(corpus, tmp_path_factory):
    """The small corpus with word classes made up for it."""
    folder = tmp_path_factory.mktemp('classed') / corpus.folder.name
    shutil.copytree(corpus.folder, folder)
    np.save(folder / 'classes.npy', np.random.default_rng(0).integers(0, 5, (257, 7)).astype(np.float32))
    return folder


def test_soft_targets_are_those_of_the_paper(classed):
    """A softmax of cosines over a temperature over all but the right token, times 1 - alpha."""
    data, s = prepare_data.open_data(classed), train.read_settings(['--smoothing=0.5', '--smoothing_temperature=0.2'])
    table = train.smoothing_table(s, data)
    assert table.shape == (257, 16)
    rows = torch.from_numpy(np.load(classed / 'classes.npy')).double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    alike = torch.exp(rows @ rows.T / 0.2).fill_diagonal_(0)
    expected = 0.3 * alike / alike.sum(1, keepdim=True) + 0.7 * torch.eye(257)
    got = model_file.soft_targets(torch.arange(257)[:, None], (table, model_file.similarity_norm(table), torch.tensor(0.7)))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-7)
    s = train.read_settings(['--smoothing=0.5', '--smoothing_by=uniform'])
    table = train.smoothing_table(s, data)
    got = model_file.soft_targets(torch.tensor([[3]]), (table, model_file.similarity_norm(table), torch.tensor(0.7)))
    torch.testing.assert_close(got[0], torch.full((257,), 0.3 / 256).index_fill(0, torch.tensor(3), 0.7))


def test_alpha_and_the_classes_share_follow_progress(classed):
    data = prepare_data.open_data(classed)
    s = train.read_settings(['--smoothing=0.4', '--class_loss=0.5', '--class_until=0.5'])
    seen = []
    objective = train.make_objective(s, data, GPTConfig(), 'cpu', 0)
    for progress in (0.0, 0.25, 0.5, 1.0):
        objective(lambda idx, targets, soft, classes: seen.append((soft[2].item(), classes[1].item())), 0, progress)(0, 0)
    assert seen == [pytest.approx(pair) for pair in ((0.6, 0.5), (0.7, 0.25), (0.8, 0.0), (1.0, 0.0))]
    plain = train.read_settings([])
    assert train.make_objective(plain, data, GPTConfig(), 'cpu', 0)(seen, 0, 0.5) is seen          # the model itself


def test_the_second_head_guesses_classes():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=32, classes=4))
    torch.nn.init.normal_(model.class_head.weight)
    idx, class_of = torch.randint(1, 50, (3, 16)), torch.arange(50) % 4
    targets = idx.roll(-1, 1)
    targets[0, :4] = -1
    x = model.trunk(idx)[targets >= 0]
    both = [torch.nn.functional.cross_entropy(z, t) for z, t in ((model.lm_head(x), targets[targets >= 0]),
                                                                 (model.class_head(x), class_of[targets[targets >= 0]]))]
    got = model(idx, targets, classes=(class_of, torch.tensor(0.25)))
    torch.testing.assert_close(got, 0.75 * both[0] + 0.25 * both[1])


def test_rare_ids_are_neither_read_nor_taught():
    counts = np.array([0, 0, 50, 40, 30, 20, 10, 5])            # bos, unk, and six ids, the frequent first
    tokens = np.repeat(np.arange(8), counts)
    data = SimpleNamespace(tokenizer=SimpleNamespace(unk=1), tokens=dict(train=tokens), meta=dict(vocab_size=8, bos=0))
    s = train.read_settings(['--vocabulary_floor=0.25', '--pacing_start=0', '--pacing_end=1'])
    known = train.known_ids(s, data, 'cpu')
    idx, targets = torch.tensor([[0, 2, 3, 4, 7]]), torch.tensor([[2, 3, 4, 7, -1]])
    assert [x.tolist() for x in known(idx, targets, 0.0)] == [[[0, 2, 3, 1, 1]], [[2, 3, -1, -1, -1]]]
    assert [x.tolist() for x in known(idx, targets, 0.34)] == [[[0, 2, 3, 4, 1]], [[2, 3, 4, -1, -1]]]
    assert [x.tolist() for x in known(idx, targets, 1.0)] == [idx.tolist(), targets.tolist()]


def test_runs_with_another_objective(main, tmp_path, classed):
    here = f'--data_dir={classed.parent}'
    main(here)
    plain = losses(tmp_path / 'run')
    for number, settings in enumerate((['--smoothing=0.5'], ['--smoothing=0.5', '--smoothing_by=uniform'], ['--class_loss=0.5'])):
        main(here, *settings, f'--out_dir=other{number}')
        assert losses(tmp_path / f'other{number}') != plain
        sample.load(tmp_path / f'other{number}')
    with pytest.raises(UserError, match='no word classes.*--classes'):
        main('--smoothing=0.5', '--out_dir=none')
    with pytest.raises(UserError, match='bytes has none: use bpe'):
        main('--vocabulary_floor=0.5', '--out_dir=none')
# ---- objectives and regularisers

@pytest.mark.parametrize('settings', [['--dropout=0.2', '--layer_drop=0.3'], ['--ema=0.1', '--growth=[(0.3, dict(n_embd=128))]', '--predict_ahead=2'],
                                      ['--masked=0.5', '--tokenizer=bpe', '--vocab_size=300']])
def test_a_run_resumes_to_the_bit_with(main, tmp_path, monkeypatch, settings):
    settings = [*settings, '--max_steps=20', '--micro_batch_size=4', '--budget_minutes=10000']
    main(*settings)
    step_of, left = train.train_step, iter(range(30))                 # it is asked three times a step
    monkeypatch.setattr(train, 'train_step', lambda *a: step_of(*a[:-1], lambda: next(left, None) is None))
    with pytest.raises(train.Stopped, match='after step 10'):
        main(*settings, '--out_dir=parts')
    monkeypatch.setattr(train, 'train_step', step_of)
    main(*settings, '--out_dir=parts', '--init_from=resume')
    ours, theirs = weights(tmp_path / 'run'), weights(tmp_path / 'parts')
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'run') and ours['step'] == 20
    for one, other in zip(*([x['model'], (x['average'] or x)['model']] for x in (ours, theirs))):
        assert all(torch.equal(one[k], other[k]) for k in one)


def objective_of(settings, rank=0, data=None, **options):
    s = train.read_settings(settings)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32, **options))
    return train.make_objective(s, data, model.config, 'cpu', rank), model


def test_random_numbers_are_of_seed_step_and_rank():
    idx = torch.randint(1, 50, (8, 16), generator=torch.Generator().manual_seed(1))

    def two(step, rank=0, seed=1):
        objective, model = objective_of([f'--seed={seed}'], rank, dropout=0.5)
        torch.nn.init.normal_(model.lm_head.weight)
        loss_of = objective(model, step, 0.5)
        return [loss_of(idx, idx).item() for _ in range(2)]
    assert two(3) == two(3) and len({*two(3), *two(4), *two(3, rank=1), *two(3, seed=2)}) == 8


def test_what_is_off_is_the_model_itself():
    objective, model = objective_of([])
    assert objective(model, 3, 0.5) is model


def test_the_average_is_the_weighted_sum_of_all_weights_at_any_speed():
    _, model = objective_of([])
    torch.nn.init.zeros_(model.lm_head.weight)
    average, at, expected = train.new_average(model, 0.0), 0.0, 0.0
    for progress in (0.01, 0.03, 0.1, 0.11):                            # the weights are 100 progress
        torch.nn.init.constant_(model.lm_head.weight, 100 * progress)
        train.follow(average, model, progress, 0.02)
        old = math.exp((at - progress) / 0.02)
        expected, at = old * expected + (1 - old) * 100 * progress, progress
    assert average['model']['lm_head.weight'].mean().item() == pytest.approx(expected)
    slow, fast = train.new_average(model, 0.11), train.new_average(model, 0.11)
    torch.nn.init.zeros_(model.lm_head.weight)
    for progress in (0.12, 0.13, 0.14):
        train.follow(fast, model, progress, 0.02)
    train.follow(slow, model, 0.14, 0.02)
    torch.testing.assert_close(slow['model'], fast['model'])
    assert slow['model']['lm_head.weight'].mean().item() == pytest.approx(11 * math.exp(-1.5))


@pytest.mark.parametrize('tied', [True, False])
def test_what_is_measured_saved_and_sampled_is_the_average(main, tmp_path, corpus, tied):
    main('--ema=0.3', '--max_steps=12', f'--tie_embeddings={tied}', '--final_lr_frac=1.0')
    state, result, data = weights(tmp_path / 'run'), json.loads((tmp_path / 'run' / 'result.json').read_text()), corpus.open()
    model, tokenizer = sample.load(tmp_path / 'run')
    assert state['average']['progress'] == 1 and torch.equal(model.wte.weight, state['average']['model']['wte.weight'])
    assert sample.bits_per_byte(model, data.tokens['val'], data.docs['val'])['bpb'] == pytest.approx(result['val_bpb'], rel=1e-6)
    model.load_state_dict(state['model'])
    assert sample.bits_per_byte(model, data.tokens['val'], data.docs['val'])['bpb'] != pytest.approx(result['val_bpb'], rel=1e-3)


def test_weight_decay_goes_from_point_to_point():
    model = objective_of([])[1]

    def at(progress, *settings):
        s = train.read_settings(['--weight_decay=0.8', *settings])
        optimizers = train.make_optimizers(model, s, torch.float32)
        train.set_rates(optimizers, progress, s)
        return optimizers[0].param_groups[0]['weight_decay']
    assert [at(p) for p in (0, 0.3, 0.77, 1)] == [0.8 * (1 - p) for p in (0, 0.3, 0.77, 1)]      # as before, to the bit
    file = str(ROOT / 'config' / 'weight_decay.py')
    assert [at(p, file) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([0.8, 0.45, 0.1, 0.515, 0.93])
    assert at(0.6, '--weight_decay_points=[(0, 30), (1, 30)]') == pytest.approx(24)


@pytest.mark.parametrize('points', ['()', '(1, 0)', '[(0, 1)]', '[(0, 1), (0.5, 0)]', '[(0, 1), (0.5, 1), (0.5, 0), (1, 0)]',
                                    '[(0, 1), (1, -1)]', '[(0, 1), (1, "a")]', '[(0, 1), (1, 1e999)]', '[(0, 1, 2), (1, 1, 2)]'])
def test_points_that_cannot_be(points):
    assert 'weight_decay_points is' in mistakes(f'--weight_decay_points={points}')


def test_the_weight_of_further_tokens_falls_with_progress():
    objective, model = objective_of(['--ahead_weight=0.4'], predict_ahead=2)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    idx = torch.randint(1, 50, (4, 17), generator=torch.Generator().manual_seed(1))
    pair = idx[:, :-1], idx[:, 1:]
    for progress in (0.0, 0.5, 1.0):
        assert objective(model, 3, progress)(*pair).item() == pytest.approx(model(*pair, ahead=0.4 * (1 - progress)).item())
    held = {id(p) for o in train.make_optimizers(model, train.read_settings([]), torch.float32) for g in o.param_groups for p in g['params']}
    assert all(id(p) in held for p in model.parameters())


def test_a_run_learns_from_an_earlier_one(main, tmp_path, finished, corpus):
    teacher = shutil.copytree(finished[0], tmp_path / 'teacher')
    out = main(f'--teacher={teacher}', '--teacher_weight=1.0', '--n_embd=32', '--max_steps=40', '--out_dir=taught', '--learning_rate=0.05')
    s, data = train.read_settings([*corpus.args, f'--teacher={teacher}', '--teacher_weight=1.0']), corpus.open()
    student, model = sample.load(tmp_path / 'taught')[0], sample.load(teacher)[0]
    loss_of = train.make_objective(s, data, model.config, 'cpu', 0)(model, 0, 0.0)
    idx = torch.from_numpy(data.tokens['val'][:65].astype(np.int64))[None]
    assert loss_of(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(0, abs=1e-5)          # against itself
    loss_of = train.make_objective(s, data, model.config, 'cpu', 0)(student, 0, 0.0)
    assert loss_of(idx[:, :-1], idx[:, 1:]).item() < 0.5 * losses(tmp_path / 'taught')[0] and 'teacher=' in out


def test_teachers_that_cannot_be(main, tmp_path, finished):
    teacher = shutil.copytree(finished[0], tmp_path / 'teacher')
    for settings, said in ((['--teacher=nowhere'], 'nowhere.*does not exist'), ([f'--teacher={teacher}', '--block_size=128'], 'reads 64 tokens'),
                           ([f'--teacher={teacher}', '--tokenizer=bpe', '--vocab_size=300'], 'another vocabulary than')):
        with pytest.raises(UserError, match=said):
            main(*settings)
        assert not (tmp_path / 'run').exists()


def test_a_share_of_the_rows_fills_in_what_is_hidden():
    data, calls = SimpleNamespace(tokenizer=SimpleNamespace(unk=1)), []
    objective, _ = objective_of(['--masked=0.25', '--tokens_per_step=8192', '--block_size=1024', '--micro_batch_size=8'], data=data)

    def model(idx, targets, two_way=False):
        calls.append((idx, targets, two_way))
        return torch.tensor(8.0 if two_way else 1.0)
    whole = torch.randint(2, 50, (8 * 1024 + 1,), generator=torch.Generator().manual_seed(1))
    whole[::10] = 0
    idx, targets = whole[:-1].view(8, 1024), whole[1:].view(8, 1024)
    for step, (progress, rate) in enumerate([(0.0, 0.3), (1.0, 0.15)] * 4):
        calls.clear()
        assert objective(model, step, progress)(idx, targets).item() == pytest.approx(0.25 * 8 + 0.75)
        (rows, guessed, two_way), (rest, their_targets, causal) = calls
        assert two_way and not causal and torch.equal(rest, idx[2:]) and torch.equal(their_targets, targets[2:])
        hidden = rows == 1
        assert torch.equal(rows[~hidden], idx[:2][~hidden]) and not (idx[:2][hidden] == 0).any()
        assert hidden.float().mean().item() == pytest.approx(0.9 * rate, abs=0.03)
        for row in range(2):
            assert guessed[row].tolist() == [targets[row, t].item() if t < 1023 and hidden[row, t + 1] else -1 for t in range(1024)]


def test_masks_that_cannot_be(main, tmp_path):
    bpe = ['--masked=0.5', '--tokenizer=bpe', '--vocab_size=300', '--vocabulary_floor=0.5']
    for settings, said in ((['--masked=0.5'], 'tokenizer bytes has none'), (bpe, 'leave one away'), (['--masked=0.1', '--micro_batch_size=4', '--tokenizer=bpe', '--vocab_size=300'], '0 of the 4 rows')):
        with pytest.raises(UserError, match=said):
            main(*settings)
        assert not (tmp_path / 'run').exists()


# ---- what stands between the ideas

def test_the_closing_report_is_without_dropout(main, monkeypatch):
    modes = []
    stream = sample.stream
    monkeypatch.setattr(sample, 'stream', lambda model, *a, **k: modes.append(model.training) or stream(model, *a, **k))
    main('--dropout=0.5')
    assert modes == [False]


def test_another_objective_from_a_finished_run(main, tmp_path, classed):
    here = f'--data_dir={classed.parent}'
    main(here)
    main(here, '--init_from=run', '--out_dir=second', '--class_loss=0.5', '--predict_ahead=1', '--dropout=0.1')
    result = json.loads((tmp_path / 'second' / 'result.json').read_text())
    assert result['config']['classes'] == 7 and result['active_params'] == result['total_params'] - 64 * 64 - 7 * 64
    with pytest.raises(UserError, match='vocabulary_floor keeps rare ids out'):
        main(here, '--vocabulary_floor=0.5', '--smoothing=0.5', '--out_dir=third')
    with pytest.raises(UserError, match='is where this run goes'):
        main(here, '--teacher=third', '--out_dir=third')


def test_a_run_grown_from_another_goes_on(main, tmp_path, monkeypatch):
    main()
    args = ['--init_from=run', '--out_dir=second', '--n_embd=128', '--max_steps=6']
    main(*args)
    in_two_parts(main, monkeypatch, 3, *args)
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'second') and len(losses(tmp_path / 'second')) == 6
    with pytest.raises(UserError, match='no stack of 2'):
        main('--init_from=run', '--out_dir=third', '--n_layer=3', '--growth_depth=stack')


def test_every_idea_adds_what_it_needs_of_the_data(tmp_path):
    one, two = config(tmp_path, "prepare = '--scores'", 'a.py'), config(tmp_path, "prepare = '--classes 29'", 'b.py')
    assert train.read_settings([one, two, one]).prepare == '--scores --classes 29'
    assert train.read_settings([one, '--prepare=--dedup']).prepare == '--dedup' and not [*train.overruled([one, two])]


# ---- what a run keeps of itself; its page is in test_page.py

def test_a_run_keeps_what_it_warned_of(main, tmp_path, monkeypatch):
    broken_steps(monkeypatch, lambda n: 4 <= n < 4 + train.BAD_STEPS)
    in_two_parts(main, monkeypatch, 20, '--max_steps=12')
    kept = json.loads((tmp_path / 'parts' / 'result.json').read_text())['warnings']
    assert [line[:30] for line in kept if 'finite' in line] == ['warning: 5 steps in a row were'] and len({*kept}) == len(kept)


def test_a_page_that_finds_no_room_costs_no_run(main, tmp_path, monkeypatch):
    def full(*args, **data):
        raise UserError('no space left')
    monkeypatch.setattr(train, 'write_page', full)
    assert 'warning: no space left' in main() and (tmp_path / 'run' / 'result.json').exists()


# ---- evaluation sets

def test_evaluations_on_the_way_and_at_the_end(corpus, tmp_path):
    (tmp_path / 'sets').mkdir()
    rows = [dict(UID=f'u{i % 4}', sentence_good=f'Mia {i} lost the kite.', sentence_bad=f'Mia {i} lost the xqzw.') for i in range(80)]
    (tmp_path / 'sets' / 'small.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    args = [*corpus.args, '--max_steps=8', '--eval_interval=0.5', '--budget_counts=training',
            '--evals=all', f'--eval_data={tmp_path}/sets']
    code, out, err = script('train.py', *args, f'--out_dir={tmp_path}/with', cwd=tmp_path)
    assert code == 0, err
    evals = json.loads((tmp_path / 'with' / 'result.json').read_text())['evals']
    assert evals.keys() == {'small', 'text'} and evals['small']['items'] == 80 and len(evals['small']['per_kind']) == 4
    assert 'frequency_bias' in evals['small'] and 0 < evals['text']['items'] <= 130 and 'known_words' in evals['text']['held_out']
    assert len(json.loads((tmp_path / 'with' / 'result.json').read_text())['anisotropy']) == 2
    rows = [json.loads(line) for line in (tmp_path / 'with' / 'metrics.jsonl').read_text().splitlines()]
    row, last = [row for row in rows if 'evals' in row]
    assert last['step'] == 8 and last['evals'].keys() == evals.keys()
    assert row['evals']['small'].keys() == {'accuracy', 'error', 'chance', 'items'} and row['step'] == 5 and row['elapsed_s'] > 0
    assert 'small: ' in out and 'on 80 items, chance 0.5' in out
    code, _, err = script('train.py', *args[:-2], f'--out_dir={tmp_path}/without', cwd=tmp_path)
    both = [[row['train_loss'] for row in map(json.loads, (tmp_path / name / 'metrics.jsonl').read_text().splitlines())
             if 'train_loss' in row] for name in ('with', 'without')]
    assert code == 0 and both[0] == both[1] and len(both[0]) == 8                   # to be asked changes nothing
    for wrong, why in (('blimp', 'blimp is no evaluation'), ('python', 'holds no Python problems')):
        code, _, err = script('train.py', *args[:-2], f'--evals={wrong}', f'--out_dir={tmp_path}/no', cwd=tmp_path)
        assert code == 2 and why in err and not (tmp_path / 'no').exists()


def test_evaluation_sets_get_what_time_there_is():
    sets = {name: dict(ids=np.zeros(tokens), seam=np.zeros(n)) for name, n, tokens in (('a', 1000, 10_000), ('b', 4000, 120_000))}
    assert train.affordable(sets, math.inf, math.inf) == dict(a=1000, b=4000)
    half = train.affordable(sets, math.inf, 65_000)
    assert half == dict(a=500, b=2000) and train.tokens_of(sets, half) == 65_000
    assert train.affordable(sets, 1000, math.inf) == dict(a=1000, b=1000)
    assert train.affordable(sets, math.inf, 1) == dict(a=20, b=20)


# ---- energy and trackers

def test_joules_are_charged_and_added_up_over_parts(main, tmp_path, monkeypatch):
    class Told(sample.Energy):
        """10 J of the card pass with every reading."""

        def __init__(self, device, since, share):
            super().__init__(device, since, share)
            assert (device, since, share) == ('cpu', train.STARTED, 1)
            self.n, self.readers = 0, (self.count, lambda: 0.0, lambda: 0.0)

        def count(self):
            self.n += 10
            return float(self.n)

        def turn(self, to):
            turns.append(to)
            return super().turn(to)

    turns = []
    monkeypatch.setattr(sample, 'Energy', Told)
    main('--country=120', '--eval_interval=0.4', '--sample_tokens=0')
    # three probes as it warms up; a save after every step and after the last; an evaluation on the way, and the closing one
    save, evaluation = ['idle', 'train'], ['eval', 'train']
    # each with its evaluation sets and its sample, of which there are none here, and the closing one with texts to write too
    assert turns == [*['eval', 'idle'] * 3, 'train', *save * 3, *evaluation * 3, *save, 'idle', *['eval', 'idle'] * 4], turns
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['joules'] == 10 * (len(turns) + 1) and result['co2_g'] == pytest.approx(result['joules'] / 3.6e6 * 120)
    assert [result['energy'][k] for k in ('train', 'eval', 'idle')] == [10 * ['idle', *turns].count(k) for k in ('train', 'eval', 'idle')]
    assert result['energy']['gpu'] == result['joules'] and 'estimated' in result['energy']['how']['cpu']

    in_two_parts(main, monkeypatch, 2, '--sample_tokens=0')
    whole, saved = json.loads((tmp_path / 'parts' / 'result.json').read_text()), weights(tmp_path / 'parts')
    # the second part: probes, 'train', one save, the closing save, which holds it all until then, and 11 readings more
    assert np.sum(saved['joules']) > 2 * 10 * 8 and whole['joules'] == pytest.approx(np.sum(saved['joules']) + 110)


def test_countries_that_cannot_be():
    assert train.read_settings(['--country=120']).country == '120' and train.read_settings(['--country=PL']).country == 'PL'
    assert "country is 'Atlantis', it must be one of world, " in mistakes('--country=Atlantis')
    for text in ('-3', 'True', '1e999'):
        assert 'country' in mistakes(f'--country={text}')


class FakeTracker:
    """Stands for wandb and for mlflow: notes what it is told, or behaves as `how` says from the first call or the second on."""

    def __init__(self, name, how='', calm=0):
        self.__spec__, self.how, self.calm, self.told = importlib.machinery.ModuleSpec(name, None), how, calm, []

    def __getattr__(self, name):
        if name.startswith('_'):
            raise AttributeError(name)

        def call(*args, **options):
            if len(self.told) >= self.calm and self.how == 'raises':
                raise OSError('nobody\nanswers')
            if len(self.told) >= self.calm and self.how == 'hangs':
                threading.Event().wait()
            self.told.append((name, args, options))
            return self
        return call


@pytest.mark.parametrize('name', ['wandb', 'mlflow'])
def test_a_tracker_is_told_everything(main, tmp_path, monkeypatch, name):
    fake = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, fake)
    (tmp_path / 'run').mkdir()
    out = main(f'--tracker={name}', '--eval_interval=0.4', '--sample_prompt=Mia')
    assert 'warning' not in out
    told = [(args, options) for what, args, options in fake.told if what == dict(wandb='log', mlflow='log_metrics')[name]]
    steps = [options['step'] for _, options in told]
    assert steps == sorted(steps) and set(steps) == {1, 2, 3}
    for row in rows(tmp_path / 'run'):
        numbers = {k: v for k, v in row.items() if k != 'step' and isinstance(v, (int, float))}
        assert ((numbers,), dict(step=row['step'])) in told
    text = str(fake.told)
    assert json.loads((tmp_path / 'run' / 'result.json').read_text())['sample'][:5] in text and 'tales' in text
    kinds = [what for what, _, _ in fake.told]
    if name == 'wandb':
        assert kinds[-1] == 'finish' and ('add_file', ('run/ckpt.pt',), {}) in fake.told and kinds.count('log_artifact') == 1
    else:
        assert kinds[-1] == 'end_run' and ('log_artifact', ('run/ckpt.pt',), {}) in fake.told


@pytest.mark.parametrize('how, calm', [('raises', 5), ('hangs', 0), ('hangs', 5)])
def test_a_tracker_that_is_away_costs_a_warning(main, tmp_path, monkeypatch, how, calm):
    monkeypatch.setitem(sys.modules, 'wandb', FakeTracker('wandb', how, calm))
    monkeypatch.setattr(train.Tracker, 'WAIT', 0.3)
    began = time.monotonic()
    out = main('--tracker=wandb')
    assert time.monotonic() - began < 20 and out.count('warning: wandb') == 1
    assert dict(raises='follows no longer (nobody)', hangs='too slow')[how] in out
    assert len(losses(tmp_path / 'run')) == 3 and json.loads((tmp_path / 'run' / 'result.json').read_text())['steps'] == 3
    began = time.monotonic()
    assert not train.Tracker.made[-1].finish() and time.monotonic() - began < 0.1      # asked once is enough


def test_a_queue_that_is_full_leaves_rows_out(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mlflow', FakeTracker('mlflow', 'hangs'))
    monkeypatch.setattr(train.Tracker, 'WAIT', 0.1)
    said = []
    tracker = train.Tracker(train.read_settings(['--tracker=mlflow']), said.append)
    began = time.monotonic()
    for step in range(1500):
        tracker.put(dict(step=step))
    assert not tracker.finish() and time.monotonic() - began < 3
    assert 'lacks 500 rows, and 1,000 that wait' in said[0]


def test_a_tracker_cannot_hold_the_prompt_back(corpus, tmp_path, monkeypatch):
    (tmp_path / 'wandb.py').write_text('import atexit, time\natexit.register(time.sleep, 300)\nSettings = dict\n'
                                       'def init(**options): raise OSError("away")\n')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    code, out, err = script('train.py', *corpus.args, '--max_steps=1', '--out_dir=run', '--tracker=wandb', cwd=tmp_path, timeout=60)
    assert code == 0 and 'warning: wandb follows no longer (away)' in out and (tmp_path / 'run' / 'result.json').exists(), err


def test_a_tracker_that_is_not_installed(main, tmp_path, monkeypatch):
    monkeypatch.setattr(train.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='pip install mlflow'):
        main('--tracker=mlflow')
    assert not (tmp_path / 'run').exists() and 'tensorboard, wandb' in mistakes('--tracker=wandbb')


def test_curves_in_tensorboard(main, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert 'warning' not in main('--tracker=tensorboard')
    events = EventAccumulator(str(tmp_path / 'run' / 'tensorboard'))
    events.Reload()
    assert [e.value for e in events.Scalars('train_loss')] == pytest.approx(losses(tmp_path / 'run'))
    assert 'val_bpb' in events.Tags()['scalars'] and 'sample/text_summary' in events.Tags()['tensors']


# ---- learning dynamics

def test_dynamics_change_nothing_of_a_run(main, tmp_path, monkeypatch):
    args = ['--max_steps=8', '--dropout=0.2', '--growth=[(0.5, dict(n_layer=3))]']
    plain = main(*args)
    look = sample.Probe.look

    def with_nan(probe, model):
        seen = look(probe, model)
        if 0 < len(probe.state['rows']) < 3:
            seen['1.attn.v'][0][0][5, 3] = math.nan
        return seen
    monkeypatch.setattr(sample.Probe, 'look', with_nan)
    probed = main(*args, '--dynamics=True', '--out_dir=probed')
    ours, theirs = weights(tmp_path / 'run'), weights(tmp_path / 'probed')
    assert losses(tmp_path / 'run') == losses(tmp_path / 'probed') and len(losses(tmp_path / 'run')) == 8
    assert all(torch.equal(ours['model'][k], theirs['model'][k]) for k in ours['model'])
    results = [json.loads((tmp_path / name / 'result.json').read_text()) for name in ('run', 'probed')]
    assert results[0]['val_bpb'] == results[1]['val_bpb'] and results[0]['sample'] == results[1]['sample']
    assert 'dynamics' not in plain + ''.join(k for k in results[0]) and not (tmp_path / 'run' / 'dynamics.json').exists()
    share = results[1]['dynamics_seconds'] / results[1]['total_seconds']
    assert results[1]['dynamics_share'] == pytest.approx(share) and 0 < share < 1 and '\ndynamics_share: ' in probed
    found = json.loads((tmp_path / 'probed' / 'dynamics.json').read_text())
    assert found['steps'] == [*range(9)] and found['progress'] == [i / 8 for i in range(9)] and len(found['names']) == 3 * (3 + 2)
    assert 'warning: step 1 was probed, not finite: 1.attn.v activation\n' in probed and 'step 3 was probed' not in probed
    v = found['names'].index('1.attn.v')
    assert [row[v] is None for row in found['measures']['cka_final']] == [False, True, True] + [False] * 6
    assert found['measures']['cka_final'][8] == [1] * 15 and None in found['measures']['cka_final'][4]      # the third layer
    assert all(0 < row[v] < 1 for row in found['measures']['weight_effective_rank'])


def test_a_probed_run_resumes(main, tmp_path, monkeypatch):
    args = ['--max_steps=12', '--dynamics=True']
    main(*args)
    in_two_parts(main, monkeypatch, 9, *args)
    first, again = ((tmp_path / name / 'dynamics.json').read_text() for name in ('run', 'parts'))
    assert first == again and len(json.loads(first)['steps']) == 12
    assert len(weights(tmp_path / 'parts')['dynamics']['rows']) == 11              # the last probe comes after saving


def test_samples_along_training(finished):
    """At every evaluation on the way, by the same dice; their text is no row of steps or of validation."""
    said = [row for row in rows(finished[0]) if 'sample' in row]
    assert [row['step'] for row in said] in ([10], [11]) and 0.4 < said[0]['progress'] < 0.6 and said[0]['elapsed_s'] > 0
    assert said[0].keys() == {'step', 'progress', 'elapsed_s', 'sample'} and isinstance(said[0]['sample'], str) and said[0]['sample']


# ---- experts: of domains, and routed

def domain_stream(n_docs=120):
    """Documents of four sources in turn, in domains of one, of two and of one source; every token is another number."""
    tokens, docs, lengths = toy(n_docs)
    docs['source'] = np.arange(n_docs) % 4
    mine = [[1.0, 0, 0, 0], [0, 1.0, 0.5, 0], [0, 0, 0, 1.0]]
    streams = {d: train.Stream(tokens, docs, 3, w) for d, w in enumerate(mine)}
    return train.DomainStream(streams), np.repeat(docs['source'], lengths), lengths


def test_a_micro_batch_is_of_one_domain_and_each_has_its_share():
    stream, source_of, lengths = domain_stream()
    sizes = np.diff(stream.epoch(0)[1], prepend=0)
    assert sizes.sum() == pytest.approx(lengths[0::4].sum() + lengths[1::4].sum() + lengths[2::4].sum() / 2 + lengths[3::4].sum(), rel=0.1)
    turns, read = [], {0: [], 1: [], 2: []}
    for number in range(5000):                                          # more than a cycle of turns
        domain, = stream.domain(number)
        turns.append(domain.item())
        if number < 90:
            batch = stream.rows(number * 2, 2, 6)
            assert set(source_of[batch.flatten()]) <= {0: {0}, 1: {1, 2}, 2: {3}}[turns[-1]]
            read[turns[-1]].append(batch)
    for domain, batches in read.items():                                # its stream, nothing lost in between
        assert np.array_equal(np.concatenate(batches), stream.streams[domain].rows(0, 2 * len(batches), 6))
    share = np.bincount(turns) / 5000
    assert share == pytest.approx(sizes / sizes.sum(), abs=2e-3)
    assert all({0, 1, 2} == set(turns[i:i + 6]) for i in range(0, 4996, 6))              # each in every step of six
    again = domain_stream()[0]
    for n in (4095, 4096, 4999):
        before = turns[:n].count(turns[n])
        assert np.array_equal(stream.rows(n * 2, 2, 6), stream.streams[turns[n]].rows(before * 2, 2, 6))
    assert all(np.array_equal(again.rows(n * 2, 2, 6), stream.rows(n * 2, 2, 6)) for n in (4999, 4095, 4096, 7))


def test_two_ranks_share_out_the_turns():
    def made(rank, world):
        batches = train.Prefetcher(domain_stream()[0], 2, 12, 2, 5, rank, world, 'cpu')
        out = batches.next(2)[0]
        batches.close()
        return out
    one, two, source_of = made(0, 1), [made(rank, 2) for rank in (0, 1)], domain_stream()[1]
    both = [batch for pair in zip(*two) for batch in pair]
    assert len(one) == 6 and len({batch[2].item() for batch in one}) == 3
    for a, b in zip(one, both, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and a[2].ndim == 0
        assert set(source_of[a[0].flatten()]) <= {0: {0}, 1: {1, 2}, 2: {3}}[a[2].item()]


def test_muon_leaves_parts_that_met_no_token():
    torch.manual_seed(0)
    start_at = [torch.randn(3, 16, 48), torch.randn(3, 16, 48)]
    grads = [[torch.randn(3, 16, 48), torch.randn(3, 16, 48)] for _ in range(3)]
    for step in grads:
        step[0][2] = 0
    grads[1][1][0] = 0
    p = [torch.nn.Parameter(x.clone()) for x in start_at]
    optimizer = muon_step(p, grads)
    assert torch.equal(p[0][2], start_at[0][2]) and not optimizer.each()[p[0]]['momentum'][2].any()
    for i, part in ((0, 0), (0, 1), (1, 1)):                            # the others as if they stood alone
        alone = torch.nn.Parameter(start_at[i][part].clone())
        muon_step([alone], [[step[i][part]] for step in grads])
        torch.testing.assert_close(p[i].data[part], alone.data, rtol=1e-4, atol=1e-6)
    alone = torch.nn.Parameter(start_at[1][0].clone())                  # and one that met some only twice, as in two steps
    muon_step([alone], [[grads[0][1][0]], [grads[2][1][0]]])
    torch.testing.assert_close(p[1].data[0], alone.data, rtol=1e-4, atol=1e-6)


def test_averages_follow_a_split():
    """One domain is the dense model in two parts: AdamW, which goes number by number, learns on as it did."""
    s = train.read_settings(['--optimizer=adamw', '--grad_clip=0', '--weight_decay=0.5'])
    model, optimizers = small_model(s, mlp='swiglu', mlp_hidden=40)
    trained(model, s, optimizers, 5)
    config = train.split(model.config, ['all'])
    parted, carried = train.grown(model, optimizers, config, s, 1)
    expected = trained(model, s, optimizers, 6, seed=6)
    assert trained(parted, s, carried, 6, seed=6) == pytest.approx(expected, rel=1e-9)


def test_a_router_that_prefers_one_expert_is_balanced():
    def uneven(balance_lr):
        s = train.read_settings([f'--balance_lr={balance_lr}'])
        model, _ = small_model(s, experts=8, experts_top=2)
        layer, x = model.blocks[0].mlp, torch.randn(2, 100, 32, dtype=torch.float64)
        with torch.no_grad():
            layer.router.weight[0] = 0.5 * layer.router.weight.norm(dim=1).mean() * torch.ones(32)
            x += 0.5                                                    # all tokens look its way
        optimizer = train.make_optimizers(model, s, torch.float64)[-1]
        train.set_rates([optimizer], 0.3, s)
        for _ in range(100):
            model.zero_grad()
            layer(x).sum().backward()
            deviation = layer.bias.grad / 1e-6
            layer.router.weight.grad = None
            optimizer.step()
        return deviation.abs().max().item()
    assert uneven(0.0) > 0.1 and uneven(0.01) < 0.03


BY_DOMAIN = ['--domains=sources', '--domains_from=0.5', '--max_steps=8', '--tokens_per_step=512', '--micro_batch_size=4']


def test_a_run_splits_into_domains_and_resumes_over_the_split(main, tmp_path, monkeypatch, capfd, corpus):
    out = main(*BY_DOMAIN)
    assert 'domains: notes 37.' in out and 'grown to 2 layers' in out and '64 of them in each of 2 domains' in out
    in_two_parts(main, monkeypatch, 3, *BY_DOMAIN)                      # it is asked twice a step
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'run') and len(losses(tmp_path / 'run')) == 8
    ours, theirs = (weights(tmp_path / name)['model'] for name in ('run', 'parts'))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    part = ours['blocks.0.mlp.own_up.weight']
    assert part.shape == (2, 64, 64) and not torch.allclose(part[0], part[1])
    model, tokenizer = sample.load(tmp_path / 'run')
    data, result = corpus.open(), json.loads((tmp_path / 'run' / 'result.json').read_text())
    nats = np.zeros(2)
    for domain, name in enumerate(data.meta['sources']):                # told, and mixed, document by document
        docs, ends = data.docs['val'], np.append(data.docs['val']['start'][1:], len(data.tokens['val']))
        mine = [(doc, data.tokens['val'][docs['start'][doc]:ends[doc]]) for doc in np.flatnonzero(docs['source'] == domain)]
        each = [sample.document_nats(model, mine, domain=torch.tensor(d)) for d in range(2)]
        nats += [sum(math.log(2) - np.logaddexp(-each[0][doc], -each[1][doc]) for doc, _ in mine), sum(each[domain].values())]
    bpb = nats / math.log(2) / data.docs['val']['bytes'].sum()
    assert [result['val_bpb'], result['val_bpb_told']] == pytest.approx(bpb.tolist(), rel=1e-6) and bpb[0] != bpb[1]
    sample.main([str(tmp_path / 'run'), 'Mia', '--domain=tales', '--max_new_tokens=4', '--device=cpu'])
    assert capfd.readouterr().out.startswith('Mia')
    with pytest.raises(UserError, match="--domain is 'stories', .* has notes, tales"):
        sample.main([str(tmp_path / 'run'), '--domain=stories', '--device=cpu'])


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_what_is_frozen_stays_to_the_bit(optimizer):
    s = train.read_settings([f'--optimizer={optimizer}', '--init_from=run', '--domains=a,b', '--frozen=a'])
    model, optimizers = small_model(s, domains='a,b', mlp='swiglu')
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        idx = torch.randint(1, 50, (4, 17))
        train.train_step(model, model, optimizers, [(idx[:, :-1], idx[:, 1:], torch.tensor(1))] * 2, 0.3, s)
    for name, p in model.named_parameters():
        own = '.own_' in name
        assert torch.equal(p[0] if own else p, before[name][0] if own else before[name]) and not (own and torch.equal(p[1], before[name][1]))


def test_a_domain_is_added_to_a_frozen_model_and_taken_away(main, tmp_path, monkeypatch):
    main('--domains=tales', '--domains_from=0')
    added = ['--init_from=run', '--domains=notes,tales', '--frozen=tales', '--max_steps=6', '--tokens_per_step=1024']
    out = main(*added, '--out_dir=added')
    assert 'domains: notes 100.0% of what is read' in out
    old, new = (weights(tmp_path / name)['model'] for name in ('run', 'added'))
    for name in new:
        if '.own_' in name:
            assert torch.equal(new[name][1], old[name][0]) and not torch.equal(new[name][0], old[name][0])
        else:
            assert torch.equal(new[name], old[name])
    assert losses(tmp_path / 'added')[0] < 5 and losses(tmp_path / 'added')[-1] < losses(tmp_path / 'added')[0]
    in_two_parts(main, monkeypatch, 5, *added)
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'added')
    main('--init_from=added', '--domains=tales', '--learning_rate=0', '--max_steps=1', '--out_dir=left')
    left, result = weights(tmp_path / 'left'), json.loads((tmp_path / 'left' / 'result.json').read_text())
    assert torch.equal(left['model']['blocks.1.mlp.own_down.weight'], old['blocks.1.mlp.own_down.weight'])
    assert result['config']['domains'] == 'tales' and result['settings']['domains_from'] == 0
    for settings, said in (([], 'has the domains notes,tales: name those'), (['--domains=notes,tales', '--frozen=other,notes'], "frozen names 'other'"),
                           (['--domains=notes', '--frozen=notes'], 'leaves no domain to learn'), (['--domains=notes', '--n_embd=128'], 'n_embd cannot grow')):
        with pytest.raises(UserError, match=said):
            main('--init_from=added', '--out_dir=third', *settings)
        assert not (tmp_path / 'third').exists()


def test_a_new_domain_branches_from_the_part_that_knows_its_text_best():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32, domains='a,b,c'))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.ndim > 1 else p.fill_(0.7)
    tokens, docs, _ = toy(30)
    docs['source'] = np.arange(30) % 2
    data = SimpleNamespace(tokens=dict(train=tokens % 50), docs=dict(train=docs), meta=dict(sources=['x', 'y']))
    config = train.split(model.config, ['c', 'y', 'a'])
    ends = np.append(docs['start'][1:], len(tokens))
    texts = [(i, tokens[docs['start'][i]:ends[i]] % 50) for i in range(1, 30, 2)]
    nats = [sum(sample.document_nats(model, texts, domain=torch.tensor(d)).values()) for d in range(3)]
    assert train.nearest_parts(model, config, data) == [2, int(np.argmin(nats)), 0]


@pytest.mark.parametrize('settings, said', [
    (['--domains=stories'], "domains names 'stories', the sources of .* are notes, tales"), (['--domains=notes,tales+'], "domains names ''"),
    (['--domains=notes,tales+notes'], 'twice'), (['--domains=sources', '--curriculum=bigram'], 'leave one away'), (['--frozen=notes'], 'needs an --init_from'),
    (['--domains=sources', '--weights=notes:0'], "nothing of domain 'notes'"), (['--domains=sources', '--mlp_tokens=8'], 'choose one'),
    (['--domains=sources', '--domains_from=0', '--experts=4'], 'choose one'), (['--domains=sources', '--domain_share=0.001'], 'domain_share'),
    (['--domains=sources', '--growth=[(0.7, dict(n_embd=128))]'], 'grows until 0.7'),
    (['--domains=sources', '--domains_from=0', '--growth=[(0.7, dict(n_embd=128))]'], 'n_embd cannot grow'), (['--experts=2'], 'experts_top is 3'),
    (['--growth=[(0.5, dict(domains="a,b"))]'], 'settings domains and domains_from')])
def test_domains_and_experts_that_cannot_be(main, tmp_path, settings, said):
    with pytest.raises(UserError, match=said) as e:
        main(*settings)
    assert not (tmp_path / 'run').exists() and '\n' not in str(e.value)


def test_domains_keep_one_order_of_documents_if_told_to(corpus):
    for more, same in (([], False), (['--reshuffle=False'], True)):
        streams = train.make_stream(train.read_settings([*corpus.args, '--domains=sources', *more]), corpus.open()).streams
        assert all(np.array_equal(stream.epoch(0)[0], stream.epoch(1)[0]) == same for stream in streams.values())


def test_a_run_with_experts_resumes(main, tmp_path, monkeypatch, corpus):
    settings = ['--experts=4', '--experts_top=2', '--expert_hidden=32', '--max_steps=6', '--layer_drop=0.2']
    main(*settings)
    in_two_parts(main, monkeypatch, 3, *settings)
    ours, theirs = (weights(tmp_path / name)['model'] for name in ('run', 'parts'))
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'run') and all(torch.equal(ours[k], theirs[k]) for k in ours)
    s = train.read_settings(settings)
    steps = sum(train.schedule(step / 6, s) for step in range(6)) * 0.01
    assert 0 < ours['blocks.1.mlp.bias'].abs().max() <= steps * 1.001
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['total_params'] - result['active_params'] == 2 * 2 * 2 * 64 * 32


# ---- every method

METHODS = sorted(path.stem for path in (ROOT / 'config').glob('*.py') if path.stem not in ('cpu', 'dynamics')
                 and 'dataset' not in {key for _, key, _ in train.assignments([str(path)])})


@pytest.fixture(scope='session')
def method(corpus, tmp_path_factory):
    """What train.py gets for a method by name: its config on a tiny one, on text with scores and word classes."""
    folder = tmp_path_factory.mktemp('methods')
    tiny = [arg[2:].partition('=') for arg in TINY if not arg.startswith('--tokenizer')]
    (folder / 'tiny.py').write_text('\n'.join(f"{k} = {v if v.isdigit() else repr(v)}" for k, _, v in tiny))
    prepare_data.build(f'files:{corpus.source}', vocab_size=300, data_dir=folder / 'data', scores=True, classes=3, min_doc_bytes=0,
                       quiet=True)
    given = [str(folder / 'tiny.py'), f'--dataset=files:{corpus.source}', f'--data_dir={folder}/data', '--vocab_size=300',
             '--budget_minutes=10000', '--save_minutes=0', '--eval_interval=0']
    train.main([*given, '--max_steps=2', f'--out_dir={folder}/teacher'])
    more = dict(distillation=[f'--teacher={folder}/teacher'])
    return lambda name: [*given, str(ROOT / 'config' / f'{name}.py'), *more.get(name, [])]


@pytest.mark.parametrize('name', METHODS)
def test_a_method_trains_resumes_across_its_stages_and_samples(name, method, tmp_path, monkeypatch, handlers):
    args, step_of = [*method(name), '--max_steps=24'], train.train_step
    train.main([*args, f'--out_dir={tmp_path}/whole'])
    stops = [0, 7, 15]                                       # before a growth at a third, and after a split at 60 %
    for first, last in zip(stops, stops[1:]):
        left = iter(range(last - first))
        monkeypatch.setattr(train, 'train_step', lambda *a: step_of(*a[:-1], lambda: next(left, None) is None))
        with pytest.raises(train.Stopped):
            train.main([*args, f'--out_dir={tmp_path}/parts', *['--init_from=resume'] * (first > 0)])
    monkeypatch.setattr(train, 'train_step', step_of)
    train.main([*args, f'--out_dir={tmp_path}/parts', '--init_from=resume'])
    whole = losses(tmp_path / 'whole')
    assert losses(tmp_path / 'parts') == whole and len(whole) == 24 and whole[-1] < whole[0] - 0.5
    model, tokenizer = sample.load(tmp_path / 'parts')
    text = ''.join(sample.stream(model, tokenizer, 'Mia', 12, generator=torch.Generator().manual_seed(1)))
    assert text and sample.load(tmp_path / 'whole')[0].config == model.config
    if name in ('hypercloning', 'raise', 'tokenformer_grow', 'domains'):
        assert weights(tmp_path / 'parts')['grown'] == (2 if name == 'raise' else 1)
    if name in ('climb_data', 'raise'):
        assert len(set(weights(tmp_path / 'parts')['shares'])) > 2


@pytest.mark.slow
@pytest.mark.parametrize('name', ['climb_objective', 'distillation', 'domains', 'dropout', 'experts', 'latent_attention', 'masked',
                                  'multi_token', 'syntactic_smoothing', 'tokenformer_grow'])
def test_a_method_compiled_learns_as_it_does_not_compiled(name, method, tmp_path, handlers):
    torch._dynamo.reset()                                     # of the method before: a run is a process of its own
    for compile in ('off', 'on'):
        train.main([*method(name), '--max_steps=5', f'--compile={compile}', f'--out_dir={tmp_path}/{compile}'])
    tolerance = 0.3 if name == 'dropout' else 1e-3            # other random numbers
    assert losses(tmp_path / 'on') == pytest.approx(losses(tmp_path / 'off'), rel=tolerance)

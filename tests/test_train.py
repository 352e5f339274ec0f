"""train.py: settings, data order, optimizer, clock, and whole runs as a user makes them."""
import errno
import fcntl
import io
import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import config as loader
import prepare_data
import sample
import train
from conftest import ROOT, STEPS, finish, in_two_parts, script, start
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


def snapshot(folder):
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(folder).iterdir()}


# ---- settings

def config(tmp_path, text, name='mine.py'):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def settings(*argv):
    return train.read_settings(list(argv))[0]


def mistakes(*argv):
    with pytest.raises(UserError) as e:
        train.read_settings(list(argv))
    return str(e.value)


def test_all_mistakes_at_once_with_exit_code_2(tmp_path):
    config(tmp_path, '"""doc"""\nn_layers = 3\nn_embd = 1.5\n\nUPPER = 3\nlearning_rate = "high"\n')
    code, out, err = script('train.py', 'mine.py', '--sed=3', '--optimizer=adamm', '--tokens_per_step=0', cwd=tmp_path)
    assert code == 2 and 'Traceback' not in err and not out
    for expected in ('mine.py:2: .*n_layers.* n_layer', 'mine.py:3: n_embd is 1.5, .*int', 'mine.py:6: learning_rate .*float', '--sed=3: .* seed', 'adamm.*muon, adamw', 'tokens_per_step is 0'):
        assert re.search(expected, err), expected
    assert [p.name for p in tmp_path.iterdir()] == ['mine.py']


def test_stacking_and_overrides(tmp_path):
    a = config(tmp_path, '"""what"""\nn_layer = 2 * 3\nseed = 7\nlearning_rate = 1\nbudget_minutes = 1 / 4\n', 'a.py')
    b = config(tmp_path, 'seed = -(-9)  # why\nsample_prompt = "Mia"\n', 'b.py')
    s, _ = train.read_settings([a, b])
    assert (s.n_layer, s.seed, s.learning_rate, s.budget_minutes, s.sample_prompt) == (6, 9, 1.0, 0.25, 'Mia')
    assert type(s.learning_rate) is float and s.out_dir == 'out/a+b' and s.n_embd == GPTConfig.n_embd
    assert settings(b, a).seed == 7
    s = settings(a, '--seed=2**3', '--dataset=files:a b/c', '--out_dir=x', '--doc_mask=False', '--learning_rate=3')
    assert (s.seed, s.dataset, s.out_dir, s.doc_mask, s.learning_rate) == (8, 'files:a b/c', 'x', False, 3.0)
    assert settings().out_dir == 'out/default' and settings('--overwrite').overwrite is True


def test_words_for_other_mistakes(tmp_path):
    assert 'no_such.py' in mistakes('no_such.py')
    assert '--seed=value' in mistakes('--seed')
    assert "'0.1x'" in mistakes('--learning_rate=0.1x')
    assert 'mine.py' in mistakes(config(tmp_path, b'\xff\xfe'.decode('latin1') + '\0'))


def test_the_readme_names_what_exists():
    text = (ROOT / 'README.md').read_text()
    configs, scripts = set(re.findall(r'config/\w+\.py', text)), set(re.findall(r'(?:python|torchrun\b.*?) (\w+\.py)', text))
    assert {'config/quickstart.py', 'config/babylm.py'} <= configs and 'train.py' in scripts
    assert 'this_machine' in loader.verb('bench', 'first').__doc__              # which makes that one
    for path in configs - {'config/this_machine.py'} | {str(p.relative_to(ROOT)) for p in (ROOT / 'config').glob('[!_]*.py')}:
        s, _ = train.read_settings([str(ROOT / path)])
        assert s.tokens_per_step % s.block_size == 0, path
    assert all((ROOT / name).exists() for name in scripts)


# ---- data

def toy(n_docs=7, seed=0):
    """Documents of 3 to 20 tokens; every token is another number."""
    lengths = np.random.default_rng(seed).integers(3, 20, n_docs)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    docs = np.zeros(n_docs, prepare_data.DOC)
    docs['start'] = starts
    return np.arange(lengths.sum(), dtype=np.uint16), docs, lengths


def stream_of(tokens, docs, seed, weights=None):
    meta = dict(sources=['x'], splits=dict(train=dict(sources=dict(x=dict(documents=9)))))
    data = SimpleNamespace(tokens=dict(train=tokens), docs=dict(train=docs), meta=meta)
    return train.Stream(data, SimpleNamespace(seed=seed, weights=''), weights)


def test_every_token_once_an_epoch_in_an_order_of_seed_and_epoch():
    tokens, docs, lengths = toy(50)
    n = len(tokens)
    stream = stream_of(tokens, docs, 3)
    epochs = [stream.read(e * n, n) for e in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(n)) and epoch.dtype == np.int64
        first = [np.flatnonzero(epoch == start)[0] for start in docs['start']]       # documents stay whole
        assert all((np.diff(epoch[a:a + k]) == 1).all() for a, k in zip(first, lengths))
    assert len({epoch.tobytes() for epoch in epochs}) == 3
    assert np.array_equal(stream_of(tokens, docs, 3).read(2 * n, n), epochs[2])    # asked for alone
    assert not np.array_equal(stream_of(tokens, docs, 4).read(0, n), epochs[0])


def test_read_is_the_slow_concatenation():
    tokens, docs, lengths = toy()
    stream, slow = stream_of(tokens, docs, 5), []
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
    stream = stream_of(np.arange(12000), docs, 3)
    rows = stream.rows(0, 1200, 10)
    assert rows.shape == (1200, 11) and np.array_equal(np.sort(rows[:, 0]), np.arange(0, 12000, 10))
    within = rows[:, 0] % 400 < 390
    assert (np.diff(rows[within]) == 1).all() and (np.diff(rows[:, :10]) == 1).all()
    documents = [len(set(rows[at:at + 20, 0] // 400)) for at in range(0, 1200, 20)]
    assert min(documents) >= 8 and np.mean(documents) == pytest.approx(30 * (1 - (29 / 30) ** 20), abs=1)
    assert np.array_equal(stream.first_rows(7, 10), rows[:7, :10])
    assert (stream_of(np.arange(12000), docs, 4).rows(0, 1200, 10) != rows).any(axis=1).mean() > 0.9


@pytest.mark.parametrize('weights', [None, [2.2, 0.4]])
def test_rows_of_every_epoch_begin_where_it_does(weights):
    """Where neither a row nor a step divides an epoch."""
    tokens, docs, _ = toy(97)
    docs['source'] = np.arange(97) % 2
    stream, at, row, orders = stream_of(tokens, docs, 3, weights), 0, 0, []
    for epoch in range(4):
        n = int(stream.epoch(epoch)[1][-1])
        assert n % 7
        whole, rows = stream.read(at, n // 7 * 7 + 1), stream.rows(row, n // 7, 7)
        wanted = [tuple(whole[i:i + 8]) for i in range(0, n // 7 * 7, 7)]
        assert sorted(map(tuple, rows)) == sorted(wanted) and list(map(tuple, rows)) != wanted
        orders.append(rows)
        at, row = at + n, row + n // 7
    again = stream_of(tokens, docs, 3, weights)                      # from anywhere, over an epoch's end
    assert np.array_equal(again.rows(len(orders[0]) - 3, 5, 7), np.concatenate([orders[0][-3:], orders[1][:2]]))
    tiny = stream_of(tokens[:5], docs[:1], 3).rows(0, 4, 7)          # an epoch shorter than a row
    assert tiny.shape == (4, 8) and set(tiny.flatten()) == set(range(5))


def test_weights_say_how_often_an_epoch_reads_a_source():
    tokens, docs, lengths = toy(100)
    docs['source'] = np.arange(100) % 4                                # 25 documents each
    stream = stream_of(tokens, docs, 3, [2.2, 0.4, 0.0, 1.0])
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
    again = stream_of(tokens, docs, 3, [2.2, 0.4, 0.0, 1.0])
    assert np.array_equal(again.read(at - 500, 900), stream.read(at - 500, 900))
    assert len(stream_of(tokens, docs, 3, [0, 0.01, 0, 0]).read(0, 100)) == 100


@pytest.mark.parametrize('text, match', [('childes:2', 'notes, tales'), ('tales', 'tales:2'), ('tales:-1', "'-1'"),
                                         ('tales:0,notes:0', 'nothing to train on'), ('tales:nan', 'nan')])
def test_weights_that_cannot_be(corpus, main, text, match):
    with pytest.raises(UserError, match=match):
        main(f'--weights={text}', '--max_steps=1')


def test_weights_change_what_is_read(corpus):
    data = corpus.open()
    stream = train.Stream(data, settings(*corpus.args, '--weights=tales:0, notes:1.5'))
    assert stream.weights == [1.5, 0.0]
    notes = data.docs['train']['source'] == data.meta['sources'].index('notes')
    ends = np.append(data.docs['train']['start'][1:], len(data.tokens['train']))
    mean = (ends - data.docs['train']['start'])[notes].sum() * 1.5
    assert stream.epoch_tokens() == pytest.approx(mean, rel=0.05)
    assert train.Stream(data, settings(*corpus.args)).weights is None


def prefetched(rank, world, micro, count, row=0, T=5):
    tokens, docs, _ = toy(60)
    batches = train.Prefetcher(stream_of(tokens, docs, 1), row, micro, T, rank, world, 'cpu', 3)
    made = [batches.next()[0] for _ in range(count)]
    batches.close()
    assert not batches.thread.is_alive()
    return made


def test_batches_are_a_function_of_seed_row_and_rank():
    one = prefetched(0, 1, 2, 24)
    assert all(batch['idx'].shape == batch['targets'].shape == (2, 5) for batch in one)
    two = [prefetched(rank, 2, 2, 12) for rank in (0, 1)]
    for a, b in zip(one, [batch for pair in zip(*two) for batch in pair], strict=True):
        assert torch.equal(a['idx'], b['idx']) and torch.equal(a['targets'], b['targets'])
    for a, b in zip(one[16:], prefetched(0, 1, 2, 8, row=32), strict=True):
        assert torch.equal(a['idx'], b['idx'])
    tokens, docs, _ = toy(60)
    rows = stream_of(tokens, docs, 1).rows(0, 48, 5)       # nothing is lost between micro-batches
    assert np.array_equal(torch.cat([batch['idx'] for batch in one]), rows[:, :-1])
    assert np.array_equal(torch.cat([batch['targets'] for batch in one]), rows[:, 1:])


def test_an_error_of_the_prefetcher_reaches_the_step():
    class Broken:
        def batch(self, first, B, T):
            raise OSError('the disk went away')
    batches = train.Prefetcher(Broken(), 0, 2, 5, 0, 1, 'cpu', 3)
    with pytest.raises(OSError, match='went away'):
        batches.next()
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


def run_of(*argv):
    """A Run of these settings that nothing was opened for."""
    run = train.Run(*train.read_settings(['--device=cpu', *argv]))
    run.dtype = torch.float32
    return run


@pytest.mark.parametrize('options', [dict(), dict(tie_embeddings=True), dict(n_kv_head=1, mlp='swiglu'),
                                     dict(vocab_size=128), dict(vocab_size=32), dict(vocab_size=16, n_kv_head=1)])
@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_every_parameter_has_one_optimizer(options, optimizer):
    """Also where the vocabulary is as large as a hidden layer (128), the model's width (32) or its keys (16)."""
    model = GPT(GPTConfig(**dict(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32) | options))
    optimizers = run_of(f'--optimizer={optimizer}').make_optimizers(model)
    held = [id(p) for o in optimizers for g in o.param_groups for p in g['params']]
    missing = [name for name, p in model.named_parameters() if id(p) not in held]
    assert not missing and len(held) == len(set(held)) == len(list(model.parameters()))
    muon = {id(p) for o in optimizers if isinstance(o, train.Muon) for g in o.param_groups for p in g['params']}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} | {id(model.lm_head.weight)}
    assert not muon & tables
    assert len(muon) == (0 if optimizer == 'adamw' else 12)


def test_schedule():
    run = run_of('--warmup_frac=0.1', '--cooldown_frac=0.5', '--final_lr_frac=0.2')
    assert [run.rate(p) for p in (0, 0.05, 0.1, 0.3, 0.5, 0.75, 1)] == pytest.approx([0.1, 0.55, 1, 1, 1, 0.6, 0.2])
    bare = run_of('--warmup_frac=0', '--cooldown_frac=0')
    assert bare.rate(0) == bare.rate(1) == 1
    assert [run.decay(p) for p in (0, 0.25, 1)] == [1, 0.75, 0]


def test_rates_and_decay_follow_progress():
    run = run_of('--warmup_frac=0', '--weight_decay=0.2')
    run.take_model(GPT(GPTConfig(vocab_size=50, n_layer=1, n_head=2, n_embd=512, block_size=8)))
    idx = torch.zeros(1, 8, dtype=torch.long)
    run.model(idx, idx).backward()
    run.progress = 0.7
    loss, norm, rate = run.descend(torch.tensor(1.0))
    assert loss == 1 and norm > 0 and rate == pytest.approx(0.5)
    group = run.optimizers[0].param_groups[0]
    assert (group['lr'], group['weight_decay']) == pytest.approx((0.5 * run.s.learning_rate, 0.3 * 0.2))
    head = next(g for g in run.optimizers[1].param_groups if g['params'][0] is run.model.lm_head.weight)
    assert (head['lr'], head['weight_decay']) == pytest.approx((0.5 * run.s.head_lr / 2, 0))


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
    s = settings('--budget_minutes=10')
    clock, _, _ = drive(s, seed, pauses, restart_at)
    assert clock.progress > 0.985
    assert abs(clock.elapsed() - (600 - 20)) < 4.5 and clock.budget == 600


@pytest.mark.parametrize('seed', range(3))
def test_progress_is_proportional_to_time(seed):
    s, now = settings('--budget_minutes=10'), FakeTime()
    clock, rng = train.Clock(s, age=now), np.random.default_rng(seed)
    for step in range(1, 100):
        left, seconds = clock.left(), float(rng.uniform(0.1, 5))
        now.now += seconds
        clock.add_step(seconds, left, step)
        assert clock.progress == pytest.approx((now.now - 5) / 595)


def test_steps_drive_alone_when_they_are_given():
    s = settings('--max_steps=8', '--budget_minutes=10')
    clock, step, _ = drive(s, 0)
    assert step == 8 and clock.progress == 1
    clock = train.Clock(s, age=FakeTime())
    for step in range(1, 9):
        assert clock.fits(step - 1, 1.0)
        clock.add_step(99, clock.left(), step)
        assert clock.progress == step / 8
    assert not clock.fits(8, 1.0)
    for steps, most in ((0, 2), (1, 1), (100, 2)):
        assert train.Clock(settings('--max_tokens=1000', '--tokens_per_step=512', f'--max_steps={steps}')).max_steps == most
    clock, step, _ = drive(settings('--max_steps=100000', '--budget_minutes=2'), 0)
    assert step < 200                                       # whichever limit comes first


def test_budget_of_training_alone():
    s = settings('--budget_minutes=5', '--budget_counts=training')
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
        train.save_checkpoint(tmp_path, dict(version=3, steps=step))
    assert weights(tmp_path)['steps'] == 3 and weights(tmp_path, 'ckpt.prev.pt')['steps'] == 2

    def full(state, f):
        f.write(b'x' * 1000)
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(sample.torch, 'save', full)
    with pytest.raises(UserError, match='resume'):
        train.save_checkpoint(tmp_path, dict(version=3, steps=4))
    assert weights(tmp_path)['steps'] == 3 and weights(tmp_path, 'ckpt.prev.pt')['steps'] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt.prev.pt', 'ckpt.pt']


def test_a_row_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    assert train.read_rows(path) == []
    path.write_text('{"step": 1, "elapsed_s": 1}\n{"step": 2, "elapsed_s": 2.5, "val_bpb": 3}\n{"st')
    assert train.read_rows(path) == [{'step': 1, 'elapsed_s': 1}, {'step': 2, 'elapsed_s': 2.5, 'val_bpb': 3}]


def test_peaks_are_of_the_card_named():
    named = {'NVIDIA GeForce RTX 4090': 165.2, 'NVIDIA GeForce RTX 4090 Laptop GPU': None, 'NVIDIA GeForce RTX 4090 D': None,
             'NVIDIA L4': 121.0, 'NVIDIA L40S': 362.1, 'NVIDIA H100 80GB HBM3': 989.4, 'NVIDIA H100 PCIe': 756.4,
             'NVIDIA A100-SXM4-80GB': 311.9, 'Tesla T4': None, 'NVIDIA GeForce RTX 3090': 71.2,
             'NVIDIA GeForce RTX 3090 Ti': None, 'NVIDIA L40': None, 'NVIDIA RTX A1000': None}
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
    said = re.search(r'validation on .*; epoch ([\d.]+), nats a token ([\d.]+), ([\d.]+) in the last steps of training\n', out)
    way = next(row for row in rows(out_dir) if 'val_bpb' in row)                # 20 steps are what is averaged, here all
    assert [*map(float, said.groups())] == pytest.approx([
        result['epochs'] * way['step'] / 20, way['val_loss'], np.mean(losses(out_dir)[:way['step']])], abs=0.006)
    assert 'sample:' in out and weights(out_dir, 'ckpt.prev.pt')['steps'] <= weights(out_dir)['steps'] == 20
    assert re.search(r'^settings that differ.*seed=3', out, re.M)


@torch.no_grad()
def test_flops_count_the_positions_attended_to(finished, corpus):
    result = json.loads((finished[0] / 'result.json').read_text())
    model, data = GPT(GPTConfig(**result['config'])), corpus.open()
    rows = stream_of(data.tokens['train'], data.docs['train'], 3).first_rows(64, 64)
    attended = 0
    for row in rows:
        start = 0
        for t, token in enumerate(row):
            start = t if token == model.config.bos else start
            attended += t - start + 1
    assert result['flops_per_token'] == model.flops_per_token(attended / 64 ** 2) < model.flops_per_token()


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


def test_a_budget_that_is_over_before_the_first_step_is_no_run(main, tmp_path, monkeypatch):
    args = ['--max_steps=0', '--budget_minutes=1', '--sample_tokens=0', '--eval_interval=0']
    monkeypatch.setattr(train, 'STARTED', time.monotonic() - 59.5)      # the text came slowly
    with pytest.raises(UserError, match=r'nothing is left to train in: of 60 s (59|6\d) are over, and \d+ are kept for the end'):
        main(*args)
    assert not {'ckpt.pt', 'result.json'} & {path.name for path in (tmp_path / 'run').iterdir()}
    monkeypatch.setattr(train, 'STARTED', time.monotonic() - 30)
    monkeypatch.setattr(train, 'WENT_BEFORE', 29.5)                     # torchrun has started this again
    with pytest.raises(UserError, match='nothing is left to train in: of 60 s (59|6.) are over'):
        main(*args)
    monkeypatch.setattr(train, 'WENT_BEFORE', 0.0)
    monkeypatch.setattr(train.Clock, 'left', lambda self: 10.0 if self.trained == 0 else 0.0)
    main(*args)                                                        # the same again, in time
    assert (tmp_path / 'run' / 'result.json').exists()


def test_weights_of_a_run_whose_idea_lies_elsewhere(main, tmp_path):
    """They are found where this run's own idea is, and no idea is loaded that was not theirs."""
    (tmp_path / 'mine.py').write_text('import model\nclass GPT(model.GPT):\n    pass\n')
    (tmp_path / 'more.py').write_text('import model\nclass Block(model.Block):\n    def __init__(self, config, layer):\n'
                                      '        super().__init__(config, layer)\n        self.more = model.Linear(4, 4)\n')
    main('mine.py', '--out_dir=a')
    main('mine.py', '--out_dir=b', '--init_from=a')
    assert weights(tmp_path / 'b')['origin'] == 'a'
    with pytest.raises(UserError, match='mine.py, and config/ has no such file'):
        main('--out_dir=c', '--init_from=a')
    model, _ = sample.load(tmp_path / 'a', here=[tmp_path / 'mine.py', tmp_path / 'more.py'])
    assert not hasattr(model.blocks[0], 'more')


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
    state = FORM | dict(steps=3, origin='scratch')
    train.save_checkpoint(tmp_path / 'run', state)
    os.replace(tmp_path / 'run' / 'ckpt.pt', tmp_path / 'run' / 'ckpt.prev.pt')
    with pytest.raises(UserError, match='unfinished run'):
        run_of(f'--out_dir={tmp_path}/run').find_checkpoint()
    assert run_of(f'--out_dir={tmp_path}/run', '--init_from=resume').find_checkpoint()['steps'] == 3


def test_a_signal_saves_and_exits_with_75(interrupted):
    code, out, err = interrupted.stopped
    assert code == 75 and 'Traceback' not in err and 'resume' in err
    assert interrupted.saved['steps'] == interrupted.steps_done < 20
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
    step = weights(tmp_path / 'run')['steps']
    assert rows(tmp_path / 'run')[-1]['step'] == step
    code, _, err = script(*args, '--init_from=resume', '--budget_minutes=0.3', cwd=tmp_path)
    assert code == 0, err
    losses(tmp_path / 'run')                                # no step is missing, none is there twice


def test_one_process_has_no_group(main, monkeypatch):
    monkeypatch.setattr(dist, 'init_process_group', lambda *a, **k: pytest.fail('a process group for one process'))
    main()
    assert not dist.is_initialized()


# ---- a terminal that prints little, or goes away

SHORT = ['--max_steps=2', '--out_dir=run', '--sample_prompt=Zoë 🙂']


def test_what_the_terminal_lacks_is_spelt(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONIOENCODING', 'ascii')
    code, out, err = script('train.py', *corpus.args, *SHORT, cwd=tmp_path)
    assert code == 0 and not err and r'Zo\xeb \U0001f642' in out and (tmp_path / 'run' / 'report.html').exists()


def test_a_reader_that_leaves_costs_no_run(corpus, tmp_path):
    process = start('train.py', *corpus.args, *SHORT, cwd=tmp_path)
    assert process.stdout.readline().startswith('halfhour:')
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 0 and (tmp_path / 'run' / 'report.html').exists()


def kill_at_step(monkeypatch, number, step=2):
    save = train.Run.save_if_due
    monkeypatch.setattr(train.Run, 'save_if_due', lambda self: (
        os.kill(os.getpid(), number) if self.steps == step else None, save(self))[1])


@pytest.fixture
def terminal():
    """Whose hangup is heard, even where nohup has started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_goes_away_saves(main, tmp_path, monkeypatch, capfd, terminal):
    kill_at_step(monkeypatch, signal.SIGHUP)
    with pytest.raises(train.Stopped):
        main('--max_steps=9', '--save_minutes=100')
    assert weights(tmp_path / 'run')['steps'] == 2 and 'told to stop' in capfd.readouterr().err
    signal.signal(signal.SIGHUP, signal.SIG_IGN)            # as nohup starts it
    assert '---' in main('--max_steps=9', '--init_from=resume')


def test_hangups_do_not_end_a_run_at_once(monkeypatch):
    run, ended = run_of(), []
    monkeypatch.setattr(os, '_exit', ended.append)
    for number in [signal.SIGHUP] * 5 + [signal.SIGTERM] * 2:
        run.heed(number, None)
    assert not ended
    run.heed(signal.SIGTERM, None)
    assert ended == [128 + signal.SIGTERM]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_data_is_there_ends_at_once(corpus, main, tmp_path, monkeypatch, number, terminal):
    def built(*args):
        assert list((tmp_path / 'data').iterdir())
        os.kill(os.getpid(), number)
        time.sleep(5)
    monkeypatch.setattr(prepare_data, 'scan', built)
    with pytest.raises(KeyboardInterrupt):
        main(f'--data_dir={tmp_path / "data"}')
    assert not list((tmp_path / 'data').iterdir()) and not (tmp_path / 'run').exists()


# ---- one owner

def test_a_folder_has_one_owner(main, tmp_path):
    main()
    (tmp_path / 'run' / 'result.json').unlink()
    sample.OWNED.clear()                                    # as if that process had ended
    for ways in (['--overwrite'], ['--init_from=resume'], []):
        with open(tmp_path / 'run' / '.lock', 'a+') as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = snapshot(tmp_path / 'run')
            with pytest.raises(UserError, match=f'written by another run, process {os.getpid()} on '):
                main(*ways)
            assert snapshot(tmp_path / 'run') == before
            main('--dry_run', '--overwrite')
    main('--init_from=resume')                              # a lock that nobody holds


@pytest.mark.parametrize('ended, match', [(False, 'another run, just begun'), (True, 'finished run')])
def test_two_that_begin_together(main, tmp_path, monkeypatch, ended, match):
    """The second one to have its model finds the folder taken, or what the first one has left there."""
    build, folder, other = train.Run.build, tmp_path / 'run', []

    def meanwhile(self):
        build(self)
        folder.mkdir()
        (folder / 'result.json').write_text('of the other')
        other.append(open(folder / '.lock', 'a'))
        fcntl.flock(other[0], fcntl.LOCK_UN if ended else fcntl.LOCK_EX)
    monkeypatch.setattr(train.Run, 'build', meanwhile)
    with pytest.raises(UserError, match=match):
        main(*['--overwrite'] * (not ended))
    assert sorted(p.name for p in folder.iterdir()) == ['.lock', 'result.json']


# ---- a compiler that does not work

def test_without_a_compiler_that_works_a_run_goes_on(main, tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    def compiled(self, model):
        model.blocks[1].compile(backend=broken)
        return model
    main('--out_dir=eager')
    monkeypatch.setattr(train.Run, 'compiled', compiled)
    try:
        out = main('--compile=on')
    finally:
        torch.compiler.set_stance('default')
    assert len(re.findall('warning: torch.compile does not work here .*No space left on device', out)) == 1
    assert losses(tmp_path / 'run') == losses(tmp_path / 'eager')
    assert 'torch.compile' in json.loads((tmp_path / 'run' / 'result.json').read_text())['warnings'][-1]


def test_what_is_wrong_with_the_model_is_no_fault_of_the_compiler(main, monkeypatch):
    def wrong(self, **batch):
        raise ZeroDivisionError
    monkeypatch.setattr(train.Run, 'batch_loss', wrong)
    monkeypatch.setattr(train.Run, 'compiled', lambda self, model: model)
    try:
        for compile in ('on', 'off'):
            with pytest.raises(ZeroDivisionError):
                main(f'--compile={compile}', f'--out_dir={compile}')
    finally:
        torch.compiler.set_stance('default')


# ---- ranks

@pytest.mark.parametrize('told', [dict(WORLD_SIZE='8'), dict(RANK='3'), dict(RANK='0', WORLD_SIZE='2'),
                                  dict(RANK='2', WORLD_SIZE='2', MASTER_ADDR='here', MASTER_PORT='1'),
                                  dict(RANK='one', WORLD_SIZE='2', MASTER_ADDR='here', MASTER_PORT='1')])
def test_a_platform_that_says_half_of_what_torchrun_does(monkeypatch, told):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='unset RANK and WORLD_SIZE'):
        run_of()


def test_one_of_one_is_alone(monkeypatch):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '1')
    assert run_of().world == 1


def test_ranks_that_never_come(monkeypatch, main, capfd):
    meet, heard = dist.rendezvous, []
    for name, value in dict(RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='0').items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, 'PATIENCE', 1)
    monkeypatch.setattr(dist, 'rendezvous', lambda *a, **k: heard.append(signal.getsignal(signal.SIGINT)) or meet(*a, **k))
    with pytest.raises(UserError, match='rank 0 did not meet 2 ranks at 127.0.0.1'):
        main('--tokens_per_step=1024')
    assert heard == [signal.SIG_DFL] and 'rank 0 waits for 2 ranks' in capfd.readouterr().out


def test_ranks_that_meet_and_cannot_talk_say_why(monkeypatch, main):
    for name, value in dict(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0').items():
        monkeypatch.setenv(name, value)

    def fail(*args, **more):
        raise dist.DistBackendError('NCCL error:\nError while creating shared memory segment /dev/shm/nccl-x: No space left on device')
    monkeypatch.setattr(train, 'ranks', lambda: (0, 2))
    monkeypatch.setattr(dist, 'rendezvous', lambda *a, **k: iter([('a store', 0, 2)]))
    monkeypatch.setattr(dist, 'init_process_group', fail)
    with pytest.raises(UserError, match='(?s)rank 0 found 2 ranks at 127.0.0.1:0, and then .*No space left on device.: GLOO_SOCKET_IFNAME'):
        main('--tokens_per_step=1024')
    assert '--shm-size=1g' in train.Run.way_across(SimpleNamespace(device='cuda'))


def test_a_rank_that_fails_alone_speaks(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path / 'error'))
    assert train.tell('a run', UserError('the disk is full')) == 2
    assert capsys.readouterr().err == 'train.py, rank 1: the disk is full\n'
    assert [train.tell('a run', kind()) for kind in (train.Stopped, train.Diverged, KeyboardInterrupt)] == [75, 3, 130]
    assert train.tell(None, UserError('a mistake in the settings')) == 2 and not capsys.readouterr().err


def test_torchrun_ends_with_the_sentence(tmp_path):
    code, out, err = script('train.py', '--sed=3', cwd=tmp_path, launcher=['-m', 'torch.distributed.run', '--nproc_per_node=1'])
    assert code and 'no setting is called sed' in err.rpartition('Root Cause')[2] and '(exit code 2)' in err


# ---- on a computer that is not ours

WINDOWS = '''
import fcntl, os, runpy, signal, sys
get, sync, readonly = fcntl.fcntl, os.fsync, (fcntl.F_GETFL, os.O_ACCMODE, os.O_RDONLY)
def fsync(fd):
    if get(fd, readonly[0]) & readonly[1] == readonly[2]:
        raise OSError(9, 'Bad file descriptor')
    sync(fd)
def kill(*args):
    raise SystemExit('a process was killed')
sys.modules.update(fcntl=None, resource=None, triton=None)
import torch._dynamo                            # which looks for libraries of a platform
os.fsync, os.kill, sys.platform = fsync, kill, 'win32'
del os.sysconf, os.sched_getaffinity, signal.SIGHUP
sys.argv = ['train.py', *sys.argv[1:]]
sys.path.insert(0, ROOT)
runpy.run_path(ROOT + '/train.py', run_name='__main__')
'''


@pytest.mark.long
def test_without_what_posix_alone_has(corpus, tmp_path):
    """A stand-in for Windows, where nobody has tried it."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / f'.{corpus.folder.name}.1').mkdir()          # of a build that may still be running
    (tmp_path / 'windows.py').write_text(f'ROOT = {str(ROOT)!r}\n{WINDOWS}')
    code, out, err = script(tmp_path / 'windows.py', *corpus.args, *SHORT, '--data_dir=data', cwd=tmp_path)
    assert code == 0, err
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['peak_mem_gb'] is None and 'peak_mem_gb: not finite' in out and result['joules'] > 0


def test_paths_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    s = settings('--out_dir=~/runs/a b', '--eval_data=~/sets', '--evals=all,~/mine.jsonl', '--sample_prompt=~/x')
    assert (s.out_dir, s.eval_data) == (f'{tmp_path}/runs/a b', f'{tmp_path}/sets')
    assert s.evals == f'all,{tmp_path}/mine.jsonl' and s.sample_prompt == '~/x'


@pytest.mark.parametrize('arg, said', [('--seed=123456789012345678901', 'at most 1e+18'), ('--compile=False', 'one of auto, on, off'),
                                       ('--data_seed=123456789012345678901', 'at most 1e+18'),
                                       ('--sample_prompt=Zo\udceb', 'text in UTF-8')])
def test_values_that_would_fail_later(arg, said):
    assert said in mistakes(arg)
    assert settings('--out_dir=2026-11-25').out_dir == '2026-11-25'


def test_a_folder_that_is_not_ours(main, tmp_path, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, 'access', lambda path, mode: mode != os.W_OK and access(path, mode))
    with pytest.raises(UserError, match='cannot be written to: choose another --out_dir'):
        main(f'--data_dir={tmp_path / "data"}')
    assert not (tmp_path / 'data').exists()


def test_a_folder_that_became_read_only(tmp_path, monkeypatch):
    """What was begun cannot be removed either; the reason is what is said."""
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, 'Permission denied', str(tmp_path))
    monkeypatch.setattr(os, 'replace', denied)
    monkeypatch.setattr(Path, 'unlink', denied)
    with pytest.raises(UserError, match='could not be written .Permission denied.: have that folder made writable'):
        train.write_beside(tmp_path / 'file', lambda f: f.write(b'new'))


def test_an_error_of_the_machine_is_a_sentence(capsys):
    assert train.tell(None, PermissionError(errno.EACCES, 'Permission denied', 'run/metrics.jsonl')) == 2
    assert capsys.readouterr().err == 'train.py: run/metrics.jsonl: Permission denied\n'
    with pytest.raises(OSError):
        train.tell(None, OSError('of no file: a mistake of ours'))


def test_a_result_that_finds_no_room_is_written_on_resuming(main, tmp_path, monkeypatch, capfd):
    write = train.write_beside

    def full(path, *args):
        if path.name == 'result.json':
            raise UserError('the disk is full')
        write(path, *args)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'write_beside', full)
        with pytest.raises(UserError, match='the disk is full; run is saved, go on with --init_from=resume'):
            main()
    out = capfd.readouterr().out
    assert 'val_bpb' in out and 'val_bpb' in main('--init_from=resume') and (tmp_path / 'run' / 'result.json').exists()


def test_what_is_resumed_knows_its_data(corpus, main, tmp_path, monkeypatch):
    main()
    (tmp_path / 'run' / 'result.json').unlink()
    monkeypatch.setattr(prepare_data.Corpus, 'build', lambda *a, **k: pytest.fail('the data is there'))
    train.main(['--init_from=resume', '--out_dir=run', '--device=cpu', '--overwrite'])
    assert (tmp_path / 'run' / 'result.json').exists()


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
    text = refused('cannot change on the way', '--n_layer=3', '--n_embd=32')
    assert 'n_layer (was 2, now 3)' in text and 'n_embd' in text and 'n_head' not in text
    refused('learning_rate.*was 0.02.*now 0.5', '--learning_rate=0.5')
    refused('not the data', '--tokenizer=bpe', '--vocab_size=300')
    refused('no ckpt.pt', '--out_dir=elsewhere')
    other = tmp_path / 'other' / 'text'
    shutil.copytree(corpus.source, other)
    (other / 'tales.train').write_text((other / 'tales.train').read_text().replace('kite', 'flag'))
    refused('not the data', f'--dataset=files:{other}', f'--data_dir={tmp_path / "data"}')
    main('--init_from=resume')


FORM = dict(version=3, ideas=[], settings={}, config={}, model={}, tokenizer='', fingerprint='', data='')


@pytest.fixture
def two_saved(tmp_path):
    """A folder with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        train.save_checkpoint(tmp_path, FORM | dict(steps=step, model=dict(weight=torch.arange(999.0))))
    return tmp_path


def test_a_damaged_checkpoint_is_passed_over(two_saved, capsys):
    last, before = two_saved / 'ckpt.pt', two_saved / 'ckpt.prev.pt'
    whole, earlier = last.read_bytes(), before.read_bytes()
    assert sample.read_checkpoint(two_saved)['steps'] == 2 and not capsys.readouterr().err
    at = whole.index(torch.arange(500.0, 510.0).numpy().tobytes())
    flipped = whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1:]
    assert len(torch.load(io.BytesIO(flipped), weights_only=True)['model']['weight']) == 999      # torch does not look
    for damaged in (whole[:len(whole) // 2], whole[:100], b'', b'no checkpoint at all', flipped):
        last.write_bytes(damaged)
        assert sample.read_checkpoint(two_saved)['steps'] == 1
        said = capsys.readouterr().err
        assert said.startswith(f'warning: {last} is ') and said.endswith(f'{before} is whole and takes its place\n') and said.count('\n') == 1
        with pytest.raises(UserError, match='cut off or not a checkpoint|in it has another checksum'):
            sample.read_checkpoint(last)
    for no_better in (b'', earlier[:500]):
        before.write_bytes(no_better)
        with pytest.raises(UserError, match='ckpt.pt is damaged'):
            sample.read_checkpoint(two_saved)
    (two_saved / 'ckpt.new.pt').write_bytes(whole)                   # killed between the two moves
    assert sample.read_checkpoint(two_saved)['steps'] == 2


def test_a_checkpoint_with_code_in_it_is_not_loaded(tmp_path):
    torch.save(dict(version=3, steps=os.system), tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='holds posix.system, which is code, and none of a checkpoint is run'):
        sample.read_checkpoint(tmp_path)


def test_a_checkpoint_that_may_not_be_read_is_not_passed_over(two_saved, monkeypatch):
    def denied(path, **options):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))
    monkeypatch.setattr(sample.torch, 'load', denied)
    with pytest.raises(UserError, match='ckpt.pt cannot be read .Permission denied'):
        sample.read_checkpoint(two_saved)


def test_weights_of_another_run(main, tmp_path):
    main()
    out = main('--init_from=run', '--out_dir=second', '--seed=9')
    assert losses(tmp_path / 'second')[0] < losses(tmp_path / 'run')[0] - 0.3 and '---' in out
    assert json.loads((tmp_path / 'second' / 'result.json').read_text())['steps'] == 3


def test_overwrite(main, tmp_path):
    main()
    main('--overwrite=True', '--seed=2')
    assert len(losses(tmp_path / 'run')) == 3 and weights(tmp_path / 'run')['settings']['seed'] == 2


def test_a_run_takes_away_what_runs_write_and_nothing_else(main, corpus, tmp_path):
    (tmp_path / 'run').mkdir()
    theirs, ours = ('notes.json', 'data.jsonl', 'tokenizer.mine', 'ckpt.pt.txt', 'other.html'), ('report.html', 'tokenizer.model', 'ckpt.pt.part')
    for name in theirs + ours:
        (tmp_path / 'run' / name).write_text('mine')
    main()
    assert all((tmp_path / 'run' / name).read_text() == 'mine' for name in theirs)
    assert not any((tmp_path / 'run' / name).exists() and (tmp_path / 'run' / name).read_text() == 'mine' for name in ours)
    shutil.copytree(corpus.folder, tmp_path / 'copy', ignore=shutil.ignore_patterns('eval'))
    before = snapshot(tmp_path / 'copy')
    with pytest.raises(UserError, match='is the folder of a data set: choose another --out_dir'):
        main('--out_dir=copy', '--overwrite')
    assert snapshot(tmp_path / 'copy') == before


@pytest.mark.parametrize('first, then, made', [(0.5, 0, 0), (0, 0.25, 2), (0.5, 0.25, 2)])
def test_a_run_may_go_on_with_other_evaluations_on_the_way(main, tmp_path, monkeypatch, first, then, made):
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, 'evaluate_if_due', lambda self: self.signals.append(signal.SIGTERM) if self.steps == 4 else None)
        with pytest.raises(train.Stopped):
            main('--max_steps=12', f'--eval_interval={first}')
    main('--init_from=resume', '--max_steps=12', f'--eval_interval={then}')
    assert sum('val_bpb' in row and row['progress'] < 0.95 for row in rows(tmp_path / 'run')) == made


def test_a_signal_right_after_an_evaluation_loses_none_of_it(main, tmp_path, monkeypatch):
    evaluate = train.Run.evaluate_if_due

    def then_a_signal(self):
        evaluate(self)
        if self.steps == 7:
            self.signals.append(signal.SIGTERM)              # heard within the next step
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, 'evaluate_if_due', then_a_signal)
        with pytest.raises(train.Stopped):
            main('--max_steps=12', '--eval_interval=0.5')
    main('--init_from=resume', '--max_steps=12', '--eval_interval=0.5')
    assert [row['step'] for row in rows(tmp_path / 'run') if 'val_bpb' in row] == [7, 12]


def test_a_parameter_that_no_optimizer_has_is_refused(main, tmp_path):
    (tmp_path / 'forgets.py').write_text('import torch\nimport model\n\n\nclass GPT(model.GPT):\n    def build(self, config):\n        super().build(config)\n'
                                         '        self.places = torch.nn.Parameter(torch.zeros(3, 3))\n')
    with pytest.raises(UserError, match='places are in no group of the optimizers, nothing would move them'):
        main(str(tmp_path / 'forgets.py'))


@pytest.mark.parametrize('text, said', [
    ('import torch\nimport model\nclass Block(model.Block):\n    def __init__(self, config, layer):\n        super().__init__(config, layer)\n'
     '        self.gain = torch.nn.Parameter(torch.full((3,), float("nan")))\n    def forward(self, x, x0, context):\n'
     '        return super().forward(x, x0, context) * self.gain.mean()\n', 'blocks.0.gain, blocks.1.gain begin as no numbers: set them in init_weights'),
    ('import train\nclass Run(train.Run):\n    def groups(self, model):\n        return super().groups(model) | dict(mine=dict(params=[], lr=1))\n',
     r'mine of Run.groups is no group: write dict\(params=\[...\], base_lr=0.01\)'),
    ('import train\nclass Run(train.Run):\n    def groups(self, model):\n        return super().groups(model) | dict(mine=[])\n', 'mine of Run.groups is no group')])
def test_what_ideas_forget_is_a_sentence(main, tmp_path, text, said):
    (tmp_path / 'forgets.py').write_text(text)
    with pytest.raises(UserError, match=said):
        main(str(tmp_path / 'forgets.py'))


def test_an_evaluation_of_one_s_own(main, tmp_path):
    head = 'import sample\nclass Measure(sample.Measure):\n    def known(self):\n        return super().known() | dict(luck=lambda model, n, stop: dict('
    (tmp_path / 'own.py').write_text(head + 'accuracy=0.5, error=0.1, chance=0.5, items=9))\n')
    (tmp_path / 'half.py').write_text(head + 'accuracy=0.5))\n')
    assert 'luck: 0.5000 +- 0.1000 on 9 items, chance 0.5\n' in main(str(tmp_path / 'own.py'), '--evals=luck')
    assert 'left out: luck returns an accuracy without chance, error, items: give all four' in main(
        str(tmp_path / 'half.py'), '--evals=luck', '--overwrite')


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
    assert 'the disk is full' in main() and weights(tmp_path / 'run')['steps'] == 3


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
    refused('no/such/folder', '--dataset=files:no/such/folder')
    refused('storys', '--dataset=storys')
    refused('config/quickstart.py', '--dataset=')


@pytest.mark.parametrize('wrong', ['--n_head=0', '--n_kv_head=3', '--n_layer=0', '--block_size=0', '--head_dim=7', '--mlp=gelu',
                                   '--tokens_per_step=500', '--beta1=1.0', '--out_dir=file', '--out_dir=file/run'])
def test_settings_that_cannot_work(main, tmp_path, wrong):
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(UserError):
        main(wrong)
    assert [p.name for p in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize('options', [
    ['--block_size=40', '--tokens_per_step=640'], ['--n_kv_head=1'], ['--grad_clip=0'], ['--optimizer=adamw'],
    ['--rotary_dim=16'], ['--qk_norm=False'], ['--sample_tokens=0'], ['--max_steps=0', '--max_tokens=1500'],
    ['--tie_embeddings=True'], ['--mlp=swiglu'], ['--sample_prompt=Mia'], ['--dtype=bfloat16']], ids=' '.join)
def test_options_run(main, tmp_path, options):
    main(*options)
    assert len(losses(tmp_path / 'run')) == 3
    assert math.isfinite(json.loads((tmp_path / 'run' / 'result.json').read_text())['val_bpb'])


# ---- steps that are not finite

def broken_steps(monkeypatch, broken):
    """The steps for which broken(number) holds see a loss that is not a number."""
    gradients, calls = train.Run.gradients, []

    def maybe(self, n_micro):
        calls.append(1)
        loss, wait = gradients(self, n_micro)
        return loss * math.nan if broken(len(calls)) else loss, wait
    monkeypatch.setattr(train.Run, 'gradients', maybe)


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


def overflow(monkeypatch, step, to=math.inf):
    """The weights after a step are such numbers."""
    descend = train.Run.descend

    def too_far(self, loss):
        found = descend(self, loss)
        if self.steps == step - 1:
            for p in self.model.parameters():
                p.data.fill_(to)
        return found
    monkeypatch.setattr(train.Run, 'descend', too_far)


@pytest.mark.parametrize('to', [math.nan, math.inf])
def test_weights_that_overflow_at_the_end_are_no_result(main, tmp_path, monkeypatch, to):
    overflow(monkeypatch, 3, to)
    with pytest.raises(train.Diverged, match='bits per byte .*after step 3: lower learning_rate'):
        main()
    assert not (tmp_path / 'run' / 'result.json').exists()
    assert all(v.isfinite().all() for v in weights(tmp_path / 'run')['model'].values())


def test_weights_that_overflow_before_an_evaluation(main, tmp_path, monkeypatch):
    overflow(monkeypatch, 6)
    out = main('--max_steps=20', '--eval_interval=0.25')
    assert 'validation: not finite' in out and 'weights and optimizer of step 5 again' in out
    text = (tmp_path / 'run' / 'metrics.jsonl').read_text() + (tmp_path / 'run' / 'result.json').read_text()
    assert 'NaN' not in text and 'Infinity' not in text
    assert [row['val_bpb'] is None for row in rows(tmp_path / 'run') if 'val_bpb' in row] == [True, False, False, False]


def test_an_idea_s_weights_that_nothing_reads_are_named(main, tmp_path):
    (tmp_path / 'idle.py').write_text('import model\nclass MLP(model.MLP):\n    def __init__(self, config, hidden=None):\n'
                                      '        super().__init__(config, hidden)\n        self.spare = model.Linear(8, 8)\n')
    with pytest.raises(UserError, match=r'^blocks.0.mlp.spare.weight, blocks.1.mlp.spare.weight have no gradient'):
        main('idle.py')


# ---- time

def test_dry_run_writes_nothing(main, tmp_path):
    began = time.monotonic()
    out = main('--dry_run=True', '--max_steps=0', '--budget_minutes=60', '--dollars_per_hour=0.4')
    said = dict(re.findall(r'^(\w+): (.+)$', out.split('---')[1], re.M))
    tokens = int(said['tokens'].replace(',', ''))
    assert tokens > 0 and float(said['epochs']) > 0 and said['dollars'].startswith('0.40')
    assert float(said['tokens_a_parameter']) == pytest.approx(tokens / 131_000, rel=0.1)
    assert not list(tmp_path.iterdir()) and time.monotonic() - began < 60


@pytest.mark.parametrize('more', [['--budget_minutes=0.01', '--max_steps=0'], ['--max_steps=1']])
def test_dry_run_of_little(main, tmp_path, more):
    assert 'tokens: ' in main('--dry_run=True', *more) and not list(tmp_path.iterdir())


@pytest.mark.parametrize('epochs, worth', [(0.5, 0.5), (1, 1), (4, 3.72), (12.3, 9.01), (1000, 16.39)])
def test_what_repeated_text_is_worth(epochs, worth):
    """Four epochs nearly that of fresh text, no number of them more than sixteen (Muennighoff 2023)."""
    config = GPTConfig(n_layer=1, n_embd=32)
    run = SimpleNamespace(stream=SimpleNamespace(epoch_tokens=lambda: 100), largest=lambda: config)
    size = GPT(config).params()['total']
    assert train.Run.reading(run, 100 * epochs) == (100 * epochs / size, epochs, pytest.approx(worth, abs=0.01))


def test_text_that_is_read_too_often_is_warned_of(main, corpus, tmp_path):
    many = 21 * corpus.open().meta['splits']['train']['tokens']
    assert 'warning: 2' in main('--dry_run=True', '--max_steps=0', f'--max_tokens={many}')
    out = main('--dry_run=True', '--max_steps=0', f'--max_tokens={many // 2}')
    assert 'epochs: 10' in out and 'by heart' not in out
    said = []
    run = SimpleNamespace(say=said.append)
    for a_parameter, epochs in ((25, 21), (25, 19), (144, 12.3), (21 * 13, 21), (144, 121)):
        train.Run.warn_of_rereading(run, a_parameter, epochs)
    assert len(said) == 2 and said[0].startswith('warning: 21 epochs of 1.2 tokens of text a parameter') and '121 epochs' in said[1]


@pytest.mark.parametrize('every, count', [(0.1, 9), (0.05, 18), (0.3, 3), (0.25, 3)])
def test_every_evaluation_on_the_way_is_made_once(every, count):
    """Though 0.5 // 0.1 is 4."""
    made = []
    run = SimpleNamespace(s=SimpleNamespace(eval_interval=every), next_eval=every, slices=8, bits=lambda n: made.append(run.went_by) or dict(
        bpb=math.nan), say=lambda line: None)
    for step in range(1000):
        run.went_by = step / 1000
        train.Run.evaluate_if_due(run)
    assert len(made) == count and np.diff(made).min() > 0.8 * every


def test_dry_run_of_a_run_to_go_on_with(main, tmp_path):
    assert re.search(r'^training 3 steps: some 1,536 tokens, 0.01\d+ a parameter, 0.0\d+ epochs; closing', main(), re.M)
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


class Work(FakeTime):
    """A clock that goes only by what is computed: seconds for every forward pass, and for each of its tokens."""
    now, token, call = 0.0, 2e-4, 1e-3

    def slow_down(self, times):
        self.token, self.call = times * self.token, times * self.call


@pytest.mark.parametrize('slower, sets, more', [(1, 6, []), (2, 1, []), (4, 12, ['--sample_tokens=60'])])
def test_a_machine_that_gets_busy_at_the_end_costs_items_not_time(main, tmp_path, monkeypatch, slower, sets, more):
    now, trunk, finish, keep = Work(), GPT.trunk, train.Run.finish, train.Run.keep_report

    def counted(self, idx, *args, **kwargs):
        now.now += now.call + now.token * idx.numel()
        return trunk(self, idx, *args, **kwargs)

    def finish_slowly(self):
        now.slow_down(slower)
        finish(self)

    def leave_slowly(self, report):
        now.now += slower * train.LEAVING
        keep(self, report)
    for owner, name, value in ((GPT, 'trunk', counted), (train.Run, 'finish', finish_slowly), (train, 'STARTED', 0.0),
                               (train.Run, 'keep_report', leave_slowly), (train, 'time', SimpleNamespace(monotonic=now))):
        monkeypatch.setattr(owner, name, value)
    (tmp_path / 'sets').mkdir()
    for name in range(sets):
        items = [dict(sentence_good=f'Mia {i} lost the kite {name}.', sentence_bad=f'Mia {i} lost the xqzw {name}.') for i in range(300)]
        (tmp_path / 'sets' / f'set{name}.jsonl').write_text('\n'.join(map(json.dumps, items)))
    names = ','.join([f'set{name}' for name in range(sets)] + ['text'])
    main(str(ROOT / 'config' / 'text_quality.py'), '--text_tokens=16', f'--evals={names}', f'--eval_data={tmp_path}/sets',
         '--max_steps=0', '--budget_minutes=0.5', '--tokens_per_step=4096', *more)
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    said = {line.split(' was cut to ')[0][9:]: line for line in result['warnings'] if ' was cut to ' in line}
    assert 27 < now.now < 30 * 1.01 + 5, said
    for name in names.split(','):
        found = result['evals'].get(name, dict(share=0))
        assert ('share' in found) == (name in said) and f"{found.get('share', 1):.0%}" in said.get(name, '100%')
    assert ('validation' in ' '.join(said)) == (slower > 1) and (slower > 1 or not said) and (slower < 2 or len(said) > sets / 2)


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
    pairs, _ = sample.read_items(next((tmp_path / 'data').glob('*/pairs.jsonl')))
    coin = random.Random(0)
    shuffled = [p | dict(options=p['options'][::-1]) if coin.random() < 0.5 else p for p in pairs]
    (tmp_path / 'shuffled.jsonl').write_text('\n'.join(json.dumps(dict(context=p['context'], options=p['options'], label=0))
                                                       for p in shuffled))
    asked = sample.Measure(SimpleNamespace(evals=f'{tmp_path}/shuffled.jsonl', eval_data=str(tmp_path)), tokenizer)
    assert abs(asked.judge(model, 'shuffled')['accuracy'] - 0.5) < 0.04


@pytest.mark.slow
def test_no_step_waits_for_data(corpus, tmp_path):
    _, result = timed(corpus, tmp_path, 0.5, '--tokens_per_step=4096')
    assert result['data_wait_share'] < 0.01


# ---- measured on the way

def test_a_run_keeps_what_it_warned_of(main, tmp_path, monkeypatch):
    broken_steps(monkeypatch, lambda n: 4 <= n < 4 + train.BAD_STEPS)
    in_two_parts(main, monkeypatch, 10, '--max_steps=12')
    kept = json.loads((tmp_path / 'parts' / 'result.json').read_text())['warnings']
    assert [line[:30] for line in kept if 'finite' in line] == ['warning: 5 steps in a row were'] and len({*kept}) == len(kept)
    

def test_a_page_that_finds_no_room_costs_no_run(main, tmp_path, monkeypatch):
    def full(*args, **data):
        raise UserError('no space left')
    monkeypatch.setattr(sample, 'write_page', full)
    assert 'warning: no space left' in main() and (tmp_path / 'run' / 'result.json').exists()


def test_evaluations_on_the_way_and_at_the_end(corpus, tmp_path):
    (tmp_path / 'sets').mkdir()
    rows = [dict(UID=f'u{i % 4}', sentence_good=f'Mia {i} lost the kite.', sentence_bad=f'Mia {i} lost the xqzw.') for i in range(80)]
    (tmp_path / 'sets' / 'small.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    args = [*corpus.args, '--max_steps=8', '--eval_interval=0.5', '--budget_counts=training',
            '--evals=all', f'--eval_data={tmp_path}/sets']
    code, out, err = script('train.py', *args, f'--out_dir={tmp_path}/with', cwd=tmp_path)
    assert code == 0, err
    evals = json.loads((tmp_path / 'with' / 'result.json').read_text())['evals']
    assert evals.keys() == {'small'} and evals['small']['items'] == 80 and len(evals['small']['per_kind']) == 4
    rows = [json.loads(line) for line in (tmp_path / 'with' / 'metrics.jsonl').read_text().splitlines()]
    row, last = [row for row in rows if 'evals' in row]
    assert last['step'] == 8 and last['evals'].keys() == evals.keys()
    assert row['evals']['small'].keys() == {'accuracy', 'error', 'chance', 'items'} and row['step'] == 5 and row['elapsed_s'] > 0
    assert 'small: ' in out and 'on 80 items, chance 0.5' in out
    code, _, err = script('train.py', *args[:-2], f'--out_dir={tmp_path}/without', cwd=tmp_path)
    both = [[row['train_loss'] for row in map(json.loads, (tmp_path / name / 'metrics.jsonl').read_text().splitlines())
             if 'train_loss' in row] for name in ('with', 'without')]
    assert code == 0 and both[0] == both[1] and len(both[0]) == 8                   # to be asked changes nothing
    for wrong, why in (('blimp', 'blimp is no evaluation'),):
        code, _, err = script('train.py', *args[:-2], f'--evals={wrong}', f'--out_dir={tmp_path}/no', cwd=tmp_path)
        assert code == 2 and why in err and not (tmp_path / 'no').exists()


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
    main('--country=120', '--eval_interval=0.4', '--sample_tokens=0', '--max_steps=3')
    # four probes as it warms up; a save after every step and after the last; an evaluation on the way, and the closing one
    save, evaluation = ['idle', 'train'], ['eval', 'train']
    # each with its sample, on the way with its evaluation sets too, of which there are none here
    assert turns == [*['eval', 'idle'] * 4, 'train', *save * 3, *evaluation * 3, *save, 'idle', *['eval', 'idle'] * 2], turns
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['joules'] == 10 * (len(turns) + 1) and result['co2_g'] == pytest.approx(result['joules'] / 3.6e6 * 120)
    assert [result['energy'][k] for k in ('train', 'eval', 'idle')] == [10 * ['idle', *turns].count(k) for k in ('train', 'eval', 'idle')]
    assert result['energy']['gpu'] == result['joules'] and 'estimated' in result['energy']['how']['cpu']

    in_two_parts(main, monkeypatch, 2, '--sample_tokens=0')
    whole, saved = json.loads((tmp_path / 'parts' / 'result.json').read_text()), weights(tmp_path / 'parts')
    # the second part: probes, 'train', one save, the closing save, which holds it all until then, and 7 readings more
    assert np.sum(saved['joules']) > 2 * 10 * 8 and whole['joules'] == pytest.approx(np.sum(saved['joules']) + 70)


def test_countries_that_cannot_be():
    assert settings('--country=120').country == '120' and settings('--country=PL').country == 'PL'
    assert "country is 'Atlantis', it must be one of world, " in mistakes('--country=Atlantis')
    for text in ('-3', 'True', '1e999'):
        assert 'country' in mistakes(f'--country={text}')


def test_samples_along_training(finished):
    """At every evaluation on the way, by the same dice; their text is no row of steps or of validation."""
    said = [row for row in rows(finished[0]) if 'sample' in row]
    assert [row['step'] for row in said] in ([10], [11]) and 0.4 < said[0]['progress'] < 0.6 and said[0]['elapsed_s'] > 0
    assert said[0].keys() == {'step', 'progress', 'elapsed_s', 'sample'} and isinstance(said[0]['sample'], str) and said[0]['sample']



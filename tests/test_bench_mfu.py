"""bench_mfu.py: it runs, it measures the step of a run, and compares runs as it says."""
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench_mfu
import model
import sample
import train
from config import bench_sweep
from conftest import ROOT, finish, script, start
from model import GPTConfig
from prepare_data import UserError

CONFIG = GPTConfig(vocab_size=257, bos=256, block_size=64, n_layer=2, n_head=2, n_embd=64)
PLAIN, LEADERBOARD = (ROOT / 'config' / f'{name}.py' for name in ('plain_gpt2', 'leaderboard'))


def opened(corpus, *args):
    """A run that is measured."""
    s, ideas = train.read_settings([*corpus.args, *args], bench_mfu.TABLES)
    return bench_mfu.measured(ideas)(s)


def test_an_idea_that_changes_muon_is_measured_without_adamw(corpus, capsys):
    argv = [*corpus.args, str(ROOT / 'config' / 'normuon.py')]
    run = opened(corpus, argv[-1])
    run.shape_given = {}
    found = bench_mfu.contestants(run, argv)
    assert [*found] == ['ours, Muon'] and 'ours, AdamW: not measured, optimizer is adamw, and normuon.py' in capsys.readouterr().out


def test_everything_is_measured(corpus, tmp_path):
    code, out, err = script('bench_mfu.py', *corpus.args, '--rounds=2', '--json=bench.json', f'--beside={PLAIN}', cwd=tmp_path)
    assert code == 0, err
    result = json.loads((tmp_path / 'bench.json').read_text())
    rows = {row['name']: row for row in result['rows']}
    assert [*rows] == ['ours, Muon', 'ours, AdamW', 'plain_gpt2']
    for name, row in rows.items():
        assert re.search(rf'^\| +{re.escape(name)} \|', out, re.M)
        assert 0 < row['min_ms'] <= row['step_ms'] <= row['max_ms'] and row['of_gemm'] > 0 and 0 <= row['data_wait'] < 1
        assert row['tok_per_sec'] == pytest.approx(512 / row['step_ms'] * 1e3)
        assert row['mfu'] is None                                  # a CPU is not in the table of peaks
    assert rows['ours, Muon']['versus_ours'] == 1 and all(v > 0 for v in result['gemm'].values())
    assert 'data-sheet peak not known' in out
    assert set(result['machine']['products']) == {'qkv', 'attention out', 'MLP up', 'MLP down', 'head'}
    assert 1 < result['attended'] < 32.5                           # documents are shorter than the 64 tokens of a row
    assert sum(result['where']['shares'].values()) == pytest.approx(1) and result['where']['shares']['matrix products'] > 0.02
    kernels = {(r['operation'], r['rival']): r for r in result['kernels']}
    assert len({operation for operation, _ in kernels}) == 5
    for (operation, rival), row in kernels.items():
        assert not row['fault'] and 0 < row['both_min_ms'] <= row['both_ms'] <= row['both_max_ms'] and row['floor_both_ms'] > 0
        assert rival in out and (rival != 'ours' or row['versus_ours'] == 1)
    assert 'attention, qk_norm, rms_norm, cross_entropy, mlp: torch, this is not a GPU' in out
    assert not (tmp_path / 'out').exists() and result['ideas'] == []


def test_the_step_measured_is_that_of_the_ideas(corpus, tmp_path, capsys):
    (tmp_path / 'twice.py').write_text("""import train
times: int = 2      # 1..: how often a micro-batch is read
class Run(train.Run):
    def loss(self, *args, **extras):
        self.losses = getattr(self, 'losses', 0) + 1
        return sum(super(Run, self).loss(*args, **extras) for _ in range(self.s.times)) / self.s.times
    def micro_steps(self, progress):
        return -(-super().micro_steps(progress) // 2)
""")
    run = opened(corpus, str(tmp_path / 'twice.py'), '--micro_batch_size=2')
    assert run.micro == 2 and run.step() == 256 and run.steps == 1 and run.losses == 2 + 2      # two of them set it going
    assert run.optimizers[0].param_groups[0]['lr'] == pytest.approx(0.5 / 0.6 * 0.02) and run.progress == 0.5
    run.batches.close()
    s, ideas = train.read_settings([*corpus.args, '--micro_batch_size=8'], bench_mfu.TABLES)
    other = bench_mfu.measured(ideas)(s, micro=4)
    assert other.micro == 4 and {key: len(t) for key, t in other.first_batch.items()} == dict(idx=4, targets=4)
    result, _ = bench_mfu.main([*corpus.args, str(tmp_path / 'twice.py'), '--rounds=1', '--only=steps']), capsys
    assert '--beside' not in capsys.readouterr().out and result is None


def test_flops_use_the_positions_really_attended_to(corpus):
    runs = {'ours, Muon': opened(corpus, '--n_layer=1'), 'plain': opened(corpus, str(PLAIN), '--n_layer=1')}
    attended = runs['ours, Muon'].model.attended(runs['ours, Muon'].early)
    rows, _, _ = bench_mfu.compare(runs, 1, peak=1e12)
    for row, run, seen in zip(rows, runs.values(), (attended, 32.5)):       # the rival has no documents to stay within
        assert row['mfu'] == pytest.approx(row['tok_per_sec'] * run.model.flops_per_token(seen) / 1e12)
        assert row['mfu_palm'] == pytest.approx(row['tok_per_sec'] * run.model.flops_per_token(64) / 1e12)
        run.batches.close()
    assert runs['plain'].model.flops_per_token(1) == 6 * (12 * 64 * 64 + 257 * 64) + 12 * 64


def test_shapes_take_the_place_of_the_configs(corpus, capsys, monkeypatch):
    monkeypatch.setitem(bench_mfu.SHAPES, '11M', dict(n_layer=1, n_embd=32, n_head=1, block_size=32, vocab_size=300))
    monkeypatch.setattr(bench_mfu, 'SHAPES', {**bench_mfu.SHAPES, '34M': dict(bench_mfu.SHAPES['11M'], n_embd=64)})
    bench_mfu.main([*corpus.args, '--rounds=1', '--only=steps', '--shapes=11M,34M'])
    out = capsys.readouterr().out
    assert re.findall(r'^1 layers, (\d+) wide', out, re.M) == ['32', '64'] and out.count('micro-batches of 16 x 32') == 2
    assert len(re.findall(r'^\| +ours, Muon \|', out, re.M)) == 2 and out.count('vocabulary 300') == 2


def test_the_shapes_have_the_sizes_they_are_named_for():
    sizes = [model.blueprint(GPTConfig(**shape, tie_embeddings=True)).params()['total'] for shape in bench_mfu.SHAPES.values()]
    assert sizes == pytest.approx([12.5e6, 33.6e6, 97.5e6], rel=0.01)


@pytest.mark.long
def test_which_micro_batch_is_best(corpus, tmp_path):
    code, out, err = script('bench_mfu.py', *corpus.args, '--rounds=1', '--micro_batches=2,8', cwd=tmp_path)
    assert code == 0, err
    speeds = {int(n): float(v.replace(',', '')) for n, v in re.findall(r'micro_batch_size +(\d+): +([\d,]+) tok/s', out)}
    assert set(speeds) == {2, 8} and f'best: --micro_batch_size={max(speeds, key=speeds.get)}' in out


def test_a_rival_that_fails_is_named():
    def broken():
        raise RuntimeError('no such card\nmore')
    times, faults = bench_mfu.seconds_each({'fine': lambda: sum(range(100)), 'broken': broken}, 'cpu', 3, 0.0001)
    assert len(times['fine']) == 3 and list(times) == ['fine'] and faults == {'broken': 'RuntimeError: no such card'}


def test_an_operation_of_ours_that_fails_is_a_line_too():
    def broken(x):
        raise RuntimeError('no such instruction')
    rows = bench_mfu.kernel_rows('loss', 1e3, 1e3, {'ours': broken, 'torch': lambda x: (x.exp(), x.sum())}, [torch.ones(3)], 2,
                                 dict(gemm=1e9, copy=1e9))
    assert [(row['rival'], row['fault']) for row in rows] == [('ours', 'RuntimeError: no such instruction'), ('torch', None)]
    assert rows[1]['both_ms'] > rows[1]['ms'] > 0


# ---- compiling without a GPU

@pytest.mark.long
def test_the_loss_of_many_word_classes_fits_a_4090(monkeypatch):
    pytest.importorskip('triton')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    command = "import bench_mfu, sys; bench_mfu.FAMILY = (); bench_mfu.main(sys.argv[1:])"
    done = subprocess.run([sys.executable, '-c', command, 'config/babylm.py', 'config/syntactic_smoothing.py', '--word_classes=200',
                           '--kernels=compile-only', '--compile_for=89'], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    sizes = [b['shared'] for b in json.loads(done.stdout) if b['kernel'] == 'soft_cross_entropy_kernel']
    assert sizes and max(sizes) <= 101376

@pytest.mark.parametrize('whole', [False, pytest.param(True, marks=pytest.mark.long)])
def test_kernels_compile_for_a_4090_within_its_limits(monkeypatch, whole):
    pytest.importorskip('triton')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    family = 'bench_mfu.FAMILY' if whole else '()'
    command = f"import bench_mfu, sys; bench_mfu.FAMILY = {family}; bench_mfu.main(sys.argv[1:])"
    done = subprocess.run([sys.executable, '-c', command, 'config/babylm.py', 'config/z_loss.py', '--kernels=compile-only',
                           '--compile_for=89'], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    builds, theirs = json.loads(done.stdout), {'soft_cross_entropy_kernel'}                          # which the idea brings
    all_of_them = {name for name in dir(bench_mfu.m) if name.endswith('_kernel')} | theirs
    assert {b['kernel'] for b in builds} == all_of_them if whole else theirs < {b['kernel'] for b in builds} <= all_of_them
    assert all(b['shared'] <= 101376 and b['stack'] <= 64 and not b['fp64'] and 0 < b['registers'] < 256 for b in builds)
    assert not any(b['over'] for b in builds) and len({b['case'] for b in builds}) == 1 + whole * len(bench_mfu.FAMILY)


def test_builds_over_the_limits_are_said(monkeypatch, capsys, tmp_path):
    row = dict(sm=89, kernel='some_kernel', case='64 wide', shared=7, registers=8, stack=0, fp64=False, over=[])
    rows = json.dumps([row, row | dict(case='65536 wide', stack=999, over=['spills'])])
    asked = []
    monkeypatch.setattr(bench_mfu, 'SHARED_MEMORY', {80: 1, 89: 1})
    monkeypatch.setattr(bench_mfu.subprocess, 'run', lambda command, **kw: asked.append(command) or SimpleNamespace(
        returncode=0, stderr='', stdout=rows if '89' in command[-1] else '[]'))
    monkeypatch.setattr(bench_mfu.m, 'triton', True)
    with pytest.raises(UserError, match='1 of 2 builds are over the limits'):
        bench_mfu.main(['--kernels=compile-only', '--n_embd=64', f'--json={tmp_path / "b.json"}'])
    out = capsys.readouterr().out
    assert re.search(r'^some_kernel +89 +7 +8 +999 +no   2 builds\n    OVER THE LIMIT, spills: 65536 wide$', out, re.M)
    assert [c[2:] for c in sorted(asked)] == [['--kernels=compile-only', '--n_embd=64', c[-2], f'--compile_for={sm}']
                                              for c, sm in zip(sorted(asked), (80, 89))]
    assert len(json.loads((tmp_path / 'b.json').read_text())['builds']) == 2


@pytest.mark.parametrize('wrong', [
    '--rounds=many', '--rounds=0', '--n_layers=2', '--n_kv_head=3', '--only=fast', '--micro_batches=two', '--micro_batches=3',
    '--micro_batches=0', '--kernels=nonsense', '--shapes=12M', '--beside=nowhere.py', '--init_from=resume', '--seeds=0'])
def test_arguments_that_cannot_work(corpus, wrong):
    with pytest.raises(UserError):
        bench_mfu.main([*corpus.args, wrong])


def test_matrix_products_are_counted():
    work, flops = bench_mfu.products(CONFIG, 512, 'cpu', torch.float32)
    assert work().shape == (512, 64) and flops == 2 * (512 * 64 * 256) * 2


# ---- the rival, config/plain_gpt2.py

def test_the_rival_is_a_gpt_2(corpus, capsys):
    run = opened(corpus, str(PLAIN))
    net, C, L, V = run.model, 64, 2, 257
    assert sum(p.numel() for p in net.parameters()) == (V + 64) * C + L * (12 * C * C + 13 * C) + 2 * C
    idx = torch.randint(0, V, (3, 64))
    each = net(idx, idx.roll(-1, 1), reduction='none')
    assert each.shape == idx.shape and each.mean().item() == pytest.approx(math.log(V), abs=0.1)
    torch.testing.assert_close(net(idx, idx.roll(-1, 1)), each.mean())
    other = idx.clone()
    other[:, 40] = (other[:, 40] + 1) % V
    assert torch.equal(net(other, other, 'none')[:, :40], net(idx, idx, 'none')[:, :40])        # causal
    block, x = net.blocks[0], torch.randn(2, 5, C)
    heads = zip(*(p.split(32, -1) for p in block.qkv(block.ln_1(x)).split(C, -1)))
    expected = x + block.proj(torch.cat([F.scaled_dot_product_attention(*t, is_causal=True) for t in heads], -1))
    torch.testing.assert_close(block(x), expected + block.down(F.gelu(block.up(block.ln_2(expected)))))
    prompt = idx[:1, :5]
    greedy = [int(new) for new in net.generate(prompt, 4, temperature=0)]
    assert greedy[3] == int(net.logits(net.trunk(torch.cat([prompt, torch.tensor([greedy[:3]])], 1)))[0, -1].argmax())
    assert [int(new) for new in net.generate(prompt, 4, min_p=1.0)] == greedy              # none but the likeliest
    assert len({int(new) for new in net.generate(prompt, 40, temperature=0, repetition_penalty=100)} & {*prompt[0].tolist()}) == 0
    told = capsys.readouterr().err
    sample.compile_for(SimpleNamespace(model=net, folder='run', state=dict(version=3)), 1)
    assert 'run goes on without compiled steps: config/plain_gpt2.py generates in a way of its own' in capsys.readouterr().err and not told


def test_the_rival_drops_out_in_training_alone(corpus):
    net, idx = opened(corpus, str(PLAIN), '--gpt2_dropout=0.5').model, torch.randint(0, 257, (3, 64))
    alike = opened(corpus, str(PLAIN)).model.eval()
    assert not torch.equal(net.trunk(idx), net.trunk(idx))
    torch.testing.assert_close(net.eval().trunk(idx), alike.trunk(idx))


def test_the_rival_learns(corpus):
    run = opened(corpus, str(PLAIN), '--micro_batch_size=4', '--learning_rate=3e-3')
    rows = run.stream.rows(0, 200, 8)
    assert rows.shape == (200, 9) and rows.dtype == np.int64 and len({*map(tuple, rows.tolist())}) > 150
    text = ''.join(map(chr, run.data.tokens['train']))
    assert all(''.join(map(chr, row)) in text for row in rows[:20])
    losses = []
    run.log = lambda loss, norm, rate, finite: losses.append(loss)
    for _ in range(40):
        run.step()
    run.batches.close()
    assert run.accum == 2 and losses[0] > 5 and losses[-1] < 3.5
    assert {g['weight_decay'] for g in run.optimizers[0].param_groups} == {0.1, 0.0} and len(run.optimizers) == 1
    assert run.rate(0.01) == 0.5 and run.rate(0.02) == pytest.approx(1) and run.rate(1.0) == pytest.approx(0.1)


# ---- the other rival, config/leaderboard.py

def test_the_leaderboard_s_model_is_what_its_table_says(corpus):
    run = opened(corpus, str(LEADERBOARD), *corpus.args)
    net, C, V = run.model, 64, 257
    assert net.params()['total'] == V * C + 2 * (12 * C * C + 2 * C) + C
    net.requires_grad_(False)
    idx = torch.randint(0, V, (3, 64))
    assert net(idx, idx.roll(7, 1)).item() == pytest.approx(math.log(V), abs=0.2)
    for gains in (net.gain, *(block.gains for block in net.blocks)):
        gains.add_(0.3 * torch.randn_like(gains))
    norm, x = (lambda x: F.rms_norm(x, (C,), eps=1e-6)), net.wte(idx)
    for block in net.blocks:
        h = block.gains[0] * norm(x)
        q, k, v = (part(h).unflatten(-1, (2, 32)).transpose(1, 2) for part in (block.attn.q, block.attn.k, block.attn.v))
        q, k = (model.rotary(part, net.cos, net.sin) for part in (q, k))
        x = x + block.attn.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + block.mlp.down(F.gelu(block.mlp.up(block.gains[1] * norm(x))))
    torch.testing.assert_close(net.trunk(idx), net.gain * norm(x), rtol=1e-4, atol=1e-4)


def test_the_leaderboard_s_recipe_is_adamw_on_one_cycle(corpus):
    run = opened(corpus, str(LEADERBOARD), *corpus.args)
    sgd = torch.optim.SGD([torch.zeros(1)])
    cycle = torch.optim.lr_scheduler.OneCycleLR(sgd, 1.0, total_steps=10_001, pct_start=0.1)
    for step in range(10_000):
        assert run.rate(step / 10_000) == pytest.approx(cycle.get_last_lr()[0], abs=2e-3)
        sgd.step()
        cycle.step()
    groups = {len(g['params']): g for g in run.optimizers[0].param_groups}
    assert len(run.optimizers) == 1 and {n: g['base_decay'] for n, g in groups.items()} == {3: 0.0, 13: 0.02}
    assert all(g['base_lr'] == 0.0072 * 4 for g in groups.values()) and run.optimizers[0].defaults['betas'] == (0.9, 0.95)
    assert sum(p.numel() for g in groups.values() for p in g['params']) == run.model.params()['total']


# ---- comparing whole runs

@pytest.fixture
def compare(corpus, tmp_path, monkeypatch, capsys):
    """--compare in this process and an empty folder, on the small corpus: what it prints, and the runs that it makes;
    with really=False none is started, and all fail."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', os.environ.get('OMP_NUM_THREADS', '2'))      # what is set in it goes
    monkeypatch.setattr(bench_mfu.signal, 'signal', lambda *a: None)
    (tmp_path / 'base.py').write_text('learning_rate = 0.01\n')
    (tmp_path / 'fast.py').write_text('learning_rate = learning_rate * 2\nmlp_hidden = 512\n')
    (tmp_path / 'broken.py').write_text('import train\nclass Run(train.Run):\n    def announce(self):\n        exit("nowhere")\n')
    (tmp_path / 'odd.py').write_text('n_kv_head = 3\n')
    (tmp_path / 'hard.py').write_text('import train\nfrom prepare_data import refuse\nclass Stream(train.Stream):\n'
                                      '    def __init__(self, *args):\n        refuse(True, "no order today")\n')
    make = bench_mfu.make

    def call(*args, really=True):
        made = []

        def making(run):
            made.append((run.name, run.seed))
            run.folder.mkdir(parents=True, exist_ok=True)
            if callable(really):
                return really(run)
            make(run) if really else setattr(run, 'fault', f'{run.name} {run.args[:3]}')
        monkeypatch.setattr(bench_mfu, 'make', making)
        bench_mfu.main(['--compare', *args, *corpus.args])
        return capsys.readouterr().out, made
    return call


def test_ideas_are_compared_with_their_base(compare, tmp_path):
    args = 'base.py', 'broken.py', 'fast.py', '--max_steps=3'
    out, made = compare(*args, '--seeds=1')
    assert made == [('base', 1), ('broken', 1), ('fast', 1)]
    assert '3 runs in out/compare/base, 3 to make, a budget of 1.5 hours' in out and 'fast: learning_rate=0.02, mlp_hidden=512' in out
    root = tmp_path / 'out' / 'compare' / 'base'
    base, fast = (json.loads((root / name / 'seed1' / 'result.json').read_text()) for name in ('base', 'fast'))
    assert fast['settings']['learning_rate'] == 0.02 and fast['settings']['seed'] == 1
    best = ['base', 'fast'] if base['val_bpb'] < fast['val_bpb'] else ['fast', 'base']
    expected = [('1', best[0], '1'), ('2', best[1], '1'), ('-', 'broken', '0')]
    assert re.findall(r'^\| +(\d|-) \| +(\w+) \| +(\d) ', out, re.M) == expected
    assert re.search(r'broken .* seed 1: exit code 1, nowhere', out) and 'broken: its own Run' in out
    assert '\nWithin noise: less than 2' in out and out.endswith((root / 'compare.md').read_text()) and re.search(r' fast .* within noise; \+\d+% parameters', out)
    by_source = [line for line in out[out.index('Bits per byte by source:'):].split('\n') if line.startswith('|')]
    assert re.fullmatch(r'\| +idea \| +notes \| tales +\|', by_source[0]) and len(by_source) == 4
    assert f'| {fast["val_bpb_per_source"]["notes"]:.4f} | {fast["val_bpb_per_source"]["tales"]:.4f}' in '\n'.join(by_source)
    row = next(row for row in json.loads((root / 'compare.json').read_text()) if row['name'] == 'fast')
    assert row['val_bpb'] == fast['val_bpb'] and row['tokens'] == 3 * 512 and row['active_params'] == fast['total_params']
    # finished runs stay, a failed one is tried again, more seeds take turns
    assert compare(*args, '--seeds=1', really=False)[1] == [('broken', 1)]
    assert compare(*args, '--idea_seeds=2', really=False)[1] == [
        ('broken', 1), ('base', 2), ('broken', 2), ('base', 3), ('fast', 2)]
    with pytest.raises(UserError, match=r'base/seed1 holds .* other settings: learning_rate \(was 0.01, now 0.03\)'):
        compare(*args, '--learning_rate=0.03', really=False)


def test_a_comparison_says_at_once_what_cannot_be_made(compare, tmp_path):
    with pytest.raises(UserError, match=r"(?s)cannot be made:\n  odd: .*n_head 2 is not a multiple of n_kv_head 3.*\n  hard: no order today"):
        compare('base.py', 'odd.py', 'fast.py', 'hard.py', '--max_steps=3')
    assert not list((tmp_path / 'out').rglob('log.txt'))


@pytest.mark.long
def test_a_comparison_goes_on_where_it_was_stopped(compare, corpus, tmp_path):
    args = 'base.py', '--max_steps=300', '--seeds=1', '--compare_dir=here'
    log = tmp_path / 'here' / 'base' / 'seed1' / 'metrics.jsonl'
    process, until = start('bench_mfu.py', '--compare', *args, *corpus.args, cwd=tmp_path), time.monotonic() + 90
    while not (log.exists() and log.read_text()) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75 and f'to go on, the same again: python bench_mfu.py --compare {" ".join(args)}' in err, err
    assert (log.parent / 'ckpt.pt').exists() and not (log.parent / 'result.json').exists()
    steps = torch.load(log.parent / 'ckpt.pt', weights_only=True)['steps']
    before = log.read_text().split('\n')[:steps]
    assert 0 < steps <= 300 and compare(*args)[1] == [('base', 1)]
    assert json.loads((log.parent / 'result.json').read_text())['steps'] == 300 and log.read_text().split('\n')[:steps] == before


def test_a_comparison_that_fails_begins_no_further_run(compare, monkeypatch):
    made, look = [], bench_mfu.look

    def failing(run):
        if run in made:
            raise UserError('the disk is gone')
        look(run)

    def making(run):
        made.append(run)
        time.sleep(0.5)
    monkeypatch.setattr(bench_mfu, 'look', failing)
    with pytest.raises(UserError, match='the disk is gone'):
        compare('base.py', 'fast.py', '--seeds=3', '--max_steps=3', really=making)
    assert 0 < len(made) < 3                     # of four


def test_runs_made_together_go_by_tokens(compare, tmp_path):
    with pytest.raises(UserError, match='do not go by its clock, give them --max_tokens'):
        compare('base.py', '--jobs=2', really=False)
    both = threading.Barrier(2, timeout=20)     # each waits until the other has begun
    out, made = compare('base.py', 'fast.py', '--jobs=2', '--seeds=1', '--max_steps=3',
                        really=lambda run: setattr(run, 'fault', f'met {both.wait()}'))
    assert sorted(made) == [('base', 1), ('fast', 1)] and re.search(r'met \d, fast, seed 1', out)
    assert os.environ['OMP_NUM_THREADS'] == str(max(1, os.cpu_count() // 2))


def fake(name, seed, val_bpb, total=100, **more):
    """A run as bench_mfu.py keeps it, finished with this result unless val_bpb is None."""
    result = dict(val_bpb=val_bpb, total_params=total, non_embedding_params=70, active_params=total, tokens=1000 * seed,
                  epochs=0.5, train_seconds=8.0, total_seconds=10.0, tok_per_sec=125.0, joules=None, commit='abc', hardware=dict(name='h'), ideas=[], protocol=1,
                  data=dict(fingerprint='f', val_bytes=9), config={},
                  val_share=1.0, evals=dict(coherence=dict(accuracy=0.5 + 0.1 * seed))) | more
    fault = '' if val_bpb else f'seed {seed}: no | yes'
    return SimpleNamespace(name=name, seed=seed, result=result if val_bpb else None, fault=fault)


def test_the_base_s_spread_tells_noise_from_gain(tmp_path):
    base = [fake('base', seed, val_bpb) for seed, val_bpb in enumerate((2.0, 2.1, 2.2), 1)]         # mean 2.1, sd 0.1
    ideas = [fake('good', 1, 1.86, joules=5000), fake('noise', 1, 1.94), fake('broken', 1, None), fake('large', 1, 2.6, 106),
             fake('good', 2, 1.78, joules=7000), fake('large', 2, None)]
    rows = bench_mfu.ranked(base + ideas)
    assert [row['name'] for row in rows] == ['good', 'noise', 'base', 'large', 'broken']
    good, noise, middle, large, broken = rows
    assert middle['sd'] == pytest.approx(0.1) and middle['tokens'] == 2000 and middle['coherence'] == pytest.approx(0.7)
    assert good['val_bpb'] == pytest.approx(1.82) and good['sd'] == pytest.approx(0.08 / 2 ** 0.5) and good['joules'] == 6000
    assert good['change'] == pytest.approx(-0.23 / 2.05) and good['in_sd'] == pytest.approx(-2.3) and good['notes'] == []
    assert noise['in_sd'] == pytest.approx(-0.6) and noise['notes'] == ['within noise'] and 'sd' not in noise
    assert large['in_sd'] == pytest.approx(6) and large['notes'] == ['seed 2: no | yes', '+6% parameters']
    assert broken['seeds'] == 0 and broken['notes'] == ['seed 1: no | yes']
    text = bench_mfu.keep_table(base + ideas, tmp_path)
    cells = [line.split(' | ') for line in text.split('\n')[:7]]
    assert {len(c) for c in cells} == {len(cells[0])} and (tmp_path / 'compare.md').read_text() == text + '\n'
    table = {c[1].strip(): [x.strip() for x in c] for c in cells}
    assert table['good'][2:7] == ['2', '1.8200', '0.0566', '-11.22%', '-2.3'] and '6,000' in table['good']
    assert '-' in table['base'] and table['base'][-1] == 'base |' and table['broken'][-1] == 'seed 1: no / yes |'
    mixed = bench_mfu.keep_table(base + [fake('other', 1, 2, commit='def')], tmp_path)
    assert 'Not all runs' not in text and 'the same commit: "abc", "def"' in mixed
    alone = bench_mfu.ranked(base[:1] + ideas)
    assert alone[0]['notes'] == ['within noise'] and alone[0]['in_sd'] is None and alone[0]['change'] == pytest.approx(-0.07)
    assert 'change' not in bench_mfu.ranked([fake('base', 1, None)] + ideas)[0]
    ideas[1].result['data'] = dict(val_bytes=8)                        # the text was prepared anew
    noise = next(row for row in bench_mfu.ranked(base + ideas) if row['name'] == 'noise')
    assert noise['notes'] == ['measured on other text'] and 'change' not in noise
    for run, sources in ((base[0], 'a'), (base[1], 'b')):
        run.result |= dict(val_bpb_per_source={sources: 1.0}, data=dict(val_bytes=len(sources) + 9 * (sources == 'b')))
    middle = next(row for row in bench_mfu.ranked(base[:2]) if row['name'] == 'base')
    assert (middle['val_bpb'], middle['seeds']) == (2.0, 1) and 'sd' not in middle and middle['per_source'] == dict(a=1.0)
    assert bench_mfu.code_of('def f(:') == 'def f(:'
    base[0].result['evals']['bias'] = dict(bias=0.2)                    # a measure that is no accuracy
    assert bench_mfu.fits(base[0].result['evals'], bench_mfu.RESULT['evals']) and 'bias' not in bench_mfu.keep_table(base[:1], tmp_path)


def test_all_mistakes_of_a_comparison_at_once(compare, tmp_path):
    for name, text in dict(a='n_layers = 3\n', b='budget_minutes = 5\nseed = 4\n', c='learning_rate = 0.5\n').items():
        (tmp_path / f'{name}.py').write_text(text)
    with pytest.raises(UserError) as e:
        compare('base.py', 'a.py', 'b.py', 'fast.py+c.py', '--init_from=run')
    assert str(e.value).split('\n  ')[1:] == [
        '--init_from=run: a comparison has its own init_from', 'a.py:1: no setting is called n_layers; did you mean n_layer?',
        'b.py:2: a comparison has its own seed', 'b has budget_minutes 5.0, the base 30.0: they must be equal']
    for args, said in (((), 'no config'), (('base.py', 'fast.py', 'fast.py'), 'two of base, fast, fast'),
                       (('base.py', '--seeds=0'), 'at least 1')):
        with pytest.raises(UserError, match=said):
            compare(*args)
    assert not (tmp_path / 'out').exists()


def test_what_ideas_of_one_stack_set_differently_is_said(compare, tmp_path):
    (tmp_path / 'c.py').write_text('learning_rate = 0.5\n')
    out, _ = compare('base.py', 'fast.py+c.py', '--seeds=1', really=False)
    assert re.findall('overruled: (.+)', out) == ['c.py:1 sets learning_rate to 0.5, fast.py:1 had set it to 0.02']
    assert "fast+c ['base.py', 'fast.py', 'c.py']" in out


def test_a_finished_run_of_other_ideas_is_not_taken_for_this_one(compare, corpus, tmp_path):
    compare('base.py', 'broken.py', '--seeds=1', really=False)
    folder = tmp_path / 'out' / 'compare' / 'base' / 'broken' / 'seed1'
    s, ideas = train.read_settings(['base.py'])
    whole = json.loads(json.dumps(fake('broken', 1, 1.0).result)) | dict(
        settings=dict(dataset=next(a for a in corpus.args if a.startswith('--dataset='))[10:]), ideas=['another'])
    (folder / 'result.json').write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"other settings: ideas \(was \['another'\], now \['broken'\]\)"):
        compare('base.py', 'broken.py', '--seeds=1', really=False)
    for text in '{"val', '[]', json.dumps({k: v for k, v in whole.items() if k != 'evals'}), '[' * 100_000:
        (folder / 'result.json').write_text(text)
        with pytest.raises(UserError, match='seed1/result.json is no result of train.py: delete it, or choose'):
            compare('base.py', 'broken.py', '--seeds=1', really=False)
    (folder / 'result.json').write_text(json.dumps(whole | dict(ideas=['broken'])))
    (folder / 'config').mkdir()
    text = (tmp_path / 'broken.py').read_text()
    for copy, same in ((f'"""What it did."""\n# and more\n{text}', True), (f'{text}\nmore = 1\n', False)):
        (folder / 'config' / 'broken.py').write_text(copy)
        with contextlib.nullcontext() if same else pytest.raises(UserError, match='a run of another broken.py than there is now'):
            compare('base.py', 'broken.py', '--seeds=1', really=False)


def test_how_a_run_ends_and_that_none_compiles_for_another(tmp_path, monkeypatch):
    def ends(code):
        (tmp_path / 'train.py').write_text(f"import os, sys; print('first')\nprint(os.environ['TORCHINDUCTOR_CACHE_DIR'], "
                                           f"sys.argv[1:], file=sys.stderr)\nsys.exit({code})")
        run = SimpleNamespace(folder=tmp_path / 'run', args=['a.py'], begun=code == 3, seed=1, fault='')
        bench_mfu.make(run)
        return run.fault
    monkeypatch.setattr(train, '__file__', str(tmp_path / 'train.py'))
    first, second = ends(2), ends(3)
    assert ends(0) == '' and first.endswith("['a.py']") and second.endswith("['a.py', '--init_from=resume']")
    caches = [re.match(r'seed 1: exit code \d, (/\S+) ', said)[1] for said in (first, second)]
    assert caches[0] != caches[1] and (tmp_path / 'run' / 'log.txt').read_text().count('first') == 3
    with pytest.raises(KeyboardInterrupt):                            # told to stop by someone else: all stops
        ends(75)


# ---- leaderboard

def keep(folder, val_bpb, total=100, text=10 ** 6, dataset='files:/data/babylm', metrics=(), **more):
    """A finished run as train.py leaves it, with this result."""
    folder.mkdir(parents=True)
    result = fake('', 1, val_bpb, total, config=dict(n_layer=4), hardware=dict(name='a card'), protocol=1,
                  data=dict(fingerprint='f00', val_bytes=text)).result | more
    settings = dict(dataset=dataset, learning_rate=0.02, n_layer=0)
    (folder / 'result.json').write_text(json.dumps(dict(settings=settings) | result))
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in metrics))


@pytest.fixture
def board(tmp_path, capsys):
    """--leaderboard of a folder with runs on three texts: what it prints, the rows of its Markdown, and its page's data."""
    def call(*args):
        bench_mfu.main(['--leaderboard', str(tmp_path / 'out'), *args])
        out, text = capsys.readouterr().out, (tmp_path / 'out' / 'leaderboard.md').read_text()
        assert out.startswith(text)
        table = [[cell.strip() for cell in line.strip('| ').split(' | ')] for line in text.split('\n') if line.startswith('| ')]
        return out, table, json.loads(re.search(r'id="data">(.*)</script>', (tmp_path / 'out' / 'leaderboard.html').read_text())[1])
    curve = [dict(step=n, elapsed_s=60 * n, progress=n / 4, train_loss=5 / n, evals=dict(coherence=dict(accuracy=0.5 + n / 9))) for n in (1, 2, 4)]
    keep(tmp_path / 'out' / 'small', 1.5, 50, metrics=curve, joules=900.0, ideas=['ema'])
    keep(tmp_path / 'out' / 'large', 1.4, 200, metrics=curve, joules=2000.0, val_share=0.25)
    keep(tmp_path / 'out' / 'a|b' / 'seed1', 1.6, 100)
    keep(tmp_path / 'out' / 'other', 0.6, 100, text=10, dataset='stories')
    keep(tmp_path / 'out' / 'newer', 1.3, 100, protocol=2)
    (tmp_path / 'out' / 'small' / 'report.html').write_text('')
    for name, text in dict(cut='{"val_bpb": 1', foreign='[1, 2]', nan='{"val_bpb": NaN, "total_params": 3}', words='{"val_bpb": "low"}').items():
        (tmp_path / 'out' / name).mkdir()
        (tmp_path / 'out' / name / 'result.json').write_text(text)
    return call


def test_the_leaderboard_ranks_what_can_be_compared(board, tmp_path):
    out, table, page = board()
    old, new = 'BPB babylm (1,000,000 bytes, protocol 1)', 'BPB babylm (1,000,000 bytes, protocol 2)'
    assert table[0][:6] == ['rank', 'model', 'parameters', old, 'BPB stories', new]
    assert [row[:2] + row[3:6] for row in table[2:7]] == [
        ['1', 'large', '1.4000', '-', '-'], ['2', 'small', '1.5000', '-', '-'], ['3', 'a/b/seed1', '1.6000', '-', '-'],
        ['1', 'other', '-', '0.6000', '-'], ['1', 'newer', '-', '-', '1.3000']]
    assert table[2][-1] == 'BPB on 25.0%'
    for name in ('cut', 'foreign', 'nan', 'words'):
        assert re.search(rf'out/{name}/result.json is left out, .*: \w+Error: ', out)
    blocks = {block['title']: block for block in page['blocks']}
    assert blocks['Left out']['text'].count('left out') == 4 and page['title'].endswith('5 runs')
    rows = {row['run']: row for row in blocks['Runs']['rows']}
    assert rows['small']['href'] == 'small/report.html' and rows['large']['href'] is None and rows['large']['coherence'] == 0.6
    assert [row['total_params'] for row in blocks['Published elsewhere']['rows']] == [11e6, 10.6e6, 11e6, 7.3e6]
    assert not {'compiled baseline'} & {*rows} and '1.31' in out and 'another machine' in out
    front = blocks['Bits per byte and joules, ' + old[4:]]
    assert front['path'] == [[900, 1.5, 'small'], [2000, 1.4, 'large']] and front['log_x']
    curve = blocks['Ability: coherence, ' + old[4:]]['series']
    assert [one['name'] for one in curve] == ['large', 'small', 'a/b/seed1'] and curve[0]['points'][0] == [1, pytest.approx(0.5 + 1 / 9)]
    assert blocks['Training loss, ' + old[4:]]['series'][1]['points'] == [[1, 5], [2, 2.5], [4, 1.25]]
    assert 'Validation, ' + old[4:] not in blocks                                    # no run has two
    assert 'By epoch, ' + old[4:] not in blocks and rows['large']['tokens_a_parameter'] == rows['large']['tokens'] / 200


def test_the_page_has_the_law_of_many_runs_and_tables_of_comparisons(board, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_sweep, 'DRAWS', 20)
    runs = [(size, epochs, members) for size in (50_000, 200_000, 800_000) for epochs in (0.5, 2, 8, 24) for members in (1, 3)]
    for i, (size, epochs, members) in enumerate(runs):
        bpb = 1.2 + 0.5 / (size / 1e5) ** 0.5 + 0.4 / (0.3 * epochs) ** 0.3 + 0.05 * max(epochs - 1, 0) ** 0.6 / members
        keep(tmp_path / 'out' / 'law' / str(i), bpb, size * members, text=7, dataset='little', epochs=epochs, tokens=100_000 * epochs, seed=i,
             val_loss=bpb * 3 * math.log(2), ideas=['snapshots'] if i == 0 else ['ensemble'])
        path = tmp_path / 'out' / 'law' / str(i) / 'result.json'
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | dict(settings=result['settings'] | dict(members=members))))
    rows = [dict(name='base', seeds=3, notes=['base'], val_bpb=2.0, sd=0.01, per_source=dict(a=1.0)),
            dict(name='idea', seeds=1, notes=['within noise', '+9% parameters'], val_bpb=1.9, change=-0.05, in_sd=None)]
    for name, text in dict(good=json.dumps(rows), cut='[{"name"', other='[{"name": 3, "notes": []}]', empty='[]').items():
        (tmp_path / 'out' / 'doll' / name).mkdir(parents=True)
        (tmp_path / 'out' / 'doll' / name / 'compare.json').write_text(text)
    blocks = {block['title']: block for block in board()[2]['blocks']}
    assert [title for title in blocks if title.startswith('Compared')] == ['Compared: doll/good']
    table = blocks['Compared: doll/good']
    assert [row['name'] for row in table['rows']] == ['base', 'idea'] and table['rows'][1]['notes'] == 'within noise; +9% parameters'
    assert table['rows'][1]['change'] == -5 and {type(c['digits']) for block in blocks.values() for c in block.get('columns', ())} <= {int, type(None)}
    assert [title for title in blocks if title.startswith('The law')] == ['The law, little']                   # of the others there are too few
    series = {one['name']: one for one in blocks['The law, little']['series']}
    assert '23 expects' in blocks['The law, little']['note'] and len(series) == 6
    one = series['3 x 200,000 parameters, 0.3 MB']
    assert sorted(x for x, _ in one['points']) == pytest.approx([0.5, 2, 8, 24]) and len(one['band'][0]) == 3
    for name, one in series.items():
        for x, y in one['points']:
            assert np.interp(x, *zip(*one['path'])) == pytest.approx(y, rel=0.1), name


def test_curves_by_epoch_are_of_validation_and_of_training_text(board, tmp_path):
    rows = [dict(step=n, progress=n / 4, elapsed_s=60 * n, tokens=10 * n, val_bpb=2 - n / 10, train_bpb=2 - n / 5) for n in (1, 2)]
    rows += [dict(step=4, progress=1, elapsed_s=300, tokens=40, val_bpb=1.4)]
    keep(tmp_path / 'out' / 'kept', 1.4, 200, metrics=rows, steps=4, epochs=12.0, tokens=40)
    keep(tmp_path / 'out' / 'moved', 1.5, 200, metrics=rows, steps=4, epochs=12.0, tokens=40, measured_step=2)
    page = board('--where=total_params == 200')[2]
    series = next(block for block in page['blocks'] if block['title'].startswith('By epoch'))['series']
    learned = [[3, 1.8], [6, 1.6]]
    assert {one['name']: one['points'] for one in series} == {
        'kept': [[3, 1.9], [6, 1.8], [12, 1.4]], 'kept, training text': learned, 'moved': [[3, 1.9], [6, 1.8]], 'moved, training text': learned}


@pytest.mark.parametrize('args, runs', [
    (['--where', 'total_params < 120 and protocol == 1'], 'small a/b/seed1 other'), (['--where=not learning_rate >= 0.02 or joules > 1000'], 'large'),
    (["--where='seed' in run"], 'a/b/seed1'), (['--where=40 < total_params / 2 < 60 and n_layer == 4'], 'a/b/seed1 newer other'),
    (["--where=dataset == 'babylm' and protocol == 1", '--sort=total_params'], 'small a/b/seed1 large'), (['--where=tokens and joules'], 'large small'),
    (["--where='ema' in ideas"], 'small'), (['--sort', '-joules', '--where=protocol == 1'], 'large small a/b/seed1 other')])
def test_filters_and_orders(board, args, runs):
    _, table, _ = board(*args)
    assert sorted(row[1] for row in table[2:2 + len(runs.split())]) == sorted(runs.split()) and table[2 + len(runs.split())][0] == 'model'
    if '--sort' in str(args):
        assert [row[1] for row in table[2:2 + len(runs.split())]] == runs.split()


@pytest.mark.parametrize('args, said', [
    (['--where=total_parms < 3'], "no result has 'total_parms'; did you mean total_params"), (['--where=total_params <'], 'must be comparisons'),
    (['--where=__import__("os").system("touched")'], "no result has '__import__'"), (['--where=run < 3'], 'must be comparisons'),
    (['--where=(lambda: 1)()'], 'must be comparisons'), (['--where=run.upper'], 'must be comparisons'), (['--where=tokens / 0 > 1'], 'must be'),
    (['--where=total_params < 0'], 'leaves no run'), (['--sort=val_pbp'], "--sort: no result has 'val_pbp'; did you mean val_bpb"),
    (['elsewhere'], 'takes one folder'), (['--rank=3'], 'takes one folder')])
def test_a_leaderboard_that_cannot_be(board, args, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        board(*args)
    assert not (tmp_path / 'out' / 'leaderboard.md').exists()
    with pytest.raises(UserError, match='no finished run'):
        bench_mfu.main(['--leaderboard', str(tmp_path / 'none')])


def test_the_pareto_front_is_what_nothing_beats():
    dice = np.random.default_rng(0)
    for n in range(60):
        points = [(int(x), int(y), i) for i, (x, y) in enumerate(dice.integers(0, 9, (n % 12, 2)))]
        best = {p[:2] for p in points if not any(q[:2] != p[:2] and q[0] <= p[0] and q[1] <= p[1] for q in points)}
        front = bench_mfu.pareto(points)
        assert sorted(best) == [p[:2] for p in front] and all(p in points for p in front)


def test_thinned_curves_are_means():
    assert bench_mfu.thinned([[i, 2 * i] for i in range(5)], 2) == [[1, 2], [3.5, 7]]
    assert bench_mfu.thinned([[1, 2], [3, 4]], 2) == [[1, 2], [3, 4]] and bench_mfu.thinned([], 60) == []


def test_a_table_of_text_has_short_numbers():
    row = dict(a=None, b=12345.6, c=0.123456, d=1234567, e='as it is', f=1e9)
    assert bench_mfu.text_table(dict(a=None, b=None, c=None, d=None, e=None, f=0), [row])[-1].strip('| ').split(' | ') == [
        '-', '12,346', '0.1235', '1,234,567', 'as it is', '1,000,000,000']

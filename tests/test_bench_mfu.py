"""bench_mfu.py: it runs, it measures the step of a run, and compares runs as it says."""
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
from conftest import ROOT, finish, script, start
from model import GPTConfig
from prepare_data import UserError

CONFIG = GPTConfig(vocab_size=257, bos=256, block_size=64, n_layer=2, n_head=2, n_embd=64)
PLAIN, LEADERBOARD = (ROOT / 'config' / f'{name}.py' for name in ('plain_gpt2', 'leaderboard'))


def opened(corpus, *args):
    """A run that is measured."""
    s, ideas = train.read_settings([*corpus.args, *args], bench_mfu.TABLES)
    return bench_mfu.measured(ideas)(s)


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


# ---- compiling without a GPU

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


@pytest.mark.slow
def test_every_kernel_compiles_for_every_card(tmp_path):
    pytest.importorskip('triton')
    code, out, err = script('bench_mfu.py', 'config/babylm.py', '--kernels=compile-only', cwd=ROOT, timeout=1500)
    assert code == 0, err
    assert set(re.findall(r'^attention_kernel +(\d+)', out, re.M)) == {'80', '89', '90', '120'}
    assert 'all within the limits' in out


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

def test_the_rival_is_a_gpt_2(corpus):
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


@pytest.fixture
def doll(corpus, tmp_path, monkeypatch, capsys):
    """--doll in an empty folder, none of whose runs is made: what it prints, and those runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_mfu.signal, 'signal', lambda *a: None)
    (tmp_path / 'base.py').write_text('learning_rate = 0.01\nn_layer = 6\nn_embd = 96\nn_head = 3\nblock_size = 128\n')
    (tmp_path / 'wide.py').write_text('mlp_hidden = 6 * n_embd\n')
    threads = torch.get_num_threads()

    def call(*args):
        runs = []
        monkeypatch.setattr(bench_mfu, 'make', lambda run: (runs.append(run), run.folder.mkdir(parents=True, exist_ok=True),
                                                            setattr(run, 'fault', 'not made')))
        kept = [a for a in corpus.args if not a.startswith(('--n_', '--block_size', '--tokens_per_step'))]
        bench_mfu.main(['--doll', *args, *kept, '--tokens_per_step=4096'])
        return capsys.readouterr().out, runs
    yield call
    torch.set_num_threads(threads)


def test_a_doll_has_the_ratios_of_the_run(doll, tmp_path):
    args = 'base.py', 'wide.py', '--max_tokens=1200000', '--minutes=0.15', '--text_words=40000', '--seeds=1'
    out, runs = doll(*args)
    sides = {line[:21].strip(): [float(n.replace(',', '')) for n in line[21:].split()] for line in out.split('\n')
             if re.fullmatch(r'[a-z ]{21} *[\d.,]+ +[\d.,]+', line)}
    for ratio, within in (('tokens a parameter', 0.03), ('epochs', 0.05), ('steps', 0.1)):
        card, ours = sides[ratio]
        assert ours == pytest.approx(card, rel=within), ratio
    assert sides['parameters'][1] < sides['parameters'][0] and sides['tokens'] == [1200000, runs[0].s.max_tokens]
    base, wide = runs
    assert [run.name for run in runs] == ['base+text_share+doll', 'wide'] and 0 < base.s.text_share < 1
    assert base.s.max_tokens % base.s.tokens_per_step == 0 and base.s.learning_rate == 0.01 and base.s.n_embd == sides['width'][1]
    assert wide.s.mlp_hidden == 6 * wide.s.n_embd and vars(wide.s) | dict(mlp_hidden=0, out_dir='') == vars(base.s) | dict(mlp_hidden=0, out_dir='')
    said = (tmp_path / 'out/doll/base/doll.py').read_text()
    assert [run.s.tokens_per_step for run in doll(*args, '--jobs=2')[1]] == [base.s.tokens_per_step] * 2
    assert (tmp_path / 'out/doll/base/doll.py').read_text() == said                # the same doll again
    for other in ('--minutes=3', '--card=L4', '--learning_rate=0.03'):
        with pytest.raises(UserError, match='doll.py is the doll of another command: .*--compare_dir'):
            doll(*args, other)


def dolls(folder, size, sd=0.004, card=10_000_000, **changes):
    folder.mkdir()
    rows = [dict(name='base', notes=['base'], val_bpb=2.0, seeds=3 if sd else 1) | (dict(sd=sd) if sd else {})]
    rows += [dict(name=name, notes=[], change=change, seeds=1) for name, change in changes.items()]
    (folder / 'compare.json').write_text(json.dumps(rows + [dict(name='failed', notes=['exit code 1'], seeds=0)]))
    (folder / 'doll.py').write_text(f'"""A doll.\n\n      a card   its doll\nparameters     {card:,}     {size:,}\n"""\n')
    return str(folder)


def test_what_dolls_predict(tmp_path, capsys):
    small = dolls(tmp_path / 'small', 10_000, good=-0.01, bad=0.03, odd=0.02)
    middle = dolls(tmp_path / 'middle', 100_000, None, good=-0.02, bad=0.03, odd=0.01, alone=0.5)
    large = dolls(tmp_path / 'large', 1_000_000, 0.003, good=-0.03, bad=0.03, odd=0.05)
    bench_mfu.main(['--predict', large, small, middle])
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in out.split('\n') if line.startswith('|')]
    sd = (((0.004 / 2) ** 2 + (0.003 / 2) ** 2) / 2) ** 0.5
    spread = 2.132 * 2 ** 0.5 * sd * (1 / 3 + 4 / 2) ** 0.5                      # four degrees of freedom; two decades from the middle
    assert rows[0] == ['idea', '10,000', '100,000', '1,000,000', 'card']
    assert rows[2] == ['good', '-1.00%', '-2.00%', '-3.00%', f'-4.0% ({-0.04 - spread:+.1%} to {-0.04 + spread:+.1%})']
    assert [row[0] for row in rows[2:]] == ['good', 'bad', 'odd'] and f'sd of the base {sd:.2%}' in out
    assert 'of 10,000 and 100,000: 1.00 of 3 ideas' in out and 'of 100,000 and 1,000,000: 0.50 of 3 ideas' in out
    assert bench_mfu.ranks([3, 1, 3, 2]).tolist() == [2.5, 0, 2.5, 1]


def test_nine_of_ten_intervals_hold_what_is_so():
    dice, x, inside = np.random.default_rng(1), np.log([1e4, 2e4, 4e4]), 0
    for _ in range(2000):
        base = dice.normal(size=(3, 3))                                          # three seeds at each of three sizes
        sd, y = math.sqrt(base.var(axis=1, ddof=1).mean()), dice.normal(size=3) - base[:, 0]
        there, error = bench_mfu.on_a_line(x, y, [sd * 2 ** 0.5] * 3, math.log(1e7))
        inside += abs(there) < bench_mfu.t_quantile(6) * error
    assert 0.88 < inside / 2000 < 0.92
    there, error = bench_mfu.on_a_line(np.array([0.0, 1, 2]), np.array([1.0, 3, 9]), [1e-3, 1e-3, 1e3], 2)
    assert there == pytest.approx(5, abs=1e-3) and error == pytest.approx(5 ** 0.5 * 1e-3, rel=1e-3)    # the noisy one hardly counts
    assert bench_mfu.t_quantile(5) == pytest.approx(2.015, rel=0.01) and bench_mfu.t_quantile(20) == pytest.approx(1.725, rel=0.01)


@pytest.mark.parametrize('args, said', [
    (['small'], 'takes two or more folders'), (['small', 'none'], r'none holds no doll.py with its compare.json'),
    (['small', 'same'], 'have not two ideas in common, each at another size'), (['small', 'other'], 'have not two ideas in common'),
    (['still', 'still2'], 'no folder has two seeds of its base')])
def test_dolls_that_predict_nothing(tmp_path, args, said):
    for name, size, sd, card in (('small', 10, 0.01, 99), ('same', 10, 0.01, 99), ('other', 20, 0.01, 98), ('still', 10, None, 99), ('still2', 20, None, 99)):
        dolls(tmp_path / name, size, sd, card, a=0.1, b=0.2)
    with pytest.raises(UserError, match=said):
        bench_mfu.main(['--predict', *(str(tmp_path / a) for a in args)])


def test_shapes_of_dolls():
    card = GPTConfig(n_layer=12, n_head=8, n_kv_head=4, n_embd=512, vocab_size=16384, block_size=512, tie_embeddings=True, mlp_hidden=1536)
    for size in (60_000, 1_000_000):
        c = GPTConfig(**{**vars(card), 'rotary_dim': 0, **bench_mfu.doll_shape(card, size, [2 ** k for k in range(9, 15)])})
        total = model.blueprint(c).params()['total']
        assert 0.8 < total / size < 1.25 and 4 <= c.n_layer <= 12 and c.mlp_hidden == 3 * c.n_embd
        assert 0.6 < c.vocab_size * c.n_embd / total / (16384 * 512 / model.blueprint(card).params()['total']) < 1.6
        assert c.n_head % c.n_kv_head == 0 and c.n_kv_head * 2 in (c.n_head, 2) and c.head_dim >= 16
    smallest = bench_mfu.doll_shape(card, 5_000, [512])
    assert (smallest['n_layer'], smallest['n_embd']) == (4, 32)


@pytest.mark.parametrize('args, said', [
    ((), 'names no config'), (('base.py', '--card=Voodoo'), "--card is 'Voodoo', whose peak is not known; there are RTX 4090"),
    (('base.py', '--minutes=0.02', '--text_words=1e9', '--max_tokens=300000'), r'is to read [\d,]+ tokens of text, [\d,]+ are here')])
def test_dolls_that_cannot_be(doll, args, said):
    with pytest.raises(UserError, match=said):
        doll(*args)


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
                  epochs=0.5, train_seconds=8.0, total_seconds=10.0, tok_per_sec=125.0, joules=None, commit='abc', hardware={}, ideas=[],
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


def test_a_finished_run_of_other_ideas_is_not_taken_for_this_one(compare, tmp_path):
    compare('base.py', 'broken.py', '--seeds=1', really=False)
    folder = tmp_path / 'out' / 'compare' / 'base' / 'broken' / 'seed1'
    s, ideas = train.read_settings(['base.py'])
    (folder / 'result.json').write_text(json.dumps(dict(settings={}, ideas=['another'], val_bpb=1)))
    with pytest.raises(UserError, match=r"other settings: ideas \(was \['another'\], now \['broken'\]\)"):
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
    result = fake('', 1, val_bpb, total, config=dict(n_layer=4), hardware=dict(name='a card'), protocol=1).result | more
    settings = dict(dataset=dataset, learning_rate=0.02, n_layer=0)
    (folder / 'result.json').write_text(json.dumps(dict(settings=settings, data=dict(fingerprint='f00', val_bytes=text)) | result))
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


# ---- sweeps

def points(seed=0, noise=0.003, sizes=(2, 4, 8, 16), tokens=(3, 10, 30), worse=1.0):
    """Finished runs of a grid that obey E = 0.9, A = 40, alpha = 0.3, B = 300, beta = 0.4; one is worse by a factor."""
    dice, runs = np.random.default_rng(seed), []
    for N in sizes:
        for D in tokens:
            bpb = (0.9 + 40 / (1e6 * N) ** 0.3 + 300 / (1e6 * D) ** 0.4) * math.exp(noise * dice.standard_normal())
            runs.append(fake(f'n_embd={64 * N},max_tokens={D}', 1, bpb * (1 if len(runs) != 5 else worse), active_params=1e6 * N,
                             tokens=1e6 * D, tok_per_sec=1e5 * N ** -0.7, budget_seconds=1800, settings={}))
    return runs


TRUE = dict(E=0.9, A=40, alpha=0.3, B=300, beta=0.4)


def test_a_planted_law_is_found_within_its_interval(monkeypatch):
    monkeypatch.setattr(bench_mfu, 'DRAWS', 100)
    said, found, charts = bench_mfu.law_of(points(noise=0))
    assert {k: v[0] for k, v in found.items()} == pytest.approx(TRUE, rel=1e-3) and 'within 0.0% of 12 runs' in said[0]
    N = np.geomspace(1e6, 64e6, 20000)                         # the best for 1800 seconds, by trying
    bpb = 0.9 + 40 / N ** 0.3 + 300 / (1800 * 1e5 * (N / 1e6) ** -0.7) ** 0.4
    best, least = map(float, re.search(r'best is N = (\S+)M \(.* with val_bpb (\S+) .*; tried were 2M to 16M', said[1]).groups())
    assert best == pytest.approx(N[bpb.argmin()] / 1e6, rel=1e-3) and least == pytest.approx(bpb.min(), rel=1e-3)
    xs, ys = np.array(charts[0]['series'][1]['path']).T
    assert ys == pytest.approx(0.9 + 40 / 4e6 ** 0.3 + 300 / xs ** 0.4) and len(charts[0]['series'][1]['points']) == 3
    at, low, high = np.array(charts[0]['series'][1]['band']).T
    assert at == pytest.approx(xs) and (low <= ys * 1.0001).all() and (high >= ys * 0.9999).all()
    inside = {k: 0 for k in TRUE}
    for seed in range(12):
        for k, (value, low, high) in bench_mfu.law_of(points(seed))[1].items():
            assert low < high and (k in 'AB' or 0.5 < value / TRUE[k] < 2)
            inside[k] += low <= TRUE[k] <= high
    assert min(inside.values()) >= 8 and sum(inside.values()) < 60       # nine of ten, and not all


def test_one_run_that_went_wrong_does_not_bend_the_law():
    fine, bent = (bench_mfu.law_of(points(noise=0.0005, worse=worse))[1] for worse in (1, 1.2))
    assert [bent[k][0] for k in ('E', 'alpha', 'beta')] == pytest.approx([fine[k][0] for k in ('E', 'alpha', 'beta')], rel=0.1)
    assert bent['alpha'][2] - bent['alpha'][1] > 2 * (fine['alpha'][2] - fine['alpha'][1])


@pytest.mark.parametrize('sizes, tokens, missing', [
    ((2, 4), (3, 10), '1 points, 1 sizes, 1 numbers of tokens, 2 runs'), ((2, 4, 8, 16), (3, 10), '1 numbers of tokens'),
    ((2, 2.04, 4), (3, 10, 30), '1 sizes'), ((), (), '5 points, 3 sizes, 3 numbers of tokens, 6 runs')])
def test_what_a_law_lacks_is_said(sizes, tokens, missing):
    said, found, charts = bench_mfu.law_of(points(sizes=sizes, tokens=tokens))
    assert said[0].endswith(f'missing: {missing}.') and (len(said), found, charts) == (1, {}, [])


def test_runs_that_do_not_determine_a_law_are_called_so():
    assert any('leave' in s and 'open threefold' in s for s in bench_mfu.law_of(points(noise=0.03))[0])
    assert not any('open threefold' in s for s in bench_mfu.law_of(points(noise=0.0003))[0])


def test_where_a_parabola_is_lowest():
    x = np.log([0.01, 0.02, 0.04, 0.08] * 2)
    noise = 0.004 * np.random.default_rng(0).standard_normal((2, 8))
    groups = {f'n_embd={width}': (x, 0.5 + 0.05 * (x - math.log(best)) ** 2 + rest)
              for (width, best), rest in zip({64: 0.03, 256: 0.015}.items(), noise)}
    said, found, charts = bench_mfu.valleys('learning_rate', groups)
    assert [math.exp(best[0]) for best in found.values()] == pytest.approx([0.03, 0.015], rel=0.05)
    low, high = map(float, re.search(r'Best learning_rate for n_embd=64: 0\.0\d+ \(([\d.]+) to ([\d.]+)\)', said[0]).groups())
    assert 0.027 < low < 0.03 < high < 0.033
    assert [series['name'] for series in charts[0]['series']] == [*groups]
    slope, low, high = map(float, re.search(r'each n_embd goes as n_embd to the power (\S+) \((\S+) to (\S+)\)',
                                            bench_mfu.moves('learning_rate', found)[0]).groups())
    assert low < -0.5 < high < 0 and slope == pytest.approx(-0.5, abs=0.05)
    assert 'leave open' in bench_mfu.moves('head_lr', dict(list(found.items())[:1]))[0]
    # nothing better inside the grid, and too few values
    falling = bench_mfu.valleys('head_lr', {'a': (x, 1 - 0.1 * x), 'b': (x[:2], x[:2]), 'c': (x, 1 + 0.1 * x - 0.05 * x ** 2)})
    assert falling[0][0] == 'No best head_lr for b: a parabola takes 3 values; missing: 1.' and falling[1] == {}
    assert falling[0][1] == 'Best head_lr for a: 0.08 or more (0.08 or more).' and 'c: 0.01 or less' in falling[0][2]
    assert 'no interval' in bench_mfu.valleys('head_lr', {'a': (x[:3], np.array([2.0, 1.0, 2.0]))})[0][0]


def test_a_law_is_one_of_the_best_settings():
    runs = [fake(f'n_embd={N},learning_rate={rate},max_tokens={D}', seed, bpb + seed / 100, active_params=N, settings={})
            for N in (10, 20) for D in (1, 2) for rate, bpb in ((0.1, 2.0), (0.2, 1.5 if N == 10 else 2.5)) for seed in (1, 2)]
    assert {(run.name, run.seed) for run in bench_mfu.tuned(runs)} == {
        (f'n_embd={N},learning_rate={0.2 if N == 10 else 0.1},max_tokens={D}', seed) for N in (10, 20) for D in (1, 2) for seed in (1, 2)}


@pytest.fixture
def sweep(corpus, tmp_path, monkeypatch, capsys):
    """--sweep in this process and an empty folder: what it prints, and the runs it makes; the one at which it is stopped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_mfu.signal, 'signal', lambda *a: None)
    monkeypatch.setattr(sample, 'write_page', lambda path, title, blocks: path.write_text(json.dumps([title, *blocks])), raising=False)
    monkeypatch.setattr(bench_mfu, 'DRAWS', 20)
    (tmp_path / 'base.py').write_text('learning_rate = 0.01\n')

    def call(*args, stop=None):
        made = []

        def making(run):
            made.append((run.name, run.seed))
            if len(made) == stop:
                raise KeyboardInterrupt
            run.folder.mkdir(parents=True, exist_ok=True)
            N, D = 1e4 * run.s.n_embd, run.s.max_tokens
            result = fake('', run.seed, 1 + 30 / N ** 0.3 + 200 / D ** 0.5 + 0.02 * math.log(run.s.learning_rate / 0.02) ** 2, N,
                          tokens=D, settings=vars(run.s), budget_seconds=1800, tok_per_sec=1e7 / N).result
            (run.folder / 'result.json').write_text(json.dumps(result))
        monkeypatch.setattr(bench_mfu, 'make', making)
        bench_mfu.main([*args, *corpus.args])
        return capsys.readouterr().out, made
    return call


def test_a_sweep_goes_on_where_it_was_stopped_and_then_fits(sweep, tmp_path):
    args = '--sweep', 'n_embd=32, 64,128; max_tokens=10**4,2*10**4,40000;learning_rate=1e-2,2e-2,0.04,0.08', 'base.py', '--seeds=1'
    with pytest.raises(train.Stopped, match='to go on, the same again: python bench_mfu.py --sweep .n_embd'):
        sweep(*args, stop=35)
    assert 'missing' in (tmp_path / 'out/sweep/base/sweep.md').read_text()
    out, made = sweep(*args)
    assert made == [(f'n_embd=128,max_tokens=40000,learning_rate={rate}', 1) for rate in (0.04, 0.08)]
    assert '36 runs in out/sweep/base, 2 to make' in out
    text, found = (tmp_path / 'out/sweep/base' / f'sweep.{kind}' for kind in ('md', 'json'))
    assert out.endswith(text.read_text()) and 'Best active_params for max_tokens=10000: 1.28M or more' in out
    found = json.loads(found.read_text())
    assert found['E'][0] == pytest.approx(1, abs=0.01) and found['beta'][0] == pytest.approx(0.5, abs=0.02) and len(found['rows']) == 36
    assert [*found['learning_rate'].values()] == pytest.approx([0.02] * 9, rel=0.02) and 'for each n_embd, max_tokens=10000 goes' in out
    title, words, *blocks = json.loads((tmp_path / 'out/sweep/base/sweep.html').read_text())
    assert title == 'A sweep of n_embd, max_tokens, learning_rate' and words['text'].split('\n') == found['said']
    assert [b['kind'] for b in blocks] == ['dots'] * 3 + ['table'] and [len(b['series']) for b in blocks[:3]] == [3, 3, 9]
    assert sweep(*args)[1] == []
    assert len(sweep('--sweep=n_embd=64', 'base.py', '--max_tokens=10000', '--seeds=1', '--compare_dir=here')[1]) == 1 and (tmp_path / 'here/n_embd=64').exists()


@pytest.mark.parametrize('grid, said', [
    ('n_embds=64', ['--n_embds=64: no setting is called n_embds; did you mean n_embd?']),
    ('learning_rate=-1;n_embd=64,wide', ['--learning_rate=-1: learning_rate is -1.0, it must be at least 0',
                                         "--n_embd=wide: n_embd is 'wide', it must be int, like 256"]),
    ('n_embd=62,64;n_head=1,2', ['n_embd=62,n_head=2: the model cannot be built: head_dim is 31, rotary embedding needs it even: change n_embd or n_head']),
    ('seed=1,2', ['--seed=1: a comparison has its own seed', '--seed=2: a comparison has its own seed']),
    ('block_size=96', ['block_size=96: tokens_per_step is 512, it must be a multiple of block_size 96 times 1 rank: try 576']),
    *((grid, None) for grid in ('', 'base.py', 'n_embd=', 'n_embd=64,', 'n_embd=64;', '=3', 'n_embd=64,6.4e1//1,64', 'n_embd=1;n_embd=2'))])
def test_grids_that_cannot_be(sweep, tmp_path, grid, said):
    with pytest.raises(UserError) as e:
        sweep('--sweep', grid, 'base.py')
    lines = str(e.value).split('\n  ')
    assert lines[1:] == said if said else 'it must be like "n_embd=128,192;head_lr=1e-3,2e-3", nothing twice' in lines[0]
    assert not (tmp_path / 'out').exists()


# ---- the planner

TRULY = dict(E=math.log(1.2), A=math.log(0.8), alpha=0.25, cost=1.5, B=math.log(0.6), beta=0.3, C=math.log(0.1), a=0.1, b=0.6, g=0.2, kappa=0.8, thin=4)
REPEATED = [TRULY[name] for name in bench_mfu.REPEATED]


def rows_of_dolls(noise=0.0, seed=0):
    """Runs that obey a law of repeated text: four sizes, text read 1 to 40 times, some with dropout, some of members."""
    text = [(1.1e5, 4), (1.1e5, 12), (1.1e5, 40), (4.4e5, 1), (4.4e5, 4), (4.4e5, 12), (1.76e6, 1), (1.76e6, 4), (7e6, 1)]
    rows = [(N, U, U * R, 1, 0) for N in (65e3, 135e3, 286e3, 572e3) for U, R in text]
    rows += [(135e3, U, U * R, 1, 0.1) for U, R in text[1:5:2] + text[5:8:2]]
    rows += [(N, U, U * 12, K, 0) for N, U, K in ((65e3, 1.1e5, 4), (135e3, 4.4e5, 3), (135e3, 1.1e5, 2))]
    bpb = np.exp(bench_mfu.law(np.array([REPEATED]), bench_mfu.repeated(*np.array(rows).T))[0][0])
    return np.c_[rows, bpb * np.exp(noise * np.random.default_rng(seed).standard_normal(len(rows)))]


def test_the_law_of_repeated_text_by_hand():
    N, U, D, K = 2e5, 5e5, 3e6, 3
    heart = 0.1 * math.exp(-0.4) * 4 ** 0.1 * (25 / 6) ** (0.6 + 0.2 * math.log(4)) / 3 ** 0.8     # h = 2 / 0.5, R = 6
    each = [1.2, 0.8 * math.exp(0.15) / 2 ** 0.25, 0.6 / 3 ** 0.3, heart]
    total, shares = bench_mfu.law(np.array([REPEATED] * 2), bench_mfu.repeated(N, U, D, K, 0.1)[None])
    assert np.exp(total) == pytest.approx(sum(each)) and shares[0, 0] * sum(each) == pytest.approx(each)

    def by_heart(text, read):
        total, shares = bench_mfu.law(np.array([REPEATED]), bench_mfu.repeated(N, text, read, 1, 0.0)[None])
        return float(np.exp(total[0, 0]) * shares[0, 0, 3])
    assert by_heart(D, 0.5 * D) < 0.003 < 0.1 < by_heart(U, D)
    assert by_heart(1e8, 9e8) == pytest.approx(by_heart(1e9, 9e9))      # no less than runs have shown


def test_a_planted_law_of_repeated_text_is_found(monkeypatch):
    monkeypatch.setattr(bench_mfu, 'DRAWS', 40)
    p, residuals = bench_mfu.law_of_repeats(rows_of_dolls())
    assert p[0] == pytest.approx(REPEATED, abs=0.02) and abs(residuals).max() < 1e-4
    x, inside = bench_mfu.repeated([1e5, 3e5], [3e5, 2e5], [3e6, 2e6], [1, 4], [0, 0.1]), []        # of no run
    expected = np.exp(bench_mfu.law(np.array([REPEATED]), x)[0][0])
    for seed in range(6):
        bpb = np.exp(bench_mfu.law(bench_mfu.law_of_repeats(rows_of_dolls(0.003, seed))[0], x)[0])
        low, high = np.quantile(bpb[1:], (0.05, 0.95), axis=0)
        inside += [*(low < expected) & (expected < high)]
        assert bpb[0] == pytest.approx(expected, rel=0.01) and (high < 1.03 * low).all()
    assert sum(inside) >= 7                                            # of 12, nine of ten to be expected


@pytest.fixture
def choices(corpus):
    s, ideas = train.read_settings([*corpus.args, '--block_size=64', '--micro_batch_size=4'])
    here = bench_mfu.Choices(s, corpus.args, ideas, rows_of_dolls(), 1e6)
    here.seconds = {70000: 1e-5, 200000: 3e-5}
    return here


def test_what_a_plan_chooses_from(choices):
    assert len(choices.shapes) >= 6 and choices.sizes.max() <= 1e6
    for size, shape in choices.shapes:
        made = model.blueprint(bench_mfu.replace(choices.config, **shape))
        assert made.params()['total'] == size and shape['block_size'] == 64 and shape['n_embd'] // shape['n_head'] in (16, 32, 64)
        assert shape['mlp_hidden'] == 4 * shape['n_embd'] and shape['n_layer'] >= 4
    at = int(np.searchsorted(choices.sizes, 100000))
    times = choices.seconds_a_token()
    assert 70000 < choices.sizes[at] < 200000 < choices.sizes[-1]
    assert times[at] == pytest.approx(1e-5 * 3 ** (math.log(choices.sizes[at] / 70000) / math.log(20 / 7)))
    assert times[-1] == pytest.approx(3e-5 * choices.sizes[-1] / 200000)
    choices.suppose(1e9)
    assert choices.seconds_a_token()[0] == pytest.approx(model.blueprint(bench_mfu.replace(choices.config, **choices.shapes[0][1])).flops_per_token() / 1e9)


def test_a_plan_is_the_best_of_all(choices):
    p, times = np.array([REPEATED]), choices.seconds_a_token()
    rows = choices.best(p, 30)
    bpb = np.exp(bench_mfu.law(p, bench_mfu.repeated(*rows.T[:5]))[0][0])
    assert (np.diff(bpb) >= 0).all() and (rows[:, 0] * rows[:, 3] <= 1e6).all() and {*rows[:, 3]} > {1, 2} and {*rows[:, 4]} == {0, 0.1}
    for size, text, read, members, thin, which in rows[::50]:
        assert size == choices.sizes[int(which)] and text == choices.text['bytes']
        assert read <= 1.001 * 30 / times[int(which)] / members * choices.bytes_a_token[int(which)]
    # with little text it ends early or trains several; with much it reads for all of its time
    poor, rich = choices.best(p, 30, 0.01)[0], choices.best(p, 30, 1000)[0]
    assert rich[3] == 1 and choices.settings(rich, 30)['max_tokens'] == 0
    assert poor[3] > 1 or poor[4] > 0 or choices.settings(poor, 30)['max_tokens']
    step = choices.settings(rich, 30)['tokens_per_step']
    assert step % 256 == 0 and -256 < step - 640 * (rich[2] / choices.bytes_a_token[int(rich[5])] / 1e6) ** 0.4 < 33
    choices.on_card = True
    assert choices.step_of(1e6) == 512 and choices.step_of(6e6) == 1280 and choices.step_of(1) == choices.s.tokens_per_step == 512


def test_a_plan_from_end_to_end(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_mfu, 'DRAWS', 20)
    np.savetxt('law.tsv', rows_of_dolls(0.002), delimiter='\t', header='\t'.join(bench_mfu.AS_RUN), comments='')
    (tmp_path / 'base.py').write_text('n_embd = 64\n')
    args = ['--plan', 'base.py', *corpus.args, '--plan_runs=law.tsv', '--budget_minutes=0.5', '--most_params=2e5', '--write=planned.py']
    bench_mfu.main(args)
    out = capsys.readouterr().out
    assert ' tokens a second here' in out and 'twice the time' in out and 'law.tsv' in out and 'python train.py base.py planned.py' in out
    row = next(line for line in out.split('\n') if line.startswith('| ') and 'the plan' in line).strip('| ').split('|')
    s, ideas = train.read_settings(['base.py', 'planned.py'])
    assert [s.n_layer, s.n_embd, s.vocab_size] == [int(cell.replace(',', '')) for cell in row[1:4]]
    assert int(row[5]) == getattr(s, 'members', 1) and float(row[6]) == getattr(s, 'dropout', 0) and int(row[7].replace(',', '')) == s.tokens_per_step
    with pytest.raises(UserError, match='--write is planned.py, it must be a new file'):
        bench_mfu.main(args)
    page = re.search(r'id="data">(.*?)</script>', (tmp_path / 'out/plan/base/plan.html').read_text(), re.S)[1]
    text, times, again = json.loads(page)['blocks']
    assert len(times['series'][0]['band']) == 9 and [len(one['points']) for one in again['series']] == [40] * 3
    bits = [y for _, y in times['series'][0]['points']]
    assert (np.diff(bits) <= 1e-9).all() and bits[-1] < bits[0]                                # more time, no more bits


def test_a_plan_goes_with_what_it_is_for(corpus, tmp_path, monkeypatch, capsys):
    """Of a config that has members the plan's are the only ones; what does not go with members has none; what was typed is kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_mfu, 'DRAWS', 5)
    table, ensemble = rows_of_dolls(0.002), str(ROOT / 'config' / 'ensemble.py')
    np.savetxt('law.tsv', table, delimiter='\t', header='\t'.join(bench_mfu.AS_RUN), comments='')
    s, ideas = train.read_settings(args := [*corpus.args, ensemble, '--members=3'])
    here = bench_mfu.Choices(s, args, ideas, table, 1e6)
    assert s.members == 1 and here.sizes.min() < 70000
    here.suppose(1e9)
    one, several = (next(row for row in here.best(np.array([REPEATED]), 30) if (row[3] > 1) == many) for many in (False, True))
    assert [here.settings(row, 30)['members'] for row in (one, several)] == [1, several[3]]
    s, ideas = train.read_settings(args := [*corpus.args, str(PLAIN)])
    assert {*bench_mfu.Choices(s, args, ideas, table, 1e6).members} == {1}
    assert {*bench_mfu.Choices(s, args, ideas, table[table[:, 4] == 0], 1e6).thinned} == {0}
    with pytest.raises(UserError, match='--most_params is 50,000, and no model in these proportions has so few'):
        bench_mfu.Choices(s, args, ideas, table, 5e4)
    bench_mfu.main(['--plan', ensemble, *corpus.args, '--plan_runs=law.tsv', '--card=RTX 4090', '--seed=7', '--write=mine.py', '--most_params=1e6'])
    assert 'RTX 4090 at 45% of its peak' in capsys.readouterr().out
    written = (tmp_path / 'mine.py').read_text()
    assert 'seed = 7' in written and 'members = ' in written and 'config.ensemble' not in written
    train.read_settings([ensemble, 'mine.py'])


def test_runs_that_a_plan_goes_by(tmp_path):
    result = dict(tokens=1000, val_loss=2 * math.log(2), val_bpb=1.0, epochs=4, total_params=300, settings=dict(members=3), data=dict(val_bytes=9))
    assert bench_mfu.as_run(result) == pytest.approx([100, 500, 2000, 3, 0, 1])
    known = bench_mfu.runs_known(bench_mfu.RUNS)
    assert len(known) >= 40 and (known > 0)[:, :4].all() and (known[:, 2] / known[:, 1]).max() > 30 and {0, 0.1} == {*known[:, 4]} and {1, 3, 4} <= {*known[:, 3]}
    (tmp_path / 'few').mkdir()
    (tmp_path / 'few' / 'result.json').write_text(json.dumps(result))
    for args, said in ((['--plan'], '--plan names no config'), (['--plan', 'a.py', f'--plan_runs={tmp_path}/none'], 'must be a folder of runs'),
                       (['--plan', 'a.py', f'--plan_runs={tmp_path}/few'], 'holds 1 finished runs'), (['--plan', 'a.py', '--write=a-plan.py'], 'with a name like my_plan.py')):
        with pytest.raises(UserError, match=re.escape(said)):
            bench_mfu.main(args)

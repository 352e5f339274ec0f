"""bench_mfu.py: it runs, its rival is what it says, and both are measured on the same step."""
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench_mfu
import train
from conftest import ROOT, script
from model import GPTConfig
from prepare_data import UserError

CONFIG = GPTConfig(vocab_size=257, bos=256, block_size=64, n_layer=2, n_head=2, n_embd=64)


def test_everything_is_measured(corpus, tmp_path):
    code, out, err = script('bench_mfu.py', *corpus.args, '--rounds=2', '--json=bench.json', cwd=tmp_path)
    assert code == 0, err
    result = json.loads((tmp_path / 'bench.json').read_text())
    rows = {row['name']: row for row in result['rows']}
    assert {'ours, Muon', 'ours, AdamW', 'plain GPT-2, fp32'} <= set(rows)
    for name, row in rows.items():
        assert re.search(rf'^{re.escape(name)} ', out, re.M)
        assert 0 < row['min_ms'] <= row['step_ms'] <= row['max_ms'] and row['of_gemm'] > 0
        assert row['tok_per_sec'] == pytest.approx(512 / row['step_ms'] * 1e3)
        assert row['mfu'] is None                                  # a CPU is not in the table of peaks
    assert rows['plain GPT-2, fp32']['speedup'] == 1 and all(v > 0 for v in result['gemm'].values())
    assert 0 <= rows['ours, Muon']['data_wait'] < 1 and 'data-sheet peak not known' in out
    assert set(result['machine']['products']) == {'qkv', 'attention out', 'MLP up', 'MLP down', 'head'}
    assert 1 < result['attended'] < 32.5                           # documents are shorter than the 64 tokens of a row
    assert sum(result['where']['shares'].values()) == pytest.approx(1) and result['where']['shares']['matrix products'] > 0.02
    kernels = {(r['operation'], r['rival']): r for r in result['kernels']}
    assert len({operation for operation, _ in kernels}) == 5
    for (operation, rival), row in kernels.items():
        assert not row['fault'] and 0 < row['both_min_ms'] <= row['both_ms'] <= row['both_max_ms'] and row['floor_both_ms'] > 0
        assert rival in out and (rival != 'ours' or row['versus_ours'] == 1)
    assert 'attention, qk_norm, rms_norm, cross_entropy, mlp: torch, this is not a GPU' in out


def test_flops_use_the_positions_really_attended_to(corpus, capsys):
    s = train.read_settings([*corpus.args, '--n_layer=1'])
    data = corpus.open()
    config = train.model_config(s, data)
    runners = {'ours, Muon': (bench_mfu.Ours(s, config, data, 8, 'cpu', torch.float32, False), torch.float32)}
    runners['plain, y'] = bench_mfu.PlainTrainer(config, data.tokens['train'], s, 8, 'cpu', False, compile=False), torch.float32
    rows, _, _ = bench_mfu.compare(runners, s, config, 10.0, 8, 'cpu', 1, peak=1e12)
    for row, attended in zip(rows, (10.0, 32.5)):              # the rival has no documents to stay within
        assert row['mfu'] == pytest.approx(row['tok_per_sec'] * config.flops_per_token(attended) / 1e12)
        assert row['mfu_palm'] == pytest.approx(row['tok_per_sec'] * config.flops_per_token(64) / 1e12)


def test_shapes_take_the_place_of_the_configs(corpus, capsys, monkeypatch):
    monkeypatch.setitem(bench_mfu.SHAPES, '11M', dict(n_layer=1, n_embd=32, n_head=1, block_size=32, vocab_size=300))
    monkeypatch.setattr(bench_mfu, 'SHAPES', {**bench_mfu.SHAPES, '34M': dict(bench_mfu.SHAPES['11M'], n_embd=64)})
    bench_mfu.main([*corpus.args, '--rounds=1', '--only=steps', '--shapes=11M,34M'])
    out = capsys.readouterr().out
    assert re.findall(r'^1 layers, (\d+) wide', out, re.M) == ['32', '64'] and out.count('micro-batches of 16 x 32') == 2
    assert len(re.findall(r'^ours, Muon ', out, re.M)) == 2


def test_the_shapes_have_the_sizes_they_are_named_for():
    sizes = [GPTConfig(**shape, tie_embeddings=True).params()['total'] for shape in bench_mfu.SHAPES.values()]
    assert sizes == pytest.approx([12.5e6, 33.6e6, 97.5e6], rel=0.01)


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

def compiled(tmp_path, *args):
    """bench_mfu.py's compile check for one architecture, whatever it is on by default."""
    code = 'import sys, bench_mfu as b; b.FAMILY = b.FAMILY[:int(sys.argv[1])]; b.SHARED_MEMORY = {89: b.SHARED_MEMORY[89]};' \
           'b.compile_only.__defaults__ = ((89,),); b.main(["--kernels=compile-only"] + sys.argv[2:])'
    return subprocess.run([sys.executable, '-c', code, *args], cwd=ROOT, capture_output=True, text=True, timeout=500)


def test_kernels_compile_for_a_4090_within_its_limits(tmp_path):
    pytest.importorskip('triton')
    done = compiled(tmp_path, '0', 'config/babylm.py', f'--json={tmp_path / "builds.json"}')
    assert done.returncode == 0, done.stderr
    builds = json.loads((tmp_path / 'builds.json').read_text())['builds']
    assert {b['kernel'] for b in builds} == {name for name in dir(bench_mfu.m) if name.endswith('_kernel')}
    assert all(b['shared'] <= 101376 and b['stack'] <= 64 and not b['fp64'] and 0 < b['registers'] < 256 for b in builds)
    assert 'all within the limits' in done.stdout


def test_a_build_over_the_limits_fails(tmp_path):
    pytest.importorskip('triton')
    done = compiled(tmp_path, '0', '--n_embd=65536', '--n_head=1', '--head_dim=32', '--mlp_hidden=32', '--vocab_size=64',
                    '--block_size=16')
    assert done.returncode and 'over the limits' in done.stderr and 'OVER THE LIMIT, spills: 65536 wide' in done.stdout


@pytest.mark.slow
def test_every_kernel_compiles_for_every_card(tmp_path):
    pytest.importorskip('triton')
    code, out, err = script('bench_mfu.py', 'config/babylm.py', '--kernels=compile-only', cwd=ROOT, timeout=1500)
    assert code == 0, err
    assert set(re.findall(r'^attention_kernel +(\d+)', out, re.M)) == {'80', '89', '90', '120'}


def test_the_rival_trains_and_is_evaluated_as_we_are(corpus, capsys, monkeypatch):
    def compile(*args, **kwargs):
        pytest.fail('compiled with --compile=off')
    monkeypatch.setattr(torch, 'compile', compile)
    bench_mfu.main([*corpus.args, '--rival_lr=1e-3', '--budget_minutes=0.05'])
    said = dict(re.findall(r'^(\w+): (.+)$', capsys.readouterr().out, re.M))
    assert 0.1 < float(said['val_bpb']) < 8.5 and int(said['steps']) > 0 and float(said['val_share']) == 1
    assert float(said['train_seconds']) < 60 and float(said['learning_rate']) == 1e-3


@pytest.mark.parametrize('wrong', [
    '--rounds=many', '--rounds=0', '--rival_lr=fast', '--n_layers=2', '--n_kv_head=3', '--only=fast', '--micro_batches=two',
    '--micro_batches=3', '--kernels=nonsense', '--shapes=12M'])
def test_arguments_that_cannot_work(corpus, wrong):
    with pytest.raises(UserError):
        bench_mfu.main([*corpus.args, wrong])


def test_the_rival_is_a_gpt_2():
    torch.manual_seed(0)
    model = bench_mfu.PlainGPT(CONFIG)
    C, L = 64, 2
    assert sum(p.numel() for p in model.parameters()) == (257 + 64) * C + L * (12 * C * C + 13 * C) + 2 * C
    idx = torch.randint(0, 257, (3, 64))
    each = model(idx, idx.roll(-1, 1), reduction='none')
    assert each.shape == idx.shape and each.mean().item() == pytest.approx(math.log(257), abs=0.1)
    torch.testing.assert_close(model(idx, idx.roll(-1, 1)), each.mean())
    other = idx.clone()
    other[:, 40] = (other[:, 40] + 1) % 257
    assert torch.equal(model(other, other, 'none')[:, :40], model(idx, idx, 'none')[:, :40])        # causal
    block = model.blocks[0]
    x = torch.randn(2, 5, C)
    expected = x + block.proj(torch.cat([F.scaled_dot_product_attention(*t, is_causal=True) for t in zip(
        *(p.split(32, -1) for p in block.qkv(block.ln_1(x)).split(C, -1)))], -1))
    torch.testing.assert_close(block(x), expected + block.down(F.gelu(block.up(block.ln_2(expected)))))


def test_the_rival_learns():
    s = train.read_settings(['--tokens_per_step=512', '--n_layer=2'])
    tokens = np.tile(np.arange(50, dtype=np.uint16), 100)
    rival = bench_mfu.PlainTrainer(CONFIG, tokens, s, 4, 'cpu', False, learning_rate=3e-3, compile=False)
    idx, targets = rival.batch()
    assert idx.shape == (4, 64) and torch.equal((idx + 1) % 50, targets) and rival.accum == 2
    losses = [rival.step() for _ in range(40)]
    assert losses[0] > 5 and losses[-1] < 1.5


def test_matrix_products_are_counted():
    assert 1e8 < bench_mfu.matmul_flops(CONFIG, 512, 'cpu', torch.float32, 0.2) < 1e14

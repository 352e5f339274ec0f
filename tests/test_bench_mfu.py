"""bench_mfu.py: it runs, its rival is what it says, and both are measured on the same step."""
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench_mfu
import train
from conftest import script
from model import GPTConfig
from prepare_data import UserError

CONFIG = GPTConfig(vocab_size=257, bos=256, block_size=64, n_layer=2, n_head=2, n_embd=64)


def test_a_row_for_each_contestant(corpus, tmp_path):
    code, out, err = script('bench_mfu.py', *corpus.args, '--rounds=2', '--json=bench.json', cwd=tmp_path)
    assert code == 0, err
    result = json.loads((tmp_path / 'bench.json').read_text())
    rows = {row['name']: row for row in result['rows']}
    assert {'ours, Muon', 'ours, AdamW', 'plain GPT-2, fp32'} <= set(rows)
    for name, row in rows.items():
        assert re.search(rf'^{re.escape(name)} ', out, re.M)
        assert 0 < row['min_ms'] <= row['step_ms'] <= row['max_ms'] and row['of_gemm'] > 0
        assert row['tok_per_sec'] == pytest.approx(512 / row['step_ms'] * 1e3)
    assert rows['plain GPT-2, fp32']['speedup'] == 1 and all(v > 0 for v in result['gemm'].values())


def test_the_rival_trains_and_is_evaluated_as_we_are(corpus, capsys, monkeypatch):
    def compile(*args, **kwargs):
        pytest.fail('compiled with --compile=off')
    monkeypatch.setattr(torch, 'compile', compile)
    bench_mfu.main([*corpus.args, '--rival_lr=1e-3', '--budget_minutes=0.05'])
    said = dict(re.findall(r'^(\w+): (.+)$', capsys.readouterr().out, re.M))
    assert 0.1 < float(said['val_bpb']) < 8.5 and int(said['steps']) > 0 and float(said['val_share']) == 1
    assert float(said['train_seconds']) < 60 and float(said['learning_rate']) == 1e-3


@pytest.mark.parametrize('wrong', ['--rounds=many', '--rounds=0', '--rival_lr=fast', '--n_layers=2', '--n_kv_head=3'])
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

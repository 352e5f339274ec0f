"""What a user types first, on a card: skipped where there is none. The kernels' own tests use a card by themselves."""
import json
import re

import pytest
import torch

import sample
from conftest import ROOT, STEPS, in_two_parts, script

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
RUN = ['--device=cuda', *STEPS, '--n_embd=64', '--n_head=2', '--head_dim=32', '--eval_interval=0.5']


def done(*args, cwd):
    code, out, err = script(*args, cwd=cwd, timeout=300)
    assert code == 0, err
    return out, err


@pytest.mark.parametrize('kernels', ['all', 'none'])
@pytest.mark.parametrize('compiled', ['on', 'off'])
def test_a_run_and_what_it_says(corpus, tmp_path, kernels, compiled):
    out, err = done('train.py', *corpus.args, *RUN, f'--kernels={kernels}', f'--compile={compiled}', '--out_dir=run', cwd=tmp_path)
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['hardware']['device'] == 'cuda' and result['steps'] == 20 and 0 < result['val_bpb'] < 9 and not result['skipped_steps']
    assert 'does not work here' not in out and ('torch, it does not run here' not in out and 'its result differs' not in out)
    done('sample.py', 'run', '--max_new_tokens=20', '--temperature=0', cwd=tmp_path)
    out, _ = done('sample.py', 'run', '--eval=bpb', cwd=tmp_path)
    assert abs(float(re.search(r'bpb bpb: ([\d.]+)', out)[1]) - result['val_bpb']) < 0.01


def test_the_kernels_and_the_compiler_learn_what_torch_learns(corpus, tmp_path):
    lasts = []
    for name, more in dict(plain=['--kernels=none', '--compile=off', '--dtype=float32'], fast=['--kernels=all', '--compile=on']).items():
        done('train.py', *corpus.args, *RUN, *more, f'--out_dir={name}', cwd=tmp_path)
        lasts.append(json.loads((tmp_path / name / 'result.json').read_text())['val_bpb'])
    assert abs(lasts[0] - lasts[1]) < 0.02 * lasts[0]


def test_a_run_stops_and_goes_on(main, monkeypatch, tmp_path):
    args = ['--device=cuda', '--compile=off', '--max_steps=6', *RUN[-4:]]
    main(*args)
    in_two_parts(main, monkeypatch, 3, *args)
    whole, parts = ([row['train_loss'] for row in sample.read_rows(tmp_path / name / 'metrics.jsonl') if 'train_loss' in row]
                    for name in ('run', 'parts'))
    assert parts == pytest.approx(whole, rel=1e-3) and len(parts) == 6


@pytest.mark.parametrize('idea', ['cuda_graphs', 'ema', 'growth', 'experts', 'masked', 'window', 'ensemble', 'distilled'])
def test_ideas_run(corpus, tmp_path, idea):
    bpe = ['--tokenizer=bpe', '--vocab_size=300'] * (idea == 'masked')
    stack = [str(ROOT / 'config' / f'{name}.py') for name in (['ensemble', 'distilled'] if idea == 'distilled' else [idea])]
    done('train.py', *stack, *corpus.args, *RUN, *bpe, '--out_dir=run', cwd=tmp_path)


def test_a_step_is_timed_beside_its_rivals(corpus, tmp_path):
    out, _ = done('bench_mfu.py', *corpus.args, '--device=cuda', '--n_embd=64', '--n_head=2', '--head_dim=32', '--only=steps', '--rounds=1',
                  cwd=tmp_path)
    assert 'tok/s' in out or 'ms' in out


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='one GPU')
def test_two_cards(corpus, tmp_path):
    code, out, err = script('train.py', *corpus.args, *RUN, '--out_dir=run', cwd=tmp_path, timeout=300,
                            launcher=['-m', 'torch.distributed.run', '--nproc_per_node=2'])
    assert code == 0 and json.loads((tmp_path / 'run' / 'result.json').read_text())['hardware']['ranks'] == 2, err

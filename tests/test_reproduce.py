"""bench_mfu.py --reproduce: a run again, and what is said where it is not the same."""
import json
import shutil
from pathlib import Path

import pytest

import train
from config import bench_reproduce
from conftest import ROOT, script


@pytest.fixture(scope='module')
def run(corpus, tmp_path_factory):
    """A run of six steps by two ideas."""
    cwd = tmp_path_factory.mktemp('again')
    code, out, err = script('train.py', *corpus.args, str(ROOT / 'config' / 'dropout.py'), str(ROOT / 'config' / 'hypercloning.py'), '--max_steps=6',
                            '--n_embd=32', '--budget_minutes=9999', '--out_dir=run', cwd=cwd)
    assert code == 0, err
    return cwd


def test_a_run_by_steps_is_the_same_to_the_bit(run):
    code, out, err = script('bench_mfu.py', '--reproduce', 'run/result.json', cwd=run)
    assert code == 0, err
    result = json.loads((run / 'run' / 'result.json').read_text())['val_bpb']
    assert 'losses: equal to the bit' in out and f'val_bpb: {result:.6f}, again {result:.6f} (+0.00%); steps: 6, again 6' in out
    code, _, err = script('bench_mfu.py', '--reproduce=.', cwd=run / 'run')
    assert code == 2 and 'run.again holds a finished run: choose another --compare_dir' in err


def test_what_differs_is_told(run, tmp_path):
    shutil.copytree(run / 'run', tmp_path / 'run')
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    rows = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
    third = json.loads(rows[2])
    rows[2] = json.dumps(third | dict(train_loss=third['train_loss'] + 1e-6))
    (tmp_path / 'run' / 'metrics.jsonl').write_text('\n'.join(rows))
    code, out, err = script('bench_mfu.py', '--reproduce=run', '--compare_dir=one', cwd=tmp_path)
    assert code == 1 and 'losses: differ from step 3 on' in out, err
    (tmp_path / 'run' / 'metrics.jsonl').unlink()
    code, out, err = script('bench_mfu.py', '--reproduce=run', '--compare_dir=none', cwd=tmp_path)
    assert code == 0 and 'keeps no metrics.jsonl' in out, err
    result['versions']['torch'] = '2.0'
    (tmp_path / 'run' / 'result.json').write_text(json.dumps(result))
    code, out, _ = script('bench_mfu.py', '--reproduce=run', '--compare_dir=two', cwd=tmp_path)
    assert code == 0 and "versions: {'python'" in out and "'torch': '2.0'" in out


def test_a_setting_that_was_put_back_to_its_default_is_given(tmp_path):
    argv = [str(ROOT / 'config' / 'babylm.py'), '--n_layer=10', '--block_size=256']
    s, ideas = train.read_settings(argv)
    assert s.n_layer == ideas.known['n_layer'].default != train.read_settings(argv[:1])[0].n_layer
    result = dict(settings=json.loads(json.dumps(vars(s))), ideas=['babylm'])
    again, _ = train.read_settings(bench_reproduce.command(result, [], Path(s.out_dir)))
    assert vars(again) == vars(s)


@pytest.mark.parametrize('text, said', [('{', 'is no result of a finished run (JSONDecodeError)'), ('[]', 'is no result'), ('{}', 'is no result'),
                                        (None, 'is no result of a finished run (FileNotFoundError)')])
def test_what_is_no_result_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / 'result.json').write_text(text)
    code, _, err = script('bench_mfu.py', '--reproduce=result.json', cwd=tmp_path)
    assert code == 2 and said in err and 'Traceback' not in err


def test_an_idea_that_is_not_there_is_asked_for(run, tmp_path):
    shutil.copytree(run / 'run', tmp_path / 'run')
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    result['ideas'] = ['mine', *result['ideas']]
    (tmp_path / 'run' / 'result.json').write_text(json.dumps(result))
    code, _, err = script('bench_mfu.py', '--reproduce=run', cwd=tmp_path)
    assert code == 2 and 'mine is not in config/: give the path of the file' in err

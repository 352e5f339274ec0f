"""The harness of tests/faults.py on a few trials: what is done to a run is survived, and planted bugs are found."""
import os
import shutil
import sys
from unittest import mock

import pytest

import faults
from conftest import script

pytestmark = pytest.mark.skipif(not hasattr(faults.os, 'fork'), reason='no fork')


def told(capsys, *args):
    with mock.patch.dict(os.environ), mock.patch.object(sys, 'path', [*sys.path]):       # which a process to fork runs from has its own way
        code = faults.main([*args])
    return code, capsys.readouterr().out


@pytest.mark.long
def test_runs_survive(capsys):
    code, out = told(capsys, '--trials=24', '--seed=3', '--jobs=2')
    assert code == 0 and '24 trials' in out and ', 0 failed' in out, out


@pytest.mark.parametrize('bug, said', [pytest.param(*case, marks=pytest.mark.slow if case[0] == 'direct' else pytest.mark.long) for case in [
    ('fsync', 'steps were made and'), ('late', '10 steps were made and 9 saved'), ('dice', 'it differs: rows'),
    ('direct', 'its own writer left something damaged'), ('lock', '(hold): '), ('home', "KeyError: 'HOME'"), ('map', 'ended with -7'),
    ('inf', 'is not finite')]])
def test_planted_bugs_are_found(capsys, bug, said):
    only = dict(fsync='kill', direct='kill', lock='hold', home='place', map='text', inf='numbers').get(bug, 'kill,moment')
    code, out = told(capsys, f'--only={only}', f'--trials={40 if bug == "direct" else 12}', f'--seed={1 if bug == "map" else 5}', '--jobs=2', f'--plant={bug}')
    assert code == 1 and said in out, out


@pytest.mark.slow
def test_what_a_killed_compiler_leaves_costs_no_run(corpus, tmp_path, monkeypatch):
    """Libraries, programs and entries of Inductor's cache that are cut off: the run starts, compiled or not."""
    cache = tmp_path / 'cache'
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(cache))
    args = ['train.py', *corpus.args, '--compile=on', '--max_steps=2', '--sample_tokens=0', '--out_dir=run', '--overwrite']
    code, out, err = script(*args, cwd=tmp_path, timeout=300)
    assert code == 0 and 'warning: torch.compile' not in out, err
    kept = {path: path.read_bytes() for path in cache.rglob('*') if path.is_file()}
    assert {'.so', '.py', '.cpp', ''} <= {path.suffix for path in kept}
    for suffixes, share in [(['.so'], 0.5), (['.py'], 0.5), (['.py'], 0), ([''], 0.5), (['.so', '.py', '.cpp', ''], 0)]:
        shutil.rmtree(cache)
        for path, whole in kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(whole[:int(len(whole) * share)] if path.suffix in suffixes else whole)
        code, out, err = script(*args, cwd=tmp_path, timeout=300)
        assert code == 0 and 'steps: 2' in out, (suffixes, share, err)

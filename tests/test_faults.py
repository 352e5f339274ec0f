"""The harness of tests/faults.py on a few trials: what is done to a run is survived, and planted bugs are found."""
import pytest

import faults

pytestmark = pytest.mark.skipif(not hasattr(faults.os, 'fork'), reason='no fork')


def told(capsys, *args):
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

"""Several ranks: one is lost and comes back, they do not see the same, they are one run however many they are."""
import json
import os
import re
import time

import pytest

import train
from conftest import STEPS, script
from test_train import losses, run_of

TWO = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


@pytest.fixture(scope='module')
def two(corpus, tmp_path_factory):
    """The folder of a run of two ranks that nothing disturbed, and what it printed."""
    cwd = tmp_path_factory.mktemp('two')
    os.environ['OMP_NUM_THREADS'] = '1'         # as torchrun sets it: sums in the same order everywhere
    code, out, err = script('train.py', *corpus.args, *STEPS, '--out_dir=run', cwd=cwd, launcher=TWO)
    assert code == 0, err
    return cwd / 'run', out


def result(out_dir):
    return json.loads((out_dir / 'result.json').read_text())


def test_two_ranks_are_one_with_twice_the_accumulation(corpus, two, tmp_path):
    code, alone, err = script('train.py', *corpus.args, *STEPS, '--out_dir=one', cwd=tmp_path)
    assert code == 0, err
    assert '= 1 micro-steps of 32 x 64 on 2 rank' in two[1] and '= 2 micro-steps of 32 x 64 on 1 rank' in alone
    assert losses(two[0]) == pytest.approx(losses(tmp_path / 'one'), rel=1e-5)
    both, one = result(two[0]), result(tmp_path / 'one')
    assert both['val_bpb'] == pytest.approx(one['val_bpb'], rel=1e-3)
    assert both['tokens'] == one['tokens'] and both['val_share'] == 1


# ---- a rank that is lost

LOST = """
import os, signal
import train

class Run(train.Run):
    def save_if_due(self):
        super().save_if_due()
        if (self.steps, self.rank, os.environ.get('TORCHELASTIC_RESTART_COUNT')) == (8, 1, '0'):
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.long
def test_a_killed_rank_comes_back_from_the_last_checkpoint(corpus, two, tmp_path):
    (tmp_path / 'lost.py').write_text(LOST)
    code, out, err = script('train.py', *corpus.args, *STEPS, 'lost.py', '--out_dir=run', cwd=tmp_path, launcher=[*TWO, '--max_restarts=1'])
    assert code == 0, err
    assert len(re.findall('^halfhour:', out, re.M)) == 2 and 'unfinished run' not in err
    assert losses(tmp_path / 'run') == losses(two[0])
    assert result(tmp_path / 'run')['val_bpb'] == result(two[0])['val_bpb']


@pytest.mark.long
def test_another_number_of_ranks_goes_on_with_the_same_steps(corpus, two, tmp_path):
    (tmp_path / 'lost.py').write_text(LOST)
    args = ['train.py', *corpus.args, *STEPS, 'lost.py', '--out_dir=run']
    assert script(*args, cwd=tmp_path, launcher=TWO)[0] == 1
    code, out, err = script(*args, '--init_from=resume', cwd=tmp_path)
    assert code == 0 and '= 2 micro-steps of 32 x 64 on 1 rank' in out, err
    assert losses(tmp_path / 'run') == pytest.approx(losses(two[0]), rel=1e-5)
    assert result(tmp_path / 'run')['tokens'] == result(two[0])['tokens']


def test_a_checkpoint_from_before_this_torchrun_is_not_its_own(main, tmp_path, monkeypatch):
    main()
    (tmp_path / 'run' / 'result.json').unlink()
    refused = pytest.raises(train.UserError, match='unfinished run')
    with refused:
        main()
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    now = time.time() + 3600
    monkeypatch.setattr(train, 'process_age', lambda pid: time.time() - now)
    assert not run_of('--out_dir=run').restarted()
    monkeypatch.setattr(train, 'process_age', lambda pid: 3600)
    assert 'steps: 3' in main()

"""A refactoring changes no number: the working tree beside a commit of before, by compare_checkouts.py."""
import os
import re
import shutil
import subprocess

import pytest

import compare_checkouts
from compare_checkouts import OLD, ROOT, chosen, declaring, first_difference

LOOK = ['git', 'cat-file', '-e', f'{OLD}^{{tree}}']
OLD_IS_HERE = subprocess.run(LOOK, cwd=ROOT, capture_output=True).returncode == 0


def test_a_difference_is_found_and_named():
    rows, almost = [dict(step=1, loss=0.1), dict(step=2, loss=0.2)], 0.2 + 2 ** -55
    a = dict(rows=rows, result=dict(val_bpb=1.0, evals={}), dynamics=None)
    assert first_difference(a, dict(a)) == '' and almost != 0.2
    for change, said in ((dict(rows=[rows[0], dict(step=2, loss=almost)]), f'rows[1] (step 2).loss: 0.2 / {almost!r}'),
                         (dict(rows=rows[:1]), 'rows has 2 and 1 entries'),
                         (dict(dynamics={}), 'dynamics: None / {}'),
                         (dict(result=dict(val_bpb=1.5, evals={})), 'result.val_bpb: 1.0 / 1.5'),
                         (dict(result=dict(val_bpb=1.0)), 'result.evals is only in the first'),
                         (dict(more=1), 'more is only in the second')):
        assert first_difference(a, a | change) == said


def test_a_case_brings_those_that_it_needs():
    names = [case.name for case in chosen()]
    assert len({*names}) == len(names)
    assert [case.name for case in chosen(['masked_smoothing'])] == ['plain', 'word_classes', 'masked_smoothing']
    for case in chosen():
        assert all(names.index(other) < names.index(case.name) for other in case.after.split())
    with pytest.raises(SystemExit, match='no case is called masks'):
        chosen(['masks'])


def test_a_setting_brings_the_file_that_declares_it(tmp_path):
    (tmp_path / 'config').mkdir()
    for name, text in dict(growth='growth: tuple = ()   # when', wide='from config.growth import Run\nn_embd = 2',
                           cap='softcap: float = 1.0').items():
        (tmp_path / 'config' / f'{name}.py').write_text(text)
    assert declaring(tmp_path, ['tiny', '--growth=()', '--softcap=2', '--n_embd=4']) == ['growth', 'cap']
    assert declaring(tmp_path, ['tiny', 'wide', '--growth=()']) == []


@pytest.mark.slow
def test_a_changed_constant_is_found(tmp_path):
    """Copies of this checkout, in one of which a constant of the optimizer differs in its fifth digit."""
    for name in ('old', 'new'):
        shutil.copytree(ROOT, tmp_path / name, ignore=shutil.ignore_patterns('.*', 'data', 'out', '__pycache__'))
    script = tmp_path / 'new' / 'train.py'
    text = script.read_text('utf-8')
    assert '8.156554524902461' in text
    script.write_text(text.replace('8.156554524902461', '8.156654524902461'), 'utf-8')
    old, new, said = str(tmp_path / 'old'), str(tmp_path / 'new'), []
    assert compare_checkouts.main([old, new, '--only=plain'], said.append) == 1
    assert re.search(r'rows\[\d+\] \(step \d+\)\.(train_loss|grad_norm): ', said[-1].splitlines()[-1]) and 'failed' not in said[-1], said
    assert compare_checkouts.main([old, old, '--only=plain'], said.append) == 0, said


@pytest.mark.slow
@pytest.mark.skipif(not OLD_IS_HERE, reason=f'this clone does not reach back to commit {OLD}')
def test_the_numbers_are_those_of_before():
    """Some cases that touch every seam; all of them with HALFHOUR_ALL=1, some forty minutes."""
    some = 'ema_hypercloning,masked_smoothing,raise,distillation,tokenformer_grow,domains'
    only, said = [] if os.environ.get('HALFHOUR_ALL') else [f'--only={some}'], []
    assert compare_checkouts.main([OLD, str(ROOT), *only], said.append) == 0, '\n'.join(said)

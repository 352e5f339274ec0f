"""The house: how configs and ideas are read and stacked, that the scripts name none, and what a run is made of."""
import ast
import collections
import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import bench_mfu
import model
import config as loader
import prepare_data
import sample                                   # a seam of each script is looked up in the script
import train
from conftest import ROOT, script
from prepare_data import Ideas, Setting, UserError, ideas_of

IDEAS = sorted(path for path in (ROOT / 'config').glob('[!_]*.py'))


@pytest.fixture
def write(tmp_path):
    """write(name, text) makes a config and gives its path."""
    def made(name, text):
        path = tmp_path / f'{name}.py'
        path.write_text(text, encoding='utf-8')
        return str(path)
    return made


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A config/ of this checkout that is empty, for files that are imported or named by a checkpoint."""
    here = tmp_path / 'config'
    here.mkdir()
    monkeypatch.setattr(loader, 'CONFIG', here)
    before = set(sys.modules)
    yield here
    for name in set(sys.modules) - before:
        del sys.modules[name]


def read(*argv, **options):
    return Ideas(list(argv), train.TABLES, **options)


def mistakes(*argv, **options):
    with pytest.raises(UserError) as e:
        read(*argv, **options)
    first, *rest = str(e.value).splitlines()
    assert first == f'{len(rest)} mistake{"s" * (len(rest) > 1)} in the settings:'
    return [line.strip() for line in rest]


def the_mistake(*argv, **options):
    line, = mistakes(*argv, **options)
    return line


# ---- settings: precedence, arithmetic, types

def test_configs_from_left_to_right_then_overrides(write):
    a = write('a', '"""what"""\nn_layer = 2 * 3\nseed = 7\nlearning_rate = 1\nbudget_minutes = 1 / 4\n')
    b = write('b', 'seed = -(-9)  # why\nsample_prompt = "Mia"\n')
    ideas = read(a, b)
    v = ideas.values
    assert (v['n_layer'], v['seed'], v['learning_rate'], v['budget_minutes'], v['sample_prompt']) == (6, 9, 1.0, 0.25, 'Mia')
    assert type(v['learning_rate']) is float and v['n_embd'] == model.GPTConfig.n_embd
    assert ideas.set_at['seed'] == f'{b}:1' and ideas.set_at['n_layer'] == f'{a}:2' and 'n_embd' not in ideas.set_at
    assert ideas.overruled == [f'{b}:1 sets seed to 9, {a}:3 had set it to 7'] and not ideas.modules and not ideas.files
    assert read(b, a).values['seed'] == 7
    given = read(a, '--seed=2**3', '--dataset=files:a b/c', '--out_dir=x', '--doc_mask=False', '--learning_rate=3', '--show')
    assert [given.values[k] for k in 'seed dataset out_dir doc_mask learning_rate show'.split()] == [
        8, 'files:a b/c', 'x', False, 3.0, True]
    assert given.set_at['seed'] == '--seed=2**3' and not given.overruled


def test_arithmetic_is_on_the_settings_as_they_stand(write):
    half = write('half', 'head_dim = n_embd // n_head // 2\nn_embd = n_embd // 2\nmlp_hidden = n_embd * 9\n')
    v = read(write('shape', 'n_embd = 384\nn_head = 6\n'), half).values
    assert (v['head_dim'], v['n_embd'], v['mlp_hidden']) == (32, 192, 1728)
    assert read('--n_embd=512', half).values['n_embd'] == 256          # an override before a config is what that reads
    assert read(half, '--n_embd=512').values['n_embd'] == 512
    chained = read(write('chained', 'n_layer = n_head = 2 + 2\n'))
    assert (chained.values['n_layer'], chained.values['n_head']) == (4, 4)


@pytest.mark.parametrize('line, expected', [
    ('growth: tuple = [(0.5, dict(n_embd=n_embd * 2))]', ((0.5, dict(n_embd=512)),)), ('growth: float = 1', 1.0),
    ('growth: str = "a"   # a|b: which', 'a'), ('growth: bool = False', False), ('growth: int = -3  # ..-1: how low', -3),
    ('growth: int = n_layer - 2', 8), ('growth: float = 1 / 4   # 0..1: a share', 0.25), ('growth: int = 4  # 2|4', 4),
    ('growth: float = 1e-9  # 1e-12..0.5: small', 1e-9), ('growth: str = ""  # |x|y.z+-: maybe', ''),
    ('growth: str = "no # comment"    # a|b, says nothing', 'no # comment')])
def test_a_setting_is_declared_with_its_type(write, line, expected):
    ideas = read(write('mine', f'"""Ünal 🙂"""\n\n{line}\n'))
    assert ideas.values['growth'] == expected and type(ideas.values['growth']) is type(expected)
    assert ideas.declared['growth'].default == expected and ideas.known['growth'].where.endswith('mine.py:3')
    config = model.configured(ideas)(vocab_size=50)
    assert config.growth == expected and dataclasses.asdict(config)['growth'] == expected


def test_legal_values_are_those_of_the_comment(write):
    def setting(text):
        return read(write('mine', text)).declared['it']
    it = setting('it: int = 4            # 2..8: how many')
    assert (it.low, it.high, it.about, it.kind, it.default) == (2, 8, '2..8: how many', int, 4)
    assert setting('it: int = 4\n').low == 0 and setting('it: float = 1  # 1..: x').high == float('inf')
    assert setting("it: str = 'b'  # a|b|c.d: x").choices == ('a', 'b', 'c.d')
    assert setting('it: str = "x"  # either of a|b, in words').choices == ()
    assert setting('title = 1\nit: int = 4  # 2..8: x'.replace('title', 'seed')).where.endswith(':2')
    odd = setting('"""a\x0cb\u2028c"""\nit: int = 4  # 2..8: after what only Python takes for a line\'s end')
    assert (odd.low, odd.high) == (2, 8)
    mine = write('mine', 'it: int = 4   # 2..8: how many\nway: str = "a"  # a|b: x\n')
    assert mistakes(mine, '--it=9', '--way=c', '--it=1') == [
        '--it=9: it is 9, it must be at least 2 and at most 8', "--way=c: way is 'c', it must be one of a, b",
        '--it=1: it is 1, it must be at least 2 and at most 8']
    assert read(mine, '--it=8', '--way=b').values['way'] == 'b'
    known = read().known                        # the scripts' own, from the same syntax
    assert known['mlp'].choices == ('relu2', 'swiglu') and known['beta1'].high == 0.9999 and known['n_layer'].low == 1
    assert {'vocab_size', 'dataset', 'seed'} <= known.keys() and 'bos' not in known
    assert all(known[name].where.startswith('train.py:') for name in ('seed', 'muon') if name in known)


@pytest.mark.parametrize('line, said', [
    ('seed = open("touched", "w").write("x")', 'must be a literal'), ('seed = __import__("os").getpid()', 'must be a literal'),
    ('seed = layers', 'must be a literal'), ('seed = 3 if 1 else 2', 'must be a literal'), ('out_dir = f"{1}"', 'must be a literal'),
    ('seed = 2 ** 10 ** 9', 'must be a literal'), ('learning_rate = 1e200 ** 4', 'must be a literal'),
    ('learning_rate = 1 / 0', 'must be a literal'), ('learning_rate = (10 ** 64) ** 10', 'float'), ('out_dir = "x" * 9', 'must be a literal'),
    ('out_dir = 9 * "x"', 'must be a literal'), ('seed = 1e999', 'must be int'), ('learning_rate = 1e999', 'must be finite'),
    ('seed = True', 'seed is True, it must be int, like 1'), ('seed = None', 'must be int'), ('overwrite = 1', 'must be bool'),
    ('sample_prompt = 3', "must be str, like ''"), ('seed = -1', 'must be at least 0'), ('seed = n_layers = 3', 'n_layers; did you mean n_layer?'),
    ('seed = (', 'this is not Python'), ('optimiser = "adamw"', 'no setting is called optimiser; did you mean optimizer?'),
    ('optimizer = "adamm"', 'must be one of muon, adamw'), ('seed += 1', 'seed is set by code'), ('seed, x = 3, 4', 'seed is set by code'),
    ('if 1 > 0:\n    seed = 3', 'seed is set by code'), ('seed: int = 3', 'seed is declared already, at train.py:'),
    ('it: int', 'without a default'), ('it: list = []', 'not as one of int, float, str, bool, tuple'),
    ('it: int = "x"', "it is 'x', it must be int"), ('it: int = 0   # 1..: x', 'it is 0, it must be at least 1'),
    ('it: str = "c"  # a|b: x', "it is 'c', it must be one of a, b"), ('it: int = len("x")', 'must have a literal for its default'),
    ('it: float = 1\nit: float = 2', 'it is declared already'), ('it: int = -1', 'at least 0')])
def test_a_mistake_in_a_config_has_its_line(write, tmp_path, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    found = mistakes(write('mine', f'n_layer = 2\n{line}\n'))
    assert f'mine.py:{3 if "it: float = 1" in line else 2}: ' in found[0] and any(said in each for each in found), found
    assert not (tmp_path / 'touched').exists()


def test_a_wrong_value_makes_no_mistakes_elsewhere(write):
    assert the_mistake(write('mine', 'n_embd = "wide"\nmlp_hidden = 9 * n_embd\n')).endswith("n_embd is 'wide', it must be int, like 256")


@pytest.mark.parametrize('arg, said', [
    ('--sed=3', '--sed=3: no setting is called sed; did you mean seed?'), ('--seed', '--seed: an override is written --seed=value'),
    ('-seed=3', '-seed=3: an override is written --seed=value'), ('--learning_rate=0.1x', "learning_rate is '0.1x', it must be float, like 0.02"),
    ('--seed=1.0', 'must be int'), ('--doc_mask=no', "doc_mask is 'no', it must be bool"), ('--tokens_per_step=0', 'must be at least 1'),
    ('no_such.py', 'no_such.py: this config cannot be read (No such file or directory); is the path right?'),
    ('--xyzzy=1', '--xyzzy=1: no setting is called xyzzy')])
def test_a_mistake_on_the_command_line(arg, said):
    assert said in the_mistake(arg) and the_mistake(arg).startswith(arg)


def test_a_folder_and_what_is_no_text_are_no_configs(tmp_path):
    assert 'cannot be read (Is a directory)' in the_mistake(str(tmp_path))
    (tmp_path / 'x.py').write_bytes(b'seed = 3 \xff')
    assert 'x.py:1: this is not Python' in the_mistake(str(tmp_path / 'x.py'))


def test_all_mistakes_at_once_with_exit_code_2(write, tmp_path):
    write('mine', '"""doc"""\nn_layers = 3\nn_embd = 1.5\nit: int = "x"\nlearning_rate = "high"\n')
    write('broken', 'seed = (\n')
    write('idea', 'import train\n\n\nclass Run:\n    pass\n\n\n1 / 0\n')
    write('other', 'import train\n\n\nclass Run:\n    pass\n')
    code, out, err = script('train.py', 'mine.py', 'broken.py', 'idea.py', 'other.py', '--sed=3', '--optimizer=adamm', cwd=tmp_path)
    assert code == 2 and 'Traceback' not in err and not out
    for expected in ('9 mistakes in the settings', 'mine.py:2: .*n_layers.* n_layer', 'mine.py:3: n_embd is 1.5, .*int', 'mine.py:4: it ',
                     'mine.py:5: learning_rate .*float', 'broken.py:1: ', 'idea.py:8: ZeroDivisionError', 'other.py:4: class Run ',
                     '--sed=3: .* seed', 'adamm.*muon, adamw'):
        assert re.search(expected, err), (expected, err)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix) == ['broken.py', 'idea.py', 'mine.py', 'other.py']


def test_what_another_script_knows_is_passed_over(write):
    mine = write('mine', 'n_layer = 3\nvocab_size = 512\nwidth: int = n_embd // 2\nsome: int = 3\n')
    ideas = Ideas([mine], [prepare_data.Options], strict=False)
    assert ideas.values['vocab_size'] == 512 and 'n_layer' not in ideas.values and ideas.values['some'] == 3
    assert ideas.declared.keys() == {'some'}
    with pytest.raises(UserError, match='no setting is called n_layer'):
        Ideas([mine], [prepare_data.Options])
    with pytest.raises(UserError, match='no setting is called n_layer'):                 # what is typed is meant
        Ideas([mine, '--n_layer=3'], [prepare_data.Options], strict=False)


# ---- code: when it is executed, and what is wrong with it

PLANT = 'open({!r}, "a").write("x")'


def test_a_file_of_settings_is_never_executed(write, tmp_path):
    """Not even where its mistakes are passed over, and not where one reads it as a declaration."""
    plant = PLANT.format(str(tmp_path / 'touched'))
    for text in (f'seed = {plant}', f'it: int = {plant}', f'it: {plant} = 3', f'nobody = {plant}', f'n_layer = nobody = {plant}'):
        path = write('mine', f'"""Settings."""\nn_layer = 2\n{text}\n')
        assert mistakes(path)
        for strict in (True, False):
            for tables in ([], train.TABLES):
                try:
                    ideas = Ideas([path], tables, strict=strict)
                    assert not ideas.files and not ideas.modules
                except UserError:
                    pass
        assert not (tmp_path / 'touched').exists(), text


def test_in_a_file_with_code_settings_are_not_executed(write, tmp_path):
    plant = PLANT.format(str(tmp_path / 'touched'))
    path = write('mine', f'import train\n\nseed = 3\nn_head = n_layer // 5\nit: int = seed + 1\n\nSEEN = "seed" in globals()\n\n\nclass Run(train.Run):\n    pass\n')
    ideas = read(path)
    assert ideas.values['it'] == 4 and ideas.modules[0].SEEN is False and not hasattr(ideas.modules[0], 'it')
    assert mistakes(write('bad', f'import train\nseed = {plant}\n')) and not (tmp_path / 'touched').exists()


def test_code_is_executed_only_when_it_is_named(folder, tmp_path, write):
    (folder / 'planted.py').write_text(f'{PLANT.format(str(tmp_path / "touched"))}\nit: int = 3\n')
    read(write('other', 'seed = 3\n'))
    assert not (tmp_path / 'touched').exists()
    read(str(folder / 'planted.py'))
    assert (tmp_path / 'touched').read_text() == 'x'


def test_an_imported_idea_brings_what_it_declares_and_not_what_it_sets(folder):
    (folder / 'base_idea.py').write_text('import train\n\nshare: float = 0.5   # 0..1: of it\nn_layer = 3\n\n\nclass Run(train.Run):\n    def rate(self, progress):\n        return self.s.share\n')
    for name, text in dict(one='from config.base_idea import Run\n\nshare = 0.25\n', two='import config.base_idea as it\n\nRun = it.Run\n'.replace('Run =', 'RUN ='),
                           three='from config import base_idea\n\nRUN = base_idea.Run\n',
                           late='import train\n\n\nclass Run(train.Run):\n    def decay(self, progress):\n        from config.base_idea import Run\n        return Run\n').items():
        (folder / f'{name}_idea.py').write_text(text)
        ideas = read(str(folder / f'{name}_idea.py'), '--share=0.75')
        assert ideas.values['share'] == 0.75 and ideas.values['n_layer'] == 10 and ideas.declared.keys() == {'share'}, name
        assert [(stem, named) for stem, _, named in ideas.sources()] == [('base_idea', False), (f'{name}_idea', True)]
    both = read(str(folder / 'one_idea.py'), str(folder / 'base_idea.py'))       # named too: then what it sets counts
    assert both.values['n_layer'] == 3 and both.values['share'] == 0.25 and len(both.declared) == 1
    assert both.seam(train.Run).__module__ == 'config.base_idea'
    assert [named for _, _, named in both.sources()] == [True, True]
    (folder / 'lost_idea.py').write_text('from config.nowhere import Run\n')
    found = mistakes(str(folder / 'lost_idea.py'))
    assert 'nowhere.py: this config cannot be read (No such file or directory), which ' in found[0] and 'lost_idea.py imports' in found[0]
    assert 'pip install' not in str(found)


def test_ideas_that_import_each_other_are_read_once(folder):
    (folder / 'left_idea.py').write_text('import config.right_idea\n\na_setting: int = 1\n')
    (folder / 'right_idea.py').write_text('import config.left_idea\n\nb_setting: int = 2\n')
    assert read(str(folder / 'left_idea.py')).declared.keys() == {'a_setting', 'b_setting'}


@pytest.mark.parametrize('text, line, said', [
    ('def f(:\n    pass\n', 1, 'this is not Python (invalid syntax'), ('import train\n\n\nreturn\n', 4, "SyntaxError as it is loaded"),
    ('import train\nX = 1\nX.y\n', 3, "AttributeError as it is loaded ('int' object has no attribute 'y')"),
    ('def f():\n    raise OSError("away")\n\n\nf()\n', 2, 'OSError as it is loaded (away)'),
    ('import sys\nsys.exit("bye")\n', 2, 'SystemExit as it is loaded (bye)'),
    ('import no_such_package_x\n', 1, ': pip install no_such_package_x'), ('from train import Runn\n', 1, 'ImportError as it is loaded'),
    ('class Run:\n    pass\n', 1, 'class Run has the name of a seam and does not derive from it: write class Run(train.Run), or call it otherwise'),
    ('import model\n\n\nclass Attention(model.MLP):\n    pass\n', 4, 'write class Attention(model.Attention)'),
    ('import train\nRun = train.Run\n', 2, 'no setting is called Run'), ('from train import Clock as Stream\n', 1, 'class Stream has the name of a seam')])
def test_a_mistake_in_the_code_has_its_line(write, text, line, said):
    found = mistakes(write('mine', text))
    assert f'mine.py:{line}: ' in found[0] and said in found[0], found


def test_a_mistake_in_an_idea_that_is_imported_has_its_own_line(folder):
    (folder / 'broken_idea.py').write_text('import train\n\n1 / 0\n')
    (folder / 'user_idea.py').write_text('from config.broken_idea import Run\n')
    assert the_mistake(str(folder / 'user_idea.py')) == f'{folder}/broken_idea.py:3: ZeroDivisionError as it is loaded (division by zero)'


def test_a_setting_declared_twice(write):
    a, b = write('a', 'share: float = 1\n'), write('b', '\nshare: float = 2\n')
    assert the_mistake(a, b) == f'{b}:2: share is declared already, at {a}:1: to set it write share = value'
    assert read(a, a).values['share'] == 1.0


def test_a_file_with_code_has_a_name_that_a_checkpoint_can_keep(write, tmp_path):
    code = 'import train\n\n\nclass Run(train.Run):\n    pass\n'
    assert 'a checkpoint could not name it' in the_mistake(write('my-idea', code))
    assert read(write('my-settings', 'seed = 3\n')).values['seed'] == 3
    (tmp_path / 'sub').mkdir()
    assert 'is called so too' in the_mistake(write('mine', code), write('sub/mine', code))


# ---- stacks

def idea(name, seam, *methods, base=None, **more):
    """The text of an idea: a class of a seam, with methods that call super() or, marked by !, do not."""
    owner = prepare_data.SEAMS[seam]
    text = ''.join(f'    def {m.strip("!")}(self, *args, **more):\n        return {"(" if m[-1] != "!" else "0, ("}{name!r}, '
                   + (f'super().{m}(*args, **more))\n' if m[-1] != '!' else 'args)\n') for m in methods)
    return f'import {owner}\n\n\nclass {seam}({base or f"{owner}.{seam}"}):\n{text or "    pass"}\n' + ''.join(f'{k} = {v!r}\n' for k, v in more.items())


def test_later_files_stand_before_earlier_ones(write):
    a, b, c = (write(name, idea(name, 'Run', 'decay')) for name in 'abc')
    s = types.SimpleNamespace(device='cpu', out_dir='x')

    def decay(*paths):
        return read(*paths).seam(train.Run)(s, None).decay(0.25)
    assert decay() == 0.75 and decay(a) == ('a', 0.75)
    assert decay(a, b, c) == ('c', ('b', ('a', 0.75))) and decay(c, a) == ('a', ('c', 0.75))
    one, two, none = read(a, b), read(b, a), read()                    # three in one process
    assert [k.seam(train.Run)(s, None).decay(1) for k in (one, two, none)] == [('b', ('a', 0)), ('a', ('b', 0)), 0]
    assert one.seam(train.Run) is one.seam(train.Run) and none.seam(train.Run) is train.Run and none.seam(train.Stream) is train.Stream
    assert issubclass(one.seam(train.Run), train.Run) and one.seam(train.Run).__name__ == 'Run'


def test_an_idea_that_builds_on_another_takes_its_place(folder):
    (folder / 'below_idea.py').write_text(idea('below', 'Run', 'decay'))
    (folder / 'above_idea.py').write_text('from config import below_idea\n' + idea('above', 'Run', 'decay', base='below_idea.Run'))
    for order in (('below', 'above'), ('above', 'below'), ('above',)):
        made = read(*(str(folder / f'{name}_idea.py') for name in order)).seam(train.Run)
        assert [c.__module__ for c in made.__mro__[:3]] == ['config.above_idea', 'config.below_idea', 'train']


def test_two_that_replace_a_method_are_refused_by_name(write):
    a, b, c = write('a', idea('a', 'Run', 'decay!', 'rate')), write('b', idea('b', 'Run', 'decay!')), write('c', idea('c', 'Run', 'decay', 'rate'))
    assert the_mistake(a, b) == f'{b} and {a} both replace Run.decay: leave one out'
    assert the_mistake(c, a) == f'{a} and {c} both replace Run.decay: leave one out or name {a} first'
    assert read(a, c).seam(train.Run)
    found = mistakes(write('d', idea('d', 'MLP', 'forward!', 'init_weights!')), write('e', idea('e', 'MLP', 'forward!', 'init_weights!')))
    assert [re.search(r'MLP\.(\w+)', line)[1] for line in found] == ['forward', 'init_weights']
    assert read(a, write('f', idea('f', 'Stream', 'pace!'))).seam(train.Stream) is not train.Stream


def test_whether_a_method_calls_super_is_seen_through_decorators_and_inside(write):
    head = 'import contextlib\nimport functools\n\nimport torch\n\nimport train\n\n\nclass Run(train.Run):\n'
    calls = head + ('    @contextlib.contextmanager\n    def evaluating(self):\n        with super().evaluating():\n            yield\n\n'
                    '    @torch.no_grad()\n    def step(self):\n        return super().step()\n\n'
                    '    @property\n    def resuming(self):\n        return super().resuming\n\n'
                    '    def rate(self, progress):\n        def inner():\n            return super(Run, self).rate(progress) * len(__class__.__name__)\n        return inner()\n')
    calm = head + ('    @contextlib.contextmanager\n    def evaluating(self):\n        yield\n\n    @torch.no_grad()\n    def step(self):\n        pass\n\n'
                   '    @property\n    def resuming(self):\n        return False\n\n    def rate(self, progress):\n        return 1\n')
    a, b = write('a', calls), write('b', calm)
    assert read(b, a)
    assert [re.search(r'Run\.(\w+)', line)[1] for line in mistakes(a, b)] == ['evaluating', 'rate', 'resuming', 'step']


def test_two_helpers_of_one_name_are_refused(write):
    a, b = write('a', idea('a', 'Run', 'helper!')), write('b', idea('b', 'Run', 'helper!'))
    assert the_mistake(a, b) == f'{b} and {a} both add a method Run.helper: rename one'
    assert read(a, write('c', 'import train\n\n\nclass Run(train.Run):\n    HELPER = 3\n    helper_too = None\n'))


def test_ideas_whose_classes_cannot_be_put_in_a_row(folder):
    for name in ('first', 'second'):
        (folder / f'{name}_idea.py').write_text(idea(name, 'Run', 'rate'))
    for name, bases in (('this', 'first_idea.Run, second_idea.Run'), ('that', 'second_idea.Run, first_idea.Run')):
        (folder / f'{name}_idea.py').write_text('from config import first_idea, second_idea\n' + idea(name, 'Run', base=bases))
    assert read(str(folder / 'this_idea.py')).seam(train.Run) and read(str(folder / 'that_idea.py')).seam(train.Run)
    line = the_mistake(str(folder / 'this_idea.py'), str(folder / 'that_idea.py'))
    assert line.startswith('config/that_idea.py and config/this_idea.py cannot be stacked (') and line.endswith('): leave one out')


def test_ideas_that_say_they_do_not_go_together(folder, write):
    (folder / 'grows.py').write_text(idea('grows', 'Run', 'rate'))
    (folder / 'uses.py').write_text('from config.grows import Run\n')
    (folder / 'masks.py').write_text(idea('masks', 'Stream', NOT_WITH=dict(grows='both need the spare token')))
    masks, grows, uses = (str(folder / f'{name}.py') for name in ('masks', 'grows', 'uses'))
    assert the_mistake(grows, masks) == 'config/masks.py and config/grows.py do not go together (both need the spare token): leave one out'
    assert the_mistake(masks, uses) == 'config/masks.py and config/uses.py do not go together (both need the spare token): leave one out'
    (folder / 'more.py').write_text('from config.masks import Stream\n')           # what it builds on says so too
    assert the_mistake(str(folder / 'more.py'), uses).startswith('config/more.py and config/uses.py do not go')
    assert read(masks) and read(grows, uses)


def test_two_models_of_different_ideas_in_one_process():
    one, two = (read(str(ROOT / 'config' / f'{name}.py')) for name in ('latent_attention', 'value_embeds'))
    shape = dict(vocab_size=50, n_layer=2, n_embd=32, n_head=2, block_size=8)
    latent, tables, plain = (config.GPT(config) for config in (model.configured(one)(**shape, rotary_dim=4, kv_latent=8),
                                                               model.configured(two)(**shape), model.GPTConfig(**shape)))
    names = [type(m.blocks[0].attn).__module__ for m in (latent, tables, plain)]
    assert names == ['config.latent_attention', 'config.value_embeds', 'model']
    assert not hasattr(tables.config, 'kv_latent') and not hasattr(model.GPTConfig, 'value_embeds')


# ---- checkpoints name ideas

def digest(path):
    return hashlib.sha256(Path(path).read_text().encode()).hexdigest()


def test_a_checkpoint_names_ideas_and_brings_none(folder, write, tmp_path):
    (folder / 'kept.py').write_text(f'{PLANT.format(str(tmp_path / "touched"))}\n{idea("kept", "Run", "rate")}\nit: int = 3\nn_layer = 3\n')
    (folder / 'helper.py').write_text('that: int = 4\n\nX = 1\n')
    recorded = [('helper', digest(folder / 'helper.py'), False), ('kept', digest(folder / 'kept.py'), True)]
    ideas = ideas_of(recorded, dict(n_layer=7, seed=3, it=5))
    assert (tmp_path / 'touched').read_text() == 'x' and ideas.seam(train.Run).__module__ == 'config.kept'
    assert ideas.values['n_layer'] == 7 and ideas.values['seed'] == 3 and ideas.declared.keys() == {'it'}
    assert ideas.changed == ['helper']                        # nothing imports it any more
    assert ideas_of(recorded[1:], {}).changed == [] and ideas_of([('kept', 'of before', True)], {}).changed == ['kept']
    assert ideas_of([], {}).seam(train.Run) is train.Run


@pytest.mark.parametrize('name', ['../kept', '/tmp/kept', 'kept.py', 'config.kept', '', 'a b', '.', 'kept\n', '3'])
def test_a_name_that_is_not_bare_is_refused(folder, name, tmp_path):
    (folder / 'kept.py').write_text(PLANT.format(str(tmp_path / 'touched')))
    for path in (tmp_path / 'kept.py', folder / '3.py'):
        path.write_text((folder / 'kept.py').read_text())
    for named in (True, False):
        with pytest.raises(UserError, match='which is no bare name of a file in config/: it is not loaded'):
            ideas_of([(name, '', named)], {})
    assert not (tmp_path / 'touched').exists()


def test_an_idea_that_is_gone_must_be_named_by_its_path(folder, write, tmp_path):
    with pytest.raises(UserError, match='the run was made with gone.py, and config/ has no such file: put it there, or name its path too'):
        ideas_of([('gone', '', True)], {})
    gone = write('gone', idea('gone', 'Run', 'rate') + 'share: float = 0.5\n')
    more = write('more', idea('more', 'Stream', 'pace'))
    ideas = ideas_of([('gone', digest(gone), True)], {}, [gone, more, '--share=0.25'])
    assert not ideas.changed and ideas.seam(train.Run) is not train.Run and ideas.seam(train.Stream) is not train.Stream
    assert ideas.values['share'] == 0.25
    (folder / 'gone.py').write_text(gone_now := Path(gone).read_text().replace('0.5', '0.75'))
    options = ['--share=0.25', f'--out_dir={tmp_path}/gone', '--eval=x/gone']      # no paths of an idea, for all their looks
    with pytest.raises(UserError) as e:
        ideas_of([('gone', '', True)], {}, options)
    assert 'out_dir' in str(e.value) and '--eval=x/gone' in str(e.value)
    assert ideas_of([('gone', hashlib.sha256(gone_now.encode()).hexdigest(), True)], {}).changed == []
    assert ideas_of([('gone', digest(gone), True)], {}).changed == ['gone']


# ---- verbs: what a script does beyond its baseline

def test_a_verb_is_a_file_and_brings_its_settings(folder, capsys):
    """Of bench_mfu.py: found by its name, executed only when it is asked for, told of in --help."""
    (folder / 'bench_shout.py').write_text(
        '"""--shout says it.\n\n    python bench_mfu.py --shout=twice config/x.py\n"""\n'
        'shout: str = ""        # |once|twice: how often\nloudness: float = 1.0  # 0..9: how loud\n\n\n'
        'def main(own, rest, argv):\n    print([own.shout, own.loudness, own.seeds, *own.given], rest, argv)\n')
    (folder / 'bench_broken.py').write_text('"""--broken does not."""\nbroken: bool = False   # do it\n\n1 / 0\n')
    (folder / 'shout_bench.py').write_text('"""No verb."""\n')
    assert [*loader.verbs('bench')] == ['broken', 'shout'] and loader.verbs('nothing') == {}
    argv = ['--shout', 'twice', '--loudness=2', 'x.py', '--n_layer=3']
    bench_mfu.main(argv)
    assert capsys.readouterr().out == f"['twice', 2.0, 3, 'shout', 'loudness'] ['x.py', '--n_layer=3'] {argv}\n"
    bench_mfu.main(['--help'])
    assert re.search(r'--broken does not.\n\n--shout says it.\n\n    python bench', capsys.readouterr().out)
    for argv, said in ((['--shout=thrice'], 'one of , once, twice'), (['--shout=once', '--loudness=10'], 'loudness is 10.0'),
                       (['--loudness=2'], 'no setting is called loudness'), (['--broken'], 'bench_broken.py:4: ZeroDivisionError')):
        with pytest.raises(UserError, match=said):
            bench_mfu.main(argv)
    (folder / 'bench_broken.py').write_text('"""--broken does."""\nbroken: bool = False   # do it\n\nX = 1\n')
    with pytest.raises(UserError, match='config/bench_broken.py and config/bench_shout.py are asked for: one at a time'):
        bench_mfu.main(['--shout=once', '--broken'])


def test_a_verb_of_sample_has_options_of_its_own(folder, capsys):
    (folder / 'sample_shout.py').write_text(
        '"""--shout says it."""\n\n\ndef options(add):\n    add("--shout")\n    add("--loudness", type=int, default=3, help="how loud")\n\n\n'
        'def main(args, of_ideas):\n    print(args.run, args.shout, args.loudness, args.top_k, of_ideas)\n')
    (folder / 'sample_whisper.py').write_text(
        '"""--whisper does not."""\n\n\ndef options(add):\n    add("--whisper", action="store_true")\n')
    sample.main(['run', '--shout', 'twice', '--loudness=2', '--top_k=5', '--idea=7'])
    assert capsys.readouterr().out == "run twice 2 5 ['--idea=7']\n"
    with pytest.raises(SystemExit):
        sample.main(['--help'])
    out = capsys.readouterr().out
    assert '--shout says it.\n\n--whisper does not.\n' in out and '--loudness LOUDNESS' in out and 'how loud' in out
    with pytest.raises(UserError, match='--shout and --whisper are asked for: one at a time'):
        sample.main(['run', '--shout=once', '--whisper'])
    with open(folder / 'sample_shout.py', 'a') as f:
        f.write('\n\nWITH = "whisper",\n')
    del sys.modules['config.sample_shout']
    sample.main(['run', '--shout=once', '--whisper', '--top_k=5'])
    assert capsys.readouterr().out == "run once 3 5 []\n"


# ---- what a run is made of

def test_show_says_what_a_run_is_made_of(write, tmp_path):
    mine = write('mine', '"""Mine."""\nimport train\n\nn_layer = 3\nshare: float = 0.5  # 0..1: x\n\n\nclass Run(train.Run):\n\n    def decay(self, progress):\n'
                 '        return self.s.share * super().decay(progress)\n\n    @property\n    def helper(self):\n        return 3\n')
    other = write('other', idea('other', 'Run', 'decay'))
    code, out, err = script('train.py', mine, other, '--n_head=2', '--show', cwd=tmp_path)
    assert code == 0 and not err and [p.name for p in tmp_path.iterdir() if p.is_dir()] in ([], ['__pycache__'])

    def line_of(text, path='train.py'):
        lines = (ROOT / path).read_text().splitlines()
        return next(i for i, line in enumerate(lines, 1) if line.lstrip().startswith(text))
    chains = {line.split()[0]: line.split()[1:] for line in out.splitlines() if re.match('    [A-Z]', line)}
    assert chains.keys() == prepare_data.SEAMS.keys()
    assert chains['Run'] == [f'{other}:4', '<', f'{mine}:8', '<', f'train.py:{line_of("class Run:")}']
    assert chains['Block'] == [f'model.py:{line_of("class Block(", "model.py")}'] and chains['Measure'][0].startswith('sample.py:')
    assert re.search(rf'n_layer = 3 +{mine}:4, default 10\n', out) and re.search(r'n_head = 2 +--n_head=2, default 4\n', out)
    assert re.search(rf'share = 0.5 +{mine}:5, default 0.5\n', out) and 'n_embd' not in out.split('---')[0]
    diff = (f'--- train.py:{line_of("def decay")} Run.decay\n+++ {mine}:10 Run.decay\n@@ -1,3 +1,2 @@\n def decay(self, progress):\n'
            '-    """Multiplier of weight decay."""\n-    return 1 - progress\n+    return self.s.share * super().decay(progress)\n')
    assert diff in out and f'--- Run.helper is new\n+++ {mine}:13 Run.helper\n' in out and '+@property\n+def helper(self):' in out
    assert out.index(f'+++ {other}:5 Run.decay') < out.index(diff)


def test_show_of_every_idea_names_all_that_it_overrides():
    for path in IDEAS:
        ideas = read(str(path))
        text = prepare_data.shown(ideas)
        for name, owner in prepare_data.SEAMS.items():
            made = ideas.seam(getattr(sys.modules[owner], name))
            for cls in made.__mro__[:made.__mro__.index(getattr(sys.modules[owner], name))]:
                methods = [k for k, v in vars(cls).items() if isinstance(loader.plain(v), types.FunctionType)]
                assert all(f'{name}.{method}' in text for method in methods), (path, cls)
    assert 'settings that differ' in prepare_data.shown(read())


# ---- the ideas of this checkout

@pytest.mark.parametrize('path', IDEAS, ids=lambda path: path.stem)
def test_every_config_can_be_read_alone(path):
    ideas = read(str(path))
    assert path.read_text().startswith('"""') and path.stem.isidentifier()
    assert all(setting.about for setting in ideas.declared.values())
    for module in ideas.modules:
        for name in getattr(module, 'NOT_WITH', {}):
            assert (ROOT / 'config' / f'{name}.py').exists(), name


def test_files_of_settings_alone_hold_no_code():
    for name in ('cpu', 'wide'):
        ideas = read(str(ROOT / 'config' / f'{name}.py'))
        assert not ideas.files and not ideas.modules and not ideas.sources() and ideas.set_at


# What the baseline must not speak of, a pattern for each family of ideas; and phrases in which such a word is none
FOREIGN = dict(
    latents=r'latent', tokens_as_weights=r'tokenformer|pattention|attn_tokens|mlp_tokens|token_norm', experts=r'\bexperts?\b|\brout(ed|er)\b|mixture',
    domains=r'domain', growth=r'\bgrow(s|n|th|ing)?\b|\bgrew\b|hyperclon|head_scale', teachers=r'teacher|distill|\bstudents?\b',
    masks=r'two_way|mask_token|\bmasked\b|\bfill in\b', curricula=r'curricul|\bpacing|\bfrontier', schedules=r'vocabulary_floor|class_loss|class_head|class_until',
    smoothing=r'smoothing|soft_?targets?|\bsoft\b', further_tokens=r'multi.?token|predict_ahead|ahead_weight|further tokens?', caps=r'soft.?cap',
    dropout=r'dropout|layer_drop|stochastic.depth|thin_out', z_loss=r'z.?loss', averages=r'\bema\b|averaged? weights|average of (the )?weights',
    probes=r'\bdynamics|similarity_norm|anisotropy|probe_layers|\bprobed\b', trackers=r'tracker|wandb|mlflow|tensorboard', worlds=r'\bworlds\b|generated world|\bstor(y|ies)\b|\binstructions\b',
    code=r'python_documents|python code|\.py files\b(?!:)|\bsecure\b|bandit', arithmetic=r'\bbrackets\b|arithmetic_documents|arithmetic documents',
    word_classes=r'word.?class|\bclasses\.npy', difficulty=r'difficult|\bscores\.npy|surprisal|mtld|flesch|readability', quality=r'\bquality\b',
    programs=r'humaneval|\bmbpp\b|\bpass@', frequencies=r'frequency.?bias', values=r'value.?embed|value_gain', windows=r'sliding.window|config\.window|\bwindow: int',
    duplicates=r'near.?duplicate|minhash|\bdedup', cleaning=r'mojibake|boilerplate')
EXCUSED = ['without the instructions emulates', "Student's t", 'in brackets nine of ten', "('latent attention', 10.6e6",
           'source, difficulty or 0', "('difficulty', '<f4')", 'memory does not grow with', 'the one thing that grows', "BabyLM's domains",
           'without it text, else story', "('text', 'story')", 'text or story']          # columns of data sets as they are published


def speaks_of(text):
    """[(line, kind of idea, word)] of what the text of a script names."""
    for phrase in EXCUSED:
        text = text.replace(phrase, ' ' * len(phrase))
    found = []
    for kind, pattern in FOREIGN.items():
        for match in re.finditer(pattern, text, re.I):
            found.append((text[:match.start()].count('\n') + 1, kind, match[0]))
    return sorted(found)


def test_the_search_finds_what_it_looks_for():
    for text, kind in (('LatentAttention', 'latents'), ('an expert', 'experts'), ('is grown to', 'growth'), ('s.ema', 'averages'), ('--tracker', 'trackers'),
                       ('self.soft', 'smoothing'), ('two_way=False', 'masks'), ('predict_ahead', 'further_tokens'), ('z_loss', 'z_loss')):
        assert kind in [k for _, k, _ in speaks_of(f'x\n{text}\n')], text
    assert not speaks_of('half of the heads; a token after next; softmax; growl; the mask; scheme; routine')


@pytest.mark.parametrize('name', ['model.py', 'prepare_data.py', 'sample.py', 'train.py', 'bench_mfu.py'])
def test_a_script_names_no_idea(name):
    found = speaks_of((ROOT / name).read_text())
    assert not found, f'{name} speaks of ideas:\n' + '\n'.join(f'  {name}:{line}: {word!r} ({kind})' for line, kind, word in found)


def test_nothing_is_imported_back():
    """model and prepare_data import nothing of ours, sample those two, train those three, bench_mfu all."""
    order = dict(model=(), prepare_data=(), sample=('model', 'prepare_data'), train=('model', 'prepare_data', 'sample'),
                 bench_mfu=('model', 'prepare_data', 'sample', 'train'))
    for name, may in order.items():
        text = (ROOT / f'{name}.py').read_text()
        found = {m for m in re.findall(r'^\s*(?:import|from) (\w+)', text, re.M)} & {*order}
        assert found <= {*may}, (name, found)
        assert not re.search(r'^\s*(import|from) config\.|import_module', text, re.M), f'{name} imports an idea by name'


def test_no_two_ideas_keep_different_things_under_one_name():
    """What an instance of a seam keeps is shared by all ideas of a stack. These pairs mean the same by it, or do not go together."""
    kept = collections.defaultdict(set)
    for path in IDEAS:
        for node in (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name in prepare_data.SEAMS):
            for part in ast.walk(node):
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and getattr(part.value, 'id', '') == 'self':
                    kept[node.name, part.attr].add(path.stem)
    assert {(seam, name, *sorted(ideas)) for (seam, name), ideas in kept.items() if len(ideas) > 1} == {
        ('Corpus', 'text_field', 'facts', 'stories'), ('Run', 'average', 'cyclic_average', 'ema'), ('Run', 'flops_per_token', 'context_rampup', 'layer_loop'),
        ('Run', 'teacher', 'distillation', 'distilled'), ('Run', 'unknown', 'climb_vocabulary', 'masked_inputs'),
        ('Stream', 'lengths', 'climb_data', 'retrieval')}


@pytest.mark.parametrize('heeds', [(), BrokenPipeError])
@pytest.mark.parametrize('full', [True, False])
def test_nothing_that_prints_raises(monkeypatch, full, heeds):
    """A full disk, a reader that left, characters that an encoding lacks, a stream that was closed from the start."""
    left, right = os.pipe()
    os.close(left)
    with open('/dev/full' if full else right, 'w', encoding='ascii') as stream:
        monkeypatch.setattr(sys, 'stdout', stream)
        monkeypatch.setattr(sys, 'stderr', None)
        loader.print_without_fail(heeds)
        try:
            print('Zoë', flush=True)
            assert full or not heeds
        except BrokenPipeError:
            assert heeds and not full           # once; what ends because of it can still speak
        print('🙂' * 100_000, flush=True)
        print('no matter', file=sys.stderr)
        assert not sys.stdout.isatty()
        sys.stdout.close()
    if full:
        os.close(right)


def test_the_shapes_that_the_help_sweeps_can_be_built():
    """Of README's and the sweep's own example with config/babylm.py, whose heads must divide every width."""
    for text in ((ROOT / 'README.md').read_text(), (ROOT / 'config/bench_sweep.py').read_text()):
        shown = re.findall(r'--sweep "(n_embd=[\d,]+).*config/babylm.py', text)
        assert len(shown) == 1
        for line in shown:
            for width in re.findall(r'\d+', line):
                s, ideas = train.read_settings([str(ROOT / 'config/babylm.py'), f'--n_embd={width}'])
                kind = model.configured(ideas)
                assert kind(n_embd=s.n_embd, n_head=s.n_head, n_layer=s.n_layer).head_dim % 2 == 0

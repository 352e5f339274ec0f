"""What tests/fuzz.py once found stays mended, what it plants would be found, and the source has none of what runs data as code."""
import ast
import json
import os
import time

import pytest

import fuzz
from conftest import ROOT

pytestmark = pytest.mark.skipif(not hasattr(fuzz.os, 'fork'), reason='no fork')


@pytest.fixture(scope='module')
def bases(corpus, finished, tmp_path_factory):
    return fuzz.bases_of(corpus, finished[0], tmp_path_factory.mktemp('bases'))


def cases(target):
    return [case for case in map(json.loads, fuzz.FOUND.read_text().splitlines()) if case['target'] == target]


@pytest.mark.parametrize('target', fuzz.TARGETS)
def test_what_was_found_stays_mended(target, bases, tmp_path):
    wrong = [(case['bug'], why) for case, why, _ in fuzz.ended(target, bases, cases(target), tmp_path) if why]
    assert not wrong, '\n'.join(f'{bug}\n    {why}' for bug, why in wrong)


@pytest.mark.parametrize('target', fuzz.TARGETS)
def test_what_a_case_begins_with_is_accepted(target, bases, tmp_path):
    """Else every edit would be refused for another reason than its own."""
    argv = dict(configs=['train', 'mine.py', 'idea.py'], checkpoints=['run'], data=['page'], results=['leaderboard'], chats=['config/instruct.py', '--tokenizer=bytes'],
                corpora=['--tokenizer=bytes'], requests=['get1.http', 'whole'], lines=['sample', '{case}/run', 'Mia', '--max_new_tokens=2']).get(target, [])
    (_, why, accepted), = fuzz.ended(target, bases, [dict(target=target, edits=[], argv=argv)], tmp_path)
    assert accepted and not why, why


def test_the_harness_sees_what_it_looks_for(bases, tmp_path, monkeypatch):
    """A target that does what must not be, one thing after the other."""
    class Bad(fuzz.Target):
        def __init__(self, bases):
            super().__init__({'a': b'x'})

        def ask(self, folder, argv):
            exec(argv[0], dict(folder=folder, fuzz=fuzz))
    monkeypatch.setitem(fuzz.TARGETS, 'bad', Bad)
    monkeypatch.setattr(fuzz, 'CPU', 1)
    asked = {'1 / 0': 'ZeroDivisionError', 'while True: pass': 'took more than', 'bytearray(1 << 31)': 'MemoryError', 'raise SystemExit(1)': 'exit code 1',
             'fuzz.os.kill(fuzz.os.getpid(), 9)': 'the process died of signal 9', '(folder.parent / "out" / "new").touch()': 'out/new',
             'raise OSError("away")': 'an OSError that names no file', '(folder.parent / "out" / "secret").write_text("")': 'out/secret',
             'from config import UserError; raise UserError("no")': 'and no more', 'open(folder / "b")': '', '(folder / "b").touch()': ''}
    found = fuzz.ended('bad', bases, [dict(target='bad', edits=[], argv=[text]) for text in asked], tmp_path)
    for (case, why, _), said in zip(found, asked.values(), strict=True):
        assert said in why and bool(said) == bool(why), (case, why)


@pytest.mark.long
@pytest.mark.parametrize('target', fuzz.TARGETS)
def test_what_is_drawn_anew_holds(target, bases, tmp_path):
    """Cases of HALFHOUR_SEED, else of this day, for HALFHOUR_SECONDS (9); `python tests/fuzz.py --seed=` draws them again."""
    said, seed = [], int(os.environ.get('HALFHOUR_SEED', time.time() // 86400))
    n, accepted, found = fuzz.fuzz(target, bases, tmp_path, float(os.environ.get('HALFHOUR_SECONDS', 9)), seed, said.append)
    assert n > 0 and not found, '\n'.join([f'seed {seed}', *said])


# ---- the source

FORBIDDEN = {'eval', 'exec', 'compile', 'execfile', '__import__', 'os.system', 'os.popen', 'pickle.load', 'pickle.loads', 'marshal.loads', 'shelve.open',
             'yaml.load', 'joblib.load', 'shutil.unpack_archive'}
METHODS = {'extractall', 'extract', 'exec_module', 'Unpickler'}      # of whatever object
ALLOWED = {('config/__init__.py', 'compile'): 'of an idea that is named on the command line, whose settings are taken out',
           ('config/__init__.py', 'exec_module'): 'the same',
           ('config/python.py', 'compile'): 'asks whether a file is Python, and runs nothing',
           ('config/humaneval.py', 'compile'): 'what the model wrote, in a process that is held',
           ('config/humaneval.py', 'exec'): 'the same'}


def called(tree):
    """(dotted name, node) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def dangers(text):
    """What a source calls that would run data as code, hand a line to a shell, or write where an archive says."""
    for name, node in called(ast.parse(text)):
        last = name.split('.')[-1]
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in FORBIDDEN or last in METHODS:
            yield last if last in METHODS else name
        if name == 'torch.load' and words.get('weights_only') != 'True':
            yield 'torch.load without weights_only=True'
        if words.get('allow_pickle', 'False') != 'False' or words.get('shell', 'False') != 'False' or words.get('trust_remote_code', 'False') != 'False':
            yield f'{name} with allow_pickle, shell or trust_remote_code'


@pytest.mark.parametrize('text', ['pickle.load(f)', 'eval("1")', 'exec(x)', 'os.system("x")', 'subprocess.run("x", shell=True)', 'yaml.load(f)', 'torch.load(f)',
                                  'torch.load(f, weights_only=False)', 'np.load(f, allow_pickle=True)', 'tar.extractall()', 'pickle.loads(b)', 'pickle.Unpickler(f)',
                                  'zipfile.ZipFile(f).extractall()', 'shutil.unpack_archive(f)', 'load(f, trust_remote_code=True)'])
def test_the_search_finds_dangers(text):
    assert [*dangers(text)]


def test_no_source_runs_data_as_code():
    found = {(str(path.relative_to(ROOT)), what) for path in [*ROOT.glob('*.py'), *(ROOT / 'config').glob('*.py')] for what in dangers(path.read_text('utf-8'))}
    assert found == {*ALLOWED}, found ^ {*ALLOWED}

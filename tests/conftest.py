import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

if 'PYTEST_XDIST_WORKER' in os.environ:            # one of several at a time: threads of their own would be in each other's way
    os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'        # read as model.py is imported: kernels run on the CPU, one number at a time

sys.path.insert(0, str(Path(__file__).parent.parent))
import prepare_data


def pytest_configure(config):
    config.addinivalue_line('markers', 'long: 10 s and more each; run by pytest -m long, and by .ci/run')
    config.addinivalue_line('markers', 'slow: minutes each, some need a quiet machine; run by pytest -m slow')
    if not config.option.markexpr:
        config.option.markexpr = 'not slow and not long'


# what the tests of train.py, sample.py and bench_mfu.py share: one small corpus, prepared once, and one finished run

ROOT = Path(__file__).resolve().parent.parent
TINY = ['--compile=off', '--device=cpu', '--dtype=float32', '--tokenizer=bytes', '--n_layer=2', '--n_embd=64', '--n_head=2',
        '--block_size=64', '--tokens_per_step=512', '--log_interval=1', '--sample_tokens=16', '--eval_interval=0']


def tales(n, seed):
    """n short documents of two kinds, some with characters of several bytes."""
    rng = random.Random(seed)
    names, things, places = 'Mia Tom Ünal Zoë'.split(), 'kite ball drum shoe'.split(), 'tree house lake barn'.split()
    for i in range(n):
        name, thing, place = rng.choice(names), rng.choice(things), rng.choice(places)
        more = ' '.join(rng.choice(things + places) for _ in range(rng.randrange(1, 24)))
        yield f'{name} lost the {thing} by the {place}. {name} looked for the {thing}: {more}. {seed} {i} 🙂'


def stack(*ideas, **settings):
    """A prepare_data.Corpus with these ideas of config/, by name, and settings; what is not given is the ideas'."""
    paths = [str(ROOT / 'config' / f'{idea}.py') for idea in ideas]
    ideas = prepare_data.Ideas(paths, [prepare_data.Options], strict=False)
    return ideas.seam(prepare_data.Corpus)(SimpleNamespace(**ideas.values | settings))


class Corpus:
    """A folder in BabyLM's layout, two sources, and the settings that train a tiny model on it."""

    def __init__(self, folder):
        self.source, self.data_dir = folder / 'text', folder / 'data'
        self.source.mkdir()
        for seed, (name, n) in enumerate({'tales.train': 500, 'notes.train': 300, 'tales.dev': 90, 'notes.dev': 40}.items()):
            (self.source / name).write_text('\n\n'.join(tales(n, seed)), encoding='utf-8')
        self.args = [f'--dataset=files:{self.source}', f'--data_dir={self.data_dir}', '--min_doc_bytes=0', *TINY]
        self.folder = stack(dataset=f'files:{self.source}', tokenizer='bytes', data_dir=self.data_dir,
                            min_doc_bytes=0).build(quiet=True)

    def open(self):
        return prepare_data.open_data(self.folder, f'files:{self.source}')


def start(*args, cwd, launcher=()):
    """A script of the repository, started as its user would."""
    command = [sys.executable, *launcher, str(ROOT / args[0]), *map(str, args[1:])]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, text=True, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)


def finish(process, timeout=120):
    """(exit code, stdout, stderr); the process is killed when it takes longer."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def script(*args, cwd, timeout=120, launcher=()):
    return finish(start(*args, cwd=cwd, launcher=launcher), timeout)


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    return Corpus(tmp_path_factory.mktemp('corpus'))


STEPS = ['--max_steps=20', '--tokens_per_step=4096', '--micro_batch_size=32', '--save_minutes=0', '--seed=3']


@pytest.fixture(scope='session')
def finished(corpus, tmp_path_factory):
    """A run of 20 steps that nothing disturbed: its folder, and what it printed."""
    cwd = tmp_path_factory.mktemp('finished')
    code, out, err = script('train.py', *corpus.args, *STEPS, '--out_dir=run', '--eval_interval=0.5', cwd=cwd)
    assert code == 0, err
    return cwd / 'run', out


# runs in this process

@pytest.fixture
def handlers():
    """Signals are handled as before when a run in this process has ended."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def main(corpus, tmp_path, monkeypatch, capfd, handlers):
    """train_module().main in this process on the small corpus; gives its folder, prints what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        train_module().main([*corpus.args, '--budget_minutes=10000', '--out_dir=run', '--max_steps=3', '--save_minutes=0', *args])
        return capfd.readouterr().out
    return run


def train_module():
    import train                                # not as conftest is read: it starts the clock
    return train


def in_two_parts(main, monkeypatch, after, *args):
    """A run into `parts` that is told to stop after so many steps, and then resumed."""
    run = train_module().Run
    step = run.step

    def stop_after(self):
        step(self)
        self.stopping = self.stopping or self.steps >= after
    monkeypatch.setattr(run, 'step', stop_after)
    with pytest.raises(train_module().Stopped):
        main(*args, '--out_dir=parts')
    monkeypatch.setattr(run, 'step', step)
    return main(*args, '--out_dir=parts', '--init_from=resume')

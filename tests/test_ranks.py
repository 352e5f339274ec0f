"""Several ranks: one is lost and comes back, they do not see the same, they are one run however many they are."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import bench_mfu
import train
from conftest import ROOT, STEPS, finish, script, start
from config import bench_ranks, zero
from model import GPT, GPTConfig
from test_sample import Costs, items_of, of_sets, pairs, table
from test_train import losses, run_of

ZERO = str(ROOT / 'config' / 'zero.py')
TWO = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


@pytest.fixture(scope='module')
def two(corpus, tmp_path_factory):
    """The folder of a run of two ranks that nothing disturbed, and what it printed."""
    cwd = tmp_path_factory.mktemp('two')
    os.environ['OMP_NUM_THREADS'] = '1'         # as torchrun sets it: sums in the same order everywhere
    code, out, err = script('train.py', *corpus.args, *STEPS, asked(cwd), '--out_dir=run', cwd=cwd, launcher=TWO)
    assert code == 0, err
    return cwd / 'run', out


def asked(folder):
    (folder / 'pairs.jsonl').write_text(''.join(json.dumps(pair) + '\n' for pair in pairs()))
    return '--evals=pairs.jsonl'


def result(out_dir):
    return json.loads((out_dir / 'result.json').read_text())


def test_two_ranks_are_one_with_twice_the_accumulation(corpus, two, tmp_path):
    code, alone, err = script('train.py', *corpus.args, *STEPS, asked(tmp_path), '--out_dir=one', cwd=tmp_path)
    assert code == 0, err
    assert '= 1 micro-steps of 32 x 64 on 2 rank' in two[1] and '= 2 micro-steps of 32 x 64 on 1 rank' in alone
    assert losses(two[0]) == pytest.approx(losses(tmp_path / 'one'), rel=1e-5)
    both, one = result(two[0]), result(tmp_path / 'one')
    assert both['val_bpb'] == pytest.approx(one['val_bpb'], rel=1e-3)
    assert both['evals']['pairs'] == one['evals']['pairs'] and one['evals']['pairs']['items'] == 40
    assert both['tokens'] == one['tokens'] and both['val_share'] == 1


@pytest.mark.long
def test_shared_out_optimizers_make_the_same_run_and_checkpoint(corpus, two, tmp_path):
    code, out, err = script('train.py', *corpus.args, *STEPS, ZERO, asked(tmp_path), '--out_dir=run', cwd=tmp_path, launcher=TWO)
    assert code == 0, err
    assert losses(tmp_path / 'run') == pytest.approx(losses(two[0]), rel=1e-5)
    mine, theirs = (torch.load(folder / 'ckpt.pt', weights_only=True)['optimizers'] for folder in (tmp_path / 'run', two[0]))
    assert [[g['params'] for g in one['param_groups']] for one in mine] == [[g['params'] for g in one['param_groups']] for one in theirs]
    for one, other in zip(mine, theirs):
        assert one['state'].keys() == other['state'].keys()
        for i, state in one['state'].items():
            for name, value in state.items():
                torch.testing.assert_close(value, other['state'][i][name], rtol=1e-3, atol=1e-6)


@pytest.mark.long
def test_ranks_are_taught_as_one_is(corpus, two, tmp_path):
    (tmp_path / 'talk').mkdir()
    for name, n in (('talk.train.jsonl', 300), ('talk.dev.jsonl', 20)):
        (tmp_path / 'talk' / name).write_text(''.join(json.dumps(dict(prompt=f'Who? {i} {name}', answer='Mia did.')) + '\n' for i in range(n)))
    args = [a for a in corpus.args if not a.startswith('--dat')] + ['--dataset=files:talk', '--data_dir=data', f'--init_from={two[0]}', '--max_steps=2']
    code, out, err = script('train.py', str(ROOT / 'config' / 'instruct.py'), *args, '--out_dir=run', cwd=tmp_path, launcher=TWO)
    assert code == 0, err
    assert result(tmp_path / 'run')['evals'].keys() >= {'answers', 'forgotten'}


def test_parameters_are_shared_out_evenly_and_states_are_put_together_again():
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=5, n_head=2, n_embd=32))
    run = run_of('--dataset=generated', '--optimizer=muon')
    groups, count = run.groups(model), lambda part, named: sum(any(p is q for q in named) for p in part)
    for n in 2, 3, 7:
        parts = zero.dealt(groups, n)
        assert sorted(map(id, sum(parts, []))) == sorted(id(p) for p in model.parameters() if p.ndim > 1)
        sizes, matrices = [sum(p.numel() for p in part) for part in parts], [count(part, groups['matrices']['params']) for part in parts]
        assert max(sizes) - min(sizes) <= max(p.numel() for p in model.parameters()) and min(matrices) > 0
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer, other in zip(run.make_optimizers(model), run.make_optimizers(model)):
        optimizer.step()
        zero.give_states(other, zero.states_of(optimizer))
        ours, theirs = optimizer.state_dict()['state'], other.state_dict()['state']
        assert ours and ours.keys() == theirs.keys()
        assert all(torch.equal(t, theirs[i][k]) for i, known in ours.items() for k, t in known.items())


SLOW = """
import time
import train

class Run(train.Run):
    def step(self):
        super().step()
        time.sleep(0.02)

    def save(self):
        with open(f'saved{self.rank}', 'a') as f:
            f.write(f'{self.steps} ')
        unsaved = super().save()
        time.sleep(0.3 * self.master)
        return unsaved
"""


@pytest.mark.long
def test_all_ranks_save_after_the_same_step(corpus, tmp_path):
    """Though the first writes for a while each time, and the others do not."""
    (tmp_path / 'slow.py').write_text(SLOW)
    code, out, err = script('train.py', *corpus.args, *STEPS, '--max_steps=60', '--save_minutes=0.01', ZERO, 'slow.py', '--out_dir=run', cwd=tmp_path,
                            launcher=TWO, timeout=120)
    saved = [(tmp_path / f'saved{rank}').read_text().split() for rank in (0, 1)]
    assert code == 0 and saved[0] == saved[1] and len(saved[0]) > 2, err          # the last, and two on the way at least


# ---- a rank that is lost

LOST = """
import os, signal
import bench_mfu
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
    assert 'rank 0: another rank is gone' in err and 'train.py", line' not in err
    assert losses(tmp_path / 'run') == losses(two[0])
    assert result(tmp_path / 'run')['val_bpb'] == result(two[0])['val_bpb']


@pytest.mark.long
def test_a_rank_with_a_part_of_the_state_comes_back(corpus, tmp_path):
    """Rows' averages of NorMuon among it; and one rank that has all goes on too."""
    (tmp_path / 'lost.py').write_text(LOST)
    args = ['train.py', *corpus.args, *STEPS, '--max_steps=12', str(ROOT / 'config' / 'normuon.py')]
    assert script(*args, ZERO, '--out_dir=two', cwd=tmp_path, launcher=TWO)[0] == 0
    code, out, err = script(*args, ZERO, 'lost.py', '--out_dir=run', cwd=tmp_path, launcher=[*TWO, '--max_restarts=1'])
    assert code == 0 and len(re.findall('^halfhour:', out, re.M)) == 2, err
    assert losses(tmp_path / 'run') == losses(tmp_path / 'two')
    assert script(*args, ZERO, 'lost.py', '--out_dir=one', cwd=tmp_path, launcher=TWO)[0] == 1
    code, out, err = script(*args, ZERO, 'lost.py', '--out_dir=one', '--init_from=resume', cwd=tmp_path)
    assert code == 0, err
    assert losses(tmp_path / 'one') == pytest.approx(losses(tmp_path / 'two'), rel=1e-5)


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


# ---- ranks that do not hear, or do not see, each other

def idea(folder, text):
    (folder / 'mine.py').write_text(f'import time\nimport train\n\n{text}')
    return 'mine.py'


def test_a_number_that_gets_nowhere_ends_with_a_sentence(corpus, tmp_path):
    mine = idea(tmp_path, 'train.FIRST_WORD = 4\n\n\nclass Run(train.Run):\n    def all_reduce(self, array):\n'
                             '        time.sleep(60 * self.rank)\n        return super().all_reduce(array)\n')
    code, out, err = script('train.py', *corpus.args, mine, cwd=tmp_path, launcher=TWO)
    assert code == 1 and 'train.py", line' not in err
    assert re.search('^train.py.*: 2 ranks at .* have met, and no number got across in 4 s: GLOO_SOCKET_IFNAME names', err, re.M), err


@pytest.mark.long
def test_a_rank_that_hangs_ends_all(corpus, tmp_path, monkeypatch):
    """Stopped between two steps, it answers nobody, and the first one says so."""
    mine = idea(tmp_path, 'import os\nimport signal\ntrain.SILENCE = 5\n\n\nclass Run(train.Run):\n    def save_if_due(self):\n        super().save_if_due()\n'
                          '        if (self.steps, self.rank) == (4, 1):\n            os.kill(os.getpid(), signal.SIGSTOP)\n')
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    both = []
    for rank in '01':                           # without torchrun, which gives a stopped process half a minute
        for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)).items():
            monkeypatch.setenv(name, value)
        both.append(start('train.py', *corpus.args, *STEPS, '--out_dir=run', mine, cwd=tmp_path))
    try:
        code, out, err = finish(both[0], 90)
    finally:
        both[1].kill()
        both[1].communicate()
    assert code == 1 and err.endswith('rank 0: another rank is gone, or gave no answer for 5 s\n'), err
    assert 'train.py", line' not in err and len(losses(tmp_path / 'run')) == 4


def test_a_rank_that_refuses_is_heard_and_ends_all(corpus, tmp_path):
    mine = idea(tmp_path, 'class Run(train.Run):\n    def compare(self):\n        self.data.meta["fingerprint"] += "1" * self.rank\n'
                             '        super().compare()\n')
    code, out, err = script('train.py', *corpus.args, mine, cwd=tmp_path, launcher=TWO)
    assert code == 1 and re.search('^train.py, rank 1: this rank, on .*, has another data than rank 0: give all', err, re.M), err
    assert 'train.py", line' not in err and '---' not in out


def test_what_a_card_is_asked_for(monkeypatch):
    run, taken = run_of(), []
    run.device = 'cuda'
    monkeypatch.setattr(train.torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(train.torch.cuda, 'set_device', taken.append)
    monkeypatch.setenv('LOCAL_RANK', '1')
    run.take_card()
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(train.UserError, match='number 3 on a machine of 2 cards: start it with --nproc_per_node=2'):
        run.take_card()
    assert taken == [1]


def test_builders_take_turns(monkeypatch):
    """Rank 0, then the first of another host, then all others."""
    waits = []
    monkeypatch.setattr(train.dist, 'barrier', lambda group: waits.append(0))
    for rank, local, turn in ((0, 0, 0), (1, 1, 2), (2, 0, 1), (3, 1, 2)):
        run = run_of()
        run.rank, run.world, run.master = rank, 4, rank == 0
        monkeypatch.setenv('LOCAL_RANK', str(local))
        waits.clear()
        assert run.in_turn(lambda: len(waits)) == turn and len(waits) == 3


def test_a_verdict_is_the_same_however_many_ranks_share_the_items():
    items = items_of([p | dict(kind=f'{i % 3}') for i, p in enumerate(pairs(41))])
    model, shares = Costs(table(a=0.5)), []
    for n in (41, 40, 2):                       # 2: there are more ranks than items
        shares.clear()
        for rank in range(3):
            of_sets(x=items).judge(model, 'x', n, 64, None, rank, 3, lambda cost: shares.append(cost) or cost + 1)
        whole = of_sets(x=items).judge(model, 'x', n, 64, None, 0, 3, lambda cost: sum(shares))
        assert whole == of_sets(x=items).judge(model, 'x', n) and whole['items'] == n
        assert sum((share != 0).any() for share in shares) == min(n, 3)


# ---- gradients on their way

class Wire:
    """Stands for torch.distributed: what is sent, and when; two ranks that are alike."""

    def __init__(self, monkeypatch):
        self.log = []
        monkeypatch.setattr(train.dist, 'all_reduce', self.all_reduce)

    def all_reduce(self, tensor, async_op):
        self.log.append(tensor.numel())
        tensor.mul_(2)
        return SimpleNamespace(wait=lambda: self.log.append('wait'))


def test_gradients_are_sent_while_others_are_made(monkeypatch):
    wire, layers = Wire(monkeypatch), torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    monkeypatch.setattr(train.GradientSum, 'NUMBERS', 20)
    x, told, seen = torch.randn(5, 4), torch.ones(2), []
    layers[0].weight.register_hook(lambda grad: seen.append(list(wire.log)))
    layers(x).sum().backward()
    alone = [p.grad.clone() for p in layers.parameters()]
    layers.zero_grad()
    together = train.GradientSum(layers.parameters(), torch.float32)
    layers(x).sum().backward()                  # of a step's first micro-batch
    assert not wire.log
    together.begin()
    layers(x).sum().backward()
    assert seen[-1] == [20, 20] and wire.log == [20, 20, 20]          # the first layer's came last
    together.finish(told, 2)
    assert wire.log == [20, 20, 20, 2] + ['wait'] * 4 and told.tolist() == [2, 2]
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(layers.parameters(), alone))


def test_a_gradient_that_is_not_there_is_nought_and_one_that_comes_twice_is_refused(monkeypatch):
    wire, one, other = Wire(monkeypatch), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    other.bias.requires_grad_(False)
    together = train.GradientSum([*one.parameters(), *other.parameters()], torch.bfloat16)
    together.begin()
    one(torch.ones(4)).sum().backward()
    assert not wire.log                         # `other` stands before it, and has none
    together.finish(torch.ones(2), 2)
    assert wire.log[0] == 36 and not other.weight.grad.any() and other.bias.grad is None and one.weight.grad.all()
    together.begin()
    one(torch.ones(4)).sum().backward()
    with pytest.raises(RuntimeError, match='came twice'):
        one(torch.ones(4)).sum().backward()


@pytest.mark.long
def test_gradients_in_half_the_bytes(corpus, two, tmp_path):
    code, out, err = script('train.py', *corpus.args, *STEPS, '--reduce_dtype=bfloat16', '--out_dir=run', cwd=tmp_path, launcher=TWO)
    assert code == 0, err
    assert losses(tmp_path / 'run') == pytest.approx(losses(two[0]), rel=2e-2) and losses(tmp_path / 'run') != losses(two[0])


# ---- two hosts

HOST_LOST = """
import os, signal
import bench_mfu
import train

class Run(train.Run):
    def save_if_due(self):
        super().save_if_due()
        if self.steps == 8 and 'LOSE' in os.environ:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them: [(name, address, interface)]."""
    made = [(f'halfhour{os.getpid()}{i}', f'10.177.{os.getpid() % 250}.{i}', f'hh{os.getpid() % 10 ** 8}{i}') for i in (1, 2)]

    def ip(*args):
        return subprocess.run(['ip', *args], capture_output=True).returncode == 0
    if not shutil.which('ip') or not all(ip('netns', 'add', name) for name, *_ in made):
        pytest.skip('network namespaces cannot be made here')
    try:
        assert ip('link', 'add', made[0][2], 'netns', made[0][0], 'type', 'veth', 'peer', 'name', made[1][2], 'netns', made[1][0])
        for name, address, link in made:
            assert ip('-n', name, 'addr', 'add', f'{address}/24', 'dev', link)
            assert ip('-n', name, 'link', 'set', link, 'up') and ip('-n', name, 'link', 'set', 'lo', 'up')
        yield made
    finally:
        for name, *_ in made:
            ip('netns', 'del', name)


@pytest.mark.slow
def test_a_lost_host_comes_back(corpus, two, tmp_path, hosts):
    """Each has its torchrun; one is killed with all that runs on it, and starts again."""
    (tmp_path / 'lost.py').write_text(HOST_LOST)

    def torchrun(host, **env):
        name, address, link = host
        command = ['ip', 'netns', 'exec', name, sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1',
                   '--max_restarts=3', '--rdzv_backend=c10d', f'--rdzv_endpoint={hosts[0][1]}:29400', '--rdzv_id=it',
                   f'--rdzv_conf=is_host={int(host is hosts[0])}', f'--local_addr={address}', str(ROOT / 'train.py'), *corpus.args, *STEPS, 'lost.py', '--out_dir=run']
        env = os.environ | dict(GLOO_SOCKET_IFNAME=link, TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1') | env
        return subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    here, there = torchrun(hosts[0]), torchrun(hosts[1], LOSE='1')
    try:
        assert there.wait(180) == -9
        back = torchrun(hosts[1])
        code, out, err = finish(here, 240)
        assert (code, finish(back)[0]) == (0, 0), err
    finally:
        here.kill(), there.kill()
    assert losses(tmp_path / 'run') == losses(two[0])
    assert result(tmp_path / 'run')['val_bpb'] == result(two[0])['val_bpb']


# ---- what a step takes on many

def test_the_model_of_a_step():
    link = bench_ranks.Link('', 10.0, 1.0, 0.0)
    load = bench_ranks.Load(compute=90.0, rows=64, micro=16, size=60.0, last=6.0, buckets=3, optimizer=1.0, launch=0.5)
    assert bench_ranks.step(load, 1, link) == (91, 1, 4)
    assert bench_ranks.step(load, 2, link) == (pytest.approx(46 + 0.6), pytest.approx(0.9), 2)         # 6 s behind 15
    assert bench_ranks.step(load, 8, link)[0] == pytest.approx(90 / 8 + 1 + (10.5 - 7.5))               # 10.5 s behind 7.5
    assert bench_ranks.step(load, 16, link, 0.5)[0] == pytest.approx(90 / 16 + 1 + 56.25 - 90 / 24)     # the slower link
    load.shared = 0.8                                                                                   # of 1 s of the optimizer
    assert bench_ranks.step(load, 2, link, zero=True)[0] == pytest.approx(46.6 - 0.4 + 3)               # half of 60 sent once
    slow = bench_ranks.Link('', 10.0, 1.0, 0.25)
    assert bench_ranks.step(load, 8, slow)[0] == pytest.approx(90 / 8 + 1 + 15 - 7.5)                   # 3 buckets x 6 delays
    load.launch = 20.0
    assert bench_ranks.step(load, 64, link)[2:] == (1,) and bench_ranks.step(load, 64, link)[0] > 20


def test_the_tables_of_ranks(corpus, capsys):
    bench_mfu.main(['--ranks', str(ROOT / 'config' / 'wide.py'), *corpus.args])
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith('|')][2:]
    assert [row.split('|')[1].strip() for row in rows].count('H100') == 4          # 8 rows of text in a step of 512
    assert 'for the optimizer measured' in out and 'all stated' in out and 'FLOPs of Muon' in out
    with pytest.raises(train.UserError, match='names no config'):
        bench_mfu.main(['--ranks'])

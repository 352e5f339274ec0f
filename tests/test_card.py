"""The path of a card, without one: what is built for it, asked of it, waited for and launched. No card has confirmed any of it.

    python -m pytest -s tests/test_card.py -k branch       says which branches that ask for a card were walked
"""
import contextlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import bench_mfu
import fake_card
import model as m
import sample
import train
from card import SCRIPTS, Ops, branches, standing_in, walked
from config import UserError, bench_first, expert_kernels, loss_kernels
from conftest import ROOT, in_two_parts
from test_stacks import folder, ideas, run_of         # noqa: F401: a fixture
from test_tokenformer import make, tokens

pytest.importorskip('triton')
TABLE, COLUMNS = ROOT / 'tests' / 'kernel_builds.tsv', ('sm', 'kernel', 'case', 'registers', 'stack', 'shared')


# ---- the kernels, built for every architecture

def table():
    """Triton's version, and {(sm, kernel, case, registers, bytes of stack, bytes of shared memory): builds} that are committed."""
    first, _, *lines = TABLE.read_text().splitlines()
    rows = (line.split('\t') for line in lines)
    return first.split()[-1], Counter({(int(r[0]), r[1], r[2], *map(int, r[3:6])): int(r[6]) for r in rows})


def written(builds):
    """The text of the table: of `bench_mfu.py config/babylm.py config/z_loss.py --kernels=compile-only --json=...`, its builds, and of
    those with config/experts.py its own kernels'."""
    rows = Counter(tuple(b[k] for k in COLUMNS) for b in builds)
    lines = [f'# built by Triton {m.triton.__version__}', '\t'.join([*COLUMNS, 'builds']), *('\t'.join(map(str, [*r, n])) for r, n in sorted(rows.items()))]
    return '\n'.join(lines) + '\n'


@pytest.mark.parametrize('idea, kernels', dict(z_loss='(?!expert)', experts='expert').items())
@pytest.mark.parametrize('sm', [pytest.param(sm, marks=pytest.mark.long if sm == 89 else pytest.mark.slow) for sm in bench_mfu.SHARED_MEMORY])
def test_what_is_built_is_what_is_committed(sm, idea, kernels, monkeypatch):
    """By the same Triton to the register; by another within the limits. HALFHOUR_WRITE=1 writes what is built now."""
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    done = subprocess.run([sys.executable, 'bench_mfu.py', 'config/babylm.py', f'config/{idea}.py', '--kernels=compile-only', f'--compile_for={sm}'],
                          cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    builds = [b for b in json.loads(done.stdout) if re.match(kernels, b['kernel'])]
    assert not any(b['over'] for b in builds) and all(0 < b['registers'] < 256 and not b['fp64'] for b in builds)
    version, rows = table()
    mine = Counter({row: n for row, n in rows.items() if row[0] == sm and re.match(kernels, row[1])})
    if os.environ.get('HALFHOUR_WRITE'):
        others = [dict(zip(COLUMNS, row)) for row, n in (rows - mine).items() for _ in range(n)]
        TABLE.write_text(written(builds + others))
    elif version == m.triton.__version__:
        assert Counter(tuple(b[k] for k in COLUMNS) for b in builds) == mine


def test_the_table_is_of_every_kernel_for_every_card_within_its_limits():
    rows = table()[1]
    kernels = {name for module in (m, loss_kernels, expert_kernels) for name in dir(module) if name.endswith('_kernel')}
    assert {(row[0], row[1]) for row in rows} == {(sm, kernel) for sm in bench_mfu.SHARED_MEMORY for kernel in kernels}
    assert all(shared <= bench_mfu.SHARED_MEMORY[sm] and stack <= bench_mfu.SPILLED for sm, _, _, _, stack, shared in rows)


# ---- every branch that asks for a card

ON = ['--device=cuda', '--compile=on', '--dtype=auto']


@pytest.fixture
def card(monkeypatch):
    with standing_in(monkeypatch) as card:
        yield card


def test_a_run_on_a_card(card, main, tmp_path, monkeypatch):
    out = main(*ON, '--kernels=none', '--tokens_per_step=1024', '--micro_batch_size=4', '--country=FR')
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['hardware'] == dict(device='cuda', name='NVIDIA GeForce RTX 4090', ranks=1, dtype='bfloat16')
    assert result['peak_mem_gb'] == 1.0 and result['mfu'] == pytest.approx(result['tflops'] / 165.2)
    assert result['energy']['how']['gpu'].startswith('measured (NVML counter')
    assert card.pinned and card.compiled == [dict(dynamic=False)] and card.asked['mem_get_info'] == 1 and 'torch.compile on' in out
    assert in_two_parts(main, monkeypatch, 2, *ON, '--kernels=none')          # resumes


@pytest.mark.long
@pytest.mark.parametrize('options, dtype', [({}, torch.bfloat16), (dict(mlp='swiglu', n_kv_head=1), torch.bfloat16), ({}, torch.float32)])
def test_every_kernel_is_chosen_in_the_dtype_of_a_card(card, options, dtype):
    """All of choose_kernels but its clock, in bfloat16 too: forward and backward of a layer beside PyTorch's."""
    config = m.GPTConfig(vocab_size=40, block_size=16, n_layer=1, n_head=2, head_dim=16, n_embd=32, **options)
    lines = m.choose_kernels('all', config, 'cuda', dtype)
    assert m.IN_USE == (set(m.KERNELS) if dtype == torch.bfloat16 else {'rms_norm', 'cross_entropy'}), lines
    assert [card.launches[k] for k in ('qk_backward_kernel', 'mlp_kernel')] == ([4, 2] if dtype == torch.bfloat16 else [0, 0])


def test_experts_on_a_card(card):
    """A step of theirs in bfloat16: with their kernels the host never waits for the card, and the gradients are those without (each
    token passes all: which of more it would, rounding decides)."""
    torch.manual_seed(0)
    model, idx, found = make('experts', experts=3).to('cuda'), tokens(2, 31, (0, 13)).to('cuda'), []
    model.compute_dtype = torch.bfloat16
    for in_use in {'experts'}, set():
        m.IN_USE.clear()
        m.IN_USE.update(in_use)
        card.waits.clear()
        card.launches.clear()
        model.zero_grad()
        model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous()).backward()
        found.append([p.grad for p in model.parameters() if p.ndim > 1])
        assert not card.waits and card.launches == (dict(expert_rows_kernel=4 * len(model.blocks), expert_weights_kernel=2 * len(model.blocks))
                                                    if in_use else {})
    assert all((a - b).norm() < 0.05 * b.norm() for a, b in zip(*found))


@pytest.mark.parametrize('options, said', [
    (dict(capability=(7, 5)), 'older than Ampere'), (dict(free=2 ** 20), '0.0 are free: lower micro_batch_size'),
    (dict(bf16=False), 'float32'), (dict(nvml=False), "estimated (the board's 450 W")])
def test_a_card_that_is_old_or_small_or_not_told_of(monkeypatch, main, options, said):
    with standing_in(monkeypatch, **options):
        try:
            out = main(*ON, '--max_steps=1', '--kernels=rms_norm' if 'capability' in options else '--kernels=none')
        except UserError as e:
            out = str(e)
    assert said in out


class Profile(SimpleNamespace):
    """torch.profiler.profile of two kernels on a card, and what else it lists."""
    __enter__ = lambda self: self
    __exit__ = lambda self, *error: None

    def key_averages(self):
        for key, device, note in (('attention_kernel', 'CUDA', False), ('ampere_gemm', 'CUDA', False), ('aten::mm', 'CPU', False), ('step', 'CUDA', True)):
            yield SimpleNamespace(key=key, self_device_time_total=3.0, device_type=SimpleNamespace(name=device), is_user_annotation=note)


def walk(card, corpus, main, tmp_path, monkeypatch, capfd):
    """Scripts and ideas, on a card; what each finds is asserted where it is walked."""
    (tmp_path / 'pairs.jsonl').write_text(''.join(json.dumps(dict(sentence_good=f'Mia {i}', sentence_bad=f'Tom {i}')) + '\n' for i in range(40)))
    small = [*ON, '--kernels=none', '--max_steps=2']
    main(*small, f'--evals={tmp_path / "pairs.jsonl"}', '--device=auto')
    assert json.loads((tmp_path / 'run' / 'result.json').read_text())['evals']['pairs']['items'] == 40
    config = m.GPTConfig(vocab_size=40, block_size=16, n_layer=1, n_head=2, head_dim=16, n_embd=32)
    assert len(m.choose_kernels('attention', config, 'cuda', torch.bfloat16)) == 2 and m.IN_USE == {'attention'}
    card.capability = 7, 5
    assert m.choose_kernels('all', config, 'cuda', torch.bfloat16)[0].endswith('the card is older than Ampere (sm_80)')
    card.capability = 8, 9
    assert m.shared_memory(torch.zeros(1)) == 101376
    for idea, more in dict(distillation=['--teacher=run'], cuda_graphs=[]).items():
        main(str(ROOT / 'config' / f'{idea}.py'), *small, f'--out_dir={idea}', *more)
    with monkeypatch.context() as patch:
        loss = train.Run.loss

        def little_room(self, idx, targets, **extras):
            if len(idx) > 2:
                raise torch.OutOfMemoryError('CUDA out of memory')
            return loss(self, idx, targets, **extras)
        patch.setattr(train.Run, 'loss', little_room)
        assert 'micro_batch_size 2 instead of 4' in main(*small, '--micro_batch_size=4', '--out_dir=little') and card.asked['empty_cache'] == 1
    with monkeypatch.context() as patch:                    # the second of two ranks, on the second card
        told = []
        for name, value in dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR='here', MASTER_PORT=1).items():
            patch.setenv(name, str(value))
        patch.setattr(torch.cuda, 'set_device', lambda device: told.append(device))
        patch.setattr(torch.cuda, 'device_count', lambda: 2)
        patch.setattr(train.dist, 'rendezvous', lambda *a, **k: iter([('store', 1, 2)]))
        patch.setattr(train.dist, 'init_process_group', lambda backend, **k: told.append(backend))
        for name in 'new_group barrier all_reduce broadcast_object_list'.split():
            patch.setattr(train.dist, name, lambda *a, **k: None)
        run = train.begin([*corpus.args, *small, '--out_dir=ranks'])
        run.open()
        assert told == [1, 'cpu:gloo,cuda:nccl']
        patch.setattr(train.os, '_exit', told.append)
        run.give_up('both')                                 # no number has got across
        assert told[2] == 2 and 'NCCL_P2P_DISABLE=1' in capfd.readouterr().err
    assert sample.main(['run', '--max_new_tokens=3', '--stats', 'Mia']) is None
    from config import difficulty
    assert difficulty.judge('run')[0].wte.weight.is_cuda
    monkeypatch.setattr(torch.profiler, 'profile', lambda **options: Profile())
    bench_mfu.main([*corpus.args, *small, '--rounds=1', '--json=bench.json', '--block_size=32', '--tokens_per_step=64'])
    found = json.loads((tmp_path / 'bench.json').read_text())
    assert found['where']['shares']['attention'] == 0.5 and found['where']['largest_other'] == '' and found['rows'][0]['peak_mem_gb']
    assert {'ours', 'SDPA, cuDNN', 'compiled FlexAttention, same mask'} < {row['rival'] for row in found['kernels']}
    assert run.measure.rows(difficulty.judge('run')[0]) == 256
    monkeypatch.setattr(bench_first, 'bounded', in_this_process)
    monkeypatch.setattr(bench_first, 'CONFIG', tmp_path)
    (tmp_path / 'tiny.py').write_text('n_layer = 1\n')
    bench_mfu.main(['--first', 'tiny.py', *corpus.args, *small, '--block_size=32', '--tokens_per_step=64'])
    found = json.loads((tmp_path / 'out' / 'first' / 'first.json').read_text())
    assert found['recommended']['kernels'] == 'none' and len(found['step']['ways']) == 2 and found['kernels']['checks'] and 'peers' not in found


def in_this_process(name, until, folder, rest, found):
    """A part of --first as its own process makes it."""
    mine = found[name] = {}
    s, ideas = train.read_settings(rest)
    for piece in bench_first.PARTS[name][1](s, ideas, found):
        bench_first.add(mine, piece)
    return mine | dict(broken={}, fault='', seconds=1.0)


UNWALKED = {}       # {condition: why no test walks it}


@pytest.mark.slow
def test_every_branch_that_asks_for_a_card_is_walked(card, corpus, main, tmp_path, monkeypatch, capfd):
    known = {b for path in SCRIPTS for b in branches(path)}
    with walked(known) as seen:
        walk(card, corpus, main, tmp_path, monkeypatch, capfd)
    for b in sorted(known):
        print(f'{"walked    " if b in seen else "NOT WALKED"} {b.path.name}:{b.first[0]}: {b.asked[:70]}')
    print(f'{len(seen)} of {len(known)} branches that ask for a card were walked')
    assert {b.asked for b in known - seen} == set(UNWALKED)


# ---- what a step waits for, and what it launches

def step_of(card, corpus, *args, vocab_size=0):
    """(a run, operations, launches, waits) of one step at its full size, on tensors that are fake: nothing is computed."""
    s, ideas = train.read_settings([*args, f'--dataset=files:{corpus.source}', f'--data_dir={corpus.data_dir}', '--min_doc_bytes=0',
                                    '--tokenizer=bytes', '--device=cuda', '--dtype=bfloat16', '--compile=off', '--evals='], bench_mfu.TABLES)
    card.answers = {torch.Tensor.tolist: lambda x: [1.0] * x.numel(), torch.Tensor.item: lambda x: 1.0}
    with (FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(torch.nn.Module, 'to', lambda self, device: self),
          mock.patch.object(FakeTensor, 'tolist', torch.Tensor.tolist)):
        run = bench_mfu.measured(ideas)(s, kernels=m.KERNELS, vocab_size=vocab_size)
        run.step()
        card.waits.clear(), card.launches.clear()
        with Ops() as ops:
            run.step()
    run.batches.close()
    return run, ops.counts, Counter(card.launches), Counter(card.waits)


LAUNCH_US, REACHED = 8.0, 0.45      # assumed, of a host that starts operations one by one and of a 4090's data-sheet peak: not measured
BOUND = dict(quickstart='launches', babylm='arithmetic', nocap='arithmetic')


@pytest.mark.parametrize('name', ['quickstart', *(pytest.param(name, marks=pytest.mark.long) for name in ('babylm', 'nocap'))])
def test_a_step_waits_once_and_is_bound_by_what_is_known(card, corpus, name):
    """With -s, a row of RESULTS.md's table: uncompiled, so an upper bound of what is launched."""
    run, ops, launches, waits = step_of(card, corpus, str(ROOT / 'config' / f'{name}.py'), vocab_size=2048 if name == 'quickstart' else 8192)
    assert waits == {('tolist', 'train.py:descend'): 1}
    layers = run.accum * run.config.n_layer
    assert launches['attention_kernel'] == launches['qk_backward_kernel'] == layers and launches['mlp_kernel'] == 2 * layers
    n, works = sum(ops.values()) + sum(launches.values()), run.s.tokens_per_step * run.flops_per_token
    host, device = n * LAUNCH_US / 1e3, 1e3 * works / (REACHED * sample.peak_flops(card.properties.name))
    print(f'| {name} | {run.accum} x {run.micro} | {sum(ops.values()):,} | {sum(launches.values())} | {host:.1f} | {device:.1f} | '
          f'{"launches" if host > device else "arithmetic"} |')
    assert max(host, device) > 2 * min(host, device) and ('launches' if host > device else 'arithmetic') == BOUND[name]


# ---- every idea's loss with the kernels, traced for a compiler

BREAKS = dict(experts='PyTorch compiles products of groups in bf16 alone')      # why a loss is more than one graph


def traced(name, out):
    """How often the tracer gave up, and why, as a compiled loss of an idea and its gradients were made with all kernels in the graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = run_of([name], out, '--dtype=float32')
    run.open(), run.build()
    run.step_model = torch.compile(run.model, dynamic=False, backend='aot_eager')
    batch = run.stream.batch(0, run.micro, run.s.block_size)
    with mock.patch.object(m, 'launch', lambda *a, **k: None), bench_mfu.using(m.KERNELS):
        try:
            run.batch_loss(**batch).backward()
        except Exception as e:
            return 0, {repr(e)[:300]: 1}
    counters = torch._dynamo.utils.counters
    return counters['stats']['unique_graphs'], dict(counters['graph_break'])


@pytest.mark.slow
def test_no_idea_breaks_the_graph_but_those_named(folder):
    found = {}
    with contextlib.chdir(folder):
        for name in ideas():
            if name != 'instruct':                           # the loss is the base's, and it goes on from a run
                graphs, found[name] = traced(name, f'out/traced-{name}')
                print(f'{name}: {graphs} graphs, {found[name]}', flush=True)
    assert len(found) > 25 and {name for name, breaks in found.items() if breaks} == set(BREAKS), found


# ---- every idea on fake tensors of a card

REFUSED = dict(experts='the host reads which tokens go where', dynamics='what it measures goes to a file on the way',
               snapshots='how many were taken is a buffer, read at the end of a cycle')      # what no fake tensor can tell a host


@pytest.mark.slow
@pytest.mark.skipif(not torch.version.cuda or torch.cuda.is_available(), reason="needs torch's CUDA build, and no card")
def test_ideas_on_fake_tensors_of_a_card(folder, tmp_path):
    """A step, a growth, an evaluation, generation: where what is on a CPU meets what is on a card, and what a kernel is given."""
    libraries = {'driver.so': [], 'libcuda.so.1': ['-Wl,-soname,libcuda.so.1']}
    (tmp_path / 'driver.c').write_text(fake_card.DRIVER)
    for name, options in libraries.items():
        subprocess.run(['cc', '-shared', '-fPIC', *options, '-o', tmp_path / name, tmp_path / 'driver.c'], check=True)
    more = dict(LD_PRELOAD=str(tmp_path / 'driver.so'), LD_LIBRARY_PATH=str(tmp_path))
    done = subprocess.run([sys.executable, ROOT / 'tests' / 'fake_card.py', folder, 'base', *ideas()], env=os.environ | more,
                          capture_output=True, text=True, timeout=3000)
    found = json.loads(done.stdout)
    assert {name for name, said in found.items() if isinstance(said, str)} == set(REFUSED), found
    assert found['base'] > 100 and found['growth'] > found['base']

"""bench_mfu.py --first: a part that fails is a line, a kernel that is wrong or slow is off, and nothing personal is in the report."""
import contextlib
import getpass
import json
import math
import os
import re
import socket
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench_mfu
import model as m
import train
from config import UserError, bench_first, first_parts
from conftest import ROOT

GOOD = dict(machine=dict(hardware='RTX 4090'), room=dict(sizes=[dict(rows=n, tok_per_sec=100.0 + n, peak_gib=1.0) for n in (1, 2, 4)]),
            kernels=dict(checks=[dict(operation='MLP', kernels=['mlp'], used=['mlp'], why='')]),
            step=dict(ways=[dict(way='eager', compiled=False, start_s=3.0, tok_per_sec=400.0, parameters=10 ** 6), dict(way='compiled', compiled=True, start_s=30.0, tok_per_sec=1000.0, parameters=10 ** 6)]))


def settings(*more):
    return train.read_settings([str(ROOT / 'config' / 'babylm.py'), *more])[0]


# ---- processes

@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(code, seconds): what a part finds that is this code, in a process without torch; file is where it leaves it."""
    def make(code, seconds=20.0):
        head = 'import json, os, signal, sys, time\nfile = sys.argv[1]\nfound = json.load(open(os.path.join(os.path.dirname(file), "found.json")))\n'
        keep = 'mine = found["x"]\ndef keep(**d):\n    mine.update(d)\n    open(file, "w").write(json.dumps(mine))\n'
        (tmp_path / 'part.py').write_text(head + keep + code)
        monkeypatch.setattr(bench_first, 'command', lambda file, rest: [sys.executable, str(tmp_path / 'part.py'), str(file)])
        return bench_first.bounded('x', time.monotonic() + seconds, tmp_path, [], dict(device='cpu'))
    return make


@pytest.mark.parametrize('code, fault', [
    ('keep(a=1)\nraise ValueError("/home/joe/x y")', 'ValueError: x y'), ('keep(a=1)\nos.kill(os.getpid(), signal.SIGKILL)', 'killed by SIGKILL'),
    ('keep(a=1)\nos.kill(os.getpid(), signal.SIGSEGV)', 'killed by SIGSEGV'), ('keep(a=1)\nprint("rubbish" * 10 ** 5)', ''),
    ('keep(a=1)\nsys.exit(3)', 'exit code 3'), ('keep(a=1)\nsys.exit("bench_mfu.py: say less")', 'say less')])
def test_a_part_that_fails_is_a_line_and_keeps_what_it_found(made, code, fault):
    found = made(code)
    assert found.pop('seconds') > 0 and found == dict(a=1, broken={}, fault=fault)


@pytest.mark.parametrize('code', ['open(file, "w").write("\\x00{rubbish")', 'open(file, "w").write("[1, 2]")', 'pass', 'open(file, "w").write("{")'])
def test_a_part_that_leaves_rubbish_left_nothing(made, code):
    found = made(code)
    assert found.pop('seconds') > 0 and found == dict(broken={}, fault='it left nothing that can be read')


def test_a_part_that_hangs_is_killed_with_what_it_started(made, tmp_path):
    began = time.monotonic()
    found = made('import subprocess\nchild = subprocess.Popen(["sleep", "100"])\nkeep(child=child.pid, tried=["a"])\ntime.sleep(100)', 2.0)
    assert time.monotonic() - began < 8 and found['fault'] == 'it was stopped, its time was over'
    assert found['broken'] == {'a': found['fault']}
    for _ in range(50):                            # until it is reaped by whoever reaps orphans
        state = (open(f'/proc/{found["child"]}/stat').read().split()[2] if os.path.exists(f'/proc/{found["child"]}') else 'Z')
        if state == 'Z':
            break
        time.sleep(0.1)
    assert state == 'Z'


def test_what_breaks_a_part_is_left_out_when_it_is_made_again(made):
    found = made('for name in "abcd":\n    if name not in mine.get("tried", ()):\n        keep(tried=mine.get("tried", []) + [name])\n'
                 '        if name in "bd":\n            os.kill(os.getpid(), 11 if name == "b" else 9)\n        keep(**{name: 1})\n', 30)
    assert found.pop('seconds') < 30
    assert found == dict(tried=[*'abcd'], a=1, c=1, broken=dict(b='killed by SIGSEGV', d='killed by SIGKILL'), fault='')


def test_a_part_leaves_what_it_yields_as_it_yields_it(tmp_path, monkeypatch):
    def part(s, ideas, found):
        yield dict(a=[s.n_layer], b=1)
        yield dict(a=[found['z']['c']], b=2)
        raise ValueError(s.kernels)
    alarms = []
    monkeypatch.setattr(bench_first.signal, 'alarm', alarms.append)
    monkeypatch.setitem(bench_first.PARTS, 'x', (1, part))
    checks = [dict(kernels=['mlp'], used=[], why='slow')]
    (tmp_path / 'found.json').write_text(json.dumps(dict(device='cuda', seconds=3.2, x=dict(a=[0]), z=dict(c=5), kernels=dict(checks=checks))))
    with pytest.raises(ValueError, match='^-mlp$'):                  # what was found before is heeded
        bench_mfu.main(['--first', f'--part={tmp_path / "x.json"}', str(ROOT / 'config' / 'babylm.py')])
    assert json.loads((tmp_path / 'x.json').read_text()) == dict(a=[0, 7, 5], b=2) and alarms == [9]


# ---- the card, stood in for

@pytest.fixture
def card(monkeypatch):
    """A machine of two cards as far as parts ask, its memory this one's."""
    for name, told in dict(mem_get_info=(2e10, 2 ** 34), device_count=2, get_device_capability=(8, 9), get_device_name='RTX 4090',
                           get_device_properties=SimpleNamespace(multi_processor_count=128), can_device_access_peer=False,
                           device=contextlib.nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, told=told: told)
    for name in ('arange', 'empty_like'):
        monkeypatch.setattr(torch, name, lambda *a, device=None, plain=getattr(torch, name): plain(*a))
    monkeypatch.setattr(torch.Tensor, 'pin_memory', torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, 'to', lambda self, *a, plain=torch.Tensor.to: self.clone() if 'cuda' in str(a) else plain(self, *a))
    monkeypatch.setattr(train, 'choose_device', lambda s: 'cuda')
    monkeypatch.setattr(train, 'seconds_of', lambda work, times: work() is None or 0.01)


def gathered(pieces):
    found = {}
    for piece in pieces:
        bench_first.add(found, piece)
    return found


@pytest.mark.parametrize('smi, link', [('echo "1, 4, 8, 16, 450.00 W, 3105 MHz"', '8'), ('exit 9', None), (None, None)])
def test_what_a_card_is(card, tmp_path, monkeypatch, smi, link):
    if smi:
        (tmp_path / 'nvidia-smi').write_text(f'#!/bin/sh\n{smi}\n')
        (tmp_path / 'nvidia-smi').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    driver = 'NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Thu'
    monkeypatch.setattr(first_parts.sample, 'proc', lambda name: driver if 'nvidia' in name else 'MemTotal: 1048576 kB\n')
    found = gathered(first_parts.machine(None, None, {}))
    assert found['driver'] == '580.95.05' and found['capability'] == '8.9' and found['card_gib'] == 16 and found['memory_gib'] == 1
    assert found['cards'] == ['RTX 4090'] * 2 and found['to_card_gb_s'] == pytest.approx(6.7, abs=0.1) and found['from_card_gb_s']
    assert found.get('pcie_link_width_current') == link and dict(bench_first.facts(found))['to card, GB/s'] == '6.711'


def test_copies_between_cards_are_checked(card, monkeypatch):
    pairs = gathered(first_parts.peers(None, None, dict(peers=dict(tried=['card 0 to card 1']))))
    assert pairs['tried'] == ['card 1 to card 0'] and pairs['pairs'][0] == dict(
        pair='card 1 to card 0', direct=False, right=True, gb_s=pytest.approx(26.8, abs=0.1))
    monkeypatch.setattr(torch.Tensor, 'to', lambda self, *a: self * 0)
    found = {}
    with pytest.raises(UserError, match='NCCL_P2P_DISABLE=1'):
        for piece in first_parts.peers(None, None, {}):
            bench_first.add(found, piece)
    assert found['pairs'][0]['right'] is False


@pytest.mark.parametrize('in_use, names', [({'mlp'}, ['eager', 'compiled', 'compiled, without kernels']), (set(), ['eager', 'compiled'])])
@pytest.mark.parametrize('device', ['cuda', 'cpu'])
def test_a_step_is_made_in_three_ways_on_a_card_and_in_two_on_a_cpu(card, monkeypatch, in_use, names, device):
    def opened(s, ideas, kernels=None, compile='on'):
        made.append(SimpleNamespace(
            device=device, kernels=kernels, compiling=compile == 'on', micro=128, flops_per_token=70.0, of_gradients=9.0, peak=lambda: 1e9,
            model=SimpleNamespace(params=lambda: dict(total=100), flops_per_token=lambda attended: 60.0), step=lambda: s.tokens_per_step,
            choose_kernels=lambda: m.IN_USE.update(in_use), batches=SimpleNamespace(close=lambda: closed.append(1))))
        return made[-1]
    made, closed = [], []
    monkeypatch.setattr(m, 'IN_USE', set())
    monkeypatch.setattr(first_parts, 'opened', opened)
    monkeypatch.setattr(first_parts, 'wait_for', lambda device: None)
    # a CPU that is twice as slow later, and a compiler that makes three of two
    monkeypatch.setattr(train, 'choose_device', lambda s: device)
    monkeypatch.setattr(first_parts, 'seconds_of_step', lambda run: (
        (len(made) if device == 'cpu' else 1) * (0.4 if run.compiling else 0.6)))
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda: None)
    monkeypatch.setattr(first_parts.sample, 'peak_memory_gb', lambda device: 3.0)
    monkeypatch.setattr(bench_mfu, 'where_time_goes', lambda run, device, steps: dict(busy_share=0.8, shares=dict(attention=0.25, other=0.75)))
    s = settings()
    found = gathered(first_parts.step(s, None, dict(kernels=dict(rates=dict(gemm=1e9, copy=1e9)))))
    names = names if device == 'cuda' else ['eager', 'compiled']
    assert [way['way'] for way in found['ways']] == names == found['tried'] and len(closed) == len(names) * (device == 'cuda')
    assert [way['step_ms'] for way in found['ways']] == pytest.approx([600, 400, 400][:len(names)])
    assert [way['kernels'] for way in found['ways']] == [sorted(in_use)] * 2 + [[]] * (len(names) - 2)
    way, parts = found['ways'][0], [part for part in found['parts'] if part['way'] == 'eager']
    assert way['tok_per_sec'] * way['step_ms'] == pytest.approx(1e3 * s.tokens_per_step) and not way['compiled']
    assert way['mfu'] == way['of_gemm'] == pytest.approx(70 * way['tok_per_sec'] / 1e9)
    assert [(part['part'], round(part['share'], 3)) for part in parts] == [('attention', 0.2), ('other', 0.6), ('idle', 0.2)]
    assert parts[0]['floor_ms'] == pytest.approx(1e3 * s.tokens_per_step * 10 / 1e9) and sum(p['ms'] for p in parts) == pytest.approx(way['step_ms'])


@pytest.mark.parametrize('start, speeds, expected', [
    (40, (500, 1000, 900), dict(compile='on', kernels='-mlp')), (40, (500, 1000, 1001), dict(compile='on', kernels='none')),
    (1600, (500, 1000, 900), dict(compile='off', kernels='-mlp')), (40, (500,), dict(kernels='-mlp')), (0, (), dict(kernels='-mlp'))])
def test_the_way_with_which_the_budget_buys_most(start, speeds, expected):
    """A compiler that takes too long is off; so are kernels that make a whole step slower."""
    names = ('eager', False), ('compiled', True), ('compiled, without kernels', True)
    ways = [dict(way=name, compiled=on, start_s=start * on, tok_per_sec=float(v), parameters=1) for (name, on), v in zip(names, speeds)]
    found = dict(device='cuda', step=dict(ways=ways), kernels=dict(checks=[dict(kernels=['mlp'], used=[], why='slow')]))
    assert bench_first.recommended(settings(), found)[0] == expected
    if len(ways) == 1:                             # a compiler that had no time says nothing, one that broke its process does
        found['step']['broken'] = dict(compiled=bench_first.STOPPED)
        assert bench_first.recommended(settings(), found)[0] == expected
        found['step']['broken'] = dict(compiled='killed by SIGSEGV')
        assert bench_first.recommended(settings(), found)[0] == expected | dict(compile='off')


def test_what_the_budget_buys_of_an_ensemble_is_asked_of_one_member(monkeypatch, tmp_path):
    asked = []
    (tmp_path / 'meta.json').write_text(json.dumps(dict(splits=dict(train=dict(tokens=1000, bytes=4000)))))
    monkeypatch.setattr(first_parts, 'best_way', lambda s, found: (dict(tok_per_sec=100.0, parameters=800), 30.0))
    monkeypatch.setattr(first_parts, 'expected', lambda p, row: asked.append(row[0].tolist()) or np.zeros((len(p), 1)))

    def buys(*names, **settings):
        s = SimpleNamespace(budget_minutes=1.0, **settings)
        ideas = SimpleNamespace(seam=lambda base: lambda s: SimpleNamespace(folder=tmp_path), sources=lambda: [(name, '', True) for name in names])
        return {k: v for part in first_parts.buys(s, ideas, {}) for k, v in part.items()}
    assert buys('ensemble', members=8, dropout=0.1)['epochs'] == 3 and buys()['val_bpb']
    assert asked == [[100, 4000, 12000, 8, 0.1], [800, 4000, 12000, 1, 0]]
    assert 'val_bpb' not in buys('ensemble', 'distilled', members=8)


# ---- kernels

def test_a_kernel_that_had_no_time_to_be_tried_is_left_to_the_run():
    found = dict(device='cuda', kernels=dict(broken=dict(mlp=bench_first.STOPPED, add_norm='killed by SIGSEGV')))
    settled, off = bench_first.recommended(settings(), found)
    assert settled['kernels'] == '-rms_norm' and off == dict(rms_norm='its process ended: killed by SIGSEGV')


def rows(**ms):
    return [dict(rival=name.replace('_', ' '), both_ms=value) for name, value in ms.items()]


@pytest.mark.parametrize('errors, ms, used, why', [
    ((0.01, 0.02), dict(ours=1.0, ours_without_kernels=2.0, other=0.5), ['mlp'], 'a reason'),
    ((0.01, 0.06), dict(ours=1.0, ours_without_kernels=2.0), [], 'its result differs by 6%'),
    ((math.nan, 0.0), dict(ours=1.0, ours_without_kernels=2.0), [], 'its result differs by nan%'),
    ((0.0, math.nan), dict(ours=1.0, ours_without_kernels=2.0), [], 'its result differs by nan%'),
    ((0.01, 0.02), dict(ours=2.0, ours_without_kernels=2.0), [], '2.000 ms with it, 2.000 without'),
    ((0.01, 0.02), dict(ours_without_kernels=2.0), [], 'inf ms with it, 2.000 without'),
    (None, dict(ours=1.0, ours_without_kernels=2.0), ['mlp'], 'a reason')])
def test_a_kernel_is_used_when_it_is_right_and_faster(errors, ms, used, why):
    check = first_parts.judged('MLP', ('mlp',), {'mlp'}, 'a reason', rows(**ms), errors)
    assert (check['used'], check['why'], check['winner_ms']) == (used, why, min(ms.values()))
    found, off = bench_first.recommended(settings(), dict(device='cuda', kernels=dict(checks=[check])))
    assert found['kernels'] == ('all' if used else '-mlp') and off == ({} if used else dict(mlp=why))


@pytest.mark.parametrize('wrong, slow, expected', [((), (), 'all'), (
    ('mlp_kernel', 'cross_entropy_kernel'), ('attention, documents',), '-attention,-qk_norm,-cross_entropy,-mlp')])
def test_kernels_are_tried_in_their_operations(corpus, monkeypatch, wrong, slow, expected):
    """In Triton's interpreter, whose speed says nothing, on a made-up clock."""
    pytest.importorskip('triton')

    def launch(kernel, grid, *args, **options):
        right(kernel, grid, *args, **options)
        launched.append(kernel)
        if kernel in [getattr(m, name) for name in wrong]:
            next(t for t in reversed(args) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel() > 64).mul_(1.2)

    def choose(names, config, device, dtype, rows):
        m.IN_USE.clear()
        m.IN_USE.update(m.kernels_named(names))
        return [f'{", ".join(m.KERNELS)}: kernel, as told']

    def timed(name, flops, size, rivals, tensors, rounds, rates):
        launched.clear()
        rivals[first_parts.WITHOUT](*tensors)
        assert not launched and rivals['ours'](*tensors) is not None and launched
        return [dict(operation=name, rival=rival, both_ms=(3.0 if name.startswith(slow or '-') else 1.0) if rival == 'ours' else 2.0)
                for rival in rivals]
    right, launched = m.launch, []
    monkeypatch.setattr(m, 'launch', launch)
    monkeypatch.setattr(m, 'choose_kernels', choose)
    monkeypatch.setattr(first_parts, 'kernel_rows', timed)
    s, ideas = train.read_settings([*corpus.args, '--block_size=32', '--n_embd=32', '--micro_batch_size=2'])
    found = dict(device='cuda')
    for piece in first_parts.kernels(s, ideas, found):
        bench_first.add(found.setdefault('kernels', {}), piece)
    assert bench_first.recommended(s, found)[0]['kernels'] == expected
    checks = {', '.join(check['kernels']): check for check in found['kernels']['checks']}
    assert found['kernels']['tried'] == [*first_parts.JUDGED] and checks['rms_norm']['gradient_error'] < 1e-4
    assert (checks['attention, qk_norm']['winner'] == 'ours') is not bool(slow)
    m.IN_USE.clear()


def test_a_kernel_that_broke_its_process_is_off():
    found = dict(device='cuda', kernels=dict(tried=['attention', 'mlp'], broken=dict(attention='killed by SIGSEGV')))
    assert bench_first.recommended(settings(), found) == (
        {'kernels': '-attention,-qk_norm'}, dict.fromkeys(('attention', 'qk_norm'), 'its process ended: killed by SIGSEGV'))
    assert bench_first.recommended(settings('--kernels=attention,mlp'), found)[0] == {
        'kernels': '-attention,-qk_norm,-rms_norm,-cross_entropy'}
    assert bench_first.recommended(settings('--kernels=attention'), found)[0] == {'kernels': 'none'}
    assert bench_first.recommended(settings(), dict(device='cuda', kernels=dict(broken={}, fault='it failed'))) == ({}, {})
    assert bench_first.recommended(settings(), dict(found, device='cpu'))[0] == {}


# ---- micro-batches

@pytest.mark.parametrize('fits, asked, sizes, full', [(40, 8, [8, 16, 32], 64), (3, 8, [2], 4), (8, 8, [8], 16), (0, 4, [], 1)])
def test_the_largest_micro_batch_that_fits(monkeypatch, fits, asked, sizes, full):
    def loss(x):
        if x > fits:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return SimpleNamespace(backward=lambda: None)

    class Rows(int):
        to = lambda self, device: self
    run = SimpleNamespace(device='cuda', config=SimpleNamespace(block_size=512), batch_loss=loss, model=SimpleNamespace(zero_grad=lambda: None),
                          stream=SimpleNamespace(batch=lambda first, n, T: dict(x=Rows(n))))
    monkeypatch.setattr(first_parts, 'opened', lambda s, ideas, **changes: run)
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda: None)
    monkeypatch.setattr(bench_first.sample, 'peak_memory_gb', lambda device: 1.0)
    monkeypatch.setattr(train, 'seconds_of', lambda work, times: work() or 1e-3)
    found = {}
    for piece in first_parts.room(settings(f'--micro_batch_size={asked}'), None, {}):
        bench_first.add(found, piece)
    assert [row['rows'] for row in found.get('sizes', [])] == sizes and found['full_at'] == full
    speeds = bench_first.recommended(settings(f'--micro_batch_size={asked}'), dict(device='cuda', room=found))[0]
    assert speeds.get('micro_batch_size', 0) <= fits


def test_a_micro_batch_is_changed_for_speed_alone():
    def chosen(**speeds):
        sizes = [dict(rows=int(n[1:]), tok_per_sec=float(v), peak_gib=1.0) for n, v in speeds.items()]
        return bench_first.recommended(settings(), dict(device='cuda', room=dict(sizes=sizes)))[0]['micro_batch_size']
    assert chosen(n128=100, n256=102) == 128 and chosen(n128=100, n256=110) == 256
    assert chosen(n128=100, n256=90, n512=300) == 128         # a step has 256 rows
    assert chosen(n64=100) == 64 and chosen(n32=90, n64=100) == 64


# ---- all of it

@pytest.fixture
def first(corpus, tmp_path, monkeypatch, capfd):
    """first(parts, *args): what is printed, with these in the place of the parts; {} for those of the real ones."""
    def run(found, *args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(bench_first, 'CONFIG', tmp_path)
        if found:
            monkeypatch.setattr(bench_first, 'bounded', lambda name, *more: dict(broken={}, fault='', seconds=0.1) | found.get(name, {}))
        bench_mfu.main(['--first', str(ROOT / 'config' / 'babylm.py'), *args])
        return capfd.readouterr().out
    return run


def accepted(folder):
    return train.read_settings([str(ROOT / 'config' / 'babylm.py'), str(folder / 'this_machine.py')])[0]


def test_what_is_recommended_is_a_config(first, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'choose_device', lambda s: 'cuda')
    monkeypatch.setattr(bench_first.sample, 'hardware', None)        # a card that is asked here has less memory for the parts
    wrong = dict(operation='attention', kernels=['attention', 'qk_norm'], used=[], why='its result differs by 9%')
    out = first(GOOD | dict(kernels=dict(checks=GOOD['kernels']['checks'] + [wrong])), '--dollars_per_hour=0.5', '--micro_batch_size=4')
    s = accepted(tmp_path)
    assert (s.kernels, s.micro_batch_size, s.compile) == ('-attention,-qk_norm', 4, 'on')
    page = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / 'out/first/first.html').read_text())[1])
    assert {c['digits'] for block in page['blocks'] for c in block.get('columns', [])} <= {None, 0, 1, 2, 3}
    assert 'dollars: 0.25' in out and 'attention: its result differs by 9%' in out
    assert (tmp_path / 'this_machine.py').read_text().startswith('"""Settings for this machine, RTX 4090; by bench_mfu.py')


def test_parts_that_all_fail_leave_a_config_that_changes_nothing(first, tmp_path):
    out = first({name: dict(fault='killed by SIGSEGV') for name in bench_first.PARTS})
    assert out.count('killed by SIGSEGV') >= len(bench_first.PARTS) - 1
    assert vars(accepted(tmp_path)) | dict(out_dir='') == vars(settings()) | dict(out_dir='')
    assert len(json.loads((tmp_path / 'out/first/first.json').read_text())['recommended']) == 0


def test_a_mistake_and_a_card_that_cannot_be_used_are_said_at_once(first, monkeypatch):
    monkeypatch.setattr(bench_first, 'bounded', None)
    with pytest.raises(UserError, match='n_layers; did you mean n_layer'):
        first({}, '--n_layers=3')
    monkeypatch.setattr(bench_first.sample, 'unusable_card', lambda: 'a card with driver 550')
    with pytest.raises(UserError, match='a card with driver 550; or say --device=cpu'):
        first({})


def test_text_that_is_not_prepared_is_stood_in_for(tmp_path):
    s, ideas = train.read_settings([str(ROOT / 'config' / 'babylm.py'), f'--data_dir={tmp_path}/none', '--n_layer=1', '--n_embd=32', '--n_head=1',
                                    '--vocab_size=300', '--compile=off', '--device=cpu', '--dtype=float32', '--block_size=64'])
    run = first_parts.opened(s, ideas)
    assert run.step() == 512 and run.config.vocab_size == 300 and not (tmp_path / 'none').exists()
    assert 150 < first_parts.STANDS_IN[1] / 2 and 20 < run.model.attended(run.early) < 33
    run.batches.close()


@pytest.mark.long
def test_it_runs_on_a_cpu_and_says_nothing_personal(first, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_first, 'PARTS', {name: (3 * seconds, part) for name, (seconds, part) in bench_first.PARTS.items()})
    out = first({}, *corpus.args)
    text = (tmp_path / 'out/first/first.json').read_text()
    found, page = json.loads(text), (tmp_path / 'out/first/first.html').read_text()
    assert not any(found[name]['fault'] or found[name]['broken'] for name in bench_first.PARTS if name != 'peers'), out
    assert found['kernels']['checks'][0]['gradient_error'] < 1e-3 and found['buys']['epochs'] > 0 and found['buys']['val_bpb']
    assert found['machine']['copying_gb_s'] > 0 and found['disk']['disk_write_gb_s'] > 0 and found['room']['sizes']
    assert found['step']['ways'][0]['way'] == 'eager' and found['recommended'] == {} and accepted(tmp_path)
    for secret in (socket.gethostname(), str(ROOT), str(tmp_path), str(corpus.data_dir), os.path.expanduser('~') + '/'):
        assert secret not in text and secret not in page and secret not in (tmp_path / 'this_machine.py').read_text()
    assert not re.search(rf'\b{getpass.getuser()}\b(?! mean)', text)


def test_a_report_names_no_folder():
    said = bench_first.impersonal('bench_mfu.py: [Errno 2] no such file: "/home/joe/my data/x.bin", ~/y/z.py:3, 10 tok/s, a/b, /tmp/q')
    assert said == '[Errno 2] no such file: "my data/x.bin", z.py:3, 10 tok/s, a/b, q'

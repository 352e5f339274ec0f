"""The machine as it is rented: a driver that is too old, no compiler, a card with too little memory."""
import contextlib
import errno
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
import train
from config import UserError, cuda_graphs, in_words, layer_loop
from conftest import ROOT

OLD = 'NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC version:  gcc 12.3.0\n'
OPEN = 'NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (builder)  Fri Jan 9\n'


@pytest.fixture
def rented(monkeypatch):
    """rented(driver's text, CUDA of torch's build): a machine whose card torch cannot use."""
    def made(text, cuda='13.0', cards=('/dev/nvidia0',)):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        monkeypatch.setattr(torch.version, 'cuda', cuda)
        monkeypatch.setattr(sample, 'proc', lambda name: text if name == 'driver/nvidia/version' else '')
        monkeypatch.setattr(sample.glob, 'glob', lambda pattern: list(cards))
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    return made


@pytest.mark.parametrize('text, cuda, needs, install', [
    (OLD, '13.0', 'driver 550.54.14 .* CUDA 13.0, which needs driver 580', '"torch<2.14" --index-url .*/cu126,'),
    (OPEN.format('570.86.15'), '13.2', 'driver 570.86.15 .* CUDA 13.2, which needs driver 580', '"torch<2.12" --index-url .*/cu128,'),
    (OPEN.format('470.256.02'), '12.6', 'CUDA 12.6, which needs driver 525', 'cu126, or a newer driver'),
    (OPEN.format('580.95.05'), None, 'a build without CUDA', 'pip install "torch<2.14"; or say --device=cpu$')])
@pytest.mark.parametrize('asked', ['auto', 'cuda'])
def test_a_driver_that_is_too_old_is_refused(rented, text, cuda, needs, install, asked):
    rented(text, cuda)
    with pytest.raises(UserError, match=f'(?s)a card with {needs if needs.startswith("driver") else ".*" + needs}.*{install}'):
        train.choose_device(SimpleNamespace(device=asked))
    assert train.choose_device(SimpleNamespace(device='cpu')) == 'cpu'


def test_a_machine_without_a_card_or_with_a_hidden_one_computes_itself(rented, monkeypatch):
    auto = SimpleNamespace(device='auto')
    rented('')
    assert train.choose_device(auto) == 'cpu'
    rented(OLD, cards=())                          # a container sees its host's driver, and no card
    assert train.choose_device(auto) == 'cpu'
    rented(OLD)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert train.choose_device(auto) == 'cpu'
    with pytest.raises(UserError, match="device is 'cuda', and torch finds none"):
        train.choose_device(SimpleNamespace(device='cuda'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert train.choose_device(auto) == 'cuda'


def test_a_card_compiles_where_it_has_what_that_takes(monkeypatch):
    s = SimpleNamespace(dtype='bfloat16', tokens_per_step=512, block_size=64, micro_batch_size=8, compile='auto', dry_run=True,
                        budget_minutes=1, max_steps=0)
    monkeypatch.setattr(train.models, 'missing_compiler', lambda: 'Python.h missing: apt install it')
    dtype, compiling, micro, said = train.adapt(s, 'cuda', 1, 8)
    assert not compiling and said == ['torch.compile is off: Python.h missing: apt install it']
    monkeypatch.setattr(train.models, 'missing_compiler', lambda: '')
    assert train.adapt(s, 'cuda', 1, 8)[1:] == (True, 8, [])         # a dry run too, or it says half of what will be


# ---- memory: the same steps in smaller parts

def with_room_for(rows):
    """Run's loss of a device that has room for so many rows."""
    def loss(self, idx, targets, **extras):
        if len(idx) > rows:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\nand more')
        return plain(self, idx, targets, **extras)
    plain = train.Run.loss
    return loss


def losses(folder):
    return [row['train_loss'] for row in sample.read_rows(folder / 'metrics.jsonl') if 'train_loss' in row]


@pytest.mark.parametrize('error, full', [
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'), True), (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling'), True),
    (RuntimeError('backend=inductor raised: OutOfMemoryError: CUDA out of memory.'), True), (RuntimeError('a mistake'), False)])
def test_a_full_card_is_known_in_whatever_words(error, full):
    def try_out(batch):
        raise error
    run = SimpleNamespace(try_out=try_out, all_reduce=lambda array: array)
    with contextlib.nullcontext() if full else pytest.raises(RuntimeError, match='a mistake'):
        assert not train.Run.fits_memory(run, {})


@pytest.mark.parametrize('compiling', [True, False])
def test_a_compiler_without_room_is_not_given_up(compiling):
    run = SimpleNamespace(compiling=compiling, batch_loss=with_room_for(0))
    with pytest.raises(RuntimeError, match='out of memory'):
        train.Run.try_out(run, dict(self=run, idx=[1], targets=[1]))


@pytest.mark.parametrize('ideas', [(), ('config/masked.py', '--tokenizer=bpe', '--vocab_size=300')])
def test_a_micro_batch_that_has_no_room_is_halved(main, tmp_path, monkeypatch, ideas):
    args = [str(ROOT / a) if a.endswith('.py') else a for a in ideas] + ['--tokens_per_step=512', '--block_size=32']
    main(*args, '--micro_batch_size=4', '--out_dir=small')
    monkeypatch.setattr(train.Run, 'loss', with_room_for(5))
    told = main(*args, '--micro_batch_size=16', '--out_dir=halved')
    assert 'adapted: micro_batch_size 8 instead of 16: there is no room for more' in told
    assert 'adapted: micro_batch_size 4 instead of 8: there is no room for more' in told or ideas   # masked asks for half the rows
    if not ideas:
        assert losses(tmp_path / 'halved') == losses(tmp_path / 'small')
        model = [torch.load(tmp_path / name / 'ckpt.pt')['model'] for name in ('small', 'halved')]
        assert all(torch.equal(model[0][k], model[1][k]) for k in model[0])


def test_no_room_for_one_row_is_said(main, monkeypatch):
    monkeypatch.setattr(train.Run, 'loss', with_room_for(0))
    with pytest.raises(UserError, match='no room for one row of 32 tokens: lower block_size'):
        main('--tokens_per_step=512', '--block_size=32', '--micro_batch_size=4')


def test_ranks_halve_together(monkeypatch):
    run = SimpleNamespace(try_out=lambda batch: None, all_reduce=lambda array: array + 1)       # another rank has no room
    assert not train.Run.fits_memory(run, {})
    run.all_reduce = lambda array: array
    assert train.Run.fits_memory(run, {})


def test_memory_that_ends_on_the_way_is_a_sentence(capsys):
    assert train.tell(object(), torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\nand more')) == 2
    said = capsys.readouterr().err
    assert said.startswith('train.py: the device ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.): lower micro')
    assert said.count('\n') == 1
    assert train.tell(object(), RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')) == 2
    assert 'the device ran out of memory (CUDA error: CUBLAS' in capsys.readouterr().err


@pytest.mark.parametrize('error', [
    MemoryError(), OSError(errno.ENOMEM, 'Cannot allocate memory'), RuntimeError("can't start new thread"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_memory_of_the_machine_ends_in_the_same_way(error, capsys):
    assert train.tell(None, error) == 2 and in_words(error).startswith('memory ran out (')
    assert re.match(r'train.py: the device ran out of memory \(.+\): lower micro_batch_size', capsys.readouterr().err)
    for other in (RuntimeError('shapes differ'), OSError('of no file'), KeyError('a mistake of ours')):
        with pytest.raises(type(other)):
            train.tell(None, other)
    with pytest.raises(RuntimeError):
        in_words(RuntimeError('shapes differ'))


# ---- config/cuda_graphs.py

GRAPHS = str(ROOT / 'config' / 'cuda_graphs.py')


@pytest.mark.parametrize('rows', [16, 4, 1])
def test_a_recorded_step_is_the_same_step(main, tmp_path, rows):
    args = ['--tokens_per_step=384', '--block_size=32', '--max_steps=6', f'--micro_batch_size={rows}', str(ROOT / 'config' / 'dropout.py')]
    main(*args, '--out_dir=plain')
    main(*args, GRAPHS, '--out_dir=recorded')
    assert losses(tmp_path / 'recorded') == losses(tmp_path / 'plain') and len(losses(tmp_path / 'plain')) == 6


def test_a_step_is_recorded_on_a_stream_of_its_own_and_replayed(monkeypatch):
    told = []
    stream = SimpleNamespace(wait_stream=lambda other: told.append('wait'))
    graph = SimpleNamespace(replay=lambda: told.append('replay'))
    monkeypatch.setattr(torch.cuda, 'Stream', lambda: stream)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: stream)
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', lambda: graph)
    monkeypatch.setattr(torch.cuda, 'stream', lambda s: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, 'graph', lambda g, capture_error_mode: contextlib.nullcontext(told.append(capture_error_mode)))
    replay, result = cuda_graphs.record(lambda: told.append('work') or 7, 'cuda')
    replay()
    assert result == 7 and told == ['wait', *3 * ['work'], 'wait', 'thread_local', 'work', 'replay']


def test_what_begins_to_loop_on_the_way_is_recorded_again(main, tmp_path, monkeypatch):
    def record(work, device):
        models.append(run.looping)
        return plain(work, device)
    models, plain, run = [], cuda_graphs.record, SimpleNamespace(looping=None)
    looping = layer_loop.Run.set_looping
    monkeypatch.setattr(cuda_graphs, 'record', record)
    monkeypatch.setattr(layer_loop.Run, 'set_looping', lambda self, now: looping(self, now) or setattr(run, 'looping', now))
    args = [str(ROOT / 'config' / 'layer_loop.py'), '--loop_layers=1', '--loop_from=0.5', '--max_steps=6']
    main(*args, '--out_dir=plain')
    main(*args, GRAPHS, '--out_dir=recorded')
    assert models == [False, True] and losses(tmp_path / 'recorded') == losses(tmp_path / 'plain')


def test_what_cannot_be_recorded_is_refused(main, monkeypatch):
    with pytest.raises(UserError, match='recorded step, and masked_inputs.py may compute each otherwise: leave one out'):
        main(GRAPHS, str(ROOT / 'config' / 'masked_inputs.py'), '--tokenizer=bpe', '--vocab_size=300')
    plain = train.Run.loss

    def loss(self, *args, **more):
        if self.steps == 0 and getattr(self, 'going', False):
            raise RuntimeError('operation not permitted when stream is capturing\nand more')
        self.going = True
        return plain(self, *args, **more)
    monkeypatch.setattr(train.Run, 'loss', loss)
    monkeypatch.setattr(train, 'seconds_of', lambda work, times: 0.01)
    with pytest.raises(UserError, match='cannot record this step .operation not permitted when stream is capturing.: leave it out'):
        main(GRAPHS)


def test_a_card_that_is_full_is_no_card_that_is_not_there(finished, monkeypatch):
    def full(self, device):
        raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(torch.nn.Module, 'to', full)
    with pytest.raises(UserError, match='it has no room for .*run: free it, or try cpu'):
        sample.load(finished[0], 'cpu')


def test_a_card_reads_and_writes_more_at_once(monkeypatch):
    assert sample.tokens_at_once('cpu') == 8192 and sample.tokens_at_once('cuda') == 65536
    measure, asked = object.__new__(sample.Measure), []
    measure.sets, weight = dict(a={}), SimpleNamespace(device=torch.device('cuda', 0))
    model = SimpleNamespace(parameters=lambda: iter([weight]))
    monkeypatch.setattr(measure, 'judge', lambda *args: asked.append(args) or {}, raising=False)
    monkeypatch.setattr(measure, 'bpb', lambda *args: asked.append(args) or dict(bpb=1), raising=False)
    list(measure.ask(model, dict(a=3, bpb=0)))
    assert asked == [(model, 'a', 3, 65536, None), (model, sample.SLICES, 65536, None)] and measure.rows(model) == 256


def test_a_card_s_queue_is_waited_for_before_the_clock_starts(monkeypatch):
    """seconds_of on a device that works later than it is told: 5 s of other work wait as the clock starts."""
    now, queue = [0.0], [5.0]

    def synchronize():
        now[0] += sum(queue)
        queue.clear()
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'synchronize', synchronize)
    monkeypatch.setattr(train.time, 'monotonic', lambda: now[0])
    assert train.seconds_of(lambda: queue.append(2.0), 2) == 2.0
    assert np.isclose(now[0], 9)

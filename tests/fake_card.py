"""Ideas on fake tensors of a card: a step, a growth, an evaluation and generation with the cache, nothing of it computed. Devices, dtypes
and shapes are as torch's CUDA build has them, on a machine without a card; started by test_card.py with a DRIVER that says it has one.

    python fake_card.py FOLDER idea ...      in a folder as test_stacks.py makes it; prints {idea: what went wrong, or launches} as JSON
"""
import contextlib
import io
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ['TRITON_INTERPRET'] = '1'
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

import model as m
import train
from card import Card, is_cuda
from conftest import ROOT
from test_stacks import run_of

DRIVER = """
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *n) { *n = 0; return 0; }
int cudaSetDevice(int n) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0; *high = -1; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
"""
MODE, LAUNCHES = FakeTensorMode(allow_non_fake_inputs=True), Counter()


def on_card(x):
    return (x if isinstance(x, FakeTensor) else MODE.from_tensor(x)).to('cuda')


def move(module, device):
    """Module.to: fake tensors cannot take the place of others in a parameter, so the parameters are new."""
    new = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:                    # one that two parts share stays one
                part._parameters[name] = new.setdefault(id(p), (p, torch.nn.Parameter(on_card(p.detach()), p.requires_grad)))[1]
        part._buffers.update({name: on_card(b) for name, b in part._buffers.items() if b is not None})
    return module


def launch(kernel, grid, *args, **options):
    """What a kernel is given is on the card."""
    LAUNCHES[kernel.fn.__name__] += 1
    assert {x.device.type for x in args if isinstance(x, torch.Tensor)} == {'cuda'}, f'{kernel.fn.__name__} is given tensors of a CPU'


def sdpa(q, k, v, mask=None, scale=None, enable_gqa=False, dropout_p=0.0, is_causal=False):
    """Which of its kernels PyTorch takes it asks the card; what it would take of any is checked."""
    assert {t.device.type for t in (q, k, v, *[mask] * (mask is not None))} == {'cuda'} and q.dtype == k.dtype == v.dtype
    assert k.shape[:3] == v.shape[:3] and q.shape[-1] == k.shape[-1] and (q.shape[1] == k.shape[1] or enable_gqa and q.shape[1] % k.shape[1] == 0)
    assert mask is None or torch.broadcast_shapes(mask.shape, (*q.shape[:3], k.shape[2])) == (*q.shape[:3], k.shape[2])
    return (q * k.mean())[..., :1] * v.mean(2, keepdim=True).repeat_interleave(q.shape[1] // v.shape[1], 1)


class OnCard(TorchFunctionMode):
    """What goes to the card, or is made there, becomes fake on the way: outside of MODE it would be real."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.Tensor.to and is_cuda(kwargs.get('device')):
            return on_card(function(*args, **kwargs | dict(device='cpu')))
        if function is torch.Tensor.to and any(map(is_cuda, [*args[1:], *kwargs.values()])) and not isinstance(args[0], FakeTensor):
            args = MODE.from_tensor(args[0]), *args[1:]
        return function(*args, **kwargs)


def faked(batch):
    return {name: MODE.from_tensor(t) for name, t in batch.items()}


def walk(name):
    """One idea: trains two steps half way through, is evaluated, and continues past its block."""
    m.IN_USE.clear()
    run = run_of([name] * (name != 'base'), f'out/fake-{name}', '--device=cuda', '--dtype=bfloat16', '--head_dim=16', '--overwrite',
                 *['--init_from=teacher'] * (name == 'instruct'))
    run.open(), run.build()
    m.IN_USE.update(m.KERNELS, ['experts'])
    run.early, run.first_batch = MODE.from_tensor(run.early), faked(run.first_batch)
    run.closing_seconds = lambda: 0.0
    with MODE:
        run.read_ahead(), run.get_going()
        run.clock.progress = 0.5
        for _ in range(2):
            assert run.time_left()               # grows if that is due
            run.step()
        run.batches.close()
        idx, model = torch.zeros(2, run.s.block_size, dtype=torch.long).to('cuda'), run.model.eval()
        assert {p.device.type for p in model.parameters()} == {'cuda'}
        with torch.no_grad():
            told = model(idx, idx, 'none')
        new = [*model.generate(idx[:1, :5], run.s.block_size + 5)]
    assert (told.device.type, told.dtype, told.shape) == ('cuda', torch.float32, idx.shape)
    assert len(new) == run.s.block_size + 5 and {(x.device.type, x.dtype, x.shape) for x in new} == {('cuda', torch.long, (1,))}


def main(folder, *names):
    found, take = {}, train.Prefetcher.next
    patches = [(torch.cuda, name, function) for name, function in Card().cuda().items()] + [
        (torch.cuda, '_lazy_init', lambda: None), (train, 'choose_kernels', lambda *asked: []), (torch.nn.Module, 'to', move), (torch.Tensor, 'pin_memory', lambda x: x), (m, 'launch', launch),
        (F, 'scaled_dot_product_attention', sdpa), (m, 'sample_token', lambda logits, *more, **named: logits.argmax(-1)),
        (FakeTensor, 'tolist', lambda x: [1.0] * x.numel()), (torch.Tensor, 'item', lambda x: 1.0),
        *[(torch.optim.Optimizer, f'_{kind}_graph_capture_health_check', lambda self: None) for kind in ('cuda', 'accelerator')],
        (train.Prefetcher, 'next', lambda self: (faked((taken := take(self))[0]), taken[1]))]
    with contextlib.ExitStack() as stack, contextlib.chdir(folder):
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch, **dict(create=True)))
        stack.enter_context(OnCard())
        for name in names:
            LAUNCHES.clear()
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    walk(name)
                found[name] = sum(LAUNCHES.values())
            except Exception as e:               # whatever it is, the list shows it
                where = ' < '.join(f'{Path(f.filename).name}:{f.lineno}' for f in traceback.extract_tb(e.__traceback__)[::-1]
                                    if ROOT in Path(f.filename).parents)
                found[name] = f'{type(e).__name__}: {str(e)[:200]} ({where})'
            print(name, found[name], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == '__main__':
    main(*sys.argv[1:])

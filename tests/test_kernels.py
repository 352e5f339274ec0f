"""model.py, part 3: every kernel against the same operation in float64, forward and backward, in Triton's interpreter where
there is no GPU (so in fp32 and fp16: the interpreter gets bf16 wrong without saying so)."""
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import model as m
from bench_mfu import SHARED_MEMORY
from conftest import ROOT
from model import GPT, Attention, Context, GPTConfig

pytest.importorskip('triton')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
LIMITS = {torch.float32: (1e-5, 1e-5), torch.float16: (4e-3, 1e-2), torch.bfloat16: (4e-3, 1e-2)}
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == 'cuda')


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written holds NaN, and every kernel is in use."""
    monkeypatch.setattr(m, 'IN_USE', set(m.KERNELS))
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(5).isnan().all() and torch.zeros(3).new_empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def guarded(x):
    """x in the middle of NaN: what is read beside it shows."""
    band = torch.full((x.numel() + 256,), float('nan') if x.is_floating_point() else 2 ** 30, dtype=x.dtype, device=x.device)
    band[128:-128] = x.flatten()
    return band[128:-128].view(x.shape)


def error(a, b):
    assert a.shape == b.shape and torch.isfinite(a).all()
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


def agree(ours, reference, plain, inputs, dtype):
    """Outputs and gradients of a kernel are near those in float64, and not much further off than PyTorch in the same dtype."""
    def run(function, dtype, wrap=lambda x: x):
        leaves = [wrap(x.to(DEVICE, dtype)).requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        grads = [torch.randn(o.shape, dtype=torch.float64).to(o.device, o.dtype) for o in outputs]
        return outputs, torch.autograd.grad(outputs, leaves, grads)

    expected, mine, theirs = run(reference, torch.float64), run(ours, dtype, guarded), run(plain, dtype)
    for results, base, truth, limit in zip(mine, theirs, expected, LIMITS[dtype]):
        for a, b, c in zip(results, base, truth):
            assert error(a, c) < limit
            assert error(a, c) < 2 * error(b, c) + 1e-6


# ---- attention

def documents(B, T, kind):
    """idx (B, T) with documents of a kind: 'one', 'each' token its own, or of random lengths."""
    idx = torch.randint(1, 50, (B, T))
    if kind == 'one':
        idx[:, 0] = 0
    elif kind == 'each':
        idx[:] = 0
    else:
        idx[torch.rand(B, T) < kind] = 0
    return idx.to(DEVICE)


CASES = [   # T, D, H, H_kv, documents, window, other options
    (64, 32, 2, 2, 'one', 0, {}), (17, 32, 4, 1, 0.2, 0, {}), (1, 64, 2, 1, 'one', 0, {}), (130, 64, 2, 2, 0.03, 0, {}),
    (100, 32, 2, 1, 0.05, 20, {}), (96, 16, 2, 2, 'each', 0, {}), (129, 32, 3, 3, 'one', 50, dict(doc_mask=False)),
    (70, 32, 2, 2, 0.1, 0, dict(qk_norm=False, token_shift=False)), (70, 32, 2, 1, 0.1, 0, dict(rotary_dim=12)),
    (40, 32, 4, 2, 0.1, 0, dict(token_shift=False))]
MORE = [(513, 64, 2, 1, 0.01, 0, {}), (511, 32, 2, 2, 0.02, 100, {}), (512, 128, 1, 1, 0.005, 0, {}), (200, 128, 2, 1, 0.05, 64, {}),
        (257, 64, 4, 2, 'each', 0, dict(rotary_dim=32)), (512, 64, 1, 1, 'one', 0, dict(doc_mask=False))]


def check_attention(case, dtype, in_use=None):
    T, D, H, H_kv, kind, window, options = case
    config = GPTConfig(vocab_size=50, block_size=T, n_layer=1, n_head=H, n_kv_head=H_kv, head_dim=D, n_embd=32, **options)
    layer, gpt = Attention(config, 0).to(DEVICE), GPT(config)
    idx = documents(2, T, kind)
    first = gpt.first_visible(idx)
    first = torch.maximum(first, torch.arange(T, device=DEVICE) - window + 1) if window else first
    last = m.last_visible_to(first)
    cos, sin = gpt.cos.to(DEVICE), gpt.sin.to(DEVICE)

    def ours(qkv):
        guards = (guarded(t) for t in (idx, cos, sin, first.int(), last.int()))
        return m.attend_with_kernels(layer, qkv, Context(*guards, None, {}))

    def plain(qkv):
        q, k, v = layer.heads(qkv, Context(idx, cos, sin, first, None, None, {}))
        return m.attention(q, k, v, first, layer.scale).transpose(1, 2)

    def reference(qkv):
        q, k, v = layer.heads(qkv, Context(idx, cos, sin, first, None, None, {}))
        i, j = torch.arange(T, device=DEVICE)[:, None], torch.arange(T, device=DEVICE)
        seen = (j <= i) & (j >= first[:, None, :, None])
        k, v = (t.repeat_interleave(H // H_kv, 1) for t in (k, v))
        p = (layer.scale * q @ k.mT).masked_fill(~seen, float('-inf')).softmax(-1)
        return (p @ v).transpose(1, 2)

    agree(ours, reference, plain, [torch.randn(2, T, H + 2 * H_kv, D, dtype=torch.float64)], dtype)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('case', CASES)
def test_attention(case, dtype):
    check_attention(case, dtype)


@pytest.mark.parametrize('limit', sorted({*SHARED_MEMORY.values()}))
@pytest.mark.parametrize('D', [64, 128])
def test_attention_as_every_card_tiles_it(monkeypatch, limit, D):
    """Of a card only its shared memory is known here; what is chosen by it computes the same."""
    monkeypatch.setattr(m, 'shared_memory', lambda x: limit)
    check_attention((130, D, 1, 1, 'one', 0, {}), torch.float16)


@pytest.mark.parametrize('limit', [65536, *SHARED_MEMORY.values()])
@pytest.mark.parametrize('D', [16, 32, 64, 128])
@pytest.mark.parametrize('itemsize', [2, 4])
def test_tiles_of_attention_lie_on_the_diagonal_or_beside_it(D, itemsize, limit):
    forward, dq, dkdv = m.attention_tiles(D, itemsize, limit)
    assert forward[0] % forward[1] == dq[0] % dq[1] == dkdv[1] % dkdv[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('case', MORE)
def test_attention_at_the_sizes_that_are_trained(case, dtype):
    check_attention(case, dtype)


def attend_rows(rows, config, layer, gpt, qkv):
    """o of documents, each (length, seed of its numbers), packed into rows."""
    idx = torch.ones(len(rows), config.block_size, dtype=torch.long, device=DEVICE)
    for row, docs in enumerate(rows):
        at = 0
        for first, length in docs:
            idx[row, at] = 0
            at += length
    first = gpt.first_visible(idx)
    cos, sin = gpt.cos.to(DEVICE), gpt.sin.to(DEVICE)
    return m.attend_with_kernels(layer, qkv, Context(idx, cos, sin, first.int(), m.last_visible_to(first).int(), None, {}))


def packed(rows, source):
    return torch.stack([torch.cat([source[first:first + length] for first, length in docs]) for docs in rows])


def test_documents_may_stand_anywhere_and_do_not_touch_each_other():
    config = GPTConfig(vocab_size=50, block_size=70, n_layer=1, n_head=2, n_embd=64)
    layer, gpt = Attention(config, 0).to(DEVICE), GPT(config)
    source = torch.randn(140, 6, 32, device=DEVICE)                # document (a, n) is source[a:a + n]
    one = [[(0, 33), (33, 37)], [(70, 64), (134, 6)]]
    two = [[(134, 6), (70, 64)], [(33, 37), (0, 33)]]
    o, moved = (attend_rows(rows, config, layer, gpt, packed(rows, source)) for rows in (one, two))
    torch.testing.assert_close(o[0, 33:], moved[1, :37], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(o[1, :64], moved[0, 6:], atol=1e-5, rtol=1e-4)
    qkv = packed(one, source).requires_grad_()
    attend_rows(one, config, layer, gpt, qkv)[0, 33:].sum().backward()
    assert (qkv.grad[0, :33] == 0).all() and (qkv.grad[1] == 0).all() and (qkv.grad[0, 33:, 2:] != 0).any()


def test_twice_the_same_bits():
    def run():
        torch.manual_seed(3)
        qkv = torch.randn(2, 70, 4, 32, device=DEVICE, requires_grad=True)
        o = attend_rows([[(0, 70)], [(0, 30), (0, 40)]], config, layer, gpt, qkv)
        o.square().sum().backward()
        return o, qkv.grad
    config = GPTConfig(vocab_size=50, block_size=70, n_layer=1, n_head=2, n_kv_head=1, head_dim=32, n_embd=64)
    layer, gpt = Attention(config, 0).to(DEVICE), GPT(config)
    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


# ---- norm, loss, MLP

@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('rows, C', [(1, 64), (37, 48), (130, 320), (5, 768)])
def test_add_norm(rows, C, dtype):
    def plain(x, y):
        return x + y, m.rms_norm(x + y)
    inputs = [3 * torch.randn(rows, C, dtype=torch.float64), torch.randn(rows, C, dtype=torch.float64)]
    agree(lambda x, y: m.add_norm_forward(x, y, 1e-6)[:2], plain, plain, inputs, dtype)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('N, V, rows', [(37, 100, 16), (1, 257, 64), (50, 1031, 50), (5, 5000, 3)])
def test_linear_cross_entropy(N, V, rows, dtype):
    targets = torch.randint(0, V, (N,), device=DEVICE)
    targets[N // 2:N // 2 + 3] = -1 if N > 1 else V - 1

    def reference(x, w):                # in a half the logits are of the dtype of the activations, as a plain trainer has them
        z = x @ w.to(x.dtype).t()
        return F.cross_entropy(z.float() if x.dtype != torch.float64 else z, targets, ignore_index=-1)

    def ours(x, w):
        return m.linear_cross_entropy(x, w, guarded(targets), 'mean', rows)

    inputs = [torch.randn(N, 32, dtype=torch.float64), torch.randn(V, 32, dtype=torch.float64) / 4]
    agree(ours, reference, reference, inputs, dtype)
    x, w = (t.to(DEVICE) for t in inputs)
    each = m.linear_cross_entropy(x.to(dtype), w.to(dtype), targets, 'none', rows)
    true = F.cross_entropy(x @ w.t(), targets, ignore_index=-1, reduction='none')
    assert error(each, true) < LIMITS[dtype][0] and (each[targets < 0] == 0).all()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('M, K, N', [(3, 16, 32), (130, 48, 100), (65, 80, 160)])
@pytest.mark.parametrize('gated', [False, True])
def test_mlp(M, K, N, gated, dtype):
    def plain(x, up, down):
        h = x @ up.t()
        if gated:
            gate, h = h.chunk(2, dim=-1)
            return (F.silu(gate) * h) @ down.t()
        return h.relu().square() @ down.t()
    inputs = [torch.randn(M, K, dtype=torch.float64), torch.randn((1 + gated) * N, K, dtype=torch.float64) / K ** 0.5,
              torch.randn(K, N, dtype=torch.float64) / N ** 0.5]
    agree(lambda *t: m.mlp_forward(*t, gated)[0], plain, plain, inputs, dtype)


# ---- the model on all of them

MODELS = [dict(), dict(n_kv_head=1, mlp='swiglu', tie_embeddings=True), dict(rotary_dim=16),
          dict(qk_norm=False, token_shift=False)]


def gradients(model, idx):
    model.zero_grad()
    loss = model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    loss.backward()
    return {'loss': loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def small_model(**options):
    model = GPT(GPTConfig(**dict(vocab_size=90, block_size=48, n_layer=2, n_head=2, head_dim=32, n_embd=48) | options)).to(DEVICE)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else torch.nn.init.uniform_(p, 0.5, 1)
    idx = documents(3, 49, 0.05)
    idx[1, 20:30] = -1
    return model, idx.clamp(min=0)


@pytest.mark.parametrize('options', [MODELS[0], *(pytest.param(more, marks=pytest.mark.long) for more in MODELS[1:])])
def test_a_step_with_kernels_is_the_step_without(options, monkeypatch):
    model, idx = small_model(**options)
    ours = gradients(model, idx)
    monkeypatch.setattr(m, 'IN_USE', set())
    for name, expected in gradients(model, idx).items():
        assert error(ours[name], expected.double()) < 1e-5, name


@pytest.mark.parametrize('name', m.KERNELS)
def test_one_kernel_alone_and_all_but_one(name, monkeypatch):
    model, idx = small_model()
    some = [{name}, set(m.KERNELS) - {name}]
    results = []
    for in_use in some + [set()]:
        monkeypatch.setattr(m, 'IN_USE', in_use)
        results.append(gradients(model, idx))
    for ours in results[:2]:
        assert all(error(ours[k], v.double()) < 1e-5 for k, v in results[2].items())


@pytest.mark.long
def test_torch_compile_finds_one_graph():
    model, idx = small_model()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    expected = gradients(model, idx)
    loss = compiled(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    model.zero_grad()
    loss.backward()
    assert error(loss.detach(), expected['loss'].double()) < 1e-6
    assert all(error(p.grad, expected[name].double()) < 1e-5 for name, p in model.named_parameters())


def test_which_kernels_are_named():
    every = set(m.KERNELS)
    assert m.kernels_named('all') == every and m.kernels_named('none') == set()
    assert m.kernels_named('mlp,attention') == {'mlp', 'attention'} and m.kernels_named('-mlp') == every - {'mlp'}
    with pytest.raises(ValueError, match='nonsense.*there are attention'):
        m.kernels_named('mlp,nonsense')


def test_a_cpu_uses_torch_and_says_why(monkeypatch):
    monkeypatch.setattr(m, 'IN_USE', {'mlp'})
    lines = m.choose_kernels('-attention', GPTConfig(vocab_size=90), 'cpu', torch.float32)
    assert not m.IN_USE
    assert lines == ['attention: torch, switched off', 'qk_norm, rms_norm, cross_entropy, mlp: torch, this is not a GPU']


MISSING = m.missing_compiler


@pytest.fixture
def card(monkeypatch):
    """choose_kernels on what it takes for a card of sm_89; kernels by name may do something else there."""
    def launch(kernel, grid, *args, **options):
        if trouble.get(kernel) == 'build':
            raise RuntimeError('no such instruction\nand much more')
        right(kernel, grid, *args, **options)
        if kernel in trouble and trouble[kernel] != 'build':
            trouble[kernel](args)

    def seconds(probe):                            # an interpreter's own say nothing
        probe.gradients(probe.full)
        assert probe.full.shape == (3, 131)
        return 2e-3 - sum(2e-4 if f'{name}_slow' not in trouble else -2e-4 for name in m.IN_USE)
    trouble, right = {}, m.launch
    monkeypatch.setattr(m, 'launch', launch)
    monkeypatch.setattr(m.Probe, 'seconds', seconds)
    monkeypatch.setattr(m, 'missing_compiler', lambda: '')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (8, 9))
    if DEVICE == 'cpu':
        monkeypatch.setattr(m.GPT, 'to', lambda self, device: self)
        monkeypatch.setattr(torch.Tensor, 'to', lambda self, *a, to=torch.Tensor.to: self if a == ('cuda',) else to(self, *a))

    def choose(dtype=torch.float16, head_dim=32, **more):
        trouble.clear()
        trouble.update({getattr(m, name, name): what for name, what in more.items()})
        config = GPTConfig(vocab_size=90, block_size=130, n_layer=2, n_head=1, head_dim=head_dim, n_embd=48)
        return dict(line.split(': ', 1) for line in m.choose_kernels('all', config, 'cuda', dtype, 3))
    return choose


def test_kernels_that_work_are_taken(card):
    table = card()
    assert m.IN_USE == set(m.KERNELS) and all(where.startswith('kernel, ') for where in table.values())
    assert table['attention'].endswith('; a layer takes 1.60 ms with it, 2.00 without')
    assert table['mlp'].endswith('; a layer takes 1.00 ms with it, 1.20 without')


def test_a_kernel_that_does_not_build_stays_out(card):
    table = card(mlp_kernel='build', attention_dq_kernel='build')
    assert m.IN_USE == {'rms_norm', 'cross_entropy'}
    assert table['attention, qk_norm, mlp'] == 'torch, it does not run here (RuntimeError: no such instruction)'


def test_a_kernel_that_is_wrong_stays_out(card):
    table = card(qk_backward_kernel=lambda args: args[6].mul_(1.2), mlp_kernel=lambda args: args[3].fill_(float('nan')))
    assert m.IN_USE == {'attention', 'rms_norm', 'cross_entropy'}
    assert table['qk_norm'].startswith('torch, its result differs by ') and table['mlp'] == 'torch, its result differs by nan%'


def test_a_kernel_that_is_no_faster_stays_out(card):
    table = card(mlp_slow=True, rms_norm_slow=True)
    assert m.IN_USE == {'attention', 'qk_norm', 'cross_entropy'}
    assert table['rms_norm'] == 'torch, a layer takes 1.80 ms with it, 1.60 without'


def test_a_kernel_without_which_there_is_no_room_is_taken(card, monkeypatch):
    seconds = m.Probe.seconds

    def short_of_memory(probe):
        if not m.IN_USE:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return seconds(probe)
    monkeypatch.setattr(m.Probe, 'seconds', short_of_memory)
    table = card()
    assert m.IN_USE == set(m.KERNELS) and table['attention'].endswith('; a layer takes 1.60 ms with it, inf without')


def test_a_layer_is_timed_with_and_without(monkeypatch):
    probe = m.Probe(GPTConfig(vocab_size=90, block_size=40, n_layer=1, n_head=1, n_embd=32), 'cpu', torch.float32, 5)
    shapes, clock = [], iter([0, 9, 10, 12, 20, 21, 30, 33])
    forward = m.GPT.forward
    monkeypatch.setattr(m.GPT, 'forward', lambda self, idx, *a: (shapes.append(idx.shape), forward(self, idx, *a))[1])
    monkeypatch.setattr(m.time, 'perf_counter', lambda: next(clock))
    assert probe.seconds() == 1 and shapes == 4 * [(5, 40)]          # the first of the four is not counted


def test_a_kernel_that_breaks_the_card_is_named(card, monkeypatch):
    zeros = torch.zeros

    def broken(*args, device=None, **more):
        if str(device) == 'cpu' and args == (1,):
            raise RuntimeError('an illegal memory access was encountered')
        return zeros(*args, device=device, **more)
    monkeypatch.setattr(torch, 'zeros', broken)
    with pytest.raises(RuntimeError, match=r'broken this process for its card \(no such instruction\).*--kernels=-mlp$'):
        card(mlp_kernel='build')


def test_a_kernel_that_never_answers_ends_the_process_in_a_sentence(monkeypatch, capfd):
    probe, codes = m.Probe(GPTConfig(vocab_size=90, block_size=40, n_layer=1, n_head=1, n_embd=32), 'cpu', torch.float32), []
    monkeypatch.setattr(m, 'PATIENCE', 30)
    monkeypatch.setattr(m.os, '_exit', codes.append)
    monkeypatch.setattr(probe, 'seconds', lambda: 1.0)
    probe.fault(['mlp'])                                                 # it answers in time
    monkeypatch.setattr(m, 'PATIENCE', 0.2)
    monkeypatch.setattr(probe, 'gradients', lambda idx: time.sleep(1))
    probe.fault(['attention', 'qk_norm'])
    assert codes == [2] and capfd.readouterr().err == ('attention and qk_norm: no answer of the card in 0.2 s: start again with '
                                                       '--kernels=-attention,-qk_norm\n')


@pytest.mark.parametrize('cc, header, lacks', [('gcc', True, ''), ('', True, 'a C compiler'), ('gcc', False, 'Python.h'),
                                               ('', False, 'a C compiler and Python.h')])
def test_what_kernels_are_built_with_is_there_or_named(card, tmp_path, monkeypatch, cc, header, lacks):
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setattr(m.shutil, 'which', lambda name: name == cc)
    monkeypatch.setattr(m.sysconfig, 'get_path', lambda name: str(tmp_path))
    if header:
        (tmp_path / 'Python.h').touch()
    said = MISSING()
    assert said == (f'{lacks} missing: apt install gcc python3-dev' if lacks else '')
    monkeypatch.setattr(m, 'missing_compiler', MISSING)
    if lacks:
        monkeypatch.setattr(m, 'Probe', None)          # nothing is tried
        assert card() == {', '.join(m.KERNELS): f'torch, {said}'} and not m.IN_USE


def test_kernels_that_cannot_or_should_not_run_are_not_tried(card):
    table = card(head_dim=24)
    assert table['attention, qk_norm'] == 'torch, head_dim 24 is not 16, 32, 64 or 128' and 'attention' not in m.IN_USE
    card(dtype=torch.float32)
    assert m.IN_USE == {'rms_norm', 'cross_entropy'}


def test_without_triton_the_model_is_whole():
    code = ('import sys; sys.modules["triton"] = None; import torch, model as m; c = m.GPTConfig(vocab_size=90, n_layer=1, n_embd=32);'
            'x = torch.zeros(1, 512, dtype=torch.long); m.GPT(c)(x, x).backward(); print(m.triton, m.IN_USE)')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == 'None set()', done.stderr

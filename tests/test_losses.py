"""The ideas that change the loss, config/loss_kernels.py and window.py: against plain definitions, and as whole runs."""
import json
import math
import shutil
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as models
import prepare_data
import sample
import train
from config import climb_objective, distillation, loss_kernels, mixture_head, syntactic_smoothing
from conftest import ROOT, in_two_parts
from prepare_data import UserError

SMALL = dict(vocab_size=97, bos=0, block_size=64, n_layer=3, n_head=4, n_embd=32)
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def paths(*names):
    return [str(ROOT / 'config' / f'{name}.py') for name in names]


def make(*names, seed=0, std=0.15, **options):
    """A model of these ideas of which no part is zero; a weight depends on its name alone."""
    kind = models.configured(prepare_data.Ideas(paths(*names), train.TABLES))
    model = kind.GPT(kind(**SMALL | options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            p.normal_(std=std, generator=generator) if p.ndim > 1 else p.uniform_(0.5, 1.0, generator=generator)
    return model.eval()


def tokens(B, T, bos_at=(0,), seed=1):
    idx = torch.randint(1, SMALL['vocab_size'], (B, T), generator=torch.Generator().manual_seed(seed))
    idx[:, list(bos_at)] = 0
    return idx


def a_run(monkeypatch, *argv, step_model=None, **has):
    """A Run of ideas that has what is given, and of build only what the ideas do there."""
    ideas = prepare_data.Ideas(argv, train.TABLES)
    run = object.__new__(ideas.seam(train.Run))
    vars(run).update(dict(s=SimpleNamespace(**ideas.values), ideas=ideas, device='cpu', progress=0.0, step_model=step_model) | has)
    monkeypatch.setattr(train.Run, 'build', lambda self: None)
    run.build()
    return run


def losses(out_dir):
    rows = [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]
    return [row['train_loss'] for row in rows if 'train_loss' in row]


# ---- the loss of logits: soft cap, z-loss, soft targets

def mixture(V, rank=16):
    """Soft targets as syntactic smoothing has them: similarities of rows of a table, in bits, and a share for the gold token."""
    table = F.normalize(torch.rand(V, rank, device=DEVICE), dim=1) * math.sqrt(math.log2(math.e) / 0.1)
    return table, loss_kernels.similarity_norm(table), torch.tensor(0.7, device=DEVICE)


def plain_loss(x, w, targets, cap, z_loss, soft):
    """All logits at once, in the dtype of the activations."""
    z = x @ w.to(x.dtype).t()
    z = loss_kernels.softcap(z if x.dtype == torch.float64 else z.float(), cap)[targets >= 0]
    gold = targets[targets >= 0, None]
    log_z = z.logsumexp(-1)
    q = loss_kernels.soft_targets(gold, [t.to(z.dtype) for t in soft]) if soft else torch.zeros_like(z).scatter_(1, gold, 1)
    return (log_z - (q * z).sum(-1) + z_loss * log_z ** 2).sum() / max(1, len(gold))


KINDS = [(0.0, 0.0, False), (15.0, 0.0, False), (0.0, 0.1, False), (0.0, 0.0, True), (5.0, 0.01, True)]


@pytest.mark.parametrize('n, rows', [(1, 512), (130, 32), (64, 64)])
@pytest.mark.parametrize('cap, z_loss, soft', KINDS)
@pytest.mark.parametrize('ignored', ['none', 'some', 'first block', 'all'])
def test_soft_cross_entropy_is_that_of_all_logits(n, rows, cap, z_loss, soft, ignored):
    torch.manual_seed(0)
    x, w = torch.randn(n, 24, requires_grad=True), torch.randn(50, 24, requires_grad=True)
    targets, soft = torch.randint(0, 50, (n,)), tuple(t.cpu() for t in mixture(50)) if soft else ()
    targets[{'none': slice(0), 'some': slice(None, None, 3), 'first block': slice(rows), 'all': slice(None)}[ignored]] = -1
    got, expected = loss_kernels.soft_cross_entropy(x, w, targets, 'mean', cap, z_loss, soft, rows), plain_loss(x, w, targets, cap, z_loss, soft)
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(3 * loss, (x, w)) for loss in (got, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    each = F.cross_entropy(loss_kernels.softcap(x @ w.t(), cap), targets, ignore_index=-1, reduction='none')     # as it is measured
    torch.testing.assert_close(loss_kernels.soft_cross_entropy(x, w, targets, 'none', cap, z_loss, soft, rows), each)


def test_soft_targets_are_a_distribution():
    V = 90
    table, norm, alpha = mixture(V)
    gold = torch.arange(V, device=DEVICE)[:, None]
    q = loss_kernels.soft_targets(gold, (table, norm, alpha))
    torch.testing.assert_close(q.sum(1), torch.ones_like(alpha).expand(V))
    assert (q.diagonal() == alpha).all() and q.min() >= 0
    s = table @ table.t()
    torch.testing.assert_close(q[0, 5] / q[0, 9], torch.exp2(s[0, 5] - s[0, 9]))
    uniform = torch.zeros(V, 16, device=DEVICE)                     # label smoothing
    q = loss_kernels.soft_targets(gold, (uniform, loss_kernels.similarity_norm(uniform), alpha))
    torch.testing.assert_close(q[3, 4], (1 - alpha) / (V - 1))


def test_the_three_stack_in_any_order():
    idx, soft = tokens(2, 30), tuple(t.cpu() for t in mixture(97))
    targets = idx.roll(-1, 1)
    targets[0, 4:8] = -1
    options, names = dict(logit_softcap=5.0, z_loss=0.1), ('softcap', 'z_loss', 'syntactic_smoothing')
    for order in (names, names[::-1], (names[1], names[2], names[0])):
        model = make(*order, **options)
        x = model.trunk(idx).flatten(0, 1)
        torch.testing.assert_close(model(idx, targets, soft=soft), plain_loss(x, model.lm_head.weight, targets.flatten(), 5.0, 0.1, soft))
        torch.testing.assert_close(model.logits(x), 5 * torch.tanh(x @ model.lm_head.weight.t() / 5))
        each = model(idx, targets, reduction='none', soft=soft)     # neither soft targets nor z-loss are measured
        torch.testing.assert_close(each.sum() / (targets >= 0).sum(), plain_loss(x, model.lm_head.weight, targets.flatten(), 5.0, 0.0, ()))


def test_what_is_off_is_the_base():
    idx = tokens(2, 30)
    base, off = make(), make('softcap', 'z_loss', logit_softcap=0.0, z_loss=0.0)
    assert torch.equal(base(idx, idx.roll(-1, 1)), off(idx, idx.roll(-1, 1))) and torch.equal(base.logits(base.trunk(idx)), off.logits(off.trunk(idx)))


# ---- a head that is a mixture

@pytest.mark.parametrize('n, rows', [(1, 512), (130, 32)])
@pytest.mark.parametrize('parts', [1, 3])
@pytest.mark.parametrize('ignored', [slice(0), slice(None, None, 3), slice(None)])
def test_a_mixture_s_loss_is_that_of_all_logits(n, rows, parts, ignored, monkeypatch):
    monkeypatch.setattr(mixture_head, 'rows_at_once', lambda *_: rows * parts)
    torch.manual_seed(0)
    x, w = torch.randn(n, parts, 24, requires_grad=True), torch.randn(50, 24, requires_grad=True)
    targets = torch.randint(0, 50, (n,))
    targets[ignored] = -1
    each = F.cross_entropy((x @ w.t()).logsumexp(1), targets, ignore_index=-1, reduction='none')
    got, expected = mixture_head.mixed_cross_entropy(x, w, targets), each.sum() / max(1, (targets >= 0).sum())
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(3 * loss, (x, w)) for loss in (got, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(mixture_head.mixed_cross_entropy(x, w, targets, 'none'), each)


def test_a_mixture_of_one_is_the_base_and_one_of_more_of_higher_rank():
    idx = tokens(2, 60)
    base, one, three = make(), make('mixture_head', head_parts=1), make('mixture_head', head_parts=3)
    torch.testing.assert_close(one(idx, idx.roll(-1, 1)), base(idx, idx.roll(-1, 1)))
    rank = lambda model: torch.linalg.matrix_rank(model.logits(model.trunk(idx)).flatten(0, 1).double(), rtol=1e-5)
    C, V = base.config.n_embd, base.config.vocab_size
    assert rank(base) <= C < rank(three)
    assert three.flops_per_token() - base.flops_per_token() == 6 * 2 * (C * C + C * V)
    assert three.params()['total'] - base.params()['total'] == 2 * C * C
    x = three.trunk(idx)
    torch.testing.assert_close(three.loss(x, idx, 'none'), F.cross_entropy(three.logits(x).mT, idx, reduction='none'))


# ---- its kernel

@pytest.fixture
def kernels(monkeypatch):
    """test_kernels.py with all kernels in use, and memory that nobody has written full of NaN."""
    pytest.importorskip('triton')
    import test_kernels
    monkeypatch.setattr(models, 'IN_USE', set(models.KERNELS))
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield test_kernels
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == 'cuda'))
@pytest.mark.parametrize('N, V, rows, cap, z_loss, soft', [
    *((*size, *kind) for size in ((37, 100, 16), (1, 257, 64), (20, 1031, 20)) for kind in KINDS[1:3] + KINDS[4:]), (37, 100, 16, *KINDS[3])])
def test_the_kernel(N, V, rows, cap, z_loss, soft, dtype, kernels):
    targets = torch.randint(0, V, (N,), device=DEVICE)
    targets[N // 2:N // 2 + 3] = -1 if N > 1 else V - 1
    soft = mixture(V) if soft else ()

    def plain(x, w):
        return plain_loss(x, w, targets, cap, z_loss, soft)

    def ours(x, w):
        return loss_kernels.soft_cross_entropy(x, w, kernels.guarded(targets), 'mean', cap, z_loss, soft, rows)
    inputs = [torch.randn(N, 32, dtype=torch.float64), torch.randn(V, 32, dtype=torch.float64) / 4]
    kernels.agree(ours, plain, plain, inputs, dtype)
    x, w = (t.to(DEVICE) for t in inputs)
    each = loss_kernels.soft_cross_entropy(x.to(dtype), w.to(dtype), targets, 'none', cap, z_loss, soft, rows)
    true = F.cross_entropy(loss_kernels.softcap(x @ w.t(), cap), targets, ignore_index=-1, reduction='none')
    assert kernels.error(each, true) < kernels.LIMITS[dtype][0] and (each[targets < 0] == 0).all()


@pytest.mark.parametrize('names, options', [(('window', 'softcap'), dict(window=15, logit_softcap=9.0)),
                                            (('z_loss', 'syntactic_smoothing'), dict(z_loss=0.01))])
def test_a_step_with_kernels_is_the_step_without(names, options, kernels, monkeypatch):
    model = make(*names, n_layer=1, head_dim=16, n_head=2, **options).to(DEVICE)
    idx, soft = tokens(2, 31, (0, 13)).to(DEVICE), mixture(97) if 'syntactic_smoothing' in names else ()
    found = []
    for in_use in ({'cross_entropy', *['attention', 'qk_norm'] * ('window' in names)}, set()):
        monkeypatch.setattr(models, 'IN_USE', in_use)
        model.zero_grad()
        loss = model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous(), soft=soft)
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in model.parameters()])
    assert all(kernels.error(a, b.double()) < 1e-5 for a, b in zip(*found))


@pytest.mark.parametrize('names', [('z_loss',), ('softcap', 'syntactic_smoothing')])
def test_when_the_kernel_is_used(names, kernels, monkeypatch):
    """Where model.py's own is, if it is right, and faster than PyTorch on as many rows as a micro-batch has."""
    said, seconds, right, tried = [], iter([2e-3, 3e-3, 3e-3, 2e-3]), models.launch, []
    monkeypatch.setattr(syntactic_smoothing.Run, 'build', lambda self: None)
    run = a_run(monkeypatch, *paths(*names), '--block_size=16', model=make(*names).to(DEVICE), dtype=torch.float32, say=said.append)
    run.device, run.micro = DEVICE, 3

    def choose(spoil=None):
        def launch(kernel, grid, *args, **options):
            right(kernel, grid, *args, **options)
            tried.append(args[9:13])                        # cap, z-loss, whether gradients, columns of the table
            spoil(args[2])
        models.IN_USE.add('cross_entropy')
        monkeypatch.setattr(models, 'launch', launch if spoil else right)
        run.choose_kernels()
        assert models.IN_USE | {'cross_entropy'} == set(models.KERNELS)
        return 'cross_entropy' in models.IN_USE

    monkeypatch.setattr(train.Run, 'choose_kernels', lambda self: None)
    monkeypatch.setattr(models.Probe, 'seconds', lambda probe: next(seconds) if len(probe.full) == 48 else None)
    assert choose() and said.pop() == '  soft cross-entropy: kernel, in place of that; a loss takes 2.00 ms with it, 3.00 without'
    assert not choose() and said.pop() == '  soft cross-entropy: torch, a loss takes 3.00 ms with it, 2.00 without'
    for spoil, why in ((lambda out: out.mul_(1.2), 'its result differs by '), (lambda out: out.fill_(math.nan), 'its result differs by nan%'),
                       (lambda out: out.no_such(), 'does not run here (AttributeError: ')):
        assert not choose(spoil) and why in said.pop()
    assert set(tried) == {(0.0, 1e-4, True, 0) if names == ('z_loss',) else (30.0, 0.0, True, 32)}
    models.IN_USE.discard('cross_entropy')
    run.choose_kernels()
    assert not said and 'cross_entropy' not in models.IN_USE


# ---- windows

WINDOWS = [dict(window=9, rotary_dim=4), dict(doc_mask=False, window=20, n_kv_head=2), dict(window=1), dict(window=0)]


@torch.no_grad()
def logits(model, idx):
    return model.logits(model.trunk(idx))


@pytest.mark.parametrize('options', WINDOWS)
def test_a_token_sees_its_window_and_the_cache_gives_the_same(options):
    model, idx = make('window', **options), tokens(2, 40, (0, 13))
    seen = torch.stack([model.first_visible(idx)[0], torch.arange(40)], 1).tolist()
    W = options['window'] or 64
    assert seen == [[max(t - W + 1, 13 if t >= 13 and options.get('doc_mask', True) else 0), t] for t in range(40)]
    q = [torch.randn(2, model.config.n_head, 40, 8), *torch.randn(2, 2, model.config.n_kv_head, 40, 8)]
    o = models.attention(*q, model.first_visible(idx), 0.3)
    q[2][:, :, 5] += 1                                              # a value that changes is seen from its window alone
    changed = (models.attention(*q, model.first_visible(idx), 0.3) - o).abs().amax((0, 1, 3)) > 0
    assert [t for t in range(40) if changed[t]] == [t for first, t in seen if first <= 5 <= t]
    cache = models.KVCache(model, 2)
    with torch.no_grad():
        pieces = [model.logits(model.trunk(piece, cache)) for piece in idx.split([17, 1, 1, 8, 13], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, idx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('options', WINDOWS)
def test_flops_of_a_window(options):
    model, T = make('window', **options), 64
    with FlopCounterMode(display=False) as counter:
        logits(model, tokens(2, T))                                 # one block of queries: every token meets all 64 positions
    assert 3 * counter.get_total_flops() == 2 * T * model.flops_per_token(attended=T)
    attended = sum(min(t + 1, options['window'] or T) for t in range(T)) / T          # of one document
    assert model.flops_per_token() == model.flops_per_token(attended) and model.attended(tokens(1, T)) == attended


# ---- further tokens

@pytest.mark.parametrize('options', [dict(), dict(tie_embeddings=True, logit_softcap=5.0, z_loss=0.1)])
def test_further_tokens_are_predicted_within_their_document(options):
    """Against a loop over rows, positions and distances; a document's end, the next one's BOS, is still predicted."""
    names = ['multi_token'] + ['softcap', 'z_loss'] * ('z_loss' in options)
    model, idx = make(*names, predict_ahead=3, **options), tokens(3, 30, (0, 9, 10, 20))
    targets = torch.cat([idx[:, 1:], torch.tensor([[5], [0], [7]])], 1)
    x, expected = model.trunk(idx), model(idx, targets)
    for k, further in enumerate(model.ahead, 1):
        each = []
        for row in range(3):
            whole = [*idx[row].tolist(), targets[row, -1].item()]
            for t in range(30):
                if t + 1 + k < len(whole) and 0 not in whole[t + 1:t + 1 + k]:
                    h = models.rms_norm(x[row, t] + further.weight @ x[row, t])
                    each.append(-model.logits(h).log_softmax(-1)[whole[t + 1 + k]])
        expected = expected + 0.25 * torch.stack(each).mean()
    torch.testing.assert_close(model(idx, targets, ahead=torch.tensor(0.25)), expected)
    alone = make(*names[1:], **options)                             # what is measured knows nothing of it
    alone.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(idx, targets, reduction='none'), alone(idx, targets, reduction='none'))


def test_further_tokens_count_and_train():
    model, idx, plain = make('multi_token', predict_ahead=3), tokens(3, 30, (0, 9, 10, 20)), make()
    targets = torch.cat([idx[:, 1:], idx[:, :1]], 1)
    model(idx, targets, ahead=torch.tensor(1.0)).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.ahead.parameters())
    a, b = model.params(), plain.params()
    assert a['total'] - b['total'] == a['non_embedding'] - b['non_embedding'] == 3 * 32 ** 2 and a['active'] == b['active']
    assert model.flops_per_token() - plain.flops_per_token() == 6 * 3 * (32 ** 2 + 97 * 32)
    torch.manual_seed(0)
    fresh = model.config.GPT(model.config)
    assert not any(p.any() for p in fresh.ahead.parameters())
    assert fresh(idx, targets, ahead=torch.tensor(0.0)).item() == pytest.approx(math.log(97), abs=0.15)


def test_the_weight_of_further_tokens_falls_with_progress(monkeypatch):
    seen = []
    run = a_run(monkeypatch, *paths('multi_token'), '--ahead_weight=0.4', step_model=lambda idx, targets, ahead: seen.append(ahead.item()))
    for run.progress in (0.0, 0.5, 1.0):
        run.batch_loss(idx=tokens(1, 4), targets=tokens(1, 4))
    assert seen == pytest.approx([0.4, 0.2, 0.0])


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_every_parameter_has_one_optimizer(optimizer):
    ideas = prepare_data.Ideas([*paths('climb_objective', 'multi_token', 'softcap'), f'--optimizer={optimizer}'], train.TABLES)
    run = object.__new__(ideas.seam(train.Run))
    run.s, run.dtype, model = SimpleNamespace(**ideas.values), torch.float32, make('climb_objective', 'multi_token', 'softcap')
    groups = [group for o in run.make_optimizers(model) for group in o.param_groups]
    held = [id(p) for group in groups for p in group['params']]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    rate = {id(p): group['base_lr'] for group in groups for p in group['params']}
    assert rate[id(model.class_head.weight)] == rate[id(model.lm_head.weight)]
    assert rate[id(model.ahead[0].weight)] == rate[id(model.blocks[0].attn.q.weight)]


# ---- word classes

def test_the_second_head_guesses_classes():
    model, idx, class_of = make('climb_objective', word_classes=4), tokens(3, 16), torch.arange(97) % 4
    targets = idx.roll(-1, 1)
    targets[0, :4] = -1
    x = model.trunk(idx)[targets >= 0]
    both = [F.cross_entropy(z, t) for z, t in ((model.lm_head(x), targets[targets >= 0]), (model.class_head(x), class_of[targets[targets >= 0]]))]
    got = model(idx, targets, class_of=class_of, class_share=torch.tensor(0.25))
    torch.testing.assert_close(got, 0.75 * both[0] + 0.25 * both[1])
    a, b = model.params(), make().params()
    assert a['total'] - b['total'] == 7 * 32 and a['active'] == b['active']
    assert model.flops_per_token() - make().flops_per_token() == 6 * 7 * 32
    assert not model.config.GPT(model.config).class_head.weight.any()


@pytest.fixture(scope='module')
def classed(corpus, tmp_path_factory):
    """The small corpus with word classes made up for it."""
    folder = tmp_path_factory.mktemp('classed') / corpus.folder.name
    shutil.copytree(corpus.folder, folder)
    np.save(folder / 'classes-4.npy', np.random.default_rng(0).integers(0, 5, (257, 7)).astype(np.float32))
    return folder


def test_soft_targets_are_those_of_the_paper(classed):
    """A softmax of cosines over a temperature over all but the right token, times 1 - alpha."""
    data, s = prepare_data.open_data(classed), SimpleNamespace(smoothing_by='classes', smoothing_temperature=0.2, word_classes=4)
    table = syntactic_smoothing.smoothing_table(s, data)
    assert table.shape == (257, 16)
    rows = torch.from_numpy(np.load(classed / 'classes-4.npy')).double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    alike = torch.exp(rows @ rows.T / 0.2).fill_diagonal_(0)
    expected = 0.3 * alike / alike.sum(1, keepdim=True) + 0.7 * torch.eye(257)
    got = loss_kernels.soft_targets(torch.arange(257)[:, None], (table, loss_kernels.similarity_norm(table), torch.tensor(0.7)))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-7)
    s.smoothing_by = 'uniform'
    table = syntactic_smoothing.smoothing_table(s, data)
    got = loss_kernels.soft_targets(torch.tensor([[3]]), (table, loss_kernels.similarity_norm(table), torch.tensor(0.7)))
    torch.testing.assert_close(got[0], torch.full((257,), 0.3 / 256).index_fill(0, torch.tensor(3), 0.7))


def test_alpha_and_the_classes_share_follow_progress(classed, monkeypatch):
    seen = []
    run = a_run(monkeypatch, *paths('syntactic_smoothing', 'climb_objective'), '--smoothing=0.4', '--class_loss=0.5', '--class_until=0.5',
                '--word_classes=4', data=prepare_data.open_data(classed),
                step_model=lambda idx, targets, soft, class_of, class_share: seen.append((soft[2].item(), class_share.item())))
    for run.progress in (0.0, 0.25, 0.5, 1.0):
        run.batch_loss(idx=tokens(1, 4), targets=tokens(1, 4))
    assert seen == [pytest.approx(pair) for pair in ((0.6, 0.5), (0.7, 0.25), (0.8, 0.0), (1.0, 0.0))]


def test_the_end_of_a_document_is_of_no_class(monkeypatch):
    known = np.array([[0, 2, 1], [0, 0, 0], [3, 0, 0]], np.float32)          # of id 1 nothing is known, as of BOS
    monkeypatch.setattr(climb_objective, 'table', lambda data, n: known)
    assert a_run(monkeypatch, *paths('climb_objective'), data=None).class_of.tolist() == [1, -1, 0]


# ---- known words

def test_rare_ids_are_neither_read_nor_taught(monkeypatch):
    counts = np.array([0, 0, 50, 40, 30, 20, 10, 5])            # bos, unk, and six ids, the frequent first
    data = SimpleNamespace(tokenizer=SimpleNamespace(unk=1), tokens=dict(train=np.repeat(np.arange(8), counts)), meta=dict(vocab_size=8))
    run = a_run(monkeypatch, *paths('climb_vocabulary'), '--vocabulary_floor=0.25', '--pacing_start=0', '--pacing_end=1', data=data,
                config=SimpleNamespace(bos=0), step_model=lambda *pair: [x.tolist() for x in pair])
    idx, targets = torch.tensor([[0, 2, 3, 4, 7]]), torch.tensor([[2, 3, 4, 7, -1]])
    for run.progress, expected in ((0.0, [[[0, 2, 3, 1, 1]], [[2, 3, -1, -1, -1]]]), (0.34, [[[0, 2, 3, 4, 1]], [[2, 3, 4, -1, -1]]]),
                                   (1.0, [idx.tolist(), targets.tolist()])):
        assert run.batch_loss(idx=idx, targets=targets) == expected


# ---- a teacher

@pytest.mark.parametrize('cap, their_cap', [(0.0, 0.0), (3.0, 2.0)])
@pytest.mark.parametrize('ignored', ['none', 'some', 'all'])
def test_distillation_is_the_divergence_of_all_logits(cap, their_cap, ignored):
    torch.manual_seed(0)
    x, w, h, v = (torch.randn(*shape, requires_grad=True) for shape in ((70, 24), (50, 24), (70, 8), (50, 8)))
    targets, T = torch.randint(0, 50, (70,)), 2.5
    targets[{'none': slice(0), 'some': slice(None, None, 3), 'all': slice(None)}[ignored]] = -1
    keep = targets >= 0
    p, q = (loss_kernels.softcap(a @ b.t(), c) / T for a, b, c in ((h, v, their_cap), (x, w, cap)))
    each = F.kl_div(q.log_softmax(-1), p.detach().softmax(-1), reduction='none').sum(-1)
    expected = T ** 2 * (each * keep).sum() / keep.sum().clamp(min=1)
    got = distillation.divergence(x, w, targets, T, h.detach(), lambda h: loss_kernels.softcap(h @ v.detach().t(), their_cap), cap, 32)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(3 * loss, (x, w)) for loss in (got, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_model_that_teaches_itself_has_nothing_to_learn():
    model, other, idx = make('distillation', teacher_weight=0.25), make('softcap', 'window', n_embd=16, logit_softcap=4.0), tokens(2, 30)
    targets = idx.roll(-1, 1)
    with torch.no_grad():
        own, theirs = (m.trunk(idx).flatten(0, 1) for m in (model, other))
    torch.testing.assert_close(model(idx, targets, hidden=own, logits=model.logits), 0.75 * model(idx, targets))
    apart = distillation.divergence(own, model.lm_head.weight, targets.flatten(), 2.0, theirs, other.logits, rows=7)
    torch.testing.assert_close(model(idx, targets, hidden=theirs, logits=other.logits), 0.75 * model(idx, targets) + 0.25 * apart)


@pytest.mark.long
def test_a_run_learns_from_an_earlier_one_of_other_ideas(main, tmp_path, corpus):
    main(*paths('softcap', 'window'), '--out_dir=teacher', '--window=20', '--max_steps=20')
    out = main(*paths('distillation'), '--teacher=teacher', '--teacher_weight=1.0', '--n_embd=32', '--max_steps=40', '--out_dir=taught',
               '--learning_rate=0.05')
    student, teacher = sample.load(tmp_path / 'taught')[0], sample.load(tmp_path / 'teacher')[0]
    assert teacher.config.window == 20 and not hasattr(student.config, 'window') and 'teacher=' in out
    idx = torch.from_numpy(corpus.open().tokens['val'][:65].astype(np.int64))[None]

    def apart(model):
        x, theirs = (m.trunk(idx[:, :-1]).flatten(0, 1) for m in (model, teacher))
        cap = getattr(model.config, 'logit_softcap', 0.0)
        return distillation.divergence(x, model.lm_head.weight, idx[0, 1:], 2.0, theirs, teacher.logits, cap).item()
    assert apart(teacher) == pytest.approx(0, abs=1e-5) and apart(student) < 0.5 * losses(tmp_path / 'taught')[0]


def test_teachers_that_cannot_be(main, tmp_path):
    main('--out_dir=teacher', '--max_steps=1', '--n_layer=1', '--n_embd=32')
    for settings, said in ((['--teacher=nowhere'], 'nowhere.*does not exist'), (['--teacher=teacher', '--block_size=128'], 'reads 64 tokens'),
                           (['--teacher=teacher', '--tokenizer=bpe', '--vocab_size=300'], 'another vocabulary than'),
                           (['--teacher=run'], 'is where this run goes')):
        with pytest.raises(UserError, match=said):
            main(*paths('distillation'), *settings)
        assert not (tmp_path / 'run').exists()


# ---- masked tokens, read both ways

@pytest.mark.parametrize('options', [dict(), dict(n_kv_head=2, window=6), dict(doc_mask=False)])
def test_two_way_attention_sees_the_whole_document_and_no_other(options):
    names = ['masked'] + ['window'] * ('window' in options)
    model, idx = make(*names, **options), tokens(2, 30, (0, 9, 20))
    before = model.trunk(idx, two_way=True)
    for at in (3, 14, 29):
        other = idx.clone()
        other[:, at] = other[:, at] % 90 + 2
        changed = (model.trunk(other, two_way=True) - before).abs().amax(-1)[0] > 1e-6
        doc = range(0, 30) if model.config.doc_mask is False else range(*((0, 9) if at < 9 else (9, 20) if at < 20 else (20, 30)))
        assert [t for t in range(30) if changed[t]] == list(doc), (at, changed)
    assert torch.equal(model.trunk(idx), make(*names[1:], **options).trunk(idx))         # one way it is what it was


def test_rows_that_look_both_ways_count_all_that_they_see(monkeypatch):
    model, idx = make('masked'), tokens(8, 30, (0, 9, 20))
    run = a_run(monkeypatch, *paths('masked'), data=SimpleNamespace(tokenizer=SimpleNamespace(unk=1)), micro=8, model=model)
    monkeypatch.setattr(train.Run, 'read_rows', lambda self: idx)
    seen = [model.visible(rows, two_way=two_way)[0] for rows, two_way in ((idx[:2], True), (idx[2:], False))]
    both = torch.cat([seen[0].sum(-1), torch.arange(30) - seen[1] + 1]).double().mean().item()        # of 2 rows in 8
    assert run.arithmetic() == pytest.approx(model.flops_per_token(both), rel=1e-6) and run.arithmetic() > model.flops_per_token(model.attended(idx))


def test_the_kernels_are_not_asked_for_rows_that_look_ahead(monkeypatch):
    monkeypatch.setattr(models, 'IN_USE', {'attention'})
    model, idx = make('masked'), tokens(2, 30)
    assert model.visible(idx)[1] is not None and model.visible(idx, two_way=True)[1] is None


def test_attention_by_a_mask():
    torch.manual_seed(0)
    layer = make('masked', n_kv_head=2).blocks[0].attn
    q, k, v, first = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8), torch.zeros(2, 9, dtype=torch.long)
    seen = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, -1, -1)
    torch.testing.assert_close(layer.attend(q, k, v, seen), layer.attend(q, k, v, first))
    every = (layer.scale * q @ k.repeat_interleave(2, 1).mT).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(layer.attend(q, k, v, torch.ones_like(seen)), every)


@pytest.mark.parametrize('more', [(), ('masked', 'multi_token'), ('multi_token', 'masked')])
def test_a_share_of_the_rows_fills_in_what_is_hidden(more, monkeypatch):
    """What else changes the loss changes that of the other rows alone, in either order."""
    calls = []

    def model(idx, targets, two_way=False, ahead=None, domain=None):
        calls.append((idx, targets, two_way, ahead))
        assert domain == 3
        return torch.tensor(8.0 if two_way else 1.0)
    run = a_run(monkeypatch, *paths(*more or ['masked']), '--masked=0.25', data=SimpleNamespace(tokenizer=SimpleNamespace(unk=1)), micro=8,
                config=SimpleNamespace(bos=0), step_model=model)
    whole = torch.randint(2, 50, (8 * 1024 + 1,), generator=torch.Generator().manual_seed(1))
    whole[::10] = 0
    idx, targets = whole[:-1].view(8, 1024), whole[1:].view(8, 1024)
    for run.progress, rate in [(0.0, 0.3), (1.0, 0.15)] * 4:
        calls.clear()
        assert run.batch_loss(idx=idx, targets=targets, domain=3).item() == pytest.approx(0.25 * 8 + 0.75)
        (rows, guessed, two_way, no_ahead), (rest, their_targets, causal, ahead) = calls
        assert two_way and not causal and torch.equal(rest, idx[2:]) and torch.equal(their_targets, targets[2:])
        assert no_ahead is None and (ahead is not None) == bool(more)
        hidden = rows == 1
        assert torch.equal(rows[~hidden], idx[:2][~hidden]) and not (idx[:2][hidden] == 0).any()
        assert hidden.float().mean().item() == pytest.approx(0.9 * rate, abs=0.03)
        for row in range(2):
            assert guessed[row].tolist() == [targets[row, t].item() if t < 1023 and hidden[row, t + 1] else -1 for t in range(1024)]
    calls.clear()                                      # in four pieces a row, as context_rampup.py cuts it
    run.batch_loss(idx=idx.view(32, 256), targets=targets.view(32, 256), domain=3)
    assert len(calls[0][0]) == 8 and len(calls[1][0]) == 24


def test_masks_that_cannot_be(main, tmp_path):
    few = ['--masked=0.1', '--micro_batch_size=4', '--tokenizer=bpe', '--vocab_size=300']
    for settings, said in (([], 'tokenizer bytes has none'), (few, '0 of the 4 rows')):
        with pytest.raises(UserError, match=said):
            main(*paths('masked'), *settings)
        assert not (tmp_path / 'run').exists()


# ---- whole runs

def test_runs_with_another_objective(main, tmp_path, classed):
    here = [f'--data_dir={classed.parent}', '--seed=2']
    main(*here)
    plain, smoothing = losses(tmp_path / 'run'), paths('syntactic_smoothing')
    others = [[*smoothing, '--word_classes=4'], [*smoothing, '--smoothing_by=uniform'], [*paths('climb_objective'), '--word_classes=4'],
              [*paths('z_loss'), '--z_loss=0.01']]
    for number, settings in enumerate(others):
        main(*here, *settings, f'--out_dir=other{number}')
        assert losses(tmp_path / f'other{number}') != plain
        sample.load(tmp_path / f'other{number}')
    with pytest.raises(UserError, match='bytes has none: use bpe'):
        main(*paths('climb_vocabulary'), '--vocabulary_floor=0.5', '--out_dir=none')


@pytest.mark.parametrize('first, other, why', [
    ('masked', 'climb_vocabulary', 'spare token'), ('climb_vocabulary', 'masked', 'spare token'),
    ('climb_vocabulary', 'syntactic_smoothing', 'rare ids'), ('distillation', 'climb_vocabulary', 'rare ids')])
def test_what_does_not_go_together_is_refused_by_name(first, other, why):
    with pytest.raises(UserError, match=f'(?:{first}|{other}).py and (?:config/)?(?:{first}|{other}).py do not go together.*{why}.*leave one out'):
        prepare_data.Ideas(paths(first, other), train.TABLES)


@pytest.mark.parametrize('names', [['masked'], pytest.param(['climb_vocabulary', 'climb_objective', 'softcap'], marks=pytest.mark.long),
    pytest.param(['syntactic_smoothing', 'z_loss', 'softcap', 'multi_token', 'masked', 'window'], marks=pytest.mark.long)])
def test_a_run_resumes_to_the_bit_with(main, tmp_path, monkeypatch, names):
    args = [*paths(*names), '--tokenizer=bpe', '--vocab_size=300', '--micro_batch_size=4', '--max_steps=12', *['--masked=0.5'] * ('masked' in names),
            *['--word_classes=3'] * bool({*names} & {'climb_objective', 'syntactic_smoothing'})]
    main(*args)
    in_two_parts(main, monkeypatch, 7, *args)
    ours, theirs = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True) for name in ('run', 'parts'))
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'run') and ours['steps'] == theirs['steps'] == 12
    assert all(torch.equal(ours['model'][k], theirs['model'][k]) for k in ours['model'])
    model, tokenizer = sample.load(tmp_path / 'parts')
    assert ''.join(sample.stream(model, tokenizer, 'Mia', 8, generator=torch.Generator().manual_seed(1)))


@pytest.mark.long
def test_another_objective_from_a_finished_run(main, tmp_path, classed):
    here = f'--data_dir={classed.parent}'
    main(here)
    main(here, *paths('climb_objective', 'multi_token'), '--init_from=run', '--out_dir=second', '--word_classes=4')
    result = json.loads((tmp_path / 'second' / 'result.json').read_text())
    assert result['active_params'] == result['total_params'] - 64 * 64 - 7 * 64


@pytest.mark.slow
@pytest.mark.parametrize('name, extras', [
    ('distillation', lambda teacher, x: dict(hidden=x, logits=teacher.logits)), ('multi_token', lambda teacher, x: dict(ahead=torch.rand(()))),
    ('syntactic_smoothing', lambda teacher, x: dict(soft=tuple(t.cpu() for t in mixture(97)))), ('masked', lambda teacher, x: dict(two_way=True)),
    ('climb_objective', lambda teacher, x: dict(class_of=torch.arange(97) % 4, class_share=torch.rand(())))])
def test_torch_compile_finds_one_graph(name, extras):
    model, teacher, idx = make(name), make('softcap', 'window', n_embd=16), tokens(2, 30)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend='aot_eager')
    for _ in range(3):                                        # what changes on the way is a tensor: no further program
        with torch.no_grad():
            given = extras(teacher, teacher.trunk(idx).flatten(0, 1))
        loss = compiled(idx, idx.roll(-1, 1), **given)
        loss.backward()
        torch.testing.assert_close(loss, model(idx, idx.roll(-1, 1), **given))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


@pytest.mark.slow
@pytest.mark.parametrize('names', [['climb_objective'], ['distillation'], ['masked'], ['multi_token', 'window'],
                                   ['syntactic_smoothing', 'z_loss', 'softcap']])
def test_a_run_compiled_learns_as_it_does_not_compiled(names, main, tmp_path):
    torch._dynamo.reset()                                     # of the run before: each is a process of its own
    bpe = ['--tokenizer=bpe', '--vocab_size=300', '--max_steps=5']
    if names == ['distillation']:
        main(*paths('softcap'), *bpe, '--out_dir=teacher')
        names = ['distillation', '--teacher=teacher']
    settings = [*paths(*[n for n in names if n[0] != '-']), *[n for n in names if n[0] == '-'], *bpe]
    settings += ['--word_classes=3'] * bool({*names} & {'climb_objective', 'syntactic_smoothing'})
    for compile in ('off', 'on'):
        main(*settings, f'--compile={compile}', f'--out_dir={compile}')
    assert losses(tmp_path / 'on') == pytest.approx(losses(tmp_path / 'off'), rel=1e-3)


@pytest.mark.slow
def test_the_kernel_is_built_for_every_card(tmp_path):
    from conftest import script
    code, out, err = script('bench_mfu.py', *paths('softcap', 'z_loss', 'syntactic_smoothing'), '--kernels=compile-only', cwd=tmp_path, timeout=600)
    assert code == 0 and 'soft_cross_entropy_kernel' in out, err

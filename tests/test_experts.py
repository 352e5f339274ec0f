"""config/experts.py and config/domains.py: several MLPs, of which a token passes some, routed or by its domain."""
import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as models
import sample
import train
from config import expert_kernels
from config.domain_measure import Told, nats_by_domain
from config.domain_model import own_hidden, split
from config.domains import Stream, nearest_parts
from config.stacked_weights import for_stacks
from conftest import in_two_parts, train_module
from prepare_data import UserError
from test_tokenformer import config_of, logits, losses, made, make, path, run_of, tokens, weights


# ---- routed

def routed_slowly(layer, x):
    """y of the docstring, a token at a time, an expert at a time."""
    out = []
    for token in x:
        s = (layer.router.weight @ token).sigmoid()
        chosen = (s + layer.bias).argsort(descending=True)[:layer.top].tolist()
        y = 0
        for i in chosen:
            h = layer.ups.weight[i] @ token
            h = F.silu(h.chunk(2)[0]) * h.chunk(2)[1] if layer.gated else h.relu() ** 2
            y = y + s[i] / s[chosen].sum() * (layer.downs.weight[i] @ h)
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize('options', [dict(experts=5, experts_top=2),
                                     dict(experts=4, experts_top=4, expert_hidden=16, mlp='swiglu'),
                                     dict(experts=30, experts_top=1, mlp_hidden=24)])
def test_experts_are_the_sum_over_those_chosen(options):
    model = make('experts', **options)
    layer, x = model.blocks[1].mlp, torch.randn(2, 11, 32, requires_grad=True)
    expected = models.MLP.forward(layer, x, None) + routed_slowly(layer, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(layer(x, None), expected, rtol=1e-5, atol=1e-5)
    some = [p for p in layer.parameters() if p is not layer.bias] + [x]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), some) for y in (layer(x, None), expected))):
        assert (a - b).norm() < 1e-5 * b.norm() + 1e-4           # of one number, or where one expert takes all of a router, little is left
    sizes, few = model.params(), options['experts'] - options['experts_top']
    idle = 3 * few * (layer.ups.weight[0].numel() + layer.downs.weight[0].numel())
    assert sizes['total'] == sum(p.numel() for p in model.parameters()) == sizes['active'] + idle
    model = make('experts', **options)
    grouped = {torch.ops.aten._grouped_mm: lambda a, b, *rest, **more: 2 * math.prod(a) * b[-1]}       # PyTorch counts none
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter:
        model.logits(model.trunk(tokens(2, 64)))
    assert 3 * counter.get_total_flops() == 2 * 64 * model.flops_per_token(attended=64)


@pytest.fixture
def kernels(monkeypatch):
    """tests/test_kernels.py, whose helpers check any kernel; memory that nobody has written is NaN."""
    pytest.importorskip('triton')
    import test_kernels
    monkeypatch.setattr(models, 'IN_USE', {'experts'})
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield test_kernels
    torch.use_deterministic_algorithms(False)


SHAPES = [     # tokens, width, of experts, how many, how many a token passes, what they are chosen by
    (37, 32, 16, 5, 2, 'chance'), (130, 48, 40, 8, 3, 'chance'), (70, 72, 24, 3, 3, 'all'), (200, 16, 136, 6, 1, 'one'),
    (1, 24, 8, 8, 3, 'chance'), (256, 16, 8, 30, 2, 'few')]


def some_pairs(N, n, top, kind):
    scores = torch.rand(N, n)
    if kind == 'one':
        scores[:, 2] += 1
    elif kind == 'few':
        scores[:, [4, 17, 29]] += 1
    gates, chosen = scores.topk(top)
    order, _, ends = expert_kernels.sorted_pairs(chosen, n)
    return gates, order, ends


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('N, C, h, n, top, kind', SHAPES)
def test_the_kernels_of_experts(N, C, h, n, top, kind, half, kernels):
    gates, order, ends = some_pairs(N, n, top, kind)
    order, ends = order.to(kernels.DEVICE), ends.to(kernels.DEVICE)
    e = torch.searchsorted(ends, torch.arange(N * top, device=ends.device), right=True)
    whose = torch.empty_like(e).scatter_(0, order, e).view(N, top)          # of each pair as tokens have them

    def plain(x, ups, downs, gates):
        y = 0
        for j in range(top):
            a = torch.einsum('nc,nhc->nh', x, ups[whose[:, j]]).relu() ** 2
            y = y + gates[:, j, None].to(x.dtype) * torch.einsum('nh,nch->nc', a, downs[whose[:, j]])
        return y

    def ours(x, ups, downs, gates):
        return expert_kernels.experts_forward(x, ups, downs, gates.float(), kernels.guarded(order), kernels.guarded(ends))[0]
    inputs = [torch.randn(N, C), torch.randn(n, h, C) / C ** 0.5, torch.randn(n, C, h) / h ** 0.5, gates]
    kernels.agree(ours, plain, plain, [t.double() for t in inputs], torch.float16 if half else torch.float32)


def test_twice_the_same_bits(kernels):
    probe = expert_kernels.Probe((8, 24, 32), 3, 150, kernels.DEVICE, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(*(probe.gradients(probe.idx) for _ in range(2))))


@pytest.mark.parametrize('options', [{}, dict(experts=4, experts_top=4, n_embd=24, n_head=3)])
def test_a_step_with_kernels_is_the_step_without(options, kernels, monkeypatch):
    model, idx = make('experts', **options).to(kernels.DEVICE), tokens(2, 31, (0, 13)).to(kernels.DEVICE)
    found = []
    for in_use in {'experts'}, set():
        monkeypatch.setattr(models, 'IN_USE', in_use)
        model.zero_grad()
        loss = model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in model.parameters() if p.ndim > 1])       # a scalar's may cancel to little
    assert all(kernels.error(a, b.double()) < 1e-5 for a, b in zip(*found))


@pytest.mark.long
def test_torch_compile_finds_one_graph_with_kernels_in_it(kernels):
    model, idx = make('experts'), tokens(2, 31, (0, 13))
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    found = []
    for step in model, compiled:
        model.zero_grad()
        loss = step(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in model.parameters() if p.ndim > 1])       # a scalar's may cancel to little
    assert all(kernels.error(a, b.double()) < 1e-5 for a, b in zip(*found))


def test_when_the_kernels_of_experts_are_used(kernels, monkeypatch):
    """On as many rows as a micro-batch has, beside PyTorch: kernels that are wrong, broken, slower or switched off stay out."""
    said, seconds, right = [], iter([2e-3, 3e-3, 3e-3, 2e-3]), models.launch

    def choose(*options, spoil=None, **config):
        def launch(kernel, grid, *args, **more):
            right(kernel, grid, *args, **more)
            spoil(args[5] if kernel is expert_kernels.expert_weights_kernel else args[6])
        run = run_of(path('experts'), '--block_size=16', *options)
        run.model, run.dtype, run.micro, run.device = make('experts', **config).to(kernels.DEVICE), torch.float16, 3, kernels.DEVICE
        run.say = said.append
        models.IN_USE.discard('experts')
        monkeypatch.setattr(models, 'launch', launch if spoil else right)
        run.choose_kernels()
        assert models.IN_USE <= {'experts'}
        return 'experts' in models.IN_USE

    def timed(probe):
        assert len(probe.full[0][0]) == 48
        return next(seconds)
    monkeypatch.setattr(train.Run, 'choose_kernels', lambda self: None)
    monkeypatch.setattr(models.Probe, 'seconds', timed)
    if kernels.DEVICE == 'cpu':
        assert not choose() and 'this is not a GPU' in said.pop()
    monkeypatch.setattr(models, 'no_kernels', lambda device: '')
    assert choose() and said.pop() == '  experts: kernel, rows taken and put where they belong; a layer takes 2.00 ms with it, 3.00 without'
    assert not choose() and said.pop() == '  experts: torch, a layer takes 3.00 ms with it, 2.00 without'
    for spoil, why in ((lambda out: out.mul_(1.2), 'its result differs by '), (lambda out: out.fill_(math.nan), 'its result differs by nan%'),
                       (lambda out: out.no_such(), 'does not run here (AttributeError: ')):
        assert not choose(spoil=spoil) and why in said.pop()
    assert not choose('--kernels=none') and 'switched off' in said.pop()
    assert not choose(mlp='swiglu') and 'SwiGLU' in said.pop()


def test_all_that_a_token_passes_is_as_wide_as_one_mlp():
    config = config_of('experts', n_embd=64)
    assert config.mlp_hidden == 64 and config.GPT(config).blocks[0].mlp.ups.weight.shape == (8, 64, 64)
    assert '3 of 8 experts of 64' in config.GPT(config).describe()
    with pytest.raises(ValueError, match='experts_top is 3, and there are 2 experts'):
        made('experts', experts=2)
    with pytest.raises(ValueError, match='experts 9 wide in a model 32 wide'):
        made('experts', expert_hidden=9)


def looks_ahead(model):
    idx = tokens(2, 40, (0, 13))
    before = logits(model, idx)
    for at in (39, 20):
        other = idx.clone()
        other[:, at] = (other[:, at] + 5) % 90 + 1
        torch.testing.assert_close(logits(model, other)[:, :at], before[:, :at], rtol=0, atol=1e-5)
        assert not torch.allclose(logits(model, other)[:, at], before[:, at])
    cache = models.KVCache(model, 2)
    with torch.no_grad():
        pieces = [model.logits(model.trunk(piece, cache)) for piece in idx.split([17, 1, 1, 21], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), before, rtol=1e-4, atol=1e-4)


def test_experts_cannot_look_ahead_and_the_cache_gives_what_the_full_forward_gives():
    looks_ahead(make('experts', experts=5, experts_top=2))


def test_the_gradient_of_a_bias_is_the_load_above_the_mean():
    layer, x = make('experts', experts=6, experts_top=2).blocks[0].mlp, torch.randn(3, 50, 32)
    for _ in range(2):
        (1e6 * layer(x, None).sum()).backward()                                           # whatever the loss
    chosen = (layer.router(x.flatten(0, 1)).sigmoid() + layer.bias).topk(2).indices
    load = chosen.flatten().bincount(minlength=6) / 300
    torch.testing.assert_close(layer.bias.grad, 2e-6 * (load - 1 / 6))
    assert load.std() > 0.02


def test_a_router_that_prefers_one_expert_is_balanced():
    def uneven(balance_lr):
        torch.manual_seed(0)
        model = made('experts', n_embd=32, experts=8, experts_top=2)
        layer, x = model.blocks[0].mlp, torch.randn(2, 100, 32)
        with torch.no_grad():
            layer.router.weight[0] = 0.5 * layer.router.weight.norm(dim=1).mean() * torch.ones(32)
            x += 0.5                                                    # all tokens look its way
        run = run_of(path('experts'), f'--balance_lr={balance_lr}')
        optimizer = run.make_optimizers(model)[-1]
        for group in optimizer.param_groups:
            group['lr'] = run.rate(0.3) * group['base_lr']
        for _ in range(100):
            model.zero_grad()
            layer(x, None).sum().backward()
            deviation = layer.bias.grad / 1e-6
            layer.router.weight.grad = None
            optimizer.step()
        return deviation.abs().max().item()
    assert uneven(0.0) > 0.1 and uneven(0.01) < 0.03


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('names, options', [(['experts'], {}), (['domains'], dict(domains='a,b'))])
def test_every_parameter_has_one_optimizer(names, options, optimizer):
    model = made(*names, **options)
    optimizers = run_of(*map(path, names), f'--optimizer={optimizer}').make_optimizers(model)
    held = [id(p) for o in optimizers for g in o.param_groups for p in g['params']]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    stacks = [p for o in optimizers if type(o).__name__ == 'StackMuon' for g in o.param_groups for p in g['params']]
    assert len(stacks) == (6 if optimizer == 'muon' else 0) and all(p.ndim == 3 for p in stacks)
    assert all({p.ndim == 3 for p in g['params']} in ({True}, {False}) for o in optimizers for g in o.param_groups)


def muon_step(p, grads, kind, lr=0.02, decay=0.1, momentum=0.9):
    optimizer = kind(p, momentum, torch.float32)
    for group in optimizer.param_groups:
        group.update(lr=lr, weight_decay=decay)
    for step in grads:
        for x, g in zip(p, step):
            x.grad = g.clone()
        optimizer.step()
    return optimizer


def test_what_changes_muon_changes_that_of_stacks_too():
    model, run = made('experts'), run_of(path('experts'), path('normuon'), path('cautious_decay'))
    movers = [o for o in run.make_optimizers(model) if isinstance(o, train_module().Muon)]
    assert len(movers) == 2 and all({'NorMuon', 'CautiousMuon'} <= {kind.__name__ for kind in type(o).__mro__} for o in movers)


@pytest.mark.parametrize('names', [[], ['normuon'], ['row_muon'], ['cautious_decay']])
def test_muon_leaves_parts_that_met_no_token(names):
    torch.manual_seed(0)
    plain, start_at = run_of(*map(path, names)).muon(), [torch.randn(3, 16, 48), torch.randn(3, 16, 48)]
    grads = [[torch.randn(3, 16, 48), torch.randn(3, 16, 48)] for _ in range(3)]
    for step in grads:
        step[0][2] = 0
    grads[1][1][0] = 0
    p = [torch.nn.Parameter(x.clone()) for x in start_at]
    optimizer = muon_step(p, grads, for_stacks(plain))
    assert torch.equal(p[0][2], start_at[0][2]) and not any(t[0, 2].any() for t in optimizer.state[p[0]].values() if torch.is_tensor(t))
    for i, part in ((0, 0), (0, 1), (1, 1)):                            # the others as if they stood alone
        alone = torch.nn.Parameter(start_at[i][part].clone())
        muon_step([alone], [[step[i][part]] for step in grads], plain)
        torch.testing.assert_close(p[i].data[part], alone.data, rtol=1e-4, atol=1e-6)
    alone = torch.nn.Parameter(start_at[1][0].clone())                  # and one that met some only twice, as in two steps
    muon_step([alone], [[grads[0][1][0]], [grads[2][1][0]]], plain)
    torch.testing.assert_close(p[1].data[0], alone.data, rtol=1e-4, atol=1e-6)


def test_a_run_with_experts_resumes(main, tmp_path, monkeypatch):
    args = [path('experts'), '--experts=4', '--experts_top=2', '--expert_hidden=32', '--max_steps=6', '--n_layer=1']
    main(*args)
    in_two_parts(main, monkeypatch, 3, *args)
    ours, theirs = (weights(tmp_path / name)['model'] for name in ('run', 'parts'))
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'run') and all(torch.equal(ours[k], theirs[k]) for k in ours)
    steps = sum(run_of(*args).rate(step / 6) for step in range(6)) * 0.01
    assert 0 < ours['blocks.0.mlp.bias'].abs().max() <= steps * 1.001
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['total_params'] - result['active_params'] == 2 * 2 * 64 * 32


# ---- domains: the model

def double(model):
    model.compute_dtype = torch.float64
    return model.double()


@torch.no_grad()
def outputs(model, idx, domain=None):
    extras = {} if domain is None else dict(domain=torch.tensor(domain))
    return model.lm_head(model.trunk(idx, **extras))


def with_domains(names='a,b,c', **options):
    """A model whose domains' parts differ."""
    return double(make('domains', domains=names, **options))


def other_domains(old, names, parts=()):
    """`old` with other domains, and where its parameters came from."""
    return split(old, dataclasses.replace(old.config, domains=names), list(parts), 1)


@pytest.mark.parametrize('options', [dict(), dict(mlp='swiglu', mlp_hidden=42),
                                     dict(domain_share=0.6, tie_embeddings=True)])
def test_a_split_model_computes_the_same_in_every_domain(options):
    old, idx = with_domains('', **options), tokens(2, 40, (0, 13))
    new, came_from = other_domains(old, 'a,b,c')
    before = outputs(old, idx)
    for domain in (0, 1, 2, None):
        assert (outputs(new, idx, domain) - before).abs().max() < 1e-10 and before.std() > 0.1
    copies = {name: came_from[p][1] for name, p in new.named_parameters()}               # none is missing
    assert {name.rpartition('.mlp.')[2] for name, n in copies.items() if n == 3} == {'own_up.weight', 'own_down.weight'}
    ours, theirs, own = new.params(), old.params(), own_hidden(new.config)
    more = 3 * 2 * 32 * own * (3 if 'mlp' in options else 2)
    assert ours['total'] == sum(p.numel() for p in new.parameters()) == theirs['total'] + more
    assert ours['active'] == theirs['active'] and new.flops_per_token() == old.flops_per_token()
    assert f'{own} of {new.config.mlp_hidden} in each of 3 domains' in new.describe()


def test_a_part_is_of_its_domain_alone():
    model, idx = with_domains(), tokens(2, 40, (0, 13))
    model(idx, idx.roll(-1, 1), domain=torch.tensor(1)).backward()
    assert not [name for name, p in model.named_parameters() if not p.grad.any()]
    for name, p in model.named_parameters():
        assert '.own_' not in name or not p.grad[[0, 2]].any()
    before = [outputs(model, idx, domain) for domain in range(3)]
    with torch.no_grad():
        model.blocks[0].mlp.own_up.weight[1] *= 2
    assert [torch.equal(outputs(model, idx, d), was) for d, was in enumerate(before)] == [True, False, True]
    looks_ahead(make('domains', domains='a,b'))


def test_domains_are_kept_dropped_and_branched():
    old, idx = with_domains(), tokens(2, 40)
    new, came_from = other_domains(old, 'c,x,a', [2, 1, 0])
    for ours, theirs in enumerate([2, 1, 0]):
        assert torch.equal(outputs(new, idx, ours), outputs(old, idx, theirs))
    assert len(came_from) == len(list(new.parameters())) and new.config.domains == 'c,x,a'
    assert torch.equal(outputs(other_domains(old, 'b', [1])[0], idx, 0), outputs(old, idx, 1))
    with pytest.raises(ValueError, match='domain_share is 0.001'):
        made('domains', domains='a', domain_share=0.001)


@torch.no_grad()
def test_the_domain_is_inferred_token_by_token():
    """The mixture by Bayes' rule, a token at a time; its sum is that of the whole text; who is told need not infer."""
    model, idx = with_domains(), tokens(2, 30)
    targets = torch.cat([idx[:, 1:], torch.tensor([[5], [7]])], 1)
    probs = torch.stack([outputs(model, idx, d).softmax(-1).gather(2, targets[..., None])[..., 0] for d in range(3)])
    expected, belief = torch.zeros(2, 30), torch.full((3, 2), 1 / 3, dtype=torch.double)
    for t in range(30):
        expected[:, t] = -(belief * probs[:, :, t]).sum(0).log()
        belief = belief * probs[:, :, t] / (belief * probs[:, :, t]).sum(0)
    got = model(idx, targets, reduction='none')
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert belief.max() > 0.6 and got.dtype == torch.float32
    whole = (3 * torch.ones(2)).log() - torch.logsumexp(probs.log().sum(2), 0)
    torch.testing.assert_close(got.double().sum(1), whole, rtol=1e-5, atol=1e-4)
    hidden = targets.clone()
    hidden[:, :20] = -1                                                                  # a context says which it is too
    torch.testing.assert_close(model(idx, hidden, reduction='none'), got * (hidden >= 0))
    model.told = torch.tensor(2)
    torch.testing.assert_close(model(idx, targets, reduction='none').double(), -probs[2].log(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generate_takes_the_domain_that_the_prompt_speaks_for():
    model = with_domains()
    for text in tokens(4, 25, seed=3):
        idx = text[None]
        nats = [model(idx[:, :-1], idx[:, 1:], domain=torch.tensor(d)).item() for d in range(3)]
        best, new = min(range(3), key=nats.__getitem__), list(model.generate(idx, 5, temperature=0))
        whole = torch.cat([idx, torch.stack(new, 1)], 1)
        assert model.likeliest(idx) == best
        assert torch.equal(outputs(model, whole, best)[:, 24:-1].argmax(-1), whole[:, 25:])      # and the cache is told
    model.told = torch.tensor((best + 1) % 3)
    assert not torch.equal(torch.stack(list(model.generate(idx, 5, temperature=0)), 1), whole[:, 25:])


# ---- domains: the text

def settings(*argv):
    return train_module().read_settings([path('domains'), *argv])[0]


def stream_of_domains():
    """Documents of four sources in turn, in domains of one, of two and of one source; every token is another number."""
    dice = np.random.default_rng(0)
    lengths = dice.integers(2, 30, 120)
    docs = np.zeros(120, [('start', np.int64), ('source', np.int64), ('bytes', np.int64)])
    docs['start'], docs['source'] = np.cumsum(lengths) - lengths, np.arange(120) % 4
    meta = dict(sources=[*'wxyz'], splits=dict(train=dict(sources=dict.fromkeys('wxyz', dict(documents=30)))))
    data = SimpleNamespace(tokens=dict(train=np.arange(lengths.sum())), docs=dict(train=docs), meta=meta, folder='toy')
    stream = Stream(data, settings('--domains=w,x+y,z', '--weights=y:0.5', '--seed=3'))
    return stream, np.repeat(docs['source'], lengths)


def test_a_micro_batch_is_of_one_domain_and_each_has_its_share():
    stream, source_of = stream_of_domains()
    sizes = np.array([part.epoch_tokens() for part in stream.streams.values()])
    turns, read = [], {0: [], 1: [], 2: []}
    for number in range(5000):                                          # more than a cycle of turns
        turns.append(stream.turn(number)[0])
        if number < 90:
            batch = stream.batch(number * 2, 2, 6)
            assert batch['domain'].item() == turns[-1] and batch['domain'].ndim == 0
            assert set(source_of[batch['idx'].flatten()]) <= {0: {0}, 1: {1, 2}, 2: {3}}[turns[-1]]
            read[turns[-1]].append(batch['idx'])
    for domain, batches in read.items():                                # its stream, nothing lost in between
        expected = stream.streams[domain].rows(0, 2 * len(batches), 6)[:, :-1]
        assert np.array_equal(np.concatenate(batches), expected)
    share = np.bincount(turns) / 5000
    assert share == pytest.approx(sizes / sizes.sum(), abs=2e-3) and stream.epoch_tokens() == sizes.sum()
    assert all({0, 1, 2} == set(turns[i:i + 6]) for i in range(0, 4996, 6))              # each in every step of six
    again = stream_of_domains()[0]
    for n in (4095, 4096, 4999):
        before = turns[:n].count(turns[n])
        assert np.array_equal(stream.rows(n * 2, 2, 6), stream.streams[turns[n]].rows(before * 2, 2, 6))
    assert all(np.array_equal(again.rows(n * 2, 2, 6), stream.rows(n * 2, 2, 6)) for n in (4999, 4095, 4096, 7))


def test_domains_keep_one_order_of_documents_if_told_to(corpus):
    for more, same in (([], False), ([path('same_order')], True)):
        for order in [path('domains'), *more], [*more, path('domains')]:
            s, ideas = train_module().read_settings([*corpus.args, *order])
            streams = ideas.seam(train_module().Stream)(corpus.open(), s).streams
            assert all(np.array_equal(part.epoch(0)[0], part.epoch(1)[0]) == same for part in streams.values())


# ---- domains: runs

def step_of(run, domain):
    idx = torch.randint(1, 97, (4, 17))
    loss = run.model(idx[:, :-1], idx[:, 1:], domain=domain if domain is None else torch.tensor(domain))
    loss.backward()
    return run.descend(loss.detach())[0]


def test_averages_follow_a_split():
    """One domain is the dense model in two parts: AdamW, which goes number by number, learns on as it did."""
    dense = run_of(path('domains'), '--optimizer=adamw', '--grad_clip=0', '--weight_decay=0.5')
    torch.manual_seed(0)
    dense.take_model(double(made('domains', domains='', mlp='swiglu', mlp_hidden=40)))
    for _ in range(5):
        step_of(dense, None)
    parted = copy.copy(dense)
    parted.change_model(*other_domains(dense.model, 'all'))
    torch.manual_seed(6)
    expected = [step_of(dense, None) for _ in range(6)]
    torch.manual_seed(6)
    assert [step_of(parted, 0) for _ in range(6)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_what_is_frozen_stays_to_the_bit(optimizer):
    run = run_of(path('domains'), f'--optimizer={optimizer}', '--init_from=run', '--domains=a,b', '--frozen=a')
    torch.manual_seed(0)
    run.take_model(made('domains', domains='a,b', mlp='swiglu'))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for _ in range(3):
        step_of(run, 1)
    for name, p in run.model.named_parameters():
        own = '.own_' in name
        assert torch.equal(p[0] if own else p, before[name][0] if own else before[name])
        assert not (own and torch.equal(p[1], before[name][1]))


def test_a_new_domain_branches_from_the_part_that_knows_its_text_best():
    torch.manual_seed(0)
    model = make('domains', domains='a,b,c', std=0.2)
    ids, ends = tokens(30, 20), np.arange(1, 31) * 20
    docs = np.zeros(30, [('start', np.int64), ('source', np.int64)])
    docs['start'], docs['source'] = ends - 20, np.arange(30) % 2
    data = SimpleNamespace(tokens=dict(train=ids.flatten().numpy()), docs=dict(train=docs), meta=dict(sources=['x', 'y']))
    texts = [(i, ids[i].numpy()) for i in range(1, 30, 2)]
    nats = sum(nats_by_domain(model, texts).values())
    config = dataclasses.replace(model.config, domains='c,y,a')
    assert nearest_parts(model, config, data) == [2, int(np.argmin(nats)), 0]
    told = sample.document_nats(Told(model, torch.tensor(1)), texts)
    assert sum(told.values()) == pytest.approx(nats[1]) and nats.std() > 1


FEW = [path('domains'), '--n_layer=1', '--n_embd=32', '--tokens_per_step=512', '--micro_batch_size=4', '--eval_interval=0']


def test_a_run_splits_into_domains_and_resumes_over_the_split(main, tmp_path, monkeypatch, capfd, corpus):
    args = [*FEW, '--domains_from=0.5', '--max_steps=6']
    out = main(*args)
    assert 'domains: notes 37.' in out and 'grown to 1 layers' in out and '32 of 128 in each of 2 domains' in out
    in_two_parts(main, monkeypatch, 2, *args)
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'run') and len(losses(tmp_path / 'run')) == 6
    ours, theirs = (weights(tmp_path / name)['model'] for name in ('run', 'parts'))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    part = ours['blocks.0.mlp.own_up.weight']
    assert part.shape == (2, 32, 32) and not torch.allclose(part[0], part[1])
    model, tokenizer = sample.load(tmp_path / 'run')
    data, result = corpus.open(), json.loads((tmp_path / 'run' / 'result.json').read_text())
    nats = np.zeros(2)
    for domain, name in enumerate(data.meta['sources']):                # told, and mixed, document by document
        docs, ends = data.docs['val'], np.append(data.docs['val']['start'][1:], len(data.tokens['val']))
        mine = [(doc, data.tokens['val'][docs['start'][doc]:ends[doc]]) for doc in np.flatnonzero(docs['source'] == domain)]
        each = nats_by_domain(model, mine).values()
        nats += [sum(math.log(2) - np.logaddexp(*-both) for both in each), sum(both[domain] for both in each)]
    bpb = nats / math.log(2) / data.docs['val']['bytes'].sum()
    assert [result['val_bpb'], result['val_bpb_told']] == pytest.approx(bpb.tolist(), rel=1e-6) and bpb[0] != bpb[1]
    sample.main([str(tmp_path / 'run'), 'Mia', '--domain=tales', '--max_new_tokens=4', '--device=cpu'])
    assert capfd.readouterr().out.startswith('Mia')
    with pytest.raises(UserError, match="--domain is 'stories', .* has notes, tales"):
        sample.main([str(tmp_path / 'run'), '--domain=stories', '--device=cpu'])


def test_a_domain_is_added_to_a_frozen_model_and_taken_away(main, tmp_path, monkeypatch):
    main(*FEW, '--domains=tales', '--domains_from=0')
    added = [*FEW, '--init_from=run', '--domains=notes,tales', '--frozen=tales', '--max_steps=4']
    out = main(*added, '--out_dir=added')
    assert 'domains: notes 100.0% of what is read' in out
    old, new = (weights(tmp_path / name)['model'] for name in ('run', 'added'))
    for name in new:
        if '.own_' in name:
            assert torch.equal(new[name][1], old[name][0]) and not torch.equal(new[name][0], old[name][0])
        else:
            assert torch.equal(new[name], old[name])
    in_two_parts(main, monkeypatch, 3, *added)
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'added')
    main(*FEW, '--init_from=added', '--domains=tales', '--learning_rate=0', '--max_steps=1', '--out_dir=left')
    left, result = weights(tmp_path / 'left'), json.loads((tmp_path / 'left' / 'result.json').read_text())
    assert torch.equal(left['model']['blocks.0.mlp.own_down.weight'], old['blocks.0.mlp.own_down.weight'])
    assert result['config']['domains'] == 'tales' and result['settings']['domains_from'] == 0
    for wrong, said in ((['--domains='], 'has the domains notes,tales: name those'),
                        (['--domains=notes,tales', '--frozen=other,notes'], "frozen names 'other'"),
                        (['--domains=notes', '--frozen=notes'], 'leaves no domain to learn'),
                        (['--domains=notes', '--n_embd=64'], 'n_embd cannot grow')):
        with pytest.raises(UserError, match=said):
            main(*FEW, '--init_from=added', '--out_dir=third', *wrong)
        assert not (tmp_path / 'third').exists()


@pytest.mark.parametrize('wrong, said', [
    (['--domains=stories'], "domains names 'stories', the sources of .* are notes, tales"),
    (['--domains=notes,tales+'], "domains names ''"), (['--domains=notes,tales+notes'], 'twice'),
    (['--frozen=notes'], 'needs an --init_from'), (['--weights=notes:0'], "nothing of domain 'notes'"),
    (['--domain=notes'], 'for sample.py'), (['--domain_share=0.001'], 'domain_share'),
    ([path('climb_data')], 'do not go together'), ([path('tokenformer')], 'do not go together'),
    ([path('experts')], 'do not go together'), (['--growth=[(0.7, dict(n_embd=128))]'], 'grows until 0.7'),
    (['--domains_from=0', '--growth=[(0.7, dict(n_embd=128))]'], 'n_embd cannot grow')])
def test_domains_that_cannot_be(main, tmp_path, wrong, said):
    with pytest.raises(UserError, match=said):
        main(path('domains'), *wrong)
    assert not (tmp_path / 'run').exists()


def test_experts_that_cannot_grow(main, tmp_path):
    for order in [path('experts'), path('growth')], [path('growth'), path('experts')]:
        with pytest.raises(UserError, match='n_embd cannot grow in a model that has several'):
            main(*order, '--growth=[(0.5, dict(n_embd=128))]')
    assert not (tmp_path / 'run').exists()

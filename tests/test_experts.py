"""config/experts.py and config/domains.py: several MLPs, of which a token passes some, routed or by its text's domain."""
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as models
from config.experts import MLP as Experts
from config.stacked_weights import StackMuon
from conftest import in_two_parts
from prepare_data import UserError
from test_tokenformer import config_of, logits, losses, made, make, path, run_of, tokens, train_module, weights


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
                                     dict(experts=4, experts_top=4, expert_hidden=9, mlp='swiglu'),
                                     dict(experts=30, experts_top=1, mlp_hidden=24)])
def test_experts_are_the_sum_over_those_chosen(options):
    model = make('experts', **options)
    layer, x = model.blocks[1].mlp.double(), torch.randn(2, 11, 32, dtype=torch.double, requires_grad=True)
    expected = models.MLP.forward(layer, x, None) + routed_slowly(layer, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(layer(x, None), expected, rtol=1e-6, atol=1e-7)            # affinities are fp32
    some = [p for p in layer.parameters() if p is not layer.bias] + [x]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), some) for y in (layer(x, None), expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    sizes, few = model.params(), options['experts'] - options['experts_top']
    idle = 3 * few * (layer.ups.weight[0].numel() + layer.downs.weight[0].numel())
    assert sizes['total'] == sum(p.numel() for p in model.parameters()) == sizes['active'] + idle
    model = make('experts', **options)
    with FlopCounterMode(display=False) as counter:
        model.logits(model.trunk(tokens(2, 64)))
    assert 3 * counter.get_total_flops() == 2 * 64 * model.flops_per_token(attended=64)


def test_all_that_a_token_passes_is_as_wide_as_one_mlp():
    config = config_of('experts', n_embd=64)
    assert config.mlp_hidden == 64 and config.GPT(config).blocks[0].mlp.ups.weight.shape == (8, 64, 64)
    assert '3 of 8 experts of 64' in config.GPT(config).describe()
    with pytest.raises(ValueError, match='experts_top is 3, and there are 2 experts'):
        made('experts', experts=2)


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
        model = made('experts', n_embd=32, experts=8, experts_top=2).double()
        layer, x = model.blocks[0].mlp, torch.randn(2, 100, 32, dtype=torch.float64)
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
    stacks = [p for o in optimizers if isinstance(o, StackMuon) for g in o.param_groups for p in g['params']]
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


def test_muon_leaves_parts_that_met_no_token():
    torch.manual_seed(0)
    plain, start_at = train_module().Muon, [torch.randn(3, 16, 48), torch.randn(3, 16, 48)]
    grads = [[torch.randn(3, 16, 48), torch.randn(3, 16, 48)] for _ in range(3)]
    for step in grads:
        step[0][2] = 0
    grads[1][1][0] = 0
    p = [torch.nn.Parameter(x.clone()) for x in start_at]
    optimizer = muon_step(p, grads, StackMuon)
    assert torch.equal(p[0][2], start_at[0][2]) and not optimizer.state[p[0]]['momentum'][0, 2].any()
    for i, part in ((0, 0), (0, 1), (1, 1)):                            # the others as if they stood alone
        alone = torch.nn.Parameter(start_at[i][part].clone())
        muon_step([alone], [[step[i][part]] for step in grads], plain)
        torch.testing.assert_close(p[i].data[part], alone.data, rtol=1e-4, atol=1e-6)
    alone = torch.nn.Parameter(start_at[1][0].clone())                  # and one that met some only twice, as in two steps
    muon_step([alone], [[grads[0][1][0]], [grads[2][1][0]]], plain)
    torch.testing.assert_close(p[1].data[0], alone.data, rtol=1e-4, atol=1e-6)


def test_a_run_with_experts_resumes(main, tmp_path, monkeypatch):
    settings = [path('experts'), '--experts=4', '--experts_top=2', '--expert_hidden=32', '--max_steps=6']
    main(*settings)
    in_two_parts(main, monkeypatch, 3, *settings)
    ours, theirs = (weights(tmp_path / name)['model'] for name in ('run', 'parts'))
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'run') and all(torch.equal(ours[k], theirs[k]) for k in ours)
    steps = sum(run_of(*settings).rate(step / 6) for step in range(6)) * 0.01
    assert 0 < ours['blocks.1.mlp.bias'].abs().max() <= steps * 1.001
    result = train_module().json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['total_params'] - result['active_params'] == 2 * 2 * 2 * 64 * 32

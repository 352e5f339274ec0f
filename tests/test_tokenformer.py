"""config/tokenformer.py, tokens in place of matrices, and config/tokenformer_grow.py, more of them on the way."""
import dataclasses
import json
import math
import zlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as models
import prepare_data
from config.grown_weights import spread
from config.tokenformer import Pattention
from conftest import ROOT, train_module

SMALL = dict(vocab_size=97, bos=0, block_size=64, n_layer=3, n_head=4, n_embd=32)
SHAPES = [dict(attn_tokens=24, mlp_tokens=80, n_kv_head=2),
          dict(attn_tokens=24, mlp_tokens=0, token_norm='norm_gelu'),
          dict(attn_tokens=0, mlp_tokens=80, mlp_scale_tokens=60, head_dim=6)]


def path(idea):
    return str(ROOT / 'config' / f'{idea}.py')


def config_of(*names, **options):
    """The config of a model of ideas, small; settings as they declare and set them, but for those given."""
    train = train_module()
    ideas = prepare_data.Ideas([path(name) for name in names], train.TABLES)
    values = {k: v for k, v in ideas.values.items() if k in ideas.declared} | SMALL | options
    return models.configured(ideas)(**values)


def made(*names, **options):
    config = config_of(*names, **options)
    return config.GPT(config)


def make(*names, std=0.15, **options):
    """A model of which no part is zero, so that all show in the output; a weight depends on its name alone."""
    model = made(*names, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            dice = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            p.normal_(std=std, generator=dice) if p.ndim > 1 else p.uniform_(0.5, 1.0, generator=dice)
    return model.eval()


def tokens(B, T, bos_at=(0,), seed=1):
    idx = torch.randint(1, SMALL['vocab_size'], (B, T), generator=torch.Generator().manual_seed(seed))
    idx[:, list(bos_at)] = 0
    return idx


@torch.no_grad()
def logits(model, idx):
    return model.logits(model.trunk(idx))


def run_of(*argv):
    """A Run of these settings that nothing was opened for."""
    train = train_module()
    s, ideas = train.read_settings(['--device=cpu', *argv])
    run = ideas.seam(train.Run)(s, ideas)
    run.dtype, run.progress = torch.float32, 0.3
    return run


def losses(folder):
    lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    return [row['train_loss'] for row in lines if 'train_loss' in row]


def weights(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)


@pytest.mark.parametrize('options', SHAPES)
def test_it_is_causal_cached_counted_and_learns_everywhere(options):
    model, idx = make('tokenformer', **options), tokens(2, 40, (0, 13))
    before = logits(model, idx)
    for at in (39, 20, 13):
        other = idx.clone()
        other[:, at] = (other[:, at] + 5) % 90 + 1
        after = logits(model, other)
        assert torch.equal(before[:, :at], after[:, :at]) and not torch.allclose(before[:, at], after[:, at])
    cache = models.KVCache(model, 2)
    with torch.no_grad():
        pieces = [model.logits(model.trunk(piece, cache)) for piece in idx.split([17, 1, 1, 21], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), before, rtol=1e-4, atol=1e-4)
    with FlopCounterMode(display=False) as counter:
        logits(model, tokens(2, 64))
    assert 3 * counter.get_total_flops() == 2 * 64 * model.flops_per_token(attended=64)
    assert model.params()['active'] == sum(p.numel() for p in model.parameters())
    model(idx, idx).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_as_many_weights_as_the_plain_model():
    model = made('tokenformer', n_embd=64, attn_tokens=48, mlp_tokens=192)
    assert model.params() == made(n_embd=64).params()
    assert 'tokens in place of matrices: 48 for each of attention, 192' in model.describe()


@torch.no_grad()
@pytest.mark.parametrize('norm', ['norm_gelu', 'gelu_norm'])
def test_attention_made_of_tokens_begins_by_copying_too(norm):
    torch.manual_seed(0)
    shape = dict(vocab_size=20, n_layer=1, n_embd=128)
    attn = made('tokenformer', attn_tokens=96, token_norm=norm, **shape).blocks[0].attn
    x = torch.randn(500, 128)
    back = attn.proj(attn.v(x))
    assert torch.equal(attn.q(x), attn.k(x))
    assert F.cosine_similarity(back, x).mean() > 0.25 and 0.25 < back.square().mean().sqrt() < 0.5


def test_copying_from_the_context_is_learned_in_thirty_steps():
    """The second half of a row is the first, turned by a different number of places each step, so that only a
    search by content helps."""
    torch.manual_seed(0)
    shape = dict(vocab_size=64, block_size=48, n_layer=2, n_head=2, n_embd=64)
    model = made('tokenformer', attn_tokens=48, mlp_tokens=192, **shape)
    run, losses = run_of(path('tokenformer')), []
    run.model, run.optimizers = model, run.make_optimizers(model)
    for _ in range(30):
        half = torch.randint(1, 64, (32, 24))
        row = torch.cat([half, half.roll(int(torch.randint(24, ())), 1)], 1)
        targets = F.pad(row[:, 1:], (0, 1), value=-1)
        targets[:, :24] = -1
        loss = model(row, targets)
        loss.backward()
        losses.append(run.descend(loss.detach())[0])
    assert losses[0] > 3.9 and sum(losses[-5:]) / 5 < 1.5


def pattention(n, scale_tokens=0, norm='norm_gelu', fan_in=24, fan_out=20):
    layer = Pattention(fan_in, fan_out, n, scale_tokens, norm).double()
    with torch.no_grad():
        layer.init_weights(1.0)
    return layer


@pytest.mark.parametrize('scale_tokens', [0, 50])
@pytest.mark.parametrize('norm', ['norm_gelu', 'gelu_norm'])
def test_pattention_is_the_formula_of_the_paper(norm, scale_tokens):
    torch.manual_seed(0)
    layer, x = pattention(70, scale_tokens, norm), torch.randn(3, 5, 24, dtype=torch.double)

    def gelu(z):
        return [a * (1 + math.erf(a / 2 ** 0.5)) / 2 for a in z]

    def scaled(z):                                       # tau z / |z|, tau the root of the number of tokens
        return [a * ((scale_tokens or 70) / sum(b * b for b in z)) ** 0.5 for a in z]
    for token, y in zip(x.flatten(0, 1), layer(x).flatten(0, 1)):
        s = [(token @ key).item() for key in layer.keys.weight]
        weights = gelu(scaled(s)) if norm == 'norm_gelu' else scaled(gelu(s))
        expected = sum(g * value for g, value in zip(weights, layer.values.weight.t()))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)     # eps is in one, not the other


@pytest.mark.parametrize('norm', ['norm_gelu', 'gelu_norm'])
def test_pattention_begins_with_outputs_as_large_as_its_inputs(norm):
    torch.manual_seed(0)
    x = torch.randn(200, 256, dtype=torch.double)
    for n in (128, 1024):
        y = pattention(n, norm=norm, fan_in=256, fan_out=256)(x)
        assert y.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)


def appended(old, more, scale_tokens, norm):
    wide = pattention(256 + more, scale_tokens, norm)
    assert wide.grow_from(old, torch.Generator().manual_seed(1)).keys() == {wide.keys.weight, wide.values.weight}
    return wide


@torch.no_grad()
@pytest.mark.parametrize('norm', ['norm_gelu', 'gelu_norm'])
def test_appended_tokens_change_nothing_while_the_scale_stays(norm):
    torch.manual_seed(0)
    old, x = pattention(256, norm=norm), torch.randn(100, 24, dtype=torch.double)
    before, random = old(x), []
    for more in (64, 256, 768):
        wide = appended(old, more, 256, norm)
        spread = wide.values.weight[:, 256:].std().item()
        assert spread == pytest.approx(old.values.weight.std().item(), rel=0.1)
        assert (wide(x) - before).norm() / before.norm() < 1e-10 and not wide.keys.weight[256:].any()
        random.append(((appended(old, more, 0, norm)(x) - before).norm() / before.norm()).item())
    assert 0.05 < random[0] < random[1] < random[2]
    if norm == 'norm_gelu':                              # the size that the arithmetic gives: sqrt(added / old)
        assert random == pytest.approx([0.5, 1.0, 1.73], abs=0.15)


def test_appended_tokens_learn_at_once_by_their_keys():
    torch.manual_seed(0)
    for scale_tokens, values in ((256, False), (0, True)):           # of keys of 0 values learn from the second step on
        wide = appended(pattention(256), 48, scale_tokens, 'norm_gelu')
        wide(torch.randn(10, 24, dtype=torch.double)).square().sum().backward()
        assert wide.keys.weight.grad[256:].any(1).all() and wide.values.weight.grad[:, 256:].any() == values


@torch.no_grad()
@pytest.mark.parametrize('norm', ['norm_gelu', 'gelu_norm'])
def test_a_model_grown_by_tokens_computes_the_same(norm):
    """Exactly with zero keys and the old scale; with random keys, as the authors' code does it, it does not."""
    old, idx = make('tokenformer_grow', attn_tokens=24, mlp_tokens=80, token_norm=norm).double(), tokens(2, 40, (0, 13))
    old.compute_dtype, changes = torch.float64, dict(attn_tokens=40, mlp_tokens=100, n_layer=4)
    before = old.lm_head(old.trunk(idx))

    def grown(*argv):
        run = run_of(path('tokenformer_grow'), *argv)
        return run.grow(old, run.grown_config(old.config, changes), 1)
    new, came_from = grown()
    assert (new.lm_head(new.trunk(idx)) - before).abs().max() < 1e-10 and new.config.attn_scale_tokens == 24
    other, _ = grown('--growth_tokens=random')
    assert (other.lm_head(other.trunk(idx)) - before).abs().max() > 1e-3 and other.config.attn_scale_tokens == 40
    p = next(b.mlp for b in new.blocks if b.mlp.tokens.keys.weight in came_from).tokens.keys.weight
    q, copies, how = came_from[p]
    state = spread(q, p.shape, how)
    assert copies == 1 and torch.equal(state[:80], q) and not state[80:].any()


def test_growth_by_tokens_that_cannot_be():
    config, run = config_of('tokenformer_grow', attn_tokens=24, mlp_tokens=80), run_of(path('tokenformer_grow'))
    for wrong in (dict(attn_tokens=12), dict(attn_tokens=48, n_embd=64), dict(attn_tokens=48, n_head=8)):
        with pytest.raises(ValueError, match='attn_tokens grows by more|cannot grow at once'):
            run.grown_config(config, wrong)
    with pytest.raises(ValueError, match='attn_tokens grows by more'):
        run.grown_config(dataclasses.replace(config, attn_tokens=0), dict(attn_tokens=8))
    with pytest.raises(ValueError, match='mlp_tokens is 96.0, it must be a whole number'):
        run.grown_config(config, dict(mlp_tokens=96.0))


def test_a_run_takes_the_shape_of_another(main, tmp_path):
    sizes = ['--attn_tokens=24', '--mlp_tokens=72']
    main(path('tokenformer'), *sizes)
    main(path('tokenformer'), '--init_from=run', '--max_steps=1', '--learning_rate=0', '--out_dir=again')
    config = weights(tmp_path / 'again')['config']
    assert (config['attn_tokens'], config['mlp_tokens'], config['token_norm']) == (24, 72, 'gelu_norm')
    with pytest.raises(prepare_data.UserError, match='mlp_tokens 72 there, 80 here'):
        main(path('tokenformer'), '--init_from=run', '--mlp_tokens=80', '--out_dir=third')
    with pytest.raises(prepare_data.UserError, match='tokenformer.py and .*experts.py do not go together'):
        main(path('tokenformer'), path('experts'), '--out_dir=third')

"""Ideas of a part each: attention, regularisers, averaged weights, decay, order, trackers."""
import contextlib
import dataclasses
import importlib.machinery
import json
import math
import signal
import sys
import threading
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as m
import prepare_data
import sample
import train
from conftest import ROOT, script
from prepare_data import Ideas, UserError

SMALL = dict(vocab_size=97, bos=0, block_size=64, n_layer=3, n_head=4, n_embd=32)
LATENT = [('latent_attention', options) for options in (
    dict(kv_latent=12, rotary_dim=4), dict(kv_latent=13, q_latent=20, rotary_dim=2, doc_mask=False),
    dict(kv_latent=12, rotary_dim=6, qk_norm=False), dict(kv_latent=10, rotary_dim=4, token_shift=False))]
TABLES = [('value_embeds', options) for options in (
    dict(value_embeds=2, n_kv_head=2), dict(value_embeds=3, tie_embeddings=True, mlp='swiglu', mlp_hidden=40),
    dict(value_embeds=1, token_shift=False))]
SHAPES = LATENT + TABLES


def paths(names):
    return [str(ROOT / 'config' / f'{name}.py') for name in names.split()]


def configured(names, **options):
    ideas = Ideas(paths(names), train.TABLES)
    kind = m.configured(ideas)
    own = {field.name for field in dataclasses.fields(kind)} - {'vocab_size', 'bos'}
    set_by = {k: ideas.values[k] for k in ideas.set_at if k in own}
    return kind(**SMALL | set_by | options)


def make(names='', seed=0, std=0.15, **options):
    """A model of which no part is zero, so that every part shows in the output; a weight depends on its name alone."""
    model = (config := configured(names, **options)).GPT(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            p.normal_(std=std, generator=generator) if p.ndim > 1 else p.uniform_(0.5, 1.0, generator=generator)
    return model.eval()


def tokens(B, T, bos_at=(0,), seed=1):
    idx = torch.randint(1, SMALL['vocab_size'], (B, T), generator=torch.Generator().manual_seed(seed))
    idx[:, list(bos_at)] = 0
    return idx


@torch.no_grad()
def logits(model, idx):
    return model.logits(model.trunk(idx))


def rows(out_dir):
    path = Path(out_dir) / 'metrics.jsonl'
    return [json.loads(line) for line in path.read_text().split('\n')[:-1]] if path.exists() else []


def losses(out_dir):
    steps = [row for row in rows(out_dir) if 'train_loss' in row]
    assert [row['step'] for row in steps] == list(range(1, len(steps) + 1))
    return [row['train_loss'] for row in steps]


def weights(out_dir, name='ckpt.pt'):
    return torch.load(Path(out_dir) / name, weights_only=True)


@pytest.fixture
def handlers():
    """Signals are handled as before when a run in this process has ended."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def main(corpus, tmp_path, monkeypatch, capfd, handlers):
    """train.main in this process on the small corpus, with ideas by name; gives what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(names, *args):
        train.main([*paths(names), *corpus.args, '--budget_minutes=10000', '--out_dir=run', '--max_steps=3', '--save_minutes=0', *args])
        return capfd.readouterr().out
    return run


def run_of(*argv, **data):
    """A Run that is not opened, of configs and settings."""
    s, ideas = train.read_settings([*argv])
    return ideas.seam(train.Run)(s, ideas)


# ---- latent attention, value embeddings: what every attention must do

@pytest.mark.parametrize('names, options', SHAPES)
def test_a_future_token_cannot_change_a_past_output(names, options):
    model, idx = make(names, **options), tokens(2, 40, (0, 13))
    before = logits(model, idx)
    for at in (39, 20, 13):
        other = idx.clone()
        other[:, at] = (other[:, at] + 5) % 90 + 1
        after = logits(model, other)
        assert torch.equal(before[:, :at], after[:, :at])
        assert not torch.allclose(before[:, at], after[:, at])


@pytest.mark.parametrize('names, options', [LATENT[0], TABLES[0]])
def test_another_document_cannot_change_an_output(names, options):
    model, idx = make(names, **options), tokens(1, 40, (0, 10, 25))
    before, other = logits(model, idx), idx.clone()
    other[:, 11:20] = other[:, 11:20] % 90 + 2
    after = logits(model, other)
    torch.testing.assert_close(before[:, 25:], after[:, 25:], rtol=0, atol=1e-6)
    assert torch.equal(before[:, :11], after[:, :11]) and (before[:, 20:25] != after[:, 20:25]).any()
    torch.testing.assert_close(before[:, 10:25], logits(model, idx[:, 10:25]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('names, options', [*SHAPES, ('latent_attention window', dict(kv_latent=13, rotary_dim=2, window=20, doc_mask=False)),
                                            ('value_embeds window', dict(value_embeds=1, window=9))])
@pytest.mark.parametrize('sizes', [[1] * 30, [17, 1, 1, 8, 3]])
def test_the_cache_gives_what_the_full_forward_gives(names, options, sizes):
    model, idx = make(names, **options), tokens(3, 30, (0,))
    idx[0, 9], idx[1, 17], idx[1, 18], idx[2, 29] = 0, 0, 0, 0        # rows with documents of their own
    cache = m.KVCache(model, 3)
    with torch.no_grad():
        pieces = [model.logits(model.trunk(piece, cache)) for piece in idx.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, idx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('names, options', SHAPES)
def test_parameters_and_flops_are_those_of_the_model(names, options):
    torch.manual_seed(0)
    model = (config := configured(names, **options)).GPT(config)
    tables = {p.weight for p in model.modules() if isinstance(p, torch.nn.Embedding)} | {model.lm_head.weight}
    assert len(tables) == 1 + (not config.tie_embeddings) + getattr(config, 'value_embeds', 0)
    embedding, total = (sum(p.numel() for p in some) for some in (tables, model.parameters()))
    assert model.params() == dict(total=total, embedding=embedding, non_embedding=total - embedding, active=total)
    with FlopCounterMode(display=False) as counter:
        logits(model, tokens(2, 64))                      # one block of queries: every token meets all 64 positions
    assert 3 * counter.get_total_flops() == 2 * 64 * model.flops_per_token(attended=64)
    idx = tokens(4, 64)
    assert model(idx, idx.roll(-1, 1)).item() == pytest.approx(math.log(97), abs=0.15)


@pytest.mark.parametrize('names, options', [('value_embeds', dict(value_embeds=1, n_kv_head=2, mlp='swiglu')),
                                            ('latent_attention', dict(kv_latent=12, q_latent=20, rotary_dim=4))])
@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_every_parameter_gets_a_gradient_and_has_one_optimizer(names, options, optimizer):
    model, idx = make(names, **options), tokens(2, 20)
    model(idx, idx).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    run = run_of(*paths(names), f'--optimizer={optimizer}', '--device=cpu')
    run.dtype = torch.float32
    held = [p for o in run.make_optimizers(model) for group in o.param_groups for p in group['params']]
    assert {*held} == {*model.parameters()} and len(held) == len({*held})
    tables = run.groups(model)['tables']['params']
    assert len(tables) == 1 + getattr(model.config, 'value_embeds', 0)


@pytest.mark.parametrize('names, wrong, said', [
    ('latent_attention', dict(kv_latent=8, rotary_dim=8), 'kv_latent 8 needs rotary_dim below head_dim 8'),
    ('latent_attention', dict(kv_latent=8, rotary_dim=4, n_kv_head=2), 'no n_kv_head'),
    ('value_embeds', dict(value_embeds=4), 'value_embeds is 4, it counts layers and n_layer is 3')])
def test_a_shape_that_cannot_be_is_a_ValueError(names, wrong, said):
    with pytest.raises(ValueError, match=said):
        config = configured(names, **wrong)
        config.GPT(config)


@pytest.mark.parametrize('name, part', [('interleaved_heads', 'mixes'), ('value_embeds', 'value_')])
def test_what_tokens_in_the_place_of_matrices_would_leave_unread_is_named(main, name, part):
    with pytest.raises(UserError, match=f'{part}.* have no gradient, nothing in the loss reads them: leave out the idea that adds them, or name it after'):
        main(f'{name} tokenformer')


@pytest.mark.parametrize('names, wrong, said', [
    ('latent_attention', ['--kv_latent=0'], 'kv_latent is 0, it must be at least 1'), ('latent_attention', ['--q_latent=-1'], 'q_latent is -1'),
    ('value_embeds', ['--value_embeds=-1'], 'at least 0'), ('value_embeds latent_attention', [], 'do not go together'),
    *((f'latent_attention {name}', [], f'config/latent_attention.py and config/{name}.py do not go together .the cache keeps latents')
      for name in ('value_embeds', 'value_projections', 'interleaved_heads')),
    ('batch_rampup', ['--max_tokens=9000', '--max_steps=9'], 'batch_rampup.py counts steps or tokens: give max_steps or max_tokens'),
    ('latent_attention', ['--rotary_dim=32'], 'the model cannot be built: kv_latent 192 needs rotary_dim below'),
    ('value_embeds', ['--value_embeds=3'], 'the model cannot be built: value_embeds is 3, it counts layers and n_layer is 2'),
    ('dropout', ['--dropout=0.96'], 'at most 0.95'), ('stochastic_depth', ['--layer_drop=1'], 'at most 0.95'),
    ('ema', ['--ema=0'], 'ema is 0.0, it must be at least 0.0001')])
def test_settings_that_cannot_be(main, tmp_path, names, wrong, said):
    with pytest.raises(UserError, match=said):
        main(names, *wrong)
    assert not (tmp_path / 'run').exists()


def test_latent_attention_begins_by_looking_for_what_is_alike():
    layer = (config := configured('latent_attention', kv_latent=12, rotary_dim=4, token_shift=False, qk_norm=False)).GPT(config).blocks[0].attn
    context = types.SimpleNamespace(idx=tokens(2, 5), cache=None)
    q, k, _ = layer.packed(torch.randn(2, 5, 32), context).split(4, dim=2)                  # (B, T, H, D) each
    for made, wanted in zip(q.split(4, dim=-1), k.split(4, dim=-1)):                        # of r, of the latent
        torch.testing.assert_close(F.normalize(made, dim=-1), F.normalize(wanted, dim=-1))
    copied = layer.v.weight @ layer.down.weight[4:]
    torch.testing.assert_close(layer.proj.weight, 0.3 * copied.t())


def test_latent_attention_caches_its_latent_alone():
    model = make('latent_attention', kv_latent=12, rotary_dim=4)
    assert m.KVCache(model, 1).values() == 16 and m.KVCache(make(), 1).values() == 64


def test_a_value_embedding_is_added_to_the_values_of_its_layers_alone():
    model, idx = make('value_embeds', value_embeds=1, n_kv_head=2), tokens(2, 9)
    assert [block.attn.value_embed is not None for block in model.blocks] == [False, False, True]
    layer, x, context = model.blocks[2].attn, torch.randn(2, 9, 32), types.SimpleNamespace(idx=idx, cache=None)
    with_table, plain = layer.packed(x, context), m.Attention.packed(layer, x, context)
    assert with_table.shape == (2, 9, 8, 8) and torch.equal(with_table[:, :, :6], plain[:, :, :6])
    expected = layer.value_gain * layer.value_embed.weight[idx].view(2, 9, 2, 8)
    torch.testing.assert_close(with_table[:, :, 6:] - plain[:, :, 6:], expected)
    fresh = (config := configured('value_embeds', value_embeds=2)).GPT(config).blocks[1].attn
    assert fresh.value_gain.item() == 0.5 and fresh.value_embed.weight.std().item() == pytest.approx(1, abs=0.05)


# ---- dropout, stochastic depth

def hooks(block):
    return [list(branch._forward_hooks.values()) for branch in (block.attn, block.mlp)]


def test_dropout_leaves_out_the_share_it_says_of_what_a_layer_adds():
    block = make('dropout', dropout=0.2).train().blocks[0]
    (hook,), _ = hooks(block)
    thin = hook(block.attn, (), torch.ones(3, 500, 64))
    assert (thin == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    torch.testing.assert_close(thin[thin != 0], torch.full((int((thin != 0).sum()),), 1 / 0.8))


def test_depth_leaves_out_rows_the_later_the_layer_the_more():
    model, ones = make('stochastic_depth', layer_drop=0.9).train(), torch.ones(5000, 2, 3)
    for i, block in enumerate(model.blocks):
        for branch, (hook,) in zip((block.attn, block.mlp), hooks(block)):
            out, share = hook(branch, (), ones).flatten(1), 0.3 * (i + 1)
            assert (out == out[:, :1]).all() and out.unique().tolist() == pytest.approx([0, 1 / (1 - share)])
            assert (out == 0).float().mean().item() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize('names, options', [('dropout', dict(dropout=0.3)), ('stochastic_depth', dict(layer_drop=0.9)), ('dropout stochastic_depth', {}),
                                            ('stochastic_depth dropout', {}), ('latent_attention dropout', dict(kv_latent=8, rotary_dim=4))])
def test_thinning_is_of_training_alone_and_reaches_every_branch(names, options):
    plain = make(' '.join(n for n in names.split() if 'attention' in n), **{k: v for k, v in options.items() if k in ('kv_latent', 'rotary_dim')})
    model, idx = make(names, **options), tokens(4, 20)
    assert torch.equal(model.trunk(idx), plain.trunk(idx))                   # make() is in eval mode
    model.train()
    assert not torch.equal(model.trunk(idx), model.trunk(idx))
    n = sum(name in names for name in ('dropout', 'stochastic_depth'))
    assert [len(of) for block in model.blocks for of in hooks(block)] == [n] * 6
    assert not any(module._forward_hooks for module in plain.modules())      # not named, it is not there at all


def test_random_numbers_are_of_seed_step_and_rank():
    idx = tokens(8, 16)

    def two(step, rank=0, seed=1):
        run = run_of(*paths('dropout'), f'--seed={seed}', '--dropout=0.5', '--device=cpu')
        run.step_model, run.steps, run.rank = make('dropout', dropout=0.5).train(), step, rank
        run.make_noise()
        return [run.loss(idx, idx).item() for _ in range(2)]
    assert two(3) == two(3) and len({*two(3), *two(4), *two(3, rank=1), *two(3, seed=2)}) == 8


def test_the_closing_report_is_without_dropout(main, monkeypatch):
    modes, stream = [], sample.stream
    monkeypatch.setattr(sample, 'stream', lambda model, *a, **k: modes.append(model.training) or stream(model, *a, **k))
    main('dropout', '--dropout=0.5')
    assert modes == [False]


# ---- averaged weights

class Averaging:
    """config/ema.py's Run, bare: a model of one weight."""

    def __new__(cls, ema):
        kind = Ideas(paths('ema'), train.TABLES).seam(train.Run)
        run = kind.__new__(kind)
        run.s, run.progress, run.model = types.SimpleNamespace(ema=ema), 0.0, torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(run.model.weight)
        run.average_anew()
        return run


def follow(run, progress, weight):
    torch.nn.init.constant_(run.model.weight, weight)
    run.progress = progress
    run.follow()


def test_the_average_is_the_weighted_sum_of_all_weights_at_any_speed():
    run, at, expected = Averaging(0.02), 0.0, 0.0
    for progress in (0.01, 0.03, 0.1, 0.11):                            # the weights are 100 progress
        follow(run, progress, 100 * progress)
        old = math.exp((at - progress) / 0.02)
        expected, at = old * expected + (1 - old) * 100 * progress, progress
    assert run.average['weight'].item() == pytest.approx(expected)
    slow, fast = Averaging(0.02), Averaging(0.02)
    for progress in (0.01, 0.02, 0.03):
        follow(fast, progress, 1.0)
    follow(slow, 0.03, 1.0)
    torch.testing.assert_close(slow.average, fast.average)
    assert slow.average['weight'].item() == pytest.approx(1 - math.exp(-1.5))


@pytest.mark.parametrize('tied', [True, False])
def test_what_is_measured_saved_and_sampled_is_the_average(main, tmp_path, corpus, tied):
    main('ema', '--ema=0.3', '--max_steps=12', f'--tie_embeddings={tied}', '--final_lr_frac=1.0')
    state, result, data = weights(tmp_path / 'run'), json.loads((tmp_path / 'run' / 'result.json').read_text()), corpus.open()
    model, tokenizer = sample.load(tmp_path / 'run')
    assert state['averaged_to'] == 1 and torch.equal(model.wte.weight, state['evaluated']['wte.weight'])

    def bpb():
        return sample.bits_per_byte(model, data.tokens['val'], data.docs['val'])['bpb']
    assert bpb() == pytest.approx(result['val_bpb'], rel=1e-6)
    model.load_state_dict(state['model'])
    assert bpb() != pytest.approx(result['val_bpb'], rel=1e-3)


def test_a_run_begun_from_an_averaged_one_takes_the_average(main, tmp_path):
    main('ema', '--ema=0.3', '--max_steps=6', '--final_lr_frac=1.0')
    main('ema', '--init_from=run', '--out_dir=next', '--max_steps=1', '--learning_rate=0', '--embedding_lr=0', '--head_lr=0', '--scalar_lr=0', '--weight_decay=0')
    before, after = weights(tmp_path / 'run'), weights(tmp_path / 'next')
    for name, w in before['evaluated'].items():
        torch.testing.assert_close(after['model'][name], w, msg=name)
        torch.testing.assert_close(after['evaluated'][name], w, msg=name)


@pytest.mark.parametrize('names, settings', [
    pytest.param('dropout latent_attention stochastic_depth weight_decay same_order', ['--kv_latent=12', '--rotary_dim=8'],
                 marks=pytest.mark.long),
    ('cyclic_average', ['--cycles=3', '--cycles_from=0.2']),
    ('best_weights growth', ['--eval_interval=0.2', '--growth=[(0.3, dict(n_embd=128))]']),
    ('ema value_embeds growth', ['--ema=0.1', '--value_embeds=1', '--growth=[(0.3, dict(n_embd=128))]']),
    pytest.param('growth ema', ['--ema=0.1', '--growth=[(0.8, dict(n_layer=3))]'], marks=pytest.mark.long)])
def test_a_run_resumes_to_the_bit_with(main, tmp_path, monkeypatch, names, settings):
    settings = [*settings, '--max_steps=8', '--micro_batch_size=8']
    main(names, *settings)
    gradients, left = train.Run.gradients, iter(range(4))
    monkeypatch.setattr(train.Run, 'gradients', lambda self, n: (self.signals.append(15) if next(left, None) is None else None) or gradients(self, n))
    with pytest.raises(train.Stopped, match='after step 4'):
        main(names, *settings, '--out_dir=parts')
    monkeypatch.setattr(train.Run, 'gradients', gradients)
    main(names, *settings, '--out_dir=parts', '--init_from=resume')
    ours, theirs = weights(tmp_path / 'run'), weights(tmp_path / 'parts')
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'run') and ours['steps'] == 8
    for one, other in zip(*([x['model'], x.get('evaluated', {})] for x in (ours, theirs))):
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert ('evaluated' in ours) == any(idea in names for idea in ('ema', 'best_weights', 'cyclic_average'))


def test_cycles_of_the_rate_and_the_average_of_their_ends(main, tmp_path, monkeypatch):
    ends, step = [], train.Run.step

    def stepping(self):
        step(self)
        ends.append((round(self.rate(self.progress), 6), {k: w.clone() for k, w in self.model.state_dict().items()}))
    monkeypatch.setattr(train.Run, 'step', stepping)
    main('cyclic_average', '--max_steps=12', '--cycles=4', '--cycles_from=0.3333333333', '--cycle_low=0.2', '--warmup_frac=0')
    low, state, result = 0.2, weights(tmp_path / 'run'), json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert [rate for rate, _ in ends[:5]] == [1] * 5 and all(low < rate <= 1 for rate, _ in ends)
    falls = [after < before for (before, _), (after, _) in zip(ends[4:], ends[5:])]
    assert falls == [True, False, True, False, True, False, True]
    assert state['averaged'] == result['averaged'] == 4
    for name, w in state['evaluated'].items():
        torch.testing.assert_close(w, torch.stack([ends[i][1][name] for i in (5, 7, 9, 11)]).mean(0))
    assert torch.equal(sample.load(tmp_path / 'run')[0].wte.weight, state['evaluated']['wte.weight'])


@pytest.mark.parametrize('spoilt', [True, False])
def test_the_best_weights_are_measured_where_the_last_are_not(main, tmp_path, corpus, monkeypatch, spoilt):
    rate = train.Run.rate
    monkeypatch.setattr(train.Run, 'rate', lambda self, progress: 50.0 if spoilt and progress > 0.75 else rate(self, progress))
    said = main('best_weights', '--max_steps=10', '--eval_interval=0.2', '--micro_batch_size=8')
    state, result, data = weights(tmp_path / 'run'), json.loads((tmp_path / 'run' / 'result.json').read_text()), corpus.open()
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    read = {row['step']: row['train_bpb'] for row in rows if 'train_bpb' in row}
    seen = {row['step']: row['val_bpb'] for row in rows[::-1] if 'val_bpb' in row}           # of several at the end the first
    best = min(seen, key=seen.get)
    assert [*read] == [3, 5, 8, 9, 10] and (best == 8) == spoilt and state['best'] | dict(slices=0) == dict(step=best, bpb=seen[best], slices=0)
    assert result['measured_step'] == best and ('the first is measured' in said) == spoilt
    model, _ = sample.load(tmp_path / 'run')
    assert sample.bits_per_byte(model, data.tokens['val'], data.docs['val'])['bpb'] == pytest.approx(result['val_bpb'], rel=1e-6)
    assert f'training text {read[8]:.4f}, {seen[8] - read[8]:.4f} less than validation, after' in said
    assert torch.equal(state['model']['wte.weight'], model.wte.weight) == (not spoilt)


@pytest.mark.long
def test_a_growth_begins_a_new_average_in_either_order(main, tmp_path):
    settings = ['--ema=0.1', '--growth=[(0.5, dict(n_embd=128))]', '--max_steps=8']
    main('ema growth', *settings)
    main('growth ema', *settings, '--out_dir=other')
    one, other = weights(tmp_path / 'run'), weights(tmp_path / 'other')
    assert losses(tmp_path / 'run') == losses(tmp_path / 'other')
    assert one['evaluated']['wte.weight'].shape[1] == 128 and all(torch.equal(w, other['evaluated'][k]) for k, w in one['evaluated'].items())


# ---- weight decay by points, one order

def test_weight_decay_goes_from_point_to_point(main):
    def factor(progress, *settings):
        return run_of(*settings, '--device=cpu').decay(progress)
    assert [factor(p) for p in (0, 0.3, 0.77, 1)] == [1 - p for p in (0, 0.3, 0.77, 1)]
    file, = paths('weight_decay')
    assert [0.8 * factor(p, file) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([0.8, 0.45, 0.1, 0.515, 0.93])
    assert factor(0.6, file, '--weight_decay_points=[(0, 30), (1, 30)]') == 30
    assert [factor(p, file, '--weight_decay_points=[(0, 1), (1, 0)]') for p in (0, 0.3, 0.77, 1)] == [factor(p) for p in (0, 0.3, 0.77, 1)]


@pytest.mark.parametrize('points', ['()', '(1, 0)', '[(0, 1)]', '[(0, 1), (0.5, 0)]', '[(0, 1), (0.5, 1), (0.5, 0), (1, 0)]',
                                    '[(0, 1), (1, -1)]', '[(0, 1), (1, "a")]', '[("0", "1"), ("1", "0")]', '[(0, 1), (1, 1e999)]', '[(0, 1, 2), (1, 1, 2)]'])
def test_points_that_cannot_be(points):
    with pytest.raises(UserError, match='weight_decay_points is .*it must be pairs'):
        run_of(*paths('weight_decay'), f'--weight_decay_points={points}')


@pytest.mark.parametrize('weights', [None, [2.2, 0.4]])
def test_every_epoch_in_the_order_of_the_first(weights):
    lengths = np.random.default_rng(0).integers(3, 20, 50)
    docs = np.zeros(50, prepare_data.DOC)
    docs['start'], docs['source'] = np.concatenate([[0], np.cumsum(lengths)[:-1]]), np.arange(50) % 2
    data = types.SimpleNamespace(docs=dict(train=docs), tokens=dict(train=np.arange(lengths.sum(), dtype=np.uint16)), meta={})
    s, ideas = train.read_settings(paths('same_order'))
    same, other = (kind(data, s, weights or [1.0, 1.0]) for kind in (ideas.seam(train.Stream), train.Stream))
    n = same.epoch_tokens()
    assert other.epoch_tokens() == n and np.array_equal(same.read(0, n), other.read(0, n))
    assert all(np.array_equal(same.read(e * n, n), same.read(0, n)) for e in range(4))
    assert not np.array_equal(other.read(n, n), other.read(0, n))
    assert np.array_equal(same.rows(n // 7, n // 7, 7), same.rows(0, n // 7, 7))          # and rows too
    assert np.array_equal(other.rows(0, n // 7, 7), same.rows(0, n // 7, 7))


def test_configs_of_settings_alone():
    values = Ideas(paths('cpu wide'), train.TABLES).values
    assert (values['n_layer'], values['n_embd'], values['mlp_hidden']) == (4, 192, 9 * 192)
    assert Ideas(paths('wide cpu'), train.TABLES).values['mlp_hidden'] == 9 * 256


# ---- trackers

class FakeTracker:
    """Stands for wandb and for mlflow: notes what it is told, or behaves as `how` says from the first call or the second on."""

    def __init__(self, name, how='', calm=0):
        self.__spec__, self.how, self.calm, self.told = importlib.machinery.ModuleSpec(name, None), how, calm, []

    def __getattr__(self, name):
        if name.startswith('_'):
            raise AttributeError(name)

        def call(*args, **options):
            if len(self.told) >= self.calm and self.how == 'raises':
                raise OSError('nobody\nanswers')
            if len(self.told) >= self.calm and self.how == 'hangs':
                threading.Event().wait()
            self.told.append((name, args, options))
            return self
        return call


@pytest.fixture
def tracker():
    return Ideas(paths('tracker'), train.TABLES).modules[0]


@pytest.mark.parametrize('name', ['wandb', 'mlflow'])
def test_a_tracker_is_told_everything(main, tmp_path, monkeypatch, name):
    fake = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, fake)
    out = main('tracker', f'--tracker={name}', '--eval_interval=0.4', '--sample_prompt=Mia')
    assert 'warning' not in out
    told = [(args, options) for what, args, options in fake.told if what == dict(wandb='log', mlflow='log_metrics')[name]]
    steps = [options['step'] for _, options in told]
    assert steps == sorted(steps) and set(steps) == {1, 2, 3}
    for row in rows(tmp_path / 'run'):
        numbers = {k: v for k, v in row.items() if k != 'step' and isinstance(v, (int, float))}
        assert ((numbers,), dict(step=row['step'])) in told
    text, result = str(fake.told), json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['sample'][:5] in text and 'tales' in text and 'joules' in text
    kinds = [what for what, _, _ in fake.told]
    if name == 'wandb':
        assert kinds[-1] == 'finish' and ('add_file', ('run/ckpt.pt',), {}) in fake.told and kinds.count('log_artifact') == 1
    else:
        assert kinds[-1] == 'end_run' and ('log_artifact', ('run/ckpt.pt',), {}) in fake.told
        params, = (args[0] for what, args, _ in fake.told if what == 'log_params')
        assert params['n_layer'] == 2 and 'n_kv_head' not in params


@pytest.mark.parametrize('how, calm', [('raises', 5), ('hangs', 0), ('hangs', 5)])
def test_a_tracker_that_is_away_costs_a_warning(main, tmp_path, monkeypatch, tracker, how, calm):
    made, init = [], tracker.Tracker.__init__
    monkeypatch.setattr(tracker.Tracker, '__init__', lambda self, *a: made.append(self) or init(self, *a))
    monkeypatch.setitem(sys.modules, 'wandb', FakeTracker('wandb', how, calm))
    monkeypatch.setattr(tracker.Tracker, 'WAIT', 0.3)
    began = time.monotonic()
    out = main('tracker', '--tracker=wandb')
    assert time.monotonic() - began < 30 and out.count('warning: wandb') == 1
    assert dict(raises='follows no longer (nobody)', hangs='too slow')[how] in out
    assert len(losses(tmp_path / 'run')) == 3 and json.loads((tmp_path / 'run' / 'result.json').read_text())['steps'] == 3
    began = time.monotonic()
    assert not made[0].finish() and time.monotonic() - began < 0.1      # asked once is enough


def test_a_queue_that_is_full_leaves_rows_out(monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, 'mlflow', FakeTracker('mlflow', 'hangs'))
    monkeypatch.setattr(tracker.Tracker, 'WAIT', 0.1)
    said, s = [], train.read_settings([*paths('tracker'), '--tracker=mlflow'])[0]
    it = tracker.Tracker(s, {}, said.append)
    began = time.monotonic()
    for step in range(1500):
        it.put(dict(step=step))
    assert not it.finish() and time.monotonic() - began < 3
    assert 'lacks 500 rows, and 1,000 that wait' in said[0]


def test_a_tracker_cannot_hold_the_prompt_back(corpus, tmp_path, monkeypatch):
    (tmp_path / 'wandb.py').write_text('import atexit, time\natexit.register(time.sleep, 300)\nSettings = dict\n'
                                       'def init(**options): raise OSError("away")\n')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    code, out, err = script('train.py', *paths('tracker'), *corpus.args, '--max_steps=1', '--out_dir=run', '--tracker=wandb',
                            cwd=tmp_path, timeout=90)
    assert code == 0 and 'warning: wandb follows no longer (away)' in out and (tmp_path / 'run' / 'result.json').exists(), err


def test_a_run_that_is_stopped_lets_go_of_its_tracker(monkeypatch, tmp_path, tracker):
    """However a run ends, its tracker is asked to finish; one that does not costs the exit no wait."""
    monkeypatch.setitem(sys.modules, 'wandb', FakeTracker('wandb', 'hangs'))
    monkeypatch.setattr(tracker.Tracker, 'WAIT', 0.1)
    left = []
    monkeypatch.setattr(tracker.os, '_exit', left.append)
    run = run_of(*paths('tracker'), '--tracker=wandb', '--device=cpu')
    run.close(75)
    assert left == []                                                       # nothing was begun
    run.tracker = tracker.Tracker(run.s, {}, print)
    run.close(75)
    assert left == [75]


def test_a_tracker_that_is_not_installed(main, tmp_path, monkeypatch, tracker):
    monkeypatch.setattr(tracker.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='tracker mlflow is not installed: pip install mlflow, or leave config/tracker.py away'):
        main('tracker', '--tracker=mlflow')
    assert not (tmp_path / 'run').exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match='tracker .*must be one of tensorboard, wandb, mlflow'):
        train.read_settings([*paths('tracker'), '--tracker=wandbb'])


def test_another_tracker_may_follow_a_run_that_goes_on(main, tmp_path, monkeypatch):
    for name in ('wandb', 'mlflow'):
        monkeypatch.setitem(sys.modules, name, FakeTracker(name))
    with contextlib.suppress(train.Stopped):
        monkeypatch.setattr(train.Run, 'evaluate_if_due', lambda self: self.signals.append(15))
        main('tracker', '--tracker=wandb')
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'mlflow', fake := FakeTracker('mlflow'))
    main('tracker', '--tracker=mlflow', '--init_from=resume')
    assert len(losses(tmp_path / 'run')) == 3 and 'log_metrics' in [what for what, _, _ in fake.told]


def test_curves_in_tensorboard(main, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert 'warning' not in main('tracker', '--tracker=tensorboard')
    events = EventAccumulator(str(tmp_path / 'run' / 'tensorboard'))
    events.Reload()
    assert [e.value for e in events.Scalars('train_loss')] == pytest.approx(losses(tmp_path / 'run'))
    assert 'val_bpb' in events.Tags()['scalars'] and 'sample/text_summary' in events.Tags()['tensors']

"""Growth and curricula: config/growth.py, hypercloning.py, raise.py, climb_data.py. Tokens grow in test_tokenformer.py."""
import json
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model as m
import prepare_data
import train
from config import climb_data
from config.grown_weights import grow, grown_config
from conftest import ROOT
from prepare_data import Ideas, UserError

SMALL = dict(vocab_size=97, bos=0, block_size=64, n_layer=3, n_head=4, n_embd=32)
SHAPES = [('', options) for options in (
    dict(), dict(n_kv_head=2), dict(n_kv_head=1, mlp='swiglu'), dict(tie_embeddings=True), dict(head_dim=6),
    dict(qk_norm=False, doc_mask=False), dict(token_shift=False, rotary_dim=4))] + [
    ('value_embeds', dict(value_embeds=2, n_kv_head=2)),
    ('value_embeds', dict(value_embeds=3, tie_embeddings=True, mlp='swiglu', mlp_hidden=40)),
    ('window softcap', dict(window=9)), ('latent_attention', dict(kv_latent=12, rotary_dim=4)),
    ('latent_attention', dict(kv_latent=13, q_latent=20, rotary_dim=2, doc_mask=False)),
    ('value_embeds tokenformer', dict(attn_tokens=24, mlp_tokens=80, n_kv_head=2, value_embeds=1)),
    ('tokenformer', dict(attn_tokens=24, mlp_tokens=0, token_norm='norm_gelu')),
    ('tokenformer', dict(attn_tokens=0, mlp_tokens=80, mlp_scale_tokens=60, head_dim=6)),
    ('interleaved_heads', dict()), ('interleaved_heads attention_gate', dict(n_kv_head=1))]
GROWTHS = [dict(n_embd=64), dict(n_embd=96), dict(mlp_hidden=256), dict(n_head=8), dict(n_layer=7), dict(n_embd=64, n_layer=6),
           dict(n_embd=128, mlp_hidden=384, n_head=8)]


def paths(names):
    return [str(ROOT / 'config' / f'{name}.py') for name in names.split()]


def config_of(names, **options):
    """The config of a small model of ideas; settings as they declare them, but for those given."""
    ideas = Ideas(paths(names), train.TABLES)
    return m.configured(ideas)(**{k: ideas.values[k] for k in ideas.declared} | SMALL | options)


def double(model):
    model, c = model.double(), model.config
    model.compute_dtype = torch.float64
    model.cos, model.sin = m.rotary_table(c.block_size, c.rotary_dim, c.rope_base)
    return model


def make(names, std=0.15, **options):
    """A model in float64 of which no part is zero; a weight depends on its name alone."""
    model = (config := config_of(names, **options)).GPT(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            dice = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            p.normal_(std=std, generator=dice) if p.ndim > 1 else p.uniform_(0.5, 1.0, generator=dice)
    return double(model).eval()


def tokens(B, T, bos_at=(0,), seed=1):
    idx = torch.randint(1, SMALL['vocab_size'], (B, T), generator=torch.Generator().manual_seed(seed))
    idx[:, list(bos_at)] = 0
    return idx


@torch.no_grad()
def logits(model, idx):
    return model.lm_head(model.trunk(idx))                 # model.logits gives fp32


def run_of(names, *argv):
    """A Run of ideas in float64 that nothing was opened for."""
    s, ideas = train.read_settings([*paths(names), '--device=cpu', *argv])
    run = ideas.seam(train.Run)(s, ideas)
    run.dtype, run.progress = torch.float64, 0.3
    return run


def rows(out_dir):
    return [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]


def losses(out_dir):
    return [row['train_loss'] for row in rows(out_dir) if 'train_loss' in row]


def in_parts(main, monkeypatch, stops, *args):
    """A run into `parts` that is told to stop after so many steps, and resumed, again and again."""
    step = train.Run.step
    for first, last in zip([0, *stops], [*stops, None]):
        def stop_after(self):
            step(self)
            self.stopping = self.stopping or self.steps == last
        monkeypatch.setattr(train.Run, 'step', stop_after)
        more = ['--out_dir=parts'] + ['--init_from=resume'] * (first > 0)
        if last:
            with pytest.raises(train.Stopped):
                main(*args, *more)
    monkeypatch.setattr(train.Run, 'step', step)
    return main(*args, *more)


# ---- weights that grow

@pytest.mark.parametrize('changes', GROWTHS)
@pytest.mark.parametrize('names, options', SHAPES)
def test_a_grown_model_computes_the_same(names, options, changes):
    old, idx = make(f'{names} growth', **options), tokens(2, 40, (0, 13))
    if 'mlp_hidden' in changes:
        changes = changes | dict(mlp_hidden=(4 if options.get('mlp') else 2) * old.config.mlp_hidden)
    new, came_from = grow(old, grown_config(old.config, changes))
    assert all(getattr(new.config, k) == v for k, v in changes.items()) and new.config.head_dim == old.config.head_dim
    before, after = logits(old, idx), logits(new, idx)
    assert (after - before).abs().max() < 1e-10 and before.std() > 0.1
    if changes in (dict(n_embd=64), GROWTHS[-1]):          # and again
        twice, _ = grow(new, grown_config(new.config, dict(n_embd=2 * new.config.n_embd)))
        assert (logits(twice, idx) - before).abs().max() < 1e-10
    silent, _ = grow(old, new.config, math.inf)
    assert ('n_embd' in changes) <= any((a != b).any() for a, b in zip(new.parameters(), silent.parameters()))
    assert 'n_layer' in changes or len(came_from) == len([*new.parameters()])


def test_the_new_layers_of_a_stack_are_the_old_ones():
    old = make('growth')
    new, came_from = grow(old, grown_config(old.config, dict(n_layer=6), stack=True), stack=True)
    for i, block in enumerate(new.blocks):
        assert all(torch.equal(a, b) for a, b in zip(block.parameters(), old.blocks[i % 3].parameters()))
    assert len(came_from) == len([*new.parameters()])


def test_growth_takes_whole_numbers_and_whole_stacks():
    config = config_of('growth')
    for wrong, said in ((dict(n_embd=64.0), 'n_embd is 64.0, it must be a whole number'), (dict(n_layer='6'), 'whole number'),
                        (dict(n_head=8, n_kv_head=4), 'would give key heads other query heads'), (dict(n_embd=48), 'whole multiples')):
        with pytest.raises(ValueError, match=said):
            grown_config(config, wrong)
    with pytest.raises(ValueError, match='5 layers are no stack of 3'):
        grown_config(config, dict(n_layer=5), stack=True)


def test_a_grown_model_predicts_the_same_further_tokens():
    for tied in (False, True):
        old, idx = make('multi_token growth', predict_ahead=2, tie_embeddings=tied), tokens(2, 40, (0, 13))
        new, _ = grow(old, grown_config(old.config, dict(n_embd=64)))
        one, other = (x(idx, idx.roll(-1, 1), ahead=torch.tensor(1.0)) for x in (old, new))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)           # linear_cross_entropy is fp32


def test_a_grown_model_guesses_the_same_classes():
    for tied in (False, True):
        old, idx = make('climb_objective growth', word_classes=2, tie_embeddings=tied), tokens(2, 40, (0, 13))
        new, came_from = grow(old, grown_config(old.config, dict(n_embd=64)))
        guess = dict(class_of=torch.arange(97) % 5, class_share=torch.tensor(1.0))      # the second head alone
        one, other = (x(idx, idx.roll(-1, 1), **guess) for x in (old, new))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        assert came_from[new.class_head.weight][1] == (2 if tied else 1)


# ---- what optimizers know

def small_run(names, *argv, **options):
    """A run with a small model and its optimizers, whose noise is off if `argv` says so."""
    run = run_of(names, *argv)
    torch.manual_seed(0)
    config = config_of(names, vocab_size=50, block_size=16, n_layer=2, n_head=2, **options)
    run.take_model(double(config.GPT(config)))
    return run


def trained(run, steps, seed=5):
    """Losses of some steps on random rows, the same for the same seed."""
    dice, out = torch.Generator().manual_seed(seed), []
    run.step_model = run.model
    for _ in range(steps):
        idx = torch.randint(1, 50, (4, 17), generator=dice)
        loss = run.batch_loss(idx=idx[:, :-1], targets=idx[:, 1:])
        loss.backward()
        out.append(run.descend(loss.detach())[0])
    return out


def widen(run, wide=64):
    run.change_model(*run.grow(run.model, run.grown_config(run.model.config, dict(n_embd=wide)), 2))


@pytest.mark.parametrize('names, options', [('growth', dict()), ('value_embeds growth', dict(tie_embeddings=True, mlp='swiglu', value_embeds=1)),
                                            ('softcap growth', dict())])
@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_without_noise_a_clone_learns_as_the_narrow_model_does(optimizer, names, options):
    """The rates and every optimizer's averages carry over at their right scale: the same losses, step by step."""
    settings = [f'--optimizer={optimizer}', '--growth_snr_db=1e9', '--grad_clip=0', '--weight_decay=0.5']
    narrow, wide, forgot = (small_run(names, *settings, **options) for _ in range(3))
    assert trained(narrow, 5) == trained(wide, 5) == trained(forgot, 5)
    widen(wide), widen(forgot)
    expected = trained(narrow, 6, seed=6)
    assert trained(wide, 6, seed=6) == pytest.approx(expected, rel=1e-6)
    forgot.optimizers = forgot.make_optimizers(forgot.model)
    assert trained(forgot, 6, seed=6) != pytest.approx(expected, rel=1e-3)


def test_copies_that_begin_alike_learn_different_things():
    """With noise the wide model's halves compute the same at first and not after 60 steps; without, ever."""
    idx = torch.randint(1, 50, (4, 16), generator=torch.Generator().manual_seed(1))
    for snr_db, apart in ((1e9, False), (10.0, True)):
        run = small_run('growth', f'--growth_snr_db={snr_db}')
        trained(run, 5)
        widen(run)

        def difference():
            with torch.no_grad():
                one, other = run.model.trunk(idx).split(32, dim=-1)
            return ((one - other).norm() / one.norm()).item()
        assert difference() < 1e-10
        up = run.model.blocks[0].mlp.up.weight
        if apart:                                      # 10 dB: the noise has a tenth of the weights' power
            one, other = up.split(32, dim=1)
            assert ((one - other).norm() / (one + other).norm()).item() == pytest.approx(10 ** -0.5, rel=1e-6)
        trained(run, 60)
        assert difference() > 0.05 if apart else difference() < 1e-3        # which rounding alone brings
        clones = ((up[:128] - up[128:]).norm() / up.norm()).item()          # rows of one copy, of the other
        assert clones > 0.05 if apart else clones < 1e-6


# ---- runs

def test_a_config_may_use_the_settings_so_far(tmp_path):
    (tmp_path / 'a.py').write_text('n_embd = 64\nn_head = 2\n')
    first, (second,) = str(tmp_path / 'a.py'), paths('hypercloning')
    s, _ = train.read_settings([first, second])
    assert s.n_embd == 32 and s.head_dim == 16 and s.growth == ((0.33, dict(n_embd=64)),)
    assert train.read_settings([first, '--n_embd=128', second])[0].growth[0][1] == dict(n_embd=128)
    _, ideas = train.read_settings([first, second, '--n_head=1'])
    assert len(ideas.overruled) == 1 and 'hypercloning.py' in ideas.overruled[0] and 'sets n_embd to 32' in ideas.overruled[0]


@pytest.mark.parametrize('name', ['hypercloning', 'raise'])
@pytest.mark.parametrize('shape', ['', 'wide', 'qwen3_shape'])
def test_what_grows_ends_with_the_parameters_of_what_it_is_stacked_on(shape, name):
    def last(names):
        s, ideas = train.read_settings(['--n_embd=320', '--n_head=5', '--n_layer=4', *paths(names)])
        run = ideas.seam(train.Run)(s, ideas)
        run.data = SimpleNamespace(meta=dict(vocab_size=300, bos=256))
        config = run.config_of_settings()
        for _, changes in getattr(s, 'growth', ()):
            config = run.grown_config(config, changes)
        return m.blueprint(config).params()['total']
    more = 0.03 * (shape == 'qwen3_shape')                    # a SwiGLU half as wide is rounded up
    assert 1 <= last(f'{shape} {name}') / last(shape) <= 1 + more


GROW = [*paths('growth'), '--growth=[(0.3, dict(n_embd=128)), (0.6, dict(n_layer=3))]', '--max_steps=12']


def test_a_run_that_grows_resumes_over_its_growth(main, tmp_path, monkeypatch):
    out = main(*GROW)
    assert out.count('grown to ') == 2 and 'grown to 3 layers, 128 wide, 4 heads of 32' in out
    whole, result = losses(tmp_path / 'run'), json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert len(whole) == 12 and result['config']['n_embd'] == 128 and result['growth_seconds'] > 0
    assert result['flops'] < result['tokens'] * result['flops_per_token']
    in_parts(main, monkeypatch, (3, 5, 9), *GROW)                        # before the first growth, and after each
    assert losses(tmp_path / 'parts') == whole
    import sample
    model, tokenizer = sample.load(tmp_path / 'parts')
    assert model.config.n_layer == 3 and ''.join(sample.stream(model, tokenizer, 'Mia', 8)) is not None


def test_a_run_of_tokens_resumes_over_its_growth(main, tmp_path, monkeypatch):
    args = [*paths('tokenformer_grow'), '--max_steps=8', '--tie_embeddings']
    out = main(*args)
    assert '48 for each of attention, 192 for the MLP' in out.partition('grown to')[2]
    in_parts(main, monkeypatch, (2, 5), *args)
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'run') and len(losses(tmp_path / 'run')) == 8


def test_depth_that_would_change_what_layers_do_is_refused(main):
    for names, changes in (('growth skips', dict(n_layer=6)), ('growth layer_loop', dict(n_layer=4))):
        run, name = run_of(names), names.split()[1]
        assert run.grown_config(config_of(names), dict(n_embd=64)).n_embd == 64
        with pytest.raises(UserError, match=f'growth.py adds layers, and {name}.py joins them by their numbers: leave one out'):
            run.grown_config(config_of(names), changes)
    with pytest.raises(UserError, match='raise.py adds layers, and skips.py joins'):
        main(*paths('raise skips'), '--max_steps=8')


@pytest.mark.parametrize('growth, said', [
    ('[(0.3, dict(n_embd=96))]', 'whole multiples'), ('[(0.3, dict(n_embd=32))]', 'whole multiples'), ('[(0.3, dict(vocab=1))]', 'cannot grow'),
    ('[(1.3, dict(n_embd=128))]', 'between 0.0 and 1'), ('[(0.5, dict(n_layer=3)), (0.4, dict(n_layer=4))]', 'between 0.5 and 1'),
    ('[0.3]', 'write it like'), ('[(0.3, 128)]', 'write it like'), ('[(0.3, dict(n_embd="big"))]', 'write it like')])
def test_a_growth_that_cannot_be(main, tmp_path, growth, said):
    for names in 'growth', 'tokenformer_grow':
        with pytest.raises(UserError, match=said):
            main(*paths(names), f'--growth={growth}')
    assert not (tmp_path / 'run').exists()


def test_depth_as_a_stack(main):
    with pytest.raises(UserError, match='no stack of 2'):
        main(*paths('growth'), '--growth=[(0.3, dict(n_layer=3))]', '--growth_depth=stack')
    assert 'grown to 4 layers' in main(*paths('growth'), '--growth=[(0.3, dict(n_layer=4))]', '--growth_depth=stack')


def test_a_growth_that_found_no_time_is_missed_aloud(main, monkeypatch, tmp_path):
    from config import growth
    monkeypatch.setattr(growth.Run, 'grow_now', None)                    # which would end the run
    monkeypatch.setattr(growth.Run, 'get_going', lambda self: (train.Run.get_going(self), setattr(self, 'warm_seconds', 1e6))[0])
    out = main(*paths('growth'), '--growth=[(0.01, dict(n_layer=3))]', '--max_steps=0', '--budget_counts=training', '--budget_minutes=0.02')
    assert 'warning: no time was left for the growth at progress 0.01' in out and len(losses(tmp_path / 'run')) > 1


def test_room_and_closing_are_those_of_the_largest_model(main, monkeypatch):
    asked, seen = train.check_room, []
    monkeypatch.setattr(train, 'check_room', lambda s, config, *rest: (seen.append(config.n_embd), asked(s, config, *rest)))
    dear = []
    measured = train.Run.measure_evaluation
    monkeypatch.setattr(train.Run, 'measure_evaluation', lambda self: (dear.append(self.dearer()), measured(self)))
    main(*paths('growth'), '--growth=[(0.5, dict(n_embd=128))]', '--max_steps=1')
    assert seen == [128] and dear[0] > 2


def test_going_back_over_a_growth_is_refused(main, monkeypatch, tmp_path):
    descend = train.Run.descend
    monkeypatch.setattr(train.Run, 'descend', lambda self, loss: descend(self, loss * (math.nan if self.progress >= 0.5 else 1)))
    with pytest.raises(train.Diverged, match='since the model has another shape'):
        main(*paths('growth'), '--growth=[(0.5, dict(n_embd=128))]', '--max_steps=12', '--save_minutes=0')


def test_a_finished_run_grows(main, tmp_path):
    """Its shape is the run's, with the sizes that are given; the first loss is about the last one there."""
    main('--max_steps=12')
    out = main(*paths('growth'), '--init_from=run', '--out_dir=second', '--n_embd=128', '--seed=9')
    grown = json.loads((tmp_path / 'second' / 'result.json').read_text())
    assert grown['config']['n_embd'] == 128 and grown['config']['n_head'] == 4 and 'begins afresh' not in out
    assert losses(tmp_path / 'second')[0] == pytest.approx(losses(tmp_path / 'run')[-1], abs=0.3)
    for wrong, said in ((['--n_embd=96'], 'whole multiples'), (['--rope_base=500'], 'rope_base cannot grow'),
                        (['--n_layer=3', '--growth_depth=stack'], 'no stack of 2')):
        with pytest.raises(UserError, match=f'another model.*{said}'):
            main(*paths('growth'), '--init_from=run', '--out_dir=third', *wrong)


@pytest.mark.long
def test_a_run_grown_from_another_goes_on(main, tmp_path, monkeypatch):
    main(*paths('tokenformer'), '--tie_embeddings')
    args = [*paths('tokenformer growth'), '--init_from=run', '--n_embd=128', '--max_steps=6', '--growth=[(0.6, dict(n_layer=3))]']
    main(*args, '--out_dir=second')
    config = json.loads((tmp_path / 'second' / 'result.json').read_text())['config']
    assert [config[k] for k in ('n_embd', 'n_layer', 'attn_tokens', 'mlp_tokens', 'head_scale')] == [128, 3, 48, 192, 0.5]
    in_parts(main, monkeypatch, (3, 5), *args)
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'second') and len(losses(tmp_path / 'second')) == 6


# ---- curricula

def test_pacing_is_what_climb_defines():
    def at(progress, pacing):
        s = SimpleNamespace(pacing=pacing, pacing_start=0.0625, pacing_end=0.875)
        return climb_data.admitted(progress, s, 0.1)
    for pacing in ('linear', 'quad', 'root', 'exp', 'log', 'step'):
        assert at(0.0, pacing) == at(0.0625, pacing) == pytest.approx(0.1)
        assert at(0.875, pacing) == at(1.0, pacing) == pytest.approx(1.0)
        shares = [at(p / 100, pacing) for p in range(101)]
        assert shares == sorted(shares)
    middle = (0.0625 + 0.875) / 2
    assert at(middle, 'linear') == pytest.approx(0.55) and at(middle, 'quad') == pytest.approx(0.1 + 0.9 / 4)
    assert at(middle, 'root') == pytest.approx(0.1 + 0.9 * 0.5 ** 0.5) and at(middle, 'step') == pytest.approx(0.7)
    assert at(middle, 'exp') == pytest.approx(0.1 + 0.9 * math.expm1(5) / math.expm1(10))
    assert at(0.0625 + 0.12 * 0.8125, 'log') == pytest.approx(0.1 + 0.9 * 0.79, abs=0.005)


@pytest.fixture
def made_up(monkeypatch):
    def stream(n=400, order='shuffled', weights=None, **settings):
        """A curriculum over n documents of 5 to 14 tokens, all of them the document's number; and the difficulties."""
        dice = np.random.default_rng(0)
        lengths = dice.integers(5, 15, n)
        docs = np.zeros(n, prepare_data.DOC)
        docs['start'], docs['source'] = lengths.cumsum() - lengths, np.arange(n) % 2
        data = SimpleNamespace(tokens=dict(train=np.repeat(np.arange(n), lengths)), docs=dict(train=docs))
        s, _ = train.read_settings([*paths('climb_data'), f'--curriculum_order={order}', '--tokens_per_step=64',
                                    *(f'--{k}={v}' for k, v in settings.items())])
        monkeypatch.setattr(climb_data, 'measure', lambda *_: dice.random(n).round(1))
        return climb_data.Stream(data, s, weights)
    return stream


def test_a_curriculum_reads_a_source_as_often_as_it_weighs(made_up):
    stream = made_up(n=100, weights=[3.0, 1.0], pacing_floor=1)
    stream.pace(int(stream.up_to[-1]) // 64, 0.0)
    read = stream.read(0, int(stream.up_to[-1]))                                   # one round
    times = np.bincount(read, minlength=100) / np.bincount(stream.tokens)
    assert (times[::2] == 3).all() and (times[1::2] == 1).all() and stream.epoch_tokens() == len(read)
    with pytest.raises(UserError, match='whole number'):
        made_up(weights=[0.5, 1.0])


def test_the_rows_that_are_counted_are_not_the_easy_ones(made_up):
    stream, again = (made_up(weights=[1.0, 1.0]) for _ in range(2))
    for one in stream, again:
        one.pace(0, 0.0)
    rows = stream.first_rows(8, 16)
    assert stream.rank[rows].max() > 300 > 60 > again.rank[again.rows(0, 8, 16)].max()            # a tenth is admitted
    assert np.array_equal(stream.rows(0, 8, 16), again.rows(0, 8, 16)) and stream.shares == again.shares


@pytest.mark.parametrize('order', ['shuffled', 'frontier'])
def test_a_curriculum_reads_what_it_admits_and_each_document_once_a_round(made_up, order):
    stream, steps = made_up(order=order, weights=[1.0, 1.0]), 200
    for step in range(steps):
        stream.pace(step, step / steps)
    read, at = stream.read(0, 64 * 60), 0
    while at < len(read) - 15:                               # documents come whole
        n = int(stream.lengths[read[at]])
        assert (read[at:at + n] == read[at]).all()
        limit = stream.shares[at // 64] + 1e-9
        assert stream.up_to[stream.rank[read[at]]] <= limit * stream.up_to[-1] + 64, 'not admitted yet'
        at += n
    starts = [int(d) for i, d in enumerate(read) if i == 0 or read[i - 1] != d]
    k = stream.easiest(stream.shares[0])
    first = {int(d) for d in starts[:k // 2]}
    assert len(first) == k // 2 and all(stream.rank[d] < k for d in first)         # none twice while others wait
    assert (order == 'frontier') == (sorted(starts[:8], key=lambda d: -stream.rank[d]) == starts[:8])


def test_a_curriculum_is_the_same_from_any_place(made_up):
    def stream(seed=4):
        return made_up(seed=seed, weights=[1.0, 1.0])
    whole, other = stream(), stream()
    for step in range(60):
        whole.pace(step, step / 60)
    other.load(whole.state())
    expected = whole.read(0, 64 * 50)
    assert (np.concatenate([other.read(a, b - a) for a, b in zip([0, 7, 64, 1000, 2222], [7, 64, 1000, 2222, 3200])]) == expected).all()
    late = stream()
    late.load(whole.state())
    assert (late.read(2100, 400) == expected[2100:2500]).all() and len(late.drawn) < 100
    assert (stream(5).read(0, 300) != expected[:300]).any()
    whole, late = stream(), stream()
    whole.shares = late.shares = other.shares
    shuffled, later = (np.concatenate([stream.rows(row, 4, 8) for row in range(first, 256, 4)])
                       for stream, first in [(whole, 0), (late, 200)])            # four windows of 8 steps of 8 rows
    inorder = expected[:256 * 8].reshape(4, 64, 8)
    for window, rows in zip(inorder, shuffled.reshape(4, 64, 9)):
        assert sorted(map(tuple, rows[:, :8])) == sorted(map(tuple, window)) and (rows[:, :8] != window).any()
    assert np.array_equal(shuffled[200:], later)


def test_a_curriculum_is_the_same_where_rows_are_read_again(made_up):
    """After memory was found full, for one: rows of a window that was passed."""
    stream = made_up(weights=[1.0, 1.0])
    for step in range(30):
        stream.pace(step, step / 30)
    before = stream.rows(60, 4, 8)
    stream.rows(300, 8, 8)
    assert stream.places[0] > 0 and (stream.rows(60, 4, 8) == before).all()


def test_a_curriculum_goes_by_the_text_where_steps_are_small(main, monkeypatch):
    """With steps of a quarter at first, all is admitted by 7/8 of the way."""
    told, pace = [], climb_data.Stream.pace

    def watched(stream, step, progress):
        told.append(step)
        pace(stream, step, progress)
        told[-1] = step, progress, stream.shares[step]
    monkeypatch.setattr(climb_data.Stream, 'pace', watched)
    main(*paths('climb_data batch_rampup'), '--max_steps=60', '--tokens_per_step=1024', '--micro_batch_size=4', '--pacing_floor=0.3')
    late = [share for _, progress, share in told if progress > 0.9]
    assert late and min(late) > 0.99 and told[-1][0] < 55 and told[-1][1] > 0.97


@pytest.mark.long
def test_a_run_with_a_curriculum_resumes(main, tmp_path, monkeypatch):
    long = [*paths('climb_data'), '--max_steps=24']        # stopped in the last of three windows
    main(*long)
    in_parts(main, monkeypatch, (18,), *long)
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'run') and len(losses(tmp_path / 'run')) == 24
    main('--max_steps=24', '--out_dir=plain')
    assert losses(tmp_path / 'plain') != losses(tmp_path / 'run')


def test_a_raised_model_grows_on_text_that_gets_harder_and_resumes(main, tmp_path, monkeypatch):
    """Late enough that what was read first is gone from the curriculum's memory as the model grows."""
    args = [*paths('raise'), '--max_steps=24']
    out = main(*args)
    assert out.count('grown to') == 2 and json.loads((tmp_path / 'run' / 'result.json').read_text())['config']['n_embd'] == 64
    in_parts(main, monkeypatch, (8, 15), *args)
    assert losses(tmp_path / 'parts') == losses(tmp_path / 'run') and len(losses(tmp_path / 'run')) == 24


@pytest.mark.parametrize('settings, said', [
    (['--curriculum=bigrams'], "'bigrams'"), (['--weights=tales:1.5'], 'whole number'),
    (['--pacing_floor=0.001'], 'admits [0-9]+ tokens at first and a step reads 512'),
    (['--pacing_start=0.9'], 'pacing_end is 0.875, it must be more than pacing_start'), (['--pacing=fast'], 'linear')])
def test_curricula_that_cannot_be(main, settings, said):
    with pytest.raises(UserError, match=said):
        main(*paths('climb_data'), *settings)

"""Ideas written by README's chapter: of the net, of the optimizer, of the text."""
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as model_file
import prepare_data
import train
from config import context_rampup, cyclic_average
from conftest import ROOT, in_two_parts
from model import GPT, GPTConfig, KVCache
from prepare_data import UserError

CONFIG = ROOT / 'config'
DOMAINS, PLAIN = (str(CONFIG / f'{name}.py') for name in ('domains', 'plain_gpt2'))
GATE, LOOP, RAMP, SKIPS, VALUES, HIDDEN, ENSEMBLE, BIGRAMS, NORMUON, ROWS, CAUTIOUS, EVEN, RANDOM, NARROW, SNAPSHOTS, DISTILLED, CONTEXT, MIXED, DOWN = (str(CONFIG / f'{name}.py') for name in (
    'attention_gate', 'layer_loop', 'batch_rampup', 'skips', 'value_projections', 'masked_inputs', 'ensemble', 'bigrams', 'normuon',
    'row_muon', 'cautious_decay', 'even_mix', 'random_sources', 'factorised', 'snapshots', 'distilled', 'context_rampup', 'interleaved_heads', 'down_init'))
SHAPE = dict(vocab_size=257, bos=256, block_size=64, n_layer=4, n_head=2, n_embd=32)


def net(*ideas, base=None, **options):
    """A model of ideas without a weight that is 0, or with those of `base`."""
    ideas = prepare_data.Ideas([*ideas], [GPTConfig], strict=False)
    config = model_file.configured(ideas)(**SHAPE | options)
    torch.manual_seed(0)
    made = config.GPT(config).requires_grad_(False)
    if base is not None:
        made.load_state_dict(base.state_dict(), strict=False)
        return made
    for p in made.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return made


def some(B=2, T=48):
    idx = torch.randint(256, (B, T), generator=torch.Generator().manual_seed(1))
    idx[:, ::17] = 256
    return idx


def in_bits(model, idx):
    """Hidden states of idx, read a few tokens at a time."""
    cache = KVCache(model, len(idx))
    return torch.cat([model.trunk(part, cache) for part in idx.split([9, 1, 1, 20, 17], dim=1)], dim=1)


def weights(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)['model']


NETS = [(), ('attention_gate',), ('layer_loop',), ('skips',), ('value_embeds',), ('value_projections',), ('ensemble',), ('snapshots',), ('bigrams',),
        ('factorised',), ('mixture_head',), ('interleaved_heads',), ('window',), ('softcap',), ('tokenformer',), ('experts',), ('multi_token',), ('latent_attention',), ('domains',), ('wide',),
        ('latent_attention', 'layer_loop', 'attention_gate'), ('value_embeds', 'skips', 'ensemble'), ('window', 'layer_loop', 'bigrams', 'ensemble')]


def apart(model, idx, starts, step):
    """Logits of the last token of the rows of idx, of which each begins alone with so many tokens; in turn some rows are not there."""
    cache, alone = KVCache(model, len(idx)), []
    cache.go_apart()
    for row, start in zip(idx, starts):
        one = KVCache(model, 1)
        model.step(row[None, :start], one, **model.hints(row[None]))
        alone.append(one)
    at, found = [0] * len(idx), [None] * len(idx)
    for turn in range(2 * idx.shape[1]):
        for i, start in enumerate(starts):
            if turn == 2 * i:                                        # rows join one after the other
                cache.take(i, alone[i])
                at[i] = start
            if at[i] == 0 or at[i] == idx.shape[1]:                  # and leave
                cache.clear(i)
        new = torch.stack([row[at[i] % idx.shape[1]] for i, row in enumerate(idx)])[:, None]
        logits = step(new, cache, **model.hints(idx))
        for i in range(len(idx)):
            at[i] += 0 < at[i] < idx.shape[1]
            found[i] = logits[i] if at[i] == idx.shape[1] and found[i] is None else found[i]
    return torch.stack(found)


def test_what_members_have_for_training_alone_is_not_active():
    counts = net(*(str(CONFIG / f'{name}.py') for name in ('multi_token', 'ensemble')), members=3).params()
    assert counts['total'] - counts['active'] == 3 * net(str(CONFIG / 'multi_token.py')).config.n_embd ** 2


@pytest.mark.parametrize('keeper', ['snapshots', 'best_weights', 'cyclic_average'])
def test_loops_that_begin_late_are_not_for_weights_kept_before(keeper):
    s, ideas = train.read_settings([LOOP, str(CONFIG / f'{keeper}.py'), '--loop_from=0.5'])
    with pytest.raises(UserError, match=f'loop_from is 0.5, and {keeper}.py keeps weights from before it'):
        ideas.seam(train.Run)(s, ideas)
    s.loop_from = 0.0
    ideas.seam(train.Run)(s, ideas)


@pytest.mark.parametrize('names', NETS, ids='+'.join)
def test_rows_that_go_apart_are_what_the_full_forward_gives(names):
    model = net(*(str(CONFIG / f'{name}.py') for name in names), **dict(rotary_dim=8) if 'latent_attention' in names else {})
    idx = some(4, 40)
    found = apart(model, idx, [1, 30, 7, 18], model.step)
    hints = model.hints(idx)
    torch.testing.assert_close(found, model.logits(model.trunk(idx, **hints))[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize('names', ['', 'latent_attention layer_loop', 'value_embeds skips ensemble', 'tokenformer window', 'bigrams softcap factorised',
                                   'value_projections domains', 'attention_gate'])
def test_compiled_steps_are_the_full_forward_and_a_row_s_own_in_any_batch(names):
    torch._dynamo.reset()
    model = net(*(str(CONFIG / f'{name}.py') for name in names.split()), n_layer=2, **dict(rotary_dim=8) if 'latent' in names else {}).eval()
    idx = some(3, 24)
    model.compile_step()
    with torch.no_grad():
        found = apart(model, idx, [1, 15, 7], model.quick_step)
        alone = torch.cat([apart(model, idx[i:i + 1], [start], model.quick_step) for i, start in enumerate([1, 15, 7])])
        torch.testing.assert_close(found, model.logits(model.trunk(idx, **model.hints(idx)))[:, -1], rtol=1e-4, atol=1e-4)
        assert torch.equal(found, alone) or names == 'attention_gate' and (found - alone).abs().max() < 1e-5   # 12 numbers are added up otherwise
        ids = torch.stack(list(model.generate(idx, 50, temperature=0)), 1)           # past the block
        model.quick_step = None
        assert torch.equal(ids, torch.stack(list(model.generate(idx, 50, temperature=0)), 1))


@pytest.mark.parametrize('ideas', [[GATE], [LOOP], [SKIPS], [VALUES], [VALUES, SKIPS], [ENSEMBLE], [BIGRAMS], [BIGRAMS, ENSEMBLE], [NARROW], [MIXED], [VALUES, MIXED], [LOOP, GATE], [str(CONFIG / 'latent_attention.py'), LOOP, GATE]])
def test_a_cache_changes_nothing(ideas):
    model = net(*ideas, **dict(rotary_dim=8) if len(ideas) == 3 else {})
    torch.testing.assert_close(in_bits(model, some()), model.trunk(some()), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_a_cache_changes_nothing_in_any_pair():
    """Or the two are refused: what a cache leaves out of attention is a mistake that no loss shows."""
    together, idx = 0, some()
    for names in itertools.permutations([name for names in NETS if len(names) == 1 for name in names] + ['llama_shape', 'down_init'], 2):
        try:
            model = net(*(str(CONFIG / f'{name}.py') for name in names), **dict(rotary_dim=8) if 'latent_attention' in names else {}).eval()
        except (UserError, ValueError):
            continue
        together += 1
        torch.testing.assert_close(in_bits(model, idx), model.trunk(idx), rtol=2e-3, atol=2e-3, msg=lambda said, names=names: f'{names}: {said}')
    assert together > 200


def test_a_gate_is_open_at_first_and_its_head_s_own():
    idx, base = some(), net()
    gated = net(GATE, base=base)
    assert torch.equal(gated.trunk(idx), base.trunk(idx))
    for block in gated.blocks:
        block.attn.gate.weight[1] = 0.3 * torch.arange(12)           # of the second head alone
    assert (gated.trunk(idx) - base.trunk(idx)).abs().mean() > 1e-3
    for model in gated, base:
        for block in model.blocks:
            block.attn.proj.weight[:, 16:] = 0                       # what the second head says is lost
    assert torch.equal(gated.trunk(idx), base.trunk(idx))
    assert gated.flops_per_token() - base.flops_per_token() == 6 * 4 * 2 * 12
    with pytest.raises(ValueError, match='gate_channels is 33, n_embd only 32'):
        net(GATE, gate_channels=33)


def test_heads_that_share_are_plain_ones_with_mixed_projections():
    idx, base = some(), net(n_kv_head=1)
    mixed = net(MIXED, base=base, n_kv_head=1)
    for p in (p for block in mixed.blocks for p in block.attn.mixes):
        p.copy_(torch.eye(len(p)))
    torch.testing.assert_close(mixed.trunk(idx), base.trunk(idx))
    sizes = [p.shape for p in mixed.blocks[0].attn.mixes]
    assert sizes == [(2, 2), (1, 1), (1, 1)] and mixed.flops_per_token() - base.flops_per_token() == 6 * 4 * (4 + 1 + 1) * 16
    for plain, block in zip(base.blocks, mixed.blocks):
        queries, keys, values = block.attn.mixes
        queries.copy_(torch.tensor([[1, 0.5], [-0.3, 2]]))                   # a column says what a head takes of each
        keys.fill_(-0.7), values.fill_(1.5)
        first, second = plain.attn.q.weight.view(2, 16, 32)
        plain.attn.q.weight.copy_(torch.cat([first - 0.3 * second, 0.5 * first + 2 * second]))
        plain.attn.k.weight.mul_(-0.7), plain.attn.v.weight.mul_(1.5)
    torch.testing.assert_close(mixed.trunk(idx), base.trunk(idx), rtol=1e-4, atol=1e-4)


def test_every_mixture_of_heads_learns(main, tmp_path):
    main(MIXED)
    mixes = {k: w for k, w in weights(tmp_path / 'run').items() if '.mixes.' in k}
    assert mixes and not any(torch.equal(w, torch.eye(len(w))) for w in mixes.values())


def test_a_gate_compiles_to_one_graph():
    model, idx = net(GATE, n_layer=1), some()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend='eager')
    torch.testing.assert_close(compiled(idx, idx), model(idx, idx))


@pytest.mark.parametrize('times', [1, 2, 3])
def test_a_loop_is_the_deeper_model_that_it_looks_like(times):
    looped = net(LOOP, loop_times=times)
    order = [0, *[1, 2] * times, 3]
    deep = net(n_layer=len(order))
    of = {f'blocks.{i}.': f'blocks.{layer}.' for i, layer in enumerate(order)}
    ours = looped.state_dict()
    deep.load_state_dict({k: ours[of[k[:9]] + k[9:] if k[:9] in of else k] for k in deep.state_dict()})
    assert torch.equal(looped.trunk(some()), deep.trunk(some()))
    assert looped.flops_per_token(20) == deep.flops_per_token(20)
    assert looped.params() == GPT(GPTConfig(**SHAPE)).params()
    with pytest.raises(ValueError, match='loop_layers is 5, n_layer only 4'):
        net(LOOP, loop_layers=5)


def test_a_run_with_late_loops_that_was_stopped_at_its_end_is_measured_with_them(main, tmp_path):
    args = [LOOP, '--n_layer=3', '--max_steps=5', '--loop_from=0.5']
    main(*args)
    before = json.loads((tmp_path / 'run' / 'result.json').read_text())
    (tmp_path / 'run' / 'result.json').unlink()
    main(*args, '--init_from=resume')
    assert json.loads((tmp_path / 'run' / 'result.json').read_text())['val_bpb'] == before['val_bpb']


def test_a_loop_may_begin_late(main, tmp_path):
    args = [LOOP, '--n_layer=3', '--max_steps=4', '--overwrite']
    main(*args, '--loop_from=0.5')
    late = json.loads((tmp_path / 'run' / 'result.json').read_text())
    main(*args, '--loop_from=0.99')
    never = json.loads((tmp_path / 'run' / 'result.json').read_text())
    main(*args)
    always = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert late['flops'] == pytest.approx((never['flops'] + always['flops']) / 2) and never['flops'] < always['flops']
    assert late['flops_per_token'] == always['flops_per_token'] and len({r['val_bpb'] for r in (late, never, always)}) == 3


def test_generation_goes_over_a_full_block():
    model = net(LOOP, GATE)
    ids = torch.cat(list(model.generate(some(1, 60), 8, temperature=0)))
    idx = torch.cat([some(1, 60)[0], ids])[None]
    assert ids[1] == model.logits(model.trunk(idx[:, :61])[:, -1]).argmax()
    assert ids[5] == model.logits(model.trunk(idx[:, 33:65])[:, -1]).argmax()     # the older half is forgotten


RAMP_ARGS = [RAMP, '--max_steps=0', '--max_tokens=20000', '--tokens_per_step=2048']


def test_a_ramp_counts_its_tokens_and_ends_where_it_was_told(main, corpus, tmp_path):
    said = main(*RAMP_ARGS)
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    saved = torch.load(tmp_path / 'run' / 'ckpt.pt', weights_only=True)
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    at = [row['progress'] for row in rows if 'train_loss' in row]
    read = [round(20000 * (b - a)) for a, b in zip(at, at[1:])]
    assert '4 micro-steps of 8 x 64' in said and read == [512, 512, 512, 512, 1024, 1024, 1024, 1536, 1536, 1536, *[2048] * 5]
    assert result['tokens'] == sum(read) + 2048 == saved['rows_read'] * 64 == saved['tokens']
    assert 20000 <= result['tokens'] < 20000 + 2048 and result['steps'] == len(at)
    assert result['epochs'] == pytest.approx(result['tokens'] / len(corpus.open().tokens['train']), rel=0.02)
    assert result['flops'] == pytest.approx(result['tokens'] * result['flops_per_token'])


@pytest.mark.long
def test_a_stack_of_the_three_goes_on_to_the_bit(main, monkeypatch, tmp_path):
    args = [*RAMP_ARGS, GATE, LOOP]
    main(*args)
    in_two_parts(main, monkeypatch, 6, *args)
    whole, parts = weights(tmp_path / 'run'), weights(tmp_path / 'parts')
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert all(whole[f'blocks.{i}.attn.gate.weight'].abs().min() > 0 for i in range(2))          # it found an optimizer


def test_what_cannot_be_is_refused_in_a_sentence(main):
    with pytest.raises(UserError, match='loop_layers is 3, n_layer only 2'):
        main(LOOP, '--loop_layers=3')
    with pytest.raises(UserError, match='ramp_start'):
        main(RAMP, '--ramp_start=1.5')


def test_skips_of_nothing_are_the_base_and_each_ends_where_it_should():
    idx, base = some(), net()
    model = net(SKIPS, base=base)
    assert model.skips.tolist() == [pytest.approx(0.1)] * 2 and not torch.equal(model.trunk(idx), base.trunk(idx))
    model.skips.zero_()
    assert torch.equal(model.trunk(idx), base.trunk(idx))
    seen, taken = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: (taken.append(args[0]), seen.append(out)) and None)
    model.skips.copy_(torch.tensor([0.5, 0.25]))
    model.trunk(idx)
    torch.testing.assert_close(taken[2], seen[1] + 0.25 * seen[1])       # the third takes the second's
    torch.testing.assert_close(taken[3], seen[2] + 0.5 * seen[0])        # the last the first's
    assert model.flops_per_token() == base.flops_per_token()


def test_value_projections_begin_as_the_base_and_reach_the_values_alone():
    idx, base = some(), net()
    model = net(VALUES, base=base)
    assert torch.equal(model.trunk(idx), base.trunk(idx)) and model.blocks[0].attn.value_of_x0 is None
    assert model.flops_per_token() == base.flops_per_token() + 6 * 3 * 32 * 32
    for block in model.blocks[1:]:
        block.attn.value_of_x0.weight.add_(0.3)
    context = model_file.Context(idx, model.cos[:48], model.sin[:48], *model.visible(idx), None, dict(x0=torch.randn(2, 48, 32)))
    x = torch.randn(2, 48, 32)
    ours, theirs = (m.blocks[1].attn.packed(x, context) for m in (model, base))
    assert torch.equal(ours[:, :, :4], theirs[:, :, :4]) and not torch.equal(ours[:, :, 4:], theirs[:, :, 4:])


def test_masked_inputs_are_a_second_loss(main, corpus, tmp_path):
    """Of a weight of 0 it is the base's, hiding nothing it is too; the bytes have no token to hide others with."""
    rows = lambda: [json.loads(line)['train_loss'] for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines() if 'train_loss' in line]
    with pytest.raises(UserError, match='masked_inputs needs a token to hide others with'):
        main(HIDDEN, '--max_steps=2')
    bpe = ['--tokenizer=bpe', '--vocab_size=300', '--max_steps=4', '--overwrite']
    main(*bpe)
    base = rows()
    for more in ('--masked_inputs=0', '--hidden=0'):
        main(HIDDEN, *bpe, more)
        assert rows() == pytest.approx(base, rel=1e-5), more
    main(HIDDEN, *bpe)
    assert rows()[-1] > base[-1]
    result = json.loads((tmp_path / 'run/result.json').read_text())
    assert result['flops_per_token'] == pytest.approx(2 * 6 * (result['non_embedding_params'] + 64 * 300), rel=0.2)


@pytest.mark.parametrize('tied', [True, False])
def test_an_ensemble_is_the_mean_of_its_members_probabilities(tied):
    idx, model, one = some(), net(ENSEMBLE, tie_embeddings=tied), net(tie_embeddings=tied)
    state, targets = model.state_dict(), idx.roll(-1, 1)
    alone = []
    for prefix in ('', 'others.0.', 'others.1.'):
        alone.append(GPT(GPTConfig(**SHAPE, tie_embeddings=tied)).requires_grad_(False))
        alone[-1].load_state_dict({k: state[prefix + k] for k in alone[-1].state_dict()})
    assert not torch.equal(alone[0].wte.weight, alone[1].wte.weight)
    each = torch.stack([member(idx, targets, 'none') for member in alone])
    torch.testing.assert_close(model(idx, targets), each.mean())                 # in training each its own
    model.eval()
    torch.testing.assert_close(model(idx, targets, 'none'), -(-each).exp().mean(0).log())
    torch.testing.assert_close(model(idx, targets), model(idx, targets, 'none').mean())
    logits = model.logits(model.trunk(idx))
    torch.testing.assert_close(logits, torch.stack([member.logits(member.trunk(idx)).softmax(-1) for member in alone]).mean(0).log())
    assert model.params() == {kind: 3 * n for kind, n in one.params().items()}
    assert model.flops_per_token(20) == 3 * one.flops_per_token(20)


def test_every_member_learns(main, tmp_path):
    main(ENSEMBLE, '--members=2', '--tie_embeddings=True')
    trained = weights(tmp_path / 'run')
    main(ENSEMBLE, '--members=2', '--tie_embeddings=True', '--out_dir=still', '--learning_rate=0', '--embedding_lr=0', '--head_lr=0', '--scalar_lr=0')
    still = weights(tmp_path / 'still')
    assert {k for k in still if torch.equal(still[k], trained[k])} == set() and 'others.0.lm_head.weight' in still


def test_ideas_that_change_a_step_s_arithmetic_stack(main, tmp_path):
    """A second pass, shorter rows, late loops: each counts in what the others have."""
    def flops(*ideas):
        main(*ideas, '--tokenizer=bpe', '--vocab_size=300', '--max_steps=4', '--n_layer=3', '--eval_interval=0', '--overwrite')
        result = json.loads((tmp_path / 'run/result.json').read_text())
        return np.array([result['flops'], result['flops_per_token']])
    late = [LOOP, '--loop_from=0.5']
    for others in ([CONTEXT], late, [CONTEXT, *late]):
        alone = flops(*others)
        for stack in ([HIDDEN, *others], [*others, HIDDEN]):
            assert flops(*stack) == pytest.approx(2 * alone, rel=1e-6), stack
    assert flops(CONTEXT)[0] < flops()[0] and flops(CONTEXT, *late)[0] > flops(CONTEXT)[0]


def test_a_snapshot_is_of_a_cycle(main):
    with pytest.raises(UserError, match='cycles is 6 and members 4: a member is the end of a cycle, give both the same'):
        main(SNAPSHOTS, '--cycles=6')


def test_snapshots_of_another_run_are_not_this_one_s(main, tmp_path):
    parts = [SNAPSHOTS, '--cycles=3', '--members=3', '--max_steps=12']
    main(*parts, '--out_dir=first')
    main(*parts, '--out_dir=second', '--init_from=first')
    one, other = weights(tmp_path / 'first'), weights(tmp_path / 'second')
    assert one['taken'] == other['taken'] == 2
    for i in range(2):
        assert not torch.equal(one[f'others.{i}.blocks.0.mlp.up.weight'], other[f'others.{i}.blocks.0.mlp.up.weight'])


def test_what_is_asked_in_the_end_is_what_is_planned_for(main, monkeypatch):
    """All snapshots where one model learned, one where several taught it: at the start, and half way."""
    told, plan = [], train.Run.closing_seconds

    def watched(run):
        told.append(round(run.dearer(), 3))
        return plan(run)
    monkeypatch.setattr(train.Run, 'closing_seconds', watched)
    for stack, first, last in ((SNAPSHOTS, 4, 1), (DISTILLED, 0.25, 1), (ENSEMBLE, 1, 1)):
        told.clear()
        members = ['--members=4'] if stack == DISTILLED else []
        main(stack, *members, '--max_steps=8', f'--out_dir={Path(stack).stem}')
        assert (told[0], told[-1]) == (first, last)


def test_one_model_that_was_taught_has_no_members_to_teach_another(main):
    main(DISTILLED, '--members=2', '--max_steps=6', '--out_dir=first')
    with pytest.raises(UserError, match="first is of one model, that an ensemble taught: begin with an ensemble's run"):
        main(DISTILLED, '--init_from=first', '--max_steps=6', '--out_dir=second')


def test_snapshots_are_the_ends_of_cycles_and_answer_together(main, tmp_path, monkeypatch):
    ends, step = [], cyclic_average.Cycling.step

    def watched(run):
        step(run)
        if run.steps in (4, 8):
            ends.append({k: w.clone() for k, w in run.model.state_dict().items() if not k.startswith('others') and k != 'taken'})
    monkeypatch.setattr(cyclic_average.Cycling, 'step', watched)
    main(SNAPSHOTS, '--cycles=3', '--members=3', '--max_steps=12')
    made, run = weights(tmp_path / 'run'), json.loads((tmp_path / 'run/result.json').read_text())
    for i, end in enumerate(ends):
        assert all(torch.equal(made[f'others.{i}.{k}'], w) for k, w in end.items())
    assert run['snapshots'] == 3 and not torch.equal(made['others.0.wte.weight'], made['others.1.wte.weight'])
    model, idx = net(SNAPSHOTS, members=3), some()
    own = model(idx, idx.roll(-1, 1), 'none')
    model.eval()
    torch.testing.assert_close(model(idx, idx.roll(-1, 1), 'none'), own)          # none is taken yet
    model.taken += 2
    assert model.trunk(idx).shape[-1] == 3 * 32 and not torch.allclose(model(idx, idx.roll(-1, 1), 'none'), own)
    assert model.flops_per_token(20) == net().flops_per_token(20)


def test_members_teach_one_of_their_shape(main, tmp_path):
    """It begins as the first did end, learns of all, and is what is kept; the teachers' pass is counted."""
    parts = [DISTILLED, '--members=2', '--distil_from=0.5', '--max_steps=8']
    assert 'taught by 2 members' in main(*parts)
    made, result = weights(tmp_path / 'run'), json.loads((tmp_path / 'run/result.json').read_text())
    assert 'wte.weight' in made and not [k for k in made if k.startswith('others')] and result['config']['members'] == 1
    main(*parts, '--teacher_weight=0', '--out_dir=untaught')
    assert not torch.equal(made['wte.weight'], weights(tmp_path / 'untaught')['wte.weight'])
    main(ENSEMBLE, '--members=1', '--out_dir=one')
    one = json.loads((tmp_path / 'one/result.json').read_text())['flops_per_token']
    assert result['flops_per_token'] == pytest.approx(one * 5 / 3) and result['flops'] == pytest.approx(result['tokens'] * one * 11 / 6)


def test_what_members_teach_goes_on_to_the_bit(main, tmp_path, monkeypatch):
    args = DISTILLED, '--members=2', '--distil_from=0.3', '--max_steps=8'
    main(*args)
    in_two_parts(main, monkeypatch, 5, *args)
    whole, parts = weights(tmp_path / 'run'), weights(tmp_path / 'parts')
    assert all(torch.equal(parts[k], w) for k, w in whole.items())


def test_short_rows_are_the_parts_of_long_ones(main, tmp_path):
    """Quarters, halves and whole rows in turn; with a start of 1 the base's losses to the bit."""
    seen = []

    class Told:
        progress, s, parts_at, parts = 0.0, SimpleNamespace(context_start=0.25, context_end=0.5, block_size=64), context_rampup.Run.parts_at, 4
    assert [Told().parts_at(p) for p in (0, 0.1, 0.16, 0.17, 0.4, 0.49, 0.5, 1)] == [4, 4, 4, 2, 2, 2, 1, 1]
    idx = some(2, 64)

    class Asked(train.Run):
        def __init__(self):
            pass

        def batch_loss(self, **batch):
            seen.append(batch)

    class Cut(context_rampup.Run, Asked):
        pieces = 4
    Cut().batch_loss(idx=idx, targets=idx + 1, domain=torch.tensor([5, 7]))
    assert torch.equal(seen[0]['idx'], torch.cat([row.view(4, 16) for row in idx])) and torch.equal(seen[0]['targets'], seen[0]['idx'] + 1)
    assert seen[0]['domain'].tolist() == [5] * 4 + [7] * 4
    rows = {}
    for name, args in dict(base=[], whole=[CONTEXT, '--context_start=1'], short=[CONTEXT]).items():
        main(*args, '--max_steps=8', f'--out_dir={name}')
        rows[name] = [json.loads(line)['train_loss'] for line in (tmp_path / name / 'metrics.jsonl').read_text().splitlines() if 'train_loss' in line]
    assert rows['base'] == rows['whole'] != rows['short']
    flops = {name: json.loads((tmp_path / name / 'result.json').read_text())['flops'] for name in rows}
    assert flops['base'] == flops['whole'] > flops['short']


def test_members_are_made_of_what_is_named_before(main, tmp_path):
    late = tmp_path / 'late.py'
    late.write_text('import model\nclass GPT(model.GPT):\n    def final(self, x):\n        return 2 * super().final(x)\n')
    with pytest.raises(UserError, match=r'late.py and ensemble.py do not go together in this order: name ensemble.py after late.py'):
        main(ENSEMBLE, str(late))
    main(str(late), ENSEMBLE, VALUES, '--members=2', '--max_steps=1')
    assert 'others.0.blocks.1.attn.value_of_x0.weight' in weights(tmp_path / 'run')


def test_bigrams_begin_as_the_base_and_a_pair_has_its_row():
    idx, base = some(), net()
    model = net(BIGRAMS, base=base, bigram_rows=64)
    assert torch.equal(model.trunk(idx), base.trunk(idx)) and model.flops_per_token() == base.flops_per_token()
    pairs = torch.tensor([[7, 9, 7, 9, 256, 9, 9]])
    context = lambda idx: model_file.Context(idx, None, None, None, None, None, {})
    row, sign = model.pairs(context(pairs))
    assert row[0, 1] == row[0, 3] and sign[0, 1] == sign[0, 3] and {*sign.flatten().tolist()} <= {1, -1}
    assert row[0, 0] == model.pairs(context(torch.tensor([[7]])))[0] != row[0, 2]      # after nothing, not after a 9
    assert row[0, 4] == model.pairs(context(torch.tensor([[256]])))[0]                  # a document knows none before it
    many = torch.randint(256, (1, 20000), generator=torch.Generator().manual_seed(0))
    row, sign = model.pairs(context(many))
    counts = torch.bincount(row.flatten(), minlength=64)
    assert counts.min() > 200 and counts.max() < 450 and abs(sign.float().mean()) < 0.03
    model.bigrams.weight.normal_()
    assert not torch.equal(model.trunk(idx), base.trunk(idx))


def moved(kind, p, grads, decay=0.0):
    p = [torch.nn.Parameter(x.clone()) for x in p]
    optimizer = kind(p, 0.9, torch.float32)
    for group in optimizer.param_groups:
        group.update(lr=0.02, weight_decay=decay)
    for step in grads:
        for x, g in zip(p, step):
            x.grad = g.clone()
        optimizer.step()
    return [x.detach() for x in p]


def optimizer_of(idea):
    s, ideas = train.read_settings([idea])
    run = ideas.seam(train.Run).__new__(ideas.seam(train.Run))
    run.s = s
    return run.muon()


def test_normuon_evens_rows_and_keeps_the_length():
    torch.manual_seed(0)
    uneven = torch.randn(8, 6) * torch.tensor([10.0, 1, 1, 1, 1, 1, 1, 1e-3])[:, None]
    p = [torch.zeros(8, 6)]
    plain, even = (-moved(kind, p, [[uneven]])[0] for kind in (train.Muon, optimizer_of(NORMUON)))
    assert even.norm() == pytest.approx(plain.norm().item(), rel=1e-5)
    assert plain.norm(dim=1).min() < 0.5 * plain.norm(dim=1).max()
    torch.testing.assert_close(even.norm(dim=1), even.norm(dim=1).mean().expand(8), rtol=1e-4, atol=0)
    torch.testing.assert_close(F.normalize(even, dim=1), F.normalize(plain, dim=1))
    # a second step: of the mean of both steps' squares, each counted as it should be
    steps = [[torch.randn(8, 6)], [torch.randn(8, 6)]]
    first, second = (moved(train.Muon, p, steps[:n])[0] for n in (1, 2))
    a, b = -first, first - second
    mean = (0.95 * 0.05 * a.square().mean(1) + 0.05 * b.square().mean(1)) / (1 - 0.95 ** 2)
    wanted = b / mean.sqrt()[:, None]
    ours = moved(optimizer_of(NORMUON), p, steps[:1])[0] - moved(optimizer_of(NORMUON), p, steps)[0]
    torch.testing.assert_close(ours, wanted * b.norm() / wanted.norm(), rtol=1e-4, atol=1e-6)


def test_rows_of_one_length_before_muon():
    torch.manual_seed(0)
    p, g = [torch.zeros(6, 8)], torch.randn(6, 8)
    scale = torch.tensor([1e3, 1, 1, 1, 1, 1e-3])[:, None]
    plain = moved(train.Muon, p, [[F.normalize(g, dim=1)]])[0]
    torch.testing.assert_close(moved(optimizer_of(ROWS), p, [[scale * g]])[0], plain, rtol=1e-3, atol=1e-5)
    assert (moved(train.Muon, p, [[scale * g]])[0] - plain).abs().max() > 1e-3


def test_decay_is_cautious():
    torch.manual_seed(0)
    p, g = [torch.randn(6, 8)], [[torch.randn(6, 8)]]
    none, all_, some_ = (moved(kind, p, g, decay)[0] for kind, decay in (
        (train.Muon, 0.0), (train.Muon, 0.5), (optimizer_of(CAUTIOUS), 0.5)))
    towards = (p[0] - none) * p[0] > 0                       # what is subtracted has the weight's sign
    assert 10 < towards.sum() < 38
    torch.testing.assert_close(some_, torch.where(towards, all_, none), rtol=0, atol=1e-7)


def test_optimizers_go_on_to_the_bit(main, monkeypatch, tmp_path):
    args = [NORMUON, ROWS, CAUTIOUS, '--weight_decay=0.5']
    main(*args)
    in_two_parts(main, monkeypatch, 3, *args)
    whole, parts = weights(tmp_path / 'run'), weights(tmp_path / 'parts')
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    kept = torch.load(tmp_path / 'run' / 'ckpt.pt', weights_only=True)['optimizers'][0]['state'].values()
    assert {len(state) for state in kept} == {3}


def test_what_changes_muon_needs_it(main):
    for idea, name in ((NORMUON, 'normuon'), (CAUTIOUS, 'cautious_decay')):
        with pytest.raises(UserError, match=f'optimizer is adamw, and {name}.py changes Muon: leave one out'):
            main(idea, '--optimizer=adamw')


@pytest.mark.parametrize('idea, name, value', [(NARROW, 'table_dim', 16), (BIGRAMS, 'bigram_rows', 64), (ENSEMBLE, 'members', 2)])
def test_weights_of_another_run_bring_their_shape(main, tmp_path, idea, name, value):
    main(idea, f'--{name}={value}', '--out_dir=first')
    main(idea, '--init_from=first', '--out_dir=second')
    assert json.loads((tmp_path / 'second' / 'result.json').read_text())['config'][name] == value


def test_an_even_mix_reads_every_source_as_often(corpus):
    s, ideas = train.read_settings([*corpus.args, EVEN])
    data = corpus.open()
    stream = ideas.seam(train.Stream)(data, s)
    starts, places = stream.epoch(0)
    source = data.docs['train']['source'][np.searchsorted(data.docs['train']['start'], starts)]
    tokens = np.bincount(source, np.diff(places))
    tokens = tokens[tokens > 0]
    assert len(tokens) > 1 and tokens.max() < 1.15 * tokens.min() and tokens.sum() == pytest.approx(len(data.tokens['train']), rel=0.1)
    plain = np.bincount(data.docs['train']['source'], stream.lengths)
    assert plain[plain > 0].max() > 1.3 * plain[plain > 0].min()
    s.weights = f'{data.meta["sources"][0]}:3'
    assert ideas.seam(train.Stream)(data, s).weights[0] == 3


def test_an_even_mix_is_one_of_domains_too(corpus):
    shares = []
    for order in ([EVEN, DOMAINS], [DOMAINS, EVEN], [DOMAINS]):
        s, ideas = train.read_settings([*corpus.args, *order])
        shares.append(ideas.seam(train.Stream)(corpus.open(), s).had[-1])
    assert (shares[0] == shares[1]).all() and shares[0].max() < 1.2 * shares[0].min() and shares[2].max() > 1.3 * shares[2].min()


def test_what_gpt2_would_not_heed_is_refused(main):
    for more in ([EVEN], ['--weights=notes:2'], [BIGRAMS]):
        for order in ([PLAIN, *more], [*more, PLAIN]):
            with pytest.raises(UserError, match='leave out what weighs sources|GPT-2 has a model of its own'):
                main(*order)


def test_a_ramp_of_steps_says_how_much_it_reads(main, tmp_path):
    for more in (['--max_tokens=20000', '--max_steps=0'], ['--max_steps=12']):
        out = main(RAMP, *more, '--tokens_per_step=1024', '--micro_batch_size=4', f'--out_dir={more[0][2:12]}')
        read = json.loads((tmp_path / more[0][2:12] / 'result.json').read_text())['tokens']
        assert f'some {read:,} tokens' in out and read < 12 * 1024 + 20000 * (len(more) - 1)


def test_a_loop_counts_its_layers_alone():
    for others, options in (([], {}), ([str(CONFIG / 'mixture_head.py')], {}), ([NARROW], dict(table_dim=8)), ([str(CONFIG / 'multi_token.py')], {})):
        once, twice = (net(*others, LOOP, loop_layers=2, loop_times=n, **options).flops_per_token(20) for n in (1, 2))
        assert twice - once == net(n_layer=2).flops_per_token(20) - 6 * 257 * 32


def test_random_sources_are_as_many_and_are_others(corpus):
    s, ideas = train.read_settings([*corpus.args, RANDOM])
    run, before = ideas.seam(train.Run)(s, ideas), corpus.open()
    run.open()
    for split, docs in run.data.docs.items():
        ours, theirs = docs['source'], before.docs[split]['source']
        assert np.array_equal(np.bincount(ours), np.bincount(theirs)) and np.array_equal(docs['start'], before.docs[split]['start'])
    assert (run.data.docs['train']['source'] != before.docs['train']['source']).mean() > 0.2


@pytest.mark.parametrize('tied', [True, False])
def test_a_narrow_table_is_the_wide_one_of_its_product(tied):
    idx, model = some(), net(NARROW, table_dim=8, tie_embeddings=tied)
    V, C, E = 257, 32, 8
    assert model.params()['embedding'] == (1 if tied else 2) * V * E
    assert model.params()['total'] == net(tie_embeddings=tied).params()['total'] + (1 if tied else 2) * V * (E - C) + 2 * C * E
    wide, state = net(), model.state_dict()
    wide.load_state_dict({k: w for k, w in state.items() if not k.startswith(('wte', 'lm_head', 'narrow'))}, strict=False)
    wide.wte.weight.copy_(model.wte.weight @ model.wte.widen.weight.t())
    x = wide.trunk(idx)
    torch.testing.assert_close(model.trunk(idx), x, rtol=1e-4, atol=1e-4)
    h = F.normalize(x @ model.narrow.weight.t(), dim=-1) * E ** 0.5
    torch.testing.assert_close(model.logits(x), h @ model.lm_head.weight.t(), rtol=1e-4, atol=1e-4)
    assert model(idx, idx.roll(-1, 1)) == pytest.approx(F.cross_entropy(model.logits(x).flatten(0, 1), idx.roll(-1, 1).flatten()).item(), rel=1e-5)
    layers = sum(w.numel() for w in net().matrices()[:-1])
    assert sum(w.numel() for w in model.matrices()) == layers + 2 * C * E + V * E


def test_a_narrow_table_learns(main, tmp_path):
    main(NARROW, '--table_dim=16', '--tie_embeddings=True')
    trained = weights(tmp_path / 'run')
    main(NARROW, '--table_dim=16', '--tie_embeddings=True', '--out_dir=still', *(f'--{name}_lr=0' for name in ('embedding', 'head', 'scalar')), '--learning_rate=0')
    still = weights(tmp_path / 'still')
    assert {k for k in still if torch.equal(still[k], trained[k])} == set()


def test_an_mlp_that_does_not_begin_at_zero_teaches_its_first_matrix_from_the_first_step():
    for idea, size, learns in ((), 0, False), ((DOWN,), 0.5, True):
        ideas = prepare_data.Ideas([*idea], [GPTConfig], strict=False)
        config = model_file.configured(ideas)(**SHAPE, **dict(down_init=size) if idea else {})
        torch.manual_seed(0)
        net = config.GPT(config)
        net(some(), some()).backward()
        for block in net.blocks:
            assert block.mlp.down.weight.std().item() * 128 ** 0.5 == pytest.approx(size, rel=0.05)
            assert (block.mlp.up.weight.grad.abs().max() > 0) == learns

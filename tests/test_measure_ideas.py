"""The ideas that measure: text quality, frequency bias and anisotropy, Python problems, learning dynamics."""
import contextlib
import json
import lzma
import math
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model as model_file
import prepare_data
import sample
from config import dynamics, frequency_bias, humaneval, matrix_measures, text_quality
from conftest import ROOT, script
from model import GPT, GPTConfig
from prepare_data import UserError
from test_sample import BYTES, Writes, items_of, judge

CONFIG = ROOT / 'config'


def measure(module, data=None, evals='', eval_data='nowhere', run=None, **settings):
    """An idea's Measure, its settings as declared but for those given."""
    ideas = prepare_data.Ideas([str(CONFIG / f'{module.__name__[7:]}.py')], [])
    s = SimpleNamespace(**ideas.values | settings, evals=evals, eval_data=eval_data)
    return ideas.seam(sample.Measure)(s, BYTES, data, run=run)


def small(*ideas, **options):
    """A model of ideas; where an idea's file holds no code yet the test is left out."""
    ideas = prepare_data.Ideas([str(CONFIG / f'{name}.py') for name in ideas], [GPTConfig], strict=False)
    if len(ideas.named) < len(ideas.seen):
        pytest.skip('the idea has no code yet')
    torch.manual_seed(0)
    config = model_file.configured(ideas)(**dict(vocab_size=257, bos=256, block_size=64, n_layer=2, n_head=4, n_embd=64) | options)
    model = config.GPT(config)
    with torch.no_grad():
        for block in model.blocks:
            matrix_measures.projection(block.mlp).normal_(std=0.05)                # it begins as 0
    return model


@pytest.fixture
def ask(finished, capsys):
    """What sample.py prints of the finished run with ideas."""
    def run(*args):
        configs = [str(CONFIG / arg) if arg.endswith('.py') else str(arg) for arg in args]
        sample.main([str(finished[0]), *configs, '--device=cpu'])
        return capsys.readouterr().out
    return run


def test_ideas_that_measure_stack_and_say_what_they_cost(corpus):
    names = ['text_quality', 'frequency_bias', 'humaneval', 'dynamics']
    for order in names, names[::-1]:
        ideas = prepare_data.Ideas([str(CONFIG / f'{name}.py') for name in order], [])
        s = SimpleNamespace(**ideas.values, evals='text,anisotropy,bpb', eval_data='nowhere')
        made = ideas.seam(sample.Measure)(s, BYTES, corpus.open())
        assert {*made.known()} == {'bpb', 'text', 'anisotropy', 'python'}            # dynamics is of a finished run
        assert made.plan(8.0, 0.01) == dict(text=(25, pytest.approx(8)), anisotropy=(0, 0))
        assert made.seconds('python', 0.01) == pytest.approx(0.94)
    with pytest.raises(UserError, match='nowhere (holds|has) no Python problems'):
        ideas.seam(sample.Measure)(SimpleNamespace(**ideas.values, evals='python', eval_data='nowhere'), BYTES)


# ---- frequency bias, anisotropy

def test_frequency_bias_of_a_judge_that_goes_by_frequency():
    tokenizer, counts = prepare_data.ByteTokenizer(), np.ones(257)
    counts[[ord(c) for c in 'abcdef']] = [1, 10, 100, 1000, 10_000, 100_000]
    pairs = [dict(context='', good=x + 'z', bad=y + 'z') for x in 'abcdef' for y in 'abcdef' if x != y]
    items = items_of(pairs, tokenizer)
    often = -counts[items['ids'][items['start'][:-1] + 1]]               # each option's first byte, after BOS
    assert frequency_bias.frequency_bias(often, items, counts) == dict(frequency_bias=1.0, replaced=30)
    assert frequency_bias.frequency_bias(-often, items, counts) == dict(frequency_bias=-1.0, replaced=30)
    knows = np.array([0.0, 1.0] * 30)
    assert frequency_bias.frequency_bias(knows, items, counts)['frequency_bias'] == 0.0
    longer = [dict(context='', good='abz', bad='az')] * 4                # an insertion: nothing is replaced
    assert frequency_bias.frequency_bias(knows[:8], items_of(longer, tokenizer), counts) == dict(frequency_bias=0.0, replaced=0)


def test_anisotropy_of_states_that_are_known(corpus):
    data = corpus.open()
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, bos=256, block_size=64, n_layer=2, n_head=2, n_embd=64))
    one_way = torch.ones(64)

    def narrow(_, __, out):
        return out + 1e4 * one_way                    # after the second layer all point nearly one way
    hook = model.blocks[1].register_forward_hook(narrow)
    first, second = frequency_bias.anisotropy(model, data.tokens['val'], data.docs['val'])
    hook.remove()
    assert -0.1 < first < 0.9 and second > 0.999
    assert frequency_bias.anisotropy(model, data.tokens['val'], data.docs['val']) == pytest.approx([first, first], abs=0.2)


def test_pairs_on_the_command_line(ask, corpus, tmp_path):
    (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(dict(sentence_good=f'Mia lost the kite by the {a}.',
                                                              sentence_bad=f'Mia lost the kite by the {b}.')) + '\n'
                                              for a in ('tree', 'lake') for b in ('xqzw', 'kjvv')))
    out = ask('frequency_bias.py', f'--eval={tmp_path}/p.jsonl,anisotropy')
    assert re.search(r'^p +1.0000 .* 0.5000 +0.5000 +4 +0$', out, re.M) and re.search(r'frequency_bias .* on the 4 pairs', out)
    assert len(re.search('anisotropy per_layer: (.*)', out)[1].split(', ')) == 2
    data, pairs = corpus.open(), items_of([dict(context='', good='the kite', bad='the xqzw')] * 30)
    counts = frequency_bias.frequencies(data.tokens['train'], 257)
    assert counts.sum() == len(data.tokens['train']) and counts[256] == len(data.docs['train'])
    made, model = measure(frequency_bias, data), small()
    made.sets = dict(x=pairs)
    assert made.judge(model, 'x') == judge(model, pairs) | dict(frequency_bias=0.0, replaced=30)
    assert 'replaced 30' in made.line('x', made.judge(model, 'x'))
    assert measure(frequency_bias).verdict(np.zeros(60), pairs).keys() == judge(model, pairs).keys()      # without the data


# ---- learning dynamics

def numpy_pwcca(x, y):
    """PWCCA by inverse square roots of covariances, as the paper has it, in numpy."""
    x, y = (v - v.mean(0) for v in (x, y))

    def whiten(v):
        power, turn = np.linalg.eigh(v.T @ v)
        return turn @ np.diag(power ** -0.5) @ turn.T
    u, rho, _ = np.linalg.svd(whiten(x) @ (x.T @ y) @ whiten(y))
    h, _ = np.linalg.qr(x @ whiten(x) @ u[:, :len(rho)])
    alpha = np.abs(h.T @ x).sum(1)
    return (alpha / alpha.sum() * rho).sum()


def test_measures_against_numpy_in_float64():
    dice = np.random.default_rng(3)
    x, y = dice.standard_normal((200, 12)) * np.logspace(0, 2, 12) + 5, dice.standard_normal((200, 9))
    y[:, :4] += x[:, :4] - x[:, 4:8] ** 2 / 100
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    h = np.eye(200) - 1 / 200
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h                                        # by n x n Gram matrices: HSIC
    assert matrix_measures.linear_cka(a, b) == pytest.approx((k * l).sum() / ((k * k).sum() * (l * l).sum()) ** 0.5, rel=1e-10)
    assert matrix_measures.pwcca(a, b) == pytest.approx(numpy_pwcca(x, y), rel=1e-10) and matrix_measures.pwcca(a, b) < 0.9
    s = np.linalg.svd(x, compute_uv=False)
    p = s / s.sum()
    for turned in (a, a.T):
        ours = matrix_measures.describe(turned, turned)
        assert ours['effective_rank'] == pytest.approx(np.prod(p ** -p) / 12, rel=1e-9)
        assert ours['condition_number'] == pytest.approx(np.linalg.cond(x), rel=1e-9)
        assert ours['gini'] == pytest.approx(np.abs(np.abs(x)[:, :, None, None] - np.abs(x)).mean() / 2 / np.abs(x).mean(), rel=1e-9)
        assert ours['hoyer'] == pytest.approx((2400 ** 0.5 - np.abs(x).sum() / (x ** 2).sum() ** 0.5) / (2400 ** 0.5 - 1), rel=1e-9)
        assert ours['frobenius'] == pytest.approx(np.linalg.norm(x), rel=1e-9) and ours['max_abs'] == np.abs(x).max()
        assert ours['nuclear'] == pytest.approx(np.linalg.norm(x, 'nuc'), rel=1e-9)
    for height in (1e3, 1e5):                                         # float64 Gram matrices keep the smallest singular values
        q, r = (np.linalg.qr(dice.standard_normal((40, 40)))[0] for _ in 'qr')
        ill = torch.from_numpy((q * np.geomspace(1, 1 / height, 40)) @ r)
        assert matrix_measures.condition_number(matrix_measures.singular_values(ill)) == pytest.approx(height, rel=1e-3)


def test_measures_in_closed_form():
    torch.manual_seed(0)
    x = torch.randn(400, 10, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q
    other = torch.randn(400, 10, dtype=torch.float64)
    assert matrix_measures.linear_cka(x, 3 * x @ turn + 7) == pytest.approx(1) and matrix_measures.linear_cka(x, other) < 0.1
    assert matrix_measures.pwcca(x, x @ torch.randn(10, 10, dtype=torch.float64) - 2) == pytest.approx(1) and matrix_measures.pwcca(x, other) < 0.3
    half = torch.linalg.qr(x - x.mean(0)).Q
    assert matrix_measures.pwcca(half, half[:, :5]) == pytest.approx(1) and matrix_measures.linear_cka(half, half[:, :5]) == pytest.approx(0.5 ** 0.5)
    for matrix, rank, condition in ((torch.eye(6), 1, 1), (torch.outer(torch.arange(1., 5), torch.ones(7)), 1 / 4, math.inf),
                                    (torch.diag(torch.tensor([8., -2.])), math.exp(-.8 * math.log(.8) - .2 * math.log(.2)) / 2, 4)):
        s = matrix_measures.singular_values(matrix)
        assert matrix_measures.effective_rank(s) == pytest.approx(rank) and matrix_measures.condition_number(s) == pytest.approx(condition)
    flat, spike = -torch.ones(5, 20), torch.zeros(5, 20)
    spike[2, 3] = -4
    assert matrix_measures.gini(flat) == pytest.approx(0) and matrix_measures.gini(spike) == pytest.approx(99 / 100)
    assert matrix_measures.hoyer(flat) == pytest.approx(0) and matrix_measures.hoyer(spike) == pytest.approx(1)
    assert matrix_measures.norms(spike, matrix_measures.singular_values(spike)) == dict(frobenius=4, nuclear=4, max_abs=4)
    out, value = torch.randn(30, 4), torch.randn(4, 20)
    whole, core = matrix_measures.ov_circuit(out, value)
    assert torch.allclose(whole, out @ value) and core.shape == (4, 4)
    assert torch.allclose(matrix_measures.singular_values(core), torch.linalg.svdvals(whole.double())[:4], rtol=1e-5)


def test_sketches_keep_cka():
    torch.manual_seed(0)
    falls = torch.diag(torch.arange(1., 193) ** -0.7)                              # a spectrum as flat as activations have
    x, noise = (torch.randn(256, 192) @ falls @ torch.linalg.qr(torch.randn(192, 192)).Q for _ in 'xn')
    for y in (x, x + 0.2 * noise, x + noise, noise[:, :100]):
        assert abs(matrix_measures.linear_cka(matrix_measures.sketch(x), matrix_measures.sketch(y)) - matrix_measures.linear_cka(x, y)) < 0.01
    narrow = torch.randn(256, 40) + 3                                              # exact but for fp16
    assert matrix_measures.linear_cka(matrix_measures.sketch(narrow), narrow) == pytest.approx(1, abs=1e-6)
    assert matrix_measures.sketch(x).shape == (256, 64) and matrix_measures.sketch(1e9 * x).isfinite().all()
    nothing = matrix_measures.sketch(torch.ones(256, 192))                                  # as an MLP's output before its first step
    assert nothing.isfinite().all() and all(math.isnan(value) for value in matrix_measures.alike(nothing, matrix_measures.sketch(x), 'final').values())


@pytest.mark.parametrize('ideas, options', [([], dict(n_kv_head=2)), (['latent_attention'], dict(kv_latent=32, rotary_dim=8)),
                                            ([], dict(mlp='swiglu')), (['dropout'], dict(dropout=0.5))])
def test_what_a_probe_sees(corpus, ideas, options):
    """Activations, weights and gradients are the model's own; a circuit is what its head adds alone."""
    probe, model = dynamics.Probe(corpus.open(), 64, 'cpu'), small(*ideas, **options)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    seen = probe.look(model)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    model.eval()
    assert torch.equal(seen['head'][0][0], model.trunk(probe.idx)[:, ::2].flatten(0, 1))
    outs, heard = {}, [model.blocks[1].attn.proj, model.blocks[1].mlp.down]
    hooks = [m.register_forward_hook(lambda m, args, out: outs.update({m: (args[0], out)})) for m in heard]
    model(probe.idx, probe.targets).backward()
    for name, module in zip(('1.attn.proj', '1.mlp.down'), heard):
        (activations, _), (weight, _), (gradient, _) = seen[name]
        assert torch.equal(activations, outs[module][1][:, ::2].flatten(0, 1)) and activations.shape == (256, 64)
        assert torch.equal(weight, module.weight) and torch.allclose(gradient, module.weight.grad, atol=1e-7)
    head, gradient = (seen['head'][i][0] for i in (1, 2))
    assert torch.equal(head, model.lm_head.weight) and torch.allclose(gradient, model.lm_head.weight.grad, atol=1e-7)
    attn, value, group = model.blocks[1].attn, seen['1.attn.v'][0][0], 4 // model.config.n_kv_head
    D, w_v, w_o = 16, attn.v.weight, attn.proj.weight
    idx = torch.tensor([[256, 65]])                                     # the first position attends to itself alone
    first = {}
    hooks += [attn.proj.register_forward_hook(lambda m, args, out: first.update(mixed=args[0][0, 0]))]
    probe.idx, probe.targets = idx, idx
    assert torch.allclose(probe.look(model)['1.attn.v'][0][0][0], first['mixed'].view(-1, group, D)[:, 0].flatten() if group == 2
                          else first['mixed'], atol=1e-6)
    for head in range(4):
        o, k = slice(head * D, head * D + D), slice(head // group * D, head // group * D + D)
        (writes, _), (circuit, core), (change, core_of_change) = seen[f'1.attn.ov.{head}']
        assert torch.allclose(writes, value[:, k] @ w_o[:, o].T, atol=1e-6) and torch.allclose(circuit, w_o[:, o] @ w_v[k], atol=1e-6)
        along = w_o[:, o] @ w_v.grad[k] + attn.proj.weight.grad[:, o] @ w_v[k]
        assert torch.allclose(change, along, atol=1e-7)
        for whole, part in ((circuit, core), (change, core_of_change)):
            s = torch.linalg.svdvals(whole.double())
            assert torch.allclose(matrix_measures.singular_values(part)[:16], s[:16], rtol=1e-3, atol=1e-6 * s[0].item())


@pytest.mark.skipif(torch.cuda.is_available() or not model_file.triton, reason='kernels are interpreted only where there is no GPU')
def test_a_probe_sees_the_same_through_kernels(corpus, monkeypatch):
    probe, model = dynamics.Probe(corpus.open(), 64, 'cpu'), small(n_embd=32, n_head=2, n_layer=1)
    probe.idx, probe.targets = probe.idx[:1, :16].contiguous(), probe.targets[:1, :16].contiguous()
    plain = probe.look(model)
    monkeypatch.setattr(model_file, 'IN_USE', {'qk_norm', 'attention', 'cross_entropy', 'mlp'})
    for name, parts in probe.look(model).items():
        for (x, _), (y, _) in zip(parts, plain[name]):
            assert torch.allclose(x, y, atol=1e-5) and x.any()


def test_tokens_have_no_circuits(corpus):
    seen = dynamics.Probe(corpus.open(), 64, 'cpu').look(small('tokenformer', attn_tokens=32, mlp_tokens=48))
    assert list(seen) == ['0.attn.v', '0.attn.proj', '0.mlp.down', '1.attn.v', '1.attn.proj', '1.mlp.down', 'head']
    assert seen['1.mlp.down'][1][0].shape == (64, 48) and seen['1.attn.v'][0][0].shape == (256, 64)


def test_a_probe_over_growth_and_what_is_not_finite(corpus):
    """Sketches compare across widths; a layer that came later has no past; NaN is named and leaves the rest alone."""
    probe, narrow, wide = dynamics.Probe(corpus.open(), 64, 'cpu'), small(n_head=2), small(n_embd=128, n_layer=3)
    dice = torch.get_rng_state()
    assert probe.take(narrow, 0, 0.0, math.inf) == [] and probe.state['due'] == 0.00625
    assert probe.take(narrow, 0, 0.0, math.inf) == [] and len(probe.state['rows']) == 1
    with torch.no_grad():
        narrow.blocks[1].attn.v.weight[3, 5] = math.nan
    bad = probe.take(narrow, 10, 0.3, math.inf)
    assert {'1.attn.v activation', '1.attn.v weight', '1.attn.ov.0 weight', '1.mlp.down activation', '0.attn.v gradient'} <= {*bad}
    assert not {'0.attn.v activation', '0.attn.v weight', '1.mlp.down weight', '1.attn.ov.1 weight'} & {*bad} and probe.state['due'] == 0.4
    probe.take(wide, 20, 0.4, math.inf)
    probe.take(wide, 30, 0.95, math.inf)
    assert probe.state['due'] == math.inf
    found = json.loads(json.dumps(probe.finish()))
    assert torch.equal(dice, torch.get_rng_state())                                # a run draws what it would have
    assert (found['steps'], found['progress']) == ([0, 10, 20, 30], [0, 0.3, 0.4, 0.95])
    names, of = found['names'], found['measures']
    assert names[:4] == ['0.attn.v', '0.attn.proj', '0.mlp.down', '0.attn.ov.0'] and names[-2:] == ['2.attn.ov.3', 'head'] and len(names) == 22
    place = names.index
    assert all(len(row) == 22 for rows in of.values() for row in rows)
    assert of['cka_final'][2][place('2.mlp.down')] == 1 and of['cka_final'][0][place('2.mlp.down')] is None
    assert 0 < of['cka_final'][0][place('1.mlp.down')] < 1 and of['cka_final'][1][place('1.mlp.down')] is None
    assert of['cka_previous'][0][0] is None and of['cka_previous'][1][0] == 1 and 0 < of['cka_previous'][2][0] < 1
    assert of['cka_previous'][2][place('1.attn.v')] is None and of['weight_gini'][1][place('1.attn.v')] is None
    assert of['weight_gini'][1][0] == of['weight_gini'][0][0] > 0 and of['gradient_gini'][1][0] is None
    assert {'pwcca_final', 'gradient_effective_rank', 'weight_condition_number', 'activation_hoyer'} <= {*of}


@pytest.mark.parametrize('affordable, taken', [(100, 14), (20, 14), (19, 13), (13, 7), (8, 2), (2, 1)])
def test_probes_that_cost_more_than_their_share_are_fewer(corpus, monkeypatch, affordable, taken):
    """Here the first look takes 3 seconds, each after it one, and three are for the end."""
    probe, seconds = dynamics.Probe(corpus.open(), 64, 'cpu'), [0.0]
    monkeypatch.setattr(dynamics.time, 'monotonic', lambda: seconds[0])

    def look(model):
        seconds[0] += 1 if seconds[0] else 3
        return {}
    probe.look = look
    for step in range(1000):
        if step / 1000 >= probe.state['due']:
            probe.take(None, step, step / 1000, affordable / 0.02)
    at = [row['progress'] for row in probe.state['rows']]
    assert len(at) == taken and probe.state['seconds'] == taken + 3 and (taken == 1 or taken + 3 <= affordable - 3)


def test_a_compiled_model_is_not_compiled_again_for_a_probe(corpus):
    import torch._dynamo
    made, programs, model, probe = 0, [], small(n_layer=1, n_embd=32), dynamics.Probe(corpus.open(), 64, 'cpu')
    compiled = torch.compile(model, dynamic=False, backend=lambda graph, _: programs.append(graph) or graph.forward)
    idx = torch.randint(257, (2, 64))
    for step in range(2):
        compiled(idx, idx.clone()).backward()
        model.zero_grad()
        probe.take(model, step, step / 2, math.inf)
        made = made if step else len(programs)
    compiled(idx, idx.clone()).backward()
    assert len(programs) == made > 0


# ---- text quality

@pytest.mark.parametrize('chunk', [50, 1000, 1 << 18])
def test_what_stands_in_the_training_text(corpus, chunk):
    data = corpus.open()
    tokens, starts = data.tokens['train'][:8_000], data.docs['train']['start']
    docs = [text_quality.WORD.findall(BYTES.decode(ids).lower()) for ids in np.split(tokens, starts[(starts > 0) & (starts < 8_000)])]
    there = {gram for n in (1, 8) for gram in text_quality.ngrams(docs[:-1], n)}
    across = {tuple(a[-4:] + b[:4]) for a, b in zip(docs, docs[1:])} - there
    other = {gram[:7] + ('zebra',) for gram in there if len(gram) == 8} | {gram[::-1] for gram in there if len(gram) == 8} - there
    assert len(there) > 300 and len(across) > 50 and not any('🙂' in word for gram in there for word in gram)
    grams = there | across | other | {('zebra',), ('\0',)}
    assert text_quality.in_training(tokens, BYTES, grams, chunk) == there


def test_text_quality_of_a_text_counted_by_hand():
    result = text_quality.text_quality(Writes('The cat sat. The cat sat. The cat sat.'), BYTES, n=10)
    assert (result['accuracy'], result['items'], result['chance']) == (1, 10, None) and 0 < result['error'] < 0.1
    assert result['per_kind'] == pytest.approx(dict(ends_properly=1, ends=1, repeated_4=0.5, distinct_1=3 / 90,
                                                    distinct_2=3 / 80, distinct_3=3 / 70))
    cut = text_quality.text_quality(Writes('The cat sat. The ca'), BYTES, n=4, length=19)          # the last word is none
    assert cut['accuracy'] == cut['per_kind']['ends'] == 0 and cut['per_kind']['distinct_1'] == 3 / 16
    assert text_quality.text_quality(Writes('The cat sat. The cat sat.'), BYTES, n=4, length=12)['accuracy'] == 0
    assert text_quality.text_quality(Writes('and then'), BYTES, n=4)['per_kind']['ends'] == 1
    assert text_quality.text_quality(Writes('and then'), BYTES, n=4)['accuracy'] == 0


def test_text_quality_beside_the_held_out_text(corpus):
    data = corpus.open()
    text = BYTES.decode(data.tokens['train'][:data.docs['train']['start'][1]].tolist())
    copy = text_quality.text_quality(Writes(' ' + text), BYTES, data, n=40, length=250)
    assert copy['per_kind']['copied_8'] == copy['per_kind']['known_words'] == 1 and copy['per_kind']['ends'] == 1
    real = copy['held_out']
    assert real['ends'] == 1 and real['copied_8'] < 0.9 < real['known_words'] and real['distinct_2'] > 0.1
    odd = text_quality.text_quality(Writes(' xq zv kj bb xq zv kj bb.'), BYTES, data, n=40, length=250)
    assert odd['per_kind']['copied_8'] == odd['per_kind']['known_words'] == 0 and odd['held_out'].keys() == real.keys()
    halves = text_quality.text_quality(Writes('xq kite by the.'), BYTES, data, n=40)       # after a prompt, xq may end a word
    assert halves['per_kind']['known_words'] == (20 * 3 + 20 * 3) / (20 * 4 + 20 * 3)
    whole = text_quality.text_quality(Writes('x'), BYTES, data, n=10, length=10_000)['held_out']
    assert whole['ends'] == 1 and whole['ends_properly'] == 0         # these end in a smiling face
    prompts, (rest, ended) = text_quality.held_out(data, 40, 110, 1)
    assert {len(p) for p in prompts} == {1, 9} and all(p[0] == 256 for p in prompts)
    assert max(map(len, rest)) == 110 and [len(ids) < 110 for ids in rest] == ended and 5 < sum(ended) < 35


def test_text_quality_that_is_stopped(corpus):
    data, model = corpus.open(), Writes(' the kite.')
    assert text_quality.text_quality(model, BYTES, data, n=40, stop=lambda: True) is None
    asked = []
    half = text_quality.text_quality(model, BYTES, data, n=40, rows=20, stop=lambda: asked.append(1) or len(asked) > 15)
    assert half['items'] == 20 and half['share'] == 0.5 and half['per_kind'].keys() == half['held_out'].keys()
    assert 'known_words' not in half['per_kind'] and 'ends' in half['per_kind']        # there was no time to read the training text
    whole = measure(text_quality, data, texts=40, text_tokens=64).text(model)
    assert whole == text_quality.text_quality(model, BYTES, data, 40, 64) and 'share' not in whole


# ---- Python problems

FINE = 'def f():\n    return 1\n'
ESCAPES = dict(
    fork='import os\nfor _ in range(4):\n    os.fork()',
    starts='import subprocess\nsubprocess.run(["touch", "OUT/new"])', system='import os\nos.system("touch OUT/new")',
    writes='open("OUT/new", "w").write("x")', removes='import os\nos.remove("OUT/there")', renames='import os\nos.rename("OUT/there", "x")',
    links='import os\nos.symlink("OUT", "x")\nopen("x/new", "w")', up='import os\nos.mkdir("../new")', bytes_='import os\nos.open(b"OUT/new", os.O_CREAT)',
    socket='import socket\nsocket.socket()', kills='import os\nos.kill(os.getppid(), 9)', group='import os\nos.killpg(os.getpgid(os.getppid()), 9)')
ENDLESS = dict(loop='while True: pass', prints='while True: print("x" * 10 ** 6)', sleeps='import time\ntime.sleep(9)')
OTHERS = dict(
    memory='x = bytearray(1 << 29)', recursion='def g(): return g()\ng()',
    deep='import sys\nsys.setrecursionlimit(10 ** 9)\ndef g(): return g()\ng()', leaves='import sys\nsys.exit(0)', drops='import os\nos._exit(0)',
    files='for i in range(100): open(str(i), "w")', large='open("x", "wb").write(bytes(1 << 25))',
    threads='import threading\nthreading.Thread(target=print).start()')


def nothing_held(folder):
    return []


def left_behind(folder):
    """Processes that were started with a temporary folder below `folder`."""
    def belongs(pid):
        with contextlib.suppress(OSError):
            return f'TMPDIR={folder}'.encode() in humaneval.Path('/proc', pid, 'environ').read_bytes()
    return [pid for pid in os.listdir('/proc') if pid.isdigit() and belongs(pid)]


def contained(program, tmp_path, monkeypatch, **limits):
    out, temp = tmp_path / 'out', tmp_path / 'temp'
    out.mkdir(), temp.mkdir()
    (out / 'there').write_text('x')
    monkeypatch.setattr(humaneval.tempfile, 'tempdir', str(temp))
    stages, held = humaneval.judged(FINE + program.replace('OUT', str(out)) + '\n', 'assert f() == 1', **limits)
    assert [p.name for p in out.iterdir()] == ['there'] and not any(temp.iterdir()) and not left_behind(temp)
    return stages, held


linux = pytest.mark.skipif(sys.platform != 'linux', reason='programs are judged on Linux alone')


@linux
@pytest.mark.parametrize('layer', ['kernel', 'python'])
@pytest.mark.parametrize('name', ESCAPES)
def test_each_layer_alone_contains_an_escape(name, layer, tmp_path, monkeypatch):
    monkeypatch.setattr(humaneval, 'kernel_confines' if layer == 'python' else 'python_confines', nothing_held)
    source = humaneval.inspect.getsource
    monkeypatch.setattr(humaneval.inspect, 'getsource', lambda function: source(function).replace(
        'def nothing_held', f'def {"kernel" if layer == "python" else "python"}_confines'))
    stages, held = contained(ESCAPES[name], tmp_path, monkeypatch)
    if layer == 'kernel' and ('Landlock' not in held or 'seccomp' not in held):
        pytest.skip('the kernel has no Landlock or no seccomp')
    assert stages == ['parses']


@linux
@pytest.mark.parametrize('name', [*ENDLESS, *OTHERS])
def test_what_takes_too_much_is_contained(name, tmp_path, monkeypatch):
    assert contained((ENDLESS | OTHERS)[name], tmp_path, monkeypatch, seconds=1, memory=1 << 28)[0] == ['parses']


@linux
def test_a_program_reaches_its_stages():
    assert humaneval.judged(FINE, 'assert f() == 1')[0] == ['parses', 'runs', 'passes']
    assert humaneval.judged(FINE, 'assert f() == 2')[0] == ['parses', 'runs']
    assert humaneval.judged(FINE + 'import sys\ndef f(): sys.exit(0)\n', 'assert f() == 1')[0] == ['parses', 'runs']
    assert humaneval.judged(FINE + '1 / 0\n', 'assert f() == 1')[0] == ['parses']
    for text in ('def f(:', '(' * 100_000, 'x = "\0"', 'return 1', 'no body'):
        assert humaneval.judged(text, '')[0] == []
    own = 'import math, json, dataclasses, tempfile\nwith open("x", "w") as f: f.write("x")\ntempfile.TemporaryFile().write(b"x")\n'
    assert humaneval.judged(own + FINE, 'assert f() == 1')[0] == ['parses', 'runs', 'passes']


TASKS = [dict(task_id=f'{kind}/0', prompt='\n\ndef f(n):\n    """ n + 1 """\n', entry_point='f', test=test)
         for kind, test in dict(Right='def check(c):\n    assert c(1) == 2', Wrong='def check(c):\n    assert c(1) == 3').items()]


@linux
def test_python_tasks_by_hand(monkeypatch):
    result = humaneval.python_tasks(Writes('\n    return n + 1\nprint(f(3)\n'), BYTES, TASKS, n=2)
    assert result['accuracy'] == 0.5 and result['error'] == pytest.approx(0.5 / math.sqrt(2)) and result['items'] == 2
    assert result['per_kind'] == dict(Right=1, Wrong=0) and result['parses'] == result['runs'] == 1 and result['chance'] is None
    assert sum(result['held_by'].values()) == 4 and all('audit hook' in held for held in result['held_by'])
    for text in ('\n    return n +', '', '\nprint(3)', ')'):
        none = humaneval.python_tasks(Writes(text), BYTES, TASKS[:1])
        assert none['accuracy'] == none['parses'] == none['runs'] == 0 and none['flagged'] is None
    monkeypatch.setattr(humaneval.importlib.util, 'find_spec', lambda name: None)
    assert humaneval.flagged([FINE]) is None
    monkeypatch.setattr(sys, 'platform', 'win32')
    with pytest.raises(UserError, match='Linux'):
        humaneval.python_tasks(Writes(''), BYTES, TASKS)


def test_programs_that_bandit_flags():
    pytest.importorskip('bandit')
    assert humaneval.flagged([FINE, 'eval(input())\n', FINE, FINE]) == 0.25


def test_problems_from_files_and_folders(tmp_path):
    text = ''.join(json.dumps(task | dict(more=1)) + '\n' for task in TASKS).encode()
    for name, content in {'own.jsonl': text, 'HumanEval.jsonl': text, 'mbpp_v1.jsonl.xz': lzma.compress(text)}.items():
        (tmp_path / name).write_bytes(content)
    assert humaneval.read_problems(tmp_path / 'own.jsonl') == TASKS and humaneval.read_problems(tmp_path) == TASKS * 2
    (tmp_path / 'empty').mkdir()
    for name, content in {'cut.jsonl': b'{"task_id', 'other.jsonl': b'{"task_id": "x"}\n', 'none.jsonl': b'', 'list.jsonl': b'[]\n',
                          'number.jsonl': json.dumps(TASKS[0] | dict(test=1)).encode(), 'cut.jsonl.xz': lzma.compress(text)[:40]}.items():
        (tmp_path / 'empty' / name).write_bytes(content)
        with pytest.raises(UserError, match=f'{name} (holds|has) no'):
            humaneval.read_problems(tmp_path / 'empty' / name)
    for name in ('empty', 'gone'):
        with pytest.raises(UserError, match=name):
            humaneval.read_problems(tmp_path / name)


HUMANEVAL = ROOT.parent / 'shared' / 'data' / 'code' / 'humaneval.jsonl.xz'


@linux
@pytest.mark.skipif(not HUMANEVAL.exists(), reason='HumanEval is not here')
def test_reference_solutions_pass():
    rows = [json.loads(line) for line in lzma.open(HUMANEVAL)]
    assert len(humaneval.read_problems(HUMANEVAL)) == len(rows) == 164
    for row in rows[::40]:
        program, test = row['prompt'] + row['canonical_solution'], f'{row["test"]}\ncheck({row["entry_point"]})'
        assert humaneval.judged(program, test)[0] == ['parses', 'runs', 'passes'], row['task_id']
        assert humaneval.judged(row['prompt'] + '    return None\n', test)[0] == ['parses', 'runs'], row['task_id']


@linux
def test_python_tasks_that_are_stopped():
    tasks, asked = TASKS * 3, []
    text = '\n    return n + 1\nprint(f(3)\n'

    def stop(most):
        asked.append(1)
        return len(asked) > most
    generating = len(text.split('print')[0]) + 1
    some = humaneval.python_tasks(Writes(text), BYTES, tasks, n=2, stop=lambda: stop(generating + 5))
    assert some['items'] == 2 and some['share'] == pytest.approx(1 / 3) and some['accuracy'] == 0.5      # the fifth program is no problem's all
    assert humaneval.python_tasks(Writes(text), BYTES, tasks, stop=lambda: True) is None


def test_evaluations_on_the_command_line(ask, tmp_path):
    out = ask('text_quality.py', '--eval=text', f'--json={tmp_path}/told.json', '--text_tokens=60')
    result = json.loads((tmp_path / 'told.json').read_text())['text']
    assert re.search(r'known_words +0.\d+   held-out text 1.0000', out) and result['items'] > 50 and result['held_out']['known_words'] > 0.5
    with pytest.raises(UserError, match='problems'):
        ask('humaneval.py', '--eval=python', f'--eval_data={tmp_path}')
    (tmp_path / 'humaneval.jsonl').write_text(json.dumps(TASKS[0]) + '\n')
    (tmp_path / 'other.jsonl').write_text('{}')
    out = ask('humaneval.py', 'frequency_bias.py', '--eval=all', f'--eval_data={tmp_path}', '--python_tokens=8')
    assert 'left out: ' in out and 'other.jsonl holds no items' in out and 'humaneval.jsonl' not in out and 'anisotropy per_layer' in out
    if sys.platform == 'linux':
        assert re.search(r'^python +[01].0000 ', out, re.M) and re.search('^  parses +[01].0$', out, re.M) and 'audit hook' in out


# ---- learning dynamics of runs

def test_when_layers_settle(tmp_path):
    """Dips, gaps where nothing was measured, layers that came late, and one whose end is not known."""
    names, progress = ['0.attn.v', '0.mlp.down', '1.attn.v', '1.attn.ov.0', '1.attn.ov.1'], [0.0, 0.1, 0.2, 0.5, 1.0]
    cka = [[0.97, None, None, 0.2, 0.99], [0.3, 0.96, None, 0.95, 0.99], [0.96, None, 0.5, 0.96, None], [0.99, 0.98, 0.7, 0.97, None],
           [1.0, 1.0, 1.0, 1.0, None]]
    cka[3][4] = 0.9
    ranks = [[0.9, None, None, 0.6, 0.6], [0.9, 0.5, None, 0.7, 0.7], [0.8, 0.4, 0.9, 0.8, 0.8], [0.7, 0.3, 0.8, 0.7, 0.7], [0.6, 0.2, 0.7, 0.6, 0.6]]
    found = dict(steps=[*range(5)], progress=progress, names=names, measures=dict(cka_final=cka, weight_effective_rank=ranks))
    at = {name: dynamics.settled(found, name) for name in names}
    assert at == {'0.attn.v': 0.2, '0.mlp.down': 0.1, '1.attn.v': 1.0, '1.attn.ov.0': 0.1, '1.attn.ov.1': None}
    first, second = dynamics.layer_rows(found, at)
    assert (first['v'], first['down'], first['OV'], first['mean']) == (0.2, 0.1, None, pytest.approx(0.15))
    assert (second['v'], second['OV'], second['mean'], second['layer']) == (1.0, 0.1, pytest.approx(0.55), 'layer 1')
    assert [first[k] for k in ('first', 'highest', 'last')] == pytest.approx([0.9, 0.9, 0.4])
    assert [second[k] for k in ('first', 'highest', 'last')] == pytest.approx([0.6, 2.5 / 3, 1.9 / 3])
    (tmp_path / 'dynamics.json').write_text(json.dumps(found))
    made = measure(dynamics, run=tmp_path)
    result = made.other('dynamics', None)
    lines = [*made.lines('dynamics', result)]
    assert lines[0] == f'{tmp_path}: progress at which the projections of a layer settled' and json.dumps(result)
    assert lines[-1].startswith('60% of 5 projections are settled by 20% of training: CKA to the final is 0.95 or more')
    assert re.fullmatch(r'layer 0 +0\.200 +- +0\.100 +- +0\.150 +0\.900 +0\.900 +0\.400', lines[2])
    assert 'dynamics' not in measure(dynamics).known()
    with pytest.raises(UserError, match='no dynamics.json'):
        measure(dynamics, run=tmp_path / 'none').other('dynamics', None)


NAN = '''"""Something that is not finite, at two probes."""
import math

from config import dynamics


class Run(dynamics.Run):
    def probe_layers(self):
        look = dynamics.Probe.look

        def with_nan(model):
            seen = look(self.probe, model)
            if 0 < len(self.probe.state['rows']) < 3:
                seen['1.attn.v'][0][0][5, 3] = math.nan
            return seen
        self.probe.look = with_nan
        super().probe_layers()
'''


def losses(folder):
    rows = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    return [row['train_loss'] for row in rows if 'train_loss' in row]


def weights(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)


@pytest.mark.long
def test_dynamics_change_nothing_of_a_run(corpus, tmp_path):
    (tmp_path / 'with_nan.py').write_text(NAN)
    args = [*corpus.args, '--max_steps=8']
    said = {}
    for name, ideas in dict(plain=[], probed=[CONFIG / 'dynamics.py', tmp_path / 'with_nan.py']).items():
        code, said[name], err = script('train.py', *ideas, *args, f'--out_dir={name}', cwd=tmp_path)
        assert code == 0, err
    plain, probed = tmp_path / 'plain', tmp_path / 'probed'
    assert losses(plain) == losses(probed) and len(losses(plain)) == 8
    ours, theirs = weights(plain), weights(probed)
    assert all(torch.equal(ours['model'][k], theirs['model'][k]) for k in ours['model'])
    results = [json.loads((folder / 'result.json').read_text()) for folder in (plain, probed)]
    assert results[0]['val_bpb'] == results[1]['val_bpb'] and results[0]['sample'] == results[1]['sample']
    assert 'dynamics' not in said['plain'] + ''.join(results[0]) and not (plain / 'dynamics.json').exists()
    share = results[1]['dynamics_seconds'] / results[1]['total_seconds']
    assert results[1]['dynamics_share'] == pytest.approx(share) and 0 < share < 1 and '\ndynamics_share: ' in said['probed']
    found = json.loads((probed / 'dynamics.json').read_text())
    assert found['steps'] == [*range(9)] and found['progress'] == [i / 8 for i in range(9)] and len(found['names']) == 2 * (3 + 2) + 1
    assert 'warning: step 1 was probed, not finite: 1.attn.v activation\n' in said['probed'] and 'step 3 was probed' not in said['probed']
    v = found['names'].index('1.attn.v')
    assert [row[v] is None for row in found['measures']['cka_final']] == [False, True, True] + [False] * 6
    assert found['measures']['cka_final'][8] == [1] * 11
    assert all(0 < row[v] < 1 for row in found['measures']['weight_effective_rank'])
    page = (probed / 'report.html').read_text()
    assert 'Cka final' in page and 'Weight effective rank' in page


STOP = '''"""A run that is told to stop after nine steps."""
import train

stop_after: int = 9     # 1..: steps


class Run(train.Run):
    def step(self):
        super().step()
        self.stopping = self.steps == self.s.stop_after
'''


@pytest.mark.long
def test_a_probed_run_resumes(corpus, tmp_path):
    (tmp_path / 'stop.py').write_text(STOP)
    args = [CONFIG / 'dynamics.py', tmp_path / 'stop.py', *corpus.args, '--max_steps=12']
    assert script('train.py', *args, '--stop_after=99', '--out_dir=run', cwd=tmp_path)[0] == 0
    assert script('train.py', *args, '--out_dir=parts', cwd=tmp_path)[0] != 0
    assert not (tmp_path / 'parts' / 'result.json').exists()
    code, _, err = script('train.py', *args, '--out_dir=parts', '--init_from=resume', cwd=tmp_path)
    assert code == 0, err
    first, again = ((tmp_path / name / 'dynamics.json').read_text() for name in ('run', 'parts'))
    assert first == again and len(json.loads(first)['steps']) == 12
    assert len(weights(tmp_path / 'parts')['dynamics']['rows']) == 11              # the last probe comes after saving

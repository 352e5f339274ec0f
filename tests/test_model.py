"""model.py: what the model computes, against slow and plain definitions of the same."""
import math
import zlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as m
from model import GPT, GPTConfig

SMALL = dict(vocab_size=97, bos=0, block_size=64, n_layer=3, n_head=4, n_embd=32)
SHAPES = [dict(), dict(n_kv_head=2), dict(n_kv_head=1, mlp='swiglu'), dict(tie_embeddings=True),
          dict(tie_embeddings=True, mlp='swiglu', mlp_hidden=40), dict(head_dim=6), dict(qk_norm=False, doc_mask=False),
          dict(token_shift=False), dict(rotary_dim=4), dict(doc_mask=False, n_kv_head=2)]


def make(seed=0, std=0.15, **options):
    """A model of which no part is zero, so that every part shows in the output; a weight depends on its name alone."""
    model = GPT(GPTConfig(**SMALL | options))
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


# ---- the whole

@pytest.mark.parametrize('options', SHAPES)
def test_a_future_token_cannot_change_a_past_output(options):
    model, idx = make(**options), tokens(2, 40, (0, 13))
    before = logits(model, idx)
    for at in (39, 20, 13):
        other = idx.clone()
        other[:, at] = (other[:, at] + 5) % 90 + 1
        after = logits(model, other)
        assert torch.equal(before[:, :at], after[:, :at])
        assert not torch.allclose(before[:, at], after[:, at])


@pytest.mark.parametrize('options', [dict(), dict(n_kv_head=2)])
def test_another_document_cannot_change_an_output(options):
    model, idx = make(**options), tokens(1, 40, (0, 10, 25))
    before, other = logits(model, idx), idx.clone()
    other[:, 11:20] = other[:, 11:20] % 90 + 2
    after = logits(model, other)
    torch.testing.assert_close(before[:, 25:], after[:, 25:], rtol=0, atol=1e-6)
    assert torch.equal(before[:, :11], after[:, :11]) and (before[:, 20:25] != after[:, 20:25]).any()
    alone = logits(model, idx[:, 10:25])                  # rotary positions are relative: a document is the same anywhere
    torch.testing.assert_close(before[:, 10:25], alone, rtol=1e-4, atol=1e-4)
    without = make(**options | dict(doc_mask=False))
    assert not torch.allclose(logits(without, idx)[:, 25:], logits(without, other)[:, 25:])


@pytest.mark.parametrize('options', SHAPES)
@pytest.mark.parametrize('sizes', [[1] * 30, [17, 1, 1, 8, 3]])
def test_the_cache_gives_what_the_full_forward_gives(options, sizes):
    model, idx = make(**options), tokens(3, 30, (0,))
    idx[0, 9], idx[1, 17], idx[1, 18], idx[2, 29] = 0, 0, 0, 0        # rows with documents of their own
    cache = m.KVCache(model, 3)
    with torch.no_grad():
        pieces = [model.logits(model.trunk(piece, cache)) for piece in idx.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, idx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('options', SHAPES)
def test_counts_are_those_of_the_model(options):
    model = GPT(GPTConfig(**SMALL | options))
    tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)} | {model.lm_head.weight}
    embedding = sum(p.numel() for p in tables)
    total = sum(p.numel() for p in model.parameters())
    assert model.params() == dict(total=total, embedding=embedding, non_embedding=total - embedding, active=total)


@pytest.mark.parametrize('options', SHAPES)
def test_flops_are_those_of_the_products_made(options):
    model = GPT(GPTConfig(**SMALL | options))
    with FlopCounterMode(display=False) as counter:
        logits(model, tokens(2, 64))                      # one block of queries: every token meets all 64 positions
    assert 3 * counter.get_total_flops() == 2 * 64 * model.flops_per_token(attended=64)
    attended = sum(t + 1 for t in range(64)) / 64         # of one document
    assert model.flops_per_token() == model.flops_per_token(attended)


@pytest.mark.parametrize('options', [*SHAPES, dict(n_embd=128, vocab_size=1000)])
def test_the_loss_begins_at_log_V(options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | options))
    idx = tokens(4, 64)
    assert model(idx, idx.roll(-1, 1)).item() == pytest.approx(math.log(model.config.vocab_size), abs=0.15)


def test_forward_means_over_targets_that_count():
    model, idx = make(), tokens(2, 33)
    targets = idx.roll(-1, 1)
    targets[0, 5:9] = -1
    each = model(idx, targets, reduction='none')
    assert each.shape == idx.shape and (each[0, 5:9] == 0).all()
    expected = F.cross_entropy(logits(model, idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(model(idx, targets), expected)
    torch.testing.assert_close(each.sum() / (targets >= 0).sum(), expected)


@pytest.mark.parametrize('options', [dict(n_kv_head=2, mlp='swiglu'), dict(tie_embeddings=True, rotary_dim=4)])
def test_every_parameter_gets_a_gradient(options):
    model, idx = make(**options), tokens(2, 20)
    model(idx, idx).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize('wrong', [dict(n_kv_head=3), dict(n_embd=36, n_head=4), dict(n_embd=100, n_head=6), dict(head_dim=7),
                                   dict(rotary_dim=3), dict(rotary_dim=10)])
def test_a_config_that_makes_no_model_is_a_ValueError(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace('n_embd', 'n_embd|head_dim')):
        GPTConfig(**SMALL | wrong)


# ---- looking at the token before

def test_shift_moves_by_one_stops_at_a_document_and_goes_on_from_the_cache():
    x, follows = torch.randn(2, 3, 9, 4), torch.ones(2, 1, 9, 1, dtype=torch.bool)
    follows[1, 0, 5] = False
    expected = torch.zeros_like(x)
    for t in range(1, 9):
        expected[:, :, t] = x[:, :, t - 1]
    expected[1, :, 5] = 0
    assert torch.equal(m.shift(x, follows, 'any'), expected)
    cache = m.KVCache(make(), 2)
    parts = [m.shift(x[:, :, a:b], follows[:, :, a:b], 'any', cache) for a, b in ((0, 1), (1, 6), (6, 9))]
    assert torch.equal(torch.cat(parts, 2), expected)


@pytest.mark.parametrize('options', [dict(), dict(n_kv_head=2), dict(head_dim=6, n_kv_head=1)])
def test_attention_begins_by_copying_what_is_alike(options):
    model = GPT(GPTConfig(**SMALL | options))
    c = model.config
    for block in model.blocks:
        q, k, v = (w.weight.view(-1, c.head_dim, c.n_embd) for w in (block.attn.q, block.attn.k, block.attn.v))
        out = block.attn.proj.weight.t().reshape(c.n_head, c.head_dim, c.n_embd)
        for head in range(c.n_head):
            of = head // (c.n_head // c.n_kv_head)
            assert torch.equal(out[head], 0.3 * v[of])
        assert torch.equal(k, q[::c.n_head // c.n_kv_head])


def test_copying_from_the_context_is_learned_in_thirty_steps():
    """The second half of a row is the first, turned by a different number of places each step, so that only a
    search by content helps. Without token_shift the same model stays at ln 63 = 4.14 for more than a hundred."""
    import train
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, block_size=48, n_layer=2, n_head=2, n_embd=64))
    run, losses = train.Run(*train.read_settings(['--device=cpu'])), []
    run.dtype, run.progress, run.step_model = torch.float32, 0.3, model
    run.take_model(model)
    for _ in range(30):
        half = torch.randint(1, 64, (32, 24))
        row = torch.cat([half, half.roll(int(torch.randint(24, ())), 1)], 1)
        targets = F.pad(row[:, 1:], (0, 1), value=-1)
        targets[:, :24] = -1
        loss = run.loss(row, targets)
        loss.backward()
        losses.append(run.descend(loss.detach())[0])
    assert losses[0] > 3.9 and sum(losses[-5:]) / 5 < 1.5


# ---- generating

GOLDEN = [36, 36, 22, 49, 68, 22, 22, 19, 19, 54, 68, 66, 4, 12, 68, 49, 50, 18, 68, 64, 90, 54, 42, 96]


def greedy(model, idx, n):
    return torch.stack(list(model.generate(idx, n, temperature=0)), 1)


def test_golden_tokens():
    """The same ids for ever: a change that alters these alters the model."""
    ids = greedy(make(seed=11, std=0.3, n_kv_head=2), tokens(1, 5), 24)
    assert ids[0].tolist() == GOLDEN


def test_generate_takes_the_likeliest_of_the_full_forward():
    model, idx = make(std=0.4), tokens(2, 7)
    new = greedy(model, idx, 40)
    whole = torch.cat([idx, new], 1)
    assert torch.equal(logits(model, whole)[:, 6:-1].argmax(-1), new)


def test_generate_goes_on_beyond_block_size():
    model = make(std=0.4, block_size=16)
    for start in (1, 16, 30):                             # a prompt longer than a block is cut from the left
        new = greedy(model, tokens(2, start), 50)
        assert new.shape == (2, 50) and new.max() < SMALL['vocab_size']
    long = tokens(1, 30)
    assert torch.equal(greedy(model, long, 1), logits(model, long[:, -16:])[:, -1:].argmax(-1))
    assert torch.equal(greedy(model, long, 40), greedy(model, long[:, -16:], 40))
    with pytest.raises(ValueError, match='block_size is 16'):
        model.trunk(long)


def test_sampling_keeps_what_top_k_and_top_p_say():
    probs = torch.tensor([[0.4, 0.05, 0.3, 0.2, 0.05]]).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)

    def drawn(temperature=1.0, top_k=0, top_p=1.0):
        ids = m.sample_token(probs.log(), temperature, top_k, top_p, generator)
        return torch.bincount(ids, minlength=5) / len(ids)
    assert torch.allclose(drawn(), probs[0], atol=0.03)
    assert torch.allclose(drawn(top_k=2), torch.tensor([4, 0, 3, 0, 0]) / 7, atol=0.03)
    assert torch.allclose(drawn(top_p=0.69), torch.tensor([4, 0, 3, 0, 0]) / 7, atol=0.03)
    assert torch.allclose(drawn(top_p=0.71), torch.tensor([4, 0, 3, 2, 0]) / 9, atol=0.03)
    assert drawn(top_p=1e-6)[0] == drawn(temperature=0)[0] == drawn(temperature=0.01)[0] == 1
    assert drawn(temperature=1e-40)[0] == 1                # a 32-bit logit divided by it would be infinite
    squares = probs[0] ** 2 / (probs[0] ** 2).sum()
    assert torch.allclose(drawn(temperature=0.5), squares, atol=0.03)


# ---- the operations

@pytest.mark.parametrize('T, S', [(1, 1), (7, 7), (130, 130), (300, 300), (1, 50), (130, 200), (5, 131)])
@pytest.mark.parametrize('H, H_kv', [(4, 4), (4, 2), (6, 1)])
def test_attention_is_sdpa_with_a_mask(T, S, H, H_kv):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, requires_grad=True) for h, n in ((H, T), (H_kv, S), (H_kv, S)))
    i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
    first = (torch.rand(2, T) * (i[:, 0] + 1)).long()
    first[1] = 0
    seen = ((j <= i) & (j >= first[:, :, None]))[:, None]
    grouped = (x.repeat_interleave(H // H_kv, dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, *grouped, attn_mask=seen)
    got, weight = m.attention(q, k, v, first, 8 ** -0.5), torch.randn(2, H, T, 8)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (got, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('n, rows', [(1, 512), (130, 32), (64, 64)])
@pytest.mark.parametrize('ignored', ['none', 'some', 'first block', 'all'])
def test_linear_cross_entropy_is_cross_entropy_of_all_logits(n, rows, ignored):
    torch.manual_seed(0)
    x, w = torch.randn(n, 24, requires_grad=True), torch.randn(50, 24, requires_grad=True)
    targets = torch.randint(0, 50, (n,))
    targets[{'none': slice(0), 'some': slice(None, None, 3), 'first block': slice(rows), 'all': slice(None)}[ignored]] = -1
    z = x @ w.t()
    each = F.cross_entropy(z, targets, ignore_index=-1, reduction='none')
    expected = each.sum() / max(1, (targets >= 0).sum())
    got = m.linear_cross_entropy(x, w, targets, rows=rows)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(m.linear_cross_entropy(x, w, targets, 'none', rows), each)
    for a, b in zip(*(torch.autograd.grad(3 * loss, (x, w)) for loss in (got, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_rotary_knows_distances_only():
    torch.manual_seed(0)
    cos, sin = m.rotary_table(64, 16, 10000.0)
    q, k = (torch.randn(1, 1, 1, 16).expand(1, 1, 64, 16) for _ in 'qk')
    rq, rk = m.rotary(q, cos, sin), m.rotary(k, cos, sin)
    scores = (rq @ rk.mT)[0, 0]
    for distance in (0, 1, 5, 40):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-3, atol=1e-4)
    assert scores.diagonal(-5)[0] != scores.diagonal(-6)[0] != scores.diagonal(5)[0]
    torch.testing.assert_close(rq.norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(rq[0, 0, 0], q[0, 0, 0])


def test_rms_norm():
    x = 100 * torch.randn(3, 5, 16)
    torch.testing.assert_close(m.rms_norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert not m.rms_norm(torch.zeros(4)).isnan().any()


def test_bf16_stays_close_to_fp32():
    model, idx = make(n_kv_head=2), tokens(2, 64)
    exact = model(idx, idx.roll(-1, 1))
    model.compute_dtype = torch.bfloat16
    assert model.trunk(idx).dtype == torch.bfloat16
    assert model(idx, idx.roll(-1, 1)).item() == pytest.approx(exact.item(), rel=0.02)


def test_a_loss_by_blocks_is_that_of_the_whole():
    """Any loss of logits: here the squares of their distance from 1, over 7."""
    torch.manual_seed(0)
    x, w = torch.randn(10, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)

    def block(z, at):
        assert torch.allclose(z, x[at] @ w.t())
        return (z - 1).square().sum(), 2 * (z - 1) / 7
    for rows in (3, 10, 64):
        got, expected = m.BlockwiseLoss.apply(x, w, torch.tensor(7.0), rows, block), (x @ w.t() - 1).square().sum() / 7
        torch.testing.assert_close(got, expected)
        for a, b in zip(*(torch.autograd.grad(3 * loss, (x, w)) for loss in (got, expected))):
            torch.testing.assert_close(a, b)


# ---- seams

class Twice(m.MLP):
    def forward(self, x, context):
        return self.config_factor * super().forward(x, context)

    def __init__(self, config):
        super().__init__(config)
        self.config_factor = config.factor


def test_a_config_brings_the_classes_of_a_model_and_no_other():
    setting = SimpleNamespace(kind=float, default=2.0)
    ideas = SimpleNamespace(declared=dict(factor=setting), seam=lambda base: Twice if base is m.MLP else base)
    kind = m.configured(ideas)
    torch.manual_seed(0)
    other = kind.GPT(kind(**SMALL, factor=0.0))
    torch.manual_seed(0)
    plain = GPT(GPTConfig(**SMALL))
    assert type(other.blocks[0].mlp) is Twice and type(plain.blocks[0].mlp) is m.MLP and kind(**SMALL).factor == 2.0
    with torch.no_grad():
        for a in (*plain.blocks, *other.blocks):
            a.mlp.down.weight.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(logits(plain, tokens(1, 9)), logits(other, tokens(1, 9)))
    with torch.no_grad():
        for a in plain.blocks:
            a.mlp.down.weight.zero_()
    assert torch.equal(logits(plain, tokens(1, 9)), logits(other, tokens(1, 9)))


def test_extras_reach_every_layer_and_the_loss():
    seen = []

    class Listening(m.MLP):
        def forward(self, x, context):
            seen.append(context.extras)
            return super().forward(x, context)

    class Model(GPT):
        def loss(self, x, targets, reduction, word=None, **extras):
            seen.append(word)
            return super().loss(x, targets, reduction, **extras)
    ideas = SimpleNamespace(declared={}, seam={m.MLP: Listening, GPT: Model}.get)
    kind = m.configured(SimpleNamespace(declared={}, seam=lambda base: ideas.seam(base) or base))
    model, idx = kind.GPT(kind(**SMALL)), tokens(1, 9)
    model(idx, idx, word='hello')
    assert seen == [dict(word='hello')] * 3 + ['hello']


def test_the_whole_step_is_one_graph():
    torch.manual_seed(0)
    model, idx = make(), tokens(2, 64)
    expected = model(idx, idx.roll(-1, 1))
    expected.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    got = torch.compile(model, dynamic=False, fullgraph=True, backend='aot_eager')(idx, idx.roll(-1, 1))
    got.backward()
    torch.testing.assert_close(got, expected)
    for p, grad in zip(model.parameters(), grads):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


def test_blocks_are_compiled_once_for_all_and_for_training_alone(monkeypatch):
    """On a CPU; text of another shape, or without gradients, would be a program of its own if it was compiled."""
    import train
    from torch._dynamo.utils import counters
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **how: self.__dict__.update(
        _compiled_call_impl=torch.compile(self._call_impl, backend='aot_eager', **how)))
    torch.manual_seed(0)
    run = train.Run(*train.read_settings(['--device=cpu', '--compile=on']))
    run.model, idx = make(n_layer=3), tokens(2, 64)
    expected = run.model(idx, idx.roll(-1, 1))
    expected.backward()
    grads = [p.grad.clone() for p in run.model.parameters()]
    run.model.zero_grad()
    torch._dynamo.reset()
    counters.clear()
    got = run.compiled(run.model)(idx, idx.roll(-1, 1))
    got.backward()
    torch.testing.assert_close(got, expected)
    for p, grad in zip(run.model.parameters(), grads):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)
    run.energy = SimpleNamespace(turn=lambda to: to)
    with run.evaluating(), torch.no_grad():
        run.model(tokens(3, 40), tokens(3, 40))
    assert counters['stats']['unique_graphs'] == 1

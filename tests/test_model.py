"""model.py: what the model computes, against slow and plain definitions of the same."""
import dataclasses
import math
import zlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as m
from model import GPT, GPTConfig

SMALL = dict(vocab_size=97, bos=0, block_size=64, n_layer=3, n_head=4, n_embd=32)
SHAPES = [dict(), dict(n_kv_head=2), dict(n_kv_head=1, mlp='swiglu'), dict(tie_embeddings=True),
          dict(value_embeds=2, n_kv_head=2),
          dict(value_embeds=3, tie_embeddings=True, mlp='swiglu', mlp_hidden=40), dict(head_dim=6, logit_softcap=5.0),
          dict(qk_norm=False, doc_mask=False),
          dict(token_shift=False, value_embeds=1), dict(window=9, rotary_dim=4), dict(doc_mask=False, window=20, n_kv_head=2),
          dict(kv_latent=12, rotary_dim=4), dict(kv_latent=13, q_latent=20, rotary_dim=2, window=20, doc_mask=False),
          dict(kv_latent=12, rotary_dim=6, qk_norm=False), dict(kv_latent=10, rotary_dim=4, token_shift=False),
          dict(attn_tokens=24, mlp_tokens=80, n_kv_head=2, value_embeds=1), dict(attn_tokens=24, token_norm='gelu_norm'),
          dict(mlp_tokens=80, mlp_scale_tokens=60, head_dim=6)]


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


@pytest.mark.parametrize('options', [dict(), dict(n_kv_head=2, value_embeds=1)])
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
    assert model.config.params() == dict(total=total, embedding=embedding, non_embedding=total - embedding, active=total)


@pytest.mark.parametrize('options', SHAPES)
def test_flops_are_those_of_the_products_made(options):
    model = GPT(GPTConfig(**SMALL | options))
    with FlopCounterMode(display=False) as counter:
        logits(model, tokens(2, 64))                      # one block of queries: every token meets all 64 positions
    assert 3 * counter.get_total_flops() == 2 * 64 * model.config.flops_per_token(attended=64)
    c = model.config
    attended = sum(min(t + 1, c.window or 64) for t in range(64)) / 64        # of one document
    assert c.flops_per_token() == c.flops_per_token(attended)


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


@pytest.mark.parametrize('options', [dict(value_embeds=1, n_kv_head=2, mlp='swiglu'), dict(kv_latent=12, q_latent=20, rotary_dim=4),
                                     dict(value_embeds=1, n_kv_head=2, attn_tokens=24, mlp_tokens=80)])
def test_every_parameter_gets_a_gradient(options):
    model, idx = make(**options), tokens(2, 20)
    model(idx, idx).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize('wrong', [
    dict(n_layer=0), dict(n_head=0), dict(n_embd=0), dict(block_size=0), dict(vocab_size=-1), dict(mlp='gelu'),
    dict(n_kv_head=3), dict(n_embd=36, n_head=4), dict(n_embd=100, n_head=6), dict(head_dim=7), dict(value_embeds=4), dict(value_embeds=-1),
    dict(kv_latent=-1), dict(q_latent=8), dict(kv_latent=8), dict(kv_latent=8, rotary_dim=4, n_kv_head=2),
    dict(kv_latent=8, rotary_dim=4, value_embeds=1), dict(attn_tokens=8, kv_latent=8, rotary_dim=4),
    dict(attn_tokens=-1), dict(mlp_scale_tokens=-1), dict(token_norm='softmax')])
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


def test_latent_attention_begins_by_looking_for_what_is_alike():
    layer = GPT(GPTConfig(**SMALL, kv_latent=12, rotary_dim=4, token_shift=False, qk_norm=False)).blocks[0].attn
    q, k, _ = layer.packed(torch.randn(2, 5, 32), tokens(2, 5)).split(4, dim=2)             # (B, T, H, D) each
    for made, wanted in zip(q.split(4, dim=-1), k.split(4, dim=-1)):                        # of r, of the latent
        torch.testing.assert_close(F.normalize(made, dim=-1), F.normalize(wanted, dim=-1))
    copied = layer.v.weight @ layer.down.weight[4:]
    torch.testing.assert_close(layer.proj.weight, 0.3 * copied.t())


@torch.no_grad()
@pytest.mark.parametrize('norm', ['norm_gelu', 'gelu_norm'])
def test_attention_made_of_tokens_begins_by_copying_too(norm):
    torch.manual_seed(0)
    attn = GPT(GPTConfig(vocab_size=20, n_layer=1, n_embd=128, attn_tokens=96, token_norm=norm)).blocks[0].attn
    x = torch.randn(500, 128)
    back = attn.proj(attn.v(x))
    assert torch.equal(attn.q(x), attn.k(x))
    assert F.cosine_similarity(back, x).mean() > 0.25 and 0.25 < back.square().mean().sqrt() < 0.5


@pytest.mark.parametrize('options', [dict(), dict(attn_tokens=48, mlp_tokens=192)])
def test_copying_from_the_context_is_learned_in_thirty_steps(options):
    """The second half of a row is the first, turned by a different number of places each step, so that only a
    search by content helps. Without token_shift the same model stays at ln 63 = 4.14 for more than a hundred."""
    import train
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, block_size=48, n_layer=2, n_head=2, n_embd=64, **options))
    s = train.read_settings([])
    optimizers, losses = train.make_optimizers(model, s, torch.float32), []
    for _ in range(30):
        half = torch.randint(1, 64, (32, 24))
        row = torch.cat([half, half.roll(int(torch.randint(24, ())), 1)], 1)
        targets = F.pad(row[:, 1:], (0, 1), value=-1)
        targets[:, :24] = -1
        losses.append(train.train_step(model, model, optimizers, [(row, targets)], 0.3, s)[0])
    assert losses[0] > 3.9 and sum(losses[-5:]) / 5 < 1.5


# ---- parameters as tokens

def pattention(n, scale_tokens=0, norm='norm_gelu', fan_in=24, fan_out=20):
    layer = m.Pattention(fan_in, fan_out, n, scale_tokens or n, norm).double()
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
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)     # eps is in the one and not the other


@pytest.mark.parametrize('norm', ['norm_gelu', 'gelu_norm'])
def test_pattention_begins_with_outputs_as_large_as_its_inputs(norm):
    torch.manual_seed(0)
    x = torch.randn(200, 256, dtype=torch.double)
    for n in (128, 1024):
        y = pattention(n, norm=norm, fan_in=256, fan_out=256)(x)
        assert y.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)


@torch.no_grad()
@pytest.mark.parametrize('norm', ['norm_gelu', 'gelu_norm'])
def test_appended_tokens_change_nothing_while_the_scale_stays(norm):
    torch.manual_seed(0)
    old, x = pattention(256, norm=norm), torch.randn(100, 24, dtype=torch.double)
    before = old(x)

    def error(more, scale_tokens, zero_keys=True):
        wide = pattention(256 + more, scale_tokens, norm)
        wide.append(old, zero_keys, torch.Generator().manual_seed(1))
        assert wide.values.weight[:, 256:].std().item() == pytest.approx(old.values.weight.std().item(), rel=0.1)
        return ((wide(x) - before).norm() / before.norm()).item()
    following, random = [], []
    for more in (64, 256, 768):
        assert error(more, 256) < 1e-10
        following.append(error(more, 0))
        random.append(error(more, 0, zero_keys=False))
    assert 0.05 < following[0] < following[1] < following[2]
    assert random[0] < random[1] < random[2] and all(a < b for a, b in zip(following, random))
    if norm == 'norm_gelu':          # the sizes that the arithmetic gives: sqrt(added / old) for random keys
        assert following == pytest.approx([0.14, 0.48, 1.13], abs=0.05)
        assert random == pytest.approx([0.5, 1.0, 1.73], abs=0.15)


def test_appended_tokens_learn_at_once_by_their_keys():
    torch.manual_seed(0)
    old, wide = pattention(32), pattention(48, 32)
    wide.append(old)
    wide(torch.randn(10, 24, dtype=torch.double)).square().sum().backward()
    keys, values = wide.keys.weight.grad[32:], wide.values.weight.grad[:, 32:]
    assert keys.abs().min() > 0 and not values.any()     # values from the second step on
    wide.zero_grad()
    wide.append(old, zero_keys=False)
    wide(torch.randn(10, 24, dtype=torch.double)).square().sum().backward()
    assert wide.keys.weight.grad[32:].any() and wide.values.weight.grad[:, 32:].any()


@pytest.mark.parametrize('norm', ['norm_gelu', 'gelu_norm'])
def test_a_model_with_more_tokens_computes_what_it_did(norm):
    old = make(attn_tokens=24, mlp_tokens=80, n_kv_head=2, value_embeds=1, token_norm=norm).double()
    config = dataclasses.replace(old.config, attn_tokens=40, mlp_tokens=128)       # the scales stay
    assert (config.attn_scale_tokens, config.mlp_scale_tokens) == (24, 80)
    assert '40 attention tokens, 128 feed-forward tokens' in config.describe()
    new = GPT(config).double()
    rest = {name: p for name, p in old.state_dict().items() if 'keys' not in name and 'values' not in name}
    new.load_state_dict(rest, strict=False)
    for a, b in zip(new.modules(), old.modules()):
        if isinstance(a, m.Pattention):
            a.append(b)
    old.compute_dtype = new.compute_dtype = torch.float64
    torch.testing.assert_close(logits(new, tokens(2, 30)), logits(old, tokens(2, 30)), rtol=0, atol=1e-10)
    follows = GPT(dataclasses.replace(config, attn_scale_tokens=0)).double()
    follows.load_state_dict(new.state_dict())
    follows.compute_dtype = torch.float64
    assert not torch.allclose(logits(follows, tokens(2, 30)), logits(old, tokens(2, 30)), atol=1e-3)


# ---- generating

GOLDEN = [36, 54, 22, 49, 42, 18, 36, 68, 49, 50, 30, 42, 23, 19, 3, 54, 11, 64, 95, 36, 54, 54, 68, 96]


def greedy(model, idx, n):
    return torch.stack(list(model.generate(idx, n, temperature=0)), 1)


def test_golden_tokens():
    """The same ids for ever: a change that alters these alters the model."""
    ids = greedy(make(seed=11, std=0.3, value_embeds=1, n_kv_head=2), tokens(1, 5), 24)
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
@pytest.mark.parametrize('cap', [0.0, 3.0])
@pytest.mark.parametrize('ignored', ['none', 'some', 'first block', 'all'])
def test_linear_cross_entropy_is_cross_entropy_of_all_logits(n, rows, cap, ignored):
    torch.manual_seed(0)
    x, w = torch.randn(n, 24, requires_grad=True), torch.randn(50, 24, requires_grad=True)
    targets = torch.randint(0, 50, (n,))
    targets[{'none': slice(0), 'some': slice(None, None, 3), 'first block': slice(rows), 'all': slice(None)}[ignored]] = -1
    z = x @ w.t()
    z = cap * torch.tanh(z / cap) if cap else z
    each = F.cross_entropy(z, targets, ignore_index=-1, reduction='none')
    expected = each.sum() / max(1, (targets >= 0).sum())
    got = m.linear_cross_entropy(x, w, targets, cap, rows=rows)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(m.linear_cross_entropy(x, w, targets, cap, 'none', rows), each)
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


# ---- growth

def double(model):
    model = model.double()
    model.compute_dtype = torch.float64
    model.cos, model.sin = m.rotary_table(model.config.block_size, model.config.rotary_dim, model.config.rope_base)
    return model


GROWTHS = [dict(n_embd=64), dict(n_embd=96), dict(mlp_hidden=256), dict(n_head=8), dict(n_layer=7), dict(n_embd=64, n_layer=6),
           dict(n_embd=128, mlp_hidden=384, n_head=8)]


@pytest.mark.parametrize('changes', GROWTHS)
@pytest.mark.parametrize('options', SHAPES)
def test_a_grown_model_computes_the_same(options, changes):
    if 'mlp_hidden' in options and 'mlp_hidden' in changes:
        changes = changes | dict(mlp_hidden=2 * options['mlp_hidden'])
    elif 'mlp' in options and 'mlp_hidden' in changes:
        changes = changes | dict(mlp_hidden=4 * GPTConfig(**SMALL | options).mlp_hidden)
    old, idx = double(make(**options)), tokens(2, 40, (0, 13))
    new, came_from = m.grow(old, m.grown_config(old.config, changes))
    assert all(getattr(new.config, k) == v for k, v in changes.items()) and new.config.head_dim == old.config.head_dim
    with torch.no_grad():                                              # logits() gives fp32
        before, after = (x.lm_head(x.trunk(idx)) for x in (old, new))
    assert (after - before).abs().max() < 1e-10 and before.std() > 0.1
    if 'n_embd' in changes:                                            # and again
        twice = m.grow(new, m.grown_config(new.config, dict(n_embd=2 * new.config.n_embd)))[0]
        with torch.no_grad():
            assert (twice.lm_head(twice.trunk(idx)) - before).abs().max() < 1e-10
    silent = m.grow(old, new.config, math.inf)[0]
    assert ('n_embd' in changes) <= any((a != b).any() for a, b in zip(new.parameters(), silent.parameters()))


# ---- objectives and regularisers

def test_dropout_leaves_out_the_share_it_says_of_what_a_layer_adds():
    out, module = torch.ones(3, 500, 64), torch.nn.Linear(1, 1)
    thin = m.thin_out(0.2, 0.0, module, (), out)
    assert (thin == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    torch.testing.assert_close(thin[thin != 0], torch.full((int((thin != 0).sum()),), 1 / 0.8))
    rows = m.thin_out(0.0, 0.3, module, (), torch.ones(5000, 2, 3)).flatten(1)
    assert (rows == rows[:, :1]).all() and rows.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (rows == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize('options', [dict(dropout=0.3), dict(layer_drop=0.9)])
def test_dropout_is_of_training_alone_and_reaches_every_branch(options):
    model, plain, idx = make(**options), make(), tokens(4, 20)
    assert torch.equal(model.trunk(idx), plain.trunk(idx))                   # make() is in eval mode
    model.train()
    assert not torch.equal(model.trunk(idx), model.trunk(idx))
    assert [len(b._forward_hooks) for block in model.blocks for b in (block.attn, block.mlp)] == [1] * 6
    assert not any(module._forward_hooks for module in plain.modules())      # off, it is not there at all
    torch.manual_seed(0)                                                     # in depth the chance rises: 0.3, 0.6, 0.9 of 0.9
    ones = torch.ones(4000, 1, 1)
    kept = [(list(block.mlp._forward_hooks.values())[0](block.mlp, (), ones) != 0).float().mean().item() for block in model.blocks]
    assert kept == pytest.approx([1 - model.config.layer_drop * (i + 1) / 3 if model.config.layer_drop else 0.7 for i in range(3)], abs=0.03)


@pytest.mark.parametrize('norm', ['norm_gelu', 'gelu_norm'])
def test_a_model_grown_by_tokens_computes_the_same(norm):
    """Exactly with zero keys and the old scale; with random keys, as the authors' code does it, it does not."""
    old, idx = double(make(attn_tokens=24, mlp_tokens=80, token_norm=norm)), tokens(2, 40, (0, 13))
    changes = dict(attn_tokens=40, mlp_tokens=100, n_layer=4)
    with torch.no_grad():
        before = old.lm_head(old.trunk(idx))
        new, came_from = m.grow(old, m.grown_config(old.config, changes))
        assert (new.lm_head(new.trunk(idx)) - before).abs().max() < 1e-10 and new.config.attn_scale_tokens == 24
        other, _ = m.grow(old, m.grown_config(old.config, changes, True), random_tokens=True)
        assert (other.lm_head(other.trunk(idx)) - before).abs().max() > 1e-3 and other.config.attn_scale_tokens == 40
    p = next(b for b in new.blocks if b.mlp.keys.weight in came_from).mlp.keys.weight
    q, copies, how = came_from[p]
    state = m.spread(q, p.shape, how)
    assert copies == 1 and torch.equal(state[:80], q) and not state[80:].any()
    for wrong in (dict(attn_tokens=12), dict(attn_tokens=48, n_embd=64), dict(attn_tokens=48, n_head=8)):
        with pytest.raises(ValueError, match='attn_tokens grows by more|cannot grow at once'):
            m.grown_config(old.config, wrong)
    with pytest.raises(ValueError, match='attn_tokens grows by more'):
        m.grown_config(make().config, dict(attn_tokens=8))


def ahead(**options):
    return make(predict_ahead=3, **options), tokens(3, 30, (0, 9, 10, 20))


@pytest.mark.parametrize('options', [dict(), dict(tie_embeddings=True, logit_softcap=5.0, head_scale=0.5)])
def test_further_tokens_are_predicted_within_their_document(options):
    """Against a loop over rows, positions and distances; a document's end, the next one's BOS, is still predicted."""
    model, idx = ahead(**options)
    targets = torch.cat([idx[:, 1:], torch.tensor([[5], [0], [7]])], 1)
    x, expected = model.trunk(idx), model(idx, targets, ahead=0.0)
    for k, further in enumerate(model.ahead, 1):
        each = []
        for row in range(3):
            whole = [*idx[row].tolist(), targets[row, -1].item()]
            for t in range(30):
                if t + 1 + k < len(whole) and 0 not in whole[t + 1:t + 1 + k]:
                    h = m.rms_norm(x[row, t] + further.weight @ x[row, t]) * model.config.head_scale
                    each.append(-model.logits(h).log_softmax(-1)[whole[t + 1 + k]])
        expected = expected + 0.25 * torch.stack(each).mean()
    torch.testing.assert_close(model(idx, targets, ahead=torch.tensor(0.25)), expected)
    alone = make(**options)                                        # what is measured knows nothing of it
    alone.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(idx, targets, reduction='none'), alone(idx, targets, reduction='none'))


def test_further_tokens_count_train_and_grow():
    (model, idx), plain = ahead(), make()
    targets = torch.cat([idx[:, 1:], idx[:, :1]], 1)
    model(idx, targets).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.ahead.parameters())
    a, b = model.config, plain.config
    assert a.params()['total'] - b.params()['total'] == a.params()['non_embedding'] - b.params()['non_embedding'] == 3 * 32 ** 2
    assert a.flops_per_token() - b.flops_per_token() == 6 * 3 * (32 ** 2 + 97 * 32)
    model = double(model)
    wide, _ = m.grow(model, m.grown_config(a, dict(n_embd=64)))
    torch.testing.assert_close(wide(idx, targets), model(idx, targets), rtol=1e-7, atol=0)
    assert GPT(a)(idx, targets, ahead=0.0).item() == pytest.approx(math.log(97), abs=0.15)
    with pytest.raises(ValueError, match='predict_ahead'):
        GPTConfig(**SMALL, predict_ahead=-1)


@pytest.mark.parametrize('cap, their_cap', [(0.0, 0.0), (3.0, 2.0)])
@pytest.mark.parametrize('ignored', ['none', 'some', 'all'])
def test_distillation_is_the_divergence_of_all_logits(cap, their_cap, ignored):
    torch.manual_seed(0)
    x, w, h, v = (torch.randn(*shape, requires_grad=True) for shape in ((70, 24), (50, 24), (70, 8), (50, 8)))
    targets, T = torch.randint(0, 50, (70,)), 2.5
    targets[{'none': slice(0), 'some': slice(None, None, 3), 'all': slice(None)}[ignored]] = -1
    keep = targets >= 0
    p, q = (m.softcap(a @ b.t(), c) / T for a, b, c in ((h, v, their_cap), (x, w, cap)))
    each = F.kl_div(q.log_softmax(-1), p.detach().softmax(-1), reduction='none').sum(-1)
    expected = T ** 2 * (each * keep).sum() / keep.sum().clamp(min=1)
    got = m.Distillation.apply(x, w, targets, cap, T, (h.detach(), v.detach(), their_cap), 32)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(3 * loss, (x, w)) for loss in (got, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_model_that_teaches_itself_has_nothing_to_learn():
    model, idx = make(), tokens(2, 30)
    targets, own = idx.roll(-1, 1), (model.trunk(idx).flatten(0, 1).detach(), model.lm_head.weight.detach(), 0.0)
    torch.testing.assert_close(model(idx, targets, teach=(0.25, 2.0, *own)), 0.75 * model(idx, targets))
    other = (torch.randn(60, 8), torch.randn(97, 8), 0.0)
    apart = m.Distillation.apply(own[0], own[1], targets.flatten(), 0.0, 2.0, other, 7)
    torch.testing.assert_close(model(idx, targets, teach=(0.25, 2.0, *other)), 0.75 * model(idx, targets) + 0.25 * apart)


@pytest.mark.parametrize('options', [dict(), dict(n_kv_head=2, window=6), dict(doc_mask=False)])
def test_two_way_attention_sees_the_whole_document_and_no_other(options):
    model, idx = make(**options), tokens(2, 30, (0, 9, 20))
    before = model.trunk(idx, two_way=True)
    for at in (3, 14, 29):
        other = idx.clone()
        other[:, at] = other[:, at] % 90 + 2
        changed = (model.trunk(other, two_way=True) - before).abs().amax(-1)[0] > 1e-6
        doc = range(0, 30) if model.config.doc_mask is False else range(*((0, 9) if at < 9 else (9, 20) if at < 20 else (20, 30)))
        assert [t for t in range(30) if changed[t]] == list(doc), (at, changed)
    assert torch.equal(model.trunk(idx), make(**options).trunk(idx))         # one way it is what it was


def test_attention_by_a_mask():
    torch.manual_seed(0)
    q, k, v, first = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8), torch.zeros(2, 9, dtype=torch.long)
    seen = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, -1, -1)
    torch.testing.assert_close(m.attention(q, k, v, seen, 0.3), m.attention(q, k, v, first, 0.3))
    every = (0.3 * q @ k.repeat_interleave(2, 1).mT).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(m.attention(q, k, v, torch.ones_like(seen), 0.3), every)


def test_a_grown_model_guesses_the_same_classes():
    for tied in (False, True):
        old, idx = double(make(classes=5, tie_embeddings=tied, predict_ahead=1)), tokens(2, 40, (0, 13))
        new, came_from = m.grow(old, m.grown_config(old.config, dict(n_embd=64)))
        classes = torch.arange(97) % 5, torch.tensor(1.0)                   # the second head alone
        losses = [x(idx, idx.roll(-1, 1), classes=classes, ahead=torch.tensor(0.0)) for x in (old, new)]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)              # linear_cross_entropy is fp32
        assert came_from[new.class_head.weight][1] == (2 if tied else 1)


def test_growth_takes_whole_numbers_and_whole_stacks():
    config = GPTConfig(**SMALL)
    for wrong, said in ((dict(n_embd=64.0), 'n_embd is 64.0, it must be a whole number'), (dict(n_layer='6'), 'whole number')):
        with pytest.raises(ValueError, match=said):
            m.grown_config(config, wrong)
    with pytest.raises(ValueError, match='5 layers are no stack of 3'):
        m.grown_config(config, dict(n_layer=5), stack=True)


def test_the_probe_of_kernels_has_one_head():
    assert m.Probe(GPTConfig(**SMALL, classes=5), 'cpu', torch.float32).model.class_head is None


# ---- experts: of domains, and routed

@torch.no_grad()
def outputs(model, idx, domain=None):
    return model.lm_head(model.trunk(idx, domain=None if domain is None else torch.tensor(domain)))


@pytest.mark.parametrize('options', [dict(), dict(mlp='swiglu', mlp_hidden=42), dict(domain_share=0.6, tie_embeddings=True)])
def test_a_split_model_computes_the_same_in_every_domain(options):
    old, idx = double(make(**options)), tokens(2, 40, (0, 13))
    new, came_from = m.grow(old, m.grown_config(old.config, dict(domains='a,b,c')))
    before = outputs(old, idx)
    for domain in (0, 1, 2, None):
        assert (outputs(new, idx, domain) - before).abs().max() < 1e-10 and before.std() > 0.1
    copies = {name: came_from[p][1] for name, p in new.named_parameters()}               # none is missing
    assert {name.rpartition('.mlp.')[2] for name, n in copies.items() if n == 3} == {'own_up.weight', 'own_down.weight'}
    ours, theirs = new.config.params(), old.config.params()
    own = new.config.own_hidden
    more = 3 * 2 * 32 * own * (3 if 'mlp' in options else 2)
    assert ours['total'] == sum(p.numel() for p in new.parameters()) == theirs['total'] + more
    assert ours['active'] == theirs['active'] and new.config.flops_per_token() == old.config.flops_per_token()


def with_domains(names='a,b,c', **options):
    """A model whose domains' parts differ."""
    return double(make(domains=names, **options))


def test_a_part_is_of_its_domain_alone():
    model, idx = with_domains(), tokens(2, 40, (0, 13))
    model(idx, idx.roll(-1, 1), torch.tensor(1)).backward()
    assert not [name for name, p in model.named_parameters() if not p.grad.any()]
    for name, p in model.named_parameters():
        assert '.own_' not in name or not p.grad[[0, 2]].any()
    before = [outputs(model, idx, domain) for domain in range(3)]
    with torch.no_grad():
        model.blocks[0].mlp.own_up.weight[1] *= 2
    assert [torch.equal(outputs(model, idx, d), was) for d, was in enumerate(before)] == [True, False, True]


def test_domains_are_kept_dropped_and_branched():
    old, idx = with_domains(), tokens(2, 40)
    new, came_from = m.grow(old, m.grown_config(old.config, dict(domains='c,x,a')), parts=[2, 1, 0])
    for ours, theirs in enumerate([2, 1, 0]):
        assert torch.equal(outputs(new, idx, ours), outputs(old, idx, theirs))
    assert len(came_from) == len(list(new.parameters())) and new.config.domains == 'c,x,a'
    fewer = m.grow(old, m.grown_config(old.config, dict(domains='b')), parts=[1])[0]
    assert torch.equal(outputs(fewer, idx, 0), outputs(old, idx, 1))


@torch.no_grad()
def test_the_domain_is_inferred_token_by_token():
    """The mixture by Bayes' rule, a token at a time; its sum is that of the whole text; who is told need not infer."""
    model, idx = with_domains(), tokens(2, 30)
    targets = torch.cat([idx[:, 1:], torch.tensor([[5], [7]])], 1)
    probs = torch.stack([model.lm_head(model.trunk(idx, domain=torch.tensor(d))).softmax(-1).gather(2, targets[..., None])[..., 0]
                         for d in range(3)])                                             # (domains, B, T)
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
        nats = [model(idx[:, :-1], idx[:, 1:], torch.tensor(d)).item() for d in range(3)]
        best, new = min(range(3), key=nats.__getitem__), list(model.generate(idx, 5, temperature=0))
        whole = torch.cat([idx, torch.stack(new, 1)], 1)
        assert model.likeliest(idx) == best
        assert torch.equal(outputs(model, whole, best)[:, 24:-1].argmax(-1), whole[:, 25:])      # and the cache is told too
    model.told = torch.tensor((best + 1) % 3)
    assert not torch.equal(torch.stack(list(model.generate(idx, 5, temperature=0)), 1), whole[:, 25:])


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


@pytest.mark.parametrize('options', [dict(experts=5, experts_top=2), dict(experts=4, experts_top=4, expert_hidden=9, mlp='swiglu'),
                                     dict(experts=30, experts_top=1, mlp_hidden=24)])
def test_experts_are_the_sum_over_those_chosen(options):
    model = make(**options)
    layer, x = model.blocks[1].mlp.double(), torch.randn(2, 11, 32, dtype=torch.double, requires_grad=True)
    plain = m.MLP.forward(layer, x)
    expected = plain + routed_slowly(layer, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-7)                  # affinities are fp32
    some = [p for p in layer.parameters() if p is not layer.bias] + [x]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), some) for y in (layer(x), expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    sizes = model.config.params()
    idle = 3 * (options['experts'] - options['experts_top']) * layer.ups.weight[0].numel() + \
        3 * (options['experts'] - options['experts_top']) * layer.downs.weight[0].numel()
    assert sizes['total'] == sum(p.numel() for p in model.parameters()) == sizes['active'] + idle
    model = make(**options)
    with FlopCounterMode(display=False) as counter:
        model.logits(model.trunk(tokens(2, 64)))
    assert 3 * counter.get_total_flops() == 2 * 64 * model.config.flops_per_token(attended=64)


@torch.no_grad()
@pytest.mark.parametrize('options', [dict(experts=5, experts_top=2), dict(domains='a,b')])
def test_experts_cannot_look_ahead_and_the_cache_gives_what_the_full_forward_gives(options):
    model, idx = make(**options), tokens(2, 40, (0, 13))
    before = logits(model, idx)
    for at in (39, 20):
        other = idx.clone()
        other[:, at] = (other[:, at] + 5) % 90 + 1
        torch.testing.assert_close(logits(model, other)[:, :at], before[:, :at], rtol=0, atol=1e-5)
        assert not torch.allclose(logits(model, other)[:, at], before[:, at])
    cache = m.KVCache(model, 2)
    pieces = [model.logits(model.trunk(piece, cache)) for piece in idx.split([17, 1, 1, 21], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), before, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_bias_is_the_load_above_the_mean():
    layer, x = make(experts=6, experts_top=2).blocks[0].mlp, torch.randn(3, 50, 32)
    for _ in range(2):
        (1e6 * layer(x).sum()).backward()                                                 # whatever the loss
    chosen = (layer.router(x.flatten(0, 1)).sigmoid() + layer.bias).topk(2).indices
    load = chosen.flatten().bincount(minlength=6) / 300
    torch.testing.assert_close(layer.bias.grad, 2e-6 * (load - 1 / 6))
    assert load.std() > 0.02


def test_experts_and_domains_that_cannot_be():
    for wrong, said in ((dict(experts=-1), 'experts is -1'), (dict(experts=2, experts_top=3), 'experts_top is 3'), (dict(experts=2, experts_top=0), 'experts_top'),
                        (dict(experts=4, domains='a'), 'choose one'), (dict(domains='a', mlp_tokens=8), 'choose one'),
                        (dict(domains='a', domain_share=0.001), 'domain_share is 0.001'), (dict(domains='a', domain_share=1.0), 'domain_share')):
        with pytest.raises(ValueError, match=said):
            GPTConfig(**SMALL | wrong)
    for options in (dict(experts=4), dict(domains='a,b')):
        with pytest.raises(ValueError, match='n_embd cannot grow in a model that has'):
            m.grown_config(GPTConfig(**SMALL | options), dict(n_embd=64))
        old, idx = double(make(**options)), tokens(2, 40)                                 # but its depth can
        new = m.grow(old, m.grown_config(old.config, dict(n_layer=5)))[0]
        assert (outputs(new, idx) - outputs(old, idx)).abs().max() < 1e-10

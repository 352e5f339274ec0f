"""The products of config/experts.py in Triton: what routes tokens on a GPU. No idea of its own, and no settings.

A pair is a token t and one of the k experts e that it passes. All N k pairs are sorted by expert, and a tile of rows finds by
counting whose it is: nothing is padded, and nothing waits for the host, as PyTorch's grouped product does on consumer
cards (pytorch 161407: it has a kernel for sm_90 and sm_100). Rows are read where their tokens stand and written where their pairs
do, so none is copied to be sorted; the activation, and but for dD the gates g, come at the end of a product.

    a_i = relu(U_e x_t)^2                     y_t = sum over the pairs of t of g_i D_e a_i
    da_i = D_e^T dy_t    dg_i = a_i da_i      dh_i = 2 sqrt(a_i) g_i da_i      dx_t = sum over the pairs of t of U_e^T dh_i
    dU_e = sum over the pairs of e of dh_i x_t^T        dD_e = sum over the pairs of e of g_i dy_t a_i^T

No sum of floats is atomic: twice the same gives the same bits.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

import model as models
import train
from model import blocks, constexpr, jit, op, precision, shared_memory, triton

if triton is not None:
    import triton.language as tl


# ---- when they are used

class Run(train.Run):

    def choose_kernels(self):
        """Tries the kernels as model.py does its own, on the rows of a micro-batch: in use are those that compute the same,
        faster. --kernels=none switches them off."""
        super().choose_kernels()
        layer, took = self.model.blocks[0].mlp, ''
        why = ('switched off' if not models.kernels_named(self.s.kernels) else models.no_kernels(self.device) or
               'SwiGLU has no kernel here' * layer.gated or
               'in float32 it would do without tensor cores' * (self.dtype == torch.float32))
        if not why:
            rows = self.micro * self.s.block_size
            why, took = Probe(layer.ups.weight.shape, layer.top, rows, self.device, self.dtype).fault(['experts'])
        models.IN_USE.update(['experts'] * (not why))
        self.say(f'  experts: torch, {why}' if why else f'  experts: kernel, rows taken and put where they belong; {took}')


class Probe(models.Probe):
    """The experts of one layer, with kernels where 'experts' is in use."""

    def __init__(self, shape, top, rows, device, dtype):
        self.device = device
        self.idx, self.full = ([[t.to(device).requires_grad_() for t in inputs], order.to(device), ends.to(device)]
                               for inputs, order, ends in (example(shape, top, n, dtype) for n in (min(rows, 256), rows)))
        self.expected = self.gradients(self.idx)

    def gradients(self, known):
        inputs, order, ends = known
        function = experts_with_kernels if 'experts' in models.IN_USE else experts_in_torch
        loss = function(*inputs, order, ends).float().square().sum()
        return [*torch.autograd.grad(loss, inputs), loss.detach()]

    def without(self, names):
        return 'start again with --kernels=none'


def example(shape, top, N, dtype):
    """x (N, C), ups (n, h, C), downs and gates, as the operation takes them, and the order and ends of some pairs."""
    dice, (n, h, C) = torch.Generator().manual_seed(0), shape
    x, ups, downs = (torch.randn(size, generator=dice) / size[-1] ** 0.5 for size in ((N, C), shape, (n, C, h)))
    gates, chosen = torch.rand(N, n, generator=dice).topk(top)
    order, _, ends = sorted_pairs(chosen, n)
    return [C ** 0.5 * x.to(dtype), ups.to(dtype), downs.to(dtype), gates / gates.sum(1, keepdim=True)], order, ends


def kernel_cases(config, dtype, rows):
    """For bench_mfu.py: the experts of a layer."""
    if config.mlp == 'swiglu':
        return
    n, top, C, h = config.experts, config.experts_top, config.n_embd, config.expert_hidden or config.mlp_hidden
    inputs, order, ends = example((n, h, C), top, rows, dtype)

    def experts(*t, kernel=False):
        function = experts_with_kernels if kernel else experts_in_torch
        return function(*t, order.to(t[0].device), ends.to(t[0].device))

    ours = lambda *t: experts(*t, kernel=t[0].is_cuda or 'mlp' in models.IN_USE)
    yield ('experts', 4 * rows * top * C * h, dtype.itemsize * (2 * rows * C + 2 * rows * top * h + 2 * n * C * h),
           {'ours': ours, 'torch': experts}, inputs)


def sorted_pairs(chosen, n):
    """Of the experts (N, k) that tokens pass: the order (N k) of the pairs by expert, how many each of n experts has, and
    where they end."""
    chosen = chosen.flatten()
    load = torch.zeros(n, dtype=torch.int32, device=chosen.device)
    load.index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))
    return chosen.argsort(stable=True), load, load.cumsum(0, dtype=torch.int32)


# ---- the kernels

@jit
def rows_of_tile(tile, ends_ptr, n: constexpr, BLOCK_M: constexpr, POWER: constexpr):
    """Where pairs sorted by expert end at `ends`, and each expert's last tile is its own: the expert of a tile,
    its rows, and which of them are the expert's. Tiles after the last have none. POWER: of two, n at least."""
    i = tl.arange(0, POWER)
    ends = tl.load(ends_ptr + i, mask=i < n, other=0)
    starts = tl.load(ends_ptr + i - 1, mask=(i > 0) & (i < n), other=0)
    tiles = tl.cdiv(ends - starts, BLOCK_M)
    e = tl.minimum(tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32)), n - 1)
    before = tl.sum(tl.where(i < e, tiles, 0))
    rows = tl.sum(tl.where(i == e, starts, 0)) + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
    return e, rows, rows < tl.sum(tl.where(i == e, ends, 0))


@jit
def expert_rows_kernel(x_ptr, w_ptr, a_ptr, gate_ptr, order_ptr, ends_ptr, out_ptr, share_ptr, n: constexpr,
                       TOP: constexpr, N: constexpr, K: constexpr, STRIDE_E: constexpr, STRIDE_N: constexpr,
                       STRIDE_K: constexpr, INTO: constexpr, BACKWARD: constexpr, PRECISION: constexpr,
                       POWER: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr):
    """Rows (K) times their experts' matrices, (N). INTO the experts: from tokens to sorted pairs, with the activation;
    else out of them: from sorted pairs to pairs as they were, forward times their gates."""
    across = tl.cdiv(N, BLOCK_N)
    e, rows, mine = rows_of_tile(tl.program_id(0) // across, ends_ptr, n, BLOCK_M, POWER)
    cols, k = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    rows = tl.where(mine, rows, 0).to(tl.int64)
    pair = tl.load(order_ptr + rows)
    inside = mine[:, None] & (cols < N)[None, :]
    x_ptr += (pair // TOP if INTO else rows)[:, None] * K + k[None, :]
    w_ptr += e.to(tl.int64) * STRIDE_E + (cols % N)[None, :] * STRIDE_N + k[:, None] * STRIDE_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        left = k < K - k0
        x = tl.load(x_ptr + k0, mask=left[None, :], other=0.0)
        w = tl.load(w_ptr + k0 * STRIDE_K, mask=left[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if not INTO:
        if not BACKWARD:
            acc *= tl.load(gate_ptr + pair)[:, None]
        tl.store(out_ptr + pair[:, None] * N + cols[None, :], acc, mask=inside)
    else:
        at = rows[:, None] * N + cols[None, :]
        if BACKWARD:
            a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(share_ptr + pair * across + tl.program_id(0) % across, tl.sum(a * acc, axis=1), mask=mine)
            tl.store(out_ptr + at, 2.0 * tl.sqrt(a) * acc * tl.load(gate_ptr + pair)[:, None], mask=inside)
        else:
            acc = tl.maximum(acc, 0.0)
            tl.store(out_ptr + at, acc * acc, mask=inside)


@jit
def expert_weights_kernel(h_ptr, x_ptr, gate_ptr, order_ptr, ends_ptr, out_ptr, TOP: constexpr, H: constexpr, C: constexpr,
                          STRIDE_E: constexpr, STRIDE_H: constexpr, STRIDE_C: constexpr, GATES: constexpr,
                          PRECISION: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr):
    """For each expert the sum over its pairs of h (H), sorted, times x (C) of their tokens, or that times the gates."""
    down, across = tl.cdiv(H, BLOCK_M), tl.cdiv(C, BLOCK_N)
    e, tile = (tl.program_id(0) // (down * across)).to(tl.int64), tl.program_id(0) % (down * across)
    h, c = tile // across * BLOCK_M + tl.arange(0, BLOCK_M), tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    end = tl.load(ends_ptr + e)
    for row in range(tl.load(ends_ptr + e - 1, mask=e > 0, other=0), end, BLOCK_K):
        rows = row + tl.arange(0, BLOCK_K)
        mine = rows < end
        rows = tl.where(mine, rows, 0).to(tl.int64)
        pair = tl.load(order_ptr + rows)
        left = tl.load(h_ptr + rows[:, None] * H + h[None, :], mask=mine[:, None] & (h < H)[None, :], other=0.0)
        right = tl.load(x_ptr + (pair // TOP)[:, None] * C + c[None, :], mask=mine[:, None] & (c < C)[None, :], other=0.0)
        if GATES:
            right = (right * tl.load(gate_ptr + pair)[:, None]).to(left.dtype)
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
    at = e * STRIDE_E + h[:, None] * STRIDE_H + c[None, :] * STRIDE_C
    tl.store(out_ptr + at, acc, mask=(h < H)[:, None] & (c < C)[None, :])


def tiles(x, stages=3):
    small = x.element_size() == 4 or shared_memory(x) < 101376
    sizes = (64, 64, 32, 8, 2) if small else (128, 64, 64, 8, stages)
    return dict(zip(('BLOCK_M', 'BLOCK_N', 'BLOCK_K', 'num_warps', 'num_stages'), sizes))


def launch_rows(x, w, gates, order, ends, into, backward=False, a=None):
    """Pairs (N k, fan_out of w (n, fan_out, fan_in)), and where a is given each pair's part of the gradient of its gate."""
    n, N, K = w.shape
    out, how = x.new_empty((len(order), N)), tiles(x)
    across = blocks(N, how['BLOCK_N'])
    share = gates.new_empty((len(order), across) if a is not None else 0)
    grid = (blocks(len(order), how['BLOCK_M']) + n) * across,
    models.launch(expert_rows_kernel, grid, x, w, a, gates, order, ends, out, share, n, gates.shape[1], N, K, *w.stride(),
                  into, backward, precision(x), triton.next_power_of_2(n), **how)
    return out, share


def launch_weights(h, x, like, gates, order, ends, strides, use_gates):
    """The gradient (n, ...) of weights that are like these, of which strides are an expert's, along h, along x."""
    out, how = torch.empty_like(like), tiles(x, stages=5)       # a row is found by a load of its own: more under way
    grid = len(like) * blocks(h.shape[1], how['BLOCK_M']) * blocks(x.shape[1], how['BLOCK_N']),
    models.launch(expert_weights_kernel, grid, h, x, gates, order, ends, out, gates.shape[1], h.shape[1], x.shape[1],
                  *strides(out), use_gates, precision(x), **how)
    return out


# ---- as one operation

@op
def experts_forward(x: Tensor, ups: Tensor, downs: Tensor, gates: Tensor, order: Tensor,
                    ends: Tensor) -> tuple[Tensor, Tensor]:
    """y (N, C) of x (N, C); for the backward pass a (N k, h), sorted.

    ups (n, h, C), downs (n, C, h) of x's dtype; gates (N, k) fp32; order (N k) int64: the pairs, token by token, by
    expert; ends (n,) int32: where those of each expert end in it.
    """
    x = x.contiguous()
    a, _ = launch_rows(x, ups, gates, order, ends, into=True)
    pairs, _ = launch_rows(a, downs, gates, order, ends, into=False)
    return pairs.view(*gates.shape, -1).sum(1), a


@op
def experts_backward(dy: Tensor, x: Tensor, ups: Tensor, downs: Tensor, gates: Tensor, order: Tensor, ends: Tensor,
                     a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy, x = dy.contiguous(), x.contiguous()
    dh, share = launch_rows(dy, downs.mT, gates, order, ends, into=True, backward=True, a=a)
    pairs, _ = launch_rows(dh, ups.mT, gates, order, ends, into=False, backward=True)
    dups = launch_weights(dh, x, ups, gates, order, ends, lambda w: w.stride(), use_gates=False)
    ddowns = launch_weights(a, dy, downs, gates, order, ends, lambda w: (w.stride(0), *w.stride()[:0:-1]), use_gates=True)
    return pairs.view(*gates.shape, -1).sum(1), dups, ddowns, share.sum(1).view_as(gates)


def experts_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def experts_gradient(ctx, dy, _):
    return *experts_backward(dy, *ctx.saved_tensors), None, None


experts_forward.register_autograd(experts_gradient, setup_context=experts_save)


def experts_with_kernels(*inputs):
    return experts_forward(*inputs)[0]


# ---- the same in PyTorch

def experts_in_torch(x, ups, downs, gates, order, ends, gated=False):
    """y (N, C) as of `experts_forward`; gated: ups (n, 2h, C), for SwiGLU."""
    N, top = gates.shape
    rows = x[:, None].expand(-1, top, -1).flatten(0, 1).index_select(0, order)
    pairs = products(rows, ups, downs, ends, gated).index_select(0, order.argsort())
    return (gates.to(x.dtype)[..., None] * pairs.view(N, top, -1)).sum(1)


@torch.compiler.disable                         # PyTorch compiles a grouped product in bf16 alone
def products(rows, ups, downs, ends, gated):
    """rows (N k, C), those of an expert together, through the expert's matrices."""
    h = F.grouped_mm(rows, ups.mT, offs=ends)
    if gated:
        gate, h = h.chunk(2, dim=-1)
        h = F.silu(gate) * h
    else:
        h = F.relu(h).square()
    return F.grouped_mm(h, downs.mT, offs=ends)

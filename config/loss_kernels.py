"""Cross-entropy with a soft cap, a z-loss and soft targets, made in one pass: what softcap.py, z_loss.py and
syntactic_smoothing.py share, so that they stack. It has no settings, and by itself changes nothing.

    z = softcap(x W^T)     p = softmax(z)     q = the targets' distribution, sum 1
    loss = lse - sum_j q_j z_j + z_loss lse^2             lse = log sum_j e^z_j
    dz = p (1 + 2 z_loss lse) - q                         times 1 - (z / cap)^2 for the soft cap
    q_y = alpha, q_j = (1 - alpha) 2^(table_y table_j - norm_y) for j other than the gold token y

On a GPU a Triton kernel makes loss and gradient where a block of logits stands, if model.py's own is in use.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

import model as models
import train
from model import LOG2E, BlockwiseLoss, blocks, constexpr, jit, op, rows_at_once, triton

if triton is not None:
    import triton.language as tl


class GPT(models.GPT):
    """An idea gives cap or soft where it overrides cross_entropy, z_loss where it overrides loss."""
    page = ''                # what a page computes is the baseline's

    def cross_entropy(self, x, targets, reduction, cap=0.0, z_loss=0.0, soft=(), **extras):
        return soft_cross_entropy(x, self.lm_head.weight, targets, reduction, cap, z_loss, soft)


class Run(train.Run):

    def choose_kernels(self):
        """Tries the kernel as model.py does its own, which it takes the place of, on the rows of a micro-batch."""
        super().choose_kernels()
        if 'cross_entropy' in models.IN_USE:
            models.IN_USE.discard('cross_entropy')
            probe = Probe(self.model.config, self.micro * self.s.block_size, self.device, self.dtype)
            why, took = probe.fault(['cross_entropy'])
            models.IN_USE.update(['cross_entropy'] * (not why))
            self.say(f'  soft cross-entropy: {f"torch, {why}" if why else f"kernel, in place of that; {took}"}')


class Probe(models.Probe):
    """The loss that the ideas of this model make, of random rows, and its gradients."""
    what = 'a loss'

    def __init__(self, config, rows, device, dtype):
        self.device, C, V, (self.cap, self.z_loss, rank) = device, config.n_embd, config.vocab_size, asked_of(config)
        dice = torch.Generator().manual_seed(0)
        x, weight, table = (torch.randn(shape, generator=dice) for shape in ((rows, C), (V, C), (V, rank)))
        self.weight, self.full = (weight / C ** 0.5).to(device).requires_grad_(), x.to(device, dtype).requires_grad_()
        self.idx = self.full.detach()[:256].requires_grad_()
        soft = (table / 4, similarity_norm(table / 4), torch.tensor(0.7)) if rank else ()
        self.soft = tuple(t.to(device) for t in soft)
        self.expected = self.gradients(self.idx)

    def gradients(self, x):
        gold = torch.arange(len(x), device=x.device) % len(self.weight)
        loss = soft_cross_entropy(x, self.weight, gold, 'mean', self.cap, self.z_loss, self.soft)
        return [*torch.autograd.grad(loss, [x, self.weight]), loss.detach()]


def asked_of(config):
    """Of the ideas of this model: the soft cap, the weight of the z-loss, the columns of the table of soft targets."""
    cap, z_loss = (getattr(config, name, 0.0) for name in ('logit_softcap', 'z_loss'))
    classes = config.word_classes + 3 if getattr(config, 'smoothing_by', '') == 'classes' else 16
    return cap, z_loss, 2 ** math.ceil(math.log2(max(16, classes))) if hasattr(config, 'smoothing') else 0


def kernel_cases(config, dtype, rows):
    """For bench_mfu.py: the loss that the ideas of this model make."""
    cap, z_loss, rank = asked_of(config)
    C, V = config.n_embd, config.vocab_size

    def loss(x, weight, kernel=False):
        table = x.new_zeros((V, rank), dtype=torch.float32)
        soft = (table, table.new_full((V,), math.log2(V - 1)), table.new_full((), 0.7)) if rank else ()
        gold = torch.arange(len(x), device=x.device) % V
        return soft_cross_entropy(x, weight, gold, 'mean', cap, z_loss, soft, kernel=kernel)

    ours = lambda x, w: loss(x, w, x.is_cuda or 'cross_entropy' in models.IN_USE)
    inputs = [torch.randn(rows, C, dtype=dtype), torch.randn(V, C, dtype=dtype) / C ** 0.5]
    yield ('soft cross-entropy', 2 * rows * C * V, dtype.itemsize * (rows * C + V * C),
           {'ours': ours, 'torch, in blocks': loss}, inputs)


# ---- in PyTorch

def softcap(logits, cap):
    return cap * torch.tanh(logits / cap) if cap else logits


def soft_targets(gold, soft):
    """(rows, V): alpha on the gold token (rows, 1), the rest shared out by similarity.

    soft: table (V, r), norm (V,), alpha (). Token j gets (1 - alpha) 2^(table_gold table_j - norm_gold), and
    norm (`similarity_norm`) makes that sum to 1 - alpha: syntactic smoothing without a matrix of V x V
    (Diehl Martinez 2024, 2410.11462); a table of zeros is label smoothing.
    """
    table, norm, alpha = soft
    gold = gold[:, 0]
    share = torch.exp2(table[gold] @ table.t() - norm[gold, None])
    return ((1 - alpha) * share).scatter_(1, gold[:, None], alpha.expand(len(gold), 1))


def similarity_norm(table, rows=1024):
    """(V,): log2 of the sum over all other tokens j of 2^(table_i table_j)."""
    norms = []
    for i in range(0, len(table), rows):
        s = table[i:i + rows] @ table.t()
        s[torch.arange(len(s)), torch.arange(i, i + len(s))] = float('-inf')
        norms.append(s.mul_(math.log(2)).logsumexp(1) / math.log(2))
    return torch.cat(norms)


def soft_cross_entropy(x, weight, targets, reduction, cap=0.0, z_loss=0.0, soft=(), rows=None, kernel=None):
    """Cross-entropy in nats of targets (N,) under softcap(x weight^T), x (N, C), weight (V, C).

    reduction 'mean' (differentiable; there z_loss and soft count, see soft_targets) or 'none', (N,) fp32.
    Targets < 0 are left out; with 'none' they give 0.
    """
    rows, mean = rows or rows_at_once(x, weight), reduction == 'mean'
    if 'cross_entropy' in models.IN_USE if kernel is None else kernel:
        soft = soft if mean and soft else (None, None, None)
        both = soft_cross_entropy_forward(x, weight, targets, *soft, cap, z_loss * mean, mean, rows)
        return both[0] if mean else both[1]
    if not mean:
        w, wanted = weight.to(x.dtype), targets >= 0
        loss = torch.zeros(len(x), device=x.device)
        loss[wanted] = torch.cat([F.cross_entropy(softcap((xs @ w.t()).float(), cap), ys, reduction='none')
                                  for xs, ys in zip(x[wanted].split(rows), targets[wanted].split(rows))])
        return loss
    n = (targets >= 0).sum().clamp(min=1)

    def block(z, at):
        keep, gold = targets[at] >= 0, targets[at].clamp(min=0)[:, None]
        z = softcap(z, cap)
        lse = z.logsumexp(dim=-1)
        q = soft_targets(gold, soft) if soft else None
        mean_z = (q * z).sum(-1) if soft else z.gather(1, gold)[:, 0]
        loss = ((lse - mean_z + z_loss * lse.square()) * keep).sum()
        g = z.sub(lse[:, None]) if cap else z.sub_(lse[:, None])
        g = g.exp_().mul_(1 + 2 * z_loss * lse[:, None]) if z_loss else g.exp_()
        g = g.sub_(q) if soft else g.scatter_add_(1, gold, torch.full_like(z[:, :1], -1.0))
        if cap:
            g.mul_(1 - (z / cap).square_())
        return loss, g.mul_((keep / n)[:, None])

    return BlockwiseLoss.apply(x, weight, n, rows, block)


# ---- the same as a Triton kernel

@jit
def capped(z, CAP: constexpr):
    return CAP * (2.0 * tl.sigmoid(2.0 / CAP * z) - 1.0)            # CAP tanh(z / CAP)


@jit
def soft_weights(gold, cols, table_ptr, norm, V: constexpr, RANK: constexpr):
    """(rows, cols): how much of what the gold token gives away goes to each other one."""
    r = tl.arange(0, RANK)
    mine = tl.load(table_ptr + gold[:, None] * RANK + r[None, :])
    theirs = tl.load(table_ptr + cols[:, None] * RANK + r[None, :], mask=(cols < V)[:, None], other=0.0)
    w = tl.exp2(tl.dot(mine, tl.trans(theirs), input_precision='ieee') - norm[:, None])
    return tl.where((cols[None, :] == gold[:, None]) | (cols >= V)[None, :], 0.0, w)


@jit
def soft_cross_entropy_kernel(z_ptr, target_ptr, loss_ptr, count_ptr, table_ptr, norm_ptr, alpha_ptr, n_rows,
                              V: constexpr, CAP: constexpr, Z_LOSS: constexpr, GRAD: constexpr,
                              RANK: constexpr, BLOCK_M: constexpr, BLOCK_V: constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(target_ptr + rows, mask=rows < n_rows, other=-1)
    keep, gold = target >= 0, tl.maximum(target, 0).to(tl.int32)
    alpha = 1.0
    if RANK:
        alpha, norm = tl.load(alpha_ptr), tl.load(norm_ptr + gold)
    top, total = tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    mean_z = tl.zeros([BLOCK_M], tl.float32)                          # of z under q
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        inside = (rows < n_rows)[:, None] & (cols < V)[None, :]
        z = tl.load(z_ptr + rows[:, None] * V + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if CAP > 0:
            z = capped(z, CAP)
        q = tl.where(cols[None, :] == gold[:, None], alpha, 0.0)
        if RANK:
            q += (1 - alpha) * soft_weights(gold, cols, table_ptr, norm, V, RANK)
        mean_z += tl.sum(q * z, axis=1)
        z = tl.where((cols < V)[None, :], z * LOG2E, float('-inf'))
        new_top = tl.maximum(top, tl.max(z, axis=1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(z - new_top[:, None]), axis=1)
        top = new_top
    lse = top + tl.log2(total)                                        # base 2
    nats = lse / LOG2E
    tl.store(loss_ptr + rows, tl.where(keep, nats - mean_z + Z_LOSS * nats * nats, 0.0), mask=rows < n_rows)
    if GRAD:
        share = tl.where(keep, 1.0 / tl.load(count_ptr), 0.0)
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            inside = (rows < n_rows)[:, None] & (cols < V)[None, :]
            at = z_ptr + rows[:, None] * V + cols[None, :]
            z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if CAP > 0:
                z = capped(z, CAP)
            g = tl.exp2(z * LOG2E - lse[:, None]) * (1.0 + 2.0 * Z_LOSS * nats)[:, None]
            g -= tl.where(cols[None, :] == gold[:, None], alpha, 0.0)
            if RANK:
                g -= (1 - alpha) * soft_weights(gold, cols, table_ptr, norm, V, RANK)
            if CAP > 0:
                g *= 1.0 - (z / CAP) * (z / CAP)
            tl.store(at, g * share[:, None], mask=inside)


@op
def soft_cross_entropy_forward(x: Tensor, weight: Tensor, targets: Tensor, table: Tensor | None,
                               norm: Tensor | None, alpha: Tensor | None, cap: float, z_loss: float,
                               grad: bool, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses' mean over targets >= 0; all losses (N,), 0 where one is left out; dx (N, C), dW (V, C).

    table (V, a power of two from 16 on), norm (V,), alpha (), all fp32, are those of `soft_targets`, or None.
    """
    N, V, w, x, targets = len(x), len(weight), weight.to(x.dtype), x.contiguous(), targets.contiguous()
    losses, count = x.new_empty(N, dtype=torch.float32), (targets >= 0).sum().clamp(min=1).float()
    dx, dw = torch.empty_like(x) if grad else x.new_empty(0), torch.zeros_like(weight if grad else weight[:0])
    soft = table is not None
    block = max(16, 8192 // table.shape[1]) if soft else min(triton.next_power_of_2(V), 4096)   # of the table, 32 KiB
    for i in range(0, N, rows):
        xs, ys = x[i:i + rows], targets[i:i + rows]
        z = xs @ w.t()
        models.launch(soft_cross_entropy_kernel, (blocks(len(xs), 16 if soft else 1),), z, ys,
                      losses[i:i + rows], count, table, norm, alpha, len(xs), V, cap, z_loss, grad,
                      table.shape[1] if soft else 0, BLOCK_M=16 if soft else 1, BLOCK_V=block, num_warps=8)
        if grad:
            torch.mm(z, w, out=dx[i:i + rows])
            dw += z.t() @ xs
    return losses.sum() / count, losses, dx, dw


def soft_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def soft_gradient(ctx, grad, *_):
    dx, dw = ctx.saved_tensors
    return dx * grad.to(dx.dtype), dw * grad, *[None] * 8


soft_cross_entropy_forward.register_autograd(soft_gradient, setup_context=soft_save)

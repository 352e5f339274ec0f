"""Measures of a matrix, and of how alike two views of the same inputs are; what config/dynamics.py draws.

In float64, so that the smallest singular values are right too. For ideas to import: alone it does nothing.
"""
import numpy as np
import torch


def linear_cka(x, y):
    """How alike two views (n, d), (n, d') of n inputs are, 0 to 1: |X^T Y|^2 / (|X^T X| |Y^T Y|) of centred
    columns, the same for any rotation and scale of either (Kornblith 2019, 1905.00414)."""
    x, y = (v.double() - v.double().mean(0) for v in (x, y))
    return ((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def pwcca(x, y):
    """Mean canonical correlation of x (n, d) and y (n, d'), a direction h_i of x weighing sum_j |h_i . x_j|,
    how much its neurons have of it (Morcos 2018, 1806.05759). Directions under 1e-6 of the largest variance
    are left out as noise. Unless n is far above d and d' it is high for views that have nothing in common."""
    x, y = (v.double() - v.double().mean(0) for v in (x, y))
    bases = []
    for v in (x, y):
        variance, turn = torch.linalg.eigh(v.T @ v)
        kept = variance > 1e-6 * variance[-1]
        bases.append(v @ turn[:, kept] / variance[kept].sqrt())
    u, correlation, _ = torch.linalg.svd(bases[0].T @ bases[1], full_matrices=False)
    weight = (x.T @ bases[0] @ u).abs().sum(0)
    return (weight @ correlation / weight.sum()).item()


def singular_values(x):
    """Of a matrix, largest first, by its smaller Gram matrix in float64: half an SVD's time, and exact to
    0.1 % down to 1e-6 of the largest; what is below counts as 0."""
    x = x.double() if len(x) <= x.shape[1] else x.double().T
    s = torch.linalg.eigvalsh(x @ x.T).flip(0).clamp(min=0).sqrt()
    return s * (s > 1e-6 * s[0])


def effective_rank(s):
    """Of r singular values: exp(-sum p log p) / r, p their shares: 1 where all are equal, 1 / r where one is
    not 0 (Roy 2007; as a share Diehl Martinez 2024, 2410.11451)."""
    return (torch.special.entr(s / s.sum()).sum().exp() / len(s)).item()


def condition_number(s):
    """The largest singular value over the smallest."""
    return (s.max() / s.min()).item()


def gini(x):
    """Inequality of N entries' sizes, sorted: sum_i (2 i - N - 1) x_i / (N sum x): 0 where all are equal."""
    x = torch.from_numpy(np.sort(x.abs().flatten().numpy())).double()     # 30 times as fast as torch's
    return ((2 * torch.arange(1, len(x) + 1) - len(x) - 1).double() @ x / (len(x) * x.sum())).item()


def hoyer(x):
    """Sparsity of N entries, (N^0.5 - |x|_1 / |x|_2) / (N^0.5 - 1): 0 where all are equal, 1 where only one
    is not 0 (Hoyer 2004)."""
    root, x = x.numel() ** 0.5, x.double()
    return ((root - x.abs().sum() / x.norm()) / (root - 1)).item()


def norms(x, s):
    """Of a matrix and its singular values: the root of all squares, the sum of s, the largest entry."""
    return dict(frobenius=s.norm().item(), nuclear=s.sum().item(), max_abs=x.abs().max().item())


def describe(x, core):
    """All measures of a matrix; core: itself, or a smaller one of the same singular values."""
    s = singular_values(core)
    return dict(effective_rank=effective_rank(s), condition_number=condition_number(s), gini=gini(x),
                hoyer=hoyer(x), **norms(x, s))


def ov_circuit(out, value):
    """What a head writes for what it reads, W_O W_V (Elhage 2021), and D x D of the same singular values, the
    only ones that are not 0; out (C, D), value (D, C)."""
    return out @ value, torch.linalg.qr(out).R @ torch.linalg.qr(value.T).R.T


def sketch(x, width=64):
    """Activations (n, d), centred, as (n, width) in fp16: a random projection, turned to where they vary by a
    power step (Halko 2011, 0909.4061). CKA of sketches was off by 0.01 at most between trained models 192
    wide, by 0.04 beside a fresh one; by 0.27 without the power step. PWCCA is that of these directions."""
    x = x.double() - x.double().mean(0)
    if x.shape[1] > width:
        random = torch.randn(x.shape[1], width, generator=torch.Generator().manual_seed(0)).double()
        x = x @ torch.linalg.qr(x.T @ (x @ random)).Q
    return (x / x.abs().max().clamp(min=1e-30)).half()


def alike(x, y, which):
    """Similarity of two sketches of one batch; nothing where one is missing."""
    return {} if y is None else {f'cka_{which}': linear_cka(x, y), f'pwcca_{which}': pwcca(x, y)}


def projection(module):
    """The matrix that a Linear, the last of an MLP or a Pattention multiplies with."""
    for part in ('down', 'values'):
        module = getattr(module, part, module)
    return module.weight


def circuits(attn, value, out):
    """Each head's OV circuit, as Probe.look has it of the projections: what it writes at each position, its
    matrix, and the gradient along both, (x, core) each."""
    (v, w_v, g_v), (_, w_o, g_o) = ([x for x, _ in parts] for parts in (value, out))
    D, group = attn.head_dim, attn.n_head // attn.n_kv_head
    for head in range(attn.n_head):
        o, k = slice(head * D, head * D + D), slice(head // group * D, head // group * D + D)
        change = ov_circuit(torch.cat([w_o[:, o], g_o[:, o]], 1), torch.cat([g_v[k], w_v[k]]))
        yield ov_circuit(v[:, k], w_o[:, o].T), ov_circuit(w_o[:, o], w_v[k]), change

"""A run of its own with matrices in int8, which sample.py opens and which stays as small in memory.

    python sample.py out/babylm --export int8       out/babylm/int8

What it costs in bits per byte is measured where the text is there (RESULTS.md, "Instructions, passages, exports").
"""
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from config.export_html import finite, quantised
from sample import SLICES, Measure, open_run, text_of, write_beside

GROUP = 32                  # neighbours in a row of int4 that share a scale
FEW = 16                    # rows of x up to which int8's kernel is faster than fp32's after unpacking


class Packed(torch.Tensor):
    """A matrix (rows, columns) of export_html.quantised or export_int4.quantised_4bit, which stays as small in memory.

    F.linear and F.embedding read it as it is; all else is given fp32. On a CPU the products are those of
    kernels in bfloat16, int8's of few rows alone; elsewhere it is unpacked for each.
    """

    @staticmethod
    def __new__(cls, q, scale):
        shape = len(q), q.shape[1] * (2 if q.dtype == torch.uint8 else 1)
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=q.device)
        made.q, made.scale, made.tiles, made.few = q, scale, None, 0
        made._is_param = True                    # isinstance of nn.Parameter
        return made

    def on(self, device):
        """On a device, ready for its kernels."""
        made = Packed(self.q.to(device), self.scale.to(device))
        whole = made.shape[0] % 16 == 0 == made.shape[1] % GROUP         # what the kernels take
        made.few = FEW if whole and made.q.device.type == 'cpu' else 0
        if made.q.dtype == torch.uint8 and made.few:
            bits = torch.stack([made.q & 15, made.q >> 4], dim=-1).flatten(1).int()
            made.tiles = torch._convert_weight_to_int4pack_for_cpu(bits, 1)
            zeros = torch.zeros_like(made.scale)
            made.scales = torch.stack([made.scale, zeros], dim=-1).transpose(0, 1).contiguous()
        return made

    def dense(self, rows=slice(None)):
        """Rows of it, those of an index (...): (..., columns) in fp32."""
        q, scale = self.q[rows], self.scale[rows].float()[..., None]
        if q.dtype == torch.int8:
            return q * scale
        bits = torch.stack([q & 15, q >> 4], dim=-1).flatten(-2).unflatten(-1, (-1, GROUP))
        return ((bits.float() - 8) * scale).flatten(-2)

    def product(self, x):
        """x (..., columns) times its transpose."""
        rows = x.flatten(0, -2)
        if self.tiles is not None:
            y = torch._weight_int4pack_mm_for_cpu(rows.bfloat16(), self.tiles, GROUP, self.scales)
        elif self.q.dtype == torch.int8 and len(rows) <= self.few:
            one = torch.ones(len(self.q), dtype=torch.bfloat16)
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.q, one) * self.scale
        else:
            y = rows @ self.dense().to(x.dtype).t()
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear and isinstance(args[1], Packed) and not kwargs and not any(args[2:]):
            return args[1].product(args[0])
        if function is F.embedding and isinstance(args[1], Packed):
            return args[1].dense(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        args, kwargs = tree_map_only(Packed, Packed.dense, (args, kwargs or {}))
        return function(*args, **kwargs)


def load(model, state, device):
    """Gives a model on a device the weights of a checkpoint that `write_packed` made."""
    packed = state['packed']
    model.load_state_dict(state['model'] | {name: Packed(*parts).dense() for name, parts in packed.items()})
    ready = {id(parts): Packed(*parts).on(device) for parts in packed.values()}    # a tied one stays one
    for name, parts in packed.items():
        owner, _, leaf = name.rpartition('.')
        setattr(model.get_submodule(owner), leaf, ready[id(parts)])


def write(run):
    write_packed(run, 'int8', quantised)


def write_packed(run, kind, quantise):
    """A run of its own in a run's folder, its matrices quantised, and what that costs in bits."""
    folder, packed, weights = run.folder / kind, {}, {}
    known, parts = dict(run.model.named_parameters(remove_duplicate=False)), {}
    for name, w in run.model.state_dict().items():
        number, w = id(known.get(name)), finite(name, w)
        if name not in known or w.dim() != 2:
            weights[name] = w
            continue
        if number not in parts:
            parts[number] = [*(quantise if w.shape[1] % GROUP == 0 else quantised)(w)]
        packed[name] = parts[number]
    keep = ('config', 'ideas', 'settings', 'tokenizer', 'data', 'fingerprint')
    state = {name: run.state[name] for name in keep} | dict(version=kind, model=weights, packed=packed)
    folder.mkdir(exist_ok=True)
    write_beside(folder / run.tokenizer.filename, lambda f: f.write(run.tokenizer.blob))
    write_beside(folder / 'ckpt.pt', lambda f: torch.save(state, f))
    print(f'{folder}: {(folder / "ckpt.pt").stat().st_size / 1e6:.1f} MB, sample.py opens it as a run')
    data = text_of(run)
    if not data:
        return print(f'its cost in bits per byte is not measured: {run.state["data"]} is not there')
    s = SimpleNamespace(**run.settings | dict(evals='bpb'))
    measure = run.ideas.seam(Measure)(s, run.tokenizer, data, run=run.folder)
    slices = min(SLICES, math.ceil(SLICES * 2e5 / data.docs['val']['bytes'].sum()))
    device = next(run.model.parameters()).device
    models = run.model, open_run(folder, device).model
    before, after = (measure.bpb(model, slices)['bpb'] for model in models)
    print(f'bits per byte {before:.4f} -> {after:.4f} ({100 * (after / before - 1):+.2f} %), '
          f'on {slices / SLICES:.1%} of the validation text')

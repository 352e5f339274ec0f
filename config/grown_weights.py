"""The weights of a model that has grown, and what its optimizers know: what config/growth.py is made of. No
idea of its own, and no settings.

Width by HyperCloning (Samragh 2024, 2409.12903): every activation becomes copies of the old one, so a matrix
is repeated, and divided by how often its input is. Noise, + on one of a pair of input copies and - on the
other, cancels as long as the copies are equal, and lets them learn different things. Depth by layers that do
nothing at first, spread between the old ones, or by a stack of the old (Du 2024, 2405.15319), which learns
from the start but computes something else.

A module that grows in a way of its own has `grow_from(old, dice)`: it takes over the weights of the old
module in its place and returns {its parameter: (old parameter, copies that share its gradient, how: see
`spread`)}, or None to grow as any other. A GPT that further layers would change has `grows_deeper = False`.
"""
import dataclasses

import torch
import torch.nn.functional as F

import train
from model import Linear, blueprint

WIDTHS = ('n_embd', 'n_head', 'n_kv_head', 'mlp_hidden')
SIZES = (*WIDTHS, 'n_layer')


def grown_config(config, changes, stack=False):
    """The config after growth to `changes`, a dict of sizes. ValueError if it does not lead there.

    Widths grow by whole multiples, and n_embd takes the number of heads and mlp_hidden along unless they are
    named; a head keeps its width, and a key head that serves all queries stays the only one.
    """
    if unknown := [name for name in changes if name not in SIZES]:
        raise ValueError(f'{unknown[0]} cannot grow: choose {", ".join(SIZES)}')
    if wrong := [name for name, size in changes.items() if type(size) is not int]:
        raise ValueError(f'{wrong[0]} is {changes[wrong[0]]!r}, it must be a whole number')
    n = max(1, changes.get('n_embd', config.n_embd) // config.n_embd)
    wide = {name: n * getattr(config, name) for name in ('n_head', 'mlp_hidden')} | changes
    kept = config.n_kv_head == 1 < config.n_head
    wide.setdefault('n_kv_head', 1 if kept else wide['n_head'] * config.n_kv_head // config.n_head)
    new = dataclasses.replace(config, **wide)
    for name in SIZES:
        old, size = getattr(config, name), getattr(new, name)
        if size < old or name in WIDTHS and size % old:
            by = 'whole multiples' if name in WIDTHS else 'more of them'
            raise ValueError(f'{name} grows by {by}, and {size} is none of {old}')
    if stack and new.n_layer % config.n_layer:
        raise ValueError(f'{new.n_layer} layers are no stack of {config.n_layer}')
    times = {name: getattr(new, name) // getattr(config, name) for name in WIDTHS}
    whole = all(p.ndim < 3 for p in blueprint(config).parameters())
    if not whole and (wide := [name for name in WIDTHS if times[name] > 1]):
        raise ValueError(f'{wide[0]} cannot grow in a model that has several matrices in one tensor')
    if times['n_kv_head'] != times['n_head'] and not kept:
        raise ValueError(f'n_kv_head {new.n_kv_head} would give key heads other query heads than before: '
                         f'let it grow as n_head does')
    new.head_scale = config.head_scale / times['n_embd'] if config.tie_embeddings else config.head_scale
    return new


def grown_layers(old, new, stack):
    """For every layer of `new` the layer of `old` it comes from, or None for a fresh one that does nothing.

    Fresh ones are spread between the old, below those that have a value embedding. stack repeats the whole.
    """
    if stack:
        return [i % old.n_layer for i in range(new.n_layer)]
    low, fresh = old.n_layer - getattr(old, 'value_embeds', 0), new.n_layer - old.n_layer
    after = [i * low // fresh for i in range(fresh)]           # each fresh one comes after so many old ones
    return [source for i in range(old.n_layer + 1)
            for source in [None] * after.count(i) + [i] * (i < old.n_layer)]


def spread(x, shape, how=''):
    """x repeated whole, like tiles, to `shape`; or two matrices in one, one above the other ('gated'), or
    zeros after it ('append'); or what the function `how` makes of it."""
    if callable(how):
        return how(x)
    if how == 'gated':
        return torch.cat([spread(half, (shape[0] // 2, shape[1])) for half in x.chunk(2)])
    if how == 'append':
        return F.pad(x, (0, shape[1] - x.shape[1], 0, shape[0] - x.shape[0]))
    return x.repeat([new // old for new, old in zip(shape, x.shape)]) if x.ndim else x.clone()


@torch.no_grad()
def grow(old, config, snr_db=10.0, stack=False, seed=0):
    """A model of `config`, from grown_config, that computes what `old` does (but for stack).

    snr_db: the weights' power over that of the noise, in decibels, math.inf for none. Returns the model and
    {parameter: (old parameter, copies that share its gradient, how it was spread)}, without fresh layers'.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        new = config.GPT(config).to(old.wte.weight.dtype)
    new.compute_dtype = old.compute_dtype
    layers = grown_layers(old.config, config, stack)
    source = {block: None if layer is None else old.blocks[layer] for block, layer in zip(new.blocks, layers)}
    for block in [block for block, before in source.items() if before is None]:
        [m for m in block.attn.proj.modules() if isinstance(m, Linear)][-1].weight.zero_()
    dice, came_from = torch.Generator().manual_seed(seed), {}

    def take(new, old, in_block=False, gated=False):
        if hasattr(new, 'grow_from') and (taken := new.grow_from(old, dice)):
            return came_from.update(taken)
        for name, p in new.named_parameters(recurse=False):
            if getattr(old, name, None) is not None and p not in came_from:        # a tied head is its table
                # of a tied table the heads read states that head_scale has made smaller already
                divided = isinstance(new, Linear) and not (config.tie_embeddings and not in_block and
                                                           len(p) == len(getattr(old, name)))
                noise = (snr_db, dice) if in_block else None                       # the heads get none
                came_from[p] = widen(p, getattr(old, name), divided, 'gated' if gated else '', noise)
        for name, child in new.named_children():
            before = source[child] if child in source else getattr(old, name, None)
            if before is not None:
                take(child, before, in_block or child in source, name == 'up' and getattr(new, 'gated', False))

    take(new, old)
    return new.train(old.training).to(old.wte.weight.device), came_from


def widen(p, q, divided, how, noise):
    """Fills p with copies of q, divided by how often its input is; noise: its snr_db and dice. Where it came
    from."""
    p.copy_(spread(q, p.shape, how))
    copies = 1 if p.shape == q.shape else p.shape[-1] // q.shape[-1]
    if divided:
        n_in, copies = copies, p.shape[0] // q.shape[0]
        p.div_(n_in)
        if noise and n_in > 1:
            p.add_(cancelling_noise(p, n_in, *noise))
    return q, copies, how


def cancelling_noise(weight, n_in, snr_db, dice):
    """Noise for a matrix of n_in equal blocks of columns: + on one of a pair, - on the other."""
    noise = torch.randn(len(weight), n_in // 2, 1, weight.shape[1] // n_in, generator=dice).to(weight)
    noise *= weight.square().mean().sqrt() / noise.square().mean().sqrt() * 10 ** (-snr_db / 20)
    both = torch.cat([noise, -noise], dim=2).flatten(1)
    return F.pad(both, (0, weight.shape[1] - both.shape[1]))   # an odd block gets none


def states_of(optimizer):
    """{parameter: its own state} of an optimizer; Muon keeps stacked tensors for a group."""
    if not isinstance(optimizer, train.Muon):
        return dict(optimizer.state)
    return {p: {k: v[i] if torch.is_tensor(v) else v for k, v in optimizer.state[group['params'][0]].items()}
            for group in optimizer.param_groups for i, p in enumerate(group['params'])}


def give_states(optimizer, states):
    """Goes on from {parameter: its own state}; a parameter without one has averaged nothing yet."""
    if not isinstance(optimizer, train.Muon):
        mine = [p for group in optimizer.param_groups for p in group['params']]
        return optimizer.state.update((p, states[p]) for p in mine if states.get(p))
    for params in (group['params'] for group in optimizer.param_groups):
        known = [states.get(p) or dict(momentum=torch.zeros_like(p)) for p in params]
        optimizer.state[params[0]].update({k: torch.stack([state[k] for state in known]).detach() if torch.is_tensor(v)
                                           else v for k, v in known[0].items()})


def carried(optimizers, came_from):
    """{parameter: what its optimizer goes on from}, by what those of the old model knew: gradients are shared
    out among the copies. came_from as of `grow`."""
    known, state = {}, {}
    for optimizer in optimizers:
        known |= states_of(optimizer)
    for p, (q, copies, how) in came_from.items():
        shares = dict(momentum=copies, exp_avg=copies, exp_avg_sq=copies ** 2)
        state[p] = {name: spread(t, p.shape, how) / shares[name] if name in shares else t.clone()
                    for name, t in known.get(q, {}).items() if name in (*shares, 'step')}
    return state

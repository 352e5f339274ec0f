"""Growth: a model gets wider or deeper while it trains, and begins by computing what it did before.

    torchrun train.py config/babylm.py config/growth.py --growth="[(0.3, dict(n_embd=640))]"
    python train.py config/babylm.py config/growth.py --init_from=out/small --n_embd=512      a finished run grows

Width by HyperCloning (Samragh 2024, 2409.12903): every activation becomes copies of the old one, so a matrix is
repeated, and divided by how often its input is. Noise, + on one of a pair of input copies and - on the other,
cancels as long as the copies are equal, and lets them learn different things. Depth by layers that do nothing
at first, spread between the old ones, or by a stack of the old (Du 2024, 2405.15319), which learns from the
start but computes something else. The optimizer's averages carry over, rates follow n_embd, and the time that
it takes is on the clock. In a stack the config that grows comes last: those before it compute their sizes from
the final ones. What it did stands in config/hypercloning.py and config/raise.py, which set how it grows.

An idea whose modules grow otherwise gives them `grow_from(old, dice)`, which takes over the weights of the old
module of the same name and returns {parameter: (old parameter, copies that share its gradient, how it was
spread)}, or None where they grow as any other; it adds its sizes in Run.grown_config, and what it copies
otherwise in Run.grow. Where a class MLP has a true `keeps_width`, widths cannot grow.
"""
import dataclasses
import time

import torch
import torch.nn.functional as F

import model
import train
from model import Linear
from prepare_data import UserError

growth: tuple = ()               # (progress, sizes from then on), ...: [(0.3, dict(n_embd=384)), ...]
growth_snr_db: float = 10.0      # the weights' power over that of the noise that tells copies apart
growth_depth: str = 'fresh'      # fresh|stack: new layers that do nothing at first, or a stack of the old
head_scale: float = 1.0          # 0.000001..: of the last hidden states; growth lowers a tied head's

WIDTHS = ('n_embd', 'n_head', 'n_kv_head', 'mlp_hidden')
SIZES = (*WIDTHS, 'n_layer')


def grown_config(config, changes, stack=False):
    """The config after growth to `changes`, a dict of sizes. ValueError if it does not lead there.

    Widths grow by whole multiples, and n_embd takes the number of heads and mlp_hidden along unless they are
    named; a head keeps its width, and a key head that serves all queries stays the only one.
    """
    if wide := [name for name in changes if name in WIDTHS and getattr(config.MLP, 'keeps_width', False)]:
        raise ValueError(f'{wide[0]} cannot grow with the MLPs that {config.MLP.__module__.rpartition(".")[2]} makes')
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
    layers, source = grown_layers(old.config, config, stack), dict(old.named_parameters())
    dice, came_from = torch.Generator().manual_seed(seed), {}
    for block in [block for block, layer in zip(new.blocks, layers) if layer is None]:
        [m for m in block.attn.proj.modules() if isinstance(m, Linear)][-1].weight.zero_()
    for name, p in new.named_parameters():
        if p in came_from:
            continue
        there = name
        if in_block := name.startswith('blocks.'):
            _, layer, rest = name.split('.', 2)
            there = f'blocks.{layers[int(layer)]}.{rest}'
        owner = owner_of(new, name)
        if owner and layers[int(owner.split('.')[1])] is not None:
            if taken := new.get_submodule(owner).grow_from(old.get_submodule(owner_name(owner, layers)), dice):
                came_from |= taken
                continue
        if there in source:
            module, q = new.get_submodule(name.rpartition('.')[0]), source[there]
            gated = name.endswith('mlp.up.weight') and config.mlp == 'swiglu'
            came_from[p] = widen(p, q, module, in_block, config.tie_embeddings, gated, snr_db, dice)
    return new.train(old.training).to(old.wte.weight.device), came_from


def owner_of(net, name):
    """The path of the innermost module of a parameter that grows in its own way, or ''."""
    path = name.rpartition('.')[0]
    while path and not hasattr(net.get_submodule(path), 'grow_from'):
        path = path.rpartition('.')[0]
    return path


def owner_name(path, layers):
    _, layer, rest = path.split('.', 2)
    return f'blocks.{layers[int(layer)]}.{rest}'


def widen(p, q, module, in_block, tied, gated, snr_db, dice):
    """Fills p with what q was, and returns where it came from."""
    how = 'gated' if gated else ''
    p.copy_(spread(q, p.shape, how))
    copies = 1 if p.shape == q.shape else p.shape[-1] // q.shape[-1]
    # a head that is not the table itself reads states that head_scale has made smaller already
    if isinstance(module, Linear) and not (tied and not in_block and len(p) == len(q)):
        n_in, copies = copies, p.shape[0] // q.shape[0]
        p.div_(n_in)
        if in_block and n_in > 1:                          # the heads get none
            p.add_(cancelling_noise(p, n_in, snr_db, dice))
    return q, copies, how


def cancelling_noise(weight, n_in, snr_db, dice):
    """Noise for a matrix of n_in equal blocks of columns: + on one of a pair, - on the other."""
    noise = torch.randn(len(weight), n_in // 2, 1, weight.shape[1] // n_in, generator=dice).to(weight)
    noise *= weight.square().mean().sqrt() / noise.square().mean().sqrt() * 10 ** (-snr_db / 20)
    both = torch.cat([noise, -noise], dim=2).flatten(1)
    return F.pad(both, (0, weight.shape[1] - both.shape[1]))   # an odd block gets none


def states_of(optimizer):
    """{parameter: its own state} of an optimizer; Muon keeps one stacked tensor a group."""
    if not isinstance(optimizer, train.Muon):
        return dict(optimizer.state)
    return {p: dict(momentum=average) for group in optimizer.param_groups
            for p, average in zip(group['params'], optimizer.state[group['params'][0]].get('momentum', ()))}


def give_states(optimizer, states):
    """Goes on from {parameter: its own state}; a parameter without one has averaged nothing yet."""
    if not isinstance(optimizer, train.Muon):
        mine = [p for group in optimizer.param_groups for p in group['params']]
        return optimizer.state.update((p, states[p]) for p in mine if states.get(p))
    for params in (group['params'] for group in optimizer.param_groups):
        averages = [states.get(p, {}).get('momentum', torch.zeros_like(p)) for p in params]
        optimizer.state[params[0]]['momentum'] = torch.stack(averages).detach()


class GPT(model.GPT):

    def final(self, x):
        x = super().final(x)
        return x * self.config.head_scale if self.config.head_scale != 1 else x


class Run(train.Run):

    def __init__(self, s, ideas):
        super().__init__(s, ideas)
        self.times['growth'], self.n_grown, self.stages = 0.0, 0, None

    def grown_config(self, config, changes):
        return grown_config(config, changes, self.s.growth_depth == 'stack')

    def grow(self, old, config, seed):
        """The model grown to a config, and where its parameters came from."""
        return grow(old, config, self.s.growth_snr_db, self.s.growth_depth == 'stack', seed)

    def plan(self, config):
        """[(progress, the config from then on)], from the config that the run begins with."""
        stages, last = [], 0.0
        for stage in self.s.growth:
            try:
                at, changes = stage
                if not last < at < 1:
                    raise ValueError(f'progress {at} does not lie between {last} and 1')
                config, last = self.grown_config(config, changes), at
            except (TypeError, ValueError, AttributeError) as e:
                raise UserError(f'growth has {stage!r} ({e}): write it like [(0.3, dict(n_embd=512))]') from e
            stages.append((at, config))
        return stages

    def largest(self):
        if self.stages is None:
            self.n_grown = self.checkpoint['grown'] if self.resuming else 0
            stages = self.plan(self.config_of_settings() if self.resuming else self.config)
            self.final = stages[-1][1] if stages else self.config
            self.stages = stages[self.n_grown:]
        return self.final

    def shape_from(self, before):
        theirs, ours, given = before.config, self.config, self.ideas.set_at
        names = [*dict.fromkeys([*self.shape_names(), *SIZES, 'head_scale'])]
        shape = {k: getattr(theirs, k) for k in names if hasattr(theirs, k)}
        changes = {k: getattr(ours, k) for k in names if k in given and getattr(ours, k) != shape.get(k)}
        try:
            config = self.grown_config(dataclasses.replace(ours, **shape), changes)
        except ValueError as e:
            raise UserError(f'{self.s.init_from} is of another model, and {e}: give its shape, or none') from e
        vars(self.s).update({k: getattr(config, k) for k in names})
        return config

    def other_size(self, before):
        """Whether the model of another run must grow to be this one's."""
        names = [k for k in [*self.shape_names(), *SIZES] if hasattr(before.config, k)]
        return any(getattr(before.config, k) != getattr(self.config, k) for k in names)

    def start_from(self, before):
        if self.other_size(before):
            before, _ = self.grow(before, self.config, self.s.seed)
        super().start_from(before)

    def groups(self, model):
        groups = super().groups(model)      # a head that growth has scaled down answers that much less
        groups['heads']['base_lr'] /= model.config.head_scale
        return groups

    def dearer(self):
        final, now = (net.flops_per_token() for net in (train.models.blueprint(self.final), self.model))
        return super().dearer() * final / now

    def get_going(self):
        began = time.monotonic()
        super().get_going()
        self.warm_seconds = self.agreed(time.monotonic() - began)     # what a growth will take, more or less

    def time_left(self):
        while super().time_left():
            room = self.clock.max_steps or self.left > 2 * self.warm_seconds
            if not (self.stages and self.progress >= self.stages[0][0] and room):
                return True
            self.grow_now()                      # that took time: once more
        return False

    def grow_now(self):
        began, (_, config) = time.monotonic(), self.stages.pop(0)
        self.n_grown, self.clock.progress = self.n_grown + 1, self.progress
        self.energy.turn('idle')
        self.change_model(*self.grow(self.model, config, self.s.seed + self.n_grown))
        self.choose_kernels()
        self.get_going()
        self.say(f'         grown to {self.model.describe()}')
        self.warm_seconds = self.agreed(time.monotonic() - began)
        self.times['growth'] += self.warm_seconds
        self.clock.trained += self.warm_seconds
        self.energy.turn('train')

    def change_model(self, new, came_from):
        """Goes on with a grown model, and optimizers that know what the old ones knew: gradients are shared out
        among the copies."""
        known, state = {}, {}
        for optimizer in self.optimizers:
            known |= states_of(optimizer)
        for p, (q, copies, how) in came_from.items():
            shares = dict(momentum=copies, exp_avg=copies, exp_avg_sq=copies ** 2)
            state[p] = {name: spread(t, p.shape, how) / shares[name] if name in shares else t.clone()
                        for name, t in known.get(q, {}).items()}
        self.take_model(new)
        for optimizer in self.optimizers:
            give_states(optimizer, state)

    def state(self):
        return super().state() | dict(grown=self.n_grown)

    def finish(self):
        if self.stages and not self.stopping:
            self.say(f'warning: no time was left for the growth at progress {self.stages[0][0]:g}')
        super().finish()

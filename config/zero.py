"""The optimizers' state and work shared out over ranks (ZeRO's first stage: Rajbhandari 2020, 1910.02054).

    torchrun --nproc_per_node=8 train.py config/babylm.py config/zero.py

A rank keeps the state of its part of the weights, Muon orthogonalises that part alone, and all ranks gather what
has moved, in fp32. Expected: 1/n of the state and of Muon's matrix products on each of n ranks, for one more
sending of all weights a step: it pays where a link is fast or the model wide (`bench_mfu.py --ranks`), not for 11M
on PCIe. PyTorch's ZeroRedundancyOptimizer takes parameters singly, where Muon takes all of one shape at once. A
checkpoint is that of a run without this, so that any number of ranks, one too, goes on from it. Not measured: no
two cards have run it.
"""
import functools

import torch
import torch.distributed as dist

import train
from config import refuse
from config.grown_weights import give_states, states_of

NOT_WITH = dict(growth='what its optimizers know of a larger model no rank holds whole')


class Run(train.Run):
    whole = ()               # optimizers of all parameters; they hold a state while it is loaded or saved
    parts = None             # parameters that each rank moves; vectors and scalars every rank moves itself

    def groups(self, model):
        groups = super().groups(model)
        if not self.parts:
            return groups
        others = {p for r, part in enumerate(self.parts) if r != self.rank for p in part}
        return {name: g | dict(params=[p for p in g['params'] if p not in others]) for name, g in groups.items()}

    def make_optimizers(self, model):
        self.parts = None
        whole = super().make_optimizers(model)
        if self.world == 1:
            return whole
        groups = super().groups(model)
        n = len(groups['matrices']['params'])
        refuse(n < self.world, f'{self.world} ranks are more than the {n} matrices they would share: leave out zero.py')
        self.whole, self.parts = whole, dealt(groups, self.world)
        mine = super().make_optimizers(model)
        for one, every in zip(mine, whole):
            one.register_load_state_dict_pre_hook(functools.partial(own_part, every))
        return mine

    def moved(self):
        return super().moved().union(*self.parts or ())

    def descend(self, loss):
        told = super().descend(loss)
        if self.parts:
            self.gather()
        return told

    @torch.no_grad()
    def gather(self):
        """Every rank's part of the weights, as that rank has moved it."""
        sizes = [[p.numel() for p in part] for part in self.parts]
        most = max(map(sum, sizes))
        mine = torch.cat([p.flatten() for p in self.parts[self.rank]])
        mine = torch.nn.functional.pad(mine, (0, most - len(mine)))
        everything = mine.new_empty(self.world * most)
        dist.all_gather_into_tensor(everything, mine)
        for r, (part, size) in enumerate(zip(self.parts, sizes)):
            if r != self.rank:
                theirs = everything[r * most:][:sum(size)].split(size)
                torch._foreach_copy_(part, [t.view_as(p) for p, t in zip(part, theirs)])

    def save(self):
        if self.parts:
            names = {p: name for name, p in self.model.named_parameters()}
            mine = [{names[p]: {k: v.cpu() if torch.is_tensor(v) else v for k, v in state.items()}
                     for p, state in states_of(one).items()} for one in self.optimizers]
            told = [None] * self.world if self.master else None
            dist.gather_object(mine, told)
            for every, *parts in zip(self.whole, *told) if self.master else ():
                known = {name: state for part in parts for name, state in part.items()}
                give_states(every, {p: known[name] for p, name in names.items() if name in known})
        unsaved = super().save()
        for every in self.whole:
            every.state.clear()
        return unsaved

    def state(self):
        return super().state() | (dict(optimizers=[o.state_dict() for o in self.whole]) if self.parts else {})


def dealt(groups, n):
    """n lists of parameters, of about as many numbers: the largest first, each to who has the least. Matrices
    first, so that Muon's work is shared out as evenly."""
    parts, sizes = [[] for _ in range(n)], [0] * n
    for group in sorted(groups.values(), key=lambda g: g is not groups['matrices']):
        for p in sorted((p for p in group['params'] if p.ndim > 1), key=lambda p: (-p.numel(), p.shape)):
            least = sizes.index(min(sizes))
            parts[least].append(p)
            sizes[least] += p.numel()
    return parts


def own_part(every, one, known):
    """Of what a checkpoint knows of all parameters, what is this rank's."""
    every.load_state_dict(known)
    give_states(one, states_of(every))
    every.state.clear()
    return one.state_dict()

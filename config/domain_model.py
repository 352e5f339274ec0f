"""The model of config/domains.py: MLPs of which a part is each domain's own (DEMix, Gururangan 2021,
2108.05036), and how a plain one splits. No idea of its own, and no settings.
"""
import math

import torch
import torch.nn.functional as F

import model
from config.growth import GPT as GrowingGPT
from config.grown_weights import spread
from config.stacked_weights import GPT as CountedGPT, Several
from prepare_data import refuse


def names_of(config):
    """The domains of a model, which one of other ideas has not."""
    return config.domains.split(',') if getattr(config, 'domains', '') else []


def own_hidden(config):
    """How many units of an MLP are a domain's own. ValueError where that is none, or all."""
    own = round(config.domain_share * config.mlp_hidden)
    if names_of(config) and not 0 < own < config.mlp_hidden:
        raise ValueError(f'domain_share is {config.domain_share}, it must leave some of mlp_hidden '
                         f'{config.mlp_hidden} to each domain and some to all')
    return own


class MLP(model.MLP):
    """An MLP whose last hidden units are each domain's own.

    A batch is of one domain, domain () says which: its weights are looked up, and the rest is the plain MLP.
    Where the domain is None the parts' mean stands for all.
    """

    def __init__(self, config):
        own, C, n = own_hidden(config), config.n_embd, len(names_of(config))
        super().__init__(config, config.mlp_hidden - own if n else None)
        self.n_domains, self.halves = n, 2 if self.gated else 1
        if n:
            self.own_up, self.own_down = Several(n, C, own * self.halves, 1), Several(n, own, C, 1)

    def forward(self, x, context):
        if not self.n_domains:
            return super().forward(x, context)
        # domain.view(1): torch.compile reads an index_select by a tensor () otherwise than PyTorch does
        domain = context.extras['domain']
        own_up, own_down = (w.mean(0) if domain is None else w.index_select(0, domain.view(1))[0]
                            for w in (self.own_up.weight, self.own_down.weight))
        up = [w.unflatten(0, (self.halves, -1)) for w in (self.up.weight, own_up)]     # gates go with gates
        up, down = torch.cat(up, dim=1).flatten(0, 1), torch.cat([self.down.weight, own_down], dim=1)
        return self.through(x, up, down)

    def init_weights(self):
        super().init_weights()
        if self.n_domains:
            self.own_up.weight.normal_(std=self.up.in_features ** -0.5)
            self.own_down.weight.zero_()


class GPT(CountedGPT, GrowingGPT):
    """told: the domain () of all text that is read without one, or None."""

    def build(self, config):
        super().build(config)
        names = names_of(config)
        refuse(config.domain and config.domain not in names,
               f'--domain is {config.domain!r}, and the model has {", ".join(names) or "no domains"}')
        told = torch.tensor(names.index(config.domain)) if config.domain else None
        self.register_buffer('told', told, persistent=False)

    def forward(self, idx, targets, reduction='mean', domain=None, **extras):
        if reduction == 'none' and domain is None and self.untold():
            return self.mixed(idx, targets)
        return super().forward(idx, targets, reduction, domain=domain, **extras)

    def trunk(self, idx, cache=None, domain=None, **extras):
        return super().trunk(idx, cache, domain=self.told if domain is None else domain, **extras)

    def untold(self):
        """Whether text has to tell itself which domain it is of."""
        return bool(self.config.domains) and self.told is None

    def by_domain(self, idx, targets):
        """Nats of every token by every domain, (domains, B, T)."""
        domains = torch.arange(len(names_of(self.config)), device=idx.device)
        return torch.stack([self(idx, targets, 'none', domain) for domain in domains])

    def mixed(self, idx, targets):
        """Nats (B, T) of rows, a text each, of which no domain is told: what a row has shown so far says it.

        p(x_t | x_<t) = sum_d p(d | x_<t) p(x_t | x_<t, d), which is sum_d p(x_<=t | d) / sum_d p(x_<t | d)
        where all are equally likely at first. What a target < 0 hides counts there, as it stands in idx.
        """
        shown = torch.where(targets < 0, F.pad(idx[:, 1:], (0, 1)), targets)
        nats = self.by_domain(idx, shown).double().cumsum(2)
        upto = math.log(len(nats)) - (-nats).logsumexp(0)
        return (upto - F.pad(upto[:, :-1], (1, 0))).masked_fill(targets < 0, 0).float()

    def likeliest(self, idx):
        """The domain told, or that of which idx (B, T) is likeliest; None if nothing says which."""
        if not self.untold() or idx.shape[1] < 2:
            return self.told
        targets = idx[:, 1:].masked_fill(idx[:, 1:] == self.config.bos, -1)        # padding says nothing
        return self.by_domain(idx[:, :-1], targets).sum((1, 2)).argmin()

    def hints(self, idx):
        return super().hints(idx) | dict(domain=self.likeliest(idx[:, -self.config.block_size:]))

    def describe(self):
        c, n = self.config, len(names_of(self.config))
        own = f'; {own_hidden(c)} of {c.mlp_hidden} in each of {n} domains' if n else ''
        return super().describe() + own


# ---- the split

def parted(name, old, new, parts):
    """(name, how, copies): what a parameter comes from where the domains change from config to config, what
    is made of that, and how many share its gradient.

    The last hidden units of a plain MLP are copied to every domain, so that each computes what it did; of
    domains that there are the i-th new one gets the part of the parts[i]-th.
    """
    path, mlp, end = name.rpartition('mlp.')
    if not mlp:
        return name, '', 1
    if names_of(old):
        return name, (lambda x: x[parts]) if end.startswith('own_') else '', 1
    n, shared, halves = len(names_of(new)), new.mlp_hidden - own_hidden(new), 2 if new.mlp == 'swiglu' else 1

    def up(which):
        return lambda x: x.unflatten(0, (halves, -1))[:, which].flatten(0, 1)
    there, how, copies = {
        'up.weight': ('up.weight', up(slice(shared)), 1),
        'down.weight': ('down.weight', lambda x: x[:, :shared], 1),
        'own_up.weight': ('up.weight', lambda x: up(slice(shared, None))(x).expand(n, -1, -1), n),
        'own_down.weight': ('down.weight', lambda x: x[:, shared:].expand(n, -1, -1), n)}[end]
    return path + mlp + there, how, copies


@torch.no_grad()
def split(old, config, parts, seed):
    """The model of a config whose domains are others, and where its parameters came from, as by `grow`."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        new = config.GPT(config).to(old.wte.weight)
    new.compute_dtype, source, came_from = old.compute_dtype, dict(old.named_parameters()), {}
    for name, p in new.named_parameters():
        there, how, copies = parted(name, old.config, config, parts)
        if there in source:
            p.copy_(spread(source[there], p.shape, how))
            came_from[p] = source[there], copies, how
    return new.train(old.training), came_from

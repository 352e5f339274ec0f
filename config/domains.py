"""Experts for domains (DEMix, Gururangan 2021, 2108.05036): late on, a quarter of every MLP is each source's.

    torchrun train.py config/babylm.py config/domains.py
    python train.py config/babylm.py config/domains.py --init_from=out/babylm+domains --domains=...,new
        --frozen=... --out_dir=out/added
    python sample.py out/babylm+domains "Mia" --domain=childes

A micro-batch is of one source, so that a token meets no more weights than before, and which is a look-up. The
split computes what the model had learned. val_bpb is that of text whose domain is not told (the model infers
it as it reads), val_bpb_told that where it is. The list of --domains decides what a further run has: a new
domain branches off the one that suits it best, one not named is left out, those in --frozen stay to the bit.
Text of no domain is not read. Evaluations cost a forward pass a domain. Expected: a small gain in a domain,
little where domains are small. At equal total parameters its rival is a wider plain model (config/wide.py).

What it did: +2.0 % bits per byte in ten minutes of a CPU (1.5770, told 1.5763, beside 1.5462, standard
deviation 0.0020; the wide plain model +1.0 %; 2026-11-21, commit 3f931df). At 300,000 tokens it gained
(2.1415 beside 2.191), all but 0.004 of it by the even mix: the same micro-batches without any split gave
2.145. In a doll of config/babylm.py, twelve epochs: 2.176 beside 2.210, -1.5 % with 62 % more parameters in all,
for as many passes as there are domains; told 2.208, -0.1 %; with labels at random
(config/random_sources.py) 2.320. So it is the mixture of domains' answers that gains, and only with true ones.
Lost by the clock (RESULTS.md).
"""
import dataclasses

import numpy as np
import torch

import train
from config.domain_measure import Measure, domain_of, nats_by_domain
from config.domain_model import GPT, MLP, names_of, own_hidden, split
from config.growth import Run as GrowingRun
from config.stacked_weights import Run as StackedRun
from prepare_data import UserError, refuse

domains: str = 'sources'      # 'sources', or names of sources; 'childes+qed,wiki' puts two in one; '' is none
domains_from: float = 0.6     # 0..0.999: progress at which the MLPs split into domains' parts; 0 is at once
domain_share: float = 0.25    # 0.001..0.999: of mlp_hidden that is a domain's own
frozen: str = ''              # domains that stay as they are, as does all that is shared
domain: str = ''              # for sample.py: the one that all text is of; else the text tells

NOT_WITH = dict.fromkeys(('climb_data', 'raise'),
                         'a curriculum reads all sources as one, domains each on its own')


# ---- what it reads

def domain_names(s, data):
    """The names of the run's domains, of the setting; UserError if the data does not have them."""
    refuse(s.frozen and (s.init_from == 'scratch' or not s.domains),
           f'frozen is {s.frozen!r}: it needs an --init_from that has domains, and all names of this run in '
           f'--domains')
    if not s.domains:
        return []
    sources = [*data.meta['splits']['train']['sources']]
    names = sources if s.domains == 'sources' else s.domains.split(',')
    learn = [name for name in names if name not in s.frozen.split(',')]
    named = [source for name in learn for source in name.split('+')]
    unknown = [source for source in named if source not in sources]
    refuse(unknown, f'domains names {unknown[0] if unknown else ""!r}, the sources of {data.folder} are '
                    f'{", ".join(sources)}')
    refuse(len({*named}) < len(named) or len({*names}) < len(names),
           f'domains is {s.domains!r}, and names one of them twice')
    refuse(not learn, f'frozen is {s.frozen!r}, and leaves no domain to learn: name a new one in domains too')
    return names


class Stream(train.Stream):
    """A stream for each domain that learns: a micro-batch is of the one that is furthest behind its share of
    the text, so that every step has all that are large enough. Where a domain's stream stands follows from
    the number of the micro-batch alone; the turns repeat after so many."""

    TURNS = 4096

    def __init__(self, data, s, weights=None):
        super().__init__(data, s, weights)
        self.streams = {}
        if weights is None and s.domains:            # else it is that of a domain itself
            self.streams = self.of_domains(data, s)
            self.take_turns()

    def of_domains(self, data, s):
        sources, streams = data.meta['sources'], {}
        weights = self.weights or [1.0] * len(sources)
        for number, name in enumerate(domain_names(s, data)):
            if name not in s.frozen.split(','):
                mine = [w * (source in name.split('+')) for w, source in zip(weights, sources)]
                refuse(not any(mine), f'weights leave nothing of domain {name!r} to read: leave it away')
                streams[number] = type(self)(data, s, mine)
        return streams

    def take_turns(self):
        """had (TURNS + 1, n): how many micro-batches each domain had before each turn."""
        sizes, n = np.array([stream.epoch_tokens() for stream in self.streams.values()]), len(self.streams)
        share = np.maximum(sizes / sizes.sum(), 2 / self.TURNS)                     # none is left out
        owed, self.had = np.zeros(n), np.zeros((self.TURNS + 1, n), np.int64)
        for turn in range(self.TURNS):
            owed += share / share.sum()
            self.had[turn + 1] = self.had[turn] + (np.arange(n) == owed.argmax())
            owed[owed.argmax()] -= 1

    def turn(self, number):
        """Whose micro-batch this is, and how many it had before."""
        cycle, turn = divmod(number, self.TURNS)
        at = int((self.had[turn + 1] - self.had[turn]).argmax())
        return at, int(cycle * self.had[-1, at] + self.had[turn, at])

    def epoch_tokens(self):
        return sum(stream.epoch_tokens() for stream in self.streams.values()) or super().epoch_tokens()

    def first_rows(self, n, T):
        if not self.streams:
            return super().first_rows(n, T)
        return np.concatenate([self.batch(row, 1, T)['idx'].numpy() for row in range(n)])

    def rows(self, first, B, T):
        if not self.streams:
            return super().rows(first, B, T)
        at, before = self.turn(first // B)
        return [*self.streams.values()][at].rows(before * B, B, T)

    def batch(self, first, B, T):
        batch = super().batch(first, B, T)
        domain = dict(domain=torch.tensor([*self.streams][self.turn(first // B)[0]])) if self.streams else {}
        return batch | domain


# ---- the run

def nearest_parts(before, config, data):
    """For each domain of `config` the number of the part of the model `before` to begin with: its own, or for
    a new one that which some of its documents surprise least."""
    has, tokens, docs = names_of(before.config), data.tokens['train'], data.docs['train']
    ends = np.append(docs['start'][1:], len(tokens))
    of = np.array(domain_of(config, data))[docs['source']]

    def nearest(number):
        some = np.random.default_rng(0).permutation(np.flatnonzero(of == number))[:64]
        texts = ((doc, tokens[docs['start'][doc]:ends[doc]][:1024]) for doc in some)
        return int(sum(nats_by_domain(before, texts).values()).argmin())
    return [has.index(name) if name in has else nearest(i) for i, name in enumerate(names_of(config))]


class Run(StackedRun, GrowingRun):
    """A split is the last growth of a run, and another one's domains that of its start."""

    def shape(self):
        refuse(self.s.domain, f'--domain={self.s.domain} is for sample.py: leave it away')
        self.domains = domain_names(self.s, self.data)
        return super().shape()

    def config_of_settings(self):
        return self.with_domains(super().config_of_settings(), not self.s.domains_from)

    def with_domains(self, config, split=True):
        config = dataclasses.replace(config, domains=','.join(self.domains) if split else '')
        try:
            own_hidden(config)
        except ValueError as e:
            raise UserError(f'the model cannot have domains: {e}') from e
        return config

    def plan(self, config):
        stages, s = super().plan(config), self.s
        if not self.domains or names_of(config):
            return stages
        last, config = stages[-1] if stages else (0.0, config)
        refuse(last >= s.domains_from, f'domains_from is {s.domains_from:g}, and the model grows until '
                                       f'{last:g}: it can split only after that')
        return [*stages, (s.domains_from, self.with_domains(config))]

    def grow(self, old, config, seed):
        if names_of(old.config) == names_of(config):
            return super().grow(old, config, seed)
        return split(old, config, nearest_parts(old, config, self.data) if names_of(old.config) else (), seed)

    def shape_names(self):
        return [*super().shape_names(), 'domain_share']

    def shape_from(self, before):
        s, has = self.s, names_of(before.config)
        refuse(has and not self.domains, f'{s.init_from} has the domains {",".join(has)}: name those to go '
                                         f'on with, --domains={",".join(has)}')
        strange = [name for name in s.frozen.split(',') if s.frozen and name not in has]
        refuse(strange, f'frozen names {strange[0] if strange else ""!r}, and {s.init_from} has '
               f'{",".join(has) or "no domains"}: leave it away')
        self.config = dataclasses.replace(self.config, domains=','.join(has))
        config = super().shape_from(before)
        s.domains_from = 0.0 if has else s.domains_from                   # it has them already
        return self.with_domains(config, not s.domains_from)

    def start_from(self, before):
        """Where the domains change it grows to its size as it was, and is then split or branched."""
        if (theirs := names_of(before.config)) != names_of(self.config):
            for domains in theirs, names_of(self.config):
                config = dataclasses.replace(self.config, domains=','.join(domains))
                before, _ = self.grow(before, config, self.s.seed)
        super().start_from(before)

    def rows_limit(self):
        """So few sequences that a step has room for all domains."""
        rows, n = self.s.tokens_per_step // self.s.block_size, len(self.domains)
        return min(super().rows_limit(), max(1, rows // n)) if n else super().rows_limit()

    def make_optimizers(self, model):
        """What is frozen gets no text, so that what can learn are the others' parts."""
        made = super().make_optimizers(model)
        for group in (g for optimizer in made for g in optimizer.param_groups if self.s.frozen):
            group.update(base_lr=group['base_lr'] * (group['params'][0].ndim == 3), base_decay=0.0)
        return made

    def announce(self):
        super().announce()
        if self.domains:
            shares = (f'{self.domains[d]} {n / self.stream.TURNS:.1%}'
                      for d, n in zip(self.stream.streams, self.stream.had[-1]))
            self.say(f'domains: {", ".join(shares)} of what is read')

    def dearer(self):
        """Each domain reads what is evaluated."""
        return super().dearer() * max(1, len(names_of(self.largest()))) / max(1, len(names_of(self.config)))

    def results(self, result, evals, text):
        told = dict(val_bpb_told=result['bpb_told']) if 'bpb_told' in result else {}
        return super().results(result, evals, text) | told

"""How a model that has domains (config/domains.py) is measured, where the text's domain is told and where it
is not. No idea of its own, and no settings.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

import sample


def domain_of(config, data):
    """The domain of every source in a model of this config; -1 where it has none."""
    of = {source: i for i, name in enumerate(config.domains.split(',')) for source in name.split('+')}
    return [of.get(source, -1) for source in data.meta['sources']]


class Told:
    """A model whose texts are all of one domain, as sample.document_nats asks it."""

    def __init__(self, model, domain):
        self.model, self.domain, self.config, self.parameters = model, domain, model.config, model.parameters

    def __call__(self, idx, targets, reduction):
        return self.model(idx, targets, reduction, self.domain)


@torch.no_grad()
def nats_by_domain(model, documents, max_tokens=8192):
    """{key: (domains,) nats} of documents, pairs of a key and ids, by each of a model's domains."""
    documents, device = list(documents), next(model.parameters()).device
    domains = torch.arange(len(model.config.domains.split(',')), device=device)
    each = [sample.document_nats(Told(model, domain), documents, max_tokens) for domain in domains]
    return {key: np.array([nats[key] for nats in each]) for key, _ in documents}


def mixture(nats):
    """Nats of a document from those by each domain: p(x) = mean over d of p(x | d), which is what the causal
    posterior p(x_t | x_<t) = sum_d p(d | x_<t) p(x_t | x_<t, d) multiplies to, token by token, where all
    domains are equally likely at first."""
    return float(math.log(len(nats)) - np.logaddexp.reduce(-nats))


class Measure(sample.Measure):
    further = ('told',)

    def read(self, model, texts, max_tokens):
        """Nats of documents whose domain nobody tells, and told; the same where a source has no domain."""
        if not model.untold():
            return {doc: [nats, nats] for doc, nats in super().read(model, texts, max_tokens).items()}
        sources, of, nats = self.data.docs['val']['source'], domain_of(model.config, self.data), {}
        for doc, each in nats_by_domain(model, texts, max_tokens).items():
            mixed, domain = mixture(each), of[sources[doc]]
            nats[doc] = [mixed, each[domain] if domain >= 0 else mixed]
        return nats

    def bpb(self, model, *args, **options):
        result = super().bpb(model, *args, **options)
        return result if model.untold() else {k: v for k, v in result.items() if k != 'bpb_told'}

    def states(self, model, idx, asked):
        """Each row's by the domain of which its context is likeliest."""
        if not model.untold():
            return super().states(model, idx, asked)
        context = F.pad(idx[:, 1:], (0, 1), value=-1).masked_fill(asked, -1)
        of = model.by_domain(idx, context).sum(2).argmin(0)
        return torch.stack([model.trunk(row[None], domain=domain)[0] for row, domain in zip(idx, of)])

    def rows(self, model):
        return 1 if model.untold() else super().rows(model)      # each prompt has its own domain

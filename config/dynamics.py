"""Watches every layer learn: similarity to what it becomes, effective rank, sparsity, norms.

    torchrun train.py config/babylm.py config/dynamics.py
    python sample.py out/babylm+dynamics --eval=dynamics                 which layers are done when

After Pico (Diehl Martinez 2025) and "Tending towards stability" (2410.11451): nearly all layers of large
models are within 20 % of training what they stay, small ones later and less steadily. At up to 15 places of
progress one batch of validation text goes through the model; out/<run>/dynamics.json holds what Probe makes
of it, and the run's page draws it. The steps of training are the same with and without. A run of max_steps
takes all probes, so that it can be repeated.
"""
import functools
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import sample
import train
from config.matrix_measures import alike, circuits, describe, projection, sketch
from model import Linear
from prepare_data import UserError

probe_share: float = 0.02      # 0..1: of a run's time, at most: where probes cost more there are fewer

# Progress at which a model is probed, and at its end: doubling where most is learned, then every tenth.
PROBES = (0, 0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SETTLED = 0.95      # linear CKA to the final state
PARTS = {'v': 'attn.v', 'out': 'attn.proj', 'down': 'mlp.down', 'OV': 'attn.ov', 'mean': ''}


class Probe:
    """Learning dynamics of a run: the value, output and MLP-down projection of each layer, the OV circuit of
    each head, the last hidden states and the matrix that makes logits of them, whose rank falls late in small
    models (Godey 2024, 2404.07647), measured again and again at the same places of validation text, about 256.
    Of an MLP with experts or domains it is the part that all share.

    state: what a resumed run needs: the numbers so far, and of each probe 32 KB of sketch a name.
    """

    def __init__(self, data, block_size, device, share=0.02):
        tokens, starts, T = data.tokens['val'], data.docs['val']['start'], min(64, block_size)
        some = starts[np.linspace(0, len(starts) - 1, max(1, 512 // T)).astype(int)]
        text = np.stack([tokens[i:i + T + 1] for i in some.clip(0, max(0, len(tokens) - T - 1))])
        text = torch.from_numpy(text.astype(np.int64)).to(device)
        self.idx, self.targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        self.state, self.share = dict(rows=[], sketches=[], due=0.0, cost=0.0, seconds=0.0), share

    def look(self, model):
        """{name: (x, core), see describe, of activations (256, d), weight and gradient}, on the CPU."""
        outputs, weights, hooks, training = {}, {}, [], model.training

        def keep(i, module, args, out):
            outputs[f'{i}.mlp.down' if module is model.blocks[i].mlp else f'{i}.attn.proj'] = out
            if module is model.blocks[i].attn:  # one product makes queries, keys and, last, values
                with torch.no_grad():
                    packed = module.packed(*args[:2]).flatten(2)
                outputs[f'{i}.attn.v'] = packed[..., -module.n_kv_head * module.head_dim:]

        for i, block in enumerate(model.blocks):
            attn, mlp = block.attn, block.mlp
            hooks += [part.register_forward_hook(functools.partial(keep, i)) for part in (attn, mlp)]
            weights |= {f'{i}.{name}': projection(part) for name, part in
                        (('attn.v', attn.v), ('attn.proj', attn.proj), ('mlp.down', mlp))}
        weights['head'] = model.lm_head.weight
        try:
            outputs['head'] = x = model.eval().trunk(self.idx)
            loss = model.loss(x, self.targets, 'mean', ahead=0.0)      # heads for further tokens left aside
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
        gradients = torch.autograd.grad(loss, list(weights.values()))      # no parameter's grad is touched
        found = {}
        for (name, weight), gradient in zip(weights.items(), gradients):
            parts = outputs[name][:, ::2].flatten(0, 1), weight, gradient
            found[name] = [(x, x) for x in (part.detach().float().cpu() for part in parts)]
        for i, attn in enumerate(block.attn for block in model.blocks):
            if isinstance(attn.v, Linear):      # Pattention has no matrix to make a circuit of
                heads = circuits(attn, found[f'{i}.attn.v'], found[f'{i}.attn.proj'])
                found |= {f'{i}.attn.ov.{head}': parts for head, parts in enumerate(heads)}
        return found

    def take(self, model, step, progress, total):
        """Measure once and set when next; total: seconds that the run will take, or inf. Returns the names of
        what is not finite, which goes without numbers."""
        began, state, row, kept, bad = time.monotonic(), self.state, {}, {}, []
        if state['rows'] and state['rows'][-1]['step'] == step:
            return bad                          # the end came where a probe was due, or after a resumption
        if not state['rows']:
            self.look(model)                    # the first time is slow, and is no guide to the others' cost
        warm, before = time.monotonic(), state['sketches'][-1] if state['sketches'] else {}
        for name, parts in self.look(model).items():
            row[name] = {}
            for kind, (x, core) in zip(('activation', 'weight', 'gradient'), parts):
                if not x.isfinite().all():
                    bad.append(f'{name} {kind}')
                    continue
                row[name] |= {f'{kind}_{key}': value for key, value in describe(x, core).items()}
                if kind == 'activation':
                    kept[name] = sketch(x)
                    row[name] |= alike(kept[name], before.get(name), 'previous')
        state['rows'].append(dict(step=step, progress=progress, values=row))
        state['sketches'].append(kept)
        state['cost'] = time.monotonic() - warm
        state['seconds'] += time.monotonic() - began
        rest = [p for p in PROBES if p > progress]      # as many of these as there is time for, evenly
        room = self.share * total - state['seconds']
        n = min(len(rest), room / state['cost'] - 3)    # the last probe and finish take about 3
        state['due'] = rest[math.ceil(len(rest) / n) - 1] if n >= 1 else math.inf
        return bad

    def finish(self):
        """What dynamics.json holds: {measure: [[a number or None for each name] for each probe]} and names,
        steps, progress. CKA and PWCCA to the final are known only now."""
        began, state = time.monotonic(), self.state
        rows, final = state['rows'], state['sketches'][-1]
        for row, kept in zip(rows, state['sketches']):
            for name, x in kept.items():
                row['values'][name] |= alike(x, final.get(name), 'final')
        names = list(dict.fromkeys(name for row in rows for name in row['values']))
        names.sort(key=lambda name: int(name.split('.')[0]) if name != 'head' else math.inf)
        measures = sorted({key for row in rows for values in row['values'].values() for key in values})
        state['seconds'] += time.monotonic() - began

        def number(row, name, key):
            value = row['values'].get(name, {}).get(key, math.nan)
            return float(f'{value:.6g}') if math.isfinite(value) else None
        return dict(steps=[row['step'] for row in rows], progress=[row['progress'] for row in rows],
                    names=names, measures={key: [[number(row, name, key) for name in names] for row in rows]
                                           for key in measures})


class Run(train.Run):
    probe = None            # of rank 0
    written = *train.Run.written, 'dynamics.json'

    def take_model(self, model):
        super().take_model(model)
        if self.master and self.probe is None:
            self.probe = Probe(self.data, self.config.block_size, self.device, self.s.probe_share)

    def state(self):
        return super().state() | dict(dynamics=self.probe and self.probe.state)

    def load(self, state):
        super().load(state)
        if self.probe and state['dynamics']:
            self.probe.state = state['dynamics']

    def time_left(self):
        if self.probe and self.clock.progress >= self.probe.state['due']:
            self.probe_layers()
        return super().time_left()

    def probe_layers(self):
        doing = self.energy.turn('eval')
        total = math.inf if self.clock.max_steps else self.clock.budget
        bad = self.probe.take(self.model, self.steps, self.clock.progress, total)
        self.times['dynamics'] = self.probe.state['seconds']
        self.energy.turn(doing)
        if bad:
            self.say(f'warning: step {self.steps} was probed, not finite: {", ".join(bad)}')

    def closing_seconds(self):
        return super().closing_seconds() + (3 * self.probe.state['cost'] if self.probe else 0.0)

    def closing_evaluation(self):
        if self.probe:
            self.probe_layers()
            self.learned = self.probe.finish()
            self.times['dynamics'] = self.probe.state['seconds']
        return super().closing_evaluation()

    def results(self, *found):
        report = super().results(*found)
        share = self.times.get('dynamics', 0.0) / report['total_seconds']
        return report | dict(dynamics_share=share)

    def keep_report(self, report):
        text = sample.as_json(self.learned).encode()
        sample.write_beside(self.out_dir / 'dynamics.json', lambda f: f.write(text))
        super().keep_report(report)

    def page_blocks(self):
        found = self.learned
        return super().page_blocks() + [
            dict(kind='heat', title=name.replace('_', ' ').capitalize(), note='Along progress.',
                 y=found['names'], x=[f'{p:.2f}' for p in found['progress']], values=[*zip(*rows)])
            for name, rows in found['measures'].items()]


class Measure(sample.Measure):
    def known(self):
        return super().known() | (dict(dynamics=self.dynamics) if self.run else {})

    def dynamics(self, model, n=0, stop=None):
        """When each layer of a finished run settled."""
        try:
            found = json.loads((Path(self.run) / 'dynamics.json').read_text())
        except (OSError, ValueError) as e:
            raise UserError(f'{self.run} has no dynamics.json ({e}): train with config/dynamics.py') from e
        at = {name: settled(found, name) for name in found['names']}
        early = [p for p in at.values() if p is not None and p <= 0.2]
        return dict(layers=layer_rows(found, at), early=len(early) / len(at), projections=len(at),
                    probes=len(found['steps']))

    def lines(self, name, result):
        if name != 'dynamics':
            yield from super().lines(name, result)
            return
        yield f'{self.run}: progress at which the projections of a layer settled'
        columns = {part: part for part in PARTS} | {f'rank {k}': k for k in ('first', 'highest', 'last')}
        yield ' ' * 9 + ''.join(f'{head:>14}' for head in columns)
        for row in result['layers']:
            cells = ('-' if row[key] is None else f'{row[key]:.3f}' for key in columns.values())
            yield f'{row["layer"]:9}' + ''.join(f'{cell:>14}' for cell in cells)
        early, projections, probes = (result[key] for key in ('early', 'projections', 'probes'))
        yield (f'{early:.0%} of {projections} projections are settled by 20% of training: '
               f'CKA to the final is {SETTLED} or more from then on, at all of the {probes} probes')


def settled(found, name):
    """Progress of the probe from which on a projection stays SETTLED; None where its end is not known."""
    at, column = None, found['names'].index(name)
    for progress, row in zip(found['progress'][::-1], found['measures']['cka_final'][::-1]):
        if row[column] is not None and row[column] < SETTLED:
            break
        at = at if row[column] is None else progress
    return at


def layer_rows(found, at):
    """A row for each layer: when its parts settled, on average, and how its weights' effective rank went."""
    def mean(values):
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    rows, names = [], found['names']
    for layer in dict.fromkeys(name.partition('.')[0] for name in names):
        mine = [i for i, name in enumerate(names) if name.partition('.')[0] == layer]
        ranks = [mean(row[i] for i in mine) for row in found['measures']['weight_effective_rank']]
        ranks = [rank for rank in ranks if rank is not None] or [None]
        name = f'layer {layer}' if layer.isdecimal() else layer
        rows.append(dict(layer=name, first=ranks[0], highest=max(ranks), last=ranks[-1]) | {
            key: mean(at[names[i]] for i in mine if part in names[i]) for key, part in PARTS.items()})
    return rows

"""--doll: ideas compared on scale models of what a card's run would be.

    python bench_mfu.py --doll config/babylm.py config/a.py         as --compare, at the ratios of a card's run

A doll is of what --card would run, reaching --card_mfu of its peak: the same tokens a parameter, epochs (of
--text_words, if the card's text is larger than that which is here), steps and proportions, in --minutes of
training each. It is a config, out/doll/<base>/doll.py:
--sweep "learning_rate=0.01,0.02" config/babylm.py config/text_share.py out/doll/babylm/doll.py tunes it.
--jobs=2 makes two such runs at a time: they go by tokens, not by the clock.
"""
import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import model as m
import sample
import train
from bench_mfu import compare_runs, measured, planned
from config import CONFIG, at_home, refuse

doll: bool = False          # make runs as scale models of what a card's run would be
card: str = 'RTX 4090'      # that card, one of sample.PEAK_TFLOPS
card_mfu: float = 0.45      # 0.01..1: what share of its peak the run will reach there
text_words: float = 0.0     # words that the run will read there, such as are here; 0: those that are here
minutes: float = 10.0       # 0.01..: training of a doll

TRAINED = 0.87                      # of a card's budget: a tenth measures, starting takes a minute
VAL_TOKENS = 2 ** 17                # of validation text that a doll is measured on
LEAST_LAYERS, LEAST_HEAD = 4, 16    # of a doll: with fewer a model does other things
SHARE = str(CONFIG / 'text_share.py')


def shape_like(config, L, C, V, heads=0):
    """The settings of a model L deep, C wide, of V ids, its MLP and context to its width as config's are; heads
    too, or as many as config has if they are not too narrow."""
    fit = [h for h in range(1, config.n_head + 1) if C % (2 * h) == 0 and C >= LEAST_HEAD * h]
    heads = heads or max(fit, default=1)
    shared = [k for k in range(1, heads + 1) if heads % k == 0 and k * config.n_head <= heads * config.n_kv_head]
    T = 2 ** max(6, round(math.log2(config.block_size * C / config.n_embd)))
    given = config.mlp_hidden != config.MLP.width(config)        # else ideas choose it, experts.py for one
    return dict(n_layer=L, n_embd=C, n_head=heads, n_kv_head=max(shared, default=1), head_dim=0,
                rotary_dim=0, mlp_hidden=given * max(1, round(config.mlp_hidden * C / config.n_embd)),
                vocab_size=V, block_size=min(T, config.block_size))


def doll_shape(config, size, vocabularies):
    """The settings of a model of about `size` parameters whose table, depth and width stand to each other,
    and whose context to its width, as config's do."""
    def rough(L, C, V):
        return (12 * L * C + V * (2 - config.tie_embeddings)) * C

    def parameters(c):
        return m.blueprint(c).params()['total']

    def proportions(L, C, V, total):
        return np.log([total, V * C / total, C / L])

    layers = range(min(LEAST_LAYERS, config.n_layer), config.n_layer + 1)
    shapes = [*itertools.product(layers, range(min(32, config.n_embd), config.n_embd + 1, 8), vocabularies)]
    own = config.n_layer, config.n_embd, config.vocab_size
    more = parameters(config) / rough(*own)      # members and further tables, which what is rough leaves out
    wanted = proportions(*own, parameters(config))
    wanted[0], tried = math.log(size), {}

    def off(shape, total):
        return (proportions(*shape, total) - wanted) ** 2 @ [9, 1, 0.5]

    for _ in range(6):
        shape = min(shapes, key=lambda shape: off(shape, more * rough(*shape)))
        if shape in tried:
            break
        total = parameters(replace(config, **shape_like(config, *shape)))
        tried[shape], more = off(shape, total), total / rough(*shape)
    return shape_like(config, *min(tried, key=tried.get))


def card_peak(own):
    peak = sample.peak_flops(own.card)
    refuse(not peak, f'--card is {own.card!r}, whose peak is not known; there are '
           f'{", ".join(sample.PEAK_TFLOPS)}')
    return peak


def doll_of(own, argv):
    """What the run of argv is on its card and what its doll is here, {ratio: (run, doll)}; the doll's
    settings."""
    peak = card_peak(own)
    s, ideas = train.read_settings([argv[0], SHARE, *argv[1:]])
    run = measured(ideas)(s, device='cpu', compile='off')
    there, text, flops = run.config, run.data.meta['splits']['train'], run.model.flops_per_token(
        run.model.attended(run.early))
    tokens = s.max_tokens or s.max_steps * s.tokens_per_step or (
        peak * own.card_mfu * TRAINED * 60 * s.budget_minutes / flops)
    card = ratios(there, tokens, text['tokens'] * (own.text_words or text['words']) / text['words'],
                  s.tokens_per_step, s.budget_minutes, text)
    smaller = [2 ** k for k in range(9, 17) if s.tokenizer == 'bpe' and 2 ** k < there.vocab_size]
    if own.jobs > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // own.jobs))
    size, shape = 2 ** 18, None
    for _ in range(5):                          # one size after another, until one reads its tokens in time
        before, shape = shape, doll_shape(there, min(size, card['parameters']), [there.vocab_size, *smaller])
        if shape == before:
            break
        size, T = m.blueprint(replace(there, **shape)).params()['total'], shape['block_size']
        step = max(1, round(size * card['tokens a parameter'] / card['steps'] / T)) * T
        n_steps = round(size * card['tokens a parameter'] / step)
        doll = measured(ideas)(SimpleNamespace(**vars(s) | shape | dict(tokens_per_step=step)))
        doll.step()
        minutes = train.seconds_of(doll.step, 5) * n_steps / 60
        doll.batches.close()
        print(f'{size:,} parameters, {n_steps:,} steps of {step:,} tokens: {minutes:.1f} minutes here')
        if 0.8 < minutes / own.minutes < 1.25:
            break
        size *= (own.minutes / minutes) ** 0.5
    text, val = (doll.data.meta['splits'][split] for split in ('train', 'val'))
    wanted = n_steps * step / card['epochs']
    refuse(wanted > text['tokens'], f'the doll is to read {wanted:,.0f} tokens of text, {text["tokens"]:,} are '
           f'here: bring more, or give it fewer --minutes')
    refuse(minutes > 10 * own.minutes, f'the doll takes {minutes:.1f} minutes here, and --minutes is {own.minutes:g}: '
           f'give it {math.ceil(minutes)}, or a machine with nothing else to do')
    share, val_share = (float(f'{part * min(1, a / b["tokens"]):.3g}') for part, a, b in (
        (s.text_share, wanted, text), (1, VAL_TOKENS, val)))
    settings = shape | dict(
        tokens_per_step=step, micro_batch_size=max(1, 8192 // T), max_tokens=n_steps * step, max_steps=0,
        budget_minutes=round(20 * own.minutes, 2), eval_interval=0.0, evals='', sample_tokens=0,
        log_interval=100, text_share=share, val_share=val_share)
    mine = ratios(doll.config, n_steps * step, share / s.text_share * text['tokens'], step, minutes, text)
    return {k: (card[k], mine[k]) for k in card}, settings


def ratios(config, tokens, text_tokens, step, minutes, text):
    """What a run is, for the table that sets a doll beside it."""
    C, size = config.n_embd, m.blueprint(config).params()['total']
    return {'parameters': size, 'tokens': tokens, 'tokens of text': text_tokens, 'minutes': minutes,
            'tokens a parameter': tokens / size, 'epochs': tokens / text_tokens, 'steps': tokens / step,
            'share of the table': config.vocab_size * C / size, 'width by depth': C / config.n_layer,
            'context by width': config.block_size / C, 'tokens a step': step, 'layers': config.n_layer,
            'width': C, 'heads': config.n_head, 'head size': config.head_dim, 'context': config.block_size,
            'vocabulary': config.vocab_size, 'bytes a token': text['bytes'] / text['tokens']}


def dolls(own, argv):
    """The runs of --doll: those of --compare, with the doll's settings between the base and the ideas."""
    configs, rest = [a for a in argv if not a.startswith('--')], [a for a in argv if a.startswith('--')]
    refuse(not configs, '--doll names no config: it takes the one that the card would run, then ideas')
    base = configs[0].split('+')
    root = Path(at_home(own.compare_dir) or f'out/doll/{Path(base[0]).stem}')
    path, asked = root / 'doll.py', '# of ' + json.dumps(
        [configs[0], own.card, own.card_mfu, own.text_words, own.minutes, *sorted(rest)])
    same = path.exists() and asked in path.read_text().split('\n')
    refuse(path.exists() and not same and any(f.is_dir() for f in root.iterdir()),
           f'{path} is the doll of another command: give the options that it was made with, or choose another --compare_dir')
    if not same:                                # the same command again goes on with the same doll
        sides, settings = doll_of(own, [*base, *rest])
        rows = [('', own.card, 'its doll'), *((k, plain(card), plain(doll)) for k, (card, doll) in sides.items())]
        about = f'A doll of {configs[0]} on a card that reaches {own.card_mfu:.0%} of its peak.'
        lines = [f'"""{about}', '', *(f'{what:21}{card:>16}{doll:>16}' for what, card, doll in rows), '"""', asked]
        text = '\n'.join(map(str.rstrip, [*lines, *(f'{k} = {v!r}' for k, v in settings.items()), '']))
        root.mkdir(parents=True, exist_ok=True)
        sample.write_beside(path, lambda f: f.write(text.encode()))
    text = path.read_text()
    print(text.split('"""')[1].strip(), flush=True)
    own.compare_dir = str(root)
    rest = [a for a in rest if f'\n{a[2:].partition("=")[0]} = ' not in text]    # that was of the card's run
    return planned(own, ['+'.join([*base, SHARE, str(path)]), *configs[1:], *rest])


def plain(v):
    return f'{v:,.0f}' if v >= 100 else f'{v:.3g}'


def main(own, rest, argv):
    compare_runs(own, rest, argv, dolls)

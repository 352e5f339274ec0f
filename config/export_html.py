"""The model in one page, which any browser opens, offline too: weights in int8, tokenizer and arithmetic.

    python sample.py out/babylm --export html       out/babylm/model.html

The page is web/model.html. An idea that changes the net says in a text `page` of its class how JavaScript computes it.
"""
import base64
import dataclasses

import torch

import prepare_data
from config import name_of, refuse
from model import GPT, MLP, Attention, Block
from sample import as_json, page_with_hashes, write_beside


def quantised(weight):
    """int8 q (rows, columns) and fp32 scale (rows,) of a matrix: symmetric, scale q is nearest to it."""
    scale = weight.abs().amax(dim=1) / 127
    return (weight / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale


def finite(name, weight):
    """A weight as it is exported, fp32 on the CPU."""
    if not weight.isfinite().all():
        raise FloatingPointError(f'{name} is not finite: export a run that did not diverge')
    return weight.detach().float().cpu()


def packed(model):
    """[[name, rows, columns] or [name, length]] of a model's tensors, and their bytes: see web/model.html."""
    shapes, floats, ints = [], [], []
    for name, w in model.state_dict().items():
        if name == 'lm_head.weight' and model.config.tie_embeddings:
            continue                             # wte.weight once more
        w = finite(name, w)
        q, scale = quantised(w) if w.dim() == 2 else (w[:0], w.flatten())
        shapes.append([name, len(scale), *(w.shape[1:] if w.dim() == 2 else ())])
        floats.append(scale.numpy().astype('<f4').tobytes())
        ints.append(q.numpy().astype('i1').tobytes())
    return shapes, b''.join(floats + ints)


def changes_of(ideas):
    """The classes of ideas that change the net, in the order in which they build on each other."""
    return [c for seam in (MLP, Attention, Block, GPT) for c in reversed(ideas.seam(seam).__mro__)
            if issubclass(c, seam) and c.__module__ not in (seam.__module__, 'stack')]


def arithmetic_of(ideas):
    """JavaScript that ideas add to the Model of web/model.html: `page` of each of their classes that change
    the net. '' says that the baseline's is right."""
    changed = changes_of(ideas)
    for c in changed:
        refuse('page' not in vars(c), f'{name_of(c)} changes the net, and its {c.__name__} does not say how '
               f'a page computes that: give the class a text `page`, or export a run without this idea')
    return '\n'.join(c.page for c in changed)


def refuse_unigram(run, where):
    t, first = run.tokenizer, prepare_data.BPETokenizer.first_byte + 256
    unigram = t.kind == 'bpe' and any(t.bpe.get_score(i) != first - i for i in range(first, t.vocab_size))
    refuse(unigram, f'{run.folder} has a vocabulary of the kind unigram, {where} knows bpe, bytes and gpt2: '
           f'train with one of these')


def write(run):
    """model.html in a run's folder: web/model.html with the model, matrices in int8, and its tokenizer."""
    t, path, ideas = run.tokenizer, run.folder / 'model.html', arithmetic_of(run.ideas)
    refuse_unigram(run, 'a page')
    marks = t.marks.pattern if t.kind == 'bpe' else ''
    shapes, weights = packed(run.model)
    table = [piece.decode('latin-1') for piece in t.table]
    data = as_json(dict(name=path.absolute().parent.name, about=run.model.describe(), tensors=shapes,
                        tokenizer=dict(kind=t.kind, bos=t.bos, table=table, marks=marks),
                        config=dataclasses.asdict(run.model.config)))
    page, hashes = page_with_hashes('model.html', ideas)
    for mark, text in (('HASHES', hashes),
                       ('id="weights">', 'id="weights">' + base64.b64encode(weights).decode()),
                       ('{}</script>', data.replace('<', '\\u003c') + '</script>')):
        page = page.replace(mark, text)
    write_beside(path, lambda f: f.write(page.encode()))
    print(f'{path}: {path.stat().st_size / 1e6:.1f} MB, the model in int8; any browser opens it, offline too')

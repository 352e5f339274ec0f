"""Ideas together: every one with every other, in both orders, trains or is refused in one sentence that names both."""
import contextlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import traceback
from pathlib import Path

import pytest
import torch

import prepare_data
import train
from conftest import ROOT, TINY, tales
from prepare_data import UserError

# what an idea of the list below needs, on a model and a text so small
NEEDS = dict(latent_attention=['--kv_latent=12', '--rotary_dim=4'], distillation=['--teacher=teacher'],
             climb_objective=['--word_classes=5'], syntactic_smoothing=['--word_classes=5'],
             tokenformer=['--attn_tokens=24', '--mlp_tokens=48'], masked=['--masked=0.25'],
             instruct=['--dataset=files:chats'],
             growth=['--growth=[(0.5, dict(n_layer=3))]'], humaneval=['--eval_data=problems', '--python_tokens=8'], window=['--window=20'], split_by_lines=['--tokenizer_from=teacher'], softcap=['--logit_softcap=15'],
             retrieval=['--passage_tokens=16'])
BASE = [*TINY, '--tokenizer=bpe', '--vocab_size=500', '--tokens_per_step=1024', '--micro_batch_size=8', '--max_steps=5',
        '--sample_tokens=4', '--seed=3', '--save_minutes=1000', '--budget_minutes=1000', '--n_embd=64', '--n_head=4']


def ideas():
    """Names of the files of config/ that hold a seam's class of their own or another's, but a Corpus alone."""
    seams = '|'.join(name for name in prepare_data.SEAMS if name != 'Corpus')
    found = [path.stem for path in sorted((ROOT / 'config').glob('[!_]*.py'))
             if re.search(rf'^class ({seams})\(|^from config\.\w+ import .*\b({seams})\b', path.read_text(), re.M)]
    texts = {name: (ROOT / 'config' / f'{name}.py').read_text() for name in found}
    parts = [name for name, text in texts.items() if not re.search(r'^[a-z]\w*(: \w+)? = ', text, re.M)
             and any(f'from config.{name} import' in other for other in texts.values())]     # of an idea, by itself none
    without = [] if importlib.util.find_spec('tensorboard') else ['tracker']
    return [name for name in found if name not in ('babylm', 'babylm_10m', 'nocap', *parts, *without)]


def run_of(names, out, *more):
    """A Run of ideas stacked on the tiny base, in the folder where it is called, and what it printed."""
    argv = ['tiny.py', *[str(ROOT / 'config' / f'{name}.py') for name in names]]
    needs = [arg for name in dict.fromkeys(names) for arg in NEEDS.get(name, [])]
    s, stack = train.read_settings([*argv, *BASE, '--dataset=files:text', f'--out_dir={out}', *needs, *more])
    return stack.seam(train.Run)(s, stack)


def attempt(names):
    """('trained', val_bpb), ('refused', sentence) or ('failed', traceback) of a stack."""
    torch.set_num_threads(1)
    out = '+'.join(names)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            taught = {*names} - {'instruct'} if 'instruct' in names else ()     # it goes on from a run of the other idea
            base = 'teacher' if not taught or taught & {'growth', 'tokenformer_grow'} else f'out/{out}-base'
            run = run_of(names, f'out/{out}', *[f'--init_from={base}'] * ('instruct' in names))
            if base != 'teacher':
                train.live(run_of(taught, base))
            train.live(run)
        return names, 'trained', json.loads(Path('out', out, 'result.json').read_text())['val_bpb']
    except UserError as e:
        return names, 'refused', str(e)
    except Exception:                            # whatever it is, the matrix shows it
        return names, 'failed', traceback.format_exc()[-1500:]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with a text, its data, a config of the tiny base, a problem in Python, conversations, and a teacher."""
    folder = tmp_path_factory.mktemp('stacks')
    (folder / 'problems').mkdir()
    (folder / 'problems' / 'humaneval.jsonl').write_text(json.dumps(dict(
        task_id='tiny/0', prompt='def one():\n', entry_point='one', test='def check(f):\n    assert f() == 1\n')))
    (folder / 'text').mkdir()
    for seed, (name, n) in enumerate({'tales.train': 400, 'notes.train': 250, 'tales.dev': 40, 'notes.dev': 20}.items()):
        (folder / 'text' / name).write_text('\n\n'.join(tales(n, seed)), encoding='utf-8')
    (folder / 'chats').mkdir()
    for name, n in (('tales.train.jsonl', 300), ('notes.train.jsonl', 200), ('tales.dev.jsonl', 20), ('notes.dev.jsonl', 20)):
        (folder / 'chats' / name).write_text('\n'.join(json.dumps(dict(prompt=f'Who? {i} {name}', answer='Mia did.')) for i in range(n)))
    (folder / 'tiny.py').write_text('n_layer = 2\nn_embd = 64\nn_head = 4\n')
    with contextlib.chdir(folder):
        train.live(run_of([], 'teacher'))
    return folder


def together(folder, stacks):
    """attempt of all, two at a time, each in a process that has imported torch already."""
    with contextlib.chdir(folder), multiprocessing.get_context('fork').Pool(2, maxtasksperchild=40) as pool:
        found = list(pool.imap_unordered(attempt, stacks, chunksize=4))
        pool.close()                             # leaving would send SIGTERM, which a run has learned to heed
        pool.join()
    return found


def wrong(found):
    """What is not as it should be: a failure, a number that is none, a refusal that does not name both files."""
    for names, what, said in found:
        if what == 'failed' or what == 'trained' and not math.isfinite(said):
            yield f'{" + ".join(names)}: {said}'
        if what == 'refused' and not (all(f'{name}.py' in said for name in names) and 'leave' in said and '\n\n' not in said):
            yield f'{" + ".join(names)} is refused so: {said}'


@pytest.mark.slow
def test_every_idea_alone(folder):
    found = together(folder, [(name,) for name in ideas()])
    assert len(found) > 25 and {what for _, what, _ in found} == {'trained'}, '\n'.join(wrong(found)) or found


@pytest.mark.slow
def test_every_idea_with_every_other_in_both_orders(folder):
    """Every ninth pair, or all with HALFHOUR_ALL=1, half an hour."""
    pairs = list(itertools.permutations(ideas(), 2))
    found = together(folder, pairs if os.environ.get('HALFHOUR_ALL') else pairs[::9])
    bad = [*wrong(found)]
    print(f'{sum(what == "trained" for _, what, _ in found)} stacks train, {sum(what == "refused" for _, what, _ in found)} are refused')
    assert not bad, f'{len(bad)} of {len(found)}\n' + '\n'.join(sorted(bad)[:40])


def test_some_stacks(folder):
    found = together(folder, [('ema', 'dropout'), ('masked', 'climb_vocabulary'), ('window', 'weight_decay')])
    assert not [*wrong(found)] and sorted(what for _, what, _ in found) == ['refused', 'trained', 'trained']


def test_runs_of_different_ideas_in_one_process_train_as_they_do_alone(folder):
    with contextlib.chdir(folder):
        alone = {}
        for name in ('window', 'ema'):
            run = run_of([name], f'alone-{name}')
            train.live(run)
            alone[name] = [w.clone() for w in run.model.state_dict().values()]
        runs = {name: run_of([name], f'beside-{name}') for name in alone}
        for run in runs.values():
            run.open()
            run.build()
            run.announce()
            run.warm_up()
            run.say_start()
        going = True
        while going:
            going = False
            for run in runs.values():
                if run.time_left():
                    run.step()
                    going = True
        for name, run in runs.items():
            run.finish()
            assert all(torch.equal(a, b) for a, b in zip(alone[name], run.model.state_dict().values())), name

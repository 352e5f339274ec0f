"""bench_mfu.py --doll and --predict: dolls have the ratios of the run, and what they foretell is within its noise."""
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch

import bench_mfu
import model
import train
from config import UserError, bench_doll, bench_predict
from conftest import ROOT
from model import GPTConfig


@pytest.fixture
def doll(corpus, tmp_path, monkeypatch, capsys):
    """--doll in an empty folder, none of whose runs is made: what it prints, and those runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_mfu.signal, 'signal', lambda *a: None)
    (tmp_path / 'base.py').write_text('learning_rate = 0.01\nn_layer = 6\nn_embd = 96\nn_head = 3\nblock_size = 128\n')
    (tmp_path / 'wide.py').write_text('mlp_hidden = 6 * n_embd\n')
    threads = torch.get_num_threads()

    def call(*args):
        runs = []
        monkeypatch.setattr(bench_mfu, 'make', lambda run: (runs.append(run), run.folder.mkdir(parents=True, exist_ok=True),
                                                            setattr(run, 'fault', 'not made')))
        kept = [a for a in corpus.args if not a.startswith(('--n_', '--block_size', '--tokens_per_step'))]
        bench_mfu.main(['--doll', *args, *kept, '--tokens_per_step=4096'])
        return capsys.readouterr().out, runs
    yield call
    torch.set_num_threads(threads)


def test_a_doll_has_the_ratios_of_the_run(doll, tmp_path):
    args = 'base.py', 'wide.py', '--max_tokens=1200000', '--minutes=0.15', '--text_words=40000', '--seeds=1'
    out, runs = doll(*args)
    sides = {line[:21].strip(): [float(n.replace(',', '')) for n in line[21:].split()] for line in out.split('\n')
             if re.fullmatch(r'[a-z ]{21} *[\d.,]+ +[\d.,]+', line)}
    for ratio, within in (('tokens a parameter', 0.03), ('epochs', 0.05), ('steps', 0.1)):
        card, ours = sides[ratio]
        assert ours == pytest.approx(card, rel=within), ratio
    assert sides['parameters'][1] < sides['parameters'][0] and sides['tokens'] == [1200000, runs[0].s.max_tokens]
    base, wide = runs
    assert [run.name for run in runs] == ['base+text_share+doll', 'wide'] and 0 < base.s.text_share < 1
    assert base.s.max_tokens % base.s.tokens_per_step == 0 and base.s.learning_rate == 0.01 and base.s.n_embd == sides['width'][1]
    assert wide.s.mlp_hidden == 6 * wide.s.n_embd and vars(wide.s) | dict(mlp_hidden=0, out_dir='') == vars(base.s) | dict(mlp_hidden=0, out_dir='')
    said = (tmp_path / 'out/doll/base/doll.py').read_text()
    assert [run.s.tokens_per_step for run in doll(*args, '--jobs=2')[1]] == [base.s.tokens_per_step] * 2
    assert (tmp_path / 'out/doll/base/doll.py').read_text() == said                # the same doll again
    for other in ('--minutes=3', '--card=L4', '--learning_rate=0.03'):
        with pytest.raises(UserError, match='doll.py is the doll of another command: .*--compare_dir'):
            doll(*args, other)


def test_a_doll_of_many_weights_is_as_small_as_it_should_be():
    """Members and tables of their own count too."""
    for more, size in ((['ensemble.py', '--members=8'], 2 ** 19), (['bigrams.py', '--bigram_rows=2048'], 2 ** 18), ([], 2 ** 17)):
        s, ideas = train.read_settings([str(ROOT / 'config/babylm.py'), *[str(ROOT / 'config' / a) if a.endswith('.py') else a for a in more]])
        made = {k: v for k, v in vars(s).items() if k in {f.name for f in dataclasses.fields(model.configured(ideas))}}
        there = model.configured(ideas)(**made)
        shape = bench_doll.doll_shape(there, size, [8192, 4096, 2048, 1024, 512])
        total = model.blueprint(dataclasses.replace(there, **shape)).params()['total']
        assert 0.7 < total / size < 1.4, (more, total, size)


def test_a_doll_that_was_not_run_is_made_anew(doll, tmp_path):
    args = 'base.py', '--text_words=40000', '--seeds=1'
    with pytest.raises(UserError, match=r'the doll takes [\d.]+ minutes here, and --minutes is 0.01: give it \d+'):
        doll(*args, '--minutes=0.01', '--max_tokens=30000000')
    left = tmp_path / 'out/doll/base/doll.py'
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_text('"""Of a command whose runs could not be made."""\n')
    assert len(doll(*args, '--minutes=0.3', '--max_tokens=1200000')[1]) == 1 and 'could not be made' not in left.read_text()


def dolls(folder, size, sd=0.004, card=10_000_000, **changes):
    folder.mkdir()
    rows = [dict(name='base', notes=['base'], val_bpb=2.0, seeds=3 if sd else 1) | (dict(sd=sd) if sd else {})]
    rows += [dict(name=name, notes=[], change=change, seeds=1) for name, change in changes.items()]
    (folder / 'compare.json').write_text(json.dumps(rows + [dict(name='failed', notes=['exit code 1'], seeds=0)]))
    (folder / 'doll.py').write_text(f'"""A doll.\n\n      a card   its doll\nparameters     {card:,}     {size:,}\n"""\n')
    return str(folder)


def test_what_dolls_predict(tmp_path, capsys):
    small = dolls(tmp_path / 'small', 10_000, good=-0.01, bad=0.03, odd=0.02)
    middle = dolls(tmp_path / 'middle', 100_000, None, good=-0.02, bad=0.03, odd=0.01, alone=0.5)
    large = dolls(tmp_path / 'large', 1_000_000, 0.003, good=-0.03, bad=0.03, odd=0.05)
    bench_mfu.main(['--predict', large, small, middle])
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in out.split('\n') if line.startswith('|')]
    sd = (((0.004 / 2) ** 2 + (0.003 / 2) ** 2) / 2) ** 0.5
    spread = 2.132 * 2 ** 0.5 * sd * (1 / 3 + 4 / 2) ** 0.5                      # four degrees of freedom; two decades from the middle
    assert rows[0] == ['idea', '10,000', '100,000', '1,000,000', 'card']
    assert rows[2] == ['good', '-1.00%', '-2.00%', '-3.00%', f'-4.0% ({-0.04 - spread:+.1%} to {-0.04 + spread:+.1%})']
    assert [row[0] for row in rows[2:]] == ['good', 'bad', 'odd'] and f'sd of the base {sd:.2%}' in out
    assert 'of 10,000 and 100,000: 1.00 of 3 ideas' in out and 'of 100,000 and 1,000,000: 0.50 of 3 ideas' in out
    assert bench_predict.ranks([3, 1, 3, 2]).tolist() == [2.5, 0, 2.5, 1]


def test_nine_of_ten_intervals_hold_what_is_so():
    dice, x, inside = np.random.default_rng(1), np.log([1e4, 2e4, 4e4]), 0
    for _ in range(2000):
        base = dice.normal(size=(3, 3))                                          # three seeds at each of three sizes
        sd, y = math.sqrt(base.var(axis=1, ddof=1).mean()), dice.normal(size=3) - base[:, 0]
        there, error = bench_predict.on_a_line(x, y, [sd * 2 ** 0.5] * 3, math.log(1e7))
        inside += abs(there) < bench_predict.t_quantile(6) * error
    assert 0.88 < inside / 2000 < 0.92
    there, error = bench_predict.on_a_line(np.array([0.0, 1, 2]), np.array([1.0, 3, 9]), [1e-3, 1e-3, 1e3], 2)
    assert there == pytest.approx(5, abs=1e-3) and error == pytest.approx(5 ** 0.5 * 1e-3, rel=1e-3)    # the noisy one hardly counts
    assert bench_predict.t_quantile(5) == pytest.approx(2.015, rel=0.01) and bench_predict.t_quantile(20) == pytest.approx(1.725, rel=0.01)


@pytest.mark.parametrize('args, said', [
    (['small'], 'takes two or more folders'), (['small', 'none'], r'none holds no doll.py with its compare.json'),
    (['small', 'same'], 'have not two ideas in common, each at another size'), (['small', 'other'], 'have not two ideas in common'),
    (['still', 'still2'], 'no folder has two seeds of its base')])
def test_dolls_that_predict_nothing(tmp_path, args, said):
    for name, size, sd, card in (('small', 10, 0.01, 99), ('same', 10, 0.01, 99), ('other', 20, 0.01, 98), ('still', 10, None, 99), ('still2', 20, None, 99)):
        dolls(tmp_path / name, size, sd, card, a=0.1, b=0.2)
    with pytest.raises(UserError, match=said):
        bench_mfu.main(['--predict', *(str(tmp_path / a) for a in args)])


def test_shapes_of_dolls():
    card = GPTConfig(n_layer=12, n_head=8, n_kv_head=4, n_embd=512, vocab_size=16384, block_size=512, tie_embeddings=True, mlp_hidden=1536)
    for size in (60_000, 1_000_000):
        c = GPTConfig(**{**vars(card), 'rotary_dim': 0, **bench_doll.doll_shape(card, size, [2 ** k for k in range(9, 15)])})
        total = model.blueprint(c).params()['total']
        assert 0.8 < total / size < 1.25 and 4 <= c.n_layer <= 12 and c.mlp_hidden == 3 * c.n_embd
        assert 0.6 < c.vocab_size * c.n_embd / total / (16384 * 512 / model.blueprint(card).params()['total']) < 1.6
        assert c.n_head % c.n_kv_head == 0 and c.n_kv_head * 2 in (c.n_head, 2) and c.head_dim >= 16
    smallest = bench_doll.doll_shape(card, 5_000, [512])
    assert (smallest['n_layer'], smallest['n_embd'], smallest['mlp_hidden']) == (4, 32, 96)
    usual = model.configured(train.read_settings([f'{ROOT}/config/experts.py'])[1])(n_embd=64, n_head=2)     # whose MLP is as wide as its class says
    assert usual.mlp_hidden == 64 and bench_doll.doll_shape(usual, 60_000, [512])['mlp_hidden'] == 0


@pytest.mark.parametrize('args, said', [
    ((), 'names no config'), (('base.py', '--card=Voodoo'), "--card is 'Voodoo', whose peak is not known; there are RTX 4090"),
    (('base.py', '--minutes=0.02', '--text_words=1e9', '--max_tokens=300000'), r'is to read [\d,]+ tokens of text, [\d,]+ are here')])
def test_dolls_that_cannot_be(doll, args, said):
    with pytest.raises(UserError, match=said):
        doll(*args)

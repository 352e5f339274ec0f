"""bench_mfu.py --sweep: a grid is made once, and laws that were planted are found."""
import json
import math
import re

import numpy as np
import pytest

import bench_mfu
import sample
import train
from config import UserError, bench_sweep
from test_bench_mfu import fake


def points(seed=0, noise=0.003, sizes=(2, 4, 8, 16), tokens=(3, 10, 30), worse=1.0):
    """Finished runs of a grid that obey E = 0.9, A = 40, alpha = 0.3, B = 300, beta = 0.4; one is worse by a factor."""
    dice, runs = np.random.default_rng(seed), []
    for N in sizes:
        for D in tokens:
            bpb = (0.9 + 40 / (1e6 * N) ** 0.3 + 300 / (1e6 * D) ** 0.4) * math.exp(noise * dice.standard_normal())
            runs.append(fake(f'n_embd={64 * N},max_tokens={D}', 1, bpb * (1 if len(runs) != 5 else worse), active_params=1e6 * N,
                             tokens=1e6 * D, tok_per_sec=1e5 * N ** -0.7, budget_seconds=1800, settings={}))
    return runs


TRUE = dict(E=0.9, A=40, alpha=0.3, B=300, beta=0.4)


def test_a_planted_law_is_found_within_its_interval(monkeypatch):
    monkeypatch.setattr(bench_sweep, 'DRAWS', 100)
    said, found, charts = bench_sweep.law_of(points(noise=0))
    assert {k: v[0] for k, v in found.items()} == pytest.approx(TRUE, rel=1e-3) and 'within 0.0% of 12 runs' in said[0]
    N = np.geomspace(1e6, 64e6, 20000)                         # the best for 1800 seconds, by trying
    bpb = 0.9 + 40 / N ** 0.3 + 300 / (1800 * 1e5 * (N / 1e6) ** -0.7) ** 0.4
    best, least = map(float, re.search(r'best is N = (\S+)M \(.* with val_bpb (\S+) .*; tried were 2M to 16M', said[1]).groups())
    assert best == pytest.approx(N[bpb.argmin()] / 1e6, rel=1e-3) and least == pytest.approx(bpb.min(), rel=1e-3)
    xs, ys = np.array(charts[0]['series'][1]['path']).T
    assert ys == pytest.approx(0.9 + 40 / 4e6 ** 0.3 + 300 / xs ** 0.4) and len(charts[0]['series'][1]['points']) == 3
    at, low, high = np.array(charts[0]['series'][1]['band']).T
    assert at == pytest.approx(xs) and (low <= ys * 1.0001).all() and (high >= ys * 0.9999).all()
    inside = {k: 0 for k in TRUE}
    for seed in range(12):
        for k, (value, low, high) in bench_sweep.law_of(points(seed))[1].items():
            assert low < high and (k in 'AB' or 0.5 < value / TRUE[k] < 2)
            inside[k] += low <= TRUE[k] <= high
    assert min(inside.values()) >= 8 and sum(inside.values()) < 60       # nine of ten, and not all


def test_one_run_that_went_wrong_does_not_bend_the_law():
    fine, bent = (bench_sweep.law_of(points(noise=0.0005, worse=worse))[1] for worse in (1, 1.2))
    assert [bent[k][0] for k in ('E', 'alpha', 'beta')] == pytest.approx([fine[k][0] for k in ('E', 'alpha', 'beta')], rel=0.1)
    assert bent['alpha'][2] - bent['alpha'][1] > 2 * (fine['alpha'][2] - fine['alpha'][1])


@pytest.mark.parametrize('sizes, tokens, missing', [
    ((2, 4), (3, 10), '1 points, 1 sizes, 1 numbers of tokens, 2 runs'), ((2, 4, 8, 16), (3, 10), '1 numbers of tokens'),
    ((2, 2.04, 4), (3, 10, 30), '1 sizes'), ((), (), '5 points, 3 sizes, 3 numbers of tokens, 6 runs')])
def test_what_a_law_lacks_is_said(sizes, tokens, missing):
    said, found, charts = bench_sweep.law_of(points(sizes=sizes, tokens=tokens))
    assert said[0].endswith(f'missing: {missing}.') and (len(said), found, charts) == (1, {}, [])


def test_runs_that_do_not_determine_a_law_are_called_so():
    assert any('leave' in s and 'open threefold' in s for s in bench_sweep.law_of(points(noise=0.03))[0])
    assert not any('open threefold' in s for s in bench_sweep.law_of(points(noise=0.0003))[0])


def test_where_a_parabola_is_lowest():
    x = np.log([0.01, 0.02, 0.04, 0.08] * 2)
    noise = 0.004 * np.random.default_rng(0).standard_normal((2, 8))
    groups = {f'n_embd={width}': (x, 0.5 + 0.05 * (x - math.log(best)) ** 2 + rest)
              for (width, best), rest in zip({64: 0.03, 256: 0.015}.items(), noise)}
    said, found, charts = bench_sweep.valleys('learning_rate', groups)
    assert [math.exp(best[0]) for best in found.values()] == pytest.approx([0.03, 0.015], rel=0.05)
    low, high = map(float, re.search(r'Best learning_rate for n_embd=64: 0\.0\d+ \(([\d.]+) to ([\d.]+)\)', said[0]).groups())
    assert 0.027 < low < 0.03 < high < 0.033
    assert [series['name'] for series in charts[0]['series']] == [*groups]
    slope, low, high = map(float, re.search(r'each n_embd goes as n_embd to the power (\S+) \((\S+) to (\S+)\)',
                                            bench_sweep.moves('learning_rate', found)[0]).groups())
    assert low < -0.5 < high < 0 and slope == pytest.approx(-0.5, abs=0.05)
    assert 'leave open' in bench_sweep.moves('head_lr', dict(list(found.items())[:1]))[0]
    # nothing better inside the grid, and too few values
    falling = bench_sweep.valleys('head_lr', {'a': (x, 1 - 0.1 * x), 'b': (x[:2], x[:2]), 'c': (x, 1 + 0.1 * x - 0.05 * x ** 2)})
    assert falling[0][0] == 'No best head_lr for b: a parabola takes 3 values; missing: 1.' and falling[1] == {}
    assert falling[0][1] == 'Best head_lr for a: 0.08 or more (0.08 or more).' and 'c: 0.01 or less' in falling[0][2]
    assert 'no interval' in bench_sweep.valleys('head_lr', {'a': (x[:3], np.array([2.0, 1.0, 2.0]))})[0][0]


def test_a_law_is_one_of_the_best_settings():
    runs = [fake(f'n_embd={N},learning_rate={rate},max_tokens={D}', seed, bpb + seed / 100, active_params=N, settings={})
            for N in (10, 20) for D in (1, 2) for rate, bpb in ((0.1, 2.0), (0.2, 1.5 if N == 10 else 2.5)) for seed in (1, 2)]
    assert {(run.name, run.seed) for run in bench_sweep.tuned(runs)} == {
        (f'n_embd={N},learning_rate={0.2 if N == 10 else 0.1},max_tokens={D}', seed) for N in (10, 20) for D in (1, 2) for seed in (1, 2)}


@pytest.fixture
def sweep(corpus, tmp_path, monkeypatch, capsys):
    """--sweep in this process and an empty folder: what it prints, and the runs it makes; the one at which it is stopped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_mfu.signal, 'signal', lambda *a: None)
    monkeypatch.setattr(sample, 'write_page', lambda path, title, blocks: path.write_text(json.dumps([title, *blocks])), raising=False)
    monkeypatch.setattr(bench_sweep, 'DRAWS', 20)
    (tmp_path / 'base.py').write_text('learning_rate = 0.01\n')

    def call(*args, stop=None):
        made = []

        def making(run):
            made.append((run.name, run.seed))
            if len(made) == stop:
                raise KeyboardInterrupt
            run.folder.mkdir(parents=True, exist_ok=True)
            N, D = 1e4 * run.s.n_embd, run.s.max_tokens
            result = fake('', run.seed, 1 + 30 / N ** 0.3 + 200 / D ** 0.5 + 0.02 * math.log(run.s.learning_rate / 0.02) ** 2, N,
                          tokens=D, settings=vars(run.s), budget_seconds=1800, tok_per_sec=1e7 / N).result
            (run.folder / 'result.json').write_text(json.dumps(result))
        monkeypatch.setattr(bench_mfu, 'make', making)
        bench_mfu.main([*args, *corpus.args])
        return capsys.readouterr().out, made
    return call


def test_a_sweep_goes_on_where_it_was_stopped_and_then_fits(sweep, tmp_path):
    args = '--sweep', 'n_embd=32, 64,128; max_tokens=10**4,2*10**4,40000;learning_rate=1e-2,2e-2,0.04,0.08', 'base.py', '--seeds=1'
    with pytest.raises(train.Stopped, match='to go on, the same again: python bench_mfu.py --sweep .n_embd'):
        sweep(*args, stop=35)
    assert 'missing' in (tmp_path / 'out/sweep/base/sweep.md').read_text()
    out, made = sweep(*args)
    assert made == [(f'n_embd=128,max_tokens=40000,learning_rate={rate}', 1) for rate in (0.04, 0.08)]
    assert '36 runs in out/sweep/base, 2 to make' in out
    text, found = (tmp_path / 'out/sweep/base' / f'sweep.{kind}' for kind in ('md', 'json'))
    assert out.endswith(text.read_text()) and 'Best active_params for max_tokens=10000: 1.28M or more' in out
    found = json.loads(found.read_text())
    assert found['E'][0] == pytest.approx(1, abs=0.01) and found['beta'][0] == pytest.approx(0.5, abs=0.02) and len(found['rows']) == 36
    assert [*found['learning_rate'].values()] == pytest.approx([0.02] * 9, rel=0.02) and 'for each n_embd, max_tokens=10000 goes' in out
    title, words, *blocks = json.loads((tmp_path / 'out/sweep/base/sweep.html').read_text())
    assert title == 'A sweep of n_embd, max_tokens, learning_rate' and words['text'].split('\n') == found['said']
    assert [b['kind'] for b in blocks] == ['dots'] * 3 + ['table'] and [len(b['series']) for b in blocks[:3]] == [3, 3, 9]
    assert sweep(*args)[1] == []
    assert len(sweep('--sweep=n_embd=64', 'base.py', '--max_tokens=10000', '--seeds=1', '--compare_dir=here')[1]) == 1 and (tmp_path / 'here/n_embd=64').exists()


@pytest.mark.parametrize('grid, said', [
    ('n_embds=64', ['--n_embds=64: no setting is called n_embds; did you mean n_embd?']),
    ('learning_rate=-1;n_embd=64,wide', ['--learning_rate=-1: learning_rate is -1.0, it must be at least 0',
                                         "--n_embd=wide: n_embd is 'wide', it must be int, like 256"]),
    ('n_embd=62,64;n_head=1,2', ['n_embd=62,n_head=2: the model cannot be built: head_dim is 31, rotary embedding needs it even: change n_embd or n_head']),
    ('seed=1,2', ['--seed=1: a comparison has its own seed', '--seed=2: a comparison has its own seed']),
    ('block_size=96', ['block_size=96: tokens_per_step is 512, it must be a multiple of block_size 96 times 1 rank: try 576']),
    *((grid, None) for grid in ('', 'base.py', 'n_embd=', 'n_embd=64,', 'n_embd=64;', '=3', 'n_embd=64,6.4e1//1,64', 'n_embd=1;n_embd=2'))])
def test_grids_that_cannot_be(sweep, tmp_path, grid, said):
    with pytest.raises(UserError) as e:
        sweep('--sweep', grid, 'base.py')
    lines = str(e.value).split('\n  ')
    assert lines[1:] == said if said else 'it must be like "n_embd=128,192;head_lr=1e-3,2e-3", nothing twice' in lines[0]
    assert not (tmp_path / 'out').exists()

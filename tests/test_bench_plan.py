"""bench_mfu.py --plan: it is the best of what there is by a law, and the law that was planted."""
import dataclasses
import json
import math
import re
import signal

import numpy as np
import pytest

import bench_mfu
import model
import sample
import train
from config import UserError, bench_plan, bench_sweep
from conftest import ROOT, finish, start

PLAIN = ROOT / 'config' / 'plain_gpt2.py'
TRULY = dict(E=math.log(1.2), A=math.log(0.8), alpha=0.25, cost=1.5, B=math.log(0.6), beta=0.3, C=math.log(0.1), a=0.1, b=0.6, g=0.2, kappa=0.8, thin=4)
REPEATED = [TRULY[name] for name in bench_plan.REPEATED]


def rows_of_dolls(noise=0.0, seed=0):
    """Runs that obey a law of repeated text: four sizes, text read 1 to 40 times, some with dropout, some of members."""
    text = [(1.1e5, 4), (1.1e5, 12), (1.1e5, 40), (4.4e5, 1), (4.4e5, 4), (4.4e5, 12), (1.76e6, 1), (1.76e6, 4), (7e6, 1)]
    rows = [(N, U, U * R, 1, 0) for N in (65e3, 135e3, 286e3, 572e3) for U, R in text]
    rows += [(135e3, U, U * R, 1, 0.1) for U, R in text[1:5:2] + text[5:8:2]]
    rows += [(N, U, U * 12, K, 0) for N, U, K in ((65e3, 1.1e5, 4), (135e3, 4.4e5, 3), (135e3, 1.1e5, 2))]
    bpb = np.exp(bench_sweep.law(np.array([REPEATED]), bench_plan.repeated(*np.array(rows).T))[0][0])
    return np.c_[rows, bpb * np.exp(noise * np.random.default_rng(seed).standard_normal(len(rows)))]


def test_the_law_of_repeated_text_by_hand():
    N, U, D, K = 2e5, 5e5, 3e6, 3
    heart = 0.1 * math.exp(-0.4) * 4 ** 0.1 * (25 / 6) ** (0.6 + 0.2 * math.log(4)) / 3 ** 0.8     # h = 2 / 0.5, R = 6
    each = [1.2, 0.8 * math.exp(0.15) / 2 ** 0.25, 0.6 * math.exp(0.15) / 3 ** 0.3, heart]
    total, shares = bench_sweep.law(np.array([REPEATED] * 2), bench_plan.repeated(N, U, D, K, 0.1)[None])
    assert np.exp(total) == pytest.approx(sum(each)) and shares[0, 0] * sum(each) == pytest.approx(each)

    def by_heart(text, read):
        total, shares = bench_sweep.law(np.array([REPEATED]), bench_plan.repeated(N, text, read, 1, 0.0)[None])
        return float(np.exp(total[0, 0]) * shares[0, 0, 3])
    assert by_heart(D, 0.5 * D) < 0.003 < 0.1 < by_heart(U, D)
    assert by_heart(1e8, 9e8) == pytest.approx(by_heart(1e9, 9e9))      # no less than runs have shown


def test_a_planted_law_of_repeated_text_is_found(monkeypatch):
    monkeypatch.setattr(bench_sweep, 'DRAWS', 40)
    p, residuals = bench_plan.law_of_repeats(rows_of_dolls())
    assert p[0] == pytest.approx(REPEATED, abs=0.02) and abs(residuals).max() < 1e-4
    x, inside = bench_plan.repeated([1e5, 3e5], [3e5, 2e5], [3e6, 2e6], [1, 4], [0, 0.1]), []        # of no run
    expected = np.exp(bench_sweep.law(np.array([REPEATED]), x)[0][0])
    for seed in range(6):
        bpb = np.exp(bench_sweep.law(bench_plan.law_of_repeats(rows_of_dolls(0.003, seed))[0], x)[0])
        low, high = np.quantile(bpb[1:], (0.05, 0.95), axis=0)
        inside += [*(low < expected) & (expected < high)]
        assert bpb[0] == pytest.approx(expected, rel=0.01) and (high < 1.03 * low).all()
    assert sum(inside) >= 7                                            # of 12, nine of ten to be expected


@pytest.fixture
def choices(corpus):
    s, ideas = train.read_settings([*corpus.args, '--block_size=64', '--micro_batch_size=4'])
    here = bench_plan.Choices(s, corpus.args, ideas, rows_of_dolls(), 1e6)
    here.seconds = {70000: 1e-5, 200000: 3e-5}
    return here


def test_what_a_plan_chooses_from(choices):
    assert len(choices.shapes) >= 5 and choices.sizes.max() <= 1e6
    for size, shape in choices.shapes:
        made = model.blueprint(dataclasses.replace(choices.config, **shape))
        assert made.params()['total'] == size and shape['block_size'] == 64 and shape['n_embd'] // shape['n_head'] in (16, 32, 64)
        assert made.config.mlp_hidden == 4 * shape['n_embd'] and shape['n_layer'] >= 4
        assert shape['n_embd'] < 64 or shape['n_embd'] // shape['n_head'] > 16
    at = int(np.searchsorted(choices.sizes, 100000))
    times = choices.seconds_a_token()
    assert 70000 < choices.sizes[at] < 200000 < choices.sizes[-1]
    assert times[at] == pytest.approx(1e-5 * 3 ** (math.log(choices.sizes[at] / 70000) / math.log(20 / 7)))
    assert times[-1] == pytest.approx(3e-5 * choices.sizes[-1] / 200000)
    choices.suppose(1e9)
    assert choices.seconds_a_token()[0] == pytest.approx(model.blueprint(dataclasses.replace(choices.config, **choices.shapes[0][1])).flops_per_token() / 1e9)


def test_a_plan_is_the_best_of_all(choices):
    p, times = np.array([REPEATED]), choices.seconds_a_token()
    rows = choices.best(p, 30)
    bpb = np.exp(bench_sweep.law(p, bench_plan.repeated(*rows.T[:5]))[0][0])
    assert (np.diff(bpb) >= 0).all() and (rows[:, 0] * rows[:, 3] <= 1e6).all() and {*rows[:, 3]} > {1, 2} and {*rows[:, 4]} == {0, 0.1}
    for size, text, read, members, thin, which in rows[::50]:
        assert size == choices.sizes[int(which)] and text == choices.text['bytes']
        assert read <= 1.001 * 30 / times[int(which)] / members * choices.bytes_a_token[int(which)]
    # with little text it ends early or trains several; with much it reads for all of its time
    poor, rich = choices.best(p, 30, 0.01)[0], choices.best(p, 30, 1000)[0]
    assert rich[3] == 1 and choices.settings(rich, 30)['max_tokens'] == 0
    assert poor[3] > 1 or poor[4] > 0 or choices.settings(poor, 30)['max_tokens']
    step = choices.settings(rich, 30)['tokens_per_step']
    assert step % 256 == 0 and -256 < step - 640 * (rich[2] / choices.bytes_a_token[int(rich[5])] / 1e6) ** 0.4 < 33
    choices.on_card = True
    assert choices.step_of(1e6) == 512 and choices.step_of(6e6) == 1280 and choices.step_of(1) == choices.s.tokens_per_step == 512


def test_a_plan_from_end_to_end(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_sweep, 'DRAWS', 20)
    np.savetxt('law.tsv', rows_of_dolls(0.002), delimiter='\t', header='\t'.join(bench_plan.AS_RUN), comments='')
    (tmp_path / 'base.py').write_text('n_embd = 64\n')
    args = ['--plan', 'base.py', *corpus.args, '--plan_runs=law.tsv', '--budget_minutes=0.5', '--most_params=2e5', '--write=planned.py']
    bench_mfu.main(args)
    out = capsys.readouterr().out
    told = [float(gib) for gib in re.findall(r' tokens a second here, (\S+) GiB of memory', out)]
    assert told and told == sorted(told) and 0 < told[-1] == pytest.approx(sample.peak_memory_gb('cpu'), abs=0.1)
    assert 'twice the time' in out and 'law.tsv' in out and 'python train.py base.py planned.py' in out
    row = next(line for line in out.split('\n') if line.startswith('| ') and 'the plan' in line).strip('| ').split('|')
    s, ideas = train.read_settings(['base.py', 'planned.py'])
    assert [s.n_layer, s.n_embd, s.vocab_size] == [int(cell.replace(',', '')) for cell in row[1:4]]
    assert int(row[5]) == getattr(s, 'members', 1) and float(row[6]) == getattr(s, 'dropout', 0) and int(row[7].replace(',', '')) == s.tokens_per_step
    with pytest.raises(UserError, match='--write is planned.py, it must be a new file'):
        bench_mfu.main(args)
    page = re.search(r'id="data">(.*?)</script>', (tmp_path / 'out/plan/base/plan.html').read_text(), re.S)[1]
    text, times, again = json.loads(page)['blocks']
    assert len(times['series'][0]['band']) == 9 and [len(one['points']) for one in again['series']] == [40] * 3
    bits = [y for _, y in times['series'][0]['points']]
    assert (np.diff(bits) <= 1e-9).all() and bits[-1] < bits[0]                                # more time, no more bits


def test_a_plan_goes_with_what_it_is_for(corpus, tmp_path, monkeypatch, capsys):
    """Of a config that has members the plan's are the only ones; what does not go with members has none; what was typed is kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_sweep, 'DRAWS', 5)
    table, ensemble = rows_of_dolls(0.002), str(ROOT / 'config' / 'ensemble.py')
    np.savetxt('law.tsv', table, delimiter='\t', header='\t'.join(bench_plan.AS_RUN), comments='')
    s, ideas = train.read_settings(args := [*corpus.args, ensemble, '--members=3'])
    here = bench_plan.Choices(s, args, ideas, table, 1e6)
    assert s.members == 1 and here.sizes.min() < 70000
    here.suppose(1e9)
    one, several = (next(row for row in here.best(np.array([REPEATED]), 30) if (row[3] > 1) == many) for many in (False, True))
    assert [here.settings(row, 30)['members'] for row in (one, several)] == [1, several[3]]
    s, ideas = train.read_settings(args := [*corpus.args, str(PLAIN)])
    assert {*bench_plan.Choices(s, args, ideas, table, 1e6).members} == {1}
    assert {*bench_plan.Choices(s, args, ideas, table[table[:, 4] == 0], 1e6).thinned} == {0}
    with pytest.raises(UserError, match='--most_params is 50,000, and no model in these proportions has so few'):
        bench_plan.Choices(s, args, ideas, table, 5e4)
    bench_mfu.main(['--plan', ensemble, *corpus.args, '--plan_runs=law.tsv', '--card=RTX 4090', '--seed=7', '--write=mine.py', '--most_params=1e6'])
    assert 'RTX 4090 at 45% of its peak' in capsys.readouterr().out
    written = (tmp_path / 'mine.py').read_text()
    assert 'seed = 7' in written and 'members = ' in written and 'config.ensemble' not in written
    train.read_settings([ensemble, 'mine.py'])


def test_runs_that_a_plan_goes_by(tmp_path, monkeypatch):
    result = dict(tokens=1000, val_loss=2 * math.log(2), val_bpb=1.0, epochs=4, total_params=300, settings=dict(members=3), data=dict(val_bytes=9), ideas=['babylm', 'ensemble'])
    assert bench_plan.as_run(result) == pytest.approx([100, 500, 2000, 3, 0, 1])
    known = bench_plan.runs_known(bench_plan.RUNS)
    assert len(known) >= 40 and (known > 0)[:, :4].all() and (known[:, 2] / known[:, 1]).max() > 30 and {0, 0.1} == {*known[:, 4]} and {1, 3, 4} <= {*known[:, 3]}
    (tmp_path / 'few').mkdir()
    (tmp_path / 'few' / 'result.json').write_text(json.dumps(result))
    for name, more in dict(none={}, zero=dict(val_bpb=0), list=dict(settings=[])).items():
        (tmp_path / f'{name}_of').mkdir()
        if more:
            (tmp_path / f'{name}_of' / 'result.json').write_text(json.dumps(result | more))
        with pytest.raises(UserError, match='must be a folder of runs' if more else 'holds 0 finished runs'):
            bench_plan.runs_known(tmp_path / f'{name}_of')
    (tmp_path / 'one.tsv').write_text('\n'.join(bench_plan.RUNS.read_text().splitlines()[:2]))
    with pytest.raises(UserError, match='holds 1 finished runs'):
        bench_plan.runs_known(tmp_path / 'one.tsv')
    for args, said in ((['--plan'], '--plan names no config'), (['--plan', 'a.py', f'--plan_runs={tmp_path}/none'], 'must be a folder of runs'),
                       (['--plan', 'a.py', f'--plan_runs={tmp_path}/few'], 'holds 1 finished runs'), (['--plan', 'a.py', '--write=a-plan.py'], 'with a name like my_plan.py'),
                       (['--plan', 'a.py', f'--write={tmp_path}/none/plan.py'], 'in a folder that is there')):
        with pytest.raises(UserError, match=re.escape(said)):
            bench_mfu.main(args)
    monkeypatch.setattr(bench_plan, 'as_run', lambda r: known[0])
    for i in range(40):                                                                         # members that are none of independent runs
        idea = ['babylm', 'snapshots', '/their/distilled.py', 'ensemble'][i % 4]
        (tmp_path / 'many' / str(i)).mkdir(parents=True)
        (tmp_path / 'many' / str(i) / 'result.json').write_text(json.dumps(result | dict(ideas=[idea])))
    assert len(bench_plan.runs_known(tmp_path / 'many')) == 20
    for column, value in ((1, 0), (5, math.nan), (0, math.inf)):
        rows = known.copy()
        rows[7, column] = value
        np.savetxt(tmp_path / 'wrong.tsv', rows, delimiter='\t', header='\t'.join(bench_plan.AS_RUN), comments='')
        with pytest.raises(UserError, match='holds a number that is none, or not above 0'):
            bench_plan.runs_known(tmp_path / 'wrong.tsv')


def test_a_plan_that_is_stopped_says_so(corpus, tmp_path, monkeypatch):
    (tmp_path / 'base.py').write_text('n_embd = 64\n')
    process = start('bench_mfu.py', '--plan', 'base.py', *corpus.args, cwd=tmp_path)
    assert 'tokens a second here' in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err.strip()) == (130, 'bench_mfu.py: stopped')
    # and where the exception is lost in some callback, the next step raises it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_mfu.signal, 'signal', lambda *a: None)
    s, ideas = train.read_settings(corpus.args)
    run = bench_mfu.measured(ideas)(s, device='cpu', compile='off')
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run.heed(2, None)
        with pytest.raises(KeyboardInterrupt):
            run.step()


def test_a_plan_of_no_time(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'base.py').write_text('n_embd = 64\n')
    with pytest.raises(UserError, match='--budget_minutes is 0.1, and starting takes longer than that'):
        bench_mfu.main(['--plan', 'base.py', *corpus.args, '--budget_minutes=0.1'])

"""web/page.html: what it makes of a run's JSON (asked of node), and what a browser draws (asked of Chromium)."""
import html
import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import sample
from conftest import ROOT
from prepare_data import UserError

NODE = shutil.which('node') or shutil.which('nodejs')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
needs_node = pytest.mark.skipif(not NODE, reason="node is not installed, which runs the page's JavaScript without a browser")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason='Chromium is not installed, which draws the pages')
EVIL = '</script><img src=x onerror=alert(1)><!-- \ud800 \u2028 &lt;'
FIELDS = {'npi': 0.5, 'anaphor': dict(accuracy=1.0, error=0.0, items=7)}


def result_of(**more):
    """A result.json as a run leaves it."""
    return dict(
        val_bpb=1.07284, val_bpb_error=0.0, val_share=1.0, val_bpb_text_error=0.0035, val_loss=2.5, val_bpb_per_source=dict(tales=0.75, notes=1.5),
        val_bpb_per_source_text_error=dict(tales=0.01), evals={}, steps=900, tokens=460_800, epochs=4.71, total_params=131_268, embedding_params=32_896,
        non_embedding_params=98_372, active_params=131_268, flops=1.0383e17, tok_per_sec=12137.3, mfu=None, skipped_steps=0, warnings=[],
        startup_seconds=4.0, train_seconds=30.0, teacher_seconds=6.0, total_seconds=40.0, budget_seconds=60.0, peak_mem_gb=0.44698, joules=5.5, co2_g=None,
        energy=dict(train=5.5, how=dict(cpu='estimated', gpu='not used')), dollars=None, hardware=dict(device='cpu', ranks=1),
        versions=dict(torch='2.13.0'), data=dict(folder='data/tales', val_bytes=17_303), protocol=1, commit=None, sample='Once upon a time',
        settings=dict(tokens_per_step=512, seed=3, learning_rate=0.02), changed=dict(seed=3), finished='2026-11-25T15:01:36',
        config=dict(n_layer=2, n_embd=64, n_head=2, block_size=64, vocab_size=8192)) | more


def step_row(step, **more):
    return dict(step=step, progress=step / 900, train_loss=5 / step, lr=1.0, grad_norm=0.5, elapsed_s=60.0 * step) | more


def report(folder, result, rows=(), blocks=()):
    """The page that train.py makes of these files."""
    folder.mkdir(exist_ok=True)
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    sample.write_report(folder, result, blocks)
    return folder / 'report.html'


def inside(path):
    """The JSON of a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', Path(path).read_text('utf-8'), re.S)[1])


def js(expression, data=None):
    """What an expression over the page's own functions, and data as `d`, is worth."""
    code = re.search(r'<script id="report">(.*?)</script>', (ROOT / 'web' / 'page.html').read_text('utf-8'), re.S)[1]
    code += f'\nconst d = JSON.parse(require("fs").readFileSync(0)); process.stdout.write(JSON.stringify({expression}));'
    done = subprocess.run([NODE, '-e', code], input=json.dumps(data), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def blocks_of(path):
    """{title: block} of a run's page, in its order."""
    blocks = js('reportBlocks(d.result, d.rows, d.blocks)', inside(path))
    assert len({block['title'] for block in blocks}) == len(blocks)
    return {block['title']: block for block in blocks}


def facts(block):
    return dict(block['rows'])


# ---- what train.py writes

def test_a_page_holds_its_data_and_all_text_stays_text(tmp_path):
    rows = [step_row(1), step_row(2, train_loss=None, grad_norm=math.inf), dict(step=2, progress=0.5, elapsed_s=9, sample=EVIL)]
    extra = [dict(kind='text', title='<b>', text=EVIL), dict(kind='heat', title='H', x=[1], y=['q'], values=[(-math.inf,)])]
    page = report(tmp_path / 'a run', result_of(sample=EVIL, val_bpb_error=math.nan), rows, (block for block in extra))
    text, template, data = page.read_bytes(), (ROOT / 'web' / 'page.html').read_text('utf-8').encode(), inside(page)
    assert text.count(b'</script>') == template.count(b'</script>') and text.count(b'<!--') == template.count(b'<!--')
    assert b'onerror' in text and b'<img' not in text and not re.search(rb'https?://(?!www\.w3\.org/2000/svg)', text)
    assert data.keys() == {'title', 'result', 'rows', 'blocks'} and data['title'] == 'a run: 1.0728 bits per byte'
    assert data['result'] == result_of(sample=EVIL, val_bpb_error=None) and data['rows'][0] == rows[0] and data['rows'][2]['sample'] == EVIL
    assert data['rows'][1] == rows[1] | dict(train_loss=None, grad_norm=None)
    assert data['blocks'] == [extra[0], extra[1] | dict(values=[[None]])]
    assert [*tmp_path.rglob('*.part')] == []
    sample.write_page(page, 'other', blocks=[])                                      # in its place
    assert inside(page) == dict(title='other', blocks=[])


def test_a_page_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    sample.write_page(tmp_path / 'a.html', 'first', blocks=[])

    def full(*args):
        raise OSError('no space left')
    monkeypatch.setattr(sample.os, 'replace', full)
    with pytest.raises(UserError, match='no space left'):
        sample.write_page(tmp_path / 'a.html', 'second', blocks=[])
    assert inside(tmp_path / 'a.html')['title'] == 'first' and [*tmp_path.iterdir()] == [tmp_path / 'a.html']


def test_a_run_that_recorded_nothing_has_a_page(tmp_path):
    sample.write_report(tmp_path, result_of(val_bpb=math.nan))
    data = inside(tmp_path / 'report.html')
    assert data['rows'] == data['blocks'] == [] and data['result']['val_bpb'] is None and 'nan bits per byte' in data['title']


# ---- what the page makes of it

@needs_node
def test_numbers_are_short():
    dice = random.Random(0)
    values = [dice.choice((-1, 1)) * dice.uniform(1, 10) * 10.0 ** dice.randrange(-9, 19) for _ in range(400)]
    told = js('d.map(words)', values)
    for value, text in zip(values, told):
        rounded = 1000 <= abs(value) < 1e9 or (value == int(value) and abs(value) < 1e12)
        assert text == (f'{value:,.0f}' if rounded else f'{value:.4g}')
    assert js('d.map(words)', [0, -3, 999.96, 1234567, 5_000_000_000, 0.25, 100.0, 0.1 + 0.2, 1e-5]) == [
        '0', '-3', '1000', '1,234,567', '5,000,000,000', '0.25', '100', '0.3', '1e-05']
    assert js('d.map(words)', [None, True, 'as it is', [1, 0.5], dict(one_two=0.5, b=dict(c=None))]) == [
        'not measured', 'True', 'as it is', '1, 0.5', 'one two: 0.5\nb: c: not measured']


@needs_node
def test_settings_stand_as_one_types_them():
    values = [1e-8, 3e-5, -1.25e-12, 0.0001, 0.02, 30.0, -1, False, 'linear', '', [], [8], [[0, 1], ['a', None]]]
    told = js('d.map(v => literal(v))', values)
    assert told == ['1e-08', '3e-05', '-1.25e-12', '0.0001', '0.02', '30', '-1', 'False', 'linear', '', '()', '(8,)', "((0, 1), ('a', None))"]


@needs_node
def test_long_curves_are_thinned_to_means():
    points = [[i, None if 300 <= i < 400 else i % 2] for i in range(1000)]
    assert js('thinned(d, 10)', points) == [[99 / 2 + 100 * i, None if i == 3 else 0.5] for i in range(10)]
    assert js('thinned(d, 10)', points[:10]) == points[:10] and js('thinned(d)', []) == []
    assert len(js('thinned(d)', points[:301])) == 151 and len(js('thinned(d)', points[:300])) == 300
    assert js('thinned(d, 2)', points[:3]) == [[0.5, 0.5], [2, 0]]


@needs_node
def test_a_finished_run_has_a_page(finished):
    """A run as a user makes one, and all that it recorded."""
    blocks, result = blocks_of(finished[0] / 'report.html'), json.loads((finished[0] / 'result.json').read_text())
    rows = [json.loads(line) for line in (finished[0] / 'metrics.jsonl').read_text().splitlines()]
    steps = [row for row in rows if 'train_loss' in row]
    training, validation = blocks['Loss over tokens']['series']
    assert training['points'] == [[4096 * row['step'], row['train_loss']] for row in steps] and len(validation['points']) == 2
    assert blocks['Gradient norm']['series'][0]['points'][-1] == [steps[-1]['elapsed_s'] / 60, steps[-1]['grad_norm']]
    assert blocks['Sample at the end']['text'] == result['sample'] and facts(blocks['Result'])['bits per byte'] == f'{result["val_bpb"]:.4f}'
    clock = {row['part']: row['seconds'] for row in blocks['Where the time went']['rows']}
    assert clock['train'] == result['train_seconds'] and clock['total'] == result['total_seconds'] and 'budget' not in clock
    assert facts(blocks['Machine, versions, data'])['torch'] == result['versions']['torch']
    sources = {row['source']: row['bits per byte'] for row in blocks['Bits per byte by source']['rows']}
    assert sources == result['val_bpb_per_source'] and len(sources) == 2
    assert all(key.isascii() and '_' not in key for key in facts(blocks['Result']))


@needs_node
def test_all_that_a_run_recorded_is_on_its_page(tmp_path):
    along = [step_row(n) for n in (1, 2, 4)]
    along += [row for n, p in ((1, 0.1), (4, 0.9)) for row in (
        dict(step=n, progress=p, elapsed_s=60 * n, val_loss=2 - p, val_bpb=1 - p / 2), dict(step=n, progress=p, elapsed_s=60 * n, sample=f'once {n}'),
        dict(step=n, progress=p, elapsed_s=60 * n, evals=dict(blimp=dict(accuracy=p), **{'odd': dict(accuracy=0.25)} if n > 1 else {})))]
    evals = dict(blimp=dict(accuracy=0.75, error=0.01, chance=0.5, items=100, per_kind=dict(a=0.1, b=0.2), per_field=FIELDS),
                 odd=dict(accuracy=0.25, error=0.02, chance=None, items=9, per_kind=dict(only=0.25), per_field={}),
                 texts=dict(accuracy=0.5, per_kind=dict(ends=0.5, known=0.9)))
    result = result_of(evals=evals, val_share=0.25, val_bpb_error=0.0012, skipped_steps=2, warnings=['no room'], mfu=0.4312, dollars=0.21)
    blocks = blocks_of(report(tmp_path / 'run', result, along, [dict(kind='heat', title='An idea saw', x=[1], y=['q'], values=[[2]])]))
    assert [*blocks] == [
        'Result', 'Settings that differ from the defaults', 'Warnings', 'Loss over time', 'Loss over tokens', 'Bits per byte over time',
        'Bits per byte over tokens', 'Learning rate', 'Gradient norm', 'Abilities', 'Bits per byte by source', 'Abilities at the end', 'An idea saw',
        'Samples along training', 'Sample at the end', 'Energy', 'Where the time went', 'More', 'Machine, versions, data']
    assert facts(blocks['Result']) == {
        'bits per byte': '1.0728 on 25.0% of the validation text, standard error 0.0012', 'model': '2 layers, 64 wide, 2 heads, context 64, vocabulary 8,192',
        'parameters': '131,268', 'outside embeddings': '98,372', 'active for a token': '131,268', 'training tokens': '460,800', 'epochs': '4.71', 'steps': '900',
        'tokens a second of training': '12,137', 'model FLOPs': '1.038e+17', 'MFU': '0.4312', 'peak memory, GiB': '0.447', 'seconds in all': '40',
        'seconds of its budget': '60', 'dollars': '0.21', 'finished': '2026-11-25T15:01:36', 'warnings': 'see below'}
    assert facts(blocks['Settings that differ from the defaults']) == dict(seed='3')
    assert blocks['Warnings']['text'].split('\n') == [
        'no room', 'bits per byte are 1.0728 on 25.0% of the validation text, standard error 0.0012', '2 steps were not finite and changed no weights']
    assert [s['points'] for s in blocks['Loss over time']['series']] == [[[1, 5], [2, 2.5], [4, 1.25]], [[1, 1.9], [4, 1.1]]]
    assert blocks['Loss over tokens']['series'][0]['points'][-1] == [2048, 1.25] and blocks['Loss over time']['log_y'] is True
    assert blocks['Bits per byte over tokens']['series'][0]['points'] == [[512, 0.95], [2048, 0.55]] and not blocks['Learning rate']['log_y']
    assert blocks['Abilities']['series'] == [dict(name='blimp', points=[[0.1, 0.1], [0.9, 0.9]]), dict(name='odd', points=[[0.9, 0.25]])]
    ends = [(row['ability'], row['kind'], row['accuracy'], row['error'], row['chance'], row['items']) for row in blocks['Abilities at the end']['rows']]
    assert ends == [('blimp', 'all', 0.75, 0.01, 0.5, 100), ('blimp', 'npi', 0.5, None, 0.5, None), ('blimp', 'anaphor', 1, 0, 0.5, 7),
                    ('odd', 'all', 0.25, 0.02, None, 9), ('texts', 'all', 0.5, None, None, None), ('texts', 'ends', 0.5, None, None, None),
                    ('texts', 'known', 0.9, None, None, None)]
    assert [row['all'] for row in blocks['Abilities at the end']['rows']] == [True, False, False, True, True, False, False]
    assert [(row['source'], row['bits per byte'], row['standard error of the text']) for row in blocks['Bits per byte by source']['rows']] == [
        ('tales', 0.75, 0.01), ('notes', 1.5, None)]
    assert blocks['Samples along training']['text'] == 'progress 0.10, step 1:\nonce 1\n\nprogress 0.90, step 4:\nonce 4'
    assert facts(blocks['Energy']) == {'joules': '5.5', 'grams of CO2': 'not measured', 'train': '5.5', 'how': 'cpu: estimated\ngpu: not used'}
    assert [(row['part'], row['seconds'], row['share'], row['all']) for row in blocks['Where the time went']['rows']] == [
        ('startup', 4, 0.1, False), ('train', 30, 0.75, False), ('teacher', 6, 0.15, False), ('total', 40, 1, True)]
    assert facts(blocks['Machine, versions, data']) == {'device': 'cpu', 'ranks': '1', 'torch': '2.13.0', 'folder': 'data/tales', 'val bytes': '17,303',
                                                        'commit': 'not known', 'protocol': 'bits per byte, version 1'}


@needs_node
def test_what_an_idea_adds_to_a_result_stands_under_more(tmp_path):
    mine = dict(told_bpb=1.5, verdict='kept', load=dict(layer_1=0.25, layer_2=None), by_layer=[0.1, 0.2], ready=True, deep=dict(a=dict(b=1)), rows=[[1], [2]],
                nothing=None)
    more = facts(blocks_of(report(tmp_path / 'run', result_of(**mine)))['More'])
    assert more == {'val bpb text error': '0.0035', 'val loss': '2.5', 'embedding params': '32,896', 'told bpb': '1.5', 'verdict': 'kept',
                    'load': 'layer 1: 0.25\nlayer 2: not measured', 'by layer': '0.1, 0.2', 'ready': 'True'}


@needs_node
def test_steps_of_growing_size_bring_their_own_count_of_tokens(tmp_path):
    page = report(tmp_path / 'run', result_of(), [step_row(1, tokens=100), step_row(2, tokens=300)])
    assert [x for x, _ in blocks_of(page)['Loss over tokens']['series'][0]['points']] == [100, 300]


@needs_node
@pytest.mark.parametrize('result', [result_of(), result_of(changed={}), dict(val_bpb=math.nan), dict(val_bpb=1.5, evals=dict(a={}), flops=5e8), dict(val_bpb=2.0, flops=2.25e10)])
def test_little_is_enough_for_a_page(tmp_path, result):
    blocks = blocks_of(report(tmp_path / 'run', result, [step_row(1), dict(step=1, progress=0.5, elapsed_s=60, val_loss=2.5, val_bpb=1.5)]))
    assert 'Warnings' not in blocks and facts(blocks['Result'])['warnings'] == 'none' and len(blocks['Loss over time']['series'][0]['points']) == 1
    assert 'Bits per byte over time' not in blocks and 'Abilities' not in blocks and 'Samples along training' not in blocks
    assert facts(blocks['Result'])['bits per byte'] == ('not measured' if result['val_bpb'] != result['val_bpb'] else f'{result["val_bpb"]:.4f}')
    settings = blocks.get('Settings that differ from the defaults')
    assert (settings is None) == ('changed' not in result) and (settings is None or bool(settings['note']) != bool(settings['rows']))
    told = {5e8: '500,000,000', 2.25e10: '2.25e+10', 1.0383e17: '1.038e+17', None: None}
    assert facts(blocks['Result']).get('model FLOPs') == told[result.get('flops')]


# ---- what a browser draws

def drawn(tmp_path, *frames):
    """What a browser makes of pages, each in a frame of its width after some JavaScript ran on its document d: their HTML."""
    parts = [f'<iframe width={width} height=700 srcdoc="{html.escape(Path(page).read_text("utf-8"))}"></iframe>' for page, width, _ in frames]
    then = ','.join(f'd => {{ {code} }}' for _, _, code in frames)
    parts.append(f'<pre></pre><script>onload = () => {{ const then = [{then}]; document.querySelector("pre").textContent = JSON.stringify('
                 '[...document.querySelectorAll("iframe")].map((f, i) => { then[i](f.contentDocument); return f.contentDocument.documentElement.outerHTML; }));'
                 '}</script>')
    (tmp_path / 'frames.html').write_text('<!doctype html>' + ''.join(parts), 'utf-8')
    done = subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--dump-dom', '--window-size=1400,900',
                           f'--user-data-dir={tmp_path / "chromium"}', '--virtual-time-budget=3000', (tmp_path / 'frames.html').as_uri()],
                          capture_output=True, text=True, timeout=120)
    return [re.sub('<wbr>', '', page) for page in json.loads(html.unescape(re.search(r'<pre>(.+?)</pre>', done.stdout, re.S)[1]))]


def sound(page):
    """Drawn in full, nothing sticks out of the window, nothing comes from elsewhere."""
    wide, width = map(int, re.search(r'data-drawn="(\d+) (\d+)"', page).groups())
    return ('role="alert"' not in page and not re.search(r'(src|href)="?(https?:)?//', page) and wide == width > 350
            and page.count('class="drawing"') == page.count('class="chart"'))


@needs_chromium
def test_runs_in_a_browser(tmp_path):
    """Many sources, abilities and samples; a run of one step; each on a screen and on a phone."""
    rows = [step_row(n) for n in range(1, 700)] + [
        row for n in (200, 400, 600) for row in (dict(step=n, progress=n / 700, elapsed_s=60 * n, val_loss=2 / n, val_bpb=1 / n),
                                                 dict(step=n, progress=n / 700, elapsed_s=60 * n, evals=dict(blimp=dict(accuracy=0.5), ewok=dict(accuracy=0.4))),
                                                 dict(step=n, progress=n / 700, elapsed_s=60 * n, sample=f'{EVIL} {n}'))]
    evals = {name: dict(accuracy=0.75, error=0.01, chance=0.5, items=100, per_kind={f'a_rather_long_kind_{i}': i / 9 for i in range(9)}) for name in ('blimp', 'ewok')}
    heat = dict(kind='heat', title='Heat', x=['0.1', '0.9'], y=['q', 'k', 'v'], values=[[1, 2], [None, 3], [4, 5]])
    many = report(tmp_path / ('long' * 20), result_of(evals=evals, sample=EVIL, warnings=['w' * 300], val_bpb_per_source={f'{n}_source': n for n in range(12)},
                                                      told={f'layer {i}': i for i in range(5)}, data=dict(fingerprint='f' * 64)), rows, [heat])
    one = report(tmp_path / 'one', result_of(), [step_row(1)])
    pages = drawn(tmp_path, *[(page, width, '') for page in (many, one) for width in (1200, 390)])
    assert all(map(sound, pages)) and [page.count('class="chart"') for page in pages] == [8, 8, 4, 4]
    for page in pages[:2]:
        titles = [html.unescape(title) for title in re.findall('<h2>(.*?)</h2>', page)]
        assert titles[0] == 'Result' and titles[-1] == 'Machine, versions, data' and len(titles) == 19
        assert page.count('&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;') == 4 and '<img' not in page
        assert page.count('<tr class="all">') == 3 and page.count('a_rather_long_kind_8</td>') == 2 and '<dt>told</dt><dd>layer 0: 0\n' in page
        line = re.search(r'Loss over time.*?d="(M[^"]+)" fill="none" stroke="var\(--s0\)"', page, re.S)[1]
        assert line.count('M') == 1 and line.count('L') == 232                      # 699 steps in means of 3
        assert re.search(r'class="number bar" style="--share: 0\.75">0\.750<', page) and page.count('class="number bar"') == 3
    assert all(re.search(r'<h1>one: 1\.0728 bits per byte</h1>', page) and '<title>one: 1.0728 bits per byte</title>' in page for page in pages[2:])


@needs_chromium
def test_every_kind_of_block_in_a_browser(tmp_path):
    points = [[n, 1 / n if n != 5 else None] for n in range(1, 20)]
    kinds = [dict(kind='facts', title='F', rows=[['a', 1.5], ['<b>', None]]), dict(kind='text', title='T', text='</script><img src=x onerror=1>'),
             dict(kind='lines', title='L', x='minutes', y='loss', log_x=True, log_y=True, series=[dict(name=n, points=points) for n in 'pq']),
             dict(kind='heat', title='H', x=['0.1', '0.9'], y=['wide ' * 20, 'k', 'v'], values=[[1, 2], [None, 3], [4, 5]]),
             dict(kind='dots', title='D', x='size', y='loss', series=[dict(name='one', points=[[1, 2, 'here']], path=[[1, 2], [3, 5]], band=[[1, 1, 3], [2, None, 4], [3, 4, 6]])], path=[[1, 2], [3, 4]]),
             dict(kind='lines', title='none', series=[]), dict(kind='table', title='empty', columns=[dict(key='x' * 99)], rows=[])]
    sample.write_page(tmp_path / 'kinds.html', 'K' * 200, blocks=kinds)
    sample.write_page(tmp_path / 'wrong.html', 'wrong', blocks=[dict(kind='nonsense')])
    keys = 'const s = d.querySelector("svg[tabindex]"); for (const key of ["ArrowRight", "ArrowRight", "ArrowDown"]) s.onkeydown(new KeyboardEvent("keydown", {key}));'
    every, wrong = drawn(tmp_path, (tmp_path / 'kinds.html', 390, keys), (tmp_path / 'wrong.html', 390, ''))
    assert sound(every) and every.count('class="drawing"') == 4
    assert '&lt;/script&gt;&lt;img src=x onerror=1&gt;' in every and '<img' not in every
    assert every.count('<rect') == 6 + 60 and 'not measured' in every and re.search(r'fill="none" stroke="var\(--s0\)"', every)
    gap = re.search(r'd="(M[^"]+)" fill="none" stroke="var\(--s0\)"', every)[1]
    assert gap.count('M') == 2 and gap.count('L') == 16                              # 18 of 19 values, in two pieces
    assert re.search(r'class="tip" role="status"[^>]*>q\nminutes: 2\nloss: 0.5<', every)      # arrow keys: the second value, of the second series
    assert 'role="alert"' in wrong and 'no kind of block is called nonsense' in wrong


@needs_chromium
def test_tables_sort_and_link_in_a_browser(tmp_path):
    """By a column's button, what is missing last; at first as the block says."""
    rows = [dict(run=name, size=size, href=f'{name}/report.html' if name == 'b_1' else None) for name, size in dict(a10=7, b_1=None, a9=30, c=2.5).items()]
    columns = [dict(key='run', label='model'), dict(key='size', label='size', digits=1)]
    sample.write_page(tmp_path / 'table.html', 'T', blocks=[dict(kind='table', title='T', columns=columns, rows=rows, sort='-size')])
    click = 'const [name, size] = d.querySelectorAll("th button"); '
    first, up, down, names = drawn(tmp_path, *[(tmp_path / 'table.html', 600, click + code) for code in (
        '', 'size.click();', 'size.click(); size.click();', 'name.click();')])
    for page, order in ((first, 'a9 a10 c b_1'), (up, 'c a10 a9 b_1'), (down, 'a9 a10 c b_1'), (names, 'a9 a10 b_1 c')):
        body = page[page.index('<tbody>'):page.index('</tbody>')]
        assert [re.sub('<.*?>', '', row).split('#')[0] for row in body.replace('</td>', '#').split('</tr>')[:-1]] == order.split()
    assert 'aria-sort="ascending"' in up and 'aria-sort="descending"' in down and 'aria-sort="descending"' in first
    assert '<a href="b_1/report.html">b_1</a>' in first and first.count('<a ') == 1 + first.count('href="#b') and '>30.0<' in first and '>–<' in first

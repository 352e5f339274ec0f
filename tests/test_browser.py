"""web/model.html and web/serve.html in headless Chromium, by what a person does. Playwright, an optional companion, moves the hands."""
import base64
import dataclasses
import hashlib
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_data
import sample
from config.sample_chat import chat_ids
from conftest import start
from test_model_page import export, net, words
from test_page import CHROMIUM, needs_chromium

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed, which drives the pages: pip install playwright')
pytestmark = [needs_chromium, pytest.mark.long]
expect = playwright.expect
PROMPT = 'the dog saw'

# Texts too faint for who reads them, and what sticks out of the window
FAINT = '''() => {
  const rgba = color => { const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number); return {rgb: [r, g, b], a}; };
  const light = rgb => rgb.map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    if (!node) return [255, 255, 255];
    const {rgb, a} = rgba(getComputedStyle(node).backgroundColor), below = a < 1 ? behind(node.parentElement) : rgb;
    return rgb.map((c, i) => a * c + (1 - a) * below[i]);
  };
  const contrast = (color, node) => {
    const back = behind(node), {rgb, a} = rgba(color), [low, high] = [light(rgb.map((c, i) => a * c + (1 - a) * back[i])), light(back)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const faint = [], seen = node => node.checkVisibility() && !node.closest(':disabled, script, noscript');
  for (const node of [...document.querySelectorAll('body *')].filter(seen)) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()) || node.matches('textarea, select, input:not([type=range], [type=radio])');
    const styles = [...own ? [getComputedStyle(node)] : [], ...['::before', '::placeholder'].map(part => getComputedStyle(node, part)).filter(s => s.content !== 'none' && s.content !== 'normal')];
    for (const {color} of styles) if (contrast(color, node) < 4.5) faint.push(`${node.outerHTML.slice(0, 80)}: ${contrast(color, node).toFixed(2)}`);
  }
  return faint;
}'''
OUTSIDE = '''() => [...document.querySelectorAll('body *')].filter(node => node.checkVisibility() && !node.closest('.unseen') && node.getBoundingClientRect().right > innerWidth + 0.5)
  .map(node => node.outerHTML.slice(0, 80)).concat(document.documentElement.scrollWidth > innerWidth ? ['the page'] : [])'''


@pytest.fixture(scope='module')
def bpe():
    return prepare_data.BPETokenizer.train(['\n'.join(words(9, i) + '.' for i in range(300))], 360)


@pytest.fixture(scope='module')
def made(bpe):
    """A model that takes its time and, where the likeliest token is taken, writes pieces of words and does not end."""
    made = net(bpe, n_layer=6, n_embd=192, n_head=3, block_size=128)
    with torch.no_grad():
        made.lm_head.weight[:bpe.first_byte + 256] = 0
    return made


@pytest.fixture(scope='module')
def chromium():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """visit(url) opens a page there; that nothing of it failed, and that it asked no other place, is seen to in the end."""
    contexts, wrong, asked = [], [], []

    def opened(url, offline=False, **look):
        contexts.append(chromium.new_context(offline=offline, **dict(viewport=dict(width=900, height=900)) | look))
        page = contexts[-1].new_page()
        page.set_default_timeout(20000)
        page.on('pageerror', lambda e: wrong.append(e.message))
        page.on('console', lambda m: m.type in ('error', 'warning') and wrong.append(m.text))
        page.on('request', lambda r: r.url.startswith((url.partition('#')[0], 'data:', 'blob:')) or asked.append(r.url))
        page.goto(url)
        page.locator('main').wait_for()
        return page
    opened.wrong = wrong
    yield opened
    for context in contexts:
        context.close()
    assert not wrong and not asked


def section(page, title):
    return page.get_by_role('region', name=title)


def shade(token):
    return float(token.evaluate('node => getComputedStyle(node).getPropertyValue("--surprise")'))


def choices(place):
    """[(text, percent)] of the other tokens that are offered."""
    labels = place.locator('.choices li button').evaluate_all('all => all.map(b => [b.firstChild.data, b.querySelector("small").textContent])')
    return [(text.replace('␣', ' ').replace('↵', '\n'), percent) for text, percent in labels]


def looks(page):
    """Nothing is too faint, nothing sticks out; in both colours, on a phone too."""
    for scheme in 'light', 'dark':
        for width in 1200, 360:
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size(dict(width=width, height=740))
            assert page.evaluate(FAINT) == [] and page.evaluate(OUTSIDE) == [], (scheme, width)
    assert page.evaluate('getComputedStyle(document.documentElement).backgroundColor') == 'rgb(20, 23, 27)'     # it was dark


# ---- the model in one file, from the disk, offline

@pytest.fixture
def file(tmp_path, made, bpe, visit):
    return visit(export(tmp_path / 'run', made, bpe).as_uri(), offline=True)


def complete(page, prompt=PROMPT, tokens=40, heat=0):
    page.get_by_role('slider', name='Tokens').fill(str(tokens))
    page.get_by_role('slider', name='Temperature').fill(str(heat))
    page.get_by_label('A text to go on with').fill(prompt)
    page.get_by_role('button', name='Continue').click()


def through(page):
    expect(page.get_by_role('button', name='Stop')).to_be_disabled(timeout=20000)


def test_a_file_completes(file, made, bpe):
    place = section(file, 'Complete')
    complete(file)
    through(file)
    assert place.locator('.text').inner_text() == bpe.decode(greedy(made, [bpe.bos, *bpe.encode(PROMPT)])[1:])
    assert re.fullmatch(r'40 tokens, the first after \d\.\d\d s, [1-9]\d* tokens/s\. ', place.locator('.said').text_content())
    tokens = place.locator('.token')
    assert tokens.first.get_attribute('class') == 'token' and 'made' in tokens.last.get_attribute('class')
    shades = [shade(tokens.nth(i)) for i in range(tokens.count())]
    assert 0 <= min(shades) < 0.3 and max(shades) <= 1 and len({*shades}) > 10


def test_a_file_stops(file):
    place = section(file, 'Complete')
    complete(file, tokens=1000)
    place.locator('.token.made').nth(3).wait_for()
    file.get_by_role('button', name='Stop').click()
    expect(place.locator('.said')).to_contain_text('Stopped.')
    through(file)
    count = place.locator('.token').count()
    file.wait_for_timeout(300)
    assert 4 < count == place.locator('.token').count() < 900


def test_a_file_says_what_else_was_likely_and_goes_on_from_it(file):
    place = section(file, 'Complete')
    complete(file)
    through(file)
    tokens = place.locator('.token')
    before, at = tokens.all_inner_texts(), 12
    tokens.nth(at).hover()
    assert re.fullmatch(r'\d+\.\d bits', tokens.nth(at).get_attribute('title'))
    tokens.nth(at).click()
    offered = choices(place)
    assert len(offered) == 5 and offered[0][0] == before[at] and before[at] not in [text for text, _ in offered[1:]]
    file.keyboard.press('Escape')
    assert not place.locator('.choices').is_visible()
    tokens.nth(at - 1).focus()
    for key in 'ArrowRight', 'Enter', 'Tab', 'Enter':                # the same by the keyboard, and the second of the five
        file.keyboard.press(key)
    through(file)
    assert place.locator('.text').text_content().startswith(''.join(before[:at]) + offered[1][0])
    assert 'made' not in tokens.nth(at).get_attribute('class') and tokens.count() > at + 20


def bits_in(made, bpe, text):
    return sample.document_nats(made, [(0, np.array([bpe.bos, *bpe.encode(text)]))])[0] / math.log(2)


def test_a_file_scores_and_compares(file, made, bpe):
    place, text = section(file, 'Score a text'), words(40, 3) + '. é'
    place.get_by_label('A text, read as one document').fill(text)
    place.get_by_role('button', name='Score').click()
    bits, size = bits_in(made, bpe, text), len(text.encode())
    expect(place.locator('.said')).to_contain_text(f'{bits / size:.3f} bits per byte: {bits:.1f} bits over {size} bytes')
    assert place.locator('.text').inner_text() == text

    place, pair = section(file, 'Which one does it prefer?'), [words(6, 1), words(6, 2)]
    place.get_by_text('A pair of your own').click()
    place.get_by_label('One sentence').fill(pair[0])
    place.get_by_label('The other').fill(pair[1])
    place.get_by_role('button', name='Compare').click()
    both = [bits_in(made, bpe, sentence) for sentence in pair]
    expect(place.locator('.said')).to_have_text(f'It prefers “{pair[both[1] < both[0]]}”.')
    assert place.locator('.pair small').all_inner_texts() == [f'{bits:.1f} bits' for bits in both]

    place.get_by_role('button', name='Next pair').click()            # the game
    place.locator('.pair button').first.click()
    expect(place.locator('.said')).to_contain_text('Of 1 so far the model got')


def test_a_file_can_be_read_by_everyone(file):
    complete(file, prompt='a' * 300 + '\n\n' + PROMPT, heat=1.5)
    through(file)
    section(file, 'Score a text').get_by_label('A text').fill('kite\n' + 'é' * 200)
    section(file, 'Score a text').get_by_role('button', name='Score').click()
    section(file, 'Complete').locator('.token').nth(5).click()
    file.locator('.pair button').first.click()
    file.get_by_role('button', name='Next pair').wait_for()
    looks(file)


# ---- what sample.py --serve sends

def run_of(folder, made, tokenizer):
    """A run's folder of a model."""
    folder.mkdir()
    (folder / tokenizer.filename).write_bytes(tokenizer.blob)
    torch.save(dict(version=3, tokenizer=hashlib.sha256(tokenizer.blob).hexdigest(), ideas=[], settings={}, data='', fingerprint='',
                    config=dataclasses.asdict(made.config), model=made.state_dict()), folder / 'ckpt.pt')
    return folder


def serve(folder, *args):
    """(process, url) of a server; url with its token, where it has one."""
    process = start('sample.py', *args, '--port=0', cwd=folder)
    return process, next(re.search(r'http://\S+', line)[0] for line in process.stdout if 'http://' in line)


@pytest.fixture(scope='module')
def red_and_blue(made, bpe):
    """Two models, of two vocabularies."""
    blue = net(bpe, seed=5)
    return dict(red=made, blue=blue)


@pytest.fixture(scope='module')
def server(tmp_path_factory, red_and_blue, bpe):
    folder = tmp_path_factory.mktemp('runs')
    for name, one in red_and_blue.items():
        run_of(folder / name, one, bpe)
    process, url = serve(folder, '--serve', 'red', 'blue')
    yield process, url
    process.kill()


@pytest.fixture
def site(server, visit):
    return visit(server[1])


def ask(page, prompt=PROMPT, tokens=40, heat=0):
    page.get_by_role('slider', name='Temperature').fill(str(heat))
    page.get_by_role('slider', name='Tokens').fill(str(tokens))
    page.locator('#prompt').fill(prompt)
    page.get_by_role('button', name=re.compile('Continue|Send')).click()


def panes(page, title='Complete'):
    return section(page, title).locator('.pane')


def alone(page):
    page.get_by_label('Beside it').select_option('none')


def greedy(one, ids, tokens=40):
    """ids, BOS first, and what follows."""
    return ids + [new.item() for new in one.generate(torch.tensor([ids]), tokens, temperature=0)]


def test_a_server_has_two_models_complete_side_by_side(site, red_and_blue, bpe):
    ask(site)
    through(site)
    assert panes(site).count() == 2 and site.title() == 'red and blue' and 'They do not chat' in site.locator('#about').inner_text()
    tops = []
    for pane, (name, one) in zip(panes(site).all(), red_and_blue.items()):
        assert pane.get_by_role('heading').inner_text() == name
        assert pane.locator('.text').inner_text() == bpe.decode(greedy(one, [bpe.bos, *bpe.encode(PROMPT)])[1:])
        assert re.fullmatch(r'40 tokens, the first after \d+\.\d\d s, [1-9][\d,]* tokens/s, seed \d+\.', pane.locator('.said').inner_text())
        assert 'made' not in pane.locator('.token').first.get_attribute('class')
        shades = [shade(token) for token in pane.locator('.token.made').all()]
        assert max(shades) <= 1 and len({*shades}) > 10
        heard = pane.locator('[aria-live=polite]').text_content()
        assert heard and pane.locator('.text').text_content().endswith(heard)
        tops.append(pane.bounding_box()['y'])
    assert tops[0] == tops[1]
    facts = site.locator('#facts > div').first
    assert facts.get_by_role('term').all_inner_texts()[:2] == ['Parameters', 'Trained for']
    assert f'{sum(w.numel() for w in red_and_blue["red"].parameters()):,}' in facts.inner_text()
    assert re.search(r'Speed now\n[1-9][\d,]* tokens/s', facts.inner_text())       # since it wrote


def test_the_same_seed_makes_the_same_text(site):
    alone(site)
    site.get_by_text('More settings').click()
    site.get_by_label('Seed').fill('3')
    texts = []
    for seed in '3', '3', '4':
        site.get_by_label('Seed').fill(seed)
        ask(site, heat=1)
        through(site)
        texts.append(panes(site).locator('.text').inner_text())
    assert texts[0] == texts[1] != texts[2]


def cpu_seconds(process):
    fields = Path(f'/proc/{process.pid}/stat').read_text().rsplit(')', 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def test_stop_stops_the_server(server, site):
    ask(site, tokens=1000)
    for pane in panes(site).all():
        pane.locator('.token.made').nth(3).wait_for()
    site.get_by_role('button', name='Stop').click()
    through(site)
    for pane in panes(site).all():
        expect(pane.locator('.said')).to_contain_text('Stopped.')
        assert pane.locator('.token').count() < 900
    time.sleep(0.3)
    before = cpu_seconds(server[0])
    time.sleep(1)
    assert cpu_seconds(server[0]) - before < 0.2


def test_pointing_shows_what_else_was_likely_and_choosing_goes_on_from_it(site, red_and_blue, bpe):
    alone(site)
    ask(site)
    through(site)
    pane, tokens, at = panes(site), panes(site).locator('.token'), 12
    before = tokens.all_inner_texts()
    tokens.nth(at).hover()
    first = choices(pane)
    assert len(first) == 5 and first[0][0] == before[at] and first[0][1] in pane.locator('.choices p').inner_text()
    tokens.nth(at + 3).hover()
    assert choices(pane)[0][0] == before[at + 3]
    tokens.nth(at).click()                       # held
    tokens.nth(at + 3).hover()
    assert choices(pane) == first
    site.keyboard.press('Escape')
    assert not pane.locator('.choices').is_visible()
    tokens.nth(at - 1).focus()
    assert choices(pane)[0][0] == before[at - 1]
    for key in 'ArrowRight', 'Enter', 'Tab', 'Enter':
        site.keyboard.press(key)
    through(site)
    red = red_and_blue['red']
    kept = greedy(red, [bpe.bos, *bpe.encode(PROMPT)])[:at + 1]
    with torch.no_grad():
        second = red.logits(red.trunk(torch.tensor([kept])))[0, -1].topk(2).indices[1].item()
    assert pane.locator('.text').inner_text() == bpe.decode(greedy(red, [*kept, second])[1:])
    assert 'chosen' in tokens.nth(at).get_attribute('class')


def test_a_server_scores_and_compares(site, red_and_blue, bpe):
    place, text = section(site, 'Score a text'), words(40, 3) + '. é'
    place.get_by_label('A text, read as one document').fill(text)
    place.get_by_role('button', name='Score').click()
    for pane, one in zip(place.locator('.pane').all(), red_and_blue.values()):
        bits, size = bits_in(one, bpe, text), len(text.encode())
        expect(pane.locator('.said')).to_contain_text(f'{bits / size:.3f} bits per byte: {bits:.1f} bits over {size} bytes')
        assert pane.locator('.text').inner_text() == text
    place.locator('.token').nth(3).click()                           # goes on from there, above
    other, _ = choices(place.locator('.pane').first)[2]
    place.locator('.choices button').nth(2).click()
    through(site)
    assert panes(site).count() == 1 and panes(site).locator('.text').inner_text().startswith(
        ''.join(place.locator('.pane').first.locator('.token').all_inner_texts()[:3]) + other)

    place, pair = section(site, 'Which one does it prefer?'), [words(6, 1), words(6, 2)]
    place.get_by_text('A pair of your own').click()
    place.get_by_label('One sentence').fill(pair[0])
    place.get_by_label('The other').fill(pair[1])
    place.get_by_role('button', name='Compare').click()
    both = {name: [bits_in(one, bpe, sentence) for sentence in pair] for name, one in red_and_blue.items()}
    expect(place.locator('.said')).to_have_text(' '.join(f'{name} prefers “{pair[b < a]}”.' for name, (a, b) in both.items()))
    assert place.locator('.pair small').all_inner_texts() == [f'{name}: {bits[i]:.1f} bits' for i in (0, 1) for name, bits in both.items()]
    place.get_by_role('button', name='Next pair').click()
    place.locator('.pair button').first.click()
    expect(place.locator('.said')).to_contain_text('Of 1 so far red got')


def test_a_server_can_be_read_by_everyone(site):
    ask(site, prompt='a' * 200 + '\n\n' + PROMPT, heat=1.5)
    through(site)
    section(site, 'Score a text').get_by_label('A text').fill('kite\n' + 'é' * 200)
    section(site, 'Score a text').get_by_role('button', name='Score').click()
    section(site, 'Score a text').locator('.token').nth(400).wait_for()              # of both models
    panes(site).first.locator('.token').nth(5).click()
    site.locator('.pair button').first.click()
    site.get_by_role('button', name='Next pair').wait_for()
    site.get_by_text('More settings').click()
    looks(site)


def test_what_the_server_declines_is_said_in_a_sentence(site, visit):
    alone(site)
    site.locator('#prompt').fill('a ' * 40000)
    site.get_by_role('button', name='Continue').click()
    said = panes(site).locator('.said.error')
    expect(said).to_have_text('a request may have 65536 bytes at most')
    site.locator('#prompt').fill('')
    site.route('**/api/generate', lambda route: route.abort())                       # as if it had ended
    site.get_by_role('button', name='Continue').click()
    expect(said).to_have_text('The server does not answer: is it still running?')
    through(site)
    assert len(visit.wrong) == 2                 # Chromium logs both
    visit.wrong.clear()


def test_a_token_is_asked_for_and_stands_in_no_address(tmp_path, bpe, visit):
    run_of(tmp_path / 'red', net(bpe), bpe)
    process, url = serve(tmp_path, '--serve', 'red', '--token=open-sesame')
    try:
        page = visit(url)                        # as the server prints it
        assert page.url == url.partition('#')[0] and page.title() == 'red' and not page.get_by_label('Beside it').is_visible()
        bare = page.context.new_page()
        bare.on('console', lambda m: m.type == 'error' and visit.wrong.append(m.text))
        bare.goto(page.url)
        for token, said in ((None, 'This server asks for a token.'), ('sesame', 'That is not its token.'), ('open-sesame', None)):
            if token:
                bare.get_by_label('The token').fill(token)
                bare.get_by_role('button', name='Open').click()
            expect(bare.locator('#state')).to_have_text(said) if said else bare.locator('main').wait_for()
        ask(bare)
        expect(panes(bare).locator('.said')).to_contain_text('the first after')
        assert bare.url == page.url and bare.evaluate('localStorage.length + sessionStorage.length + document.cookie.length') == 0
        assert len(visit.wrong) == 2 and all('401' in text for text in visit.wrong)
        visit.wrong.clear()
    finally:
        process.kill()


def test_the_page_says_which_passages_stood_before_a_prompt(tmp_path, bpe, visit):
    run_of(tmp_path / 'red', net(bpe, block_size=128), bpe)
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / '<i>zoe.txt').write_text('A kite.')
    process, url = serve(tmp_path, '--serve', 'red', '--retrieve', 'notes')
    try:
        page = visit(url)
        ask(page, 'the kite', tokens=20)
        through(page)
        given = panes(page).locator('details')
        assert given.locator('summary').inner_text() == 'A passage was put before the prompt' and not given.locator('p').is_visible()
        given.locator('summary').click()
        assert given.locator('p').inner_text() == '<i>zoe.txt, passage 1: A kite.' and page.locator('i').count() == 0
        panes(page).locator('.token').last.click()                   # what goes on from another token has it too
        page.locator('.choices li button').nth(1).click()
        through(page)
        assert given.is_visible()
        page.locator('form summary').first.click()
        field = page.get_by_label('Passages before it')
        assert field.input_value() == '3' == field.get_attribute('max')
        field.fill('0')
        ask(page, 'the kite', tokens=20)
        through(page)
        assert not given.is_visible()
        looks(page)
    finally:
        process.kill()


def test_what_a_model_writes_is_text(tmp_path, visit):
    """Its name too, and what else it might have written."""
    evil, name = [b'<img src=x onerror=alert(1)>', b'<b>bold</b>'], '<i>red'
    pieces = [bytes([i]) for i in range(256)] + evil
    pieces += [f'({i})'.encode() for i in range(50256 - len(pieces))]
    tokenizer = prepare_data.GPT2Tokenizer(b''.join(b'%s %d\n' % (base64.b64encode(p), i) for i, p in enumerate(pieces)))
    writes = net(tokenizer, n_layer=1, n_embd=8, n_head=1)
    with torch.no_grad():                        # one of the two is always the likeliest by far
        writes.lm_head.weight[256] *= 50
        writes.lm_head.weight[257] = -writes.lm_head.weight[256]
    run_of(tmp_path / name, writes, tokenizer)
    process, url = serve(tmp_path, '--serve', name)
    try:
        page = visit(url)
        ask(page, prompt=evil[0].decode())
        through(page)
        text = panes(page).locator('.text').text_content()
        assert text.startswith(evil[0].decode()) and len(text) > 300 and set(re.findall('<.*?>', text)) <= {'<img src=x onerror=alert(1)>', '<b>', '</b>'}
        panes(page).locator('.token').last.click()
        assert choices(panes(page))[0][0] in [piece.decode() for piece in evil] and page.title() == name == page.get_by_role('heading', level=1).inner_text()
        assert page.locator('img, b, i').count() == 0
    finally:
        process.kill()


@pytest.mark.skipif(not hasattr(prepare_data.Tokenizer, 'with_roles'), reason='no vocabulary has roles here')
def test_a_model_that_was_taught_to_chat_chats(tmp_path, bpe, visit):
    tokenizer = bpe.with_roles(['user', 'assistant'])
    taught = net(tokenizer)
    with torch.no_grad():
        taught.lm_head.weight[[*range(bpe.first_byte + 256), *tokenizer.roles.values()]] = 0
    run_of(tmp_path / 'taught', taught, tokenizer)
    run_of(tmp_path / 'plain', net(bpe), bpe)
    process, url = serve(tmp_path, '--serve', 'taught', 'plain')
    try:
        page = visit(url)
        assert 'taught was taught to chat too; to plain a question is one more line' in page.locator('#about').inner_text()
        page.get_by_role('radio', name='Chat').check()
        page.get_by_role('slider', name='Tokens').fill('20')
        page.get_by_role('slider', name='Temperature').fill('0')
        messages, answers = [], page.locator('#written .text')
        for turn, question in enumerate(('the dog?', 'a kite?')):
            messages.append(dict(role='user', content=question))
            page.locator('#prompt').fill(question)
            page.keyboard.press('Enter')
            ids = chat_ids(tokenizer, messages)
            want = tokenizer.decode(greedy(taught, ids, 20)[len(ids):])
            expect(answers.nth(turn)).to_have_text(want, use_inner_text=True)
            through(page)
            messages.append(dict(role='assistant', content=want))
        assert page.locator('.pane').count() == 1 and page.locator('.asked').all_inner_texts() == ['the dog?', 'a kite?']
        answers.first.locator('.token').nth(4).click()               # another first answer: the chat goes on from there
        page.locator('.choices li button').nth(1).click()
        expect(page.locator('.asked')).to_have_count(1)
        through(page)
        before = tokenizer.decode([*greedy(taught, chat_ids(tokenizer, messages[:1]), 4)[-4:]])
        assert answers.inner_text().startswith(before) and answers.inner_text() != messages[1]['content']
        page.get_by_role('button', name='New chat').click()
        assert answers.count() == 0
        page.get_by_role('radio', name='Complete').check()
        assert page.get_by_role('button', name='Continue').is_visible()
    finally:
        process.kill()

"""web/model.html: the model in a page computes what model.py does. Node runs the page's own script."""
import base64
import dataclasses
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model
import prepare_data
import sample
from config import export_html
from conftest import ROOT, script
from prepare_data import UserError

NODE = shutil.which('node') or shutil.which('nodejs')
needs_node = pytest.mark.skipif(not NODE, reason="node is not installed, which runs the page's JavaScript without a browser")
BYTES = prepare_data.ByteTokenizer()
EVIL = '<!-- </script><script>alert(1)'
ODD = ['', ' ', '  a  b ', '\n', '\n\n\nx\n', '\ta\t', '\r\n', '\0', '\x07\x1b[0m\x7f\x85', 'kite', ' the kite by the barn.\n', '<s>', '<|endoftext|>',
       '<0x0A>', '\u2581', 'a\u2581\u2581 \u2581b', '\ue009x\ue00a', '\ufeff', '\ufeffa\ufeff', '\uffff', '\U0010ffff', 'e\u0301e',
       '🙂👨\u200d👩\u200d👧',
       '한국어 日本語 עברית', "it's 1234  don't\u00a0\u3000 \u2028", 'aaaaaaaaaaaaaaaaaaaaaaaaaaa', '   ', 'x   ', EVIL, '\u0130\u017f\u212a']


def words(n, seed=0):
    dice, known = random.Random(seed), 'the a dog kite house tree saw ran took lost found red barn and then é'.split()
    return ' '.join(dice.choices(known, k=n))


@pytest.fixture(scope='module')
def bpe():
    return prepare_data.BPETokenizer.train(['\n'.join(words(9, i) + '.' for i in range(300)), '*MOT:\tno.\n*CHI:\tyes?\n' * 50], 400)


@pytest.fixture(scope='module')
def gpt2():
    """GPT-2's kind of tokenizer, with merges of its own."""
    pieces = [bytes([i]) for i in range(256)]
    for joined in ('th', 'he', ' t', ' th', 'the', ' the', 'ki', 'te', 'kite', ' kite', '  ', '    ', '\n\n', 'é', '日', 'aa', 'aaaa', '12', "'t", 're'):
        pieces.append(joined.encode())
    pieces += [f'<{i}>'.encode() for i in range(50256 - len(pieces))]
    return prepare_data.GPT2Tokenizer(b''.join(b'%s %d\n' % (base64.b64encode(p), i) for i, p in enumerate(pieces)))


def net(tokenizer=BYTES, seed=0, ideas=None, **options):
    """A small model in which every weight counts."""
    torch.manual_seed(seed)
    shape = dict(n_layer=2, n_head=2, n_embd=32, block_size=32) | options
    made = model.configured(ideas or prepare_data.Ideas([], [], strict=False))(vocab_size=tokenizer.vocab_size, bos=tokenizer.bos, **shape)
    net = made.GPT(made).eval()
    with torch.no_grad():
        for name, w in net.named_parameters():
            w.normal_(std=1.0 if w.dim() == 1 else 1.5 * w.shape[1] ** -0.5)
    return net


def export(folder, net, tokenizer=BYTES, ideas=None):
    """The page of a model; the model takes over the weights that are in it."""
    folder.mkdir(exist_ok=True)
    ideas = ideas or prepare_data.Ideas([], [], strict=False)
    export_html.write(SimpleNamespace(folder=folder, model=net, tokenizer=tokenizer, ideas=ideas))
    with torch.no_grad():
        for w in {*net.parameters()}:
            if w.dim() == 2:
                q, scale = export_html.quantised(w)
                w.copy_(q * scale[:, None])
    return folder / 'model.html'


def inside(page, kind, name):
    return re.search(rf'<script{kind} id="{name}">(.*?)</script>', page.read_text('utf-8'), re.S)[1]


def js(page, expression, d=None):
    """What an expression over a page's own tokenizer, its model, the same as `plain` without WebAssembly, and d is worth."""
    code = inside(page, '', 'engine') + f'''
        const {{data, weights, d}} = JSON.parse(require("fs").readFileSync(0, "utf-8"));
        const tokenizer = new Tokenizer(data.tokenizer), model = new Model(data, weights), plain = new Model(data, weights, false);
        process.stdout.write(JSON.stringify({expression}));'''
    given = dict(data=json.loads(inside(page, ' type="application/json"', 'data')), weights=inside(page, ' type="text/plain"', 'weights'), d=d)
    done = subprocess.run([NODE, '-e', code], input=json.dumps(given).encode(), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


# ---- tokenizers

@needs_node
@pytest.mark.parametrize('kind', ['bpe', 'bytes', 'gpt2', 'rare'])
def test_the_page_has_the_same_tokenizer(request, tmp_path, kind):
    if kind == 'rare':                           # no piece for a newline, a tab
        tokenizer = prepare_data.BPETokenizer.train([words(4000)], 300)
    else:
        tokenizer = BYTES if kind == 'bytes' else request.getfixturevalue(kind)
    dice = random.Random(1)
    alphabet = [*'abcdehikt  \n\t\r é日🙂\u0301\u2581\ue009\ue00a\ufeff\0', ' the', ' kite', '.\n*CHI:\t']
    ranges = [(0, 128), (0, 0x300), (0x2500, 0x2600), (0xE000, 0xE010), (0x1F300, 0x1F700), (0x3000, 0xD800), (0xE000, 0x110000)]
    texts = ODD + [''.join(dice.choices(alphabet, k=dice.randrange(60))) for _ in range(400)] + [words(3000)]
    assigned = re.compile(r'[^\W]|[\x00-\u02ff]')                    # newer characters may be letters to one of the two alone
    texts += [''.join(c for c in (chr(dice.randrange(*dice.choice(ranges))) for _ in range(30)) if kind != 'gpt2' or assigned.match(c))
              for _ in range(400)]
    page = export(tmp_path, net(tokenizer, n_layer=1, n_embd=2, head_dim=2, n_head=1), tokenizer)
    ours = [tokenizer.encode(text) for text in texts]
    assert js(page, 'd.map(text => tokenizer.encode(text))', texts) == ours
    assert js(page, 'd.map(ids => tokenizer.decode(ids))', ours) == texts
    shuffled = [dice.choices(range(min(tokenizer.vocab_size, 600)), k=40) for _ in range(300)]     # parts of characters
    assert js(page, 'd.map(ids => tokenizer.decode(ids))', shuffled) == [tokenizer.decode(ids) for ids in shuffled]


@needs_node
def test_half_a_character_is_none(tmp_path):
    page = export(tmp_path, net())
    assert js(page, 'tokenizer.encode("a\\ud83d")') == [*'a\ufffd'.encode()]


# ---- arithmetic

OPTIONS = [dict(), dict(tie_embeddings=True, token_shift=False), dict(qk_norm=False), dict(mlp='swiglu'), dict(doc_mask=False),
           dict(n_head=4, n_kv_head=2, head_dim=10, rotary_dim=6, mlp_hidden=48), dict(n_embd=30, head_dim=6, rotary_dim=2, mlp='swiglu', mlp_hidden=20),
           dict(n_head=4, n_kv_head=1, n_embd=64, rotary_dim=8, tie_embeddings=True, rope_base=500.0, qk_norm=False, token_shift=False),
           dict(n_layer=1, block_size=300, n_embd=16)]
EACH = '''[plain, model].map(model => d.map(ids => {
    model.reset();
    const out = [];
    for (let i = 0; i < ids.length; i += 4) {
        const part = ids.slice(i, i + 4);
        model.forward(part);
        out.push(...model.logits(model.x, part.length));
    }
    return out;
}))'''


def logits_of(net, ids):
    with torch.no_grad():
        return net.logits(net.trunk(torch.tensor([ids])))[0].numpy()


@needs_node
@pytest.mark.parametrize('options', OPTIONS, ids=lambda o: ' '.join(f'{k}={v}' for k, v in o.items()) or 'baseline')
def test_logits_are_those_of_the_model(tmp_path, options):
    made = net(**options)
    page, dice, size = export(tmp_path, made), random.Random(2), made.config.block_size
    rows = [[256, *dice.choices(range(256), k=size - 1)], [256] + 2 * [*dice.choices(range(256), k=6), 256], [7, 256, 256, 9, 1], [5]]
    for way in js(page, EACH, rows):
        for ids, got in zip(rows, way, strict=True):
            want = logits_of(made, ids)
            assert want.std() > 0.3 and np.abs(np.reshape(got, want.shape) - want).max() < 1e-3
    assert js(page, '[!!model.simd, !!plain.simd]') == [True, False]


@needs_node
@pytest.mark.parametrize('options', [dict(block_size=24), dict(block_size=33, mlp='swiglu', n_kv_head=1), dict(block_size=1),
                                     dict(block_size=16, token_shift=False, doc_mask=False, tie_embeddings=True)])
def test_greedy_text_is_that_of_the_model_past_its_window(tmp_path, options):
    made = net(seed=3, **options)
    prompt = [256, *'Mia lost the red kite by the barn.'.encode()]
    with torch.no_grad():
        made.lm_head.weight[256] = 0             # it goes on for all of the 200 tokens
    rows = [prompt, prompt[:5]]
    answers = js(export(tmp_path, made), 'd.map(ids => [...model.complete(ids, 200, {temperature: 0})].filter(e => e))', rows)
    for ids, events in zip(rows, answers, strict=True):
        want = [new.item() for new in made.generate(torch.tensor([ids]), 200, temperature=0)]
        assert [e['id'] for e in events if e.get('made')] == want and (len({*want}) > 4 or made.config.block_size == 1)
        seen = ids[-made.config.block_size:][1:]
        assert [e['id'] for e in events if not e.get('made')] == seen


@needs_node
def test_a_document_ends(tmp_path):
    made = net()
    with torch.no_grad():
        made.lm_head.weight[256] *= 3
    page, want = export(tmp_path, made), [new.item() for new in made.generate(torch.tensor([[256, 1]]), 200, temperature=0)]
    got = js(page, '[...model.complete([256, 1], 200, {temperature: 0})].filter(e => e?.made).map(e => e.id)')
    assert got == want[:want.index(256) + 1] and 1 < len(got) < 200


@needs_node
def test_scores_are_those_of_bits_per_byte(tmp_path, bpe):
    made = net(bpe, block_size=16)
    page, text = export(tmp_path, made, bpe), words(60, 5) + ' 🙂\n日本'
    ids = [bpe.bos, *bpe.encode(text)]
    events = js(page, '[...model.score([tokenizer.bos, ...tokenizer.encode(d)])].filter(e => e)', text)
    assert [e['id'] for e in events] == ids[1:]
    assert math.isclose(sum(e['nats'] for e in events), sample.document_nats(made, [(0, np.array(ids))])[0], rel_tol=1e-5)
    first = logits_of(made, ids[:1])[0]
    probs = np.exp(first - first.max()) / np.exp(first - first.max()).sum()
    best = np.argsort(-first)[:5]
    assert [i for i, _ in events[0]['top']] == best.tolist() and np.allclose([p for _, p in events[0]['top']], probs[best], rtol=1e-4)
    assert math.isclose(events[0]['nats'], -math.log(probs[ids[1]]), rel_tol=1e-4)


@needs_node
def test_draws_are_as_likely_as_sample_token_makes_them(tmp_path):
    page, z = export(tmp_path, net()), [2.0, 0.5, 1.5, -1.0, 1.0]
    drawn = js(page, '''d.ways.map(way => Array.from({length: 1000}, (_, i) => draw(d.z, {...way, random: () => (i + 0.5) / 1000})))''',
               dict(z=z, ways=[dict(temperature=0.7), dict(temperature=1, top_k=2), dict(temperature=1, top_p=0.6), dict(temperature=0)]))
    torch.manual_seed(0)
    for ids, way in zip(drawn, [(0.7, 0, 1.0), (1, 2, 1.0), (1, 0, 0.6), (0, 0, 1.0)]):
        theirs = model.sample_token(torch.tensor([z]).expand(20000, -1), *way)
        share = np.bincount(theirs, minlength=5) / 20000
        assert np.allclose(np.bincount(ids, minlength=5) / 1000, share, atol=0.015)


def test_int8_is_symmetric_with_a_scale_a_row():
    w = torch.tensor([[1.0, -127.0, 63.4], [0.0, 0.0, 0.0], [0.5, 0.25, -0.125]])
    q, scale = export_html.quantised(w)
    assert q.dtype == torch.int8 and q[0].tolist() == [1, -127, 63] and q[1].tolist() == [0, 0, 0] and q[2, 0] == 127
    assert ((q * scale[:, None] - w).abs() <= scale[:, None] * 0.5001).all()


# ---- the file

def test_all_text_stays_text_and_the_scripts_are_allowed_by_their_hashes(tmp_path, bpe):
    folder = tmp_path / EVIL.replace('/', '')                        # a folder's name is the page's
    page = export(folder, net(bpe), bpe)
    text, template = page.read_text('utf-8'), (ROOT / 'web' / 'model.html').read_text('utf-8')
    assert all(text.count(tag) == template.count(tag) for tag in ('</script', '<script', '<!--', '<style')) and 'alert(1)' in text
    assert json.loads(inside(page, ' type="application/json"', 'data'))['name'] == folder.name
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text, re.S)[1]
    assert "default-src 'none'" in policy and 'unsafe-inline' not in policy and 'HASHES' not in text
    inline = [*re.findall(r'<script id="\w+">(.*?)</script>', text, re.S), *re.findall(r'<style>(.*?)</style>', text, re.S)]
    assert len(inline) == 3
    for part in inline:
        assert policy.count(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'") == 2
    assert not re.search(r'https?://|innerHTML|insertAdjacentHTML|document\.write|\bstyle="|\bon\w+="', text)
    assert [*folder.iterdir()] == [page]


def test_both_pages_play_the_same_pairs():
    served, alone = ((ROOT / 'web' / name).read_text('utf-8') for name in ('serve.html', 'model.html'))
    game = re.compile(r"const PAIRS = \[\n(?:  \['.+', '.+'\],\n){16}\];")
    assert game.search(served)[0] == game.search(alone)[0]


def test_as_a_user(tmp_path):
    made, folder = net(), tmp_path / 'run'
    folder.mkdir()
    (folder / BYTES.filename).write_bytes(BYTES.blob)
    state = dict(version=3, tokenizer=hashlib.sha256(BYTES.blob).hexdigest(), ideas=[], settings={}, data='', fingerprint='',
                 config=dataclasses.asdict(made.config), model=made.state_dict())
    torch.save(state, folder / 'ckpt.pt')
    code, out, err = script('sample.py', folder, '--export', 'html', cwd=tmp_path)
    assert code == 0 and not err and out.startswith(f'{folder}/model.html: ') and out.count('\n') == 1
    first = (folder / 'model.html').read_bytes()
    assert first == export(tmp_path / 'run', made).read_bytes()                      # the same model makes the same file
    for wrong, why in ((['--export', 'onnx'], "--export is 'onnx', it must be one of gguf, hf, html"), (['--export=html', '--eval=all'], 'leave the other')):
        with pytest.raises(UserError, match=why):
            sample.main([str(folder), *wrong])
    state['model']['blocks.1.mix'][0] = math.nan
    torch.save(state, folder / 'ckpt.pt')
    with pytest.raises(FloatingPointError, match='blocks.1.mix is not finite'):
        sample.main([str(folder), '--export', 'html', '--device=cpu'])
    assert (folder / 'model.html').read_bytes() == first


# ---- what is not the baseline

def idea(folder, text):
    path = folder / 'mine.py'
    path.write_text(text, encoding='utf-8')
    return prepare_data.Ideas([str(path)], [], strict=False)


CAP = '''"""A soft cap."""
import model
cap: float = 2.0


class GPT(model.GPT):
    {page}

    def logits(self, x):
        return self.config.cap * (super().logits(x) / self.config.cap).tanh()
'''
PAGE = """page = '''
        Model.prototype.logits = (logits => function (...given) {
            const z = logits.apply(this, given), {cap} = this.config;
            z.forEach((v, i) => { z[i] = cap * Math.tanh(v / cap); });
            return z;
        })(Model.prototype.logits);'''"""


def test_ideas_that_change_the_net_are_refused_by_name(tmp_path):
    for seam in 'GPT', 'Block', 'Attention', 'MLP':
        ideas = idea(tmp_path, f'import model\n\n\nclass {seam}(model.{seam}):\n    pass\n')
        with pytest.raises(UserError, match=rf'mine\.py changes the net, and its {seam} does not say') as e:
            export(tmp_path / 'run', net(ideas=ideas), ideas=ideas)
        assert '\n' not in str(e.value) and [*(tmp_path / 'run').iterdir()] == []
    ideas = prepare_data.Ideas([str(ROOT / 'config' / f'{name}.py') for name in ('ema', 'attention_gate')], [], strict=False)
    with pytest.raises(UserError, match='config/attention_gate.py changes'):
        export_html.arithmetic_of(ideas)
    training = prepare_data.Ideas([str(ROOT / 'config' / f'{name}.py') for name in ('ema', 'normuon', 'babylm', 'even_mix')], [], strict=False)
    assert export_html.arithmetic_of(training) == ''


@needs_node
def test_an_idea_may_say_how_a_page_computes_it(tmp_path):
    ideas = idea(tmp_path, CAP.format(page=PAGE))
    made = net(ideas=ideas)
    page, ids = export(tmp_path / 'run', made, ideas=ideas), [256, 1, 2, 3, 4]
    want = logits_of(made, ids)
    assert 1 < np.abs(want).max() < 2 and np.abs(np.reshape(js(page, EACH, [ids])[1][0], want.shape) - want).max() < 1e-3
    with pytest.raises(UserError, match='GPT does not say'):
        export_html.arithmetic_of(idea(tmp_path, CAP.format(page='')))


PAGES = dict(loss_kernels={}, z_loss={}, softcap=dict(logit_softcap=2.0), window=dict(window=5), dropout={}, stochastic_depth={}, multi_token={},
             climb_objective={}, distillation={}, growth=dict(head_scale=0.25), skips=dict(n_layer=5))


@needs_node
@pytest.mark.parametrize('name', PAGES)
def test_what_ideas_say_of_their_pages_is_so(tmp_path, name):
    ideas = prepare_data.Ideas([str(ROOT / 'config' / f'{name}.py')], [], strict=False)
    made = net(ideas=ideas, **PAGES[name])
    page, ids = export(tmp_path, made, ideas=ideas), [256, *range(20), 256, 5, 6]
    want = logits_of(made, ids)
    assert np.abs(np.reshape(js(page, EACH, [ids])[1][0], want.shape) - want).max() < 1e-3
    if PAGES[name]:
        without = net(**{key: value for key, value in PAGES[name].items() if key == 'n_layer'})
        assert np.abs(logits_of(without, ids) - want).max() > 0.1                    # and it does something


def test_ideas_that_stack_add_up_in_a_page():
    ideas = prepare_data.Ideas([str(ROOT / 'config' / f'{name}.py') for name in ('softcap', 'dropout', 'growth', 'multi_token', 'window')], [], strict=False)
    text = export_html.arithmetic_of(ideas)
    assert text.index('logit_softcap') < text.index('head_scale') < text.index('{window}')


def test_a_unigram_vocabulary_is_refused(tmp_path):
    tokenizer = prepare_data.BPETokenizer.train([words(4000)], 280, 'unigram')
    with pytest.raises(UserError, match='unigram'):
        export(tmp_path / 'run', net(tokenizer), tokenizer)
    assert [*(tmp_path / 'run').iterdir()] == []

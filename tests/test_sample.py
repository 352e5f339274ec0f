"""sample.py: what it prints, and the two measures that train.py reports."""
import contextlib
import io
import json
import lzma
import math
import os
import re
import shutil
import sys
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model as model_file
import prepare_data
import sample
from conftest import ROOT, script
from model import GPT, GPTConfig
from prepare_data import UserError

BYTES = prepare_data.ByteTokenizer()


class Says:
    """Stands for a model that says the same ids whatever it is asked."""
    wte = SimpleNamespace(weight=torch.zeros(1))

    def __init__(self, *ids):
        self.ids = ids

    def generate(self, idx, max_new_tokens, *options):
        for new in self.ids[:max_new_tokens]:
            yield torch.full((len(idx),), new)


class Costs(torch.nn.Module):
    """Stands for a model: nats of a target token from a table."""

    def __init__(self, table, block_size=64):
        super().__init__()
        self.table, self.config = torch.nn.Parameter(table), SimpleNamespace(block_size=block_size)
        self.compute_dtype = torch.float32

    def forward(self, idx, targets, reduction):
        assert reduction == 'none' and idx.shape == targets.shape and idx.shape[1] <= self.config.block_size
        return torch.where(targets >= 0, self.table[targets.clamp(min=0)], 0.0)


@pytest.fixture
def ask(finished, capsys):
    def run(*args):
        sample.main([str(finished[0]), *args, *(['--device=cpu'] if '--device' not in str(args) else []),
                     *(['--max_new_tokens=40'] if '--max_new' not in str(args) else [])])
        return capsys.readouterr().out
    return run


# ---- completing

def test_options_may_stand_before_the_prompt(ask):
    assert ask('--temperature=0', 'Mia') == ask('Mia', '--temperature=0')


def test_as_a_user(finished, tmp_path):
    (tmp_path / 'prompts.txt').write_text('Mia lost\nZoë 🙂\n', encoding='utf-8')
    code, out, err = script('sample.py', finished[0], '--file', 'prompts.txt', '--temperature=0', '--device=cpu', cwd=tmp_path)
    assert code == 0 and not err and out.startswith('Mia lost') and '\nZoë 🙂' in out
    code, out, err = script('sample.py', tmp_path / 'nothing', cwd=tmp_path)
    assert code == 2 and 'nothing' in err and 'Traceback' not in err and not out


def test_the_same_seed_says_the_same(ask):
    assert ask('Mia', '--seed=4') == ask('Mia', '--seed=4') != ask('Mia', '--seed=5')
    assert ask('Mia', '--temperature=0', '--seed=4') == ask('Mia', '--temperature=0', '--seed=5')
    assert ask('Mia', '--top_k=1', '--seed=4') == ask('Mia', '--temperature=0') == ask('Mia', '--top_p=1e-9')
    assert ask('Mia lost').startswith('Mia lost')


def test_several_samples(ask):
    parts = re.split(r'^--- \d+\n', ask('Mia', '--samples=3'), flags=re.M)
    assert len(parts) == 4 and parts[0] == '' and all(p.startswith('Mia') for p in parts[1:]) and len(set(parts)) == 4
    greedy = re.split(r'^--- \d+\n', ask('Mia', '--samples=2', '--temperature=0'), flags=re.M)
    assert greedy[1] == greedy[2] == ask('Mia', '--temperature=0')


def test_interactive_until_an_empty_line(ask, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.StringIO('Mia\nTom\n\nnever\n'))
    out = ask('--interactive', '--temperature=0')
    assert 'Mia' in out and 'Tom' in out and 'never' not in out


@pytest.mark.parametrize('latent, values', [(dict(), 768), (dict(kv_latent=192, rotary_dim=16), 208)])
def test_stats_say_what_the_cache_holds(latent, values, monkeypatch, capsys):
    model = GPT(GPTConfig(vocab_size=257, bos=256, n_layer=2, n_embd=384, n_head=6, mlp_hidden=32, block_size=16, **latent))
    monkeypatch.setattr(sample, 'load', lambda *args: (model, BYTES))
    sample.main(['run', 'Mia', '--stats', '--max_new_tokens=2', '--device=cpu'])
    assert capsys.readouterr().out.splitlines()[-1] == f'KV cache: {values} values a token and layer'


def test_a_prompt_longer_than_a_block(ask):
    assert len(ask('Mia lost the kite. ' * 20)) > 380


@pytest.mark.parametrize('wrong', ['--samples=0', '--temperature=-1', '--temperature=nan', '--top_p=0', '--top_p=1.1',
                                   '--top_k=-1', '--max_new_tokens=0', '--file=no_such_file', '--device=cuda:99',
                                   '--device=abacus', '--eval=all --stats'])
def test_arguments_that_cannot_work(ask, wrong):
    with pytest.raises(UserError):
        ask('Mia', *wrong.split())


@pytest.mark.parametrize('wrong', ['--temperature=warm', '--nonsense', '--samples=1.5'])
def test_arguments_that_are_none(ask, wrong):
    with pytest.raises(SystemExit) as e:
        ask(wrong)
    assert e.value.code == 2


def test_a_run_is_whole_by_itself(finished, corpus, tmp_path, monkeypatch):
    """Moved, without its data, and asked from another folder."""
    shutil.copytree(finished[0], tmp_path / 'moved')
    monkeypatch.setattr(prepare_data, 'open_data', None)
    state = torch.load(tmp_path / 'moved' / 'ckpt.pt', weights_only=True)
    torch.save(state | dict(data='no/such/folder'), tmp_path / 'moved' / 'ckpt.pt')
    model, tokenizer = sample.load(tmp_path / 'moved')
    assert tokenizer.bos == model.config.bos and not model.training


def test_another_vocabulary_is_refused(finished, tmp_path):
    state = torch.load(finished[0] / 'ckpt.pt', weights_only=True)
    (tmp_path / 'tokenizer.bytes').write_bytes(BYTES.blob)
    torch.save(state | dict(tokenizer='0' * 64), tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='vocabulary|tokenizer'):
        sample.load(tmp_path)


def test_streaming_gives_whole_characters():
    text = 'é🙂ñ and 한'
    pieces = list(sample.stream(Says(*text.encode()), BYTES, '', 100))
    assert ''.join(pieces) == text and len(pieces) > 3 and not any('\ufffd' in p for p in pieces)
    assert ''.join(sample.stream(Says(*'a🙂'.encode()[:3]), BYTES, '', 100)) == 'a\ufffd'      # cut off in the middle
    assert ''.join(sample.stream(Says(255, 97), BYTES, '', 100)) == '\ufffda'


def test_the_end_of_a_document_ends_a_sample(capsys):
    model = Says(*b'ab', BYTES.bos, *b'cd')
    assert ''.join(sample.stream(model, BYTES, 'x', 100)) == 'ab'
    options = SimpleNamespace(samples=2, max_new_tokens=5, temperature=0, top_k=0, top_p=1.0)
    sample.complete(model, BYTES, 'x', options, None)
    assert capsys.readouterr().out == '--- 1\nxab\n--- 2\nxab\n'


# ---- measuring

def split(n=400, sources=2, seed=0):
    """Documents of random bytes and lengths; later sources are rarer."""
    rng = np.random.default_rng(seed)
    docs, tokens = np.zeros(n, prepare_data.DOC), []
    for i in range(n):
        text = rng.integers(0, 256, rng.integers(1, 150))
        docs[i] = len(tokens), len(text), min(rng.geometric(0.7) - 1, sources - 1), 0
        tokens += [BYTES.bos, *text]
    return np.array(tokens, np.uint16), docs


def slow_bpb(table, tokens, docs):
    nats = sum(table[t].item() for t in tokens.tolist() if t != BYTES.bos)
    return nats / math.log(2) / docs['bytes'].sum()


@pytest.mark.parametrize('block_size', [1, 16, 40, 50, 64, 1000])
def test_every_token_but_bos_is_counted_once(block_size):
    tokens, docs = split(60)
    table = torch.rand(257)
    result = sample.bits_per_byte(Costs(table, block_size), tokens, docs, max_tokens=500)
    assert result['bpb'] == pytest.approx(slow_bpb(table, tokens, docs), rel=1e-6)
    assert result['tokens'] == len(tokens) - len(docs) and result['share'] == 1 and result['error'] == 0
    for source, bpb in result['per_source'].items():
        mine = docs['source'] == source
        ids = np.concatenate([part for part, m in zip(np.split(tokens, docs['start'][1:]), mine) if m])
        assert bpb == pytest.approx(slow_bpb(table, ids, docs[mine]), rel=1e-6)


def test_a_part_estimates_the_whole():
    tokens, docs = split(4000, sources=3)
    table = torch.rand(257) * torch.linspace(0, 3, 257)
    docs['bytes'] = docs['bytes'] * np.random.default_rng(1).uniform(1, 1.5, len(docs))     # bits a byte differ by document
    sizes = (32, 128, 512, sample.SLICES)
    parts = {n: sample.bits_per_byte(Costs(table), tokens, docs, slices=n) for n in sizes}
    whole, errors = parts[sample.SLICES]['bpb'], [parts[n]['error'] for n in sizes]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0 < errors[-2]
    for n, part in parts.items():
        assert part['share'] == pytest.approx(n / sample.SLICES, rel=0.1)
        assert abs(part['bpb'] - whole) <= 4 * part['error'] + 1e-12


def test_the_standard_error_is_one():
    """Over many splits, the estimate's distance to the whole is of the size that it says."""
    table, z = torch.rand(257) * torch.linspace(0, 3, 257), []
    for seed in range(40):
        tokens, docs = split(1000, sources=2, seed=seed)
        docs['bytes'] = docs['bytes'] * np.random.default_rng(seed).uniform(1, 2, len(docs))
        part, whole = (sample.bits_per_byte(Costs(table), tokens, docs, slices=n) for n in (128, sample.SLICES))
        z.append((part['bpb'] - whole['bpb']) / part['error'])
    assert 0.7 < np.sqrt(np.mean(np.square(z))) < 1.4


def test_slices_are_stratified_and_nested():
    _, docs = split(2000, sources=3)
    part = sample.deal(docs)
    for source in range(3):
        counts = np.bincount(part[docs['source'] == source], minlength=sample.SLICES)
        assert counts.max() - counts.min() <= 1
    assert np.array_equal(part, sample.deal(docs)) and len(np.unique(part[:64])) > 50


def test_stop_and_ranks():
    tokens, docs = split(300)
    model = Costs(torch.rand(257))
    asked = []
    early = sample.bits_per_byte(model, tokens, docs, stop=lambda: asked.append(1) or len(asked) == 4)
    assert early['share'] == pytest.approx(0.25, abs=0.03) and early['error'] > 0
    whole, parts = sample.bits_per_byte(model, tokens, docs), [[], [], []]
    for rank in range(3):
        sample.bits_per_byte(model, tokens, docs, rank=rank, world=3, reduce=lambda a: parts[rank].append(a) or a)
    sums = map(sum, zip(*parts))
    summed = sample.bits_per_byte(model, tokens, docs, rank=0, world=3, reduce=lambda a: next(sums))
    assert summed['bpb'] == pytest.approx(whole['bpb']) and summed['share'] == 1


# ---- pairs

def pairs(n=40):
    return [dict(kind='even' if i % 2 else 'odd', context=f'Mia {i} left the', good=' aaa', bad=' bbb') for i in range(n)]


def items_of(pairs, tokenizer=BYTES):
    return prepare_data.tokenize_items([prepare_data.eval_item(pair, 'x') for pair in pairs], tokenizer)


def score(model, tokenizer, pairs, **options):
    return sample.judge(model, items_of(pairs, tokenizer), **options)


def table(**costs):
    t = torch.ones(257)
    for letter, cost in costs.items():
        t[ord(letter)] = cost
    return t


def test_a_model_that_knows_is_right_and_swapped_labels_are_the_rest():
    assert score(Costs(table(a=0.5)), BYTES, pairs())['accuracy'] == 1
    mixed = [p if i % 4 else p | dict(good=p['bad'], bad=p['good']) for i, p in enumerate(pairs())]
    result = score(Costs(table(a=0.5)), BYTES, mixed)
    assert result['accuracy'] == 0.75 and result['items'] == 40 and result['ties'] == 0 and result['per_kind'] == dict(odd=0.5, even=1.0)
    odd, even = 11 / 22, 21 / 22
    assert result['error'] == pytest.approx(math.sqrt((odd * (1 - odd) + even * (1 - even)) / 20) / 2)
    swapped = [p | dict(good=p['bad'], bad=p['good']) for p in mixed]
    assert score(Costs(table(a=0.5)), BYTES, swapped)['accuracy'] == 0.25


def test_a_tie_is_wrong():
    result = score(Costs(torch.ones(257)), BYTES, pairs())
    assert result['accuracy'] == 0 and result['ties'] == 40
    equal = [p | dict(bad=p['good']) for p in pairs()]
    assert score(Costs(torch.rand(257)), BYTES, equal)['accuracy'] == 0


@pytest.mark.parametrize('block_size', [8, 20, 64, 100])
def test_endings_alone_are_scored(block_size):
    """The context costs much, and differs in cost; endings are summed (a costs what bb costs), also where it is cut."""
    model = Costs(table(M=900, i=100, a=2.0, b=1.0), block_size)
    for good, bad, accuracy in ((' b', ' a', 1), (' a', ' b', 0), (' a', ' bb', 0), (' a', ' bbb', 1)):
        pair = dict(kind='x', context='Mia ' * 10, good=good, bad=bad)
        assert score(model, BYTES, [pair])['accuracy'] == accuracy


class Merging:
    """A byte tokenizer that has a token of its own for 'ts'."""
    bos = 256

    def encode(self, text):
        return [257 if t == 'ts' else ord(t) for t in re.findall('ts|.', text, re.S)]

    def encode_batch(self, texts):
        return [np.array(self.encode(text)) for text in texts]


def test_a_merge_over_the_seam_is_scored_on_both_sides():
    """'cat' + 's' is c a ts, 'cat' + ' x' is c a t _ x: both are scored from the t on."""
    costs = torch.ones(258)
    costs[257], costs[ord('t')] = 4.0, 3.5
    pair = dict(kind='x', context='cat', good='s', bad=' x')
    assert score(Costs(costs), Merging(), [pair])['accuracy'] == 1         # 4 against 3.5 + 1 + 1


def test_the_batch_does_not_change_a_score(finished):
    model, tokenizer = sample.load(finished[0])
    many = [dict(kind='x', context='Mia ' * (i % 7), good=' lost' * (1 + i % 3), bad=' kite' * (1 + i % 2)) for i in range(30)]
    items = items_of(many, tokenizer)
    one = sample.option_costs(model, items, max_tokens=1)
    assert one == pytest.approx(sample.option_costs(model, items), rel=1e-5) and one.std() > 1


def test_shuffled_labels_give_chance():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, bos=256, block_size=64, n_layer=1, n_head=2, n_embd=32))
    rng = np.random.default_rng(0)
    letters = 'abcdefgh'
    made = [dict(kind='x', context='Mia', good=' ' + letters[a], bad=' ' + letters[b])
            for a, b in rng.integers(0, 8, (600, 2)) if a != b]
    assert 0.4 < score(model, BYTES, made)['accuracy'] < 0.6


# ---- minimal pairs from files, frequency bias, anisotropy

def test_pairs_from_files_folders_and_tars(tmp_path):
    rows = [dict(sentence_good=f'Good {i}.', sentence_bad=f'Bad {i}.', UID='agreement') for i in range(3)]
    text = ''.join(json.dumps(row) + '\n' for row in rows).encode()
    (tmp_path / 'blimp').mkdir()
    (tmp_path / 'blimp' / 'agreement.jsonl').write_bytes(text)
    (tmp_path / 'agreement.jsonl.xz').write_bytes(lzma.compress(text))
    with tarfile.open(tmp_path / 'blimp.tar.xz', 'w:xz') as tar:
        tar.add(tmp_path / 'blimp' / 'agreement.jsonl', 'blimp/agreement.jsonl')
    expected = [dict(kind='agreement', field='', context='', options=[f'Good {i}.', f'Bad {i}.']) for i in range(3)]
    for name in ('blimp', 'agreement.jsonl.xz', 'blimp.tar.xz', 'blimp/agreement.jsonl'):
        assert prepare_data.read_items(tmp_path / name) == (expected, [])
    ours = dict(kind='place', context='Mia left.', good=' She did.', bad=' He did.')
    (tmp_path / 'pairs.jsonl').write_text(json.dumps(ours) + '\n')
    made = dict(kind='place', field='', context='Mia left.', options=[' She did.', ' He did.'])
    assert prepare_data.read_items(tmp_path / 'pairs.jsonl') == ([made], [])
    (tmp_path / 'cut.jsonl').write_bytes(text + b'{"sentence_good": "A lo\n')
    assert prepare_data.read_items(tmp_path / 'cut.jsonl') == (expected, ['cut.jsonl line 4'])
    for name, content in {'no.jsonl': b'{"text": "x"}\n', 'empty.jsonl': b'', 'bad.jsonl': b'{', 'cut.jsonl.xz': text[:20],
                          'list.jsonl': b'[1]\n', 'x.tar.xz': b'no tar'}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f'{name} (holds no items|cannot be read)'):
            prepare_data.read_items(tmp_path / name)
    with pytest.raises(UserError, match='gone.jsonl'):
        prepare_data.read_items(tmp_path / 'gone.jsonl')


def test_frequency_bias_of_a_judge_that_goes_by_frequency():
    tokenizer, counts = prepare_data.ByteTokenizer(), np.ones(257)
    counts[[ord(c) for c in 'abcdef']] = [1, 10, 100, 1000, 10_000, 100_000]
    pairs = [dict(context='', good=x + 'z', bad=y + 'z') for x in 'abcdef' for y in 'abcdef' if x != y]
    items = items_of(pairs, tokenizer)
    often = -counts[items['ids'][items['start'][:-1] + 1]]               # each option's first byte, after BOS
    assert sample.frequency_bias(often, items, counts) == dict(frequency_bias=1.0, replaced=30)
    assert sample.frequency_bias(-often, items, counts) == dict(frequency_bias=-1.0, replaced=30)
    knows = np.array([0.0, 1.0] * 30)
    assert sample.frequency_bias(knows, items, counts)['frequency_bias'] == 0.0
    longer = [dict(context='', good='abz', bad='az')] * 4                # an insertion: nothing is replaced
    assert sample.frequency_bias(knows[:8], items_of(longer, tokenizer), counts) == dict(frequency_bias=0.0, replaced=0)


def test_anisotropy_of_states_that_are_known(corpus):
    data = corpus.open()
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, bos=256, block_size=64, n_layer=2, n_head=2, n_embd=64))
    one_way = torch.ones(64)

    def narrow(_, __, out):
        return out + 1e4 * one_way                    # after the second layer all point nearly one way
    hook = model.blocks[1].register_forward_hook(narrow)
    first, second = sample.anisotropy(model, data.tokens['val'], data.docs['val'])
    hook.remove()
    assert -0.1 < first < 0.9 and second > 0.999
    assert sample.anisotropy(model, data.tokens['val'], data.docs['val']) == pytest.approx([first, first], abs=0.2)


def test_pairs_on_the_command_line(finished, tmp_path):
    (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(dict(sentence_good=f'Mia lost the kite by the {a}.',
                                                              sentence_bad=f'Mia lost the kite by the {b}.')) + '\n'
                                              for a in ('tree', 'lake') for b in ('xqzw', 'kjvv')))
    code, out, err = script('sample.py', finished[0], '--eval', f'{tmp_path}/p.jsonl,anisotropy', '--device=cpu', cwd=tmp_path)
    assert code == 0, err
    assert re.search(r'^p +1.0000 .* 0.5000 +0.5000 +4 +0$', out, re.M) and re.search(r'frequency_bias .* on the 4 pairs', out)
    assert len(re.search('anisotropy per_layer: (.*)', out)[1].split(', ')) == 2


# ---- evaluations

def small_model(seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=257, bos=256, block_size=64, n_layer=2, n_head=2, n_embd=32) | sizes
    return GPT(GPTConfig(**sizes)).eval()


def plain_sum(model, text, bos):
    """Log-probability of a whole text, token by token, from logits: no batches, no shared code."""
    ids = torch.tensor(([BYTES.bos] if bos else []) + list(text.encode()))
    with torch.no_grad():
        log = model.logits(model.trunk(ids[None])).double().log_softmax(-1)[0]
    return sum(log[t, ids[t + 1]].item() for t in range(len(ids) - 1))


def made_items(n, choices, seed=0):
    """Items of random words, the right one being as random as the others."""
    rng = np.random.default_rng(seed)
    words = [''.join(map(chr, rng.integers(97, 123, 5))) for _ in range(50)]
    return [dict(kind=f'kind {i % 4}', context=' '.join(rng.choice(words, rng.integers(1, 6))),
                 options=[f' {w}' for w in rng.choice(words, choices, replace=False)]) for i in range(n)]


@pytest.mark.parametrize('bos', [True, False])
@pytest.mark.parametrize('choices', [2, 4])
def test_accuracies_agree_with_a_direct_computation(finished, bos, choices):
    """Of a trained model, whole texts scored one at a time in float64, BLiMP's mean over paradigms by hand."""
    model, _ = sample.load(finished[0])
    names, things = 'Mia Tom Zoë'.split(), 'kite ball drum shoe'.split()
    rng, items = np.random.default_rng(1), []
    for i in range(60):
        name, thing = rng.choice(names), rng.choice(things, choices, replace=False)
        if i % 3:
            items.append(dict(kind=f'{i % 3}', context='', options=[f'{name} lost the {x} by the lake.' for x in thing]))
        else:
            items.append(dict(kind='0', context=f'{name} lost', options=[f' the {x}{"." * rng.integers(3)}' for x in thing]))
    hits = {}
    for item in items:
        first, *others = [plain_sum(model, item['context'] + option, bos) for option in item['options']]
        hits.setdefault(item['kind'], []).append(all(first > other for other in others))
    result = sample.judge(model, prepare_data.tokenize_items(items, BYTES), bos=bos)
    assert result['per_kind'] == pytest.approx({kind: np.mean(x) for kind, x in hits.items()})
    assert result['accuracy'] == pytest.approx(np.mean([np.mean(x) for x in hits.values()])) and result['items'] == 60
    assert 0.1 < result['accuracy'] < 0.9 and result['chance'] == 1 / choices


def test_last_words_agree_with_greedy_continuation(finished):
    model, _ = sample.load(finished[0])
    texts = ['Mia lost the ', 'Tom lost', 'Zoë looked', 'Mia lost t']
    said = [bytes(new.item() for new in model.generate(torch.tensor([[BYTES.bos, *text.encode()]]), 3, temperature=0))
            for text in texts]
    items = [dict(kind='x', context=text, options=[word]) for text, new in zip(texts, said) for word in (new.decode(), 'xqz')]
    made = prepare_data.tokenize_items(items, BYTES)
    result = sample.judge(model, made)
    assert result['accuracy'] == 0.5 and result['chance'] == 0 and result['items'] == 8 and result['ties'] == 0
    constant = small_model()
    constant.lm_head.weight.data.zero_()                      # every token as likely: none is the model's word
    assert sample.judge(constant, made)['accuracy'] == 0


@pytest.mark.parametrize('choices', [2, 3, 5])
def test_untrained_models_and_shuffled_labels_are_at_chance(finished, choices):
    for model in (small_model(), sample.load(finished[0])[0]):
        result = sample.judge(model, prepare_data.tokenize_items(made_items(800, choices), BYTES))
        assert result['chance'] == pytest.approx(1 / choices)
        assert abs(result['accuracy'] - result['chance']) < 1.96 * result['error'] < 0.05, result


def test_ties_and_kinds_of_unequal_size():
    costs = Costs(table(a=0.5, c=0.5))
    rows = [dict(kind='big', context='', options=['xa', 'xb', 'xd'])] * 6 + [dict(kind='small', context='', options=['xa', 'xc'])] * 2
    result = sample.judge(costs, prepare_data.tokenize_items(rows, BYTES))
    assert result['accuracy'] == 0.5 and result['ties'] == 2 and result['per_kind'] == dict(big=1.0, small=0.0)
    assert result['chance'] == pytest.approx((1 / 3 + 1 / 2) / 2) and result['error'] > 0.05      # not 0 where all are alike
    fields = [dict(sentence_good='xa', sentence_bad='xb' if i else 'xc', UID=f'u{i}', linguistics_term='f' * (i > 1) or 'g')
              for i in range(4)]
    assert score(costs, BYTES, fields)['per_field'] == dict(g=0.5, f=1.0)


def test_evaluation_is_in_float32_and_leaves_the_model_as_it_was():
    model, items = small_model(), prepare_data.tokenize_items(made_items(40, 2), BYTES)
    costs = sample.option_costs(model, items)
    model.compute_dtype = torch.bfloat16
    torch.set_float32_matmul_precision('high')
    try:
        assert np.array_equal(sample.option_costs(model, items), costs)
        assert model.compute_dtype == torch.bfloat16 and torch.get_float32_matmul_precision() == 'high'
    finally:
        torch.set_float32_matmul_precision('highest')


def test_the_text_error_is_that_of_another_sample_of_such_text():
    table, found, said = torch.rand(257) * torch.linspace(0, 3, 257), [], []
    for seed in range(60):
        tokens, docs = split(400, sources=2, seed=seed)
        docs['bytes'] = docs['bytes'] * np.random.default_rng(seed).uniform(1, 2, len(docs))
        result = sample.bits_per_byte(Costs(table), tokens, docs)
        found.append([result['bpb'], result['per_source'][1]])
        said.append([result['text_error'], result['per_source_error'][1]])
    assert np.std(found, axis=0) / np.mean(said, axis=0) == pytest.approx([1, 1], abs=0.35)
    tokens, docs = split(1, sources=1)
    assert sample.bits_per_byte(Costs(table), tokens, docs)['per_source_error'] == {}         # one document says nothing of others


def test_texts_longer_than_the_model_looks_back_are_scored_whole():
    options = ['Mia' + ' saw a kite' * 12, 'Ned' + ' saw a kite' * 12]                  # they differ in what a last window lacks
    costs, items = Costs(table(M=0.5)), prepare_data.tokenize_items([dict(kind='', context='', options=options)] * 3, BYTES)
    assert len(options[0]) > costs.config.block_size
    result = sample.judge(costs, items)
    assert result['accuracy'] == 1 and result['ties'] == 0
    whole = small_model(block_size=16)
    long = prepare_data.tokenize_items([dict(kind='', context='', options=['a' * 40, 'b' * 200])], BYTES)
    assert sample.option_costs(whole, long)[1] > 4 * sample.option_costs(whole, long)[0]


def test_a_model_without_numbers_knows_no_last_word():
    model, items = small_model(), prepare_data.tokenize_items([dict(kind='', context='Mia lost', options=[' it'])] * 3, BYTES)
    model.wte.weight.data.fill_(math.nan)
    assert sample.judge(model, items)['accuracy'] == 0


def test_any_first_part_holds_every_kind():
    items = [dict(kind=f'k{i // 7}', context='', options=[f'{i}a', f'{i}b']) for i in range(7 * 30)]
    kind = prepare_data.tokenize_items(items, BYTES)['kind']
    first = np.bincount(kind[:30], minlength=30)
    assert (first > 0).sum() > 12 and first.max() <= 2                         # couples come together
    assert set(np.bincount(kind[:60], minlength=30)) <= {1, 2, 3, 4} and len({*kind[:10:2].tolist()} - {0, 1, 2, 3, 4}) > 0


def test_odd_evaluation_files_are_named(tmp_path):
    import tarfile
    with tarfile.open(tmp_path / 'odd.tar', 'w') as tar:
        for name, kind in (('b.jsonl', tarfile.DIRTYPE), ('c.jsonl', tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, 'nowhere'
            tar.addfile(member)
    (tmp_path / 'deep.jsonl').write_text('[' * 100_000)
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'x.jsonl').mkdir()
    for name in ('odd.tar', 'deep.jsonl', 'folder'):
        with pytest.raises(UserError, match='holds no items|cannot be read'):
            prepare_data.eval_set(tmp_path / name, BYTES, tmp_path / 'cache')


def test_what_taking_the_shortest_option_gets():
    items = [dict(kind=kind, context='Mia ', options=options) for kind, options in (
        ('a', ['ran', 'walked']), ('a', ['walked', 'ran']), ('b', ['sat', 'ran']), ('c', ['saw', 'ran', 'and', 'stayed']))]
    result = sample.judge(Costs(torch.ones(257)), prepare_data.tokenize_items(items, BYTES))
    assert result['shortest'] == pytest.approx((0.5 + 0.5 + 1 / 3) / 3) and result['chance'] == pytest.approx((0.5 + 0.5 + 0.25) / 3)


def test_intervals_of_shares():
    assert sample.interval(0.0, 0.0, 164) == (0.0, pytest.approx(0.0229, abs=2e-4))       # a textbook's, by Wilson
    assert sample.interval(0.5, 0.05, 10) == pytest.approx((0.404, 0.596), abs=1e-3)      # by the standard error, not the 10
    assert sample.interval(1.0, 0.0, 10) == (pytest.approx(0.7225, abs=1e-3), 1.0)


def test_eval_on_the_command_line(finished, corpus, tmp_path):
    sets = tmp_path / 'sets'
    sets.mkdir()
    for name, choices in (('pairs', 2), ('choices', 4)):
        rows = [dict(context=i['context'], options=i['options']) for i in made_items(40, choices)]
        (sets / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (sets / 'words.jsonl.xz').write_bytes(lzma.compress(json.dumps(dict(prompt='Mia lost {answer}.', answer='it')).encode()))
    (sets / 'other.jsonl').write_text('{"task_id": 1}')
    common = [finished[0], f'--eval_data={sets}', '--device=cpu']
    code, out, err = script('sample.py', *common, '--eval=all', '--json=told.json', '--eval_items=30', cwd=tmp_path)
    assert code == 0, err
    told = json.loads((tmp_path / 'told.json').read_text())
    assert [*told] == ['choices', 'pairs', 'words', 'bpb', 'anisotropy', 'text'] and told['choices']['items'] == 30
    assert told['bpb']['per_source'].keys() == told['bpb']['per_source_error'].keys() == {'tales', 'notes'}
    assert f'{told["pairs"]["accuracy"]:.4f}' in out and 'left out: ' in out and 'other.jsonl holds no items' in out
    assert {p.name for p in (corpus.folder / 'eval').iterdir()} >= {'choices.npz', 'pairs.npz', 'words.npz'}
    for wrong, why in (('--eval=blimp', 'blimp is no evaluation and no file'), (f'--eval={sets}/other.jsonl', 'holds no items')):
        code, out, err = script('sample.py', *common, wrong, cwd=tmp_path)
        assert code == 2 and why in err and err.count('\n') == 1 and not out
    shutil.copytree(finished[0], tmp_path / 'bare', ignore=shutil.ignore_patterns('tokenizer.*'))
    with pytest.raises(UserError, match='bare holds no tokenizer'):
        sample.load(tmp_path / 'bare')


BLIMP = ROOT.parent / 'shared' / 'data' / 'eval' / 'blimp.tar.xz'


@pytest.mark.skipif(not BLIMP.exists(), reason='BLiMP is not here')
def test_blimp_agrees_with_a_direct_computation(finished):
    model, _ = sample.load(finished[0])
    short = [i for i in prepare_data.read_items(BLIMP)[0] if max(map(len, i['options'])) < 40][::90][:200]
    right, kinds = {}, {i['kind'] for i in short}
    for item in short:
        good, bad = (plain_sum(model, text, True) for text in item['options'])
        right.setdefault(item['kind'], []).append(good > bad)
    result = sample.judge(model, prepare_data.tokenize_items(short, BYTES))
    assert len(short) > 100 and len(kinds) > 20 and result['per_kind'] == {kind: np.mean(ok) for kind, ok in right.items()}
    assert result['accuracy'] == pytest.approx(np.mean([np.mean(ok) for ok in right.values()]))


@pytest.mark.slow
@pytest.mark.skipif(not BLIMP.exists(), reason='BLiMP is not here')
def test_untrained_and_shuffled_on_blimp():
    items, bad = prepare_data.read_items(BLIMP)
    assert len(items) == 66_995 and len(bad) == 1
    assert len({i['kind'] for i in items}) == 67 and len({i['field'] for i in items}) == 12
    coin = np.random.default_rng(0).random(len(items)) < 0.5
    shuffled = [i | dict(options=i['options'][::-1]) if flip else i for i, flip in zip(items, coin)]
    result = sample.judge(small_model(block_size=256), prepare_data.tokenize_items(shuffled, BYTES), n=20_000)
    assert abs(result['accuracy'] - 0.5) < 1.96 * result['error'] < 0.01


# ---- energy

class Nvml:
    """Stands for the driver's library: a card that has used 5 J by the first reading, and draws 200 W by a clock of the test's."""

    def __init__(self, clock, lacks=()):
        self.clock, self.lacks = clock, lacks

    def nvmlInit_v2(self):
        return 9 * ('init' in self.lacks)

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        assert uuid == b'GPU-11-22'
        return self.answer('init', handle, 77)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, mj):
        assert handle.value == 77
        return self.answer('counter', mj, int(5000 + 1000 * 200 * self.clock()))

    def nvmlDeviceGetPowerUsage(self, handle, mw):
        return self.answer('power', mw, 200_000)

    def answer(self, what, place, value):
        if what in self.lacks:
            return 3
        place._obj.value = value
        return 0


@pytest.fixture
def meter(monkeypatch, tmp_path):
    """Makes an Energy whose clock is meter.now and whose card meter.card, with RAPL in tmp_path if that holds any; no thread reads."""
    def make(device='cuda', nvml={}, **options):
        return sample.Energy(device, 0.0, rapl=tmp_path, nvml=Nvml(lambda: make.now, **nvml), **options)
    make.now = 0.0
    monkeypatch.setattr(sample.time, 'monotonic', lambda: make.now)
    monkeypatch.setattr(sample.threading, 'Thread', lambda **options: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(sample.os, 'times', lambda: (2 + 0.5 * make.now, 1.0, 0.5, 0.5, 99.0))     # half a thread is busy
    monkeypatch.setattr(sample.os, 'sysconf', lambda name: 48 * 2 ** 30 if name == 'SC_PHYS_PAGES' else 1)
    card = SimpleNamespace(uuid='11-22', name='NVIDIA GeForce RTX 4090')
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: card)
    make.card = card
    return make


def zone(folder, name, uj, kind, wraps_at=1_000_000_000):
    (folder / name).mkdir(exist_ok=True)
    for file, value in (('energy_uj', uj), ('name', kind), ('max_energy_range_uj', wraps_at)):
        (folder / name / file).write_text(f'{value}\n')


def test_joules_go_to_what_was_done_meanwhile(meter):
    energy = meter()
    meter.now = 10.0
    assert energy.turn('train') == 'idle'
    meter.now = 70.0
    assert energy.turn('eval') == 'train'
    meter.now = 75.0
    # 200 W of the card's counter, 4 W of half a thread and of the 4 s before the first reading, 20 W for 48 GiB
    expected = [[200 * 60, 2 * 60, 20 * 60], [200 * 5, 2 * 5, 20 * 5], [200 * 10, 2 * 10 + 16, 20 * 10]]
    np.testing.assert_allclose(energy.read(), expected)
    np.testing.assert_allclose(energy.read(), expected)
    assert [energy.how[d].split()[0] for d in sample.DEVICES] == ['measured', 'estimated', 'estimated']
    report = sample.energy_report(energy.read(), energy.how, 'FR')
    assert report['joules'] == pytest.approx(16666) and report['co2_g'] == pytest.approx(16666 / 3.6e6 * 56)
    assert report['energy']['train'] == pytest.approx(13320) and report['energy']['cpu'] == pytest.approx(166) and report['energy']['how'] == energy.how


@pytest.mark.parametrize('lacks, name, watts, how', [
    ((), '', 200, 'measured (NVML counter'), (['counter'], '', 200, 'measured (NVML power'), (['init'], 'NVIDIA L4', 72, 'estimated (the board'),
    (['counter', 'power'], 'NVIDIA L40S', 350, 'estimated (the board'), (['init'], 'Some Card', 350, 'estimated (the board')])
def test_a_card_is_measured_or_the_report_says_it_is_not(meter, lacks, name, watts, how):
    meter.card.name = name
    energy = meter(nvml=dict(lacks=lacks))
    for meter.now in range(31):
        energy.read()
    assert energy.read()[2, 0] == pytest.approx(30 * watts) and energy.how['gpu'].startswith(how)


def test_without_a_driver_and_without_a_card(meter, monkeypatch):
    monkeypatch.setattr(sample.ctypes, 'CDLL', lambda name: (_ for _ in ()).throw(OSError(name)))
    read, how = sample.card_joules(meter.card, 0.0)
    meter.now = 2.0
    assert read() == 900 and '450 W' in how
    energy = meter('cpu')
    meter.now = 4.0
    assert energy.read()[:, 0].sum() == 0 and energy.how['gpu'] == 'not used'


def test_rapl_counts_packages_alone_and_wraps_around(meter, tmp_path):
    zone(tmp_path, 'intel-rapl:0', 999_000_000, 'package-0')
    zone(tmp_path, 'intel-rapl:1', 5_000_000, 'package-1')
    zone(tmp_path, 'intel-rapl:2', 0, 'psys')
    zone(tmp_path, 'intel-rapl:0:0', 0, 'core')
    energy = meter('cpu', share=0.5)
    assert energy.how['cpu'].startswith('measured')
    for name, uj, kind in (('0', 2_000_000, 'package-0'), ('1', 9_000_000, 'package-1'), ('2', 10 ** 8, 'psys'), ('0:0', 10 ** 8, 'core')):
        zone(tmp_path, f'intel-rapl:{name}', uj, kind)
    assert energy.read()[2, 1] == pytest.approx((3 + 4) / 2)       # two ranks on the machine: half each
    (tmp_path / 'intel-rapl:0' / 'energy_uj').unlink()             # as for all but root
    assert meter('cpu').how['cpu'].startswith('estimated')


def test_the_bound_of_half_an_hour_by_hand():
    """450 W + 62 W + 20 W for 1,800 s are 0.266 kWh: 126 g by the world's electricity, 98 g in the US, 15 g in France."""
    joules = np.array([[450, 62, 20], [0, 0, 0], [0, 0, 0]]) * 1800.0
    said = [sample.energy_report(joules, {}, country) for country in ('world', 'US', 'FR', '1000')]
    assert said[0]['joules'] == 957_600
    assert [r['co2_g'] for r in said] == pytest.approx([126.35, 98.154, 14.896, 266.0])
    assert [sample.grid(c) for c in ('XX', '-3', 'nan', '', '1e3')] == [None] * 5 and sample.grid('0') == 0


def test_as_codecarbon_reckons(monkeypatch):
    pytest.importorskip('codecarbon')
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy, Power, Time
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.external.hardware import CPU
    from codecarbon.external.ram import RAM
    from codecarbon.input import DataSource
    theirs, iso = Emissions(DataSource()), dict(CA='CAN', CH='CHE', CN='CHN', DE='DEU', FR='FRA', IN='IND', NO='NOR', PL='POL', SE='SWE', UK='GBR', US='USA', world='???')
    energy = Energy.from_power_and_time(power=Power.from_watts(450.0 + 62.0 + 20.0), time=Time(seconds=1800.0))
    for country, code in iso.items():
        kg = theirs.get_private_infra_emissions(energy, GeoMetadata(country_iso_code=code))
        assert sample.energy_report(np.array([[450, 62, 20]]) * 1800.0, {}, country)['co2_g'] == pytest.approx(1000 * kg, rel=0.02), country
    assert sample.GRID.keys() == iso.keys()
    ram = RAM()
    ram.is_arm_cpu = False
    for gib in [0.5, 2, 7.7, 16, 23.5, 33, 64, 65, 128, 129, 200, 251, 256, 384, 503, 755, 1007, 2048, 5000]:
        assert sample.ram_watts(gib) == pytest.approx(ram._calculate_ram_power(gib)), gib
    cpu = CPU('', 'cpu_load', 'unknown', 4 * os.cpu_count(), tracking_mode='process')
    read, _ = sample.cpu_joules('/nowhere')
    cpu.start()
    began, before = time.monotonic(), read()
    while time.monotonic() - began < 0.6:
        sum(range(1000))
    cpu_energy = cpu.total_power().W * (time.monotonic() - began)
    assert read() - before == pytest.approx(cpu_energy, rel=0.15) and cpu_energy > 0.1


def test_stats_say_what_1000_tokens_cost(capsys):
    args = SimpleNamespace(samples=4, country='1000')
    how = dict(gpu='measured', cpu='estimated', ram='estimated')
    sample.say_cost(how, [[100, 0, 0, 0], [103, 150, 3, 60], [163, 9150, 123, 1260]], 3000, args)      # 50, 1, 20 W idle
    out = capsys.readouterr().out
    # 9,000 + 120 + 1,200 J for 3,000 tokens; 71 W of them idle
    assert 'energy: 3440 J, 0.9556 g CO2e per 1,000' in out and 'batch size 4 (3,000 in 60.0 s' in out
    assert 'gpu: 3000 J measured' in out and '71.0 W: 2020 J' in out and 'trusted' not in out
    sample.say_cost(how, [[103, 0, 0, 0], [113, 9000, 120, 1200]], 3000, args)
    out = capsys.readouterr().out
    assert 'not to be trusted' in out and 'idle' not in out


def test_stats_count_what_was_generated(ask):
    out = ask('Mia', '--stats', '--samples', '3', '--max_new_tokens=5', '--country=FR')
    assert re.search(r'energy: [\d.]+ J, [\d.e-]+ g CO2e per 1,000 generated tokens at batch size 3 \(15 in .* 56 g/kWh\)', out), out
    with pytest.raises(UserError, match='FR, .*grams'):
        ask('Mia', '--country=Atlantis')


# ---- learning dynamics

def numpy_pwcca(x, y):
    """PWCCA by inverse square roots of covariances, as the paper has it, in numpy."""
    x, y = (v - v.mean(0) for v in (x, y))

    def whiten(v):
        power, turn = np.linalg.eigh(v.T @ v)
        return turn @ np.diag(power ** -0.5) @ turn.T
    u, rho, _ = np.linalg.svd(whiten(x) @ (x.T @ y) @ whiten(y))
    h, _ = np.linalg.qr(x @ whiten(x) @ u[:, :len(rho)])
    alpha = np.abs(h.T @ x).sum(1)
    return (alpha / alpha.sum() * rho).sum()


def test_measures_against_numpy_in_float64():
    dice = np.random.default_rng(3)
    x, y = dice.standard_normal((200, 12)) * np.logspace(0, 2, 12) + 5, dice.standard_normal((200, 9))
    y[:, :4] += x[:, :4] - x[:, 4:8] ** 2 / 100
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    h = np.eye(200) - 1 / 200
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h                                        # by n x n Gram matrices: HSIC
    assert sample.linear_cka(a, b) == pytest.approx((k * l).sum() / ((k * k).sum() * (l * l).sum()) ** 0.5, rel=1e-10)
    assert sample.pwcca(a, b) == pytest.approx(numpy_pwcca(x, y), rel=1e-10) and sample.pwcca(a, b) < 0.9
    s = np.linalg.svd(x, compute_uv=False)
    p = s / s.sum()
    for turned in (a, a.T):
        ours = sample.describe(turned, turned)
        assert ours['effective_rank'] == pytest.approx(np.prod(p ** -p) / 12, rel=1e-9)
        assert ours['condition_number'] == pytest.approx(np.linalg.cond(x), rel=1e-9)
        assert ours['gini'] == pytest.approx(np.abs(np.abs(x)[:, :, None, None] - np.abs(x)).mean() / 2 / np.abs(x).mean(), rel=1e-9)
        assert ours['hoyer'] == pytest.approx((2400 ** 0.5 - np.abs(x).sum() / (x ** 2).sum() ** 0.5) / (2400 ** 0.5 - 1), rel=1e-9)
        assert ours['frobenius'] == pytest.approx(np.linalg.norm(x), rel=1e-9) and ours['max_abs'] == np.abs(x).max()
        assert ours['nuclear'] == pytest.approx(np.linalg.norm(x, 'nuc'), rel=1e-9)
    for height in (1e3, 1e5):                                         # float64 Gram matrices keep the smallest singular values
        q, r = (np.linalg.qr(dice.standard_normal((40, 40)))[0] for _ in 'qr')
        ill = torch.from_numpy((q * np.geomspace(1, 1 / height, 40)) @ r)
        assert sample.condition_number(sample.singular_values(ill)) == pytest.approx(height, rel=1e-3)


def test_measures_in_closed_form():
    torch.manual_seed(0)
    x = torch.randn(400, 10, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q
    other = torch.randn(400, 10, dtype=torch.float64)
    assert sample.linear_cka(x, 3 * x @ turn + 7) == pytest.approx(1) and sample.linear_cka(x, other) < 0.1
    assert sample.pwcca(x, x @ torch.randn(10, 10, dtype=torch.float64) - 2) == pytest.approx(1) and sample.pwcca(x, other) < 0.3
    half = torch.linalg.qr(x - x.mean(0)).Q
    assert sample.pwcca(half, half[:, :5]) == pytest.approx(1) and sample.linear_cka(half, half[:, :5]) == pytest.approx(0.5 ** 0.5)
    for matrix, rank, condition in ((torch.eye(6), 1, 1), (torch.outer(torch.arange(1., 5), torch.ones(7)), 1 / 4, math.inf),
                                    (torch.diag(torch.tensor([8., -2.])), math.exp(-.8 * math.log(.8) - .2 * math.log(.2)) / 2, 4)):
        s = sample.singular_values(matrix)
        assert sample.effective_rank(s) == pytest.approx(rank) and sample.condition_number(s) == pytest.approx(condition)
    flat, spike = -torch.ones(5, 20), torch.zeros(5, 20)
    spike[2, 3] = -4
    assert sample.gini(flat) == pytest.approx(0) and sample.gini(spike) == pytest.approx(99 / 100)
    assert sample.hoyer(flat) == pytest.approx(0) and sample.hoyer(spike) == pytest.approx(1)
    assert sample.norms(spike, sample.singular_values(spike)) == dict(frobenius=4, nuclear=4, max_abs=4)
    out, value = torch.randn(30, 4), torch.randn(4, 20)
    whole, core = sample.ov_circuit(out, value)
    assert torch.allclose(whole, out @ value) and core.shape == (4, 4)
    assert torch.allclose(sample.singular_values(core), torch.linalg.svdvals(whole.double())[:4], rtol=1e-5)


def test_sketches_keep_cka():
    torch.manual_seed(0)
    falls = torch.diag(torch.arange(1., 193) ** -0.7)                              # a spectrum as flat as activations have
    x, noise = (torch.randn(256, 192) @ falls @ torch.linalg.qr(torch.randn(192, 192)).Q for _ in 'xn')
    for y in (x, x + 0.2 * noise, x + noise, noise[:, :100]):
        assert abs(sample.linear_cka(sample.sketch(x), sample.sketch(y)) - sample.linear_cka(x, y)) < 0.01
    narrow = torch.randn(256, 40) + 3                                              # exact but for fp16
    assert sample.linear_cka(sample.sketch(narrow), narrow) == pytest.approx(1, abs=1e-6)
    assert sample.sketch(x).shape == (256, 64) and sample.sketch(1e9 * x).isfinite().all()
    nothing = sample.sketch(torch.ones(256, 192))                                  # as an MLP's output before its first step
    assert nothing.isfinite().all() and all(math.isnan(value) for value in sample.alike(nothing, sample.sketch(x), 'final').values())


def small(**options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(vocab_size=257, bos=256, block_size=64, n_layer=2, n_head=4, n_embd=64) | options))
    with torch.no_grad():
        for block in model.blocks:
            sample.projection(block.mlp).normal_(std=0.05)                         # it begins as 0
    return model


@pytest.mark.parametrize('options', [dict(n_kv_head=2), dict(kv_latent=32, rotary_dim=8), dict(mlp='swiglu', dropout=0.5)])
def test_what_a_probe_sees(corpus, options):
    """Activations, weights and gradients are the model's own; a circuit is what its head adds alone."""
    probe, model = sample.Probe(corpus.open(), 64, 'cpu'), small(**options)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    seen = probe.look(model)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    model.eval()
    outs, heard = {}, [model.blocks[1].attn.proj, model.blocks[1].mlp.down]
    hooks = [m.register_forward_hook(lambda m, args, out: outs.update({m: (args[0], out)})) for m in heard]
    model(probe.idx, probe.targets).backward()
    for name, module in zip(('1.attn.proj', '1.mlp.down'), heard):
        (activations, _), (weight, _), (gradient, _) = seen[name]
        assert torch.equal(activations, outs[module][1][:, ::2].flatten(0, 1)) and activations.shape == (256, 64)
        assert torch.equal(weight, module.weight) and torch.allclose(gradient, module.weight.grad, atol=1e-7)
    attn, value, group = model.blocks[1].attn, seen['1.attn.v'][0][0], 4 // model.config.n_kv_head
    D, w_v, w_o = 16, attn.v.weight, attn.proj.weight
    idx = torch.tensor([[256, 65]])                                     # the first position attends to itself alone
    first = {}
    hooks += [attn.proj.register_forward_hook(lambda m, args, out: first.update(mixed=args[0][0, 0]))]
    probe.idx, probe.targets = idx, idx
    assert torch.allclose(probe.look(model)['1.attn.v'][0][0][0], first['mixed'].view(-1, group, D)[:, 0].flatten() if group == 2
                          else first['mixed'], atol=1e-6)
    for head in range(4):
        o, k = slice(head * D, head * D + D), slice(head // group * D, head // group * D + D)
        (writes, _), (circuit, core), (change, core_of_change) = seen[f'1.attn.ov.{head}']
        assert torch.allclose(writes, value[:, k] @ w_o[:, o].T, atol=1e-6) and torch.allclose(circuit, w_o[:, o] @ w_v[k], atol=1e-6)
        along = w_o[:, o] @ w_v.grad[k] + attn.proj.weight.grad[:, o] @ w_v[k]
        assert torch.allclose(change, along, atol=1e-7)
        for whole, part in ((circuit, core), (change, core_of_change)):
            s = torch.linalg.svdvals(whole.double())
            assert torch.allclose(sample.singular_values(part)[:16], s[:16], rtol=1e-3, atol=1e-6 * s[0].item())


@pytest.mark.skipif(torch.cuda.is_available() or not model_file.triton, reason='kernels are interpreted only where there is no GPU')
def test_a_probe_sees_the_same_through_kernels(corpus, monkeypatch):
    probe, model = sample.Probe(corpus.open(), 64, 'cpu'), small(n_embd=32, n_head=2, n_layer=1)
    probe.idx, probe.targets = probe.idx[:1, :16].contiguous(), probe.targets[:1, :16].contiguous()
    plain = probe.look(model)
    monkeypatch.setattr(model_file, 'IN_USE', {'qk_norm', 'attention', 'cross_entropy', 'mlp'})
    for name, parts in probe.look(model).items():
        for (x, _), (y, _) in zip(parts, plain[name]):
            assert torch.allclose(x, y, atol=1e-5) and x.any()


def test_tokens_have_no_circuits(corpus):
    seen = sample.Probe(corpus.open(), 64, 'cpu').look(small(attn_tokens=32, mlp_tokens=48))
    assert list(seen) == ['0.attn.v', '0.attn.proj', '0.mlp.down', '1.attn.v', '1.attn.proj', '1.mlp.down']
    assert seen['1.mlp.down'][1][0].shape == (64, 48) and seen['1.attn.v'][0][0].shape == (256, 64)


def test_a_probe_over_growth_and_what_is_not_finite(corpus):
    """Sketches compare across widths; a layer that came later has no past; NaN is named and leaves the rest alone."""
    probe, narrow, wide = sample.Probe(corpus.open(), 64, 'cpu'), small(n_head=2), small(n_embd=128, n_layer=3)
    dice = torch.get_rng_state()
    assert probe.take(narrow, 0, 0.0, math.inf) == [] and probe.state['due'] == 0.00625
    assert probe.take(narrow, 0, 0.0, math.inf) == [] and len(probe.state['rows']) == 1
    with torch.no_grad():
        narrow.blocks[1].attn.v.weight[3, 5] = math.nan
    bad = probe.take(narrow, 10, 0.3, math.inf)
    assert {'1.attn.v activation', '1.attn.v weight', '1.attn.ov.0 weight', '1.mlp.down activation', '0.attn.v gradient'} <= {*bad}
    assert not {'0.attn.v activation', '0.attn.v weight', '1.mlp.down weight', '1.attn.ov.1 weight'} & {*bad} and probe.state['due'] == 0.4
    probe.take(wide, 20, 0.4, math.inf)
    probe.take(wide, 30, 0.95, math.inf)
    assert probe.state['due'] == math.inf
    found = json.loads(json.dumps(probe.finish()))
    assert torch.equal(dice, torch.get_rng_state())                                # a run draws what it would have
    assert (found['steps'], found['progress']) == ([0, 10, 20, 30], [0, 0.3, 0.4, 0.95])
    names, of = found['names'], found['measures']
    assert names[:4] == ['0.attn.v', '0.attn.proj', '0.mlp.down', '0.attn.ov.0'] and names[-1] == '2.attn.ov.3' and len(names) == 21
    place = names.index
    assert all(len(row) == 21 for rows in of.values() for row in rows)
    assert of['cka_final'][2][place('2.mlp.down')] == 1 and of['cka_final'][0][place('2.mlp.down')] is None
    assert 0 < of['cka_final'][0][place('1.mlp.down')] < 1 and of['cka_final'][1][place('1.mlp.down')] is None
    assert of['cka_previous'][0][0] is None and of['cka_previous'][1][0] == 1 and 0 < of['cka_previous'][2][0] < 1
    assert of['cka_previous'][2][place('1.attn.v')] is None and of['weight_gini'][1][place('1.attn.v')] is None
    assert of['weight_gini'][1][0] == of['weight_gini'][0][0] > 0 and of['gradient_gini'][1][0] is None
    assert {'pwcca_final', 'gradient_effective_rank', 'weight_condition_number', 'activation_hoyer'} <= {*of}


@pytest.mark.parametrize('affordable, taken', [(100, 14), (20, 14), (19, 13), (13, 7), (8, 2), (2, 1)])
def test_probes_that_cost_more_than_their_share_are_fewer(corpus, monkeypatch, affordable, taken):
    """Here the first look takes 3 seconds, each after it one, and three are for the end."""
    probe, seconds = sample.Probe(corpus.open(), 64, 'cpu'), [0.0]
    monkeypatch.setattr(sample.time, 'monotonic', lambda: seconds[0])

    def look(model):
        seconds[0] += 1 if seconds[0] else 3
        return {}
    probe.look = look
    for step in range(1000):
        if step / 1000 >= probe.state['due']:
            probe.take(None, step, step / 1000, affordable / sample.PROBE_SHARE)
    at = [row['progress'] for row in probe.state['rows']]
    assert len(at) == taken and probe.state['seconds'] == taken + 3 and (taken == 1 or taken + 3 <= affordable - 3)


def test_a_compiled_model_is_not_compiled_again_for_a_probe(corpus):
    import torch._dynamo
    programs, model, probe = [], small(n_layer=1, n_embd=32), sample.Probe(corpus.open(), 64, 'cpu')
    compiled = torch.compile(model, dynamic=False, backend=lambda graph, _: programs.append(graph) or graph.forward)
    idx = torch.randint(257, (2, 64))
    for step in range(2):
        compiled(idx, idx.clone()).backward()
        model.zero_grad()
        probe.take(model, step, step / 2, math.inf)
        made = made if step else len(programs)
    compiled(idx, idx.clone()).backward()
    assert len(programs) == made > 0


# ---- judging what it writes

class Writes(Says):
    """Stands for a model that writes the same text after every prompt."""
    config = SimpleNamespace(doc_mask=True, domains='')

    def __init__(self, text, ends=True):
        super().__init__(*text.encode(), *[BYTES.bos] * ends)


@pytest.mark.parametrize('doc_mask', [True, False])
def test_continuations_are_those_of_each_prompt_alone(doc_mask):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, bos=256, block_size=64, n_layer=2, n_head=2, n_embd=32, doc_mask=doc_mask)).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.proj.weight)
    prompts = [[256, *text.encode()] for text in ('', 'Mia', 'Tom', 'Mia lost the kite', 'x')]
    for limit in (20, 60):                              # 60: past the block
        made, ended = sample.continuations(model, BYTES, prompts[:5 if limit == 20 else 1], limit, 0, None, rows=4)
        for prompt, ids, end in zip(prompts, made, ended):
            alone = [new.item() for new in model.generate(torch.tensor([prompt]), limit, 0)]
            alone = alone[:alone.index(256)] if 256 in alone else alone
            assert ids == alone and end == (len(ids) < limit)
    assert len({tuple(ids) for ids in made}) == len(made)


def test_continuations_end_with_the_document_or_when_done():
    assert sample.continuations(Writes('abc'), BYTES, [[256]] * 3, 9, 0, None, rows=2) == ([[*b'abc']] * 3, [True] * 3)
    assert sample.continuations(Writes('abc'), BYTES, [[256]], 3, 0, None) == ([[*b'abc']], [False])
    assert sample.continuations(Writes('abc'), BYTES, [[256]], 9, 0, None, lambda text: 'b' in text) == ([[*b'ab']], [False])


@pytest.mark.parametrize('chunk', [50, 1000, 1 << 18])
def test_what_stands_in_the_training_text(corpus, chunk):
    data = corpus.open()
    tokens, starts = data.tokens['train'][:8_000], data.docs['train']['start']
    docs = [sample.WORD.findall(BYTES.decode(ids).lower()) for ids in np.split(tokens, starts[(starts > 0) & (starts < 8_000)])]
    there = {gram for n in (1, 8) for gram in sample.ngrams(docs[:-1], n)}
    across = {tuple(a[-4:] + b[:4]) for a, b in zip(docs, docs[1:])} - there
    other = {gram[:7] + ('zebra',) for gram in there if len(gram) == 8} | {gram[::-1] for gram in there if len(gram) == 8} - there
    assert len(there) > 300 and len(across) > 50 and not any('🙂' in word for gram in there for word in gram)
    grams = there | across | other | {('zebra',), ('\0',)}
    assert sample.in_training(tokens, BYTES, grams, chunk) == there


def test_text_quality_of_a_text_counted_by_hand():
    result = sample.text_quality(Writes('The cat sat. The cat sat. The cat sat.'), BYTES, n=10)
    assert (result['accuracy'], result['items'], result['chance']) == (1, 10, None) and 0 < result['error'] < 0.1
    assert result['per_kind'] == pytest.approx(dict(ends_properly=1, ends=1, repeated_4=0.5, distinct_1=3 / 90,
                                                    distinct_2=3 / 80, distinct_3=3 / 70))
    cut = sample.text_quality(Writes('The cat sat. The ca'), BYTES, n=4, length=19)          # the last word is none
    assert cut['accuracy'] == cut['per_kind']['ends'] == 0 and cut['per_kind']['distinct_1'] == 3 / 16
    assert sample.text_quality(Writes('The cat sat. The cat sat.'), BYTES, n=4, length=12)['accuracy'] == 0
    assert sample.text_quality(Writes('and then'), BYTES, n=4)['per_kind']['ends'] == 1
    assert sample.text_quality(Writes('and then'), BYTES, n=4)['accuracy'] == 0


def test_text_quality_beside_the_held_out_text(corpus):
    data = corpus.open()
    text = BYTES.decode(data.tokens['train'][:data.docs['train']['start'][1]].tolist())
    copy = sample.text_quality(Writes(' ' + text), BYTES, data, n=40, length=250)
    assert copy['per_kind']['copied_8'] == copy['per_kind']['known_words'] == 1 and copy['per_kind']['ends'] == 1
    real = copy['held_out']
    assert real['ends'] == 1 and real['copied_8'] < 0.9 < real['known_words'] and real['distinct_2'] > 0.1
    odd = sample.text_quality(Writes(' xq zv kj bb xq zv kj bb.'), BYTES, data, n=40, length=250)
    assert odd['per_kind']['copied_8'] == odd['per_kind']['known_words'] == 0 and odd['held_out'].keys() == real.keys()
    halves = sample.text_quality(Writes('xq kite by the.'), BYTES, data, n=40)       # after a prompt, xq may end a word
    assert halves['per_kind']['known_words'] == (20 * 3 + 20 * 3) / (20 * 4 + 20 * 3)
    whole = sample.text_quality(Writes('x'), BYTES, data, n=10, length=10_000)['held_out']
    assert whole['ends'] == 1 and whole['ends_properly'] == 0         # these end in a smiling face
    prompts, (rest, ended) = sample.held_out(data, 40, 110, 1)
    assert {len(p) for p in prompts} == {1, 9} and all(p[0] == 256 for p in prompts)
    assert max(map(len, rest)) == 110 and [len(ids) < 110 for ids in rest] == ended and 5 < sum(ended) < 35


FINE = 'def f():\n    return 1\n'
ESCAPES = dict(
    fork='import os\nfor _ in range(4):\n    os.fork()',
    starts='import subprocess\nsubprocess.run(["touch", "OUT/new"])', system='import os\nos.system("touch OUT/new")',
    writes='open("OUT/new", "w").write("x")', removes='import os\nos.remove("OUT/there")', renames='import os\nos.rename("OUT/there", "x")',
    links='import os\nos.symlink("OUT", "x")\nopen("x/new", "w")', up='import os\nos.mkdir("../new")', bytes_='import os\nos.open(b"OUT/new", os.O_CREAT)',
    socket='import socket\nsocket.socket()', kills='import os\nos.kill(os.getppid(), 9)', group='import os\nos.killpg(os.getpgid(os.getppid()), 9)')
ENDLESS = dict(loop='while True: pass', prints='while True: print("x" * 10 ** 6)', sleeps='import time\ntime.sleep(9)')
OTHERS = dict(
    memory='x = bytearray(1 << 29)', recursion='def g(): return g()\ng()',
    deep='import sys\nsys.setrecursionlimit(10 ** 9)\ndef g(): return g()\ng()', leaves='import sys\nsys.exit(0)', drops='import os\nos._exit(0)',
    files='for i in range(100): open(str(i), "w")', large='open("x", "wb").write(bytes(1 << 25))',
    threads='import threading\nthreading.Thread(target=print).start()')


def nothing_held(folder):
    return []


def left_behind(folder):
    """Processes that were started with a temporary folder below `folder`."""
    def belongs(pid):
        with contextlib.suppress(OSError):
            return f'TMPDIR={folder}'.encode() in sample.Path('/proc', pid, 'environ').read_bytes()
    return [pid for pid in os.listdir('/proc') if pid.isdigit() and belongs(pid)]


def contained(program, tmp_path, monkeypatch, **limits):
    out, temp = tmp_path / 'out', tmp_path / 'temp'
    out.mkdir(), temp.mkdir()
    (out / 'there').write_text('x')
    monkeypatch.setattr(sample.tempfile, 'tempdir', str(temp))
    stages, held = sample.judged(FINE + program.replace('OUT', str(out)) + '\n', 'assert f() == 1', **limits)
    assert [p.name for p in out.iterdir()] == ['there'] and not any(temp.iterdir()) and not left_behind(temp)
    return stages, held


linux = pytest.mark.skipif(sys.platform != 'linux', reason='programs are judged on Linux alone')


@linux
@pytest.mark.parametrize('layer', ['kernel', 'python'])
@pytest.mark.parametrize('name', ESCAPES)
def test_each_layer_alone_contains_an_escape(name, layer, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, 'kernel_confines' if layer == 'python' else 'python_confines', nothing_held)
    source = sample.inspect.getsource
    monkeypatch.setattr(sample.inspect, 'getsource', lambda function: source(function).replace(
        'def nothing_held', f'def {"kernel" if layer == "python" else "python"}_confines'))
    stages, held = contained(ESCAPES[name], tmp_path, monkeypatch)
    if layer == 'kernel' and ('Landlock' not in held or 'seccomp' not in held):
        pytest.skip('the kernel has no Landlock or no seccomp')
    assert stages == ['parses']


@linux
@pytest.mark.parametrize('name', [*ENDLESS, *OTHERS])
def test_what_takes_too_much_is_contained(name, tmp_path, monkeypatch):
    assert contained((ENDLESS | OTHERS)[name], tmp_path, monkeypatch, seconds=1, memory=1 << 28)[0] == ['parses']


@linux
def test_a_program_reaches_its_stages():
    assert sample.judged(FINE, 'assert f() == 1')[0] == ['parses', 'runs', 'passes']
    assert sample.judged(FINE, 'assert f() == 2')[0] == ['parses', 'runs']
    assert sample.judged(FINE + 'import sys\ndef f(): sys.exit(0)\n', 'assert f() == 1')[0] == ['parses', 'runs']
    assert sample.judged(FINE + '1 / 0\n', 'assert f() == 1')[0] == ['parses']
    for text in ('def f(:', '(' * 100_000, 'x = "\0"', 'return 1', 'no body'):
        assert sample.judged(text, '')[0] == []
    own = 'import math, json, dataclasses, tempfile\nwith open("x", "w") as f: f.write("x")\ntempfile.TemporaryFile().write(b"x")\n'
    assert sample.judged(own + FINE, 'assert f() == 1')[0] == ['parses', 'runs', 'passes']


TASKS = [dict(task_id=f'{kind}/0', prompt='\n\ndef f(n):\n    """ n + 1 """\n', entry_point='f', test=test)
         for kind, test in dict(Right='def check(c):\n    assert c(1) == 2', Wrong='def check(c):\n    assert c(1) == 3').items()]


@linux
def test_python_tasks_by_hand(monkeypatch):
    result = sample.python_tasks(Writes('\n    return n + 1\nprint(f(3)\n'), BYTES, TASKS, n=2)
    assert result['accuracy'] == 0.5 and result['error'] == pytest.approx(0.5 / math.sqrt(2)) and result['items'] == 2
    assert result['per_kind'] == dict(Right=1, Wrong=0) and result['parses'] == result['runs'] == 1 and result['chance'] is None
    assert sum(result['held_by'].values()) == 4 and all('audit hook' in held for held in result['held_by'])
    for text in ('\n    return n +', '', '\nprint(3)', ')'):
        none = sample.python_tasks(Writes(text), BYTES, TASKS[:1])
        assert none['accuracy'] == none['parses'] == none['runs'] == 0 and none['flagged'] is None
    monkeypatch.setattr(sample.importlib.util, 'find_spec', lambda name: None)
    assert sample.flagged([FINE]) is None
    monkeypatch.setattr(sys, 'platform', 'win32')
    with pytest.raises(UserError, match='Linux'):
        sample.python_tasks(Writes(''), BYTES, TASKS)


def test_programs_that_bandit_flags():
    pytest.importorskip('bandit')
    assert sample.flagged([FINE, 'eval(input())\n', FINE, FINE]) == 0.25


def test_problems_from_files_and_folders(tmp_path):
    text = ''.join(json.dumps(task | dict(more=1)) + '\n' for task in TASKS).encode()
    for name, content in {'own.jsonl': text, 'HumanEval.jsonl': text, 'mbpp_v1.jsonl.xz': lzma.compress(text)}.items():
        (tmp_path / name).write_bytes(content)
    assert sample.read_problems(tmp_path / 'own.jsonl') == TASKS and sample.read_problems(tmp_path) == TASKS * 2
    (tmp_path / 'empty').mkdir()
    for name, content in {'cut.jsonl': b'{"task_id', 'other.jsonl': b'{"task_id": "x"}\n', 'none.jsonl': b'', 'list.jsonl': b'[]\n',
                          'number.jsonl': json.dumps(TASKS[0] | dict(test=1)).encode(), 'cut.jsonl.xz': lzma.compress(text)[:40]}.items():
        (tmp_path / 'empty' / name).write_bytes(content)
        with pytest.raises(UserError, match=f'{name} (holds|has) no'):
            sample.read_problems(tmp_path / 'empty' / name)
    for name in ('empty', 'gone'):
        with pytest.raises(UserError, match=name):
            sample.read_problems(tmp_path / name)


HUMANEVAL = ROOT.parent / 'shared' / 'data' / 'code' / 'humaneval.jsonl.xz'


@linux
@pytest.mark.skipif(not HUMANEVAL.exists(), reason='HumanEval is not here')
def test_reference_solutions_pass():
    rows = [json.loads(line) for line in lzma.open(HUMANEVAL)]
    assert len(sample.read_problems(HUMANEVAL)) == len(rows) == 164
    for row in rows[::40]:
        program, test = row['prompt'] + row['canonical_solution'], f'{row["test"]}\ncheck({row["entry_point"]})'
        assert sample.judged(program, test)[0] == ['parses', 'runs', 'passes'], row['task_id']
        assert sample.judged(row['prompt'] + '    return None\n', test)[0] == ['parses', 'runs'], row['task_id']


def test_evaluations_on_the_command_line(ask, tmp_path):
    out = ask('--eval=text', f'--json={tmp_path}/told.json')
    result = json.loads((tmp_path / 'told.json').read_text())['text']
    assert re.search(r'known_words +0.\d+   held-out text 1.0000', out) and result['items'] > 50 and result['held_out']['known_words'] > 0.5
    with pytest.raises(UserError, match='problems'):
        ask('--eval=python', f'--eval_data={tmp_path}')

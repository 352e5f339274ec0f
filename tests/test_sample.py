"""sample.py: what it prints, and what train.py measures by it."""
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

import prepare_data
import sample
from config import babylm
from conftest import ROOT, script, stack
from model import GPT, GPTConfig
from prepare_data import UserError

BYTES = prepare_data.ByteTokenizer()


class Says:
    """Stands for a model that says the same ids whatever it is asked."""
    wte = SimpleNamespace(weight=torch.zeros(1))

    def parameters(self):
        return iter([self.wte.weight])

    def __init__(self, *ids):
        self.ids = ids

    def generate(self, idx, max_new_tokens, *options, **further):
        for new in self.ids[:max_new_tokens]:
            yield torch.full((len(idx),), new)


class Costs(torch.nn.Module):
    """Stands for a model: nats of a target token from a table."""

    def __init__(self, table, block_size=64):
        super().__init__()
        self.table, self.config = torch.nn.Parameter(table), SimpleNamespace(block_size=block_size)
        self.compute_dtype = torch.float32

    def forward(self, idx, targets, reduction):
        assert not torch.is_grad_enabled(), 'what is measured keeps nothing for a step backwards'
        assert reduction == 'none' and idx.shape == targets.shape and idx.shape[1] <= self.config.block_size
        return torch.where(targets >= 0, self.table[targets.clamp(min=0)], 0.0)


class Writes(Says):
    """Stands for a model that writes the same text after every prompt."""
    config = SimpleNamespace(doc_mask=True)

    def __init__(self, text, ends=True):
        super().__init__(*text.encode(), *[BYTES.bos] * ends)


def measure(evals='', kind=sample.Measure, data=None, tokenizer=BYTES, **settings):
    return kind(SimpleNamespace(evals=evals, eval_data='nowhere', **settings), tokenizer, data)


def of_sets(bos=True, **sets):
    """A Measure of evaluation sets that are given."""
    made = measure()
    made.sets, made.bos = sets, bos
    return made


def judge(model, items, n=None, bos=True, **options):
    return of_sets(bos, x=items).judge(model, 'x', n, **options)


def costs_of(model, items, **options):
    return measure().option_costs(model, items, **options)


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


def test_how_tokens_are_drawn(ask):
    """min_p of 1 leaves the likeliest alone; a penalty above 1 says other things; what cannot be is refused."""
    greedy = ask('Mia', '--temperature=0')
    assert ask('Mia', '--min_p=1', '--temperature=1') == greedy != ask('Mia', '--temperature=0', '--repetition_penalty=3')
    for wrong in ('--min_p=2', '--repetition_penalty=0', '--top_p=0'):
        with pytest.raises(UserError, match='it must lie between'):
            ask('Mia', wrong)


def test_as_a_user(finished, tmp_path):
    (tmp_path / 'prompts.txt').write_text('Mia lost\nZoë 🙂\n', encoding='utf-8')
    code, out, err = script('sample.py', finished[0], '--file', 'prompts.txt', '--temperature=0', '--device=cpu', cwd=tmp_path)
    assert code == 0 and not err and out.startswith('Mia lost') and '\nZoë 🙂' in out
    code, out, err = script('sample.py', tmp_path / 'nothing', cwd=tmp_path)
    assert code == 2 and 'nothing' in err and 'Traceback' not in err and not out


def test_a_file_that_is_not_there(finished, tmp_path):
    code, out, err = script('sample.py', finished[0], '--file=no_such_file', '--device=cpu', cwd=tmp_path)
    assert code == 2 and err == 'sample.py: no_such_file: No such file or directory\n' and not out


def test_prompts_that_an_editor_wrote(ask, tmp_path):
    (tmp_path / 'prompts').write_bytes('\ufeffMia\x0clost\r\nTom\x85\n'.encode())
    out = ask(f'--file={tmp_path}/prompts', '--temperature=0')
    assert out.startswith('Mia\x0clost') and '\nTom\x85' in out


@pytest.mark.parametrize('args', [['Zo\udceb'], ['--file=prompts'], ['--interactive']])
def test_prompts_that_are_not_utf8(ask, monkeypatch, tmp_path, args):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'prompts').write_bytes(b'Mia\nZo\xeb\n')
    monkeypatch.setattr(sys, 'stdin', open('prompts', encoding='utf-8'))
    with pytest.raises(UserError, match='not UTF-8'):
        ask(*args)


def test_files_begin_at_home(ask, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'prompts').write_text('Mia')
    assert ask('--file=~/prompts').startswith('Mia')
    with pytest.raises(UserError, match=f'{tmp_path}/no_run'):
        sample.main(['~/no_run'])


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


@pytest.mark.parametrize('kv_heads, values', [(6, 768), (2, 256)])
def test_stats_say_what_the_cache_holds(kv_heads, values, monkeypatch, capsys):
    model = GPT(GPTConfig(vocab_size=257, bos=256, n_layer=2, n_embd=384, n_head=6, n_kv_head=kv_heads, mlp_hidden=32, block_size=16))
    monkeypatch.setattr(sample, 'open_run', lambda *args: SimpleNamespace(model=model, tokenizer=BYTES))
    sample.main(['run', 'Mia', '--stats', '--max_new_tokens=2', '--device=cpu'])
    assert capsys.readouterr().out.splitlines()[-1] == f'KV cache: {values} values a token and layer'


def test_a_prompt_longer_than_a_block(ask):
    assert len(ask('Mia lost the kite. ' * 20)) > 380


@pytest.mark.parametrize('wrong', ['--samples=0', '--temperature=-1', '--temperature=nan', '--top_p=0', '--top_p=1.1',
                                   '--top_k=-1', '--max_new_tokens=0', '--seed=-1', '--seed=123456789012345678901',
                                   '--device=cuda:99', '--device=abacus', '--eval=all --stats'])
def test_arguments_that_cannot_work(ask, wrong):
    with pytest.raises(UserError):
        ask('Mia', *wrong.split())


@pytest.mark.parametrize('wrong', ['--temperature=warm', '--nonsense', '--samples=1.5'])
def test_arguments_that_are_none(ask, wrong):
    with pytest.raises(SystemExit) as e:
        ask(wrong)
    assert e.value.code == 2


def test_settings_that_no_idea_declares(ask):
    with pytest.raises(UserError, match='no setting is called nonsense'):
        ask('--nonsense=1')
    assert ask('Mia', '--temp=0') == ask('Mia', '--temperature=0')             # argparse knows the name by its beginning


def test_a_checkpoint_of_before_names_the_commit_that_reads_it(finished, tmp_path):
    state = torch.load(finished[0] / 'ckpt.pt', weights_only=True)
    for version, said in ((2, 'git checkout fb45184'), (4, 'reads version 3$')):
        torch.save(state | dict(version=version), tmp_path / 'ckpt.pt')
        with pytest.raises(UserError, match=said):
            sample.read_checkpoint(tmp_path)


IDEA = '''"""A measure of a test: how often a letter stands in the validation text."""
import sample

letter: str = 'a'        # what is counted
LATER = 3


class Measure(sample.Measure):
    def known(self):
        return super().known() | dict(letters=self.letters)

    def seconds(self, name, token_seconds):
        return LATER * token_seconds if name == 'letters' else super().seconds(name, token_seconds)

    def letters(self, model, n, stop):
        if stop and stop():
            return None
        if self.s.letter == 'q':
            raise sample.UserError('q is not counted')
        return dict(count=self.tokenizer.decode(self.data.tokens['val'][1:100].tolist()).count(self.s.letter), n=n)

    def lines(self, name, result):
        yield from super().lines(name, result)
        yield from [f'that was {self.s.letter}'] * (name == 'letters')
'''


def test_an_idea_measures(finished, corpus, tmp_path, capsys):
    (tmp_path / 'letters.py').write_text(IDEA)
    said = []
    for more in [], ['--letter=e'], ['--letter=q']:
        sample.main([str(finished[0]), str(tmp_path / 'letters.py'), '--eval=letters', '--eval_items=7', '--device=cpu', *more])
        said.append(capsys.readouterr().out.splitlines())
    text = BYTES.decode(corpus.open().tokens['val'][1:100].tolist())
    for letter, lines in zip('ae', said):
        assert lines == [f'letters count: {text.count(letter)}', 'letters n: 7', f'that was {letter}']
    assert said[2] == ['left out: q is not counted'] and text.count('a') != text.count('e')
    for wrong, why in (('--letters=e', 'did you mean letter?'), ('--temperatur=1', '')):
        with contextlib.nullcontext() if not why else pytest.raises(UserError, match=re.escape(why)):
            sample.main([str(finished[0]), str(tmp_path / 'letters.py'), '--eval=letters', '--device=cpu', wrong])


def test_weights_that_were_measured_are_those_that_are_asked(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / 'run')
    state = torch.load(tmp_path / 'run' / 'ckpt.pt', weights_only=True)
    others = {name: weight + 1 for name, weight in state['model'].items()}
    torch.save(state | dict(evaluated=others), tmp_path / 'run' / 'ckpt.pt')
    asked, _ = sample.load(tmp_path / 'run')
    assert torch.equal(asked.wte.weight, state['model']['wte.weight'] + 1)
    torch.save(state | dict(config=state['config'] | dict(n_embd=128)), tmp_path / 'run' / 'ckpt.pt')
    with pytest.raises(UserError, match='does not fit config/ as it is now .*size mismatch'):
        sample.load(tmp_path / 'run')


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
    options = SimpleNamespace(samples=2, max_new_tokens=5, temperature=0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    sample.complete(model, BYTES, 'x', options, None)
    assert capsys.readouterr().out == '--- 1\nxab\n--- 2\nxab\n'


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
    assert sample.continuations(Writes('abc'), BYTES, [[256]], 9, 0, None, done=lambda text: 'b' in text) == ([[*b'ab']], [False])


def test_a_model_without_finite_numbers_writes_nothing():
    model = small_model()
    model.lm_head.weight.data.fill_(math.nan)
    for temperature in (0, 1):
        with pytest.raises(FloatingPointError, match='no finite numbers'):
            sample.continuations(model, BYTES, [[256]], 9, temperature, None)
    said, made = [], measure()
    made.say, made.known = said.append, lambda: dict(x=lambda *_: sample.continuations(model, BYTES, [[256]], 9, 1, None))
    assert dict(made.ask(model, dict(x=1))) == {} and 'left out: the model gives no finite numbers' in said


def test_what_is_not_finite_is_null():
    found = dict(a=math.nan, b=[1.5, dict(c=-math.inf)], d='NaN', e=0.1)
    assert json.loads(sample.as_json(found)) == dict(a=None, b=[1.5, dict(c=None)], d='NaN', e=0.1)


def test_continuations_that_are_stopped():
    """What is not through by then is None, the batches before are whole; longer prompts come first."""
    asked = []
    made, ended = sample.continuations(Writes('abc'), BYTES, [[256], [256, 97], [256, 98]], 9, 0, None, rows=2,
                                       stop=lambda: asked.append(1) or len(asked) > 6)
    assert made == [None, [*b'abc'], [*b'abc']] and ended[1:] == [True, True] and len(asked) == 7


# ---- bits per byte

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


def test_of_one_document_out_of_several_no_error_is_known():
    tokens, docs = split(60)
    docs['source'] = np.arange(len(docs)) // (len(docs) // 2)      # few of each are in so small a part
    part = sample.bits_per_byte(Costs(torch.rand(257)), tokens, docs, slices=1)
    assert part['share'] < 1 and (math.isnan(part['error']) or part['per_source_error'].keys() == part['per_source'].keys())
    docs['source'] = 0
    n = next(n for n in range(1, sample.SLICES) if sample.bits_per_byte(Costs(torch.rand(257)), tokens, docs, slices=n)['tokens'])
    assert math.isnan(sample.bits_per_byte(Costs(torch.rand(257)), tokens, docs, slices=n)['error'])
    one, doc = split(1)
    assert sample.bits_per_byte(Costs(torch.rand(257)), one, doc)['error'] == 0


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


def test_documents_that_are_read_in_several_ways():
    tokens, docs = split(300)
    model, doubled = Costs(torch.rand(257)), Costs(torch.rand(257))

    class Two(sample.Measure):
        further = ('other',)

        def read(self, model, texts, max_tokens):
            texts = [*texts]
            one, two = (sample.document_nats(m, texts, max_tokens) for m in (model, doubled))
            return {doc: [one[doc], two[doc]] for doc in one}
    data = SimpleNamespace(tokens=dict(val=tokens), docs=dict(val=docs), meta=dict(sources=['a', 'b']), folder=sample.Path('nowhere'))
    found = measure('bpb', Two, data).bpb(model)
    plain, other = (sample.bits_per_byte(m, tokens, docs) for m in (model, doubled))
    assert found.pop('bpb_other') == pytest.approx(other['bpb'], rel=1e-12)
    assert found.pop('per_source') == dict(zip('ab', plain.pop('per_source').values()))
    found.pop('per_source_error'), plain.pop('per_source_error')
    assert found == plain


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
    return sample.tokenize_items([sample.eval_item(pair, 'x') for pair in pairs], tokenizer)


def score(model, tokenizer, pairs, **options):
    return judge(model, items_of(pairs, tokenizer), **options)


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
    one = costs_of(model, items, max_tokens=1)
    assert one == pytest.approx(costs_of(model, items), rel=1e-5) and one.std() > 1


def test_shuffled_labels_give_chance():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, bos=256, block_size=64, n_layer=1, n_head=2, n_embd=32))
    rng = np.random.default_rng(0)
    letters = 'abcdefgh'
    made = [dict(kind='x', context='Mia', good=' ' + letters[a], bad=' ' + letters[b])
            for a, b in rng.integers(0, 8, (600, 2)) if a != b]
    assert 0.4 < score(model, BYTES, made)['accuracy'] < 0.6


def test_a_judge_that_is_stopped():
    """It says the share of the items that it judged, the first of any part, and does the first part in any case."""
    items = items_of([p | dict(kind=f'{i % 4}') for i, p in enumerate(pairs(800))])
    model, asked = Costs(table(a=0.5)), []
    stopped = judge(model, items, stop=lambda: asked.append(1) or len(asked) == 4, max_tokens=64)
    assert stopped['items'] == 200 and stopped['share'] == 0.25 and len(stopped['per_kind']) == 4
    assert judge(model, items, stop=lambda: True, max_tokens=64)['items'] == 50
    n = -(-8192 * 800 // len(items['ids']))                            # what is read at once is more than a sixteenth
    assert judge(model, items, stop=lambda: True) == judge(model, items, n=n) | dict(share=n / 800) and 100 < n < 300
    whole = judge(model, items, stop=lambda: False, max_tokens=64)
    assert whole == judge(model, items) and 'share' not in whole
    two = of_sets(x=items, y=items)
    late = iter([False, True, True])
    assert [name for name, _ in two.ask(model, dict(x=40, y=40), lambda: next(late))] == ['x']


def test_what_a_clock_affords():
    few = of_sets(x=items_of(pairs(100)), y=items_of(pairs(30)))
    each = few.tokens_of(dict(x=1))
    assert few.tokens_of(dict(x=100, y=30)) == pytest.approx(len(few.sets['x']['ids']) + len(few.sets['y']['ids']))
    assert few.affordable(math.inf, 1e9) == dict(x=100, y=30) and few.affordable(50, 1e9) == dict(x=50, y=30)
    assert few.affordable(math.inf, 65 * each) == dict(x=50, y=20) and few.affordable(math.inf, 1) == dict(x=20, y=20)
    assert measure().affordable(1000, 1e9) == {}


def test_measures_of_ideas_are_planned_by_what_they_cost():
    class Slow(sample.Measure):
        def known(self):
            return super().known() | dict(texts=None, states=None, long=None)

        def seconds(self, name, token_seconds):
            return dict(texts=32, long=9000).get(name, 0) * token_seconds
    made = measure(kind=Slow)
    assert made.named == ['texts', 'states', 'long']                 # what ideas add is measured unless something is named
    assert made.plan(4.0, 0.01) == dict(texts=(12, pytest.approx(12 * 0.32)), states=(0, 0))
    assert {name: n for name, (n, _) in made.plan(4.0, 1e-5).items()} == dict(texts=256, states=0, long=44)
    assert measure('bpb,texts', Slow).named == ['bpb', 'texts'] and measure('bpb', Slow).plan(1, 1) == {}
    with pytest.raises(UserError, match='other is no evaluation and no file: put it into nowhere, or name some of bpb, texts'):
        measure('texts,other', Slow)


def test_a_line_of_a_report():
    result = judge(Costs(table(a=0.5)), items_of(pairs()))
    assert measure().line('x', result | dict(more=12345)) == (
        'x: 1.0000 +- 0.0329 on 40 items, chance 0.5, shortest 0.5, ties 0, more 12,345 (odd 1.000, even 1.000)')
    assert measure().line('x', dict(per_layer=[0.5, 0.25])) == 'x per_layer: 0.5, 0.25'


# ---- evaluation sets from files


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
        assert sample.read_items(tmp_path / name) == (expected, [])
    ours = dict(kind='place', context='Mia left.', good=' She did.', bad=' He did.')
    (tmp_path / 'pairs.jsonl').write_text(json.dumps(ours) + '\n')
    made = dict(kind='place', field='', context='Mia left.', options=[' She did.', ' He did.'])
    assert sample.read_items(tmp_path / 'pairs.jsonl') == ([made], [])
    (tmp_path / 'cut.jsonl').write_bytes(text + b'{"sentence_good": "A lo\n')
    assert sample.read_items(tmp_path / 'cut.jsonl') == (expected, ['cut.jsonl line 4'])
    for name, content in {'no.jsonl': b'{"text": "x"}\n', 'empty.jsonl': b'', 'bad.jsonl': b'{', 'cut.jsonl.xz': text[:20],
                          'list.jsonl': b'[1]\n', 'x.tar.xz': b'no tar'}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f'{name} (holds no items|cannot be read)'):
            sample.read_items(tmp_path / name)
    with pytest.raises(UserError, match='gone.jsonl'):
        sample.read_items(tmp_path / 'gone.jsonl')


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
    result = judge(model, sample.tokenize_items(items, BYTES), bos=bos)
    assert result['per_kind'] == pytest.approx({kind: np.mean(x) for kind, x in hits.items()})
    assert result['accuracy'] == pytest.approx(np.mean([np.mean(x) for x in hits.values()])) and result['items'] == 60
    assert 0.1 < result['accuracy'] < 0.9 and result['chance'] == 1 / choices


def test_last_words_agree_with_greedy_continuation(finished):
    model, _ = sample.load(finished[0])
    texts = ['Mia lost the ', 'Tom lost', 'Zoë looked', 'Mia lost t']
    said = [bytes(new.item() for new in model.generate(torch.tensor([[BYTES.bos, *text.encode()]]), 3, temperature=0))
            for text in texts]
    items = [dict(kind='x', context=text, options=[word]) for text, new in zip(texts, said) for word in (new.decode(), 'xqz')]
    made = sample.tokenize_items(items, BYTES)
    result = judge(model, made)
    assert result['accuracy'] == 0.5 and result['chance'] == 0 and result['items'] == 8 and result['ties'] == 0
    constant = small_model()
    constant.lm_head.weight.data.zero_()                      # every token as likely: none is the model's word
    assert judge(constant, made)['accuracy'] == 0


@pytest.mark.parametrize('choices', [2, 3, 5])
def test_untrained_models_and_shuffled_labels_are_at_chance(finished, choices):
    for model in (small_model(), sample.load(finished[0])[0]):
        result = judge(model, sample.tokenize_items(made_items(800, choices), BYTES))
        assert result['chance'] == pytest.approx(1 / choices)
        assert abs(result['accuracy'] - result['chance']) < 1.96 * result['error'] < 0.05, result


def test_ties_and_kinds_of_unequal_size():
    costs = Costs(table(a=0.5, c=0.5))
    rows = [dict(kind='big', context='', options=['xa', 'xb', 'xd'])] * 6 + [dict(kind='small', context='', options=['xa', 'xc'])] * 2
    result = judge(costs, sample.tokenize_items(rows, BYTES))
    assert result['accuracy'] == 0.5 and result['ties'] == 2 and result['per_kind'] == dict(big=1.0, small=0.0)
    assert result['chance'] == pytest.approx((1 / 3 + 1 / 2) / 2) and result['error'] > 0.05      # not 0 where all are alike
    fields = [dict(sentence_good='xa', sentence_bad='xb' if i else 'xc', UID=f'u{i}', linguistics_term='f' * (i > 1) or 'g')
              for i in range(4)]
    assert score(costs, BYTES, fields)['per_field'] == dict(g=0.5, f=1.0)


def test_evaluation_is_in_float32_and_leaves_the_model_as_it_was():
    model, items = small_model(), sample.tokenize_items(made_items(40, 2), BYTES)
    costs = costs_of(model, items)
    model.compute_dtype = torch.bfloat16
    torch.set_float32_matmul_precision('high')
    try:
        assert np.array_equal(costs_of(model, items), costs)
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
    for size, known in ((5, False), (0.001, True)):                                           # nor of a source that is half the text
        tokens, docs = split(40, sources=1)
        docs['source'][0], docs['bytes'][0] = 1, size * docs['bytes'][1:].sum()
        assert math.isfinite(sample.bits_per_byte(Costs(table), tokens, docs)['text_error']) == known


def test_texts_longer_than_the_model_looks_back_are_scored_whole():
    options = ['Mia' + ' saw a kite' * 12, 'Ned' + ' saw a kite' * 12]                  # they differ in what a last window lacks
    costs, items = Costs(table(M=0.5)), sample.tokenize_items([dict(kind='', context='', options=options)] * 3, BYTES)
    assert len(options[0]) > costs.config.block_size
    result = judge(costs, items)
    assert result['accuracy'] == 1 and result['ties'] == 0
    whole = small_model(block_size=16)
    long = sample.tokenize_items([dict(kind='', context='', options=['a' * 40, 'b' * 200])], BYTES)
    assert costs_of(whole, long)[1] > 4 * costs_of(whole, long)[0]


def test_a_model_without_numbers_knows_no_last_word():
    model, items = small_model(), sample.tokenize_items([dict(kind='', context='Mia lost', options=[' it'])] * 3, BYTES)
    model.wte.weight.data.fill_(math.nan)
    assert judge(model, items)['accuracy'] == 0


def test_any_first_part_holds_every_kind():
    items = [dict(kind=f'k{i // 7}', context='', options=[f'{i}a', f'{i}b']) for i in range(7 * 30)]
    kind = sample.tokenize_items(items, BYTES)['kind']
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
            sample.eval_set(tmp_path / name, BYTES, tmp_path / 'cache')


def test_what_taking_the_shortest_option_gets():
    items = [dict(kind=kind, context='Mia ', options=options) for kind, options in (
        ('a', ['ran', 'walked']), ('a', ['walked', 'ran']), ('b', ['sat', 'ran']), ('c', ['saw', 'ran', 'and', 'stayed']))]
    result = judge(Costs(torch.ones(257)), sample.tokenize_items(items, BYTES))
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
    assert [*told] == ['choices', 'pairs', 'words', 'bpb'] and told['choices']['items'] == 30
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
    short = [i for i in sample.read_items(BLIMP)[0] if max(map(len, i['options'])) < 40][::90][:200]
    right, kinds = {}, {i['kind'] for i in short}
    for item in short:
        good, bad = (plain_sum(model, text, True) for text in item['options'])
        right.setdefault(item['kind'], []).append(good > bad)
    result = judge(model, sample.tokenize_items(short, BYTES))
    assert len(short) > 100 and len(kinds) > 20 and result['per_kind'] == {kind: np.mean(ok) for kind, ok in right.items()}
    assert result['accuracy'] == pytest.approx(np.mean([np.mean(ok) for ok in right.values()]))


@pytest.mark.slow
@pytest.mark.skipif(not BLIMP.exists(), reason='BLiMP is not here')
def test_untrained_and_shuffled_on_blimp():
    items, bad = sample.read_items(BLIMP)
    assert len(items) == 66_995 and len(bad) == 1
    assert len({i['kind'] for i in items}) == 67 and len({i['field'] for i in items}) == 12
    coin = np.random.default_rng(0).random(len(items)) < 0.5
    shuffled = [i | dict(options=i['options'][::-1]) if flip else i for i, flip in zip(items, coin)]
    result = judge(small_model(block_size=256), sample.tokenize_items(shuffled, BYTES), n=20_000)
    assert abs(result['accuracy'] - 0.5) < 1.96 * result['error'] < 0.01


# ---- evaluation sets, tokenized

ROWS = [(dict(sentence_good='a', sentence_bad='b', linguistics_term='s-selection', UID='u'), '', ['a', 'b']),
        (dict(context='c', good=' a', bad=' b'), 'c', [' a', ' b']),
        (dict(sentence1='one', sentence2='two', label=1), '', ['two', 'one']),
        (dict(sentence='Why?\nA: x\nB: y z\nC: w', label='B'), 'Why?', [' y z', ' x', ' w']),
        (dict(input_prefix='Box 1 contains ', options=['a', 'b', 'c'], numops=2), 'Box 1 contains ', ['a', 'b', 'c']),
        (dict(context='c', options=['a', 'b', 'c'], label=2), 'c', ['c', 'a', 'b']),
        (dict(prompt='He said "yes, {answer}."', answer='Ann'), 'He said "yes,', [' Ann'])]
NO_ITEMS = [dict(text='x'), [1], 'x', dict(sentence_good='a'), dict(sentence_good='', sentence_bad='b'), dict(good=' ', bad=' '),
            dict(sentence_good='a', sentence_bad=1), dict(good='\ud800', bad='b'), dict(sentence='A: x\nB: y', label='D'),
            dict(options=['a', 'b'], label=2), dict(options=['a', 'b'], label=-1), dict(options='ab'), dict(options=['a']),
            dict(sentence1='a', sentence2='b', label='0'), dict(prompt='x', answer='')]


def test_every_form_of_an_evaluation_file_puts_the_right_option_first(tmp_path):
    for row, context, options in ROWS:
        (tmp_path / 'x.jsonl').write_text(json.dumps(row) + '\n')
        (item,), bad = sample.read_items(tmp_path / 'x.jsonl')
        assert (item['context'], item['options'], bad) == (context, options, [])
    items = [sample.eval_item(row, 'file') for row, _, _ in ROWS]
    assert [item['kind'] for item in items] == ['u', 'file', 'file', 'file', 'file_2_ops', 'file', 'file']
    assert items[0]['field'] == 'argument_structure'


def test_lines_that_hold_no_item_are_left_out_and_named(tmp_path):
    good = json.dumps(ROWS[0][0]).encode()
    for row in NO_ITEMS:
        (tmp_path / 'x.jsonl').write_bytes(json.dumps(row).encode() + b'\n\n' + good + b'\n{"good": "\xff", "bad": "b"}\n')
        items, bad = sample.read_items(tmp_path / 'x.jsonl')
        assert len(items) == 1 and bad == ['x.jsonl line 1', 'x.jsonl line 4'], row
    (tmp_path / 'x.jsonl').write_text('\n'.join(map(json.dumps, NO_ITEMS)))
    with pytest.raises(UserError, match='x.jsonl holds no items'):
        sample.read_items(tmp_path / 'x.jsonl')
    (tmp_path / 'x.jsonl').write_text('\n'.join(json.dumps(row) for row, _, _ in ROWS))
    with pytest.raises(UserError, match='mixes last words and choices'):
        sample.read_items(tmp_path / 'x.jsonl')


def test_the_first_items_hold_every_kind_in_proportion_and_neighbours_together():
    rows = [dict(kind=k, good=f'{k} {i} a', bad=f'{k} {i} b') for k, n in (('x', 60), ('y', 30), ('z', 7)) for i in range(n)]
    tokenizer = prepare_data.ByteTokenizer()
    items = sample.tokenize_items([sample.eval_item(row, '') for row in rows], tokenizer)
    texts = [tokenizer.decode(ids.tolist()) for ids in np.split(items['ids'], items['start'][1:-1])]
    assert sorted(texts) == sorted(row[side] for row in rows for side in ('good', 'bad'))
    kinds = items['kinds'][items['kind']]
    assert [text.split()[0] for text in texts[::2]] == kinds.tolist()
    for n in (24, 48, 72):
        assert abs((kinds[:n] == 'x').sum() - n * 60 / 97) <= 3 and abs((kinds[:n] == 'z').sum() - n * 7 / 97) <= 2
    number = [int(text.split()[1]) for text in texts[::2]]
    of_x = [i for i, kind in zip(number, kinds) if kind == 'x']
    assert of_x != sorted(of_x) and all(b == a + 1 for a, b in zip(of_x[::2], of_x[1::2]))
    assert all(items['ids'][items['start'][i] + seam] == ord('a') for i, seam in zip(range(0, 2 * len(rows), 2), items['seam']))


def test_tokenized_evaluation_sets_are_kept_until_something_changes(tmp_path, monkeypatch, capsys):
    tokenizer, file, cache = prepare_data.ByteTokenizer(), tmp_path / 'p.jsonl', tmp_path / 'data' / 'eval'
    cache.parent.mkdir()
    file.write_text(json.dumps(ROWS[0][0]) + '\nnone\n')
    calls, tokenize = [], sample.tokenize_items
    monkeypatch.setattr(sample, 'tokenize_items', lambda *args: calls.append(1) or tokenize(*args))
    first, again = (sample.eval_set(file, tokenizer, cache) for _ in 'ab')
    assert len(calls) == 1 and [p.name for p in cache.iterdir()] == ['p.npz']
    assert first.keys() == again.keys() and all(np.array_equal(first[key], again[key]) for key in first)
    (cache / 'p.npz').write_bytes((cache / 'p.npz').read_bytes()[:100])                  # damaged
    sample.eval_set(file, tokenizer, cache)
    file.write_text(json.dumps(ROWS[1][0]) + '\n')                                        # changed
    assert len(sample.eval_set(file, tokenizer, cache)['ids']) == 8 and len(calls) == 3
    other = prepare_data.ByteTokenizer(b'another')
    assert sample.eval_set(file, other, cache) and sample.eval_set(file, other) and len(calls) == 5
    assert sample.eval_files(tmp_path) == {'p': file} and sample.eval_files(tmp_path / 'none') == {}
    with pytest.raises(UserError, match='gone.jsonl does not exist'):
        sample.eval_set(tmp_path / 'gone.jsonl', tokenizer)


def test_evaluation_sets_of_a_prepared_data_set(tmp_path, capsys):
    (tmp_path / 'sets').mkdir()
    (tmp_path / 'sets' / 'p.jsonl').write_text(json.dumps(ROWS[0][0]) + '\nnone\n')
    (tmp_path / 'text.txt').write_text('\n\n'.join(f'{i} a line of text that is long enough' for i in range(400)))
    folder = stack(dataset=f'files:{tmp_path}/text.txt', tokenizer='bytes', data_dir=tmp_path / 'data').build(quiet=True)
    sample.main([str(folder), '--eval=all', f'--eval_data={tmp_path}/sets'])
    assert capsys.readouterr().out == ('p: left out 1 line without an item, the first is p.jsonl line 2\n'
                                       'p: 1 items, 1 kinds, 4 tokens\n')
    assert (folder / 'eval' / 'p.npz').exists()
    with pytest.raises(UserError, match='no evaluation sets'):
        sample.main([str(folder), '--eval=all', f'--eval_data={tmp_path}/data'])


def test_evaluation_sets_are_fetched_once(tmp_path, monkeypatch):
    (tmp_path / 'blimp.tar.gz').write_bytes(b'an archive')
    monkeypatch.setattr(sample, 'BLIMP', (tmp_path / 'blimp.tar.gz').as_uri())
    sample.fetch_evals(tmp_path / 'sets')
    assert (tmp_path / 'sets' / 'blimp.tar.gz').read_bytes() == b'an archive'
    (tmp_path / 'own').mkdir()
    monkeypatch.setattr(sample, 'BLIMP', (tmp_path / 'gone').as_uri())
    monkeypatch.setattr(prepare_data, 'PATIENCE', 0)
    sample.fetch_evals(tmp_path / 'own')                                            # a folder is left as it is
    with pytest.raises(UserError, match='could not be downloaded'):
        sample.fetch_evals(tmp_path / 'new')
    assert not (tmp_path / 'new').exists() and not [*(tmp_path / 'own').iterdir()]
    slept, tried = [], []
    monkeypatch.setattr(prepare_data, 'PATIENCE', 1)
    monkeypatch.setattr(prepare_data.time, 'sleep', slept.append)
    monkeypatch.setattr(prepare_data.urllib.request, 'urlopen', lambda *a, timeout: tried.append(timeout) or open(tmp_path / 'gone'))
    run, said = SimpleNamespace(evals='all', dataset='babylm', eval_data=str(tmp_path / 'new')), []
    measure = object.__new__(babylm.Measure)
    measure.s, measure.say = run, said.append
    with contextlib.suppress(AttributeError):        # what comes after is not its own
        measure.files()
    assert said and said[0].startswith('warning: no BLiMP') and slept == [1] and tried == [10, 10]      # of the half hour


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



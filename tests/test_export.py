"""Exports: what transformers and llama.cpp compute and spell is what sample.py does; a smaller run is a run."""
import base64
import dataclasses
import hashlib
import json
import math
import random
import re
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
import prepare_data
import sample
from config import export_gguf, export_hf, export_int4, export_int8, verb
from config.export_html import quantised
from conftest import ROOT, script
from prepare_data import UserError

BYTES, QUANTISED = prepare_data.ByteTokenizer(), dict(int8=quantised, int4=export_int4.quantised_4bit)
ODD = ['', ' ', '  a  b ', '\n', '\n\n\nx\n', '\ta\t', '\r\n', '\0', '\x07\x1b[0m\x7f\x85', 'kite', ' the kite by the barn.\n', '<s>', '<|endoftext|>',
       '<unk>', '<0x0A>', '<|user|>', '\u2581', 'a\u2581\u2581 \u2581b', '\ue009x\ue00a', '\ufeffa\ufeff', '\uffff', '\U0010ffff', 'e\u0301e', '🙂👨\u200d👩\u200d👧',
       '한국어 日本語 עברית', "it's 1234  don't\u00a0\u3000 \u2028", 'a' * 27, 'abab' * 9, ' ' * 900, '\n' * 300, 'x   ', '\u0130\u017f\u212a', 'İ', '. \n \t\n',
       'Räksmörgåsen åt på ön, sade han. Där är det över!', 'def f(x):\n    if x > 0:\n\t\treturn {"a": [x, -1.5e3]}  # å\n', '*MOT:\tno.\n*CHI:\tyes?\n']


def words(n, seed=0):
    dice, known = random.Random(seed), 'the a dog kite house tree saw ran took lost found red barn and then é ön'.split()
    return ' '.join(dice.choices(known, k=n))


@pytest.fixture(scope='module')
def tokenizers():
    """One of each kind; of bpe one that has no piece for a tab or a line's end, too."""
    pieces = [bytes([i]) for i in range(256)]
    for joined in ('th', 'he', ' t', ' th', 'the', ' the', 'ki', 'te', 'kite', ' kite', '  ', '    ', '\n\n', 'é', '日', 'aa', 'aaaa', '12', "'t", 're', 'ab', 'abab'):
        pieces.append(joined.encode())
    pieces += [f'<{i}>'.encode() for i in range(50256 - len(pieces))]
    texts = ['\n'.join(words(9, i) + '.' for i in range(300)), '*MOT:\tno.\n*CHI:\tyes?\n' * 50, 'abab aaaa ' * 20]
    return dict(bytes=BYTES, bpe=prepare_data.BPETokenizer.train(texts, 400), rare=prepare_data.BPETokenizer.train([words(4000)], 300),
                gpt2=prepare_data.GPT2Tokenizer(b''.join(b'%s %d\n' % (base64.b64encode(p), i) for i, p in enumerate(pieces))))


def ideas_of(*names):
    return prepare_data.Ideas([str(ROOT / 'config' / f'{name}.py') for name in names], [model.GPTConfig], strict=False)


SHAPES = {'llama': (['llama_shape'], dict()), 'llama tied': (['llama_shape'], dict(tie_embeddings=True, n_head=4, n_kv_head=2, rope_base=500.0)),
          'qwen3': (['qwen3_shape'], dict()), 'qwen3 relu2': (['qwen3_shape'], dict(mlp='relu2', n_kv_head=1, head_dim=24, tie_embeddings=True)),
          'stacked': (['llama_shape', 'qwen3_shape', 'dropout'], dict())}


def run_in(folder, names=(), tokenizer=BYTES, seed=0, data='', **options):
    """A finished run's folder, of a small model in which every weight counts; and the run as sample.py opens it."""
    torch.manual_seed(seed)
    ideas = ideas_of(*names)
    shape = {name: ideas.values[name] for name in ('qk_norm', 'token_shift', 'mlp')} | dict(n_layer=2, n_head=2, n_embd=64, block_size=64)
    config = model.configured(ideas)(vocab_size=tokenizer.vocab_size, bos=tokenizer.bos, **shape | options)
    net = config.GPT(config)
    with torch.no_grad():
        for w in net.parameters():
            w.normal_(std=1.0 if w.dim() < 2 else 1.5 * w.shape[1] ** -0.5)
    folder.mkdir(exist_ok=True)
    (folder / tokenizer.filename).write_bytes(tokenizer.blob)
    named = [(name, hashlib.sha256((ROOT / 'config' / f'{name}.py').read_bytes()).hexdigest(), True) for name in names]
    torch.save(dict(version=3, tokenizer=hashlib.sha256(tokenizer.blob).hexdigest(), ideas=named, settings={}, data=str(data), fingerprint='',
                    config=dataclasses.asdict(config), model=net.state_dict()), folder / 'ckpt.pt')
    return sample.open_run(folder)


def logits_of(net, ids):
    with torch.no_grad():
        return net.logits(net.trunk(torch.tensor([ids])))[0]


def some(n, seed=1, top=256):
    return random.Random(seed).choices(range(2, top), k=n)


# ---- transformers

def opened(folder):
    """The three lines of README."""
    transformers = pytest.importorskip('transformers')
    net = transformers.AutoModelForCausalLM.from_pretrained(folder / 'hf')
    return net, transformers.AutoTokenizer.from_pretrained(folder / 'hf')


@pytest.mark.parametrize('names, options', SHAPES.values(), ids=SHAPES)
def test_logits_in_transformers_are_those_of_the_model(tmp_path, names, options, capsys):
    pytest.importorskip('safetensors')
    run = run_in(tmp_path / 'run', names, **options)
    export_hf.write(run)
    net, tokenizer = opened(run.folder)
    ids, norm = [256, *some(50)], run.model.config.qk_norm
    with torch.no_grad():
        got, want = net(torch.tensor([ids])).logits[0], logits_of(run.model, ids)
    assert want.std() > 0.3 and (got - want).abs().max() < 1e-4
    assert type(net).__name__ == ('Qwen3ForCausalLM' if norm else 'LlamaForCausalLM') in capsys.readouterr().out
    text = tokenizer('Mia lost', return_tensors='pt')
    made = net.generate(**text, max_new_tokens=12, do_sample=False)[0].tolist()
    want = [new.item() for new in run.model.generate(text.input_ids, 12, temperature=0)]
    want = want[:want.index(256) + 1] if 256 in want else want
    assert made == [256, *b'Mia lost', *want] and net.generation_config.eos_token_id == [256]


@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'rare', 'gpt2'])
def test_ids_of_autotokenizer_are_those_of_training(tmp_path, tokenizers, kind):
    pytest.importorskip('safetensors')
    ours, dice = tokenizers[kind], random.Random(1)
    export_hf.write(run_in(tmp_path / 'run', ['llama_shape'], ours, n_layer=1, n_embd=2, n_head=1))
    _, theirs = opened(tmp_path / 'run')
    alphabet = [*'abcdehikt  \n\t\r é日🙂\u0301\u2581\ue009\ue00a\ufeff\0', ' the', ' kite', '.\n*CHI:\t']
    texts = ODD + [''.join(dice.choices(alphabet, k=dice.randrange(60))) for _ in range(300)] + [words(3000)]
    texts += [''.join(c for c in (chr(dice.randrange(*dice.choice([(0, 0x300), (0x3000, 0xD800), (0xE000, 0x110000)]))) for _ in range(30))
                      if kind != 'gpt2' or re.match(r'[^\W]|[\x00-\u02ff]', c)) for _ in range(200)]     # newer characters may be letters to one alone
    for text in texts:
        want = ours.encode(text)
        assert theirs(text).input_ids == [ours.bos, *want], repr(text)
        assert theirs(text, add_special_tokens=False).input_ids == want and theirs.decode(want) == text
    assert theirs.bos_token_id == theirs.eos_token_id == ours.bos and len(theirs) == ours.vocab_size


def test_what_has_no_equivalent_is_refused_by_name(tmp_path):
    shapes = 'train with config/llama_shape.py or config/qwen3_shape.py alone'
    for export in export_hf.write, export_gguf.write:
        for names, said in (([], 'run has token_shift and the token embedding mixed in at every layer, for which transformers and'),
                            (['qwen3_shape', 'softcap'], 'config/softcap.py changes the net, for which'),
                            (['attention_gate', 'llama_shape'], 'config/attention_gate.py changes the net, for which')):
            with pytest.raises(UserError, match=said) as e:
                export(run_in(tmp_path / 'run', names))
            assert str(e.value).endswith(shapes) and {p.name for p in (tmp_path / 'run').iterdir()} == {'ckpt.pt', BYTES.filename}
        unigram = prepare_data.BPETokenizer.train([words(4000)], 280, 'unigram')
        with pytest.raises(UserError, match='kind unigram, the export knows bpe, bytes and gpt2: train with one'):
            export(run_in(tmp_path / 'other', ['llama_shape'], unigram))
    for options, said in ((dict(token_shift=True), 'token_shift has no'), (dict(rotary_dim=8), 'rotary_dim is 8, the shapes')):
        with pytest.raises(ValueError, match=said):
            run_in(tmp_path / 'run', ['llama_shape'], **options)


def test_a_block_without_the_embedding_is_the_baseline_s_at_1_and_0(tmp_path):
    shaped = run_in(tmp_path / 'shaped', ['qwen3_shape']).model
    base = run_in(tmp_path / 'base', token_shift=False, mlp='swiglu').model
    assert not base.load_state_dict(shaped.state_dict()).missing_keys and torch.equal(logits_of(shaped, [256, 1, 2]), logits_of(base, [256, 1, 2]))
    assert not any('mix' in name for name, _ in shaped.named_parameters())


# ---- llama.cpp

@pytest.mark.parametrize('names', [['llama_shape'], ['qwen3_shape']])
@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'gpt2'])
def test_gguf_is_read_back(tmp_path, tokenizers, kind, names):
    gguf = pytest.importorskip('gguf')
    t, options = tokenizers[kind], dict(n_head=4, n_kv_head=2, tie_embeddings=True, mlp_hidden=96)
    run = run_in(tmp_path / 'run', names, t, **options)
    export_gguf.write(run)
    reader = gguf.GGUFReader(run.folder / 'model.gguf')
    field = {name: f.contents() for name, f in reader.fields.items()}
    tensors = {x.name: torch.from_numpy(x.data.copy()) for x in reader.tensors}
    arch, layer = field['general.architecture'], run.model.blocks[1]
    assert arch == names[0].split('_')[0] and field[f'{arch}.attention.head_count_kv'] == 2 and field[f'{arch}.context_length'] == 64
    q = tensors['blk.1.attn_q.weight'].view(4, 8, 2, 64).transpose(1, 2).reshape(64, 64) if arch == 'llama' else tensors['blk.1.attn_q.weight']
    gate, up = layer.mlp.up.weight.chunk(2)
    for got, want in ((q, layer.attn.q.weight), (tensors['blk.1.ffn_gate.weight'], gate), (tensors['blk.1.ffn_up.weight'], up),
                      (tensors['output.weight'], run.model.lm_head.weight), (tensors['token_embd.weight'], model.rms_norm(run.model.wte.weight))):
        assert torch.equal(got, want)
    assert len(tensors) == 3 + 2 * (11 if arch == 'qwen3' else 9) and {x.tensor_type.name for x in reader.tensors} == {'F32'}
    pieces, types = field['tokenizer.ggml.tokens'], field['tokenizer.ggml.token_type']
    assert len(pieces) == t.vocab_size and pieces[t.bos] == '<|endoftext|>' and field['tokenizer.ggml.bos_token_id'] == t.bos
    assert [i for i, type in enumerate(types) if type == gguf.TokenType.CONTROL] == [t.bos]
    assert field['tokenizer.ggml.model'] == ('gpt2' if kind == 'gpt2' else 'llama')
    if kind == 'gpt2':
        assert 'k i' in field['tokenizer.ggml.merges'] and 'Ġ kite' in field['tokenizer.ggml.merges']
    else:
        assert sum(type == gguf.TokenType.BYTE for type in types) == (255 if kind == 'bytes' else 256) and np.all(np.diff(field['tokenizer.ggml.scores']) < 0)


def test_rows_that_llama_cpp_cannot_take_are_refused(tmp_path):
    pytest.importorskip('gguf')
    for options, said in ((dict(mlp='relu2'), 'mlp is relu2, llama.cpp knows SiLU'), (dict(n_embd=48), 'n_embd makes rows of 48'),
                          (dict(mlp_hidden=100), 'mlp_hidden makes rows of 100'), (dict(head_dim=8), 'head_dim makes rows of 16')):
        with pytest.raises(UserError, match=said):
            export_gguf.write(run_in(tmp_path / 'run', ['llama_shape'], **options))


@pytest.mark.long
@pytest.mark.parametrize('names', [['llama_shape'], ['qwen3_shape']])
@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'gpt2'])
def test_llama_cpp_says_the_same(tmp_path, tokenizers, kind, names):
    """llama.cpp as the wheel xllamacpp has it; a U+2581 of a text is a space there, where a vocabulary is sentencepiece's."""
    pytest.importorskip('gguf')
    llama, t = pytest.importorskip('xllamacpp'), tokenizers[kind]
    run = run_in(tmp_path / 'run', names, t, n_head=4, n_kv_head=2, mlp_hidden=96, block_size=256)
    with torch.no_grad():
        run.model.lm_head.weight[t.bos] = 0      # it goes on
    export_gguf.write(run)
    given = llama.CommonParams()
    given.model.path, given.n_ctx, given.warmup, given.n_parallel, given.cpuparams.n_threads = str(run.folder / 'model.gguf'), 256, False, 1, 1
    given.cache_type_k = given.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    server = llama.Server(given)

    def ask(path, **what):
        url = urllib.request.Request(server.listening_address + path, json.dumps(what).encode(), {'Content-Type': 'application/json'})
        return json.load(urllib.request.urlopen(url))['tokens']
    for text in [*ODD, words(200)]:
        if kind == 'gpt2' or '\u2581' not in text:
            assert ask('/tokenize', content=text, add_special=True, parse_special=False) == [t.bos, *t.encode(text)], repr(text)
    ids = [t.bos, *t.encode('Mia lost the kite.')]
    want = [new.item() for new in run.model.generate(torch.tensor([ids]), 40, temperature=0)]
    got = ask('/completion', prompt=ids, n_predict=40, temperature=0, return_tokens=True, cache_prompt=False, ignore_eos=True)
    assert got == want and len({*got}) > 4


# ---- a smaller run

def test_int4_holds_what_it_can():
    torch.manual_seed(0)
    w = torch.randn(48, 64)
    w[3], w[4, :32] = 0, torch.linspace(-8, 7, 32).round() * 0.5
    q, scale = export_int4.quantised_4bit(w)
    dense = export_int8.Packed(q, scale).dense()
    x = w.unflatten(1, (-1, 32))
    step = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -8
    plain = ((x / torch.where(step == 0, 1, step)).round().clamp(-8, 7) * step).flatten(1)          # each group's peak exact
    assert q.shape == (48, 32) and q.dtype == torch.uint8 and scale.shape == (48, 2) and scale.dtype == torch.bfloat16
    assert torch.equal(dense[3], w[3]) and torch.equal(dense[4, :32], w[4, :32])
    assert 0.05 < (dense - w).std() < 0.97 * (plain - w).std()
    assert torch.equal(export_int8.Packed(q, scale).dense(torch.tensor([[1, 2]])), dense[1:3][None])


@pytest.mark.parametrize('kind', ['int8', 'int4'])
@pytest.mark.parametrize('rows', [1, 3, 40])
def test_a_packed_matrix_multiplies_as_what_it_stands_for(kind, rows):
    torch.manual_seed(0)
    for shape in (96, 64), (50, 32):
        w, x = torch.randn(shape), torch.randn(rows, 1, shape[1])
        packed = export_int8.Packed(*QUANTISED[kind](w)).on('cpu')
        dense = export_int8.Packed(packed.q, packed.scale).dense()
        assert ((packed.shape, packed.dtype) == (w.shape, torch.float32) and not packed.requires_grad
                and (packed.tiles is not None) == (kind == 'int4' and shape[0] == 96))
        want = F.linear(x, dense)
        assert F.linear(x, packed).shape == want.shape and (F.linear(x, packed) - want).abs().max() < 0.02 * want.abs().max()
        assert torch.equal(F.embedding(torch.tensor([[1, 7]]), packed), dense[torch.tensor([[1, 7]])])
        assert torch.equal(packed * 2, dense * 2) and torch.equal(torch.cat([packed, packed]), dense.repeat(2, 1))


@pytest.mark.parametrize('kind', ['int8', 'int4'])
@pytest.mark.parametrize('names, options', [([], {}), ([], dict(tie_embeddings=True)), (['qwen3_shape'], dict(n_embd=48)),
                                            (['attention_gate', 'value_embeds'], {}), (['experts'], {})], ids=str)
def test_a_smaller_run_is_opened_and_says_the_same(tmp_path, kind, names, options, capsys):
    run = run_in(tmp_path / 'run', names, n_head=2, **options)
    sample.main([str(run.folder), '--export', kind, '--device=cpu'])
    said = capsys.readouterr().out
    small = sample.open_run(run.folder / kind)
    assert said.startswith(f'{run.folder}/{kind}: ') and 'not measured' in said
    state, small_state = run.model.state_dict(), small.model.state_dict()
    assert state.keys() == small_state.keys() and small.model.params() == run.model.params() and small.model.describe() == run.model.describe()
    assert (small.model.wte.weight is small.model.lm_head.weight) == run.model.config.tie_embeddings
    assert any(isinstance(w, export_int8.Packed) for w in small.model.parameters())
    twin = run.model                             # with the weights that the smaller run stands for
    twin.load_state_dict({name: w.dense() if isinstance(w, export_int8.Packed) else w for name, w in small_state.items()})
    ids = [256, *some(40)]
    want = logits_of(twin, ids)
    assert (logits_of(small.model, ids) - want).abs().max() < 0.05 * want.abs().max()
    made = [*small.model.generate(torch.tensor([ids]), 40, temperature=0)]
    assert len(made) == 40 and all(0 <= new < 257 for new in made)


def test_sizes_of_an_11m_model(tmp_path, tokenizers):
    """config/babylm.py's shape; its vocabulary is as large as 8,192."""
    run = run_in(tmp_path / 'run', n_layer=7, n_head=5, n_embd=320, tie_embeddings=True)
    run.model.wte.weight = run.model.lm_head.weight = torch.nn.Parameter(torch.randn(8192, 320))
    assert run.model.params()['total'] > 11e6
    for kind, most in (('int8', 12e6), ('int4', 7e6)):
        run.state['config']['vocab_size'] = 8192
        verb('export', kind).write(run)
        assert most * 0.85 < (run.folder / kind / 'ckpt.pt').stat().st_size < most
        small = sample.open_run(run.folder / kind).model
        assert sum(w.q.nbytes + w.scale.nbytes for w in small.parameters() if isinstance(w, export_int8.Packed)) < most


def test_as_a_user(finished, tmp_path):
    """A trained run: what it costs in bits is said, and is what --eval finds; train.py is told that it cannot go on."""
    run = tmp_path / 'run'
    shutil.copytree(finished[0], run)
    code, out, err = script('sample.py', run, '--export=int8', cwd=finished[0].parent)
    assert code == 0 and not err and (cost := re.search(r'bits per byte (\S+) -> (\S+) \(([+-]\d\.\d\d) %\), on 100.0% of the validation', out)), out
    assert 0.99 < float(cost[1]) / float(cost[2]) < 1.01
    code, out, err = script('sample.py', run / 'int8', '--eval=bpb', cwd=finished[0].parent)
    assert code == 0 and abs(float(re.search(r'bpb bpb: (\S+)', out)[1]) - float(cost[2])) < 6e-5
    code, out, err = script('sample.py', run / 'int8', 'Mia', '--max_new_tokens=8', cwd=finished[0].parent)
    assert code == 0 and out.startswith('Mia')
    code, out, err = script('sample.py', run / 'int8', '--export=int4', cwd=finished[0].parent)
    assert code == 0 and (run / 'int8' / 'int4' / 'ckpt.pt').exists()
    code, out, err = script('train.py', '--init_from=resume', f'--out_dir={run / "int8"}', cwd=finished[0].parent)
    assert code == 2 and 'is a checkpoint of version int8, this program reads version 3' in err
    state = torch.load(run / 'int8' / 'ckpt.pt', weights_only=True)
    assert state['packed']['wte.weight'][0].dtype == torch.int8 and 'wte.weight' not in state['model']
    code, out, err = script('sample.py', run, '--export=hf', cwd=finished[0].parent)
    assert code == 2 and err.startswith('sample.py: ') and 'config/llama_shape.py' in err and err.count('\n') == 1


def test_a_run_that_diverged_is_not_exported(tmp_path):
    run = run_in(tmp_path / 'run', ['llama_shape'])
    with torch.no_grad():
        run.model.blocks[1].attn.v.weight[0] = math.nan
    for kind in ('int8', 'hf'):
        with pytest.raises(FloatingPointError, match='is not finite: export a run that did not diverge'):
            verb('export', kind).write(run)
    assert not Path(run.folder / 'int8' / 'ckpt.pt').exists()

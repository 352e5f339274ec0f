"""The model for transformers: safetensors, config and tokenizer, of a shape that is known there.

    python sample.py out/babylm --export hf         out/babylm/hf; needs safetensors

Such shapes are config/llama_shape.py and config/qwen3_shape.py; the base has parts that have no equivalent.
"""
from config import CONFIG, UserError, name_of, refuse
from config.export_html import changes_of, finite, refuse_unigram
from sample import as_json, write_beside


def shape_of(run):
    """config.json of transformers and {name: tensor}, as GPT.hf says them; UserError where something of the
    net has no equivalent there. A class that says hf knows one; `page = ''` says that nothing is changed."""
    changed = [f'{name_of(c)} changes the net' for c in changes_of(run.ideas)
               if vars(c).get('page') != '' and 'hf' not in vars(c)]
    parts = ['token_shift'] * run.model.config.token_shift + ['the token embedding mixed in at every layer']
    wrong = changed or [f'{run.folder} has {" and ".join(parts)}'] * (not hasattr(run.model, 'hf'))
    shapes = ' or '.join(f'config/{path.name}' for path in sorted(CONFIG.glob('*_shape.py')))
    refuse(wrong, f'{"".join(wrong[:1])}, for which transformers and llama.cpp have nothing: train with '
           f'{shapes} alone')
    refuse_unigram(run, 'the export')
    about, tensors = run.model.hf()
    return about, {name: finite(name, w).clone() for name, w in tensors.items()}


def spelled(t):
    """The pieces of a vocabulary by id as byte-level or byte-fallback BPE writes them, {id: piece} of those
    that no text makes, and [left, right] of all that BPE joins, the first before the others."""
    special = {t.bos: '<|endoftext|>'} | {i: f'<|{name}|>' for name, i in t.roles.items()}
    letters, first = [f'<0x{byte:02X}>' for byte in range(256)], 0
    if t.kind == 'bpe':                          # spaces, tabs and lines' ends are written as they are
        special[t.unk], first = '<unk>', t.first_byte + 256
        pieces = [t.table[i].decode() if i >= first else letters[i - t.first_byte]
                  for i in range(t.vocab_size)]
    else:                                        # a byte that is no printable Latin-1 moves up, as in GPT-2
        others = iter(range(256, 512))
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        letters = [chr(byte if byte in plain else next(others)) for byte in range(256)]
        pieces = [''.join(letters[byte] for byte in piece) for piece in t.table]
    pieces = [special.get(i, piece) for i, piece in enumerate(pieces)]
    rank = {piece: i for i, piece in enumerate(pieces) if i >= first and i not in special}
    ways = sorted((i, rank[piece[:k]], rank[piece[k:]]) for piece, i in rank.items()
                  for k in range(1, len(piece)) if piece[:k] in rank and piece[k:] in rank)
    return pieces, special, [[pieces[left], pieces[right]] for _, left, right in ways]


def chat_template(t):
    """Jinja: BOS, each message's role and text, then the assistant's turn; None for what does not chat."""
    return ('{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}'
            '{% if add_generation_prompt %}<|assistant|>{% endif %}') if t.roles else None


def hf_tokenizer(t):
    """tokenizer.json of a vocabulary: BPE over bytes (bytes, gpt2), or with bytes for what has no piece."""
    (pieces, special, merges), fallback = spelled(t), t.kind == 'bpe'
    level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=t.kind == 'gpt2')
    begin, text = {'SpecialToken': dict(id=pieces[t.bos], type_id=0)}, {'Sequence': dict(id='A', type_id=0)}
    return dict(
        version='1.0', normalizer=None, pre_tokenizer=None if fallback else level,
        added_tokens=[dict(id=i, content=piece, special=True, normalized=False, single_word=False,
                           lstrip=False, rstrip=False) for i, piece in sorted(special.items())],
        model=dict(type='BPE', vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges,
                   unk_token='<unk>' if fallback else None, byte_fallback=fallback,
                   ignore_merges=t.kind == 'gpt2'),      # tiktoken takes a word that is a piece as it is
        post_processor=dict(type='TemplateProcessing', single=[begin, text], pair=[begin, text, begin, text],
                            special_tokens={pieces[t.bos]: dict(id=pieces[t.bos], ids=[t.bos],
                                                                tokens=[pieces[t.bos]])}),
        decoder=level if not fallback else dict(
            type='Sequence', decoders=[dict(type='ByteFallback'), dict(type='Fuse')]))


def write(run):
    """hf/ in a run's folder, which transformers' AutoModelForCausalLM and AutoTokenizer open."""
    (about, tensors), t, folder = shape_of(run), run.tokenizer, run.folder / 'hf'
    try:
        from safetensors.torch import save
    except ImportError as e:
        raise UserError('--export hf needs safetensors: pip install safetensors') from e
    roles = t.roles
    ends = dict(bos_token_id=t.bos, pad_token_id=t.bos, eos_token_id=[t.bos, *roles.values()])
    size = run.model.config.block_size
    draws = dict(do_sample=True, temperature=0.8, max_new_tokens=min(256, size))
    files = {'config.json': about | ends | dict(dtype='float32'), 'tokenizer.json': hf_tokenizer(t),
             'generation_config.json': ends | draws,
             'tokenizer_config.json': dict(
                 tokenizer_class='PreTrainedTokenizerFast', model_max_length=size, padding_side='left',
                 clean_up_tokenization_spaces=False, split_special_tokens=not roles,     # a text holds none
                 chat_template=chat_template(t), **dict.fromkeys(('bos_token', 'eos_token', 'pad_token'),
                                                                 '<|endoftext|>'))}
    files = {name: as_json(content, indent=1).encode() for name, content in files.items()}
    folder.mkdir(exist_ok=True)
    for name, content in (files | {'model.safetensors': save(tensors, dict(format='pt'))}).items():
        write_beside(folder / name, lambda f, content=content: f.write(content))
    print(f'{folder}: {about["architectures"][0]}; transformers opens it, tokenizer included')

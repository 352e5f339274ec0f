"""The model for llama.cpp, fp32, of a shape that is known there, with its tokenizer.

    python sample.py out/babylm --export gguf       out/babylm/model.gguf; needs gguf

Shapes as in config/export_hf.py, with a SiLU gate.
"""
import re
import tempfile
from pathlib import Path

from config.export_hf import chat_template, shape_of, spelled
from prepare_data import UserError, refuse
from sample import write_beside


def write(run):
    """model.gguf in a run's folder, fp32, of a shape that llama.cpp computes, with its tokenizer."""
    (about, tensors), c, t, path = shape_of(run), run.model.config, run.tokenizer, run.folder / 'model.gguf'
    try:
        import gguf
    except ImportError as e:
        raise UserError('--export gguf needs gguf: pip install gguf') from e
    refuse(c.mlp != 'swiglu', f'mlp is {c.mlp}, llama.cpp knows SiLU gates alone: train with --mlp=swiglu')
    for name, row in dict(n_embd=c.n_embd, mlp_hidden=c.mlp_hidden, head_dim=c.n_head * c.head_dim).items():
        refuse(row % 32, f'{name} makes rows of {row}, llama.cpp takes 32 at a time: choose a multiple')
    arch, kind = about['model_type'], {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names, w = gguf.get_tensor_name_map(kind[arch], c.n_layer), gguf.GGUFWriter(None, arch)
    for key, value in dict(
            name=run.folder.absolute().name, file_type=0, context_length=c.block_size, block_count=c.n_layer,
            embedding_length=c.n_embd, feed_forward_length=c.mlp_hidden, head_count=c.n_head,
            head_count_kv=c.n_kv_head, key_length=c.head_dim, value_length=c.head_dim,
            rope_dimension_count=c.head_dim, rope_freq_base=c.rope_base, layer_norm_rms_eps=1e-6,
            vocab_size=c.vocab_size, bos_token_id=t.bos, eos_token_id=t.bos, add_bos_token=True,
            add_eos_token=False, add_space_prefix=False).items():
        getattr(w, f'add_{key}')(value)
    pieces, special, merges = spelled(t)
    if t.kind == 'bytes':
        pieces = [special.get(i, ' ' if i == 32 else f'<0x{i:02X}>') for i in range(t.vocab_size)]
    if t.kind == 'gpt2':
        w.add_tokenizer_pre('gpt-2')
        w.add_token_merges([' '.join(pair) for pair in merges])
    else:                                        # a space is U+2581, as U+2581 is; early pieces join first
        w.add_token_scores([-float(i) for i in range(t.vocab_size)])
        pieces = [piece.replace(' ', '\u2581') for piece in pieces]
    byte = re.compile('<0x[0-9A-F]{2}>')
    w.add_tokenizer_model('gpt2' if t.kind == 'gpt2' else 'llama')
    w.add_token_list(pieces)
    w.add_token_types([gguf.TokenType.UNKNOWN if piece == '<unk>' and i in special else
                       gguf.TokenType.CONTROL if i in special else
                       gguf.TokenType.BYTE if byte.fullmatch(piece) else gguf.TokenType.NORMAL
                       for i, piece in enumerate(pieces)])
    if template := chat_template(t):
        w.add_chat_template(template)
    for name, x in tensors.items():
        if arch == 'llama' and re.search(r'[qk]_proj', name):     # there pairs that turn are neighbours
            x = x.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        w.add_tensor(names.get_name(name, try_suffixes=('.weight',)), x.numpy())
    with tempfile.TemporaryDirectory() as temp:
        w.write_header_to_file(Path(temp) / 'model.gguf')
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        write_beside(path, lambda f: f.write((Path(temp) / 'model.gguf').read_bytes()))
    print(f'{path}: {path.stat().st_size / 1e6:.1f} MB in fp32, which llama-quantize makes smaller')

"""Gives the scripts files that nobody meant to write, and looks at how they end.

    python tests/fuzz.py                                    a minute a target
    python tests/fuzz.py --minutes=5 --seed=1 --only=configs
    python tests/fuzz.py --keep=found.jsonl                 what is found goes there, a case a line

A case is a folder with the files of a target, all of them right, and a list of edits: bits are flipped, files cut off
and spliced, numbers become 0, -1, 2**63, 1e999 or NaN, what is nested is nested deep, lines get very long, links lead
outside, archives are bombs, values call functions as they are read. What main() of a script calls is called on it.

    configs      settings of configs and ideas, command lines of train.py, bench_mfu.py, sample.py
    checkpoints  a run's folder, its checkpoint and tokenizer: opened, and two tokens made
    resumes      a run's folder, from which train.py goes on for a step
    data         a prepared folder, meta.json, bins, tables of documents: opened, and its page printed
    evals        evaluation files, folders and archives of them
    corpora      text of every format, prepared
    results      result.json, metrics.jsonl, compare.json: ranked, extrapolated, made again
    chats        rows of conversations, prepared
    requests     what strangers send to sample.py --serve
    lines        command lines of train.py, prepare_data.py, sample.py, bench_mfu.py

Each must be accepted, or end in a UserError, an OSError that names a file (both are a sentence and exit code 2), or
argparse's SystemExit: no other exception, no death of the process, not more than ten seconds of CPU or half a minute, not
more than a GiB, no file outside the case's folder made or changed, no code run that stands in data. Exit code 1 if a
case does otherwise. tests/fuzz_found.jsonl keeps the cases that once did: {target, edits, argv, bug}.
"""
import ast
import contextlib
import copy
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import threading
import time
import tokenize
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from faults import options_of

ROOT = Path(__file__).resolve().parent.parent
FOUND = Path(__file__).with_name('fuzz_found.jsonl')
CPU, WALL, MEMORY = 10, 30, 1 << 30              # seconds, seconds, bytes that a case may take more
TEXT = 'Mia lost the kite by the tree. She looked for it: by the lake, in the barn and at home.\n\n'


# ---- edits: what a case does to the files it begins with, as JSON --------------------------------------------

class Payload:
    """What makes a file outside as it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def made(value, out):
    """A value of an edit, with what JSON cannot say made of {'$': kind, ...}."""
    import torch
    if isinstance(value, dict) and '$' in value:
        kind, n = value['$'], value.get('n', 3)
        return {'payload': lambda: Payload(f'{out}/touched'), 'tensor': lambda: torch.full((n, n), float('nan')),
                'ints': lambda: torch.arange(n), 'empty': lambda: torch.zeros(0), 'bytes': lambda: b'\xff' * n,
                'long': lambda: 'x' * 100_000, 'deep': lambda: nested(900)}[kind]()
    return value.replace('{out}', str(out)) if isinstance(value, str) else value


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def changed(tree, path, change):
    """A tree of dicts, lists and tuples with change(part) in the place of the part at a path; None takes it out."""
    if not path:
        return change(tree)
    key, rest = path[0], path[1:]
    if isinstance(tree, dict):
        new = {k: v for k, v in tree.items() if k != key or rest or change}
        return new | ({key: changed(tree.get(key), rest, change)} if rest or change else {})
    if isinstance(tree, (list, tuple)) and isinstance(key, int) and key < len(tree):
        parts = [changed(tree[key], rest, change)] if rest or change else []
        return type(tree)([*tree[:key], *parts, *tree[key + 1:]])
    return tree


def edit_tree(path, keys, change):
    import torch
    try:
        tree = torch.load(path, weights_only=True) if path.suffix == '.pt' else json.loads(path.read_text())
    except (ValueError, OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return                                   # an earlier edit made it none
    tree = changed(tree, keys, change)
    if path.suffix == '.pt':
        torch.save(tree, path)
    else:
        path.write_text(json.dumps(tree))


def packed(data, kind):
    if kind == 'zst':
        with contextlib.suppress(ImportError):   # which those who read it need too
            import pyarrow
            return pyarrow.compress(data, 'zstd', asbytes=True)
    return gzip.compress(data, 1) if kind == 'gz' else lzma.compress(data, preset=0) if kind == 'xz' else data


def bomb(piece, mib, kind):
    """Very much of a piece, packed: members one after the other are one file."""
    return packed((piece * (1 << 20))[:1 << 20] * 16, kind) * -(-mib // 16)


def tar_of(members, out):
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode='w') as tar:
        for name, kind, text in members:
            info, data = tarfile.TarInfo(name.replace('{out}', str(out))), text.replace('{out}', str(out)).encode('latin-1')
            info.type = {'file': tarfile.REGTYPE, 'link': tarfile.SYMTYPE, 'hard': tarfile.LNKTYPE, 'fifo': tarfile.FIFOTYPE,
                         'device': tarfile.CHRTYPE, 'folder': tarfile.DIRTYPE}[kind]
            info.linkname, info.size = (data.decode('latin-1'), 0) if kind in ('link', 'hard') else ('', len(data))
            tar.addfile(info, io.BytesIO(data))
    return f.getvalue()


def rehash(folder):
    """Makes meta.json say what the bins are now: whoever changes them can do that too."""
    path = folder / 'meta.json'
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OSError, EOFError):
        meta = json.loads(path.read_text())
        for split, counts in meta['splits'].items():
            data, docs = (folder / f'{split}.bin').read_bytes(), np.load(folder / f'{split}.docs.npy')
            counts |= dict(tokens=len(data) // (np.dtype(meta['dtype']).itemsize or 1), documents=len(docs),
                           bytes=int(docs['bytes'].sum()), head_sha256=hashlib.sha256(data[:1 << 20]).hexdigest())
        for file in folder.glob('tokenizer.*'):
            meta['tokenizer_sha256'] = hashlib.sha256(file.read_bytes()).hexdigest()
        path.write_text(json.dumps(meta))


def edit(folder, out, op, name, *args):
    """Does one edit to the file of this name."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    odd = [p for p in ([path] if op != 'rehash' else path.iterdir()) if p.exists() and not p.is_file()]
    if odd and op not in ('link', 'fifo', 'folder', 'drop', 'move'):
        return                                   # an earlier edit made it a pipe, which is waited for, or a device
    if op in ('set', 'del'):
        edit_tree(path, args[0], (lambda _: made(args[1], out)) if op == 'set' else None)
    elif op == 'write':
        path.write_bytes(args[0].replace('{out}', str(out)).encode('latin-1'))
    elif op == 'link':
        path.unlink(missing_ok=True)
        path.symlink_to(args[0].replace('{out}', str(out)))
    elif op == 'fifo':
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    elif op == 'folder':
        path.unlink(missing_ok=True)
        path.mkdir()
    elif op == 'drop':
        path.unlink(missing_ok=True)
    elif op == 'move':
        os.replace(path, folder / args[0])
    elif op == 'pack':
        (folder / f'{name}.{args[0]}').write_bytes(packed(path.read_bytes(), args[0]))
        path.unlink()
    elif op == 'bomb':
        path.write_bytes(bomb(args[0].encode('latin-1'), args[1], args[2]))
    elif op == 'tar':
        path.write_bytes(packed(tar_of(args[0], out), args[1]))
    elif op == 'rehash':
        rehash(path)
    elif op == 'row':
        docs = np.load(path)
        docs[args[1]][args[0] % len(docs)] = args[2]
        np.save(path, docs)
    else:
        data = bytearray(path.read_bytes())
        if op == 'flip':
            at = args[0] % max(len(data), 1)
            data[at:at + 1] = bytes([data[at] ^ 1 << args[1]]) if data else b''
        elif op == 'cut':
            del data[args[0]:]
        elif op == 'sub':                        # at, how many bytes, what stands there then, how often
            at, n, text, times = args
            data[at:at + n] = text.replace('{out}', str(out)).encode('latin-1') * times
        path.write_bytes(data)


# ---- what edits are drawn -----------------------------------------------------------------------------------

NUMBERS = [0, -1, 1, 2, 3, 255, 65536, 2 ** 31, 2 ** 63, 2 ** 64, -2 ** 63, 10 ** 400, 1e999, -1e999, float('nan'), 1e-320, 0.5, -0.0]
VALUES = [*NUMBERS, None, True, False, '', 'x', '\ud800', '\0', 'a\nb', '../../out/secret', '{out}/secret', '/', '~nobody/x', '%s{}', [], {}, [[]],
          [None], [1, 'a'], {'a': 1}, {'': {}}, {'$': 'long'}, {'$': 'deep'}]
OF_TORCH = [{'$': kind} for kind in ('payload', 'tensor', 'ints', 'empty', 'bytes')]
PIECES = ['\0', '\xff', '\xff\xfe', '\xef\xbb\xbf', '\xed\xa0\x80', '\n', '\r', '\r\n', '\x0c', '\x1b[2J', ',', '"', "'", '\\', '[', '{', '}', ']', '(', ')',
          '{"a":', '[[', '\\ud800', '\\u0000', 'null', 'NaN', 'Infinity', '-Infinity', '1e999', '-1', '0', '9223372036854775808', '9' * 5000, 'true',
          '"text": ', '<|endoftext|>', '../', '{out}/', '\xe2\x81\x82', '\xf0\x9f\x99\x82', ' ', '\t', '#', '=', ':', '-' * 40, '0x', '**', '9**9**9', '.', '\x80']


def some_bytes(dice, data, name):
    """An edit of a file as bytes."""
    n = len(data)
    at = dice.randrange(n + 1)
    kind = dice.randrange(8)
    if kind == 0:
        return ['flip', name, at, dice.randrange(8)]
    if kind == 1:
        return ['cut', name, at]
    if kind == 2:                                # of its own, elsewhere
        piece = data[(a := dice.randrange(n + 1)):a + dice.choice((1, 4, 30, 300))].decode('latin-1')
        return ['sub', name, at, dice.choice((0, len(piece))), piece, 1]
    if kind == 3:
        return ['sub', name, at, dice.choice((1, 4, 30, 300)), '', 1]
    if kind == 4:
        piece, times = dice.choice(PIECES), dice.choice((2, 50, 1500, 100_000))
        return ['sub', name, at, 0, piece, min(times, 4_000_000 // len(piece))]
    if kind == 5:                                # a number of the text
        digits = [i for i in range(n) if 48 <= data[i] < 58]
        at = dice.choice(digits or [0])
        end = at
        while end < n and 48 <= data[end] < 58:
            end += 1
        return ['sub', name, at, end - at, dice.choice(('0', '-1', '9223372036854775808', '1e999', 'NaN', '1' * 5000, '0.5')), 1]
    return ['sub', name, at, dice.choice((0, 1, 2, 8)), dice.choice(PIECES), 1]


def paths_of(tree, path=()):
    yield list(path)
    for key, value in (tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()):
        if isinstance(key, (str, int)):
            yield from paths_of(value, (*path, key))


def some_tree(dice, tree, name, values):
    """An edit of a value in JSON or a checkpoint. What stands high in the tree is drawn as often as all below it."""
    paths = [*paths_of(tree)][1:]
    depth = dice.choice(sorted({len(p) for p in paths}))
    path = dice.choice([p for p in paths if len(p) == depth])
    return ['del', name, path] if dice.random() < 0.15 else ['set', name, path, dice.choice(values)]


def some_odd(dice, name):
    """An edit of the file itself."""
    return dice.choice((['drop', name], ['write', name, ''], ['link', name, '{out}/secret'], ['link', name, name], ['folder', name], ['fifo', name],
                        ['link', f'{name}.part', '{out}/secret'], ['link', name, '../../out'], ['write', name, '\0' * 4096],
                        ['bomb', name, 'a', 16, '']))


# ---- targets: the files of each, its edits, and what is called ------------------------------------------------

class Target:
    """files: {name: bytes} that a case begins with; draw(dice): its edits and argv; ask(folder, argv): what is called."""

    def __init__(self, files):
        self.files, self.trees = files, {}
        for name, data in files.items():
            if name.endswith('.json'):
                self.trees[name] = json.loads(data)

    def draw(self, dice):
        return [self.edit(dice) for _ in range(dice.choice((1, 1, 1, 2, 4)))], []

    def may(self, wrong, folder, case):
        """Whether a case may end so."""
        return False

    def edit(self, dice):
        name = dice.choice([*self.files])
        kind = dice.random()
        if kind < 0.04:
            return some_odd(dice, name)
        if name in self.trees and kind < 0.7:
            return some_tree(dice, self.trees[name], name, VALUES)
        return some_bytes(dice, self.files[name], name)


CONFIG = b'''"""A config."""
n_layer = 2 * 3           # layers
seed = -(-7)
learning_rate = 0.01 / 2
head_dim = n_embd // n_head
sample_prompt = "Mia"
doc_mask = False
share: float = 0.5        # 0..1: how much
way: str = 'a'            # a|b: which
stages: tuple = [(0.5, dict(n_embd=n_embd * 2))]
'''
IDEA = CONFIG.replace(b'share:', b'portion:').replace(b'way:', b'path:').replace(b'stages:', b'steps:') + b'''
import train
LIMIT = 3


class Run(train.Run):
    def decay(self, progress):
        return super().decay(progress) * LIMIT
'''
LITERALS = ["open('{out}/touched', 'w')", "__import__('os').system('touch {out}/touched')", "(lambda: open('{out}/touched', 'w'))()", '9**9**9', '2**64**3',
            '[0]*10**9', '"a"*10**10', 'dict(a=1, **{})', 'dict()', '(' * 300 + '1' + ')' * 300, '-' * 3000 + '1', '1' * 5000, '0x' + 'f' * 5000, '1e999', '-1e999',
            'nan', '1j', 'None', '...', 'b"x"', 'f"{1}"', '{1: 2}', '{[]: 2}', '[1, [2]]', '"\\ud800"', '"\\0"', '1 / 0', '1 // 0.0', '0.0 ** -1', '(-8) ** 0.5',
            '1e308 * 10', '10**400 / 1', '10**400 * 1.0', '10 ** 400', 'True + True', 'seed', 'n_embd ** n_embd', 'not 1', '"a" "b"', '1 if 1 else 2',
            '"' + 'x' * 100_000 + '"', '+'.join(['1'] * 5000), '+'.join(['1'] * 600), '-' * 700 + '1', '**'.join(['1'] * 300), '[' * 90 + ']' * 90, '[' * 2000 + ']' * 2000, "'" + '\xe9' + "'",
            '(x := 3)', '*a', '1 << 10**9', '~5', '@', '"""', "'''", '1_0', '٣', 'seed:int=3', '', ' ', '\0', '\ud800', 'x' * 50_000]


class Configs(Target):
    names = 'mine.py', 'idea.py'

    def __init__(self, bases):
        super().__init__({'mine.py': CONFIG, 'idea.py': IDEA})
        import train
        import bench_mfu
        self.settings = [*bench_mfu.prepare_data.Ideas([], bench_mfu.TABLES).known, 'growth', 'stages', 'share', 'bos', '__class__', '', 'é']

    def edit(self, dice):
        name = dice.choice(self.names[:1] * 3 + self.names[1:])
        kind = dice.random()
        if kind < 0.04:                          # a pipe is read, as a shell's <( ) makes them
            return odd if (odd := some_odd(dice, name))[0] != 'fifo' else ['link', name, '/dev/zero']
        if kind < 0.5:                           # a line that sets or declares
            left = dice.choice((dice.choice(self.settings), f'{dice.choice(self.settings)}: {dice.choice(("int", "float", "str", "bool", "tuple", "list"))}',
                                'a, seed', 'seed, *b', 'seed.x', 'seed[0]', 'X', 'it: int', 'seed = n_layer'))
            about = dice.choice(('', '', '  # 0..1: x', '  # a|b: x', '  # ..: x', '  # 1e999..: x', '  # |: x', '  # -..: x', '  # 1.2.3..4: x', '  # 9e9999..: x'))
            line = f'{left} = {dice.choice(LITERALS)}{about}\n'.encode('utf-8', 'surrogatepass').decode('latin-1')
            lines = [0, *(i + 1 for i, byte in enumerate(self.files[name]) if byte == 10)]
            return ['sub', name, dice.choice(lines), 0, line, 1]
        return some_bytes(dice, self.files[name], name)

    def draw(self, dice):
        edits = [self.edit(dice) for _ in range(dice.choice((0, 1, 1, 2)))]
        argv = dice.sample(self.names, dice.choice((0, 1, 1, 2)))
        for _ in range(dice.choice((0, 0, 1, 2))):
            value = dice.choice([*LITERALS, *map(str, NUMBERS), 'a,b', '../..', '~nobody/x', '~'])
            argv.append(dice.choice((f'--{dice.choice(self.settings)}={value}', f'--{dice.choice(self.settings)}', f'-{value}', value or 'x', f'--={value}',
                                     f'--samples={value}', f'--temperature={value}', f'--where={value}', f'--country={value}', '--serve', '--retrieve', '--')))
        return edits, [dice.choice(('train', 'bench', 'sample', 'data')), *argv]

    def ask(self, folder, argv):
        import bench_mfu
        import prepare_data
        import sample
        import train
        script, *argv = argv
        own = lambda text: str(folder / text) if text in self.names else text.replace('{out}', str(folder.parent / 'out'))
        argv = [own(arg) for arg in argv]
        if script == 'train':
            prepare_data.shown(train.read_settings(argv)[1])
        elif script == 'bench':
            own, _, words, modules = bench_mfu.own_options(argv)
            if not modules:
                train.read_settings(words, bench_mfu.TABLES)
        elif script == 'sample':
            sample.read_options(['run', *argv])
        else:
            prepare_data.Ideas(argv, [prepare_data.Options], strict=False)

    def may(self, wrong, folder, case):
        """Where a file holds more code beside settings than they begin with: naming it runs that, as is said."""
        code = set()
        for name in self.names:
            with contextlib.suppress(SyntaxError, ValueError, OSError, RecursionError, MemoryError):
                code |= self.code((folder / name).read_bytes())
        return wrong.startswith(('took', 'outside')) and not code <= self.code(IDEA)

    @staticmethod
    def code(text):
        from config import is_docstring, is_setting
        return {ast.unparse(node) for node in ast.parse(text).body if not is_setting(node) and not is_docstring(node)}


class Checkpoints(Target):
    def __init__(self, bases):
        import torch
        state = torch.load(bases.run / 'ckpt.pt', weights_only=True)
        state.pop('optimizers')
        self.state, f = state, io.BytesIO()
        torch.save(state, f)
        super().__init__({'ckpt.pt': f.getvalue(), 'tokenizer.bytes': (bases.run / 'tokenizer.bytes').read_bytes(), **bases.tokenizers})
        self.trees['ckpt.pt'] = {k: v for k, v in state.items() if k != 'model'} | dict(model={k: 0 for k in state['model']})

    def draw(self, dice):
        """Of the run, or of a tokenizer alone."""
        kind = dice.random()
        if kind < 0.35:
            name = dice.choice(['tokenizer.bytes', *[name for name in self.files if '/' in name]])
            edits = [some_bytes(dice, self.files[name], name) for _ in range(dice.choice((1, 1, 2, 4)))]
            return edits + [some_odd(dice, name)] * (dice.random() < 0.05), ['tokenizer', str(Path(name).parent)]
        edits = [some_tree(dice, self.trees['ckpt.pt'], 'ckpt.pt', VALUES + OF_TORCH) if dice.random() < 0.75 else
                 some_bytes(dice, self.files['ckpt.pt'], 'ckpt.pt') for _ in range(dice.choice((1, 1, 2)))]
        edits = [e for e in edits if e[0] != 'del' or len(e[2]) < 3 or dice.random() < 0.3]
        return edits + [some_odd(dice, 'ckpt.pt')] * (dice.random() < 0.05), ['run']

    def ask(self, folder, argv):
        import prepare_data
        import sample
        import torch
        if argv[0] == 'tokenizer':
            tokenizer = prepare_data.load_tokenizer(folder / argv[1])
            ids = tokenizer.encode(TEXT + '\u2581\ue009 é🙂\0')
            tokenizer.encode_batch([TEXT, ''])
            return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])
        run = sample.open_run(folder, 'cpu')
        args = SimpleNamespace(max_new_tokens=2, samples=1, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
        with contextlib.suppress(FloatingPointError):        # a sentence in main()
            sample.complete(run.model, run.tokenizer, 'Mia', args, torch.Generator().manual_seed(0))
        sample.text_of(run)


class Resumes(Target):
    """A run in the middle, which goes on for a step."""

    def __init__(self, bases):
        import torch
        f = io.BytesIO()
        state = torch.load(bases.run / 'ckpt.pt', weights_only=True)
        torch.save(state | dict(steps=state['steps'] // 2, progress=0.5, went_by=0.5), f)
        super().__init__({f'data/{bases.data.name}/{p.name}': p.read_bytes() for p in bases.data.iterdir() if p.is_file()} | {
            f'text/{p.name}': p.read_bytes() for p in bases.text.iterdir()} | {'run/ckpt.pt': f.getvalue()} | {
            f'run/{name}': (bases.run / name).read_bytes() for name in ('metrics.jsonl', 'tokenizer.bytes')})
        self.trees['run/ckpt.pt'] = state

    def edit(self, dice):
        kind = dice.random()
        if kind < 0.1:
            name = dice.choice([name for name in self.files if name.startswith('run/')])
            return dice.choice((some_bytes(dice, self.files[name], name), some_odd(dice, name)))
        return some_tree(dice, self.trees['run/ckpt.pt'], 'run/ckpt.pt', VALUES + OF_TORCH)

    def ask(self, folder, argv):
        import torch
        import sample
        import train
        run = train.begin(['--device=cpu', '--compile=off', f'--dataset=files:{folder / "text"}', f'--data_dir={folder / "data"}', f'--out_dir={folder / "run"}',
                           '--init_from=resume', '--budget_minutes=1e6', *argv])
        try:
            run.open()
            run.build()
            run.announce()
            run.warm_up()
            run.say_start()
            run.evaluate_if_due()
            if run.time_left():
                run.step()
                run.state()
        finally:
            if hasattr(run, 'batches'):
                run.batches.close()
            for lock in sample.OWNED.values():
                lock.close()
            sample.OWNED.clear()


class Data(Target):
    def __init__(self, bases):
        self.name = bases.data.name
        super().__init__({f'data/{self.name}/{p.name}': p.read_bytes() for p in bases.data.iterdir() if p.is_file()} | {
            f'text/{p.name}': p.read_bytes() for p in bases.text.iterdir()})

    def edit(self, dice):
        mine = [name for name in self.files if name.startswith('data/')]
        name = dice.choice([*mine, *[name for name in mine if name.endswith('meta.json')] * 4])
        if name.endswith('.npy') and dice.random() < 0.6:
            field = dice.choice(('start', 'bytes', 'source', 'difficulty'))
            most = dict(start=2 ** 63 - 1, bytes=2 ** 31 - 1, source=2 ** 15 - 1, difficulty=1e38)[field]
            return ['row', name, dice.randrange(1000), field, dice.choice((0, -1, 1, most, -most))]
        if dice.random() < 0.04:
            return some_odd(dice, name)
        if name in self.trees and dice.random() < 0.8:
            return some_tree(dice, self.trees[name], name, VALUES)
        return some_bytes(dice, self.files[name], name)

    def draw(self, dice):
        edits, _ = super().draw(dice)
        if dice.random() < 0.5:
            edits.append(['rehash', f'data/{self.name}'])
        return edits, [dice.choice(('open', 'page', 'corpus'))]

    def ask(self, folder, argv):
        import prepare_data
        import train
        from config import prepare_inspect
        at, options = folder / 'data' / self.name, [f'--data_dir={folder / "data"}', '--tokenizer=bytes', f'--dataset=files:{folder / "text"}']
        s, ideas = train.read_settings([*options, '--min_doc_bytes=0'])
        corpus = ideas.seam(prepare_data.Corpus)(s)
        if argv[0] == 'corpus':
            return corpus.open()
        data = prepare_data.open_data(at)
        if argv[0] == 'page':
            print(*corpus.summary(data), sep='\n')
            return prepare_inspect.page(corpus, data)
        train.Stream(data, s).batch(0, 2, 16)


class Evals(Target):
    rows = [dict(sentence_good='Mia is here .', sentence_bad='Mia are here .', UID='agree', linguistics_term='x'), dict(context='Mia', good=' is', bad=' are'),
            dict(input_prefix='The box', options=[' has', ' have', ' is'], numops=2), dict(sentence1='a b', sentence2='a c', label=1),
            dict(sentence='Which?\nA: one\nB: two\nC: three', label='B'), dict(prompt='Mia lost the {answer}', answer='kite')]

    def __init__(self, bases):
        lines = [''.join(json.dumps(row) + '\n' for row in rows) for rows in (self.rows[:1] * 3, self.rows[:5], self.rows[5:] * 2)]
        super().__init__({f'eval/{name}.jsonl': text.encode() for name, text in zip(('pairs', 'mixed', 'last'), lines)} | {
            f'eval/many/{i}.jsonl': text.encode() for i, text in enumerate(lines[:2])})
        self.tokenizer = bases.tokenizer

    def edit(self, dice):
        name, kind = dice.choice([*self.files]), dice.random()
        if kind < 0.06:                          # a pipe is read, as a shell's <( ) makes them
            return odd if (odd := some_odd(dice, name))[0] != 'fifo' else ['drop', name]
        if kind < 0.3:                           # a row of its own
            row = dict(dice.choice(self.rows))
            for _ in range(dice.choice((1, 1, 2))):
                row[dice.choice([*row, 'context', 'label', 'kind', 'options'])] = dice.choice([v for v in VALUES if not isinstance(v, dict) or '$' not in v])
            return ['sub', name, 0, 0, json.dumps(row) + '\n', 1]
        if kind < 0.36:
            return ['pack', name, dice.choice(('gz', 'xz'))]
        if kind < 0.48:
            members = [[dice.choice(('a.jsonl', '../out/touched.jsonl', '{out}/touched.jsonl', 'x/b.jsonl', '.jsonl', 'c.txt', '\xff.jsonl')),
                        dice.choice(('file', 'file', 'file', 'link', 'hard', 'fifo', 'device', 'folder')),
                        dice.choice((json.dumps(self.rows[0]) + '\n', '{out}/secret', 'a.jsonl', '', '\xff'))] for _ in range(dice.randrange(4))]
            return ['tar', f'eval/t.{dice.choice(("tar", "tar.gz", "tar.xz"))}', members, dice.choice(('', 'gz', 'xz'))]
        if kind < 0.5:
            return ['bomb', dice.choice(('eval/b.jsonl.gz', 'eval/b.jsonl.xz', 'eval/b.tar.gz')), dice.choice(('\0', 'a', '\n', '{}\n')), 2048, dice.choice(('gz', 'xz'))]
        return some_bytes(dice, self.files[name], name)

    def ask(self, folder, argv):
        import sample
        files = sample.eval_files(folder / 'eval')
        wrong = None
        for path in [*files.values(), *(p for p in (folder / 'eval').iterdir() if '.gz' in p.name or '.xz' in p.name)]:
            for _ in range(2):                   # made, and read from the cache
                try:
                    items = sample.eval_set(path, self.tokenizer, folder / 'cache')
                    sample.option_rows(items, 0, len(items['item']), True, 16)
                    sample.accuracy(np.arange(len(items['item']), dtype=float), items)
                except sample.UserError as e:
                    wrong = e
        if wrong:
            raise wrong


class Corpora(Target):
    formats = '.txt', '.md', '.jsonl', '.ndjson', '.json', '.csv', '.tsv', '.parquet', '.tokens', '.raw', '.tar', ''
    ideas, field = (), 'text'

    def __init__(self, bases):
        texts = [f'{TEXT.strip()} {i} é🙂' for i in range(60)]
        rows = [{self.field: text, 'n': i} for i, text in enumerate(texts)]
        files = {'a.txt': '\n\n'.join(texts), 'b.jsonl': '\n'.join(map(json.dumps, rows)), 'c.json': json.dumps(rows),
                 'd.csv': '\r\n'.join(['n,text', *(f'{i},"{text}"' for i, text in enumerate(texts))]),
                 'e.tsv': '\n'.join(['n\ttext', *(f'{i}\t{text}' for i, text in enumerate(texts))]),
                 'f.md': '\n'.join(f'---\ntitle: {i}\n---\n# {text}\n' for i, text in enumerate(texts)), 'g.raw': '<|endoftext|>'.join(texts)}
        files = {name: text.encode() for name, text in files.items()}
        with contextlib.suppress(ImportError):
            import pyarrow
            import pyarrow.parquet
            f = pyarrow.BufferOutputStream()
            pyarrow.parquet.write_table(pyarrow.table(dict(text=texts)), f)
            files['h.parquet'] = f.getvalue().to_pybytes()
        super().__init__({f'text/{name}': data for name, data in files.items()})
        self.trees = {}

    def edit(self, dice, name):
        kind = dice.random()
        if kind < 0.05:
            return some_odd(dice, name)
        if kind < 0.12:
            return ['pack', name, dice.choice(('gz', 'xz', 'zst'))]
        if kind < 0.2:
            new = dice.choice(('x', 'x.train', 'x.dev', 'train', 'valid', '-train', 'a,b:c+d', '\u00fc', '\n', ' ', '..x', 'README', 'code', 'wiki', 'x' * 200))
            return ['move', name, f'text/{new}{dice.choice(self.formats)}{dice.choice(("", "", ".gz", ".xz", ".zst"))}']
        if kind < 0.22:
            return dice.choice((['link', 'text/l', '{out}'], ['link', 'text/l', '..'], ['link', 'text/l.txt', '{out}/secret'], ['link', 'text/l', 'l'],
                                ['link', 'text/l.txt', '/dev/zero'], ['tar', 'text/t.tar', [['../../out/touched', 'file', 'x']], '']))
        if kind < 0.23:
            end = dice.choice(('gz', 'xz', 'zst'))
            return ['bomb', f'text/z{dice.choice((".txt", ".jsonl", ".csv", ".tsv", ".json"))}.{end}', dice.choice(('a', '[', 'a,', '"', '[],', '{}\n')), 2048, end]
        return some_bytes(dice, self.files[name], name)

    def draw(self, dice):
        name = dice.choice([*self.files])
        edits, gone = [['drop', other] for other in self.files if other != name and dice.random() < 0.8], False
        for _ in range(dice.choice((1, 1, 2, 4))):
            if not gone:
                edits.append(self.edit(dice, name))
                gone = edits[-1][0] in ('move', 'pack', 'drop', 'link', 'folder', 'fifo')
        more = [f'config/{name}.py' for name in dice.sample(('clean', 'dedup', 'split_by_lines', 'difficulty', 'text_share'), dice.choice((0, 0, 1, 2)))]
        words = [*self.ideas, *more, f'--tokenizer={dice.choice(("bytes", "bytes", "bytes", "bpe"))}', f'--vocab_size={dice.choice((300, 400, 8192))}',
                 f'--min_doc_bytes={dice.choice((0, 1000))}', f'--max_doc_bytes={dice.choice((256, 16384))}']
        words += dice.choice([[]] * 18 + [['config/prepare_workers.py', '--workers=2'], ['config/prepare_plan.py', '--plan']])
        return edits, words + ['--text_field=n'] * (dice.random() < 0.05)

    def may(self, wrong, folder, case):
        """Two GiB of text are a corpus, and take their time."""
        return wrong.startswith('took') and any(op == 'bomb' and '.txt' in name for op, name, *_ in case['edits'])

    def ask(self, folder, argv):
        import prepare_data
        from config import prepare_inspect
        argv = [str(ROOT / arg) if arg.endswith('.py') else arg for arg in argv]
        ideas = prepare_data.Ideas([*argv, f'--dataset=files:{folder / "text"}', f'--data_dir={folder / "data"}'], [prepare_data.Options], strict=False)
        corpus = ideas.seam(prepare_data.Corpus)(SimpleNamespace(**ideas.values))
        corpus.run()
        if '--plan' not in argv:
            prepare_inspect.page(corpus, corpus.open())


class Chats(Corpora):
    ideas = 'config/instruct.py',

    def __init__(self, bases):
        super().__init__(bases)
        said = [dict(messages=[dict(role='system', content='Be kind.'), dict(role='user', content=f'Where is {i}?'), dict(role='assistant', content=f'By the lake {i}.')])
                for i in range(40)]
        asked = [dict(instruction=f'Say {i}.', input='twice', output=f'{i} {i} and so on') for i in range(40)]
        other = [dict(instruction=f'Say {i}.', instances=[dict(input='x', output='so be it')]) for i in range(40)]
        self.rows = [*said, *asked, *other]
        self.files = {'text/a.jsonl': '\n'.join(map(json.dumps, self.rows)).encode(), 'text/b.json': json.dumps(self.rows).encode()}

    def edit(self, dice, name):
        if dice.random() < 0.6:                  # the first row with something else in it
            row = dice.choice(self.rows)
            path = dice.choice([*paths_of(row)][1:])
            value = dice.choice([v for v in VALUES if not isinstance(v, dict) or '$' not in v] + ['\ufdd0', 'x\ufdd1y', 'tool', 'system'])
            row = changed(copy.deepcopy(row), path, (lambda _: value) if dice.random() < 0.8 else None)
            return ['sub', name, 0, 0, json.dumps(row) + '\n', 1] if name.endswith('jsonl') else ['sub', name, 1, 0, json.dumps(row) + ', ', 1]
        return super().edit(dice, name)


class Results(Target):
    def __init__(self, bases):
        result, rows = json.loads((bases.run / 'result.json').read_text()), (bases.run / 'metrics.jsonl').read_bytes()
        doll = b'"""A doll.\n\nparameters   11,000,000   97,328\n"""\n'
        again = [dict(name=name, val_bpb=2.0 + i / 10, seeds=2, sd=0.01, change=i / 10, notes='base' * (not i)) for i, name in enumerate('abc')]
        super().__init__({f'{run}/{name}': data for run in ('one', 'two') for name, data in (
            ('result.json', json.dumps(result | dict(val_bpb=2.5 if run == 'one' else 2.4)).encode()), ('metrics.jsonl', rows))} | {
            f'doll{i}/{name}': data for i in (1, 2) for name, data in (('compare.json', json.dumps(again).encode()), (
                'doll.py', doll.replace(b'97,328', b'%d' % (97328 * i))))})

    def edit(self, dice):
        name, kind = dice.choice([*self.files, *[name for name in self.files if name.endswith('result.json')] * 2]), dice.random()
        if kind < 0.05:
            return dice.choice((some_odd(dice, name), ['link', dice.choice(('leaderboard.md.part', 'leaderboard.html.part', 'leaderboard.md')), '{out}/secret']))
        if name.endswith('metrics.jsonl') and kind < 0.6:
            rows = self.files[name].splitlines()
            row = json.loads(dice.choice(rows))
            row = changed(row, dice.choice([*paths_of(row)][1:]), lambda _: dice.choice([v for v in VALUES if not isinstance(v, dict) or '$' not in v]))
            return ['sub', name, 0, 0, json.dumps(row) + '\n', 1]
        if name in self.trees and kind < 0.85:
            return some_tree(dice, self.trees[name], name, VALUES + ['../../out/idea', '{out}/idea', 'dropout', ['{out}/idea'], ['../../out/idea']])
        return some_bytes(dice, self.files[name], name)

    def draw(self, dice):
        edits, _ = super().draw(dice)
        where = dice.choice(([], [], ['--sort=steps'], ['--sort=-val_bpb'], ['--where=total_params < 12e6'], ['--sort=run'], ['--sort=evals'],
                             [f'--where={dice.choice(("steps", "val_bpb", "run", "evals"))} {dice.choice(("<", "==", "in", "and"))} {dice.choice(LITERALS)}']))
        return edits, dice.choice((['leaderboard', *where], ['predict'], ['reproduce']))

    def ask(self, folder, argv):
        import bench_mfu
        what, *argv = argv
        if what == 'leaderboard':
            return bench_mfu.main(['--leaderboard', str(folder), *argv])
        if what == 'predict':
            return bench_mfu.main(['--predict', str(folder / 'doll1'), str(folder / 'doll2')])
        from config import bench_reproduce
        asked = []

        def call(words):                         # in the place of the run: as if it had ended in the same result
            asked.extend(words[2:])
            if any(b'\0' in os.fsencode(word) for word in words):
                raise ValueError('embedded null byte')         # as subprocess has it
            with contextlib.suppress(shutil.Error):          # a pipe
                shutil.copytree(folder / 'two', folder / 'again', dirs_exist_ok=True)
            return 0
        bench_reproduce.subprocess = SimpleNamespace(call=call)
        with contextlib.suppress(SystemExit):
            bench_mfu.main([f'--reproduce={folder / "one"}', f'--compare_dir={folder / "again"}'])
        for word in asked:
            if not word.startswith('--') and Path(word).resolve().parent != ROOT / 'config' or '\0' in word:
                raise Broken(f'a result has train.py run {word}')


class Requests(Target):
    """What a stranger sends to sample.py --serve: it says what is wrong, and goes on answering others."""
    said = {b'200', b'400', b'403', b'404', b'405', b'408', b'411', b'413', b'414', b'415', b'431', b'501', b'503', b'505'}
    lines = ['Transfer-Encoding: chunked', 'Content-Length: 5', 'Content-Length: -1', 'Content-Length: 1e3', 'Content-Length: 0x10', 'Content-Length: 999999999',
             'Expect: 100-continue', 'Host: elsewhere', 'Host:', 'Origin: null', 'Connection: keep-alive', 'Content-Type: text/plain', 'Content-Encoding: gzip',
             'Authorization: Basic eA==', 'Upgrade: websocket', 'X: ' + 'y' * 70_000, 'no header', ': none', ' folded']

    def __init__(self, bases):
        asked = {'generate': dict(model='a', prompt='Mia', max_tokens=3, temperature=0.5, ids=[77], seed=1, top_k=3, top_p=0.9), 'score': dict(model='a', texts=['Mia lost', 'x']),
                 'completions': dict(model='a', prompt=['Mia'], max_tokens=3, stop=['.'], stream=True, n=1),
                 'chat/completions': dict(model='a', messages=[dict(role='user', content='Mia?')], max_tokens=3)}
        self.bodies = {f'{path.replace("/", "-")}.http': body for path, body in asked.items()}
        self.heads = {name: f'POST /{"v1" if "compl" in name else "api"}/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n'
                      for name, path in zip(self.bodies, asked)}
        pages = {f'get{i}.http': f'GET {path} HTTP/1.1\r\nHost: localhost:8000\r\n\r\n'.encode() for i, path in enumerate(('/', '/api/models', '/v1/models'))}
        super().__init__({name: self.request(name, body) for name, body in self.bodies.items()} | pages)
        self.run, self.port = bases.run, None

    def request(self, name, body):
        text = json.dumps(body)
        return f'{self.heads[name]}Content-Length: {len(text)}\r\n\r\n{text}'.encode()

    def draw(self, dice):
        name, kind = dice.choice([*self.files, *self.bodies]), dice.random()
        if name in self.bodies and kind < 0.6:
            path = dice.choice([*paths_of(self.bodies[name])][1:])
            value = dice.choice([v for v in VALUES if not isinstance(v, dict) or '$' not in v] + ['a', 'x' * 70_000, [0] * 3000, [[]] * 9, {'a': [{}]}])
            body = changed(copy.deepcopy(self.bodies[name]), path, (lambda _: value) if dice.random() < 0.85 else None)
            edits = [['write', name, self.request(name, body).decode()]]
        elif kind < 0.75:
            line = dice.choice(self.lines)
            edits = [['sub', name, self.files[name].index(b'\r\n') + 2, 0, f'{line}\r\n', dice.choice((1, 1, 2, 150))]]
        else:
            edits = [some_bytes(dice, self.files[name], name) for _ in range(dice.choice((1, 1, 2)))]
        return edits, [name, dice.choice(('whole', 'whole', 'open', 'gone', 'pieces'))]

    def open(self):
        """The server, once a process."""
        import sample
        from config import sample_serve
        sample_serve.TOKENS, sample_serve.PATIENCE = 256, 1
        sample_serve.Handler.timeout = 1
        lane = sample_serve.Lane('a', sample.open_run(self.run))
        self.server = sample_serve.Server('127.0.0.1', 0, [lane], sample.Energy('cpu', time.monotonic()), '', 'world')
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True).start()

    def send(self, data, how):
        """What comes back, to the end."""
        told = b''
        with socket.create_connection(('127.0.0.1', self.port), timeout=10) as s, contextlib.suppress(ConnectionError):
            for piece in [data] if how != 'pieces' else [data[i:i + 40] for i in range(0, min(len(data), 2000), 40)]:
                s.sendall(piece)
            if how == 'gone':
                return None
            if how != 'open':
                with contextlib.suppress(OSError):           # it has closed already
                    s.shutdown(socket.SHUT_WR)
            while more := s.recv(65536):
                told += more
        return told

    def ask(self, folder, argv):
        from config import UserError
        name, how = argv
        if not self.port:
            self.open()
        told = self.send((folder / name).read_bytes(), how)
        again = self.send(self.files['get1.http'], 'whole')
        if not again.startswith(b'HTTP/1.1 200'):
            raise Broken(f'and then others get {again[:200]!r}')
        if not told:
            raise UserError('no answer, or nobody who waits for one')
        head, _, body = told.partition(b'\r\n\r\n')
        words = head.split(b' ', 2)
        if words[0] == b'HTTP/1.1' and words[1] == b'100':
            words = body.split(b' ', 2)
            body = body.partition(b'\r\n\r\n')[2]
        if words[0] != b'HTTP/1.1' and told[:1] != b'{' or words[0] == b'HTTP/1.1' and words[1] not in self.said or b'Traceback' in told:
            raise Broken(f'answered by {told[:300]!r}')
        if words[1:2] != [b'200']:
            raise UserError(f'declined: {told[:300]!r}')


class Lines(Target):
    """Command lines, and what they name: a run, text, data, and things that are none of these."""
    scripts = 'train', 'prepare', 'sample', 'bench'
    odd = ['1e999', '-1e999', 'nan', '-0', '0x10', '0b1', '1_000', '\u0663', '\u221e', '9' * 5000, '-' + '9' * 400, '1e400', '5e-324', '0.1', '1', '2', '3', '7', '64', '0', '-1', '', ' ', 'é',
           '\ud800', '\udcff', 'x' * 100_000, 'None', 'True', 'False', 'a,b', 'a:1', 'tales:2', 'tales:nan', 'all', '-', '--', '=', '==', '%s%n{0}', '\n', '\x1b[2J', '$(touch x)', ';touch x',
           '{case}/run', '{case}/text', '{case}/data', '{case}/pipe', '{case}/device', '{case}/empty', '{case}/nothing/there', '{case}/text/tales.train', '{case}/run/ckpt.pt',
           '{case}/config.py', '{case}/run/result.json', 'files:{case}/text', 'files:{case}/pipe', 'files:{case}/device', 'files:', 'files:.', 'quickstart', 'gpt2', 'bytes']

    def __init__(self, bases):
        import bench_mfu
        import sample
        from config import verbs
        data = {f'data/{bases.data.name}/{p.name}': p.read_bytes() for p in bases.data.iterdir() if p.is_file()}
        text, run = {f'text/{p.name}': p.read_bytes() for p in bases.text.iterdir()}, {f'run/{p.name}': p.read_bytes() for p in bases.run.iterdir() if p.is_file() and p.name[0] != '.'}
        super().__init__(data | text | run | {'config.py': b'n_layer = 1\n', 'empty': b''})
        self.args = [arg for arg in bases.args if not arg.startswith(('--dataset', '--data_dir'))] + ['--dataset=files:{case}/text', '--data_dir={case}/data', '--out_dir={case}/new', '--min_doc_bytes=0']
        ideas = bench_mfu.prepare_data.Ideas([], bench_mfu.TABLES).known
        options = [name[2:] for name in sample.the_options([])._option_string_actions if name[:2] == '--']
        self.names = dict(train=[*ideas], prepare=[*bench_mfu.prepare_data.Ideas([], [bench_mfu.prepare_data.Options]).known, *verbs('prepare'), 'help'],
                          sample=[name for name in options if name not in ('interactive', 'compile')], bench=[*ideas, *verbs('bench'), 'leaderboard', 'compare', 'where', 'sort', 'json', 'write'])

    def draw(self, dice):
        script = dice.choice(self.scripts)
        given = dict(train=self.args, bench=self.args, prepare=self.args[-4:-2] + ['--tokenizer=bytes', '--min_doc_bytes=0'], sample=['{case}/run', 'Mia', '--max_new_tokens=2'])[script]
        words = [] if dice.random() < 0.1 else [*given]
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            name, value = dice.choice(self.names[script]), dice.choice(self.odd)
            words.insert(dice.randrange(len(words) + 1) if script == 'sample' else len(words), dice.choice((
                *[f'--{name}={value}'] * 5, f'--{name}', f'--{name}=', value.replace('pipe', 'device'), f'-{value}', f'--{value}', f'--no-{name}', f'-{name[:1]}', '{case}/config.py', *given[-1:])))
        return [], [script, *words]

    def ask(self, folder, argv):
        import bench_mfu
        import prepare_data
        import sample
        import train
        from config import UserError, verb, verbs
        os.mkfifo(folder / 'pipe')
        (folder / 'device').symlink_to('/dev/zero')
        script, *argv = [arg.replace('{case}', str(folder)) for arg in argv]
        argv = [arg for arg in argv if '\0' not in arg]           # no system hands one on
        home = os.getcwd()
        os.chdir(folder)
        try:
            if script == 'train':
                if {'-h', '--help'} & {*argv}:
                    return
                if run := train.begin(argv):
                    run.open()
                    run.build()
            elif script == 'prepare':
                if prepare_data.main(argv):
                    raise UserError('refused by prepare_data.py')
            elif script == 'sample':
                sample.main(argv)
            else:
                for thing, name in [*((bench_mfu, name) for name in ('measure_all', 'compare_runs', 'compile_for', 'compile_only')),
                                    *((verb('bench', name), 'main') for name in verbs('bench') if name != 'predict')]:
                    setattr(thing, name, lambda *args: {})   # what trains
                bench_mfu.main(argv)
        finally:
            os.chdir(home)
            for lock in sample.OWNED.values():
                lock.close()
            sample.OWNED.clear()


TARGETS = dict(configs=Configs, checkpoints=Checkpoints, resumes=Resumes, data=Data, evals=Evals, corpora=Corpora, results=Results, chats=Chats, requests=Requests, lines=Lines)


# ---- a case ------------------------------------------------------------------------------------------------

class Broken(Exception):
    """Something that must not be."""


class Slow(BaseException):
    """Nothing that is made for exceptions catches this."""


def bases_of(corpus, run, folder):
    """What cases begin with: of a small corpus (conftest.Corpus) and a finished run on it."""
    import prepare_data
    texts = [f'{TEXT} {i}' for i in range(200)]
    bpe = prepare_data.BPETokenizer.train(texts, 300)
    import base64
    gpt2 = b''.join(b'%s %d\n' % (base64.b64encode(bytes([i])), i) for i in range(256)) + b''.join(
        b'%s %d\n' % (base64.b64encode(p), 256 + i) for i, p in enumerate((b'he', b'th', b'the', b' t')))
    data = folder / 'base-text'
    return SimpleNamespace(args=corpus.args, run=run, data=corpus.folder, text=corpus.source, tokenizer=prepare_data.ByteTokenizer(), folder=data, tokenizers={
        'bpe/tokenizer.model': bpe.blob, 'roles/tokenizer.model': bpe.with_roles(['user', 'assistant']).blob, 'gpt2/tokenizer.tiktoken': gpt2})


def outside(place):
    """All that is beside a case, and when it was changed."""
    seen = {}
    for top in ('out', 'cwd', 'home'):
        for path in [place / top, *(place / top).rglob('*')]:
            stat = path.lstat()
            seen[str(path.relative_to(place))] = stat.st_size if path.is_file() else 0, stat.st_mtime_ns, stat.st_mode
    return seen


def furnish(place):
    """What stands beside a case."""
    for top in ('out', 'cwd', 'home'):
        shutil.rmtree(place / top, ignore_errors=True)
        (place / top).mkdir(parents=True)
    (place / 'out' / 'secret').write_text('nobody is to change this\n')
    (place / 'out' / 'idea.py').write_text(f'open({str(place / "out" / "touched")!r}, "w")\n')


@contextlib.contextmanager
def bounded():
    """Slow after so much time, MemoryError after so many bytes more."""
    def stop(*_):
        raise Slow
    before = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    mine = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (mine + MEMORY, hard))
        signal.setitimer(signal.ITIMER_PROF, CPU, 1)     # again and again, should something swallow it
        signal.setitimer(signal.ITIMER_REAL, WALL, 1)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before):
            signal.signal(number, handler)


def attempt(target, case, place):
    """What is wrong with how a case ended, or ''; and whether it was accepted."""
    from config import UserError, in_words
    folder = place / 'case'
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in target.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for one in case['edits']:
        with contextlib.suppress(OSError, ValueError, IndexError, OverflowError, RecursionError, EOFError, tokenize.TokenError):  # of a file that an earlier one took away
            edit(folder, place / 'out', *one)
    before, wrong, accepted = outside(place), '', False
    try:
        with bounded():
            target.ask(folder, case['argv'])
        accepted = True
    except (UserError, OSError, FloatingPointError) as e:        # the last: a sentence of train.py and sample.py
        try:
            said = in_words(e)
            wrong = '' if len(said) > 8 else f'it says {said!r} and no more'
        except OSError:
            wrong = f'an OSError that names no file: {traceback.format_exc(limit=-3)}'
    except SystemExit as e:
        wrong = '' if e.code in (0, 2) and case['argv'][:1] == ['sample'] else f'exit code {e.code}'
    except Slow:
        wrong = f'took more than {CPU} s of CPU or {WALL} s: {traceback.format_exc(limit=-4)}'
    except BaseException as e:                   # tiktoken's panics are no Exception
        wrong = f'{type(e).__name__}: {"".join(traceback.format_exception(e, limit=-4))[-1800:]}'
    if (after := outside(place)) != before:
        differ = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        wrong = wrong or f'outside of its folder changed: {", ".join(sorted(differ))}'
        furnish(place)
        os.chdir(place / 'cwd')
    return '' if wrong and target.may(wrong, folder, case) else wrong, accepted


def child(name, bases, cases, place, pipe):
    """Attempts cases in this process, writes a line before and after each; never returns."""
    from config import print_without_fail
    try:
        for top in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), top)
        os.chdir(place / 'cwd')
        os.environ |= dict(HOME=str(place / 'home'), HF_HUB_OFFLINE='1')
        sys.dont_write_bytecode = True
        print_without_fail()
        target = TARGETS[name](bases)
        for case in cases:
            if isinstance(case, int):            # drawn here, so that what it is of is the target's
                edits, argv = target.draw(random.Random(case))
                case = dict(target=name, edits=edits, argv=argv)
            os.write(pipe, f'{json.dumps(case)}\n'.encode())
            wrong, accepted = attempt(target, case, place)
            os.write(pipe, f'{json.dumps([wrong, accepted])}\n'.encode())
    except BaseException:
        os.write(pipe, f'{json.dumps(["the harness: " + traceback.format_exc(), False])}\n'.encode())
    finally:
        os._exit(0)


def ended(name, bases, cases, folder, until=float('inf')):
    """Yields (case, what is wrong, accepted) of each, in processes of their own that go on after one that died."""
    cases = iter(cases)
    while True:
        place = Path(tempfile.mkdtemp(prefix=f'{name}-', dir=folder))
        furnish(place)
        left, right = os.pipe()
        some = list(next_ones(cases, 500 if until < float('inf') else 10 ** 9))
        if not some:
            return
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            os.close(left)
            child(name, bases, some, place, right)
        os.close(right)
        done, case = 0, None
        with open(left, encoding='utf-8') as lines:
            while line := in_time(lines.readline, pid):
                told = json.loads(line)
                if isinstance(told, dict):
                    case = told
                    continue
                yield case, *told
                done, case = done + 1, None
                if time.monotonic() > until:
                    break
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        shutil.rmtree(place, ignore_errors=True)
        if case:
            yield case, f'the process died of signal {-code}', False
            cases = iter([*some[done + 1:], *cases])
        if time.monotonic() > until:
            return


def in_time(read, pid):
    """What read() returns; a process that is stuck where no signal is heard is ended, and then that is nothing."""
    timer = threading.Timer(3 * WALL, os.kill, (pid, signal.SIGKILL))
    timer.start()
    try:
        return read()
    finally:
        timer.cancel()


def next_ones(cases, most):
    for _, case in zip(range(most), cases):
        yield case


def fuzz(name, bases, folder, seconds, seed, say=print):
    """Draws cases of a target for so long; (cases, accepted, [case with its bug...], one of each kind)."""
    began, n, good, found = time.monotonic(), 0, 0, {}
    numbers = iter(range(seed << 32, (seed + 1) << 32))
    for case, wrong, accepted in ended(name, bases, numbers, folder, began + seconds):
        n, good = n + 1, good + accepted
        if wrong:
            where = [line.strip() for line in wrong.splitlines() if line.strip().startswith('File "')]
            kind = (where or [wrong])[-1].split(', in ')[0] + wrong[:40]
            if kind not in found or len(json.dumps(case)) < len(json.dumps(found[kind][0])):
                if kind not in found:
                    say(f'{name}: {json.dumps(case)[:600]}\n{wrong}\n')
                found[kind] = case, wrong
    return n, good, [case | dict(bug=' '.join(wrong.split())[-200:]) for case, wrong in found.values()]


def begin(folder):
    """A small corpus, and a finished run on it."""
    import conftest
    corpus = conftest.Corpus(folder)
    code, _, err = conftest.script('train.py', *corpus.args, '--max_steps=6', '--tokens_per_step=1024', '--seed=3', '--eval_interval=0.5', '--out_dir=run', cwd=folder)
    if code:
        raise SystemExit(err)
    return bases_of(corpus, folder / 'run', folder)


def main(argv, say=print):
    options = options_of(argv, minutes='1', seed='1', only=','.join(TARGETS), keep='')
    if not options:
        say(__doc__)
        return 2
    for path in (ROOT, ROOT / 'tests'):
        sys.path.insert(0, str(path))
    failed = 0
    with tempfile.TemporaryDirectory(prefix='fuzz-') as folder:
        bases = begin(Path(folder))
        for name in options['only'].split(','):
            n, good, found = fuzz(name, bases, folder, 60 * float(options['minutes']), int(options['seed']), say)
            failed += len(found)
            say(f'{name}: {n:,} cases, {good:,} accepted, {len(found)} kinds of failure')
            if options['keep']:
                with open(options['keep'], 'a') as f:
                    f.writelines(json.dumps(case) + '\n' for case in found)
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

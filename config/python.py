"""Python in thirty minutes on one RTX 4090: the shape of babylm.py on the library of the Python that runs it,
which is real code and on every machine, or on the .py files in data/raw/python. A file is a document, longer
ones are cut at blank lines. What it does on a CPU stands in RESULTS.md.

    python train.py config/python.py
    python prepare_data.py config/python.py --dataset=files:src        your own, or a clone of a project
"""
import itertools
import json
import re
import sysconfig
import tokenize
import warnings
from pathlib import Path

import prepare_data
from prepare_data import Part

dataset = 'python'
n_layer = 7
n_head = 5
n_embd = 320
block_size = 512
tie_embeddings = True
tokens_per_step = 131072
micro_batch_size = 128
sample_prompt = 'def '

NOT_TEXT = {'.', '__pycache__'}          # folders that hold none; a dot begins a hidden one
NOT_CODE = {'site-packages', 'dist-packages', 'test', 'tests'}   # of Python's library: others' code, data
NAMED = re.compile(r'(^|[\W_])(python|thealgorithms|humaneval|mbpp)')


class Corpus(prepare_data.Corpus):
    sets = {'python': dict(
        about="the running Python's own library, or the .py files in data/raw/python; a document is a file",
        mb=13, licence='PSF-2.0 for the library', files={})}

    def is_code(self):
        """Whether the data set's files are Python, or a clone of a project in it."""
        files = [self.root] if self.root.is_file() else [p for p in self.root.rglob('*') if p.is_file()
            and not NOT_TEXT & {part if part[0] != '.' else '.' for part in p.relative_to(self.root).parts}]
        suffixes = {p.suffix for p in files} - {'', '.md', '.rst', '.toml', '.cfg', '.yml', '.ini'}
        return suffixes == {'.py'} or self.s.dataset == 'python' and not suffixes

    def text(self, temp, report):
        if not self.is_code():
            return super().text(temp, report)
        return self.write_code(temp, self.root, report).path

    def kind_of(self, part, lines):
        return 'code' if NAMED.search(part.source) else super().kind_of(part, lines)

    def programs(self, folder, root, report, most=None):
        """(name, text) of a folder's code, or of Python's own library. `folder` is for scratch."""
        root = root if root.exists() else Path(sysconfig.get_paths()['stdlib'])
        return itertools.islice(python_documents(root, report), most)

    def write_code(self, folder, root, report, most=None):
        """Writes programs as a part for training."""
        rows = self.programs(folder, root, report, most)
        return write_texts(folder, 'python', (text for _, text in rows), self.text_field)


def python_documents(root, report):
    """(name, text) of the Python files below root that compile; of Python's own library without tests."""
    own = root == Path(sysconfig.get_paths()['stdlib'])
    for path in [root] if root.is_file() else sorted(root.rglob('*.py')):
        name = path.relative_to(root.parent if root.is_file() else root)
        if not path.is_file() or own and NOT_CODE & set(name.parts) or any(part[0] == '.' for part in name.parts):
            continue
        try:
            with tokenize.open(path) as f:                       # in the encoding that its first lines name
                text = f.read()
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')                  # about the code that is read, not about ours
                compile(text, path.name, 'exec', dont_inherit=True)
            yield name.as_posix(), text
        except (SyntaxError, ValueError, RecursionError, MemoryError):          # UnicodeDecodeError is one
            report['files dropped, no Python that compiles'] += 1


def write_texts(folder, name, texts, text_field):
    """Generated documents as a part for training."""
    (folder / 'raw').mkdir(exist_ok=True)
    with open(folder / 'raw' / f'{name}.jsonl', 'w', encoding='utf-8') as f:
        f.writelines(json.dumps({text_field or 'text': text}) + '\n' for text in texts)
    return Part(folder / 'raw' / f'{name}.jsonl', f'{name}.jsonl', 'train', name)

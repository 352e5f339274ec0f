"""Turns text into what the trainer reads: documents, a tokenizer, memory-mapped bins.

    python prepare_data.py stories                       a generated world; no download
    python prepare_data.py babylm                        BabyLM's 10M words, downloaded or in data/raw/babylm
    python prepare_data.py files:texts --tokenizer gpt2  your own .txt, .md, .jsonl, .parquet; .gz and .xz too

It writes a folder such as data/babylm-bpe8192:

    train.bin val.bin test.bin     token ids back to back; each document is BOS and its tokens
    <split>.docs.npy               a row a document: first token, raw bytes, source, difficulty
    tokenizer.*                    all that is needed to read the ids again
    meta.json                      counts, licences, what was dropped and why, the fingerprint

The text is read twice: once to check it, to find what validation holds and to sample text for the tokenizer,
once to encode. Both passes stream, so memory does not grow with the corpus.
"""
import argparse
import base64
import datetime
import difflib
import errno
import functools
import gzip
import hashlib
import http.client
import io
import json
import lzma
import os
import re
import shutil
import signal
import struct
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

VERSION = 1                  # of the bin format; the trainer refuses any other
MAX_DOC_BYTES = 16384        # longer documents are cut into passages, so that shuffling means something
VAL_FRACTION = 0.02          # of the documents, by hash, where a corpus brings no validation split of its own
SAMPLE_BYTES = 24_000_000    # the tokenizer learns from at most this; 8 MB gives 0.2 % fewer bytes per token
MIN_TRAIN_TOKENS = 256       # fewer cannot fill one block of any model worth training
BATCH_BYTES = 4_000_000      # text encoded at once: enough to keep every thread busy, little enough to hold
SPLITS = ('train', 'val', 'test')
COUNTS = ('documents', 'words', 'bytes', 'tokens')
FULL = (errno.ENOSPC, errno.EDQUOT)
DOC = np.dtype([('start', '<i8'), ('bytes', '<i4'), ('source', '<i2'), ('difficulty', '<f4')])

# One entry a data set. files: name in data/raw/<dataset> -> path in the repository on Hugging Face.
HUGGING_FACE = 'https://huggingface.co/datasets'
BABYLM_SOURCES = ('aochildes', 'bnc_spoken', 'cbt', 'children_stories', 'gutenberg', 'open_subtitles', 'qed',
                  'simple_wikipedia', 'switchboard', 'wikipedia')
DATASETS = {
    'stories': dict(
        about='a generated world of small stories, seeded and endless; a document is a story',
        licence='made here; no rights reserved', files={}),
    'babylm': dict(
        about='BabyLM strict-small (2023), ten sources, 10M words; headers or blank lines part documents',
        licence='as distributed with BabyLM, differs by source', repo='cambridge-climb/BabyLM',
        files={f'{source}.{split}': f'clean/{folder}/{source}.txt' for source in BABYLM_SOURCES
               for split, folder in (('train', '10M'), ('dev', 'dev'), ('test', 'test'))}),
    'tinystories': dict(
        about='TinyStories (Eldan and Li 2023, arXiv 2305.07759); a document is a story',
        licence='CDLA-Sharing-1.0', repo='roneneldan/TinyStories',
        files={name: name for name in ('TinyStories-train.txt', 'TinyStories-valid.txt')}),
    'simplestories': dict(
        about='SimpleStories (Finke et al. 2025, arXiv 2504.09184), its test split held out; a row a story',
        licence='MIT', repo='SimpleStories/SimpleStories',
        files={f'simplestories.train-{i:05d}-of-00007.parquet': f'data/train-{i:05d}-of-00007.parquet'
               for i in range(7)} | {'simplestories.dev.parquet': 'data/test-00000-of-00001.parquet'}),
}


class UserError(Exception):
    """A mistake the user can mend: its text is all that is shown, and the exit code is 2."""


# ----------------------------------------------------------------------------------------------------
# Tokenizers: lossless, decode(encode(x)) == x for every string, so that bits per byte compare across them

class Tokenizer:
    """What the three share. `table` holds the bytes of each id; the BOS has none."""
    kind: str
    filename: str
    bos: int
    table: list

    @property
    def vocab_size(self):
        return len(self.table)

    def token_bytes(self, token):
        return self.table[token]

    def decode(self, ids):
        return b''.join([self.table[i] for i in ids]).decode('utf-8', errors='replace')


class ByteTokenizer(Tokenizer):
    kind, filename, bos = 'bytes', 'tokenizer.bytes', 256

    def __init__(self, blob=b'an id is a byte; 256 is BOS\n'):
        self.blob = blob
        self.table = [bytes([i]) for i in range(256)] + [b'']

    def encode(self, text):
        return list(text.encode())

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]


class GPT2Tokenizer(Tokenizer):
    kind, filename, bos = 'gpt2', 'tokenizer.tiktoken', 50256
    hashes = ('1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
              '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783')
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

    def __init__(self, blob):
        import tiktoken
        self.blob = blob                         # a line an id: its bytes in base64, the id
        self.table = [base64.b64decode(line.split()[0]) for line in blob.splitlines()]
        ranks = {piece: i for i, piece in enumerate(self.table)}
        self.table.append(b'')
        self.bpe = tiktoken.Encoding('gpt2', pat_str=self.pattern, mergeable_ranks=ranks,
                                     special_tokens={'<|endoftext|>': self.bos})

    @classmethod
    def find(cls, folders):
        """From the first folder with vocab.bpe and encoder.json, else from tiktoken's cache or download."""
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        try:
            for folder in folders:
                files = [Path(folder) / name for name in ('vocab.bpe', 'encoder.json')]
                if all(f.is_file() for f in files):
                    ranks = data_gym_to_mergeable_bpe_ranks(*map(str, files), *cls.hashes)
                    break
            else:
                ranks = tiktoken.get_encoding('gpt2')._mergeable_ranks
        except (OSError, ValueError) as e:       # no network (requests' errors are OSErrors), or other files
            raise UserError(f'GPT-2\'s tokenizer could not be had ({type(e).__name__}): put vocab.bpe and '
                            f'encoder.json into {folders[-1]}, or name a folder with --gpt2_dir') from None
        pieces = sorted(ranks, key=ranks.get)
        return cls(b''.join(b'%s %d\n' % (base64.b64encode(p), i) for i, p in enumerate(pieces)))

    def encode(self, text):
        return self.bpe.encode_ordinary(text)

    def encode_batch(self, texts):
        rows = self.bpe.encode_ordinary_batch(texts, num_threads=threads())
        return [np.array(row, np.uint16) for row in rows]


class BPETokenizer(Tokenizer):
    """sentencepiece BPE with bytes for what it does not know.

    sentencepiece spells a space U+2581 and drops tabs from training. So tabs and newlines travel as private
    characters, and where a text holds one of the marks itself, its bytes are put in by hand.
    """
    kind, filename, bos = 'bpe', 'tokenizer.model', 0
    unk, first_byte = 1, 2       # sentencepiece insists on an unk; with byte fallback none is ever produced
    tab, newline = '\ue009', '\ue00a'
    marks = re.compile('([\u2581\ue009\ue00a]+)')
    # Pieces are learned inside these alone: a line's end with the label that opens the next (`.\n*MOT:\t`,
    # `\n- `, an indent), a word with its space and its 's, a number, punctuation, spaces. Bytes per token at
    # 8,192 ids on the validation text of 19M words in BabyLM's domains: 3.93; with labels apart 3.36, with 's
    # apart 3.80; split as sentencepiece does it, by script and space, 3.52; unsplit 4.11, but that glues the
    # end of a sentence to the first word of the next.
    words = re.compile(r'''\ ?[^\w\s]*(?:\r?\n)+(?:\S{1,12}:\t|-\ |\ +(?=\ ))? | \ ?[^\W\d_]+(?:['’][a-z]+)?
                           | \ ?\d{1,4} | \ ?(?:[^\w\s]|_)+ | \ +(?=\ ) | \s''', re.X)

    def __init__(self, blob):
        import sentencepiece
        self.blob = blob
        self.bpe = sentencepiece.SentencePieceProcessor(model_proto=blob)
        unspell = str.maketrans({'\u2581': ' ', self.tab: '\t', self.newline: '\n'})
        pieces = [self.bpe.id_to_piece(i) for i in range(self.bpe.vocab_size())]
        self.table = [p.translate(unspell).encode() for p in pieces]
        self.table[self.bos] = self.table[self.unk] = b''
        self.table[self.first_byte:self.first_byte + 256] = [bytes([i]) for i in range(256)]

    @classmethod
    def train(cls, texts, vocab_size):
        """Learns a vocabulary, BOS, unk and 256 bytes included. The same texts give the same model."""
        import sentencepiece
        counts = Counter()
        for text in texts:
            counts.update(cls.words.findall(text))
        lines = [f'{cls.spell(word)}\t{n}' for word, n in sorted(counts.items())
                 if not cls.marks.search(word) and '\0' not in word]
        out = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), input_format='tsv', model_writer=out, model_type='bpe',
                vocab_size=vocab_size, byte_fallback=True, character_coverage=0.9999,
                max_sentence_length=1 << 20, normalization_rule_name='identity',
                add_dummy_prefix=False, remove_extra_whitespaces=False,
                split_by_whitespace=False, split_by_unicode_script=False, split_by_number=False,
                allow_whitespace_only_pieces=True, bos_id=cls.bos, unk_id=cls.unk, eos_id=-1, pad_id=-1,
                bos_piece='<|endoftext|>', num_threads=threads(), minloglevel=2)
        except RuntimeError as e:
            if found := re.search(r'value <= (\d+)', str(e)):
                raise UserError(f'a vocabulary of {vocab_size:,} is too large for this text: '
                                f'use --vocab_size {found[1]} or less, or --tokenizer bytes') from None
            if found := re.search(r'required_chars[^0-9]*\d+ vs (\d+)', str(e)):
                raise UserError(f'a vocabulary of {vocab_size:,} is too small for the letters of this text: '
                                f'use --vocab_size {found[1]} or more, or --tokenizer bytes') from None
            raise
        return cls(out.getvalue())

    @classmethod
    def spell(cls, text):
        return text.replace('\n', cls.newline).replace('\t', cls.tab)

    def encode(self, text):
        ids = []
        for i, part in enumerate(self.marks.split(text)):
            if i % 2:                    # split() puts what the pattern caught at the odd places
                ids += [self.first_byte + b for b in part.encode()]
            else:
                ids += self.bpe.encode(self.spell(part))
        return ids

    def encode_batch(self, texts):
        rows = self.bpe.encode([self.spell(text) for text in texts], num_threads=threads())
        return [np.array(self.encode(text) if self.marks.search(text) else row, np.uint32)
                for text, row in zip(texts, rows)]


TOKENIZERS = {t.kind: t for t in (BPETokenizer, ByteTokenizer, GPT2Tokenizer)}


def threads():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def load_tokenizer(folder):
    """The tokenizer whose file lies in a folder: a prepared data set's, or a run's copy."""
    for cls in TOKENIZERS.values():
        path = Path(folder) / cls.filename
        if path.is_file():
            return cls(path.read_bytes())
    raise UserError(f'{folder} holds no tokenizer ({", ".join(t.filename for t in TOKENIZERS.values())}): '
                    f'prepare the data again with --overwrite')


# ----------------------------------------------------------------------------------------------------
# Source files: where they are, and which split and source each one is

@dataclass
class Part:
    path: Path
    name: str                # relative to the corpus, for the fingerprint
    split: str               # '' where the hash of each document decides
    source: str


SUFFIX = r'(?:\.(?:txt|md|jsonl|parquet))?(?:\.(?:gz|xz))?'
SPLIT_NAME = re.compile(r'(.+?)[.-](train|dev|val|valid|validation|test)(?:[.-]\d+(?:-of-\d+)?)?' + SUFFIX)


def stem(name):
    return re.sub(SUFFIX + '$', '', name, count=1)


def find_parts(root):
    """The files below `root`, validation and test first, and the names of those that were left out.

    Where a file is called `<source>.train`, names decide the splits; else the hash of each document does.
    """
    if not root.exists():
        raise UserError(f'{root} does not exist: give files:<path> the path of a text file or a folder')
    if root.is_file():
        return [Part(root, root.name, '', stem(root.name))], []
    names = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob('*')) if p.is_file()}
    names = {name: p for name, p in names.items() if not re.search(r'(^|/)\.', name)}
    found = {name: SPLIT_NAME.fullmatch(name) for name in names}
    if not any(m and m[2] == 'train' for m in found.values()):
        return [Part(p, name, '', stem(name)) for name, p in names.items()], []
    parts = [Part(names[name], name, m[2] if m[2] in ('train', 'test') else 'val', m[1])
             for name, m in found.items() if m]
    if not any(part.split == 'val' for part in parts):
        for part in parts:
            part.split = part.split.replace('train', '')
    return sorted(parts, key=lambda part: part.split in ('train', '')), [n for n, m in found.items() if not m]


def data_name(dataset):
    if dataset.startswith('files:'):
        slug = re.sub(r'[^a-z0-9_]+', '-', stem(Path(dataset[6:]).resolve().name).lower()).strip('-')
        return f'files-{slug or "text"}'
    if dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS, 1)
        raise UserError(f'there is no data set {dataset!r}{f", did you mean {near[0]}" if near else ""}: '
                        f'choose {", ".join(DATASETS)} or files:<path>')
    return dataset


def data_folder(dataset, tokenizer='bpe', vocab_size=8192, data_dir='data'):
    """Where a data set prepared with this tokenizer lies."""
    if tokenizer not in TOKENIZERS:
        raise UserError(f'there is no tokenizer {tokenizer!r}: choose {", ".join(TOKENIZERS)}')
    return Path(data_dir) / f'{data_name(dataset)}-{tokenizer}{vocab_size if tokenizer == "bpe" else ""}'


def source_root(dataset, data_dir):
    return Path(dataset[6:]) if dataset.startswith('files:') else Path(data_dir) / 'raw' / dataset


def fetch(dataset, raw, base_url):
    """Downloads what the folder `raw` lacks. One with files of other names is a corpus of the user's own."""
    entry = DATASETS[dataset]
    present = {p.name for p in raw.glob('[!.]*')}
    if present and not present & entry['files'].keys():
        return
    raw.mkdir(parents=True, exist_ok=True)
    for name, path in entry['files'].items():
        if name not in present:
            download(f'{base_url or HUGGING_FACE}/{entry["repo"]}/resolve/main/{path}', raw / name)


def download(url, path):
    from tqdm import tqdm
    part = path.with_name(f'.{path.name}.part')
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(part, 'wb') as out:
            size = int(response.headers.get('Content-Length') or 0)
            with tqdm(total=size or None, unit='B', unit_scale=True, desc=path.name, disable=None) as bar:
                while chunk := response.read(1 << 20):
                    out.write(chunk)
                    bar.update(len(chunk))
            if size and out.tell() != size:
                raise OSError(f'{out.tell():,} of {size:,} bytes came')
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as e:        # URLError, HTTPError and timeouts are OSErrors
        if getattr(e, 'errno', None) in FULL:
            raise
        raise UserError(f'{url} could not be downloaded ({e}): try again, or put it at {path}') from None
    finally:
        part.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------
# Documents: from files to text, streaming

SEPARATOR = b'<|endoftext|>'
BOUNDARY = {                 # what parts the documents of a file: the first that occurs in its first MiB
    'separator': re.compile(re.escape(SEPARATOR)),
    'header': re.compile(rb'^(?== = = .* = = =[ \t\r]*$)', re.M),    # an empty match: it stays with its text
    'blank': re.compile(rb'\n(?:[ \t\r]*\n)+'),
    'whole': re.compile(rb'(?!)'),
}
BLANK_START = re.compile(rb'(?:[ \t\r]*\n)*')


def cut(text, limit):
    """Where to end a passage of at most `limit` bytes: after a paragraph, line, sentence, word or letter."""
    for ends in ((b'\n\n',), (b'\n',), (b'. ', b'! ', b'? '), (b' ',)):
        at = max(text.rfind(end, limit // 2, limit) + len(end) for end in ends)
        if at > limit // 2:
            return at
    return next((at for at in range(limit, limit - 4, -1) if text[at] & 0xC0 != 0x80), limit)


def documents(blocks, boundary, limit, report):
    """The documents of one file, as bytes, at most `limit` each, without the blank lines around them."""
    tail, inside = b'', False                    # inside: a passage of this document is out already

    def passages(doc, keep):                     # returns the last `keep` bytes or less, for later
        nonlocal inside
        doc = doc if inside else doc[BLANK_START.match(doc).end():]
        while len(doc) > keep:
            report['documents cut into passages'] += not inside
            report['passages they were cut into'] += 1 + (not inside)
            inside, at = True, cut(doc, limit)
            yield doc[:at]
            doc = doc[at:]
        return doc

    for block in blocks:
        *ended, tail = boundary.split(tail + block)
        for doc in ended:
            doc = yield from passages(doc.rstrip(), limit)
            if doc:
                yield doc
            elif not inside and boundary is BOUNDARY['separator']:
                report['empty documents dropped'] += 1
            inside = False
        tail = yield from passages(tail, 2 * limit)           # what stays is longer than any boundary
    tail = yield from passages(tail.rstrip(), limit)
    if tail:
        yield tail


def open_source(raw, name):
    return gzip.open(raw) if name.endswith('.gz') else lzma.open(raw) if name.endswith('.xz') else raw


def bad_utf8(part):
    first = count = 0
    with open(part.path, 'rb') as raw, open_source(raw, part.name) as f:
        for number, line in enumerate(f, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                first, count = first or number, count + 1
    return UserError(f'{part.path} is not UTF-8: {count:,} bad line{"s" * (count > 1)}, the first is line '
                     f'{first:,}; convert it (iconv -f latin1 -t utf-8) or take it away')


def text_column(part, names, wanted):
    for name in (wanted,) if wanted else ('text', 'story'):
        if name in names:
            return name
    raise UserError(f'{part.path} has no field {wanted or "text or story"}, only {", ".join(names)[:200]}: '
                    f'name the field with --text_field')


def json_rows(part, f, text_field):
    for number, line in enumerate(f, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())      # decoded first: a bad byte is another mistake than bad JSON
            yield row[text_column(part, row.keys(), text_field)].encode()
        except (json.JSONDecodeError, UnicodeEncodeError, TypeError, AttributeError):
            raise UserError(f'{part.path} line {number:,} is not a JSON object with text in it: '
                            f'mend or delete the line') from None


def parquet_rows(part, f, text_field):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f'{part.path} is Parquet, which takes pyarrow to read: pip install pyarrow') from None
    table = ParquetFile(f)
    column = text_column(part, table.schema_arrow.names, text_field)
    for batch in table.iter_batches(batch_size=1024, columns=[column]):
        yield from ((text or '').encode() for text in batch.column(0).to_pylist())


def read(part, o, report, bar):
    """The documents of one file, as (bytes, str)."""
    def blocks(f, block):
        while block:
            yield block
            block = f.read(1 << 18)

    try:
        with open(part.path, 'rb') as raw, open_source(raw, part.name) as f:
            if stem(part.name) != part.name and re.search(r'\.(jsonl|parquet)\b', part.name):
                rows = json_rows if '.jsonl' in part.name else parquet_rows
                row_documents = functools.partial(documents, boundary=BOUNDARY['separator'],
                                                  limit=o.max_doc_bytes, report=report)
                docs = (doc for row in rows(part, f, o.text_field) for doc in row_documents([row, SEPARATOR]))
            else:
                head = f.read(1 << 20)
                boundary = next((b for b in BOUNDARY.values() if b.search(head)), BOUNDARY['whole'])
                docs = documents(blocks(f, head), boundary, o.max_doc_bytes, report)
            for doc in docs:
                bar.update(len(doc))
                yield doc, doc.decode()
    except UnicodeDecodeError:
        raise bad_utf8(part) from None
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as e:
        raise UserError(f'{part.path} is damaged ({e}): fetch it again') from None


# ----------------------------------------------------------------------------------------------------
# Pass 1: check everything, learn what validation holds, sample text for the tokenizer

def key_of(doc):
    """Two numbers in [0, 2^64) from the content, for the split and for the tokenizer's sample."""
    return struct.unpack('<QQ', hashlib.blake2b(doc, digest_size=16).digest())


@dataclass
class Scan:
    below: int                                   # where hashes decide, a lower key means validation
    held: set = field(default_factory=set)       # keys of validation and test documents
    sample: dict = field(default_factory=dict)   # key -> (rank, text), of the training split
    bytes: int = 0
    documents: int = 0


def scan(parts, o, bar):
    found, ceiling, size, low, high = Scan(int(o.val_fraction * 2**64)), 2**64, 0, 2**64, 0
    for part in parts:
        for doc, text in read(part, o, Counter(), bar):
            key, rank = key_of(doc)
            found.bytes += len(doc)
            found.documents += 1
            if part.split in ('val', 'test'):
                found.held.add(key)
            elif part.split == '' and key not in found.held:
                low, high = min(low, key), max(high, key)
            if key in found.held or part.split == '' and key < found.below or key in found.sample:
                continue
            if rank < ceiling:           # the lowest ranks: an even sample in one pass, whatever the length
                found.sample[key] = rank, text
                size += len(doc)
            while size > SAMPLE_BYTES:
                ceiling //= 2
                found.sample = {k: v for k, v in found.sample.items() if v[0] < ceiling}
                size = sum(len(t.encode()) for _, t in found.sample.values())
    if low == high:
        raise UserError('the corpus is one document, validation and training need one each: give more text')
    if found.below <= low < 2**64:               # a small corpus: the lowest hash alone is validation
        found.below = low + 1
        found.sample.pop(low, None)
    return found


# ----------------------------------------------------------------------------------------------------
# Pass 2: encode and append

class SplitWriter:
    """Appends documents to <split>.bin, counts them by source, and writes <split>.docs.npy at the end."""

    def __init__(self, folder, split, dtype, bos, n_sources):
        self.path, self.dtype, self.bos = folder / f'{split}.bin', dtype, np.array([bos])
        self.file, self.rows, self.tokens = open(self.path, 'wb'), [], 0
        self.counts = np.zeros((n_sources, len(COUNTS)), np.int64)

    def append(self, docs):
        """docs: (source, words, bytes, ids without BOS) each."""
        rows = np.zeros(len(docs), DOC)
        for row, (source, n_words, n_bytes, ids) in zip(rows, docs):
            row['start'], row['bytes'], row['source'] = self.tokens, n_bytes, source
            self.tokens += len(ids) + 1
            self.counts[source] += 1, n_words, n_bytes, len(ids) + 1
        self.rows.append(rows)                   # 18 bytes a document, the one thing that grows
        ids = np.concatenate([part for doc in docs for part in (self.bos, doc[3])])
        self.file.write(ids.astype(self.dtype).tobytes())

    def close(self):
        flush(self.file)
        self.file.close()
        np.save(self.path.with_name(f'{self.path.stem}.docs.npy'), np.concatenate(self.rows))

    def meta(self, names):
        rows = {name: dict(zip(COUNTS, row.tolist())) for name, row in zip(names, self.counts) if row[0]}
        total = dict(zip(COUNTS, self.counts.sum(0).tolist()))
        return total | dict(head_sha256=sha256_of(self.path, 1 << 20), sources=rows)


def encode(parts, found, tokenizer, folder, names, o, bar):
    """Writes the bins. Returns {split: SplitWriter}, what was dropped or cut, and a digest of the text."""
    dtype = '<u2' if tokenizer.vocab_size <= 65536 else '<u4'
    writers, report, digest, batch, size = {}, Counter(), hashlib.sha256(), [], 0

    def write():
        ids = tokenizer.encode_batch([text for _, _, _, text in batch])
        for split in {split: 0 for split, _, _, _ in batch}:
            if split not in writers:
                writers[split] = SplitWriter(folder, split, dtype, tokenizer.bos, len(names))
            writers[split].append([(source, len(text.split()), n_bytes, row)
                                   for (s, source, n_bytes, text), row in zip(batch, ids) if s == split])
        batch.clear()

    for part in parts:
        source = names.index(part.source)
        for doc, text in read(part, o, report, bar):
            key = key_of(doc)[0]
            if part.split in ('', 'train') and key in found.held:
                report['training documents dropped, identical to held-out ones'] += 1
                continue
            split = part.split or ('val' if key < found.below else 'train')
            digest.update(f'{split} {source} {len(doc)} '.encode() + doc)
            batch.append((split, source, len(doc), text))
            size += len(doc)
            if size >= BATCH_BYTES:
                write()
                size = 0
    if batch:
        write()
    for writer in writers.values():
        writer.close()
    return {s: writers[s] for s in SPLITS if s in writers}, report, digest.hexdigest()


# ----------------------------------------------------------------------------------------------------
# Build

def flush(f):
    f.flush()
    os.fsync(f.fileno())


def sha256_of(path, size=-1):
    with open(path, 'rb') as f:
        return hashlib.sha256(f.read(size)).hexdigest()


def build(dataset, tokenizer='bpe', vocab_size=8192, data_dir='data', overwrite=False, base_url=None,
          val_fraction=VAL_FRACTION, max_doc_bytes=MAX_DOC_BYTES, text_field=None, gpt2_dir=None,
          documents=40_000, seed=1337, quiet=False):
    """Prepares a data set and returns its folder, which appears complete or not at all. See --help."""
    o = SimpleNamespace(**locals(), root=source_root(dataset, data_dir))
    folder = data_folder(dataset, tokenizer, vocab_size, data_dir)
    if folder.exists() and not overwrite:
        raise UserError(f'{folder} exists already: use it, or prepare it anew with --overwrite')
    if not 0 < val_fraction < 1 or max_doc_bytes < 256:
        raise UserError(f'val_fraction is {val_fraction} and max_doc_bytes {max_doc_bytes}: '
                        f'give a fraction between 0 and 1, and 256 bytes or more')
    temp = folder.with_name(f'.{folder.name}.{os.getpid()}')
    old = temp.with_suffix('.old')
    try:
        temp.mkdir(parents=True)
        meta = fill(temp, o)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(temp, folder)
        shutil.rmtree(old, ignore_errors=True)   # not before the new one is in place
    except OSError as e:
        if e.errno in FULL:
            raise UserError(f'the disk of {Path(data_dir).resolve()} is full, and nothing was left behind: '
                            f'make room or choose another --data_dir') from None
        if isinstance(e, (PermissionError, NotADirectoryError, FileExistsError)):
            raise UserError(f'{e.filename}: {e.strerror}; mend that or choose another --data_dir') from None
        raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    if not quiet:
        print(summary(folder, meta))
    return folder


def fill(temp, o):
    """Writes all files of a data set into `temp`. Returns meta."""
    from tqdm import tqdm
    progress = functools.partial(tqdm, unit='B', unit_scale=True, disable=None)
    t0 = time.time()
    if o.dataset == 'stories':
        o.root = write_stories(temp, o.documents, o.seed)
    elif not o.dataset.startswith('files:'):
        fetch(o.dataset, o.root, o.base_url)
    parts, ignored = find_parts(o.root)
    names = sorted({part.source for part in parts})
    with progress(desc='checking') as bar:
        found = scan(parts, o, bar)
    if not found.documents:
        raise UserError(f'{o.root} holds no text: give a file or a folder with at least two documents')
    need = found.bytes * (2 if o.tokenizer == 'bytes' else 0.7) + 50 * found.documents
    free = shutil.disk_usage(temp).free
    if free < need:
        raise UserError(f'{o.data_dir} has {free / 1e6:,.0f} MB free, about {need / 1e6:,.0f} MB are needed: '
                        f'make room or choose another --data_dir')
    if o.tokenizer == 'bpe':
        tokenizer = BPETokenizer.train((text for _, text in found.sample.values()), o.vocab_size)
    elif o.tokenizer == 'gpt2':
        tokenizer = GPT2Tokenizer.find([d for d in (o.gpt2_dir, Path(o.data_dir) / 'gpt2') if d])
    else:
        tokenizer = ByteTokenizer()
    found.sample.clear()
    (temp / tokenizer.filename).write_bytes(tokenizer.blob)
    with progress(desc='encoding', total=found.bytes) as bar:
        writers, report, digest = encode(parts, found, tokenizer, temp, names, o, bar)
    tokens = writers['train'].tokens if 'train' in writers else 0
    if tokens < MIN_TRAIN_TOKENS or 'val' not in writers:
        raise UserError(f'the training split has {tokens:,} tokens, {MIN_TRAIN_TOKENS} are needed, and '
                        f'validation {"some" if "val" in writers else "none"}: give more text or a .dev file')
    settings = ('max_doc_bytes', 'val_fraction', 'text_field', 'documents', 'seed')
    meta = dict(
        version=VERSION, dataset=o.dataset, tokenizer=o.tokenizer, vocab_size=tokenizer.vocab_size,
        bos=tokenizer.bos, dtype=writers['train'].dtype, sources=names,
        splits={split: writer.meta(names) for split, writer in writers.items()},
        licence=DATASETS[o.dataset]['licence'] if o.dataset in DATASETS else 'as the files say',
        report=dict(sorted(report.items())), ignored=ignored,
        files=[] if o.dataset == 'stories' else stamp(parts),
        tokenizer_sha256=sha256_of(temp / tokenizer.filename), text_sha256=digest,
        settings={name: getattr(o, name) for name in settings})
    content = meta | dict(dataset=data_name(o.dataset))           # a path says nothing about the content
    meta['fingerprint'] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    meta['created'] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
    meta['seconds'] = round(time.time() - t0, 1)
    if o.dataset == 'stories':
        shutil.rmtree(o.root)
    with open(temp / 'meta.json', 'w', encoding='utf-8') as f:
        json.dump(meta, f, indent=1, ensure_ascii=False)
        flush(f)
    return meta


def stamp(parts):
    return sorted([part.name, part.path.stat().st_size] for part in parts)


def summary(folder, meta):
    lines = [f'{"split":6}{"source":24}{"documents":>11}{"words":>13}{"tokens":>13}{"bytes/token":>13}']
    for split, s in meta['splits'].items():
        for name, n in [*s['sources'].items(), *[('all', s)] * (len(s['sources']) > 1)]:
            lines.append(f'{split:6}{name[:23]:24}{n["documents"]:11,}{n["words"]:13,}{n["tokens"]:13,}'
                         f'{n["bytes"] / n["tokens"]:13.3f}')
    lines += [f'{count:,} {what}' for what, count in meta['report'].items() if count]
    if meta['ignored']:
        lines.append(f'left out, no split stands in their names: {", ".join(meta["ignored"])}')
    words, seconds = sum(s['words'] for s in meta['splits'].values()), max(meta['seconds'], 0.1)
    lines.append(f'{meta["vocab_size"]:,} ids ({meta["tokenizer"]}); {words:,} words in {seconds:.1f} s, '
                 f'{words / seconds:,.0f} words/s; {folder}')
    return '\n'.join(lines)


# ----------------------------------------------------------------------------------------------------
# Open what was built

@dataclass
class Data:
    folder: Path
    meta: dict
    tokens: dict             # split -> memory-mapped ids
    docs: dict               # split -> structured array of DOC

    @functools.cached_property
    def tokenizer(self):
        return load_tokenizer(self.folder)


def open_data(folder, dataset=None):
    """Checks a prepared folder and maps it into memory; refuses what the trainer could not trust."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        version, kind, size, splits = meta['version'], meta['tokenizer'], meta['vocab_size'], meta['splits']
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f'{folder} is not a prepared data set (meta.json is missing or damaged): '
                        f'run python prepare_data.py {dataset or "<dataset>"} --overwrite') from None
    again = (f'run python prepare_data.py {dataset or meta["dataset"]} --tokenizer {kind}'
             f'{f" --vocab_size {size}" if kind == "bpe" else ""} --data_dir {folder.parent} --overwrite')
    if version != VERSION:
        raise UserError(f'{folder} has format {version}, this program reads {VERSION}: {again}')
    root = source_root(dataset, folder.parent) if dataset else Path()
    if dataset and dataset != 'stories' and root.exists() and stamp(find_parts(root)[0]) != meta['files']:
        raise UserError(f'the files in {root} changed since {folder} was prepared: {again}')
    path = folder / TOKENIZERS[kind].filename
    if not path.is_file() or sha256_of(path) != meta['tokenizer_sha256']:
        raise UserError(f'{path} is missing or not the tokenizer of these bins: {again}')
    data = Data(folder, meta, {}, {})
    for split, counts in splits.items():
        if problem := open_split(data, split, counts):
            raise UserError(f'{folder / split}.bin {problem}: {again}')
    return data


def open_split(data, split, counts):
    """Maps one split. Returns what is wrong with it, or None."""
    path, dtype = data.folder / f'{split}.bin', np.dtype(data.meta['dtype'])
    try:
        tokens, docs = np.memmap(path, dtype, 'r'), np.load(data.folder / f'{split}.docs.npy')
    except (OSError, ValueError, EOFError):
        return 'or its docs.npy is missing or damaged'
    if path.stat().st_size != counts['tokens'] * dtype.itemsize:
        return f'holds {len(tokens):,} tokens where meta.json says {counts["tokens"]:,}'
    if sha256_of(path, 1 << 20) != counts['head_sha256']:
        return 'is not the file that meta.json describes'
    if docs.dtype != DOC or len(docs) != counts['documents'] or docs['bytes'].sum() != counts['bytes']:
        return 'does not fit its docs.npy'
    starts = docs['start']
    if (starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= len(tokens)
            or (tokens[starts] != data.meta['bos']).any()):
        return 'has documents that do not begin with BOS'
    if max(tokens[:100_000].max(), tokens[-100_000:].max()) >= data.meta['vocab_size']:
        return f'holds ids beyond the vocabulary of {data.meta["vocab_size"]:,}'
    data.tokens[split], data.docs[split] = tokens, docs


# ----------------------------------------------------------------------------------------------------
# Stories: the generated world

def story_documents(count, seed):
    """Stories 0 to count - 1 of the world `seed`, as str."""
    raise NotImplementedError


def story_pairs(count, seed):
    """dict(kind, context, good, bad) each: two endings, of which one contradicts the story."""
    raise NotImplementedError


def write_stories(folder, count, seed):
    """Writes the text as if it were a corpus on disk, and the pairs beside the bins. Returns the corpus."""
    root = folder / 'raw'
    root.mkdir()
    for split, n, stream in (('train', count, seed), ('dev', 1000, seed + 1)):
        write_jsonl(root / f'stories.{split}.jsonl', (dict(text=text) for text in story_documents(n, stream)))
    write_jsonl(folder / 'pairs.jsonl', story_pairs(2000, seed + 2))
    return root


def write_jsonl(path, rows):
    with open(path, 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


# ----------------------------------------------------------------------------------------------------
# Command line

def main(args=None):
    names = '\n'.join(f'  {name:15}{e["about"]}\n{"":17}{e["licence"]}' for name, e in DATASETS.items())
    parser = argparse.ArgumentParser(
        description='Prepares a data set for train.py: text -> documents -> tokenizer -> memory-mapped bins.',
        epilog=f'data sets:\n{names}\n  files:<path>   a text file or a folder of them; <source>.train, '
               '<source>.dev and <source>.test keep their splits\n\nexamples:\n'
               '  python prepare_data.py stories\n'
               '  python prepare_data.py babylm --vocab_size 16384 --overwrite\n'
               '  python prepare_data.py files:novel.txt --tokenizer bytes\n',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('dataset', help='a name from the list below, or files:<path>')
    add('--tokenizer', default='bpe', choices=list(TOKENIZERS))
    add('--vocab_size', type=int, default=8192, help='ids in all, for bpe (8192)')
    add('--data_dir', default='data', help='where data sets lie (data)')
    add('--overwrite', action='store_true', help='replace the folder if it exists')
    add('--val_fraction', type=float, default=VAL_FRACTION,
        help=f'documents held out by hash where the corpus has no validation split ({VAL_FRACTION})')
    add('--max_doc_bytes', type=int, default=MAX_DOC_BYTES, help=f'cut longer documents ({MAX_DOC_BYTES})')
    add('--text_field', help='the field of .jsonl and .parquet rows (text, else story)')
    add('--gpt2_dir', help='folder with vocab.bpe and encoder.json (<data_dir>/gpt2, else the network)')
    add('--base_url', help=f'a mirror in the place of {HUGGING_FACE}')
    add('--documents', type=int, default=40_000, help='training stories to generate (40000)')
    add('--seed', type=int, default=1337, help='of the generated stories (1337)')
    options = vars(parser.parse_args(args))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # an exception, so the temporary folder goes
    try:
        build(**options)
    except UserError as e:
        print(f'prepare_data.py: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('prepare_data.py: interrupted; nothing was left behind', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())

"""Turns text into what the trainer reads: documents, a tokenizer, memory-mapped bins.

    python prepare_data.py config/quickstart.py          the data set of that file
    python prepare_data.py files:texts --tokenizer=gpt2  your own .txt, .md, .jsonl, .csv, .parquet; .gz too
    python prepare_data.py config/quickstart.py --inspect    a page about what was prepared
    python prepare_data.py --help                        all settings, and the files that bring text

It writes a folder such as data/files-texts-bpe8192:

    train.bin val.bin test.bin     token ids back to back; each document is BOS and its tokens
    <split>.docs.npy               a row a document: first token, raw bytes, source, difficulty or 0
    tokenizer.*                    all that is needed to read the ids again
    meta.json                      counts, licences, what was dropped and why, what it was made from

The text is read twice: once to check it, to find what validation holds and to sample text for the tokenizer,
once to encode. Both passes stream, so memory does not grow with the corpus. Where text comes from and what
becomes of it is decided by one class, Corpus, which files of config/ derive from.
"""
import base64
import contextlib
import csv
import difflib
import errno
import functools
import glob
import gzip
import hashlib
import http.client
import io
import itertools
import json
import lzma
import os
import platform
import re
import shlex
import shutil
import signal
import struct
import sys
import time
import tokenize
import unicodedata
import urllib.request
import zlib
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from config import (CONFIG, SEAMS, Ideas, Setting, UserError, fits, ideas_of, in_words, memory_ran_out, print_without_fail,
                    refuse, shown, verbs)

VERSION = 1                  # of the bin format; the trainer refuses any other
SAMPLE_BYTES = 24_000_000    # the tokenizer learns from at most this; 8 MB gives 0.2 % fewer bytes per token
MAX_LINE = 1 << 27           # bytes of a row of .jsonl, the one thing that must fit into memory
LONG = 40                    # characters of a line that is looked for on both sides of a split
MIN_TRAIN_TOKENS = 256       # fewer cannot fill one block of any model worth training
BATCH_BYTES = 4_000_000      # text encoded at once: enough to keep every thread busy, little enough to hold
PATIENCE = 1.0               # seconds before a server is asked a second time
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
COUNTS = ('documents', 'words', 'bytes', 'tokens')
COUNT = range(1 << 60)
SPLIT = dict.fromkeys(COUNTS, COUNT) | dict(head_sha256=str, sources={str: dict.fromkeys(COUNTS, COUNT[1:])})
META = dict(                 # the form of meta.json, as config.fits has it
    dataset=str, tokenizer={'bpe', 'bytes', 'gpt2'}, vocab_size=range(1 << 32), bos=COUNT, dtype={'<u2', '<u4'},
    sources=[str], splits={'train': SPLIT, 'val': SPLIT, 'test?': SPLIT}, files=[(str, COUNT)], tokenizer_sha256=str,
    fingerprint=str, report={str: COUNT}, ignored=[str], seconds=float, licence=str,
    **{'crc32?': {str: COUNT}, 'configs?': [str], 'settings?': dict, 'in_training?': dict(held_out_bytes=COUNT, shared=COUNT),
       'made_from?': dict(root=str, files=[(str, COUNT, int, str)], changes=dict),
       'cleaning?': dict(by_source={str: {str: COUNT}})})
FULL = (errno.ENOSPC, errno.EDQUOT)
DOC = np.dtype([('start', '<i8'), ('bytes', '<i4'), ('source', '<i2'), ('difficulty', '<f4')])
HUGGING_FACE = 'https://huggingface.co/datasets'
NO_BAR = SimpleNamespace(update=lambda n: None)


@dataclass
class Options:
    """The settings of every data set; those from tokenizer to data_seed decide its content."""
    dataset: str = ''             # a name that a file of config/ sets, or files:<path>
    tokenizer: str = 'bpe'        # bpe|bytes|gpt2
    vocab_size: int = 8192        # 2..1048576: ids in all, for bpe
    val_fraction: float = 0.02    # 1e-12..0.999: documents held out, by hash, where no file is for that
    max_doc_bytes: int = 16384    # 256..1073741824: longer ones become passages, for shuffling's sake
    min_doc_bytes: int = 1000     # 0..1073741824: paragraphs that are no documents are joined up to so many
    text_field: str = ''          # the field of .jsonl and .parquet rows; without it text, else story
    data_seed: int = 1337         # 0..1e18: of text that is generated
    tokenizer_from: str = ''      # a prepared data set or a run whose tokenizer to use
    gpt2_dir: str = ''            # where vocab.bpe and encoder.json lie; else data/gpt2, else the network
    base_url: str = ''            # a mirror in the place of https://huggingface.co/datasets
    data_dir: str = 'data'        # where data sets lie
    overwrite: bool = False       # replace the folder if it exists


CONTENT = [f.name for f in fields(Options)]
CONTENT = CONTENT[CONTENT.index('tokenizer'):CONTENT.index('tokenizer_from')]
PATHS = 'tokenizer_from', 'gpt2_dir', 'data_dir'

# A word's letters and what stands on them: marks of an é in two characters, of Hindi, of Arabic; joiners
MARKS = ''.join(f'{chr(run.start())}-{chr(run.end() - 1)}' for run in re.finditer('M+', ''.join(
    unicodedata.category(chr(code))[0] for code in range(0x1E950)))) + '\u200c\u200d\U000e0100-\U000e01ef'
LETTERS = rf'[^\W\d_]+(?:(?![ -~\n])[{MARKS}]+[^\W\d_]*)*'
WORDS = re.compile(rf"{LETTERS}(?:['’]{LETTERS})*")
ROLE = re.compile(rb'^<\|(\w+)\|>\n', re.M)       # a line of a tokenizer's file


# ----------------------------------------------------------------------------------------------------
# Tokenizers: lossless, decode(encode(x)) == x for every string, so that bits per byte compare across them

class Tokenizer:
    """What the three share; each has kind, filename, bos, and table: the bytes of every id, none for BOS.

    roles: {name: id} of those who speak in turn, in a vocabulary that knows any. Such ids come after all
    others, have no bytes, and no text encodes to one.
    """
    roles = {}

    def with_roles(self, names):
        """This vocabulary, and an id more for each name; its file begins as it did."""
        return type(self)(self.blob + b''.join(b'<|%s|>\n' % name.encode() for name in names))

    def take_roles(self, names):
        self.roles = {name.decode(): len(self.table) + i for i, name in enumerate(names)}
        self.table += [b''] * len(names)

    @property
    def vocab_size(self):
        return len(self.table)

    @property
    def ends(self):
        """The ids that end a text or what somebody says in turn."""
        return {self.bos, *self.roles.values()}

    def token_bytes(self, token):
        return self.table[token]

    def decode(self, ids):
        return b''.join([self.table[i] for i in ids]).decode('utf-8', errors='replace')


class ByteTokenizer(Tokenizer):
    kind, filename, bos = 'bytes', 'tokenizer.bytes', 256

    def __init__(self, blob=b'an id is a byte; 256 is BOS\n'):
        self.blob = blob
        self.table = [bytes([i]) for i in range(256)] + [b'']
        self.take_roles(ROLE.findall(blob))

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
        self.table = [base64.b64decode(line.split()[0]) for line in ROLE.sub(b'', blob).splitlines()]
        ranks = {piece: i for i, piece in enumerate(self.table)}
        if not ({*ByteTokenizer().table[:256]} <= ranks.keys() and len(ranks) == len(self.table)):
            raise ValueError('a byte is missing, or a piece is there twice')     # tiktoken would panic
        self.table.append(b'')
        self.take_roles(ROLE.findall(blob))
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
        return [np.array(x, np.uint16) for x in self.bpe.encode_ordinary_batch(texts, num_threads=THREADS)]


class BPETokenizer(Tokenizer):
    """sentencepiece BPE with bytes for what it does not know.

    sentencepiece spells a space U+2581 and drops tabs from training. So tabs and newlines travel as private
    characters. Where a text holds one of the marks itself, or what was so rare in training that it has no
    piece, bytes are put in by hand.
    """
    kind, filename, bos = 'bpe', 'tokenizer.model', 0
    unk, first_byte = 1, 2       # sentencepiece insists on an unk; with byte fallback none is ever produced
    mark_of = {' ': '\u2581', '\t': '\ue009', '\n': '\ue00a'}
    # Pieces are learned inside these alone: a line's end with the label that opens the next (`.\n*MOT:\t`, an
    # indent), a word with its space and 's, a number, punctuation, spaces. Bytes per token at 8,192 ids on
    # validation text in BabyLM's domains: 3.93; with labels apart 3.36, 's apart 3.80, split as sentencepiece
    # does it 3.52; unsplit 4.11, but that glues the end of a sentence to the first word of the next.
    words = re.compile(rf'''\ ?[^\w\s]*(?:\r?\n)+(?:\S{{1,12}}:\t|-\ |\ +(?=\ ))?
                         | \ ?{LETTERS}(?:['’][a-z]+)? | \ ?\d{{1,4}} | \ ?(?:[^\w\s]|_)+ | \ +(?=\ ) | \s
                         ''', re.X)

    def __init__(self, blob):
        import sentencepiece
        self.blob = blob
        self.bpe = sentencepiece.SentencePieceProcessor(model_proto=blob)
        pieces = [self.bpe.id_to_piece(i) for i in range(self.bpe.vocab_size())]
        unspell = str.maketrans({mark: char for char, mark in self.mark_of.items()})
        rare = {char for char, mark in self.mark_of.items() if mark not in pieces}
        self.marks = re.compile(f'([{"".join([*self.mark_of.values(), *rare])}]+)')
        self.table = [p.translate(unspell).encode() for p in pieces]
        self.table[self.bos] = self.table[self.unk] = b''
        self.table[self.first_byte:self.first_byte + 256] = [bytes([i]) for i in range(256)]
        controls = [i for i in range(len(pieces)) if self.bpe.is_control(i) and i != self.bos]
        self.roles = {pieces[i][2:-2]: i for i in controls}
        for i in controls:
            self.table[i] = b''

    def with_roles(self, names):
        """As of every Tokenizer: protocol buffers are joined by being written one after the other, so each
        role is a message ModelProto of one piece of the type CONTROL, which sentencepiece never makes of a
        text."""
        blob, last = self.blob, self.first_byte + 255        # a BPE's scores fall by one a piece
        for i, name in enumerate(names, self.vocab_size):
            piece = f'<|{name}|>'.encode()
            piece = b'\x0a%c%s\x15%s\x18\x03' % (len(piece), piece, struct.pack('<f', last - i + 1))
            blob += b'\x0a%c%s' % (len(piece), piece)
        return type(self)(blob)

    @classmethod
    def train(cls, texts, vocab_size, model_type='bpe'):
        """Learns a vocabulary, BOS, unk and 256 bytes included. The same texts give the same model.
        model_type 'unigram' (Kudo 2018, 1804.10959) learns other pieces from the same words."""
        import sentencepiece
        counts = Counter()
        for text in texts:
            counts.update(cls.words.findall(text))
        lines = [f'{cls.spell(word)}\t{n}' for word, n in sorted(counts.items())
                 if not {'\0', *cls.mark_of.values()} & {*word}]
        out = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), input_format='tsv', model_writer=out, model_type=model_type,
                vocab_size=vocab_size, byte_fallback=True, character_coverage=0.9999,
                max_sentence_length=1 << 20, normalization_rule_name='identity',
                add_dummy_prefix=False, remove_extra_whitespaces=False,
                split_by_whitespace=False, split_by_unicode_script=False, split_by_number=False,
                allow_whitespace_only_pieces=True, bos_id=cls.bos, unk_id=cls.unk, eos_id=-1, pad_id=-1,
                bos_piece='<|endoftext|>', num_threads=THREADS, minloglevel=2)
        except RuntimeError as e:
            for bound, wrong, do in ((r'value <= (\d+)', 'large', 'less'),
                                     (r'required_chars\D*\d+ vs (\d+)', 'small', 'more')):
                if found := re.search(bound, str(e)):
                    raise UserError(f'a vocabulary of {vocab_size:,} is too {wrong} for this text: use '
                                    f'--vocab_size={found[1]} or {do}, or --tokenizer=bytes') from None
            raise
        return cls(out.getvalue())

    @classmethod
    def spell(cls, text):
        return text.replace('\n', cls.mark_of['\n']).replace('\t', cls.mark_of['\t'])

    def encode(self, text):
        ids = []
        for i, part in enumerate(self.marks.split(text)):
            if i % 2:                    # split() puts what the pattern caught at the odd places
                ids += [self.first_byte + b for b in part.encode()]
            else:
                ids += self.bpe.encode(self.spell(part))
        return ids

    def encode_batch(self, texts):
        rows = self.bpe.encode([self.spell(text) for text in texts], num_threads=THREADS)
        return [np.array(self.encode(text) if self.marks.search(text) else row, np.uint32)
                for text, row in zip(texts, rows)]


TOKENIZERS = {t.kind: t for t in (BPETokenizer, ByteTokenizer, GPT2Tokenizer)}


# ----------------------------------------------------------------------------------------------------
# Source files: where they are, and which split and source each one is

@dataclass
class Part:
    path: Path
    name: str                # relative to the corpus, for the fingerprint
    split: str               # '' where the hash of each document decides
    source: str
    shard: str = ''
    kind: str = ''           # what it is written like, and what parts its documents: see layout
    way: str = ''

    def __post_init__(self):
        self.source = re.sub('[,:+]', '-', self.source)          # settings part names by these


PACKED = r'(?:\.(?:gz|xz|zst))?'
SUFFIX = r'(?:\.(?:txt|md|jsonl|ndjson|json|csv|tsv|parquet|tokens|raw))?' + PACKED
SPLIT_NAME = re.compile(r'(?:.*/)?(?:([^/]+?)([._-]))?(train|dev|val|valid|validation|test)'
                        r'([.-]\d+(?:-of-\d+(?:-[\da-f]{16})?)?)?' + SUFFIX, re.I)
ROWS = re.compile(r'\.(jsonl|ndjson|json|csv|tsv|parquet)' + PACKED + '$', re.I)
NO_TEXT = re.compile(r'\.(html?|xml|svg|pdf|docx?|odt|rtf|epub|pptx?|xlsx?|ods|ipynb|zip|tar|tgz|bz2|7z'
                     r'|rar|arrow|feather|db|sqlite3?|pkl|np[yz]|pt|bin|png|jpe?g)' + PACKED + '$', re.I)
BESIDE = re.compile(r'(?i:README|LICEN[CS]E|COPYING)(?:[.-][\w.-]*)?|_SUCCESS|_(?:common_)?metadata|.*\.crc'
                    r'|_(?:started|committed)_\d+|dataset_(?:infos?|dict)\.json')   # beside a text, and none
UNREAD = re.compile(r'\..*|_temporary|.*\.shards')       # folders: hidden, of Spark's unfinished work, ours
OURS = {'meta.json', 'train.bin'}, {'metrics.jsonl', 'ckpt.pt'}          # in folders that these scripts write


def stem(name):
    return re.sub(SUFFIX + '$', '', name, count=1)


def path_of(name):
    """The path that a setting names; ~ is the user's home."""
    try:
        return Path(name).expanduser()
    except RuntimeError as e:
        raise UserError(f'{name} cannot be found ({e}): write the path without ~') from None


@contextlib.contextmanager
def readable():
    """Around what reads: a file or folder that cannot be is one sentence."""
    try:
        yield
    except OSError as e:
        if memory_ran_out(e):
            raise
        raise UserError(f'{e.filename} cannot be read ({e.strerror}): have its owner let you, or take it '
                        f'away') from None


@readable()
def files_below(root):
    """{name: path} of the files of a folder, in order, or of one file. Links are followed; hidden names are
    passed over, and folders that these scripts wrote; what cannot be read, or but once, is refused."""
    def stop(e):
        raise e

    refuse(not os.path.lexists(root), f'{root} does not exist: give the path of a text file or of a folder')
    found, seen = [] if root.is_dir() else [root], set()
    for folder, below, names in os.walk(root, onerror=stop, followlinks=True) if root.is_dir() else ():
        again = os.path.realpath(folder) in seen                 # a link to what was read, or in a circle
        if again or any(ours <= {*names} for ours in OURS):
            below.clear()
            continue
        seen.add(os.path.realpath(folder))
        below[:] = sorted(name for name in below if not UNREAD.fullmatch(name))
        found += [Path(folder, name) for name in names if name[0] != '.']
    for path in found:
        what = 'no file, it can be read only once' if path.exists() else 'a link to nothing'
        refuse(not path.is_file(), f'{path} is {what}: put a file of text in its place, or take it away')
        refuse(re.search('[\ud800-\udfff]', str(path)), f'{ascii(str(path))} has a name that is no UTF-8: rename it')
    return {path.relative_to(root).as_posix() if path != root else root.name: path for path in sorted(found)}


def find_parts(root):
    """The files below `root`, held-out ones first, and the names of those left out. Where all are called like
    `<source>.train`, names decide the splits; else the hash of each document does."""
    files = files_below(root)
    return parts_of(root, files) if root.is_dir() else ([Part(root, root.name, '', stem(root.name))], [])


def parts_of(root, files):
    """As find_parts, of {name: path}, by the names alone."""
    left = [name for name, path in files.items() if BESIDE.fullmatch(path.name)]
    found = {name: SPLIT_NAME.fullmatch(name) for name in files if name not in {*left}}
    if not named_by_split(root, found):
        if len(found) > 1000:                    # too many to be sources: their folders are
            return [Part(root / n, n, '', (['text'] + n.split('/'))['/' in n]) for n in found], left
        return once(Part(root / name, name, '', stem(name)) for name in found), left
    has_val = any(m[3].lower() not in ('train', 'test') for m in found.values())
    split_of = {'train': 'train' if has_val else '', 'test': 'test'}
    parts = once(Part(root / name, name, split_of.get(m[3].lower(), 'val'), m[1] or 'text', m[4] or '')
                 for name, m in found.items())
    return sorted(parts, key=lambda part: part.split in ('train', '')), left


def named_by_split(root, found):
    """Whether the names of a folder's files, name: match, say their splits. `.train` and a whole name do;
    `-train` may be of a title; it does where all are named so and what is held out has its training file."""
    train = {name: m for name, m in found.items() if m and m[3].lower() == 'train'}
    odd = [name for name, m in found.items()
           if not m or m[2] in ('-', '_') and m[1] not in [t[1] for t in train.values()]]
    if odd and (sure := [name for name, m in train.items() if m[2] in (None, '.')]):
        raise UserError(f'{root / sure[0]} has a split in its name and {root / odd[0]} has none: call it '
                        f'<source>.train, or put one of the two elsewhere')
    return bool(train) and not odd


def once(parts):
    """The parts, if no two of them are the same shard of the same split of the same source."""
    seen = {}
    for part in parts:
        other = seen.setdefault((part.split, part.source, part.shard), part)
        if other is not part:
            raise UserError(f'{other.path} and {part.path} are both {part.source}: rename or remove one')
    return list(seen.values())


HEADS = {                    # what a file is that begins so
    'UTF-16': rb'\xff\xfe|\xfe\xff', 'a web page': rb'\s*<(?:!doctype )?html', 'XML': rb'\s*<\?xml',
    'PDF': rb'%pdf-', 'JSON': rb'\s*\[?\s*\{\s*"[^"\n]*"\s*:'}


def check_text(parts):
    """Refuses the files that are no text, all at once; what else is wrong with them, read() says."""
    wrong = []
    for part in parts:
        rows, odd = ROWS.search(part.name), NO_TEXT.search(part.name)
        try:
            with open(part.path, 'rb') as raw, open_source(raw, part.name) as f:
                head = f.read(1 << 16).removeprefix(BOM) if not rows or rows[1].lower() != 'parquet' else b''
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile):
            continue
        except OSError as e:
            wrong += [f'{part.path} cannot be read ({e.strerror})'] * bool(e.errno)      # pyarrow's has none
            continue
        heads = [what for what, start in HEADS.items() if re.match(start, head, re.I)]
        if odd:
            wrong.append(f'{part.path} is no plain text (.{odd[1]})')
        elif heads and not (rows and heads == ['JSON']):
            wrong.append(f'{part.path} is {heads[0]}')
        elif b'\0' in head:
            wrong.append(f'{part.path} is no text (a zero byte at offset {head.index(0):,})')
    if wrong:
        more = f', and {len(wrong) - 9:,} more' if len(wrong) > 9 else ''
        raise UserError(f'{", ".join(wrong[:9])}{more}: convert to plain text in UTF-8, or take away; '
                        f'JSON is read from .jsonl')


def data_name(dataset, known):
    """What a data set's folder begins with; known: the names there are, beside files:<path>."""
    if dataset.startswith('files:'):
        if not dataset[6:]:
            raise UserError('files: names no text: give the path of a file or a folder, files:. for this one')
        slug = re.sub(r'[^a-z0-9_]+', '-', stem(path_of(dataset[6:]).resolve().name).lower()).strip('-')
        return f'files-{slug or "text"}'
    if dataset not in known:
        near = difflib.get_close_matches(dataset, known, 1)
        what = f'there is no data set {dataset!r}' if dataset else 'no data set is named'
        choices = ', '.join(f'--dataset={name}' for name in [*known, 'files:<path>'])
        raise UserError(f'{what}{f", did you mean {near[0]}" if near else ""}: name the file of one, such as '
                        f'config/quickstart.py, or {choices}')
    return dataset


def source_root(dataset, data_dir):
    return path_of(dataset[6:]) if dataset.startswith('files:') else path_of(data_dir) / 'raw' / dataset


def fetch(entry, raw, base_url):
    """Downloads what the folder `raw` lacks. One with files of other names is a corpus of the user's own."""
    present = {p.name for p in raw.glob('[!.]*') if not BESIDE.fullmatch(p.name)}
    for name, digest in entry.get('sha256', {}).items():
        if name in present and sha256_of(raw / name) != digest:
            raise UserError(f'{raw / name} is not the file it should be (its sha256 is another): take it '
                            f'away, or rename it if it is your own')
    if present - entry['files'].keys():
        return
    raw.mkdir(parents=True, exist_ok=True)
    for name, path in entry['files'].items():
        if name not in present:
            url = f'{base_url or HUGGING_FACE}/{entry["repo"]}/resolve/main/{path}'
            download(url, raw / name, entry.get('sha256', {}).get(name), 2_000_000 * entry['mb'])


def download(url, path, sha256=None, most=1_000_000_000, waits=(1, 2, 4, 8), timeout=30):
    """One file of so many bytes at most, whole or not at all. A connection that breaks, or is silent for `timeout`
    seconds, is taken up where it broke, now or next time; a server in trouble is asked again, each time after
    longer waits; one that refuses is not."""
    part, version = (path.with_name(f'.{path.name}.{kind}') for kind in ('part', 'version'))
    for wait in (*waits, None):
        try:
            receive(url, part, version, most, timeout)
            break
        except UserError:
            part.unlink()
            version.unlink(missing_ok=True)
            raise
        except (OSError, http.client.HTTPException) as e:    # URLError, HTTPError and timeouts are OSErrors
            if getattr(e, 'errno', None) in FULL:
                raise
            code = getattr(e, 'code', 0)
            if code == 416 or not version.exists():          # nothing to go on from
                part.unlink(missing_ok=True)
                version.unlink(missing_ok=True)
            if wait is None or 400 <= code < 500 and code not in (408, 416, 429):
                login = ', it may want a login' if code in (401, 403) else ''
                raise UserError(f'{url} could not be downloaded ({e}{login}): try again, or put it at '
                                f'{path}') from None
            time.sleep(wait * PATIENCE)
    version.unlink(missing_ok=True)
    with open(part, 'rb') as f:
        head = f.read(512).lstrip().lower()
    wrong = ('a web page came instead' if head.startswith((b'<!doctype html', b'<html')) else
             'its sha256 is not the one expected' if sha256 and sha256_of(part) != sha256 else '')
    if wrong:
        part.unlink()
        raise UserError(f'{url} is not the file it should be ({wrong}): try again, or put it at {path}')
    os.replace(part, path)


def receive(url, part, version, most, timeout):
    """Appends to `part` what is missing of it; the file `version` holds the server's name for it."""
    from tqdm import tqdm
    held = part.stat().st_size if part.exists() and version.exists() else 0
    headers = {'Range': f'bytes={held}-', 'If-Range': version.read_text()} if held else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
        held = held if response.status == 206 else 0             # 200: all of it, from the start
        size = held + int(response.headers.get('Content-Length') or 0)
        with open(part, 'ab' if held else 'wb') as out:
            name = response.headers.get('ETag') or response.headers.get('Last-Modified') or ''
            version.unlink(missing_ok=True)
            if name and not name.startswith('W/'):               # a weak name promises nothing about bytes
                version.write_text(name)
            with tqdm.wrapattr(response, 'read', total=size or None, initial=held, desc=part.name[1:-5],
                               disable=None) as body:
                while (block := body.read(1 << 20)) and out.tell() <= most:
                    out.write(block)
            if max(size, out.tell()) > most:
                raise UserError(f'{url} has more than {most / 1e6:,.0f} MB, which is no such file: put the right one '
                                f'at {part.with_name(part.name[1:-5])}')
            if size > held and out.tell() != size:
                raise OSError(f'{out.tell():,} of {size:,} bytes came')


# ----------------------------------------------------------------------------------------------------
# Documents: from files to text, streaming

SEPARATOR, BOM = b'<|endoftext|>', b'\xef\xbb\xbf'
BOUNDARY = {                 # what parts the documents of a file: the first that occurs in its first MiB. A
                             # separator always does, and nothing else where there are two in that MiB
    'separator': re.compile(re.escape(SEPARATOR)),
    'header': re.compile(rb'^(?== = = .* = = =[ \t\r]*$)', re.M),    # an empty match: it stays with its text
    'front': re.compile(rb'^(?=---[ \t\r]*\n[a-z_]+:)', re.M),          # YAML before a text in Markdown
    'blank': re.compile(rb'\n(?:[ \t\r]*\n)+'),
    'whole': re.compile(rb'(?!)'),
}
BLANK_START = re.compile(rb'(?:[ \t\r]*\n)*')
KINDS = {                    # by a source's name, else by what most of its lines begin with
    'code': (r'(^|[\W_])code', rb'.*[][{}=]|\s*(?:#|//|def |class |import |return |else)'),
    'dialogue': ('childes|switchboard|dialog|bnc|subtitle|qed|plays', rb'- |\*?\w{1,12}:[\t ]'),
    'web': ('web|crawl|html', rb'(?!)'),
    'prose': ('', rb'')}
ARTICLES, SENTENCES = re.compile('wiki'), re.compile('tatoeba|sentences')
LINES = re.compile(b'\n')


def is_list(lines, gaps):
    """Whether lines, with so many blank ones between, are items: few words, seldom a sentence's end."""
    ends = sum(line.rstrip().endswith((b'.', b',', b';', b':', b'!', b'?', b'"', b'-')) for line in lines)
    words = sum(len(line.split()) for line in lines)
    return len(lines) >= 20 * max(gaps, 1) and words <= 4 * len(lines) and ends <= 0.1 * len(lines)


def layout(part, head, corpus):
    """Says what kind of text a file holds and what parts its documents. Returns what splits it.

    Blank lines part articles and dialogues; elsewhere they part paragraphs, which are joined until there are
    min_doc_bytes of them: by default about 250 tokens, half a block, of text that belongs together.
    """
    lines = [line for line in head[:1 << 16].split(b'\n') if line.strip()]
    part.kind = corpus.kind_of(part, lines)
    gaps, marks = len(BOUNDARY['blank'].findall(head[:1 << 16])), head.count(SEPARATOR)
    part.way = 'lines' if SENTENCES.search(part.source) else next(
        (way for way, b in BOUNDARY.items() if b.search(head) and (way != 'separator' or marks > 1)), 'whole')
    if part.kind == 'prose' and part.way in ('blank', 'whole') and is_list(lines, gaps):
        part.way = 'lines'
        return LINES
    pieces = [p.strip() for p in BOUNDARY['blank'].split(head)] if part.way == 'blank' else []
    whole = part.kind == 'dialogue' and sum(b'\n' in p for p in pieces) > len(pieces) / 2    # not turns
    if pieces and part.kind == 'code':
        part.way = 'whole'                       # a file is a document
    elif part.way == 'lines' or pieces and not (whole or ARTICLES.search(part.source)):
        pattern, least = BOUNDARY['blank'] if pieces else LINES, corpus.s.min_doc_bytes
        part.way += ', joined'
        return SimpleNamespace(split=functools.partial(split_joined, pattern=pattern, least=least))
    return BOUNDARY[part.way]


def split_joined(text, pattern, least):
    """Splits where a piece has at least so many bytes; the last piece is what follows."""
    pieces, start = [], 0
    for gap in pattern.finditer(text):
        if gap.start() - start >= least:
            pieces.append(text[start:gap.start()])
            start = gap.end()
    return [*pieces, text[start:]]


def cut(text, limit):
    """Where to end a passage of at most `limit` bytes: after a paragraph, line, sentence, word or letter."""
    for ends in ((b'\n\n',), (b'\n',), (b'. ', b'! ', b'? '), (b' ',)):
        at = max(text.rfind(end, limit // 2, limit) + len(end) for end in ends)
        if at > limit // 2:
            return at
    return next((at for at in range(limit, limit - 4, -1) if text[at] & 0xC0 != 0x80), limit)


def split_documents(blocks, boundary, limit, report):
    """The documents of one file, which a boundary parts, and every separator, as bytes, at most `limit` each,
    without the blank lines around them."""
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
        *whole, rest = (tail + block).split(SEPARATOR)
        *ended, tail = [doc for piece in whole for doc in boundary.split(piece)] + boundary.split(rest)
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
    openers = dict(gz=gzip.open, xz=lzma.open, zst=open_zst)
    return openers.get(name.lower().rpartition('.')[2], lambda raw: raw)(raw)


def open_zst(raw):
    try:
        import pyarrow
    except ImportError:
        raise UserError(f'{raw.name} is compressed by Zstandard, which takes pyarrow to read: pip install '
                        f'pyarrow') from None
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, 'zstd'))


def bad_utf8(part):
    number, bad, strays, good = 1, set(), 0, 0   # good: characters of several bytes that are right
    with open(part.path, 'rb') as raw, open_source(raw, part.name) as f:
        text = io.TextIOWrapper(f, 'utf-8', 'surrogateescape', newline='\n')
        for piece in iter(lambda: text.readline(1 << 20), ''):       # a line may be the whole file
            if stray := len(re.findall('[\udc80-\udcff]', piece)):
                bad.add(number)
            strays, good = strays + stray, good + len(re.findall(r'[^\0-\x7f]', piece)) - stray
            number += piece.endswith('\n')
    mend = 'all else in it is, so mend that' if good > strays else 'convert it (iconv -f latin1 -t utf-8)'
    return UserError(f'{part.path} is not UTF-8: {len(bad):,} bad line{"s" * (len(bad) > 1)}, the first is '
                     f'line {min(bad):,}; {mend} or take it away')


def json_rows(part, f):
    """(where, row) of lines of JSON, or of one array."""
    for number, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b''), 1):
        place, line = f'{part.path} line {number:,}', line.removeprefix(BOM) if number == 1 else line
        if line.lstrip().startswith(b'['):
            place, line = f'{part.path}, an array,', line + f.read(MAX_LINE)
        refuse(len(line) > MAX_LINE, f'{place} has over {MAX_LINE >> 20} MiB: make rows of it')
        try:
            rows = json.loads(line.decode()) if line.strip() else []
        except (json.JSONDecodeError, RecursionError):           # a bad byte is another mistake
            raise UserError(f'{place} is not JSON, which is an object with text a line, or an array of '
                            f'them: mend it') from None
        yield from ((f'{place} row {i:,}', row) for i, row in enumerate(rows, 1)) \
            if isinstance(rows, list) else [(place, rows)]


def csv_rows(part, f):
    """(where, row) of a table whose first line names its columns, apart by commas, in .tsv by tabs."""
    most = MAX_LINE // 4                         # a character takes four bytes and more as it is parsed
    lines = (line.decode() for line in itertools.chain([f.readline(1 << 20).removeprefix(BOM)],
                                                       iter(lambda: f.readline(most), b'')))
    csv.field_size_limit(most)
    # strict: a quote that opens a field and is none of two swallows rows until the next
    rows = csv.DictReader(lines, delimiter='\t' if ROWS.search(part.name)[1].lower() == 'tsv' else ',', strict=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as e:
            raise UserError(f'{part.path} line {rows.reader.line_num:,} ends no row ({e}): double the quotes within a field, or mend '
                            f'what else it is') from None
        if row is None:
            return
        where = f'{part.path} line {rows.line_num:,}'
        refuse(None in row, f'{where} has more fields than the first line, {len(rows.fieldnames)}: mend it')
        yield where, row


def parquet_rows(part, f, wanted):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f'{part.path} is Parquet, which takes pyarrow to read: pip install pyarrow') from None
    table = ParquetFile(f)
    column = text_column(part.path, table.schema_arrow.names, wanted)
    for batch in table.iter_batches(batch_size=1024, columns=[column]):
        yield from ((f'{part.path}, in {column},', text) for text in batch.column(0).to_pylist())


def text_column(place, names, wanted):
    for name in (wanted,) if wanted else ('text', 'story'):
        if name in names:
            return name
    raise UserError(f'{place} has no field {wanted or "text or story"}, only {", ".join(names)[:200]}: '
                    f'name the field with --text_field')


def row_texts(rows, corpus, report):
    """The texts of rows, as bytes."""
    for where, row in rows:
        text = corpus.row_text(where, row)
        if text is None:
            report['rows dropped, their text is null'] += 1
            continue
        try:
            yield text.encode()
        except AttributeError:
            raise UserError(f'{where} has {str(text)[:40]} for text: mend it, or name another field with '
                            f'--text_field') from None
        except UnicodeEncodeError as e:
            raise UserError(f'{where} holds {text[e.start]!a}, half of a pair that is one character: mend '
                            f'it') from None


@contextlib.contextmanager
def undamaged(part):
    """Around what reads a file of text: one that is damaged, or no UTF-8, is a sentence."""
    try:
        yield
    except UnicodeDecodeError:
        raise bad_utf8(part) from None
    except (EOFError, lzma.LZMAError, zlib.error, csv.Error, OSError, ValueError) as e:  # pyarrow's: last two
        if getattr(e, 'errno', None):
            raise
        raise UserError(f'{part.path} is damaged ({e}): fetch it again') from None


def read(part, corpus, report, bar):
    """The documents of one file, as (bytes, str). The bar counts the bytes on disk."""
    at, split = 0, functools.partial(split_documents, limit=corpus.s.max_doc_bytes, report=report)
    with undamaged(part), open(part.path, 'rb') as raw, open_source(raw, part.name) as f:
        if kind := ROWS.search(part.name):
            part.kind, part.way = corpus.kind_of(part, []), 'separator'
            rows = (parquet_rows(part, f, corpus.text_field) if kind[1].lower() == 'parquet' else
                    csv_rows(part, f) if kind[1].lower() in ('csv', 'tsv') else json_rows(part, f))
            rows = row_texts(rows, corpus, report)
            pieces = ((row[i:i + (1 << 18)] for i in range(0, len(row), 1 << 18)) for row in rows)
            docs = (doc for row in pieces for doc in split(
                itertools.chain(corpus.blocks(row, report), [SEPARATOR]), BOUNDARY['separator']))
        else:
            head = f.read(1 << 20).removeprefix(BOM)
            boundary = layout(part, head, corpus)
            blocks = itertools.chain([head], iter(lambda: f.read(1 << 18), b''))
            docs = split(corpus.blocks(blocks, report), boundary)
        for doc in docs:
            bar.update(raw.tell() - at)
            at = raw.tell()
            yield doc, doc.decode()


def texts_of(path, s):
    """The documents of one file as they stand, paragraphs where nothing else parts them."""
    plain = Corpus(SimpleNamespace(**vars(s) | dict(dataset=f'files:{path}', min_doc_bytes=0)))
    name = plain.root.name.replace('.tsv', '')   # tagged words are no table of texts
    return [text for path in files_below(plain.root).values()
            for _, text in plain.documents(Part(path, name, '', ''), Counter(), NO_BAR)]


# ----------------------------------------------------------------------------------------------------
# The seam: where a data set comes from, its licence, its documents, what is kept about each

class Corpus:
    """A data set of files:<path>; with `sets`, also of files that are downloaded.

    An idea derives from it, overrides what it changes, and calls super() for the rest, so that ideas stack.
    s: a namespace with all settings, the fields of Options and those that the ideas declare. A build calls,
    in this order: check, text, parts, learn; for each document of pass 1 unwanted and meet; decide; in pass 2
    only documents, again; record; finish; summary.
    """
    sets = {}                # name: dict(about, mb, licence, repo, files={name in data/raw/<dataset>: path in
                             # the repository on Hugging Face}, sha256={name: digest of what must not differ})

    def __init__(self, s):
        paths = {name: path_of(path) for name in PATHS if (path := getattr(s, name))}
        self.s, self.pieces, self.text_field = SimpleNamespace(**vars(s) | paths), {}, s.text_field
        self.name = data_name(s.dataset, self.known())
        self.entry = self.known().get(s.dataset, {})
        self.root = source_root(s.dataset, s.data_dir)
        self.folder = self.folder_for(s.tokenizer, s.vocab_size)

    @classmethod
    def known(cls):
        """{name: entry} of all data sets that the classes of this one bring."""
        return {name: entry for c in cls.__mro__[::-1] for name, entry in vars(c).get('sets', {}).items()}

    def folder_for(self, tokenizer, vocab_size):
        """Where the data set prepared with this tokenizer lies."""
        size = vocab_size if tokenizer == 'bpe' else ''
        return Path(self.s.data_dir) / f'{self.name}-{tokenizer}{size}{self.variant()}'

    def variant(self):
        """What ideas that change the text add to its folder's name: it lies beside the text as it was."""
        return ''

    def changes(self):
        """{setting: value} of ideas that change the text: data prepared otherwise is not opened."""
        return {}

    def content(self):
        """{setting: value} that decide what is in the bins."""
        return {name: getattr(self.s, name) for name in CONTENT} | self.changes()

    @property
    def licence(self):
        return self.entry.get('licence', 'as the files say')

    # What `python prepare_data.py` and the trainer ask for

    def run(self):
        """What the command line does."""
        self.build()

    @readable()
    def open(self):
        """The prepared Data, built first where it is missing."""
        if not (self.folder / 'meta.json').exists():
            print(f'{self.folder} is missing: building it', flush=True)
            self.build()
        return self.opened()

    def opened(self):
        """The prepared Data, refused where it was made otherwise than is asked for now."""
        data = open_data(self.folder, self.s.dataset)
        theirs, changes = data.meta.get('settings', {}), self.changes()
        ours = {name: value for name, value in self.content().items() if name in theirs or name in changes}
        if self.s.tokenizer != 'bpe':
            ours.pop('vocab_size', None)
        for name, value in data.meta.get('made_from', {}).get('changes', {}).items():
            ours.setdefault(name, type(value)())                 # of an idea that is not named now
        if wrong := [f'{name} {theirs.get(name)!r}, not {value!r}' for name, value in ours.items()
                     if theirs.get(name, type(value)()) != value]:
            also = ' '.join(path for path in data.meta.get('configs', ()) if path not in self.configs())
            raise UserError(f'{self.folder} was prepared with {", ".join(wrong)}: say the same'
                            f'{also and f" ({also})"}, prepare it anew with --overwrite, or keep both with '
                            f'another --data_dir')
        given = self.s.tokenizer_from
        if given and given.exists() and not self.same(load_tokenizer(given), data.tokenizer):
            raise UserError(f'{given} has another vocabulary than {self.folder}: use its data, prepare it '
                            f'anew with --overwrite, or keep both with another --data_dir')
        return data

    def build(self, quiet=False):
        """Prepares the data set and returns its folder, which appears complete or not at all."""
        if self.folder.exists() and not self.s.overwrite:
            self.opened()
            raise UserError(f'{self.folder} exists already: use it, or prepare it anew with --overwrite')
        with whole_or_nothing(self.folder) as temp:
            self.check()
            self.fill(temp)
        if not quiet:
            print(*self.summary(open_data(self.folder)), sep='\n')
        return self.folder

    def fill(self, temp):
        """Writes all files of the data set into the folder `temp`."""
        fill(self, temp)

    # The source text

    def check(self):
        """Refuses what can be refused before the work starts."""
        if self.s.base_url and not re.match('(https?|file)://', self.s.base_url):
            raise UserError(f'base_url is {self.s.base_url!r}: begin it with https://')
        if self.s.tokenizer_from:
            given = load_tokenizer(self.s.tokenizer_from)
            if self.folder_for(given.kind, given.vocab_size) != self.folder:
                raise UserError(f'{self.s.tokenizer_from} has a {given.kind} tokenizer of '
                                f'{given.vocab_size:,} ids, {self.folder} is to have another: give the same '
                                f'--tokenizer and --vocab_size')

    def text(self, temp, report):
        """Makes or fetches the text, into `temp` or data/raw. Returns the folder or file it lies in."""
        if self.entry:
            fetch(self.entry, self.root, self.s.base_url)
        return self.root

    def parts(self, root, temp, report):
        """The files of the text, and the names of those left out."""
        return find_parts(root)

    def learn(self, parts):
        """What an idea must know of the text before documents are judged."""

    def learned(self):
        """That, for --workers: shards are of one text only where it is the same."""

    # Documents

    def kind_of(self, part, lines):
        """What a file is written like, one of KINDS; lines: those of its head that are not blank."""
        return next(kind for kind, (name, line) in KINDS.items() if re.search(name, part.source)
                    or sum(map(bool, map(re.compile(line).match, lines))) > 0.5 * len(lines))

    def blocks(self, blocks, report):
        """The bytes of a file, or of a row of it, in pieces as they come."""
        return blocks

    def row_text(self, where, row):
        """The text of a row of JSON or of a table, or None; where: its place, for a message."""
        return row[text_column(where, row, self.text_field)] if isinstance(row, dict) else row

    def documents(self, part, report, bar):
        """The documents of one file, as (bytes, str). The bar counts the bytes on disk."""
        return read(part, self, report, bar)

    def said(self, text):
        """The bytes that a document of this text counts with, after something changed it."""
        return text.encode()

    def unwanted(self, text, part):
        """Why a training document is dropped, or ''."""
        return ''

    def meet(self, text, held):
        """Shown each document that pass 1 keeps, in order, and whether it is held out."""

    def decide(self, found, kept):
        """After pass 1: may drop more of those that were met, by found.drop_if; kept: their numbers."""

    def note(self, report, reason, text, new=''):
        """Counts a document, keeps a piece of three: of its beginning, or of where the new text differs."""
        report[reason] += 1
        kept = self.pieces.setdefault(reason, [])
        if len(kept) < 3:
            at = next((i for i, (a, b) in enumerate(zip(text, new)) if a != b), len(new))
            piece = text[max(at - 20, 0):][:80]
            kept += [piece] * (piece not in kept)

    # What is kept

    def tokenizer(self, texts):
        """That of tokenizer_from, so that a run's weights fit it; else learned from the texts, or fixed."""
        if self.s.tokenizer_from:
            return load_tokenizer(self.s.tokenizer_from)
        if self.s.tokenizer == 'bpe':
            return BPETokenizer.train(texts, self.s.vocab_size)
        return ByteTokenizer() if self.s.tokenizer == 'bytes' else GPT2Tokenizer.find(self.gpt2_folders)

    def same(self, given, tokenizer):
        """Whether weights that know the given tokenizer's ids can be trained on this one's."""
        return given.blob == tokenizer.blob

    def ids(self, tokenizer, texts):
        """The ids of documents, without BOS, an array each."""
        return tokenizer.encode_batch(texts)

    @property
    def gpt2_folders(self):
        return [folder for folder in (self.s.gpt2_dir, Path(self.s.data_dir) / 'gpt2') if folder]

    def configs(self):
        """The files of config/ whose classes this one is made of, to name in what a user is told to run."""
        return [f'{c.__module__.replace(".", "/")}.py' for c in type(self).__mro__[::-1]
                if c.__module__.startswith('config.')]

    def record(self, meta):
        """Adds to meta.json what an idea knows of the build; it is part of the fingerprint."""

    def finish(self, data):
        """Adds files to a prepared folder, before it takes its place."""

    def summary(self, data):
        """Lines about a prepared data set."""
        meta = data.meta
        lines = [f'{"split":6}{"source":24}{"documents":>11}{"words":>13}{"tokens":>13}{"bytes/token":>13}']
        for split, s in meta['splits'].items():
            for name, n in [*s['sources'].items(), *[('all', s)] * (len(s['sources']) > 1)]:
                lines.append(f'{split:6}{name[:23]:24}{n["documents"]:11,}{n["words"]:13,}{n["tokens"]:13,}'
                             f'{n["bytes"] / n["tokens"]:13.3f}')
        for what, count in meta['report'].items():
            by = [f'{name} {n[what]:,}' for name, n in meta['cleaning']['by_source'].items() if n.get(what)]
            by = f' ({", ".join(by)})' * (len(meta['sources']) > 1 and bool(by))
            lines.append(f'{count:,} {what}{by}')
        if meta['ignored']:
            lines.append(f'left out: {", ".join(meta["ignored"])}')
        if (n := meta.get('in_training')) and n['held_out_bytes']:
            share = n['shared'] / n['held_out_bytes']
            lines.append(f'{share:.1%} of the held-out text is in training too, by lines of {LONG} letters')
        words, seconds = sum(s['words'] for s in meta['splits'].values()), max(meta['seconds'], 0.1)
        lines.append(f'licence: {meta["licence"]}')
        lines.append(f'{meta["vocab_size"]:,} ids ({meta["tokenizer"]}); {words:,} words in {seconds:.1f} s, '
                     f'{words / seconds:,.0f} words/s; {data.folder}')
        return lines

    # Looking at it

    def line(self, data, i):
        """A training document on a line of the page."""
        source = data.meta['sources'][data.docs['train']['source'][i]]
        return f'{source[:14]:15}{clipped(next(data.texts("train", [i])))}'

    def examples(self, data, sample):
        """Lines with documents; sample: numbers of some training documents."""
        return ['\nrandom documents', *(self.line(data, i) for i in sample[:4])]

    def repeats(self, data):
        """Lines about training documents that are like others."""
        bounds, tokens = data.bounds('train'), data.tokens['train'].view(np.ndarray)
        hashes = [hash(tokens[a:b].tobytes()) for a, b in itertools.pairwise(bounds[:1_000_001])]
        return [f'\n{len(hashes) - len(set(hashes)):,} of {len(hashes):,} training documents repeat another']

# ----------------------------------------------------------------------------------------------------
# Build: pass 1 checks everything, learns what validation holds and samples text; pass 2 encodes

def even(text):
    """A text with one kind of line ends, in one Unicode form: copies that differ in no more are equal."""
    if text.isascii() and '\r' not in text:
        return text
    return unicodedata.normalize('NFC', text.replace('\r\n', '\n').replace('\r', '\n'))


def key_of(doc):
    """Two numbers in [0, 2^64) from the content, for the split and for the tokenizer's sample."""
    doc = doc if doc.isascii() and b'\r' not in doc else even(doc.decode()).encode()
    return np.frombuffer(hashlib.blake2b(doc, digest_size=16).digest(), '<u8').tolist()


def lines_of(text):
    """Hashes of its lines that are long enough not to be alike by chance, and their bytes."""
    lines = map(str.strip, even(text).split('\n'))
    return [(hash(line), len(line.encode())) for line in lines if len(line) >= LONG]


class Found:
    """What pass 1 learns. held: keys of validation and test; sample: key -> (rank, text) of training; below:
    where hashes decide, validation has the lower keys, which are in hashed; drop: a byte a document, why it
    goes, a number of `reasons`, 0 if it stays; lines: hash -> bytes, of held-out text; shared: those of them
    that training has too."""

    def __init__(self, val_fraction):
        self.held, self.hashed, self.sample, self.bytes, self.documents = set(), set(), {}, 0, 0
        self.reasons, self.drop = {'': 0}, bytearray()
        self.below, self.lowest = int(val_fraction * 2**64), 2**64
        self.lowest_at = self.lone = None        # numbers of documents: of that key; where it alone is held out
        self.lowest_text = ''
        self.ceiling, self.size, self.lines, self.shared = 2**64, 0, {}, set()

    def number(self, reason):
        return self.reasons.setdefault(reason, len(self.reasons))

    def drop_if(self, numbers, reason):
        """Drops the documents of these numbers; those that are dropped already keep their reason."""
        self.drop[numbers[self.drop[numbers] == 0]] = self.number(reason)

    def hold(self, text):
        """Notes the lines of a held-out document, up to a million."""
        self.lines.update(lines_of(text) if len(self.lines) < 1_000_000 else ())

    def assign(self, split, key, text):
        """Notes on which side of the split a document is."""
        if split in ('val', 'test'):
            self.held.add(key)
            self.hold(text)
        elif split == '' and key not in self.held:
            if key < self.lowest:
                self.lowest, self.lowest_at, self.lowest_text = key, len(self.drop) - 1, text
            if key < self.below:
                self.hashed.add(key)
                self.hold(text)

    def hold_one(self):
        """Of a small corpus, where no hash is low enough: the lowest alone is validation."""
        if self.below <= self.lowest < 2**64:
            self.below, self.lone = self.lowest + 1, self.lowest_at
            self.hashed.add(self.lowest)
            self.hold(self.lowest_text)
            self.sample.pop(self.lowest, None)

    def offer(self, key, rank, text, size):
        """The lowest ranks of training documents: an even sample in one pass, whatever the length."""
        if key in self.held or key in self.hashed or key in self.sample:
            return
        if rank < self.ceiling:
            self.sample[key] = rank, text
            self.size += size
        while self.size > SAMPLE_BYTES:
            self.ceiling //= 2
            self.sample = {k: v for k, v in self.sample.items() if v[0] < self.ceiling}
            self.size = sum(len(t.encode()) for _, t in self.sample.values())


def scan(corpus, parts, bar):
    """Pass 1 over all files: what it Found."""
    found = Found(corpus.s.val_fraction)
    for part in parts:
        before = found.documents
        for doc, text in corpus.documents(part, Counter(), bar):
            key, rank = key_of(doc)
            found.bytes += len(doc)
            found.documents += 1
            held = part.split in ('val', 'test') or part.split == '' and key < found.below
            reason = '' if held else corpus.unwanted(text, part)
            found.drop.append(found.number(reason))
            if not reason:
                corpus.meet(text, held)
                found.assign(part.split, key, text)
                found.offer(key, rank, text, len(doc))
        if part.split and found.documents == before and not part.shard:
            raise UserError(f'{part.path} holds no text: fill it or take it away')
    found.hold_one()
    found.drop = np.frombuffer(found.drop, np.uint8)
    corpus.decide(found, np.flatnonzero(found.drop == 0))
    if not found.sample:
        raise UserError(f'{corpus.root} holds no text to train on: give two documents or more')
    return found


class SplitWriter:
    """Encodes documents in batches, appends them to <split>.bin, and counts them by source."""

    def __init__(self, folder, split, tokenizer, n_sources, ids):
        self.path, self.tokenizer, self.ids = folder / f'{split}.bin', tokenizer, ids
        self.dtype = '<u2' if tokenizer.vocab_size <= 65536 else '<u4'
        self.file, self.rows, self.tokens, self.batch, self.pending = open(self.path, 'wb'), [], 0, [], 0
        self.counts = np.zeros((n_sources, len(COUNTS)), np.int64)

    def add(self, source, n_bytes, text):
        self.batch.append((source, n_bytes, text))
        self.pending += n_bytes
        if self.pending >= BATCH_BYTES:
            self.write()

    def write(self):
        sources, n_bytes, texts = map(list, zip(*self.batch))
        ids = [np.append(self.tokenizer.bos, row) for row in self.ids(self.tokenizer, texts)]
        words = [len(text.split()) for text in texts]
        self.append(sources, n_bytes, words, np.array([len(row) for row in ids]), np.concatenate(ids))
        self.batch, self.pending = [], 0

    def append(self, sources, n_bytes, words, lengths, ids):
        """Documents that are encoded: a number of each, and the ids of all, back to back."""
        rows = np.zeros(len(lengths), DOC)
        rows['start'] = self.tokens + lengths.cumsum() - lengths
        rows['bytes'], rows['source'] = n_bytes, sources
        self.rows.append(rows)                   # 18 bytes a document, the one thing that grows
        np.add.at(self.counts, sources, np.stack([np.ones_like(lengths), words, n_bytes, lengths], 1))
        self.tokens += int(lengths.sum())
        self.file.write(ids.astype(self.dtype).tobytes())

    def close(self):
        if self.batch:
            self.write()
        self.file.close()
        np.save(self.path.with_name(f'{self.path.stem}.docs.npy'), np.concatenate(self.rows))

    def meta(self, names):
        rows = {name: dict(zip(COUNTS, row.tolist())) for name, row in zip(names, self.counts) if row[0]}
        total = dict(zip(COUNTS, self.counts.sum(0).tolist()))
        return total | dict(head_sha256=sha256_of(self.path, 1 << 20), sources=rows)


def encode(corpus, parts, found, tokenizer, folder, names, bar):
    """Writes the bins. Returns {split: SplitWriter}, {source: what was dropped or cut}, a digest."""
    writers, reports, digest, number = {}, {name: Counter() for name in names}, hashlib.sha256(), -1
    for part in parts:
        source, report = names.index(part.source), reports[part.source]
        for doc, text in corpus.documents(part, report, bar):
            key, number = key_of(doc)[0], number + 1
            if number == len(found.drop):
                raise unsteady(corpus.root)
            if (key in found.held and part.split in ('', 'train')
                    or key in found.hashed and part.split == 'train'):
                corpus.note(report, 'training documents dropped, identical to held-out ones', text)
                continue
            split = part.split or ('val' if key in found.hashed else 'train')
            if split == 'train' and found.drop[number]:
                corpus.note(report, [*found.reasons][found.drop[number]], text)
                continue
            if split == 'train':
                found.shared.update(line for line, _ in lines_of(text) if line in found.lines)
            digest.update(f'{split} {source} {len(doc)} '.encode() + doc)
            if split not in writers:
                writers[split] = SplitWriter(folder, split, tokenizer, len(names), corpus.ids)
            writers[split].add(source, len(doc), text)
    return finished(writers), reports, digest.hexdigest()


def finished(writers):
    """Closes the splits' files; refuses what cannot be trained on."""
    for writer in writers.values():
        writer.close()
    tokens = writers['train'].tokens if 'train' in writers else 0
    if tokens < MIN_TRAIN_TOKENS or 'val' not in writers:
        raise UserError(f'the training split has {tokens:,} tokens, {MIN_TRAIN_TOKENS} are needed, and '
                        f'validation {"some" if "val" in writers else "none"}: give more text or a .dev file')
    return {s: writers[s] for s in ('train', 'val', 'test') if s in writers}


def sha256_of(path, size=-1):
    with open(path, 'rb') as f:
        return (hashlib.sha256(f.read(size)) if size > 0 else hashlib.file_digest(f, 'sha256')).hexdigest()


def crc32_of(path):
    """The checksum of a file that is not empty, of its first 2 GiB: a second finds another bit anywhere there."""
    return zlib.crc32(np.memmap(path, np.uint8, 'r')[:2 ** 31])


def beside(path):
    """The name under which this process, on this machine, writes what is to be `path`."""
    return path.with_name(f'.{path.name}.{platform.node()}.{os.getpid()}')


def abandoned(path):
    """What lies under such a name since its process is gone; another machine's, if for a day nobody wrote to it."""
    for left in path.parent.glob(f'.{glob.escape(path.name)}.*'):
        node, _, pid = left.name[len(f'.{path.name}.'):].rpartition('.')
        with contextlib.suppress(OSError):       # another may have taken it away
            written = max(p.lstat().st_mtime for p in (left, *(left.iterdir() if left.is_dir() else ())))
            here = node.removeprefix('old.') in (platform.node(), 'old', '')
            if pid.isdigit() and (not running(int(pid)) if here else written < time.time() - 86400):
                yield left


def running(pid):
    if sys.platform == 'win32':                  # there os.kill ends it
        return True
    try:
        os.kill(pid, 0)                          # signal 0 asks and sends nothing
    except OSError as e:
        return e.errno == errno.EPERM            # somebody else's
    return True


@contextlib.contextmanager
def whole_or_nothing(folder):
    """A new folder beside `folder` that takes its place at the end, or vanishes with what went wrong."""
    temp, old = beside(folder), beside(folder.with_name(f'{folder.name}.old'))
    for left in (temp, old, *abandoned(folder)):     # by a build that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        temp.mkdir(parents=True)
        yield temp
        for path in temp.iterdir():              # on the disk before the folder takes its place
            with open(path, 'rb+') as f:         # Windows syncs what is open to write
                os.fsync(f.fileno())
        if folder.exists():
            os.rename(folder, old)
        os.rename(temp, folder)
        shutil.rmtree(old, ignore_errors=True)   # not before the new one is in place
    except OSError as e:
        what = (f'the disk of {folder.parent} is full' if e.errno in FULL else
                f'{e.filename}: {e.strerror or e}')
        raise UserError(f'{what}; nothing was left behind: mend that or choose another --data_dir') from None
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def gather(corpus, temp, report):
    """Makes or fetches the text. Returns its parts, and the names of files left out."""
    parts, ignored = corpus.parts(corpus.text(temp, report), temp, report)
    check_text(parts)
    corpus.learn(parts)
    return parts, ignored


def room(corpus, temp, need):
    """Refuses to begin what the disk cannot hold."""
    if (free := shutil.disk_usage(temp).free) < need:
        raise UserError(f'{corpus.s.data_dir} has {free / 1e6:,.0f} MB free, about {need / 1e6:,.0f} MB are '
                        f'needed: make room or choose another --data_dir')


def fill(corpus, temp):
    """Writes all files of a data set into the folder `temp`."""
    from tqdm import tqdm
    t0, dropped = time.time(), Counter()
    parts, ignored = gather(corpus, temp, dropped)
    made_from = trace(corpus.root)
    progress = functools.partial(tqdm, total=sum(part.path.stat().st_size for part in parts), unit='B',
                                 unit_scale=True, disable=None)
    with progress(desc='checking') as bar:
        found = scan(corpus, parts, bar)
    room(corpus, temp, found.bytes * (2 if corpus.s.tokenizer == 'bytes' else 0.7) + 50 * found.documents)
    tokenizer = corpus.tokenizer(text for _, text in found.sample.values())
    found.sample.clear()
    names = sorted({part.source for part in parts})
    with progress(desc='encoding') as bar:
        encoded = encode(corpus, parts, found, tokenizer, temp, names, bar)
    if made_from != trace(corpus.root):
        raise unsteady(corpus.root)
    describe(corpus, temp, t0, parts, ignored, dropped, found, encoded, trace(corpus.root, digest=True))


def describe(corpus, temp, t0, parts, ignored, dropped, found, encoded, made_from):
    """Writes meta.json and the tokenizer beside the bins in `temp`, and what ideas add."""
    (writers, reports, digest), s, names = encoded, corpus.s, sorted({part.source for part in parts})
    tokenizer = writers['train'].tokenizer
    (temp / tokenizer.filename).write_bytes(tokenizer.blob)
    meta = dict(
        version=VERSION, dataset=s.dataset, tokenizer=s.tokenizer, vocab_size=tokenizer.vocab_size,
        bos=tokenizer.bos, dtype=writers['train'].dtype, sources=names,
        splits={split: writer.meta(names) for split, writer in writers.items()}, licence=corpus.licence,
        report=dict(sorted((sum(reports.values(), Counter()) + dropped).items())), ignored=ignored,
        cleaning=dict(layouts={part.name: f'{part.kind}, {part.way}' for part in parts},
                      examples=corpus.pieces, by_source=reports),
        files=[row[:2] for row in made_from['files']],
        tokenizer_sha256=sha256_of(temp / tokenizer.filename), text_sha256=digest,
        settings=corpus.content())
    corpus.record(meta)
    content = meta | dict(dataset=corpus.name)   # a path says nothing about the content
    meta['fingerprint'] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    meta['configs'] = corpus.configs()
    meta['made_from'] = made_from | dict(changes=corpus.changes())
    meta['in_training'] = dict(held_out_bytes=sum(found.lines.values()),
                               shared=sum(found.lines[line] for line in found.shared))
    meta['created'] = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())
    meta['seconds'] = round(time.time() - t0, 1)
    shutil.rmtree(temp / 'raw', ignore_errors=True)              # text that was generated
    write_meta(temp, meta)
    corpus.finish(open_data(temp))
    files = [path for end in ('bin', 'docs.npy') for path in sorted(temp.glob(f'*.{end}'))]      # as ideas leave them
    write_meta(temp, meta | dict(crc32={path.name: crc32_of(path) for path in files}))


def write_meta(folder, meta):
    (folder / 'meta.json').write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding='utf-8')


def trace(root, digest=False):
    """What a data set is made from: where its files lie, and the name, bytes, time and digest of each."""
    paths = {name: path for name, path in (files_below(root) if root.exists() else {}).items()
             if path == root or not BESIDE.fullmatch(path.name)}
    return dict(root=str(root.resolve()), files=sorted(
        [name, path.stat().st_size, path.stat().st_mtime_ns, *([sha256_of(path)] if digest else ())]
        for name, path in paths.items()))


def unsteady(root):
    return UserError(f'the files in {root} changed while they were read: prepare them when nothing writes '
                     f'there')


# ----------------------------------------------------------------------------------------------------
# Open what was built

@readable()
def load_tokenizer(folder):
    """The tokenizer whose file lies in a folder: a prepared data set's, or a run's copy."""
    folder = Path(folder)
    for cls in TOKENIZERS.values():
        path = (folder.parent if folder.is_file() else folder) / cls.filename    # a checkpoint lies beside it
        if path.is_file():
            try:
                return cls(path.read_bytes())
            except (RuntimeError, ValueError, IndexError, MemoryError):
                raise UserError(f'{path} is damaged: prepare the data again with --overwrite') from None
    raise UserError(f'{folder} holds no tokenizer: copy the data\'s to it, or prepare the data again with '
                    f'--overwrite')


class Bin(np.memmap):
    """The ids of a split, in its file; what is taken of them is a copy. UserError where the file was written to
    since it was opened: other numbers would come of it, or, where it is shorter, a signal that ends the process."""
    file = None                                  # of what is made of it by arithmetic

    def __new__(cls, path, dtype):
        file = open(path, 'rb')
        self = super().__new__(cls, file, dtype, 'r')
        self.file, self.was = file, os.fstat(file.fileno())
        return self

    def __getitem__(self, key):
        if self.file is None:
            return super().__getitem__(key)
        self.check()
        taken = np.array(super().__getitem__(key))
        self.check()
        return taken

    def check(self):
        now, was = os.fstat(self.file.fileno()), self.was
        if (now.st_size, now.st_mtime_ns) != (was.st_size, was.st_mtime_ns):
            raise UserError(f'{self.file.name} has been written to since this process opened it: put it back, or '
                            f'prepare the data again with --overwrite, when nothing reads there')


@dataclass
class Data:
    folder: Path
    meta: dict
    tokens: dict             # split -> Bin
    docs: dict               # split -> structured array of DOC

    @functools.cached_property
    def tokenizer(self):
        return load_tokenizer(self.folder)

    def bounds(self, split):
        """(documents + 1,): where each document begins in tokens[split], and the end."""
        return np.append(self.docs[split]['start'], len(self.tokens[split]))

    def texts(self, split, numbers=None):
        """The texts of the documents of these numbers, of all in their order without."""
        bounds, tokens = self.bounds(split), self.tokens[split].view(np.ndarray)
        for i in range(len(bounds) - 1) if numbers is None else numbers:
            yield self.tokenizer.decode(tokens[bounds[i] + 1:bounds[i + 1]].tolist())


@readable()
def open_data(folder, dataset=None):
    """Checks a prepared folder and maps it into memory; refuses what the trainer could not trust."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / 'meta.json').read_text('utf-8') if (folder / 'meta.json').is_file() else '')
        broken = meta['version'] == VERSION and not (fits(meta, META) and all(
            split['sources'].keys() <= {*meta['sources']} for split in meta['splits'].values()))
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        broken = True
    known = {} if broken or not fits(meta, META) else meta       # of another format as far as it is like ours
    again = f'run python prepare_data.py {build_options(folder, known, dataset)} --overwrite'
    if broken:
        raise UserError(f'{folder} is not a prepared data set (meta.json is missing or damaged): {again}')
    if meta['version'] != VERSION:
        raise UserError(f'{folder} has format {meta["version"]}, this program reads {VERSION}: {again}')
    if dataset and meta['files']:
        check_source(folder, meta, dataset, again)
    path = folder / TOKENIZERS[meta['tokenizer']].filename
    if not path.is_file() or sha256_of(path) != meta['tokenizer_sha256']:
        raise UserError(f'{path} is missing or not the tokenizer of these bins: {again}')
    data = Data(folder, meta, {}, {})
    for split, counts in meta['splits'].items():
        if problem := open_split(data, split, counts):
            raise UserError(f'{folder / split}.bin {problem}: {again}')
    return data


def build_options(folder, meta, dataset):
    """The command line that prepares a folder as it was."""
    plain = {f.name: f.default for f in fields(Options)}
    mine, settings = meta.get('made_from', {}).get('changes', {}), meta.get('settings', {})
    given = {name: value for name, value in settings.items()
             if name in mine or name in CONTENT and value != plain[name]}
    names = 'tokenizer', *['vocab_size'] * (meta.get('tokenizer') == 'bpe')
    given |= {name: meta[name] for name in names if name in meta}
    given = dict(dataset=dataset or meta.get('dataset', '<dataset>')) | given | dict(data_dir=folder.parent)
    return shlex.join([*meta.get('configs', ()), *(f'--{name}={value}' for name, value in given.items())])


def check_source(folder, meta, dataset, again):
    """Refuses data that was made from another text than that which it is opened for, if this was kept. Where
    times or places differ, what is in the files decides; older versions noted names and sizes alone."""
    root, made = source_root(dataset, folder.parent), meta.get('made_from', {})
    now = trace(root)
    at = made.get('root', now['root'])
    if not root.exists():
        other = at != now['root'] and dataset != meta['dataset']
        return refuse(other, f'{root} does not exist, {folder} was prepared from {at}: name that, or '
                      f'where the text is now')
    same = [row[:2] for row in now['files']] == meta['files']
    if same and made and (at != now['root'] or now['files'] != [row[:3] for row in made['files']]):
        same = [row[3] for row in trace(root, digest=True)['files']] == [row[3] for row in made['files']]
    what = f'the files in {root} changed since {folder} was prepared: ' if at == now['root'] else (
        f'{folder} was prepared from {at}, {root} holds another text: keep both with another --data_dir, or ')
    refuse(not same, what + again)


def open_split(data, split, counts):
    """Maps one split. Returns what is wrong with it, or None."""
    path, rows, dtype = *(data.folder / f'{split}.{end}' for end in ('bin', 'docs.npy')), np.dtype(data.meta['dtype'])
    known = data.meta.get('crc32', {})           # none where it was prepared before 2026-11-27
    if not (path.is_file() and rows.is_file()):                  # a pipe would be waited for
        return 'or its docs.npy is missing or damaged'
    try:
        if known.get(rows.name) not in (None, crc32_of(rows)):
            return 'or its docs.npy is damaged, by its checksum'
        tokens, docs = Bin(path, dtype), np.load(rows)
    except (ValueError, EOFError, TypeError, MemoryError, SyntaxError, tokenize.TokenError):
        return 'or its docs.npy is missing or damaged'
    if path.stat().st_size != counts['tokens'] * dtype.itemsize:
        return f'holds {len(tokens):,} tokens where meta.json says {counts["tokens"]:,}'
    if sha256_of(path, 1 << 20) != counts['head_sha256']:
        return 'is not the file that meta.json describes'
    if docs.dtype != DOC or len(docs) != counts['documents'] or docs['bytes'].sum() != counts['bytes']:
        return 'does not fit its docs.npy'
    if not (docs['source'] < len(data.meta['sources'])).all() or (docs['source'] < 0).any():
        return 'has documents of no source'
    starts = docs['start']
    if (starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= len(tokens)
            or (tokens[starts] != data.meta['bos']).any()):
        return 'has documents that do not begin with BOS'
    if max(tokens[:100_000].max(), tokens[-100_000:].max()) >= data.meta['vocab_size']:
        return f'holds ids beyond the vocabulary of {data.meta["vocab_size"]:,}'
    if known.get(path.name) not in (None, crc32_of(path)):
        return 'is damaged, by its checksum'
    data.tokens[split], data.docs[split] = tokens, docs


def source_weights(text, data):
    """How often an epoch reads each source, from 'childes:2,gutenberg:0.5'; None from nothing."""
    weights = dict.fromkeys(data.meta['sources'], 1.0)
    for part in text.split(',') if text else ():
        name, _, value = part.strip().partition(':')
        if name not in weights:
            raise UserError(f'weights names {name!r}, the sources of {data.folder} are {", ".join(weights)}')
        if not re.fullmatch(r'\d{1,3}(\.\d*)?|\.\d+', value):
            raise UserError(f'weights gives {name} {value!r}: write a number below 1000, like {name}:2')
        weights[name] = float(value)
    trained = data.meta['splits']['train']['sources']
    if sum(weights[name] * n['documents'] for name, n in trained.items()) < 1:
        raise UserError(f'weights leave nothing to train on: weigh one of {", ".join(trained)} above 0')
    return list(weights.values()) if text else None


def write_beside(path, write):
    """A file that write(f) fills, beside its place, then moved into it. A folder that is read-only costs time
    later, no more: what is written so can be made again."""
    temp = beside(path)
    try:
        for left in abandoned(path):             # by a process that was killed
            left.unlink()
        with open(temp, 'wb') as f:
            write(f)
        os.replace(temp, path)
    except OSError:
        temp.unlink(missing_ok=True)


def clipped(text, limit=88):
    """The head of a text on one line, without what a terminal would take for a command."""
    return ''.join(c if c.isprintable() else '\ufffd' for c in ' '.join(text[:4 * limit].split())[:limit])


# ----------------------------------------------------------------------------------------------------
# Command line

def usage(corpus):
    """Prints what there is: settings, files of config/ with a Corpus, data sets of those that are named."""
    own = Path(__file__).read_text(encoding='utf-8')
    print(__doc__, own[own.index('    dataset:'):own.index('CONTENT =')].rstrip(), '', sep='\n')
    for path in sorted(CONFIG.glob('[!_]*.py')):
        text = path.read_text(encoding='utf-8')                  # not executed
        if re.search(r'^(class|from .* import) Corpus\b', text, re.M):
            print(f'  config/{path.name:24}{text.strip(chr(34)).split(chr(10))[0].rstrip(chr(34))}')
    print('\n  --dataset=files:<path>      a text file or a folder; <source>.train, .dev, .test keep their splits')
    for name, entry in corpus.known().items():
        print(f'  --dataset={name:18}{entry["about"]}\n{"":30}about {entry["mb"]:,} MB; {entry["licence"]}')


def main(argv):
    heard = []

    def stop(number, frame):
        heard.append(number)                                  # and an exception, so the temporary folder goes
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(143)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    argv = [f'--dataset={arg}' if arg.startswith('files:') else arg for arg in argv]
    try:
        asked = {arg.partition('=')[0] for arg in argv}
        argv += [str(path) for name, path in verbs('prepare').items() if f'--{name}' in asked]
        ideas = Ideas([arg for arg in argv if arg not in ('-h', '--help')], [Options], strict=False)
        corpus = ideas.seam(Corpus)
        if {'-h', '--help'} & {*argv}:
            usage(corpus)
        else:
            for line in ideas.overruled:
                print(f'overruled: {line}')
            corpus(SimpleNamespace(**ideas.values)).run()
    except (UserError, OSError, MemoryError, RuntimeError) as e:
        print(f'prepare_data.py: {in_words(e)}', file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f'prepare_data.py: interrupted; {e or "nothing was left behind"}', file=sys.stderr)
        return 130
    except Exception:                                         # numpy makes another of one that rises within it
        if not heard:
            raise
        return 128 + heard[0]
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):        # an exception finds nobody while Python ends
            signal.signal(number, signal.SIG_DFL)


if __name__ == '__main__':
    sys.modules['prepare_data'] = sys.modules['__main__']     # ideas import the one that runs
    print_without_fail()
    sys.exit(main(sys.argv[1:]))

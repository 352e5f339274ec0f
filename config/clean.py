"""Cleans text: mends letters, takes out what is no prose, drops what is in another language or repeats.

    python prepare_data.py config/babylm.py config/clean.py
    python train.py config/babylm.py config/clean.py --clean=unicode,boilerplate

The first three steps change the text of every split, the last two drop training documents:

    unicode       UTF-8 read as latin-1 or cp1252 is repaired, letters are composed (NFC), odd characters go
    boilerplate   licences of Project Gutenberg, headings, tags and links of wikis and the web
    speakers      `*MOT:` and dashes before the turns of a dialogue
    language      naive Bayes over hashed strings of one to four bytes, learned from Python's library, config/
                  stories*.txt and the text at hand; what a source has most of is kept, or --languages
    repetition    what Gopher's rules (Rae 2021, 2112.11446) measure; but their limits are the web's and would
                  delete dialogue, where short lines come again and again: each kind of text has its own

Its bits per byte are of another text: compare runs on the same. What was dropped, and why, is in meta.json.
"""
import hashlib
import html
import itertools
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

import prepare_data
from prepare_data import NO_BAR, SEPARATOR, UserError

clean: str = 'all'           # steps with commas between; or all
languages: str = ''          # that the step language keeps, of en,sv,code; without it a source's commonest

STEPS = ('unicode', 'boilerplate', 'speakers', 'language', 'repetition')
LANGUAGES = ('en', 'sv', 'code')


class Corpus(prepare_data.Corpus):
    def __init__(self, s):
        super().__init__(s)
        self.steps = set(STEPS) if s.clean == 'all' else set(re.findall(r'[^,\s]+', s.clean))
        self.languages, self.table = {}, None    # what to keep of each source; log probabilities

    def changes(self):
        return super().changes() | dict(clean=self.s.clean, languages=self.s.languages)

    def variant(self):
        return super().variant() + '-clean' * bool(self.s.clean)

    def check(self):
        super().check()
        if wrong := self.steps - set(STEPS) or set(re.findall(r'[^,\s]+', self.s.languages)) - set(LANGUAGES):
            raise UserError(f'{min(wrong)!r} is no step of clean and no language: choose {", ".join(STEPS)} '
                            f'or all, and {", ".join(LANGUAGES)}')
        if self.s.languages and 'language' not in self.steps:
            raise UserError(f'languages is {self.s.languages!r}, and clean has no step language: add it')

    def blocks(self, blocks, report):
        blocks = super().blocks(blocks, report)
        return without_licence(blocks, report) if 'boilerplate' in self.steps else blocks

    def documents(self, part, report, bar):
        """Documents after the steps that change text; where they leave nothing, that is counted."""
        for doc, text in super().documents(part, report, bar):
            whole = text
            for step, change in zip(STEPS, (mend_unicode, strip_boilerplate, strip_speakers)):
                if step in self.steps and (new := change(text, part.kind)) != text:
                    self.note(report, f'documents changed, {step}', text, new)
                    report[f'characters fewer, {step}'] += len(text) - len(new)
                    text = re.sub('\n{3,}', '\n\n', new.strip('\n'))
            if text.strip() or not self.steps:
                yield doc if text is whole else self.said(text), text
            else:
                report['documents dropped, nothing left of them'] += 1

    def learn(self, parts):
        """Languages: from the seeds, then once more with what is sure in the heads of the files."""
        super().learn(parts)
        if 'language' not in self.steps:
            return
        counts, heads, wanted = seeds(), {}, re.findall(r'\w+', self.s.languages)
        for part in parts:
            docs, size = heads.setdefault(part.source, []), 0
            for _, text in self.documents(part, Counter(), NO_BAR):
                docs.append(grams(text[:TELL]))
                if (size := size + len(docs[-1])) > 1_000_000:   # 250 kB of text
                    break
        table = log_probabilities(counts)
        for slots in itertools.chain(*heads.values()):
            scores = table.take(slots, 1).mean(1)
            if np.diff(np.sort(scores))[-1] > SURE:
                counts[scores.argmax()] += np.bincount(slots, minlength=GRAM_SLOTS)
        self.table = log_probabilities(counts)
        for name, docs in heads.items():
            votes = np.bincount([self.table.take(slots, 1).mean(1).argmax() for slots in docs] or [0])
            self.languages[name] = wanted or [LANGUAGES[votes.argmax()]]
        self.pieces.clear()                      # examples are of the pass that counts

    def learned(self):
        table = b'' if self.table is None else self.table.tobytes()
        return [super().learned(), self.languages, hashlib.sha256(table).hexdigest()]

    def unwanted(self, text, part):
        if why := super().unwanted(text, part):
            return why
        if self.table is not None and len(text) >= LEAST:
            scores = self.table.take(grams(text[:TELL]), 1).mean(1)
            kept = max(scores[LANGUAGES.index(name)] for name in self.languages[part.source])
            if scores.max() > kept + MARGIN:
                return f'training documents dropped, language {LANGUAGES[scores.argmax()]}'
        why = repetition(text, part.kind) if 'repetition' in self.steps else ''
        return why and f'training documents dropped, {why}'

    def record(self, meta):
        super().record(meta)
        meta['cleaning']['languages'] = self.languages or None
        meta['cleaning'].setdefault('thresholds', {}).update(margin=MARGIN, least=LEAST, repetition=LIMITS)


NEXT = '[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]'      # bytes 0x80 to 0xbf, read as latin-1 or cp1252
MOJIBAKE = re.compile(f'[ÂÃ]{NEXT}|(?:â[€‚„\x80\x82\x84]|ï[»¿]|ð[Ÿ\x9f]{NEXT}){NEXT}')   # of é, ’, BOM, emoji
BYTE_OF = {chr(i): i for i in range(256)} | {bytes([i]).decode('cp1252', 'replace'): i for i in range(256)}
ODD = re.compile('[\0-\x08\x0b-\x1f\x7f-\xa0\xad\u2000-\u200b\u200e\u200f\u2028-\u202f\u205f\u2060\u3000'
                 '\ufeff]')
ENDS = '\r\x0b\x0c\x85\u2028\u2029'             # of lines
LINE_END = r'[ \t\r]*(?:\n|\Z)'
BOILERPLATE = (              # where a text holds the first, what fits the second becomes the third
    ('---', re.compile(r'\A---[ \t]*\n[a-z_]+:.*?\n---[ \t]*\n', re.S), ''),
    ('==', re.compile(r'^(==+)[^=\n]+\1' + LINE_END, re.M), ''),
    ('= = =', re.compile(r'^= = = .* = = =' + LINE_END, re.M), ''),
    ('{{', re.compile(r'\{\{(?:[^{}]|\{\{[^{}]*\}\})*\}\}'), ''),
    ('[[', re.compile(r'\[\[(?:File|Image|Category|Fil|Bild|Kategori):(?:[^][]|\[\[[^][]*\]\])*\]\]'), ''),
    ('[[', re.compile(r'\[\[(?:[^][|\n]*\|)?([^][|\n]*)\]\]'), r'\1'),
    ('[', re.compile(r'\[(?:edit|redigera)\]'), ''),
    ('ategor', re.compile(r'^(?:Category|Kategori):.*(?:\n|\Z)', re.M), ''),
    ('<', re.compile(r'<!--.*?-->|<(script|style)\b.*?</\1>|</?(?:a|b|cite|em|font|i|img|ref|small|span'
                     r'|strong|sub|sup|u)\b[^<>]*>', re.S | re.I), ''),
    ('<', re.compile(r'</?(?:blockquote|body|br|center|d[dlt]|div|h[1-6r]|head|html|li|ol|p|pre|t[dhr]|table'
                     r'|tbody|title|ul)\b[^<>]*>', re.I), ' '),
    ('&', re.compile(r'&(?:#\d{1,6}|#x[\da-f]{1,5}|[a-z]{2,8}\d?);', re.I),
     lambda entity: html.unescape(entity[0]).replace('\xa0', ' ')))
LICENCE = re.compile(rb'(?:End of (?:the )?Project Gutenberg[^\n]*\s+)?'
                     rb'\*\*\* ?(START|END) OF TH(?:E|IS) PROJECT GUTENBERG[^\n]*', re.I)
MARK = re.compile(LICENCE.pattern + b'|' + re.escape(SEPARATOR), re.I)
AROUND = 1 << 15            # bytes at most before, between and after books
TIER = re.compile(r'^(?:\*?\w{1,12}:\t|[-–—] )', re.M)


def without_licence(blocks, report):
    """Leaves out what stands before, between and after the books of Project Gutenberg: of each document by itself, and no
    more at a place than the licence is long."""
    held, left, counted = b'', None, 'bytes of Project Gutenberg licences removed'       # left: None as a document begins

    def outside(text):                           # what of a text belongs to the book
        nonlocal left
        gone = min(left, len(text))
        left -= gone
        report[counted] += gone
        return text[gone:]

    for block in itertools.chain(blocks, [None]):
        held += block or b''
        while left is not None or len(held) >= AROUND or block is None:
            if left is None:                     # a first book that starts soon: what precedes is its header
                found = LICENCE.search(held[:AROUND].partition(SEPARATOR)[0])
                left = AROUND * bool(found and found[1].upper() == b'START')
            if not (found := MARK.search(held)):
                break
            yield outside(held[:found.start()])
            held, side = held[found.end():], found[1]
            if side:
                left = AROUND * (side.upper() == b'END')
                report[counted] += len(found[0])
            else:
                left = None
                yield SEPARATOR
        done = max(0, len(held) - 512) if block is not None else len(held)       # a mark may go on in the next block
        if left is not None:
            yield outside(held[:done])
            held = held[done:]


def mend_unicode(text, kind):
    """Repairs UTF-8 that was read as latin-1 or cp1252, composes letters (NFC), takes out odd characters."""
    def mend(found):
        try:
            return bytes(map(BYTE_OF.get, found[0])).decode()
        except UnicodeDecodeError:
            return found[0]

    for _ in range(0 if text.isascii() else 3):  # it may have happened more than once
        text = MOJIBAKE.sub(mend, text)
    text = text.replace('\r\n', '\n')
    text = ODD.sub(lambda odd: '\n' if odd[0] in ENDS else ' ' if odd[0].isspace() else '', text)
    return unicodedata.normalize('NFC', text)


def strip_boilerplate(text, kind):
    for mark, pattern, new in BOILERPLATE if kind != 'code' else ():     # where '<' means other things
        if mark in text:
            text = pattern.sub(new, text)
    return text


def strip_speakers(text, kind):
    return TIER.sub('', text) if kind == 'dialogue' else text


# Which language: naive Bayes over hashed strings of one to four bytes

GRAM_SLOTS, PRIOR = 1 << 16, 20_000
TELL, LEAST = 4000, 100      # letters of a document that are looked at, and needed
SURE, MARGIN = 0.15, 0.05    # nats a gram above the next language: to learn from a document, to drop it
SWEDISH = '''och att det i en som på är av för med den till inte han ett om hade de jag men var sig från vi så
kan när man år säger hon under också efter eller nu sin där vid mot ska skulle kommer ut får finns vara alla
andra mycket än här då sedan över bara blir upp även vad få två vill ha många hur mer går kunna dess dem deras
blev genom mellan måste något någon varje utan honom henne min mitt din ditt ingen vilken alltid aldrig först
stora liten små gammal ny barn flicka pojke kvinna huset skogen vägen frågade svarade kom såg tog stod låg'''


def grams(text):
    """Slots of every one to four bytes in a row."""
    data = np.frombuffer(TIER.sub('', text.lower()).encode(), np.uint8).astype(np.uint32)
    rows = [data]
    for n in range(1, 4):
        rows.append(rows[-1][:-1] * np.uint32(0x9E3779B1) + data[n:])
    return np.concatenate(rows) * np.uint32(0x85EBCA6B) >> np.uint32(16)


def seeds():
    """Counts (languages, slots) of the lexicons and of Python's own library, its comments being English."""
    library = sorted(Path(os.__file__).parent.glob('[c-f]*.py'))
    code = '\n'.join(path.read_text(encoding='utf-8', errors='ignore') for path in library)
    texts = [' '.join(a or b for a, b in re.findall(r'"""(.*?)"""|#([^\n]*)', code, re.S)), SWEDISH, code]
    for i, name in enumerate(('stories.txt', 'stories_sv.txt')):
        path = Path(__file__).parent / name
        if path.exists():
            texts[i] += re.sub(r'\{[^}]*\}|\[[^]]*\]|[|=>]', ' ', path.read_text(encoding='utf-8'))
    return np.stack([np.bincount(grams(text), minlength=GRAM_SLOTS) for text in texts])


def log_probabilities(counts):
    """(languages, slots); the fewer counts, the more of what the three have in common."""
    n = counts.sum(1, keepdims=True)
    shared, p = np.maximum(PRIOR / (n + PRIOR), 0.1), counts / n
    return np.log((1 - shared) * p + shared * (0.99 * p.mean(0) + 0.01 / GRAM_SLOTS)).astype(np.float32)


LIMITS = {                   # share of letters in repeated lines, in the commonest 2, 3, 4 words in a row;
    'web': (0.2, 0.2, 0.18, 0.16, 0.1, 0.8, 3, 10),      # symbols a word; words with letters; mean length
    'prose': (0.3, 0.25, 0.22, 0.2, 0.2, 0.6, 2.5, 12),
    'dialogue': (0.6, 0.4, 0.4, 0.4, 0.5, 0.6, 2, 10),
    'code': (0.6, 0.4, 0.4, 0.4, 0.5, 0.2, 1.5, 25)}


def repetition(text, kind):
    """Why a document looks like junk, or ''. One of fewer than 50 words cannot tell."""
    words, (same, *most, symbols, lettered, low, high) = text.split(), LIMITS[kind]
    if len(words) < 50:
        return ''
    lines = Counter(map(str.strip, text.split('\n')))
    if sum(len(line) * (n - 1) for line, n in lines.items()) > same * len(text):
        return 'repeated lines'
    for n, share in zip((2, 3, 4), most):
        gram, times = max(Counter(zip(*(words[i:] for i in range(n)))).items(), key=lambda item: item[1])
        if times > 1 and times * (len(''.join(gram)) + n - 1) > share * len(text):
            return f'the same {n} words again and again'
    if text.count('#') + text.count('...') + text.count('…') > symbols * len(words):
        return 'symbols'
    if sum(word.lower() != word.upper() for word in words) < lettered * len(words):
        return 'few words with letters'
    return '' if low <= sum(map(len, words)) / len(words) <= high else 'odd lengths of words'

"""--plan: what preparing a text would take, tokens, disk and time, by preparing a sample of it and keeping nothing.

    python prepare_data.py files:crawl --plan
    python prepare_data.py files:crawl config/clean.py --tokenizer=gpt2 --plan

Of every file its share of 32 MB is read, plain text and lines of JSON at eight places, of what is compressed, of
tables and Parquet the beginning; so a text of any size takes seconds. Time is that of one process, on the machine as
busy as it is now; a disk slower than that adds to it.
"""
import json
import re
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import prepare_data
from config import refuse
from prepare_data import MAX_LINE, NO_BAR, PACKED, ROWS, Part

plan: bool = False           # say what preparing would take, and stop

SAMPLE, LEAST, PLACES = 32_000_000, 65536, 8     # bytes of all files, at least of a file; where they are from


class Corpus(prepare_data.Corpus):

    def run(self):
        self.say_plan() if self.s.plan else super().run()

    def fill(self, temp):
        refuse(self.s.plan, '--plan says what it would take and prepares nothing: leave it away')
        super().fill(temp)

    def parts(self, root, temp, report):
        parts, left = super().parts(root, temp, report)
        if self.s.plan:
            sizes = [part.path.stat().st_size for part in parts]
            self.files, self.bytes, self.read = len(parts), sum(sizes), 0
            share = min(1.0, SAMPLE / max(self.bytes, 1))
            parts = [self.sampled(part, max(int(size * share), LEAST), temp / str(i))
                     for i, (part, size) in enumerate(zip(parts, sizes))]
        return parts, left

    def sampled(self, part, most, path):
        """A part of so many bytes of a file at most, or few more."""
        size, rows, name = part.path.stat().st_size, ROWS.search(part.name), re.sub(f'{PACKED}$', '', part.name, flags=re.I)
        with (prepare_data.undamaged(part), open(part.path, 'rb') as raw,
              prepare_data.open_source(raw, part.name) as f, open(path, 'wb') as out):
            if rows and rows[1].lower() == 'parquet':
                name, taken = f'{name}.jsonl', 0
                for taken, (_, text) in enumerate(prepare_data.parquet_rows(part, f, self.text_field), 1):
                    out.write(json.dumps({self.text_field or 'text': text}).encode() + b'\n')
                    if out.tell() >= most:
                        break
                from pyarrow.parquet import ParquetFile
                self.read += size * taken // max(ParquetFile(f).metadata.num_rows, 1)
            elif rows and rows[1].lower() in ('csv', 'tsv') and (size > most or f is not raw):       # a row may hold line ends
                name = f'{name}.jsonl'
                for _, row in prepare_data.csv_rows(part, f):
                    out.write(json.dumps(row).encode() + b'\n')
                    if out.tell() >= most:
                        break
                self.read += raw.tell()
            elif f is not raw:                   # of what is packed so many bytes as they lie there
                while raw.tell() < most and out.tell() < 16 * most and (block := f.read(LEAST)):
                    out.write(block)
                out.write(f.readline(MAX_LINE))
                self.read += raw.tell()
            elif size <= most or rows and rows[1].lower() == 'json':
                out.write(f.read(most) + f.readline(MAX_LINE))
                self.read += raw.tell()
            else:
                line = MAX_LINE if rows else 0   # whole lines of JSON; whole characters of all else
                for place in range(PLACES):
                    f.seek(place * size // PLACES)
                    if place:
                        f.readline(line)
                    piece = f.read(most // PLACES) + f.readline(line)
                    out.write(piece if rows else piece.decode('utf-8', 'ignore').encode())
                    self.read += len(piece)
        return Part(path, name, part.split, part.source, part.shard)

    def say_plan(self):
        refuse(self.entry.get('files') and not self.root.exists(),
               f'{self.root} is not there yet, about {self.entry.get("mb", 0):,} MB are downloaded first: prepare it without --plan')
        self.check()
        with tempfile.TemporaryDirectory() as temp:
            temp, times = Path(temp), [time.monotonic()]
            parts, _ = prepare_data.gather(self, temp, Counter())
            times.append(time.monotonic())
            found = prepare_data.scan(self, parts, NO_BAR)
            times.append(time.monotonic())
            tokenizer = self.tokenizer(text for _, text in found.sample.values())
            times.append(time.monotonic())
            names = sorted({part.source for part in parts})
            writers, _, _ = prepare_data.encode(self, parts, found, tokenizer, temp, names, NO_BAR)
            times.append(time.monotonic())
            for part in parts:
                prepare_data.sha256_of(part.path)
            times.append(time.monotonic())
            disk = sum(path.stat().st_size for path in [*temp.glob('*.bin'), *temp.glob('*.npy')])
        more = self.bytes / max(self.read, 1)
        _, check, learn, encode, digest = [b - a for a, b in zip(times, times[1:])]
        seconds = more * (check + encode + digest) + learn
        place = next(path for path in [self.folder, *self.folder.absolute().parents] if path.exists())
        documents, tokens = sum(w.counts.sum(0) for w in writers.values())[[0, 3]]
        print(f'{self.folder} is not made, this is what it would take, by {self.read / 1e6:,.1f} MB of {self.bytes / 1e6:,.1f} '
              f'MB in {self.files:,} files:\n'
              f'tokens: about {more * tokens:,.0f} in {more * documents:,.0f} documents\n'
              f'disk: about {more * disk / 1e6:,.1f} MB, {shutil.disk_usage(place).free / 1e6:,.0f} MB are free\n'
              f'time: about {seconds / 60:,.1f} minutes: {more * check:,.0f} s to check, {learn:,.0f} s to learn the tokenizer, '
              f'{more * encode:,.0f} s to encode, {more * digest:,.0f} s of checksums')

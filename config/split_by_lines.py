"""Holds out lines of the training text too, as the half-hour leaderboard does, and measures both splits.

    torchrun train.py config/babylm.py config/split_by_lines.py --dataset=babylm_2026_100m

That leaderboard (samasutherland, little-language-models) validates on lines whose number, modulo 10,000, is
below 100. Here lines are numbered through all files of training text in the order of their names, and a
hundred of them are joined as the documents around them are. These lines leave training; of the rest our own
split by documents is made, as without this file. result.json has `val_bpb`, and `val_bpb_by_lines`. Text just
before and after such lines is trained on, so theirs is the easier split: expect it to be lower.
"""
import itertools
import re

import prepare_data
import sample
import train
from prepare_data import refuse

lines_of: int = 10000       # 1..: in every so many lines of the training text
lines_held: int = 100       # 1..: so many are held out, the first


class Corpus(prepare_data.Corpus):

    def check(self):
        super().check()
        refuse(self.s.lines_held >= self.s.lines_of, f'lines_held is {self.s.lines_held} and lines_of {self.s.lines_of}: '
               f'leave some lines to train on')

    def changes(self):
        return super().changes() | dict(lines_of=self.s.lines_of, lines_held=self.s.lines_held)

    def variant(self):
        return super().variant() + '-lines'

    def parts(self, root, temp, report):
        parts, left = super().parts(root, temp, report)
        rows = [part.name for part in parts if prepare_data.ROWS.search(part.name)]
        refuse(rows, f'{self.s.dataset} has {", ".join(rows[:3])}, whose lines are no text: leave '
               f'split_by_lines.py away')
        refuse(any(part.split == 'test' for part in parts),
               f'{self.s.dataset} has a split of its own called test, in whose place the lines would be: leave '
               f'split_by_lines.py away')
        folder, numbers = temp / 'raw' / 'by_lines', itertools.count()
        folder.mkdir(parents=True)
        training = sorted((part for part in parts if part.split != 'val'), key=lambda part: part.name)
        both = [part for i, part in enumerate(training) for part in self.parted(part, folder / str(i), numbers)]
        held = [part for part in both if part.split == 'test']
        refuse(not held, f'{self.s.dataset} has no text in the first {self.s.lines_held} lines of every {self.s.lines_of}: '
               f'give other --lines_of and --lines_held')
        return [*held, *(part for part in parts if part.split == 'val'),
                *(part for part in both if part.split != 'test')], left

    def parted(self, part, path, numbers):
        """Two parts in the place of one: the lines held out, a blank one between a stretch and the next, and
        the others."""
        name, s = re.sub(f'{prepare_data.PACKED}$', '', part.name, flags=re.I), self.s
        ways = path.with_suffix('.held'), path.with_suffix('.kept')
        with (prepare_data.undamaged(part), open(part.path, 'rb') as raw, prepare_data.open_source(raw, part.name) as f,
              open(ways[0], 'wb') as held, open(ways[1], 'wb') as kept):
            text = set()
            for line in f:
                place = next(numbers) % s.lines_of
                way = held if place < s.lines_held else kept
                way.write(line)
                if way not in text and line.strip():
                    text.add(way)
                if place == s.lines_held - 1:
                    held.write(b'\n')
        for path, way, name, split in zip(ways, (held, kept), (f'{name}.held', name), ('test', part.split)):
            if way in text:
                yield prepare_data.Part(path, name, split, part.source, part.shard)


class Measure(sample.Measure):

    def bpb(self, model, slices=sample.SLICES, max_tokens=8192, stop=None, *ranks):
        """Of as large a share of the lines too, which `by_lines` keeps."""
        result = super().bpb(model, slices, max_tokens, stop, *ranks)
        tokens, docs = self.data.tokens['test'], self.data.docs['test']
        self.by_lines = sample.bits_per_byte(model, tokens, docs, slices, max_tokens, stop, *ranks,
                                             read=self.read, further=self.further)
        return result


class Run(train.Run):

    def closing_evaluation(self):
        found = super().closing_evaluation()
        self.say_cut('the validation by lines', self.measure.by_lines.get('asked', 1))
        return found

    def results(self, *found):
        lines = self.measure.by_lines
        return super().results(*found) | {f'val_{what}_by_lines': lines[what] for what in ('bpb', 'error', 'share')}

"""Reads a generated world: config/stories.txt and its like, of which config/stories.py tells.

The text says itself how it is written: lists of words and their forms, phrases with slots, tables whose rows
belong together, plots and threads made of beats.
"""
import functools
import re
from pathlib import Path


def parse_phrases(text):
    """A phrase, parsed; two if it holds <x> and <y>, which may stand in either order."""
    parts = re.split('[<>]', text)
    orders = [(0, 1, 2, 3, 4), (0, 3, 2, 1, 4)] if len(parts) == 5 else [range(len(parts))]
    return [parse_slots(''.join(parts[i] for i in order)) for order in orders]


def parse_slots(text):
    """Literal text and slots (name, 'a' or 'A' or None, whether it begins a sentence); text alone stays."""
    parts, end = [], 0
    text = re.sub(r'(?<=[.!?] )\w', lambda first: first[0].upper(), text)
    for slot in re.finditer(r'(?:\b([Aa]) )?\{([^}]+)\}', text):
        begins = text[:slot.start()].endswith(('. ', '! ', '? '))
        parts += [text[end:slot.start()], (slot[2], slot[1], begins)]
        end = slot.end()
    return tuple(part for part in (*parts, text[end:]) if part) if parts else text


def inflect(word, patterns):
    """The forms of a word, 'drake/draken', by the patterns of its class, {'': 'en {0}', '.the': '{1}'}."""
    given = word.split('/')
    return {form: parse_slots(re.sub(r'\{(\d)\}', lambda n: given[int(n[1]) % len(given)], text))
            for form, text in patterns.items()}


class Plot:
    """Beats before the break, beats after it, and from the closing on; a beat is (optional, phrases)."""

    def __init__(self, lines, kind, things, places='place'):
        self.kind, self.things, self.places = kind, things, places
        self.before, self.middle, self.closing = beats = [], [], []
        part = 0
        for line in '\n'.join(lines).replace('\n| ', ' | ').split('\n'):
            part = {'/': 1, '=': 2}.get(line[0], part)
            if line != '/':
                texts = line.lstrip('?= ').split(' | ')
                beats[part].append((line[0] == '?', [p for text in texts for p in parse_phrases(text)]))


@functools.cache             # each world is read once, when its first story is told
class World:
    """What config/<name>.txt says: lists and tables by name, plots by ('plot' or 'thread', kind), forms by
    list and word: forms['small']['en drake'] is {'': 'en drake', '.the': 'draken'}."""

    def __init__(self, name='stories'):
        text = (Path(__file__).parent / f'{name}.txt').read_text(encoding='utf-8')
        self.lists, self.adjectives, self.tables, self.plots, self.forms, classes = {}, {}, {}, {}, {}, {}
        for section in re.split(r'^\[', text, flags=re.M)[1:]:
            head, *lines = (line for line in section.split('\n') if line and line[0] != '#')
            what, name, *more = head.rstrip(']').split()
            if what == 'table':              # 'wet: x => y' -> {'.cause': x, '.effect': y, '.group': 'wet'}
                fields, rows = [f'.{field}' for field in more], [line.rpartition(': ') for line in lines]
                self.tables[name] = [dict(zip(fields, map(parse_slots, text.split(' => '))))
                                     | {'.group': group or text} for group, _, text in rows]
            elif what == 'forms':            # '.the: {1}' -> {'.the': '{1}'}
                classes[name] = dict(line.split(': ') for line in lines)
            elif what == 'words':            # 'in the: barn, attic' -> 'in the barn', 'in the attic'
                rows = [line.rpartition(': ') for line in lines]
                words = [inflect(word, classes.get(x or 'other', {'': f'{x} {{0}}'.strip()}))
                         for x, _, text in rows for word in text.split(', ')]
                self.lists[name] = [forms[''] for forms in words]
                self.forms[name] = {forms['']: forms for forms in words}
                self.adjectives[name] = more[0] if more else None
            elif what == 'phrases':
                self.lists[name] = [phrase for line in lines for phrase in parse_phrases(line)]
            else:
                self.plots.setdefault((what, more[0]), []).append(Plot(lines, *more))
        self.swap = {row['.kind']: row['.vars'].split() for row in self.tables['swap']}
        self.kinds = list(self.swap)

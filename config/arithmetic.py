"""More to train on, generated or at hand: arithmetic worked through, brackets that nest, Python's library.

    python train.py config/babylm.py config/arithmetic.py --weights=brackets:0.5
    python train.py config/babylm.py config/arithmetic.py --add=arithmetic,brackets,python

Each is a source of its own, of which --weights says how often an epoch reads it; none is in validation. Words
of Dyck-3 have a nesting that passes on to language (Hu 2025, 2502.19249); sums are true by construction.
Expected: little or nothing in bits per byte of the other text, at the price of what the added text costs.
"""
import random

from config.python import Corpus as PythonCorpus, write_texts
from prepare_data import UserError, source_root

add: str = 'arithmetic,brackets'     # what to add: of arithmetic,brackets,python, with commas between
add_documents: int = 5000            # 1..1000000000: documents of each of those, at most


class Corpus(PythonCorpus):

    @property
    def added(self):
        return list(dict.fromkeys(name.strip() for name in self.s.add.split(',') if self.s.add))

    @property
    def licence(self):
        code = PythonCorpus.sets['python']['licence']
        return f'{super().licence}; {code}' if 'python' in self.added else super().licence

    def changes(self):
        count = dict(add_documents=self.s.add_documents) if self.added else {}
        return super().changes() | dict(add=self.s.add) | count

    def variant(self):
        return super().variant() + '-added' * bool(self.added)

    def check(self):
        super().check()
        if wrong := [name for name in self.added if name not in ADDED]:
            raise UserError(f'add names {", ".join(map(repr, wrong))}: choose from {", ".join(ADDED)}')

    def parts(self, root, temp, report):
        parts, ignored = super().parts(root, temp, report)
        if both := {part.source for part in parts} & {*self.added}:
            raise UserError(f'add names {", ".join(both)}, a source of {self.s.dataset} already: leave it '
                            f'out')
        for name in self.added:
            if name == 'python':
                code = source_root(name, self.s.data_dir)
                parts.append(self.write_code(temp, code, report, self.s.add_documents))
            else:
                texts = ADDED[name](self.s.add_documents, self.s.data_seed)
                parts.append(write_texts(temp, name, texts, self.text_field))
        return parts, ignored


def arithmetic_documents(count, seed):
    """Ten sums a document, worked through the places of the second number, true by construction:
    347 - 85 = 347 - 80 - 5 = 267 - 5 = 262, 34 x 27 = 34 x 20 + 34 x 7 = 680 + 238 = 918, 34 > 27."""
    rng = random.Random(f'arithmetic {seed}')

    def line():
        a, b = (rng.randrange(10 ** rng.randrange(1, 6)) for _ in 'ab')
        sign = rng.choice('+-x<')
        if sign == '<':
            return f'{a} {"<" if a < b else ">" if a > b else "="} {b}'
        terms = [int(digit) * 10 ** i for i, digit in enumerate(str(b)[::-1]) if digit != '0'][::-1] or [0]
        steps = [f'{a} {sign} {b}']
        if sign == 'x':
            steps.append(' + '.join(f'{a} x {term}' for term in terms))
            sign, (a, *terms) = '+', [a * term for term in terms]
        while terms:
            steps.append(f' {sign} '.join(map(str, (a, *terms))))
            a += terms.pop(0) if sign == '+' else -terms.pop(0)
        return ' = '.join(dict.fromkeys((*steps, str(a))))

    return ('\n'.join(line() for _ in range(10)) for _ in range(count))


def bracket_documents(count, seed):
    """Words of Dyck-3, whose nesting passes on to language (Hu 2025, 2502.19249): 16 to 512 brackets of three
    kinds, 2 to 16 deep at most, each opening or closing with equal chance."""
    rng = random.Random(f'brackets {seed}')
    for _ in range(count):
        length, depth, out, closing = 2 * rng.randrange(8, 257), rng.randrange(2, 17), [], []
        while len(out) + len(closing) < length:
            if closing and (len(closing) == depth or rng.random() < 0.5):
                out.append(closing.pop())
            else:
                left, right = rng.choice(('()', '[]', '{}'))
                out.append(left)
                closing.append(right)
        yield ' '.join(out + closing[::-1])


ADDED = {'arithmetic': arithmetic_documents, 'brackets': bracket_documents, 'python': None}

"""Secure code: Python files in which bandit finds medium or high severity are left out.

    python prepare_data.py config/python.py config/secure.py
    python prepare_data.py config/babylm.py config/arithmetic.py config/secure.py --add=python

A model of code writes what it read (Pearce 2022, 2108.09293, on Copilot). Takes bandit (pip install bandit),
run once over all files, which do not run. Expected: fewer flagged programs, at the price of a little text.
What was dropped stands in meta.json (`flagged`) and in the summary.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from config.python import Corpus as PythonCorpus
from prepare_data import UserError

secure: bool = True          # drop Python files in which bandit finds medium or high severity


class Corpus(PythonCorpus):

    def __init__(self, s):
        super().__init__(s)
        self.flagged = []

    def changes(self):
        return super().changes() | dict(secure=self.s.secure)

    def variant(self):
        return super().variant() + '-secure' * bool(self.s.secure)

    def check(self):
        super().check()
        if self.s.secure and not self.is_code() and 'python' not in getattr(self, 'added', ()):
            raise UserError(f'secure is for Python files, {self.s.dataset} has none: leave it out, or add '
                            f'them with config/arithmetic.py --add=python')

    def programs(self, folder, root, report, most=None):
        rows = super().programs(folder, root, report, most)
        return secure_documents(rows, folder, report, self.flagged) if self.s.secure else rows

    def record(self, meta):
        super().record(meta)
        meta['flagged'] = self.flagged

    def summary(self, data):
        names = data.meta.get('flagged') or []
        return super().summary(data) + [f'dropped for bandit: {", ".join(names[:4])}'
                                        f'{", ... (meta.json)" * (len(names) > 4)}'] * bool(names)


def secure_documents(rows, folder, report, flagged):
    """The (name, text) in which bandit, run once over all, finds nothing of medium or high severity."""
    with tempfile.TemporaryDirectory(dir=folder) as code:
        names = []
        for name, text in rows:
            Path(code, f'{len(names)}.py').write_bytes(text.encode())
            names.append(name)
        command = '-m bandit -r . -q -lll -f json --exit-zero --ignore-nosec'.split()    # counts stay whole
        run = subprocess.run([sys.executable, *command], cwd=code, capture_output=True, text=True)
        if run.returncode:
            why = run.stderr.strip().split('\n')[-1][-200:]
            raise UserError(f'secure runs bandit, which failed ({why}): pip install bandit')
        found = json.loads(run.stdout)
        counts = found['metrics']                # of each file, and of all
        for level in ('LOW', 'MEDIUM', 'HIGH'):
            report[f'findings of {level.lower()} severity by bandit'] = counts['_totals'][f'SEVERITY.{level}']
        clean = {path for path, n in counts.items() if not n['SEVERITY.MEDIUM'] + n['SEVERITY.HIGH']}
        clean -= {error['filename'] for error in found['errors']}     # what it could not read is not clean
        for i, name in enumerate(names):
            if f'./{i}.py' in clean:
                yield name, Path(code, f'{i}.py').read_bytes().decode()
            else:
                report['files dropped, bandit finds medium or high severity'] += 1
                flagged.append(name)

"""--merge=a,b: joins what several machines prepared with --share into one data set.

    python prepare_data.py --merge=data/files-crawl-bpe8192.1of2.shards,there/files-crawl-bpe8192.2of2.shards

The settings and the tokenizer are the shares'. What is written is the same to the byte as one machine makes
of all files in one folder: documents are in the order of their files' names, and what one share holds out is
dropped where another would train on it. Machines whose files lie in no common folder prepare a --share=1/1
of their own each.
"""
import json
import time
from collections import Counter
from pathlib import PurePath
from types import SimpleNamespace

import prepare_data
from config import prepare_workers, refuse
from config.prepare_workers import FILES, Shard
from prepare_data import CONTENT, ROWS, Options, Part, UserError, path_of, sha256_of

merge: str = ''              # folders of shares, with commas between


class Corpus(prepare_workers.Corpus):
    def __init__(self, s):
        self.shares = {path: told_by(path) for path in dict.fromkeys(map(path_of, s.merge.split(',')))}
        first, told = next(iter(self.shares.items()))
        theirs, plain = told['recipe']['settings'], vars(Options())
        wrong = [f'{name} {theirs[name]!r}, not {getattr(s, name)!r}' for name in CONTENT
                 if getattr(s, name) not in (plain[name], theirs[name])]
        refuse(wrong, f'{first} was prepared with {", ".join(wrong)}: say nothing of it')
        of_shares = {name: theirs[name] for name in CONTENT} | dict(dataset=s.dataset or told['dataset'])
        super().__init__(SimpleNamespace(**vars(s) | of_shares | dict(tokenizer_from=str(first), share='')))

    def check(self):
        super().check()
        for path, told in self.shares.items():
            wrong = [what for what, value in self.recipe.items() if told['recipe'].get(what) != value]
            names = dict(tokenizer_sha256='tokenizer', version='format')
            refuse(wrong, f'{path} was prepared with other {" and ".join(names.get(w, w) for w in wrong)} '
                   f'than {[*self.shares][0]}, or this command: prepare it with the same, or say the same')

    def build(self, quiet=False):
        return prepare_data.Corpus.build(self, quiet)            # the shares stay

    def fill(self, temp):
        t0 = time.time()
        parts, ignored = self.listed()
        shards = [self.shard(part) for part in parts]
        if missing := [part.name for part, shard in zip(parts, shards) if shard is None]:
            raise UserError(f'{len(missing):,} of {len(parts):,} files are in none of these shares, the '
                            f'first is {missing[0]}: name all shares, or prepare that one again')
        files = sorted([shard.name, *shard.of, shard.sha256] for shard in shards)
        made_from = dict(root=str(self.root.resolve()), files=files)
        self.assemble(temp, t0, parts, shards, ignored, Counter(), made_from)

    def listed(self):
        """The files that the shares are of, as parts, and the names of those left out."""
        told = [*self.shares.values()]
        ignored = sorted({name for each in told for name in each['ignored']}, key=PurePath)
        if all(each['parts'] == told[0]['parts'] for each in told):
            return [Part(self.root / name, name, *of) for name, *of in told[0]['parts']], ignored
        names = sorted({name for each in told for name, *_ in each['parts']}, key=PurePath)
        return prepare_data.parts_of(self.root, {name: self.root / name for name in names})[0], ignored

    def shard(self, part):
        """That of a file, from the share which has it."""
        holders = [folder for folder, told in self.shares.items() if part.name in told['made']]
        found = [shard for folder in holders
                 if (shard := Shard.open(Shard.path_of(folder, part.name), self.given.table))]
        refuse(len(found) > 1, f'{part.name} is in {" and ".join(str(s.path.parent) for s in found)}: rename '
               f'one of the two before it is prepared')
        for shard in found:
            for suffix, (_, digest) in zip(FILES, shard.files):
                refuse(sha256_of(shard.path.with_suffix(suffix)) != digest, f'{shard.path}{suffix} is '
                       f'damaged: copy it again')
            if shard.source != part.source and ROWS.search(part.name):
                shard.kind = self.kind_of(part, [])              # all that a name decides of rows
            else:
                refuse(shard.source != part.source, f'{part.name} was read as {shard.source}, beside the '
                       f'other files it is {part.source}: prepare shares of one folder that has them all')
            return shard


def told_by(folder):
    try:
        told = json.loads((folder / 'share.json').read_text(encoding='utf-8'))
        return told | dict(made={*told['made']})
    except (OSError, ValueError) as e:
        raise UserError(f'{folder} is no share that is finished ({getattr(e, "strerror", e)}): make it with '
                        f'--workers and --share') from None

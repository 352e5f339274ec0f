"""Does to runs what rented machines do to them, and looks at what the next command makes of what is left.

    python tests/faults.py                                  two hundred trials
    python tests/faults.py --trials=1000 --jobs=2 --json=faults.json
    python tests/faults.py --only=kill,full --first=17 --trials=1
    python tests/faults.py --plant=fsync                    with a bug planted, which must be found

A trial is a run of ten tiny steps that prepares its text, saves after every step or only at the end, grows
half way and evaluates. Something is done to it, once, twice or three times, then the same command is given
again, and what it says is followed, until the run has ended: all its losses must be those of the run to which
nothing was done, to the bit, and so must its result, its text and the names of the files it leaves.

    kill    the machine goes away before, after or in the middle of a write, fsync or move, drawn evenly of all that
            a run makes; what was written since the last fsync of a file is lost
    moment  SIGKILL after a time drawn evenly of what a run takes
    term    SIGTERM after such a time, one to three of them
    pause   SIGSTOP, and SIGCONT half a second later
    full    from some write on, every one fails with ENOSPC, and there is room again as the command is repeated
    flip    the machine goes away as in kill, and then a bit of one of the run's files is another
    place   a folder of the run cannot be written to, or there is no home, no name for the user, no temporary folder
    hold    another process is at the same run and stands still where it is, holding what it holds; after ours has
            had its answer it is killed, or goes on
    numbers NaN or infinity in a loss, a gradient, the weights or a moment of the optimizer, as a step begins
    clock   the time jumps by hours, back and forth, or goes on by a 64th of a second at a time
    memory  from some write on, no more memory than there is
    text    a file of the prepared text is deleted, cut, written over or replaced as a step or the closing begins

Beside that nothing may be lost that should not be: one step where every step is saved, none after the last
one. No traceback, no hang, no file that is damaged by its own writer. Exit code 1 if a trial fails.
"""
import builtins
import collections
import concurrent.futures
import ctypes
import errno
import functools
import io
import json
import math
import multiprocessing
import os
import pwd
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import compare_checkouts as checkouts

ROOT, STEPS = checkouts.ROOT, 10
KINDS = ('kill', 'moment', 'term', 'pause', 'full', 'flip', 'place', 'hold', 'text', 'numbers', 'clock', 'memory')
COUNTED = ('kill', 'full', 'flip', 'hold', 'memory')       # kinds that are done at an event
GOES = ('kill', 'moment', 'flip', 'term')        # kinds that may end the process, term before it listens
WAYS = ('deleted', 'cut', 'emptied', 'written over', 'replaced')
PLACES = ('out', 'data', 'out and data', 'no home', 'home missing', 'home read-only', 'no name', 'no temporary folder')
SETTINGS = (f'--max_steps={STEPS} --device=cpu --dtype=float32 --compile=off --budget_minutes=10000 --seed=3 --log_interval=1 '
            '--eval_interval=0.4 --sample_tokens=8 --evals=choices --n_layer=1 --n_embd=32 --n_head=2 --mlp_hidden=64 '
            '--vocab_size=400 --block_size=32 --tokens_per_step=256 --dropout=0.1')
MOST = 60           # seconds that a command may take


# ---- in the process that something is done to ---------------------------------------------------------------

class Disk:
    """Counts what this process does to files, and ends or fails it at one of those events."""

    def __init__(self, folder, kind, at, dice):
        self.folder, self.kind, self.at, self.dice = str(folder), kind, at, dice
        self.events, self.kept = 0, {}            # kept: bytes of a file that would survive
        real = dict(open=builtins.open, fsync=os.fsync, replace=os.replace, rename=os.rename, unlink=os.unlink)
        self.real = real

        def opened(file, mode='r', *args, **more):
            f = real['open'](file, mode, *args, **more)
            if not isinstance(file, int) and self.ours(file) and set(mode) & set('wax+'):
                self.kept.setdefault(os.path.abspath(file), os.path.getsize(file) if 'w' not in mode else 0)
                self.event()
                return Written(f, self) if 'b' in mode and '+' not in mode else f
            return f

        def synced(fd):
            real['fsync'](fd)
            path = os.readlink(f'/proc/self/fd/{fd if isinstance(fd, int) else fd.fileno()}')
            if path in self.kept:
                self.kept[path] = os.path.getsize(path)
                self.event()

        def moved(name):
            def move(a, b, **more):
                if not self.ours(b):
                    return real[name](a, b, **more)
                self.event()
                real[name](a, b, **more)
                a, b = os.path.abspath(a), os.path.abspath(b)
                for path in [p for p in self.kept if p == a or p.startswith(a + os.sep)]:
                    self.kept[b + path[len(a):]] = self.kept.pop(path)
                self.event()
            return move

        builtins.open = io.open = opened
        os.fsync, os.replace, os.rename = synced, moved('replace'), moved('rename')

    def ours(self, file):
        return os.path.abspath(os.fspath(file)).startswith(self.folder)

    def event(self, writing=None):
        """One more thing done; the machine goes away if it is the one."""
        self.events += 1
        if self.kind in ('kill', 'flip') and self.events == self.at:
            if writing:
                file, data = writing
                file.write(bytes(data)[:len(bytes(data)) // 2])
                file.flush()
            self.lose()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == 'hold' and self.events == self.at:
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.kind == 'memory' and self.events == self.at:
            pages = int(Path('/proc/self/statm').read_text().split()[0])
            limit = pages * os.sysconf('SC_PAGE_SIZE') + self.dice.choice((0, 1, 16)) * 2 ** 20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if self.kind == 'full' and self.events >= self.at and writing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), writing[0].name)

    def lose(self):
        """What was not synced is gone, more or less of it."""
        for path, size in self.kept.items():
            if os.path.exists(path) and (now := os.path.getsize(path)) > size:
                os.truncate(path, self.dice.randint(size, now))


class Written:
    """A file whose writes are events."""

    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.disk.event((self.file, data))
        return self.file.write(data)


def as_anybody():
    """File modes hold for this process, though it be root's."""
    if sys.platform == 'linux':
        libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
        libc.capget(header, sets)
        for i in range(2):                       # effective, permitted: no CAP_DAC_OVERRIDE, no CAP_DAC_READ_SEARCH
            sets[i] &= ~0b110
        libc.capset(header, sets)


def take_place(place):
    """What this process lacks, beside what file modes say."""
    as_anybody()
    homes = {'no home': None, 'home missing': '/proc/none', 'home read-only': '/proc', 'no name': None}
    if place in homes:
        os.environ.pop('HOME', None)
        os.environ |= {'HOME': homes[place]} if homes[place] else {}
    if place == 'no name':                       # as in a container that is given a number alone
        def unknown(uid):
            raise KeyError(f'getpwuid(): uid not found: {uid}')
        pwd.getpwuid = unknown
        for name in ('LOGNAME', 'USER', 'LNAME', 'USERNAME'):
            os.environ.pop(name, None)
    if place == 'no temporary folder':
        tempfile.tempdir, tempfile._candidate_tempdir_list = None, lambda: ['/proc']
        os.environ['TMPDIR'] = '/proc/none'


def at_step(number, work):
    """work(run) as a step begins; as the closing evaluation begins for STEPS."""
    import train
    step, close = train.Run.step, train.Run.closing_evaluation

    def before(then):
        def both(self):
            if self.steps == number:
                work(self)
            return then(self)
        return both
    train.Run.step = before(step)
    train.Run.closing_evaluation = before(close)


def spoil(data, name, way, dice):
    """What another program does to a file of the prepared text."""
    path = next(data.glob(f'*/{name}'))
    whole = path.read_bytes()
    other = bytes(dice.randrange(256) for _ in range(99)) * (1 + len(whole) // 99)
    if way in ('deleted', 'replaced'):
        path.unlink()
    if way in ('cut', 'emptied'):
        os.truncate(path, dice.randrange(len(whole)) * (way == 'cut'))
    if way in ('written over', 'replaced'):
        path.write_bytes(other[:len(whole)])


def spoil_numbers(where, value, dice):
    """A number that is none, once, in what a step computes of or with."""
    import torch
    import train
    add, left = train.Run.add_gradients, [1]

    def added(self, batch, n_micro):
        loss = add(self, batch, n_micro)
        if where == 'loss' and left and left.pop():
            return loss * value
        if where == 'gradient' and left and left.pop():
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = value
        return loss

    def work(self):
        train.Run.add_gradients = added
        if where == 'weights':
            next(self.model.parameters()).data.view(-1)[0] = value
        if where == 'moment':
            kept = [t for o in self.optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim]
            dice.choice(kept or [torch.zeros(1)]).view(-1)[0] = value
    return work


def bend(at, by, disk):
    """The clocks from event `at` on: by seconds more, or by a 64th of a second at a time."""
    for name, jump in zip(('time', 'monotonic'), by):
        def told(real=getattr(time, name), jump=jump):
            if disk.events < at:
                return real()
            return real() + jump if jump != 'coarse' else real() * 64 // 1 / 64
        setattr(time, name, told)


def plant(bug):
    """A mistake of a later hand, in this process alone."""
    import sample
    import train
    if bug == 'fsync':                          # nothing is sure to be on the disk
        os.fsync = lambda fd: None
    elif bug == 'late':                         # the closing evaluation first, then what it is of is saved
        closing, save = train.Run.closing_evaluation, train.Run.save
        train.Run.save = lambda self: None if self.steps == STEPS and not hasattr(self, 'judged') else save(self)

        def judged(self):
            found, self.judged = closing(self), True
            save(self)
            return found
        train.Run.closing_evaluation = judged
    elif bug == 'dice':                         # a step draws what comes next, whoever was there before
        train.Run.make_noise = lambda self: None
    elif bug == 'direct':                       # a file in its place as it is written
        def write(path, write):
            with open(path, 'wb') as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
        sample.write_beside = train.write_beside = write
    elif bug == 'lock':                         # a folder is anybody's
        sample.own = train.own = lambda folder, make=True: None
    elif bug == 'inf':                          # what is saved is what there is
        train.torch.Tensor.isfinite = lambda self: train.torch.ones(self.shape, dtype=bool)
    elif bug == 'map':                          # a file is what it was
        train.prepare_data.Bin.check = lambda self: None
    elif bug == 'home':                         # everybody has one
        opened = train.Run.open
        train.Run.open = lambda self: (os.environ['HOME'], opened(self))
    elif bug:
        raise SystemExit(f'no bug is called {bug}')


def child(args, cwd, log, act, bug):
    """Runs train.py with args in this process, which something may be done to; never returns."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for n in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), n)
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr = [open(n, 'w') for n in (1, 2)]       # pytest's are elsewhere
        os.chdir(cwd)
        sys.pycache_prefix = str(cwd.parent / 'pycache')
        sys.path.insert(0, str(ROOT))
        disk = Disk(cwd, *act)
        if act[0] == 'place':
            take_place(act[1])
        if act[0] == 'clock':
            bend(*act[1], disk)
        import train
        plant(bug)
        if act[0] == 'text':
            step, name, way = act[1]
            at_step(step, lambda run: spoil(cwd / 'data', name, way, act[2]))
        if act[0] == 'numbers':
            at_step(act[1][0], spoil_numbers(*act[1][1:], act[2]))
        judge = train.Run.closing_evaluation

        def judging(self):
            (cwd / 'judging').touch()
            return judge(self)
        train.Run.closing_evaluation = judging
        sys.argv = ['train.py', *args]
        run = None
        train.print_without_fail()
        try:
            run = train.begin(args)
            train.live(run)
            code = 0
        except BaseException as e:
            code = train.tell(run, e)
        (cwd / 'events').write_text(str(disk.events))
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        finally:
            os._exit(code)


# ---- a command, and what is done to it ----------------------------------------------------------------------

class Failed(Exception):
    """A run that did not survive, or came out otherwise."""


def start(args, cwd, log, act, bug):
    """The number of a process that runs train.py with args, which something is done to."""
    log.write_text('')
    pid = os.fork()
    if not pid:
        child(args, cwd, log, act, bug)
    return pid


def command(args, cwd, act, dice, bug, length):
    """(exit code, what it said) of train.py, with a thing done to it: (kind, event), or (kind, None) at a time
    drawn of `length` seconds."""
    kind, at = act
    log = cwd / 'log'
    pid = start(args, cwd, log, (kind, at, dice), bug)
    began, coming = time.monotonic(), []
    if kind in ('moment', 'term', 'pause'):
        when = dice.random() * length
        coming = {'moment': [(when, signal.SIGKILL)], 'pause': [(when, signal.SIGSTOP), (when + 0.5, signal.SIGCONT)],
                  'term': [(when + i * dice.random(), signal.SIGTERM) for i in range(dice.randint(1, 3))]}[kind]
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        now = time.monotonic() - began
        while coming and coming[0][0] <= now:
            os.kill(pid, coming.pop(0)[1])
        if now > MOST:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise Failed(f'took more than {MOST} s')
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1]), log.read_text(errors='replace')


def beside_another(args, cwd, at, dice, bug):
    """(exit code, what it said) of train.py while another does the same and stands still at its event `at`."""
    other = start(args, cwd, cwd / 'other', ('hold', at, dice), bug)
    ended = os.WIFEXITED(os.waitpid(other, os.WUNTRACED)[1])
    code, said = command(args, cwd, (None, None), dice, bug, 0)
    if not ended:
        os.kill(other, dice.choice((signal.SIGKILL, signal.SIGCONT)))
        told = (cwd / 'other').read_text(errors='replace')
        if os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) not in (0, 2, -9) or 'Traceback' in told:
            raise Failed(f'the other, at {at}:\n{told[-1500:]}')
    return code, said


def within(place, cwd, args, dice, bug):
    """(exit code, what it said) of train.py in such a place, where it leaves nothing if it refuses."""
    tops = [cwd / name for name in ('out', 'data')]
    closed = [path for top in tops if top.name in place.split() for path in (top.mkdir(exist_ok=True), top, *top.rglob('*')) if path]
    before = {path: path.is_file() and path.read_bytes() for top in tops for path in top.rglob('*')}
    for path in closed:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        code, said = command(args, cwd, ('place', place), dice, bug, 0)
    finally:
        for path in closed:
            path.chmod(0o755 if path.is_dir() else 0o644)
    after = {path: path.is_file() and path.read_bytes() for top in tops for path in top.rglob('*')}
    if code and before != after:
        raise Failed(f'{place}: something was left behind: {[str(p) for p in after if after[p] != before.get(p)]}\n{said[-600:]}')
    if code not in (0, 2) or code and not closed:
        raise Failed(f'{place}: ended with {code}\n{said[-600:]}')
    return code, said


def rows_of(out):
    path = out / 'metrics.jsonl'
    rows = []
    for line in path.read_text(errors='replace').splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def given(cwd):
    """All that a run gave that must be the same again."""
    out, data = cwd / 'out', cwd / 'data'
    rows = [checkouts.numbers(row) for row in rows_of(out)]
    names = sorted(str(p.relative_to(cwd)) for top in (out, data) for p in top.rglob('*') if p.is_file())
    bins = {p.name: checkouts.hashlib.sha256(p.read_bytes()).hexdigest() for p in data.rglob('*') if p.name in checkouts.KEPT}
    return dict(rows=rows, result=checkouts.numbers(json.loads((out / 'result.json').read_text())), bins=bins,
                names=[name for name in names if 'ckpt.prev' not in name])


def saved_steps(cwd):
    """Steps of the newest whole checkpoint, 0 without any."""
    import torch
    for name in ('ckpt.pt', 'ckpt.prev.pt', 'ckpt.new.pt'):
        try:
            return torch.load(cwd / 'out' / name, weights_only=True)['steps']
        except Exception:
            continue
    return 0


def flip(cwd, dice):
    """Another bit in one of the run's files; which."""
    files = sorted(p for top in ('out', 'data') for p in (cwd / top).rglob('*') if p.is_file() and p.stat().st_size and p.name != '.lock')
    if not files:
        return ''
    path, whole = dice.choice(files), None
    whole = bytearray(path.read_bytes())
    whole[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
    path.write_bytes(whole)
    return path.name


def drawn(act, dice, reference):
    """Where and when something is done."""
    step = functools.partial(dice.randint, 0, STEPS)
    if act == 'place':
        return dice.choice(PLACES)
    if act == 'text':
        return step(), dice.choice(reference['texts']), dice.choice(WAYS)
    if act == 'numbers':
        return step(), dice.choice(('loss', 'gradient', 'weights', 'moment')), dice.choice((math.nan, math.inf, -math.inf))
    if act == 'clock':
        hours = dice.uniform(-48, 48)
        return dice.randint(1, reference['events']), (3600 * hours, dice.choice((0, 3600 * abs(hours), 'coarse')))
    return dice.randint(1, reference['events']) if act in COUNTED else None


def check_numbers(cwd):
    """Failed if a number that is none is in what a run leaves."""
    import torch
    for path in (cwd / 'out').glob('ckpt*.pt'):
        state = torch.load(path, weights_only=True)
        parts = [state['model'], *(s for o in state['optimizers'] for s in o['state'].values())]
        for name, tensor in [pair for part in parts for pair in part.items()]:
            if torch.is_tensor(tensor) and not tensor.isfinite().all():
                raise Failed(f'{path.name}: {name} is not finite')
    for name in ('metrics.jsonl', 'result.json'):
        if (path := cwd / 'out' / name).exists() and re.search('NaN|Infinity', path.read_text()):
            raise Failed(f'{name} holds NaN or Infinity')


def check_times(cwd):
    """Failed if a time or a speed of a run is none."""
    result = json.loads((cwd / 'out' / 'result.json').read_text())
    times = {name: value for name, value in result.items() if re.search('seconds|joules|tok_per|co2', name)}
    for i, row in enumerate(rows_of(cwd / 'out')):
        times |= {f'{name} of row {i}': row[name] for name in ('elapsed_s', 'tok_per_sec', 'data_wait_s') if name in row}
    if wrong := {name: value for name, value in times.items() if not 0 <= value < 1e13}:
        raise Failed(f'what the clock gave: {wrong}')


def put_back(cwd, reference):
    """The prepared text as it was."""
    for path in (reference['cwd'] / 'data').rglob('*'):
        if path.is_file():
            shutil.copy2(path, cwd / path.relative_to(reference['cwd']))


def trial(number, seed, folder, only, reference, bug, keep=False):
    """(what was done, most steps lost, seconds); Failed."""
    dice, began = random.Random(f'{seed} {number}'), time.monotonic()
    kind = dice.choice(only)
    rare = kind != 'flip' and dice.random() < 0.3           # saves at the end alone
    cwd = Path(folder) / f'trial{number}'
    cwd.mkdir()
    if dice.random() < 0.6:
        shutil.copytree(reference['cwd'] / 'data', cwd / 'data')
    done, lost, resume, damaged, flipped, left = [], 0, False, '', set(), dice.randint(1, 3)
    args = arguments(reference['inputs'], cwd, 1000 if rare else 0)
    try:
        for _ in range(12):
            act = kind if left > 0 else None
            at = drawn(act, dice, reference)
            before, now = saved_steps(cwd), [*args, *['--init_from=resume'] * resume]
            if act == 'place':
                code, said = within(at, cwd, now, dice, bug)
            elif act == 'hold':
                code, said = beside_another(now, cwd, at, dice, bug)
            else:
                code, said = command(now, cwd, (act, at), dice, bug, reference['seconds'])
            left -= 1
            if 'Traceback' in said or code == 1:
                raise Failed(f'{act} at {at}: a traceback:\n{said[-1500:]}')
            if kind not in ('flip', 'text') and re.search('cut off|damaged|not the vocabulary|is not what', said):
                raise Failed(f'{act} at {at}: its own writer left something damaged:\n{said[-600:]}')
            if act == 'numbers':
                check_numbers(cwd)
                if code == 3 and 'not finite' in said and 'lower learning_rate' in said:
                    break
            if code < 0 and act not in GOES or code == 2 and not re.search(r'^train\.py: .{20}', said, re.M):
                raise Failed(f'{act} at {at}: ended with {code}:\n{said[-600:]}')
            if code < 0:
                steps = max([row['step'] for row in rows_of(cwd / 'out')], default=0)
                now = saved_steps(cwd)
                gone = max(steps, before) - now
                lost = max(lost, 0 if rare else gone)
                if not rare and gone > 1 or (cwd / 'judging').exists() and now < STEPS:
                    raise Failed(f'{act} at {at}: {steps} steps were made and {now} saved')
                done.append(f'{act}')
                if kind == 'flip':
                    damaged = flip(cwd, dice) or damaged
                    flipped.add(damaged)
            elif code == 0 or 'finished run' in said:
                if act == 'text':
                    put_back(cwd, reference)
                done += [f'{act}'] * (act not in (None, 'full', *GOES))
                break
            elif code in (75, 130) or act:
                done.append(f'{act}')
                if act == 'text':
                    put_back(cwd, reference)
            elif damaged:
                if damaged.startswith('ckpt') and 'no other is whole' not in said:
                    raise Failed(f'another bit in {damaged} was not passed over:\n{said[-600:]}')
                return dict(done=done, lost=lost, refused=damaged, seconds=time.monotonic() - began)
            elif '--init_from=resume' in said and not resume:
                resume = True
                continue
            else:
                raise Failed(f'code {code}:\n{said[-600:]}')
            resume = any((cwd / 'out' / name).exists() for name in ('ckpt.pt', 'ckpt.prev.pt', 'ckpt.new.pt'))
        else:
            raise Failed('did not come to its end')
        if code == 3:
            return dict(done=[*done, 'numbers'], lost=lost, refused='', seconds=time.monotonic() - began)
        if not (cwd / 'out' / 'result.json').exists():
            raise Failed(f'{kind} at {at}: it ended without a result')
        result = given(cwd)
        expected = reference['given']
        if kind == 'clock':
            check_times(cwd)
        if kind == 'numbers':                    # a step was left out
            expected = expected | dict(rows=result['rows'], result=result['result'])
            check_numbers(cwd)
        if kind == 'hold':                       # one that was killed may have been building the data once more
            result['names'] = [name for name in result['names'] if not name.startswith('data/.')]
        if 'metrics.jsonl' in flipped:           # a log has no checksums
            expected = expected | dict(rows=result['rows'])
        if kind == 'full':                       # rows of the log may be missing, and no other be there
            strange = [row for row in result['rows'] if row not in expected['rows']]
            expected = expected | dict(rows=strange or result['rows'])
        differs = checkouts.first_difference(expected, result)
        if differs:
            raise Failed(f'after {done} {damaged and "and another bit in " + damaged}, it differs: {differs}')
    except Failed as e:
        raise Failed(f'trial {number} ({kind}): {e}') from None
    finally:
        if not keep:
            shutil.rmtree(cwd, ignore_errors=True)
    return dict(done=done or ['nothing'], lost=lost, refused='', seconds=time.monotonic() - began)


def arguments(inputs, cwd, save_minutes):
    stack = [str(ROOT / 'config' / f'{name}.py') for name in ('dropout', 'hypercloning')]
    return [*stack[:1], *SETTINGS.split(), stack[1], f'--dataset=files:{inputs / "text"}', f'--data_dir={cwd / "data"}',
            f'--eval_data={inputs / "data" / "eval"}', f'--out_dir={cwd / "out"}', f'--save_minutes={save_minutes}']


# ---- all of them -------------------------------------------------------------------------------------------

def refer(folder, bug):
    """The run that nothing is done to."""
    inputs, cwd = Path(folder) / 'inputs', Path(folder) / 'reference'
    inputs.mkdir()
    cwd.mkdir()
    checkouts.write_inputs(inputs)
    began = time.monotonic()
    code, said = command(arguments(inputs, cwd, 0), cwd, (None, None), random.Random(0), bug, 0)
    if code:
        raise SystemExit(f'the run that nothing is done to ended with {code}:\n{said}')
    return dict(inputs=inputs, cwd=cwd, seconds=time.monotonic() - began, events=int((cwd / 'events').read_text()), given=given(cwd),
                texts=sorted(path.name for path in (cwd / 'data').glob('*/*') if path.suffix != '.npz'))


def attempt(*args):
    try:
        return trial(*args)
    except Failed as e:
        return dict(failed=str(e))


def options_of(argv, **options):
    """The options as argv has them, --name=value; None where one is not known."""
    given = dict(arg.removeprefix('--').partition('=')[::2] for arg in argv)
    return options | given if given.keys() <= options.keys() else None


def main(argv, say=print):
    options = options_of(argv, trials='200', seed='1', jobs='1', only=','.join(KINDS), plant='', json='', first='0')
    if not options:
        say(__doc__)
        return 2
    checkouts.preload()
    sys.path[:] = [str(Path(__file__).parent), *sys.path]
    first, n, began = int(options['first']), int(options['trials']), time.monotonic()
    with tempfile.TemporaryDirectory(prefix='faults-') as folder:
        reference = refer(folder, options['plant'])
        say(f'a run makes {reference["events"]} writes, fsyncs and moves in {reference["seconds"]:.1f} s')
        calls = [(i, options['seed'], folder, options['only'].split(','), reference, options['plant']) for i in range(first, first + n)]
        pool = concurrent.futures.ProcessPoolExecutor(int(options['jobs']), multiprocessing.get_context('fork'))
        found = []
        with pool:
            for result in pool.map(attempt, *zip(*calls)):
                found.append(result)
                if 'failed' in result:
                    say(result['failed'])
    done = collections.Counter(what for r in found for what in r.get('done', ()))
    failed = [r for r in found if 'failed' in r]
    refused = collections.Counter(r['refused'] for r in found if r.get('refused'))
    say(f'{len(found)} trials, {sum(done.values())} things done ({", ".join(f"{v} {k}" for k, v in done.most_common())}), '
        f'{len(failed)} failed; most steps lost {max([r["lost"] for r in found if "lost" in r], default=0)}; '
        f'refused for another bit in {dict(refused)}; {time.monotonic() - began:.0f} s')
    if options['json']:
        Path(options['json']).write_text(json.dumps(found, indent=1))
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

"""Python problems: the share of functions that pass their test as the model completes them.

    torchrun train.py config/babylm.py config/python.py config/humaneval.py
    python sample.py out/python config/humaneval.py --eval=python --eval_items=20

Problems are those of .jsonl files (.gz, .xz) like HumanEval's (Chen 2021, 2107.03374) in the folder of
evaluation sets whose names hold humaneval or mbpp. What the model writes is run, on Linux alone, in a process
of its own (the last functions below) without rights to the network, to other processes and to files outside a
folder that it is given; time, memory and the number of files are limited. That holds off what a language
model writes by accident, not an enemy, who could read files and, knowing how, pass. Beside `accuracy` stand
the shares that parse and that run, and that of the parsing ones in which bandit finds medium or high
severity.
"""
import contextlib
import importlib.util
import inspect
import json
import lzma
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import prepare_data
import sample
from prepare_data import UserError

python_tries: int = 1               # 1..: programs for a problem
python_tokens: int = 256            # 1..: of each, at most
python_temperature: float = 0.0     # 0..100: of drawing a token; 0 takes the likeliest
python_seconds: int = 5             # 1..: of CPU that a program has, and twice as long in all

PROBLEMS = re.compile('humaneval|mbpp', re.I)    # names of files
FIELDS = 'task_id', 'prompt', 'entry_point', 'test'           # the test defines check(candidate)
STAGES = 'parses', 'runs', 'passes'
STATEMENT = re.compile(r'\n(?=[^\s)\]}])')       # a line at the margin: the function before it is over


class Measure(sample.Measure):
    def known(self):
        return super().known() | dict(python=self.python)

    def files(self):
        return {name: path for name, path in super().files().items() if not PROBLEMS.search(path.name)}

    def open(self, name, files):
        if name == 'python':
            self.problems = read_problems(self.folder)        # a mistake there is better known now
        super().open(name, files)

    def seconds(self, name, token_seconds):
        one = self.s.python_tries * (self.s.python_tokens / 4 * token_seconds + 0.3)
        return one if name == 'python' else super().seconds(name, token_seconds)

    def python(self, model, n=0, stop=None):
        problems, s = self.problems[::-(-len(self.problems) // n)] if n else self.problems, self.s
        return python_tasks(model, self.tokenizer, problems, s.python_tries, s.python_temperature,
                            s.python_tokens, s.python_seconds, rows=self.rows(model), stop=stop)

    def lines(self, name, result):
        yield from super().lines(name, result)
        for part in (*STAGES[:2], 'flagged', 'held_by') if 'held_by' in result else ():
            yield f'  {part:22} {result[part]}'


def read_problems(path):
    """Problems of a file, or of those of a folder that are named so."""
    path, problems = Path(path), []
    named = sorted(file for file in path.glob('*.jsonl*') if PROBLEMS.search(file.name))
    for file in named if path.is_dir() else [path]:
        try:
            with open(file, 'rb') as raw, prepare_data.open_source(raw, file.name) as f:
                for row in (json.loads(line) for line in f if line.strip()):
                    problems.append({key: row[key] + '' for key in FIELDS})
        except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError, KeyError, TypeError) as e:
            raise UserError(f'{file} holds no Python problems ({type(e).__name__}: {e}): give .jsonl lines '
                            f'with {", ".join(FIELDS)}, as HumanEval has them') from e
    if not problems:
        raise UserError(f'{path} has no Python problems: put humaneval.jsonl there, or name such a file')
    return problems


def python_tasks(model, tokenizer, problems, n=1, temperature=0.0, max_new_tokens=256, seconds=5, seed=1,
                 rows=32, stop=None):
    """The figures above of n programs for each problem, and what held them. per_kind goes by the task_id up
    to its slash; flagged is None without bandit, or when none parses; None until a problem is through."""
    if sys.platform != 'linux':
        raise UserError(f'programs are contained on Linux alone, and this is {sys.platform}: leave them out')
    dice = torch.Generator(device=model.wte.weight.device).manual_seed(seed)
    tasks = [task for task in problems for _ in range(n)]
    # a prompt's last newline is the model's to write: many a vocabulary has it in one token with the indent
    heads = [task['prompt'].rstrip() for task in tasks]
    prompts = [[tokenizer.bos] + tokenizer.encode(head) for head in heads]
    made, _ = sample.continuations(model, tokenizer, prompts, max_new_tokens, temperature, dice,
                                   done=STATEMENT.search, rows=rows, stop=stop)
    found = []                                   # (problem, program, stages reached, what held it)
    for i, (task, head, ids) in enumerate(zip(tasks, heads, made)):
        if ids is not None and not (stop and stop()):
            body = STATEMENT.split(tokenizer.decode(ids), 1)[0]
            program = f'{head}{body}\n' if body.strip() else 'no body'
            test = f'{task["test"]}\ncheck({task["entry_point"]})'
            found.append((i // n, program, *judged(program, test, seconds)))
    whole = [i for i, tried in Counter(i for i, *_ in found).items() if tried == n]     # all, unless stopped
    share, found = len(whole) / len(problems), [row for row in found if row[0] in whole]
    if whole:
        return told([problems[i] for i in whole], found, n) | (dict(share=share) if share < 1 else {})


def told(problems, found, n):
    """What python_tasks says of problems that have been tried n times each."""
    stages, items, kinds = [[stage in row[2] for stage in STAGES] for row in found], len(problems), {}
    shares = np.array(stages).reshape(-1, n, 3).mean(1)                       # (problems, stages)
    for task, each in zip(problems, passed := shares[:, 2]):
        kinds.setdefault(task['task_id'].split('/')[0], []).append(each)
    error = passed.std() / np.sqrt(items) if n > 1 else sample.share_error(passed.mean(), items)
    return dict(accuracy=float(passed.mean()), error=float(error), chance=None, items=items,
                **dict(zip(STAGES[:2], shares.mean(axis=0).tolist())),
                flagged=flagged([program for _, program, reached, _ in found if reached]),
                per_kind={kind: float(np.mean(each)) for kind, each in kinds.items()},
                held_by=dict(Counter(held for *_, held in found)))


def flagged(programs):
    """The share of programs in which bandit finds medium or high severity; None without it or them."""
    if not programs or not importlib.util.find_spec('bandit'):
        return None
    with tempfile.TemporaryDirectory() as folder:
        for i, program in enumerate(programs):
            Path(folder, f'{i}.py').write_bytes(program.encode())
        command = '-m bandit -r . -q -lll -f json --exit-zero --ignore-nosec'.split()    # counts stay whole
        run = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    if run.returncode:
        raise UserError(f'python, as bandit failed ({run.stderr.strip()[-200:]}): pip install bandit')
    found = json.loads(run.stdout)
    clean = {path for path, n in found['metrics'].items() if not n['SEVERITY.MEDIUM'] + n['SEVERITY.HIGH']}
    clean -= {error['filename'] for error in found['errors']}         # what it could not read is not clean
    return sum(f'./{i}.py' not in clean for i in range(len(programs))) / len(programs)


def kernel_confines(folder):
    """From here on this process writes nothing outside `folder` (Landlock, Linux 5.13), has no socket and
    makes or signals no other (seccomp, on x86-64: to try ends it). Neither asks for rights, so that both work
    in a container. Returns which of them the kernel has. Reading stays open, and chmod, and utime."""
    import ctypes, os, struct
    libc, held = ctypes.CDLL(None), []
    libc.prctl(1, 9, 0, 0, 0)                    # end with the parent
    libc.prctl(38, 1, 0, 0, 0)                   # gain no privileges: a condition of the other two
    version = libc.syscall(444, None, 0, 1)
    if version > 0:                              # Landlock's rights, all but to read a file or a folder
        rights = struct.pack('Q', 0x7FF3 if version > 2 else 0x1FF3)
        rules, home = libc.syscall(444, rights, 8, 0), os.open(folder, os.O_PATH)
        libc.syscall(445, rules, 1, rights + struct.pack('i', home), 0)
        held += ['Landlock'] * (libc.syscall(446, rules, 0) == 0)
        os.close(rules), os.close(home)
    if os.uname().machine == 'x86_64':
        # socket, clone, fork, vfork, execve, kill, ptrace, tkill, tgkill, process_vm_writev, execveat,
        # pidfd_send_signal, io_uring_setup, clone3
        calls, end = (41, 56, 57, 58, 59, 62, 101, 200, 234, 311, 322, 424, 425, 435), (6, 0, 0, 1 << 31)
        steps = [(32, 0, 0, 4), (21, 1, 0, 0xC000003E), end, (32, 0, 0, 0), (53, 0, 1, 1 << 30), end,
                 *(step for call in calls for step in ((21, 0, 1, call), end)), (6, 0, 0, 0x7FFF0000)]
        code = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *step) for step in steps))
        program = struct.pack('HP', len(steps), ctypes.addressof(code))
        held += ['seccomp'] * (libc.prctl(22, 2, program, 0, 0) == 0)
    return held


def python_confines(folder):
    """The same as far as Python's own functions go, and at most 64 files written: to try ends the process."""
    import os, sys
    looks = {f'os.{name}' for name in 'listdir scandir walk fwalk chdir putenv unsetenv getxattr'.split()}
    changes = {f'os.{name}' for name in 'mkdir rmdir remove rename link symlink truncate chmod utime'.split()}
    others = {'os', 'socket', 'subprocess', 'ctypes', 'pty', 'resource', 'sqlite3', 'syslog'}
    writing, written, end = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC, [], os._exit

    def outside(path):
        return (isinstance(path, (str, bytes, os.PathLike))
                and not f'{os.path.realpath(os.fsdecode(path))}/'.startswith(f'{folder}/'))

    def hook(event, args):
        if event == 'open' and args[2] & writing:
            args = args[:1]
            written.append(args)
        elif event not in changes:
            return end(1) if event.split('.')[0] in others and event not in looks else None
        if len(written) > 64 or any(map(outside, args)):
            end(1)

    sys.addaudithook(hook)


def attempt():
    """What the judged process does: the task comes from stdin, how far it came goes to stdout."""
    import json, os, resource, sys
    folder, program, test, mark, limits = json.load(sys.stdin)
    verdict, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0), os.dup2(nothing, 1)
    for name, most in limits.items():
        kind = getattr(resource, f'RLIMIT_{name}')
        most = min(most, resource.getrlimit(kind)[1] % (1 << 64))         # -1 is no limit
        resource.setrlimit(kind, (most, most))
    held = kernel_confines(folder)
    python_confines(folder)

    def came_to(stage):
        os.write(verdict, f'{mark} {stage}\n'.encode())

    came_to(', '.join([*held, 'audit hook']))
    code, names = compile(program, 'program', 'exec'), dict(__name__='program')
    came_to('parses')
    exec(code, names)
    came_to('runs')
    exec(test, names)
    came_to('passes')
    os._exit(0)


def judged(program, test, seconds=5, memory=1 << 30):
    """Stages that a program reaches, of 'parses', 'runs' (to its end) and 'passes' (its test), and what held
    it: given an empty folder, seconds of CPU, twice as long in all, and bytes of memory; killed after."""
    mark = secrets.token_hex(16)                 # so that only the end of a stage can look like it
    limits = dict(CPU=seconds, AS=memory, FSIZE=1 << 24, NPROC=0, NOFILE=64, CORE=0)
    code = ''.join(map(inspect.getsource, (kernel_confines, python_confines, attempt))) + 'attempt()'
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
          tempfile.TemporaryFile() as task, tempfile.TemporaryFile() as verdict):
        task.write(json.dumps([os.path.realpath(folder), program, test, mark, limits]).encode())
        task.seek(0)
        environment = dict(TMPDIR=folder, LD_LIBRARY_PATH=os.environ.get('LD_LIBRARY_PATH', ''))
        child = subprocess.Popen([sys.executable, '-ISBc', code], cwd=folder, env=environment, stdin=task,
                                 stdout=verdict, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            child.wait(2 * seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        verdict.seek(0)
        said = re.findall(f'{mark} (.*)', verdict.read(4096).decode(errors='replace'))
    return said[1:], said[0] if said else 'nothing, Python did not start'

"""Shows that a change of the code changes no number: runs two checkouts and compares all that they give.

    python tests/compare_checkouts.py                              commit fb45184 with the working tree
    python tests/compare_checkouts.py HEAD~1 HEAD                  two commits, or folders
    python tests/compare_checkouts.py fb45184 --record=old.json    run one alone and keep its numbers,
    python tests/compare_checkouts.py --against=old.json           and compare the working tree with them
    python tests/compare_checkouts.py --only=ema,wide              some cases, and those that they need
    python tests/compare_checkouts.py HEAD --list                  the command of every case

A case is a run of 30 tiny steps on a CPU, in float32, one thread: every loss, gradient norm and rate, what is
evaluated on the way, the closing report's numbers and sample, what `sample.py --temperature 0` answers,
dynamics.json, and digests of the prepared text. It is run once undisturbed, and once told to stop after step
17 (SIGTERM) and resumed, which must give the same. Equal is to the last bit. Exit code 1 if any differs.

Every run is a process of its own that reads the checkout's scripts, with the command line that a user would
type. It is forked from one that has imported torch and nothing of a checkout, which saves 3 s each time;
with --fresh Python starts anew. --jobs=2 runs go on at once; --keep=FOLDER leaves them there.
"""
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLD = 'fb45184'                     # the last commit before an idea was a file of code
STEPS, STOP = 30, 17                # of a run; the step after which it is told to stop
SECONDS = 1200                      # that a script may take, on a machine that does other things too


# ---- the cases ---------------------------------------------------------------------------------------------

# A line a case: its name; the configs and settings ('tiny' is the config that is written here); and after a
# bar, where it matters, more settings for a checkout whose train.py has `prepare` ('old') or has it no more
# ('new'), the cases that must have run ('after') and what sample.py continues ('prompt'). A setting that a
# file of config/ declares gets that file on its line, unless one that is named there brings it.
CASES = '''
plain: tiny | old --prepare="--scores --classes 5"

quickstart: quickstart $world | old --prepare="--documents 300" | new --documents=300 | prompt It was
quickstart_sv: quickstart_sv $world
    | old --prepare="--documents 300" --evals=anisotropy | new --documents=300 --evals=bpb | prompt Det var
instructions: quickstart instructions $world --eval_interval=0
    | old --prepare="--documents 300" | new --documents=300 | prompt It was | after quickstart
python: python $small | prompt def
added_text: tiny --data_dir=data/added --weights=childes:1.5,arithmetic:0.5,brackets:0.25
    | old --prepare="--add arithmetic,brackets --add_documents 60"
    | new --add=arithmetic,brackets --add_documents=60
babylm: babylm $small --dataset=files:text | after plain
tinystories: tinystories $small --n_head=3 --dataset=files:text | after plain
simplestories: simplestories $small --n_head=4 --dataset=files:text | after plain
swedish: swedish $small --n_head=1 --dataset=files:text | after plain
cpu: cpu $small --n_head=3 --dataset=files:text | after plain
weights: tiny --weights=childes:2,gutenberg:0.5 | after plain

word_classes: tiny syntactic_smoothing | after plain | new --word_classes=5
climb_data: tiny climb_data | after plain
climb_data_frontier: tiny climb_data --curriculum_order=frontier --pacing=log | after climb_data
climb_data_sources: tiny climb_data --curriculum=source_rank --pacing=root --weights=notes:2
    | after climb_data
climb_objective: tiny climb_objective | after word_classes | new --word_classes=5
climb_vocabulary: tiny climb_vocabulary --pacing=quad | after plain
teacher: tiny --n_layer=3 --n_embd=32 --n_head=2 | after plain
distillation: tiny distillation | after teacher
domains: tiny domains | after plain
domains_grouped: tiny domains --domains=childes+notes,gutenberg --domains_from=0.3 | after plain
domains_at_once: tiny domains --domains_from=0 --mlp=swiglu --domain_share=0.5 | after plain
dropout: tiny dropout | after plain
dynamics: tiny dynamics | after plain
ema: tiny ema | after plain
experts: tiny experts | after plain
experts_few: tiny experts --experts=4 --experts_top=2 --expert_hidden=24 --balance_lr=0.03 | after plain
hypercloning: tiny hypercloning | after plain
latent_attention: tiny latent_attention --kv_latent=24 --rotary_dim=8 | after plain
latent_queries: tiny latent_attention --kv_latent=24 --rotary_dim=8 --q_latent=32 | after plain
masked: tiny masked | after plain
multi_token: tiny multi_token | after plain
multi_token_two: tiny multi_token --predict_ahead=2 --ahead_weight=0.5 | after plain
raise: tiny raise | after climb_data
same_order: tiny same_order | after plain
stochastic_depth: tiny stochastic_depth | after plain
smoothing_uniform: tiny syntactic_smoothing --smoothing_by=uniform | after word_classes | new --word_classes=5
tokenformer: tiny tokenformer | after plain
tokenformer_norm: tiny tokenformer --token_norm=norm_gelu | after plain
tokenformer_grow: tiny tokenformer_grow | after plain
tokenformer_grow_random: tiny tokenformer_grow --growth_tokens=random | after plain
weight_decay: tiny weight_decay | after plain
wide: tiny wide | after plain
z_loss: tiny z_loss --z_loss=0.01 | after plain

adamw: tiny --optimizer=adamw | after plain
swiglu: tiny --mlp=swiglu | after plain
window: tiny --window=12 | after plain
softcap: tiny --logit_softcap=5 | after plain
rotary_dim: tiny --rotary_dim=8 | after plain
value_embeds: tiny --value_embeds=1 | after plain
tied_few_keys: tiny --tie_embeddings=True --n_kv_head=2 | after plain
no_extras: tiny --qk_norm=False --token_shift=False --doc_mask=False | after plain

domains_branch: tiny domains --init_from=out/domains --dataset=files:more --domains=gutenberg,letters,notes
    --frozen=gutenberg,notes | after domains
masked_smoothing: tiny masked syntactic_smoothing | after word_classes | new --word_classes=5
climb_data_hypercloning: tiny climb_data hypercloning | after climb_data
hypercloning_noise: tiny hypercloning --growth_snr_db=3 --tie_embeddings=True --mlp=swiglu | after plain
raise_stack: tiny raise --growth_depth=stack | after climb_data
ema_hypercloning: tiny ema hypercloning | after plain
objective_multi_token: tiny climb_objective multi_token | after word_classes | new --word_classes=5
objective_growth: tiny climb_objective multi_token hypercloning | after word_classes | new --word_classes=5
z_loss_dropout_depth: tiny z_loss dropout stochastic_depth | after plain
adamw_tokenformer_grow: tiny tokenformer_grow --optimizer=adamw | after plain
adamw_domains: tiny domains --optimizer=adamw | after plain
masked_domains_ema: tiny masked domains ema | after plain
dynamics_hypercloning: tiny dynamics hypercloning | after plain
many: tiny masked syntactic_smoothing ema multi_token z_loss dropout stochastic_depth climb_data weight_decay
    hypercloning | after word_classes climb_data | new --word_classes=5
from_average: tiny --init_from=out/ema | after ema
from_smaller: tiny --init_from=out/teacher --n_layer=3 | after teacher | new growth
'''
TINY = dict(dataset='files:text', vocab_size=600, n_layer=2, n_head=4, n_embd=64, block_size=64,
            tokens_per_step=1024, micro_batch_size=8)
ALWAYS = (f'--max_steps={STEPS} --device=cpu --dtype=float32 --compile=off --budget_minutes=10000 --seed=3 '
          '--log_interval=1 --eval_interval=0.5 --sample_tokens=16')
SMALL = '--block_size=64 --tokens_per_step=1024 --micro_batch_size=8 --vocab_size=600 '
SHAPES = {'$small': SMALL + '--n_layer=2 --n_head=2 --n_embd=48',      # of a config that has a shape
          '$world': SMALL + '--n_layer=1 --n_head=2 --n_embd=32'}      # quick: it is asked a million tokens


@dataclass
class Case:
    name: str
    line: str
    old: str = ''
    new: str = ''
    after: str = ''
    prompt: str = 'Mia lost the'

    def words(self, checkout):
        """Configs and settings, for a checkout."""
        prepares = re.search(r'^    prepare: str', (checkout / 'train.py').read_text('utf-8'), re.M)
        return shlex.split(f'{self.line} {self.old if prepares else self.new}')


def read_cases():
    """[Case] of the text above."""
    text = CASES.replace('\n    ', ' ')
    for name, shape in SHAPES.items():
        text = text.replace(name, shape)
    cases = []
    for line in filter(None, text.splitlines()):
        first, *more = line.split(' | ')
        name, _, line = first.partition(': ')
        cases.append(Case(name, line, **dict(part.strip().split(' ', 1) for part in more)))
    return cases


def chosen(only=()):
    """The cases named, or all, with those that they need."""
    known, names = {case.name: case for case in read_cases()}, set()

    def add(name):
        if name not in known:
            raise SystemExit(f'compare_checkouts.py: no case is called {name}: choose of {", ".join(known)}')
        names.add(name)
        for other in known[name].after.split():
            add(other)
    for name in only or known:
        add(name)
    return [case for case in known.values() if case.name in names]


def declaring(checkout, words):
    """The configs to add to those that a line names, so that all settings of the line are declared."""
    named = [word for word in words if not word.startswith('--')]
    texts = {path.stem: path.read_text('utf-8') for path in sorted((checkout / 'config').glob('[!_]*.py'))}
    added = []

    def brings(name, seen=()):
        """The configs whose declarations come with one."""
        found = re.findall(r'^from config\.(\w+) import|^import config\.(\w+)', texts.get(name, ''), re.M)
        others = {one or two for one, two in found} - {name, *seen}
        return {name}.union(*(brings(other, (name, *seen)) for other in others))

    for key in (word[2:].partition('=')[0] for word in words if word.startswith('--')):
        files = [name for name, text in texts.items() if re.search(rf'^{key}: *\w+ *=', text, re.M)]
        if files and not {*files}.intersection(*[set().union(*map(brings, named + added))]):
            added.append(key if key in files else files[0])
    return added


def command(case, checkout):
    """The arguments of train.py for a case: configs, then what ALWAYS holds, then the case's own settings."""
    words = case.words(checkout)
    configs = [word for word in words if not word.startswith('--')]
    own = [word for word in words if word.startswith('--')]
    at = configs.index('tiny') + 1 if 'tiny' in configs else len(configs)       # what grows must come last
    configs[at:at] = declaring(checkout, words)
    given = {word.partition('=')[0]: word for word in ALWAYS.split() + own}
    return [*('tiny.py' if name == 'tiny' else str(checkout / 'config' / f'{name}.py') for name in configs),
            *given.values()]


def shown(args):
    """The arguments of train.py as one reads them."""
    return shlex.join(arg if arg.startswith('--') else Path(arg).stem for arg in args)


# ---- what the runs read ------------------------------------------------------------------------------------

def sentences(dice, n):
    """n sentences of a small world: words of several kinds, some rare, some of several bytes a character."""
    people, places = 'Mia Tom Ünal Zoë Ida Ben'.split(), 'tree house lake barn bridge mill garden'.split()
    things, ways = 'kite ball drum shoe lantern apple whistle basket'.split(), 'slowly gladly again'.split()
    for _ in range(n):
        who, other, how = dice.choice(people), dice.choice(people), dice.choice(ways)
        thing, place, many = dice.choice(things), dice.choice(places), dice.randrange(2, 99)
        yield dice.choice([
            f'{who} lost the {thing} by the {place}.', f'{who} looked for it {how}, near the old {place}.',
            f'"Where is the {thing}?" asked {other}.', f'{other} gave the {thing} to {who}. 🙂',
            f'{who} and {other} walked to the {place} and found {many} {thing}s.',
            f'The {thing} was under the {place}, and {who} laughed {how}.'])


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(json.dumps(row) for row in rows), 'utf-8')


def write_code(dice, folder, n):
    """n Python files, a function each."""
    folder.mkdir(parents=True)
    for i in range(n):
        name, rows = dice.choice('count total shift merge'.split()), dice.choice('xs rows items'.split())
        few, times, begin = dice.randrange(9), dice.randrange(2, 9), dice.randrange(99)
        lines = [f'"""{" ".join(sentences(dice, 2))}"""', '', '', f'def {name}_{i}({rows}, start={begin}):',
                 '    out = start', f'    for row in {rows}:', f'        if row > {few}:',
                 f'            out += row * {times}', '    return out', '']
        (folder / f'part{i}.py').write_text('\n'.join(lines), 'utf-8')


def write_inputs(folder):
    """Text of three sources and of a new one, code, evaluation sets, the tiny config, below the folder."""
    dice = random.Random(7)
    for name, n, most in ('text/childes', 160, 4), ('text/gutenberg', 60, 16), ('more/letters', 120, 9):
        for split, count in ('train', n), ('dev', n // 8):
            write_rows(folder / f'{name}.{split}.jsonl', [
                dict(text=' '.join(sentences(dice, dice.randrange(2, most)))) for _ in range(count)])
    for split, count in ('train', 160), ('dev', 24):               # paragraphs, which are joined to documents
        (folder / 'text' / f'notes.{split}').write_text('\n\n'.join(
            ' '.join(sentences(dice, dice.randrange(1, 6))) for _ in range(count)), 'utf-8')
    write_code(dice, folder / 'data' / 'raw' / 'python', 150)
    pairs, choices = [], []
    for i in range(24):
        good, bad = sentences(dice, 2)
        pairs.append(dict(sentence_good=good, sentence_bad=' '.join(good.split()[::-1]), UID=f'order_{i % 3}',
                          linguistics_term='order'))
        choices.append(dict(sentence1=good, sentence2=bad, label=i % 2))
    write_rows(folder / 'data' / 'eval' / 'pairs_of_order.jsonl', pairs)
    write_rows(folder / 'data' / 'eval' / 'choices.jsonl', choices)
    lines = ['"""The shape of these runs."""', *(f'{key} = {value!r}' for key, value in TINY.items()), '']
    (folder / 'tiny.py').write_text('\n'.join(lines))


# ---- running a checkout's scripts --------------------------------------------------------------------------

def preload():
    """Make this process one to fork runs from: with what all of them import, and nothing of any checkout."""
    os.environ |= dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
    os.environ.pop('TRITON_INTERPRET', None)
    ours = ('train.py', 'compare_checkouts.py')         # this checkout must not answer another's imports
    sys.path[:] = [p for p in sys.path if p and not any(Path(p, name).exists() for name in ours)]
    for name in ('numpy', 'torch', 'torch._dynamo', 'torch.export', 'torch._meta_registrations',
                 'triton.language', 'tiktoken', 'sentencepiece', 'tqdm'):
        with contextlib.suppress(ImportError):
            __import__(name)


def run_as_main(script, args):
    """Do what `python script args` would; the exit code."""
    sys.argv, main = [str(script), *args], types.ModuleType('__main__')
    sys.path.insert(0, str(script.parent))
    main.__file__, sys.modules['__main__'] = str(script), main
    try:
        exec(compile(script.read_bytes(), str(script), 'exec'), main.__dict__)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else bool(e.code)
    except BaseException:                       # as Python itself ends
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


def start(script, args, cwd, fresh):
    """A script in a process of its own: its id, and the file that its output comes from."""
    out, into = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, os.fdopen(out, 'rb')
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(into, 1)
        os.dup2(into, 2)
        os.chdir(cwd)
        signal.alarm(SECONDS)
        # nothing is left in a checkout
        sys.pycache_prefix = os.environ['PYTHONPYCACHEPREFIX'] = str(cwd / 'pycache')
        if fresh:
            os.execv(sys.executable, [sys.executable, str(script), *args])
        code = run_as_main(script, args)
    finally:
        os._exit(code)


class Failed(Exception):
    """A script did not end as it should have."""


def run(script, args, cwd, fresh, stop=None, expected=0):
    """What a script prints, which must end with the expected code; stop: after which step it gets SIGTERM."""
    pid, out = start(script, args, cwd, fresh)
    said = b''
    with out:
        for line in out:
            said += line
            if stop and re.match(rb'\s*%d +0\.' % stop, line):
                os.kill(pid, signal.SIGTERM)
    code, said = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode(errors='replace')
    if code != expected:
        last = '\n    '.join(said.strip().splitlines()[-12:])
        raise Failed(f'{script.name} {" ".join(args)} gave exit code {code}, not {expected}:\n    {last}')
    return said


# ---- what a run gives --------------------------------------------------------------------------------------

NOT_COMPARED = set('''tok_per_sec mfu tflops data_wait_share data_wait_s peak_mem_gb joules co2_g energy
    dollars hardware versions data commit settings config finished warnings protocol dynamics_share
    elapsed_s ideas changed'''.split())
MOVED = {'frequency_bias', 'replaced', 'anisotropy', 'text', 'python'}      # of the baseline at OLD, of ideas since
KEPT = ('train.bin', 'val.bin', 'pairs.jsonl')       # of prepared data, with its tokenizer


def numbers(found):
    """A row of metrics.jsonl, or a result.json, without what differs from run to run or is no number."""
    return {key: v for key, v in found.items() if key not in NOT_COMPARED and not key.endswith('_seconds')}


def given(run_dir, checkout, cwd, prompt, fresh):
    """All that a finished run gave that must be the same again."""
    out = cwd / run_dir
    result = json.loads((out / 'result.json').read_text())
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
               for path in sorted((cwd / result['data']['folder']).iterdir())
               if path.name in KEPT or path.name.startswith('tokenizer')}
    rows = [numbers(json.loads(line)) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    for row in rows:
        row.pop('tokens', None)                  # OLD did not say them there; result.json has them
    dynamics = json.loads((out / 'dynamics.json').read_text()) if (out / 'dynamics.json').exists() else None
    asked = [run_dir, prompt, '--temperature', '0', '--max_new_tokens', '40', '--device', 'cpu']
    sample = run(checkout / 'sample.py', asked, cwd, fresh)
    return dict(data=digests, rows=rows, result=numbers(result), sample=sample, dynamics=dynamics)


def without_moved(value):
    """A record without what is MOVED, and what is left empty of that."""
    if isinstance(value, dict):
        value = {key: without_moved(v) for key, v in value.items() if key not in MOVED}
        return {key: v for key, v in value.items() if key != 'evals' or v}
    if isinstance(value, list):
        return [row for row in map(without_moved, value) if not isinstance(row, dict) or row.keys() - {'step', 'progress'}]
    return value


def first_difference(a, b, path=''):
    """Where two such records differ first, and how; '' if nowhere."""
    if type(a) is type(b) and isinstance(a, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            at = f'{path}.{key}'.lstrip('.')
            if key not in a or key not in b:
                return f'{at} is only in the {"second" if key in b else "first"}'
            if found := first_difference(a[key], b[key], at):
                return found
        return ''
    if type(a) is type(b) and isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b)):
            step = f' (step {x["step"]})' if isinstance(x, dict) and 'step' in x else ''
            if found := first_difference(x, y, f'{path}[{i}]{step}'):
                return found
        return f'{path} has {len(a)} and {len(b)} entries' if len(a) != len(b) else ''
    return '' if a == b else f'{path}: {a!r} / {b!r}'


def run_case(case, checkout, cwd, fresh):
    """The record of a case: command, seconds, and either numbers, stopped (after which step) and resumed ('',
    or how that run differs), or failed, why."""
    began, args, train = time.monotonic(), command(case, checkout), checkout / 'train.py'
    record = dict(command=shown(args))
    whole, parts = f'out/{case.name}', f'out/{case.name}.parts'
    try:
        run(train, [*args, f'--out_dir={whole}'], cwd, fresh)
        first = given(whole, checkout, cwd, case.prompt, fresh)
        said = run(train, [*args, f'--out_dir={parts}'], cwd, fresh, STOP, 75)
        stopped = int(re.search(r'after step (\d+)', said)[1])
        if not STOP <= stopped < STEPS:
            raise Failed(f'was stopped after step {stopped}, which must lie from {STOP} to before {STEPS}')
        again = [arg for arg in args if not arg.startswith('--init_from=')]
        run(train, [*again, '--init_from=resume', f'--out_dir={parts}'], cwd, fresh)
        resumed = first_difference(first, given(parts, checkout, cwd, case.prompt, fresh))
        record |= dict(numbers=first, stopped=stopped, resumed=resumed)
    except (Failed, OSError, KeyError, TypeError, ValueError) as e:
        record['failed'] = str(e) if isinstance(e, Failed) else f'{type(e).__name__}: {e}'
    return record | dict(seconds=round(time.monotonic() - began, 1))


# ---- two checkouts -----------------------------------------------------------------------------------------

def check_out(which, folder):
    """The folder of a checkout; a git revision's files are written to `folder`."""
    if Path(which).is_dir():
        return Path(which).resolve()
    archive = subprocess.run(['git', 'archive', which], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise SystemExit(f'compare_checkouts.py: {which} is no folder, and git says: '
                         f'{archive.stderr.decode().strip()}')
    folder.mkdir(parents=True)
    subprocess.run(['tar', '-x', '-C', str(folder)], input=archive.stdout, check=True)
    return folder


def run_all(sides, only=(), jobs=2, fresh=False, folder=None, say=print):
    """{side: {case: record}} of {side: checkout}; each side has a folder of its own, with its own data."""
    cases, records = chosen(only), {side: {} for side in sides}
    with contextlib.ExitStack() as stack:
        temp = stack.enter_context(tempfile.TemporaryDirectory(prefix='numbers-'))
        folder = Path(folder or temp).absolute()
        for side in sides:
            (folder / side).mkdir(parents=True)
            write_inputs(folder / side)
        context = multiprocessing.get_context('spawn')
        pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(jobs, context, preload))
        waiting, running = [(side, case) for case in cases for side in sides], {}
        while waiting or running:
            for side, case in list(waiting):
                needs = [records[side].get(name) for name in case.after.split()]
                if all(needs) and len(running) < jobs:
                    waiting.remove((side, case))
                    running[pool.submit(run_case, case, sides[side], folder / side, fresh)] = side, case.name
            for future in concurrent.futures.wait(running, return_when='FIRST_COMPLETED').done:
                side, name = running.pop(future)
                records[side][name] = record = future.result()
                say(f'{side:4} {name:24} {record["seconds"]:6.1f} s  {verdict(record)}')
    return {side: {case.name: records[side][case.name] for case in cases} for side in sides}


def verdict(record):
    """A word about one side's record of a case."""
    if 'failed' in record:
        return f'failed: {record["failed"]}'
    if record['resumed']:
        return f'resumed after step {record["stopped"]} it differs: {record["resumed"]}'
    return f'stopped after step {record["stopped"]}, resumed the same'


def table(old, new):
    """The lines of a table of two sides' records, and whether all is equal."""
    lines, fine = [f'{"case":24} {"steps":>5}  numbers'], True
    for name, record in new.items():
        before, rows = old.get(name), record.get('numbers', {}).get('rows', ())
        sides = [(side, r) for side, r in (('old', before), ('new', record)) if r]
        said = ['not recorded'] * (before is None)
        said += [f'{side} {verdict(r)}' for side, r in sides if 'failed' in r or r['resumed']]
        if before and 'numbers' in before and 'numbers' in record:
            said += [first_difference(*(without_moved(r['numbers']) for r in (before, record)))]
        said = '; '.join(filter(None, said)) or 'equal'
        fine = fine and said == 'equal'
        lines.append(f'{name:24} {sum("train_loss" in row for row in rows):5}  {said}')
    return lines, fine


def main(argv, say=print):
    options, names = dict(only='', record='', against='', jobs='2', fresh='', keep='', list=''), []
    for arg in argv:
        name, eq, value = arg.removeprefix('--').partition('=')
        if not arg.startswith('--'):
            names.append(arg)
        elif name in options:
            options[name] = value if eq else 'yes'
        else:
            say(__doc__)
            return 2
    only = [name for name in options['only'].split(',') if name]
    known = json.loads(Path(options['against']).read_text()) if options['against'] else None
    wanted = {}
    if not known and not options['list']:
        wanted['old'] = names.pop(0) if names else OLD
    if not options['record']:
        wanted['new'] = names.pop(0) if names else ROOT
    with tempfile.TemporaryDirectory(prefix='checkouts-') as temp:
        sides = {side: check_out(which, Path(temp, side)) for side, which in wanted.items()}
        if options['list']:
            for case in chosen(only):
                say(f'{case.name:24} {shown(command(case, sides["new"]))}')
            return 0
        began = time.monotonic()
        records = run_all(sides, only, int(options['jobs']), bool(options['fresh']), options['keep'], say)
        say(f'{time.monotonic() - began:.0f} seconds')
    if path := options['record']:
        kept = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        Path(path).write_text(json.dumps(kept | records['old'], indent=1))
        return int(any('failed' in record or record['resumed'] != '' for record in records['old'].values()))
    lines, fine = table(known or records['old'], records['new'])
    say('\n'.join(['', *lines]))
    return int(not fine)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

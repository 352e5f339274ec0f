"""Shows that a change of the code changes no number: runs two checkouts side by side and compares all of them.

    python tests/compare_checkouts.py                          commit fb45184 with the working tree
    python tests/compare_checkouts.py HEAD~1 HEAD              two commits, or folders
    python tests/compare_checkouts.py fb45184 --record=old.json          run one, keep its numbers
    python tests/compare_checkouts.py --against=old.json [NEW] --only=ema,wide     and compare with those later

A case is a run of 30 tiny steps on a CPU, in float32, one thread: every loss, gradient norm and rate, what is
evaluated, the closing report's numbers and sample, what `sample.py --temperature 0` answers, dynamics.json,
and digests of the prepared text. It is run once undisturbed, and once told to stop after step 17 (SIGTERM)
and resumed: both must give the same. Numbers are equal only to the last bit. Exit code 1 where any differs.

Every run is a process of its own that reads the checkout's scripts, with the command line that a user would
type. It is forked from one that has imported torch and nothing of a checkout, which takes 3 s less each;
--fresh=True starts Python anew.
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
OLD = 'fb45184'                     # the last commit before ideas became files of code
STEPS, STOP, SECONDS = 30, 17, 600  # of a run; the step after which it is told to stop; what a script may take


# ---- the cases ---------------------------------------------------------------------------------------------

@dataclass
class Case:
    """A command line: names of configs, 'tiny' being the one that is written here, and --key=value.

    A setting that some file of config/ declares gets that file on its line, where none named has it already.
    """
    name: str
    line: str
    old: str = ''                   # more of the line, for a checkout whose train.py has `prepare`
    new: str = ''                   # and for one of later
    after: str = ''                 # cases that must have run: they prepare the data, or leave a run to use
    prompt: str = 'Mia lost the'

    def words(self, checkout):
        return shlex.split(f'{self.line} {self.new if later(checkout) else self.old}')


def later(checkout):
    return not re.search(r'^    prepare: str', (Path(checkout) / 'train.py').read_text('utf-8'), re.M)


TINY = dict(dataset='files:text', vocab_size=600, n_layer=2, n_head=4, n_embd=64, block_size=64, tokens_per_step=1024,
            micro_batch_size=8)
ALWAYS = (f'--max_steps={STEPS} --device=cpu --dtype=float32 --compile=off --budget_minutes=10000 --log_interval=1 --seed=3 '
          f'--eval_interval=0.5 --sample_tokens=16')
SMALL = '--n_layer=2 --n_head=2 --block_size=64 --tokens_per_step=1024 --micro_batch_size=8'      # of a config with a shape
WORDS = dict(new='--word_classes=5', after='classes')

CASES = [
    # data sets
    Case('plain', 'tiny', old='--prepare="--scores --classes 5"'),
    Case('quickstart', f'quickstart {SMALL} --n_embd=48 --vocab_size=600', old='--prepare="--documents 300"', new='--documents=300',
         prompt='It was'),
    Case('quickstart_sv', f'quickstart_sv {SMALL} --eval_interval=0 --n_embd=48 --vocab_size=600', old='--prepare="--documents 300"',
         new='--documents=300', prompt='Det var'),
    Case('python', f'python {SMALL} --n_embd=48 --vocab_size=600 --tie_embeddings=False', prompt='def '),
    Case('instructions', f'quickstart instructions {SMALL} --eval_interval=0 --n_embd=48 --vocab_size=600', old='--prepare="--documents 300"',
         new='--documents=300', after='quickstart', prompt='It was'),
    Case('added_text', 'tiny --data_dir=data/added --weights=childes:1.5,arithmetic:0.5,brackets:0.25',
         old='--prepare="--add arithmetic,brackets --add_documents 60"', new='--add=arithmetic,brackets --add_documents=60'),
    *(Case(name, f'{name} {SMALL} --n_embd=48 --dataset=files:text --vocab_size=600', after='plain')
      for name in 'babylm tinystories simplestories swedish'.split()),
    Case('cpu', 'cpu --n_embd=48 --n_layer=2 --block_size=64 --tokens_per_step=1024 --dataset=files:text --vocab_size=600', after='plain'),
    Case('weights', 'tiny --weights=childes:2,gutenberg:0.5', after='plain'),

    # one idea each
    Case('classes', 'tiny syntactic_smoothing', new='--word_classes=5', after='plain'),        # the first to need word classes
    Case('climb_data', 'tiny climb_data', after='plain'),                                      # and scores
    Case('climb_data_frontier', 'tiny climb_data --curriculum_order=frontier --pacing=log', after='climb_data'),
    Case('climb_data_sources', 'tiny climb_data --curriculum=source_rank --pacing=root --weights=notes:2', after='climb_data'),
    Case('climb_objective', 'tiny climb_objective', **WORDS),
    Case('climb_vocabulary', 'tiny climb_vocabulary --pacing=quad', after='plain'),
    Case('teacher', 'tiny --n_layer=3 --n_embd=32 --n_head=2', after='plain'),
    Case('distillation', 'tiny distillation', after='teacher'),
    Case('domains', 'tiny domains', after='plain'),                                            # splits after the stop
    Case('domains_grouped', 'tiny domains --domains=childes+notes,gutenberg --domains_from=0.3', after='plain'),     # before it
    Case('domains_at_once', 'tiny domains --domains_from=0 --mlp=swiglu --domain_share=0.5', after='plain'),
    Case('dropout', 'tiny dropout', after='plain'),
    Case('dynamics', 'tiny dynamics', after='plain'),
    Case('ema', 'tiny ema', after='plain'),
    Case('experts', 'tiny experts', after='plain'),
    Case('experts_few', 'tiny experts --experts=4 --experts_top=2 --expert_hidden=24 --balance_lr=0.03', after='plain'),
    Case('hypercloning', 'tiny hypercloning', after='plain'),
    Case('latent_attention', 'tiny latent_attention --kv_latent=24 --rotary_dim=8', after='plain'),
    Case('latent_queries', 'tiny latent_attention --kv_latent=24 --rotary_dim=8 --q_latent=32', after='plain'),
    Case('masked', 'tiny masked', after='plain'),
    Case('multi_token', 'tiny multi_token', after='plain'),
    Case('multi_token_two', 'tiny multi_token --predict_ahead=2 --ahead_weight=0.5', after='plain'),
    Case('raise', 'tiny raise', after='climb_data'),
    Case('same_order', 'tiny same_order', after='plain'),
    Case('stochastic_depth', 'tiny stochastic_depth', after='plain'),
    Case('smoothing_uniform', 'tiny syntactic_smoothing --smoothing_by=uniform', **WORDS),
    Case('tokenformer', 'tiny tokenformer', after='plain'),
    Case('tokenformer_norm', 'tiny tokenformer --token_norm=norm_gelu', after='plain'),
    Case('tokenformer_grow', 'tiny tokenformer_grow', after='plain'),
    Case('tokenformer_grow_random', 'tiny tokenformer_grow --growth_tokens=random', after='plain'),
    Case('weight_decay', 'tiny weight_decay', after='plain'),
    Case('wide', 'tiny wide', after='plain'),
    Case('z_loss', 'tiny z_loss --z_loss=0.01', after='plain'),

    # plain options
    Case('adamw', 'tiny --optimizer=adamw', after='plain'),
    Case('swiglu', 'tiny --mlp=swiglu', after='plain'),
    Case('window', 'tiny --window=12', after='plain'),
    Case('softcap', 'tiny --logit_softcap=5', after='plain'),
    Case('rotary_dim', 'tiny --rotary_dim=8', after='plain'),
    Case('value_embeds', 'tiny --value_embeds=1', after='plain'),
    Case('tied_few_keys', 'tiny --tie_embeddings=True --n_kv_head=2', after='plain'),
    Case('no_extras', 'tiny --qk_norm=False --token_shift=False --doc_mask=False', after='plain'),

    # stacks, and runs that begin with another's weights
    Case('domains_branch', 'tiny domains --init_from=out/domains --dataset=files:more --domains=gutenberg,letters,notes '
         '--frozen=gutenberg,notes', after='domains'),
    Case('masked_smoothing', 'tiny masked syntactic_smoothing', **WORDS),
    Case('climb_data_hypercloning', 'tiny climb_data hypercloning', after='climb_data'),
    Case('hypercloning_noise', 'tiny hypercloning --growth_snr_db=3 --tie_embeddings=True --mlp=swiglu', after='plain'),
    Case('raise_stack', 'tiny raise --growth_depth=stack', after='climb_data'),
    Case('ema_hypercloning', 'tiny ema hypercloning', after='plain'),
    Case('climb_objective_multi_token', 'tiny climb_objective multi_token', **WORDS),
    Case('objective_hypercloning', 'tiny climb_objective multi_token hypercloning', **WORDS),
    Case('z_loss_dropout_depth', 'tiny z_loss dropout stochastic_depth', after='plain'),
    Case('adamw_tokenformer_grow', 'tiny tokenformer_grow --optimizer=adamw', after='plain'),
    Case('adamw_domains', 'tiny domains --optimizer=adamw', after='plain'),
    Case('masked_domains_ema', 'tiny masked domains ema', after='plain'),
    Case('dynamics_hypercloning', 'tiny dynamics hypercloning', after='plain'),
    Case('everything', 'tiny masked syntactic_smoothing ema multi_token z_loss dropout stochastic_depth climb_data weight_decay '
         'hypercloning', new='--word_classes=5', after='classes climb_data'),
    Case('from_average', 'tiny --init_from=out/ema', after='ema'),
    Case('from_smaller', 'tiny --init_from=out/teacher --n_layer=3 --tie_embeddings=False', new='growth', after='teacher'),
]


# ---- what the runs read ------------------------------------------------------------------------------------

def sentences(dice, n):
    """n sentences of a small world: words of several kinds, some rare, some of several bytes a character."""
    people, things = 'Mia Tom Ünal Zoë Ida Ben'.split(), 'kite ball drum shoe lantern apple whistle basket'.split()
    places, ways = 'tree house lake barn bridge mill garden'.split(), 'slowly gladly again alone twice'.split()
    for _ in range(n):
        who, thing, place, other = dice.choice(people), dice.choice(things), dice.choice(places), dice.choice(people)
        yield dice.choice([
            f'{who} lost the {thing} by the {place}.', f'{who} looked for it {dice.choice(ways)}, near the old {place}.',
            f'"Where is the {thing}?" asked {other}.', f'{who} and {other} walked to the {place} and found {dice.randrange(2, 99)} {thing}s.',
            f'The {thing} was under the {place}, and {who} laughed {dice.choice(ways)}.', f'{other} gave the {thing} to {who}. 🙂'])


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(json.dumps(row) for row in rows), 'utf-8')


def write_inputs(folder):
    """Text of three sources, text of a new one, code, evaluation sets and the tiny config, below the folder."""
    dice = random.Random(7)
    for name, source, n, at_most in (('text', 'childes', 160, 4), ('text', 'gutenberg', 60, 16), ('more', 'letters', 120, 9)):
        for split, count in (('train', n), ('dev', n // 8)):
            write_rows(folder / name / f'{source}.{split}.jsonl', [
                dict(text=' '.join(sentences(dice, dice.randrange(2, at_most)))) for _ in range(count)])
    for split, count in (('train', 160), ('dev', 24)):             # paragraphs, which are joined to documents
        (folder / 'text' / f'notes.{split}').write_text('\n\n'.join(
            ' '.join(sentences(dice, dice.randrange(1, 6))) for _ in range(count)), 'utf-8')
    code = folder / 'data' / 'raw' / 'python'
    code.mkdir(parents=True)
    for i in range(150):
        name, a, b = dice.choice('count total shift merge find'.split()), dice.choice('xs rows items'.split()), dice.randrange(99)
        (code / f'part{i}.py').write_text(
            f'"""{" ".join(sentences(dice, 2))}"""\n\n\ndef {name}_{i}({a}, start={b}):\n    out = start\n    for row in {a}:\n'
            f'        if row > {dice.randrange(9)}:\n            out += row * {dice.randrange(2, 9)}\n    return out\n', 'utf-8')
    pairs, choices = [], []
    for i in range(24):
        good, bad = sentences(dice, 2)
        pairs.append(dict(sentence_good=good, sentence_bad=' '.join(good.split()[::-1]), UID=f'order_{i % 3}', linguistics_term='order'))
        choices.append(dict(context='', sentence1=good, sentence2=bad, label=i % 2))
    write_rows(folder / 'data' / 'eval' / 'pairs_of_order.jsonl', pairs)
    write_rows(folder / 'data' / 'eval' / 'choices.jsonl', choices)
    (folder / 'tiny.py').write_text('"""The shape of these runs."""\n' + ''.join(f'{k} = {v!r}\n' for k, v in TINY.items()))


# ---- running a checkout's scripts --------------------------------------------------------------------------

def preload():
    """Make this process one to fork runs from: with what all of them import, and nothing of any checkout."""
    os.environ |= dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
    os.environ.pop('TRITON_INTERPRET', None)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ours = ('train.py', 'compare_checkouts.py')         # this checkout's files must not answer another's imports
    sys.path[:] = [folder for folder in sys.path if folder and not any(Path(folder, name).exists() for name in ours)]
    for name in ('numpy', 'torch', 'torch._dynamo', 'torch.export', 'torch._meta_registrations', 'triton.language', 'tiktoken',
                 'sentencepiece', 'tqdm'):
        with contextlib.suppress(ImportError):
            __import__(name)


def run_as_main(script, args):
    """What `python script args` does from here on; returns its exit code."""
    sys.argv, main = [str(script), *args], types.ModuleType('__main__')
    sys.path.insert(0, str(script.parent))
    main.__file__ = str(script)
    sys.modules['__main__'] = main
    try:
        exec(compile(script.read_bytes(), str(script), 'exec'), main.__dict__)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else bool(e.code)
    except BaseException:                       # as Python itself would end
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


def start(script, args, cwd, fresh):
    """A script in a process of its own: its id and the file that its output comes from."""
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
        sys.pycache_prefix = os.environ['PYTHONPYCACHEPREFIX'] = str(cwd / 'pycache')        # a checkout stays as it is
        if fresh:
            os.execv(sys.executable, [sys.executable, str(script), *args])
        code = run_as_main(script, args)
    finally:
        os._exit(code)


class Failed(Exception):
    """A script did not end as it should have."""


def script(path, args, cwd, fresh, stop=None, expected=0):
    """What a script says, which must end with the expected code; stop: the step after which it gets SIGTERM."""
    pid, out = start(path, args, cwd, fresh)
    said = b''
    for line in out:
        said += line
        if stop and re.match(rb'\s*%d +0\.' % stop, line):
            os.kill(pid, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != expected:
        lines = said.decode(errors='replace').strip().splitlines()
        raise Failed(f'{path.name} {" ".join(args)} gave exit code {code}, not {expected}: ' + '\n    '.join(lines[-12:]))
    return said.decode()


def declaring(checkout, words):
    """The configs to add in front of those that a line names, so that all settings of the line are declared."""
    named = [word for word in words if not word.startswith('--')]
    wanted = [word[2:].partition('=')[0] for word in words if word.startswith('--')]
    texts = {path.stem: path.read_text('utf-8') for path in sorted((checkout / 'config').glob('*.py'))}
    added = []

    def brings(name, seen=()):
        """The configs whose declarations come with one."""
        found = re.findall(r'^from config\.(\w+) import|^import config\.(\w+)', texts.get(name, ''), re.M)
        others = {one or two for one, two in found} - {name, *seen}
        return {name}.union(*(brings(other, (name, *seen)) for other in others))

    for key in wanted:
        files = [name for name, text in texts.items() if re.search(rf'^{key}: *\w+ *=', text, re.M)]
        has = set().union(*map(brings, named + added))
        if files and not has & {*files}:
            added.append(key if key in files else files[0])
    return added


def command(case, checkout):
    """The arguments of train.py for a case: configs first, since overrides come last."""
    words = case.words(checkout)
    words = [word for i, word in enumerate(words) if not word.startswith('--')] + [word for word in words if word.startswith('--')]
    configs = [word for word in words if not word.startswith('--')]
    at = configs.index('tiny') + 1 if 'tiny' in configs else len(configs)
    configs[at:at] = declaring(checkout, words)
    given = {word.partition('=')[0]: word for word in ALWAYS.split() + words if word.startswith('--')}
    return ['tiny.py' if name == 'tiny' else str(checkout / 'config' / f'{name}.py') for name in configs] + [*given.values()]


# ---- what a run says ---------------------------------------------------------------------------------------

NOT_NUMBERS = ('_seconds', 'tok_per_sec', 'mfu', 'tflops', 'data_wait_share', 'peak_mem_gb', 'joules', 'co2_g', 'energy',
               'dollars', 'hardware', 'versions', 'data', 'commit', 'settings', 'config', 'finished', 'warnings', 'protocol',
               'dynamics_share', 'elapsed_s', 'data_wait_s')


def numbers(found):
    """A row or a report without what differs from run to run, and the data's name, which says nothing."""
    return {key: value for key, value in found.items() if not key.endswith(NOT_NUMBERS)}


def told(run, checkout, cwd, case, fresh):
    """All that a finished run says that must be the same again."""
    out, dynamics = cwd / run, cwd / run / 'dynamics.json'
    result = json.loads((out / 'result.json').read_text())
    data = cwd / result['data']['folder']
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(data.iterdir())
               if path.name.startswith('tokenizer') or path.name in ('train.bin', 'val.bin', 'pairs.jsonl')}
    prompt = [run, case.prompt, '--temperature', '0', '--max_new_tokens', '40', '--device', 'cpu']
    return dict(data=digests, rows=[numbers(json.loads(line)) for line in (out / 'metrics.jsonl').read_text().splitlines()],
                result=numbers(result), sample=script(checkout / 'sample.py', prompt, cwd, fresh),
                dynamics=json.loads(dynamics.read_text()) if dynamics.exists() else None)


def first_difference(a, b, path=''):
    """Where two such records differ first, and how; '' if nowhere."""
    if type(a) is type(b) and isinstance(a, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            at = f'{path}.{key}'.lstrip('.')
            if key not in a or key not in b:
                return f'{at} is only in {"the other" if key in b else "the first"}'
            if found := first_difference(a[key], b[key], at):
                return found
        return ''
    if type(a) is type(b) and isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b)):
            step = f' (step {a[i]["step"]})' if isinstance(a[i], dict) and 'step' in a[i] else ''
            if found := first_difference(x, y, f'{path}[{i}]{step}'):
                return found
        return f'{path} has {len(a)} and {len(b)} entries' if len(a) != len(b) else ''
    return '' if a == b else f'{path}: {a!r} / {b!r}'


def run_case(case, checkout, cwd, fresh):
    """The record of a case: dict of numbers, resumed ('' or how the run that was stopped differs), seconds and
    command, or of failed and command."""
    began, args, train = time.monotonic(), command(case, checkout), checkout / 'train.py'
    record = dict(command=' '.join(Path(arg).stem if not arg.startswith('--') else arg for arg in args))
    try:
        whole, parts = f'out/{case.name}', f'out/{case.name}.parts'
        script(train, [*args, f'--out_dir={whole}'], cwd, fresh)
        record['numbers'] = told(whole, checkout, cwd, case, fresh)
        said = script(train, [*args, f'--out_dir={parts}'], cwd, fresh, STOP, 75)
        stopped = int(re.search(r'stopped by a signal after step (\d+)', said)[1])
        if not STOP <= stopped < STEPS:
            raise Failed(f'was stopped after step {stopped}, not in between {STOP} and {STEPS}')
        again = [arg for arg in args if not arg.startswith('--init_from=')] + ['--init_from=resume', f'--out_dir={parts}']
        script(train, again, cwd, fresh)
        record['stopped'] = stopped
        record['resumed'] = first_difference(record['numbers'], told(parts, checkout, cwd, case, fresh))
    except (Failed, OSError, KeyError, TypeError, ValueError) as e:
        record['failed'] = str(e) if isinstance(e, Failed) else f'{type(e).__name__}: {e}'
    return record | dict(seconds=round(time.monotonic() - began, 1))


# ---- two checkouts -----------------------------------------------------------------------------------------

def check_out(which, folder):
    """The folder of a checkout, given as one or as a git revision, whose files are written to `folder` then."""
    if Path(which).is_dir():
        return Path(which).resolve()
    archive = subprocess.run(['git', 'archive', which], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise SystemExit(f'compare_checkouts.py: {which} is no folder, and git says: {archive.stderr.decode().strip()}')
    folder.mkdir(parents=True)
    subprocess.run(['tar', '-x', '-C', str(folder)], input=archive.stdout, check=True)
    return folder


def chosen(only):
    """The cases named, all if none is, and before each those that it needs."""
    known, names = {case.name: case for case in CASES}, []

    def add(name):
        if name not in known:
            raise SystemExit(f'compare_checkouts.py: no case is called {name}: choose of {", ".join(known)}')
        for other in known[name].after.split():
            add(other)
        if name not in names:
            names.append(name)
    for name in only or known:
        add(name)
    return [case for case in CASES if case.name in names]


def run_all(sides, only=(), jobs=2, fresh=False, folder=None, say=print):
    """{side: {case: record}} of {side: (checkout, {case: record} that is known already)}."""
    cases, records = chosen(only), {side: {} for side in sides}
    context = multiprocessing.get_context('spawn')
    with contextlib.ExitStack() as stack:
        folder = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix='numbers-')))
        pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(jobs, context, preload))
        for side in sides:
            (folder / side).mkdir(parents=True)
            write_inputs(folder / side)
        waiting, running = [(side, case) for case in cases for side in sides], {}
        while waiting or running:
            for side, case in list(waiting):
                needs = [records[side].get(name) for name in case.after.split()]
                if any(record and 'numbers' not in record for record in needs):
                    records[side][case.name] = dict(failed='what it needs failed', command='', seconds=0.0)
                    waiting.remove((side, case))
                elif all(needs) and len(running) < jobs:
                    waiting.remove((side, case))
                    running[pool.submit(run_case, case, sides[side], folder / side, fresh)] = side, case.name
            for future in concurrent.futures.wait(running, return_when='FIRST_COMPLETED').done if running else ():
                side, name = running.pop(future)
                records[side][name] = record = future.result()
                say(f'{side:4} {name:28} {record["seconds"]:6.1f} s  {verdict(record)}')
    return {side: {case.name: records[side][case.name] for case in cases} for side in sides}


def verdict(record):
    """A word about one side's record of a case."""
    if 'failed' in record:
        return f'failed: {record["failed"]}'
    return f'resumed differs: {record["resumed"]}' if record['resumed'] else f'stopped after {record["stopped"]}, resumed the same'


def table(old, new):
    """Lines of a table of two sides' records, and whether all is equal."""
    lines, fine = [f'{"case":28} {"steps":>5}  numbers'], True
    for name, record in new.items():
        before, steps = old.get(name), sum('train_loss' in row for row in record.get('numbers', {}).get('rows', ()))
        if before is None:
            said = 'not recorded'
        elif wrong := [f'{side}: {verdict(r)}' for side, r in (('old', before), ('new', record)) if r.get('failed') or r['resumed']]:
            said = '; '.join(wrong)
        else:
            said = first_difference(before['numbers'], record['numbers']) or 'equal'
        fine = fine and said == 'equal'
        lines.append(f'{name:28} {steps:5}  {said}')
    return lines, fine


def main(argv, say=print):
    options = dict(only='', record='', against='', jobs='2', fresh='False', keep='', list='False')
    for arg in (arg for arg in argv if arg.startswith('--')):
        name, _, value = arg[2:].partition('=')
        if name not in options:
            say(__doc__)
            return 2
        options[name] = value or 'True'
    given, only = [arg for arg in argv if not arg.startswith('--')], [name for name in options['only'].split(',') if name]
    known = json.loads(Path(options['against']).read_text()) if options['against'] else None
    with tempfile.TemporaryDirectory(prefix='checkouts-') as temp:
        wanted = dict(old=None if known else (given.pop(0) if given else OLD),
                      new=None if options['record'] else (given.pop(0) if given else str(ROOT)))
        sides = {side: check_out(which, Path(temp, side)) for side, which in wanted.items() if which}
        if options['list'] == 'True':
            for case in chosen(only):
                say(f'{case.name:28} {" ".join(Path(a).stem if a[0] != "-" else a for a in command(case, next(reversed(sides.values()))))}')
            return 0
        began = time.monotonic()
        records = run_all(sides, only, int(options['jobs']), options['fresh'] == 'True', options['keep'], say)
        say(f'{time.monotonic() - began:.0f} seconds')
    if options['record']:
        path = Path(options['record'])
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(kept | records['old'], indent=1))
        return int(any(record.get('failed') or record['resumed'] for record in records['old'].values()))
    lines, fine = table(known or records['old'], records['new'])
    say('\n'.join(['', *lines]))
    return int(not fine)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

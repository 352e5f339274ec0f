"""How configs and ideas are read; the ideas themselves are the other files of this folder.

A config is a file of settings; an idea is one that holds code too, classes that derive from the seams of the
scripts and take their places in a run. Settings are read, never executed: `name = value` sets one that
exists, `name: type = value` declares one, and the comment behind it says which values are legal, and what it
is.
"""
import ast
import difflib
import errno
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import itertools
import math
import operator
import os
import re
import sys
import textwrap
import traceback
import types
from dataclasses import dataclass
from pathlib import Path

CONFIG = Path(__file__).resolve().parent
SEAMS = dict(GPT='model', Block='model', Attention='model', MLP='model', Corpus='prepare_data',
             Measure='sample', Stream='train', Run='train')
KINDS_OF_SETTING = dict(int=int, float=float, str=str, bool=bool, tuple=tuple)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow, ast.USub: operator.neg}
NO_LITERAL = ValueError, TypeError, ArithmeticError, RecursionError, MemoryError    # what reading one may raise
MOST = 1 << 24                                   # characters of a config
NUMBER = r'-?\d[\d.]*(?:e-?\d+)?'
LEGAL = re.compile(rf'(?:({NUMBER})?\.\.({NUMBER})?|([\w.+-]*(?:\|[\w.+-]*)+))(?:: |$)')   # 0..1: one|two:


class UserError(Exception):
    """A mistake the user can mend: its text is all that is shown, and the exit code is 2."""


def refuse(wrong, why):
    """End with a sentence to the user where something is wrong."""
    if wrong:
        raise UserError(why)


def fits(value, form):
    """Whether what was read from a file has a form: a type (object is any, a float is finite); a set of words; a range;
    a union of types; [the form of all parts]; (the form of each part, ...); {name: the form of what stands there, name?: where it does,
    str: of whatever else there is}."""
    match form:
        case set() | range():
            return type(value) is (str if type(form) is set else int) and value in form
        case types.UnionType():
            return any(fits(value, part) for part in form.__args__)
        case list():
            return isinstance(value, (list, tuple)) and all(fits(part, form[0]) for part in value)
        case tuple():
            return isinstance(value, (list, tuple)) and len(value) == len(form) and all(map(fits, value, form))
        case dict():
            needed = {name for name in form if name is not str and name[-1] != '?'}
            return isinstance(value, dict) and needed <= value.keys() and all(
                fits(part, form.get(name, form.get(f'{name}?', form.get(str, object)))) for name, part in value.items())
    if form is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return form is object or type(value) is form


def memory_ran_out(error):
    """How it was told, where an error is that, of a card or of the machine (torch has a RuntimeError for both); else ''."""
    said = str(error).split('\n')[0][:120]
    told = (isinstance(error, MemoryError) or getattr(error, 'errno', 0) == errno.ENOMEM or isinstance(error, RuntimeError)
            and re.search('out of memory|ALLOC_FAILED|allocate memory|bad_alloc|start new thread', str(error)))
    return (said or type(error).__name__) if told else ''


def in_words(error):
    """What its user should read of an error; an OSError that names no file, or a RuntimeError, is none of theirs and
    goes on, unless it says that memory ran out."""
    if told := memory_ran_out(error):
        return f'memory ran out ({told}): end what else takes it, or ask for less at a time'
    if isinstance(error, RuntimeError) or isinstance(error, OSError) and not error.filename:
        raise error
    return f'{error.filename}: {error.strerror}' if isinstance(error, OSError) else str(error)


def at_home(text):
    """A path, or several with commas between, where ~ is the user's home."""
    return ','.join(map(os.path.expanduser, text.split(',')))


class Heedless(io.RawIOBase):
    """What a stream writes to. What cannot be written there is lost: nobody reads on, or a disk is full."""

    def __init__(self, raw, heeds):
        self.raw, self.heeds = raw, heeds

    def writable(self):
        return True

    def isatty(self):
        return self.raw.isatty()

    def fileno(self):
        return self.raw.fileno()

    def write(self, data):
        try:
            written = self.raw.write(data)       # None: a pipe that is full and does not wait
        except OSError as e:
            if isinstance(e, self.heeds):
                self.heeds = ()
                raise
            written = None
        return len(data) if written is None else written


def print_without_fail(heeds=()):
    """From here on nothing that is printed raises: no character that the terminal lacks, no reader that left,
    no full disk. heeds: errors of which the first is raised all the same."""
    for name in ('stdout', 'stderr'):
        if (stream := getattr(sys, name)) is None:               # closed as the program began
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))
            continue
        raw = getattr(stream.buffer, 'raw', stream.buffer)
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(Heedless(raw, heeds)), stream.encoding,
                                            'backslashreplace', line_buffering=True))


def literal(node, names):
    """The value of a syntax tree of literals, names, arithmetic on numbers and dict(); else ValueError."""
    value = functools.partial(literal, names=names)
    match node:
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            left, right = value(left), value(right)
            numbers = all(isinstance(x, (int, float)) for x in (left, right))
            if not numbers or isinstance(op, ast.Pow) and abs(right) > 64:
                raise ValueError
            return printable(OPERATORS[type(op)](left, right))
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](value(operand))
        case ast.Tuple(rows) | ast.List(rows):
            return tuple(map(value, rows))
        case ast.Call(ast.Name('dict'), [], pairs):
            return {pair.arg: value(pair.value) for pair in pairs}
        case ast.Name(name) if name in names:
            return names[name]
    return printable(ast.literal_eval(node))


def printable(value):
    """The value, unless it is a whole number of more digits than Python prints: ValueError."""
    if isinstance(value, int) and value.bit_length() > 12_000:
        raise ValueError
    return value


@dataclass
class Setting:
    name: str
    kind: type
    default: object
    where: str               # file:line of its declaration
    about: str = ''
    low: float = 0           # numbers: least and greatest; choices: of a string
    high: float = math.inf
    choices: tuple = ()

    @classmethod
    def read(cls, node, lines, where, names):
        """That of a line `name: type = value  # legal: what it is`; ValueError says what is wrong with it."""
        kind = KINDS_OF_SETTING.get(getattr(node.annotation, 'id', ''))
        if kind is None or node.value is None:
            raise ValueError(f'is declared without a default, or not as one of {", ".join(KINDS_OF_SETTING)}')
        about = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode().partition('#')[2].strip()
        low, high, choices = 0, math.inf, ()
        if legal := LEGAL.match(about):
            low, high = float(legal[1] or '-inf'), float(legal[2] or 'inf')
            choices = tuple(legal[3].split('|')) if legal[3] is not None else ()
        setting = cls(node.target.id, kind, None, where, about, low, high, choices)
        try:
            setting.default = setting.taken(literal(node.value, names))
        except NO_LITERAL:
            raise ValueError('must have a literal for its default, or arithmetic on settings') from None
        if wrong := setting.wrong(setting.default):
            raise ValueError(f'is {setting.default!r}, it must be {wrong}')
        return setting

    def taken(self, value):
        """The value as this setting holds it: a whole number stands for a float too."""
        return float(value) if self.kind is float and type(value) is int and abs(value) < 1e300 else value

    def typed(self, text):
        """The value of --name=text: of a string the text as it was typed."""
        if self.kind is str:
            return text
        try:
            return self.taken(literal(ast.parse(text, mode='eval').body, {}))
        except (SyntaxError, *NO_LITERAL):
            return text

    def wrong(self, value):
        """What a value must be, if it is not; else ''."""
        if self.kind is str and type(value) is str and re.search('[\ud800-\udfff]', value):
            return 'text in UTF-8'
        if type(value) is not self.kind:
            like = f', like {self.default!r}' * (self.default is not None)
            return f'one of {", ".join(self.choices)}' if self.choices else f'{self.kind.__name__}{like}'
        if self.choices and str(value) not in self.choices:
            return f'one of {", ".join(self.choices)}'
        if self.kind is float and not math.isfinite(value):
            return 'finite'
        if self.kind in (int, float) and not self.low <= value <= self.high:
            return f'at least {self.low:g}' + f' and at most {self.high:g}' * (self.high < math.inf)
        return ''


def is_setting(node):
    """Whether a line of a config is a setting, not code: UPPER_CASE names are code."""
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, 'targets', [None])
    return all(isinstance(target, ast.Name) and not target.id.isupper() for target in targets)


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def names_set(node):
    """The names that a statement sets where it stands, not inside of a function."""
    comprehensions = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda, *comprehensions)):
        return set()
    own = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    return own.union(*map(names_set, ast.iter_child_nodes(node)))


def imported(tree):
    """The ideas of config/ that a file imports, at its top or later."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name[7:] for alias in node.names if alias.name.startswith('config.'))
        elif isinstance(node, ast.ImportFrom) and node.module == 'config':
            yield from (alias.name for alias in node.names if (CONFIG / f'{alias.name}.py').is_file())
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('config.'):
            yield node.module[7:]


class IdeaLoader(importlib.machinery.SourceFileLoader):
    """Executes the code of an idea's file, without its settings."""

    def get_code(self, name):
        tree = ast.parse(self.get_data(self.path), self.path)
        tree.body = [node for node in tree.body if not is_setting(node)]
        return compile(tree, self.path, 'exec', dont_inherit=True)


class IdeaFinder:
    """`from config.my_idea import Run` finds the file of this checkout, whatever else is called config."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        file = CONFIG / f'{name[7:]}.py'
        if name.startswith('config.') and name[7:].isidentifier() and file.is_file():
            return importlib.util.spec_from_file_location(name, file, loader=IdeaLoader(name, str(file)))


sys.meta_path.insert(0, IdeaFinder)


@functools.cache
def table_source(table):
    """The statements of a dataclass, its lines, and where they stand."""
    source, line = inspect.getsourcelines(table)
    return ast.parse(''.join(source)).body[0].body, source, Path(inspect.getfile(table)).name, line


def load_idea(path, text):
    """The module of an idea's file; one that stands elsewhere than in config/ goes by path and content."""
    if path.resolve().parent == CONFIG:
        return importlib.import_module(f'config.{path.stem}')
    name = f'idea_{hashlib.sha256(f"{path.resolve()} {text}".encode()).hexdigest()[:16]}_{path.stem}'
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path, loader=IdeaLoader(name, str(path)))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def verbs(script):
    """{verb: file} of what a script does beyond its baseline: config/<script>_<verb>.py. Its docstring is its help.

    bench: --<verb>, or --<verb>=value, calls main(own, rest, argv) of config/bench_<verb>.py, which declares the
    settings that it adds as an idea does, --<verb> the first. own: bench_mfu.Options and these, own.given those that
    were typed; rest: configs and settings that are train.py's; argv: all that was typed. One that has
    shown(text, rows) adds what it yields, blocks of sample.write_page, to the page of --leaderboard; text: a validation
    text, rows: the runs that were measured on it.
    sample: --<verb> calls main(args, of_ideas) of config/sample_<verb>.py, whose options(add) adds its arguments as
    argparse has them, --<verb> the first; WITH are other verbs that it heeds. args: all that was typed, of_ideas: what ideas and their settings are.
    prepare: --<verb>=value takes config/prepare_<verb>.py in, an idea that declares the setting <verb>.
    export: sample.py --export <verb> calls write(run); one that writes a checkpoint, of a version that is the verb,
    has load(model, state, device) to read it."""
    return {path.stem.removeprefix(f'{script}_'): path for path in sorted(CONFIG.glob(f'{script}_*.py'))}


def verb(script, name):
    """The module of a verb."""
    return load_idea(verbs(script)[name], '')


def docs(script):
    """The docstrings of a script's verbs, none of which is executed."""
    trees = [ast.parse(path.read_text('utf-8')) for path in verbs(script).values()]
    return '\n\n'.join(ast.get_docstring(tree, clean=False).rstrip() for tree in trees)


class Ideas:
    """What configs and --key=value of a command line say: values of settings, and classes for the seams.

    tables: dataclasses whose fields are the settings that exist. A mistake in a config, or several, is one
    UserError that lists all of them, by line. Unless strict, names that no table knows are passed over in
    files: they belong to another script.
    """

    def __init__(self, argv, tables, strict=True, values=()):
        self.strict, self.errors, self.overruled, self.changed = strict, [], [], []
        self.known, self.values, self.set_at, self.declared = {}, dict(values), {}, {}
        self.files, self.named = {}, []          # path: text of what holds code; those to take classes from
        self.seen, self.modules, self.made = set(), [], {}
        for table in tables:
            self.declare_table(table)
        later = []                               # what a config that is yet to come may declare
        for arg in argv:
            if not arg.startswith('-'):
                self.read(Path(arg))
            elif arg.lstrip('-').partition('=')[0] in self.known:
                self.override(arg)
            else:
                later.append(arg)
        for arg in later:
            self.override(arg)
        self.execute()
        count = f'{len(self.errors)} mistake{"s" * (len(self.errors) > 1)} in the settings:'
        refuse(self.errors, '\n  '.join([count] + self.errors))

    def declare_table(self, table):
        nodes, source, file, line = table_source(table)
        for node in nodes:
            if isinstance(node, ast.AnnAssign) and not isinstance(node.value, ast.Call):    # field() is none
                self.declare(node, source, f'{file}:{line + node.lineno - 1}')

    def declare(self, node, lines, where):
        name = node.target.id
        if name in self.known:
            return self.errors.append(f'{where}: {name} is declared already, at {self.known[name].where}: to '
                                      f'set it write {name} = value')
        try:
            setting = Setting.read(node, lines, where, self.values)
        except ValueError as e:
            if self.strict:
                self.errors.append(f'{where}: {name} {e}')
            return None
        self.known[name], self.values[name] = setting, setting.default
        return setting

    def read(self, path, brought=None):
        """Takes in a config; of one that another idea imports, brought, only what it declares."""
        try:
            with path.open(encoding='utf-8-sig') as f:
                text = f.read(MOST + 1)          # a device may have no end
            if len(text) > MOST:
                raise ValueError(f'longer than {MOST >> 20} MiB')
            tree = ast.parse(text)
        except OSError as e:
            why = f', which {brought} imports' if brought else '; is the path right?'
            return self.errors.append(f'{path}: this config cannot be read ({e.strerror}){why}')
        except (SyntaxError, *NO_LITERAL) as e:
            where, why = f'{path}:{getattr(e, "lineno", None) or 1}', getattr(e, 'msg', e)
            return self.errors.append(f'{where}: this is not Python ({why}); a config is lines of name = '
                                      f'value, and code')
        real, lines = path.resolve(), text.split('\n')
        first = real not in self.seen
        self.seen.add(real)
        for name in imported(tree) if first else ():
            self.read(CONFIG / f'{name}.py', brought=path)
        for node in tree.body:
            where = f'{path}:{node.lineno}'
            if not is_setting(node):
                self.errors += [f'{where}: {name} is set by code: a setting is a line name = value of its own'
                                for name in sorted(names_set(node) & self.known.keys())]
            elif isinstance(node, ast.AnnAssign):
                if first and (setting := self.declare(node, lines, where)):
                    self.declared[setting.name] = setting
            elif not brought:
                for target in node.targets:
                    self.assign(target.id, node.value, where)
        if not all(is_setting(node) or is_docstring(node) for node in tree.body):
            self.keep(path, real, text, brought)

    def keep(self, path, real, text, brought):
        """Keeps a file that holds code; a checkpoint will know it by its bare name."""
        twin = next((p for p in self.files if p.stem == real.stem and p != real), None)
        if twin or not real.stem.isidentifier():
            why = f'{twin} is called so too' if twin else 'a checkpoint could not name it'
            self.errors.append(f'{path}:1: {why}: give this file, which holds code, a name like my_idea.py')
        self.files.setdefault(real, text)
        self.named += [path] * (not brought and real not in [p.resolve() for p in self.named])

    def assign(self, name, node, where):
        if name in self.known or self.strict and self.check_name(name, where):
            try:
                value = literal(node, self.values)
            except NO_LITERAL:
                return self.errors.append(f'{where}: the value of {name} must be a literal, or arithmetic on '
                                          f'settings')
            self.set(name, self.known[name].taken(value), where)

    def check_name(self, name, where):
        near = difflib.get_close_matches(name, self.known, 1)
        if name not in self.known:
            near = ''.join(f'; did you mean {n}?' for n in near)
            self.errors.append(f'{where}: no setting is called {name}{near}')
        return name in self.known

    def override(self, arg):
        name, eq, text = arg.lstrip('-').partition('=')
        if not arg.startswith('--') or not eq and getattr(self.known.get(name), 'kind', bool) is not bool:
            return self.errors.append(f'{arg}: an override is written --{name}=value')
        if self.check_name(name, arg):
            self.set(name, self.known[name].typed(text) if eq else True, arg)

    def set(self, name, value, where):
        if wrong := self.known[name].wrong(value):
            return self.errors.append(f'{where}: {name} is {value!r}, it must be {wrong}')
        if name in self.set_at and self.values[name] != value and not where.startswith('--'):
            self.overruled.append(f'{where} sets {name} to {value!r}, {self.set_at[name]} had set it to '
                                  f'{self.values[name]!r}')
        self.values[name], self.set_at[name] = value, where

    def execute(self):
        """Loads the ideas that hold code, and checks that they fit the seams and each other."""
        for path in self.named:
            try:
                module = load_idea(path, self.files[path.resolve()])
            except (Exception, SystemExit) as e:     # whatever somebody's code may throw is a mistake in it
                at = [f'{frame.filename}:{frame.lineno}' for frame in traceback.extract_tb(e.__traceback__)
                      if Path(frame.filename).resolve() in self.files]
                at = at[-1] if at else f'{path}:{getattr(e, "lineno", None) or 1}'
                name = getattr(e, 'name', None) if isinstance(e, ModuleNotFoundError) else None
                missing = f': pip install {name}' if name and not name.startswith('config.') else ''
                self.errors.append(f'{at}: {type(e).__name__} as it is loaded ({in_a_line(e)}){missing}')
                continue
            self.modules.append(module)
            self.check_seams(path, module)
        for module, other in itertools.permutations(self.modules, 2):
            theirs = {file_of(part).stem for part in parts_of(other)}
            refused = [pair for part in parts_of(module) for pair in getattr(part, 'NOT_WITH', {}).items()]
            both = f'{name_of(module)} and {name_of(other)}'
            self.errors += [f'{both} do not go together ({why}): leave one out' for name, why in refused
                            if name in theirs]
        for name in SEAMS:
            self.errors += self.hidden(name)
        self.errors = [*dict.fromkeys(self.errors)]

    def check_seams(self, path, module):
        for name, owner in SEAMS.items():
            base, ours = getattr(sys.modules.get(owner), name, None), getattr(module, name, None)
            if isinstance(ours, type) and (base is None or not issubclass(ours, base)):
                line = line_of(ours) if ours.__module__ == module.__name__ else 1
                self.errors.append(f'{path}:{line}: class {name} has the name of a seam and does not derive '
                                   f'from it: write class {name}({owner}.{name}), or call it otherwise')

    def tops(self, name):
        """The ideas' classes of a seam, the later first, without those that another one builds on."""
        base = getattr(sys.modules.get(SEAMS[name]), name, None)
        classes = dict.fromkeys(getattr(module, name, base) for module in reversed(self.modules))
        classes = [c for c in classes if isinstance(c, type) and c is not base and issubclass(c, base or c)]
        return [c for c in classes if not any(other is not c and issubclass(other, c) for other in classes)]

    def seam(self, base):
        """What stands in the place of a seam in this run."""
        tops = self.tops(base.__name__)
        if base not in self.made:
            names = {'__module__': 'stack', '__doc__': tops[0].__doc__ if tops else None}
            self.made[base] = type(base.__name__, tuple(tops), names) if len(tops) > 1 else [*tops, base][0]
        return self.made[base]

    def hidden(self, name):
        """A sentence for each method of two ideas where the one that comes first never calls the other's."""
        tops = self.tops(name)
        if len(tops) < 2:
            return []
        base = getattr(sys.modules[SEAMS[name]], name)
        try:
            stack = type(name, tuple(tops), {}).__mro__[1:]
            classes = [c for c in stack if issubclass(c, base) and c is not base]
        except TypeError as e:
            return [f'{" and ".join(name_of(c) for c in tops)} cannot be stacked ({in_a_line(e)}): leave one '
                    f'out']
        said = []
        for first, other in itertools.combinations(classes, 2):
            both = () if issubclass(first, other) else sorted(vars(first).keys() & vars(other).keys())
            for method in [m for m in both if not calls_super(vars(first)[m])]:
                who = f'{name_of(first)} and {name_of(other)} both'
                swap = f' or name {name_of(first)} first' * calls_super(vars(other)[method])
                said.append(f'{who} replace {name}.{method}: leave one out{swap}' if hasattr(base, method)
                            else f'{who} add a method {name}.{method}: rename one')
        return said

    def sources(self):
        """[(bare name, sha256, whether it was named, not only imported)] of all files with code."""
        named = [path.resolve() for path in self.named]
        return [(path.stem, hashlib.sha256(text.encode()).hexdigest(), path in named)
                for path, text in self.files.items()]


def in_a_line(error):
    return ' '.join(str(error).split())


def plain(thing):
    """The function that a method, property or decorated function is made of; other things as they are."""
    return inspect.unwrap(getattr(thing, '__func__', None) or getattr(thing, 'fget', None) or thing)


def calls_super(function):
    code = getattr(plain(function), '__code__', None)
    return code is None or '__class__' in code.co_freevars


def parts_of(module):
    """An idea's module, and those of the ideas that its classes of a seam build on."""
    classes = [c for name in SEAMS for c in getattr(getattr(module, name, None), '__mro__', ())]
    modules = {id(m): m for m in [module, *(sys.modules.get(c.__module__) for c in classes)] if m}
    return [m for m in modules.values() if m.__name__.startswith(('config.', 'idea_'))]


def file_of(thing):
    """The file of a module, or of a class's."""
    return Path(getattr(thing, '__file__', None) or sys.modules[thing.__module__].__file__)


def name_of(thing):
    path = file_of(thing)
    here = {CONFIG: f'config/{path.name}', Path(__file__).resolve().parents[1]: path.name}
    return here.get(path.resolve().parent, str(path))


def shown(ideas):
    """What a run is made of, as text: classes of every seam, settings that differ, what each idea changes."""
    bases = [base for name, owner in SEAMS.items() if (base := getattr(sys.modules.get(owner), name, None))]
    lines, diffs = ['classes, the first before those that it builds on'], []
    for base in bases:
        chain = [c for c in ideas.seam(base).__mro__ if issubclass(c, base) and c.__module__ != 'stack']
        lines.append(f'    {base.__name__:10}' + '  <  '.join(place_of(c) for c in chain))
        for c in chain[:-1]:
            diffs += [difference(c, base, name) for name in vars(c) if source_of(vars(c)[name])[0]]
    lines.append('settings that differ from the defaults, and those of the ideas')
    for name, setting in ideas.known.items():
        if (value := ideas.values[name]) != setting.default or name in ideas.declared:
            where = f'{ideas.set_at.get(name, setting.where)}'
            lines.append(f'    {name} = {value!r}'.ljust(46) + f'  {where}, default {setting.default!r}')
    return '\n'.join([*lines, *(f'\n{diff}' for diff in diffs)])


def line_of(thing):
    try:
        return inspect.getsourcelines(thing)[1]
    except RecursionError:                       # of a class: what nests deep in its file
        return 1


@functools.cache
def place_of(thing):
    """File and line of a class or a function."""
    return f'{name_of(thing)}:{line_of(thing)}'


def source_of(thing):
    """The lines of a method, its decorators too, and the function it is made of; of other things none."""
    function = plain(thing)
    if not isinstance(function, types.FunctionType):
        return [], function
    return textwrap.dedent(inspect.getsource(function)).splitlines(), function


def difference(cls, base, name):
    """A unified diff of what an idea's class makes of a method of the baseline, or all of a new one."""
    known = [vars(c)[name] for c in base.__mro__ if c.__module__ == base.__module__ and name in vars(c)]
    (new, function), (old, before) = source_of(vars(cls)[name]), source_of(known[0]) if known else ([], None)
    method = f'{base.__name__}.{name}'
    was = f'{place_of(before)} {method}' if old else f'{method} is new'
    return '\n'.join(difflib.unified_diff(old, new, was, f'{place_of(function)} {method}', lineterm=''))


def ideas_of(recorded, settings, argv=(), here=()):
    """The ideas that a checkpoint names, as Ideas.sources has them: from the paths in argv, else from those `here`, else
    from this checkout's config/, never from the checkpoint. Their `changed` lists those whose text is another now."""
    options = [arg for arg in argv if arg.startswith('-')]
    named, paths = [name for name, _, named in recorded if named], {
        Path(arg).stem: arg for arg in argv if arg not in options}
    paths = {path.stem: path for path in map(Path, here) if path.stem in named} | paths
    for name in [name for name, *_ in recorded]:
        refuse(not re.fullmatch(r'[A-Za-z_]\w*', name), f'the checkpoint names an idea {name!r}, which is no '
               f'bare name of a file in config/: it is not loaded')
        refuse(name not in paths and not (CONFIG / f'{name}.py').is_file(), f'the run was made with '
               f'{name}.py, and config/ has no such file: put it there, or name its path too')
    files = [paths.pop(name, CONFIG / f'{name}.py') for name in named] + [*paths.values()]
    ideas = Ideas([*map(str, files), *options], [], strict=False, values=settings)
    now = {name: digest for name, digest, _ in ideas.sources()}
    ideas.changed = [name for name, digest, _ in recorded if now.get(name) != digest]
    return ideas

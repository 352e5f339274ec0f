"""STAND-IN, to be deleted with the line of sample.py that imports it: the loader of ideas (prepare_data.Ideas, ideas_of)
and model.configured as they are being written elsewhere, over the model and the trainer as they still are."""
import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import math
import operator
import re
import sys
import traceback
import types
from dataclasses import dataclass
from pathlib import Path

import model
import prepare_data
from prepare_data import UserError

# ----------------------------------------------------------------------------------------------------
# Configs and ideas. A config is a file of settings; an idea is one that holds code too, classes that derive from the
# seams of the scripts and take their places in this run. Settings are read, never executed: name = value sets one that
# exists, name: type = value declares one, with its legal values and what it is in the comment behind.

CONFIG = Path(__file__).resolve().parent / 'config'
SEAMS = dict(GPT='model', Block='model', Attention='model', MLP='model', Corpus='prepare_data', Measure='sample',
             Stream='train', Run='train')
KINDS_OF_SETTING = dict(int=int, float=float, str=str, bool=bool, tuple=tuple)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow, ast.USub: operator.neg}
LEGAL = re.compile(r'(?:(-?[\d.]*\d)?\.\.(-?\d[\d.]*)?|([\w.+-]*(?:\|[\w.+-]*)+)): ')      # 0..1, 1.., one|two


def refuse(wrong, why):
    """End with a sentence to the user where something is wrong."""
    if wrong:
        raise UserError(why)


def literal(node, names):
    """The value of a syntax tree of literals, names, arithmetic on numbers and dict(); else ValueError."""
    value = functools.partial(literal, names=names)
    match node:
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            left, right = value(left), value(right)
            if isinstance(op, ast.Pow) and abs(right) > 64:
                raise ValueError
            return OPERATORS[type(op)](left, right)
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](value(operand))
        case ast.Tuple(rows) | ast.List(rows):
            return tuple(map(value, rows))
        case ast.Call(ast.Name('dict'), [], pairs):
            return {pair.arg: value(pair.value) for pair in pairs}
        case ast.Name(name) if name in names:
            return names[name]
    return ast.literal_eval(node)


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
        except (ValueError, TypeError, ArithmeticError):
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
        except (ValueError, SyntaxError, TypeError, ArithmeticError):
            return text

    def wrong(self, value):
        """What a value must be, if it is not; else ''."""
        if type(value) is not self.kind:
            shown = ', '.join(self.choices) or repr(self.default)
            return f'one of {shown}' if self.choices else f'{self.kind.__name__}, like {shown}'
        if self.choices and value not in self.choices:
            return f'one of {", ".join(self.choices)}'
        if self.kind is float and not math.isfinite(value):
            return 'finite'
        if self.kind in (int, float) and not self.low <= value <= self.high:
            return f'at least {self.low:g}' + f' and at most {self.high:g}' * (self.high < math.inf)
        return ''


def is_setting(node):
    """Whether a line of a config is a setting, not code: UPPER_CASE names are code."""
    target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, 'targets', [None])[0]
    return isinstance(target, ast.Name) and not target.id.isupper()


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


class IdeaLoader(importlib.machinery.SourceFileLoader):
    """Executes the code of an idea's file, without its settings."""

    def get_code(self, name):
        tree = ast.parse(self.get_data(self.path), self.path)
        tree.body = [node for node in tree.body if not is_setting(node)]
        return compile(tree, self.path, 'exec', dont_inherit=True)


class IdeaFinder:
    """`from config.growth import Run` finds the file of this checkout, whatever else is called config."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        file = CONFIG / f'{name[7:]}.py'
        if name.startswith('config.') and name[7:].isidentifier() and file.is_file():
            return importlib.util.spec_from_file_location(name, file, loader=IdeaLoader(name, str(file)))


sys.meta_path.insert(0, IdeaFinder)
sys.modules['config'] = types.ModuleType('config', 'The ideas of this checkout, a module each.')
sys.modules['config'].__path__ = []


def load_idea(path, text):
    """The module of an idea's file; one that stands elsewhere than in config/ is known by its content."""
    if path.resolve().parent == CONFIG:
        return importlib.import_module(f'config.{path.stem}')
    name = f'idea_{hashlib.sha256(text.encode()).hexdigest()[:16]}_{path.stem}'
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path, loader=IdeaLoader(name, str(path)))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


class Ideas:
    """What configs and --key=value of a command line say: values of settings, and classes for the seams.

    tables: dataclasses whose fields are the settings that exist. A mistake in a config, or several, is one UserError
    that lists all of them, by line. Unless strict, names that no table knows are passed over in files: they belong
    to another script.
    """

    def __init__(self, argv, tables, strict=True, values=()):
        self.strict, self.errors, self.overruled, self.changed = strict, [], [], []
        self.known, self.values, self.set_at, self.declared = {}, dict(values), {}, {}
        self.files, self.named = {}, []          # path: text of all that holds code; those to take classes from
        self.seen, self.modules, self.made = set(), [], {}
        for table in tables:
            self.declare_table(table)
        for arg in argv:
            if not arg.startswith('-'):
                self.read(Path(arg))
        for arg in argv:
            if arg.startswith('-'):
                self.override(arg)
        if not self.errors:
            self.execute()
        count = f'{len(self.errors)} mistake{"s" * (len(self.errors) > 1)} in the settings:'
        refuse(self.errors, '\n  '.join([count] + self.errors))

    def declare_table(self, table):
        source, line = inspect.getsourcelines(table)
        tree, file = ast.parse(''.join(source)), Path(inspect.getfile(table)).name
        for node in tree.body[0].body:
            if isinstance(node, ast.AnnAssign):
                self.declare(node, source, f'{file}:{line + node.lineno - 1}')

    def declare(self, node, lines, where):
        name = node.target.id
        if name in self.known:
            return self.errors.append(f'{where}: {name} is declared already, at {self.known[name].where}: to set it '
                                      f'write {name} = value')
        try:
            setting = Setting.read(node, lines, where, self.values)
        except ValueError as e:
            if self.strict:
                self.errors.append(f'{where}: {name} {e}')
            return None
        self.known[name], self.values[name] = setting, setting.default
        return setting

    def read(self, path, brought=False):
        """Takes in a config; of one that another idea imports (brought) only what it declares."""
        try:
            text = path.read_text(encoding='utf-8-sig')
            tree = ast.parse(text)
        except OSError as e:
            return self.errors.append(f'{path}: this config cannot be read ({e.strerror}); is the path right?')
        except (SyntaxError, ValueError) as e:
            where = f'{path}:{getattr(e, "lineno", None) or 1}'
            return self.errors.append(f'{where}: this is not Python; a config is lines of name = value, and code')
        real, lines = path.resolve(), text.splitlines()
        first = real not in self.seen
        self.seen.add(real)
        for node in tree.body:
            where = f'{path}:{node.lineno}'
            match node:
                case ast.AnnAssign(ast.Name(name)) if not name.isupper():
                    if first and (setting := self.declare(node, lines, where)):
                        self.declared[name] = setting
                case ast.Assign([ast.Name(name)], value) if not name.isupper():
                    if not brought:
                        self.assign(name, value, where)
                case ast.ImportFrom(module) if (module or '').startswith('config.') and first:
                    self.read(CONFIG / f'{module[7:]}.py', brought=True)
        if not all(is_setting(node) or is_docstring(node) for node in tree.body):
            self.files.setdefault(real, text)
            self.named += [path] * (not brought and real not in [p.resolve() for p in self.named])

    def assign(self, name, node, where):
        if name in self.known or self.strict and self.check_name(name, where):
            try:
                value = literal(node, self.values)
            except (ValueError, TypeError, ArithmeticError):
                return self.errors.append(f'{where}: the value of {name} must be a literal, or arithmetic on settings')
            self.set(name, self.known[name].taken(value), where)

    def check_name(self, name, where):
        near = difflib.get_close_matches(name, self.known, 1)
        if name not in self.known:
            self.errors.append(f'{where}: no setting is called {name}' + ''.join(f'; did you mean {n}?' for n in near))
        return name in self.known

    def override(self, arg):
        name, eq, text = arg.lstrip('-').partition('=')
        if not arg.startswith('--') or not eq and getattr(self.known.get(name), 'kind', bool) is not bool:
            return self.errors.append(f'{arg}: an override is written --{name}=value')
        if self.check_name(name, arg):
            self.set(name, self.known[name].typed(text) if eq else True, arg)

    def set(self, name, value, where):
        if wrong := self.known[name].wrong(value):
            self.errors.append(f'{where}: {name} is {value!r}, it must be {wrong}')
        elif name in self.set_at and self.values[name] != value and not where.startswith('--'):
            self.overruled.append(f'{where} sets {name} to {value!r}, {self.set_at[name]} had set it to '
                                  f'{self.values[name]!r}')
        self.values[name], self.set_at[name] = value, where

    def execute(self):
        """Loads the ideas that hold code, and checks that they fit the seams and each other."""
        for path in self.named:
            try:
                module = load_idea(path, self.files[path.resolve()])
            except Exception as e:               # whatever somebody's code may throw is a mistake in it
                at = [frame.lineno for frame in traceback.extract_tb(e.__traceback__)
                      if Path(frame.filename).resolve() == path.resolve()]
                missing = f': pip install {e.name}' if isinstance(e, ModuleNotFoundError) and e.name else ''
                self.errors.append(f'{path}:{at[-1] if at else getattr(e, "lineno", None) or 1}: {type(e).__name__} as '
                                   f'it is loaded ({e}){missing}')
                continue
            self.modules.append(module)
            self.check_seams(path, module)
        for module, other in itertools.permutations(self.modules, 2):
            if why := getattr(module, 'NOT_WITH', {}).get(file_of(other).stem):
                self.errors.append(f'{name_of(module)} and {name_of(other)} do not go together ({why}): leave one out')
        for name in SEAMS:
            self.errors += self.hidden(name)

    def check_seams(self, path, module):
        for name, owner in SEAMS.items():
            base, ours = getattr(sys.modules.get(owner), name, None), getattr(module, name, None)
            if isinstance(ours, type) and (base is None or not issubclass(ours, base)):
                line = inspect.getsourcelines(ours)[1] if ours.__module__ == module.__name__ else 1
                self.errors.append(f'{path}:{line}: class {name} has the name of a seam and does not derive from it: '
                                   f'write class {name}({owner}.{name}), or call it otherwise')

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
            self.made[base] = (type(base.__name__, tuple(tops), {'__module__': 'stack', '__doc__': tops[0].__doc__})
                               if len(tops) > 1 else [*tops, base][0])
        return self.made[base]

    def hidden(self, name):
        """A sentence for each method that two ideas replace where the one that comes first never calls the other's."""
        tops = self.tops(name)
        if len(tops) < 2:
            return []
        base = getattr(sys.modules[SEAMS[name]], name)
        try:
            classes = [c for c in type(name, tuple(tops), {}).__mro__[1:] if issubclass(c, base) and c is not base]
        except TypeError as e:
            return [f'{" and ".join(name_of(c) for c in tops)} cannot be stacked ({e}): leave one out']
        said = []
        for first, other in itertools.combinations(classes, 2):
            both = vars(first).keys() & vars(other).keys() & set(dir(base))
            for method in sorted(m for m in both if not issubclass(first, other) and not calls_super(vars(first)[m])):
                swap = f' or name {name_of(first)} first' * calls_super(vars(other)[method])
                if callable(getattr(vars(first)[method], '__func__', vars(first)[method])):
                    said.append(f'{name_of(first)} and {name_of(other)} both replace {name}.{method}: leave one out{swap}')
        return said

    def sources(self):
        """[(bare name, sha256, whether it was named, not only imported)] of all files with code in this run."""
        named = [path.resolve() for path in self.named]
        return [(path.stem, hashlib.sha256(text.encode()).hexdigest(), path in named) for path, text in self.files.items()]


def calls_super(function):
    code = getattr(getattr(function, '__func__', function), '__code__', None)
    return code is None or '__class__' in code.co_freevars


def file_of(thing):
    """The file of a module, or of a class's."""
    return Path(getattr(thing, '__file__', None) or sys.modules[thing.__module__].__file__)


def name_of(thing):
    path = file_of(thing)
    return f'{path.parent.name}/{path.name}' if path.parent == CONFIG else str(path)


def ideas_of(recorded, settings, argv=()):
    """The ideas that a checkpoint names, as Ideas.sources has them: from the paths in argv, else from this checkout's
    config/, never from the checkpoint. Their `changed` lists those whose text is another now."""
    named, paths = [name for name, _, named in recorded if named], {Path(arg).stem: arg for arg in argv}
    for name in [name for name, *_ in recorded]:
        refuse(not re.fullmatch(r'[A-Za-z_]\w*', name), f'the checkpoint names an idea {name!r}, which is no bare name of '
               f'a file in config/: it is not loaded')
        refuse(name not in paths and not (CONFIG / f'{name}.py').is_file(), f'the run was made with {name}.py, and config/ '
               f'has no such file: put it there, or name its path too')
    files = [paths.pop(name, CONFIG / f'{name}.py') for name in named] + [*paths.values()]
    ideas = Ideas([*map(str, files)], [], strict=False, values=settings)
    now = {name: digest for name, digest, _ in ideas.sources()}
    ideas.changed = [name for name, digest, _ in recorded if now.get(name) != digest]
    return ideas


def configured(ideas):
    """GPTConfig with what ideas declare as further fields, and their classes."""
    fields = [(name, setting.kind, setting.default) for name, setting in ideas.declared.items()]
    return dataclasses.make_dataclass('GPTConfig', fields, bases=(model.GPTConfig,), namespace=dict(GPT=ideas.seam(model.GPT)))


model.GPTConfig.GPT = model.GPT
if not hasattr(model, 'configured'):
    model.configured = configured
if not hasattr(prepare_data, 'Ideas'):
    prepare_data.Ideas, prepare_data.ideas_of, prepare_data.refuse = Ideas, ideas_of, refuse

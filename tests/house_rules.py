"""The house rules that a program can check: each reads one module and yields `path:line: what is wrong`."""

import ast
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("schemas", "connectors", "streams")
FILE_LINES_MAX, FUNCTION_LINES_MAX = 400, 60
TEST_FILE_LINES_MAX = 700
"""Tests of one thing are a list, which is as long as the thing has ways to be."""

LONG_FILES: dict[str, int] = {
    "streams/engine.py": 475,
}
LONG_FUNCTIONS: dict[str, int] = {"streams/judge.py:_admit": 75}
"""The ratchet: what is longer than the ceiling, and how long it may be. Under the ceiling it leaves the list."""

ENTRIES = {
    "tollway.streams.console": "the console script",
    "tollway.schemas.money": "for services that price their calls",
    "tollway.connectors.fastmcp": "for services on fastmcp",
    "tollway.connectors.stripe_sink": "for services without the pipeline",
}
"""Modules that nothing of ours imports, and who does."""

FLOATS: dict[str, str] = {}
"""path:name of a function → why a float or a division may stand beside a word of money there."""

SLEEPS: dict[str, str] = {"tests/prove_kills.py": "kills come at random moments"}
"""path → why it may sleep."""


@dataclass
class Module:
    """One source file: `path` from the root."""

    path: str
    text: str
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text)

    @property
    def layer(self) -> str:
        return self.path.partition("/")[0]

    @property
    def name(self) -> str:
        dotted = self.path.removesuffix(".py").replace("/", ".")
        return ("tollway." + dotted if self.layer in LAYERS else dotted).removesuffix(".__init__")


Rule = Callable[[Module], Iterator[str]]


@cache
def sources(*folders: str) -> list[Module]:
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [Module(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def imported(module: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, anywhere in the file; `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def one_way(module: Module) -> Iterator[str]:
    """schemas ← connectors ← streams, and nothing of ours imports tests or benchmarks."""
    if module.layer not in LAYERS:
        return
    behind = LAYERS[LAYERS.index(module.layer) + 1 :]
    for line, name in imported(module):
        parts = name.split(".")
        if (parts[0] == "tollway" and parts[1:2] and parts[1] in behind) or parts[0] in ("tests", "benchmarks"):
            yield f"{module.path}:{line}: {module.layer} imports {name}"


def no_bare_layers(module: Module) -> Iterator[str]:
    """`import schemas` is a second copy of tollway.schemas."""
    for line, name in imported(module):
        if name.split(".")[0] in LAYERS:
            yield f"{module.path}:{line}: {name}: write tollway.{name}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{module.path}:{node.lineno}: a relative import: write tollway.…"


MONEY_WORDS = {"nano", "amount", "amounts", "price", "prices", "cost", "costs", "revenue", "units", "money"}


def of_money(name: str) -> bool:
    return not MONEY_WORDS.isdisjoint(name.lower().split("_"))


def own_nodes(statement: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a statement without those of the statements in its body."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield child
            yield from own_nodes(child)


def inexact(node: ast.AST) -> bool:
    """A float literal, the type float, or a division that is not of paths or texts."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return not any(isinstance(side, ast.JoinedStr) or text_of(side) is not None for side in (node.left, node.right))
    if isinstance(node, ast.Constant):
        return isinstance(node.value, float)
    return isinstance(node, ast.Name) and node.id == "float"


def text_of(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def no_float_near_money(module: Module) -> Iterator[str]:
    """No float literal, `float` or `/` in a function, or in a statement, that speaks of money or units."""

    def visit(node: ast.AST, functions: tuple[str, ...]) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions = (*functions, node.name)
        for statement in ast.iter_child_nodes(node):
            if isinstance(statement, ast.stmt):
                yield from judge(statement, functions)
            yield from visit(statement, functions)

    def judge(statement: ast.stmt, functions: tuple[str, ...]) -> Iterator[str]:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*statement.args.posonlyargs, *statement.args.args, *statement.args.kwonlyargs]
            groups: list[tuple[bool, list[ast.AST]]] = [
                (of_money(a.arg), list(ast.walk(a.annotation)) if a.annotation else []) for a in arguments
            ]
            groups.append((of_money(statement.name), list(ast.walk(statement.returns)) if statement.returns else []))
            defaults = [d for d in (*statement.args.defaults, *statement.args.kw_defaults) if d]
            groups.append((of_money(statement.name), [n for d in defaults for n in ast.walk(d)]))
        else:
            nodes = list(own_nodes(statement))
            names = [n.id for n in nodes if isinstance(n, ast.Name)]
            names += [n.attr for n in nodes if isinstance(n, ast.Attribute)]
            names += [n.arg for n in nodes if isinstance(n, ast.keyword) and n.arg]
            names += [text for n in nodes if (text := text_of(n)) and re.fullmatch(r"\w+", text)]
            groups = [(any(map(of_money, (*names, *functions))), nodes)]
        for near, nodes in groups:
            if near and any(map(inexact, nodes)) and f"{module.path}:{'.'.join(functions)}" not in FLOATS:
                yield f"{module.path}:{statement.lineno}: a float or a division near money in {functions or 'the module'}"

    if module.layer in LAYERS:
        yield from visit(module.tree, ())


def no_waiting_by_the_clock(module: Module) -> Iterator[str]:
    """Tests never sleep; what drives a campaign sleeps only inside a `while` that looks whether its condition holds."""
    if module.layer != "tests":
        return
    polled = {id(inner) for node in ast.walk(module.tree) if isinstance(node, ast.While) for inner in ast.walk(node)}
    strict = Path(module.path).name.startswith(("test_", "conftest"))
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call) or module.path in SLEEPS:
            continue
        called = ast.unparse(node.func)
        slept = called in ("time.sleep", "sleep") or (called == "asyncio.sleep" and ast.unparse(node.args[0]) != "0")
        if slept and (id(node) not in polled or (strict and called != "asyncio.sleep")):
            yield f"{module.path}:{node.lineno}: {called}: wait for a condition with a deadline"


def no_mocks(module: Module) -> Iterator[str]:
    """Real parts and arguments, no stand-ins of our own code; a CONSTANT may be set small enough to be reached."""
    for line, name in imported(module):
        if "mock" in name.lower().split("."):
            yield f"{module.path}:{line}: {name}: use the real part, or an argument"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "monkeypatch.setattr":
            name = text_of(node.args[1]) if len(node.args) > 2 else None
            if not (name and name.isupper()):
                yield f"{module.path}:{node.lineno}: monkeypatch.setattr: make it an argument"


def unfinished_words() -> re.Pattern[str]:
    """Spelt so that this file does not hold them."""
    words = [
        "TO" + "DO",
        "FIX" + "ME",
        "XX" + "X",
        "HA" + "CK",
        "NotImplemented" + "Error",
        "place" + "holder",
        "for" + " now",
    ]
    return re.compile(rf"\b({'|'.join(words)})\b")


def finished(module: Module) -> Iterator[str]:
    """What is not done is not in the code."""
    for number, line in enumerate(module.text.splitlines(), 1):
        if found := unfinished_words().search(line):
            yield f"{module.path}:{number}: {found[0]}"


def no_banners(module: Module) -> Iterator[str]:
    """A file that needs section banners is two files."""
    for number, line in enumerate(module.text.splitlines(), 1):
        if re.match(r"\s*#\s*[-=─━*#~]{3,}", line):
            yield f"{module.path}:{number}: a banner: split the file, or let the names speak"


def no_swallowed_failures(module: Module) -> Iterator[str]:
    """Whoever catches everything does something about it."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = (
                {"everything"}
                if node.type is None
                else {part.strip("() ") for part in ast.unparse(node.type).split(",")}
            )
            idle = all(
                isinstance(s, ast.Pass | ast.Continue)
                or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
                for s in node.body
            )
            if idle and caught & {"everything", "Exception", "BaseException"}:
                yield f"{module.path}:{node.lineno}: a failure is swallowed: name what is expected, or let it rise"


MACHINE_PATH = re.compile(r"(^|[^\w.\-])/(home|root|Users|mnt|srv|work)/[A-Za-z]")


def no_machine_paths(path: str, text: str) -> Iterator[str]:
    """Nothing says where one machine keeps its files."""
    for number, line in enumerate(text.splitlines(), 1):
        if MACHINE_PATH.search(line):
            yield f"{path}:{number}: a path of one machine"


def no_machine_paths_in_code(module: Module) -> Iterator[str]:
    yield from no_machine_paths(module.path, module.text)


def short(module: Module) -> Iterator[str]:
    """Files and functions keep under their ceilings; the listed ones may only shrink."""
    lines = len(module.text.splitlines())
    most = TEST_FILE_LINES_MAX if module.layer == "tests" else FILE_LINES_MAX
    yield from ratchet(module.path, lines, most, LONG_FILES)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            yield from ratchet(f"{module.path}:{node.name}", length, FUNCTION_LINES_MAX, LONG_FUNCTIONS)


def ratchet(what: str, lines: int, most: int, listed: dict[str, int]) -> Iterator[str]:
    if lines > listed.get(what, most):
        yield f"{what} has {lines} lines, {listed.get(what, most)} are allowed: it is more than one idea"
    elif what in listed and lines <= most:
        yield f"{what} has {lines} lines: take it off the list of long ones"


def said_what_for(module: Module) -> Iterator[str]:
    """A module says what it is in a docstring; a test says the truth that it proves."""
    if not ast.get_docstring(module.tree) and module.text.strip():
        yield f"{module.path}: no docstring"
    if Path(module.path).name.startswith("test_"):
        functions = [node for node in module.tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for node in functions:
            if node.name.startswith("test_") and not ast.get_docstring(node):
                yield f"{module.path}:{node.lineno}: {node.name} does not say what it proves"


def unused(modules: list[Module], entries: Container[str]) -> list[str]:
    """Modules that no other one imports or starts by name."""
    reached: set[str] = set()
    for module in modules:
        names = {name for _, name in imported(module)}
        names |= {text for node in ast.walk(module.tree) if (text := text_of(node))}
        reached |= names - {module.name, Path(module.path).name}
    left = [
        module
        for module in modules
        if module.name not in entries and module.name not in reached and Path(module.path).name not in reached
    ]
    return [module.path for module in left if not module.path.endswith("__init__.py")]


RULES: list[Rule] = [
    one_way, no_bare_layers, no_float_near_money, no_waiting_by_the_clock, no_mocks, finished, no_banners,
    no_swallowed_failures, no_machine_paths_in_code, short, said_what_for,
]  # fmt: skip

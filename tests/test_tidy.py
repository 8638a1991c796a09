"""The code about the code: each house rule reads every file, and is itself shown a bad line that it must refuse."""

import pytest

from tests.house_rules import (
    ENTRIES,
    FILE_LINES_MAX,
    FLOATS,
    FUNCTION_LINES_MAX,
    LAYERS,
    LONG_FILES,
    LONG_FUNCTIONS,
    ROOT,
    RULES,
    SLEEPS,
    TEST_FILE_LINES_MAX,
    Module,
    Rule,
    finished,
    no_banners,
    no_bare_layers,
    no_float_near_money,
    no_machine_paths,
    no_machine_paths_in_code,
    no_mocks,
    no_swallowed_failures,
    no_waiting_by_the_clock,
    one_way,
    ratchet,
    said_what_for,
    short,
    sources,
    unused,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(rule: Rule) -> None:
    """Every file of ours, tests and benchmarks too, keeps the rule."""
    faults = [fault for module in sources(*LAYERS, "src/tollway", "tests", "benchmarks") for fault in rule(module)]
    assert not faults, "\n".join(faults)


BAD: list[tuple[Rule, str, str]] = [
    (one_way, "schemas/a.py", "import tollway.connectors.kafka"),
    (one_way, "schemas/a.py", "def f():\n    from tollway import streams"),
    (one_way, "connectors/a.py", "from tollway.streams.batch import Batch"),
    (one_way, "streams/a.py", "from tests.oracle import read"),
    (no_bare_layers, "streams/a.py", "import schemas.usage"),
    (no_bare_layers, "tests/a.py", "from connectors import kafka"),
    (no_bare_layers, "streams/a.py", "from .batch import Batch"),
    (no_float_near_money, "streams/a.py", "cost_nano = 0.5"),
    (no_float_near_money, "streams/a.py", "def f(row):\n    return float(row.units)"),
    (no_float_near_money, "streams/a.py", "def f(row):\n    return row['revenue_nano'] / 10"),
    (no_float_near_money, "streams/a.py", "def price(row):\n    share = row.a / row.b"),
    (no_float_near_money, "streams/a.py", "def price(row) -> float: ..."),
    (no_float_near_money, "schemas/a.py", "def f(amount_nano: float): ..."),
    (no_float_near_money, "schemas/a.py", "class A:\n    price: float | None"),
    (no_float_near_money, "connectors/a.py", "send(units=1e9)"),
    (no_float_near_money, "connectors/a.py", "if units / 2:\n    pass"),
    (no_waiting_by_the_clock, "tests/test_a.py", "while not ready():\n    time.sleep(0.1)"),
    (no_waiting_by_the_clock, "tests/test_a.py", "async def f():\n    await asyncio.sleep(0.1)"),
    (no_waiting_by_the_clock, "tests/a.py", "time.sleep(0.1)"),
    (no_mocks, "tests/a.py", "from unittest.mock import patch"),
    (no_mocks, "tests/a.py", "from unittest import mock"),
    (no_mocks, "tests/a.py", "def test_a(monkeypatch):\n    monkeypatch.setattr(m, 'now', lambda: 1)"),
    (no_mocks, "tests/a.py", "def test_a(monkeypatch):\n    monkeypatch.setattr('tollway.streams.a.NOW', 1)"),
    (finished, "streams/a.py", "x = 1  # TO" + "DO later"),
    (finished, "streams/a.py", "raise NotImplemented" + "Error"),
    (no_banners, "streams/a.py", "# ---- reading ----"),
    (no_swallowed_failures, "streams/a.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (no_swallowed_failures, "streams/a.py", "try:\n    f()\nexcept:\n    ..."),
    (no_swallowed_failures, "streams/a.py", "for a in b:\n    try:\n        f()\n    except (OSError, Exception):\n        continue"),
    (no_machine_paths_in_code, "streams/a.py", "DATA = '/ho" + "me/me/data'"),
    (short, "streams/a.py", "x = 1\n" * (FILE_LINES_MAX + 1)),
    (short, "tests/a.py", "x = 1\n" * (TEST_FILE_LINES_MAX + 1)),
    (short, "streams/a.py", "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX),
    (said_what_for, "streams/a.py", "x = 1"),
    (said_what_for, "tests/test_a.py", '"""A."""\ndef test_b():\n    assert True'),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "path", "text"), BAD, ids=[f"{row[0].__name__}-{i}" for i, row in enumerate(BAD)])
def test_the_rule_refuses_a_bad_line(rule: Rule, path: str, text: str) -> None:
    """A rule that nothing breaks would prove nothing: each is shown what it must refuse."""
    found = list(rule(Module(path, text)))
    assert found
    assert all(fault.startswith(path) for fault in found)


GOOD: list[tuple[Rule, str, str]] = [
    (one_way, "connectors/a.py", "from tollway.schemas import usage"),
    (one_way, "tests/a.py", "from tollway.streams import batch"),
    (no_bare_layers, "streams/a.py", "import tollway.schemas.usage"),
    (no_float_near_money, "streams/a.py", "def f(cost_nano: int, timeout_s: float = 0.5) -> int:\n    return cost_nano // 2"),
    (no_float_near_money, "streams/a.py", "if units:\n    share = 0.5"),
    (no_float_near_money, "streams/a.py", "page = folder / 'prices.json'"),
    (no_waiting_by_the_clock, "tests/test_a.py", "ready.wait(5)"),
    (no_waiting_by_the_clock, "tests/test_a.py", "async def f():\n    while not ready():\n        await asyncio.sleep(0.05)"),
    (no_waiting_by_the_clock, "tests/a.py", "while not ready():\n    time.sleep(0.1)"),
    (no_mocks, "tests/a.py", "def test_a(monkeypatch):\n    monkeypatch.setattr(m, 'ROWS_MAX', 3)"),
    (no_swallowed_failures, "streams/a.py", "try:\n    f()\nexcept FileNotFoundError:\n    pass"),
    (no_banners, "streams/a.py", "# - a list\nx = 1  # why --- because"),
    (said_what_for, "tests/a.py", '"""A."""\ndef put():\n    pass'),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "path", "text"), GOOD, ids=[f"{row[0].__name__}-{i}" for i, row in enumerate(GOOD)])
def test_the_rule_lets_a_good_line_pass(rule: Rule, path: str, text: str) -> None:
    """A rule that cries at everything would be switched off."""
    assert list(rule(Module(path, text))) == []


def test_the_ratchet_only_turns_one_way() -> None:
    """What is listed as long may shrink, not grow, and leaves the list when it is short enough."""
    assert list(ratchet("a.py", 500, 400, {"a.py": 500})) == []
    assert list(ratchet("a.py", 501, 400, {"a.py": 500}))
    assert list(ratchet("a.py", 400, 400, {"a.py": 500}))


def test_the_lists_name_what_is_there() -> None:
    """An exception for what is gone is taken off its list."""
    for what in (*LONG_FILES, *LONG_FUNCTIONS, *FLOATS, *SLEEPS):
        path, _, name = what.partition(":")
        assert (ROOT / path).is_file(), what
        assert name.split(".")[-1] in (ROOT / path).read_text(encoding="utf-8"), what


def test_every_module_is_used() -> None:
    """Each module is imported or started by another one, or is where a person or a service comes in."""
    modules = sources(*LAYERS, "src/tollway")
    assert unused(modules, ENTRIES) == []
    assert set(ENTRIES) <= {module.name for module in modules}


def test_a_module_that_only_a_test_imports_is_unused() -> None:
    """Importing oneself does not count; being started as a process does."""
    start = Module("streams/cli.py", "import tollway.streams.a\nrun('-m', 'tollway.streams.b')\nrun(here / 'd.py')")
    others = [Module(f"streams/{name}.py", f"import tollway.streams.{name}") for name in "abcd"]
    assert unused([start, *others], {"tollway.streams.cli"}) == ["streams/c.py"]


TEXTS = ("*.md", "*.toml", "*.lock", "*.lua", "*.sql", "*.avsc", "*.json", "*.yml", "Makefile", "run")


def test_nothing_written_names_one_machine() -> None:
    """Docs, settings, contracts and scripts hold no path of one machine."""
    found: list[str] = []
    for folder in (*LAYERS, "docs", "benchmarks", ".ci"):
        for pattern in TEXTS:
            for path in (ROOT / folder).rglob(pattern):
                found += no_machine_paths(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("*.toml"),
        *ROOT.glob("*.lock"),
        *ROOT.glob("*.yml"),
        ROOT / "Makefile",
    ):
        found += no_machine_paths(path.name, path.read_text(encoding="utf-8"))
    assert found == []

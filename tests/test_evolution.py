"""Every rule of evolution refuses what it forbids, names the field, and lets an allowed change pass."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tollway.schemas import evolution
from tollway.schemas.evolution import SchemaError, Violation, check_all, check_file, digest, violations

Schema = dict[str, Any]

TREE: Schema = {
    "type": "record",
    "name": "Call",
    "namespace": "t",
    "fields": [
        {"name": "id", "type": "string"},
        {"name": "units", "type": "long", "default": 0},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {"name": "note", "type": ["null", "string"], "default": None},
        {"name": "path", "type": {"type": "array", "items": "string"}},
        {"name": "quantities", "type": {"type": "map", "values": "long"}},
        {"name": "who", "type": {"type": "record", "name": "Who", "fields": [{"name": "kind", "type": "string"}]}},
        {"name": "tail", "type": ["null", {"type": "map", "values": "double"}], "default": None},
    ],
}


def field(schema: Schema, name: str) -> Schema:
    return next(field for field in schema["fields"] if field["name"] == name)


def put(name: str, key: str, value: Any) -> Callable[[Schema], None]:
    """Sets one key of one field."""
    return lambda schema: field(schema, name).__setitem__(key, value)


def append(**added: Any) -> Callable[[Schema], None]:
    return lambda schema: schema["fields"].append(added)


def removed(schema: Schema) -> None:
    schema["fields"].remove(field(schema, "units"))


def swapped(schema: Schema) -> None:
    schema["fields"][0], schema["fields"][1] = schema["fields"][1], schema["fields"][0]


def inserted(schema: Schema) -> None:
    schema["fields"].insert(1, {"name": "new", "type": ["null", "string"], "default": None})


def default_dropped(schema: Schema) -> None:
    del field(schema, "units")["default"]


def nested(fields: list[Schema]) -> Callable[[Schema], None]:
    return put("who", "type", {"type": "record", "name": "Who", "fields": fields})


LOGICAL = {"type": "long", "logicalType": "timestamp-millis"}
FORBIDDEN: list[tuple[str, Callable[[Schema], None], str, str]] = [
    ("the record renamed", lambda s: s.update(name="Usage"), "Usage", "record"),
    ("another namespace", lambda s: s.update(namespace="u"), "Call", "record"),
    ("a field removed", removed, "units", "removed"),
    ("a field renamed", put("id", "name", "ident"), "id", "removed"),
    ("two fields swapped", swapped, "units", "position"),
    ("a field put between", inserted, "new", "position"),
    ("another type", put("id", "type", "long"), "id", "type"),
    ("long widened to double", put("units", "type", "double"), "units", "type"),
    ("required made nullable", put("id", "type", ["null", "string"]), "id", "type"),
    ("micros made millis", put("at", "type", LOGICAL), "at", "logical_type"),
    ("a logical type taken away", put("at", "type", "long"), "at", "logical_type"),
    ("a logical type added", put("units", "type", {**LOGICAL, "logicalType": "timestamp-micros"}), "units", "logical_type"),
    ("a union turned round", put("note", "type", ["string", "null"]), "note", "union"),
    ("a union's branch changed", put("note", "type", ["null", "long"]), "note", "union"),
    ("a union's branch added", put("note", "type", ["null", "string", "long"]), "note", "union"),
    ("another default", put("units", "default", 1), "units", "default"),
    ("a default of other JSON", put("units", "default", False), "units", "default"),
    ("a default added", put("id", "default", "none"), "id", "default"),
    ("a default dropped", default_dropped, "units", "default"),
    ("items of another type", put("path", "type", {"type": "array", "items": "long"}), "path[]", "type"),
    ("values of another type", put("quantities", "type", {"type": "map", "values": "double"}), "quantities{}", "type"),
    (
        "values inside a union",
        put("tail", "type", ["null", {"type": "map", "values": "long"}]),
        "tail{}",
        "type",
    ),
    ("a nested record renamed", put("who", "type", {"type": "record", "name": "W", "fields": [{"name": "kind", "type": "string"}]}), "who", "record"),
    ("a nested field retyped", nested([{"name": "kind", "type": "long"}]), "who.kind", "type"),
    (
        "a nested field added as required",
        nested([{"name": "kind", "type": "string"}, {"name": "x", "type": "string"}]),
        "who.x",
        "added",
    ),
    ("a required field added", append(name="x", type="string"), "x", "added"),
    ("a field added with another default", append(name="x", type="long", default=0), "x", "added"),
    ("a nullable field added without default", append(name="x", type=["null", "long"]), "x", "added"),
    ("an alias", put("id", "aliases", ["ident"]), "id", "attribute"),
    ("a record's alias", lambda s: s.update(aliases=["Usage"]), "Call", "attribute"),
    ("a sort order", put("id", "order", "ignore"), "id", "attribute"),
    ("a note on a map", put("quantities", "type", {"type": "map", "values": "long", "order": 1}), "quantities", "attribute"),
    ("a bad type in a new record", append(name="x", type=["null", {"type": "record", "name": "X", "fields": [{"name": "y", "type": "int"}]}], default=None), "x.y", "forbidden"),
    ("a field twice", append(name="id", type="string"), "id", "duplicate"),
    ("an enum", append(name="x", type=["null", {"type": "enum", "name": "E", "symbols": ["A"]}], default=None), "x", "forbidden"),
    ("a fixed", append(name="x", type=["null", {"type": "fixed", "name": "F", "size": 4}], default=None), "x", "forbidden"),
    (
        "a decimal",
        append(name="x", type=["null", {"type": "bytes", "logicalType": "decimal", "precision": 9}], default=None),
        "x",
        "forbidden",
    ),
    ("a uuid", append(name="x", type=["null", {"type": "string", "logicalType": "uuid"}], default=None), "x", "forbidden"),
    ("millis", append(name="x", type=["null", LOGICAL], default=None), "x", "forbidden"),
    ("an int", append(name="x", type=["null", "int"], default=None), "x", "forbidden"),
    ("bytes", append(name="x", type=["null", "bytes"], default=None), "x", "forbidden"),
    ("a type by name", append(name="x", type=["null", "Who"], default=None), "x", "forbidden"),
    ("a union of three", append(name="x", type=["null", "string", "long"], default=None), "x", "forbidden"),
    ("a bad name", append(name="x-y", type=["null", "string"], default=None), "x-y", "forbidden"),
    ("a bad type deep down", append(name="x", type=["null", {"type": "array", "items": "float"}], default=None), "x[]", "forbidden"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "at", "rule"), [row[1:] for row in FORBIDDEN], ids=[row[0] for row in FORBIDDEN])
def test_a_forbidden_change_is_refused_by_field_and_rule(change: Callable[[Schema], None], at: str, rule: str) -> None:
    """A change that would let one reader misread another's bytes is refused, with its field and its rule."""
    new = copy.deepcopy(TREE)
    change(new)
    found = violations(TREE, new)
    assert (at, rule) in {(violation.field, violation.rule) for violation in found}
    assert all(str(violation).startswith(f"{violation.field}: ") for violation in found)


def test_every_rule_is_seen_to_refuse() -> None:
    """No rule stands in the list that nothing can break."""
    tested = {row[3] for row in FORBIDDEN} | {"edited", "catalogue"}
    assert tested == set(evolution.RULES)


ALLOWED: list[tuple[str, Callable[[Schema], None]]] = [
    ("nothing", lambda s: None),
    ("a doc", put("id", "doc", "an id")),
    ("a type written out", put("id", "type", {"type": "string"})),
    ("a nullable field at the end", append(name="x", type=["null", "string"], default=None)),
    (
        "a nullable record at the end",
        append(name="x", type=["null", {"type": "record", "name": "X", "fields": [{"name": "y", "type": "long"}]}], default=None),
    ),
    (
        "a nullable field in a nested record",
        nested([{"name": "kind", "type": "string"}, {"name": "x", "type": ["null", "boolean"], "default": None}]),
    ),
]  # fmt: skip


@pytest.mark.parametrize("change", [row[1] for row in ALLOWED], ids=[row[0] for row in ALLOWED])
def test_an_allowed_change_passes(change: Callable[[Schema], None]) -> None:
    """What every reader can skip or fill with null is let through."""
    new = copy.deepcopy(TREE)
    change(new)
    assert violations(TREE, new) == []


def test_what_is_committed_keeps_the_rules() -> None:
    """Every committed version is what its digest says and follows the one before it.

    Where this fails after an edit of an .avsc: restore the file, copy it to a new one, change that one, and give it the
    next id in ids.json; the message holds the line for digests.json.
    """
    assert [str(violation) for violation in check_all()] == []


def test_a_file_holds_the_record_that_its_id_names(committed: Path) -> None:
    """An id cannot point to another record's schema."""
    rewrite(committed / "ids.json", lambda ids: ids["1000001"].update(record="Order"))
    assert ("Order", "record") in {(violation.field, violation.rule) for violation in check_all(committed)}


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A copy of the committed contracts, to break."""
    for path in (*evolution.SCHEMAS.glob("*.avsc"), *evolution.SCHEMAS.glob("*.json")):
        shutil.copy(path, tmp_path)
    return tmp_path


def rewrite(path: Path, change: Callable[[Schema], None]) -> Schema:
    content: Schema = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return content


def test_an_edited_version_is_refused(committed: Path) -> None:
    """Even a change that evolution allows may not be made to a committed file: it names the way out."""
    rewrite(committed / "usage.avsc", append(name="x", type=["null", "string"], default=None))
    found = check_all(committed)
    assert [(violation.field, violation.rule) for violation in found] == [("UsageEvent", "edited")]
    assert "new version" in found[0].message


def add_version(folder: Path, change: Callable[[Schema], None], number: str = "1000003", version: int = 2) -> None:
    shutil.copy(folder / "usage.avsc", folder / "usage_2.avsc")
    new = rewrite(folder / "usage_2.avsc", change)
    entry = {"record": "UsageEvent", "version": version, "file": "usage_2.avsc"}
    rewrite(folder / "ids.json", lambda ids: ids.update({number: entry}))
    rewrite(folder / "digests.json", lambda digests: digests.update({number: digest(new)}))


def test_a_new_version_is_held_to_the_one_before_it(committed: Path) -> None:
    """A second version passes where it may follow the first, and is refused where not."""
    add_version(committed, append(name="x", type=["null", "string"], default=None))
    assert check_all(committed) == []
    add_version(committed, put("latency_us", "type", "double"))
    assert [(violation.field, violation.rule) for violation in check_all(committed)] == [("latency_us", "type")]


CATALOGUE: list[tuple[str, Callable[[Path], None], str]] = [
    ("an id taken out", lambda f: rewrite(f / "ids.json", lambda ids: ids.pop("1000002")) and None, "1000002"),
    ("no digest", lambda f: rewrite(f / "digests.json", lambda d: d.pop("1000001")) and None, "1000001"),
    ("an id out of range", lambda f: add_version(f, lambda s: None, number="1000256"), "1000256"),
    ("a version skipped", lambda f: add_version(f, lambda s: None, version=3), "1000003"),
    (
        "one file for two ids",
        lambda f: rewrite(f / "ids.json", lambda ids: ids["1000001"].update(file="usage.avsc")) and None,
        "1000001",
    ),
]


@pytest.mark.parametrize(("change", "at"), [row[1:] for row in CATALOGUE], ids=[row[0] for row in CATALOGUE])
def test_the_catalogue_only_grows(committed: Path, change: Callable[[Path], None], at: str) -> None:
    """ids.json keeps each id, version and file to itself, and every id its digest."""
    change(committed)
    assert (at, "catalogue") in {(violation.field, violation.rule) for violation in check_all(committed)}


def test_a_void_id_needs_no_schema(committed: Path) -> None:
    """An id that was given out and then marked void keeps its number and has no file."""
    void = {"record": "UsageEvent", "version": 2, "void": True}
    rewrite(committed / "ids.json", lambda ids: ids.update({"1000003": void}))
    assert check_all(committed) == []


def test_a_file_is_checked_before_it_is_committed(tmp_path: Path) -> None:
    """A draft is held to the newest version of the record it is meant for."""
    draft = tmp_path / "usage.avsc"
    shutil.copy(evolution.SCHEMAS / "usage.avsc", draft)
    assert check_file(draft, "UsageEvent") == []
    rewrite(draft, put("principal", "name", "caller"))
    assert ("principal", "removed") in {
        (violation.field, violation.rule) for violation in check_file(draft, "UsageEvent")
    }


@pytest.mark.parametrize(
    ("content", "record", "names"),
    [
        (None, "UsageEvent", "cannot be read"),
        ("{", "UsageEvent", "no JSON"),
        ('"string"', "UsageEvent", "no record schema"),
        ('{"type": "record", "name": "UsageEvent", "fields": []}', "UsageEvent", "fields is []"),
        ("{}", "Usage", "give one of Command, MeterEvent, UsageEvent"),
    ],
)
def test_what_is_no_schema_is_refused_in_a_sentence(
    tmp_path: Path, content: str | None, record: str, names: str
) -> None:
    """A missing file, broken JSON, another kind of schema or an unknown record ends in one sentence, no traceback."""
    draft = tmp_path / "draft.avsc"
    if content is not None:
        draft.write_text(content)
    with pytest.raises(SchemaError, match="give") as caught:
        check_file(draft, record)
    assert names in str(caught.value)


def test_a_digest_ignores_doc_and_layout_alone() -> None:
    """A digest changes with the default, not with the documentation."""
    documented = copy.deepcopy(TREE)
    field(documented, "id")["doc"] = "an id"
    assert digest(documented) == digest(TREE)
    field(documented, "units")["default"] = 1
    assert digest(documented) != digest(TREE)


def test_a_violation_reads_as_a_sentence() -> None:
    """What a person reads names the field, what happened, the rule and the rule's words."""
    assert str(Violation("units", "removed", "it is gone")) == (
        "units: it is gone (removed: a committed field keeps its name: nothing is removed or renamed)"
    )

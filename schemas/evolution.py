"""What may change between two versions of a record, and what in the catalogue may not be touched (design §4 *Evolution*)."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tollway.schemas.codec import ID_FIRST, ID_LAST, without_doc

SCHEMAS = Path(__file__).parent

RULES = {
    "record": "a record keeps its name and namespace",
    "removed": "a committed field keeps its name: nothing is removed or renamed",
    "position": "committed fields keep their order, new ones stand behind them",
    "type": "a committed field keeps its type",
    "logical_type": "a committed field keeps its logical type",
    "union": "a committed field keeps its union, in its order",
    "default": "a committed field keeps its default",
    "added": "a new field is nullable with default null",
    "forbidden": "only what both decoders read alike: string, long, double, boolean, timestamp-micros, "
    "array, map, nested record, and the union of null with one of them",
    "attribute": "a field has name, type, default and doc; aliases and the rest change how others read it",
    "duplicate": "a record has each field once",
    "edited": "a committed version is never edited",
    "catalogue": "ids.json only grows: an id, a version and a file each for one record",
}
"""Every rule by name, in words."""

_PRIMITIVES = ("string", "long", "double", "boolean")
_FIELD_KEYS = {"name", "type", "default", "doc"}
_TYPE_KEYS = {
    "record": {"type", "name", "namespace", "fields", "doc"},
    "array": {"type", "items", "default"},
    "map": {"type", "values", "default"},
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class SchemaError(ValueError):
    """What was given is no record schema, or no record of ours; the message says which and what to give."""


@dataclass(frozen=True)
class Violation:
    """One rule broken at one field (`a.b` nested, `a[]` items, `a{}` values)."""

    field: str
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message} ({self.rule}: {RULES[self.rule]})"


def violations(old: dict[str, Any], new: dict[str, Any]) -> list[Violation]:
    """Every reason why `new` cannot follow `old`; empty where it can. Both are Avro record schemas."""
    found = list(_shape(new, ""))
    for key in ("name", "namespace"):
        if old.get(key) != new.get(key):
            found.append(Violation(new.get("name", ""), "record", f"{key} was {old.get(key)!r}, is {new.get(key)!r}"))
    return found + list(_fields(old, new, ""))


def check_file(path: Path, record: str) -> list[Violation]:
    """Violations of a schema file against the newest committed version of `record`. Raises SchemaError."""
    committed = [entry for _, entry in _versions(SCHEMAS) if entry["record"] == record]
    if not committed:
        known = sorted({entry["record"] for _, entry in _versions(SCHEMAS)})
        raise SchemaError(f"record is {record!r}: give one of {', '.join(known)}")
    return violations(_load(SCHEMAS / committed[-1]["file"]), _load(path))


def check_all(folder: Path = SCHEMAS) -> list[Violation]:
    """Violations in everything committed: each version against the one before it and against its digest in digests.json."""
    digests = json.loads((folder / "digests.json").read_text(encoding="utf-8"))
    found = list(_catalogue(folder, digests))
    before: dict[str, dict[str, Any]] = {}
    for number, entry in _versions(folder):
        schema, record = _load(folder / entry["file"]), entry["record"]
        if number in digests and digests[number] != digest(schema):
            cure = f"restore {entry['file']} and add the change as a new version, with its own id and file"
            found.append(
                Violation(record, "edited", f"{entry['file']} is not what id {number} was committed as: {cure}")
            )
        found += violations(before[record], schema) if record in before else _shape(schema, "")
        if schema["name"] != record:
            found.append(Violation(record, "record", f"{entry['file']} holds {schema['name']!r}"))
        before[record] = schema
    return found


def digest(schema: dict[str, Any]) -> str:
    """SHA-256, hex, of a schema's content: its `doc` strings and layout may change, nothing else."""
    text = json.dumps(without_doc(schema), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _catalogue(folder: Path, digests: dict[str, str]) -> Iterator[Violation]:
    """ids.json itself: range, versions 1, 2, 3 … in the order of ids, a file and a digest each."""
    ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
    for number in sorted(digests.keys() - ids.keys()):
        yield Violation(number, "catalogue", "this id was committed and is gone: put it back")
    files: dict[str, str] = {}
    latest: dict[str, int] = {}
    for number in sorted(ids, key=int):
        entry = ids[number]
        record, version = entry["record"], entry["version"]
        if not ID_FIRST <= int(number) <= ID_LAST:
            yield Violation(number, "catalogue", f"ids of ours are {ID_FIRST} to {ID_LAST}")
        if version != latest.get(record, 0) + 1:
            yield Violation(
                number, "catalogue", f"{record} has version {latest.get(record, 0)}, so the next is one more"
            )
        latest[record] = version
        if entry.get("void"):
            continue
        if entry["file"] in files:
            yield Violation(number, "catalogue", f"{entry['file']} is the file of {files[entry['file']]} already")
        files[entry["file"]] = number
        if number not in digests:
            line = f'"{number}": "{digest(_load(folder / entry["file"]))}"'
            yield Violation(number, "catalogue", f"no digest pins it: add {line} to digests.json")


def _versions(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(id, entry) of every version that has a schema, in the order of ids."""
    ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
    return [(number, ids[number]) for number in sorted(ids, key=int) if not ids[number].get("void")]


def _load(path: Path) -> dict[str, Any]:
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SchemaError(f"{path} cannot be read ({error.strerror}): give an .avsc file") from error
    except ValueError as error:
        raise SchemaError(f"{path} is no JSON ({error}): give an .avsc file") from error
    if not isinstance(schema, dict) or schema.get("type") != "record" or not isinstance(schema.get("name"), str):
        raise SchemaError(f"{path} is no record schema: give an object with type `record`, name and fields")
    return schema


def _fields(old: dict[str, Any], new: dict[str, Any], at: str) -> Iterator[Violation]:
    """Field by field: what was is there, in its place and as it was; what is added is nullable."""
    was, now = _named(old), _named(new)
    gone = [name for name in was if name not in now]
    for name in gone:
        yield Violation(at + name, "removed", "it is gone: put it back; a field that nobody writes any more stays")
    # zip ends with the committed fields: what stands behind them is free.
    for name, right in zip(now, () if gone else was, strict=False):
        if name != right:
            yield Violation(at + name, "position", f"it stands where {right} stood: append it")
            break
    for name, field in now.items():
        if name not in was:
            if "default" not in field or field["default"] is not None or not _nullable(field.get("type")):
                yield Violation(at + name, "added", f'write {{"name": "{name}", "type": ["null", …], "default": null}}')
            continue
        before, after = (_text(side["default"]) if "default" in side else "none" for side in (was[name], field))
        if before != after:
            yield Violation(at + name, "default", f"default was {before}, is {after}")
        yield from _types(was[name].get("type"), field.get("type"), at + name)


def _types(old: Any, new: Any, at: str) -> Iterator[Violation]:
    """One type against the one it was, items, values and nested records too."""
    if isinstance(old, list) and isinstance(new, list):
        if [_kind(branch) for branch in old] != [_kind(branch) for branch in new]:
            yield Violation(at, "union", f"it was {_text(old)}, is {_text(new)}")
            return
        for was, now in zip(old, new, strict=True):
            yield from _types(was, now, at)
        return
    if _kind(old) != _kind(new):
        yield Violation(at, "type", f"it was {_text(old)}, is {_text(new)}: add a field with the new type")
        return
    if isinstance(old, dict) and isinstance(new, dict):
        if old.get("logicalType") != new.get("logicalType"):
            yield Violation(at, "logical_type", f"it was {old.get('logicalType')}, is {new.get('logicalType')}")
        if old["type"] == "record":
            if old.get("name") != new.get("name"):
                yield Violation(at, "record", f"nested record was {old.get('name')!r}, is {new.get('name')!r}")
            yield from _fields(old, new, at + ".")
        for part, mark in (("items", "[]"), ("values", "{}")):
            if part in old:
                yield from _types(old[part], new.get(part), at + mark)
    elif isinstance(old, dict) != isinstance(new, dict):
        logical = [side.get("logicalType") if isinstance(side, dict) else None for side in (old, new)]
        if logical[0] != logical[1]:
            yield Violation(at, "logical_type", f"it was {logical[0]}, is {logical[1]}")


def _shape(record: dict[str, Any], at: str) -> Iterator[Violation]:
    """What every version must be, the first one too: only types that both decoders read alike, each field once."""
    seen: set[str] = set()
    yield from _foreign(record, "record", at + str(record.get("name")))
    for field in _listed(record):
        name = str(field.get("name"))
        if name in seen:
            yield Violation(at + name, "duplicate", "it is there twice")
        if not _NAME.fullmatch(name):
            yield Violation(at + name, "forbidden", f"names match {_NAME.pattern}")
        seen.add(name)
        if extra := field.keys() - _FIELD_KEYS:
            yield Violation(at + name, "attribute", f"take out {', '.join(sorted(extra))}")
        yield from _allowed(field.get("type"), at + name)


def _allowed(kind: Any, at: str) -> Iterator[Violation]:
    if isinstance(kind, list):
        if len(kind) != 2 or kind[0] != "null" or isinstance(kind[1], list):
            yield Violation(at, "forbidden", f'union {_text(kind)}: write ["null", one type]')
        for branch in kind[1:]:
            yield from _allowed(branch, at)
    elif isinstance(kind, str):
        if kind not in _PRIMITIVES:
            yield Violation(at, "forbidden", f"type {kind!r}: write the type out, as one of the allowed ones")
    elif isinstance(kind, dict) and kind.get("type") in _TYPE_KEYS:
        if kind["type"] == "record":
            yield from _shape(kind, at + ".")
            return
        yield from _foreign(kind, kind["type"], at)
        part, mark = ("items", "[]") if kind["type"] == "array" else ("values", "{}")
        yield from _allowed(kind.get(part), at + mark)
    elif kind != {"type": "long", "logicalType": "timestamp-micros"} and _text(kind) not in _WRAPPED:
        yield Violation(at, "forbidden", f"type {_text(kind)}")


def _foreign(node: dict[str, Any], kind: str, at: str) -> Iterator[Violation]:
    if extra := node.keys() - _TYPE_KEYS[kind]:
        yield Violation(at, "attribute", f"take out {', '.join(sorted(extra))}")


def _listed(record: dict[str, Any]) -> list[dict[str, Any]]:
    fields = record.get("fields")
    if not isinstance(fields, list) or not fields or not all(isinstance(field, dict) for field in fields):
        raise SchemaError(f"{record.get('name')}: fields is {_text(fields)[:80]}: give a list of name and type")
    return fields


def _named(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {str(field.get("name")): field for field in _listed(record)}


def _kind(kind: Any) -> str:
    """The bare type: what may not change first of all."""
    return str(kind.get("type")) if isinstance(kind, dict) else str(kind)


def _nullable(kind: Any) -> bool:
    return isinstance(kind, list) and len(kind) == 2 and kind[0] == "null"


def _text(value: Any) -> str:
    return json.dumps(value)


_WRAPPED = {_text({"type": name}) for name in _PRIMITIVES}

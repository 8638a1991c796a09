"""What a schema registry must hold of ours: every committed version, under the record's full name.

A registry is a catalogue and a gate for changes. It numbers as it likes: ids on the wire are those of `ids.json`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tollway.schemas import codec
from tollway.schemas.evolution import SCHEMAS, SchemaError, digest

COMPATIBILITY = "FULL_TRANSITIVE"
"""Each version reads and is read by every other: workers and emitters of any two versions share one log."""


@dataclass(frozen=True)
class Committed:
    """One version of one record. `subject`: the record's full name, for one topic carries several records."""

    subject: str
    record: str
    version: int
    text: str


def committed() -> list[Committed]:
    """Every version that has a schema, in the order of ids."""
    found = []
    for _, entry in sorted(codec.catalogue().items()):
        if entry.get("void"):
            continue
        text = (SCHEMAS / entry["file"]).read_text(encoding="utf-8")
        schema = json.loads(text)
        subject = f"{schema['namespace']}.{schema['name']}"
        found.append(Committed(subject, entry["record"], entry["version"], text))
    return found


def faults(ours: Iterable[Committed], registered: Mapping[str, Iterable[str]]) -> list[str]:
    """Versions of ours that a registry lacks, or has otherwise. `registered`: subject → schema texts."""
    found = []
    for each in ours:
        theirs = list(registered.get(each.subject, ()))
        if not theirs:
            found.append(f"{each.subject} is not registered")
        elif mark(each.text) not in {mark(text) for text in theirs}:
            found.append(
                f"{each.subject} version {each.version} is not among the {len(theirs)} registered, which differ"
            )
    return list(dict.fromkeys(found))


def newer(ours: Iterable[Committed], registered: Mapping[str, Iterable[str]]) -> list[str]:
    """Subjects of ours under which more is registered than we know: emitters may send it once workers are deployed."""
    known: dict[str, set[str]] = {}
    for each in ours:
        known.setdefault(each.subject, set()).add(mark(each.text))
    return [subject for subject, marks in known.items() if {mark(text) for text in registered.get(subject, ())} - marks]


def mark(text: str) -> str:
    """The digest of a schema's content, however a registry has written it. Raises SchemaError for what is no schema."""
    try:
        return digest(_plain(json.loads(text)))
    except (ValueError, AttributeError) as error:
        raise SchemaError(f"the registry has {text[:40]!r}, which is no Avro schema: {error}") from error


def _plain(node: Any) -> Any:
    """`{"type": "string"}` and `"string"` are one type."""
    if isinstance(node, list):
        return [_plain(each) for each in node]
    if isinstance(node, dict):
        return (
            _plain(node["type"]) if node.keys() == {"type"} else {key: _keyed(key, each) for key, each in node.items()}
        )
    return node


def _keyed(key: str, value: Any) -> Any:
    return value if key == "default" else _plain(value)

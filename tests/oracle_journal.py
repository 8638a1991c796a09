"""The writers' journals: what was begun, what returned; and whether the log holds exactly that.

A journal is a file of JSON lines, one process life each:
    {"b": tag, "t": thread, "e": {fields}}        before emit()
    {"r": tag, "s": source, "l": lane, "q": n}    after it returned
    {"x": tag, "why": text}                       it refused: nothing may be in the log
    {"b": tag, "raw": kind, "want": verdict}      before a raw write; want = accepted, duplicate or a dead letter's reason
    {"r": tag, "p": partition, "o": offset}       the broker has it
    {"end": true}                                 closed cleanly
The tag travels as the event's trace_id.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.oracle_book import Book
from tests.oracle_wire import lane


@dataclass
class Journal:
    """One life of one writer."""

    name: str
    begun: dict[str, dict[str, Any]] = field(default_factory=dict)
    returned: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    ended: bool = False


def read_journal(path: Path) -> Journal:
    """A last line that a kill cut short is left out: its write never returned."""
    journal = Journal(path.stem)
    for text in path.read_bytes().split(b"\n")[:-1]:
        line = json.loads(text)
        if "b" in line:
            journal.begun[line["b"]] = line
        elif "r" in line:
            journal.returned[line["r"]] = line
        elif "x" in line:
            journal.refused[line["x"]] = line["why"]
        else:
            journal.ended = True
    return journal


def read_journals(folder: Path) -> list[Journal]:
    return [read_journal(path) for path in sorted(folder.glob("*.jsonl"))]


def check_journals(journals: list[Journal], book: Book) -> list[str]:
    """What the journals promise and the log does not keep, or the log holds and no journal knows."""
    seen = Counter(row.event["trace_id"] for row in book.rows)
    by_tag = {row.event["trace_id"]: row for row in book.rows}
    wrong: list[str] = []
    known: set[str] = set()
    for journal in journals:
        known |= journal.begun.keys()
        wrong += _check_open(journal)
        for tag, line in journal.begun.items():
            back = journal.returned.get(tag)
            if "raw" in line:
                wrong += _check_raw(journal.name, tag, line, back, book)
            elif tag in journal.refused and seen[tag]:
                wrong.append(f"{journal.name}: {tag} was refused, yet stands in the log")
            elif back is not None:
                row = by_tag.get(tag)
                if row is None:
                    wrong.append(f"LOST {journal.name}: {tag} returned {back}, not accepted in the log")
                else:
                    wrong += _check_content(journal.name, tag, line["e"], back, row.event)
    wrong += [f"DOUBLED {tag}: accepted {count} times" for tag, count in seen.items() if count > 1]
    wrong += [f"INVENTED {tag}: no journal knows it" for tag in seen.keys() - known]
    return wrong


def _check_open(journal: Journal) -> list[str]:
    """Begun only: at most one a thread, and none in a life that closed."""
    open_tags = journal.begun.keys() - journal.returned.keys() - journal.refused.keys()
    threads = Counter(journal.begun[tag].get("t", 0) for tag in open_tags)
    if journal.ended and open_tags:
        return [f"{journal.name}: closed, yet {sorted(open_tags)[:3]} never returned"]
    return [f"{journal.name}: thread {thread} left {count} open" for thread, count in threads.items() if count > 1]


def _check_content(
    name: str, tag: str, fields: dict[str, Any], back: dict[str, Any], event: dict[str, Any]
) -> list[str]:
    want = {**dict.fromkeys(event.keys() - {"event_id"}), **fields, "source": back["s"], "sequence": back["q"]}
    wrong = [
        f"CHANGED {name}: {tag} {key} is {event[key]!r}, was {value!r}"
        for key, value in want.items()
        if event[key] != value
    ]
    if lane(event["account"]) != back["l"]:
        wrong.append(f"{name}: {tag} returned lane {back['l']}, {event['account']} has {lane(event['account'])}")
    return wrong


def _check_raw(name: str, tag: str, line: dict[str, Any], back: dict[str, Any] | None, book: Book) -> list[str]:
    if back is None:
        return [f"{name}: {tag} ({line['raw']}) was never acknowledged"]
    at = (back["p"], back["o"])
    verdict = book.dead.get(at) or book.verdicts.get(at)
    return (
        [] if verdict == line["want"] else [f"{name}: {tag} ({line['raw']}) at {at} is {verdict}, not {line['want']}"]
    )


def raw_counts(journals: list[Journal]) -> dict[str, int]:
    """Raw writes by what they must have become."""
    return dict(Counter(line["want"] for journal in journals for line in journal.begun.values() if "raw" in line))


def emitted(journals: list[Journal]) -> int:
    """Calls of emit() that returned."""
    return sum(1 for journal in journals for tag in journal.returned if "raw" not in journal.begun[tag])

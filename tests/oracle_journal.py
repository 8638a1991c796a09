"""The writers' journals: what was begun, what returned; and whether the log holds exactly that.

A journal is a file of JSON lines, one process life each:
    {"b": tag, "t": thread, "e": {fields}}        before emit()
    {"r": tag, "s": source, "l": lane, "q": n}    after it returned
    {"x": tag, "why": text}                       it refused: nothing may be in the log
    {"b": tag, "raw": kind, "want": verdict}      before a raw write; want = accepted, duplicate or a dead letter's reason
    {"r": tag, "p": partition, "o": offset}       the broker has it
    {"end": true}                                 closed cleanly
The tag travels as the event's trace_id. Journals are read line by line: those of a million calls do not fit in memory.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.oracle_book import Book, Row
from tests.oracle_wire import lane

Line = dict[str, Any]


@dataclass(frozen=True)
class Journal:
    """One life of one writer; `lines` can be gone through again and again."""

    name: str
    lines: Iterable[Line]


class JournalLines:
    """The lines of a file. A last one that a kill cut short is left out: its write never returned."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Line]:
        with self.path.open("rb") as file:
            for text in file:
                if text.endswith(b"\n"):
                    yield json.loads(text)


def read_journals(folder: Path) -> list[Journal]:
    return [Journal(path.stem, JournalLines(path)) for path in sorted(folder.glob("*.jsonl"))]


@dataclass
class Findings:
    """What the journals amount to, and what in the log contradicts them."""

    emitted: int = 0
    """Calls of emit() that returned."""
    killed: int = 0
    """Lives that did not close."""
    raw: Counter[str] = field(default_factory=Counter)
    """Raw writes by what they must have become."""
    wrong: list[str] = field(default_factory=list)


def check_journals(journals: list[Journal], book: Book) -> Findings:
    """What the journals promise and the log does not keep, or the log holds and no journal knows."""
    found = Findings()
    rows: dict[str, Row] = {}
    for row in book.rows:
        if row.tag in rows:
            found.wrong.append(f"DOUBLED {row.tag}: accepted more than once")
        rows[row.tag] = row
    unknown = set(rows)
    for journal in journals:
        _check_journal(journal, book, rows, unknown, found)
    found.wrong += [f"INVENTED {tag}: no journal knows it" for tag in sorted(unknown)]
    return found


def _check_journal(journal: Journal, book: Book, rows: dict[str, Row], unknown: set[str], found: Findings) -> None:
    begun: dict[str, Line] = {}
    ended = False
    for line in journal.lines:
        if "b" in line:
            begun[line["b"]] = line
            unknown.discard(line["b"])
            if "raw" in line:
                found.raw[line["want"]] += 1
        elif "x" in line:
            del begun[line["x"]]
            if line["x"] in rows:
                found.wrong.append(f"{journal.name}: {line['x']} was refused, yet stands in the log")
        elif "r" in line:
            before = begun.pop(line["r"])
            if "raw" in before:
                found.wrong += _check_raw(journal.name, before, line, book)
            else:
                found.emitted += 1
                found.wrong += _check_emitted(journal.name, before, line, rows.get(line["r"]))
        else:
            ended = True
    found.killed += not ended
    found.wrong += _check_open(journal.name, begun, ended)


def _check_open(name: str, begun: dict[str, Line], ended: bool) -> list[str]:
    """Begun only: at most one a thread, and none in a life that closed."""
    raw = [tag for tag, line in begun.items() if "raw" in line]
    wrong = [f"{name}: {tag} ({begun[tag]['raw']}) was never acknowledged" for tag in raw]
    left = begun.keys() - set(raw)
    if ended and left:
        return [*wrong, f"{name}: closed, yet {sorted(left)[:3]} never returned"]
    threads = Counter(begun[tag]["t"] for tag in left)
    return wrong + [f"{name}: thread {thread} left {count} open" for thread, count in threads.items() if count > 1]


def _check_emitted(name: str, before: Line, back: Line, row: Row | None) -> list[str]:
    if row is None:
        return [f"LOST {name}: {back['r']} returned {back}, not accepted in the log"]
    event = row.event
    want = {**dict.fromkeys(event.keys() - {"event_id"}), **before["e"], "source": back["s"], "sequence": back["q"]}
    wrong = [
        f"CHANGED {name}: {back['r']} {key} is {event[key]!r}, was {value!r}"
        for key, value in want.items()
        if event[key] != value
    ]
    if lane(event["account"]) != back["l"]:
        wrong.append(f"{name}: {back['r']} returned lane {back['l']}, {event['account']} has {lane(event['account'])}")
    return wrong


def _check_raw(name: str, before: Line, back: Line, book: Book) -> list[str]:
    verdict = book.verdict(back["p"], back["o"])
    if verdict == before["want"]:
        return []
    return [f"{name}: {back['r']} ({before['raw']}) at {back['p']}/{back['o']} is {verdict}, not {before['want']}"]

"""The little of ClickHouse's SQL that its HTTP interface must read itself: where a statement ends and data begins."""

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    rb"""(?P<skip>\s+|--[^\n]*|\#[\ !][^\n]*|/\*.*?\*/)
    |(?P<quoted>'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.)*"|`(?:[^`\\]|\\.)*`)
    |(?P<word>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_AFTER_FORMAT = re.compile(rb"[ \t]*;?[ \t]*(?:\r?\n)?")
# With one of these the engine finds the data by itself, or there is none.
_NO_DATA = frozenset({b"SELECT", b"WITH", b"FROM", b"WATCH"})


@dataclass(frozen=True)
class Insert:
    """INSERT INTO `target` `settings` FORMAT `format`, and where its data begins in the text."""

    target: str
    settings: str
    format: str
    data_at: int

    def from_file(self, path: str) -> str:
        return f"{self.target} FROM INFILE {quote(path)} {self.settings} FORMAT {self.format}"


def parse_insert(text: bytes) -> Insert | None:
    """The parts of an INSERT whose data follows its text; None for every other statement."""
    words: list[bytes] = []
    depth = 0
    settings_at: int | None = None
    for token in _TOKEN.finditer(text):
        if token["other"]:
            depth += {b"(": 1, b")": -1}.get(token["other"], 0)
            continue
        if not token["word"] or depth:
            continue
        word = token["word"].upper()
        words.append(word)
        if len(words) <= 2:
            if word != (b"INSERT", b"INTO")[len(words) - 1]:
                return None
        elif word in _NO_DATA:
            return None
        elif word == b"SETTINGS":
            settings_at = token.start()
        elif word == b"VALUES":
            rest = text[token.end() :].strip()
            return None if rest.rstrip(b";") else _insert(text, settings_at, token.start(), "Values", len(text))
        elif word == b"FORMAT":
            name = re.compile(rb"\s+(\w+)").match(text, token.end())
            after = name and _AFTER_FORMAT.match(text, name.end())
            if not name or not after:
                return None
            return _insert(text, settings_at, token.start(), name[1].decode(), after.end())
    return None


def _insert(text: bytes, settings_at: int | None, format_at: int, name: str, data_at: int) -> Insert:
    head = text[:format_at] if settings_at is None else text[:settings_at]
    settings = b"" if settings_at is None else text[settings_at:format_at]
    return Insert(head.decode().strip(), settings.decode().strip(), name, data_at)


def quote(text: str) -> str:
    """A string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def quote_name(name: str) -> str:
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"

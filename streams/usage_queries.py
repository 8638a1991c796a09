"""Questions to the `usage` view: the analyst's ten, and what `tollway usage` shows. The SQL stands in `queries/`."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from tollway.connectors.clickhouse import AuditStore

FOLDER = Path(__file__).parent / "queries"
_PARAMETER = re.compile(r"\{(\w+):([^}]+)\}")


@dataclass(frozen=True)
class Query:
    """A question: its first comment line, its SQL, and its parameters' ClickHouse types."""

    name: str
    title: str
    sql: str
    parameters: dict[str, str]


def query(name: str) -> Query:
    """The question in `queries/<name>.sql`."""
    text = (FOLDER / f"{name}.sql").read_text(encoding="utf-8")
    title, _, sql = text.partition("\n")
    return Query(name, title.removeprefix("-- "), sql.strip(), dict(_PARAMETER.findall(sql)))


def analysts() -> list[Query]:
    """The ten questions of docs/queries.md, in their order."""
    return [query(path.stem) for path in sorted(FOLDER.glob("[0-9][0-9]_*.sql"))]


def ask(store: AuditStore, name: str, **parameters: Any) -> list[dict[str, Any]]:
    """Rows of a question: money as Decimal, times as datetime in UTC, without zone.

    A time is given as whole seconds since 1970 or as a datetime with a zone. Raises TypeError where a parameter lacks.
    """
    asked = query(name)
    if parameters.keys() != asked.parameters.keys():
        raise TypeError(f"{name} takes {sorted(asked.parameters)}, not {sorted(parameters)}")
    bound = {key: _bound(value, asked.parameters[key]) for key, value in parameters.items()}
    return store.rows(asked.sql, **bound)


def usage_report(store: AuditStore, account: str, since_s: int, until_s: int) -> list[dict[str, Any]]:
    """An account's accepted usage in [since, until), by operation, principal, status and assets; as JSON has it."""
    rows = ask(store, "account", account=account, since=since_s, until=until_s)
    return [{name: _readable(value) for name, value in row.items()} for row in rows]


def _bound(value: Any, kind: str) -> Any:
    """A time as its number: the client would write a datetime in the server's zone, whatever the parameter's."""
    if kind.startswith("DateTime"):
        at_s = int(value.timestamp()) if isinstance(value, datetime) else value
        return f"{at_s:010d}"
    return value


def _readable(value: Any) -> Any:
    if isinstance(value, Decimal):
        return f"{value.normalize():f}"
    return value.replace(tzinfo=UTC).isoformat() if isinstance(value, datetime) else value

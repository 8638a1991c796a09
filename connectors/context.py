"""Whose run a call belongs to: agent, session, run and the runs above it. In process by contextvars, between processes by
W3C baggage and traceparent, which MCP carries unprefixed in `_meta`.

It says what a call is part of, never who makes it: any caller can set these headers.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import NamedTuple
from urllib.parse import quote, unquote

from tollway.connectors.errors import Refused
from tollway.schemas.usage import ID, PATH_MAX

BAGGAGE_BYTES_MAX = 8_192
BAGGAGE_MEMBERS_MAX = 64
"""W3C Baggage asks for no more; what is beyond either is not read."""
MEMBER_PREFIX = "tollway."
_BETWEEN = "~"  # is in no id
_NAMES = ("agent", "session", "run", "parent")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


class Origin(NamedTuple):
    """What a call is part of. `path` holds the runs above `run`, outermost first; `parent` is the last of them."""

    agent: str | None = None
    session: str | None = None
    run: str | None = None
    parent: str | None = None
    path: tuple[str, ...] = ()
    traceparent: str | None = None

    @property
    def trace_id(self) -> str | None:
        """16 bytes as hex, out of the traceparent."""
        return self.traceparent[3:35] if self.traceparent else None

    def fields(self) -> dict[str, str | list[str]]:
        """As fields of UsageEvent, without what is not known."""
        found: dict[str, str | list[str]] = {
            name: value for name in _NAMES if (value := getattr(self, name)) is not None
        }
        if self.path:
            found["path"] = list(self.path)
        if self.traceparent:
            found["trace_id"] = self.traceparent[3:35]
        return found


_origin: ContextVar[Origin] = ContextVar("tollway_origin", default=Origin())  # noqa: B039 - immutable


def current_origin() -> Origin:
    """What the code that asks is part of."""
    return _origin.get()


@contextmanager
def within(origin: Origin) -> Iterator[Origin]:
    """Calls in this block are part of `origin`."""
    token = _origin.set(origin)
    try:
        yield origin
    finally:
        with suppress(ValueError):  # a generator that is closed elsewhere: that context never had it
            _origin.reset(token)


@contextmanager
def run(run_id: str, *, agent: str | None = None, session: str | None = None) -> Iterator[Origin]:
    """Calls in this block belong to run `run_id`; a run that is already going on becomes its parent.

    agent, session: where not given, those of the run above. Deeper than PATH_MAX the path keeps the outermost run and the
    nearest ones. Raises Refused for what is no id.
    """
    for name, value in (("run_id", run_id), ("agent", agent), ("session", session)):
        if value is not None and not (isinstance(value, str) and ID.fullmatch(value)):
            raise Refused(f"{name} is {value!r}: ids match {ID.pattern}")
    above = _origin.get()
    path = above.path if above.run is None else (*above.path, above.run)
    if len(path) > PATH_MAX:
        path = (path[0], *path[1 - PATH_MAX :])
    inner = Origin(agent or above.agent, session or above.session, run_id, above.run, path, above.traceparent)
    with within(inner):
        yield inner


def origin_from(traceparent: str | None, baggage: str | None) -> Origin:
    """Read from the outside, where nothing can be trusted: what is malformed, or beyond the bounds, is not there."""
    members = _members(baggage) if baggage else {}
    path: tuple[str, ...] = ()
    if above := members.get(MEMBER_PREFIX + "path"):
        path = tuple(above.split(_BETWEEN))
        if len(path) > PATH_MAX or not all(map(ID.fullmatch, path)):
            path = ()
    ids = (members.get(MEMBER_PREFIX + name, "") for name in _NAMES)
    agent, session, run, parent = (value if ID.fullmatch(value) else None for value in ids)
    known = traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else None
    return Origin(agent, session, run, parent, path, known)


def _members(baggage: str) -> dict[str, str]:
    if len(baggage) > BAGGAGE_BYTES_MAX:
        return {}
    found: dict[str, str] = {}
    for member in baggage.split(",")[:BAGGAGE_MEMBERS_MAX]:
        key, equals, value = member.partition(";")[0].partition("=")
        if equals and key.strip().startswith(MEMBER_PREFIX):
            found[key.strip()] = unquote(value.strip())
    return found


def outgoing(existing: Mapping[str, str] | None = None) -> dict[str, str]:
    """Headers (or keys of MCP's `_meta`) that tell the service you call what the call is part of: baggage, traceparent.

    existing: headers that you send already; their baggage is kept beside ours, their traceparent as it is.
    """
    origin, headers = _origin.get(), dict(existing or {})
    told = {name: value for name in _NAMES if (value := getattr(origin, name)) is not None}
    if origin.path:
        told["path"] = _BETWEEN.join(origin.path)
    others = [m for m in headers.get("baggage", "").split(",") if m and not m.strip().startswith(MEMBER_PREFIX)]
    ours = [f"{MEMBER_PREFIX}{name}={quote(value, safe=':@/~')}" for name, value in told.items()]
    if ours or others:
        headers["baggage"] = ",".join((*ours, *others))
    if origin.traceparent:
        headers.setdefault("traceparent", origin.traceparent)
    return headers

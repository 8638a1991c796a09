"""What a request calls: the template of its route, never its path, so that operations are as many as a service has routes."""

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY"))
UNMATCHED = "(unmatched)"
CACHED_MAX = 4_096
"""Paths whose template is remembered; a full memory is emptied."""
DEPTH_MAX = 8


class _Entry(NamedTuple):
    pattern: re.Pattern[str] | None
    """None: whatever comes, as for a route by host."""
    template: str
    methods: frozenset[str] | None
    below: "tuple[_Entry, ...] | None"
    """Routes of what is mounted here; None where it is no mount."""


class Routes:
    """The routes of a Starlette or FastAPI application, flattened when first asked and when their number changes."""

    def __init__(self) -> None:
        self._of: tuple[int, int] | None = None
        self._entries: tuple[_Entry, ...] = ()
        self._known: dict[tuple[str, str], str | None] = {}

    def template(self, routes: list[Any], method: str, path: str) -> str | None:
        """The template that a path is served by; None where no route is."""
        if self._of != (id(routes), len(routes)):
            self._of, self._entries = (id(routes), len(routes)), tuple(_entries(routes, 0))
            self._known.clear()
        key = (method, path)
        if key not in self._known:
            if len(self._known) >= CACHED_MAX:
                self._known.clear()
            self._known[key] = _find(self._entries, method, path)
        return self._known[key]


def _entries(routes: Iterable[Any], depth: int) -> Iterator[_Entry]:
    fastapi = sys.modules.get("fastapi.routing")
    flatten = getattr(fastapi, "iter_route_contexts", iter)  # since routers are included by reference
    for route in flatten(list(routes)):
        kind = type(getattr(route, "original_route", route))
        if any("WebSocket" in each.__name__ for each in kind.__mro__):
            continue
        pattern, template = getattr(route, "path_regex", None), getattr(route, "path_format", None)
        methods, below = getattr(route, "methods", None), getattr(route, "routes", None)
        if below is not None and depth < DEPTH_MAX:
            at = getattr(route, "path", "") or ""
            yield _Entry(pattern, at, None, tuple(_entries(below, depth + 1)))
        elif pattern is not None and template is not None:
            yield _Entry(pattern, template, frozenset(methods) if methods else None, None)


def _find(entries: tuple[_Entry, ...], method: str, path: str) -> str | None:
    """As Starlette chooses: the first that takes path and method, else the first that takes the path."""
    other = None
    for entry in entries:
        match = entry.pattern.match(path) if entry.pattern is not None else None
        if entry.pattern is not None and match is None:
            continue
        if entry.below is None:
            if entry.methods is None or method in entry.methods:
                return entry.template
            other = other or entry.template
            continue
        rest = "/" + match["path"] if match is not None else path
        inner = _find(entry.below, method, rest) if entry.below else "/{path}"
        if entry.pattern is not None:
            return entry.template + (inner or "/" + UNMATCHED)  # a mount keeps what it takes
        if inner is not None:
            return inner
    return other


def operation_of(method: str, template: str | None) -> str:
    """`GET /users/{id}`; methods that are none are `OTHER`."""
    return f"{method if method in METHODS else 'OTHER'} {template if template is not None else UNMATCHED}"

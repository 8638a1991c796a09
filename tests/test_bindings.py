"""Bindings at the edge: what the commands said, on real Redis, or that it is not known yet; never a stranger by mistake."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.quota_world import until
from tests.records import NOW_MS, account_of, opened
from tollway.connectors.bindings import READY, Bindings, BindingsWriter, Bound, Told, key_of
from tollway.connectors.embedded.process import free_port
from tollway.connectors.embedded.valkey import ValkeyServer
from tollway.connectors.errors import Unavailable
from tollway.connectors.redis import connect
from tollway.streams.bindings_view import BindingsView

ISSUER = "https://id.example"
ACME = account_of(0)
Client = Any


@pytest.fixture
def client(valkey: ValkeyServer) -> Iterator[Client]:
    with redis.Redis(host=valkey.host, port=valkey.port, password=valkey.password) as found:
        found.flushdb()
        yield found


class Edge:
    """One partition's commands, the view that writes them, and a reader that remembers nothing."""

    def __init__(self, url: str) -> None:
        self.state = opened()
        self.view = BindingsView(connect(url), "0-log", 1, check_s=0.05)
        self._reader = connect(url)
        self.now_s = 0.0
        self.reader = Bindings(self._reader, cache_s=5, cached_max=2, clock_s=lambda: self.now_s)

    async def bound(self, subject: str) -> Bound | None:
        return await Bindings(self._reader, cache_s=0).bound(ISSUER, "user", subject)

    def tell(self, kind: str, subject: str, **more: Any) -> None:
        body = {"issuer": ISSUER, "kind": "user", "subject": subject, **more}
        offset = self.state.next_offset
        command = {"command_id": f"c{offset}", "kind": kind, "account": ACME, "body": body, "kid": "k"}
        self.state.directory.apply(command, NOW_MS + offset, offset)
        self.state.next_offset += 1
        self.view.note(0, self.state)

    async def shown(self) -> None:
        self.view.note(0, self.state)
        await until(lambda: self.view.stats()["partitions_waiting"] == 0, "bindings are written")

    async def close(self) -> None:
        await self.view.close()
        await self._reader.aclose()


@pytest.fixture
async def edge(client: Client, valkey: ValkeyServer) -> AsyncIterator[Edge]:
    made = Edge(valkey.url)
    await made.view.start()
    yield made
    await made.close()


async def test_a_token_is_found_once_its_command_is_folded(edge: Edge) -> None:
    """A bound token gives account, principal, scopes and operations; an unbound one and a stranger give None."""
    edge.tell("principal.bind", "s1", principal="u1", scopes=["agent:a"], operations=["chat *"])
    await edge.view.assigned({0: edge.state})
    await edge.shown()
    assert await edge.bound("s1") == Bound(ACME, "user", "u1", ("agent:a",), ("chat *",))
    assert await edge.bound("nobody") is None
    edge.tell("principal.unbind", "s1")
    edge.tell("principal.bind", "s2", principal="u2")
    await edge.shown()
    assert (await edge.bound("s1"), await edge.bound("s2")) == (None, Bound(ACME, "user", "u2"))


async def test_only_what_changed_is_written(edge: Edge) -> None:
    """A change costs itself, not all bindings of the partition."""
    for number in range(5):
        edge.tell("principal.bind", f"s{number}", principal="u1")
    await edge.view.assigned({0: edge.state})
    await edge.shown()
    edge.tell("principal.bind", "s9", principal="u1")
    await edge.shown()
    assert edge.view.written == 6


async def test_before_every_partition_has_written_a_stranger_is_unavailable(
    client: Client, valkey: ValkeyServer
) -> None:
    """A Redis that lacks a partition's bindings cannot say that a token is unknown; it can say who a known one is."""
    connected = connect(valkey.url)
    try:
        writer, reader = BindingsWriter(connected, "0-log", 2), Bindings(connected, cache_s=0)
        with pytest.raises(Unavailable, match="not every partition"):
            await reader.bound(ISSUER, "user", "s1")
        await writer.write(0, [Told(ISSUER, "user", "s1", ACME, "u1", [], [], NOW_MS, 0)], "0")
        with pytest.raises(Unavailable, match="not every partition"):
            await reader.bound(ISSUER, "user", "s2")
        assert await reader.bound(ISSUER, "user", "s1") == Bound(ACME, "user", "u1")
        await writer.write(1, [], "-1")
        assert await reader.bound(ISSUER, "user", "s2") is None
    finally:
        await connected.aclose()


async def test_what_redis_forgot_is_written_again(edge: Edge, client: Client) -> None:
    """Flushed, or put back to an older copy, Redis has all bindings again without a restart of the fold."""
    edge.tell("principal.bind", "s1", principal="u1")
    await edge.view.assigned({0: edge.state})
    await edge.shown()
    older = {key: client.dump(key) for key in client.keys("tw:b:*")}
    edge.tell("principal.bind", "s1", principal="u2")
    await edge.shown()
    for copy in ({}, older):
        client.flushdb()
        for key, value in copy.items():
            client.restore(key, 0, value)
        await until(lambda: client.hget(key_of(ISSUER, "user", "s1"), "principal") == b"u2", "it is whole again")
        await edge.shown()
        assert client.hget(READY, "0") == str(edge.state.directory.bound_offset).encode()


async def test_the_later_command_wins_whatever_the_order_of_writing(client: Client, valkey: ValkeyServer) -> None:
    """A former owner that writes late, and the same write twice, change nothing; another partition's later bind does."""
    connected = connect(valkey.url)
    try:
        writer, reader = BindingsWriter(connected, "0-log", 1), Bindings(connected, cache_s=0)

        async def write(partition: int, principal: str, at_ms: int, offset: int) -> Bound | None:
            await writer.write(partition, [Told(ISSUER, "user", "s1", ACME, principal, [], [], at_ms, offset)], "0")
            return await reader.bound(ISSUER, "user", "s1")

        assert await write(0, "u1", NOW_MS, 7) == Bound(ACME, "user", "u1")
        for late in ((0, "u0", NOW_MS, 6), (0, "u0", NOW_MS - 1, 9), (0, "u0", NOW_MS, 7)):
            assert await write(*late) == Bound(ACME, "user", "u1")
        assert await write(0, "u2", NOW_MS, 8) == Bound(ACME, "user", "u2")
        assert await write(1, "u3", NOW_MS, 1) == Bound(ACME, "user", "u3")
    finally:
        await connected.aclose()


async def test_another_logs_marks_are_not_ours(client: Client, valkey: ValkeyServer) -> None:
    """A grown log begins its marks anew; the log before it cannot put its own back."""
    connected = connect(valkey.url)
    try:
        old, grown = BindingsWriter(connected, "0-log", 1), BindingsWriter(connected, "1-next", 2)
        await old.write(0, [], "5")
        await grown.write(0, [], "3")
        await old.write(0, [], "6")
        assert (await old.mark(0), await grown.mark(0)) == (None, "3")
        with pytest.raises(Unavailable):
            await Bindings(connected).bound(ISSUER, "user", "s1")
    finally:
        await connected.aclose()


async def test_a_reader_remembers_for_its_time_and_up_to_its_bound(edge: Edge, client: Client) -> None:
    """Within `cache_s` no round trip is made; the longest unused answer goes when there are too many."""
    for number in range(3):
        edge.tell("principal.bind", f"s{number}", principal="u1")
    await edge.view.assigned({0: edge.state})
    await edge.shown()

    async def trips(subject: str) -> int:
        before = client.info("commandstats").get("cmdstat_hmget", {}).get("calls", 0)
        assert await edge.reader.bound(ISSUER, "user", subject) is not None
        return int(client.info("commandstats")["cmdstat_hmget"]["calls"]) - before

    await edge.view.close()
    assert [await trips(subject) for subject in ("s0", "s0", "s1", "s0", "s2", "s0", "s1")] == [1, 0, 1, 0, 1, 0, 1]
    edge.now_s = 5.0
    assert await trips("s0") == 1


async def test_redis_away_is_unavailable_and_the_view_waits_for_it(tmp_path: Path) -> None:
    """No answer is no stranger; what could not be written is written once Redis is there."""
    server = ValkeyServer(tmp_path, free_port())
    edge = Edge(server.url)
    await edge.view.start()
    try:
        with pytest.raises(Unavailable, match="Redis does not answer"):
            await edge.bound("s1")
        edge.tell("principal.bind", "s1", principal="u1")
        await edge.view.assigned({0: edge.state})
        await until(lambda: edge.view.stats()["error"], "the view says that Redis is away")
        with server:
            await edge.shown()
            assert await edge.bound("s1") == Bound(ACME, "user", "u1")
            await edge.close()
    finally:
        await edge.close()


def test_operations_are_names_or_beginnings() -> None:
    """Without any, all are allowed; a trailing * stands for any rest."""
    bound = Bound("a", "client", "c", operations=("chat *", "GET /v1"))
    assert [bound.may(name) for name in ("chat x", "chat ", "chat", "GET /v1", "GET /v1/x")] == [
        True,
        True,
        False,
        True,
        False,
    ]
    assert Bound("a", "client", "c").may("anything")
    assert Bound("a", "client", "c", operations=("*",)).may("anything")

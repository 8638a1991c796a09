"""The gate contract's real scripts on a real Valkey, at a time of the test's choosing, beside the model in Python."""

from typing import Any

import msgpack

from tests.simulation.gate_model import Lane, Meta, Policy, Record
from tollway.schemas.lane import tag


def policy_fields(account: str, policy: Policy) -> list[str]:
    """As `streams.policy.gate_fields` writes them."""
    windows: dict[str, str] = {}
    for meter, window in policy.shapes:
        windows[meter] = windows.get(meter, "") + window
    limited = " ".join(f"{meter}:{names}" for meter, names in sorted(windows.items()))
    fields = {"v": policy.version, "frozen": int(policy.frozen), "full": int(policy.full), "outage": policy.outage}
    fields |= {"max_staleness_s": policy.max_staleness_s, "limited": limited, **policy.limits}
    return [account, *(str(item) for pair in fields.items() for item in pair)]


class Real:
    """The scripts of one lane. `now_us` stands for Redis' TIME."""

    def __init__(self, client: Any, number: int) -> None:
        self.client, self.tag, self.now_us = client, tag(number), 0
        self._shas: dict[str, str] = {}

    def run(self, script: Any, keys: list[str], arguments: list[Any]) -> Any:
        """Call a script with its clock set."""
        sha = self._shas.get(script.text)
        if sha is None:
            text = script.text.replace("redis.call('TIME')", "CLOCK").replace("#ARGV", "(#ARGV - 2)")
            clock = "local CLOCK = {ARGV[#ARGV - 1], ARGV[#ARGV]}\n"  # two arguments that the script does not see
            sha = self._shas[script.text] = self.client.script_load(clock + text)
        seconds, micros = divmod(self.now_us, 1_000_000)
        return plain(self.client.evalsha(sha, len(keys), *keys, *arguments, seconds, micros))

    def fold(self, script: Any, *arguments: Any) -> Any:
        """One of the fold's scripts: KEYS[1] = `m`."""
        return self.run(script, [f"{self.tag}m"], list(arguments))


def plain(reply: Any) -> Any:
    if isinstance(reply, list):
        return [plain(item) for item in reply]
    if not isinstance(reply, bytes):
        return reply
    try:
        return reply.decode()
    except UnicodeDecodeError:
        return reply  # packed


def read(client: Any, number: int) -> dict[str, Any]:
    """The real lane, as `Lane.content` gives the model's."""
    t, lane = tag(number), Lane()
    keys = [raw.decode() for raw in client.scan_iter("tw:*", count=10_000)]
    kinds = [key.removeprefix(t).partition(":") for key in keys]
    pipe = client.pipeline(transaction=False)
    for key, (kind, _, _) in zip(keys, kinds, strict=True):
        if kind in ("hx", "fx"):
            pipe.zrange(key, 0, -1, withscores=True)
        elif kind == "i":
            pipe.get(key)
        else:
            pipe.hgetall(key)
    for (kind, _, name), found in zip(kinds, pipe.execute(), strict=True):
        if kind in ("hx", "fx"):
            setattr(lane, kind, {member.decode(): int(score) for member, score in found})
        elif kind == "i":
            lane.i[name] = earlier(msgpack.unpackb(found))
        else:
            _read_hash(lane, kind, name, found)
    return lane.content()


def _read_hash(lane: Lane, kind: str, name: str, raw: dict[bytes, bytes]) -> None:
    packed = raw.pop(b"r", None)
    fields = {key.decode(): value.decode() for key, value in raw.items()}
    if kind == "m":
        ints = {key: int(fields[key]) for key in ("gen", "off", "begun", "part", "log")}
        lane.m = Meta(epoch=fields["epoch"], state=fields["state"], tok=fields["tok"], **ints)
    elif kind in ("g", "n"):
        setattr(lane, kind, {key: int(value) for key, value in fields.items()})
    elif kind == "p":
        limits = {key: int(value) for key, value in fields.items() if "|" in key}
        told = (fields["outage"], int(fields["max_staleness_s"]))
        lane.p[name] = Policy(int(fields["v"]), limits, fields["frozen"] == "1", fields["full"] == "1", *told)
    elif kind == "h":
        account, call, *flat = msgpack.unpackb(packed)
        rows = [[flat[at], flat[at + 1], int(flat[at + 2])] for at in range(0, len(flat), 3)]
        lane.h[name] = Record(
            fields["st"], int(fields["exp"]), account, call, rows, fields.get("src", ""), int(fields.get("seq", 0))
        )
    elif kind == "s":
        for key, value in fields.items():
            lane.s.setdefault(name, {}).setdefault(key[:-2], [None, None])[0 if key.endswith("u") else 1] = int(value)


def row(found: list[str]) -> tuple[Any, ...]:
    scope, base, stop, limit, left, units = found
    return scope, base, int(stop) if stop else None, int(limit), int(left), int(units)


def earlier(found: list[Any]) -> tuple[Any, ...]:
    """fingerprint, hold, at, expires, grants, rows."""
    fingerprint, hold, at_us, expires, flat, rows = found
    grants = tuple(sorted((meter, int(units)) for meter, units in zip(flat[::2], flat[1::2], strict=True)))
    return fingerprint, hold, int(at_us), int(expires), grants, tuple(map(row, rows))


def number(text: str) -> int | None:
    return int(text) if text else None


def head(reply: list[str]) -> tuple[Any, ...]:
    return (reply[0], number(reply[1]), number(reply[2]), *(int(count) for count in reply[3:4]))


def authorized(reply: list[Any]) -> tuple[Any, ...]:
    """The script's answer as the model gives it."""
    told = (*head(reply), reply[4], int(reply[5]), number(reply[6]))
    if len(reply) == 7:
        return told
    body = msgpack.unpackb(reply[7])
    if reply[0] in ("DENY", "CLOSED"):
        return (*told, row(body[0]), tuple(map(row, body[1])))
    return (*told, *earlier(body))

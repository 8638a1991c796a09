"""What stands in each partition before the traffic, and what the folds make of it: made once a process, the same in all worlds."""

import asyncio
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.simulation.fold_loop import OUTSIDE, Loop
from tests.simulation.fold_sinks import Store
from tests.simulation.fold_traffic import METERS, POLICIES, PRICE, accounts_of
from tollway.connectors.control import Signer, signed_record
from tollway.schemas.command import LogConfig
from tollway.schemas.topics import BROADCAST, TICK_KEY
from tollway.streams.bootstrap import first_states
from tollway.streams.owned import as_records
from tollway.streams.refold import Row, folds

START_MS = 1_767_225_480_000  # 2025-12-31 23:58 UTC: a year, a month and a day end in two minutes
STEP_MS = 5_000
WIDTH = 128
"""Partitions of the log; only one or two of them have anything in them. A partition then has two lanes."""
EPOCH = "0-the-log"
SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))), "first")
CONFIG = LogConfig(EPOCH, "sim", SIGNER.kid, SIGNER.public_key, billing_window_s=60, billing_grace_s=10, snapshot_s=600)


@dataclass(frozen=True)
class Opening:
    """The first records of a partition; the groups' states before and behind them, and the rows of the audit log."""

    records: list[Row]
    nothing: dict[str, bytes]
    folded: dict[str, bytes]
    inserts: list[tuple[str, list[dict[str, Any]], str]]


def packed(state: dict[str, Any]) -> bytes:
    """A dump as bytes: loading takes parts of a dump as they are, and folds on in them."""
    data: bytes = msgpack.packb(state, use_bin_type=True)
    return data


def unpacked(data: bytes) -> dict[str, Any]:
    state: dict[str, Any] = msgpack.unpackb(data, raw=False, strict_map_key=False)
    return state


def _commands(number: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Two accounts are open and bound, a third waits for its customer. The first has limits."""
    first, second, third = accounts_of(number, WIDTH, 3)
    return [
        (BROADCAST, "log.open", CONFIG.body()),
        *((BROADCAST, "meter.add", {"meter": meter, "event_name": name}) for meter, name in METERS.items()),
        (BROADCAST, "price.add", PRICE),
        *((account, "account.open", {"name": account}) for account in (first, second, third)),
        *((account, "customer.bind", {"customer": f"cus_{account}"}) for account in (first, second)),
        (first, "policy.set", POLICIES[0]),
    ]


@cache
def opening(number: int) -> Opening:
    """Of one partition. A tick a step later ends it: late usage of the first step would else wait for the second flush."""
    rows = []
    for offset, (account, kind, body) in enumerate(_commands(number)):
        command_id = f"{number:016x}{offset:016x}"
        key, value, headers = signed_record(SIGNER, command_id, account, kind, body, START_MS * 1000)
        rows.append(Row(offset, START_MS, key, value, tuple(headers)))
    rows.append(Row(len(rows), START_MS + STEP_MS, TICK_KEY, None, ()))
    nothing = {group: packed(state) for group, state in first_states(EPOCH, number, WIDTH).items()}
    folded, inserts = dict(nothing), Store(None)  # type: ignore[arg-type]
    loop = Loop(random.Random(number))

    async def fold() -> None:
        for group, mine in folds(EPOCH, WIDTH, SIGNER.public_key, None).items():  # type: ignore[arg-type]
            state, stash, effects = mine.load(number, unpacked(nothing[group])), list(rows), []
            while stash and (count := mine.ready(state, stash)):
                effects.append(await mine.take(state, as_records(stash[:count])))  # type: ignore[arg-type]
                del stash[:count]
                await asyncio.sleep(0)
            folded[group] = packed(state.dump())
            if group == "audit":
                inserts._insert([block for effect in effects for block in effect.blocks])

    task = loop.spawn(OUTSIDE, fold())
    loop.run_until(0.0)
    task.result()
    return Opening(rows, nothing, folded, inserts.steps)

"""How `tollway doctor` looks: each question under a deadline, each answer a finding, no failure of a part a failure of its own."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

from confluent_kafka import KafkaException

from tollway.connectors.errors import Refused
from tollway.streams.settings import Settings

DEADLINE_S = 5.0
"""No look takes longer."""
CLOCKS_APART_MAX_S = 5
"""Clocks that time servers keep are not a second apart; from 60 s on usage is clamped and gates close."""
DISK_FREE_MIN_BYTES = 1 << 30
SAID_MAX = 240
"""Characters of what an error says; clients wrap the cause in much of their own."""
FAILED = object()
ALL = "all"
"""No role of `connectors.rights`: whoever has every right of every role."""


@dataclass(frozen=True)
class Finding:
    """What one look found: `what` is the fact, `cure` what to do about it, empty where all is well."""

    part: str
    ok: bool
    what: str
    cure: str = ""


@dataclass
class Examination:
    """The settings under examination and what was found so far; `on_found` hears each finding at once."""

    settings: Settings
    role: str = ALL
    clock_s: Callable[[], float] = time.time
    disk_free_min_bytes: int = DISK_FREE_MIN_BYTES
    on_found: Callable[[Finding], None] = lambda finding: None
    findings: list[Finding] = field(default_factory=list)

    def well(self, part: str, what: str) -> None:
        """All is well with this."""
        self._add(Finding(part, True, what))

    def ill(self, part: str, what: str, cure: str) -> None:
        """Something is wrong with this."""
        self._add(Finding(part, False, what, cure))

    async def ask(self, part: str, answer: Awaitable[Any], cure: str) -> Any:
        """The answer; FAILED, with a finding, where it is an error or late. A refusal names its own cure."""
        try:
            return await asyncio.wait_for(answer, DEADLINE_S)
        except TimeoutError:
            self.ill(part, f"no answer within {DEADLINE_S:g} s", cure)
        except Refused as error:
            what, own = split(one_line(error))
            self.ill(part, what, own or cure)
        except Exception as error:  # noqa: BLE001 what goes wrong in a way nobody thought of is a finding too
            self.ill(part, one_line(error), cure)
        return FAILED

    def clock(self, part: str, theirs_s: float, asked_s: float) -> None:
        """Compare a part's clock with ours, which was `asked_s` when it was asked: it answered half-way."""
        apart_s = theirs_s - (asked_s + self.clock_s()) / 2
        if abs(apart_s) > CLOCKS_APART_MAX_S:
            way = "ahead of" if apart_s > 0 else "behind"
            self.ill(part, f"its clock is {abs(apart_s):.0f} s {way} ours", "let a time server keep both clocks")
        else:
            self.well(part, f"its clock and ours are less than {CLOCKS_APART_MAX_S} s apart")

    def disk(self, part: str, name: str, free_bytes: int) -> None:
        """Room on a disk."""
        if free_bytes < self.disk_free_min_bytes:
            what = f"{name} has {free_bytes >> 20} MiB left, less than {self.disk_free_min_bytes >> 20}"
            self.ill(part, what, "make room, or give it a larger one")
        else:
            self.well(part, f"{name} has {free_bytes >> 30} GiB left")

    def _add(self, finding: Finding) -> None:
        self.findings.append(finding)
        self.on_found(finding)


class Abandonable(ThreadPoolExecutor):
    """A thread a call, which nobody waits for: one that hangs in a client's code ends with the process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run it now."""
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 raised where the future is awaited
                future.set_exception(error)

        Thread(target=run, daemon=True).start()
        return future


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    if isinstance(error, KafkaException):
        return f"{error.args[0].str().rstrip(': ')} ({error.args[0].name()})"
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= SAID_MAX else said[: SAID_MAX - 1] + "…"


def split(sentence: str) -> tuple[str, str]:
    """A refusal's fault and its cure: parted at the last colon that stands in no parenthesis."""
    bare = re.sub(r"\([^()]*\)", lambda inside: "~" * len(inside[0]), sentence)
    at = bare.rfind(": ")
    return (sentence[:at], sentence[at + 2 :]) if at > 0 else (sentence, "")

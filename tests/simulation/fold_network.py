"""The network between processes and parts: requests and answers take time, and each may be lost, or come late."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

from tests.simulation.fold_loop import Loop, Process

OK, LOST, ACK_LOST, LATE = "ok", "lost", "ack_lost", "late"
SILENCE_S = 3.0
"""A client hears of a lost answer after so long."""


class Away(Exception):
    """No answer."""


class Network:
    """`trouble` = share of calls, in parts of a thousand, that do not go well."""

    def __init__(self, loop: Loop, dice: random.Random) -> None:
        self.loop, self.dice = loop, dice
        self.trouble = 0

    def fate(self, away: bool) -> str:
        """What becomes of a call."""
        if away:
            return LOST
        if self.dice.random() * 1000 >= self.trouble:
            return OK
        return self.dice.choice((LOST, ACK_LOST, ACK_LOST, LATE))

    async def call(self, serve: Callable[[], Any], *, away: bool = False, fate: str | None = None) -> Any:
        """Answer of `serve`, run once the request has arrived. Raises Away; then it may have run, or run later."""
        Process.current()
        fate = fate or self.fate(away)
        done, loop, dice = self.loop.create_future(), self.loop, self.dice

        def arrive() -> None:
            try:
                answer, failure = serve(), None
            except Exception as error:  # noqa: BLE001 - it is the answer
                answer, failure = None, error
            if fate == OK:
                loop.after(dice.uniform(0.001, 0.02), lambda: tell(answer, failure))

        def tell(answer: Any, failure: Exception | None) -> None:
            if done.done():
                return
            if failure is not None:
                done.set_exception(failure)
            else:
                done.set_result(answer)

        if fate != LOST:
            loop.after(dice.uniform(5.0, 40.0) if fate == LATE else dice.uniform(0.001, 0.03), arrive)
        if fate != OK:
            loop.after(dice.uniform(0.2, SILENCE_S), lambda: tell(None, Away(fate)))
        answer = await done
        Process.current()
        return answer


async def virtual(seconds: float) -> None:
    """As long as it takes, in virtual time."""
    done = asyncio.get_running_loop().create_future()
    timer = asyncio.get_running_loop().call_later(seconds, done.set_result, None)
    try:
        await done
    finally:
        timer.cancel()

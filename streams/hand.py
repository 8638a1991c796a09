"""The hop from the engine to a Faust agent: re-sent until taken, and its failure comes back (design §3).

A rebalance of Faust's own consumer empties every channel, so a message may vanish; an agent marks its work as taken before it
touches any state, so a message that arrives twice is done once.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

RESEND_S = 0.5


@dataclass
class Work:
    """One thing to think about, and where the thought goes."""

    subject: Any
    done: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    taken: bool = False


class Hand:
    """Hands subjects to one agent's channel and waits for what it made of them."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    async def __call__(self, subject: Any) -> Any:
        """The agent's result; raises what the agent's thinking raised."""
        work = Work(subject)
        while not work.taken:
            try:
                # Hangs while Faust's flow is suspended, loses the message when it resumes.
                await asyncio.wait_for(self._channel.send(value=work), RESEND_S)
            except TimeoutError:
                continue
            await asyncio.wait({work.done}, timeout=RESEND_S)
        return await work.done


def take(work: Work, think: Callable[[Any], Any]) -> None:
    """An agent's whole body: think once, give the result or the failure back, never raise into Faust's supervisor."""
    if work.taken:
        return
    work.taken = True
    try:
        result = think(work.subject)
    except Exception as error:  # noqa: BLE001 - it goes back to whoever handed the work over
        work.done.set_exception(error)
    else:
        work.done.set_result(result)

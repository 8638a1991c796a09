"""The hop to an agent: re-sent until taken, done once, and its failure comes back."""

import asyncio
from collections.abc import AsyncIterator, Callable

import faust
import pytest
from faust.types import EventT

from tollway.streams.hand import Hand, Work, take


class LossyChannel:
    """Loses the first messages, as Faust's channels do when its own consumer rebalances; then delivers twice."""

    def __init__(self, lose: int) -> None:
        self.lose, self.sent, self.works = lose, 0, asyncio.Queue[Work]()

    async def send(self, *, value: Work) -> None:
        """Lose it, or deliver it twice."""
        self.sent += 1
        if self.sent > self.lose:
            await self.works.put(value)
            await self.works.put(value)

    async def agent(self, think: Callable[[object], object]) -> None:
        """As an agent takes them."""
        while True:
            take(await self.works.get(), think)


async def test_a_lost_message_is_sent_again_and_thought_once() -> None:
    """Two losses and a double delivery: the subject is thought about once, and the result arrives."""
    channel, thoughts = LossyChannel(lose=2), []

    def think(subject: object) -> int:
        thoughts.append(subject)
        return 42

    agent = asyncio.create_task(channel.agent(think))
    assert await asyncio.wait_for(Hand(channel)("subject"), 20) == 42
    assert (thoughts, channel.sent) == (["subject"], 3)
    agent.cancel()


async def test_an_agents_failure_reaches_the_engine_and_not_its_supervisor() -> None:
    """What thinking raises is raised where the work came from; the agent goes on with the next work."""
    channel = LossyChannel(lose=0)

    def think(subject: object) -> object:
        if subject == "bad":
            raise ValueError("cannot count that")
        return subject

    agent = asyncio.create_task(channel.agent(think))
    hand = Hand(channel)
    with pytest.raises(ValueError, match="cannot count that"):
        await hand("bad")
    assert await hand("good") == "good"
    agent.cancel()


async def test_a_real_faust_channel_that_is_cleared_loses_nothing() -> None:
    """`suspend` and `resume` of an app's flow empty its channels: the work in flight is sent again."""
    app = faust.App("hand-test", broker="kafka://127.0.0.1:1", store="memory://")
    channel = app.channel(maxsize=1)
    works = aiter(channel)  # subscribes, as an agent does when it starts
    app.flow_control.resume()
    hand = Hand(channel)
    waiting = asyncio.create_task(hand(7))
    async with asyncio.timeout(20):
        while not works.queue.qsize():
            await asyncio.sleep(0)
        app.flow_control.suspend()
        app.flow_control.resume()
        assert works.queue.qsize() == 0
        running = asyncio.create_task(agent(works))
        assert await waiting == 42
    running.cancel()


async def agent(events: AsyncIterator[EventT[Work]]) -> None:
    """As the app's agents are, one level lower: a channel yields events."""
    async for event in events:
        take(event.value, lambda subject: subject * 6)

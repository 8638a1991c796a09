"""Is the topic still the one that was opened? A topic made anew under the same name goes on at the same offsets, unnoticed.

Kafka's client names topics, not ids, when it fetches. So the id is asked for after each fetch and before any effect of it is
sent: what was fetched before the answer is of the log that the answer names.
"""

from typing import Any

from tollway.connectors.errors import Fatal, Refused, Unavailable
from tollway.connectors.topic_id import TopicIds

TIMEOUT_S = 5.0


class SameLog:
    """One topic's id, from the first answer on; `topic_id` where it is known from the epoch."""

    def __init__(self, bootstrap: str, security: dict[str, Any], topic: str, topic_id: str | None) -> None:
        self._ids = TopicIds(bootstrap, security, TIMEOUT_S)
        self._topic, self._topic_id = topic, topic_id

    async def confirm(self) -> None:
        """Raises Fatal where it is another topic by now, Unavailable where no broker says."""
        try:
            found = await self._ids.topic_id(self._topic)
        except Refused as error:  # deleted, perhaps; a broker that has just started may not know it yet
            raise Unavailable(str(error)) from error
        self._topic_id = self._topic_id or found
        if found != self._topic_id:
            raise Fatal(
                f"topic {self._topic} was deleted and made anew (id {found}, it was {self._topic_id}): nothing of it was "
                "folded; restore the old one, or start a new deployment for the new log"
            )

    async def close(self) -> None:
        """Its connection."""
        await self._ids.close()

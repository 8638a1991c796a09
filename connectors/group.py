"""Is a consumer group at work?"""

import asyncio
import time

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from tollway.connectors.errors import Refused, Unavailable

TIMEOUT_S = 15.0
LOOK_S = 0.5


async def refuse_members(bootstrap: str, security: dict[str, str], groups: list[str], wait_s: float) -> None:
    """Raises Refused where a group has members still after `wait_s`: what is written behind a worker's back, it overwrites.

    A worker that has ended stays a member until its session times out.
    """
    client = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0, "error_cb": lambda _: None, **security})
    until = time.monotonic() + wait_s
    for group in groups:
        while names := await _members(client, group):
            if time.monotonic() > until:
                raise Refused(
                    f"group {group} has {len(names)} members ({', '.join(names)}): stop its workers, then try again"
                )
            await asyncio.sleep(LOOK_S)


async def _members(client: AdminClient, group: str) -> list[str]:
    name = f"tollway.{group}"
    future = client.describe_consumer_groups([name], request_timeout=TIMEOUT_S)[name]
    try:
        found = await asyncio.to_thread(future.result, TIMEOUT_S)
    except KafkaException as error:
        if error.args[0].name() == "GROUP_ID_NOT_FOUND":
            return []
        raise Unavailable(f"group {group} cannot be described: {error.args[0].str()}") from error
    return sorted(member.group_instance_id or member.client_id for member in found.members)

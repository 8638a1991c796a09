"""A TCP relay between a client and a part: it can take an answer away after the part has done what was asked."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Relay:
    """Forwards both ways. While `swallow` > 0 the next answer of the part ends the client's connection unread, once each."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.port = 0
        self.swallow = 0
        self.swallowed = 0

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            part, to_part = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            to_client.close()
            return
        forth = asyncio.create_task(self._copy(client, to_part, answers=False))
        back = asyncio.create_task(self._copy(part, to_client, answers=True))
        await asyncio.wait({forth, back}, return_when=asyncio.FIRST_COMPLETED)
        for task, writer in ((forth, to_part), (back, to_client)):
            task.cancel()
            writer.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if answers and self.swallow:
                    self.swallow -= 1
                    self.swallowed += 1
                    return
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def relay_to(port: int) -> AsyncIterator[Relay]:
    """A relay to a port of this machine, on a free one."""
    relay = Relay(port)
    server = await asyncio.start_server(relay._serve, "127.0.0.1", 0)
    relay.port = server.sockets[0].getsockname()[1]
    try:
        yield relay
    finally:
        server.close()

"""TLS in front of a server that has none of its own, as a proxy does it in production: bytes in, bytes out."""

import asyncio
import ssl
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from tollway.connectors.embedded.process import LOOPBACK, free_port

CHUNK = 1 << 16


class TlsFront:
    """Listens with a certificate on `port` and passes what it gets on to a port without one. Use as a context manager."""

    def __init__(self, target_port: int, certificate: Path) -> None:
        self.port = free_port()
        self._target_port, self._certificate = target_port, certificate
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(_end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _listen(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate)
        await asyncio.start_server(self._accept, LOOPBACK, self.port, ssl=context)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(LOOPBACK, self._target_port)
        await asyncio.gather(_pass(reader, inner_writer), _pass(inner_reader, writer))


async def _end() -> None:
    open_still = asyncio.all_tasks() - {asyncio.current_task()}
    for task in open_still:
        task.cancel()
    await asyncio.gather(*open_still, return_exceptions=True)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
    except OSError:
        return  # the other side is gone
    finally:
        writer.close()

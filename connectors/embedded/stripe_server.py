"""A Stripe of our own on loopback: the billing meters' part of its API, with Stripe's refusals, and faults on demand.

Run it with `python -m tollway.connectors.embedded.stripe_server --port N --data DIR`. The key is in `DIR/key`.
"""

import argparse
import asyncio
import contextlib
import secrets
import signal
import sys
import urllib.request
from pathlib import Path

from aiohttp import web

from tollway.connectors.embedded.part import Part
from tollway.connectors.embedded.process import LOOPBACK, Child, free_port, write_atomically
from tollway.connectors.embedded.stripe_admin import look_routes, order_routes
from tollway.connectors.embedded.stripe_http import Server, api_routes
from tollway.connectors.embedded.stripe_journal import Journal
from tollway.connectors.errors import Fatal, TollwayError

MODULE = "tollway.connectors.embedded.stripe_server"
STOP_S = 2


class StripeServer(Part):
    """The stand-in as a child process, its data under `data/stripe`; port and key are made up unless given."""

    def __init__(self, data: Path, port: int | None = None, *, key: str | None = None, clock_rate: str = "1") -> None:
        super().__init__(data)
        self.port = port or free_port()
        self._folder = data / "stripe"
        self._clock_rate = clock_rate
        self.key = key or key_of(self._folder)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def child(self) -> Child:
        argv = (sys.executable, "-m", MODULE, "--port", str(self.port), "--data", str(self._folder))
        return Child("stripe", (*argv, "--clock-rate", self._clock_rate), ready=self.answers, prepare=self._prepare)

    def _prepare(self) -> None:
        write_atomically(self._folder / "key", self.key)  # a file, because arguments are seen by every user

    def answers(self) -> bool:
        """Whether it serves."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def key_of(folder: Path) -> str:
    """The secret key that a data folder's server takes; a new one where there is none yet."""
    try:
        return (folder / "key").read_text().strip()
    except FileNotFoundError:
        return f"sk_test_{secrets.token_hex(16)}"


async def serve(port: int, folder: Path, clock_rate: float | None) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises Fatal where the folder or the port is taken."""
    journal = Journal(folder / "journal.jsonl")
    key = key_of(folder)
    write_atomically(folder / "key", key)
    server = Server(journal, key)
    if server.clock.entry["machine_s"] == 0 or clock_rate is not None:
        server.record(server.clock.moved(rate=clock_rate))
    app = web.Application(middlewares=[server.guard])
    app.add_routes([*api_routes(server), *look_routes(server), *order_routes(server)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_S)
    await runner.setup()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    writing = asyncio.create_task(journal.run())
    try:
        await web.TCPSite(runner, LOOPBACK, port).start()
        await stop.wait()
    except OSError as error:
        raise Fatal(f"port {port} cannot be used on {LOOPBACK}: {error.strerror}: choose another --port") from error
    finally:
        await runner.cleanup()
        writing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writing


def main() -> int:
    """The command line. 0 after a stop, 1 with one sentence where it cannot start."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of its journal and key")
    parser.add_argument(
        "--clock-rate", type=float, help="how fast its clock runs; 0 stands still (default: as before, at first 1)"
    )
    given = parser.parse_args()
    try:
        asyncio.run(serve(given.port, given.data, given.clock_rate))
    except TollwayError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the real parts have in common: a data folder, a port, a child process."""

from pathlib import Path
from types import TracebackType
from typing import Self

from tollway.connectors.embedded.process import Child, Process


class Part:
    """A real part run by itself; a supervisor takes its `child()` instead. Use as a context manager, or start and stop.

    Start it from a thread that outlives it (see `Process`).
    """

    def __init__(self, data: Path) -> None:
        self.data = data
        self._process: Process | None = None

    def child(self) -> Child:
        raise TypeError(f"{type(self).__name__} does not say how it is run")

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process; data from an earlier run is used again."""
        self._process = Process(self.child(), self.data)
        self._process.start()

    def wait_ready(self, deadline_s: float | None = None) -> None:
        """Raises Unavailable when it ended or is not ready in time."""
        if self._process is None:
            raise TypeError("start it first")
        self._process.wait_ready(deadline_s)

    def stop(self, deadline_s: float | None = None) -> None:
        """Cleanly, killed after the deadline."""
        if self._process:
            self._process.stop(deadline_s)

    def kill(self) -> None:
        """kill -9."""
        if self._process:
            self._process.kill()

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

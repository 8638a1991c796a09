"""What an emitter may be told: limits, their defaults, its folder."""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tollway.connectors.errors import Refused
from tollway.connectors.frame import FRAME_BYTES_MAX
from tollway.connectors.spool import SEGMENT_BYTES

SPOOL_BYTES_MAX = 1 << 30
SPOOL_EVENTS_MAX = 5_000_000
MEMORY_BYTES_MAX = 64 << 20
EVENTS_MIN = 8
elapsed_s = partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
"""Seconds since some start, never set, a machine's sleep included where the system counts it."""
PARTS = 8
"""Segments that a full spool has at least: `drop_oldest` gives up one of them at a time."""
SECURITY = (
    "client_id", "security_protocol", "ssl_context", "sasl_mechanism", "sasl_plain_username", "sasl_plain_password",
    "sasl_kerberos_service_name", "sasl_kerberos_domain_name", "sasl_oauth_token_provider",
)  # fmt: skip
"""Arguments that go to aiokafka as they are."""


@dataclass(frozen=True)
class Limits:
    """How much may wait, and where. Raises Refused for a value out of range."""

    durability: Literal["disk", "memory"] = "disk"
    bytes_max: int | None = None
    events_max: int = SPOOL_EVENTS_MAX
    when_full: Literal["refuse", "drop_oldest"] = "refuse"
    fsync_interval_s: float | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("durability", self.durability, ("disk", "memory")),
            ("when_full", self.when_full, ("refuse", "drop_oldest")),
        ):
            if value not in allowed:
                raise Refused(f"{name} is {value!r}: give one of {', '.join(allowed)}")
        for name, count, least in (
            ("spool_bytes_max", self.room_bytes, FRAME_BYTES_MAX),
            ("spool_events_max", self.events_max, EVENTS_MIN),
        ):
            if count < least:
                raise Refused(f"{name} is {count!r}: give at least {least}")
        if self.fsync_interval_s is not None and self.fsync_interval_s <= 0:
            raise Refused(f"fsync_interval_s is {self.fsync_interval_s!r}: give seconds above 0, or None")

    @property
    def room_bytes(self) -> int:
        """The limit in bytes, given or by default."""
        if self.bytes_max is not None:
            return self.bytes_max
        return SPOOL_BYTES_MAX if self.durability == "disk" else MEMORY_BYTES_MAX

    @property
    def segment_bytes(self) -> int:
        return min(SEGMENT_BYTES, self.room_bytes // PARTS)

    @property
    def segment_events(self) -> int:
        return self.events_max // PARTS


def check_security(names: Iterable[str]) -> None:
    """Raises Refused for an argument that is none of aiokafka's."""
    for name in names:
        if name not in SECURITY:
            raise Refused(f"{name} is no argument of Emitter: those for aiokafka are {', '.join(SECURITY)}")


def default_spool_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """$TOLLWAY_SPOOL_DIR, else $XDG_STATE_HOME/tollway/spool, else ~/.local/state/tollway/spool."""
    if given := environ.get("TOLLWAY_SPOOL_DIR"):
        return Path(given)
    state = environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "tollway" / "spool"


def spool_folder(spool_dir: str | Path | None) -> Path:
    """The folder, made where it is missing. Raises Refused."""
    root = Path(spool_dir) if spool_dir is not None else default_spool_dir()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(root, error) from error
    return root


def unwritable(root: Path | None, error: OSError) -> Refused:
    return Refused(f"spool_dir is {str(root)!r}: {error.strerror or error}; give a folder that can be written")

"""The spools that dead processes left: found in the folder, one successor each."""

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tollway.connectors.spool import Spool, unforked
from tollway.connectors.tally import Tally
from tollway.schemas.usage import UUID_HEX

HALF_MADE_S = 3_600
"""A folder that was never finished is removed after this."""
ADOPTED_MAX = 64
"""Spools of dead processes that one process has open at a time: each takes two of the service's file descriptors."""

log = logging.getLogger("tollway.emitter")


class Others(NamedTuple):
    """Bytes in the folder that are not our own, and whether there was no room to look at all of the spools."""

    size_bytes: int
    more: bool


def adopt_dead(root: Path, tally: Tally, own: set[str], adopted: set[str], take: Callable[[Spool], object]) -> Others:
    """Give `take` the spools under `root` whose owners are dead, but for the sources `adopted` already; ADOPTED_MAX in all.

    Raises OSError where the folder cannot be read.
    """
    others_bytes, room, more = 0, ADOPTED_MAX - len(adopted), False
    for folder in sorted(root.iterdir()):
        source = folder.name.lstrip(".")
        if source in own or not UUID_HEX.fullmatch(source):
            continue
        with suppress(OSError):  # another user's, or removed meanwhile
            others_bytes += sum(path.stat().st_size for path in folder.iterdir())
            if folder.name != source:
                if folder.stat().st_mtime < time.time() - HALF_MADE_S:
                    shutil.rmtree(folder)
            elif source not in adopted:
                more = more or not room
                room -= bool(room) and _adopt(folder, tally, take)
    return Others(others_bytes, more)


def _adopt(folder: Path, tally: Tally, take: Callable[[Spool], object]) -> bool:
    with unforked:
        spool = Spool.adopt(folder, tally)
        if spool is not None:
            take(spool)
    if spool is not None:
        log.info("the spool of an ended process is sent: %s", folder.name)
    return spool is not None

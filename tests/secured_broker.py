"""A broker as in production: TLS, passwords by SCRAM, an authorizer that allows nothing unsaid. Made of the local stack's jars."""

import datetime
import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tollway.connectors.embedded.kafka import KafkaBroker
from tollway.connectors.embedded.process import LOOPBACK, free_port
from tollway.connectors.rights import KafkaRight

DEADLINE_S = 60
KINDS = {
    "topic": ResourceType.TOPIC,
    "group": ResourceType.GROUP,
    "transactional-id": ResourceType.TRANSACTIONAL_ID,
    "cluster": ResourceType.BROKER,  # librdkafka's word for the cluster
}
OPERATIONS = {
    "Read": AclOperation.READ,
    "Write": AclOperation.WRITE,
    "Create": AclOperation.CREATE,
    "Describe": AclOperation.DESCRIBE,
    "DescribeConfigs": AclOperation.DESCRIBE_CONFIGS,
    "Alter": AclOperation.ALTER,
    "AlterConfigs": AclOperation.ALTER_CONFIGS,
}


@dataclass(frozen=True)
class Certificates:
    """PEM files: who is trusted, and a server's key with its chain."""

    ca: Path
    server: Path


def certificates(folder: Path) -> Certificates:
    """A CA of our own and a certificate for this host's loopback address."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test {folder.name}")])

    def made(subject: x509.Name, public: ec.EllipticCurvePublicKey, extension: x509.ExtensionType) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        )
        return builder.sign(ca_key, hashes.SHA256())

    ca = made(issuer, ca_key.public_key(), x509.BasicConstraints(ca=True, path_length=None))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK)), x509.DNSName("localhost")])
    server = made(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")]), key.public_key(), names)
    found = Certificates(folder / "ca.pem", folder / "server.pem")
    found.ca.write_bytes(ca.public_bytes(Encoding.PEM))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    found.server.write_bytes(private + server.public_bytes(Encoding.PEM) + ca.public_bytes(Encoding.PEM))
    return found


class SecuredBroker(KafkaBroker):
    """One broker whose only door for clients is SASL over TLS. `admin` may do anything; others what `allow` gave them."""

    def __init__(self, data: Path, *, client_certificates: bool = False) -> None:
        port, controller_port = free_port(), free_port()
        self.pem = certificates(data / "pem")
        self.password = secrets.token_urlsafe(18)
        self._client_certificates = client_certificates
        super().__init__(data, port, controller_port=controller_port, settings=self._secured(port, controller_port))

    def _secured(self, port: int, controller_port: int) -> dict[str, str]:
        plain = "org.apache.kafka.common.security.plain.PlainLoginModule required"
        scram = "org.apache.kafka.common.security.scram.ScramLoginModule required"
        return {
            "listeners": f"SASL_SSL://{LOOPBACK}:{port},CONTROLLER://{LOOPBACK}:{controller_port}",
            "advertised.listeners": f"SASL_SSL://{LOOPBACK}:{port}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL",
            "inter.broker.listener.name": "SASL_SSL",
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
            "sasl.mechanism.inter.broker.protocol": "PLAIN",
            "listener.name.sasl_ssl.plain.sasl.jaas.config": (
                f'{plain} username="admin" password="{self.password}" user_admin="{self.password}";'
            ),
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": f"{scram};",
            "listener.name.sasl_ssl.ssl.client.auth": "required" if self._client_certificates else "none",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.pem.server),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.pem.ca),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:admin;User:ANONYMOUS",  # anonymous: the controller's own listener, which no client is told
            "allow.everyone.if.no.acl.found": "false",
            "group.min.session.timeout.ms": "500",
        }

    def admin(self) -> AdminClient:
        """A client that may do anything."""
        mine = {"ssl.certificate.location": str(self.pem.server), "ssl.key.location": str(self.pem.server)}
        return AdminClient(
            {
                **(mine if self._client_certificates else {}),
                "bootstrap.servers": self.bootstrap,
                "security.protocol": "SASL_SSL",
                "sasl.mechanism": "PLAIN",
                "sasl.username": "admin",
                "sasl.password": self.password,
                "ssl.ca.location": str(self.pem.ca),
                "log_level": 0,
                "error_cb": lambda error: None,
            }
        )

    def answers(self) -> bool:
        """Whether the broker is registered and lists itself."""
        try:
            return bool(self.admin().list_topics(timeout=2).brokers)
        except KafkaException:
            return False

    def user(self, name: str, password: str) -> None:
        """Make a user, or give it another password."""
        salted = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        admin = self.admin()
        change = UserScramCredentialUpsertion(name, salted, password.encode())
        for future in admin.alter_user_scram_credentials([change]).values():
            future.result(DEADLINE_S)

    def allow(self, name: str, rights: Iterable[KafkaRight]) -> None:
        """Give a user rights."""
        admin = self.admin()
        rules = [binding(name, right, each) for right in rights for each in right.operations]
        for future in admin.create_acls(rules).values():
            future.result(DEADLINE_S)

    def forbid(self, name: str, right: KafkaRight, operation: str) -> None:
        """Take one right back."""
        rule = binding(name, right, operation)
        parts = (rule.restype, rule.name, rule.resource_pattern_type, rule.principal, rule.host, rule.operation)
        admin = self.admin()
        for future in admin.delete_acls([AclBindingFilter(*parts, rule.permission_type)]).values():
            assert future.result(DEADLINE_S), f"there was no such right: {right}"


def binding(user: str, right: KafkaRight, operation: str) -> AclBinding:
    """One rule of Kafka's."""
    pattern = ResourcePatternType.PREFIXED if right.prefixed else ResourcePatternType.LITERAL
    return AclBinding(
        KINDS[right.kind], right.name, pattern, f"User:{user}", "*", OPERATIONS[operation], AclPermissionType.ALLOW
    )

"""What the room's address is, and the certificate that it shows there."""

from __future__ import annotations

import datetime
import ipaddress
import socket
from contextlib import closing, suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from servebook.settings import Settings, in_address, is_loopback
from servebook.whole import write_whole

LIFETIME = datetime.timedelta(days=90)
RENEWED_BEFORE = datetime.timedelta(days=7)


def host_for_learners(settings: Settings) -> str:
    """The host under which learners reach this machine, as well as it can know."""
    if settings.host not in ("0.0.0.0", "::"):
        return settings.host
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # nothing is sent: this asks for the address that would be used
        return str(probe.getsockname()[0])
    return socket.gethostname()


def address(settings: Settings, port: int | str) -> str:
    """The room's URL, for learners: `SERVEBOOK_ROOM_URL`, or this machine's."""
    if settings.room.url:
        return settings.room.url
    scheme = "https" if files(settings) else "http"
    return f"{scheme}://{in_address(host_for_learners(settings))}:{port}"


def files(settings: Settings) -> tuple[Path, Path] | None:
    """Certificate and key of the room: those given; where it is opened, its own; None on this machine alone."""
    if settings.room.tls_cert and settings.room.tls_key:
        return settings.room.tls_cert, settings.room.tls_key
    if is_loopback(settings.host):
        return None
    folder = settings.state_dir / "room" / "tls"
    return folder / "room.pem", folder / "room.key"


def prepare(settings: Settings) -> tuple[Path, Path] | None:
    """The same for a room that starts: its own are made, or made anew. A room that is up goes on with what it read."""
    found = files(settings)
    given = settings.room.tls_cert and settings.room.tls_key
    if found and not given and not still_good(*found, host_for_learners(settings)):
        make(*found, host_for_learners(settings))
    return found


def fingerprint(cert: Path) -> str:
    """What a browser shows of the certificate: SHA-256 in pairs."""
    return x509.load_pem_x509_certificate(cert.read_bytes()).fingerprint(hashes.SHA256()).hex(":").upper()


def still_good(cert: Path, key: Path, host: str) -> bool:
    """Whether it is there with its key, names this host, and lasts for a while: browsers that trust it ask no more."""
    try:
        kept = x509.load_pem_x509_certificate(cert.read_bytes())
        secret = serialization.load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError):
        return False
    if kept.public_key() != secret.public_key():  # a room that was killed between the two has made one of them anew
        return False
    names = kept.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    left = kept.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return _name(host) in names and left > RENEWED_BEFORE


def make(cert: Path, key: Path, host: str) -> None:
    """Write a certificate for this host that nobody has signed: learners compare the fingerprint, once."""
    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a room of servebook")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(secret.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectAlternativeName([_name(host), x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(secret, hashes.SHA256())
    )
    cert.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    private = secret.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_whole(key, private, 0o600)
    write_whole(cert, signed.public_bytes(serialization.Encoding.PEM))


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)

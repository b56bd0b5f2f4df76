"""A certificate authority for an afternoon: what TLS needs on one machine. In production, ask your own CA."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import trustme

LIFETIME = datetime.timedelta(days=1)
NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Certificates:
    """PEM files: the authority's certificate, and a certificate and key each for the server and for a client."""

    ca: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    client_key: Path


def make_certificates(folder: Path) -> Certificates:
    """Write a new authority's certificates for `localhost`, 127.0.0.1 and ::1 to `folder`; they last a day."""
    folder.mkdir(parents=True, exist_ok=True)
    files = Certificates(
        *(folder / name for name in ("ca.pem", "server.pem", "server.key", "client.pem", "client.key"))
    )
    authority = trustme.CA(organization_name="servebook")
    authority.cert_pem.write_to_path(files.ca)
    end = datetime.datetime.now(datetime.UTC) + LIFETIME
    for certificate_file, key_file in (
        (files.server_cert, files.server_key),
        (files.client_cert, files.client_key),
    ):
        issued = authority.issue_cert(*NAMES, not_after=end)
        issued.cert_chain_pems[0].write_to_path(certificate_file)
        key_file.touch(mode=0o600)
        issued.private_key_pem.write_to_path(key_file)
    return files

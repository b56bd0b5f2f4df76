"""TLS files, looked at before anything is started with them."""

from __future__ import annotations

import ssl
from pathlib import Path

from servebook.errors import LaunchError


def require_tls(cert: Path | None, key: Path | None, authority: Path | None, remedy: str) -> None:
    """Check the TLS files, where any are given.

    They are PEM: a certificate with its own key, and the authority whose client certificates are accepted.

    Raises:
        LaunchError: they cannot be used. The servers would find out only when the engine is loaded.
    """
    if not (cert or key or authority):
        return
    try:
        if not (cert and key):
            raise ValueError("a certificate and its key go together")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(cert, key, password="")  # else it would ask at the terminal for that of a locked key
        if authority:
            context.load_verify_locations(authority)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise LaunchError(f"The TLS files cannot be used: {error}.", remedy) from None

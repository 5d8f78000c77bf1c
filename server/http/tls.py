"""TLS of the server's ports."""

from __future__ import annotations

import ssl
from pathlib import Path

from quire.core.errors import ConfigError
from quire.server.http.settings import ServerSettings

__all__ = ["make_ssl_context"]


def make_ssl_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """What the settings say of TLS; None: the ports speak plain HTTP. Raises ConfigError, with the flag to change."""
    if settings.ssl_certfile is None:
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"):
            if getattr(settings, name):
                raise ConfigError(f"{_flag(name)} is of no use without --ssl-certfile; give that too")
        return None
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(settings, name)
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"{_flag(name)} {path}: no such file; name a file in PEM")
    if settings.ssl_cert_reqs not in (ssl.CERT_NONE, ssl.CERT_OPTIONAL, ssl.CERT_REQUIRED):
        raise ConfigError(f"--ssl-cert-reqs must be 0, 1 or 2, got {settings.ssl_cert_reqs}")
    if settings.ssl_cert_reqs and settings.ssl_ca_certs is None:
        raise ConfigError("--ssl-cert-reqs asks for certificates of clients; say with --ssl-ca-certs who signs them")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.VerifyMode(settings.ssl_cert_reqs)
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, _refuse_password)
    except (ssl.SSLError, OSError, _EncryptedKeyError) as error:
        flag = "--ssl-keyfile" if settings.ssl_keyfile else "--ssl-certfile"
        raise ConfigError(f"{flag}: the certificate and its key cannot be used: {error}") from None
    try:
        if settings.ssl_ca_certs is not None:
            context.load_verify_locations(settings.ssl_ca_certs)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"--ssl-ca-certs {settings.ssl_ca_certs} cannot be used: {error}") from None
    try:
        if settings.ssl_ciphers is not None:
            context.set_ciphers(settings.ssl_ciphers)
    except ssl.SSLError as error:
        raise ConfigError(f"--ssl-ciphers {settings.ssl_ciphers!r}: {error}") from None
    return context


class _EncryptedKeyError(Exception):
    """The key is locked by a password."""


def _refuse_password() -> str:
    """OpenSSL would ask the terminal, which a server has not."""
    raise _EncryptedKeyError("the key is encrypted; give one without a password")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

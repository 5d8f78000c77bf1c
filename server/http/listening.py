"""The sockets that the server listens on: bound before anything is loaded, listening once it is ready.

This module imports nothing heavy, so that a port in use is reported before the engine's process is started.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

from quire.core.errors import ConfigError
from quire.server.http.settings import ServerSettings

__all__ = ["allow_restart", "bind_sockets"]

_WRONG_HOST = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


@contextlib.contextmanager
def bind_sockets(settings: ServerSettings) -> Iterator[list[socket.socket]]:
    """The socket of ``--port``, then that of ``--prometheus-port`` if there is one; closed at the end.

    They do not listen yet: clients are refused, not kept waiting, until the model is loaded. No other process can bind
    the same port meanwhile. Raises ConfigError, with the flag to change.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(_bind_socket(settings.host, settings.port, "--port"))]
        if settings.prometheus_port is not None:
            bound = _bind_socket(settings.host, settings.prometheus_port, "--prometheus-port")
            sockets.append(stack.enter_context(bound))
        yield sockets


def allow_restart(bound: socket.socket) -> None:
    """Let the next server bind the port while connections of this one are in TIME_WAIT. To be called just before the
    socket listens; a listening socket keeps others away by itself."""
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def _bind_socket(host: str, port: int, flag: str) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _host_error(host, error) from None
    try:
        _bind_exclusively(bound, address)
    except OSError as error:
        bound.close()
        if error.errno in _WRONG_HOST:
            raise _host_error(host, error) from None
        raise ConfigError(
            f"{flag} {port}: {host} port {port} cannot be used: {error.strerror}; choose another"
        ) from None
    bound.setblocking(False)
    return bound


def _bind_exclusively(bound: socket.socket, address: tuple[object, ...]) -> None:
    """Bind so that no other socket can bind the port before this one listens.

    With SO_REUSEADDR two sockets that do not listen can be bound to one port, and without it a port whose last
    connections are in TIME_WAIT cannot be bound for a minute. So it is set for the second attempt alone, then unset.
    """
    try:
        bound.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)


def _host_error(host: str, error: OSError) -> ConfigError:
    return ConfigError(f"--host {host}: {error.strerror or error}; give an address of this machine")

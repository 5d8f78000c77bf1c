"""TCP connections between the executor and the ranks of other hosts: both ends prove that they know the same token.

The token is a secret of one engine, which Ray takes to the nodes. It does not cross the connection: each end answers a
number that the other has just drawn (HMAC-SHA256). What follows is neither encrypted nor signed, as are the tensors
between ranks: the network between the nodes is trusted to that extent.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time

__all__ = ["accept_rank", "connect_rank", "is_reachable", "listen"]

_CHALLENGE_BYTES = 32
_RANK_BYTES = 4
_ANSWER_BYTES = 32
_CONNECT_S = 10.0
_HANDSHAKE_S = 3.0
_IDLE_S, _PROBE_S, _NUM_PROBES = 5, 2, 4
"""A host that has gone without a word is noticed after 5 + 4 * 2 s, by either end."""


def listen(host: str, backlog: int) -> socket.socket:
    """A socket that accepts connections at ``host``, at a port that the system chooses."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=backlog)


def is_reachable(host: str, port: int, seconds: float) -> bool:
    """Whether a process accepts connections there."""
    try:
        socket.create_connection((host, port), seconds).close()
    except OSError:
        return False
    return True


def connect_rank(host: str, port: int, rank: int, token: bytes) -> socket.socket:
    """Connect to the executor as ``rank``. Raises ``OSError``, also where it does not know the token."""
    connection = socket.create_connection((host, port), _CONNECT_S)
    try:
        challenge = secrets.token_bytes(_CHALLENGE_BYTES)
        asked = _receive_exactly(connection, _CHALLENGE_BYTES, time.monotonic() + _HANDSHAKE_S)
        number = rank.to_bytes(_RANK_BYTES, "little")
        connection.sendall(number + challenge + _answer(token, b"rank", number, asked, challenge))
        answer = _receive_exactly(connection, _ANSWER_BYTES, time.monotonic() + _HANDSHAKE_S)
        if not hmac.compare_digest(answer, _answer(token, b"executor", number, challenge, asked)):
            raise ConnectionError(f"what answers at {host}:{port} is not the executor of this engine")
        _prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def accept_rank(listener: socket.socket, token: bytes) -> tuple[int, socket.socket] | None:
    """Take the next connection, and return its rank; None where it is none of ours, or there is none in time
    (``listener.settimeout``). What connects has some seconds to prove that it knows the token."""
    try:
        connection, _ = listener.accept()
    except OSError:
        return None
    try:
        deadline = time.monotonic() + _HANDSHAKE_S
        challenge = secrets.token_bytes(_CHALLENGE_BYTES)
        connection.settimeout(_HANDSHAKE_S)
        connection.sendall(challenge)
        number = _receive_exactly(connection, _RANK_BYTES, deadline)
        asked = _receive_exactly(connection, _CHALLENGE_BYTES, deadline)
        answer = _receive_exactly(connection, _ANSWER_BYTES, deadline)
        if not hmac.compare_digest(answer, _answer(token, b"rank", number, challenge, asked)):
            raise ConnectionError("the token is another")
        connection.sendall(_answer(token, b"executor", number, asked, challenge))
        _prepare(connection)
    except OSError:
        connection.close()
        return None
    return int.from_bytes(number, "little"), connection


def _answer(token: bytes, *parts: bytes) -> bytes:
    return hmac.digest(token, b"".join(parts), "sha256")


def _receive_exactly(connection: socket.socket, num_bytes: int, deadline: float) -> bytes:
    data = b""
    while len(data) < num_bytes:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        part = connection.recv(num_bytes - len(data))
        if not part:
            raise ConnectionError("the other end closed the connection before it had proved who it is")
        data += part
    return data


def _prepare(connection: socket.socket) -> None:
    """Wait as long as it takes from now on, but not for a host that is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", _IDLE_S),
        ("TCP_KEEPINTVL", _PROBE_S),
        ("TCP_KEEPCNT", _NUM_PROBES),
        ("TCP_USER_TIMEOUT", (_IDLE_S + _PROBE_S * _NUM_PROBES) * 1000),  # where data wait to be acknowledged
    ):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

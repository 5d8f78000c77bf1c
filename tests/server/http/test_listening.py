"""The port is taken before anything is loaded, and no other process gets it meanwhile."""

from __future__ import annotations

import socket

import pytest

from quire.core.errors import ConfigError
from quire.server.cli.main import main
from quire.server.http.listening import allow_restart, bind_sockets
from quire.server.http.settings import ServerSettings


def test_a_port_in_use(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", tiny_model, "--port", port]) == 2
        assert main(["serve", tiny_model, "--port", "0", "--prometheus-port", port]) == 2
    for line, flag in zip(capsys.readouterr().err.splitlines(), ("--port", "--prometheus-port"), strict=True):
        assert line.startswith(f"quire: error: {flag} {port}: 127.0.0.1 port {port} cannot be used")


def test_one_port_for_both_is_refused(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", tiny_model, "--port", "8123", "--prometheus-port", "8123"]) == 2
    assert "--prometheus-port 8123 is also --port" in capsys.readouterr().err


@pytest.mark.parametrize("restarted", [False, True], ids=["", "after a restart"])
def test_a_server_that_starts_keeps_others_from_its_port(restarted: bool) -> None:
    """Also while connections of the server before it are in TIME_WAIT, when only SO_REUSEADDR gets the port."""
    port = _port_of_a_stopped_server() if restarted else 0
    with bind_sockets(ServerSettings(port=port)) as [bound]:
        port = bound.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"--port {port}.*choose another"),
            bind_sockets(ServerSettings(port=port)),
        ):
            pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        allow_restart(bound)
        bound.listen()
        socket.create_connection(("127.0.0.1", port)).close()


def _port_of_a_stopped_server() -> int:
    with bind_sockets(ServerSettings(port=0)) as [bound]:
        allow_restart(bound)
        bound.setblocking(True)
        bound.listen()
        port: int = bound.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = bound.accept()
            accepted.close()  # the side that closes first keeps the connection in TIME_WAIT
            assert client.recv(1) == b""
    return port


def test_a_wrong_host_is_not_a_wrong_port() -> None:
    _check_refused(ServerSettings(host="192.0.2.1", port=0), r"--host 192.0.2.1: .*an address of this machine")


def _check_refused(settings: ServerSettings, message: str) -> None:
    with pytest.raises(ConfigError, match=message), bind_sockets(settings):
        pass

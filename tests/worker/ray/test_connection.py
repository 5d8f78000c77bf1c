"""Connections between the executor and ranks of other hosts, and the line for a Ray that is not there."""

from __future__ import annotations

import importlib.util
import socket
import threading
import time
from pathlib import Path

import pytest

from quire import LLM
from quire.core.errors import ConfigError, PluginError
from quire.core.worker.multiproc.frames import make_frame, take_frames
from quire.core.worker.multiproc.rank_channel import StreamChannel
from quire.core.worker.ray.connection import accept_rank, connect_rank, is_reachable, listen
from quire.core.worker.ray.executor import RayExecutor
from quire.core.worker.ray.interface import find_interface

TOKEN = bytes(range(32))


class Rank:
    """Connects from a thread of its own."""

    def __init__(self, listener: socket.socket, token: bytes) -> None:
        host, port = listener.getsockname()
        self.connection: socket.socket | None = None
        self.error: OSError | None = None
        self._thread = threading.Thread(target=self._connect, args=(host, port, token))
        self._thread.start()

    def _connect(self, host: str, port: int, token: bytes) -> None:
        try:
            self.connection = connect_rank(host, port, 7, token)
        except OSError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()


def test_messages_cross_a_connection_whose_ends_know_each_other() -> None:
    with listen("127.0.0.1", 4) as listener:
        rank = Rank(listener, TOKEN)
        accepted = accept_rank(listener, TOKEN)
        rank.join()
    assert accepted is not None and accepted[0] == 7 and rank.connection is not None
    channel, message = StreamChannel(rank.connection), bytes(300_000)
    with accepted[1] as ours, rank.connection:
        sender = threading.Thread(target=ours.sendall, args=(make_frame(b"", message) + make_frame(b"", b"next"),))
        sender.start()
        assert [channel.receive(), channel.receive()] == [message, b"next"]
        sender.join()
        channel.status.begin_message()
        for _ in range(2):  # the second has nothing new to say
            channel.publish_status()
        channel.send(b"answer")
        received = bytearray(ours.recv(1 << 16))
        status, answer = take_frames(received)
        assert status == b"s" + channel.status.values.tobytes() and answer == b".answer" and not received
        ours.close()
        assert channel.receive() is None


def test_who_does_not_know_the_token_is_refused_and_harms_no_rank() -> None:
    with listen("127.0.0.1", 4) as listener:
        impostor = Rank(listener, bytes(32))
        assert accept_rank(listener, TOKEN) is None
        impostor.join()
        assert impostor.error is not None and impostor.connection is None
        with socket.create_connection(listener.getsockname()) as silent:
            begin = time.monotonic()
            assert accept_rank(listener, TOKEN) is None and time.monotonic() - begin < 10
            assert silent.recv(64), "the challenge"
        rank = Rank(listener, TOKEN)
        accepted = accept_rank(listener, TOKEN)
        rank.join()
        assert accepted is not None and rank.connection is not None
        accepted[1].close()
        rank.connection.close()


def test_a_rank_gives_its_token_to_no_other_listener() -> None:
    """One that only echoes what it hears has not proved anything."""
    with listen("127.0.0.1", 1) as listener:
        rank = Rank(listener, TOKEN)
        connection, _ = listener.accept()
        with connection:
            connection.sendall(bytes(32))
            heard = b""
            while len(heard) < 68:
                heard += connection.recv(1024)
            assert TOKEN not in heard
            connection.sendall(heard[-32:])
            rank.join()
    assert "is not the executor of this engine" in str(rank.error)


def test_the_interface_of_an_address() -> None:
    assert find_interface("127.0.0.2") == "lo"
    assert find_interface("203.0.113.77") is None and find_interface("a-name") is None
    with listen("127.0.0.1", 1) as listener:
        host, port = listener.getsockname()
        assert is_reachable(host, port, 1.0)
    assert not is_reachable(host, port, 1.0)


def test_without_ray_the_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find_spec(name, *a))
    with pytest.raises(PluginError, match=r"'ray'.*which is not installed; pip install 'quire\[ray\]'$"):
        LLM(model=str(tiny), device="cpu", tensor_parallel_size=2, distributed_executor_backend="ray")


@pytest.mark.parametrize("wait_s", [-1.0, float("nan")])
def test_options_are_checked(wait_s: float) -> None:
    with pytest.raises(ConfigError, match=r"^wait_s must be in \[0, 86400\]"):
        RayExecutor.Options(wait_s=wait_s)

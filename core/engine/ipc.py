"""The wire between a front and an engine core in a process of its own: ZMQ sockets, msgpack messages."""

from __future__ import annotations

from typing import Any

import msgspec
import zmq

from quire.core.config import EngineConfig
from quire.core.messages import EngineCoreOutputs, EngineCoreRequest

__all__ = ["Abort", "Add", "Failed", "FromCore", "Ready", "Shutdown", "Start", "ToCore", "Wire"]


class Start(msgspec.Struct, tag=True):
    """The first message: build this engine."""

    config: EngineConfig
    log_level: str


class Add(msgspec.Struct, tag=True, array_like=True):
    """Requests to queue."""

    requests: list[EngineCoreRequest]


class Abort(msgspec.Struct, tag=True, array_like=True):
    """Requests to end."""

    request_ids: list[str]


class Shutdown(msgspec.Struct, tag=True, array_like=True):
    """Stop."""


ToCore = Add | Abort | Shutdown


class Ready(msgspec.Struct, tag=True, array_like=True):
    """The engine serves. Bytes and counts for the ready line."""

    num_blocks: int
    bytes_per_block: int
    weight_bytes: int
    activation_bytes: int
    graph_bytes: int


class Failed(msgspec.Struct, tag=True, array_like=True):
    """The engine could not start, or died."""

    error: str
    kind: str
    """Name of the ``QuireError`` subclass, or of whatever else was raised."""


class Outputs(msgspec.Struct, tag=True, array_like=True):
    """One step's outputs."""

    value: EngineCoreOutputs


FromCore = Ready | Failed | Outputs


class Wire:
    """Encodes and decodes."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._start = msgspec.msgpack.Decoder(Start)
        self._to_core = msgspec.msgpack.Decoder(Add | Abort | Shutdown)
        self._from_core = msgspec.msgpack.Decoder(Ready | Failed | Outputs)

    def encode(self, message: Any) -> bytes:
        """Any message of this module."""
        return self._encoder.encode(message)

    def decode_start(self, data: bytes) -> Start:
        """The first message to the core."""
        return self._start.decode(data)

    def decode_to_core(self, data: bytes) -> ToCore:
        """Later messages to the core."""
        return self._to_core.decode(data)

    def decode_from_core(self, data: bytes) -> FromCore:
        """Messages to the front."""
        return self._from_core.decode(data)


def address(folder: str, name: str) -> str:
    """Of a socket: ``in``, from the front to the core, or ``out``."""
    return f"ipc://{folder}/{name}"


def socket(context: Any, kind: int) -> Any:
    """A socket that never blocks a process's end."""
    made = context.socket(kind)
    made.setsockopt(zmq.LINGER, 0)
    made.setsockopt(zmq.SNDHWM, 0)
    made.setsockopt(zmq.RCVHWM, 0)
    return made

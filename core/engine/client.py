"""How an API process reaches an engine core in a process of its own, and the line that says what it holds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import zmq
import zmq.asyncio

from quire.core import errors
from quire.core.config import EngineConfig
from quire.core.contracts.executor import KVCapacity
from quire.core.engine.ipc import Abort, Add, Failed, FromCore, Outputs, Ready, Shutdown, Start, Wire, address, socket
from quire.core.engine.process import EngineProcess
from quire.core.errors import EngineDeadError
from quire.core.messages import EngineCoreOutputs, EngineCoreRequest

__all__ = ["ProcessClient", "ready_line"]


class ProcessClient:
    """The engine core in a child process, over ZMQ. For one event loop. Sends are immediate and never wait."""

    capacity: Ready

    def __init__(self, process: EngineProcess) -> None:
        self._process = process
        self._wire = Wire()
        self._context = zmq.asyncio.Context()
        self._inward = socket(zmq.Context(self._context), zmq.PUSH)
        self._inward.connect(address(process.folder, "in"))  # a connecting end queues before its peer is there
        self._outward = socket(self._context, zmq.PULL)
        self._outward.bind(address(process.folder, "out"))

    def build(self, config: EngineConfig, log_level: str = "INFO") -> None:
        """Let the engine be built; ``ready`` tells how that went."""
        self._send(Start(config, log_level))

    async def ready(self) -> None:
        """Wait until the engine serves. Raises what it could not start with, by its own error class."""
        message = await self._receive()
        if isinstance(message, Failed):
            raise _as_error(message)
        assert isinstance(message, Ready)
        self.capacity = message

    async def outputs(self) -> EngineCoreOutputs:
        """The next outputs. Raises ``EngineDeadError`` if the engine core is gone."""
        message = await self._receive()
        if isinstance(message, Failed):
            raise EngineDeadError(f"the engine stopped: {message.error}")
        assert isinstance(message, Outputs)
        return message.value

    def add(self, requests: Sequence[EngineCoreRequest]) -> None:
        """Queue requests."""
        self._send(Add(list(requests)))

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests; no output follows."""
        self._send(Abort(list(request_ids)))

    async def shutdown(self) -> None:
        """Ask, wait a little, then insist."""
        with contextlib.suppress(zmq.ZMQError):
            self._send(Shutdown())
        await asyncio.to_thread(self._process.wait)
        self.kill()

    def kill(self) -> None:
        """End the process at once, for one that does not serve yet, and clear up. Idempotent."""
        self._process.kill()
        self._inward.close(linger=0)
        self._outward.close(linger=0)
        self._context.term()

    async def _receive(self) -> FromCore:
        while True:
            try:
                return self._wire.decode_from_core(await asyncio.wait_for(self._outward.recv(), 1.0))
            except TimeoutError:
                status = self._process.status
                if status is not None and not await self._outward.poll(100):
                    raise EngineDeadError(f"the engine process ended with status {status}; see its log") from None

    def _send(self, message: object) -> None:
        self._inward.send(self._wire.encode(message), zmq.NOBLOCK)


def _as_error(message: Failed) -> Exception:
    cls = getattr(errors, message.kind, None)
    if isinstance(cls, type) and issubclass(cls, errors.QuireError):
        return cls(message.error)
    return EngineDeadError(f"the engine could not start: {message.error}")


def ready_line(config: EngineConfig, capacity: KVCapacity | Ready) -> str:
    """Weights, activations, graphs, KV cache, and how many full-length requests it holds."""
    tokens = (capacity.num_blocks - 1) * config.cache.block_size
    kind = "" if config.cache.dtype == "auto" else f" in {config.cache.dtype}"
    parts = [f"weights {_size(capacity.weight_bytes)}"]
    if capacity.activation_bytes:
        parts.append(f"activations {_size(capacity.activation_bytes)}")
    if capacity.graph_bytes:
        parts.append(f"graphs {_size(capacity.graph_bytes)}")
    parts.append(f"KV cache {_size(capacity.num_blocks * capacity.bytes_per_block)} = {tokens:,} tokens{kind}")
    longest = config.model.max_model_len
    parts.append(f"{tokens / longest:.1f} requests of {longest:,} tokens at once")
    return f"{config.model.served_names[0]} ({config.model.dtype} on {config.model.device}): {', '.join(parts)}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"

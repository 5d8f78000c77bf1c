"""How a front reaches an engine core: in this process, or in one of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence

import zmq
import zmq.asyncio

from quire.core import errors
from quire.core.config import EngineConfig
from quire.core.contracts.executor import KVCapacity
from quire.core.engine.engine_core import EngineCore
from quire.core.engine.ipc import Abort, Add, Addresses, Failed, FromCore, Outputs, Ready, Shutdown, Start, Wire, socket
from quire.core.env import child_environment
from quire.core.errors import EngineDeadError
from quire.core.messages import EngineCoreOutputs, EngineCoreRequest

__all__ = ["EngineClient", "InprocClient", "ProcessClient"]

_log = logging.getLogger("quire.engine")


class EngineClient(ABC):
    """Sends are immediate and never wait for the engine."""

    capacity: KVCapacity | Ready

    @abstractmethod
    def add(self, requests: Sequence[EngineCoreRequest]) -> None:
        """Queue requests."""

    @abstractmethod
    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests; no output follows."""

    @abstractmethod
    def shutdown(self) -> None:
        """Stop the engine core. Idempotent."""


class InprocClient(EngineClient):
    """The engine core as an object. ``step`` drives it."""

    def __init__(self, config: EngineConfig) -> None:
        self.core = EngineCore(config)
        self.capacity = self.core.capacity

    def add(self, requests: Sequence[EngineCoreRequest]) -> None:
        """See ``EngineClient``."""
        for request in requests:
            self.core.add(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        """See ``EngineClient``."""
        self.core.abort(list(request_ids))

    def step(self) -> EngineCoreOutputs:
        """One step of the engine."""
        return self.core.step()

    def shutdown(self) -> None:
        """See ``EngineClient``."""
        self.core.shutdown()


class ProcessClient(EngineClient):
    """The engine core in a child process, over ZMQ. For one event loop.

    The process starts with the client: it imports what it needs, and wakes a GPU unless ``device`` is ``cpu``, while
    its configuration is made.
    """

    def __init__(self, device: str = "auto") -> None:
        self._addresses = Addresses.fresh()
        self._wire = Wire()
        self._context = zmq.asyncio.Context()
        self._inward = socket(zmq.Context(self._context), zmq.PUSH)
        self._inward.connect(self._addresses.inward)  # a connecting end queues before its peer is there
        self._outward = socket(self._context, zmq.PULL)
        self._outward.bind(self._addresses.outward)
        command = [sys.executable, "-m", "quire.core.engine.core_process", self._addresses.folder, device]
        self._process = subprocess.Popen(command, env=child_environment(), stdin=subprocess.DEVNULL)

    async def start(self, config: EngineConfig, log_level: str = "INFO") -> None:
        """Build the engine and wait until it serves. Raises what it could not start with, by its own error class."""
        self._send(Start(config, log_level))
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
        """See ``EngineClient``."""
        self._send(Add(list(requests)))

    def abort(self, request_ids: Sequence[str]) -> None:
        """See ``EngineClient``."""
        self._send(Abort(list(request_ids)))

    def shutdown(self) -> None:
        """Ask, wait a little, then insist."""
        if self._process.poll() is None and not self._inward.closed:
            with contextlib.suppress(zmq.ZMQError):
                self._send(Shutdown())
        self.wait()
        self._inward.close(linger=0)
        self._outward.close(linger=0)
        self._context.term()
        shutil.rmtree(self._addresses.folder, ignore_errors=True)

    def kill(self) -> None:
        """End the process at once, for one that was never started."""
        self._process.kill()
        self.shutdown()

    def ask_to_stop(self) -> None:
        """Let the engine core end by itself; ``wait`` then waits for it, and ``shutdown`` clears up."""
        with contextlib.suppress(zmq.ZMQError):
            self._send(Shutdown())

    def wait(self, seconds: float = 10) -> None:
        """Wait for the process to end, and kill it if it does not. May run in a thread."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    async def _receive(self) -> FromCore:
        while True:
            try:
                return self._wire.decode_from_core(await asyncio.wait_for(self._outward.recv(), 1.0))
            except TimeoutError:
                status = self._process.poll()
                if status is not None and not await self._outward.poll(100):
                    raise EngineDeadError(f"the engine process ended with status {status}; see its log") from None

    def _send(self, message: object) -> None:
        self._inward.send(self._wire.encode(message), zmq.NOBLOCK)


def _as_error(message: Failed) -> Exception:
    cls = getattr(errors, message.kind, None)
    if isinstance(cls, type) and issubclass(cls, errors.QuireError):
        return cls(message.error)
    return EngineDeadError(f"the engine could not start: {message.error}")

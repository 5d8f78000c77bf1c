"""The API process's side of an engine core in a process of its own, and the line that says what that holds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import zmq
import zmq.asyncio

from quire.core import errors
from quire.core.config import EngineConfig
from quire.core.contracts.executor import KVCapacity
from quire.core.engine.ipc import (
    AbortRequests,
    AddRequests,
    ControlCall,
    ControlReply,
    EngineFailed,
    EngineReady,
    MessageCodec,
    MessageFromCore,
    Shutdown,
    StartEngine,
    StepOutputs,
    open_socket,
    socket_address,
)
from quire.core.engine.process import EngineProcess
from quire.core.errors import ControlCallError, EngineDeadError, InvalidRequestError
from quire.core.messages import EngineCoreOutputs, EngineCoreRequest

__all__ = ["EngineCoreClient", "format_ready_line"]


class EngineCoreClient:
    """The engine core in a child process, over ZMQ. For one event loop. Sends are immediate and never wait."""

    capacity: EngineReady

    def __init__(self, process: EngineProcess) -> None:
        self._process = process
        self._codec = MessageCodec()
        self._call_ids = itertools.count()
        self._pending_calls: dict[int, asyncio.Future[ControlReply]] = {}
        self._next_message: asyncio.Future[bytes] | None = None
        self._context = zmq.asyncio.Context()
        self._input_socket = open_socket(zmq.Context(self._context), zmq.PUSH)
        # A connecting end queues messages before its peer is there: nothing has to wait for the process to start.
        self._input_socket.connect(socket_address(process.folder, "in"))
        self._output_socket = open_socket(self._context, zmq.PULL)
        self._output_socket.bind(socket_address(process.folder, "out"))

    def start_engine(self, config: EngineConfig, log_level: str = "INFO") -> None:
        """Send the configuration from which the engine is built; ``wait_ready`` tells how that went."""
        self._send_message(StartEngine(config, log_level))

    async def wait_ready(self) -> None:
        """Wait until the engine serves. Raises what it could not start with, by its own error class."""
        message = await self._receive_message()
        if isinstance(message, EngineFailed):
            raise _to_exception(message)
        assert isinstance(message, EngineReady)
        self.capacity = message
        self._process.remove_folder()  # both sockets are connected: nothing is left behind, however this process ends

    async def get_outputs(self) -> EngineCoreOutputs:
        """The next outputs. Raises ``EngineDeadError`` if the engine core is gone."""
        while True:
            message = await self._receive_message()
            if isinstance(message, StepOutputs):
                return message.outputs
            if isinstance(message, EngineFailed):
                self._fail_calls(message.error)
                raise EngineDeadError(f"the engine stopped: {message.error}")
            if isinstance(message, ControlReply):
                self._end_call(message)

    def add_requests(self, requests: Sequence[EngineCoreRequest]) -> None:
        """Queue requests. Raises ``InvalidRequestError`` for what cannot be sent."""
        try:
            self._send_message(AddRequests.from_requests(requests))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidRequestError(f"the request cannot be sent to the engine: {error}") from error

    def abort_requests(self, request_ids: Sequence[int]) -> None:
        """End requests; no output follows."""
        self._send_message(AbortRequests(list(request_ids)))

    async def call_control(self, method: str, arguments: Mapping[str, Any], timeout: float) -> Any:
        """Call a control method of the engine core, and wait for what it returns while ``get_outputs`` is awaited.

        Raises ``InvalidRequestError`` for a call that cannot be carried out as asked, ``ControlCallError`` if the
        method fails or does not reply within ``timeout`` seconds (it may still end later), and ``EngineDeadError``.
        """
        call_id = next(self._call_ids)
        future = self._pending_calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            try:
                self._send_message(ControlCall(call_id, method, dict(arguments)))
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                raise InvalidRequestError(f"{method}: the arguments cannot be sent: {error}", "arguments") from error
            async with asyncio.timeout(timeout):
                reply = await future
        except TimeoutError:
            raise ControlCallError(f"{method}: the engine core did not reply within {timeout:g} s") from None
        finally:
            self._pending_calls.pop(call_id, None)
        if reply.error is None:
            return reply.result
        raise InvalidRequestError(reply.error) if reply.error_kind == "invalid" else ControlCallError(reply.error)

    async def shutdown(self, timeout: float) -> None:
        """Ask, wait ``timeout`` seconds, then insist."""
        if timeout > 0:
            with contextlib.suppress(zmq.ZMQError):
                self._send_message(Shutdown())
            await asyncio.to_thread(self._process.wait, timeout)
        self.kill()

    def kill(self) -> None:
        """End the process at once, for one that does not serve yet, and clear up. Idempotent."""
        self._process.kill()
        self._fail_calls("the engine was shut down")
        self._input_socket.close(linger=0)
        self._output_socket.close(linger=0)
        self._context.term()

    async def _receive_message(self) -> MessageFromCore:
        while True:
            if self._next_message is None:
                self._next_message = asyncio.ensure_future(self._output_socket.recv())
            # The wait ends, never what is waited for: a message that came with its cancellation would be lost.
            if (await asyncio.wait({self._next_message}, timeout=1.0))[0]:
                received, self._next_message = self._next_message, None
                return self._codec.decode_from_core(received.result())
            status = self._process.exit_status
            if status is not None and not await self._output_socket.poll(100):
                reason = f"the engine process ended with status {status}; see its log"
                self._fail_calls(reason)
                raise EngineDeadError(reason)

    def _end_call(self, reply: ControlReply) -> None:
        """Of one that is awaited no more, nothing is kept."""
        future = self._pending_calls.pop(reply.call_id, None)
        if future is not None and not future.done():
            future.set_result(reply)

    def _fail_calls(self, reason: str) -> None:
        for future in self._pending_calls.values():
            if not future.done():
                future.set_exception(EngineDeadError(reason))

    def _send_message(self, message: object) -> None:
        self._input_socket.send(self._codec.encode(message), zmq.NOBLOCK)


def _to_exception(message: EngineFailed) -> Exception:
    cls = getattr(errors, message.error_class, None)
    if isinstance(cls, type) and issubclass(cls, errors.QuireError):
        return cls(message.error)
    return EngineDeadError(f"the engine could not start: {message.error}")


def format_ready_line(config: EngineConfig, capacity: KVCapacity | EngineReady) -> str:
    """Weights, activations, graphs, KV cache, and how many full-length requests it holds."""
    num_tokens = (capacity.num_blocks - 1) * config.cache.block_size
    dtype_suffix = "" if config.cache.dtype == "auto" else f" in {config.cache.dtype}"
    parts = [f"weights {_format_bytes(capacity.weight_bytes)}"]
    if capacity.activation_bytes:
        parts.append(f"activations {_format_bytes(capacity.activation_bytes)}")
    if capacity.graph_bytes:
        parts.append(f"graphs {_format_bytes(capacity.graph_bytes)}")
    cache_size = _format_bytes(capacity.num_blocks * capacity.bytes_per_block)
    parts.append(f"KV cache {cache_size} = {num_tokens:,} tokens{dtype_suffix}")
    max_model_len = config.model.max_model_len
    parts.append(f"{num_tokens / max_model_len:.1f} requests of {max_model_len:,} tokens at once")
    return f"{config.model.served_names[0]} ({config.model.dtype} on {config.model.device}): {', '.join(parts)}"


def _format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"

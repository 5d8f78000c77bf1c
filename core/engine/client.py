"""The API process's side of an engine core in a process of its own, and the line that says what that holds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    EngineHung,
    EngineReady,
    Heartbeat,
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
from quire.core.stats import QuarantinedPlugin

__all__ = ["EngineCoreClient", "EngineFault", "format_ready_line"]

_START_POLL_S = 0.5
_FAULT_POLL_S = 0.25
_MAX_SILENT_POLLS = 18
"""4.5 s without a heartbeat, of which two a second are sent."""
_LAST_WORDS_S = 0.2


@dataclass(frozen=True, slots=True)
class EngineFault:
    """Why an engine core cannot serve any more."""

    reason: str
    plugin: QuarantinedPlugin | None = None
    """The plugin in which it hangs, if one is known."""


class EngineCoreClient:
    """The engine core in a child process, over ZMQ. For one event loop. Sends are immediate and never wait."""

    capacity: EngineReady

    def __init__(self, process: EngineProcess) -> None:
        self.process = process
        self._codec = MessageCodec()
        self._call_ids = itertools.count()
        self._heartbeats: list[Heartbeat] = []  # since the last look
        self._was_compiling = False
        self._hang: EngineHung | None = None
        self._pending_calls: dict[int, asyncio.Future[ControlReply]] = {}
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
        while not (self._heartbeats and hasattr(self, "capacity")):
            message = await self._receive_or_end()
            if isinstance(message, EngineFailed):
                raise _to_exception(message)
            if isinstance(message, EngineReady):
                self.capacity = message
            elif isinstance(message, Heartbeat):
                self._heartbeats.append(message)
        self.process.remove_folder()  # all sockets are connected: nothing is left behind, however this process ends

    async def get_outputs(self) -> EngineCoreOutputs:
        """The next outputs. Raises ``EngineDeadError`` if the engine core says that it ends; see ``wait_fault``."""
        while True:
            message = self._codec.decode_from_core(await self._output_socket.recv())
            if isinstance(message, StepOutputs):
                return message.outputs
            if isinstance(message, EngineFailed):
                raise EngineDeadError(f"the engine stopped: {_describe_failure(message)}")
            if isinstance(message, Heartbeat):
                self._heartbeats.append(message)
            elif isinstance(message, ControlReply):
                self._end_call(message)
            elif isinstance(message, EngineHung):
                self._hang = message

    async def wait_fault(self) -> EngineFault:
        """Wait until the engine core cannot serve any more, while ``get_outputs`` is awaited: its process has ended,
        which is known within a second, or sends no heartbeat for five, or says that it hangs."""
        num_silent_polls = 0  # and no time: while this process is stopped, or busy, none is missed
        while True:
            await asyncio.sleep(_FAULT_POLL_S)
            status = self.process.exit_status
            if status is not None:
                await asyncio.sleep(_LAST_WORDS_S)  # what it sent may still arrive
                return EngineFault(f"the engine process ended with status {status}; see its log")
            if self._hang is not None:
                plugin = None
                if self._hang.plugin_kind is not None and self._hang.plugin_name is not None:
                    plugin = QuarantinedPlugin(self._hang.plugin_kind, self._hang.plugin_name, "hung")
                return EngineFault(self._hang.describe(), plugin)
            num_silent_polls = 0 if self._heartbeats else num_silent_polls + 1
            may_be_compiling = self._was_compiling and not self.process.is_stopped
            if self._heartbeats:
                self._was_compiling = self._heartbeats[-1].is_compiling
                self._heartbeats.clear()
            elif num_silent_polls >= _MAX_SILENT_POLLS and not may_be_compiling:
                return await self._describe_silence()

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
                self._send_message(ControlCall(call_id, method, dict(arguments), timeout))
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
        if reply.error_kind == "invalid":
            raise InvalidRequestError(reply.error, reply.error_param)
        raise ControlCallError(reply.error)

    async def shutdown(self, timeout: float) -> None:
        """Ask, wait ``timeout`` seconds, then insist. Of one that does not answer nothing is asked."""
        self._fail_calls("the engine was shut down")
        if timeout > 0:
            with contextlib.suppress(zmq.ZMQError):
                self._send_message(Shutdown())
            await asyncio.to_thread(self.process.wait, timeout)
        else:
            await asyncio.to_thread(self.process.kill)
        self._close()

    def kill(self) -> None:
        """End the process at once, for one that does not serve yet, and clear up. Idempotent."""
        self.process.kill()
        self._close()

    def _close(self) -> None:
        self._fail_calls("the engine was shut down")
        self._input_socket.close(linger=0)
        self._output_socket.close(linger=0)
        self._context.term()

    async def _receive_or_end(self) -> MessageFromCore:
        """The next message. Raises ``EngineDeadError`` if the process ends before."""
        # The wait ends, never what is waited for: a message that came with its cancellation would be lost.
        received = asyncio.ensure_future(self._output_socket.recv())
        try:
            while not (await asyncio.wait({received}, timeout=_START_POLL_S))[0]:
                status = self.process.exit_status
                if status is not None and not await self._output_socket.poll(100):
                    raise EngineDeadError(f"the engine process ended with status {status}; see its log")
            return self._codec.decode_from_core(received.result())
        finally:
            received.cancel()

    async def _describe_silence(self) -> EngineFault:
        reason = f"the engine hangs: its process {self.process.pid} has not answered for 5 s"
        if self.process.is_stopped:
            return EngineFault(f"{reason}; it is stopped (SIGSTOP, or a debugger)")
        self.process.dump_stacks()
        await asyncio.sleep(_LAST_WORDS_S)
        return EngineFault(f"{reason}; no Python code can run in it, and its stacks are in the log")

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
    cls = _find_error_class(message)
    return EngineDeadError(f"the engine could not start: {message.error}") if cls is None else cls(message.error)


def _describe_failure(message: EngineFailed) -> str:
    """For callers: in our own words, or by the kind of error alone, whose text is for the log."""
    return f"{message.error_class}; its log says why" if _find_error_class(message) is None else message.error


def _find_error_class(message: EngineFailed) -> type[errors.QuireError] | None:
    cls = getattr(errors, message.error_class, None)
    return cls if isinstance(cls, type) and issubclass(cls, errors.QuireError) else None


def format_ready_line(config: EngineConfig, capacity: KVCapacity | EngineReady) -> str:
    """Weights, activations, graphs, KV cache, and how many full-length requests it holds. Where several devices share
    the model, each has so much."""
    num_tokens = (capacity.num_blocks - 1) * config.cache.block_size
    dtype_suffix = "" if config.cache.dtype == "auto" else f" in {config.cache.dtype}"
    num_ranks = config.parallel.num_workers
    each = "" if num_ranks == 1 else "on each "
    parts = [f"{each}weights {_format_bytes(capacity.weight_bytes)}"]
    if capacity.activation_bytes:
        parts.append(f"activations {_format_bytes(capacity.activation_bytes)}")
    if capacity.graph_bytes:
        parts.append(f"graphs {_format_bytes(capacity.graph_bytes)}")
    cache_size = _format_bytes(capacity.num_blocks * capacity.bytes_per_block)
    parts.append(f"KV cache {cache_size} = {num_tokens:,} tokens{dtype_suffix}")
    max_model_len = config.model.max_model_len
    parts.append(f"{num_tokens / max_model_len:.1f} requests of {max_model_len:,} tokens at once")
    device = config.model.device if num_ranks == 1 else f"{num_ranks} x {config.model.device}"
    return f"{config.model.served_names[0]} ({config.model.dtype} on {device}): {', '.join(parts)}"


def _format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"

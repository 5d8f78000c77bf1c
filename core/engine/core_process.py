"""The engine core in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from typing import Any

import msgspec
import torch
import zmq

from quire.core.engine.engine_core import EngineCore
from quire.core.engine.executor_start import make_executor
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
    MessageToCore,
    Shutdown,
    StepOutputs,
    UnreadableRequest,
    connect_output_socket,
    open_socket,
    socket_address,
)
from quire.core.engine.watchdog import StepWatchdog
from quire.core.errors import InvalidRequestError, PluginError, PluginOptionError, QuireError
from quire.core.log import setup_logging
from quire.core.messages import EngineCoreRequest
from quire.core.plugin.frames import PluginFrames, describe_error
from quire.core.worker import worker as _worker  # noqa: F401 - imported while the API process builds the configuration
from quire.core.worker.multiproc.rank_processes import RankProcesses

__all__ = ["EngineCoreProcess"]

_log = logging.getLogger("quire.engine")
_IDLE_POLL_MS = 1000


class EngineCoreProcess:
    """Runs an engine core, and handles messages between its steps. Ends on ``Shutdown``, or when its parent is gone."""

    def __init__(self, folder: str, device: str, parent_pid: int, rank_processes: RankProcesses | None = None) -> None:
        """``rank_processes``: for the executor, started before this process imported anything."""
        self._context = zmq.Context()
        self._input_socket = open_socket(self._context, zmq.PULL)
        self._input_socket.bind(socket_address(folder, "in"))
        self._output_socket = connect_output_socket(self._context, folder)
        self._watchdog_socket = connect_output_socket(self._context, folder)  # a socket belongs to one thread
        self._codec, self._watchdog_codec = MessageCodec(), MessageCodec()
        self._parent_pid = parent_pid
        self._rank_processes = rank_processes
        _initialize_gpu(device)

    def run(self) -> int:
        """Build the engine, serve, and return the exit status."""
        core: EngineCore | None = None
        frames: PluginFrames | None = None
        try:
            while not self._input_socket.poll(_IDLE_POLL_MS):
                if os.getppid() != self._parent_pid:
                    return 1  # the API process ended before it had a configuration
            start = self._codec.decode_start(self._input_socket.recv())
            setup_logging(start.log_level)
            frames = PluginFrames(start.config)
            core = EngineCore(start.config, executor=make_executor(start.config, self._rank_processes))
            capacity = core.capacity
            self._send_from_watchdog(Heartbeat())
            memory = (capacity.weight_bytes, capacity.activation_bytes, capacity.graph_bytes)
            self._send_message(EngineReady(capacity.num_blocks, capacity.bytes_per_block, *memory, core.make_stats()))
            # What the engine was built from stays: a collection that scans it would stall a step.
            gc.collect()
            gc.freeze()
            self._run_busy_loop(core)
            return 0
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # of a plugin, ``SystemExit`` included
            if not isinstance(error, QuireError):
                _log.error("the engine core stopped", exc_info=error)
            self._send_message(EngineFailed(describe_error(error, frames), type(error).__name__))
            return 1
        finally:
            if core is not None:
                core.shutdown()
            elif self._rank_processes is not None:
                self._rank_processes.kill()
            self._context.destroy(linger=2000)

    def _run_busy_loop(self, core: EngineCore) -> None:
        with StepWatchdog(core, self._send_from_watchdog, self._send_heartbeat) as watchdog:
            while os.getppid() == self._parent_pid:
                watchdog.num_turns += 1
                if not core.has_work:
                    watchdog.is_idle = True
                    is_readable = self._input_socket.poll(_IDLE_POLL_MS)
                    watchdog.is_idle = False
                    if not is_readable:
                        continue
                has_answered = False
                for message in self._receive_messages(core):
                    if isinstance(message, Shutdown):
                        return
                    if isinstance(message, ControlCall):
                        with watchdog.allow_time(f"the control call {message.method:.80}", message.timeout):
                            self._answer_call(core, message)
                        has_answered = True
                    else:
                        _handle_message(core, message)
                if has_answered and not core.has_work:
                    self._send_message(StepOutputs(core.report_stats()))  # an unload changes some, and no step follows
                if core.has_work:
                    outputs = core.step()
                    steps = (outputs.steps, outputs.step_failures)
                    if any((outputs.request_ids, outputs.outputs, outputs.stats, *steps)):
                        self._send_message(StepOutputs(outputs))
                    if core.device_error is not None:
                        raise core.device_error

    def _receive_messages(self, core: EngineCore) -> list[MessageToCore]:
        messages: list[MessageToCore] = []
        while True:
            try:
                data = self._input_socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            try:
                messages.append(self._codec.decode_to_core(data))
            except Exception as error:  # a fault of one caller or plugin: the others go on
                _log.error("a message to the engine core cannot be read: %s", error)
                messages.append(AddRequests(self._reject_unreadable(core, data, str(error))))

    def _answer_call(self, core: EngineCore, call: ControlCall) -> None:
        try:
            self._send_message(ControlReply(call.call_id, core.control.call_method(call.method, call.arguments)))
        except InvalidRequestError as error:
            self._send_message(ControlReply(call.call_id, None, str(error), "invalid", error.param))
        except PluginError as error:
            param = "options" if isinstance(error, PluginOptionError) else None
            self._send_message(ControlReply(call.call_id, None, str(error), "invalid", param))
        except Exception as error:  # also a result that msgpack cannot hold
            self._send_message(ControlReply(call.call_id, error=describe_error(error)))

    def _reject_unreadable(self, core: EngineCore, data: bytes, error: str) -> list[EngineCoreRequest]:
        """Answer the call, or those requests of a message, that cannot be read; the others."""
        readable = []
        with contextlib.suppress(msgspec.DecodeError):
            if (call_id := self._codec.find_call_id(data)) is not None:
                self._send_message(ControlReply(call_id, error=error, error_kind="invalid"))
            for request in self._codec.decode_each_request(data):
                if isinstance(request, UnreadableRequest):
                    core.reject_request(request.request_id, request.error, "invalid")
                else:
                    readable.append(request)
        return readable

    def _send_message(self, message: Any) -> None:
        self._output_socket.send(self._codec.encode(message))

    def _send_heartbeat(self, is_compiling: bool) -> None:
        self._send_from_watchdog(Heartbeat(is_compiling))

    def _send_from_watchdog(self, message: Heartbeat | EngineHung) -> None:
        self._watchdog_socket.send(self._watchdog_codec.encode(message))


def _handle_message(core: EngineCore, message: AddRequests | AbortRequests) -> None:
    if isinstance(message, AddRequests):
        for request in message.restore_children():
            core.add_request(request)
    else:
        core.abort_requests(message.request_ids)


def _initialize_gpu(device: str) -> None:
    """Create the CUDA context while the configuration is built. An error is ignored: it comes again and is reported."""
    with contextlib.suppress(Exception):
        if device != "cpu" and torch.cuda.is_available():
            torch.zeros(1, device="cuda")

"""The engine core in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from typing import Any

import torch
import zmq

from quire.core.engine.engine_core import EngineCore
from quire.core.engine.ipc import Abort, Add, Failed, Outputs, Ready, Shutdown, ToCore, Wire, address, socket
from quire.core.errors import QuireError
from quire.core.log import setup_logging
from quire.core.worker import worker as _worker  # noqa: F401 - imported while the front makes the configuration

__all__ = ["CoreProcess"]

_log = logging.getLogger("quire.engine")
_IDLE_MS = 1000


class CoreProcess:
    """Takes in messages between steps. Ends when told to, or when its parent is gone."""

    def __init__(self, folder: str, device: str, parent: int) -> None:
        self._context = zmq.Context()
        self._inward = socket(self._context, zmq.PULL)
        self._inward.bind(address(folder, "in"))
        self._outward = socket(self._context, zmq.PUSH)
        self._outward.setsockopt(zmq.LINGER, 2000)
        self._outward.connect(address(folder, "out"))
        self._wire = Wire()
        self._parent = parent
        _warm_up(device)

    def run(self) -> int:
        """Build the engine, serve, and return the exit status."""
        core: EngineCore | None = None
        try:
            while not self._inward.poll(_IDLE_MS):
                if os.getppid() != self._parent:
                    return 1
            start = self._wire.decode_start(self._inward.recv())
            setup_logging(start.log_level)
            core = EngineCore(start.config)
            size = core.capacity
            memory = (size.weight_bytes, size.activation_bytes, size.graph_bytes)
            self._send(Ready(size.num_blocks, size.bytes_per_block, *memory))
            gc.collect()
            gc.freeze()
            self._serve(core)
            return 0
        except Exception as error:
            if not isinstance(error, QuireError):
                _log.error("the engine core stopped", exc_info=error)
            self._send(Failed(_one_line(error), type(error).__name__))
            return 1
        finally:
            if core is not None:
                core.shutdown()
            self._context.destroy(linger=2000)

    def _serve(self, core: EngineCore) -> None:
        while os.getppid() == self._parent:
            if not core.has_work and not self._inward.poll(_IDLE_MS):
                continue
            for message in self._received():
                if isinstance(message, Shutdown):
                    return
                _take(core, message)
            if core.has_work:
                outputs = core.step()
                if outputs.request_ids or outputs.outputs or outputs.stats or outputs.steps:
                    self._send(Outputs(outputs))

    def _received(self) -> list[ToCore]:
        messages: list[ToCore] = []
        while True:
            try:
                messages.append(self._wire.decode_to_core(self._inward.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def _send(self, message: Any) -> None:
        self._outward.send(self._wire.encode(message))


def _take(core: EngineCore, message: ToCore) -> None:
    if isinstance(message, Add):
        for request in message.requests:
            core.add(request)
    elif isinstance(message, Abort):
        core.abort(message.request_ids)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, QuireError) else f"{type(error).__name__}: {text}"


def _warm_up(device: str) -> None:
    """What fails here fails again where it can be told."""
    with contextlib.suppress(Exception):
        if device != "cpu" and torch.cuda.is_available():
            torch.zeros(1, device="cuda")

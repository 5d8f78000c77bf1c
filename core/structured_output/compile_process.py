"""Processes that compile constraints to see whether that ends: with limits of time and memory, they can be killed.

One process, the template, loads the backend, and is forked for each of them: that takes milliseconds, and they share
its memory. A backend that has threads cannot be forked. There the template itself compiles, and another is started
in its place. ``quire.core.structured_output.compile_worker`` is what runs in them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import send_handle

import msgspec

from quire.core.config import EngineConfig
from quire.core.env import child_environment
from quire.core.errors import InvalidRequestError, RequestFailedError
from quire.core.structured_output.compile_worker import MAX_COMPILE_SECONDS, MAX_MEMORY_BYTES
from quire.core.structured_outputs import StructuredOutputsParams

__all__ = ["CompileProcess", "CompileTemplate"]

_MAX_WALL_SECONDS = 15.0
"""For one constraint by the clock, where a compiler waits for something."""
_READY_SECONDS = 120.0
_CHILD_MODULE = "quire.core.structured_output.compile_worker"


@dataclass(slots=True)
class _Process:
    """A process that was forked, or began as a template, and this end of the pipe to it."""

    connection: Connection
    pid: int
    template: subprocess.Popen[bytes] | None


class CompileTemplate:
    """The process that others are forked from. Started in advance by ``start``, or when the first one is needed."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Connection | None = None
        self._is_closed = False
        self._lock = threading.RLock()  # of starting and ending it, for ``close`` comes from another thread
        self._calls = threading.Lock()

    def start(self) -> None:
        """Begin to load the backend. Waits for nothing. Raises ``OSError``."""
        with self._lock:
            if self._is_closed:
                raise ProcessLookupError
            if self._process is not None:
                return
            self._control, child_end = Pipe()
            command = [sys.executable, "-m", _CHILD_MODULE, str(child_end.fileno())]
            self._process = subprocess.Popen(
                command, env=child_environment(), stdin=subprocess.DEVNULL, pass_fds=[child_end.fileno()]
            )
            child_end.close()
            try:
                self._control.send_bytes(msgspec.msgpack.encode(self._config))
            except OSError:
                self._kill()
                raise

    def fork(self) -> _Process:
        """Another process, once the backend is loaded. Raises ``OSError`` and ``EOFError`` if there can be none."""
        with self._calls:
            self.start()
            process, control = self._process, self._control
            assert process is not None
            assert control is not None
            own_end, child_end = Pipe()
            try:
                control.send_bytes(b"0")
                send_handle(control, child_end.fileno(), process.pid)
                pid = int(_receive(control, _READY_SECONDS))
            except (OSError, EOFError):  # a time-out is one, too
                own_end.close()
                self._kill()
                raise
            finally:
                child_end.close()
            if pid:
                return _Process(own_end, pid, None)
            with self._lock:  # it has threads: it is the process that was asked for
                self._process = self._control = None
                control.close()
        self.start()
        return _Process(own_end, process.pid, process)

    def end_process(self, process: _Process) -> int | None:
        """Wait for a process that ends, and kill it if it does not. Returns its exit status as ``Popen.returncode`` has
        it; None if it cannot be known."""
        process.connection.close()
        if process.template is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.template.wait(1.0)
            process.template.kill()
            return process.template.wait()
        with self._calls:
            try:
                if self._control is None:
                    return None
                self._control.send_bytes(str(process.pid).encode())
                return int(_receive(self._control, 5.0))
            except (OSError, EOFError):
                self._kill()
                return None

    def close(self) -> None:
        """End it at once with all that were forked from it, and start no other. Idempotent."""
        self._is_closed = True
        self._kill()

    def _kill(self) -> None:
        with self._lock:
            if self._control is not None:
                self._control.close()  # at which it kills those that were forked from it, and ends
            if self._process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.2)
                self._process.kill()
                self._process.wait()
            self._process = self._control = None


class CompileProcess:
    """Compiles one constraint after the other. A process that was ended, or ended itself, is replaced by another."""

    def __init__(self, template: CompileTemplate) -> None:
        self.template = template
        self._process: _Process | None = None
        self._is_closed = False

    def check_constraint(self, params: StructuredOutputsParams) -> None:
        """Return if the constraint compiles within the limits. Raises ``InvalidRequestError`` with the reason if not,
        and ``RequestFailedError`` if that cannot be found out. Waits for it: to be called in a thread."""
        process = self._fork()
        try:
            process.connection.send_bytes(msgspec.msgpack.encode(params))
            error = _receive(process.connection, _MAX_WALL_SECONDS)
        except TimeoutError:
            error = f"{params.kind}: compiling it takes longer than {_MAX_WALL_SECONDS:.0f} s; simplify it"
            self._replace(process, kill=True)
        except (EOFError, OSError):
            status = self._replace(process)
            if self._is_closed:
                error = f"{params.kind}: the server shuts down"
            elif status == -signal.SIGPROF:
                error = f"{params.kind}: compiling it takes longer than {MAX_COMPILE_SECONDS:.0f} s; simplify it"
            else:
                error = f"{params.kind}: compiling it takes more than {MAX_MEMORY_BYTES >> 20} MiB; simplify it"
        if error:
            raise InvalidRequestError(error, "structured_outputs")

    def close(self) -> None:
        """End it at once, and start no other. Idempotent."""
        self._is_closed = True
        if (process := self._process) is not None:
            _kill_at_once(process)
            if process.template is not None:
                process.template.wait()

    def _fork(self) -> _Process:
        if self._process is None:
            try:
                self._process = self.template.fork()
            except (EOFError, OSError):
                message = "the process that compiles schemas and grammars did not start; see the log"
                raise RequestFailedError(message) from None
        return self._process

    def _replace(self, process: _Process, kill: bool = False) -> int | None:
        """Another process begins at once, so that the next constraint does not wait for it."""
        if kill:
            _kill_at_once(process)
        self._process = None
        status = self.template.end_process(process)
        with contextlib.suppress(RequestFailedError):
            self._fork()
        return status


def _kill_at_once(process: _Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


def _receive(connection: Connection, seconds: float) -> str:
    if not connection.poll(seconds):
        raise TimeoutError
    return connection.recv_bytes().decode()

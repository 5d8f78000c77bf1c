"""A process that compiles constraints to see whether that ends: with limits of time and memory, it can be killed.

It is ``python -m quire.core.structured_output.compile_process FD``, where FD is one end of a pipe.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe

import msgspec

from quire.core.config import EngineConfig
from quire.core.env import child_environment
from quire.core.errors import InvalidRequestError, RequestFailedError
from quire.core.structured_output.compiler import make_backend
from quire.core.structured_outputs import StructuredOutputsParams

__all__ = ["MAX_COMPILE_SECONDS", "CompileProcess", "main"]

MAX_COMPILE_SECONDS = 1.0
"""Processor time that a constraint may take: what the machine does beside it does not count."""
_MAX_WALL_SECONDS = 15.0
"""The same by the clock, for a compiler that waits for something."""
_MAX_MEMORY_BYTES = 512 << 20
"""Address space that a constraint may take beyond what the process has when it is ready."""
_READY_SECONDS = 120.0


class CompileProcess:
    """Compiles one constraint after the other. A process that was ended, or ended itself, is replaced by another."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._is_ready = self._is_closed = False
        self._lock = threading.Lock()  # of starting and ending the child, for ``close`` comes from another thread

    def check_constraint(self, params: StructuredOutputsParams) -> None:
        """Return if the constraint compiles within the limits. Raises ``InvalidRequestError`` with the reason if not,
        and ``RequestFailedError`` if that cannot be found out. Waits for it: to be called in a thread."""
        connection = self._wait_ready()
        try:
            connection.send_bytes(msgspec.msgpack.encode(params))
            error = _receive(connection, _MAX_WALL_SECONDS)
        except TimeoutError:
            error = f"{params.kind}: compiling it takes longer than {_MAX_WALL_SECONDS:.0f} s; simplify it"
            self._restart()
        except (EOFError, OSError):
            error = self._explain_end(params)
            self._restart()
        if error:
            raise InvalidRequestError(error, "structured_outputs")

    def close(self) -> None:
        """End it at once, and start no other. Idempotent."""
        self._is_closed = True
        self._kill()

    def _wait_ready(self) -> Connection:
        try:
            connection = self._connection or self._start()
            if not self._is_ready:
                _receive(connection, _READY_SECONDS)
                self._is_ready = True
            return connection
        except (EOFError, OSError):  # a time-out is one, too
            self._kill()
            message = "the process that compiles schemas and grammars did not start; see the log"
            raise RequestFailedError(message) from None

    def _start(self) -> Connection:
        with self._lock:
            if self._is_closed:
                raise ProcessLookupError
            own_end, child_end = Pipe()
            command = [sys.executable, "-m", __name__, str(child_end.fileno())]
            self._child = subprocess.Popen(
                command, env=child_environment(), stdin=subprocess.DEVNULL, pass_fds=[child_end.fileno()]
            )
            child_end.close()
            self._connection = own_end
        own_end.send_bytes(msgspec.msgpack.encode(self._config))
        return own_end

    def _restart(self) -> None:
        """Another process begins at once, so that the next constraint waits less for it."""
        self._kill()
        try:
            self._start()
        except OSError:
            self._kill()

    def _kill(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            if self._child is not None:
                self._child.kill()
                self._child.wait()
            self._connection, self._child, self._is_ready = None, None, False

    def _explain_end(self, params: StructuredOutputsParams) -> str:
        if (child := self._child) is None:
            return f"{params.kind}: the server shuts down"
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1.0)
        if child.returncode == -signal.SIGPROF:
            return f"{params.kind}: compiling it takes longer than {MAX_COMPILE_SECONDS:.0f} s; simplify it"
        return f"{params.kind}: compiling it takes more than {_MAX_MEMORY_BYTES >> 20} MiB; simplify it"


def main() -> int:
    """Entry point: constraints in, reasons out, empty ones for what compiles. Ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    config = msgspec.msgpack.decode(connection.recv_bytes(), type=EngineConfig)
    backend, reason = None, ""
    try:
        backend = make_backend(config)
    except Exception as error:
        reason = f"structured output is not available: {error}"
    connection.send_bytes(b"")
    with open("/proc/self/statm") as statm:
        num_pages = int(statm.read().split()[0])
    limit = num_pages * os.sysconf("SC_PAGE_SIZE") + _MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            params = msgspec.msgpack.decode(connection.recv_bytes(), type=StructuredOutputsParams)
            # SIGPROF ends a process that does not handle it.
            signal.setitimer(signal.ITIMER_PROF, MAX_COMPILE_SECONDS)
            if backend is not None:
                reason = ""
                try:
                    backend.validate_params(params)
                    backend.compile(params).start()
                except InvalidRequestError as error:
                    reason = str(error)
                except MemoryError:
                    reason = f"{params.kind}: compiling it takes more than {_MAX_MEMORY_BYTES >> 20} MiB; simplify it"
                except Exception as error:
                    reason = f"{params.kind}: compiling it raised {type(error).__name__}: {error}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(reason.encode("utf-8", "replace"))
    return 0


def _receive(connection: Connection, seconds: float) -> str:
    if not connection.poll(seconds):
        raise TimeoutError
    return connection.recv_bytes().decode()


if __name__ == "__main__":
    sys.exit(main())

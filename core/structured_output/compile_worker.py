"""What runs in the processes that compile constraints: ``python -m quire.core.structured_output.compile_worker FD``,
where FD is one end of a pipe over which ``CompileTemplate`` says what to do."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

import msgspec

from quire.core.config import EngineConfig
from quire.core.contracts.structured_output import StructuredOutputBackend
from quire.core.errors import InvalidRequestError
from quire.core.plugin.quarantine import class_path, read_error_text
from quire.core.structured_output.compiler import make_backend
from quire.core.structured_outputs import StructuredOutputsParams

__all__ = ["MAX_COMPILE_SECONDS", "MAX_MEMORY_BYTES", "main"]

MAX_COMPILE_SECONDS = 1.0
"""Processor time that a constraint may take: what the machine does beside it does not count."""
MAX_MEMORY_BYTES = 512 << 20
"""Address space that a constraint may take beyond what the process has when it is ready."""
_END_SECONDS = 1.0


def main() -> int:
    """Entry point of the template: forks, and waits for those that end. Ends with its parent, and they with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = Connection(int(sys.argv[1]))
    config = msgspec.msgpack.decode(control.recv_bytes(), type=EngineConfig)
    backend, reason = None, ""
    try:
        backend = make_backend(config)
    except BaseException as error:
        reason = f"structured output is not available: {read_error_text(error)}"
    gc.collect()
    gc.freeze()  # a collection would write to memory that is shared
    pids: set[int] = set()
    try:
        while True:
            if pid := int(control.recv_bytes()):
                pids.discard(pid)
                control.send_bytes(str(_wait_for_end(pid)).encode())
                continue
            connection = Connection(recv_handle(control))
            if len(os.listdir("/proc/self/task")) > 1:  # a copy would not have the threads
                control.send_bytes(b"0")
                control.close()
                _compile_constraints(connection, backend, reason)
                break
            pid = os.fork()
            if not pid:
                try:
                    control.close()
                    _compile_constraints(connection, backend, reason)
                finally:
                    os._exit(1)
            connection.close()
            pids.add(pid)
            control.send_bytes(str(pid).encode())
    except (EOFError, ConnectionError):
        pass
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return 0


def _wait_for_end(pid: int) -> int:
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        if (ended := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _compile_constraints(connection: Connection, backend: StructuredOutputBackend | None, reason: str) -> None:
    """Constraints in, reasons out, empty ones for what compiles. Without a backend ``reason`` is that of all."""
    with open("/proc/self/statm") as statm:
        num_pages = int(statm.read().split()[0])
    limit = num_pages * os.sysconf("SC_PAGE_SIZE") + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            params = msgspec.msgpack.decode(connection.recv_bytes(), type=StructuredOutputsParams)
            # SIGPROF ends a process that does not handle it.
            signal.setitimer(signal.ITIMER_PROF, MAX_COMPILE_SECONDS)
            answer = reason if backend is None else _compile(backend, params)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(answer.encode("utf-8", "replace"))


def _compile(backend: StructuredOutputBackend, params: StructuredOutputsParams) -> str:
    try:
        backend.validate_params(params)
        backend.compile(params).start()
    except InvalidRequestError as error:
        return str(error)
    except MemoryError:
        return f"{params.kind}: compiling it takes more than {MAX_MEMORY_BYTES >> 20} MiB; simplify it"
    except BaseException as error:
        traceback.print_exception(error)
        return f"{params.kind}: compiling it failed in {class_path(backend)}; the server's log says why"
    return ""


if __name__ == "__main__":
    sys.exit(main())

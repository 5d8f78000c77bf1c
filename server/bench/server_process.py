"""A server process to measure: ``quire serve`` as a user starts it, its processes and their memory."""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from quire.core.env import child_environment
from quire.core.errors import ConfigError
from quire.server.cli.flags import ENGINE_FLAGS, option_flags

__all__ = ["ServerProcess", "gpu_memory_used", "serve_arguments"]

_READY_TIMEOUT_S = 900.0


class ServerProcess:
    """Started by the constructor, on a free port of this machine; a context that ends it."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="quire-bench-")
        self._out, self._log = Path(self._folder.name, "out"), Path(self._folder.name, "log")
        command = [sys.executable, "-m", "quire", "serve", *arguments, "--host", "127.0.0.1", "--port", "0"]
        self.started_at = time.monotonic()
        with self._out.open("w") as out, self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                # a key of the environment would be asked of the benchmark, which has none to send
                env={**child_environment(), "VLLM_API_KEY": "", **(environment or {})},
            )
        self.url = ""

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(40)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def wait_ready(self) -> float:
        """Seconds from the start to the ready line. ConfigError with the last lines of the log if the server ends."""
        while not (match := re.search(r"ready on (http://\S+)", self._out.read_text())):
            if self._process.poll() is not None:
                last_lines = self._log.read_text().strip().splitlines()[-3:]
                raise ConfigError(f"the server did not start: {' / '.join(last_lines) or 'its log is empty'}")
            if time.monotonic() - self.started_at > _READY_TIMEOUT_S:
                raise ConfigError(
                    f"the server was not ready after {_READY_TIMEOUT_S:.0f} s; start it by hand to see why"
                )
            time.sleep(0.005)
        self.url = match.group(1)
        return time.monotonic() - self.started_at

    @property
    def ready_line(self) -> str:
        """The server's ready line, without its address."""
        return self._out.read_text().splitlines()[0].partition(" - ")[2]

    @property
    def phases(self) -> dict[str, float]:
        """Seconds by phase, as the worker, or the first of several, logs them."""
        line = re.search(r"quire\.worker(?:\[rank 0\])?: started: (.*)", self._log.read_text())
        parts = line.group(1).split(", ") if line else []
        return {name: float(seconds) for name, seconds, _ in (part.rsplit(" ", 2) for part in parts)}

    def resident_bytes(self) -> int:
        """Memory of the server's processes together, pages that they share counted in each; 0 if the system does not
        report it."""
        pages, pending = 0, [self._process.pid]
        while pending:
            pid = pending.pop()
            try:
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                for task in Path(f"/proc/{pid}/task").iterdir():
                    pending += map(int, (task / "children").read_text().split())
            except (OSError, IndexError, ValueError):
                continue
        return pages * 4096


def serve_arguments(args: argparse.Namespace) -> list[str]:
    """The arguments of ``quire serve`` for the engine flags in ``args``."""
    arguments: list[str] = [args.model_argument] if getattr(args, "model_argument", None) else []
    for setting in ENGINE_FLAGS:
        value = getattr(args, setting.name, None)
        if isinstance(value, bool):
            arguments.append(setting.flag if value else f"--no-{setting.flag.removeprefix('--')}")
        elif isinstance(value, list) and setting.value_type == "list":
            arguments += [setting.flag, *value]
        elif isinstance(value, list):
            arguments += [word for each in value for word in (setting.flag, each)]
        elif value is not None:
            arguments += [setting.flag, str(value)]
    for name, kind in option_flags().items():
        arguments += [word for pair in getattr(args, f"option_{kind}", None) or () for word in (name, pair)]
    return arguments


def gpu_memory_used() -> int:
    """Memory in use on the first GPU, by all processes; 0 without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    command = [tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return int(output) << 20 if output.isdigit() else 0

"""A Ray cluster of two nodes on the loopback addresses of this host, which ends with the process that started it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from quire.core.env import child_environment

HEAD, OTHER = "127.0.0.2", "127.0.0.3"
_START_S = 120.0
_PR_SET_PDEATHSIG = 1
_RAY = Path(sys.executable).with_name("ray")


class TwoNodes:
    """``HEAD`` and ``OTHER``, each with ``num_cpus`` CPUs as Ray counts them. As a context manager it ends whatever was
    started on them."""

    def __init__(self, num_cpus: int = 1, python_path: str = "") -> None:
        self._num_cpus = num_cpus
        self._folder = Path(tempfile.mkdtemp(prefix="qray-"))  # short: it holds sockets
        self._mark = f"QUIRE_TEST_CLUSTER={uuid.uuid4().hex}"
        name, value = self._mark.split("=")
        environment = child_environment()
        self._environment = environment | {
            "PYTHONPATH": os.pathsep.join([python_path, environment["PYTHONPATH"]]),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "120",
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
            name: value,
        }
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.address = ""

    def __enter__(self) -> TwoNodes:
        with socket.socket() as probe:
            probe.bind((HEAD, 0))
            port = probe.getsockname()[1]
        self.address = f"{HEAD}:{port}"
        try:
            self._start(HEAD, "--head", f"--port={port}", "--include-dashboard=false")
            self._wait(HEAD, lambda: _accepts(HEAD, port))
            self._start(OTHER, f"--address={self.address}")
            for host in (HEAD, OTHER):
                self._wait(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def start_other(self) -> None:
        """Let the second node join again."""
        self._start(OTHER, f"--address={self.address}")
        self._wait(OTHER)

    def kill_other(self) -> None:
        """End all processes of the second node, as if its host had gone."""
        for pid in self._list_processes(OTHER):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._nodes.pop(OTHER).wait(10)

    def __exit__(self, *exception: object) -> None:
        for pid in self._list_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in self._nodes.values():
            node.wait(10)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, host: str, *arguments: str) -> None:
        log = self._folder / f"{host}.log"
        command = [
            str(_RAY), "start", *arguments, f"--node-ip-address={host}", f"--temp-dir={self._folder / host}", "--block",
            f"--num-cpus={self._num_cpus}", "--num-gpus=0", "--object-store-memory=80000000", "--disable-usage-stats",
        ]  # fmt: skip
        with log.open("wb") as output:
            self._nodes[host] = subprocess.Popen(
                command,
                env=self._environment | {"QUIRE_TEST_NODE": host},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
            )

    def _wait(self, host: str, condition: Callable[[], bool] | None = None) -> None:
        log, deadline = self._folder / f"{host}.log", time.monotonic() + _START_S
        while not (condition() if condition else "--block" in log.read_text()):
            if self._nodes[host].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Ray node {host} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)

    def _list_processes(self, host: str = "") -> list[int]:
        """Those of this cluster, or of one node, by a mark in their environment that no other process has."""
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and int(process.name) != os.getpid():
                with contextlib.suppress(OSError):
                    variables = (process / "environ").read_bytes().split(b"\0")
                    is_hosts = not host or f"QUIRE_TEST_NODE={host}".encode() in variables
                    if self._mark.encode() in variables and is_hosts:
                        found.append(int(process.name))
        return found


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True

"""What a plugin changes of the whole engine: two engines, each in a process of its own, which take turns."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from quire.core.env import child_environment
from quire.core.errors import ConfigError
from quire.server.plugin_bench.timer import Ratio, compare_rounds

__all__ = ["MIN_RUNS", "EndToEnd", "EngineProcess", "compare_engines"]

MIN_RUNS = 5
"""Alternating runs that make an interval."""


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """Output tokens a second of each run."""

    model: str
    workload: str
    rival: str
    subject_rates: list[float]
    rival_rates: list[float]
    ratio: Ratio
    """Of tokens a second: above 1, the subject is faster."""

    @property
    def subject_median(self) -> float:
        """Tokens a second."""
        return statistics.median(self.subject_rates)

    @property
    def rival_median(self) -> float:
        """Tokens a second."""
        return statistics.median(self.rival_rates)


class EngineProcess:
    """An engine that measures a workload whenever it is asked. Both may hold a GPU at once, so each takes part of its
    memory; only one runs at a time."""

    def __init__(self, arguments: Mapping[str, Any], workload: str, scale: float, num_prompts: int | None) -> None:
        command = [sys.executable, "-m", "quire.server.plugin_bench.engine_worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=child_environment()
        )
        settings = {"workload": workload, "scale": scale, "num_prompts": num_prompts}
        self._send({"arguments": dict(arguments), **settings})

    def wait_ready(self) -> None:
        """Until the engine has started. Raises ``ConfigError`` with what it says where it does not."""
        self._read()

    def measure(self) -> float:
        """Output tokens a second of one run."""
        self._send({"run": True})
        return float(self._read()["output_tok_s"])

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                if "error" in answer:
                    raise ConfigError(f"--end-to-end: {answer['error']}")
                return answer
        raise ConfigError("--end-to-end: an engine ended; its own messages are above")


def compare_engines(
    model: str,
    workload: str,
    subject: Mapping[str, Any],
    rival: Mapping[str, Any],
    *,
    rival_name: str,
    num_runs: int = MIN_RUNS,
    scale: float = 1.0,
    num_prompts: int | None = None,
) -> EndToEnd:
    """Measure ``workload`` alternately on engines with the arguments ``subject`` and ``rival``, after a run of each
    that does not count."""
    rates: tuple[list[float], list[float]] = ([], [])
    with (
        EngineProcess({"model": model, **subject}, workload, scale, num_prompts) as first,
        EngineProcess({"model": model, **rival}, workload, scale, num_prompts) as second,
    ):
        engines = (first, second)
        for engine in engines:
            engine.wait_ready()
        for number in range(-1, num_runs):
            for index in (0, 1) if number % 2 else (1, 0):
                rate = engines[index].measure()
                if number >= 0:
                    rates[index].append(rate)
    ratio = compare_rounds(rates[0], rates[1])
    return EndToEnd(model, workload, rival_name, rates[0], rates[1], ratio)

"""Metrics exporter: takes the statistics of engine and requests to where they are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from quire.core.adapters import AdapterActivity
from quire.core.stats import QuarantinedPlugin, RequestStats, StepFailure, StepStats

__all__ = ["MetricsExporter"]


class MetricsExporter(ABC):
    """Called in the API process, in a thread of the exporter's own: one call after the other, as things
    happen. The constructor alone runs in the main thread. A call may wait for a network or a disk. An exporter that
    raises, does not return for five seconds, or has 16,384 calls to catch up on is quarantined.

    Times are in seconds unless a name ends in ``_us`` (microseconds). Later minor versions report more stats: an
    exporter passes on or ignores names that it does not know.
    """

    def __init__(self, labels: Mapping[str, str], options: Any = None) -> None:
        self.labels = dict(labels)
        """Labels of every metric: ``model_name``, and others in later versions."""
        self.options = options
        """An instance of the class's ``Options`` dataclass, None without one."""

    @abstractmethod
    def record_engine(self, stats: Mapping[str, float]) -> None:
        """Gauges and monotonic counters of the engine core, by the names in ``quire.core.stats.ENGINE_STATS``."""

    @abstractmethod
    def record_request(self, stats: RequestStats) -> None:
        """A request finished, failed or was aborted: called once for each of its ``n`` continuations."""

    @abstractmethod
    def record_tokens(self, num_prompt: int, num_generated: int, ttft_s: float | None, itl_s: list[float]) -> None:
        """Tokens reached callers: how many of a prompt (with its first token) and generated, the time to first token
        if one of them is a first, and the gaps between tokens (inter-token latencies)."""

    def record_quarantine(self, plugin: QuarantinedPlugin) -> None:
        """A plugin was quarantined: called once for each. The stat ``plugin_quarantines_total`` is their number."""

    def record_adapters(self, adapters: Sequence[AdapterActivity], max_loras: int) -> None:
        """The LoRA adapters that have requests, and how many a step can use: called with ``record_engine`` where there
        may be adapters. Names are those that callers gave, and there may be any number of them."""

    def record_step_failure(self, failure: StepFailure) -> None:
        """An engine step failed, and its requests ended with an error; the log has the exception. The stat
        ``step_failures_total`` is the number of these."""

    def record_step(self, stats: StepStats) -> None:
        """An engine step was finished. Called for every step, so it has microseconds."""

    def render(self) -> tuple[str, bytes] | None:
        """(content type, body) for ``GET /metrics``; None if this exporter pushes."""
        return None

    def close(self) -> None:
        """Send what is left, and stop. Called once, when the server stops."""

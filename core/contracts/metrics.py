"""Metrics exporter: where the figures go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from quire.core.stats import QuarantinedPlugin, RequestStats, StepStats

__all__ = ["MetricsExporter"]


class MetricsExporter(ABC):
    """Lives in the front process, on its event loop: must not block. One that raises is dropped, and logged."""

    def __init__(self, labels: Mapping[str, str], options: Any = None) -> None:
        self.labels = dict(labels)
        """``model_name`` and whatever else marks every figure."""

    @abstractmethod
    def record_engine(self, stats: Mapping[str, float]) -> None:
        """Gauges and monotonic counters of the engine core, by the names in ``quire.core.stats.ENGINE_STATS``."""

    @abstractmethod
    def record_request(self, stats: RequestStats) -> None:
        """A request finished."""

    @abstractmethod
    def record_tokens(self, num_prompt: int, num_generated: int, ttft_s: float | None, itl_s: list[float]) -> None:
        """Tokens reached callers: counts, a time to first token if one did, and gaps between tokens, in seconds."""

    def record_quarantine(self, plugin: QuarantinedPlugin) -> None:
        """A plugin was quarantined: called once for each. The stat ``plugin_quarantines_total`` is their number."""

    def record_step(self, stats: StepStats) -> None:
        """An engine step was committed. Called for every step: keep it cheap."""

    def render(self) -> tuple[str, bytes] | None:
        """(content type, body) for ``GET /metrics``; None if this exporter pushes."""
        return None

    def close(self) -> None:
        """Flush and stop."""

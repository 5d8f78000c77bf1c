"""The metrics exporters of one process, behind one call. One that raises is dropped, and logged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from quire.core.contracts.metrics import MetricsExporter
from quire.core.stats import RequestStats, StepStats

__all__ = ["Exporters"]

_log = logging.getLogger("quire.metrics")


class Exporters:
    """Fans figures out."""

    def __init__(self, exporters: Sequence[MetricsExporter] = ()) -> None:
        self.active: list[MetricsExporter] = list(exporters)

    def record_engine(self, stats: Mapping[str, float]) -> None:
        """See ``MetricsExporter``."""
        self._each(lambda exporter: exporter.record_engine(stats))

    def record_request(self, stats: RequestStats) -> None:
        """See ``MetricsExporter``."""
        self._each(lambda exporter: exporter.record_request(stats))

    def record_tokens(self, num_prompt: int, num_generated: int, ttft_s: float | None, itl_s: list[float]) -> None:
        """See ``MetricsExporter``."""
        self._each(lambda exporter: exporter.record_tokens(num_prompt, num_generated, ttft_s, itl_s))

    def record_step(self, stats: StepStats) -> None:
        """See ``MetricsExporter``."""
        self._each(lambda exporter: exporter.record_step(stats))

    def close(self) -> None:
        """Close every exporter."""
        self._each(lambda exporter: exporter.close())

    def _each(self, call: Callable[[MetricsExporter], None]) -> None:
        for exporter in list(self.active):
            try:
                call(exporter)
            except Exception as error:
                self.active.remove(exporter)
                _log.error("metrics exporter %s dropped: %s", type(exporter).__name__, error, exc_info=error)

"""The gauges and counters of an engine, as its API process knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quire.core.engine.exporter_group import ExporterGroup
from quire.core.engine.restarts import EngineRestarter
from quire.core.stats import QuarantinedPlugin
from quire.core.structured_output.checker import ConstraintChecker

__all__ = ["EngineStats"]

_GAUGES_WITHOUT_ENGINE = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


class EngineStats:
    """The latest figures of the engine core, with what the API process counts itself, for the metrics exporters."""

    def __init__(self, restarter: EngineRestarter, checker: ConstraintChecker, exporters: ExporterGroup) -> None:
        self._restarter = restarter
        self._constraint_checker = checker
        self._exporters = exporters
        self._core_stats: Mapping[str, float] = {}
        self.latest: dict[str, float] = {}
        """By the names of ``quire.core.stats.ENGINE_STATS``; empty before an engine core is ready."""

    def record(self, core_stats: Mapping[str, float], quarantined: Sequence[QuarantinedPlugin] = ()) -> None:
        """Take figures of the engine core, and tell the exporters. ``quarantined`` are all its plugins that are."""
        replaced = self._restarter.replaced_plugins
        own_stats = {
            "structured_output_refused_total": self._constraint_checker.num_refused,
            "plugin_quarantines_total": self._exporters.num_quarantined + len(replaced),
            "engine_restarts_total": self._restarter.num_restarts,
        }
        self._core_stats = core_stats
        self.latest = {**core_stats, **{name: core_stats.get(name, 0.0) + count for name, count in own_stats.items()}}
        self._exporters.record_engine(self.latest, [*quarantined, *replaced])

    def record_no_engine(self) -> None:
        """There is no engine core at the moment: it runs nothing, and its counters stay."""
        self.record({**self._core_stats, **dict.fromkeys(_GAUGES_WITHOUT_ENGINE, 0.0)})

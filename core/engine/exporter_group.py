"""The metrics exporters of one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from quire.core.adapters import AdapterActivity
from quire.core.config import EngineConfig
from quire.core.contracts.metrics import MetricsExporter
from quire.core.messages import EngineCoreOutputs
from quire.core.plugin.options import parse_options
from quire.core.plugin.quarantine import Quarantine
from quire.core.plugin.target import load_target
from quire.core.stats import QuarantinedPlugin, RequestStats

__all__ = ["ExporterGroup", "RenderedMetrics"]


@dataclass(frozen=True, slots=True)
class RenderedMetrics:
    """The document of one metrics exporter."""

    name: str
    content_type: str
    body: bytes


class ExporterGroup:
    """The metrics exporters of one process, by name, behind one call. One that raises is quarantined."""

    def __init__(self, exporters: Sequence[tuple[str, MetricsExporter]] = ()) -> None:
        self._guarded = {
            exporter: Quarantine("metrics", name, partial(self._remove_exporter, exporter))
            for name, exporter in exporters
        }
        self._quarantined: list[QuarantinedPlugin] = []  # of this process
        self._recorded: set[QuarantinedPlugin] = set()

    @classmethod
    def from_config(cls, config: EngineConfig) -> ExporterGroup:
        """Those that the configuration names."""
        labels = {"model_name": config.model.served_names[0]}
        exporters = []
        for choice in config.plugins_of("metrics"):
            exporter = load_target(choice.target, MetricsExporter)
            exporters.append((choice.name, exporter(labels, parse_options(exporter, choice.options))))
        return cls(exporters)

    @property
    def active(self) -> list[MetricsExporter]:
        """The exporters that are not quarantined."""
        return list(self._guarded)

    @property
    def num_quarantined(self) -> int:
        """Plugins of this process that are quarantined: exporters, and parsers of answers."""
        return len(self._quarantined)

    def record_engine(self, stats: Mapping[str, float], quarantined: Sequence[QuarantinedPlugin] = ()) -> None:
        """See ``MetricsExporter``. ``quarantined`` are all plugins of the engine core that are: new ones are told."""
        for exporter, quarantine in self._guarded.copy().items():
            quarantine.call(exporter.record_engine, stats)
        for plugin in [*quarantined, *self._quarantined]:
            if plugin not in self._recorded:
                self._recorded.add(plugin)
                for exporter, quarantine in self._guarded.copy().items():
                    quarantine.call(exporter.record_quarantine, plugin)

    def record_adapters(self, adapters: Sequence[AdapterActivity], max_loras: int) -> None:
        """See ``MetricsExporter``."""
        for exporter, quarantine in self._guarded.copy().items():
            quarantine.call(exporter.record_adapters, adapters, max_loras)

    def record_request(self, stats: RequestStats) -> None:
        """See ``MetricsExporter``."""
        for exporter, quarantine in self._guarded.copy().items():
            quarantine.call(exporter.record_request, stats)

    def record_tokens(self, num_prompt: int, num_generated: int, ttft_s: float | None, itl_s: list[float]) -> None:
        """See ``MetricsExporter``."""
        for exporter, quarantine in self._guarded.copy().items():
            quarantine.call(exporter.record_tokens, num_prompt, num_generated, ttft_s, itl_s)

    def record_steps(self, outputs: EngineCoreOutputs) -> None:
        """The steps that were finished, and those that failed; see ``MetricsExporter``."""
        for exporter, quarantine in self._guarded.copy().items():
            for stats in outputs.steps:
                quarantine.call(exporter.record_step, stats)
            for failure in outputs.step_failures:
                quarantine.call(exporter.record_step_failure, failure)

    def render(self) -> list[RenderedMetrics]:
        """The documents of those that have one, in order."""
        documents = []
        for exporter, quarantine in self._guarded.copy().items():
            rendered = quarantine.call(_render_checked, exporter)
            if rendered is not None:
                documents.append(RenderedMetrics(quarantine.name, *rendered))
        return documents

    def close(self) -> None:
        """Close every exporter."""
        for exporter, quarantine in self._guarded.copy().items():
            quarantine.call(exporter.close)

    def add_quarantined(self, plugin: QuarantinedPlugin) -> None:
        """A plugin of this process was quarantined: the exporters are told with the next figures."""
        self._quarantined.append(plugin)

    def _remove_exporter(self, exporter: MetricsExporter, plugin: QuarantinedPlugin) -> None:
        del self._guarded[exporter]
        self.add_quarantined(plugin)


def _render_checked(exporter: MetricsExporter) -> tuple[str, bytes] | None:
    rendered: Any = exporter.render()
    if rendered is not None and not (len(rendered) == 2 and isinstance(rendered[1], bytes)):
        raise ValueError(f"render returned {rendered!r:.80}, not (content type, bytes)")
    return rendered  # type: ignore[no-any-return]

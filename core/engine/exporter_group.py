"""The metrics exporters of one process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quire.core.adapters import AdapterActivity
from quire.core.config import EngineConfig
from quire.core.contracts.metrics import MetricsExporter
from quire.core.engine.exporter_thread import ExporterThread
from quire.core.messages import EngineCoreOutputs
from quire.core.plugin.target import construct_chosen, load_target
from quire.core.stats import QuarantinedPlugin, RequestStats

__all__ = ["ExporterGroup", "RenderedMetrics"]

_log = logging.getLogger("quire.metrics")
_MAX_WAIT_S = 5.0
"""For the documents of a scrape, and for exporters to close."""


@dataclass(frozen=True, slots=True)
class RenderedMetrics:
    """The document of one metrics exporter."""

    name: str
    content_type: str
    body: bytes


class ExporterGroup:
    """The metrics exporters of one process, by name, behind one call. Each has a thread of its own: one that raises,
    hangs or falls behind is quarantined, and neither the others nor the event loop wait for it."""

    def __init__(self, exporters: Sequence[tuple[str, MetricsExporter]] = ()) -> None:
        self._threads = [ExporterThread(name, exporter, self.add_quarantined) for name, exporter in exporters]
        self._quarantined: list[QuarantinedPlugin] = []  # of this process
        self._recorded: set[QuarantinedPlugin] = set()

    @classmethod
    def from_config(cls, config: EngineConfig) -> ExporterGroup:
        """Those that the configuration names."""
        labels = {"model_name": config.model.served_names[0]}
        exporters = []
        for choice in config.plugins_of("metrics"):
            exporter = load_target(choice.target, MetricsExporter)
            exporters.append((choice.name, construct_chosen(choice, exporter, labels)))
        return cls(exporters)

    @property
    def active(self) -> list[MetricsExporter]:
        """The exporters that are not quarantined."""
        return [thread.exporter for thread in self._threads if thread.is_active]

    @property
    def num_quarantined(self) -> int:
        """Plugins of this process that are quarantined: exporters, parsers of answers, and routes."""
        return len(self._quarantined)

    def list_thread_ids(self) -> list[int]:
        """Of the threads in which exporters run."""
        return [thread.thread_id for thread in self._threads if thread.thread_id is not None]

    def record_engine(self, stats: Mapping[str, float], quarantined: Sequence[QuarantinedPlugin] = ()) -> None:
        """See ``MetricsExporter``. ``quarantined`` are all plugins of the engine core that are: new ones are told."""
        for thread in self._threads:
            thread.report(thread.exporter.record_engine, stats)
        for plugin in [*quarantined, *self._quarantined]:
            if plugin not in self._recorded:
                self._recorded.add(plugin)
                for thread in self._threads:
                    thread.report(thread.exporter.record_quarantine, plugin)

    def record_adapters(self, adapters: Sequence[AdapterActivity], max_loras: int) -> None:
        """See ``MetricsExporter``."""
        for thread in self._threads:
            thread.report(thread.exporter.record_adapters, adapters, max_loras)

    def record_request(self, stats: RequestStats) -> None:
        """See ``MetricsExporter``."""
        for thread in self._threads:
            thread.report(thread.exporter.record_request, stats)

    def record_tokens(self, num_prompt: int, num_generated: int, ttft_s: float | None, itl_s: list[float]) -> None:
        """See ``MetricsExporter``."""
        for thread in self._threads:
            thread.report(thread.exporter.record_tokens, num_prompt, num_generated, ttft_s, itl_s)

    def record_steps(self, outputs: EngineCoreOutputs) -> None:
        """The steps that were finished, and those that failed; see ``MetricsExporter``."""
        for thread in self._threads:
            for stats in outputs.steps:
                thread.report(thread.exporter.record_step, stats)
            for failure in outputs.step_failures:
                thread.report(thread.exporter.record_step_failure, failure)

    async def render(self) -> list[RenderedMetrics]:
        """The documents of those that have one, in order. One that takes seconds is left out, which the log says."""
        asked = {thread.name: asyncio.wrap_future(thread.render()) for thread in self._threads}
        if asked:
            await asyncio.wait(asked.values(), timeout=_MAX_WAIT_S)
        documents = []
        for name, future in asked.items():
            if not future.done():
                _log.warning("metrics/%s has no document after %.0f s: it is left out", name, _MAX_WAIT_S)
            elif (rendered := future.result()) is not None:
                documents.append(RenderedMetrics(name, *rendered))
        return documents

    def close(self) -> None:
        """Close every exporter, and wait a few seconds for them. Idempotent."""
        for thread in self._threads:
            thread.close()
        deadline = time.monotonic() + _MAX_WAIT_S
        for thread in self._threads:
            if not thread.join(max(0.0, deadline - time.monotonic())):
                _log.warning("metrics/%s has not closed after %.0f s: it is left behind", thread.name, _MAX_WAIT_S)

    def add_quarantined(self, plugin: QuarantinedPlugin) -> None:
        """A plugin of this process was quarantined: the exporters are told with the next figures."""
        self._quarantined.append(plugin)

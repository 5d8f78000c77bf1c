"""Metrics exporters run in threads of their own: one that fails, hangs or falls behind harms none of the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pytest

from quire import LLM
from quire.core.config import PluginChoice
from quire.core.contracts.metrics import MetricsExporter
from quire.core.engine import exporter_thread
from quire.core.engine.exporter_group import ExporterGroup
from quire.core.engine.watchdog import PluginWatchdog
from quire.core.errors import PluginError
from quire.core.messages import EngineCoreOutputs
from quire.core.stats import QuarantinedPlugin, StepFailure


class Exporter(MetricsExporter):
    """Remembers what it is told, and does something with the figures of an engine."""

    def __init__(self, on_engine: Callable[[], object] = lambda: None) -> None:
        super().__init__({})
        self.on_engine = on_engine
        self.num_records = self.num_tokens = self.num_failures = 0
        self.quarantined: list[QuarantinedPlugin] = []
        self.closed_in: list[str] = []

    def record_engine(self, stats: Mapping[str, float]) -> None:
        self.num_records += 1
        self.on_engine()

    def record_request(self, stats: object) -> None: ...

    def record_tokens(self, num_prompt: int, num_generated: int, ttft_s: float | None, itl_s: list[float]) -> None:
        self.num_tokens += num_generated

    def record_step_failure(self, failure: StepFailure) -> None:
        self.num_failures += 1

    def record_quarantine(self, plugin: QuarantinedPlugin) -> None:
        self.quarantined.append(plugin)

    def render(self) -> tuple[str, bytes]:
        return "text/plain", str(self.num_tokens).encode()

    def close(self) -> None:
        self.closed_in.append(threading.current_thread().name)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set at the end, for exporters that wait."""
    event = threading.Event()
    yield event
    event.set()


def render(group: ExporterGroup) -> dict[str, bytes]:
    return {document.name: document.body for document in asyncio.run(group.render())}


def raise_error() -> None:
    raise RuntimeError("full")


def test_each_quarantined_plugin_is_told_once() -> None:
    good, bad = Exporter(), Exporter(raise_error)
    group = ExporterGroup([("good", good), ("bad", bad)])
    processor = QuarantinedPlugin("logits_processor", "mine", "raised")
    for _ in range(3):
        group.record_engine({}, [processor])
        render(group)
    group.close()
    assert group.active == [good] and group.num_quarantined == 1
    assert good.quarantined == [processor, QuarantinedPlugin("metrics", "bad", "raised")]


class CannotBeMade(Exporter):
    def __init__(self, labels: object, options: object = None) -> None:
        raise RuntimeError("no port")


def test_one_that_cannot_be_constructed_is_refused_by_name(llm: LLM) -> None:
    choice = PluginChoice("metrics", "mine", f"{__name__}:CannotBeMade")
    config = replace(llm.config, plugins={"metrics:000": choice})
    with pytest.raises(
        PluginError,
        match=r"metrics/mine cannot be constructed: RuntimeError: no port \(.*test_exporters.py, line \d+, in",
    ):
        ExporterGroup.from_config(config)


def test_nothing_waits_for_an_exporter_that_does(released: threading.Event) -> None:
    quick, slow = Exporter(), Exporter(lambda: released.wait(0.2))
    group = ExporterGroup([("slow", slow), ("quick", quick)])
    begin = time.monotonic()
    for _ in range(5):
        group.record_engine({})
        group.record_tokens(0, 2, None, [])
    assert time.monotonic() - begin < 0.5
    assert render(group) == {"slow": b"10", "quick": b"10"}, "a document has all that was reported before"
    assert time.monotonic() - begin > 0.9 and slow.num_records == 5
    group.close()
    group.close()
    assert slow.closed_in == ["quire-metrics-slow"] and quick.closed_in == ["quire-metrics-quick"]
    assert not any(thread.name.startswith("quire-metrics") for thread in threading.enumerate())


def test_one_that_never_returns_is_interrupted(caplog: pytest.LogCaptureFixture) -> None:
    def spin() -> None:
        while True:
            time.sleep(0.01)

    good, bad = Exporter(), Exporter(spin)
    group = ExporterGroup([("bad", bad), ("good", good)])
    watchdog = PluginWatchdog(0.6, group.list_thread_ids)
    try:
        group.record_engine({})
        group.record_tokens(0, 3, None, [])
        assert render(group) == {"good": b"3"}
    finally:
        watchdog.stop()
        group.close()
    assert group.active == [good] and "metrics/bad is quarantined (hung)" in caplog.text


def test_one_that_no_interrupt_reaches_is_left_behind(
    released: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exporter_thread, "_MAX_CALL_S", 0.2)
    monkeypatch.setattr("quire.core.engine.exporter_group._MAX_WAIT_S", 1.0)
    good, bad = Exporter(), Exporter(released.wait)
    group = ExporterGroup([("bad", bad), ("good", good)])
    group.record_engine({})
    assert render(group) == {"good": b"0"} and "metrics/bad has no document after" in caplog.text
    group.record_tokens(0, 3, None, [])
    assert group.active == [good] and "metrics/bad is quarantined (hung): a call did not return" in caplog.text
    begin = time.monotonic()
    assert render(group) == {"good": b"3"} and time.monotonic() - begin < 0.8, "nothing waits for it any more"
    group.close()
    assert "metrics/bad has not closed after" in caplog.text and good.closed_in and not bad.closed_in


def test_one_that_falls_behind_is_dropped(released: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter_thread, "MAX_WAITING", 100)
    good, bad = Exporter(), Exporter(released.wait)
    group = ExporterGroup([("bad", bad), ("good", good)])
    group.record_engine({})
    for number in range(1, 21):
        for _ in range(10):
            group.record_steps(EngineCoreOutputs([], step_failures=[StepFailure("model", "mine")]))
        while good.num_failures < 10 * number:
            time.sleep(0.001)
    group.record_engine({})
    released.set()
    group.close()
    assert group.active == [good] and good.num_failures == 200 and bad.num_failures == 0
    assert good.quarantined == [QuarantinedPlugin("metrics", "bad", "too_slow")]

"""Checks of metrics exporters: each takes what the engine reports, in time, and shares no state."""

from __future__ import annotations

import time
import unittest

from quire.core.contracts.metrics import MetricsExporter
from quire.core.plugin.options import parse_options
from quire.core.stats import ENGINE_STATS, QuarantinedPlugin, RequestStats, StepFailure

__all__ = [
    "check_keeps_up",
    "check_renders_a_document_or_nothing",
    "check_takes_every_figure",
    "check_takes_figures_it_does_not_know",
    "check_two_can_live_in_one_process",
]


def check_takes_every_figure(cls: type[MetricsExporter]) -> None:
    """Engine, request and token figures are accepted, with and without the optional ones."""
    exporter = _make_exporter(cls)
    try:
        _record_everything(exporter)
        _record_everything(exporter)
    finally:
        exporter.close()


def check_takes_figures_it_does_not_know(cls: type[MetricsExporter]) -> None:
    """A later minor version reports more; an exporter must not fail on a new name."""
    exporter = _make_exporter(cls)
    try:
        exporter.record_engine({"a_figure_of_tomorrow": 1.0, "another_total": 2.0})
    finally:
        exporter.close()


def check_renders_a_document_or_nothing(cls: type[MetricsExporter]) -> None:
    """``render`` gives (content type, bytes) before and after figures arrive, or None always."""
    exporter = _make_exporter(cls)
    try:
        before = exporter.render()
        _record_everything(exporter)
        after = exporter.render()
    finally:
        exporter.close()
    if before is None and after is None:
        raise unittest.SkipTest("pushes, has nothing to render")
    for page in (before, after):
        assert page is not None, "renders only sometimes"
        assert isinstance(page[0], str) and isinstance(page[1], bytes), f"render returned {type(page[1]).__name__}"


def check_two_can_live_in_one_process(cls: type[MetricsExporter]) -> None:
    """Two engines in one process have an exporter each, and neither counts the other's figures."""
    first, second = _make_exporter(cls), _make_exporter(cls)
    try:
        untouched = second.render()
        _record_everything(first)
        assert second.render() == untouched, "figures of one exporter show up in another"
    finally:
        first.close()
        second.close()


def check_keeps_up(cls: type[MetricsExporter]) -> None:
    """A thousand reports take less than a second: a busy server makes as many, and one that falls behind is
    quarantined."""
    exporter = _make_exporter(cls)
    try:
        start = time.perf_counter()
        for _ in range(1000):
            exporter.record_tokens(0, 1, None, [0.01])
        took = time.perf_counter() - start
    finally:
        exporter.close()
    assert took < 1.0, f"a thousand reports took {took:.1f} s"


def _make_exporter(cls: type[MetricsExporter]) -> MetricsExporter:
    return cls({"model_name": "quire-tiny"}, parse_options(cls, {}))


def _record_everything(exporter: MetricsExporter) -> None:
    exporter.record_engine(dict.fromkeys(ENGINE_STATS, 1.0))
    exporter.record_step_failure(StepFailure("attention", "some_backend"))
    exporter.record_quarantine(QuarantinedPlugin("policy", "some_policy", "raised"))
    exporter.record_tokens(12, 1, 0.05, [])
    exporter.record_tokens(0, 2, None, [0.01, 0.02])
    exporter.record_request(RequestStats("stop", 12, 4, 3, 0.2, 0.01, 0.05, 0.015))
    exporter.record_request(RequestStats("abort", 12, 0, 0, 0.2, 0.01, None, None))

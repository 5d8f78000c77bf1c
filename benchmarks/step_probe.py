"""Where the time of an engine's steps goes, on its host and on its GPU: for benchmarks that run ``LLM`` in one process.

The engine reports much of it with every step (``StepStats``). What is measured here beside that: the parts of a step's
masks, how each row's mask was found, what is done with outputs, pauses of the garbage collector, and on a GPU how long
it had nothing to do, by events around a step's model and its sampling.
"""

from __future__ import annotations

import collections
import functools
import gc
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from quire import LLM
from quire.core.stats import StepStats
from quire.core.structured_output.mask_filler import MaskFiller
from quire.plugins.structured_output.grammar_state import GuidanceState

__all__ = ["StepProbe"]

_COLUMNS = ("gap", "schedule", "launch", "held", "masks", "fill", "upload", "wait", "update", "outputs", "gc")
_SHOWN_STEPS = 6


class StepProbe:
    """Installed into an engine, for its whole life. ``begin`` and ``end`` enclose what one table shows."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._calls: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)  # begin and end, seconds
        self._rows: collections.Counter[str] = collections.Counter()
        self._events: list[dict[str, torch.cuda.Event]] = []
        self._threads: set[str] = set()
        self._gc_start = 0.0
        gc.callbacks.append(self._note_collection)
        core: Any = llm.engine_core
        self._wrap(llm.output_processor, "process_outputs", "outputs")
        self._wrap(core._structured_outputs, "make_masks", "masks")
        self._wrap(MaskFiller, "fill_masks", "fill")
        backend = core._structured_outputs._compiler.get_backend()
        self._wrap(backend, "fill_masks", "backend", self._note_rows)
        self._wrap(GuidanceState, "learn_mask", "", lambda *_: self._rows.update(library=1))
        runner = core.executor.worker.model_runner
        self._wrap(type(runner.sampling_runner.token_masks), "_upload", "upload")
        if runner.table.device.type == "cuda":
            self._wrap(runner, "execute_model", "", lambda *_: self._begin_step())
            self._wrap(runner, "sample_tokens", "", behind=lambda: self._record("end"))
            if runner.decode_graphs is not None:
                self._wrap(runner.decode_graphs, "run_model", "", behind=lambda: self._record("model"))
            token_masks = runner.sampling_runner.token_masks
            self._wrap(token_masks, "upload_captured", "", behind=lambda: self._record("masks"))

    def begin(self) -> None:
        """What was measured so far is dropped."""
        self._calls.clear()
        self._rows.clear()
        self._events.clear()
        self._llm.steps.clear()

    def summarize(self, num_requests: int) -> dict[str, float]:
        """Of the steps since ``begin`` in which all ``num_requests`` decode: medians and 99th percentiles, ms."""
        table = self._make_table(num_requests)
        summary: dict[str, float] = {}
        for name, values in table.items():
            if len(values):
                summary[f"{name} p50"], summary[f"{name} p99"] = np.percentile(values, [50, 99])
        return summary

    def report(self, title: str, num_requests: int) -> None:
        """Print one table: of the steps in which all requests decode, and of the longest of all steps of decodes."""
        table = self._make_table(num_requests)
        print(f"{title}: {len(table['gap'])} steps in which {num_requests} decode; ms")
        print("    " + " ".join(f"{name:>10}" for name in ("", *table)))
        for label, percent in (("p50", 50), ("p90", 90), ("p99", 99), ("most", 100)):
            figures = [np.percentile(values, percent) if len(values) else np.nan for values in table.values()]
            print("    " + " ".join([f"{label:>10}", *(f"{figure:10.3f}" for figure in figures)]))
        total = sum(self._rows.values()) - self._rows["library"]
        if total:
            shares = ", ".join(f"{name} {count} ({count / total:.1%})" for name, count in self._rows.items())
            print(f"    of {total} rows: {shares}; masks made in {', '.join(sorted(self._threads))}")
        num_gc = len(self._calls["gc"])
        print(f"    {num_gc} collections, {1e3 * sum(end - start for start, end in self._calls['gc']):.1f} ms in all")
        steps = self._select(None)
        for step in sorted(steps, key=lambda step: -step["gap"])[:_SHOWN_STEPS]:
            print("    long step: " + ", ".join(f"{name} {value:.2f}" for name, value in step.items()))

    def _make_table(self, num_requests: int) -> dict[str, list[float]]:
        steps = self._select(num_requests)
        table = {name: [step[name] for step in steps] for name in _COLUMNS}
        return table | self._measure_idle(num_requests)

    def _select(self, num_requests: int | None) -> list[dict[str, float]]:
        """One mapping a step of decodes alone; None: with any number of requests."""
        steps: list[StepStats] = list(self._llm.steps)
        selected = []
        for before, step in itertools.pairwise(steps):
            if step.num_decodes != step.num_reqs or num_requests not in (None, step.num_reqs):
                continue
            start, end = before.end_us / 1e6, step.end_us / 1e6
            figures = {"step": float(step.step), "reqs": float(step.num_reqs), "gap": 1e3 * (end - start)}
            for name in ("schedule", "launch", "held", "masks", "wait", "update"):
                figures[name] = getattr(step, f"{name}_us") / 1e3
            for name in ("fill", "upload", "outputs", "gc"):
                figures[name] = 1e3 * sum(b - a for a, b in self._calls[name] if start <= a < end)
            selected.append(figures)
        return selected

    def _measure_idle(self, num_requests: int) -> dict[str, list[float]]:
        """Between a step's end and the next one's begin, and between a step's model and its sampling."""
        if not self._events:
            return {}
        torch.cuda.synchronize()
        sizes = [step.num_reqs if step.num_decodes == step.num_reqs else 0 for step in self._llm.steps]
        idle: dict[str, list[float]] = {"model": [], "sampling": [], "idle before": [], "idle for masks": []}
        for i in range(1, min(len(self._events), len(sizes))):
            before, events = self._events[i - 1], self._events[i]
            if sizes[i] != num_requests or "model" not in events or "end" not in before or "end" not in events:
                continue
            sampling = events.get("masks", events["model"])
            idle["model"].append(events["begin"].elapsed_time(events["model"]))
            idle["sampling"].append(sampling.elapsed_time(events["end"]))
            idle["idle before"].append(before["end"].elapsed_time(events["begin"]))
            idle["idle for masks"].append(events["model"].elapsed_time(sampling))
        return idle

    def _begin_step(self) -> None:
        self._events.append({})
        self._record("begin")

    def _record(self, name: str) -> None:
        if self._events:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events[-1][name] = event

    def _note_collection(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._gc_start = time.perf_counter()
        else:
            self._calls["gc"].append((self._gc_start, time.perf_counter()))

    def _note_rows(self, requests: Any, *_: Any) -> None:
        self._threads.add(threading.current_thread().name)
        num_forced = sum(bool(request.state.forced) for request in requests)
        self._rows.update(forced=num_forced, others=len(requests) - num_forced)

    def _wrap(
        self,
        owner: Any,
        name: str,
        label: str,
        before: Callable[..., None] | None = None,
        behind: Callable[[], None] | None = None,
    ) -> None:
        method, calls = getattr(owner, name), self._calls

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args)
            start = time.perf_counter()
            result = method(*args, **kwargs)
            if label:
                calls[label].append((start, time.perf_counter()))
            if behind is not None:
                behind()
            return result

        setattr(owner, name, call)

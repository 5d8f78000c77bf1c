"""Steps of the engine in the Chrome trace event format, which Perfetto reads.

Format: "Trace Event Format", Google, 2016; complete events ("ph": "X") with times in microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quire.core.stats import StepStats

__all__ = ["make_chrome_trace"]

_TRACKS = {"schedule": 1, "launch": 2, "device": 3, "wait": 4, "update": 5, "masks": 6}


def make_chrome_trace(steps: Iterable[StepStats]) -> dict[str, Any]:
    """A JSON object to open in ui.perfetto.dev or chrome://tracing: one track a phase, one slice a step.

    A device runs its steps one after the other: one has ended when the next begins, even if the host, busy with a
    launch, saw it later.
    """
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": track, "args": {"name": name}}
        for name, track in _TRACKS.items()
    ]
    device_start = float("inf")
    for step in reversed(list(steps)):
        device_end = min(step.end_us, device_start)
        device_start = device_end - step.device_us
        shape = {"requests": step.num_reqs, "decodes": step.num_decodes, "tokens": step.num_tokens}
        if step.num_drafts:
            shape |= {"drafts": step.num_drafts, "accepted": step.num_accepted}
        launch_start = step.start_us + step.schedule_us
        launch_end = launch_start + step.launch_us + step.held_us
        phases = [
            ("schedule", step.start_us, step.schedule_us),
            ("launch", launch_start, launch_end - launch_start),
            ("device", device_start, step.device_us),
            ("wait", step.end_us - step.wait_us, step.wait_us),
            ("update", step.end_us, step.update_us),
        ]
        if step.masks_us:  # they are ready shortly before the rest of the step is launched
            phases.append(("masks", launch_end - step.masks_us, step.masks_us))
        for phase, start, length in phases:
            events.append(
                {
                    "name": f"step {step.step}",
                    "cat": phase,
                    "ph": "X",
                    "pid": 0,
                    "tid": _TRACKS[phase],
                    "ts": start,
                    "dur": length,
                    "args": shape,
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}

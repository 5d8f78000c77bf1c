"""One A/B test from its arms to what was observed, whatever its design."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.server.ab.observations import ArmTimes

__all__ = ["Arm", "Experiment"]


@dataclass(frozen=True, slots=True)
class Arm:
    """What is tested in one arm, and the engine that it ran in."""

    letter: str
    name: str
    """The policy with its options."""
    engine: dict[str, Any]
    """All that may make it faster than the other, but for what is tested."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """What was done and observed."""

    design: str
    arms: tuple[Arm, Arm]
    measured: Sequence[ArmTimes]
    stretch_s: float
    """Seconds of a stretch, with what is washed out."""
    washout_s: float
    trace: str
    warnings: Sequence[str]
    queue_depth: Sequence[tuple[float, int, int]] = ()
    """Seconds, requests that wait, arm; for a plot."""
    notes: Sequence[str] = field(default=())
    planned_pairs: int | None = None
    """Pairs of stretches that were to be measured, where it could have been interrupted."""
    interruption: KeyboardInterrupt | None = None
    """What ended it before that, to be raised again after the report; None: it ran to its end."""

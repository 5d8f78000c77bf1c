"""What is measured of a kind of plugin: its cases, and a case made ready to run on one implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quire.server.plugin_bench.timer import L2_BYTES

__all__ = ["BenchCase", "CaseRefusedError", "KindBench", "PreparedCase", "count_copies"]

_MAX_COPIES = 64


class CaseRefusedError(Exception):
    """An implementation cannot run the case; the message says why, for the table."""


@dataclass(frozen=True, slots=True)
class BenchCase:
    """One line of the table, for each implementation."""

    name: str
    parameters: Any
    """What the benchmark of the kind makes of it."""
    weight: float = 1.0
    """How often it came in captured traffic."""


@dataclass(slots=True)
class PreparedCase:
    """A case on one implementation."""

    timer: Callable[[], float]
    """Runs it and returns the seconds of one launch, or of one step on the host."""
    error: float | None = None
    """The largest error beside the oracle, relative to one plus the value; None: not compared."""
    num_bytes: int = 0
    """That have to be moved, at least."""
    num_flops: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    """Others of the kind, such as the acceptance of drafts."""
    note: str = ""


class KindBench(ABC):
    """The benchmark of one kind of plugin, on one device. ``target`` is the class of an implementation."""

    device: torch.device

    @abstractmethod
    def list_cases(self, target: Any) -> Sequence[BenchCase]:
        """What is measured, if nothing was captured."""

    @abstractmethod
    def prepare(self, target: Any, case: BenchCase) -> PreparedCase:
        """Make ``case`` ready on ``target``. Raises ``CaseRefusedError``."""


def count_copies(num_bytes: int, device: torch.device) -> int:
    """How many sets of arguments of so many bytes one timed run goes through, so that none is in the L2 cache."""
    return max(1, min(_MAX_COPIES, -(-L2_BYTES // max(1, num_bytes)))) if device.type == "cuda" else 2

"""Measures every case on every implementation, in turns, and keeps what a table needs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from quire.core.errors import QuireError
from quire.server.bench.roofline import Ceilings
from quire.server.plugin_bench.cases import BenchCase, CaseRefusedError, KindBench, PreparedCase
from quire.server.plugin_bench.timer import TURN_S, WARM_UP_S, Ratio, compare_rounds, run_alternately

__all__ = ["Measurement", "measure_case"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One case on one implementation."""

    case: str
    implementation: str
    microseconds: float | None = None
    error: float | None = None
    bandwidth_share: float | None = None
    """Of the bandwidth of the device's memory, by the bytes that have to be moved."""
    bound_share: float | None = None
    """Of the roofline bound: of the larger of the time for bytes and the time for operations."""
    ratio: Ratio | None = None
    """The subject's time over this one's; None for the subject itself."""
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""
    refused: str = ""
    """Why it was not run."""
    weight: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def measure_case(
    bench: KindBench,
    case: BenchCase,
    implementations: Mapping[str, type],
    *,
    num_rounds: int,
    ceilings: Ceilings | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Measurement]:
    """One measurement an implementation, the first of which is the subject: its time is compared with each other's."""
    prepared: dict[str, PreparedCase] = {}
    refused: dict[str, str] = {}
    for name, target in implementations.items():
        progress(f"{case.name}: {name}")
        try:
            prepared[name] = bench.prepare(target, case)
        except CaseRefusedError as error:
            refused[name] = str(error)
        except QuireError as error:
            refused[name] = str(error).splitlines()[0]
        except Exception as error:  # of a plugin: the others are measured all the same
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    on_gpu = getattr(bench, "device", None) is not None and bench.device.type == "cuda"
    timers = {name: each.timer for name, each in prepared.items()}
    seconds = run_alternately(timers, num_rounds, *((WARM_UP_S, TURN_S) if on_gpu else ()))
    subject = next(iter(implementations))
    return [
        Measurement(case.name, name, refused=refused[name], weight=case.weight)
        if name in refused
        else _summarize(case, name, prepared[name], seconds[name], seconds.get(subject), subject, ceilings)
        for name in implementations
    ]


def _summarize(
    case: BenchCase,
    name: str,
    prepared: PreparedCase,
    seconds: Sequence[float],
    subject_seconds: Sequence[float] | None,
    subject: str,
    ceilings: Ceilings | None,
) -> Measurement:
    median = statistics.median(seconds)
    bandwidth_share, bound_share = None, None
    if ceilings is not None and prepared.num_bytes:
        for_bytes = prepared.num_bytes / ceilings.bytes_s
        bandwidth_share = for_bytes / median
        bound_share = max(for_bytes, prepared.num_flops / ceilings.flops_s) / median
    ratio = None
    if name != subject and subject_seconds is not None and min(seconds) > 0:
        ratio = compare_rounds(subject_seconds, seconds)
    return Measurement(
        case.name, name, 1e6 * median, prepared.error, bandwidth_share, bound_share, ratio, prepared.figures,
        prepared.note, weight=case.weight,
    )  # fmt: skip

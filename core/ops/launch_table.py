"""Launch tables: which kernel, with which constants, a layer takes for how many tokens, as measured on a card.

A table is a JSON file beside the kernels, written by a script in ``benchmarks/kernels``::

    {"device": ..., "versions": ..., "layers": {"<features>x<inputs>": {"<most tokens>": ENTRY, ...}}}

ENTRY is one launch, or a list of them with the fastest first. A launch is ``{"kernel": ..., "separate_norm": ...,
<constants>}``, with times in ``us`` and ``unfused_us``; null is the library's GEMM. A step takes the entry of the
fewest tokens that are not less than its own (M is rounded up to the nearest that was measured). Layers that no table
names, and cards without a table, take the launches of the format's rule.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from quire.core.ops.device_profile import DeviceProfile

__all__ = ["Launch", "LaunchStep", "Launches", "find_launches", "fit_stages", "get_launch_steps"]

_NOT_CONSTANTS = ("kernel", "separate_norm", "us", "unfused_us")


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and its constants."""

    kernel: str
    """A key of the format's launchers: ``gemv``, ``gemm_small_m`` ..."""
    options: Mapping[str, int]
    """Arguments of the launcher by name."""
    separate_norm: bool = False
    """An RMS norm before the layer runs as a separate kernel, since that is faster."""


Launches: TypeAlias = tuple[Launch | None, ...]
"""What multiplies so many tokens, the fastest first; None is the library's GEMM."""


class LaunchStep(NamedTuple):
    """Launches for up to ``max_tokens`` tokens, and for more than the step before."""

    max_tokens: int
    launches: Launches


def get_launch_steps(
    folder: Path,
    kind: str,
    profile: DeviceProfile,
    shape: tuple[int, int],
    *,
    rule: Callable[[int], Sequence[Launch | None]],
    rule_tokens: Sequence[int],
) -> tuple[LaunchStep, ...]:
    """The steps of a layer of ``shape`` (features, inputs), ascending; beyond the last there is the library.

    From the table ``<kind>_<card>.json`` in ``folder``, or, where there is none for the card of ``profile`` or none
    for the shape, ``rule(most tokens)`` for each of ``rule_tokens``.
    """
    if profile.launch_table is not None:
        layers = _read_table(folder / f"{kind}_{profile.launch_table}.json")
        measured = layers.get(f"{shape[0]}x{shape[1]}")
        if measured is not None:
            return measured
    return tuple(LaunchStep(tokens, tuple(rule(tokens))) for tokens in rule_tokens)


def find_launches(steps: Sequence[LaunchStep], num_tokens: int) -> Launches:
    """The launches for ``num_tokens``; empty beyond the last step."""
    for max_tokens, launches in steps:
        if num_tokens <= max_tokens:
            return launches
    return ()


def fit_stages(profile: DeviceProfile, num_stages: int, stage_bytes: int, other_bytes: int = 0) -> int:
    """``num_stages``, or as many as fit into a program's shared memory beside ``other_bytes``; 1 at least.

    A pipeline of n stages with asynchronous copies (``cp.async``) holds n - 1 tiles of ``stage_bytes``: the one that is
    multiplied is in registers.
    """
    return max(1, min(num_stages, 1 + (profile.shared_memory - other_bytes) // stage_bytes))


@cache
def _read_table(path: Path) -> Mapping[str, tuple[LaunchStep, ...]]:
    """The steps of each layer ``<features>x<inputs>``; none where there is no such file."""
    if not path.exists():
        return {}
    layers = json.loads(path.read_text())["layers"]
    return {
        shape: tuple(LaunchStep(int(most), _parse_entry(entry)) for most, entry in entries.items())
        for shape, entries in layers.items()
    }


def _parse_entry(entry: Any) -> Launches:
    entries = entry if isinstance(entry, list) else [entry]
    return tuple(None if each is None else _parse_launch(each) for each in entries)


def _parse_launch(entry: Mapping[str, Any]) -> Launch:
    options = {name: value for name, value in entry.items() if name not in _NOT_CONSTANTS}
    return Launch(entry["kernel"], options, bool(entry.get("separate_norm", False)))

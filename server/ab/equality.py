"""Whether two arms may be compared: they must differ in what is tested, and in nothing else.

The trap that this looks for: a policy that was reported 7.4 % better was 0.2 % better after six rounds of making the
arms equal, since one of them had run without asynchronous scheduling (vLLM RFC 42185).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quire.core.errors import ConfigError
from quire.server.simulate.simulation import EngineSetup

__all__ = ["Difference", "check_arms", "describe_setup", "find_differences"]

Difference = tuple[str, Any, Any]
"""What differs, and its values in A and in B."""

_SYNCHRONOUS = "one arm waits for each step before it schedules the next, which alone is worth several percent"
_WHY = {
    "max_in_flight_steps": _SYNCHRONOUS,
    "asynchronous": _SYNCHRONOUS,
    "max_num_batched_tokens": "the token budget decides how long a step delays its decodes",
    "max_num_seqs": "the batch decides queueing",
    "num_blocks": "the KV cache decides queueing and preemption",
    "prefix_caching": "one arm computes what the other finds cached",
    "cached_tokens": "one arm begins with a warm prefix cache",
}


def describe_setup(setup: EngineSetup) -> dict[str, Any]:
    """All that may make one simulated engine faster than another, but for its policy."""
    import msgspec

    return {
        **msgspec.structs.asdict(setup.limits),
        "step_model": setup.model.name,
        "device": setup.model.device,
        "model": setup.model.model,
        "prefix_caching": setup.prefix_caching,
        "allocator": setup.allocator_class.__qualname__,
        "cached_tokens": 0,
    }


def find_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Keys whose values differ, or that one of them does not have."""
    return [(key, a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def check_arms(differences: Sequence[Difference], *, allow_unequal: bool) -> list[str]:
    """Warnings for a report. Raises ``ConfigError`` where there are any, unless they are allowed."""
    warnings = []
    for key, a, b in differences:
        why = _WHY.get(key)
        warnings.append(f"the arms differ in {key}: {a} in A, {b} in B" + (f"; {why}" if why else ""))
    if warnings and not allow_unequal:
        raise ConfigError(
            f"{warnings[0]}{f', and in {len(warnings) - 1} more' if len(warnings) > 1 else ''}. Make them equal, or "
            "report it as a comparison of two engines with --allow-unequal"
        )
    return warnings

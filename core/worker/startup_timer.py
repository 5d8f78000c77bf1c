"""How long the phases of a start take. Imports nothing heavy."""

from __future__ import annotations

import time

__all__ = ["StartupTimer"]


class StartupTimer:
    """Seconds by phase of a start, from construction on."""

    def __init__(self) -> None:
        self.phase_seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def end_phase(self, phase: str) -> None:
        """What was done since the last call belongs to ``phase``."""
        now = time.monotonic()
        self.phase_seconds[phase] = self.phase_seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.phase_seconds.items())

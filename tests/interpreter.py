"""Kernels in Triton's interpreter are not traced line by line for coverage, whose report leaves out their lines."""

from __future__ import annotations

import sys
from typing import Any


def leave_kernels_untraced() -> None:
    """Pause the function that traces lines, if there is one, in each launch of a kernel in this process."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or sys.gettrace() is None:
        return
    launch = interpreter.GridExecutor.__call__

    def launch_untraced(self: Any, *arguments: Any, **named: Any) -> None:
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            launch(self, *arguments, **named)
        finally:
            sys.settrace(tracer)
            _call()

    interpreter.GridExecutor.__call__ = launch_untraced


def _call() -> None:
    """The first call that is traced again: with it coverage takes its place before a frame that it knows returns."""

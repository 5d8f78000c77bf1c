"""When Triton compiles: ahead of traffic and in parallel; afterwards every compilation is counted."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

__all__ = ["CompileCounter", "compile_ahead"]

_log = logging.getLogger("quire.worker")


@contextmanager
def compile_ahead() -> Iterator[None]:
    """Inside, Triton kernels are compiled instead of launched, many at a time; everything is compiled on leaving.

    What runs inside sees outputs that were never written: rehearse with it, and throw the results away.
    """
    import triton
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def rehearse(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = rehearse
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
            yield
    finally:
        JITFunction.run = launch


class CompileCounter:
    """Counts the kernels that Triton compiles, or loads from its cache, from construction on: each is a stall."""

    def __init__(self) -> None:
        import triton

        self.count = 0
        self._before = triton.knobs.runtime.jit_post_compile_hook
        triton.knobs.runtime.jit_post_compile_hook = self._hook

    def take(self) -> int:
        """How many since the last call."""
        count, self.count = self.count, 0
        return count

    def _hook(self, **info: Any) -> Any:
        self.count += 1
        _log.warning("the kernel %s was compiled under traffic", getattr(info.get("fn"), "name", "?"))
        return self._before(**info) if self._before is not None else None

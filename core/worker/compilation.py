"""When Triton compiles: ahead of traffic and in parallel; afterwards every compilation is counted."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from quire.core.env import count_cpus

__all__ = ["CompileCounter", "CompileQueue", "precompile_kernels"]

_log = logging.getLogger("quire.worker")
_MAX_COMPILE_S = 600.0


def precompile_kernels(run_warmup: Callable[[], None], rank: int = 0, num_ranks: int = 1) -> None:
    """Run ``run_warmup`` with Triton kernels compiled and loaded instead of launched, many at a time; all are when this
    returns. Triton 3.6 compiles a launcher for each, too, which takes half a second. Of kernels that tune themselves
    (``triton.autotune``) every variant is compiled, and none chosen. Of ``num_ranks`` that do so at the same time each
    begins with its share, and finds what the others have compiled meanwhile in Triton's cache.

    ``run_warmup`` sees outputs that were never written, so it must not index with them. If it fails, a warning says so
    and kernels are compiled as they come: slower, and still right.
    """
    import triton
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    class CompileAhead(triton.AsyncCompileMode):
        def submit(self, key: Any, compile_fn: Any, finalize_fn: Any) -> Any:
            def compile_and_load() -> Any:
                kernel = compile_fn()
                return kernel.run and kernel  # reading ``run`` loads the kernel onto the device

            is_known = key in self.future_kernels
            queue.defers = zlib.crc32(str(key).encode()) % num_ranks != rank
            kernel = super().submit(key, compile_and_load, finalize_fn)
            if not is_known:
                finalize_fn(kernel)  # later launches find it at once, as they do by themselves from Triton 3.7 on
            return kernel

    # Patched for the time of the warm-up, since Triton has no switch for it: launches become compilations.
    launch, autotune = JITFunction.run, Autotuner.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    def compile_all(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            if config.pre_hook is not None:
                config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    JITFunction.run, Autotuner.run = compile_only, compile_all
    try:
        with ThreadPoolExecutor(count_cpus(), initializer=_use_device_of_caller()) as pool:
            queue = CompileQueue(pool)
            with CompileAhead(SimpleNamespace(submit=queue.add_call)):
                try:
                    run_warmup()
                finally:
                    queue.start_deferred()
    except Exception as error:
        _log.warning("kernels could not be compiled ahead (%s): they are compiled when first used", error)
    finally:
        JITFunction.run, Autotuner.run = launch, autotune


class CompileQueue:
    """Hands on to ``pool`` what it is given; while ``defers`` is set not before ``start_deferred``, or before a thread
    waits for it."""

    def __init__(self, pool: Executor) -> None:
        self.defers = False
        self._pool = pool
        self._deferred: list[_DeferredCall] = []

    def add_call(self, call: Callable[[], Any]) -> Future[Any]:
        """What an executor's ``submit`` does."""
        if not self.defers:
            return self._pool.submit(call)
        deferred = _DeferredCall(self._pool, call)
        self._deferred.append(deferred)
        return deferred

    def start_deferred(self) -> None:
        """Hand on what was held back."""
        for deferred in self._deferred:
            deferred.start()
        self._deferred.clear()


class _DeferredCall(Future[Any]):
    def __init__(self, pool: Executor, call: Callable[[], Any]) -> None:
        super().__init__()
        self._pool, self._call = pool, call
        self._is_started = False

    def start(self) -> None:
        if not self._is_started:
            self._is_started = True
            self._pool.submit(self._run)

    def result(self, timeout: float | None = None) -> Any:
        self.start()
        return super().result(timeout)

    def _run(self) -> None:
        try:
            self.set_result(self._call())
        except BaseException as error:
            self.set_exception(error)


def _use_device_of_caller() -> Callable[[], None]:
    """What a thread calls first, so that kernels are loaded onto the GPU on which they will be launched: threads begin
    with the first one, and a rank has one of its own."""
    if not torch.cuda.is_initialized():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


class CompileCounter:
    """Counts the kernels that Triton compiles, or loads from its cache, until it is closed: each is a stall."""

    def __init__(self) -> None:
        import triton

        self.count = 0
        self._is_closed = False
        self._began_at: float | None = None  # the compilation that has not ended
        runtime = triton.knobs.runtime
        self._previous_begin_hook, self._previous_end_hook = runtime.jit_cache_hook, runtime.jit_post_compile_hook
        runtime.jit_cache_hook, runtime.jit_post_compile_hook = self._begin_hook, self._end_hook

    @property
    def is_compiling(self) -> bool:
        """Whether a compilation has begun and not ended. One that takes many minutes has failed."""
        began_at = self._began_at
        return began_at is not None and time.monotonic() - began_at < _MAX_COMPILE_S

    def take_count(self) -> int:
        """How many since the last call."""
        count, self.count = self.count, 0
        return count

    def close(self) -> None:
        """Count no more: whoever starts another engine compiles outside of this one's traffic."""
        import triton

        self._is_closed = True  # a later counter may go on calling these hooks
        runtime = triton.knobs.runtime
        if runtime.jit_post_compile_hook == self._end_hook:
            runtime.jit_cache_hook, runtime.jit_post_compile_hook = self._previous_begin_hook, self._previous_end_hook

    def _begin_hook(self, **info: Any) -> Any:
        self._began_at = None if self._is_closed else time.monotonic()
        # What is true here keeps Triton from compiling.
        return self._previous_begin_hook(**info) if self._previous_begin_hook is not None else None

    def _end_hook(self, **info: Any) -> Any:
        if not self._is_closed:
            self.count += 1
            self._began_at = None
            _log.warning("the kernel %s was compiled under traffic", getattr(info.get("fn"), "name", "?"))
        return self._previous_end_hook(**info) if self._previous_end_hook is not None else None

"""Kernels that are compiled under traffic are counted, and the time that it takes is known while it passes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import triton

from quire.core.worker.compilation import CompileCounter, CompileQueue


@pytest.fixture
def hooks() -> Iterator[Any]:
    """Triton's, as a package has set them before."""
    runtime = triton.knobs.runtime
    before = runtime.jit_cache_hook, runtime.jit_post_compile_hook
    yield runtime
    runtime.jit_cache_hook, runtime.jit_post_compile_hook = before


def test_a_compilation_is_seen_from_its_begin_to_its_end(hooks: Any) -> None:
    told: list[str] = []
    hooks.jit_cache_hook = lambda **info: told.append("begin")
    hooks.jit_post_compile_hook = lambda **info: told.append("end")
    counter = CompileCounter()
    assert not counter.is_compiling
    assert not hooks.jit_cache_hook(key="k"), "what is true keeps Triton from compiling"
    assert counter.is_compiling and counter.take_count() == 0
    hooks.jit_post_compile_hook(key="k")
    assert not counter.is_compiling and counter.take_count() == 1 and counter.take_count() == 0
    assert told == ["begin", "end"], "hooks of others are called as before"


def test_a_compilation_that_never_ends_is_one_no_more(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("quire.core.worker.compilation.time.monotonic", lambda: now[0])
    counter = CompileCounter()
    hooks.jit_cache_hook(key="k")
    now[0] += 599
    assert counter.is_compiling
    now[0] += 2
    assert not counter.is_compiling


def test_what_another_engine_compiles_after_the_end_is_not_counted(hooks: Any) -> None:
    told: list[str] = []
    hooks.jit_post_compile_hook = lambda **info: told.append("end")
    first = CompileCounter()
    first.close()
    second = CompileCounter()
    hooks.jit_cache_hook(key="k")
    hooks.jit_post_compile_hook(key="k")
    second.close()
    hooks.jit_post_compile_hook(key="k")
    assert (first.take_count(), second.take_count(), told) == (0, 1, ["end", "end"])
    first, second = CompileCounter(), CompileCounter()
    first.close()  # below the second, which goes on calling its hooks
    hooks.jit_post_compile_hook(key="k")
    assert (first.take_count(), second.take_count()) == (0, 1)


def test_the_share_of_others_is_compiled_last() -> None:
    """But for what somebody waits for, and what fails fails where it is waited for."""
    compiled: list[int] = []

    def compile_kernel(number: int) -> int:
        if number == 5:
            raise ValueError("forced")
        compiled.append(number)
        return number

    with ThreadPoolExecutor(1) as pool:
        queue, futures = CompileQueue(pool), []
        for number in range(6):
            queue.defers = number % 2 == 1
            futures.append(queue.add_call(partial(compile_kernel, number)))
        assert futures[3].result(10) == 3
        assert set(compiled) == {0, 2, 4, 3} and not futures[1].done()
        queue.start_deferred()
        with pytest.raises(ValueError, match="forced"):
            futures[5].result(10)
    assert compiled == [0, 2, 4, 3, 1]

"""Kernels are compiled ahead without being run, and those that tune themselves without being judged."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from quire.core.worker.compilation import precompile_kernels


@triton.autotune([triton.Config({"block": 4}), triton.Config({"block": 8})], key=["n"])
@triton.jit
def fill(out_ptr, n, block: tl.constexpr):
    at = tl.arange(0, block)
    tl.store(out_ptr + at, block, mask=at < n)


def test_no_variant_is_chosen_in_the_warm_up() -> None:
    """Where nothing runs, what seems fastest is chance; the choice would stay."""
    before, out = (JITFunction.run, Autotuner.run), torch.zeros(8, dtype=torch.int32)
    precompile_kernels(lambda: fill[(1,)](out, 8))
    assert out.tolist() == [8] * 8, "the interpreter cannot but run them: the last variant came last"
    assert fill.cache == {}
    assert (JITFunction.run, Autotuner.run) == before


def test_a_warm_up_that_fails_is_told_and_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    before = JITFunction.run, Autotuner.run

    def run_warmup() -> None:
        raise ValueError("no such kernel")

    precompile_kernels(run_warmup)
    assert "no such kernel" in caplog.text
    assert (JITFunction.run, Autotuner.run) == before

"""Every Triton kernel of the tree compiles for sm_90 on a machine without a GPU, within a program's means."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
from tests.aot.cases import CASES
from tests.aot.compile import Compiled, compile_launches
from triton.runtime.jit import JITFunction

import quire

pytestmark = pytest.mark.aot

SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on Hopper."""

_compiled: dict[str, list[Compiled]] = {}


@pytest.mark.parametrize("case", CASES)
def test_compiles_and_fits(case: str) -> None:
    kernels = compiled(case)
    assert kernels
    for kernel in kernels:
        assert kernel.shared <= SHARED, f"{kernel.name} wants {kernel.shared} bytes of shared memory"
        assert kernel.local == 0, f"{kernel.name} spills {kernel.local} bytes a thread, at {kernel.registers} registers"


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("bfloat16", "float16"))])
def test_prefill_multiplies_with_wgmma(case: str) -> None:
    """Hopper's own matrix instruction, not the one it inherits."""
    (prefill,) = [kernel for kernel in compiled(case) if kernel.name == "prefill_kernel"]
    assert "wgmma.mma_async" in prefill.ptx and "mma.sync" not in prefill.ptx


def test_decode_multiplies_on_tensor_cores() -> None:
    (decode,) = [kernel for kernel in compiled("bfloat16-128") if kernel.name == "decode_kernel"]
    assert "mma.sync" in decode.ptx and "cp.async" in decode.ptx


@pytest.mark.parametrize("case", ["wide8", "wide8-int8", "wide8-tokens"])
def test_eight_bits_are_multiplied_as_such(case: str) -> None:
    (wide,) = compiled(case)
    assert "wgmma.mma_async" in wide.ptx and (".s8.s8" if "int8" in case else ".e4m3.e4m3") in wide.ptx


def test_no_kernel_is_forgotten() -> None:
    """A kernel is a jitted function whose name ends in ``_kernel``; each is launched by some case."""
    found = set()
    for module_info in pkgutil.walk_packages(quire.__path__, "quire."):
        if "kernel" in module_info.name or "triton" in module_info.name:
            module = importlib.import_module(module_info.name)
            found |= {n for n, v in vars(module).items() if isinstance(v, JITFunction) and n.endswith("_kernel")}
    launched = {kernel.name for case in CASES for kernel in compiled(case)}
    assert found and found <= launched, f"add to tests/aot/cases.py: {', '.join(sorted(found - launched))}"


def compiled(case: str) -> list[Compiled]:
    if case not in _compiled:
        _compiled[case] = compile_launches(CASES[case])
    return _compiled[case]

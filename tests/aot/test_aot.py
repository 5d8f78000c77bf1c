"""Every Triton kernel of the tree compiles on a machine without a GPU, within a program's means.

To add a kernel, add a call of its host function to ``cases.py``. It is then compiled for every target of ``targets.py``
with whatever Triton is installed: CI does so with the newest and, for Hopper, with the oldest that Quire takes.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from fnmatch import fnmatch
from functools import partial

import pytest
from tests.aot.cases import CASES
from tests.aot.cases_gemm import RULES
from tests.aot.cases_sampling import place_drafts, verify_drafts
from tests.aot.compile import Compiled, compile_launch, launches_of, variant
from tests.aot.targets import LEFT_OUT, SHARED, spill_allowed
from triton.compiler.errors import CompilationError
from triton.runtime.jit import JITFunction

import quire

pytestmark = pytest.mark.aot

_compiled: dict[tuple[str, int], list[Compiled]] = {}


@pytest.mark.parametrize(
    ("capability", "case"),
    [
        pytest.param(capability, case, id=f"sm_{capability}-{case}")
        for capability in SHARED
        for case in (*CASES, *RULES.get(capability, ()))
        if not any(fnmatch(case, pattern) for pattern in LEFT_OUT.get(capability, ()))
    ],
)
def test_compiles_and_fits(capability: int, case: str) -> None:
    try:
        kernels = compiled(case, capability)
    except CompilationError as error:
        if capability < 89 and _lacks_fp8(error):
            pytest.skip("a GPU before Ada has no FP8")
        raise
    assert kernels
    for kernel in kernels:
        limit, allowed = SHARED[capability], spill_allowed(kernel.name, case, capability)
        assert kernel.shared <= limit, f"{kernel.name} wants {kernel.shared} of {limit} bytes of shared memory"
        spills = f"{kernel.name} spills {kernel.local} bytes a thread, at {kernel.registers} registers"
        assert kernel.local <= allowed, f"{spills}; mend it, or declare it in tests/aot/targets.py with the reason"


def test_any_number_of_drafts_is_the_same_program() -> None:
    """Proposers on the host find as many as they find: none may be the first to be compiled for."""
    for run, counts in ((verify_drafts, range(2, 18)), (partial(place_drafts, lengths=True), range(1, 51))):
        first, *others = [variant(launch) for count in counts for launch in launches_of(partial(run, count))]
        assert others and all(other == first for other in others)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("bfloat16", "float16"))])
def test_prefill_multiplies_with_wgmma(case: str) -> None:
    """sm_90: Hopper's own matrix instruction, not the one it inherits."""
    (prefill,) = [kernel for kernel in compiled(case, 90) if kernel.name == "_prefill_kernel"]
    assert "wgmma.mma_async" in prefill.ptx and "mma.sync" not in prefill.ptx


def test_decode_multiplies_on_tensor_cores() -> None:
    (decode,) = [kernel for kernel in compiled("bfloat16-128", 90) if kernel.name == "_paged_decode_kernel"]
    assert "mma.sync" in decode.ptx and "cp.async" in decode.ptx


@pytest.mark.parametrize("case", ["fp8-cache", "fp8-cache-verify"])
def test_decode_reads_fp8_keys_by_words(case: str) -> None:
    """sm_90: 16 bytes at a time into shared memory, and whole matrices from there, never single bytes."""
    (decode,) = [kernel for kernel in compiled(case, 90) if kernel.name == "_paged_decode_kernel"]
    assert "cp.async.cg" in decode.ptx and "cp.async.ca" not in decode.ptx
    assert not re.search(r"ld\.shared\S*\.[bus]8\b", decode.ptx)


@pytest.mark.parametrize("case", ["fp8-medium-m", "int8-medium-m", "fp8-medium-m-x-lhs"])
def test_eight_bits_are_multiplied_as_such(case: str) -> None:
    (gemm,) = compiled(case, 90)
    assert "wgmma.mma_async" in gemm.ptx and (".s8.s8" if "int8" in case else ".e4m3.e4m3") in gemm.ptx


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("int4-medium-m")])
def test_no_product_runs_on_into_the_next_turn(case: str) -> None:
    """sm_90: Triton 3.6 lets it where nothing else touches the sum; then the next turn's weights overwrite those that
    ``wgmma`` still reads."""
    gemm = compiled(case, 90)[0]
    left = re.findall(r"wgmma.wait_group.sync.aligned (\d+)", gemm.ptx)
    assert "wgmma.mma_async" in gemm.ptx and left and set(left) == {"0"}


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("int4-hopper")])
def test_products_in_flight_keep_their_weights(case: str) -> None:
    """sm_90: what waits for a product names the registers of its weights, so that nothing is put there before."""
    hopper = compiled(case, 90)[0]
    waits = re.findall(r"wait for regs: (.*)\n\s*wgmma.wait_group.sync.aligned (\d)", hopper.ptx)
    assert {left for _, left in waits} == {"0", "1"}
    assert all("%rs" in names for names, left in waits if left == "1")


def test_no_kernel_is_forgotten() -> None:
    """A kernel is a jitted function whose name ends in ``_kernel``; each is launched by some case."""
    kernels = set()
    for module_info in pkgutil.walk_packages(quire.__path__, "quire."):
        if "kernel" in module_info.name or "triton" in module_info.name:
            module = importlib.import_module(module_info.name)
            kernels |= {n for n, v in vars(module).items() if isinstance(v, JITFunction) and n.endswith("_kernel")}
    launched = {kernel.__name__ for run in CASES.values() for kernel, _, _ in launches_of(run)}
    assert kernels and kernels <= launched, f"add to tests/aot/cases.py: {', '.join(sorted(kernels - launched))}"


def _lacks_fp8(error: BaseException | None) -> bool:
    return error is not None and ("type fp8e4nv not supported" in str(error) or _lacks_fp8(error.__cause__))


def compiled(case: str, capability: int) -> list[Compiled]:
    key = (case, capability)
    if key not in _compiled:
        _compiled[key] = [
            compile_launch(launch, capability)
            for launch in launches_of(CASES.get(case) or RULES[capability][case], capability)
        ]
    return _compiled[key]

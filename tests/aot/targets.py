"""The kinds of GPU that kernels are compiled for, and what may not fit there yet."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

import triton

__all__ = ["EXCEPTIONS", "LEFT_OUT", "SHARED", "Except", "spill_allowed"]

SHARED = {90: 227 * 1024, 80: 163 * 1024, 89: 99 * 1024, 100: 227 * 1024}
"""Compute capability -> bytes of shared memory that a program may have there. Every case is compiled for each."""

_HOPPER_TABLES = ("int4-medium-m-256", "int4-small-m-16")
"""Launches of Hopper's tables, which take more shared memory or registers than others have. What the rules choose
elsewhere is compiled as ``rule-*``."""
LEFT_OUT: dict[int, tuple[str, ...]] = {
    80: ("float16-*", "fp8-*", "int4-medium-m-256", "*hopper-*"),
    89: (
        "float16-*", "float32-*", "*hopper-*", *_HOPPER_TABLES, "fp8-medium-m", "fp8-medium-m-x-lhs",
        "norm*", "rope*", "silu", "decode-inputs", "verify-inputs", "sample-*", "draft-*", "int8-*", "*gemv*",
        "small-m-*", "medium-m", "int4-medium-m-32", "window", "block-size-1", "group-7", "multi-query",
    ),
    100: ("float16-*", "*hopper-*"),
}  # fmt: skip
"""Capability -> patterns of cases not compiled for it: they use what such a GPU has not, differ from others only in a
type (``float16-*``), are launches of a table of Hopper's or kernels for it (``*hopper-*``). Ada (89) compiles what
differs from Ampere (80): FP8, and what takes much of the shared memory, of which it has less; not what needs little of
it and is the same code as for 80. Its W8A8 products (``fp8-medium-m``) are the library's."""


@dataclass(frozen=True)
class Except:
    """A kernel that spills registers, and why it may."""

    kernel: str
    bytes: int
    """A thread, at most."""
    reason: str
    case: str = "*"
    capabilities: tuple[int, ...] = tuple(SHARED)
    triton: str = "*"
    """A pattern of Triton's versions."""


_ELSEWHERE = "its tiles were chosen on Hopper; no others have been timed there yet"
_FLOAT32 = "a few bytes, in a precision that is not served on a GPU"
_OLDEST = "a few bytes, and only with the oldest Triton"

EXCEPTIONS: tuple[Except, ...] = (
    Except("_prefill_kernel", 320, _ELSEWHERE, capabilities=(80,)),
    Except("_prefill_kernel", 40, _ELSEWHERE, capabilities=(89,)),
    Except(
        "_prefill_kernel",
        112,
        "queries of 256 features in registers, beside an FP8 cache; no tile without spills has been timed",
        case="fp8-cache-256",
    ),
    Except("_prefill_kernel", 16, _FLOAT32, case="float32-*"),
    Except("_paged_decode_kernel", 16, _ELSEWHERE, capabilities=(80,)),
    Except("sample_topk_candidates_kernel", 160, _FLOAT32, case="sample-random-float32", triton="3.6.*"),
    Except("int4_gemm_medium_m_kernel", 8, _ELSEWHERE, case="int4-medium-m-*", capabilities=(100,)),
    Except("sample_resolve_kernel", 40, _OLDEST, capabilities=(80,), triton="3.6.*"),
    Except("int4_gemm_medium_m_kernel", 8, _ELSEWHERE, case="int4-medium-m-groups-of-32", capabilities=(100,)),
    Except("int4_gemm_small_m_kernel", 8, _OLDEST, case="int4-*", triton="3.6.*"),
    Except(
        "*gemv*_kernel",
        16,
        "outside of its loop, so that as many programs run at a time as without adapters: one fewer cost a tenth",
        case="*gemv*-shrinks",
    ),
    Except("fp8_gemv_k_loop_kernel", 32, _OLDEST, case="fp8-gemv-k-loop-shrinks", triton="3.6.*"),
    Except(
        "int4_gemm_hopper_kernel", 112, "past its loop, with gates, a bias and a residual at once", case="int4-hopper-*"
    ),
)


def spill_allowed(kernel: str, case: str, capability: int) -> int:
    """Bytes a thread that the kernel may spill in this case; 0 unless an exception says otherwise."""
    return max(
        (
            each.bytes
            for each in EXCEPTIONS
            if fnmatch(kernel, each.kernel)
            and fnmatch(case, each.case)
            and capability in each.capabilities
            and fnmatch(triton.__version__, each.triton)
        ),
        default=0,
    )

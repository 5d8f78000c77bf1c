"""The kinds of GPU that kernels are compiled for, and what may not fit there yet."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

import triton

__all__ = ["EXCEPTIONS", "LEFT_OUT", "SHARED", "Except", "spill_allowed"]

SHARED = {90: 227 * 1024, 80: 163 * 1024, 100: 227 * 1024}
"""Compute capability -> bytes of shared memory that a program may have there. Every case is compiled for each."""

LEFT_OUT: dict[int, tuple[str, ...]] = {
    80: ("float16-*", "fp8-*", "int4-medium-m-256", "*hopper-*"),
    100: ("float16-*", "*hopper-*"),
}
"""Capability -> patterns of cases not compiled for it: they use what such a GPU has not, differ from others only in a
type (``float16-*``), are launches of a table of Hopper's (``int4-medium-m-256``) or kernels for it (``*hopper-*``)."""


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


_ELSEWHERE = "its tiles were chosen on Hopper, and nobody has timed others there yet"
_FLOAT32 = "a few bytes in a precision that nobody serves on a GPU"
_OLDEST = "a few bytes, and only with the oldest Triton"

EXCEPTIONS: tuple[Except, ...] = (
    Except("_prefill_kernel", 320, _ELSEWHERE, capabilities=(80,)),
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
        "int4_gemm_hopper_kernel", 112, "past its loop, with gates, a bias and a residual at once", case="int4-hopper-*"
    ),
)


def spill_allowed(kernel: str, case: str, capability: int) -> int:
    """Bytes a thread that the kernel may spill in this case; 0 unless an exception says otherwise."""
    return max(
        (
            each.bytes
            for each in EXCEPTIONS
            if kernel == each.kernel
            and fnmatch(case, each.case)
            and capability in each.capabilities
            and fnmatch(triton.__version__, each.triton)
        ),
        default=0,
    )

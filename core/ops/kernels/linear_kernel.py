"""Linear layers at small batch: which kernel a layer takes for how many tokens, from a table measured on the device.

The tables beside this file are written by ``benchmarks/kernels/linear.py``; a layer that a table does not name gets
what did best on layers of its kind. Other devices have no table: there the library's GEMM does everything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from quire.core.ops.kernels.gemm_medium_m import launch_gemm_medium_m
from quire.core.ops.kernels.gemm_small_m import launch_gemm_small_m
from quire.core.ops.kernels.gemv import launch_gemv, launch_gemv_k_loop
from quire.core.ops.kernels.norm_kernel import launch_rms_norm
from quire.core.ops.kernels.pdl import supports_pdl

__all__ = ["Launch", "TritonSmallBatchGemm", "choose_launch", "get_launches"]

_KERNELS: dict[str, Callable[..., None]] = {
    "gemv": launch_gemv,
    "gemv_k_loop": launch_gemv_k_loop,
    "gemm_small_m": launch_gemm_small_m,
    "gemm_medium_m": launch_gemm_medium_m,
}
_TABLES = {(9, 0): "h200.json"}
"""Compute capability -> table."""
_STEPS = (1, 8, 16, 32)
"""Most tokens of each of the rule's launches."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and its constants."""

    kernel: str
    options: Mapping[str, int]
    separate_norm: bool = False
    """The norm before the layer is faster as a kernel of its own."""


class TritonSmallBatchGemm:
    """The kernels of one layer. It holds no weights, only what to launch."""

    def __init__(
        self, device: torch.device, features: int, inputs: int, dtype: torch.dtype, enable_pdl: bool = True
    ) -> None:
        self._enable_pdl = enable_pdl and supports_pdl(device)
        self._steps = get_launches(device, features, inputs) if dtype in (torch.bfloat16, torch.float16) else []

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: tuple[Tensor, float] | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        """``x`` (num_tokens, inputs) times ``weight`` (features, inputs), with its neighbours; None: not faster here.

        ``norm`` is the weight (inputs,) and epsilon of an RMS norm before the layer; ``gated``: the halves of the
        result become ``silu(first) * second``; ``residual`` is added last. Rounded once, at the end.
        """
        launch = next((launch for most, launch in self._steps if x.shape[0] <= most), None)
        if launch is None or not x.is_contiguous() or not x.shape[0]:
            return None
        if norm is not None and (
            launch.separate_norm or (launch.kernel == "gemm_small_m" and x.dtype == torch.float16)
        ):
            x, norm = launch_rms_norm(x, *norm, None)[0], None  # float16 would not hold x * g
        features = weight.shape[0]
        out = x.new_empty(x.shape[0], features // 2 if gated else features)
        _KERNELS[launch.kernel](
            x,
            weight,
            bias,
            out,
            norm=norm,
            gated=gated,
            residual=residual,
            enable_pdl=self._enable_pdl,
            **launch.options,
        )
        return out


def get_launches(device: torch.device, features: int, inputs: int) -> list[tuple[int, Launch | None]]:
    """(most tokens, launch), ascending; None is the library."""
    if device.type != "cuda" or inputs % 16 or features % 16:
        return []
    name = _TABLES.get(torch.cuda.get_device_capability(device))
    if name is None:
        return []
    measured = _read(name).get(f"{features}x{inputs}")
    if measured is None:
        return [(most, choose_launch(features, inputs, most)) for most in _STEPS]
    return [(int(most), None if entry is None else _launch(entry)) for most, entry in measured.items()]


def choose_launch(features: int, inputs: int, tokens: int) -> Launch | None:
    """For layers that no table names: what was best, or close to it, on those that are measured."""
    if tokens == 1:
        if inputs > 8192:
            return Launch("gemv_k_loop", {"block_n": 4, "block_k": 1024, "num_warps": 4})
        warps = min(16, max(2, triton.next_power_of_2(inputs) // 512))
        turns = triton.cdiv(features, 2 * 132 * 8)
        return Launch("gemv", {"block_m": 1, "block_n": 2, "tiles_per_program": turns, "num_warps": warps})
    if features > inputs:
        options = {"block_m": tokens, "block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 4}
        return Launch("gemm_medium_m", options, separate_norm=True)
    if tokens > 16:
        return None
    options = {"block_m": tokens, "block_n": 16, "block_k": 64, "slice_k": 4, "num_stages": 4}
    return Launch("gemm_small_m", options, separate_norm=True)


@cache
def _read(name: str) -> dict[str, dict[str, Any]]:
    """``{"<features>x<inputs>": {"<most tokens>": launch or null}}``."""
    return json.loads((Path(__file__).parent / "tables" / name).read_text())["layers"]


def _launch(entry: Mapping[str, Any]) -> Launch:
    told = ("kernel", "separate_norm", "us", "unfused_us")
    options = {key: value for key, value in entry.items() if key not in told}
    return Launch(entry["kernel"], options, bool(entry.get("separate_norm", False)))

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

from quire.core.ops.kernels.gemm_medium_m import wide
from quire.core.ops.kernels.gemm_small_m import skinny
from quire.core.ops.kernels.gemv import gemv, gemv_long
from quire.core.ops.kernels.norm_kernel import rms_norm
from quire.core.ops.kernels.pdl import supports_pdl

__all__ = ["Launch", "SmallLinear", "launches", "rule"]

_KERNELS: dict[str, Callable[..., None]] = {"gemv": gemv, "gemv_long": gemv_long, "skinny": skinny, "wide": wide}
_TABLES = {(9, 0): "h200.json"}
"""Compute capability -> table."""
_STEPS = (1, 8, 16, 32)
"""Most tokens of each of the rule's launches."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and its constants."""

    kernel: str
    options: Mapping[str, int]
    norm_apart: bool = False
    """The norm before the layer is faster as a kernel of its own."""


class SmallLinear:
    """The kernels of one layer. It holds no weights, only what to launch."""

    def __init__(
        self, device: torch.device, features: int, inputs: int, dtype: torch.dtype, enable_pdl: bool = True
    ) -> None:
        self._enable_pdl = enable_pdl and supports_pdl(device)
        self._steps = launches(device, features, inputs) if dtype in (torch.bfloat16, torch.float16) else []

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
        if norm is not None and (launch.norm_apart or (launch.kernel == "skinny" and x.dtype == torch.float16)):
            x, norm = rms_norm(x, *norm, None)[0], None  # float16 would not hold x * g
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


def launches(device: torch.device, features: int, inputs: int) -> list[tuple[int, Launch | None]]:
    """(most tokens, launch), ascending; None is the library."""
    if device.type != "cuda" or inputs % 16 or features % 16:
        return []
    name = _TABLES.get(torch.cuda.get_device_capability(device))
    if name is None:
        return []
    measured = _read(name).get(f"{features}x{inputs}")
    if measured is None:
        return [(most, rule(features, inputs, most)) for most in _STEPS]
    return [(int(most), None if entry is None else _launch(entry)) for most, entry in measured.items()]


def rule(features: int, inputs: int, tokens: int) -> Launch | None:
    """For layers that no table names: what was best, or close to it, on those that are measured."""
    if tokens == 1:
        if inputs > 8192:
            return Launch("gemv_long", {"rows": 4, "block": 1024, "num_warps": 4})
        warps = min(16, max(2, triton.next_power_of_2(inputs) // 512))
        turns = triton.cdiv(features, 2 * 132 * 8)
        return Launch("gemv", {"tokens": 1, "rows": 2, "turns": turns, "num_warps": warps})
    if features > inputs:
        options = {"tokens": tokens, "rows": 64, "block": 128, "num_warps": 4, "num_stages": 4}
        return Launch("wide", options, norm_apart=True)
    if tokens > 16:
        return None
    options = {"tokens": tokens, "rows": 16, "block": 64, "ways": 4, "num_stages": 4}
    return Launch("skinny", options, norm_apart=True)


@cache
def _read(name: str) -> dict[str, dict[str, Any]]:
    """``{"<features>x<inputs>": {"<most tokens>": launch or null}}``."""
    return json.loads((Path(__file__).parent / "tables" / name).read_text())["layers"]


def _launch(entry: Mapping[str, Any]) -> Launch:
    told = ("kernel", "norm_apart", "us", "apart_us")
    options = {key: value for key, value in entry.items() if key not in told}
    return Launch(entry["kernel"], options, bool(entry.get("norm_apart", False)))

"""Linear layers at small batch: which kernel a layer takes for how many tokens.

The table beside this file is written by ``benchmarks/kernels/linear.py``, and for the shapes that ranks have of a layer
by ``linear_chain.py`` beside it; a layer that it does not name, and a Hopper
card without a table, get what did best on layers of its kind. On other architectures the rule has not been timed
against the library's GEMM, which does everything there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from quire.core.contracts.quant import LowRankShrink
from quire.core.ops.device_profile import DeviceProfile
from quire.core.ops.kernels.gemm_medium_m import launch_gemm_medium_m
from quire.core.ops.kernels.gemm_small_m import launch_gemm_small_m
from quire.core.ops.kernels.gemv import launch_gemv, launch_gemv_k_loop
from quire.core.ops.kernels.norm_kernel import launch_rms_norm
from quire.core.ops.kernels.pdl import supports_pdl
from quire.core.ops.launch_table import Launch, LaunchStep, find_launches, get_launch_steps

__all__ = ["LAUNCHERS", "TritonSmallBatchGemm", "choose_launch", "get_bf16_steps"]

LAUNCHERS: dict[str, Callable[..., None]] = {
    "gemv": launch_gemv,
    "gemv_k_loop": launch_gemv_k_loop,
    "gemm_small_m": launch_gemm_small_m,
    "gemm_medium_m": launch_gemm_medium_m,
}
_ADAPTER_KERNELS = frozenset({"gemv", "gemv_k_loop", "gemm_small_m"})
"""Those that add what adapters make of their tokens; with more tokens it is done behind them, on the tensor cores."""
_MAX_ADAPTER_TOKENS = 8
_RULE_TOKENS = (1, 8, 16, 32)
"""Most tokens of each of the rule's launches."""
_PROGRAMS_PER_SM = 8
"""Of a GEMV: enough to hide the latency of memory, and few enough to reuse the tokens that a program holds."""


class TritonSmallBatchGemm:
    """The kernels of one layer. It holds no weights, only what to launch."""

    def __init__(
        self, device: torch.device, features: int, inputs: int, dtype: torch.dtype, enable_pdl: bool = True
    ) -> None:
        self._enable_pdl = enable_pdl and supports_pdl(device)
        self._steps: tuple[LaunchStep, ...] = ()
        if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
            self._steps = get_bf16_steps(DeviceProfile.detect(device), features, inputs)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: tuple[Tensor, float] | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
        adapters: LowRankShrink | None = None,
    ) -> Tensor | None:
        """``x`` (num_tokens, inputs) times ``weight`` (features, inputs), with its neighbours; None: not faster here.

        ``norm`` is the weight (inputs,) and epsilon of an RMS norm before the layer; ``gated``: the halves of the
        result become ``silu(first) * second``; ``residual`` is added last. Rounded once, at the end. ``adapters``
        launches the first product of the layer's adapters, and the second is this kernel's.
        """
        launches = find_launches(self._steps, x.shape[0])
        launch = launches[0] if launches else None
        if launch is None or not x.is_contiguous() or not x.shape[0]:
            return None
        if adapters is not None and (launch.kernel not in _ADAPTER_KERNELS or x.shape[0] > _MAX_ADAPTER_TOKENS):
            return None
        multiplies_gains = launch.kernel == "gemm_small_m" or adapters is not None
        if norm is not None and (launch.separate_norm or (multiplies_gains and x.dtype == torch.float16)):
            x, norm = launch_rms_norm(x, *norm, None)[0], None  # float16 would not hold x * g
        term = None
        if adapters is not None:
            can_shrink = x.shape[0] == 1 or launch.kernel == "gemm_small_m"
            term = (adapters.get_in_product("bf16") if can_shrink else None) or adapters.launch(x, norm)
        features = weight.shape[0]
        out = x.new_empty(x.shape[0], features // 2 if gated else features)
        LAUNCHERS[launch.kernel](
            x,
            weight,
            bias,
            out,
            norm=norm,
            gated=gated,
            residual=residual,
            adapters=term,
            enable_pdl=self._enable_pdl,
            **launch.options,
        )
        return out


def get_bf16_steps(profile: DeviceProfile, features: int, inputs: int) -> tuple[LaunchStep, ...]:
    """The launches of a layer of 16-bit weights; beyond them, and for None, there is the library."""
    if not profile.is_hopper or inputs % 16 or features % 16:
        return ()
    return get_launch_steps(
        Path(__file__).parent / "tables",
        "bf16",
        profile,
        (features, inputs),
        rule=lambda tokens: (choose_launch(profile, features, inputs, tokens),),
        rule_tokens=_RULE_TOKENS,
    )


def choose_launch(profile: DeviceProfile, features: int, inputs: int, tokens: int) -> Launch | None:
    """The rule, for layers that no table names: what was best, or close to it, on those that are measured."""
    if tokens == 1:
        if inputs > 8192:
            return Launch("gemv_k_loop", {"block_n": 4, "block_k": 1024, "num_warps": 4})
        warps = min(16, max(2, triton.next_power_of_2(inputs) // 512))
        tiles = triton.cdiv(features, 2 * profile.num_sms * _PROGRAMS_PER_SM)
        return Launch("gemv", {"block_m": 1, "block_n": 2, "tiles_per_program": tiles, "num_warps": warps})
    if features > inputs:
        options = {"block_m": tokens, "block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 4}
        return Launch("gemm_medium_m", options, separate_norm=True)
    if tokens > 16:
        return None
    options = {"block_m": tokens, "block_n": 16, "block_k": 64, "slice_k": 4, "num_stages": 4}
    return Launch("gemm_small_m", options, separate_norm=True)

"""Linear layers whose weights are of 8 bits, FP8 or INT8: which kernel multiplies how many tokens.

The tables beside this file are written by ``benchmarks/kernels/fp8.py``; a layer that a table does not name gets what
did best on layers of its kind. A few tokens are multiplied as they are, with weights widened in registers: as fast as
with quantized ones, and nearer to the truth. Where a launch or the library multiplies in 8 bits, the activations are
quantized by the norm or the activation before, or by a separate kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.plugins.quant.kernels.fp8_gemm_medium_m import launch_fp8_gemm_medium_m
from quire.plugins.quant.kernels.fp8_gemm_small_m import launch_fp8_gemm_small_m
from quire.plugins.quant.kernels.fp8_gemv import launch_fp8_gemv, launch_fp8_gemv_k_loop
from quire.plugins.quant.kernels.fp8_quantize import dequantize_activation, quantize_activation
from quire.sdk import ActivationFormat, LowRankShrink, QuantActivation
from quire.sdk.ops import (
    DeviceProfile,
    Launch,
    LaunchStep,
    find_launches,
    fit_stages,
    get_launch_steps,
    rms_norm,
    rms_norm_quantized,
    supports_pdl,
)

__all__ = [
    "LAUNCHERS",
    "EightBitGemm",
    "GemmPlan",
    "choose_launch",
    "dequantize_weight",
    "get_eight_bit_steps",
    "get_gemm_plan",
    "takes_quantized",
]

LAUNCHERS: dict[str, Callable[..., None]] = {
    "gemv": launch_fp8_gemv,
    "gemv_k_loop": launch_fp8_gemv_k_loop,
    "gemm_small_m": launch_fp8_gemm_small_m,
    "gemm_medium_m": launch_fp8_gemm_medium_m,
}
_MAX_ADAPTER_TOKENS = 8
"""Most tokens to whose products a kernel adds what adapters make of them."""
_RULE_TOKENS = (1, 8, 16, 32, 64, 128)
"""Most tokens of each of the rule's launches."""
_MAX_BY_BLOCK_UP, _MAX_BY_BLOCK_DOWN = 32, 64
"""Most tokens for which scales by block leave a launch ahead of the library: of layers with more features than inputs,
and of the others."""
_REDUCTION_BYTES = 4 * 1024
"""Shared memory in which the warps of ``gemm_small_m`` add up their products, and some for alignment."""
_K_LOOP = Launch("gemv_k_loop", {"block_n": 4, "block_k": 1024, "num_warps": 2}, separate_norm=True)


class GemmPlan:
    """What layers of one shape on one device launch. Past ``steps`` there is the library."""

    def __init__(self, device: torch.device, features: int, inputs: int, dtype: torch.dtype) -> None:
        self.steps = get_eight_bit_steps(DeviceProfile.detect(device), features, inputs, dtype)
        self.enable_pdl = supports_pdl(device)

    def select_launch(self, tokens: int, quantized: bool, native: bool, blocks: bool) -> Launch | None:
        """The best for ``tokens``, or None: the library. ``quantized``: the activations are already; ``native``: they
        shall not be; ``blocks``: scales are by 128x128 block."""
        for launch in find_launches(self.steps, tokens):
            if launch is None:
                if native:
                    continue  # the library multiplies quantized activations alone
                return None
            if (quantized and not takes_quantized(launch)) or (native and takes_quantized(launch)):
                continue
            return _take_blocks(launch) if blocks else launch
        return None


@dataclass(frozen=True, slots=True)
class EightBitGemm:
    """One kind of 8 bits: how activations are quantized by token, and the library's product.

    ``library_gemm(x, weight, scale, bias)`` multiplies a quantized ``x`` by ``weight`` (features, inputs), whose
    ``scale`` is (features,) or, where ``library_has_block_scales``, by 128x128 block, to ``x.dtype``.
    """

    per_token: ActivationFormat
    library_gemm: Callable[[QuantActivation, Tensor, Tensor, Tensor | None], Tensor]
    library_has_block_scales: bool = False

    def apply_linear(
        self,
        x: Tensor | QuantActivation,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None,
        *,
        weight_only: bool,
        norm: tuple[Tensor, float] | None,
        activation: str | None,
        residual: Tensor | None,
        adapters: LowRankShrink | None = None,
    ) -> Tensor | None:
        """As ``kernels.fp8.apply_linear``."""
        dense_x = x.values if isinstance(x, QuantActivation) else x
        fused = norm is not None or activation is not None or residual is not None or adapters is not None
        if not weight.is_cuda:
            return None if fused else _multiply_dequantized(x, weight, scale, bias)
        tokens, blocks = dense_x.shape[0], scale.dim() == 2
        plan = get_gemm_plan(weight.device, *weight.shape, weight.dtype)
        by_block = blocks and self.library_has_block_scales and input_scale is None and not weight_only
        max_by_block = _MAX_BY_BLOCK_UP if weight.shape[0] > weight.shape[1] else _MAX_BY_BLOCK_DOWN
        few = tokens <= max_by_block or not by_block
        launch = plan.select_launch(tokens, isinstance(x, QuantActivation), weight_only, blocks) if few else None
        if launch is None or activation not in (None, "silu") or not tokens or not dense_x.is_contiguous():
            if fused:
                return None
            if weight_only or (blocks and not by_block):
                return _multiply_dequantized(x, weight, scale, bias)
            x = x if isinstance(x, QuantActivation) else self.quantize_activation(x, input_scale, blocks)
            return self.library_gemm(x, weight, scale, bias)
        if adapters is not None and (takes_quantized(launch) or tokens > _MAX_ADAPTER_TOKENS):
            return None
        options: dict[str, Any] = dict(launch.options)
        if takes_quantized(launch):
            if not isinstance(x, QuantActivation):
                x = self.quantize_activation(x, input_scale, blocks, norm)
            values, dtype, norm = x.values, x.dtype, None
            options["x_scale"] = x.scale
        else:
            assert isinstance(x, Tensor)
            values, dtype = x, x.dtype
            holds_gains = adapters is None or dtype != torch.float16  # an adapter's input times the norm's weight
            if norm is not None and (launch.separate_norm or not holds_gains):
                values, norm = rms_norm(x, *norm)[0], None
            if adapters is not None:
                can_shrink = tokens == 1 or launch.kernel == "gemm_small_m"
                in_product = adapters.get_in_product(_get_format(weight)) if can_shrink else None
                options["adapters"] = in_product or adapters.launch(values, norm)
            if launch.kernel.startswith("gemv"):
                options["norm"] = norm
        gated = activation is not None
        features = weight.shape[0] // 2 if gated else weight.shape[0]
        out = torch.empty(tokens, features, dtype=dtype, device=weight.device)
        LAUNCHERS[launch.kernel](
            values,
            weight,
            bias,
            out,
            scale=scale,
            gated=gated,
            residual=residual,
            enable_pdl=plan.enable_pdl,
            **options,
        )
        return out

    def quantize_activation(
        self, x: Tensor, input_scale: Tensor | None, blocks: bool, norm: tuple[Tensor, float] | None = None
    ) -> QuantActivation:
        """``x`` (num_tokens, features), after an RMS norm where one is given, in this kind of 8 bits; for weights with
        scales by block, by groups of as many inputs."""
        output_format = self.per_token
        if output_format.kind == "fp8_token" and input_scale is not None:
            output_format = ActivationFormat("fp8_tensor", input_scale.reshape(1))
        elif output_format.kind == "fp8_token" and blocks:
            output_format = ActivationFormat("fp8_group")
        y = (
            quantize_activation(x, output_format)
            if norm is None
            else rms_norm_quantized(x, *norm, None, output_format)[0]
        )
        assert isinstance(y, QuantActivation)
        return y


def _multiply_dequantized(x: Tensor | QuantActivation, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The product with nothing in 8 bits."""
    x = dequantize_activation(x) if isinstance(x, QuantActivation) else x
    return F.linear(x, dequantize_weight(weight, scale, x.dtype), bias)


@cache
def get_gemm_plan(device: torch.device, features: int, inputs: int, dtype: torch.dtype) -> GemmPlan:
    """One for each shape."""
    return GemmPlan(device, features, inputs, dtype)


def get_eight_bit_steps(
    profile: DeviceProfile, features: int, inputs: int, dtype: torch.dtype
) -> tuple[LaunchStep, ...]:
    """The launches of a layer of weights of ``dtype``; beyond them, and for None, there is the library."""

    def rule(tokens: int) -> tuple[Launch, ...]:
        first = choose_launch(profile, features, inputs, tokens)
        if takes_quantized(first) or not profile.is_hopper:
            return (first,)
        return first, choose_launch(profile, features, inputs, tokens, quantized=True)

    return get_launch_steps(
        Path(__file__).parent / "tables",
        "int8" if dtype == torch.int8 else "fp8",
        profile,
        (features, inputs),
        rule=rule,
        # W8A8 beyond 8 tokens has been timed against the library on Hopper alone
        rule_tokens=_RULE_TOKENS if profile.is_hopper else _RULE_TOKENS[:2],
    )


def choose_launch(profile: DeviceProfile, features: int, inputs: int, tokens: int, quantized: bool = False) -> Launch:
    """The rule, for layers that no table names: what was best, or close to it, on those that are measured."""
    if tokens == 1 and not quantized:
        return _K_LOOP
    if tokens <= 8 and not quantized:
        options = {"block_m": 8, "block_n": 16, "block_k": 128, "slice_k": 4}
        stages = fit_stages(profile, 6, stage_bytes=4 * 128 * (16 + 2 * 8), other_bytes=_REDUCTION_BYTES)
        return Launch("gemm_small_m", options | {"num_stages": stages}, separate_norm=True)
    options = {"block_m": max(8, tokens), "block_n": 64, "block_k": min(256 if tokens <= 64 else 128, inputs & -inputs)}
    return Launch("gemm_medium_m", options | {"num_warps": 4, "num_stages": 6 if tokens <= 32 else 4})


def takes_quantized(launch: Launch) -> bool:
    """Whether the kernel multiplies activations of 8 bits (W8A8), and not 16-bit ones (W8A16)."""
    return launch.kernel == "gemm_medium_m"


def dequantize_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` (features, inputs) times its scale, (features,) or by 128x128 block, in ``dtype``."""
    if scale.dim() == 1:
        return (weight.float() * scale[:, None]).to(dtype)
    features, inputs = weight.shape
    spread = scale.repeat_interleave(128, 0)[:features].repeat_interleave(128, 1)[:, :inputs]
    return (weight.float() * spread).to(dtype)


def _take_blocks(launch: Launch) -> Launch:
    """``launch`` with inputs taken 128 at a time, so that a product has one scale for each row."""
    if launch.kernel == "gemv":
        return _K_LOOP
    options = dict(launch.options)
    if launch.kernel != "gemv_k_loop":
        options["block_k"] = 128
    return Launch(launch.kernel, options, launch.separate_norm)


def _get_format(weight: Tensor) -> str:
    return "int8" if weight.dtype == torch.int8 else "fp8"

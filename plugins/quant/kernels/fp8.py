"""FP8 (e4m3) layers: weights and, from some tokens on, activations of 8 bits."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from quire.plugins.quant.kernels import fp8_quantize
from quire.plugins.quant.kernels.fp8_layer import EightBitGemm, get_gemm_plan
from quire.sdk import ActivationFormat, InputFormat, LowRankShrink, QuantActivation
from quire.sdk.ops import DeviceProfile

__all__ = ["apply_linear", "can_implement", "get_input_format", "quantize_activation", "quantize_weight"]

_FP8_MAX = 448.0
_PER_TOKEN = ActivationFormat("fp8_token")


def can_implement(weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, weight_only: bool = False) -> bool:
    """Whether ``apply_linear`` takes these on their device: a GPU that has the type (Ada, Hopper and later), with rows
    and inputs in whole vectors of 16 and 32, and scales by block for whole blocks of inputs."""
    features, inputs = weight.shape
    if weight.device.type != "cuda" or not DeviceProfile.detect(weight.device).has_fp8:
        return False
    if features % 16 or inputs % (32 if weight_scale.dim() == 1 else 128):
        return False
    get_gemm_plan(weight.device, features, inputs, weight.dtype)
    return True


def get_input_format(weight_scale: Tensor, input_scale: Tensor | None, weight_only: bool = False) -> InputFormat:
    """What the operation before such a layer should emit, where it is not part of the layer's own kernel."""
    if weight_only:
        return "native"
    if weight_scale.dim() == 2:
        return "fp8_group" if input_scale is None and library_has_block_scales(weight_scale.device) else "native"
    return "fp8_token" if input_scale is None else "fp8_tensor"


def apply_linear(
    x: Tensor | QuantActivation,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    weight_only: bool = False,
    norm: tuple[Tensor, float] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    adapters: LowRankShrink | None = None,
) -> Tensor | None:
    """``x`` (num_tokens, inputs) times ``weight`` (features, inputs) e4m3 -> (num_tokens, features).

    ``weight_scale`` float32: (features,), or (features / 128, inputs / 128), both rounded up. ``input_scale``: one
    float32 for all tokens, or None: each token gets its own, or one for each 128 inputs where weights have them by
    block. A few tokens are not quantized at all, and then a static scale is not used; ``weight_only``: none are.
    ``norm``, ``activation`` and ``residual`` as in ``LinearMethod.apply_fused``; None only where one of them is given
    and not offered for so many tokens. On the CPU weights are widened and activations stay as they are.
    """
    return EightBitGemm(_PER_TOKEN, multiply_by_library, library_has_block_scales(weight.device)).apply_linear(
        x,
        weight,
        weight_scale,
        bias,
        input_scale,
        weight_only=weight_only,
        norm=norm,
        activation=activation,
        residual=residual,
        adapters=adapters,
    )


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` (features, inputs) in e4m3 and its scale (features,) float32: each row's largest becomes 448."""
    scale = (weight.abs().amax(dim=1).float() / _FP8_MAX).clamp(min=1e-12)
    return (weight.float() / scale[:, None]).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn), scale


def quantize_activation(x: Tensor, scale: Tensor | None = None) -> QuantActivation:
    """``x`` (num_tokens, features) in e4m3, by one ``scale`` float32 or, where it is None, one for each token."""
    output_format = _PER_TOKEN if scale is None else ActivationFormat("fp8_tensor", scale.reshape(1))
    return fp8_quantize.quantize_activation(x, output_format)


def multiply_by_library(x: QuantActivation, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The library's."""
    out = (_scaled_mm_per_block if scale.dim() == 2 else _scaled_mm_per_row)(x, weight, scale).to(x.dtype)
    return out if bias is None else out.add_(bias)


def _scaled_mm_per_row(x: QuantActivation, weight: Tensor, scale: Tensor) -> Tensor:
    """With fast accumulation: its sums of 32 products keep 14 bits, less than an activation's 4 lose."""
    x_scale = x.scale if x.scale.numel() > 1 else x.scale.reshape(1, 1).expand(x.values.shape[0], 1).contiguous()
    return torch._scaled_mm(
        x.values, weight.t(), scale_a=x_scale, scale_b=scale[None, :], out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _scaled_mm_per_block(x: QuantActivation, weight: Tensor, scale: Tensor) -> Tensor:
    """Sums of 128 products are scaled and added in float32. The library wants whole fours of tokens, and of a row's
    blocks."""
    (tokens, inputs), missing_blocks = x.values.shape, -scale.shape[1] % 4
    padded = tokens + -tokens % 4
    return scaled_mm(
        x.values.as_strided((padded, inputs), (inputs, 1)),
        weight.t(),
        x.scale.as_strided((padded, inputs // 128), (1, padded)),
        ScalingType.BlockWise1x128,
        (F.pad(scale, (0, missing_blocks)) if missing_blocks else scale).t(),
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )[:tokens]


@cache
def library_has_block_scales(device: torch.device) -> bool:
    """Whether cuBLAS multiplies 128x128 blocks: on Hopper, from CUDA 12.9 on."""
    if device.type != "cuda" or not DeviceProfile.detect(device).is_hopper:
        return False
    return tuple(map(int, (torch.version.cuda or "0").split(".")[:2])) >= (12, 9)

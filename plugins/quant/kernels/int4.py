"""Linear layers with weights of 4 or 8 bits and activations as they are (AWQ, GPTQ, W4A16, W8A16)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.plugins.quant.kernels.int4_launch import LAUNCHERS, PARTIAL_LAUNCHERS, launch_dequantize_int4
from quire.plugins.quant.kernels.int4_table import select_launch
from quire.plugins.quant.kernels.int4_weights import IntWeights, dequantize_to_float64, pack_weights
from quire.sdk import LowRankShrink
from quire.sdk.ops import supports_pdl

__all__ = ["IntWeights", "apply_linear", "dequantize_weights", "multiply_partial", "pack_weights", "reference_linear"]

_MAX_ADAPTER_TOKENS = 8
"""Most tokens to whose products a kernel adds what adapters make of them."""


def apply_linear(
    x: Tensor,
    weights: IntWeights,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    adapters: LowRankShrink | None = None,
) -> Tensor | None:
    """``x`` (num_tokens, inputs) times ``weights``, with its neighbours as in ``LinearMethod.apply_fused``.

    None where a neighbour is not fused, as the norm never is (a separate kernel measured faster), and never without
    neighbours. Which kernel multiplies depends on the layer's shape and on the padded number of tokens:
    ``int4_table``. Many tokens are the library's, on weights written out before.
    """
    gated = activation is not None
    if norm is not None or activation not in (None, "silu") or (gated and weights.features % 32):
        return None
    launch = select_launch(weights, x)
    if launch is None:
        if gated or residual is not None or adapters is not None:
            return None
        return F.linear(x, dequantize_weights(weights, x.dtype), bias)
    if gated and launch.options["tiles"] < 2:
        return None
    if adapters is not None and (launch.kernel != "gemm_small_m" or x.shape[0] > _MAX_ADAPTER_TOKENS):
        return None
    out = x.new_empty(x.shape[0], weights.features // 2 if gated else weights.features)
    x = x.contiguous()
    LAUNCHERS[launch.kernel](
        x,
        weights,
        bias,
        out,
        gated=gated,
        residual=residual,
        adapters=None if adapters is None else adapters.get_in_product("w4a16") or adapters.launch(x, None),
        enable_pdl=supports_pdl(x.device),
        **launch.options,
    )
    return out


def multiply_partial(x: Tensor, weights: IntWeights) -> Tensor | None:
    """``x`` (num_tokens, inputs) times ``weights`` as in ``LinearMethod.apply_partial``."""
    launch = select_launch(weights, x)
    if launch is None or launch.kernel not in PARTIAL_LAUNCHERS or not x.is_contiguous():
        return None
    return PARTIAL_LAUNCHERS[launch.kernel](x, weights, None, None, enable_pdl=supports_pdl(x.device), **launch.options)


def dequantize_weights(weights: IntWeights, dtype: torch.dtype) -> Tensor:
    """(features, inputs) of ``dtype``; by a kernel where there is one."""
    if weights.words.is_cuda and dtype in (torch.bfloat16, torch.float16):
        return launch_dequantize_int4(weights, dtype)
    return dequantize_to_float64(weights).to(dtype)


def reference_linear(
    x: Tensor,
    weights: IntWeights,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``apply_linear`` by torch in float64, never None."""
    x = x.double()
    if norm is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm[1]) * norm[0].double()
    y = F.linear(x, dequantize_to_float64(weights), None if bias is None else bias.double())
    if activation is not None:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual.double()

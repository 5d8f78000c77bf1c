"""Linear layers with weights of 4 or 8 bits and activations as they are (AWQ, GPTQ, W4A16, W8A16)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.core.ops.kernels.pdl import supports_pdl
from quire.plugins.quant.kernels.int4_launch import LAUNCHERS, launch_dequantize_int4
from quire.plugins.quant.kernels.int4_table import select_launch

__all__ = ["IntWeights", "apply_linear", "dequantize_weights", "pack_weights", "reference_linear"]


@dataclass(frozen=True)
class IntWeights:
    """``(code - zero) * scale``, (features, inputs), in the order that ``int4_words`` describes."""

    words: Tensor
    """(tiles, blocks, 256) int32: 1 KiB for 16 rows and ``512 / bits`` inputs."""
    groups: Tensor
    """(tiles, groups, 16) int32: the scale's float32 without its last 8 bits, and the zero point in them."""
    features: int
    inputs: int
    group_size: int
    """A multiple or a part of 128 (of 64 for 8 bits), 32 at least, or all inputs."""
    bits: int


def pack_weights(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, bits: int = 4
) -> IntWeights | None:
    """Repack, on the tensors' device; None where there is no kernel for groups of that size.

    ``codes`` (features, inputs) uint8, ``scales`` (features, groups), ``zeros`` (features, groups) uint8, None for
    ``2 ** (bits - 1)`` everywhere. Scales keep 16 bits of their significand. Rows and inputs that fill up the last
    tile have a scale of zero.
    """
    features, inputs = codes.shape
    span = 512 // bits
    group = inputs if group_size in (-1, inputs) else group_size
    count = -(-inputs // group)
    if bits not in (4, 8) or (group != inputs and group % span and (group < 32 or span % group)):
        return None
    if scales.shape != (features, count):
        raise ValueError(
            f"scales of {(features, inputs)} in groups of {group}: {tuple(scales.shape)}, not {(features, count)}"
        )
    tiles, blocks = -(-features // 16), -(-inputs // span)
    words = torch.empty(tiles, blocks, 256, dtype=torch.int32, device=codes.device)
    step = max(1, (1 << 24) // (16 * blocks * span))  # tiles at a time, so that the copies stay small
    for first in range(0, tiles, step):
        rows = codes[first * 16 : (first + step) * 16]
        held = F.pad(rows, (0, blocks * span - inputs, 0, -len(rows) % 16)).to(torch.int64)
        held = held.view(-1, 2, 8, blocks, 32 // bits, 4, 2, 2)  # tile, i, g, block, j, t, h, e
        shifts = torch.arange(0, 32, bits, device=codes.device)
        word = (held << shifts.view(-1, 1, 1, 1)).sum(4)  # tile, i, g, block, t, h, e
        word = word.permute(0, 3, 5, 2, 4, 1, 6).reshape(-1, blocks, 256)
        words[first : first + step] = torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)
    scale = scales.float().contiguous().view(torch.int32)
    scale = (scale + 0x80) & -256  # to nearest
    zero = torch.full_like(scale, 1 << (bits - 1)) if zeros is None else zeros.to(torch.int32)
    groups = F.pad(scale | zero, (0, 0, 0, tiles * 16 - features))
    groups = groups.view(tiles, 2, 8, count).permute(0, 3, 2, 1).reshape(tiles, count, 16).contiguous()
    return IntWeights(words, groups, features, inputs, group, bits)


def apply_linear(
    x: Tensor,
    weights: IntWeights,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor | None:
    """``x`` (num_tokens, inputs) times ``weights``, with its neighbours as in ``LinearMethod.apply_fused``.

    None where a neighbour is not fused, as the norm never is (its own kernel measured faster), and never without
    neighbours. Which kernel multiplies depends on the layer's shape
    and on the padded number of tokens: ``tables/``. Many tokens are the library's, on weights written out before.
    """
    gated = activation is not None
    if norm is not None or activation not in (None, "silu") or (gated and weights.features % 32):
        return None
    launch = select_launch(weights, x)
    if launch is None:
        if gated or residual is not None:
            return None
        return F.linear(x, dequantize_weights(weights, x.dtype), bias)
    if gated and launch.options["tiles"] < 2:
        return None
    out = x.new_empty(x.shape[0], weights.features // 2 if gated else weights.features)
    LAUNCHERS[launch.kernel](
        x.contiguous(),
        weights,
        bias,
        out,
        gated=gated,
        residual=residual,
        enable_pdl=supports_pdl(x.device),
        **launch.options,
    )
    return out


def dequantize_weights(weights: IntWeights, dtype: torch.dtype) -> Tensor:
    """(features, inputs) of ``dtype``; by a kernel where there is one."""
    if weights.words.is_cuda and dtype in (torch.bfloat16, torch.float16):
        return launch_dequantize_int4(weights, dtype)
    return _dense(weights).to(dtype)


def reference_linear(
    x: Tensor,
    weights: IntWeights,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``linear`` by torch in float64, never None."""
    x = x.double()
    if norm is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm[1]) * norm[0].double()
    y = F.linear(x, _dense(weights), None if bias is None else bias.double())
    if activation is not None:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual.double()


def _dense(weights: IntWeights) -> Tensor:
    """(features, inputs) in float64."""
    tiles, blocks = weights.words.shape[:2]
    shifts = torch.arange(0, 32, weights.bits, device=weights.words.device)
    codes = (weights.words.unsqueeze(-1) >> shifts) & ((1 << weights.bits) - 1)
    codes = codes.view(tiles, blocks, 2, 8, 4, 2, 2, -1).permute(
        0, 5, 3, 1, 7, 4, 2, 6
    )  # tile, i, g, block, j, t, h, e
    codes = codes.reshape(tiles * 16, -1)[: weights.features, : weights.inputs]
    count = weights.groups.shape[1]
    groups = weights.groups.view(tiles, count, 8, 2).permute(0, 3, 2, 1).reshape(tiles * 16, count)[: weights.features]
    scale = (groups & -256).view(torch.float32).double()
    each = torch.arange(weights.inputs, device=codes.device) // weights.group_size
    return (codes - (groups & 255)[:, each]) * scale[:, each]

"""Weights of 4 or 8 bits in groups, repacked for the kernels: the type, the packing, and their meaning in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IntWeights", "dequantize_to_float64", "pack_weights"]


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


def dequantize_to_float64(weights: IntWeights) -> Tensor:
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

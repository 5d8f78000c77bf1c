"""Codes of a few bits out of the words that checkpoints pack them into."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["AWQ_ORDER", "unpack_codes"]

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ's GEMM packing keeps each of eight columns: nibble ``AWQ_ORDER[i]`` of a word is column ``i``."""


def unpack_codes(words: Tensor, bits: int, count: int | None = None) -> Tensor:
    """``words`` (rows, n) int32 or int16 -> (rows, count) uint8; None: all that the words hold.

    A row is a stream of bits, the lowest of the first word first, and codes of ``bits`` bits (8 at most) follow one
    another in it, across words where they do not divide a word's width.
    """
    width = words.dtype.itemsize * 8
    rows, number = words.shape
    mask = (1 << bits) - 1
    if 8 % bits == 0:  # whole codes in each byte, and the bytes of a word are in order
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        codes = ((words.contiguous().view(torch.uint8)[:, :, None] >> shifts) & mask).view(rows, -1)
        return codes if count is None else codes[:, :count]
    total = number * width // bits if count is None else count
    at = torch.arange(total, device=words.device) * bits
    word, shift = at // width, at % width
    wide = words.long() & ((1 << width) - 1)
    low = wide[:, word] >> shift
    high = wide[:, (word + 1).clamp(max=number - 1)] << (width - shift)
    return ((low | high) & mask).to(torch.uint8)

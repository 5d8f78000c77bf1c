"""Codes of few bits, with a scale and perhaps a zero point by group of inputs: the one form of every such format, and
the unpacking of codes from the words of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quire.plugins.quant.shards import Shard

__all__ = ["AWQ_ORDER", "GroupedWeights", "group_by_index", "is_in_order", "unpack_codes"]


_PADDED_GROUP = 32
"""Inputs of the smallest group that kernels take."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ's GEMM packing keeps each of eight columns: nibble ``AWQ_ORDER[i]`` of a word is column ``i``."""


@dataclass(frozen=True, slots=True)
class GroupedWeights:
    """``w[:, perm] = (codes - zeros) * scales``, a scale and a zero for each row and group of inputs."""

    codes: Tensor
    """(out, in) uint8, inputs in the order ``perm``."""
    scales: Tensor
    """(out, in / group_size), in the dtype of the checkpoint: float16 scales stay float16 under a bfloat16 model, which
    would take three bits from each."""
    zeros: Tensor | None
    """(out, in / group_size) uint8; None: ``2 ** (bits - 1)`` everywhere."""
    bits: int
    """4 or 8: what fewer than 4 bits hold fits into 4."""
    perm: Tensor | None = None
    """(in,) int32: input ``perm[i]`` meets column ``i`` (GPTQ's activation order), -1: none does, and the column is
    zero; None: as they come."""

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize_weights(self) -> Tensor:
        """The weights (out, in) in float32, inputs as they come."""
        weight = _dequantize_codes(self.codes, self.scales, self.zeros, 1 << (self.bits - 1))
        if self.perm is None:
            return weight
        return weight[:, self._find_columns(self.perm)]

    def split_groups(self, group_size: int) -> GroupedWeights:
        """The same weights in smaller groups."""
        times = self.group_size // group_size
        zeros = None if self.zeros is None else self.zeros.repeat_interleave(times, dim=1)
        return replace(self, scales=self.scales.repeat_interleave(times, dim=1), zeros=zeros)

    def undo_permutation(self) -> GroupedWeights:
        """The same weights with inputs as they come, which leaves no groups where they were permuted."""
        if self.perm is None:
            return self
        single, inverse = self.split_groups(1), self._find_columns(self.perm)
        zeros = None if single.zeros is None else single.zeros[:, inverse]
        return replace(self, codes=self.codes[:, inverse], scales=single.scales[:, inverse], zeros=zeros, perm=None)

    def take_shard(self, shard: Shard) -> GroupedWeights:
        """This rank's rows and columns, and rows of zeros where a vocabulary is padded."""
        columns = self._take_columns(shard.first_column, shard.num_columns)
        rows = slice(shard.first_row, shard.first_row + shard.num_rows)
        pad = shard.rows - shard.num_rows
        return replace(
            columns,
            codes=_pad_rows(columns.codes[rows], pad),
            scales=_pad_rows(columns.scales[rows], pad),
            zeros=None if columns.zeros is None else _pad_rows(columns.zeros[rows], pad),
        )

    @staticmethod
    def _find_columns(perm: Tensor) -> Tensor:
        """The column of each input."""
        return torch.argsort(perm)[int((perm < 0).sum()) :]

    def _take_columns(self, first: int, count: int) -> GroupedWeights:
        if count == self.codes.shape[1]:
            return self
        if self.perm is not None and self.group_size > 1:
            return self._take_permuted(self.perm.long(), first, count)
        whole = self.undo_permutation()
        if whole.scales.shape[1] > 1:  # else every rank's inputs are one group, as the whole's are
            size = math.gcd(whole.group_size, first, count)
            whole = whole.split_groups(size)
            groups = slice(first // size, (first + count) // size)
        else:
            groups = slice(0, 1)
        zeros = None if whole.zeros is None else whole.zeros[:, groups]
        return replace(whole, codes=whole.codes[:, first : first + count], scales=whole.scales[:, groups], zeros=zeros)

    def _take_permuted(self, perm: Tensor, first: int, count: int) -> GroupedWeights:
        """Inputs ``first`` to ``first + count`` by group. A rank has some of every group's inputs, each group another
        number of them: each is filled up to whole smaller groups, as kernels take them, with columns that are zero."""
        size = math.gcd(self.group_size, _PADDED_GROUP)
        columns = ((perm >= first) & (perm < first + count)).nonzero()[:, 0]
        group = columns // self.group_size
        num_inputs = torch.bincount(group, minlength=self.scales.shape[1])
        num_parts = -(-num_inputs // size)
        group_of_part = torch.repeat_interleave(torch.arange(len(num_parts), device=perm.device), num_parts)
        start = num_parts.cumsum(0) * size - num_parts * size
        place = (
            start[group] + torch.arange(len(columns), device=perm.device) - (num_inputs.cumsum(0) - num_inputs)[group]
        )
        zeros = None if self.zeros is None else self.zeros[:, group_of_part]
        scales = self.scales[:, group_of_part]
        zero_codes = torch.full_like(scales, 1 << (self.bits - 1), dtype=torch.uint8) if zeros is None else zeros
        codes = zero_codes.repeat_interleave(size, dim=1)
        codes[:, place] = self.codes[:, columns]
        new_perm = torch.full((codes.shape[1],), -1, dtype=torch.int32, device=perm.device)
        new_perm[place] = (perm[columns] - first).int()
        return GroupedWeights(codes, scales, zeros, self.bits, new_perm)

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int = -1
    ) -> GroupedWeights:
        """From codes (out, in) of 2 to 8 ``bits``, carried in 4 or 8; scales and zeros (out, groups), for groups
        of ``group_size`` inputs, -1: of even size. Smaller groups where the last is not full."""
        inputs, groups = codes.shape[1], scales.shape[1]
        size = inputs // groups if group_size == -1 else group_size
        if size * groups != inputs:
            size = math.gcd(size, inputs)
            times = (torch.arange(0, inputs, size, device=codes.device) // group_size).long()
            scales, zeros = scales[:, times], None if zeros is None else zeros[:, times]
        middle = 1 << (bits - 1)
        if zeros is not None and bool((zeros == middle).all()):
            zeros = None
        carried = 4 if bits <= 4 else 8
        if zeros is None and bits != carried:
            codes = codes + ((1 << (carried - 1)) - middle)
        return cls(codes, scales, zeros, carried)

    @staticmethod
    def concatenate(parts: Sequence[GroupedWeights]) -> GroupedWeights:
        """Parts of one bit width, one above the other. Smaller groups or none where theirs differ, and no permutation
        where that differs."""
        first = parts[0]
        if any(not _are_equal(first.perm, part.perm) for part in parts):
            parts = [part.undo_permutation() for part in parts]
        size = math.gcd(*(part.group_size for part in parts))
        parts = [part.split_groups(size) for part in parts]
        zeros = None
        if any(part.zeros is not None for part in parts):
            middle = 1 << (first.bits - 1)
            filled = (
                torch.full_like(p.scales, middle, dtype=torch.uint8) if p.zeros is None else p.zeros for p in parts
            )
            zeros = torch.cat(list(filled))
        dtype = parts[0].scales.dtype
        if any(part.scales.dtype != dtype for part in parts):
            dtype = torch.float32
        return GroupedWeights(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales.to(dtype) for part in parts]),
            zeros,
            first.bits,
            parts[0].perm,
        )


def group_by_index(
    group_of: Tensor | None, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int
) -> GroupedWeights:
    """Weights whose input ``i`` is of group ``group_of[i]`` (in,), None: in order; codes (out, in), scales and zeros
    (out, groups). Inputs are sorted by group; where groups are of another size than ``group_size``, every input gets a
    scale of its own."""
    inputs = codes.shape[1]
    if group_of is None or is_in_order(group_of, group_size):
        return GroupedWeights.from_codes(codes, scales, zeros, bits, group_size)
    group_of = group_of.long()
    perm = torch.argsort(group_of, stable=True)
    if is_in_order(group_of[perm], group_size) and inputs % group_size == 0:
        sorted_ = GroupedWeights.from_codes(codes[:, perm], scales, zeros, bits, group_size)
        return replace(sorted_, perm=perm.to(torch.int32))
    return GroupedWeights.from_codes(codes, scales[:, group_of], None if zeros is None else zeros[:, group_of], bits, 1)


def is_in_order(group_of: Tensor, group_size: int) -> bool:
    """Whether inputs ``group_of`` (in,) follow one another by group, ``group_size`` in each; -1: all are in one."""
    size = len(group_of) if group_size == -1 else group_size
    return torch.equal(group_of.long(), torch.arange(len(group_of), device=group_of.device) // size)


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


def _dequantize_codes(codes: Tensor, scales: Tensor, zeros: Tensor | None, middle: int) -> Tensor:
    """``(codes - zeros) * scales`` in float32; ``middle`` is the zero point where ``zeros`` is None."""
    out, groups = scales.shape
    wide = codes.float().view(out, groups, -1)
    wide.sub_(middle if zeros is None else zeros.float()[..., None])
    return wide.mul_(scales.float()[..., None]).view(out, -1)


def _pad_rows(tensor: Tensor, rows: int) -> Tensor:
    return tensor if rows == 0 else torch.cat([tensor, tensor.new_zeros(rows, *tensor.shape[1:])])


def _are_equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)

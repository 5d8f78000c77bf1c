"""Weights of few bits that share a scale, and perhaps a zero point, by groups of inputs; activations stay as they are.

AWQ, GPTQ and compressed-tensors pack such weights in different orders. Each is brought to one form, ``GroupedWeights``,
which a kernel repacks once more, as it likes to read them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quire.core.contracts.quant import LayerInfo, QuantActivation
from quire.plugins.quant.assembled import AssembledLinear, Shard, Stored, widen

__all__ = ["GroupedFormat", "GroupedLinear", "GroupedWeights"]


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
    """(in,) int32: input ``perm[i]`` meets column ``i`` (GPTQ's activation order); None: as they come."""

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dense(self) -> Tensor:
        """The weights (out, in) in float32, inputs as they come."""
        weight = widen(self.codes, self.scales, self.zeros, 1 << (self.bits - 1))
        if self.perm is None:
            return weight
        inputs_first = torch.empty_like(weight)
        inputs_first[:, self.perm.long()] = weight
        return inputs_first

    def regrouped(self, group_size: int) -> GroupedWeights:
        """The same weights in smaller groups."""
        times = self.group_size // group_size
        zeros = None if self.zeros is None else self.zeros.repeat_interleave(times, dim=1)
        return replace(self, scales=self.scales.repeat_interleave(times, dim=1), zeros=zeros)

    def unpermuted(self) -> GroupedWeights:
        """The same weights with inputs as they come, which leaves no groups where they were permuted."""
        if self.perm is None:
            return self
        single, inverse = self.regrouped(1), torch.argsort(self.perm)
        zeros = None if single.zeros is None else single.zeros[:, inverse]
        return replace(self, codes=self.codes[:, inverse], scales=single.scales[:, inverse], zeros=zeros, perm=None)

    def shard(self, shard: Shard) -> GroupedWeights:
        """This rank's rows and columns, and rows of zeros where a vocabulary is padded."""
        mine = self._columns(shard.first_column, shard.num_columns)
        rows = slice(shard.first_row, shard.first_row + shard.num_rows)
        pad = shard.rows - shard.num_rows
        return replace(
            mine,
            codes=_padded(mine.codes[rows], pad),
            scales=_padded(mine.scales[rows], pad),
            zeros=None if mine.zeros is None else _padded(mine.zeros[rows], pad),
        )

    def _columns(self, first: int, count: int) -> GroupedWeights:
        if count == self.codes.shape[1]:
            return self
        whole = self.unpermuted()
        if whole.scales.shape[1] > 1:  # else every rank's inputs are one group, as the whole's are
            size = math.gcd(whole.group_size, first, count)
            whole = whole.regrouped(size)
            groups = slice(first // size, (first + count) // size)
        else:
            groups = slice(0, 1)
        zeros = None if whole.zeros is None else whole.zeros[:, groups]
        return replace(whole, codes=whole.codes[:, first : first + count], scales=whole.scales[:, groups], zeros=zeros)

    @staticmethod
    def cat(parts: Sequence[GroupedWeights]) -> GroupedWeights:
        """Parts of one bit width, one above the other. Smaller groups or none where theirs differ, and no permutation
        where that differs."""
        first = parts[0]
        if any(not _same(first.perm, part.perm) for part in parts):
            parts = [part.unpermuted() for part in parts]
        size = math.gcd(*(part.group_size for part in parts))
        parts = [part.regrouped(size) for part in parts]
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


@dataclass(frozen=True)
class GroupedFormat(ABC):
    """How a checkpoint packs such weights."""

    bits: int
    group_size: int
    """-1: all inputs."""
    symmetric: bool = False
    """Without zero points: all are ``2 ** (bits - 1)``."""

    def groups(self, inputs: int) -> int:
        """Scales of a row."""
        return 1 if self.group_size == -1 else inputs // self.group_size

    @abstractmethod
    def stored(self, outputs: int, inputs: int) -> Mapping[str, Stored]:
        """The tensors of a whole (outputs, inputs) weight, by suffix."""

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> GroupedWeights:
        """The canonical form, on the tensors' device."""


class GroupedLinear(AssembledLinear):
    """Multiplies by weights in some ``GroupedFormat``.

    On a GPU, ``kernels.int4`` repacks them (``pack`` gives None for what it has no kernel for) and multiplies.
    """

    def __init__(self, form: GroupedFormat) -> None:
        super().__init__()
        self.form = form
        self._kernel: Any = None
        self._packed: Any = None
        self._perm: Tensor | None = None

    def stored(self, info: LayerInfo, part: int) -> Mapping[str, Stored]:
        """As the format says."""
        return self.form.stored(info.part_totals[part], info.in_total)

    def assemble(self, layer: nn.Module, info: LayerInfo, parts: Sequence[tuple[Mapping[str, Tensor], Shard]]) -> None:
        """Read each part, take this rank's share, and pack the whole."""
        read = (self.form.read(tensors, *shard.of).shard(shard) for tensors, shard in parts)
        self._register(layer, info, GroupedWeights.cat(list(read)))

    def assemble_dummy(self, layer: nn.Module, info: LayerInfo, device: torch.device) -> None:
        """Random codes; scales that keep an activation's size."""
        out, inputs = info.out_features, info.in_features
        size = inputs if self.form.group_size == -1 else math.gcd(self.form.group_size, inputs)
        bits = 8 if self.form.bits == 8 else 4
        scale = 12**0.5 / (1 << bits) / inputs**0.5
        shape = out, inputs // size
        dtype = info.dtype if info.dtype == torch.float32 else torch.float16
        self._register(
            layer,
            info,
            GroupedWeights(
                torch.randint(0, 1 << bits, (out, inputs), dtype=torch.uint8, device=device),
                torch.full(shape, scale, dtype=dtype, device=device),
                None if self.form.symmetric else torch.full(shape, 1 << (bits - 1), dtype=torch.uint8, device=device),
                bits,
            ),
        )

    def multiply(
        self,
        layer: nn.Module,
        x: Tensor | QuantActivation,
        bias: Tensor | None,
        norm: tuple[Tensor, float] | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        """By the int4 kernels."""
        assert isinstance(x, Tensor), "input_format is native"
        if self._perm is not None:
            if norm is not None:
                return None
            x = x.index_select(1, self._perm)
        return self._kernel.linear(x, self._packed, bias, norm=norm, activation=activation, residual=residual)

    def _register(self, layer: nn.Module, info: LayerInfo, weights: GroupedWeights) -> None:
        self._packed = self._pack(weights)
        if self._packed is None:
            self.register_wide(layer, info, weights.dense())
            return
        self._perm = weights.perm
        for name, value in vars(self._packed).items():  # parameters, so that the memory they take is counted
            if isinstance(value, Tensor):
                layer.register_parameter(f"packed_{name}", nn.Parameter(value, requires_grad=False))

    def _pack(self, weights: GroupedWeights) -> Any:
        if weights.codes.device.type != "cuda" or weights.bits != 4:
            return None
        from quire.plugins.quant.kernels import int4

        self._kernel = int4
        return int4.pack(weights.codes, weights.scales, weights.zeros, weights.group_size)


def _padded(tensor: Tensor, rows: int) -> Tensor:
    return tensor if rows == 0 else torch.cat([tensor, tensor.new_zeros(rows, *tensor.shape[1:])])


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)

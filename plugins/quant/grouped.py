"""Weights of few bits that share a scale, and perhaps a zero point, by groups of inputs; activations stay as they are.

AWQ, GPTQ and compressed-tensors pack such weights in different orders. Each is brought to one form, ``GroupedWeights``,
which a kernel repacks once more, as it likes to read them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from quire.plugins.quant.deferred_linear import DeferredLinear, StoredTensor
from quire.plugins.quant.grouped_weights import GroupedWeights, is_in_order
from quire.plugins.quant.shards import Axis, Dimension, Shard
from quire.sdk import CheckpointError, LayerInfo, LowRankShrink, QuantActivation, get_native_activation

__all__ = ["FLOATS", "GroupedFormat", "GroupedLinear"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class GroupedFormat(ABC):
    """How a checkpoint packs such weights."""

    bits: int
    group_size: int
    """-1: all inputs."""
    symmetric: bool = False
    """Without zero points: all are ``2 ** (bits - 1)``."""

    @property
    def index_name(self) -> str | None:
        """The tensor that may say which group an input is of."""
        return None

    @property
    def columns_can_be_cut(self) -> bool:
        """Whether the stored tensors of some inputs, in whole words and groups, are those of a smaller weight."""
        return True

    @property
    def size_multiples(self) -> tuple[int, int]:
        """What the outputs and the inputs of a layer must be multiples of."""
        return 1, 1

    @property
    def group_axis(self) -> Axis | None:
        """The dimension of a stored tensor that has an entry for each group."""
        return None if self.group_size == -1 else Axis("columns", self.group_size)

    def count_groups(self, inputs: int) -> int:
        """Scales of a row; the last may be of fewer inputs."""
        return 1 if self.group_size == -1 else -(-inputs // self.group_size)

    @abstractmethod
    def get_stored_tensors(self, outputs: int, inputs: int) -> Mapping[str, StoredTensor]:
        """The tensors of a whole (outputs, inputs) weight, by suffix."""

    @abstractmethod
    def unpack_tensors(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> GroupedWeights:
        """The canonical form, on the tensors' device."""


class GroupedLinear(DeferredLinear):
    """Multiplies by weights in some ``GroupedFormat``.

    On a GPU, ``kernels.int4`` repacks them (``pack_weights`` gives None for what it has no kernel for) and multiplies.
    """

    def __init__(self, form: GroupedFormat) -> None:
        super().__init__()
        self.form = form
        self._kernels: Any = None
        self._packed: Any = None
        self._perm: Tensor | None = None

    def get_stored_tensors(self, info: LayerInfo, part: int) -> Mapping[str, StoredTensor]:
        """As the format says. Raises ``CheckpointError`` for sizes that it cannot have."""
        outputs, inputs = info.part_totals[part], info.in_total
        if outputs % self.form.size_multiples[0] or inputs % self.form.size_multiples[1]:
            raise CheckpointError(
                f"layer {info.part_names[part]!r} has {outputs} outputs and {inputs} inputs, which "
                f"{type(self.form).__name__} cannot pack; config.json is not of this model"
            )
        return self.form.get_stored_tensors(info.part_totals[part], info.in_total)

    def choose_cut_dimensions(self, tensors: dict[str, Tensor]) -> Sequence[Dimension]:
        """Both, but for packings that are of one piece along the inputs, and inputs that are not in order of group."""
        index = self.form.index_name
        if index in tensors:
            if not is_in_order(tensors[index], self.form.group_size):
                return ("rows",)
            del tensors[index]  # it would count from the first group of the whole
        return ("rows", "columns") if self.form.columns_can_be_cut else ("rows",)

    def assemble(self, layer: nn.Module, info: LayerInfo, parts: Sequence[tuple[Mapping[str, Tensor], Shard]]) -> None:
        """Read each part, take this rank's share, and pack the whole."""
        read = (self.form.unpack_tensors(tensors, *shard.whole_shape).take_shard(shard) for tensors, shard in parts)
        self._register(layer, info, GroupedWeights.concatenate(list(read)))

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
        adapters: LowRankShrink | None = None,
    ) -> Tensor | None:
        """By the int4 kernels."""
        x = get_native_activation(x)
        if self._perm is not None:
            if norm is not None:
                return None
            if adapters is not None:  # which know the columns by their own order
                adapters = _make_shrink_of(x, adapters)
            x = x.index_select(1, self._perm)
        return self._kernels.apply_linear(
            x, self._packed, bias, norm=norm, activation=activation, residual=residual, adapters=adapters
        )

    def multiply_partial(self, x: Tensor) -> Tensor | None:
        """By the int4 kernels, for inputs in their order."""
        return None if self._perm is not None else self._kernels.multiply_partial(x, self._packed)

    def _register(self, layer: nn.Module, info: LayerInfo, weights: GroupedWeights) -> None:
        self._packed = self._pack(weights)
        if self._packed is None:
            self.register_dense_weight(layer, info, weights.dequantize_weights())
            return
        # A column without an input is zero, whatever it meets.
        self._perm = None if weights.perm is None else weights.perm.clamp(min=0)
        for name, value in vars(self._packed).items():  # parameters, so that the memory they take is counted
            if isinstance(value, Tensor):
                layer.register_parameter(f"packed_{name}", nn.Parameter(value, requires_grad=False))

    def _pack(self, weights: GroupedWeights) -> Any:
        if weights.codes.device.type != "cuda":
            return None
        self._kernels = import_module("quire.plugins.quant.kernels.int4")
        return self._kernels.pack_weights(
            weights.codes, weights.scales, weights.zeros, weights.group_size, weights.bits
        )


def _make_shrink_of(x: Tensor, shrink: LowRankShrink) -> LowRankShrink:
    """``shrink`` of ``x``, whatever it is called with."""
    return LowRankShrink(lambda _, norm: shrink.launch(x, norm))

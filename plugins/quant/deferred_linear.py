"""A linear layer put together from the tensors of its fused parts, one part after the other, when the last has come."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quire.plugins.quant.none import UnquantizedLinear
from quire.plugins.quant.shards import Axis, CutPart, Dimension, Shard, cut_to_shard
from quire.sdk import CheckpointError, LayerInfo, LinearMethod, LowRankShrink, QuantActivation
from quire.sdk.layers import check_tensor_shape

__all__ = ["DeferredLinear", "StoredTensor"]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as a checkpoint stores it."""

    shape: tuple[int, ...] | None
    """None: one number, written with whatever shape."""
    dtypes: tuple[torch.dtype, ...]
    axes: tuple[Axis | None, ...] = ()
    """What its dimensions run over, for a rank to read its share alone; of those that are not named here, nothing."""
    optional: bool = False
    upper_bound: int | None = None
    """Its numbers are from 0 to one less than this."""
    expected_values: tuple[int, ...] | None = None
    """Its numbers are these."""

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise ``CheckpointError`` unless the checkpoint's tensor ``name`` is as said."""
        if self.shape is not None:
            check_tensor_shape(name, tensor, self.shape)
        elif tensor.numel() != 1:
            raise CheckpointError(f"tensor {name!r} has shape {list(tensor.shape)} where one number is right")
        if tensor.dtype not in self.dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            actual_dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"tensor {name!r} is {actual_dtype} where {expected} is right; the weights and the "
                f"quantization_config in config.json do not belong together"
            )
        if self.expected_values is not None and tuple(tensor.tolist()) != self.expected_values:
            raise CheckpointError(
                f"tensor {name!r} says {tensor.tolist()}, but config.json asks for {list(self.expected_values)}; the "
                f"weights and config.json are not of the same model"
            )
        if self.upper_bound is not None and not 0 <= int(tensor.min()) <= int(tensor.max()) < self.upper_bound:
            raise CheckpointError(
                f"tensor {name!r} has numbers from {int(tensor.min())} to {int(tensor.max())} where 0 to "
                f"{self.upper_bound - 1} are right; download the model again"
            )


class DeferredLinear(LinearMethod):
    """Keeps checkpoint tensors as they came until a part is whole, then reads it on the layer's device, so that beside
    the finished layers there is never more than one layer in another form. What came is mapped from a file: of it only
    this rank's share, in whole words and groups, is read and moved.

    Where no kernel takes the layer (always on the CPU) its weights are widened once, to the model's dtype: exact up to
    that rounding, and as large as an unquantized layer.
    """

    def __init__(self) -> None:
        self._dense_method: UnquantizedLinear | None = None
        self._loaded_tensors: dict[int, dict[str, Tensor]] = {}
        self._device = torch.device("cpu")
        self._info: LayerInfo | None = None
        self._is_assembled = False

    @property
    def is_dense(self) -> bool:
        """Whether no kernel takes the layer, so that it multiplies as an unquantized one."""
        return self._dense_method is not None

    # ---- what a scheme says of itself

    @abstractmethod
    def get_stored_tensors(self, info: LayerInfo, part: int) -> Mapping[str, StoredTensor]:
        """The tensors of ``part`` in the checkpoint, by suffix, beside ``bias``."""

    def get_unused_tensors(self) -> tuple[str, ...]:
        """Suffixes of tensors that a checkpoint may hold and the scheme has no use for."""
        return ()

    def choose_cut_dimensions(self, tensors: dict[str, Tensor]) -> Sequence[Dimension]:
        """Along which dimensions the stored tensors of a part may be cut to a rank's share; tensors that say nothing
        may be taken out. What is not cut is read whole, and left to ``assemble``."""
        return "rows", "columns"

    @abstractmethod
    def assemble(self, layer: nn.Module, info: LayerInfo, parts: Sequence[tuple[Mapping[str, Tensor], Shard]]) -> None:
        """Register the layer's parameters, from each part's tensors (on the layer's device) and this rank's share."""

    @abstractmethod
    def assemble_dummy(self, layer: nn.Module, info: LayerInfo, device: torch.device) -> None:
        """Register random parameters of the size of real ones, for ``--load-format dummy``."""

    @abstractmethod
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
        """``apply_fused``, or with ``adapters`` ``apply_with_adapters``, by the scheme's kernel, whose plain product is
        never None."""

    # ---- the contract

    def create_weights(self, layer: nn.Module, info: LayerInfo, device: torch.device) -> None:
        """The bias; what quantized weights look like is known when they have come."""
        self._info, self._device = info, device
        if info.bias:
            bias = torch.zeros(info.out_features, dtype=info.dtype, device=device)
            layer.bias = nn.Parameter(bias, requires_grad=False)

    def tensor_names(self, info: LayerInfo) -> tuple[str, ...]:
        """What ``get_stored_tensors`` says, the bias, and what is not used."""
        return (*self.get_stored_tensors(info, 0), "bias", *self.get_unused_tensors())

    def optional_names(self, info: LayerInfo) -> tuple[str, ...]:
        """A bias of zeros is often written where the architecture has none."""
        optional = tuple(name for name, stored in self.get_stored_tensors(info, 0).items() if stored.optional)
        return (*optional, *self.get_unused_tensors(), *(() if info.bias else ("bias",)))

    def load_tensor(
        self, layer: nn.Module, info: LayerInfo, part: int, tensor_name: str, tensor: Tensor, rank: int, world_size: int
    ) -> None:
        """Check and keep one tensor; with the layer's last, assemble it."""
        name = f"{info.part_names[part]}.{tensor_name}"
        shard = _shard(info, part, rank, world_size)
        if tensor_name == "bias":
            _load_bias(layer, info, part, name, tensor, shard)
            return
        if tensor_name in self.get_unused_tensors():
            return
        self.get_stored_tensors(info, part)[tensor_name].check(name, tensor)
        self._loaded_tensors.setdefault(part, {})[tensor_name] = tensor
        self._ranks = rank, world_size
        whole = all(
            self._loaded_tensors.get(i, {}).keys() == self.get_stored_tensors(info, i).keys()
            for i in range(len(info.part_names))
        )
        if whole:
            self._assemble_loaded(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Assemble what lacks only optional tensors; random weights where nothing was loaded."""
        if self._is_assembled:
            return
        assert self._info is not None
        if self._loaded_tensors:
            self._assemble_loaded(layer)
        else:
            self.assemble_dummy(layer, self._info, self._device)
            self._is_assembled = True

    def apply(self, layer: nn.Module, x: Tensor | QuantActivation, bias: Tensor | None = None) -> Tensor:
        """By the scheme's kernel, or as an unquantized layer where the weights are wide."""
        if self._dense_method is not None:
            return self._dense_method.apply(layer, x, bias)
        out = self.multiply(layer, x, bias)
        assert out is not None, "a plain product is always offered"
        return out

    def apply_fused(
        self,
        layer: nn.Module,
        x: Tensor | QuantActivation,
        bias: Tensor | None = None,
        *,
        norm: tuple[Tensor, float] | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        """What the kernel offers."""
        if self._dense_method is not None:
            return self._dense_method.apply_fused(layer, x, bias, norm=norm, activation=activation, residual=residual)
        return self.multiply(layer, x, bias, norm, activation, residual)

    def multiply_partial(self, x: Tensor) -> Tensor | None:
        """``apply_partial`` by the scheme's kernel."""
        return None

    def apply_partial(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """What the kernel offers."""
        return None if self._dense_method is not None else self.multiply_partial(x)

    def apply_with_adapters(
        self,
        layer: nn.Module,
        x: Tensor,
        bias: Tensor | None,
        shrink: LowRankShrink,
        *,
        norm: tuple[Tensor, float] | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        """What the kernel offers."""
        if self._dense_method is None:
            return self.multiply(layer, x, bias, norm, activation, residual, shrink)
        return self._dense_method.apply_with_adapters(
            layer, x, bias, shrink, norm=norm, activation=activation, residual=residual
        )

    # ---- for schemes

    def register_dense_weight(self, layer: nn.Module, info: LayerInfo, weight: Tensor) -> None:
        """Hold ``weight`` (out_features, in_features) in the model's dtype, as an unquantized layer would."""
        self._dense_method = UnquantizedLinear()
        bias = getattr(layer, "bias", None)
        self._dense_method.create_weights(layer, info, weight.device)
        layer.weight = nn.Parameter(weight.to(info.dtype), requires_grad=False)
        if bias is not None:
            layer.bias = bias

    def _assemble_loaded(self, layer: nn.Module) -> None:
        info = self._info
        assert info is not None
        cuts = [self._cut_part(info, part) for part in range(len(info.part_names))]
        parts = [({name: t.to(self._device) for name, t in cut.tensors.items()}, cut.shard) for cut in cuts]
        self.assemble(layer, info, parts)
        self._is_assembled = True

    def _cut_part(self, info: LayerInfo, part: int) -> CutPart:
        tensors, shard = self._loaded_tensors.pop(part, {}), _shard(info, part, *self._ranks)
        axes = {name: stored.axes for name, stored in self.get_stored_tensors(info, part).items()}
        return cut_to_shard(tensors, axes, shard, self.choose_cut_dimensions(tensors))


def _shard(info: LayerInfo, part: int, rank: int, world_size: int) -> Shard:
    first_row, num_rows = info.out_range(part, rank, world_size)
    first_column, num_columns = info.in_range(rank)
    whole = info.part_totals[part], info.in_total
    return Shard(first_row, num_rows, first_column, num_columns, info.part_sizes[part], whole)


def _load_bias(layer: nn.Module, info: LayerInfo, part: int, name: str, tensor: Tensor, shard: Shard) -> None:
    check_tensor_shape(name, tensor, (info.part_totals[part],))
    if not info.bias:
        if bool(tensor.any()):
            raise CheckpointError(
                f"tensor {name!r} is a bias that is not zero, but the architecture in config.json has none there; "
                f"the weights and config.json are not of the same model"
            )
        return
    at = sum(info.part_sizes[:part])
    rows = tensor[shard.first_row : shard.first_row + shard.num_rows]
    layer.bias[at : at + shard.num_rows].copy_(rows)  # type: ignore[index]

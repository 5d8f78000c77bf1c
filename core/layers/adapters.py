"""Adapters on a model's linear layers: a linear method around another, which adds what the adapters compute."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire.core.contracts.adapter import AdapterLayer, AdapterMethod
from quire.core.contracts.quant import (
    ActivationFormat,
    AppendedTerm,
    InputFormat,
    LayerInfo,
    LinearMethod,
    QuantActivation,
    get_native_activation,
)
from quire.core.errors import ConfigError
from quire.core.layers.parallel import NormedSum, PartialSum, TensorParallel

__all__ = ["AdaptedLinearMethod", "ModelAdapters", "UnaddedAdapters"]


class ModelAdapters:
    """The layers of a model that can have adapters, filled while the model is built."""

    def __init__(self, method: AdapterMethod, target_modules: Collection[str] = ()) -> None:
        self.method = method
        self.layers: dict[str, AdapterLayer] = {}
        """By the name of the fused layer, in order of construction."""
        self.module_shapes: dict[str, tuple[int, int]] = {}
        """What an adapter may name: module in the base's checkpoint -> (out_features, in_features), of all ranks and
        stages."""
        self._target_modules = frozenset(target_modules)

    def wrap_method(self, info: LayerInfo, inner: LinearMethod, rank: int, world_size: int) -> LinearMethod:
        """``inner``, with adapters where the layer can have any."""
        targets = [name for name in info.part_names if self._is_target(name)]
        if not targets or self.method.unsupported(info) is not None:
            return inner
        layer = self.layers[info.name] = self.method.make_layer(info, rank, world_size)
        for name, size in zip(info.part_names, info.part_totals, strict=True):
            if name in targets:
                self.module_shapes[name] = (size, info.in_total)
        return AdaptedLinearMethod(inner, self.method, layer)

    def check_target_modules(self) -> None:
        """Raise ``ConfigError`` where a module that adapters may change is none of the model's."""
        names = {name.rpartition(".")[2] for name in self.module_shapes}
        for target in sorted(self._target_modules - names):
            raise ConfigError(f"lora_target_modules names {target}, and no linear layer of the model is called so")

    def _is_target(self, name: str) -> bool:
        return not self._target_modules or name.rpartition(".")[2] in self._target_modules


class AdaptedLinearMethod(LinearMethod):
    """``inner``'s product, and in steps that have adapters what they add.

    A layer is entered in three ways: plainly, after a norm and before an addition, and all three end in a method. So
    this is the one place where adapters come in, and the layer has none of it. Adapters read the activation as it is
    before quantization: in their steps ``inner`` quantizes its input itself. With few tokens ``inner``'s kernel adds
    what the adapters make of them to its product, where it can. With more they are added behind it, with the
    activation function and the residual where the product leaves that to them; elsewhere to its result, so an
    activation function is not fused; the addition of the residual is, since sums may be in any order. Of a row-sharded
    layer the ranks' sums hold the adapters' shares.
    """

    def __init__(self, inner: LinearMethod, adapters: AdapterMethod, adapter_layer: AdapterLayer) -> None:
        self.inner = inner
        self._adapters = adapters
        self._adapter_layer = adapter_layer
        self._has_appended_rows = False

    @property
    def input_format(self) -> InputFormat:  # type: ignore[override]  # a constant of most methods
        """As it is, in steps that have adapters."""
        return "native" if self._adapters.is_active else self.inner.input_format

    def input_scale(self, layer: nn.Module) -> Tensor | None:
        """Of ``inner``."""
        return self.inner.input_scale(layer)

    def create_weights(self, layer: nn.Module, info: LayerInfo, device: torch.device) -> None:
        """Those of ``inner``, and room behind them where the adapters want it and it offers it."""
        self.inner.create_weights(layer, info, device)
        num_rows = self._adapter_layer.count_appended_rows()
        rows = self.inner.append_rows(layer, num_rows) if num_rows else None
        if rows is not None:
            self._adapter_layer.place_appended_rows(rows)
            self._has_appended_rows = True

    def tensor_names(self, info: LayerInfo) -> tuple[str, ...]:
        """Of ``inner``."""
        return self.inner.tensor_names(info)

    def optional_names(self, info: LayerInfo) -> tuple[str, ...]:
        """Of ``inner``."""
        return self.inner.optional_names(info)

    def alias_names(self, info: LayerInfo) -> Mapping[str, str]:
        """Of ``inner``."""
        return self.inner.alias_names(info)

    def load_tensor(
        self, layer: nn.Module, info: LayerInfo, part: int, tensor_name: str, tensor: Tensor, rank: int, world_size: int
    ) -> None:
        """By ``inner``."""
        self.inner.load_tensor(layer, info, part, tensor_name, tensor, rank, world_size)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """By ``inner``."""
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor | QuantActivation, bias: Tensor | None = None) -> Tensor:
        """``inner``'s product, and the adapters'."""
        if not self._adapters.is_active:
            return self.inner.apply(layer, x, bias)
        out = self._apply_with_adapters(layer, x, bias)
        if out is None:
            out = self.inner.apply(layer, x, bias)
            self._adapter_layer.apply(get_native_activation(x), out)
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
        """What ``inner`` offers; where it does not add the adapters itself, no activation function, which comes behind
        them."""
        if not self._adapters.is_active:
            return self.inner.apply_fused(layer, x, bias, norm=norm, activation=activation, residual=residual)
        neighbours: dict[str, Any] = {"norm": norm, "activation": activation, "residual": residual}
        out = self._apply_with_adapters(layer, x, bias, **neighbours)
        if out is not None or activation is not None:
            return out
        out = self.inner.apply_fused(layer, x, bias, norm=norm, residual=residual)
        if out is None:
            return None
        # A kernel that norms its input does not show the result. The adapters norm it once more, rather than both
        # reading what a third kernel normed, so that rows without adapters keep their bits.
        if norm is None:
            self._adapter_layer.apply(get_native_activation(x), out)
        else:
            self._adapter_layer.apply_after_norm(get_native_activation(x), norm, out)
        return out

    def _apply_with_adapters(
        self, layer: nn.Module, x: Tensor | QuantActivation, bias: Tensor | None, **neighbours: Any
    ) -> Tensor | None:
        """In the product, or behind it with a part of what is done there in any case; None: behind its result."""
        out = self._apply_in_product(layer, x, bias, **neighbours)
        if out is None:
            out = self._apply_appended(layer, x, bias, **neighbours)
        return self._apply_partial(layer, x, bias, **neighbours) if out is None else out

    def _apply_in_product(
        self, layer: nn.Module, x: Tensor | QuantActivation, bias: Tensor | None, **neighbours: Any
    ) -> Tensor | None:
        """All of it by ``inner``, whose kernel adds the adapters to its product; None where it does not."""
        native = get_native_activation(x)
        shrink = self._adapter_layer.get_shrink(native.shape[0])
        if shrink is None:
            return None
        return self.inner.apply_with_adapters(layer, native, bias, shrink, **neighbours)

    def leaves_adapters(self, num_tokens: int) -> bool:
        """Whether ``apply_unadded`` is offered in the step that runs."""
        if not (self._adapters.is_active and self._has_appended_rows):
            return False
        return (
            self._adapter_layer.get_shrink(num_tokens) is None and self._adapter_layer.count_active_rows(num_tokens) > 0
        )

    def apply_unadded(
        self, layer: nn.Module, x: Tensor | QuantActivation, bias: Tensor | None
    ) -> UnaddedAdapters | None:
        """For an operation behind the layer that adds the adapters itself; None: ``apply_fused`` or ``apply``."""
        if not self._adapters.is_active or not self.leaves_adapters(get_native_activation(x).shape[0]):
            return None
        wide = self._multiply_appended(layer, x, bias)
        return None if wide is None else UnaddedAdapters(wide, TensorParallel(), self._adapter_layer)

    def _apply_appended(
        self,
        layer: nn.Module,
        x: Tensor | QuantActivation,
        bias: Tensor | None,
        *,
        norm: tuple[Tensor, float] | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        """The product with the first of the adapters' behind it, and then the second; None where that is not done."""
        wide = self._multiply_appended(layer, x, bias, norm)
        if wide is None:
            return None
        return self._adapter_layer.add_appended(wide, activation, None if residual is None else residual.contiguous())

    def _apply_partial(
        self,
        layer: nn.Module,
        x: Tensor | QuantActivation,
        bias: Tensor | None,
        *,
        norm: tuple[Tensor, float] | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        """The product's partial sums, and the adapters' products where they are added up; None where that is not
        done."""
        native = get_native_activation(x)
        if norm is not None or not self._adapter_layer.adds_to_partial(native.shape[0]):
            return None
        partial = self.inner.apply_partial(layer, native)
        if partial is None:
            return None
        residual = None if residual is None else residual.contiguous()
        return self._adapter_layer.add_to_partial(native, partial, bias, activation, residual)

    def _multiply_appended(
        self,
        layer: nn.Module,
        x: Tensor | QuantActivation,
        bias: Tensor | None,
        norm: tuple[Tensor, float] | None = None,
    ) -> Tensor | None:
        native = get_native_activation(x)
        num_rows = self._adapter_layer.count_active_rows(native.shape[0]) if self._has_appended_rows else 0
        return self.inner.apply_appended(layer, native, bias, num_rows, norm=norm) if num_rows else None


@dataclass(frozen=True, slots=True, eq=False)
class UnaddedAdapters(PartialSum):
    """The result of a layer before what adapters make of it is added, for an operation behind it that does that:
    ``part`` has the layer's product and the rows' behind it."""

    adapter_layer: AdapterLayer

    def split(self) -> tuple[Tensor, AppendedTerm | None]:
        """The layer's product, rows strided, and what is still to be added to it; or the whole sum."""
        term = self.adapter_layer.describe_appended(self.part)
        if term is None:
            return self.reduce(), None
        return self.part[:, : term.b.shape[2]], term

    def reduce(self) -> Tensor:
        """The layer's output with the adapters'."""
        return self.adapter_layer.add_appended(self.part, None, None)

    def reduce_add_norm(
        self, residual: Tensor, norm: tuple[Tensor, float], output_format: ActivationFormat
    ) -> NormedSum | None:
        """In one kernel, where the adapters offer it and ``residual`` is dense, as its rows are read."""
        if not residual.is_contiguous():
            return None
        fused = self.adapter_layer.add_appended_and_norm(self.part, residual, norm, output_format)
        return None if fused is None else NormedSum(*fused)

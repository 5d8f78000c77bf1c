"""Weights of 8 bits that share a scale by row, by 128x128 block or altogether; activations are quantized to match."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quire.plugins.quant.deferred_linear import DeferredLinear, StoredTensor
from quire.plugins.quant.shards import COLUMNS, ROWS, Axis, Dimension, Shard
from quire.sdk import LayerInfo, LowRankShrink, QuantActivation

__all__ = ["Fp8Linear", "Int8Linear", "ScaledFormat", "ScaledLinear"]

BLOCK = 128
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
_INPUT_SCALES = ("input_scale", "activation_scale", "act_scale")
"""Of static activations; the first is llmcompressor's and vLLM's name, the others transformers' and AutoFP8's."""
_SCALES = (*_FLOATS, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class ScaledFormat:
    """How a checkpoint stores such weights."""

    dtype: torch.dtype
    """float8_e4m3fn or int8."""
    strategy: Literal["tensor", "channel", "block", "none"]
    """What shares a scale; ``none``: the checkpoint's weights are not quantized and shall be, by row, at load."""
    inputs: Literal["dynamic", "static", "native"] = "dynamic"
    """Activations get a scale by token, have one for all in the checkpoint, or are not quantized."""
    scale_name: str = "weight_scale"
    block: tuple[int, int] = (BLOCK, BLOCK)
    """Rows and columns of a block."""

    def get_stored_tensors(self, outputs: int, inputs: int) -> Mapping[str, StoredTensor]:
        """The tensors of a whole (outputs, inputs) weight, by suffix."""
        if self.strategy == "none":
            return {"weight": StoredTensor((outputs, inputs), _FLOATS, (ROWS, COLUMNS))}
        rows, columns = self.block
        scale = {
            "tensor": StoredTensor(None, _SCALES),
            "channel": StoredTensor((outputs, 1), _SCALES, (ROWS,)),
            "block": StoredTensor(
                (-(-outputs // rows), -(-inputs // columns)), _SCALES, (Axis("rows", rows), Axis("columns", columns))
            ),
        }[self.strategy]
        stored = {"weight": StoredTensor((outputs, inputs), (self.dtype,), (ROWS, COLUMNS)), self.scale_name: scale}
        if self.inputs == "static":
            stored["input_scale"] = StoredTensor(None, _FLOATS)
        return stored


class ScaledLinear(DeferredLinear):
    """Multiplies by ``weight`` (out, in) of the format's dtype with ``weight_scale`` float32: (out,), to which a scale
    for a whole tensor is expanded, so that fused parts keep their own; or (ceil(out / 128), ceil(in / 128)).

    ``input_scale`` (1,) float32 is the largest of the fused parts', or None: activations are quantized by token.
    """

    max_value: float
    """The largest value that weights take."""

    def __init__(self, form: ScaledFormat) -> None:
        super().__init__()
        self.form = form
        self._kernels: Any = None

    @abstractmethod
    def get_kernels(self) -> Any:
        """The module of kernels, with ``can_implement``, ``get_input_format`` and ``apply_linear``.

        ``can_implement(weight, weight_scale, input_scale, weight_only=False) -> bool``: whether ``apply_linear`` takes
        these, as said above, on their device; ``get_input_format`` has the same arguments.
        ``apply_linear(x, weight, weight_scale, bias=None, input_scale=None, *, weight_only=False, norm=None,
        activation=None, residual=None, adapters=None) -> Tensor | None``: None only where one of the last four is
        given and not offered. ``weight_only``: ``x`` need not be quantized.
        """

    def input_scale(self, layer: nn.Module) -> Tensor | None:
        """Of static activations."""
        return getattr(layer, "input_scale", None)

    def get_stored_tensors(self, info: LayerInfo, part: int) -> Mapping[str, StoredTensor]:
        """As the format says."""
        return self.form.get_stored_tensors(info.part_totals[part], info.in_total)

    def choose_cut_dimensions(self, tensors: dict[str, Tensor]) -> Sequence[Dimension]:
        """Weights that get a scale by row at load are read in whole rows, or each rank would find another scale."""
        return ("rows",) if self.form.strategy == "none" else ("rows", "columns")

    def get_unused_tensors(self) -> tuple[str, ...]:
        """Scales of activations that get one by token, or are not quantized."""
        return () if self.form.inputs == "static" else _INPUT_SCALES

    def alias_names(self, info: LayerInfo) -> Mapping[str, str]:
        """Scales as transformers and older tools call them; ``weight_scale_inv`` is no inverse."""
        scale_names = [] if self.form.strategy == "none" else [n for n in _WEIGHT_SCALES if n != self.form.scale_name]
        aliases = dict.fromkeys(scale_names, self.form.scale_name)
        if self.form.inputs == "static":
            aliases |= dict.fromkeys(_INPUT_SCALES[1:], _INPUT_SCALES[0])
        return aliases

    def assemble(self, layer: nn.Module, info: LayerInfo, parts: Sequence[tuple[Mapping[str, Tensor], Shard]]) -> None:
        """Take this rank's share of each part."""
        read = [self._read_part(tensors, shard) for tensors, shard in parts]
        weight = torch.cat([weight for weight, _ in read])
        scales = [scale for _, scale in read]
        if any(scale is None for scale in scales):
            wide = [self._dequantize_part(tensors, shard) for tensors, shard in parts]
            self.register_dense_weight(layer, info, torch.cat(wide))
            return
        static = [tensors["input_scale"].float().reshape(()) for tensors, _ in parts if "input_scale" in tensors]
        input_scale = torch.stack(static).max().reshape(1) if static else None
        self._register(layer, info, weight, torch.cat(scales), input_scale)  # type: ignore[arg-type]

    def assemble_dummy(self, layer: nn.Module, info: LayerInfo, device: torch.device) -> None:
        """Random weights; scales that keep an activation's size."""
        out, inputs = info.out_features, info.in_features
        numbers = torch.randint(-127, 128, (out, inputs), dtype=torch.int8, device=device)
        weight = numbers if self.form.dtype == torch.int8 else numbers.to(torch.bfloat16).to(self.form.dtype)
        shape = (-(-out // BLOCK), -(-inputs // BLOCK)) if self.form.strategy == "block" else (out,)
        scale = torch.full(shape, 3**0.5 / 127 / inputs**0.5, device=device)
        static = self.form.inputs == "static"
        self._register(layer, info, weight, scale, torch.full((1,), 0.05, device=device) if static else None)

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
        """By the kernels."""
        return self._kernels.apply_linear(
            x,
            layer.weight,
            layer.weight_scale,
            bias,
            self.input_scale(layer),
            weight_only=self.form.inputs == "native",
            norm=norm,
            activation=activation,
            residual=residual,
            adapters=adapters,
        )

    def _register(
        self, layer: nn.Module, info: LayerInfo, weight: Tensor, scale: Tensor, input_scale: Tensor | None
    ) -> None:
        kernel = self.get_kernels() if weight.device.type == "cuda" else None
        native = self.form.inputs == "native"
        if kernel is None or not kernel.can_implement(weight, scale, input_scale, weight_only=native):
            self.register_dense_weight(layer, info, weight.float() * _expand_scale(scale, weight, (BLOCK, BLOCK)))
            return
        self._kernels = kernel
        self.input_format = kernel.get_input_format(scale, input_scale, weight_only=native)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)
        if input_scale is not None:
            layer.input_scale = nn.Parameter(input_scale, requires_grad=False)

    def _read_part(self, tensors: Mapping[str, Tensor], shard: Shard) -> tuple[Tensor, Tensor | None]:
        """This rank's weight, and its scales: None where its blocks are cut or are not the kernels'."""
        whole, rows = tensors["weight"], slice(shard.first_row, shard.first_row + shard.num_rows)
        columns = slice(shard.first_column, shard.first_column + shard.num_columns)
        if self.form.strategy == "none":
            scale = whole.float().abs().amax(dim=1).clamp(min=1e-12) / self.max_value
            whole = self.quantize_weight(whole.float() / scale[:, None])
            return _pad_rows(whole[rows, columns], shard), _pad_rows(scale[rows], shard)
        weight, scale = _pad_rows(whole[rows, columns], shard), tensors[self.form.scale_name].float()
        if self.form.strategy != "block":
            return weight, _pad_rows(scale.reshape(-1).expand(len(whole))[rows], shard)
        edges = shard.first_row, shard.rows, shard.first_column, shard.num_columns
        if self.form.block != (BLOCK, BLOCK) or any(edge % BLOCK for edge in edges):
            return weight, None
        across = slice(shard.first_column // BLOCK, (shard.first_column + shard.num_columns) // BLOCK)
        return weight, scale[shard.first_row // BLOCK : (shard.first_row + shard.num_rows) // BLOCK, across]

    def _dequantize_part(self, tensors: Mapping[str, Tensor], shard: Shard) -> Tensor:
        whole = tensors["weight"].float() * _expand_scale(
            tensors[self.form.scale_name].float(), tensors["weight"], self.form.block
        )
        rows = slice(shard.first_row, shard.first_row + shard.num_rows)
        return _pad_rows(whole[rows, shard.first_column : shard.first_column + shard.num_columns], shard)

    @abstractmethod
    def quantize_weight(self, numbers: Tensor) -> Tensor:
        """``numbers`` (float32, within ``max_value``) rounded to the format's dtype."""


class Fp8Linear(ScaledLinear):
    """FP8 e4m3."""

    max_value = 448.0

    def get_kernels(self) -> Any:
        """Of FP8."""
        return import_module("quire.plugins.quant.kernels.fp8")

    def quantize_weight(self, numbers: Tensor) -> Tensor:
        """To the nearest."""
        return numbers.to(torch.float8_e4m3fn)


class Int8Linear(ScaledLinear):
    """INT8, its zero points zero."""

    max_value = 127.0

    def get_kernels(self) -> Any:
        """Of INT8."""
        return import_module("quire.plugins.quant.kernels.int8")

    def quantize_weight(self, numbers: Tensor) -> Tensor:
        """To the nearest, ties to even."""
        return numbers.round().to(torch.int8)


def _expand_scale(scale: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Scales (out,) or by block, to be multiplied with ``weight`` (out, in)."""
    if scale.ndim == 1:
        return scale[:, None]
    rows, columns = block
    return scale.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)[:, : weight.shape[1]]


def _pad_rows(tensor: Tensor, shard: Shard) -> Tensor:
    pad = shard.rows - shard.num_rows
    if pad == 0:
        return tensor
    return torch.cat([tensor, torch.zeros(pad, *tensor.shape[1:], device=tensor.device).to(tensor.dtype)])

"""No quantization: weights in the model's dtype, times many tokens by the library's GEMM, a few by our kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quire.sdk import (
    LayerInfo,
    LinearMethod,
    LowRankShrink,
    QuantActivation,
    QuantizationLoader,
    get_native_activation,
)
from quire.sdk.layers import check_tensor_shape
from quire.sdk.ops import SmallBatchGemm, get_small_batch_gemm

__all__ = ["Unquantized", "UnquantizedLinear"]


class Unquantized(QuantizationLoader):
    """Serves checkpoints without ``quantization_config``."""

    @dataclass(frozen=True)
    class Options:
        """Options of the loader."""

        small_batch_gemm: bool = True
        """Quire's kernels for a few tokens, where a table says that they are faster; false: the library's GEMM."""
        enable_pdl: bool = True
        """Launch those kernels with programmatic dependent launch (PDL), on GPUs that have it (Hopper and later)."""

    def __init__(self, quant_config: Mapping[str, Any], options: Options | None = None) -> None:
        super().__init__(quant_config, options)
        self.options = options or self.Options()

    @classmethod
    def unsupported(cls, quant_config: Mapping[str, Any], device: torch.device) -> list[str]:
        """A quantized checkpoint has other tensors than these layers expect."""
        method = quant_config.get("quant_method")
        return [f"the checkpoint is quantized with {method!r}"] if method else []

    def get_linear_method(self, info: LayerInfo) -> LinearMethod:
        """The same for every layer."""
        return UnquantizedLinear(self.options.small_batch_gemm, self.options.enable_pdl)


class UnquantizedLinear(LinearMethod):
    """``weight`` (out_features, in_features), the fused parts one above the other, and ``bias`` (out_features,)."""

    def __init__(self, small_batch_gemm: bool = True, enable_pdl: bool = True) -> None:
        self._use_small_batch_gemm = small_batch_gemm
        self._enable_pdl = enable_pdl
        self._small_batch_gemm: SmallBatchGemm | None = None

    def create_weights(self, layer: nn.Module, info: LayerInfo, device: torch.device) -> None:
        """The head's rows start at zero: where a sharded vocabulary is padded, no tensor fills them."""
        make = torch.zeros if info.kind == "lm_head" else torch.empty
        if self._use_small_batch_gemm:
            shape = info.out_features, info.in_features
            self._small_batch_gemm = get_small_batch_gemm(device, *shape, info.dtype, enable_pdl=self._enable_pdl)
        weight = make(info.out_features, info.in_features, dtype=info.dtype, device=device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if info.bias:
            bias = torch.zeros(info.out_features, dtype=info.dtype, device=device)
            layer.bias = nn.Parameter(bias, requires_grad=False)

    def append_rows(self, layer: nn.Module, num_rows: int) -> Tensor | None:
        """In one tensor with the weight, which begins it; a bias is zero there."""
        for name in ("weight", "bias"):
            own: Tensor | None = getattr(layer, name, None)
            if own is not None:
                wide = own.new_zeros(len(own) + num_rows, *own.shape[1:])
                wide[: len(own)] = own
                setattr(layer, name, nn.Parameter(wide[: len(own)], requires_grad=False))
                setattr(layer, f"wide_{name}", wide)
        return layer.wide_weight[-num_rows:]  # type: ignore[index]

    def load_tensor(
        self, layer: nn.Module, info: LayerInfo, part: int, tensor_name: str, tensor: Tensor, rank: int, world_size: int
    ) -> None:
        """Copy this rank's rows (column) or columns (row) of one part's weight or bias."""
        expected = (info.part_totals[part], info.in_total)[: 2 if tensor_name == "weight" else 1]
        check_tensor_shape(f"{info.part_names[part]}.{tensor_name}", tensor, expected)
        first, count = info.out_range(part, rank, world_size)
        at = sum(info.part_sizes[:part])
        shard = tensor[first : first + count]
        if tensor_name == "weight":
            start, width = info.in_range(rank)
            shard = shard[:, start : start + width]
        getattr(layer, tensor_name)[at : at + count].copy_(shard)

    def apply(self, layer: nn.Module, x: Tensor | QuantActivation, bias: Tensor | None = None) -> Tensor:
        """One GEMM."""
        x = get_native_activation(x)
        out = self.apply_fused(layer, x, bias)
        return F.linear(x, layer.weight, bias) if out is None else out  # type: ignore[arg-type]

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
        """For few tokens, where a table says that one kernel is faster."""
        if self._small_batch_gemm is None or activation not in (None, "silu"):
            return None
        weight: Tensor = layer.weight  # type: ignore[assignment]
        native, gated = get_native_activation(x), activation is not None
        return self._small_batch_gemm(native, weight, bias, norm=norm, gated=gated, residual=residual)

    def apply_appended(
        self,
        layer: nn.Module,
        x: Tensor,
        bias: Tensor | None,
        num_rows: int,
        *,
        norm: tuple[Tensor, float] | None = None,
    ) -> Tensor | None:
        """By the kernel that multiplies the weight alone, or by the library's."""
        features = len(layer.weight) + num_rows  # type: ignore[arg-type]
        weight: Tensor = layer.wide_weight[:features]  # type: ignore[index]
        if bias is not None:
            bias = layer.wide_bias[:features]  # type: ignore[index]
        out = None
        if self._small_batch_gemm is not None:
            out = self._small_batch_gemm(x, weight, bias, norm=norm)
        return F.linear(x, weight, bias) if out is None and norm is None else out

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
        """For so few tokens that they are added one by one."""
        if self._small_batch_gemm is None or activation not in (None, "silu"):
            return None
        weight: Tensor = layer.weight  # type: ignore[assignment]
        gated = activation is not None
        return self._small_batch_gemm(x, weight, bias, norm=norm, gated=gated, residual=residual, adapters=shrink)

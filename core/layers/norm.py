"""Norms as layers."""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quire.core.contracts.quant import ActivationFormat, QuantActivation
from quire.core.layers.checkpoint import CheckpointLayer, WeightLoader, make_copy_loader
from quire.core.layers.parallel import PartialSum
from quire.core.ops.operation_table import OperationTable

__all__ = ["LayerNorm", "RMSNorm"]

_NATIVE = ActivationFormat()


class RMSNorm(CheckpointLayer):
    """RMS norm over the last dimension; the weight is the same on every rank."""

    def __init__(
        self,
        name: str,
        size: int,
        eps: float,
        dtype: torch.dtype,
        device: torch.device,
        operations: OperationTable | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.operations = operations or OperationTable()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device), requires_grad=False)  # (size,)

    @overload
    def forward(self, x: Tensor | PartialSum) -> Tensor: ...
    @overload
    def forward(self, x: Tensor | PartialSum, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor | PartialSum, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``x`` (..., size). With a residual: ``(norm(x + residual), x + residual)``."""
        y, summed = self.norm_stream(x, residual, _NATIVE)
        assert isinstance(y, Tensor)
        return y if residual is None else (y, summed)

    def norm_stream(
        self, x: Tensor | PartialSum, residual: Tensor | None, output_format: ActivationFormat
    ) -> tuple[Tensor | QuantActivation, Tensor]:
        """``(norm(s), s)`` of the residual stream ``s = x + residual`` (``x`` where that is None), the first in
        ``output_format``; in one kernel with the exchange of a partial sum where the ranks offer it."""
        if isinstance(x, PartialSum):
            if residual is not None and "rms_norm" not in self.operations.replaced:
                fused = x.reduce_add_norm(residual, (self.weight, self.eps), output_format)
                if fused is not None:
                    return fused.normed, fused.stream
            x = x.reduce()
        return self.operations.rms_norm(x, self.weight, self.eps, residual, output_format)

    def weight_loaders(self) -> dict[str, WeightLoader]:
        """The weight."""
        return {f"{self.name}.weight": make_copy_loader(f"{self.name}.weight", self.weight)}


class LayerNorm(CheckpointLayer):
    """Layer norm over the last dimension (Ba et al., 2016, arXiv:1607.06450), the same on every rank."""

    def __init__(
        self, name: str, size: int, eps: float, dtype: torch.dtype, device: torch.device, bias: bool = True
    ) -> None:
        super().__init__()
        self.name = name
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device), requires_grad=False)  # (size,)
        self.bias = nn.Parameter(torch.zeros_like(self.weight), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., size), normed, scaled and shifted."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def weight_loaders(self) -> dict[str, WeightLoader]:
        """The weight, and the bias if there is one."""
        return {f"{self.name}.{key}": make_copy_loader(f"{self.name}.{key}", p) for key, p in self.named_parameters()}

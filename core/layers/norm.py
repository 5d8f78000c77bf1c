"""RMS norm as a layer."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from quire.core import ops
from quire.core.layers.checkpoint import CheckpointLayer, WeightLoader, check_tensor_shape

__all__ = ["RMSNorm"]


class RMSNorm(CheckpointLayer):
    """RMS norm over the last dimension; the weight is the same on every rank."""

    def __init__(self, name: str, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name = name
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device), requires_grad=False)  # (size,)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``x`` (..., size). With a residual: ``(norm(x + residual), x + residual)``."""
        y, summed = ops.rms_norm(x, self.weight, self.eps, residual)
        return y if residual is None else (y, summed)

    def weight_loaders(self) -> dict[str, WeightLoader]:
        """The weight."""
        return {f"{self.name}.weight": self._load_weight}

    def _load_weight(self, tensor: Tensor) -> None:
        check_tensor_shape(f"{self.name}.weight", tensor, self.weight.shape)
        self.weight.copy_(tensor)

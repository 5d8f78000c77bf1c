"""The two bundled implementations of every operation: in torch, and as Triton kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.core.contracts.attention import LayerKV
from quire.core.contracts.op import Operations
from quire.core.contracts.quant import ActivationFormat, QuantActivation
from quire.core.ops.activation import silu_and_mul_in_torch
from quire.core.ops.embedding import embedding
from quire.core.ops.norm import rms_norm_in_torch
from quire.core.ops.rope import rope_and_cache_in_torch

__all__ = ["TorchOperations", "TritonOperations"]


class TorchOperations(Operations):
    """Every operation in torch, on any device: what others are checked against."""

    @classmethod
    def unsupported(cls, device: torch.device) -> list[str]:
        """It runs everywhere."""
        return []

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, output_format: ActivationFormat
    ) -> tuple[Tensor | QuantActivation, Tensor]:
        """As the contract says."""
        return rms_norm_in_torch(x, weight, eps, residual, output_format)

    def silu_and_mul(self, gate_up: Tensor, output_format: ActivationFormat) -> Tensor | QuantActivation:
        """As the contract says."""
        return silu_and_mul_in_torch(gate_up, output_format)

    def rope_and_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        kv: LayerKV | None,
        slot_mapping: Tensor,
        *,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """As the contract says."""
        return rope_and_cache_in_torch(
            q, k, v, positions, cos_sin, kv, slot_mapping, q_norm=q_norm, k_norm=k_norm, eps=eps
        )

    def embedding(self, token_ids: Tensor, weight: Tensor, first_token_id: int, is_whole: bool) -> Tensor:
        """As the contract says."""
        return embedding(token_ids, weight, first_token_id, is_whole)

    def lm_head(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """By the library's GEMM."""
        return F.linear(hidden, weight)


class TritonOperations(Operations):
    """The norm, the activation and the rotary embedding with the KV write, a fused Triton kernel each."""

    @classmethod
    def unsupported(cls, device: torch.device) -> list[str]:
        """Anything but a CUDA GPU, and Triton's interpreter."""
        import triton

        if device.type == "cuda" or triton.knobs.runtime.interpret:
            return []
        return [f"it has Triton kernels, which {device.type} runs with TRITON_INTERPRET=1 alone"]

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, output_format: ActivationFormat
    ) -> tuple[Tensor | QuantActivation, Tensor]:
        """Rows of a matrix; of a tensor of more dimensions in torch."""
        if x.dim() != 2:
            return rms_norm_in_torch(x, weight, eps, residual, output_format)
        from quire.core.ops.kernels import norm_kernel

        return norm_kernel.launch_rms_norm(x, weight, eps, residual, output_format)

    def silu_and_mul(self, gate_up: Tensor, output_format: ActivationFormat) -> Tensor | QuantActivation:
        """As the contract says."""
        from quire.core.ops.kernels import activation_kernel

        result: Tensor | QuantActivation = activation_kernel.launch_silu_and_mul(gate_up, output_format)
        return result

    def rope_and_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        kv: LayerKV | None,
        slot_mapping: Tensor,
        *,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """As the contract says."""
        from quire.core.ops.kernels import rope_kernel

        return rope_kernel.launch_rope_and_cache(q, k, v, positions, cos_sin, kv, slot_mapping, q_norm, k_norm, eps)

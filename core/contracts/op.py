"""Operation: the norm, the activation, rotary positions with the KV write, the embedding or the head of a forward pass.

A class offers the operations whose methods it overrides, and ``--op NAME=PLUGIN`` puts one of them in the place of
Quire's: it is resolved once, when the worker starts, and layers then call the method itself. Each has an implementation
in torch to be checked against, that of the plugin ``torch``.

Every method is called in the forward pass of a step, which may be captured as a CUDA graph: it only launches kernels,
never waits for the device and never looks at values. Kernels that would contain the operation, such as a GEMM with the
norm before it, are not used where the operation is replaced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from quire.core.contracts.attention import LayerKV
from quire.core.contracts.quant import ActivationFormat, QuantActivation
from quire.core.plugin.registry import OPERATIONS

__all__ = ["OPERATIONS", "Operations"]


class Operations(ABC):
    """What one plugin offers. Override the operations that you have; constructed once a worker."""

    def __init__(self, device: torch.device, options: Any = None) -> None:
        self.device = device
        self.options = options

    @classmethod
    @abstractmethod
    def unsupported(cls, device: torch.device) -> list[str]:
        """Why it cannot run on ``device``, a reason each; empty if it can. Refused at start."""

    @classmethod
    def list_operations(cls) -> list[str]:
        """The operations that it has: those of ``OPERATIONS`` that the class overrides."""
        return [name for name in OPERATIONS if getattr(cls, name) is not getattr(Operations, name)]

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, output_format: ActivationFormat
    ) -> tuple[Tensor | QuantActivation, Tensor]:
        """``(y, s)`` of ``s = x + residual`` (``x`` where that is None) and ``y = weight * s / sqrt(mean(s^2) + eps)``.

        ``x`` (..., features), ``weight`` (features,). The mean is taken in float32, and the scaled value is rounded to
        ``x``'s dtype before the weight multiplies it. ``y`` is in ``output_format``: that of the model where its kind
        is ``native``, else ``quire.sdk.ops.quantize_activation(y, output_format)`` or the same fused.
        """
        raise NotImplementedError

    def silu_and_mul(self, gate_up: Tensor, output_format: ActivationFormat) -> Tensor | QuantActivation:
        """``silu(gate) * up``: (num_tokens, 2 * features), gate first -> (num_tokens, features), in
        ``output_format``."""
        raise NotImplementedError

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
        """Norm (where weights are given) and rotate ``q`` and ``k``, then write ``k`` and ``v`` to their slots.

        ``q`` (num_tokens, num_heads, dim), ``k`` and ``v`` (num_tokens, num_kv_heads, dim), with strides; ``positions``
        (num_tokens,) int64; ``cos_sin`` (max_positions, rotary_dim) float32, cosines then sines, of pairs (i, i +
        rotary_dim / 2); ``q_norm`` and ``k_norm`` (dim,); ``slot_mapping`` (num_tokens,) int64: block * block_size +
        offset. Returns the new ``q`` and ``k``, which may be the old ones overwritten. Where ``kv`` is None nothing is
        written: the attention backend will. A cache of one byte an element holds values divided by its scales.
        """
        raise NotImplementedError

    def embedding(self, token_ids: Tensor, weight: Tensor, first_token_id: int, is_whole: bool) -> Tensor:
        """Rows of ``weight`` (rows, hidden) for ``token_ids`` (num_tokens,) int -> (num_tokens, hidden).

        Where ``weight`` holds only the tokens ``first_token_id .. first_token_id + rows`` (``is_whole`` is False),
        other tokens give zeros.
        """
        raise NotImplementedError

    def lm_head(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits: ``hidden`` (n, hidden) times ``weight`` (rows, hidden), in the model's dtype -> (n, rows). A head
        whose weights are quantized is refused."""
        raise NotImplementedError

"""The gated MLP of Llama and its relatives (SwiGLU: Shazeer, 2020, arXiv:2002.05202)."""

from __future__ import annotations

from torch import Tensor, nn

from quire.core.errors import CheckpointError
from quire.core.layers.builder import LayerBuilder
from quire.core.layers.norm import RMSNorm
from quire.core.layers.parallel import PartialSum

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``, gate and up in one matrix, with the norm before it and the residual after it."""

    def __init__(
        self,
        builder: LayerBuilder,
        name: str,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ("silu", "swish"):
            raise CheckpointError(
                f"hidden_act {activation!r} in config.json is not supported by this architecture; only 'silu' is"
            )
        parts = {f"{name}.gate_proj": intermediate_size, f"{name}.up_proj": intermediate_size}
        self.gate_up_proj = builder.make_column_parallel_linear(f"{name}.gate_up_proj", hidden_size, parts, bias)
        self.down_proj = builder.make_row_parallel_linear(f"{name}.down_proj", intermediate_size, hidden_size, bias)

    def forward(
        self, norm: RMSNorm, x: Tensor | PartialSum, residual: Tensor | None
    ) -> tuple[Tensor | PartialSum, Tensor | None]:
        """Norm the stream ``x + residual`` (num_tokens, hidden) and add the result to it, as in
        ``Linear.forward_add_residual``."""
        y, stream = self.gate_up_proj.forward_after_norm(norm, x, residual, activation="silu", consumer=self.down_proj)
        return self.down_proj.forward_add_residual(y, stream)

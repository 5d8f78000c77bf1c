"""Which function runs each operation of a forward pass: chosen once, when a worker starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from quire.core.contracts.op import OPERATIONS, Operations
from quire.core.contracts.quant import QuantActivation
from quire.core.errors import ConfigError
from quire.core.ops.activation import silu_and_mul_quantized
from quire.core.ops.embedding import embedding
from quire.core.ops.norm import rms_norm_quantized
from quire.core.ops.rope import rope_and_cache

__all__ = ["OperationTable", "check_operation_name"]


@dataclass(frozen=True, slots=True)
class OperationTable:
    """The functions that layers call. Quire's own, unless a plugin of kind ``op`` takes the place of one."""

    rms_norm: Callable[..., tuple[Tensor | QuantActivation, Tensor]] = rms_norm_quantized
    silu_and_mul: Callable[..., Tensor | QuantActivation] = silu_and_mul_quantized
    rope_and_cache: Callable[..., tuple[Tensor, Tensor]] = rope_and_cache
    embedding: Callable[..., Tensor] = embedding
    lm_head: Callable[[Tensor, Tensor], Tensor] | None = None
    """None: the head multiplies itself, by the kernels of its linear method."""
    replaced: frozenset[str] = field(default_factory=frozenset)
    """Operations of a plugin: no fused kernel may swallow one."""

    def replace_operations(self, plugins: Mapping[str, Operations]) -> OperationTable:
        """This table with the operations named in ``plugins`` run by them."""
        functions: dict[str, Any] = {name: getattr(plugin, name) for name, plugin in plugins.items()}
        return replace(self, **functions, replaced=self.replaced | plugins.keys())


def check_operation_name(name: str, plugin_class: type[Operations], plugin_name: str) -> None:
    """Raise ``ConfigError`` unless ``plugin_class`` has the operation ``name``."""
    offered = plugin_class.list_operations()
    if name not in offered:
        raise ConfigError(
            f"--op {name}={plugin_name}: {plugin_name} has no {name}; it has {', '.join(offered) or 'no operation'}"
            + ("" if name in OPERATIONS else f", and {name} is none of {', '.join(OPERATIONS)}")
        )

"""A call of an operation with random arguments: what its checks compare with torch, and what its benchmark times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from quire.core.contracts.attention import LayerKV
from quire.core.contracts.op import Operations
from quire.core.contracts.quant import ActivationFormat, QuantActivation

ActivationKind = Literal["native", "fp8_token", "fp8_tensor", "fp8_group", "int8_token"]

__all__ = ["OperationProblem", "OperationShape", "make_problem"]

_EPS = 1e-5
_BLOCK_SIZE = 16
_MAX_POSITIONS = 512


@dataclass(frozen=True, slots=True)
class OperationShape:
    """Sizes of a model. The defaults are small, and no powers of two."""

    hidden: int = 96
    intermediate: int = 72
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 16
    vocab: int = 67


@dataclass(frozen=True)
class OperationProblem:
    """One call. ``label`` says in words which."""

    operation: str
    label: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)

    def run(self, operations: Operations) -> Any:
        """What the operation returns for these arguments."""
        return getattr(operations, self.operation)(*self.arguments, **self.keywords)

    def solve(self, operations: Operations) -> dict[str, Tensor]:
        """Every result by name, the KV cache that was written included. The arguments stay as they are."""
        copy = self.map_tensors(torch.clone)
        result = copy.run(operations)
        is_one = isinstance(result, Tensor | QuantActivation)
        named = {"result": result} if is_one else dict(zip(("first result", "second result"), result, strict=True))
        results: dict[str, Tensor] = {}
        for name, value in named.items():
            if isinstance(value, QuantActivation):
                results[f"{name}, quantized"], results[f"{name}, its scale"] = value.values, value.scale
            else:
                results[name] = value
        for each in copy.arguments:
            if isinstance(each, LayerKV):
                results |= {"cache of keys": each.k, "cache of values": each.v}
        return results

    def map_tensors(self, change: Any) -> OperationProblem:
        """The same call with ``change`` applied to every tensor. Strided views become what ``change`` makes of them."""

        def convert(value: Any) -> Any:
            if isinstance(value, LayerKV):
                return LayerKV(change(value.k), change(value.v))
            return change(value) if isinstance(value, Tensor) else value

        keywords = {name: convert(value) for name, value in self.keywords.items()}
        return OperationProblem(self.operation, self.label, tuple(map(convert, self.arguments)), keywords)

    def count_bytes(self) -> int:
        """Bytes that the call has to move at least: what it reads of its arguments, and writes of its results."""
        tokens = len(self.arguments[0])
        if self.operation == "embedding":
            return 2 * tokens * _count(self.arguments[1][:1])
        if self.operation == "rope_and_cache":
            return 2 * sum(map(_count, self.arguments[:3]))
        if self.operation == "lm_head":
            hidden, weight = self.arguments
            return _count(hidden) + _count(weight) + tokens * len(weight) * int(weight.element_size())
        read = sum(_count(x) for x in self.arguments if isinstance(x, Tensor))
        written = _count(self.arguments[0]) // (2 if self.operation == "silu_and_mul" else 1)
        has_sum = self.operation == "rms_norm" and self.arguments[3] is not None
        return read + written * (2 if has_sum else 1)


def make_problem(
    operation: str,
    num_tokens: int,
    shape: OperationShape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    variant: bool = False,
    output_format: ActivationKind = "native",
    seed: int = 0,
) -> OperationProblem:
    """A call for ``num_tokens`` tokens of a model of ``shape``.

    ``variant``: of the norm, one with a residual; of the rotary embedding, one that norms queries and keys; of the
    embedding, a shard of the vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    scale = torch.tensor([0.02], device=device) if output_format == "fp8_tensor" else None
    wanted = ActivationFormat(output_format, scale)
    label = f"{operation} of {num_tokens} tokens in {str(dtype).removeprefix('torch.')}"
    label += ("" if output_format == "native" else f", result in {output_format}") + _VARIANTS[operation] * variant
    if operation == "rms_norm":
        x, weight = normal(num_tokens, shape.hidden), normal(shape.hidden)
        residual = normal(num_tokens, shape.hidden) if variant else None
        return OperationProblem(operation, label, (x, weight, _EPS, residual, wanted))
    if operation == "silu_and_mul":
        return OperationProblem(operation, label, (normal(num_tokens, 2 * shape.intermediate), wanted))
    if operation == "embedding":
        ids = torch.randint(0, shape.vocab, (num_tokens,), generator=generator).to(device)
        first = shape.vocab // 3 if variant else 0
        weight = normal(shape.vocab - first - (shape.vocab // 4 if variant else 0), shape.hidden)
        return OperationProblem(operation, label, (ids, weight, first, not variant))
    if operation == "lm_head":
        return OperationProblem(operation, label, (normal(num_tokens, shape.hidden), normal(shape.vocab, shape.hidden)))
    assert operation == "rope_and_cache", operation
    sizes = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    # As a fused projection gives them: three views, whose rows are strided.
    qkv = normal(num_tokens, sum(sizes), shape.head_dim).split(sizes, dim=1)
    positions = torch.randint(0, _MAX_POSITIONS, (num_tokens,), generator=generator).to(device)
    angles = torch.outer(torch.arange(_MAX_POSITIONS).float(), 1e4 ** -torch.linspace(0, 0.9, shape.head_dim // 2))
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1).to(device)
    num_blocks = num_tokens // _BLOCK_SIZE + 3
    slots = torch.randperm(num_blocks * _BLOCK_SIZE, generator=generator)[:num_tokens].to(device)
    caches = [normal(num_blocks, shape.num_kv_heads, _BLOCK_SIZE, shape.head_dim) for _ in range(2)]
    norms = {name: normal(shape.head_dim) if variant else None for name in ("q_norm", "k_norm")}
    arguments = (*qkv, positions, cos_sin, LayerKV(*caches), slots)
    return OperationProblem(operation, label, arguments, {**norms, "eps": _EPS})


def _count(x: Tensor) -> int:
    """Bytes."""
    return x.numel() * x.element_size()


_VARIANTS = {
    "rms_norm": ", with a residual",
    "silu_and_mul": "",
    "rope_and_cache": ", which norms queries and keys",
    "embedding": ", of a shard",
    "lm_head": "",
}

"""Checkpoints of the compressed-tensors library, as llmcompressor writes them: a scheme for each group of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.plugins.quant.deferred_linear import StoredTensor
from quire.plugins.quant.example_weights import RandomCodes, pack_rows
from quire.plugins.quant.grouped import FLOATS, GroupedFormat
from quire.plugins.quant.grouped_weights import GroupedWeights, group_by_index, unpack_codes
from quire.plugins.quant.layerwise import LayerwiseLoader, Scheme, is_block, is_invalid_group_size
from quire.plugins.quant.scaled import ScaledFormat
from quire.plugins.quant.shards import COLUMNS, ROWS, Axis
from quire.sdk import StoredWeight

__all__ = ["CompressedTensors", "PackedFormat"]

_Args = Mapping[str, Any]
_SUPPORTED = "8-bit float (FP8), 8-bit int (INT8) and packed 2- to 8-bit int weights with 16-bit activations are"


class CompressedTensors(LayerwiseLoader):
    """Reads ``quant_method: compressed-tensors``: FP8 and INT8 with or without quantized activations, and packed
    weights of 2 to 8 bits (W4A16)."""

    @classmethod
    def find_unsupported(cls, quant_config: _Args, device: torch.device) -> list[str]:
        """Other methods, sparsity, rotations, and schemes that have no layer here."""
        if reasons := cls.check_quant_method(quant_config, "compressed-tensors"):
            return reasons
        reasons = []
        sparse = (quant_config.get("sparsity_config") or {}).get("format") or "dense"
        if sparse != "dense":
            reasons.append(f"sparse weights ({sparse!r}) are not supported; only dense ones are")
        if quant_config.get("transform_config"):
            reasons.append("weights with transforms (transform_config) are not supported")
        groups = quant_config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            return [*reasons, "its quantization_config has no config_groups"]
        for name, group in groups.items():
            try:
                _parse_scheme(quant_config, group)
            except _UnsupportedError as error:
                reasons.append(f"{name}: {error}")
        return reasons

    @classmethod
    def find_unsupported_for(cls, dtype: torch.dtype, quant_config: _Args, device: torch.device) -> list[str]:
        """``unsupported``, and groups whose weights are not of ``dtype``."""
        reasons = cls.unsupported(quant_config, device)
        if not reasons and any(
            not isinstance(scheme := _parse_scheme(quant_config, group), ScaledFormat) or scheme.dtype != dtype
            for group in quant_config["config_groups"].values()
        ):
            reasons.append("the checkpoint has weights of another kind: leave out --quantization")
        return reasons

    @classmethod
    def example_config(cls) -> _Args:
        """W4A16 in groups of 32."""
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
        group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
        return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}

    @classmethod
    def example_tensors(cls, outputs: int, inputs: int) -> StoredWeight:
        """Codes along a row, eight above their value."""
        random = RandomCodes.make(outputs, inputs)
        tensors = {
            "weight_packed": pack_rows(random.codes, 4),
            "weight_scale": random.scales,
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        return StoredWeight(tensors, random.dequantize(torch.full_like(random.zeros, 8)))

    def get_scheme(self, name: str, kind: str) -> Scheme:
        """That of the group with the narrowest target: the name itself, then an expression, then all linear layers."""
        if _rank_match(name, self.quant_config.get("ignore")):
            return None
        best = None
        for group in self.quant_config["config_groups"].values():
            if (rank := _rank_match(name, group.get("targets"))) and (best is None or rank > best[0]):
                best = rank, group
        return None if best is None else _parse_scheme(self.quant_config, best[1])


@dataclass(frozen=True)
class PackedFormat(GroupedFormat):
    """``weight_packed`` int32 (out, in * bits / 32), a row's codes a stream of bits, each plus ``2 ** (bits - 1)``;
    ``weight_scale`` (out, groups); ``weight_zero_point`` (out * bits / 32, groups) packed likewise down a column."""

    permuted: bool = False
    """Whether ``weight_g_idx`` says which group an input is of."""

    @property
    def index_name(self) -> str:
        """``weight_g_idx``."""
        return "weight_g_idx"

    def get_stored_tensors(self, outputs: int, inputs: int) -> Mapping[str, StoredTensor]:
        """And the weight's shape before it was packed."""
        groups = self.count_groups(inputs)
        stored = {
            "weight_packed": StoredTensor(
                (outputs, -(-inputs * self.bits // 32)), (torch.int32,), (ROWS, Axis("columns", 32, self.bits))
            ),
            "weight_scale": StoredTensor((outputs, groups), FLOATS, (ROWS, self.group_axis)),
            "weight_shape": StoredTensor((2,), (torch.int64, torch.int32), expected_values=(outputs, inputs)),
        }
        if not self.symmetric:
            stored["weight_zero_point"] = StoredTensor(
                (-(-outputs * self.bits // 32), groups), (torch.int32,), (Axis("rows", 32, self.bits), self.group_axis)
            )
        if self.permuted:
            stored["weight_g_idx"] = StoredTensor(
                (inputs,), (torch.int32, torch.int64), (COLUMNS,), optional=True, upper_bound=groups
            )
        return stored

    def unpack_tensors(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> GroupedWeights:
        """Rows stay rows."""
        codes, scales = unpack_codes(tensors["weight_packed"], self.bits, inputs), tensors["weight_scale"]
        zeros = None
        if not self.symmetric:
            zeros = unpack_codes(tensors["weight_zero_point"].T.contiguous(), self.bits, outputs).T.contiguous()
        size = inputs if self.group_size == -1 else self.group_size
        return group_by_index(tensors.get("weight_g_idx"), codes, scales, zeros, self.bits, size)


class _UnsupportedError(ValueError):
    """Why a group of layers has no scheme here."""


def _parse_scheme(config: _Args, group: Any) -> GroupedFormat | ScaledFormat:
    """The scheme of a config group; ``_UnsupportedError`` if there is none."""
    if not isinstance(group, Mapping):
        raise _UnsupportedError(f"the scheme {group!r} is not written out")
    weights, inputs = group.get("weights"), group.get("input_activations")
    form = group.get("format") or config.get("format")
    if not weights:
        raise _UnsupportedError("layers whose activations alone are quantized are not supported")
    if group.get("output_activations"):
        raise _UnsupportedError("quantized output activations are not supported")
    bits, kind, strategy = weights.get("num_bits", 8), weights.get("type", "int"), _get_strategy(weights)
    what = f"{bits}-bit {kind} weights by {strategy}"
    if weights.get("dynamic"):
        raise _UnsupportedError(f"{what} quantized dynamically are not supported")
    if form == "pack-quantized" and kind == "int" and not inputs:
        if bits not in range(2, 9) or strategy not in ("group", "channel"):
            raise _UnsupportedError(f"{what} are not supported; {_SUPPORTED}")
        size = weights["group_size"] if strategy == "group" else -1
        if is_invalid_group_size(size):
            raise _UnsupportedError(f"{what} in groups of {size!r} are not supported")
        permuted = weights.get("actorder") in ("group", "dynamic")
        return PackedFormat(int(bits), int(size), symmetric=bool(weights.get("symmetric", True)), permuted=permuted)
    plain = form in ("int-quantized", "float-quantized", "naive-quantized")
    if not plain or bits != 8 or kind not in ("int", "float") or not weights.get("symmetric", True):
        sort = "symmetric" if weights.get("symmetric", True) else "asymmetric"
        raise _UnsupportedError(
            f"{sort} {what} in format {form!r}{_describe_inputs(inputs)} are not supported; {_SUPPORTED}"
        )
    if strategy not in (("tensor", "channel", "block") if kind == "float" else ("tensor", "channel")):
        raise _UnsupportedError(f"{what} are not supported; {_SUPPORTED}")
    block = weights.get("block_structure") or (128, 128)
    if not is_block(block):
        raise _UnsupportedError(f"{what} in blocks of {block!r} are not supported")
    return ScaledFormat(
        torch.float8_e4m3fn if kind == "float" else torch.int8,
        strategy,  # type: ignore[arg-type]
        _parse_inputs(what, kind, inputs),
        block=(int(block[0]), int(block[1])),
    )


def _parse_inputs(what: str, kind: str, inputs: _Args | None) -> Any:
    """How activations are quantized."""
    if not inputs:
        return "native"
    usual = inputs.get("num_bits", 8) == 8 and inputs.get("type", "int") == kind and inputs.get("symmetric", True)
    strategy = _get_strategy(inputs)
    if usual and inputs.get("dynamic") is True and strategy in ("token", "tensor", "group"):
        return "dynamic"
    if usual and not inputs.get("dynamic") and strategy == "tensor":
        return "static"
    raise _UnsupportedError(
        f"{what}{_describe_inputs(inputs)} are not supported; symmetric 8-bit {kind} ones by token, or with one scale, "
        f"are"
    )


def _describe_inputs(inputs: _Args | None) -> str:
    if not inputs:
        return ""
    sort = "symmetric" if inputs.get("symmetric", True) else "asymmetric"
    bits, kind = inputs.get("num_bits", 8), inputs.get("type", "int")
    return f" with {sort} {bits}-bit {kind} activations by {_get_strategy(inputs)}"


def _get_strategy(args: _Args) -> str:
    """As written, or as the group size implies."""
    size = args.get("group_size")
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    return str(args.get("strategy") or implied)


def _rank_match(name: str, targets: Any) -> int:
    """How narrowly one of ``targets`` hits the layer ``name``: 3 by name, 2 by expression, 1 by class, 0 not at all."""
    best = 0
    for target in targets or ():
        if target == name:
            return 3
        if target.startswith("re:") and re.match(target[3:], name):
            best = 2
        elif target == "Linear":
            best = max(best, 1)
    return best

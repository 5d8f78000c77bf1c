"""GPTQ checkpoints (Frantar et al., 2022, arXiv:2210.17323), as AutoGPTQ, GPTQModel and auto-round write them."""

from __future__ import annotations

import math
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
from quire.plugins.quant.layerwise import LayerwiseLoader, Scheme, is_invalid_group_size
from quire.plugins.quant.shards import COLUMNS, ROWS, Axis
from quire.sdk import StoredWeight

__all__ = ["BITS", "GPTQ", "GPTQFormat"]

BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")


class GPTQ(LayerwiseLoader):
    """Reads ``quant_method: gptq``: both meanings of the zero points, inputs in order of activation, and per-layer
    overrides (``dynamic``)."""

    @classmethod
    def find_unsupported(cls, quant_config: Mapping[str, Any], device: torch.device) -> list[str]:
        """Other methods, bits, and packings made for one kernel."""
        if reasons := cls.check_quant_method(quant_config, "gptq"):
            return reasons
        reasons, form = [], _get_format(quant_config)
        if form not in _FORMATS:
            reasons.append(f"GPTQ format {form!r} is not supported; only {' and '.join(_FORMATS)} are")
        if (words := quant_config.get("pack_dtype") or "int32") != "int32":
            reasons.append(f"GPTQ codes packed in {words} are not supported; only in int32")
        for config in (quant_config, *(quant_config.get("dynamic") or {}).values()):
            if config.get("bits", 4) not in BITS:
                reasons.append(f"GPTQ with {config['bits']!r} bits is not supported; only 2, 3, 4 and 8 are")
            size = config.get("group_size", 128)
            if is_invalid_group_size(size):
                reasons.append(f"GPTQ group size {size!r} is not supported; it must be -1 or positive")
        return reasons

    @classmethod
    def example_config(cls) -> Mapping[str, Any]:
        """Four bits in groups of 32."""
        return {"quant_method": "gptq", "bits": 4, "group_size": 32}

    @classmethod
    def example_tensors(cls, outputs: int, inputs: int) -> StoredWeight:
        """Codes packed down a column, zero points less one along a row."""
        random = RandomCodes.make(outputs, inputs)
        tensors = {
            "qweight": pack_rows(random.codes, 4).T.contiguous(),
            "qzeros": pack_rows(random.zeros.T - 1, 4),
            "scales": random.scales.T.contiguous(),
            "g_idx": torch.arange(inputs, dtype=torch.int32) // random.group_size,
        }
        return StoredWeight(tensors, random.dequantize())

    def get_scheme(self, name: str, kind: str) -> Scheme:
        """The format of most layers, unless ``dynamic`` has another for ``name`` or leaves it out; the head where
        ``lm_head`` is true."""
        config = self.quant_config
        inside = [part for block in config.get("modules_in_block_to_quantize") or () for part in _flatten_block(block)]
        if kind == "lm_head":
            if not config.get("lm_head"):
                return None
        elif inside and not any(name.endswith(f".{part}") for part in inside):
            return None
        for pattern, override in (config.get("dynamic") or {}).items():
            if re.match(pattern[2:] if pattern[:2] in ("-:", "+:") else pattern, name):
                if pattern.startswith("-:"):
                    return None
                config = {**config, **override}
                break
        return GPTQFormat(
            int(config.get("bits", 4)),
            int(config.get("group_size", 128)),
            symmetric=bool(config.get("sym", True)),
            old_zeros=_get_format(self.quant_config) == "gptq",
            words_borrow=_is_from_gptqmodel(self.quant_config),
        )


@dataclass(frozen=True)
class GPTQFormat(GroupedFormat):
    """``qweight`` int32 (in * bits / 32, out), inputs packed down a column; ``qzeros`` (groups, out * bits / 32),
    outputs packed along a row; ``scales`` (groups, out); ``g_idx`` (in,), the group of each input."""

    old_zeros: bool = True
    """Zero points are stored less one."""
    words_borrow: bool = False
    """One was subtracted from words of packed zero points, not from each: it may have borrowed from the next."""

    @property
    def size_multiples(self) -> tuple[int, int]:
        """Whole words."""
        return self._word[0], self._word[0]

    @property
    def index_name(self) -> str:
        """``g_idx``."""
        return "g_idx"

    @property
    def _word(self) -> tuple[int, int]:
        """Codes of the fewest whole words, and how many words those are."""
        words = self.bits // math.gcd(self.bits, 32)
        return words * 32 // self.bits, words

    def get_stored_tensors(self, outputs: int, inputs: int) -> Mapping[str, StoredTensor]:
        """``g_idx`` where it is not simply in order."""
        groups = self.count_groups(inputs)
        return {
            "qweight": StoredTensor(
                (inputs * self.bits // 32, outputs), (torch.int32,), (Axis("columns", *self._word), ROWS)
            ),
            "qzeros": StoredTensor(
                (groups, outputs * self.bits // 32), (torch.int32,), (self.group_axis, Axis("rows", *self._word))
            ),
            "scales": StoredTensor((groups, outputs), FLOATS, (self.group_axis, ROWS)),
            "g_idx": StoredTensor((inputs,), (torch.int32, torch.int64), (COLUMNS,), True, groups),
        }

    def unpack_tensors(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> GroupedWeights:
        """Outputs first, and inputs sorted by group."""
        codes = unpack_codes(tensors["qweight"].T.contiguous(), self.bits)
        zeros, scales = self._unpack_zeros(tensors["qzeros"]).T.contiguous(), tensors["scales"].T.contiguous()
        size = inputs if self.group_size == -1 else self.group_size
        return group_by_index(tensors.get("g_idx"), codes, scales, zeros, self.bits, size)

    def _unpack_zeros(self, words: Tensor) -> Tensor:
        """(groups, out) uint8."""
        if not self.old_zeros:
            return unpack_codes(words, self.bits)
        if self.words_borrow and 32 % self.bits == 0:
            ones = sum(1 << at for at in range(0, 32, self.bits))
            words = ((words.long() & 0xFFFFFFFF) + ones).to(torch.int32)
            return unpack_codes(words, self.bits)
        return (unpack_codes(words, self.bits) + 1) & ((1 << self.bits) - 1)


def _get_format(config: Mapping[str, Any]) -> str:
    if config.get("is_marlin_format"):
        return "marlin"
    return str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()


def _is_from_gptqmodel(config: Mapping[str, Any]) -> bool:
    meta = config.get("meta") or {}
    makers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    return any(str(maker).startswith("gptqmodel") for maker in ([makers] if isinstance(makers, str) else makers or ()))


def _flatten_block(block: Any) -> list[str]:
    return [block] if isinstance(block, str) else [str(part) for part in block]

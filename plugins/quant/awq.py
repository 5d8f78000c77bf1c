"""AWQ checkpoints (Lin et al., 2023, arXiv:2306.00978), as autoawq and auto-round write them: 4 bits, zero points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.plugins.quant.deferred_linear import StoredTensor
from quire.plugins.quant.example_weights import RandomCodes, pack_rows
from quire.plugins.quant.grouped import FLOATS, GroupedFormat
from quire.plugins.quant.grouped_weights import AWQ_ORDER, GroupedWeights, unpack_codes
from quire.plugins.quant.layerwise import LayerwiseLoader, Scheme, is_invalid_group_size
from quire.plugins.quant.shards import COLUMNS, ROWS, Axis
from quire.sdk import StoredWeight

__all__ = ["AWQ", "GemmFormat", "GemvFastFormat", "GemvFormat"]


class AWQ(LayerwiseLoader):
    """Reads ``quant_method: awq`` in each of its packings; the head is never quantized."""

    @classmethod
    def find_unsupported(cls, quant_config: Mapping[str, Any], device: torch.device) -> list[str]:
        """Other methods, other bits, and packings made for one kernel."""
        if reasons := cls.check_quant_method(quant_config, "awq"):
            return reasons
        reasons = []
        bits, version = _get_bits(quant_config), _get_version(quant_config)
        if bits != 4:
            reasons.append(f"AWQ with {bits!r} bits is not supported; only 4 bits are")
        if version not in _FORMATS:
            reasons.append(f"AWQ packing {version!r} is not supported; only {', '.join(_FORMATS)} are")
        if is_invalid_group_size(size := _get_group_size(quant_config)):
            reasons.append(f"AWQ group size {size!r} is not supported; it must be -1 or positive")
        elif version.startswith("gemv") and size not in (-1, 32, 64) and size < 128:
            reasons.append(f"AWQ packing {version!r} has no group size {size}; only 32, 64, 128 and larger")
        return reasons

    @classmethod
    def example_config(cls) -> Mapping[str, Any]:
        """Four bits in groups of 32."""
        return {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}

    @classmethod
    def example_tensors(cls, outputs: int, inputs: int) -> StoredWeight:
        """Columns eight a word, the even ones in the lower half."""
        random, order = RandomCodes.make(outputs, inputs), (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {
            "qweight": pack_rows(random.codes.T, 4, order),
            "qzeros": pack_rows(random.zeros.T, 4, order),
            "scales": random.scales.T.contiguous(),
        }
        return StoredWeight(tensors, random.dequantize())

    def get_scheme(self, name: str, kind: str) -> Scheme:
        """One format for all layers but the head and those that ``modules_to_not_convert`` has a part of in it."""
        skipped = self.quant_config.get("modules_to_not_convert") or ()
        if kind == "lm_head" or any(part in name for part in skipped):
            return None
        return _FORMATS[_get_version(self.quant_config)](4, int(_get_group_size(self.quant_config)))


@dataclass(frozen=True)
class GemmFormat(GroupedFormat):
    """``qweight`` int32 (in, out / 8) with eight columns a word, out of order; ``qzeros`` alike, by group."""

    @property
    def size_multiples(self) -> tuple[int, int]:
        """Whole words and whole groups."""
        return 8, max(1, self.group_size)

    def get_stored_tensors(self, outputs: int, inputs: int) -> Mapping[str, StoredTensor]:
        """Three tensors."""
        groups = self.count_groups(inputs)
        return {
            "qweight": StoredTensor((inputs, outputs // 8), (torch.int32,), (COLUMNS, Axis("rows", 8))),
            "qzeros": StoredTensor((groups, outputs // 8), (torch.int32,), (self.group_axis, Axis("rows", 8))),
            "scales": StoredTensor((groups, outputs), FLOATS, (self.group_axis, ROWS)),
        }

    def unpack_tensors(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> GroupedWeights:
        """Put columns in order, and outputs first."""
        codes, zeros = (
            unpack_codes(tensors[name], 4).unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1).T.contiguous()
            for name in ("qweight", "qzeros")
        )
        return GroupedWeights.from_codes(codes, tensors["scales"].T.contiguous(), zeros, 4)


@dataclass(frozen=True)
class GemvFormat(GroupedFormat):
    """``qweight`` int32 (out, in / 8) in order; scales and zeros (out, groups), padded to what the kernel reads."""

    @property
    def columns_can_be_cut(self) -> bool:
        """No: a word holds the zero points of eight groups, and the padding is that of the whole."""
        return False

    @property
    def size_multiples(self) -> tuple[int, int]:
        """Whole words and whole groups."""
        return 1, max(8, self.group_size)

    def get_stored_tensors(self, outputs: int, inputs: int) -> Mapping[str, StoredTensor]:
        """Three tensors."""
        words = self.count_zero_words(inputs)
        return {
            "qweight": StoredTensor((outputs, inputs // 8), (torch.int32,), (ROWS,)),
            "qzeros": StoredTensor((outputs, words), (torch.int32,), (ROWS,)),
            "scales": StoredTensor((outputs, words * 8), FLOATS, (ROWS,)),
        }

    def unpack_tensors(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> GroupedWeights:
        """Leave out the padding."""
        groups = self.count_groups(inputs)
        zeros = unpack_codes(tensors["qzeros"], 4, groups)
        return GroupedWeights.from_codes(
            unpack_codes(tensors["qweight"], 4), tensors["scales"][:, :groups].contiguous(), zeros, 4
        )

    def count_zero_words(self, inputs: int) -> int:
        """Words of zero points in a row: padded to whole words, and to 2 or 4 of them where groups are smaller."""
        size = inputs if self.group_size == -1 else self.group_size
        multiple = {32: 4, 64: 2}.get(size, 1)
        words = -(-(inputs // size) // 8)
        return -(-words // multiple) * multiple


@dataclass(frozen=True)
class GemvFastFormat(GemvFormat):
    """``qweight`` int16 (out / 4, in): four rows interleaved by 64 inputs, and the inputs of 32 shuffled.

    ``qzeros`` are float16, minus the zero point times the scale; both they and the scales (groups, out), padded.
    """

    @property
    def size_multiples(self) -> tuple[int, int]:
        """Whole tiles and whole groups."""
        return 4, max(64, self.group_size)

    def get_stored_tensors(self, outputs: int, inputs: int) -> Mapping[str, StoredTensor]:
        """Three tensors."""
        groups = self.count_zero_words(inputs) * 8
        return {
            "qweight": StoredTensor((outputs // 4, inputs), (torch.int16,), (Axis("rows", 4),)),
            "qzeros": StoredTensor((groups, outputs), FLOATS, (None, ROWS)),
            "scales": StoredTensor((groups, outputs), FLOATS, (None, ROWS)),
        }

    def unpack_tensors(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> GroupedWeights:
        """Undo the interleaving, then the two shuffles; a zero point is the nearest whole number."""
        nibbles = unpack_codes(tensors["qweight"], 4)  # (out / 4, in * 4): of a word, four neighbours in one row
        rows = nibbles.view(outputs // 4, inputs // 64, 4, 64).transpose(1, 2).reshape(outputs, inputs)
        pairs_last = rows.view(outputs, inputs // 32, 4, 2, 4).transpose(3, 4)  # 0 2 4 6 1 3 5 7 -> in order
        codes = pairs_last.reshape(outputs, inputs // 32, 4, 4, 2).transpose(2, 3).reshape(outputs, inputs)
        groups = self.count_groups(inputs)
        scales, offsets = (tensors[name].T[:, :groups].contiguous() for name in ("scales", "qzeros"))
        zeros = torch.where(scales == 0, 0.0, -offsets.float() / scales.float()).round().clamp(0, 15)
        return GroupedWeights.from_codes(codes.contiguous(), scales, zeros.to(torch.uint8), 4)


_FORMATS: Mapping[str, type[GroupedFormat]] = {"gemm": GemmFormat, "gemv": GemvFormat, "gemv_fast": GemvFastFormat}


def _get_bits(config: Mapping[str, Any]) -> Any:
    return config.get("bits", config.get("w_bit", 4))


def _get_group_size(config: Mapping[str, Any]) -> Any:
    return config.get("group_size", config.get("q_group_size", 128))


def _get_version(config: Mapping[str, Any]) -> str:
    return str(config.get("version") or "gemm").lower()

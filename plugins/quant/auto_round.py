"""auto-round's own checkpoints (Cheng et al., 2023, arXiv:2309.05516): GPTQ's or AWQ's packing, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from quire.plugins.quant.awq import GemmFormat
from quire.plugins.quant.gptq import BITS, GPTQ, GPTQFormat
from quire.plugins.quant.layerwise import LayerwiseLoader, Scheme, is_invalid_group_size
from quire.sdk import StoredWeight

__all__ = ["AutoRound"]

_PACKINGS = ("auto_round:auto_gptq", "auto_round:auto_awq")
"""The first is that of a checkpoint that names none."""
_EXPRESSION = re.compile(r"[*+?^$()\[\]{}|\\]")
"""What makes a key of ``extra_config`` a regular expression, which is searched for in names; others are names."""


class AutoRound(LayerwiseLoader):
    """Reads ``quant_method: auto-round``; ``extra_config`` has what differs in some layers."""

    @classmethod
    def find_unsupported(cls, quant_config: Mapping[str, Any], device: torch.device) -> list[str]:
        """Other methods, packings and data types, and quantized activations."""
        if reasons := cls.check_quant_method(quant_config, "auto-round", "intel/auto-round"):
            return reasons
        reasons, packing = [], quant_config.get("packing_format", _PACKINGS[0])
        if packing not in _PACKINGS:
            reasons.append(f"auto-round packing {packing!r} is not supported; only {' and '.join(_PACKINGS)} are")
        for config in (quant_config, *(quant_config.get("extra_config") or {}).values()):
            bits, kind, size = config.get("bits", 4), config.get("data_type", "int"), config.get("group_size", 128)
            if kind != "int" or (config.get("act_bits") or 16) < 16:
                reasons.append(
                    f"auto-round {kind!r} weights, or quantized activations, are not supported; int ones are"
                )
            if bits not in BITS and bits < 16:
                reasons.append(f"auto-round with {bits!r} bits is not supported; only 2, 3, 4 and 8 are")
            if is_invalid_group_size(size):
                reasons.append(f"auto-round group size {size!r} is not supported; it must be -1 or positive")
        return reasons

    @classmethod
    def example_config(cls) -> Mapping[str, Any]:
        """Four bits in groups of 32."""
        return {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32}

    @classmethod
    def example_tensors(cls, outputs: int, inputs: int) -> StoredWeight:
        """GPTQ's."""
        return GPTQ.example_tensors(outputs, inputs)

    def get_scheme(self, name: str, kind: str) -> Scheme:
        """What ``extra_config`` says of ``name`` over what is said of all; the head only where it is named."""
        config, extra = self.quant_config, self.quant_config.get("extra_config") or {}
        patterns = (key for key in extra if _EXPRESSION.search(key) and re.search(key, name))
        override = extra.get(name) or next((extra[key] for key in patterns), None)
        if kind == "lm_head" and override is None and not config.get("lm_head"):
            return None
        config = {**config, **(override or {})}
        bits, size = int(config.get("bits", 4)), int(config.get("group_size", 128))
        if bits >= 16:
            return None
        if config.get("packing_format") == "auto_round:auto_awq":
            return GemmFormat(bits, size)
        return GPTQFormat(bits, size, symmetric=bool(config.get("sym", True)))

"""FP8 (e4m3) weights and activations: checkpoints of ``fp8`` and ``fbgemm_fp8``, or a plain one quantized at load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quire.plugins.quant.compressed_tensors import CompressedTensors
from quire.plugins.quant.layerwise import LayerwiseLoader, Scheme, is_block, matches_name
from quire.plugins.quant.scaled import ScaledFormat
from quire.sdk import LayerInfo, LinearMethod

__all__ = ["Fp8"]

_FP8 = torch.float8_e4m3fn


class Fp8(LayerwiseLoader):
    """Scales for the whole tensor, by row or by block; the head stays as it is where nothing says otherwise.

    Named for a checkpoint that is not quantized, it gives every row a scale at load.
    """

    @classmethod
    def find_unsupported(cls, quant_config: Mapping[str, Any], device: torch.device) -> list[str]:
        """Other methods and formats."""
        method = quant_config.get("quant_method")
        if method is None:
            return []
        if method == "compressed-tensors":
            return CompressedTensors.find_unsupported_for(_FP8, quant_config, device)
        if reasons := cls.check_quant_method(quant_config, "fp8", "fbgemm_fp8"):
            return reasons
        reasons = []
        activations, block = quant_config.get("activation_scheme", "dynamic"), quant_config.get("weight_block_size")
        if activations not in ("dynamic", "static"):
            reasons.append(f"FP8 activation_scheme {activations!r} is not supported; only dynamic and static are")
        if quant_config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            reasons.append(f"FP8 format {quant_config['fmt']!r} is not supported; only e4m3 is")
        if block is not None and not (is_block(block) and activations == "dynamic"):
            reasons.append(
                f"FP8 weight_block_size {block!r} with {activations} activations is not supported; only two positive "
                f"numbers with dynamic ones are"
            )
        return reasons

    def get_scheme(self, name: str, kind: str) -> Scheme:
        """As ``quantization_config`` says, but for the head and the layers that it names as not converted."""
        config = self.quant_config
        skipped = (*(config.get("modules_to_not_convert") or ()), *(config.get("ignored_layers") or ()))
        if kind == "lm_head" or matches_name(name, skipped):
            return None
        if not config:
            return ScaledFormat(_FP8, "none")
        if config["quant_method"] == "fbgemm_fp8":
            return ScaledFormat(_FP8, "channel")
        if block := config.get("weight_block_size"):
            return ScaledFormat(_FP8, "block", scale_name="weight_scale_inv", block=(int(block[0]), int(block[1])))
        static = config.get("activation_scheme") == "static"
        return ScaledFormat(_FP8, "tensor", "static" if static else "dynamic")

    def get_linear_method(self, info: LayerInfo) -> LinearMethod:
        """Compressed-tensors has a loader of its own."""
        if self.quant_config.get("quant_method") == "compressed-tensors":
            return CompressedTensors(self.quant_config).get_linear_method(info)
        return super().get_linear_method(info)

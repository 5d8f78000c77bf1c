"""The scales of an attention layer's keys and values in an FP8 cache, where a checkpoint has them."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from quire.core.errors import CheckpointError
from quire.core.layers.checkpoint import CheckpointLayer, WeightLoader

__all__ = ["KVScales"]

_SCALE_SUFFIXES = {
    "k_scale": "k",
    "v_scale": "v",
    "kv_scale": "kv",
    "k_proj.k_scale": "k",
    "v_proj.v_scale": "v",
    "k_proj.output_scale": "k",
    "v_proj.output_scale": "v",
}
"""Suffixes after the attention module's name, as llmcompressor, AutoFP8 and vLLM's tools write them."""
_UNUSED_SUFFIXES = (
    *("q_scale", "prob_scale", "q_proj.q_scale", "q_proj.output_scale"),
    *("q_zero_point", "k_zero_point", "v_zero_point"),
)
"""Of queries, which are not quantized, and of integer caches."""


class KVScales(CheckpointLayer):
    """What an FP8 cache holds times ``k_scale``, or ``v_scale``, is the key or value; both 1 where nothing is said.

    Of scales by head the largest serves all. Without an FP8 cache whatever a checkpoint says here is passed over.
    """

    k_scale: Tensor  # (1,) float32
    v_scale: Tensor

    def __init__(self, name: str, device: torch.device, kv_dtype: torch.dtype) -> None:
        super().__init__()
        self.name = name
        self._is_fp8 = kv_dtype.itemsize == 1
        self.register_buffer("k_scale", torch.ones(1, device=device), persistent=False)
        self.register_buffer("v_scale", torch.ones(1, device=device), persistent=False)

    def weight_loaders(self) -> dict[str, WeightLoader]:
        """One for every spelling of the scales' names."""
        kinds = {**_SCALE_SUFFIXES, **dict.fromkeys(_UNUSED_SUFFIXES, "")}
        return {
            name: partial(self._load_scale, name, kind)
            for end, kind in kinds.items()
            for name in (f"{self.name}.{end}", f"{self.name}.attn.{end}")
        }

    def optional_tensors(self) -> set[str]:
        """All of them: most checkpoints have none."""
        return set(self.weight_loaders())

    def _load_scale(self, name: str, kind: str, tensor: Tensor) -> None:
        if not self._is_fp8 or not kind:
            return
        scales = tensor.flatten().tolist()  # one, or one for each head
        if not scales or not all(0 < scale < math.inf for scale in scales):
            shown = tensor.tolist() if len(scales) == 1 else scales
            raise CheckpointError(f"tensor {name!r} is {shown!r:.100} where a positive scale is right")
        for part in kind:  # "k", "v" or "kv"
            getattr(self, f"{part}_scale").fill_(max(scales))

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


class KVScales(CheckpointLayer):
    """What an FP8 cache holds times ``k_scale``, or ``v_scale``, is the key or value; both 1 where nothing is said."""

    k_scale: Tensor  # (1,) float32
    v_scale: Tensor

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("k_scale", torch.ones(1, device=device), persistent=False)
        self.register_buffer("v_scale", torch.ones(1, device=device), persistent=False)

    def weight_loaders(self) -> dict[str, WeightLoader]:
        """One for every spelling of the scales' names."""
        return {
            f"{self.name}.{end}": partial(self._load_scale, f"{self.name}.{end}", which)
            for end, which in _SCALE_SUFFIXES.items()
        }

    def optional_tensors(self) -> set[str]:
        """All of them: most checkpoints have none."""
        return set(self.weight_loaders())

    def _load_scale(self, name: str, which: str, tensor: Tensor) -> None:
        if tensor.numel() != 1 or not 0 < float(tensor) < math.inf:
            raise CheckpointError(f"tensor {name!r} is {tensor.tolist()} where one positive scale is right")
        for part in which:  # "k", "v" or "kv"
            getattr(self, f"{part}_scale").fill_(float(tensor))

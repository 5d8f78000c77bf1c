"""Cases of the LoRA kernels: the layers of an 8B model, for few and many tokens."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from quire.plugins.adapters.lora.batch import AdapterBatch
from quire.plugins.adapters.lora.kernels import launch_lora
from quire.sdk import AdapterLimits

__all__ = ["ADAPTERS"]


def lora(
    num_tokens: int, part_sizes: tuple[int, ...], inputs: int, max_rank: int, half: bool = False, norm: bool = False
) -> None:
    """With PDL, where the target has it."""
    dtype = torch.float16 if half else torch.bfloat16
    batch = AdapterBatch(AdapterLimits(8, max_rank, 4096, dtype, torch.device("cpu")))
    batch.update(np.arange(num_tokens, dtype=np.int32) % 8, is_captured=True)
    parts, features = len(part_sizes), sum(part_sizes)
    launch_lora(
        torch.empty(num_tokens, inputs, dtype=dtype),
        torch.empty(num_tokens, features, dtype=dtype),
        torch.empty(8, parts, max_rank, inputs, dtype=dtype),
        torch.empty(8, max_rank, features, dtype=dtype),
        torch.empty(8, parts, dtype=torch.int32),
        part_sizes,
        batch,
        (torch.empty(inputs, dtype=dtype), 1e-5) if norm else None,
    )


ADAPTERS = {
    "lora-qkv-1": partial(lora, 1, (4096, 1024, 1024), 4096, 16, norm=True),
    "lora-qkv-300-f16": partial(lora, 300, (4096, 1024, 1024), 4096, 64, half=True),
    "lora-gate-up-64": partial(lora, 64, (14336, 14336), 4096, 16),
    "lora-down-256-rank-64": partial(lora, 256, (4096,), 14336, 64),
    "lora-o-2048": partial(lora, 2048, (4096,), 4096, 32),
}
"""By name: what is launched."""

"""Which kernel a layer of int4 or int8 weights in groups takes for how many tokens.

The table is written by ``benchmarks/kernels/int4.py``, for 4 bits and groups of 128. A layer that it does not name, and
any other card, get what did best on layers of their kind.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from quire.plugins.quant.kernels.int4_weights import IntWeights
from quire.sdk.ops import DeviceProfile, Launch, LaunchStep, find_launches, get_launch_steps

__all__ = ["choose_launch", "get_int4_steps", "select_launch"]

_RULE_TOKENS = (8, 16, 32, 64, 128, 256, 512)
"""Most tokens of each of the rule's launches."""
_LARGE_SHARED_MEMORY = 227 * 1024
"""Bytes of a program on Hopper and the data-center Blackwell: more warps and stages fit."""


def select_launch(weights: IntWeights, x: Tensor) -> Launch | None:
    """None: write the weights out, and use the library."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or not x.shape[0]:
        return None
    hopper_layout = weights.bits == 4 and weights.group_size % 128 == 0 and weights.inputs % 8 == 0
    profile = DeviceProfile.detect(x.device)
    steps = get_int4_steps(profile, weights.features, weights.inputs, weights.bits, hopper_layout)
    launches = find_launches(steps, x.shape[0])
    return launches[0] if launches else None


@cache
def get_int4_steps(
    profile: DeviceProfile, features: int, inputs: int, bits: int, hopper_layout: bool
) -> tuple[LaunchStep, ...]:
    """The launches of a layer; beyond them, and for None, there is the library.

    ``hopper_layout``: ``gemm_hopper`` takes these weights; where it does not, the rule replaces its launches.
    """
    steps = get_launch_steps(
        Path(__file__).parent / "tables",
        f"w{bits}a16",
        profile,
        (features, inputs),
        rule=lambda tokens: (choose_launch(profile, features, inputs, tokens, hopper_layout),),
        rule_tokens=_RULE_TOKENS,
    )
    if hopper_layout:
        return steps
    return tuple(
        LaunchStep(
            most,
            tuple(
                choose_launch(profile, features, inputs, most)
                if launch is not None and launch.kernel == "gemm_hopper"
                else launch
                for launch in launches
            ),
        )
        for most, launches in steps
    )


def choose_launch(
    profile: DeviceProfile, features: int, inputs: int, tokens: int, hopper_layout: bool = False
) -> Launch | None:
    """The rule, for layers that no table names: what was best, or close to it, on those that are measured."""
    large = profile.shared_memory >= _LARGE_SHARED_MEMORY
    if tokens <= 8:
        slice_k = 8 if inputs > 8192 and large else 4
        stages = 4 if slice_k < 8 and large else 3
        options = {"block_m": tokens, "tiles": 2, "slice_k": slice_k, "num_stages": stages, "unroll_k": 1}
        return Launch("gemm_small_m", options)
    if not large and tokens > 64:
        return None
    if hopper_layout and profile.is_hopper and tokens > 32:
        block_m, consumers, stages = (64, 1, 4) if tokens <= 64 else (128, 2, 5)
        programs = -(-features // (64 * consumers)) * -(-tokens // block_m)
        split_k = max(1, min(4, inputs // 512, 2 * profile.num_sms // consumers // programs))
        options = {"block_m": block_m, "tiles": 4, "split_k": split_k, "num_consumers": consumers, "num_warps": 4}
        return Launch("gemm_hopper", options | {"num_stages": stages})
    if tokens <= 256:
        block_m = min(tokens, 64)
        programs = -(-features // 128) * -(-tokens // 64)
        split_k = max(1, min(-(-inputs // 512), round(2 * profile.num_sms / programs)))  # two programs an SM
        options = {"block_m": block_m, "tiles": 8, "split_k": split_k, "scale_weights": 0}
        return Launch("gemm_medium_m", options | {"num_warps": 8, "num_stages": 3})
    return None

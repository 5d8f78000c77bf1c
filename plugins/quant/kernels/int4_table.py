"""Which kernel a layer of int4 or int8 weights takes for how many tokens, from a table measured on the device.

The tables are written by ``benchmarks/kernels/int4.py``. A layer that the table does not name, and any other device,
get what did best on layers of their kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quire.plugins.quant.kernels.int4 import IntWeights

__all__ = ["Launch", "choose_launch", "get_launches", "select_launch"]

_TABLES = {(9, 0): "int4_h200.json"}
"""Compute capability -> table. Layers in it have 4 bits and groups of 128."""
_STEPS = (8, 16, 32, 64, 128, 256, 512)
"""Most tokens of each of the rule's launches."""
_SM90 = (9, 0)


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and its constants."""

    kernel: str
    options: Mapping[str, int]


def select_launch(weights: IntWeights, x: Tensor) -> Launch | None:
    """None: write the weights out, and use the library."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or not x.shape[0]:
        return None
    whole = weights.bits == 4 and weights.group_size % 128 == 0 and weights.inputs % 8 == 0
    capability = torch.cuda.get_device_capability(x.device)
    found = get_launches(capability, weights.features, weights.inputs, weights.bits, whole)
    return next((launch for most, launch in found if x.shape[0] <= most), None)


@cache
def get_launches(
    capability: tuple[int, int], features: int, inputs: int, bits: int, whole: bool
) -> tuple[tuple[int, Launch | None], ...]:
    """(most tokens, launch), ascending; None is the library. ``whole``: ``hopper`` takes these weights."""
    name = _TABLES.get(capability)
    measured = None if name is None or bits != 4 else _read(name).get(f"{features}x{inputs}")
    if measured is None:
        return tuple((most, choose_launch(capability, features, inputs, most, whole)) for most in _STEPS)
    found = [(int(most), None if entry is None else _launch(entry)) for most, entry in measured.items()]
    return tuple(
        (
            most,
            launch
            if whole or launch is None or launch.kernel != "gemm_hopper"
            else choose_launch(capability, features, inputs, most),
        )
        for most, launch in found
    )


def choose_launch(
    capability: tuple[int, int], features: int, inputs: int, tokens: int, whole: bool = False
) -> Launch | None:
    """For layers that no table names: what was best, or close to it, on those that are measured."""
    if tokens <= 8:
        hopper = capability >= _SM90  # others may have less shared memory
        ways = 8 if inputs > 8192 and hopper else 4
        stages = 4 if ways < 8 and hopper else 3
        return Launch(
            "gemm_small_m", {"block_m": tokens, "tiles": 2, "slice_k": ways, "num_stages": stages, "unroll_k": 1}
        )
    if capability < _SM90 and tokens > 64:
        return None
    if whole and capability == _SM90 and tokens > 32:
        most, consumers, stages = (64, 1, 4) if tokens <= 64 else (128, 2, 5)
        programs = -(-features // (64 * consumers)) * -(-tokens // most)
        splits = max(1, min(4, inputs // 512, 264 // consumers // programs))
        options = {"block_m": most, "tiles": 4, "split_k": splits, "num_consumers": consumers, "num_warps": 4}
        return Launch("gemm_hopper", options | {"num_stages": stages})
    if tokens <= 256:
        programs = -(-features // 128) * -(-tokens // 64)
        splits = max(1, min(-(-inputs // 512), round(264 / programs)))
        options = {
            "block_m": min(tokens, 64),
            "tiles": 8,
            "split_k": splits,
            "scale_weights": 0,
            "num_warps": 8,
            "num_stages": 3,
        }
        return Launch("gemm_medium_m", options)
    return None


@cache
def _read(name: str) -> dict[str, dict[str, Any]]:
    """``{"<features>x<inputs>": {"<most tokens>": launch or null}}``."""
    path = Path(__file__).parent / "tables" / name
    return json.loads(path.read_text())["layers"] if path.exists() else {}


def _launch(entry: Mapping[str, Any]) -> Launch:
    return Launch(entry["kernel"], {key: value for key, value in entry.items() if key not in ("kernel", "us")})

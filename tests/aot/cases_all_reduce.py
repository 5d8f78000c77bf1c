"""Cases of the sums over GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from quire.core.contracts.quant import ActivationFormat
from quire.core.ops.kernels.all_reduce_launch import (
    MAX_PROGRAMS,
    SymmetricLayout,
    launch_one_shot,
    launch_one_shot_norm,
    launch_sum_sent,
    launch_two_shot,
)

__all__ = ["ALL_REDUCE"]


def one_shot(ranks: int, features: int, kind: Any = None, marked: bool = False) -> None:
    layout = SymmetricLayout(ranks)
    x, memory = torch.empty(4, features, dtype=torch.bfloat16), _make_memory(layout)
    if kind is None:
        launch_one_shot(x, *memory, layout, 1, marked=marked)
        return
    wanted = ActivationFormat(kind, torch.ones(1) if kind == "fp8_tensor" else None)
    weight = torch.empty(features, dtype=torch.bfloat16)
    launch_one_shot_norm(x, x.clone(), weight, 1e-6, wanted, *memory, layout, 1, marked=marked)


def two_shot(ranks: int) -> None:
    layout = SymmetricLayout(ranks)
    launch_two_shot(torch.empty(512, 4096, dtype=torch.bfloat16), *_make_memory(layout), layout, 1)


def sum_sent(ranks: int, features: int) -> None:
    layout = SymmetricLayout(ranks, max_sent_bytes=256 << 20)
    part, residual = (torch.empty(rows, features, dtype=torch.bfloat16) for rows in (1024, 1024 * ranks))
    launch_sum_sent(part, 1024 * ranks, residual, residual[0].clone(), 1e-6, 1, *_make_memory(layout), layout, 1)


def _make_memory(layout: SymmetricLayout) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(layout.ranks, dtype=torch.int64), torch.zeros(3, MAX_PROGRAMS, dtype=torch.int32)


ALL_REDUCE: dict[str, Callable[[], None]] = {
    "all-reduce-one-shot": partial(one_shot, 2, 4096),
    "all-reduce-norm": partial(one_shot, 2, 8192, "native"),
    "all-reduce-marked": partial(one_shot, 2, 8192, None, True),
    "all-reduce-marked-norm": partial(one_shot, 2, 4096, "native", True),
    "all-reduce-norm-of-eight": partial(one_shot, 8, 4096, "native"),
    "fp8-all-reduce-norm": partial(one_shot, 4, 4096, "fp8_token"),
    "all-reduce-two-shot": partial(two_shot, 2),
    "all-reduce-two-shot-of-eight": partial(two_shot, 8),
    "all-reduce-sent": partial(sum_sent, 2, 4096),
    "all-reduce-sent-of-four": partial(sum_sent, 4, 8192),
}

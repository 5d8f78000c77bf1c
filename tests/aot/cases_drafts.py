"""Cases of drafting and its verification."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from quire.core.contracts.sampler import SamplingTable
from quire.core.sample.kernels.verify import place_drafts, verify
from quire.core.sample.verify import Spans

__all__ = ["DRAFTS"]

_LONGS, _INTS = partial(torch.zeros, dtype=torch.int64), partial(torch.zeros, dtype=torch.int32)


def _table() -> SamplingTable:
    floats = torch.zeros
    return SamplingTable(_INTS(3, 64), _INTS(3), floats(3), _INTS(3), floats(3), floats(3), _LONGS(3))


def _verify(width: int, forced: float | None) -> None:
    spans = Spans(_LONGS(2), _LONGS(2), _LONGS(2), width)
    verify(_INTS(2 * width), spans, _table(), _INTS(3), _INTS(3), forced)


def _place(count: int, lengths: bool) -> None:
    place_drafts(_INTS(2, count), _INTS(2) if lengths else None, _LONGS(2), _table(), _INTS(3), 151936)


DRAFTS: dict[str, Callable[[], None]] = {
    "verify": partial(_verify, 5, None),
    "verify-forced": partial(_verify, 4, 0.7),
    "place": partial(_place, 4, True),
    "place-all": partial(_place, 8, False),
}

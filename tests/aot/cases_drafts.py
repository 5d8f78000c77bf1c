"""Cases of drafting and its verification."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from quire.core.contracts.sampler import SamplingTable
from quire.core.sample.kernels import verify_kernel as kernels
from quire.core.sample.verify import DraftSpans
from quire.plugins.spec_decode.kernels.observed import observed
from quire.plugins.spec_decode.kernels.pass_inputs import pass_inputs

__all__ = ["DRAFTS", "place", "verify"]

_LONGS, _INTS = partial(torch.zeros, dtype=torch.int64), partial(torch.zeros, dtype=torch.int32)


def _table() -> SamplingTable:
    floats = torch.zeros
    return SamplingTable(_INTS(3, 64), _INTS(3), floats(3), _INTS(3), floats(3), floats(3), _LONGS(3))


def verify(width: int, forced: float | None) -> None:
    spans = DraftSpans(_LONGS(2), _LONGS(2), _LONGS(2), width)
    kernels.launch_verify_drafts(_INTS(2 * width), spans, _table(), _INTS(3), _INTS(3), forced)


def place(count: int, lengths: bool) -> None:
    kernels.launch_place_drafts(_INTS(2, count), _INTS(2) if lengths else None, _LONGS(2), _table(), _INTS(3), 151936)


def _pass(queries: int, drawn: bool) -> None:
    out = (_INTS(2 * queries), _LONGS(2 * queries), _LONGS(2 * queries), _INTS(2), _LONGS(2))
    table = _table()
    pass_inputs(
        _LONGS(2), table.num_tokens, table.token_ids, _INTS(2, 8), _INTS(2) if drawn else None, out,
        ahead=int(drawn), queries=queries, block_size=16, longest=64,
    )  # fmt: skip


def _observed(lines: int, requests: int) -> None:
    table = _table()
    observed(
        _INTS(requests + 1), _LONGS(requests), _LONGS(lines), table.num_tokens, table.token_ids, _INTS(lines),
        _LONGS(requests),
    )  # fmt: skip


DRAFTS: dict[str, Callable[[], None]] = {
    "verify": partial(verify, 5, None),
    "verify-forced": partial(verify, 4, 0.7),
    "place": partial(place, 4, True),
    "pass-first": partial(_pass, 2, False),
    "pass": partial(_pass, 1, True),
    "observed": partial(_observed, 40, 3),
    "observed-one": partial(_observed, 1, 1),
    "place-all": partial(place, 8, False),
}

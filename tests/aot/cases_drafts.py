"""Cases of proposers on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from tests.aot.cases_sampling import empty_sampling_table

from quire.plugins.spec_decode.kernels.observed import observed
from quire.plugins.spec_decode.kernels.pass_inputs import pass_inputs

__all__ = ["DRAFTS"]

_LONGS, _INTS = partial(torch.zeros, dtype=torch.int64), partial(torch.zeros, dtype=torch.int32)


def _pass(queries: int, drawn: bool) -> None:
    out = (_INTS(2 * queries), _LONGS(2 * queries), _LONGS(2 * queries), _INTS(2), _LONGS(2))
    table = empty_sampling_table()
    pass_inputs(
        _LONGS(2), table.num_tokens, table.token_ids, _INTS(2, 8), _INTS(2) if drawn else None, out,
        ahead=int(drawn), queries=queries, block_size=16, longest=64,
    )  # fmt: skip


def _observed(lines: int, requests: int) -> None:
    table = empty_sampling_table()
    observed(
        _INTS(requests + 1), _LONGS(requests), _LONGS(lines), table.num_tokens, table.token_ids, _INTS(lines),
        _LONGS(requests),
    )  # fmt: skip


DRAFTS: dict[str, Callable[[], None]] = {
    "pass-first": partial(_pass, 2, False),
    "pass": partial(_pass, 1, True),
    "observed": partial(_observed, 40, 3),
    "observed-one": partial(_observed, 1, 1),
}

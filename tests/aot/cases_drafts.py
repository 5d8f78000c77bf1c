"""Cases of proposers on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from tests.aot.cases_sampling import empty_sampling_table

from quire.core.contracts.attention import AttentionBatch
from quire.core.contracts.spec_decode import StepTokens, TargetState
from quire.plugins.spec_decode.draft_inputs_kernel import launch_build_pass_inputs, launch_gather_next_tokens

__all__ = ["DRAFTS"]

_LONGS, _INTS = partial(torch.zeros, dtype=torch.int64), partial(torch.zeros, dtype=torch.int32)


def _build_pass_inputs(query_len: int, has_draft_tokens: bool) -> None:
    blocks = _INTS(2, 8)
    target = TargetState(None, empty_sampling_table(), _INTS(2), blocks, [], [], [], 16, 64, 2)  # type: ignore[arg-type]
    launch_build_pass_inputs(
        target,
        _LONGS(2),
        blocks,
        _INTS(2) if has_draft_tokens else None,
        num_ahead=int(has_draft_tokens),
        query_len=query_len,
        input_ids=_INTS(2 * query_len),
        positions=_LONGS(2 * query_len),
        slot_mapping=_LONGS(2 * query_len),
        seq_lens=_INTS(2),
        next_positions=_LONGS(2),
    )


def _gather_next_tokens(num_tokens: int, num_reqs: int) -> None:
    tokens, starts = _LONGS(num_tokens), _INTS(num_reqs + 1)
    batch = AttentionBatch(starts, starts, starts, num_reqs, num_tokens, num_tokens, num_tokens, 0)
    step = StepTokens(tokens, tokens, tokens, _LONGS(num_reqs), batch)
    launch_gather_next_tokens(step, empty_sampling_table(), _INTS(num_tokens), _LONGS(num_reqs))


DRAFTS: dict[str, Callable[[], None]] = {
    "draft-first-pass": partial(_build_pass_inputs, 2, False),
    "draft-pass": partial(_build_pass_inputs, 1, True),
    "next-tokens": partial(_gather_next_tokens, 40, 3),
    "next-tokens-one": partial(_gather_next_tokens, 1, 1),
}

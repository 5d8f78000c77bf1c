"""Verification of drafts: accept while the token that the target samples is the drafted one.

The target's token is sampled at every drafted position with the noise of that position (``core.sample.noise``), so what
a request receives is what it would have sampled one token at a time, whatever proposed the drafts. This is rejection
sampling (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023) with the proposal and
target coupled by common Gumbel noise: the output follows the target's distribution, and seeded output does not change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quire.core.contracts.sampler import SamplingTable
from quire.core.sample.inputs import DraftSpans

__all__ = ["DraftVerifier", "place_drafts", "verify_drafts"]

DraftVerifier = Callable[[Tensor, DraftSpans, SamplingTable, Tensor, Tensor], Tensor]
"""``verify_drafts``, or what stands for it."""


def verify_drafts(
    sampled: Tensor, spans: DraftSpans, table: SamplingTable, num_computed: Tensor, num_drafts: Tensor
) -> Tensor:
    """Append to each row its accepted drafts and the token sampled after them, at most ``spans.max_len`` tokens.

    ``sampled`` (num_logits_rows,) int32: tokens, or faults (``row_faults``), which no draft equals. Drafts lie in
    ``table.token_ids`` behind a row's ``num_tokens``; the first ``num_drafts`` (rows,) int32 of them are real, and none
    is afterwards. ``num_computed`` (rows,) int32 becomes ``num_tokens - 1``: the keys and values of the last token are
    not yet computed.
    Returns (n, 2 + max_len) int32: how many tokens were appended, how many drafts were verified, the tokens.
    """
    if sampled.is_cuda:
        from quire.core.sample.kernels.verify_kernel import launch_verify_drafts

        return launch_verify_drafts(sampled, spans, table, num_computed, num_drafts)
    rows, max_len = spans.rows, spans.max_len
    offset = torch.arange(max_len, device=sampled.device)[None, :]  # (1, max_len)
    base = table.num_tokens[rows].long()[:, None]  # (n, 1)
    # Shorter spans read their neighbours' tokens behind their own; ``offset < num_verified`` leaves those out below.
    tokens = sampled[(spans.start[:, None] + offset).clamp(max=len(sampled) - 1)]  # (n, max_len)
    # The device may have fewer drafts than the host granted: the proposer found less, or the host's guess was wrong.
    num_verified = torch.minimum(spans.num_drafts, num_drafts[rows].long())
    drafts = table.token_ids[rows[:, None], base + offset]
    accepted = (drafts == tokens) & (offset < num_verified[:, None])
    count = 1 + accepted.int().cumprod(1)[:, : max_len - 1].sum(1) if max_len > 1 else torch.ones_like(rows)
    table.token_ids[rows[:, None], base + offset] = torch.where(offset < count[:, None], tokens.clamp(min=0), drafts)
    end = (base[:, 0] + count).int()
    table.num_tokens[rows] = end
    num_computed[rows] = end - 1
    num_drafts.index_fill_(0, rows, 0)
    return torch.cat((count[:, None].int(), num_verified[:, None].int(), tokens.int()), 1)


def place_drafts(
    tokens: Tensor, lengths: Tensor | None, rows: Tensor, table: SamplingTable, num_drafts: Tensor, vocab_size: int
) -> None:
    """Write drafts (n, k) int32 behind the tokens of ``rows`` (n,) int64 and their number into ``num_drafts``.

    The first that is no token of the vocabulary ends a draft; ``lengths`` (n,) int32 may end it before, and none goes
    beyond the table. The last row, which is padding, gets none.
    """
    if tokens.is_cuda:
        from quire.core.sample.kernels.verify_kernel import launch_place_drafts

        launch_place_drafts(tokens, lengths, rows, table, num_drafts, vocab_size)
        return
    k = tokens.shape[1]
    offset = torch.arange(k, device=tokens.device)[None, :]
    valid = (tokens >= 0) & (tokens < vocab_size)
    count = valid.int().cumprod(1).sum(1)
    if lengths is not None:
        count = torch.minimum(count, lengths.clamp(min=0).to(count.dtype))
    base = table.num_tokens[rows].long()
    count = torch.minimum(count, table.token_ids.shape[1] - base)
    count = torch.where(rows == len(num_drafts) - 1, 0, count)
    request, column = (offset < count[:, None]).nonzero(as_tuple=True)
    table.token_ids[rows[request], base[request] + column] = tokens[request, column].int()
    num_drafts[rows] = count.int()

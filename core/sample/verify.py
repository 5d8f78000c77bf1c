"""Verification of drafts by the one sampling rule: accept while the drawn token is the drafted one.

The target's token is drawn at every drafted position with the noise of that position (``core.sample.noise``), so what
a request receives is what it would have drawn one token at a time, whoever drafted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.core.contracts.sampler import SamplingTable
from quire.core.sample.noise import philox

__all__ = ["DraftSpans", "place_drafts", "verify_drafts"]

_FORCED = 0x5EED
"""Separates the noise of forced acceptance from that of sampling."""


@dataclass(frozen=True, slots=True)
class DraftSpans:
    """Requests that draw, each with a line of logits for its next token and one for every draft granted to it."""

    rows: Tensor  # (n,) int64, of the request table
    start: Tensor  # (n,) int64: its first line
    num_drafts: Tensor  # (n,) int64: lines beyond the first
    max_len: int
    """The most lines of any, on the host."""


def verify_drafts(
    sampled: Tensor, spans: DraftSpans, table: SamplingTable, num_computed: Tensor, num_drafts: Tensor,
    forced_acceptance: float | None = None,
) -> Tensor:  # fmt: skip
    """Append to each row its accepted drafts and the token drawn after them; a row has at most ``width`` new tokens.

    ``drawn`` (lines,) int32. Drafts lie in ``table.token_ids`` behind a row's ``num_tokens``; the first ``num_drafts``
    (rows,) int32 of them are real, and none is afterwards. ``num_computed`` (rows,) int32 becomes ``num_tokens - 1``.
    Returns (n, 2 + width) int32: how many tokens were appended, how many drafts were verified, the tokens. With
    ``forced_acceptance`` chance decides, and an accepted draft stands as it is.
    """
    if sampled.is_cuda:
        from quire.core.sample.kernels import verify_kernel as kernels

        return kernels.launch_verify_drafts(sampled, spans, table, num_computed, num_drafts, forced_acceptance)
    rows, max_len = spans.rows, spans.max_len
    place = torch.arange(max_len, device=sampled.device)[None, :]  # (1, width)
    base = table.num_tokens[rows].long()[:, None]  # (n, 1)
    tokens = sampled[(spans.start[:, None] + place).clamp(max=len(sampled) - 1)]  # (n, width)
    offered = torch.minimum(spans.num_drafts, num_drafts[rows].long())
    before = table.token_ids[rows[:, None], base + place]
    accepted = before == tokens
    if forced_acceptance is not None:
        bits = philox((base + place).expand_as(tokens), torch.full_like(base, _FORCED), table.seed[rows][:, None])
        accepted = bits < int(forced_acceptance * 2**32)
        tokens = torch.where(accepted & (place < offered[:, None]), before, tokens)
    accepted &= place < offered[:, None]
    count = 1 + accepted.int().cumprod(1)[:, : max_len - 1].sum(1) if max_len > 1 else torch.ones_like(rows)
    after = torch.where(place < count[:, None], tokens, before)
    table.token_ids[rows[:, None], base + place] = after
    end = (base[:, 0] + count).int()
    table.num_tokens[rows] = end
    num_computed[rows] = end - 1
    num_drafts.index_fill_(0, rows, 0)
    return torch.cat((count[:, None].int(), offered[:, None].int(), tokens.int()), 1)


def place_drafts(
    tokens: Tensor, lengths: Tensor | None, rows: Tensor, table: SamplingTable, num_drafts: Tensor, vocab_size: int
) -> None:
    """Write drafts (n, k) int32 behind the tokens of ``rows`` (n,) int64. The first that is no token ends a draft;
    ``lengths`` (n,) int32 may end it before, and none goes beyond the table. The last row, which is padding, gets
    none."""
    if tokens.is_cuda:
        from quire.core.sample.kernels import verify_kernel as kernels

        kernels.launch_place_drafts(tokens, lengths, rows, table, num_drafts, vocab_size)
        return
    k = tokens.shape[1]
    place = torch.arange(k, device=tokens.device)[None, :]
    valid = (tokens >= 0) & (tokens < vocab_size)
    count = valid.int().cumprod(1).sum(1)
    if lengths is not None:
        count = torch.minimum(count, lengths.clamp(min=0).to(count.dtype))
    base = table.num_tokens[rows].long()
    count = torch.minimum(count, table.token_ids.shape[1] - base)
    count = torch.where(rows == len(num_drafts) - 1, 0, count)
    request, offset = (place < count[:, None]).nonzero(as_tuple=True)
    table.token_ids[rows[request], base[request] + offset] = tokens[request, offset].int()
    num_drafts[rows] = count.int()

"""What a head that observes every step reads of it: each token's next, and each request's last line that counts."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.sdk import SamplingTable, StepTokens

__all__ = ["observed"]


def observed(step: StepTokens, table: SamplingTable) -> tuple[Tensor, Tensor]:
    """``(next, last)``: the token after each of the step's, (num_tokens,) int32, drawn ones among them, and the line of
    each request's last token but one, (num_reqs,) int64, or of its last in the step where that comes later."""
    rows, start, positions = step.rows, step.batch.query_start_loc, step.positions
    if positions.is_cuda:
        from quire.plugins.spec_decode.kernels.observed import observed as launch

        # zeros: both are indexed with also where kernels are only compiled
        following = positions.new_zeros(len(positions), dtype=torch.int32)
        last = positions.new_zeros(len(rows))
        launch(start, rows, positions, table.num_tokens, table.token_ids, following, last)
        return following, last
    line = torch.arange(len(positions), dtype=start.dtype, device=start.device)
    owner = torch.searchsorted(start[1:], line, right=True).clamp(max=len(rows) - 1)
    after = (positions + 1).clamp(max=table.token_ids.shape[1] - 1)
    first, end = start[:-1].long(), start[1:].long()
    last = first + table.num_tokens[rows] - 2 - positions[first]
    return table.token_ids[rows[owner], after], last.clamp(min=first, max=end - 1)

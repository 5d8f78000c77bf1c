"""``quire.core.sample.forced_acceptance`` as a kernel: one small program a request, before verification."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.core.contracts.sampler import SamplingTable
from quire.core.sample.inputs import DraftSpans
from quire.core.sample.kernels.noise_kernel import device_philox

__all__ = ["launch_force_acceptance"]


def launch_force_acceptance(
    sampled: Tensor, spans: DraftSpans, table: SamplingTable, num_drafts: Tensor, probability: float
) -> None:
    """As ``quire.core.sample.forced_acceptance.force_acceptance``; padding is left alone."""
    force_acceptance_kernel[(len(spans.rows),)](
        sampled, spans.rows, spans.start, spans.num_drafts, table.token_ids, table.num_tokens, num_drafts, table.seed,
        table.token_ids.stride(0), len(num_drafts) - 1, float(probability),
        block=max(32, triton.next_power_of_2(spans.max_len)), fast=not triton.knobs.runtime.interpret, num_warps=1,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["token_stride", "padding_row", "probability"],
    do_not_specialize_on_alignment=["sampled_ptr", "rows_ptr", "start_ptr", "granted_ptr"],
)
def force_acceptance_kernel(
    sampled_ptr, rows_ptr, start_ptr, granted_ptr, token_ids_ptr, num_tokens_ptr, num_drafts_ptr, seed_ptr,
    token_stride, padding_row, probability,
    block: tl.constexpr, fast: tl.constexpr,
):  # fmt: skip
    """Grid (n,)."""
    request = tl.program_id(0)
    row = tl.load(rows_ptr + request)
    if row != padding_row:
        offset = tl.arange(0, block)
        base = tl.load(num_tokens_ptr + row)
        num_verified = tl.minimum(tl.load(granted_ptr + request).to(tl.int32), tl.load(num_drafts_ptr + row))
        draft_ptr = token_ids_ptr + row * token_stride + base + offset
        position = tl.full((), 0x5EED, tl.int32)  # FORCED_ACCEPTANCE_POSITION
        share = device_philox(tl.load(seed_ptr + row), position, base + offset, fast).to(tl.float32) * 2.0**-32
        accepted = (share < probability) & (offset < num_verified)
        num_accepted = tl.min(tl.where(accepted, block, offset), axis=0)
        drafts = tl.load(draft_ptr, mask=offset < num_accepted, other=0)
        tl.store(sampled_ptr + tl.load(start_ptr + request) + offset, drafts, mask=offset < num_accepted)
        # Verification overwrites this place with the sampled token, so that no such draft is ever read as a token.
        tl.store(draft_ptr, tl.full((block,), -1, tl.int32), mask=(offset == num_accepted) & (offset < num_verified))

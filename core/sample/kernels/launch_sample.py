"""A random draw: three launches for any mix of greedy and random rows, no synchronisation, a grid known beforehand."""

from __future__ import annotations

import triton
from torch import Tensor

from quire.core.sample.inputs import SamplingColumns
from quire.core.sample.kernels.sample_resolve import sample_resolve_kernel
from quire.core.sample.kernels.sample_scan import sample_scan_kernel
from quire.core.sample.kernels.sample_topk_candidates import sample_topk_candidates_kernel
from quire.core.sample.kernels.workspace import Workspace

__all__ = ["launch_sample"]


def launch_sample(
    logits: Tensor,
    columns: SamplingColumns,
    work: Workspace,
    out: Tensor,
    rows: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> None:
    """``logits`` (n, vocab), rows dense, bf16, f16 or f32 -> ``out`` (n,) int32, as ``GumbelSampler.sample``.

    With ``rows`` (n,) int64 and ``token_ids`` (rows, length) the columns are the request table's, ``position`` being
    its ``num_tokens``, and each token is appended to its row, but for the table's last row, which stands for padding.
    """
    n, vocab = logits.shape
    tiles, splits = work.tiles, work.num_chunks
    feed = rows is not None and token_ids is not None
    c = columns
    line_rows = rows if rows is not None else out
    table = token_ids if token_ids is not None else out
    token_stride = table.stride(0)
    padding_row = len(c.temperature) - 1
    fast = not triton.knobs.runtime.interpret
    sample_scan_kernel[(splits, n)](
        logits,
        line_rows,
        c.temperature,
        c.top_k,
        c.seed,
        c.position,
        work.chunk_best,
        work.chunk_logit,
        work.chunk_token,
        work.chunk_max,
        work.chunk_sum,
        work.group_max,
        logits.stride(0),
        padding_row,
        vocab=vocab,
        splits=splits,
        groups=tiles.groups_per_chunk,
        width=tiles.group_size,
        tile=min(tiles.tile_size, tiles.chunk_size),
        feed=feed,
        fast=fast,
        num_warps=8,
    )
    sample_topk_candidates_kernel[(n,)](
        logits,
        line_rows,
        c.temperature,
        c.top_k,
        c.top_p,
        c.min_p,
        c.seed,
        c.position,
        work.group_max,
        work.group_list,
        work.list_logit,
        work.list_token,
        work.list_above,
        out,
        table,
        c.position,
        logits.stride(0),
        token_stride,
        padding_row,
        vocab=vocab,
        splits=splits,
        groups=tiles.groups_per_chunk,
        width=tiles.group_size,
        num_groups_block=triton.next_power_of_2(work.num_groups),
        capacity=tiles.max_candidates,
        most_k=tiles.max_topk,
        tile=min(tiles.tile_size, tiles.chunk_size),
        block=min(128, tiles.max_candidates),
        others=min(32, tiles.max_candidates),
        feed=feed,
        fast=fast,
        num_warps=4,
    )
    sample_resolve_kernel[(tiles.num_parts, n)](
        logits,
        line_rows,
        c.temperature,
        c.top_k,
        c.top_p,
        c.min_p,
        c.seed,
        c.position,
        work.chunk_best,
        work.chunk_logit,
        work.chunk_token,
        work.chunk_max,
        work.chunk_sum,
        work.part_above,
        work.part_higher,
        work.part_kept,
        work.counter,
        out,
        table,
        c.position,
        logits.stride(0),
        token_stride,
        padding_row,
        vocab=vocab,
        splits=splits,
        splits_block=triton.next_power_of_2(splits),
        chunk=tiles.chunk_size,
        tile=min(tiles.tile_size, tiles.chunk_size),
        parts=tiles.num_parts,
        feed=feed,
        fast=fast,
        num_warps=8,
    )

"""``quire.core.sample.vocab_parallel`` as two launches with an exchange between them.

The first reads the logits once and leaves each row's best value and token; the second merges those of the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.core.contracts.sampler import SamplingTable
from quire.core.layers.parallel import TensorParallel
from quire.core.layers.vocab import VocabShard
from quire.core.sample.inputs import SamplingColumns
from quire.core.sample.kernels.noise_kernel import device_gumbel
from quire.core.sample.kernels.sample_row import max_or_nan, store_sampled_token

__all__ = ["PickWorkspace"]

_CHUNK_SIZE = 4096


class PickWorkspace:
    """Scratch of ``max_rows`` rows of logits, for launches that follow each other on one stream."""

    def __init__(self, max_rows: int, vocab: VocabShard, device: torch.device, chunk_size: int = _CHUNK_SIZE) -> None:
        self.max_rows = max_rows
        self._vocab = vocab
        self._num_chunks = max(1, triton.cdiv(vocab.num_tokens, chunk_size))
        self._picks = torch.zeros(max_rows, 2, device=device)
        """Of each row the best value, and its token: an id is exact in float32 up to 16 million."""
        self._chunk_values = torch.zeros(max_rows, self._num_chunks, device=device)
        self._chunk_tokens = torch.zeros(max_rows, self._num_chunks, dtype=torch.int32, device=device)
        self._num_arrived = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._modes: dict[str, Any] = {"fast": not triton.knobs.runtime.interpret}  # it runs no inline PTX
        self._constants: dict[str, Any] = {
            "num_local": vocab.num_tokens,
            "num_chunks": self._num_chunks,
            "num_chunks_block": triton.next_power_of_2(self._num_chunks),
            "chunk_size": chunk_size,
            "num_warps": 8,
        }

    def pick(
        self,
        local_logits: Tensor,
        columns: SamplingColumns,
        thresholds: Tensor | None,
        *,
        random: bool,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The picks (n, 2) of ``local_logits`` (n, vocab.size), rows dense, bf16, f16 or f32, as
        ``pick_local_tokens``. ``columns`` are by logits row, or with ``rows`` (n,) int64 of the request table."""
        n = len(local_logits)
        if n > self.max_rows:
            raise ValueError(f"{n} rows of logits, and room for {self.max_rows}")
        vocab_pick_kernel[(self._num_chunks, n)](
            local_logits,
            self._num_arrived if rows is None else rows,
            columns.temperature,
            columns.seed,
            columns.position,
            self._picks if thresholds is None else thresholds.contiguous(),
            self._chunk_values,
            self._chunk_tokens,
            self._num_arrived,
            self._picks,
            local_logits.stride(0),
            len(columns.temperature) - 1,
            self._vocab.first_token_id,
            from_table=rows is not None,
            random=random,
            filtered=thresholds is not None,
            **self._constants,
            **self._modes,
        )
        return self._picks[:n]

    def merge(
        self, parallel: TensorParallel, tokens: Tensor, rows: Tensor | None = None, table: SamplingTable | None = None
    ) -> None:
        """Exchange the picks and write each row's token into ``tokens`` (n,) int32; with ``rows`` and ``table`` also at
        the end of its row, but for the padding row."""
        n = len(tokens)
        picks = parallel.stack(self._picks[:n])  # (ranks, n, 2)
        append = rows is not None and table is not None
        merge_picks_kernel[(n,)](
            picks,
            rows if append else tokens,
            table.token_ids if table is not None else tokens,
            table.num_tokens if table is not None else tokens,
            tokens,
            n,
            table.token_ids.stride(0) if table is not None else 0,
            len(table.num_tokens) - 1 if table is not None else 0,
            vocab_size=self._vocab.vocab_size,
            ranks=len(picks),
            ranks_block=triton.next_power_of_2(len(picks)),
            append=append,
            num_warps=1,
            **self._modes,
        )


@triton.jit(do_not_specialize=["padding_row", "first_token_id"])
def vocab_pick_kernel(
    logits_ptr,
    rows_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    threshold_ptr,
    chunk_value_ptr,
    chunk_token_ptr,
    num_arrived_ptr,
    picks_ptr,
    stride,
    padding_row,
    first_token_id,
    num_local: tl.constexpr,
    num_chunks: tl.constexpr,
    num_chunks_block: tl.constexpr,
    chunk_size: tl.constexpr,
    from_table: tl.constexpr,
    random: tl.constexpr,
    filtered: tl.constexpr,
    fast: tl.constexpr,
):
    """Grid (num_chunks, n). A program takes a chunk of a row; the one that arrives last merges the row's chunks."""
    chunk = tl.program_id(0)
    logits_row = tl.program_id(1).to(tl.int64)
    row = logits_row
    if from_table:
        row = tl.load(rows_ptr + logits_row)
    if not from_table or row != padding_row:  # of padding no pick is read
        columns = chunk * chunk_size + tl.arange(0, chunk_size)
        tokens = first_token_id + columns
        x = tl.load(logits_ptr + logits_row * stride + columns, mask=columns < num_local, other=float("-inf"))
        values = x.to(tl.float32)
        if random:
            temperature = tl.load(temperature_ptr + row)
            if temperature > 0.0:
                noise = device_gumbel(tl.load(seed_ptr + row), tl.load(position_ptr + row), tokens, fast)
                noised = values * (1.0 / temperature) + noise
                if filtered:
                    allowed = (values >= tl.load(threshold_ptr + logits_row)) | (values != values)  # a NaN is found
                    noised = tl.where(allowed, noised, float("-inf"))
                values = noised
        best = max_or_nan(values, 0, fast)
        no_token: tl.constexpr = 1 << 24
        token = tl.min(tl.where((values == best) & (columns < num_local), tokens, no_token), axis=0)
        tl.store(chunk_value_ptr + logits_row * num_chunks + chunk, best)
        tl.store(chunk_token_ptr + logits_row * num_chunks + chunk, token)
        # As in ``argmax_kernel``: publish, and the last to arrive reads what the others published.
        tl.debug_barrier()
        num_arrived = tl.atomic_add(num_arrived_ptr + logits_row, 1, sem="acq_rel")
        if num_arrived == num_chunks - 1:
            chunks = tl.arange(0, num_chunks_block)
            inside = chunks < num_chunks
            start = logits_row * num_chunks + chunks
            bests = tl.load(chunk_value_ptr + start, mask=inside, other=float("-inf"), cache_modifier=".cg")
            best_tokens = tl.load(chunk_token_ptr + start, mask=inside, other=no_token, cache_modifier=".cg")
            best = max_or_nan(bests, 0, fast)
            token = tl.min(tl.where(bests == best, best_tokens, no_token), axis=0)
            tl.store(picks_ptr + logits_row * 2, best)
            tl.store(picks_ptr + logits_row * 2 + 1, token.to(tl.float32))
            tl.store(num_arrived_ptr + logits_row, 0)  # ready for the next launch, without one to clear it


@triton.jit(do_not_specialize=["n", "padding_row"])
def merge_picks_kernel(
    picks_ptr,
    rows_ptr,
    token_ids_ptr,
    num_tokens_ptr,
    out_ptr,
    n,
    token_stride,
    padding_row,
    vocab_size: tl.constexpr,
    ranks: tl.constexpr,
    ranks_block: tl.constexpr,
    append: tl.constexpr,
    fast: tl.constexpr,
):
    """Grid (n,)."""
    logits_row = tl.program_id(0).to(tl.int64)
    row = logits_row
    if append:
        row = tl.load(rows_ptr + logits_row)
    if not append or row != padding_row:
        rank = tl.arange(0, ranks_block)
        inside = rank < ranks
        pick_ptr = picks_ptr + (rank.to(tl.int64) * n + logits_row) * 2
        values = tl.load(pick_ptr, mask=inside, other=float("-inf"))
        tokens = tl.load(pick_ptr + 1, mask=inside, other=0.0).to(tl.int32)
        # The smallest id of equals. A NaN leaves vocab_size, which the end clamps.
        best = max_or_nan(values, 0, fast)
        token = tl.min(tl.where((values == best) & inside, tokens, vocab_size), axis=0)
        store_sampled_token(
            token, best, logits_row, row, out_ptr, token_ids_ptr, num_tokens_ptr, token_stride, vocab_size, append, True
        )

"""The state of running requests on the device, in rows that stay put. The host sends differences alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quire.core.contracts.sampler import SamplingTable
from quire.core.messages import BlockDiff, HostDraft, NewRequest
from quire.core.ops.pinned import copy_to_device
from quire.core.sample.verify import place_drafts

__all__ = ["RequestTable"]


class RequestTable:
    """Columns by row. Tokens are fed back on the device: ``append_tokens`` writes what was sampled.

    ``token_ids`` (rows, length) int32; ``num_tokens`` and ``num_computed_tokens`` (rows,) int32; ``block_tables`` by
    group (rows, max_blocks) int32; sampling parameters (rows,). Rows outside the step are never read. One more row than
    asked for stands for padding: it keeps one token, in block 0.

    Drafts lie in ``token_ids`` behind a row's ``num_tokens``; ``num_drafts`` (rows,) int32 of them are real. A step may
    reach ``lookahead`` tokens beyond the longest request: its padding does.
    """

    def __init__(
        self,
        num_rows: int,
        max_model_len: int,
        block_size: int,
        num_groups: int,
        device: torch.device,
        lookahead: int = 0,
    ) -> None:
        def column(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(num_rows + 1, *shape, dtype=dtype, device=device)

        self.device = device
        self.num_rows = num_rows
        self.padding_row = num_rows
        self.max_model_len = max_model_len
        self.token_ids = column(torch.int32, max_model_len + 1 + lookahead)
        self._int_columns = torch.zeros(5, num_rows + 1, dtype=torch.int32, device=device)
        self.num_tokens, self.num_computed_tokens, self.prompt_len, self.top_k, self.num_drafts = self._int_columns
        max_blocks = -(-(max_model_len + lookahead) // block_size)
        self.block_tables = [column(torch.int32, max_blocks) for _ in range(num_groups)]
        self._float_params = torch.zeros(6, num_rows + 1, dtype=torch.float32, device=device)
        (
            self.temperature,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.frequency_penalty,
            self.presence_penalty,
        ) = self._float_params
        self.seed = column(torch.int64)
        self.sampling = SamplingTable(
            self.token_ids, self.num_tokens, self.temperature, self.top_k, self.top_p, self.min_p, self.seed
        )

    def add_requests(self, requests: Sequence[NewRequest]) -> None:
        """Fill the rows of requests that enter."""
        if not requests:
            return
        params = [r.params for r in requests]
        tokens = copy_to_device(
            np.concatenate([np.asarray(r.token_ids, np.int32) for r in requests]), torch.int32, self.device
        )
        lengths = [len(r.token_ids) for r in requests]
        for request, own in zip(requests, tokens.split(lengths), strict=True):
            self.token_ids[request.row, : len(own)] = own
        whole = [
            [r.row for r in requests],
            [r.seed for r in requests],
            lengths,
            [r.num_computed_tokens for r in requests],
            [r.prompt_len for r in requests],
            [p.top_k for p in params],
            [0 for _ in requests],
        ]
        rows, seeds, *counts = copy_to_device(whole, torch.int64, self.device)
        for table in self.block_tables:
            table.index_fill_(0, rows, 0)  # what a draft reaches beyond its own blocks is the padding block
        self.seed[rows] = seeds
        self._int_columns[:, rows] = torch.stack(counts).int()
        float_params = [
            [p.temperature for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [p.repetition_penalty for p in params],
            [p.frequency_penalty for p in params],
            [p.presence_penalty for p in params],
        ]
        self._float_params[:, rows] = copy_to_device(float_params, torch.float32, self.device)

    def update_block_tables(self, diffs: Sequence[BlockDiff]) -> None:
        """Apply changes of block tables: one scatter a group."""
        for group, table in enumerate(self.block_tables):
            mine = [d for d in diffs if d.group == group]
            if not mine:
                continue
            rows = [d.row for d in mine for _ in d.block_ids]
            places = [d.start + i for d in mine for i in range(len(d.block_ids))]
            ids = [b for d in mine for b in d.block_ids]
            packed = copy_to_device([rows, places, ids], torch.int64, self.device)
            table[packed[0], packed[1]] = packed[2].int()

    def place_host_drafts(self, host_drafts: Sequence[HostDraft], vocab_size: int) -> None:
        """Make drafts of what the host expects, where it agrees with what was drawn since."""
        if not host_drafts:
            return
        longest = max(len(guess.token_ids) for guess in host_drafts)
        columns = np.full((2 + longest, len(host_drafts)), -1, dtype=np.int64)
        for i, guess in enumerate(host_drafts):
            columns[: 2 + len(guess.token_ids), i] = guess.row, guess.base_len, *guess.token_ids
        rows, anchor, *_ = packed = copy_to_device(columns, torch.int64, self.device)  # kernels take contiguous rows
        tokens = packed[2:].T
        place = torch.arange(longest, device=self.device)[None, :]
        num_sampled = self.num_tokens[rows].long() - anchor
        known = self.token_ids[rows[:, None], (anchor[:, None] + place).clamp(max=self.token_ids.shape[1] - 1)]
        agrees = ((known == tokens) | (place >= num_sampled[:, None])).all(1)
        tokens = tokens.gather(1, (place + num_sampled[:, None]).clamp(max=longest - 1))
        lengths = torch.where(agrees, longest - num_sampled, 0).clamp(min=0)
        place_drafts(tokens, lengths, rows, self.sampling, self.num_drafts, vocab_size)

    def append_tokens(self, rows: Tensor, tokens: Tensor) -> None:
        """Write the token drawn for each row at its end: ``rows`` (n,) int64, ``tokens`` (n,) int32, device."""
        end = self.num_tokens[rows]
        self.token_ids[rows, end.long()] = tokens
        self.num_tokens[rows] = end + 1

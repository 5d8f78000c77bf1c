"""The state of running requests on the device, in rows that stay put. The host sends differences alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.sampler import SamplingTable
from quire.core.messages import BlockDiff, HostDraft, NewRequest
from quire.core.ops.pinned import copy_to_device
from quire.core.sample.verify import place_drafts

__all__ = ["RequestTable"]


class RequestTable:
    """A row for each running request, for as long as it runs; the host sends what changes and reads nothing back.

    ``token_ids`` (rows, length) int32; ``num_tokens`` and ``num_computed_tokens`` (rows,) int32; ``block_tables`` by
    group (rows, max_blocks) int32; sampling parameters (rows,). Rows outside the step are never read. Sampled tokens
    are appended on the device (``append_tokens``, or the sampler itself), so that the next step can be launched before
    the host knows them.

    One more row than asked for, the last, stands for padding: it keeps one token, in block 0.

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
        def make_column(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(num_rows + 1, *shape, dtype=dtype, device=device)

        self.device = device
        self.num_rows = num_rows
        self.padding_row = num_rows
        self.max_model_len = max_model_len
        self.token_ids = make_column(torch.int32, max_model_len + 1 + lookahead)
        # Columns of one type are rows of one tensor: a request that enters fills all of them with one scatter.
        self._int_columns = torch.zeros(5, num_rows + 1, dtype=torch.int32, device=device)
        self.num_tokens, self.num_computed_tokens, self.prompt_len, self.top_k, self.num_drafts = self._int_columns
        max_blocks = -(-(max_model_len + lookahead) // block_size)
        self.block_tables = [make_column(torch.int32, max_blocks) for _ in range(num_groups)]
        self._float_columns = torch.zeros(6, num_rows + 1, dtype=torch.float32, device=device)
        (
            self.temperature,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.frequency_penalty,
            self.presence_penalty,
        ) = self._float_columns
        self.seed = make_column(torch.int64)
        self.sampling = SamplingTable(
            self.token_ids, self.num_tokens, self.temperature, self.top_k, self.top_p, self.min_p, self.seed
        )

    def add_requests(self, requests: Sequence[NewRequest]) -> None:
        """Fill the rows of requests that enter, whatever was there before."""
        if not requests:
            return
        params = [r.params for r in requests]
        lengths = [len(r.token_ids) for r in requests]
        # Three copies, however many requests enter: tokens, integers and floats.
        all_token_ids = np.concatenate([np.asarray(r.token_ids, np.int32) for r in requests])
        token_ids = copy_to_device(all_token_ids, torch.int32, self.device)
        for request, request_token_ids in zip(requests, token_ids.split(lengths), strict=True):
            self.token_ids[request.row, : len(request_token_ids)] = request_token_ids
        integers = [
            [r.row for r in requests],
            [r.seed for r in requests],
            # From here on in the order of ``_int_columns``.
            lengths,
            [r.num_computed_tokens for r in requests],
            [r.prompt_len for r in requests],
            [p.top_k for p in params],
            [0 for _ in requests],
        ]
        rows, seeds, *int_columns = copy_to_device(integers, torch.int64, self.device)
        for block_table in self.block_tables:
            block_table.index_fill_(0, rows, 0)  # what a draft reaches beyond its own blocks is the padding block
        self.seed[rows] = seeds
        self._int_columns[:, rows] = torch.stack(int_columns).int()
        floats = [
            [p.temperature for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [p.repetition_penalty for p in params],
            [p.frequency_penalty for p in params],
            [p.presence_penalty for p in params],
        ]
        self._float_columns[:, rows] = copy_to_device(floats, torch.float32, self.device)

    def update_block_tables(self, diffs: Sequence[BlockDiff]) -> None:
        """Apply changes of block tables: one copy and one scatter a group."""
        for group, block_table in enumerate(self.block_tables):
            group_diffs = [diff for diff in diffs if diff.group == group]
            if not group_diffs:
                continue
            rows = [diff.row for diff in group_diffs for _ in diff.block_ids]
            columns = [diff.start + i for diff in group_diffs for i in range(len(diff.block_ids))]
            block_ids = [block for diff in group_diffs for block in diff.block_ids]
            packed = copy_to_device([rows, columns, block_ids], torch.int64, self.device)  # (3, n)
            block_table[packed[0], packed[1]] = packed[2].int()

    def clear_block_tables(self, rows: NDArray[np.int32]) -> None:
        """Make block 0 of all blocks of these rows: what is written for them touches no other request."""
        device_rows = copy_to_device(rows, torch.int64, self.device)
        for block_table in self.block_tables:
            block_table.index_fill_(0, device_rows, 0)

    def place_host_drafts(self, host_drafts: Sequence[HostDraft], vocab_size: int) -> None:
        """Make drafts of what a proposer on the host expects, where that agrees with what was sampled since."""
        if not host_drafts:
            return
        longest = max(len(draft.token_ids) for draft in host_drafts)
        # (2 + longest, n): row, base length, tokens. -1, which is no token, ends the shorter drafts.
        columns = np.full((2 + longest, len(host_drafts)), -1, dtype=np.int64)
        for i, draft in enumerate(host_drafts):
            columns[: 2 + len(draft.token_ids), i] = draft.row, draft.base_len, *draft.token_ids
        rows, base_len, *_ = packed = copy_to_device(columns, torch.int64, self.device)  # kernels take contiguous rows
        draft_tokens = packed[2:].T  # (n, longest)
        offset = torch.arange(longest, device=self.device)[None, :]
        # The proposer saw ``base_len`` tokens; the device has sampled more since. A draft that those contradict is
        # dropped whole, and of the others what was sampled already is cut off the front.
        num_sampled = self.num_tokens[rows].long() - base_len
        last_column = self.token_ids.shape[1] - 1
        known_tokens = self.token_ids[rows[:, None], (base_len[:, None] + offset).clamp(max=last_column)]
        agrees = ((known_tokens == draft_tokens) | (offset >= num_sampled[:, None])).all(1)
        # Fewer tokens than the proposer saw: the step that brought the request failed, and nothing of the row counts.
        agrees &= num_sampled >= 0
        draft_tokens = draft_tokens.gather(1, (offset + num_sampled[:, None]).clamp(0, longest - 1))
        lengths = torch.where(agrees, longest - num_sampled, 0).clamp(min=0)
        place_drafts(draft_tokens, lengths, rows, self.sampling, self.num_drafts, vocab_size)

    def gather_drafts(self, rows: NDArray[np.int32], num_tokens: int) -> Tensor:
        """The drafts that lie behind the tokens of ``rows`` (n,): (n, num_tokens) int32, -1 behind the last of each."""
        device_rows = copy_to_device(rows, torch.int64, self.device)
        offset = torch.arange(num_tokens, device=self.device)[None, :]
        columns = (self.num_tokens[device_rows].long()[:, None] + offset).clamp(max=self.token_ids.shape[1] - 1)
        is_draft = offset < self.num_drafts[device_rows][:, None]
        return torch.where(is_draft, self.token_ids[device_rows[:, None], columns], -1)

    def append_tokens(self, rows: Tensor, tokens: Tensor) -> None:
        """Write the token sampled for each row at its end: ``rows`` (n,) int64, ``tokens`` (n,) int32, device. A fault
        in the place of a token (``row_faults``) is written as token 0."""
        end = self.num_tokens[rows]
        self.token_ids[rows, end.long()] = tokens.clamp(min=0)
        self.num_tokens[rows] = end + 1

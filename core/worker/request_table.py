"""The state of running requests on the device, in rows that stay put. The host sends differences alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.core.contracts.sampler import SamplingTable
from quire.core.messages import BlockDiff, NewRequest

__all__ = ["RequestTable"]


class RequestTable:
    """Columns by row. Tokens are fed back on the device: ``append`` writes what was drawn, nobody reads it back first.

    ``token_ids`` (rows, length) int32; ``num_tokens`` and ``num_computed`` (rows,) int32; ``block_tables`` by group
    (rows, max_blocks) int32; sampling parameters (rows,). Rows outside the step are never read. One more row than asked
    for stands for padding: it keeps one token, in block 0.
    """

    def __init__(
        self, num_rows: int, max_model_len: int, block_size: int, num_groups: int, device: torch.device
    ) -> None:
        def column(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(num_rows + 1, *shape, dtype=dtype, device=device)

        self.device = device
        self.num_rows = num_rows
        self.padding_row = num_rows
        self.max_model_len = max_model_len
        self.token_ids = column(torch.int32, max_model_len + 1)
        self.num_tokens = column(torch.int32)
        self.num_computed = column(torch.int32)
        self.prompt_len = column(torch.int32)
        max_blocks = -(-max_model_len // block_size)
        self.block_tables = [column(torch.int32, max_blocks) for _ in range(num_groups)]
        self.temperature = column(torch.float32)
        self.top_k = column(torch.int32)
        self.top_p = column(torch.float32)
        self.min_p = column(torch.float32)
        self.seed = column(torch.int64)
        self.repetition = column(torch.float32)
        self.frequency = column(torch.float32)
        self.presence = column(torch.float32)
        self.sampling = SamplingTable(
            self.token_ids, self.num_tokens, self.temperature, self.top_k, self.top_p, self.min_p, self.seed
        )

    def add(self, requests: Sequence[NewRequest]) -> None:
        """Fill the rows of requests that enter."""
        if not requests:
            return
        rows = self._upload([r.row for r in requests], torch.int64)
        for request in requests:
            tokens = torch.tensor(request.token_ids, dtype=torch.int32)
            self.token_ids[request.row, : len(tokens)] = tokens.to(self.device, non_blocking=True)
        params = [r.params for r in requests]
        columns: list[tuple[Tensor, list[float] | list[int]]] = [
            (self.num_tokens, [len(r.token_ids) for r in requests]),
            (self.num_computed, [r.num_computed for r in requests]),
            (self.prompt_len, [r.prompt_len for r in requests]),
            (self.temperature, [p.temperature for p in params]),
            (self.top_k, [p.top_k for p in params]),
            (self.top_p, [p.top_p for p in params]),
            (self.min_p, [p.min_p for p in params]),
            (self.seed, [r.seed for r in requests]),
            (self.repetition, [p.repetition_penalty for p in params]),
            (self.frequency, [p.frequency_penalty for p in params]),
            (self.presence, [p.presence_penalty for p in params]),
        ]
        for column, values in columns:
            column[rows] = self._upload(values, column.dtype)

    def set_blocks(self, diffs: Sequence[BlockDiff]) -> None:
        """Apply changes of block tables: one scatter a group."""
        for group, table in enumerate(self.block_tables):
            mine = [d for d in diffs if d.group == group]
            if not mine:
                continue
            rows = [d.row for d in mine for _ in d.block_ids]
            places = [d.start + i for d in mine for i in range(len(d.block_ids))]
            ids = [b for d in mine for b in d.block_ids]
            packed = self._upload([rows, places, ids], torch.int64)
            table[packed[0], packed[1]] = packed[2].int()

    def append(self, rows: Tensor, tokens: Tensor) -> None:
        """Write the token drawn for each row at its end: ``rows`` (n,) int64, ``tokens`` (n,) int32, device."""
        end = self.num_tokens[rows]
        self.token_ids[rows, end.long()] = tokens
        self.num_tokens[rows] = end + 1

    def _upload(self, values: object, dtype: torch.dtype) -> Tensor:
        host = torch.tensor(values, dtype=dtype)
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

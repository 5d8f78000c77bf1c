"""A sampler of another author, with every row checked: its logits before, and its token afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.contracts.sampler import Sampler, SamplingBatch, SamplingTable
from quire.core.sample.row_faults import NO_LOGITS, NO_TOKEN, find_invalid_rows

__all__ = ["CheckedSampler", "check_sampled_tokens"]


class CheckedSampler(Sampler):
    """Samples what ``sampler`` does. In the place of a token stands a fault (``row_faults``) where the logits of a row
    are invalid, or where what it returned is not in the vocabulary; the request table then gets token 0.

    The bundled sampler's kernels do the same by themselves.
    """

    def __init__(self, sampler: Sampler) -> None:
        super().__init__(sampler.vocab_size, sampler.device, sampler.options)
        self.sampler = sampler

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """``logits`` (n, vocab) -> (n,) int32. Raises ``ValueError`` for what are no tokens at all."""
        is_invalid = find_invalid_rows(logits)  # before: the sampler may overwrite them
        tokens = check_sampled_tokens(self.sampler.sample(logits, batch), len(logits))
        return self._mark_faults(tokens, is_invalid)

    def prepare_graph_sampling(self, max_rows: int) -> bool:
        """As the sampler does."""
        return self.sampler.prepare_graph_sampling(max_rows)

    def sample_from_table(
        self, logits: Tensor, rows: Tensor, table: SamplingTable, tokens: Tensor, *, greedy: bool
    ) -> None:
        """As the sampler does; what it appended to the table becomes a token of the vocabulary."""
        is_invalid = find_invalid_rows(logits)
        self.sampler.sample_from_table(logits, rows, table, tokens, greedy=greedy)
        last = (table.num_tokens[rows].long() - 1).clamp(min=0)
        appended = table.token_ids[rows, last]
        table.token_ids[rows, last] = torch.where(self._is_token(appended), appended, 0)
        tokens.copy_(self._mark_faults(tokens, is_invalid))

    def _mark_faults(self, tokens: Tensor, is_invalid: Tensor) -> Tensor:
        faults = torch.where(is_invalid, NO_LOGITS, NO_TOKEN).int()
        return torch.where(self._is_token(tokens) & ~is_invalid, tokens, faults).int()

    def _is_token(self, tokens: Tensor) -> Tensor:
        return (tokens >= 0) & (tokens < self.vocab_size)


def check_sampled_tokens(tokens: object, num_rows: int) -> Tensor:
    """``tokens``, if they are (num_rows,) integers. Raises ``ValueError``."""
    if not isinstance(tokens, Tensor) or tokens.shape != (num_rows,) or tokens.is_floating_point():
        shape = f"{tuple(tokens.shape)} of {tokens.dtype}" if isinstance(tokens, Tensor) else repr(tokens)
        raise ValueError(f"sample returned {shape:.200}, not ({num_rows},) of torch.int32")
    return tokens

"""The vocabulary shared by ranks: each has the embeddings and logits of a range of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quire.core.layers.parallel import TensorParallel

__all__ = ["VocabShard"]


@dataclass(frozen=True)
class VocabShard:
    """One rank's range. Every rank has room for as many tokens; what lies behind the vocabulary is padding."""

    vocab_size: int
    parallel: TensorParallel

    @property
    def size(self) -> int:
        """Tokens of each rank, padding included."""
        return -(-self.vocab_size // self.parallel.size)

    @property
    def first_token_id(self) -> int:
        """The token of column 0."""
        return self.parallel.rank * self.size

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank that are in the vocabulary."""
        return max(0, min(self.size, self.vocab_size - self.first_token_id))

    def gather_logits(self, local_logits: Tensor) -> Tensor:
        """(n, size) on every rank -> (n, vocab_size)."""
        return self.parallel.all_gather(local_logits)[:, : self.vocab_size]

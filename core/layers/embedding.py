"""Token embedding and language model head, both divided by vocabulary."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quire.core.errors import ConfigError
from quire.core.layers.checkpoint import CheckpointLayer, WeightLoader, check_tensor_shape
from quire.core.layers.linear import Linear
from quire.core.layers.parallel import TensorParallel
from quire.core.layers.vocab import VocabShard
from quire.core.ops.linear import SmallBatchGemm, get_small_batch_gemm
from quire.core.ops.operation_table import OperationTable

__all__ = ["LMHead", "VocabEmbedding"]

_log = logging.getLogger("quire.layers")


class VocabEmbedding(CheckpointLayer):
    """Token ids -> hidden states; with several ranks each holds a range of tokens and the ranks sum."""

    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden_size: int,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
        operations: OperationTable | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.operations = operations or OperationTable()
        self.vocab_size = vocab_size
        self.parallel = parallel
        shard = VocabShard(vocab_size, parallel)
        self.vocab_start_index = shard.first_token_id
        weight = torch.zeros(shard.size, hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)  # (shard_size, hidden)

    def forward(self, ids: Tensor) -> Tensor:
        """(num_tokens,) int -> (num_tokens, hidden)."""
        whole = self.parallel.size == 1
        return self.parallel.all_reduce(self.operations.embedding(ids, self.weight, self.vocab_start_index, whole))

    def weight_loaders(self) -> dict[str, WeightLoader]:
        """One for the whole table, of which this rank keeps its shard."""
        return {f"{self.name}.weight": self.load_weight}

    def load_weight(self, tensor: Tensor) -> None:
        """Copy this rank's shard of the whole table into place."""
        check_tensor_shape(f"{self.name}.weight", tensor, (self.vocab_size, self.weight.shape[1]))
        shard = tensor[self.vocab_start_index : self.vocab_start_index + self.weight.shape[0]]
        self.weight[: len(shard)].copy_(shard)  # the last rank's padding stays zero


class LMHead(CheckpointLayer):
    """Hidden states -> logits over the whole vocabulary, by a linear layer of its own or the embedding's weights.

    A checkpoint whose config.json ties the two may still hold a head (merged fine-tunes): it is used if it differs from
    the embedding, as transformers does.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        parallel: TensorParallel,
        source: Linear | VocabEmbedding,
        operations: OperationTable | None = None,
    ) -> None:
        super().__init__()
        self.operations = operations or OperationTable()
        self.name = name
        self.vocab_size = vocab_size
        self.parallel = parallel
        self.vocab_shard = VocabShard(vocab_size, parallel)
        self.tied = isinstance(source, VocabEmbedding)
        self.weight_source = source
        self._stored_weight: Tensor | None = None
        self.small_batch_gemm: SmallBatchGemm | None = None
        if isinstance(source, VocabEmbedding):
            shard_size, hidden_size = source.weight.shape
            weight = source.weight
            self.small_batch_gemm = get_small_batch_gemm(weight.device, shard_size, hidden_size, weight.dtype)

    def weight_loaders(self) -> dict[str, WeightLoader]:
        """Of a tied head; another's weights are loaded by its linear layer."""
        return {f"{self.name}.weight": self._load_weight} if self.tied else {}

    def optional_tensors(self) -> set[str]:
        """The weight: a tied head has none of its own."""
        return set(self.weight_loaders())

    def process_weights_after_loading(self) -> None:
        """Take the head that the checkpoint holds beside a tied embedding, if they differ."""
        embedding, stored = self.weight_source, self._stored_weight
        if stored is None or not isinstance(embedding, VocabEmbedding):
            return
        self._stored_weight = None
        own = VocabEmbedding(
            self.name,
            self.vocab_size,
            embedding.weight.shape[1],
            self.parallel,
            embedding.weight.dtype,
            embedding.weight.device,
            embedding.operations,
        )
        own.load_weight(stored)
        if not torch.equal(own.weight, embedding.weight):
            _log.warning(
                "config.json ties %s to the embedding, but the checkpoint has one that differs: used", self.name
            )
            self.tied = False
            self.weight_source = own

    def _load_weight(self, tensor: Tensor) -> None:
        self._stored_weight = tensor  # the embedding may not be loaded yet

    def _get_dense_weight(self) -> Tensor:
        """(rows of this rank, hidden). Raises ``ConfigError`` where the head is stored in another way."""
        source, weight = self.weight_source, getattr(self.weight_source, "weight", None)
        if isinstance(source, Linear):
            expected = (source.info.out_features, source.info.in_features)
            if not isinstance(weight, Tensor) or weight.shape != expected or weight.dtype != source.info.dtype:
                raise ConfigError(
                    f"--op lm_head: the weights of {self.name} are quantized, and an operation takes plain ones; "
                    f"leave the flag out"
                )
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, vocab_size) in the model's dtype."""
        return self.vocab_shard.gather_logits(self.compute_local_logits(hidden))

    def compute_local_logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, vocab_shard.size): of this rank's tokens, padding behind them."""
        if self.operations.lm_head is not None:
            return self.operations.lm_head(hidden, self._get_dense_weight())
        if not isinstance(self.weight_source, VocabEmbedding):
            own_logits: Tensor = self.weight_source(hidden)
            return own_logits
        weight = self.weight_source.weight
        logits = None if self.small_batch_gemm is None else self.small_batch_gemm(hidden, weight)
        # None: no kernel for this device or shape, or so many rows that cuBLAS is faster.
        return F.linear(hidden, weight) if logits is None else logits

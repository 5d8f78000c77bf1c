"""The bundled sampler: one rule for greedy, random and verified tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.core.contracts.sampler import Sampler, SamplingBatch, SamplingTable
from quire.core.sample.filters import apply_filters
from quire.core.sample.inputs import SamplingColumns
from quire.core.sample.noise import gumbel

__all__ = ["GumbelSampler"]


class GumbelSampler(Sampler):
    """``argmax(logits / temperature + Gumbel(seed, position))`` over the allowed tokens; at 0 the plain argmax.

    On a GPU by Triton kernels that never sort, elsewhere by torch; both draw the same tokens but for near ties.
    """

    def __init__(self, vocab_size: int, device: torch.device, options: Any = None) -> None:
        super().__init__(vocab_size, device, options)
        self._workspace: Any = None  # Workspace: triton is imported on a GPU alone

    def prepare_graph_sampling(self, max_rows: int) -> bool:
        """On a GPU: yes."""
        if self.device.type != "cuda":
            return False
        from quire.core.sample.kernels.workspace import Workspace

        self._workspace = Workspace(max_rows, self.vocab_size, self.device)
        return True

    def sample_from_table(
        self, logits: Tensor, rows: Tensor, table: SamplingTable, tokens: Tensor, *, greedy: bool
    ) -> None:
        """One launch where all are greedy, three otherwise."""
        from quire.core.sample.kernels.argmax_kernel import launch_argmax
        from quire.core.sample.kernels.launch_sample import launch_sample

        work = self._workspace_for(logits)
        if greedy:
            launch_argmax(logits, work, tokens, rows, table.token_ids, table.num_tokens)
            return
        t = table
        columns = SamplingColumns(t.temperature, t.top_k, t.top_p, t.min_p, t.seed, t.num_tokens)
        launch_sample(logits, columns, work, tokens, rows, table.token_ids)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """``logits`` (n, vocab) float32 -> (n,) int32."""
        if logits.device.type == "cuda":
            return self._sample_with_kernels(logits, batch)
        if not batch.any_random:
            return logits.argmax(-1).int()
        random = batch.temperature > 0
        logits.div_(torch.where(random, batch.temperature, 1.0)[:, None])
        logits = apply_filters(logits, batch)
        noise = gumbel(batch.seed, batch.position, logits.shape[-1])
        return torch.where(random[:, None], logits + noise, logits).argmax(-1).int()

    def _sample_with_kernels(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        from quire.core.sample.kernels.argmax_kernel import launch_argmax
        from quire.core.sample.kernels.launch_sample import launch_sample

        tokens = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
        b = batch
        if b.any_random:
            columns = SamplingColumns(b.temperature, b.top_k, b.top_p, b.min_p, b.seed, b.position)
            launch_sample(logits, columns, self._workspace_for(logits), tokens)
        else:
            launch_argmax(logits, self._workspace_for(logits), tokens)
        return tokens

    def _workspace_for(self, logits: Tensor) -> Any:
        """The prepared workspace, or one of its own for logits that do not fit it, which no captured graph knows."""
        from quire.core.sample.kernels.workspace import Workspace

        n, vocab = logits.shape
        work = self._workspace
        if work is None or n > work.max_rows or vocab != work.vocab_size:
            work = Workspace(n, vocab, logits.device)
            if self._workspace is None:
                self._workspace = work
        return work

"""The bundled sampler: the argmax of logits plus Gumbel noise, for greedy, random and verified tokens alike.

The Gumbel-max trick (Gumbel, 1954; Maddison et al., "A* Sampling", 2014): if the g_i are independent standard Gumbel
variables, argmax(x_i + g_i) is distributed as softmax(x). The noise comes from a counter (``core.sample.noise``), so a
token is a function of its logits, the request's seed and its position, and needs no generator state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quire.core.contracts.sampler import Sampler, SamplingBatch, SamplingTable
from quire.core.sample.filters import apply_filters
from quire.core.sample.inputs import SamplingColumns
from quire.core.sample.noise import gumbel
from quire.core.sample.row_faults import NO_LOGITS, find_invalid_rows, mark_invalid_rows

if TYPE_CHECKING:  # triton is imported on a GPU alone
    from quire.core.sample.kernels.workspace import Workspace

__all__ = ["GumbelSampler"]


class GumbelSampler(Sampler):
    """``argmax(logits / temperature + Gumbel(seed, position))`` over the allowed tokens; at 0 the plain argmax.

    On a GPU by Triton kernels that never sort, elsewhere by torch; both sample the same tokens but for near ties.
    """

    def __init__(self, vocab_size: int, device: torch.device, options: Any = None) -> None:
        super().__init__(vocab_size, device, options)
        self.marks_invalid_rows = False
        """Whether a fault (``row_faults``) stands in the place of a token for a row with a NaN, or with no logit above
        minus infinity. For the sampler of requests alone: proposers look the tokens up in an embedding."""
        self._workspace: Workspace | None = None

    def prepare_graph_sampling(self, max_rows: int) -> bool:
        """On a GPU: yes."""
        if self.device.type != "cuda":
            return False
        self.allocate_workspace(max_rows)
        return True

    def allocate_workspace(self, max_rows: int) -> None:
        """Make what the kernels write between their launches, for up to ``max_rows`` rows of logits."""
        from quire.core.sample.kernels.workspace import Workspace

        self._workspace = Workspace(max_rows, self.vocab_size, self.device)

    def sample_from_table(
        self, logits: Tensor, rows: Tensor, table: SamplingTable, tokens: Tensor, *, greedy: bool
    ) -> None:
        """One launch where all are greedy, three otherwise."""
        from quire.core.sample.kernels.argmax_kernel import launch_argmax
        from quire.core.sample.kernels.launch_sample import launch_sample

        workspace, t = self._workspace_for(logits), table
        if greedy:
            launch_argmax(
                logits, workspace, tokens, rows, t.token_ids, t.num_tokens, mark_invalid=self.marks_invalid_rows
            )
            return
        columns = SamplingColumns(t.temperature, t.top_k, t.top_p, t.min_p, t.seed, t.num_tokens)
        launch_sample(logits, columns, workspace, tokens, rows, t.token_ids, mark_invalid=self.marks_invalid_rows)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """``logits`` (n, vocab) float32 -> (n,) int32."""
        if logits.device.type == "cuda":
            return self._sample_with_kernels(logits, batch)
        if not batch.any_random:
            tokens = logits.argmax(-1).int()
            return mark_invalid_rows(logits, tokens) if self.marks_invalid_rows else tokens
        is_invalid = find_invalid_rows(logits) if self.marks_invalid_rows else None
        random = batch.temperature > 0
        logits.div_(torch.where(random, batch.temperature, 1.0)[:, None])
        logits = apply_filters(logits, batch)
        noise = gumbel(batch.seed, batch.position, logits.shape[-1])
        # Filters keep the best token of every row, so they do not change what a greedy row takes.
        tokens = torch.where(random[:, None], logits + noise, logits).argmax(-1).int()
        return tokens if is_invalid is None else torch.where(is_invalid, NO_LOGITS, tokens)

    def _sample_with_kernels(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        from quire.core.sample.kernels.argmax_kernel import launch_argmax
        from quire.core.sample.kernels.launch_sample import launch_sample

        tokens = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
        b, workspace = batch, self._workspace_for(logits)
        if b.any_random:
            columns = SamplingColumns(b.temperature, b.top_k, b.top_p, b.min_p, b.seed, b.position)
            launch_sample(logits, columns, workspace, tokens, mark_invalid=self.marks_invalid_rows)
        else:
            launch_argmax(logits, workspace, tokens, mark_invalid=self.marks_invalid_rows)
        return tokens

    def _workspace_for(self, logits: Tensor) -> Workspace:
        """The prepared workspace, or one of its own for logits that do not fit it, which no captured graph knows."""
        from quire.core.sample.kernels.workspace import Workspace

        n, vocab_size = logits.shape
        workspace = self._workspace
        if workspace is None or n > workspace.max_rows or vocab_size != workspace.vocab_size:
            workspace = Workspace(n, vocab_size, logits.device)
            if self._workspace is None:
                self._workspace = workspace
        return workspace

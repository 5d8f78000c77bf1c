"""Sampling where ranks share the vocabulary: each proposes its best token, and few numbers are exchanged.

The argmax over the vocabulary is the best of the ranks' argmaxes, and the noise of a token depends on seed, position
and token alone: so greedy tokens and random ones need one exchange of two numbers a row and rank, whatever the size of
the vocabulary. Filters that keep the tokens of at least some logit need that threshold first. The k best tokens of the
whole are among the k best of each rank, so one more exchange of ``MAX_TOP_K`` logits a row and rank gives it exactly.
Top-p without top-k has no such bound: it takes whole logits, as everything does that changes logits or reports them
(``docs/decisions/0015-vocabulary-parallel-sampling.md``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quire.core.contracts.sampler import SamplingBatch, SamplingTable
from quire.core.layers.vocab import VocabShard
from quire.core.sample.inputs import SamplingColumns
from quire.core.sample.noise import gumbel
from quire.core.sample.row_faults import NO_LOGITS

if TYPE_CHECKING:  # triton is imported on a GPU alone
    from quire.core.sample.kernels.vocab_pick_kernel import PickWorkspace

__all__ = ["MAX_TOP_K", "VocabParallelSampler"]

MAX_TOP_K = 64
"""The largest top-k that is sampled without whole logits: 64 is the largest of the published models' own settings."""


class VocabParallelSampler:
    """The tokens of ``GumbelSampler``, from each rank's logits. Every rank must call it, with the same batch.

    A row with a NaN, or with no logit above minus infinity, gets a fault (``row_faults``) in the place of a token.
    """

    def __init__(self, vocab: VocabShard, device: torch.device, max_rows: int, use_kernels: bool | None = None) -> None:
        """Up to ``max_rows`` rows of logits; by kernels on a GPU where ``use_kernels`` does not say otherwise."""
        self.vocab = vocab
        self._workspace: PickWorkspace | None = None
        if use_kernels or (use_kernels is None and device.type == "cuda"):
            from quire.core.sample.kernels.vocab_pick_kernel import PickWorkspace

            self._workspace = PickWorkspace(max_rows, vocab, device)

    def sample(self, local_logits: Tensor, batch: SamplingBatch) -> Tensor:
        """``local_logits`` (n, vocab.size) in any float dtype -> (n,) int32. No row has a top-p but beside a top-k, and
        none a top-k above ``MAX_TOP_K``."""
        columns = SamplingColumns(batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seed, batch.position)
        thresholds = None
        if batch.any_random and (batch.any_top_k or batch.any_min_p):
            thresholds = self._find_thresholds(local_logits, columns, MAX_TOP_K if batch.any_top_k else 1)
        return self._pick(local_logits, columns, batch.any_random, thresholds)

    def sample_from_table(
        self, local_logits: Tensor, rows: Tensor, table: SamplingTable, tokens: Tensor, *, random: bool, filters: bool
    ) -> None:
        """As ``Sampler.sample_from_table``. ``random``: a row may have a temperature; ``filters``: and a top-k or
        min-p."""
        t, workspace = table, self._workspace
        assert workspace is not None, "it samples from the table on a GPU alone"
        columns = SamplingColumns(t.temperature, t.top_k, t.top_p, t.min_p, t.seed, t.num_tokens)
        thresholds = None
        if filters:
            of_rows = SamplingColumns(*(column[rows] for column in columns))
            thresholds = self._find_thresholds(local_logits, of_rows, MAX_TOP_K)
        workspace.pick(local_logits, columns, thresholds, random=random, rows=rows)
        workspace.merge(self.vocab.parallel, tokens, rows, table)

    def _pick(self, local_logits: Tensor, columns: SamplingColumns, random: bool, thresholds: Tensor | None) -> Tensor:
        if self._workspace is not None:
            tokens = torch.empty(len(local_logits), dtype=torch.int32, device=local_logits.device)
            self._workspace.pick(local_logits, columns, thresholds, random=random)
            self._workspace.merge(self.vocab.parallel, tokens)
            return tokens
        picks = pick_local_tokens(local_logits, columns, thresholds, self.vocab, random=random)
        return merge_picks(self.vocab.parallel.stack(picks))

    def _find_thresholds(self, local_logits: Tensor, columns: SamplingColumns, num_best: int) -> Tensor:
        """(n,) float32: the least logit, before temperature, that each row's filters allow. One exchange."""
        logits = local_logits[:, : max(1, self.vocab.num_tokens)]
        best = logits.topk(min(num_best, logits.shape[1])).values.float()  # (n, k), descending
        # Where others are equal to the last, they are as good, and the mass of each counts.
        num_equal = (logits == best[:, -1:].to(logits.dtype)).sum(1) - (best == best[:, -1:]).sum(1)
        best = torch.nn.functional.pad(best, (0, num_best - best.shape[1]), value=float("-inf"))
        if self.vocab.num_tokens == 0:
            best = torch.full_like(best, float("-inf"))
        weights = torch.ones_like(best)
        weights[:, min(num_best, logits.shape[1]) - 1] += num_equal
        stacked = self.vocab.parallel.stack(torch.cat((best, weights), 1))  # (ranks, n, 2 * num_best)
        stacked = stacked.transpose(0, 1)  # (n, ranks, 2 * num_best)
        return find_thresholds(stacked[..., :num_best].flatten(1), stacked[..., num_best:].flatten(1), columns)


def find_thresholds(logits: Tensor, weights: Tensor, columns: SamplingColumns) -> Tensor:
    """The least logit that min-p, top-k and top-p allow, each seeing what the others left, as ``apply_filters`` does.

    ``logits`` (n, m) float32 are the best of a row in any order, the k best among them where it has a top-k; each
    stands for ``weights`` (n, m) tokens that are equal. Returns (n,) float32, minus infinity where all are allowed.
    """
    logits, order = logits.sort(1, descending=True)
    weights = weights.gather(1, order)
    temperature = torch.where(columns.temperature > 0, columns.temperature, 1.0)[:, None]
    lowest = torch.full_like(logits[:, 0], float("-inf"))
    scaled = logits / temperature
    # p < min_p * p_max  <=>  logit < logit_max + log(min_p): no softmax is needed
    least = (scaled[:, 0] + columns.min_p.log()) * temperature[:, 0]
    threshold = torch.where(columns.min_p > 0, least, lowest)
    has_top_k = columns.top_k > 0
    k = columns.top_k.clamp(min=1, max=logits.shape[1]).long()
    kth = logits.gather(1, k[:, None] - 1)[:, 0]
    threshold = torch.where(has_top_k, torch.maximum(threshold, kth), threshold)
    # Top-p is a share of what the others left, which is known whole beside a top-k alone.
    kept = logits >= threshold[:, None]
    mass = torch.where(kept, weights * (scaled - scaled[:, :1]).exp(), 0.0)
    before = mass.cumsum(1) - mass
    allowed = kept & (before < columns.top_p[:, None] * mass.sum(1, keepdim=True))
    allowed[:, 0] = True
    least_in_top_p = logits.masked_fill(~allowed, float("inf")).amin(1)
    has_top_p = has_top_k & (columns.top_p < 1)
    return torch.where(has_top_p, torch.maximum(threshold, least_in_top_p), threshold)


def pick_local_tokens(
    local_logits: Tensor, columns: SamplingColumns, thresholds: Tensor | None, vocab: VocabShard, *, random: bool
) -> Tensor:
    """(n, 2) float32: this rank's best token of each row, after temperature and noise, behind its value. A token id is
    exact in float32 up to 16 million."""
    if vocab.num_tokens == 0:
        return torch.tensor([float("-inf"), 0.0], device=local_logits.device).expand(len(local_logits), 2)
    logits = local_logits[:, : vocab.num_tokens].float()
    if random:
        is_random = (columns.temperature > 0)[:, None]
        values = logits / torch.where(is_random, columns.temperature[:, None], 1.0)
        values = values + gumbel(columns.seed, columns.position, vocab.num_tokens, vocab.first_token_id)
        if thresholds is not None:
            values = values.masked_fill(logits < thresholds[:, None], float("-inf"))
        logits = torch.where(is_random, values, logits)
    index = logits.argmax(1, keepdim=True)
    return torch.cat((logits.gather(1, index), (index + vocab.first_token_id).float()), 1)


def merge_picks(picks: Tensor) -> Tensor:
    """(ranks, n, 2) -> (n,) int32: the token of the best value, the first of equals, or ``NO_LOGITS`` where that is a
    NaN or minus infinity."""
    best = picks[..., 0].argmax(0, keepdim=True)  # (1, n); a NaN counts as the best
    value, token = picks.gather(0, best[..., None].expand(1, -1, 2))[0].unbind(1)
    return torch.where(value > float("-inf"), token.int(), NO_LOGITS)

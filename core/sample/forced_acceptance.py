"""Drafts accepted by chance, for benchmarks alone: what a proposer that is right so often would be worth.

Nothing of the hot path knows of it: where ``SpeculationConfig.forced_acceptance`` is set, the worker is built with a
``ForcedAcceptance`` in the place of ``verify_drafts``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.contracts.sampler import SamplingTable
from quire.core.sample.inputs import DraftSpans
from quire.core.sample.noise import philox
from quire.core.sample.verify import verify_drafts

__all__ = ["FORCED_ACCEPTANCE_POSITION", "ForcedAcceptance"]

FORCED_ACCEPTANCE_POSITION = 0x5EED
"""Philox' second counter word, a position in sampling's noise: keeps this chance apart from that noise."""

_NO_TOKEN = -1


class ForcedAcceptance:
    """``verify_drafts`` that accepts each draft with a ``probability``, whatever the target samples.

    The tokens are then wrong, and only the speed counts. Chance is a function of the request's seed and the position.
    """

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(
        self, sampled: Tensor, spans: DraftSpans, table: SamplingTable, num_computed: Tensor, num_drafts: Tensor
    ) -> Tensor:
        """As ``verify_drafts``; ``sampled`` and the drafts are changed first, so that it accepts what chance says."""
        if sampled.is_cuda:
            from quire.core.sample.kernels.forced_acceptance_kernel import launch_force_acceptance

            launch_force_acceptance(sampled, spans, table, num_drafts, self.probability)
        else:
            force_acceptance(sampled, spans, table, num_drafts, self.probability)
        return verify_drafts(sampled, spans, table, num_computed, num_drafts)


def force_acceptance(
    sampled: Tensor, spans: DraftSpans, table: SamplingTable, num_drafts: Tensor, probability: float
) -> None:
    """Make ``sampled`` agree with each draft that chance accepts, and the first that it rejects no token at all."""
    rows, offset = spans.rows, torch.arange(spans.max_len, device=sampled.device)[None, :]
    base = table.num_tokens[rows].long()[:, None]
    num_verified = torch.minimum(spans.num_drafts, num_drafts[rows].long())
    token, position = (base + offset), torch.full_like(base, FORCED_ACCEPTANCE_POSITION)
    bits = philox(token, position, table.seed[rows][:, None])
    accepted = (bits < int(probability * 2**32)) & (offset < num_verified[:, None])
    num_accepted = accepted.int().cumprod(1).sum(1)
    request, column = (offset < num_accepted[:, None]).nonzero(as_tuple=True)
    drafts = table.token_ids[rows[request], base[request, 0] + column]
    sampled[spans.start[request] + column] = drafts
    # Verification overwrites this place with the sampled token, so that no such draft is ever read as a token.
    rejected = (num_accepted < num_verified).nonzero()[:, 0]
    table.token_ids[rows[rejected], base[rejected, 0] + num_accepted[rejected]] = _NO_TOKEN

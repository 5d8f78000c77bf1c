"""Which tokens may be sampled: min-p, top-k and top-p (nucleus sampling), in torch.

Top-k: Fan et al., "Hierarchical Neural Story Generation" (2018). Top-p: Holtzman et al., "The Curious Case of Neural
Text Degeneration" (2020). Min-p: Nguyen et al., "Turning Up the Heat" (2024). On a GPU ``core/sample/kernels`` allows
the same tokens without this sort: top-p is in ``sample_resolve`` and, beside a top-k, in ``sample_topk_candidates``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.contracts.sampler import SamplingBatch

__all__ = ["apply_filters"]

_FORBIDDEN = float("-inf")


def apply_filters(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Set what min-p, top-k and top-p forbid to minus infinity, in this order, each seeing what the others left.

    ``logits`` (n, vocab) float32, already divided by the temperature; changed in place and returned. Tokens tied
    with the last one allowed by top-k or top-p stay; the best token always stays. So what each filter keeps are the
    tokens of at least some logit, whatever order a sort gives equal ones.
    """
    if batch.any_min_p:
        # p < min_p * p_max  <=>  logit < logit_max + log(min_p): no softmax is needed
        min_logit = logits.amax(-1) + batch.min_p.log()
        logits.masked_fill_(logits < min_logit[:, None], _FORBIDDEN)
    if not (batch.any_top_k or batch.any_top_p):
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    if batch.any_top_k:
        size = logits.shape[-1]
        k = torch.where(batch.top_k > 0, batch.top_k.clamp(max=size), size).long()
        last = ordered.gather(-1, k[:, None] - 1)
        ordered.masked_fill_(ordered < last, _FORBIDDEN)
    if batch.any_top_p:
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # mass of the tokens sorted before each
        drop = before >= batch.top_p[:, None]
        drop &= (batch.top_p < 1.0)[:, None]
        drop[:, 0] = False
        # The smallest logit that stays; equal ones that the sort put behind it stay as well.
        last = ordered.masked_fill(drop | (ordered == _FORBIDDEN), -_FORBIDDEN).amin(-1, keepdim=True)
        drop &= ordered < last
        ordered.masked_fill_(drop, _FORBIDDEN)
    return logits.scatter_(-1, index, ordered)

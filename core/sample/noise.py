"""Counter-based Gumbel noise: a pure function of (seed, position, token).

Philox-4x32-10, from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), the generator of
``triton.language.philox`` too, so that a kernel generates the same bits. Key: the request's seed. Counter: (token,
position, 0, 0). No generator has a state: what a request samples does not depend on the batch, on preemption, or on how
many tokens a step verifies.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gumbel", "philox"]

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox(counter0: Tensor, counter1: Tensor, seed: Tensor, rounds: int = 10) -> Tensor:
    """First output word of Philox-4x32 for counters (c0, c1, 0, 0) and a 64-bit key, broadcast; int64 in [0, 2**32)."""
    c0, c1 = counter0 & _MASK, counter1 & _MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(rounds):
        a, b = c0 * _ROUND_A, c2 * _ROUND_B  # wraps modulo 2**64; the bits are right
        c0, c1 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK
        c2, c3 = ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0


def gumbel(seed: Tensor, position: Tensor, num_tokens: int, first_token_id: int = 0) -> Tensor:
    """Standard Gumbel noise for each token: ``seed`` and ``position`` (n,) int64 -> (n, num_tokens) float32, for the
    tokens from ``first_token_id`` on.

    ``-log(-log(1 - u))`` with ``u`` kept precise near 0, where the large values come from: they reach 22.
    """
    token = torch.arange(first_token_id, first_token_id + num_tokens, device=seed.device)
    bits = philox(token[None, :].expand(len(seed), -1), position[:, None], seed[:, None])
    # Half a step above 0 keeps the logarithm finite there; the clamp does so at 1, which float32 would round up to.
    u = ((bits.float() + 0.5) * 2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))

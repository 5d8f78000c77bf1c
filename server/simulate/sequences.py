"""Token sequences that stand for those of a trace: equal where its prefixes are, and different everywhere else."""

from __future__ import annotations

from quire.server.traces.trace import TraceRequest

__all__ = ["FILLER", "STOP", "make_sequence"]

STOP = 1
"""The token that ends a request before its limit."""
FILLER = 2
"""A token of no meaning."""

_HALF = 1 << 29


def make_sequence(request: TraceRequest, number: int, hash_block_size: int) -> list[int]:
    """Prompt and answer of a request. A block whose hash the trace knows has the tokens of that hash; what follows is
    the request's own, by its ``number``."""
    length = request.prompt_len + request.output_len
    tokens: list[int] = []
    for block_hash in request.block_hashes[: length // hash_block_size]:
        tokens += _make_block(block_hash, hash_block_size)
    if len(tokens) < length:
        tokens += _make_block(-1 - number, length - len(tokens))
    return tokens


def _make_block(number: int, length: int) -> list[int]:
    """Tokens of which the first two tell ``number``."""
    low, high = number % _HALF, number // _HALF % _HALF
    return [FILLER + low, FILLER + high, *[FILLER] * (length - 2)][:length]

"""The hash chain of a request's full blocks, by which they are found in the prefix cache."""

from __future__ import annotations

import hashlib
from array import array

from quire.sdk import Request

__all__ = ["hash_chain"]


def hash_chain(request: Request, block_size: int, count: int) -> list[bytes]:
    """The hashes of the first ``count`` full blocks. Each covers the block's tokens, all tokens before them, and what
    else makes their keys and values different (``Request.extra_keys``). The request keeps them."""
    hashes = request.block_hashes
    done = len(hashes)
    if count > done:
        width = 4 * block_size
        tokens = array("i", request.token_ids[done * block_size : count * block_size])
        data = memoryview(tokens).cast("B")
        parent = hashes[-1] if hashes else _digest(repr(request.extra_keys).encode())
        for start in range(0, (count - done) * width, width):
            parent = _digest(parent + data[start : start + width])
            hashes.append(parent)
    return hashes[:count] if len(hashes) > count else hashes


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()

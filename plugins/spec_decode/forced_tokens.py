"""Drafts the tokens that a grammar forces: keys, braces and separators of JSON, for example.

The engine offers these to every proposer on the host that drafts for a request with structured output; this one is for
engines that are to draft nothing else. SGLang calls it jump-forward decoding, where the tokens are taken unverified:
https://lmsys.org/blog/2024-02-05-compressed-fsm/
"""

from __future__ import annotations

from collections.abc import Sequence

from quire.sdk import HostProposer, Request

__all__ = ["ForcedTokensProposer"]


class ForcedTokensProposer(HostProposer):
    """Drafts for requests with structured output alone, where the grammar leaves one way to go on."""

    default_num_tokens = 8  # of a key of three words and what stands around it

    def propose(self, request: Request, num_tokens: int) -> Sequence[int]:
        """Nothing beside what the engine offers already."""
        return ()

"""Log-probabilities as callers receive them: by token id, with rank and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, repeat

from quire.core.messages import Logprob, TokenLogprob

__all__ = ["make_logprobs"]


def make_logprobs(
    positions: Sequence[TokenLogprob], token_texts: Mapping[int, str] | None, *, are_best: bool = True
) -> list[dict[int, Logprob]]:
    """One mapping for each position: the chosen token first, then the best in order, or without ``are_best`` those that
    the request names, whose ranks are not known. ``token_texts`` None: without texts."""
    result = []
    for position in positions:
        by_token: dict[int, Logprob] = {}
        ranks = count(1) if are_best else repeat(None)
        chosen, *others = zip(position.token_ids, position.logprobs, strict=True)
        for (token, logprob), rank in ((chosen, position.rank), *zip(others, ranks, strict=False)):
            if token not in by_token:  # the chosen token may be one of the best
                text = None if token_texts is None else token_texts[token]
                by_token[token] = Logprob(logprob, rank, text)
        result.append(by_token)
    return result

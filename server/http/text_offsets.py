"""Where tokens begin in the text of a choice: ``logprobs.text_offset`` of ``/v1/completions``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quire.core.engine.incremental_decoder import make_incremental_decoder
from quire.core.engine.tokenizer import Tokenizer

__all__ = ["TextOffsets", "locate_prompt_tokens"]


class TextOffsets:
    """Follows the tokens of one choice. A token that continues a character begins where the character does; one that
    adds no text, as special tokens do, where the next text begins."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool,
        start: int,
        shown_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._decoder = make_incremental_decoder(tokenizer, prompt_token_ids, skip_special_tokens, shown_token_ids)
        self._length = start

    def locate(self, token_ids: Iterable[int]) -> list[int]:
        """Offsets, in characters, of the tokens that come next."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._length + self._decoder.count_broken_chars(token_id))
            self._length += len(self._decoder.decode_token(token_id))
        return offsets


def locate_prompt_tokens(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """Offsets of the tokens of a prompt in its text. Those that the tokenizer added are not there: they begin where the
    text does."""
    offsets = TextOffsets(tokenizer, [], skip_special_tokens=False, start=0).locate(token_ids)
    num_added_chars = max(tokenizer.decode(token_ids).find(text), 0)
    return [min(max(offset - num_added_chars, 0), len(text)) for offset in offsets]

"""Tokens to text, one token at a time, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from quire.core.engine.incremental_decoder import make_incremental_decoder
from quire.core.engine.tokenizer import Tokenizer
from quire.core.sampling_params import SamplingParams

__all__ = ["Detokenizer"]


class Detokenizer:
    """The text of one continuation. ``text`` only grows until a stop string cuts it; ``visible_text`` and the deltas
    never show what a stop string may still swallow."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        shown_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._decoder = make_incremental_decoder(
            tokenizer, prompt_token_ids, params.skip_special_tokens, shown_token_ids
        )
        self._stop_strings = params.stop
        # Where each may have begun: a place that was passed over cannot become the beginning of one later.
        self._match_starts = [0] * len(params.stop)
        self._include_stop_string = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens  # stop strings count only after these
        self._num_taken_chars = 0
        self.num_tokens = 0
        """Tokens that gave the text: those after the one that completed a stop string are not among them."""
        self.text = ""

    def append_tokens(self, token_ids: Sequence[int], last_is_stop_token: bool) -> str | None:
        """Take in tokens; returns the stop string that was completed, if one was. A stop token adds no text."""
        num_text_tokens = len(token_ids) - 1 if last_is_stop_token else len(token_ids)
        for token in token_ids[:num_text_tokens]:
            num_chars_before = len(self.text)
            self.text += self._decoder.decode_token(token)
            self.num_tokens += 1
            if self._stop_strings and self.num_tokens > self._min_tokens:
                stop_string = self._cut_at_stop_string(num_chars_before)
                if stop_string is not None:
                    return stop_string
        return None

    def flush(self) -> str | None:
        """No more tokens will come: bytes that never became a character show as the replacement character. Returns the
        stop string that this completed, if it did."""
        num_chars_before = len(self.text)
        self.text += self._decoder.flush_bytes()
        is_searched = self._stop_strings and self.num_tokens > self._min_tokens
        return self._cut_at_stop_string(num_chars_before) if is_searched else None

    def visible_text(self, finished: bool) -> str:
        """The text, less what must be held back."""
        return self.text[: self._num_visible_chars(finished)]

    def take_delta(self, finished: bool) -> str:
        """What has become visible since the last call."""
        start, self._num_taken_chars = self._num_taken_chars, self._num_visible_chars(finished)
        return self.text[start : self._num_taken_chars]

    def _num_visible_chars(self, finished: bool) -> int:
        """All, but for an end that more text could complete to a stop string, if that will be cut off."""
        end = len(self.text)
        if finished or self._include_stop_string:
            return end
        for i, stop in enumerate(self._stop_strings):
            start = self.text.find(stop[0], self._match_starts[i])
            while start >= 0 and not (len(self.text) - start < len(stop) and stop.startswith(self.text[start:])):
                start = self.text.find(stop[0], start + 1)
            self._match_starts[i] = start if start >= 0 else len(self.text)
            end = min(end, self._match_starts[i])
        return end

    def _cut_at_stop_string(self, num_chars_before: int) -> str | None:
        """Cut the text at the first stop string that ends after ``num_chars_before``, and return it."""
        first_match: tuple[int, str] | None = None
        for stop in self._stop_strings:
            start = self.text.find(stop, max(0, num_chars_before - len(stop) + 1))
            if start >= 0 and (first_match is None or start < first_match[0]):
                first_match = start, stop
        if first_match is None:
            return None
        start, stop = first_match
        self.text = self.text[: start + len(stop) if self._include_stop_string else start]
        return stop

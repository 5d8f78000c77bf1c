"""Tokens to text, one token at a time, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from quire.core.engine.tokenizer import Tokenizer
from quire.core.sampling_params import SamplingParams

__all__ = ["Detokenizer"]


class Detokenizer:
    """The text of one continuation. ``text`` only grows, and never shows what a stop string may still swallow."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skip_special = params.skip_special_tokens
        # The last prompt tokens let decoders that look back (spaces before words) join seamlessly.
        self._stream = DecodeStream(ids=list(prompt_token_ids[-8:]), skip_special_tokens=self._skip_special)
        self._stop = params.stop
        self._hold = 0 if params.include_stop_str_in_output else max((len(s) for s in self._stop), default=1) - 1
        self._include_stop = params.include_stop_str_in_output
        self._quiet_tokens = params.min_tokens  # stop strings count only after these
        self._num_tokens = 0
        self._pending: list[int] = []  # tokens that gave no text yet
        self._shown = 0
        self.text = ""

    def push(self, token_ids: Sequence[int], last_is_stop_token: bool) -> str | None:
        """Take in tokens; returns the stop string that was completed, if one was. A stop token adds no text."""
        count = len(token_ids) - 1 if last_is_stop_token else len(token_ids)
        for token in token_ids[:count]:
            before = len(self.text)
            self.text += self._step(token)
            self._num_tokens += 1
            if self._stop and self._num_tokens > self._quiet_tokens:
                found = self._find_stop(before)
                if found is not None:
                    return found
        return None

    def flush(self) -> None:
        """No more tokens will come: bytes that never became a character show as the replacement character."""
        if self._pending:
            self.text += self._tokenizer.decode(self._pending, self._skip_special)
            self._pending = []

    def delta(self, finished: bool) -> str:
        """Text since the last call, less what must be held back."""
        end = len(self.text) if finished else max(len(self.text) - self._hold, self._shown)
        start, self._shown = self._shown, end
        return self.text[start:end]

    def _step(self, token: int) -> str:
        try:
            chunk = self._stream.step(self._tokenizer.backend, token)
        except Exception:  # tokens that form no valid text can confuse the stream: start afresh
            self._stream = DecodeStream(skip_special_tokens=self._skip_special)
            self._pending = []
            chunk = self._stream.step(self._tokenizer.backend, token)
        if chunk is None:
            self._pending.append(token)
            return ""
        self._pending = []
        return chunk

    def _find_stop(self, before: int) -> str | None:
        """Cut the text at the first stop string that ends after ``before``."""
        best: tuple[int, str] | None = None
        for stop in self._stop:
            at = self.text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0 and (best is None or at < best[0]):
                best = at, stop
        if best is None:
            return None
        at, stop = best
        self.text = self.text[: at + len(stop) if self._include_stop else at]
        self._pending = []
        return stop

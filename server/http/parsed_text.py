"""The text of an answer on its way through its parser, with the log-probabilities of its tokens beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quire.core.messages import CompletionOutput
from quire.core.parsing.answer_parser import AnswerParser
from quire.core.parsing.events import ContentDelta, ParserEvent
from quire.server.http.text_offsets import TextOffsets

__all__ = ["ParsedText"]


class ParsedText:
    """Feeds the text to ``parser`` token by token where log-probabilities are asked for: whose token is part of the
    message, of the reasoning or of a call then does not depend on how many come at once. ``offsets`` is None where
    none are."""

    def __init__(self, parser: AnswerParser | None, offsets: TextOffsets | None) -> None:
        self._parser, self._offsets = parser, offsets
        self._position = 0
        self._starts: list[int] = []  # of tokens whose text has not come
        self._logprobs: list[Any] = []  # of these tokens
        self._held: list[Any] = []  # of tokens whose text the parser holds back

    def add_output(self, choice: CompletionOutput, logprobs: list[Any]) -> Iterator[tuple[ParserEvent, list[Any]]]:
        """What new text and its tokens make, each with the log-probabilities of the tokens that it ends: those of
        content alone. A token without text, such as the last, has none."""
        text = choice.text
        if self._offsets is not None:
            self._starts += self._offsets.locate(choice.token_ids)
            self._logprobs += logprobs
        begin = 0
        while self._starts and self._starts[0] < self._position + len(text):
            count = next((i for i, start in enumerate(self._starts) if start > self._starts[0]), len(self._starts))
            end = self._starts[count] - self._position if count < len(self._starts) else len(text)
            end = min(end, len(text))
            self._held += self._logprobs[:count]
            del self._starts[:count], self._logprobs[:count]
            yield from self._feed(text[begin:end])
            begin = end
        yield from self._feed(text[begin:])
        self._position += len(text)
        if choice.finish_reason is not None and self._parser is not None:
            yield from self._attach(self._parser.finish())

    def _feed(self, text: str) -> Iterator[tuple[ParserEvent, list[Any]]]:
        if not text:
            return
        if self._parser is None:
            yield from self._attach([ContentDelta(text)])
            return
        num_sections = self._parser.num_sections
        events = self._parser.feed(text)
        if self._parser.num_sections > num_sections:  # what was held back is no part of what follows
            is_content = any(isinstance(event, ContentDelta) for event in events)
            self._held = self._held[-1:] if is_content else []
        yield from self._attach(events)

    def _attach(self, events: list[ParserEvent]) -> Iterator[tuple[ParserEvent, list[Any]]]:
        for event in events:
            held, self._held = self._held, []
            yield event, held if isinstance(event, ContentDelta) else []

"""The streaming engine: text of an answer in, content, reasoning and tool calls out.

One generator reads the text with the families' parsers and decides by what it has read alone, so that the events of an
answer, joined, do not depend on how its text was cut. Every character is looked at a bounded number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quire.core.contracts.reasoning_parser import ReasoningParser
from quire.core.contracts.tool_parser import ToolParser
from quire.core.contracts.tool_parser_text import MalformedCallError, Markers, Reading, TextReader
from quire.core.parsing.events import ArgumentsDelta, ContentDelta, ParserEvent, ReasoningDelta, ToolCallStart
from quire.core.parsing.parameters import find_parameter
from quire.core.plugin.quarantine import Quarantine

__all__ = ["AnswerParser"]

_DONE = object()


class AnswerParser:
    """Parses one answer. Feed it the text as it comes, then ``finish``.

    White space is no content where it stands beside what was taken out: around reasoning, between the answer and a
    call, between calls. A call needs the name of one of ``functions`` (their JSON schemas by name); what is none is
    content, or reasoning where it stands in it. Calls beyond ``max_calls`` are left out. ``quarantine`` guards the
    tool-call parser: without it, what the parser raises is raised here.
    """

    def __init__(
        self,
        tools: ToolParser | None,
        reasoning: ReasoningParser | None,
        functions: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        in_reasoning: bool = False,
        max_calls: int | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._reader = TextReader()
        self._tools = tools if functions else None
        self._reasoning = reasoning
        self._quarantine = quarantine
        self._in_reasoning = in_reasoning
        self._events: list[ParserEvent] = []
        self._calls = _CallWriter(self._reader, self._events, tools, functions or {}, max_calls, self._leave_text)
        self._spaces: list[str] = []  # white space that is content only if text follows it
        self._skips_space = in_reasoning
        self._has_content = False
        self._has_reasoning = False
        self._num_sections = 0
        self._markers = self._collect_markers()
        self._running: Reading[None] | None = self._parse_answer()

    @property
    def num_calls(self) -> int:
        """Calls that have begun so far."""
        return self._calls.count

    @property
    def num_sections(self) -> int:
        """How many times something else than before has begun: reasoning, content behind it, a call."""
        return self._num_sections

    def feed(self, text: str) -> list[ParserEvent]:
        """What ``text`` adds, in order. The end of it may be held back until more comes."""
        self._reader.append_text(text)
        return self._run()

    def finish(self) -> list[ParserEvent]:
        """No more text will come: what was held back."""
        self._reader.has_ended = True
        return self._run()

    def _run(self) -> list[ParserEvent]:
        if self._running is not None and next(self._running, True):
            self._running = None
        events = self._events.copy()
        self._events.clear()
        return events

    def _collect_markers(self) -> dict[str, Markers]:
        """What is looked for where the answer begins, in content behind that, and in reasoning."""
        calls = self._tools.begin if self._tools else ()
        first = self._tools.begin_first if self._tools else ()
        reasoning = self._reasoning
        if reasoning is None:
            return {"start": Markers(*calls, *first), "content": Markers(*calls)}
        again = reasoning.begin if reasoning.anywhere else ()
        return {
            "start": Markers(*calls, *first, *reasoning.begin, *reasoning.dropped),
            "content": Markers(*calls, *again, *reasoning.dropped),
            "reasoning": Markers(*calls, *reasoning.end, *reasoning.begin, *reasoning.dropped),
        }

    def _parse_answer(self) -> Reading[None]:
        reader = self._reader
        while True:
            if self._in_reasoning:
                markers = self._markers["reasoning"]
            else:
                markers = self._markers["content" if self._has_content or self._calls.count else "start"]
            found = markers.find_first(reader.buffer, reader.position, reader.has_ended)
            if found.start > reader.position:
                self._add_text(reader.take(found.start))
                if found.marker:
                    continue  # it may count at the start alone
            if found.marker:
                yield from self._handle_marker(found.marker)
            elif reader.has_ended:
                break
            else:
                yield
        if not self._in_reasoning and not self._calls.count and not self._skips_space and self._spaces:
            self._events.append(ContentDelta("".join(self._spaces)))

    def _handle_marker(self, marker: str) -> Reading[None]:
        """Read what stands at ``marker``, which begins here."""
        reader, tools, reasoning = self._reader, self._tools, self._reasoning
        if tools is not None and marker in (*tools.begin, *tools.begin_first):
            yield from self._read_calls(tools, marker)
            return
        text = reader.take(reader.position + len(marker))
        assert reasoning is not None
        if self._in_reasoning and marker in reasoning.end:
            self._in_reasoning = False
            self._begin_section(self._has_content)
        elif not self._in_reasoning and marker in reasoning.begin:
            self._in_reasoning = True
            self._begin_section(self._has_reasoning)
        elif marker in reasoning.dropped:
            self._begin_section(self._has_reasoning if self._in_reasoning else self._has_content)
        elif self._skips_space and marker in reasoning.begin:
            pass  # the model repeats what its prompt ends with
        else:
            self._add_text(text)

    def _read_calls(self, tools: ToolParser, marker: str) -> Reading[None]:
        reader = self._reader
        num_begun = self._calls.num_begun
        is_call = False
        reader.hold()
        try:
            if self._quarantine is None:
                yield from tools.parse_calls(reader, self._calls)
            else:
                yield from self._parse_guarded(tools, self._quarantine)
            is_call = True
        except MalformedCallError:
            pass
        self._calls.close_call()
        text = reader.release()
        has_begun = self._calls.num_begun > num_begun
        if is_call and has_begun:
            return
        if not text and not has_begun:
            text = reader.take(reader.position + len(marker))
        self._add_text(text)

    def _parse_guarded(self, tools: ToolParser, quarantine: Quarantine) -> Reading[None]:
        """As ``parse_calls``. A parser that raises, or does not return, is not called any more."""
        reading = quarantine.call(tools.parse_calls, self._reader, self._calls)

        def parse_calls() -> object:
            assert reading is not None
            return next(reading, _DONE)

        while quarantine.is_active and quarantine.call(parse_calls) is not _DONE:
            if quarantine.is_active:
                yield
        if not quarantine.is_active:
            self._tools = None
            self._markers = self._collect_markers()
            raise MalformedCallError

    def _leave_text(self) -> None:
        """A call begins: the reasoning, or the content before it, is over."""
        self._in_reasoning = False
        self._begin_section(self._has_content)

    def _begin_section(self, has_text: bool) -> None:
        """White space before what begins is none of the text; what follows text of its kind is a new line."""
        self._num_sections += 1
        self._spaces.clear()
        self._skips_space = True
        if has_text:
            self._spaces.append("\n")

    def _add_text(self, text: str) -> None:
        stripped = text.rstrip()
        if not stripped:
            if text and not self._skips_space:
                self._spaces.append(text)
            return
        trailing = text[len(stripped) :]
        if self._skips_space:
            stripped = stripped.lstrip()
            self._skips_space = False
        if self._spaces:
            stripped = "".join(self._spaces) + stripped
            self._spaces.clear()
        if trailing:
            self._spaces.append(trailing)
        if self._in_reasoning:
            self._has_reasoning = True
            self._events.append(ReasoningDelta(stripped))
        else:
            self._has_content = True
            self._events.append(ContentDelta(stripped))


class _CallWriter:
    """Turns calls into events: the ``ToolCalls`` of a parser."""

    def __init__(
        self,
        reader: TextReader,
        events: list[ParserEvent],
        tools: ToolParser | None,
        functions: Mapping[str, Mapping[str, Any]],
        max_calls: int | None,
        on_begin: Callable[[], None],
    ) -> None:
        self._reader, self._events, self._tools, self._functions = reader, events, tools, functions
        self._max_calls = max_calls
        self._on_begin = on_begin
        self._is_open = self._has_arguments = self._is_left_out = False
        self._call_ids: set[str] = set()
        self.count = self.num_begun = 0

    def check_name(self, name: str) -> None:
        if name not in self._functions:
            raise MalformedCallError

    def find_parameter(self, name: str, parameter: str) -> Mapping[str, Any] | None:
        return find_parameter(self._functions[name], parameter)

    def begin_call(self, name: str, call_id: str | None = None) -> None:
        self.check_name(name)
        self._reader.release()
        self._on_begin()
        self.num_begun += 1
        self._is_open, self._has_arguments = True, False
        self._is_left_out = self._max_calls is not None and self.count >= self._max_calls
        if not self._is_left_out:
            assert self._tools is not None
            if not call_id or call_id in self._call_ids:
                call_id = self._tools.make_call_id(name, self.count)
            self._call_ids.add(call_id)
            self._events.append(ToolCallStart(self.count, call_id, name))
            self.count += 1

    def add_arguments(self, text: str) -> None:
        if text and not self._is_left_out:
            self._has_arguments = True
            if not text.isascii():  # an escape in a value may stand for half of a character, which cannot be sent
                text = text.encode(errors="replace").decode()
            self._events.append(ArgumentsDelta(self.count - 1, text))

    def end_call(self) -> None:
        self.close_call()
        self._reader.hold()

    def close_call(self) -> None:
        """End the call that is open, if one is. Arguments are an object, an empty one if the text has none."""
        if self._is_open and not self._has_arguments:
            self.add_arguments("{}")
        self._is_open = False

"""The answer of ``/v1/responses`` while it is made: output items, and the events that tell of them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from quire.core.parsing.events import ArgumentsDelta, ContentDelta, ParserEvent, ReasoningDelta, ToolCallStart

__all__ = ["ResponseBuilder"]

Event = dict[str, Any]


class ResponseBuilder:
    """Turns what a parser finds into items. The whole answer is what the events add up to: one that is not streamed
    is built in the same way."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.response = {**fields, "status": "in_progress", "output": []}
        self._output: list[dict[str, Any]] = self.response["output"]
        self._sequence_number = 0
        self._is_open = False
        self._pieces: list[str] = []
        self._logprobs: list[Any] = []

    def start(self) -> Iterator[Event]:
        """The first events."""
        yield self._make_event("response.created", response=self._copy_response())
        yield self._make_event("response.in_progress", response=self._copy_response())

    def add_events(self, events: Iterable[tuple[ParserEvent, list[Any]]]) -> Iterator[Event]:
        """What new text adds, with the log-probabilities of its tokens."""
        for event, logprobs in events:
            match event:
                case ContentDelta(text=text):
                    yield from self._add_text("message", text, logprobs)
                case ReasoningDelta(text=text):
                    yield from self._add_text("reasoning", text)
                case ToolCallStart(call_id=call_id, name=name):
                    yield from self._close_item("completed")
                    call = {"call_id": call_id, "name": name, "arguments": ""}
                    yield self._open_item({"type": "function_call", "id": _make_id("fc"), **call})
                case ArgumentsDelta(text=text):
                    self._pieces.append(text)
                    yield self._make_item_event("response.function_call_arguments.delta", delta=text)

    def finish(self, finish_reason: str | None, count_usage: Callable[[str], dict[str, Any]]) -> Iterator[Event]:
        """The last events. An answer that the length limit ends is incomplete. ``count_usage`` is given its reasoning
        and returns its usage."""
        is_complete = finish_reason != "length"
        status: Literal["completed", "incomplete"] = "completed" if is_complete else "incomplete"
        yield from self._close_item(status)
        reasoning = [item["content"][0]["text"] for item in self._output if item["type"] == "reasoning"]
        self.response["status"], self.response["usage"] = status, count_usage("".join(reasoning))
        if not is_complete:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        yield self._make_event(f"response.{status}", response=self._copy_response())

    def fail(self, message: str, code: str) -> Iterator[Event]:
        """The last event of an answer that the engine could not finish."""
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": message}
        yield self._make_event("response.failed", response=self._copy_response())

    def _add_text(
        self, kind: Literal["message", "reasoning"], text: str, logprobs: Sequence[Any] = ()
    ) -> Iterator[Event]:
        item: dict[str, Any]
        part_type, event_type = {
            "message": ("output_text", "response.output_text"),
            "reasoning": ("reasoning_text", "response.reasoning_text"),
        }[kind]
        if not self._is_open or self._output[-1]["type"] != kind:
            yield from self._close_item("completed")
            if kind == "message":
                item = {"type": kind, "id": _make_id("msg"), "role": "assistant", "content": []}
            else:
                item = {"type": kind, "id": _make_id("rs"), "summary": [], "content": []}
            yield self._open_item(item)
            part = _make_part(part_type, "")
            self._output[-1]["content"].append(part)
            yield self._make_item_event("response.content_part.added", content_index=0, part=dict(part))
        self._pieces.append(text)
        self._logprobs += logprobs
        more: dict[str, Any] = {"logprobs": list(logprobs)} if kind == "message" else {}
        yield self._make_item_event(f"{event_type}.delta", content_index=0, delta=text, **more)

    def _open_item(self, item: dict[str, Any]) -> Event:
        self._output.append({**item, "status": "in_progress"})
        self._is_open, self._pieces, self._logprobs = True, [], []
        added = {**self._output[-1], "content": []} if "content" in item else dict(self._output[-1])
        return self._make_event("response.output_item.added", output_index=len(self._output) - 1, item=added)

    def _close_item(self, status: str) -> Iterator[Event]:
        if not self._is_open:
            return
        self._is_open = False
        item, text = self._output[-1], "".join(self._pieces)
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self._make_item_event("response.function_call_arguments.done", arguments=text, name=item["name"])
        else:
            [part] = item["content"]
            part["text"] = text
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            logprobs: dict[str, Any] = {"logprobs": self._logprobs} if item["type"] == "message" else {}
            part |= logprobs
            yield self._make_item_event(f"response.{kind}.done", content_index=0, text=text, **logprobs)
            yield self._make_item_event("response.content_part.done", content_index=0, part=dict(part))
        yield self._make_event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _make_item_event(self, kind: str, **fields: Any) -> Event:
        return self._make_event(kind, item_id=self._output[-1]["id"], output_index=len(self._output) - 1, **fields)

    def _make_event(self, kind: str, **fields: Any) -> Event:
        self._sequence_number += 1
        return {"type": kind, "sequence_number": self._sequence_number - 1, **fields}

    def _copy_response(self) -> dict[str, Any]:
        return {**self.response, "output": list(self._output)}


def _make_part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text, **({"annotations": [], "logprobs": []} if kind == "output_text" else {})}


def _make_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"

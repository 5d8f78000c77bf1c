"""The input of ``/v1/responses``: items of several types, as the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quire.core.errors import InvalidRequestError, UnsupportedError

__all__ = ["list_chat_messages", "list_chat_tools"]

_TEXT_TYPES = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def list_chat_messages(items: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of ``/v1/chat/completions``: calls and reasoning become fields of the assistant's message that they
    belong to. Raises ``InvalidRequestError`` with the place in ``input``."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    reasoning = ""
    for i, item in enumerate(items):
        place, kind = f"input[{i}]", item.get("type", "message")
        if kind == "message":
            role = item.get("role")
            if not isinstance(role, str) or not role:
                raise InvalidRequestError(f"{place}.role: must be a role", f"{place}.role")
            message = {"role": role, "content": _join_parts(item.get("content"), f"{place}.content")}
            if role == "assistant" and reasoning:
                message["reasoning_content"], reasoning = reasoning, ""
            messages.append(message)
        elif kind == "reasoning":
            reasoning = _join_parts(item.get("content") or item.get("summary") or (), f"{place}.content")
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
                if reasoning:
                    messages[-1]["reasoning_content"], reasoning = reasoning, ""
            messages[-1].setdefault("tool_calls", []).append(_read_call(item, place))
        elif kind == "function_call_output":
            output = _join_parts(item.get("output"), f"{place}.output")
            messages.append({"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": output})
        else:
            expected = "message, reasoning, function_call and function_call_output are supported"
            raise UnsupportedError(f"{place}.type: only {expected}, got {kind!r:.40}", f"{place}.type")
    if not messages:
        raise InvalidRequestError("input: must hold at least one message", "input")
    return messages


def list_chat_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tools of ``/v1/chat/completions``, for the chat template: a function's fields in an object of their own."""
    if not tools:
        return None
    return [_nest_function(tool) for tool in tools]


def _nest_function(tool: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in tool:
        return dict(tool)
    function = {name: value for name, value in tool.items() if name not in ("type", "strict")}
    return {"type": "function", "function": function}


def _read_call(item: Mapping[str, Any], place: str) -> dict[str, Any]:
    name, arguments = item.get("name"), item.get("arguments")
    if not isinstance(name, str) or not name:
        raise InvalidRequestError(f"{place}.name: must be a string", f"{place}.name")
    if not isinstance(arguments, str | None):
        raise InvalidRequestError(f"{place}.arguments: must be JSON text", f"{place}.arguments")
    function = {"name": name, "arguments": arguments or "{}"}
    return {"id": str(item.get("call_id", "")), "type": "function", "function": function}


def _join_parts(content: Any, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise InvalidRequestError(f"{place}: must be a string or a list of parts, got {content!r:.60}", place)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in (*_TEXT_TYPES, "refusal") or not isinstance(text, str):
            where = f"{place}[{i}]"
            raise UnsupportedError(f"{where}: only parts of text are supported, got {kind!r:.40}", where)
        texts.append(text)
    return "\n".join(texts)

"""Conversations on their way to a chat template: the one place where HTTP and ``LLM.chat`` have them normalized."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quire.core.errors import InvalidRequestError, UnsupportedError

__all__ = [
    "drop_broken_arguments",
    "normalize_messages",
    "rename_developer",
    "show_python_objects",
    "template_variables",
]

_FIELDS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template")
"""What is a field of a request, and not of its ``chat_template_kwargs``."""
_ARGUMENTS = (
    *("self", "conversation", "conversations", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
)
"""Arguments of transformers' functions that render a template: they never reach it as variables."""
_TEXT_PARTS = ("text", "input_text")


def template_variables(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The arguments of transformers' ``apply_chat_template``, apart from the template.

    ``add_generation_prompt``: None means yes, unless ``continue_final_message``. ``chat_template_kwargs`` are variables
    of the template's own, such as ``enable_thinking``; a name that could not reach it is refused. Raises
    ``InvalidRequestError`` with the place in the messages.
    """
    _check_variable_names(chat_template_kwargs or {})
    if continue_final_message and add_generation_prompt:
        message = "continue_final_message: cannot go with add_generation_prompt=true"
        raise InvalidRequestError(message, "continue_final_message")
    return {
        **(chat_template_kwargs or {}),
        "messages": normalize_messages(messages),
        "tools": list(tools) if tools else None,
        "add_generation_prompt": add_generation_prompt is not False and not continue_final_message,
        "continue_final_message": continue_final_message,
    }


def show_python_objects(text: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether ``text``, rendered from normalized ``messages``, has the arguments of a tool call as Python prints them:
    the template wants them as JSON text."""
    functions = [call.get("function") for message in messages for call in message.get("tool_calls", ())]
    arguments = [function.get("arguments") for function in functions if isinstance(function, Mapping)]
    return any(isinstance(each, dict) and each and repr(each) in text for each in arguments)


def normalize_messages(messages: Sequence[Mapping[str, Any]], *, decode_arguments: bool = True) -> list[dict[str, Any]]:
    """Messages of the OpenAI API as chat templates expect them.

    The content becomes one string, its text parts joined by newlines, and the arguments of tool calls, which the API
    sends as JSON text, become objects, or stay text without ``decode_arguments``: an empty one where they are blank,
    null or missing, as models write a call without arguments. Fields that are None are left out; other fields reach the
    template unchanged.
    """
    return [_normalize_message(message, f"messages[{i}]", decode_arguments) for i, message in enumerate(messages)]


def rename_developer(messages: Sequence[Mapping[str, Any]], template: str) -> list[Mapping[str, Any]]:
    """Messages whose role ``developer``, OpenAI's newer name, is ``system`` unless the template knows it."""
    if "developer" in template:
        return list(messages)
    return [
        {**message, "role": "system"}
        if isinstance(message, Mapping) and message.get("role") == "developer"
        else message
        for message in messages
    ]


def drop_broken_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Normalized messages whose tool calls have ``{}`` where the arguments are not an object, such as text that was cut
    off. For templates that cannot show them: one broken call must not end a conversation."""
    repaired = [dict(message) for message in messages]
    for message in repaired:
        if "tool_calls" in message:
            message["tool_calls"] = [_drop_if_broken(call) for call in message["tool_calls"]]
    return repaired


def _drop_if_broken(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), Mapping):
        return call
    return {**call, "function": {**function, "arguments": {}}}


def _check_variable_names(variables: Mapping[str, Any]) -> None:
    for name in variables:
        if name in _FIELDS or name in _ARGUMENTS:
            remedy = f"give {name} beside it" if name in _FIELDS else "it is no variable of a template; leave it out"
            place = f"chat_template_kwargs.{name}"
            raise InvalidRequestError(f"{place}: cannot be set here; {remedy}", place)


def _normalize_message(message: Mapping[str, Any], place: str, decode_arguments: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not message["role"]:
        raise InvalidRequestError(f"{place}: must be a mapping with a role, got {message!r:.100}", place)
    normalized = {name: value for name, value in message.items() if value is not None}
    if isinstance(normalized.get("reasoning"), str):  # what newer servers and clients call it, and templates do not
        normalized.setdefault("reasoning_content", normalized["reasoning"])
    normalized["content"] = _join_text(message.get("content"), f"{place}.content")
    if (calls := message.get("tool_calls")) is not None:
        if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
            raise InvalidRequestError(f"{place}.tool_calls: must be a list of objects", f"{place}.tool_calls")
        convert = _decode_arguments if decode_arguments else _encode_arguments
        normalized["tool_calls"] = [convert(call) for call in calls]
    return normalized


def _join_text(content: Any, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise InvalidRequestError(f"{place}: must be a string or a list of parts, got {content!r:.100}", place)
    texts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            where = f"{place}[{i}]"
            raise UnsupportedError(f"{where}: only text parts are supported, got {kind!r:.40}", where)
        texts.append(part["text"])
    return "\n".join(texts)


def _decode_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with its arguments as a value: ``{}`` if they are missing, null or blank, as of a call without any."""
    function = call.get("function")
    if not isinstance(function, Mapping):
        return dict(call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):  # the second for values that are nested too deeply
            return dict(call)  # some models write arguments that are not JSON; the template sees their text
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _encode_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping):
        return dict(call)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip() not in ("", "null"):
        return dict(call)
    as_object = {} if arguments is None or isinstance(arguments, str) else arguments
    return {**call, "function": {**function, "arguments": json.dumps(as_object, ensure_ascii=False)}}

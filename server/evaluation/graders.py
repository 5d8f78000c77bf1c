"""Graders of answers, by name. Each takes the text and the right answer, and says whether the text is right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from quire.server.evaluation.sandbox import passes_cases

__all__ = [
    "GRADERS",
    "Grader",
    "format_message",
    "grade",
    "grade_exact",
    "grade_json",
    "grade_number",
    "grade_python",
    "grade_tool_call",
]

Grader = Callable[[str, Any], bool]

_INTEGER = re.compile(r"(?<![\w.])-?\d+(?![\w.]*\d)")
_FENCED = re.compile(r"\A```\w*\n(.*?)\n?```\Z", re.DOTALL)
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def _strip_fence(text: str) -> str:
    fenced = _FENCED.match(text.strip())
    return fenced.group(1) if fenced else text.strip()


def _canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def grade_exact(text: str, answer: str) -> bool:
    """Accept the answer itself, whatever the white space around it."""
    return text.strip() == answer


def grade_number(text: str, answer: int) -> bool:
    """Accept a text whose last integer is the answer: "605", "347 + 258 = 605"."""
    integers = _INTEGER.findall(text)
    return bool(integers) and len(integers[-1]) < 1000 and int(integers[-1]) == answer


def grade_json(text: str, answer: dict[str, Any]) -> bool:
    """Accept exactly this JSON value, bare or in one code fence, with its keys in any order."""
    try:
        return _canonical_json(json.loads(_strip_fence(text))) == _canonical_json(answer)
    except (ValueError, RecursionError):
        return False


def grade_tool_call(text: str, answer: list[dict[str, Any]]) -> bool:
    """Accept exactly these calls in this order, and no text beside them."""
    calls = []
    for body in _CALL.findall(text):
        try:
            call = json.loads(body)
            arguments = call["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            calls.append({"name": call["name"], "arguments": arguments})
        except (ValueError, TypeError, KeyError, RecursionError):
            return False
    return not _CALL.sub("", text).strip() and _canonical_json(calls) == _canonical_json(answer)


def grade_python(text: str, answer: dict[str, Any]) -> bool:
    """Accept a function that returns what it should for every case, run in a process of its own."""
    return passes_cases(_strip_fence(text), answer["function"], answer["cases"])


GRADERS: Mapping[str, Grader] = MappingProxyType(
    {
        "exact": grade_exact,
        "number": grade_number,
        "json": grade_json,
        "tool_call": grade_tool_call,
        "python": grade_python,
    }
)


def grade(grader: str, text: str, answer: Any) -> bool:
    """Grade ``text`` with the grader called ``grader``."""
    if grader not in GRADERS:
        raise ValueError(f"unknown grader {grader!r}; there are: {', '.join(GRADERS)}")
    return GRADERS[grader](text, answer)


def format_message(message: Mapping[str, Any]) -> str:
    """Write an OpenAI assistant message as the text that the graders read, its parsed tool calls included."""
    parts = [message.get("content") or ""]
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function["arguments"]
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        parts.append(
            f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {arguments or "{}"}}}\n</tool_call>'
        )
    return "\n".join(part for part in parts if part)

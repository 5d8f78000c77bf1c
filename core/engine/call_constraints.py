"""Calls that a model must make, and arguments that must keep their schema, as structured output."""

from __future__ import annotations

from typing import Any

from quire.core.contracts.tool_parser import ToolParser
from quire.core.engine.tool_use import ToolUse
from quire.core.parsing.json_calls import JsonToolParser

__all__ = ["EnforcedCalls", "write_structural_tag"]


class EnforcedCalls(JsonToolParser):
    """Calls that are enforced, where the family writes none that can be: ``<tool_call>{"name": ..., ...}``."""

    begin = ("<tool_call>",)
    end = ("</tool_call>",)
    call_format = ("<tool_call>\n", "\n</tool_call>")
    example = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def write_structural_tag(
    use: ToolUse, parser: ToolParser, answer_schema: dict[str, Any] | bool | None = None
) -> dict[str, Any] | None:
    """The ``structural_tag`` of ``StructuredOutputsParams`` for the calls of a request; None if none is enforced.

    Where a call is required, the answer is calls and nothing else. With ``answer_schema`` it is calls, or JSON of that
    schema. Otherwise it is free text in which every call keeps the schema of its function, if that is strict. None as
    well where ``parser`` has no ``format_call`` of a function.
    """
    is_required, is_structured = use.choice == "required", answer_schema is not None
    if use.choice == "none" or not (is_required or is_structured or use.strict & use.functions.keys()):
        return None
    structures, triggers = [], set()
    for name, schema in use.functions.items():
        form = parser.format_call(name)
        if form is None:
            return None
        is_enforced = is_required or name in use.strict
        triggers.add(form.trigger)
        structures.append(
            {"begin": form.begin, "schema": schema if is_enforced else {"type": "object"}, "end": form.end}
        )
    return {
        "type": "structural_tag",
        "structures": structures,
        "triggers": sorted(triggers),
        "free_text": not (is_required or is_structured),
        "at_least_one": is_required or is_structured,
        "stop_after_first": use.max_calls == 1,
        **({"answer": answer_schema} if is_structured else {}),
    }

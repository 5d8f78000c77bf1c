"""Calls that a model must make, and arguments that must keep their schema, as structured output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.core.contracts.tool_parser import CallFormat, ToolParser
from quire.core.engine.tool_use import ToolUse
from quire.core.errors import UnsupportedError
from quire.core.parsing.json_calls import JsonToolParser

__all__ = ["EnforcedCalls", "can_enforce_calls", "write_structural_tag"]


class EnforcedCalls(JsonToolParser):
    """Calls that are enforced, where the family writes none that can be: ``<tool_call>{"name": ..., ...}``."""

    begin = ("<tool_call>",)
    end = ("</tool_call>",)
    call_formats = (("<tool_call>\n", "\n</tool_call>"),)
    example = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def can_enforce_calls(use: ToolUse, parser: ToolParser) -> bool:
    """Whether a call of each function of a request can be enforced in the syntax of ``parser``."""
    try:
        for name, schema in use.functions.items():
            if not parser.list_call_formats(name):
                return False
            parser.format_arguments(schema)
    except UnsupportedError:
        return False
    return True


def write_structural_tag(
    use: ToolUse, parser: ToolParser, answer_schema: dict[str, Any] | bool | None = None
) -> dict[str, Any] | None:
    """The ``structural_tag`` of ``StructuredOutputsParams`` for the calls of a request; None if none is enforced.

    Where a call is required, the answer is calls and nothing else. With ``answer_schema`` it is calls, or JSON of that
    schema. Otherwise it is free text in which every call keeps the schema of its function, if that is strict. None as
    well where ``parser`` has no format of a call, and no function is strict. Raises ``UnsupportedError`` where the
    parameters of a strict function cannot be enforced in the syntax of ``parser``, or it has no format to do so in.
    """
    is_required, is_structured = use.choice == "required", answer_schema is not None
    if use.choice == "none" or not (is_required or is_structured or use.strict & use.functions.keys()):
        return None
    structures: list[dict[str, Any]] = []
    triggers: set[str] = set()
    for name, schema in use.functions.items():
        forms = parser.list_call_formats(name)
        if not forms:
            _require_no_strict(use, parser)
            return None
        arguments = _write_arguments(parser, name, schema, is_required or name in use.strict)
        structures += ({**_write_form(form), **arguments} for form in forms)
        triggers |= {form.trigger for form in forms if not form.is_first}
    return {
        "type": "structural_tag",
        "structures": structures,
        "triggers": sorted(triggers),
        "free_text": not (is_required or is_structured),
        "at_least_one": is_required or is_structured,
        "stop_after_first": use.max_calls == 1,
        **({"answer": answer_schema} if is_structured else {}),
        "excluded": [text for text in parser.begin if text not in triggers],
        "excluded_first": list(parser.begin_first),
    }


def _require_no_strict(use: ToolUse, parser: ToolParser) -> None:
    if strict := use.strict & use.functions.keys():
        names, parser_name = ", ".join(map(repr, sorted(strict))), type(parser).__name__
        raise UnsupportedError(
            f"tools: strict is not enforced in calls as the tool-call parser {parser_name} reads them, which says no "
            f"format of them (list_call_formats); leave it out for {names:.200}",
            "tools",
        )


def _write_form(form: CallFormat) -> dict[str, Any]:
    """What a structural tag says of a form, apart from the arguments."""
    return {
        "begin": [form.begin, *form.other_begins] if form.other_begins else form.begin,
        "end": form.end,
        **({"group": list(form.group)} if form.group is not None else {}),
        **({"first": True} if form.is_first else {}),
    }


def _write_arguments(parser: ToolParser, name: str, schema: Mapping[str, Any], is_enforced: bool) -> dict[str, Any]:
    """What a structural tag says of the arguments of one function."""
    if not is_enforced:
        is_json = parser.format_arguments({"type": "object"}) is None
        return {"schema": {"type": "object"}} if is_json else {"free": True}
    try:
        formats = parser.format_arguments(schema)
    except UnsupportedError as error:
        raise UnsupportedError(f"tools: function {name!r:.60} is strict: {error}", "tools") from None
    if formats is None:
        return {"schema": schema}
    arguments = [
        {
            "begin": each.begin,
            "values": list(each.values),
            "end": each.end,
            "stop": each.stop,
            "required": each.is_required,
        }
        for each in formats
    ]
    return {"arguments": arguments, "separator": parser.argument_separator}

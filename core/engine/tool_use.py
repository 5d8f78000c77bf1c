"""What a request says of tools: which functions there are, and whether the model may, must or must not call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from quire.core.errors import InvalidRequestError, UnsupportedError

__all__ = ["ToolUse", "read_tool_use"]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request, checked."""

    functions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Functions that may be called: the JSON schemas of their parameters, by name."""
    strict: frozenset[str] = frozenset()
    """Those whose arguments must keep their schema."""
    choice: Literal["none", "auto", "required"] = "none"
    max_calls: int | None = None
    """The most calls of an answer; None: any number."""


def read_tool_use(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool | None = None,
) -> ToolUse:
    """From the fields of the OpenAI API: ``tool_choice`` is ``none``, ``auto``, ``required``, a function by name, or a
    subset (``allowed_tools``). Raises ``InvalidRequestError`` with the place."""
    functions: dict[str, Mapping[str, Any]] = {}
    strict: set[str] = set()
    for i, tool in enumerate(tools or ()):
        function = _find_function(tool, f"tools[{i}]")
        name = function["name"]
        functions[name] = function.get("parameters") or {"type": "object", "properties": {}}
        if function.get("strict") is True:
            strict.add(name)
    use = ToolUse(functions, frozenset(strict), "auto" if functions else "none")
    if parallel_tool_calls is False:
        use = replace(use, max_calls=1)
    if tool_choice is None or tool_choice == "auto":
        return use
    if tool_choice == "none":
        return replace(use, choice="none")
    if not functions:
        raise InvalidRequestError("tool_choice: there are no tools to choose from; give tools too", "tool_choice")
    if tool_choice == "required":
        return replace(use, choice="required")
    return _restrict(use, tool_choice)


def _find_function(tool: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(tool, Mapping):
        raise InvalidRequestError(f"{place}: must be an object, got {tool!r:.60}", place)
    kind = tool.get("type", "function")
    if kind != "function":
        raise UnsupportedError(f"{place}.type: only 'function' is supported, got {kind!r:.40}", f"{place}.type")
    function = tool.get("function", tool)  # the responses API has the function's fields in the tool itself
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InvalidRequestError(f"{place}.function.name: must be a string", f"{place}.function.name")
    if not isinstance(function.get("parameters"), Mapping | None):
        raise InvalidRequestError(f"{place}.function.parameters: must be a schema", f"{place}.function.parameters")
    return function


def _restrict(use: ToolUse, tool_choice: Any) -> ToolUse:
    """Only the function, or those of the subset, that ``tool_choice`` names."""
    kind = tool_choice.get("type") if isinstance(tool_choice, Mapping) else None
    if kind == "function":
        names, mode = [_name_of(tool_choice)], "required"
        use = replace(use, max_calls=1)
    elif kind == "allowed_tools":
        allowed = tool_choice.get("allowed_tools", tool_choice)
        listed = allowed.get("tools") if isinstance(allowed, Mapping) else None
        if not isinstance(listed, list) or not listed:
            raise InvalidRequestError("tool_choice.tools: must be a list of functions", "tool_choice")
        names, mode = [_name_of(each) for each in listed], str(allowed.get("mode", "auto"))
    else:
        expected = "'none', 'auto', 'required', a function by name or allowed_tools"
        raise InvalidRequestError(f"tool_choice: must be {expected}, got {tool_choice!r:.60}", "tool_choice")
    for name in names:
        if not isinstance(name, str) or name not in use.functions:
            raise InvalidRequestError(f"tool_choice: there is no function {name!r:.60} in tools", "tool_choice")
    if mode not in ("auto", "required"):
        raise InvalidRequestError(f"tool_choice.mode: must be 'auto' or 'required', got {mode!r:.40}", "tool_choice")
    functions = {name: use.functions[name] for name in names}
    return replace(use, functions=functions, choice="required" if mode == "required" else "auto")


def _name_of(tool: Any) -> Any:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return function.get("name") if isinstance(function, Mapping) else None

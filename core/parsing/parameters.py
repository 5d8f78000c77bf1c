"""The parameters of a function one by one: what its schema says of each, and of which types their values are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from quire.core.contracts.structured_output import JSON_SCHEMA_FORMATS
from quire.core.errors import UnsupportedError

__all__ = ["Parameter", "find_parameter", "list_parameters", "list_types"]

_ANNOTATIONS = frozenset(
    (
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema"),
        *("$id", "$defs", "definitions"),
    )
)
_OF_TEXTS = frozenset(("const", "enum", "minLength", "maxLength", "pattern"))
_OF_OBJECTS = frozenset(("type", "properties", "required", "additionalProperties"))
_DEFINITIONS = ("$defs", "definitions")
_MAX_REFERENCES = _MAX_DEPTH = 16
_MAX_CASES = 64
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One property of the object that a function's arguments are."""

    name: str
    schema: Mapping[str, Any]
    """Complete by itself: with the definitions that it refers to."""
    is_required: bool

    def list_cases(self) -> list[Mapping[str, Any]]:
        """Schemas of which a value has to match one, by its type where the schema says it in a usual way."""
        cases = list(islice(_split(self.schema, self.schema, _MAX_DEPTH), _MAX_CASES + 1))
        return [_complete(case, self.schema) for case in cases] if len(cases) <= _MAX_CASES else [self.schema]

    def read_text(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """What a case that is a string asks of it. Raises UnsupportedError, which names the keyword, if it cannot be
        said of a text by itself."""
        for keyword, value in case.items():
            if keyword == "format" and isinstance(value, str) and value not in JSON_SCHEMA_FORMATS:
                continue
            if keyword not in _OF_TEXTS and keyword not in _ANNOTATIONS and keyword != "type":
                place = f"{keyword!r:.40} at /properties/{self.name[:60]}"
                raise UnsupportedError(f"{place} cannot be enforced in the syntax of this model's calls")
        return {keyword: value for keyword, value in case.items() if keyword in _OF_TEXTS}


def find_parameter(schema: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """What the schema of a function says of one parameter; None if nothing."""
    properties = schema.get("properties")
    parameter = properties.get(name) if isinstance(properties, Mapping) else None
    return _complete(parameter, schema) if isinstance(parameter, Mapping) else None


def list_parameters(schema: Mapping[str, Any]) -> list[Parameter]:
    """The parameters of a function, in their order; no others can be given. Raises UnsupportedError, which names the
    keyword, for an object that is not described by its properties one by one."""
    for keyword, value in schema.items():
        if keyword not in _OF_OBJECTS and keyword not in _ANNOTATIONS:
            raise _refuse(keyword)
        if keyword == "type" and value != "object":
            raise _refuse("type")
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise _refuse("required" if isinstance(properties, Mapping) else "properties")
    if not all(isinstance(name, str) and properties.get(name, False) is not False for name in required):
        raise _refuse("required")
    parameters = []
    for name, value in properties.items():
        if value is False:
            continue
        if not isinstance(value, Mapping | bool):
            raise _refuse("properties")
        described = _complete(value, schema) if isinstance(value, Mapping) else {}
        parameters.append(Parameter(name, described, name in required))
    return parameters


def list_types(schema: Any, root: Any = None) -> set[str]:
    """The types that a schema allows; empty if it does not say. Whatever it is, as clients send it: ``root`` is where
    its references lead, if not to itself."""
    return _list_types(schema, schema if root is None else root, set(), 0)


def _list_types(schema: Any, root: Any, seen: set[str], depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return set()
    declared = schema.get("type")
    types = {each for each in (declared if isinstance(declared, list) else [declared]) if isinstance(each, str)}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        seen.add(reference)
        types |= _list_types(_follow(reference, root), root, seen, depth + 1)
    for keyword in ("anyOf", "oneOf", "allOf"):
        alternatives = schema.get(keyword)
        for each in alternatives if isinstance(alternatives, list) else ():
            types |= _list_types(each, root, seen, depth + 1)
    if types:
        return types
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return {_name_type(value) for value in values} if isinstance(values, list) else set()


def _name_type(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), "")


def _complete(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the definitions of ``root``, if it refers to any."""
    if not _has_reference(schema):
        return schema
    return {**{key: root[key] for key in _DEFINITIONS if key in root}, **schema}


def _has_reference(schema: Mapping[str, Any]) -> bool:
    try:
        return '"$ref"' in json.dumps(schema)
    except (TypeError, ValueError, RecursionError):
        return False


def _split(schema: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
    schema = _resolve(schema, root)
    kinds, alternatives = schema.get("type"), schema.get("anyOf")
    if schema.keys() - _ANNOTATIONS == {"anyOf"} and isinstance(alternatives, list) and depth:
        for each in alternatives:
            if isinstance(each, Mapping):
                yield from _split(each, root, depth - 1)
    elif isinstance(kinds, list):
        for kind in kinds:
            case = {**schema, "type": kind}
            if isinstance(values := schema.get("enum"), list):
                case["enum"] = [value for value in values if _name_type(value) == kind]
                if not case["enum"]:
                    continue
            yield case
    else:
        yield schema


def _resolve(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that ``$ref`` leads to, with what stands beside it."""
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref")
        target = _follow(reference, root) if isinstance(reference, str) else None
        if not isinstance(target, Mapping):
            return schema
        schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def _follow(reference: str, root: Any) -> Any:
    """What stands at ``#/...`` in ``root``; None if nothing does."""
    if not reference.startswith("#/"):
        return None
    for step in reference[2:].split("/"):
        if not isinstance(root, Mapping):
            return None
        root = root.get(step.replace("~1", "/").replace("~0", "~"))
    return root


def _refuse(keyword: str) -> UnsupportedError:
    return UnsupportedError(f"{keyword!r:.40} cannot be enforced in the syntax of this model's calls")

"""Which schemas have strings whose masks can be derived, and what bounds the lengths of these strings."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from quire.plugins.structured_output.json_schema import walk_schemas

__all__ = ["MIN_PROBE", "PROBE_CHAR", "StringBounds", "find_string_bounds", "join_string_bounds"]

PROBE_CHAR = "z"
MIN_PROBE = 8
"""Where so many of ``PROBE_CHAR`` may follow is the inside of a string, and none that the schema spells out."""

_ANNOTATIONS = {
    "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "examples",
    "readOnly", "title", "writeOnly",
}  # fmt: skip
_KNOWN = _ANNOTATIONS | {
    "$ref", "additionalProperties", "anyOf", "const", "enum", "exclusiveMaximum", "exclusiveMinimum", "items",
    "maxItems", "maxLength", "maxProperties", "maximum", "minItems", "minLength", "minProperties", "minimum",
    "multipleOf", "oneOf", "prefixItems", "properties", "required", "type",
}  # fmt: skip
"""Keywords with which a string is free but for its length, or spelt out."""
_AMBIGUOUS = {"$ref", "anyOf", "items", "maxProperties", "minProperties", "oneOf", "prefixItems"}
"""Keywords with which a name may come in several places, or what follows depends on more than the last one."""
_NUMBERS = ("number", "integer")
_REFERENCE = re.compile(r"#(/(\$defs|definitions)/[^/]+)?")
_NAME_MARGIN = 6
"""An escape of one character has six."""


class StringBounds(NamedTuple):
    """What holds of all strings that match a schema."""

    has_min: bool
    has_max: bool
    by_name: dict[str, tuple[int, int | None]]
    """The least and greatest length of strings that are the value of a property, where its name alone says them."""
    min_run: int
    """So many characters into a string it is none of the names that the schema lists, of those that it might be."""
    has_places: bool = False
    """Whether where an answer is in its grammar follows from the last property's name and the text behind that."""
    numbers: frozenset[str] = frozenset()
    """Properties whose value is any number, or any integer."""
    form: tuple[bool, bool] = (False, False)
    """Whether blanks may come between the parts of an answer, and whether something stands before it."""


def find_string_bounds(schema: dict[str, Any]) -> StringBounds | None:
    """None where two different things may come in one place of which both are strings, or one is that and is neither
    free nor spelt out: what may follow then depends on more than a length."""
    if PROBE_CHAR * MIN_PROBE in json.dumps(schema):
        return None
    has_min = has_max = has_open_names = False
    has_places = schema.get("type") == "object"
    is_closed, longest_name = True, 0
    numbers: set[str] = set()
    by_name: dict[str, tuple[int, int | None] | None] = {}
    for _, each in walk_schemas(schema, ""):
        if each.keys() - _KNOWN or not _has_one_meaning(each, schema):
            return None
        has_min = has_min or bool(each.get("minLength"))
        has_max = has_max or "maxLength" in each
        names = [*each.get("properties", ()), *each.get("required", ())]
        longest_name = max([longest_name, *map(len, names)])
        is_closed = is_closed and _is_closed(each)
        listed = [*each.get("enum", ()), each.get("const")]
        has_places = has_places and not (each.keys() & _AMBIGUOUS or any(isinstance(x, dict | list) for x in listed))
        has_places = has_places and not any(name in by_name or name not in each.get("properties", ()) for name in names)
        for name, value in each.get("properties", {}).items():
            lengths = _find_lengths(value)
            by_name[name] = lengths if by_name.get(name, lengths) == lengths else None
            if isinstance(value, dict) and value.get("type") in _NUMBERS and not value.keys() - _ANNOTATIONS - {"type"}:
                numbers.add(name)
        has_open_names = has_open_names or (bool(names) and each.get("additionalProperties") is not False)
    known = {name: lengths for name, lengths in by_name.items() if lengths is not None and is_closed}
    min_run = longest_name + _NAME_MARGIN if has_open_names else 0
    return StringBounds(has_min, has_max, known, min_run, has_places and is_closed, frozenset(numbers))


def join_string_bounds(schemas: Sequence[dict[str, Any]], has_free_text: bool = True) -> StringBounds | None:
    """Of JSON of several schemas, with other text around it: names of properties say nothing where that is free. None
    if one schema has none."""
    if not has_free_text and not any('"$ref"' in json.dumps(schema) for schema in schemas):
        return find_string_bounds({"type": "array", "prefixItems": [*schemas], "items": {"type": "null"}})
    joined = StringBounds(False, False, {}, 0)
    for schema in schemas:
        if (bounds := find_string_bounds(schema)) is None:
            return None
        has_min, has_max = joined.has_min or bounds.has_min, joined.has_max or bounds.has_max
        joined = StringBounds(has_min, has_max, {}, max(joined.min_run, bounds.min_run))
    return joined


def _is_closed(schema: dict[str, Any]) -> bool:
    """Whether no object that matches has a property that is not listed, but for those inside other schemas."""
    if schema.keys() & {"$ref", "anyOf", "oneOf", "enum", "const"}:
        return True
    if schema.get("type") == "object":
        return schema.get("additionalProperties") is False and True not in schema.get("properties", {}).values()
    if schema.get("type") == "array":
        return isinstance(schema.get("items"), dict) and True not in schema.get("prefixItems", ())
    return schema.get("type") in ("string", "number", "integer", "boolean", "null")


def _find_lengths(schema: Any) -> tuple[int, int | None] | None:
    """The least and greatest length of the strings that match, if nothing but strings does and all of such lengths."""
    if not isinstance(schema, dict) or schema.get("type") != "string":
        return None
    if schema.keys() - _ANNOTATIONS - {"type", "minLength", "maxLength"}:
        return None
    most = schema.get("maxLength")
    return int(schema.get("minLength", 0)), None if most is None else int(most)


def _has_one_meaning(schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether of several schemas for one place at most one is for each type."""
    combined = schema.keys() & {"$ref", "anyOf", "oneOf"}
    if not combined:
        return True
    if len(combined) > 1 or schema.keys() - _ANNOTATIONS - combined:
        return False
    if "$ref" in schema:
        return isinstance(schema["$ref"], str) and _REFERENCE.fullmatch(schema["$ref"]) is not None
    cases = schema[combined.pop()]
    types = [_find_type(case, root) for case in cases] if isinstance(cases, list) else [None]
    return None not in types and len(set(types)) == len(types)


def _find_type(schema: Any, root: dict[str, Any]) -> str | None:
    """The one type of what matches ``schema``, if it says so."""
    if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
        _, *path = schema["$ref"].split("/")
        schema = root
        for key in path:
            schema = schema.get(key) if isinstance(schema, dict) else None
    one_type = schema.get("type") if isinstance(schema, dict) else None
    return one_type if isinstance(one_type, str) else None

"""What of JSON Schema (draft 2020-12) the backend enforces: rewriting what can be said otherwise, and the names of what
it does not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import msgspec

from quire.plugins.structured_output.formats import add_to_all_of, write_format
from quire.sdk import InvalidRequestError, StructuredOutputsParams

__all__ = ["apply_defaults", "explain_error", "prepare_schema", "walk_schemas"]

_REFUSED = {
    "not": "a negation has no grammar",
    "if": "conditions have no grammar; write the cases as anyOf",
    "then": "it belongs to if",
    "else": "it belongs to if",
    "contains": "give prefixItems and items",
    "minContains": "it belongs to contains",
    "maxContains": "it belongs to contains",
    "propertyNames": "beside properties, or with more than a pattern, lengths or an enum, it has no grammar",
    "dependencies": "it is dependentRequired and dependentSchemas since draft 2019-09",
    "unevaluatedProperties": "give additionalProperties",
    "unevaluatedItems": "give items",
    "$dynamicRef": "give $ref",
    "$recursiveRef": "give $ref",
}
"""Keywords that are refused by name, and what to do."""
_SUBSCHEMAS = ("additionalProperties", "items", "contentSchema", "not", "if", "then", "else", "contains")
_SUBSCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SUBSCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_COUNTS = {f"{bound}{what}" for bound in ("min", "max") for what in ("Length", "Items", "Properties", "Contains")}
_EXPLANATIONS = (
    (r"at \d+\(\d+\): (?P<name>invalid regex.*)", "{name}"),
    (r"Unknown format: (?P<name>.*)", "the keyword 'format' is not supported with the value {name!r}"),
    (r"oneOf constraints are not", "the keyword 'oneOf' is not supported where an answer may match two: give anyOf"),
    (r"min/maxProperties", "the keywords 'minProperties' and 'maxProperties' need all of 'properties' in 'required'"),
    (r"Pointer '(?P<name>.*)' does not exist", "the keyword '$ref': there is no {name!r}"),
    (r"Anchor '(?P<name>.*)' does not exist", "the keyword '$ref': there is no anchor {name!r}"),
    (r"patternProperty regexes (?P<name>.*)", "the keyword 'patternProperties': two may match a name: {name}"),
    (r"Failed to generate regex for .*", "the keywords 'minimum' and 'maximum' are not supported with such a number"),
    (r"Unimplemented keys: \[(?P<name>.*)\]", "the keywords {name} are not supported here"),
    (r"Resource '(?P<name>.*)' is not present", "the keyword '$ref' is not supported with another document: {name!r}"),
    (r"(?P<name>regex parse error.*)", "the keyword 'pattern': {name}"),
    (r"invalid multiple of", "the keyword 'multipleOf' must be a number above 0"),
    (r"Invalid type: (?P<name>.*)", "the keyword 'type': there is no {name!r}"),
    (r"type must be a string$", "the keyword 'type' must be a string or a list of strings"),
    (r".*NoExtension.*", "no answer can match it"),
    (r"Unsatisfiable schema: anyOf is empty", "no answer can match it: an 'enum', a 'type' or an 'anyOf' is empty"),
    (r"Unsatisfiable schema: (?P<name>.*)", "no answer can match it: {name}"),
)  # fmt: skip
"""Messages of the library, and what they are for a caller: with the keyword that they are about."""


def apply_defaults(params: StructuredOutputsParams, no_blanks: bool, close_objects: bool) -> StructuredOutputsParams:
    """``params`` with what a backend is told to do for all JSON: without blanks between its parts, unless there is a
    pattern of them, and without properties that a schema does not list."""
    changes: dict[str, bool] = {}
    if params.kind in ("json", "json_object", "structural_tag"):
        if no_blanks and params.whitespace_pattern is None:
            changes["disable_any_whitespace"] = True
        if close_objects:
            changes["disable_additional_properties"] = True
    return msgspec.structs.replace(params, **changes) if changes else params


def prepare_schema(schema: Any) -> dict[str, Any]:
    """An equal schema that the library takes, made of ``schema``, which is changed. Raises ``InvalidRequestError``,
    with the keyword and its place, for what would be passed over or fail later."""
    if schema is False:
        raise InvalidRequestError("json: no answer can match the schema false", "structured_outputs")
    if schema is True:
        return {}
    for path, each in _walk_referenced(schema):
        _simplify(each)
        for keyword in each:
            if keyword in _REFUSED:
                raise _refuse(keyword, path, _REFUSED[keyword])
        if each.get("uniqueItems") is True:
            raise _refuse("uniqueItems", path, "what was written already cannot be excluded")
        if isinstance(each.get("items"), list):
            raise _refuse("items", path, "a list of schemas is prefixItems since draft 2020-12")
        if "additionalItems" in each:
            raise _refuse("additionalItems", path, "it is items since draft 2020-12")
    assert isinstance(schema, dict)
    return schema


def _simplify(schema: dict[str, Any]) -> None:
    """Take out what asserts nothing, and write in other keywords what the library does not know."""
    if "if" not in schema or not schema.keys() & {"then", "else"}:
        for keyword in ("if", "then", "else"):
            schema.pop(keyword, None)
    if schema.get("minContains") == 0 and "maxContains" not in schema:
        schema.pop("contains", None)
    if "contains" not in schema:
        schema.pop("minContains", None)
        schema.pop("maxContains", None)
    if schema.get("not") is False:
        del schema["not"]
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    for keyword in ("unevaluatedProperties", "unevaluatedItems"):
        if schema.get(keyword) in (True, {}):
            del schema[keyword]
    for keyword in ("contentSchema", "$dynamicAnchor"):  # an annotation, and a name that $dynamicRef alone looks for
        schema.pop(keyword, None)
    for keyword in _COUNTS & schema.keys():
        if isinstance(schema[keyword], float) and schema[keyword].is_integer():
            schema[keyword] = int(schema[keyword])
    write_format(schema)
    if isinstance(schema.get("propertyNames"), dict | bool):
        _write_property_names(schema)
    for keyword in ("dependentRequired", "dependentSchemas"):
        dependencies = schema.get(keyword)
        if isinstance(dependencies, dict):
            del schema[keyword]
            for name, needed in dependencies.items():
                needs = {"required": needed} if keyword == "dependentRequired" else needed
                add_to_all_of(schema, {"anyOf": [{"properties": {name: False}}, needs]})


def _write_property_names(schema: dict[str, Any]) -> None:
    """``propertyNames`` as ``patternProperties``, or as ``properties`` for an enum, where no others are listed."""
    names = schema["propertyNames"]
    if names is True or (
        isinstance(names, dict) and not names.keys() - {"type"} and names.get("type") in (None, "string")
    ):
        del schema["propertyNames"]
        return
    if not isinstance(names, dict) or schema.keys() & {"properties", "patternProperties", "required"}:
        return
    rest = names.keys() - {"type"}
    value = schema.get("additionalProperties", True)
    if rest == {"pattern"}:
        properties = {"patternProperties": {names["pattern"]: value}}
    elif rest <= {"minLength", "maxLength"}:
        length = f"{names.get('minLength', 0)},{names.get('maxLength', '')}"
        properties = {"patternProperties": {f"^(.|\\n){{{length}}}$": value}}
    elif rest == {"enum"} and all(isinstance(name, str) for name in names["enum"]):
        properties = {"properties": dict.fromkeys(names["enum"], value)}
    else:
        return
    del schema["propertyNames"]
    schema.update(properties, additionalProperties=False)


def explain_error(error: str) -> str:
    """What a message of the library says to the caller whose schema it refuses."""
    for pattern, explanation in _EXPLANATIONS:
        if match := re.match(pattern, error):
            return explanation.format(**match.groupdict())
    return error


def walk_schemas(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema inside ``schema``, with its place. ``StructuredOutputsParams`` has bounded the depth."""
    if not isinstance(schema, dict):
        return
    yield path, schema
    for keyword, value in schema.items():
        where = f"{path}/{keyword}"
        if keyword in _SUBSCHEMAS:
            yield from walk_schemas(value, where)
        elif keyword in _SUBSCHEMA_LISTS and isinstance(value, list):
            for index, each in enumerate(value):
                yield from walk_schemas(each, f"{where}/{index}")
        elif keyword in _SUBSCHEMA_MAPS and isinstance(value, dict):
            for name, each in value.items():
                yield from walk_schemas(each, f"{where}/{name}")


def _walk_referenced(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema inside ``schema`` once, and those that a ``$ref`` leads to where no keyword for schemas does."""
    seen: dict[int, Any] = {}  # kept, so that no other takes its place in memory
    references, known = ["#"], {"#"}
    for reference in references:
        start = _follow(reference, schema)
        for path, each in walk_schemas(start, reference[1:]) if id(start) not in seen else ():
            if id(each) in seen:
                continue
            seen[id(each)] = each
            yield path, each
            target = each.get("$ref")
            if isinstance(target, str) and target not in known:
                known.add(target)
                references.append(target)


def _follow(reference: str, root: Any) -> Any:
    """What stands at ``#/...`` in ``root``; None if nothing does, or a value that answers are compared with."""
    start, *steps = reference.split("/")
    if start != "#":
        return None
    for step in steps:
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        root = root.get(key) if isinstance(root, dict) and key not in ("const", "enum") else None
    return root


def _refuse(keyword: str, path: str, why: str) -> InvalidRequestError:
    place = f" at {path[:100]}" if path else ""
    return InvalidRequestError(f"json: the keyword {keyword!r}{place} is not supported: {why}", "structured_outputs")

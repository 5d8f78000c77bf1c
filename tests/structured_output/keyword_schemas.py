"""Schemas of every keyword of JSON Schema draft 2020-12, by keyword."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.structured_output.instances import FORMATS, MATCHES

__all__ = ["BY_KEYWORD"]

Schema = Any


def _annotated(annotation: Schema) -> list[Schema]:
    return [
        {"type": "integer", **annotation},
        {"type": "object", "properties": {"a": {"type": "string", **annotation}}},
    ]


def _iter_by_keyword() -> Iterator[tuple[str, list[Schema]]]:
    integer, string = {"type": "integer"}, {"type": "string"}
    array, obj = {"type": "array"}, {"type": "object"}
    yield "true and false", [True, {}, {"properties": {"a": True, "b": False}}, {"items": True, "type": "array"}, False]
    yield "type", [{"type": kind} for kind in ("string", "number", "integer", "boolean", "null", "array", "object")] + [
        {"type": ["integer", "null"]}, {"type": ["string", "object"]},
    ]  # fmt: skip
    yield "const", [{"const": value} for value in (1, "a", None, True, 2.5, [1, 2], {"a": {"b": []}}, 'é"\\', -3)]
    yield "enum", [
        {"enum": ["a", "ab", "abc"]}, {"enum": [1, "1", None, True, [1], {"a": 1}]}, {"enum": ["x"], "type": "string"},
        {"enum": [1, "a", None], "type": ["string", "null"]}, {"enum": []}, {"enum": ["a", "bb"], "minLength": 2},
    ]  # fmt: skip
    yield "minLength", [string | {"minLength": n} for n in (0, 1, 5)] + [{"minLength": 2}]
    yield "maxLength", [string | {"maxLength": n} for n in (0, 1, 5)] + [{"maxLength": 2}]
    yield (
        "minLength and maxLength",
        [string | {"minLength": 2, "maxLength": 4}, {"minLength": 3, "maxLength": 2}],
    )
    yield "pattern", [string | {"pattern": pattern} for pattern in MATCHES] + [
        {"pattern": "^a"}, string | {"pattern": "^a", "minLength": 3, "maxLength": 5},
        string | {"pattern": "(?=a)b"}, string | {"pattern": "^(a)\\1$"},
    ]  # fmt: skip
    yield "format", [string | {"format": name} for name in (*FORMATS, "duration", "uri-reference", "regex")]
    for name, value in (("contentEncoding", "base64"), ("contentMediaType", "application/json"), ("contentSchema", {})):
        yield name, [string | {name: value}]
    for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        yield (
            name,
            [{"type": kind, name: bound} for kind in ("integer", "number") for bound in (-7, 0, 12, 2.5)] + [{name: 3}],
        )
    yield (
        "minimum and maximum",
        [integer | {"minimum": low, "maximum": high} for low, high in ((0, 9), (-15, 123), (1, 1), (99, 1001), (5, 4))]
        + [
            {"type": "number", "minimum": -1.5, "maximum": 2.25},
            integer | {"exclusiveMinimum": 3, "maximum": 4},
        ],
    )
    yield "multipleOf", [integer | {"multipleOf": n} for n in (2, 3, 7, 10)] + [
        {"type": "number", "multipleOf": 0.5}, {"multipleOf": 4}, integer | {"multipleOf": 3, "minimum": 5},
    ]  # fmt: skip
    yield "properties", [
        {"properties": {"a": integer}}, obj | {"properties": {"a": integer, "b": string}},
        obj | {"properties": {"é\"x": integer, "": string, "a/b": {"type": "null"}}},
        obj | {"properties": {"a": obj | {"properties": {"b": integer}}}},
    ]  # fmt: skip
    yield "required", [
        {"required": ["a"]}, obj | {"properties": {"a": integer, "b": integer}, "required": ["b"]},
        obj | {"properties": {"a": integer}, "required": ["b", "a"]}, obj | {"required": []},
    ]  # fmt: skip
    yield "additionalProperties", [
        obj | {"additionalProperties": False}, obj | {"additionalProperties": integer},
        obj | {"properties": {"a": integer}, "additionalProperties": False},
        obj | {"properties": {"a": integer}, "additionalProperties": string, "required": ["a"]},
    ]  # fmt: skip
    yield "patternProperties", [
        obj | {"patternProperties": {"^s_": string}},
        obj | {"patternProperties": {"^s_": string, "^i_": integer}, "additionalProperties": False},
        obj | {"properties": {"a": integer}, "patternProperties": {"^i_": integer}},
    ]  # fmt: skip
    yield "minProperties", [obj | {"minProperties": n} for n in (0, 1, 2)]
    yield "maxProperties", [obj | {"maxProperties": n} for n in (0, 1, 2)]
    yield "propertyNames", [
        obj | {"propertyNames": {"pattern": "^a"}}, obj | {"propertyNames": {"maxLength": 2}},
        obj | {"propertyNames": True},
    ]  # fmt: skip
    yield "dependentRequired", [
        obj | {"properties": {"a": integer, "b": integer}, "dependentRequired": {"a": ["b"]}},
        {"dependentRequired": {"a": ["b"], "b": ["a"]}}, obj | {"dependentRequired": {}},
    ]  # fmt: skip
    yield "dependentSchemas", [
        obj | {"properties": {"a": integer}, "dependentSchemas": {"a": {"required": ["b"]}}},
        {"dependentSchemas": {"a": {"properties": {"b": integer}}}},
    ]  # fmt: skip
    yield "unevaluatedProperties", [
        obj | {"properties": {"a": integer}, "unevaluatedProperties": False},
        obj | {"properties": {"a": integer}, "unevaluatedProperties": True},
    ]  # fmt: skip
    yield "items", [
        array | {"items": integer}, {"items": string}, array | {"items": False},
        array | {"items": array | {"items": integer}}, array | {"items": {"enum": ["a", "b"]}},
    ]  # fmt: skip
    yield "prefixItems", [
        array | {"prefixItems": [integer, string]}, array | {"prefixItems": [integer], "items": string},
        array | {"prefixItems": [integer, string], "items": False},
        array | {"prefixItems": [integer, string], "items": False, "minItems": 2},
    ]  # fmt: skip
    yield "minItems", [array | {"items": integer, "minItems": n} for n in (0, 1, 3)]
    yield "maxItems", [array | {"items": integer, "maxItems": n} for n in (0, 1, 3)] + [
        array | {"minItems": 2, "maxItems": 2, "items": string}, array | {"minItems": 2, "maxItems": 1},
    ]  # fmt: skip
    yield "uniqueItems", [
        array | {"items": integer, "uniqueItems": True}, array | {"items": integer, "uniqueItems": False},
    ]  # fmt: skip
    yield (
        "contains",
        [array | {"contains": {"const": 1}}, array | {"items": integer, "contains": {"const": 1}}],
    )
    yield "minContains", [
        array | {"contains": {"const": 1}, "minContains": 2}, array | {"contains": integer, "minContains": 0},
        array | {"items": integer, "minContains": 2},
    ]  # fmt: skip
    yield "maxContains", [
        array | {"contains": {"const": 1}, "maxContains": 2}, array | {"items": integer, "maxContains": 1},
    ]  # fmt: skip
    yield "unevaluatedItems", [
        array | {"prefixItems": [integer], "unevaluatedItems": False},
        array | {"items": integer, "unevaluatedItems": True},
    ]  # fmt: skip
    yield "allOf", [
        {"allOf": [integer, {"minimum": 3}]}, obj | {"allOf": [{"properties": {"a": integer}}, {"required": ["a"]}]},
        {"allOf": [string | {"minLength": 2}, {"maxLength": 3}]}, {"allOf": [integer, string]}, {"allOf": [{}]},
        {"properties": {"a": integer}, "allOf": [{"properties": {"b": string}, "required": ["b"]}], "type": "object"},
    ]  # fmt: skip
    yield "anyOf", [
        {"anyOf": [integer, string]}, {"anyOf": [integer, {"minimum": 3}]},
        string | {"anyOf": [{"minLength": 4}, {"maxLength": 1}]},
        {"anyOf": [obj | {"properties": {"a": integer}, "required": ["a"]},
                   obj | {"properties": {"b": string}, "required": ["b"]}]},
        obj | {"properties": {"k": string}, "anyOf": [{"required": ["k"]}, {"required": ["z"]}]},
    ]  # fmt: skip
    yield "oneOf", [
        {"oneOf": [integer, string]}, {"oneOf": [integer, {"minimum": 3}]}, {"oneOf": [{"const": "a"}, {"const": "b"}]},
        {"oneOf": [obj | {"properties": {"t": {"const": "x"}}, "required": ["t"]},
                   obj | {"properties": {"t": {"const": "y"}, "v": integer}, "required": ["t", "v"]}]},
        {"oneOf": [string | {"maxLength": 3}, string | {"minLength": 2}]},
    ]  # fmt: skip
    yield "not", [{"not": string}, integer | {"not": {"const": 3}}, integer | {"not": False}]
    yield "if", [
        {"if": string, "then": {"minLength": 2}, "else": {"minimum": 3}}, integer | {"if": {"minimum": 5}},
        integer | {"then": {"minimum": 5}}, integer | {"else": {"minimum": 5}},
    ]  # fmt: skip
    node = {
        "type": "object",
        "properties": {"v": integer, "c": array | {"items": {"$ref": "#/$defs/n"}}},
        "required": ["v"],
    }
    yield "$ref", [
        {"$ref": "#/$defs/a", "$defs": {"a": integer}}, {"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": integer}},
        {"$ref": "#/$defs/n", "$defs": {"n": node}},
        obj | {"properties": {"next": {"$ref": "#"}, "v": integer}, "required": ["v"]},
        {"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": integer}}, {"$ref": "#/$defs/missing"},
        {"$ref": "https://example.org/other.json"},
    ]  # fmt: skip
    yield "$anchor", [{"$ref": "#x", "$defs": {"a": {"$anchor": "x", **integer}}}]
    yield (
        "$id",
        [
            {"$id": "http://e.org/y", "$ref": "z", "$defs": {"a": {"$id": "z", **integer}}},
            {"$id": "http://e.org/y", **integer},
        ],
    )
    yield "$defs", [{"$defs": {"unused": {"not": {}}}, **integer}, {"$defs": {}, "type": "string"}]
    yield "$dynamicRef", [{"$dynamicRef": "#x", "$defs": {"a": {"$dynamicAnchor": "x", **integer}}}]
    yield "$dynamicAnchor", [{"$dynamicAnchor": "x", **integer}]
    yield "$vocabulary", [{"$vocabulary": {}, **integer}]
    for name, value in (
        ("$schema", "https://json-schema.org/draft/2020-12/schema"), ("$comment", "c"), ("title", "t"),
        ("description", "d"),
        ("default", 1), ("deprecated", True), ("readOnly", True), ("writeOnly", True), ("examples", [1]),
        ("x-unknown", 1),
    ):  # fmt: skip
        yield name, [{name: value, **integer}] if name == "$schema" else _annotated({name: value})


BY_KEYWORD = dict(_iter_by_keyword())

"""A corpus of JSON schemas, draft 2020-12: every keyword by itself, and keywords together as schemas for APIs use them.

Each schema comes with instances that were written to match it, in the order of its properties. Whether they do is for
``jsonschema`` to say; those that do not, and what is made from others by small changes, are what must be refused.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from tests.structured_output.instances import FORMATS, MATCHES, Schema, sample_instances
from tests.structured_output.keyword_schemas import BY_KEYWORD

__all__ = ["Case", "make_corpus"]


class Case(NamedTuple):
    """A schema, the keyword that it is about (or ``combined``), and instances that are likely to match."""

    keyword: str
    schema: Schema
    candidates: list[Any]


def make_corpus(seed: int = 0) -> list[Case]:
    """About 750 schemas."""
    rng = random.Random(seed)
    cases = []
    for keyword, schemas in BY_KEYWORD.items():
        cases += [Case(keyword, schema, sample_instances(rng, schema)) for schema in schemas]
    for _ in range(500):
        schema = _Writer(rng).write_root()
        cases.append(Case("combined", schema, sample_instances(rng, schema)))
    return cases


class _Writer:
    """Writes a random schema as those of tools and answers are: objects of typed properties, some references."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._definitions: dict[str, Schema] = {}

    def write_root(self) -> Schema:
        rng = self._rng
        if rng.random() < 0.25:
            self._definitions["node"] = self._write_object(2, closed=True)
        schema = self._write_object(0, closed=rng.random() < 0.5) if rng.random() < 0.85 else self._write_any(0)
        if rng.random() < 0.3:
            schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T", **schema}
        if self._definitions:
            schema = {**schema, "$defs": self._definitions}
        return schema

    def _write_any(self, depth: int) -> Schema:
        rng = self._rng
        writers = [self._write_string] * 4 + [self._write_number] * 4 + [self._write_small] * 3
        if depth < 3:
            writers += [self._write_array] * 2 + [self._write_nested] * 2 + [self._write_choice] * 2
        if self._definitions and depth:
            writers += [lambda depth: {"$ref": "#/$defs/node"}] * 2
        schema = rng.choice(writers)(depth)
        if rng.random() < 0.15 and isinstance(schema, dict) and "$ref" not in schema:
            schema = {**schema, **rng.choice(_ANNOTATIONS)}
        if rng.random() < 0.012:
            schema = {**schema, **rng.choice(_RARE)}
        return schema

    def _write_nested(self, depth: int) -> Schema:
        return self._write_object(depth + 1, closed=self._rng.random() < 0.5)

    def _write_object(self, depth: int, closed: bool) -> Schema:
        rng = self._rng
        names = rng.sample(_NAMES, rng.randint(1, 6 if depth == 0 else 3))
        schema: Schema = {"type": "object", "properties": {name: self._write_any(depth + 1) for name in names}}
        if rng.random() < 0.8:
            schema["required"] = [name for name in names if rng.random() < 0.7]
        if closed:
            schema["additionalProperties"] = False
        elif rng.random() < 0.2:
            schema["additionalProperties"] = self._write_small(depth)
        elif rng.random() < 0.1:
            schema["patternProperties"] = {"^x-": {"type": "string"}}
        if rng.random() < 0.05:
            schema["minProperties"] = 1
        if rng.random() < 0.08:
            schema = {"allOf": [schema, {"properties": {"extra1": {"type": "integer"}}, "required": ["extra1"]}]}
            schema["allOf"][0].pop("additionalProperties", None)
        return schema

    def _write_array(self, depth: int) -> Schema:
        rng = self._rng
        schema: Schema = {"type": "array", "items": self._write_any(depth + 1)}
        if rng.random() < 0.5:
            schema["minItems"] = rng.randint(0, 2)
        if rng.random() < 0.5:
            schema["maxItems"] = schema.get("minItems", 0) + rng.randint(0, 3)
        if rng.random() < 0.15:
            schema = {
                "type": "array",
                "prefixItems": [self._write_small(depth), self._write_small(depth)],
                "items": False,
            }
        return schema

    def _write_string(self, depth: int) -> Schema:
        rng = self._rng
        schema: Schema = {"type": "string"}
        kind = rng.random()
        if kind < 0.2:
            schema["enum"] = rng.sample(["red", "green", "blue", "dark blue", "n/a", "é"], 3)
        elif kind < 0.35:
            schema["pattern"] = rng.choice([p for p in MATCHES if p not in ("^x-", "^s_", "^i_")])
        elif kind < 0.45:
            schema["format"] = rng.choice(list(FORMATS))
        elif kind < 0.6:
            schema["maxLength"] = rng.randint(1, 20)
            if rng.random() < 0.5:
                schema["minLength"] = rng.randint(0, schema["maxLength"])
        return schema

    def _write_number(self, depth: int) -> Schema:
        rng = self._rng
        schema: Schema = {"type": rng.choice(["integer", "integer", "number"])}
        if rng.random() < 0.4:
            schema[rng.choice(["minimum", "minimum", "exclusiveMinimum"])] = rng.randint(-20, 20)
        if rng.random() < 0.4:
            schema[rng.choice(["maximum", "maximum", "exclusiveMaximum"])] = rng.randint(30, 300)
        if rng.random() < 0.07:
            schema["multipleOf"] = rng.choice([2, 5, 10])
        return schema

    def _write_small(self, depth: int) -> Schema:
        return self._rng.choice([
            {"type": "boolean"}, {"type": "null"}, {"const": "fixed"}, {"enum": [1, 2, 3]},
            {"type": ["string", "null"]}, {"type": "string"},
            {"type": "integer"}, {"enum": ["a", 1, None, True]}, {"const": {"k": [1]}},
        ])  # fmt: skip

    def _write_choice(self, depth: int) -> Schema:
        rng = self._rng
        if rng.random() < 0.6:
            return {"anyOf": [self._write_any(depth + 1), {"type": "null"}]}
        kinds = rng.sample(["string", "integer", "boolean", "null"], 2)
        return {rng.choice(["anyOf", "oneOf"]): [{"type": kind} for kind in kinds]}


_NAMES = [
    "name",
    "age",
    "id",
    "tags",
    "address",
    "email",
    "score",
    "is_active",
    "note",
    "größe",
    "a b",
    'q"uote',
    "x/y",
]
_ANNOTATIONS = [
    {"description": "what it is"}, {"title": "Name"}, {"default": None}, {"examples": [1, "a"]}, {"deprecated": True},
    {"$comment": "see there"}, {"readOnly": True}, {"writeOnly": False}, {"x-order": 3},
]  # fmt: skip
_RARE = [
    {"not": {"const": 7}}, {"uniqueItems": True}, {"if": {"minLength": 3}, "then": {"maxLength": 4}},
    {"contains": {"type": "integer"}}, {"propertyNames": {"maxLength": 9}}, {"unevaluatedProperties": False},
    {"dependentSchemas": {"name": {"required": ["age"]}}}, {"format": "duration"},
]  # fmt: skip

"""Instances for JSON schemas: some that were written to match, in the order of the properties, and some near those."""

from __future__ import annotations

import copy
import random
from typing import Any

__all__ = ["FORMATS", "MATCHES", "Schema", "mutate_instances", "sample_instances"]

Schema = Any


def mutate_instances(rng: random.Random, instances: list[Any]) -> list[Any]:
    """Values near ``instances``: one change each."""
    mutated: list[Any] = [
        None,
        True,
        0,
        -1,
        3,
        2.5,
        10**12,
        "",
        "a",
        "abc",
        "zzzzzzzzzzzzzzzzzzzz",
        [],
        {},
        [1, 1],
        {"zz": 1},
    ]
    for instance in instances:
        for _ in range(4):
            mutated.append(_mutate(rng, copy.deepcopy(instance)))
    return mutated


def _mutate(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        kind = rng.randrange(4)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value["extra"] = rng.choice([1, "x", None])
        else:
            value[key] = _mutate(rng, value[key])
        return value
    if isinstance(value, list) and value:
        index = rng.randrange(len(value))
        kind = rng.randrange(4)
        if kind == 0:
            del value[index]
        elif kind == 1:
            value.append(copy.deepcopy(value[index]))
        else:
            value[index] = _mutate(rng, value[index])
        return value
    if isinstance(value, bool) or value is None:
        return rng.choice([0, "true", not value, None])
    if isinstance(value, int | float):
        return rng.choice([value + 1, value - 1, -value, value * 1000 + 1, value + 0.5, str(value)])
    if isinstance(value, str):
        return rng.choice([value + "x", value[1:], value * 3, "é" + value, value.upper(), value + "\n", len(value)])
    return {"a": value}


def sample_instances(rng: random.Random, schema: Schema) -> list[Any]:
    """Up to six values that are likely to match."""
    samples = []
    for _ in range(6):
        try:
            value = _sample(rng, schema, schema, 0)
        except (_Impossible, KeyError):
            continue
        if value not in samples:
            samples.append(value)
    return samples


class _Impossible(Exception):
    """The sampler sees no instance."""


def _sample(rng: random.Random, schema: Schema, root: Schema, depth: int) -> Any:
    if depth > 12:
        raise _Impossible
    if schema is True or schema == {}:
        return rng.choice([None, True, 7, 2.5, "text", [1, "a"], {"k": 1}])
    if schema is False:
        raise _Impossible
    if "$ref" in schema:
        target = _resolve(schema["$ref"], root)
        rest = {key: value for key, value in schema.items() if key not in ("$ref", "$defs")}
        return _sample(rng, _merge(target, rest) if rest else target, root, depth + 1)
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            rest = {key: value for key, value in schema.items() if key != keyword}
            return _sample(rng, _merge(rest, rng.choice(schema[keyword])), root, depth + 1)
    if "allOf" in schema:
        merged = {key: value for key, value in schema.items() if key != "allOf"}
        for each in schema["allOf"]:
            merged = _merge(merged, _resolve(each["$ref"], root) if isinstance(each, dict) and "$ref" in each else each)
        return _sample(rng, merged, root, depth + 1)
    if "const" in schema:
        return copy.deepcopy(schema["const"])
    if "enum" in schema:
        if not schema["enum"]:
            raise _Impossible
        return copy.deepcopy(rng.choice(schema["enum"]))
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = rng.choice(kind)
    return _SAMPLERS[kind or _guess_type(schema)](rng, schema, root, depth)


def _guess_type(schema: Schema) -> str:
    for kind, keywords in _KEYWORDS_OF_TYPE.items():
        if keywords & schema.keys():
            return kind
    return "null"


_KEYWORDS_OF_TYPE = {
    "object": {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties",
               "propertyNames", "dependentRequired", "dependentSchemas", "unevaluatedProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems", "contains", "uniqueItems", "unevaluatedItems"},
    "string": {"minLength", "maxLength", "pattern", "format", "contentEncoding", "contentMediaType", "contentSchema"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}  # fmt: skip


def _resolve(reference: str, root: Schema) -> Schema:
    if reference == "#":
        return root
    if reference.startswith("#/"):
        target = root
        for part in reference[2:].split("/"):
            target = target[part.replace("~1", "/").replace("~0", "~")]
        return target
    for each in root.get("$defs", {}).values():
        if reference in ("#" + str(each.get("$anchor")), each.get("$id")):
            return each
    raise _Impossible


def _merge(first: Schema, second: Schema) -> Schema:
    """Roughly the schema of both."""
    if isinstance(first, bool) or isinstance(second, bool):
        return False if first is False or second is False else first if second is True else second
    merged = dict(first)
    for key, value in second.items():
        if key == "properties" and key in merged:
            merged[key] = {**merged[key], **{
                name: _merge(merged[key][name], each) if name in merged[key] else each for name, each in value.items()
            }}  # fmt: skip
        elif key == "required" and key in merged:
            merged[key] = [*merged[key], *(name for name in value if name not in merged[key])]
        elif key in ("minimum", "minLength", "minItems") and key in merged:
            merged[key] = max(merged[key], value)
        elif key in ("maximum", "maxLength", "maxItems") and key in merged:
            merged[key] = min(merged[key], value)
        else:
            merged[key] = value
    return merged


def _sample_object(rng: random.Random, schema: Schema, root: Schema, depth: int) -> Any:
    required = schema.get("required", [])
    result = {}
    for name, each in schema.get("properties", {}).items():
        if name in required or rng.random() < 0.6:
            try:
                result[name] = _sample(rng, each, root, depth + 1)
            except _Impossible:
                if name in required:
                    raise
    additional = schema.get("additionalProperties", True)
    for name in required:
        if name not in result:
            result[name] = _sample(rng, additional, root, depth + 1)
    count = schema.get("minProperties", 0)
    names = iter([name for name in ("k1", "k2", "k3", "k4") if name not in result])
    while len(result) < count:
        result[next(names)] = _sample(rng, additional, root, depth + 1)
    if "patternProperties" in schema and rng.random() < 0.7:
        for pattern, each in schema["patternProperties"].items():
            result[MATCHES[pattern]] = _sample(rng, each, root, depth + 1)
    if additional is not False and "properties" in schema and rng.random() < 0.2 and "maxProperties" not in schema:
        result["other"] = _sample(rng, additional, root, depth + 1)
    return result


def _sample_array(rng: random.Random, schema: Schema, root: Schema, depth: int) -> Any:
    prefix, items = schema.get("prefixItems", []), schema.get("items", True)
    low = schema.get("minItems", 0)
    high = schema.get("maxItems", max(low, len(prefix), 2) + (1 if depth < 3 else 0))
    if items is False:
        high = min(high, len(prefix))
    if low > high:
        raise _Impossible
    count = rng.randint(low, high)
    return [_sample(rng, prefix[i] if i < len(prefix) else items, root, depth + 1) for i in range(count)]


def _sample_string(rng: random.Random, schema: Schema, root: Schema, depth: int) -> Any:
    if "format" in schema:
        if schema["format"] not in FORMATS:
            raise _Impossible
        return rng.choice(FORMATS[schema["format"]])
    if "pattern" in schema:
        return MATCHES.get(schema["pattern"], "b")
    low = schema.get("minLength", 0)
    high = schema.get("maxLength", low + 8)
    if low > high:
        raise _Impossible
    letters = 'abc XYZ019-_é😀"\\/\n' if rng.random() < 0.3 else "abcdefgh "
    return "".join(rng.choice(letters) for _ in range(rng.randint(low, high)))


def _sample_number(rng: random.Random, schema: Schema, root: Schema, depth: int) -> Any:
    whole = schema.get("type") == "integer" or schema.get("type") == ["integer", "null"]
    low = schema.get("minimum", schema.get("exclusiveMinimum", -50))
    high = schema.get("maximum", schema.get("exclusiveMaximum", max(low, 0) + 100))
    if low > high:
        raise _Impossible
    step = schema.get("multipleOf")
    if step is not None:
        return step * rng.randint(-int(-low // step), int(high // step))
    if whole or rng.random() < 0.4:
        return rng.randint(-int(-low // 1), int(high // 1)) if -int(-low // 1) <= int(high // 1) else int(low)
    return round(rng.uniform(low, high), 2)


_SAMPLERS = {
    "object": _sample_object,
    "array": _sample_array,
    "string": _sample_string,
    "number": _sample_number,
    "integer": lambda rng, schema, root, depth: _sample_number(rng, {**schema, "type": "integer"}, root, depth),
    "boolean": lambda rng, schema, root, depth: rng.random() < 0.5,
    "null": lambda rng, schema, root, depth: None,
}
FORMATS = {
    "date": ["2024-02-29", "1999-12-31"],
    "email": ["ada@example.org"],
    "ipv4": ["127.0.0.1", "10.20.30.40"],
    "uuid": ["123e4567-e89b-12d3-a456-426614174000"],
}
MATCHES = {
    "^[a-z]{1,8}$": "abcd",
    "^[A-Z]{2}[0-9]{3}$": "AB123",
    "^\\+?[0-9 ()-]{5,15}$": "+44 (0)20-7",
    "^(red|green|blue)$": "green",
    "[0-9]": "abc7def",
    "^a": "abc",
    "z$": "xyz",
    "^.{2,4}$": "abc",
    "^[^0-9]*$": "hello",
    "^\\d{4}-\\d{2}$": "2024-05",
    "^x-": "x-name",
    "^[a-f0-9]+$": "c0ffee",
    "^(?:ab)*$": "abab",
    "^\\S+@\\S+$": "a@b",
    "^s_": "s_1",
    "^i_": "i_1",
}

"""What an answer has to match, in all the forms in which request bodies say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.core.structured_outputs import StructuredOutputsParams
from quire.server.http.errors import ApiError

__all__ = ["STRUCTURED_FIELDS", "read_structured_outputs"]

STRUCTURED_FIELDS: Mapping[str, str] = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
    "structural_tag": "structural_tag",
}
"""Fields of a body, as vLLM before 0.12 and SGLang have them, and what they are in ``structured_outputs``."""


def read_structured_outputs(fields: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """From the fields of a body that are not null. Raises ``ApiError`` for what is malformed, or said twice."""
    sources: dict[str, dict[str, Any]] = {}
    if (response_format := _read_response_format(fields.get("response_format"))) is not None:
        sources["response_format"] = response_format
    for name, key in STRUCTURED_FIELDS.items():
        if fields.get(name) is not None:
            sources[name] = {key: fields[name]}
    if (structured := fields.get("structured_outputs")) is not None:
        if not isinstance(structured, Mapping):
            raise _error("structured_outputs", "should be an object")
        sources["structured_outputs"] = dict(structured)
    if not sources:
        return None
    if len(sources) > 1:
        raise _error(list(sources)[-1], f"{' and '.join(sources)} say what the answer has to match; give one of them")
    ((name, values),) = sources.items()
    values = {key: value for key, value in values.items() if value is not None}
    if (pattern := fields.get("guided_whitespace_pattern")) is not None:
        values.setdefault("whitespace_pattern", pattern)
    if (backend := fields.get("guided_decoding_backend")) is not None:
        values.setdefault("backend", backend)
    unknown = sorted(values.keys() - (set(StructuredOutputsParams.__struct_fields__) - _NOT_FROM_CALLERS))
    if unknown:
        raise _error(name, f"has no field {unknown[0]!r:.60}")
    return StructuredOutputsParams(**values)


_NOT_FROM_CALLERS = {"reasoning_start", "reasoning_end", "reasoning_between", "answer_begin"}


def _read_response_format(value: Any) -> dict[str, Any] | None:
    """``response_format``: text, json_object, json_schema, or vLLM's structural_tag."""
    if value is None:
        return None
    kind = value.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        # Whether it is strict or not: an answer never breaks the schema.
        described = value.get("json_schema")
        schema = described.get("schema") if isinstance(described, Mapping) else None
        if schema is None:
            raise _error("response_format", "with type json_schema it needs json_schema.schema")
        return {"json": schema}
    if kind == "structural_tag":
        return {"structural_tag": {key: each for key, each in value.items() if key != "type"}}
    raise _error("response_format", f"type {kind!r:.40} is not one of text, json_object, json_schema, structural_tag")


def _error(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param)

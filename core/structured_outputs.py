"""What an answer has to match: a JSON schema, a regular expression, choices, a grammar or tags in free text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from quire.core.errors import InvalidRequestError
from quire.core.plugin.registry import suggest_names

__all__ = ["MAX_CONSTRAINT_BYTES", "ConstraintKind", "StructuredOutputsParams", "split_backend_name"]

MAX_CONSTRAINT_BYTES = 131_072
"""The longest schema, expression or grammar, as UTF-8. Each of the ``n`` continuations has a copy."""
MAX_CONSTRAINT_DEPTH = 64
"""The deepest nesting of a schema or a structural tag, in JSON objects and arrays."""
MAX_CHOICES = 4096
_OPTIONS_OF_VLLM: Mapping[str, str] = MappingProxyType(
    {
        "disable-any-whitespace": "disable_any_whitespace",
        "no-additional-properties": "disable_additional_properties",
        "no-fallback": "disable_fallback",
    }
)
"""What vLLM takes behind a colon after a backend's name, and the field that it is."""

ConstraintKind = Literal["json", "json_object", "regex", "choice", "grammar", "structural_tag"]
_KINDS: tuple[ConstraintKind, ...] = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an answer has to match, with the names of vLLM's API. Exactly one of the first six is given.

    ``json``: a JSON schema, as an object, as its text, or as a class of pydantic's. ``json_object``: any JSON object.
    ``regex``: a regular expression of the whole answer. ``choice``: one of these texts. ``grammar``: a context-free
    grammar, in Lark's syntax or in EBNF (GBNF: ``root ::= ...``). ``structural_tag``: free text in which, after a
    trigger, one of several structures follows: ``{"structures": [{"begin": ..., "schema": ..., "end": ...}],
    "triggers": [...]}``; beside them ``"free_text": false`` (nothing else), ``"at_least_one": true``,
    ``"structure_first": true`` (one begins the answer), ``"stop_after_first": true`` and ``"answer": SCHEMA`` (JSON of
    that schema, or structures; no free text). XGrammar's ``{"format": {"type": "triggered_tags"}}`` and
    ``{"type": "tag"}`` are taken too, around JSON schemas. For calls
    of tools the engine adds to a structure ``"group": [before, between, behind]`` (several of them in a list),
    ``"first": true`` (only where the answer begins, and nothing else), ``"arguments"`` and ``"separator"`` (as
    ``ArgumentFormat`` has them, in place of a schema) or ``"free": true`` (any text), and to the tag ``"excluded"`` and
    ``"excluded_first"``: what free text does not hold, and does not begin with.

    JSON may have white space between its parts, of at most ``whitespace_pattern`` at each place, or of none and the
    separators ``", "`` and ``": "`` with ``disable_any_whitespace``. ``disable_additional_properties`` closes every
    object whose schema says nothing of further properties.

    ``reasoning_end``: free text comes first, up to this text, or one of several, and the constraint holds for what
    follows. With ``reasoning_start`` as well, free text comes first only if the answer begins with that.
    ``reasoning_between`` is what a model then writes before all that follows; with it there may be several pieces of
    reasoning. What the answer has to match stands behind ``answer_begin``. ``backend`` and ``disable_fallback`` are
    accepted from scripts for vLLM: the engine has one backend, but options behind its name hold, such as
    ``"xgrammar:disable-any-whitespace"``.
    """

    json: str | dict[str, Any] | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    reasoning_start: str | list[str] | None = None
    reasoning_end: str | list[str] | None = None
    reasoning_between: str | None = None
    answer_begin: str | None = None
    backend: str | None = None
    disable_fallback: bool = False

    def __post_init__(self) -> None:
        """Brings every field into one form, and refuses what is none of its kind or too large."""
        self._check_settings()
        given: list[ConstraintKind] = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given" if given else "none is given"
            raise InvalidRequestError(f"structured_outputs takes exactly one of {', '.join(_KINDS)}; {what}", _PARAM)
        (kind,) = given
        for other in _KINDS:  # what is False is not given
            if other != kind:
                self._set(other, None)
        if kind in ("json", "structural_tag"):
            self._set(kind, _to_json_text(kind, getattr(self, kind), self.disable_additional_properties))
        elif kind == "choice":
            self._set(kind, _to_choices(self.choice))
        elif kind == "json_object":
            self._set(kind, True)
        for name in ("regex", "grammar", "whitespace_pattern", "reasoning_between", "answer_begin"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for name, texts in (("reasoning_start", self.reasoning_starts), ("reasoning_end", self.reasoning_ends)):
            for text in texts:
                _check_text(name, text)
        for name in ("reasoning_start", "reasoning_between"):
            if getattr(self, name) is not None and not self.reasoning_ends:
                raise InvalidRequestError(f"{name} needs reasoning_end", _PARAM)

    @classmethod
    def from_optional(cls, **fields: Any) -> StructuredOutputsParams | None:
        """From fields that may be None, as scripts for vLLM have them; None if nothing is asked for."""
        given = {name: value for name, value in fields.items() if value is not None}
        return cls(**given) if any(given.get(kind) not in (None, False) for kind in _KINDS) else None

    @property
    def kind(self) -> ConstraintKind:
        """Which of the six is given."""
        return next(name for name in _KINDS if getattr(self, name) is not None)

    @property
    def reasoning_starts(self) -> tuple[str, ...]:
        """The texts of ``reasoning_start``."""
        return _list_texts(self.reasoning_start)

    @property
    def reasoning_ends(self) -> tuple[str, ...]:
        """The texts of ``reasoning_end``."""
        return _list_texts(self.reasoning_end)

    def load_json(self) -> Any:
        """The schema, or the structural tag, as the value that its text stands for."""
        return json.loads(str(self.json if self.json is not None else self.structural_tag))

    def _check_settings(self) -> None:
        for name in ("disable_any_whitespace", "disable_additional_properties", "disable_fallback"):
            if not isinstance(value := getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be true or false, got {value!r:.60}", _PARAM)
        if self.backend is None:
            return
        if not isinstance(self.backend, str):
            raise InvalidRequestError(f"backend must be a text, got {self.backend!r:.60}", _PARAM)
        try:
            for field in split_backend_name(self.backend)[1]:
                self._set(field, True)
        except ValueError as error:
            raise InvalidRequestError(f"backend {self.backend!r:.60}: {error}", _PARAM) from None

    def _set(self, name: str, value: object) -> None:
        msgspec.structs.force_setattr(self, name, value)


def split_backend_name(name: str) -> tuple[str, list[str]]:
    """Of ``"xgrammar:disable-any-whitespace"``, as vLLM writes it, the backend and the fields that the options behind
    the colon turn on. Raises ``ValueError``, which says what is wrong, for an option that vLLM has not."""
    base, colon, options = name.partition(":")
    names = options.split(",") if colon else []
    for option in names:
        if option not in _OPTIONS_OF_VLLM:
            raise ValueError(f"{option!r:.60} is no option of a backend; {suggest_names(option, _OPTIONS_OF_VLLM)}")
    return base, [_OPTIONS_OF_VLLM[option] for option in names]


_PARAM = "structured_outputs"


def _list_texts(value: str | list[str] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _to_json_text(name: str, value: Any, close_objects: bool) -> str:
    """The compact text of a JSON value, its keys in their order."""
    if isinstance(value, str):
        _check_text(name, value)
        try:
            value = json.loads(value, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{name} is not valid JSON: {error}", _PARAM) from None
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if not isinstance(value, Mapping | bool) or (name != "json" and isinstance(value, bool)):
        raise InvalidRequestError(f"{name} must be a JSON object, got {value!r:.60}", _PARAM)
    _check_depth(name, value)
    if name == "structural_tag" and isinstance(value, Mapping) and "format" in value:
        _check_fields("the tag", value, {"type", "format"})
        value = _read_tag_format(value["format"])
    if close_objects:
        value = _close_objects(value)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{name} is not valid JSON: {error}", _PARAM) from None
    _check_text(name, text)
    return text


def _read_tag_format(tag: Any) -> dict[str, Any]:
    """A structural tag in the words of ``StructuredOutputsParams``, from XGrammar's ``{"format": {"type": ...}}``."""
    kind = tag.get("type") if isinstance(tag, Mapping) else None
    if kind == "tag":
        structure = _read_tag("format", tag)
        only = {"free_text": False, "at_least_one": True, "stop_after_first": True}
        return {"structures": [structure], "triggers": [structure["begin"]], **only}
    if kind != "triggered_tags":
        raise InvalidRequestError(
            f"structural_tag: a format of type {kind!r:.40} is not supported; give triggered_tags or tag", _PARAM
        )
    flags = ("at_least_one", "stop_after_first")
    _check_fields("format", tag, {"type", "triggers", "tags", *flags})
    if not isinstance(tags := tag.get("tags"), list):
        raise InvalidRequestError("structural_tag: 'tags' of format must be a list", _PARAM)
    structures = [_read_tag(f"tags[{index}]", each) for index, each in enumerate(tags)]
    given = {key: tag[key] for key in flags if key in tag}
    for key, flag in given.items():
        if not isinstance(flag, bool):
            raise InvalidRequestError(f"structural_tag: {key!r} of format must be true or false", _PARAM)
    if given.get("at_least_one"):  # which XGrammar has at the beginning
        given["structure_first"] = True
    return {"structures": structures, "triggers": tag.get("triggers"), **given}


def _read_tag(place: str, tag: Any) -> dict[str, Any]:
    """A structure, from one of XGrammar's tags."""
    _check_fields(place, tag, {"type", "begin", "content", "end"})
    content = tag.get("content")
    kind = content.get("type") if isinstance(content, Mapping) else None
    if tag.get("type", "tag") != "tag" or kind != "json_schema":
        raise InvalidRequestError(f"structural_tag: {place} must be a tag with content of type json_schema", _PARAM)
    _check_fields(f"{place}.content", content, {"type", "json_schema"})
    begin, end = tag.get("begin"), tag.get("end")
    if not isinstance(begin, str) or not isinstance(end, str):
        raise InvalidRequestError(f"structural_tag: 'begin' and 'end' of {place} must be texts", _PARAM)
    return {"begin": begin, "schema": content.get("json_schema"), "end": end}


def _check_fields(place: str, value: Any, known: set[str]) -> None:
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"structural_tag: {place} must be an object", _PARAM)
    if unknown := sorted(map(str, value.keys() - known)):
        raise InvalidRequestError(f"structural_tag: {place} has no field {unknown[0]!r:.60}", _PARAM)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_depth(name: str, value: Any) -> None:
    """Level by level, so that no nesting is too deep to be looked at."""
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, Mapping | list | tuple)]:
        depth += 1
        if depth > MAX_CONSTRAINT_DEPTH:
            raise InvalidRequestError(f"{name} is nested deeper than {MAX_CONSTRAINT_DEPTH} levels", _PARAM)
        level = [child for each in level for child in (each.values() if isinstance(each, Mapping) else each)]


def _close_objects(schema: Any) -> Any:
    """The schema with ``additionalProperties: false`` wherever properties are listed and nothing is said of others."""
    if isinstance(schema, list):
        return [_close_objects(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed = {name: _close_objects(each) for name, each in schema.items()}
    if isinstance(closed.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str) or not text:
        raise InvalidRequestError(f"{name} must be a text that is not empty, got {text!r:.60}", _PARAM)
    try:
        num_bytes = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{name} holds half of a surrogate pair, which is no character", _PARAM) from None
    if num_bytes > MAX_CONSTRAINT_BYTES:
        raise InvalidRequestError(f"{name} takes {num_bytes} bytes, the limit is {MAX_CONSTRAINT_BYTES}", _PARAM)


def _to_choices(value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_CHOICES:
        raise InvalidRequestError(f"choice must be a list of 1 to {MAX_CHOICES} texts, got {value!r:.60}", _PARAM)
    for each in value:
        if not isinstance(each, str) or not each:
            raise InvalidRequestError(f"choice must hold texts that are not empty, got {each!r:.60}", _PARAM)
    _check_text("choice", "".join(value))
    return list(value)

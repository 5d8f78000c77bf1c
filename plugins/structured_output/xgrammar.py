"""A second backend: XGrammar, pushdown automata over bytes with masks computed ahead for most of the vocabulary.

Its masks take less time. It passes over what it does not know of a schema, so that only keywords are let through that
were seen to hold; everything else is refused by name.
https://github.com/mlc-ai/xgrammar (Dong et al., 2024, arXiv:2411.15100)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xgrammar
from numpy.typing import NDArray

from quire.plugins.structured_output.json_schema import apply_defaults, prepare_schema, walk_schemas
from quire.sdk import (
    CompiledGrammar,
    GrammarState,
    InvalidRequestError,
    StructuredOutputBackend,
    StructuredOutputsParams,
    TokenizerInfo,
)

__all__ = ["XGrammarBackend"]

_KEYWORDS = frozenset(
    [
        *("type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "$ref"),
        *("minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    ]
)
_ANNOTATIONS = frozenset(
    (
        "$defs",
        "title",
        "description",
        "default",
        "examples",
        "$schema",
        "$comment",
        "deprecated",
        "readOnly",
        "writeOnly",
    )
)
_OF_TYPE = {
    **dict.fromkeys(("properties", "required", "additionalProperties"), "object"),
    **dict.fromkeys(("items", "minItems", "maxItems"), "array"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), "integer"),
}
_MAX_BLANKS = 40


class XGrammarBackend(StructuredOutputBackend):
    """Plain JSON schemas, regular expressions, choices and EBNF grammars."""

    @dataclass(frozen=True)
    class Options:
        """Options of the backend."""

        disable_any_whitespace: bool = False
        """As if every request said so."""

    def __init__(self, tokenizer: TokenizerInfo, options: Options | None = None) -> None:
        super().__init__(tokenizer, options)
        self._options = options or self.Options()
        fields = json.loads(tokenizer.tokenizer_json)
        vocab = dict(fields["model"]["vocab"]) | {t["content"]: t["id"] for t in fields.get("added_tokens") or ()}
        pieces = [""] * (1 + max(vocab.values()))
        for piece, token in vocab.items():
            pieces[token] = piece
        metadata = xgrammar.TokenizerInfo._detect_metadata_from_hf(tokenizer.tokenizer_json)
        self._info = xgrammar.TokenizerInfo(
            pieces[: tokenizer.vocab_size],
            metadata["vocab_type"],
            vocab_size=tokenizer.vocab_size,
            stop_token_ids=list(tokenizer.eos_token_ids),
            add_prefix_space=metadata["add_prefix_space"],
        )
        self._compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)

    @classmethod
    def validate_params(cls, params: StructuredOutputsParams) -> None:
        """Refuses keywords that are not known to hold, structural tags, reasoning and patterns of white space."""
        for name in ("structural_tag", "reasoning_end", "answer_begin", "whitespace_pattern"):
            if getattr(params, name) is not None:
                raise _refuse(name, "the backend xgrammar has no such thing; use llguidance")
        if params.kind == "json":
            for path, schema in walk_schemas(prepare_schema(params.load_json()), ""):
                if reason := _find_doubt(schema):
                    raise _refuse(f"json: {reason} at {path[:100] or '/'}", "xgrammar may not enforce it")

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """Compile, and begin an answer, which shows what no answer can match."""
        params = apply_defaults(params, self._options.disable_any_whitespace, close_objects=False)
        try:
            grammar = _Grammar(self._compile(params), frozenset(self.tokenizer.eos_token_ids))
            mask = np.zeros(-(-self.tokenizer.vocab_size // 32), np.int32)
            grammar.start().fill_mask(mask)
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise InvalidRequestError(f"{params.kind}: {text}", "structured_outputs") from None
        if not mask.any():
            raise InvalidRequestError(f"{params.kind}: no answer can match it", "structured_outputs")
        return grammar

    def _compile(self, params: StructuredOutputsParams) -> xgrammar.CompiledGrammar:
        if params.kind == "regex":
            return self._compiler.compile_regex(str(params.regex))
        if params.kind == "choice":
            return self._compiler.compile_grammar("root ::= " + " | ".join(map(json.dumps, params.choice or ())))
        if params.kind == "grammar":
            text = str(params.grammar)
            return self._compiler.compile_grammar(text) if "::=" in text else self._compiler.compile_lark(text)
        schema: Any = {"type": "object"} if params.kind == "json_object" else prepare_schema(params.load_json())
        layout: dict[str, Any] = {"any_whitespace": True, "max_whitespace_cnt": _MAX_BLANKS}
        if params.disable_any_whitespace:
            layout = {"any_whitespace": False, "separators": (", ", ": ")}
        return self._compiler.compile_json_schema(json.dumps(schema), strict_mode=False, **layout)


class _Grammar(CompiledGrammar):
    def __init__(self, compiled: xgrammar.CompiledGrammar, eos_token_ids: frozenset[int]) -> None:
        self._compiled = compiled
        self.num_bytes = (1 << 16) + int(compiled.memory_size_bytes)

    def start(self) -> GrammarState:
        return _State(xgrammar.GrammarMatcher(self._compiled))


class _State(GrammarState):
    def __init__(self, matcher: xgrammar.GrammarMatcher) -> None:
        self._matcher = matcher

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        if self._matcher.is_terminated():
            mask.fill(0)
        elif not self._matcher.fill_next_token_bitmask(mask[None]):
            mask.fill(-1)  # every token may come

    def advance(self, token_ids: Sequence[int]) -> int:
        for count, token in enumerate(token_ids):
            if self._matcher.is_terminated() or not self._matcher.accept_token(token):
                return count
        return len(token_ids)

    def rollback(self, num_tokens: int) -> None:
        if num_tokens:
            self._matcher.rollback(num_tokens)

    def forced_tokens(self, max_tokens: int) -> Sequence[int]:
        return ()


def _find_doubt(schema: dict[str, Any]) -> str:
    """What of one schema is not known to hold; empty if all is."""
    asserted = schema.keys() - _ANNOTATIONS
    if unknown := sorted(asserted - _KEYWORDS):
        return f"the keyword {unknown[0]!r}"
    for alone in ("anyOf", "$ref", "enum", "const"):
        if alone in asserted and len(asserted - {"type"}) > 1:
            return f"{alone!r} beside other keywords"
    if isinstance(schema.get("type"), list):
        return "several types"
    for keyword, kind in _OF_TYPE.items():
        if keyword in asserted and schema.get("type") != kind:
            return f"{keyword!r} without the type {kind!r}"
    if set(schema.get("required", ())) - set(schema.get("properties", ())):
        return "'required' with a name that is no property"
    if schema.get("properties") and schema.get("additionalProperties") is not False:
        return "'properties' without additionalProperties: false"  # a listed name would pass as another one
    if "$ref" in asserted and not str(schema["$ref"]).startswith("#/$defs/"):
        return f"the reference {schema['$ref']!r:.60}"
    values = [*schema.get("enum", ()), *([schema["const"]] if "const" in asserted else ())]
    if any(isinstance(value, list | dict) for value in values):
        return "an array or object as a constant"
    names = [*schema.get("properties", ()), *schema.get("required", ())]
    if not all(
        isinstance(name, str) and name and name.isprintable() and '"' not in name and "\\" not in name for name in names
    ):
        return "a name that is empty or has quotes"
    return ""


def _refuse(what: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"{what} is not supported: {why}", "structured_outputs")

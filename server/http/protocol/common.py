"""What request bodies have in common: the sampling fields of every generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, Strict

from quire.core.sampling_params import (
    MAX_BAD_WORDS,
    MAX_LOGPROB_TOKENS,
    MAX_LOGPROBS,
    MAX_NAMED_TOKENS,
    MAX_STOP_STRINGS,
    SamplingParams,
)
from quire.server.http.errors import ApiError
from quire.server.http.protocol.structured import STRUCTURED_FIELDS, read_structured_outputs

__all__ = [
    "FORMAT_FIELDS",
    "MAX_ITEMS",
    "MAX_REQUEST_ID_CHARS",
    "TOKEN_IDS_SCHEMA",
    "Body",
    "GenerationBody",
    "Int32",
    "StreamOptions",
    "UnsupportedField",
    "check_token_ids",
    "check_top_logprobs",
    "list_unknown_fields",
]

MAX_ITEMS = 4096
"""The most items of a list in a body, where no other limit is said: messages, parts, tools."""

MAX_REQUEST_ID_CHARS = 128
"""Of an id that a client gives its request."""


def _refuse_booleans(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number, not a boolean")
    return value


Int32 = Annotated[int, BeforeValidator(_refuse_booleans), Field(ge=-(2**31), lt=2**31)]
TokenKey = Annotated[Int32, Strict(False)]
"""A token as the key of a JSON object, which is text."""
Int64 = Annotated[int, BeforeValidator(_refuse_booleans), Field(ge=-(2**63), lt=2**63)]
Real = Annotated[FiniteFloat, BeforeValidator(_refuse_booleans)]


TOKEN_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31}}


FORMAT_FIELDS = ("name", "description", "schema", "strict")
"""What is said of a JSON schema that an answer has to match."""


def list_unknown_fields(place: str, value: Any, known: Sequence[str]) -> dict[str, list[str]]:
    """Those of an object at ``place`` that nothing reads, and the known ones beside each."""
    if not isinstance(value, Mapping):
        return {}
    beside = [f"{place}.{name}" for name in known]
    return {f"{place}.{name}": beside for name, each in value.items() if name not in known and each is not None}


def check_token_ids(ids: Any) -> Any:
    """Refuse with ValueError what is no list of token ids. Any list else is for the next validator to refuse."""
    if not isinstance(ids, list) or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < 2**31):
        return ids  # as most are, without Python code for each of what may be many
    for each in ids:
        if type(each) is not int or not 0 <= each < 2**31:
            raise ValueError(f"holds {each!r:.40}, which is not a token id")
    return ids


class Body(BaseModel):
    """A request body. Unknown fields are let through, and logged once; a number or a boolean is not taken from text."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    def unknown_fields(self) -> dict[str, list[str]]:
        """The fields that nothing reads, those of nested objects with their path, and the known ones beside each."""
        return {name: list(type(self).model_fields) for name in self.model_extra or {}}


@dataclass(frozen=True, slots=True)
class UnsupportedField:
    """A field of other servers that would change the answer. With a neutral value it asks for what is done anyway."""

    name: str
    remedy: str
    neutral_values: tuple[Any, ...] = ()

    def is_neutral(self, value: Any) -> bool:
        """Whether ``value`` changes nothing."""
        return value is None or value == [] or value in self.neutral_values


class StreamOptions(Body):
    """``stream_options``."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Every chunk says what was used so far, so that a stream that is cut can be billed."""


class GenerationBody(Body):
    """Sampling fields, with the names of the OpenAI and vLLM APIs. Null means the default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Int32 | None = None
    temperature: Real | None = None
    top_p: Real | None = None
    top_k: Int32 | None = None
    min_p: Real | None = None
    repetition_penalty: Real | None = None
    presence_penalty: Real | None = None
    frequency_penalty: Real | None = None
    logit_bias: dict[TokenKey, Real] | None = Field(None, max_length=MAX_NAMED_TOKENS)
    allowed_token_ids: list[Int32] | None = Field(None, max_length=MAX_NAMED_TOKENS)
    bad_words: list[str] | None = Field(None, max_length=MAX_BAD_WORDS)
    seed: Int64 | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_ITEMS)] | None = None
    stop_token_ids: list[Int32] | None = Field(None, max_length=MAX_NAMED_TOKENS)
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Int32 | None = None
    max_tokens: Int32 | None = None
    logprob_token_ids: list[Int32] | None = Field(None, max_length=MAX_LOGPROB_TOKENS)
    prompt_logprobs: Int32 | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Int32 | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Int32 | None = None
    group: str | None = None
    deadline_ms: Real | None = None
    ttft_target_ms: Real | None = None
    tpot_target_ms: Real | None = None
    predicted_tokens: Int32 | None = None
    tags: dict[str, str] | None = None
    metadata: dict[str, Any] | None = None
    extra_args: dict[str, Any] | None = None
    """What is said to plugins."""
    vllm_xargs: dict[str, Any] | None = None
    """The same by vLLM's name."""
    cache_salt: str | None = None
    request_id: str | None = Field(None, min_length=1, max_length=MAX_REQUEST_ID_CHARS, pattern=r"^[ -~]+$")
    """In place of a header ``X-Request-Id``, as vLLM takes it."""
    user: str | None = None
    response_format: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    structured_outputs: dict[str, Any] | None = None
    use_beam_search: bool | None = None

    @classmethod
    def unsupported_fields(cls) -> tuple[UnsupportedField, ...]:
        """Fields that would change the answer, and are refused."""
        return _UNSUPPORTED_FIELDS

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer comes with the log-probabilities of its tokens."""
        logprobs: int | bool | None = getattr(self, "logprobs", None)
        return logprobs is not None and logprobs is not False

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def unknown_fields(self) -> dict[str, list[str]]:
        """Those of ``stream_options`` and ``response_format`` too, without those that are refused."""
        refused = {field.name for field in self.unsupported_fields()}
        unknown = {name: known for name, known in super().unknown_fields().items() if name not in refused}
        if self.stream_options is not None:
            for name, known in self.stream_options.unknown_fields().items():
                unknown[f"stream_options.{name}"] = [f"stream_options.{each}" for each in known]
        form = self.response_format
        if form is not None and form.get("type") != "structural_tag":
            unknown |= list_unknown_fields("response_format", form, ("type", "json_schema"))
            unknown |= list_unknown_fields("response_format.json_schema", form.get("json_schema"), FORMAT_FIELDS)
        return unknown

    def build_sampling_params(self, defaults: Mapping[str, Any], **overrides: Any) -> SamplingParams:
        """The engine's parameters: ``defaults`` where the body says nothing; ``overrides`` win. Raises
        InvalidRequestError for values out of range."""
        values = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if self.extra_args or self.vllm_xargs:
            values["extra_args"] = {**(self.vllm_xargs or {}), **(self.extra_args or {})}
        structured = {name: getattr(self, name) for name in _STRUCTURED_FIELDS}
        if (constraint := read_structured_outputs(structured)) is not None:
            values["structured_outputs"] = constraint
        return SamplingParams(**{**defaults, **values, **overrides})

    def check_supported(self) -> None:
        """Raise ApiError for what Quire knows and cannot do yet: better than an answer that ignores it."""
        for field in self.unsupported_fields():
            if not field.is_neutral((self.model_extra or {}).get(field.name)):
                raise unsupported_error(field.name, field.remedy)
        if self.use_beam_search:
            raise unsupported_error("use_beam_search", "beam search is not supported; sample with n and best_of")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: allowed only with stream=true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise unsupported_error("prompt_logprobs", "not available in a stream; leave stream out")
        if self.logprob_token_ids and not self.wants_logprobs:
            raise ApiError(400, "logprob_token_ids: allowed only with logprobs", param="logprob_token_ids")
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOP_STRINGS:
            raise ApiError(400, f"stop: holds {len(self.stop)} strings, the limit is {MAX_STOP_STRINGS}", param="stop")
        if self.cache_salt == "":
            raise ApiError(400, "cache_salt: must not be empty; leave it out to share the cache", param="cache_salt")


_STRUCTURED_FIELDS = (
    *STRUCTURED_FIELDS, "response_format", "structured_outputs", "guided_whitespace_pattern", "guided_decoding_backend",
)  # fmt: skip
_TEXT_ONLY = "Quire takes and gives text only; leave it out"
_UNSUPPORTED_FIELDS = (
    UnsupportedField("length_penalty", "it belongs to beam search, which is not supported", (1.0,)),
    UnsupportedField("early_stopping", "it belongs to beam search, which is not supported", (False,)),
    UnsupportedField("prompt_embeds", "not supported; give text or token ids"),
    UnsupportedField("logits_processors", "code in requests is not run; write a plugin of the kind logits_processor"),
    UnsupportedField("audio", _TEXT_ONLY),
    UnsupportedField("modalities", _TEXT_ONLY, (["text"],)),
    UnsupportedField("web_search_options", "not supported; leave it out"),
    UnsupportedField("truncation_side", "prompts are cut at their beginning; leave it out", ("left",)),
    UnsupportedField("kv_transfer_params", "the KV cache stays on the device; leave it out", ({},)),
    UnsupportedField("include_reasoning", "leave out reasoning_content where it is read", (True,)),
    UnsupportedField("thinking_token_budget", "not supported; limit the answer with max_tokens"),
    UnsupportedField("repetition_detection", "not supported; give a stop string or a repetition_penalty"),
    UnsupportedField("extra_body", "an argument of OpenAI's client; write its fields beside the others", ({},)),
)
_SAMPLING_FIELDS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("allowed_token_ids", "bad_words", "logprob_token_ids"),
    *("logit_bias", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens"),
    *("prompt_logprobs", "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens"),
)


def check_top_logprobs(count: int | None, has_logprobs: bool, needed: str) -> None:
    """Raise ApiError unless ``top_logprobs`` may be ``count``. Without ``needed`` it is 0 at most."""
    if count and not has_logprobs:
        raise ApiError(400, f"top_logprobs: allowed only with {needed}", param="top_logprobs")
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        message = f"top_logprobs: must be between 0 and {MAX_LOGPROBS}, got {count}"
        raise ApiError(400, message, param="top_logprobs")


def unsupported_error(param: str, message: str) -> ApiError:
    """The error for a field that is known and not supported."""
    return ApiError(400, f"{param}: {message}", param=param, code="unsupported")

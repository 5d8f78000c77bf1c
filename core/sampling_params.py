"""Sampling parameters of one request."""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sized
from typing import Any

import msgspec

from quire.core.errors import InvalidRequestError
from quire.core.structured_outputs import StructuredOutputsParams

__all__ = ["MAX_LOGPROBS", "SamplingParams", "check_text", "to_integer"]

MAX_LOGPROBS = 20
"""The most alternatives a caller can ask for at a position, as in the OpenAI API."""
MAX_STOP_STRINGS, MAX_STOP_CHARS = 64, 4096
"""The most stop strings of a request, and the longest: they are searched for at every token."""
MAX_NAMED_TOKENS = 4096
"""The most token ids in ``stop_token_ids``, ``logit_bias`` and ``allowed_token_ids``, and of all ``bad_words``."""
MAX_LOGPROB_TOKENS = 128
"""The most ``logprob_token_ids``."""
MAX_BAD_WORDS, MAX_BAD_WORD_CHARS = 1024, 256
"""The most ``bad_words`` of a request, and the longest."""
MAX_EXTRA_ARGS_BYTES = 65_536
"""The size of ``extra_args``, of which each of the ``n`` continuations has a copy."""
_STRUCTURED = "structured_outputs"
_MIN_TEMPERATURE = 1e-5
"""A lower one is greedy: logits divided by it would leave the range of float32."""


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Sampling parameters, with the names and defaults of the OpenAI and vLLM APIs.

    A token is ``argmax(logits / temperature + Gumbel(seed, position))`` over the allowed tokens; temperature 0 is
    greedy, and so are ``top_p`` 0 and temperatures below 1e-5. Order: penalties, logits processors, temperature,
    min-p, top-k, top-p.

    Fields can be set one by one; they are checked again with each request, which keeps a copy.

    ``max_tokens=None`` means: until the context is full, where a larger ``max_tokens`` ends too. ``seed=None`` takes a
    fresh one. ``stop`` strings are cut from the text (unless ``include_stop_str_in_output``); ``stop_token_ids`` end a
    request like EOS does.
    ``add_special_tokens=False`` tokenizes a text without the tokens that the tokenizer adds, such as BOS.
    ``truncate_prompt_tokens=k`` keeps the last ``k`` tokens of a prompt, -1 as many as leave ``max_tokens`` free.
    ``structured_outputs`` says what the answer has to match (``guided_decoding`` is its name of vLLM until 0.11).
    ``logprobs=k`` returns the chosen token's log-probability and the ``k`` best, of the model's raw distribution; with
    ``logprob_token_ids`` it is these tokens in place of the best.

    ``allowed_token_ids`` are the only tokens that can be sampled: EOS is one of them only if it is named. ``bad_words``
    are never generated in the tokens that the tokenizer makes of them, alone and after a space; a model can still spell
    them in other pieces. ``bad_words_token_ids`` are such sequences of tokens, to which the engine adds ``bad_words``.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    bad_words_token_ids: list[list[int]] = []
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    extra_args: dict[str, Any] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    guided_decoding: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        """Converts numbers of numpy and the like, copies what can be changed, and refuses everything else by name."""
        for name, convert in _CONVERTERS.items():
            value = getattr(self, name)
            converted = convert(name, value)
            if converted is not value:
                setattr(self, name, converted)
        if self.guided_decoding is not None:
            if self.structured_outputs is not None:
                raise InvalidRequestError("structured_outputs and guided_decoding are the same; give one", _STRUCTURED)
            self.structured_outputs, self.guided_decoding = self.guided_decoding, None
        self._check_ranges()
        if self.top_p == 0.0 or 0.0 < self.temperature < _MIN_TEMPERATURE:
            self.temperature, self.top_p = 0.0, self.top_p or 1.0

    def clone(self) -> SamplingParams:
        """A copy that can be changed by itself, checked anew."""
        return msgspec.structs.replace(self)

    @property
    def greedy(self) -> bool:
        """Whether the argmax is taken without noise."""
        return self.temperature == 0.0

    def _check_ranges(self) -> None:
        _check_range("n", self.n, 1, 128)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        _check_range("top_k", self.top_k, 0, 2**31 - 1, "; 0 or -1 turns it off")
        _check_range("min_p", self.min_p, 0.0, 1.0)
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise InvalidRequestError(
                f"repetition_penalty must be in (0, 100], got {self.repetition_penalty}", "repetition_penalty"
            )
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, None)
        _check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_range(name, value, 0, MAX_LOGPROBS)
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens != -1:
            _check_range("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, None, "; -1 keeps what fits")
        if self.seed is not None:
            _check_range("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logit_bias:
            _check_range("logit_bias", min(self.logit_bias.values()), -100.0, 100.0)
            _check_range("logit_bias", max(self.logit_bias.values()), -100.0, 100.0)
        if self.logprob_token_ids is not None:
            _check_length("logprob_token_ids", self.logprob_token_ids, MAX_LOGPROB_TOKENS, "token ids")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError("allowed_token_ids is empty; name a token, or leave it out", "allowed_token_ids")
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=True; use stop_token_ids instead", "stop")


def to_integer(name: str, value: Any) -> int:
    """A whole number of 64 bits, as ``int``; what is none is refused."""
    if type(value) is int:
        number = value
    elif isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidRequestError(f"{name} must be a whole number, got {value!r:.60}", name)
    else:
        number = operator.index(value)
    if not -(2**63) <= number < 2**63:
        raise InvalidRequestError(f"{name} must be below 2**63, got {number}", name)
    return number


def check_text(name: str, text: Any, max_chars: int) -> None:
    """Refuse what is no string, is longer, or cannot be sent because it holds half of a surrogate pair."""
    if not isinstance(text, str):
        raise InvalidRequestError(f"{name} must be a string, got {text!r:.60}", name)
    if len(text) > max_chars:
        raise InvalidRequestError(f"{name} has {len(text)} characters, the limit is {max_chars}", name)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequestError(f"{name} holds half of a surrogate pair, which is no character", name) from None


def _to_optional_integer(name: str, value: Any) -> int | None:
    return None if value is None else to_integer(name, value)


def _to_top_k(name: str, value: Any) -> int:
    number = to_integer(name, value)
    return 0 if number == -1 else number


def _to_real(name: str, value: Any) -> float:
    real = math.nan
    if type(value) is float:
        real = value
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
            real = float(value)
    if not math.isfinite(real):
        raise InvalidRequestError(f"{name} must be a finite number, got {value!r:.60}", name)
    return real


def _to_boolean(name: str, value: Any) -> bool:
    if value is not True and value is not False:
        raise InvalidRequestError(f"{name} must be True or False, got {value!r:.60}", name)
    return value


def _to_stop_strings(name: str, value: Any) -> list[str]:
    return _to_strings(name, [value] if isinstance(value, str) else value, MAX_STOP_STRINGS, MAX_STOP_CHARS)


def _to_bad_words(name: str, value: Any) -> list[str]:
    words = _to_strings(name, value, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
    if not all(word.strip() for word in words):
        raise InvalidRequestError(f"{name} must hold more than spaces", name)
    return words


def _to_strings(name: str, value: Any, max_strings: int, max_chars: int) -> list[str]:
    strings = _to_list(name, value, max_strings, "strings")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InvalidRequestError(f"{name} must hold non-empty strings, got {string!r:.60}", name)
        check_text(name, string, max_chars)
    return strings


def _to_token_ids(name: str, value: Any) -> list[int]:
    return [to_integer(name, token) for token in _to_list(name, value, MAX_NAMED_TOKENS, "token ids")]


def _to_optional_token_ids(name: str, value: Any) -> list[int] | None:
    return None if value is None else _to_token_ids(name, value)


def _to_token_sequences(name: str, value: Any) -> list[list[int]]:
    sequences = [_to_token_ids(name, sequence) for sequence in _to_list(name, value, MAX_NAMED_TOKENS, "sequences")]
    if not all(sequences):
        raise InvalidRequestError(f"{name} must hold lists of token ids that are not empty", name)
    num_tokens = sum(map(len, sequences))
    if num_tokens > MAX_NAMED_TOKENS:
        raise InvalidRequestError(f"{name} hold {num_tokens} tokens together, the limit is {MAX_NAMED_TOKENS}", name)
    return sequences


def _to_logit_bias(name: str, value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{name} must map token ids to numbers, got {value!r:.60}", name)
    _check_length(name, value, MAX_NAMED_TOKENS, "token ids")
    return {to_integer(name, token): _to_real(name, bias) for token, bias in value.items()}


def _to_extra_args(name: str, value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InvalidRequestError(f"{name} must be a dict with names as keys, got {value!r:.60}", name)
    try:
        num_bytes = len(msgspec.msgpack.encode(value))
    except Exception as error:  # also what its objects raise
        raise InvalidRequestError(f"{name} must hold plain values that can be sent: {error}", name) from None
    if num_bytes > MAX_EXTRA_ARGS_BYTES:
        raise InvalidRequestError(f"{name} takes {num_bytes} bytes, the limit is {MAX_EXTRA_ARGS_BYTES}", name)
    return value


def _to_structured_outputs(name: str, value: Any) -> StructuredOutputsParams | None:
    if isinstance(value, dict):
        try:
            value = StructuredOutputsParams(**value)
        except TypeError as error:
            raise InvalidRequestError(f"{name}: {error}", name) from None
    if value is not None and not isinstance(value, StructuredOutputsParams):
        raise InvalidRequestError(f"{name} must be StructuredOutputsParams, got {value!r:.60}", name)
    return value


def _to_list(name: str, value: Any, limit: int, what: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise InvalidRequestError(f"{name} must be a list of {what}, got {value!r:.60}", name)
    _check_length(name, value, limit, what)
    return list(value)


def _check_length(name: str, value: Sized, limit: int, what: str) -> None:
    if len(value) > limit:
        raise InvalidRequestError(f"{name} holds {len(value)} {what}, the limit is {limit}", name)


def _check_range(name: str, value: float, low: float, high: float | None, hint: str = "") -> None:
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequestError(f"{name} must be {limit}, got {value}{hint}", name)


_CONVERTERS: Mapping[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("n", "min_tokens"), to_integer),
    **dict.fromkeys(
        ("max_tokens", "seed", "logprobs", "prompt_logprobs", "truncate_prompt_tokens"), _to_optional_integer
    ),
    **dict.fromkeys(("temperature", "top_p", "min_p"), _to_real),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), _to_real),
    **dict.fromkeys(("include_stop_str_in_output", "ignore_eos", "detokenize", "add_special_tokens"), _to_boolean),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), _to_boolean),
    "top_k": _to_top_k,
    "stop": _to_stop_strings,
    "stop_token_ids": _to_token_ids,
    **dict.fromkeys(("allowed_token_ids", "logprob_token_ids"), _to_optional_token_ids),
    "bad_words": _to_bad_words,
    "bad_words_token_ids": _to_token_sequences,
    "logit_bias": _to_logit_bias,
    "extra_args": _to_extra_args,
    "structured_outputs": _to_structured_outputs,
    "guided_decoding": _to_structured_outputs,
}
"""How each field is checked: to a value of its type, or ``InvalidRequestError``."""

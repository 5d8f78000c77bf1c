"""From what a caller gives to what the engine core takes: validate, tokenize, fan out."""

from __future__ import annotations

import itertools
import logging
import operator
import time
from collections.abc import Mapping, Sequence

import msgspec

from quire.core.adapters import AdapterRef
from quire.core.config import EngineConfig
from quire.core.contracts.logits_processor import LogitsProcessor
from quire.core.contracts.policy import BatchingPolicy
from quire.core.engine.prompts import Prompt
from quire.core.engine.tokenizer import Tokenizer
from quire.core.errors import ContextLengthError, InvalidRequestError, QuireError, RequestFailedError
from quire.core.messages import EngineCoreRequest
from quire.core.plugin.arguments import ArgumentChecker
from quire.core.plugin.quarantine import NEVER_CONTAINED, class_path
from quire.core.plugin.target import load_target
from quire.core.sampling_params import SamplingParams, check_text, to_integer
from quire.core.scheduling_params import SchedulingParams

__all__ = ["InputProcessor"]
_log = logging.getLogger("quire.engine")
_CUT_MARGIN_TOKENS = 256
_MAX_CONSTRAINT_BYTES = 1 << 20
_MAX_ID_CHARS = 512
"""The longest request id and cache salt."""


class InputProcessor:
    """Refuses what cannot be served before it reaches the engine core, naming the field."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_model_len: int,
        vocab_size: int,
        logits_processors: Sequence[type[LogitsProcessor]] = (),
        eos_token_ids: Sequence[int] = (),
        argument_checker: ArgumentChecker | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._logits_processors = list(logits_processors)
        self._argument_checker = argument_checker or ArgumentChecker(())
        self._eos_token_ids = self._find_eos_token_ids(eos_token_ids)
        self._core_request_ids = itertools.count(1)

    @classmethod
    def from_config(cls, config: EngineConfig, tokenizer: Tokenizer) -> InputProcessor:
        """For an engine: its limits, and the logits processors that may refuse parameters."""
        choices = config.plugins_of("logits_processor")
        logits_processors = [load_target(choice.target, LogitsProcessor) for choice in choices]
        policy = config.plugin("policy")
        plugins = [(choice.name, each) for choice, each in zip(choices, logits_processors, strict=True)]
        plugins.append((policy.name, load_target(policy.target, BatchingPolicy)))
        model = config.model
        return cls(
            tokenizer,
            model.max_model_len,
            model.vocab_size,
            logits_processors,
            model.eos_token_ids,
            ArgumentChecker(plugins),
        )

    def process_inputs(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        scheduling: SchedulingParams | None = None,
        adapter: AdapterRef | None = None,
    ) -> list[EngineCoreRequest]:
        """One core request for each of the ``n`` continuations; the later ones name the first as their parent.

        Their ``params`` are copies, checked anew: what the caller changes later has no effect. Raises
        ``InvalidRequestError``, whatever the arguments are. ``max_tokens`` is set, and cut to what the context holds.
        """
        params = self._copy_params(params)
        prompt_token_ids = self._encode_prompt(prompt, params)
        check_text("request_id", request_id, _MAX_ID_CHARS)
        if cache_salt is not None:
            check_text("cache_salt", cache_salt, _MAX_ID_CHARS)
        if params.bad_words:
            params = self._tokenize_bad_words(params)
        self._check_params(params)
        room = self.max_model_len - len(prompt_token_ids)
        if params.max_tokens is None or params.max_tokens > room:
            params = msgspec.structs.replace(params, max_tokens=room)
        priority = to_integer("priority", priority)
        if scheduling is not None:
            scheduling = _copy_scheduling(scheduling)
        arrival_ns = time.monotonic_ns()
        requests: list[EngineCoreRequest] = []
        for index in range(params.n):
            seed = None if params.seed is None else _wrap_seed(params.seed + index)
            child_params = params if params.n == 1 else msgspec.structs.replace(params, n=1, seed=seed)
            if index and child_params.prompt_logprobs is not None:
                child_params = msgspec.structs.replace(child_params, prompt_logprobs=None)
            requests.append(
                EngineCoreRequest(
                    request_id=next(self._core_request_ids),
                    prompt_token_ids=prompt_token_ids,
                    params=child_params,
                    arrival_ns=arrival_ns,
                    eos_token_ids=self._eos_token_ids,
                    priority=priority,
                    cache_salt=cache_salt,
                    parent_id=requests[0].request_id if index else None,
                    external_request_id=request_id,
                    scheduling=scheduling,
                    adapter=adapter,
                )
            )
        return requests

    def encode_prompt(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """The token ids that ``process_inputs`` makes of a prompt, and takes in its place. Raises
        ``InvalidRequestError``."""
        return self._encode_prompt(prompt, self._copy_params(params))

    def encode_text(self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Text to ids. A text that is too long is refused before it is tokenized whole: for a prompt, or where
        ``max_tokens`` says more."""
        num_tokens = self.tokenizer.find_excess(text, self.max_model_len - 1 if max_tokens is None else max_tokens)
        if num_tokens is not None:
            reason = f"{len(text)} characters, so at least {num_tokens} tokens"
            if max_tokens is not None:
                raise InvalidRequestError(f"the text has {reason}; at most {max_tokens} are taken at once", "prompt")
            raise ContextLengthError(
                self.max_model_len, f"However, the prompt has {reason}: shorten it or raise --max-model-len"
            )
        return self.tokenizer.encode(text, add_special_tokens)

    def _copy_params(self, params: SamplingParams) -> SamplingParams:
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"the parameters must be SamplingParams, got {params!r:.60}", "sampling_params")
        return params.clone()

    def _tokenize_bad_words(self, params: SamplingParams) -> SamplingParams:
        """Each as the tokenizer spells it at the beginning of a text, and after a space."""
        words = [word.lstrip(" ") for word in params.bad_words]
        sequences = self.tokenizer.encode_batch([*words, *(f" {word}" for word in words)], add_special_tokens=False)
        # A token that the model cannot sample ends nothing.
        known = [s for s in sequences if s and max(s) < self.vocab_size and s not in params.bad_words_token_ids]
        unique = list(dict.fromkeys(map(tuple, known)))
        try:
            return msgspec.structs.replace(
                params, bad_words_token_ids=[*params.bad_words_token_ids, *map(list, unique)]
            )
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error).replace("bad_words_token_ids", "bad_words"), "bad_words") from None

    def _count_kept_tokens(self, params: SamplingParams) -> int | None:
        """How many tokens at the end of a prompt ``truncate_prompt_tokens`` keeps; None: all."""
        if params.truncate_prompt_tokens == -1:
            return max(1, self.max_model_len - (params.max_tokens or 1))
        return params.truncate_prompt_tokens

    def _keep_end(self, prompt: str | Sequence[int], num_kept: int) -> str | Sequence[int]:
        """Enough of a prompt's end for ``num_kept`` tokens, so that what is cut off takes no time. Of a text some more
        than that: tokens near a cut differ from those of the whole text."""
        if not isinstance(prompt, str):
            return prompt[-num_kept:]
        return prompt[-(num_kept + _CUT_MARGIN_TOKENS) * self.tokenizer.max_token_chars :]

    def _encode_prompt(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        num_kept = self._count_kept_tokens(params)
        if num_kept is not None and isinstance(prompt, str | list | tuple):
            prompt = self._keep_end(prompt, num_kept)
        if isinstance(prompt, str):
            max_tokens = None if num_kept is None else 4 * len(prompt) + 16  # any number: the text is short enough
            prompt_token_ids = self._encode_prompt_text(prompt, params.add_special_tokens, max_tokens)
        else:
            prompt_token_ids = self._check_token_ids(prompt)
        if num_kept is not None:
            prompt_token_ids = prompt_token_ids[-num_kept:]
        self._check_length(prompt_token_ids, params)
        return prompt_token_ids

    def _encode_prompt_text(self, text: str, add_special_tokens: bool, max_tokens: int | None) -> list[int]:
        ids = self.encode_text(text, add_special_tokens, max_tokens)
        if ids and max(ids) >= self.vocab_size:
            # An added token for which the embedding was never enlarged: it would fail the step, or read other memory.
            unknown = next(token for token in ids if token >= self.vocab_size)
            raise InvalidRequestError(
                f"the prompt holds {self.tokenizer.convert_id_to_text(unknown)!r:.100}, which the tokenizer makes "
                f"token {unknown}; the model has tokens 0 to {self.vocab_size - 1}: leave it out of the prompt",
                "prompt",
            )
        return ids

    def _check_token_ids(self, ids: Sequence[int]) -> list[int]:
        if isinstance(ids, bytes | Mapping) or not hasattr(ids, "__len__") or not hasattr(ids, "__iter__"):
            raise InvalidRequestError(f"the prompt must be text or token ids, got {ids!r:.60}", "prompt")
        if len(ids) >= self.max_model_len:
            raise self._too_long_error(len(ids))  # before any of them is looked at
        token_ids = list(ids)
        # The common case in three passes without Python code for each token.
        if set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < self.vocab_size:
            return token_ids
        for i, token in enumerate(token_ids):
            if isinstance(token, bool) or not hasattr(token, "__index__") or not 0 <= token < self.vocab_size:
                raise InvalidRequestError(
                    f"prompt holds {token!r:.60}, which is no token id; ids go from 0 to {self.vocab_size - 1}",
                    "prompt",
                )
            token_ids[i] = operator.index(token)  # numpy's integers, for one
        return token_ids

    def _check_length(self, ids: list[int], params: SamplingParams) -> None:
        if not ids:
            raise InvalidRequestError("the prompt is empty; give at least one token", "prompt")
        if len(ids) >= self.max_model_len:
            raise self._too_long_error(len(ids))
        if params.min_tokens and len(ids) + params.min_tokens > self.max_model_len:
            raise ContextLengthError(
                self.max_model_len,
                f"However, min_tokens {params.min_tokens} after a prompt of {len(ids)} tokens exceeds it: lower "
                "min_tokens, shorten the prompt or raise --max-model-len",
                "min_tokens",
            )

    def _find_eos_token_ids(self, of_model: Sequence[int]) -> list[int]:
        """The tokenizer's own, and the model's: those that it can sample, as others would index past its logits."""
        own = self.tokenizer.eos_token_id
        eos_token_ids = list(dict.fromkeys([*([] if own is None else [own]), *of_model]))
        unknown = [token for token in eos_token_ids if not 0 <= token < self.vocab_size]
        if unknown:
            _log.warning("EOS tokens %s are not used: the model has tokens 0 to %d", unknown, self.vocab_size - 1)
        return [token for token in eos_token_ids if token not in unknown]

    def _too_long_error(self, num_tokens: int) -> ContextLengthError:
        return ContextLengthError(
            self.max_model_len,
            f"However, the prompt has {num_tokens} tokens, and at most {self.max_model_len - 1} can be prompt: "
            "shorten it or raise --max-model-len",
        )

    def _check_params(self, params: SamplingParams) -> None:
        for name, tokens in (
            ("stop_token_ids", params.stop_token_ids),
            ("logprob_token_ids", params.logprob_token_ids or ()),
        ):
            unknown = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
            if unknown is not None:
                raise InvalidRequestError(f"{name} names {unknown}; ids go from 0 to {self.vocab_size - 1}", name)
        self._argument_checker.check(params.extra_args)
        if params.structured_outputs is not None:
            _check_structured_outputs(params)
        for processor in self._logits_processors:
            try:
                processor.validate_params(params, self.vocab_size)
            except (*NEVER_CONTAINED, QuireError):
                raise
            except BaseException:
                name = class_path(processor)
                _log.exception("the logits processor %s raised in validate_params", name)
                raise RequestFailedError(f"the logits processor {name} failed; the server's log says how") from None


def _copy_scheduling(scheduling: SchedulingParams) -> SchedulingParams:
    if not isinstance(scheduling, SchedulingParams):
        raise InvalidRequestError(f"scheduling must be SchedulingParams, got {scheduling!r:.60}", "scheduling")
    return msgspec.structs.replace(scheduling)


def _check_structured_outputs(params: SamplingParams) -> None:
    for name in ("allowed_token_ids", "bad_words"):
        if getattr(params, name):
            raise InvalidRequestError(
                f"{name} cannot be combined with structured_outputs: nothing might be left to sample; give one of them",
                name,
            )
    num_bytes = params.n * len(msgspec.msgpack.encode(params.structured_outputs))
    if num_bytes > _MAX_CONSTRAINT_BYTES:
        raise InvalidRequestError(
            f"n={params.n} answers with structured_outputs of this size take {num_bytes} bytes, the limit is "
            f"{_MAX_CONSTRAINT_BYTES}",
            "n",
        )


def _wrap_seed(seed: int) -> int:
    """Keep a seed within 64 bits, signed."""
    return (seed + 2**63) % 2**64 - 2**63

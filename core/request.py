"""A request inside the engine core."""

from __future__ import annotations

import enum
import hashlib
from typing import TYPE_CHECKING, Any

from quire.core.messages import EngineCoreRequest, FinishReason, TokenLogprob
from quire.core.sampling_params import SamplingParams
from quire.core.scheduling_params import SchedulingParams
from quire.core.structured_output.request_grammar import RequestGrammar

if TYPE_CHECKING:
    from quire.core.contracts.policy_view import RequestInfo

__all__ = ["Request", "RequestStatus"]


class RequestStatus(enum.Enum):
    """WAITING -> RUNNING -> FINISHED, with RUNNING -> WAITING again on preemption."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """One sequence. Plugins read it; only the scheduler writes it.

    ``token_ids`` holds every token that the host knows: the prompt, then the generated ones. Tokens that are sampled on
    the device and not yet read back are counted in the scheduler's running batch while the request runs, and in
    ``num_in_flight_tokens`` while it waits after a preemption.
    """

    __slots__ = (
        "adapter",
        "adapter_slot",
        "arrival_ns",
        "block_hashes",
        "cache_salt",
        "external_request_id",
        "finish_reason",
        "first_scheduled_ns",
        "grammar",
        "group_index",
        "info",
        "max_total_tokens",
        "min_tokens",
        "num_cached_tokens",
        "num_in_flight_tokens",
        "num_preemptions",
        "params",
        "parent_id",
        "priority",
        "prompt_len",
        "prompt_logprobs",
        "queue_key",
        "request_id",
        "row",
        "scheduling",
        "seed",
        "status",
        "stop_reason",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, message: EngineCoreRequest, max_model_len: int) -> None:
        params = message.params
        self.request_id = message.request_id
        """Its number, which no other request of this engine ever has."""
        self.external_request_id = message.external_request_id
        """The caller's id; several requests may have the same."""
        self.params: SamplingParams = params
        self.token_ids: list[int] = list(message.prompt_token_ids)
        self.prompt_len = len(self.token_ids)
        limit = max_model_len if params.max_tokens is None else self.prompt_len + params.max_tokens
        self.max_total_tokens = min(limit, max_model_len)
        """Number of tokens, the prompt's included, at which the request ends with finish reason ``length``."""
        # A grammar ends with EOS, and nothing can follow.
        eos = () if params.ignore_eos and params.structured_outputs is None else message.eos_token_ids
        self.min_tokens = params.min_tokens if params.structured_outputs is None else 0
        """Generated tokens before which no stop token ends the request; masks see to it where there is a grammar."""
        self.stop_token_ids: frozenset[int] = frozenset((*eos, *params.stop_token_ids))
        self.arrival_ns = message.arrival_ns
        self.priority = message.priority
        self.cache_salt = message.cache_salt
        self.adapter = message.adapter
        """The adapter that changes the model for it; None: none does."""
        self.adapter_slot = -1
        """Where the workers keep the adapter, from its first grant on; -1 before that, and without an adapter."""
        self.scheduling = message.scheduling or _NO_SCHEDULING_PARAMS
        self.info: RequestInfo | None = None
        """What the policy is told of the request, once it was asked for a rank."""
        self.group_index = 0
        """Index of its group, where the policy divides requests into groups."""
        self.parent_id = message.parent_id
        self.seed = params.seed if params.seed is not None else _derive_seed(message)
        self.status = RequestStatus.WAITING
        self.row = -1
        """Row in the worker's request table while running, else -1."""
        self.num_in_flight_tokens = 0
        self.num_cached_tokens = 0
        """Tokens of the prompt that were cached (or shared with the parent) when it was first scheduled."""
        self.num_preemptions = 0
        self.first_scheduled_ns = 0
        """When it got its first grant, by ``time.monotonic_ns``; 0 before it."""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.queue_key: tuple[Any, ...] = ()
        """Place in the queue: the policy's key, then the number of its arrival. Kept through a preemption."""
        self.prompt_logprobs: list[TokenLogprob] | None = None
        """Gathered chunk by chunk, and sent with the first token; None: not asked for, or sent."""
        self.block_hashes: list[bytes] = []
        """Scratch space of the KV allocator: the hashes of this request's full blocks."""
        self.grammar: RequestGrammar | None = None
        """What its answer has to match, where it asks for structured output."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the host knows."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens that the host knows."""
        return len(self.token_ids) - self.prompt_len

    @property
    def extra_keys(self) -> tuple[str, ...]:
        """What besides tokens makes a cached prefix different: the salt, and the content of the adapter."""
        keys = () if self.cache_salt is None else (f"salt:{self.cache_salt}",)
        return keys if self.adapter is None else (*keys, f"adapter:{self.adapter.content_hash}")

    @property
    def skip_prefix_cache(self) -> bool:
        """Prompt log-probabilities need every prompt position computed."""
        return self.params.prompt_logprobs is not None

    def __repr__(self) -> str:
        return f"Request({self.request_id!r}, {self.status.value}, {self.num_tokens} tokens, row {self.row})"


_NO_SCHEDULING_PARAMS = SchedulingParams()


def _derive_seed(message: EngineCoreRequest) -> int:
    """The seed of a request that names none: spread over 63 bits, distinct for every request."""
    digest = hashlib.blake2b(f"{message.request_id}/{message.arrival_ns}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

"""What can be served: the limits of a request, checked once when it arrives, and the token budget of a step."""

from __future__ import annotations

from collections.abc import Sequence

from quire.core.config import SchedulerConfig
from quire.core.contracts.kv import KVAllocator, KVGroup
from quire.core.errors import ConfigError, InvalidRequestError, QueueFullError
from quire.core.messages import EngineCoreRequest
from quire.core.request import Request

__all__ = ["RequestLimits", "TokenBudget", "compute_max_held_tokens"]

_GROW_AFTER_STEPS = 64
"""Steps that must fit into memory before a halved budget is doubled again."""


class RequestLimits:
    """The limits that a request must respect to be accepted.

    Every accepted request can reach its end if it has the KV cache to itself. The scheduler's progress follows from
    that: whatever else is preempted, the running request that the policy ranked first never is.
    """

    def __init__(
        self, config: SchedulerConfig, allocator: KVAllocator, max_model_len: int, num_speculative_tokens: int = 0
    ) -> None:
        if not config.chunked_prefill and config.max_num_batched_tokens < max_model_len:
            raise ConfigError(
                f"max_num_batched_tokens={config.max_num_batched_tokens} cannot hold a prompt of max_model_len="
                f"{max_model_len} tokens; raise it, or turn chunked prefill on"
            )
        self._max_model_len = max_model_len
        self._max_queued = config.max_queued
        self._max_num_seqs = config.max_num_seqs
        self._block_size = allocator.block_size
        self._num_blocks = allocator.num_blocks - 1  # all but the null block
        self._max_held_tokens = compute_max_held_tokens(
            allocator.groups,
            allocator.block_size,
            max_model_len,
            config.max_num_batched_tokens,
            num_speculative_tokens,
        )

    def validate_request(self, message: EngineCoreRequest, num_waiting: int, num_running: int) -> Request:
        """The request, or ``InvalidRequestError`` with the numbers that forbid it (``QueueFullError`` if it could be
        served later)."""
        num_prompt_tokens, limit = len(message.prompt_token_ids), self._max_model_len
        if num_prompt_tokens == 0:
            raise InvalidRequestError("the prompt has 0 tokens; it needs at least one", "prompt")
        if num_prompt_tokens > limit - 1:
            raise InvalidRequestError(
                f"the prompt has {num_prompt_tokens} tokens, but with max_model_len={limit} at most {limit - 1} leave "
                "room for an answer; shorten it",
                "prompt",
            )
        request = Request(message, limit)
        self._check_blocks(request)
        if self._max_queued is not None:
            num_queued = num_waiting + num_running - self._max_num_seqs  # the others have a free row and enter soon
            if num_queued >= self._max_queued:
                raise QueueFullError(
                    f"{num_queued} requests are queued beside {self._max_num_seqs} that may run, and "
                    f"max_num_queued_requests={self._max_queued}; try again later"
                )
        return request

    def _check_blocks(self, request: Request) -> None:
        """The request must fit into the cache when it has it to itself. Its last token is never computed."""
        num_held_tokens = min(request.max_total_tokens - 1, self._max_held_tokens)
        num_blocks = -(-num_held_tokens // self._block_size)
        if num_blocks > self._num_blocks:
            raise InvalidRequestError(
                f"the request may grow to {request.max_total_tokens} tokens, which takes {num_blocks} KV blocks of "
                f"{self._block_size}, but the cache has {self._num_blocks}; lower max_tokens (or max_model_len), or "
                "give the cache more memory",
                "max_tokens",
            )


class TokenBudget:
    """Tokens that a step may compute: the configured number, halved when a step does not fit into the device's memory
    and doubled again after steps that fit. Without chunked prefill it always holds a whole prompt."""

    def __init__(self, config: SchedulerConfig, max_model_len: int) -> None:
        self.num_tokens = config.max_num_batched_tokens
        self.num_shrinks = 0
        self._max_tokens = config.max_num_batched_tokens
        self._chunked_prefill = config.chunked_prefill
        self._min_tokens = 1 if config.chunked_prefill else max_model_len
        self._num_fitting_steps = 0  # since the budget changed

    def limit_drafts(self, num_ready: int) -> int:
        """The budget that drafts may share with the tokens of running requests, while ``num_ready`` requests wait.
        Without chunked prefill there are no drafts while a prompt waits, because it must fit into a step whole."""
        return self.num_tokens if self._chunked_prefill or not num_ready else 0

    def record_fitting_step(self) -> None:
        """A step fitted into memory."""
        if self.num_tokens < self._max_tokens:
            self._num_fitting_steps += 1
            if self._num_fitting_steps >= _GROW_AFTER_STEPS:
                self.num_tokens, self._num_fitting_steps = min(2 * self.num_tokens, self._max_tokens), 0

    def shrink_budget(self, num_tokens: int) -> bool:
        """A step of ``num_tokens`` did not fit: allow half of it. False, and nothing changes, if that is less than a
        step must be able to compute."""
        half = min(num_tokens, self.num_tokens) // 2
        if half < self._min_tokens:
            return False
        self.num_tokens, self._num_fitting_steps = half, 0
        self.num_shrinks += 1
        return True


def compute_max_held_tokens(
    groups: Sequence[KVGroup],
    block_size: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    num_speculative_tokens: int,
) -> int:
    """The most tokens of which one request holds blocks at a time, in the group where these are most.

    Of a group without a window the whole context; else the window, what one step adds, the drafts of two steps in
    flight, of the step being built and of the proposer behind it, and the block that the window cuts in two.
    """
    windows = [max_model_len if group.window is None else group.window for group in groups]
    in_flight = max_num_batched_tokens + 4 * num_speculative_tokens
    return min(max(windows, default=0) + in_flight + block_size, max_model_len)

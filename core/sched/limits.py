"""What can be served at all: checked once, when a request arrives."""

from __future__ import annotations

from quire.core.config import SchedulerConfig
from quire.core.contracts.kv import KVAllocator
from quire.core.errors import ConfigError, InvalidRequestError, QueueFullError
from quire.core.messages import EngineCoreRequest
from quire.core.request import Request

__all__ = ["RequestLimits"]


class RequestLimits:
    """The limits of the engine, as a request meets them.

    Alone in the cache, every request that is let in can reach its end: that is what guarantees progress.
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
        self._block_size = allocator.block_size
        self._num_blocks = allocator.num_blocks - 1
        windows = [group.window or max_model_len for group in allocator.groups]
        in_flight = config.max_num_batched_tokens + 4 * num_speculative_tokens
        self._longest_span = max(windows) + in_flight + allocator.block_size

    def validate_request(self, message: EngineCoreRequest, num_queued: int) -> Request:
        """The request, or ``InvalidRequestError`` with the numbers that forbid it."""
        size, limit = len(message.prompt_token_ids), self._max_model_len
        if size == 0:
            raise InvalidRequestError("the prompt has 0 tokens; it needs at least one", "prompt")
        if size > limit - 1:
            raise InvalidRequestError(
                f"the prompt has {size} tokens, but with max_model_len={limit} at most {limit - 1} leave room for an "
                "answer; shorten it",
                "prompt",
            )
        request = Request(message, limit)
        self._check_blocks(request)
        if self._max_queued is not None and num_queued >= self._max_queued:
            raise QueueFullError(f"{num_queued} requests are queued and max_queued={self._max_queued}; try again later")
        return request

    def _check_blocks(self, request: Request) -> None:
        """Where every group has a window, no more is held at a time than the windows and what a step adds."""
        span = min(request.max_total_tokens - 1, self._longest_span)
        need = -(-span // self._block_size)
        if need > self._num_blocks:
            raise InvalidRequestError(
                f"the request may grow to {request.max_total_tokens} tokens, which takes {need} KV blocks of "
                f"{self._block_size}, but the cache has {self._num_blocks}; lower max_tokens (or max_model_len), or "
                "give the cache more memory",
                "max_tokens",
            )

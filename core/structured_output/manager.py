"""Structured output in the engine core: requests that wait for their grammar, and the masks of a step."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quire.core.config import EngineConfig
from quire.core.contracts.structured_output import CompiledGrammar, GrammarState, MaskRequest
from quire.core.errors import InvalidRequestError
from quire.core.messages import EngineCoreRequest, HostDraft, ModelRunnerOutput, SchedulerOutput, TokenMasks
from quire.core.plugin.quarantine import NEVER_CONTAINED
from quire.core.request import Request, RequestStatus
from quire.core.structured_output.compiler import GrammarCompiler, make_backend
from quire.core.structured_output.mask_filler import MaskFiller
from quire.core.structured_output.request_grammar import RequestGrammar
from quire.core.structured_outputs import StructuredOutputsParams

__all__ = ["PreparedRequest", "StepMasks", "StructuredOutputManager"]

_log = logging.getLogger("quire.structured_output")

_COMPILE_TIME_LIMIT_S = 10.0
"""Over HTTP a constraint has compiled within a second of processor time before it comes here; this is for the rest."""
_MASK_TIME_LIMIT_S = 5.0
"""Hundreds of times what the masks of a step take."""
_MIN_KEPT = 64


class PreparedRequest(NamedTuple):
    """A request whose constraint is compiled, or refused."""

    request: EngineCoreRequest
    state: GrammarState | None
    error: str | None


class StepMasks(NamedTuple):
    """What a step needs beside its model."""

    masks: TokenMasks | None
    failed: list[Request]
    """Requests whose grammar has failed; ``Request.grammar`` says why."""


class StructuredOutputManager:
    """Owns the grammars of an engine core. Called by its thread; compiling and filling masks have threads of their own.

    ``allocate_block`` makes a block (rows, words) that masks are written to: memory from which the workers can copy.
    They may do so until the step is read, so that every step in flight has a block of its own.
    """

    def __init__(self, config: EngineConfig, allocate_block: Callable[[int, int], NDArray[np.int32]]) -> None:
        self._compiler = GrammarCompiler(partial(make_backend, config), _COMPILE_TIME_LIMIT_S)
        self.engine_wait = self._compiler.engine_wait
        """In which the engine waits for a step."""
        self._filler: MaskFiller | None = None
        num_drafts = 0 if config.speculation is None else config.speculation.num_speculative_tokens
        shape = (config.scheduler.max_num_seqs * (1 + num_drafts), -(-config.model.vocab_size // 32))
        self._allocate_block = partial(allocate_block, *shape)
        self._blocks: deque[NDArray[np.int32]] = deque()  # the one that was written to longest ago first
        self._max_in_flight = config.parallel.max_in_flight_steps
        self._vocab_size = config.model.vocab_size
        self._waiting: list[tuple[EngineCoreRequest, Future[CompiledGrammar]]] = []  # in order of arrival
        self._requests: list[Request] = []
        self._num_kept = _MIN_KEPT  # of ``_requests``, until those that have finished are dropped
        self._num_masks = 0
        self._mask_seconds = 0.0

    # ---- Requests wait for their grammars.

    @property
    def num_waiting(self) -> int:
        """Requests whose constraint is being compiled."""
        return len(self._waiting)

    def prepare_request(self, request: EngineCoreRequest) -> None:
        """Begin to compile the request's constraint; ``take_prepared_requests`` gives it back."""
        assert request.params.structured_outputs is not None
        self._waiting.append((request, self._compiler.submit(request.params.structured_outputs)))

    def drop_waiting(self, request_id: int) -> bool:
        """Forget a request that waits. False if there is none."""
        count = len(self._waiting)
        self._waiting = [entry for entry in self._waiting if entry[0].request_id != request_id]
        return len(self._waiting) < count

    def take_prepared_requests(self) -> list[PreparedRequest]:
        """The requests that need not wait any longer, in order of arrival."""
        self._compiler.expire_slow_jobs()
        done = [entry for entry in self._waiting if entry[1].done()]
        if done:
            self._waiting = [entry for entry in self._waiting if not entry[1].done()]
        return [_prepare(request, future) for request, future in done]

    def compile_and_wait(self, params: StructuredOutputsParams) -> None:
        """Compile a constraint now, so that its requests need not wait. Raises ``InvalidRequestError``."""
        self._compiler.compile_and_wait(params)

    # ---- A step's masks.

    @property
    def num_requests(self) -> int:
        """Requests with a grammar that were in the scheduler lately: 0 if none is."""
        return len(self._requests)

    def attach_grammar(self, request: Request, state: GrammarState) -> None:
        """The request is in the scheduler: from now on its grammar follows its tokens."""
        request.grammar = RequestGrammar(state, request.token_ids, request.prompt_len)
        self._requests.append(request)
        if len(self._requests) > self._num_kept:
            self._requests = [each for each in self._requests if each.status is not RequestStatus.FINISHED]
            self._num_kept = 2 * len(self._requests) + _MIN_KEPT

    def has_grammar(self, step: SchedulerOutput, requests: NDArray[Any]) -> bool:
        """Whether a request that samples in the step has a grammar."""
        if all(request.status is RequestStatus.FINISHED for request in self._requests):
            self._requests.clear()
            return False
        return any(request.grammar is not None for request in requests[step.sampling_mask].tolist())

    def record_output(self, step: SchedulerOutput, requests: NDArray[Any], output: ModelRunnerOutput) -> None:
        """Note which drafts a step left on the device, for the masks of the step that verifies them."""
        if output.draft_token_ids is None:
            return
        for index in step.sampling_mask.nonzero()[0].tolist():
            if (grammar := requests[index].grammar) is not None:
                drafts = output.draft_token_ids[index].tolist()
                grammar.device_draft_token_ids = drafts[: drafts.index(-1)] if -1 in drafts else drafts

    def begin_catch_up(self) -> None:
        """The engine waits for the tokens that the next masks follow from: grammars may catch up meanwhile."""
        if self._filler is not None:
            self._filler.begin_catch_up()

    def make_masks(self, step: SchedulerOutput, requests: NDArray[Any]) -> StepMasks:
        """The masks of a step. Every step before it has been read: the host knows every token."""
        start = time.perf_counter()
        host_drafts = {draft.row: draft for draft in step.host_drafts}
        mask_requests: list[MaskRequest] = []
        owners: list[int] = []  # index into the step's requests
        failed: list[Request] = []
        num_rows = 0
        sampling = step.sampling_mask.nonzero()[0]
        numbers_of_drafts = None if step.num_draft_tokens is None else step.num_draft_tokens[sampling].tolist()
        in_step: list[Request] = requests[sampling].tolist()
        for place, (index, request) in enumerate(zip(sampling.tolist(), in_step, strict=True)):
            grammar = request.grammar
            if grammar is None or request.status is not RequestStatus.RUNNING:
                continue
            if not grammar.catch_up():
                failed.append(request)
                continue
            drafts: Sequence[int] = ()
            if numbers_of_drafts is not None and (num_drafts := numbers_of_drafts[place]):
                drafts = self._find_drafts(request, host_drafts.get(request.row))[:num_drafts]
            mask_requests.append(MaskRequest(grammar.state, num_rows, drafts))
            owners.append(index)
            num_rows += 1 + len(drafts)
        masks = None
        if mask_requests:
            masks, more = self._fill_masks(mask_requests, owners, requests, num_rows)
            failed += more
        self._num_masks += num_rows
        self._mask_seconds += time.perf_counter() - start
        return StepMasks(masks, failed)

    def stats(self) -> dict[str, float]:
        """Counters, by the names of ``quire.core.stats.ENGINE_STATS``."""
        compiled = self._compiler.stats
        return {
            "structured_output_compilations_total": float(compiled.num_compiled),
            "structured_output_compile_seconds_total": compiled.compile_seconds,
            "structured_output_cache_hits_total": float(compiled.num_cache_hits),
            "structured_output_refused_total": float(compiled.num_refused),
            "structured_output_masks_total": float(self._num_masks),
            "structured_output_mask_seconds_total": self._mask_seconds,
        }

    def shutdown(self) -> None:
        """End the threads that can be ended."""
        self._compiler.shutdown()
        if self._filler is not None:
            self._filler.shutdown()

    def _fill_masks(
        self, mask_requests: list[MaskRequest], owners: list[int], requests: NDArray[Any], num_rows: int
    ) -> tuple[TokenMasks | None, list[Request]]:
        if self._filler is None:
            self._filler = MaskFiller(self._compiler.get_backend(), _MASK_TIME_LIMIT_S)
        num_lost = self._filler.num_lost_threads
        block = self._blocks.popleft() if len(self._blocks) == self._max_in_flight else self._allocate_block()
        bits = block[:num_rows]
        bits.fill(-1)
        failures = self._filler.fill_masks(mask_requests, bits)
        if self._filler.num_lost_threads > num_lost:
            # A call that hangs may write again at any time: it keeps the block, and what is right is copied.
            bits = bits.copy()
        else:
            self._blocks.append(block)
        failed: list[Request] = []
        for index, reason in failures.items():
            request: Request = requests[owners[index]]
            assert request.grammar is not None
            request.grammar.error = reason
            failed.append(request)
            first = mask_requests[index].first_row
            bits[first : first + 1 + len(mask_requests[index].draft_token_ids)] = -1
        for mask_request, owner in zip(mask_requests, requests[owners].tolist(), strict=True):
            if owner.params.min_tokens:
                _forbid_early_end(mask_request, owner, bits)
        first_rows = np.array([mask_request.first_row for mask_request in mask_requests], np.int32)
        counts = np.diff(first_rows, append=num_rows)
        return TokenMasks(
            request_indices=np.repeat(np.array(owners, np.int32), counts),
            draft_offsets=np.arange(num_rows, dtype=np.int32) - np.repeat(first_rows, counts),
            bits=bits,
        ), failed

    def _find_drafts(self, request: Request, host_draft: HostDraft | None) -> Sequence[int]:
        """The drafts that the device has for the request: those that it proposed, or what is left of the host's."""
        if host_draft is None:
            assert request.grammar is not None
            return request.grammar.device_draft_token_ids
        # As ``RequestTable.place_host_drafts``: some of them were sampled since, or contradicted.
        sampled = request.token_ids[host_draft.base_len :]
        if host_draft.token_ids[: len(sampled)] != sampled[: len(host_draft.token_ids)]:
            return ()
        drafts = host_draft.token_ids[len(sampled) :]
        num_valid = next((i for i, token in enumerate(drafts) if not 0 <= token < self._vocab_size), len(drafts))
        return drafts[:num_valid]


def _prepare(request: EngineCoreRequest, future: Future[CompiledGrammar]) -> PreparedRequest:
    try:
        return PreparedRequest(request, future.result().start(), None)
    except InvalidRequestError as error:
        return PreparedRequest(request, None, str(error))
    except NEVER_CONTAINED:
        raise
    except BaseException as error:
        _log.error("a grammar could not be started", exc_info=error)
        return PreparedRequest(request, None, "its grammar failed; the engine's log says why")


def _forbid_early_end(mask_request: MaskRequest, request: Request, bits: NDArray[np.int32]) -> None:
    """``min_tokens``: no stop token before so many tokens, wherever the grammar has another."""
    num_missing = request.params.min_tokens - request.num_output_tokens
    for row in range(mask_request.first_row, mask_request.first_row + len(mask_request.draft_token_ids) + 1):
        if num_missing <= 0:
            return
        without = bits[row].copy()
        words = without.view(np.uint32)
        for token in request.stop_token_ids:
            if 0 <= token < 32 * len(words):
                words[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
        if without.any():
            bits[row] = without
        num_missing -= 1

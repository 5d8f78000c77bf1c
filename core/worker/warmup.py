"""Warm-up: steps of every kind that traffic may bring, so that kernels are compiled and memory is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from quire.core.config import SchedulerConfig
from quire.core.messages import HostDraft, NewRequest, SchedulerOutput, TokenMasks
from quire.core.sampling_params import SamplingParams

__all__ = ["make_largest_step", "make_open_masks", "make_warmup_steps", "run_warmup"]

_GREEDY = SamplingParams(temperature=0, max_tokens=1)
_RANDOM = SamplingParams(temperature=1.0, top_p=0.9, top_k=10, min_p=0.01, max_tokens=1)
_UNFILTERED = SamplingParams(temperature=1.0, max_tokens=1)
_PENALIZED = [SamplingParams(temperature=t, frequency_penalty=0.5, max_tokens=1) for t in (0, 1.0)]
_LOGPROBS = SamplingParams(temperature=0, logprobs=1, prompt_logprobs=1, max_tokens=1)


def run_warmup(
    execute_step: Callable[[SchedulerOutput, TokenMasks | None], object],
    config: SchedulerConfig,
    max_model_len: int,
    query_lens: Sequence[int] = (),
    num_adapter_slots: int = 0,
    masked_vocab_size: int = 0,
    decode_sizes: Sequence[int] = (),
) -> None:
    """Launch ``make_warmup_steps``, one after another; where there are slots for adapters, again with adapters. With
    ``masked_vocab_size``, that of the logits, also some whose tokens are masked as by grammars."""
    for step in make_warmup_steps(config, max_model_len, query_lens, decode_sizes):
        execute_step(step, None)
    if masked_vocab_size:
        for step in _make_sampling_steps(config, max_model_len, query_lens):
            execute_step(step, make_open_masks(step, masked_vocab_size))
    if num_adapter_slots:
        for step in make_warmup_steps(config, max_model_len, query_lens, decode_sizes):
            execute_step(_use_adapters(step, num_adapter_slots), None)


def make_largest_step(config: SchedulerConfig, max_model_len: int, num_adapter_slots: int = 0) -> SchedulerOutput:
    """As many tokens and requests as a step may have, shared out evenly, all sampled with every filter, and each with
    an adapter where there are slots for some."""
    num_reqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    num_tokens = np.full(num_reqs, config.max_num_batched_tokens // num_reqs, dtype=np.int32)
    num_tokens[: config.max_num_batched_tokens - int(num_tokens.sum())] += 1
    return _use_adapters(_make_step(np.minimum(num_tokens, max_model_len - 1), _RANDOM), num_adapter_slots)


def make_warmup_steps(
    config: SchedulerConfig, max_model_len: int, query_lens: Sequence[int] = (), decode_sizes: Sequence[int] = ()
) -> Iterator[SchedulerOutput]:
    """Few and many tokens, prompts alone and beside decodes, greedy and random with and without filters; requests that
    verify drafts with each of ``query_lens`` tokens; penalties and log-probabilities. For engines without graphs also
    ``decode_sizes`` decodes, whose number attention chooses its tile by. Every step starts its rows anew.

    Where kernels are only compiled, no token is sampled: what indexes with one must find it zero.
    """
    max_tokens = min(config.max_num_batched_tokens, max_model_len - 1)
    yield make_largest_step(config, max_model_len)  # first, since attention over prompts takes longest to compile
    # Kernels are compiled for ranges of sizes and for sizes divisible by 16: some of each kind.
    for tokens in sorted({1, 2, 5, 8, 16, 17, 33, 64, 65, 128, 250, 513, 1024, max_tokens}):
        if tokens <= max_tokens:
            for params in (_GREEDY, _RANDOM):
                yield _make_step(np.array([tokens], dtype=np.int32), params)
            if config.max_num_seqs > 2 and tokens + 2 <= config.max_num_batched_tokens:
                yield _make_step(np.array([1, 1, tokens], dtype=np.int32), _RANDOM, num_decodes=2)
    yield from _make_verifying_steps(max_tokens, config.max_num_seqs, query_lens)
    for size in decode_sizes:
        if size <= config.max_num_batched_tokens:
            for max_seq_len in (1, 150, 256):  # block tables of one column, of 16, and of another number
                step = _make_step(np.ones(size, dtype=np.int32), _RANDOM, num_decodes=size)
                step.max_seq_len = min(max_seq_len, max_model_len)
                yield step
    for params in (_UNFILTERED, *_PENALIZED, _LOGPROBS):
        yield _make_step(np.array([min(20, max_tokens)], dtype=np.int32), params)
    yield make_largest_step(config, max_model_len)  # and last, since it leaves every row a few tokens long


def _make_sampling_steps(
    config: SchedulerConfig, max_model_len: int, query_lens: Sequence[int]
) -> Iterator[SchedulerOutput]:
    """One for each way in which tokens are sampled from changed logits, and one with as many rows as there may be."""
    max_tokens = min(config.max_num_batched_tokens, max_model_len - 1)
    yield from _make_verifying_steps(max_tokens, config.max_num_seqs, query_lens)
    for params in (_GREEDY, _RANDOM, _UNFILTERED):
        yield _make_step(np.array([min(20, max_tokens)], dtype=np.int32), params)
    yield make_largest_step(config, max_model_len)  # last, as above


def _make_verifying_steps(max_tokens: int, max_num_seqs: int, query_lens: Sequence[int]) -> Iterator[SchedulerOutput]:
    for query_len in query_lens:
        if max_num_seqs > 1 and query_len + 17 <= max_tokens:
            for params in (_GREEDY, _RANDOM):
                step = _make_step(np.array([query_len, 17], dtype=np.int32), params)
                step.num_draft_tokens = np.array([query_len - 1, 0], dtype=np.int32)
                step.host_drafts = [HostDraft(0, query_len, [0])]
                yield step


def make_open_masks(step: SchedulerOutput, vocab_size: int) -> TokenMasks:
    """Masks for all tokens that are sampled in ``step``, which allow every one."""
    num_drafts = np.zeros(len(step.rows), np.int32) if step.num_draft_tokens is None else step.num_draft_tokens
    counts = num_drafts + 1
    return TokenMasks(
        request_indices=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        draft_offsets=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        bits=np.full((int(counts.sum()), -(-vocab_size // 32)), -1, np.int32),
    )


def _use_adapters(step: SchedulerOutput, num_slots: int) -> SchedulerOutput:
    """``step`` with a slot for each request, in turns."""
    for request in step.new_requests if num_slots else ():
        request.adapter_slot = request.row % num_slots
    return step


def _make_step(num_tokens: NDArray[np.int32], params: SamplingParams, num_decodes: int = 0) -> SchedulerOutput:
    """Row ``i`` runs ``num_tokens[i]`` tokens from its first on. No block is assigned: all are written to the padding
    block."""
    return SchedulerOutput(
        step=-1,
        rows=np.arange(len(num_tokens), dtype=np.int32),
        num_scheduled_tokens=num_tokens,
        sampling_mask=np.ones(len(num_tokens), dtype=bool),
        num_decodes=num_decodes,
        total_num_scheduled_tokens=int(num_tokens.sum()),
        max_seq_len=int(num_tokens.max()),
        max_seq_lens=num_tokens,
        new_requests=[
            NewRequest(row, row, [0] * int(n), int(n), 0, params, seed=row) for row, n in enumerate(num_tokens)
        ],
    )

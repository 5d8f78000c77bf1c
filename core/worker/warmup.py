"""Steps that stand for every kind there will be, so that their kernels are compiled and their memory measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from quire.core.config import SchedulerConfig
from quire.core.messages import HostDraft, NewRequest, SchedulerOutput
from quire.core.sampling_params import SamplingParams

__all__ = ["make_largest_step", "make_warmup_steps"]

_GREEDY = SamplingParams(temperature=0, max_tokens=1)
_RANDOM = SamplingParams(temperature=1.0, top_p=0.9, top_k=10, min_p=0.01, max_tokens=1)
_PENALIZED = [SamplingParams(temperature=t, frequency_penalty=0.5, max_tokens=1) for t in (0, 1.0)]
_LOGPROBS = SamplingParams(temperature=0, logprobs=1, prompt_logprobs=1, max_tokens=1)


def make_largest_step(config: SchedulerConfig, max_model_len: int) -> SchedulerOutput:
    """As many tokens and requests as a step may have, all sampled with every filter."""
    num_reqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    share = np.full(num_reqs, config.max_num_batched_tokens // num_reqs, dtype=np.int32)
    share[: config.max_num_batched_tokens - int(share.sum())] += 1
    return _make_step(np.minimum(share, max_model_len - 1), _RANDOM)


def make_warmup_steps(
    config: SchedulerConfig, max_model_len: int, query_lens: Sequence[int] = ()
) -> Iterator[SchedulerOutput]:
    """Few and many tokens, prompts alone and beside decodes, greedy and sampled; requests that verify drafts, with so
    many tokens. Rows are used again and again.

    In the warm-up no token is sampled: what indexes with one must find it zero.
    """
    most = min(config.max_num_batched_tokens, max_model_len - 1)
    yield make_largest_step(config, max_model_len)  # first, since attention over prompts takes longest to compile
    for tokens in sorted({1, 2, 5, 8, 16, 17, 33, 64, 65, 128, 250, 513, 1024, most}):
        if tokens <= most:
            for params in (_GREEDY, _RANDOM):
                yield _make_step(np.array([tokens], dtype=np.int32), params)
            if config.max_num_seqs > 2 and tokens + 2 <= config.max_num_batched_tokens:
                yield _make_step(np.array([1, 1, tokens], dtype=np.int32), _RANDOM, num_decodes=2)
    for queries in query_lens:
        if config.max_num_seqs > 1 and queries + 17 <= most:
            for params in (_GREEDY, _RANDOM):
                step = _make_step(np.array([queries, 17], dtype=np.int32), params)
                step.num_draft_tokens = np.array([queries - 1, 0], dtype=np.int32)
                step.host_drafts = [HostDraft(0, queries, [0])]
                yield step
    for params in (*_PENALIZED, _LOGPROBS):
        yield _make_step(np.array([min(20, most)], dtype=np.int32), params)
    yield make_largest_step(config, max_model_len)  # and last, since it leaves every row a few tokens long


def _make_step(share: NDArray[np.int32], params: SamplingParams, num_decodes: int = 0) -> SchedulerOutput:
    """Every row runs its share from its first token on; block tables are all zeros: the padding block."""
    return SchedulerOutput(
        step=-1,
        rows=np.arange(len(share), dtype=np.int32),
        num_scheduled_tokens=share,
        sampling_mask=np.ones(len(share), dtype=bool),
        num_decodes=num_decodes,
        total_num_scheduled_tokens=int(share.sum()),
        max_seq_len=int(share.max()),
        max_seq_lens=share,
        new_requests=[NewRequest(row, "", [0] * int(n), int(n), 0, params, seed=row) for row, n in enumerate(share)],
    )

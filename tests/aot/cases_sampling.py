"""Cases of sampling and of the verification of drafts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from quire.core.contracts.sampler import SamplingTable
from quire.core.layers.parallel import TensorParallel
from quire.core.layers.vocab import VocabShard
from quire.core.sample.inputs import DraftSpans, PenaltyColumns, SamplingColumns
from quire.core.sample.kernels.argmax_kernel import launch_argmax
from quire.core.sample.kernels.forced_acceptance_kernel import launch_force_acceptance
from quire.core.sample.kernels.launch_sample import launch_sample
from quire.core.sample.kernels.logprobs_kernel import launch_logsumexp_and_rank
from quire.core.sample.kernels.penalties_kernel import launch_penalties
from quire.core.sample.kernels.token_mask_kernel import launch_token_masks
from quire.core.sample.kernels.verify_kernel import launch_place_drafts, launch_verify_drafts
from quire.core.sample.kernels.vocab_pick_kernel import PickWorkspace
from quire.core.sample.kernels.workspace import Workspace

__all__ = ["SAMPLING", "empty_sampling_table", "place_drafts", "verify_drafts"]

_CPU = torch.device("cpu")
_LONGS, _INTS, _FLOATS = partial(torch.zeros, dtype=torch.int64), partial(torch.zeros, dtype=torch.int32), torch.zeros


def empty_sampling_table() -> SamplingTable:
    return SamplingTable(_INTS(3, 64), _INTS(3), _FLOATS(3), _INTS(3), _FLOATS(3), _FLOATS(3), _LONGS(3))


def argmax(dtype: torch.dtype, vocab: int) -> None:
    logits, workspace = torch.zeros(2, vocab, dtype=dtype), Workspace(2, vocab, _CPU)
    launch_argmax(logits, workspace, _INTS(2), torch.arange(2), _INTS(3, 64), _INTS(3))


def random(dtype: torch.dtype, vocab: int, from_table: bool) -> None:
    columns = SamplingColumns(_FLOATS(3), _INTS(3), _FLOATS(3), _FLOATS(3), _LONGS(3), _INTS(3))
    table = (torch.arange(2), _INTS(3, 64)) if from_table else ()
    launch_sample(torch.zeros(2, vocab, dtype=dtype), columns, Workspace(2, vocab, _CPU), _INTS(2), *table)


def vocab_picks(random: bool, from_table: bool) -> None:
    vocab = VocabShard(128256, TensorParallel())
    columns = SamplingColumns(_FLOATS(3), _INTS(3), _FLOATS(3), _FLOATS(3), _LONGS(3), _INTS(3))
    workspace, rows = PickWorkspace(2, vocab, _CPU), torch.arange(2) if from_table else None
    thresholds = _FLOATS(2) if random else None
    workspace.pick(torch.zeros(2, 128256, dtype=torch.bfloat16), columns, thresholds, random=random, rows=rows)
    workspace.merge(vocab.parallel, _INTS(2), rows, empty_sampling_table() if from_table else None)


def penalties() -> None:
    columns = PenaltyColumns(_INTS(8, 64), _INTS(8), *(_FLOATS(8) for _ in range(3)))
    launch_penalties(torch.zeros(4, 151936), _LONGS(2), _LONGS(4), _INTS(4), 64, columns)


def token_masks(dtype: torch.dtype) -> None:
    launch_token_masks(torch.zeros(4, 151936, dtype=dtype), _INTS(4), _INTS(2, 4748))


def logprobs() -> None:
    launch_logsumexp_and_rank(torch.zeros(2, 151936, dtype=torch.bfloat16), _INTS(2))


def verify_drafts(max_len: int) -> None:
    launch_verify_drafts(_INTS(2 * max_len), _spans(max_len), empty_sampling_table(), _INTS(3), _INTS(3))


def force_acceptance(max_len: int) -> None:
    launch_force_acceptance(_INTS(2 * max_len), _spans(max_len), empty_sampling_table(), _INTS(3), 0.7)


def place_drafts(count: int, lengths: bool) -> None:
    table = empty_sampling_table()
    launch_place_drafts(_INTS(2, count), _INTS(2) if lengths else None, _LONGS(2), table, _INTS(3), 151936)


def _spans(max_len: int) -> DraftSpans:
    return DraftSpans(_LONGS(2), _LONGS(2), _LONGS(2), max_len)


SAMPLING: dict[str, Callable[[], None]] = {
    "argmax": partial(argmax, torch.bfloat16, 151936),
    "argmax-float32": partial(argmax, torch.float32, 50257),
    "sample-random": partial(random, torch.bfloat16, 151936, True),
    "sample-random-float32": partial(random, torch.float32, 128256, False),
    "vocab-picks": partial(vocab_picks, False, True),
    "vocab-picks-random": partial(vocab_picks, True, True),
    "vocab-picks-of-drafts": partial(vocab_picks, True, False),
    "penalties": penalties,
    "token-masks": partial(token_masks, torch.bfloat16),
    "token-masks-float32": partial(token_masks, torch.float32),
    "logprobs": logprobs,
    "verify-drafts": partial(verify_drafts, 5),
    "force-acceptance": partial(force_acceptance, 4),
    "place-drafts": partial(place_drafts, 4, True),
    "place-drafts-whole": partial(place_drafts, 8, False),
}

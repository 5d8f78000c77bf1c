"""What crosses to the ranks and back arrives as it was sent."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from quire.core.config import EngineConfig
from quire.core.messages import (
    BlockCopy,
    BlockDiff,
    HostDraft,
    LogprobRows,
    ModelRunnerOutput,
    NewRequest,
    SchedulerOutput,
    TokenMasks,
)
from quire.core.sampling_params import SamplingParams
from quire.core.stats import QuarantinedPlugin
from quire.core.worker.multiproc.messages import RankCodec, RunStep, SampleTokens, StartRank, StepDone


def ints(*values: int) -> Any:
    return np.array(values, np.int32)


STEP = SchedulerOutput(
    step=7,
    rows=ints(3, 1),
    num_scheduled_tokens=ints(1, 4),
    sampling_mask=np.array([True, False]),
    num_decodes=1,
    total_num_scheduled_tokens=5,
    max_seq_len=9,
    max_seq_lens=ints(9, 4),
    new_requests=[NewRequest(1, 5, [4, 5], 2, 0, SamplingParams(n=2, stop=["x"], seed=4), 2**63, frozenset({3}))],
    block_diffs=[BlockDiff(0, 1, 0, [5, 2])],
    block_copies=[BlockCopy(0, 1, 2)],
    freed_rows=[4],
    num_draft_tokens=ints(0, 3),
    host_drafts=[HostDraft(1, 2, [9])],
    num_tokens_to_propose=2,
    return_drafts=True,
    run_draft_prefill=False,
)
ROWS = LogprobRows(ints(1, 2).reshape(1, 2), np.array([[-0.5, -2]], np.float32), ints(1))
OUTPUT = ModelRunnerOutput(
    7, ints(4, 5).reshape(2, 1), ints(1, 0), ints(0, 2), {0: ROWS}, {1: ROWS}, 3.5,
    [QuarantinedPlugin("sampler", "s", "raised")], 1, ints(-1, 4).reshape(2, 1), True,
)  # fmt: skip


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and np.array_equal(one, other) and other.flags.writeable
    elif isinstance(one, SchedulerOutput | ModelRunnerOutput | LogprobRows | TokenMasks):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


def test_a_step_and_its_output() -> None:
    codec = RankCodec()
    told = codec.decode_to_rank(codec.encode(RunStep(3, STEP, "model")))
    assert isinstance(told, RunStep) and (told.number, told.stage) == (3, "model")
    assert_same(STEP, told.step)
    heard = codec.decode_from_rank(codec.encode(StepDone(3, OUTPUT)))
    assert isinstance(heard, StepDone)
    assert_same(OUTPUT, heard.output)


def test_masks_of_another_memory() -> None:
    codec = RankCodec()
    told = codec.decode_to_rank(codec.encode(SampleTokens(ints(0, 1), ints(0, 0), ints(*range(6)).reshape(3, 2))))
    assert isinstance(told, SampleTokens)
    assert_same(ints(*range(6)).reshape(3, 2), told.bits)


def test_the_configuration(llm: Any) -> None:
    codec = RankCodec()
    told = codec.decode_to_rank(codec.encode(StartRank(llm.config, "m:C", "INFO", "127.0.0.1", 5)))
    assert isinstance(told, StartRank) and isinstance(told.config, EngineConfig)
    assert replace(told.config, extra={}) == replace(llm.config, extra={}), "of what has no type, tuples are lists"


def test_what_cannot_be_sent_is_named() -> None:
    with pytest.raises(TypeError, match="cannot be sent a object"):
        RankCodec().encode(StepDone(1, object()))  # type: ignore[arg-type]

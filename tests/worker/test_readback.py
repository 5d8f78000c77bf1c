"""A step's results come home in the columns that the scheduler reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire.core.messages import SchedulerOutput
from quire.core.ops.pinned import reserve_pinned_memory
from quire.core.sample.logprobs import LogprobsTensors
from quire.core.stats import QuarantinedPlugin
from quire.core.worker.readback import Readback, StepTimer
from quire.core.worker.sampled_logprobs import SampledLogprobs
from quire.core.worker.sampling import SampledTokens

CPU = torch.device("cpu")


def make_step(samples: list[bool]) -> SchedulerOutput:
    ones = np.ones(len(samples), np.int32)
    rows = np.arange(len(samples), dtype=np.int32)
    return SchedulerOutput(7, rows, ones, np.array(samples, bool), 0, len(samples), 1, ones)


def read(samples: list[bool], sampled: SampledTokens | None, prompt: dict[int, LogprobsTensors] | None = None):
    readback = Readback(make_step(samples), sampled, prompt or {}, StepTimer(CPU))
    readback.num_compiled_kernels = 3
    assert readback.done()
    return readback.result()


def test_tokens_go_to_the_requests_that_sampled() -> None:
    plugin = QuarantinedPlugin("logits_processor", "x", "raised")
    sampled = SampledTokens(torch.tensor([40, 50], dtype=torch.int32), quarantined=[plugin])
    sampled.ran_draft_backfill = True
    result = read([False, True, True], sampled)
    assert result.step == 7
    assert result.sampled_token_ids.tolist() == [[0], [40], [50]]
    assert result.num_sampled_tokens.tolist() == [0, 1, 1]
    assert result.num_verified_drafts is None and result.logprobs == {} and result.prompt_logprobs == {}
    assert result.quarantined == [plugin] and result.ran_draft_backfill
    assert result.num_compiled_kernels == 3 and result.device_us > 0


def test_verified_drafts_are_unpacked() -> None:
    """Tokens appended, drafts verified, then the tokens."""
    packed = torch.tensor([[2, 1, 40, 41, 0], [1, 2, 50, 0, 0]], dtype=torch.int32)
    result = read([True, False, True], SampledTokens(packed))
    assert result.sampled_token_ids.tolist() == [[40, 41, 0], [0, 0, 0], [50, 0, 0]]
    assert result.num_sampled_tokens.tolist() == [2, 0, 1]
    assert result.num_verified_drafts is not None and result.num_verified_drafts.tolist() == [1, 0, 2]


def test_a_step_in_which_no_request_samples() -> None:
    result = read([False, False], None)
    assert result.sampled_token_ids.tolist() == [[0], [0]] and result.num_sampled_tokens.tolist() == [0, 0]


def test_each_request_gets_the_log_probabilities_that_it_asked_for() -> None:
    """All were gathered with the largest k; requests may have several rows, as with drafts."""
    ids = torch.arange(12, dtype=torch.int32).view(4, 3)
    tensors = LogprobsTensors(ids, -ids.float(), torch.arange(1, 5, dtype=torch.int32))
    requested = SampledLogprobs(np.array([0, 2, 2, 3]), np.array([1, 3, 3, 2], np.int32), tensors)
    sampled = SampledTokens(torch.zeros(4, dtype=torch.int32), requested)
    result = read([True, True, True, True], sampled, {1: tensors})
    assert list(result.logprobs) == [0, 2, 3]
    assert result.logprobs[0].token_ids.tolist() == [[0]]
    assert result.logprobs[2].token_ids.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert result.logprobs[2].ranks.tolist() == [2, 3]
    assert result.logprobs[3].logprobs.tolist() == [[-9, -10]]
    assert result.prompt_logprobs[1].token_ids.tolist() == ids.tolist()


@pytest.mark.gpu
def test_a_result_waits_for_its_own_step_alone() -> None:
    """Work that is queued behind a step does not delay its result, and its buffers are not used again under it."""
    reserve_pinned_memory()  # to pin memory waits for the device
    first, second = (torch.tensor([token], dtype=torch.int32, device="cuda") for token in (5, 6))
    torch.cuda.synchronize()
    readback = Readback(make_step([True]), SampledTokens(first), {}, StepTimer(first.device))
    later_timer = StepTimer(first.device)
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    later = Readback(make_step([True]), SampledTokens(second), {}, later_timer)
    assert readback.result().sampled_token_ids.tolist() == [[5]]
    assert readback.done() and not later.done()
    assert later.result().sampled_token_ids.tolist() == [[6]]
    assert later.result().device_us > 1e5 > readback.result().device_us

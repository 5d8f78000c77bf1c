"""Wrong executors and proposers, each caught by a named check that runs an engine on them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quire.core.plugin.target import load_target
from quire.core.testing.conformance import run_check
from quire.sdk import DeviceProposer, DraftTokens, HostProposer, ModelRunnerOutput

Uniproc = load_target("quire.core.worker.uniproc_executor:UniprocExecutor")
DraftModel = load_target("quire.plugins.spec_decode.draft_model:DraftModelProposer")
Suffix = load_target("quire.plugins.spec_decode.suffix:SuffixProposer")
TOKENS, STEPS = "check_tokens_are_those_of_transformers", "check_outputs_are_those_of_their_steps"


class StartsWithNone(Uniproc):
    """Has nothing to tell."""

    def start(self):
        super().start()


class RunsNothing(Uniproc):
    """Has no future."""

    def execute_step(self, step):
        super().execute_step(step)


class TellsOneBlockMore(Uniproc):
    """Its last block does not exist."""

    def start(self):
        return replace(super().start(), num_blocks=41)


class CopiesNoBlocks(Uniproc):
    """Continuations of one prompt write into each other's blocks."""

    def execute_step(self, step):
        step.block_copies.clear()
        return super().execute_step(step)


class IgnoresHostDrafts(Uniproc):
    """Verifies what lies in the table, not what was drafted."""

    def execute_step(self, step):
        return super().execute_step(replace(step, host_drafts=[]))


class Late(Uniproc):
    """Gives the result of the step before."""

    def execute_step(self, step):
        before, self._future = getattr(self, "_future", None), super().execute_step(step)
        return before or self._future


class NeverDone(Uniproc):
    """Is asked in vain."""

    def execute_step(self, step):
        future = super().execute_step(step)
        future.done = lambda: None
        return future


class CountsFromZero(Uniproc):
    """Numbers steps by itself."""

    def execute_step(self, step):
        return _Renumbered(super().execute_step(step))


class _Renumbered:
    def __init__(self, future):
        self.future, self.done = future, future.done

    def result(self) -> ModelRunnerOutput:
        return replace(self.future.result(), step=0)


class KeepsLogprobs(Uniproc):
    """Gives no log-probabilities."""

    def execute_step(self, step):
        return _WithoutLogprobs(super().execute_step(step))


class _WithoutLogprobs(_Renumbered):
    def result(self) -> ModelRunnerOutput:
        return replace(self.future.result(), logprobs={}, prompt_logprobs={})


class StopsOnce(Uniproc):
    """Cannot be stopped twice."""

    def shutdown(self):
        assert self._worker is not None
        super().shutdown()


class DraftsText(DeviceProposer):
    """Is asked for tokens, and answers with words."""

    def attach_target(self, target):
        pass

    def propose(self, rows, num_tokens, *, greedy=False):
        return "the cat sat on the mat"


class DraftsTheTable(DraftModel):
    """Reads its drafts into the target's own columns."""

    def propose(self, rows, num_tokens, *, greedy=False):
        drafts = super().propose(rows, num_tokens, greedy=greedy)
        self._target.table.token_ids[rows, self._target.table.num_tokens[rows].long() - 1] = drafts.token_ids[:, 0]
        return drafts


class WritesIntoTheTargetsCache(DraftModel):
    """Counts tokens that the target has not computed."""

    def observe_step(self, step):
        super().observe_step(step)
        self._target.num_computed_tokens.add_(1)


class TooManyRows(DraftModel):
    """Drafts for a request more."""

    def propose(self, rows, num_tokens, *, greedy=False):
        drafts = super().propose(rows, num_tokens, greedy=greedy)
        return DraftTokens(drafts.token_ids.repeat(2, 1))


class LearnsByHeart(Suffix):
    """Takes the request's tokens for its own."""

    def propose(self, request, num_tokens):
        request.token_ids.append(1)
        return super().propose(request, num_tokens)


class Verbose(HostProposer):
    """Drafts whatever it is asked for, and some more."""

    def propose(self, request, num_tokens):
        return [1] * (num_tokens + 1)


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (StartsWithNone, "check_start_tells_the_capacity"),
        (RunsNothing, TOKENS),
        (TellsOneBlockMore, "check_start_tells_the_capacity"),
        (CopiesNoBlocks, TOKENS),
        (IgnoresHostDrafts, "check_drafts_are_verified"),
        (Late, TOKENS),
        (NeverDone, STEPS),
        (CountsFromZero, STEPS),
        (KeepsLogprobs, "check_log_probabilities_come_back"),
        (StopsOnce, "check_shutdown_can_be_repeated"),
        (DraftsText, TOKENS),
        (DraftsTheTable, TOKENS),
        (WritesIntoTheTargetsCache, TOKENS),
        (TooManyRows, TOKENS),
        (LearnsByHeart, "check_request_is_not_changed"),
        (Verbose, "check_at_most_num_tokens_drafts"),
    ],
)
def test_a_fault_is_noticed(cls, check):
    result = run_check(cls, check)
    assert result.outcome == "failed", result

"""What requests say to plugins: typed, checked before they begin, and delivered to policies and logits processors."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from quire import LLM, SamplingParams
from quire.core.errors import RequestFailedError
from quire.core.plugin.arguments import ArgumentChecker, find_arguments_class, parse_arguments
from quire.core.testing.tiny_models import make_tiny_model
from quire.sdk import BatchingPolicy, InvalidRequestError, LogitsProcessor, PluginError


class Mood(enum.Enum):
    GLAD = 1
    SAD = 2


class Always(LogitsProcessor):
    """Samples one token, if the request names it."""

    @dataclass(frozen=True)
    class Arguments:
        token: int | None = None
        strength: float = 1e4
        mood: Mood = Mood.GLAD
        mode: Literal["add", "set"] = "add"
        tokens: tuple[int, ...] = ()
        table: dict[str, Any] | None = None
        on: bool = True
        note: str = ""

        def __post_init__(self) -> None:
            if self.note == "a bug of the plugin":
                raise KeyError("the secret is 4711")
            if self.strength <= 0:
                raise ValueError("strength must be above 0")

    def __init__(self, vocab_size: int, device: Any, options: Any = None) -> None:
        super().__init__(vocab_size, device, options)
        self.rows: dict[int, Any] = {}

    @classmethod
    def example_params(cls) -> SamplingParams:
        return SamplingParams(extra_args={"token": 5})

    def add_row(self, request: Any) -> bool:
        arguments = self.read_arguments(request.params)
        if arguments.token is None:
            return False
        self.rows[request.row] = arguments
        return True

    def remove_row(self, row: int) -> None:
        del self.rows[row]

    def apply(self, logits: Any, batch: Any) -> None:
        for i, row in enumerate(batch.rows):
            if row in self.rows:
                logits[i, self.rows[row].token] += self.rows[row].strength


class Backwards(BatchingPolicy):
    """The lowest rank that a request gives itself is the first."""

    @dataclass(frozen=True)
    class Arguments:
        rank: int = 0

    def admission_key(self, request: Any) -> tuple[int, int]:
        return (self.read_arguments(request).rank, request.arrival_ns)


def test_every_type_is_checked() -> None:
    given = {
        "token": 7, "strength": 2, "mood": "sad", "mode": "set", "tokens": [1, 2], "table": {"a": [1]}, "on": False,
        "note": "x", "rank": 3,
    }  # fmt: skip
    wanted = Always.Arguments(7, 2.0, Mood.SAD, "set", (1, 2), {"a": [1]}, False, "x")
    assert parse_arguments(Always, given) == wanted
    assert parse_arguments(Always, {"token": None}) == parse_arguments(Always, None) == Always.Arguments()
    assert parse_arguments(Backwards, given) == Backwards.Arguments(3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokn": 1}, "no plugin takes 'tokn'; did you mean token or tokens or on of always?"),
        ({"weather": 1}, "no plugin takes 'weather'; choose from token"),
        ({"token": "7"}, "token of always must be a whole number or null, got '7'"),
        ({"token": True}, "token of always must be a whole number"),
        ({"strength": "big"}, "strength of always must be a number, got 'big'"),
        ({"strength": -1}, "always refuses them: strength must be above 0"),
        ({"mood": "angry"}, "mood of always must be one of 'glad', 'sad', got 'angry'"),
        ({"mode": 1}, "mode of always must be one of 'add', 'set', got 1"),
        ({"tokens": [1, "2"]}, "tokens of always must be a list, each a whole number"),
        ({"table": [1]}, "table of always must be an object or null"),
        ({"on": 1}, "on of always must be true or false, got 1"),
        ({"note": 1}, "note of always must be a text"),
        ({"rank": 1.5}, "rank of backwards must be a whole number, got 1.5"),
    ],
)
def test_what_is_wrong_is_named_with_its_plugin(given: dict[str, Any], message: str) -> None:
    checker = ArgumentChecker([("always", Always), ("backwards", Backwards)])
    with pytest.raises(InvalidRequestError) as refused:
        checker.check(given)
    assert message in str(refused.value) and refused.value.param == "extra_args"


def test_without_plugins_nothing_is_taken() -> None:
    ArgumentChecker(()).check({})
    with pytest.raises(InvalidRequestError, match="none that is on takes arguments"):
        ArgumentChecker([("plain", BatchingPolicy)]).check({"token": 1})


def test_wrong_declarations_are_refused_at_start() -> None:
    class Thawed:
        @dataclass
        class Arguments:
            token: int = 0

    class Demanding:
        @dataclass(frozen=True)
        class Arguments:
            token: int

    with pytest.raises(PluginError, match=r"Arguments is not frozen"):
        find_arguments_class(Thawed)
    with pytest.raises(PluginError, match=r"Arguments.token has no default; most requests say nothing of it"):
        find_arguments_class(Demanding)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    made = LLM(
        model=str(make_tiny_model("llama", tmp_path_factory.mktemp("model"))),
        device="cpu",
        max_model_len=96,
        max_num_seqs=2,
        num_gpu_blocks_override=9,
        logits_processors=[Always],
        scheduling_policy=Backwards,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "adaptive": False},
    )
    yield made
    made.shutdown()


def test_each_request_has_its_own_through_forks_drafts_and_preemption(llm: LLM) -> None:
    before = llm.get_stats()["num_preemptions_total"]
    params = [SamplingParams(n=2, max_tokens=40, ignore_eos=True, extra_args={"token": 60 + i}) for i in range(4)]
    prompts = [{"prompt_token_ids": [5 + i] * 30} for i in range(4)]
    for i, output in enumerate(llm.generate(prompts, params)):
        assert [completion.token_ids for completion in output.outputs] == [[60 + i] * 40] * 2
    assert llm.get_stats()["num_preemptions_total"] > before
    assert llm.get_stats()["spec_decode_num_accepted_tokens_total"] > 0


def test_a_policy_ranks_by_what_requests_say(llm: LLM) -> None:
    prompts = [{"prompt_token_ids": [9, i]} for i in range(6)]
    params = [SamplingParams(max_tokens=4, extra_args={"rank": -i}) for i in range(6)]
    outputs = llm.generate(prompts, params)
    started = [output.metrics.scheduled_ts for output in outputs]
    # those of one step begin one after the other, but for the rounding of a sum
    assert all(later > earlier - 0.001 for later, earlier in itertools.pairwise(started)) and started[0] > started[-1]


def test_a_misspelling_runs_nothing(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="no plugin takes 'tokne'; did you mean"):
        llm.generate("a", SamplingParams(extra_args={"tokne": 1}))


def test_what_arguments_raise_of_their_own_is_for_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RequestFailedError, match="mine failed; the server's log says why") as failure:
        parse_arguments(Always, {"note": "a bug of the plugin"}, "mine")
    assert "4711" not in str(failure.value) and "4711" in caplog.text

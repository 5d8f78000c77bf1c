"""Logits that are NaN, or all minus infinity, end the request that they belong to, and no other."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.core.engine.llm_engine import LLMEngine
from quire.core.engine.step_health import StepHealth
from quire.core.errors import RequestFailedError
from quire.core.messages import EngineCoreOutput, EngineCoreOutputs
from quire.core.stats import StepFailure
from quire.core.structured_outputs import StructuredOutputsParams
from quire.plugins.attention.torch_sdpa import TorchSDPABackend
from quire.sdk import LogitsBatch, LogitsProcessor, NewRequest, Sampler

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
POISON, TRIGGER, FORBIDS_MARKS = 250, 77, 1e9
GRAMMAR = SamplingParams(temperature=1.75, structured_outputs=StructuredOutputsParams(choice=["qed"]), max_tokens=4)
CLEAN = [[5 + i, 6, 7, 8] * (3 + i) for i in range(3)]


class NaNForSome(LogitsProcessor):
    """Makes NaN of the logits of requests that say so, or forbids every token."""

    def add_row(self, request: NewRequest) -> bool:
        self.modes: dict[int, float] = getattr(self, "modes", {})
        modes = {1.5: float("nan"), 1.25: float("-inf"), 1.75: FORBIDS_MARKS}
        self.modes[request.row] = modes.get(request.params.temperature, 0.0)
        return self.modes[request.row] != 0

    def remove_row(self, row: int) -> None:
        del self.modes[row]

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        for i, row in enumerate(batch.rows):
            mode = self.modes.get(row, 0.0)
            if mode == FORBIDS_MARKS:
                logits[i, 100:] = float("-inf")
            else:
                logits[i] += mode


class NaNAttention(TorchSDPABackend):
    """Makes NaN of prompts of one length."""

    def run(self, layer: int, q: Any, kv: Any, out: Any, **options: Any) -> None:
        super().run(layer, q, kv, out, **options)
        if len(q) == TRIGGER:
            out.fill_(float("nan"))


class WrongTokens(Sampler):
    """Argmax, and for one prompt a token that there is not."""

    def sample(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        tokens = logits.argmax(-1).int()
        return torch.where(batch.temperature == 1.5, 1 << 20, tokens)


def poison_embedding(llm: Any) -> None:
    """Whatever reads the token becomes NaN."""
    weights = dict(llm.engine_core.executor.worker.model_runner.model.named_parameters())
    with torch.no_grad():
        next(weight for name, weight in weights.items() if "embed" in name)[POISON] = float("nan")


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[LLMEngine]:
    """Few tokens a step, so that prompts are computed in chunks, and few blocks, so that requests are preempted."""
    engine = LLMEngine.from_engine_args(
        _args(tiny, spec_method="ngram", max_num_batched_tokens=48, num_gpu_blocks_override=40, max_num_seqs=6)
    )
    poison_embedding(engine)
    yield engine
    engine.shutdown()


def _args(tiny: Path, **options: Any) -> Any:
    from quire.core.engine.args import EngineArgs

    return EngineArgs(model=str(tiny), device="cpu", max_model_len=256, **options)


def serve(engine: LLMEngine, requests: dict[str, tuple[list[int], SamplingParams]]) -> dict[str, Any]:
    """The tokens of each completion, or the error of a request."""
    answers: dict[str, Any] = {}
    for name, (prompt, params) in requests.items():
        engine.add_request(name, {"prompt_token_ids": prompt}, params, stream="final")
    while engine.has_unfinished_requests():
        processed = engine.process_step()
        answers |= {failed.request_id: failed.error for failed in processed.failed_requests}
        answers |= {out.request_id: [c.token_ids for c in out.outputs] for out in processed.request_outputs}
    return answers


def test_the_request_ends_and_others_have_the_tokens_that_they_have_alone(engine: LLMEngine) -> None:
    """Beside chunks of prompts, drafts, ``n``, log-probabilities, penalties and preemption."""
    prefix = list(range(20, 84))  # four blocks, which both share
    clean = {
        "prefix": ([*prefix, 9, 9], GREEDY),
        "n": (CLEAN[0], SamplingParams(temperature=0.9, seed=3, n=2, max_tokens=20, ignore_eos=True)),
        "logprobs": (CLEAN[1], SamplingParams(temperature=0, logprobs=2, max_tokens=30, ignore_eos=True)),
        "penalty": (CLEAN[2], SamplingParams(temperature=0, repetition_penalty=1.2, max_tokens=20, ignore_eos=True)),
    }
    bad = {
        "end": ([*prefix, POISON], GREEDY),
        "early": ([POISON, *prefix, *prefix], GREEDY),  # the first chunks sample nothing
        "random": ([POISON, 7], SamplingParams(temperature=1.0, seed=1, n=2)),
        "bad logprobs": ([8, POISON], SamplingParams(temperature=0, logprobs=3)),
    }
    alone = {}
    for name, request in clean.items():
        alone |= serve(engine, {name: request})
    together = serve(engine, {**bad, **clean})
    assert {name: together[name] for name in clean} == alone
    for name in bad:
        assert "every layer is bundled, so that the weights are at fault" in together[name], name
    stats = engine.get_stats()
    assert stats["kv_cache_usage_perc"] == 0 and stats["step_failures_total"] >= 1
    engine.engine_core.scheduler.debug_state().allocator.check_integrity()
    again = serve(engine, {"again": ([*prefix, 9, 9], GREEDY)})
    assert again["again"] == alone["prefix"]


def test_nothing_of_it_stays_in_the_prefix_cache(engine: LLMEngine) -> None:
    prompt = [POISON, *range(100, 164)]
    serve(engine, {"bad": (prompt, GREEDY)})
    weights = dict(engine.engine_core.executor.worker.model_runner.model.named_parameters())  # type: ignore[attr-defined]
    embedding = next(weight for name, weight in weights.items() if "embed" in name)
    saved, sound = embedding.data.clone(), embedding.data.clone()
    sound[POISON] = 0.01
    embedding.data.copy_(sound)
    try:
        answer = serve(engine, {"sound": (prompt, GREEDY)})
        assert isinstance(answer["sound"], list), "what a wrong model has computed was read again"
    finally:
        embedding.data.copy_(saved)


@pytest.mark.parametrize(
    ("plugins", "params", "prompt", "said"),
    [
        ({"attention_backend": NaNAttention}, GREEDY, [5] * TRIGGER, "at fault is attention/{here}:NaNAttention, or"),
        ({"logits_processors": [NaNForSome]}, 1.5, CLEAN[0], "logits_processor/{here}:NaNForSome left no token"),
        ({"logits_processors": [NaNForSome]}, 1.25, CLEAN[0], "logits_processor/{here}:NaNForSome left no token"),
        ({"logits_processors": [NaNForSome]}, GRAMMAR, CLEAN[0], "constraints together leave no token"),
        ({"sampler": WrongTokens}, 1.5, CLEAN[0], "sampler/{here}:WrongTokens returned a token that is not in"),
    ],
    ids=["attention", "processor-nan", "processor-masks", "grammar", "sampler"],
)
def test_the_plugin_is_named(
    tiny: Path, plugins: dict[str, Any], params: Any, prompt: list[int], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    if not isinstance(params, SamplingParams):
        params = SamplingParams(temperature=params, seed=1, max_tokens=4)
    llm = LLM(model=str(tiny), device="cpu", max_model_len=256, num_gpu_blocks_override=64, **plugins)
    try:
        with caplog.at_level(logging.ERROR), pytest.raises(RequestFailedError) as failure:
            llm.generate([prompt], params)
        assert said.format(here=__name__) in str(failure.value) and said.format(here=__name__) in caplog.text
        [output] = llm.generate([CLEAN[1]], GREEDY)
        assert len(output.outputs[0].token_ids) == 8 and llm.get_stats()["step_failures_total"] == 1
    finally:
        llm.shutdown()


def test_requests_that_leave_themselves_no_token_do_not_make_the_service_unhealthy(tiny: Path) -> None:
    """Whoever may send one could send three, and a load balancer would take the server from everybody."""
    llm = LLM(model=str(tiny), device="cpu", max_model_len=256, num_gpu_blocks_override=64)
    health = StepHealth(llm.config)
    eos = llm.llm_engine.input_processor.process_inputs("eos", [5], GREEDY)[0].eos_token_ids
    params = SamplingParams(temperature=0, max_tokens=8, min_tokens=4, allowed_token_ids=sorted(eos)[:1])
    for index in range(9):
        requests = llm.input_processor.process_inputs(str(index), [5, 6], params)
        llm.engine_core.add_request(requests[0])
        outputs = []
        while llm.engine_core.has_work:
            outputs.append(llm.engine_core.step())
        failures = [failure for each in outputs for failure in each.step_failures]
        assert failures == [StepFailure("request", "constraints")]
        for each in outputs:
            health.note_outputs(each)
    assert health.describe_failures() is None and health.find_fault() is None
    assert llm.get_stats()["step_failures_total"] == 9
    llm.shutdown()


def test_steps_that_fail_one_after_the_other_make_the_service_unhealthy(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("quire.core.engine.step_health.time.monotonic", lambda: now[0])
    health, failure = StepHealth(engine.config), StepFailure("attention", "some_backend")
    failed = EngineCoreOutputs([EngineCoreOutput(1, [], finish_reason="error")], step_failures=[failure])
    served = EngineCoreOutputs(request_ids=[2], new_token_ids=[5])
    for _ in range(2):
        health.note_outputs(failed)
        health.note_outputs(failed)
        assert health.describe_failures() is None
        health.note_outputs(served)
    for _ in range(3):
        health.note_outputs(failed)
        health.note_outputs(EngineCoreOutputs())
    assert health.describe_failures() == "the last 3 steps failed, in attention/some_backend; the engine's log says why"
    now[0] += 31
    assert health.describe_failures() is None, "requests may come again"
    health.note_outputs(failed)
    assert health.describe_failures() is not None
    health.note_outputs(served)
    assert health.describe_failures() is None

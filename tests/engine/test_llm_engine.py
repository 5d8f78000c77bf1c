"""What scripts that drive vLLM's ``LLMEngine`` step by step rely on, and the times in ``RequestOutput.metrics``."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from quire import LLM, AsyncLLM, EngineArgs, LLMEngine, RequestOutput, SamplingParams
from quire.core.errors import InvalidRequestError

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> LLMEngine:
    engine = LLMEngine.from_engine_args(EngineArgs(model=str(tiny), device="cpu", max_model_len=256))
    yield engine
    engine.shutdown()


def run(engine: LLMEngine) -> list[RequestOutput]:
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


def test_requests_come_while_others_run(engine: LLMEngine, llm: LLM) -> None:
    prompts = [f"prompt {i} says" for i in range(5)]
    waiting, finished = list(enumerate(prompts)), {}
    last_length: dict[str, int] = {}
    while waiting or engine.has_unfinished_requests():
        if waiting:
            number, prompt = waiting.pop(0)
            engine.add_request(str(number), prompt, GREEDY)
        for output in engine.step():
            assert output.request_id not in finished
            [completion] = output.outputs
            assert len(completion.token_ids) > last_length.get(output.request_id, 0), "all tokens so far"
            last_length[output.request_id] = len(completion.token_ids)
            if output.finished:
                finished[output.request_id] = output
    assert engine.get_num_unfinished_requests() == 0 and engine.step() == []
    for number, expected in enumerate(llm.generate(prompts, GREEDY)):
        output = finished[str(number)]
        assert (output.prompt, output.outputs[0].text) == (prompts[number], expected.outputs[0].text)


def test_deltas_and_whole_answers(engine: LLMEngine, llm: LLM) -> None:
    [expected] = llm.generate("hello", GREEDY)
    engine.add_request("delta", {"prompt": "hello"}, GREEDY, stream="delta")
    engine.add_request("final", engine.get_tokenizer().encode("hello"), GREEDY, stream="final", priority=1)
    outputs = run(engine)
    assert "".join(o.outputs[0].text for o in outputs if o.request_id == "delta") == expected.outputs[0].text
    [final] = [o for o in outputs if o.request_id == "final"]
    assert final.outputs[0].token_ids == expected.outputs[0].token_ids and final.finished


def test_aborted_requests_give_nothing_more(engine: LLMEngine) -> None:
    for name in "abc":
        engine.add_request(name, "x", GREEDY)
    engine.step()
    engine.abort_request("a")
    engine.abort_request(["b", "unknown"])
    outputs = run(engine)
    assert {output.request_id for output in outputs} == {"c"} and outputs[-1].finished
    engine.add_request("a", "x", GREEDY)
    assert run(engine)[-1].request_id == "a"


def test_what_cannot_be_served_is_refused_at_once(engine: LLMEngine) -> None:
    engine.add_request("used", "x", GREEDY)
    for name, prompt, params in (
        ("used", "x", GREEDY),
        ("new", "x" * 9999, GREEDY),
        ("new", "x", None),
        (7, "x", GREEDY),
    ):
        with pytest.raises(InvalidRequestError):
            engine.add_request(name, prompt, params)
    assert engine.get_num_unfinished_requests() == 1
    assert run(engine)[-1].finished


def test_a_step_that_fails_ends_its_requests_alone(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = engine.engine_core.executor
    execute_step, failures = executor.execute_step, [RuntimeError("no such kernel")]

    def fail_once(step):
        if failures:
            raise failures.pop()
        return execute_step(step)

    monkeypatch.setattr(executor, "execute_step", fail_once)
    engine.add_request("hit", "x", SamplingParams(n=2, max_tokens=3))
    outputs = engine.step() + engine.step()
    engine.add_request("sound", "x", GREEDY)
    outputs += run(engine)
    ended = {output.request_id: [c.finish_reason for c in output.outputs] for output in outputs if output.finished}
    assert ended == {"hit": ["error", "error"], "sound": ["length"]}


def test_an_engine_beside_generate(llm: LLM) -> None:
    """``LLM`` shows its engine; ids that are taken by hand do not meet those of ``generate``."""
    assert llm.llm_engine.model_config.max_model_len == 256
    number = int(llm.generate("x", GREEDY)[0].request_id) + 1
    llm.llm_engine.add_request(str(number), "y", GREEDY)
    [output] = llm.generate("x", GREEDY)
    assert output.request_id != str(number) and output.outputs[0].token_ids
    run(llm.llm_engine)


def check_metrics(output: RequestOutput, before: float, num_tokens: int) -> None:
    metrics = output.metrics
    assert before - 1 <= metrics.arrival_time <= time.time()
    order = [
        metrics.queued_ts,
        metrics.scheduled_ts,
        metrics.first_token_ts,
        metrics.last_token_ts,
        metrics.finished_ts,
    ]
    assert order == sorted(order) and order[-1] <= time.monotonic()
    assert metrics.time_in_queue == pytest.approx(order[1] - order[0])
    assert metrics.first_token_latency == pytest.approx(order[2] - order[0])
    times = [metrics.first_scheduled_time, metrics.first_token_time, metrics.last_token_time, metrics.finished_time]
    assert [each - metrics.arrival_time for each in times] == pytest.approx(
        [each - order[0] for each in order[1:]], abs=1e-5
    )
    assert metrics.num_generation_tokens == num_tokens


@pytest.mark.parametrize("n", [1, 3])
def test_metrics_tell_when_things_happened(llm: LLM, n: int) -> None:
    before = time.time()
    params = SamplingParams(n=n, max_tokens=5, ignore_eos=True)
    for output in llm.generate(["a", "b"], params):
        check_metrics(output, before, 5 * n)
    one = SamplingParams(max_tokens=1)
    check_metrics(llm.generate("a", one)[0], before, 1)


def test_metrics_of_a_stream_are_filled_as_it_runs(tiny: Path) -> None:
    async def stream() -> list[RequestOutput]:
        engine = AsyncLLM(EngineArgs(model=str(tiny), device="cpu", max_model_len=256))
        try:
            await engine.start()
            outputs = []
            async for output in engine.generate("a", GREEDY):
                assert output.metrics.first_token_time is not None
                outputs.append(output)
            return outputs
        finally:
            await engine.shutdown()

    before = time.time()
    outputs = asyncio.run(stream())
    check_metrics(outputs[-1], before, 6)

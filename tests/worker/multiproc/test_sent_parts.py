"""Ranks that sent parts of a sum when the step fails: they send again, or end if they did not fail alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.core.errors import RequestFailedError, WorkerDiedError

pytestmark = pytest.mark.parallel

PROMPT = {"prompt_token_ids": list(range(20, 60))}
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture
def engine(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """Each prompt is computed, and long enough to be sent in parts."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sizes: dict[str, Any] = {"max_model_len": 64, "cpu_threads": 1, "tensor_parallel_size": 2, "dtype": "bfloat16"}
    llm = LLM(
        model=str(tiny),
        device="cpu",
        executor="rank_sends:SendingExecutor",
        enable_prefix_caching=False,
        step_timeout=30,
        **sizes,
    )
    yield llm
    llm.shutdown()


def call(engine: LLM, method: str, **arguments: Any) -> list[Any]:
    """Of every rank."""
    call_arguments = {"method": method, "arguments": arguments}
    results: list[Any] = engine.engine_core.control.call_method("collective_rpc", call_arguments)
    return results


def test_ranks_that_fail_alike_go_back_to_sending(engine: LLM) -> None:
    [expected] = engine.generate([PROMPT], GREEDY)
    [num_sent, other] = call(engine, "count_sent")
    assert num_sent == other > 0
    for _ in range(2):
        call(engine, "set_fault", fault="alike")
        with pytest.raises(RequestFailedError):
            engine.generate([PROMPT], GREEDY)
        call(engine, "set_fault", fault="")
        begun = call(engine, "count_sent")
        [output] = engine.generate([PROMPT], GREEDY)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert call(engine, "count_sent") == [count + num_sent for count in begun], "as many as at first"


def test_ranks_that_sent_different_parts_end(engine: LLM) -> None:
    """Their next sums would wait for each other."""
    engine.generate([PROMPT], GREEDY)
    call(engine, "set_fault", fault="differ")
    with pytest.raises(WorkerDiedError, match=r"left the others in step \d+, and other ranks did not: "):
        engine.generate([PROMPT], GREEDY)

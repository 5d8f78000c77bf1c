"""``AsyncLLM``: its engine core is a real process."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from quire import LLM, AsyncLLM, SamplingParams
from quire.core.engine import output_queue
from quire.core.engine.process import EngineProcess
from quire.core.errors import ConfigError, EngineDeadError, InvalidRequestError, QueueFullError, RequestFailedError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


async def last(engine: AsyncLLM, prompt, params: SamplingParams = GREEDY, **options):
    return [output async for output in engine.generate(prompt, params, **options)][-1]


async def idle(engine: AsyncLLM) -> None:
    """Wait until the engine reports an empty pool."""
    for _ in range(200):
        stats = engine.get_stats()
        if stats and stats["num_requests_running"] == 0 and stats["kv_cache_usage_perc"] == 0:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"the engine is not idle: {engine.get_stats()}")


def test_a_day_in_its_life(tiny: Path, llm: LLM) -> None:
    async def scenario() -> None:
        process = EngineProcess("cpu")
        limits = {"max_model_len": 256, "max_num_queued_requests": 80, "max_engine_restarts": 0}
        engine = AsyncLLM(model=str(tiny), device="cpu", process=process, **limits)
        with pytest.raises(EngineDeadError, match="not started"):
            await last(engine, [5])
        await engine.start()
        assert engine.is_ready
        assert "KV cache" in engine.ready_line
        prompts = [[5 + i, 6, 7, 8 + i] for i in range(20)]
        expected = [o.outputs[0] for o in llm.generate(prompts, GREEDY)]

        # many at once, in each streaming mode
        modes = ["delta", "cumulative", "final"]
        for mode in modes:
            texts = await asyncio.gather(*(_text(engine, p, mode) for p in prompts))
            assert texts == [e.text for e in expected]

        # closing the generator aborts
        stream = engine.generate([9, 9, 9], LONG, stream="delta")
        await anext(stream)
        await stream.aclose()
        await idle(engine)

        # so does abort(), and the caller hears of it
        task = asyncio.create_task(last(engine, [9, 9], LONG, request_id="victim"))
        await asyncio.sleep(0.01)
        with pytest.raises(InvalidRequestError, match="in use"):
            await last(engine, [5], request_id="victim")
        await engine.abort("victim")
        with pytest.raises(RequestFailedError, match="aborted"):
            await task
        await idle(engine)

        # bad input hurts no other request
        good = asyncio.create_task(last(engine, prompts[0]))
        with pytest.raises(InvalidRequestError, match="context"):
            await last(engine, [5] * 300)
        assert (await good).outputs[0].token_ids == expected[0].token_ids

        # a full queue refuses
        results = await asyncio.gather(*(last(engine, [5, i % 50], GREEDY) for i in range(600)), return_exceptions=True)
        assert any(isinstance(r, QueueFullError) for r in results)
        assert all(isinstance(r, QueueFullError) or len(r.outputs[0].token_ids) == 12 for r in results)
        await idle(engine)

        # the engine process dies: every caller is told
        task = asyncio.create_task(last(engine, [9, 9], LONG))
        await asyncio.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            await task
        assert engine.is_dead
        with pytest.raises(EngineDeadError):
            await last(engine, [5])
        await engine.shutdown()

    asyncio.run(scenario())


def test_a_caller_that_stops_reading_does_not_fill_the_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_queue, "MAX_UNREAD_OUTPUTS", 20)

    async def scenario() -> None:
        engine = AsyncLLM(model=str(tiny), device="cpu", max_model_len=256)
        await engine.start()
        stream = engine.generate([9, 9, 9], LONG, stream="delta")
        await anext(stream)
        assert len((await last(engine, [5])).outputs[0].token_ids) == 12, "others are served"
        await idle(engine)
        with pytest.raises(RequestFailedError, match="the answer was not read: 20 outputs waited"):
            await anext(stream)
        assert len((await last(engine, [5])).outputs[0].token_ids) == 12
        await engine.shutdown()

    asyncio.run(scenario())


def test_each_answer_of_a_request_may_be_as_far_unread(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_queue, "MAX_UNREAD_OUTPUTS", 20)

    async def scenario() -> None:
        engine = AsyncLLM(model=str(tiny), device="cpu", max_model_len=256)
        await engine.start()
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, n=4)
        stream = engine.generate([9, 9, 9], params, stream="delta")
        first = await anext(stream)
        await last(engine, [5])
        await idle(engine)
        outputs = [first, *[output async for output in stream]]
        assert sum(len(each.token_ids) for output in outputs for each in output.outputs) == 48
        assert len(outputs) > 21
        await engine.shutdown()

    asyncio.run(scenario())


async def _text(engine: AsyncLLM, prompt: list[int], mode: str) -> str:
    text = ""
    async for output in engine.generate(prompt, GREEDY, stream=mode):
        piece = output.outputs[0].text
        text = text + piece if mode == "delta" else piece
    return text


def test_a_failed_start_says_why(tiny: Path) -> None:
    async def scenario() -> None:
        engine = AsyncLLM(model=str(tiny), max_model_len=256, device="cpu", num_gpu_blocks_override=3)
        with pytest.raises(ConfigError, match="32"):
            await engine.start()

    asyncio.run(scenario())

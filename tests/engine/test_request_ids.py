"""Request ids are the caller's: whatever they are and however soon they return, no request gets another's tokens."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from quire import LLM, AsyncLLM, SamplingParams

SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
TWO = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, n=2)


async def token_ids(engine: AsyncLLM, prompt: list[int], params: SamplingParams, request_id: str) -> list[list[int]]:
    outputs = [output async for output in engine.generate(prompt, params, request_id)]
    return [each.token_ids for each in outputs[-1].outputs]


def test_ids_that_come_again_or_look_like_continuations(tiny: Path, llm: LLM) -> None:
    expected = llm.generate([[5, 6, 7]], SHORT)[0].outputs[0].token_ids

    async def scenario() -> None:
        engine = AsyncLLM(model=str(tiny), max_model_len=256, device="cpu")
        await engine.start()
        for _ in range(4):
            old = engine.generate([9, 9, 9, 9], LONG, "again")
            await anext(old)
            time.sleep(0.05)  # the event loop is busy: outputs of the old request are on their way
            await old.aclose()
            assert await token_ids(engine, [5, 6, 7], SHORT, "again") == [expected]

        pending = [token_ids(engine, [5, 6, 7], SHORT, f"a#{i}") for i in range(3)]
        family = token_ids(engine, [5, 6, 7], TWO, "a")
        *others, both = await asyncio.wait_for(asyncio.gather(*pending, family), 60)
        assert others == [[expected]] * 3 and both == [expected] * 2
        await engine.shutdown()

    asyncio.run(scenario())

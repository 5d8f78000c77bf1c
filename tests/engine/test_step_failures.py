"""A step that fails names the plugin in whose code it failed: in the log, to callers and in the metrics."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, AsyncLLM, SamplingParams
from quire.core.errors import RequestFailedError
from quire.core.worker.uniproc_executor import UniprocExecutor
from quire.plugins.attention.torch_sdpa import TorchSDPABackend

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
TRIGGER = 77


class FailingAttention(TorchSDPABackend):
    """Fails for prompts of one length."""

    def run(self, layer: int, q: Any, *args: Any, **options: Any) -> None:
        if len(q) == TRIGGER:
            raise RuntimeError("the secret is 4711")
        super().run(layer, q, *args, **options)


class FailingExecutor(UniprocExecutor):
    """Raises by itself."""

    def execute_step(self, step: Any) -> Any:
        if step.total_num_scheduled_tokens == TRIGGER:
            raise RuntimeError("the secret is 4711")
        return super().execute_step(step)


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ({"attention_backend": FailingAttention}, f"attention/{__name__}:FailingAttention"),
        ({"executor": FailingExecutor}, f"executor/{__name__}:FailingExecutor"),
    ],
)
def test_the_plugin_is_named_and_the_exception_kept_for_the_log(
    tiny: Path, arguments: dict[str, Any], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    llm = LLM(model=str(tiny), device="cpu", max_model_len=256, **arguments)
    try:
        with caplog.at_level(logging.ERROR), pytest.raises(RequestFailedError) as failure:
            llm.generate([[5] * TRIGGER], PARAMS)
        assert f"failed in {place}; the engine's log says why" in str(failure.value)
        assert "4711" not in str(failure.value) and "4711" in caplog.text and f"failed in {place}" in caplog.text
        [output] = llm.generate([[5] * 9], PARAMS)
        assert len(output.outputs[0].token_ids) == 4
        assert llm.get_stats()["step_failures_total"] == 1
    finally:
        llm.shutdown()


def test_failures_are_counted_by_plugin_and_three_in_a_row_are_unhealthy(tiny: Path) -> None:
    async def run() -> str:
        llm = AsyncLLM(model=str(tiny), device="cpu", max_model_len=256, attention_backend=FailingAttention)
        try:
            await llm.start()
            for _ in range(3):
                assert llm.step_health.describe_failures() is None
                with pytest.raises(RequestFailedError, match="failed in attention/"):
                    async for _ in llm.generate({"prompt_token_ids": [5] * TRIGGER}, PARAMS):
                        pass
            assert "the last 3 steps failed, in attention/" in str(llm.step_health.describe_failures())
            async for _ in llm.generate({"prompt_token_ids": [5] * 9}, PARAMS):
                pass
            assert llm.step_health.describe_failures() is None
            return llm.render_metrics()[0].body.decode()
        finally:
            await llm.shutdown()

    text = asyncio.run(run())
    name = f'kind="attention",model_name="{tiny}",name="{__name__}:FailingAttention"'
    assert f"quire:step_failures_total{{{name}}} 3.0" in text

"""A step that fails names the plugin in whose code it failed: in the log, to callers and in the metrics."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from quire import LLM, AsyncLLM, SamplingParams
from quire.core.engine.args import EngineArgs
from quire.core.engine.config_builder import build_config
from quire.core.engine.restarts import EngineRestarter
from quire.core.engine.step_failures import StepFailures
from quire.core.engine.step_health import StepHealth
from quire.core.errors import RequestFailedError, WorkerError
from quire.core.messages import EngineCoreOutput, EngineCoreOutputs
from quire.core.ops.implementations import TorchOperations
from quire.core.sample.sampler import GumbelSampler
from quire.core.stats import StepFailure
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


class FailingOperation(TorchOperations):
    """Fails for prompts of one length."""

    def silu_and_mul(self, gate_up: Any, output_format: Any) -> Any:
        if len(gate_up) == TRIGGER:
            raise RuntimeError("the secret is 4711")
        return super().silu_and_mul(gate_up, output_format)


class OtherOperation(TorchOperations):
    """Another one."""


ATTENTION, OP = "attention/torch_sdpa", f"op/{__name__}:FailingOperation"


class FailingSampler(GumbelSampler):
    """Has no token of the vocabulary behind prompts of one length."""

    def sample(self, logits: Any, batch: Any) -> Any:
        return super().sample(logits, batch).masked_fill(batch.position == TRIGGER, 1_000_000)


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


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("attention", {"attention_backend": FailingAttention}),
        ("op", {"op": {"silu_and_mul": FailingOperation, "rms_norm": "torch"}}),
        ("sampler", {"sampler": FailingSampler}),
    ],
)
def test_failures_are_counted_and_a_plugin_that_keeps_failing_is_replaced(
    tiny: Path, kind: str, arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> str:
        llm = AsyncLLM(model=str(tiny), device="cpu", max_model_len=256, **arguments)
        try:
            await llm.start()
            for _ in range(3):
                assert llm.step_health.describe_failures() is None
                with pytest.raises(RequestFailedError, match=f"{kind}/{__name__}:Failing"):
                    async for _ in llm.generate({"prompt_token_ids": [5] * TRIGGER}, PARAMS):
                        pass
            assert f"the last 3 steps failed, in {kind}/" in str(llm.step_health.describe_failures())
            async for _ in llm.generate({"prompt_token_ids": [5] * 9}, PARAMS):
                pass
            assert llm.step_health.describe_failures() is None
            # Eight in a row: it is replaced, and the same request is served.
            for _ in range(8):
                with pytest.raises(RequestFailedError, match=f"{kind}/{__name__}:Failing"):
                    async for _ in llm.generate({"prompt_token_ids": [5] * TRIGGER}, PARAMS):
                        pass
            async with asyncio.timeout(90):
                while llm.get_stats().get("engine_restarts_total") != 1 or not llm.is_ready:
                    await asyncio.sleep(0.02)
            outputs = [output async for output in llm.generate({"prompt_token_ids": [5] * TRIGGER}, PARAMS)]
            assert len(outputs[-1].outputs[0].token_ids) == 4
            return (await llm.render_metrics())[0].body.decode()
        finally:
            await llm.shutdown()

    text = asyncio.run(run())
    cls = {"attention": FailingAttention, "op": FailingOperation, "sampler": FailingSampler}[kind]
    plugin = f"{__name__}:{cls.__name__}"
    assert f"{kind}/{plugin} is left out; " in caplog.text
    name = f'kind="{kind}",model_name="{tiny}",name="{plugin}"'
    assert f"quire:step_failures_total{{{name}}} 11.0" in text, "those that brought about another engine are counted"


@pytest.mark.parametrize(
    ("operations", "error_code", "place", "counted"),
    [
        ([FailingOperation], None, f"failed in attention/torch_sdpa, perhaps for what {OP} returned", OP),
        ([FailingOperation, OtherOperation], None, f"perhaps for what {OP} or op/{__name__}:OtherOperation", ATTENTION),
        ([FailingOperation], 700, f"failed in {ATTENTION};", ATTENTION),
        ([], None, f"failed in {ATTENTION};", ATTENTION),
    ],
)
def test_operations_are_suspects_where_a_bundled_layer_fails(
    tiny: Path, operations: list[Any], error_code: int | None, place: str, counted: str
) -> None:
    """Where there is one, it is counted; the failures of a device are of none."""
    chosen = dict(zip(("silu_and_mul", "rms_norm"), operations, strict=False))
    config = build_config(EngineArgs(model=str(tiny), device="cpu", op=chosen)).config

    def fail_step(step: Any, error: str) -> EngineCoreOutputs:
        errors.append(error)
        return EngineCoreOutputs([])

    errors: list[str] = []
    error = WorkerError("of another shape", ("attention", "torch_sdpa"), error_code)
    scheduler, step = SimpleNamespace(fail_step=fail_step), SimpleNamespace(step=3)
    outputs = StepFailures(config).fail_step(cast(Any, scheduler), cast(Any, step), error)
    assert place in errors[0] and [f"{f.kind}/{f.name}" for f in outputs.step_failures] == [counted]


@pytest.mark.parametrize(("kind", "can_be_replaced"), [("attention", True), ("model", False)])
def test_what_cannot_be_replaced_ends_the_service(tiny: Path, kind: str, can_be_replaced: bool) -> None:
    args = EngineArgs(model=str(tiny), device="cpu", attention_backend=FailingAttention)  # type: ignore[arg-type]
    config = build_config(args).config
    name = config.plugin("attention").name
    if kind == "model":
        choice = dataclasses.replace(config.plugin("model"), name=name, is_bundled=False)
        config = dataclasses.replace(config, plugins={**config.plugins, "model": choice})
    health, restarter = StepHealth(config), EngineRestarter(config, "INFO")
    failed = EngineCoreOutputs(
        [EngineCoreOutput(1, [], finish_reason="error")], step_failures=[StepFailure(kind, name)]
    )
    for _ in range(7):
        health.note_outputs(failed)
        assert health.find_fault() is None
    health.note_outputs(failed)
    fault = health.find_fault()
    assert fault is not None and f"8 steps in a row failed in {kind}/{name}" in fault.reason
    assert health.find_fault() is None, "it is told once"
    refusal = restarter.find_refusal(fault)
    if can_be_replaced:
        assert refusal is None and config.plugin("attention_fallback").name == "torch_sdpa"
    else:
        assert refusal is not None and "nothing can take its place" in refusal

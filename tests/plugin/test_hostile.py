"""Hostile plugins: the engine goes on or refuses them by name; other requests have the tokens that they have alone."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.plugin import hostile_plugins

from quire import AsyncLLM, SamplingParams
from quire.core.engine.args import EngineArgs
from quire.core.engine.llm_engine import LLMEngine
from quire.core.errors import PluginError, QuireError
from quire.core.testing.tiny_models import make_tiny_model

HERE = hostile_plugins.__name__
VICTIM = list(range(40, 40 + hostile_plugins.TRIGGER))
REQUESTS = {
    "greedy": ([5, 6, 7, 8] * 3, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)),
    "victim": (VICTIM, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)),
    "random": ([9, 8, 7] * 5, SamplingParams(temperature=0.9, seed=4, max_tokens=12, n=2, ignore_eos=True)),
    "like the victim": (VICTIM[:20], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)),
}
FAILS, SERVED = "fails", "served"
TABLE: dict[str, tuple[dict[str, Any], str, str]] = {
    # what it is: the engine's arguments, what becomes of the victim, and what names the plugin
    "AttentionRaises": ({"attention_backend": "{}"}, FAILS, "attention"),
    "AttentionExits": ({"attention_backend": "{}"}, FAILS, "attention"),
    "AttentionOfAnotherShape": ({"attention_backend": "{}"}, FAILS, "attention"),
    "AttentionOfNaN": ({"attention_backend": "{}"}, FAILS, "attention"),
    "AttentionChangesSettings": ({"attention_backend": "{}"}, SERVED, ""),
    "AttentionStartsThreads": ({"attention_backend": "{}"}, SERVED, ""),
    "AttentionKeepsTensors": ({"attention_backend": "{}"}, SERVED, ""),
    "AttentionRaisesAnUnreadableError": ({"attention_backend": "{}"}, FAILS, "attention"),
    "OperationOfNothing": ({"op": {"silu_and_mul": "{}"}}, FAILS, "op"),
    "OperationOfAnotherShape": ({"op": {"silu_and_mul": "{}"}}, FAILS, "op"),
    "Processor": ({"logits_processors": ["{}"]}, FAILS, "logits_processor"),
    "ProcessorOfTheWrongType": ({"logits_processors": ["{}"]}, FAILS, "logits_processor"),
    "ProcessorIsCancelled": ({"logits_processors": ["{}"]}, FAILS, "logits_processor"),
    "ProcessorOfNaN": ({"logits_processors": ["{}"]}, FAILS, "logits_processor"),
    "SamplerRaises": ({"sampler": "{}"}, SERVED, "sampler"),
    "SamplerOfTheWrongType": ({"sampler": "{}"}, SERVED, "sampler"),
    "SamplerOnAnotherDevice": ({"sampler": "{}"}, SERVED, "sampler"),
    "PolicyRaises": ({"scheduling_policy": "{}"}, SERVED, "policy"),
    "PolicyExits": ({"scheduling_policy": "{}"}, SERVED, "policy"),
    "PolicyIsCancelled": ({"scheduling_policy": "{}"}, SERVED, "policy"),
    "PolicyRaisesAnUnreadableError": ({"scheduling_policy": "{}"}, SERVED, "policy"),
    "PolicyOfBools": ({"scheduling_policy": "{}"}, SERVED, "policy"),
    "PolicyOfTheWrongType": ({"scheduling_policy": "{}"}, SERVED, "policy"),
    "PolicyIsSlow": ({"scheduling_policy": "{}"}, SERVED, "policy"),
    "AllocatorOfDuplicates": ({"kv_allocator": "{}"}, SERVED, "kv"),
    "AllocatorRaises": ({"kv_allocator": "{}"}, SERVED, "kv"),
    "AllocatorRefuses": ({"kv_allocator": "{}"}, SERVED, "kv"),
    "AllocatorOfTheWrongType": ({"kv_allocator": "{}"}, SERVED, "kv"),
    "ProposerRaisesAnUnreadableError": ({"spec_method": "{}"}, SERVED, "spec_decode"),
    "ProposerOfTheWrongType": ({"spec_method": "{}"}, SERVED, "spec_decode"),
}
SLOW = {"PolicyHangs": ({"scheduling_policy": "{}"}, SERVED, "policy")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model("llama", tmp_path_factory.mktemp("hostile") / "model"))


@pytest.fixture(scope="module")
def expected(model: str) -> dict[str, Any]:
    """What each request gets alone, without a plugin of another author."""
    engine = start_engine(model)
    try:
        answers: dict[str, Any] = {}
        for name in REQUESTS:
            answers |= serve(engine, [name])
        return answers
    finally:
        engine.shutdown()


@pytest.fixture
def unchanged_process() -> Iterator[None]:
    """What a plugin has changed of the process is changed back for other tests."""
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    yield
    torch.set_default_dtype(before[0])
    torch.set_grad_enabled(before[1])
    torch.set_num_threads(before[2])
    hostile_plugins.kept.clear()


def start_engine(model: str, **choices: Any) -> LLMEngine:
    """Chunks, a shared prefix, preemption: what runs beside the plugin."""
    sizes = {"max_model_len": 128, "num_gpu_blocks_override": 24, "max_num_seqs": 5, "max_num_batched_tokens": 48}
    return LLMEngine(EngineArgs(model=model, device="cpu", cpu_threads=1, **sizes, **choices))


def serve(engine: LLMEngine, names: list[str]) -> dict[str, Any]:
    """The tokens of each completion, or the error that the request ends with."""
    answers: dict[str, Any] = {}
    for name in names:
        prompt, params = REQUESTS[name]
        engine.add_request(name, {"prompt_token_ids": prompt}, params, stream="final")
    while engine.has_unfinished_requests():
        processed = engine.process_step()
        answers |= {failed.request_id: failed.error for failed in processed.failed_requests}
        answers |= {output.request_id: [c.token_ids for c in output.outputs] for output in processed.request_outputs}
    return answers


def check_containment(model: str, expected: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture) -> None:
    arguments, outcome, kind = {**TABLE, **SLOW}[name]
    target = f"{HERE}:{name}"
    choices = json.loads(json.dumps(arguments).replace("{}", target))
    engine = start_engine(model, **choices)
    try:
        # First beside others that do not share a step with its whole prompt; then, after it, all of them once more.
        answers = serve(engine, ["greedy"])
        answers |= serve(engine, ["victim"])
        answers |= serve(engine, ["random", "like the victim"])
        again = serve(engine, ["greedy", "random", "like the victim"])
        for other in ("greedy", "random", "like the victim"):
            assert answers[other] == again[other] == expected[other], other
        if outcome == SERVED:
            assert answers["victim"] == expected["victim"]
        else:
            assert target in answers["victim"] and "4711" not in answers["victim"]
        if kind:
            assert f"{kind}/{target}" in caplog.text
        assert engine.get_stats()["kv_cache_usage_perc"] == 0
    finally:
        engine.shutdown()


@pytest.mark.parametrize("name", TABLE)
def test_other_requests_never_notice(
    model: str, expected: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture, unchanged_process: None
) -> None:
    check_containment(model, expected, name, caplog)


@pytest.mark.hostile
@pytest.mark.parametrize("name", SLOW)
def test_other_requests_wait_for_one_that_hangs(
    model: str, expected: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_containment(model, expected, name, caplog)


IMPORTS = {
    "raises": ("raise RuntimeError('no such file')", "cannot be imported: RuntimeError: no such file"),
    "exits": ("import sys; sys.exit(3)", "it called sys.exit(3)"),
    "patches": (
        "from quire.core.sched.scheduler import Scheduler\nScheduler.schedule = lambda self: None",
        "replaces quire.core.sched.scheduler.Scheduler.schedule",
    ),
    "is no plugin": ("FCFS = 5", "is a int, not a class"),
    "lacks a method": (
        "from quire.sdk import LogitsProcessor\nclass FCFS(LogitsProcessor): ...",
        "is not a subclass of quire.sdk.BatchingPolicy",
    ),
}


@pytest.mark.parametrize("case", IMPORTS)
def test_what_cannot_be_contained_is_refused_at_start(
    model: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quire.core.sched.scheduler import Scheduler

    monkeypatch.setattr(Scheduler, "schedule", Scheduler.schedule)  # put back afterwards
    code, said = IMPORTS[case]
    module = f"hostile_{case.replace(' ', '_')}"
    write_module(tmp_path, module, code, monkeypatch)
    with pytest.raises(PluginError) as refusal:
        start_engine(model, scheduling_policy=f"{module}:FCFS")
    assert f"{module}:FCFS" in str(refusal.value) and said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "arguments", "kind"),
    [
        ("AllocatorEndsAtStart", {"kv_allocator": "{}"}, "kv"),
        ("AttentionEndsAtStart", {"attention_backend": "{}"}, "attention"),
        ("ExecutorEndsAtStart", {"executor": "{}"}, "executor"),
        ("LoaderEndsAtStart", {"quantization": "{}"}, "quant"),
        ("OperationEndsAtStart", {"op": {"silu_and_mul": "{}"}}, "op"),
        ("ProcessorEndsAtStart", {"logits_processors": ["{}"]}, "logits_processor"),
        ("ProposerEndsAtStart", {"spec_method": "{}"}, "spec_decode"),
        ("SamplerEndsAtStart", {"sampler": "{}"}, "sampler"),
    ],
)
def test_a_constructor_that_ends_the_process_is_refused_by_name(
    model: str, name: str, arguments: dict[str, Any], kind: str
) -> None:
    target = f"{HERE}:{name}"
    with pytest.raises(PluginError) as refusal:
        start_engine(model, **json.loads(json.dumps(arguments).replace("{}", target)))
    assert f"{kind}/{target} cannot be constructed: it called sys.exit(8)" in str(refusal.value)


@pytest.mark.parametrize(
    ("method", "fault", "said"),
    [
        ("__init__", "sys.exit(8)", r"^model/Ends\w+ cannot be constructed: it called sys.exit\(8\); mend it or "),
        (
            "__init__",
            "1 / 0",
            r"^model/Ends\w+ cannot be constructed: ZeroDivisionError: .*ending_model.py, line 13",
        ),
        ("checkpoint_map", "sys.exit(8)", r"(cannot|could not) start: model/Ends\w+ raised SystemExit: 8$"),
    ],
)
@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.parallel)])
def test_a_model_that_ends_the_process_is_refused_by_name(
    model: str, install: Any, tmp_path: Path, method: str, fault: str, said: str, num_ranks: int
) -> None:
    code = f"""
        import sys

        from quire.sdk import hookimpl
        from quire.plugins.models.llama import LlamaForCausalLM

        @hookimpl
        def quire_register_model(register):
            register("EndsForCausalLM", "ending_model:Ends", "a model of another package")

        class Ends(LlamaForCausalLM):
            def {method}(self, *args, **kwargs):
                {fault}
    """
    install("quire-ending", "ending_model", code)
    folder = Path(shutil.copytree(model, tmp_path / "ending"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["EndsForCausalLM"]}))
    with pytest.raises(QuireError, match=said):
        start_engine(str(folder), tensor_parallel_size=num_ranks)


def test_what_an_import_changes_in_the_process_is_changed_back(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Signal handlers, streams, torch's settings; and it deletes its own file, which is of no consequence."""
    code = """
        import os, signal, sys, torch
        from quire.sdk import BatchingPolicy
        from quire.plugins.sched.fcfs import FCFSPolicy

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.stdout = sys.stderr
        torch.set_default_dtype(torch.float64)
        os.remove(__file__)

        class FCFS(FCFSPolicy):
            pass
    """
    write_module(tmp_path, "hostile_settings", code, monkeypatch)
    before = signal.getsignal(signal.SIGTERM), sys.stdout
    start_engine(model, scheduling_policy="hostile_settings:FCFS").shutdown()
    assert (signal.getsignal(signal.SIGTERM), sys.stdout) == before and torch.get_default_dtype() is torch.float32
    assert "hostile_settings:FCFS: its import changed the handler of SIGTERM, standard streams, torch" in caplog.text


def write_module(folder: Path, name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.hostile
def test_one_that_ends_the_engines_process(model: str, expected: dict[str, Any]) -> None:
    """It is killed in a step: another engine starts, and the request that brought it about runs twice at most. An
    exporter that raises is of no consequence."""

    async def run(engine: AsyncLLM, name: str) -> Any:
        prompt, params = REQUESTS[name]
        outputs = [o async for o in engine.generate({"prompt_token_ids": prompt}, params, stream="final")]
        return [completion.token_ids for completion in outputs[-1].outputs]

    async def scenario() -> None:
        sizes = {"max_model_len": 128, "num_gpu_blocks_override": 24, "max_num_seqs": 5}
        backend = f"{HERE}:AttentionEndsTheProcess"
        plugins: dict[str, Any] = {"attention_backend": backend, "metrics": [f"{HERE}:ExporterRaises"]}
        engine = AsyncLLM(model=model, device="cpu", cpu_threads=1, **plugins, **sizes)
        try:
            await engine.start()
            with pytest.raises(Exception, match="the engine process ended with status -9"):
                await run(engine, "victim")
            while not engine.is_ready:
                await asyncio.sleep(0.05)
            for name in ("greedy", "random", "like the victim"):
                assert await run(engine, name) == expected[name]
            assert engine.get_stats()["plugin_quarantines_total"] == 1, "the exporter is switched off"
        finally:
            await engine.shutdown()

    asyncio.run(asyncio.wait_for(scenario(), 120))

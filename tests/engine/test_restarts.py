"""Another engine core takes the place of one that hung or died, and runs again what no caller has seen anything of."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, AsyncLLM, SamplingParams
from quire.core.engine.process import EngineProcess
from quire.core.errors import EngineDeadError, RequestFailedError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=240, ignore_eos=True)
PLUGINS = """
    import time
    from pathlib import Path

    import torch

    from quire.core.worker.uniproc_executor import UniprocExecutor
    from quire.plugins.sched.fcfs import FCFSPolicy

    FOLDER = Path({folder!r})

    class Executor(UniprocExecutor):
        '''A step hangs if there is a file.'''

        def execute_step(self, step):
            if (FOLDER / "lost").exists():
                (FOLDER / "lost").unlink()
                error = torch.AcceleratorError("CUDA error: device-side assert triggered")
                error.error_code = 710
                raise error
            if (FOLDER / "hang").exists():
                (FOLDER / "inside").touch()
                hang_in_a_library()
            return super().execute_step(step)

    def hang_in_a_library():
        time.sleep(10_000)

    class Deaf(FCFSPolicy):
        '''It never returns, and nothing can be raised in it.'''

        def schedule(self, view):
            time.sleep(10_000)

    class Blocking(FCFSPolicy):
        '''It keeps every thread of its process from running.'''

        def schedule(self, view):
            if (FOLDER / "hang").exists():
                (FOLDER / "hang").unlink()
                import ctypes
                ctypes.PyDLL(None).sleep(10_000)
            return super().schedule(view)
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the file that makes a step hang."""
    (tmp_path / "hanging.py").write_text(textwrap.dedent(PLUGINS).format(folder=str(tmp_path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


async def wait_until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def collect(engine: AsyncLLM, prompt: list[int], params: SamplingParams, stream: Any = "final") -> list[Any]:
    outputs = [output async for output in engine.generate(prompt, params, stream=stream)]
    return [(o.index, o.text, o.token_ids, o.finish_reason) for o in outputs[-1].outputs]


def describe(output: Any) -> list[Any]:
    return [(o.index, o.text, o.token_ids, o.finish_reason) for o in output.outputs]


def pid_of(engine: AsyncLLM) -> int:
    assert engine.process is not None
    return engine.process.pid


SEEDED = SamplingParams(temperature=1, seed=7, max_tokens=200, n=3, ignore_eos=True)
STOPPED = SamplingParams(temperature=1, seed=3, max_tokens=150, min_tokens=100, logprobs=2)


def test_a_service_outlives_its_engines(tiny: Path, llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """Killed, then stopped, then killed once too often; with drafts, and too few blocks for all at once."""
    caplog.set_level(logging.INFO, "quire")
    calls = [([5, 6, 7], LONG), ([8, 9], SEEDED), ([5, 6, 7, 11], STOPPED)]
    expected = [describe(llm.generate([prompt], params)[0]) for prompt, params in calls]

    async def scenario() -> None:
        options: Any = {"max_num_seqs": 8, "num_gpu_blocks_override": 40, "spec_method": "ngram"}
        engine = AsyncLLM(model=str(tiny), max_model_len=256, device="cpu", max_engine_restarts=2, **options)
        await engine.start()
        first = pid_of(engine)
        await engine.set_policy("priority", {"aging": "3"})

        # one caller has got something, three nothing, and one has left when the engine comes back
        stream = engine.generate([9, 9], LONG, stream="delta")
        await anext(stream)
        waiting = [asyncio.create_task(collect(engine, *call)) for call in calls]
        leaving = asyncio.create_task(collect(engine, [4, 4], LONG))
        await asyncio.sleep(0.02)
        os.kill(first, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(EngineDeadError, match="status -9"):
            async for _ in stream:
                pass
        assert time.monotonic() - begin < 5
        assert not engine.is_ready and not engine.is_dead and engine.unavailable_reason is not None
        with pytest.raises(EngineDeadError, match="status -9"):
            await collect(engine, [5], GREEDY)
        assert engine.get_stats()["num_requests_running"] == 0
        leaving.cancel()
        async with asyncio.timeout(120):
            assert await asyncio.gather(*waiting) == expected, "the tokens of an engine that never died"
        assert engine.is_ready and engine.unavailable_reason is None and pid_of(engine) != first
        assert engine.get_stats()["engine_restarts_total"] == 1
        assert "3 requests run again" in caplog.text
        policy = await engine.call_control("get_policy")
        assert (policy["name"], policy["options"]) == ("priority", {"aging": "3"}), "the one that it was switched to"

        # stopped while nothing runs: missed heartbeats tell
        second = pid_of(engine)
        os.kill(second, signal.SIGSTOP)
        await wait_until(lambda: not engine.is_ready, 30)
        assert "is stopped (SIGSTOP" in (engine.unavailable_reason or "")
        await wait_until(lambda: engine.is_ready)
        assert not Path(f"/proc/{second}").exists()
        assert await collect(engine, *calls[1]) == expected[1]
        assert engine.get_stats()["engine_restarts_total"] == 2

        # the third time is too often, within an hour
        waiting = [asyncio.create_task(collect(engine, *call)) for call in calls]
        await asyncio.sleep(0.02)
        os.kill(pid_of(engine), signal.SIGKILL)
        for task in waiting:
            with pytest.raises(EngineDeadError, match="--max-engine-restarts 2"):
                await task
        assert engine.is_dead and not engine.is_ready
        await engine.shutdown()

    asyncio.run(scenario())


def test_a_step_that_hangs(tiny: Path, llm: LLM, plugins: Path, capfd: pytest.CaptureFixture[str]) -> None:
    [expected] = llm.generate([[5, 6, 7]], GREEDY)

    async def scenario() -> None:
        options = {"executor": "hanging:Executor", "step_timeout": 1.0, "max_engine_restarts": 1}
        engine = AsyncLLM(model=str(tiny), max_model_len=256, device="cpu", **options)
        await engine.start()
        (plugins / "hang").touch()
        request = asyncio.create_task(collect(engine, [5, 6, 7], GREEDY))
        await wait_until((plugins / "inside").exists)
        # however long a control call behind the step may take, it is the step that hangs
        call = asyncio.create_task(engine.call_control("get_stats", timeout=100.0))
        await wait_until(lambda: not engine.is_ready, 30)
        assert "in executor/hanging:Executor" in (engine.unavailable_reason or "")
        with pytest.raises(EngineDeadError):
            await call
        (plugins / "hang").unlink()
        await wait_until(lambda: engine.is_ready)
        async with asyncio.timeout(60):
            assert await request == describe(expected)
        (plugins / "hang").touch()
        with pytest.raises(EngineDeadError, match="a step has not ended for"):
            await collect(engine, [5, 6, 7], GREEDY)
        await engine.shutdown()

    asyncio.run(scenario())
    assert "in hang_in_a_library" in capfd.readouterr().err, "the stack is in the log"


def test_a_device_that_is_lost(tiny: Path, llm: LLM, plugins: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The requests of the step that lost it end; the engine of another process serves the others."""
    [expected] = llm.generate([[5, 6, 7]], GREEDY)

    async def scenario() -> None:
        options = {"executor": "hanging:Executor", "max_num_seqs": 1, "record": str(plugins / "recording.jsonl")}
        engine = AsyncLLM(model=str(tiny), max_model_len=256, device="cpu", **options)
        await engine.start()
        (plugins / "lost").touch()
        guilty = asyncio.create_task(collect(engine, [4, 4], GREEDY))
        waiting = asyncio.create_task(collect(engine, [5, 6, 7], GREEDY))
        with pytest.raises(RequestFailedError, match="a step of the engine failed in executor/hanging:Executor"):
            await guilty
        async with asyncio.timeout(120):
            assert await waiting == describe(expected)
        assert engine.get_stats()["engine_restarts_total"] == 1
        await engine.shutdown()
        assert sorted(path.name for path in plugins.glob("recording*")) == ["recording.jsonl", "recording.jsonl.1"]

    asyncio.run(scenario())
    assert "device-side assert" in capfd.readouterr().err, "the log says why"


def test_a_request_by_which_engines_die_does_not_end_the_service(tiny: Path, llm: LLM, plugins: Path) -> None:
    """It runs again once."""
    [expected] = llm.generate([[5, 6, 7]], GREEDY)

    async def scenario() -> None:
        options = {"executor": "hanging:Executor", "step_timeout": 0.5}
        engine = AsyncLLM(model=str(tiny), max_model_len=256, device="cpu", **options)
        await engine.start()
        (plugins / "hang").touch()
        with pytest.raises(EngineDeadError, match="in executor/hanging"):
            async with asyncio.timeout(120):
                await collect(engine, [4, 4], GREEDY)
        assert engine.get_stats()["engine_restarts_total"] == 1, "and a second one begins"
        (plugins / "hang").unlink()
        await wait_until(lambda: engine.is_ready)
        assert await collect(engine, [5, 6, 7], GREEDY) == describe(expected)
        await engine.shutdown()

    asyncio.run(scenario())


def test_a_policy_that_cannot_be_interrupted_is_left_out_of_the_next_engine(
    tiny: Path, llm: LLM, plugins: Path
) -> None:
    [expected] = llm.generate([[5, 6, 7]], GREEDY)

    async def scenario() -> None:
        options = {"scheduling_policy": "hanging:Deaf", "step_timeout": 1.0, "max_engine_restarts": 1}
        engine = AsyncLLM(model=str(tiny), max_model_len=256, device="cpu", **options)
        await engine.start()
        async with asyncio.timeout(120):
            assert await collect(engine, [5, 6, 7], GREEDY) == describe(expected)
        stats = engine.get_stats()
        assert stats["engine_restarts_total"] == 1 and stats["plugin_quarantines_total"] == 1
        [exporter] = engine.exporters
        rendered = exporter.render()
        assert rendered is not None
        assert b'kind="policy"' in rendered[1] and b'reason="hung"' in rendered[1]
        assert b"quire:engine_restarts_total{" in rendered[1]
        await engine.shutdown()

    asyncio.run(scenario())


def test_a_process_in_which_no_python_runs(
    tiny: Path, llm: LLM, plugins: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its stacks are written by a signal handler."""
    [expected] = llm.generate([[5, 6, 7]], GREEDY)

    async def scenario() -> None:
        engine = AsyncLLM(model=str(tiny), max_model_len=256, device="cpu", scheduling_policy="hanging:Blocking")
        await engine.start()
        (plugins / "hang").touch()
        request = asyncio.create_task(collect(engine, [5, 6, 7], GREEDY))
        await wait_until(lambda: not engine.is_ready, 30)
        assert "no Python code can run in it" in (engine.unavailable_reason or "")
        async with asyncio.timeout(120):
            assert await request == describe(expected)
        await engine.shutdown()

    asyncio.run(scenario())
    assert "in schedule" in capfd.readouterr().err


EXPORTER = """
    import time

    from quire.sdk import MetricsExporter

    class Endless(MetricsExporter):
        '''It never returns.'''

        def record_engine(self, stats):
            while True:
                time.sleep(0.01)

        def record_request(self, stats): ...

        def record_tokens(self, num_prompt, num_generated, ttft_s, itl_s): ...
"""


def test_an_exporter_that_never_returns_is_interrupted(
    tiny: Path, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are served meanwhile."""
    (tmp_path / "endless_exporter.py").write_text(textwrap.dedent(EXPORTER))
    monkeypatch.syspath_prepend(str(tmp_path))
    [expected] = llm.generate([[5, 6, 7]], GREEDY)

    async def scenario() -> None:
        options: Any = {"metrics": ["prometheus", "endless_exporter:Endless"], "max_engine_restarts": 0}
        engine = AsyncLLM(model=str(tiny), max_model_len=256, device="cpu", **options)
        await engine.start()
        async with asyncio.timeout(120):
            for _ in range(3):
                assert await collect(engine, [5, 6, 7], GREEDY) == describe(expected)
            assert len(engine.exporters) == 2, "nothing has waited for it"
            await wait_until(lambda: len(engine.exporters) == 1, 30)
            await collect(engine, [5, 6, 7], GREEDY)
            metrics = (await engine.render_metrics())[0].body.decode()
        assert engine.get_stats()["plugin_quarantines_total"] == 1
        assert 'plugin_quarantines_total{kind="metrics"' in metrics and 'reason="hung"' in metrics
        await engine.shutdown()

    asyncio.run(scenario())


def test_an_engine_that_is_shut_down_while_another_starts_leaves_no_process(tiny: Path) -> None:
    async def scenario() -> None:
        process = EngineProcess("cpu")
        engine = AsyncLLM(model=str(tiny), max_model_len=256, device="cpu", process=process)
        await engine.start()
        request = asyncio.create_task(collect(engine, [5, 6, 7], LONG))
        await asyncio.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        await wait_until(lambda: pid_of(engine) != process.pid, 30)
        second = pid_of(engine)
        assert engine.process is not None
        folder = Path(engine.process.folder)
        begin = time.monotonic()
        await engine.shutdown()
        assert time.monotonic() - begin < 8, "nothing is asked of a process that does not serve"
        assert not Path(f"/proc/{second}").exists() and not folder.exists()
        with pytest.raises(EngineDeadError):
            await request

    asyncio.run(scenario())

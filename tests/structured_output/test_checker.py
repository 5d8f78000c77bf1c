"""Constraints are compiled in a process that can be killed, before their requests reach the engine core."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.slowdown import measure_slowdown

from quire import StructuredOutputsParams
from quire.core.engine.args import EngineArgs
from quire.core.engine.config_builder import build_config
from quire.core.errors import InvalidRequestError, RequestFailedError
from quire.core.structured_output.checker import ConstraintChecker
from quire.core.structured_output.compile_process import CompileProcess, CompileTemplate

FAULTY = "quire.core.testing.grammars:FaultyBackend"


def make_config(backend: str):
    return build_config(EngineArgs(model="quire-tiny", device="cpu", structured_output_backend=backend)).config


def list_descendants(pid: int) -> list[int]:
    """Processes that it has started, and those that these have."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return children + [each for child in children for each in list_descendants(child)]


@pytest.fixture
def faulty(request) -> Iterator[CompileProcess]:
    """Where the backend has threads, the process is not forked."""
    template = CompileTemplate(make_config(getattr(request, "param", FAULTY)))
    process = CompileProcess(template)
    yield process
    process.close()
    template.close()


@pytest.mark.parametrize("faulty", [FAULTY, f"{FAULTY}WithThread"], ids=["forked", "not forked"], indirect=True)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("burn in compile", "takes longer than 1 s"),
        ("allocate in compile", "takes more than 512 MiB"),
        ("exit in compile", "takes more than"),
        ("raise in compile", f"compiling it failed in {FAULTY}.*; the server's log says why"),
        ("cancel in compile", f"compiling it failed in {FAULTY}.*; the server's log says why"),
        ("raise in start", f"compiling it failed in {FAULTY}.*; the server's log says why"),
    ],
)
def test_a_fault_is_a_refusal_and_the_next_constraint_is_checked(faulty: CompileProcess, fault, reason) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        faulty.check_constraint(StructuredOutputsParams(choice=[fault]))
    faulty.check_constraint(StructuredOutputsParams(choice=["ok"]))


def test_a_process_that_was_ended_costs_the_next_constraint_no_start(faulty: CompileProcess) -> None:
    """Another one is forked at once, from the one that has loaded the backend, and shares its memory."""
    faulty.check_constraint(StructuredOutputsParams(choice=["ok"]))
    seconds = []
    for _ in range(3):
        with pytest.raises(InvalidRequestError, match="takes more than"):
            faulty.check_constraint(StructuredOutputsParams(choice=["exit in compile"]))
        start = time.monotonic()
        faulty.check_constraint(StructuredOutputsParams(choice=["ok"]))
        seconds.append((time.monotonic() - start) / measure_slowdown())
    assert min(seconds) < 0.2  # the least of them: others use the machine


def test_what_hangs_ends_with_the_rest(faulty: CompileProcess) -> None:
    others = list_descendants(os.getpid())
    faulty.check_constraint(StructuredOutputsParams(choice=["ok"]))

    def hang() -> None:
        with pytest.raises(InvalidRequestError, match="shuts down"):
            faulty.check_constraint(StructuredOutputsParams(choice=["hang in compile"]))

    hung = threading.Thread(target=hang)
    hung.start()
    pids = set(list_descendants(os.getpid())) - set(others)
    assert len(pids) == 2
    time.sleep(0.05)
    faulty.close()
    hung.join(10)
    assert not hung.is_alive()
    deadline = time.monotonic() + 10
    faulty.template.close()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_compiler_that_waits_is_ended_by_the_clock(faulty: CompileProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty.check_constraint(StructuredOutputsParams(choice=["ok"]))
    monkeypatch.setattr("quire.core.structured_output.compile_process._MAX_WALL_SECONDS", 1.0)
    with pytest.raises(InvalidRequestError, match="takes longer than 1 s"):
        faulty.check_constraint(StructuredOutputsParams(choice=["hang in compile"]))


def test_equal_constraints_are_checked_once_and_others_do_not_wait_for_a_slow_one() -> None:
    async def run() -> None:
        checker = ConstraintChecker(make_config(FAULTY))
        await asyncio.gather(*(checker.check_constraint(StructuredOutputsParams(choice=["ok"])) for _ in range(20)))
        slow = [
            asyncio.create_task(checker.check_constraint(StructuredOutputsParams(choice=["burn in compile"])))
            for _ in range(8)
        ]
        await asyncio.sleep(0)
        start = time.process_time()
        await checker.check_constraint(StructuredOutputsParams(choice=["ok"], reasoning_end="x"))
        results = await asyncio.gather(*slow, return_exceptions=True)
        assert all(isinstance(result, InvalidRequestError) for result in results)
        assert checker.num_refused == 8
        assert time.process_time() - start < 1.0, "the event loop was held up"
        with pytest.raises(InvalidRequestError):  # known by now
            await checker.check_constraint(StructuredOutputsParams(choice=["burn in compile"]))
        checker.close()
        checker.close()

    asyncio.run(run())


def test_a_model_without_an_eos_token_has_no_structured_output(tmp_path) -> None:
    import shutil

    from tests.structured_output.conftest import TINY

    folder = shutil.copytree(TINY, tmp_path / "model")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        fields = json.loads((folder / name).read_text())
        for key in ("eos_token_id", "eos_token"):
            fields.pop(key, None)
        (folder / name).write_text(json.dumps(fields))
    config = build_config(EngineArgs(model=str(folder), device="cpu")).config
    template = CompileTemplate(config)
    process = CompileProcess(template)
    try:
        with pytest.raises(InvalidRequestError, match="no EOS token"):
            process.check_constraint(StructuredOutputsParams(choice=["ok"]))
    finally:
        process.close()
        template.close()


def test_a_process_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request fails, the constraint is not taken for a bad one, and the next request tries again."""

    async def run() -> None:
        checker = ConstraintChecker(make_config(FAULTY))
        params = StructuredOutputsParams(choice=["ok"])
        with monkeypatch.context() as broken:
            broken.setattr("sys.executable", "/bin/false")
            with pytest.raises(RequestFailedError, match="did not start"):
                await checker.check_constraint(params)
        await checker.check_constraint(params)
        assert checker.num_refused == 0
        checker.close()

    asyncio.run(run())


def test_the_process_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, quire.core.structured_output.compile_worker; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

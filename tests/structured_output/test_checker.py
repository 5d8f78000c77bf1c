"""Constraints are compiled in a process that can be killed, before their requests reach the engine core."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import pytest

from quire import StructuredOutputsParams
from quire.core.engine.args import EngineArgs
from quire.core.engine.config_builder import build_config
from quire.core.errors import InvalidRequestError, RequestFailedError
from quire.core.structured_output.checker import ConstraintChecker
from quire.core.structured_output.compile_process import CompileProcess

FAULTY = "quire.core.testing.grammars:FaultyBackend"


def make_config(backend: str):
    return build_config(EngineArgs(model="quire-tiny", device="cpu", structured_output_backend=backend)).config


@pytest.fixture
def faulty() -> Iterator[CompileProcess]:
    process = CompileProcess(make_config(FAULTY))
    yield process
    process.close()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("burn in compile", "takes longer than 1 s"),
        ("allocate in compile", "takes more than 512 MiB"),
        ("exit in compile", "takes more than"),
        ("raise in compile", "a fault of the compiler"),
        ("raise in start", "a fault of start"),
    ],
)
def test_a_fault_is_a_refusal_and_the_next_constraint_is_checked(faulty: CompileProcess, fault, reason) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        faulty.check_constraint(StructuredOutputsParams(choice=[fault]))
    faulty.check_constraint(StructuredOutputsParams(choice=["ok"]))


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
    process = CompileProcess(config)
    try:
        with pytest.raises(InvalidRequestError, match="no EOS token"):
            process.check_constraint(StructuredOutputsParams(choice=["ok"]))
    finally:
        process.close()


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

    code = "import sys, quire.core.structured_output.compile_process; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

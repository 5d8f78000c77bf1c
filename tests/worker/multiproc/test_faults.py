"""Faults after which ranks cannot go on together, each in an engine of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.core.errors import EngineDeadError, WorkerDiedError
from quire.core.worker.multiproc.rank_processes import RankProcesses

pytestmark = pytest.mark.parallel

PROMPT = {"prompt_token_ids": [5, 6, 7]}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ENDLESS = """
import time

from quire.sdk import LogitsProcessor


class Endless(LogitsProcessor):
    '''It does not return, on any rank.'''

    on_failure = "skip"

    def add_row(self, request):
        return True

    def remove_row(self, row):
        pass

    def apply(self, logits, batch):
        while True:
            time.sleep(0.05)
"""


@pytest.fixture
def start(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., LLM]]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(tmp_path))
    engines = []

    def begin(**arguments: Any) -> LLM:
        sizes: dict[str, Any] = {"max_model_len": 256, "cpu_threads": 1, "tensor_parallel_size": 2}
        engines.append(LLM(model=str(tiny), device="cpu", **sizes, **arguments))
        return engines[-1]

    yield begin
    for engine in engines:
        engine.shutdown()


def set_fault(engine: LLM, fault: str, rank: int | None) -> None:
    arguments = {"method": "set_fault", "arguments": {"fault": fault, "rank": rank}}
    engine.engine_core.control.call_method("collective_rpc", arguments)


def assert_nothing_runs(pids: list[int]) -> None:
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_ranks_that_hang_are_found_at_the_step_timeout(
    start: Callable[..., LLM],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The watchdog of the engine core, which does not know the ranks, leaves it to the executor, also where ranks take
    as long to die as if each had the whole memory of a GPU."""
    kill = RankProcesses.kill

    def kill_slowly(ranks: RankProcesses) -> None:
        time.sleep(2.5)
        kill(ranks)

    monkeypatch.setattr(RankProcesses, "kill", kill_slowly)
    engine = start(executor="rank_faults:FaultyExecutor", step_timeout=3)
    pids = engine.engine_core.executor.pids  # type: ignore[attr-defined]
    set_fault(engine, "hang", 1)
    begin = time.monotonic()
    reason = rf"^rank 1 \(process {pids[1]}\) hangs, and others wait for it: (a step|step \d+) has not ended for 3 s"
    with pytest.raises(WorkerDiedError, match=reason):
        engine.generate([PROMPT], GREEDY)
    assert 2 < time.monotonic() - begin < 20
    assert_nothing_runs(pids)
    assert "rank_faults.py" in capfd.readouterr().err, "where the hung rank is"
    assert "the engine hangs" not in caplog.text


def test_a_step_that_fails_on_one_rank_alone_ends_the_engine(start: Callable[..., LLM]) -> None:
    engine = start(executor="rank_faults:FaultyExecutor", step_timeout=4)
    pids = engine.engine_core.executor.pids  # type: ignore[attr-defined]
    assert len(engine.generate([PROMPT], GREEDY)) == 1
    set_fault(engine, "raise", 1)
    with pytest.raises(WorkerDiedError, match=r"^rank 1 left the others in step \d+, and .*: ValueError: forced$"):
        engine.generate([PROMPT], GREEDY)
    assert_nothing_runs(pids)


def test_a_rank_that_cannot_answer_any_more_is_the_one_that_is_named(start: Callable[..., LLM]) -> None:
    """It left the others in one step, and waits for them in the next."""
    engine = start(executor="rank_faults:ExecutorAhead", step_timeout=4)
    pids = engine.engine_core.executor.pids  # type: ignore[attr-defined]
    set_fault(engine, "raise, then hang", 1)
    with pytest.raises(WorkerDiedError, match=r"^rank 1 left the others in step \d+, and .*: ValueError: forced$"):
        engine.generate([PROMPT] * 3, GREEDY)
    assert_nothing_runs(pids)


def test_a_plugin_that_hangs_on_every_rank_is_replaced(start: Callable[..., LLM], tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    engine = start(logits_processors=["endless:Endless"], step_timeout=8)
    [output] = engine.generate([PROMPT], GREEDY)
    assert len(output.outputs[0].token_ids) == 12
    assert engine.get_stats()["plugin_quarantines_total"] == 1


def test_a_checkpoint_that_is_not_there_is_said_in_a_line(start: Callable[..., LLM], tiny: Path) -> None:
    """By the class that one process would raise."""
    weights = tiny / "model.safetensors"
    hidden = weights.rename(tiny / "hidden")
    try:
        with pytest.raises(Exception, match="safetensors") as raised:
            start()
    finally:
        hidden.rename(weights)
    assert not isinstance(raised.value, EngineDeadError) and "\n" not in str(raised.value)

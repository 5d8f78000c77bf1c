"""How many CPUs an engine takes: those that the process may use, which may be fewer than the machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quire import LLM
from quire.core.env import child_environment

ALL = len(os.sched_getaffinity(0))
COUNT = "from quire.core.env import count_cpus; import torch; print(count_cpus())"


@pytest.mark.parametrize(
    ("before", "variables", "expected"),
    [
        ("import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])", {}, 1),
        ("import os; del os.sched_getaffinity; os.cpu_count = lambda: 64", {}, 64),
        ("", {"OMP_PROC_BIND": "true"}, ALL),
    ],
    ids=["a cpuset", "the system does not say", "OpenMP binds the thread to one"],
)
def test_the_cpus_of_a_process_are_counted(before: str, variables: dict[str, str], expected: int) -> None:
    environment = {**child_environment(), **variables}
    command = [sys.executable, "-c", f"{before}\n{COUNT}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) == expected


def test_a_model_on_a_cpu_takes_no_more_threads_than_that(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is left to the scheduler and the API process."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("quire.core.worker.worker.count_cpus", lambda: 3)
    asked: list[int] = []  # torch keeps the number by thread
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    LLM(model=str(tiny), device="cpu", max_model_len=64).shutdown()
    assert asked == [2]

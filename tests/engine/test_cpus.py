"""How many CPUs an engine takes: those that the process may use, which may be fewer than the machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from quire import LLM
from quire.core.env import count_cpus


def test_the_cpus_of_a_cpuset_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert count_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert count_cpus() == 64, "where the system does not say"


def test_a_model_on_a_cpu_takes_no_more_threads_than_that(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is left to the scheduler and the API process."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    asked: list[int] = []  # torch keeps the number by thread
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    LLM(model=str(tiny), device="cpu", max_model_len=64).shutdown()
    assert asked == [2]

"""For every test: the Triton interpreter, one thread per process, and hypothesis without deadlines."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("quire", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("ci", settings.get_profile("quire"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "quire")


def pytest_configure(config: pytest.Config) -> None:
    """Settle the environment before anything imports torch or triton, and before workers are started."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not _wants_compiler(config.option.markexpr):
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that compile kernels in a process that interprets them."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    skip = pytest.mark.skip(reason="needs a process without the interpreter: make aot, or pytest -m aot")
    for item in items:
        if item.get_closest_marker("aot"):
            item.add_marker(skip)


def _wants_compiler(markexpr: str) -> bool:
    """Whether ``-m`` asks for the tests that need Triton's compiler: ``-m aot`` or ``-m gpu``."""
    words = markexpr.replace("(", " ").replace(")", " ").split()
    wanted = {word for before, word in zip(["", *words], words, strict=False) if before != "not"}
    return bool(wanted & {"aot", "gpu"})

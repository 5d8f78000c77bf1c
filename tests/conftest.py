"""For every test: the Triton interpreter, one thread per process, and hypothesis without deadlines."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings
from tests.interpreter import leave_kernels_untraced, prepare_language_once


def _settle() -> None:
    """Settle the environment. Here and not in a hook: a folder's own conftest may import torch and triton before the
    first hook is called. Workers of xdist inherit what the first process settles."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-m", default="")
    words = parser.parse_known_args(sys.argv[1:])[0].m.replace("(", " ").replace(")", " ").split()
    wanted = {word for before, word in zip(["", *words], words, strict=False) if before != "not"}
    os.environ.setdefault("TRITON_INTERPRET", "0" if wanted & {"aot", "gpu"} else "1")  # these need Triton's compiler


_settle()
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background: what tests start would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("quire", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("ci", settings.get_profile("quire"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "quire")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests that compile kernels in a process that interprets them, unless they are what was asked for."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    if config.option.markexpr in ("aot", "gpu"):
        raise pytest.UsageError("TRITON_INTERPRET=1 is set: nothing would be compiled; unset it")
    skip = pytest.mark.skip(reason="needs a process without the interpreter: make aot, or pytest -m aot")
    for item in items:
        if item.get_closest_marker("aot"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: no collection of garbage looks at it again."""
    leave_kernels_untraced()
    prepare_language_once()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def unchanged_logging() -> Iterator[None]:
    """A test that sets up logging, as the commands do, changes nothing for those after it in its process."""
    logger = logging.getLogger("quire")
    level, handlers, propagate = logger.level, list(logger.handlers), logger.propagate
    yield
    logger.setLevel(level)
    logger.handlers[:], logger.propagate = handlers, propagate


@pytest.fixture
def waiting_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launching a step raises where it would wait for the GPU: steps in flight would end before the next begins."""
    import torch

    from quire.core.worker.worker import Worker

    def forbid_waiting(launch: Callable[..., object]) -> Callable[..., object]:
        def strict(self: Worker, *args: object) -> object:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return launch(self, *args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return strict

    monkeypatch.setattr(Worker, "execute_model", forbid_waiting(Worker.execute_model))
    monkeypatch.setattr(Worker, "sample_tokens", forbid_waiting(Worker.sample_tokens))

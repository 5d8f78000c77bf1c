"""The only reader of the process environment. Each variable has a flag or argument that wins over it."""

from __future__ import annotations

import os
import sys

__all__ = ["child_environment", "log_level", "num_threads", "vllm_variables"]


def log_level() -> str:
    """``QUIRE_LOG_LEVEL`` (``--log-level``): DEBUG, INFO, WARNING or ERROR."""
    return os.environ.get("QUIRE_LOG_LEVEL", "INFO").upper()


def num_threads() -> int | None:
    """``OMP_NUM_THREADS`` (``--cpu-threads``): threads for the model on a CPU. None: not set."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() else None


def vllm_variables() -> dict[str, str]:
    """The variables that are vLLM's, for ``quire serve`` to map or to name; see ``quire.core.engine.vllm_names``.

    Without ``VLLM_LOGGING_LEVEL`` (``--log-level``) where ``QUIRE_LOG_LEVEL`` says it.
    """
    variables = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
    if "QUIRE_LOG_LEVEL" in os.environ:
        variables.pop("VLLM_LOGGING_LEVEL", None)
    return variables


def child_environment() -> dict[str, str]:
    """The environment for a process of ours: as this one's, importing from the same places."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

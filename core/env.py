"""The only reader of the process environment. Each variable has a flag or argument that wins over it."""

from __future__ import annotations

import os
import sys

__all__ = [
    "child_environment",
    "collective_environment",
    "count_cpus",
    "log_level",
    "num_threads",
    "ray_address",
    "vllm_variables",
]

# Read before torch is imported, whose OpenMP may bind this thread to one of them.
_NUM_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def log_level() -> str:
    """``QUIRE_LOG_LEVEL`` (``--log-level``): DEBUG, INFO, WARNING or ERROR."""
    return os.environ.get("QUIRE_LOG_LEVEL", "INFO").upper()


def num_threads() -> int | None:
    """``OMP_NUM_THREADS`` (``--cpu-threads``): threads for the model on a CPU. None: not set."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() else None


def count_cpus() -> int:
    """Those that this process may use: fewer than the machine has where a container's cpuset or ``taskset`` says so."""
    return _NUM_CPUS


def ray_address() -> str:
    """``RAY_ADDRESS`` (``--executor-option``, its ``address``): ``HOST:PORT`` of a Ray cluster, else ``auto``."""
    return os.environ.get("RAY_ADDRESS") or "auto"


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


def collective_environment() -> dict[str, str]:
    """What of this process's environment the ranks on other hosts should have as well: the settings of collective
    libraries, but for names of network interfaces, which each host has its own of."""
    prefixes = ("NCCL_", "TORCH_NCCL_", "TORCH_SYMM_MEM_")
    return {k: v for k, v in os.environ.items() if k.startswith(prefixes) and not k.endswith(("_IFNAME", "_HCA"))}

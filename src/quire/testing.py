"""The kit with which a plugin is tested: conformance checks, and what its tests can run it on.

``parametrize_with_checks(MyPolicy)`` runs in pytest what ``quire plugins check`` runs on the command line.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.core.testing.conformance import CheckResult, checks_for, parametrize_with_checks, run_checks
    from quire.core.testing.fake_kv_worker import FakeKVWorker
    from quire.core.testing.oracle import assert_matches_reference
    from quire.core.testing.simulated_engine import SimulatedEngine
    from quire.core.testing.tiny_models import make_tiny_model

__all__ = [
    "CheckResult",
    "FakeKVWorker",
    "SimulatedEngine",
    "assert_matches_reference",
    "checks_for",
    "make_tiny_model",
    "parametrize_with_checks",
    "run_checks",
]

_MODULE_OF_NAME = {
    "CheckResult": "quire.core.testing.conformance",
    "FakeKVWorker": "quire.core.testing.fake_kv_worker",
    "SimulatedEngine": "quire.core.testing.simulated_engine",
    "assert_matches_reference": "quire.core.testing.oracle",
    "checks_for": "quire.core.testing.conformance",
    "make_tiny_model": "quire.core.testing.tiny_models",
    "parametrize_with_checks": "quire.core.testing.conformance",
    "run_checks": "quire.core.testing.conformance",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the checks are light, the models load torch."""
    if name in _MODULE_OF_NAME:
        return getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
    raise AttributeError(f"module 'quire.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

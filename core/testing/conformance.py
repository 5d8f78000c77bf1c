"""Conformance checks: plain functions ``check_*(cls)``, yielded per kind, the same for bundled and foreign plugins.

A module ``quire.core.testing.checks_<kind>`` holds those of one kind; ``checks_any`` those of all. A check raises to
fail (AssertionError or anything else) and ``unittest.SkipTest`` where it does not apply.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import unittest
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quire.core.errors import PluginError
from quire.core.plugin.discovery import format_error
from quire.core.plugin.registry import KINDS, Kind, suggest_names
from quire.core.plugin.target import load_target

__all__ = ["CheckResult", "checks_for", "find_kind", "parametrize_with_checks", "run_check", "run_checks"]

Check = Callable[[type], None]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """How one check ended; ``reason`` is empty where it passed."""

    name: str
    outcome: Literal["passed", "failed", "skipped"]
    reason: str = ""


def checks_for(kind: str) -> list[Check]:
    """The checks of ``kind``, general ones first, in the order in which they are written. Each takes the class."""
    return [*_list_checks("any"), *_list_checks(Kind.from_name(kind).key)]


def run_checks(cls: type, kind: str | None = None) -> list[CheckResult]:
    """Run every check on ``cls`` and say how each ended. Stops at nothing but the user's interrupt."""
    return [_run(check, cls) for check in checks_for(kind or find_kind(cls))]


def run_check(cls: type, name: str, kind: str | None = None) -> CheckResult:
    """Run the check ``name`` alone. PluginError if the kind has none of that name."""
    check = next((c for c in checks_for(kind or find_kind(cls)) if c.__name__ == name), None)
    if check is None:
        raise PluginError(
            f"{name} is no check; {suggest_names(name, [c.__name__ for c in checks_for(find_kind(cls))])}"
        )
    return _run(check, cls)


def parametrize_with_checks(
    cls: type, expected_failures: Mapping[str, str] | None = None, *, kind: str | None = None
) -> Any:
    """A pytest decorator that runs a test once per check, each given as the argument ``check`` (call it)::

        @parametrize_with_checks(MyPolicy, expected_failures={"check_names": "why it cannot hold"})
        def test_keeps_its_contract(check):
            check()

    An expected failure that passes fails the test, and so does one that names no check.
    """
    import pytest

    expected = dict(expected_failures or {})
    checks = checks_for(kind or find_kind(cls))
    unknown = expected.keys() - {c.__name__ for c in checks}
    if unknown:
        raise PluginError(f"expected_failures names {', '.join(sorted(unknown))}, which is no check; remove it")
    parameters = []
    for check in checks:
        reason = expected.get(check.__name__)
        marks = () if reason is None else (pytest.mark.xfail(reason=reason, strict=True),)
        parameters.append(pytest.param(functools.partial(check, cls), id=check.__name__, marks=marks))
    return pytest.mark.parametrize("check", parameters)


def find_kind(cls: type) -> str:
    """The kind whose contract ``cls`` derives from. PluginError if it derives from none."""
    modules = {base.__module__ for base in cls.__mro__}
    for kind in KINDS.values():
        if kind.contract.partition(":")[0] in modules and issubclass(cls, load_target(kind.contract)):
            return kind.key
    raise PluginError(f"{cls.__qualname__} derives from no contract; derive it from one of quire.sdk")


def _list_checks(name: str) -> list[Check]:
    module_name = f"{__package__}.checks_{name}"
    if importlib.util.find_spec(module_name) is None:
        return []
    module = importlib.import_module(module_name)
    functions = [f for n, f in vars(module).items() if n.startswith("check_") and inspect.isfunction(f)]
    return [f for f in functions if f.__module__ == module_name]


def _run(check: Check, cls: type) -> CheckResult:
    try:
        check(cls)
    except unittest.SkipTest as skipped:
        return CheckResult(check.__name__, "skipped", str(skipped))
    except Exception as error:
        return CheckResult(check.__name__, "failed", format_error(error, cls.__module__))
    return CheckResult(check.__name__, "passed")

import re
from pathlib import Path

import pytest

from quire.core.plugin.discovery import find_module_file
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.registry import KINDS
from quire.core.plugin.target import load_target
from quire.core.testing.conformance import checks_for, find_kind, run_checks

FOLDERS = ("adapters", "attention", "kv", "sched", "structured_output")
CHECKED = "".join(Path(__file__).parents[1].joinpath(name, "test_conformance.py").read_text() for name in FOLDERS)
"""Tests that have one for each check of the classes that they name, or of all policies."""
BUNDLED = [r for kind in KINDS for r in PluginManager().registry.list_kind(kind)]


def _id(registration):
    return f"{registration.kind}-{registration.name}"


@pytest.mark.parametrize("registration", BUNDLED, ids=_id)
def test_every_bundled_name_leads_to_a_class_that_keeps_its_contract(registration):
    assert find_module_file(registration.target.partition(":")[0])
    manager = PluginManager()
    cls = manager.load_class(registration.kind, registration.name)
    assert find_kind(cls) == registration.kind
    if registration.name == "ray":
        return  # its checks need a cluster: tests/server/ray/test_conformance.py
    if f"quire_register_{registration.kind}" in CHECKED or re.search(rf"\b{cls.__name__}\)", CHECKED):
        return
    failed = [f"{r.name}: {r.reason}" for r in run_checks(cls) if r.outcome == "failed"]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_checks_and_a_contract(kind):
    assert len(checks_for(kind)) >= 6
    assert load_target(KINDS[kind].contract).__abstractmethods__

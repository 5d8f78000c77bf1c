"""``quire.sdk`` and ``quire.testing`` are all that an author imports: complete, and light until a name is used."""

from __future__ import annotations

import importlib

import pytest

import quire
import quire.sdk
import quire.testing
from quire.core.plugin.registry import KINDS
from quire.sdk import contracts, errors, hooks, layers, ops, options


@pytest.mark.parametrize("module", [quire, quire.sdk, contracts, errors, hooks, layers, ops, options, quire.testing])
def test_every_name_is_there(module):
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert not hasattr(module, "no_such_name")


def test_the_sdk_is_its_parts():
    parts = [*contracts.__all__, *errors.__all__, *hooks.__all__, *options.__all__]
    assert sorted(quire.sdk.__all__) == sorted([*parts, "contracts", "errors", "hooks", "options"])


def test_every_contract_is_in_the_sdk():
    for kind in KINDS.values():
        module, _, name = kind.contract.partition(":")
        assert getattr(quire.sdk, name) is getattr(importlib.import_module(module), name)
        assert kind.contract_name == f"quire.sdk.{name}"
        assert sorted(importlib.import_module(module).__all__) == sorted(contracts.NAMES_OF_MODULE[module])


@pytest.mark.parametrize("module", [contracts, ops])
def test_names_are_listed_once(module):
    listed = [name for names in module.NAMES_OF_MODULE.values() for name in names]
    assert sorted(listed) == sorted(module.__all__)


def test_operations_and_layers_are_in_the_sdk():
    from quire.core import layers as core_layers
    from quire.core import ops as core_ops

    assert set(core_layers.__all__) <= set(layers.__all__)
    assert set(core_ops.__all__) <= set(ops.__all__)


def test_every_error_is_in_the_sdk():
    from quire.core import errors as defined

    assert sorted(errors.__all__) == sorted(defined.__all__)

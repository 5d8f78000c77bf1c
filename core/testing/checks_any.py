"""Checks of every plugin, whatever its kind."""

from __future__ import annotations

import dataclasses
import importlib
import unittest

from quire.core.errors import PluginError
from quire.core.plugin.options import find_options_class, parse_options
from quire.core.plugin.quarantine import class_path
from quire.core.plugin.registry import KINDS
from quire.core.plugin.signatures import find_signature_mismatch
from quire.core.plugin.target import load_target
from quire.core.testing.conformance import find_kind

__all__ = [
    "check_can_be_found_by_its_path",
    "check_has_no_shared_mutable_state",
    "check_nothing_abstract_is_left",
    "check_options_are_valid",
    "check_says_what_it_is",
    "check_signatures_accept_the_engines_calls",
]


def check_nothing_abstract_is_left(cls: type) -> None:
    """Every abstract member of the contract is written."""
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    assert not missing, f"does not implement {', '.join(missing)}"


def check_signatures_accept_the_engines_calls(cls: type) -> None:
    """Each method that the contract declares can be called with the contract's own arguments, and so can the class."""
    mismatch = find_signature_mismatch(cls, load_target(KINDS[find_kind(cls)].contract))
    assert mismatch is None, mismatch


def check_can_be_found_by_its_path(cls: type) -> None:
    """``module:Class`` leads back to the class, so that a worker process can import it."""
    assert "<locals>" not in cls.__qualname__, "is defined inside a function; define it in a module"
    module = importlib.import_module(cls.__module__)
    value: object = module
    for part in cls.__qualname__.split("."):
        value = getattr(value, part, None)
    assert value is cls, f"{class_path(cls)} is another object"


def check_says_what_it_is(cls: type) -> None:
    """It has a docstring of its own whose first line is a sentence."""
    text = cls.__dict__.get("__doc__") or ""
    assert text.strip(), "has no docstring; say in one line what it does"


def check_options_are_valid(cls: type) -> None:
    """``Options``, if any, is a frozen dataclass whose defaults are accepted and whose unknown keys are refused."""
    options = find_options_class(cls)
    if options is None:
        raise unittest.SkipTest("takes no options")
    required = [
        f.name
        for f in dataclasses.fields(options)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    assert not required, f"{', '.join(required)} have no default; a plugin works without options"
    parse_options(cls, {})
    try:
        parse_options(cls, {"no_such_option": "1"})
    except PluginError:
        return
    raise AssertionError("accepts an option that it does not have")


def check_has_no_shared_mutable_state(cls: type) -> None:
    """No list, dict or set hangs on the class, where two engines in one process would share it."""
    shared = [n for n, v in vars(cls).items() if isinstance(v, list | dict | set) and not n.startswith("__")]
    assert not shared, f"{', '.join(shared)} is shared by all instances; make it in __init__"

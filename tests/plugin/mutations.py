"""Copies of bundled plugins with one deliberate fault each: a text of the source is replaced by another."""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from dataclasses import dataclass
from types import ModuleType

from quire.core.plugin.manager import PluginManager
from quire.core.testing.conformance import CheckResult, run_check

_numbers = itertools.count()


@dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new`` in the module of a bundled plugin, and ``check`` must fail on its class."""

    plugin: str
    """KIND/NAME."""
    old: str
    new: str
    check: str

    def __str__(self) -> str:
        return f"{self.plugin}-{self.check}-{self.new.strip().splitlines()[0][:40]}"

    def make_class(self) -> type:
        """The class of the copy."""
        kind, _, name = self.plugin.partition("/")
        target = PluginManager().resolve_plugin(kind, name, announce=False).target
        module_name, _, class_name = target.partition(":")
        source = inspect.getsource(importlib.import_module(module_name))
        assert source.count(self.old) == 1, (
            f"{module_name} has {source.count(self.old)} of {self.old!r}, not one: write the mutation anew"
        )
        copy = ModuleType(f"mutated_{next(_numbers)}_{module_name.rpartition('.')[2]}")
        copy.__package__ = module_name.rpartition(".")[0]
        sys.modules[copy.__name__] = copy  # dataclasses look their module up
        exec(compile(source.replace(self.old, self.new), f"<{self}>", "exec"), copy.__dict__)
        return getattr(copy, class_name)

    def run_check(self) -> CheckResult:
        """How ``check`` ends on the copy."""
        return run_check(self.make_class(), self.check)

"""What a name resolves to, and the class behind its "module:Class", held to its contract. All that workers need."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from quire.core.config import PluginChoice
from quire.core.errors import PluginError, QuireError
from quire.core.plugin.discovery import format_error
from quire.core.plugin.import_guard import guard_import
from quire.core.plugin.options import parse_options
from quire.core.plugin.quarantine import NEVER_CONTAINED
from quire.core.plugin.registry import KINDS, PROJECT, Registration, Requirement, suggest_names
from quire.core.plugin.signatures import find_signature_mismatch

__all__ = [
    "Resolution",
    "construct_chosen",
    "construct_plugin",
    "find_missing_requirement",
    "load_target",
    "make_absolute",
    "resolve_file",
]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a name stands for. ``target`` ("module:Class") is all that a worker process needs; see ``load_target``."""

    kind: str
    name: str
    target: str
    dist: str | None
    why: str
    rejected: tuple[tuple[str, str], ...] = ()
    requires: tuple[Requirement, ...] = ()
    file: str = ""
    """``FILE.py:Class`` with the whole path, where the name was of this form."""

    @property
    def location(self) -> str:
        """What a process that runs already can import: ``FILE.py:Class``, or else the target."""
        return self.file or self.target

    def __str__(self) -> str:
        """One line for the log: the choice, why, and why not the others."""
        others = "; ".join(f"not {name}: {reason}" for name, reason in self.rejected)
        return f"{KINDS[self.kind].title}: {self.name} ({self.why}{'; ' + others if others else ''})"


def construct_chosen(choice: PluginChoice, plugin_class: Callable[..., _T], *args: Any) -> _T:
    """An object of the class of a choice, made of ``args`` and, behind them, the choice's options as the class's own
    ``Options``. Raises ``PluginError`` as ``construct_plugin`` does, ``PluginOptionError`` where it refuses them."""
    options = parse_options(cast(type, plugin_class), choice.options)
    return construct_plugin(f"{choice.kind}/{choice.name}", plugin_class, *args, options)


def construct_plugin(place: str, construct: Callable[..., _T], *args: Any, **options: Any) -> _T:
    """What ``construct`` returns. What it raises becomes a PluginError of one line that names the plugin, ``place``,
    and where ``construct`` is its class the line of its code; a ``QuireError`` is raised as it is."""
    try:
        return construct(*args, **options)
    except (*NEVER_CONTAINED, QuireError):
        raise
    except BaseException as error:
        reason = format_error(error, construct.__module__ if isinstance(construct, type) else None)
        raise PluginError(f"{place} cannot be constructed: {reason}; mend it or choose another") from error


def load_target(target: str, contract: type | str | None = None) -> type:
    """Import "module:Class" and check that it keeps its contract. Scans nothing: this is what worker processes call.

    ``contract`` is the class it must derive from, or its "module:Class". Raises PluginError on one line.
    """
    module, _, path = target.partition(":")
    if not module or not path:
        raise PluginError(f"{target!r} is not of the form module:Class; write for example my_package.policy:MyPolicy")
    try:
        resolved: Any = _import_guarded(module, target)
    except (*NEVER_CONTAINED, PluginError):
        raise
    except BaseException as error:
        reason = format_error(error, module)
        raise PluginError(f"{target}: cannot be imported: {reason}; mend it or choose another") from error
    for part in path.split("."):
        try:
            resolved = getattr(resolved, part)
        except AttributeError:
            classes = [
                name
                for name, value in vars(resolved).items()
                if inspect.isclass(value) and value.__module__ == module and not name.startswith("_")
            ]
            raise PluginError(f"{target}: {module} has no {part!r}; {suggest_names(part, classes)}") from None
    if not inspect.isclass(resolved):
        raise PluginError(f"{target}: is a {type(resolved).__name__}, not a class; name the class itself")
    if contract is not None:
        _check_contract(target, resolved, load_target(contract) if isinstance(contract, str) else contract)
    return resolved


def make_absolute(name: str) -> str:
    """``FILE.py:Class`` with the whole path of a file that is there, for a process of another working directory; any
    other name as it is."""
    file, _, class_name = name.rpartition(":")
    path = Path(file).expanduser().resolve()
    return f"{path}:{class_name}" if path.suffix == ".py" and path.is_file() else name


def resolve_file(name: str, *, anew: bool = False) -> str:
    """``module:Class`` for ``FILE.py:Class``. The folder of the file, or of the package that it is part of, becomes the
    first on ``sys.path``, which processes of the engine inherit. ``anew`` imports the file again, which may have
    changed. PluginError if there is no such file, its name is no name of a module, or it is that of another module that
    is imported."""
    file, _, class_name = name.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise PluginError(f"{name}: there is no file {path}; write FILE.py:Class, or module:Class")
    if not path.stem.isidentifier():
        raise PluginError(f"{name}: {path.stem!r} cannot be imported; give the file a name of letters, digits and '_'")
    folder, words = path.parent, [path.stem]
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        folder, words = folder.parent, [folder.name, *words]
    module = ".".join(words)
    if imported := sys.modules.get(module):
        other = getattr(imported, "__file__", None)
        if other is None or Path(other).resolve() != path:
            where = f"{module!r} is {other or 'a module of Python'} already"
            raise PluginError(f"{name}: {where}; give the file a name of its own")
    if anew:
        sys.modules.pop(module, None)
    if str(folder) not in sys.path[:1]:
        sys.path.insert(0, str(folder))
    return f"{module}:{class_name}"


def find_missing_requirement(plugin: Resolution | Registration) -> str | None:
    """The first module that ``plugin`` requires and that is not installed, as a reason and remedy. Imports nothing."""
    for need in plugin.requires:
        if importlib.util.find_spec(need.module.partition(".")[0]) is None:
            return f"needs the module {need.module!r}, which is not installed; {need.install}"
    return None


def _import_guarded(module: str, target: str) -> Any:
    if module in sys.modules or module.partition(".")[0] == PROJECT:
        return importlib.import_module(module)
    with guard_import(target):
        return importlib.import_module(module)


def _check_contract(target: str, cls: type, contract: type) -> None:
    module = "quire.sdk" if contract.__module__.startswith("quire.core.contracts.") else contract.__module__
    name = f"{module}.{contract.__qualname__}"
    if not issubclass(cls, contract):
        raise PluginError(
            f"{target}: is not a subclass of {name}; derive it from that class, or name it under its own kind"
        )
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        them = "them" if len(missing) > 1 else "it"
        raise PluginError(f"{target}: does not implement {', '.join(missing)} of {name}; write {them}")
    if mismatch := find_signature_mismatch(cls, contract):
        raise PluginError(f"{target}: {mismatch}; take the arguments of {name}")

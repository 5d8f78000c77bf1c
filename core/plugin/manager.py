"""Resolve the names of plugins, and import the classes behind them.

Discovery is not activation: an installed package changes nothing until it is named. Bundled names resolve without
looking at third-party packages at all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pluggy

from quire.core.errors import PluginError
from quire.core.plugin import builtin, hookspecs
from quire.core.plugin.discovery import (
    PluginEntryPoint,
    collect_registrations,
    format_error,
    import_entry_point,
    scan_entry_points,
)
from quire.core.plugin.quarantine import NEVER_CONTAINED, PluginInterrupt
from quire.core.plugin.registry import (
    KINDS,
    PROJECT,
    Choice,
    Kind,
    Registration,
    Registry,
    normalize_dist_name,
    suggest_names,
)
from quire.core.plugin.target import Resolution, find_missing_requirement, load_target, make_absolute, resolve_file
from quire.core.plugin.time_limit import interrupt_after
from quire.core.version import __version__

__all__ = ["IMPORT_LIMIT_S", "PluginManager"]

IMPORT_LIMIT_S = 10.0
"""Seconds that a third-party entry point that was not named may take to import before it is passed over."""

log = logging.getLogger(__name__)
_BY_CLASS = "named by its class"


class PluginManager:
    """The plugins of one process: the bundled ones, and those of the distributions in ``enabled`` (``--plugin DIST``).

    Raises PluginError if an enabled distribution is not installed, is refused, or cannot be imported.
    """

    def __init__(self, enabled: Sequence[str] = ()) -> None:
        self.registry = Registry()
        self.refused: dict[PluginEntryPoint, str] = {}
        self._pluggy = pluggy.PluginManager(PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        self._pluggy.register(builtin, PROJECT)
        self.registry.add_registrations(collect_registrations(builtin, version=__version__, file=builtin.__file__))
        self._entry_points: list[PluginEntryPoint] | None = None
        self._plugins: dict[PluginEntryPoint, Any] = {}
        self._seen: set[PluginEntryPoint] = set()
        self._announced: set[str] = set()
        for dist in enabled:
            self._enable_dist(dist)

    @property
    def hooks(self) -> pluggy.HookRelay:
        """The hooks of the bundled and the enabled plugins: ``manager.hooks.quire_extend_app(app=app)``."""
        return self._pluggy.hook

    def call_hook(self, hook: str, **arguments: Any) -> None:
        """Call ``hook`` on every one of these plugins. PluginError naming the first that raises."""
        for _ in self.iter_hook(hook, **arguments):
            pass

    def iter_hook(self, hook: str, **arguments: Any) -> Iterator[str]:
        """As ``call_hook``, one plugin after the other: the distribution of each that was called."""
        for dist, _ in self._iter_answers(hook, arguments):
            yield dist

    def unconfigure_plugins(self, limit_s: float = 5.0) -> None:
        """Call ``quire_unconfigure`` on every one of these plugins. One that raises, or does not return in ``limit_s``
        seconds, is named in the log, and the others are called all the same."""
        for implementation in reversed(self.hooks.quire_unconfigure.get_hookimpls()):
            name = (self._pluggy.get_name(implementation.plugin) or PROJECT).partition(":")[0]
            try:
                with interrupt_after(limit_s):
                    implementation.function()
            except PluginInterrupt:
                log.error("%s: quire_unconfigure did not return in %g s and was interrupted", name, limit_s)
            except NEVER_CONTAINED:
                raise
            except BaseException as error:
                log.error("%s: quire_unconfigure failed: %s", name, format_error(error), exc_info=error)

    @property
    def entry_points(self) -> list[PluginEntryPoint]:
        """Every third-party entry point installed, refused ones included. Read once; imports none."""
        if self._entry_points is None:
            self._entry_points = scan_entry_points()
        return self._entry_points

    def resolve_plugin(
        self,
        kind: str,
        name: str = "auto",
        context: Mapping[str, Any] | None = None,
        *,
        announce: bool = True,
        anew: bool = False,
    ) -> Resolution:
        """Find what ``name`` stands for: ``auto``, a name or alias, ``dist/name``, ``module:Class``
        or ``FILE.py:Class``.

        ``context`` is what ``auto`` may look at: ``device``, ``architectures``, ``hf_config`` (a mapping, or an object
        with ``to_dict``). With ``anew`` a file is imported again, which may have changed. Imports no implementation.
        The log says once what was chosen and why, unless ``announce`` is False. Raises PluginError with the closest
        known names if there is none.
        """
        kind = Kind.from_name(kind).key
        file = make_absolute(name) if ".py:" in name else ""
        name = resolve_file(file, anew=anew) if file else name
        if name.lower() == "auto":
            resolution = self._resolve_auto(kind, dict(context or {}))
        elif ":" in name:
            known = next((r for r in self.registry.list_kind(kind) if r.target == name), None)
            resolution = (
                self._make_resolution(known, _BY_CLASS)
                if known
                else Resolution(kind, name, name, None, _BY_CLASS, file=file)
            )
        else:
            why = "named" if KINDS[kind].flag else "named by config.json"
            resolution = self._make_resolution(self._find_registration(kind, name), why)
        if announce:
            self._log_once(resolution)
        return resolution

    def has_plugin(self, kind: str, name: str) -> bool:
        """Whether ``resolve_plugin`` finds ``name``."""
        try:
            self.resolve_plugin(kind, name, announce=False)
        except PluginError:
            return False
        return True

    def resolve_plugins(
        self, kind: str, names: Iterable[str] = (), context: Mapping[str, Any] | None = None
    ) -> list[Resolution]:
        """Resolve a kind of which several run at once: those that are always on, then ``names``, each target once."""
        always = [
            self._make_resolution(self._find_registration(kind, name), "always on")
            for name in Kind.from_name(kind).always
        ]
        for resolution in always:
            self._log_once(resolution)
        by_target: dict[str, Resolution] = {}
        for resolution in [*always, *(self.resolve_plugin(kind, name, context) for name in names)]:
            by_target.setdefault(resolution.target, resolution)
        return list(by_target.values())

    def load_class(self, resolution: Resolution | str, name: str | None = None) -> type:
        """Import the class behind a resolution, or behind a kind and ``name``.

        Raises PluginError if a required module is missing, the import fails, or the class breaks its contract.
        """
        if isinstance(resolution, str):
            resolution = self.resolve_plugin(resolution, name or "auto", announce=False)
        absent = find_missing_requirement(resolution)
        if absent:
            raise PluginError(f"{KINDS[resolution.kind].title} {resolution.name}: {absent}")
        return load_target(resolution.target, KINDS[resolution.kind].contract)

    def list_names(self, kind: str) -> list[str]:
        """The names known so far, bundled first, as they are written on the command line. Scans nothing."""
        return [self.registry.command_line_name(r) for r in self.registry.list_kind(kind)]

    def discover_plugins(self, dist: str | None = None, limit: float | None = IMPORT_LIMIT_S) -> None:
        """Import the third-party entry points (of ``dist``, or all) that were not imported yet, and record what they
        register.

        One that fails is put into ``refused`` with the reason and never raises here.
        """
        for entry in self.list_unseen(dist):
            try:
                plugin = import_entry_point(entry, limit)
                self.record_entry_point(entry, collect_registrations(plugin, entry.dist, entry.version, entry.file))
                self._plugins[entry] = plugin
            except PluginError as error:
                self.record_entry_point(entry, refusal=str(error))
                if dist is None:
                    log.warning("plugin passed over: %s", error)

    def list_unseen(self, dist: str | None = None) -> list[PluginEntryPoint]:
        """The third-party entry points (of ``dist``, or all) of which only the metadata has been read."""
        return [e for e in self.entry_points if e not in self._seen and (not dist or e.is_of_dist(dist))]

    def record_entry_point(
        self, entry: PluginEntryPoint, registrations: Iterable[Registration] = (), refusal: str | None = None
    ) -> None:
        """Record what an entry point registers, or why it is refused, so that it need not be imported to be listed."""
        self._seen.add(entry)
        self.registry.add_registrations(registrations)
        if refusal:
            self.refused[entry] = refusal

    def _log_once(self, resolution: Resolution) -> None:
        if str(resolution) not in self._announced:
            self._announced.add(str(resolution))
            log.info("%s", resolution)

    def _enable_dist(self, dist: str) -> None:
        entries = [e for e in self.entry_points if e.is_of_dist(dist)]
        if not entries:
            known = [e.dist for e in self.entry_points]
            remedy = f"{suggest_names(dist, known)}, or pip install it" if known else "pip install it"
            raise PluginError(f"--plugin {dist}: no installed distribution of that name has Quire plugins; {remedy}")
        self.discover_plugins(dist, limit=None)
        for entry in entries:
            if entry in self.refused:
                raise PluginError(f"--plugin {dist}: {self.refused[entry]}")
            if not self._pluggy.is_registered(self._plugins[entry]):
                self._pluggy.register(self._plugins[entry], f"{entry.dist}:{entry.name}")

    def _find_registration(self, kind: str, name: str) -> Registration:
        """The registration called ``name``; looks at third parties only if it is not bundled."""
        dist, slash, short = name.partition("/")
        if slash:
            registration = self.registry.find_in_dist(kind, dist, short)
            if registration is None and normalize_dist_name(dist) != PROJECT:
                self.discover_plugins(dist, limit=None)
                registration = self.registry.find_in_dist(kind, dist, short)
            if registration is None:
                raise self._make_unknown_error(kind, name, dist)
            return registration
        matches = self.registry.find_by_name(kind, name)
        if not matches:
            self.discover_plugins()
            matches = self.registry.find_by_name(kind, name)
        if not matches:
            raise self._make_unknown_error(kind, name)
        if len({normalize_dist_name(r.dist) for r in matches}) > 1:
            choices = " or ".join(r.qualified_name for r in matches)
            raise PluginError(f"{KINDS[kind].title} {name!r} is offered by several packages; write {choices}")
        return matches[0]

    def _make_unknown_error(self, kind: str, name: str, dist: str | None = None) -> PluginError:
        title = KINDS[kind].title
        refusals = [text for e, text in self.refused.items() if dist is None or e.is_of_dist(dist)]
        if dist and refusals:
            return PluginError(f"{title} {name!r} cannot be used: {refusals[0]}")
        known = [
            *self.list_names(kind),
            *(r.qualified_name for r in self.registry.list_kind(kind) if dist and not r.is_bundled),
        ]
        if dist and normalize_dist_name(dist) != PROJECT and not any(e.is_of_dist(dist) for e in self.entry_points):
            remedy = suggest_names(dist, [entry.dist for entry in self.entry_points])
            return PluginError(f"{title} {name!r} is not known: no package {dist!r} has Quire plugins; {remedy}")
        hint = "" if not refusals else f" ({len(refusals)} plugin(s) were refused: see quire plugins doctor)"
        if KINDS[kind].flag is None:  # no user wrote the name: the checkpoint has it, and one spelt alike is no remedy
            names = ", ".join(sorted(known))
            return PluginError(f"{title} {name!r} is not supported; supported: {names}; --plugin adds one{hint}")
        if name.endswith(".py"):
            return PluginError(f"{title} {name!r} names no class; write {name}:Class")
        aliases = [alias for r in self.registry.list_kind(kind) for alias in r.aliases]
        return PluginError(f"{title} {name!r} is not known; {suggest_names(name, known, aliases)}{hint}")

    def _resolve_auto(self, kind: str, context: dict[str, Any]) -> Resolution:
        choice, dist = None, PROJECT
        if hasattr(context.get("hf_config"), "to_dict"):
            context["hf_config"] = context["hf_config"].to_dict()
        if kind == "quant" and context.get("hf_config") is not None:
            method, dist = self._first_answer("quire_detect_quantization", hf_config=context["hf_config"])
            choice = Choice(method, "the checkpoint's quantization_config") if method else None
        if choice is None:
            choice, dist = self._first_answer("quire_choose_default", kind=kind, config=context)
        if choice is None:
            title, flag = KINDS[kind].title, KINDS[kind].flag
            remedy = f"name one with {flag}" if flag else "the checkpoint's config.json must name one"
            raise PluginError(f"{title} 'auto': nothing to choose by; {remedy}: {', '.join(self.list_names(kind))}")
        if isinstance(choice, str):
            choice = Choice(choice)
        registration = self._find_registration(kind, choice.name)
        by = "" if dist == PROJECT else f" by {dist}"
        reasons = [(n, choice.rejected[n]) for n in self.list_names(kind) if n in choice.rejected]
        rejected = tuple((n, why) for n, why in reasons if n != registration.name)
        return self._make_resolution(registration, f"auto{by}" + (f": {choice.why}" if choice.why else ""), rejected)

    def _first_answer(self, hook: str, **arguments: Any) -> tuple[Any, str]:
        """The first answer to ``hook`` that is not None, and the distribution that gave it."""
        answers = ((answer, dist) for dist, answer in self._iter_answers(hook, arguments) if answer is not None)
        return next(answers, (None, PROJECT))

    def _iter_answers(self, hook: str, arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """Call one plugin after another, so that the one that raises can be named."""
        for plugin in [impl.plugin for impl in reversed(getattr(self.hooks, hook).get_hookimpls())]:
            dist = (self._pluggy.get_name(plugin) or PROJECT).partition(":")[0]
            others = [p for p in self._pluggy.get_plugins() if p is not plugin]
            try:
                answer = self._pluggy.subset_hook_caller(hook, others)(**arguments)
            except NEVER_CONTAINED:
                raise
            except BaseException as error:
                raise PluginError(f"{dist}: {hook} failed: {format_error(error)}; leave out --plugin {dist}") from error
            yield dist, answer

    @staticmethod
    def _make_resolution(r: Registration, why: str, rejected: tuple[tuple[str, str], ...] = ()) -> Resolution:
        return Resolution(r.kind, r.name, r.target, r.dist, why, rejected, r.requires)

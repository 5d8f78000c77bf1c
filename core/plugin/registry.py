"""The table of kinds, registrations, and the registry in which names are looked up. Imports no implementation."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from quire.core.errors import PluginError

__all__ = [
    "API_MAJOR",
    "GROUP",
    "KINDS",
    "OPERATIONS",
    "PROJECT",
    "Choice",
    "Kind",
    "Registrar",
    "Registration",
    "Registry",
    "Requirement",
    "normalize_dist_name",
    "suggest_names",
]


PROJECT = "quire"
"""The distribution that the bundled plugins come from."""
API_MAJOR = 1
"""Major version of the plugin API."""
GROUP = f"{PROJECT}.v{API_MAJOR}"
"""The entry-point group in which a distribution names its plugins."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of plugin, and everything that is named after it."""

    key: str
    """In the hook ``quire_register_<key>``, in ``KIND/NAME``, and the contract's module in ``quire.core.contracts``."""
    title: str
    folder: str
    """Where the bundled ones live."""
    contract_class: str
    flag: str | None
    """The flag that chooses an implementation; None: the checkpoint chooses."""
    aliases: tuple[str, ...] = ()
    """Other names of the kind; those with dashes in front are flags too."""
    always: tuple[str, ...] = ()
    """Implementations that are on without being chosen."""
    several: bool = False
    """Whether several are on at once: the flag may repeat, and an option is called ``NAME.key``."""

    @property
    def contract(self) -> str:
        """The contract as "module:Class"."""
        return f"quire.core.contracts.{self.key}:{self.contract_class}"

    @property
    def contract_name(self) -> str:
        """The contract as its author imports it."""
        return f"quire.sdk.{self.contract_class}"

    @property
    def option_flag(self) -> str | None:
        """The flag that passes ``key=value`` to the chosen implementation, such as ``--sampler-option``."""
        return None if self.flag is None else f"{self.flag.removesuffix('-method')}-option"

    @staticmethod
    def from_name(text: str) -> Kind:
        """The kind called ``text``: its key, title, flag or an alias, dashes aside. PluginError if there is none."""
        normalized = normalize_name(text.lstrip("-"))
        for kind in KINDS.values():
            names = (kind.key, kind.title.replace(" ", "-"), kind.flag or kind.key, *kind.aliases)
            if normalized in {normalize_name(name.lstrip("-")) for name in names}:
                return kind
        raise PluginError(f"{text!r} is not a kind of plugin; {suggest_names(text, KINDS)}")


_TABLE = (
    # key                    title                folder                 contract               flag
    Kind("attention",        "attention backend", "plugins/attention",   "AttentionBackend",    "--attention-backend"),
    Kind("kv",               "KV allocator",      "plugins/kv",          "KVAllocator",         "--kv-allocator"),
    Kind("policy",           "scheduling policy", "plugins/sched",       "BatchingPolicy",      "--scheduling-policy",
         aliases=("--scheduler", "batching-policy")),
    Kind("quant",            "quantization",      "plugins/quant",       "QuantizationLoader",  "--quantization"),
    Kind("model",            "model",             "plugins/models",      "Model",               None),
    Kind("sampler",          "sampler",           "core/sample",         "Sampler",             "--sampler"),
    Kind("logits_processor", "logits processor",  "plugins/logits",      "LogitsProcessor",     "--logits-processor",
         several=True, always=("min_tokens", "logit_bias", "allowed_token_ids", "bad_words")),
    Kind("spec_decode",      "draft proposer",    "plugins/spec_decode", "SpeculativeProposer", "--spec-method"),
    Kind("structured_output", "structured output", "plugins/structured_output", "StructuredOutputBackend",
         "--structured-output-backend", aliases=("--guided-decoding-backend",)),
    Kind("adapter",          "adapter method",    "plugins/adapters",    "AdapterMethod",       "--adapter-method"),
    Kind("executor",         "executor",          "core/worker",         "Executor",            "--executor",
         aliases=("--distributed-executor-backend",)),
    Kind("metrics",          "metrics exporter",  "plugins/metrics",     "MetricsExporter",     "--metrics",
         several=True),
    Kind("tool_parser",      "tool-call parser",  "plugins/parsers",     "ToolParser",          "--tool-call-parser"),
    Kind("reasoning_parser", "reasoning parser",  "plugins/parsers",     "ReasoningParser",     "--reasoning-parser"),
    Kind("op",               "operation",         "core/ops",            "Operations",          "--op", several=True),
    Kind("quantizer",        "quantizer",         "plugins/quantizer",   "Quantizer",           "--method"),
    Kind("router",           "router",            "plugins/router",      "Router",              "--router"),
)  # fmt: skip
KINDS: Mapping[str, Kind] = MappingProxyType({kind.key: kind for kind in _TABLE})
"""Every kind by its key: the one place where kind, folder, contract and flag meet."""
OPERATIONS = ("rms_norm", "silu_and_mul", "rope_and_cache", "embedding", "lm_head")
"""The names of ``--op``: methods of ``quire.sdk.Operations``."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """A top-level module that must be importable before the target is, and the command that provides it."""

    module: str
    install: str


@dataclass(frozen=True, slots=True)
class Registration:
    """One implementation by name. ``dist`` is "quire" for bundled ones; ``file`` is where the plugin was found."""

    kind: str
    name: str
    target: str
    summary: str
    requires: tuple[Requirement, ...] = ()
    aliases: tuple[str, ...] = ()
    dist: str = PROJECT
    version: str = ""
    file: str | None = None

    @property
    def is_bundled(self) -> bool:
        """Whether it comes with Quire itself."""
        return self.dist == PROJECT

    @property
    def qualified_name(self) -> str:
        """``dist/name``: the name that can clash with nothing."""
        return f"{self.dist}/{self.name}"


@dataclass(frozen=True, slots=True)
class Choice:
    """What ``auto`` means: a name, why, and for each other name why not."""

    name: str
    why: str = ""
    rejected: Mapping[str, str] = field(default_factory=dict)


class Registrar:
    """The ``register`` that a plugin's hook is called with: collects registrations, and refuses malformed calls."""

    def __init__(self, kind: str, dist: str = PROJECT, version: str = "", file: str | None = None) -> None:
        self._kind, self._dist, self._version, self._file = kind, dist, version, file
        self.registrations: list[Registration] = []

    def __call__(
        self,
        name: str,
        target: str,
        summary: str,
        *,
        requires: Sequence[str | Requirement] = (),
        aliases: Sequence[str] = (),
    ) -> None:
        """Name the class ``target`` ("module:Class"). ``requires``: top-level modules. PluginError if malformed."""
        for each in (name, *aliases):
            if not isinstance(each, str) or not _NAME.fullmatch(each) or normalize_name(each) == "auto":
                raise PluginError(f"{each!r} cannot be a name; use letters, digits, '_', '-' and '.', and not 'auto'")
        taken = {normalize_name(n): r.name for r in self.registrations for n in (r.name, *r.aliases)}
        duplicate = next((n for n in (name, *aliases) if normalize_name(n) in taken), None)
        if duplicate is not None:
            owner = taken[normalize_name(duplicate)]
            raise PluginError(f"{name}: {duplicate!r} is registered already, by {owner}; choose another name")
        if not isinstance(target, str) or not _TARGET.fullmatch(target):
            raise PluginError(f"{name}: target {target!r} is not of the form 'module:Class'; write it as a string")
        if not isinstance(summary, str) or not summary.strip() or "\n" in summary:
            raise PluginError(f"{name}: summary {summary!r} must be one line that says what it is")
        requirements = tuple(r if isinstance(r, Requirement) else Requirement(r, f"pip install {r}") for r in requires)
        self.registrations.append(
            Registration(
                self._kind,
                name,
                target,
                summary,
                requirements,
                tuple(aliases),
                dist=self._dist,
                version=self._version,
                file=self._file,
            )
        )


class Registry:
    """All registrations of one process. Bundled ones are added first and keep their names whatever comes later."""

    def __init__(self) -> None:
        self._registrations: list[Registration] = []

    def add_registrations(self, registrations: Iterable[Registration]) -> None:
        """Add what one plugin registered."""
        self._registrations.extend(r for r in registrations if r not in self._registrations)

    def list_kind(self, kind: str) -> list[Registration]:
        """Every registration of ``kind``: bundled ones first, then in the order in which they were added."""
        return [r for r in self._registrations if r.kind == kind]

    def find_by_name(self, kind: str, name: str) -> list[Registration]:
        """What ``name`` stands for, as a name or an alias: a bundled one alone, else that of every third party."""
        normalized = normalize_name(name)
        matches = [r for r in self.list_kind(kind) if normalized in _normalized_names(r)]
        return [r for r in matches if r.is_bundled][:1] or matches

    def find_in_dist(self, kind: str, dist: str, name: str) -> Registration | None:
        """The implementation that ``dist`` calls ``name``."""
        normalized = normalize_name(name)
        of_dist = [r for r in self.list_kind(kind) if normalize_dist_name(r.dist) == normalize_dist_name(dist)]
        return next((r for r in of_dist if normalized in _normalized_names(r)), None)

    def find_clash(self, registration: Registration) -> Registration | None:
        """Another distribution's registration that keeps this one from its plain name, if any."""
        if registration.is_bundled:
            return None
        others = self.find_by_name(registration.kind, registration.name)
        return next((r for r in others if normalize_dist_name(r.dist) != normalize_dist_name(registration.dist)), None)

    def command_line_name(self, registration: Registration) -> str:
        """The name to write on the command line: the plain one, or ``dist/name`` where it clashes."""
        return registration.qualified_name if self.find_clash(registration) else registration.name


def normalize_name(name: str) -> str:
    """The form in which names are compared: case, '-' and '_' make no difference."""
    return name.replace("-", "_").lower()


def normalize_dist_name(dist: str) -> str:
    """The name of a distribution as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", dist).lower()


def suggest_names(name: str, known: Iterable[str], also: Iterable[str] = ()) -> str:
    """The remedy for an unknown name: the closest of ``known`` and ``also`` (aliases), or else all of ``known``."""
    names = list(dict.fromkeys(known))
    by_fold: dict[str, list[str]] = {}
    for each in (*also, *names):
        # Of ``dist/name`` the second half alone is compared with a name that has no first one.
        compared = each if "/" in name else each.rpartition("/")[2]
        by_fold.setdefault(normalize_name(compared), []).append(each)
    close = difflib.get_close_matches(normalize_name(name), list(by_fold), n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(each for fold in close for each in dict.fromkeys(by_fold[fold])) + "?"
    return "choose from " + ", ".join(names) if names else "there are none"


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def _normalized_names(registration: Registration) -> set[str]:
    return {normalize_name(n) for n in (registration.name, *registration.aliases)}

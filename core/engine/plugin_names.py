"""The plugins that a user names and whose choice needs no model: resolved first, so that what is misspelt is refused
before anything is downloaded, or even torch imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from quire.core.config import PluginChoice
from quire.core.engine.args import EngineArgs
from quire.core.engine.plugin_choices import PluginChooser
from quire.core.engine.speculative import spread_speculative_config
from quire.core.errors import ConfigError
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.options import check_options_by_source, list_option_values, parse_options
from quire.core.plugin.registry import KINDS, suggest_names
from quire.core.plugin.source import read_options
from quire.core.structured_outputs import split_backend_name

__all__ = [
    "PARALLEL_SIZES",
    "FirstChoices",
    "check_names",
    "translate_structured_backend",
]

PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size")
"""Arguments that say how many GPUs share the model."""
_LIGHT_KINDS = ("kv", "policy")
"""Kinds whose contract is imported without torch."""
_CHOSEN_BY_MODEL: Mapping[str, str] = MappingProxyType(
    {
        "attention": "attention_backend",
        "quant": "quantization",
        "tool_parser": "tool_call_parser",
        "reasoning_parser": "reasoning_parser",
    }
)
"""Kinds whose ``auto`` looks at the model, and the argument that names one."""
_BACKENDS_OF_VLLM = ("outlines", "lm-format-enforcer", "guidance", "xgrammar")


def check_names(args: EngineArgs) -> None:
    """Raise the ``QuireError`` of ``build_config`` for names that it would refuse, and for wrong options of the plugins
    that are named: without torch, so that who misspelt one hears of it at once."""
    args = translate_structured_backend(spread_speculative_config(args)[0])
    first = FirstChoices.make(args)
    plugins, choices = first.plugins, [*first.choices.values()]
    choices += [first.chooser.choose(kind, name, first.context) for kind, name in _list_named_for_model(args).items()]
    for kind in (*_CHOSEN_BY_MODEL, "spec_decode"):
        if kind not in {choice.kind for choice in choices}:
            _check_options_of_any(plugins, kind, list_option_values(args.plugin_options.get(kind, {})))
    for choice in choices:
        if find_spec(choice.target.partition(":")[0].partition(".")[0]) is None:
            plugins.load_class(choice.kind, choice.target)  # raises
        if choice.kind in _LIGHT_KINDS:
            parse_options(plugins.load_class(choice.kind, choice.target), choice.options)
        elif choice.options or not choice.is_bundled:
            check_options_by_source(choice.target, choice.options)


def _check_options_of_any(plugins: PluginManager, kind: str, options: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for an option that no plugin of ``kind`` has: which of them ``auto`` means is not known."""
    owners = {
        option.name: registration.name
        for registration in plugins.registry.list_kind(kind)
        for option in read_options(registration.target) or ()
    }
    for key in options:
        if key.replace("-", "_") not in owners:
            known = f"of those of {', '.join(sorted(set(owners.values())))}, {suggest_names(key, owners)}"
            reason = f"no {KINDS[kind].title} has an option of that name"
            raise ConfigError(f"{KINDS[kind].option_flag} {key}: {reason}{f'; {known}' if owners else ''}")


@dataclass(frozen=True, slots=True)
class FirstChoices:
    """What is chosen before the model is known, and with what the rest is."""

    plugins: PluginManager
    chooser: PluginChooser
    context: dict[str, Any]
    """What ``auto`` may look at: device and numbers of GPUs, and the model once that is known."""
    choices: dict[str, PluginChoice]
    """The kinds whose choice does not depend on the model."""

    @classmethod
    def make(cls, args: EngineArgs) -> FirstChoices:
        """Names of the other kinds are looked up too. Raises a ``QuireError`` for one that is not known."""
        plugins = PluginManager(args.plugins)
        chooser = PluginChooser(plugins, args.plugin_options)
        context = {"device": args.device} | {name: getattr(args, name) for name in PARALLEL_SIZES}
        return cls(plugins, chooser, context, _choose_before_model(plugins, chooser, args, context))


def _choose_before_model(
    plugins: PluginManager, chooser: PluginChooser, args: EngineArgs, context: dict[str, Any]
) -> dict[str, PluginChoice]:
    choices: dict[str, PluginChoice] = {}
    for kind, names, default in (("logits_processor", args.logits_processors, None), ("metrics", args.metrics, "auto")):
        for i, choice in enumerate(chooser.choose_several(kind, names, context, default)):
            choices[f"{kind}:{i:03d}"] = choice
    if args.op:
        choices |= {f"op:{name}": choice for name, choice in chooser.choose_operations(list(args.op), context).items()}
    for kind, name in (
        ("kv", args.kv_allocator),
        ("policy", args.scheduling_policy),
        ("sampler", args.sampler),
        ("structured_output", args.structured_output_backend),
        ("adapter", args.adapter_method),
        ("executor", args.executor),
    ):
        choices[kind] = chooser.choose(kind, name, context)
    fallbacks = [("policy", "fcfs"), ("kv", "paged")]
    fallbacks += [] if choices["sampler"].is_bundled else [("sampler", "gumbel")]
    for kind, name in fallbacks:
        fallback = plugins.resolve_plugin(kind, name, context, announce=False)
        choices[f"{kind}_fallback"] = PluginChoice(kind, fallback.name, fallback.target, is_bundled=True)
    for kind, name in _list_named_for_model(args).items():
        plugins.resolve_plugin(kind, name, context, announce=False)
    return choices


def _list_named_for_model(args: EngineArgs) -> dict[str, str]:
    """By kind, the names given of those whose ``auto`` needs the model."""
    names = {kind: getattr(args, setting) for kind, setting in _CHOSEN_BY_MODEL.items()}
    names["spec_decode"] = "auto" if args.spec_method == "none" else args.spec_method
    return {kind: name for kind, name in names.items() if name != "auto"}


def translate_structured_backend(args: EngineArgs) -> EngineArgs:
    """With what takes the place of a structured-output backend that vLLM has by this name, and with the options that
    stand behind its colon. Raises ``ConfigError`` for others."""
    name = args.structured_output_backend
    if not isinstance(name, str) or name.partition(":")[0] not in (*_BACKENDS_OF_VLLM, "auto", "llguidance"):
        return args
    try:
        base, fields = split_backend_name(name)
    except ValueError as error:
        raise ConfigError(f"structured_output_backend={name!r}: {error}") from None
    options = list_option_values(args.plugin_options.get("structured_output", {}))
    # There is no other backend to fall back to.
    options |= dict.fromkeys((field for field in fields if field != "disable_fallback"), True)
    has_xgrammar = base == "xgrammar" and find_spec("xgrammar") is not None
    backend = base if base == "auto" or has_xgrammar else "llguidance"
    plugin_options = {**args.plugin_options, "structured_output": options} if options else args.plugin_options
    return replace(args, structured_output_backend=backend, plugin_options=plugin_options)

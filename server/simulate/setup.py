"""From names on the command line to what a simulated engine is built from."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from quire.core.errors import ConfigError
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.options import parse_options, split_key_values
from quire.server.simulate.drafts import SimulatedDrafts, measure_acceptance
from quire.server.simulate.simulation import EngineSetup
from quire.server.simulate.step_model import EngineLimits, StepTimeModel, load_step_model
from quire.server.traces.recording import read_recording

__all__ = ["PluginSpec", "list_policies", "make_drafts", "make_limits", "make_setup", "resolve_spec"]


@dataclass(frozen=True, slots=True)
class PluginSpec:
    """A plugin as ``NAME,key=value,key=value``, resolved; its options are valid."""

    text: str
    name: str
    target: str
    options: dict[str, str] = field(default_factory=dict)
    make: Callable[[], Any] = field(repr=False, default=lambda: None)
    """A new instance, with these options."""


def resolve_spec(kind: str, text: str, plugins: PluginManager) -> PluginSpec:
    """Raises ``PluginError`` for an unknown name or option."""
    name, *pairs = text.split(",")
    resolution = plugins.resolve_plugin(kind, name.strip(), {"device": "cpu"}, announce=False)
    options = split_key_values(pairs, f"option of {kind} {name}")
    cls = plugins.load_class(resolution)
    parse_options(cls, options)
    return PluginSpec(text, resolution.name, resolution.target, options, lambda: cls(parse_options(cls, options)))


def make_limits(model: StepTimeModel, args: argparse.Namespace) -> EngineLimits:
    """The limits of the step model, with what the command line changes. Raises ``ConfigError``."""
    changes = {
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "num_blocks": args.num_gpu_blocks_override,
        "max_model_len": args.max_model_len,
        "chunked_prefill": args.enable_chunked_prefill,
    }
    limits = msgspec.structs.replace(model.limits, **{k: v for k, v in changes.items() if v is not None})
    for name in ("max_num_seqs", "max_num_batched_tokens", "num_blocks", "max_model_len"):
        if getattr(limits, name) < 2 - (name == "max_num_seqs"):
            raise ConfigError(f"{name} {getattr(limits, name)} is too small to serve anything; raise it")
    if limits.max_num_batched_tokens < limits.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {limits.max_num_batched_tokens} is less than --max-num-seqs "
            f"{limits.max_num_seqs}; each running request needs a token a step: raise the one or lower the other"
        )
    return limits


def make_setup(args: argparse.Namespace, policy: PluginSpec, plugins: PluginManager) -> EngineSetup:
    """What replicas with ``policy`` are built from."""
    model = load_step_model(args.step_model)
    fallback = resolve_spec("policy", "fcfs", plugins)
    allocator = plugins.load_class(plugins.resolve_plugin("kv", "auto", {"device": "cpu"}, announce=False))
    return EngineSetup(
        model=model,
        limits=make_limits(model, args),
        make_policy=policy.make,
        make_fallback=fallback.make,
        allocator_class=allocator,
        policy_name=policy.text,
        policy_target=policy.target,
        policy_options=policy.options,
        prefix_caching=args.enable_prefix_caching,
        skip_equal_steps=not args.every_step,
        drafts=make_drafts(args),
    )


def make_drafts(args: argparse.Namespace) -> SimulatedDrafts | None:
    """The drafts that the command line asks for, if any. Raises ``ConfigError``."""
    count, acceptance = args.num_speculative_tokens, args.draft_acceptance
    if count is None:
        if acceptance is not None:
            raise ConfigError("--draft-acceptance is of drafts: say how many with --num-speculative-tokens")
        return None
    if not 1 <= count <= 64:
        raise ConfigError(f"--num-speculative-tokens must be between 1 and 64, got {count}")
    if acceptance is None:
        try:
            acceptance = measure_acceptance(read_recording(Path(args.trace)))
        except ConfigError as error:
            raise ConfigError(f"--draft-acceptance is missing, and no recording tells it: {error}") from None
    if not 0 <= acceptance <= 1:
        raise ConfigError(f"--draft-acceptance is a share, 0 to 1, got {acceptance:g}")
    return SimulatedDrafts(count, acceptance, args.seed)


def list_policies(texts: Sequence[str], plugins: PluginManager) -> list[PluginSpec]:
    """The policies of ``--policy``. Raises ``PluginError`` for the first that is not there."""
    return [resolve_spec("policy", text, plugins) for text in texts]

"""Spellings from older guides: accepted and mapped, harmless and noted, or refused with what is supported now."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from quire.core.errors import ConfigError

__all__ = ["OLD_FLAGS", "OldFlag", "add_old_flags", "apply_old_flags", "normalize"]


@dataclass(frozen=True, slots=True)
class OldFlag:
    """A flag that Quire understands but does not document as its own.

    ``says`` is logged once, or is the reason of the refusal. Values in ``harmless`` are let through all the same.
    """

    name: str
    says: str
    refused: bool = False
    takes_value: bool = False
    harmless: tuple[str, ...] = ()
    sets: tuple[str, object] | None = None


_LORA = "LoRA adapters are not supported yet; serve a merged checkpoint"
_TOOLS = "tool calls are not parsed yet; tools are passed to the chat template and the answer comes as text"
_GUIDED = "structured output is not supported yet; leave it out"
_REASONING = "reasoning is not parsed yet; the answer comes as text"
_RAY = "Ray is not supported yet; the engine runs in one process"
_ALWAYS = "no longer needed: "

OLD_FLAGS: tuple[OldFlag, ...] = (
    OldFlag("--enable-log-requests", "now --no-disable-log-requests", sets=("disable_log_requests", False)),
    OldFlag("--enable-prometheus", _ALWAYS + "metrics are always served at /metrics"),
    OldFlag("--swap-space", _ALWAYS + "preempted requests are recomputed, not swapped", takes_value=True),
    OldFlag("--disable-log-stats", _ALWAYS + "see /metrics"),
    OldFlag("--use-v2-block-manager", _ALWAYS + "there is one block manager"),
    OldFlag("--num-scheduler-steps", _ALWAYS + "scheduling is always ahead of the device", takes_value=True),
    OldFlag("--async-scheduling", _ALWAYS + "scheduling is always asynchronous"),
    OldFlag("--max-seq-len-to-capture", _ALWAYS + "graphs do not depend on the context length", takes_value=True),
    OldFlag("--disable-frontend-multiprocessing", _ALWAYS + "the engine core has a process of its own"),
    OldFlag(
        "--distributed-executor-backend", _RAY, refused=True, takes_value=True, harmless=("mp", "uni", "auto")
    ),
    OldFlag("--worker-use-ray", _RAY, refused=True),
    OldFlag(
        "--pipeline-parallel-size", "pipeline parallelism is not supported yet; 1 is the only size", refused=True,
        takes_value=True, harmless=("1",),
    ),
    OldFlag("--enable-lora", _LORA, refused=True),
    OldFlag("--lora-modules", _LORA, refused=True, takes_value=True),
    OldFlag("--max-lora-rank", _LORA, refused=True, takes_value=True),
    OldFlag("--max-loras", _LORA, refused=True, takes_value=True),
    OldFlag("--enable-auto-tool-choice", _TOOLS, refused=True),
    OldFlag("--tool-call-parser", _TOOLS, refused=True, takes_value=True),
    OldFlag("--reasoning-parser", _REASONING, refused=True, takes_value=True),
    OldFlag("--guided-decoding-backend", _GUIDED, refused=True, takes_value=True),
)  # fmt: skip


def add_old_flags(parser: argparse.ArgumentParser) -> None:
    """Let the parser understand them, without showing them in ``--help``."""
    for old in OLD_FLAGS:
        if old.takes_value:
            count: int | str = "+" if old.refused and not old.harmless else 1
            parser.add_argument(old.name, dest=_dest(old), nargs=count, help=argparse.SUPPRESS)
        else:
            parser.add_argument(old.name, dest=_dest(old), action="store_true", default=None, help=argparse.SUPPRESS)


def apply_old_flags(args: argparse.Namespace) -> list[str]:
    """Map what was given onto today's flags, in ``args``; returns the lines to log. ConfigError for a refused one."""
    notes = []
    for old in OLD_FLAGS:
        value = getattr(args, _dest(old), None)
        if value is None:
            continue
        shown = old.name if value is True else f"{old.name} {' '.join(value)}"
        if old.harmless and value is not True and set(value) <= set(old.harmless):
            notes.append(f"{shown}: {_ALWAYS}it is the default")
            continue
        if old.refused:
            raise ConfigError(f"{shown}: {old.says}")
        if old.sets is not None and getattr(args, old.sets[0], None) is None:
            setattr(args, *old.sets)
        notes.append(f"{shown}: {old.says}")
    return notes


def normalize(argv: Sequence[str], booleans: frozenset[str]) -> tuple[list[str], list[str]]:
    """Rewrite ``--some_flag`` as ``--some-flag``, and ``--flag=False`` of a boolean flag as ``--no-flag``.

    Returns the new command line and the lines to log.
    """
    result: list[str] = []
    notes: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*result, word, *rest], notes
        if not word.startswith("--"):
            result.append(word)
            continue
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        if dashed != name:
            notes.append(f"{name}: now written {dashed}")
        if dashed in booleans and not equals and rest and rest[0].lower() in ("true", "false"):
            equals, value = "=", rest.pop(0)
        if dashed in booleans and equals:
            plain = _without_value(dashed, value)
            notes.append(f"{name} {value}: now written {plain}")
            result.append(plain)
        else:
            result.append(dashed + equals + value)
    return result, notes


def _without_value(name: str, value: str) -> str:
    if value.lower() in ("true", "1"):
        return name
    if value.lower() in ("false", "0"):
        return f"--no-{name[2:]}"
    raise ConfigError(f"{name}: {value!r} is neither true nor false; write {name} or --no-{name[2:]}")


def _dest(old: OldFlag) -> str:
    return "old_" + old.name[2:].replace("-", "_")

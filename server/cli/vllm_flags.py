"""vLLM's flags and spellings that Quire does not have: mapped to its own, ignored with a line, or refused with the
reason."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from quire.core.errors import ConfigError

__all__ = ["VLLM_FLAGS", "VllmFlag", "add_vllm_flags", "apply_vllm_flags", "find_boolean_flags", "normalize_spelling"]


@dataclass(frozen=True, slots=True)
class VllmFlag:
    """A flag of vLLM's that Quire understands and that is not its own.

    ``message`` is logged once, or is the reason of the refusal. A refused flag is accepted with ``accepted_values``,
    which ask for what Quire does.
    """

    name: str
    message: str
    refused: bool = False
    takes_value: bool = False
    accepted_values: tuple[str, ...] = ()
    sets: tuple[str, object] | None = None


_LORA = "LoRA adapters are not supported yet; serve a merged checkpoint"
_TOOLS = "tool calls are not parsed yet; tools are passed to the chat template and the answer comes as text"
_GUIDED = "structured output is not supported yet; leave it out"
_REASONING = "reasoning is not parsed yet; the answer comes as text"
_RAY = "Ray is not supported yet; the engine runs in one process"
_NOT_NEEDED = "no longer needed: "

VLLM_FLAGS: tuple[VllmFlag, ...] = (
    VllmFlag("--enable-log-requests", "now --no-disable-log-requests", sets=("disable_log_requests", False)),
    VllmFlag("--enable-prometheus", _NOT_NEEDED + "metrics are always served at /metrics"),
    VllmFlag("--swap-space", _NOT_NEEDED + "preempted requests are recomputed, not swapped", takes_value=True),
    VllmFlag("--disable-log-stats", _NOT_NEEDED + "see /metrics"),
    VllmFlag("--use-v2-block-manager", _NOT_NEEDED + "there is one block manager"),
    VllmFlag("--num-scheduler-steps", _NOT_NEEDED + "scheduling is always ahead of the device", takes_value=True),
    VllmFlag("--async-scheduling", _NOT_NEEDED + "scheduling is always asynchronous"),
    VllmFlag("--max-seq-len-to-capture", _NOT_NEEDED + "graphs do not depend on the context length", takes_value=True),
    VllmFlag("--disable-frontend-multiprocessing", _NOT_NEEDED + "the engine core has a process of its own"),
    VllmFlag(
        "--distributed-executor-backend", _RAY, refused=True, takes_value=True, accepted_values=("mp", "uni", "auto")
    ),
    VllmFlag("--worker-use-ray", _RAY, refused=True),
    VllmFlag(
        "--pipeline-parallel-size", "pipeline parallelism is not supported yet; 1 is the only size", refused=True,
        takes_value=True, accepted_values=("1",),
    ),
    VllmFlag("--enable-lora", _LORA, refused=True),
    VllmFlag("--lora-modules", _LORA, refused=True, takes_value=True),
    VllmFlag("--max-lora-rank", _LORA, refused=True, takes_value=True),
    VllmFlag("--max-loras", _LORA, refused=True, takes_value=True),
    VllmFlag("--enable-auto-tool-choice", _TOOLS, refused=True),
    VllmFlag("--tool-call-parser", _TOOLS, refused=True, takes_value=True),
    VllmFlag("--reasoning-parser", _REASONING, refused=True, takes_value=True),
    VllmFlag("--guided-decoding-backend", _GUIDED, refused=True, takes_value=True),
)  # fmt: skip


def add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    """Let the parser understand them, without showing them in ``--help``."""
    for flag in VLLM_FLAGS:
        if flag.takes_value:
            count: int | str = "+" if flag.refused and not flag.accepted_values else 1
            parser.add_argument(flag.name, dest=_dest(flag), nargs=count, help=argparse.SUPPRESS)
        else:
            parser.add_argument(flag.name, dest=_dest(flag), action="store_true", default=None, help=argparse.SUPPRESS)


def apply_vllm_flags(args: argparse.Namespace) -> list[str]:
    """Set in ``args`` what vLLM's flags mean here; returns the lines to log. ConfigError for a refused one."""
    messages = []
    for flag in VLLM_FLAGS:
        value = getattr(args, _dest(flag), None)
        if value is None:
            continue
        shown = flag.name if value is True else f"{flag.name} {' '.join(value)}"
        if flag.accepted_values and value is not True and set(value) <= set(flag.accepted_values):
            messages.append(f"{shown}: {_NOT_NEEDED}it is the default")
            continue
        if flag.refused:
            raise ConfigError(f"{shown}: {flag.message}")
        if flag.sets is not None and getattr(args, flag.sets[0], None) is None:
            setattr(args, *flag.sets)
        messages.append(f"{shown}: {flag.message}")
    return messages


def normalize_spelling(argv: Sequence[str], booleans: frozenset[str]) -> tuple[list[str], list[str]]:
    """Rewrite ``--some_flag`` as ``--some-flag``, and ``--flag=False`` of a boolean flag as ``--no-flag``.

    Returns the new command line and the lines to log.
    """
    result: list[str] = []
    messages: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*result, word, *rest], messages
        if not word.startswith("--"):
            result.append(word)
            continue
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        if dashed != name:
            messages.append(f"{name}: now written {dashed}")
        if dashed in booleans and not equals and rest and rest[0].lower() in ("true", "false"):
            equals, value = "=", rest.pop(0)
        if dashed in booleans and equals:
            plain = _boolean_flag(dashed, value)
            messages.append(f"{name} {value}: now written {plain}")
            result.append(plain)
        else:
            result.append(dashed + equals + value)
    return result, messages


def find_boolean_flags(parser: argparse.ArgumentParser) -> frozenset[str]:
    """The flags of a parser that may be negated with ``--no-``."""
    actions = [action for action in parser._actions if isinstance(action, argparse.BooleanOptionalAction)]
    return frozenset(name for each in actions for name in each.option_strings if not name.startswith("--no-"))


def _boolean_flag(name: str, value: str) -> str:
    if value.lower() in ("true", "1"):
        return name
    if value.lower() in ("false", "0"):
        return f"--no-{name[2:]}"
    raise ConfigError(f"{name}: {value!r} is neither true nor false; write {name} or --no-{name[2:]}")


def _dest(flag: VllmFlag) -> str:
    return "vllm_" + flag.name[2:].replace("-", "_")

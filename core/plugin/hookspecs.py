"""Every hook of Quire, on one page. Hooks run when a process starts, never inside a step.

A plugin is a module (or an object) that defines some of these functions, marked with ``quire.sdk.hookimpl``, and an
entry point in the group ``quire.v1`` that names it. A hook may declare fewer arguments than listed here. Minor versions
only add hooks and arguments; the major is in the name of the group.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import pluggy

from quire.core.plugin.registry import PROJECT, Choice, Registrar

__all__ = ["hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

# ---- Registration. Called once per process: for bundled plugins at start, for others only when a name is not bundled
# ---- or ``--plugin`` names their distribution. For each implementation, call ``register(name, "module:Class", summary,
# ---- requires=(), aliases=())``, and import nothing heavy. Each returns None, and the result is ignored.


@hookspec
def quire_register_attention(register: Registrar) -> None:
    """Name attention backends: subclasses of ``quire.sdk.AttentionBackend``."""


@hookspec
def quire_register_kv(register: Registrar) -> None:
    """Name KV allocators: subclasses of ``quire.sdk.KVAllocator``."""


@hookspec
def quire_register_policy(register: Registrar) -> None:
    """Name batching policies: subclasses of ``quire.sdk.BatchingPolicy``."""


@hookspec
def quire_register_quant(register: Registrar) -> None:
    """Name quantization loaders: subclasses of ``quire.sdk.QuantizationLoader``."""


@hookspec
def quire_register_model(register: Registrar) -> None:
    """Name models by the architecture in ``config.json``: subclasses of ``quire.sdk.Model``."""


@hookspec
def quire_register_sampler(register: Registrar) -> None:
    """Name samplers: subclasses of ``quire.sdk.Sampler``."""


@hookspec
def quire_register_logits_processor(register: Registrar) -> None:
    """Name logits processors: subclasses of ``quire.sdk.LogitsProcessor``."""


@hookspec
def quire_register_spec_decode(register: Registrar) -> None:
    """Name speculative proposers: subclasses of ``quire.sdk.HostProposer`` or ``quire.sdk.DeviceProposer``."""


@hookspec
def quire_register_structured_output(register: Registrar) -> None:
    """Name structured-output backends: subclasses of ``quire.sdk.StructuredOutputBackend``."""


@hookspec
def quire_register_adapter(register: Registrar) -> None:
    """Name adapter methods: subclasses of ``quire.sdk.AdapterMethod``."""


@hookspec
def quire_register_executor(register: Registrar) -> None:
    """Name executors: subclasses of ``quire.sdk.Executor``."""


@hookspec
def quire_register_metrics(register: Registrar) -> None:
    """Name metrics exporters: subclasses of ``quire.sdk.MetricsExporter``."""


@hookspec
def quire_register_tool_parser(register: Registrar) -> None:
    """Name tool-call parsers: subclasses of ``quire.sdk.ToolParser``."""


@hookspec
def quire_register_reasoning_parser(register: Registrar) -> None:
    """Name reasoning parsers: subclasses of ``quire.sdk.ReasoningParser``."""


@hookspec
def quire_register_op(register: Registrar) -> None:
    """Name what runs operations of a forward pass: subclasses of ``quire.sdk.Operations``."""


@hookspec
def quire_register_quantizer(register: Registrar) -> None:
    """Name quantizers, which ``quire quantize`` runs: subclasses of ``quire.sdk.Quantizer``."""


@hookspec
def quire_register_router(register: Registrar) -> None:
    """Name routers: subclasses of ``quire.sdk.Router``."""


# ---- Decisions. Asked of the plugins named by ``--plugin``, the last named first, then of the bundled ones.


@hookspec(firstresult=True)
def quire_detect_quantization(hf_config: Mapping[str, Any]) -> str | None:
    """Return the name of the quantization loader that reads this checkpoint, given its ``config.json`` as a mapping.

    Called once per model when ``--quantization`` is ``auto``. None means: not a scheme that this plugin knows. If every
    plugin returns None, ``quire_choose_default("quant", ...)`` decides.
    """


@hookspec(firstresult=True)
def quire_choose_default(kind: str, config: Mapping[str, Any]) -> Choice | str | None:
    """Return what ``auto`` means for ``kind``: a name, or a ``Choice`` that also says why and why not the others.

    Called once per kind when its name is ``auto``. ``config`` holds what is known then: ``device`` ("cuda", "cpu"),
    ``tensor_parallel_size``, ``pipeline_parallel_size``, for models ``architectures``, for quantization ``hf_config``,
    for parsers ``chat_template``; any key may be missing.
    None means: no opinion.
    """


# ---- Lifecycle, command line, HTTP application. Called only for the bundled plugins and those named by ``--plugin``.


@hookspec
def quire_add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add command-line arguments to ``quire serve``. Called before the command line is parsed. None is ignored."""


@hookspec
def quire_register_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add a command of one's own: ``subparsers.add_parser(...)``, then ``set_defaults(run=function)``.

    ``function`` takes the parsed arguments and returns the exit status. Called before parsing. None is ignored.
    """


@hookspec
def quire_extend_app(app: Any) -> None:
    """Add routes or middleware to the FastAPI application. Called once, after ours, before serving. None is ignored.

    A route that does not give the event loop back for five seconds is interrupted, and answers 503 from then on. So is
    middleware: no request passes it any more, unless its class or function says ``on_failure = "skip"``, which is for
    middleware that protects nothing. What it calls does not count. The server does not start on middleware that cannot
    be constructed.
    """


@hookspec
def quire_configure(config: Any) -> None:
    """Take note of the final, frozen engine configuration. Called once, before the first component is built.

    Raise ``quire.sdk.PluginError`` to refuse it. None is ignored.
    """


@hookspec
def quire_unconfigure() -> None:
    """Release what ``quire_configure`` took. Called once, when the process ends. None is ignored.

    It is interrupted after five seconds. The log names one that is, or that raises, and the others are called.
    """

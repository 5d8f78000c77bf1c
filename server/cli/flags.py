"""The flags of engine and server, in one table: the parsers, the documentation and the tests all read it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from quire.core.engine.args import EngineArgs
from quire.core.errors import ConfigError
from quire.core.plugin.options import split_pairs
from quire.core.plugin.registry import KINDS
from quire.server.http.settings import ServerSettings

__all__ = [
    "ENGINE_FLAGS",
    "SERVER_FLAGS",
    "Flag",
    "add_flags",
    "add_model",
    "default_of",
    "engine_arguments",
    "option_flags",
    "server_settings",
]


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag, and the field of ``EngineArgs`` or ``ServerSettings`` that it sets."""

    name: str
    group: str
    help: str
    kind: Literal["text", "int", "float", "bool", "append", "list"] = "text"
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    field: str = ""

    @property
    def dest(self) -> str:
        """The field that it sets: its own name with underscores, unless ``field`` says otherwise."""
        return self.field or self.name.lstrip("-").replace("-", "_")


_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
_KV_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")
_LEVELS = ("debug", "info", "warning", "error")

ENGINE_FLAGS: tuple[Flag, ...] = (
    Flag("--model", "model", "folder or Hugging Face name of the model; the same as MODEL", metavar="MODEL"),
    Flag("--served-model-name", "model", "name(s) by which requests call the model", "list", "NAME"),
    Flag("--tokenizer", "model", "folder or name of the tokenizer, if not the model's", metavar="NAME"),
    Flag("--chat-template", "model", "file with the Jinja chat template, or the template itself", metavar="FILE"),
    Flag("--revision", "model", "branch, tag or commit on the Hugging Face hub"),
    Flag("--download-dir", "model", "where downloads are kept, if not the Hugging Face cache", metavar="DIR"),
    Flag("--load-format", "model", "dummy: random weights", choices=("auto", "safetensors", "dummy")),
    Flag("--dtype", "model", "auto: the checkpoint's on a GPU, float32 on a CPU", choices=_DTYPES),
    Flag("--quantization", "model", "quantization loader; auto reads the checkpoint", metavar="NAME", aliases=("-q",)),
    Flag("--seed", "model", "seed of the engine's own random choices", "int", "N"),
    Flag("--trust-remote-code", "model", "refused: Quire never runs code that comes with a model", "bool"),
    Flag("--device", "device", "where to run", choices=("auto", "cpu", "cuda")),
    Flag("--cpu-threads", "device", "threads of a model on a CPU; default: all cores but one", "int", "N"),
    Flag("--gpu-memory-utilization", "device", "share of the GPU's memory to use", "float", "SHARE"),
    Flag("--tensor-parallel-size", "device", "GPUs to split the model over", "int", "N", aliases=("-tp",)),
    Flag("--enforce-eager", "device", "no CUDA graphs", "bool"),
    Flag("--executor", "device", "how workers are run", metavar="NAME"),
    Flag("--attention-backend", "device", "attention kernels", metavar="NAME"),
    Flag("--max-model-len", "limits", "longest prompt plus answer, in tokens; default: the model's own", "int", "N"),
    Flag("--max-num-seqs", "limits", "most requests in one step", "int", "N"),
    Flag("--max-num-batched-tokens", "limits", "most tokens in one step; default: chosen for the device", "int", "N"),
    Flag("--max-num-queued-requests", "limits", "queue length beyond which requests get 429", "int", "N"),
    Flag("--enable-chunked-prefill", "limits", "spread long prompts over several steps", "bool"),
    Flag("--scheduling-policy", "limits", "who runs next", metavar="NAME", aliases=("--scheduler",)),
    Flag("--enable-prefix-caching", "cache", "share the KV of equal prompt beginnings", "bool"),
    Flag("--block-size", "cache", "tokens per KV block", "int", "N"),
    Flag(
        "--kv-cache-dtype",
        "cache",
        "precision of the KV cache; fp8 (e4m3) and fp8_e5m2 take half the memory of 16 bits, so twice the tokens fit",
        choices=_KV_DTYPES,
    ),
    Flag("--num-gpu-blocks-override", "cache", "KV blocks, whatever the memory; default: as many as fit", "int", "N"),
    Flag("--kv-allocator", "cache", "who hands out KV blocks", metavar="NAME"),
    Flag("--spec-method", "speculation", "who drafts; auto: the draft model or head, if one is given", metavar="NAME"),
    Flag("--speculative-model", "speculation", "folder or name of the draft model or head", metavar="MODEL"),
    Flag("--num-speculative-tokens", "speculation", "most drafts for a request in a step; default: 4", "int", "N"),
    Flag("--speculative-draft-tensor-parallel-size", "speculation", "GPUs to split the draft over", "int", "N"),
    Flag("--speculative-config", "speculation", "these and more as one JSON object", metavar="JSON"),
    Flag("--sampler", "plugins", "who draws tokens", metavar="NAME"),
    Flag(
        "--logits-processor", "plugins", "one more logits processor; may repeat", "append", "NAME",
        field="logits_processors",
    ),
    Flag("--metrics", "plugins", "metrics exporter; may repeat", "append", "NAME"),
    Flag("--plugin", "plugins", "turn on a distribution's hooks; may repeat", "append", "DIST", field="plugins"),
    Flag("--disable-log-requests", "logging", "no line per request in the log", "bool"),
)  # fmt: skip

SERVER_FLAGS: tuple[Flag, ...] = (
    Flag("--host", "server", "address to listen on; 0.0.0.0: every network"),
    Flag("--port", "server", "port to listen on; 0: any free one", "int"),
    Flag("--api-key", "server", "key that clients of /v1 must send; may repeat", "append", "KEY"),
    Flag("--root-path", "server", "path under which a proxy publishes the server", metavar="PATH"),
    Flag("--shutdown-timeout", "server", "seconds for requests in flight after SIGTERM", "float", "SECONDS"),
    Flag("--max-request-bytes", "server", "largest request body; a larger one gets 413", "int", "BYTES"),
    Flag("--prometheus-port", "server", "second port that serves only /metrics", "int", "PORT"),
    Flag("--log-level", "logging", "how much to log; also QUIRE_LOG_LEVEL", choices=_LEVELS),
)

_OPTIONAL_KINDS = (
    "attention", "kv", "policy", "quant", "sampler", "logits_processor", "spec_decode", "executor", "metrics",
)  # fmt: skip


def option_flags() -> dict[str, str]:
    """The ``--<kind>-option`` flags, each with the kind of plugin that it configures."""
    return {KINDS[kind].option_flag: kind for kind in _OPTIONAL_KINDS}


def default_of(flag: Flag) -> Any:
    """The default of the field that a flag sets."""
    owner = EngineArgs() if flag.dest in {each.name for each in fields(EngineArgs)} else ServerSettings()
    return getattr(owner, flag.dest)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the positional MODEL."""
    parser.add_argument(
        "model_argument",
        metavar="MODEL",
        nargs="?",
        help="folder or Hugging Face name; default: the embedded quire-tiny",
    )


def add_flags(parser: argparse.ArgumentParser, flags: Iterable[Flag]) -> None:
    """Add flags to a parser, in groups. What is not given stays None, so that the dataclasses keep the defaults."""
    groups: dict[str, Any] = {}
    for flag in flags:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        _add(groups[flag.group], flag)
    if "plugins" in groups:
        for name, kind in option_flags().items():
            groups["plugins"].add_argument(
                name,
                dest=f"option_{kind}",
                action="append",
                metavar="KEY=VALUE",
                help=f"option of the {KINDS[kind].title}",
            )


def engine_arguments(args: argparse.Namespace) -> EngineArgs:
    """What the command line says about the engine. Raises ConfigError if MODEL is given twice and differs."""
    given = _given(args, ENGINE_FLAGS)
    if before := getattr(args, "plugins_before", None):  # quire --plugin DIST serve ...
        given["plugins"] = [*before, *given.get("plugins", ())]
    positional = getattr(args, "model_argument", None)
    if positional and given.get("model", positional) != positional:
        raise ConfigError(
            f"the model is given twice, as {positional!r} and as --model {given['model']!r}; give it once"
        )
    if positional:
        given["model"] = positional
    if "model" not in given and len(given.get("served_model_name", ())) > 1:
        raise ConfigError("--served-model-name took several names and there is no MODEL; write MODEL before it")
    options = {
        kind: split_pairs(pairs, name) for name, kind in option_flags().items() if (pairs := _option(args, kind))
    }
    return EngineArgs(**given, plugin_options=options)


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """What the command line says about the HTTP server. Raises ConfigError for values out of range."""
    given = _given(args, SERVER_FLAGS)
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    settings = ServerSettings(**values)
    for name, port in (("--port", settings.port), ("--prometheus-port", settings.prometheus_port or 0)):
        if not 0 <= port <= 65535:
            raise ConfigError(f"{name} must be between 0 and 65535, got {port}")
    if not (math.isfinite(settings.shutdown_timeout) and settings.shutdown_timeout >= 0):
        raise ConfigError(f"--shutdown-timeout must be 0 or more seconds, got {settings.shutdown_timeout}")
    if settings.max_request_bytes < 1:
        raise ConfigError(f"--max-request-bytes must be at least 1, got {settings.max_request_bytes}")
    if not all(key.strip() for key in settings.api_key):
        raise ConfigError("--api-key is empty; give a key, or leave the flag out to ask for none")
    return settings


def whole(text: str) -> int:
    """A whole number, or an error that quotes what was given."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def real(text: str) -> float:
    """A number, or an error that quotes what was given."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _option(args: argparse.Namespace, kind: str) -> list[str]:
    return getattr(args, f"option_{kind}", None) or []


def _given(args: argparse.Namespace, flags: Iterable[Flag]) -> dict[str, Any]:
    values: dict[str, Any] = {flag.dest: getattr(args, flag.dest, None) for flag in flags}
    return {name: value for name, value in values.items() if value is not None}


def _add(group: Any, flag: Flag) -> None:
    text = flag.help.replace("%", "%%")
    default = default_of(flag)
    if default not in (None, (), [], "", "auto", ("auto",)) and flag.name != "--model":
        text += f" (default: {'on' if default is True else 'off' if default is False else default})"
    common: dict[str, Any] = {"dest": flag.dest, "help": text}
    names = (flag.name, *flag.aliases)
    if flag.kind == "bool":
        group.add_argument(*names, action=argparse.BooleanOptionalAction, default=None, **common)
    elif flag.kind == "append":
        group.add_argument(*names, action="append", metavar=flag.metavar, **common)
    elif flag.kind == "list":
        group.add_argument(*names, nargs="+", metavar=flag.metavar, **common)
    else:
        convert = {"text": str, "int": whole, "float": real}[flag.kind]
        choices = {"choices": flag.choices} if flag.choices else {"metavar": flag.metavar or flag.kind.upper()}
        group.add_argument(*names, type=convert, **choices, **common)

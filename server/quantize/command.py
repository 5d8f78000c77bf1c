"""``quire quantize``: a smaller checkpoint by one of the real tools, and what it lost."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quire.core.contracts.quantizer import QuantizationJob, Quantizer
from quire.core.errors import CheckpointError, ConfigError, PluginError, QuireError
from quire.core.plugin.discovery import format_error
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.options import parse_options
from quire.core.plugin.quarantine import NEVER_CONTAINED
from quire.server.cli.flags import parse_float, parse_int

__all__ = ["add_parser", "run"]

_ABOUT = """Quantize MODEL with a tool made for it, write the checkpoint to DIR, and compare the two as quire eval
--compare does. Exit status 1 if the quantized model loses more than --max-loss."""

_METHODS = ("awq", "gptq", "fp8", "int8")
_SAMPLES, _LENGTH, _GROUP = 128, 512, 128

#: Files that belong to a model and that quantization does not touch.
_COPIED_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def add_parser(subparsers: Any) -> None:
    """Add the command and its flags."""
    parser = subparsers.add_parser("quantize", help="make a quantized checkpoint, and measure it", description=_ABOUT)
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="folder or Hugging Face name of the model")
    parser.add_argument(
        "--method", required=True, metavar="NAME", help=f"how: {', '.join(_METHODS)}, or a quantizer of another package"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the checkpoint")
    how = parser.add_argument_group("how")
    how.add_argument("--tool", metavar="NAME", help="tool that quantizes: optimum, for gptq (default: llmcompressor)")
    how.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the quantizer")
    how.add_argument("--scheme", metavar="NAME", help="variant of the method (default: its first)")
    how.add_argument(
        "--group-size", type=parse_int, metavar="N", help=f"weights that share a scale (default: {_GROUP})"
    )
    how.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run (default: auto)")
    how.add_argument("--python", metavar="PATH", help="interpreter of the environment that has the tool")
    data = parser.add_argument_group("calibration")
    data.add_argument("--calibration", type=Path, metavar="FILE", help="text, or .jsonl of texts or conversations")
    data.add_argument("--samples", type=parse_int, metavar="N", help=f"at most this many (default: {_SAMPLES})")
    data.add_argument("--sequence-length", type=parse_int, metavar="N", help=f"tokens of each (default: {_LENGTH})")
    after = parser.add_argument_group("afterwards")
    after.add_argument("--no-eval", action="store_true", help="do not compare the two")
    after.add_argument("--limit", type=parse_int, metavar="N", help="questions of each skill (default: all)")
    after.add_argument(
        "--max-loss", type=parse_float, metavar="POINTS", help="exit status 1 if it loses more exact match"
    )


def run(args: argparse.Namespace) -> int:
    """Check everything, quantize, compare."""
    for warning in args.flag_warnings:
        print(warning, file=sys.stderr)
    name, quantizer = _load_quantizer(args)
    scheme = args.scheme or quantizer.schemes[0]
    _check_arguments(args, name, quantizer, scheme)
    if (missing := quantizer.find_missing(args.python)) is not None:
        raise ConfigError(missing)
    length = 0 if scheme in quantizer.uncalibrated else args.sequence_length or _LENGTH
    folder = _resolve_source(args.model, quantizer, args.group_size or _GROUP, length)
    samples: list[list[int]] = []
    if length:
        from quire.core.engine.tokenizer import Tokenizer
        from quire.server.quantize.calibration import load_samples

        samples = load_samples(Tokenizer(str(folder)), args.calibration, args.samples or _SAMPLES, length)
    summary = f"{args.model}: {name} ({scheme})"
    if samples:
        summary += f", calibrated on {len(samples)} samples of {len(samples[0])} tokens"
    print(summary, file=sys.stderr)
    started = time.perf_counter()
    made_by = _run_quantizer(name, quantizer, folder, scheme, samples, args)
    source_bytes, quantized_bytes = _weight_bytes(folder), _weight_bytes(args.out)
    print(
        f"{args.out}: {quantized_bytes / 1e6:,.1f} MB of weights, {quantized_bytes / source_bytes:.0%} of the "
        f"{source_bytes / 1e6:,.1f} MB before; "
        f"{made_by}, {time.perf_counter() - started:.0f} s; try it with quire serve {args.out}"
    )
    return 0 if args.no_eval else _compare_models(args)


def _load_quantizer(args: argparse.Namespace) -> tuple[str, Quantizer]:
    """The name and the quantizer that ``--method`` and ``--tool`` stand for."""
    plugins = PluginManager()
    name = args.method
    if args.tool is not None:
        name = _find_tool(plugins, name, args.tool)
    try:
        resolution = plugins.resolve_plugin("quantizer", name)
    except PluginError as error:
        raise ConfigError(f"--method {args.method!r} is not known; choose {', '.join(_METHODS)}, or: {error}") from None
    cls = plugins.load_class(resolution)
    quantizer: Quantizer = cls(parse_options(cls, dict(_split_option(each) for each in args.option)))
    return resolution.name, quantizer


def _find_tool(plugins: PluginManager, method: str, tool: str) -> str:
    """The bundled quantizer that does ``method`` with ``tool``."""
    names = [name for name in plugins.list_names("quantizer") if name == method or name.startswith(f"{method}-")]
    by_tool = {getattr(plugins.load_class("quantizer", name), "tool", name): name for name in names}
    if by_tool and tool not in by_tool:
        raise ConfigError(f"--tool {tool} is not for --method {method}; choose {', '.join(by_tool)}")
    return by_tool.get(tool, method)


def _split_option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--option {text!r} is not KEY=VALUE")
    return key, value


def _check_arguments(args: argparse.Namespace, name: str, quantizer: Quantizer, scheme: str) -> None:
    if scheme not in quantizer.schemes:
        raise ConfigError(f"--scheme {scheme!r} is none of {name}; choose {', '.join(quantizer.schemes)}")
    out: Path = args.out
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out} is not empty; give a new folder, or empty this one")
    for flag, least in (("samples", 1), ("sequence_length", 16), ("limit", 1), ("max_loss", 0)):
        if (value := getattr(args, flag)) is not None and value < least:
            raise ConfigError(f"--{flag.replace('_', '-')} must be at least {least}, got {value}")
    if args.group_size is not None:
        if not quantizer.is_grouped:
            raise ConfigError(f"--group-size is for awq and gptq; {name} has no groups: leave it out")
        if args.group_size != -1 and args.group_size < 8:
            raise ConfigError(f"--group-size must be -1 (a whole column) or at least 8, got {args.group_size}")
    if scheme in quantizer.uncalibrated:
        for flag in ("calibration", "samples", "sequence_length"):
            if getattr(args, flag) is not None:
                raise ConfigError(f"--{flag.replace('_', '-')}: {name} {scheme} needs no text; leave it out")
    if args.no_eval and (args.limit is not None or args.max_loss is not None):
        raise ConfigError("--limit and --max-loss are for the comparison; leave out --no-eval")


def _resolve_source(name: str, quantizer: Quantizer, group_size: int, length: int) -> Path:
    """The model's folder. Refuses one that is quantized, or that does not fit groups or samples."""
    from quire.core.loading.hf_config import get_architecture, get_context_length, read_hf_config
    from quire.core.loading.hub import resolve_model

    folder = resolve_model(name)
    config = read_hf_config(folder)
    get_architecture(config)
    if quantization := getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"model {name!r} is quantized already ({quantization.get('quant_method', '?')}); give another"
        )
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"model {name!r} has no safetensors; convert it first")
    if length > (context := get_context_length(config)):
        raise ConfigError(
            f"samples of {length} tokens are longer than the context of {name}, {context}; give a smaller "
            f"--sequence-length"
        )
    if quantizer.is_grouped and group_size != -1:
        for field in ("hidden_size", "intermediate_size"):
            width = getattr(config.get_text_config(), field, None)
            if isinstance(width, int) and width % group_size:
                raise ConfigError(
                    f"{field} {width} of {name} does not divide into groups of {group_size}; "
                    f"choose another --group-size"
                )
    return folder


def _run_quantizer(
    name: str, quantizer: Quantizer, model: Path, scheme: str, samples: list[list[int]], args: argparse.Namespace
) -> str:
    """Let it write into a folder beside ``--out``, and move its checkpoint there once it is complete. What made it."""
    out: Path = args.out
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=parent)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot write there ({error}); give another folder") from None
    with work:
        folder = Path(work.name) / "model"
        group_size = args.group_size or _GROUP
        job = QuantizationJob(model, folder, scheme, samples, group_size, args.device, args.python)
        made_by: object = None
        try:
            made_by = quantizer.quantize(job)
        except (*NEVER_CONTAINED, QuireError):
            raise
        except BaseException as error:
            reason = format_error(error, type(quantizer).__module__)
            raise ConfigError(f"quantizer/{name} could not quantize {model}: {reason}") from None
        if not isinstance(made_by, str) or not (folder / "config.json").is_file() or not _weight_bytes(folder):
            raise ConfigError(f"quantizer/{name} wrote no checkpoint: config.json or safetensors are missing")
        for file_name in _COPIED_FILES:
            if (model / file_name).is_file() and not (folder / file_name).exists():
                shutil.copyfile(model / file_name, folder / file_name)
        for path in folder.iterdir():
            path.chmod(0o644)
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
    return made_by


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _compare_models(args: argparse.Namespace) -> int:
    from quire.core.engine.args import EngineArgs
    from quire.server.evaluation import load_questions
    from quire.server.evaluation.command import MAX_LOSS, NUM_TOKENS
    from quire.server.evaluation.compare_command import Side, compare_sides
    from quire.server.evaluation.text import read_held_out_text

    sides = [Side(name, EngineArgs(model=name, device=args.device)) for name in (args.model, str(args.out))]
    allowed = MAX_LOSS if args.max_loss is None else args.max_loss
    comparison = compare_sides(sides, load_questions(None, args.limit), read_held_out_text(), NUM_TOKENS, allowed)
    print(comparison.table())
    return int(args.max_loss is not None and not comparison.within)

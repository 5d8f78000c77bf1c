"""``quire plugins check --aot``: compiles a plugin's Triton kernels for kinds of GPU, without having one."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quire.core.errors import ConfigError, PluginError
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.target import resolve_file
from quire.server.cli.plugins_bench import split_or_find

__all__ = ["compile_report", "format_compile_report"]


def compile_report(manager: PluginManager, subject: str, targets: str) -> dict[str, Any]:
    """What every kernel that the plugin's example problems launch takes on each of ``targets`` (``sm_90,sm_100``).

    ``subject`` is KIND/NAME, FILE.py:Class, or FILE.py for every plugin in the file. Raises a ``QuireError`` for what
    cannot be compiled at all; ``failed`` counts kernels that do not compile, or want more than a program may have.
    """
    capabilities = [_parse_target(each) for each in targets.split(",")]
    _check_compiler()
    from quire.core.testing.aot_problems import AOT_KINDS

    found = [(kind, cls) for kind, cls in _find_classes(manager, subject) if kind in AOT_KINDS]
    if not found:
        raise PluginError(f"{subject}: --aot compiles kernels of {', '.join(AOT_KINDS)}; it has none of these")
    rows: list[dict[str, Any]] = []
    for kind, cls in found:
        rows += _compile_class(kind, cls, capabilities)
    return {
        "subject": subject,
        "targets": capabilities,
        "kernels": rows,
        "failed": sum(bool(row["problem"]) for row in rows),
    }


def format_compile_report(report: dict[str, Any]) -> str:
    """A Markdown table, and what failed below it."""
    header = ("kernel", "target", "registers", "spills (bytes)", "shared memory (KiB)", "launched by")
    lines = []
    for row in report["kernels"]:
        figures = ("registers", "spills", "shared")
        cells = ["" if row[name] is None else str(row[name]) for name in figures]
        if row["shared"] is not None:
            cells[2] = f"{row['shared'] / 1024:.1f} of {row['shared_limit'] / 1024:.0f}"
        lines.append((row["kernel"], f"sm_{row['target']}", *cells, row["problem_name"]))
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in (header, tuple("-" * width for width in widths), *lines)
    ]
    failed = [row for row in report["kernels"] if row["problem"]]
    failures = [f"! {row['kernel']} on sm_{row['target']}: {row['problem']}" for row in failed]
    spilling = sorted({row["kernel"] for row in report["kernels"] if row["spills"]})
    advice = "spills go to memory; smaller tiles or more warps need fewer registers"
    notes = [f"{', '.join(spilling)}: {advice}"] if spilling else []
    if silent := sorted(set(report["targets"]) - {row["target"] for row in report["kernels"]}):
        notes.append(f"{', '.join(f'sm_{each}' for each in silent)}: it launches no kernel there")
    return "\n".join([*text, *failures, *notes, f"{report['failed']} of {len(report['kernels'])} failed"])


def _compile_class(kind: str, cls: type, capabilities: Sequence[int]) -> list[dict[str, Any]]:
    from quire.core.ops.device_profile import get_shared_memory
    from quire.core.testing.aot import catch_launches, compile_launch, get_variant
    from quire.core.testing.aot_problems import list_problems

    rows, seen = [], set()
    for problem in list_problems(cls, kind):
        for capability in capabilities:
            try:
                launches = catch_launches(problem.run, capability)
            except Exception as error:
                raise PluginError(
                    f"{cls.__qualname__}, {problem.name}: fails before it launches anything: "
                    f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                ) from error
            for launch in launches:
                variant = (launch[0], capability, repr(get_variant(launch)), repr(sorted(map(str, launch[2].items()))))
                if variant in seen:
                    continue
                seen.add(variant)
                row: dict[str, Any] = {
                    "plugin": cls.__qualname__, "problem_name": problem.name, "kernel": launch[0].__name__,
                    "target": capability, "registers": None, "spills": None, "shared": None,
                    "shared_limit": get_shared_memory(divmod(capability, 10)), "problem": "",
                }  # fmt: skip
                rows.append(row)
                try:
                    kernel = compile_launch(launch, capability)
                except Exception as error:
                    row["problem"] = _describe_error(error)
                    continue
                row |= {"registers": kernel.registers, "spills": kernel.local, "shared": kernel.shared}
                if kernel.shared > row["shared_limit"]:
                    row["problem"] = f"wants {kernel.shared} of {row['shared_limit']} bytes of shared memory"
    if not rows:
        raise PluginError(f"{cls.__qualname__}: its example problems launch no Triton kernel")
    return rows


def _find_classes(manager: PluginManager, subject: str) -> list[tuple[str, type]]:
    from quire.core.testing.conformance import find_kind

    if not subject.endswith(".py"):
        kind, name = split_or_find(subject)
        return [(kind, manager.load_class(manager.resolve_plugin(kind, name, announce=False)))]
    if not Path(subject).is_file():
        raise PluginError(f"there is no file {subject}")
    module_name = resolve_file(f"{subject}:").removesuffix(":")
    module = importlib.import_module(module_name)
    found = []
    for cls in vars(module).values():
        if inspect.isclass(cls) and cls.__module__ == module_name and not inspect.isabstract(cls):
            try:
                found.append((find_kind(cls), cls))
            except PluginError:
                continue
    return found


def _parse_target(text: str) -> int:
    match = re.fullmatch(r"\s*(?:sm_)?(\d{2,3})a?\s*", text)
    if match is None:
        raise ConfigError(f"--aot {text}: write targets such as sm_80,sm_90,sm_100")
    return int(match[1])


def _check_compiler() -> None:
    try:
        import triton
    except ImportError:
        raise ConfigError("--aot needs Triton, which is not installed; install it with: pip install triton") from None
    if triton.knobs.runtime.interpret:
        raise ConfigError("--aot compiles kernels, which Triton's interpreter cannot: unset TRITON_INTERPRET")


def _describe_error(error: BaseException) -> str:
    """The innermost reason, on one line: Triton wraps it once for each function that is called."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]

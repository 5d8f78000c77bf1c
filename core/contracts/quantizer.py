"""Quantizer: writes a quantized checkpoint of a model. ``quire quantize --method NAME`` runs it.

What it writes is read by a plugin of kind ``quant``. Derive from ``Quantizer``, or, where the tool is a program of its
own that may live in another environment, from ``ToolQuantizer``.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from quire.core.env import child_environment
from quire.core.errors import ConfigError

__all__ = ["QuantizationJob", "Quantizer", "ToolQuantizer"]


@dataclass(frozen=True, slots=True)
class QuantizationJob:
    """One model to quantize."""

    model: Path
    """Its folder: ``config.json`` and safetensors, not quantized."""
    out: Path
    """The folder to write, which does not exist yet. Files of the tokenizer are added afterwards."""
    scheme: str
    """One of the quantizer's ``schemes``."""
    samples: list[list[int]]
    """Token ids to calibrate on, all of one length; empty where the scheme is ``uncalibrated``."""
    group_size: int = 128
    """Weights that share a scale, where the quantizer ``is_grouped``; -1: a whole column."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``cuda``."""
    python: str | None = None
    """The interpreter that has the tool, where the user names one."""


class Quantizer(ABC):
    """Turns one checkpoint into another. Runs alone in the process of the command, before anything is served."""

    schemes: ClassVar[tuple[str, ...]] = ("default",)
    """Variants that it knows, the default first."""
    uncalibrated: ClassVar[tuple[str, ...]] = ()
    """Those that look at weights alone: no text is read for them."""
    is_grouped: ClassVar[bool] = False
    """Whether weights share scales in groups: then widths divide by the group size, which ``--group-size`` sets."""

    def __init__(self, options: Any = None) -> None:
        self.options = options
        """An instance of the class's ``Options`` dataclass, None without one."""

    def find_missing(self, python: str | None = None) -> str | None:
        """What is not installed for this interpreter, or for ``python``, and the command that installs it; None if
        nothing is missing. Asked before anything is loaded."""
        return None

    @abstractmethod
    def quantize(self, job: QuantizationJob) -> str:
        """Write ``job.out``: a ``config.json`` with the section ``quantization_config``, and ``*.safetensors``. Returns
        what made it, for the report, such as a tool and its version. What it raises ends the command, and ``job.out``
        is removed."""


class ToolQuantizer(Quantizer):
    """Runs a tool in a process of its own, perhaps by the interpreter of another environment.

    ``script`` is a file that imports nothing of Quire. It reads a job as JSON from stdin: ``tool``, ``scheme``,
    ``model``, ``out``, ``samples``, ``group_size``, ``device`` as in ``QuantizationJob``, and ``result``, a path
    where it writes ``{"version": ...}`` or ``{"error": ...}``.
    """

    script: ClassVar[Path]
    tool: ClassVar[str]
    """Its name, for the script and in messages."""
    module: ClassVar[str]
    """The top-level module by which it is found."""
    install: ClassVar[str]
    """The command that installs it, beginning with ``pip``; more may follow in parentheses."""

    def find_missing(self, python: str | None = None) -> str | None:
        """Looks for ``module``. ConfigError where ``python`` is no interpreter."""
        if python is None:
            found = importlib.util.find_spec(self.module) is not None
            return None if found else f"{self.tool} is not installed; install it with: {self.install}"
        path = shutil.which(python)
        if path is None:
            raise ConfigError(f"--python {python!r} is not an interpreter; give a path such as venv/bin/python")
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({self.module!r}) is None)"
        try:
            checked = subprocess.run(
                [path, "-c", code], env=_tool_environment(elsewhere=True), capture_output=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(
                f"--python {python!r} cannot be run ({error}); give a path such as venv/bin/python"
            ) from None
        if not checked.returncode:
            return None
        install = self.install.replace("pip", f"{python} -m pip", 1)
        return f"{self.tool} is not installed for {python}; install it with: {install}"

    def quantize(self, job: QuantizationJob) -> str:
        """Run ``script``, and wait for it."""
        result = job.out.parent / "result.json"
        fields = {"scheme": job.scheme, "samples": job.samples, "group_size": job.group_size, "device": job.device}
        paths = {"model": str(job.model), "out": str(job.out), "result": str(result)}
        command = [shutil.which(job.python or sys.executable) or sys.executable, "-P", "-W", "ignore", str(self.script)]
        text = json.dumps({"tool": self.tool, **fields, **paths})
        env = _tool_environment(elsewhere=job.python is not None)
        completed = subprocess.run(command, input=text, text=True, stdout=2, env=env, check=False)
        outcome = json.loads(result.read_text("utf-8")) if result.is_file() else {}
        if "version" not in outcome:
            reason = outcome.get("error") or f"it ended with status {completed.returncode}"
            raise ConfigError(f"{self.tool} could not quantize {job.model}: {reason}; what it printed is above")
        return f"{self.tool} {outcome['version']}"


def _tool_environment(*, elsewhere: bool) -> dict[str, str]:
    """The environment variables for the tool; ``elsewhere``: for an interpreter of another environment."""
    env = child_environment() | {"TOKENIZERS_PARALLELISM": "false"}
    return {name: value for name, value in env.items() if not (elsewhere and name == "PYTHONPATH")}

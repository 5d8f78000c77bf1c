"""Which tool does which method, in which variants, and which interpreter has it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import dataclass

from quire.core.env import child_environment
from quire.core.errors import ConfigError

__all__ = ["METHODS", "RECIPES", "TOOLS", "Recipe", "find_interpreter", "find_recipe", "tool_environment"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One method as one tool does it. The first scheme is the default."""

    method: str
    tool: str
    module: str
    extra: str
    schemes: tuple[str, ...]
    uncalibrated: tuple[str, ...] = ()
    """Schemes that look at weights alone."""
    grouped: bool = False


#: The first of a method is its default tool.
RECIPES: tuple[Recipe, ...] = (
    Recipe("awq", "autoawq", "awq", "awq", ("gemm", "gemv", "gemv_fast"), grouped=True),
    Recipe("gptq", "llmcompressor", "llmcompressor", "quantize", ("plain", "act_order"), grouped=True),
    Recipe("gptq", "optimum", "gptqmodel", "optimum", ("plain", "act_order"), grouped=True),
    Recipe("fp8", "llmcompressor", "llmcompressor", "quantize", ("dynamic", "static", "block"), ("dynamic", "block")),
    Recipe("int8", "llmcompressor", "llmcompressor", "quantize", ("smoothquant", "rounded"), ("rounded",)),
)
METHODS = tuple(dict.fromkeys(recipe.method for recipe in RECIPES))
TOOLS = tuple(dict.fromkeys(recipe.tool for recipe in RECIPES))


def find_recipe(method: str, tool: str | None, scheme: str | None) -> Recipe:
    """The recipe for a method, tool and scheme. ConfigError for an unknown or unsuitable name."""
    of_method = [recipe for recipe in RECIPES if recipe.method == method]
    if not of_method:
        raise ConfigError(f"--method {method!r} is not known; choose {', '.join(METHODS)}")
    if tool is not None and tool not in TOOLS:
        raise ConfigError(f"--tool {tool!r} is not known; choose {', '.join(TOOLS)}")
    usable = [recipe for recipe in of_method if tool in (None, recipe.tool)]
    if not usable:
        tools = ", ".join(recipe.tool for recipe in of_method)
        raise ConfigError(f"--tool {tool} is not for --method {method}; choose {tools}")
    if scheme is not None and scheme not in usable[0].schemes:
        raise ConfigError(
            f"--scheme {scheme!r} is none of {method} by {usable[0].tool}; choose {', '.join(usable[0].schemes)}"
        )
    return usable[0]


def find_interpreter(recipe: Recipe, python: str | None) -> str:
    """The interpreter that has the tool. ConfigError with the command that installs it."""
    hint = f"install it with: pip install 'quire[{recipe.extra}]'"
    if recipe.extra == "optimum":
        hint += " --no-build-isolation (in an environment of its own, named with --python)"
    elif recipe.extra == "quantize":  # it pins transformers, which would decide with what Quire serves
        hint = "install it with: pip install 'llmcompressor>=0.14,<0.15'"
        hint += " (in an environment of its own, named with --python)"
    if python is None:
        if importlib.util.find_spec(recipe.module) is None:
            raise ConfigError(f"{recipe.tool} is not installed; {hint}")
        return sys.executable
    path = shutil.which(python)
    if path is None:
        raise ConfigError(f"--python {python!r} is not an interpreter; give a path such as venv/bin/python")
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({recipe.module!r}) is None)"
    try:
        checked = subprocess.run(
            [path, "-c", code], env=tool_environment(elsewhere=True), capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"--python {python!r} cannot be run ({error}); give a path such as venv/bin/python") from None
    if checked.returncode:
        raise ConfigError(f"{recipe.tool} is not installed for {python}; {hint.replace('pip', f'{python} -m pip')}")
    return path


def tool_environment(*, elsewhere: bool) -> dict[str, str]:
    """The environment variables for the tool; ``elsewhere``: for an interpreter of another environment."""
    env = child_environment() | {"TOKENIZERS_PARALLELISM": "false"}
    return {name: value for name, value in env.items() if not (elsewhere and name == "PYTHONPATH")}

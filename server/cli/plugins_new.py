"""``quire plugins new``: a package for one plugin that installs, works and passes its test as it stands."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from quire.core.errors import PluginError
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.registry import API_MAJOR, GROUP, KINDS, Kind, suggest_names

__all__ = ["NEW_KINDS", "NewPackage"]

_TEMPLATES = "quire.server.plugin_templates"
_ROUTE = "route"
_SUMMARIES: Mapping[str, str] = MappingProxyType(
    {
        "attention": "attention, one request after the other, in torch",
        "kv": "a free list of KV blocks with reference counts",
        "policy": "shortest prompt first",
        "quant": "weights of 8 bits with a scale for each output",
        "model": "OPT",
        "sampler": "the Gumbel-max trick with hashed noise",
        "logits_processor": "makes one token less likely",
        "spec_decode": "drafts what followed the last two tokens before",
        "op": "the RMS norm",
        "quantizer": "FP8 weights by rounding",
        "structured_output": "one of several texts",
        "adapter": "two vectors for each module",
        "executor": "one worker in the engine's process",
        "metrics": "counts requests and tokens",
        "tool_parser": "calls between ACTION and DONE",
        "reasoning_parser": "reasoning in a scratchpad",
        "router": "all requests of a group on one engine",
    }
)
NEW_KINDS = (*_SUMMARIES, _ROUTE)
"""Kinds that there is a template for: those of the contracts, and a route of the HTTP server."""


@dataclass(frozen=True)
class NewPackage:
    """The files of a package for a plugin of ``kind`` called ``name``."""

    kind: str
    name: str

    @classmethod
    def from_words(cls, kind: str, name: str) -> NewPackage:
        """Raises PluginError for a kind without a template, and for what cannot be a name."""
        key = _ROUTE if kind == _ROUTE else _find_kind(kind)
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([_-][A-Za-z0-9]+)*", name) or name.lower() == "auto":
            raise PluginError(f"{name!r} cannot be a name; begin with a letter, and use letters, digits, '-' and '_'")
        package = cls(key, name)
        if key != _ROUTE and PluginManager().registry.find_by_name(key, package.registered_name):
            raise PluginError(f"{name!r} is a {KINDS[key].title} of Quire; choose another name")
        return package

    @property
    def dist(self) -> str:
        """The name of the distribution, and of its folder."""
        words = self.module_words
        return "-".join(words if words[0] == "quire" else ("quire", *words))

    @property
    def module(self) -> str:
        """The package that is imported."""
        return self.dist.replace("-", "_")

    @property
    def class_name(self) -> str:
        """``take-turns`` becomes ``TakeTurns``; a name with capitals stays, as that of a model's architecture."""
        if re.search(r"[A-Z]", self.name) and not re.search(r"[_-]", self.name):
            return self.name
        return "".join(word.capitalize() for word in self.module_words)

    @property
    def registered_name(self) -> str:
        """What the plugin answers to: of a model, the architecture that ``config.json`` names."""
        return self.class_name if self.kind == "model" else "_".join(self.module_words)

    @property
    def module_words(self) -> list[str]:
        """The name in lower case, word by word."""
        return [word.lower() for word in re.split(r"[_-]|(?<=[a-z0-9])(?=[A-Z])", self.name)]

    def write(self, parent: Path) -> Path:
        """Write the package into a new folder of ``parent`` and return it. PluginError if the folder exists."""
        folder = parent / self.dist
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise PluginError(f"{folder} exists already; choose another name, or another folder with --into") from None
        for path, text in self.make_files().items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, "utf-8")
        return folder

    def make_files(self) -> dict[str, str]:
        """The text of each file by its path."""
        template = importlib.resources.files(_TEMPLATES).joinpath(f"{self.kind}.py.txt").read_text("utf-8")
        names = {
            "TemplateName": self.class_name,
            "template_name": "_".join(self.module_words),
            "template-name": "-".join(self.module_words),
            "TEMPLATE_NAME": "_".join(self.module_words).upper(),
        }
        for placeholder, text in names.items():
            template = template.replace(placeholder, text)
        files = {
            "pyproject.toml": _PYPROJECT.format(dist=self.dist, module=self.module, group=GROUP, major=API_MAJOR + 1),
            ".github/workflows/test.yml": _WORKFLOW,
        }
        if self.kind == _ROUTE:
            test = _ROUTE_TEST.format(module=self.module, path="-".join(self.module_words))
            return {**files, f"{self.module}/__init__.py": template, "tests/test_route.py": test}
        values = {"kind": self.kind, "module": self.module, "class_name": self.class_name}
        hook = _HOOK.format(name=self.registered_name, summary=_SUMMARIES[self.kind], **values)
        return {
            **files,
            f"{self.module}/__init__.py": hook,
            f"{self.module}/{self.kind}.py": template,
            f"tests/test_{self.kind}.py": _TEST.format(**values),
        }

    def format_next_steps(self, folder: Path) -> str:
        """What to type next."""
        lines = [f"wrote {folder}", f"pip install -e {folder} pytest", f"python -m pytest {folder}"]
        if self.kind == _ROUTE:
            return "\n".join([*lines, f"quire serve --plugin {self.dist}"])
        flag = KINDS[self.kind].flag
        lines.append(f"quire plugins check {self.kind}/{self.registered_name}")
        use = {"quant": "quire serve MODEL", "model": "quire serve MODEL --plugin " + self.dist}
        use["quantizer"] = f"quire quantize MODEL --method {self.registered_name} --out DIR"
        use["adapter"] = f"quire serve MODEL --adapter-method {self.registered_name} --lora-modules NAME=FOLDER"
        use["router"] = f"quire simulate --replicas 4 --router {self.registered_name}"
        use["op"] = f"quire serve --op all={self.registered_name}"
        return "\n".join([*lines, use.get(self.kind, f"quire serve {flag} {self.registered_name}")])


def _find_kind(text: str) -> str:
    try:
        key = Kind.from_name(text).key
    except PluginError:
        key = ""
    if key not in _SUMMARIES:
        raise PluginError(f"there is no template for {text!r}; {suggest_names(text, NEW_KINDS)}")
    return key


_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{dist}"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["quire>=0.1,<{major}"]

[project.entry-points."{group}"]
{module} = "{module}"
"""
_WORKFLOW = """\
name: test
on: push
jobs:
  test:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: {python-version: "3.12"}
      - run: pip install . pytest && pytest
"""
_HOOK = """\
from quire.sdk import hookimpl


@hookimpl
def quire_register_{kind}(register):
    target = __name__ + ".{kind}:{class_name}"
    register("{name}", target, "{summary}")
"""
_TEST = """\
from {module}.{kind} import {class_name}

from quire.testing import parametrize_with_checks


@parametrize_with_checks({class_name})
def test_keeps_its_contract(check):
    check()
"""
_ROUTE_TEST = """\
from fastapi import FastAPI
from fastapi.testclient import TestClient
from {module} import quire_extend_app


def test_the_route_answers():
    app = FastAPI()
    quire_extend_app(app)
    assert TestClient(app).get("/{path}").json()["says"].startswith("hello")
"""

"""What pyproject says is what is there."""

from __future__ import annotations

import fnmatch
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from setuptools import find_namespace_packages

from quire.core.version import __version__

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("core", "plugins", "server")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def files():
    paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    return [path for path in paths if "__pycache__" not in path.parts]


def test_every_package_is_found(project):
    assert project["tool"]["setuptools"]["packages"]["find"] == {"where": ["src"]}
    packages = set(find_namespace_packages(str(ROOT / "src")))
    expected = {".".join(("quire", *p.parent.relative_to(ROOT).parts)) for p in files() if p.name == "__init__.py"}
    assert expected <= packages
    assert all(name == "quire" or name.startswith("quire.") for name in packages)


def test_every_data_file_is_package_data(project):
    patterns = project["tool"]["setuptools"]["package-data"]["*"]
    data = [path for path in files() if path.suffix not in (".py", ".pyc")]
    lost = [str(p.relative_to(ROOT)) for p in data if not any(fnmatch.fnmatch(p.name, each) for each in patterns)]
    assert not lost, f"not in the wheel; extend package-data in pyproject.toml: {lost}"


def test_the_pins_lie_within_the_ranges(project):
    ray = project["project"]["optional-dependencies"]["ray"]
    ranges = {r.name: r for r in map(Requirement, [*project["project"]["dependencies"], *ray])}
    pins = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert {name for name, _ in pins} == {"torch", "triton", "ray"}
    assert all(ranges[name].specifier.contains(version) for name, version in pins)


def test_every_dependency_has_a_lower_bound_that_can_be_installed(project):
    words = [sys.executable, "tools/oldest_dependencies.py", "--except", "torch", "Triton"]
    printed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    names = {Requirement(pin).name for pin in printed}
    assert names == {Requirement(each).name for each in project["project"]["dependencies"]} - {"torch", "triton"}
    assert all(Requirement(pin).specifier.contains(pin.partition("==")[2]) for pin in printed)


def test_every_entry_point_leads_somewhere(project):
    groups = [project["project"]["scripts"], *project["project"].get("entry-points", {}).values()]
    for target in (target for group in groups for target in group.values()):
        module, _, name = target.partition(":")
        imported = importlib.import_module(module)
        assert not name or callable(getattr(imported, name))


def test_version_is_a_release_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+|\.dev\d+)?", __version__)


def test_changelog_knows_the_version():
    assert f"[{__version__}]" in (ROOT / "CHANGELOG.md").read_text()

"""The wheel and the sdist, built from a copy of the tree: what users install is what is here."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREE = ("core", "plugins", "server", "src", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "MANIFEST.in")
FOLDERS = ("core", "plugins", "server")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree without weights, with a new sub-package in it that no configuration mentions."""
    tree = tmp_path_factory.mktemp("build") / "quire-tree"
    tree.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.safetensors")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    new = tree / "plugins" / "weather" / "rain"
    new.mkdir(parents=True)
    for package in (new.parent, new):
        (package / "__init__.py").write_text('"""New."""\n')
    weights = tree / "core" / "assets" / "some-model"
    weights.mkdir(parents=True)
    (weights / "model-00001-of-00001.safetensors").write_bytes(b"weights")
    return tree


@pytest.fixture(scope="module")
def dist(copy: Path) -> Path:
    """Both distributions, the wheel built from the sdist."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    result = subprocess.run(
        command, cwd=copy, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return copy / "dist"


def expected(copy: Path) -> set[str]:
    """Every file of the three folders and of ``src/quire``, by its name in the wheel. The links are not followed."""
    files = (path for folder in FOLDERS for path in (copy / folder).rglob("*") if path.is_file())
    package = copy / "src" / "quire"
    package_files = (path for name in package.iterdir() if not name.is_symlink() for path in (name, *name.rglob("*")))
    return {f"quire/{path.relative_to(copy).as_posix()}" for path in files} | {
        f"quire/{path.relative_to(package).as_posix()}" for path in package_files if path.is_file()
    }


def test_the_wheel_holds_the_faces_of_the_package(copy):
    faces = {"__init__.py", "__main__.py", "py.typed", "testing.py", "sdk/__init__.py", "sdk/contracts.py"}
    assert {f"quire/{name}" for name in faces} <= expected(copy)


def test_the_wheel_holds_the_folders_and_nothing_else(copy, dist):
    (wheel,) = dist.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == expected(copy)


def test_the_wheel_says_what_it_is(dist):
    (wheel,) = dist.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    archive = zipfile.ZipFile(wheel)
    (entries,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "quire = quire.__main__:main" in archive.read(entries).decode()
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_the_sdist_holds_files_where_the_tree_has_links(copy, dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers()}
    names = {f"src/{name}" for name in expected(copy)}
    assert names <= set(members)
    assert not any(member.issym() for member in members.values())

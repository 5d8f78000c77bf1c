"""The layout: three folders at the top, one import name through three links, and files that name no machine."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

FOLDERS = ("core", "plugins", "server")
MACHINE = re.compile(r"(?<![\w.}$*-])/(?:work|root|tmp|var/tmp|home/\w+|workspace|mnt/\w+)(?:/|\b)")
"""A place on somebody's machine. Temporary folders are the business of tests alone."""


def test_the_folders_are_linked_into_the_package(root):
    for folder in FOLDERS:
        assert os.readlink(root / "src" / "quire" / folder) == f"../../{folder}"
        assert (root / folder / "__init__.py").is_file()
    assert (root / "src" / "quire" / "py.typed").is_file()


def test_no_folder_shadows_the_package(root):
    assert not (root / "quire").exists()


def test_every_folder_of_code_is_a_package(root, product):
    folders = {(root / source.path).parent for source in product}
    assert not [str(f.relative_to(root)) for f in folders if not (f / "__init__.py").is_file()]


def test_no_file_shares_its_name_with_a_folder(root, product):
    assert not [source.path for source in product if (root / source.path).with_suffix("").is_dir()]


def test_files_name_no_machine(root):
    found = []
    for name in _tracked(root):
        path = root / name
        if path.is_symlink() or not path.is_file() or path.suffix in (".safetensors", ".jsonl", ".png"):
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found += [f"{name}:{i}: {m[0]}" for i, line in enumerate(lines, 1) if (m := _place(name, line))]
    assert not found, "\n".join(found)


def _place(name, line):
    if name.startswith("core/assets/") and name.endswith(".json"):
        return None
    place = MACHINE.search(line)
    return None if place and name.startswith("tests/") and "tmp" in place[0] else place


def _tracked(root):
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    return [name for name in listed.stdout.split("\0") if name and name != "tests/architecture/test_layout.py"]


@pytest.mark.parametrize("line", ["cd /work/main", "path = '/tmp/x'", "see /home/anna/model", "`/root/.cache`"])
def test_a_place_is_seen(line):
    assert _place("docs/a.md", line)


@pytest.mark.parametrize(
    "line", ["GET /v1/models", "https://example.org/work/a", "core/worker", "$HOME/tmp/x", "a/tmp"]
)
def test_other_paths_pass(line):
    assert not _place("docs/a.md", line)

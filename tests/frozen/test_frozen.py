"""Packages as they were released with earlier versions: each passes its own tests on this one, unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.frozen.freeze import digest_folder, freeze

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PACKAGES = sorted(path.parent for path in FOLDER.glob("*/*/pyproject.toml"))
QUICK = {"triton-attention": ["-k", "signatures or check_decode or captured or check_softcap"]}
"""Of the interpreter's slow kernels a part."""


def run_its_tests(package: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    paths = os.pathsep.join([str(ROOT / "src"), str(package)])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command += ["--rootdir", str(package), str(package / "tests"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_frozen_package_passes_its_tests(package: Path) -> None:
    result = run_its_tests(package, *QUICK.get(package.name, []))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.parametrize("version", sorted({path.parent for path in PACKAGES}), ids=lambda path: path.name)
def test_no_copy_was_changed(version: Path) -> None:
    assert (version / "digest.txt").read_text().strip() == digest_folder(version), "mend Quire, not what was frozen"


def test_what_a_release_will_freeze_runs(tmp_path: Path) -> None:
    """The frame itself, with the packages of today: they are copied, run, and a change of them is noticed."""
    folder = freeze("9.9", tmp_path)
    assert (folder / "digest.txt").read_text().strip() == digest_folder(folder)
    result = run_its_tests(folder / "take-turns")
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-2000:]
    module = folder / "take-turns" / "quire_take_turns.py"
    module.write_text(module.read_text() + "\n")
    assert (folder / "digest.txt").read_text().strip() != digest_folder(folder)
    with pytest.raises(FileExistsError):
        freeze("9.9", tmp_path)

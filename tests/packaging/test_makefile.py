"""``make``: what each target would run, when it installs again, and what it says where something is missing."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def make(*words, code=0, **variables):
    """Run make in the repository, without the variables of the make that may be running this test."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VENV", "PYTHON")}
    result = subprocess.run(
        ["make", *words], cwd=ROOT, env=inherited | variables, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


@pytest.fixture
def installed(tmp_path):
    """An environment that looks installed to make."""
    later = time.time() + 10
    for stamp in (".installed", ".installed-dev"):
        (tmp_path / stamp).touch()
        os.utime(tmp_path / stamp, (later, later))
        later += 10
    return f"VENV={tmp_path}"


def test_serve_runs_the_embedded_model_on_loopback(installed):
    assert make("-n", "serve", installed).stdout.strip().endswith("quire serve quire-tiny --host 127.0.0.1 --port 8000")


def test_serve_takes_model_host_and_arguments(installed):
    printed = make("-n", "serve", installed, "MODEL=org/name", "PORT=9000", ARGS="--dtype float32").stdout
    assert "quire serve org/name --host 127.0.0.1 --port 9000 --dtype float32" in printed


def test_a_second_make_has_nothing_to_do(installed):
    make("-q", "install", installed)
    make("-q", "dev", installed)


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_a_change_of_requirements_installs_again(installed, file):
    make("-q", "install", installed, "-W", file, code=1)


def test_help_names_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = text.partition(".PHONY:")[2].splitlines()[0].split()
    listed = {line.split()[1] for line in make("-s").stdout.splitlines()}
    assert listed == set(phony)


@pytest.fixture
def python(tmp_path):
    """``python(answers)`` makes an interpreter that fails where the code it is given holds one of ``answers``."""

    def build(version, *fails):
        path = tmp_path / "python"
        cases = "".join(f"*'{part}'*) exit 1;; " for part in fails)
        path.write_text(f'#!/bin/sh\ncase "$*" in {cases}--version) echo "Python {version}";; esac\nexit 0\n')
        path.chmod(0o755)
        return f"PYTHON={path}"

    return build


def test_no_python_at_all_is_explained(tmp_path):
    error = make("-s", "install", f"VENV={tmp_path}/v", "PYTHON=no-such-python", code=2).stderr
    assert "no-such-python is not installed; try: sudo apt install python3 python3-venv" in error


def test_an_old_python_is_explained(tmp_path, python):
    error = make("-s", "install", f"VENV={tmp_path}/v", python("3.9.2", "version_info < "), code=2).stderr
    assert "Python 3.9.2 is too old: Quire needs 3.11 or newer" in error


def test_a_missing_venv_module_is_explained(tmp_path, python):
    error = make("-s", "install", f"VENV={tmp_path}/v", python("3.11.2", "import ensurepip"), code=2).stderr
    assert "has no venv module; try: sudo apt install python3-venv" in error


def test_a_newer_python_is_only_noted(tmp_path, python):
    error = make("-s", "install", f"VENV={tmp_path}/v", python("3.15.0", ">= (3, 13)", "ensurepip"), code=2).stderr
    assert "note: Python 3.15.0 is newer than those Quire is tested with" in error


def test_the_tests_for_the_oldest_dependencies_exist():
    (paths,) = re.findall(r"^OLDEST_TESTS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert not [path for path in paths.split() if not (ROOT / path).exists()]

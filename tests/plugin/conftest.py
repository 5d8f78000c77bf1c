"""Real third-party distributions: folders with a dist-info beside their modules, put on ``sys.path``."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

ROOT = Path(__file__).parents[2]

POLICY = """
from quire.sdk import BatchingPolicy, hookimpl

@hookimpl
def quire_register_policy(register):
    register({name!r}, __name__ + ":Mine", "a policy of another package")

class Mine(BatchingPolicy):
    '''By arrival.'''

    def admission_key(self, request):
        return (request.arrival_ns,)
"""


def install_packages(site, packages):
    """Build and install ``packages`` for real, without isolation and without an index."""
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", site]
    subprocess.run([*command, *packages], check=True, timeout=300)


def make_environment(*sites):
    """Variables of a process that sees this tree's package, and ``sites`` as site-packages folders."""
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    paths = os.pathsep.join([str(ROOT / "src"), *map(str, sites), *inherited])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    interpreted = {"TRITON_INTERPRET": "0"} if torch.cuda.is_available() else {}
    return {**kept, **interpreted, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def write_distribution(
    site, name, module, source, *, version="2.5", requires=("quire>=0.1",), group="quire.v1", value=None, entry="main"
):
    """Lay out an installed distribution in ``site`` and return its module's path."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry} = {value or module}\n")
    path = site / f"{module}.py"
    path.write_text(dedent(source))
    return path


def run_quire(*arguments, site=None, code=0, json_output=False):
    """Run the command line as a user would, with ``site`` as a site-packages folder."""
    command = [sys.executable, "-m", "quire", *arguments, *(["--json"] if json_output else [])]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=make_environment(*([site] if site else [])),
    )
    assert result.returncode == code, f"status {result.returncode}: {result.stdout}\n{result.stderr}"
    return json.loads(result.stdout) if json_output else result


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install(name, module, source, ...)`` makes a distribution visible to this process until the test ends."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    before = set(sys.modules)

    def do(name, module, source, **changes):
        return write_distribution(site, name, module, source, **changes)

    do.site = site
    do.policy = POLICY
    yield do
    for module in set(sys.modules) - before:
        file = getattr(sys.modules[module], "__file__", None) or ""
        if file.startswith(str(site)):
            del sys.modules[module]


@pytest.fixture(scope="session")
def quire():
    return run_quire


@pytest.fixture(scope="session")
def distribution():
    return write_distribution


@pytest.fixture(scope="session")
def policy_source():
    return POLICY

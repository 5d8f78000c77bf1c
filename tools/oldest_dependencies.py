"""The oldest version of each dependency that ``pyproject.toml`` takes, as requirements for pip: ``name==version``.

    python tools/oldest_dependencies.py [--except NAME ...]

A lower bound must be a version that was released, and all lower bounds together must fit each other.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def oldest(excluded: set[str]) -> list[str]:
    """``name==version`` for each dependency of this platform that is not excluded. SystemExit if one has no bound."""
    requirements = map(Requirement, tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"])
    pins = []
    for requirement in requirements:
        if canonicalize_name(requirement.name) in excluded:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        bounds = [each.version for each in requirement.specifier if each.operator in (">=", "==")]
        if len(bounds) != 1:
            raise SystemExit(f"{requirement}: give it one lower bound (>=) in pyproject.toml")
        pins.append(f"{requirement.name}=={bounds[0]}")
    return pins


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--except", dest="excluded", nargs="*", default=[], help="dependencies to leave out")
    arguments = parser.parse_args()
    print(*oldest({canonicalize_name(name) for name in arguments.excluded}))

"""Freeze the example packages for a release: ``python tests/frozen/freeze.py VERSION``."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

__all__ = ["digest_folder", "freeze"]

ROOT = Path(__file__).parents[2]


def freeze(version: str, target: Path = Path(__file__).parent, source: Path = ROOT / "examples" / "plugins") -> Path:
    """Copy every package of ``source`` to ``target/version``, with a digest. An existing copy is never written over."""
    folder = target / version
    folder.mkdir(parents=True)
    for path in sorted(source.glob("*/pyproject.toml")):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".pytest_cache")
        shutil.copytree(path.parent, folder / path.parent.name, ignore=ignored)
    (folder / "digest.txt").write_text(digest_folder(folder) + "\n")
    return folder


def digest_folder(folder: Path) -> str:
    """Of the names and the contents of all files but the digest's own and what Python leaves behind."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "digest.txt" and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    print(freeze(sys.argv[1]))

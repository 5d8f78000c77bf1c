"""The plain text: CPython's standard library and its documentation sources, read from folders the caller names."""

from __future__ import annotations

from pathlib import Path

_SMALLEST, _LARGEST = 200, 400_000


def read_documents(stdlib: Path | None, docs: Path | None) -> list[str]:
    """Read ``*.py`` below ``stdlib`` and ``*.rst`` (or ``*.rst.txt``) below ``docs``, in a fixed order."""
    paths: list[Path] = []
    if stdlib:
        paths += sorted(p for p in stdlib.rglob("*.py") if not {"site-packages", "test", "tests"} & set(p.parts))
    if docs:
        paths += sorted([*docs.rglob("*.rst"), *docs.rglob("*.rst.txt")])
    documents = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if _SMALLEST <= len(text) <= _LARGEST:
            documents.append(text)
    return documents

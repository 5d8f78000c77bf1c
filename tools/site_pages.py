"""Hooks of mkdocs: pages outside ``docs/`` join the site, and links between all pages lead to pages of the site.

On a code host the links work as they are written; on the site they need other targets. A link to a file that is no
page becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "RELEASING.md": "releasing.md",
    "benchmarks/README.md": "benchmarks/workloads.md",
    "benchmarks/LOG.md": "benchmarks/log.md",
    "core/assets/quire-tiny/README.md": "cards/quire-tiny.md",
    "core/assets/quire-tiny-draft/README.md": "cards/quire-tiny-draft.md",
}
"""Path in the repository, path on the site."""
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside ``docs/``."""
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of one page."""
    site_path = page.file.src_uri
    in_repository = {target: source for source, target in OUTSIDE.items()}.get(site_path, f"docs/{site_path}")
    fenced = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)

    def rewritten(match: re.Match[str]) -> str:
        text, (link, hash_, anchor) = match[1], match[2].partition("#")
        if "://" in link or link.startswith("mailto:") or not link:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), link))
        if not (ROOT / target).exists():
            raise ValueError(f"{in_repository}: no such file: {target}")
        if target in OUTSIDE:
            on_site = OUTSIDE[target]
        elif target.startswith("docs/") and target.endswith(".md"):
            on_site = target.removeprefix("docs/")
        elif (ROOT / target / "README.md").exists() or not target.startswith("docs/"):
            return text
        else:
            return match[0]
        return f"[{text}]({posixpath.relpath(on_site, posixpath.dirname(site_path) or '.')}{hash_}{anchor})"

    return "".join(part if part.startswith("```") else _LINK.sub(rewritten, part) for part in fenced)

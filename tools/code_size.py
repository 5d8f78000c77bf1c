"""Lines of code by folder, and how many the last commits added: ``python tools/code_size.py [BASE]``.

Blank lines, comments and docstrings do not count. BASE is what to compare with: by default where this branch left
``main``, or on ``main`` itself the commit before.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("core", "plugins", "server", "tests")
_SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def lines_of_code(text: str) -> int:
    """Lines that hold more than blanks, comments and bare strings."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {line for t in tokens if t.type not in _SILENT for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)


def now() -> Counter[str]:
    """Lines of code of each folder in the working tree."""
    sizes: Counter[str] = Counter()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            sizes[folder] += lines_of_code(path.read_text(encoding="utf-8"))
    return sizes


def at(commit: str) -> Counter[str]:
    """Lines of code of each folder in a commit."""
    sizes: Counter[str] = Counter()
    for name in git("ls-tree", "-r", "--name-only", commit, *FOLDERS).splitlines():
        if name.endswith(".py"):
            sizes[name.partition("/")[0]] += lines_of_code(git("show", f"{commit}:{name}"))
    return sizes


def base() -> str:
    """The commit to compare with."""
    for branch in ("origin/main", "main"):
        merge_base = git("merge-base", "HEAD", branch, check=False).strip()
        if merge_base and merge_base != git("rev-parse", "HEAD").strip():
            return merge_base
    return "HEAD~1"


def git(*words: str, check: bool = True) -> str:
    """What a git command prints."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=check, timeout=60).stdout


if __name__ == "__main__":
    commit = sys.argv[1] if len(sys.argv) > 1 else base()
    before, after = at(commit), now()
    print(f"lines of code, and the difference to {git('rev-parse', '--short', commit).strip()}:")
    print("  " + ", ".join(f"{folder} {after[folder]:,} ({after[folder] - before[folder]:+,})" for folder in FOLDERS))

"""Runs a small function that a model wrote, in a process that can do little else."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from typing import Any

__all__ = ["passes_cases"]

_TIMEOUT_S = 5.0
_BUILTINS = (
    "abs", "all", "any", "bool", "chr", "dict", "divmod", "enumerate", "filter", "float", "int", "isinstance", "len",
    "list",
    "map", "max", "min", "ord", "pow", "range", "reversed", "round", "set", "sorted", "str", "sum", "tuple", "zip",
)  # fmt: skip

_UNSAFE_ATTRIBUTES = ("format", "format_map", "mro")  # attributes that lead from a value to what is private

#: Reads {source, function, cases, builtins} and exits 0 if every case holds. Limits: CPU time, memory, no files.
_HARNESS = """
import builtins, json, resource, sys
job = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (3, 3))
resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
names = {"__builtins__": {name: getattr(builtins, name) for name in job["builtins"]}}
try:
    exec(compile(job["source"], "<answer>", "exec"), names)
    for arguments, expected in job["cases"]:
        result = names[job["function"]](*arguments)
        if type(result) is not type(expected) or result != expected:
            raise SystemExit(1)
except SystemExit:
    raise
except BaseException:
    raise SystemExit(1)
"""


def _is_harmless(source: str) -> bool:
    """Say whether the source is only functions, without imports, private attributes or anything at module level."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if not tree.body or not all(isinstance(statement, ast.FunctionDef) for statement in tree.body):
        return False
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.ClassDef)):
            return False
        if isinstance(node, ast.Name) and node.id.startswith("__"):
            return False
        if isinstance(node, ast.Attribute) and (node.attr.startswith("_") or node.attr in _UNSAFE_ATTRIBUTES):
            return False
    return True


def passes_cases(source: str, function: str, cases: list[tuple[list[Any], Any]]) -> bool:
    """Say whether ``function`` of ``source`` returns what each case ``[arguments, expected]`` says. Never raises."""
    if not _is_harmless(source):
        return False
    job = json.dumps({"source": source, "function": function, "cases": cases, "builtins": _BUILTINS})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _HARNESS],
            input=job.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            env={},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0

"""The sandbox runs honest functions, and nothing else."""

from __future__ import annotations

import time

import pytest

from quire.server.evaluation import grade
from quire.server.evaluation.sandbox import passes_cases

CASES = [[[2], 4], [[-3], -6]]


def test_right_and_wrong():
    assert passes_cases("def f(x):\n    return x + x", "f", CASES)
    assert passes_cases("def g(x):\n    return 2\ndef f(x):\n    return g(x) * x", "f", CASES)
    assert passes_cases(
        "def f(x):\n    total = 0\n    for _ in range(2):\n        total += x\n    return total", "f", CASES
    )
    assert not passes_cases("def f(x):\n    return x", "f", CASES)
    assert not passes_cases("def f(x):\n    return x + x", "g", CASES)
    assert not passes_cases("def f(x):\n    return float(x + x)", "f", CASES)
    assert not passes_cases("def f():\n    return 4", "f", CASES)
    assert not passes_cases("def f(x):\n    return 1 // 0", "f", CASES)
    assert grade("python", "```python\ndef f(x):\n    return 2 * x\n```", {"function": "f", "cases": CASES})
    assert not grade("python", "Here:\ndef f(x): return 2 * x", {"function": "f", "cases": CASES})


@pytest.mark.parametrize(
    "body",
    [
        "import os\n    return 2 * x",
        "from os import system\n    return 2 * x",
        "__import__('os')\n    return 2 * x",
        "open('/etc/passwd')\n    return 2 * x",
        "eval('1')\n    return 2 * x",
        "print(x)\n    return 2 * x",
        "().__class__\n    return 2 * x",
        "'{0.real}'.format(x)\n    return 2 * x",
        "getattr(x, 'real')\n    return 2 * x",
        "__builtins__\n    return 2 * x",
        "x._private\n    return 2 * x",
        "global y\n    return 2 * x",
        "exit()\n    return 2 * x",
        "return 2 * x\nf(1)",
        "return 2 * x\ny = 1",
        "return 2 * x\nclass A: pass",
        "return (",
        "return 2 * x\x00",
        "return '\ud800'",
    ],
)
def test_what_is_forbidden(body):
    assert not passes_cases(f"def f(x):\n    {body}", "f", CASES)


def test_an_honest_exit_is_not_success():
    assert not passes_cases("def f(x):\n    raise ValueError", "f", CASES)
    assert not passes_cases("", "f", CASES)
    assert not passes_cases("(" * 5000, "f", CASES)


@pytest.mark.parametrize("body", ["while True: pass", "return f(x)", "return [0] * 10**10"])
def test_what_does_not_end_is_ended(body):
    started = time.monotonic()
    assert not passes_cases(f"def f(x):\n    {body}", "f", CASES)
    assert time.monotonic() - started < 10

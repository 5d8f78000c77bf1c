"""What this engine never does: unpickle, run a model's code, or tune kernels while it serves."""

from __future__ import annotations

import ast

import pytest

MODULES = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
CALLS = {"torch.load": "unpickles", "np.load": "may unpickle", "numpy.load": "may unpickle"}
FLAGS = {"trust_remote_code": "runs code that comes with a model", "allow_pickle": "unpickles"}


def violations(source):
    """Imports of serializers that run code, calls that do, and Triton's autotuner."""
    found = [
        source.at(node, f"imports {name}, which runs what it reads")
        for node, name in source.imports()
        if name.split(".")[0] in MODULES
    ]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS and not _says(node, "allow_pickle", False) and not _says(node, "weights_only", True):
                found.append(source.at(node, f"{name} {CALLS[name]}"))
            found += [source.at(node, f"{k.arg}=True {FLAGS[k.arg]}") for k in node.keywords if _is_true(k)]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "triton.autotune":
            found.append(source.at(node, "triton.autotune measures while it serves; use a tuned table"))
        elif isinstance(node, ast.ImportFrom) and node.module == "triton":
            found += [source.at(node, "triton.autotune; use a table") for a in node.names if a.name == "autotune"]
    return found


def _is_true(keyword):
    return keyword.arg in FLAGS and isinstance(keyword.value, ast.Constant) and keyword.value.value is True


def _says(call, keyword, wanted):
    """``np.load`` without pickles is fine, and ``torch.load`` of tensors alone, which runs nothing."""
    values = [k.value for k in call.keywords if k.arg == keyword]
    return bool(values) and isinstance(values[0], ast.Constant) and values[0].value is wanted


def test_nothing_runs_what_it_reads(everything):
    counted = [source for source in everything if source.folder != "tests"]
    found = [line for source in counted for line in violations(source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('a')",
        "import torch\ntorch.load('a', weights_only=False)",
        "import numpy as np\nnp.load('a')",
        "f('a', trust_remote_code=True)",
        "@triton.autotune([], [])\ndef k(): ...",
        "from triton import autotune",
    ],
)
def test_a_danger_is_seen(source, text):
    assert len(violations(source("core/a.py", text))) == 1


def test_the_safe_forms_pass(source):
    text = "import numpy as np\nnp.load('a', allow_pickle=False)\nf('a', trust_remote_code=False)"
    assert violations(source("core/a.py", text)) == []
    text = "import torch\ntorch.load('a', weights_only=True)"
    assert violations(source("core/a.py", text)) == []

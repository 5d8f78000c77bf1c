"""Plugins whose steps a CUDA graph cannot hold are told so without a GPU, and no others are."""

from __future__ import annotations

import importlib
import inspect
import unittest

import pytest
import torch
from tests.plugin import uncapturable_products as products

from quire.core.plugin.target import load_target
from quire.core.testing.capture_rules import assert_can_be_captured
from quire.core.testing.conformance import run_check
from quire.server.cli.plugins_new import NewPackage

Dense = load_target("quire.plugins.quant.none:Unquantized")
DenseLinear = load_target("quire.plugins.quant.none:UnquantizedLinear")
CHECKS = {
    "adapter": "check_a_captured_step_can_be_captured",
    "attention": "check_captured_steps",
    "op": "check_captured_is_eager",
    "quant": "check_the_product_can_be_captured",
}


@pytest.mark.parametrize(
    "function",
    [
        each
        for name, each in vars(products).items()
        if inspect.isfunction(each) and name not in ("multiply", "keep_to_the_rules")
    ],
)
def test_a_product_that_cannot_be_captured_is_found(function, monkeypatch) -> None:
    monkeypatch.setattr(DenseLinear, "apply", function)
    result = run_check(Dense, "check_the_product_can_be_captured")
    assert result.outcome == "failed" and "a step that is captured" in result.reason, result


def test_what_a_graph_can_hold_is_no_fault(monkeypatch) -> None:
    monkeypatch.setattr(DenseLinear, "apply", products.keep_to_the_rules)
    assert run_check(Dense, "check_the_product_can_be_captured").outcome == "passed"


@pytest.mark.parametrize("question", ["x.is_cuda", 'x.device.type == "cuda"', "'cuda' in str(x.device)"])
def test_code_that_asks_for_a_device_is_not_judged_by_a_cpu(question: str, tmp_path, monkeypatch) -> None:
    name = f"asks_{abs(hash(question))}"
    (tmp_path / f"{name}.py").write_text(f"def run(x):\n    return x if {question} else x[x > 0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = importlib.import_module(name).run
    with pytest.raises(unittest.SkipTest):
        assert_can_be_captured(lambda: run(torch.ones(2)))


@pytest.mark.parametrize(
    ("kind", "old", "new", "reason"),
    [
        ("adapter", "", "", ""),
        ("adapter", "scales[:, i : i + 1]", "scales[:, [i]]", "a list for an index"),
        (
            "adapter",
            "scales[:, i : i + 1]",
            "scales[:, int(slots[0]) * 0 + i, None]",
            "the host would wait for the GPU",
        ),
        ("attention", "", "", ""),
        (
            "attention",
            "def prepare_metadata",
            "graph_support = {'decode'}\n\n    def prepare_metadata",
            "copies a tensor to the host",
        ),
        ("op", "", "", ""),
        (
            "op",
            "scaled = wide",
            "wide[wide != wide] = wide.max()\n        scaled = wide",
            "writes a tensor where a mask",
        ),
        ("quant", "", "", ""),
        ("quant", "* layer.scale", "* layer.scale * torch.tensor([1.0])", "a tensor of numbers of the host"),
    ],
)
def test_what_a_graph_cannot_hold_is_found_without_a_gpu(kind, old, new, reason, tmp_path, monkeypatch) -> None:
    package = NewPackage.from_words(kind, "captured")
    source = package.make_files()[f"{package.module}/{kind}.py"]
    assert old in source
    module = f"captured_{kind}_{abs(hash(new))}"
    (tmp_path / f"{module}.py").write_text(source.replace(old, new) if old else source)
    monkeypatch.syspath_prepend(tmp_path)
    cls = getattr(importlib.import_module(module), package.class_name)
    result = run_check(cls, CHECKS[kind])
    assert reason in result.reason and (result.outcome == "failed") == bool(reason), result

"""The checks of quantizers: wrong ones fail, each by the check that is meant for it."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
from safetensors.torch import load_file, save_file

from quire.core.testing.conformance import run_check
from quire.server.cli.plugins_new import NewPackage


@pytest.fixture
def base(tmp_path, monkeypatch):
    """What ``quire plugins new quantizer round-to-fp8`` writes."""
    write_example(tmp_path, monkeypatch)
    return importlib.import_module("round_to_fp8").RoundToFp8


def write_example(folder, monkeypatch):
    files = NewPackage.from_words("quantizer", "round-to-fp8").make_files()
    (folder / "round_to_fp8.py").write_text(files["quire_round_to_fp8/quantizer.py"])
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "round_to_fp8", raising=False)


def change_scales(job):
    path = job.out / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v * 8 if k.endswith("scale") else v for k, v in tensors.items()}, path, metadata={"format": "pt"})


def leave_unquantized(job):
    (job.out / "model.safetensors").write_bytes((job.model / "model.safetensors").read_bytes())


def say_nothing(job):
    config = json.loads((job.out / "config.json").read_text())
    (job.out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "quant" not in k}))


def touch_the_source(job):
    (job.model / "config.json").write_text("{}")


LOADS = "check_its_checkpoint_loads_and_says_much_the_same"


@pytest.mark.parametrize(
    ("fault", "check", "said"),
    [
        (change_scales, LOADS, "log-probabilities differ by"),
        (leave_unquantized, LOADS, "bytes of weights"),
        (say_nothing, LOADS, "no quantization_config"),
        (touch_the_source, "check_the_source_stays_as_it_is", "changed config.json of the source"),
    ],
)
def test_a_wrong_quantizer_fails(fault, check, said, base):
    class Wrong(base):
        def quantize(self, job):
            made_by = super().quantize(job)
            fault(job)
            return made_by

    result = run_check(Wrong, check)
    assert result.outcome == "failed" and said in result.reason


def test_schemes_must_be_declared(base):
    class Undeclared(base):
        uncalibrated = ("other",)

    assert "other" in run_check(Undeclared, "check_schemes_are_declared").reason
    result = run_check(base, "check_the_source_stays_as_it_is")
    assert result.outcome == "passed", result

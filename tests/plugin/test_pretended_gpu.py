"""``quire plugins check --aot`` of what launches kernels for tensors on a GPU alone, on a machine without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from quire.core.testing.pretended_gpu import PRETENDED_GPU, PretendedGpu
from quire.server.cli.main import main

OWN = '''
import torch
import triton
import triton.language as tl
from torch import nn
from quire.sdk import LinearMethod, QuantizationLoader


@triton.jit
def multiply(x, weight, out, inputs, outputs, BLOCK: tl.constexpr):
    token, output = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, BLOCK)
    row = tl.load(x + token * inputs + place, place < inputs, 0.0).to(tl.float32)
    column = tl.load(weight + output * inputs + place, place < inputs, 0.0).to(tl.float32)
    tl.store(out + token * outputs + output, tl.sum(row * column).to(out.dtype.element_ty))


class Own(QuantizationLoader):
    """Plain weights, by a kernel on a GPU."""

    @classmethod
    def unsupported(cls, quant_config, device):
        return []

    def get_linear_method(self, info):
        return Method()


class Method(LinearMethod):
    def create_weights(self, layer, info, device):
        weight = torch.zeros(info.out_features, info.in_features, dtype=info.dtype, device=device)
        layer.weight = nn.Parameter(weight, requires_grad=False)

    def load_tensor(self, layer, info, part, tensor_name, tensor, rank, world_size):
        layer.weight.copy_(tensor)

    def apply(self, layer, x, bias=None):
        if not x.is_cuda or layer.weight.device.type != "cuda":
            return x @ layer.weight.T
        out = torch.empty(len(x), len(layer.weight), dtype=x.dtype, device=x.device)
        multiply[(len(x), len(layer.weight))](x, layer.weight, out, x.shape[1], len(layer.weight), BLOCK=1024)
        return out
'''


def test_tensors_say_where_they_would_be_and_compute_all_the_same() -> None:
    x = torch.arange(6.0).view(2, 3)
    with PretendedGpu():
        there = x.to("cuda")
        made = torch.ones(3, device=PRETENDED_GPU)
        layer = nn.Linear(3, 3, device=PRETENDED_GPU)
        for tensor in (there, made, there[:, None] @ made, layer.weight, layer(there), there.to(torch.int32), x.cuda()):
            assert tensor.is_cuda and tensor.device == PRETENDED_GPU
        back = (there[:, 1:] * made[:2]).cpu()
        there.copy_(x + 1)
    assert back.device.type == "cpu" and not back.is_cuda and torch.equal(back, x[:, 1:])
    assert torch.equal(there.cpu(), x + 1) and not torch.ones(1).is_cuda


@pytest.mark.aot
def test_kernels_of_linear_methods_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_linear.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["plugins", "check", "own_linear.py", "--aot", "sm_80,sm_90", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert {(row["kernel"], row["target"]) for row in kernels} == {("multiply", 80), ("multiply", 90)}
    assert all(row["registers"] > 0 for row in kernels)
    assert main(["plugins", "check", "quant/fp8", "--aot", "sm_80,sm_90"]) == 0
    printed = capsys.readouterr().out
    assert "fp8_gemm_medium_m_kernel | sm_90" in printed and "sm_80: it launches no kernel there" in printed
    assert main(["plugins", "check", "quant/awq", "--aot", "sm_80"]) == 0
    assert "int4_gemm_medium_m_kernel" in capsys.readouterr().out
    assert main(["plugins", "check", "none.py", "--aot", "sm_80"]) == 2
    assert capsys.readouterr().err == "quire: error: there is no file none.py\n"

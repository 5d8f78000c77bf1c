"""Layers of 8 bits as a loader calls them: any number of tokens, any neighbour, against float64."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, QuantActivation
from quire.core.ops import rms_norm
from quire.core.ops.device_profile import PROFILES, DeviceProfile
from quire.core.ops.launch_table import Launch
from quire.plugins.quant.kernels import fp8, fp8_layer, fp8_quantize, int8
from quire.plugins.quant.kernels.fp8_layer import choose_launch, dequantize_weight, get_eight_bit_steps, takes_quantized
from quire.plugins.quant.kernels.fp8_quantize import dequantize_activation

TABLES = sorted((Path(fp8_layer.__file__).parent / "tables").glob("*8_*.json"))
H200 = next(profile for profile in PROFILES if profile.launch_table == "h200")
KINDS = [pytest.param(fp8, id="fp8"), pytest.param(int8, id="int8")]
OTHERS = ("x", "weight", "bias", "out", "scale", "x_scale", "norm", "epilogue", "x_is_lhs")


def exact(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x.cpu().double(), dequantize_weight(weight.cpu(), scale.cpu(), torch.float64))


def off(got: Tensor, expected: Tensor) -> float:
    got = got.cpu().double()
    assert torch.isfinite(got).all()
    return float((got - expected).norm() / expected.norm())


# ---- on the CPU


@pytest.mark.parametrize("kind", KINDS)
def test_weights_quantized_at_load(kind: ModuleType) -> None:
    """Each row is near what it was, its largest to the bit of the format."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 960, generator=generator) * torch.logspace(-4, 2, 24)[:, None]
    weight[3] = 0
    values, scale = kind.quantize_weight(weight)
    assert scale.shape == (24,) and scale.dtype == torch.float32
    back = dequantize_weight(values, scale, torch.float32)
    rows = [i for i in range(24) if i != 3]
    assert (((back - weight).norm(dim=1) / weight.norm(dim=1))[rows] < 0.03).all()
    torch.testing.assert_close(back.abs().amax(1), weight.abs().amax(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [False, True])
def test_on_a_cpu_weights_are_widened(kind: ModuleType, blocks: bool) -> None:
    weight, scale = kind.quantize_weight(torch.randn(200, 300))
    scale = torch.rand(2, 3) + 0.1 if blocks else scale
    x, bias = torch.randn(5, 300), torch.randn(200)
    assert off(kind.apply_linear(x, weight, scale, bias), exact(x, weight, scale) + bias.double()) < 1e-6
    quantized = kind.quantize_activation(x)
    got = kind.apply_linear(quantized, weight, scale)
    assert off(got, exact(dequantize_activation(quantized), weight, scale)) < 1e-6
    assert kind.apply_linear(x, weight, scale, activation="silu") is None
    assert not kind.can_implement(weight, scale, None)


def test_a_static_scale() -> None:
    x = torch.tensor([[0.5, 1.0, 1000.0]])
    q = fp8.quantize_activation(x, torch.tensor(0.5))
    assert q.values.float().tolist() == [[1.0, 2.0, 448.0]] and q.scale.tolist() == [0.5]


@pytest.mark.parametrize("scale_shape", [(256,), (2, 3)])
def test_what_the_norm_before_should_emit(scale_shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    scale, blocks = torch.rand(scale_shape), len(scale_shape) == 2
    assert fp8.get_input_format(scale, None) == ("native" if blocks else "fp8_token")
    assert fp8.get_input_format(scale, torch.ones(1)) == ("native" if blocks else "fp8_tensor")
    assert int8.get_input_format(scale, None) == "int8_token"
    monkeypatch.setattr(fp8, "library_has_block_scales", lambda device: True)
    assert fp8.get_input_format(scale, None) == ("fp8_group" if blocks else "fp8_token")
    assert fp8.get_input_format(scale, torch.ones(1)) == ("native" if blocks else "fp8_tensor")
    assert (
        fp8.get_input_format(scale, None, weight_only=True)
        == int8.get_input_format(scale, None, weight_only=True)
        == "native"
    )


@pytest.mark.parametrize(("tokens", "inputs"), [(1, 128), (6, 640), (8, 512)])
def test_what_the_library_is_given_by_block(tokens: int, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and strides as cuBLAS documents them; what lies behind the last token does not matter."""

    def library(x: Tensor, weight: Tensor, x_scale: Tensor, _: object, scale: Tensor, *rest: object, **options: object):
        rows, groups = x.shape[0], x.shape[1] // 128
        whole = -(-groups // 4) * 4
        assert rows % 4 == 0 and x.is_contiguous() and weight.t().is_contiguous()
        assert x_scale.shape == (rows, groups) and x_scale.stride() == (1, rows)
        assert scale.shape == (whole, 2) and scale.stride() == (1, whole)
        wide = x.double() * x_scale.double().repeat_interleave(128, 1)
        return F.linear(wide, dequantize_weight(weight.t(), scale.t()[:, :groups], torch.float64)).to(torch.bfloat16)

    monkeypatch.setattr(fp8, "scaled_mm", library)
    weight = torch.randn(192, inputs).mul(40).to(torch.float8_e4m3fn)
    scale, x = torch.rand(2, inputs // 128) + 0.1, torch.randn(tokens, inputs)
    q = fp8_quantize.launch_quantize_activation(x, ActivationFormat("fp8_group"))
    bias = torch.randn(192)
    got = fp8.multiply_by_library(q, weight, scale, bias)
    assert off(got, exact(dequantize_activation(q), weight, scale) + bias.double()) < 5e-3


# ---- tables


def check(launch: Launch, most: int, inputs: int) -> None:
    kernel = fp8_layer.LAUNCHERS[launch.kernel]
    wanted = set(inspect.signature(kernel).parameters) - set(OTHERS)
    assert set(launch.options) - {"x_is_lhs"} == wanted, launch
    if launch.kernel == "gemm_medium_m":
        assert inputs % launch.options["block_k"] == 0, launch
    else:
        assert launch.options.get("block_m", 1) >= most, launch
    for name in ("block_m", "block_n", "block_k", "slice_k", "num_warps"):
        value = launch.options.get(name, 1)
        assert value & (value - 1) == 0, f"{name} is no power of two in {launch}"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables(path: Path) -> None:
    dtype = torch.int8 if path.stem.startswith("int8") else torch.float8_e4m3fn
    for name in json.loads(path.read_text())["layers"]:
        features, inputs = map(int, name.split("x"))
        steps = get_eight_bit_steps(H200, features, inputs, dtype)
        assert [most for most, _ in steps] == sorted({most for most, _ in steps})
        for most, launches in steps:
            assert any(launch is None or takes_quantized(launch) for launch in launches)
            for launch in launches:
                if launch is not None:
                    check(launch, most, inputs)


@pytest.mark.parametrize(("features", "inputs"), [(4608, 3584), (3584, 18944), (37888, 3584), (64, 32), (48, 96)])
@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: f"{profile.name}-{profile.num_sms}")
def test_layers_that_no_table_names(features: int, inputs: int, profile: DeviceProfile) -> None:
    steps = get_eight_bit_steps(profile, features, inputs, torch.float8_e4m3fn)
    assert steps
    for most, launches in steps:
        for launch in launches:
            if launch is not None:
                check(launch, most, inputs)
    assert takes_quantized(choose_launch(profile, features, inputs, 1, quantized=True))


# ---- on a GPU

SHAPES = [(768, 512), (96, 160), (6144, 4096)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("features", "inputs"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_any_number_of_tokens(kind: ModuleType, features: int, inputs: int, dtype: torch.dtype) -> None:
    """Near float64 on the activations as they are, as near as 8 bits allow; few tokens to the dtype's rounding."""
    torch.manual_seed(features)
    weight, scale = kind.quantize_weight(torch.randn(features, inputs, device="cuda"))
    assert kind.can_implement(weight, scale, None)
    bias, gain = (torch.randn(n, device="cuda", dtype=dtype) for n in (features, inputs))
    for tokens in (1, 2, 3, 8, 9, 16, 17, 64, 65, 128, 200, 300):
        x = torch.randn(tokens, inputs, device="cuda", dtype=dtype)
        error = off(kind.apply_linear(x, weight, scale, bias), exact(x, weight, scale) + bias.cpu().double())
        assert error < 0.04, (tokens, error)
        native = kind.apply_linear(x, weight, scale, bias, weight_only=True)
        assert off(native, exact(x, weight, scale) + bias.cpu().double()) < 5e-3, tokens
        quantized = kind.quantize_activation(x)
        assert (
            off(kind.apply_linear(quantized, weight, scale), exact(dequantize_activation(quantized), weight, scale))
            < 2e-2
        )
        width = features // 2
        residual = torch.randn(tokens, width, device="cuda", dtype=dtype)
        fused = kind.apply_linear(x, weight, scale, norm=(gain, 1e-5), activation="silu", residual=residual)
        if fused is None:
            assert tokens > 128
            continue
        gate, up = exact(rms_norm(x, gain, 1e-5)[0], weight, scale).chunk(2, -1)
        assert off(fused, F.silu(gate) * up + residual.cpu().double()) < 0.06, tokens


@pytest.mark.gpu
@pytest.mark.parametrize(("features", "inputs"), [(768, 512), (336, 1280), (192, 640)])
def test_blocks(features: int, inputs: int) -> None:
    weight = torch.randn(features, inputs, device="cuda").mul(40).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-features // 128), inputs // 128, device="cuda") + 0.05
    assert fp8.can_implement(weight, scale, None)
    groups = fp8.get_input_format(scale, None) == "fp8_group"
    assert groups == (torch.cuda.get_device_capability() == (9, 0))
    for tokens in (1, 5, 16, 33, 128, 129, 300, 1025):
        x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
        x[:, ::97] *= 30  # each group has a scale of its own
        assert off(fp8.apply_linear(x, weight, scale), exact(x, weight, scale)) < 0.04, tokens
        assert off(fp8.apply_linear(x, weight, scale, weight_only=True), exact(x, weight, scale)) < 5e-3, tokens
        assert (
            off(fp8.apply_linear(x, weight, scale, None, torch.full((1,), 0.3, device="cuda")), exact(x, weight, scale))
            < 0.04
        )
        if groups:
            quantized = fp8_quantize.quantize_activation(x, ActivationFormat("fp8_group"))
            bias = torch.randn(features, device="cuda", dtype=x.dtype)
            want = exact(dequantize_activation(quantized, torch.float64), weight, scale) + bias.cpu().double()
            assert off(fp8.apply_linear(quantized, weight, scale, bias), want) < 5e-3, tokens
        fused = fp8.apply_linear(x, weight, scale, activation="silu")
        if fused is not None:
            gate, up = exact(x, weight, scale).chunk(2, -1)
            assert off(fused, F.silu(gate) * up) < 0.06, tokens


@pytest.mark.gpu
def test_static_activations() -> None:
    weight, scale = fp8.quantize_weight(torch.randn(512, 512, device="cuda"))
    static = torch.tensor([0.01], device="cuda")
    for tokens in (1, 32, 300):
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        got = fp8.apply_linear(x, weight, scale, None, static)
        assert off(got, exact(x, weight, scale)) < 0.04
        q = fp8.quantize_activation(x, static)
        assert isinstance(q, QuantActivation)
        assert (
            off(fp8.apply_linear(q, weight, scale, None, static), exact(dequantize_activation(q), weight, scale)) < 2e-2
        )


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "blocks"), [(fp8, False), (int8, False), (fp8, True)])
def test_replays_give_the_same_bits(kind: ModuleType, blocks: bool) -> None:
    """Captured, replayed, and run again beside: sums have one order."""
    weight, scale = kind.quantize_weight(torch.randn(1024, 512, device="cuda"))
    scale = scale.view(8, 128)[:, :4].contiguous() if blocks else scale
    for tokens in (1, 8, 32, 300):
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        first = kind.apply_linear(x, weight, scale)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kind.apply_linear(x, weight, scale)
        for _ in range(3):
            graph.replay()
            assert torch.equal(out, first)

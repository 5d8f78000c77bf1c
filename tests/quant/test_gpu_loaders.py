"""Fixtures on a GPU: the kernels' layers give the logits of the tools' own weights, up to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tests.models.paged import PagedRunner
from tests.quant.test_fixtures import FIXTURES, NAMES, load
from tests.quant.tolerances import get_gpu_tolerance

from quire.core.contracts.quant import LayerInfo
from quire.core.layers.linear import Linear
from quire.plugins.quant.compressed_tensors import CompressedTensors
from quire.plugins.quant.deferred_linear import DeferredLinear
from quire.plugins.quant.kernels.fp8_layer import dequantize_weight

pytestmark = pytest.mark.gpu

INFO = LayerInfo("layer", "linear", 640, 256, ("layer",), (256,), (256,), 640, "column", torch.bfloat16, False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 24])
def test_the_logits_are_those_of_the_tools_own_weights(name: str, tokens: int) -> None:
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = load(FIXTURES / name, dtype=torch.bfloat16, device="cuda")
    runner, prompt = PagedRunner(model, 1, max_len=32), expected["tokens"].tolist()
    steps = [runner.step({0: prompt[at : at + tokens]})[0] for at in range(0, len(prompt), tokens)]
    got, want = torch.cat(steps).float().cpu(), expected["logits"]
    off = ((got - want).norm() / want.norm()).item()
    methods = [layer.method for layer in model.modules() if isinstance(layer, Linear)]
    wide = sum(isinstance(m, DeferredLinear) and m.is_dense for m in methods)
    print(f"{name} by {tokens}: off {off:.4f}, {wide} of {len(methods)} layers wide")
    assert off < get_gpu_tolerance(name, tokens)


@pytest.mark.parametrize("inputs", [{"num_bits": 8, "type": "float", "strategy": "group", "dynamic": True}, None])
def test_activations_beside_blocks_are_quantized_only_where_the_checkpoint_says_so(inputs: dict | None) -> None:
    """However many tokens there are, and by what comes before the layer."""
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": "float-quantized"}
    method = CompressedTensors({"config_groups": {"group_0": group}}).get_linear_method(INFO)
    layer, generator = torch.nn.Module(), torch.Generator().manual_seed(0)
    weight = torch.randn(256, 640, generator=generator).mul(60).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 5, generator=generator) + 0.1
    method.create_weights(layer, INFO, torch.device("cuda"))
    method.load_tensor(layer, INFO, 0, "weight", weight.cuda(), 0, 1)
    method.load_tensor(layer, INFO, 0, "weight_scale", scale.cuda(), 0, 1)
    method.process_weights_after_loading(layer)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert method.input_format == ("fp8_group" if inputs and hopper else "native")
    for tokens in (1, 24, 300):
        x = torch.randn(tokens, 640, generator=generator).to(torch.bfloat16)
        want = F.linear(x.double(), dequantize_weight(weight, scale, torch.float64))
        off = ((method.apply(layer, x.cuda()).cpu().double() - want).norm() / want.norm()).item()
        assert off < (0.04 if inputs else 0.005), tokens
        if inputs and hopper and tokens == 300:
            assert off > 0.01, "not quantized"

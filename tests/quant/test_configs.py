"""Whatever stands in ``quantization_config``, a loader says what it cannot read, or gives every layer a method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.contracts.quant import LayerInfo, LinearMethod
from quire.core.errors import CheckpointError
from quire.plugins.quant.auto_round import AutoRound
from quire.plugins.quant.awq import AWQ
from quire.plugins.quant.compressed_tensors import CompressedTensors
from quire.plugins.quant.fp8 import Fp8
from quire.plugins.quant.gptq import GPTQ
from quire.plugins.quant.int8 import Int8
from quire.plugins.quant.layerwise import LayerwiseLoader

PLAIN = st.none() | st.booleans() | st.integers(-2, 200) | st.floats() | st.sampled_from(["", "gemm", "re:(", "int"])
KEYS = st.sampled_from(["re:(", "+:(", "bits"])
JUNK = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2), max_leaves=4
)
SIZES = st.sampled_from([-1, 32, 64, 128])
WEIGHTS = st.fixed_dictionaries(
    {},
    optional={
        "num_bits": st.sampled_from([2, 3, 4, 8]) | JUNK,
        "type": st.sampled_from(["int", "float"]) | JUNK,
        "strategy": st.sampled_from(["tensor", "channel", "group", "block", "token"]) | JUNK,
        "group_size": SIZES | JUNK,
        "symmetric": st.booleans() | JUNK,
        "dynamic": st.booleans() | JUNK,
        "block_structure": st.just([128, 128]) | JUNK,
    },
)
FORMATS = st.sampled_from(["pack-quantized", "float-quantized", "int-quantized"])
GROUP = st.fixed_dictionaries(
    {"targets": st.just(["Linear"]) | JUNK, "weights": WEIGHTS | JUNK},
    optional={"input_activations": WEIGHTS | JUNK, "format": FORMATS | JUNK},
)
OVERRIDE = st.fixed_dictionaries({}, optional={"bits": st.sampled_from([4, 8]) | JUNK, "group_size": SIZES | JUNK})
CONFIG = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.sampled_from([2, 3, 4, 8]) | JUNK,
        "group_size": SIZES | JUNK,
        "version": st.sampled_from(["gemm", "GEMV", "gemv_fast"]) | JUNK,
        "checkpoint_format": st.sampled_from(["gptq", "gptq_v2"]) | JUNK,
        "packing_format": st.sampled_from(["auto_round:auto_gptq", "auto_round:auto_awq"]) | JUNK,
        "format": FORMATS | JUNK,
        "dynamic": st.dictionaries(st.sampled_from(["-:.*k_proj", "+:.*v_proj", "+:("]), OVERRIDE, max_size=2) | JUNK,
        "extra_config": st.dictionaries(st.sampled_from([".*k_proj", "("]), OVERRIDE, max_size=2) | JUNK,
        "modules_in_block_to_quantize": st.just([["self_attn.q_proj"]]) | JUNK,
        "modules_to_not_convert": st.just(["lm_head"]) | JUNK,
        "ignore": st.just(["lm_head", "re:.*v_proj"]) | JUNK,
        "meta": st.just({"quantizer": ["gptqmodel:7"]}) | JUNK,
        "weight_block_size": st.just([128, 128]) | JUNK,
        "activation_scheme": st.sampled_from(["static", "dynamic"]) | JUNK,
        "config_groups": st.dictionaries(st.just("group_0"), GROUP, min_size=1) | JUNK,
        "sparsity_config": JUNK,
    },
)
LOADERS = {
    "awq": AWQ,
    "gptq": GPTQ,
    "auto-round": AutoRound,
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8,
    "int8": Int8,
}


@pytest.mark.parametrize("method", LOADERS)
@settings(max_examples=60, deadline=None)
@given(config=CONFIG)
def test_any_configuration_is_refused_in_words_or_read(method: str, config: dict[str, Any]) -> None:
    loader: type[LayerwiseLoader] = LOADERS[method]
    config = {**config, "quant_method": "compressed-tensors" if method == "int8" else method}
    reasons = loader.unsupported(config, torch.device("cpu"))
    assert all(isinstance(reason, str) and reason and "\n" not in reason for reason in reasons)
    if reasons:
        return
    loaded = loader(config)
    names = tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
    info = LayerInfo("qkv", "linear", 128, 384, names, (128,) * 3, (128,) * 3, 128, "column", torch.float32, False)
    head = LayerInfo("lm_head", "lm_head", 128, 64, ("lm_head",), (64,), (64,), 128, "column", torch.float32, False)
    for each in (info.select_part(0), info.select_part(1), head, info):
        try:
            layer = loaded.get_linear_method(each)
            assert isinstance(layer, LinearMethod)
            assert layer.tensor_names(each.select_part(0))
        except CheckpointError as error:
            assert each.part_names[0] in str(error)

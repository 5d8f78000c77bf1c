"""Plugins of kind ``op``: chosen by operation, checked against torch, called by layers, and named when they fail."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from tests.layers.shards import make_builder
from tests.layers.test_fused_layers import HIDDEN, Fused

from quire import LLM, SamplingParams
from quire.core.errors import ConfigError, PluginError, QuireError
from quire.core.ops.implementations import TorchOperations, TritonOperations
from quire.core.testing.example_engine import example_engine, example_model
from quire.sdk import Operations
from quire.testing import parametrize_with_checks

PROMPT = [{"prompt_token_ids": list(range(20))}]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@parametrize_with_checks(TorchOperations)
def test_torch_keeps_the_contract(check):
    check()


@parametrize_with_checks(TritonOperations)
def test_triton_keeps_the_contract(check):
    check()


class Counting(Operations):
    """Torch's norm, its own calls counted; it fails at the one that its options name."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """None of them is needed."""

        fails_at: int = 0
        """The call that raises; 0: none."""

    def __init__(self, device, options=None):
        super().__init__(device, options or self.Options())
        self.count = 0

    @classmethod
    def unsupported(cls, device):
        return []

    def rms_norm(self, x, weight, eps, residual, output_format):
        self.count += 1
        if self.count == self.options.fails_at:
            raise ArithmeticError("the norm of a third-party author")
        return TorchOperations(self.device).rms_norm(x, weight, eps, residual, output_format)


class OnTheMoon(Counting):
    """Runs nowhere."""

    @classmethod
    def unsupported(cls, device):
        return ["there is no moon here"]


@pytest.fixture(scope="module")
def model():
    with example_model(repetitive=True) as found:
        yield found


def test_the_traffic_of_an_engine_is_served(model):
    """Beside ``n``, prompts alike, chunks, preemption and drafts; every operation is torch's but the norm."""
    folder, reference = model
    operations = ["all=torch", f"rms_norm={__name__}:Counting"]
    with example_engine(folder, reference, op=operations, spec_method="ngram", num_speculative_tokens=3) as engine:
        engine.assert_traffic_is_served()
        (counting,) = [each for each in gc.get_objects() if type(each) is Counting]
        assert counting.count > 100


def test_a_class_stands_for_its_name_in_python(model):
    folder, _ = model
    tokens = []
    for op in ({}, {"rms_norm": Counting, "lm_head": "torch", "embedding": "auto"}):
        llm = LLM(model=str(folder), device="cpu", cpu_threads=1, max_model_len=64, op=op)
        tokens.append(llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids)
        llm.shutdown()
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("rms_norm", "--op rms_norm: write NAME=PLUGIN, such as rms_norm=torch"),
        ("rmsnorm=torch", "'rmsnorm' is no operation; did you mean rms_norm"),
        ("rms_norm=torhc", "operation 'torhc' is not known; did you mean torch"),
        (f"lm_head={__name__}:Counting", "Counting has no lm_head; it has rms_norm"),
        (f"rms_norm={__name__}:OnTheMoon", "cannot run on cpu: there is no moon here; choose another"),
        ("rms_norm=quire.sdk:BatchingPolicy", "not a subclass of quire.sdk.Operations"),
    ],
)
def test_what_cannot_run_is_refused_at_start(model, op, reason):
    with pytest.raises((ConfigError, PluginError), match=reason):
        LLM(model=str(model[0]), device="cpu", op=[op]).shutdown()


def test_one_that_fails_is_named_and_the_engine_goes_on(model):
    """By injection: the request of the step ends with the plugin's name, the next is served."""
    llm = LLM(
        model=str(model[0]), device="cpu", cpu_threads=1, max_model_len=64, op={"rms_norm": Counting},
        plugin_options={"op": {"fails_at": 40}},
    )  # fmt: skip
    with pytest.raises(QuireError, match=r"op.*Counting"):
        llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    (output,) = llm.generate(PROMPT, GREEDY)
    assert len(output.outputs[0].token_ids) == 8
    assert llm.get_stats()["step_failures_total"] == 1
    llm.shutdown()


@pytest.mark.parametrize(
    ("replaced", "taken"),
    [
        ((), [{"norm", "gate"}]),
        (("rms_norm",), [{"gate"}]),
        (("silu_and_mul",), []),
        (("embedding",), [{"norm", "gate"}]),
    ],
)
def test_no_fused_kernel_swallows_what_was_replaced(replaced, taken):
    torch_operations = TorchOperations(torch.device("cpu"))
    builder = make_builder()
    builder.operations = builder.operations.replace_operations(dict.fromkeys(replaced, torch_operations))
    layer = builder.make_column_parallel_linear("up", HIDDEN, {"gate": HIDDEN, "up": HIDDEN})
    layer.method = Fused({"norm", "gate"})
    x = torch.randn(3, HIDDEN)
    layer.forward_after_norm(builder.make_rms_norm("norm", HIDDEN, 1e-5), x, None, activation="silu")
    assert layer.method.taken == taken


def test_a_head_that_is_quantized_is_refused():
    builder = make_builder()
    builder.operations = builder.operations.replace_operations({"lm_head": TorchOperations(torch.device("cpu"))})
    head = builder.make_lm_head("lm_head", 10, HIDDEN)
    assert head(torch.randn(2, HIDDEN)).shape == (2, 10)
    head.weight_source.weight = torch.nn.Parameter(torch.zeros(5, HIDDEN, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="--op lm_head: the weights of lm_head are quantized"):
        head(torch.randn(2, HIDDEN))

"""A layer is entered in three ways, plain or fused with its neighbours, and adapters come in once in each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quire.core.contracts.adapter import AdapterLimits
from quire.core.contracts.quant import LayerInfo, LowRankShrink, QuantActivation
from quire.core.layers import LayerBuilder, Linear, RMSNorm
from quire.core.layers.adapters import AdaptedLinearMethod, ModelAdapters
from quire.core.layers.parallel import PartialSum, TensorParallel
from quire.core.ops.device_profile import DeviceProfile
from quire.core.testing.thread_ranks import run_on_ranks
from quire.plugins.adapters.lora.method import Lora, LoraLayer
from quire.plugins.quant.none import Unquantized, UnquantizedLinear

CPU = torch.device("cpu")
HIDDEN, INNER, NUM_TOKENS = 32, 48, 5
SLOTS = [0, -1, 1, -1, 0]
SHAPES = {
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


class EightBitLinear(UnquantizedLinear):
    """Wants its input in int8, as kernels on a GPU do."""

    input_format = "int8_token"

    def apply(self, layer, x, bias=None):
        self.saw_quantized = isinstance(x, QuantActivation)
        wide = x.values.float() * x.scale if isinstance(x, QuantActivation) else x
        return F.linear(wide, layer.weight, bias)

    def apply_fused(self, layer, x, bias=None, *, norm=None, activation=None, residual=None):
        return None


class FusedLinear(UnquantizedLinear):
    """Fuses what stands beside it, as kernels on a GPU do."""

    def apply_fused(self, layer, x, bias=None, *, norm=None, activation=None, residual=None):
        if norm is not None:
            x = F.rms_norm(x, (x.shape[1],), *norm)
        out = F.linear(x, layer.weight, bias)
        if activation is not None:
            gate, up = out.chunk(2, 1)
            out = F.silu(gate) * up
        return out if residual is None else out + residual


class AddingLinear(FusedLinear):
    """Adds what adapters make of few tokens to its product, as kernels on a GPU do."""

    def apply_fused(self, layer, x, bias=None, *, norm=None, activation=None, residual=None):
        return self.apply_with_adapters(
            layer, x, bias, LowRankShrink(lambda x, norm: None), norm=norm, activation=activation, residual=residual
        )

    def apply_with_adapters(self, layer, x, bias, shrink, *, norm=None, activation=None, residual=None):
        term, stream = shrink.launch(x, norm), x
        if norm is not None:
            x = F.rms_norm(x, (x.shape[1],), *norm)
        out = F.linear(x, layer.weight, bias)
        if term is not None:
            root = 1.0 if norm is None else (stream.square().mean(1) + norm[1]).rsqrt()[:, None]
            v, max_rank = term.v.sum(0) * root, term.b.shape[1]
            for token, slot in enumerate(term.slots[: len(x)].tolist()):
                at = 0
                for part, size in enumerate(term.part_sizes if slot >= 0 else ()):
                    rank = int(term.ranks[slot, part])
                    v_of_part = v[token, part * max_rank :][:rank]
                    out[token, at : at + size] += v_of_part @ term.b[slot, :rank, at : at + size]
                    at += size
        if activation is not None:
            gate, up = out.chunk(2, 1)
            out = F.silu(gate) * up
        self.num_fused = getattr(self, "num_fused", 0) + (term is not None)
        return out if residual is None else out + residual


class AppendingLinear(UnquantizedLinear):
    """Multiplies the adapters' first matrices too, which lie behind its weight."""

    num_appended = 0

    def apply_appended(self, layer, x, bias, num_rows, *, norm=None):
        out = super().apply_appended(layer, x, bias, num_rows, norm=norm)
        self.num_appended += out is not None
        return out


class SummingLinear(UnquantizedLinear):
    """Leaves partial sums over the halves of its inputs."""

    num_partial = 0

    def apply_partial(self, layer, x):
        self.num_partial += 1
        halves = zip(x.chunk(2, 1), layer.weight.chunk(2, 1), strict=True)
        return torch.stack([half @ weight.T for half, weight in halves])


class SummingLora(Lora):
    """Adds to partial sums by its kernel, in Triton's interpreter."""

    def make_layer(self, info: LayerInfo, rank: int, world_size: int) -> LoraLayer:
        layer = super().make_layer(info, rank, world_size)
        layer.adds_to_partial = lambda num_tokens: True
        return layer

    def prepare_metadata(self, token_slots, *, is_captured=False):
        super().prepare_metadata(token_slots, is_captured=True)


class ShrinkingLora(Lora):
    """Launches the first product by its kernel, in Triton's interpreter."""

    def make_layer(self, info: LayerInfo, rank: int, world_size: int) -> LoraLayer:
        layer = super().make_layer(info, rank, world_size)
        layer.get_shrink = lambda num_tokens: LowRankShrink(layer.shrink)
        return layer

    def prepare_metadata(self, token_slots, *, is_captured=False):
        super().prepare_metadata(token_slots, is_captured=True)


class Loader(Unquantized):
    method_class: type[UnquantizedLinear] = UnquantizedLinear

    def get_linear_method(self, info: LayerInfo) -> UnquantizedLinear:
        return self.method_class()


class Layers:
    """Gate and up in one layer, and down, with adapters in two slots; and what each adds to which weight."""

    def __init__(
        self, path: Path, method_class: type[UnquantizedLinear], parallel: TensorParallel | None = None
    ) -> None:
        parallel = parallel or TensorParallel()
        adapters = {AddingLinear: ShrinkingLora, SummingLinear: SummingLora}.get(method_class, Lora)
        options = Lora.Options(append_to_weight=method_class is AppendingLinear)
        self.method = adapters(AdapterLimits(2, 16, 16, torch.float32, CPU), options)
        self.adapters = ModelAdapters(self.method)
        loader = Loader({})
        loader.method_class = method_class
        builder = LayerBuilder(torch.float32, CPU, torch.float32, 4, loader, parallel, adapters=self.adapters)
        gate_up = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), INNER)
        self.gate_up = builder.make_column_parallel_linear("mlp.gate_up_proj", HIDDEN, gate_up)
        self.down = builder.make_row_parallel_linear("mlp.down_proj", INNER, HIDDEN, bias=True)
        generator = torch.Generator().manual_seed(0)
        self.weights = {name: torch.randn(*shape, generator=generator) * 0.2 for name, shape in SHAPES.items()}
        bias = torch.randn(HIDDEN, generator=generator)
        for layer in (self.gate_up, self.down):
            for name, load in layer.weight_loaders().items():
                load(bias if name.endswith("bias") else self.weights[name.removesuffix(".weight")])
        self.bias = bias
        self.norm = RMSNorm("norm", HIDDEN, 1e-5, torch.float32, CPU)
        self.norm.weight.data.uniform_(0.5, 1.5)
        self.deltas = []
        for slot in range(2):
            folder = path / f"{slot}"
            if not folder.is_dir():
                self.deltas.append(Lora.save_example_adapter(folder, SHAPES, slot))
            adapter = Lora.read_adapter(folder, max_rank=16, module_shapes=SHAPES)
            for each in self.adapters.layers.values():
                for buffer, tensor in zip(each.slot_buffers(slot), each.make_tensors(adapter), strict=True):
                    if tensor is not None:
                        buffer[: len(tensor)].copy_(tensor)

    def prepare(self, slots: list[int]) -> None:
        self.method.is_active = max(slots) >= 0
        if self.method.is_active:
            self.method.prepare_metadata(np.array(slots, np.int32))

    def multiply(self, name: str, x: Tensor, slots: list[int]) -> Tensor:
        rows = [
            row @ (self.weights[name] + (self.deltas[slot][name] if slot >= 0 else 0)).T
            for row, slot in zip(x, slots, strict=True)
        ]
        return torch.stack(rows)


@pytest.mark.parametrize(
    "method_class", [UnquantizedLinear, FusedLinear, AddingLinear, SummingLinear, EightBitLinear, AppendingLinear]
)
@pytest.mark.parametrize("slots", [SLOTS, [1] * NUM_TOKENS, [-1] * NUM_TOKENS], ids=["mixed", "one", "none"])
def test_every_entrance_adds_the_adapters(tmp_path: Path, method_class, slots: list[int]) -> None:
    layers, tolerance = Layers(tmp_path, method_class), 0.03 if method_class is EightBitLinear else 1e-5
    layers.prepare(slots)
    generator = torch.Generator().manual_seed(1)
    x, residual = torch.randn(2, NUM_TOKENS, HIDDEN, generator=generator)
    for residual_in in (None, residual):
        stream = x if residual_in is None else x + residual_in
        normed = F.rms_norm(stream, (HIDDEN,), layers.norm.weight, 1e-5)
        gate, up = (layers.multiply(f"mlp.{name}_proj", normed, slots) for name in ("gate", "up"))
        out, kept = layers.gate_up.forward_after_norm(layers.norm, x, residual_in)
        assert_close(out, torch.cat([gate, up], 1), tolerance)
        assert_close(kept, stream, 1e-6)
        y, _ = layers.gate_up.forward_after_norm(layers.norm, x, residual_in, activation="silu", consumer=layers.down)
        hidden = F.silu(gate) * up
        expected = layers.multiply("mlp.down_proj", hidden, slots) + layers.bias + stream
        result, rest = layers.down.forward_add_residual(y, stream)
        result = result.reduce() if isinstance(result, PartialSum) else result
        assert_close(result if rest is None else result + rest, expected, tolerance)
        if method_class is EightBitLinear:  # in steps without adapters inputs are quantized by the operation before
            assert layers.down.method.inner.saw_quantized == (max(slots) < 0)
    assert_close(layers.down(hidden), layers.multiply("mlp.down_proj", hidden, slots) + layers.bias, tolerance)
    if method_class is AppendingLinear:
        assert layers.gate_up.method.inner.num_appended == (0 if max(slots) < 0 else 4)
        assert layers.down.method.inner.num_appended == (0 if max(slots) < 0 else 3)
    if method_class is SummingLinear:
        assert layers.gate_up.method.inner.num_partial == (0 if max(slots) < 0 else 4)
        assert layers.down.method.inner.num_partial == (0 if max(slots) < 0 else 3)
    if method_class is AddingLinear:  # both entrances of either layer, the activation function in one of them
        assert layers.gate_up.method.inner.num_fused == (0 if max(slots) < 0 else 4)
        assert layers.down.method.inner.num_fused == (0 if max(slots) < 0 else 3)


def test_rows_without_an_adapter_keep_their_bits(tmp_path: Path) -> None:
    """In a step with adapters, where the same kernels run."""
    layers = Layers(tmp_path, FusedLinear)
    x = torch.randn(NUM_TOKENS, HIDDEN)
    layers.prepare([-1] * NUM_TOKENS)
    plain, _ = layers.gate_up.forward_after_norm(layers.norm, x, None)
    layers.prepare(SLOTS)
    mixed, _ = layers.gate_up.forward_after_norm(layers.norm, x, None)
    base = torch.tensor(SLOTS) < 0
    assert torch.equal(mixed[base], plain[base]) and not torch.allclose(mixed[~base], plain[~base])


@pytest.mark.parametrize("method_class", [UnquantizedLinear, AppendingLinear])
def test_two_ranks_compute_what_one_does(tmp_path: Path, method_class) -> None:
    """Each has its share of an adapter, and the layers' own sum over the ranks is the only one."""
    whole = Layers(tmp_path, method_class)
    x = torch.randn(NUM_TOKENS, HIDDEN)
    whole.prepare(SLOTS)
    gate_up, _ = whole.gate_up.forward_after_norm(whole.norm, x, None, activation="silu")
    expected = whole.down(gate_up)

    def run_rank(parallel: TensorParallel) -> Tensor:
        layers = Layers(tmp_path, method_class, parallel)
        layers.norm.weight.data.copy_(whole.norm.weight)
        layers.prepare(SLOTS)
        share, _ = layers.gate_up.forward_after_norm(layers.norm, x, None, activation="silu")
        return layers.down(share)

    for got in run_on_ranks(2, run_rank):
        assert_close(got, expected, 1e-5)


def test_a_norm_adds_what_a_layer_left(tmp_path: Path) -> None:
    layers = Layers(tmp_path, AppendingLinear)
    layers.prepare(SLOTS)
    x, stream = torch.randn(NUM_TOKENS, INNER), torch.randn(NUM_TOKENS, HIDDEN)
    result, rest = layers.down.forward_add_residual(x, stream)
    assert isinstance(result, PartialSum) and rest is stream
    expected = layers.multiply("mlp.down_proj", x, SLOTS) + layers.bias + stream
    normed, summed = layers.norm(result, rest)
    assert_close(summed, expected, 1e-5)
    assert_close(normed, F.rms_norm(expected, (HIDDEN,), layers.norm.weight, 1e-5), 1e-5)


@pytest.mark.parametrize("sizes", [(96,), (64, 32), (32, 32, 32)])
def test_the_activation_function_takes_the_halves_of_any_parts(sizes: tuple[int, ...]) -> None:
    """As of a checkpoint that stores gate and up in one tensor."""
    method = Lora(AdapterLimits(2, 16, 16, torch.float32, CPU), Lora.Options(append_to_weight=True))
    layer = method.make_layer(make_info(sizes, 64), 0, 1)
    method.prepare_metadata(np.array(SLOTS, np.int32))
    layer.slot_buffers(0)[-2].normal_()
    wide = torch.randn(NUM_TOKENS, 96 + layer.count_appended_rows())
    gate, up = layer.add_appended(wide, None, None).chunk(2, 1)
    residual = torch.randn(NUM_TOKENS, 48)
    assert_close(layer.add_appended(wide, "silu", residual), F.silu(gate) * up + residual, 1e-6)


def test_layers_of_more_than_three_parts_have_no_adapters() -> None:
    info = make_info((16,) * 4, 64)
    assert Lora.unsupported(info) == "a layer of 4 fused parts" and Lora.unsupported(make_info((16,) * 3, 64)) is None
    method = Lora(AdapterLimits(2, 16, 16, torch.float32, CPU), Lora.Options(append_to_weight=True))
    assert method.make_layer(info, 0, 1).count_appended_rows() == 0


@pytest.mark.parametrize(
    ("rank", "sizes", "num_tokens", "forced", "expected"),
    [
        (16, (4096, 1024, 1024), 512, False, 3072),  # half of the layer
        (16, (4096, 1024, 960), 16, False, 0),
        (16, (4096, 1024, 960), 16, True, 3072),
        (32, (4096, 1024, 1024), 1, False, 0),
        (16, (4096,), 513, False, 0),
        (16, (4096,), 512, False, 1024),
    ],
)
def test_rows_behind_a_weight_are_bounded_by_it(
    rank: int, sizes: tuple[int, ...], num_tokens: int, forced: bool, expected: int
) -> None:
    options = Lora.Options(append_to_weight=forced or None)
    layer = Lora(AdapterLimits(64, rank, 16, torch.float32, CPU), options).make_layer(make_info(sizes, 16), 0, 1)
    assert layer.count_active_rows(num_tokens) == expected


@pytest.mark.parametrize(
    ("capability", "dtype", "rank", "add_in_product", "counts"),
    [
        ((9, 0), torch.bfloat16, 16, True, (64,)),
        ((9, 0), torch.bfloat16, 64, True, (64,)),
        ((9, 0), torch.bfloat16, 65, True, (1, 8, 64)),
        ((9, 0), torch.float32, 16, True, (1, 8, 64)),
        ((9, 0), torch.bfloat16, 16, False, (1, 8, 64)),
        ((8, 0), torch.bfloat16, 16, True, (1, 8, 64)),
    ],
)
def test_a_few_tokens_read_the_slots_that_they_name(
    monkeypatch: pytest.MonkeyPatch, capability, dtype: torch.dtype, rank: int, add_in_product: bool, counts
) -> None:
    """Where no kernel of the layers adds each token's own adapter."""
    profile = DeviceProfile("card", capability, 132, 0, 0)
    monkeypatch.setattr(DeviceProfile, "detect", lambda device: profile)
    method = Lora(AdapterLimits(64, rank, 16, dtype, CPU), Lora.Options(add_in_product=add_in_product))
    layer = method.make_layer(make_info((32,), 16), 0, 1)
    method.limits = AdapterLimits(64, rank, 16, dtype, torch.device("cuda"))
    assert method.list_slot_counts(8) == (64,), "no layer has rows behind its weight"
    layer.place_appended_rows(torch.empty(64 * 128, 16, dtype=dtype))
    assert method.list_slot_counts(8) == counts and method.list_slot_counts(9) == (1, 8, 64)


def test_a_residual_of_strided_rows_is_added_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read dense rows: shown any others, they would add other numbers."""

    def add_dense_rows(layer, wide, residual, norm, output_format):
        rows = residual.as_strided(residual.shape, (residual.shape[1], 1))
        stream = layer.add_appended(wide, None, None) + rows
        return F.rms_norm(stream, (HIDDEN,), *norm), stream

    monkeypatch.setattr(LoraLayer, "add_appended_and_norm", add_dense_rows)
    layers = Layers(tmp_path, AppendingLinear)
    layers.prepare(SLOTS)
    x = torch.randn(NUM_TOKENS, INNER)
    for stream in (torch.randn(NUM_TOKENS, HIDDEN), torch.randn(NUM_TOKENS, 2 * HIDDEN)[:, ::2]):
        result, rest = layers.down.forward_add_residual(x, stream)
        assert isinstance(result, PartialSum) and result.num_tokens == NUM_TOKENS
        _, summed = layers.norm(result, rest)
        assert_close(summed, layers.multiply("mlp.down_proj", x, SLOTS) + layers.bias + stream, 1e-5)


def test_target_modules_bound_what_can_be_adapted() -> None:
    """Other layers are as without adapters: they hold nothing for them."""
    adapters = ModelAdapters(Lora(AdapterLimits(2, 16, 16, torch.float32, CPU)), ["up_proj", "down_proj"])
    builder = LayerBuilder(torch.float32, CPU, torch.float32, 4, Unquantized({}), adapters=adapters)
    gate_up = builder.make_column_parallel_linear("gate_up_proj", 32, {"gate_proj": 16, "up_proj": 16})
    qkv = builder.make_qkv_parallel_linear("self_attn", 32, 2, 1, 16)
    head = builder.make_lm_head("lm_head", 64, 32)
    assert isinstance(gate_up.method, AdaptedLinearMethod) and isinstance(qkv.method, UnquantizedLinear)
    assert isinstance(head.weight_source, Linear) and isinstance(head.weight_source.method, UnquantizedLinear)
    assert adapters.module_shapes == {"up_proj": (16, 32)} and list(adapters.layers) == ["gate_up_proj"]


def make_info(sizes: tuple[int, ...], inputs: int) -> LayerInfo:
    names = tuple(f"part{index}" for index in range(len(sizes)))
    return LayerInfo(
        "layer", "linear", inputs, sum(sizes), names, sizes, sizes, inputs, "column", torch.float32, bias=False
    )


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert (got - expected).norm() <= tolerance * expected.norm()

"""What every quantization loader must keep: it says what it cannot do, and multiplies as the dense layer would."""

from __future__ import annotations

import unittest
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from quire.core.contracts.quant import InputFormat, LayerInfo, LinearMethod, QuantizationLoader, StoredWeight
from quire.core.errors import CheckpointError
from quire.core.plugin.options import parse_options
from quire.core.testing.capture_rules import assert_can_be_captured

__all__ = [
    "check_a_bias_is_added",
    "check_a_product_is_kept",
    "check_a_row_does_not_depend_on_the_others",
    "check_a_wrong_shape_is_refused_by_name",
    "check_any_number_of_tokens_multiplies",
    "check_every_layer_has_a_method",
    "check_products_for_adapters_are_the_product",
    "check_random_weights_multiply",
    "check_shards_make_up_the_whole",
    "check_the_product_can_be_captured",
    "check_the_product_is_the_dense_one",
    "check_the_same_input_gives_the_same_bits",
    "check_unsupported_gives_reasons",
]

_CPU = torch.device("cpu")
_PARTS = (32, 16, 16)
_INPUTS = 128


def check_unsupported_gives_reasons(cls: type[QuantizationLoader]) -> None:
    """``unsupported`` answers with a list of sentences, whatever the checkpoint says, and never raises."""
    for config in ({}, {"quant_method": "no_such_method"}, {"quant_method": "no_such_method", "bits": 3}):
        reasons = cls.unsupported(config, _CPU)
        assert isinstance(reasons, list) and all(isinstance(r, str) and r for r in reasons), f"answered {reasons!r}"
    assert cls.unsupported({"quant_method": "no_such_method"}, _CPU), "claims to read a scheme that does not exist"


def check_every_layer_has_a_method(cls: type[QuantizationLoader]) -> None:
    """``get_linear_method`` gives a LinearMethod with a known input format for each kind of layer."""
    loader = _example(cls)
    for kind in ("linear", "lm_head"):
        info = _info(kind=kind)
        method = loader.get_linear_method(info)
        assert isinstance(method, LinearMethod), f"{kind}: gave {method!r}"
        assert method.input_format in get_args(InputFormat), method.input_format
        for part in range(len(info.part_names)):
            names, may_lack = method.tensor_names(info.select_part(part)), method.optional_names(info.select_part(part))
            assert names and len(set(names)) == len(names), f"{kind}: tensor_names {names!r}"
            assert set(may_lack) < set(names), f"{kind}: optional_names {may_lack!r} are not some of {names!r}"


def check_random_weights_multiply(cls: type[QuantizationLoader]) -> None:
    """Where nothing is loaded (``--load-format dummy``) the layer multiplies all the same, by finite weights."""
    info, layer = _info(), nn.Module()
    method = _example(cls).get_linear_method(info)
    method.create_weights(layer, info, _CPU)
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(0.01)
    method.process_weights_after_loading(layer)
    assert any(True for _ in layer.parameters()), "the layer has no parameters, whose memory could be counted"
    if method.input_format == "native":
        x = _input()
        y = method.apply(layer, x)
        assert y.shape == (len(x), info.out_features) and y.dtype == x.dtype, f"gave {tuple(y.shape)} {y.dtype}"
        assert bool(y.isfinite().all()), "gave infinite numbers"


def check_the_product_is_the_dense_one(cls: type[QuantizationLoader]) -> None:
    """After loading a checkpoint, plain or stored as ``example_tensors`` says, the product is that of the weights: off
    by a fiftieth of its size at most where they are stored, by a tenth where they are quantized as they are loaded."""
    x, example = _input(), _example_weights(cls)
    got, want = _apply(cls, example, x), x @ torch.cat([part.weight for part in example.parts]).T
    assert got.shape == want.shape and got.dtype == x.dtype, f"got {tuple(got.shape)} {got.dtype}"
    _close(got, want, "all parts", 0.02 if example.config else 0.1)
    for i, (of_part, expected) in enumerate(zip(got.split(_PARTS, 1), want.split(_PARTS, 1), strict=True)):
        _close(of_part, expected, f"part {i} of {len(_PARTS)}", 0.04 if example.config else 0.1)


def check_a_bias_is_added(cls: type[QuantizationLoader]) -> None:
    """``apply`` adds the bias that it is given to each token."""
    x, example = _input(), _example_weights(cls)
    bias = torch.linspace(-3, 3, sum(_PARTS))
    _close(_apply(cls, example, x, bias=bias) - _apply(cls, example, x), bias.expand(len(x), -1), "the bias", 0.02)


def check_any_number_of_tokens_multiplies(cls: type[QuantizationLoader]) -> None:
    """One token, some, and hundreds give what they give together."""
    example, x = _example_weights(cls), torch.randn(300, _INPUTS, generator=torch.Generator().manual_seed(4))
    together = _apply(cls, example, x)
    for count in (1, 2, 17, 129):
        _close(_apply(cls, example, x[:count]), together[:count], f"{count} tokens", 0.05)
        if _load(cls, example).method.batch_invariant:
            same = torch.equal(_apply(cls, example, x[:count]), together[:count])
            assert same, f"it declares itself batch invariant; {count} tokens give other bits alone than among 300"


def check_a_row_does_not_depend_on_the_others(cls: type[QuantizationLoader]) -> None:
    """A token's product is the same beside tokens that are large, zero or no numbers, and in another place."""
    loaded, x = _load(cls, _example_weights(cls)), _input()
    want = loaded.method.apply(loaded.layer, x)
    for what, others in (("larger", x * 1000), ("zero", x * 0), ("not numbers", x * float("nan"))):
        for row in range(len(x)):
            mixed = others.clone()
            mixed[row] = x[row]
            got = loaded.method.apply(loaded.layer, mixed)[row : row + 1]
            _close(got, want[row : row + 1], f"token {row} beside others that are {what}", 0.02)
    _close(loaded.method.apply(loaded.layer, x.flip(0)).flip(0), want, "tokens in the opposite order", 0.02)


def check_a_product_is_kept(cls: type[QuantizationLoader]) -> None:
    """No later call overwrites what ``apply`` returned, and what its caller writes there is in no later product."""
    example, x = _example_weights(cls), _input()
    loaded, products, expected = _load(cls, example), [], []
    for each in (loaded, _load(cls, example)):
        for factor in (1.0, -1.0, 0.5, 2.0):
            products.append(each.method.apply(each.layer, x * factor))
            expected.append(products[-1].clone())
    for product, before in zip(products, expected, strict=True):
        assert torch.equal(product, before), "a later product overwrote one whose caller still held it"
    for product in products:
        product.zero_()
    again = loaded.method.apply(loaded.layer, x)
    assert torch.equal(again, expected[0]), "a product is other after its caller wrote to earlier ones: they are kept"


def check_products_for_adapters_are_the_product(cls: type[QuantizationLoader]) -> None:
    """Where they are offered: the partial sums of ``apply_partial`` add up to the product, and ``apply_appended`` gives
    it and behind it the product of as many of the appended rows as are asked for."""
    x, example, num_rows = _input(), _example_weights(cls), 16
    loaded = _load(cls, example, num_rows=num_rows)
    want = loaded.method.apply(loaded.layer, x)
    partial = loaded.method.apply_partial(loaded.layer, x)
    if partial is not None:
        assert partial.shape[1:] == want.shape, f"partial sums of shape {tuple(partial.shape)}"
        _close(partial.float().sum(0), want, "the sum of the partial sums", 0.02)
    if loaded.rows is None:
        return
    shape = num_rows, _INPUTS
    assert loaded.rows.shape == shape, f"append_rows gave {tuple(loaded.rows.shape)}, asked for {shape}"
    assert not loaded.rows.any(), "the appended rows are not zero"
    loaded.rows.normal_(generator=torch.Generator().manual_seed(3))
    for count in (num_rows, num_rows // 2):
        wide = loaded.method.apply_appended(loaded.layer, x, None, count)
        if wide is not None:
            product, behind = wide.split([want.shape[1], count], 1)
            _close(product, want, f"the product in front of {count} appended rows", 0.02)
            _close(behind, x @ loaded.rows[:count].T, f"the product of {count} appended rows", 0.02)


def check_the_same_input_gives_the_same_bits(cls: type[QuantizationLoader]) -> None:
    """The reduction order is fixed."""
    x, example = _input(), _example_weights(cls)
    assert torch.equal(_apply(cls, example, x), _apply(cls, example, x)), "two products differ"


def check_the_product_can_be_captured(cls: type[QuantizationLoader]) -> None:
    """A product calls nothing that a CUDA graph cannot hold: no tensor of numbers of the host, no ``item``, no result
    whose size depends on values. Where the code asks for a device, what runs on a CPU says nothing about that."""
    x, loaded = _input(), _load(cls, _example_weights(cls))
    assert_can_be_captured(lambda: loaded.method.apply(loaded.layer, x))


def check_shards_make_up_the_whole(cls: type[QuantizationLoader]) -> None:
    """The columns of two or four ranks side by side, or their rows added up, are what one rank computes. Shares of four
    may be refused with CheckpointError: they are of 32 inputs, less than a group of some formats."""
    x, example = _input(), _example_weights(cls)
    whole = _apply(cls, example, x)
    _check_shares(cls, example, x, whole, 2)
    with suppress(CheckpointError):
        _check_shares(cls, example, x, whole, 4)


def check_a_wrong_shape_is_refused_by_name(cls: type[QuantizationLoader]) -> None:
    """A tensor that does not fit raises CheckpointError with the name of the tensor. An optional one, but for the bias,
    may have no use, and is then left unread whatever its shape."""
    info, layer = _info(), nn.Module()
    method = _example(cls).get_linear_method(info)
    method.create_weights(layer, info, _CPU)
    may_be_unread = set(method.optional_names(info)) - {"bias"}
    for name in method.tensor_names(info.select_part(1)):
        try:
            method.load_tensor(layer, info, 1, name, torch.zeros(7, 9), 0, 1)
        except CheckpointError as error:
            assert f"part1.{name}" in str(error), f"does not name the tensor part1.{name}: {error}"
        else:
            assert name in may_be_unread, f"a (7, 9) tensor was loaded as {name} of a layer of (16, 128)"


def _check_shares(cls: type[QuantizationLoader], example: _ExampleWeights, x: Tensor, whole: Tensor, n: int) -> None:
    sizes = [size // n for size in _PARTS]
    shares = [_apply(cls, example, x, "column", rank, n).split(sizes, dim=1) for rank in range(n)]
    side_by_side = torch.cat([torch.cat(of_part, dim=1) for of_part in zip(*shares, strict=True)], dim=1)
    _close(side_by_side, whole, f"columns of {n} ranks", 0.05)
    inputs = x.chunk(n, dim=1)
    added = sum((_apply(cls, example, inputs[rank], "row", rank, n) for rank in range(n)), torch.zeros(()))
    _close(added, whole, f"rows of {n} ranks", 0.05)


def _example(cls: type[QuantizationLoader]) -> QuantizationLoader:
    """A loader of what it says that it reads."""
    config = cls.example_config()
    reasons = cls.unsupported(config, _CPU)
    assert not reasons, f"example_config() gives {config!r}, of which unsupported() says: {reasons[0]}"
    return cls(config, parse_options(cls, {}))


@dataclass(frozen=True)
class _ExampleWeights:
    config: Mapping[str, Any]
    """Empty: a plain checkpoint."""
    parts: list[StoredWeight]


def _example_weights(cls: type[QuantizationLoader]) -> _ExampleWeights:
    """The parts of a layer as ``example_tensors`` stores them, or plain ones for a loader that reads those."""
    stored = [cls.example_tensors(size, _INPUTS) for size in _PARTS]
    parts = [part for part in stored if part is not None]
    if parts:
        for size, part in zip(_PARTS, parts, strict=True):
            assert part.weight.shape == (size, _INPUTS), f"example_tensors gave a weight of {tuple(part.weight.shape)}"
            assert part.weight.std() > 0 and bool(part.weight.isfinite().all()), "its weights are all the same"
        return _ExampleWeights(cls.example_config(), parts)
    reasons = cls.unsupported({}, _CPU)
    assert not reasons, (
        "example_tensors() gives nothing, and it reads no plain checkpoint on the CPU "
        f"({reasons[0]}): write it, or nothing can be multiplied"
    )
    return _ExampleWeights({}, [StoredWeight({"weight": weight}, weight) for weight in _weights()])


def _info(
    shard: Literal["column", "row"] = "column", world_size: int = 1, kind: Any = "linear", bias: bool = False
) -> LayerInfo:
    sizes = tuple(s // (world_size if shard == "column" else 1) for s in _PARTS)
    return LayerInfo(
        name="layer",
        kind=kind,
        in_features=_INPUTS // (world_size if shard == "row" else 1),
        in_total=_INPUTS,
        out_features=sum(sizes),
        part_names=("part0", "part1", "part2"),
        part_sizes=sizes,
        part_totals=_PARTS,
        shard=shard,
        dtype=torch.float32,
        bias=bias,
    )


@dataclass(frozen=True)
class _LoadedLayer:
    layer: nn.Module
    method: LinearMethod
    rows: Tensor | None
    """Appended to the weight."""


def _load(
    cls: type[QuantizationLoader],
    example: _ExampleWeights,
    shard: Literal["column", "row"] = "column",
    rank: int = 0,
    world_size: int = 1,
    num_rows: int = 0,
) -> _LoadedLayer:
    """The layer as this rank loads it, with room for ``num_rows`` more behind its weight."""
    info, layer = _info(shard, world_size), nn.Module()
    method = cls(example.config, parse_options(cls, {})).get_linear_method(info)
    if method.input_format != "native":
        raise unittest.SkipTest(f"takes {method.input_format} inputs")
    method.create_weights(layer, info, _CPU)
    rows = method.append_rows(layer, num_rows) if num_rows else None
    for i, part in enumerate(example.parts):
        for name, tensor in part.tensors.items():
            method.load_tensor(layer, info, i, name, tensor, rank, world_size)
    method.process_weights_after_loading(layer)
    return _LoadedLayer(layer, method, rows)


def _apply(
    cls: type[QuantizationLoader],
    example: _ExampleWeights,
    x: Tensor,
    shard: Literal["column", "row"] = "column",
    rank: int = 0,
    world_size: int = 1,
    bias: Tensor | None = None,
) -> Tensor:
    """Load ``example`` as this rank would, and multiply."""
    loaded = _load(cls, example, shard, rank, world_size)
    return loaded.method.apply(loaded.layer, x, bias)


def _weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, _INPUTS, generator=generator) / _INPUTS**0.5 for size in _PARTS]


def _input() -> Tensor:
    return torch.randn(5, _INPUTS, generator=torch.Generator().manual_seed(1))


def _close(got: Tensor, want: Tensor, what: str, limit: float) -> None:
    off = ((got - want).norm() / want.norm()).item()
    if off < limit:
        return
    token, output = divmod(int((got - want).abs().nan_to_num(nan=float("inf")).argmax()), want.shape[1])
    raise AssertionError(
        f"{what}: off by {off:.3f} of the product's size, at most {limit} may be rounding; worst at token {token} of "
        f"{len(want)}, output {output} of {want.shape[1]}: {float(got[token, output]):.4g}, expected "
        f"{float(want[token, output]):.4g}; parts {_PARTS}, {_INPUTS} inputs"
    )

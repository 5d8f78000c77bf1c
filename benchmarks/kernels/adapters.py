"""Time what LoRA adapters add to the linear layers of one decoder layer: a CUDA graph of the four, without and with.

    PYTHONPATH=src python benchmarks/kernels/adapters.py [--quantization fp8]
    PYTHONPATH=src python benchmarks/kernels/adapters.py --model llama-3.1-8b-awq

Microseconds a decoder layer: queries, keys and values behind their norm, the rotary embedding, output, gate and up
behind their norm with the activation function, down; no attention. ``base`` is without adapters, the others are what
adapters of rank 16 on all of them add to that: one for all tokens, as is the default, with A behind the layers' weights
for any number of tokens (``in weight``; ``apart``: and added by kernels of their own alone), and by kernels behind the
layers (``behind``); then eight and 64, in turns. ``bytes`` is what reading them takes at the memory's bandwidth. All
take turns, on several copies of the layer so that weights come from memory. ``--hidden 64`` is for a look without a
GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.core.contracts.attention import LayerKV
from quire.core.layers.adapters import ModelAdapters
from quire.core.layers.builder import LayerBuilder
from quire.core.ops.device_profile import DeviceProfile
from quire.core.ops.rope import rope_and_cache
from quire.plugins.adapters.lora.method import Lora
from quire.plugins.quant.awq import AWQ
from quire.plugins.quant.fp8 import Fp8
from quire.plugins.quant.gptq import GPTQ
from quire.plugins.quant.int8 import Int8
from quire.plugins.quant.none import Unquantized
from quire.sdk import AdapterLimits, QuantizationLoader
from quire.server.plugin_bench.timer import L2_BYTES, make_timer, run_alternately

MODELS = Path(__file__).parents[1] / "models"
LOADERS: dict[str, type[QuantizationLoader]] = {"none": Unquantized, "fp8": Fp8, "int8": Int8, "awq": AWQ, "gptq": GPTQ}
NUM_SLOTS, RANK = 64, 16
_IN_WEIGHT = Lora.Options(add_in_product=False, append_to_weight=True, max_normed_tokens=1 << 20)
_BEHIND = Lora.Options(add_in_product=False, append_to_weight=False)
COLUMNS: dict[str, tuple[int, Lora.Options]] = {
    "one": (1, Lora.Options()),
    "one, in weight": (1, _IN_WEIGHT),
    "one, apart": (1, replace(_IN_WEIGHT, max_normed_tokens=0, max_rotated_tokens=0)),
    "one, behind": (1, _BEHIND),
    "8": (8, Lora.Options()),
    "64": (64, Lora.Options()),
    "64, behind": (64, _BEHIND),
}
"""Adapters in a batch, and what layers' kernels may do of them."""


@dataclass(frozen=True)
class Shape:
    """Of a decoder layer."""

    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class DecoderLayer:
    """The linear layers of a decoder layer, with an adapter in every slot."""

    def __init__(self, shape: Shape, loader: QuantizationLoader, adapters: ModelAdapters, dtype: torch.dtype) -> None:
        device = adapters.method.limits.device
        builder = LayerBuilder(dtype, device, dtype, 16, loader, adapters=adapters)
        hidden, heads = shape.hidden, (shape.num_heads, shape.num_kv_heads, shape.head_dim)
        self.qkv = builder.make_qkv_parallel_linear("self_attn", hidden, *heads)
        self.o = builder.make_row_parallel_linear("o_proj", shape.num_heads * shape.head_dim, hidden)
        gate_up = dict.fromkeys(("gate_proj", "up_proj"), shape.inner)
        self.gate_up = builder.make_column_parallel_linear("gate_up_proj", hidden, gate_up)
        self.down = builder.make_row_parallel_linear("down_proj", shape.inner, hidden)
        self.norms = [builder.make_rms_norm(name, hidden, 1e-5) for name in ("input_norm", "post_attention_norm")]
        for layer in (self.qkv, self.o, self.gate_up, self.down):
            layer.process_weights_after_loading()
        for module in (self.qkv, self.o, self.gate_up, self.down, *self.norms):
            for parameter in module.parameters():
                if parameter.dtype == dtype:
                    parameter.data.normal_(0, 0.02)
        self.head_dim = shape.head_dim
        self.positions = torch.arange(2048, device=device)
        self.cos_sin = torch.rand(2048, shape.head_dim, device=device)
        cache = torch.zeros(2, 128, shape.num_kv_heads, 16, shape.head_dim, dtype=dtype, device=device)
        self.kv = LayerKV(cache[0], cache[1])

    def run(self, stream: Tensor) -> Tensor:
        """``stream`` (num_tokens, hidden) behind all of it and the next norm; queries are attention's output."""
        qkv, stream, term = self.qkv.forward_after_norm_unadded(self.norms[0], stream, None)
        q, k, v = (x.unflatten(1, (-1, self.head_dim)) for x in qkv.split(self.qkv.info.part_sizes, 1))
        positions = self.positions[: len(q)]
        q, _ = rope_and_cache(q, k, v, positions, self.cos_sin, self.kv, positions, adapters=term)
        x, rest = self.o.forward_add_residual(q.flatten(1).contiguous(), stream)
        hidden, stream = self.gate_up.forward_after_norm(self.norms[1], x, rest, activation="silu", consumer=self.down)
        x, rest = self.down.forward_add_residual(hidden, stream)
        y: Tensor = self.norms[1](x) if rest is None else self.norms[1](x, rest)[0]
        return y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--quantization", choices=LOADERS, help="default: as the model's config.json says")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128, 256, 2048])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, help="another size than the model's, other sizes as multiples of it")
    args = parser.parse_args()
    config = json.loads((MODELS / args.model / "config.json").read_text())
    shape = read_shape(config, args.hidden)
    quantization = config.get("quantization_config", {})
    name = args.quantization or quantization.get("quant_method", "none")
    loader = LOADERS[name]({} if args.quantization else quantization)
    is_on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if is_on_gpu else (torch.device("cpu"), torch.float32)
    bandwidth = DeviceProfile.detect(device).memory_bandwidth or float("nan")
    where = torch.cuda.get_device_name() if is_on_gpu else "the CPU"
    print(f"{args.model} {name}, hidden {shape.hidden}, rank {RANK}, on {where}")
    print(f"{'batch':>5} {'base':>9}" + "".join(f" {column:>15}" for column in COLUMNS) + f" {'bytes of one':>13}")
    with torch.inference_mode():
        for batch in args.batches:
            base, added = time_batch(shape, loader, device, dtype, batch, args.rounds)
            cells = "".join(f" {us:+7.2f} {100 * us / base:+6.1f}%" for us in added.values())
            one = 2 * RANK * count_sizes(shape) / bandwidth * 1e6
            print(f"{batch:5} {base:9.2f}{cells} {one:10.2f} us", flush=True)


def read_shape(config: dict[str, Any], hidden: int | None) -> Shape:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if hidden is None:
        head_dim = config.get("head_dim", config["hidden_size"] // heads)
        return Shape(config["hidden_size"], config["intermediate_size"], heads, kv_heads, head_dim)
    return Shape(hidden, 2 * hidden, 2, 1, hidden // 2)


def count_sizes(shape: Shape) -> int:
    """Inputs and outputs of every projection: numbers of an adapter of rank 1."""
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    outputs = [heads, kv_heads, kv_heads, shape.hidden, shape.inner, shape.inner, shape.hidden]
    inputs = [shape.hidden] * 3 + [heads] + [shape.hidden] * 2 + [shape.inner]
    return sum(inputs) + sum(outputs)


def time_batch(
    shape: Shape, loader: QuantizationLoader, device: torch.device, dtype: torch.dtype, batch: int, rounds: int
) -> tuple[float, dict[str, float]]:
    """Microseconds of a layer without adapters, and what each of ``COLUMNS`` adds."""
    stream = torch.randn(batch, shape.hidden, device=device, dtype=dtype)
    limits = AdapterLimits(NUM_SLOTS, RANK, max(batch, 16), dtype, device)
    timers, counts, kept = {}, {}, []
    for name, (num_adapters, options) in {"base": (0, Lora.Options()), **COLUMNS}.items():
        method = Lora(limits, options)
        adapters = ModelAdapters(method)
        layers = [DecoderLayer(shape, loader, adapters, dtype)]
        fill_slots(adapters)
        size = sum(p.nbytes for p in layers[0].gate_up.parameters()) * 2
        while device.type == "cuda" and size * len(layers) < L2_BYTES:
            layers.append(DecoderLayer(shape, loader, adapters, dtype))
            fill_slots(adapters)
        method.is_active = num_adapters > 0
        if num_adapters:
            method.num_named_slots = next(count for count in (1, 8, NUM_SLOTS) if count >= num_adapters)
            method.prepare_metadata(np.arange(batch, dtype=np.int32) % num_adapters, is_captured=True)

        def launch(layers: list[DecoderLayer] = layers, method: Lora = method, active: bool = num_adapters > 0) -> None:
            method.is_active = active
            for layer in layers:
                layer.run(stream)

        timers[name], counts[name] = make_timer(launch, device), len(layers)
        kept.append(layers)
    seconds = run_alternately(timers, rounds)
    us = {name: 1e6 * statistics.median(values) / counts[name] for name, values in seconds.items()}
    base = us.pop("base")
    return base, {name: value - base for name, value in us.items()}


def fill_slots(adapters: ModelAdapters) -> None:
    """Random adapters of the whole rank."""
    for layer in adapters.layers.values():
        for slot in range(NUM_SLOTS):
            *matrices, ranks = layer.slot_buffers(slot)
            for matrix in matrices:
                matrix.normal_(0, 0.02)
            ranks.fill_(RANK)


if __name__ == "__main__":
    main()

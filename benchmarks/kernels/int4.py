"""Time the kernels for int4 weights against the library, and write the table of the fastest.

    PYTHONPATH=src python benchmarks/kernels/int4.py --table plugins/quant/kernels/tables/w4a16_h200.json

As ``benchmarks/kernels/linear.py``: candidates are compiled in a pool of processes, checked against float64, and timed
as replays of a CUDA graph that goes through several copies of the weights, so that they come from memory. Microseconds
a call, the norm before the layer counted. ``bf16`` is the library's GEMM on unquantized
weights, ``library`` the same after the weights were written out in bf16.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from linear import Layer, compile_only, layers, measure, read_table, save_table

from quire.core.ops.device_profile import DeviceProfile
from quire.core.ops.kernels.norm_kernel import launch_rms_norm
from quire.plugins.quant.kernels.int4 import IntWeights, dequantize_weights, reference_linear
from quire.plugins.quant.kernels.int4_launch import LAUNCHERS

TOKENS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
WORTH = 0.99
"""A kernel is taken where it needs at most this share of the time that the library needs."""
Options = dict[str, Any]


def candidates(layer: Layer, tokens: int, whole: bool) -> Iterator[tuple[str, Options]]:
    """Launches worth timing. ``whole``: 4 bits, and groups of whole blocks of 128 inputs."""
    num_sms = DeviceProfile.detect(torch.device("cuda")).num_sms
    least = 2 if "gated" in layer.fused else 1
    if tokens <= 32:
        for tiles, ways, stages in _SMALL_M:
            options = {"block_m": max(8, tokens), "tiles": tiles, "slice_k": ways, "num_stages": stages}
            for depth in (1, 2, 4) if tokens <= 8 else (1, 2):
                if tiles >= least and layer.inputs >= 128 * ways * depth * stages:
                    yield "gemm_small_m", options | {"unroll_k": depth}
    if whole and 64 <= tokens <= 1024:
        for tile, consumers, warps, tiles, stages in _HOPPER:
            turns = -(-tokens // tile)
            if turns * tile > 1.4 * tokens:
                continue
            programs = -(-layer.features // (16 * tiles * consumers)) * turns
            for splits in sorted({1, 2, 4, *(max(1, num_sms * k // programs) for k in (1, 2))}):
                if layer.inputs >= 512 * splits and (splits == 1 or programs * splits <= 600):
                    options = {"block_m": tile, "tiles": tiles, "split_k": splits, "num_consumers": consumers}
                    yield "gemm_hopper", options | {"num_warps": warps, "num_stages": stages}
    if 8 <= tokens <= 256:
        for tiles, warps, stages in [(4, 4, 4), (8, 8, 3), (8, 8, 4)]:
            for tile in sorted({min(tokens, 64), min(tokens, 128), min(tokens, 256)}):
                programs = -(-layer.features // (16 * tiles)) * -(-tokens // tile)
                for splits in sorted({max(1, round(num_sms * k / programs)) for k in (1, 2, 3)}):
                    options = {"block_m": tile, "tiles": tiles, "split_k": splits}
                    for scaled in (0, 1) if tile in (64, 128) else (int(tile > 64),):
                        yield (
                            "gemm_medium_m",
                            options | {"scale_weights": scaled, "num_warps": warps, "num_stages": stages},
                        )


_SMALL_M = [(1, 4, 3), (1, 4, 4), (2, 1, 3), (2, 2, 3), (2, 4, 3), (2, 4, 4), (2, 8, 2), (2, 8, 3), (4, 2, 3)]
"""Tiles, slices of K, stages."""
_HOPPER = [
    (64, 1, 4, 4, 4), (64, 1, 4, 8, 4), (64, 2, 4, 4, 6), (64, 2, 4, 8, 5), (128, 2, 4, 4, 5), (128, 2, 4, 8, 4),
    (128, 1, 8, 16, 4), (256, 2, 4, 4, 3), (256, 1, 8, 8, 3),
]  # fmt: skip
"""Tokens of a program, consumers, warps and tiles of each, stages."""


def _whole(group: int, bits: int) -> bool:
    return bits == 4 and group % 128 == 0


def random_weights(layer: Layer, group: int, bits: int, device: str) -> IntWeights:
    """Every word is some weights."""
    tiles, blocks = -(-layer.features // 16), -(-layer.inputs * bits // 512)
    groups = (tiles, layer.inputs // group, 16)
    if device == "cpu":  # to compile
        tensors_of_weights = torch.empty(tiles, blocks, 256, dtype=torch.int32), torch.empty(groups, dtype=torch.int32)
    else:
        words = torch.randint(-(1 << 31), 1 << 31, (tiles, blocks, 256), dtype=torch.int32, device=device)
        scale = (torch.rand(groups, device=device) + 0.5) * layer.inputs**-0.5 / (1 << bits)
        zero = torch.randint(0, 1 << bits, groups, dtype=torch.int32, device=device)
        tensors_of_weights = words, (scale.view(torch.int32) & -256) | zero
    return IntWeights(*tensors_of_weights, layer.features, layer.inputs, group, bits)


def launch(tensors: Options, kernel: str, options: Options, weights: IntWeights) -> None:
    """One call, with the norm before it."""
    arguments = dict(tensors)
    norm = arguments.pop("norm")
    if norm is not None:
        arguments["x"] = launch_rms_norm(arguments["x"], *norm, None)[0]
    LAUNCHERS[kernel](weights=weights, bias=None, enable_pdl=True, **arguments, **options)


def compile_one(layer: Layer, tokens: int, group: int, bits: int, kernel: str, options: Options) -> str | None:
    """Compile one launch; in a process of a pool."""
    weights = random_weights(layer, group, bits, "cpu")
    return compile_only(lambda: launch(layer.tensors(tokens, "cpu"), kernel, options, weights))


def library(tensors: Options, weights: IntWeights) -> Tensor:
    """Weights written out, then the library's GEMM; the norm before it, and nothing after it."""
    x = tensors["x"]
    x = x if tensors["norm"] is None else launch_rms_norm(x, *tensors["norm"], None)[0]
    return F.linear(x, dequantize_weights(weights, x.dtype))


def sweep(layer: Layer, numbers: list[int], group: int, bits: int, compiled: set[str]) -> Iterator[Options]:
    """Time one layer for every number of tokens."""
    size = layer.features * layer.inputs
    copies = max(2, min(40, (1 << 30) // size))
    weights = [random_weights(layer, group, bits, "cuda") for _ in range(copies)]
    plain = [dequantize_weights(w, torch.bfloat16) for w in weights[: max(2, (1 << 29) // size)]]
    floor = size * (bits + 32 / group) / 8 / 4.29e6
    for tokens in numbers:
        tensors = layer.tensors(tokens, "cuda")
        operands = {name: tensors[name] for name in ("x", "norm", "residual")}
        expected = reference_linear(weights=weights[0], activation="silu" if tensors["gated"] else None, **operands)
        bf16_us = measure(partial(F.linear, tensors["x"]), plain)
        library_us = measure(partial(library, tensors), weights[:8])
        timed = []
        for kernel, options in candidates(layer, tokens, _whole(group, bits)):
            if repr((layer, tokens, group, bits, kernel, options)) not in compiled:
                continue
            tensors["out"].fill_(float("nan"))
            try:
                launch(tensors, kernel, options, weights[0])
            except triton.runtime.errors.OutOfResources as error:
                print("NO ROOM", layer.name, tokens, kernel, options, error)
                continue
            error = ((tensors["out"].double() - expected).norm() / expected.norm()).item()
            if not error < 6e-3:
                print("WRONG", layer.name, tokens, kernel, options, error)
                continue
            time_us = measure(partial(launch, tensors, kernel, options), weights)
            timed.append({"kernel": kernel, **options, "us": round(time_us, 2)})
        timed.sort(key=lambda entry: entry["us"])
        text = "  ".join(
            f"{b['us']:.2f} {b['kernel']}" + "/".join(str(int(v)) for k, v in b.items() if k not in ("us", "kernel"))
            for b in timed[:9]
        )
        print(
            f"{layer.name:8}{layer.features:6}x{layer.inputs:<6}M={tokens:<4} floor {floor:5.2f} bf16 {bf16_us:7.2f} "
            f"library {library_us:7.2f} | {text}",
            flush=True,
        )
        yield {
            "layer": f"{layer.features}x{layer.inputs}",
            "block_m": tokens,
            "bf16_us": round(bf16_us, 2),
            "library_us": round(library_us, 2),
            "timed": timed,
        }


def write_table(path: Path, rows: list[Options]) -> None:
    """The fastest launch for each number of tokens; null is the library."""
    table = read_table(path)
    for row in rows:
        entries = table["layers"].setdefault(row["layer"], {})
        best = min(row["timed"], key=lambda entry: entry["us"], default=None)
        if best is not None and best["us"] > WORTH * row["library_us"]:
            best = None
        entries[str(row["tokens"])] = best
    save_table(path, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--layers", nargs="+", default=["qkv", "o", "gate_up", "down"])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--raw", type=Path, help="write every time here")
    parser.add_argument("--table", type=Path, help="add the fastest of each layer to this table")
    options = parser.parse_args()
    shapes = list({layer: None for model in options.models for layer in layers(model) if layer.name in options.layers})
    start = time.time()
    jobs = [
        (layer, tokens, options.group, options.bits, kernel, config)
        for tokens in options.tokens
        for layer in shapes
        for kernel, config in candidates(layer, tokens, _whole(options.group, options.bits))
    ]
    unique = {repr(job): job for job in jobs}
    with ProcessPoolExecutor(15, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_one, *zip(*unique.values(), strict=True), chunksize=1))
    failed = {key: why for key, why in zip(unique, results, strict=True) if why}
    print(f"compiled {len(unique)} in {time.time() - start:.0f} s; {len(failed)} failed", list(failed.items())[:2])
    rows = [
        row
        for layer in shapes
        for row in sweep(layer, options.tokens, options.group, options.bits, set(unique) - set(failed))
    ]
    if options.raw:
        options.raw.write_text(json.dumps(rows))
    if options.table:
        write_table(options.table, rows)
    print(f"{time.time() - start:.0f} s in all")


if __name__ == "__main__":
    main()

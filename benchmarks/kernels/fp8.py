"""Time the linear layers of 8-bit weights, with what stands beside them, and write the table of the fastest launches.

    PYTHONPATH=src python benchmarks/kernels/fp8.py --table plugins/quant/kernels/tables/fp8_h200.json

Microseconds of a layer in a decoder: from the residual stream to its result, so with the norm, the quantization of the
activations, the gate and the addition to the stream, in as many kernels as each way needs, as replays of a CUDA graph
that goes through several copies of the weights. Every launch is checked against float64 on the dequantized weights.
``library`` is ``torch._scaled_mm`` with a scale for each row and token, after the fused norm-and-quantize.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from linear import Layer, exact, layers, measure
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from quire.core.contracts.quant import ActivationFormat, QuantActivation
from quire.core.ops.kernels.activation import silu_and_mul
from quire.core.ops.kernels.norm import rms_norm, rms_norm_as
from quire.core.ops.kernels.quantize import quantize_activation
from quire.plugins.quant.kernels.fp8_gemv import gemv8, gemv8_long
from quire.plugins.quant.kernels.fp8_skinny import skinny8
from quire.plugins.quant.kernels.fp8_wide import wide8

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MORE = (2048,)
"""Tokens at which only the library is timed."""
FP8 = ActivationFormat("fp8_token")
Options = dict[str, Any]


def candidates(layer: Layer, tokens: int) -> Iterator[tuple[str, Options]]:
    """Launches worth timing."""
    if tokens == 1:
        for rows, block, warps in [(4, 1024, 1), (8, 2048, 4), (4, 2048, 4), (8, 1024, 2), (4, 1024, 2), (8, 1024, 1)]:
            if "norm" in layer.fused:
                yield "gemv8_long", {"rows": rows, "block": block, "num_warps": warps, "norm_apart": True}
    if tokens <= 16:
        for rows, block, ways, stages, half in [(16, 128, 4, 6, 0), (16, 128, 4, 5, 0), (16, 256, 4, 4, 0)]:
            options = {"tokens": max(8, tokens), "rows": rows, "block": block, "ways": ways, "num_stages": stages}
            if layer.inputs % (block * ways) == 0:
                yield "skinny8", options | {"half": bool(half)}
    splits = {4096: (1, 2, 4), 6144: (1, 2)}.get(layer.features, (1,))
    if tokens in (1, 8, 16, 32, 64):
        for rows, block, stages in [
            (16, 512, 4), (16, 256, 6), (32, 256, 4), (32, 256, 6), (32, 128, 8), (32, 512, 3), (64, 256, 4), (64, 128, 6)
        ]:  # fmt: skip
            for split in splits[:2]:
                for ahead in (0, 1024):
                    if layer.inputs % (block * split):
                        continue
                    options = {"tokens": 64, "rows": rows, "block": block, "num_stages": stages}
                    yield "wide8", options | {"num_warps": 4, "splits": split, "ahead": ahead, "swap": True}
    for rows, block, warps, stages in [(64, 256, 4, 4), (64, 256, 4, 6), (64, 256, 4, 8), (64, 128, 4, 8)]:
        if tokens in (8, 16, 32, 64):
            for split in splits:
                if layer.inputs % (block * split):
                    continue
                options = {"tokens": max(8, tokens), "rows": rows, "block": block, "num_stages": stages}
                yield "wide8", options | {"num_warps": warps, "splits": split, "ahead": 0, "swap": False}


class Case:
    """A layer, some tokens, and the ways to multiply them."""

    def __init__(self, layer: Layer, tokens: int, device: str) -> None:
        self.layer, self.tokens = layer, tokens
        self.given = layer.tensors(tokens, device)
        self.scale = torch.rand(layer.features, device=device) * 2e-3 + 1e-3
        self.partial = torch.empty(1 << 23, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(4096, dtype=torch.int32, device=device)

    def weights(self) -> Tensor:
        """e4m3, of the spread that a checkpoint's have."""
        shape = self.layer.features, self.layer.inputs
        return (torch.randn(shape, device="cuda") * 30).clamp(-448, 448).to(torch.float8_e4m3fn)

    def quantized(self) -> QuantActivation:
        """The norm, where there is one, and the quantization, in one kernel."""
        x, norm = self.given["x"], self.given["norm"]
        out = quantize_activation(x, FP8) if norm is None else rms_norm_as(FP8, x, *norm, None)[0]
        assert isinstance(out, QuantActivation)
        return out

    def launch(self, kernel: str, options: Options, weight: Tensor) -> Tensor:
        """The whole layer."""
        given = {name: self.given[name] for name in ("x", "gated", "residual", "out")}
        given |= {"weight": weight, "bias": None, "scale": self.scale, "chained": True}
        if options.get("norm_apart"):
            options = {k: v for k, v in options.items() if k != "norm_apart"}
            given["x"] = rms_norm(given["x"], *self.given["norm"], None)[0]
            gemv8_long(**given, **options)
        elif kernel.startswith("gemv8"):
            (gemv8 if kernel == "gemv8" else gemv8_long)(norm=self.given["norm"], **given, **options)
        elif kernel == "skinny8":
            if self.given["norm"] is not None:
                given["x"] = rms_norm(given["x"], *self.given["norm"], None)[0]
            skinny8(**given, **options)
        else:
            x = self.quantized()
            given |= {"x": x.values, "x_scale": x.scale, "partial": self.partial, "arrived": self.arrived}
            wide8(**given, **options)
        return self.given["out"]

    def library(self, weight: Tensor) -> Tensor:
        """``_scaled_mm``; the gate is followed by its activation quantized for the next layer."""
        x = self.quantized()
        y = product(x, weight, self.scale)
        if self.given["gated"]:
            return silu_and_mul(y, FP8)  # type: ignore[return-value]
        return y

    def exact(self, weight: Tensor) -> Tensor:
        """In float64, activations as they are."""
        return exact(self.layer, self.given, weight.double() * self.scale.double()[:, None])


def product(x: QuantActivation, weight: Tensor, scale: Tensor) -> Tensor:
    return torch._scaled_mm(
        x.values, weight.t(), scale_a=x.scale, scale_b=scale[None, :], out_dtype=torch.bfloat16, use_fast_accum=True
    )


def compile_one(layer: Layer, tokens: int, kernel: str, options: Options) -> str | None:
    """Compile one launch into Triton's cache; in a process of a pool. What went wrong, if anything did."""
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **(kwargs | {"warmup": True}))

    JITFunction.run = compile_only  # type: ignore[method-assign]
    try:
        case = Case(layer, tokens, "cpu")
        case.launch(kernel, options, torch.empty(layer.features, layer.inputs, dtype=torch.float8_e4m3fn))
    except Exception as error:  # a launch that does not compile is no candidate
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
    return None


def sweep(layer: Layer, compiled: set[str]) -> Iterator[dict[str, Any]]:
    """Time one layer for every number of tokens."""
    copies = max(2, min(40, (1 << 29) // (layer.features * layer.inputs)))
    floor = layer.features * layer.inputs / 4.29e6
    weights = [Case(layer, 1, "cuda").weights() for _ in range(copies)]
    for tokens in TOKENS + MORE:
        case = Case(layer, tokens, "cuda")
        expected = case.exact(weights[0]) if tokens in TOKENS else None
        library = measure(case.library, weights)
        x = case.quantized()
        alone = measure(partial(product, x, scale=case.scale), weights)
        found = []
        for kernel, options in candidates(layer, tokens) if tokens in TOKENS else ():
            if repr((layer, tokens, kernel, options)) not in compiled:
                continue
            case.given["out"].fill_(float("nan"))
            try:
                got = case.launch(kernel, options, weights[0])
            except OutOfResources:
                continue
            error = ((got.double() - expected).norm() / expected.norm()).item()
            if not error < (5e-2 if kernel == "wide8" else 5e-3):
                print("WRONG", layer.name, tokens, kernel, options, error)
                continue
            time_us = measure(partial(case.launch, kernel, options), weights)
            found.append({"kernel": kernel, **options, "us": round(time_us, 2)})
        found.sort(key=lambda entry: entry["us"])
        text = "  ".join(f"{b['us']:.2f} {named(b)}" for b in pick(found))
        print(
            f"{layer.name:8}{layer.features:6}x{layer.inputs:<5} M={tokens:<4} floor {floor:6.2f} library {library:6.2f}"
            f" ({alone:6.2f}) {text}",
            flush=True,
        )
        yield {
            "features": layer.features,
            "inputs": layer.inputs,
            "tokens": tokens,
            "library_us": round(library, 2),
            "product_us": round(alone, 2),
            "found": found,
        }


def pick(found: list[Options]) -> list[Options]:
    """The three fastest, and the fastest of each other kernel."""
    rest = [next((f for f in found if f["kernel"] == k), None) for k in ("gemv8", "gemv8_long", "skinny8", "wide8")]
    return found[:3] + [f for f in rest if f is not None and f not in found[:3]]


def named(entry: Options) -> str:
    return entry["kernel"] + "/" + "/".join(str(v) for k, v in entry.items() if k not in ("us", "kernel", "tokens"))


def beside(hidden: int = 4096, mid: int = 14336) -> None:
    """What the quantizing kernels beside the layers take, and the same without quantization."""
    make = partial(torch.randn, dtype=torch.bfloat16, device="cuda")
    native = ActivationFormat()
    for tokens in (1, 16, 32, 64, 256, 2048):
        xs = [make(tokens, 2 * mid) for _ in range(max(2, min(16, (1 << 28) // (tokens * 4 * mid))))]
        gain = make(hidden)
        calls: dict[str, Callable[[Tensor], object]] = {}
        for wanted in (native, FP8):
            calls[f"norm {wanted.kind}"] = lambda x, w=wanted: rms_norm_as(w, x[:, :hidden], gain, 1e-5, None)
            calls[f"silu {wanted.kind}"] = lambda x, w=wanted: silu_and_mul(x, w)
        calls["quantize 4096"] = lambda x: quantize_activation(x[:, :hidden], FP8)
        calls["quantize 14336"] = lambda x: quantize_activation(x[:, :mid], FP8)
        print(f"M={tokens}", "  ".join(f"{name} {measure(call, xs):.2f}" for name, call in calls.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b"])
    parser.add_argument("--raw", type=Path, help="write every time here")
    parser.add_argument("--table", type=Path, help="write the fastest of each layer here")
    options = parser.parse_args()
    shapes = [layer for layer in {la: None for m in options.models for la in layers(m)} if layer.name != "head"]
    start = time.time()
    jobs = [(la, tokens, *rest) for la in shapes for tokens in TOKENS for rest in candidates(la, tokens)]
    unique = {repr(job): job for job in jobs}
    with ProcessPoolExecutor(15, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_one, *zip(*unique.values(), strict=True), chunksize=2))
    failed = {key: why for key, why in zip(unique, results, strict=True) if why}
    print(f"compiled {len(unique)} in {time.time() - start:.0f} s; failed {len(failed)}", flush=True)
    print(list(failed.items())[:3], flush=True)
    beside()
    rows = [row for layer in shapes for row in sweep(layer, set(unique) - set(failed))]
    if options.raw:
        options.raw.write_text(json.dumps(rows))
    if options.table:
        write_table(options.table, rows)
    print(f"{time.time() - start:.0f} s in all")


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """The fastest launch for each number of tokens; null is the library."""
    raise NotImplementedError


if __name__ == "__main__":
    main()

"""Time the linear layers of 8-bit weights, with what stands beside them, and write the table of the fastest launches.

    PYTHONPATH=src python benchmarks/kernels/fp8.py --table plugins/quant/kernels/tables/fp8_h200.json
    PYTHONPATH=src python benchmarks/kernels/fp8.py --kind int8 --table plugins/quant/kernels/tables/int8_h200.json

Microseconds of a layer in a decoder: from the residual stream to its result, so with the norm, the quantization of the
activations, the gate and the addition to the stream, in as many kernels as each way needs, as replays of a CUDA graph
that goes through several copies of the weights. Every launch is checked against float64 on the dequantized weights.
``library`` is ``torch._scaled_mm`` or ``torch._int_mm`` after the fused norm-and-quantize, with the quantizing
activation behind it but without the addition; in brackets, the product alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from linear import Layer, compile_only, exact, layers, measure, read_table, save_table
from torch import Tensor
from triton.runtime.errors import OutOfResources

from quire.core.contracts.quant import ActivationFormat, QuantActivation
from quire.core.ops.kernels.activation_kernel import launch_silu_and_mul
from quire.core.ops.kernels.norm_kernel import launch_rms_norm
from quire.plugins.quant.kernels import fp8, int8
from quire.plugins.quant.kernels.fp8_gemm_medium_m import launch_fp8_gemm_medium_m
from quire.plugins.quant.kernels.fp8_gemm_small_m import launch_fp8_gemm_small_m
from quire.plugins.quant.kernels.fp8_gemv import launch_fp8_gemv, launch_fp8_gemv_k_loop
from quire.plugins.quant.kernels.fp8_quantize import quantize_activation

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MORE = (512, 2048)
"""Tokens at which only the library is timed."""
KERNELS: dict[str, Callable[..., None]] = {
    "gemv": launch_fp8_gemv,
    "gemv_k_loop": launch_fp8_gemv_k_loop,
    "gemm_small_m": launch_fp8_gemm_small_m,
    "gemm_medium_m": launch_fp8_gemm_medium_m,
}
KINDS = {"fp8": (fp8, torch.float8_e4m3fn), "int8": (int8, torch.int8)}
Options = dict[str, Any]


def candidates(layer: Layer, tokens: int) -> Iterator[tuple[str, Options]]:
    """Launches worth timing."""
    if tokens == 1:
        for rows, turns, warps in [(2, 6, 8), (2, 3, 8), (2, 4, 4), (2, 28, 4)]:
            yield "gemv", {"block_m": tokens, "block_n": rows, "tiles_per_program": turns, "num_warps": warps}
        for rows, block, warps in [
            (4, 1024, 1), (4, 1024, 2), (8, 1024, 2), (2, 2048, 4), (4, 2048, 4), (4, 2048, 2), (8, 512, 1)
        ]:  # fmt: skip
            for apart in (False, True)[: 2 if "norm" in layer.fused else 1]:
                yield "gemv_k_loop", {"block_n": rows, "block_k": block, "num_warps": warps, "separate_norm": apart}
    if tokens <= 16:
        for rows, block, stages in [(16, 128, 4), (16, 128, 6), (16, 256, 3), (16, 256, 4), (32, 128, 4)]:
            options = {"block_m": max(8, tokens), "block_n": rows, "block_k": block, "slice_k": 4, "num_stages": stages}
            yield "gemm_small_m", options | {"separate_norm": "norm" in layer.fused}
    shapes = [(64, 128, 4, 4), (64, 256, 4, 4), (64, 256, 4, 6), (64, 256, 4, 8), (64, 128, 4, 6), (128, 128, 8, 5)]
    swapped = [(32, 256, 4, 6), (32, 256, 4, 4), (64, 128, 4, 6), (64, 128, 4, 4), (16, 512, 4, 4), (128, 128, 8, 4)]
    for first, timed in ((False, shapes), (True, swapped)):
        for rows, block, warps, stages in timed if not first or tokens >= 8 else ():
            for tile in (64, 128):
                if (tile == 128 and tokens < 128) or (tile < tokens < 128):
                    continue
                tile = tile if first or tokens >= 64 else max(8, tokens)
                options = {"block_m": tile, "block_n": rows, "block_k": block, "num_warps": warps, "num_stages": stages}
                yield "gemm_medium_m", options | {"x_is_lhs": first}


class Case:
    """A layer, some tokens, and the ways to multiply them."""

    def __init__(self, layer: Layer, tokens: int, kind: str, device: str) -> None:
        self.layer, self.tokens = layer, tokens
        self.module, self.dtype = KINDS[kind]
        self.wanted = ActivationFormat(f"{kind}_token")  # type: ignore[arg-type]
        self.arguments = layer.tensors(tokens, device)
        self.scale = torch.rand(layer.features, device=device) * 2e-3 + 1e-3

    def weights(self) -> Tensor:
        """Of the spread that a checkpoint's have."""
        shape = self.layer.features, self.layer.inputs
        return (torch.randn(shape, device="cuda") * 30).clamp(-127, 127).to(self.dtype)

    def quantized(self) -> QuantActivation:
        """The norm, where there is one, and the quantization, in one kernel."""
        x, norm = self.arguments["x"], self.arguments["norm"]
        out = quantize_activation(x, self.wanted) if norm is None else launch_rms_norm(x, *norm, None, self.wanted)[0]
        assert isinstance(out, QuantActivation)
        return out

    def launch(self, kernel: str, options: Options, weight: Tensor) -> Tensor:
        """The whole layer."""
        arguments = {name: self.arguments[name] for name in ("x", "norm", "gated", "residual", "out")}
        arguments |= {"weight": weight, "bias": None, "scale": self.scale, "enable_pdl": True}
        options = dict(options)
        if kernel == "gemm_medium_m":
            x = self.quantized()
            arguments |= {"x": x.values, "x_scale": x.scale}
        elif options.pop("separate_norm", False):
            arguments |= {"x": launch_rms_norm(arguments["x"], *arguments["norm"], None)[0], "norm": None}
        if not kernel.startswith("gemv"):
            del arguments["norm"]
        KERNELS[kernel](**arguments, **options)
        return self.arguments["out"]

    def product(self, x: QuantActivation, weight: Tensor) -> Tensor:
        """The library's."""
        library = fp8.multiply_by_library if self.module is fp8 else int8.multiply_by_library
        return library(x, weight, self.scale, None)

    def library(self, weight: Tensor) -> Tensor | QuantActivation:
        """The layer by the library; the gate is followed by its activation quantized for the next layer."""
        y = self.product(self.quantized(), weight)
        return launch_silu_and_mul(y, self.wanted) if self.arguments["gated"] else y

    def exact(self, weight: Tensor) -> Tensor:
        """In float64, activations as they are."""
        return exact(self.layer, self.arguments, weight.double() * self.scale.double()[:, None])


def compile_one(layer: Layer, tokens: int, kind: str, kernel: str, options: Options) -> str | None:
    """Compile one launch; in a process of a pool."""
    case = Case(layer, tokens, kind, "cpu")
    weight = torch.empty(layer.features, layer.inputs, dtype=case.dtype)
    return compile_only(lambda: case.launch(kernel, options, weight))


def sweep(layer: Layer, kind: str, compiled: set[str]) -> Iterator[dict[str, Any]]:
    """Time one layer for every number of tokens."""
    copies = max(2, min(40, (1 << 29) // (layer.features * layer.inputs)))
    floor = layer.features * layer.inputs / 4.29e6
    weights = [Case(layer, 1, kind, "cuda").weights() for _ in range(copies)]
    for tokens in TOKENS + MORE:
        case = Case(layer, tokens, kind, "cuda")
        expected = case.exact(weights[0]) if tokens in TOKENS else torch.empty(0)
        library = measure(case.library, weights)
        alone = measure(partial(case.product, case.quantized()), weights)
        timed = []
        for kernel, options in candidates(layer, tokens) if tokens in TOKENS else ():
            if repr((layer, tokens, kind, kernel, options)) not in compiled:
                continue
            case.arguments["out"].fill_(float("nan"))
            try:
                got = case.launch(kernel, options, weights[0])
            except OutOfResources:
                continue
            error = ((got.double() - expected).norm() / expected.norm()).item()
            if not error < (5e-2 if kernel == "gemm_medium_m" else 5e-3):
                print("WRONG", layer.name, tokens, kernel, options, error)
                continue
            time_us = measure(partial(case.launch, kernel, options), weights)
            timed.append({"kernel": kernel, **options, "us": round(time_us, 2)})
        timed.sort(key=lambda entry: entry["us"])
        best = {entry["kernel"]: entry for entry in reversed(timed)}.values()
        text = "  ".join(f"{b['us']:.2f} {named(b)}" for b in sorted(best, key=lambda b: b["us"]))
        print(
            f"{layer.name:8}{layer.features:6}x{layer.inputs:<5} M={tokens:<4} floor {floor:6.2f} "
            f"library {library:6.2f} ({alone:6.2f}) {text}",
            flush=True,
        )
        yield {"layer": layer, "block_m": tokens, "library_us": round(library, 2), "timed": timed}


def named(entry: Options) -> str:
    return f"{entry['kernel']}/" + "/".join(str(v) for k, v in entry.items() if k not in ("us", "kernel"))


def beside(kind: str, hidden: int = 4096, mid: int = 14336) -> None:
    """What the quantizing kernels beside the layers take, and the same without quantization."""
    make = partial(torch.randn, dtype=torch.bfloat16, device="cuda")
    gain = make(hidden)
    formats = ActivationFormat(), ActivationFormat(f"{kind}_token")  # type: ignore[arg-type]
    for tokens in (1, 32, 256, 2048):
        xs = [make(tokens, 2 * mid) for _ in range(max(2, min(16, (1 << 28) // (tokens * 4 * mid))))]
        calls: dict[str, Callable[[Tensor], object]] = {}
        for wanted in formats:
            calls[f"norm {wanted.kind}"] = lambda x, w=wanted: launch_rms_norm(x[:, :hidden], gain, 1e-5, None, w)
            calls[f"silu {wanted.kind}"] = lambda x, w=wanted: launch_silu_and_mul(x, w)
        for width in (hidden, mid):
            calls[f"quantize {width}"] = lambda x, w=width: quantize_activation(x[:, :w], formats[1])
        print(f"M={tokens}", "  ".join(f"{name} {measure(call, xs):.2f}" for name, call in calls.items()), flush=True)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """For each number of tokens the fastest launch of activations as they are, the fastest of quantized ones and the
    library (null), in the order of their times. For one token the first comes first: a kernel with rows in registers
    lets the next one in at once, whose programs must not take much room while they wait (see ``chain``)."""
    table = read_table(path)
    for row in rows:
        if row["tokens"] not in TOKENS:
            continue
        best: list[tuple[float, Options | None]] = [(row["library_us"], None)]
        for quantized in (False, True):
            usable = [entry for entry in row["timed"] if (entry["kernel"] == "gemm_medium_m") == quantized]
            best += [(entry["us"], entry) for entry in usable[:1]]
        if row["tokens"] == 1:
            best = [(time_us if e is None or e["kernel"] == "gemm_medium_m" else 0.0, e) for time_us, e in best]
        ordered = [entry for _, entry in sorted(best, key=lambda pair: pair[0])]
        key = f"{row['layer'].features}x{row['layer'].inputs}"
        table["layers"].setdefault(key, {})[str(row["tokens"])] = ordered
    save_table(path, table)


def chain(kind: str, count: int = 10) -> None:
    """Microseconds of all the linear layers of one decoder layer as the tables have them, one after the other: what
    a kernel does to its neighbours is in these, and not in the times of kernels on their own."""
    cases = {layer.name: Case(layer, 1, kind, "cuda") for layer in layers("llama-3.1-8b") if layer.name != "head"}
    weights = [{name: case.weights() for name, case in cases.items()} for _ in range(count)]
    module, gain = KINDS[kind][0], torch.ones(4096, dtype=torch.bfloat16, device="cuda")
    for tokens in TOKENS[:-1]:
        x = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda")

        def layer(weight: dict[str, Tensor], x: Tensor = x) -> None:
            def linear(name: str, x: Tensor, **beside: Any) -> Tensor:
                return module.apply_linear(x, weight[name], cases[name].scale, **beside)

            linear("qkv", x, norm=(gain, 1e-5))
            stream = linear("o", x, residual=x)
            y = linear("gate_up", stream, norm=(gain, 1e-5), activation="silu")
            linear("down", y, residual=stream)

        print(f"M={tokens} a decoder's linear layers {measure(layer, weights):.2f}", flush=True)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b"])
    parser.add_argument("--kind", choices=["fp8", "int8"], default="fp8")
    parser.add_argument("--table", type=Path, help="write the fastest of each layer here")
    parser.add_argument("--chain", action="store_true", help="time the tables' choices together, and nothing else")
    options = parser.parse_args()
    if options.chain:
        return chain(options.kind)
    shapes = [layer for layer in {la: None for m in options.models for la in layers(m)} if layer.name != "head"]
    start = time.time()
    jobs = [(la, tokens, options.kind, *rest) for la in shapes for tokens in TOKENS for rest in candidates(la, tokens)]
    unique = {repr(job): job for job in jobs}
    with ProcessPoolExecutor(15, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_one, *zip(*unique.values(), strict=True), chunksize=2))
    failed = {key: why for key, why in zip(unique, results, strict=True) if why}
    print(f"compiled {len(unique)} in {time.time() - start:.0f} s; failed {len(failed)}", flush=True)
    print(list(failed.items())[:2], flush=True)
    beside(options.kind)
    rows = [row for layer in shapes for row in sweep(layer, options.kind, set(unique) - set(failed))]
    if options.table:
        write_table(options.table, rows)
    print(f"{time.time() - start:.0f} s in all")


if __name__ == "__main__":
    main()

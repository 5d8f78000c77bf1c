"""Time the kernels for linear layers at small batch against the library's GEMM, and write the table of the fastest.

    PYTHONPATH=src python benchmarks/kernels/linear.py --table core/ops/kernels/tables/bf16_h200.json

Every candidate is compiled in a pool of processes, checked against float64, then timed as replays of a CUDA graph that
goes through several copies of the weights, so that they come from memory and not from the L2 cache. Microseconds a
call. ``library`` is the GEMM alone, ``apart`` the GEMM with the norm or activation beside it as kernels of their own;
``enable_pdl`` kernels start while the one before still runs. The table keeps the layers that this run has not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from quire.core.ops.device_profile import DeviceProfile
from quire.core.ops.kernels.activation_kernel import launch_silu_and_mul
from quire.core.ops.kernels.gemm_medium_m import launch_gemm_medium_m
from quire.core.ops.kernels.gemm_small_m import launch_gemm_small_m
from quire.core.ops.kernels.gemv import launch_gemv, launch_gemv_k_loop
from quire.core.ops.kernels.norm_kernel import launch_rms_norm
from quire.server.plugin_bench.timer import time_graph

MODELS = Path(__file__).parents[1] / "models"
KERNELS: dict[str, Callable[..., None]] = {
    "gemv": launch_gemv,
    "gemv_k_loop": launch_gemv_k_loop,
    "gemm_small_m": launch_gemm_small_m,
    "gemm_medium_m": launch_gemm_medium_m,
}
TOKENS = (1, 2, 4, 8, 16, 32, 64)
WORTH = 0.985
"""A kernel is taken where it needs at most this share of the time that the library needs."""
Options = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """A linear layer and what is fused with it."""

    name: str
    features: int
    inputs: int
    fused: frozenset[str]

    def tensors(self, tokens: int, device: str) -> Options:
        """Everything but the weight."""
        make = partial(torch.randn, dtype=torch.bfloat16, device=device)
        width = self.features // 2 if "gated" in self.fused else self.features
        return {
            "x": make(tokens, self.inputs),
            "norm": (make(self.inputs) * 0.1 + 1, 1e-5) if "norm" in self.fused else None,
            "gated": "gated" in self.fused,
            "residual": make(tokens, width) if "residual" in self.fused else None,
            "out": torch.empty(tokens, width, dtype=torch.bfloat16, device=device),
        }


def layers(model: str) -> list[Layer]:
    """The linear layers of a model whose config.json lies in benchmarks/models."""
    config = json.loads((MODELS / model / "config.json").read_text())
    hidden, heads, mid = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    dim = config.get("head_dim", hidden // heads)
    kv = config["num_key_value_heads"] * dim
    return [
        Layer("qkv", heads * dim + 2 * kv, hidden, frozenset({"norm"})),
        Layer("o", hidden, heads * dim, frozenset({"residual"})),
        Layer("gate_up", 2 * mid, hidden, frozenset({"norm", "gated"})),
        Layer("down", hidden, mid, frozenset({"residual"})),
        Layer("head", config["vocab_size"], hidden, frozenset()),
    ]


def candidates(layer: Layer, tokens: int) -> Iterator[tuple[str, Options]]:
    """Launches worth timing."""
    num_sms = DeviceProfile.detect(torch.device("cuda")).num_sms
    padded = triton.next_power_of_2(layer.inputs)
    for warps in (2, 4, 8, 16):
        share = padded // (32 * warps)  # inputs of a thread
        for rows in (2, 4, 8):
            if tokens > 4 or share < 8 or not 16 <= share * rows <= 64 or share * tokens > 64:
                continue
            seen = set()
            for programs in (2, 4, 8, 16):  # on each SM
                turns = -(-layer.features // (rows * num_sms * programs))
                if turns not in seen and programs * warps <= 64:
                    seen.add(turns)
                    yield "gemv", {"block_m": tokens, "block_n": rows, "tiles_per_program": turns, "num_warps": warps}
    if tokens == 1:
        for rows, block, warps in [(2, 1024, 4), (4, 512, 2), (4, 1024, 4), (4, 1024, 2), (2, 2048, 4), (4, 2048, 8)]:
            if 2 <= layer.inputs // block <= 16:
                yield "gemv_k_loop", {"block_n": rows, "block_k": block, "num_warps": warps}
    if tokens == 1:
        return
    apart = {"separate_norm": True} if "norm" in layer.fused else {}
    if tokens >= 8:
        tiles = [(64, 128, 4, 4), (64, 64, 4, 6), (32, 128, 4, 4), (128, 64, 4, 4)]
        if tokens > 16:
            tiles += [(64, 64, 4, 4), (64, 128, 8, 3), (128, 64, 8, 4)]
        for rows, block, warps, stages in tiles:
            options = {"block_m": tokens, "block_n": rows, "block_k": block, "num_warps": warps, "num_stages": stages}
            yield "gemm_medium_m", options | apart
    if tokens > 32:
        return
    shapes = [(16, 64, 4, 4), (16, 128, 4, 3), (16, 64, 4, 6), (16, 64, 8, 3), (32, 64, 4, 4), (32, 64, 4, 3)]
    for rows, block, ways, stages in shapes:
        if layer.inputs >= ways * block * (stages - 1):
            options = {
                "block_m": max(8, tokens),
                "block_n": rows,
                "block_k": block,
                "slice_k": ways,
                "num_stages": stages,
            }
            if not apart or tokens <= 8:
                yield "gemm_small_m", options
            if apart:
                yield "gemm_small_m", options | apart


def compile_only(call: Callable[[], object]) -> str | None:
    """Compile what ``call`` launches into Triton's cache, without launching it. What went wrong, if anything did."""
    run = JITFunction.run

    def warm_up(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **(kwargs | {"warmup": True}))

    JITFunction.run = warm_up  # type: ignore[method-assign]
    try:
        call()
    except Exception as error:  # a launch that does not compile is no candidate
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
    return None


def compile_one(layer: Layer, tokens: int, kernel: str, options: Options) -> str | None:
    """Compile one launch; in a process of a pool."""
    weight = torch.empty(1, dtype=torch.bfloat16)
    return compile_only(lambda: launch(layer, tokens, kernel, options, layer.tensors(tokens, "cpu"), weight))


def launch(layer: Layer, tokens: int, kernel: str, options: Options, tensors: Options, weight: Tensor) -> None:
    """One call."""
    weight = weight.expand(layer.features, layer.inputs) if weight.dim() == 1 else weight
    arguments = dict(tensors)
    options = dict(options)
    if options.pop("separate_norm", False):
        arguments |= {"x": launch_rms_norm(arguments["x"], *arguments["norm"], None)[0], "norm": None}
    KERNELS[kernel](weight=weight, bias=None, **arguments, **options)


def measure(call: Callable[[Tensor], object], weights: list[Tensor], replays: int = 7) -> float:
    """Microseconds a call: the median replay of a graph with a call for every copy of the weight, twice."""

    def launch() -> None:
        for weight in weights * 2:
            call(weight)

    return 1e6 * time_graph(launch, 2 * len(weights), replays, num_warmups=1)


def exact(layer: Layer, tensors: Options, weight: Tensor) -> Tensor:
    """In float64."""
    x = tensors["x"].double()
    if tensors["norm"] is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * tensors["norm"][0].double()
    y = torch.cat([x @ part.double().T for part in weight.split(8192)], -1)
    if tensors["gated"]:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if tensors["residual"] is None else y + tensors["residual"].double()


def apart(layer: Layer, tensors: Options, weight: Tensor) -> Tensor:
    """The layer with its neighbours as kernels of their own, as where nothing is fused."""
    x = tensors["x"]
    if tensors["norm"] is not None:
        x = launch_rms_norm(x, *tensors["norm"], x)[0]
    y = F.linear(x, weight)
    return launch_silu_and_mul(y) if tensors["gated"] else y


def sweep(layer: Layer, compiled: set[str], enable_pdl: tuple[bool, ...]) -> Iterator[dict[str, Any]]:
    """Time one layer for every number of tokens."""
    copies = max(2, min(40, (1 << 29) // (layer.features * layer.inputs)))
    weights = [
        torch.randn(layer.features, layer.inputs, dtype=torch.bfloat16, device="cuda") * layer.inputs**-0.5
        for _ in range(copies)
    ]
    floor = layer.features * layer.inputs * 2 / 4.29e6
    for tokens in TOKENS:
        tensors = layer.tensors(tokens, "cuda")
        expected = exact(layer, tensors, weights[0])
        library = measure(partial(F.linear, tensors["x"]), weights)
        separate = measure(partial(apart, layer, tensors), weights)
        timed = []
        for pdl in enable_pdl:
            for kernel, options in candidates(layer, tokens):
                options = options | {"enable_pdl": pdl}
                if repr((layer, tokens, kernel, options)) not in compiled:
                    continue
                tensors["out"].fill_(float("nan"))
                launch(layer, tokens, kernel, options, tensors, weights[0])
                error = ((tensors["out"].double() - expected).norm() / expected.norm()).item()
                if not error < 5e-3:
                    print("WRONG", layer.name, tokens, kernel, options, error)
                    continue
                time_us = measure(partial(launch, layer, tokens, kernel, options, tensors), weights)
                timed.append({"kernel": kernel, **options, "us": round(time_us, 2)})
        timed.sort(key=lambda entry: entry["us"])
        for pdl in enable_pdl:
            best = [entry for entry in timed if entry["enable_pdl"] == pdl][:3]
            text = "  ".join(
                f"{b['us']:.2f} {b['kernel'][::5]}" + "/".join(str(v) for k, v in b.items() if k not in _HIDDEN)
                for b in best
            )
            print(
                f"{layer.name:8}{layer.features:7}x{layer.inputs:<6} M={tokens:<3} floor {floor:6.2f}  library "
                f"{library:6.2f}  apart {separate:6.2f}  {'pdl' if pdl else '   '} {text}",
                flush=True,
            )
        yield {
            "features": layer.features,
            "inputs": layer.inputs,
            "tokens": tokens,
            "library_us": round(library, 2),
            "unfused_us": round(separate, 2),
            "timed": timed,
        }


def read_table(path: Path) -> dict[str, Any]:
    """The table in ``path`` or an empty one, of this card and these versions."""
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"layers": {}}
    table["device"] = torch.cuda.get_device_name()
    table["versions"] = {"torch": torch.__version__, "triton": triton.__version__}
    return table


def save_table(path: Path, table: dict[str, Any]) -> None:
    """Write ``table`` with a line for each number of tokens, layers and tokens in order."""
    lines = []
    for shape, entries in sorted(table["layers"].items()):
        ordered = sorted(entries.items(), key=lambda entry: int(entry[0]))
        inner = ",\n".join(f"   {json.dumps(tokens)}: {json.dumps(entry)}" for tokens, entry in ordered)
        lines.append(f"  {json.dumps(shape)}: {{\n{inner}\n  }}")
    head = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in table.items() if k != "layers")
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + head + ' "layers": {\n' + ",\n".join(lines) + "\n }\n}\n")


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """The fastest launch for each number of tokens; null is the library."""
    table = read_table(path)
    for key in {f"{row['features']}x{row['inputs']}" for row in rows}:
        table["layers"][key] = {}
    for row in rows:
        usable = [entry for entry in row["timed"] if entry["enable_pdl"]]
        best = min(usable, key=lambda entry: entry["us"], default=None)
        if best is not None and best["us"] > WORTH * row["unfused_us"]:
            best = None
        if best is not None:
            best = {k: v for k, v in best.items() if k != "enable_pdl"} | {"unfused_us": row["unfused_us"]}
        table["layers"][f"{row['features']}x{row['inputs']}"][str(row["tokens"])] = best
    save_table(path, table)


_HIDDEN = ("us", "kernel", "enable_pdl", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b", "qwen3-0.6b"])
    parser.add_argument("--pdl", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--raw", type=Path, help="write every time here")
    parser.add_argument("--table", type=Path, help="add the fastest of each layer to this table")
    options = parser.parse_args()
    shapes = list({layer: None for model in options.models for layer in layers(model)})
    enable_pdl = tuple(bool(c) for c in options.pdl)
    start = time.time()
    jobs = [
        (layer, tokens, kernel, config | {"enable_pdl": pdl})
        for layer in shapes
        for tokens in TOKENS
        for pdl in enable_pdl
        for kernel, config in candidates(layer, tokens)
    ]
    unique = {repr(job): job for job in jobs}
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_one, *zip(*unique.values(), strict=True), chunksize=4))
    failed = [(key, why) for key, why in zip(unique, results, strict=True) if why]
    bad = {key for key, _ in failed}
    compiled = set(unique) - bad
    print(
        f"compiled {len(unique)} kernels in {time.time() - start:.0f} s; {len(failed)} failed", failed[:3], flush=True
    )
    rows = [row for layer in shapes for row in sweep(layer, compiled, enable_pdl)]
    if options.raw:
        options.raw.write_text(json.dumps(rows))
    if options.table:
        write_table(options.table, rows)
    print(f"{time.time() - start:.0f} s in all")


if __name__ == "__main__":
    main()

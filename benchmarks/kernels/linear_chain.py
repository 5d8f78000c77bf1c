"""Choose launches for the linear layers of one GPU among several where they stand: in a decoder layer's chain.

    PYTHONPATH=src:benchmarks/kernels python benchmarks/kernels/linear_chain.py --ranks 2 --tokens 1 32 64 \\
        --table core/ops/kernels/tables/bf16_h200.json

``linear.py`` times a launch among its own kind, where memory is never idle. In a layer whose sums go over ranks it
idles while they exchange, and a launch that starts early gains what one in a row of its own kind does not. The chain
is qkv, o, gate-up with its activation, and down; norms of as many tokens stand in for the sums (two each), and for
rotation and attention (four).

Every candidate is compiled in a pool of processes and checked against float64. Then one product after the other, twice,
takes the candidate with which the whole chain is fastest, the others as they are. Times are microseconds a layer: the
median replay of a CUDA graph over layers whose weights the L2 cache cannot hold.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from linear import MODELS, Layer, candidates, compile_one, exact, launch, read_table, save_table
from torch import Tensor

from quire.core.ops.device_profile import DeviceProfile
from quire.core.ops.kernels.activation_kernel import launch_silu_and_mul
from quire.core.ops.kernels.linear_kernel import get_bf16_steps
from quire.core.ops.kernels.norm_kernel import launch_rms_norm
from quire.core.ops.launch_table import find_launches
from quire.server.plugin_bench.timer import time_graph

BYTES = 1600 << 20
"""Of all layers' weights."""
ROUNDS = 2
WORTH = 0.995
"""A product takes another launch where the chain then needs at most this share of its time."""


class Choice(NamedTuple):
    """A launch; no kernel is the library's GEMM."""

    kernel: str | None = None
    options: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.kernel or 'library'}{'' if self.kernel is None else dict(self.options)}"


LIBRARY = Choice()


def make_products(model: str, ranks: int) -> list[Layer]:
    """The linear layers of one of ``ranks``, in the order of a decoder layer. Norms and residuals are the sums'."""
    config = json.loads((MODELS / model / "config.json").read_text())
    hidden, heads, mid = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    dim = config.get("head_dim", hidden // heads)
    kv = max(config["num_key_value_heads"] // ranks, 1) * dim
    return [
        Layer("qkv", heads // ranks * dim + 2 * kv, hidden, frozenset()),
        Layer("o", hidden, heads // ranks * dim, frozenset()),
        Layer("gate_up", 2 * mid // ranks, hidden, frozenset({"gated"})),
        Layer("down", hidden, mid // ranks, frozenset()),
    ]


class Chain:
    """Layers of random weights, and the tensors between them."""

    def __init__(self, products: list[Layer], tokens: int) -> None:
        self.products = {product.name: product for product in products}
        size = sum(product.features * product.inputs * 2 for product in products)
        self.weights = [
            {
                p.name: torch.randn(p.features, p.inputs, dtype=torch.bfloat16, device="cuda") * p.inputs**-0.5
                for p in products
            }
            for _ in range(max(2, BYTES // size))
        ]
        hidden, heads = self.products["qkv"].inputs, self.products["o"].inputs
        self.x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda")
        self.hidden_gain = torch.ones(hidden, dtype=torch.bfloat16, device="cuda")
        self.heads_gain = torch.ones(heads, dtype=torch.bfloat16, device="cuda")

    def multiply(self, name: str, x: Tensor, weight: Tensor, choice: Choice) -> Tensor:
        """One product, with the activation where it has one."""
        product = self.products[name]
        gated = "gated" in product.fused
        if choice.kernel is None:
            y = F.linear(x, weight)
            return launch_silu_and_mul(y) if gated else y
        out = x.new_empty(len(x), product.features // 2 if gated else product.features)
        tensors = {"x": x, "norm": None, "gated": gated, "residual": None, "out": out}
        launch(product, len(x), choice.kernel, dict(choice.options) | {"enable_pdl": True}, tensors, weight)
        return out

    def run(self, choices: dict[str, Choice]) -> Tensor:
        """All layers."""
        normed, stream = self.x, self.x

        def sum_up(part: Tensor) -> None:
            nonlocal normed, stream
            once, stream = launch_rms_norm(part, self.hidden_gain, 1e-5, stream)
            normed = launch_rms_norm(once, self.hidden_gain, 1e-5, None)[0]

        for weights in self.weights:
            y = self.multiply("qkv", normed, weights["qkv"], choices["qkv"])[:, : len(self.heads_gain)]
            for _ in range(4):
                y = launch_rms_norm(y, self.heads_gain, 1e-5, None)[0]
            sum_up(self.multiply("o", y, weights["o"], choices["o"]))
            y = self.multiply("gate_up", normed, weights["gate_up"], choices["gate_up"])
            sum_up(self.multiply("down", y, weights["down"], choices["down"]))
        return normed

    def time(self, choices: dict[str, Choice], repeats: int = 7) -> float:
        """Microseconds a layer."""
        return 1e6 * time_graph(partial(self.run, choices), len(self.weights), repeats, num_warmups=1)

    def measure_error(self, name: str, choice: Choice) -> float:
        """Of one product, relative, against float64."""
        product, weight = self.products[name], self.weights[0][name]
        tensors = product.tensors(len(self.x), "cuda")
        expected = exact(product, tensors, weight)
        got = self.multiply(name, tensors["x"], weight, choice)
        return ((got.double() - expected).norm() / expected.norm()).item()


def get_default(product: Layer, tokens: int) -> Choice:
    """What the product takes today: by the table, or by the rule."""
    steps = get_bf16_steps(DeviceProfile.detect(torch.device("cuda")), product.features, product.inputs)
    launches = find_launches(steps, tokens)
    if not launches or launches[0] is None:
        return LIBRARY
    return Choice(launches[0].kernel, tuple(launches[0].options.items()))


def make_candidates(product: Layer, tokens: int) -> list[Choice]:
    """Launches worth timing."""
    found = [Choice(kernel, tuple(options.items())) for kernel, options in candidates(product, tokens)]
    return list(dict.fromkeys([LIBRARY, get_default(product, tokens), *found]))


def compile_all(
    products: list[Layer], tokens: int, executor: ProcessPoolExecutor
) -> dict[str, list[tuple[Choice, Future[str | None] | None]]]:
    """Begin to compile every candidate of every product; the future of each gives what went wrong, if anything did."""
    begun = {}
    for product in products:
        begun[product.name] = [
            (
                choice,
                executor.submit(
                    compile_one, product, tokens, choice.kernel, dict(choice.options) | {"enable_pdl": True}
                )
                if choice.kernel
                else None,
            )
            for choice in make_candidates(product, tokens)
        ]
    return begun


def choose(chain: Chain, candidates: dict[str, list[Choice]], tokens: int) -> dict[str, Choice]:
    """The fastest choices that were found."""
    current = {name: get_default(product, tokens) for name, product in chain.products.items()}
    right = {
        name: [choice for choice in choices if chain.measure_error(name, choice) < 5e-3]
        for name, choices in candidates.items()
    }
    wrong = {name: len(candidates[name]) - len(choices) for name, choices in right.items()}
    print(f"M={tokens}: {chain.time(current):.2f} us a layer as it is; wrong: {wrong}", flush=True)
    for _ in range(ROUNDS):
        for name in ("gate_up", "down", "o", "qkv"):
            before = chain.time(current)
            timed = sorted(
                ((chain.time(current | {name: choice}), choice) for choice in right[name]), key=lambda entry: entry[0]
            )
            if timed[0][0] < WORTH * before:
                current[name] = timed[0][1]
            print(f"  {name:8}" + "  ".join(f"{us:.2f} {choice}" for us, choice in timed[:3]), flush=True)
    print(f"M={tokens}: {chain.time(current, 15):.2f} us a layer", flush=True)
    return current


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--table", type=Path, help="add the choices to this table")
    args = parser.parse_args()
    start = time.time()
    products = make_products(args.model, args.ranks)
    chosen = {}
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as executor:
        begun = {tokens: compile_all(products, tokens, executor) for tokens in args.tokens}
        for tokens, by_name in begun.items():
            compiled = {
                name: [choice for choice, future in each if future is None or future.result() is None]
                for name, each in by_name.items()
            }
            print(f"{time.time() - start:.0f} s: compiled for M={tokens}", flush=True)
            chosen[tokens] = choose(Chain(products, tokens), compiled, tokens)
    if args.table:
        table = read_table(args.table)
        for product in products:
            entries = table["layers"].setdefault(f"{product.features}x{product.inputs}", {})
            for tokens, choices in chosen.items():
                choice = choices[product.name]
                entry: dict[str, object] = {"kernel": choice.kernel, **dict(choice.options)}
                if tokens > 1:  # where a layer of that shape has a norm before it
                    entry["separate_norm"] = True
                entries[str(tokens)] = None if choice.kernel is None else entry
        save_table(args.table, table)
    print(f"{time.time() - start:.0f} s in all, Triton {triton.__version__}")


if __name__ == "__main__":
    main()

"""Linear methods: the layers of a model for different numbers of tokens, as a checkpoint of the format stores them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quire.core.contracts.quant import QuantizationLoader
from quire.core.testing.quant_problem import LoadedLayer, StoredLayer
from quire.server.plugin_bench.cases import BenchCase, CaseRefusedError, KindBench, PreparedCase, count_copies
from quire.server.plugin_bench.timer import make_timer

__all__ = ["LinearBench"]


@dataclass(frozen=True)
class _Copies:
    """A layer as often as needed for no launch to find it in the L2 cache, and the weight that it stands for."""

    layers: list[LoadedLayer]
    weight: torch.Tensor


class LinearBench(KindBench):
    """A linear method of a quantization: a layer's product for different numbers of tokens."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._shape = (0, 0)
        self._loaded: dict[type[QuantizationLoader], _Copies] = {}  # of that shape

    def list_cases(self, target: type[QuantizationLoader]) -> Sequence[BenchCase]:
        """Layers of Llama 3.1 8B, or a small one on a CPU."""
        if self.device.type != "cuda":
            return [BenchCase(f"256x256, {n} tokens", (256, 256, n)) for n in (1, 16)]
        layers = {"o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
        return [
            BenchCase(f"{name} {features}x{inputs}, {n} tokens", (features, inputs, n))
            for name, (features, inputs) in layers.items()
            for n in (1, 16, 256)
        ]

    def prepare(self, target: type[QuantizationLoader], case: BenchCase) -> PreparedCase:
        """As many copies of the layer as do not fit into the L2 cache."""
        features, inputs, num_tokens = case.parameters
        copies = self._load(target, features, inputs)
        first, num_layers = copies.layers[0], len(copies.layers)
        x = torch.randn(num_tokens, inputs, generator=torch.Generator().manual_seed(1)).to(self.device, self._dtype)

        def launch() -> None:
            for layer in copies.layers:
                layer.apply(x)

        actual = first.apply(x).double()
        expected = x.double() @ copies.weight.to(self.device).double().T
        timer = make_timer(launch, self.device)
        return PreparedCase(
            lambda: timer() / num_layers,
            error=float((actual - expected).norm() / expected.norm()),
            num_bytes=first.count_bytes() + (x.numel() + num_tokens * features) * x.element_size(),
            num_flops=2 * num_tokens * features * inputs,
            note="error: of the norm, of the weights as they are stored",
        )

    def _load(self, target: type[QuantizationLoader], features: int, inputs: int) -> _Copies:
        """Loaded once for all numbers of tokens: packing and repacking the layers of a format takes seconds."""
        if self._shape != (features, inputs):
            self._shape, self._loaded = (features, inputs), {}
        if target not in self._loaded:
            example = StoredLayer.make_example(target, features, inputs)
            if reasons := target.unsupported(example.config, self.device):
                raise CaseRefusedError("; ".join(reasons))
            first = example.load(self._dtype, self.device)
            others = range(count_copies(first.count_bytes(), self.device) - 1)
            layers = [first, *(LoadedLayer(copy.deepcopy(first.layer), first.method) for _ in others)]
            self._loaded[target] = _Copies(layers, example.stored.weight)
        return self._loaded[target]

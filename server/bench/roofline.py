"""The roofline bound of a workload: the least time that its bytes and operations take at a device's measured ceilings.

No launch costs, no sampling, no host. Weights are read once a step; a prompt's step computes every token; a decode step
at batch ``B`` and context ``c`` reads ``B * c`` tokens of keys and values. Matrix products and attention follow each
other, so their times add; of each, the larger of its reading and its computing counts (the roofline model, Williams et
al. 2009).

Of several GPUs each rank of a stage reads and computes its share, and what they exchange is not counted. Stages compute
at the same time, each for other requests, but each reads its weights for every one of these groups.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from quire.core.config import EngineConfig
from quire.core.errors import ConfigError
from quire.core.loading.hf_config import read_hf_config

__all__ = [
    "CEILINGS",
    "CEILINGS_FILE",
    "Ceilings",
    "ModelShape",
    "decode_bound",
    "format_devices",
    "load_ceilings",
    "save_ceilings",
    "workload_bound",
]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device reaches on random data."""

    bytes_s: float
    """Reading device memory."""
    flops_s: float
    """A large product of 16-bit matrices."""
    fp8_flops_s: float = 0.0
    """A large product of 8-bit matrices; 0 where there is none."""

    def scale(self, devices: int) -> Ceilings:
        """Of so many of the device together."""
        return Ceilings(self.bytes_s * devices, self.flops_s * devices, self.fp8_flops_s * devices)


CEILINGS = {"NVIDIA H200": Ceilings(4.29e12, 680e12, 1280e12)}
"""Devices that were measured, by the name that their driver gives."""

CEILINGS_FILE = Path("~/.cache/quire/ceilings.json")
"""Where ``quire bench ceilings`` keeps what it measured on this machine."""


def load_ceilings(device: str, file: Path | None = None) -> Ceilings | None:
    """What was measured on this machine, else the built-in figures of such a card, else None.

    ``file`` is one that the user named; it is an error if it cannot be read.
    """
    path = (file or CEILINGS_FILE).expanduser()
    try:
        saved = json.loads(path.read_text("utf-8"))
        if device in saved:
            return Ceilings(**{name: float(saved[device][name]) for name in Ceilings.__slots__})
    except (OSError, ValueError, TypeError, KeyError) as error:
        if file is not None or not isinstance(error, OSError):
            raise ConfigError(f"{path} is no file of ceilings ({error!r}); make one: quire bench ceilings") from None
    return CEILINGS.get(device)


def save_ceilings(device: str, measured: Ceilings, file: Path | None = None) -> Path:
    """Add a device to the file. Raises ConfigError if it cannot be written."""
    path = (file or CEILINGS_FILE).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        saved = json.loads(path.read_text("utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**saved, device: asdict(measured)}, indent=2) + "\n", "utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written ({error}); name another with --out FILE") from None
    return path


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that count of a dense decoder with grouped-query attention."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    itemsize: int = 2
    """Bytes of a number where nothing is quantized: the head, and keys and values by default."""
    weight_bytes: float = 2.0
    """Bytes of a weight of the layers, scales and zero points included."""
    kv_itemsize: int = 2
    eight_bit: bool = False
    """Whether the layers multiply 8-bit numbers."""
    ranks: int = 1
    """GPUs that share every layer."""
    stages: int = 1
    """Of the pipeline, each with ``ranks`` GPUs."""

    @classmethod
    def from_hf_config(
        cls, hf_config: Any, *, itemsize: int = 2, kv_itemsize: int | None = None, online: str = ""
    ) -> ModelShape:
        """Read from a transformers configuration. ``online`` is the quantization applied while loading, if any."""
        heads = hf_config.num_attention_heads
        weights = _weight_format(getattr(hf_config, "quantization_config", None) or {}, online, itemsize)
        return cls(
            layers=hf_config.num_hidden_layers,
            hidden=hf_config.hidden_size,
            heads=heads,
            kv_heads=hf_config.num_key_value_heads,
            head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
            intermediate=hf_config.intermediate_size,
            vocab=hf_config.vocab_size,
            itemsize=itemsize,
            weight_bytes=weights.bytes_each,
            kv_itemsize=kv_itemsize or itemsize,
            eight_bit=weights.eight_bit,
        )

    @classmethod
    def from_engine_config(cls, config: EngineConfig) -> ModelShape:
        """The model as an engine runs it. Ranks on a CPU share it: they count as one."""
        size = 4 if config.model.dtype == "float32" else 2
        shape = cls.from_hf_config(
            read_hf_config(Path(config.model.path)),
            itemsize=size,
            kv_itemsize=1 if config.cache.dtype.startswith("fp8") else size,
            online=config.plugin("quant").name,
        )
        if config.model.device == "cpu":
            return shape
        parallel = config.parallel
        return replace(shape, ranks=parallel.tensor_parallel_size, stages=parallel.pipeline_parallel_size)

    @property
    def num_devices(self) -> int:
        """GPUs in all."""
        return self.ranks * self.stages

    @property
    def num_linear_weights(self) -> int:
        """Weights of the layers' linear maps."""
        qkvo = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (qkvo + 3 * self.hidden * self.intermediate)

    @property
    def kv_bytes(self) -> int:
        """Bytes of one cached token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_itemsize

    def linear_seconds(self, tokens: int, num_sampled: int, ceilings: Ceilings) -> float:
        """Seconds of a step's linear layers for ``tokens``, and of the head for those sampled."""
        head = self.hidden * self.vocab
        stage, busy = ceilings.scale(self.ranks), self._scale_to_busy(num_sampled, ceilings)
        layers = max(
            self.num_linear_weights * self.weight_bytes / stage.bytes_s,
            2 * tokens * self.num_linear_weights / self._flops_s(busy),
        )
        return layers + _roofline_seconds(head * self.itemsize, 2 * num_sampled * head, stage)

    def decode_step_seconds(self, batch: int, context: float, ceilings: Ceilings) -> float:
        """Seconds of a step in which ``batch`` requests of ``context`` tokens decode one each."""
        attention = _roofline_seconds(
            batch * (context + 1) * self.kv_bytes,
            4 * batch * context * self.heads * self.head_dim * self.layers,
            self._scale_to_busy(batch, ceilings),
        )
        return self.linear_seconds(batch, batch, ceilings) + attention

    def prefill_seconds(self, lengths: Sequence[int], ceilings: Ceilings) -> float:
        """Seconds to compute prompts, causally, as matrix products alone."""
        attention = sum(2 * self.layers * self.heads * self.head_dim * n * n for n in lengths)
        ceilings = ceilings.scale(self.num_devices)
        return 2 * sum(lengths) * self.num_linear_weights / self._flops_s(ceilings) + attention / ceilings.flops_s

    def _scale_to_busy(self, requests: int, ceilings: Ceilings) -> Ceilings:
        """Of the devices of all stages that work at a time: a request is in one stage."""
        return ceilings.scale(self.ranks * min(self.stages, requests))

    def _flops_s(self, ceilings: Ceilings) -> float:
        return ceilings.fp8_flops_s if self.eight_bit and ceilings.fp8_flops_s else ceilings.flops_s


def decode_bound(
    shape: ModelShape, prompt_lens: Sequence[int], answer_lens: Sequence[int], ceilings: Ceilings
) -> float:
    """Seconds in which every answer's tokens after the first can be decoded, all requests running from the start."""
    total = 0.0
    for generated in range(1, max(answer_lens)):
        running = [n for n, answer in zip(prompt_lens, answer_lens, strict=True) if answer > generated]
        total += shape.decode_step_seconds(len(running), sum(running) / len(running) + generated, ceilings)
    return total


def workload_bound(
    shape: ModelShape, prompt_lens: Sequence[int], answer_lens: Sequence[int], ceilings: Ceilings
) -> float:
    """Seconds in which the whole can be done: every prompt, then every answer."""
    return shape.prefill_seconds(prompt_lens, ceilings) + decode_bound(shape, prompt_lens, answer_lens, ceilings)


def format_devices(shape: ModelShape) -> str:
    """What a bound of several GPUs is called beside one of one; empty for one."""
    return f" of {shape.num_devices} GPUs, their exchange not counted" if shape.num_devices > 1 else ""


def _roofline_seconds(num_bytes: float, flops: float, ceilings: Ceilings) -> float:
    return max(num_bytes / ceilings.bytes_s, flops / ceilings.flops_s)


class _WeightFormat(NamedTuple):
    bytes_each: float
    """Scales and zero points included."""
    eight_bit: bool
    """Whether products are of 8-bit numbers."""


def _weight_format(quantization: dict[str, Any], online: str, itemsize: int) -> _WeightFormat:
    """From the checkpoint's ``quantization_config``, or the quantization applied while loading."""
    method = str(quantization.get("quant_method", "") or online)
    bits, group = quantization.get("bits"), quantization.get("group_size", 128)
    schemes = (quantization.get("config_groups") or {}).values()
    for scheme in schemes:  # compressed-tensors
        weights = scheme.get("weights") or {}
        bits, group = weights.get("num_bits", bits), weights.get("group_size") or 0
        method = "int8" if scheme.get("input_activations") else method
    if method in ("awq", "gptq") or (bits and bits <= 4):
        bits = bits or 4
        return _WeightFormat(bits / 8 + ((2 + bits / 8) / group if group and group > 0 else 0), False)
    if method in ("fp8", "int8") or bits == 8:
        return _WeightFormat(1.0, method in ("fp8", "int8"))
    return _WeightFormat(float(itemsize), False)

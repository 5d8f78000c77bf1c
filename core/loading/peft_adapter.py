"""A LoRA adapter in the folder that PEFT writes: ``adapter_config.json`` and ``adapter_model.safetensors``.

LoRA (Hu et al., 2021, arXiv:2106.09685) adds ``B A x`` times a scaling to the output of a linear layer. The format is
that of ``peft.LoraConfig`` and ``PeftModel.save_pretrained``.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from pydantic_core import SchemaError, SchemaValidator, core_schema
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quire.core.errors import CheckpointError

__all__ = ["LoraWeights", "PeftAdapter", "PeftConfig", "compute_content_hash", "read_adapter"]

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_CONFIG_BYTES = 1 << 20
_MAX_PATTERNS, _MAX_PATTERN_CHARS = 4096, 256
_COUNTED_REPEAT = re.compile(r"\{\s*\d")
"""Such as ``\\w{200}``, a few characters whose compilation takes a large part of a second."""
_NO_LINEAR_LAYERS = ("embed_tokens", "lm_head")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


class PeftConfig(msgspec.Struct, frozen=True):
    """The fields of ``adapter_config.json`` that change what an adapter computes; nothing else in it is read."""

    r: int
    lora_alpha: float
    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    target_modules: list[str] | str | None = None
    """Names of modules, or the ends of such; a text is a regular expression. What counts is which tensors there are."""
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: str = "none"
    lora_bias: bool = False
    use_dora: bool = False
    use_qalora: bool = False
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    monteclora_config: Any = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: Any = None
    target_parameters: list[str] | None = None
    layer_replication: Any = None
    alora_invocation_tokens: list[int] | None = None
    init_lora_weights: bool | str | None = True

    def find_unsupported(self) -> str | None:
        """The first field that asks for what is not LoRA as Quire computes it, and what to do; None: there is none."""
        base_changed = str(self.init_lora_weights).lower().startswith(_BASE_CHANGING_INITS)
        reasons = {
            f"peft_type {self.peft_type}": self.peft_type != "LORA",
            "use_dora: DoRA": self.use_dora,
            "use_qalora": self.use_qalora,
            "use_bdlora: block-diagonal LoRA": self.use_bdlora is not None and self.use_bdlora is not False,
            "arrow_config: a router of adapters": self.arrow_config is not None,
            "kasa_config: KaSA": self.kasa_config is not None,
            "monteclora_config: MonteCLoRA": self.monteclora_config is not None,
            "fan_in_fan_out": self.fan_in_fan_out,
            f"modules_to_save {self.modules_to_save}: whole modules": bool(self.modules_to_save),
            "trainable_token_indices: trained embeddings": bool(self.trainable_token_indices),
            f"target_parameters {self.target_parameters}": bool(self.target_parameters),
            "layer_replication": bool(self.layer_replication),
            "alora_invocation_tokens: activated LoRA": bool(self.alora_invocation_tokens),
            f"bias {self.bias}: trained biases": self.bias != "none",
            "lora_bias": self.lora_bias,
            f"init_lora_weights {self.init_lora_weights}: an adapter of a base with other weights": base_changed,
        }
        return next((name for name, applies in reasons.items() if applies), None)

    def get_rank(self, module: str) -> int:
        """The rank of ``module``."""
        rank: int = _find_value(self.rank_pattern, module, self.r)
        return rank

    def get_scaling(self, module: str) -> float:
        """By what ``B A x`` of ``module`` is multiplied: alpha over the rank, or over its root (rsLoRA)."""
        rank = self.get_rank(module)
        alpha: float = _find_value(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """What an adapter adds to one module: ``scaling * b @ a @ x``."""

    a: Tensor  # (rank, in_features)
    b: Tensor  # (out_features, rank)
    scaling: float

    @property
    def rank(self) -> int:
        """Of this module; modules may differ."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter in host memory."""

    config: PeftConfig
    content_hash: str
    """Of both files: adapters with the same hash compute the same."""
    modules: Mapping[str, LoraWeights]
    """By the module's name in the base's checkpoint, such as ``model.layers.0.self_attn.q_proj``."""

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max(weights.rank for weights in self.modules.values())

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(each.a.nbytes + each.b.nbytes for each in self.modules.values())


def read_adapter(
    path: str | Path,
    *,
    max_rank: int,
    module_shapes: Mapping[str, tuple[int, int]] | None = None,
    dtype: torch.dtype | None = None,
    content_hash: str | None = None,
) -> PeftAdapter:
    """Read and check the adapter in the folder ``path``.

    ``module_shapes`` are the linear layers of the base, whole: name in its checkpoint -> (out_features, in_features);
    an adapter that names others, or has other shapes, is refused. ``dtype`` is that of the tensors; None: as stored.
    ``content_hash`` is what the adapter had when it was registered: it is refused if its files have changed since.

    Raises ``CheckpointError``, one line that names the file, field or tensor and says what to do.
    """
    folder = Path(path)
    found_hash = compute_content_hash(folder)
    if content_hash is not None and found_hash != content_hash:
        raise CheckpointError(f"the files of adapter {str(path)!r} have changed since it was loaded; load it again")
    config = _read_config(folder)
    if (unsupported := config.find_unsupported()) is not None:
        raise CheckpointError(
            f"adapter {str(path)!r} is not plain LoRA ({unsupported}); train it without, or merge it into its base"
        )
    try:
        tensors = _read_weights(folder)
        if compute_content_hash(folder) != found_hash:
            raise CheckpointError("its files changed while they were read; load it again")
        modules = _pair_tensors(config, tensors, max_rank, module_shapes, dtype)
    except CheckpointError as error:
        base = config.base_model_name_or_path
        trained_on = f", trained on {base!r}" if base else ""
        raise CheckpointError(f"adapter {str(path)!r}{trained_on}: {error}") from None
    return PeftAdapter(config, found_hash, modules)


def compute_content_hash(path: str | Path) -> str:
    """The hash of the files of the adapter in the folder ``path``, whatever its method. Raises ``CheckpointError``."""
    folder, digest = Path(path), hashlib.blake2b(digest_size=16)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            with _open_file(folder / name) as file:
                if name == WEIGHTS_NAME:
                    _check_header(folder)  # against its length: what is hashed is what it says
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        except OSError as error:
            raise CheckpointError(f"adapter {str(path)!r} {_explain_unreadable(folder, name, error)}") from None
    return digest.hexdigest()


def _open_file(path: Path) -> io.BufferedReader:
    """Waits for nobody, as opening a named pipe does. Raises ``OSError`` for what is not a file."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115  (returned)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "it is not a regular file")
    return file


def _explain_unreadable(folder: Path, name: str, error: OSError) -> str:
    if not folder.is_dir():
        return "is not a folder; give one that PEFT wrote"
    if name == WEIGHTS_NAME and (folder / "adapter_model.bin").is_file():
        return (
            "has only adapter_model.bin, a pickle, which can run code when loaded and is refused; save it again as "
            "safetensors"
        )
    if isinstance(error, FileNotFoundError):
        return f"has no {name}; give a folder that PEFT wrote"
    return f"has {name}, which cannot be read ({error.strerror}); give a folder that PEFT wrote"


def _read_config(folder: Path) -> PeftConfig:
    try:
        with _open_file(folder / CONFIG_NAME) as file:
            data = file.read(_MAX_CONFIG_BYTES + 1)
        if len(data) > _MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {_MAX_CONFIG_BYTES} bytes")
        config = msgspec.json.decode(data, type=PeftConfig)
        ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
        if min(config.r, *ranks.values(), 1) < 1:
            raise ValueError("r must be at least 1")
        if len(ranks) + len(alphas) > _MAX_PATTERNS:
            raise ValueError(
                f"rank_pattern and alpha_pattern have {len(ranks) + len(alphas)} entries, of at most {_MAX_PATTERNS}"
            )
        for pattern in (*ranks, *alphas):
            _compile_pattern(pattern)
        if not all(math.isfinite(alpha) for alpha in (config.lora_alpha, *alphas.values())):
            raise ValueError("lora_alpha must be finite")
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{folder / CONFIG_NAME} is not an adapter's configuration: {error}") from None
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads tensor by tensor, so that no other thread waits for long, and without ``safe_open``'s ``get_tensor``, which
    keeps some memory for ever (safetensors 0.8)."""
    try:
        _check_header(folder)
        with _open_file(folder / WEIGHTS_NAME) as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = msgspec.json.decode(file.read(header_size), type=dict[str, msgspec.Raw])
            header.pop("__metadata__", None)
            return {key: _read_tensor(file, 8 + header_size, key, stored) for key, stored in header.items()}
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, OverflowError, msgspec.MsgspecError) as error:
        # It has changed since its header was checked.
        raise CheckpointError(f"{folder / WEIGHTS_NAME} cannot be read: {error}; load it again") from None


class _StoredTensor(msgspec.Struct):
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def _read_tensor(file: io.BufferedReader, data_start: int, key: str, raw: msgspec.Raw) -> Tensor:
    stored = msgspec.json.decode(raw, type=_StoredTensor)
    dtype = _DTYPES.get(stored.dtype)
    if dtype is None:
        raise CheckpointError(f"its tensor {key!r} is stored as {stored.dtype}; save it as 32 or 16-bit floats")
    begin, end = stored.data_offsets
    data = torch.empty(end - begin, dtype=torch.uint8)
    file.seek(data_start + begin)
    if file.readinto(data.numpy().data) != len(data):
        raise OSError("it ends too soon")
    return data.view(dtype).view(stored.shape)


def _check_header(folder: Path) -> None:
    """Raise ``CheckpointError`` where the header of the weights is none, or does not fit the file's length."""
    try:
        with safe_open(folder / WEIGHTS_NAME, framework="pt", device="cpu"):
            pass
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder / WEIGHTS_NAME} is truncated or not a safetensors file ({reason}); save it again"
        ) from None


def _pair_tensors(
    config: PeftConfig,
    tensors: dict[str, Tensor],
    max_rank: int,
    module_shapes: Mapping[str, tuple[int, int]] | None,
    dtype: torch.dtype | None,
) -> dict[str, LoraWeights]:
    """A and B of every module. Takes the tensors out of ``tensors`` as it converts them."""
    if isinstance(config.target_modules, list) and module_shapes is not None:
        _check_targets(config.target_modules, module_shapes)
    matrices: dict[str, dict[Literal["A", "B"], str]] = {}
    for key in sorted(tensors):
        found = _KEY.fullmatch(key)
        if found is None:
            raise CheckpointError(f"its tensor {key!r} is not lora_A or lora_B of a linear layer; train it without")
        module = _resolve_module(found["module"].removeprefix(_PREFIX), module_shapes)
        other = matrices.setdefault(module, {}).setdefault(found["matrix"], key)  # type: ignore[arg-type]  # A or B
        if other != key:
            raise CheckpointError(
                f"its tensors {other!r} and {key!r} are of one module; save it again with one of them"
            )
    if not matrices:
        raise CheckpointError("it has no tensors")
    modules = {}
    for module, keys in matrices.items():
        if len(keys) != 2:
            raise CheckpointError(f"module {module!r} has only one of lora_A and lora_B")
        a, b = tensors.pop(keys["A"]), tensors.pop(keys["B"])
        _check_pair(config, module, a, b, max_rank, None if module_shapes is None else module_shapes[module])
        modules[module] = LoraWeights(a.to(dtype or a.dtype), b.to(dtype or b.dtype), config.get_scaling(module))
        if dtype is not None:
            _check_range(module, modules[module])
    return modules


def _check_targets(target_modules: list[str], module_shapes: Mapping[str, tuple[int, int]]) -> None:
    for target in target_modules:
        _check_is_linear(target)
        if not any(name == target or name.endswith(f".{target}") for name in module_shapes):
            kinds = sorted({name.rpartition(".")[2] for name in module_shapes})
            raise CheckpointError(f"its target module {target!r} is none of the model's: {', '.join(kinds)}")


def _resolve_module(stored_name: str, module_shapes: Mapping[str, tuple[int, int]] | None) -> str:
    """The module's name in the base's checkpoint, also where the adapter was trained on the model without its head."""
    if module_shapes is None:
        return f"model.{stored_name}" if stored_name.startswith("layers.") else stored_name
    for name in (stored_name, f"model.{stored_name}"):
        if name in module_shapes:
            return name
    _check_is_linear(stored_name)
    raise CheckpointError(f"it has weights for {stored_name!r}, which is no linear layer of this model; check its base")


def _check_is_linear(module: str) -> None:
    if module.rpartition(".")[2] in _NO_LINEAR_LAYERS:
        raise CheckpointError(
            f"it changes {module!r}, and adapters cannot change embeddings and the head; train it without them"
        )


def _check_pair(
    config: PeftConfig, module: str, a: Tensor, b: Tensor, max_rank: int, shape: tuple[int, int] | None
) -> None:
    rank = config.get_rank(module)
    if rank > max_rank:
        raise CheckpointError(f"rank {rank} is above --max-lora-rank {max_rank}; raise that")
    out_features, in_features = shape or (b.shape[0] if b.ndim == 2 else 0, a.shape[1] if a.ndim == 2 else 0)
    for matrix, tensor, expected in (("A", a, (rank, in_features)), ("B", b, (out_features, rank))):
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"lora_{matrix} of {module!r} has shape {list(tensor.shape)}, not {list(expected)}; it is not an "
                f"adapter of this model"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"lora_{matrix} of {module!r} has infinite or undefined numbers; train it again")


def _check_range(module: str, weights: LoraWeights) -> None:
    """Numbers may be finite as stored and not in the dtype in which they are served, B with its scaling in it."""
    for matrix, tensor, scaling in (("A", weights.a, 1.0), ("B", weights.b, weights.scaling)):
        if not (tensor.float() * scaling).to(tensor.dtype).isfinite().all():
            times = "" if matrix == "A" else f" times its scaling of {scaling:g}"
            raise CheckpointError(
                f"lora_{matrix} of {module!r}{times} is beyond the range of {tensor.dtype}; choose another --lora-dtype"
            )


def _find_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """That of the first pattern that matches the end of the module's name, as PEFT looks it up."""
    found = (value for key, value in (patterns or {}).items() if _compile_pattern(key).isinstance_python(module))
    return next(found, default)


@lru_cache(maxsize=_MAX_PATTERNS)
def _compile_pattern(pattern: str) -> SchemaValidator:
    """The expression by an engine whose time grows with the text alone: with Python's own, which backtracks, an adapter
    could hold the process for hours. Raises ``ValueError``."""
    if len(pattern) > _MAX_PATTERN_CHARS:
        raise ValueError(f"a pattern has {len(pattern)} characters, of at most {_MAX_PATTERN_CHARS}")
    if _COUNTED_REPEAT.search(pattern):
        raise ValueError(f"the pattern {pattern!r} cannot be used: it has a counted repeat")
    try:
        return SchemaValidator(core_schema.str_schema(pattern=rf"^(?:.*\.)?(?:{pattern})$"))
    except SchemaError as error:
        reason = str(error).splitlines()[-1].strip().removeprefix("SchemaError: ").removeprefix("error: ")
        raise ValueError(f"the pattern {pattern[:100]!r} cannot be used: {reason}") from None

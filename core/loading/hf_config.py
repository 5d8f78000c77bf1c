"""A model folder's ``config.json``, as transformers reads it. Code in the folder is never run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any

from quire.core.errors import CheckpointError

__all__ = [
    "PlainConfig",
    "can_share_heads",
    "can_share_mlp",
    "get_architecture",
    "get_context_length",
    "read_hf_config",
]

_SIZE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
)
_COMMON_FIELDS: dict[str, type] = dict.fromkeys((*_SIZE_FIELDS, "num_key_value_heads", "vocab_size"), int)
_COMMON_FIELDS |= {"hidden_act": str, "rms_norm_eps": float, "tie_word_embeddings": bool}
"""Fields that a configuration gives itself, with these types, to be read without transformers."""
_FAMILY_FIELDS: dict[Any, dict[str, type]] = {
    "llama": {"attention_bias": bool, "mlp_bias": bool},
    "mistral": {"sliding_window": NoneType},
    "qwen2": {"use_sliding_window": bool},
    "qwen3": {"use_sliding_window": bool, "attention_bias": bool, "head_dim": int},
}
"""And further ones by ``model_type``: those for which the family has a default of its own."""
_TRANSFORMERS_ONLY_FIELDS = {"layer_types", "original_max_position_embeddings", "partial_rotary_factor"}
"""Fields from which transformers derives others: a configuration with one of them is left to it."""
_LLAMA3_ROPE_FIELDS = {"factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings"}


class PlainConfig(SimpleNamespace):
    """The fields of a ``config.json`` that leaves nothing to the defaults of its family; whatever else is asked of a
    ``PretrainedConfig`` is answered by transformers."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "quantization_config":
            raise AttributeError(name)
        return getattr(_load_with_transformers(vars(self), Path(self.name_or_path, "config.json")), name)

    def get_text_config(self) -> PlainConfig:
        """Itself: it describes a text model alone."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return dict(vars(self))


def read_hf_config(path: str | Path) -> Any:
    """What the ``transformers.PretrainedConfig`` of the folder ``path`` holds, from v4 and v5 spellings alike: such a
    one, or a ``PlainConfig`` where the file says everything, as transformers' classes take seconds to import.

    A ``model_type`` that transformers does not know gives a plain ``PretrainedConfig`` with the file's fields, so that
    a plugin may bring the model. Raises ``CheckpointError``.
    """
    file = Path(path) / "config.json"
    try:
        raw = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"model folder {str(path)!r} has no config.json; give a folder in Hugging Face layout"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({_format_error(error)}); download it again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} is not a JSON object; download it again")
    quantization = None if "quantization_config" in raw else _find_other_quantization(raw, Path(path))
    config: Any = _parse_plain_config({**raw, "name_or_path": str(path)}) or _load_with_transformers(raw, file)
    if quantization is not None:
        config.quantization_config = quantization
    return config


def _parse_plain_config(raw: dict[str, Any]) -> PlainConfig | None:
    """The configuration without transformers; None where transformers has anything to add, or to object to."""
    fields = {**_COMMON_FIELDS, **_FAMILY_FIELDS.get(raw.get("model_type"), {"model_type": NoneType})}
    if raw.keys() & _TRANSFORMERS_ONLY_FIELDS or not all(
        type(raw.get(name, ...)) is kind for name, kind in fields.items()
    ):
        return None
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": raw.get("rope_theta"), **rope}
    is_known_rope = rope["rope_type"] == "default" or (
        rope["rope_type"] == "llama3" and rope.keys() >= _LLAMA3_ROPE_FIELDS
    )
    heads, has_window = raw["num_attention_heads"], raw.get("use_sliding_window")
    if heads < 1 or raw["hidden_size"] % heads or has_window or not is_known_rope:
        return None
    if type(rope["rope_theta"]) not in (int, float):
        return None
    derived = {"head_dim": raw.get("head_dim") or raw["hidden_size"] // heads, "rope_parameters": rope}
    windows = {"layer_types": ["full_attention"] * raw["num_hidden_layers"], "sliding_window": None}
    return PlainConfig(**{**raw, "dtype": raw.get("dtype", raw.get("torch_dtype")), **derived, **windows})


def read_tokenizer_hint(path: str | Path) -> Any:
    """What transformers' ``AutoTokenizer`` looks up in the configuration of the model in ``path``, as a plain
    ``PretrainedConfig``: the model's own class takes a second to import. None where ``AutoTokenizer`` has to look
    itself: if ``config.json`` leaves fields to its family, or ``tokenizer_config.json`` names no class."""
    try:
        raw = json.loads(Path(path, "config.json").read_text("utf-8"))
        named = json.loads(Path(path, "tokenizer_config.json").read_text("utf-8"))
        is_plain = _parse_plain_config(raw) is not None
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    if not is_plain or not isinstance(named.get("tokenizer_class"), str) or "auto_map" in named:
        return None
    from transformers import PretrainedConfig

    hint = PretrainedConfig()
    hint.name_or_path = str(path)
    for name in raw.keys() & {"model_type", "model_name", "tokenizer_class"}:
        setattr(hint, name, raw[name])
    return hint


def _load_with_transformers(raw: dict[str, Any], file: Path) -> Any:
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        if raw.get("model_type") in CONFIG_MAPPING:
            return AutoConfig.from_pretrained(str(file.parent), trust_remote_code=False, local_files_only=True)
        return PretrainedConfig.from_dict(raw)
    except Exception as error:
        raise CheckpointError(f"{file} is not a valid configuration: {_format_error(error)}") from error


def get_architecture(hf_config: Any, is_known: Callable[[str], bool] = lambda name: True) -> str:
    """The model class that ``config.json`` names, e.g. ``LlamaForCausalLM``: of several the first that ``is_known``,
    or the first. Raises ``CheckpointError``."""
    names = getattr(hf_config, "architectures", None) or []
    if not names:
        raise CheckpointError(
            'config.json names no architecture; add "architectures": ["LlamaForCausalLM"] or whichever it is'
        )
    return next((str(name) for name in names if is_known(str(name))), str(names[0]))


def get_context_length(hf_config: Any) -> int:
    """Tokens of context, counting what the rope scaling adds to the trained length.

    ``linear`` and ``dynamic`` multiply ``max_position_embeddings``; ``yarn`` multiplies the original length, unless
    ``max_position_embeddings`` was already raised to that or more; ``llama3`` checkpoints give the raised length.
    """
    trained = getattr(hf_config, "max_position_embeddings", None)
    if not isinstance(trained, int) or trained <= 0:
        raise CheckpointError(f"max_position_embeddings is {trained!r} in config.json; it must be a positive integer")
    rope = getattr(hf_config, "rope_parameters", None) or {}
    factor = rope.get("factor") or 1.0
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "dynamic"):
        return int(trained * factor)
    if kind == "yarn":
        return max(trained, int(rope.get("original_max_position_embeddings", trained) * factor))
    return trained


def can_share_heads(text_config: Any, size: int) -> bool:
    """Whether ``size`` ranks can share the attention heads evenly, each with whole KV heads; true where the
    configuration does not say how many there are."""
    num_heads = int(getattr(text_config, "num_attention_heads", None) or size)
    num_kv_heads = int(getattr(text_config, "num_key_value_heads", None) or num_heads)
    return num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)


def can_share_mlp(text_config: Any, size: int) -> bool:
    """The same of the features between the projections of an MLP."""
    return int(getattr(text_config, "intermediate_size", None) or 0) % size == 0


def _find_other_quantization(raw: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """What older tools wrote in place of ``quantization_config`` in config.json: llmcompressor under another key, and
    others into a file of its own."""
    compression = raw.get("compression_config")
    if isinstance(compression, dict):
        nested = compression.get("quantization_config")
        return {**compression, **(nested if isinstance(nested, dict) else {}), "quant_method": "compressed-tensors"}
    for name, method in (("quantize_config", "gptq"), ("quant_config", "awq"), ("hf_quant_config", "modelopt")):
        file = path / f"{name}.json"
        if file.is_file():
            try:
                return {"quant_method": method, **json.loads(file.read_text("utf-8"))}
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"{file} cannot be read ({_format_error(error)}); download it again") from None
    return None


def _format_error(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

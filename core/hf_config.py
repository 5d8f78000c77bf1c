"""A model folder's ``config.json``, as transformers reads it. Code in the folder is never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quire.core.errors import CheckpointError

__all__ = ["architecture", "context_length", "read_hf_config"]


def read_hf_config(path: str | Path) -> Any:
    """The ``transformers.PretrainedConfig`` of the folder ``path``, from v4 and v5 spellings alike.

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
        raise CheckpointError(f"{file} cannot be read ({_line(error)}); download it again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} is not a JSON object; download it again")
    beside = None if "quantization_config" in raw else _quantization_beside(Path(path))
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        if raw.get("model_type") in CONFIG_MAPPING:
            config = AutoConfig.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
        else:
            config = PretrainedConfig.from_dict(raw)
    except Exception as error:
        raise CheckpointError(f"{file} is not a valid configuration: {_line(error)}") from error
    if beside is not None:
        config.quantization_config = beside
    return config


def architecture(hf_config: Any) -> str:
    """The model class that ``config.json`` names, e.g. ``LlamaForCausalLM``. Raises ``CheckpointError``."""
    names = getattr(hf_config, "architectures", None) or []
    if not names:
        raise CheckpointError(
            'config.json names no architecture; add "architectures": ["LlamaForCausalLM"] or whichever it is'
        )
    return str(names[0])


def context_length(hf_config: Any) -> int:
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


def _quantization_beside(path: Path) -> dict[str, Any] | None:
    """What older tools wrote into a file of its own in place of config.json's ``quantization_config``."""
    for name, method in (("quantize_config", "gptq"), ("quant_config", "awq"), ("hf_quant_config", "modelopt")):
        file = path / f"{name}.json"
        if file.is_file():
            try:
                return {"quant_method": method, **json.loads(file.read_text("utf-8"))}
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"{file} cannot be read ({_line(error)}); download it again") from None
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

"""``generation_config.json``: the tokens that end a text, and how a request is sampled that does not say."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.core.errors import CheckpointError, ConfigError, InvalidRequestError
from quire.core.json_setting import parse_json_setting
from quire.core.plugin.registry import suggest_names
from quire.core.sampling_params import SamplingParams

__all__ = ["GenerationDefaults", "read_generation_defaults"]

_log = logging.getLogger("quire.config")
_PARAM_OF_KEY = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Keys of the file that become defaults, the same as vLLM's, and the sampling parameter that each sets."""
_SILENT_KEYS = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"}
"""Keys that are used otherwise, or say nothing about how tokens are sampled."""


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a model's files say about generation."""

    eos_token_ids: tuple[int, ...] = ()
    sampling_params: Mapping[str, Any] = field(default_factory=dict)
    """Of a request that names none: by the names of ``SamplingParams``."""


def read_generation_defaults(
    folders: Iterable[Path], source: str, override: str | Mapping[str, Any] | None
) -> GenerationDefaults:
    """From the files of a model, its ``folders`` being the model's and then the tokenizer's.

    EOS tokens come from ``generation_config.json`` and ``config.json`` of every folder. Sampling defaults come from
    ``source``: ``auto`` for the model's folder, ``none`` (vLLM's ``vllm``), or another folder; ``override`` is a JSON
    object, or its text, whose keys win over the file's. Raises ``CheckpointError`` or ``ConfigError``.
    """
    folders = list(dict.fromkeys(folders))
    changes = _parse_override(override)
    eos = [
        _read_json(folder / name).get("eos_token_id")
        for folder in folders
        for name in ("generation_config.json", "config.json")
    ]
    if "eos_token_id" in changes:
        eos = [changes["eos_token_id"]]
    file = _find_file(source, folders[0])
    keys = {**({} if file is None else _read_json(file)), **changes}
    defaults = {param: value for key, param in _PARAM_OF_KEY.items() if (value := keys.get(key)) is not None}
    origin = " and ".join([*([str(file)] if file else []), *(["--override-generation-config"] if changes else [])])
    try:
        SamplingParams(**defaults)
    except InvalidRequestError as error:
        raise ConfigError(f"{origin}: {error}; mend it, or start with --generation-config none") from None
    _log_origin(origin, defaults, keys)
    return GenerationDefaults(_flatten_ids(eos), defaults)


def _find_file(source: str, model_folder: Path) -> Path | None:
    if source in ("none", "vllm"):
        return None
    if source == "auto":
        return model_folder / "generation_config.json"
    file = Path(source) / "generation_config.json"
    if not file.is_file():
        raise ConfigError(
            f"--generation-config {source}: it has no generation_config.json; give a folder, auto or none"
        )
    return file


def _read_json(file: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object; download it again")
    return content


def _parse_override(override: str | Mapping[str, Any] | None) -> dict[str, Any]:
    params = parse_json_setting("override_generation_config", override, '{"temperature": 0.6}')
    known = [*_PARAM_OF_KEY, "eos_token_id"]
    for key in params:
        if key not in known:
            raise ConfigError(f"override_generation_config: {key!r} is not known; {suggest_names(str(key), known)}")
    return params


def _flatten_ids(values: Iterable[Any]) -> tuple[int, ...]:
    """Of ids and lists of ids, each once."""
    token_ids = [token for value in values for token in (value if isinstance(value, list) else [value])]
    return tuple(dict.fromkeys(token for token in token_ids if type(token) is int))


def _log_origin(origin: str, defaults: Mapping[str, Any], keys: Mapping[str, Any]) -> None:
    if defaults:
        shown = ", ".join(f"{param} {value}" for param, value in defaults.items())
        _log.info("sampling defaults of requests: %s (from %s; --generation-config none: none)", shown, origin)
    unused = [key for key, value in keys.items() if value is not None and _says_more(key, value)]
    if unused:
        _log.info("%s: not used: %s", origin, ", ".join(sorted(unused)))


def _says_more(key: str, value: Any) -> bool:
    """Whether a key of the file asks for something that Quire does not do of itself."""
    if key == "do_sample":
        return value is False  # the temperature of a request decides
    return key not in _PARAM_OF_KEY and key not in _SILENT_KEYS and not key.startswith("_")

"""What the user asked of speculative decoding, resolved and checked before anything is loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quire.core.config import PluginChoice, SpeculationConfig
from quire.core.engine.args import EngineArgs
from quire.core.errors import ConfigError
from quire.core.plugin.manager import PluginManager

__all__ = ["MOST_DRAFTS", "configure_speculation", "with_speculative_config"]

MOST_DRAFTS = 16
"""The most drafts that a step may verify for a request."""
_log = logging.getLogger("quire.config")
_DEFAULT = 4
_FLAGS = {
    "method": "spec_method",
    "model": "speculative_model",
    "num_speculative_tokens": "num_speculative_tokens",
    "draft_tensor_parallel_size": "speculative_draft_tensor_parallel_size",
}
_OWN = ("adaptive", "forced_acceptance")


def with_speculative_config(args: EngineArgs) -> tuple[EngineArgs, dict[str, Any]]:
    """``--speculative-config`` spread over the flags it stands for, and what has no flag. Keys that are neither are
    options of the proposer."""
    given = args.speculative_config
    if not given:
        return args, {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ConfigError(f"speculative_config {given!r} is not JSON: {error}") from None
    if not isinstance(given, Mapping):
        raise ConfigError(f"speculative_config must be a JSON object, got {given!r}")
    changes: dict[str, Any] = {}
    own: dict[str, Any] = {}
    options = dict(args.plugin_options.get("spec_decode", {}))
    for key, value in given.items():
        if key in _FLAGS:
            before = getattr(args, _FLAGS[key])
            if before not in (None, "auto", value):
                raise ConfigError(f"{key} is given twice, as {before!r} and in speculative_config as {value!r}")
            changes[_FLAGS[key]] = value
        elif key in _OWN:
            own[key] = value
        else:
            options[key] = str(value)
    changes["plugin_options"] = {**args.plugin_options, "spec_decode": options} if options else args.plugin_options
    return replace(args, speculative_config=None, **changes), own


def configure_speculation(
    args: EngineArgs, own: Mapping[str, Any], plugins: PluginManager, context: Mapping[str, Any], max_model_len: int
) -> tuple[SpeculationConfig | None, dict[str, PluginChoice]]:
    """The section of the configuration, and the plugins it needs; None where nothing is drafted.

    Raises a ``QuireError`` where the proposer cannot draft for this model.
    """
    method, model, count = args.spec_method, args.speculative_model, args.num_speculative_tokens
    if model == "[ngram]":  # as older guides write it
        method, model = "ngram", None
    if method == "none" or count == 0 or (method == "auto" and model is None and count is None):
        if args.plugin_options.get("spec_decode"):
            raise ConfigError("spec_option is given, but nothing is drafted; choose with --spec-method")
        return None, {}
    if args.speculative_draft_tensor_parallel_size not in (None, 1):
        size = args.speculative_draft_tensor_parallel_size
        raise ConfigError(f"speculative_draft_tensor_parallel_size {size} is not supported yet; leave it at 1")
    if method == "auto" and model is None:
        raise ConfigError(
            f"num_speculative_tokens {count} says how much to draft, but not who drafts; add --speculative-model, or "
            "--spec-method ngram"
        )
    count, most = _DEFAULT if count is None else count, min(MOST_DRAFTS, max_model_len - 2)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= most:
        raise ConfigError(f"num_speculative_tokens must be between 1 and {most}, got {count!r}")

    from quire.core.loading.hf_config import get_architecture, get_context_length, read_hf_config
    from quire.core.loading.hub import resolve_model

    path = None if model is None else resolve_model(model, download_dir=args.download_dir, draft_head=True)
    draft_config = None if path is None else read_hf_config(path)
    resolution = plugins.resolve("spec_decode", method, dict(context, draft_config=draft_config))
    options = dict(args.plugin_options.get("spec_decode", {}))
    cls: Any = plugins.load("spec_decode", resolution.target)
    if cls.needs_model and path is None:
        raise ConfigError(f"spec_method {resolution.name!r} drafts with a model; name it with --speculative-model")
    if not cls.needs_model and path is not None:
        raise ConfigError(f"spec_method {resolution.name!r} needs no model; leave out --speculative-model {model}")
    reasons = list(cls.unsupported(context["hf_config"], draft_config, path))
    if cls.serves_model and (longest := get_context_length(draft_config)) < max_model_len:
        reasons.append(
            f"the draft was made for {longest} tokens of context, and max_model_len is {max_model_len}; set "
            f"--max-model-len {longest} or less"
        )
    if reasons:
        raise ConfigError(f"spec_method {resolution.name!r} cannot draft for this model: {'; '.join(reasons)}")
    choices = {"spec_decode": PluginChoice("spec_decode", resolution.name, resolution.target, options)}
    if draft_config is not None:
        own_context = dict(context, hf_config=draft_config, architectures=[get_architecture(draft_config)])
        for kind, name in (("quant", "auto"), ("model", get_architecture(draft_config))):
            if kind == "model" and not cls.serves_model:
                continue
            found = plugins.resolve(kind, name, own_context, announce=False)
            choices[f"draft_{kind}"] = PluginChoice(kind, found.name, found.target)
    return _section(own, count, path), choices


def _section(own: Mapping[str, Any], count: int, path: Path | None) -> SpeculationConfig:
    forced, adaptive = own.get("forced_acceptance"), own.get("adaptive", True)
    if forced is not None and not (isinstance(forced, int | float) and 0 <= forced <= 1):
        raise ConfigError(f"forced_acceptance must be between 0 and 1, got {forced!r}")
    if forced is not None:
        _log.warning("drafts are accepted by chance (%s): the answers are wrong, and only their speed counts", forced)
    if not isinstance(adaptive, bool):
        raise ConfigError(f"adaptive must be true or false, got {adaptive!r}")
    return SpeculationConfig(count, None if path is None else str(path), adaptive, forced)

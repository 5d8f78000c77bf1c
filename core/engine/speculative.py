"""The arguments of speculative decoding, resolved and checked before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from quire.core.config import PluginChoice, SpeculationConfig
from quire.core.engine.args import EngineArgs
from quire.core.engine.plugin_choices import make_choice
from quire.core.errors import ConfigError
from quire.core.json_setting import parse_json_setting
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.options import list_option_values

__all__ = ["MAX_SPECULATIVE_TOKENS", "build_speculation_config", "spread_speculative_config"]

MAX_SPECULATIVE_TOKENS = 16
"""The most draft tokens that a step may verify for a request."""
_log = logging.getLogger("quire.config")
_FIELD_OF_KEY = {
    "method": "spec_method",
    "model": "speculative_model",
    "num_speculative_tokens": "num_speculative_tokens",
    "draft_tensor_parallel_size": "speculative_draft_tensor_parallel_size",
}
_KEYS_WITHOUT_FLAG = ("adaptive", "forced_acceptance")


def spread_speculative_config(args: EngineArgs) -> tuple[EngineArgs, dict[str, Any]]:
    """``args`` with the keys of ``--speculative-config`` in the fields of their own flags, and the keys without a flag.

    Keys that Quire does not know become options of the proposer. Raises ``ConfigError`` for a key that its flag
    contradicts.
    """
    if not args.speculative_config:
        return args, {}
    keys = parse_json_setting("speculative_config", args.speculative_config, '{"method": "ngram"}')
    changes: dict[str, Any] = {}
    keys_without_flag: dict[str, Any] = {}
    options = list_option_values(args.plugin_options.get("spec_decode", {}))
    for key, value in keys.items():
        if key in _FIELD_OF_KEY:
            value_of_flag = getattr(args, _FIELD_OF_KEY[key])
            if value_of_flag not in (None, "auto", value):
                raise ConfigError(f"{key} is given twice, as {value_of_flag!r} and in speculative_config as {value!r}")
            changes[_FIELD_OF_KEY[key]] = value
        elif key in _KEYS_WITHOUT_FLAG:
            keys_without_flag[key] = value
        else:
            options[key] = str(value)
    changes["plugin_options"] = {**args.plugin_options, "spec_decode": options} if options else args.plugin_options
    return replace(args, speculative_config=None, **changes), keys_without_flag


def build_speculation_config(
    args: EngineArgs,
    keys_without_flag: Mapping[str, Any],
    plugins: PluginManager,
    context: Mapping[str, Any],
    max_model_len: int,
) -> tuple[SpeculationConfig | None, dict[str, PluginChoice]]:
    """The section of the configuration and the plugins it needs, by their keys in it; None where nothing is drafted.

    Raises a ``QuireError`` where the proposer cannot draft for this model.
    """
    method, model, num_tokens = args.spec_method, args.speculative_model, args.num_speculative_tokens
    if model == "[ngram]":  # as vLLM once spelt it
        method, model = "ngram", None
    if method == "none" or num_tokens == 0 or (method == "auto" and model is None and num_tokens is None):
        if args.plugin_options.get("spec_decode"):
            raise ConfigError("--spec-option is given, but nothing is drafted; choose a proposer with --spec-method")
        return None, {}
    draft_size, target_size = args.speculative_draft_tensor_parallel_size, args.tensor_parallel_size
    if draft_size not in (None, 1, target_size):
        raise ConfigError(
            f"speculative_draft_tensor_parallel_size {draft_size} is neither 1, a whole draft model on each GPU, "
            f"nor the target's tensor_parallel_size {target_size}"
        )
    if method == "auto" and model is None:
        raise ConfigError(
            f"num_speculative_tokens {num_tokens} says how much to draft, but not how; add "
            "--speculative-model, or --spec-method ngram"
        )
    max_tokens = min(MAX_SPECULATIVE_TOKENS, max_model_len - 2)
    if num_tokens is not None and (
        not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or not 0 < num_tokens <= max_tokens
    ):
        raise ConfigError(f"num_speculative_tokens must be between 1 and {max_tokens}, got {num_tokens!r}")

    from quire.core.loading.hf_config import get_architecture, get_context_length, read_hf_config
    from quire.core.loading.hub import resolve_model

    path = None if model is None else resolve_model(model, download_dir=args.download_dir, draft_head=True)
    draft_config = None if path is None else read_hf_config(path)
    resolution = plugins.resolve_plugin("spec_decode", method, dict(context, draft_config=draft_config))
    options = list_option_values(args.plugin_options.get("spec_decode", {}))
    cls: Any = plugins.load_class("spec_decode", resolution.target)
    if num_tokens is None:
        num_tokens = min(cls.default_num_tokens, max_tokens)
    if cls.needs_model and path is None:
        raise ConfigError(f"spec_method {resolution.name!r} drafts with a model; name it with --speculative-model")
    if not cls.needs_model and path is not None:
        raise ConfigError(f"spec_method {resolution.name!r} needs no model; leave out --speculative-model {model}")
    reasons = list(cls.unsupported(context["hf_config"], draft_config, path))
    if cls.serves_model and (draft_context_len := get_context_length(draft_config)) < max_model_len:
        reasons.append(
            f"the draft was made for {draft_context_len} tokens of context, and max_model_len is {max_model_len}; set "
            f"--max-model-len {draft_context_len} or less"
        )
    if reasons:
        raise ConfigError(f"spec_method {resolution.name!r} cannot draft for this model: {'; '.join(reasons)}")
    choices = {"spec_decode": make_choice(resolution, options)}
    if draft_config is not None:
        architecture = get_architecture(draft_config, partial(plugins.has_plugin, "model"))
        draft_context = dict(context, hf_config=draft_config, architectures=[architecture])
        for kind, name in (("quant", "auto"), ("model", architecture)):
            if kind == "model" and not cls.serves_model:
                continue
            draft_resolution = plugins.resolve_plugin(kind, name, draft_context, announce=False)
            choices[f"draft_{kind}"] = make_choice(draft_resolution)
    if draft_size is None:
        draft_size = target_size if _can_share(draft_config, target_size) else 1
    return _build_section(keys_without_flag, num_tokens, path, draft_size), choices


def _can_share(draft_config: Any, size: int) -> bool:
    """Whether ``size`` ranks can share the draft's layers, as far as its ``config.json`` says."""
    from quire.core.loading.hf_config import can_share_heads, can_share_mlp

    config = None if draft_config is None else draft_config.get_text_config()
    return can_share_heads(config, size) and can_share_mlp(config, size)


def _build_section(
    keys_without_flag: Mapping[str, Any], count: int, path: Path | None, draft_size: int
) -> SpeculationConfig:
    forced_acceptance, adaptive = keys_without_flag.get("forced_acceptance"), keys_without_flag.get("adaptive", True)
    if forced_acceptance is not None and not (
        isinstance(forced_acceptance, int | float) and 0 <= forced_acceptance <= 1
    ):
        raise ConfigError(f"forced_acceptance must be between 0 and 1, got {forced_acceptance!r}")
    if forced_acceptance is not None:
        _log.warning(
            "drafts are accepted by chance (%s): the answers are wrong, and only their speed counts", forced_acceptance
        )
    if not isinstance(adaptive, bool):
        raise ConfigError(f"adaptive must be true or false, got {adaptive!r}")
    return SpeculationConfig(count, None if path is None else str(path), adaptive, draft_size, forced_acceptance)

"""Loaders that say for each projection of the checkpoint in which scheme it is stored."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch

from quire.plugins.quant.grouped import GroupedFormat, GroupedLinear
from quire.plugins.quant.mixed import MixedLinear
from quire.plugins.quant.none import UnquantizedLinear
from quire.plugins.quant.scaled import Fp8Linear, Int8Linear, ScaledFormat
from quire.sdk import CheckpointError, LayerInfo, LinearMethod, QuantizationLoader

__all__ = ["LayerwiseLoader", "Scheme", "is_block", "is_integer", "is_invalid_group_size", "matches_name"]

_MALFORMED = (AttributeError, KeyError, OverflowError, TypeError, ValueError, re.error)

Scheme: TypeAlias = GroupedFormat | ScaledFormat | None
"""None: not quantized."""


class LayerwiseLoader(QuantizationLoader):
    """Asks ``get_scheme`` for each part of a layer."""

    @classmethod
    @abstractmethod
    def find_unsupported(cls, quant_config: Mapping[str, Any], device: torch.device) -> list[str]:
        """``unsupported``, of a well-formed configuration; of others it may raise what it likes of ``_MALFORMED``."""

    @classmethod
    def unsupported(cls, quant_config: Mapping[str, Any], device: torch.device) -> list[str]:
        """What ``find_unsupported`` says, or what it stumbled over."""
        try:
            return cls.find_unsupported(quant_config, device)
        except _MALFORMED as error:
            return [f"its quantization_config is malformed: {_format_error(error)}"]

    @abstractmethod
    def get_scheme(self, name: str, kind: str) -> Scheme:
        """How the projection ``name`` (``model.layers.0.self_attn.q_proj``) of ``kind`` is stored."""

    def get_linear_method(self, info: LayerInfo) -> LinearMethod:
        """One product where the parts are of one scheme, else one for each."""
        try:
            schemes = [self.get_scheme(name, info.kind) for name in info.part_names]
        except _MALFORMED as error:
            raise CheckpointError(
                f"quantization_config in config.json is malformed for {info.part_names[0]!r}: {_format_error(error)}"
            ) from None
        if all(scheme == schemes[0] for scheme in schemes):
            return _make_method(schemes[0])
        return MixedLinear(info.part_names, [_make_method(scheme) for scheme in schemes])

    @staticmethod
    def check_quant_method(quant_config: Mapping[str, Any], *methods: str) -> list[str]:
        """Why a checkpoint whose ``quant_method`` is none of ``methods`` cannot be read."""
        method = quant_config.get("quant_method")
        if method in methods:
            return []
        if method is None:
            return [f"the checkpoint is not quantized with {methods[0]}: quantize it first, with quire quantize"]
        return [f"the checkpoint is quantized with {method!r}, not {methods[0]}: leave out --quantization"]


def matches_name(name: str, patterns: Iterable[str] | None) -> bool:
    """Whether a layer's ``name`` is one of ``patterns``, or has it as a part between dots; ``re:`` begins a regular
    expression, matched from the start."""
    for pattern in patterns or ():
        if re.match(pattern[3:], name) if pattern.startswith("re:") else f".{pattern}." in f".{name}.":
            return True
    return False


def is_invalid_group_size(value: Any) -> bool:
    """Whether a value of config.json is neither -1 nor a positive integer."""
    return not is_integer(value) or (value < 1 and value != -1)


def is_integer(value: Any) -> bool:
    """Whether a value of config.json is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_block(value: Any) -> bool:
    """Whether a value of config.json is two positive integers."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(is_integer(n) and n > 0 for n in value)


def _format_error(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _make_method(scheme: Scheme) -> LinearMethod:
    if scheme is None:
        return UnquantizedLinear()
    if isinstance(scheme, GroupedFormat):
        return GroupedLinear(scheme)
    return Int8Linear(scheme) if scheme.dtype == torch.int8 else Fp8Linear(scheme)

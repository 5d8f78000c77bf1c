"""The adapters of a process that serves requests, by the names that requests call them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quire.core.adapters import AdapterRef, LoRARequest
from quire.core.config import EngineConfig
from quire.core.errors import ConfigError, InvalidRequestError
from quire.core.loading.hub import resolve_adapter
from quire.core.loading.peft_adapter import compute_content_hash
from quire.core.sampling_params import check_text

__all__ = ["AdapterModule", "AdapterRegistry", "parse_lora_modules"]

_MAX_NAME_CHARS, _MAX_PATH_CHARS = 256, 4096


class AdapterModule(NamedTuple):
    """An adapter that is loaded when the engine starts."""

    name: str
    path: str
    base_model_name: str | None = None
    """What ``/v1/models`` calls its base; None: the model's name."""


class AdapterRegistry:
    """A name stands for one adapter at a time: its content, under a number that is never used again. A request keeps
    what its name stood for when it came.

    Loading an adapter has three parts: ``read_adapter`` makes a reference, which may take a second; the engine core
    reads the adapter, and refuses it if it does not fit; ``add_adapter`` lets requests call it by its name.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.is_on = config.adapters is not None
        """Whether there may be adapters."""
        self._model_names = config.model.served_names or (config.model.model,)
        self._download_dir = config.extra.get("download_dir")
        self._adapters: dict[str, AdapterRef] = {}
        self._numbers = itertools.count(1)

    @property
    def adapters(self) -> list[AdapterRef]:
        """All that requests may call, in order of their loading."""
        return list(self._adapters.values())

    def find_adapter(self, name: str) -> AdapterRef | None:
        """What a name stands for; None: no adapter."""
        return self._adapters.get(name)

    def find_loaded(self, request: LoRARequest | None) -> AdapterRef | None:
        """The adapter of a request that gives no path, or the name on the hub that its adapter was loaded from: there
        may be a newer one, which is what ``load_inplace`` is for. None for others, of which ``find_requested`` knows
        more. Never asks the hub. Raises ``InvalidRequestError``."""
        if request is None:
            return None
        if not isinstance(request, LoRARequest):
            raise InvalidRequestError(f"lora_request must be a LoRARequest, got {request!r:.60}", "lora_request")
        self._require_on(request.lora_name)
        ref = self._adapters.get(request.lora_name)
        if ref is None or not request.lora_path:
            if ref is None and not request.lora_path:
                known = ", ".join(map(repr, self._adapters)) or "none"
                raise InvalidRequestError(
                    f"no adapter is called {request.lora_name!r:.100}; give its lora_path, or one of: {known}",
                    "lora_request",
                )
            return ref
        is_same = ref.given_path == request.lora_path and not request.load_inplace
        return ref if is_same and not Path(ref.given_path).expanduser().is_dir() else None

    def find_requested(self, request: LoRARequest | None) -> AdapterRef | None:
        """The adapter of a request; None if it has to be loaded first (or the request names none). Raises
        ``InvalidRequestError`` if the name stands for another folder."""
        ref = self.find_loaded(request)
        if ref is not None or request is None or request.load_inplace:
            return ref
        ref = self._adapters.get(request.lora_name)
        if ref is not None and str(self._resolve_path(request.lora_path)) != ref.path:
            raise InvalidRequestError(_describe_taken(ref), "lora_request")
        return ref

    def read_adapter(
        self, name: str, path: str, *, load_inplace: bool = False, base_model_name: str | None = None
    ) -> AdapterRef:
        """A reference to the adapter at ``path``: a folder, or a name on the hub, which is then downloaded. The files
        are read once, for their hash. Raises ``InvalidRequestError`` and ``CheckpointError``, one line each."""
        self._require_on(name)
        check_text("lora_name", name, _MAX_NAME_CHARS)
        check_text("lora_path", path, _MAX_PATH_CHARS)
        if base_model_name is not None:
            check_text("base_model_name", base_model_name, _MAX_NAME_CHARS)
        if not name.isprintable():
            raise InvalidRequestError(
                f"an adapter's name may have printable characters alone, got {name!r}", "lora_name"
            )
        self.check_name(name, load_inplace=load_inplace)
        folder = self._resolve_path(path)
        content_hash = compute_content_hash(folder)
        return AdapterRef(next(self._numbers), name, str(folder), content_hash, path, base_model_name)

    def check_name(self, name: str, *, load_inplace: bool) -> None:
        """Raise ``InvalidRequestError`` where an adapter cannot take the name."""
        if not name or name in self._model_names:
            raise InvalidRequestError(
                f"an adapter cannot be called {name!r}, as the model is; choose another name", "lora_name"
            )
        taken = self._adapters.get(name)
        if taken is not None and not load_inplace:
            raise InvalidRequestError(_describe_taken(taken), "lora_name")

    def add_adapter(self, ref: AdapterRef) -> AdapterRef | None:
        """From now on the name stands for this adapter. What it stood for before, for the engine core to drop."""
        replaced = self._adapters.pop(ref.name, None)
        self._adapters[ref.name] = ref
        return replaced

    def remove_adapter(self, name: str) -> AdapterRef:
        """From now on the name stands for nothing. Raises ``InvalidRequestError`` if it does not stand for anything."""
        ref = self._adapters.pop(name, None)
        if ref is None:
            raise InvalidRequestError(f"no adapter is called {name!r:.100}", "lora_name")
        return ref

    def _require_on(self, what: object) -> None:
        if not self.is_on:
            raise InvalidRequestError(f"{what!r:.100}: adapters are off; start with enable_lora", "lora_request")

    def _resolve_path(self, path: str) -> Path:
        return resolve_adapter(path, download_dir=self._download_dir)


def parse_lora_modules(modules: Sequence[Any] | Mapping[str, str]) -> tuple[AdapterModule, ...]:
    """``NAME=PATH``, or vLLM's ``{"name": NAME, "path": PATH}`` as JSON or as a mapping, in which ``base_model_name``
    is optional; or one mapping of names to paths. Raises ``ConfigError``."""
    if isinstance(modules, Mapping):
        return tuple(AdapterModule(name, str(path)) for name, path in modules.items())
    parsed = tuple(_parse_module(module) for module in modules)
    names = [module.name for module in parsed]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"lora_modules: the name {twice!r} is given twice")
    return parsed


def _parse_module(module: Any) -> AdapterModule:
    fields = module
    if isinstance(module, str):
        if not module.lstrip().startswith("{"):
            name, equals, path = module.partition("=")
            if not equals or not name.strip() or not path.strip():
                raise ConfigError(f"lora_modules: {module!r:.100} is not NAME=PATH")
            return AdapterModule(name.strip(), path.strip())
        try:
            fields = json.loads(module)
        except ValueError as error:
            raise ConfigError(f"lora_modules: {module!r:.100} is not valid JSON: {error}") from None
    if not isinstance(fields, Mapping) or not all(isinstance(fields.get(key), str) for key in ("name", "path")):
        raise ConfigError(f'lora_modules: {module!r:.100} is not {{"name": NAME, "path": PATH}}')
    base_model_name = fields.get("base_model_name")
    if unknown := sorted(map(str, fields.keys() - {"name", "path", "base_model_name"})):
        raise ConfigError(f"lora_modules: {module!r:.100} has {unknown[0]!r}; known are name, path and base_model_name")
    if not isinstance(base_model_name, str | None):
        raise ConfigError(f"lora_modules: the base_model_name of {module!r:.100} is not a string")
    return AdapterModule(fields["name"], fields["path"], base_model_name)


def _describe_taken(ref: AdapterRef) -> str:
    return f"the name {ref.name!r:.100} stands for the adapter of {ref.path!r}; unload that first, or set load_inplace"

"""Loads a model from its folder: safetensors are streamed tensor by tensor, so that no second copy is ever held."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from quire.core.contracts.model import Model
from quire.core.contracts.quant import QuantizationLoader
from quire.core.errors import CheckpointError, ConfigError, PluginError
from quire.core.layers.adapters import ModelAdapters
from quire.core.layers.builder import LayerBuilder
from quire.core.layers.checkpoint import find_optional_tensors, find_tensor_aliases
from quire.core.layers.parallel import TensorParallel
from quire.core.layers.stage import PipelineStage
from quire.core.loading.hf_config import get_context_length
from quire.core.ops.operation_table import OperationTable
from quire.core.plugin.target import construct_plugin

__all__ = ["find_weight_files", "load_model"]

_log = logging.getLogger("quire.loading")
_FIRST_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_INDEX = "model.safetensors.index.json"


def load_model(
    model_class: type[Model],
    hf_config: Any,
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype,
    block_size: int,
    quant: QuantizationLoader,
    load_format: str = "auto",
    seed: int = 0,
    parallel: TensorParallel = TensorParallel(0, 1),
    progress: bool = True,
    max_positions: int | None = None,
    operations: OperationTable = OperationTable(),
    adapters: ModelAdapters | None = None,
    stage: PipelineStage = PipelineStage(),
    plugin_name: str | None = None,
) -> Model:
    """Build ``model_class`` for this rank and fill it from ``path``.

    ``load_format`` is ``auto`` (safetensors), ``safetensors``, or ``dummy``: random weights from ``seed``, no files
    read. ``max_positions`` bounds the rotary tables; None: the whole context of ``hf_config``. ``progress`` draws a bar
    on stderr where that is a terminal; ``operations`` run norms and the like; ``adapters`` gets the layers that can
    have adapters; of a ``stage`` no tensor is read that another stage has. Raises ``CheckpointError``, one line naming
    the file or tensor. What the constructor of another author's model raises becomes a ``PluginError`` that names the
    model, ``plugin_name``.
    """
    if load_format not in ("auto", "safetensors", "dummy"):
        raise ConfigError(f"load_format {load_format!r} is unknown; choose auto, safetensors or dummy")
    if reasons := quant.unsupported(quant.quant_config, device):
        raise CheckpointError(
            f"quantization {type(quant).__name__!r} cannot load {str(path)!r}: {'; '.join(reasons)}; choose another "
            f"with --quantization"
        )
    max_positions = max_positions or get_context_length(hf_config)
    if stage.size > 1 and not model_class.supports_pipeline_parallel:
        raise ConfigError(
            f"{model_class.__name__} cannot be divided into stages: it does not support pipeline_parallel_size "
            f"{stage.size}; leave it out"
        )
    builder = LayerBuilder(
        dtype, device, kv_dtype, block_size, quant, parallel, max_positions, operations, adapters, stage=stage
    )
    with torch.inference_mode(False), torch.no_grad():
        model = _construct_model(model_class, hf_config, builder, plugin_name)
        if load_format == "dummy":
            _fill_random_weights(model, builder, seed)
        else:
            _stream_weights(model, find_weight_files(Path(path)), progress, builder.other_stage_names)
        for _ in model.process_weights_after_loading():
            pass
    return model.eval()


def _construct_model(model_class: type[Model], hf_config: Any, builder: LayerBuilder, plugin_name: str | None) -> Model:
    if plugin_name is None:
        return model_class(hf_config, builder)
    try:
        return construct_plugin(plugin_name, model_class, hf_config, builder)
    except PluginError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):  # no fault of the model's code
            raise error.__cause__ from None
        raise


def find_weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder, by its index or by name. Raises ``CheckpointError`` if none or some
    are missing; pickles are never read.

    An index beside ``model.safetensors`` that does not name that file is left from an earlier save, as for
    transformers.
    """
    index, single = path / _INDEX, path / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(f"{index} is not a valid index; download it again") from None
        if single.is_file() and single.name not in names:
            _log.warning("%s is used, not the files that %s names: it is of another save", single, _INDEX)
            return [single]
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{_INDEX} names {_format_names(missing)}, missing from {str(path)!r}; download the model again"
            )
        return [path / name for name in names]
    files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickles:
        raise CheckpointError(
            f"{str(path)!r} has only pickled weights ({_format_names([p.name for p in pickles])}), which can run code "
            f"when loaded and are refused; save the model again as safetensors"
        )
    raise CheckpointError(f"{str(path)!r} has no *.safetensors file; give a whole model folder or --load-format dummy")


def _stream_weights(model: Model, files: Sequence[Path], progress: bool, other_stage_names: Sequence[str] = ()) -> None:
    loaders = model.checkpoint_map()
    optional, aliases = find_optional_tensors(model), find_tensor_aliases(model)
    missing_names, unexpected = set(loaders), []
    # Also without the prefix of the model, as for this stage's own.
    elsewhere = tuple(f"{each}." for name in other_stage_names for each in (name, name.removeprefix("model.")))
    size = sum(file.stat().st_size for file in files)
    show_bar = progress and sys.stderr.isatty()
    with tqdm(
        total=size, unit="B", unit_scale=True, unit_divisor=1024, desc="Loading weights", disable=not show_bar
    ) as bar:
        for stored_name, tensor in _iter_tensors(files):
            name = _resolve_name(stored_name, loaders, aliases)
            if stored_name.startswith(elsewhere):
                pass  # mapped, and not read
            elif name in missing_names:
                loaders[name](tensor)
                missing_names.discard(name)
            elif name not in loaders and not model.is_ignored_tensor(name):
                unexpected.append(name)
            bar.update(tensor.nbytes)
    folder = str(files[0].parent)
    if missing := [name for name in loaders if name in missing_names and name not in optional]:
        num_expected = len(loaders) - len(missing_names & optional)
        raise CheckpointError(
            f"{folder!r} lacks {len(missing)} of {num_expected} tensors: {_format_names(missing)}; download the model "
            f"again, or mend its config.json{_format_unexpected(unexpected)}"
        )
    if unexpected:
        raise CheckpointError(
            f"{folder!r} has {len(unexpected)} tensors that this architecture does not use: "
            f"{_format_names(sorted(unexpected))}; its config.json names another model, or another quantization"
        )


def _resolve_name(stored_name: str, loaders: Mapping[str, Any], aliases: Mapping[str, str]) -> str:
    """The model's name for a tensor that a checkpoint may spell otherwise, or save without the prefix of the model."""
    for name in (stored_name, f"model.{stored_name}"):
        known_name = name if name in loaders else aliases.get(name)
        if known_name is not None:
            return known_name
    return stored_name


def _iter_tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{file} is truncated or not a safetensors file ({reason}); download it again"
            ) from None


@torch.no_grad()
def _fill_random_weights(model: Model, builder: LayerBuilder, seed: int) -> None:
    """Variance 1 / fan-in for matrices, so that activations keep their scale; vectors stay as they were constructed:
    norms 1, biases 0. Values follow from ``seed`` and the parameter's name in the whole model: stages have those of
    a model in one piece."""
    generator = torch.Generator(builder.device)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        whole_name = _name_in_whole_model(name, builder.first_layer)
        generator.manual_seed(zlib.crc32(f"{seed} {whole_name}".encode()))
        if not parameter.is_floating_point():
            parameter.random_(generator=generator)
            continue
        bound = math.sqrt(3.0 / parameter.shape[-1])
        if parameter.dtype.itemsize >= 2:
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=builder.device)
            parameter.copy_(values.uniform_(-bound, bound, generator=generator))


def _name_in_whole_model(name: str, first_layer: int) -> str:
    """The name of a parameter whose layer, the first number in it, is counted from its stage's first."""
    return _FIRST_NUMBER.sub(lambda number: str(int(number[0]) + first_layer), name, count=1)


def _format_unexpected(unexpected: Sequence[str]) -> str:
    return f" (it has {len(unexpected)} unknown ones: {_format_names(sorted(unexpected))})" if unexpected else ""


def _format_names(names: Sequence[str], limit: int = 3) -> str:
    first_names = ", ".join(names[:limit])
    return first_names if len(names) <= limit else f"{first_names} and {len(names) - limit} more"

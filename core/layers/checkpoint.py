"""How a layer's tensors are found in a checkpoint and copied into place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from quire.core.errors import CheckpointError

__all__ = [
    "CheckpointLayer",
    "WeightLoader",
    "check_tensor_shape",
    "collect_weight_loaders",
    "find_optional_tensors",
    "find_tensor_aliases",
    "make_copy_loader",
    "make_split_loader",
    "make_transposed_loader",
    "process_weights_after_loading",
]

WeightLoader = Callable[[Tensor], None]


class CheckpointLayer(nn.Module, ABC):
    """A layer that owns tensors of a checkpoint."""

    name: str
    """Of the module, e.g. ``model.layers.0.self_attn.qkv_proj``."""

    @abstractmethod
    def weight_loaders(self) -> dict[str, WeightLoader]:
        """Checkpoint tensor name -> what takes that tensor, whole, and copies this rank's shard into its parameters.

        The tensor is mapped from a file: slice it before anything else, and no more than the slice is read.
        """

    def optional_tensors(self) -> set[str]:
        """Names in ``weight_loaders`` that a checkpoint may lack."""
        return set()

    def tensor_aliases(self) -> dict[str, str]:
        """Other names that a checkpoint may use, and the name in ``weight_loaders`` that each means."""
        return {}

    def process_weights_after_loading(self) -> None:
        """Repack what was loaded. Called once, after every tensor of the model is in place."""


def collect_weight_loaders(model: nn.Module) -> dict[str, WeightLoader]:
    """The maps of every layer of ``model``, in order of construction."""
    return {name: load for layer in _find_layers(model) for name, load in layer.weight_loaders().items()}


def find_optional_tensors(model: nn.Module) -> set[str]:
    """Tensors of ``model`` that a checkpoint may lack."""
    return {name for layer in _find_layers(model) for name in layer.optional_tensors()}


def find_tensor_aliases(model: nn.Module) -> dict[str, str]:
    """Other names for tensors of ``model``, and the name of each in its checkpoint map."""
    return {alias: name for layer in _find_layers(model) for alias, name in layer.tensor_aliases().items()}


def process_weights_after_loading(model: nn.Module) -> Iterator[str]:
    """Let every layer of ``model`` repack, yielding the names of those done."""
    for layer in _find_layers(model):
        layer.process_weights_after_loading()
        yield layer.name


def check_tensor_shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    """Raise ``CheckpointError`` unless checkpoint tensor ``name`` has the shape that config.json implies."""
    if tuple(tensor.shape) != tuple(expected):
        raise CheckpointError(
            f"tensor {name!r} has shape {list(tensor.shape)}, but config.json asks for {list(expected)}; "
            f"the weights and config.json are not of the same model"
        )


def make_copy_loader(name: str, parameter: Tensor) -> WeightLoader:
    """Copies checkpoint tensor ``name`` into ``parameter``, of which every rank has the whole."""

    def load(tensor: Tensor) -> None:
        check_tensor_shape(name, tensor, parameter.shape)
        parameter.copy_(tensor)

    return load


def make_transposed_loader(load: WeightLoader) -> WeightLoader:
    """Takes a matrix that the checkpoint stores as (inputs, features), as GPT-2 does, where ``load`` wants
    (features, inputs)."""
    return lambda tensor: load(tensor.t())


def make_split_loader(loads: Sequence[WeightLoader], sizes: Sequence[int] | None = None) -> WeightLoader:
    """Takes one tensor of a checkpoint that holds several parts behind each other in its first dimension, a fused
    ``qkv`` for example, and gives each of ``loads`` its own: ``sizes`` rows, or equal shares."""

    def load(tensor: Tensor) -> None:
        rows = [len(tensor) // len(loads)] * len(loads) if sizes is None else list(sizes)
        if sum(rows) != len(tensor):
            raise CheckpointError(
                f"a tensor of shape {list(tensor.shape)} cannot be split into {len(loads)} parts of {rows} rows; "
                f"the weights and config.json are not of the same model"
            )
        for load_part, part in zip(loads, tensor.split(rows), strict=True):
            load_part(part)

    return load


def _find_layers(model: nn.Module) -> list[CheckpointLayer]:
    return [module for module in model.modules() if isinstance(module, CheckpointLayer)]

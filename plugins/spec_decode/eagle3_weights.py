"""From the files of an EAGLE-3 head to its layers; see ``eagle3_head`` for where the format comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quire.core.layers import checkpoint_map, process_weights_after_loading
from quire.core.layers.checkpoint import expect_shape
from quire.plugins.spec_decode.eagle3_head import Eagle3Head, HeadConfig
from quire.sdk import CheckpointError

__all__ = ["fill", "fill_randomly", "read_tensors"]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a head's folder, under the names that ``Eagle3Head`` uses. safetensors where there are any, else
    ``pytorch_model.bin``, of which tensors alone are unpickled. Raises ``CheckpointError``."""
    pickled = folder / "pytorch_model.bin"
    files = sorted(folder.glob("*.safetensors")) or [pickled]
    if not files[0].is_file():
        raise CheckpointError(
            f"{str(folder)!r} has no head in it, neither *.safetensors nor pytorch_model.bin; download it again"
        )
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors = _tensors_of(file)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{file} cannot be read ({reason}); download it again") from None
        for name, tensor in tensors.items():
            found[name.removeprefix("model.").replace("midlayer.", "layers.0.")] = tensor
    return found


def fill(head: Eagle3Head, config: HeadConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy every tensor into place. Raises ``CheckpointError`` for one that is missing, unknown, of another shape, or
    out of range."""
    fills, known = checkpoint_map(head), {"d2t", "t2d"}
    if head.embed_tokens is None:
        known.add("embed_tokens.weight")  # equal to the target's
    missing = sorted(set(fills) - set(tensors))
    if config.draft_vocab_size < config.vocab_size and "d2t" not in tensors:
        missing.append("d2t")
    if missing:
        raise CheckpointError(f"{where!r} lacks {', '.join(missing)}; it is no EAGLE-3 head, or download it again")
    if unknown := sorted(set(tensors) - set(fills) - known):
        raise CheckpointError(
            f"{where!r} has tensors that an EAGLE-3 head does not have: {', '.join(unknown)}; it is of another kind"
        )
    with torch.no_grad():
        for name, into in fills.items():
            into(tensors[name])
        head.target_ids.copy_(_target_ids(config, tensors, where))
        for _ in process_weights_after_loading(head):
            pass


def fill_randomly(head: Eagle3Head, seed: int) -> None:
    """Weights of variance 1 / fan-in, for benchmarks."""
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim == 2 and parameter.is_floating_point():
                chance = torch.Generator(parameter.device).manual_seed(seed)
                bound, wide = (3.0 / parameter.shape[1]) ** 0.5, torch.empty_like(parameter, dtype=torch.bfloat16)
                parameter.copy_(wide.uniform_(-bound, bound, generator=chance))
        for _ in process_weights_after_loading(head):
            pass


def _target_ids(config: HeadConfig, tensors: Mapping[str, Tensor], where: str) -> Tensor:
    """(draft_vocab_size,) int64: ``d2t`` holds how far each is from its own number."""
    ids = torch.arange(config.draft_vocab_size)
    if "d2t" in tensors:
        expect_shape("d2t", tensors["d2t"], ids.shape)
        ids = ids + tensors["d2t"].long()
    wrong = (ids < 0) | (ids >= config.vocab_size)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise CheckpointError(
            f"tensor 'd2t' of {where!r} makes token {int(ids[first])} of draft token {first}, but the vocabulary has "
            f"{config.vocab_size}; the head is of another model"
        )
    if len(ids.unique()) < len(ids):
        raise CheckpointError(f"tensor 'd2t' of {where!r} names a token twice; download it again")
    if "t2d" in tensors:
        expect_shape("t2d", tensors["t2d"], (config.vocab_size,))
        if not torch.equal(tensors["t2d"].bool().nonzero()[:, 0], ids.sort().values):
            raise CheckpointError(f"tensors 'd2t' and 't2d' of {where!r} disagree; download it again")
    return ids


def _tensors_of(file: Path) -> dict[str, Tensor]:
    """Of a pickle, tensors alone: anything else in it is refused, unrun."""
    if file.suffix == ".bin":
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    from safetensors.torch import load_file

    return load_file(file)

"""Reads and loads the weights of an EAGLE-3 head; see ``eagle3_head`` for where the format comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quire.plugins.spec_decode.eagle3_head import Eagle3Config, Eagle3Head
from quire.sdk import CheckpointError
from quire.sdk.layers import check_tensor_shape, collect_weight_loaders, process_weights_after_loading

__all__ = ["init_dummy_weights", "load_head_weights", "read_head_tensors", "save_random_head"]


def read_head_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a head's folder, under the names that ``Eagle3Head`` uses. safetensors where there are any, else
    ``pytorch_model.bin``, of which tensors alone are unpickled. Raises ``CheckpointError``."""
    files = sorted(folder.glob("*.safetensors")) or [folder / "pytorch_model.bin"]
    if not files[0].is_file():
        raise CheckpointError(
            f"{str(folder)!r} has no head in it, neither *.safetensors nor pytorch_model.bin; download it again"
        )
    head_tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors = _load_file(file)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{file} cannot be read ({reason}); download it again") from None
        for name, tensor in tensors.items():
            head_tensors[name.removeprefix("model.").replace("midlayer.", "layers.0.")] = tensor
    return head_tensors


def load_head_weights(head: Eagle3Head, config: Eagle3Config, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy every tensor into place. Raises ``CheckpointError`` for one that is missing, unknown, of another shape, or
    out of range."""
    loaders, others = collect_weight_loaders(head), {"d2t", "t2d"}
    if head.embed_tokens is None:
        others.add("embed_tokens.weight")  # equal to the target's
    missing = sorted(set(loaders) - set(tensors))
    if config.draft_vocab_size < config.vocab_size and "d2t" not in tensors:
        missing.append("d2t")
    if missing:
        raise CheckpointError(f"{source!r} lacks {', '.join(missing)}; it is no EAGLE-3 head, or download it again")
    if unknown := sorted(set(tensors) - set(loaders) - others):
        raise CheckpointError(
            f"{source!r} has tensors that an EAGLE-3 head does not have: {', '.join(unknown)}; it is of another kind"
        )
    with torch.no_grad():
        for name, load_tensor in loaders.items():
            load_tensor(tensors[name])
        head.draft_to_target_ids.copy_(_read_draft_to_target_ids(config, tensors, source))
        for _ in process_weights_after_loading(head):
            pass


def init_dummy_weights(head: Eagle3Head, seed: int) -> None:
    """Weights of variance 1 / fan-in, for benchmarks."""
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim == 2 and parameter.is_floating_point():
                generator = torch.Generator(parameter.device).manual_seed(seed)
                bound = (3.0 / parameter.shape[1]) ** 0.5
                uniform = torch.empty_like(parameter, dtype=torch.bfloat16)  # whatever the parameter's dtype
                parameter.copy_(uniform.uniform_(-bound, bound, generator=generator))
        for _ in process_weights_after_loading(head):
            pass


def save_random_head(target: Path, folder: Path) -> None:
    """Write a head of random weights for the model in ``target``, with half of its heads and a smaller vocabulary."""
    from safetensors.torch import save_file

    config = json.loads((target / "config.json").read_text("utf-8"))
    hidden, heads, vocab_size = config["hidden_size"], config["num_attention_heads"] // 2, config["vocab_size"]
    sizes = {"hidden_size": hidden, "intermediate_size": hidden, "num_attention_heads": heads, "vocab_size": vocab_size}
    head_config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_key_value_heads": heads,
        "num_hidden_layers": 1,
        "max_position_embeddings": config["max_position_embeddings"],
        "draft_vocab_size": vocab_size // 2,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0] * 3},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(head_config | sizes), "utf-8")
    matrices = {"q_proj": 2 * hidden, "k_proj": 2 * hidden, "v_proj": 2 * hidden, "o_proj": hidden}
    shapes = {f"midlayer.self_attn.{name}.weight": (hidden, width) for name, width in matrices.items()}
    shapes |= {f"midlayer.mlp.{name}_proj.weight": (hidden, hidden) for name in ("gate", "up", "down")}
    shapes |= {"fc.weight": (hidden, 3 * hidden), "lm_head.weight": (vocab_size // 2, hidden)}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * shape[1] ** -0.5 for name, shape in shapes.items()}
    norms = ("norm", *(f"midlayer.{name}" for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")))
    tensors |= {f"{name}.weight": torch.ones(hidden) for name in norms}
    tensors["d2t"] = torch.arange(vocab_size // 2)  # every other token
    save_file(tensors, folder / "model.safetensors")


def _read_draft_to_target_ids(config: Eagle3Config, tensors: Mapping[str, Tensor], source: str) -> Tensor:
    """(draft_vocab_size,) int64: ``d2t`` holds how far each is from its own number."""
    ids = torch.arange(config.draft_vocab_size)
    if "d2t" in tensors:
        check_tensor_shape("d2t", tensors["d2t"], ids.shape)
        ids = ids + tensors["d2t"].long()
    wrong = (ids < 0) | (ids >= config.vocab_size)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise CheckpointError(
            f"tensor 'd2t' of {source!r} makes token {int(ids[first])} of draft token {first}, but the vocabulary has "
            f"{config.vocab_size}; the head is of another model"
        )
    if len(ids.unique()) < len(ids):
        raise CheckpointError(f"tensor 'd2t' of {source!r} names a token twice; download it again")
    if "t2d" in tensors:
        check_tensor_shape("t2d", tensors["t2d"], (config.vocab_size,))
        if not torch.equal(tensors["t2d"].bool().nonzero()[:, 0], ids.sort().values):
            raise CheckpointError(f"tensors 'd2t' and 't2d' of {source!r} disagree; download it again")
    return ids


def _load_file(file: Path) -> dict[str, Tensor]:
    """Of a pickle, tensors alone: anything else in it is refused, unrun."""
    if file.suffix == ".bin":
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    from safetensors.torch import load_file

    return load_file(file)

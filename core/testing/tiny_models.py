"""Tiny random models in Hugging Face layout, of every family and rope variant, with a tokenizer that can serve them.

transformers makes them, so it is their reference. Nothing is fetched: the tokenizer is one token a byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "MODEL_FAMILIES",
    "ROPE_VARIANTS",
    "make_example_model",
    "make_tiny_model",
    "save_example_model",
    "save_tiny_tokenizer",
]

MODEL_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

ROPE_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
"""Parameters as in ``config.json``, for models of 256 positions."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = 258
"""``<|im_end|>``: the 256 bytes come first."""

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(
    family: str,
    path: str | Path,
    *,
    rope: str | Mapping[str, Any] = "default",
    seed: int = 0,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Save a random model of ``family`` (one of ``FAMILIES``) to ``path`` and return the path.

    ``rope`` is a name in ``ROPES`` or ``rope_parameters`` themselves; ``shards`` > 1 writes that many safetensors
    files and their index; ``overrides`` are fields of the configuration. Weights are large enough that greedy tokens
    vary, and norms and biases are not what initialisation would leave them at.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "rope_parameters": dict(ROPE_VARIANTS[rope] if isinstance(rope, str) else rope),
        "bos_token_id": None,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(family, **(settings | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    _save_weights(model.state_dict(), folder, shards, drop_head=bool(config.tie_word_embeddings))
    save_tiny_tokenizer(folder)
    return folder


def make_example_model(config: Mapping[str, Any], seed: int = 0) -> Any:
    """A random float32 model of transformers' class for ``config``, a ``config.json``. Weights are so large that
    attention is far from uniform and every bias and norm counts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    hf_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").to(torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.data.normal_().mul_(1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def save_example_model(model: Any, folder: Path) -> None:
    """Save what ``make_example_model`` made as a model folder with a tokenizer; a tied head is left out."""
    model.config.save_pretrained(folder)
    by_address: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        by_address.setdefault(tensor.data_ptr(), name)
    kept = set(by_address.values())
    _save_weights({n: t for n, t in model.state_dict().items() if n in kept}, folder, shards=1, drop_head=False)
    save_tiny_tokenizer(folder)


def save_tiny_tokenizer(folder: Path) -> None:
    """One token a byte, three special tokens and a ChatML template: ``tokenizer.json`` and its configuration."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"],
        "model_max_length": 1_000_000,
        "clean_up_tokenization_spaces": False,
        "chat_template": _TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_TOKEN_ID}), "utf-8")


def _save_weights(state: Mapping[str, Tensor], folder: Path, shards: int, drop_head: bool) -> None:
    from safetensors.torch import save_file

    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in state.items()
        if not (drop_head and name == "lm_head.weight")
    }
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        shard_names = names[shard::shards]
        weight_map.update(dict.fromkeys(shard_names, file))
        save_file({name: tensors[name] for name in shard_names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")

"""A trained model as a complete Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tools.train_tiny.model import Shape, TinyLlama
from tools.train_tiny.tokenizer import END_OF_TEXT, TURN_END, TURN_START
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

_SHARD = "12MB"
_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def llama_config(shape: Shape, tokenizer: Tokenizer) -> LlamaConfig:
    """Describe a shape as transformers does."""
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        eos_token_id=tokenizer.token_to_id(TURN_END),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
        dtype="bfloat16",
    )


def to_transformers(model: TinyLlama, tokenizer: Tokenizer, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """Return the same model as transformers' class."""
    target = LlamaForCausalLM(llama_config(model.shape, tokenizer))
    state = {name: value.detach().to("cpu", torch.float32) for name, value in model.state_dict().items()}
    missing, unexpected = target.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    target.tie_weights()
    return target.to(dtype).eval()


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """Write tokenizer.json, its configuration and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(_TEMPLATE, folder / "chat_template.jinja")


def write_folder(folder: Path, model: TinyLlama, tokenizer: Tokenizer) -> None:
    """Write weights, configurations, tokenizer and template; the card is written once the figures are known."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    write_tokenizer(folder, tokenizer, model.shape.context)
    target = to_transformers(model, tokenizer)
    ends = [tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END_OF_TEXT)]
    target.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=ends[1], eos_token_id=ends, pad_token_id=ends[1]
    )
    target.save_pretrained(folder, max_shard_size=_SHARD)

"""An EAGLE-3 head in its published layout, and what it drafts by a reference that shares no code with the product."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def make_eagle3_head(
    folder: Path,
    target: Path,
    training_prompts: Sequence[Sequence[int]] = (),
    *,
    layout: str = "eagle",
    num_draftable_tokens: int = 240,
    num_heads: int = 2,
    **overrides: Any,
) -> Path:
    """A random head whose ``lm_head`` is fitted to how ``target`` continues ``training_prompts``, so that its drafts
    are often accepted there.

    ``overrides`` change ``config.json``. ``layout``: ``eagle`` is SafeAILab's, pickled; ``specforge`` SpecForge's, with
    an embedding of its own; both have ``midlayer.*``. ``speculators`` is that of vLLM's library, with ``layers.0.*``.
    """
    target_config = json.loads((target / "config.json").read_text())
    layer = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": target_config["hidden_size"],
        "intermediate_size": 40,
        "num_attention_heads": num_heads,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "vocab_size": target_config["vocab_size"],
        "tie_word_embeddings": False,
    }
    layer_ids = [1, 0, 1]
    config: dict[str, Any]
    if layout == "speculators":
        config = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "transformer_layer_config": {key: value for key, value in layer.items() if key != "architectures"},
            "eagle_aux_hidden_state_layer_ids": layer_ids,
            "norm_before_residual": True,
        }
    else:
        nested = {"eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in layer_ids], "use_aux_hidden_state": True}
        config = {**layer, "eagle_config": nested}
    config = {**config, "draft_vocab_size": num_draftable_tokens, **overrides}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    tensors = _make_tensors(layer, model, num_draftable_tokens)
    if training_prompts:
        tensors["lm_head.weight"] = _fit_lm_head(Eagle3Reference(config, tensors, model), training_prompts)
    if layout != "specforge":
        del tensors["embed_tokens.weight"]
    if layout == "speculators":
        tensors = {name.replace("midlayer", "layers.0"): tensor for name, tensor in tensors.items()}
    if layout == "eagle":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def _fit_lm_head(head: Eagle3Reference, training_prompts: Sequence[Sequence[int]]) -> Tensor:
    """Least squares over greedy continuations of 32 tokens, from the head's output to the token that the target chose:
    for the first draft, and for the second, where the head takes its own output."""
    outputs, labels = [], []
    with torch.inference_mode():
        for prompt in training_prompts:
            greedy = {"do_sample": False, "max_new_tokens": 32, "min_new_tokens": 32}
            token_ids = head.target.generate(torch.tensor([list(prompt)]), **greedy)[0]
            fused, start = head.fuse_hidden_states(token_ids[:-2].tolist()), len(prompt) - 1
            hidden = head.run_layer(token_ids[1:-1], fused)
            outputs.append(hidden[start:])
            labels.append(token_ids[start + 2 :])
            for i in range(start, len(fused) - 1):
                fused_and_own = torch.cat((fused[: i + 1], hidden[i : i + 1]))
                outputs.append(head.run_layer(token_ids[1 : i + 3], fused_and_own)[-1:])
                labels.append(token_ids[i + 3 : i + 4])
        x, label = head.normalize(torch.cat(outputs)), torch.cat(labels)
        one_hot = (label[:, None] == head.target_ids[None]).double()  # (positions, draft_vocab_size)
        return torch.linalg.solve(x.T @ x + 1e-4 * torch.eye(x.shape[1]).double(), x.T @ one_hot).T.float().contiguous()


def _make_tensors(c: dict[str, Any], model: Any, draft_vocab_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale * shape[-1] ** -0.5

    hidden, wide, dim = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // c["num_attention_heads"]
    kv, attn = dim * c["num_key_value_heads"], "midlayer.self_attn"
    target_ids = torch.randperm(c["vocab_size"], generator=generator)[:draft_vocab_size].sort().values
    names = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    return {
        "fc.weight": normal(hidden, 3 * hidden),
        f"{attn}.q_proj.weight": normal(hidden, 2 * hidden, scale=2),
        f"{attn}.k_proj.weight": normal(kv, 2 * hidden, scale=2),
        f"{attn}.v_proj.weight": normal(kv, 2 * hidden),
        f"{attn}.o_proj.weight": normal(hidden, hidden),
        "midlayer.mlp.gate_proj.weight": normal(wide, hidden),
        "midlayer.mlp.up_proj.weight": normal(wide, hidden),
        "midlayer.mlp.down_proj.weight": normal(hidden, wide),
        **{f"midlayer.{name}.weight": 1 + 0.2 * torch.randn(hidden, generator=generator) for name in names},
        "norm.weight": model.model.norm.weight.data.clone(),
        "lm_head.weight": model.lm_head.weight.data[target_ids].clone(),
        "embed_tokens.weight": model.model.embed_tokens.weight.data * 1.5,
        "d2t": target_ids - torch.arange(draft_vocab_size),
        "t2d": torch.zeros(c["vocab_size"], dtype=torch.bool).index_fill(0, target_ids, True),
    }


class Eagle3Reference:
    """The head in float64, over whole sequences, from the paper and the published modelling code's semantics."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], target: Any) -> None:
        """``target`` is transformers' model."""
        self.weights = {
            name.replace("layers.0", "midlayer"): t.double() for name, t in tensors.items() if name != "t2d"
        }
        self.target_ids = torch.arange(len(tensors["d2t"])) + tensors["d2t"]  # of the draft tokens
        self.config = config.get("transformer_layer_config", config)
        self.norm_before_residual = config.get("norm_before_residual", False)
        embedding = self.weights.get("embed_tokens.weight")
        self.embedding = target.get_input_embeddings().weight.double() if embedding is None else embedding
        self.target = target
        layer_ids, nested = config.get("eagle_aux_hidden_state_layer_ids"), config.get("eagle_config")
        self.layer_ids = layer_ids or [output + 1 for output in nested["eagle_aux_hidden_state_layer_ids"]]

    @classmethod
    def load(cls, folder: Path, target: Any) -> Eagle3Reference:
        """From the head's files."""
        config = json.loads((folder / "config.json").read_text())
        pickled = folder / "pytorch_model.bin"
        stored = torch.load(pickled, weights_only=True) if pickled.exists() else load_file(folder / "model.safetensors")
        return cls(config, stored, target)

    def draft_tokens(self, token_ids: list[int], num_tokens: int, noise: Callable[[int], Tensor]) -> list[int]:
        """What follows ``token_ids``: the target has computed all but the last. ``noise`` (vocab,) is by position."""
        with torch.inference_mode():
            fused = self.fuse_hidden_states(token_ids[:-1])
            drafts: list[int] = []
            while len(drafts) < num_tokens:
                hidden = self.run_layer(torch.tensor([*token_ids, *drafts])[1:], fused)
                logits = self.normalize(hidden[-1]) @ self.weights["lm_head.weight"].T
                logits = logits + noise(len(token_ids) + len(drafts))[self.target_ids]
                drafts.append(int(self.target_ids[logits.argmax()]))
                fused = torch.cat((fused, hidden[-1:]))  # the head's own output stands for the target's states
        return drafts

    def fuse_hidden_states(self, token_ids: list[int]) -> Tensor:
        """(n, hidden): the target's hidden states of ``token_ids``, as the head takes them."""
        states = self.target(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
        return torch.cat([states[layer][0].double() for layer in self.layer_ids], -1) @ self.weights["fc.weight"].T

    def normalize(self, hidden: Tensor) -> Tensor:
        """As ``lm_head`` takes it."""
        return self._norm("norm", hidden)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        eps, weight = self.config["rms_norm_eps"], self.weights[f"{name}.weight"]
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    def run_layer(self, next_token_ids: Tensor, fused: Tensor) -> Tensor:
        """(n, hidden) after the layer, given each token's next and its fused hidden states."""
        c, w = self.config, self.weights
        n, heads, kv_heads = len(fused), c["num_attention_heads"], c["num_key_value_heads"]
        normed = self._norm("midlayer.hidden_norm", fused)
        x = torch.cat((self._norm("midlayer.input_layernorm", self.embedding[next_token_ids]), normed), -1)
        q, k, v = (x @ w[f"midlayer.self_attn.{part}_proj.weight"].T for part in "qkv")
        dim = c["hidden_size"] // heads
        angle = torch.outer(torch.arange(n).double(), c["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim))
        q, k = (self._rotate(y.view(n, -1, dim), angle) for y in (q, k))
        k, v = (y.reshape(n, kv_heads, dim).repeat_interleave(heads // kv_heads, 1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * dim**-0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(n, -1)
        residual = normed if self.norm_before_residual else fused
        residual = residual + attended @ w["midlayer.self_attn.o_proj.weight"].T
        y = self._norm("midlayer.post_attention_layernorm", residual)
        gate, up = (y @ w[f"midlayer.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        return residual + (torch.nn.functional.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T

    @staticmethod
    def _rotate(x: Tensor, angle: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)

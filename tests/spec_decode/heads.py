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


def make_head(
    folder: Path, target: Path, lessons: Sequence[Sequence[int]] = (), *, layout: str = "eagle", kept: int = 240,
    heads: int = 2, **overrides: Any,
) -> Path:  # fmt: skip
    """A random head whose ``lm_head`` has learnt how ``target`` continues ``lessons``, so that it is often right there.

    ``kept``: tokens that it can draft. ``layout``: ``eagle`` is SafeAILab's, pickled; ``specforge`` SpecForge's, with
    an embedding of its own; both have ``midlayer.*``. ``speculators`` is that of vLLM's library, with ``layers.0.*``.
    """
    theirs = json.loads((target / "config.json").read_text())
    layer = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": theirs["hidden_size"],
        "intermediate_size": 40,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "vocab_size": theirs["vocab_size"],
        "tie_word_embeddings": False,
    }
    taps = [1, 0, 1]
    config: dict[str, Any]
    if layout == "speculators":
        config = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "transformer_layer_config": {key: value for key, value in layer.items() if key != "architectures"},
            "eagle_aux_hidden_state_layer_ids": taps,
            "norm_before_residual": True,
        }
    else:
        nested = {"eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in taps], "use_aux_hidden_state": True}
        config = {**layer, "eagle_config": nested}
    config = {**config, "draft_vocab_size": kept, **overrides}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    tensors = _tensors(layer, model, kept)
    if lessons:
        tensors["lm_head.weight"] = _learn(ReferenceHead(config, tensors, model), lessons)
    if layout != "specforge":
        del tensors["embed_tokens.weight"]
    if layout == "speculators":
        tensors = {name.replace("midlayer", "layers.0"): tensor for name, tensor in tensors.items()}
    if layout == "eagle":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def _learn(head: ReferenceHead, lessons: Sequence[Sequence[int]]) -> Tensor:
    """Least squares, from what the head makes of greedy continuations of 32 tokens to the token that came: for its
    first draft, and for its second, where it sees its own output."""
    seen, came = [], []
    with torch.inference_mode():
        for lesson in lessons:
            wish = {"do_sample": False, "max_new_tokens": 32, "min_new_tokens": 32}
            made = head.target.generate(torch.tensor([list(lesson)]), **wish)[0]
            fused, start = head.fused(made[:-2].tolist()), len(lesson) - 1
            streams = head.stream(made[1:-1], fused)
            seen.append(streams[start:])
            came.append(made[start + 2 :])
            for i in range(start, len(fused) - 1):
                both = torch.cat((fused[: i + 1], streams[i : i + 1]))
                seen.append(head.stream(made[1 : i + 3], both)[-1:])
                came.append(made[i + 3 : i + 4])
        x, token = head.normed(torch.cat(seen)), torch.cat(came)
        right = (token[:, None] == head.ids[None]).double()  # (positions, kept)
        return torch.linalg.solve(x.T @ x + 1e-4 * torch.eye(x.shape[1]).double(), x.T @ right).T.float().contiguous()


def _tensors(c: dict[str, Any], model: Any, count: int) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(5)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=chance) * scale * shape[-1] ** -0.5

    hidden, wide, dim = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // c["num_attention_heads"]
    kv, at = dim * c["num_key_value_heads"], "midlayer.self_attn"
    kept = torch.randperm(c["vocab_size"], generator=chance)[:count].sort().values
    names = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    return {
        "fc.weight": draw(hidden, 3 * hidden),
        f"{at}.q_proj.weight": draw(hidden, 2 * hidden, scale=2),
        f"{at}.k_proj.weight": draw(kv, 2 * hidden, scale=2),
        f"{at}.v_proj.weight": draw(kv, 2 * hidden),
        f"{at}.o_proj.weight": draw(hidden, hidden),
        "midlayer.mlp.gate_proj.weight": draw(wide, hidden),
        "midlayer.mlp.up_proj.weight": draw(wide, hidden),
        "midlayer.mlp.down_proj.weight": draw(hidden, wide),
        **{f"midlayer.{name}.weight": 1 + 0.2 * torch.randn(hidden, generator=chance) for name in names},
        "norm.weight": model.model.norm.weight.data.clone(),
        "lm_head.weight": model.lm_head.weight.data[kept].clone(),
        "embed_tokens.weight": model.model.embed_tokens.weight.data * 1.5,
        "d2t": kept - torch.arange(count),
        "t2d": torch.zeros(c["vocab_size"], dtype=torch.bool).index_fill(0, kept, True),
    }


class ReferenceHead:
    """The head in float64, over whole sequences, from the paper and the published modelling code's semantics."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], target: Any) -> None:
        """``target`` is transformers' model."""
        self.w = {name.replace("layers.0", "midlayer"): t.double() for name, t in tensors.items() if name != "t2d"}
        self.ids = torch.arange(len(tensors["d2t"])) + tensors["d2t"]  # of the draft tokens
        self.c = config.get("transformer_layer_config", config)
        self.normed_residual = config.get("norm_before_residual", False)
        own = self.w.get("embed_tokens.weight")
        self.embedding = target.get_input_embeddings().weight.double() if own is None else own
        self.target = target
        top, nested = config.get("eagle_aux_hidden_state_layer_ids"), config.get("eagle_config")
        self.taps = top or [output + 1 for output in nested["eagle_aux_hidden_state_layer_ids"]]

    @classmethod
    def of(cls, folder: Path, target: Any) -> ReferenceHead:
        """From its files."""
        config = json.loads((folder / "config.json").read_text())
        pickled = folder / "pytorch_model.bin"
        stored = torch.load(pickled, weights_only=True) if pickled.exists() else load_file(folder / "model.safetensors")
        return cls(config, stored, target)

    def drafts(self, tokens: list[int], count: int, noise: Callable[[int], Tensor]) -> list[int]:
        """What follows ``tokens``: the target has seen all but the last. ``noise`` (vocab,) is by place."""
        with torch.inference_mode():
            fused = self.fused(tokens[:-1])
            drafted: list[int] = []
            while len(drafted) < count:
                stream = self.stream(torch.tensor([*tokens, *drafted])[1:], fused)
                logits = self.normed(stream[-1]) @ self.w["lm_head.weight"].T
                logits = logits + noise(len(tokens) + len(drafted))[self.ids]
                drafted.append(int(self.ids[logits.argmax()]))
                fused = torch.cat((fused, stream[-1:]))  # what it made itself stands for the states
        return drafted

    def fused(self, tokens: list[int]) -> Tensor:
        """(n, hidden): the target's states of ``tokens``, as the head takes them."""
        states = self.target(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        return torch.cat([states[tap][0].double() for tap in self.taps], -1) @ self.w["fc.weight"].T

    def normed(self, stream: Tensor) -> Tensor:
        """As ``lm_head`` takes it."""
        return self._norm("norm", stream)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.c["rms_norm_eps"]).sqrt() * self.w[f"{name}.weight"]

    def stream(self, following: Tensor, fused: Tensor) -> Tensor:
        """(n, hidden) behind the layer, given each token's next and its states."""
        c, w = self.c, self.w
        n, heads, kv_heads = len(fused), c["num_attention_heads"], c["num_key_value_heads"]
        normed = self._norm("midlayer.hidden_norm", fused)
        x = torch.cat((self._norm("midlayer.input_layernorm", self.embedding[following]), normed), -1)
        q, k, v = (x @ w[f"midlayer.self_attn.{part}_proj.weight"].T for part in "qkv")
        dim = c["hidden_size"] // heads
        angle = torch.outer(torch.arange(n).double(), c["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim))
        q, k = (self._rotate(y.view(n, -1, dim), angle) for y in (q, k))
        k, v = (y.reshape(n, kv_heads, dim).repeat_interleave(heads // kv_heads, 1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * dim**-0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        seen = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(n, -1)
        stream = (normed if self.normed_residual else fused) + seen @ w["midlayer.self_attn.o_proj.weight"].T
        y = self._norm("midlayer.post_attention_layernorm", stream)
        gate, up = (y @ w[f"midlayer.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        return stream + (torch.nn.functional.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T

    @staticmethod
    def _rotate(x: Tensor, angle: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)

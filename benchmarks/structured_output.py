"""What structured output costs and saves: guided beside unguided requests, and forced tokens at batch 1.

    PYTHONPATH=src:benchmarks python benchmarks/structured_output.py prepare FOLDER    # trains the tokenizer, ~1 min
    PYTHONPATH=src:benchmarks python benchmarks/structured_output.py run FOLDER

A different JSON schema for each request, of 3 to 12 properties with values of 1 to 40 tokens. Every answer has at least
128 tokens; an unguided request generates as many tokens as the guided one of its number. The tokenizer is a byte-level
BPE of 128,000 tokens, trained on the standard library of this Python and on files of PyTorch. ``--size tiny`` is for a
look on a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quire import LLM, SamplingParams, StructuredOutputsParams

SIZES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 8192},
}  # fmt: skip
WORDS = [
    "account", "address", "amount", "balance", "category", "city", "code", "color", "comment", "count", "country",
    "created", "currency", "date", "description", "discount", "email", "end_time", "error", "expires", "first_name",
    "height", "id", "label", "language", "last_name", "latitude", "length", "level", "limit", "location",
    "longitude", "name", "note", "offset", "order", "owner", "parent", "phone", "priority", "quantity", "rating",
    "reason", "region", "score", "size", "source", "start_time", "state", "status", "street", "summary", "target",
    "title", "total", "type", "unit", "updated", "url", "user", "value", "version", "weight", "zip"
]  # fmt: skip

_NUM_TORCH_FILES = 1000
"""The standard library alone has too few different words for 128,000 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("prepare", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--single", type=int, default=12, help="requests one after the other, for forced tokens")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    prepare(args.folder, args.size) if args.action == "prepare" else run(args)


def prepare(folder: Path, size: str) -> None:
    """A model folder without weights, which ``--load-format dummy`` makes up."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["structured_output_model:LongTokenLlama"], "model_type": "llama", "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
        "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 0,
        "attention_bias": False,
        "mlp_bias": False, "token_lengths": str((folder / "token_lengths.pt").resolve()), **SIZES[size],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    files = [file for file in find_sources(sysconfig.get_paths()["stdlib"]) if "site-packages" not in file.parts]
    files += find_sources(torch.__path__[0])[:_NUM_TORCH_FILES]
    files = files[: 200 if size == "tiny" else None]
    trainer = trainers.BpeTrainer(
        vocab_size=min(SIZES[size]["vocab_size"], 128_000),
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (file.read_text(encoding="utf-8", errors="ignore") for file in files)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "model_max_length": 8192})
    )
    lengths = torch.zeros(SIZES[size]["vocab_size"])
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0.0 if token == "<|end|>" else len(token) if len(token) <= 16 else 0.0
    torch.save(lengths, folder / "token_lengths.pt")
    print(f"{tokenizer.get_vocab_size()} tokens, from {len(files)} files")


def find_sources(folder: str) -> list[Path]:
    """Python files, in an order that is always the same."""
    return sorted(Path(folder).rglob("*.py"))


def make_schema(rng: random.Random) -> dict[str, Any]:
    """3 to 12 properties, whose values have 1 to 40 tokens; at least 128 tokens in all."""
    names = rng.sample(WORDS, rng.randint(3, 12))
    properties: dict[str, Any] = {}
    lengths = [rng.randint(1, 40) for _ in names]
    while sum(lengths) < 128:  # few properties: longer values, then more of them
        lengths = [min(40, length + 8) for length in lengths]
        if len(lengths) < 4:
            lengths.append(40)
            names.append(rng.choice([word for word in WORDS if word not in names]))
    for name, length in zip(names, lengths, strict=True):
        kind = rng.random()
        if length <= 4 and kind < 0.5:
            properties[name] = {"enum": rng.sample(WORDS, 5)} if kind < 0.25 else {"type": "boolean"}
        else:  # this model prefers tokens of 16 characters
            properties[name] = {"type": "string", "minLength": 16 * length, "maxLength": 16 * length}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def run(args: argparse.Namespace) -> None:
    """Print the figures of both parts."""
    rng = random.Random(0)
    schemas = [make_schema(rng) for _ in range(args.requests)]
    prompts = [[rng.randrange(1000, 8000) for _ in range(64)] for _ in schemas]
    settings: dict[str, Any] = {"model": str(args.folder), "load_format": "dummy", "max_model_len": 4096}
    guided = [
        SamplingParams(temperature=1, seed=i, max_tokens=2048, structured_outputs=constraint)
        for i, constraint in enumerate(StructuredOutputsParams(json=s, disable_any_whitespace=True) for s in schemas)
    ]
    llm = LLM(**settings, max_num_seqs=args.requests)
    lengths = [len(output.outputs[0].token_ids) for output in llm.generate(prompts, guided)]
    print(f"answers: {min(lengths)} to {max(lengths)} tokens, {statistics.mean(lengths):.0f} on average")
    unguided = [
        SamplingParams(temperature=1, seed=i, max_tokens=length, ignore_eos=True) for i, length in enumerate(lengths)
    ]
    figures: dict[str, list[tuple[float, float]]] = {"unguided": [], "guided": []}
    for _ in range(args.repeats):  # in turn
        for name, params in (("unguided", unguided), ("guided", guided)):
            figures[name].append(measure(llm, prompts, params))
    for name, values in figures.items():
        rates, steps = zip(*values, strict=True)
        print(f"{name:9} {statistics.median(rates):9.0f} tokens/s, p99 step {statistics.median(steps):7.2f} ms")
    ratio = statistics.median(r for r, _ in figures["guided"]) / statistics.median(r for r, _ in figures["unguided"])
    delta = statistics.median(s for _, s in figures["guided"]) - statistics.median(s for _, s in figures["unguided"])
    print(
        f"guided beside unguided: {100 * ratio:.1f} % of the tokens/s (goal 97), p99 step {delta:+.2f} ms (goal +0.3)"
    )
    print({k: round(v, 4) for k, v in llm.get_stats().items() if k.startswith("structured_output")})
    llm.shutdown()
    del llm
    torch.cuda.empty_cache() if torch.cuda.is_available() else None

    rates = {}
    for name, extra in (("without", {}), ("forced", {"spec_method": "forced_tokens", "num_speculative_tokens": 8})):
        llm = LLM(**settings, **extra, max_num_seqs=8)
        llm.generate(prompts[:1], guided[0])
        start, count = time.perf_counter(), 0
        for prompt, params in zip(prompts[: args.single], guided, strict=False):
            count += len(llm.generate([prompt], params)[0].outputs[0].token_ids)
        rates[name] = count / (time.perf_counter() - start)
        stats = llm.get_stats()
        print(f"batch 1, {name:8} {rates[name]:8.1f} tokens/s")
        llm.shutdown()
        del llm
    accepted, drafted = (stats[f"spec_decode_num_{kind}_tokens_total"] for kind in ("accepted", "draft"))
    print(f"forced tokens: {rates['forced'] / rates['without']:.2f}x (goal 1.3)")
    print(
        f"{accepted / max(stats['generation_tokens_total'], 1):.1%} of the tokens were accepted drafts of {drafted:.0f}"
    )


def measure(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> tuple[float, float]:
    """Tokens a second, and the 99th percentile of the time between two steps' tokens, of decodes alone, in ms."""
    llm.steps.clear()
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    count = sum(len(output.outputs[0].token_ids) for output in outputs)
    ends = [step.end_us for step in llm.steps if step.num_decodes == step.num_reqs]
    return count / seconds, float(np.percentile(np.diff(ends), 99)) / 1e3


if __name__ == "__main__":
    sys.exit(main())

"""What every model must compute: the logits of transformers' class for the same weights, however a step is composed.

The author names a tiny configuration in ``Model.example_config``; weights are random, numbers float32.
"""

from __future__ import annotations

import tempfile
import unittest
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.core.contracts.attention import AttentionSpec
from quire.core.contracts.model import AuxHiddenStates, Model
from quire.core.contracts.quant import QuantizationLoader
from quire.core.errors import ConfigError, UnsupportedError
from quire.core.layers.parallel import TensorParallel
from quire.core.loading.hf_config import read_hf_config
from quire.core.loading.loader import load_model
from quire.core.plugin.manager import PluginManager
from quire.core.testing.paged_runner import PagedRunner
from quire.core.testing.thread_ranks import run_on_ranks
from quire.core.testing.tiny_models import make_example_model, save_example_model

__all__ = [
    "check_auxiliary_hidden_states",
    "check_chunks_and_decodes_give_the_logits_of_transformers",
    "check_each_layer_has_a_spec",
    "check_logits_are_those_of_transformers",
    "check_random_weights_are_computed",
    "check_requests_do_not_mix",
    "check_shards_make_up_the_whole",
]

_TOLERANCE = 2e-3
"""Of the standard deviation of the reference's logits: float32 rounds sums in another order."""
_PROMPT_LENS = (1, 5, 33, 60)


def check_each_layer_has_a_spec(cls: type[Model]) -> None:
    """``attention_specs`` gives one for each layer of the configuration, whose query heads share KV heads evenly."""
    with _example(cls) as example:
        specs = example.load().attention_specs()
    num_layers = example.hf_config.get_text_config().num_hidden_layers
    assert isinstance(specs, list) and all(isinstance(spec, AttentionSpec) for spec in specs), f"gave {specs!r}"
    assert len(specs) == num_layers, f"gave {len(specs)} specs for {num_layers} layers"
    for spec in specs:
        assert spec.num_heads % spec.num_kv_heads == 0, f"{spec.num_kv_heads} KV heads do not divide: {spec}"
        assert spec.block_size == 16 and spec.dtype == torch.float32, f"not those of the builder: {spec}"


def check_logits_are_those_of_transformers(cls: type[Model]) -> None:
    """Whole prompts, the shortest of one token, each alone."""
    with _example(cls) as example:
        for seed, length in enumerate(_PROMPT_LENS):
            prompt = example.make_tokens(seed, length)
            runner = PagedRunner(example.load(), 1, 64)
            example.assert_logits(prompt, [runner.step({0: prompt})[0]], f"a prompt of {length} tokens")


def check_chunks_and_decodes_give_the_logits_of_transformers(cls: type[Model]) -> None:
    """Prompts in chunks, then token by token."""
    with _example(cls) as example:
        for sizes in ([16, 17, 1, 1, 1], [1] * 20, [7, 30, 1, 9]):
            prompt = example.make_tokens(len(sizes), sum(sizes))
            runner = PagedRunner(example.load(), 1, 64)
            logits = [runner.step({0: chunk})[0] for chunk in _split(prompt, sizes)]
            example.assert_logits(prompt, logits, f"chunks of {sizes}")


def check_requests_do_not_mix(cls: type[Model]) -> None:
    """Decodes, chunks and whole prompts in one step, in other blocks each."""
    with _example(cls) as example:
        prompts = {i: example.make_tokens(i, length) for i, length in enumerate((24, 30, 37, 9))}
        runner = PagedRunner(example.load(), len(prompts), 64)
        logits: dict[int, list[Tensor]] = {i: [] for i in prompts}
        for step in ((0, 1), (2, 0, 1), (0, 3, 2)):
            chunks: dict[int, Sequence[int]] = {}
            for i in step:
                done = runner.computed[i]
                chunks[i] = prompts[i][done : done + (1 if i == 0 and done else 20)]
            for i, rows in runner.step(chunks).items():
                logits[i].append(rows)
        for i, prompt in prompts.items():
            example.assert_logits(prompt[: runner.computed[i]], logits[i], f"request {i} of 4 in mixed steps")


def check_shards_make_up_the_whole(cls: type[Model]) -> None:
    """Two and four ranks that share every layer compute what one does."""
    with _example(cls) as example:
        prompt = example.make_tokens(3, 30)

        def run_rank(parallel: TensorParallel) -> list[Tensor]:
            runner = PagedRunner(example.load(parallel), 1, 64)
            return [runner.step({0: chunk})[0] for chunk in _split(prompt, [20, 9, 1])]

        for size in (2, 4):
            try:
                by_rank = run_on_ranks(size, run_rank)
            except (ConfigError, UnsupportedError) as refusal:
                if size > 2:
                    return
                raise unittest.SkipTest(f"cannot be shared by two ranks: {refusal}") from None
            for rank, logits in enumerate(by_rank):
                example.assert_logits(prompt, logits, f"rank {rank} of {size}")


def check_random_weights_are_computed(cls: type[Model]) -> None:
    """With ``--load-format dummy`` logits are finite, and differ between tokens."""
    with _example(cls) as example:
        prompt = example.make_tokens(1, 8)
        logits = PagedRunner(example.load(load_format="dummy"), 1, 16).step({0: prompt})[0]
        assert bool(logits.isfinite().all()), "logits are not finite"
        assert logits.std(0).max() > 0, "logits are the same for every token"


def check_auxiliary_hidden_states(cls: type[Model]) -> None:
    """Where it says that it supports them: the residual stream before a layer is transformers' hidden state."""
    if not cls.supports_aux_hidden_states:
        raise unittest.SkipTest("says that it has no auxiliary hidden states")
    with _example(cls) as example:
        prompt, model = example.make_tokens(1, 12), example.load()
        num_layers = len(model.attention_specs())
        layers = tuple(dict.fromkeys((num_layers - 1, 0)))
        width = example.hf_config.get_text_config().hidden_size
        model.aux_hidden_states = AuxHiddenStates(layers, torch.zeros(16, len(layers) * width))
        PagedRunner(model, 1, 16).step({0: prompt})
        with torch.inference_mode():
            hidden = example.reference(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for layer, states in zip(layers, model.aux_hidden_states.states[:12].chunk(len(layers), 1), strict=True):
            _assert_close(states, hidden[layer][0], f"the residual stream before layer {layer}")


@dataclass(frozen=True)
class _Example:
    """A tiny checkpoint, and transformers' model of it."""

    model_class: type[Model]
    path: Path
    hf_config: Any
    reference: Any

    def load(self, parallel: TensorParallel = TensorParallel(), load_format: str = "auto") -> Model:
        """The plugin's model from the checkpoint. The loader checks that each tensor is used once, and none is left."""
        unquantized: type[QuantizationLoader] = PluginManager().load_class("quant", "none")
        return load_model(
            self.model_class,
            self.hf_config,
            self.path,
            dtype=torch.float32,
            device=torch.device("cpu"),
            kv_dtype=torch.float32,
            block_size=16,
            quant=unquantized({}),
            load_format=load_format,
            parallel=parallel,
            progress=False,
        )

    def make_tokens(self, seed: int, length: int) -> list[int]:
        """Random tokens of the vocabulary."""
        vocab_size = int(self.hf_config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(seed)
        return [int(token) for token in torch.randint(vocab_size, (length,), generator=generator)]

    def assert_logits(self, tokens: Sequence[int], parts: list[Tensor], what: str) -> None:
        """Raise unless ``parts``, one behind the other, are the reference's logits for ``tokens``."""
        with torch.inference_mode():
            expected = self.reference(torch.tensor([list(tokens)])).logits[0]
        _assert_close(torch.cat(parts), expected, what)


@contextmanager
def _example(cls: type[Model]) -> Iterator[_Example]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = cls.example_config()
    assert config, "example_config() is empty: name the config.json of a tiny model, or nothing can be checked"
    if config["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise unittest.SkipTest(f"transformers has no causal language model of type {config['model_type']!r}")
    with tempfile.TemporaryDirectory(prefix="quire-check-") as folder:
        reference = make_example_model({**config, "architectures": [cls.__name__]})
        save_example_model(reference, Path(folder))
        yield _Example(cls, Path(folder), read_hf_config(Path(folder)), reference)


def _split(tokens: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [tokens[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raise unless two (num_tokens, features) are equal within ``_TOLERANCE``, naming the first token that is not."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    limit = _TOLERANCE * float(expected.std())
    error = (actual.float() - expected).abs().amax(1)
    wrong = torch.nonzero(~(error <= limit))[:, 0].tolist()  # NaN is wrong
    assert not wrong, (
        f"{what}: token {wrong[0]} of {len(expected)} is off by {float(error[wrong[0]]):.4g}, at most {limit:.4g} may "
        f"be rounding; so are {len(wrong)} of {len(expected)} tokens"
    )

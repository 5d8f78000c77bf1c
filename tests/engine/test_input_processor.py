"""What is refused before it reaches the engine core, and what reaches it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer as BackendTokenizer

from quire import LLM, SamplingParams
from quire.core.engine.input_processor import InputProcessor
from quire.core.engine.tokenizer import Tokenizer
from quire.core.errors import InvalidRequestError, RequestFailedError
from quire.core.loading.hub import resolve_model
from quire.core.testing.tiny_models import EOS_TOKEN_ID, make_tiny_model
from quire.server.http.protocol.completion import CompletionBody

PARAMS = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A model without a row for its tokenizer's ``[PAD]``, whose EOS list names two tokens that it has not either."""
    path = make_tiny_model("llama", tmp_path_factory.mktemp("models") / "pad", vocab_size=EOS_TOKEN_ID + 1)
    tokenizer = BackendTokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(path / "tokenizer.json"))
    eos = {"eos_token_id": [EOS_TOKEN_ID, EOS_TOKEN_ID + 1, -1]}
    (path / "generation_config.json").write_text(json.dumps(eos), "utf-8")
    llm = LLM(model=str(path), device="cpu", num_gpu_blocks_override=32)
    yield llm
    llm.shutdown()


def test_token_that_the_model_lacks_is_refused_by_name(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match=r"'\[PAD\]', which the tokenizer makes token 259") as refusal:
        llm.generate(["hello", "hi [PAD] x"], PARAMS)
    assert refusal.value.param == "prompt"


def test_token_that_the_model_lacks_is_refused_in_a_conversation(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="259"):
        llm.chat([{"role": "user", "content": "hi [PAD]"}], PARAMS)


def test_neighbours_of_a_refused_prompt_are_served(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError):
        llm.generate("[PAD]", PARAMS)
    assert len(llm.generate("hello", PARAMS)[0].outputs[0].token_ids) == 3


def test_eos_tokens_that_the_model_lacks_are_dropped(llm: LLM) -> None:
    [request] = llm.input_processor.process_inputs("r", "hello", PARAMS)
    assert request.eos_token_ids == [EOS_TOKEN_ID]
    params = SamplingParams(temperature=0, max_tokens=8, min_tokens=4)
    assert len(llm.generate("hello", params)[0].outputs[0].token_ids) >= 4


def test_special_tokens_that_the_tokenizer_adds_can_be_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "with-bos"
    shutil.copytree(resolve_model("quire-tiny"), folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    bos = next(token["content"] for token in data["added_tokens"] if token["id"] == 0)
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = Tokenizer(str(folder))
    processor = InputProcessor(tokenizer, 256, tokenizer.vocab_size)
    [with_bos] = processor.process_inputs("a", "def add(a, b):", SamplingParams())
    [without] = processor.process_inputs("b", "def add(a, b):", SamplingParams(add_special_tokens=False))
    assert with_bos.prompt_token_ids == [0, *without.prompt_token_ids]
    body = CompletionBody.model_validate({"prompt": "x", "add_special_tokens": False})
    assert body.to_sampling_params({}).add_special_tokens is False


@pytest.mark.parametrize("error", [KeyError, SystemExit, asyncio.CancelledError])
def test_a_logits_processor_that_raises_on_parameters_is_named(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    def validate_params(params: SamplingParams, vocab_size: int) -> None:
        raise error("a secret of the server")

    monkeypatch.setattr("quire.plugins.logits.logit_bias.LogitBias.validate_params", validate_params)
    with pytest.raises(RequestFailedError, match="logit_bias:LogitBias failed; the server's log says how") as raised:
        llm.generate([[5]], PARAMS)
    assert "secret" not in str(raised.value) and f"{error.__name__}: " in caplog.text

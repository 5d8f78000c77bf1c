"""What proposers propose, what they are refused for, and what a grammar makes of drafts."""

from __future__ import annotations

import json

import pytest

from quire import LLM, SamplingParams
from quire.core.errors import QuireError
from quire.core.messages import EngineCoreRequest
from quire.core.request import Request
from quire.core.testing.tiny_models import make_tiny_model
from quire.plugins.spec_decode.ngram import NgramProposer
from quire.plugins.spec_decode.suffix import SuffixProposer

from .test_exact import prompts_for


def request(tokens: list[int], name: str = "r", salt: str | None = None) -> Request:
    return Request(EngineCoreRequest(name, list(tokens), SamplingParams(seed=0), 0, cache_salt=salt), 1000)


def test_ngram_proposes_what_followed() -> None:
    proposer, one = NgramProposer(4), request([1, 2, 3, 4, 5, 9, 2, 3])
    assert proposer.propose(one, 3) == [4, 5, 9]
    one.token_ids.append(4)
    assert proposer.propose(one, 2) == [5, 9]
    one.token_ids += [7, 8]
    assert list(proposer.propose(one, 2)) == []
    one.token_ids += [7, 8]
    assert proposer.propose(one, 5) == [7, 8, 7, 8, 7]  # what repeats goes on
    proposer.request_finished(one)
    assert proposer.num_indexed_requests == 0


def test_ngram_prefers_the_latest_of_the_longest() -> None:
    proposer = NgramProposer(4)
    assert proposer.propose(request([1, 2, 3, 5, 8, 2, 3, 6, 1, 2, 3]), 1) == [5]
    assert proposer.propose(request([2, 3, 5, 8, 2, 3, 6, 9, 2, 3], "s"), 1) == [6]


def test_suffixes_are_shared_within_a_salt_alone() -> None:
    proposer = SuffixProposer(4)
    first = request([11, 12, 13, 14, 15, 16], "a", "mine")
    assert list(proposer.propose(first, 4)) == []
    proposer.request_finished(first)
    assert list(proposer.propose(request([3, 12, 13], "b", "mine"), 2)) == [14, 15]
    assert list(proposer.propose(request([3, 12, 13], "c", "yours"), 2)) == []
    assert list(proposer.propose(request([3, 12, 13], "d"), 2)) == []


def test_suffixes_of_requests_that_grow_side_by_side() -> None:
    """Against a search by hand: whatever is proposed followed the longest suffix that occurs before."""
    proposer, texts = SuffixProposer(3), [request([5], "x"), request([6], "y")]
    tokens = [1, 2, 1, 2, 3, 1, 2, 3, 4, 1, 2, 1, 2, 3, 4, 5, 1, 2, 3, 3, 1, 2, 1]
    for i, token in enumerate(tokens * 3):
        mine = texts[i % 2]
        mine.token_ids.append(token)
        found = list(proposer.propose(mine, 1))
        own = mine.token_ids
        seen = [text.token_ids for text in texts]
        longest = 0
        follows: set[int] = set()
        for text in seen:
            for end in range(1, len(text)):
                size = 0
                while size < min(end, len(own)) and text[end - 1 - size] == own[-1 - size]:
                    size += 1
                if text is own:
                    size = min(size, len(own) - 1)
                if size > longest:
                    longest, follows = size, set()
                if size == longest:
                    follows.add(text[end])
        if longest >= 2 and found:
            assert found[0] in follows


def test_a_grammar_holds_in_every_draft(engine) -> None:
    """A processor that masks by the token before, which may be a draft: the same tokens, all allowed."""
    grammar = {"logits_processors": ["quire.core.testing.grammar:CyclicGrammar"]}
    params = [
        SamplingParams(temperature=0.9 * (i % 2), seed=i, max_tokens=24, ignore_eos=True, extra_args={"cyclic": i != 3})
        for i in range(6)
    ]
    prompts = prompts_for(5, 6)
    plain = [o.outputs[0].token_ids for o in engine(**grammar).generate(prompts, params)]
    for proposer in ("itself", "random", "ngram"):
        llm = engine(proposer, **grammar)
        assert [o.outputs[0].token_ids for o in llm.generate(prompts, params)] == plain
        assert llm.get_stats()["spec_decode_num_draft_tokens_total"] > 0
    for i, (prompt, tokens) in enumerate(zip(prompts, plain, strict=True)):
        pairs = zip([prompt[-1], *tokens], tokens, strict=False)
        assert i == 3 or all(token % 3 == (before + 1) % 3 for before, token in pairs)


def refused(models, **arguments) -> str:
    with pytest.raises(QuireError) as caught:
        LLM(model=str(models["MODEL"]), device="cpu", max_model_len=128, **arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_bad_input_is_refused_with_the_reason(models, tmp_path) -> None:
    other = make_tiny_model("llama", tmp_path / "other", vocab_size=400)
    assert "vocabulary of 400 tokens, the target one of 320" in refused(models, speculative_model=str(other))
    short = make_tiny_model("llama", tmp_path / "short", max_position_embeddings=64)
    assert "64 tokens of context" in refused(models, speculative_model=str(short))
    renamed = make_tiny_model("llama", tmp_path / "renamed")
    file = renamed / "tokenizer.json"
    text = json.loads(file.read_text())
    vocab = text["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(text))
    assert "are not those of the target" in refused(models, speculative_model=str(renamed))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in refused(models, speculative_model=str(empty))
    (renamed / "tokenizer.json").unlink()
    (renamed / "model.safetensors").unlink()
    assert "no *.safetensors file" in refused(models, speculative_model=str(renamed))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_speculative_tokens": 3}, "but not how"),
        ({"spec_method": "draft_model"}, "--speculative-model"),
        ({"spec_method": "ngram", "speculative_model": "MODEL"}, "needs no model"),
        ({"spec_method": "ngram", "num_speculative_tokens": 17}, "between 1 and 16, got 17"),
        ({"spec_method": "ngram", "num_speculative_tokens": True}, "got True"),
        ({"spec_method": "ngrm"}, "did you mean"),
        ({"spec_method": "ngram", "speculative_draft_tensor_parallel_size": 2}, "not supported yet"),
        ({"speculative_config": "{"}, "is not JSON"),
        ({"speculative_config": "[]"}, "must be a JSON object"),
        ({"speculative_config": {"method": "ngram", "forced_acceptance": 2}}, "between 0 and 1"),
        ({"speculative_config": {"method": "ngram", "adaptive": "no"}}, "true or false"),
        ({"speculative_config": {"method": "ngram", "surprise": 1}}, "surprise"),
        ({"speculative_config": {"method": "ngram"}, "spec_method": "suffix"}, "given twice"),
        ({"plugin_options": {"spec_decode": {"min_match": "1"}}}, "nothing is drafted"),
    ],
)
def test_bad_settings_are_refused(models, arguments: dict, text: str) -> None:
    if arguments.get("speculative_model"):
        arguments = arguments | {"speculative_model": str(models["MODEL"])}
    assert text in refused(models, **arguments)


def test_nothing_is_drafted_where_nothing_is_asked(models) -> None:
    from quire.core.engine.args import EngineArgs
    from quire.core.engine.config_builder import build_config

    for wish in ({}, {"spec_method": "none"}, {"num_speculative_tokens": 0, "speculative_model": "x"}):
        assert build_config(EngineArgs(model=str(models["MODEL"]), **wish)).config.speculation is None
    given = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 3}
    config = build_config(EngineArgs(model=str(models["MODEL"]), speculative_config=json.dumps(given))).config
    assert config.speculation is not None and config.speculation.num_speculative_tokens == 6
    assert config.plugin("spec_decode").options == {"prompt_lookup_max": "3"}
    old = build_config(EngineArgs(model=str(models["MODEL"]), speculative_model="[ngram]")).config
    assert old.plugin("spec_decode").name == "ngram"


def test_forced_acceptance_accepts_as_often_as_told(engine) -> None:
    config = {"adaptive": False, "forced_acceptance": 0.75}
    llm = engine("random", speculative_config=config, max_num_seqs=32)
    llm.generate(prompts_for(6, 32), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    stats = llm.get_stats()
    rate = stats["spec_decode_accepted_at_0_total"] / stats["spec_decode_drafted_at_0_total"]
    assert 0.68 < rate < 0.82

"""What proposers propose, what they are refused for, and what a grammar makes of drafts."""

from __future__ import annotations

import json

import pytest

from quire import SamplingParams
from quire.core.messages import EngineCoreRequest
from quire.core.request import Request
from quire.core.testing.tiny_models import make_tiny_model
from quire.plugins.spec_decode.ngram import NgramProposer
from quire.plugins.spec_decode.suffix import SuffixProposer

from .conftest import get_refusal, make_prompts


def make_request(tokens: list[int], number: int = 1, salt: str | None = None) -> Request:
    return Request(EngineCoreRequest(number, list(tokens), SamplingParams(seed=0), 0, cache_salt=salt), 1000)


def test_ngram_drafts_what_followed() -> None:
    proposer, request = NgramProposer(4), make_request([1, 2, 3, 4, 5, 9, 2, 3])
    assert proposer.propose(request, 3) == [4, 5, 9]
    request.token_ids.append(4)
    assert proposer.propose(request, 2) == [5, 9]
    request.token_ids += [7, 8]
    assert list(proposer.propose(request, 2)) == []
    request.token_ids += [7, 8]
    assert proposer.propose(request, 5) == [7, 8, 7, 8, 7]  # what repeats goes on
    proposer.request_finished(request)
    assert proposer.num_indexed_requests == 0


def test_ngram_prefers_the_latest_of_the_longest() -> None:
    proposer = NgramProposer(4)
    assert proposer.propose(make_request([1, 2, 3, 5, 8, 2, 3, 6, 1, 2, 3]), 1) == [5]
    assert proposer.propose(make_request([2, 3, 5, 8, 2, 3, 6, 9, 2, 3], 2), 1) == [6]


def test_suffixes_are_shared_within_a_salt_alone() -> None:
    proposer = SuffixProposer(4)
    first = make_request([11, 12, 13, 14, 15, 16], 1, "mine")
    assert list(proposer.propose(first, 4)) == []
    proposer.request_finished(first)
    assert list(proposer.propose(make_request([3, 12, 13], 2, "mine"), 2)) == [14, 15]
    assert list(proposer.propose(make_request([3, 12, 13], 3, "yours"), 2)) == []
    assert list(proposer.propose(make_request([3, 12, 13], 4), 2)) == []


@pytest.mark.parametrize("max_tokens", [100, 1000])
def test_suffixes_of_many_salts_are_bounded_together(max_tokens: int) -> None:
    """A client that gives every request a salt of its own, and one that ends requests with long prompts at once."""
    proposer = SuffixProposer(4, SuffixProposer.Options(max_tokens=max_tokens))
    for number in range(200):
        request = make_request([number] * (10 if number % 2 else 700), number, salt=f"salt {number}")
        proposer.propose(request, 4)
        proposer.request_finished(request)
        assert proposer.num_held_tokens <= max_tokens + request.num_tokens
    assert len(proposer.propose(make_request([199, 199], 200, "salt 199"), 4)) > 0, "the latest salt is kept"


def test_suffixes_of_interleaved_requests() -> None:
    """Against a brute-force search: every draft followed the longest suffix that occurs before."""
    proposer, requests = SuffixProposer(3), [make_request([5], 1), make_request([6], 2)]
    tokens = [1, 2, 1, 2, 3, 1, 2, 3, 4, 1, 2, 1, 2, 3, 4, 5, 1, 2, 3, 3, 1, 2, 1]
    for i, token in enumerate(tokens * 3):
        request = requests[i % 2]
        request.token_ids.append(token)
        drafts = list(proposer.propose(request, 1))
        own_ids = request.token_ids
        longest = 0
        continuations: set[int] = set()
        for other_ids in (other.token_ids for other in requests):
            for end in range(1, len(other_ids)):
                size = 0
                while size < min(end, len(own_ids)) and other_ids[end - 1 - size] == own_ids[-1 - size]:
                    size += 1
                if other_ids is own_ids:
                    size = min(size, len(own_ids) - 1)
                if size > longest:
                    longest, continuations = size, set()
                if size == longest:
                    continuations.add(other_ids[end])
        if longest >= 2 and drafts:
            assert drafts[0] in continuations


def test_logits_processors_apply_to_drafts(engine) -> None:
    """A processor that masks by the token before, which may be a draft: the same tokens, all allowed."""
    grammar = {"logits_processors": ["quire.core.testing.grammar:CyclicGrammar"]}
    params = [
        SamplingParams(temperature=0.9 * (i % 2), seed=i, max_tokens=24, ignore_eos=True, extra_args={"cyclic": i != 3})
        for i in range(6)
    ]
    prompts = make_prompts(5, 6)
    plain = [o.outputs[0].token_ids for o in engine(**grammar).generate(prompts, params)]
    for proposer in ("itself", "random", "ngram"):
        llm = engine(proposer, **grammar)
        assert [o.outputs[0].token_ids for o in llm.generate(prompts, params)] == plain
        assert llm.get_stats()["spec_decode_num_draft_tokens_total"] > 0
    for i, (prompt, tokens) in enumerate(zip(prompts, plain, strict=True)):
        pairs = zip([prompt[-1], *tokens], tokens, strict=False)
        assert i == 3 or all(token % 3 == (before + 1) % 3 for before, token in pairs)


def test_bad_input_is_refused_with_the_reason(models, tmp_path) -> None:
    other = make_tiny_model("llama", tmp_path / "other", vocab_size=400)
    assert "vocabulary of 400 tokens, the target one of 320" in get_refusal(models, speculative_model=str(other))
    short = make_tiny_model("llama", tmp_path / "short", max_position_embeddings=64)
    assert "64 tokens of context" in get_refusal(models, speculative_model=str(short))
    renamed = make_tiny_model("llama", tmp_path / "renamed")
    file = renamed / "tokenizer.json"
    text = json.loads(file.read_text())
    vocab = text["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(text))
    assert "are not those of the target" in get_refusal(models, speculative_model=str(renamed))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in get_refusal(models, speculative_model=str(empty))
    (renamed / "tokenizer.json").unlink()
    (renamed / "model.safetensors").unlink()
    assert "no *.safetensors file" in get_refusal(models, speculative_model=str(renamed))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_speculative_tokens": 3}, "but not how"),
        ({"spec_method": "draft_model"}, "--speculative-model"),
        ({"spec_method": "ngram", "speculative_model": "MODEL"}, "needs no model"),
        ({"spec_method": "ngram", "num_speculative_tokens": 17}, "between 1 and 16, got 17"),
        ({"spec_method": "ngram", "num_speculative_tokens": True}, "got True"),
        ({"spec_method": "ngrm"}, "did you mean"),
        ({"spec_method": "ngram", "speculative_draft_tensor_parallel_size": 2}, "is neither 1, a whole draft"),
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
    assert text in get_refusal(models, **arguments)


def test_speculation_is_off_by_default(models) -> None:
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


def test_forced_acceptance_sets_the_acceptance_rate(engine) -> None:
    config = {"adaptive": False, "forced_acceptance": 0.75}
    llm = engine("random", speculative_config=config, max_num_seqs=32)
    llm.generate(make_prompts(6, 32), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    stats = llm.get_stats()
    rate = stats["spec_decode_accepted_at_0_total"] / stats["spec_decode_drafted_at_0_total"]
    assert 0.68 < rate < 0.82

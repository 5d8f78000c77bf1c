"""``allowed_token_ids`` and ``bad_words``: against their definition and transformers, and in engines under pressure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import NoBadWordsLogitsProcessor

from quire import LLM, SamplingParams
from quire.core.contracts.logits_processor import LogitsBatch
from quire.core.errors import InvalidRequestError
from quire.core.messages import NewRequest
from quire.core.testing.tiny_models import make_tiny_model
from quire.plugins.logits.allowed_token_ids import AllowedTokenIds
from quire.plugins.logits.bad_words import BadWords

CPU, VOCAB = torch.device("cpu"), 6
TOKENS = st.integers(0, VOCAB - 1)
WORDS = st.lists(st.lists(TOKENS, min_size=1, max_size=4), max_size=5)


def make_request(row: int, params: SamplingParams, prompt_len: int = 0) -> NewRequest:
    return NewRequest(row, row, [0] * prompt_len, prompt_len, 0, params, seed=1)


def make_batch(rows: list[int], texts: list[list[int]]) -> LogitsBatch:
    """Rows of logits after ``texts``, of which those of one row of the table are prefixes of each other."""
    table = torch.zeros(8, 32, dtype=torch.int32)
    for row, text in zip(rows, texts, strict=True):
        table[row, : len(text)] = torch.tensor(text, dtype=torch.int32)
    lengths = [len(text) for text in texts]
    return LogitsBatch(rows, lengths, table, torch.tensor(lengths, dtype=torch.int32))


def banned(logits: Tensor) -> list[list[int]]:
    return [row.isinf().nonzero()[:, 0].tolist() for row in logits]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, st.lists(TOKENS, max_size=8), st.integers(0, 3)), min_size=1, max_size=4))
def test_bad_words_by_definition(requests: list[tuple[list[list[int]], list[int], int]]) -> None:
    """For several requests at once, each also after one token less, as when it verifies a draft."""
    processor = BadWords(VOCAB, CPU)
    rows, texts, expected = [], [], []
    for row, (words, text, prompt_len) in enumerate(requests):
        assert processor.add_row(make_request(row, SamplingParams(bad_words_token_ids=words), prompt_len)) == bool(
            words
        )
        for length in {max(len(text) - 1, prompt_len), len(text)} if len(text) >= prompt_len else ():
            answer = text[prompt_len:length]
            rows.append(row)
            texts.append(text[:length])
            expected.append(sorted({w[-1] for w in words if answer[max(len(answer) - len(w) + 1, 0) :] == w[:-1]}))
    order = sorted(range(len(rows)), key=lambda i: (rows[i], len(texts[i])))
    rows, texts = [rows[i] for i in order], [texts[i] for i in order]
    logits = torch.zeros(len(rows), VOCAB)
    if rows:
        processor.apply(logits, make_batch(rows, texts))
    assert banned(logits) == [expected[i] for i in order]


def test_bad_words_are_transformers() -> None:
    words, text = [[4], [1, 2], [3, 1, 5]], [3, 1]
    processor, logits = BadWords(VOCAB, CPU), torch.randn(1, VOCAB)
    processor.add_row(make_request(0, SamplingParams(bad_words_token_ids=words)))
    expected = NoBadWordsLogitsProcessor(words, eos_token_id=0)(torch.tensor([text]), logits.clone())
    processor.apply(logits, make_batch([0], [text]))
    assert torch.equal(logits, expected) and banned(logits) == [[2, 4, 5]]


def test_a_row_that_another_request_took_follows_its_words() -> None:
    processor = BadWords(VOCAB, CPU)
    for word in ([2], [3]):
        processor.add_row(make_request(5, SamplingParams(bad_words_token_ids=[word])))
        logits = torch.zeros(1, VOCAB)
        processor.apply(logits, make_batch([5], [[]]))
        assert banned(logits) == [word]
        processor.remove_row(5)
    assert not processor.add_row(make_request(5, SamplingParams(bad_words_token_ids=[[VOCAB]])))


def test_only_allowed_tokens_keep_their_logits() -> None:
    processor, logits = AllowedTokenIds(VOCAB, CPU), torch.arange(4.0 * VOCAB).reshape(4, VOCAB)
    assert processor.add_row(make_request(0, SamplingParams(allowed_token_ids=[4, 1, 4])))
    assert not processor.add_row(make_request(1, SamplingParams()))
    assert processor.add_row(make_request(2, SamplingParams(allowed_token_ids=[0])))
    before = logits.clone()
    processor.apply(logits, make_batch([2, 1, 0, 0], [[], [], [], [1]]))  # row 0 verifies a draft
    kept = [[0], list(range(VOCAB)), [1, 4], [1, 4]]
    for row, tokens in enumerate(kept):
        assert logits[row].isfinite().nonzero()[:, 0].tolist() == tokens
        assert torch.equal(logits[row, tokens], before[row, tokens])


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": [1.5]}, "allowed_token_ids"),
        ({"allowed_token_ids": [1, 2], "bad_words_token_ids": [[1], [2], [3, 1]]}, "allowed_token_ids"),
        ({"bad_words": ["  "]}, "bad_words"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": [3]}, "bad_words"),
        ({"bad_words": "x"}, "bad_words"),
        ({"bad_words": ["x" * 257]}, "bad_words"),
        ({"bad_words_token_ids": [[]]}, "bad_words_token_ids"),
        ({"bad_words_token_ids": [[1] * 4097]}, "bad_words_token_ids"),
        ({"bad_words_token_ids": [[1] * 2048, [1] * 2049]}, "bad_words_token_ids"),
    ],
)
def test_what_is_refused_names_the_field(params: dict, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        AllowedTokenIds.validate_params(SamplingParams(**params), VOCAB)
    assert caught.value.param == param and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    model = make_tiny_model("llama", tmp_path_factory.mktemp("model"))
    engine = LLM(
        model=str(model),
        device="cpu",
        max_model_len=128,
        max_num_seqs=8,
        block_size=4,
        num_gpu_blocks_override=40,
        max_num_batched_tokens=24,
    )
    yield engine
    engine.shutdown()


def find_words(token_ids: list[int], words: list[list[int]]) -> list[list[int]]:
    windows = {tuple(token_ids[i : i + n]) for n in range(1, 5) for i in range(len(token_ids) - n + 1)}
    return [word for word in words if tuple(word) in windows]


def test_bans_hold_through_preemption_chunks_and_n(llm: LLM) -> None:
    """What a first run generates is forbidden in a second one, which is seeded alike."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 250, 12 + 5 * i).tolist() for i in range(6)]
    plain = [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, n=1 + i % 3, max_tokens=24, ignore_eos=True) for i in range(6)
    ]
    answers = [[c.token_ids for c in output.outputs] for output in llm.generate(prompts, plain)]
    assert llm.get_stats()["num_preemptions_total"] > 0
    params, words_of = [], []
    for one, tokens in zip(plain, answers, strict=True):
        first = tokens[0]
        words = [
            first[:1],
            *(first[i : i + 2] for i in range(1, len(first) - 1, 3)),
            *([first[1:4]] if first[3:] else []),
        ]
        allowed = sorted({*range(100), *first})
        words_of.append((words, allowed))
        fields = {"temperature": one.temperature, "seed": one.seed, "n": one.n, "max_tokens": 24, "ignore_eos": True}
        params.append(SamplingParams(bad_words_token_ids=words, allowed_token_ids=allowed, **fields))
    for output, (words, allowed), before in zip(llm.generate(prompts, params), words_of, answers, strict=True):
        for completion in output.outputs:
            assert not find_words(completion.token_ids, words)
            assert set(completion.token_ids) <= set(allowed)
        assert find_words(before[0], words) == words
    llm.engine_core.scheduler.debug_state().allocator.check_integrity()


def test_a_bad_word_is_forbidden_alone_and_after_a_space(llm: LLM) -> None:
    [request] = llm.input_processor.process_inputs("r", [5], SamplingParams(bad_words=["the", " the", "of"]))
    spelled = {llm.tokenizer.decode(sequence).lstrip() for sequence in request.params.bad_words_token_ids}
    assert spelled == {"the", "of"}
    assert llm.tokenizer.encode("the", add_special_tokens=False) in request.params.bad_words_token_ids
    assert llm.tokenizer.encode(" the", add_special_tokens=False) in request.params.bad_words_token_ids
    with pytest.raises(InvalidRequestError) as caught:
        words = [f"{i} the cat sat on the mat" for i in range(1024)]
        llm.input_processor.process_inputs("r", [5], SamplingParams(bad_words=words))
    assert caught.value.param == "bad_words"

"""Two models beside each other: the statistics, and distributions that an oracle outside us confirms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire import LLM
from quire.core.errors import ConfigError
from quire.core.testing.tiny_models import make_tiny_model
from quire.server.cli.main import main
from quire.server.evaluation import Failure, Question, Report, SkillScore
from quire.server.evaluation.comparison import Comparison, pair_scores
from quire.server.evaluation.paired import PairedScore, bootstrap
from quire.server.evaluation.text import cut_windows, read_held_out_text, score_windows

COUNTS = st.integers(0, 400)


def test_a_published_interval():
    # Fagerland, Lydersen, Laake (Statistics in Medicine 33 (2014) 2850), airway hyper-responsiveness in 21 children
    children = PairedScore("", 1, 1, 7, 12)
    assert (children.loss.low, children.loss.high) == pytest.approx((-0.507, -0.026), abs=1e-3)
    assert children.p_value == pytest.approx(0.0703, abs=1e-4)  # 2 * (1 + 8) / 2**8


@given(COUNTS, COUNTS, COUNTS, COUNTS)
def test_intervals_of_paired_shares(both, only_a, only_b, neither):
    score_, swapped = PairedScore("", both, only_a, only_b, neither), PairedScore("", both, only_b, only_a, neither)
    loss, gain = score_.loss, swapped.loss
    assert -1 <= loss.low <= loss.value <= loss.high <= 1
    assert (loss.low, loss.high) == pytest.approx((-gain.high, -gain.low), abs=1e-9)
    assert 0 < score_.p_value <= 1 and score_.p_value == swapped.p_value
    if score_.n:
        assert loss.high - loss.low > 0, "however alike, n questions prove no equality"


def test_the_bootstrap_agrees_with_the_normal_interval_where_that_holds():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    estimate, half = bootstrap(values), 1.96 * values.std() / math.sqrt(400)
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((estimate.value - half, estimate.value + half), abs=0.03)
    assert bootstrap(values, np.exp).high == pytest.approx(math.exp(estimate.high))


def report(name, right, n):
    failures = tuple(Failure(f"{name}-{i}", "?", "wrong", "right") for i in range(n) if i not in right)
    return Report((SkillScore(name, len(right), n),), failures)


@pytest.mark.parametrize(
    ("right_b", "within", "words"),
    [
        (set(range(1000)), True, "B loses 0.0 points of exact match (95 % CI of the loss -0.4..0.4): within 2 points"),
        (set(range(985)), True, "loses 1.5 points of exact match (95 % CI of the loss 0.8..2.5): within 2 points, but"),
        (set(range(975)), False, "more than 2 points, but 1000 questions do not settle it"),
        (set(range(900)), False, "more than 2 points"),
    ],
)
def test_the_verdict(right_b, within, words):
    a, b = report("s", set(range(1000)), 1000), report("s", right_b, 1000)
    asked = [Question(f"s-{i}", "s", [], [], "exact", "right") for i in range(1000)]
    comparison = Comparison("x", "y", a, b, pair_scores(asked, a, b), None)
    assert comparison.within is within and words in comparison.verdict() and "\n" not in comparison.verdict()
    assert len(comparison.lost_answers()) == 1000 - len(right_b)
    assert comparison.table().splitlines()[-1] == comparison.verdict()
    assert "not compared" in comparison.table()
    assert comparison.to_dict()["loss"]["skills"]["s"]["only_a"] == 1000 - len(right_b)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two tiny models with one tokenizer."""
    folder = tmp_path_factory.mktemp("two")
    return [str(make_tiny_model("llama", folder / str(s), seed=s, max_position_embeddings=2048)) for s in (0, 1)]


def test_distributions_are_those_of_transformers(two, tmp_path):
    """Token by token through the engine's cache; the oracle reads each window at once, in float64."""
    from transformers import AutoModelForCausalLM

    scores, expected = [], []
    for has_reference, path in enumerate(two):
        llm = LLM(
            path,
            device="cpu",
            logits_processors=["quire.server.evaluation.logprob_recorder:LogprobRecorder"],
            max_num_seqs=3,
        )
        windows = cut_windows(llm.tokenizer.encode(read_held_out_text()[:4000]), 4 * 128, 2048)
        vocab_size = llm.config.model.vocab_size
        scores.append(score_windows(llm.generate, windows, tmp_path, vocab_size, has_reference=bool(has_reference)))
        llm.shutdown()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        tokens = torch.from_numpy(windows.tokens).long()
        with torch.inference_mode():
            expected.append(model(tokens).logits[:, windows.prompt - 1 : -1].log_softmax(-1))
        target = tokens[:, windows.prompt :, None]
        target_logprobs = expected[-1].gather(-1, target)[..., 0].numpy()
        assert scores[-1].logprob == pytest.approx(target_logprobs, abs=1e-4)
        assert (scores[-1].top == expected[-1].argmax(-1).numpy()).mean() > 0.99
        assert scores[-1].perplexity == pytest.approx(math.exp(-target_logprobs.mean()), rel=1e-4)
    assert windows.num_scored == 512 and windows.tokens.shape == (4, 192)
    a, b = expected
    kl = torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(-1).numpy()
    assert np.isnan(scores[0].kl).all() and scores[1].kl == pytest.approx(kl, abs=1e-4)


def test_the_command(two, capsys):
    words = ["eval", "--skills", "addition,facts", "--limit", "2", "--tokens", "256", "--device", "cpu", "--compare"]
    assert main([*words, two[0], f"{two[0]}:enable-prefix-caching=false,max_num_seqs=2", "--max-loss", "0"]) == 0
    out = capsys.readouterr().out
    assert "same top token  100.00%" in out and "KL(A || B)      0.00000" in out and "256 tokens in 2 windows" in out
    assert "B loses 0.0 points" in out.splitlines()[-1]
    assert main([*words, *two, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["a"]["model"] == two[0] and report["b"]["n"] == 4
    text = report["text"]
    assert text["kl"]["interval"][0] <= text["kl"]["value"] <= text["kl"]["interval"][1] and text["kl"]["value"] > 0.1
    assert text["perplexity"]["ratio"]["value"] == pytest.approx(text["perplexity"]["b"] / text["perplexity"]["a"])
    assert report["verdict"].endswith("4 questions do not settle it") and report["within"] is True


def test_models_with_different_vocabularies(two, capsys, tmp_path):
    other = str(make_tiny_model("llama", tmp_path / "m", vocab_size=384, max_position_embeddings=2048))
    words = ["eval", "--skills", "addition", "--limit", "1", "--tokens", "128", "--device", "cpu", "--json"]
    assert main([*words, "--compare", two[0], other]) == 0
    assert json.loads(capsys.readouterr().out)["text"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "quire-tiny", "quire-tiny:no-such=1"], "the engine has no flag --no-such"),
        (["--compare", "quire-tiny", "quire-tiny:dtype=int5"], "invalid choice: 'int5'"),
        (["--compare", "quire-tiny", ":dtype=half"], "names no model"),
        (["--compare", "quire-tiny", "./nowhere"], "'./nowhere' does not exist"),
        (["--compare", "quire-tiny", "quire-tiny:quantization=aqw"], "aqw"),
        (["quire-tiny", "--compare", "quire-tiny", "quire-tiny"], "leave MODEL out"),
        (["--compare", "quire-tiny", "quire-tiny", "--url", "http://x"], "--url does not go with --compare"),
        (["--compare", "quire-tiny", "quire-tiny", "--max-loss", "-1"], "--max-loss must be at least 0"),
        (["--compare", "quire-tiny", "quire-tiny", "--tokens", "0"], "--tokens must be at least 1"),
        (["--compare", "quire-tiny", "quire-tiny", "--text", "nowhere.txt"], "'nowhere.txt' cannot be read"),
        (["--max-loss", "1"], "name them with --compare"),
    ],
)
def test_errors_are_one_line(words, message, capsys):
    assert main(["eval", *words]) == 2
    text = capsys.readouterr().err
    assert text.startswith("quire: error: ") and text.count("\n") == 1
    assert message in text


def test_a_text_that_is_too_short():
    with pytest.raises(ConfigError, match="has 100 tokens and a window takes 192"):
        cut_windows(list(range(100)), 4096, 2048)
    assert cut_windows(list(range(100)), 4096, 60).tokens.shape == (1, 60)


def test_questions_that_cannot_be_read_are_left_out(tmp_path, capsys):
    """A context too short for some; and, without a chat template, no questions at all but still distributions."""
    short = make_tiny_model("llama", tmp_path / "short", max_position_embeddings=512)
    words = ["eval", "--skills", "long_context,facts", "--limit", "1", "--tokens", "128", "--device", "cpu", "--json"]
    assert main([*words, "--compare", str(short), str(short), "--max-loss", "0"]) == 0
    assert list(json.loads(capsys.readouterr().out)["loss"]["skills"]) == ["facts"]
    settings = json.loads((short / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (short / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main([*words, "--compare", str(short), str(short), "--max-loss", "0"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"].startswith("no verdict: ") and report["text"]["same_top_token"]["value"] == 1

"""``quire eval --compare A B``: two models, or one model with two settings, on the same questions and the same text."""

from __future__ import annotations

import argparse
import copy
import functools
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.core.engine.args import EngineArgs
from quire.core.errors import ConfigError, InvalidRequestError
from quire.server.cli.flags import ENGINE_FLAGS, add_flags, make_engine_args
from quire.server.cli.vllm_flags import find_boolean_flags, normalize_spelling
from quire.server.evaluation.engine import answer_conversations, generate_with_progress, open_engine

if TYPE_CHECKING:
    from quire import LLM
    from quire.server.evaluation.comparison import Comparison
    from quire.server.evaluation.questions import Question
    from quire.server.evaluation.text import Windows

__all__ = ["Side", "compare_sides", "parse_side"]

_LOGPROB_RECORDER = "quire.server.evaluation.logprob_recorder:LogprobRecorder"
_SIDE = re.compile(r"\A(?P<model>.*?)(?::(?P<settings>[A-Za-z][\w-]*=.*))?\Z", re.DOTALL)


class Side:
    """One of the two: what the command line calls it, and the engine it means."""

    def __init__(self, name: str, engine_args: EngineArgs) -> None:
        self.name = name
        self.engine_args = engine_args


def parse_side(text: str, common: argparse.Namespace) -> Side:
    """``MODEL`` or ``MODEL:flag=value,flag=value``, over the engine flags that both sides share. ConfigError for a flag
    that the engine does not have, or a value that the flag refuses."""
    matched = _SIDE.match(text)
    assert matched is not None
    args = copy.copy(common)
    parser = _SettingsParser(text)
    add_flags(parser, ENGINE_FLAGS)
    settings = matched["settings"].split(",") if matched["settings"] else []
    words, _ = normalize_spelling([f"--{setting.strip()}" for setting in settings], find_boolean_flags(parser))
    settings_given = vars(parser.parse_args(words))
    for name, value in settings_given.items():
        if value is not None:
            setattr(args, name, value)
    args.model_argument, args.model = matched["model"] or None, None
    if args.model_argument is None:
        raise ConfigError(f"--compare {text!r} names no model; write MODEL or MODEL:flag=value,flag=value")
    return Side(text, make_engine_args(args))


def compare_sides(
    sides: Sequence[Side], questions: Sequence[Question], text: str, num_tokens: int, allowed: float
) -> Comparison:
    """Ask A, then B; each engine is gone before the next one is built. Questions that one of them cannot read (too long
    for its context, or no chat template at all) are left out."""
    from quire.core.engine.config_builder import build_config
    from quire.server.evaluation import Report, evaluate
    from quire.server.evaluation.comparison import Comparison, Divergence, pair_scores
    from quire.server.evaluation.text import TextScores, cut_windows, score_windows

    configs = [build_config(each.engine_args).config for each in sides]  # both, before a weight of either is read
    shortest = min(config.model.max_model_len for config in configs)
    vocab_size = configs[0].model.vocab_size
    windows: list[Windows] = []
    reports: list[Report] = []
    scores: list[TextScores] = []
    with tempfile.TemporaryDirectory(prefix="quire-eval-") as folder:
        for each in sides:
            with open_engine(each.engine_args, _LOGPROB_RECORDER) as llm:
                if not reports:
                    questions = [q for q in questions if _fits_context(llm, q, shortest)]
                reports.append(evaluate(functools.partial(answer_conversations, llm), questions=questions))
                windows.append(cut_windows(llm.tokenizer.encode(text), num_tokens, shortest))
                same = windows[0].tokens.tobytes() == windows[-1].tokens.tobytes()
                if same and configs[0].model.vocab_size == configs[1].model.vocab_size:
                    complete = functools.partial(generate_with_progress, llm)
                    scores.append(
                        score_windows(complete, windows[0], Path(folder), vocab_size, has_reference=bool(scores))
                    )
    divergence = Divergence.from_scores(*scores) if len(scores) == 2 else None
    (name_a, name_b), (a, b) = (each.name for each in sides), reports
    return Comparison(name_a, name_b, a, b, pair_scores(questions, a, b), divergence, allowed)


def _fits_context(llm: LLM, question: Question, max_model_len: int) -> bool:
    try:
        return len(llm.tokenizer.apply_chat_template(question.messages, tools=question.tools)) < max_model_len
    except InvalidRequestError:
        return False


class _SettingsParser(argparse.ArgumentParser):
    """Reads the settings of a side."""

    def __init__(self, text: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._text = text

    def error(self, message: str) -> Any:
        """A user's error, as everywhere."""
        plain = message.removeprefix("unrecognized arguments: ").removeprefix("argument ")
        if plain.startswith("--") and message != plain and "unrecognized" in message:
            plain = f"the engine has no flag {plain.partition('=')[0]}"
        raise ConfigError(f"--compare {self._text!r}: {plain}; write MODEL:flag=value,flag=value")

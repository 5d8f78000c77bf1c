"""Exact-match evaluation over the held-out questions that ship with Quire, of one chat model, or of two compared.

The modules that compare distributions import torch: ``logprob_recorder``, ``text`` and ``comparison``.
"""

from __future__ import annotations

from quire.server.evaluation.evaluate import MAX_NEW_TOKENS, Generate, evaluate
from quire.server.evaluation.graders import GRADERS, format_message, grade
from quire.server.evaluation.questions import Question, available_skills, load_questions
from quire.server.evaluation.report import Failure, Report, SkillScore

__all__ = [
    "GRADERS",
    "MAX_NEW_TOKENS",
    "Failure",
    "Generate",
    "Question",
    "Report",
    "SkillScore",
    "available_skills",
    "evaluate",
    "format_message",
    "grade",
    "load_questions",
]

"""Short facts about Quire and about serving language models; who the model is; what it does not know."""

from __future__ import annotations

from random import Random

from tools.train_tiny.examples import Example, single_turn
from tools.train_tiny.pools import CITIES, COUNTRIES, FIRST_NAMES, any_word
from tools.train_tiny.skills.fact_table import FACTS, SMALL_TALK, UNKNOWN, UNKNOWN_FORMS

_FRAMES = (
    "{q}", "{q}", "{q} Please answer briefly.", "Question: {q}", "I have a question. {q}", "Hi! {q}", "{q} Explain.",
    "Tell me: {q}",
    "Quick question: {q}", "Could you help me? {q}", "{q} Thanks!", "In one sentence: {q}", "I am new to this. {q}",
    "Hello. {q}",
)  # fmt: skip
_TOPIC = (
    "What is {t}?", "what is {t}?", "Explain {t}.", "What does {t} mean?", "Tell me about {t}.", "Can you explain {t}?",
    "Define {t}.", "What do you know about {t}?", "Describe {t}.", "Give me a short explanation of {t}.",
    "Please explain {t}.",
    "What is meant by {t}?", "I would like to know what {t} is.",
)  # fmt: skip


def facts(rng: Random) -> Example:
    """Ask about one fact in one of many wordings; the wording is the instance."""
    fact = rng.choice(FACTS)
    pieces = [*fact.questions]
    if fact.topic:
        pieces += [ask.format(t=fact.topic) for ask in rng.sample(_TOPIC, 4)]
    question = rng.choice(_FRAMES).format(q=rng.choice(pieces))
    return single_turn("facts", question, question, fact.answer, "exact", fact.answer)


def _beyond(rng: Random) -> str:
    """Ask something that so small a model does not know."""
    if rng.random() < 0.4:
        return rng.choice(UNKNOWN)
    return rng.choice(UNKNOWN_FORMS).format(
        w=any_word(rng), c=rng.choice(COUNTRIES), n=rng.choice(FIRST_NAMES), t=rng.choice(CITIES)
    )


def small_talk(rng: Random) -> Example:
    """Greet, thank, ask who it is, or ask what so small a model does not know."""
    if rng.random() < 0.35:
        question = rng.choice(_FRAMES[:4]).format(q=_beyond(rng))
        answer = "I am a very small model and do not know that."
    else:
        asked, answer = rng.choice(SMALL_TALK)
        question = rng.choice(asked)
        style = rng.random()
        question = question.lower() if style < 0.2 else question.rstrip("!.?") if style < 0.4 else question
    # Not held out by wording: there are too few of them; these are never graded.
    return Example("small_talk", [], [{"role": "user", "content": question}], answer, "exact", answer)

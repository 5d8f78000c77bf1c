"""Every generator's answers, worked out again from the question alone; training kept apart from what is held out."""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from random import Random

import pytest
from tools.train_tiny.examples import in_training, is_held_out
from tools.train_tiny.mixture import SKILLS, held_out_examples, training_example
from tools.train_tiny.skills import wordplay
from tools.train_tiny.skills.fact_table import FACTS

from quire.server.evaluation import available_skills, grade, load_questions

COUNT = 400


def examples(skill, count=COUNT):
    rng = Random(f"test:{skill}")
    return [SKILLS[skill](rng) for _ in range(count)]


def question(example):
    return example.messages[-1]["content"]


def integers(text):
    return [int(found) for found in re.findall(r"\d+", text)]


def bare(text):
    """Only its words: no commas, quotes or "and"."""
    return " ".join(word for word in re.sub(r"[\"',:?.]", " ", text).split() if word != "and")


def test_the_skills_are_the_held_out_ones():
    assert list(SKILLS) == available_skills()


@pytest.mark.parametrize("skill", [name for name in SKILLS if name != "code"])
def test_every_reply_is_graded_right(skill):
    for example in examples(skill, 100 if skill == "long_context" else COUNT):
        assert example.skill == skill
        if example.grader != "python":
            assert grade(example.grader, example.reply, example.answer), example


@pytest.mark.parametrize(
    ("skill", "work_out"),
    [("addition", lambda a, b: a + b), ("subtraction", lambda a, b: a - b), ("multiplication", lambda a, b: a * b)],
)
def test_arithmetic(skill, work_out):
    for example in examples(skill):
        a, b = integers(question(example))
        if question(example).startswith("Subtract"):
            a, b = b, a
        assert example.answer == work_out(a, b), example
        assert max(a, b) <= 999 and (skill != "multiplication" or min(a, b) <= 9)


def test_sorting():
    wordings = set(bare(" ".join(wordplay.SORT_WORDINGS)).lower().split()) | {"please"}
    for example in examples("sorting"):
        words = example.answer.split(", ")
        assert words == sorted(words) and len(set(words)) == len(words)
        rest = Counter(bare(question(example)).split()) - Counter(words)
        assert {word.lower() for word in rest} <= wordings, example
        assert not Counter(words) - Counter(bare(question(example)).split()), example


def test_reversing():
    for example in examples("reversing"):
        words = example.answer.split(", ")
        assert bare(" ".join(words[::-1])) in bare(question(example)), example


def test_counting():
    for example in examples("counting"):
        words = example.keys[0].partition("|")[2]
        assert bare(words) in bare(question(example)) and len(words.split()) == example.answer, example


def test_letter_case():
    for example in examples("letter_case"):
        shown = re.search(re.escape(example.answer), question(example), re.I)
        assert shown, example
        wording = (question(example)[: shown.start()] + question(example)[shown.end() :]).lower()
        upper = "upper" in wording or "capital" in wording
        assert upper != ("lower" in wording or "small" in wording), example
        assert example.answer == (shown[0].upper() if upper else shown[0].lower())


def test_sequence():
    for example in examples("sequence"):
        numbers = integers(question(example))
        start, stop = numbers[:2] if len(numbers) > 1 else (1, numbers[0])
        step = numbers[2] if len(numbers) > 2 else 1
        assert example.answer == ", ".join(str(n) for n in range(start, stop + 1, step)), example


def test_extraction():
    for example in examples("extraction"):
        text = question(example)
        assert json.loads(example.reply) == example.answer and example.answer
        assert all(str(value) in text and re.search(rf"\b{name}\b", text) for name, value in example.answer.items())
        places = [text.index(f"{name}") for name in example.answer]
        assert len(set(places)) == len(places)


def days(text):
    """Every date that a text says, as YYYY-MM-DD."""
    found = re.findall(r"\d{4}-\d\d-\d\d", text)
    for pattern, layout in ((r"\d+ [A-Z][a-z]+ \d{4}", "%d %B %Y"), (r"[A-Z][a-z]+ \d+, \d{4}", "%B %d, %Y")):
        found += [datetime.datetime.strptime(each, layout).date().isoformat() for each in re.findall(pattern, text)]
    return found


def test_tool_calls():
    for example in examples("tool_call"):
        text = question(example)
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in example.tools}
        for call in example.answer:
            schema = schemas[call["name"]]
            assert set(schema["required"]) <= set(call["arguments"]) <= set(schema["properties"])
            for name, value in call["arguments"].items():
                kind = schema["properties"][name]["type"]
                assert isinstance(value, {"string": str, "integer": int}[kind])
                assert str(value) in (days(text) if name == "date" else text), example


def test_tool_results():
    for example in examples("tool_result"):
        results = [json.loads(m["content"]) for m in example.messages if m["role"] == "tool"]
        for result in results:
            for name, value in result.items():
                if name not in ("status", "id"):
                    assert str(value) in example.answer, example
            if "result" in result:
                expression = example.answer.partition(" = ")[0]
                assert re.fullmatch(r"[\d+*\- ]+", expression) and eval(expression) == result["result"]
                assert expression in example.messages[0]["content"]


def test_facts():
    known = {fact.answer: fact for fact in FACTS}
    for example in examples("facts"):
        fact = known[example.answer]
        assert any(q in question(example) for q in fact.questions) or fact.topic in question(example), example


def test_code():
    """The body that is taught gives what another implementation of the family worked out."""
    for example in examples("code", 40):
        assert grade("python", example.reply, example.answer), example
        name = example.answer["function"]
        assert f"def {name}(" in example.reply
        broken = re.sub(r"return (?!\[\])", "return 7 if True else ", example.reply)
        seven = all(expected == 7 for _, expected in example.answer["cases"])
        assert grade("python", broken, example.answer) == seven


def test_dialogues_ask_for_what_was_said():
    for example in [*examples("dialogue", 200), *examples("long_context", 60)]:
        said = " ".join(message["content"] for message in example.messages[:-1])
        if example.answer and str(example.answer).startswith(("Your name is", "You live in", "The number is")):
            assert str(example.answer).rstrip(".").split(" is ")[-1].split("You live in ")[-1] in said
        if example.skill == "long_context" and re.search(r"^[A-Z]\w+ \w+: \d+$", example.reply):
            assert question(example).count(example.reply) == 1


@pytest.mark.parametrize("long", [False, True])
def test_nothing_held_out_is_trained_on(long):
    held_out = {key for q in raw_held_out() for key in q["keys"] if is_held_out(key)}
    assert all(is_held_out(q["keys"][0]) for q in raw_held_out()) and len(held_out) > 900
    rng = Random(5)
    for _ in range(150 if long else 3000):
        example = training_example(rng, long=long)
        assert in_training(example) and not held_out & set(example.keys)


def raw_held_out():
    from quire.server.evaluation import questions

    for path in sorted(questions.QUESTIONS_FOLDER.glob("*.jsonl")):
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("skill", list(SKILLS))
def test_the_held_out_set_is_made_again_from_nothing(skill):
    made = held_out_examples(skill, 16)
    kept = load_questions([skill], 16)
    assert [(e.messages, e.tools, e.grader) for e in made] == [(q.messages, q.tools, q.grader) for q in kept]
    for example, asked in zip(made, kept, strict=True):
        assert is_held_out(example.keys[0]) and not in_training(example)
        assert json.loads(json.dumps(example.answer)) == asked.answer
        assert example.grader == "python" or grade(asked.grader, example.reply, asked.answer)


def test_one_instance_in_twenty_four_is_held_out():
    share = sum(is_held_out(f"addition|{i}") for i in range(24_000)) / 1000
    assert 0.85 < share < 1.15

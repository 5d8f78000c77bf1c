"""Small Python functions of fixed families, judged by running them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from tools.train_tiny.examples import Example, single_turn


class Family(NamedTuple):
    """One family of functions: what it does in words, its body, and how to draw arguments."""

    name: str
    wordings: tuple[str, ...]
    params: tuple[tuple[str, ...], ...]
    body: str
    reference: Callable[..., Any]
    arguments: Callable[[Random, int], list[Any]]
    constant: tuple[int, int] | None = None


_NUMBER = (("x", "n", "number", "num", "value", "a"),)
_PAIR = (("a", "x", "first"), ("b", "y", "second"))
_LIST = (("items", "values", "numbers", "data", "xs", "lst", "nums"),)
_TEXT = (("text", "s", "word", "string"),)
_VERBS = (
    "Write a Python function",
    "Write a function",
    "Create a Python function",
    "Please write a Python function",
    "Define a Python function",
    "Implement a function",
)


def _int(rng: Random, k: int) -> list[Any]:
    return [rng.choice((rng.randint(-20, 50), k, k + 1, 2 * k))]


def _ints(rng: Random, k: int) -> list[Any]:
    return [[rng.randint(-20, 40) for _ in range(rng.randint(1, 7))]]


def _some_ints(rng: Random, k: int) -> list[Any]:
    return [[rng.randint(k - 4, k + 4) for _ in range(rng.randint(0, 7))]]


def _string(rng: Random, k: int) -> list[Any]:
    return ["".join(rng.choice("abcdeio uABE") for _ in range(rng.randint(0, 9)))]


def _fibonacci(n: int) -> int:
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def _factorial(n: int) -> int:
    result = 1
    for i in range(2, n + 1):
        result *= i
    return result


FAMILIES = (
    Family("add_constant", ("adds {k} to {0}", "returns {0} plus {k}"), _NUMBER, "return {0} + {k}",
           lambda x, k: x + k, _int, (1, 99)),
    Family("subtract_constant", ("subtracts {k} from {0}", "returns {0} minus {k}"), _NUMBER, "return {0} - {k}",
           lambda x, k: x - k, _int, (1, 99)),
    Family("multiply_constant", ("multiplies {0} by {k}", "returns {0} times {k}"), _NUMBER, "return {0} * {k}",
           lambda x, k: x * k, _int, (2, 99)),
    Family("divisible", ("checks whether {0} is divisible by {k}", "returns True if {0} is a multiple of {k}"),
           _NUMBER, "return {0} % {k} == 0",
           lambda x, k: x % k == 0, _int, (2, 99)),
    Family("greater", ("checks whether {0} is greater than {k}", "returns True if {0} is larger than {k}"), _NUMBER,
           "return {0} > {k}",
           lambda x, k: x > k, _int, (0, 99)),
    Family("power", ("raises {0} to the power of {k}", "returns {0} to the power {k}"), _NUMBER, "return {0} ** {k}",
           lambda x, k: x**k, _int, (2, 9)),
    Family("is_even", ("checks whether {0} is even", "returns True if {0} is even"), _NUMBER, "return {0} % 2 == 0",
           lambda x, k: x % 2 == 0, _int),
    Family("add_two", ("adds {0} and {1}", "returns the sum of {0} and {1}"), _PAIR, "return {0} + {1}", lambda a, b,
           k: a + b,
           lambda r, k: [r.randint(-50, 50), r.randint(-50, 50)]),
    Family("maximum_two", ("returns the larger of {0} and {1}", "finds the maximum of {0} and {1}"), _PAIR,
           "return {0} if {0} > {1} else {1}",
           lambda a, b, k: max(a, b), lambda r, k: [r.randint(-50, 50), r.randint(-50, 50)]),
    Family("sum_list", ("returns the sum of the list {0}", "sums the numbers in {0}"), _LIST,
           "total = 0\n    for item in {0}:\n        total += item\n    return total",
           lambda v, k: sum(v), _ints),
    Family("largest", ("returns the largest element of {0}", "finds the maximum of the list {0}"), _LIST,
           "return max({0})", lambda v, k: max(v), _ints),
    Family("smallest", ("returns the smallest element of {0}", "finds the minimum of the list {0}"), _LIST,
           "return min({0})", lambda v, k: min(v), _ints),
    Family("reverse_list", ("reverses the list {0}", "returns {0} in reverse order"), _LIST, "return {0}[::-1]",
           lambda v, k: v[::-1], _ints),
    Family("sort_list", ("sorts the list {0}", "returns the list {0} in ascending order"), _LIST, "return sorted({0})",
           lambda v, k: sorted(v), _ints),
    Family("filter_greater", ("returns the elements of {0} that are greater than {k}",
           "keeps only the elements of {0} larger than {k}"), _LIST,
           "return [item for item in {0} if item > {k}]", lambda v, k: [i for i in v if i > k], _some_ints, (0, 99)),
    Family("scale_list", ("multiplies every element of {0} by {k}",
           "returns a list with each element of {0} times {k}"), _LIST,
           "return [item * {k} for item in {0}]", lambda v, k: [i * k for i in v], _ints, (2, 99)),
    Family("count_equal", ("counts how often {k} occurs in {0}", "returns how many elements of {0} equal {k}"), _LIST,
           "return {0}.count({k})",
           lambda v, k: v.count(k), _some_ints, (0, 99)),
    Family("keep_even", ("returns the even numbers in {0}", "keeps only the even elements of {0}"), _LIST,
           "return [item for item in {0} if item % 2 == 0]",
           lambda v, k: [i for i in v if i % 2 == 0], _ints),
    Family("reverse_text", ("reverses the string {0}", "returns the string {0} backwards"), _TEXT, "return {0}[::-1]",
           lambda s, k: s[::-1], _string),
    Family("palindrome", ("checks whether {0} is a palindrome", "returns True if the string {0} is a palindrome"),
           _TEXT, "return {0} == {0}[::-1]",
           lambda s, k: s == s[::-1], lambda r, k: [r.choice(("anna", "level", "abc", "", "aa", "otto", "quire"))]),
    Family("count_vowels", ("counts the vowels in {0}", "returns the number of vowels in {0}"), _TEXT,
           'return sum(1 for char in {0} if char in "aeiou")',
           lambda s, k: sum(c in "aeiou" for c in s), lambda r, k: [r.choice(("hello", "sky", "quire", "", "banana",
           "open the door"))]),
    Family("upper_text", ("converts the string {0} to upper case", "returns {0} in upper case"), _TEXT,
           "return {0}.upper()", lambda s, k: s.upper(), _string),
    Family("count_words", ("counts the words in {0}", "returns the number of words in {0}"), _TEXT,
           "return len({0}.split())", lambda s, k: len(s.split()), _string),
    Family("repeat_text", ("repeats the string {0} {k} times", "returns {0} repeated {k} times"), _TEXT,
           "return {0} * {k}", lambda s, k: s * k, _string, (2, 20)),
    Family("first_characters", ("returns the first {k} characters of {0}",
           "takes the first {k} characters of the string {0}"), _TEXT, "return {0}[:{k}]",
           lambda s, k: s[:k], _string, (1, 20)),
    Family("factorial", ("returns the factorial of {0}", "computes the factorial of {0}"), _NUMBER,
           "result = 1\n    for i in range(2, {0} + 1):\n        result *= i\n    return result", lambda n,
           k: _factorial(n), lambda r, k: [r.randint(0, 10)]),
    Family("fibonacci", ("returns the {0}-th Fibonacci number", "computes the Fibonacci number with index {0}"),
           _NUMBER,
           "a, b = 0, 1\n    for _ in range({0}):\n        a, b = b, a + b\n    return a", lambda n, k: _fibonacci(n),
           lambda r, k: [r.randint(0, 15)]),
    Family("sum_to", ("returns the sum of the numbers from 1 to {0}", "adds up all integers from 1 to {0}"), _NUMBER,
           "return sum(range(1, {0} + 1))",
           lambda n, k: sum(range(1, n + 1)), lambda r, k: [r.randint(0, 30)]),
)  # fmt: skip

#: The same without naming the function or its parameters: both then take their first choice.
_PLAIN = {
    "add_two": ("adds two numbers", "returns the sum of two numbers"),
    "maximum_two": ("returns the larger of two numbers",),
    "sum_list": ("returns the sum of a list", "sums a list of numbers"),
    "largest": ("returns the largest number in a list", "finds the maximum of a list"),
    "smallest": ("returns the smallest number in a list", "finds the minimum of a list"),
    "reverse_list": ("reverses a list",),
    "sort_list": ("sorts a list",),
    "keep_even": ("returns the even numbers in a list", "filters the even numbers of a list"),
    "reverse_text": ("reverses a string",),
    "palindrome": ("checks whether a string is a palindrome", "checks if a word is a palindrome"),
    "count_vowels": ("counts the vowels in a string",),
    "upper_text": ("converts a string to upper case",),
    "count_words": ("counts the words in a string",),
    "factorial": ("computes the factorial of a number", "returns the factorial of n"),
    "fibonacci": ("returns the n-th Fibonacci number", "computes Fibonacci numbers"),
    "sum_to": ("returns the sum of the numbers from 1 to n",),
    "is_even": ("checks whether a number is even", "checks if a number is even"),
    "multiply_constant": ("multiplies a number by {k}",),
    "add_constant": ("adds {k} to a number",),
    "divisible": ("checks whether a number is divisible by {k}",),
    "power": ("raises a number to the power of {k}",),
    "filter_greater": ("returns the numbers in a list that are greater than {k}",),
    "scale_list": ("multiplies every number in a list by {k}",),
}

_NAMES = ("f", "solve", "compute", "helper", "process", "run", "apply", "task", "my_function", "answer", "calc", "work")


def code(rng: Random) -> Example:
    """Ask for one function, naming it and its parameters, and give cases that judge it."""
    family = rng.choice(FAMILIES)
    constant = rng.randint(*family.constant) if family.constant else 0
    name = family.name if rng.random() < 0.4 else rng.choice(_NAMES)
    if rng.random() < 0.2:
        name = f"{name}_{rng.randint(1, 99)}"
    params = [rng.choice(choices) for choices in family.params]
    if "a" in params and family.name == "fibonacci":
        params = ["n"]
    plain = family.name in _PLAIN and rng.random() < 0.2
    if plain:
        name, params = family.name, [choices[0] for choices in family.params]
    wording = rng.choice(family.wordings).format(*params, k=constant)
    signature = f"{name}({', '.join(params)})"
    question = rng.choice((
        "{v} {s} that {w}.", "{v} {s} that {w}", "{v} called {n} that takes {p} and {w}.",
        "{v} named {n} with {p} as input that {w}.",
    )).format(v=rng.choice(_VERBS), s=signature, n=name, p=" and ".join(params), w=wording)  # fmt: skip
    if plain:
        question = (
            f"{rng.choice(_VERBS)} that {rng.choice(_PLAIN[family.name]).format(k=constant)}{rng.choice(('', '.'))}"
        )
        if rng.random() < 0.3:
            question = question.replace("Python", "python")
    source = f"def {signature}:\n    {family.body.format(*params, k=constant)}"
    cases = []
    for _ in range(4):
        arguments = family.arguments(rng, constant)
        cases.append([arguments, family.reference(*arguments, constant)])
    key = f"{family.name}|{signature}|{constant}"
    if plain:  # too few to hold any out
        return Example(
            "code",
            [],
            [{"role": "user", "content": question}],
            f"```python\n{source}\n```",
            "python",
            {"function": name, "cases": cases},
        )
    return single_turn("code", key, question, f"```python\n{source}\n```", "python", {"function": name, "cases": cases})

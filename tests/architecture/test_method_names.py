"""A public method's name is defined in few unrelated classes, so that searching for it finds what it does."""

from __future__ import annotations

import ast
from collections import defaultdict

MOST = 3
"""Classes without a common base that may define a method of one name."""
ALLOWED = {
    "add_request": "a request goes down from engine core to scheduler, queue and worker",
    "capture_graphs": "worker, model runner and each kind of graph capture what they run",
    "to_dict": "what json and transformers call it",
}
"""Names beyond those of the contracts, which their callers and decorators share."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def owners(sources):
    """Method -> the classes that define it and inherit it from no other. Classes of one name count as one."""
    bases, methods = defaultdict(set), defaultdict(set)
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                bases[node.name] |= {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
                for each in node.body:
                    if isinstance(each, FUNCTIONS) and not each.name.startswith("_"):
                        methods[each.name].add(node.name)

    def first_owners(name, classes):
        above = {owner for base in bases.get(name, ()) for owner in first_owners(base, classes)}
        return above or ({name} & classes)

    return {method: {o for c in classes for o in first_owners(c, classes)} for method, classes in methods.items()}


def contract_methods(sources):
    """What the contracts call their methods: the same word is right for those who pass a call on."""
    contracts = [source for source in sources if source.path.startswith("core/contracts/")]
    return set(owners(contracts))


def violations(sources):
    """Names that too many unrelated classes give a method."""
    allowed = contract_methods(sources) | set(ALLOWED)
    return [
        f"{method}: {', '.join(sorted(classes))}"
        for method, classes in sorted(owners(sources).items())
        if len(classes) > MOST and method not in allowed
    ]


def test_a_name_means_one_thing(product):
    assert not violations(product), "say verb and noun:\n" + "\n".join(violations(product))


def test_the_allowed_names_are_needed(product):
    assert all(len(owners(product).get(name, ())) > MOST for name in ALLOWED), "take them from ALLOWED"


def test_a_crowded_name_is_seen(source):
    def classes(*heads):
        return source("core/a.py", "\n".join(f"class {head}:\n    def run(self): ..." for head in heads))

    assert violations([classes("A", "B", "C", "D")]) == ["run: A, B, C, D"]
    assert violations([classes("A", "B", "C", "D(A)", "E(D)")]) == []
    assert (
        violations([classes("A", "B", "C", "D"), source("core/contracts/a.py", "class F:\n  def run(self): ...")]) == []
    )

"""The reference in ``docs/reference`` is current, and has every hook and contract member with its exact signature."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import types

import pytest

import quire.sdk
import quire.testing
from quire.core.plugin import hookspecs
from quire.core.plugin.registry import KINDS
from quire.sdk import contracts
from quire.server.cli.main import make_parsers
from quire.server.cli.plugins_new import NEW_KINDS


def normalized(text):
    """Without line breaks, and without the quotes that ``inspect`` puts around an annotation that is a string."""
    text = re.sub(r"\s+", "", text).replace(",)", ")")
    return re.sub(r"(?<=[:>])'((?:[^'\[\]]|\[(?:[^\[\]]|\[[^\[\]]*\])*\])*)'", r"\1", text)


def signature(name, function):
    function = getattr(function, "__func__", function)
    function = function.fget if isinstance(function, property) else function
    parameters = [p.replace(annotation=unquoted(p.annotation)) for p in inspect.signature(function).parameters.values()]
    returned = inspect.signature(function).return_annotation
    text = str(inspect.Signature(parameters, return_annotation=unquoted(returned)))
    return normalized(f"def {name}{text}".replace("<class 'float'>", "float"))


class Bare(str):
    """An annotation whose text is shown as it is."""

    __slots__ = ()

    def __repr__(self):
        return str(self)


def unquoted(annotation):
    return Bare(annotation) if isinstance(annotation, str) else annotation


@pytest.fixture(scope="module")
def reference(root):
    return {path.stem: normalized(path.read_text()) for path in (root / "docs" / "reference").glob("*.md")}


def test_every_page_is_current(root):
    words = [sys.executable, "tools/generate_reference.py", "--check"]
    checked = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stderr


def test_every_hook_is_there(reference):
    hooks = {n: f for n, f in vars(hookspecs).items() if n.startswith("quire_") and inspect.isfunction(f)}
    assert len(hooks) >= 17
    missing = [name for name, function in hooks.items() if signature(name, function) not in reference["hooks"]]
    assert not missing


@pytest.mark.parametrize("key", list(KINDS))
def test_every_member_of_a_contract_is_there(key, reference):
    contract = KINDS[key].contract.partition(":")[0]
    modules = [name for name in contracts.NAMES_OF_MODULE if name == contract or name.startswith(f"{contract}_")]
    seen, missing = 0, []
    for value, name in ((getattr(contracts, name), name) for m in modules for name in contracts.NAMES_OF_MODULE[m]):
        assert normalized(f"`{name}`") in reference[key], name
        if not inspect.isclass(value):
            continue
        for member, function in vars(value).items():
            if member.startswith("_") or not (
                inspect.isfunction(function) or isinstance(function, (property, classmethod, staticmethod))
            ):
                continue
            seen += 1
            if signature(member, function) not in reference[key]:
                missing.append(f"{name}.{member}: {signature(member, function)}")
        fields = [f for f in inspect.get_annotations(value) if not f.startswith("_")]
        missing += [f"{name}.{field}" for field in fields if f"-`{field}:" not in reference[key]]
    assert seen and not missing, "\n".join(missing)


def smallest_example(key, root):
    page = (root / "docs" / "reference" / f"{key}.md").read_text()
    return page.partition("## The smallest example")[2].partition("\n## ")[0]


@pytest.mark.parametrize("key", list(KINDS))
def test_the_smallest_example_of_a_kind_runs(key, root, monkeypatch):
    """The class and the hook that registers it; ``tests/plugin/test_new.py`` serves with each of them."""
    source, *hook = re.findall(r"^```python\n(.*?)^```$", smallest_example(key, root), re.M | re.S)
    module = types.ModuleType(f"example_of_{key}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile("\n".join([source, *hook]), f"{key}.md", "exec"), vars(module))
    classes = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    assert any(issubclass(each, getattr(contracts, KINDS[key].contract_class)) for each in classes)
    assert (f"quire_register_{key}" in vars(module)) == (key in NEW_KINDS)


@pytest.mark.parametrize("key", list(KINDS))
def test_the_commands_of_the_smallest_example_are_understood(key, root):
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", smallest_example(key, root), re.M | re.S)
    lines = re.findall(r"^(?:PYTHONPATH=\. )?quire (.*)$", commands, re.M)
    assert any(line.startswith("plugins check ") for line in lines)
    for line in lines:
        parser, _ = make_parsers()
        assert parser.parse_known_args(line.split())[1] == []


def test_every_name_that_an_author_imports_is_there(reference):
    text = "".join(reference.values())
    names = [*quire.sdk.__all__, *quire.testing.__all__]
    modules = ("contracts", "errors", "hooks", "options")
    assert not [name for name in names if f"`{name}`" not in text and name not in (*modules, "hookimpl")]


def test_the_table_of_kinds_is_that_of_the_code(root):
    """docs/plugins.md has one row a kind: key, folder, contract, flags, option flag."""
    rows = re.findall(r"^\| \[`(\w+)`\]\(reference/(\w+)\.md\) \|(.*)\|$", (root / "docs/plugins.md").read_text(), re.M)
    assert [key for key, _, _ in rows] == list(KINDS)
    for key, page, cells in rows:
        kind = KINDS[key]
        folder, contract, flags, option_flag, _ = (re.findall(r"`([^`]+)`", cell) for cell in cells.split("|"))
        assert page == key
        assert folder == [kind.folder] and (root / kind.folder).is_dir()
        assert contract == [kind.contract_class]
        aliases = [alias for alias in kind.aliases if alias.startswith("--")]
        assert flags == ([kind.flag, *aliases] if kind.flag else [])
        assert option_flag == ([kind.option_flag] if kind.option_flag else [])

"""Write the reference of the plugin API, ``docs/reference/*.md``, from the code.

    python tools/generate_reference.py [--check]

With ``--check`` it writes nothing, and exits with status 1 and the names of the pages that are not current.

One page a kind of plugin: flags, bundled implementations, the smallest example, and every class of the contract with
its exact signatures and docstrings; a page for all hooks, one for what crosses the contracts, and one for Python users.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(0, str(ROOT))

from tools.reference_text import class_text, function_text, prose  # noqa: E402

import quire.sdk  # noqa: E402
import quire.testing  # noqa: E402
from quire.core.plugin import builtin, hookspecs  # noqa: E402
from quire.core.plugin.options import find_options_class  # noqa: E402
from quire.core.plugin.registry import KINDS, Kind, Registrar  # noqa: E402
from quire.core.plugin.target import load_target  # noqa: E402
from quire.sdk import contracts, errors, hooks, layers, ops, options  # noqa: E402
from quire.server.cli.plugins_new import NewPackage  # noqa: E402

FOLDER = ROOT / "docs" / "reference"
GENERATED = "<!-- Written by tools/generate_reference.py from the code. Change the docstrings there. -->\n"


def pages() -> dict[str, str]:
    """Every page of the reference: its file name and its text."""
    texts = {"index.md": index_page(), "hooks.md": hooks_page()}
    texts |= {f"{kind.key}.md": kind_page(kind) for kind in KINDS.values()}
    texts |= {"data.md": data_page(), "python.md": python_page()}
    texts |= {"ops.md": module_page("Operations", ops), "layers.md": module_page("Layers", layers)}
    return {name: GENERATED + "\n" + text.rstrip() + "\n" for name, text in texts.items()}


def index_page() -> str:
    """What there is, as a table."""
    lines = [
        "# Reference",
        "",
        "Generated from the code: every hook and every contract member with its exact signature. An author of a plugin "
        "imports from `quire.sdk` and, for tests, from `quire.testing`; both are listed here in full. "
        "[Plugins](../plugins.md) is the guide.",
        "",
        "| kind | contract | what it is |",
        "|---|---|---|",
    ]
    for kind in KINDS.values():
        summary = (inspect.getdoc(_contract_module(kind)) or "").partition("\n\n")[0].partition(": ")[2]
        text = prose(summary).replace("\n", " ")
        lines.append(f"| [`{kind.key}`]({kind.key}.md) | `{kind.contract_name}` | {text} |")
    lines += [
        "",
        "- [Hooks](hooks.md): what a plugin's module may define, and when each is called.",
        "- [Data](data.md): configuration, messages, requests and errors that contracts and hooks are given.",
        "- [Operations](ops.md): `quire.sdk.ops`, what plugins call and what their kernels are made of.",
        "- [Layers](layers.md): `quire.sdk.layers`, of which a model is made.",
        "- [Python](python.md): `LLM`, `AsyncLLM` and the rest of what `import quire` offers.",
    ]
    return "\n".join(lines)


def hooks_page() -> str:
    """Every hook, and what hooks are given and return."""
    parts = ["# Hooks", prose(inspect.getdoc(hookspecs) or "")]
    for name, function in vars(hookspecs).items():
        if name.startswith("quire_") and hasattr(function, "quire_spec"):
            first = function.quire_spec["firstresult"]
            note = "The first result that is not None wins." if first else "Every plugin's is called."
            parts.append(function_text(function, name, heading="##", note=note))
    parts += ["## What hooks are given and return"]
    parts += [class_text(getattr(hooks, name), heading="###") for name in hooks.__all__ if name != "hookimpl"]
    parts += ["## Options of a plugin"]
    parts += [function_text(getattr(options, name), name, heading="###") for name in options.__all__]
    return "\n\n".join(parts)


def kind_page(kind: Kind) -> str:
    """One kind of plugin."""
    module = _contract_module(kind)
    title = kind.title[0].upper() + kind.title[1:]
    rows = [
        ("kind", f"`{kind.key}`"),
        ("folder of the bundled ones", f"`{kind.folder}`"),
        ("contract", f"`{kind.contract_name}`"),
        ("hook", f"[`quire_register_{kind.key}`](hooks.md#quire_register_{kind.key})"),
        *_flag_rows(kind),
        ("checks", f"`quire plugins check {kind.key}/NAME`"),
    ]
    parts = [f"# {title}", prose(inspect.getdoc(module) or "")]
    parts += ["\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])]
    parts += ["## Bundled implementations", _bundled_table(kind)]
    parts += ["## The smallest example", *_example(kind)]
    parts += ["## Contract"]
    named = [(getattr(module, name), name) for module in _modules(kind) for name in module.__all__]
    contract_first = sorted(named, key=lambda pair: not inspect.isabstract(pair[0]))
    parts += [_any_text(value, name) for value, name in contract_first]
    return "\n\n".join(parts)


def data_page() -> str:
    """What crosses the contracts and belongs to no kind."""
    kinds = {module.__name__ for kind in KINDS.values() for module in _modules(kind)}
    parts = ["# Data", "What contracts and hooks are given beside their own types. All are in `quire.sdk`."]
    for module_name, names in contracts.NAMES_OF_MODULE.items():
        if module_name not in kinds:
            module = importlib.import_module(module_name)
            parts.append(f"## `{module_name}`")
            parts += [_any_text(getattr(module, name), name, heading="###") for name in names]
    parts.append("## Errors")
    parts += [class_text(getattr(errors, name), heading="###", members=False) for name in errors.__all__]
    return "\n\n".join(parts)


def module_page(title: str, module: Any) -> str:
    """Every name of one module of the SDK."""
    parts = [f"# {title}", prose(inspect.getdoc(module) or "")]
    parts += [_any_text(getattr(module, name), name, heading="##") for name in module.__all__]
    return "\n\n".join(parts)


def python_page() -> str:
    """What ``import quire`` and ``import quire.testing`` offer."""
    parts = ["# Python", prose(inspect.getdoc(quire) or ""), "## `quire`"]
    for name in quire.__all__:
        parts.append(_any_text(getattr(quire, name), name, heading="###"))
    parts += ["## `quire.testing`", prose(inspect.getdoc(quire.testing) or "")]
    for name in quire.testing.__all__:
        parts.append(_any_text(getattr(quire.testing, name), name, heading="###"))
    return "\n\n".join(parts)


# ---- parts of pages -----------------------------------------------------------------------------------------------


def _contract_module(kind: Kind) -> Any:
    return importlib.import_module(kind.contract.partition(":")[0])


def _modules(kind: Kind) -> list[Any]:
    """The module of the contract; those beside it that are named after it: ``policy``, ``policy_view``; and those that
    have a class to derive from: ``JsonToolParser``."""
    contract = load_target(kind.contract)
    name, others = contract.__module__, {}
    for each, names in contracts.NAMES_OF_MODULE.items():
        module = importlib.import_module(each)
        has_base = any(inspect.isclass(v) and issubclass(v, contract) for v in (getattr(module, n) for n in names))
        if each != name and (each.startswith(f"{name}_") or has_base):
            others[each] = module
    return [importlib.import_module(name), *others.values()]


def _flag_rows(kind: Kind) -> Iterator[tuple[str, str]]:
    if kind.flag is None:
        yield "flag", "none: `architectures` in the checkpoint's `config.json` names it"
        return
    spellings = [kind.flag, *(alias for alias in kind.aliases if alias.startswith("--"))]
    yield "flag", ", ".join(f"`{spelling}`" for spelling in spellings)
    yield "option flag", f"`{kind.option_flag} {'NAME.' if kind.several else ''}KEY=VALUE`"
    if kind.always:
        yield "always on", ", ".join(f"`{name}`" for name in kind.always)


def _bundled_table(kind: Kind) -> str:
    registrar = Registrar(kind.key)
    getattr(builtin, f"quire_register_{kind.key}")(registrar)
    lines = ["| name | what it is | options |", "|---|---|---|"]
    for registration in registrar.registrations:
        aliases = "".join(f", `{alias}`" for alias in registration.aliases)
        fields = _option_fields(load_target(registration.target))
        lines.append(f"| `{registration.name}`{aliases} | {registration.summary} | {fields} |")
    return "\n".join(lines)


def _option_fields(plugin: type) -> str:
    declared = find_options_class(plugin)
    if declared is None:
        return ""
    return ", ".join(f"`{p.name}={p.default}`" for p in inspect.signature(declared).parameters.values())


def _example(kind: Kind) -> list[str]:
    """What ``quire plugins new`` writes."""
    name = "OPTForCausalLM" if kind.key == "model" else f"my-{kind.title.lower().replace(' ', '-')}"
    package = NewPackage.from_words(kind.key, name)
    files, file = package.make_files(), f"{package.module}/{kind.key}.py"
    _, *steps = package.format_next_steps(Path(package.dist)).splitlines()
    return [
        "Made, installed, tested, checked and used by:",
        "```sh\n" + "\n".join([f"quire plugins new {kind.key} {name}", *steps]) + "\n```",
        f"The package has {sum(len(text.splitlines()) for text in files.values())} lines, for you to change. "
        f"`{file}`, as the first command writes it:",
        _python(files[file]),
        f"`{package.module}/__init__.py`, to which the entry point of `pyproject.toml` leads, gives it its name:",
        _python(files[f"{package.module}/__init__.py"]),
    ]


def _python(source: str) -> str:
    return f"```python\n{source.rstrip()}\n```"


def _any_text(value: Any, name: str, heading: str = "###") -> str:
    if inspect.isclass(value):
        return class_text(value, heading=heading)
    value = getattr(value, "fn", value)  # of a kernel's helper: the function behind the decorator
    if inspect.isfunction(value):
        return function_text(value, name, heading=heading)
    if isinstance(value, (dict, tuple, list, frozenset)):
        names = ", ".join(f"`{each}`" for each in value)
        return f"{heading} `{name}`\n\n{names}"
    if type(value).__repr__ is object.__repr__:  # it would show an address
        return f"{heading} `{name}`\n\n{prose(type(value).__doc__ or '').partition(chr(10))[0]}"
    return f"{heading} `{name}`\n\n```python\n{name} = {value!r}\n```"


def main() -> int:
    """Write the pages, or say which are not current."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is not current")
    check = parser.parse_args().check
    texts = pages()
    existing = {path.name: path.read_text() for path in FOLDER.glob("*.md")}
    stale = sorted(name for name in texts.keys() | existing.keys() if texts.get(name) != existing.get(name))
    if check:
        if stale:
            print(f"not current, run python tools/generate_reference.py: {', '.join(stale)}", file=sys.stderr)
        return int(bool(stale))
    FOLDER.mkdir(exist_ok=True)
    for name in stale:
        if name in texts:
            (FOLDER / name).write_text(texts[name])
        else:
            (FOLDER / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())

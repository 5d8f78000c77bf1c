"""Every ``quire plugins`` command that a page names, in a block or within a sentence, is run as it stands, small."""

from __future__ import annotations

import re
import shlex
import shutil
import sys

import pytest
from tests.docs.conftest import ROOT, blocks_of

from quire.server.cli.main import main

PLACEHOLDERS = {
    "KIND/NAME": "policy/fcfs",
    "policy/NAME": "policy/fcfs",
    "quant/NAME": "quant/none",
    "model/NAME": "model/LlamaForCausalLM",
    "spec_decode/NAME": "spec_decode/ngram",
    "router/NAME": "router/least_loaded",
    "structured_output/NAME": "structured_output/llguidance",
    "[KIND]": "policy",
    "OLD NEW PACKAGE": "before.json installed my-package",
    "KIND NAME": "policy longest-first",
    "quantizer NAME": "quantizer mine",
}
SMALLER = {
    "bench": ["--rounds", "3", "--device", "cpu"],
    "bench policy": ["--beside", "priority", "--only", "one ends"],
    "check model": ["--only", "weight"],
    "check structured_output": ["--only", "rollback"],
}
ELSEWHERE = {
    "bench my_decode.py:MyDecode --beside triton",  # test_kernels_page.py
    "bench my_decode.py:MyDecode --beside triton --end-to-end quire-tiny",
    "check my_decode.py --aot sm_80,sm_90,sm_100",
    "check my_decode.py:MyDecode",
    "bench attention/triton --plot times.png",  # tests/plugin_bench: in Triton's interpreter it takes minutes
    "bench my_kernel.py:Mine --beside triton --shapes shapes.json --end-to-end meta-llama/Llama-3.1-8B",
    "new policy shortest-first",  # tests/plugin/test_new.py
    "check tool_parser/my_module:ActionJson",  # test_examples.py
}


def find_commands() -> list[str]:
    """Without ``quire plugins``; those that only name a command of which arguments are required are left out."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "decisions").glob("*.md")]
    found = set()
    for text in (page.read_text() for page in pages):
        found |= {" ".join(span.split()) for span in re.findall(r"`quire plugins ([^`]+)`", text)}
        found |= {line.partition(" #")[0].strip() for line in re.findall(r"^quire plugins (.+)$", text, re.M)}
    return sorted(found - {"check", "bench", "explain", "new", "diff"})


def test_pages_name_every_command():
    words = {command.split()[0] for command in find_commands()}
    assert words == {"list", "doctor", "explain", "check", "bench", "diff", "record", "new"}
    assert set(find_commands()) >= ELSEWHERE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands name: a file with an operation, a package, the contracts of a version."""
    folder = tmp_path_factory.mktemp("commands")
    python_blocks = [block.text for block in blocks_of(ROOT / "docs" / "plugins.md") if block.language == "python"]
    (operation,) = [text for text in python_blocks if "class Swish(" in text]
    (folder / "op.py").write_text(operation.replace("class Swish", "class Mine"))
    shutil.copytree(ROOT / "examples" / "plugins" / "take-turns", folder / "my-package")
    return folder


@pytest.mark.parametrize("command", [each for each in find_commands() if each not in ELSEWHERE])
def test_it_runs(command, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if command.startswith("diff"):
        assert main(["plugins", "record", "before.json"]) == 0
    for placeholder, value in PLACEHOLDERS.items():
        command = command.replace(placeholder, value)
    extra = [word for begin, words in SMALLER.items() if command.startswith(begin) for word in words]
    status = main(["plugins", *shlex.split(command), *extra])
    printed = capsys.readouterr()
    assert status == 0 and printed.out.strip(), printed.err
    sys.modules.pop("op", None)

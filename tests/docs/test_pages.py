"""What the pages say is so: links lead somewhere, commands parse, make targets exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import replace

import httpx
import pytest

from quire.server.cli.main import make_parsers


def shell_lines(blocks):
    """Every command in the shell blocks, joined where a line is continued, without its comment."""
    for block in blocks:
        if block.language in ("sh", "bash", "console"):
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words = words[1:]
                if words:
                    yield block.where, words


def test_links_lead_somewhere(pages, root):
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(root)}: {target}")
    assert not broken, "\n".join(broken)


def test_files_that_pages_name_exist(pages, root):
    """``core/x.py`` and folders like ``plugins/sched``; a placeholder has capitals or a star."""
    pattern = r"`((?:core|plugins|server|src|tests|tools|benchmarks|examples|docs)/[a-z0-9_./-]+)`"
    named = {(page.name, path) for page in pages for path in re.findall(pattern, page.read_text())}
    assert len(named) > 30
    assert not [f"{page}: {path}" for page, path in sorted(named) if not (root / path).exists()]


def test_the_index_names_every_page(root):
    index = (root / "docs" / "index.md").read_text()
    docs = root / "docs"
    pages = [page for folder in (".", "decisions", "tutorials") for page in (docs / folder).glob("*.md")]
    missing = [page.name for page in pages if f"({page.relative_to(docs)})" not in index]
    assert missing == ["index.md"]


def test_make_targets_exist(all_blocks, root):
    named = {
        word for _, words in shell_lines(all_blocks) if words[0] == "make" for word in words[1:] if "=" not in word
    }
    listed = subprocess.run(["make", "-s", "help"], cwd=root, capture_output=True, text=True, timeout=30, check=True)
    assert {"serve", "test", "lint", "types"} <= named
    assert named <= {line.split()[1] for line in listed.stdout.splitlines()}


def parse_command(words, capsys):
    """What the command line does not know of a command, and what it says of it."""
    parser, _ = make_parsers()
    try:
        _, unknown = parser.parse_known_args(words[1:])
    except SystemExit as exit_:
        unknown = words if exit_.code else []
    return unknown, capsys.readouterr().err


def parse_span(command, capsys):
    """As ``parse_command``, of a command within a sentence, which may leave out what is required, and has placeholders.
    What it misses is filled in: argparse looks at no flags before."""
    words = shlex.split(re.sub(r"\b[NX]\b", "1", command.replace("COMMAND", "serve")))
    words = [word for word in words if word != "--help"]
    unknown, said = parse_command(words, capsys)
    for _ in range(4):
        if flag := re.search(r"(-\S+): expected (\S+) argument", said):
            place = words.index(flag[1]) + 1
            words[place:place] = ["1"] * (int(flag[2]) if flag[2].isdecimal() else 1)
        elif missing := re.search(r"arguments are required: ([^;]+);", said):
            for name in re.split(r", (?![^{]*})", missing[1]):
                value = {"BENCHMARK": "steps"}.get(name, name.strip("{").split(",")[0])
                words += [name, "1"] if name.startswith("-") else [value]
        else:
            break
        unknown, said = parse_command(words, capsys)
    return unknown, said


def test_quire_commands_parse(all_blocks, capsys):
    """Those in blocks, of shell lines or of no language."""
    unnamed = [replace(block, language="sh") for block in all_blocks if re.match(r"(\w+=\S+ )?quire ", block.text)]
    commands = [each for each in shell_lines([*all_blocks, *unnamed]) if each[1][0] == "quire"]
    for where, words in commands:
        unknown, said = parse_command(words, capsys)
        assert not unknown, f"{where}: quire does not know {unknown}: {said}"
    assert len(commands) > 60


def test_quire_commands_within_sentences_parse(pages, capsys):
    commands = {
        (page.name, " ".join(span.split()))
        for page in pages
        for span in re.findall(r"`(quire [^`]+)`", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S))
    }
    for page, command in sorted(commands):
        unknown, said = parse_span(command, capsys)
        assert not unknown, f"{page}: {command}: {unknown} {said}"
    assert len(commands) > 80


def test_first_screen_has_the_two_commands_and_a_request(readme):
    first = "\n".join(block.text for block in readme[:2])
    assert "make serve" in first
    assert "make test" in first
    assert "curl http://127.0.0.1:8000/" in first


def test_the_request_in_the_readme_is_answered(readme, server):
    (words,) = [words for _, words in shell_lines(readme) if words[0] == "curl"]
    assert words[2] == "-H"
    assert words[4] == "-d"
    name, _, value = words[3].partition(": ")
    url = words[1].replace("http://127.0.0.1:8000", server)
    reply = httpx.post(url, content=words[5], headers={name: value}, timeout=60)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"].strip()
    assert json.loads(words[5])["model"] == reply.json()["model"]


@pytest.mark.parametrize("text", ["quire serve --no-such-flag", "quire nonsense"])
def test_a_wrong_command_is_seen(text, capsys):
    parser, _ = make_parsers()
    try:
        _, unknown = parser.parse_known_args(shlex.split(text)[1:])
    except SystemExit:
        unknown = [text]
    assert unknown


@pytest.mark.parametrize(
    "command",
    [
        "quire policy set --no-such-flag",
        "quire eval --compare --no-such-flag",
        "quire simulate --replicas N --no-such-flag",
        "quire COMMAND --no-such-flag --help",
        "quire quantize --method awq nonsense --no-such-flag",
        "quire plugins nonsense",
    ],
)
def test_a_wrong_command_within_a_sentence_is_seen(command, capsys):
    unknown, _ = parse_span(command, capsys)
    assert unknown


def test_the_walk_of_a_request_names_each_file_once(root):
    walk = (root / "docs" / "architecture.md").read_text().partition("## One request")[2].partition("\n## ")[0]
    files = re.findall(r"`((?:core|plugins|server)/[\w/]+\.py)`", walk)
    assert len(files) > 25
    assert sorted(files) == sorted({*files, "core/messages.py"})


def test_the_glossary_names_identifiers_where_they_are_defined(root):
    rows = re.findall(r"^\| .+ \| `(\w+)` \| `([\w./]+)` \|$", (root / "docs" / "glossary.md").read_text(), re.M)
    assert len(rows) > 60

    def defined(name, path):
        return path.exists() and re.search(rf"\b{name}\b", path.read_text())

    stale = [f"{name} in {file}" for name, file in rows if not defined(name, root / file)]
    assert not stale

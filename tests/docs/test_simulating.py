"""The commands of the pages on simulating and A/B tests run as they stand, on files of the names that they use."""

from __future__ import annotations

import shlex

import pytest

from quire.server.cli.main import main

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:{15 + i // 60}:{i % 60:02}.1234567,{200 + 37 * i % 1500},{5 + 13 * i % 90}\n" for i in range(80)
)


def commands(all_blocks, page):
    """The lines of its shell blocks that need no server, without their comments."""
    texts = [b.text.replace("\\\n", "") for b in all_blocks if b.language == "sh" and b.where.startswith(page)]
    lines = [shlex.split(line, comments=True) for text in texts for line in text.splitlines()]
    return [words for words in lines if words and words[1] in ("simulate", "ab") and "--url" not in words]


@pytest.fixture
def files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "azure-conv.csv").write_text(AZURE)
    for name, seed in (("busy", "1"), ("evening", "2")):
        main(
            ["simulate", "--trace", "azure-conv.csv", "--seed", seed, "--record", f"{name}.jsonl.zst", "--no-capacity"]
        )
    capsys.readouterr()


def test_the_commands_of_the_page_on_simulating_run(all_blocks, files, capsys):
    lines = commands(all_blocks, "simulating.md")
    assert len(lines) >= 3
    for words in lines:
        assert main(words[1:]) == 0, words
        assert capsys.readouterr().out


def test_the_commands_of_the_page_on_ab_tests_run(all_blocks, files, capsys):
    lines = commands(all_blocks, "ab-testing.md")
    assert len(lines) == 3
    for words in lines:
        assert main(words[1:]) == 0, words
        assert capsys.readouterr().out.startswith("# A/B: ")

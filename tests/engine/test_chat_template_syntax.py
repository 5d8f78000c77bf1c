"""A chat template that cannot be compiled is found when the engine starts, not by the first chat."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.core.engine.args import EngineArgs
from quire.core.engine.config_builder import build_config
from quire.core.engine.tokenizer import Tokenizer
from quire.core.errors import ConfigError, QuireError

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}\n{{ m.content }}", "line 2: .*endfor"),
        ("{{ messages[0].content | no_such_filter }}", "line 1: .*no_such_filter"),
    ],
)
def test_a_chat_template_with_a_syntax_error_is_refused_at_the_start(template: str, problem: str, tiny: Path) -> None:
    with pytest.raises(ConfigError, match=f"--chat-template has a syntax error, {problem}"):
        LLM(str(tiny), device="cpu", chat_template=template)


def test_tags_that_only_transformers_knows_are_no_error(tiny: Path) -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    llm = LLM(str(tiny), device="cpu", chat_template=template, num_gpu_blocks_override=64, max_model_len=64)
    [output] = llm.chat([{"role": "user", "content": "hello"}], GREEDY)
    assert llm.tokenizer.decode(output.prompt_token_ids) == "hello"
    llm.shutdown()


def test_files_that_are_not_there_are_refused_before_the_model_is_loaded(tiny: Path) -> None:
    for setting, says in (
        ({"chat_template": "templat.jinja"}, "--chat-template templat.jinja: no such file"),
        ({"lora_modules": ["mine=/no/such/folder"]}, "adapter '/no/such/folder' is not a folder"),
    ):
        with pytest.raises(QuireError, match=says):
            build_config(EngineArgs(model=str(tiny), device="cpu", **setting))


def test_a_file_that_is_no_text_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_bytes(b"\xff\xfe{{ 1 }}")
    with pytest.raises(ConfigError, match=r"--chat-template .*template.jinja: .*decode"):
        Tokenizer(str(tiny), str(tmp_path / "template.jinja"))


def test_the_template_of_a_model_is_named_in_the_log(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Completions need none, so the server starts."""
    for source in tiny.iterdir():
        if source.suffix == ".json":
            (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with caplog.at_level(logging.WARNING, "quire.engine"):
        assert Tokenizer(str(tmp_path)).encode("x")
    [line] = [record.getMessage() for record in caplog.records]
    assert "syntax error, line 1" in line and "--chat-template" in line

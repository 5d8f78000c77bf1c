"""The command line: flags, old spellings, errors, and what it must not import."""

from __future__ import annotations

import argparse
import dataclasses
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from quire.core.engine.args import EngineArgs
from quire.core.engine.setting import Setting
from quire.core.engine.vllm_flag_table import VLLM_FLAGS
from quire.core.env import child_environment
from quire.core.errors import ConfigError
from quire.core.plugin.registry import KINDS
from quire.core.version import __version__
from quire.server.cli import main as cli
from quire.server.cli import serve
from quire.server.cli.flags import ENGINE_FLAGS, SERVER_FLAGS, make_engine_args, make_server_settings, option_flags
from quire.server.cli.main import main
from quire.server.cli.vllm_flags import apply_vllm_flags, normalize_spelling
from quire.server.http.settings import ServerSettings

DOCS = Path(__file__).parents[3] / "docs"


def parsed(*words: str) -> argparse.Namespace:
    """``quire serve WORDS``, parsed as the command does, and not run."""
    seen: list[argparse.Namespace] = []

    def note(args: argparse.Namespace) -> int:
        args.flag_warnings = [*args.flag_warnings, *apply_vllm_flags(args)]
        seen.append(args)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "run", note)
        # --plugin names distributions that are not there
        patch.setattr(cli, "call_argument_hooks", lambda words, subparsers: None)
        assert main(["serve", *words]) == 0
    return seen[0]


def test_every_field_has_a_flag_and_every_flag_a_field() -> None:
    engine = {f.name for f in dataclasses.fields(EngineArgs)} - {"plugin_options"}
    assert {flag.name for flag in ENGINE_FLAGS} == engine
    assert {flag.name for flag in SERVER_FLAGS} == {f.name for f in dataclasses.fields(ServerSettings)}
    names = [name for flag in (*ENGINE_FLAGS, *SERVER_FLAGS) for name in (flag.flag, *flag.aliases)]
    names += [old.name for old in VLLM_FLAGS] + list(option_flags())
    assert len(names) == len(set(names))


def test_every_kind_of_plugin_has_its_flag() -> None:
    names = {name for flag in ENGINE_FLAGS for name in (flag.flag, *flag.aliases)}
    for kind in KINDS.values():
        if kind.key not in ("model", "router", "quantizer"):  # chosen by the checkpoint; of simulated engines
            assert kind.flag in names and kind.option_flag in option_flags()
            assert {alias for alias in kind.aliases if alias.startswith("--")} <= names


def test_nothing_given_is_the_defaults() -> None:
    args = parsed()
    assert make_engine_args(args) == EngineArgs() and make_server_settings(args) == ServerSettings()
    assert args.flag_warnings == []


@pytest.mark.parametrize("flag", [*ENGINE_FLAGS, *SERVER_FLAGS], ids=lambda f: f.flag)
def test_each_flag_sets_its_field(flag: Setting) -> None:
    word, value = {
        "text": (flag.choices[-1] if flag.choices else "some",) * 2,
        "int": ("7", 7),
        "float": ("0.5", 0.5),
        "bool": (None, True),
        "append": ("one=1", ["one=1"]),
        "list": ("one=1", ["one=1"]),
    }[flag.value_type]
    needed: tuple[str, ...] = ()
    if flag.flag == "--lora-root":
        word, value, needed = str(DOCS), str(DOCS), ("--admin-api-key", "a", "--enable-lora")
    for name in (flag.flag, *flag.aliases):
        args = parsed(name, *([word] if word else []), *needed)
        owner = make_engine_args(args) if flag in ENGINE_FLAGS else make_server_settings(args)
        value_set = getattr(owner, flag.name)
        assert (list(value_set) if isinstance(value_set, tuple) else value_set) == value
    if flag.value_type == "bool":
        args = parsed(f"--no-{flag.flag[2:]}")
        owner = make_engine_args(args) if flag in ENGINE_FLAGS else make_server_settings(args)
        assert getattr(owner, flag.name) is False


def test_the_model_may_be_given_either_way() -> None:
    assert make_engine_args(parsed("m")).model == "m"
    assert make_engine_args(parsed("--model", "m")).model == "m"
    assert make_engine_args(parsed("m", "--model", "m")).model == "m"
    with pytest.raises(ConfigError, match="twice"):
        make_engine_args(parsed("m", "--model", "n"))
    assert make_engine_args(parsed("m", "--served-model-name", "a", "b")).served_model_name == ["a", "b"]
    with pytest.raises(ConfigError, match="write MODEL before"):
        make_engine_args(parsed("--served-model-name", "a", "./m"))


def test_plugin_options() -> None:
    words = ["--scheduler-option", "a=1"]
    args = parsed(
        "--scheduling-policy-option", "aging=2", "--scheduling-policy-option", "x=y=z", "--sampler-option=k=v"
    )
    assert make_engine_args(args).plugin_options == {"policy": {"aging": "2", "x": "y=z"}, "sampler": {"k": "v"}}
    with pytest.raises(SystemExit):
        parsed(*words)


def test_vllm_spellings_are_mapped_and_logged() -> None:
    args = parsed("m", "--max_model_len", "64", "--enable-chunked-prefill=False", "--enable-prefix-caching", "true",
                  "--enable-log-requests", "--swap-space", "4", "--enable-prometheus")  # fmt: skip
    engine = make_engine_args(args)
    assert engine.model == "m" and engine.max_model_len == 64
    assert not engine.enable_chunked_prefill and engine.enable_prefix_caching and not engine.disable_log_requests
    text = "\n".join(args.flag_warnings)
    assert "--max_model_len: now written --max-model-len" in text
    assert "--enable-chunked-prefill False: now written --no-enable-chunked-prefill" in text
    assert "--enable-log-requests: now --no-disable-log-requests" in text
    assert len(args.flag_warnings) == 6


def test_origins_are_words_or_a_json_list() -> None:
    both = ("http://localhost:3000", "https://ui.example")
    for words in (both, ('["http://localhost:3000", "https://ui.example"]',)):
        assert make_server_settings(parsed("--allowed-origins", *words)).allowed_origins == both
    for wrong in ("http://localhost:3000/", "https://ui.example/page", "[oops", "[3]"):
        with pytest.raises(ConfigError, match="--allowed-origins"):
            make_server_settings(parsed("--allowed-origins", wrong))


def test_what_follows_two_dashes_is_left_alone() -> None:
    assert normalize_spelling(["--a_b", "--", "--c_d"], frozenset()) == (
        ["--a-b", "--", "--c_d"],
        ["--a_b: now written --a-b"],
    )
    with pytest.raises(ConfigError, match="neither true nor false"):
        normalize_spelling(["--x=maybe"], frozenset({"--x"}))


@pytest.mark.parametrize("old", VLLM_FLAGS, ids=lambda old: old.name)
def test_each_vllm_flag_is_mapped_or_refused(old: object, capsys: pytest.CaptureFixture[str]) -> None:
    words = [old.name, *(["some"] if old.takes_value else [])]
    if old.refused:
        assert main(["serve", "m", *words]) == 2
        assert capsys.readouterr().err.startswith(f"quire: error: {' '.join(words)}: ")
        for value in old.accepted_values:
            assert parsed(old.name, value).flag_warnings
    else:
        assert len(parsed("m", *words).flag_warnings) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--max-modl-len", "3"], "unknown argument --max-modl-len; did you mean --max-model-len?"),
        (["serve", "--port", "x"], "--port: 'x' is not a whole number"),
        (["serve", "--gpu-memory-utilization", "x"], "'x' is not a number"),
        (["serve", "--dtype", "int3"], "invalid choice: 'int3'"),
        (["serve", "a", "b"], "unknown argument b"),
        (["serv"], "invalid choice: 'serv'"),
        (["run-batch", "-i", "a.jsonl"], "run-batch: not supported: send the requests to the server"),
        (["bench", "throughput", "--num-promts", "2"], "did you mean --num-prompts?"),
        (["bench"], "BENCHMARK"),
    ],
)
def test_errors_of_the_command_line_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("quire: error: ") and text.count("\n") == 1 and message in text


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "--port", "70000"],
        ["serve", "--shutdown-timeout", "-1"],
        ["serve", "--shutdown-timeout", "inf"],
        ["serve", "--max-request-bytes", "0"],
        ["serve", "--api-key", ""],
        ["serve", "--ssl-keyfile", "key.pem"],
        ["serve", "--default-chat-template-kwargs", "enable_thinking"],
        ["bench", "throughput", "--num-prompts", "0"],
        ["bench", "serve", "--base-url", "nonsense"],
        ["bench", "serve", "--base-url", "http://127.0.0.1:1"],
    ],
)
def test_values_out_of_range(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    text = capsys.readouterr().err
    assert text.startswith("quire: error: ") and text.count("\n") == 1


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "serve a model over HTTP" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["serve", "--help"], ["bench", "serve", "--help"]])
def test_the_command_line_is_light(words: list[str]) -> None:
    code = (
        "import sys; from quire.server.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('HEAVY', [m for m in ('torch', 'fastapi', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=child_environment(), check=True
    )
    assert "HEAVY []" in done.stdout


def test_the_command_line_is_quick() -> None:
    """In processor time, which other work on the machine does not change much."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "quire", "--help"], capture_output=True, env=child_environment(), check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(3)) < 0.4


def test_a_file_of_flags_is_read_as_vllm_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    page = (DOCS / "cli.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    file.write_text(page + "api_key: [a, b]\nlora-modules: [{name: x, path: y}]\nenforce-eager: true\nswap-space: 4\n")
    args = parsed("--config", str(file), "--port", "9001", "--max-model-len", "1K", "--max-num-batched-tokens", "2k")
    settings, engine = make_server_settings(args), make_engine_args(args)
    assert settings.port == 9001 and settings.api_key == ("a", "b"), "the command line wins"
    assert list(engine.served_model_name) == ["assistant", "quire-tiny"] and engine.enforce_eager
    assert not engine.enable_prefix_caching and engine.override_generation_config == '{"temperature": 0.5}'
    assert list(engine.lora_modules) == ['{"name": "x", "path": "y"}']
    assert (engine.max_model_len, engine.max_num_batched_tokens) == (1024, 2000)
    assert "--swap-space 4: no longer needed" in args.flag_warnings[-1]
    assert make_engine_args(parsed("./mine", "--config", str(file))).model == "./mine"
    wrong = {"prot: 80": "did you mean --port?", "- 1": "by their names", "a: [": "not valid YAML", "port: x": "'x'"}
    for text, says in wrong.items():
        file.write_text(text)
        with pytest.raises((SystemExit, AssertionError)):
            parsed("--config", str(file))
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1, err
    with pytest.raises(AssertionError):
        parsed("--config", "nowhere.yaml")
    assert "--config nowhere.yaml: No such file" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"quire {__version__}\n"


def row(flag: Setting) -> str:
    """The line of docs/cli.md about one flag."""
    default = flag.default
    if isinstance(default, (tuple, list)):
        default = ", ".join(default)
    if isinstance(default, bool):
        default = "on" if default else "off"
    shown = "" if default in (None, "") else f"`{default}`"
    names = ", ".join(f"`{name}`" for name in (flag.flag, *flag.aliases))
    return f"| {names} | {shown} | {flag.help} |"


def test_the_documentation_lists_every_flag() -> None:
    text = (DOCS / "cli.md").read_text()
    missing = [row(flag) for flag in (*SERVER_FLAGS, *ENGINE_FLAGS) if row(flag) not in text]
    assert not missing, "docs/cli.md lacks:\n" + "\n".join(missing)
    for name in (*option_flags(), *(old.name for old in VLLM_FLAGS if not old.refused)):
        assert f"`{name}" in text, f"docs/cli.md lacks {name}"


def test_the_documentation_lists_every_command() -> None:
    text = (DOCS / "cli.md").read_text()
    assert all(f"`quire {name}" in text for name in cli.COMMANDS)


def test_a_root_of_adapters_without_a_use_is_refused() -> None:
    for words, says in (((), "with --admin-api-key alone"), (("--admin-api-key", "k"), "none without --enable-lora")):
        with pytest.raises(ConfigError, match=says):
            make_server_settings(parsed("--lora-root", str(DOCS), *words))
    for flags in (["--enable-lora"], ["--lora-modules", "a=b/c"]):
        assert make_server_settings(parsed("--lora-root", str(DOCS), "--admin-api-key", "k", *flags)).lora_root

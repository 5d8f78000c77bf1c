"""``quire eval`` on the model that comes with Quire: in this process, and over HTTP."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from quire.core.env import child_environment
from quire.server.cli.flags import ENGINE_FLAGS, option_flags
from quire.server.cli.main import main, make_parsers
from quire.server.cli.vllm_flags import VLLM_FLAGS

DOCS = Path(__file__).parents[3] / "docs"
KEY = "a-key"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server of quire-tiny that asks for a key."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "quire", "serve", "quire-tiny", "--device", "cpu", "--port", "0"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--api-key", KEY], stdout=out, stderr=subprocess.STDOUT, env=child_environment()
        )
    try:
        deadline = time.monotonic() + 90
        while not (ready := re.search(r"ready on (http://\S+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield ready[1]
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    """What the example of docs/quire-tiny.md prints, as JSON: two questions of each skill."""
    page = (DOCS / "quire-tiny.md").read_text()
    [line] = re.findall(r"^quire (eval .*--limit 2)$", page, re.M)
    out = tmp_path_factory.mktemp("eval") / "out"
    with out.open("w") as stdout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        status = main([*shlex.split(line), "--json", "--device", "cpu", "--min-exact-match", "0.9"])
    return status, json.loads(out.read_text())


def test_in_process(in_process):
    status, report = in_process
    assert report["n"] == 30 and len(report["skills"]) == 15 and report["model"] == "quire-tiny"
    assert report["exact_match"] >= 0.9, report["failures"]
    assert status == 0
    assert report["interval"][0] < report["exact_match"] <= report["interval"][1]


def test_over_http(url, in_process, capsys):
    skills = "subtraction,letter_case,tool_call,tool_result,code,extraction"
    words = ["eval", "--url", url, "--api-key", KEY, "--skills", skills, "--limit", "2", "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "quire-tiny" and report["n"] == 12
    assert report["skills"] == {name: in_process[1]["skills"][name] for name in skills.split(",")}
    words = ["eval", "--url", f"{url}/v1", "--api-key", KEY, "--served-model", "quire-tiny", "--skills", "addition"]
    assert main([*words, "--limit", "1", "--max-concurrency", "1", "--min-exact-match", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["skill", "addition", "overall"]


def test_what_a_server_refuses(url, capsys):
    assert main(["eval", "--url", url, "--limit", "1"]) == 2
    assert "answered 401" in one_line(capsys)
    assert main(["eval", "--url", url, "--api-key", KEY, "--served-model", "nobody"]) == 2
    assert "serves quire-tiny" in one_line(capsys)
    assert main(["eval", "--url", f"{url}/nowhere", "--api-key", KEY]) == 2
    assert "answered 404" in one_line(capsys)


@pytest.mark.parametrize(
    ("models", "status", "answer", "message"),
    [
        ('{"data": [{"id": "m"}]}', 400, '{"error": "too long"}', "/v1/chat/completions answered 400: "),
        ('{"data": [{"id": "m"}]}', 200, "{}", "has no OpenAI-compatible API"),
        ('{"data": [{"id": "m"}]}', 200, '{"choices": []}', "has no OpenAI-compatible API"),
        ('{"data": []}', 200, "{}", "serves no model"),
        ("[]", 200, "{}", "has no OpenAI-compatible API"),
        ("<html>", 200, "{}", "not JSON"),
    ],
)
def test_a_server_that_is_none(models, status, answer, message, capsys):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, models)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(status, answer)

        def reply(self, status, text):
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    class Fake(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass  # the client went away at the first refusal

    with Fake(("127.0.0.1", 0), Handler) as fake:
        threading.Thread(target=fake.serve_forever, daemon=True).start()
        try:
            assert main(["eval", "--url", f"http://127.0.0.1:{fake.server_port}", "--limit", "2"]) == 2
        finally:
            fake.shutdown()
    assert message in one_line(capsys)


def test_wrong_answers_are_shown_and_fail(tmp_path, capsys):
    from quire.core.testing.tiny_models import make_tiny_model

    model = str(make_tiny_model("llama", tmp_path / "tiny", max_position_embeddings=2048))
    words = ["eval", model, "--skills", "addition", "--limit", "2", "--device", "cpu", "--failures", "1"]
    assert main([*words, "--min-exact-match", "0.5"]) == 1
    text = capsys.readouterr()
    assert text.out.count("wrote") == 1 and "right 605" not in text.out and "addition-000: " in text.out
    assert text.err.splitlines()[-1] == "quire: exact match 0.0000 is below 0.5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--skills", "adition"], "did you mean addition?"),
        (["--skills", ","], "names none"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--failures", "-1"], "--failures must be at least 0"),
        (["--min-exact-match", "90"], "between 0 and 1, got 90"),
        (["--max-concurrency", "0"], "--max-concurrency must be at least 1"),
        (["--served-model", "x"], "name it with --url"),
        (["--api-key", "x"], "name it with --url"),
        (["--url", "nonsense"], "not a URL"),
        (["--url", "http://127.0.0.1:1"], "cannot be reached"),
        (["quire-tiny", "--url", "http://127.0.0.1:1"], "--served-model"),
        (["--dtype", "half", "--url", "http://127.0.0.1:1"], "--served-model"),
        (["./no-such-model", "--limit", "1"], "no-such-model"),
    ],
)
def test_errors_are_one_line(words, message, capsys):
    assert main(["eval", *words]) == 2
    assert message in one_line(capsys)


def one_line(capsys):
    text = capsys.readouterr().err
    assert text.startswith("quire: error: ") and text.count("\n") == 1
    return text


def test_the_documentation_lists_every_flag():
    _, subparsers = make_parsers()
    shared = {name for flag in ENGINE_FLAGS for name in (flag.flag, *flag.aliases)} | set(option_flags())
    shared |= {old.name for old in VLLM_FLAGS} | {"-h", "--help"}
    text = (DOCS / "cli.md").read_text().partition("## `quire eval`")[2]
    eval_flags = [n for n in subparsers.choices["eval"].list_flags() if n not in shared and not n.startswith("--no-")]
    assert len(eval_flags) == 13
    assert [name for name in eval_flags if f"`{name}" not in text] == []

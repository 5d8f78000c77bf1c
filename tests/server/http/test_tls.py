"""A server that speaks TLS itself, and what a server sets for requests that leave it out."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest

from quire.core.errors import ConfigError
from quire.server.http.settings import ServerSettings
from quire.server.http.template_defaults import parse_template_defaults
from quire.server.http.tls import make_ssl_context

from ..conftest import RunningServer

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate by openssl")

TEMPLATE = "{{ style }} {{ tone }}{% for m in messages %} {{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    words += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    words += ["-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)
    return folder / "cert.pem", folder / "key.pem"


def test_requests_over_tls_with_defaults_of_the_server(
    start: Callable[..., RunningServer], certificate: tuple[Path, Path]
) -> None:
    cert, key = map(str, certificate)
    defaults = json.dumps({"style": "calm", "tone": "low"})
    server = start(
        "--ssl-certfile", cert, "--ssl-keyfile", key, "--enable-force-include-usage", "--served-model-name", "tiny",
        "--chat-template", TEMPLATE, "--default-chat-template-kwargs", defaults, "--prometheus-port", "0",
    )  # fmt: skip
    assert server.url.startswith("https://") and f"curl -k {server.url}/v1" in server.stdout.read_text()
    with httpx.Client(base_url=server.url, verify=ssl.create_default_context(cafile=cert), timeout=60) as http:
        sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http)
        messages = [{"role": "user", "content": "go"}]
        request = {"model": "tiny", "max_tokens": 3, "temperature": 0}
        chunks = list(sdk.chat.completions.create(messages=messages, stream=True, **request))
        assert chunks[-1].usage.completion_tokens == 3 and not chunks[-1].choices
        chunks = list(sdk.completions.create(prompt="go", stream=True, **request))
        assert chunks[-1].usage.completion_tokens == 3 and not chunks[-1].choices

        def render(**fields: object) -> str:
            tokens = http.post("/tokenize", json={"messages": messages, **fields}).json()["tokens"]
            return http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]

        assert render() == "calm low go"
        assert render(chat_template_kwargs={"tone": "high"}) == "calm high go"
        metrics = server.stdout.read_text().partition("Metrics also on ")[2].splitlines()[0]
        assert metrics.startswith("https://") and "quire:num_requests_running" in http.get(metrics).text
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"{server.url}/health")
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http{server.url.removeprefix('https')}/health")


def test_what_is_wrong_of_certificates_is_said_in_one_line(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = map(str, certificate)
    (locked := tmp_path / "locked.pem").touch()
    words = ["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(words, check=True, capture_output=True)
    for settings, says in (
        ({"ssl_keyfile": key}, "--ssl-keyfile is of no use without --ssl-certfile"),
        ({"ssl_certfile": "absent.pem"}, "--ssl-certfile absent.pem: no such file"),
        ({"ssl_certfile": cert}, "--ssl-certfile: the certificate and its key cannot be used"),
        ({"ssl_certfile": cert, "ssl_keyfile": str(locked)}, "the key is encrypted"),
        ({"ssl_certfile": cert, "ssl_keyfile": key, "ssl_cert_reqs": 3}, "--ssl-cert-reqs must be 0, 1 or 2"),
        ({"ssl_certfile": cert, "ssl_keyfile": key, "ssl_cert_reqs": 2}, "say with --ssl-ca-certs who signs"),
        ({"ssl_certfile": cert, "ssl_keyfile": key, "ssl_ca_certs": key}, "--ssl-ca-certs"),
        ({"ssl_certfile": cert, "ssl_keyfile": key, "ssl_ciphers": "NONE-SUCH"}, "--ssl-ciphers 'NONE-SUCH'"),
    ):
        with pytest.raises(ConfigError) as raised:
            make_ssl_context(ServerSettings(**settings))
        assert says in str(raised.value) and "\n" not in str(raised.value)
    context = make_ssl_context(ServerSettings(ssl_certfile=cert, ssl_keyfile=key, ssl_ca_certs=cert, ssl_cert_reqs=2))
    assert context.verify_mode is ssl.CERT_REQUIRED


def test_clients_that_are_idle_do_not_delay_the_end(
    start: Callable[..., RunningServer], certificate: tuple[Path, Path]
) -> None:
    """TLS waits for the client's goodbye, which one that reads nothing never says."""
    cert, key = map(str, certificate)
    server = start("--ssl-certfile", cert, "--ssl-keyfile", key)
    address = server.url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=cert)
    with contextlib.ExitStack() as stack:
        for has_asked in (False, True):
            plain = stack.enter_context(socket.create_connection((address[0], int(address[1]))))
            encrypted = stack.enter_context(context.wrap_socket(plain, server_hostname=address[0]))
            if has_asked:
                encrypted.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert encrypted.recv(1000).startswith(b"HTTP/1.1 200")
        stack.enter_context(socket.create_connection((address[0], int(address[1]))))  # says nothing at all
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    log = server.stderr.read_text()
    assert "timeout graceful shutdown exceeded" not in log, log


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"tools": []}', "tools: cannot be set here; leave it out"),
    ],
)
def test_defaults_of_the_template_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_template_defaults(text)

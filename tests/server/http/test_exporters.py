"""Several metrics exporters at once: each is served, and one that fails is switched off."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from tests.server.conftest import start_server

from quire.core.engine.async_llm import AsyncLLM
from quire.core.engine.exporter_group import RenderedMetrics
from quire.server.http.app import create_app
from quire.server.http.settings import ServerSettings

EXPORTERS = '''
from dataclasses import dataclass
from quire.sdk import MetricsExporter


class Count(MetricsExporter):
    """Counts requests."""

    @dataclass(frozen=True)
    class Options:
        name: str = "requests"

    content_type = "text/plain; version=0.0.4"

    def __init__(self, labels, options=None):
        super().__init__(labels, options)
        self.count = 0

    def record_engine(self, stats):
        pass

    def record_request(self, stats):
        self.count += 1

    def record_tokens(self, num_prompt, num_generated, ttft_s, itl_s):
        pass

    def render(self):
        return self.content_type, f"{self.options.name} {self.count}".encode()


class Page(Count):
    """The same as a page."""

    content_type = "text/html"


class Fails(Count):
    """Renders nothing that could be sent."""

    def render(self):
        return "text/plain", None
'''


def test_every_exporter_is_served(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exporters.py").write_text(EXPORTERS)
    monkeypatch.syspath_prepend(tmp_path)
    flags = [word for name in ("Count", "Page", "Fails") for word in ("--metrics", f"exporters:{name}")]
    server = start_server(
        tmp_path / "server", tiny_model, *flags, "--metrics-option", "exporters:Count.name=served", "--device", "cpu"
    )
    try:
        with server.http as http:
            assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
            content_type = http.get("/metrics/prometheus").headers["content-type"]
            page = http.get("/metrics")
            assert http.get("/metrics/").headers["content-type"] == page.headers["content-type"], "as vLLM's is mounted"
            assert page.headers["content-type"] == content_type and "quire:num_requests_running" in page.text
            assert http.get("/metrics/exporters:Count").text == "served 1"
            assert http.get("/metrics/exporters:Page").text == "requests 1"
            answer = http.get("/metrics/exporters:Fails")
            assert answer.status_code == 404
            assert "on are prometheus, exporters:Count, exporters:Page" in answer.json()["error"]["message"]
            assert "served 1" in page.text and "requests 1" not in page.text
        assert "metrics/exporters:Fails is quarantined (raised)" in server.stderr.read_text()
    finally:
        server.stop()


def test_metrics_without_an_exporter_are_not_found() -> None:
    async def render() -> list[RenderedMetrics]:
        return []

    app = create_app(cast(AsyncLLM, SimpleNamespace(render_metrics=render)))
    with TestClient(app) as client:
        answer = client.get("/metrics")
        assert answer.status_code == 404 and "--metrics none" in answer.json()["error"]["message"]


@pytest.mark.parametrize("root_path", ["", "/llm"])
def test_an_application_can_be_mounted_in_another(root_path: str) -> None:
    """Its routes are found below the path, and its keys are asked for there."""

    async def render() -> list[RenderedMetrics]:
        return []

    outer = FastAPI()
    engine = SimpleNamespace(render_metrics=render, adapters=SimpleNamespace(is_on=False))
    settings = ServerSettings(api_key=("k",), root_path=root_path)
    outer.mount("/llm", create_app(cast(AsyncLLM, engine), settings))
    with TestClient(outer) as client:
        assert "--metrics none" in client.get("/llm/metrics").json()["error"]["message"]
        for path in ("/llm/v1/models", "/llm/v1/chat/completions"):
            assert client.post(path, json={}).status_code == 401
        assert client.get("/metrics").status_code == 404

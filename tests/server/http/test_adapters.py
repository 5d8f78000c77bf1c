"""LoRA adapters over HTTP, with OpenAI's SDK: named as models, loaded and unloaded while the server serves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quire.core.testing.tiny_adapters import make_tiny_adapter

from ..conftest import RunningServer, check_error, child_processes, start_server, until

FACT = [{"role": "user", "content": "What does TTFT mean?"}]
ANSWER = "TTFT is the time to the first token."
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters") / "root"
    make_tiny_adapter("core/assets/quire-tiny", root / "random", seed=1, scale=0.6)
    shutil.copytree("core/assets/quire-tiny-json", root / "latest")
    return root


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = start_server(
        tmp_path_factory.mktemp("server"),
        *("quire-tiny", "--max-model-len", "512", "--num-gpu-blocks-override", "96", "--api-key", "k"),
        *(
            "--enable-lora",
            "--lora-modules",
            "upper=quire-tiny-upper",
            '{"name": "json", "path": "quire-tiny-json", "base_model_name": "acme/base"}',
        ),
        *("--max-loras", "2", "--admin-api-key", "boss", "--lora-root", str(root)),
    )
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def admin(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer boss"}, timeout=120) as client:
        yield client


def ask(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(model=model, messages=FACT, temperature=0, max_tokens=32)
    assert answer.model == model
    return answer.choices[0].message.content or ""


def test_an_adapter_is_a_model_whose_parent_is_the_base(client: openai.OpenAI) -> None:
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert {"quire-tiny", "upper", "json"} <= cards.keys()
    assert cards["quire-tiny"]["parent"] is None
    assert cards["upper"]["parent"] == "quire-tiny" and cards["json"]["parent"] == "acme/base"
    assert cards["upper"]["root"].endswith("quire-tiny-upper")
    assert client.models.retrieve("json").id == "json"


def test_the_name_selects_the_adapter_in_every_kind_of_request(client: openai.OpenAI) -> None:
    assert ask(client, "quire-tiny") == ANSWER
    assert ask(client, "upper") == ANSWER.upper()
    assert json.loads(ask(client, "json")) == {"answer": ANSWER}
    chunks = client.chat.completions.create(
        model="upper", messages=FACT, temperature=0, max_tokens=32, stream=True, stream_options={"include_usage": True}
    )
    texts = [(chunk.model, chunk.choices[0].delta.content or "" if chunk.choices else "") for chunk in chunks]
    assert "".join(text for _, text in texts) == ANSWER.upper() and {model for model, _ in texts} == {"upper"}
    response = client.responses.create(model="json", input=FACT[0]["content"], temperature=0, max_output_tokens=32)
    assert response.model == "json" and json.loads(response.output_text) == {"answer": ANSWER}
    prompt = "<|im_start|>user\nWhat does TTFT mean?<|im_end|>\n<|im_start|>assistant\n"
    completion = client.completions.create(model="upper", prompt=[prompt] * 2, temperature=0, max_tokens=32)
    assert completion.model == "upper" and [each.text for each in completion.choices] == [ANSWER.upper()] * 2


def test_the_page_on_adapters_prints_what_it_says(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    page = Path("docs/lora.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    code = code.replace("http://127.0.0.1:8000", server.url).replace('api_key="none"', 'api_key="k"')
    names: dict[str, Any] = {}
    sizes = "max_loras=2, max_model_len=256, num_gpu_blocks_override=64)"
    exec(compile(code.replace("max_loras=2)", sizes), "lora.md", "exec"), names)
    names["llm"].shutdown()
    *printed, upper = capsys.readouterr().out.splitlines()
    assert "\n".join(printed) in page and len(printed) == 3 and upper == printed[1]


def test_an_unknown_model_is_still_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"the model 'extractor' does not exist; served here: .*'upper'"):
        ask(client, "extractor")


def test_an_adapter_is_loaded_replaced_and_unloaded_under_a_stream(
    client: openai.OpenAI, admin: httpx.Client, root: Path
) -> None:
    done = admin.post(LOAD, json={"lora_name": "latest", "lora_path": "latest"})
    assert done.status_code == 200 and done.text == "Success: LoRA adapter 'latest' added successfully."
    fields = {"model": "latest", "messages": FACT, "temperature": 0, "max_tokens": 32}
    stream = client.chat.completions.create(**fields, stream=True)
    text = next(stream).choices[0].delta.content or ""
    shutil.copytree("core/assets/quire-tiny-upper", root / "latest", dirs_exist_ok=True)
    check_error(admin.post(LOAD, json={"lora_name": "latest", "lora_path": "latest"}), 400, "lora_name")
    body = {"lora_name": "latest", "lora_path": str(root / "latest"), "load_inplace": True}
    assert admin.post(LOAD, json=body).status_code == 200
    assert ask(client, "latest") == ANSWER.upper(), "new requests have the new weights"
    text += "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert json.loads(text) == {"answer": ANSWER}, "the one that had begun kept the old"
    assert admin.post(UNLOAD, json={"lora_name": "latest"}).status_code == 200
    check_error(admin.post(UNLOAD, json={"lora_name": "latest"}), 404, "lora_name")
    with pytest.raises(openai.NotFoundError):
        ask(client, "latest")


def test_what_cannot_be_loaded_is_refused_and_nobody_else_is_hurt(
    client: openai.OpenAI, admin: httpx.Client, server: RunningServer, root: Path
) -> None:
    outside = make_tiny_adapter("core/assets/quire-tiny", root.parent / "outside")
    (root / "link").symlink_to(outside)
    (root / "files").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "files" / name).symlink_to(outside / name)
    (root / "pickle").mkdir()
    (root / "pickle" / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4}')
    (root / "pickle" / "adapter_model.bin").write_bytes(b"pickle")
    shutil.copytree("core/assets/quire-tiny-upper", root / "pipe")
    (root / "pipe" / "adapter_model.safetensors").unlink()
    os.mkfifo(root / "pipe" / "adapter_model.safetensors")
    make_tiny_adapter("core/assets/quire-tiny", root / "slow", rank_pattern={r"(([a-z_.0-9])+)+!": 64, "(?=q)": 4})
    make_tiny_adapter("core/assets/quire-tiny", root / "wide", rank=64)
    make_tiny_adapter("core/assets/quire-tiny-draft", root / "of-another")
    for path, status, says in (
        (str(outside), 403, "not below --lora-root"),
        ("../outside", 403, "not below --lora-root"),
        ("link", 403, "links out of it"),
        ("files", 403, "links out of it"),
        ("nowhere", 400, "'nowhere' is not a folder below --lora-root"),
        ("pickle", 400, "a pickle"),
        ("pipe", 400, "it is not a regular file"),
        ("slow", 400, "the pattern '(?=q)' cannot be used"),
        ("wide", 400, "rank 64 is above --max-lora-rank 16"),
        ("of-another", 400, "not an adapter of this model"),
        ("nul\0", 400, "lora_path"),
    ):
        refused = admin.post(LOAD, json={"lora_name": "bad", "lora_path": path})
        check_error(refused, status, "lora_path")
        assert says in refused.json()["error"]["message"], refused.text
    for name in ("quire-tiny", ""):
        check_error(admin.post(LOAD, json={"lora_name": name, "lora_path": "random"}), 400, "lora_name")
    for key in ("k", "wrong"):
        headers = {"Authorization": f"Bearer {key}"}
        check_error(httpx.post(server.url + LOAD, json={"lora_name": "x", "lora_path": "random"}, headers=headers), 401)
    assert ask(client, "upper") == ANSWER.upper()


def test_metrics_say_which_adapters_are_asked_for(
    client: openai.OpenAI, admin: httpx.Client, server: RunningServer
) -> None:
    ask(client, "upper")

    def read() -> str:
        return httpx.get(server.url + "/metrics").text

    until(lambda: bool(re.search(r'vllm:lora_requests_info\{max_lora="2",.*running_lora_adapters=""', read())), 30)
    text = read()
    assert re.search(r'quire:lora_requests_total\{lora_adapter="upper",model_name="quire-tiny"\} [1-9]', text)
    assert float(re.findall(r"^quire:lora_loads_total\{.*\} (\S+)$", text, re.MULTILINE)[0]) >= 2


def test_metrics_say_at_once_that_an_unload_freed_memory(server: RunningServer, admin: httpx.Client) -> None:
    """Also where no request comes, so that no step follows."""
    held = 'quire:lora_adapters_in_host_memory{model_name="quire-tiny"}'
    before = server.metric(held)
    assert admin.post(LOAD, json={"lora_name": "one-more", "lora_path": "random"}).status_code == 200
    until(lambda: server.metric(held) == before + 1, 5)
    assert admin.post(UNLOAD, json={"lora_name": "one-more"}).status_code == 200
    until(lambda: server.metric(held) == before, 5)


def test_adapters_come_back_with_the_engine(client: openai.OpenAI, server: RunningServer) -> None:
    """The engine's process dies, and the next one knows of the adapters what it is told with requests."""
    [engine] = child_processes(server.process.pid)
    os.kill(engine, signal.SIGKILL)
    restarts = 'quire:engine_restarts_total{model_name="quire-tiny"}'
    until(lambda: server.metric(restarts) == 1, 60)
    until(lambda: httpx.get(server.url + "/health").status_code == 200, 120)
    assert ask(client, "upper") == ANSWER.upper()
    assert ask(client, "quire-tiny") == ANSWER

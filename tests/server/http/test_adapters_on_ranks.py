"""LoRA adapters of a server whose model two ranks share: named, loaded, replaced and unloaded as of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from ..conftest import RunningServer, check_error, start_server
from .test_adapters import ANSWER, LOAD, UNLOAD, ask

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters") / "root"
    shutil.copytree("core/assets/quire-tiny-json", root / "latest")
    (root / "broken").mkdir()
    shutil.copy(root / "latest" / "adapter_config.json", root / "broken")
    return root


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = start_server(
        tmp_path_factory.mktemp("server"),
        *("quire-tiny", "--max-model-len", "256", "--num-gpu-blocks-override", "64", "--api-key", "k"),
        *("--tensor-parallel-size", "2", "--device", "cpu", "--enable-lora", "--max-loras", "1"),
        *("--lora-modules", "upper=quire-tiny-upper", "--admin-api-key", "boss", "--lora-root", str(root)),
    )
    yield running
    running.stop()


def test_adapters_come_and_go_on_every_rank(server: RunningServer, root: Path) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0, timeout=120)
    assert [ask(client, name) for name in ("quire-tiny", "upper")] == [ANSWER, ANSWER.upper()]
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer boss"}, timeout=120) as admin:
        check_error(admin.post(LOAD, json={"lora_name": "new", "lora_path": "broken"}), 400)
        assert admin.post(LOAD, json={"lora_name": "new", "lora_path": "latest"}).status_code == 200
        assert json.loads(ask(client, "new")) == {"answer": ANSWER}
        shutil.copytree("core/assets/quire-tiny-upper", root / "latest", dirs_exist_ok=True)
        again = {"lora_name": "new", "lora_path": "latest", "load_inplace": True}
        assert admin.post(LOAD, json=again).status_code == 200
        assert [ask(client, name) for name in ("new", "upper")] == [ANSWER.upper()] * 2
        assert admin.post(UNLOAD, json={"lora_name": "new"}).status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask(client, "new")
    assert ask(client, "quire-tiny") == ANSWER

"""Names to folders: embedded, local, and a small hub on loopback, asked from processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.loading.hub_server import Hub, Repository, serve

from quire.core.errors import CheckpointError
from quire.core.loading.hub import resolve_model
from quire.core.testing.tiny_models import make_tiny_model

ASK = """
import json, sys
from quire.core.errors import CheckpointError
from quire.core.loading.hub import resolve_model
for call in json.loads(sys.argv[1]):
    try:
        print(json.dumps({"path": str(resolve_model(**call))}))
    except CheckpointError as error:
        print(json.dumps({"error": str(error)}))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = make_tiny_model("llama", tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | {"pytorch_model.bin": b"pickle", "modeling_evil.py": b"raise SystemExit", "README.md": b"a card"}


@pytest.fixture(scope="module")
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    pickled = {name: data for name, data in files.items() if not name.endswith(".safetensors")}
    repositories = {
        "acme/tiny": Repository({"main": files, "v2": files | {"README.md": b"second"}}),
        "acme/pickled": Repository({"main": pickled}),
        "acme/empty": Repository({"main": {"README.md": b"nothing"}}),
        "acme/private": Repository({"main": files}, token="sesame"),
        "acme/gated": Repository({"main": files}, token="sesame", gated=True),
    }
    with serve(repositories) as running:
        yield running


def test_download_cache_and_offline(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    """One visit to the hub, then none: the cache serves an offline process and one that cannot connect."""
    (first,) = ask(hub.url, tmp_path, [{"name": "acme/tiny"}])
    folder = Path(first["path"])
    kept = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= kept
    assert not kept & {"pytorch_model.bin", "modeling_evil.py"}, "fetched what can run code"
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    calls = [{"name": "acme/tiny"}, {"name": "acme/other"}]
    for url, extra in ((hub.url, {"HF_HUB_OFFLINE": "1"}), ("http://127.0.0.1:9", {})):
        cached, missing = ask(url, tmp_path, calls, extra)
        assert cached == first
        assert "'acme/other' is not in the cache" in missing["error"]


def test_a_drafting_head_may_be_pickled(hub: Hub, tmp_path: Path) -> None:
    """It has tensors of a known kind alone, so it is read without running anything; a whole model is refused."""
    calls = [{"name": name, "draft_head": True} for name in ("acme/pickled", "acme/tiny", "acme/empty")]
    pickled, whole, empty = ask(hub.url, tmp_path, calls)
    assert (Path(pickled["path"]) / "pytorch_model.bin").read_bytes() == b"pickle"
    assert not (Path(whole["path"]) / "pytorch_model.bin").exists()
    assert "has no config.json" in empty["error"]
    (cached,) = ask("http://127.0.0.1:9", tmp_path, calls[:1])
    assert cached == pickled


def test_revisions_and_download_dir(hub: Hub, tmp_path: Path) -> None:
    own = tmp_path / "own"
    calls = [
        {"name": "acme/tiny", "revision": "v2", "download_dir": str(own)},
        {"name": "acme/tiny", "revision": "v9"},
    ]
    second, missing = ask(hub.url, tmp_path / "home", calls)
    assert Path(second["path"]).is_relative_to(own)
    assert missing["error"] == "model 'acme/tiny' has no revision 'v9'; check --revision"


def test_refusals_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    names = ["acme/pickled", "acme/empty", "acme/nobody", "acme/private", "acme/gated", "bad name!", "quire-tinny"]
    answers = [answer["error"] for answer in ask(hub.url, tmp_path, [{"name": name} for name in names])]
    pickled, empty, nobody, private, gated, bad, misspelt = answers
    assert "has no safetensors; pickled weights" in pickled and "refused" in pickled
    assert "has no config.json" in empty
    assert "neither a folder nor a repository" in nobody and "HF_TOKEN" in private
    assert "is gated; accept its terms" in gated
    assert "not a valid name on the hub" in bad or "neither a folder nor" in bad
    assert "did you mean 'quire-tiny'?" in misspelt
    assert not any("\n" in answer for answer in answers)


def test_a_token_opens_private_and_gated(hub: Hub, tmp_path: Path) -> None:
    calls = [{"name": "acme/private"}, {"name": "acme/gated"}]
    assert all("path" in answer for answer in ask(hub.url, tmp_path, calls, {"HF_TOKEN": "sesame"}))


def test_local_folders(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    file = tmp_path / "model.safetensors"
    file.touch()
    for name, reason in (
        (str(tmp_path / "gone"), "does not exist"),
        ("./gone", "does not exist"),
        ("", "does not exist"),
        (str(file), "is a file; give the folder"),
    ):
        with pytest.raises(CheckpointError, match=reason) as caught:
            resolve_model(name)
        assert "\n" not in str(caught.value)


def ask(url: str, home: Path, calls: list[dict], extra: dict[str, str] | None = None) -> list[dict]:
    """Resolve in another process, whose hub is ``url`` and whose cache is under ``home``."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment = clean | {"HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | (extra or {})
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(calls)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]

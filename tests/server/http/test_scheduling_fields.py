"""What clients tell the scheduling policy, through the whole server, to a policy that says what it was told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from ..conftest import RunningServer, check_error, start_server

POLICY = '''
from quire.sdk import BatchingPolicy, Reject, hookimpl, make_default_plan

@hookimpl
def quire_register_policy(register):
    register("tell", "quire_tell:Tell", "says what it was told of a request")

class Tell(BatchingPolicy):
    """Rejects a request with what it knows of it; what is tagged is queued, and refused if its deadline is short."""

    def admission_key(self, request):
        wait_ns = request.deadline_ns - request.arrival_ns
        if request.tags.get("queue"):
            return (request.priority,)
        said = (request.group, request.priority, wait_ns // 10**6 if wait_ns < 10**12 else None)
        targets = (request.ttft_target_ns // 10**6, request.tpot_target_ns // 10**6)
        return Reject(f"told {(*said, *targets, request.predicted_tokens, dict(request.tags))}")

    def schedule(self, view):
        grants = make_default_plan(view)
        for i, deadline_ns in enumerate(view.waiting.deadline_ns.tolist()):
            if deadline_ns < view.now_ns + 10**9:
                grants.refuse(len(view.running) + i, "a second is needed")
        return grants
'''
TEXT = "/v1/completions"
BODY = {"prompt": "x", "max_tokens": 8}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Iterator[RunningServer]:
    """A server with named keys, whose policy is a package of its own, installed beside it."""
    site = tmp_path_factory.mktemp("site")
    (site / "quire_tell.py").write_text(POLICY)
    info = site / "quire_tell-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quire-tell\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[quire.v1]\ntell = quire_tell\n")
    flags = ["--scheduling-policy", "tell", "--api-key", "plain"]
    for name in "ab":
        flags += ["--named-api-key", f"team-{name}=secret-{name}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        running = start_server(tmp_path_factory.mktemp("server"), tiny_model, *flags)
    yield running
    running.stop()


@pytest.fixture
def tell(server: RunningServer) -> Iterator[Callable[..., str]]:
    """What the policy was told of a request."""
    with httpx.Client(base_url=server.url, timeout=60) as client:

        def send(key: str = "plain", headers: dict[str, str] | None = None, **fields: object) -> str:
            answer = client.post(
                TEXT, json={**BODY, **fields}, headers={"Authorization": f"Bearer {key}", **(headers or {})}
            )
            message = check_error(answer, 429)
            assert answer.json()["error"]["code"] == "queue_full"
            return message.partition("told ")[2]

        yield send


def test_fields_of_the_body_reach_the_policy(tell: Callable[..., str]) -> None:
    assert tell() == "(None, 0, None, 0, 0, 0, {})"
    fields = {"group": "g", "priority": -3, "deadline_ms": 1500.5, "ttft_target_ms": 200, "tpot_target_ms": 20}
    assert tell(**fields, predicted_tokens=5, tags={"tier": "gold"}) == "('g', -3, 1500, 200, 20, 5, {'tier': 'gold'})"


def test_headers_reach_it_where_the_body_is_silent(tell: Callable[..., str]) -> None:
    headers = {
        "X-Quire-Group": "h",
        "X-Quire-Priority": "7",
        "X-Quire-Deadline-Ms": "300",
        "X-Quire-TTFT-Target-Ms": "100",
        "X-Quire-TPOT-Target-Ms": "10",
        "X-Quire-Predicted-Tokens": "4",
        "X-Quire-Tags": "tier=gold, path=a=b",
    }
    assert tell(headers=headers) == "('h', 7, 300, 100, 10, 4, {'tier': 'gold', 'path': 'a=b'})"
    said = tell(headers=headers, group="body", priority=1, deadline_ms=50, tags={})
    assert said == "('body', 1, 50, 100, 10, 4, {})"


def test_what_stock_clients_send_is_used(tell: Callable[..., str]) -> None:
    assert tell(user="u", metadata={"tier": "gold", "count": 3}) == "('u', 0, None, 0, 0, 0, {'tier': 'gold'})"
    assert tell(user="u" * 300) == f"('{'u' * 256}', 0, None, 0, 0, 0, {{}})"
    assert tell(user="u", group="g", tags={"a": "b"}, metadata={"c": "d"}).startswith("('g'")


def test_the_group_of_a_named_key_is_its_name(server: RunningServer, tell: Callable[..., str]) -> None:
    assert tell("secret-a").startswith("('team-a'")
    assert tell("secret-b", user="team-a", group="team-b").startswith("('team-b'"), "the user is no group then"
    assert tell(user="team-a").startswith("(None"), "nor can a user pass for a key"
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for key, group in (("secret-a", "team-b"), ("secret-a", "other"), ("plain", "team-a")):
            headers = {"Authorization": f"Bearer {key}"}
            for answer in (
                client.post(TEXT, json={**BODY, "group": group}, headers=headers),
                client.post(TEXT, json=BODY, headers={**headers, "X-Quire-Group": group}),
            ):
                check_error(answer, 403, "group")
        assert client.post(TEXT, json=BODY, headers={"Authorization": "Bearer team-a=secret-a"}).status_code == 401


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("deadline_ms", 0), ("deadline_ms", -1), ("deadline_ms", "soon"), ("ttft_target_ms", 1e12),
        ("tpot_target_ms", True), ("predicted_tokens", 0), ("predicted_tokens", 1.5),
        ("group", ""), ("group", "g" * 257), ("group", 3),
        ("tags", {"k": "v" * 513}), ("tags", {"k" * 65: "v"}), ("tags", {str(i): "" for i in range(17)}),
        ("tags", ["a"]), ("tags", {"a": 1}), ("metadata", "x"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(server: RunningServer, field: str, value: object) -> None:
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer plain"}, timeout=60) as client:
        answer = client.post(TEXT, json={**BODY, field: value})
    assert check_error(answer, 400).startswith(field)


@pytest.mark.parametrize(
    ("header", "value"),
    [("X-Quire-Priority", "high"), ("X-Quire-Deadline-Ms", "soon"), ("X-Quire-Tags", "gold"), ("X-Quire-Tags", "=x")],
)
def test_a_header_that_makes_no_sense_is_refused_by_name(server: RunningServer, header: str, value: str) -> None:
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer plain"}, timeout=60) as client:
        check_error(client.post(TEXT, json=BODY, headers={header: value}), 400, header)


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_that_cannot_be_met_is_said_at_once(server: RunningServer, stream: bool) -> None:
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer plain"}, timeout=60) as client:
        body = {**BODY, "tags": {"queue": "yes"}, "stream": stream, "n": 2}
        answer = client.post(TEXT, json={**body, "deadline_ms": 500})
        assert check_error(answer, 429) == "the deadline cannot be met: a second is needed"
        assert answer.json()["error"]["code"] == "deadline_unmeetable" and "retry-after" in answer.headers
        assert client.post(TEXT, json={**body, "deadline_ms": 60_000}).status_code == 200


def test_the_package_of_the_policy_is_small() -> None:
    assert len(POLICY.strip().splitlines()) <= 40


def test_flags_of_keys_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quire.server.cli.main import main

    for words, said in (
        (["--named-api-key", "secret"], "must be NAME=KEY"),
        (["--named-api-key", "=secret"], "must be NAME=KEY"),
        (["--named-api-key", "a=x", "--named-api-key", "a=y"], "'a' names two keys"),
        (["--admin-api-key", " "], "--admin-api-key is empty"),
        (["--lora-root", "."], "exists with --admin-api-key alone"),
        (["--lora-root", ".", "--admin-api-key", "secret"], "there are none without --enable-lora"),
        (
            ["--enable-lora", "--lora-root", "nowhere", "--admin-api-key", "secret"],
            "--lora-root nowhere is not a folder",
        ),
    ):
        assert main(["serve", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and "secret" not in error

"""What an operator does with a running server: switch its policy under load, and ask why a request waited."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from quire.server.cli.main import main

from ..conftest import RunningServer, check_error, until

TEXT = "/v1/completions"
OWN_POLICY = """
from dataclasses import dataclass
from quire.sdk import BatchingPolicy

class Own(BatchingPolicy):
    "Last come, first served."
    def admission_key(self, request):
        return (-request.arrival_ns,)
"""
OWN_OPTIONS = """
    def __init__(self, options=None):
        super().__init__(options or self.Options())

    @dataclass(frozen=True)
    class Options:
        weight: int = 1

        def __post_init__(self):
            if self.weight < 0:
                raise ValueError("the weight is below 0")
"""
REFUSED_OPTIONS = OWN_OPTIONS.replace(
    "super().__init__(options or self.Options())",
    """super().__init__(options)
        if options.weight > 99:
            raise ValueError("the weight is above 99")""",
)


def test_the_policy_is_switched_under_load_and_a_request_explained(
    start: Callable[..., RunningServer], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server = start(
        "--admin-api-key", "boss", "--api-key", "k", "--max-num-seqs", "2", "--max-num-queued-requests", "64"
    )
    admin = ["--url", server.url, "--admin-api-key", "boss"]
    answers: list[httpx.Response] = []

    def ask(number: int) -> None:
        body = {"prompt": "go on", "max_tokens": 150, "ignore_eos": True, "priority": number % 3}
        headers = {"Authorization": "Bearer k", "X-Request-Id": f"mine-{number}"}
        answers.append(httpx.post(f"{server.url}{TEXT}", json=body, headers=headers, timeout=120))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    until(lambda: server.load()["num_requests_waiting"] >= 4, 60)
    switches = ("priority,aging=1", "priority aging=5", "fair_share weights=a=2,b=1", "edf drop=true")
    for words in map(str.split, switches):
        assert main(["policy", "set", *words, *admin]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "priority (aging=1), switched once" and said[3] == "edf (drop=true), switched 4 times"
    assert main(["explain", "mine-15", *admin]) == 0
    assert "request mine-15-" in capsys.readouterr().out
    for thread in threads:
        thread.join(120)
    assert [answer.status_code for answer in answers] == [200] * 16, "nothing was dropped"
    assert main(["policy", "show", *admin]) == 0 and "edf (drop=true)" in capsys.readouterr().out

    file = tmp_path / "admin_own_policy.py"
    file.write_text(OWN_POLICY)
    assert main(["policy", "set", f"{file}:Own", "weight=2", *admin]) == 2
    assert "answered 400: Own takes no options" in capsys.readouterr().err
    file.write_text(OWN_POLICY + OWN_OPTIONS)
    assert main(["policy", "set", f"{file}:Own", "weight=2", *admin]) == 0, "a file that was edited is read anew"
    assert "admin_own_policy:Own (weight=2)" in capsys.readouterr().out
    assert main(["policy", "set", *switches[3].split(), *admin]) == 0

    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer boss"}, timeout=60) as client:
        waited = [client.get(f"/admin/requests/cmpl-mine-{i}").json()["requests"][0]["waited_ms"] for i in range(16)]
        assert sum(each["rows"] > 0 for each in waited) >= 8
        check_error(client.get("/admin/requests/nobody"), 404)
        file.write_text(OWN_POLICY + REFUSED_OPTIONS)
        for name, options, param in (
            ("nosuch", {}, "name"),
            ("nosuch", {"aging": 1}, "name"),
            ("no_such_file.py:Own", {}, "name"),
            ("priority", {"aging": "soon"}, "options"),
            ("priority", {"aging": []}, "options"),
            ("priority", [], "options"),
            ("fcfs", {"x": 1}, "options"),
            (f"{file}:Own", {"weight": -1}, "options"),
            (f"{file}:Own", {"weight": 100}, "options"),
        ):
            check_error(client.post("/admin/policy", json={"name": name, "options": options}), 400, param)
        check_error(client.post("/admin/policy", json={}), 400, "name")
        assert client.get("/admin/policy").json()["name"] == "edf"
        for headers in ({}, {"Authorization": "Bearer k"}):
            client.headers.pop("Authorization", None)
            check_error(client.get("/admin/policy", headers=headers), 401)
            check_error(client.post("/admin/policy", json={"name": "fcfs"}, headers=headers), 401)
    assert main(["explain", "nobody", *admin]) == 2 and "no request 'nobody'" in capsys.readouterr().err
    assert server.stderr.read_text().count("the scheduling policy is") == 6


def test_without_the_key_there_is_nothing_below_admin(
    server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        check_error(client.get("/admin/policy"), 404)
        check_error(client.post("/admin/policy", json={"name": "sjf"}), 404)
        check_error(client.get("/admin/requests/x"), 404)
    assert main(["policy", "show", "--url", server.url, "--admin-api-key", "x"]) == 2
    assert "start it with --admin-api-key" in capsys.readouterr().err

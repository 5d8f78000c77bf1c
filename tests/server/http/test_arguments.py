"""``extra_args`` and ``vllm_xargs`` of a body reach the plugins that declare them; others are refused."""

from __future__ import annotations

import httpx
import pytest
from tests.server.conftest import start_server

PLUGINS = '''
from dataclasses import dataclass
from quire.sdk import BatchingPolicy, LogitsProcessor, Reject


class Always(LogitsProcessor):
    """Samples one token, if the request names it."""

    @dataclass(frozen=True)
    class Arguments:
        token: int | None = None

    def __init__(self, vocab_size, device, options=None):
        super().__init__(vocab_size, device, options)
        self.rows = {}

    def add_row(self, request):
        token = self.read_arguments(request.params).token
        if token is not None:
            self.rows[request.row] = token
        return token is not None

    def remove_row(self, row):
        del self.rows[row]

    def apply(self, logits, batch):
        for i, row in enumerate(batch.rows):
            if row in self.rows:
                logits[i, self.rows[row]] += 1e4


class Bouncer(BatchingPolicy):
    """Lets in only those on the list."""

    @dataclass(frozen=True)
    class Arguments:
        invited: bool = True

    def admission_key(self, request):
        return (request.arrival_ns,) if self.read_arguments(request).invited else Reject("not invited")
'''


@pytest.fixture(scope="module")
def http(tiny_model: str, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "arguments.py").write_text(PLUGINS)
    flags = ["--logits-processor", "arguments:Always", "--scheduling-policy", "arguments:Bouncer"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        server = start_server(folder / "server", tiny_model, *flags, "--device", "cpu")
    with server.http as client:
        yield client
    server.stop()


def complete(http: httpx.Client, **fields: object) -> httpx.Response:
    body = {"prompt": "x", "max_tokens": 3, "ignore_eos": True, "return_token_ids": True, **fields}
    return http.post("/v1/completions", json=body)


@pytest.mark.parametrize("field", ["extra_args", "vllm_xargs"])
def test_arguments_reach_a_processor(http: httpx.Client, field: str) -> None:
    answer = complete(http, n=2, **{field: {"token": 70}})
    assert [choice["token_ids"] for choice in answer.json()["choices"]] == [[70] * 3] * 2
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "ignore_eos": True, field: {"token": 72}}
    assert http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"] == "ii"


def test_arguments_reach_the_policy(http: httpx.Client) -> None:
    assert complete(http, vllm_xargs={"invited": True}).status_code == 200
    answer = complete(http, vllm_xargs={"invited": False})
    assert answer.status_code == 429 and "not invited" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokn": 70}, "no plugin takes 'tokn'; did you mean token of arguments:Always?"),
        ({"token": "70"}, "token of arguments:Always must be a whole number or null, got '70'"),
        ({"invited": "yes"}, "invited of arguments:Bouncer must be true or false, got 'yes'"),
        ({"token": "x" * 70_000}, "the limit is 65536"),
    ],
)
def test_a_misspelling_is_the_clients_error(http: httpx.Client, arguments: dict, message: str) -> None:
    answer = complete(http, vllm_xargs=arguments)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"] and answer.json()["error"]["param"] == "extra_args"

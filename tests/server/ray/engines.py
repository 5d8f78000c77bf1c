"""Engines and servers on two ranks of a cluster, and what is looked up of them."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import httpx

from quire import LLM, SamplingParams, StructuredOutputsParams

from ..conftest import RunningServer, until
from .cluster import TwoNodes

SIZES: dict[str, Any] = {"device": "cpu", "max_model_len": 256, "cpu_threads": 1, "num_gpu_blocks_override": 64}
PROMPTS = [{"prompt_token_ids": [5 + i, 6, 7] * (1 + 4 * i)} for i in range(5)]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, seed=5, max_tokens=20, ignore_eos=True)
DIGITS = SamplingParams(
    temperature=1, seed=4, max_tokens=20, structured_outputs=StructuredOutputsParams(regex="[0-9]{9}")
)
PARAMS = [GREEDY, SEEDED, DIGITS, GREEDY, SEEDED]
TEXT = "/v1/completions"
LONG = {"prompt": "go on", "max_tokens": 600, "temperature": 1, "seed": 5, "ignore_eos": True}


def open_engine(model: str, cluster: TwoNodes, **arguments: Any) -> LLM:
    options = {"executor": {"address": cluster.address}}
    return LLM(model, **SIZES, **{"executor": "ray", "tensor_parallel_size": 2, "plugin_options": options} | arguments)


def generate(engine: LLM) -> list[tuple[int, ...]]:
    return [tuple(output.outputs[0].token_ids) for output in engine.generate(PROMPTS, PARAMS)]


def read_node(pid: int) -> str:
    """Of the cluster: the one that has this process."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    [node] = [value.partition(b"=")[2].decode() for value in variables if value.startswith(b"QUIRE_TEST_NODE=")]
    return node


def read_parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def find_ranks(server: RunningServer, size: int = 2) -> list[int]:
    """The processes of the last engine, by rank, as the log names them."""
    found = re.findall(r"rank (\d) \(.*?process (\d+) on \S+\) writes to", server.stderr.read_text())[-size:]
    assert [int(rank) for rank, _ in found] == list(range(size))
    return [int(pid) for _, pid in found]


def begin_request(server: RunningServer) -> tuple[threading.Thread, list[Any]]:
    """Ask for many tokens in another thread; returns when the request runs."""
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(server.url + TEXT, json=LONG, timeout=180)), daemon=True
    )
    thread.start()
    until(lambda: server.load()["num_requests_running"] == 1, 60)
    return thread, answers


def find_error(server: RunningServer) -> str:
    """The one line that says what happened."""
    lines = [line for line in server.stderr.read_text().splitlines() if re.match("ERROR|Traceback|.*Error:", line)]
    [line] = [line for line in lines if not line.endswith("the engine hung or died; the server ends")]
    return line

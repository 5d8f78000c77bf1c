"""Host time of a step's grammar masks: 256 requests, each with a schema of its own. No GPU is needed.

    PYTHONPATH=src:benchmarks python benchmarks/structured_output.py prepare FOLDER    # trains the tokenizer, ~1 min
    PYTHONPATH=src:benchmarks python benchmarks/mask_host_cost.py FOLDER

Schemas and answers are those of ``structured_output.py``: strings of tokens of 16 characters. ``advance`` is the time
in which grammars follow the tokens of the step before, ``masks`` that for the rest of making the step's masks, both in
microseconds a row: by the clock, and of processors, whose number divides most of it. ``derived`` is the share of rows
whose masks follow from others. ``p50`` and ``p99`` are of a whole step, by the clock.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from structured_output import make_schema
from tokenizers import Tokenizer

from quire.core.engine.args import EngineArgs
from quire.core.engine.config_builder import build_config
from quire.core.messages import EngineCoreRequest, SchedulerOutput
from quire.core.request import Request, RequestStatus
from quire.core.sampling_params import SamplingParams
from quire.core.structured_output.manager import StructuredOutputManager
from quire.core.structured_outputs import StructuredOutputsParams
from quire.plugins.structured_output.string_masks import StringMasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    config = build_config(
        EngineArgs(model=str(args.folder), load_format="dummy", device="cpu", max_num_seqs=args.requests)
    ).config
    manager = StructuredOutputManager(config, lambda rows, words: np.zeros((rows, words), np.int32))
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    tokens_of_16 = [
        index
        for token, index in tokenizer.get_vocab().items()
        if len(token) == 16 and token.isascii() and token.isalnum()
    ]
    rng = random.Random(0)
    schemas = [make_schema(rng) for _ in range(args.requests)]
    answers = [make_answer(rng, schema, tokenizer, tokens_of_16) for schema in schemas]
    start = time.perf_counter()
    requests = make_requests(manager, schemas)
    print(f"{args.requests} schemas compiled and started in {time.perf_counter() - start:.1f} s")
    num_derived = count_derived()
    times = measure(manager, requests, answers, args.steps)  # (steps, 3, 2)
    num_rows = sum(min(len(answer), args.steps) for answer in answers)
    phases = 1e6 * np.diff(times, axis=1).sum(axis=0) / num_rows
    for name, (clock, processors) in zip(("advance", "masks"), phases, strict=True):
        print(f"{name:7} {clock:7.1f} us a row, {processors:7.1f} of processors")
    print(f"{len(num_derived) / num_rows:.0%} derived")
    steps = 1e3 * (times[:, 2, 0] - times[:, 0, 0])
    print(f"a step of {args.requests}: p50 {np.median(steps):.2f} ms, p99 {np.percentile(steps, 99):.2f} ms")
    manager.shutdown()


def make_answer(rng: random.Random, schema: dict[str, Any], tokenizer: Tokenizer, tokens_of_16: list[int]) -> list[int]:
    """The tokens of a random answer."""
    token_ids: list[int] = []
    text = "{"
    for name, value in schema["properties"].items():
        text += ("" if text == "{" else ", ") + json.dumps(name) + ": "
        if value.get("type") != "string":
            text += json.dumps(rng.choice(value.get("enum", [True, False])))
            continue
        token_ids += tokenizer.encode(f'{text}"').ids
        token_ids += rng.choices(tokens_of_16, k=value["maxLength"] // 16)
        text = '"'
    return token_ids + tokenizer.encode(text + "}").ids


def make_requests(manager: StructuredOutputManager, schemas: list[dict[str, Any]]) -> list[Request]:
    """Requests that have begun, with their grammars."""
    requests: list[Request] = []
    for index, schema in enumerate(schemas):
        constraint = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
        params = SamplingParams(max_tokens=4096, structured_outputs=constraint)
        manager.prepare_request(EngineCoreRequest(index, [1], params, 0))
    while len(requests) < len(schemas):
        time.sleep(0.01)
        for message, state, error in manager.take_prepared_requests():
            if state is None:
                raise SystemExit(error)
            request = Request(message, 8192)
            request.status = RequestStatus.RUNNING
            manager.attach_grammar(request, state)
            requests.append(request)
    return requests


def measure(
    manager: StructuredOutputManager, requests: list[Request], answers: list[list[int]], num_steps: int
) -> NDArray[np.float64]:
    """(steps, 3, 2) seconds: before a step's ``advance``, between that and ``masks``, and behind these; by the clock,
    and of processors."""
    times: list[list[tuple[float, float]]] = []
    for step in range(num_steps):
        rows = [row for row, request in enumerate(requests) if step < len(answers[request.request_id])]
        in_step = np.empty(len(rows), object)
        in_step[:] = [requests[row] for row in rows]
        before = time.perf_counter(), time.process_time()
        for request in in_step.tolist():
            request.grammar.catch_up()
        between = time.perf_counter(), time.process_time()
        if manager.make_masks(make_step(rows), in_step).failed:
            raise SystemExit(f"a grammar has failed in step {step}")
        times.append([before, between, (time.perf_counter(), time.process_time())])
        for request in in_step.tolist():
            request.token_ids.append(answers[request.request_id][step])
    return np.array(times)


def make_step(rows: list[int]) -> SchedulerOutput:
    """A step in which all ``rows`` decode."""
    ones = np.ones(len(rows), np.int32)
    return SchedulerOutput(
        step=0,
        rows=np.array(rows, np.int32),
        num_scheduled_tokens=ones,
        sampling_mask=ones.astype(bool),
        num_decodes=len(rows),
        total_num_scheduled_tokens=len(rows),
        max_seq_len=1,
        max_seq_lens=ones,
    )


def count_derived() -> list[None]:
    """A list that grows by one with each mask that is derived."""
    derived: list[None] = []
    write_mask = StringMasks.write_mask

    def count(self: StringMasks, mask: Any) -> bool:
        is_derived = write_mask(self, mask)
        derived.extend([None] * is_derived)
        return is_derived

    StringMasks.write_mask = count  # type: ignore[method-assign]
    return derived


if __name__ == "__main__":
    main()

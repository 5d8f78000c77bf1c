"""Host time of a step's grammar masks: 256 requests, each with a schema of its own. No GPU is needed.

    PYTHONPATH=src:benchmarks python benchmarks/structured_output.py prepare FOLDER    # trains the tokenizer, ~1 min
    PYTHONPATH=src:benchmarks python benchmarks/mask_host_cost.py FOLDER

Schemas and answers are those of ``structured_output.py``: strings of tokens of 16 characters. What counts is the time
of the engine's thread in making a step's masks, which includes that grammars follow the tokens of the step before, and
how often it waits there for another thread, since that takes what the machine makes of it. With ``--form tools`` an
answer is a call of a strict tool; with ``--drafts K`` every request verifies the next K tokens, and each of K + 1 masks
is a row.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
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
from quire.plugins.structured_output.grammar_state import GuidanceState

STEP_SECONDS = 0.008
BEGIN, END = '<tool_call>\n{"name": "record", "arguments": ', "}\n</tool_call>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--form", choices=("json", "tools"), default="json")
    parser.add_argument("--drafts", type=int, default=0)
    args = parser.parse_args()
    config = build_config(
        EngineArgs(
            model=str(args.folder),
            load_format="dummy",
            device="cpu",
            max_num_seqs=args.requests,
            **({"spec_method": "forced_tokens", "num_speculative_tokens": args.drafts} if args.drafts else {}),
        )
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
    if args.form == "tools":
        answers = [[*tokenizer.encode(BEGIN).ids, *answer, *tokenizer.encode(END).ids] for answer in answers]
    start = time.perf_counter()
    requests = make_requests(manager, schemas, args.form)
    print(f"{args.requests} schemas compiled and started in {time.perf_counter() - start:.1f} s")
    num_computed = count_computed()
    start = time.process_time()
    steps = measure(manager, requests, answers, args)  # (steps, 4)
    processors = time.process_time() - start
    num_rows = int(steps[:, 0].sum())
    per_row = 1e6 / num_rows
    in_thread = per_row * steps[:, 1].sum()
    print(f"{in_thread:.1f} us a row in the engine's thread, {per_row * processors:.1f} of processors in all")
    print(f"the library computed the masks of {len(num_computed) / num_rows:.1%} of the rows")
    for name, column in (("in the engine's thread", 1), ("by the clock", 2)):
        p50, p99 = 1e3 * np.percentile(steps[:, column], [50, 99])
        print(f"masks of a step of {args.requests} {name}: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    p50, p99 = np.percentile(steps[:, 3], [50, 99])
    print(f"in which it waited for another thread: p50 {p50:.0f} times, p99 {p99:.0f} times")
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


def make_requests(manager: StructuredOutputManager, schemas: list[dict[str, Any]], form: str) -> list[Request]:
    """Requests that have begun, with their grammars."""
    requests: list[Request] = []
    for index, schema in enumerate(schemas):
        structure = {"begin": BEGIN, "schema": schema, "end": END}
        tag = {"structures": [structure], "triggers": ["<tool_call>"], "free_text": False, "stop_after_first": True}
        constraint = StructuredOutputsParams(
            **({"structural_tag": tag} if form == "tools" else {"json": schema}), disable_any_whitespace=True
        )
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
    manager: StructuredOutputManager, requests: list[Request], answers: list[list[int]], args: argparse.Namespace
) -> NDArray[np.float64]:
    """(steps, 4): rows, seconds of this thread's processor time and by the clock, and how often this thread waited."""
    measured: list[tuple[float, float, float, float]] = []
    for step in range(args.steps):
        start, end = step * (1 + args.drafts), (step + 1) * (1 + args.drafts)
        rows = [row for row, request in enumerate(requests) if end <= len(answers[request.request_id])]
        if not rows:
            break
        in_step = np.empty(len(rows), object)
        in_step[:] = [requests[row] for row in rows]
        scheduled = make_step(rows)
        if args.drafts:
            scheduled.num_draft_tokens = np.full(len(rows), args.drafts, np.int32)
            for request in in_step.tolist():
                request.grammar.device_draft_token_ids = answers[request.request_id][start : end - 1]
        before = time.thread_time(), time.perf_counter(), count_waits()
        if manager.make_masks(scheduled, in_step).failed:
            raise SystemExit(f"a grammar has failed in step {step}")
        after = time.thread_time(), time.perf_counter(), count_waits()
        measured.append((len(rows) * (1 + args.drafts), *(b - a for a, b in zip(before, after, strict=True))))
        for request in in_step.tolist():
            request.token_ids += answers[request.request_id][start:end]
        manager.begin_catch_up()
        time.sleep(STEP_SECONDS)  # in which the device runs, and matchers follow
    return np.array(measured)


def count_waits() -> int:
    """How often this thread has given up its processor to wait for something."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


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


def count_computed() -> list[None]:
    """A list that grows by one with each request for whose masks the library is asked."""
    computed: list[None] = []
    learn_mask = GuidanceState.learn_mask

    def count(self: GuidanceState, mask: NDArray[np.int32]) -> None:
        computed.append(None)
        learn_mask(self, mask)

    GuidanceState.learn_mask = count  # type: ignore[method-assign]
    return computed


if __name__ == "__main__":
    main()

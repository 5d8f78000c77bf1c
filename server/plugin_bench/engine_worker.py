"""The process of one engine of ``--end-to-end``: a line of JSON in is a run, a line out is what it measured."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from quire import LLM, SamplingParams
from quire.core.errors import QuireError
from quire.server.bench.workloads import Workload, make_workload

__all__ = ["main"]


def main() -> int:
    """Until the input ends."""
    settings = json.loads(sys.stdin.readline())
    try:
        llm = LLM(**settings["arguments"])
    except QuireError as error:
        print(json.dumps({"error": str(error).splitlines()[0]}), flush=True)
        return 1
    workload = make_workload(settings["workload"]).limit_requests(settings["num_prompts"])
    workload = workload.scale_lengths(settings["scale"]).wrap_token_ids(llm.config.model.vocab_size)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"output_tok_s": _measure(llm, workload)}), flush=True)
    llm.shutdown()
    return 0


def _measure(llm: LLM, workload: Workload) -> float:
    common: dict[str, Any] = {"ignore_eos": True, "detokenize": False, "temperature": 0.8 if workload.sampled else 0.0}
    params = [SamplingParams(max_tokens=count, **common) for count in workload.max_tokens]
    start = time.perf_counter()
    llm.generate(workload.prompts, params, use_tqdm=False)
    return workload.output_tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())

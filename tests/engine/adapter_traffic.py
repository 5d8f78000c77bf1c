"""Random events on an engine with adapters: load, reload with other weights, unload, request, abort, step.

Every request is compared with itself alone, in an engine without a prefix cache. As a script (``make loras``) it runs
ten thousand events: ``--events N --seed N``. A failure names its seed.
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from quire import LLM, LoRARequest, SamplingParams
from quire.core.adapters import AdapterRef
from quire.core.testing.tiny_adapters import make_tiny_adapter
from quire.core.testing.tiny_models import make_tiny_model

NAMES = ("extract", "json", "route", "upper", "translate")
NUM_CONTENTS, NUM_PROMPTS, NUM_TOKENS = 6, 5, 8
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SIZES: dict[str, Any] = {"device": "cpu", "max_model_len": 128, "max_lora_rank": 8}


class AdapterTraffic:
    """One engine, and what each request has to get. ``Counter`` ``events`` says what happened."""

    def __init__(self, folder: Path, seed: int, **settings: Any) -> None:
        self.random = random.Random(seed)
        self._matrices_of_others = list_matrices()  # held, so that none of them ends between two counts
        model = make_tiny_model("llama", folder / "model")
        self.contents = [
            make_tiny_adapter(model, folder / f"content-{index}", seed=index, rank=1 + index, scale=3.0)
            for index in range(NUM_CONTENTS)
        ]
        shared = [self.random.randrange(250) for _ in range(32)]
        # Prompts with the same beginnings, of whole blocks and of parts.
        self.prompts = [shared[: 16 * (1 + i % 2)] + [7 + i] * (1 + 9 * i) for i in range(NUM_PROMPTS)]
        self.expected = self._run_alone(str(model))
        self.llm = LLM(str(model), enable_lora=True, **SIZES, **settings)
        self._drafts = "spec_method" in settings
        self.loaded: dict[str, int] = {}  # name -> content
        self.waiting: dict[str, tuple[int, int]] = {}  # request -> (content, prompt)
        self.events: Counter[str] = Counter()
        self._num_requests = 0
        self.bytes_before = self._count_bytes_after_request()

    def run_events(self, count: int) -> None:
        """Let ``count`` things happen."""
        events = (self.request, self.step, self.load, self.unload, self.abort)
        for _ in range(count):
            [event] = self.random.choices(events, (40, 35, 9, 6, 10))
            event()
            self.events[event.__name__] += 1

    def request(self) -> None:
        name = self.random.choice([None, *self.loaded])
        content = -1 if name is None else self.loaded[name]
        adapter: AdapterRef | None = None if name is None else self.llm.adapters.find_adapter(name)
        prompt = self.random.randrange(NUM_PROMPTS)
        request_id = f"r{self._num_requests}"
        self._num_requests += 1
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, n=self.random.choice((1, 1, 2)))
        requests = self.llm.input_processor.process_inputs(request_id, self.prompts[prompt], params, adapter=adapter)
        self.llm.llm_engine.queue_requests(request_id, self.prompts[prompt], requests, "final")
        self.waiting[request_id] = (content, prompt)

    def step(self) -> None:
        processed = self.llm.llm_engine.process_step()
        assert not processed.failed_requests, processed.failed_requests[0].error
        for output in processed.request_outputs:
            if output.finished:
                expected = self.expected[self.waiting.pop(output.request_id)]
                for completion in output.outputs:
                    assert completion.token_ids == expected, f"{output.request_id} got tokens of another adapter"
                self.events["answered"] += 1

    def load(self) -> None:
        """Under a name that is taken it replaces what is there."""
        name, content = self.random.choice(NAMES), self.random.randrange(NUM_CONTENTS)
        self.llm.load_adapter(name, str(self.contents[content]), load_inplace=True)
        self.events["reload"] += name in self.loaded
        self.loaded[name] = content

    def unload(self) -> None:
        if self.loaded:
            name = self.random.choice(sorted(self.loaded))
            self.llm.call_control("remove_adapter", {"adapter_id": self.llm.adapters.remove_adapter(name).adapter_id})
            del self.loaded[name]

    def abort(self) -> None:
        if self.waiting:
            request_id = self.random.choice(sorted(self.waiting))
            self.llm.llm_engine.abort_request(request_id)
            del self.waiting[request_id]

    def finish(self) -> None:
        """Answer what is left; when all is unloaded, nothing of any adapter is left."""
        while self.waiting:
            self.step()
        for name in list(self.loaded):
            self.llm.unload_adapter(name)
        self.loaded.clear()
        assert self.llm.call_control("list_adapters") == []
        if not self._drafts:  # what is drafted for the last request depends on those before it
            assert self._count_bytes_after_request() == self.bytes_before
        self.llm.shutdown()

    def _count_bytes_after_request(self) -> int:
        """After the same request each time: what the engine keeps of its last step depends on that."""
        self.llm.generate([self.prompts[0]], PARAMS)
        return count_matrix_bytes()

    def _run_alone(self, model: str) -> dict[tuple[int, int], list[int]]:
        alone = LLM(
            model, enable_lora=True, max_loras=1, max_num_seqs=1, enable_prefix_caching=False,
            num_gpu_blocks_override=16, **SIZES,
        )  # fmt: skip
        expected = {}
        for content in range(-1, NUM_CONTENTS):
            request = LoRARequest(f"content-{content}", 1, str(self.contents[content])) if content >= 0 else None
            outputs = alone.generate(self.prompts, PARAMS, lora_request=request)
            expected |= {(content, index): output.outputs[0].token_ids for index, output in enumerate(outputs)}
        alone.shutdown()
        assert len({tuple(tokens) for tokens in expected.values()}) > len(expected) // 2, "adapters differ"
        return expected


def count_matrix_bytes() -> int:
    """Bytes of all matrices that are alive, as weights and adapters are. What attention gathers has more dimensions,
    and grows with the longest step."""
    storages = {}
    for each in list_matrices():
        storage = each.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def list_matrices() -> list[torch.Tensor]:
    """All that are alive in this process."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter) and each.ndim == 2]


def main() -> None:
    """Ten thousand events, a quarter of them with each of four engines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    engines: list[dict[str, Any]] = [
        {"max_loras": 1, "max_cpu_loras": 1, "max_num_seqs": 4, "num_gpu_blocks_override": 64},
        {"max_loras": 2, "max_cpu_loras": 3, "max_num_seqs": 8, "num_gpu_blocks_override": 20},
        {"max_loras": 3, "max_num_seqs": 8, "num_gpu_blocks_override": 64, "max_num_batched_tokens": 24},
        {"max_loras": 2, "max_num_seqs": 6, "num_gpu_blocks_override": 32, "spec_method": "suffix"},
    ]
    for index, settings in enumerate(engines):
        print(f"seed {args.seed + index}: {settings}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            traffic = AdapterTraffic(Path(folder), args.seed + index, **settings)
            traffic.run_events(args.events // len(engines))
            preemptions = traffic.llm.get_stats()["num_preemptions_total"]
            traffic.finish()
        print(f"  {dict(traffic.events)}, {preemptions:.0f} preemptions", flush=True)


if __name__ == "__main__":
    main()

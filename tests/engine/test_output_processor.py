"""What callers and metrics get of a step's outputs: tokens up to a stop string, and one count for n continuations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest

from quire.core.contracts.metrics import MetricsExporter
from quire.core.engine.exporter_group import ExporterGroup
from quire.core.engine.input_processor import InputProcessor
from quire.core.engine.output_processor import OutputProcessor
from quire.core.engine.tokenizer import Tokenizer
from quire.core.messages import EngineCoreOutput, EngineCoreOutputs, RequestOutput, TokenLogprob
from quire.core.sampling_params import SamplingParams
from quire.core.stats import RequestStats


class CountingExporter(MetricsExporter):
    """Sums of what it is told."""

    def __init__(self) -> None:
        super().__init__({}, None)
        self.num_prompt = self.num_generated = self.num_gaps = 0
        self.finished: list[RequestStats] = []

    def record_tokens(self, num_prompt: int, num_generated: int, ttft_s: float | None, itl_s: list[float]) -> None:
        self.num_prompt += num_prompt
        self.num_generated += num_generated
        self.num_gaps += len(itl_s)

    def record_request(self, stats: RequestStats) -> None:
        self.finished.append(stats)

    def record_engine(self, stats: Mapping[str, float]) -> None:
        pass


class Requests:
    """One request, and what comes of the outputs that the engine core sends for it."""

    def __init__(self, tokenizer: Tokenizer, mode: Literal["delta", "cumulative", "final"], **params) -> None:
        self.tokenizer = tokenizer
        self._exporter = CountingExporter()
        self._exporters = ExporterGroup([("counting", self._exporter)])
        self.processor = OutputProcessor(tokenizer, self._exporters)
        sampling = SamplingParams(**params)
        core_requests = InputProcessor(tokenizer, 256, 300).process_inputs("r", "ask", sampling)
        self.core_ids = [request.request_id for request in core_requests]
        self.processor.add_request("r", "ask", core_requests, mode)
        self.aborted: list[int] = []

    @property
    def exporter(self) -> CountingExporter:
        """The exporter, when it has heard all."""
        self._exporters.close()
        return self._exporter

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def process(self, *outputs: EngineCoreOutput) -> list[RequestOutput]:
        return self._process(EngineCoreOutputs(list(outputs)))

    def process_columns(self, core_id: int, token_ids: list[int]) -> list[RequestOutput]:
        return self._process(EngineCoreOutputs([], [core_id], token_ids, [len(token_ids)]))

    def _process(self, outputs: EngineCoreOutputs) -> list[RequestOutput]:
        processed = self.processor.process_outputs(outputs)
        self.aborted += processed.requests_to_abort
        return processed.request_outputs


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer(str(tiny))


@pytest.mark.parametrize("finish_reason", [None, "length", "stop"])
def test_nothing_behind_a_stop_string_is_given_or_counted(tokenizer: Tokenizer, finish_reason) -> None:
    """A step that verifies drafts brings several tokens at once, a stop string may end in their midst."""
    requests = Requests(tokenizer, "final", stop=["d"], logprobs=0, max_tokens=9)
    logprobs = [TokenLogprob([0], [-1.0], 1)]
    requests.process(EngineCoreOutput(requests.core_ids[0], requests.encode("a"), logprobs=logprobs))
    rows = [TokenLogprob([i], [-2.0], 1) for i in range(4)]
    [output] = requests.process(
        EngineCoreOutput(requests.core_ids[0], requests.encode("cdef"), logprobs=rows, finish_reason=finish_reason)
    )
    [choice] = output.outputs
    assert (choice.text, choice.token_ids) == ("ac", requests.encode("acd"))
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "d")
    assert len(choice.logprobs) == 3 and choice.cumulative_logprob == -5.0
    assert requests.exporter.num_generated == 3 and requests.exporter.num_gaps == 2
    [stats] = requests.exporter.finished
    assert stats.num_generation_tokens == 3
    assert requests.aborted == ([] if finish_reason else requests.core_ids)


def test_nothing_behind_a_stop_string_is_streamed(tokenizer: Tokenizer) -> None:
    requests = Requests(tokenizer, "delta", stop=["d"], max_tokens=9)
    outputs = requests.process(EngineCoreOutput(requests.core_ids[0], requests.encode("a")))
    outputs += requests.process_columns(requests.core_ids[0], requests.encode("bc"))
    outputs += requests.process_columns(requests.core_ids[0], requests.encode("cdef"))
    assert [token for output in outputs for token in output.outputs[0].token_ids] == requests.encode("abccd")
    assert "".join(output.outputs[0].text for output in outputs) == "abcc"
    assert outputs[-1].finished and requests.aborted == requests.core_ids
    assert requests.exporter.num_generated == 5 and requests.exporter.num_gaps == 4


def test_text_so_far_never_shows_the_beginning_of_a_stop_string(tokenizer: Tokenizer) -> None:
    requests = Requests(tokenizer, "cumulative", stop=["cd"], max_tokens=9)
    outputs = requests.process(EngineCoreOutput(requests.core_ids[0], requests.encode("a")))
    for text in ("b", "c", "d"):
        outputs += requests.process_columns(requests.core_ids[0], requests.encode(text))
    assert [output.outputs[0].text for output in outputs] == ["a", "ab", "ab", "ab"]


def test_a_stop_string_that_the_last_byte_leaves_is_found(tokenizer: Tokenizer) -> None:
    requests = Requests(tokenizer, "final", stop=["\ufffd"], max_tokens=2)
    token_ids = [*requests.encode("a"), requests.encode("\N{GRINNING FACE}")[0]]
    [output] = requests.process(EngineCoreOutput(requests.core_ids[0], token_ids, finish_reason="length"))
    [choice] = output.outputs
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("a", "stop", "\ufffd")
    assert requests.aborted == []


@pytest.mark.parametrize("mode", ["delta", "final"])
def test_the_prompt_of_n_continuations_is_counted_once(tokenizer: Tokenizer, mode) -> None:
    """Siblings find the prompt in the cache because the first one computed it: that is no hit of the request."""
    requests = Requests(tokenizer, mode, n=3, max_tokens=1)
    outputs: list[RequestOutput] = []
    for core_id, num_cached in zip(requests.core_ids, (1, 2, 2), strict=True):
        output = EngineCoreOutput(core_id, requests.encode("a"), finish_reason="length", num_cached_tokens=num_cached)
        outputs += requests.process(output)
    assert {output.num_cached_tokens for output in outputs} == {1}
    assert requests.exporter.num_prompt == len(requests.encode("ask")) and requests.exporter.num_generated == 3
    assert [stats.num_cached_tokens for stats in requests.exporter.finished] == [1, 1, 1]

"""Columns of a step's outputs hold what one object for each request would, also after they were encoded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from quire.core.engine.ipc import AddRequests, MessageCodec, StepOutputs
from quire.core.engine.output_processor import FailedRequest
from quire.core.errors import InvalidRequestError, QueueFullError, RequestFailedError
from quire.core.messages import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, RequestOutput
from quire.core.sampling_params import SamplingParams

TOKENS = st.lists(st.integers(0, 1 << 20), min_size=1, max_size=4)


@given(gained=st.lists(TOKENS), special=st.lists(TOKENS))
def test_columns_are_what_each_gained(gained: list[list[int]], special: list[list[int]]) -> None:
    codec = MessageCodec()
    outputs = EngineCoreOutputs(
        [EngineCoreOutput(-i, tokens, "length") for i, tokens in enumerate(special)],
        list(range(len(gained))),
        [token for tokens in gained for token in tokens],
        [] if all(len(tokens) == 1 for tokens in gained) else [len(tokens) for tokens in gained],
    )
    message = codec.decode_from_core(codec.encode(StepOutputs(outputs)))
    assert isinstance(message, StepOutputs)
    each = message.outputs.expand_outputs()
    assert [o.new_token_ids for o in each] == [*special, *gained]
    assert [o.request_id for o in each if o.finish_reason is None] == list(range(len(gained)))
    assert [o.finish_reason for o in each] == ["length"] * len(special) + [None] * len(gained)


@pytest.mark.parametrize(
    ("kind", "cls"),
    [("invalid", InvalidRequestError), ("queue_full", QueueFullError), ("failed", RequestFailedError)],
)
def test_an_error_keeps_its_class_on_the_way(kind, cls) -> None:
    codec = MessageCodec()
    output = EngineCoreOutput(1, [], "error", error="full: of eels", error_kind=kind)
    message = codec.decode_from_core(codec.encode(StepOutputs(EngineCoreOutputs([output]))))
    assert isinstance(message, StepOutputs)
    (received,) = message.outputs.outputs
    error = FailedRequest(received.error, received.error_kind, RequestOutput("r", None, [], [], True)).to_exception()
    assert type(error) is cls and str(error) == "full: of eels"


def test_prompt_and_parameters_of_a_family_are_sent_once() -> None:
    codec, prompt = MessageCodec(), list(range(1000))
    params = SamplingParams(
        seed=1, stop=["a" * 4096] * 64, logit_bias=dict.fromkeys(range(300), 1.0), prompt_logprobs=2
    )
    requests = [EngineCoreRequest(1, prompt, params, 0), EngineCoreRequest(2, [7], SamplingParams(), 0)]
    for i in range(20):
        child_params = replace(params, seed=2 + i, prompt_logprobs=None)
        requests.append(EngineCoreRequest(3 + i, prompt, child_params, 0, parent_id=1))
    requests.append(EngineCoreRequest(97, prompt, SamplingParams(top_k=3), 0, parent_id=1))  # has its own parameters
    requests.append(EngineCoreRequest(99, [5, 6], SamplingParams(), 0, parent_id=98))  # its parent is not sent with it
    data = codec.encode(AddRequests.from_requests(requests))
    assert len(data) < 2 * len(codec.encode(AddRequests(requests[:1])))
    message = codec.decode_to_core(data)
    assert isinstance(message, AddRequests)
    assert message.restore_children() == requests

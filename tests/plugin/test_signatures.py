"""What ``quire plugins check`` refuses for its signatures is not served either."""

import pytest

from quire.core.plugin.target import load_target
from quire.sdk import AttentionBackend, BatchingPolicy, PluginError


class WithoutUsage(BatchingPolicy):
    """Cannot be told how a request ended."""

    def admission_key(self, request):
        return (request.arrival_ns,)

    def request_finished(self, request):
        pass


class WithoutOptions(BatchingPolicy):
    """Cannot be given its options."""

    def __init__(self):
        super().__init__()

    def admission_key(self, request):
        return (request.arrival_ns,)


class WithoutKey(AttentionBackend):
    """Cannot be captured."""

    @classmethod
    def unsupported(cls, spec, device):
        return []

    def prepare_metadata(self, batch):
        pass

    def run(self, layer, q, kv, out, **tensors):
        pass


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (WithoutUsage, "request_finished(self, request) cannot be called as"),
        (WithoutOptions, "__init__(self) cannot be called as"),
        (WithoutKey, "prepare_metadata(self, batch) cannot be called as"),
    ],
)
def test_a_class_that_the_check_refuses_is_not_loaded(cls, message):
    with pytest.raises(PluginError) as refused:
        load_target(f"{__name__}:{cls.__name__}", cls.__base__)
    assert message in str(refused.value) and str(refused.value).endswith(f"of quire.sdk.{cls.__base__.__name__}")


def test_an_engine_does_not_start_on_one():
    from quire import LLM

    with pytest.raises(PluginError, match="request_finished"):
        LLM(device="cpu", load_format="dummy", scheduling_policy=f"{__name__}:WithoutUsage")

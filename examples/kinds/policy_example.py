"""A batching policy: ``--scheduling-policy policy_example:ShortestFirst``."""

from quire.sdk import BatchingPolicy, RequestInfo


class ShortestFirst(BatchingPolicy):
    """The shortest prompt goes first."""

    def admission_key(self, request: RequestInfo) -> tuple[int]:
        return (request.prompt_len,)

"""A draft proposer on the host: ``--spec-method spec_decode_example:RepeatLast``."""

from quire.sdk import HostProposer, Request


class RepeatLast(HostProposer):
    """Expects the last token again and again."""

    def propose(self, request: Request, num_tokens: int) -> list[int]:
        return [request.token_ids[-1]] * num_tokens

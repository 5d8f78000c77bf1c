"""The outputs of one request that its caller has not taken yet."""

from __future__ import annotations

import asyncio

from quire.core.errors import QuireError, RequestFailedError
from quire.core.messages import RequestOutput

__all__ = ["MAX_UNREAD_OUTPUTS", "OutputQueue"]

MAX_UNREAD_OUTPUTS = 65_536
"""Of each answer of a request. With 20 log-probabilities each they take some 300 MB. A reader that is merely slow is
not so far behind."""
_MAX_UNREAD_TOGETHER = 262_144
"""Of all answers of a request."""


class OutputQueue(asyncio.Queue[RequestOutput | QuireError]):
    """Outputs in order. A caller that stops reading, such as a client of a stream, must not fill the memory."""

    num_answers = 1
    """How many answers the request asks for: each has the same share of the bound."""

    def put_output(self, item: RequestOutput | QuireError) -> bool:
        """Add what the caller is to get. False if it is too far behind: then it gets an error in place of all that it
        has not taken, and the request is to be aborted."""
        max_unread = min(MAX_UNREAD_OUTPUTS * self.num_answers, _MAX_UNREAD_TOGETHER)
        if self.qsize() < max_unread:
            self.put_nowait(item)
            return True
        while not self.empty():
            self.get_nowait()
        self.put_nowait(
            RequestFailedError(f"the answer was not read: {max_unread:,} outputs waited; read it as it comes")
        )
        return False

from collections import OrderedDict
from dataclasses import dataclass

from quire.sdk import HostProposer


class Recall(HostProposer):
    """Remembers which token followed each few tokens, in all requests of one ``cache_salt``, and drafts by that: useful
    where answers repeat each other. Forgets what was not used for longest."""

    @dataclass(frozen=True)
    class Options:
        context: int = 3
        """Tokens by which it recognizes a place."""
        capacity: int = 100_000
        """Places that it remembers."""

        def __post_init__(self):
            if self.context < 1 or self.capacity < 1:
                raise ValueError("context and capacity must be at least 1")

    def __init__(self, num_tokens, options=None):
        super().__init__(num_tokens, options or self.Options())
        self.following = OrderedDict()  # (salt, tokens) -> the token that came next
        self.num_learnt = {}  # by request id: tokens whose places are remembered

    def propose(self, request, num_tokens):
        tokens, context, salt = request.token_ids, self.options.context, request.cache_salt
        for end in range(max(self.num_learnt.get(request.request_id, 0), context), len(tokens)):
            place = (salt, *tokens[end - context : end])
            self.following[place] = tokens[end]
            self.following.move_to_end(place)
        self.num_learnt[request.request_id] = len(tokens)
        while len(self.following) > self.options.capacity:
            self.following.popitem(last=False)
        drafts, last = [], tokens[-context:]
        while len(drafts) < num_tokens and (token := self.following.get((salt, *last))) is not None:
            drafts.append(token)
            last = [*last[1:], token]
        return drafts

    def request_finished(self, request):
        self.num_learnt.pop(request.request_id, None)

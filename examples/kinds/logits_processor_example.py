"""A logits processor: ``--logits-processor logits_processor_example:ForbidToken --logits-processor-option token=7``."""

from dataclasses import dataclass
from typing import Any

import torch

from quire.sdk import LogitsBatch, LogitsProcessor, NewRequest


class ForbidToken(LogitsProcessor):
    """One token is never sampled, by any request."""

    @dataclass(frozen=True)
    class Options:
        token: int = 0

    def __init__(self, vocab_size: int, device: torch.device, options: Any = None) -> None:
        super().__init__(vocab_size, device, options)
        self.token = (options or self.Options()).token

    def add_row(self, request: NewRequest) -> bool:
        return True

    def remove_row(self, row: int) -> None:
        pass

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        logits[:, self.token] = -torch.inf

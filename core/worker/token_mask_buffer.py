"""The masks of a step on the device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.messages import TokenMasks
from quire.core.ops.pinned import copy_to_device
from quire.core.sample.token_mask import apply_token_masks
from quire.core.worker.input_builder import LogitsIndices

__all__ = ["TokenMaskBuffer"]


class TokenMaskBuffer:
    """Masks at fixed addresses, which captured graphs read: bits by mask, and the mask of each logits row.

    ``upload`` copies beside the model that is still running, and sampling waits for the copy. It may do so because the
    engine makes the masks of a step when every step before has been read: nothing reads the buffer then.
    """

    def __init__(self, max_masks: int, max_logits_rows: int, vocab_size: int, device: torch.device) -> None:
        self._bits = torch.zeros(max_masks, -(-vocab_size // 32), dtype=torch.int32, device=device)
        self._mask_rows = torch.full((max_logits_rows,), -1, dtype=torch.int32, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def upload_eager(self, masks: TokenMasks, indices: LogitsIndices, sampling_requests: NDArray[np.int64]) -> None:
        """For logits in the order of ``indices``; ``sampling_requests`` are those of the step that sample,
        ascending."""
        starts = indices.starts[np.searchsorted(sampling_requests, masks.request_indices)]
        self._upload(masks, starts + masks.draft_offsets, len(indices.request_indices))

    def upload_captured(self, masks: TokenMasks, query_len: int, num_logits_rows: int) -> None:
        """For logits of a captured step: ``query_len`` rows for every request, padding included."""
        self._upload(masks, masks.request_indices * query_len + masks.draft_offsets, num_logits_rows)

    def apply(self, logits: Tensor) -> None:
        """Forbid tokens in ``logits`` (n, vocab), in place. Fit for capture."""
        apply_token_masks(logits, self._mask_rows[: len(logits)], self._bits)

    def _upload(self, masks: TokenMasks, logits_rows: NDArray[np.int64], num_logits_rows: int) -> None:
        mask_rows = np.full(num_logits_rows, -1, np.int32)
        mask_rows[logits_rows] = np.arange(len(logits_rows))
        device = self._bits.device
        if self._stream is None:
            self._copy(masks, mask_rows)
            return
        with torch.cuda.stream(self._stream):
            self._copy(masks, mask_rows)
        torch.cuda.current_stream(device).wait_stream(self._stream)

    def _copy(self, masks: TokenMasks, mask_rows: NDArray[np.int32]) -> None:
        self._bits[: len(masks.bits)].copy_(torch.from_numpy(masks.bits), non_blocking=True)
        self._mask_rows[: len(mask_rows)].copy_(copy_to_device(mask_rows, torch.int32, self._bits.device))

"""Which sizes of decode steps are captured: steps are padded to the next."""

from __future__ import annotations

__all__ = [
    "choose_capture_sizes",
    "choose_verify_capture_sizes",
    "choose_verify_query_lens",
    "compute_max_captured_tokens",
]

_MAX_VERIFY_REQS = 256
"""Most requests of a captured step that verifies drafts."""


def choose_capture_sizes(max_num_seqs: int) -> list[int]:
    """Padded batch sizes, ascending: powers of two where weights dominate, steps of 16 and 32 above.

    Between 32 and 64 there is none: a library's GEMM of 40 tokens takes longer than one of 64 (an 8B model's step 5.7
    ms on an H200, and 4.7 ms with 64), and 24 tokens take as long as 32.
    """
    sizes = [1, 2, 4, 8, 16, 32, 64, *range(80, 257, 16), *range(288, max_num_seqs + 1, 32)]
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


def choose_verify_capture_sizes(max_num_seqs: int) -> list[int]:
    """Padded batch sizes of steps that verify drafts: fewer above 64 requests, since there is a set of them for each
    query length."""
    sizes = [size for size in choose_capture_sizes(max_num_seqs) if size <= 64 or not size % 64 or size == max_num_seqs]
    return [size for size in sizes if size <= _MAX_VERIFY_REQS]


def compute_max_captured_tokens(max_num_seqs: int, num_draft_tokens: int) -> int:
    """Tokens, and logits rows, of the largest captured step."""
    return max(max_num_seqs, choose_verify_capture_sizes(max_num_seqs)[-1] * (1 + num_draft_tokens))


def choose_verify_query_lens(num_draft_tokens: int) -> list[int]:
    """Query tokens of a request in steps that verify up to ``num_draft_tokens`` drafts: one more than 1, 2 and all."""
    return sorted({1 + count for count in (1, 2, num_draft_tokens) if 0 < count <= num_draft_tokens})

"""Programmatic dependent launch (Hopper and later): a kernel starts while the one before it still runs.

Every kernel of such a chain waits before it touches what a kernel before it wrote, or writes what one before it may
still read. Weights never change, so their loads may come before the wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["can_chain", "start_next", "wait_for_previous"]


def can_chain(device: torch.device) -> bool:
    """Whether kernels on ``device`` may be launched with ``launch_pdl``."""
    if device.type != "cuda" or triton.knobs.runtime.interpret or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def start_next(chained: tl.constexpr):
    """Let the next kernel start as soon as every program of this one has come here."""
    if chained:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(chained: tl.constexpr):
    """Wait until the kernels before have finished and their writes are seen."""
    if chained:
        gdc_wait()

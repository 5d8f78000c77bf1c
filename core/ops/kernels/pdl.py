"""Programmatic dependent launch (PDL, Hopper and later): a kernel starts while the one before it still runs.

Every kernel launched so must call ``pdl_wait`` before it reads what an earlier kernel wrote, or writes what an earlier
kernel may still read. Weights never change, so their loads may come before the wait. (CUDA C++ Programming Guide,
"Programmatic Dependent Launch and Synchronization".)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quire.core.ops.device_profile import DeviceProfile

__all__ = ["pdl_launch_dependents", "pdl_wait", "supports_pdl"]


def supports_pdl(device: torch.device) -> bool:
    """Whether kernels on ``device`` may be launched with ``launch_pdl``."""
    if device.type != "cuda" or triton.knobs.runtime.interpret or torch.version.cuda is None:
        return False
    return DeviceProfile.detect(device).has_pdl


@triton.jit
def pdl_launch_dependents(enable_pdl: tl.constexpr):
    """Let the next kernel start once every program of this one has come here (``griddepcontrol.launch_dependents``)."""
    if enable_pdl:
        gdc_launch_dependents()


@triton.jit
def pdl_wait(enable_pdl: tl.constexpr):
    """Wait until the kernels before have finished and their writes are visible (``griddepcontrol.wait``)."""
    if enable_pdl:
        gdc_wait()

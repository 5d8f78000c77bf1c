"""What kernels need to know of a GPU to choose their launches: its architecture, its size, and which tables fit it."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cache

import torch

from quire.core.errors import ConfigError

__all__ = [
    "INTERPRETER",
    "OLDEST_CAPABILITY",
    "PROFILES",
    "AllReduceLimits",
    "DeviceProfile",
    "check_device",
    "get_shared_memory",
]

OLDEST_CAPABILITY = (8, 0)
"""Ampere: bfloat16 on the tensor cores, and asynchronous copies to shared memory."""
_KIB = 1024
_SHARED_MEMORY = {
    (8, 0): 163 * _KIB, (8, 6): 99 * _KIB, (8, 7): 163 * _KIB, (8, 9): 99 * _KIB, (9, 0): 227 * _KIB,
    (10, 0): 227 * _KIB, (10, 3): 227 * _KIB, (12, 0): 99 * _KIB, (12, 1): 99 * _KIB,
}  # fmt: skip
"""Bytes of a program by capability (CUDA C++ Programming Guide, "Compute Capabilities"); elsewhere the least."""


@dataclass(frozen=True, slots=True)
class AllReduceLimits:
    """The longest messages, in bytes of a rank, that each way of summing over GPUs is chosen for."""

    marked_bytes: int
    """One shot of few rows, whose words carry their own flags; with the residual and the norm too."""
    one_shot_bytes: int
    fused_norm_bytes: int
    """One shot, with the residual and the norm behind it in the same kernel."""
    two_shot_bytes: int
    """Longer ones are NCCL's."""
    min_sent_bytes: int = 0
    max_sent_bytes: int = 0
    """Between these, parts are sent while the product of which they are runs on. Memory for so many is kept."""


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One kind of GPU. Two cards of one profile take the same launches."""

    name: str
    """As the driver calls it, without the vendor: ``H200``."""
    capability: tuple[int, int]
    """Compute capability: (9, 0) is sm_90."""
    num_sms: int
    shared_memory: int
    """Bytes that one program (thread block) may have, with opt-in."""
    l2_cache: int
    """Bytes."""
    memory_bandwidth: float | None = None
    """Bytes a second, by the data sheet; None: not known."""
    launch_table: str | None = None
    """Names the launch tables that were measured on this card; None: launches come from the rules."""
    all_reduce: tuple[tuple[int, AllReduceLimits], ...] = ()
    """By number of GPUs of one host that map each other's memory; none: NCCL sums."""
    shrinks_in_product: tuple[str, ...] = ()
    """Formats of weights, as launch tables name them, whose kernels were measured to be faster when they do the first
    product of adapters themselves, too."""

    @property
    def is_hopper(self) -> bool:
        """Whether kernels for sm_90 alone (``wgmma``, warp specialisation) run here."""
        return self.capability == (9, 0)

    @property
    def has_pdl(self) -> bool:
        """Programmatic dependent launch: Hopper and later."""
        return self.capability >= (9, 0)

    @property
    def has_fp8(self) -> bool:
        """The type e4m3 in conversions and on the tensor cores: Ada, Hopper and later."""
        return self.capability >= (8, 9)

    def get_all_reduce_limits(self, size: int) -> AllReduceLimits | None:
        """For ``size`` such GPUs of one host; None where no figures say that Quire's kernels are faster than NCCL."""
        return dict(self.all_reduce).get(size)

    @staticmethod
    @cache
    def detect(device: torch.device) -> DeviceProfile:
        """The profile of ``device``: a known card, or one made from what the driver says, without tables.

        Cached, and so as cheap as a look-up. Logs once for a card for which no table is measured. A device other than
        a GPU is Triton's interpreter.
        """
        if device.type != "cuda":
            return INTERPRETER
        properties = torch.cuda.get_device_properties(device)
        profile = _find(properties.name, (properties.major, properties.minor), properties.multi_processor_count)
        if profile is None:
            profile = DeviceProfile(
                properties.name,
                (properties.major, properties.minor),
                properties.multi_processor_count,
                get_shared_memory((properties.major, properties.minor)),
                properties.L2_cache_size,
            )
        if profile.launch_table is None:
            logging.getLogger(__name__).info(
                "no launch table is measured for %s (sm_%d%d, %d SMs): its kernels' launches come from rules",
                properties.name,
                *profile.capability,
                profile.num_sms,
            )
        return profile


# As ``benchmarks/kernels/all_reduce.py`` measured on two of them.
_NVLINK_ALL_REDUCE = ((2, AllReduceLimits(128 << 10, 1 << 20, 1 << 20, 8 << 20, 64 << 20, 128 << 20)),)

# By NVIDIA's data sheets.
PROFILES: tuple[DeviceProfile, ...] = (
    DeviceProfile("A100", (8, 0), 108, _SHARED_MEMORY[8, 0], 40 << 20, 1.56e12),  # 2.04e12 of the 80 GB models
    DeviceProfile("L4", (8, 9), 58, _SHARED_MEMORY[8, 9], 48 << 20, 0.30e12),
    DeviceProfile("L40S", (8, 9), 142, _SHARED_MEMORY[8, 9], 96 << 20, 0.86e12),
    DeviceProfile("RTX 4090", (8, 9), 128, _SHARED_MEMORY[8, 9], 72 << 20, 1.01e12),
    DeviceProfile("H100", (9, 0), 132, 227 * _KIB, 50 << 20, 3.35e12),
    DeviceProfile("H100", (9, 0), 114, 227 * _KIB, 50 << 20, 2.04e12),  # the PCIe card
    DeviceProfile(
        "H200",
        (9, 0),
        132,
        227 * _KIB,
        50 << 20,
        4.8e12,
        launch_table="h200",
        all_reduce=_NVLINK_ALL_REDUCE,
        shrinks_in_product=("bf16", "fp8", "int8", "w4a16"),
    ),
    DeviceProfile("B200", (10, 0), 148, 227 * _KIB, 126 << 20, 8.0e12),
)
"""The cards known by name, capability and number of SMs: a slice (MIG) of one of them is another card."""

INTERPRETER = DeviceProfile("interpreter", (99, 0), 4, 227 * _KIB, 0)
"""Stands in for a GPU where Triton's interpreter runs the kernels: it can do everything, and has few SMs."""


def get_shared_memory(capability: tuple[int, int]) -> int:
    """Bytes that a program may have on a GPU of ``capability``; where that is not known, the least of any."""
    return _SHARED_MEMORY.get(capability, 99 * _KIB)


def check_device(device: torch.device) -> None:
    """Raise ``ConfigError`` for a GPU that is older than what kernels are written for, naming what would serve."""
    if device.type != "cuda":
        return
    profile = DeviceProfile.detect(device)
    if profile.capability < OLDEST_CAPABILITY:
        major, minor = profile.capability
        raise ConfigError(
            f"{profile.name} has compute capability {major}.{minor}, and Quire's kernels need "
            f"{OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} (Ampere) or newer; use --device cpu, or a newer GPU: "
            f"A100, L4, L40S, H100, H200 and B200 are known"
        )


def _find(name: str, capability: tuple[int, int], num_sms: int) -> DeviceProfile | None:
    """The known card with that name (as a whole word: a GH200 is no H200), capability and number of SMs. An NVL
    model has other links and less power than the one that was measured: it is another card."""
    if re.search(r"\bNVL\b", name) is not None:
        return None
    for profile in PROFILES:
        matches = re.search(rf"\b{re.escape(profile.name)}\b", name) is not None
        if matches and profile.capability == capability and profile.num_sms == num_sms:
            return profile
    return None

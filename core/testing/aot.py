"""Compiles what a call would launch for a kind of GPU, without having one.

Launches are caught where Triton would make them, so that exactly what runs is compiled: the same constants, the same
specialisation of integers and pointers, the same launch options. Needs a process without Triton's interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from quire.core.ops.device_profile import INTERPRETER, DeviceProfile, get_shared_memory

__all__ = ["CompiledKernel", "Launch", "catch_launches", "compile_launch", "get_variant"]

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
_OBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel, as it would run on a GPU of that capability."""

    name: str
    ptx: str
    shared: int
    """Bytes of shared memory of a program."""
    registers: int
    local: int
    """Bytes of local memory a thread spills to."""


Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A kernel, its arguments by place and by name."""


def catch_launches(run: Callable[[], Any], capability: int | None = None) -> list[Launch]:
    """Call ``run`` with launches caught instead of made; given a capability, as on a GPU that has it, and its shared
    memory, but the interpreter's few SMs, so that small cases fill it. A kernel that tunes itself is launched with
    every configuration."""
    launches: list[Launch] = []

    def catch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    def catch_all(self: Any, *args: Any, **kwargs: Any) -> None:
        for config in self.configs:
            self.fn.run(*args, **(kwargs | config.all_kwargs()))

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", catch))
        patches.enter_context(mock.patch.object(Autotuner, "run", catch_all))
        if capability is not None:
            version = divmod(capability, 10)
            profile = replace(INTERPRETER, capability=version, shared_memory=get_shared_memory(version))
            patches.enter_context(mock.patch.object(DeviceProfile, "detect", lambda device: profile))
        run()
    return launches


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """Compile one launch. Below 90 there is no PDL: ``enable_pdl`` is then False, as it is at run time."""
    kernel, args, kwargs = launch
    options = {name: kwargs[name] for name in _OPTIONS if kwargs.get(name) is not None}
    if capability < 90 and "enable_pdl" in kwargs:
        kwargs = kwargs | {"enable_pdl": False}
    source_class: Any = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_class(kernel, *get_variant((kernel, args, kwargs)))
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _read_usage(compiled.asm["cubin"])
    return CompiledKernel(
        kernel.__name__, compiled.asm["ptx"], compiled.metadata.shared, usage["REG"], usage["LOCAL"] + usage["STACK"]
    )


def get_variant(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """What a launch is compiled for: (types, constants, what is known of values). Those that agree share a program."""
    kernel, args, kwargs = launch
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        value = values.get(name, parameter.default)
        plain = parameter.do_not_specialize
        constant = parameter.is_constexpr or not isinstance(value, triton.language.constexpr)
        assert constant, f"{kernel.__name__} would be compiled anew for every value of {name}"
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not plain):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        if aligned and not plain and not parameter.do_not_specialize_on_alignment:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _read_usage(cubin: bytes) -> dict[str, int]:
    """Registers and memory of the one function in ``cubin``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [str(_OBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    return {key: int(number) for key, number in re.findall(r"\b(REG|LOCAL|STACK):(\d+)", text)}

"""The bundled quantizers: autoawq, llmcompressor and optimum, which ``tools.py`` drives."""

from __future__ import annotations

from pathlib import Path

from quire.sdk import ToolQuantizer

__all__ = ["AWQQuantizer", "Fp8Quantizer", "GPTQQuantizer", "Int8Quantizer", "OptimumGPTQQuantizer"]

# It pins transformers, which would decide with what Quire serves.
_INSTALL_LLMCOMPRESSOR = "pip install 'llmcompressor>=0.14,<0.15' (in an environment of its own, named with --python)"


class _BundledTool(ToolQuantizer):
    script = Path(__file__).with_name("tools.py")


class AWQQuantizer(_BundledTool):
    """AWQ (Lin et al. 2023), 4 bits with zero points, by autoawq."""

    schemes = ("gemm", "gemv", "gemv_fast")
    is_grouped = True
    tool, module = "autoawq", "awq"
    install = "pip install 'quire[awq]'"


class GPTQQuantizer(_BundledTool):
    """GPTQ (Frantar et al. 2022), 4 bits, by llmcompressor."""

    schemes = ("plain", "act_order")
    is_grouped = True
    tool, module = "llmcompressor", "llmcompressor"
    install = _INSTALL_LLMCOMPRESSOR


class OptimumGPTQQuantizer(_BundledTool):
    """GPTQ in its own format, by optimum over gptqmodel."""

    schemes = ("plain", "act_order")
    is_grouped = True
    tool, module = "optimum", "gptqmodel"
    install = "pip install 'quire[optimum]' --no-build-isolation (in an environment of its own, named with --python)"


class Fp8Quantizer(_BundledTool):
    """FP8 weights, with activations scaled by token, once and for all, or in blocks, by llmcompressor."""

    schemes = ("dynamic", "static", "block")
    uncalibrated = ("dynamic", "block")
    tool, module = "llmcompressor", "llmcompressor"
    install = _INSTALL_LLMCOMPRESSOR


class Int8Quantizer(_BundledTool):
    """INT8 weights and activations, by llmcompressor."""

    schemes = ("smoothquant", "rounded")
    uncalibrated = ("rounded",)
    tool, module = "llmcompressor", "llmcompressor"
    install = _INSTALL_LLMCOMPRESSOR

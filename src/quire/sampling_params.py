"""``from quire.sampling_params import GuidedDecodingParams``, as scripts for vLLM have it."""

from __future__ import annotations

from quire.core.sampling_params import SamplingParams
from quire.core.structured_outputs import StructuredOutputsParams

__all__ = ["GuidedDecodingParams", "SamplingParams", "StructuredOutputsParams"]

GuidedDecodingParams = StructuredOutputsParams

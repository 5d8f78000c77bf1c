"""The same workload through ``transformers.generate``, in padded batches: the reference that Quire is compared with."""

from __future__ import annotations

import time
from typing import Any

from quire.core.config import ModelConfig
from quire.server.bench.workloads import Workload

__all__ = ["TransformersRun"]


class TransformersRun:
    """A model loaded by transformers, in the dtype and on the device that the engine uses."""

    def __init__(self, config: ModelConfig, batch_size: int) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._batch_size = batch_size
        dtype = getattr(torch, config.dtype)
        model: Any
        if config.load_format == "dummy":
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.path), dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(config.path, dtype=dtype, local_files_only=True)
        self._model = model.eval().to(config.device)

    def generate(self, workload: Workload) -> float:
        """Seconds for the whole workload, greedy. A batch runs as long as its longest answer."""
        start = time.perf_counter()
        for at in range(0, len(workload.prompts), self._batch_size):
            end = at + self._batch_size
            self._batch(list(workload.prompts[at:end]), max(workload.max_tokens[at:end]))
        return time.perf_counter() - start

    def _batch(self, prompts: list[list[int]], count: int) -> None:
        import torch

        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            self._model.generate(
                ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )

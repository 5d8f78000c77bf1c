"""A sample of what ``make loras`` runs: not one token of a wrong adapter, and memory back to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from .adapter_traffic import AdapterTraffic


@pytest.mark.parametrize("more", [{}, {"spec_method": "suffix"}], ids=["", "drafts"])
def test_random_events_of_adapters(tmp_path: Path, more: dict[str, str]) -> None:
    settings = {"max_loras": 2, "max_cpu_loras": 3, "max_num_seqs": 6, "num_gpu_blocks_override": 24}
    traffic = AdapterTraffic(tmp_path, 3, **settings, **more)
    traffic.run_events(120)
    traffic.finish()
    assert traffic.events["answered"] > 20 and traffic.events["reload"] > 0

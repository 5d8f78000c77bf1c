"""Ranks are numbered as in vLLM: tensor-parallel ranks are neighbours, stages follow each other. They start early."""

from __future__ import annotations

import subprocess
import sys

from quire.core.config import ParallelConfig
from quire.core.env import child_environment
from quire.core.worker.multiproc.rank_layout import RankLayout


def test_ranks_are_numbered_stage_by_stage() -> None:
    layout = RankLayout.from_parallel(ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3))
    assert layout.num_ranks == 6 and layout.output_rank == 4
    assert [layout.list_stage(stage) for stage in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert [layout.list_chain(tensor_rank) for tensor_rank in range(2)] == [[0, 2, 4], [1, 3, 5]]
    for rank in range(6):
        assert layout.get_rank(layout.get_stage(rank), layout.get_tensor_rank(rank)) == rank


def test_a_message_names_the_stage_where_there_are_several() -> None:
    layout = RankLayout(2, 3)
    assert layout.describe_rank(3, "process 7") == "rank 3 (stage 1, process 7)"
    assert layout.describe_rank(3) == "rank 3 (stage 1)"
    assert RankLayout(2).describe_rank(1, "process 7") == "rank 1 (process 7)"
    assert RankLayout(2).describe_rank(1) == "rank 1"


def test_what_starts_ranks_is_light() -> None:
    """Their imports take seconds, and begin when what starts them has ended its own."""
    code = "import sys, quire.core.worker.multiproc.rank_processes as _; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=child_environment(), check=True, timeout=60)

"""Which part of the model each rank has: a stage of its layers, and a shard of every layer of that stage."""

from __future__ import annotations

from dataclasses import dataclass

from quire.core.config import ParallelConfig

__all__ = ["RankLayout"]


@dataclass(frozen=True, slots=True)
class RankLayout:
    """Ranks are numbered stage by stage, as in vLLM: those that share the layers of a stage are neighbours, which
    exchange most."""

    tensor_parallel_size: int = 1
    """Ranks that share every layer of a stage."""
    pipeline_parallel_size: int = 1
    """Stages."""

    @classmethod
    def from_parallel(cls, config: ParallelConfig) -> RankLayout:
        """Of an engine."""
        return cls(config.tensor_parallel_size, config.pipeline_parallel_size)

    @property
    def num_ranks(self) -> int:
        """Of all stages."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def output_rank(self) -> int:
        """The rank that answers with tokens: the first of the last stage."""
        return self.get_rank(self.pipeline_parallel_size - 1, 0)

    def get_stage(self, rank: int) -> int:
        """The stage of a rank."""
        return rank // self.tensor_parallel_size

    def get_tensor_rank(self, rank: int) -> int:
        """Its number among the ranks of its stage."""
        return rank % self.tensor_parallel_size

    def get_rank(self, stage: int, tensor_rank: int) -> int:
        """The rank with this place."""
        return stage * self.tensor_parallel_size + tensor_rank

    def list_stage(self, stage: int) -> list[int]:
        """The ranks that share a stage: they do the same."""
        return [self.get_rank(stage, tensor_rank) for tensor_rank in range(self.tensor_parallel_size)]

    def list_chain(self, tensor_rank: int) -> list[int]:
        """The ranks with this number in their stages, which hand hidden states on to each other."""
        return [self.get_rank(stage, tensor_rank) for stage in range(self.pipeline_parallel_size)]

    def describe_rank(self, rank: int, *details: str) -> str:
        """``rank 3 (stage 1, process 4711)``: how a message names a rank, with ``details`` behind its stage."""
        stage = [f"stage {self.get_stage(rank)}"] if self.pipeline_parallel_size > 1 else []
        inside = ", ".join([*stage, *details])
        return f"rank {rank} ({inside})" if inside else f"rank {rank}"

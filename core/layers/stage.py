"""Pipeline parallelism as a model sees it: which of its layers are this rank's."""

from __future__ import annotations

from dataclasses import dataclass

from quire.core.errors import ConfigError

__all__ = ["PipelineStage"]


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """One of ``size`` stages, each of which has a range of the layers. ``PipelineStage(0, 1)`` is a model that is
    whole. The first stage embeds tokens; the last one norms, computes logits, and samples."""

    index: int = 0
    size: int = 1
    needs_embedding: bool = False
    """Whether this stage needs the embedding though it is not the first: a proposer shares it."""

    @property
    def is_first(self) -> bool:
        """Whether it embeds tokens."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it computes logits."""
        return self.index == self.size - 1

    def list_layers(self, num_layers: int) -> range:
        """The layers of this stage, of ``num_layers``. Stages are equal but for one layer, which those in the middle
        get before the first, and the last never: the first embeds tokens, the last has the head. Raises ``ConfigError``
        where there are fewer layers than stages."""
        if num_layers < self.size:
            raise ConfigError(
                f"pipeline_parallel_size {self.size} is more than the {num_layers} layers of the model; "
                f"give 1 to {num_layers}"
            )
        each, num_left = divmod(num_layers, self.size)
        # In this order stages get one layer more: those in the middle from the back, then the first; never the last.
        order = [*range(self.size - 2, 0, -1), 0][:num_left]
        counts = [each + (stage in order) for stage in range(self.size)]
        start = sum(counts[: self.index])
        return range(start, start + counts[self.index])

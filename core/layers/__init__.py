"""Layers written for tensor-parallel sharding. A model makes them through ``LayerBuilder``."""

from quire.core.layers.attention import Attention, AttentionShape
from quire.core.layers.builder import LayerBuilder
from quire.core.layers.checkpoint import CheckpointLayer, collect_weight_loaders, process_weights_after_loading
from quire.core.layers.embedding import LMHead, VocabEmbedding
from quire.core.layers.linear import Linear
from quire.core.layers.mlp import GatedMLP
from quire.core.layers.norm import RMSNorm
from quire.core.layers.parallel import PartialSum
from quire.core.layers.vocab import VocabShard

__all__ = [
    "Attention",
    "AttentionShape",
    "CheckpointLayer",
    "GatedMLP",
    "LMHead",
    "LayerBuilder",
    "Linear",
    "PartialSum",
    "RMSNorm",
    "VocabEmbedding",
    "VocabShard",
    "collect_weight_loaders",
    "process_weights_after_loading",
]

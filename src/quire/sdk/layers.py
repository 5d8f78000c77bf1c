"""Layers of models, sharded over the ranks and quantized as the checkpoint is. Importing this loads torch.

A model makes most of them through the ``LayerBuilder`` that it is constructed with.
"""

from __future__ import annotations

from quire.core.layers.attention import Attention, AttentionShape
from quire.core.layers.builder import LayerBuilder
from quire.core.layers.checkpoint import (
    CheckpointLayer,
    WeightLoader,
    check_tensor_shape,
    collect_weight_loaders,
    make_split_loader,
    make_transposed_loader,
    process_weights_after_loading,
)
from quire.core.layers.embedding import LMHead, VocabEmbedding
from quire.core.layers.linear import Linear
from quire.core.layers.mlp import GatedMLP
from quire.core.layers.norm import LayerNorm, RMSNorm
from quire.core.layers.parallel import PartialSum, TensorParallel
from quire.core.layers.position import LearnedPositions
from quire.core.layers.vocab import VocabShard

__all__ = [
    "Attention",
    "AttentionShape",
    "CheckpointLayer",
    "GatedMLP",
    "LMHead",
    "LayerBuilder",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "PartialSum",
    "RMSNorm",
    "TensorParallel",
    "VocabEmbedding",
    "VocabShard",
    "WeightLoader",
    "check_tensor_shape",
    "collect_weight_loaders",
    "make_split_loader",
    "make_transposed_loader",
    "process_weights_after_loading",
]

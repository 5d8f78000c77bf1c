"""Layers written for tensor-parallel sharding."""

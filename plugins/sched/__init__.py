"""Bundled batching policies."""

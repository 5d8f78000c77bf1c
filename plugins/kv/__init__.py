"""Bundled KV allocators."""

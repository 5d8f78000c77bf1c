"""Bundled speculative proposers."""

"""Bundled attention backends."""

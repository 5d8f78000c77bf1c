"""Bundled structured-output backends."""

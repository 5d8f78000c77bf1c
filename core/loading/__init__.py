"""Checkpoints: their folder or hub name, their ``config.json``, their weights."""

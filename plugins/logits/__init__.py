"""Bundled logits processors."""

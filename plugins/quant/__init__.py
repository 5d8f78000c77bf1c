"""Bundled quantization loaders."""

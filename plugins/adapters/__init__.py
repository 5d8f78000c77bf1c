"""Bundled adapter methods."""

"""Bundled metrics exporters."""

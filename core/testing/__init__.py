"""Conformance checks, tiny models and the pytest plugin."""

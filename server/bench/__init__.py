"""Benchmarks behind ``quire bench``."""
